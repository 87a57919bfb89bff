package vaulttest

import (
	"bufio"
	"encoding/json"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/kaizala/kaizalatest"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// configureRun prepares bootstrap/configure.sh against v, with the plugin in the
// plugin directory. A wrapper around vault writes each command line, and its
// environment, to the file calls.
func configureRun(t *testing.T, v *Vault, env ...string) (cmd *exec.Cmd, calls string) {
	t.Helper()
	plugin := filepath.Join(v.PluginDir, PluginName)
	if _, err := os.Stat(plugin); err != nil {
		content, err := os.ReadFile(PluginBinary(t))
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(plugin, content, 0o755))
	}
	shim := t.TempDir()
	calls = filepath.Join(shim, "calls")
	script := `#!/bin/sh
printf '%s ' "$@" >>"` + calls + `"
env | sed 's/^/env: /' >>"` + calls + `"
[ "$1 $EDITION" != "status ent" ] || { echo "Version 1.21.0+ent"; exit 0; }
[ "$1 $EDITION" != "status unknown" ] || exit 1
exec "` + v.binary + `" "$@"
`
	require.NoError(t, os.WriteFile(filepath.Join(shim, "vault"), []byte(script), 0o755))
	cmd = exec.Command(bootstrapFile(t, "configure.sh"))
	cmd.Dir = v.Dir
	cmd.Env = v.CLIEnv(v.RootToken)
	for i, kv := range cmd.Env {
		if path, ok := strings.CutPrefix(kv, "PATH="); ok {
			cmd.Env[i] = "PATH=" + shim + ":" + path
		}
	}
	cmd.Env = append(append(cmd.Env, "KAIZALA_PLUGIN="+plugin), env...)
	return cmd, calls
}

func configureOK(t *testing.T, v *Vault, env ...string) (output, calls string) {
	t.Helper()
	cmd, record := configureRun(t, v, env...)
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	return string(out), fileText(t, record)
}

// configured is what configure.sh must not change when it runs again.
func configured(t *testing.T, v *Vault, policies ...string) map[string]any {
	t.Helper()
	state := map[string]any{}
	for _, path := range []string{"sys/mounts/kaizala", "kaizala/config", "sys/plugins/catalog/secret/" + PluginName, "sys/quotas/rate-limit/kaizala-callback"} {
		secret, err := v.Client.Logical().Read(path)
		require.NoError(t, err, path)
		state[path] = secret
		if secret != nil {
			state[path] = secret.Data
		}
	}
	for _, name := range policies {
		policy, err := v.Client.Sys().GetPolicy(name)
		require.NoError(t, err)
		require.NotEmpty(t, policy, "policy %s", name)
		state[name] = policy
	}
	return state
}

