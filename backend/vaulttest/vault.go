package vaulttest

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/go-cleanhttp"
	"github.com/hashicorp/vault/api"
	"github.com/stretchr/testify/require"
)

// Vault is a running server, initialized, unsealed and active. Its fields do not
// change, also not in a restart.
type Vault struct {
	Addr      string // http://127.0.0.1:PORT
	RootToken string
	UnsealKey string
	Dir       string // the directory of all files of this server
	PluginDir string
	LogFile   string // at trace level, with the plugin's lines
	AuditFile string // written with WithAudit only

	// Client has the root token and never retries, so that a test sees the first
	// 429 or 503.
	Client *api.Client

	binary  string
	storage string
	http    *http.Client
	config  string
	proc    *process
	env     []string
}

// Option is a choice for Start.
type Option func(*options)

type options struct {
	binary    string
	storage   string
	audit     bool
	env       []string
	pluginDir string
	nodeID    string
	join      []string // API addresses of other raft nodes
	edit      []func(map[string]any)
}

// InMem keeps storage in the server's memory, which is the default: it is the
// fastest, and ends with the process.
func InMem() Option { return func(o *options) { o.storage = "inmem" } }

// Raft uses the integrated storage of one node, which a Restart keeps. (The minimal
// build of Vault has no file storage.)
func Raft() Option { return func(o *options) { o.storage = "raft" } }

// WithAudit enables a file audit device, which writes AuditFile.
func WithAudit() Option { return func(o *options) { o.audit = true } }

// WithBinary runs this Vault and not that of VaultBinary.
func WithBinary(path string) Option { return func(o *options) { o.binary = path } }

// WithEnv adds "NAME=value" entries to the server's environment, which plugins
// inherit.
func WithEnv(env ...string) Option {
	return func(o *options) { o.env = append(o.env, env...) }
}

// WithConfig changes the server's configuration before it is written as JSON.
func WithConfig(edit func(config map[string]any)) Option {
	return func(o *options) { o.edit = append(o.edit, edit) }
}

// Start starts a Vault, initializes it with one unseal key, unseals it and
// waits until it is active. The server and its plugins end with the test.
func Start(t testing.TB, opts ...Option) *Vault {
	t.Helper()
	v := launch(t, opts...)
	v.initialize(t)
	v.Unseal(t)
	if v.AuditFile != "" {
		err := v.Client.Sys().EnableAuditWithOptions("file", &api.EnableAuditOptions{
			Type:    "file",
			Options: map[string]string{"file_path": v.AuditFile},
		})
		require.NoError(t, err, "enabling the file audit device")
	}
	return v
}

// launch starts a server that is neither initialized nor unsealed.
func launch(t testing.TB, opts ...Option) *Vault {
	t.Helper()
	o := options{storage: "inmem", nodeID: "node"}
	for _, opt := range opts {
		opt(&o)
	}
	if o.binary == "" {
		o.binary = VaultBinary(t)
	}
	// Vault refuses a plugin directory whose path has a symbolic link.
	dir, err := filepath.EvalSymlinks(t.TempDir())
	require.NoError(t, err)
	v := &Vault{
		Dir:       dir,
		PluginDir: o.pluginDir,
		LogFile:   filepath.Join(dir, "vault.log"),
		binary:    o.binary,
		storage:   o.storage,
		config:    filepath.Join(dir, "vault.json"),
		env:       cleanEnv(append([]string{"HOME=" + dir}, o.env...)...),
	}
	if v.PluginDir == "" {
		v.PluginDir = filepath.Join(dir, "plugins")
		require.NoError(t, os.Mkdir(v.PluginDir, 0o755))
	}
	if o.audit {
		v.AuditFile = filepath.Join(dir, "audit.log")
	}
	t.Cleanup(func() { v.cleanup(t) })

	// Another process may have taken the port since it was found free: then try others.
	for range 5 {
		require.NoError(t, v.configure(o))
		if err = v.start(); err == nil || !errors.Is(err, errPortTaken) {
			break
		}
	}
	require.NoError(t, err)
	return v
}

