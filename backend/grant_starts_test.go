package backend

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

func TestAuthorizationsThatDoNotBegin(t *testing.T) {
	type data = map[string]any
	for name, c := range map[string]struct {
		config data // written to config/as before the start
		tenant data // written to the tenant before the start
		ask    data
		says   string
	}{
		"no such connector":      {ask: data{"connector": "none"}, says: "connector \"none\" is not configured"},
		"not a connector's name": {ask: data{"connector": "a/b"}, says: "the name of a connector"},
		"an empty name":          {ask: data{"connector": ""}, says: "the name of a connector"},
		"cannot":                 {ask: data{}, says: "connector \"default\" is for Kaizala, which does not offer authorize: use tenants/NAME/pin"},
		"the tenant's own cannot": {tenant: data{"connector": "default"}, ask: data{},
			says: "does not offer authorize"},
		"no client ID":             {config: data{"connector_secret": ""}, ask: data{"connector": "as"}, says: "connector_secret of connector \"as\" is missing"},
		"no address":               {config: data{"authorization_url": nil}, ask: data{"connector": "as"}, says: "authorization_url is missing"},
		"no redirect URI":          {config: data{"redirect_uris": nil}, ask: data{"connector": "as"}, says: "redirect_uris of connector \"as\" is missing"},
		"several redirect URIs":    {config: data{"redirect_uris": callbackTo + "," + callbackTo + "/as"}, ask: data{"connector": "as"}, says: "redirect_uri is required"},
		"a foreign redirect URI":   {ask: data{"connector": "as", "redirect_uri": "https://evil.example/v1/kaizala/callback"}, says: "redirect_uri has to be one of"},
		"another's redirect URI":   {config: data{"redirect_uris": callbackTo + "/other"}, ask: data{"connector": "as"}, says: "which is not connector \"as\"'s"},
		"a scope that it has not":  {ask: data{"connector": "as", "scopes": "read admin"}, says: "each of scopes has to be one of the connector's: offline_access or openid or read"},
		"a scope, and it has none": {config: data{"scopes": nil}, ask: data{"connector": "as", "scopes": "read"}, says: "one of the connector's: none"},
		"a hint of two lines":      {ask: data{"connector": "as", "login_hint": "a\nb"}, says: "login_hint has to be one line"},
		"a hint that is too long":  {ask: data{"connector": "as", "login_hint": strings.Repeat("a", maxHintBytes+1)}, says: "login_hint has to be one line"},
		"a tenant that needs another connector": {config: data{"revocation": "none", "exchange_invalidates": true}, tenant: data{"connector": "perlease", "token_per_lease": true},
			ask: data{"connector": "as"}, says: "token_per_lease needs a connector"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newGrantEngine(t)
				if c.config != nil {
					e.write("config/as", c.config)
				}
				if c.tenant["connector"] == "perlease" {
					e.write("config/perlease", data{
						"service": "oauth2", "connector_id": e.clientID, "connector_secret": e.clientSecret, "token_url": e.server.TokenURL(),
						"revocation_url": e.server.RevocationURL(), "revocation": "access_token", "exchange_invalidates": false,
					})
				}
				if c.tenant != nil {
					c.tenant["refresh_token"], c.tenant["verify"] = e.newToken("acme"), false
					e.write("tenants/acme", c.tenant)
				}
				resp, status, text := e.ask(logical.UpdateOperation, "tenants/acme/authorize", c.ask)
				assert.Equal(t, 400, status)
				assert.True(t, resp.IsError())
				assert.Contains(t, text, c.says)
				_, status, _ = e.ask(logical.ReadOperation, "tenants/acme/authorize", nil)
				assert.Equal(t, 404, status)
				assert.NotContains(t, e.storedText(), attemptPrefix)
				assert.Empty(t, e.server.Calls())
			})
		})
	}
}

