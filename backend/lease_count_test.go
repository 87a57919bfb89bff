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

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// 10,000 leases on one access token need one exchange. The revocation of all leases
// but the last changes nothing, and that of the last needs one write.
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
		assert.Equal(t, 1, e.kaizala.CallCount(), "a revocation makes no call")
		assert.NotEqual(t, accessTokenOf(first), accessTokenOf(e.lease("acme")))
	})
}

// Vault revokes up to 180 leases of a mount at a time. It may revoke each of them
// twice, and the process may end after half of them.
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

// If the count of leases may be wrong, one revocation before a lease's end gives the access token up.
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
				synctest.Wait() // the index has been built, and no work on the tenant is under way
				doubt(e, spare)
				require.NoError(t, e.revokeLease(lease))
				assert.NotEqual(t, accessTokenOf(lease), accessTokenOf(e.lease("acme")))
				e.crash()
				assert.NotEqual(t, accessTokenOf(lease), accessTokenOf(e.lease("acme")))
			})
		})
	}
}

// Readers who cancel while they wait for an exchange get no lease, and do not change
// the count of leases.
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
		lease := e.lease("acme") // the second lease: during has read the first one
		require.NoError(t, e.revokeLease(lease))
		assert.Equal(t, accessTokenOf(lease), accessTokenOf(e.lease("acme")), "the first lease lives on")
	})
}

// The revocation of a lease fails because storage fails, and Vault tries it again:
// the token is not handed out in between.
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

// A lease can be revoked without its tenant, without its connector, on read-only storage and with an entry that cannot be read.
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

// A renewed lease is revoked after its first TTL and before its new end: that counts as an early revocation, and gives the token up.
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

// A slow read of storage delays the renewal of a lease. The new TTL counts from the answer: a revocation one second before that end is
// early, and one at that end is not.
func TestLeaseWhoseRenewalHasWaitedEndsEarly(t *testing.T) {
	for before, early := range map[time.Duration]bool{time.Second: true, 0: false} {
		synctest.Test(t, func(t *testing.T) {
			e := newConfiguredEngine(t)
			e.addTenant("acme")
			e.write("tenants/acme", map[string]any{"ttl": "1m"})
			lease := e.lease("acme")
			synctest.Wait()
			e.tenants.loaded.Purge()
			e.storage.once("get", tenantPrefix, func() { time.Sleep(8 * time.Second) })
			end, renewed := e.renewLease(lease, time.Minute)
			require.True(t, renewed)
			require.Equal(t, time.Now().Add(time.Minute), end)
			time.Sleep(time.Until(end) - before)
			require.NoError(t, e.revokeLease(lease))
			assert.Equal(t, early, accessTokenOf(lease) != accessTokenOf(e.lease("acme")))
		})
	}
}

// A lease that is read before the start has asked Vault for the mount's TTLs has the right TTLs all the same.
func TestLeaseBeforeTheStartHasAskedForTTLs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		synctest.Wait()
		e.system.DefaultLeaseTTLVal, e.system.MaxLeaseTTLVal = time.Hour, 2*time.Hour
		e.addTenant("acme")
		e.read("creds/acme")
		synctest.Wait()
		e.node.defaultTTL.Store(0)
		e.node.maxTTL.Store(0)
		lease := e.lease("acme")
		assert.True(t, lease.Secret.Renewable)
		e.system.MaxLeaseTTLVal = time.Hour
		e.node.askTTLs()
		assert.False(t, e.lease("acme").Secret.Renewable, "the lease already has the mount's max TTL")
	})
}

// With retire_on_revoke=false, and a connector that revokes nothing at the service, the access token stays in use after the last lease
// is revoked, whether or not the engine knows the count. If the connector cannot be read, the revocation of the lease fails, and Vault
// tries it again.
func TestKeepOnRevoke(t *testing.T) {
	for _, restart := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			e := newConfiguredEngine(t)
			e.addTenant("acme")
			e.write("tenants/acme", map[string]any{"retire_on_revoke": false})
			lease := e.lease("acme")
			if restart {
				e.restart()
				e.waitForIndex()
			}
			require.NoError(t, e.revokeLease(lease))
			assert.Equal(t, accessTokenOf(lease), accessTokenOf(e.lease("acme")))
			e.crash()
			assert.Equal(t, accessTokenOf(lease), accessTokenOf(e.lease("acme")))

			e.storage.refuse("get", connectorPrefix)
			for _, leave := range []func(){func() {}, func() { e.InvalidateKey(t.Context(), tenantPrefix+"acme") }} {
				e.InvalidateKey(t.Context(), connectorPrefix+defaultConnector)
				leave()
				require.Error(t, e.revokeLease(lease))
			}
			e.storage.heal()
			require.NoError(t, e.storage.InmemStorage.Delete(t.Context(), connectorPrefix+defaultConnector))
			require.NoError(t, e.revokeLease(lease), "a connector that is gone revokes nothing")
			calls := e.kaizala.CallCount()
			assert.Equal(t, 1, calls)
		})
	}
}

