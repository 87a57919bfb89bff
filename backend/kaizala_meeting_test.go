package backend

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/kaizala/kaizalatest"
)

// Two flows of a Kaizala tenant run at the same time. Each test guards one race that has gone wrong before.

// A write without verification gives a tenant another connector while the service replaces its refresh token: the stored end is that of
// the new refresh token, and not of the one that the write was checked with.
func TestConnectorIsWrittenWhileTheRefreshTokenIsReplaced(t *testing.T) {
	for name, write := range map[string]func(e *engine, write func()){
		"it is kept": func(e *engine, write func()) {
			e.failPuts()
			_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
			require.Equal(e.t, 503, status)
			e.storage.heal()
			write()
		},
		"it is being stored": func(e *engine, write func()) {
			reached, release := e.storage.hold("put", tenantPrefix)
			go func() { _, _, _ = e.try(logical.ReadOperation, "creds/acme", nil) }()
			<-reached
			go write()
			synctest.Wait()
			release()
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newRotatingEngine(t)
				e.write("config/other", map[string]any{"connector_id": e.connectorID, "connector_secret": e.secret})
				write(e, func() { e.write("tenants/acme", map[string]any{"connector": "other", "verify": false}) })
				synctest.Wait()
				entry := e.stored("acme")
				require.Equal(t, "other", entry.Connector)
				require.Equal(t, e.kaizala.CurrentRefreshToken("acme"), entry.RefreshToken)
				assert.Equal(t, time.Now().UTC().Add(365*day), entry.Facts.Expires)
				time.Sleep(60 * day) // the refresh token before would have ended
				e.read("creds/acme")
			})
		})
	}
}

const connectorsRefusal = `{"errorCode":"Unauthenticated","message":"Dont have correct applicationId and secret in header!"}`

// newRefusedEngine starts an engine with the tenant acme, whose connector Kaizala has refused n times, the last time just before it
// returns.
func newRefusedEngine(t *testing.T, n int) *engine {
	e := newConfiguredEngine(t)
	e.addTenant("acme")
	e.kaizala.Inject(kaizalatest.Fault{Times: n, Status: 401, Body: connectorsRefusal})
	for i := range n {
		if i > 0 {
			time.Sleep(probeEvery)
		}
		e.quiet("acme")
		_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
		require.Equal(t, 400, status)
	}
	require.Equal(t, n, e.kaizala.CallCount())
	return e
}

// A probe is the exchange that shows whether Kaizala accepts a refused connector again. If storage fails before a probe, the next reader
// makes it.
func TestStorageFailsBeforeAProbe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newRefusedEngine(t, 1)
		e.storage.refuse("put", callPrefix)
		time.Sleep(probeEvery)
		e.quiet("acme")
		_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
		assert.Equal(t, 503, status)
		require.Equal(t, 1, e.kaizala.CallCount())
		e.storage.heal()
		e.read("creds/acme")
	})
}

// The ten minutes between two probes go on over a restart.
func TestRestartAfterAProbe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newRefusedEngine(t, 2)
		e.restart()
		_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
		assert.Equal(t, 400, status)
		assert.Equal(t, 2, e.kaizala.CallCount())
		time.Sleep(probeEvery)
		e.read("creds/acme")
	})
}

// The time of a refusal in storage is when Kaizala refused the connector. A refusal by the engine itself, without a call, does not
// change it.
func TestRefusalIsNotedWithItsAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newRefusedEngine(t, 1)
		before, err := e.storedConnector(t.Context(), defaultConnector)
		require.NoError(t, err)
		e.kaizala.Inject(kaizalatest.Fault{Times: 1, Status: 503})
		time.Sleep(probeEvery + time.Second)
		require.Equal(t, 2, e.kaizala.CallCount())
		_, status, _ := e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"connector": defaultConnector})
		assert.Equal(t, 400, status)
		after, err := e.storedConnector(t.Context(), defaultConnector)
		require.NoError(t, err)
		assert.Equal(t, before.Refused, after.Refused)
		require.Equal(t, 2, e.kaizala.CallCount())
	})
}

// Kaizala sends no PIN for a deactivated connector, but its tenants' refresh tokens still work: after a refused PIN, readers of its
// tenants are served.
func TestPINOfADeactivatedConnector(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("beta")
		e.kaizala.DeactivateConnector(e.connectorID)
		_, status, text := e.pin(map[string]any{"mobile_number": e.kaizala.PhoneNumber("acme")})
		assert.Equal(t, 400, status)
		assert.Contains(t, text, "check on Kaizala's portal that it is active")
		e.read("creds/beta")
	})
}

// Kaizala says the same with the status 500: readers of the connector's tenants are served.
func TestPINOfADeactivatedConnectorWithAnOddStatus(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("beta")
		e.kaizala.Inject(kaizalatest.Fault{Times: 1, Status: 500, Body: connectorsRefusal})
		_, status, _ := e.pin(map[string]any{"mobile_number": e.kaizala.PhoneNumber("acme")})
		assert.NotEqual(t, 200, status)
		e.read("creds/beta")
	})
}

// No PIN is sent while the connector is refused, also not as a probe: the answer would not show whether Kaizala accepts the connector
// again, and the PIN could not be redeemed.
func TestNoPINIsSentForARefusedConnector(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("beta")
		e.kaizala.Inject(kaizalatest.Fault{Times: 1, Status: 401, Body: connectorsRefusal})
		_, status, _ := e.try(logical.ReadOperation, "creds/beta", nil)
		require.Equal(t, 400, status)
		e.ok(logical.DeleteOperation, "tenants/beta", nil) // a probe with this tenant would end the refusal
		time.Sleep(probeEvery)
		_, status, text := e.pin(map[string]any{"mobile_number": e.kaizala.PhoneNumber("acme")})
		assert.Equal(t, 400, status)
		assert.Contains(t, text, "refuses connector")
		assert.Zero(t, e.pinCalls(sendPINPath))
		e.addTenant("gamma")
		e.read("creds/gamma")
		e.phone()
	})
}
