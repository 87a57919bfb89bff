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

// Storage has not taken the tokens of a verification that creates a tenant, and refuses a delete of the tenant, too. The tokens are stored
// later, because the delete has failed: the refresh token among them is not revoked. A delete that succeeds has it revoked.
func TestRefusedDeleteOfATenantThatIsNotStoredYet(t *testing.T) {
	for _, again := range []bool{false, true} {
		bubble(t, func(t *testing.T) {
			e := newOAuthEngine(t, oauth2test.ClassD, map[string]any{"revoke_on_delete": true})
			e.waitForIndex()
			e.storage.failWith(func(op, key string) error {
				if (op == "put" || op == "delete") && strings.HasPrefix(key, tenantPrefix) {
					return errStorage
				}
				return nil
			})
			require.Equal(t, http.StatusServiceUnavailable, e.rewrite("acme", e.server.Grant(e.clientID, "acme"), true))
			token := e.held("acme")
			_, status, text := e.try(logical.DeleteOperation, "tenants/acme", nil)
			require.Equal(t, http.StatusInternalServerError, status, text)
			if again {
				e.storage.refuse("put", tenantPrefix)
				e.ok(logical.DeleteOperation, "tenants/acme", nil)
				e.storage.heal()
				e.pass(2 * time.Minute)
				assert.False(t, e.server.RefreshTokenAlive(token))
				assert.Nil(t, e.stored("acme"))
				return
			}
			time.Sleep(5 * time.Second)
			e.storage.heal()
			e.pass(2 * time.Minute)
			require.NotNil(t, e.stored("acme"))
			assert.True(t, e.server.RefreshTokenAlive(token))
			e.write("tenants/acme/refresh", nil)
			assert.Equal(t, statusOK, e.status("acme"))
			e.kept()
		})
	}
}

// Storage has deleted a tenant and reports an error. Once the tenant's refresh token is revoked, and its access token with it, no reader
// gets that.
func TestReaderAfterADeleteThatStorageDidUnheard(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassD, map[string]any{"revoke_on_delete": true})
		e.add("acme", nil)
		e.add("other", nil)
		e.waitForIndex()
		token := accessTokenOf(e.lease("acme"))
		e.storage.unheard("delete", tenantPrefix)
		_, status, _ := e.try(logical.DeleteOperation, "tenants/acme", nil)
		require.Equal(t, http.StatusInternalServerError, status)
		e.storage.heal()
		e.write("tenants/other/refresh", nil) // which wakes the worker
		time.Sleep(5 * time.Second)
		require.False(t, e.server.Alive(token))
		_, status, text := e.try(logical.ReadOperation, "creds/acme", nil)
		assert.Equal(t, http.StatusBadRequest, status, text)
	})
}
