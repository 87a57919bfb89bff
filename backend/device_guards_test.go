package backend

import (
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// An operator writes the tenant while a poll is at the service, and the service answers that the person has not decided, or fails: there is
// no further poll, and the engine goes on.
func TestWriteWhileAPollIsAtTheService(t *testing.T) {
	for name, answer := range map[string]oauth2test.Answer{
		"pending": {}, "outage": oauth2test.BadGateway, "slow down": {Status: 400, Body: `{"error":"slow_down"}`},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newGrantEngine(t)
				e.start(byDevice, nil)
				e.server.Inject(oauth2test.Fault{Delay: 2 * time.Second, Answer: answer, Times: 1})
				time.Sleep(6 * time.Second)
				require.Len(t, e.polls(), 1)
				e.addTenant("acme")
				time.Sleep(2 * time.Minute)
				assert.Len(t, e.polls(), 1)
				assert.Equal(t, attemptSuperseded, e.attemptStatus(byDevice))
			})
		})
	}
}

// The answer to a poll holds a refresh token beside an access token that cannot be used: the refresh token is stored, because the service
// gives it once.
func TestRefreshTokenBesideAnUnusableAccessTokenOfAPoll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var unusable atomic.Bool
		unusable.Store(true)
		e := newGrantEngine(t, func(o *oauth2test.Options) {
			o.Edit = func(at oauth2test.Endpoint, fields map[string]any) {
				if at == oauth2test.EndpointToken && unusable.Load() {
					fields["expires_in"] = 0
				}
			}
		})
		code := e.start(byDevice, nil)["user_code"].(string)
		require.NoError(t, e.server.ApproveDevice(code, "jane"))
		time.Sleep(6 * time.Second)
		unusable.Store(false)
		assert.Equal(t, attemptGranted, e.attemptStatus(byDevice))
		assert.Len(t, e.polls(), 1)
		require.NotNil(t, e.stored("acme"))
		assert.Equal(t, e.server.CurrentRefreshToken("jane"), e.stored("acme").RefreshToken)
		e.pass(2 * time.Minute)
		e.read("creds/acme")
		assert.Empty(t, e.server.LostGrants())
	})
}

// The answer to a poll refuses the connector: that outlives the process, which makes no call for other tenants.
func TestRefusalOfAConnectorByAPollIsStored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		e.write("tenants/beta", map[string]any{"connector": "as", "refresh_token": e.server.Grant(e.clientID, "bob", "offline_access"), "verify": false})
		e.start(byDevice, nil)
		e.server.Inject(oauth2test.Fault{Answer: oauth2test.InvalidClient, Times: 1})
		time.Sleep(6 * time.Second)
		require.Len(t, e.polls(), 1)
		e.ok(logical.DeleteOperation, "tenants/acme", nil)
		e.crash()
		synctest.Wait()
		calls := len(e.server.Calls())
		_, status, _ := e.try(logical.ReadOperation, "creds/beta", nil)
		assert.Equal(t, 400, status)
		assert.Len(t, e.server.Calls(), calls)
	})
}

// The service does not begin a device authorization because of what it was asked: the answer is a 400 that says so, and blames neither the
// refresh token nor the connector's secret.
func TestDeviceStartThatTheServiceRefuses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointDevice, Answer: oauth2test.InvalidScope, Times: 1})
		_, status, text := e.ask(logical.UpdateOperation, "tenants/acme/device", map[string]any{"connector": "as"})
		assert.Equal(t, 400, status)
		assert.Contains(t, text, "invalid_scope")
		assert.NotContains(t, text, `tenant "acme"`, "there is no such tenant yet")
	})
}

