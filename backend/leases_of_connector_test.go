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

// newEngineWithOwnTokenLease starts an engine with a lease that has an access token of its own, at a connector that no tenant uses any more.
func newEngineWithOwnTokenLease(t testing.TB, leave func(*oauthEngine)) (*oauthEngine, *logical.Response) {
	e := newOAuthEngine(t, oauth2test.ClassA, classA)
	e.waitForIndex()
	e.write("config/other", map[string]any{
		"service": "oauth2", "token_url": e.server.TokenURL(), "revocation_url": e.server.RevocationURL(),
		"connector_id": e.clientID, "connector_secret": e.secret, "revocation": "access_token", "exchange_invalidates": false,
	})
	e.add("acme", map[string]any{"token_per_lease": true})
	lease := e.lease("acme")
	leave(e)
	return e, lease
}

func deletesAcme(e *oauthEngine) { e.ok(logical.DeleteOperation, "tenants/acme", nil) }

// A lease that has an access token of its own outlives its tenant. Its connector is neither deleted nor given another connector_id or
// service while the token lives, so the end of the lease revokes the token.
func TestConnectorOfALeaseWithItsOwnTokenStays(t *testing.T) {
	for name, leave := range map[string]func(*oauthEngine){
		"the tenant is deleted":                         deletesAcme,
		"the tenant moves":                              func(e *oauthEngine) { e.write("tenants/acme", map[string]any{"connector": "other"}) },
		"the tenant is deleted, and the engine crashes": func(e *oauthEngine) { deletesAcme(e); e.crash(); e.waitForIndex() },
		"another node has given the lease":              func(e *oauthEngine) { deletesAcme(e); e.InvalidateKey(e.t.Context(), heldPrefix+"acme/x") },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e, lease := newEngineWithOwnTokenLease(t, leave)
				for refusal, ask := range map[string]func() (*logical.Response, int, string){
					"it is not deleted":               func() (*logical.Response, int, string) { return e.try(logical.DeleteOperation, "config", nil) },
					"its connector_id is not changed": func() (*logical.Response, int, string) { return e.configure(map[string]any{"connector_id": "x"}) },
					"its service is not changed": func() (*logical.Response, int, string) {
						return e.configure(map[string]any{"service": "kaizala"})
					},
				} {
					_, status, text := ask()
					assert.Equal(t, http.StatusBadRequest, status, refusal)
					assert.Equal(t, `connector "default" has leases of 1 tenant whose access tokens are revoked with them, so `+refusal+
						`: revoke these leases (such as vault lease revoke -prefix kaizala/creds/acme), or wait until `+lease.Data["expire_time"].(string)+` (acme)`, text)
				}
				e.write("config", map[string]any{"connector_secret": e.secret})
				if e.stored("acme") == nil {
					e.ok(logical.DeleteOperation, "config/other", nil)
				}
				e.revoke(lease)
				synctest.Wait()
				assert.False(t, e.server.Alive(accessTokenOf(lease)))
				e.ok(logical.DeleteOperation, "config", nil)
				e.kept()
			})
		})
	}
}

func (e *oauthEngine) configure(data map[string]any) (*logical.Response, int, string) {
	return e.try(logical.UpdateOperation, "config", data)
}

// The connector can be deleted once the access token has ended, also where no lease was ever registered for it, and in spite of a record
// that cannot be read.
func TestConnectorIsDeletedAfterTheLastTokenOfItsLeases(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e, lease := newEngineWithOwnTokenLease(t, deletesAcme)
		e.put(heldPrefix+"acme/x", []byte("{"))
		e.InvalidateKey(t.Context(), heldPrefix+"acme/x")
		end, err := time.Parse(time.RFC3339Nano, lease.Data["expire_time"].(string))
		require.NoError(t, err)
		time.Sleep(time.Until(end) - time.Millisecond)
		_, status, _ := e.try(logical.DeleteOperation, "config", nil)
		assert.Equal(t, http.StatusBadRequest, status)
		time.Sleep(time.Millisecond)
		e.ok(logical.DeleteOperation, "config", nil)
	})
}

// Storage does not give the records of leases: the connector is not deleted.
func TestConnectorStaysWhileRecordsOfLeasesAreUnknown(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e, lease := newEngineWithOwnTokenLease(t, deletesAcme)
		e.InvalidateKey(t.Context(), heldPrefix+"acme/x")
		e.storage.refuse("get", heldPrefix)
		_, status, _ := e.try(logical.DeleteOperation, "config", nil)
		assert.Equal(t, http.StatusInternalServerError, status)
		e.storage.heal()
		e.revoke(lease)
		synctest.Wait()
		assert.False(t, e.server.Alive(accessTokenOf(lease)))
	})
}
