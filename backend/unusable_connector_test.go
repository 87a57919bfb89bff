package backend

import (
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// upgrade starts another version of the plugin, which is stricter than the one that stored the connector: it makes no client of it.
func (e *oauthEngine) upgrade() {
	e.t.Helper()
	e.stop()
	key := connectorPrefix + defaultConnector
	e.put(key, []byte(strings.Replace(e.get(key), e.server.TokenURL(), "ftp://as.example.com/token", 1)))
	e.start()
	e.waitForIndex()
}

// No client can be made of a stored connector. Leases on its access tokens are revoked all the same, its tenants are deleted, and then
// the connector is.
func TestLeaseOfAConnectorThatCannotBeUsed(t *testing.T) {
	for name, class := range map[string]map[string]any{"none": classB, "access_token": classA} {
		for _, own := range []bool{false, true} {
			if own && name == "none" {
				continue
			}
			t.Run(name, func(t *testing.T) {
				bubble(t, func(t *testing.T) {
					e := newOAuthEngine(t, oauth2test.ClassA, class)
					e.add("acme", map[string]any{"token_per_lease": own})
					e.add("globex", map[string]any{"retire_on_revoke": false})
					leases := []*logical.Response{e.lease("acme"), e.lease("globex")}
					e.upgrade()
					_, status, text := e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
					assert.Equal(t, http.StatusInternalServerError, status)
					assert.Contains(t, text, `the stored configuration of connector "default" cannot be read by this version of the plugin: token_url `)
					assert.Contains(t, text, "; write config again")
					for _, lease := range leases {
						assert.NoError(t, e.revokeLease(lease))
					}
					for _, tenant := range []string{"acme", "globex"} {
						e.ok(logical.DeleteOperation, "tenants/"+tenant, nil)
					}
					e.ok(logical.DeleteOperation, "config", nil)
				})
			})
		}
	}
}

// A revocation that is pending at a connector of which no client can be made is made once the connector is written again, or ends with its
// token.
func TestPendingRevocationOfAConnectorThatCannotBeUsed(t *testing.T) {
	for _, written := range []bool{true, false} {
		bubble(t, func(t *testing.T) {
			e := newOAuthEngine(t, oauth2test.ClassA, classA)
			e.add("acme", nil)
			lease := e.lease("acme")
			e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointRevocation, Answer: oauth2test.Unavailable(0)})
			e.revoke(lease)
			e.upgrade()
			e.server.ClearFaults()
			e.server.ResetCalls()
			e.pass(5 * time.Minute)
			require.EqualValues(t, 1, e.pending("acme"))
			if written {
				e.write("config", map[string]any{"token_url": e.server.TokenURL()})
			}
			e.pass(2 * time.Hour)
			assert.Equal(t, !written, len(e.revocations()) == 0)
			assert.Nil(t, e.pending("acme"))
			e.kept()
		})
	}
}

// A connector of which no client can be made is mended by the metadata of an issuer, too.
func TestMetadataMendsAConnectorThatCannotBeUsed(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		e.upgrade()
		e.write("config", map[string]any{"issuer": e.server.Issuer(), "token_url": nil})
		synctest.Wait()
		assert.True(t, e.server.Alive(accessTokenOf(e.lease("acme"))))
	})
}
