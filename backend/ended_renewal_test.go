package backend

import (
	"context"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// A lease is renewed while its access token lives, and not once the engine has ended that at the service: the app then reads a new
// one, and does not go on with a dead one.
func TestRenewalsOfEndedAccessTokens(t *testing.T) {
	// The renewer's exchange: leases on the token before live on.
	rotate := func(e *oauthEngine) {
		time.Sleep(50 * time.Minute)
		require.Len(e.t, e.server.Calls(oauth2test.EndpointToken), 2)
	}
	refresh := func(e *oauthEngine) { e.write("tenants/acme/refresh", nil) }
	rewrite := func(e *oauthEngine) {
		e.write("tenants/acme", map[string]any{"refresh_token": e.server.Grant(e.clientID, "acme"), "verify": false})
	}
	// The count of leases is unknown after a restart: one early revocation gives the token up.
	revokeOther := func(e *oauthEngine) {
		other := e.lease("acme")
		e.restart()
		e.revoke(other)
	}
	refuseTenant := func(e *oauthEngine) { e.storage.refuse("put", tenantPrefix+"acme") }
	keptAnswer := func(e *oauthEngine) { // the exchange has ended the token before, and storage has not taken what it brought
		refuseTenant(e)
		_, err := e.do(context.Background(), logical.UpdateOperation, "tenants/acme/refresh", nil)
		require.Error(t, err)
	}
	for name, c := range map[string]struct {
		kind          func(*oauth2test.Options)
		fields        map[string]any
		tenant        map[string]any
		then          func(e *oauthEngine)
		alive, renews bool
	}{
		"A, refresh":           {oauth2test.ClassA, classA, nil, refresh, false, false},
		"A, rewritten":         {oauth2test.ClassA, classA, nil, rewrite, false, false},
		"A, revoked":           {oauth2test.ClassA, classA, nil, revokeOther, false, false},
		"A, renewed ahead":     {oauth2test.ClassA, classA, nil, rotate, true, true},
		"A, not stored":        {oauth2test.ClassA, classA, nil, func(e *oauthEngine) { refuseTenant(e); rotate(e) }, true, true},
		"A, one lease's alone": {oauth2test.ClassA, classA, map[string]any{"token_per_lease": true}, refresh, true, true},
		"B, refresh":           {oauth2test.ClassB, classB, nil, refresh, true, true},
		"D, refresh":           {oauth2test.ClassD, classD, nil, refresh, false, false},
		"D, not stored":        {oauth2test.ClassD, classD, nil, keptAnswer, false, false},
		"D, nothing":           {oauth2test.ClassD, classD, nil, func(*oauthEngine) {}, true, true},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, c.kind, c.fields)
				e.add("acme", c.tenant)
				lease := e.lease("acme")
				token := accessTokenOf(lease)
				c.then(e)
				time.Sleep(time.Second) // the revocation is made behind the answer
				require.Equal(t, c.alive, e.server.Alive(token))
				resp, err := e.HandleRequest(context.Background(), &logical.Request{Operation: logical.RenewOperation, Secret: lease.Secret, Storage: e.storage})
				require.NoError(t, err)
				if c.renews {
					require.NoError(t, resp.Error())
					return
				}
				assert.ErrorContains(t, resp.Error(), "is not in use any more, since a refresh, a write or a revocation: read creds/acme for a new one")
			})
		})
	}
}

// A lease that has a second left is still renewed, and one that has less is not.
func TestRenewalOfALastSecond(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		lease := e.lease("acme")
		time.Sleep(time.Hour - leaseMargin - 1500*time.Millisecond)
		_, renewed := e.renewLease(lease, 0)
		assert.True(t, renewed)
		time.Sleep(time.Second)
		_, renewed = e.renewLease(lease, 0)
		assert.False(t, renewed)
	})
}
