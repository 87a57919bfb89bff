package backend

import (
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// Storage has the intent of an access token, and refuses the write, the delete or the new token because of which the old one is given up.
// The old token is going to be revoked, so no reader gets it.
func TestReaderGetsNoTokenThatIsAboutToBeRevoked(t *testing.T) {
	for name, c := range map[string]struct {
		op     logical.Operation
		path   string
		data   func(*oauthEngine) map[string]any
		refuse func(op, key string) bool
	}{
		"write": {logical.UpdateOperation, "tenants/acme",
			func(e *oauthEngine) map[string]any {
				return map[string]any{"refresh_token": e.server.Grant(e.clientID, "acme"), "verify": false}
			},
			func(op, key string) bool { return op == "put" && strings.HasPrefix(key, tenantPrefix) }},
		"write whose older tokens cannot be listed": {logical.UpdateOperation, "tenants/acme",
			func(e *oauthEngine) map[string]any {
				return map[string]any{"refresh_token": e.server.Grant(e.clientID, "acme"), "verify": false}
			},
			func(op, key string) bool { return op == "list" && strings.HasPrefix(key, heldPrefix+"acme") }},
		"delete": {logical.DeleteOperation, "tenants/acme", func(*oauthEngine) map[string]any { return nil },
			func(op, key string) bool { return op == "delete" && strings.HasPrefix(key, tenantPrefix) }},
		"delete whose older tokens cannot be listed": {logical.DeleteOperation, "tenants/acme", func(*oauthEngine) map[string]any { return nil },
			func(op, key string) bool { return op == "list" && strings.HasPrefix(key, heldPrefix+"acme") }},
		"refresh": {logical.UpdateOperation, "tenants/acme/refresh", func(*oauthEngine) map[string]any { return nil },
			func(op, key string) bool { return op == "put" && strings.HasPrefix(key, tenantPrefix) }},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, oauth2test.ClassA, classA)
				e.add("acme", nil)
				e.lease("acme")
				e.storage.failWith(func(op, key string) error {
					if c.refuse(op, key) {
						return errStorage
					}
					return nil
				})
				e.storage.surround(func(op, key string, do func() error) error {
					if op == "get" && strings.HasPrefix(key, tenantPrefix) {
						time.Sleep(time.Second) // the revocation reads the tenant first
					}
					return do()
				})
				_, status, _ := e.try(c.op, c.path, c.data(e))
				require.GreaterOrEqual(t, status, 500)
				resp, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
				e.storage.heal()
				e.pass(2 * time.Minute)
				if status == http.StatusOK {
					assert.True(t, e.server.Alive(accessTokenOf(resp)))
				}
				assert.True(t, e.server.Alive(accessTokenOf(e.lease("acme"))))
				e.kept()
			})
		})
	}
}

// Storage takes no intent, so the revocation of a lease fails. Another token comes before Vault tries it again: the first one is revoked
// all the same.
func TestTokenIsRevokedThatIsReplacedBeforeItsRevocationIsRepeated(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		lease := e.lease("acme")
		e.storage.refuse("put", intentPrefix)
		require.Error(t, e.revokeLease(lease))
		e.storage.heal()
		next := e.lease("acme")
		e.revoke(lease)
		e.pass(time.Minute)
		assert.False(t, e.server.Alive(accessTokenOf(lease)))
		assert.True(t, e.server.Alive(accessTokenOf(next)))
		e.kept()
	})
}

// Storage takes no intent of the shared access token, and the tenant has had a token for one lease. A delete fails, or it has the shared
// token revoked.
func TestDeleteThatCannotGiveUpTheSharedToken(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", map[string]any{"token_per_lease": true})
		shared := e.read("token/acme")["access_token"].(string)
		e.lease("acme")
		e.storage.refuse("put", intentPrefix)
		_, status, _ := e.try(logical.DeleteOperation, "tenants/acme", nil)
		assert.GreaterOrEqual(t, status, 500)
		e.storage.heal()
		e.ok(logical.DeleteOperation, "tenants/acme", nil)
		e.pass(time.Minute)
		assert.False(t, e.server.Alive(shared))
	})
}