func TestConfigure(t *testing.T) {
	t.Parallel()
	v := Start(t, WithAudit())
	kaizala := kaizalatest.NewServer()
	t.Cleanup(kaizala.Close)
	id, secret := kaizala.RegisterConnector()
	secretFile := filepath.Join(v.Dir, "connector-secret")
	require.NoError(t, os.WriteFile(secretFile, []byte(secret+"\n"), 0o600))

	// Without the connector, which its owner writes later.
	out, _ := configureOK(t, v, "KAIZALA_TENANTS=acme contoso", "KAIZALA_MAX_LEASE_TTL=48h")
	require.Contains(t, out, "Mounting kaizala/")
	require.Contains(t, out, "vault write kaizala/config connector_id=… connector_secret=-")
	require.Contains(t, out, "for an OAuth 2.0 service, the operator (kaizala-operator) before the connector owner:  vault write kaizala/config service=oauth2 ")
	require.Contains(t, out, "vault write kaizala/tenants/contoso refresh_token=-")
	policies := []string{
		"kaizala-connector-owner", "kaizala-operator", "kaizala-monitor", "kaizala-app-templated",
		"kaizala-tenant-user-acme", "kaizala-tenant-connect-acme", "kaizala-app-acme", "kaizala-sidecar-acme",
		"kaizala-tenant-user-contoso", "kaizala-tenant-connect-contoso", "kaizala-app-contoso", "kaizala-sidecar-contoso",
	}
	first := configured(t, v, policies...)
	mount := first["sys/mounts/kaizala"].(map[string]any)
	require.Equal(t, json.Number("172800"), mount["config"].(map[string]any)["max_lease_ttl"])

	// With the connector, its secret from a file. The run leaves an administrator's limit of callback as it is.
	quota := map[string]any{"path": "kaizala/callback*", "rate": 6000, "interval": "2m"}
	_, err := v.Client.Logical().Write("sys/quotas/rate-limit/kaizala-callback", quota)
	require.NoError(t, err)
	env := []string{
		"KAIZALA_TENANTS=acme contoso", "KAIZALA_MAX_LEASE_TTL=48h",
		"KAIZALA_CONNECTOR_ID=" + id, "KAIZALA_CONNECTOR_SECRET_FILE=" + secretFile, "KAIZALA_API_ROOT=" + kaizala.URL,
	}
	out, calls := configureOK(t, v, env...)
	require.NotContains(t, out, "Mounting")
	require.Contains(t, out, "vault write kaizala/tenants/contoso/pin mobile_number=…")
	require.NotContains(t, out, "/authorize", "Kaizala does not offer it")
	require.Empty(t, secretsIn(out+calls, secret))
	second := configured(t, v, policies...)
	require.Equal(t, mount["accessor"], second["sys/mounts/kaizala"].(map[string]any)["accessor"], "the mount is the same")
	require.Equal(t, id, second["kaizala/config"].(map[string]any)["connector_id"])
	limit := second["sys/quotas/rate-limit/kaizala-callback"].(map[string]any)
	require.Equal(t, []any{json.Number("6000"), json.Number("120")}, []any{limit["rate"], limit["interval"]})

	_, _ = configureOK(t, v, env...)
	require.Equal(t, second, configured(t, v, policies...), "a run on a complete configuration changes nothing")

	// The secret from the environment, and a file system that lacks the file.
	next := kaizala.NewConnectorSecret(id)
	out, calls = configureOK(t, v, "KAIZALA_CONNECTOR_ID="+id, "KAIZALA_CONNECTOR_SECRET="+next)
	require.Empty(t, secretsIn(out+calls, next), "no child process of the script has the secret in its arguments or its environment")
	cmd, _ := configureRun(t, v, "KAIZALA_CONNECTOR_ID="+id, "KAIZALA_CONNECTOR_SECRET_FILE="+secretFile+"-that-is-not-there")
	require.Error(t, cmd.Run())

	// The configuration works: the policies let each person do his part.
	refresh := kaizala.GenerateUserToken(id, "contoso")
	out, exit := v.CLIWithInput(t, v.TokenWith(t, "kaizala-tenant-user-contoso"), refresh, "write", "kaizala/tenants/contoso", "refresh_token=-")
	require.Zero(t, exit, out)
	out, exit = v.CLI(t, v.TokenWith(t, "kaizala-app-contoso"), "read", "-field=access_token", "kaizala/creds/contoso")
	require.Zero(t, exit, out)
	require.True(t, kaizala.AccessTokenAlive(strings.TrimSpace(out)))
	out, exit = v.CLI(t, v.TokenWith(t, "kaizala-app-acme"), "read", "kaizala/creds/contoso")
	require.NotZero(t, exit, out)

	auditsShowNoSecret(t, v, next, refresh)
}

// auditsShowNoSecret reads all paths and checks the audit log: access tokens are
// HMACs there, and the rest is in clear.
func auditsShowNoSecret(t *testing.T, v *Vault, secrets ...string) {
	t.Helper()
	for _, path := range []string{"kaizala/config", "kaizala/tenants/contoso", "kaizala/creds/contoso", "kaizala/token/contoso"} {
		read, err := v.Client.Logical().Read(path)
		require.NoError(t, err)
		logged := auditedResponse(t, v, path)
		for field, value := range read.Data {
			if field == "access_token" {
				require.Contains(t, logged[field], "hmac-sha256:")
				secrets = append(secrets, value.(string))
			} else {
				require.NotContains(t, jsonText(t, logged[field]), "hmac-sha256:", "%s of %s is no secret: configure.sh should name it", field, path)
			}
		}
	}
	require.Contains(t, v.Audit(), `"request_timeout"`)
	require.Empty(t, secretsIn(v.Audit(), secrets...))
}

