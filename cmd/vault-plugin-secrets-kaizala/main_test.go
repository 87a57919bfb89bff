package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/sdk/helper/pluginutil"
	"github.com/hashicorp/vault/sdk/helper/wrapping"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/hashicorp/vault/sdk/plugin"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/vaulttest"
)

func TestMain(m *testing.M) {
	// One of the SDK's dependencies starts this goroutine when it is imported.
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("go.opencensus.io/stats/view.(*worker).start"))
}

// Vault refuses a plugin whose version is not a semantic one.
func TestDefaultVersionIsSemantic(t *testing.T) {
	require.Regexp(t, `^v(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(-[0-9A-Za-z.-]+)?$`, version)
}

// A linker flag for a variable that does not exist has no effect and gives no error,
// so this test runs a binary that the Makefile has built, and checks its version.
func TestMakeSetsTheVersion(t *testing.T) {
	root, err := vaulttest.Root()
	require.NoError(t, err)
	dir := t.TempDir()
	cmd := exec.Command("make", "-C", root, "build-plugin", "BIN="+dir, "VERSION=v9.8.7-rc.1")
	// If make runs these tests, its settings must not apply to this make.
	cmd.Env = append(os.Environ(), "MAKEFLAGS=", "MFLAGS=", "MAKEOVERRIDES=")
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)

	binary := filepath.Join(dir, name)
	require.Equal(t, "v9.8.7-rc.1", vaulttest.PluginVersion(t, binary))
	mount := vaulttest.Dispense(t, binary, &logical.InmemStorage{}, logical.TestSystemView())
	require.Equal(t, "v9.8.7-rc.1", mount.(logical.PluginVersioner).PluginVersion().Version)
}

