package backend

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/kaizala/kaizalatest"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/tokenservice"
)

const (
	sendPINPath   = "/v1/generatePin"
	redeemPINPath = "/v1/loginWithPinAndApplicationId"
)

// pinCalls returns the number of calls that Kaizala got at a path of the PIN login.
func (e *engine) pinCalls(path string) (n int) {
	for _, call := range e.kaizala.Calls() {
		if call.Path == path {
			n++
		}
	}
	return n
}

func (e *engine) pin(data map[string]any) (*logical.Response, int, string) {
	return (&grantEngine{engine: e}).ask(logical.UpdateOperation, "tenants/acme/pin", data)
}

// phone makes Kaizala send a PIN to the user acme.
func (e *engine) phone() map[string]any {
	e.t.Helper()
	resp, status, text := e.pin(map[string]any{"mobile_number": e.kaizala.PhoneNumber("acme")})
	require.Equal(e.t, 200, status, text)
	return resp.Data
}

func (e *engine) sentPIN() string { return e.kaizala.PIN(e.connectorID, "acme") }

// storedText is all that storage has.
func (e *engine) storedText() string {
	e.t.Helper()
	var all strings.Builder
	keys, err := logical.CollectKeys(e.t.Context(), e.storage.InmemStorage)
	require.NoError(e.t, err)
	for _, key := range keys {
		entry, err := e.storage.InmemStorage.Get(e.t.Context(), key)
		require.NoError(e.t, err)
		all.WriteString(key + string(entry.Value) + "\n")
	}
	return all.String()
}

func TestPINLogin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		begun := time.Now()
		assert.Equal(t, map[string]any{"status": attemptPending, "expire_time": stamp(begun.Add(attemptLife))}, e.phone())
		time.Sleep(time.Minute)
		resp, status, text := e.pin(map[string]any{"pin": e.sentPIN()})
		require.Equal(t, 200, status, text)
		assert.Equal(t, attemptGranted, resp.Data["status"])
		assert.Empty(t, resp.Warnings)
		tenant := e.read("tenants/acme")
		assert.Equal(t, statusOK, tenant["status"])
		assert.Equal(t, "user", tenant["kind"])
		assert.Equal(t, originOperator, tenant["refresh_token_origin"])
		assert.Equal(t, "token-ada", tenant["granted_by"])
		assert.Equal(t, stamp(time.Now()), tenant["granted_time"])
		assert.NotContains(t, tenant, "subject")
		assert.Equal(t, e.kaizala.CurrentRefreshToken("acme"), e.stored("acme").RefreshToken)
		assert.Equal(t, 1, e.kaizala.Exchanges("acme"), "the refresh token is verified")
		e.read("creds/acme")
		assert.Equal(t, 1, e.kaizala.Exchanges("acme"))
		assert.NotContains(t, e.storedText(), strings.TrimPrefix(e.kaizala.PhoneNumber("acme"), "+"))
	})
}

// An opaque refresh token does not have its end in itself: its end is the refreshTokenExpiry of Kaizala's answer.
func TestEndOfAnOpaqueRefreshTokenOfAPIN(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.phone()
		begun := time.Now().UTC()
		e.kaizala.Inject(kaizalatest.Fault{Times: 1, Status: 200, Body: fmt.Sprintf(`{"refreshToken": "opaque", "refreshTokenExpiry": %d}`, begun.Add(100*day).UnixMilli())})
		e.kaizala.Inject(kaizalatest.Fault{Times: 1, Status: 200, Body: fmt.Sprintf(`{"accessToken": "access", "endpointUrl": "https://inc-000.kaiza.la", "accessTokenExpiry": %d}`, begun.Add(day).UnixMilli())})
		_, status, text := e.pin(map[string]any{"pin": e.sentPIN()})
		require.Equal(t, 200, status, text)
		assert.Equal(t, tokenservice.Facts{Kind: "unknown", Expires: begun.Add(100 * day), RotatesFrom: begun.Add(90 * day)}, e.stored("acme").Facts)
		assert.Equal(t, stamp(begun.Add(100*day)), e.read("tenants/acme")["refresh_token_expire_time"])
	})
}

