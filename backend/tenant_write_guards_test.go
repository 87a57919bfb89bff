package backend

import (
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// An operator's refresh token takes the place of a person's consent: the tenant does not name the person any more.
func TestWriteForgetsWhoHasGranted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		require.Equal(t, 200, e.confirm(e.authorize(nil)).status)
		require.Equal(t, "token-ada", e.read("tenants/acme")["granted_by"])
		e.write("tenants/acme", map[string]any{"refresh_token": e.server.Grant(e.clientID, "bob"), "verify": false})
		tenant := e.read("tenants/acme")
		for _, field := range []string{"granted_by", "granted_time", "subject"} {
			assert.NotContains(t, tenant, field)
		}
	})
}

// A write of another refresh token ends the exchange that a revoked lease was waiting for: nobody would keep its result.
func TestWriteEndsAnExchangeThatIsOwed(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassD, map[string]any{"revocation": "exchange"})
		e.add("acme", nil)
		lease := e.lease("acme")
		e.server.Inject(oauth2test.Fault{Answer: oauth2test.BadGateway})
		e.revoke(lease)
		synctest.Wait()
		require.EqualValues(t, 1, e.pending("acme"))
		e.write("tenants/acme", map[string]any{"refresh_token": e.server.Grant(e.clientID, "eve"), "verify": false})
		e.server.ClearFaults()
		assert.Nil(t, e.pending("acme"))
		e.pass(5 * time.Minute)
		assert.Zero(t, e.server.Exchanges("eve"))
	})
}

// A write that is not verified has the older access token revoked at once, not with the next tick.
func TestUnverifiedWriteRevokesAtOnce(t *testing.T) {
	for _, field := range []string{"refresh_token", "connector"} {
		bubble(t, func(t *testing.T) {
			e := newOAuthEngine(t, oauth2test.ClassA, classA)
			e.write("config/other", map[string]any{"service": "oauth2", "token_url": e.server.TokenURL(), "connector_id": e.clientID, "connector_secret": e.secret})
			e.add("acme", nil)
			token := e.read("token/acme")["access_token"].(string)
			value := "other"
			if field == "refresh_token" {
				value = e.server.Grant(e.clientID, "eve")
			}
			e.write("tenants/acme", map[string]any{field: value, "verify": false})
			synctest.Wait()
			assert.False(t, e.server.Alive(token), field)
		})
	}
}

// The service has replaced the refresh token of a verified write, and its access token cannot be used: the write is stored, and its answer
// says what is wrong.
func TestStoredWriteSaysWhatIsWrong(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, func(o *oauth2test.Options) {
			oauth2test.ClassA(o)
			o.Edit = func(_ oauth2test.Endpoint, fields map[string]any) { fields["expires_in"] = 0 }
		}, classA)
		resp := e.write("tenants/acme", map[string]any{"refresh_token": e.server.Grant(e.clientID, "acme")})
		require.NotNil(t, resp)
		require.Len(t, resp.Warnings, 1)
		assert.Contains(t, resp.Warnings[0], "The write is stored, but ")
		assert.Equal(t, e.server.CurrentRefreshToken("acme"), e.stored("acme").RefreshToken)
	})
}

// A write of a setting waits for its verification, and another write changes the same setting meanwhile: the later one stays, and the answer
// to the earlier one says so.
func TestWriteSaysThatAnotherHasItsSettings(t *testing.T) {
	for field, values := range map[string][2]any{"ttl": {"5m", "6m"}, "max_ttl": {"5h", "6h"}, "min_ttl": {"5m", "6m"},
		"retire_on_revoke": {true, false}, "token_per_lease": {false, true}} {
		t.Run(field, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, oauth2test.ClassA, classA)
				e.add("acme", nil)
				e.server.Inject(oauth2test.Fault{Delay: 3 * time.Second, Times: 1})
				answers := make(chan *logical.Response)
				go func() {
					answers <- e.write("tenants/acme", map[string]any{"refresh_token": e.server.Grant(e.clientID, "acme"), field: values[0]})
				}()
				synctest.Wait()
				e.write("tenants/acme", map[string]any{field: values[1]})
				resp := <-answers
				require.NotNil(t, resp)
				assert.Contains(t, strings.Join(resp.Warnings, " "), "Another write of the tenant came meanwhile")
			})
		})
	}
}

