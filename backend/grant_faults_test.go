package backend

import (
	"errors"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/kaizala/kaizalatest"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// Storage fails while a callback is checked: the answer is an error of the server, and the link works when storage does.
func TestCallbackWhileStorageFails(t *testing.T) {
	for _, fails := range []string{"get " + stateKeys, "get " + attemptKeys, "get " + tenantPrefix, "get " + connectorPrefix, "put " + attemptKeys} {
		t.Run(fails, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newGrantEngine(t)
				back := e.authorize(nil)
				e.crash()
				synctest.Wait()
				op, key, _ := strings.Cut(fails, " ")
				e.storage.refuse(op, key)
				_, status, _ := e.ask(logical.ReadOperation, "callback", back)
				assert.Equal(t, http.StatusInternalServerError, status)
				if op == "get" {
					_, status, _ = e.ask(logical.UpdateOperation, "callback", back)
					assert.Equal(t, http.StatusInternalServerError, status)
				}
				assert.Empty(t, e.server.Calls(oauth2test.EndpointToken))
				e.storage.heal()
				p := e.open(back)
				assert.Contains(t, p.text(), "Service the authorization server as.example", "the connector was read again")
				assert.Equal(t, 200, e.confirm(back).status)
				assert.Equal(t, attemptGranted, e.attemptStatus(byCode))
			})
		})
	}
}

// The link of an attempt that a newer attempt has ended connects nothing, also if storage did not take the end of its state. A link
// whose attempt is not in storage connects nothing either.
func TestOlderStateWhoseEndIsNotNoted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		older := e.authorize(nil)
		e.storage.failWith(func(op, key string) error {
			if op == "put" && key == stateKeys+hashOf(older["state"].(string)) {
				return errStorage
			}
			return nil
		})
		newer := e.authorize(nil)
		e.storage.heal()
		refused := func(back map[string]any) {
			t.Helper()
			assert.Contains(t, e.open(back).text(), "out of date")
			_, status, _ := e.ask(logical.UpdateOperation, "callback", back)
			assert.Equal(t, 400, status)
			assert.Zero(t, e.sent(codeGrant))
		}
		refused(older)
		entry := e.get(attemptKeys + "acme")
		require.NoError(t, e.storage.InmemStorage.Delete(t.Context(), attemptKeys+"acme"))
		refused(newer)
		e.put(attemptKeys+"acme", []byte(entry))
		assert.Equal(t, 200, e.confirm(newer).status)
	})
}

// Storage takes a state and reports an error: the state is deleted in time like any other.
func TestStateThatStorageTakesAndDoesNotSaySo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		e.minute()
		e.storage.unheard("put", stateKeys)
		_, status, _ := e.ask(logical.UpdateOperation, "tenants/acme/authorize", map[string]any{"connector": "as"})
		require.Equal(t, 500, status)
		e.storage.heal()
		require.Contains(t, e.storedText(), stateKeys)
		e.pass(attemptLife + statesKnown + time.Minute)
		assert.NotContains(t, e.storedText(), stateKeys)
		assert.Empty(t, e.grants.due)
	})
}

// A config write or delete comes while a code or a PIN waits for its call: the call uses the connector as it is then. If that is not
// possible, the call is not made, and can be made when the connector is as it was before.
func TestConfigWriteOvertakesACodeOrAPIN(t *testing.T) {
	for path, flow := range map[string]struct {
		config string
		other  map[string]any // a write that gives the connector another service
		begin  func(*grantEngine) (finish func() (int, string))
		sent   func(*grantEngine) int
	}{
		byCode: {"config/as", map[string]any{"service": "kaizala"}, func(e *grantEngine) func() (int, string) {
			back := e.authorize(nil)
			return func() (int, string) {
				_, status, text := e.ask(logical.UpdateOperation, "callback", back)
				return status, text
			}
		}, func(e *grantEngine) int { return e.sent(codeGrant) }},
		byPIN: {"config", map[string]any{"service": "oauth2", "token_url": "https://as.example/token"}, func(e *grantEngine) func() (int, string) {
			e.phone()
			return func() (int, string) {
				_, status, text := e.pin(map[string]any{"pin": e.sentPIN()})
				return status, text
			}
		}, func(e *grantEngine) int { return e.pinCalls(redeemPINPath) }},
	} {
		for name, c := range map[string]struct {
			change func(*grantEngine)
			status int
			says   string
		}{
			"written":         {func(e *grantEngine) { e.write(flow.config, map[string]any{"request_timeout": "6s"}) }, 200, ""},
			"deleted":         {func(e *grantEngine) { e.ok(logical.DeleteOperation, flow.config, nil) }, 400, "is not configured"},
			"another service": {func(e *grantEngine) { e.write(flow.config, flow.other) }, 400, "does not offer " + path},
		} {
			t.Run(path+"/"+name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					e := newGrantEngine(t)
					finish := flow.begin(e)
					key := connectorPrefix + strings.TrimPrefix(strings.TrimPrefix(flow.config, "config"), "/")
					if flow.config == "config" {
						key = connectorPrefix + defaultConnector
					}
					entry := e.get(key)
					over := e.storage.once("put", callPrefix, func() { c.change(e) })
					status, text := finish()
					assert.True(t, over())
					require.Equal(t, c.status, status, text)
					assert.Contains(t, text, c.says)
					if c.status != 200 {
						assert.Zero(t, flow.sent(e))
						e.put(key, []byte(entry))
						e.InvalidateKey(t.Context(), key)
						status, text = finish()
						require.Equal(t, 200, status, text)
					}
					assert.Equal(t, 1, flow.sent(e))
					assert.Equal(t, "token-ada", e.stored("acme").GrantedBy)
				})
			})
		}
	}
}

