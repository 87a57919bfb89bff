package backend

import (
	"context"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// The connector is told that an exchange ends older access tokens. A tenant is read again while storage cannot give the connector's calls:
// a lease on its access token ends before the planned exchange all the same.
func TestLeaseIsBoundWhereCallsCannotBeRead(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassD, classB)
		e.add("acme", nil)
		e.lease("acme")
		e.write("config", map[string]any{"exchange_invalidates": true})
		synctest.Wait()
		e.tenants.loaded.Purge()
		stored := *e.stored("acme")
		access := *stored.Access
		access.Planned = time.Time{} // as where storage did not take the plan
		stored.Access = &access
		assert.NoError(t, putEntry(context.Background(), e.storage.InmemStorage, tenantPrefix+"acme", &stored))
		e.InvalidateKey(context.Background(), tenantPrefix+"acme")
		e.InvalidateKey(context.Background(), callPrefix+defaultConnector+"/0")
		e.storage.refuse("list", callPrefix)
		resp, status, text := e.try(logical.ReadOperation, "creds/acme", nil)
		assert.Equal(t, http.StatusOK, status, text)
		e.storage.heal()
		assert.Less(t, resp.Secret.MaxTTL, 55*time.Minute)
	})
}

// The answer to an exchange comes while storage cannot give the connector's calls: a lease on the new access token ends before the exchange
// that ends the token all the same.
func TestNewTokenIsPlannedWhereCallsCannotBeRead(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassD, classD)
		e.add("acme", nil)
		e.server.Inject(oauth2test.Fault{Delay: time.Second, Times: 1})
		go func() {
			time.Sleep(time.Second / 2)
			e.InvalidateKey(context.Background(), callPrefix+defaultConnector+"/0")
			e.storage.refuse("list", callPrefix)
		}()
		resp, status, text := e.try(logical.ReadOperation, "creds/acme", nil)
		assert.Equal(t, http.StatusOK, status, text)
		e.storage.heal()
		if assert.NotNil(t, resp) {
			assert.Less(t, resp.Secret.MaxTTL, 55*time.Minute)
			e.pass(resp.Secret.MaxTTL - time.Minute)
			status, text := e.renewStatus(resp)
			assert.True(t, e.server.Alive(accessTokenOf(resp)), "the lease's token has ended before the lease: %d %s", status, text)
		}
	})
}
