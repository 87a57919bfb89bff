package backend

import (
	"net/http"
	"net/url"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// The connection breaks in the refresh token of an answer that is a form. The engine does not store the part that came: it tries once more
// with the refresh token that it has.
func TestAnswerThatBreaksOffInARefreshTokenIsLost(t *testing.T) {
	for name, rotation := range map[string]oauth2test.Rotation{"the service keeps the refresh token": oauth2test.RotateSame, "the service replaces it": oauth2test.RotateEach} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, func(o *oauth2test.Options) {
					o.Format, o.Rotation, o.Grace = oauth2test.FormatForm, rotation, time.Minute
				}, classB)
				e.add("acme", nil)
				first := accessTokenOf(e.lease("acme"))
				token := e.held("acme")
				// The server sends the parameters in the order of their names, and all access tokens have the same length.
				before := url.Values{"access_token": {first}, "expires_in": {"3600"}}.Encode() + "&refresh_token="
				e.server.Inject(oauth2test.Fault{Truncate: true, TruncateAt: len(before) + 10, Times: 1})
				exchanges := e.server.TotalExchanges()

				_, status, text := e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
				require.Equal(t, http.StatusOK, status, text)
				assert.Equal(t, exchanges+2, e.server.TotalExchanges())
				assert.Len(t, e.held("acme"), len(token))
				assert.Equal(t, statusOK, e.status("acme"))
				e.pass(24 * time.Hour)
				assert.True(t, e.server.Alive(accessTokenOf(e.lease("acme"))))
			})
		})
	}
}