func jsonText(t *testing.T, value any) string {
	t.Helper()
	text, err := json.Marshal(value)
	require.NoError(t, err)
	return string(text)
}

// auditedResponse is the data of the last answer to a read of path.
func auditedResponse(t *testing.T, v *Vault, path string) (data map[string]any) {
	t.Helper()
	lines := bufio.NewScanner(strings.NewReader(v.Audit()))
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var entry struct {
			Type     string
			Request  struct{ Path, Operation string }
			Response struct{ Data map[string]any }
		}
		require.NoError(t, json.Unmarshal(lines.Bytes(), &entry))
		if entry.Type == "response" && entry.Request.Path == path && entry.Request.Operation == "read" {
			data = entry.Response.Data
		}
	}
	require.NotNil(t, data, "no answer of %s in the audit log", path)
	return data
}

func TestConfigureElsewhere(t *testing.T) {
	t.Parallel()
	v := Start(t)

	cmd, _ := configureRun(t, v, "KAIZALA_MOUNT=cubbyhole")
	out, err := cmd.CombinedOutput()
	require.Error(t, err)
	require.Contains(t, string(out), "cubbyhole/ is a mount of")

	cmd, _ = configureRun(t, v, "VAULT_TOKEN=not-good")
	out, err = cmd.CombinedOutput()
	require.ErrorAs(t, err, new(*exec.ExitError))
	require.Contains(t, string(out), "the token is not good")

	// configure.sh asks for seal wrapping only on an Enterprise edition. It runs in the plugin's directory, too.
	cmd, calls := configureRun(t, v, "KAIZALA_PLUGIN="+PluginName)
	cmd.Dir = v.PluginDir
	out, err = cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	require.NotContains(t, fileText(t, calls), "-seal-wrap")
	_, calls = configureOK(t, v, "EDITION=ent", "KAIZALA_MOUNT=teams/kaizala", "KAIZALA_TENANTS=acme")
	require.Contains(t, calls, "-seal-wrap")
	mounts, err := v.Client.Sys().ListMounts()
	require.NoError(t, err)
	require.Contains(t, mounts, "teams/kaizala/")
	policy, err := v.Client.Sys().GetPolicy("teams-kaizala-app-acme")
	require.NoError(t, err)
	require.Contains(t, policy, `"teams/kaizala/creds/acme"`)
	require.Contains(t, policy, `"sys/leases/revoke/teams/kaizala/creds/acme/*"`)

	// The mount and a tenant may have the names that the shipped policies have.
	_, _ = configureOK(t, v, "KAIZALA_MOUNT=teams/acme", "KAIZALA_TENANTS=acme contoso kaizala")
	for _, tenant := range []string{"acme", "contoso", "kaizala"} {
		policy, err := v.Client.Sys().GetPolicy("teams-acme-app-" + tenant)
		require.NoError(t, err)
		require.Equal(t, []string{"teams/acme/creds/" + tenant, "sys/leases/renew", "sys/leases/revoke/teams/acme/creds/" + tenant + "/*", "sys/leases/revoke"},
			pathsOf(policy))
	}

	// Vault would overwrite a policy of another mount or tenant, whose users would get the rights of this one: the script changes
	// nothing. The same where it cannot see that.
	_, _ = configureOK(t, v, "KAIZALA_MOUNT=teams/kaizala", "KAIZALA_TENANTS=acme operator")
	less := func(name, policy string) string {
		require.NoError(t, v.Client.Sys().PutPolicy(name, policy))
		return "VAULT_TOKEN=" + v.TokenWith(t, name)
	}
	const all = `path "*" { capabilities = ["create", "read", "update", "delete", "list", "sudo"] } `
	for _, c := range []struct {
		mount, tenants, says string
		env                  string
	}{
		{"teams-kaizala", "acme", "the mount teams/kaizala/ has the names", "A="},
		{"teams/kaizala-app", "", `teams-kaizala-app-operator is there for something else, since it has no path "teams/kaizala-app/tenants"`, "A="},
		{"teams/kaizala", "ACME", `teams-kaizala-tenant-user-acme is there for something else, since it has no path "teams/kaizala/tenants/ACME"`, "A="},
		{"other", "acme", "cannot tell whether Vault is an Enterprise edition", "EDITION=unknown"}, // and has to seal-wrap
		{"other", "acme Acme", "two policies would have the name other-tenant-user-acme", "A="},
		{"other", "templated", "two policies would have the name other-app-templated", "A="},
		{"teams/kaizala", "acme", "cannot read sys/quotas/rate-limit/teams-kaizala-callback: ", less("no-quotas", all+`path "sys/quotas/*" { capabilities = ["update"] }`)},
		{"teams/kaizala", "acme", "the token must be allowed to list policies", less("no-list", all+`path "sys/policies/acl" { capabilities = ["deny"] }`)},
		{"teams/kaizala", "acme", "the token must be allowed to read policies", less("no-policies", all+`path "sys/policies/acl/*" { capabilities = ["update"] }`)},
	} {
		cmd, calls = configureRun(t, v, "KAIZALA_MOUNT="+c.mount, "KAIZALA_TENANTS="+c.tenants, c.env)
		out, err = cmd.CombinedOutput()
		require.ErrorAs(t, err, new(*exec.ExitError))
		require.Contains(t, string(out), c.says)
		for _, writes := range []string{"register", "enable", "write"} {
			require.NotContains(t, fileText(t, calls), writes+" ")
		}
	}
	_, _ = configureOK(t, v, "KAIZALA_MOUNT=teams/kaizala") // which is no other mount
}

