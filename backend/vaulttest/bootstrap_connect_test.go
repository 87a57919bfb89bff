package vaulttest

import (
	"bufio"
	"context"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/vaulttest/browser"
)

// bootstrap/connect.sh with a token that has only the policy tenant-connect: it shows and opens the address, waits, and says how
// the flow has ended, also with its exit status.
func TestConnect(t *testing.T) {
	t.Parallel()
	m, server, _ := grantMount(t, "kaizala")
	m.vault.shippedPolicy(t, "tenant-connect")
	token := m.vault.TokenWith(t, "tenant-connect")

	// run starts the script, and calls person when it shows the address or the code.
	run := func(person func(shown string), args ...string) (said string, opened string, status int) {
		t.Helper()
		shim := t.TempDir()
		// It stands for the desktop's program that opens an address.
		require.NoError(t, os.WriteFile(filepath.Join(shim, "xdg-open"), []byte("#!/bin/sh\nprintf %s \"$1\" >"+shim+"/opened\n"), 0o755))
		cmd := exec.Command(bootstrapFile(t, "connect.sh"), args...)
		cmd.Env = append(m.vault.CLIEnv(token), "DISPLAY=:0", "KAIZALA_CONNECTOR=as", "VAULT_FORMAT=json")
		for i, kv := range cmd.Env {
			if path, ok := strings.CutPrefix(kv, "PATH="); ok {
				cmd.Env[i] = "PATH=" + shim + ":" + path
			}
		}
		stderr, err := cmd.StderrPipe()
		require.NoError(t, err)
		require.NoError(t, cmd.Start())
		var all strings.Builder
		for lines := bufio.NewScanner(stderr); lines.Scan(); {
			all.WriteString(lines.Text() + "\n")
			shown := strings.TrimSpace(lines.Text())
			if person != nil && shown != "" && (strings.HasPrefix(lines.Text(), "    ") || !strings.Contains(shown, " ")) {
				person(shown)
				person = nil
			}
		}
		_ = cmd.Wait()
		address, _ := os.ReadFile(filepath.Join(shim, "opened"))
		return all.String(), string(address), cmd.ProcessState.ExitCode()
	}
	// callback opens the callback with the parameters of the server's redirect, after change.
	callback := func(address string, err error, change func(url.Values)) {
		require.NoError(t, err)
		u, err := url.Parse(address)
		require.NoError(t, err)
		query := u.Query()
		if change != nil {
			change(query)
		}
		u.RawQuery = query.Encode()
		_, err = browser.Person{}.Open(u.String())
		require.NoError(t, err)
	}

	said, opened, status := run(func(shown string) {
		to, err := server.Approve(shown, "asha")
		callback(to, err, nil)
	}, "acme")
	require.Zero(t, status, said)
	require.Contains(t, said, "The tenant acme is connected.")
	require.Contains(t, said, opened)
	require.True(t, strings.HasPrefix(opened, server.AuthorizationURL()), opened)
	require.Equal(t, oauth2test.Subject("asha"), m.read("tenants/acme").ok(t).text("subject"))

	// A user code can have a space in it.
	server.Set(func(o *oauth2test.Options) {
		o.Edit = func(e oauth2test.Endpoint, fields map[string]any) {
			if e == oauth2test.EndpointDevice {
				fields["user_code"] = strings.Replace(fields["user_code"].(string), "-", " ", 1)
			}
		}
	})
	said, opened, status = run(func(shown string) {
		require.NoError(t, server.ApproveDevice(strings.Replace(shown, " ", "-", 1), "ravi"))
	}, "--device", "acme")
	server.Set(func(o *oauth2test.Options) { o.Edit = nil })
	require.Zero(t, status, said)
	require.Contains(t, said, "The tenant acme is connected.")
	require.Contains(t, said, "Open "+server.VerificationURL())
	require.True(t, strings.HasPrefix(opened, server.VerificationURL()+"?user_code="), opened)
	require.Equal(t, oauth2test.Subject("ravi"), m.read("tenants/acme").ok(t).text("subject"))

	for says, c := range map[string]struct {
		person func(shown string)
		args   []string
	}{
		"access was denied": {func(shown string) { require.NoError(t, server.DenyDevice(shown)) }, []string{"--device", "acme"}},
		"access was denied, and nothing was connected": {func(shown string) {
			to, err := server.Deny(shown)
			callback(to, err, nil)
		}, []string{"acme"}},
		"grants nothing (invalid_scope): the operator has to check the connector's settings there and here.": {func(shown string) {
			to, err := server.Deny(shown)
			callback(to, err, func(query url.Values) { query.Set("error", "invalid_scope") })
		}, []string{"acme"}},
		"this attempt was ended by a newer authorization": {func(string) {
			require.Equal(t, 200, m.as(token).request(http.MethodPut, "kaizala/tenants/acme/device", fields{"connector": "as"}, nil).status)
		}, []string{"acme"}},
		"permission denied":             {nil, []string{"other"}},
		"cannot be a tenant's name":     {nil, []string{"../acme"}},
		"usage: connect.sh [--device]":  {nil, nil},
		"usage: connect.sh [--device] ": {nil, []string{"acme", "other"}},
	} {
		said, _, status := run(c.person, c.args...)
		require.Equal(t, 1, status, said)
		require.Contains(t, said, says)
	}
	require.Equal(t, oauth2test.Subject("ravi"), m.read("tenants/acme").ok(t).text("subject"), "the failed flows have not changed the tenant")

	// The script ends when its Vault token does: another read would fail in the same way.
	said, _, status = run(func(string) {
		code, answer := m.vault.request(t, m.vault.RootToken, http.MethodPut, "auth/token/revoke", map[string]any{"token": token})
		require.Equal(t, 204, code, answer)
	}, "acme")
	require.Equal(t, 1, status, said)
	require.Equal(t, 1, strings.Count(said, "permission denied"), said)
	require.Contains(t, said, "connect.sh: this Vault token has ended, or may not read the result. "+
		"The authorization goes on: log in again, and look with vault read kaizala/tenants/acme/authorize")
}

// A Vault that has gone ends the script once the time for the person is over.
func TestConnectWithoutVault(t *testing.T) {
	t.Parallel()
	shim := t.TempDir()
	vault := `#!/bin/sh
case $1 in
write) printf '%s\n' 'authorization_url    https://as.example/' 'expire_time          2026-01-01T00:10:00.5Z' ;;
*) echo 'connection refused' >&2; exit 2 ;;
esac
`
	require.NoError(t, os.WriteFile(filepath.Join(shim, "vault"), []byte(vault), 0o755))
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, bootstrapFile(t, "connect.sh"), "acme")
	cmd.Env = []string{"PATH=" + shim + ":" + os.Getenv("PATH"), "KAIZALA_NO_BROWSER=1"}
	said, err := cmd.CombinedOutput()
	require.ErrorContains(t, err, "exit status 1", string(said))
	require.Contains(t, string(said), "connect.sh: Vault does not answer, and the time to grant access is over. Later, look with vault read kaizala/tenants/acme/authorize")
}
