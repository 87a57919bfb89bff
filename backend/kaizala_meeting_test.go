package backend

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// Two flows of a Kaizala tenant that meet, one test for each way in which that has gone wrong.

// A tenant that is given another connector, unasked, while the service replaces its refresh token lives as long as the new
// refresh token does, not as the one that the write was checked with.
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