// Two connectors have the flow: an answer of one server must not be taken for an answer of the other (mix-up attack, RFC 9700).
func TestMixUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t, func(o *oauth2test.Options) { o.SendIss = true })
		id, secret := e.other.RegisterClient(oauth2test.AuthBasic, callbackTo+"/other")
		e.write("config/other", map[string]any{
			"service": "oauth2", "connector_id": id, "connector_secret": secret, "token_url": e.other.TokenURL(),
			"authorization_url": e.other.AuthorizationURL(), "redirect_uris": callbackTo + "/other", "scopes": "offline_access",
		})
		_, status, text := e.ask(logical.UpdateOperation, "tenants/acme/authorize", map[string]any{"connector": "as"})
		assert.Equal(t, 400, status)
		assert.Contains(t, text, "ends in callback/as")

		// A redirect URI with the connector's name is accepted, and a state works only at that callback.
		e.write("config/as", map[string]any{"redirect_uris": callbackTo + "/as"})
		back := e.authorize(nil)
		for _, path := range []string{"callback", "callback/other"} {
			p := e.visit(logical.ReadOperation, path, with(back, "connector", "as"))
			assert.Equal(t, 400, p.status)
			assert.Contains(t, p.text(), "for another address")
			assert.Equal(t, attemptPending, e.attemptStatus(byCode))
		}
		p := e.visit(logical.ReadOperation, "callback/as", back)
		to, fields := p.form()
		assert.Equal(t, "as", to)
		assert.Equal(t, 200, e.visit(logical.UpdateOperation, "callback/"+to, fields).status)

		// A server that promises iss is accepted with a redirect URI without the connector's name.
		e.server.Set(func(o *oauth2test.Options) { o.PromiseIss = true })
		e.write("config/as", map[string]any{"redirect_uris": callbackTo, "issuer": e.server.Issuer()})
		assert.Equal(t, 200, e.confirm(e.authorize(nil)).status)
		assert.Empty(t, e.other.Calls(oauth2test.EndpointToken))
		e.ok(logical.DeleteOperation, "config/other", nil)
		e.write("config/as", map[string]any{"issuer": nil, "token_url": e.server.TokenURL(), "authorization_url": e.server.AuthorizationURL()})
		e.start(byCode, nil)
	})
}

// A client that starts grants for one tenant all the time leaves a fifth of the share to the readers of other tenants.
func TestGrantsLeaveReadersAFifth(t *testing.T) {
	for name, flood := range map[string]func(e *grantEngine) (status int){
		"device": func(e *grantEngine) int {
			_, status, _ := e.ask(logical.UpdateOperation, "tenants/acme/device", map[string]any{"connector": "as"})
			return status
		},
		"forged codes": func(e *grantEngine) int {
			address := e.start(byCode, nil)["authorization_url"].(string)
			_, status, _ := e.ask(logical.UpdateOperation, "callback", map[string]any{"state": query(e.t, address)["state"], "code": "forged"})
			return map[int]int{400: 200, 429: 429}[status]
		},
		"messages": func(e *grantEngine) int {
			_, status, _ := e.pin(map[string]any{"mobile_number": e.kaizala.PhoneNumber("acme")})
			return status
		},
		"wrong PINs": func(e *grantEngine) int {
			if e.pinCalls(sendPINPath) == 0 {
				e.phone()
				return 200
			}
			_, status, _ := e.pin(map[string]any{"pin": "wrong"})
			return map[int]int{400: 200, 429: 429}[status]
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newGrantEngine(t)
				e.write("config/as", map[string]any{"exchanges_per_minute": 50})
				e.write("config", map[string]any{"exchanges_per_minute": 50})
				e.write("tenants/oauth", map[string]any{"connector": "as", "refresh_token": e.server.Grant(e.clientID, "bob", "offline_access"), "verify": false})
				e.write("tenants/kaizala", map[string]any{"refresh_token": e.newToken("kaizala"), "verify": false})
				count := map[int]int{}
				for range 50 {
					count[flood(e)]++
				}
				assert.Equal(t, map[int]int{200: 40, 429: 10}, count)
				e.read("creds/oauth")
				e.read("creds/kaizala")
			})
		})
	}
}

