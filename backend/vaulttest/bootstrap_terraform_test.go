package vaulttest

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/hashicorp/vault/api"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/kaizala/kaizalatest"
)

func terraformFiles(t *testing.T) []string {
	t.Helper()
	return append(glob(t, bootstrapFile(t, "terraform", "*.tf")), glob(t, bootstrapFile(t, "terraform", "*", "*.tf"))...)
}

// needTerraform skips a test if Terraform is not installed.
func needTerraform(t *testing.T) {
	t.Helper()
	if _, err := exec.LookPath("terraform"); err != nil {
		t.Skip("terraform is not installed here: left out")
	}
}

// hclfmt is the formatter of Terraform's language, from a Go module, so that the
// format is checked on a machine without Terraform too.
const hclfmt = "github.com/hashicorp/hcl/v2/cmd/hclfmt@v2.24.0"

func TestTerraformFormat(t *testing.T) {
	out, err := exec.Command("go", append([]string{"run", hclfmt, "-require-no-change"}, terraformFiles(t)...)...).CombinedOutput()
	require.NoError(t, err, "%s", out)
	needTerraform(t)
	out, err = exec.Command("terraform", "fmt", "-check", "-diff", "-recursive", bootstrapFile(t, "terraform")).CombinedOutput()
	require.NoError(t, err, "%s", out)
}

// Terraform and configure.sh make the same configuration.
func TestTerraformAgreesWithConfigure(t *testing.T) {
	main := fileText(t, bootstrapFile(t, "terraform", "main.tf"))
	for kind, inScript := range keysInClear(t) {
		inTerraform := regexp.MustCompile(kind + ` = \[([^]]+)]`).FindStringSubmatch(main)
		require.NotNil(t, inTerraform)
		require.Equal(t, inScript, regexp.MustCompile(`[a-z_]+`).FindAllString(inTerraform[1], -1))
	}
}

// keysInClear are the fields that configure.sh has Vault show in clear in audit logs, as a mount's tune takes them.
func keysInClear(t *testing.T) map[string][]string {
	t.Helper()
	script := fileText(t, bootstrapFile(t, "configure.sh"))
	keys := map[string][]string{}
	for _, kind := range []string{"request", "response"} {
		list := regexp.MustCompile(`(?s)` + kind + `_keys=\(([^)]+)\)`).FindStringSubmatch(script)
		require.NotNil(t, list)
		keys["audit_non_hmac_"+kind+"_keys"] = strings.Fields(list[1])
	}
	return keys
}

// secretVariables are variables of the root module that Terraform does not store.
const secretVariables = `
variable "connector_secret" {
  type      = string
  default   = null
  ephemeral = true
}
variable "refresh_tokens" {
  type      = map(string)
  default   = {}
  ephemeral = true
}
`

