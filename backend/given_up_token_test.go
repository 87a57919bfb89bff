package backend

import (
	"fmt"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// refusedRevocation returns the last lease of the access token of a new tenant acme. It was revoked while storage refused what is below a prefix.
func (e *oauthEngine) refusedRevocation(prefix string) *logical.Response {
	e.t.Helper()
	e.add("acme", nil)
	e.waitForIndex()
	lease := e.lease("acme")
	e.storage.refuse("put", prefix)
	require.Error(e.t, e.revokeLease(lease))
	return lease
}

// The last lease of an access token is revoked while storage takes the token's intent and refuses the tenant's entry. No reader gets the
// token again after storage has healed: not after a restart, nor after an eviction.
func TestGivenUpAccessTokenStaysGivenUpAfterARefusedWrite(t *testing.T) {
	for name, again := range map[string]func(e *oauthEngine){
		"restart":  func(e *oauthEngine) { e.restart(); e.waitForIndex() },
		"eviction": func(e *oauthEngine) { e.tenants.loaded.Purge() },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, oauth2test.ClassA, classA)
				lease := e.refusedRevocation(tenantPrefix)
				e.read("tenants/acme")
				e.storage.heal()
				require.NoError(t, e.revokeLease(lease), "Vault tries again")
				assert.Nil(t, e.stored("acme").Access)
				e.pass(2 * time.Minute)
				require.False(t, e.server.Alive(accessTokenOf(lease)))
				again(e)
				assert.NotEqual(t, accessTokenOf(lease), accessTokenOf(e.lease("acme")))
				e.kept()
			})
		})
	}
}

// A delete, and then a write, give an access token up and are refused by storage. The token is taken out of storage before it is revoked,
// so no reader gets it afterwards.
func TestGivenUpAccessTokenStaysGivenUpAfterTwoRefusedWrites(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		e.waitForIndex()
		token := accessTokenOf(e.lease("acme"))
		e.storage.failWith(func(op, key string) error {
			if (op == "put" || op == "delete") && key == tenantPrefix+"acme" {
				return errStorage
			}
			return nil
		})
		_, status, _ := e.try(logical.DeleteOperation, "tenants/acme", nil)
		require.Equal(t, 500, status)
		require.Equal(t, 500, e.rewrite("acme", e.server.Grant(e.clientID, "acme"), false))
		e.storage.heal()
		e.pass(2 * time.Minute)
		require.False(t, e.server.Alive(token))
		assert.NotEqual(t, token, accessTokenOf(e.lease("acme")))
		e.kept()
	})
}

// Storage refuses to take an access token out of the tenant's entry, and the engine tries again a minute later. Another node deletes the
// tenant meanwhile: there is nothing left to do, and the engine goes on.
func TestTenantIsDeletedWhileItsTokenIsGivenUpAgain(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		lease := e.refusedRevocation(tenantPrefix)
		e.read("tenants/acme")
		e.connectors.invalidate(connectorPrefix + defaultConnector)
		deleted := e.storage.once("get", connectorPrefix, func() {
			require.NoError(t, e.storage.InmemStorage.Delete(t.Context(), tenantPrefix+"acme"))
			e.InvalidateKey(t.Context(), tenantPrefix+"acme")
		})
		e.attend("acme")
		require.True(t, deleted())
		e.storage.heal()
		e.pass(2 * time.Minute)
		assert.Nil(t, e.stored("acme"))
		assert.False(t, e.server.Alive(accessTokenOf(lease)))
	})
}

// The process ends after it has stored an access token's intent and before it has stored the tenant's entry without the token. No reader of
// the next process gets the token, also where storage refuses to take it out of the entry; when storage works again, it is revoked.
func TestNextProcessHandsOutNoTokenWithAnIntent(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		lease := e.refusedRevocation(tenantPrefix)
		e.crash()
		e.failPuts()
		e.waitForIndex()
		resp, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
		if status == 200 {
			assert.NotEqual(t, accessTokenOf(lease), accessTokenOf(resp))
		}
		assert.True(t, e.server.Alive(accessTokenOf(lease)), "it is revoked once storage does not have it")
		e.storage.heal()
		e.pass(2 * time.Minute)
		assert.False(t, e.server.Alive(accessTokenOf(lease)))
		assert.NotEqual(t, accessTokenOf(lease), accessTokenOf(e.lease("acme")))
		e.kept()
	})
}

// The last lease of an access token is revoked while storage refuses writes. Once storage takes them, the token leaves the tenant's entry,
// whatever requests come again and again meanwhile.
func TestGivenUpTokenLeavesStorage(t *testing.T) {
	for name, do := range map[string]func(e *oauthEngine, i int){
		"nothing":  func(*oauthEngine, int) {},
		"settings": func(e *oauthEngine, i int) { e.write("tenants/acme", map[string]any{"ttl": fmt.Sprint(100+i, "s")}) },
		"connector": func(e *oauthEngine, i int) {
			e.write("config", map[string]any{"request_timeout": fmt.Sprint(20+i%10, "s")})
		},
		"status":  func(e *oauthEngine, i int) { e.read("tenants/acme") },
		"evicted": func(e *oauthEngine, i int) { e.tenants.loaded.Purge(); e.read("tenants/acme") },
		"list":    func(e *oauthEngine, i int) { e.ok(logical.ListOperation, "tenants/", nil) },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, oauth2test.ClassA, classA)
				e.refusedRevocation("")
				e.read("tenants/acme")
				e.storage.heal()
				for i := range 10 {
					e.pass(30 * time.Second)
					do(e, i)
				}
				assert.Nil(t, e.stored("acme").Access)
			})
		})
	}
}
