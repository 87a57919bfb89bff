package backend

import (
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// A refusal of the connector with the status 429 pauses the connector once, and not again with each request that is told of it.
func TestRefusalWithALimitPausesOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		e.server.Inject(oauth2test.Fault{Times: 1, Answer: oauth2test.Answer{
			Status: http.StatusTooManyRequests, Header: http.Header{"Retry-After": {"20"}}, Body: `{"error": "invalid_client"}`,
		}})
		_, _, _ = e.try(logical.ReadOperation, "creds/acme", nil)
		time.Sleep(3 * time.Minute)
		_, _, _ = e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": e.server.Grant(e.clientID, "acme")})
		e.write("config", map[string]any{"connector_secret": e.secret})
		e.read("creds/acme")
	})
}

// exchange_invalidates is written, and the planned exchange fails: the exchange that ends the access token waits for a lease that was
// renewed until the next try.
func TestRenewalUntilTheNextTryHolds(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassD, classB)
		e.add("acme", map[string]any{"ttl": "10m"})
		lease := e.lease("acme")
		e.write("config", map[string]any{"exchange_invalidates": true})
		e.read("token/acme")
		time.Sleep(e.planned() - time.Second)
		e.server.Inject(oauth2test.Fault{Answer: oauth2test.InvalidClient, Times: 1})
		time.Sleep(10 * time.Second)
		end, renewed := e.renewLease(lease, 20*time.Minute)
		require.True(t, renewed)
		require.Greater(t, time.Until(end), time.Minute)
		e.write("config", map[string]any{"connector_secret": e.secret})
		e.server.Inject(oauth2test.Fault{Answer: oauth2test.BadGateway, Times: 1})
		_, status, _ := e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
		require.Equal(t, http.StatusServiceUnavailable, status)
		time.Sleep(time.Until(end) - time.Millisecond)
		assert.True(t, e.server.Alive(accessTokenOf(lease)))
	})
}

// A delete that storage fails has had the access token revoked: its lease is not renewed.
func TestRenewalAfterADeleteThatFailed(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		lease := e.lease("acme")
		e.storage.refuse("delete", tenantPrefix)
		_, status, _ := e.try(logical.DeleteOperation, "tenants/acme", nil)
		require.GreaterOrEqual(t, status, 500)
		e.storage.heal()
		e.engine.backend.revocations.wakeAll()
		time.Sleep(2 * time.Second)
		require.False(t, e.server.Alive(accessTokenOf(lease)))
		assert.False(t, renews(e, lease))
	})
}

// This node keeps an access token that storage has taken and reported an error for, and another node has leased it: the lease is renewed here.
func TestRenewalOfATokenThatIsKept(t *testing.T) {
	for name, c := range map[string]map[string]any{"A": classA, "D": classD} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, oauth2test.ClassA, c)
				e.add("acme", nil)
				e.waitForIndex()
				other := e.newStandby()
				e.storage.unheard("put", tenantPrefix)
				_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
				require.Equal(t, http.StatusServiceUnavailable, status)
				lease := other.lease("acme")
				assert.True(t, e.server.Alive(accessTokenOf(lease)))
				assert.True(t, renews(e, lease))
			})
		})
	}
}

// A reader of a tenant that was deleted does not wait for the exchange that is under way.
func TestReaderOfADeletedTenantDoesNotWait(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		e.server.Inject(oauth2test.Fault{Hold: true, Times: 1})
		go func() { _, _, _ = e.try(logical.ReadOperation, "creds/acme", nil) }()
		synctest.Wait()
		e.ok(logical.DeleteOperation, "tenants/acme", nil)
		begun := time.Now()
		_, status, text := e.try(logical.ReadOperation, "creds/acme", nil)
		assert.Equal(t, 400, status, text)
		assert.Zero(t, time.Since(begun))
		e.server.ClearFaults()
		synctest.Wait()
	})
}

// A verified write of the same refresh token is refused because of a patch that came meanwhile; its exchange has ended the access token, which
// no reader gets any more.
func TestRefusedWriteEndsTheAccessToken(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, func(o *oauth2test.Options) { oauth2test.ClassD(o); o.Rotation = oauth2test.RotateNever }, classD)
		token := e.server.Grant(e.clientID, "acme")
		e.write("tenants/acme", map[string]any{"refresh_token": token})
		e.read("token/acme")
		e.server.Inject(oauth2test.Fault{Delay: 2 * time.Second, Times: 1})
		done := make(chan int)
		go func() {
			_, status, _ := e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": token, "ttl": "2h"})
			done <- status
		}()
		synctest.Wait()
		e.ok(logical.PatchOperation, "tenants/acme", map[string]any{"max_ttl": "1h"})
		require.Equal(t, 400, <-done)
		assert.True(t, e.server.Alive(e.read("token/acme")["access_token"].(string)))
	})
}

