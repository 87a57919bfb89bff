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

	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/kaizala/kaizalatest"
)

func terraformFiles(t *testing.T) []string {
	t.Helper()
	return append(glob(t, bootstrapFile(t, "terraform", "*.tf")), glob(t, bootstrapFile(t, "terraform", "*", "*.tf"))...)
}

// needTerraform leaves a test out, and says so, where there is no Terraform.
func needTerraform(t *testing.T) {
	t.Helper()
	if _, err := exec.LookPath("terraform"); err != nil {
		t.Skip("terraform is not installed here: left out")
	}
}

// hclfmt is the formatter of Terraform's own language, from a Go module, so that
// the format is checked on a machine that has no Terraform as well.
const hclfmt = "github.com/hashicorp/hcl/v2/cmd/hclfmt@v2.24.0"

func TestTerraformFormat(t *testing.T) {
	out, err := exec.Command("go", append([]string{"run", hclfmt, "-require-no-change"}, terraformFiles(t)...)...).CombinedOutput()
	require.NoError(t, err, "%s", out)
	needTerraform(t)
	out, err = exec.Command("terraform", "fmt", "-check", "-diff", "-recursive", bootstrapFile(t, "terraform")).CombinedOutput()
	require.NoError(t, err, "%s", out)
}

// Terraform and configure.sh set up the same.
func TestTerraformAgreesWithConfigure(t *testing.T) {
	main := fileText(t, bootstrapFile(t, "terraform", "main.tf"))
	script := fileText(t, bootstrapFile(t, "configure.sh"))
	words := regexp.MustCompile(`[a-z_]+`)
	for _, kind := range []string{"request", "response"} {
		inTerraform := regexp.MustCompile(`audit_non_hmac_` + kind + `_keys = \[([^]]+)]`).FindStringSubmatch(main)
		inScript := regexp.MustCompile(`(?s)` + kind + `_keys=\(([^)]+)\)`).FindStringSubmatch(script)
		require.NotNil(t, inTerraform)
		require.NotNil(t, inScript)
		require.Equal(t, words.FindAllString(inScript[1], -1), words.FindAllString(inTerraform[1], -1))
	}
}

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
module "policies" {
  source  = "./bootstrap/terraform/policies"
  mount   = "teams/kaizala"
  tenants = ["acme", "contoso"]
}
output "policies" {
  value = module.policies.policies
}
`
	// Terraform copies a module from an absolute path, and its surroundings not.
	require.NoError(t, os.Symlink(bootstrapFile(t), filepath.Join(dir, "bootstrap")))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "main.tf"), []byte(root), 0o600))
	var output strings.Builder
	terraform := func(env []string, args ...string) error {
		cmd := exec.Command("terraform", args...)
		cmd.Dir = dir
		cmd.Env = append(v.CLIEnv(v.RootToken), append(env, "TF_IN_AUTOMATION=1", "CHECKPOINT_DISABLE=1")...)
		out, err := cmd.CombinedOutput()
		output.Write(out)
		if err != nil {
			return fmt.Errorf("terraform %s: %w\n%s", strings.Join(args, " "), err, out)
		}
		return nil
	}
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

	// Nothing is due, so the secrets are not needed.
	require.NoError(t, terraform(nil, "plan", "-no-color", "-detailed-exitcode"))
	require.Equal(t, 1, kaizala.TotalExchanges())

	// Another version writes the secret anew; without it nothing is changed.
	next := kaizala.NewConnectorSecret(id)
	require.Error(t, terraform([]string{"TF_VAR_secret_version=2"}, "apply", "-no-color", "-auto-approve"))
	require.NoError(t, terraform([]string{"TF_VAR_secret_version=2", "TF_VAR_connector_secret=" + next}, "apply", "-no-color", "-auto-approve"))
	_, err = v.Client.Logical().Write("kaizala/tenants/acme/refresh", nil)
	require.NoError(t, err)

	require.Empty(t, secretsIn(output.String(), secret, next, refresh))
	plan := exec.Command("terraform", "show", "-json", "saved")
	plan.Dir = dir
	text, err := plan.Output()
	require.NoError(t, err)
	require.Empty(t, secretsIn(string(text), secret, refresh))
	kept := 0
	for _, name := range glob(t, filepath.Join(dir, "*tfstate*")) {
		require.Empty(t, secretsIn(fileText(t, name), secret, next, refresh), name)
		kept++
	}
	require.Positive(t, kept)
}

// sameAsConfigures compares Terraform's policies with those that configure.sh
// has written, and with what is shipped.
func sameAsConfigures(t *testing.T, v *Vault, output []byte) {
	t.Helper()
	var policies map[string]string
	require.NoError(t, json.Unmarshal(output, &policies))
	_, _ = configureOK(t, v, "KAIZALA_MOUNT=teams/kaizala", "KAIZALA_TENANTS=acme contoso")
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