// An operator writes the tenant while a code waits for its call: the code is not sent, whether or not storage has taken the end of the
// attempt.
func TestWriteOvertakesACode(t *testing.T) {
	for _, noted := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			e := newGrantEngine(t)
			back := e.authorize(nil)
			over := e.storage.once("put", callPrefix, func() {
				if !noted {
					e.storage.refuse("put", attemptKeys)
				}
				e.addTenant("acme")
				e.storage.failWith(nil)
			})
			_, status, text := e.ask(logical.UpdateOperation, "callback", back)
			assert.True(t, over())
			assert.Equal(t, 400, status, text)
			assert.Zero(t, e.sent(codeGrant))
			assert.Empty(t, e.stored("acme").GrantedBy)
		})
	}
}

// Storage does not answer the write of an attempt: other requests wait for ten seconds at most, and a delete succeeds.
func TestAttemptBehindAHangingWrite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		e.addTenant("acme")
		reached, release := e.storage.hold("put", attemptKeys)
		begun := make(chan int)
		go func() {
			_, status, _ := e.ask(logical.UpdateOperation, "tenants/acme/authorize", map[string]any{"connector": "as"})
			begun <- status
		}()
		<-reached
		before := time.Now()
		_, status, text := e.ask(logical.UpdateOperation, "tenants/acme/authorize", map[string]any{"connector": "as"})
		assert.Equal(t, 503, status)
		assert.Contains(t, text, "has not finished in time")
		_, status, text = e.ask(logical.DeleteOperation, "tenants/acme", nil)
		assert.Equal(t, 204, status, text)
		assert.LessOrEqual(t, time.Since(before), 20*time.Second)
		release()
		assert.Equal(t, 200, <-begun)
		assert.Equal(t, attemptSuperseded, e.attemptStatus(byCode))
	})
}

// A delete fails if storage does not take the end of the tenant's attempts, and the next delete succeeds.
func TestDeleteWhoseAttemptsStorageCannotEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		e.addTenant("acme")
		e.start(byDevice, nil)
		e.storage.refuse("put", attemptKeys)
		_, status, _ := e.ask(logical.DeleteOperation, "tenants/acme", nil)
		assert.Equal(t, 500, status)
		e.storage.heal()
		e.ok(logical.DeleteOperation, "tenants/acme", nil)
		assert.Equal(t, attemptSuperseded, e.attemptStatus(byDevice))
		assert.NotContains(t, e.storedText(), `"device_code"`)
	})
}

// Memory keeps a refresh token that an exchange has brought and storage has not taken: a pending attempt of the tenant stays pending.
func TestAttemptBesideAKeptRotation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		e.write("tenants/acme", map[string]any{"connector": "as", "refresh_token": e.server.Grant(e.clientID, "bob", "offline_access")})
		back := e.authorize(nil)
		e.failPuts()
		_, status, _ := e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
		require.Equal(t, 503, status)
		require.NotNil(t, e.tenants.named("acme").view.Load().kept)
		assert.Equal(t, attemptPending, e.attemptStatus(byCode))
		for _, key := range []string{tenantPrefix, attemptKeys} {
			e.storage.refuse("get", key)
			e.InvalidateKey(t.Context(), tenantPrefix+"acme")
			_, status, _ = e.ask(logical.ReadOperation, "tenants/acme/authorize", nil)
			assert.Equal(t, 500, status, "the status cannot be read")
		}
		e.storage.heal()
		time.Sleep(20 * time.Second)
		assert.Nil(t, e.tenants.named("acme").view.Load().kept)
		assert.Equal(t, attemptPending, e.attemptStatus(byCode))
		p := e.confirm(back)
		assert.Equal(t, 200, p.status, p.text())
	})
}

