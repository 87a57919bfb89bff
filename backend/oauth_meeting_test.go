package backend

import (
	"context"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/tokenservice"
)

// Two flows run at the same time at a connector of service=oauth2. Each test guards one race that has gone wrong before.

// hold holds the first operation of that kind below a prefix: it closes reached, and the operation goes on when release is called.
func (s *storage) hold(op, prefix string) (reached chan struct{}, release func()) {
	reached, held := make(chan struct{}), make(chan struct{})
	var once sync.Once
	s.surround(func(asked, key string, do func() error) error {
		if asked == op && strings.HasPrefix(key, prefix) {
			once.Do(func() {
				close(reached)
				<-held
			})
		}
		return do()
	})
	return reached, func() { close(held) }
}

// An access token that a reader has got is renewed before its end, also if its tenant has left memory since. An access token that no
// reader has got is not renewed.
func TestTokenInUseLeavesMemory(t *testing.T) {
	for name, class := range map[string]map[string]any{"B": classB, "D": classD} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, oauth2test.ClassA, class)
				e.waitForIndex()
				e.add("idle", nil)
				e.write("tenants/idle/refresh", nil)
				e.add("busy", nil)
				e.read("token/busy")
				e.tenants.loaded.Purge()
				e.pass(30 * time.Minute)
				e.tenants.loaded.Purge()
				e.pass(29 * time.Minute)
				assert.Equal(t, 2, e.server.Exchanges("busy"))
				assert.Equal(t, 1, e.server.Exchanges("idle"))
				e.pass(2 * time.Hour)
				assert.Equal(t, 2, e.server.Exchanges("busy"), "no reader got the new access token")
			})
		})
	}
}

// The last lease is revoked while memory does not have the connector, because storage has failed a write of it or another node has
// written it. The exchange that ends the access token is pending all the same, and is made after a restart.
func TestExchangeIsOwedAtAConnectorThatLeftMemory(t *testing.T) {
	for name, leave := range map[string]func(*oauthEngine){
		"failed write": func(e *oauthEngine) {
			e.storage.refuse("put", connectorPrefix)
			_, status, _ := e.try(logical.UpdateOperation, "config", map[string]any{"scopes": "a"})
			require.GreaterOrEqual(e.t, status, 500)
			e.storage.heal()
		},
		"another node": func(e *oauthEngine) { e.connectors.invalidate(connectorPrefix + defaultConnector) }, // the connector has not been read again
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, oauth2test.ClassD, map[string]any{"revocation": "exchange"})
				e.add("acme", nil)
				lease := e.lease("acme")
				e.waitForIndex()
				leave(e)
				e.server.Inject(oauth2test.Fault{Answer: oauth2test.BadGateway})
				e.revoke(lease)
				assert.Equal(t, 1, e.pending("acme"))
				e.crash()
				e.server.ClearFaults()
				e.pass(2 * time.Minute)
				assert.False(t, e.server.Alive(accessTokenOf(lease)))
			})
		})
	}
}

// A delete, or a write of another refresh token, comes while the record of an access token for one lease is stored: the access token
// lives as long as that lease.
func TestTokenForOneLeaseOutlivesItsTenant(t *testing.T) {
	for name, end := range map[string]func(*oauthEngine){
		"delete": func(e *oauthEngine) { e.ok(logical.DeleteOperation, "tenants/acme", nil) },
		"write": func(e *oauthEngine) {
			e.write("tenants/acme", map[string]any{"refresh_token": e.server.Grant(e.clientID, "other"), "verify": false})
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, oauth2test.ClassA, classA)
				e.add("acme", map[string]any{"token_per_lease": true})
				e.waitForIndex()
				reached, release := e.storage.hold("put", heldPrefix)
				var lease *logical.Response
				var both sync.WaitGroup
				both.Go(func() { lease = e.lease("acme") })
				<-reached
				both.Go(func() { end(e) })
				time.Sleep(2 * time.Second)
				release()
				both.Wait()
				e.pass(time.Minute)
				assert.True(t, e.server.Alive(accessTokenOf(lease)))
				e.revoke(lease)
				assert.False(t, e.server.Alive(accessTokenOf(lease)))
				e.kept()
			})
		})
	}
}

