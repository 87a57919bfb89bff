package backend

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/kaizala/kaizalatest"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/tokenservice"
)

// A null in a patch sets a field of a tenant to its default, also the connector's name.
func TestPatchedNullsAreDefaults(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		before := e.read("tenants/acme")
		id, secret := e.kaizala.RegisterConnector()
		e.write("config/hr", map[string]any{"connector_id": id, "connector_secret": secret})
		e.write("tenants/acme", map[string]any{
			"refresh_token": e.kaizala.GenerateUserToken(id, "acme"), "connector": "hr", "ttl": "1h", "max_ttl": "2h", "min_ttl": "5m",
			"retire_on_revoke": false, "verify": false,
		})
		e.ok(logical.PatchOperation, "tenants/acme", map[string]any{
			"refresh_token": e.newToken("acme"), "connector": nil, "ttl": nil, "max_ttl": nil, "min_ttl": nil,
			"retire_on_revoke": nil, "token_per_lease": nil, "verify": nil,
		})
		after := e.read("tenants/acme")
		assert.Equal(t, statusOK, after["status"], "null is the default of verify, too")
		for _, name := range []string{"connector", "ttl", "max_ttl", "min_ttl", "retire_on_revoke", "token_per_lease"} {
			assert.Equal(t, before[name], after[name], name)
		}
	})
}

// After a 503 or a 403 with Retry-After no call is made before that time, whatever the answer's body says, and also if config is written.
func TestRetryAfterHoldsWhateverTheAnswerSays(t *testing.T) {
	for _, status := range []int{http.StatusForbidden, http.StatusServiceUnavailable} {
		for _, body := range []string{"", `{"errorCode":"InvalidToken"}`, `{"errorCode":"Unauthenticated"}`, refusedConnector} {
			t.Run(http.StatusText(status)+body, func(t *testing.T) {
				bubble(t, func(t *testing.T) {
					e := newConfiguredEngine(t)
					e.addTenant("acme")
					e.addTenant("globex")
					e.kaizala.Inject(kaizalatest.Fault{Status: status, Header: http.Header{"Retry-After": {"300"}}, Body: body, Times: 1})
					_, answered, _ := e.try(logical.ReadOperation, "creds/acme", nil)
					require.GreaterOrEqual(t, answered, 400)
					e.write("config", map[string]any{"connector_secret": e.secret})
					time.Sleep(299 * time.Second)
					_, answered, text := e.try(logical.ReadOperation, "creds/globex", nil)
					assert.Equal(t, http.StatusTooManyRequests, answered, text)
					assert.Equal(t, 1, e.kaizala.CallCount())
					time.Sleep(2 * time.Second)
					e.lease("globex")
				})
			})
		}
	}
}

// A 503 asks for a rest of a day: the connector rests for ten minutes, and each text names that time.
func TestTextsNameTheRestThatIsTaken(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, nil)
		e.add("acme", nil)
		e.lease("acme")
		e.server.Inject(oauth2test.Fault{Times: 1, Answer: oauth2test.Answer{Status: 503, Header: http.Header{"Retry-After": {"86400"}}}})
		_, status, text := e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
		assert.Equal(t, http.StatusServiceUnavailable, status)
		warnings := strings.Join(e.lease("acme").Warnings, "\n")
		for _, text := range []string{text, warnings, e.read("tenants/acme")["last_error"].(string)} {
			assert.Contains(t, text, "Try again in 10m0s.")
			assert.NotContains(t, text, "24h")
		}
		time.Sleep(10*time.Minute - time.Second)
		_, status, _ = e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
		assert.Equal(t, http.StatusTooManyRequests, status)
		time.Sleep(time.Second)
		e.write("tenants/acme/refresh", nil)
	})
}

const refusedConnector = `{"errorCode":"Unauthenticated","message":"Dont have correct applicationId and secret in header!"}`

// A refresh joins a renewal that is under way: it retires the older access token, also with live leases on it.
func TestRefreshRetiresWhatARenewalReplaces(t *testing.T) {
	for name, leased := range map[string]bool{"leased": true, "read without a lease": false} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, oauth2test.ClassA, classA)
				e.add("acme", nil)
				var lease *logical.Response
				token := e.read("token/acme")["access_token"].(string)
				if leased {
					lease = e.lease("acme")
				}
				e.server.Inject(oauth2test.Fault{Delay: 3 * time.Second, Times: 1})
				renewed, v, err := e.tenants.load(context.Background(), "acme")
				require.NoError(t, err)
				_, own, err := e.exchanger.start(e.ctx, renewed, v, want{background: true})
				require.NoError(t, err)
				require.True(t, own)
				e.write("tenants/acme/refresh", nil)
				e.quiet("acme")
				assert.False(t, e.server.Alive(token))
				assert.Len(t, e.server.Calls(oauth2test.EndpointToken), 2, "the refresh has joined the renewal")
				next := e.lease("acme")
				assert.True(t, e.server.Alive(accessTokenOf(next)))
				if leased {
					e.revoke(lease)
				}
				assert.True(t, e.server.Alive(accessTokenOf(next)))
				assert.Len(t, e.revocations(), 1)
				assert.Nil(t, e.pending("acme"))
			})
		})
	}
}

// Storage failed to read a tenant at the start, and works now: the tenant's connector is not deleted.
func TestConnectorOfATenantThatCouldNotBeRead(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		id, secret := e.kaizala.RegisterConnector()
		e.write("config/hr", map[string]any{"connector_id": id, "connector_secret": secret})
		e.addTenant("globex")
		e.write("tenants/acme", map[string]any{"refresh_token": e.kaizala.GenerateUserToken(id, "acme"), "connector": "hr", "verify": false})
		e.stop()
		e.storage.failWith(func(op, key string) error {
			if op == "get" && key == tenantPrefix+"acme" {
				return errors.New("storage fails")
			}
			return nil
		})
		e.start()
		synctest.Wait()
		e.storage.heal()
		_, status, text := e.try(logical.DeleteOperation, "config/hr", nil)
		assert.Equal(t, http.StatusBadRequest, status)
		assert.Contains(t, text, "(acme)")
		e.ok(logical.DeleteOperation, "tenants/acme", nil)
		e.ok(logical.DeleteOperation, "config/hr", nil)
	})
}

// The service refuses a connector that is not in memory, because it has just been written or another node has changed it: no reader waits
// for that, and the engine does not panic.
func TestRefusalOfAConnectorThatIsNotInMemory(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		for _, kind := range []tokenservice.Kind{tokenservice.RefusedConnector, tokenservice.Limited} {
			acme, v, err := e.tenants.load(context.Background(), "acme")
			require.NoError(t, err)
			e.InvalidateKey(context.Background(), "config/default")
			f := &flight{t: acme, v: v, connector: defaultConnector}
			require.Error(t, e.exchanger.fail(f, e.connectors.present(defaultConnector), &tokenservice.Failure{Kind: kind}))
			e.write("tenants/acme/refresh", nil)
			e.lease("acme")
		}
	})
}
