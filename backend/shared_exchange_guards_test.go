package backend

import (
	"context"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/kaizala/kaizalatest"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// ask makes a request in a goroutine of its own, and returns where its answer and status come.
func (e *engine) ask(op logical.Operation, path string, data map[string]any) (resp chan *logical.Response, status chan int) {
	resp, status = make(chan *logical.Response, 1), make(chan int, 1)
	go func() {
		r, code, _ := e.try(op, path, data)
		resp <- r
		status <- code
	}()
	synctest.Wait()
	return resp, status
}

// failOnce makes storage fail the first operation of that kind below a prefix.
func (s *storage) failOnce(op, prefix string) {
	var failed atomic.Bool
	s.failWith(func(asked, key string) error {
		if asked == op && strings.HasPrefix(key, prefix) && failed.CompareAndSwap(false, true) {
			return errStorage
		}
		return nil
	})
}

// A reader of token comes while the exchange for another reader's own token is under way. He does not get that token.
func TestReaderOfTheSharedTokenDoesNotGetAnothersOwn(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", map[string]any{"token_per_lease": true})
		e.server.Inject(oauth2test.Fault{Delay: 2 * time.Second, Times: 1})
		own, _ := e.ask(logical.ReadOperation, "creds/acme", nil)
		shared := e.read("token/acme")["access_token"]
		assert.NotEqual(t, accessTokenOf(<-own), shared)
		e.kept()
	})
}

// A reader who needs a token of his own comes while an exchange for the shared token is under way. If that fails he does not get its
// error: his own exchange is made.
func TestReaderOfAnOwnTokenDoesNotGetAnothersFailure(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", map[string]any{"token_per_lease": true})
		e.storage.failOnce("put", tenantPrefix)
		e.server.Inject(oauth2test.Fault{Delay: 2 * time.Second, Times: 1})
		e.ask(logical.ReadOperation, "token/acme", nil)
		own := e.ok(logical.ReadOperation, "creds/acme", nil)
		assert.True(t, e.server.Alive(accessTokenOf(own)))
		e.kept()
	})
}

// A refresh comes while a reader's exchange is under way. If that fails the refresh gets its error, and makes no second call.
func TestRefreshSharesAFailure(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classB)
		e.add("acme", nil)
		e.server.Inject(oauth2test.Fault{Delay: 2 * time.Second, Times: 1, Answer: oauth2test.BadGateway})
		_, reader := e.ask(logical.ReadOperation, "creds/acme", nil)
		_, status, _ := e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
		assert.Equal(t, http.StatusServiceUnavailable, status)
		assert.Equal(t, http.StatusServiceUnavailable, <-reader)
		assert.Len(t, e.server.Calls(), 1)
	})
}

// The tenant leaves memory during an exchange that fails. The failure is noted, and the reader does not make a second call at once.
func TestFailureIsNotedOfATenantThatLeftMemory(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classB)
		e.add("acme", nil)
		e.server.Inject(oauth2test.Fault{Delay: 2 * time.Second, Answer: oauth2test.BadGateway})
		_, status := e.ask(logical.ReadOperation, "creds/acme", nil)
		e.InvalidateKey(t.Context(), tenantPrefix+"acme")
		assert.Equal(t, http.StatusServiceUnavailable, <-status)
		assert.Len(t, e.server.Calls(), 1)
		assert.Equal(t, statusDegraded, e.status("acme"))
	})
}

// Memory is full while an exchange is under way that ends the tenant's access token: the next reader does not get that token from storage.
func TestTenantStaysInMemoryWhileAnExchangeEndsItsToken(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, func(o *oauth2test.Options) { oauth2test.ClassD(o); o.AccessTokenLife = 24 * time.Hour }, classD)
		e.add("acme", nil)
		e.write("tenants/acme/refresh", nil) // nobody reads the access token
		e.write("config", map[string]any{"keep_alive": "1h"})
		e.server.Inject(oauth2test.Fault{Delay: 4 * time.Second, Times: 1})
		for e.tenants.named("acme").flight.Load() == nil {
			time.Sleep(time.Second)
		}
		e.tenants.loaded.Purge()
		lease := e.lease("acme")
		e.quiet("acme")
		assert.True(t, e.server.Alive(accessTokenOf(lease)))
	})
}