// pathsOf returns the paths of a policy.
func pathsOf(policy string) (paths []string) {
	for _, match := range regexp.MustCompile(`(?m)^path "([^"]*)"`).FindAllStringSubmatch(policy, -1) {
		paths = append(paths, match[1])
	}
	return paths
}

// A newer plugin replaces the one that runs.
func TestConfigureUpgrades(t *testing.T) {
	t.Parallel()
	s := &site{Vault: Start(t), kaizala: kaizalatest.NewServer()}
	t.Cleanup(s.kaizala.Close)
	s.connectorID, s.connectorSecret = s.kaizala.RegisterConnector()
	s.Register(t, "v0.0.1", BuildPlugin(t, "v0.0.1"))
	s.Mount(t, "kaizala")
	s.configure(t, nil)
	s.tenant(t, "acme", nil)
	before := s.read(t, "kaizala/token/acme")["access_token"]

	out, _ := configureOK(t, s.Vault, "VAULT_FORMAT=json") // the script works with this setting too
	require.Contains(t, out, "Upgrading kaizala/ from v0.0.1:")
	mounts, err := s.Client.Sys().ListMounts()
	require.NoError(t, err)
	require.Equal(t, PluginVersion(t, PluginBinary(t)), mounts["kaizala/"].RunningVersion)
	require.Equal(t, before, s.read(t, "kaizala/token/acme")["access_token"])
	require.Equal(t, 1, s.kaizala.TotalExchanges())
}