// The device authorization endpoint answers invalid_client, as some servers do where a client may not use this flow: the person reads what to
// do, and the connector's exchanges go on. Such a start takes no probe of a connector that the token endpoint has refused.
func TestDeviceStartShowsNothingAboutTheConnector(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		start := func() (status int, text string) {
			_, status, text = e.ask(logical.UpdateOperation, "tenants/acme/device", map[string]any{"connector": "as"})
			return status, text
		}
		e.write("tenants/beta", map[string]any{"connector": "as", "refresh_token": e.server.Grant(e.clientID, "bob", "offline_access"), "verify": false})
		e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointDevice, Answer: oauth2test.InvalidClient, Times: 1})
		status, text := start()
		assert.Equal(t, 400, status)
		assert.Contains(t, text, "has to check that this client may use the device flow")
		e.read("creds/beta")

		e.server.Inject(oauth2test.Fault{Answer: oauth2test.InvalidClient, Times: 1})
		_, status, _ = e.try(logical.UpdateOperation, "tenants/beta/refresh", nil)
		require.Equal(t, 400, status)
		time.Sleep(probeEvery - time.Second)
		calls := len(e.server.Calls())
		for range 20 {
			status, text = start()
			assert.Equal(t, 400, status)
			assert.Contains(t, text, "refuses connector")
			time.Sleep(time.Second)
		}
		assert.Len(t, e.server.Calls(oauth2test.EndpointDevice), 1)
		e.ok(logical.UpdateOperation, "tenants/beta/refresh", nil)
		assert.Len(t, e.server.Calls(), calls+1)
	})
}

// A device authorization that begins while the token endpoint refuses the connector does not accept the connector.
func TestDeviceStartDuringARefusalAcceptsNoConnector(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		e.write("tenants/beta", map[string]any{"connector": "as", "refresh_token": e.server.Grant(e.clientID, "bob", "offline_access"), "verify": false})
		e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointDevice, Delay: 2 * time.Second, Times: 1})
		e.server.Inject(oauth2test.Fault{Answer: oauth2test.InvalidClient, Times: 1})
		var starts sync.WaitGroup
		starts.Go(func() { e.start(byDevice, nil) })
		time.Sleep(time.Second)
		_, status, _ := e.try(logical.ReadOperation, "creds/beta", nil)
		require.Equal(t, 400, status)
		starts.Wait()
		_, status, _ = e.try(logical.ReadOperation, "creds/beta", nil)
		assert.Equal(t, 400, status)
	})
}

// A start that cannot lead to a grant asks nothing of the service: storage cannot say whether there is a tenant, or memory keeps a grant that
// will end the attempt.
func TestStartsThatAskNothingOfTheService(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		e.storage.refuse("get", tenantPrefix)
		_, status, _ := e.ask(logical.UpdateOperation, "tenants/acme/device", map[string]any{"connector": "as"})
		assert.Equal(t, 500, status)
		assert.Empty(t, e.server.Calls())
		e.storage.heal()

		e.write("config/as", map[string]any{"confirm": false})
		e.write("tenants/acme", map[string]any{"connector": "as", "refresh_token": e.server.Grant(e.clientID, "bob", "offline_access"), "verify": false})
		back := e.authorize(nil)
		e.failPuts()
		e.open(back)
		require.NotNil(t, e.tenants.named("acme").view.Load().kept)
		calls := len(e.server.Calls())
		_, status, text := e.ask(logical.UpdateOperation, "tenants/acme/device", nil)
		assert.Equal(t, 503, status)
		assert.Contains(t, text, "has not taken the new tokens")
		assert.Len(t, e.server.Calls(), calls)
	})
}

