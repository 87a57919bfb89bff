package backend

import (
	"context"
	"fmt"
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

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/kaizala/kaizalatest"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/tokenservice"
)

// A write of a connector that does not change exchange_invalidates leaves the access tokens in memory: readers get them although storage
// fails the write, or another node makes it, and storage then fails every read.
func TestReadersKeepTheirTokensWhenAConnectorIsWritten(t *testing.T) {
	for name, write := range map[string]func(e, other *oauthEngine){
		"storage fails the write": func(e, _ *oauthEngine) {
			e.storage.refuse("put", connectorPrefix)
			_, status, _ := e.try(logical.UpdateOperation, "config", map[string]any{"connector_secret": "another"})
			require.GreaterOrEqual(e.t, status, http.StatusInternalServerError)
		},
		"another node writes": func(e, other *oauthEngine) {
			e.swap(other)
			other.write("config", map[string]any{"connector_secret": "another"})
			synctest.Wait()
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, oauth2test.ClassD, nil)
				e.add("acme", nil)
				token := accessTokenOf(e.lease("acme"))
				write(e, e.newStandby())
				e.storage.failWith(func(string, string) error { return errStorage })
				assert.Equal(t, token, accessTokenOf(e.lease("acme")))
				e.storage.heal()
			})
		})
	}
}

// Storage takes a write of exchange_invalidates and answers after the write's time limit: the ends of the access tokens of all tenants
// are planned all the same.
func TestExchangeInvalidatesIsWrittenTooSlowly(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassD, classB)
		for i := range 20 {
			e.add(fmt.Sprint("acme", i), nil)
			e.lease(fmt.Sprint("acme", i))
		}
		e.storage.surround(func(op, key string, do func() error) error {
			err := do()
			if op == "put" && key == connectorPrefix+defaultConnector {
				time.Sleep(storeWithin + time.Second)
				return context.DeadlineExceeded
			}
			return err
		})
		_, status, _ := e.try(logical.UpdateOperation, "config", map[string]any{"exchange_invalidates": true})
		require.GreaterOrEqual(t, status, http.StatusInternalServerError)
		e.storage.heal()
		synctest.Wait()
		for i := range 20 {
			name := fmt.Sprint("acme", i)
			planned := plannedExchange(name, e.stored(name), 0)
			assert.EqualValues(t, time.Until(planned.Add(-leaseMargin))/time.Second, e.read("token/" + name)["ttl"])
		}
	})
}

// The last exchange failed because the service refused the connector, and the access token had too little life left to be handed out
// since. So no lease lasts until the next try: after a write of the connector, a reader gets a new access token at once.
func TestRefusedConnectorIsWrittenNearTheEndOfATokenInUse(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, func(o *oauth2test.Options) { oauth2test.ClassD(o); o.AccessTokenLife = 2 * time.Hour }, nil)
		e.add("acme", map[string]any{"min_ttl": "1h"})
		old := accessTokenOf(e.lease("acme"))
		access := e.stored("acme").Access
		time.Sleep(time.Until(access.Planned.Add(-time.Minute)))
		e.server.Inject(oauth2test.Fault{Answer: oauth2test.InvalidClient})
		time.Sleep(time.Until(access.Expires.Add(-45 * time.Minute)))
		_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
		require.Equal(t, http.StatusBadRequest, status)
		e.server.ClearFaults()
		e.write("config", map[string]any{"connector_secret": e.secret})
		require.Greater(t, time.Until(e.tenants.named("acme").view.Load().bound), 10*time.Second)
		assert.NotEqual(t, old, accessTokenOf(e.lease("acme")))
		e.kept()
	})
}

