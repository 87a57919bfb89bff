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

// While the service works on a code, an operator writes a wrong secret, which the service then refuses to another tenant. The answer to the
// code says nothing about that secret, so the connector stays refused.
func TestGrantDoesNotAcceptALaterSecret(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		e.write("tenants/other", map[string]any{"connector": "as", "refresh_token": e.server.Grant(e.clientID, "other"), "verify": false})
		_, form := e.open(e.authorize(nil)).form()
		e.server.Inject(oauth2test.Fault{Delay: 3 * time.Second, Times: 1})
		done := make(chan struct{})
		go func() {
			defer close(done)
			_, _, _ = e.ask(logical.UpdateOperation, "callback", form)
		}()
		time.Sleep(time.Second)
		e.ok(logical.PatchOperation, "config/as", map[string]any{"connector_secret": "wrong"})
		_, status, _ := e.try(logical.ReadOperation, "creds/other", nil)
		require.Equal(t, 400, status)
		exchanges := e.sent("refresh_token")
		<-done
		require.Equal(t, attemptGranted, e.attemptStatus(byCode))
		_, status, _ = e.try(logical.ReadOperation, "creds/other", nil)
		assert.Equal(t, 400, status)
		e.pass(2 * time.Minute)
		assert.Equal(t, exchanges, e.sent("refresh_token"), "a refused connector makes one exchange in ten minutes")
		assert.Zero(t, e.log.count("accepts a connector"), "the log does not say that the service accepts the connector")
	})
}
