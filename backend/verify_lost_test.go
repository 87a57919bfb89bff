package backend

import (
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// The answers to a verification of the refresh token that the tenant has are lost: the service may have replaced the refresh token, and
// ended the access token. The next exchange comes while the service still takes the replaced one, with a reader and without.
func TestLostAnswerToAVerification(t *testing.T) {
	for name, write := range map[string]func(*oauthEngine) map[string]any{
		"another connector":      func(*oauthEngine) map[string]any { return map[string]any{"connector": "other"} },
		"the same refresh token": func(e *oauthEngine) map[string]any { return map[string]any{"refresh_token": e.held("acme")} },
	} {
		for _, reads := range []bool{true, false} {
			t.Run(name, func(t *testing.T) {
				bubble(t, func(t *testing.T) {
					e := newOAuthEngine(t, func(o *oauth2test.Options) { oauth2test.ClassD(o); o.Grace = 30 * time.Second }, classD)
					e.write("config/other", map[string]any{
						"service": "oauth2", "token_url": e.server.TokenURL(), "connector_id": e.clientID, "connector_secret": e.secret,
					})
					e.add("acme", nil)
					e.read("creds/acme")
					e.server.Inject(oauth2test.Fault{Process: true, Reset: true, Times: 2})
					_, status, _ := e.try(logical.UpdateOperation, "tenants/acme", write(e))
					require.Equal(t, 503, status)
					assert.Equal(t, "default", e.stored("acme").Connector)
					assert.Equal(t, statusDegraded, e.status("acme"))
					time.Sleep(5 * time.Second)
					if reads {
						assert.True(t, e.server.Alive(e.read("token/acme")["access_token"].(string)))
					}
					time.Sleep(2 * time.Hour)
					assert.True(t, e.server.Alive(e.read("token/acme")["access_token"].(string)))
					assert.Equal(t, e.server.CurrentRefreshToken("acme"), e.stored("acme").RefreshToken)
					assert.Empty(t, e.server.LostGrants())
				})
			})
		}
	}
}

// The answers to a verification of another refresh token are lost: the tenant goes on with the one that it has.
func TestLostAnswerToAVerificationOfAnother(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassD, classD)
		e.add("acme", nil)
		token := e.read("token/acme")["access_token"]
		e.server.Inject(oauth2test.Fault{Process: true, Reset: true, Times: 2})
		_, status, _ := e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": e.server.Grant(e.clientID, "acme")})
		require.Equal(t, 503, status)
		assert.Equal(t, statusOK, e.status("acme"))
		time.Sleep(5 * time.Second)
		assert.Equal(t, token, e.read("token/acme")["access_token"])
	})
}