// The service refuses the connector in a call of a grant: no other call of the connector is made until the owner has written a new
// secret.
func TestAGrantFindsTheConnectorRefused(t *testing.T) {
	for name, ask := range map[string]func(e *grantEngine){
		"code":        func(e *grantEngine) { assert.Equal(e.t, 400, e.confirm(e.authorize(nil)).status) },
		"device poll": func(*grantEngine) { time.Sleep(6 * time.Second) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newGrantEngine(t)
				e.write("tenants/beta", map[string]any{"connector": "as", "refresh_token": e.server.Grant(e.clientID, "bob", "offline_access"), "verify": false})
				if name == "device poll" {
					e.start(byDevice, nil)
				}
				e.server.ResetCalls()
				secret := e.server.NewClientSecret(e.clientID)
				ask(e)
				assert.Len(t, e.server.Calls(), 1)
				_, status, text := e.try(logical.ReadOperation, "creds/beta", nil)
				assert.Equal(t, 400, status)
				assert.Contains(t, text, "refuses connector \"as\"")
				assert.Len(t, e.server.Calls(), 1)
				e.write("config/as", map[string]any{"connector_secret": secret})
				e.read("creds/beta")
			})
		})
	}
}

// The answer to the start of a grant warns that the grant will end the access token of the live leases.
func TestStartsWarnOfLiveLeases(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		for _, state := range []string{"no tenant", "no access token", "no lease", "a lease"} {
			switch state {
			case "no access token":
				e.addTenant("acme")
			case "no lease":
				e.read("token/acme")
			case "a lease":
				e.lease("acme")
			}
			for path, data := range map[string]map[string]any{
				byCode: {"connector": "as"}, byDevice: {"connector": "as"}, byPIN: {"mobile_number": e.kaizala.PhoneNumber("acme")},
			} {
				resp, status, text := e.ask(logical.UpdateOperation, "tenants/acme/"+path, data)
				require.Equal(t, 200, status, text)
				assert.Equal(t, state == "a lease", strings.Contains(fmt.Sprint(resp.Warnings), "live leases"), path)
			}
		}
		old := e.lease("acme")
		assert.Equal(t, 200, e.confirm(e.authorize(nil)).status)
		assert.NotEqual(t, accessTokenOf(old), accessTokenOf(e.lease("acme")))
	})
}

// Attempts and states that are over are deleted from storage, and while nothing is pending the periodic function reads nothing.
func TestSweep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		e.start(byDevice, nil)
		e.authorize(nil)
		e.phone()
		e.pass(attemptLife + 2*time.Minute)
		for _, path := range []string{byCode, byDevice} {
			assert.Equal(t, attemptSuperseded, e.attemptStatus(path))
		}
		all, err := e.attemptsOf(t.Context(), "acme")
		require.NoError(t, err)
		assert.Equal(t, attemptExpired, all.Last[byPIN].Status)
		for path, a := range all.Last {
			assert.Empty(t, a.Verifier+a.DeviceCode+a.MobileNumber+a.Code, path)
		}
		e.crash()
		for _, fails := range []bool{true, false} {
			if fails {
				e.storage.refuse("delete", attemptPrefix)
			}
			e.pass(2 * time.Hour)
			assert.Equal(t, fails, strings.Contains(e.storedText(), stateKeys))
			e.storage.heal()
		}
		for _, fails := range []bool{true, false} {
			if fails {
				e.storage.refuse("delete", attemptPrefix)
			}
			e.pass(2 * day)
			assert.Equal(t, fails, strings.Contains(e.storedText(), attemptPrefix))
			e.storage.heal()
		}

		assert.Equal(t, 200, e.confirm(e.authorize(nil)).status)
		e.pass(2 * day)
		assert.NotContains(t, e.storedText(), stateKeys)
		assert.Equal(t, attemptGranted, e.attemptStatus(byCode), "the attempt of a tenant that exists is kept")
		reads := 0
		e.storage.failWith(func(op, key string) error {
			if strings.HasPrefix(key, attemptPrefix) {
				reads++
			}
			return nil
		})
		e.pass(time.Hour)
		assert.Zero(t, reads)
	})
}