// A connector of OAuth 2.0 from a recipe: complete, or without its ID and secret, which its owner writes later.
func TestConfigureOAuth(t *testing.T) {
	t.Parallel()
	s := &site{Vault: Start(t, WithAudit())}
	server := newAuthServer(t)
	const callback = "https://vault.example/v1/kaizala/callback"
	id, secret := server.RegisterClient(oauth2test.AuthBasic, callback, callback+"/crm")
	recipe := filepath.Join(s.Dir, "crm.json")
	require.NoError(t, os.WriteFile(recipe, []byte(`{"service": "oauth2", "issuer": "`+server.Issuer()+`",
		"scopes": ["a", "b"], "token_params": {"audience": "x"}}`), 0o600))
	env := []string{"KAIZALA_CONNECTOR_FILE=" + recipe, "KAIZALA_EXCHANGES_PER_MINUTE=30", "KAIZALA_CALLBACKS_PER_MINUTE=20"}

	out, _ := configureOK(t, s.Vault, append(env, "KAIZALA_CALLBACKS_PER_MINUTE=7")...) // later runs say 20
	require.Contains(t, out, "(kaizala-connector-owner):  vault write kaizala/config connector_id=… connector_secret=-")
	require.NotContains(t, out, "service=oauth2", "the operator has written it")
	config := s.read(t, "kaizala/config")
	require.Equal(t, "oauth2", config["service"])
	require.Equal(t, server.TokenURL(), config["token_url"])
	require.Equal(t, json.Number("30"), config["exchanges_per_minute"])
	require.Equal(t, map[string]any{"audience": "x"}, config["token_params"])
	// An older configure.sh named a key that the next run has to take out.
	s.write(t, "sys/mounts/kaizala/tune", map[string]any{"audit_non_hmac_response_keys": []string{"authorization_url", "user_code"}})

	require.Contains(t, out, "vault write kaizala/config redirect_uris=https://VAULT/v1/kaizala/callback\n")
	env = append(env, "KAIZALA_TENANTS=contoso")
	out, _ = configureOK(t, s.Vault, append(env, "KAIZALA_CONNECTOR=crm")...)
	require.Contains(t, out, "vault write kaizala/config/crm redirect_uris=https://VAULT/v1/kaizala/callback/crm\n")
	require.Contains(t, out, "(a policy like kaizala-connector-owner, for kaizala/config/crm):  vault write kaizala/config/crm connector_id=")
	out, calls := configureOK(t, s.Vault, append(env, "KAIZALA_CONNECTOR=crm", "KAIZALA_REDIRECT_URIS="+callback+"/crm",
		"KAIZALA_CONNECTOR_ID="+id, "KAIZALA_CONNECTOR_SECRET="+secret)...)
	require.NotContains(t, out, "vault write kaizala/config")
	require.Empty(t, secretsIn(out+calls, secret))

	// The commands that it prints for a tenant go to this connector.
	runPrinted := func(policy, input string) string {
		t.Helper()
		printed := regexp.MustCompile(`\(` + policy + `\):  vault (.*)`).FindStringSubmatch(out)
		require.NotNil(t, printed, out)
		answer, status := s.CLIWithInput(t, s.TokenWith(t, policy), input, strings.Fields(printed[1])...)
		require.Zero(t, status, answer)
		return answer
	}
	authorized := readField(t, runPrinted("kaizala-tenant-connect-contoso", ""), "authorization_url")
	runPrinted("kaizala-tenant-user-contoso", server.Grant(id, "asha"))
	require.Equal(t, "crm", s.read(t, "kaizala/tenants/contoso")["connector"])
	require.True(t, server.Alive(s.read(t, "kaizala/token/contoso")["access_token"].(string)))

	// The audit log does not show what a person needs to connect another account: the state of the code flow, and the code of the device flow.
	address, err := url.Parse(authorized)
	require.NoError(t, err)
	require.Equal(t, callback+"/crm", address.Query().Get("redirect_uri"))
	require.NotEmpty(t, address.Query().Get("state"))
	device := s.put(t, "kaizala/tenants/contoso/device", map[string]any{"connector": "crm"})
	require.Contains(t, device["verification_uri_complete"], device["user_code"])
	require.Empty(t, secretsIn(s.Audit(), address.Query().Get("state"), device["user_code"].(string)))

	// It shows the addresses that refresh tokens are sent to, and no value that may be a secret.
	s.read(t, "kaizala/config/crm")
	logged := auditedResponse(t, s.Vault, "kaizala/config/crm")
	for field := range config {
		if field == "token_params" || field == "authorization_url" {
			require.Contains(t, jsonText(t, logged[field]), "hmac-sha256:")
		} else {
			require.NotContains(t, jsonText(t, logged[field]), "hmac-sha256:", field)
		}
	}
	require.NotContains(t, jsonText(t, auditedResponse(t, s.Vault, "kaizala/token/contoso")["token_type"]), "hmac-sha256:")

	// Vault limits the requests of one address at callback, and no other requests.
	statuses := map[int]int{}
	for range 30 {
		for _, path := range []string{"kaizala/callback", "kaizala/callback/crm"} {
			status, _ := s.request(t, "", http.MethodGet, path, nil)
			statuses[status]++
		}
	}
	require.Equal(t, 60, statuses[400]+statuses[429], "%v", statuses)
	require.LessOrEqual(t, statuses[400], 25, "20, and those that the rate permits during the test")
	require.GreaterOrEqual(t, statuses[400], 20)
	s.read(t, "kaizala/config")
}

