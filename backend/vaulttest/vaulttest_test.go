package vaulttest

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestStart(t *testing.T) {
	t.Setenv("VAULT_ADDR", "http://127.0.0.1:1")
	t.Setenv("VAULT_TOKEN", "a developer's own")
	began := time.Now()
	v := Start(t, WithAudit())
	t.Logf("a Vault on inmem storage was active after %s", time.Since(began).Round(time.Millisecond))

	_, err := v.Client.Logical().Write("cubbyhole/note", map[string]any{"text": "hello"})
	require.NoError(t, err)
	secret, err := v.Client.Logical().Read("cubbyhole/note")
	require.NoError(t, err)
	require.Equal(t, "hello", secret.Data["text"])

	require.Contains(t, v.Logs(), "[TRACE]")
	require.Contains(t, v.Audit(), `"path":"cubbyhole/note"`)
	require.NotContains(t, v.Audit(), "hello", "the audit log has HMACs")
}

func TestSealAndUnseal(t *testing.T) {
	v := Start(t)
	v.Seal(t)
	_, err := v.Client.Sys().ListMounts()
	require.ErrorContains(t, err, "sealed")
	v.Unseal(t)
	_, err = v.Client.Sys().ListMounts()
	require.NoError(t, err)
}

func TestRestartKeepsWhatWasStored(t *testing.T) {
	v := Start(t, Raft())
	v.Policy(t, "kept", `path "cubbyhole/*" { capabilities = ["read"] }`)
	pid := v.proc.cmd.Process.Pid
	v.Restart(t)
	require.ErrorIs(t, syscall.Kill(pid, 0), syscall.ESRCH)
	policy, err := v.Client.Sys().GetPolicy("kept")
	require.NoError(t, err)
	require.Contains(t, policy, "cubbyhole")

	v.Stop()
	require.Contains(t, v.Logs(), "shutdown triggered", "after Stop, Vault ends by itself")
	v.StartAgain(t)
	v.WaitActive(t)
}

func TestPoliciesTokensAndCLI(t *testing.T) {
	v := Start(t)
	v.Policy(t, "mounts", `path "sys/mounts" { capabilities = ["read"] }`)
	token := v.TokenWith(t, "mounts")

	_, err := v.ClientFor(t, token).Sys().ListMounts()
	require.NoError(t, err)
	_, err = v.ClientFor(t, token).Sys().ListAuth()
	require.ErrorContains(t, err, "permission denied")

	out, exit := v.CLI(t, token, "secrets", "list")
	require.Zero(t, exit, out)
	require.Contains(t, out, "cubbyhole/")
	out, exit = v.CLI(t, token, "auth", "list")
	require.Equal(t, 2, exit, out)
	require.Contains(t, out, "permission denied")
	out, exit = v.CLIWithInput(t, v.RootToken, "from standard input", "write", "cubbyhole/x", "text=-")
	require.Zero(t, exit, out)
	out, _ = v.CLI(t, v.RootToken, "read", "-field=text", "cubbyhole/x")
	require.Equal(t, "from standard input", strings.TrimSpace(out))
}

// The plugin of a killed Vault goes on running: Kill ends both.
func TestKillEndsThePluginToo(t *testing.T) {
	v := Start(t)
	v.MountEngine(t, "kaizala")
	require.NotEmpty(t, pluginsIn(t, v.PluginDir), "the plugin runs")
	v.Kill()
	require.Empty(t, pluginsIn(t, v.PluginDir))
}

// A test process that its timeout ends runs no cleanup: its servers end
// nevertheless.
func TestNothingOutlivesTheTestProcess(t *testing.T) {
	if os.Getenv("VAULTTEST_DIE") != "" {
		v := Start(t)
		v.MountEngine(t, "kaizala")
		require.NotEmpty(t, pluginsIn(t, v.PluginDir), "the plugin runs")
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
	}
	dir, err := filepath.EvalSymlinks(t.TempDir())
	require.NoError(t, err)
	cmd := exec.Command(os.Args[0], "-test.run=^TestNothingOutlivesTheTestProcess$")
	cmd.Env = append(cleanEnv(), "VAULTTEST_DIE=now", "TMPDIR="+dir,
		"VAULT_BIN="+VaultBinary(t), "KAIZALA_PLUGIN_BIN="+PluginBinary(t))
	out, err := cmd.CombinedOutput()
	require.ErrorContains(t, err, "killed", "%s", out)
	Eventually(t, "the plugin to end", func() bool { return len(pluginsIn(t, dir)) == 0 })
	logs, err := filepath.Glob(filepath.Join(dir, "*", "*", "vault.json"))
	require.NoError(t, err)
	require.Len(t, logs, 1)
	Eventually(t, "Vault to end", func() bool { return !mentioned(t, logs[0]) })
}

// mentioned returns whether a running process has text in its arguments.
func mentioned(t *testing.T, text string) bool {
	t.Helper()
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	require.NoError(t, err)
	for _, path := range lines {
		if line, err := os.ReadFile(path); err == nil && strings.Contains(string(line), text) {
			return true
		}
	}
	return false
}

// pluginsIn lists the processes whose program is in dir.
func pluginsIn(t *testing.T, dir string) (pids []string) {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Skip("no /proc here")
	}
	for _, e := range entries {
		if exe, err := os.Readlink("/proc/" + e.Name() + "/exe"); err == nil && strings.HasPrefix(exe, dir) {
			pids = append(pids, e.Name())
		}
	}
	return pids
}

func TestTheEngineInVault(t *testing.T) {
	v := Start(t)
	version := v.RegisterEngine(t)
	v.Mount(t, "kaizala")
	v.Mount(t, "second")
	mounts, err := v.Client.Sys().ListMounts()
	require.NoError(t, err)
	require.Equal(t, version, mounts["kaizala/"].RunningVersion)
	require.Equal(t, version, mounts["second/"].RunningVersion)
	require.Len(t, pluginsIn(t, v.PluginDir), 1, "two mounts share a process")

	out, exit := v.CLI(t, v.RootToken, "path-help", "kaizala")
	require.Zero(t, exit, out)
	require.Contains(t, out, "config")

	before := pluginsIn(t, v.PluginDir)
	v.Reload(t)
	_, exit = v.CLI(t, v.RootToken, "path-help", "kaizala")
	require.Zero(t, exit)
	require.NotEqual(t, before, pluginsIn(t, v.PluginDir), "the plugin runs in another process")

	v.Unmount(t, "second")
	out, exit = v.CLI(t, v.RootToken, "path-help", "kaizala")
	require.Zero(t, exit, out)
}

func TestCluster(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: three Vaults; make test runs it")
	}
	c := StartCluster(t, 3)
	first := c.Leader(t)
	first.Policy(t, "everywhere", `path "cubbyhole/*" { capabilities = ["read"] }`)

	second := c.StepDown(t)
	require.NotSame(t, first, second)
	c.Kill(second)
	third := c.WaitForLeader(t)
	require.NotSame(t, second, third)
	policy, err := third.Client.Sys().GetPolicy("everywhere")
	require.NoError(t, err)
	require.NotEmpty(t, policy)

	c.RestartNode(t, second)
	require.Len(t, c.running(), 3)
}