// Memory is full while a new access token is stored: the count of the older token's leases stays. The older token lives until the last of
// its leases has ended.
func TestCountOfLeasesStaysWhileATokenIsStored(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		one, other := e.lease("acme"), e.lease("acme")
		reached, release := e.storage.hold("put", tenantPrefix)
		_, status := e.ask(logical.UpdateOperation, "tenants/acme", map[string]any{"ttl": "30m"})
		<-reached
		e.tenants.loaded.Purge()
		release()
		require.Less(t, <-status, 300)
		e.revoke(one)
		assert.True(t, e.server.Alive(accessTokenOf(other)))
		e.revoke(other)
		assert.False(t, e.server.Alive(accessTokenOf(other)))
	})
}

// A tenant that was at work when its turn came to leave memory leaves it later, also if nothing but reads has happened since.
func TestTenantLeavesMemoryLater(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classB)
		e.add("acme", nil)
		e.read("token/acme")
		e.server.Inject(oauth2test.Fault{Delay: 2 * time.Second, Times: 1, Answer: oauth2test.BadGateway})
		_, status := e.ask(logical.UpdateOperation, "tenants/acme/refresh", nil)
		e.tenants.loaded.Purge()
		require.Equal(t, http.StatusServiceUnavailable, <-status)
		e.index.stop()
		e.read("token/acme")
		e.tenants.loaded.Purge()
		assert.Nil(t, e.tenants.named("acme").view.Load().entry)
	})
}

// A tenant in good health that has left memory takes no more of it than its summary.
func TestTenantThatLeftMemoryTakesLittle(t *testing.T) {
	bubble(t, func(t *testing.T) {
		for name, class := range map[string]map[string]any{"B": classB, "D": classD} {
			e := newOAuthEngine(t, oauth2test.ClassA, class)
			e.add("acme", nil)
			e.read("token/acme")
			e.waitForIndex()
			synctest.Wait()
			e.tenants.loaded.Purge()
			assert.Same(t, nothing, e.tenants.named("acme").view.Load().tenantMemory, name)
		}
	})
}

// While storage takes the verified write of another refresh token, readers of the present access token wait for nobody.
func TestReadersDoNotWaitForAVerifiedWrite(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassD, classD)
		e.add("acme", nil)
		token := accessTokenOf(e.lease("acme"))
		reached, release := e.storage.hold("put", tenantPrefix)
		_, status := e.ask(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": e.server.Grant(e.clientID, "other")})
		<-reached
		begun := time.Now()
		resp, code, text := e.try(logical.ReadOperation, "creds/acme", nil)
		assert.Zero(t, time.Since(begun))
		release()
		require.Equal(t, http.StatusOK, code, text)
		assert.Equal(t, token, accessTokenOf(resp))
		require.Less(t, <-status, 300)
	})
}

// A tenant is deleted while the write that creates it is verified. A reader is told at once that there is no such tenant.
func TestReaderOfATenantThatIsDeletedWhileItIsCreated(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.server.Inject(oauth2test.Fault{Delay: 8 * time.Second, Times: 1})
		_, writer := e.ask(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": e.server.Grant(e.clientID, "acme")})
		e.ok(logical.DeleteOperation, "tenants/acme", nil)
		begun := time.Now()
		_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
		assert.Equal(t, http.StatusBadRequest, status)
		assert.Zero(t, time.Since(begun))
		assert.Equal(t, http.StatusServiceUnavailable, <-writer)
	})
}

// Two clients create a tenant with the same refresh token. By the time that the second write would be verified, the service has replaced
// the refresh token: it is not sent again.
func TestTenantIsCreatedTwiceAtOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classB)
		data := map[string]any{"refresh_token": e.server.Grant(e.clientID, "acme")}
		e.connectors.invalidate(connectorPrefix + defaultConnector)
		var first atomic.Bool
		e.storage.surround(func(op, key string, do func() error) error {
			if op == "get" && strings.HasPrefix(key, connectorPrefix) && first.CompareAndSwap(false, true) {
				time.Sleep(2 * time.Second)
			}
			return do()
		})
		_, second := e.ask(logical.UpdateOperation, "tenants/acme", data)
		e.write("tenants/acme", map[string]any{"refresh_token": data["refresh_token"], "verify": false})
		e.lease("acme")
		assert.Less(t, <-second, 300)
		assert.True(t, e.server.Alive(accessTokenOf(e.lease("acme"))))
		e.kept()
	})
}

