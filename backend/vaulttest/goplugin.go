package vaulttest

import (
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	goplugin "github.com/hashicorp/go-plugin"
	"github.com/hashicorp/vault/sdk/helper/pluginutil"
	"github.com/hashicorp/vault/sdk/logical"
	sdkplugin "github.com/hashicorp/vault/sdk/plugin"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
)

// Plugin is a running plugin process without a Vault.
type Plugin struct {
	client   *goplugin.Client
	protocol goplugin.ClientProtocol
	conn     *grpc.ClientConn
	mounts   atomic.Int64
}

// StartPlugin runs a built plugin the way Vault does: checksum, handshake,
// AutoMTLS. The process ends with the test. Its log lines go to logger, or are
// dropped if that is nil.
func StartPlugin(t testing.TB, binary string, logger hclog.Logger) *Plugin {
	t.Helper()
	content, err := os.ReadFile(binary)
	require.NoError(t, err)
	sum := sha256.Sum256(content)
	if logger == nil {
		logger = hclog.NewNullLogger()
	}
	cmd := exec.Command(binary)
	cmd.Env = cleanEnv(
		pluginutil.PluginAutoMTLSEnv+"=true",
		pluginutil.PluginMetadataModeEnv+"=false",
		pluginutil.PluginVaultVersionEnv+"="+PinnedVault,
	)
	p := &Plugin{client: goplugin.NewClient(&goplugin.ClientConfig{
		HandshakeConfig:  sdkplugin.HandshakeConfig,
		VersionedPlugins: sdkplugin.PluginSet,
		Cmd:              cmd,
		SkipHostEnv:      true,
		SecureConfig:     &goplugin.SecureConfig{Checksum: sum[:], Hash: sha256.New()},
		AutoMTLS:         true,
		AllowedProtocols: []goplugin.Protocol{goplugin.ProtocolGRPC},
		Logger:           logger,
	})}
	t.Cleanup(p.client.Kill)
	p.protocol, err = p.client.Client()
	require.NoError(t, err, "starting %s", binary)
	p.conn = p.protocol.(*goplugin.GRPCClient).Conn
	return p
}

// Multiplexed returns whether the process can serve several mounts.
func (p *Plugin) Multiplexed(t testing.TB) bool {
	t.Helper()
	yes, err := pluginutil.MultiplexingSupported(context.Background(), p.conn, PluginName)
	require.NoError(t, err)
	return yes
}

// Mount dispenses one more mount of the process on its own storage, and
// initializes it. The mount is cleaned up before the process ends; a test may
// do it earlier.
func (p *Plugin) Mount(t testing.TB, storage logical.Storage, system logical.SystemView) logical.Backend {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	id := fmt.Sprintf("mount-%d", p.mounts.Add(1))
	backend, err := sdkplugin.Dispense(p.protocol, &multiplexedMount{p.protocol, p.conn, id})
	require.NoError(t, err)
	err = backend.Setup(ctx, &logical.BackendConfig{
		StorageView: storage,
		System:      system,
		Logger:      hclog.NewNullLogger(),
		Config:      map[string]string{"plugin_name": PluginName, "plugin_type": "secret"},
		BackendUUID: id,
	})
	require.NoError(t, err, "setting the mount up")
	err = backend.Initialize(ctx, &logical.InitializationRequest{Storage: storage})
	require.NoError(t, err, "initializing the mount")
	mount := &onceCleaned{Backend: backend}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		mount.Cleanup(ctx)
	})
	return mount
}

// Dispense runs a built plugin without a Vault and returns one mount of it. Each of
// its calls goes over go-plugin, so a benchmark can measure the cost of the process
// boundary alone.
func Dispense(t testing.TB, binary string, storage logical.Storage, system logical.SystemView) logical.Backend {
	t.Helper()
	return StartPlugin(t, binary, nil).Mount(t, storage, system)
}

// onceCleaned makes Cleanup run once, so that a test can clean a mount up before its end.
type onceCleaned struct {
	logical.Backend
	cleaned atomic.Bool
}

func (b *onceCleaned) Cleanup(ctx context.Context) {
	if b.cleaned.CompareAndSwap(false, true) {
		b.Backend.Cleanup(ctx)
	}
}

// PluginVersion is the version that the plugin reports over go-plugin.
func (b *onceCleaned) PluginVersion() logical.PluginVersion {
	return b.Backend.(logical.PluginVersioner).PluginVersion()
}

// multiplexedMount marks each call with its mount, as Vault's plugin catalog does.
type multiplexedMount struct {
	goplugin.ClientProtocol
	conn *grpc.ClientConn
	id   string
}

func (m *multiplexedMount) Conn() grpc.ClientConnInterface { return m }
func (m *multiplexedMount) Reload() error                  { return nil }

// Close does nothing: other mounts use the process, which StartPlugin ends.
func (m *multiplexedMount) Close() error { return nil }

func (m *multiplexedMount) Invoke(ctx context.Context, method string, args, reply any, opts ...grpc.CallOption) error {
	return m.conn.Invoke(m.mark(ctx), method, args, reply, opts...)
}

func (m *multiplexedMount) NewStream(ctx context.Context, desc *grpc.StreamDesc, method string, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	return m.conn.NewStream(m.mark(ctx), desc, method, opts...)
}

func (m *multiplexedMount) mark(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, pluginutil.MultiplexingCtxKey, m.id)
}
