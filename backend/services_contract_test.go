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

// Each test checks one sentence of SERVICES.md that a program outside the engine can check, and that a version of the engine broke.

// Section 3: a request that may end an access token before a lease on it answers with a warning, and reads of the tenant have the
// warning until such leases are over.
func TestWhatEndsAnAccessTokenSaysSo(t *testing.T) {
	for name, c := range map[string]struct {
		path string
		data func(e *oauthEngine) map[string]any
		says bool
	}{
		"refresh token": {"tenants/acme", func(e *oauthEngine) map[string]any {
			return map[string]any{"refresh_token": e.server.Grant(e.clientID, "acme")}
		}, true},
		"refresh token, not verified": {"tenants/acme", func(e *oauthEngine) map[string]any {
			return map[string]any{"refresh_token": e.server.Grant(e.clientID, "acme"), "verify": false}
		}, true},
		"connector": {"tenants/acme", func(*oauthEngine) map[string]any { return map[string]any{"connector": "default"} }, true},
		"refresh":   {"tenants/acme/refresh", func(*oauthEngine) map[string]any { return nil }, true},
		"ttl":       {"tenants/acme", func(*oauthEngine) map[string]any { return map[string]any{"ttl": "5m"} }, false},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, oauth2test.ClassD, classD)
				e.add("acme", nil)
				e.lease("acme")
				bound := e.tenants.named("acme").view.Load().bound
				time.Sleep(time.Minute)
				resp := e.write(c.path, c.data(e))
				status := e.ok(logical.ReadOperation, "tenants/acme", nil)
				if !c.says {
					assert.Nil(t, resp)
					assert.Empty(t, status.Warnings)
					return
				}
				require.NotNil(t, resp)
				require.Len(t, resp.Warnings, 1)
				assert.Contains(t, resp.Warnings[0], "leases on it are of no use any more")
				require.Len(t, status.Warnings, 1)
				assert.Contains(t, status.Warnings[0], "leases on it are of no use any more")
				time.Sleep(time.Until(bound))
				assert.Empty(t, e.ok(logical.ReadOperation, "tenants/acme", nil).Warnings, "all leases on the token are over")
			})
		})
	}
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassD, classD)
		e.add("acme", nil)
		assert.Nil(t, e.write("tenants/acme", map[string]any{"refresh_token": e.server.Grant(e.clientID, "acme")}), "there was no access token")
		assert.Nil(t, e.write("tenants/acme", map[string]any{"refresh_token": e.server.Grant(e.clientID, "acme")}), "no reader had got the access token")
		e.lease("acme")
		e.pass(time.Hour) // the planned exchange is made in this time
		assert.Empty(t, e.ok(logical.ReadOperation, "tenants/acme", nil).Warnings)
	})
}

// Section 5: a state is marked as used in storage before its code is sent. If storage does not take that, nothing is sent, the person
// can try again, and the attempt expires after ten minutes.
func TestStateThatStorageCannotUseUp(t *testing.T) {
	for name, again := range map[string]bool{"again": true, "not again": false} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newGrantEngine(t)
				back := e.authorize(nil)
				e.storage.refuse("put", attemptKeys)
				for _, op := range []logical.Operation{logical.UpdateOperation, logical.ReadOperation} {
					_, status, _ := e.ask(op, "callback", back)
					require.Equal(t, http.StatusInternalServerError, status, op)
				}
				e.write("config/as", map[string]any{"confirm": false})
				_, status, _ := e.ask(logical.ReadOperation, "callback", back)
				require.Equal(t, http.StatusInternalServerError, status)
				e.storage.heal()
				assert.Zero(t, e.sent("authorization_code"))
				if again {
					resp, status, text := e.ask(logical.UpdateOperation, "callback", back)
					require.Equal(t, 200, status, text)
					assert.Equal(t, attemptGranted, resp.Data["status"])
					assert.Empty(t, resp.Warnings)
					return
				}
				e.pass(11 * time.Minute)
				assert.Equal(t, attemptExpired, e.attemptStatus(byCode))
			})
		})
	}
}

// Section 5: a newer attempt ends the attempt before it, unless storage does not take the newer one: the person who enters the code of
// the older attempt then connects the tenant.
func TestAttemptThatStorageRefusesEndsNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		code := e.start(byDevice, nil)["user_code"].(string)
		for _, fails := range []string{"put " + attemptKeys, "get " + attemptKeys, "get " + tenantPrefix, "put " + stateKeys} {
			op, key, _ := strings.Cut(fails, " ")
			e.storage.refuse(op, key)
			for path, data := range map[string]map[string]any{
				byCode: {"connector": "as"}, byDevice: {"connector": "as"}, byPIN: {"mobile_number": e.kaizala.PhoneNumber("acme")},
			} {
				if key == stateKeys && path != byCode {
					continue
				}
				_, status, text := e.ask(logical.UpdateOperation, "tenants/acme/"+path, data)
				require.Equal(t, http.StatusInternalServerError, status, "%s %s: %s", fails, path, text)
			}
			e.storage.heal()
			assert.Equal(t, attemptPending, e.attemptStatus(byDevice), fails)
		}
		require.NoError(t, e.server.ApproveDevice(code, "jane"))
		e.pass(10 * time.Second)
		assert.Equal(t, attemptGranted, e.attemptStatus(byDevice))
	})
}