// A lease, or the ttl of a token read, lasts until the next try of an exchange, and a refresh fails before: the access token still lives
// until that end.
func TestRefreshFailsWhileLeasesHold(t *testing.T) {
	for name, life := range map[string]func(*oauthEngine) time.Duration{
		"lease": func(e *oauthEngine) time.Duration { return e.lease("acme").Secret.MaxTTL },
		"token": func(e *oauthEngine) time.Duration {
			return time.Duration(e.read("token/acme")["ttl"].(int64)) * time.Second
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, oauth2test.ClassD, nil)
				e.add("acme", nil)
				old := accessTokenOf(e.lease("acme"))
				time.Sleep(time.Until(e.stored("acme").Access.Planned.Add(-time.Second)))
				e.server.Inject(oauth2test.Fault{Answer: oauth2test.InvalidClient, Times: 1})
				time.Sleep(2 * time.Second)
				left := life(e)
				require.Greater(t, left, time.Minute, "it lasts until the next try at a refused connector")
				end := time.Now().Add(left)
				e.write("config", map[string]any{"connector_secret": e.secret})
				e.server.Inject(oauth2test.Fault{Answer: oauth2test.BadGateway, Times: 1})
				_, status, _ := e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
				require.Equal(t, http.StatusServiceUnavailable, status)
				time.Sleep(time.Until(end) - time.Millisecond)
				assert.True(t, e.server.Alive(old))
				time.Sleep(10 * time.Second)
				assert.NotEqual(t, old, accessTokenOf(e.lease("acme")))
				e.kept()
			})
		})
	}
}

// The engine is stopped while storage takes the note of an exchange, and storage answers only after the engine has ended its work: the
// exchange is not made, and the next process does not take it for one whose answer was lost.
func TestRestartWhileAnExchangeIsNoted(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassD, nil)
		e.add("acme", nil)
		lease := e.lease("acme")
		time.Sleep(2 * time.Minute) // the first call's place is free again
		var noted atomic.Bool
		e.storage.surround(func(op, key string, do func() error) error {
			err := do()
			if op == "put" && strings.HasPrefix(key, callPrefix) && noted.CompareAndSwap(false, true) {
				time.Sleep(stopWithin - 500*time.Millisecond)
				return context.Canceled
			}
			return err
		})
		var refresh sync.WaitGroup
		refresh.Go(func() { _, _, _ = e.try(logical.UpdateOperation, "tenants/acme/refresh", nil) })
		synctest.Wait()
		require.True(t, noted.Load())
		e.stop()
		refresh.Wait()
		e.start()
		e.pass(2 * time.Minute)
		assert.Equal(t, accessTokenOf(lease), accessTokenOf(e.lease("acme")))
		assert.True(t, e.server.Alive(accessTokenOf(lease)))
	})
}

// An exchange fails on this node, and then another node makes one: this node plans the end of the new access token by that exchange, and
// not by the backoff of its own.
func TestBackoffOfBeforeAnotherNodesExchange(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, func(o *oauth2test.Options) { oauth2test.ClassD(o); o.AccessTokenLife = 5 * time.Minute }, nil)
		e.add("acme", nil)
		other := e.newStandby()
		e.server.Inject(oauth2test.Fault{Answer: oauth2test.InvalidClient, Times: 1})
		_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
		require.Equal(t, http.StatusBadRequest, status)
		time.Sleep(time.Second)
		e.swap(other)
		other.write("config", map[string]any{"connector_secret": e.secret})
		lease := other.lease("acme")
		assert.Equal(t, lease.Secret.MaxTTL, e.lease("acme").Secret.MaxTTL)
	})
}

// A read with a min_ttl that is exactly the life that an access token has left before its planned exchange gets that token, also if the
// token's whole life is short.
func TestMinTTLThatAShortAccessTokenHasLeft(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, func(o *oauth2test.Options) { oauth2test.ClassD(o); o.AccessTokenLife = time.Minute }, nil)
		e.add("acme", map[string]any{"min_ttl": 0})
		old := accessTokenOf(e.lease("acme"))
		time.Sleep(time.Until(e.stored("acme").Access.Planned.Add(-leaseMargin - 20*time.Second)))
		resp, status, text := e.try(logical.ReadOperation, "creds/acme", map[string]any{"min_ttl": 20})
		require.Equal(t, http.StatusOK, status, text)
		assert.Equal(t, old, accessTokenOf(resp))
	})
}