// The parts that handle secrets and policies need no provider, so they are
// applied for real.
func TestTerraform(t *testing.T) {
	t.Parallel()
	needTerraform(t)
	v := Start(t)
	v.MountEngine(t, "kaizala")
	kaizala := kaizalatest.NewServer()
	t.Cleanup(kaizala.Close)
	id, secret := kaizala.RegisterConnector()
	refresh := kaizala.GenerateUserToken(id, "acme")

	dir := t.TempDir()
	root := `
variable "secret_version" {
  default = 1
}
module "connector" {
  source         = "./bootstrap/terraform/secret"
  path           = "kaizala/config"
  settings       = { connector_id = "` + id + `", api_root = "` + kaizala.URL + `", exchanges_per_minute = "20" }
  field          = "connector_secret"
  secret         = var.connector_secret
  secret_version = var.secret_version
}
module "tenant" {
  source         = "./bootstrap/terraform/secret"
  path           = "kaizala/tenants/acme"
  settings       = { ttl = "15m" }
  field          = "refresh_token"
  secret         = lookup(var.refresh_tokens, "acme", null)
  secret_version = 1
  depends_on     = [module.connector]
}
variable "scopes" {
  default = "read"
}
module "oauth" {
  source         = "./bootstrap/terraform/secret"
  path           = "kaizala/config/crm"
  settings = {
    service           = "oauth2"
    connector_id      = "crm"
    token_url         = "https://as.example/token"
    authorization_url = "https://as.example/authorize"
    redirect_uris     = ["https://vault.example/v1/kaizala/callback/crm"]
    scopes            = var.scopes
  }
  field          = "connector_secret"
  secret         = var.connector_secret
  secret_version = 1
}
variable "mount" {
  default = "teams/acme"
}
variable "tenants" {
  type    = set(string)
  default = ["acme", "contoso", "kaizala"]
}
module "policies" {
  source  = "./bootstrap/terraform/policies"
  mount   = var.mount
  tenants = var.tenants
}
output "policies" {
  value = module.policies.policies
}
`
	// From an absolute path, Terraform copies a module without the directories around it.
	require.NoError(t, os.Symlink(bootstrapFile(t), filepath.Join(dir, "bootstrap")))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "main.tf"), []byte(secretVariables+root), 0o600))
	var output strings.Builder
	terraform := func(env []string, args ...string) error { return v.terraform(dir, &output, env, args...) }
	require.NoError(t, terraform(nil, "init", "-no-color"))
	secrets := []string{"TF_VAR_connector_secret=" + secret, `TF_VAR_refresh_tokens={acme="` + refresh + `"}`}
	require.NoError(t, terraform(secrets, "plan", "-no-color", "-out=saved"))
	require.NoError(t, terraform(secrets, "apply", "-no-color", "-auto-approve"))
	policies := exec.Command("terraform", "output", "-json", "policies")
	policies.Dir = dir
	written, err := policies.Output()
	require.NoError(t, err)
	sameAsConfigures(t, v, written)
	read, err := v.Client.Logical().Read("kaizala/tenants/acme")
	require.NoError(t, err)
	require.Equal(t, "ok", read.Data["status"])
	require.Equal(t, "900", read.Data["ttl"].(interface{ String() string }).String())

	// Nothing is to be changed, so the secrets are not needed.
	require.NoError(t, terraform(nil, "plan", "-no-color", "-detailed-exitcode"))
	require.Equal(t, 1, kaizala.TotalExchanges())

	// Names that cannot be, and names whose policies would be one policy in Vault.
	for variable, says := range map[string]string{
		"mount=teams//acme":        "mount has to be a path such as teams/kaizala",
		`tenants=["a*"]`:           "cannot be a tenant's name",
		`tenants=["a..b"]`:         "cannot be a tenant's name",
		`tenants=["acme", "Acme"]`: "Two policies would have one name",
		`tenants=["Templated"]`:    "Two policies would have one name",
	} {
		require.ErrorContains(t, terraform([]string{"TF_VAR_" + variable}, "plan", "-no-color"), says)
	}

	// Another version number writes the secret again; with the same one nothing is changed.
	next := kaizala.NewConnectorSecret(id)
	require.Error(t, terraform([]string{"TF_VAR_secret_version=2"}, "apply", "-no-color", "-auto-approve"))
	require.NoError(t, terraform([]string{"TF_VAR_secret_version=2", "TF_VAR_connector_secret=" + next}, "apply", "-no-color", "-auto-approve"))
	_, err = v.Client.Logical().Write("kaizala/tenants/acme/refresh", nil)
	require.NoError(t, err)

	// Another setting of a connector of OAuth 2.0 leaves the secret that it has.
	require.NoError(t, terraform([]string{"TF_VAR_secret_version=2", "TF_VAR_scopes=write"}, "apply", "-no-color", "-auto-approve"))
	read, err = v.Client.Logical().Read("kaizala/config/crm")
	require.NoError(t, err)
	require.Equal(t, []any{"write"}, read.Data["scopes"])
	_, err = v.Client.Logical().Write("kaizala/tenants/new/authorize", map[string]any{"connector": "crm"})
	require.NoError(t, err)

	noSecretsKept(t, dir, output.String(), secret, next, refresh)
}