// A lease that is revoked under retire_on_revoke=false is subtracted from the count all the same.
func TestKeepOnRevokeCounts(t *testing.T) {
	e := newConfiguredEngine(t)
	e.addTenant("acme")
	e.write("tenants/acme", map[string]any{"retire_on_revoke": false})
	first, last := e.lease("acme"), e.lease("acme")
	require.NoError(t, e.revokeLease(first))
	e.write("tenants/acme", map[string]any{"retire_on_revoke": true})
	require.NoError(t, e.revokeLease(last))
	assert.NotEqual(t, accessTokenOf(last), accessTokenOf(e.lease("acme")))
}

// A lease that expires does not give its access token up, also if the process does not know the count of leases.
func TestNaturalEndAfterARestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		e.write("tenants/acme", map[string]any{"ttl": "1h"})
		lease := e.lease("acme")
		e.restart()
		e.waitForIndex()
		time.Sleep(time.Hour)
		require.NoError(t, e.revokeLease(lease))
		assert.Equal(t, accessTokenOf(lease), accessTokenOf(e.lease("acme")))
	})
}

// The tenant is not in memory, and storage fails when its access token is given up: the token is not handed out all the same.
func TestRevocationOfATenantThatIsNotInMemoryWhileStorageFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		lease := e.lease("acme")
		e.restart()
		e.waitForIndex()
		e.storage.refuse("put", tenantPrefix)
		require.Error(t, e.revokeLease(lease))
		resp, _, _ := e.try(logical.ReadOperation, "token/acme", nil)
		if resp != nil && !resp.IsError() {
			assert.NotEqual(t, accessTokenOf(lease), accessTokenOf(resp))
		}
		e.storage.heal()
		assert.NotEqual(t, accessTokenOf(lease), accessTokenOf(e.lease("acme")))
	})
}

// The last lease on an older access token expires or is revoked, and storage fails: Vault tries the revocation again, and it revokes the
// token.
func TestLastLeaseOnAnOlderTokenWhileStorageFails(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		lease := e.lease("acme")
		e.pass(50 * time.Minute)
		require.NotEqual(t, accessTokenOf(lease), e.read("token/acme")["access_token"])
		lease.Secret.IssueTime, lease.Secret.TTL = time.Now().Add(-time.Minute), time.Minute
		e.storage.refuse("put", intentPrefix)
		require.Error(t, e.revokeLease(lease))
		e.storage.heal()
		e.revoke(lease)
		assert.False(t, e.server.Alive(accessTokenOf(lease)))
		assert.True(t, e.server.Alive(e.read("token/acme")["access_token"].(string)))
	})
}

// The revocation of a lease on an expired access token, or of a lease without data, needs no storage.
func TestRevocationOfWhatHasEnded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		lease := e.lease("acme")
		tenant, generation := lease.Secret.InternalData[leaseTenant], lease.Secret.InternalData[leaseGeneration]
		e.restart()
		e.waitForIndex()
		const kind = "secret_type"
		for _, knows := range []map[string]any{
			{kind: accessTokenType}, {kind: accessTokenType, leaseTenant: tenant}, {kind: accessTokenType, leaseGeneration: generation},
			{kind: accessTokenType, leaseTenant: tenant, leaseGeneration: generation, leaseExpires: stamp(time.Now())},
		} {
			ops := e.storage.ops.Load()
			require.NoError(t, e.revokeLease(&logical.Response{Secret: &logical.Secret{LeaseOptions: lease.Secret.LeaseOptions, InternalData: knows}}))
			assert.Equal(t, ops, e.storage.ops.Load(), knows)
		}
		assert.Equal(t, accessTokenOf(lease), accessTokenOf(e.lease("acme")))
		delete(lease.Secret.InternalData, leaseExpires)
		e.restart()
		e.waitForIndex()
		require.NoError(t, e.revokeLease(lease))
		assert.NotEqual(t, accessTokenOf(lease), accessTokenOf(e.lease("acme")), "without the token's end the lease is revoked like any other")
	})
}