func (v *Vault) configure(o options) error {
	port, err := freePort()
	if err != nil {
		return err
	}
	clusterPort, err := freePort()
	if err != nil {
		return err
	}
	v.Addr = fmt.Sprintf("http://127.0.0.1:%d", port)
	storage := map[string]any{}
	if o.storage != "inmem" {
		storage["path"] = filepath.Join(v.Dir, "data")
		if err := os.MkdirAll(filepath.Join(v.Dir, "data"), 0o700); err != nil {
			return err
		}
	}
	if o.storage == "raft" {
		storage["node_id"] = o.nodeID
		// Elections within some seconds. With 1 a leader that a busy machine delays for half a second loses its leadership.
		storage["performance_multiplier"] = "3"
		var join []map[string]any
		for _, addr := range o.join {
			join = append(join, map[string]any{"leader_api_addr": addr})
		}
		if join != nil {
			storage["retry_join"] = join
		}
	}
	config := map[string]any{
		"storage": map[string]any{o.storage: storage},
		"listener": map[string]any{"tcp": map[string]any{
			"address":         fmt.Sprintf("127.0.0.1:%d", port),
			"cluster_address": fmt.Sprintf("127.0.0.1:%d", clusterPort),
			"tls_disable":     true,
		}},
		"api_addr":         v.Addr,
		"cluster_addr":     fmt.Sprintf("https://127.0.0.1:%d", clusterPort),
		"plugin_directory": v.PluginDir,
		"disable_mlock":    true,
		"log_level":        "trace",
	}
	for _, edit := range o.edit {
		edit(config)
	}
	text, err := json.MarshalIndent(config, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(v.config, text, 0o600); err != nil {
		return err
	}
	return v.connect()
}

// connect makes the client; it gets the root token when Vault is initialized.
func (v *Vault) connect() error {
	transport := cleanhttp.DefaultPooledTransport()
	transport.Proxy = nil
	transport.MaxIdleConnsPerHost = 64
	v.http = &http.Client{Transport: transport}
	client, err := api.NewClient(&api.Config{Address: v.Addr, HttpClient: v.http, Timeout: patience})
	if err != nil {
		return err
	}
	client.SetMaxRetries(0)
	client.ClearNamespace()
	client.SetToken("")
	v.Client = client
	return nil
}

var errPortTaken = errors.New("the port was taken")

// start runs the process and waits until it answers, sealed or not.
func (v *Vault) start() error {
	log, err := os.OpenFile(v.LogFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	before, err := log.Stat()
	if err != nil {
		return err
	}
	v.proc, err = startProcess(v.binary, v.Dir, log, v.env, "server", "-config", v.config)
	if err != nil {
		return err
	}
	answers := func() bool { return v.proc.ended() || v.health() != 0 }
	if poll(patience, answers) && !v.proc.ended() {
		return nil
	}
	v.proc.kill()
	text := v.Logs()[before.Size():]
	if strings.Contains(text, "address already in use") {
		return errPortTaken
	}
	return fmt.Errorf("vault did not start:\n%s", tail(text, 20))
}

// health is the status of sys/health: 200 only for an active node, 0 while the
// server does not answer.
func (v *Vault) health() int {
	resp, err := v.http.Get(v.Addr + "/v1/sys/health")
	if err != nil {
		return 0
	}
	_ = resp.Body.Close()
	return resp.StatusCode
}

func (v *Vault) initialize(t testing.TB) {
	t.Helper()
	resp, err := v.Client.Sys().Init(&api.InitRequest{SecretShares: 1, SecretThreshold: 1})
	require.NoError(t, err, "initializing Vault")
	v.UnsealKey = resp.KeysB64[0]
	v.setRoot(resp.RootToken)
}

func (v *Vault) setRoot(token string) {
	v.RootToken = token
	v.Client.SetToken(token)
}

func (v *Vault) cleanup(t testing.TB) {
	if v.proc != nil {
		v.proc.kill()
	}
	if v.http != nil {
		v.http.CloseIdleConnections()
	}
	if t.Failed() {
		t.Logf("warnings and the end of Vault's log, %s:\n%s", v.Addr, notable(v.Logs()))
	}
}

// ClientFor is a client with another token. Like Client it never retries.
func (v *Vault) ClientFor(t testing.TB, token string) *api.Client {
	t.Helper()
	client, err := v.Client.Clone()
	require.NoError(t, err)
	client.SetMaxRetries(0)
	client.SetToken(token)
	return client
}

// Seal seals the server and returns once it is sealed.
func (v *Vault) Seal(t testing.TB) {
	t.Helper()
	require.NoError(t, v.Client.Sys().Seal())
	Eventually(t, "Vault to be sealed", func() bool { return v.health() == 503 })
}

// Unseal unseals the server and waits until it is active.
func (v *Vault) Unseal(t testing.TB) {
	t.Helper()
	_, err := v.Client.Sys().Unseal(v.UnsealKey)
	require.NoError(t, err, "unsealing Vault")
	v.WaitActive(t)
}

// WaitActive waits until this server is the active node.
func (v *Vault) WaitActive(t testing.TB) {
	t.Helper()
	Eventually(t, "Vault to be active", func() bool { return v.health() == 200 })
}

// Active returns whether this server is the active node now.
func (v *Vault) Active() bool { return v.health() == 200 }

// Kill ends the server and its plugins with SIGKILL.
func (v *Vault) Kill() { v.proc.kill() }

// Stop ends the server with a signal, as an operator does, and kills the processes
// that still run after 30 seconds.
func (v *Vault) Stop() { v.proc.stop(syscall.SIGINT, 30*time.Second) }

// Terminate is Stop with the signal that a container's init program sends to all
// processes of the group, plugins included.
func (v *Vault) Terminate() { v.proc.stop(syscall.SIGTERM, 30*time.Second) }

// Restart kills the server and its plugins with SIGKILL, starts it again on
// the same storage and address, and unseals it. It needs Raft.
func (v *Vault) Restart(t testing.TB) {
	t.Helper()
	v.Kill()
	v.StartAgain(t)
	v.WaitActive(t)
}

// StartAgain starts a server that Kill, Stop or Terminate has ended, on the same storage
// and address, and unseals it, without waiting for it to become active. It
// needs Raft.
func (v *Vault) StartAgain(t testing.TB) {
	t.Helper()
	if v.storage == "inmem" {
		t.Fatal("a Vault on inmem storage loses everything when it ends: start it with Raft()")
	}
	v.http.CloseIdleConnections()
	require.NoError(t, v.start())
	_, err := v.Client.Sys().Unseal(v.UnsealKey)
	require.NoError(t, err, "unsealing Vault")
}

// Register puts a built plugin into the plugin directory and registers it with
// its checksum under PluginName. The version must be the plugin's own.
func (v *Vault) Register(t testing.TB, version, binary string) {
	t.Helper()
	v.RegisterAs(t, PluginName, version, binary)
}

// RegisterAs is Register under another name.
func (v *Vault) RegisterAs(t testing.TB, name, version, binary string) {
	t.Helper()
	content, err := os.ReadFile(binary)
	require.NoError(t, err)
	sum := sha256.Sum256(content)
	command := name + "-" + version
	// A new file, because the old one may be running.
	path := filepath.Join(v.PluginDir, command)
	_ = os.Remove(path)
	require.NoError(t, os.WriteFile(path, content, 0o755))
	err = v.Client.Sys().RegisterPlugin(&api.RegisterPluginInput{
		Name:    name,
		Type:    api.PluginTypeSecrets,
		Command: command,
		Version: version,
		SHA256:  hex.EncodeToString(sum[:]),
	})
	require.NoError(t, err, "registering %s %s", name, version)
}

// RegisterEngine registers PluginBinary's plugin with its own version, which
// it returns.
func (v *Vault) RegisterEngine(t testing.TB) string {
	t.Helper()
	binary := PluginBinary(t)
	version := PluginVersion(t, binary)
	v.Register(t, version, binary)
	return version
}

// Mount mounts the registered engine at a path such as "kaizala".
func (v *Vault) Mount(t testing.TB, path string) {
	t.Helper()
	err := v.Client.Sys().Mount(path, &api.MountInput{Type: PluginName})
	require.NoError(t, err, "mounting the engine at %s/", path)
}

// MountEngine registers the engine and mounts it.
func (v *Vault) MountEngine(t testing.TB, path string) {
	t.Helper()
	v.RegisterEngine(t)
	v.Mount(t, path)
}

// Unmount disables the engine at a path; Vault revokes its leases first.
func (v *Vault) Unmount(t testing.TB, path string) {
	t.Helper()
	require.NoError(t, v.Client.Sys().Unmount(path), "unmounting %s/", path)
}

// Reload ends the engine's process and makes Vault start it again for all its
// mounts.
func (v *Vault) Reload(t testing.TB) {
	t.Helper()
	// -mounts fails in the root namespace of Vault 1.21.0.
	out, exit := v.CLI(t, v.RootToken, "plugin", "reload", "-type=secret", "-plugin="+PluginName)
	require.Zero(t, exit, out)
}

// Policy writes a policy.
func (v *Vault) Policy(t testing.TB, name, hcl string) {
	t.Helper()
	require.NoError(t, v.Client.Sys().PutPolicy(name, hcl), "policy %s", name)
}

// TokenWith creates a token with these policies, and the default one, that
// lives for an hour.
func (v *Vault) TokenWith(t testing.TB, policies ...string) string {
	t.Helper()
	secret, err := v.Client.Auth().Token().Create(&api.TokenCreateRequest{Policies: policies, TTL: "1h"})
	require.NoError(t, err)
	return secret.Auth.ClientToken
}

// CLI runs the vault command with a token against this server, and returns its
// output, with standard error, and its exit status.
func (v *Vault) CLI(t testing.TB, token string, args ...string) (string, int) {
	t.Helper()
	return v.CLIWithInput(t, token, "", args...)
}

// CLIWithInput is CLI with a text on standard input, for arguments such as
// connector_secret=-.
func (v *Vault) CLIWithInput(t testing.TB, token, input string, args ...string) (string, int) {
	t.Helper()
	cmd := exec.Command(v.binary, args...)
	cmd.Dir = v.Dir
	cmd.Env = v.CLIEnv(token)
	cmd.Stdin = strings.NewReader(input)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("vault %s: %v", strings.Join(args, " "), err)
	}
	return string(out), cmd.ProcessState.ExitCode()
}

// CLIEnv is an environment for scripts and programs that call vault: this server's
// address, a token, a home directory below Dir, and this Vault first in PATH.
func (v *Vault) CLIEnv(token string) []string {
	bin := filepath.Join(v.Dir, "bin")
	if _, err := os.Lstat(filepath.Join(bin, "vault")); err != nil {
		_ = os.MkdirAll(bin, 0o755)
		_ = os.Symlink(v.binary, filepath.Join(bin, "vault"))
	}
	return cleanEnv(
		"HOME="+v.Dir,
		"PATH="+bin+string(os.PathListSeparator)+os.Getenv("PATH"),
		"VAULT_ADDR="+v.Addr,
		"VAULT_TOKEN="+token,
		"VAULT_CLI_NO_COLOR=1",
	)
}

// Logs is the whole log of the server and its plugins so far.
func (v *Vault) Logs() string { return contents(v.LogFile) }

// Audit is the whole audit log so far: a JSON object in each line. It is empty
// without WithAudit.
func (v *Vault) Audit() string { return contents(v.AuditFile) }

func contents(path string) string {
	text, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	return string(text)
}

func notable(log string) string {
	var lines []string
	for line := range strings.Lines(log) {
		if strings.Contains(line, "[WARN]") || strings.Contains(line, "[ERROR]") || strings.Contains(line, "panic") {
			lines = append(lines, line)
		}
	}
	return tail(strings.Join(lines, ""), 20) + "…\n" + tail(log, 15)
}

func tail(text string, n int) string {
	lines := strings.SplitAfter(text, "\n")
	return strings.Join(lines[max(0, len(lines)-n-1):], "")
}
