package backend

import (
	"fmt"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

const deviceGrant = "urn:ietf:params:oauth:grant-type:device_code"

// polls returns the times of the polls that the server got.
func (e *grantEngine) polls() (at []time.Time) {
	for _, call := range e.server.Calls(oauth2test.EndpointToken) {
		if call.GrantType == deviceGrant {
			at = append(at, call.Start)
		}
	}
	return at
}

// gaps are the times between polls.
func gaps(at []time.Time) (all []time.Duration) {
	for i := range at[1:] {
		all = append(all, at[i+1].Sub(at[i]))
	}
	return all
}

func TestDeviceFlow(t *testing.T) {
	for name, url := range map[string]bool{"verification_uri": false, "verification_url": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newGrantEngine(t, func(o *oauth2test.Options) { o.VerificationURL = url })
				begun := time.Now()
				started := e.start(byDevice, map[string]any{"connector": "as", "scopes": []any{"openid,offline_access"}})
				code := started["user_code"].(string)
				assert.Equal(t, map[string]any{
					"user_code": code, "verification_uri": e.server.VerificationURL(),
					"verification_uri_complete": e.server.VerificationURL() + "?user_code=" + code,
					"expire_time":               stamp(begun.Add(10 * time.Minute)),
				}, started)
				time.Sleep(time.Minute)
				assert.Equal(t, attemptPending, e.attemptStatus(byDevice))
				assert.Equal(t, "pending", e.attempt(byDevice)["status"])
				require.NoError(t, e.server.ApproveDevice(code, "jane"))
				time.Sleep(6 * time.Second)
				assert.Equal(t, attemptGranted, e.attemptStatus(byDevice))
				for _, gap := range gaps(append([]time.Time{begun}, e.polls()...)) {
					assert.Equal(t, 5*time.Second, gap)
				}
				tenant := e.read("tenants/acme")
				assert.Equal(t, "token-ada", tenant["granted_by"])
				assert.Equal(t, oauth2test.Subject("jane"), tenant["subject"])
				assert.True(t, e.server.Alive(accessTokenOf(e.lease("acme"))))
				assert.Zero(t, e.server.TotalExchanges())

				polls := len(e.polls())
				e.pass(time.Hour)
				assert.Len(t, e.polls(), polls, "no more polls")
				assert.Empty(t, e.grants.polls)
				assert.NotContains(t, e.storedText(), stateKeys)
			})
		})
	}
}

func TestHowDeviceFlowsEnd(t *testing.T) {
	for name, c := range map[string]struct {
		during func(e *grantEngine, code string)
		wait   time.Duration
		status string
		says   string
		polls  int // the most polls after during
	}{
		"denied": {func(e *grantEngine, code string) { require.NoError(e.t, e.server.DenyDevice(code)) }, 0, attemptDenied, "", 1},
		"declined": {func(e *grantEngine, _ string) {
			e.server.Inject(oauth2test.Fault{Answer: oauth2test.Answer{Status: 400, Body: `{"error":"authorization_declined"}`}})
		}, 0, attemptDenied, "", 1},
		"expired here": {func(*grantEngine, string) {}, 10 * time.Minute, attemptExpired, "", 120},
		"expired there": {func(e *grantEngine, _ string) {
			e.server.Inject(oauth2test.Fault{Answer: oauth2test.Answer{Status: 400, Body: `{"error":"expired_token"}`}})
		}, 0, attemptExpired, "", 1},
		"refused": {func(e *grantEngine, _ string) { e.server.Inject(oauth2test.Fault{Answer: oauth2test.InvalidGrant}) }, 0, attemptFailed, "refuses the device code", 1},
		"no refresh token": {func(e *grantEngine, code string) {
			e.server.Set(func(o *oauth2test.Options) {
				o.Edit = func(_ oauth2test.Endpoint, fields map[string]any) { delete(fields, "refresh_token") }
			})
			require.NoError(e.t, e.server.ApproveDevice(code, "jane"))
		}, 0, attemptFailed, "offline_access", 1},
		"a newer attempt": {func(e *grantEngine, _ string) { e.start(byCode, nil) }, 0, attemptSuperseded, "", 0},
		"a write": {func(e *grantEngine, _ string) {
			e.write("tenants/acme", map[string]any{"refresh_token": e.newToken("acme")})
		}, 0, attemptSuperseded, "", 0},
		"a delete": {func(e *grantEngine, _ string) {
			e.addTenant("acme")
			e.ok(logical.DeleteOperation, "tenants/acme", nil)
		}, 0, attemptSuperseded, "", 0},
		"an outage to the end":       {func(e *grantEngine, _ string) { e.server.Inject(oauth2test.Fault{Answer: oauth2test.BadGateway}) }, 10 * time.Minute, attemptExpired, "", 20},
		"the connector is another's": {func(e *grantEngine, _ string) { e.write("config/as", map[string]any{"service": "kaizala"}) }, 0, attemptFailed, "another service", 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newGrantEngine(t)
				code := e.start(byDevice, nil)["user_code"].(string)
				e.pass(7 * time.Second)
				before := len(e.polls())
				c.during(e, code)
				e.pass(max(c.wait, 7*time.Second))
				assert.Equal(t, c.status, e.attemptStatus(byDevice))
				text, _ := e.attempt(byDevice)["last_error"].(string)
				assert.Contains(t, text, c.says)
				assert.LessOrEqual(t, len(e.polls())-before, c.polls)
				calls := len(e.server.Calls())
				e.server.ClearFaults()
				e.pass(time.Hour)
				assert.Len(t, e.server.Calls(), calls)
				assert.Equal(t, c.status, e.attemptStatus(byDevice))
				assert.Empty(t, e.grants.polls)
			})
		})
	}
}