// An answer brings a new refresh token, and also shows that the connector is accepted again or has to pause. That takes effect in memory
// at once, but the refresh token is stored first: it is in storage while the write of the connector or the pause does not end, and
// after a stop of the engine.
func TestRefreshTokenIsStoredBeforeTheVerdict(t *testing.T) {
	refused := func(e *oauthEngine) {
		e.server.Inject(oauth2test.Fault{Times: 1, Answer: oauth2test.InvalidClient})
		_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
		require.Equal(e.t, http.StatusBadRequest, status)
	}
	for name, c := range map[string]struct {
		before  func(*oauthEngine)
		verdict string // the storage key of the connector or the pause
		brings  string // the new refresh token, if it is not the server's own
		holds   func(*loadedConnector) bool
	}{
		"accepted": {before: refused, verdict: connectorPrefix, holds: func(via *loadedConnector) bool { return via.refusal.Load() == nil }},
		"pause": {
			before: func(e *oauthEngine) {
				e.server.Inject(oauth2test.Fault{Times: 1, Answer: oauth2test.Answer{
					Status: http.StatusOK, Header: http.Header{"Retry-After": {"60"}}, Body: `{"error":"slow_down","refresh_token":"rotated"}`,
				}})
			},
			verdict: callPrefix + "default/pause", brings: "rotated",
			holds: func(via *loadedConnector) bool { return via.share.PausedUntil().After(time.Now()) },
		},
	} {
		bubble(t, func(t *testing.T) {
			e := newOAuthEngine(t, oauth2test.ClassA, classA)
			e.add("acme", nil)
			e.waitForIndex()
			c.before(e)
			reached, release := e.storage.hold("put", c.verdict)
			var all sync.WaitGroup
			all.Go(func() {
				time.Sleep(probeEvery + time.Second)
				_, _, _ = e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
			})
			<-reached
			synctest.Wait()
			brought := c.brings
			if brought == "" {
				brought = e.server.CurrentRefreshToken("acme")
			}
			assert.Equal(t, brought, e.stored("acme").RefreshToken, name)
			assert.True(t, c.holds(e.connectors.present(defaultConnector)), name)
			all.Go(e.stop)
			time.Sleep(stopWithin)
			synctest.Wait()
			assert.Equal(t, brought, e.stored("acme").RefreshToken, name)
			release()
			all.Wait()
		})
	}
}

// Storage deletes a connector and not what it has of the connector's calls: the delete fails, and the next one deletes the rest.
func TestConnectorDeleteThatLeavesItsCalls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.write("tenants/acme", map[string]any{"refresh_token": e.kaizala.GenerateUserToken(e.connectorID, "u")})
		e.ok(logical.DeleteOperation, "tenants/acme", nil)
		e.storage.refuse("delete", "calls/")
		_, status, _ := e.try(logical.DeleteOperation, "config", nil)
		assert.Equal(t, 500, status)
		e.storage.heal()
		require.Contains(t, e.storedText(), "calls/default/")
		e.ok(logical.DeleteOperation, "config", nil)
		assert.NotContains(t, e.storedText(), "calls/")
		assert.NotContains(t, e.storedText(), "config/")
	})
}

// The service asks for a rest with Retry-After: all of the connector's exchanges wait, whatever the status. Beside the refusal of one
// refresh token, Retry-After says nothing about other tenants.
func TestRetryAfterBesideOtherStatuses(t *testing.T) {
	for name, c := range map[string]struct {
		answer kaizalatest.Fault
		pauses bool
	}{
		"outage":                {kaizalatest.Fault{Status: 502}, true},
		"refusal":               {kaizalatest.Fault{Status: 400, Body: `{"errorCode":"SomethingElse"}`}, true},
		"refresh token refused": {kaizalatest.Fault{Status: 400, Body: `{"errorCode":"InvalidToken"}`}, false},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newConfiguredEngine(t)
				e.addTenant("acme")
				e.addTenant("globex")
				c.answer.Header, c.answer.Times = http.Header{"Retry-After": {"300"}}, 1
				e.kaizala.Inject(c.answer)
				_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
				require.GreaterOrEqual(t, status, 400)
				_, status, _ = e.try(logical.ReadOperation, "creds/globex", nil)
				assert.Equal(t, c.pauses, status == http.StatusTooManyRequests)
			})
		})
	}
}

