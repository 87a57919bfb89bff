package backend

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// A node polls for an attempt, becomes a standby and the active node again. Another node has begun a newer attempt meanwhile: the node polls
// for that.
func TestNodePollsForTheNewerAttemptOfAnotherNode(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.write("config", map[string]any{"device_authorization_url": e.server.DeviceURL()})
		e.waitForIndex()
		other := e.newStandby()
		e.write("tenants/acme/device", nil)
		time.Sleep(7 * time.Second)
		e.swap(other)
		time.Sleep(10 * time.Second)
		code := other.write("tenants/acme/device", nil).Data["user_code"].(string)
		other.swap(e)
		e.minute()
		require.NoError(t, e.server.ApproveDevice(code, "jane"))
		e.pass(5 * time.Minute)
		assert.Equal(t, attemptGranted, e.read("tenants/acme/device")["status"])
	})
}