// While the person has not decided, the polls change nothing about the connector or the tenant. slow_down makes the interval longer,
// also in the next process, which waits for a full interval before its first poll.
func TestPollsThatAreToWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		e.write("tenants/acme", map[string]any{"connector": "as", "refresh_token": e.server.Grant(e.clientID, "bob", "offline_access")})
		connector, tenant := e.read("config/as"), e.read("tenants/acme")
		slow := oauth2test.Answer{Status: 400, Header: http.Header{"Retry-After": {"3600"}}, Body: `{"error":"slow_down"}`}
		e.server.Inject(oauth2test.Fault{Answer: slow, Times: 2})
		code := e.start(byDevice, nil)["user_code"].(string)
		time.Sleep(66 * time.Second)
		assert.Equal(t, []time.Duration{10 * time.Second, 15 * time.Second, 15 * time.Second, 15 * time.Second}, gaps(e.polls()))
		assert.Equal(t, connector, e.read("config/as"))
		assert.Equal(t, tenant, e.read("tenants/acme"))

		e.crash()
		restarted := time.Now()
		e.minute()
		polls := len(e.polls())
		time.Sleep(14 * time.Second)
		assert.Len(t, e.polls(), polls, "the first poll comes after a full interval")
		time.Sleep(2 * time.Second)
		assert.Equal(t, []time.Time{restarted.Add(15 * time.Second)}, e.polls()[polls:])
		require.NoError(t, e.server.ApproveDevice(code, "jane"))
		time.Sleep(15 * time.Second)
		assert.Equal(t, attemptGranted, e.attemptStatus(byDevice))
	})
}

// A poll that is not permitted, because the service has asked for a pause, waits for its end: meanwhile polling costs nothing.
func TestPollsDuringAPause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		e.write("tenants/beta", map[string]any{"connector": "as", "refresh_token": e.server.Grant(e.clientID, "bob", "offline_access"), "verify": false})
		code := e.start(byDevice, nil)["user_code"].(string)
		e.server.Inject(oauth2test.Fault{
			Endpoint: oauth2test.EndpointToken, Times: 1,
			Answer: oauth2test.Answer{Status: 429, Header: http.Header{"Retry-After": {"300"}}, Body: `{"error":"temporarily_unavailable"}`},
		})
		_, status, _ := e.try(logical.ReadOperation, "creds/beta", nil)
		require.Equal(t, 429, status)
		time.Sleep(15 * time.Second)
		require.Empty(t, e.polls())
		operations := e.storage.ops.Load()
		time.Sleep(4 * time.Minute)
		assert.Equal(t, operations, e.storage.ops.Load())
		require.NoError(t, e.server.ApproveDevice(code, "jane"))
		time.Sleep(time.Minute)
		assert.Equal(t, attemptGranted, e.attemptStatus(byDevice))
	})
}

// After a restart the polls go on one interval after the start, without a call of the periodic function.
func TestPollsGoOnWithTheStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		code := e.start(byDevice, nil)["user_code"].(string)
		time.Sleep(7 * time.Second)
		e.crash()
		restarted, polls := time.Now(), len(e.polls())
		require.NoError(t, e.server.ApproveDevice(code, "jane"))
		time.Sleep(6 * time.Second)
		assert.Equal(t, []time.Time{restarted.Add(5 * time.Second)}, e.polls()[polls:])
		assert.Equal(t, attemptGranted, e.attemptStatus(byDevice))
	})
}

