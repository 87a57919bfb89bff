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

// The start of a grant warns of each live lease whose access token the grant ends, also where a newer one has replaced that.
func TestGrantsWarnOfLeases(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		e.write("config/as", map[string]any{"revocation": "access_token", "exchange_invalidates": false})
		e.write("tenants/acme", map[string]any{"connector": "as", "refresh_token": e.server.Grant(e.clientID, "acme"), "verify": false})
		warned := func() bool {
			resp, status, text := e.ask(logical.UpdateOperation, "tenants/acme/authorize", nil)
			require.Equal(t, 200, status, text)
			return len(resp.Warnings) > 0
		}
		e.read("token/acme")
		assert.False(t, warned(), "there is no lease")
		lease := e.lease("acme")
		assert.True(t, warned())
		time.Sleep(50 * time.Minute)
		require.NotEqual(t, accessTokenOf(lease), e.read("token/acme")["access_token"])
		assert.True(t, warned(), "a lease lives on the access token before")
		require.NoError(t, e.revokeLease(lease))
		assert.False(t, warned(), "its lease has ended")
		e.lease("acme")
		time.Sleep(50 * time.Minute)
		e.read("token/acme")
		time.Sleep(11 * time.Minute)
		e.read("token/acme")
		assert.False(t, warned(), "the access token before has expired, and with it its lease")
	})
}

// The answers of a device code's poll that say only "not yet" concern no other call through the connector, whatever their headers say.
func TestPollsThatWaitPauseNothing(t *testing.T) {
	for name, body := range map[string]string{"pending": `{"error":"authorization_pending"}`, "slow down": `{"error":"slow_down"}`} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newGrantEngine(t)
				e.write("tenants/other", map[string]any{"connector": "as", "refresh_token": e.server.Grant(e.clientID, "other"), "verify": false})
				e.start(byDevice, nil)
				e.server.Inject(oauth2test.Fault{Times: 1, Answer: oauth2test.Answer{
					Status: http.StatusForbidden, Body: body, Header: http.Header{"Retry-After": {"30"}},
				}})
				time.Sleep(6 * time.Second)
				require.Len(t, e.polls(), 1)
				e.read("creds/other")
			})
		})
	}
}

// A write that is to be verified through a connector without a client ID says what is missing, and does not say that the service has
// refused anything.
func TestVerifiedWriteNamesWhatIsMissing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		e.write("config/as", map[string]any{"connector_id": ""})
		_, status, text := e.ask(logical.UpdateOperation, "tenants/acme", map[string]any{"connector": "as", "refresh_token": "of jane"})
		assert.Equal(t, 400, status)
		assert.Equal(t, `nothing was stored: connector_id of connector "as" is missing: its owner has to write it to config/as first`, text)
		assert.Empty(t, e.server.Calls())
	})
}

// A code is sent once. Where the service fails or permits no call, the attempt says that another one is needed. Where the service refuses
// the code, it does not say so. A redirect that reports a failure of the service blames no setting.
func TestFailedGrantsSayToStartAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		const again = "A code is sent once: start again in Vault."
		for _, c := range []struct {
			answer oauth2test.Answer
			says   bool
		}{{oauth2test.BadGateway, true}, {oauth2test.InvalidGrant, false}, {oauth2test.TooManyRequests(30 * time.Second), true}} {
			back := e.authorize(nil)
			e.server.Inject(oauth2test.Fault{Answer: c.answer, Times: 1})
			assert.Equal(t, c.says, strings.Contains(e.confirm(back).text(), again), c.answer.Status)
			assert.Equal(t, c.says, strings.Contains(e.attempt(byCode)["last_error"].(string), again), c.answer.Status)
		}
		for _, code := range []string{"server_error", "temporarily_unavailable"} {
			back := e.authorize(nil)
			p := e.open(map[string]any{"state": back["state"], "error": code})
			assert.Equal(t, 400, p.status)
			assert.Contains(t, p.text(), "is failing ("+code+"): start again later.")
			assert.NotContains(t, p.text(), "settings")
		}
	})
}

// A person's browser gets a page for what is wrong in its address, too. A request for a wrapped answer does not: Vault would store it.
func TestPageForWhatIsGivenTwice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		twice := map[string]any{"state": []any{"a", "b"}, "code": "c"}
		p := e.open(twice)
		assert.Equal(t, 400, p.status)
		assert.Contains(t, p.text(), "Something is missing")
		_, status, text := e.ask(logical.UpdateOperation, "callback", twice)
		assert.Equal(t, 400, status)
		assert.Equal(t, "state must be given once, as a string", text)
		resp, err := e.HandleRequest(t.Context(), &logical.Request{
			Operation: logical.ReadOperation, Path: "callback", Data: twice, Storage: e.storage, WrapInfo: &logical.RequestWrapInfo{TTL: time.Minute},
		})
		require.NoError(t, err)
		assert.NotContains(t, resp.Data, logical.HTTPRawBody)
	})
}

// A wrong iss uses the state up wherever it comes: with the form that confirms, and without a code.
func TestWrongIssWithoutACode(t *testing.T) {
	for name, send := range map[string]func(e *grantEngine, back map[string]any) shown{
		"with the form": func(e *grantEngine, back map[string]any) shown {
			to, fields := e.open(back).form()
			return e.visit(logical.UpdateOperation, to, with(fields, "iss", "https://evil.example"))
		},
		"alone": func(e *grantEngine, back map[string]any) shown {
			return e.open(map[string]any{"state": back["state"], "iss": "https://evil.example"})
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newGrantEngine(t, func(o *oauth2test.Options) { o.SendIss = true })
				e.write("config/as", map[string]any{"issuer": e.server.Issuer()})
				p := send(e, e.authorize(nil))
				assert.Equal(t, 400, p.status)
				assert.Contains(t, p.text(), "names another issuer")
				assert.Equal(t, attemptFailed, e.attemptStatus(byCode))
				assert.Zero(t, e.sent(codeGrant))
			})
		})
	}
}