// The scripts refuse arguments and names before they call vault, which is not in PATH here. --help prints the comment at their
// head, which names each variable.
func TestScriptsUsage(t *testing.T) {
	t.Parallel()
	run := func(env string, script string, args ...string) (stdout, stderr string, status int) {
		t.Helper()
		cmd := exec.Command(bootstrapFile(t, script), args...)
		cmd.Env = []string{"PATH=/usr/bin:/bin", env}
		var out, said strings.Builder
		cmd.Stdout, cmd.Stderr = &out, &said
		err := cmd.Run()
		if err != nil {
			require.ErrorAs(t, err, new(*exec.ExitError))
		}
		return out.String(), said.String(), cmd.ProcessState.ExitCode()
	}
	for script, first := range map[string]string{"configure.sh": "Registers the plugin", "connect.sh": "Connects a tenant"} {
		for _, ask := range []string{"-h", "--help"} {
			help, said, status := run("", script, ask)
			require.Zero(t, status, said)
			require.Empty(t, said)
			require.True(t, strings.HasPrefix(help, first), help)
			require.NotContains(t, help, "set -euo")
			for _, variable := range regexp.MustCompile(`KAIZALA_[A-Z_]+`).FindAllString(fileText(t, bootstrapFile(t, script)), -1) {
				require.Contains(t, help, "\n  "+variable, "%s of %s", variable, script)
			}
		}
	}

	const vaultIsNext = "vault is not in PATH"
	long := strings.Repeat("a", 128)
	for _, c := range []struct {
		env  string
		args []string
		says string
	}{
		{"", []string{"configure.sh", "--dry-run"}, "there is no argument --dry-run"},
		{"", []string{"configure.sh", "acme"}, "there is no argument acme"},
		{"KAIZALA_CONNECTOR=../crm", []string{"configure.sh"}, "../crm cannot be a connector's name"},
		{"KAIZALA_CONNECTOR=a..b", []string{"configure.sh"}, "a..b cannot be a connector's name"},
		{"KAIZALA_CONNECTOR=" + long + "a", []string{"configure.sh"}, "cannot be a connector's name"},
		{"KAIZALA_CONNECTOR=" + long, []string{"configure.sh"}, vaultIsNext},
		{"KAIZALA_CONNECTOR=a.-b", []string{"configure.sh"}, vaultIsNext},
		{"KAIZALA_TENANTS=acme a..b", []string{"configure.sh"}, "a..b cannot be a tenant's name"},
		{"KAIZALA_TENANTS=acme contoso", []string{"configure.sh"}, vaultIsNext},
		{"KAIZALA_TENANTS=acme\n  contoso\n", []string{"configure.sh"}, vaultIsNext},
		{"KAIZALA_TENANTS=acme\na..b", []string{"configure.sh"}, "a..b cannot be a tenant's name"},
		{"KAIZALA_CONNECTOR_FILE=/a=b/google.json", []string{"configure.sh"}, "KAIZALA_CONNECTOR_FILE: a path without ="},
		{"KAIZALA_MOUNT=-kaizala", []string{"configure.sh"}, "KAIZALA_MOUNT: "},
		{"KAIZALA_MOUNT=/kaizala", []string{"configure.sh"}, "KAIZALA_MOUNT: "},
		{"KAIZALA_MOUNT=kaizala//", []string{"configure.sh"}, "KAIZALA_MOUNT: "},
		{"KAIZALA_MOUNT=teams//kaizala", []string{"configure.sh"}, "KAIZALA_MOUNT: "},
		{"KAIZALA_MOUNT=teams kaizala", []string{"configure.sh"}, "KAIZALA_MOUNT: "},
		{"KAIZALA_MOUNT=Teams/2.kai-zala_/", []string{"configure.sh"}, vaultIsNext},
		{"", []string{"connect.sh", "a..b"}, "a..b cannot be a tenant's name"},
		{"", []string{"connect.sh", "--devices"}, "--devices cannot be a tenant's name"},
		{"", []string{"connect.sh", "a.-b"}, vaultIsNext},
	} {
		_, said, status := run(c.env, c.args[0], c.args[1:]...)
		require.Equal(t, 1, status, said)
		require.Contains(t, said, c.says, "%s %v", c.env, c.args)
	}
}