// A write sets token_per_lease=false while a reader waits for an access token of his own: he gets a lease on the shared access token,
// and that lease is counted.
func TestTokenPerLeaseIsTakenFromAReaderWhoWaits(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", map[string]any{"token_per_lease": true})
		shared := e.read("token/acme")["access_token"].(string)
		e.server.Inject(oauth2test.Fault{Delay: 3 * time.Second, Times: 1})
		leases := make([]*logical.Response, 2)
		var readers sync.WaitGroup
		for i := range leases {
			readers.Go(func() { leases[i] = e.lease("acme") })
			time.Sleep(time.Second)
		}
		e.write("tenants/acme", map[string]any{"token_per_lease": false})
		readers.Wait()
		require.NotEqual(t, shared, accessTokenOf(leases[0]))
		require.Equal(t, shared, accessTokenOf(leases[1]))
		e.revoke(leases[1])
		assert.False(t, e.server.Alive(shared))
		assert.True(t, e.server.Alive(accessTokenOf(leases[0])))
		e.revoke(leases[0])
		assert.Empty(t, e.server.AccessTokens("acme"))
	})
}

// The last lease on an access token is revoked while storage takes the next access token: the older token is revoked, whether the
// lease was given before or during that write.
func TestLastLeaseEndsWhileTheNextTokenIsStored(t *testing.T) {
	for _, before := range []bool{true, false} {
		bubble(t, func(t *testing.T) {
			e := newOAuthEngine(t, oauth2test.ClassA, classA)
			e.add("acme", nil)
			old := e.read("token/acme")["access_token"].(string)
			var lease *logical.Response
			if before {
				lease = e.lease("acme")
			}
			reached, release := e.storage.hold("put", tenantPrefix)
			var all sync.WaitGroup
			all.Go(func() { e.pass(50 * time.Minute) })
			<-reached
			if !before {
				lease = e.lease("acme")
			}
			require.Equal(t, old, accessTokenOf(lease))
			all.Go(func() { e.revoke(lease) })
			time.Sleep(time.Second)
			release()
			all.Wait()
			current := e.read("token/acme")["access_token"].(string)
			require.NotEqual(t, old, current)
			assert.False(t, e.server.Alive(old), before)
			assert.True(t, e.server.Alive(current), before)
			e.kept()
		})
	}
}

// A min_ttl that is written while leases live on an access token applies to the next token: no exchange ends the older token before
// its leases end.
func TestMinTTLIsWrittenWhileLeasesLive(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassD, nil)
		e.add("acme", nil)
		lease := e.lease("acme")
		end := time.Now().Add(lease.Secret.MaxTTL)
		e.write("tenants/acme", map[string]any{"min_ttl": "30m"})
		time.Sleep(35 * time.Minute)
		assert.Equal(t, accessTokenOf(lease), accessTokenOf(e.lease("acme")))
		time.Sleep(time.Until(end) - time.Millisecond)
		assert.True(t, e.server.Alive(accessTokenOf(lease)))
		next := e.lease("acme")
		assert.NotEqual(t, accessTokenOf(lease), accessTokenOf(next))
		assert.Less(t, next.Secret.MaxTTL, 30*time.Minute)
	})
}

// An exchange fails at its planned time: its reader gets the older access token, which still lives, and so does the next reader.
func TestReaderWhosePlannedExchangeFails(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassD, nil)
		e.add("acme", nil)
		lease := e.lease("acme")
		time.Sleep(time.Until(e.stored("acme").Access.Planned.Add(-leaseMargin)))
		e.server.Inject(oauth2test.Fault{Answer: oauth2test.BadGateway, Times: 1})
		for range 2 {
			again := e.lease("acme")
			assert.Equal(t, accessTokenOf(lease), accessTokenOf(again))
			assert.Less(t, again.Secret.MaxTTL, plannedRetryLeast)
			require.NotEmpty(t, again.Warnings)
			assert.Contains(t, again.Warnings[0], "could not be renewed")
		}
		assert.Len(t, e.server.Calls(oauth2test.EndpointToken), 2)
	})
}

// crowd uses up the share of a connector with 5 calls a minute.
func (e *oauthEngine) crowd() {
	for _, name := range []string{"a", "b", "c", "d", "e"} {
		e.add(name, nil)
		_, _, _ = e.try(logical.ReadOperation, "creds/"+name, nil)
	}
}