// A connector whose stored entry cannot be read is deleted only if no tenant uses it.
func TestDeleteOfAnUnreadableConnector(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		require.NoError(t, e.storage.Put(t.Context(), &logical.StorageEntry{Key: connectorPrefix + defaultConnector, Value: []byte("{")}))
		e.restart()
		e.waitForIndex()
		_, status, text := e.try(logical.DeleteOperation, "config", nil)
		assert.Equal(t, http.StatusBadRequest, status)
		assert.Contains(t, text, "(acme)")
		e.ok(logical.DeleteOperation, "tenants/acme", nil)
		e.ok(logical.DeleteOperation, "config", nil)
		assert.NotContains(t, e.storedText(), connectorPrefix)
	})
}

// The operator writes the connector while the service's refusal of the former configuration is being stored: the write stays.
func TestRefusalDoesNotUndoAWriteOfTheConnector(t *testing.T) {
	for name, accepted := range map[string]bool{"refused": false, "accepted again": true} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newConfiguredEngine(t)
				e.addTenants(2)
				via := e.connectors.present(defaultConnector)
				refuse := func() func(context.Context) {
					return e.connectors.judge(via, &tokenservice.Failure{Kind: tokenservice.RefusedConnector})
				}
				store := refuse()
				if accepted {
					store = e.connectors.judge(via, nil)
				}
				secret := e.kaizala.NewConnectorSecret(e.connectorID)
				e.write("config", map[string]any{"connector_secret": secret})
				store(t.Context())
				stored, err := e.storedConnector(t.Context(), defaultConnector)
				require.NoError(t, err)
				assert.Equal(t, secret, stored.ConnectorSecret)
				assert.Zero(t, stored.Refused)

				// A refusal that comes after the write is about what it has replaced.
				lines := e.log.count("refuses")
				refuse()(t.Context())
				assert.Equal(t, lines, e.log.count("refuses"))
				e.read("creds/t0")

				// Nor does a late success with the replaced configuration show that the service takes the present one.
				e.kaizala.SetConnectorSecret(e.connectorID, "NEWSECRET1")
				_, status, _ := e.try(logical.UpdateOperation, "tenants/t0/refresh", nil)
				require.Equal(t, http.StatusBadRequest, status)
				e.connectors.judge(via, nil)(t.Context())
				calls := e.kaizala.CallCount()
				_, _, _ = e.try(logical.ReadOperation, "creds/t1", nil)
				assert.Equal(t, calls, e.kaizala.CallCount(), "the connector is refused still")
			})
		})
	}
}

// A refusal is stored also where the request that was answered has been given up meanwhile.
func TestRefusalIsStoredWithoutItsRequest(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		via, err := e.connectors.get(t.Context(), defaultConnector)
		require.NoError(t, err)
		require.NoError(t, via.storing.acquire(t.Context()))
		gone, cancel := context.WithCancel(t.Context())
		cancel()
		go e.connectors.judge(via, &tokenservice.Failure{Kind: tokenservice.RefusedConnector})(gone)
		synctest.Wait()
		via.storing.release()
		synctest.Wait()
		entry, err := e.storedConnector(t.Context(), defaultConnector)
		require.NoError(t, err)
		assert.False(t, entry.Refused.IsZero())
	})
}

// Of the answers that show that the service takes a connector again, one is told and stored.
func TestConnectorIsAcceptedOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenants(2)
		e.read("creds/t0")
		e.read("creds/t1")
		via := e.connectors.present(defaultConnector)
		e.connectors.judge(via, &tokenservice.Failure{Kind: tokenservice.RefusedConnector})(t.Context())
		writes := e.storage.putsOf(connectorPrefix + defaultConnector)
		lines := strings.Count(e.log.String(), "\n")
		for range 2 {
			e.connectors.judge(via, nil)(t.Context())
		}
		assert.Equal(t, writes+1, e.storage.putsOf(connectorPrefix+defaultConnector))
		assert.Equal(t, lines+1, strings.Count(e.log.String(), "\n"))
	})
}

