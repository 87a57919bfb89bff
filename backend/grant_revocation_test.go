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

// newEngineWithRevocationOfAGrantedToken starts an engine with a service that gives the same refresh token with each grant. A tenant with that
// token has been deleted, and the token waits for its revocation. bare: the service gives no access token for a code.
func newEngineWithRevocationOfAGrantedToken(t *testing.T, bare bool) (e *grantEngine, token string) {
	e = newGrantEngine(t, func(o *oauth2test.Options) {
		oauth2test.ClassA(o)
		o.Rotation = oauth2test.RotateNever
		exchanges := 0
		o.Edit = func(at oauth2test.Endpoint, fields map[string]any) {
			if at != oauth2test.EndpointToken || token == "" {
				return
			}
			fields["refresh_token"] = token
			if exchanges++; bare && exchanges == 1 {
				delete(fields, "access_token")
			}
		}
	})
	e.write("config/as", map[string]any{"revoke_on_delete": true})
	token = e.server.Grant(e.clientID, "jane")
	e.write("tenants/acme", map[string]any{"connector": "as", "refresh_token": token, "verify": false})
	e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointRevocation, Answer: oauth2test.BadGateway, Times: 1})
	e.ok(logical.DeleteOperation, "tenants/acme", nil)
	synctest.Wait()
	require.Len(t, e.server.Calls(oauth2test.EndpointRevocation), 1)
	return e, token
}

// A grant brings a refresh token that waits for its revocation, and storage takes neither the end of the revocation nor the grant for a
// while: the token is not revoked.
func TestKeptGrantSparesItsRefreshToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, token := newEngineWithRevocationOfAGrantedToken(t, false)
		e.storage.refuse("delete", intentPrefix)
		e.confirm(e.authorize(nil))
		require.Equal(t, attemptPending, e.attemptStatus(byCode))
		time.Sleep(40 * time.Second)
		assert.True(t, e.server.RefreshTokenAlive(token))
		e.storage.heal()
		e.pass(2 * time.Minute)
		assert.Equal(t, attemptGranted, e.attemptStatus(byCode))
		assert.True(t, e.server.RefreshTokenAlive(token))
		assert.NotContains(t, e.storedText(), intentPrefix)
	})
}

// A grant brings a refresh token that waits for its revocation: no call to revoke it is made while the service is asked for an access token.
func TestGrantIsVerifiedBesideTheRevocationOfItsRefreshToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, token := newEngineWithRevocationOfAGrantedToken(t, true)
		back := e.authorize(nil)
		_, form := e.open(back).form()
		e.server.Inject(oauth2test.Fault{Times: 1})
		e.server.Inject(oauth2test.Fault{Delay: 4 * time.Second, Times: 1})
		_, _, _ = e.ask(logical.UpdateOperation, "callback", form)
		e.pass(2 * time.Minute)
		assert.Equal(t, attemptGranted, e.attemptStatus(byCode))
		assert.Len(t, e.server.Calls(oauth2test.EndpointRevocation), 1)
		assert.True(t, e.server.RefreshTokenAlive(token))
		assert.NotContains(t, e.storedText(), intentPrefix)
	})
}

// A grant brings a refresh token while the call that revokes it is under way: the grant waits for the end of that, so that the exchange for an
// access token shows that the service has revoked the refresh token.
func TestGrantWhileItsRefreshTokenIsBeingRevoked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, token := newEngineWithRevocationOfAGrantedToken(t, true)
		back := e.authorize(nil)
		_, form := e.open(back).form()
		e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointRevocation, Delay: 3 * time.Second, Times: 1})
		time.Sleep(2 * time.Second)
		_, _, _ = e.ask(logical.UpdateOperation, "callback", form)
		e.pass(2 * time.Minute)
		assert.False(t, e.server.RefreshTokenAlive(token))
		assert.Equal(t, attemptFailed, e.attemptStatus(byCode))
		assert.Nil(t, e.stored("acme"))
	})
}