// The polls go on after an outage, a 429 or a 503, while the code has not expired.
func TestPollsGoOnAfterAnOutage(t *testing.T) {
	for name, answer := range map[string]oauth2test.Answer{
		"outage": oauth2test.BadGateway, "limit": oauth2test.TooManyRequests(30 * time.Second), "rest": oauth2test.Unavailable(30 * time.Second),
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newGrantEngine(t)
				code := e.start(byDevice, nil)["user_code"].(string)
				require.NoError(t, e.server.ApproveDevice(code, "jane"))
				e.server.Inject(oauth2test.Fault{Answer: answer, Times: 3})
				time.Sleep(5 * time.Minute)
				assert.Equal(t, attemptGranted, e.attemptStatus(byDevice))
				for i, gap := range gaps(e.polls()) {
					assert.GreaterOrEqual(t, gap, 10*time.Second<<min(i, 2), "each failure doubles the wait")
				}
			})
		})
	}
}

// The connector is deleted for a while: the attempt stays pending, and the polls go on when the connector is there again.
func TestPollsGoOnOnceTheConnectorIsThere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		code := e.start(byDevice, nil)["user_code"].(string)
		require.NoError(t, e.server.ApproveDevice(code, "jane"))
		entry := e.get("config/as")
		e.ok(logical.DeleteOperation, "config/as", nil)
		time.Sleep(30 * time.Second)
		assert.Empty(t, e.polls())
		assert.Equal(t, attemptPending, e.attemptStatus(byDevice))
		e.put("config/as", []byte(entry))
		e.InvalidateKey(t.Context(), "config/as")
		time.Sleep(time.Minute)
		assert.Equal(t, attemptGranted, e.attemptStatus(byDevice))
	})
}

// All polls of a connector together take a fifth of its share.
func TestPollsTakeAFifthOfTheShare(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		var codes []string
		for i := range 20 {
			resp, status, text := e.ask(logical.UpdateOperation, fmt.Sprintf("tenants/t%d/device", i), map[string]any{"connector": "as"})
			require.Equal(t, 200, status, text)
			codes = append(codes, resp.Data["user_code"].(string))
		}
		e.write("config/as", map[string]any{"exchanges_per_minute": 50})
		e.server.ResetCalls()
		e.pass(4 * time.Minute)
		at := e.polls()
		for i := range at {
			n := 0
			for _, other := range at[i:] {
				if other.Sub(at[i]) < time.Minute {
					n++
				}
			}
			assert.LessOrEqual(t, n, 10)
		}
		assert.Greater(t, len(at), 30)
		assert.Equal(t, 2*time.Minute, e.grants.turn(e.grants.polls["t0"], e.connectors.present("as")), "20 attempts share 10 polls a minute")
		e.write("config/other", map[string]any{"service": "oauth2", "token_url": e.server.TokenURL(), "connector_id": "x", "connector_secret": "y"})
		other, err := e.connectors.of(t.Context(), "other")
		require.NoError(t, err)
		assert.Zero(t, e.grants.turn(&poll{}, other), "no attempt of this connector is polled")
		for _, code := range codes {
			require.NoError(t, e.server.ApproveDevice(code, "jane"))
		}
		e.pass(5 * time.Minute)
		for i := range codes {
			resp, _, _ := e.ask(logical.ReadOperation, fmt.Sprintf("tenants/t%d/device", i), nil)
			assert.Equal(t, attemptGranted, resp.Data["status"], "each attempt is polled in time, however late")
		}
	})
}

// A start that the service or the engine refuses does not end a pending attempt.
func TestDeviceFlowsThatDoNotBegin(t *testing.T) {
	for name, c := range map[string]struct {
		change func(e *grantEngine)
		status int
		says   string
	}{
		"no address":   {func(e *grantEngine) { e.write("config/as", map[string]any{"device_authorization_url": nil}) }, 400, "device_authorization_url"},
		"no secret":    {func(e *grantEngine) { e.write("config/as", map[string]any{"connector_secret": ""}) }, 400, "connector_secret"},
		"wrong secret": {func(e *grantEngine) { e.server.NewClientSecret(e.clientID) }, 400, "refuses connector"},
		"outage": {func(e *grantEngine) {
			e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointDevice, Answer: oauth2test.BadGateway})
		}, 503, "nothing was begun"},
		"limit": {func(e *grantEngine) {
			e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointDevice, Answer: oauth2test.TooManyRequests(time.Minute)})
		}, 429, "try again in"},
		"a scope that it has not": {func(e *grantEngine) { e.write("config/as", map[string]any{"scopes": "openid"}) }, 400, "each of scopes has to be one of"},
		"written meanwhile": {func(e *grantEngine) {
			e.storage.once("put", callPrefix, func() { e.write("config/as", map[string]any{"request_timeout": "6s"}) })
		}, 503, "was written meanwhile"},
		"refused": {func(e *grantEngine) {
			e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointDevice, Answer: oauth2test.InvalidScope})
		}, 400, "invalid_scope"},
		"storage fails": {func(e *grantEngine) { e.storage.refuse("put", callPrefix) }, 500, "storage"},
		"hang": {func(e *grantEngine) {
			e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointDevice, Hang: true})
		}, 503, ""},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newGrantEngine(t)
				back := e.authorize(nil)
				c.change(e)
				begun := time.Now()
				_, status, text := e.ask(logical.UpdateOperation, "tenants/acme/device", map[string]any{"connector": "as", "scopes": "openid,read"})
				assert.Equal(t, c.status, status, text)
				assert.Contains(t, text, c.says)
				assert.LessOrEqual(t, time.Since(begun), 10*time.Second)
				_, status, _ = e.ask(logical.ReadOperation, "tenants/acme/device", nil)
				assert.Equal(t, 404, status)
				assert.Equal(t, attemptPending, e.attemptStatus(byCode))
				e.server.ClearFaults()
				e.write("config/as", map[string]any{"connector_secret": e.clientSecret})
				_ = back
			})
		})
	}
}