// Section 4: a write of a refresh token whose revocation is pending cancels the revocation, also while that waits for its place in the
// share.
func TestRefreshTokenIsSparedWhileItsRevocationWaits(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, revokeAll)
		e.write("config", map[string]any{"exchanges_per_minute": 5})
		for _, name := range []string{"one", "two", "three", "four"} {
			e.add(name, nil)
			e.lease(name)
		}
		token := e.server.Grant(e.clientID, "acme")
		e.write("tenants/acme", map[string]any{"refresh_token": token, "verify": false})
		time.Sleep(40 * time.Second)
		e.ok(logical.DeleteOperation, "tenants/acme", nil)
		synctest.Wait()
		require.Empty(t, e.revocations(), "the share has no place for the revocation yet")
		time.Sleep(5 * time.Second)
		e.write("tenants/acme", map[string]any{"refresh_token": token, "verify": false})
		e.pass(2 * time.Minute)
		assert.Empty(t, e.revocations())
		assert.True(t, e.server.RefreshTokenAlive(token))
		assert.NotContains(t, e.storedText(), intentPrefix)
		for _, name := range []string{"v", "w", "x", "y", "z"} {
			e.add(name, nil)
			e.read("token/" + name) // each takes one of the five places of the share
		}
	})
}

// Section 1: a write of another value of revocation drops the pending revocations, also the exchanges that were to end an access token,
// and the answer says how many.
func TestAnotherRevocationDropsOwedExchanges(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassD, map[string]any{"revocation": "exchange"})
		e.add("acme", nil)
		lease := e.lease("acme")
		e.waitForIndex()
		e.server.Inject(oauth2test.Fault{Answer: oauth2test.BadGateway})
		e.revoke(lease)
		synctest.Wait()
		require.Equal(t, 1, e.pending("acme"))
		resp := e.write("config", map[string]any{"revocation": "none"})
		require.NotNil(t, resp)
		assert.Equal(t, []string{"1 revocation that had not been sent yet will not be made."}, resp.Warnings)
		assert.Nil(t, e.pending("acme"))
		assert.NotContains(t, e.read("config"), "pending_revocations")
	})
}

// Section 4: no token is sent to the revocation endpoint after its end or in its last seconds, also no refresh token.
func TestRefreshTokenPastItsEndIsNotRevoked(t *testing.T) {
	for name, c := range map[string]struct {
		deleted time.Duration // how long before the refresh token's end the tenant is deleted
		fails   bool          // the service fails until the refresh token's end
		calls   bool
	}{
		"long before":                  {deleted: time.Minute, calls: true},
		"in its last seconds":          {deleted: 4 * time.Second},
		"after it":                     {deleted: -time.Minute},
		"the service is back after it": {deleted: time.Minute, fails: true},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, oauth2test.ClassA, revokeAll)
				e.server.Set(func(o *oauth2test.Options) {
					o.Edit = func(_ oauth2test.Endpoint, fields map[string]any) {
						delete(fields, "refresh_token")
						fields["refresh_token_expires_in"] = 1000
					}
				})
				e.add("acme", nil)
				e.lease("acme")
				end, token := e.stored("acme").Facts.Expires, e.stored("acme").RefreshToken
				e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointToken, Answer: oauth2test.BadGateway}) // so the refresh token is not exchanged
				time.Sleep(time.Until(end) - c.deleted)
				if c.fails {
					e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointRevocation, Answer: oauth2test.BadGateway})
				}
				before := len(e.revocations())
				e.ok(logical.DeleteOperation, "tenants/acme", nil)
				synctest.Wait()
				if c.fails {
					e.pass(2 * time.Minute)
					e.server.ClearFaults()
					before = len(e.revocations())
				}
				e.pass(2 * time.Minute)
				calls := 0
				for _, call := range e.revocations()[before:] {
					if call.Token == token {
						calls++
					}
				}
				assert.Equal(t, c.calls, calls > 0)
				assert.NotContains(t, e.storedText(), intentPrefix)
			})
		})
	}
}

// Section 4: retire_on_revoke=false has no effect at a connector that revokes access tokens, also while the connector is not in memory.
func TestKeepOnRevokeHasNoEffectThoughMemoryHasNoConnector(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", map[string]any{"retire_on_revoke": false})
		lease := e.lease("acme")
		e.storage.refuse("put", connectorPrefix)
		_, status, _ := e.try(logical.UpdateOperation, "config", map[string]any{"keep_alive": "24h"})
		require.Equal(t, http.StatusInternalServerError, status)
		e.storage.heal()
		e.revoke(lease)
		synctest.Wait()
		assert.False(t, e.server.Alive(accessTokenOf(lease)))
	})
}

