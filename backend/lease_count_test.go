package backend

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// 10,000 leases on one access token: one exchange, one write, and revoking all
// but the last changes nothing.
func TestTenThousandLeases(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		first := e.lease("acme")
		writes := e.storage.putsOf("tenants/acme")
		leases := make([]*logical.Response, 9_999)
		for i := range leases {
			leases[i] = e.lease("acme")
		}
		for _, lease := range leases {
			require.NoError(t, e.revokeLease(lease))
		}
		assert.Equal(t, writes, e.storage.putsOf("tenants/acme"))
		assert.Equal(t, accessTokenOf(first), e.read("token/acme")["access_token"])
		require.NoError(t, e.revokeLease(first))
		assert.Equal(t, writes+1, e.storage.putsOf("tenants/acme"), "one write gives the token up")
		assert.Equal(t, 1, e.kaizala.CallCount(), "a revocation calls nobody")
		assert.NotEqual(t, accessTokenOf(first), accessTokenOf(e.lease("acme")))
	})
}

// Vault revokes up to 180 leases of a mount at a time. Each may come twice, and
// the process may end halfway.
func TestTwoThousandLeasesRevokedAtOnce(t *testing.T) {
	for _, restart := range []string{"none", "restart", "crash"} {
		t.Run(restart, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newConfiguredEngine(t)
				e.addTenant("acme")
				leases := make([]*logical.Response, 2_000)
				for i := range leases {
					leases[i] = e.lease("acme")
				}
				given := accessTokenOf(leases[0])
				writes := e.storage.putsOf("tenants/acme")
				revoke := func(some []*logical.Response) {
					var all sync.WaitGroup
					slots := make(chan struct{}, 180)
					for i, lease := range some {
						for range 1 + i%2 {
							slots <- struct{}{}
							all.Go(func() {
								defer func() { <-slots }()
								assert.NoError(t, e.revokeLease(lease))
							})
						}
					}
					all.Wait()
				}
				revoke(leases[:1_000])
				switch restart {
				case "restart":
					e.restart()
				case "crash":
					e.crash()
				}
				revoke(leases[1_000:])
				assert.NotEqual(t, given, accessTokenOf(e.lease("acme")))
				e.crash()
				assert.NotEqual(t, given, accessTokenOf(e.lease("acme")))
				assert.Equal(t, 2, e.kaizala.CallCount())
				assert.LessOrEqual(t, e.storage.putsOf("tenants/acme")-writes, 2, "storage is written once to give the token up, and once for the new one")
			})
		})
	}
}

// Wherever the count may be wrong, one early revocation is enough.
func TestDoubtfulCounts(t *testing.T) {
	doubts := map[string]func(e *engine, spare *logical.Response){
		"restart": func(e *engine, _ *logical.Response) { e.restart() },
		"crash":   func(e *engine, _ *logical.Response) { e.crash() },
		"invalidation": func(e *engine, _ *logical.Response) {
			e.InvalidateKey(context.Background(), "tenants/acme")
		},
		"left memory": func(e *engine, _ *logical.Response) { e.tenants.loaded.Purge() },
		"reader gone": func(e *engine, _ *logical.Response) {
			gone, cancel := context.WithCancel(context.Background())
			cancel()
			_, _ = e.do(gone, logical.ReadOperation, "creds/acme", nil)
		},
		"doubled revoke": func(e *engine, spare *logical.Response) {
			_, _ = e.revokeLease(spare), e.revokeLease(spare)
		},
	}
	for name, doubt := range doubts {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newConfiguredEngine(t)
				e.addTenant("acme")
				lease, spare := e.lease("acme"), e.lease("acme")
				if name != "doubled revoke" {
					e.lease("acme")
				}
				synctest.Wait() // the index has been built, and nobody works on the tenant
				doubt(e, spare)
				require.NoError(t, e.revokeLease(lease))
				assert.NotEqual(t, accessTokenOf(lease), accessTokenOf(e.lease("acme")))
				e.crash()
				assert.NotEqual(t, accessTokenOf(lease), accessTokenOf(e.lease("acme")))
			})
		})
	}
}

