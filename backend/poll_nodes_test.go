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

// A node has begun a device authorization and is a standby for a while. Meanwhile another node begins a newer one for the same tenant. The
// node that is active again asks the service about the newer one, whether or not its own last poll is still planned.
func TestNodePollsTheAttemptThatAnotherNodeHasBegun(t *testing.T) {
	for _, waits := range []time.Duration{0, 2 * time.Minute} { // until the node is active again
		bubble(t, func(t *testing.T) {
			e := newOAuthEngine(t, oauth2test.ClassA, nil)
			e.write("config", map[string]any{"device_authorization_url": e.server.DeviceURL(), "scopes": "openid offline_access"})
			standby := e.newStandby()
			e.ok(logical.UpdateOperation, "tenants/acme/device", nil)
			time.Sleep(6 * time.Second)
			e.swap(standby)
			code := standby.ok(logical.UpdateOperation, "tenants/acme/device", nil).Data["user_code"].(string)
			time.Sleep(waits)
			standby.swap(e)
			e.minute()
			synctest.Wait()
			require.NoError(t, e.server.ApproveDevice(code, "jane"))
			e.pass(5 * time.Minute)
			assert.Equal(t, attemptGranted, e.read("tenants/acme/device")["status"], waits)
		})
	}
}