// The entry of a state says that its code is at the service: another callback with the state costs one read of storage.
func TestCallbackWhileItsCodeIsAtTheService(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		e.write("config/as", map[string]any{"confirm": false})
		back := e.authorize(nil)
		e.server.Inject(oauth2test.Fault{Hold: true, Times: 1})
		page := make(chan shown, 1)
		go func() { page <- e.open(back) }()
		synctest.Wait()
		require.Equal(t, 1, e.sent(codeGrant))
		operations := e.storage.ops.Load()
		assert.Contains(t, e.open(back).text(), "This link has been used")
		assert.Equal(t, operations+1, e.storage.ops.Load())
		e.server.ClearFaults()
		assert.Contains(t, (<-page).text(), "The tenant is connected")
	})
}

// A tenant is deleted while a code is at the service: with revoke_on_delete the refresh token that comes for it is revoked, whether or
// not the tenant was there before.
func TestDeleteWhileACodeIsAtTheService(t *testing.T) {
	for _, existing := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			e := newGrantEngine(t)
			e.write("config/as", map[string]any{"revoke_on_delete": true, "confirm": false})
			if existing {
				e.write("tenants/acme", map[string]any{"connector": "as", "refresh_token": e.server.Grant(e.clientID, "acme"), "verify": false})
			}
			done := e.codeAtTheService()
			require.Equal(t, 1, e.sent(codeGrant))
			brought := e.server.CurrentRefreshToken("jane")
			require.True(t, e.server.RefreshTokenAlive(brought))
			e.ok(logical.DeleteOperation, "tenants/acme", nil)
			e.server.ClearFaults()
			assert.Contains(t, (<-done).text(), "out of date")
			time.Sleep(time.Minute)
			assert.False(t, e.server.RefreshTokenAlive(brought), "existing: %t", existing)
			assert.Nil(t, e.read("config/as")["pending_revocations"])
		})
	}
	// A rewritten tenant stays as it is, and so does the grant that it did not take.
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		e.write("config/as", map[string]any{"revoke_on_delete": true, "confirm": false})
		done := e.codeAtTheService()
		e.write("tenants/acme", map[string]any{"connector": "as", "refresh_token": e.server.Grant(e.clientID, "acme"), "verify": false})
		e.server.ClearFaults()
		assert.Contains(t, (<-done).text(), "out of date")
		time.Sleep(time.Minute)
		assert.Empty(t, e.server.Calls(oauth2test.EndpointRevocation))
	})
}

// The revocation of the refresh token that comes for a deleted tenant fails until the token's end, which the service has told: no call comes
// after that.
func TestRefreshTokenOfADeletedTenantEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t, func(o *oauth2test.Options) {
			o.RefreshTokenLife, o.RefreshTokenLifeField = 5*time.Minute, "refresh_expires_in"
		})
		e.write("config/as", map[string]any{"revoke_on_delete": true, "confirm": false})
		done := e.codeAtTheService()
		e.ok(logical.DeleteOperation, "tenants/acme", nil)
		e.server.ClearFaults()
		e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointRevocation, Answer: oauth2test.BadGateway})
		<-done
		e.pass(7 * time.Minute)
		calls := e.server.Calls(oauth2test.EndpointRevocation)
		assert.NotEmpty(t, calls)
		for _, call := range calls {
			assert.False(t, call.Expired)
		}
		assert.Nil(t, e.read("config/as")["pending_revocations"])
	})
}

// A newer attempt takes the place of one whose code is at the service: no delete has come, so the refresh token of the older one is not
// revoked, which at some services would end the grant of the newer one.
func TestNewerAttemptRevokesNothing(t *testing.T) {
	for _, path := range []string{byCode, byDevice} {
		synctest.Test(t, func(t *testing.T) {
			e := newGrantEngine(t)
			e.write("config/as", map[string]any{"revoke_on_delete": true, "confirm": false})
			done := e.codeAtTheService()
			brought := e.server.CurrentRefreshToken("jane")
			time.Sleep(time.Second)
			e.start(path, nil)
			e.server.ClearFaults()
			assert.Contains(t, (<-done).text(), "out of date")
			time.Sleep(time.Minute)
			assert.True(t, e.server.RefreshTokenAlive(brought), path)
		})
	}
}

// codeAtTheService opens the callback, and returns while the service holds the answer to the code back. The channel brings the page.
func (e *grantEngine) codeAtTheService() chan shown {
	back := e.authorize(nil)
	e.server.Inject(oauth2test.Fault{Hold: true, Times: 1})
	page := make(chan shown, 1)
	go func() { page <- e.open(back) }()
	synctest.Wait()
	return page
}

// A service that promises iss sends it with an error, too: an error without it ends the attempt as an answer of another server. A visit
// with neither a code nor an error leaves the attempt pending.
func TestErrorWithoutThePromisedIssuer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t, func(o *oauth2test.Options) { o.SendIss, o.PromiseIss = true, true })
		e.write("config/as", map[string]any{"issuer": e.server.Issuer()})
		back := e.authorize(nil)
		p := e.open(map[string]any{"state": back["state"], "error": "access_denied"})
		assert.Contains(t, p.text(), "iss is missing")
		assert.Equal(t, attemptFailed, e.attemptStatus(byCode))
		back = e.authorize(nil)
		p = e.open(map[string]any{"state": back["state"]})
		assert.Contains(t, p.text(), "Something is missing")
		assert.Equal(t, attemptPending, e.attemptStatus(byCode))
	})
}