// An attempt has expired while no process ran: the next process ends it at its start, and storage loses what the attempt kept.
func TestSweepAtTheStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.phone()
		e.stop()
		time.Sleep(attemptLife)
		e.start()
		synctest.Wait()
		all, err := e.attemptsOf(t.Context(), "acme")
		require.NoError(t, err)
		assert.Equal(t, attemptExpired, all.Last[byPIN].Status)
		assert.Empty(t, all.Last[byPIN].MobileNumber)
	})
}

// The clock was wrong when an attempt started: its expiry far in the future does not keep it pending.
func TestAttemptOfAWrongClock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		back := e.authorize(nil)
		require.NoError(t, e.changeAttempts(t.Context(), "acme", func(all *attempts) error {
			all.Last[byCode].Expires = time.Now().Add(300 * day)
			return nil
		}))
		assert.Equal(t, attemptExpired, e.attemptStatus(byCode))
		assert.Equal(t, 400, e.open(back).status)
	})
}

// A write of the tenant ends a pending attempt, also if storage does not take the end of the attempt itself.
func TestAWriteEndsAnAttemptThatStorageCannotChange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		back := e.authorize(nil)
		e.storage.failWith(func(op, key string) error {
			if op == "put" && strings.HasPrefix(key, attemptPrefix) {
				return errStorage
			}
			return nil
		})
		e.addTenant("acme")
		e.storage.heal()
		e.crash()
		assert.Equal(t, attemptSuperseded, e.attemptStatus(byCode))
		assert.Contains(t, e.open(back).text(), "out of date")
		assert.Zero(t, e.sent(codeGrant))
	})
}

// A grant that brings an access token and no refresh token fails, and the access token is revoked.
func TestAnAccessTokenAloneIsGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t, func(o *oauth2test.Options) {
			o.Edit = func(_ oauth2test.Endpoint, fields map[string]any) { delete(fields, "refresh_token") }
		})
		e.write("config/as", map[string]any{"revocation": "access_token", "exchange_invalidates": false})
		assert.Equal(t, 400, e.confirm(e.authorize(nil)).status)
		code := e.start(byDevice, nil)["user_code"].(string)
		require.NoError(t, e.server.ApproveDevice(code, "jane"))
		e.pass(time.Minute)
		assert.Equal(t, attemptFailed, e.attemptStatus(byDevice))
		assert.Empty(t, e.server.AccessTokens("jane"), "no access token is alive")
		assert.Len(t, e.server.Calls(oauth2test.EndpointRevocation), 2)
	})
}

func TestCallbackOf(t *testing.T) {
	for uri, name := range map[string]string{
		"https://vault.example/v1/kaizala/callback":    "",
		"https://vault.example/v1/kaizala/callback/as": "as",
		"https://vault.example/callback/as/":           "as",
		"https://vault.example/callback":               "",
		"https://vault.example":                        "",
	} {
		assert.Equal(t, name, callbackOf(uri), uri)
	}
}

// A login_hint may have maxHintBytes bytes, and spaces.
func TestLoginHint(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		hint := "jane " + strings.Repeat("d", maxHintBytes-5)
		address := e.start(byCode, map[string]any{"connector": "as", "login_hint": hint})["authorization_url"].(string)
		assert.Equal(t, hint, query(t, address)["login_hint"])
		_, status, text := e.ask(logical.UpdateOperation, "tenants/acme/authorize", map[string]any{"connector": "as", "login_hint": hint + "d"})
		assert.Equal(t, 400, status)
		assert.Contains(t, text, "login_hint")
	})
}