// While a version of the plugin is pinned, Vault does not accept a version for a mount: configure.sh changes the pin.
func TestConfigurePinned(t *testing.T) {
	t.Parallel()
	s := &site{Vault: Start(t), kaizala: kaizalatest.NewServer()}
	t.Cleanup(s.kaizala.Close)
	s.connectorID, s.connectorSecret = s.kaizala.RegisterConnector()
	const older = "v0.0.1"
	newer := PluginVersion(t, PluginBinary(t))
	pin := "sys/plugins/pins/secret/" + PluginName
	s.Register(t, older, BuildPlugin(t, older))
	s.write(t, pin, map[string]any{"version": older})
	running := func(mount string) string {
		mounts, err := s.Client.Sys().ListMounts()
		require.NoError(t, err)
		require.Contains(t, mounts, mount)
		return mounts[mount].RunningVersion
	}

	// The mount runs the pinned version, and the README's statements about that are true.
	out, exit := s.CLI(t, s.RootToken, "secrets", "enable", "-path=kaizala", PluginName)
	require.Zero(t, exit, out)
	require.Equal(t, older, running("kaizala/"))
	out, exit = s.CLI(t, s.RootToken, "secrets", "tune", "-plugin-version="+older, "kaizala")
	require.NotZero(t, exit, out)
	require.Contains(t, out, "pinned")
	s.configure(t, nil)
	s.tenant(t, "acme", nil)
	before := s.read(t, "kaizala/token/acme")["access_token"]

	out, _ = configureOK(t, s.Vault, "KAIZALA_MAX_LEASE_TTL=48h")
	require.Contains(t, out, "Moving the pin from "+older+" to "+newer)
	require.Contains(t, out, "Upgrading kaizala/ from "+older)
	require.Equal(t, newer, running("kaizala/"))
	require.Equal(t, newer, s.read(t, pin)["version"])
	require.Equal(t, before, s.read(t, "kaizala/token/acme")["access_token"])
	require.Equal(t, json.Number("172800"), s.read(t, "sys/mounts/kaizala/tune")["max_lease_ttl"])

	// A second run, and one on a new mount: the pin is not changed.
	out, _ = configureOK(t, s.Vault)
	require.NotContains(t, out, "Moving")
	require.NotContains(t, out, "Upgrading")
	out, _ = configureOK(t, s.Vault, "KAIZALA_MOUNT=fresh")
	require.Contains(t, out, "fresh/ gets none of its own")
	require.Equal(t, newer, running("fresh/"))

	// After the pin is deleted, the next run sets the version of the mounts, and a restart of the plugin changes nothing.
	_, err := s.Client.Logical().Delete(pin)
	require.NoError(t, err)
	for _, mount := range []string{"kaizala", "fresh"} {
		configureOK(t, s.Vault, "KAIZALA_MOUNT="+mount)
	}
	s.Seal(t)
	s.Unseal(t)
	require.Equal(t, newer, running("kaizala/"))
	require.Equal(t, newer, running("fresh/"))
	require.Equal(t, before, s.read(t, "kaizala/token/acme")["access_token"])
}
