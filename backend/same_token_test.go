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

// newSameTokenEngine starts an engine whose service gives the same access token again while that lives, as some do.
func newSameTokenEngine(t *testing.T) *oauthEngine {
	first := ""
	e := newOAuthEngine(t, func(o *oauth2test.Options) {
		oauth2test.ClassA(o)
		o.AccessTokenLife = 3 * time.Hour
		o.Edit = func(p oauth2test.Endpoint, fields map[string]any) {
			if p != oauth2test.EndpointToken {
				return
			}
			if first == "" {
				first = fields["access_token"].(string)
			}
			fields["access_token"], fields["expires_in"] = first, 3600
		}
	}, classA)
	e.add("acme", nil)
	return e
}

// The service gives the access token again that the tenant has: what replaces the older one does not revoke it.
func TestServiceGivesTheSameAccessTokenAgain(t *testing.T) {
	for name, exchange := range map[string]func(*oauthEngine){
		"refresh": func(e *oauthEngine) { e.write("tenants/acme/refresh", nil) },
		"refresh that joins an exchange": func(e *oauthEngine) {
			e.server.Inject(oauth2test.Fault{Delay: 2 * time.Second, Times: 1})
			e.exchangeUnasked(e.tenants.named("acme"))
			e.write("tenants/acme/refresh", nil)
		},
		"rewrite": func(e *oauthEngine) {
			require.Equal(e.t, http.StatusNoContent, e.rewrite("acme", e.held("acme"), true))
		},
		"renewal": func(e *oauthEngine) { e.pass(50 * time.Minute) },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newSameTokenEngine(t)
				e.read("token/acme")
				exchanges := e.server.TotalExchanges()
				exchange(e)
				time.Sleep(10 * time.Second)
				assert.Greater(t, e.server.TotalExchanges(), exchanges)
				assert.Empty(t, e.revocations())
				assert.True(t, e.server.Alive(e.read("token/acme")["access_token"].(string)))
			})
		})
	}
}

// Leases of before and after such an exchange are on one access token. The end of the last one of before leaves it to the others; the
// early end of one of after gives it up, because how many there are of before is not known.
func TestLeasesOnTheSameAccessTokenAgain(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newSameTokenEngine(t)
		before := e.lease("acme")
		e.pass(50 * time.Minute)
		require.Equal(t, 2, e.server.TotalExchanges())
		after, other := e.lease("acme"), e.lease("acme")
		e.revoke(before)
		synctest.Wait()
		assert.True(t, e.server.Alive(accessTokenOf(other)))
		e.revoke(after)
		synctest.Wait()
		assert.False(t, e.server.Alive(accessTokenOf(other)))
	})
}

// The service gives the same access token again, with a new refresh token, and storage takes neither. The last lease of before ends early
// once storage works again, before the tokens are stored: the new refresh token is stored.
func TestLeaseOfBeforeEndsWhileTheSameAccessTokenIsKept(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newSameTokenEngine(t)
		before := e.lease("acme")
		e.failPuts()
		_, status, _ := e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
		require.Equal(t, http.StatusServiceUnavailable, status)
		e.storage.heal()
		require.NotEqual(t, e.server.CurrentRefreshToken("acme"), e.stored("acme").RefreshToken)
		e.revoke(before)
		assert.Equal(t, e.server.CurrentRefreshToken("acme"), e.stored("acme").RefreshToken)
		e.pass(2 * time.Minute)
		assert.Equal(t, statusOK, e.status("acme"))
		assert.Empty(t, e.server.LostGrants())
	})
}