// The share has no place for an exchange at its planned time: each reader gets the older access token, also after an exchange that has
// failed. That token lives until the leases end, also if a write of settings or a larger share permits an exchange before.
func TestPlannedExchangeWithoutAPlaceInTheShare(t *testing.T) {
	for _, failed := range []bool{false, true} {
		bubble(t, func(t *testing.T) {
			e := newOAuthEngine(t, oauth2test.ClassD, nil)
			e.write("config", map[string]any{"exchanges_per_minute": 5})
			e.add("acme", nil)
			old := accessTokenOf(e.lease("acme"))
			c := e.stored("acme").Access.Planned.Add(-leaseMargin)
			if failed {
				e.server.Inject(oauth2test.Fault{User: "acme", Answer: oauth2test.BadGateway, Times: 1})
				time.Sleep(time.Until(c) + 5*time.Second)
				require.Equal(t, statusDegraded, e.status("acme"))
				c = e.tenants.named("acme").view.Load().bound.Add(-leaseMargin)
			}
			time.Sleep(time.Until(c) - 8*time.Second)
			e.crowd()
			time.Sleep(time.Until(c) + 10*time.Second)
			lease := e.lease("acme")
			assert.Equal(t, old, accessTokenOf(lease), failed)
			end := time.Now().Add(lease.Secret.MaxTTL)
			assert.Greater(t, lease.Secret.MaxTTL, 20*time.Second, failed)
			e.write("tenants/acme", map[string]any{"ttl": "1h"})
			e.write("config", map[string]any{"exchanges_per_minute": 600})
			assert.Equal(t, old, accessTokenOf(e.lease("acme")), failed)
			time.Sleep(time.Until(end) - time.Millisecond)
			assert.True(t, e.server.Alive(old), failed)
			time.Sleep(10 * time.Second)
			assert.NotEqual(t, old, accessTokenOf(e.lease("acme")), failed)
			e.kept()
		})
	}
}

// Leases are given because the planned exchange has failed or has no place. Then it becomes possible before the leases end: storage
// works again, the connector is written, or the share grows. The access token still lives until the leases end. A reader who comes
// when the token is too near its end for a lease gets an error, and no exchange.
func TestLeasesHoldOnceThePlannedExchangeCouldBeMade(t *testing.T) {
	for name, c := range map[string]struct {
		before, after func(*oauthEngine)
	}{
		"storage": {func(e *oauthEngine) { e.storage.refuse("put", callPrefix) }, func(e *oauthEngine) { e.storage.heal() }},
		"service": {
			func(e *oauthEngine) { e.server.Inject(oauth2test.Fault{Answer: oauth2test.BadGateway, Times: 1}) },
			func(e *oauthEngine) { e.write("config", map[string]any{"connector_secret": e.secret}) },
		},
		"share": {func(e *oauthEngine) {
			e.write("config", map[string]any{"exchanges_per_minute": 5})
			e.crowd()
		}, func(e *oauthEngine) { e.write("config", map[string]any{"exchanges_per_minute": 600}) }},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, func(o *oauth2test.Options) { oauth2test.ClassD(o); o.AccessTokenLife = time.Minute }, nil)
				e.add("acme", nil)
				old := accessTokenOf(e.lease("acme"))
				access := e.stored("acme").Access
				time.Sleep(time.Until(access.Planned.Add(-leaseMargin)))
				c.before(e)
				lease := e.lease("acme")
				require.Equal(t, old, accessTokenOf(lease))
				end := time.Now().Add(lease.Secret.MaxTTL)
				c.after(e)
				time.Sleep(time.Until(access.Expires.Add(-30*time.Second + time.Millisecond)))
				require.Less(t, time.Until(end), lease.Secret.MaxTTL-time.Second)
				_, status, text := e.try(logical.ReadOperation, "creds/acme", nil)
				assert.Equal(t, http.StatusServiceUnavailable, status)
				assert.Contains(t, text, "leases on its access token last until")
				time.Sleep(time.Until(end) - time.Millisecond)
				assert.True(t, e.server.Alive(old))
				time.Sleep(5 * time.Second)
				assert.NotEqual(t, old, accessTokenOf(e.lease("acme")))
				e.kept()
			})
		})
	}
}

