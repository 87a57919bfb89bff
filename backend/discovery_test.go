package backend

import (
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// The server answers the question about its metadata with a limit, or with an outage and Retry-After: the engine makes no call for the
// connector until that has passed, not after a restart either.
func TestDiscoveryThatTheServerPutsOffPausesTheConnector(t *testing.T) {
	for name, c := range map[string]struct {
		answer oauth2test.Answer
		status int
		rest   time.Duration
	}{
		"a limit":   {oauth2test.Answer{Status: 429, Header: http.Header{"Retry-After": {"600"}}}, 429, 10 * time.Minute},
		"no time":   {oauth2test.Answer{Status: 429}, 429, time.Minute},
		"an outage": {oauth2test.Answer{Status: 503, Header: http.Header{"Retry-After": {"300"}}}, 503, 5 * time.Minute},
		"refused":   {oauth2test.Answer{Status: 403, Header: http.Header{"Retry-After": {"300"}}}, 503, 5 * time.Minute},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newGrantEngine(t)
				e.write("tenants/acme", map[string]any{"connector": "as", "refresh_token": e.server.Grant(e.clientID, "acme"), "verify": false})
				e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointMetadata, Answer: c.answer})
				_, status, text := e.ask(logical.UpdateOperation, "config/as", map[string]any{"issuer": e.server.Issuer()})
				require.Equal(t, c.status, status, text)
				assert.Contains(t, text, "nothing was stored")
				assert.Len(t, e.server.Calls(oauth2test.EndpointMetadata), 1)
				refused := func() {
					t.Helper()
					_, status, text := e.try(logical.ReadOperation, "creds/acme", nil)
					assert.Equal(t, 429, status, text)
					assert.Zero(t, e.sent("refresh_token"))
				}
				refused()
				e.crash()
				time.Sleep(c.rest - 2*time.Second)
				refused()
				time.Sleep(3 * time.Second)
				e.read("creds/acme")
			})
		})
	}
}

// Discovery sends no secret, so its failure says nothing about the secret that the server has refused.
func TestFailedDiscoverySaysNothingAboutTheSecret(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		e.write("tenants/acme", map[string]any{"connector": "as", "refresh_token": e.server.Grant(e.clientID, "acme"), "verify": false})
		e.write("config/as", map[string]any{"connector_secret": "wrong"})
		_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
		require.Equal(t, 400, status)
		e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointMetadata, Answer: oauth2test.Answer{Status: 503}})
		_, status, text := e.ask(logical.UpdateOperation, "config/as", map[string]any{"issuer": e.server.Issuer()})
		require.Equal(t, 503, status, text)
		exchanges := e.sent("refresh_token")
		_, status, _ = e.try(logical.ReadOperation, "creds/acme", nil)
		assert.Equal(t, 400, status)
		assert.Equal(t, exchanges, e.sent("refresh_token"))
	})
}

// Another write, or a delete, of the connector comes while a write that names issuer waits for its call: discovery begins again with the
// connector as it is then, and each write keeps what it names.
func TestConnectorIsWrittenDuringDiscovery(t *testing.T) {
	for name, c := range map[string]struct {
		meanwhile func(*grantEngine)
		op        logical.Operation
		status    int
	}{
		"a write": {func(e *grantEngine) { e.write("config/as", map[string]any{"request_timeout": "9s"}) }, logical.UpdateOperation, 204},
		"a write of issuer": {func(e *grantEngine) {
			e.write("config/as", map[string]any{"request_timeout": "9s", "issuer": e.server.Issuer()})
		}, logical.UpdateOperation, 204},
		"a delete": {func(e *grantEngine) { e.ok(logical.DeleteOperation, "config/as", nil) }, logical.PatchOperation, 404},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newGrantEngine(t)
				over := e.storage.once("put", callPrefix, func() { c.meanwhile(e) })
				_, status, text := e.ask(c.op, "config/as", map[string]any{"issuer": e.server.Issuer()})
				require.True(t, over())
				require.Equal(t, c.status, status, text)
				if status == 404 {
					assert.Empty(t, e.server.Calls(oauth2test.EndpointMetadata))
					return
				}
				config := e.read("config/as")
				assert.EqualValues(t, 9, config["request_timeout"])
				assert.Equal(t, e.server.Issuer(), config["issuer"])
			})
		})
	}
}

// A write names the issuer of another server by mistake, and that server answers with a limit: nothing is stored, and the connector goes on
// with its own server.
func TestLimitOfAnotherServersDiscovery(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		e.write("tenants/acme", map[string]any{"connector": "as", "refresh_token": e.server.Grant(e.clientID, "acme"), "verify": false})
		e.other.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointMetadata, Answer: oauth2test.Answer{Status: 429, Header: http.Header{"Retry-After": {"86400"}}}})
		_, status, text := e.ask(logical.UpdateOperation, "config/as", map[string]any{"issuer": e.other.Issuer()})
		require.Equal(t, 429, status, text)
		_, status, text = e.try(logical.ReadOperation, "creds/acme", nil)
		assert.Equal(t, 200, status, text)
		e.write("config/as", map[string]any{"request_timeout": "9s"})
		_, status, text = e.try(logical.ReadOperation, "creds/acme", nil)
		assert.Equal(t, 200, status, text)
	})
}