func TestWithoutTheFlagTheVersionIsTheDefault(t *testing.T) {
	dir := t.TempDir()
	binary := filepath.Join(dir, name)
	cmd := exec.Command("go", "build", "-o", binary, ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	require.Equal(t, version, vaulttest.PluginVersion(t, binary))
}

func TestStartedByHandItHelps(t *testing.T) {
	var stdout, stderr bytes.Buffer
	cmd := exec.Command(vaulttest.PluginBinary(t))
	cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	require.Error(t, cmd.Run())
	require.Equal(t, 1, cmd.ProcessState.ExitCode())
	require.Empty(t, stdout.String(), "standard output is only for go-plugin")
	for _, text := range []string{
		"keeps refresh tokens, of OAuth 2.0 services and of Kaizala,",
		"vault plugin register -sha256=",
		"vault secrets enable -path=kaizala",
		"vault path-help kaizala",
		"-version=" + vaulttest.PluginVersion(t, vaulttest.PluginBinary(t)),
	} {
		require.Contains(t, stderr.String(), text)
	}
}

func TestArguments(t *testing.T) {
	var stdout, stderr bytes.Buffer
	require.Zero(t, run([]string{"--version"}, &stdout, &stderr))
	require.Equal(t, version+"\n", stdout.String())
	require.Equal(t, 1, run([]string{"-nonsense"}, &stdout, &stderr))
	require.Contains(t, stderr.String(), "vault plugin register")
	require.Equal(t, 1, run([]string{"nonsense"}, &stdout, &stderr))
}

// All that Vault does with the binary, without a Vault: handshake, mutual TLS,
// set-up, requests, calls back to storage, clean-up.
func TestOverGoPlugin(t *testing.T) {
	ctx := context.Background()
	process := vaulttest.StartPlugin(t, vaulttest.PluginBinary(t), nil)
	require.True(t, process.Multiplexed(t))

	one, two := &logical.InmemStorage{}, &logical.InmemStorage{}
	first := process.Mount(t, one, logical.TestSystemView())
	second := process.Mount(t, two, logical.TestSystemView())
	require.Equal(t, logical.TypeLogical, first.Type())
	require.NotEmpty(t, first.SpecialPaths().SealWrapStorage)

	const secret = "AB12CD34EF"
	write := &logical.Request{
		Operation: logical.CreateOperation,
		Path:      "config",
		Storage:   one,
		Data: map[string]any{
			"connector_id":     "37ba1e41-d55c-43bf-a2fa-d72c97aa080a",
			"connector_secret": secret,
		},
	}
	found, exists, err := first.HandleExistenceCheck(ctx, write)
	require.NoError(t, err)
	require.True(t, found)
	require.False(t, exists)
	resp, err := first.HandleRequest(ctx, write)
	require.NoError(t, err)
	require.False(t, resp.IsError(), "%v", resp)

	read := &logical.Request{Operation: logical.ReadOperation, Path: "config", Storage: one}
	resp, err = first.HandleRequest(ctx, read)
	require.NoError(t, err)
	require.Equal(t, "37ba1e41-d55c-43bf-a2fa-d72c97aa080a", resp.Data["connector_id"])
	require.NotContains(t, resp.Data, "connector_secret")

	// Every written key is below a seal-wrapped prefix.
	keys, err := logical.CollectKeys(ctx, one)
	require.NoError(t, err)
	require.NotEmpty(t, keys)
	for _, key := range keys {
		require.True(t, wrapped(first.SpecialPaths().SealWrapStorage, key), key)
	}

	// The second mount of the process has no data of the first.
	resp, err = second.HandleRequest(ctx, &logical.Request{Operation: logical.ReadOperation, Path: "config", Storage: two})
	require.NoError(t, err)
	require.Nil(t, resp)
	keys, err = logical.CollectKeys(ctx, two)
	require.NoError(t, err)
	require.Empty(t, keys)

	// After the end of one mount, the other still works.
	second.Cleanup(ctx)
	resp, err = first.HandleRequest(ctx, read)
	require.NoError(t, err)
	require.NotNil(t, resp)
	first.Cleanup(ctx)
}

// A Vault without AutoMTLS gives the plugin its certificate in a wrapped token, which
// the plugin unwraps at Vault.
func TestOlderVaultsTLS(t *testing.T) {
	binary := vaulttest.PluginBinary(t)
	content, err := os.ReadFile(binary)
	require.NoError(t, err)
	sum := sha256.Sum256(content)
	vault := vaulttest.Start(t)
	older := &olderVault{StaticSystemView: logical.TestSystemView(), vault: vault}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	mount, err := plugin.NewPluginClient(ctx, older, &pluginutil.PluginRunner{
		Name:    name,
		Command: binary,
		Sha256:  sum[:],
	}, hclog.NewNullLogger(), false)
	require.NoError(t, err)
	require.True(t, older.wrapped, "the plugin has got the certificate from Vault")
	storage := &logical.InmemStorage{}
	require.NoError(t, mount.Setup(ctx, &logical.BackendConfig{
		StorageView: storage,
		System:      older,
		Logger:      hclog.NewNullLogger(),
	}))
	defer mount.Cleanup(ctx)
	resp, err := mount.HandleRequest(ctx, &logical.Request{Operation: logical.HelpOperation, Path: "config", Storage: storage})
	require.NoError(t, err)
	require.NotEmpty(t, resp.Data["help"])
}

// olderVault runs plugins like a Vault before 1.12.
type olderVault struct {
	*logical.StaticSystemView
	vault   *vaulttest.Vault
	wrapped bool
}

func (o *olderVault) VaultVersion(context.Context) (string, error) { return "1.11.0", nil }
func (o *olderVault) MlockEnabled() bool                           { return false }

func (o *olderVault) ResponseWrapData(ctx context.Context, data map[string]any, ttl time.Duration, jwt bool) (*wrapping.ResponseWrapInfo, error) {
	o.wrapped = jwt
	client, err := o.vault.Client.Clone()
	if err != nil {
		return nil, err
	}
	client.SetToken(o.vault.RootToken)
	client.AddHeader("X-Vault-Wrap-Format", "jwt")
	client.SetWrappingLookupFunc(func(string, string) string { return ttl.String() })
	secret, err := client.Logical().WriteWithContext(ctx, "sys/wrapping/wrap", data)
	if err != nil {
		return nil, err
	}
	return &wrapping.ResponseWrapInfo{Token: secret.WrapInfo.Token}, nil
}

func wrapped(prefixes []string, key string) bool {
	for _, prefix := range prefixes {
		if strings.HasSuffix(prefix, "/") && strings.HasPrefix(key, prefix) {
			return true
		}
	}
	return false
}