// A lease lasts until the next try of a failed exchange, and Vault registers it a moment after the engine's answer. Its access token
// lives until its end, also if the tenant leaves memory before.
func TestTenantLeavesMemoryWhileThePlannedExchangeFails(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassD, nil)
		e.add("acme", nil)
		old := accessTokenOf(e.lease("acme"))
		time.Sleep(time.Until(e.stored("acme").Access.Planned.Add(-leaseMargin)))
		e.server.Inject(oauth2test.Fault{Answer: oauth2test.BadGateway, Times: 1})
		lease := e.lease("acme")
		require.Equal(t, old, accessTokenOf(lease))
		end := time.Now().Add(leaseRegistered + lease.Secret.MaxTTL)
		e.tenants.loaded.Remove("acme")
		time.Sleep(lease.Secret.MaxTTL)
		var reader sync.WaitGroup
		reader.Go(func() { assert.NotEqual(t, old, accessTokenOf(e.lease("acme"))) })
		time.Sleep(time.Until(end) - time.Millisecond)
		assert.True(t, e.server.Alive(old))
		reader.Wait()
		e.kept()
	})
}

// An exchange is noted in storage and not made, because storage fails or the service asks for a pause. After a restart the engine does
// not take it for an exchange whose answer was lost, and makes no call.
func TestRestartAfterAnExchangeThatWasNotMade(t *testing.T) {
	for name, refuse := range map[string]func(*oauthEngine){
		"storage": func(e *oauthEngine) { e.storage.unheardOnce("put", callPrefix) },
		"pause": func(e *oauthEngine) {
			via := e.connectors.present(defaultConnector)
			e.storage.once("put", callPrefix, func() {
				e.connectors.judge(via, &tokenservice.Failure{Kind: tokenservice.Limited, RetryAfter: time.Minute})(e.t.Context())
			})
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, oauth2test.ClassD, nil)
				e.add("acme", nil)
				lease := e.lease("acme")
				time.Sleep(2 * time.Minute) // the first call's place is free again
				refuse(e)
				_, status, _ := e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
				require.GreaterOrEqual(t, status, 429)
				e.storage.heal()
				require.Len(t, e.server.Calls(oauth2test.EndpointToken), 1)
				e.restart()
				e.pass(2 * time.Minute)
				assert.Equal(t, accessTokenOf(lease), accessTokenOf(e.lease("acme")))
				assert.True(t, e.server.Alive(accessTokenOf(lease)))
			})
		})
	}
}

// The process dies during a delete, between the write of the intent for the refresh token and the delete of the tenant: the tenant
// still works, and the next delete revokes the refresh token.
func TestProcessDiesDuringADelete(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, revokeAll)
		e.add("acme", nil)
		e.lease("acme")
		e.waitForIndex()
		reached, dead := make(chan struct{}), make(chan struct{})
		e.storage.surround(func(op, key string, do func() error) error {
			if op == "delete" && strings.HasPrefix(key, tenantPrefix) {
				close(reached)
				<-dead
				return errStorage
			}
			return do()
		})
		old := e.backend
		go func() {
			_, _ = old.HandleRequest(t.Context(), &logical.Request{Operation: logical.DeleteOperation, Path: "tenants/acme"})
		}()
		<-reached
		e.crash()
		close(dead)
		e.pass(3 * time.Minute)
		require.NotNil(t, e.stored("acme"))
		assert.True(t, e.server.Alive(accessTokenOf(e.lease("acme"))))
		assert.Nil(t, e.pending("acme"))
		e.ok(logical.DeleteOperation, "tenants/acme", nil)
		e.pass(time.Minute)
		assert.Empty(t, e.server.AccessTokens("acme"))
		assert.False(t, e.server.RefreshTokenAlive(e.server.CurrentRefreshToken("acme")))
	})
}

// The last lease is revoked, and the process dies when the intent is stored and the stored tenant still has the access token. The next
// process cannot read the tenant at first, and revokes the token. When it can read the tenant, it does not hand the token out.
func TestProcessDiesWhileATokenIsGivenUp(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		e.add("other", nil)
		lease := e.lease("acme")
		e.waitForIndex()
		reached, dead := make(chan struct{}), make(chan struct{})
		e.storage.surround(func(op, key string, do func() error) error {
			if op == "put" && key == tenantPrefix+"acme" {
				close(reached)
				<-dead
				return errStorage
			}
			return do()
		})
		go func() { _ = e.revokeLease(lease) }()
		<-reached
		next := &storage{InmemStorage: e.storage.InmemStorage}
		next.refuse("get", tenantPrefix+"acme")
		e.crashOnto(next)
		close(dead)
		e.pass(2 * time.Minute)
		next.heal()
		e.pass(2 * time.Minute)
		assert.False(t, e.server.Alive(accessTokenOf(lease)))
		assert.True(t, e.server.Alive(accessTokenOf(e.lease("acme"))))
		e.kept()
	})
}