// On read-only storage, the revocation of a lease that may have to revoke its access token at the service fails, so that Vault sends it
// to the active node. Any other revocation succeeds here.
func TestRevocationsOnReadOnlyStorage(t *testing.T) {
	for name, c := range map[string]struct {
		fields, tenant map[string]any
		gone           string // a key that neither storage nor memory has
		waits          bool
	}{
		"nothing can be revoked":      {fields: classB},
		"a shared token":              {fields: classA, waits: true},
		"a token of its own":          {fields: classA, tenant: map[string]any{"token_per_lease": true}, waits: true},
		"a refresh token that may be": {fields: map[string]any{"exchange_invalidates": false, "revoke_on_delete": true}, waits: true},
		"a token of its own, no tenant": {
			fields: classA, tenant: map[string]any{"token_per_lease": true}, gone: tenantPrefix + "acme", waits: true,
		},
		"no tenant":                       {fields: classA, gone: tenantPrefix + "acme"},
		"a shared token and no connector": {fields: classA, gone: connectorPrefix + "default"},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, oauth2test.ClassA, c.fields)
				e.add("acme", c.tenant)
				lease := e.lease("acme")
				if c.gone != "" {
					require.NoError(t, e.storage.InmemStorage.Delete(t.Context(), c.gone))
					e.restart()
					e.waitForIndex()
				}
				e.storage.failWith(func(op, _ string) error {
					if op == "put" || op == "delete" {
						return &strippedError{logical.ErrReadOnly.Error()}
					}
					return nil
				})
				err := e.revokeLease(lease)
				assert.Equal(t, c.waits, err == logical.ErrReadOnly, err)
				assert.Equal(t, !c.waits, err == nil, err)
				assert.True(t, e.server.Alive(accessTokenOf(lease)))
			})
		})
	}
}

// The exact data and TTLs of a lease, as Vault stores them.
func TestWhatALeaseIs(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("own", map[string]any{"token_per_lease": true})
		e.add("shared", nil)
		synctest.Wait() // the engine reads DefaultLeaseTTLVal while the index is built: the test writes it after that
		e.system.DefaultLeaseTTLVal = 30 * time.Minute
		for _, tenant := range []string{"own", "shared"} {
			secret := e.ok(logical.ReadOperation, "creds/"+tenant, nil).Secret
			want := map[string]any{
				"secret_type": accessTokenType, leaseTenant: tenant, leaseGeneration: secret.InternalData[leaseGeneration],
				leaseExpires: stamp(time.Now().Add(time.Hour)),
			}
			if tenant == "own" {
				want[leaseOwn] = "true"
			}
			assert.Equal(t, want, secret.InternalData)
			assert.Zero(t, secret.TTL, "Vault gives the lease the mount's default TTL")
			assert.Equal(t, time.Hour-leaseMargin, secret.MaxTTL)
			assert.True(t, secret.Renewable)
		}
		synctest.Wait()
		e.system.DefaultLeaseTTLVal = 2 * time.Hour
		e.node.askTTLs()
		assert.Equal(t, time.Hour-leaseMargin, e.ok(logical.ReadOperation, "creds/shared", nil).Secret.TTL, "the mount's default TTL is too long for this lease")
	})
}

// A renewal uses the mount's present TTLs, ends a second earlier before a planned exchange, and fails without its tenant.
func TestRenewals(t *testing.T) {
	for name, c := range map[string]struct {
		kind   func(*oauth2test.Options)
		fields map[string]any
		before func(e *oauthEngine) time.Duration // how long until the lease's end
	}{
		"the token's end": {oauth2test.ClassA, classA, func(e *oauthEngine) time.Duration { return time.Hour - leaseMargin }},
		"a planned exchange": {oauth2test.ClassD, classD, func(e *oauthEngine) time.Duration {
			return e.planned().Truncate(time.Second) - time.Second - leaseMargin
		}},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, c.kind, c.fields)
				e.add("acme", map[string]any{"ttl": "5m"})
				lease := e.lease("acme")
				end := c.before(e)
				time.Sleep(time.Minute)
				_, renewed := e.renewLease(lease, 0)
				require.True(t, renewed)
				assert.Equal(t, end.Truncate(time.Second), lease.Secret.MaxTTL)
				assert.Equal(t, 5*time.Minute, lease.Secret.TTL)
				e.system.MaxLeaseTTLVal = 4 * time.Minute
				_, renewed = e.renewLease(lease, 0)
				require.True(t, renewed)
				assert.Equal(t, 4*time.Minute, lease.Secret.MaxTTL)
				assert.Equal(t, 3*time.Minute, lease.Secret.TTL)
				e.ok(logical.DeleteOperation, "tenants/acme", nil)
				resp, err := e.HandleRequest(t.Context(), &logical.Request{Operation: logical.RenewOperation, Secret: lease.Secret, Storage: e.storage})
				require.NoError(t, err)
				assert.ErrorContains(t, resp.Error(), "there is no tenant")
			})
		})
	}
}

// planned returns how long it is until the exchange that ends acme's access token.
func (e *oauthEngine) planned() time.Duration {
	_, v := e.tenants.cached("acme")
	return time.Until(v.access.Planned)
}
