package backend

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// Storage refuses the delete of a tenant, which then moves to another connector: its refresh token, or the one that replaces it there, is
// not revoked. That of a tenant which was deleted, although storage has reported an error, is revoked, also if the tenant is written anew.
func TestMoveAfterADeleteThatFailed(t *testing.T) {
	for name, c := range map[string]struct {
		unheard bool
		never   bool // the service does not replace refresh tokens
		data    func(*oauthEngine) map[string]any
		alive   bool
	}{
		"moved":    {data: func(*oauthEngine) map[string]any { return map[string]any{"connector": "other", "verify": false} }, alive: true},
		"verified": {never: true, data: func(*oauthEngine) map[string]any { return map[string]any{"connector": "other"} }, alive: true},
		"rotated":  {data: func(*oauthEngine) map[string]any { return map[string]any{"connector": "other"} }, alive: true},
		"deleted, anew": {unheard: true, data: func(e *oauthEngine) map[string]any {
			return map[string]any{"refresh_token": e.server.Grant(e.clientID, "acme"), "verify": false}
		}},
		"deleted, absent": {unheard: true},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, oauth2test.ClassA, revokeAll)
				if c.never {
					e.server.Set(func(o *oauth2test.Options) { o.Rotation = oauth2test.RotateNever })
				}
				e.write("config/other", map[string]any{
					"service": "oauth2", "token_url": e.server.TokenURL(), "revocation_url": e.server.RevocationURL(),
					"connector_id": e.clientID, "connector_secret": e.secret, "revocation": "access_token", "exchange_invalidates": false,
				})
				e.add("acme", nil)
				e.waitForIndex()
				token := e.held("acme")
				if c.unheard {
					e.storage.unheard("delete", tenantPrefix)
				} else {
					e.storage.refuse("delete", tenantPrefix)
				}
				_, status, _ := e.try(logical.DeleteOperation, "tenants/acme", nil)
				require.GreaterOrEqual(t, status, 500)
				e.storage.heal()
				if c.data != nil {
					e.write("tenants/acme", c.data(e))
				}
				e.pass(2 * time.Minute)
				if !c.alive {
					assert.False(t, e.server.RefreshTokenAlive(token))
					return
				}
				e.read("creds/acme")
				assert.True(t, e.server.RefreshTokenAlive(e.held("acme")))
				e.kept()
			})
		})
	}
}

// Storage refuses the delete of a tenant, and keeps the intent to revoke its refresh token. The service then replaces that, or the tenant
// moves, and the process ends: the next one does not revoke the refresh token, with which the service would end the whole grant. That of a
// tenant which was deleted is revoked.
func TestRestartAfterADeleteThatFailed(t *testing.T) {
	for name, c := range map[string]struct {
		then  func(*oauthEngine)
		alive bool
	}{
		"rotated": {func(e *oauthEngine) { e.write("tenants/acme/refresh", nil) }, true},
		"moved": {func(e *oauthEngine) {
			e.write("config/other", map[string]any{
				"service": "oauth2", "token_url": e.server.TokenURL(), "connector_id": e.clientID, "connector_secret": e.secret,
			})
			e.write("tenants/acme", map[string]any{"connector": "other", "verify": false})
		}, true},
		"deleted and written anew": {func(e *oauthEngine) {
			e.storage.refuse("delete", intentPrefix)
			e.revocationFails()
			e.ok(logical.DeleteOperation, "tenants/acme", nil)
			e.add("acme", nil)
			e.write("tenants/acme/refresh", nil)
		}, false},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, oauth2test.ClassD, map[string]any{"revoke_on_delete": true})
				e.add("acme", nil)
				e.waitForIndex()
				e.storage.refuse("delete", "")
				_, status, _ := e.try(logical.DeleteOperation, "tenants/acme", nil)
				require.GreaterOrEqual(t, status, 500)
				synctest.Wait()
				c.then(e)
				require.Contains(t, e.storedText(), intentPrefix)
				e.crash()
				e.storage.heal()
				e.server.ClearFaults()
				calls := len(e.revocations())
				e.waitForIndex()
				e.pass(2 * time.Minute)
				assert.Equal(t, c.alive, len(e.revocations()) == calls)
				assert.True(t, e.server.RefreshTokenAlive(e.held("acme")))
				assert.NotContains(t, e.storedText(), intentPrefix)
			})
		})
	}
}