// A tenant's settings can be written while its connector cannot be read: only token_per_lease=true needs to know it.
func TestSettingsWithoutAReadableConnector(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", map[string]any{"token_per_lease": true})
		e.put(connectorPrefix+defaultConnector, []byte("{"))
		e.crash()
		synctest.Wait()
		e.write("tenants/acme", map[string]any{"token_per_lease": false})
		e.write("tenants/acme", map[string]any{"ttl": "5m"})
		assert.False(t, e.stored("acme").TokenPerLease)
		assert.Equal(t, 5*time.Minute, e.stored("acme").TTL)
	})
}

// A write of a tenant waits for a config write until its answer is due: the config write goes on.
func TestTenantWriteBehindAHangingConfigWrite(t *testing.T) {
	for _, verify := range []bool{true, false} {
		bubble(t, func(t *testing.T) {
			e := newOAuthEngine(t, oauth2test.ClassA, classA)
			reached, release := e.storage.hold("put", connectorPrefix)
			configured := make(chan struct{})
			go func() {
				defer close(configured)
				e.write("config", map[string]any{"request_timeout": "14s"})
			}()
			<-reached
			begun := time.Now()
			assert.GreaterOrEqual(t, e.rewrite("acme", e.server.Grant(e.clientID, "acme"), verify), 500)
			assert.Equal(t, answerWithin, time.Since(begun))
			release()
			<-configured
			assert.Nil(t, e.stored("acme"))
			assert.Equal(t, 204, e.rewrite("acme", e.server.Grant(e.clientID, "acme"), verify))
		})
	}
}

// A connector is deleted while a write that is not verified waits for it: the write is refused.
func TestUnverifiedWriteWhoseConnectorIsDeleted(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.waitForIndex()
		reached, release := e.storage.hold("delete", connectorPrefix)
		deleted := make(chan struct{})
		go func() {
			defer close(deleted)
			e.ok(logical.DeleteOperation, "config", nil)
		}()
		<-reached
		written := make(chan int)
		go func() { written <- e.rewrite("acme", e.server.Grant(e.clientID, "acme"), false) }()
		synctest.Wait()
		release()
		<-deleted
		assert.Equal(t, 400, <-written)
		assert.Nil(t, e.stored("acme"))
	})
}

// What the answer says when it comes before the service's: a write that waits for another exchange was not stored, and a refresh says whose
// exchange it waits for.
func TestAnswersBeforeTheServices(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, with(classA, "request_timeout", "30s"))
		e.add("acme", nil)
		e.server.Inject(oauth2test.Fault{Delay: 20 * time.Second, Times: 1})
		refreshed := make(chan string)
		go func() {
			_, status, text := e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
			assert.Equal(t, 503, status)
			refreshed <- text
		}()
		synctest.Wait()
		_, status, text := e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": e.server.Grant(e.clientID, "eve")})
		assert.Equal(t, 503, status)
		assert.Contains(t, text, `another exchange of tenant "acme" is under way: nothing of this write was stored`)
		assert.Contains(t, <-refreshed, "the exchange goes on, and its access token will be handed out once it is there")
		e.pass(time.Minute)
		assert.Equal(t, e.server.CurrentRefreshToken("acme"), e.stored("acme").RefreshToken)

		e.server.Inject(oauth2test.Fault{Delay: 20 * time.Second, Times: 1})
		go func() {
			_, _, _ = e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": e.server.Grant(e.clientID, "eve")})
		}()
		synctest.Wait()
		_, status, text = e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
		assert.Equal(t, 503, status)
		assert.Contains(t, text, "the exchange that verifies a write of tenant \"acme\": the present access token was not retired")
		e.pass(time.Minute)
	})
}

// The engine stops while the service verifies a write: the writer's answer is a 503.
func TestStopDuringAVerification(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.server.Inject(oauth2test.Fault{Hang: true})
		status := make(chan int, 1)
		go func() { status <- e.rewrite("acme", e.server.Grant(e.clientID, "acme"), true) }()
		synctest.Wait()
		e.restart()
		assert.Equal(t, 503, <-status)
		assert.Nil(t, e.stored("acme"))
	})
}