// terraform runs a Terraform command in a directory, and adds its output to output.
func (v *Vault) terraform(dir string, output *strings.Builder, env []string, args ...string) error {
	cmd := exec.Command("terraform", args...)
	cmd.Dir = dir
	cmd.Env = append(v.CLIEnv(v.RootToken), append(env, "TF_IN_AUTOMATION=1", "CHECKPOINT_DISABLE=1")...)
	if file := os.Getenv("TF_CLI_CONFIG_FILE"); file != "" { // configures the source of providers
		cmd.Env = append(cmd.Env, "TF_CLI_CONFIG_FILE="+file)
	}
	out, err := cmd.CombinedOutput()
	output.Write(out)
	if err != nil {
		return fmt.Errorf("terraform %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return nil
}

// noSecretsKept searches Terraform's output, the plan "saved" and all states.
func noSecretsKept(t *testing.T, dir, output string, secrets ...string) {
	t.Helper()
	require.Empty(t, secretsIn(output, secrets...))
	plan := exec.Command("terraform", "show", "-json", "saved")
	plan.Dir = dir
	text, err := plan.Output()
	require.NoError(t, err)
	require.Empty(t, secretsIn(string(text), secrets...))
	states := glob(t, filepath.Join(dir, "*tfstate*"))
	require.NotEmpty(t, states)
	for _, name := range states {
		require.Empty(t, secretsIn(fileText(t, name), secrets...), name)
	}
}

// The whole module, on a new Vault: mounted, upgraded, pinned while it is mounted, upgraded while it is pinned, unpinned, and
// destroyed; then mounted on a Vault where an operator has pinned an older version.
func TestTerraformModule(t *testing.T) {
	t.Parallel()
	needTerraform(t)
	s := &site{Vault: Start(t), kaizala: kaizalatest.NewServer()}
	t.Cleanup(s.kaizala.Close)
	s.connectorID, s.connectorSecret = s.kaizala.RegisterConnector()
	refresh := s.kaizala.GenerateUserToken(s.connectorID, "contoso")

	dir := t.TempDir()
	require.NoError(t, os.Symlink(bootstrapFile(t), filepath.Join(dir, "bootstrap")))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "main.tf"), []byte(secretVariables+`
variable "plugin_version" {}
variable "plugin_pinned" {}
module "kaizala" {
  source                   = "./bootstrap/terraform"
  plugin_version           = var.plugin_version
  plugin_sha256            = filesha256("`+s.PluginDir+`/${var.plugin_version}")
  plugin_command           = var.plugin_version
  plugin_pinned            = var.plugin_pinned
  connector_id             = "`+s.connectorID+`"
  connector_secret         = var.connector_secret
  connector_secret_version = 1
  connector_settings       = { api_root = "`+s.kaizala.URL+`" }
  approle_mount            = "approle"
  tenants = {
    acme    = {}
    contoso = { refresh_token_version = 1, settings = { ttl = "15m" } }
  }
  refresh_tokens = var.refresh_tokens
}
`), 0o600))
	var output strings.Builder
	if err := s.terraform(dir, &output, nil, "init", "-no-color"); err != nil && regexp.MustCompile("Failed to (query available provider packages|install provider)").MatchString(err.Error()) {
		t.Skip("Terraform cannot download its provider hashicorp/vault here, which no Go module has: left out; TF_CLI_CONFIG_FILE may name a copy")
	} else if err != nil {
		t.Fatal(err)
	}
	const first, second = "v0.0.1", "v0.0.2"
	for _, version := range []string{first, second} {
		require.NoError(t, os.Rename(BuildPlugin(t, version), filepath.Join(s.PluginDir, version)))
	}
	require.NoError(t, s.Client.Sys().EnableAuthWithOptions("approle", &api.EnableAuthOptions{Type: "approle"}))
	secrets := []string{"TF_VAR_connector_secret=" + s.connectorSecret, `TF_VAR_refresh_tokens={contoso="` + refresh + `"}`}
	pin := "sys/plugins/pins/secret/" + PluginName

	apply := func(version string, pinned bool, secrets ...string) {
		t.Helper()
		env := append(secrets, "TF_VAR_plugin_version="+version, fmt.Sprintf("TF_VAR_plugin_pinned=%t", pinned))
		require.NoError(t, s.terraform(dir, &output, env, "plan", "-no-color", "-out=saved"))
		require.NoError(t, s.terraform(dir, &output, env, "apply", "-no-color", "-auto-approve"))
		s.Reload(t)
		mounts, err := s.Client.Sys().ListMounts()
		require.NoError(t, err)
		require.Equal(t, version, mounts["kaizala/"].RunningVersion)
		pins, err := s.Client.Logical().Read(pin)
		require.NoError(t, err)
		if pinned {
			require.Equal(t, version, pins.Data["version"])
		} else {
			require.Nil(t, pins)
			require.Equal(t, version, mounts["kaizala/"].PluginVersion)
		}
		// After an apply nothing is to be changed, so the secrets are not needed.
		env = env[len(secrets):]
		require.NoError(t, s.terraform(dir, &output, env, "plan", "-no-color", "-detailed-exitcode"))
	}
	destroy := func() {
		t.Helper()
		env := []string{"TF_VAR_plugin_version=" + first, "TF_VAR_plugin_pinned=false"}
		require.NoError(t, s.terraform(dir, &output, env, "destroy", "-no-color", "-auto-approve"))
		pins, err := s.Client.Logical().Read(pin)
		require.NoError(t, err)
		require.Nil(t, pins)
	}

	// Vault would overwrite a policy of another mount, whose users would get the rights of this one.
	require.NoError(t, s.Client.Sys().PutPolicy("kaizala-app-acme", `path "kaizala-app/creds/acme" { capabilities = ["read"] }`))
	require.ErrorContains(t, s.terraform(dir, &output, append(secrets, "TF_VAR_plugin_version="+first, "TF_VAR_plugin_pinned=false"), "plan", "-no-color"),
		"The policy kaizala-app-acme is there for something else")
	require.NoError(t, s.Client.Sys().DeletePolicy("kaizala-app-acme"))

	apply(first, false, secrets...)
	lease, err := s.Client.Logical().Read("kaizala/creds/contoso")
	require.NoError(t, err)
	for _, step := range []struct {
		version string
		pinned  bool
	}{{second, false}, {second, true}, {first, true}, {second, true}, {second, false}, {first, false}, {second, true}, {first, false}} {
		apply(step.version, step.pinned)
		require.Equal(t, lease.Data["access_token"], s.read(t, "kaizala/token/contoso")["access_token"])
	}
	_, err = s.Client.Sys().Renew(lease.LeaseID, 0)
	require.NoError(t, err)
	destroy()

	s.Register(t, first, filepath.Join(s.PluginDir, first))
	s.write(t, pin, map[string]any{"version": first})
	refresh2 := s.kaizala.GenerateUserToken(s.connectorID, "contoso")
	apply(second, true, "TF_VAR_connector_secret="+s.connectorSecret, `TF_VAR_refresh_tokens={contoso="`+refresh2+`"}`)
	require.NotEmpty(t, s.read(t, "kaizala/token/contoso")["access_token"])
	destroy()

	noSecretsKept(t, dir, output.String(), s.connectorSecret, refresh, refresh2)
}

// sameAsConfigures compares Terraform's policies with those that configure.sh has
// written, and with the shipped files.
func sameAsConfigures(t *testing.T, v *Vault, output []byte) {
	t.Helper()
	var policies map[string]string
	require.NoError(t, json.Unmarshal(output, &policies))
	_, _ = configureOK(t, v, "KAIZALA_MOUNT=teams/acme", "KAIZALA_TENANTS=acme contoso kaizala")
	names, err := v.Client.Sys().ListPolicies()
	require.NoError(t, err)
	for _, name := range names {
		if name == "default" || name == "root" {
			continue
		}
		text, err := v.Client.Sys().GetPolicy(name)
		require.NoError(t, err)
		require.Equal(t, text, policies[name], name)
		delete(policies, name)
	}
	require.Empty(t, policies, "policies that configure.sh does not write")
}
