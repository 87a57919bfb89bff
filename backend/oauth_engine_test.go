package backend

import (
	"context"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// oauthEngine is an engine whose default connector is for an authorization server in process.
type oauthEngine struct {
	*engine
	server   *oauth2test.Server
	clientID string
	secret   string
}

// newOAuthEngine starts an engine and a server with these options. The connector has these fields beside the usual ones; a field that
// is nil is left out.
func newOAuthEngine(t testing.TB, options func(*oauth2test.Options), fields map[string]any) *oauthEngine {
	server := oauth2test.New()
	server.Set(options)
	e := &oauthEngine{server: server}
	e.clientID, e.secret = server.RegisterClient(oauth2test.AuthBasic)
	e.engine = newEngine(t)
	e.stop()
	e.wire = func() http.RoundTripper { return server.Transport() }
	e.start()
	t.Cleanup(server.ClearFaults)
	config := map[string]any{
		"service": "oauth2", "token_url": server.TokenURL(), "revocation_url": server.RevocationURL(),
		"connector_id": e.clientID, "connector_secret": e.secret, "exchanges_per_minute": 60_000,
	}
	for name, value := range fields {
		config[name] = value
		if value == nil {
			delete(config, name)
		}
	}
	e.write("config", config)
	return e
}

// The fields of connectors for the classes of OAUTH.md.
var (
	classA = map[string]any{"revocation": "access_token", "exchange_invalidates": false}
	classB = map[string]any{"exchange_invalidates": false}
	classD = map[string]any{}
)

// add creates a tenant for a user of that name.
func (e *oauthEngine) add(name string, fields map[string]any) {
	e.t.Helper()
	data := map[string]any{"refresh_token": e.server.Grant(e.clientID, name), "verify": false}
	for field, value := range fields {
		data[field] = value
	}
	e.write("tenants/"+name, data)
}

func (e *oauthEngine) revoke(leases ...*logical.Response) {
	e.t.Helper()
	for _, lease := range leases {
		require.NoError(e.t, e.revokeLease(lease))
	}
}

func (e *oauthEngine) revocations() []oauth2test.Call {
	return e.server.Calls(oauth2test.EndpointRevocation)
}

// kept asserts that no grant was lost, no refresh token was used twice, and no expired token was sent.
func (e *oauthEngine) kept() {
	e.t.Helper()
	assert.Empty(e.t, e.server.LostGrants())
	assert.Zero(e.t, e.server.UsedTwice())
	for _, c := range e.revocations() {
		assert.False(e.t, c.Expired, "an expired token is sent")
	}
}

func (e *oauthEngine) pending(tenant string) any {
	return e.read("tenants/" + tenant)["pending_revocations"]
}

func bubble(t *testing.T, f func(t *testing.T)) { synctest.Test(t, f) }

func TestOAuthSharedTokenIsRevokedWithItsLastLease(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", map[string]any{"retire_on_revoke": false}) // it has no effect at this connector
		one, other := e.lease("acme"), e.lease("acme")
		token := accessTokenOf(one)
		assert.Equal(t, "Bearer", one.Data["token_type"])
		assert.NotContains(t, one.Data, "endpoint_url")
		assert.Equal(t, token, accessTokenOf(other))
		e.revoke(one)
		assert.True(t, e.server.Alive(token))
		assert.Empty(t, e.revocations())
		e.revoke(other)
		assert.False(t, e.server.Alive(token), "the token is revoked when the revocation of the lease returns")
		assert.Nil(t, e.pending("acme"))
		e.revoke(other, one) // Vault may revoke a lease twice
		assert.Len(t, e.revocations(), 1)

		next := e.lease("acme")
		assert.NotEqual(t, token, accessTokenOf(next))
		assert.True(t, e.server.Alive(accessTokenOf(next)))

		// A lease that expires does not revoke its token.
		next.Secret.IssueTime = time.Now().Add(-next.Secret.TTL)
		e.revoke(next)
		assert.True(t, e.server.Alive(accessTokenOf(next)))

		// A renewal replaces a token with live leases: the older token is revoked when the last of them expires or is revoked.
		a, b := e.lease("acme"), e.lease("acme")
		old := accessTokenOf(a)
		e.pass(50 * time.Minute)
		current := e.read("token/acme")["access_token"].(string)
		require.NotEqual(t, old, current)
		assert.True(t, e.server.Alive(old), "the older token has live leases")
		e.revoke(a)
		assert.True(t, e.server.Alive(old))
		b.Secret.IssueTime, b.Secret.TTL = time.Now().Add(-time.Minute), time.Minute
		e.revoke(b)
		assert.False(t, e.server.Alive(old))
		assert.True(t, e.server.Alive(current))
		e.kept()
	})
}

func TestOAuthHeldTokenOutlivesARestart(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		lease := e.lease("acme")
		old := accessTokenOf(lease)
		e.pass(50 * time.Minute)
		current := e.read("token/acme")["access_token"].(string)
		e.crash()
		synctest.Wait()
		e.revoke(lease)
		assert.False(t, e.server.Alive(old))
		assert.True(t, e.server.Alive(current))
		e.pass(15 * time.Minute)
		held, err := e.storage.List(context.Background(), heldPrefix)
		require.NoError(t, err)
		assert.Empty(t, held, "the records of tokens are deleted with them")
		e.kept()
	})
}