// Requests with a name that nothing can have do not ask storage, which in Vault refuses such keys.
func TestNamesThatAreNoneAskNoStorage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		e.pass(time.Minute)
		e.storage.failWith(func(op, key string) error {
			t.Error(op, key)
			return nil
		})
		for _, path := range []string{"tenants/a..b", "tenants/a..b/authorize", "tenants/a..b/device", "config/a..b"} {
			_, status, _ := e.ask(logical.ReadOperation, path, nil)
			assert.Equal(t, 404, status, path)
		}
		for _, path := range []string{"tenants/a..b", "config/a..b"} {
			_, status, _ := e.try(logical.DeleteOperation, path, nil)
			assert.Equal(t, 204, status, path)
		}
		for _, path := range []string{"tenants/a..b", "config/a..b"} {
			_, status, _ := e.try(logical.UpdateOperation, path, map[string]any{"refresh_token": "x", "connector_id": "i"})
			assert.Equal(t, 400, status, path)
		}
		e.storage.heal()
		_, status, text := e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": "x", "connector": "a..b"})
		assert.Equal(t, 400, status)
		assert.Contains(t, text, "the name of a connector has")
	})
}

// The service does not answer the start of a device authorization: the answer is a 503 that says so.
func TestDeviceStartThatTheServiceDoesNotAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointDevice, Hang: true})
		_, status, text := e.ask(logical.UpdateOperation, "tenants/acme/device", map[string]any{"connector": "as"})
		assert.Equal(t, 503, status)
		assert.Contains(t, text, "has not answered in time: try again")
	})
}

// The service is failing and asks for a day's rest. The engine rests for ten minutes, as with every call, and then asks again whether the
// person has decided.
func TestPollsGoOnAfterAFailureThatAsksForADay(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newGrantEngine(t, func(o *oauth2test.Options) { oauth2test.ClassA(o); o.DeviceLife = 30 * time.Minute })
		code := e.start(byDevice, nil)["user_code"].(string)
		e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointToken, Times: 1, Answer: oauth2test.Answer{Status: 503, Header: http.Header{"Retry-After": {"86400"}}}})
		e.pass(time.Minute)
		require.NoError(t, e.server.ApproveDevice(code, "jane"))
		e.pass(8 * time.Minute)
		assert.Equal(t, attemptPending, e.attemptStatus(byDevice))
		e.pass(2 * time.Minute)
		assert.Equal(t, attemptGranted, e.attemptStatus(byDevice))
	})
}

// Storage is slow to take the pause that the service has asked for in its answer to a poll. The next poll begins meanwhile, and it is under
// way when the code's time ends: what it brings is stored, as it is without a pause.
func TestPollUnderWayWhileTheVerdictOfTheOneBeforeIsStored(t *testing.T) {
	for name, slow := range map[string]bool{"storage works": false, "storage hangs": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newGrantEngine(t)
				code := e.start(byDevice, nil)["user_code"].(string)
				time.Sleep(9*time.Minute + 39*time.Second)
				e.server.Inject(oauth2test.Fault{
					Endpoint: oauth2test.EndpointToken, Times: 1,
					Answer: oauth2test.Answer{Status: 503, Header: http.Header{"Retry-After": {"2"}}},
				})
				if slow {
					until := time.Now().Add(13 * time.Second)
					e.storage.surround(func(op, key string, do func() error) error {
						if isWrite(op) && e.server.TotalExchanges() == 0 && len(e.polls()) >= 116 {
							time.Sleep(max(0, time.Until(until)))
						}
						return do()
					})
				}
				time.Sleep(2 * time.Second)
				polls := len(e.polls())
				require.Equal(t, 116, polls)
				require.NoError(t, e.server.ApproveDevice(code, "jane"))
				e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointToken, Times: 1, Hold: true})
				time.Sleep(12 * time.Second)
				require.Equal(t, polls+1, len(e.polls()), "the next poll is under way")
				all, err := e.attemptsOf(t.Context(), "acme")
				require.NoError(t, err)
				assert.True(t, e.grants.works(all.Last[byDevice].ID))
				time.Sleep(8 * time.Second) // the code's time ends
				e.attendGrants()
				e.server.ClearFaults()
				time.Sleep(30 * time.Second)
				assert.Equal(t, attemptGranted, e.attemptStatus(byDevice))
				assert.NotNil(t, e.stored("acme"))
			})
		})
	}
}