// Readers who go away while the exchange that they wait for is under way have no
// lease, and leave the count of the others alone.
func TestReadersWhoGoAwayWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newRotatingEngine(t)
		var readers sync.WaitGroup
		e.during(func() {
			for range 20 {
				gone, cancel := context.WithCancel(context.Background())
				time.AfterFunc(time.Second, cancel)
				readers.Go(func() { _, _ = e.do(gone, logical.ReadOperation, "creds/acme", nil) })
			}
		})
		readers.Wait()
		lease := e.lease("acme") // the second one: during has read the first
		require.NoError(t, e.revokeLease(lease))
		assert.Equal(t, accessTokenOf(lease), accessTokenOf(e.lease("acme")), "the first lease lives on")
	})
}

// A lease that is revoked when storage fails, is revoked again by Vault, and the
// token is not handed out in between.
func TestRevocationWhileStorageFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		lease := e.lease("acme")
		e.storage.failWith(func(op, key string) error {
			if op == "put" {
				return errStorage
			}
			return nil
		})
		for range 3 {
			require.Error(t, e.revokeLease(lease))
		}
		resp, _, _ := e.try(logical.ReadOperation, "token/acme", nil)
		if resp != nil && !resp.IsError() {
			assert.NotEqual(t, accessTokenOf(lease), accessTokenOf(resp))
		}
		e.storage.heal()
		require.NoError(t, e.revokeLease(lease))
		e.crash()
		assert.NotEqual(t, accessTokenOf(lease), accessTokenOf(e.lease("acme")))
	})
}

// Nothing but a storage fault keeps a lease from being revoked.
func TestRevocationWithEverythingGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		for i := range 4 {
			e.addTenant(fmt.Sprint("t", i))
		}
		leases := []*logical.Response{e.lease("t0"), e.lease("t1"), e.lease("t2"), e.lease("t3")}
		calls := e.kaizala.CallCount()
		e.ok(logical.DeleteOperation, "tenants/t0", nil)
		require.NoError(t, e.revokeLease(leases[0]), "no tenant")
		require.NoError(t, e.storage.InmemStorage.Delete(context.Background(), "config/default"))
		e.crash()
		require.NoError(t, e.revokeLease(leases[1]), "no connector")
		e.storage.failWith(func(op, _ string) error {
			if op == "put" {
				return logical.ErrReadOnly
			}
			return nil
		})
		require.NoError(t, e.revokeLease(leases[2]), "read-only storage")
		e.storage.heal()
		require.NoError(t, e.storage.InmemStorage.Put(context.Background(), &logical.StorageEntry{Key: "tenants/t3", Value: []byte("{")}))
		e.crash()
		require.NoError(t, e.revokeLease(leases[3]), "an entry that cannot be read")
		assert.Equal(t, calls, e.kaizala.CallCount())
	})
}

// A lease that was renewed ends early where it is revoked before its new end, though its first TTL has passed.
func TestRenewedLeaseEndsEarly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		e.write("tenants/acme", map[string]any{"ttl": "1h"})
		lease := e.lease("acme")
		time.Sleep(50 * time.Minute)
		_, renewed := e.renewLease(lease, time.Hour)
		require.True(t, renewed)
		time.Sleep(30 * time.Minute)
		require.NoError(t, e.revokeLease(lease))
		assert.NotEqual(t, accessTokenOf(lease), accessTokenOf(e.lease("acme")))
	})
}

// The first lease after a start is like any other, though the start has not asked Vault for the mount's TTLs yet.
func TestLeaseBeforeTheStartHasAskedForTTLs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		synctest.Wait()
		e.system.DefaultLeaseTTLVal, e.system.MaxLeaseTTLVal = time.Hour, 2*time.Hour
		e.addTenant("acme")
		e.read("creds/acme")
		synctest.Wait()
		e.defaultTTL.Store(0)
		e.maxTTL.Store(0)
		lease := e.lease("acme")
		assert.True(t, lease.Secret.Renewable)
		e.system.MaxLeaseTTLVal = time.Hour
		e.askTTLs()
		assert.False(t, e.lease("acme").Secret.Renewable, "the mount allows no more than the lease has")
	})
}