// A config write drops a revocation during its call, and the call fails: last_revocation_error stays empty.
func TestRevocationIsDroppedDuringItsCall(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		lease := e.lease("acme")
		e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointRevocation, Delay: 3 * time.Second, Answer: oauth2test.BadGateway})
		go e.revoke(lease)
		time.Sleep(time.Second)
		e.write("config", map[string]any{"revocation": "none"})
		e.pass(time.Minute)
		assert.NotContains(t, e.read("config"), "last_revocation_error")
		assert.NotContains(t, e.read("tenants/acme"), "last_revocation_error")
	})
}

// An answer that refuses the connector has a Retry-After: it pauses the connector once. A later request that is refused without a call
// does not start the pause again, so after the write that ends the refusal a reader is served at once.
func TestRefusalPausesOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		e.server.Inject(oauth2test.Fault{Times: 1, Answer: oauth2test.Answer{
			Status: http.StatusForbidden, Header: http.Header{"Retry-After": {"120"}}, Body: `{"error": "invalid_client"}`,
		}})
		_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
		require.Equal(t, http.StatusBadRequest, status)
		time.Sleep(3 * time.Minute)
		_, status, _ = e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": e.server.Grant(e.clientID, "acme")})
		require.Equal(t, http.StatusBadRequest, status)
		e.write("config", map[string]any{"connector_secret": e.secret})
		e.read("creds/acme")
	})
}

// Memory keeps an access token that storage has not taken: a verified write gives it up.
func TestVerifiedWriteGivesUpAKeptToken(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		e.failPuts()
		_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
		require.Equal(t, http.StatusServiceUnavailable, status)
		require.NotEmpty(t, e.server.AccessTokens("acme"))
		e.storage.heal()
		e.write("tenants/acme", map[string]any{"refresh_token": e.server.Grant(e.clientID, "other")})
		e.pass(time.Minute)
		assert.Empty(t, e.server.AccessTokens("acme"))
		assert.True(t, e.server.Alive(accessTokenOf(e.lease("acme"))))
	})
}

// A config write takes from a connector the revocation that token_per_lease needs. A write that gives this connector to a tenant with
// token_per_lease waits for the config write, and is refused.
func TestConfigWriteMeetsTokenPerLease(t *testing.T) {
	for _, verify := range []bool{true, false} {
		bubble(t, func(t *testing.T) {
			e := newOAuthEngine(t, oauth2test.ClassA, classA)
			e.write("config/other", map[string]any{
				"service": "oauth2", "token_url": e.server.TokenURL(), "revocation_url": e.server.RevocationURL(),
				"connector_id": e.clientID, "connector_secret": e.secret, "revocation": "access_token", "exchange_invalidates": false,
			})
			e.add("acme", map[string]any{"token_per_lease": true})
			e.waitForIndex()
			reached, release := e.storage.hold("put", connectorPrefix+"other")
			var codes [2]int
			var writes sync.WaitGroup
			writes.Go(func() {
				_, codes[0], _ = e.try(logical.UpdateOperation, "config/other", map[string]any{"revocation": "none"})
			})
			<-reached
			writes.Go(func() {
				_, codes[1], _ = e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"connector": "other", "verify": verify})
			})
			time.Sleep(time.Second)
			release()
			writes.Wait()
			assert.Equal(t, [2]int{204, 400}, codes, verify)
		})
	}
}

// Storage fails when an access token is given up, and Vault does not try the revocation of its lease again. When storage works, the
// engine stores that by itself and revokes the token: the next process does not hand it out.
func TestEndOfATokenThatStorageHasNotTaken(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		lease := e.lease("acme")
		e.waitForIndex()
		e.failPuts()
		require.Error(t, e.revokeLease(lease))
		e.storage.heal()
		e.pass(3 * time.Minute)
		require.False(t, e.server.Alive(accessTokenOf(lease)))
		e.crash()
		assert.True(t, e.server.Alive(accessTokenOf(e.lease("acme"))))
	})
}

