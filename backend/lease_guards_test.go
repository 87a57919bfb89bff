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

// renewStatus renews a lease, and returns the status and the text of the answer.
func (e *oauthEngine) renewStatus(lease *logical.Response) (int, string) {
	resp, err := e.HandleRequest(e.t.Context(), &logical.Request{Operation: logical.RenewOperation, Secret: lease.Secret, Storage: e.storage})
	return statusOf(logical.RenewOperation, resp, err)
}

// Storage cannot say what has become of a lease's access token. The renewal fails as a fault of the server: a 400 would tell the client that
// the lease is over, and a new end would promise a token that may have ended.
func TestRenewalWhileStorageFails(t *testing.T) {
	for name, c := range map[string]struct {
		tenant map[string]any
		prefix string
	}{
		"the tenant":                      {nil, tenantPrefix},
		"the record of a token":           {nil, heldPrefix},
		"the connector":                   {nil, connectorPrefix},
		"the record of a lease's own one": {map[string]any{"token_per_lease": true}, heldPrefix},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, oauth2test.ClassA, classA)
				e.add("acme", c.tenant)
				lease := e.lease("acme")
				if c.tenant == nil {
					e.pass(50 * time.Minute)
					e.read("token/acme") // another access token by now
				}
				e.restart()
				e.waitForIndex()
				e.tenants.loaded.Purge()
				e.connectors.invalidate(connectorPrefix + defaultConnector)
				e.storage.refuse("get", c.prefix)
				status, text := e.renewStatus(lease)
				assert.GreaterOrEqual(t, status, http.StatusInternalServerError, text)
				e.storage.heal()
				status, text = e.renewStatus(lease)
				assert.Less(t, status, http.StatusBadRequest, text)
			})
		})
	}
}

// An access token of before lives on, with a lease, while the tenant's present one was given up and storage has not taken the next one:
// the lease is renewed.
func TestRenewalWhileTheNextTokenIsUnstored(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		lease := e.lease("acme")
		e.pass(50 * time.Minute)
		e.revoke(e.lease("acme"))
		require.Nil(t, e.stored("acme").Access)
		e.failPuts()
		_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
		require.Equal(t, http.StatusServiceUnavailable, status)
		status, text := e.renewStatus(lease)
		assert.Less(t, status, http.StatusBadRequest, text)
		e.storage.heal()
	})
}

// Storage takes the access token of an exchange and reports an error. An exchange ends older access tokens: a lease on the one before the
// last is not renewed.
func TestRenewalOfAnEndedTokenWhileTheNextOneIsInDoubt(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassD, nil)
		e.add("acme", nil)
		lease := e.lease("acme")
		e.write("tenants/acme/refresh", nil)
		e.storage.unheard("put", tenantPrefix)
		_, status, _ := e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
		require.Equal(t, http.StatusServiceUnavailable, status)
		require.False(t, e.server.Alive(accessTokenOf(lease)))
		status, _ = e.renewStatus(lease)
		assert.Equal(t, http.StatusBadRequest, status)
		e.storage.heal()
	})
}

// A tenant's entry cannot be read. The end of the last lease on an older access token still revokes that token.
func TestUnreadableTenantsOlderTokenIsRevoked(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		lease := e.lease("acme")
		e.pass(50 * time.Minute)
		require.NotEqual(t, accessTokenOf(lease), e.read("token/acme")["access_token"])
		e.stop()
		e.put(tenantPrefix+"acme", []byte("{"))
		e.start()
		e.revoke(lease)
		synctest.Wait()
		assert.False(t, e.server.Alive(accessTokenOf(lease)))
	})
}

// Vault revokes a lease on a standby although the tenant is gone: the record of its access token, which only the active node can delete,
// fails nothing.
func TestStandbyRevokesALeaseOfADeletedTenant(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		lease := e.lease("acme")
		e.pass(50 * time.Minute)
		e.read("token/acme")
		record := heldPrefix + "acme/" + lease.Secret.InternalData[leaseGeneration].(string)
		kept := e.get(record)
		require.NotEmpty(t, kept)
		e.ok(logical.DeleteOperation, "tenants/acme", nil)
		synctest.Wait()
		e.put(record, []byte(kept))
		standby := e.newStandby()
		require.Nil(t, standby.tenants.named("acme"))
		assert.NoError(t, standby.revokeLease(lease))
	})
}