// The call that a refused connector makes every ten minutes is not made after all: storage does not take its note, or a pause begins
// meanwhile. The next work makes it.
func TestProbeThatIsNotMadeIsLeftToOthers(t *testing.T) {
	for name, prevent := range map[string]func(*engine){
		"storage fails": func(e *engine) { e.storage.refuse("put", callPrefix) },
		"a pause begins": func(e *engine) {
			e.storage.surround(func(op, key string, do func() error) error {
				if op == "put" && strings.HasPrefix(key, callPrefix) {
					e.connectors.present(defaultConnector).share.Pause(time.Now().Add(time.Minute))
				}
				return do()
			})
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newConfiguredEngine(t)
				e.addTenants(2)
				e.kaizala.SetConnectorSecret(e.connectorID, "NEWSECRET1")
				_, status, _ := e.try(logical.ReadOperation, "creds/t0", nil)
				require.Equal(t, http.StatusBadRequest, status)
				e.kaizala.SetConnectorSecret(e.connectorID, e.secret)
				e.stop() // without background work
				e.start()
				e.index.stop()
				_, _, _ = e.try(logical.ReadOperation, "creds/t0", nil)
				time.Sleep(probeEvery)
				prevent(e)
				_, status, _ = e.try(logical.ReadOperation, "creds/t0", nil)
				assert.NotEqual(t, http.StatusOK, status)
				e.storage.heal()
				time.Sleep(time.Minute)
				e.read("creds/t1")
			})
		})
	}
}

// The service refuses the connector. A write of issuer, which is to put that right, reads the metadata all the same.
func TestRefusedConnectorIsWrittenWithItsIssuer(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassD, map[string]any{"connector_secret": "wrong"})
		e.add("acme", nil)
		_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
		require.Equal(t, http.StatusBadRequest, status)
		e.write("config", map[string]any{"issuer": e.server.Issuer(), "connector_secret": e.secret})
		e.read("creds/acme")
	})
}

// Tenants that are due are exchanged at the same time, not one after another: the service is slow.
func TestBackgroundExchangesRunBesideEachOther(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.waitForIndex()
		e.kaizala.Inject(kaizalatest.Fault{Delay: 20 * time.Second})
		e.kaizala.SetRefreshTokenAge(kaizalatest.DefaultRefreshTokenLife * 9 / 10)
		e.addTenants(5)
		time.Sleep(time.Second)
		assert.Len(t, e.kaizala.Calls(), 5)
		e.pass(time.Minute)
	})
}

// What one tenant keeps, or verifies, holds its own connector alone.
func TestOtherConnectorsAreFree(t *testing.T) {
	for name, begin := range map[string]func(*engine){
		"kept": func(e *engine) {
			e.failPuts()
			_, _, _ = e.try(logical.ReadOperation, "creds/acme", nil)
			e.quiet("acme")
			e.storage.heal()
		},
		"an exchange": func(e *engine) { go e.try(logical.ReadOperation, "creds/acme", nil) },
		"a verification": func(e *engine) {
			go e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": e.newToken("acme")})
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newConfiguredEngine(t)
				e.addTenant("acme")
				id, secret := e.kaizala.RegisterConnector()
				e.write("config/hr", map[string]any{"connector_id": id, "connector_secret": secret})
				e.kaizala.Inject(kaizalatest.Fault{Delay: 3 * time.Second, Process: true})
				begin(e)
				synctest.Wait()
				_, status, text := e.try(logical.DeleteOperation, "config", nil)
				assert.Equal(t, http.StatusBadRequest, status, text)
				e.ok(logical.DeleteOperation, "config/hr", nil)
				e.quiet("acme")
			})
		})
	}
}
