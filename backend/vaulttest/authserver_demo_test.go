package vaulttest

import (
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestDemoOAuth(t *testing.T) {
	found(t, zitadelOnce) // built before the time is measured
	root, err := Root()
	require.NoError(t, err)
	tmp, err := filepath.EvalSymlinks(t.TempDir())
	require.NoError(t, err)
	out := &buffer{}
	cmd := exec.Command(filepath.Join(root, "scripts", "demo-oauth.sh"))
	cmd.Env = append(os.Environ(), "TMPDIR="+tmp, "VAULT_BIN="+VaultBinary(t), "VAULT_NAMESPACE=a developer's own")
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	require.NoError(t, cmd.Start())
	t.Cleanup(func() { _ = syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) })
	require.NoError(t, cmd.Wait(), "%s", out)
	for _, text := range []string{
		"$ vault write oauth/config service=oauth2 issuer=http://127.0.0.1:",
		"connector_secret=-",
		"permission denied",
		"Connect this tenant?",
		"The tenant is connected",
		"✓ the tenant is connected",
		`"sub":"asha"`,
		"$ vault lease renew",
		"$ vault lease revoke",
		"✓ the service refuses it now",
		"✓ the access token is a new one",
		`"reused":0,`,
		"Done.",
	} {
		require.Contains(t, out.String(), text)
	}
	require.NotRegexp(t, `(?m)^(connector_secret|refresh_token)\b`, out.String())
	requireClean(t, tmp)
}
