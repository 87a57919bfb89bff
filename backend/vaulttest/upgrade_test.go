package vaulttest

import (
	"crypto/sha256"
	"encoding/hex"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// release010 is the commit that version 0.1.0 is built from.
const release010 = "0f7a48c3fd5e46a064741e95b8876e9b4700777b"

// buildRelease010 builds the plugin of version 0.1.0 from its commit and returns its path.
func buildRelease010(t *testing.T) string {
	t.Helper()
	root, err := Root()
	require.NoError(t, err)
	if err := exec.Command("git", "-C", root, "cat-file", "-e", release010+"^{commit}").Run(); err != nil {
		const text = "the commit of version 0.1.0 is not here; in a shallow clone, run git fetch --unshallow"
		if os.Getenv("CI") != "" {
			t.Fatal(text)
		}
		t.Skip(text)
	}
	dir := t.TempDir()
	out, err := exec.Command("sh", "-ec", `git -C "$0" archive "$1" | tar -xf - -C "$2"`, root, release010, dir).CombinedOutput()
	require.NoError(t, err, "%s", out)
	path := filepath.Join(dir, PluginName)
	build := exec.Command("go", "build", "-trimpath", "-ldflags=-X main.version=v0.1.0", "-o", path, "./cmd/"+PluginName)
	build.Dir = dir
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err = build.CombinedOutput()
	require.NoError(t, err, "%s", out)
	return path
}

// An upgrade from version 0.1.0 with the steps of the README keeps tenants, tokens and leases, and makes no call to Kaizala. A test
// in process loads the entries of every format.
func TestUpgrade(t *testing.T) {
	const older, newer = "v0.1.0", "v0.2.0"
	binaries := map[string]string{older: buildRelease010(t), newer: BuildPlugin(t, newer)}
	t.Parallel() // so that other tests run during the builds
	for _, vault := range []struct {
		version string
		binary  func(testing.TB) string
	}{
		{OldestVault, OldestVaultBinary},
		{PinnedVault, VaultBinary},
	} {
		t.Run(vault.version, func(t *testing.T) {
			v := Start(t, Raft(), WithBinary(vault.binary(t)))
			cli := func(args ...string) string {
				t.Helper()
				out, exit := v.CLI(t, v.RootToken, args...)
				require.Zero(t, exit, "vault %s: %s", strings.Join(args, " "), out)
				return out
			}
			register := func(version string) {
				t.Helper()
				content, err := os.ReadFile(binaries[version])
				require.NoError(t, err)
				command := PluginName + "-" + version
				require.NoError(t, os.WriteFile(filepath.Join(v.PluginDir, command), content, 0o755))
				sum := sha256.Sum256(content)
				cli("plugin", "register", "-sha256="+hex.EncodeToString(sum[:]), "-command="+command, "-version="+version, "secret", PluginName)
				require.Regexp(t, PluginName+` +secret +`+version, cli("plugin", "list", "-detailed", "secret"))
			}
			runs := func(version string) {
				t.Helper()
				mounts, err := v.Client.Sys().ListMounts()
				require.NoError(t, err)
				for _, path := range []string{"kaizala/", "second/"} {
					require.Equal(t, version, mounts[path].RunningVersion, path)
				}
			}

			register(older)
			m := configuredEngine(t, v, "kaizala")
			second := configuredEngine(t, v, "second")
			runs(older)
			m.addTenant("acme", fields{"ttl": "1h"})
			m.addTenant("beta", fields{"min_ttl": "30m"})
			m.addTenant("idle", fields{"verify": false})
			second.addTenant("acme")

			tokens := map[string]string{}
			leases := map[string][]string{}
			for tenant, count := range map[string]int{"acme": 3, "beta": 1} {
				for range count {
					lease := m.read("creds/" + tenant).ok(t)
					tokens[tenant] = lease.text("access_token")
					leases[tenant] = append(leases[tenant], lease.lease())
				}
			}
			other := second.access("acme")
			calls, otherCalls := m.kaizala.CallCount(), second.kaizala.CallCount()
			before := m.read("tenants/acme").ok(t).data()
			delete(before, "next_exchange_time") // each version plans it again
			listed := m.list("tenants").ok(t).data()

			lives := func(leases ...string) {
				t.Helper()
				for tenant, token := range tokens {
					require.Equal(t, token, m.access(tenant), tenant)
					require.Equal(t, token, m.read("creds/"+tenant).ok(t).text("access_token"), tenant)
				}
				require.Equal(t, other, second.access("acme"))
				now := m.read("tenants/acme").ok(t).data()
				for field, value := range before {
					require.Equal(t, value, now[field], field)
				}
				require.Equal(t, listed, m.list("tenants").ok(t).data())
				require.Equal(t, m.connectorID, m.read("config").ok(t).text("connector_id"))
				for _, lease := range leases {
					require.Equal(t, time.Hour, m.renew(lease, 0).ok(t).ttl())
				}
				require.Equal(t, calls, m.kaizala.CallCount(), "no call was made")
				require.Equal(t, otherCalls, second.kaizala.CallCount(), "no call was made")
			}
			move := func(version string) {
				t.Helper()
				cli("secrets", "tune", "-plugin-version="+version, "kaizala/")
				cli("secrets", "tune", "-plugin-version="+version, "second/")
				cli("plugin", "reload", "-type=secret", "-plugin="+PluginName)
				runs(version)
			}

			register(newer)
			lives(leases["acme"]...)
			move(newer)
			lives(leases["acme"]...)
			v.Seal(t)
			v.Unseal(t)
			runs(newer)
			lives(leases["acme"]...)
			require.Equal(t, "kaizala", m.read("config").ok(t).text("service"))

			// The leases of the older build can be revoked and renewed. The count of
			// leases was lost with its process, so one revocation gives the token up.
			m.revoke(leases["acme"][0])
			m.renew(leases["acme"][0], 0).refused(t, 400)
			fresh := m.access("acme")
			assert.NotEqual(t, tokens["acme"], fresh)
			assert.Equal(t, calls+1, m.kaizala.CallCount())
			for _, lease := range leases["acme"][1:] {
				require.Equal(t, time.Hour, m.renew(lease, 0).ok(t).ttl(), "the other leases live on")
				m.revoke(lease)
			}
			assert.Equal(t, fresh, m.access("acme"), "the revocation of leases on a token that was given up before changes nothing")
			m.revoke(leases["beta"][0])
			assert.NotEqual(t, tokens["beta"], m.access("beta"))

			// A tenant that the older build has stored without verification works too.
			m.read("creds/idle").ok(t)
			require.Equal(t, 1, m.kaizala.Exchanges("idle"))
			requireNoIrrevocableLeases(t, v)
		})
	}
}