func TestPINs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		wrong := func() {
			t.Helper()
			_, status, text := e.pin(map[string]any{"pin": "000000x"})
			assert.Equal(t, 400, status)
			assert.Contains(t, text, "write the right one, or to have a new one sent")
		}
		_, status, text := e.pin(map[string]any{"pin": "123456"})
		assert.Equal(t, 400, status)
		assert.Contains(t, text, "no PIN is awaited")
		assert.Zero(t, e.kaizala.CallCount())

		// A PIN that was mistyped can be corrected.
		e.phone()
		wrong()
		_, status, text = e.pin(map[string]any{"pin": e.sentPIN()})
		assert.Equal(t, 200, status, text)
		_, status, _ = e.pin(map[string]any{"pin": "123456"})
		assert.Equal(t, 400, status, "the attempt is over")

		// After too many wrong PINs, Kaizala does not accept the right one.
		e.phone()
		pin := e.sentPIN()
		for range kaizalatest.PINTries {
			wrong()
		}
		_, status, _ = e.pin(map[string]any{"pin": pin})
		assert.Equal(t, 400, status)
		e.phone() // a new PIN is accepted
		_, status, text = e.pin(map[string]any{"pin": e.sentPIN()})
		assert.Equal(t, 200, status, text)

		// An attempt lasts for ten minutes. Then the phone number is deleted, also from storage.
		e.phone()
		pin = e.sentPIN()
		e.pass(attemptLife - time.Second)
		assert.Contains(t, e.storedText(), strings.TrimPrefix(e.kaizala.PhoneNumber("acme"), "+"))
		calls := e.kaizala.CallCount()
		time.Sleep(time.Second)
		_, status, _ = e.pin(map[string]any{"pin": pin})
		assert.Equal(t, 400, status)
		assert.Equal(t, calls, e.kaizala.CallCount())
		e.pass(2 * time.Minute)
		assert.NotContains(t, e.storedText(), strings.TrimPrefix(e.kaizala.PhoneNumber("acme"), "+"))

		// A write or a delete ends the attempt and deletes the phone number. Another process goes on with an attempt.
		for name, end := range map[string]func(){
			"write":  func() { e.write("tenants/acme", map[string]any{"refresh_token": e.newToken("acme")}) },
			"delete": func() { e.ok(logical.DeleteOperation, "tenants/acme", nil) },
		} {
			e.phone()
			end()
			assert.NotContains(t, e.storedText(), strings.TrimPrefix(e.kaizala.PhoneNumber("acme"), "+"), name)
			_, status, _ = e.pin(map[string]any{"pin": e.sentPIN()})
			assert.Equal(t, 400, status, name)
		}
		e.phone()
		e.crash()
		_, status, text = e.pin(map[string]any{"pin": e.sentPIN()})
		assert.Equal(t, 200, status, text)
	})
}

// A client may name the connector with the PIN once more: the one that has sent it, and no other.
func TestPINWithAConnector(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.phone()
		calls := e.kaizala.CallCount()
		_, status, text := e.pin(map[string]any{"pin": e.sentPIN(), "connector": "other"})
		assert.Equal(t, 400, status)
		assert.Contains(t, text, `connector "default"`)
		assert.Equal(t, calls, e.kaizala.CallCount())
		_, status, text = e.pin(map[string]any{"pin": e.sentPIN(), "connector": "default"})
		assert.Equal(t, 200, status, text)
	})
}

func TestPINRequestsThatAreRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		number := e.kaizala.PhoneNumber("acme")
		for name, c := range map[string]struct {
			data map[string]any
			says string
		}{
			"nothing":            {map[string]any{}, "give mobile_number"},
			"both":               {map[string]any{"mobile_number": number, "pin": "123456"}, "then give pin alone"},
			"a list":             {map[string]any{"pin": []any{"123456"}}, "pin must be given once"},
			"a number":           {map[string]any{"mobile_number": 911234567890}, "mobile_number must be given once"},
			"no country code":    {map[string]any{"mobile_number": "1234567890"}, "plus sign"},
			"unknown to Kaizala": {map[string]any{"mobile_number": "+4915100000000"}, "check the phone number"},
			"no such connector":  {map[string]any{"mobile_number": number, "connector": "none"}, "connector \"none\" is not configured"},
			"cannot":             {map[string]any{"mobile_number": number, "connector": "as"}, "does not offer pin: use tenants/NAME/authorize or tenants/NAME/device"},
		} {
			_, status, text := e.pin(c.data)
			assert.Equal(t, 400, status, name)
			assert.Contains(t, text, c.says, name)
			assert.NotContains(t, text, strings.TrimPrefix(number, "+"), name)
			assert.NotContains(t, text, "123456", name)
		}
		assert.Zero(t, e.pinCalls(redeemPINPath))
		assert.Equal(t, 1, e.pinCalls(sendPINPath), "only the request with the unknown number reaches Kaizala")
	})
}

