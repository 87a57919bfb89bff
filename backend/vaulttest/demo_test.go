package vaulttest

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// startDemo runs scripts/demo.sh as a shell with job control would, in its own
// process group. It returns the directory of its temporary files.
func startDemo(t *testing.T, args ...string) (*exec.Cmd, *buffer, string) {
	t.Helper()
	root, err := Root()
	require.NoError(t, err)
	tmp, err := filepath.EvalSymlinks(t.TempDir())
	require.NoError(t, err)
	out := &buffer{}
	cmd := exec.Command(filepath.Join(root, "scripts", "demo.sh"), args...)
	cmd.Env = append(os.Environ(), "TMPDIR="+tmp, "VAULT_BIN="+VaultBinary(t), "VAULT_NAMESPACE=a developer's own")
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	require.NoError(t, cmd.Start())
	t.Cleanup(func() { _ = syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) })
	return cmd, out, tmp
}

func requireClean(t *testing.T, tmp string) {
	t.Helper()
	left, err := filepath.Glob(filepath.Join(tmp, "kaizala-demo.*"))
	require.NoError(t, err)
	require.Empty(t, left, "the demo's own files")
	require.Empty(t, pluginsIn(t, tmp), "the demo's plugin")
}

func TestDemo(t *testing.T) {
	cmd, out, tmp := startDemo(t)
	require.NoError(t, cmd.Wait(), "%s", out)
	for _, text := range []string{
		"$ vault secrets enable -path=kaizala " + PluginName,
		"connector_secret=-",
		"| vault write kaizala/tenants/contoso/pin mobile_number=-",
		"\nSMS to +",
		"| vault write kaizala/tenants/contoso/pin pin=-",
		"✓ contoso is connected",
		"$ vault write kaizala/tenants/acme refresh_token=-",
		"permission denied",
		`"name":"asha"`,
		"$ vault lease renew",
		"$ vault lease revoke",
		"✓ the access token is a new one",
		"$ kaizala-emulator exchanges -user asha\n2\n",
	} {
		require.Contains(t, out.String(), text)
	}
	// Of Kaizala's secrets, the demo shows only the two access tokens.
	require.Equal(t, 2, strings.Count(out.String(), "eyJhbGciOi"), "%s", out)
	require.NotRegexp(t, `(?m)^connector_secret\b`, out.String())
	requireClean(t, tmp)
}

func TestDevRunsUntilInterrupted(t *testing.T) {
	cmd, out, tmp := startDemo(t, "--dev")
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	Eventually(t, "make dev to be ready", func() bool {
		return strings.Contains(out.String(), "export VAULT_ADDR=") && strings.Contains(out.String(), "Vault's log") || len(ended) > 0
	})
	require.Empty(t, ended, "%s", out)
	require.NotEmpty(t, pluginsIn(t, tmp))
	connectOwnClient(t, out.String())
	require.NoError(t, syscall.Kill(-cmd.Process.Pid, syscall.SIGINT))
	select {
	case err := <-ended:
		require.NoError(t, err, "%s", out)
	case <-time.After(patience):
		t.Fatalf("still running after Ctrl-C:\n%s", out)
	}
	requireClean(t, tmp)
}

