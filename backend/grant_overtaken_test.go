package backend

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/kaizala/kaizalatest"
)

// A write, a delete or a newer attempt comes while a PIN waits for its call: the PIN is not sent. Kaizala would end the refresh token
// that an operator has written for the same user.
func TestPINIsOvertaken(t *testing.T) {
	for name, overtake := range map[string]func(*grantEngine){
		"newer attempt": func(e *grantEngine) { e.start(byCode, nil) },
		"another PIN":   func(e *grantEngine) { e.phone() },
		"write":         func(e *grantEngine) { e.addTenant("acme") },
		"delete":        func(e *grantEngine) { e.ok(logical.DeleteOperation, "tenants/acme", nil) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newGrantEngine(t)
				e.addTenant("acme")
				e.phone()
				pin := e.sentPIN()
				over := e.storage.once("put", callPrefix, func() { overtake(e) })
				_, status, text := e.pin(map[string]any{"pin": pin})
				assert.True(t, over())
				assert.Equal(t, 400, status)
				assert.Contains(t, text, "a newer attempt, a write or a delete of tenant \"acme\" came meanwhile")
				assert.Zero(t, e.pinCalls(redeemPINPath))
				if name != "delete" {
					e.write("tenants/acme/refresh", nil)
				}
				if name == "another PIN" {
					_, status, text = e.pin(map[string]any{"pin": e.sentPIN()})
					assert.Equal(t, 200, status, text)
				}
			})
		})
	}
}

// Storage cannot be read when the PIN gets its call: nothing is sent, and the same PIN works later.
func TestPINWhoseAttemptCannotBeRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		e.phone()
		e.storage.once("put", callPrefix, func() { e.storage.refuse("get", attemptKeys) })
		_, status, _ := e.pin(map[string]any{"pin": e.sentPIN()})
		assert.Equal(t, 500, status)
		assert.Zero(t, e.pinCalls(redeemPINPath))
		e.storage.heal()
		_, status, text := e.pin(map[string]any{"pin": e.sentPIN()})
		assert.Equal(t, 200, status, text)
	})
}

// While the service is being asked to start an attempt, the tenant is written, or an older attempt is granted. The start is refused: its
// attempt would have ended before the person has the code.
func TestStartIsOvertaken(t *testing.T) {
	for name, overtake := range map[string]func(*grantEngine){
		"write":  func(e *grantEngine) { e.addTenant("acme") },
		"delete": func(e *grantEngine) { e.ok(logical.DeleteOperation, "tenants/acme", nil) },
		"grant": func(e *grantEngine) {
			require.Equal(e.t, 200, e.confirm(e.authorize(nil)).status)
		},
	} {
		for _, path := range []string{byDevice, byPIN} {
			t.Run(name+"/"+path, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					e := newGrantEngine(t)
					e.addTenant("acme")
					over := e.storage.once("put", callPrefix, func() { overtake(e) })
					data := map[string]any{"connector": "as"}
					if path == byPIN {
						data = map[string]any{"mobile_number": e.kaizala.PhoneNumber("acme"), "connector": "default"}
					}
					_, status, text := e.ask(logical.UpdateOperation, "tenants/acme/"+path, data)
					assert.True(t, over())
					assert.Equal(t, 503, status)
					assert.Contains(t, text, "tenant \"acme\" was written or deleted meanwhile")
					if name == "grant" {
						assert.Equal(t, attemptGranted, e.attemptStatus(byCode))
					}
					time.Sleep(time.Minute)
					assert.Empty(t, e.polls())
					_, status, text = e.ask(logical.UpdateOperation, "tenants/acme/"+path, data)
					assert.Equal(t, 200, status, text)
				})
			})
		}
	}
}

// A grant is being stored when its attempt's time ends, and storage does not take the end of the attempt: its status is that of the tenant.
func TestSweepDuringAGrant(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		e.phone()
		pin := e.sentPIN()
		e.pass(attemptLife - 2*time.Second)
		notes := 0
		e.storage.surround(func(op, key string, do func() error) error {
			if op == "put" && strings.HasPrefix(key, callPrefix) {
				if notes++; notes == 2 { // that of the exchange which verifies the refresh token
					e.kaizala.Inject(kaizalatest.Fault{Delay: 5 * time.Second, Times: 1})
				}
			}
			if op == "put" && strings.HasPrefix(key, attemptKeys) {
				return errStorage
			}
			return do()
		})
		done := make(chan struct{})
		go func() {
			defer close(done)
			_, status, text := e.pin(map[string]any{"pin": pin})
			assert.Equal(t, 200, status, text)
		}()
		time.Sleep(3 * time.Second)
		go e.attendGrants()
		synctest.Wait()
		<-done
		e.storage.heal()
		e.pass(2 * time.Minute)
		all, err := e.attemptsOf(t.Context(), "acme")
		require.NoError(t, err)
		assert.NotEqual(t, attemptExpired, all.Last[byPIN].Status)
		assert.Equal(t, attemptGranted, attemptStatusOf(&pair{grantEngine: e}, byPIN))
	})
}

// A tenant that does not exist yet is deleted when its grant is about to be stored: the delete ends the attempt, and no tenant is there
// after it.
func TestDeleteJustBeforeAGrantIsStored(t *testing.T) {
	for _, key := range []string{attemptKeys + "acme", "tenants/acme"} { // what is read before
		t.Run(key, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newGrantEngine(t)
				e.write("config/as", map[string]any{"revocation": "access_token", "exchange_invalidates": false, "revoke_on_delete": true})
				_, form := e.open(e.authorize(nil)).form()
				deleted := make(chan struct{})
				once := true
				e.storage.surround(func(op, at string, do func() error) error {
					if e.sent(codeGrant) == 0 || op != "get" || at != key || !once {
						return do()
					}
					once = false
					go func() {
						defer close(deleted)
						time.Sleep(time.Millisecond)
						e.ok(logical.DeleteOperation, "tenants/acme", nil)
						assert.Nil(t, e.stored("acme"))
					}()
					if key == "tenants/acme" {
						return errStorage // the grant is tried again a second later
					}
					time.Sleep(time.Second)
					return do()
				})
				_, _, _ = e.ask(logical.UpdateOperation, "callback", form)
				<-deleted
				e.pass(2 * time.Minute)
				assert.Nil(t, e.stored("acme"))
				for _, token := range append(e.server.AccessTokens("jane"), e.server.CurrentRefreshToken("jane")) {
					assert.False(t, e.server.Alive(token))
				}
			})
		})
	}
}