// A grant is stored when storage can be read again. If storage cannot be read for more than a minute, the access token is revoked, and
// the person has to start again.
func TestGrantWhileStorageCannotBeRead(t *testing.T) {
	for _, c := range []struct {
		op, key string
		lasts   time.Duration
		status  string
	}{
		{"get", attemptKeys, 20 * time.Second, attemptGranted}, {"get", attemptKeys, 70 * time.Second, attemptFailed},
		{"get", tenantPrefix, 20 * time.Second, attemptGranted}, {"get", tenantPrefix, 70 * time.Second, attemptFailed},
		{"list", intentPrefix, 20 * time.Second, attemptGranted}, {"list", intentPrefix, 70 * time.Second, attemptFailed},
	} {
		t.Run(c.op+" "+c.key+" "+c.lasts.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newGrantEngine(t)
				e.write("config/as", map[string]any{"revocation": "access_token", "exchange_invalidates": false})
				back := e.authorize(nil)
				next := &storage{InmemStorage: e.storage.InmemStorage}
				next.refuse("list", intentPrefix) // so the intents are read when the grant is stored
				synctest.Wait()
				e.crashOnto(next)
				synctest.Wait()
				next.failWith(func(op, key string) error {
					if op == c.op && strings.HasPrefix(key, c.key) && e.server.CurrentRefreshToken("jane") != "" {
						return errStorage
					}
					return nil
				})
				e.server.Inject(oauth2test.Fault{Delay: time.Millisecond, Times: 1})
				_, status, text := e.ask(logical.UpdateOperation, "callback", back)
				assert.Equal(t, 200, status, text)
				time.Sleep(c.lasts - answerWithin)
				e.storage.heal()
				time.Sleep(time.Minute)
				e.pass(time.Minute)
				assert.Equal(t, c.status, e.attemptStatus(byCode))
				if c.status == attemptGranted {
					assert.Equal(t, statusOK, e.status("acme"))
					assert.True(t, e.server.Alive(e.read("token/acme")["access_token"].(string)))
					assert.Zero(t, e.server.TotalExchanges(), "the access token that came with the code is used")
					return
				}
				assert.Nil(t, e.stored("acme"))
				assert.Empty(t, e.server.AccessTokens("jane"))
			})
		})
	}
}

// A grant that can never be stored fails at once, and says why.
func TestGrantThatCannotBeStored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		back := e.authorize(nil)
		e.server.Inject(oauth2test.Fault{Delay: 3 * time.Second, Times: 1})
		go func() {
			time.Sleep(time.Second)
			e.ok(logical.DeleteOperation, "config/as", nil)
		}()
		begun := time.Now()
		_, status, text := e.ask(logical.UpdateOperation, "callback", back)
		assert.Equal(t, 400, status)
		assert.Contains(t, text, `could not be stored: connector "as" is not configured`)
		assert.Equal(t, 3*time.Second, time.Since(begun))
		assert.Equal(t, attemptFailed, e.attemptStatus(byCode))
	})
}

// A PIN has brought a refresh token, Kaizala fails its verification, and storage does not take it: it is stored unverified when storage
// works.
func TestPINWhileKaizalaAndStorageFail(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.phone()
		pin := e.sentPIN()
		e.kaizala.Inject(kaizalatest.Fault{Delay: time.Second, Process: true, Times: 1})
		e.storage.failWith(func(op, key string) error {
			if op == "put" && key == tenantPrefix+"acme" {
				return errors.New("the disk is full")
			}
			return nil
		})
		go func() {
			time.Sleep(500 * time.Millisecond)
			e.kaizala.Inject(kaizalatest.Fault{Status: 503})
		}()
		_, status, text := e.pin(map[string]any{"pin": pin})
		assert.Equal(t, 503, status, text)
		e.storage.heal()
		time.Sleep(time.Minute)
		require.NotNil(t, e.stored("acme"))
		assert.Equal(t, "token-ada", e.stored("acme").GrantedBy)
	})
}