// A newer attempt, a write or a delete comes while a poll waits for its call: the poll is not made.
func TestPollIsOvertaken(t *testing.T) {
	for name, overtake := range map[string]func(*grantEngine){
		"newer attempt": func(e *grantEngine) { e.start(byCode, nil) },
		"write":         func(e *grantEngine) { e.addTenant("acme") },
		"delete":        func(e *grantEngine) { e.ok(logical.DeleteOperation, "tenants/acme", nil) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newGrantEngine(t)
				if name == "delete" {
					e.addTenant("acme")
				}
				e.start(byDevice, nil)
				e.server.ResetCalls()
				over := e.storage.once("put", callPrefix, func() { overtake(e) })
				time.Sleep(time.Minute)
				synctest.Wait()
				assert.True(t, over())
				assert.Empty(t, e.polls())
			})
		})
	}
}

// The answer to a poll of an older attempt does not change the polls of the newer one.
func TestAnswerToAnOlderPoll(t *testing.T) {
	for name, answer := range map[string]oauth2test.Answer{
		"denied":    {Status: 400, Body: `{"error":"access_denied"}`},
		"slow down": {Status: 400, Body: `{"error":"slow_down"}`},
		"pending":   {Status: 400, Body: `{"error":"authorization_pending"}`},
		"outage":    oauth2test.BadGateway,
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newGrantEngine(t)
				e.start(byDevice, nil)
				e.server.Inject(oauth2test.Fault{Delay: 3 * time.Second, Answer: answer, Times: 1})
				time.Sleep(6 * time.Second)
				code := e.start(byDevice, nil)["user_code"].(string)
				begun, polls := time.Now(), len(e.polls())
				time.Sleep(11 * time.Second)
				assert.Equal(t, []time.Time{begun.Add(5 * time.Second), begun.Add(10 * time.Second)}, e.polls()[polls:])
				require.NoError(t, e.server.ApproveDevice(code, "jane"))
				time.Sleep(5 * time.Second)
				assert.Equal(t, attemptGranted, e.attemptStatus(byDevice))
			})
		})
	}
}

// A person approves just before the code expires, and the answer to the poll comes after that: the tenant is connected.
func TestPollInTheLastMoments(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		code := e.start(byDevice, nil)["user_code"].(string)
		time.Sleep(10*time.Minute - 9*time.Second)
		require.NoError(t, e.server.ApproveDevice(code, "jane"))
		e.server.Inject(oauth2test.Fault{Hold: true, Times: 1})
		time.Sleep(10 * time.Second)
		e.minute()
		synctest.Wait()
		assert.Equal(t, attemptPending, e.attemptStatus(byDevice))
		e.server.ClearFaults()
		synctest.Wait()
		assert.Equal(t, attemptGranted, e.attemptStatus(byDevice))
	})
}

// Storage cannot be read for a while: the attempt stays pending, and the polls go on when storage works again.
func TestPollsGoOnOnceStorageIsThere(t *testing.T) {
	for _, key := range []string{attemptKeys, tenantPrefix} {
		synctest.Test(t, func(t *testing.T) {
			e := newGrantEngine(t)
			code := e.start(byDevice, nil)["user_code"].(string)
			require.NoError(t, e.server.ApproveDevice(code, "jane"))
			e.storage.refuse("get", key)
			e.pass(2 * time.Minute)
			assert.Empty(t, e.polls())
			e.storage.heal()
			e.pass(2 * time.Minute)
			assert.Equal(t, attemptGranted, e.attemptStatus(byDevice), key)
		})
	}
}