// A refresh waits in vain for an exchange. Its error says whether that verifies a write, in which case nothing was retired.
func TestRefreshThatWaitsInVain(t *testing.T) {
	for verifies, said := range map[bool]string{false: "the exchange goes on", true: "verifies a write"} {
		bubble(t, func(t *testing.T) {
			e := newOAuthEngine(t, oauth2test.ClassA, classB)
			e.add("acme", nil)
			e.read("token/acme")
			e.server.Inject(oauth2test.Fault{Delay: 14 * time.Second, Times: 1})
			if verifies {
				e.ask(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": e.server.Grant(e.clientID, "acme")})
			}
			_, status, text := e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
			assert.Equal(t, http.StatusServiceUnavailable, status)
			assert.Contains(t, text, said)
			time.Sleep(10 * time.Second)
		})
	}
}

// A tenant is deleted at the moment when the exchange ends that a refresh waits for: the refresh says that there is no such tenant.
func TestTenantIsDeletedAtTheEndOfARefresh(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		e.read("creds/acme")
		e.kaizala.SetConnectorSecret(e.connectorID, "another")
		_, status, _ := e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
		require.Equal(t, http.StatusBadRequest, status)
		e.kaizala.SetConnectorSecret(e.connectorID, e.secret)
		e.index.stop() // no exchange but this test's
		time.Sleep(probeEvery)
		e.kaizala.Inject(kaizalatest.Fault{Delay: 4 * time.Second, Times: 1})
		go e.exchangeUnasked(e.tenants.named("acme"))
		synctest.Wait()
		_, refresh := e.ask(logical.UpdateOperation, "tenants/acme/refresh", nil)
		var first atomic.Bool
		e.storage.surround(func(op, key string, do func() error) error {
			if op == "put" && strings.HasPrefix(key, connectorPrefix) && first.CompareAndSwap(false, true) {
				time.Sleep(2 * time.Second) // the new tokens are stored, and the exchange has not ended
			}
			return do()
		})
		time.Sleep(5 * time.Second)
		e.ok(logical.DeleteOperation, "tenants/acme", nil)
		assert.Equal(t, http.StatusNotFound, <-refresh)
		assert.True(t, first.Load())
	})
}

// A reader goes away while storage reads the connector: that is no failed exchange.
func TestReaderWhoGoesAwayIsNoFailure(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassD, classD)
		e.add("acme", nil)
		e.lease("acme")
		e.index.stop()
		time.Sleep(time.Hour)
		e.connectors.invalidate(connectorPrefix + defaultConnector)
		ctx, cancel := context.WithCancel(t.Context())
		e.storage.surround(func(op, key string, do func() error) error {
			if op == "get" && strings.HasPrefix(key, connectorPrefix) {
				cancel()
				return ctx.Err()
			}
			return do()
		})
		_, _, _ = e.tryContext(ctx, logical.ReadOperation, "creds/acme", nil)
		e.storage.heal()
		assert.Error(t, ctx.Err())
		assert.Equal(t, statusOK, e.status("acme"))
		assert.Zero(t, e.log.count("an exchange failed"))
	})
}

// A reader of token joins the exchange for another reader's own token, and goes away. The other reader still gets his token.
func TestReaderWhoGoesAwayTakesNoTokenFromAnother(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", map[string]any{"token_per_lease": true})
		e.server.Inject(oauth2test.Fault{Delay: 4 * time.Second, Times: 1})
		own, status := e.ask(logical.ReadOperation, "creds/acme", nil)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, _, _ = e.tryContext(ctx, logical.ReadOperation, "token/acme", nil)
		resp := <-own
		require.Equal(t, http.StatusOK, <-status)
		assert.True(t, e.server.Alive(accessTokenOf(resp)))
		assert.Equal(t, 1, e.server.Exchanges("acme"))
	})
}

// Storage hangs when a refresh needs the connector: the refresh says so in time.
func TestRefreshWhileStorageHangs(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classB)
		e.add("acme", nil)
		e.read("token/acme")
		e.connectors.invalidate(connectorPrefix + defaultConnector)
		e.storage.surround(func(op, key string, do func() error) error {
			if op == "get" && strings.HasPrefix(key, connectorPrefix) {
				time.Sleep(answerWithin)
				return context.DeadlineExceeded
			}
			return do()
		})
		_, status, _ := e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
		assert.Equal(t, http.StatusServiceUnavailable, status)
		e.storage.heal()
	})
}

// A write of a connector does not wait for storage that is taking a tenant.
func TestConnectorIsWrittenWhileATenantIsStored(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		e.lease("acme")
		e.waitForIndex()
		reached, release := e.storage.hold("put", tenantPrefix)
		_, status := e.ask(logical.UpdateOperation, "tenants/acme", map[string]any{"ttl": "1h"})
		<-reached
		_, written := e.ask(logical.UpdateOperation, "config", map[string]any{"revocation": "none", "exchange_invalidates": true})
		time.Sleep(time.Second)
		assert.Len(t, written, 1)
		release()
		assert.Less(t, <-written, 300)
		assert.Less(t, <-status, 300)
	})
}