// A refresh token that a PIN has brought is not lost if its verification fails in an outage: the person could not get it again.
func TestPINWhileTheServiceFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.phone()
		e.kaizala.Inject(kaizalatest.Fault{Status: 500, Times: 1})
		_, status, text := e.pin(map[string]any{"pin": e.sentPIN()})
		assert.Equal(t, http.StatusServiceUnavailable, status, text)
		assert.Contains(t, text, "nothing was stored")

		// Kaizala redeems the PIN, and its answer is lost: the PIN cannot be used again.
		e.kaizala.Inject(kaizalatest.Fault{Status: 200, Body: "{}", Process: true, Times: 1})
		_, status, _ = e.pin(map[string]any{"pin": e.sentPIN()})
		assert.Equal(t, http.StatusServiceUnavailable, status)
		e.phone()
		good := e.sentPIN()
		e.kaizala.Inject(kaizalatest.Fault{Delay: 2 * time.Second, Times: 1})
		go func() {
			time.Sleep(time.Second)
			e.kaizala.Inject(kaizalatest.Fault{Status: 503})
		}()
		resp, status, text := e.pin(map[string]any{"pin": good})
		require.Equal(t, 200, status, text)
		assert.Equal(t, attemptGranted, resp.Data["status"])
		assert.Equal(t, e.kaizala.CurrentRefreshToken("acme"), e.stored("acme").RefreshToken)
		assert.Equal(t, "token-ada", e.read("tenants/acme")["granted_by"])
		e.kaizala.ClearFaults()
		time.Sleep(time.Minute)
		e.read("creds/acme")
		assert.Equal(t, statusOK, e.status("acme"))
	})
}

// The answer to the verification of a PIN's refresh token has a newer refresh token and no access token: that refresh token is stored, and
// a warning says what is wrong.
func TestPINWhoseVerificationBringsNoAccessToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.phone()
		pin := e.sentPIN()
		e.kaizala.Inject(kaizalatest.Fault{Times: 1, Status: 200, Body: `{"refreshToken": "first"}`})
		e.kaizala.Inject(kaizalatest.Fault{Times: 1, Status: 200, Body: `{"refreshToken": "second"}`})
		resp, status, text := e.pin(map[string]any{"pin": pin})
		require.Equal(t, 200, status, text)
		assert.Equal(t, attemptGranted, resp.Data["status"])
		assert.Equal(t, "second", e.stored("acme").RefreshToken)
		require.Len(t, resp.Warnings, 1)
		assert.Contains(t, resp.Warnings[0], "The refresh token is stored, but ")
	})
}

// Kaizala answers a PIN after 12 seconds: the request is answered within 10 seconds, and the refresh token is stored later.
func TestSlowPIN(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.phone()
		pin := e.sentPIN()
		e.kaizala.Inject(kaizalatest.Fault{Delay: 12 * time.Second, Times: 1})
		begun := time.Now()
		_, status, text := e.pin(map[string]any{"pin": pin})
		assert.Equal(t, 503, status)
		assert.Contains(t, text, "the engine goes on")
		assert.LessOrEqual(t, time.Since(begun), 10*time.Second)
		_, status, _ = e.pin(map[string]any{"pin": pin})
		assert.Equal(t, 503, status)
		time.Sleep(5 * time.Second)
		assert.Equal(t, e.kaizala.CurrentRefreshToken("acme"), e.stored("acme").RefreshToken)
		assert.Equal(t, 1, e.pinCalls(redeemPINPath))
	})
}

// Kaizala refuses the refresh token of a PIN in its verification: the tenant is not connected.
func TestRefreshTokenOfAPINIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.phone()
		notes := 0
		e.storage.surround(func(op, key string, do func() error) error {
			if op == "put" && strings.HasPrefix(key, callPrefix) {
				if notes++; notes == 2 { // the first note is that of the PIN's call
					e.kaizala.Inject(kaizalatest.Fault{Status: http.StatusUnauthorized, Body: `{"errorCode": "InvalidToken"}`, Times: 1})
				}
			}
			return do()
		})
		resp, status, text := e.pin(map[string]any{"pin": e.sentPIN()})
		assert.Equal(t, 400, status, "%v", resp)
		assert.Contains(t, text, "refuses this refresh token")
		assert.Nil(t, e.stored("acme"))
	})
}

// The connector is written while a PIN waits for its call: the PIN is sent with the written connector.
func TestPINMeetsAConfigWrite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.phone()
		once := true
		e.storage.surround(func(op, key string, do func() error) error {
			if op == "put" && strings.HasPrefix(key, callPrefix) && once {
				once = false
				e.write("config", map[string]any{"request_timeout": "6s"})
			}
			return do()
		})
		resp, status, text := e.pin(map[string]any{"pin": e.sentPIN()})
		require.Equal(t, 200, status, text)
		assert.Equal(t, attemptGranted, resp.Data["status"])
		assert.Equal(t, 1, e.pinCalls(redeemPINPath))
	})
}

// Storage does not take the refresh token of a PIN: memory keeps it, the answer is pending, and the tenant is stored when
// storage works again.
func TestPINWhileStorageTakesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.phone()
		e.failPuts()
		resp, status, text := e.pin(map[string]any{"pin": e.sentPIN()})
		require.Equal(t, 200, status, text)
		assert.Equal(t, attemptPending, resp.Data["status"])
		e.storage.heal()
		e.pass(2 * time.Minute)
		assert.Equal(t, "token-ada", e.read("tenants/acme")["granted_by"])
		assert.Equal(t, e.kaizala.CurrentRefreshToken("acme"), e.stored("acme").RefreshToken)
	})
}