// Two revocations of the same lease give its access token up, one while storage deletes the intent of the other: no intent stays in
// storage.
func TestAccessTokenIsGivenUpWhileItsIntentIsSettled(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", map[string]any{"token_per_lease": true})
		e.waitForIndex()
		lease := e.lease("acme")
		var first atomic.Bool
		e.storage.surround(func(op, key string, do func() error) error {
			err := do()
			switch {
			case op == "get" && strings.HasPrefix(key, heldPrefix) && first.CompareAndSwap(false, true):
				time.Sleep(time.Second)
			case op == "get" && strings.HasPrefix(key, heldPrefix):
				time.Sleep(2 * time.Second)
			case op == "delete" && strings.HasPrefix(key, intentPrefix):
				time.Sleep(2 * time.Second)
			}
			return err
		})
		var both sync.WaitGroup
		for range 2 {
			both.Go(func() { e.revoke(lease) })
		}
		both.Wait()
		e.storage.heal()
		e.pass(time.Minute)
		keys, err := listBelow(t.Context(), e.storage, intentPrefix)
		require.NoError(t, err)
		assert.Empty(t, keys)
		assert.False(t, e.server.Alive(accessTokenOf(lease)))
	})
}

// departed is the context of a reader who cancels: Err returns the cancellation, and Done is not closed yet.
type departed struct {
	context.Context
	gone atomic.Bool
}

func (c *departed) Err() error {
	if c.gone.Load() {
		return context.Canceled
	}
	return nil
}

// The reader cancels before he gets the lease on an access token of his own: the token is revoked, because Vault may not have
// registered the lease.
func TestReaderLeavesBeforeHisOwnTokenIsLeased(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", map[string]any{"token_per_lease": true})
		ctx := &departed{Context: t.Context()}
		e.storage.surround(func(op, key string, do func() error) error {
			if op == "put" && strings.HasPrefix(key, heldPrefix) {
				ctx.gone.Store(true)
			}
			return do()
		})
		_, _, text := e.tryContext(ctx, logical.ReadOperation, "creds/acme", nil)
		assert.Contains(t, text, context.Canceled.Error())
		require.Len(t, e.server.Calls(oauth2test.EndpointToken), 1)
		assert.Empty(t, e.server.AccessTokens("acme"))
		e.kept()
	})
}

// A reader stops waiting or cancels while the record of the access token for his lease is stored, or just after. Either he gets the
// token, or it is revoked.
func TestReaderLeavesWhileTheRecordOfHisTokenIsStored(t *testing.T) {
	for _, gone := range []bool{false, true} {
		for _, late := range []time.Duration{0, time.Second} { // the record is stored so long after he has left
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, oauth2test.ClassA, classA)
				e.add("acme", map[string]any{"token_per_lease": true})
				e.waitForIndex()
				e.storage.surround(func(op, key string, do func() error) error {
					if op == "put" && strings.HasPrefix(key, heldPrefix) {
						time.Sleep(answerWithin + late)
					}
					return do()
				})
				ctx := t.Context()
				if gone {
					within, cancel := context.WithTimeout(ctx, answerWithin)
					defer cancel()
					ctx = within
				}
				resp, status, _ := e.tryContext(ctx, logical.ReadOperation, "creds/acme", nil)
				e.pass(time.Minute)
				if status == http.StatusOK {
					require.False(t, gone && late > 0) // with late=0 both come at the same moment, in either order
					require.Equal(t, []string{accessTokenOf(resp)}, e.server.AccessTokens("acme"))
					e.revoke(resp)
				}
				assert.Empty(t, e.server.AccessTokens("acme"), "%v %v", gone, late)
				e.kept()
			})
		}
	}
}

// A reader leaves when the record of his token has just been stored, and storage does not take the token's intent: the token is revoked
// from memory.
func TestReaderLeavesAndStorageTakesNoIntent(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", map[string]any{"token_per_lease": true})
		e.waitForIndex()
		e.storage.refuse("put", intentPrefix)
		ctx, leave := context.WithCancel(t.Context())
		e.storage.surround(func(op, key string, do func() error) error {
			err := do()
			if op == "put" && strings.HasPrefix(key, heldPrefix) {
				leave()
				time.Sleep(time.Millisecond) // the request ends meanwhile
			}
			return err
		})
		_, err := e.do(ctx, logical.ReadOperation, "creds/acme", nil)
		require.Error(t, err)
		e.quiet("acme")
		assert.Equal(t, 1, e.server.Exchanges("acme"))
		assert.Empty(t, e.server.AccessTokens("acme"))
		assert.Len(t, e.revocations(), 1)
		e.kept()
	})
}