// A write is verified by an exchange, and storage does not take it. Readers still get the tenant's access token, without another exchange,
// if that exchange has not ended it: because the service does not do that, or because the exchange was of another refresh token.
func TestUnstoredVerificationLeavesAGoodTokenInUse(t *testing.T) {
	for name, c := range map[string]struct {
		class map[string]any
		data  func(*oauthEngine) map[string]any
	}{
		"the service does not end it": {classB, func(*oauthEngine) map[string]any { return map[string]any{"connector": "default"} }},
		"it is of another refresh token": {classD, func(e *oauthEngine) map[string]any {
			return map[string]any{"refresh_token": e.server.Grant(e.clientID, "other")}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, func(o *oauth2test.Options) {
					oauth2test.ClassA(o)
					o.Rotation, o.ExchangeInvalidates = oauth2test.RotateNever, c.class["exchange_invalidates"] == nil
				}, c.class)
				e.add("acme", nil)
				token := accessTokenOf(e.lease("acme"))
				e.failPuts()
				_, status, _ := e.try(logical.UpdateOperation, "tenants/acme", c.data(e))
				require.Equal(t, http.StatusServiceUnavailable, status)
				calls := len(e.server.Calls())
				e.storage.heal()
				assert.Equal(t, token, accessTokenOf(e.lease("acme")))
				assert.True(t, e.server.Alive(token))
				assert.Len(t, e.server.Calls(), calls)
				assert.NotContains(t, e.read("config"), "pending_revocations", "the connector revokes nothing")
			})
		})
	}
}

// A write is verified by an exchange that ends the tenant's access token, and storage does not take the write. The next process does not
// hand out the ended token either.
func TestTokenThatAnUnstoredVerificationEndedLeavesStorage(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, func(o *oauth2test.Options) { oauth2test.ClassD(o); o.Rotation = oauth2test.RotateNever }, classD)
		e.add("acme", nil)
		token := accessTokenOf(e.lease("acme"))
		e.failPuts()
		_, status, _ := e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"connector": "default"})
		require.Equal(t, http.StatusServiceUnavailable, status)
		require.False(t, e.server.Alive(token))
		e.storage.heal()
		e.pass(2 * time.Minute)
		e.crash()
		assert.True(t, e.server.Alive(accessTokenOf(e.lease("acme"))))
	})
}

// A write is verified by an exchange that ends the tenant's access token, and does not go with what was written meanwhile. The next process
// does not hand out the ended token.
func TestTokenThatARefusedVerificationEndedLeavesStorage(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, func(o *oauth2test.Options) { oauth2test.ClassD(o); o.Rotation = oauth2test.RotateNever }, classD)
		e.add("acme", nil)
		token := accessTokenOf(e.lease("acme"))
		e.server.Inject(oauth2test.Fault{Delay: 2 * time.Second, Times: 1})
		done := make(chan int)
		go func() {
			_, status, _ := e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"connector": "default", "ttl": "2h"})
			done <- status
		}()
		time.Sleep(time.Second)
		e.write("tenants/acme", map[string]any{"max_ttl": "1h"})
		require.Equal(t, http.StatusBadRequest, <-done)
		require.False(t, e.server.Alive(token))
		e.pass(2 * time.Minute)
		e.crash()
		assert.True(t, e.server.Alive(accessTokenOf(e.lease("acme"))))
	})
}

// A verification cannot be stored, and memory has lost its connector meanwhile, because another node has written that: the writer is told,
// and the tenant works on.
func TestUnstoredVerificationWhoseConnectorLeftMemory(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, func(o *oauth2test.Options) { oauth2test.ClassA(o); o.Rotation = oauth2test.RotateNever }, classA)
		e.add("acme", nil)
		e.storage.failWith(func(op, key string) error {
			if op == "put" && strings.HasPrefix(key, tenantPrefix) {
				e.connectors.invalidate(connectorPrefix + defaultConnector)
				return errStorage
			}
			return nil
		})
		_, status, _ := e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": e.server.Grant(e.clientID, "acme")})
		assert.Equal(t, http.StatusServiceUnavailable, status)
		e.storage.heal()
		assert.True(t, e.server.Alive(accessTokenOf(e.lease("acme"))))
	})
}