// The service's answer to a grant also shows whether the service accepts the connector.
func TestGrantsShowWhetherTheConnectorIsGood(t *testing.T) {
	t.Run("good again", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			e := newGrantEngine(t)
			beta := map[string]any{"connector": "as", "refresh_token": e.server.Grant(e.clientID, "bob", "offline_access"), "verify": false}
			e.write("tenants/beta", beta)
			e.server.Inject(oauth2test.Fault{Times: 1, Answer: oauth2test.Answer{Status: 401, Body: `{"error": "invalid_client"}`}})
			_, status, _ := e.try(logical.ReadOperation, "creds/beta", nil)
			require.Equal(t, 400, status)
			e.ok(logical.DeleteOperation, "tenants/beta", nil) // an exchange of this tenant would show it too
			time.Sleep(probeEvery + time.Second)
			require.Equal(t, 200, e.confirm(e.authorize(nil)).status)
			e.write("tenants/beta", beta)
			e.read("creds/beta")
		})
	})
	t.Run("refused", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			e := newConfiguredEngine(t)
			e.addTenant("beta")
			e.phone()
			e.kaizala.Inject(kaizalatest.Fault{Times: 1, Status: 401, Body: `{"errorCode":"Unauthenticated","message":"Dont have correct applicationId and secret in header!"}`})
			_, status, text := e.pin(map[string]any{"pin": e.sentPIN()})
			require.Equal(t, 400, status)
			assert.Contains(t, text, "refuses connector")
			calls := e.kaizala.CallCount()
			_, status, _ = e.try(logical.ReadOperation, "creds/beta", nil)
			assert.Equal(t, 400, status)
			assert.Equal(t, calls, e.kaizala.CallCount())
		})
	})
}

// A grant shows that the service accepts a refused connector again: the grant is stored although storage does not answer the write of
// the connector.
func TestGrantIsStoredBeforeTheVerdict(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		e.write("tenants/beta", map[string]any{"connector": "as", "refresh_token": e.server.Grant(e.clientID, "bob", "offline_access"), "verify": false})
		e.server.Inject(oauth2test.Fault{Times: 1, Answer: oauth2test.InvalidClient})
		_, status, _ := e.try(logical.ReadOperation, "creds/beta", nil)
		require.Equal(t, 400, status)
		e.ok(logical.DeleteOperation, "tenants/beta", nil) // an exchange of this tenant would show it too
		time.Sleep(probeEvery + time.Second)
		back := e.authorize(nil)
		reached, release := e.storage.hold("put", connectorPrefix)
		var callback sync.WaitGroup
		callback.Go(func() { e.confirm(back) })
		<-reached
		synctest.Wait()
		if entry := e.stored("acme"); assert.NotNil(t, entry) {
			assert.Equal(t, e.server.CurrentRefreshToken("jane"), entry.RefreshToken)
		}
		release()
		callback.Wait()
	})
}

// A start of a grant fails if storage fails to say whether another connector of the mount has the flow. A connector whose entry is no
// valid JSON counts as one without it.
func TestMixUpWhileStorageFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		ask := func() int {
			_, status, _ := e.ask(logical.UpdateOperation, "tenants/acme/authorize", map[string]any{"connector": "as"})
			return status
		}
		for _, op := range []string{"list", "get"} {
			e.storage.refuse(op, connectorPrefix)
			assert.Equal(t, 500, ask(), op)
		}
		e.storage.heal()
		e.put(connectorPrefix+"broken", []byte("{"))
		assert.Equal(t, 200, ask())
	})
}

// Requests with a name that no tenant can have are refused, and store and call nothing.
func TestGrantsOfANameThatIsNone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		for _, c := range []struct {
			op     logical.Operation
			path   string
			data   map[string]any
			status int
		}{
			{logical.UpdateOperation, byCode, map[string]any{"connector": "as"}, 400}, {logical.ReadOperation, byCode, nil, 404},
			{logical.UpdateOperation, byDevice, map[string]any{"connector": "as"}, 400}, {logical.ReadOperation, byDevice, nil, 404},
			{logical.UpdateOperation, byPIN, map[string]any{"mobile_number": e.kaizala.PhoneNumber("a")}, 400},
			{logical.UpdateOperation, byPIN, map[string]any{"pin": "123456"}, 400},
			{logical.UpdateOperation, "refresh", nil, 400},
		} {
			_, status, text := e.ask(c.op, "tenants/a..b/"+c.path, c.data)
			assert.Equal(t, c.status, status, c.path)
			if status == 400 {
				assert.Contains(t, text, "the name of a tenant has")
			}
		}
		for path, status := range map[string]int{"creds/a..b": 400, "token/a..b": 400, "tenants/a..b": 404} {
			_, got, _ := e.ask(logical.ReadOperation, path, nil)
			assert.Equal(t, status, got, path)
		}
		_, status, _ := e.try(logical.DeleteOperation, "tenants/a..b", nil)
		assert.Equal(t, 204, status)
		assert.Empty(t, e.server.Calls())
		assert.Zero(t, e.kaizala.CallCount())
		assert.NotContains(t, e.storedText(), "a..b")
	})
}

// If the service sends no verification_uri_complete, the answer has none.
func TestDeviceFlowWithoutACompleteAddress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t, func(o *oauth2test.Options) {
			o.Edit = func(_ oauth2test.Endpoint, fields map[string]any) { delete(fields, "verification_uri_complete") }
		})
		assert.NotContains(t, e.start(byDevice, nil), "verification_uri_complete")
	})
}