// A refresh has joined an exchange that was not begun for it. By the time it looks at the result, the new access token's only lease has
// been revoked, and the token given up: the refresh still has the older token revoked. It leaves a token alone that no exchange has
// replaced.
func TestRefreshFindsTheNewTokenGivenUp(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		old := e.lease("acme")
		acme := e.tenants.named("acme")
		before := acme.view.Load()
		retire := func() {
			require.NoError(t, e.exchanger.retire(t.Context(), acme, before))
			e.backend.revocations.wakeAll()
			synctest.Wait()
		}
		retire()
		assert.True(t, e.server.Alive(accessTokenOf(old)))
		e.pass(50 * time.Minute)
		next := e.lease("acme")
		require.NotEqual(t, accessTokenOf(old), accessTokenOf(next))
		e.revoke(next)
		require.Nil(t, e.stored("acme").Access)
		retire()
		assert.False(t, e.server.Alive(accessTokenOf(old)))
	})
}

// A refresh joins a tenant's first exchange, which a reader has begun: there is no older token, and the new one stays.
func TestRefreshJoinsTheFirstExchange(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		e.server.Inject(oauth2test.Fault{Delay: time.Second, Times: 1})
		lease, _ := e.ask(logical.ReadOperation, "creds/acme", nil)
		_, status, text := e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
		assert.Equal(t, http.StatusOK, status, text)
		assert.True(t, e.server.Alive(accessTokenOf(<-lease)))
		assert.Equal(t, 1, e.server.Exchanges("acme"))
		e.kept()
	})
}

// A refresh has joined an exchange that was not begun for it, and by the time it looks at the result the tenant is deleted: the delete has
// had the older token revoked, and the refresh does not once more.
func TestRefreshFindsTheTenantDeleted(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		e.lease("acme")
		acme := e.tenants.named("acme")
		before := acme.view.Load()
		e.ok(logical.DeleteOperation, "tenants/acme", nil)
		synctest.Wait()
		require.Len(t, e.revocations(), 1)
		require.NoError(t, e.exchanger.retire(t.Context(), acme, before))
		e.backend.revocations.wakeAll()
		synctest.Wait()
		assert.Len(t, e.revocations(), 1)
	})
}

// Memory keeps a refresh token that storage has not taken. A write of the connector alone goes on with that refresh token, and stores it.
func TestConnectorAloneIsWrittenWhileTokensAreKept(t *testing.T) {
	for name, verify := range map[string]any{"verified": true, "unverified": false} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, oauth2test.ClassA, classA)
				e.write("config/hr", map[string]any{
					"service": "oauth2", "token_url": e.server.TokenURL(), "connector_id": e.clientID, "connector_secret": e.secret,
				})
				e.add("acme", nil)
				e.failPuts()
				_, code, _ := e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
				require.Equal(t, 503, code)
				next := map[string]any{"connector": "hr", "verify": verify}
				_, code, _ = e.try(logical.UpdateOperation, "tenants/acme", next)
				assert.Equal(t, 503, code, "storage takes nothing yet")
				e.storage.heal()
				e.write("tenants/acme", next)
				assert.Equal(t, "hr", e.stored("acme").Connector)
				assert.Equal(t, e.server.CurrentRefreshToken("acme"), e.stored("acme").RefreshToken)
				assert.True(t, e.server.Alive(accessTokenOf(e.lease("acme"))))
				e.kept()
			})
		})
	}
}