// The same where storage does not take the verified write.
func TestUnstoredWriteEndsTheAccessToken(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, func(o *oauth2test.Options) { oauth2test.ClassD(o); o.Rotation = oauth2test.RotateNever }, classD)
		token := e.server.Grant(e.clientID, "acme")
		e.write("tenants/acme", map[string]any{"refresh_token": token})
		e.read("token/acme")
		e.storage.refuse("put", tenantPrefix)
		_, status, _ := e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": token})
		require.Equal(t, 503, status)
		e.storage.heal()
		assert.True(t, e.server.Alive(e.read("token/acme")["access_token"].(string)))
	})
}

// Storage cannot give the connector while the settings of a write whose refresh token was rotated are checked again: token_per_lease stays.
func TestTokenPerLeaseOutlivesAFailureOfStorage(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", map[string]any{"token_per_lease": true})
		e.server.Inject(oauth2test.Fault{Delay: 2 * time.Second, Times: 1})
		done := make(chan int)
		go func() {
			_, status, _ := e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": e.server.Grant(e.clientID, "acme"), "ttl": "2h"})
			done <- status
		}()
		synctest.Wait()
		e.ok(logical.PatchOperation, "tenants/acme", map[string]any{"max_ttl": "1h"})
		e.storage.refuse("put", connectorPrefix)
		_, status, _ := e.try(logical.UpdateOperation, "config", map[string]any{"exchanges_per_minute": 60})
		require.GreaterOrEqual(t, status, 500)
		e.storage.refuse("get", connectorPrefix)
		<-done
		e.storage.heal()
		assert.True(t, e.read("tenants/acme")["token_per_lease"].(bool))
	})
}

// The verification of a write that creates a tenant takes longer than a reader waits: the reader is told so, and not that there is no tenant.
func TestReaderOfASlowCreation(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.server.Inject(oauth2test.Fault{Delay: 12 * time.Second, Times: 1})
		go func() {
			_, _, _ = e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": e.server.Grant(e.clientID, "acme")})
		}()
		synctest.Wait()
		_, status, text := e.try(logical.ReadOperation, "creds/acme", nil)
		assert.Equal(t, 503, status, text)
		time.Sleep(5 * time.Second)
	})
}

// A reader of token gets an access token in its last second if no exchange is permitted.
func TestReaderNearTheEndWhileTheConnectorPauses(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, func(o *oauth2test.Options) { oauth2test.ClassA(o); o.AccessTokenLife = time.Minute }, classA)
		e.add("acme", map[string]any{"min_ttl": "30s"})
		e.add("other", nil)
		e.read("token/acme")
		e.server.Inject(oauth2test.Fault{Times: 1, Answer: oauth2test.TooManyRequests(2 * time.Minute)})
		_, _, _ = e.try(logical.ReadOperation, "creds/other", nil)
		_, v := e.tenants.cached("acme")
		time.Sleep(time.Until(v.until) - 500*time.Millisecond)
		e.read("creds/acme")
		e.read("token/acme")
	})
}

// An access token of one lease alone ends with its lease, whatever connector the tenant has been moved to: the lease is renewed.
func TestRenewalOfAnOwnTokenAfterAMove(t *testing.T) {
	for _, invalidates := range []bool{true, false} {
		bubble(t, func(t *testing.T) {
			e := newOAuthEngine(t, oauth2test.ClassA, classA)
			e.write("config/other", map[string]any{
				"service": "oauth2", "token_url": e.server.TokenURL(), "connector_id": e.clientID, "connector_secret": e.secret,
				"exchange_invalidates": invalidates,
			})
			e.add("acme", map[string]any{"token_per_lease": true})
			lease := e.lease("acme")
			e.write("tenants/acme", map[string]any{
				"refresh_token": e.server.Grant(e.clientID, "acme"), "connector": "other", "token_per_lease": false, "verify": false,
			})
			time.Sleep(2 * time.Second)
			require.True(t, e.server.Alive(accessTokenOf(lease)))
			assert.True(t, renews(e, lease), "exchange_invalidates: %t", invalidates)
		})
	}
}

func renews(e *oauthEngine, lease *logical.Response) bool {
	_, renewed := e.renewLease(lease, 0)
	return renewed
}