// Section 1: while a tenant has token_per_lease, a write of its connector cannot take away what that needs, also if storage took the
// write of the tenant and reported an error.
func TestConnectorOfATenantThatStorageTookUnheard(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		e.waitForIndex()
		e.storage.unheard("put", tenantPrefix)
		_, status, _ := e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"token_per_lease": true})
		require.Equal(t, http.StatusInternalServerError, status)
		e.storage.heal()
		_, status, text := e.try(logical.UpdateOperation, "config", map[string]any{"exchange_invalidates": true})
		assert.Equal(t, http.StatusBadRequest, status, text)
	})
}

// Section 2: after a lost answer the engine tries once more at once, also if the tenant's fifth of the share is used up, because the
// second try belongs to the same exchange.
func TestLostAnswerIsTriedAgainWhateverTheFifth(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, func(o *oauth2test.Options) { oauth2test.ClassD(o); o.Grace = 10 * time.Second }, map[string]any{"exchanges_per_minute": 5})
		e.add("acme", nil)
		e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointToken, Process: true, Reset: true, Times: 1})
		begun := time.Now()
		e.lease("acme")
		assert.Less(t, time.Since(begun), time.Second)
		assert.Len(t, e.server.Calls(oauth2test.EndpointToken), 2)
		assert.Equal(t, statusOK, e.status("acme"))
	})
}

// Section 5: a grant is not lost if storage fails one read.
func TestGrantOutlivesAReadThatFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		code := e.start(byDevice, nil)["user_code"].(string)
		require.NoError(t, e.server.ApproveDevice(code, "jane"))
		failed := false
		e.storage.failWith(func(op, key string) error {
			if op == "get" && key == attemptKeys+"acme" && !failed && e.server.CurrentRefreshToken("jane") != "" {
				failed = true
				return errStorage
			}
			return nil
		})
		e.pass(20 * time.Second)
		e.storage.heal()
		assert.True(t, failed)
		assert.Equal(t, attemptGranted, e.attemptStatus(byDevice))
	})
}

// Section 2: if storage does not take a verified write, the access token of the verification is revoked.
func TestUnstoredVerificationGivesItsAccessTokenUp(t *testing.T) {
	for name, fail := range map[string]func(*storage){
		"tenants": func(s *storage) { s.refuse("put", tenantPrefix) },
		"all":     func(s *storage) { s.refuse("put", "") },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, func(o *oauth2test.Options) { oauth2test.ClassA(o); o.Rotation = oauth2test.RotateNever }, classA)
				e.waitForIndex()
				token := e.server.Grant(e.clientID, "acme")
				e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointToken, Delay: time.Second, Times: 1})
				told := make(chan int)
				go func() {
					_, status, _ := e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": token})
					told <- status
				}()
				synctest.Wait()
				fail(e.storage)
				require.Equal(t, http.StatusServiceUnavailable, <-told)
				e.storage.heal()
				e.pass(2 * time.Minute)
				assert.Empty(t, e.server.AccessTokens("acme"))
				assert.True(t, e.server.RefreshTokenAlive(token))
				_, status, _ := e.try(logical.ReadOperation, "tenants/acme", nil)
				assert.Equal(t, 404, status)
			})
		})
	}
}

// Section 5: two requests read a connector from storage at the same time: neither takes the other's read for a write of the connector.
func TestConnectorThatTwoRequestsLoad(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		e.crash()
		e.waitForIndex()
		e.storage.surround(func(op, key string, do func() error) error {
			if op == "get" && key == connectorPrefix+"as" || op == "put" {
				time.Sleep(time.Second)
			}
			return do()
		})
		defer e.storage.heal()
		go func() {
			time.Sleep(500 * time.Millisecond)
			_, _, _ = e.ask(logical.UpdateOperation, "tenants/other/authorize", map[string]any{"connector": "as"})
		}()
		_, status, text := e.ask(logical.UpdateOperation, "tenants/acme/device", map[string]any{"connector": "as"})
		assert.Equal(t, 200, status, text)
		time.Sleep(5 * time.Second)
	})
}

// Section 1: the warning also counts the pending revocations that an earlier process stored and this process has not read yet.
func TestAnotherRevocationDropsWhatIsNotReadYet(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassD, map[string]any{"revocation": "access_token"})
		e.add("acme", nil)
		lease := e.lease("acme")
		e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointRevocation, Answer: oauth2test.BadGateway})
		e.revoke(lease)
		synctest.Wait()
		next := &storage{InmemStorage: e.storage.InmemStorage}
		next.refuse("list", intentPrefix)
		e.crashOnto(next)
		synctest.Wait()
		e.storage.heal()
		resp := e.write("config", map[string]any{"revocation": "none"})
		require.NotNil(t, resp)
		assert.Equal(t, []string{"1 revocation that had not been sent yet will not be made."}, resp.Warnings)
		assert.NotContains(t, e.storedText(), intentPrefix)
	})
}