// connectOwnClient runs the commands of bootstrap/authserver/README.md for use with make dev, with a free port.
func connectOwnClient(t *testing.T, dev string) {
	root, err := Root()
	require.NoError(t, err)
	env := cleanEnv()
	for _, m := range regexp.MustCompile(`(?m)^export ((?:PATH|VAULT_\w+)=.*)$`).FindAllStringSubmatch(dev, -1) {
		env = append(env, strings.Replace(m[1], "$PATH", os.Getenv("PATH"), 1))
	}
	blocks := readmeBlocks(t, filepath.Join(root, "bootstrap", "authserver", "README.md"))
	paste := func(commands string) *exec.Cmd {
		require.NotEmpty(t, commands)
		cmd := exec.Command("bash", "-ec", commands)
		cmd.Dir, cmd.Env = root, append(env, "KAIZALA_NO_BROWSER=1")
		return cmd
	}
	server := regexp.MustCompile(`(?s)^PORT=(\d+) (.*) \\\n *\$\(scripts/authserver.sh zitadel\) &\n$`).FindStringSubmatch(blocks["**The server.**"])
	require.NotNil(t, server)
	settings, err := paste("env -i " + server[2] + " env").Output()
	require.NoError(t, err)
	service := StartZitadel(t, strings.Split(strings.TrimSpace(string(settings)), "\n")...)

	require.Equal(t, "asha/verysecure", service.User+"/"+service.Password, "the page names them")
	at := "http://127.0.0.1:" + server[1]
	require.Contains(t, blocks["**The connector and the tenant.**"], at)
	out := connects(t, paste(strings.ReplaceAll(blocks["**The connector and the tenant.**"], at, service.Issuer)), service)
	status, subject := service.Userinfo(t, readField(t, out, "access_token"))
	require.Equal(t, 200, status)
	require.Equal(t, service.User, subject)
}

// A Ctrl-C in the middle of the demo cleans up too, with an exit status that is not 0.
func TestInterruptedDemoCleansUp(t *testing.T) {
	cmd, out, tmp := startDemo(t)
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	Eventually(t, "the demo to reach step 1", func() bool {
		return strings.Contains(out.String(), "# Step 1.") || len(ended) > 0
	})
	require.Empty(t, ended, "%s", out)
	require.NoError(t, syscall.Kill(-cmd.Process.Pid, syscall.SIGINT))
	select {
	case err := <-ended:
		require.Error(t, err, "%s", out)
	case <-time.After(patience):
		t.Fatalf("still running after Ctrl-C:\n%s", out)
	}
	requireClean(t, tmp)
}

// buffer is a bytes.Buffer that one goroutine writes while another reads it.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// make demo uses the vault on the PATH if it is new enough; tests use the pinned one.
func TestWhichVaultTheDemoTakes(t *testing.T) {
	t.Parallel()
	root, err := Root()
	require.NoError(t, err)
	pinned, err := filepath.Abs(VaultBinary(t))
	require.NoError(t, err)
	for version, taken := range map[string]bool{
		"Vault v1.19.0 (abc), built 2026-01-01T00:00:00Z": true,
		"Vault v1.21.3, built 2026-01-01T00:00:00Z":       true,
		"Vault v2.0.0 (abc), built 2026-01-01T00:00:00Z":  true,
		"Vault v1.18.9 (abc), built 2026-01-01T00:00:00Z": false,
		"Vault v1.20.0+ent (abc)":                         false,
		"OpenBao v2.3.0 (abc)":                            false,
		"":                                                false,
	} {
		dir := t.TempDir()
		own := filepath.Join(dir, "vault")
		require.NoError(t, os.WriteFile(own, []byte("#!/bin/sh\necho '"+version+"'\n"), 0o755))
		path := func(argument string, env ...string) (string, string) {
			cmd := exec.Command(filepath.Join(root, "scripts", "vault.sh"), argument)
			cmd.Env = append(os.Environ(), append([]string{"PATH=" + dir + ":" + os.Getenv("PATH"), "VAULT_BIN="}, env...)...)
			said := &buffer{}
			cmd.Stderr = said
			out, err := cmd.Output()
			require.NoError(t, err, "%s", said)
			return strings.TrimSpace(string(out)), said.String()
		}
		got, _ := path("demo", "VAULT_BIN="+pinned)
		require.Equal(t, pinned, got, "VAULT_BIN decides")
		if taken {
			got, said := path("demo")
			require.Equal(t, own, got, version)
			require.Contains(t, said, own)
		} else if pinned == filepath.Join(root, "bin", "vault-"+PinnedVault) { // otherwise Vault would have to be built
			got, said := path("demo")
			require.Equal(t, pinned, got, version)
			require.Empty(t, said)
		}
	}
}