// A refresh comes while the service verifies a write, which it refuses: the refresh makes an exchange of its own, and retires the access token.
func TestRefreshAfterAFailedVerificationExchanges(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		older := e.read("token/acme")["access_token"].(string)
		e.server.Inject(oauth2test.Fault{Delay: 3 * time.Second, Answer: oauth2test.InvalidGrant, Times: 1})
		go func() {
			_, _, _ = e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": e.server.Grant(e.clientID, "eve")})
		}()
		synctest.Wait()
		e.write("tenants/acme/refresh", nil)
		synctest.Wait()
		assert.Equal(t, 2, e.server.Exchanges("acme"))
		assert.NotEqual(t, older, e.read("token/acme")["access_token"])
		assert.False(t, e.server.Alive(older))
	})
}

// Storage takes a grant that creates a tenant, and reports an error: the list names the tenant, and says that its state is not known.
func TestListOfATenantWhoseGrantIsInDoubt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		e.write("config/as", map[string]any{"confirm": false})
		back := e.authorize(nil)
		e.waitForIndex()
		e.storage.unheard("put", tenantPrefix)
		e.open(back)
		require.NotNil(t, e.stored("acme"))
		resp := e.ok(logical.ListOperation, "tenants/", nil)
		assert.Equal(t, []string{"acme"}, resp.Data["keys"])
		assert.Nil(t, resp.Data["key_info"])
		assert.Contains(t, strings.Join(resp.Warnings, " "), "key_info of 1 tenants is missing")
	})
}

// writeTwice writes the tenant acme, which does not exist. While the write waits for its connector, the same refresh token is written with the
// connector other, and meanwhile is called.
func (e *oauthEngine) writeTwice(meanwhile func()) {
	e.t.Helper()
	token := e.server.Grant(e.clientID, "acme")
	binding := e.connectors.record(defaultConnector).binding
	require.NoError(e.t, binding.Acquire(e.t.Context(), exclusive)) // as a write of config that storage keeps waiting
	var written sync.WaitGroup
	written.Go(func() { e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": token}) })
	synctest.Wait()
	e.write("tenants/acme", map[string]any{"refresh_token": token, "connector": "other", "verify": false})
	meanwhile()
	binding.Release(exclusive)
	written.Wait()
}

// A write of a tenant that does not exist waits for its connector. Meanwhile the same refresh token is written with another connector, and
// an exchange replaces it, which storage does not take. The service must not get the replaced refresh token again: that ends the grant.
func TestWriteOfANewTenantWhoseTokenIsReplacedMeanwhile(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.write("config/other", map[string]any{"service": "oauth2", "token_url": e.server.TokenURL(), "connector_id": e.clientID, "connector_secret": e.secret})
		e.writeTwice(func() {
			e.storage.refuse("put", tenantPrefix)
			_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
			require.Equal(t, 503, status)
		})
		e.storage.heal()
		e.pass(2 * time.Minute)
		e.kept()
		assert.Equal(t, statusOK, e.status("acme"))
	})
}

// The same, but storage takes the new refresh token, and the tenant leaves memory before the write goes on: the write does not take it for a
// tenant that does not exist.
func TestWriteOfANewTenantThatIsMadeAndLeavesMemory(t *testing.T) {
	for name, leaves := range map[string]func(e *oauthEngine){
		"stays":   func(*oauthEngine) {},
		"evicted": func(e *oauthEngine) { e.tenants.loaded.Purge() },
		"replanned": func(e *oauthEngine) {
			e.write("config/other", map[string]any{"exchange_invalidates": true, "revocation": "none"})
		},
		"restarted elsewhere": func(e *oauthEngine) { e.invalidate(t.Context(), tenantPrefix+"acme") },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, func(o *oauth2test.Options) { oauth2test.ClassA(o); o.ReuseKillsFamily = true }, classA)
				e.write("config/other", map[string]any{"service": "oauth2", "token_url": e.server.TokenURL(), "connector_id": e.clientID, "connector_secret": e.secret, "exchange_invalidates": false})
				e.writeTwice(func() {
					e.read("creds/acme") // the service replaces the refresh token
					synctest.Wait()
					leaves(e)
					synctest.Wait()
				})
				e.pass(2 * time.Minute)
				e.kept()
				assert.Equal(t, statusOK, e.status("acme"))
			})
		})
	}
}
