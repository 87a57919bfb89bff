package backend

import (
	"encoding/base64"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/assert"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// A person grants access, and by Vault's clock the refresh token that the service issues for that, a JWT, has ended long ago. The tenant
// is connected: the clocks differ.
func TestGrantOfARefreshTokenThatHasEndedByVaultsClock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		encode := base64.RawURLEncoding.EncodeToString
		token := encode([]byte(`{"alg":"HS256"}`)) + "." + encode([]byte(`{"exp":900000000}`)) + ".c2ln"
		e := newGrantEngine(t, func(o *oauth2test.Options) {
			o.Edit = func(at oauth2test.Endpoint, fields map[string]any) {
				if at == oauth2test.EndpointToken {
					fields["refresh_token"] = token
				}
			}
		})
		p := e.confirm(e.authorize(nil))
		assert.Equal(t, 200, p.status, p.text())
		assert.Equal(t, token, e.held("acme"))
		assert.Equal(t, statusOK, e.status("acme"))
		assert.NotContains(t, e.read("tenants/acme"), "refresh_token_expire_time")
	})
}
