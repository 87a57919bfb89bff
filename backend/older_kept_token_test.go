package backend

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// A node keeps an access token that storage has not taken, and then another node makes an exchange, which ends that token. The service
// leaves the refresh token as it is. The older access token does not replace the newer one in storage.
func TestKeptAccessTokenOfBeforeAnotherNodesExchange(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, func(o *oauth2test.Options) { oauth2test.ClassD(o); o.Rotation = oauth2test.RotateNever }, classD)
		other := e.swapUnstored()
		time.Sleep(time.Second)
		lease := other.lease("acme")
		other.swap(e)
		e.pass(3 * time.Minute)
		assert.True(t, e.server.Alive(accessTokenOf(lease)))
		assert.True(t, e.server.Alive(accessTokenOf(e.lease("acme"))))
		assert.Equal(t, accessTokenOf(lease), accessTokenOf(e.lease("acme")))
	})
}