// The connector of a tenant is gone from storage, and storage refuses the tenant's delete, which is repeated then.
func TestRefusedDeleteOfATenantWithoutAConnector(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		e.lease("acme")
		require.NoError(t, e.storage.InmemStorage.Delete(t.Context(), connectorPrefix+defaultConnector))
		e.connectors.invalidate(connectorPrefix + defaultConnector)
		e.storage.refuse("delete", tenantPrefix)
		_, status, _ := e.try(logical.DeleteOperation, "tenants/acme", nil)
		assert.GreaterOrEqual(t, status, 500)
		e.storage.heal()
		e.ok(logical.DeleteOperation, "tenants/acme", nil)
		assert.Nil(t, e.stored("acme"))
	})
}

// Storage does not take the record of an access token that has leases and that a newer one replaces. The newer token waits for that, so
// that the older one is revoked with its last lease.
func TestNewTokenWaitsForTheRecordOfTheOlderOne(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		lease := e.lease("acme")
		e.storage.refuse("put", heldPrefix)
		e.pass(50 * time.Minute)
		assert.Equal(t, accessTokenOf(lease), e.stored("acme").Access.Token)
		// A write of another refresh token does not need what waits.
		e.write("tenants/acme", map[string]any{"refresh_token": e.server.Grant(e.clientID, "acme"), "verify": false})
		e.storage.heal()
		e.pass(time.Minute)
		assert.Empty(t, e.server.AccessTokens("acme"))
	})
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		lease := e.lease("acme")
		e.storage.refuse("put", heldPrefix)
		e.pass(50 * time.Minute)
		e.storage.heal()
		e.pass(2 * time.Minute)
		assert.NotEqual(t, accessTokenOf(lease), e.read("token/acme")["access_token"])
		e.crash()
		e.revoke(lease)
		assert.False(t, e.server.Alive(accessTokenOf(lease)))
		e.kept()
	})
}

// An access token without leases leaves no record in storage when a newer one replaces it.
func TestTokenWithoutLeasesLeavesNoRecord(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		old := e.read("token/acme")["access_token"]
		e.pass(50 * time.Minute)
		require.NotEqual(t, old, e.read("token/acme")["access_token"])
		held, err := e.storage.List(t.Context(), heldPrefix)
		require.NoError(t, err)
		assert.Empty(t, held)
	})
}

// The service rejects the refresh token when an operator refreshes the tenant. The access token is good still: readers get it until its end.
func TestRejectedRefreshLeavesTheTokenInUse(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		token := accessTokenOf(e.lease("acme"))
		e.server.Inject(oauth2test.Fault{Answer: oauth2test.InvalidGrant})
		_, status, _ := e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
		require.Equal(t, http.StatusBadRequest, status)
		e.pass(time.Minute)
		assert.Equal(t, statusRejected, e.status("acme"))
		assert.Equal(t, token, accessTokenOf(e.lease("acme")))
		assert.True(t, e.server.Alive(token))
	})
}

// An exchange for one lease's own token leaves the shared token as it is: no record of that comes into storage.
func TestOwnTokenLeavesTheSharedOneAlone(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		shared := e.lease("acme")
		e.write("tenants/acme", map[string]any{"token_per_lease": true})
		own := e.lease("acme")
		held, err := e.storage.List(t.Context(), heldPrefix+"acme/")
		require.NoError(t, err)
		assert.Equal(t, []string{own.Secret.InternalData[leaseGeneration].(string)}, held)
		e.revoke(own)
		assert.True(t, e.server.Alive(accessTokenOf(shared)))
		e.kept()
	})
}

// A tenant is deleted during an exchange that brings no new refresh token. What is revoked is the one that it had.
func TestDeleteDuringAnExchangeWithoutANewRefreshToken(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, func(o *oauth2test.Options) { oauth2test.ClassA(o); o.Rotation = oauth2test.RotateNever }, revokeAll)
		e.add("acme", nil)
		token := e.held("acme")
		e.server.Inject(oauth2test.Fault{Delay: 2 * time.Second, Times: 1})
		e.ask(logical.ReadOperation, "creds/acme", nil)
		e.ok(logical.DeleteOperation, "tenants/acme", nil)
		e.pass(2 * time.Minute)
		assert.False(t, e.server.RefreshTokenAlive(token))
		for _, c := range e.revocations() {
			assert.NotEmpty(t, c.Token)
		}
	})
}