// Storage does not take a verified write: the access token of the verification is revoked, whether or not the tenant has another one. If
// storage takes the write and reports an error, that access token is not revoked.
func TestAccessTokenOfAVerificationThatIsNotStored(t *testing.T) {
	for name, c := range map[string]struct{ another, taken bool }{
		"a tenant without an access token": {},
		"a tenant with an access token":    {another: true},
		"storage takes the write":          {another: true, taken: true},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, func(o *oauth2test.Options) { oauth2test.ClassA(o); o.Rotation = oauth2test.RotateNever }, classA)
				e.add("acme", nil)
				if c.another {
					e.read("token/acme")
				}
				written := e.server.Grant(e.clientID, "new")
				if c.taken {
					e.storage.unheard("put", tenantPrefix)
				} else {
					e.failPuts()
				}
				_, code, _ := e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": written})
				require.Equal(t, 503, code)
				require.Equal(t, 1, e.server.Exchanges("new"))
				e.storage.heal()
				e.pass(2 * time.Minute)
				assert.Equal(t, c.taken, written == e.stored("acme").RefreshToken)
				alive := e.server.AccessTokens("new")
				if !c.taken {
					assert.Empty(t, alive)
					return
				}
				assert.Equal(t, []string{e.read("token/acme")["access_token"].(string)}, alive)
			})
		})
	}
}

// A connector is replaced while its call is noted, and storage fails to read the new one: the error of the exchange names storage.
func TestConnectorIsReplacedAndCannotBeRead(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		e.storage.once("put", "calls/", func() {
			e.storage.refuse("get", connectorPrefix)
			e.InvalidateKey(t.Context(), connectorPrefix+defaultConnector)
		})
		_, code, text := e.try(logical.ReadOperation, "creds/acme", nil)
		assert.Equal(t, 500, code)
		assert.Contains(t, text, errStorage.Error())
		assert.Empty(t, e.server.Calls(oauth2test.EndpointToken))
		e.storage.heal()
		time.Sleep(time.Minute)
		assert.Equal(t, statusOK, e.status("acme"))
	})
}

// Storage takes the tokens of an exchange and reports an error. No reader gets the access token before the engine knows that it is
// stored. Its leases are counted from then on, and once it is given up it does not come back.
func TestTokenThatStorageTookUnheardIsCounted(t *testing.T) {
	for name, c := range map[string]struct {
		class    func(*oauth2test.Options)
		settings map[string]any
	}{
		"A": {oauth2test.ClassA, classA},
		"D": {oauth2test.ClassD, map[string]any{"revocation": "exchange"}},
	} {
		bubble(t, func(t *testing.T) {
			e := newOAuthEngine(t, c.class, c.settings)
			e.add("acme", nil)
			e.waitForIndex()
			e.storage.unheard("put", tenantPrefix)
			_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
			require.Equal(t, http.StatusServiceUnavailable, status)
			e.storage.heal()
			lease, other := e.lease("acme"), e.lease("acme")
			e.revoke(lease)
			e.pass(time.Minute)
			assert.True(t, e.server.Alive(accessTokenOf(other)), name)
			assert.Empty(t, e.ok(logical.ReadOperation, "tenants/acme", nil).Warnings, name)
			held, err := e.storage.List(t.Context(), heldPrefix)
			require.NoError(t, err)
			assert.Empty(t, held, name)
			e.revoke(other)
			e.pass(time.Minute)
			assert.False(t, e.server.Alive(accessTokenOf(other)), name)
			assert.True(t, e.server.Alive(e.read("token/acme")["access_token"].(string)), name)
			e.kept()
		})
	}
}

// Storage takes a renewed access token and reports an error. The engine goes on with the count of the leases on the older token, and
// leases that are given before the engine knows what storage has are counted there too.
func TestCountOfLeasesOutlivesARenewalThatStorageTookUnheard(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		leases := []*logical.Response{e.lease("acme"), e.lease("acme")}
		old := accessTokenOf(leases[0])
		e.waitForIndex()
		heard := false
		e.storage.surround(func(op, key string, do func() error) error {
			err := do()
			switch {
			case op != "put" || !strings.HasPrefix(key, tenantPrefix):
			case !heard:
				heard = true
				return errStorage
			default:
				leases = append(leases, e.lease("acme")) // the engine has read storage, and writes again
			}
			return err
		})
		e.pass(50 * time.Minute)
		e.storage.heal()
		require.Len(t, leases, 3)
		require.Equal(t, old, accessTokenOf(leases[2]))
		current := e.read("token/acme")["access_token"].(string)
		require.NotEqual(t, old, current)
		e.revoke(leases[0], leases[2])
		assert.True(t, e.server.Alive(old))
		e.revoke(leases[1])
		assert.False(t, e.server.Alive(old))
		assert.True(t, e.server.Alive(current))
		e.kept()
	})
}
