package backend

import (
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
)

// newRotatingEngine starts an engine with the tenant acme, whose refresh token is
// past 90 % of its life and has not been exchanged.
func newRotatingEngine(t *testing.T) *engine {
	e := newConfiguredEngine(t)
	token := e.newToken("acme")
	time.Sleep(inWindow)
	e.write("tenants/acme", map[string]any{"refresh_token": token, "verify": false})
	return e
}

// during calls f while the service carries out the tenant's exchange, and returns
// when the exchange has ended.
func (e *engine) during(f func()) {
	e.kaizala.Inject(kaizalatest.Fault{Delay: 4 * time.Second, Times: 1})
	go func() { _, _, _ = e.try(logical.ReadOperation, "creds/acme", nil) }()
	time.Sleep(2 * time.Second)
	f()
	time.Sleep(time.Second)
	e.quiet("acme")
}

func TestSettingsWrittenDuringARotationAreMerged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newRotatingEngine(t)
		e.during(func() { e.write("tenants/acme", map[string]any{"ttl": "1h"}) })
		entry := e.stored("acme")
		assert.Equal(t, time.Hour, entry.TTL)
		assert.Equal(t, e.kaizala.CurrentRefreshToken("acme"), entry.RefreshToken)
		e.crash()
		assert.Equal(t, time.Hour, e.lease("acme").Secret.TTL)
	})
}

func TestOperatorWinsOverAnExchange(t *testing.T) {
	for name, write := range map[string]func(e *engine) map[string]any{
		"refresh_token": func(e *engine) map[string]any {
			return map[string]any{"refresh_token": e.newToken("successor"), "verify": false}
		},
		"connector": func(e *engine) map[string]any {
			return map[string]any{"connector": "other", "verify": false}
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newRotatingEngine(t)
				e.kaizala.SetOldTokenDies(false)
				e.write("config/other", map[string]any{"connector_id": e.connectorID, "connector_secret": e.secret})
				var written *tenantEntry
				e.during(func() {
					e.write("tenants/acme", write(e))
					written = e.stored("acme")
				})
				entry := e.stored("acme")
				// The written refresh token may have had its own exchange by now; the result of the older one is not stored.
				assert.Equal(t, written.Connector, entry.Connector)
				if name == "refresh_token" {
					assert.Equal(t, written.RefreshToken, entry.RefreshToken)
				}
				assert.Equal(t, "ok", func() string { e.read("creds/acme"); return e.status("acme") }())
			})
		})
	}
}

func TestDeleteWinsOverAnExchange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newRotatingEngine(t)
		e.during(func() { e.ok(logical.DeleteOperation, "tenants/acme", nil) })
		assert.Nil(t, e.stored("acme"))
		calls := e.kaizala.CallCount()
		e.pass(time.Hour)
		assert.Nil(t, e.stored("acme"))
		assert.Equal(t, calls, e.kaizala.CallCount())
		assert.Nil(t, e.tenants.named("acme"), "memory has no record of the tenant")
	})
}

// The tenant's state leaves memory during an exchange, for example because another
// node has written the tenant: the result of the exchange is stored all the same.
func TestStateThatLeavesMemoryDuringARotation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newRotatingEngine(t)
		e.during(func() { e.InvalidateKey(t.Context(), tenantPrefix+"acme") })
		assert.Equal(t, e.kaizala.CurrentRefreshToken("acme"), e.stored("acme").RefreshToken)
		assert.Equal(t, statusOK, e.status("acme"))
	})
}

func TestLateVerification(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		token := e.newToken("acme")
		time.Sleep(inWindow)
		e.kaizala.Inject(kaizalatest.Fault{Delay: 25 * time.Second, Times: 1})
		begun := time.Now()
		_, status, text := e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": token, "ttl": "1h"})
		assert.Equal(t, http.StatusServiceUnavailable, status)
		assert.Contains(t, text, "will be stored then")
		assert.LessOrEqual(t, time.Since(begun), 10*time.Second)
		assert.Nil(t, e.stored("acme"))

		time.Sleep(20 * time.Second)
		require.NotNil(t, e.stored("acme"), "a late success is stored")
		assert.Equal(t, e.kaizala.CurrentRefreshToken("acme"), e.stored("acme").RefreshToken)
		assert.Equal(t, time.Hour, e.stored("acme").TTL)
		assert.Equal(t, 1, e.kaizala.CallCount())
		e.read("creds/acme")
		assert.Equal(t, 1, e.kaizala.CallCount())
	})
}

func TestVerificationThatRotatesWhileStorageFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		token := e.newToken("acme")
		time.Sleep(inWindow)
		e.storage.failWith(func(op, key string) error {
			if op == "put" && !strings.HasPrefix(key, callPrefix) {
				return errStorage
			}
			return nil
		})
		_, status, text := e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": token})
		assert.Equal(t, http.StatusServiceUnavailable, status, text)
		e.pass(10 * time.Minute)
		assert.Nil(t, e.stored("acme"))
		assert.Equal(t, e.kaizala.CurrentRefreshToken("acme"), e.held("acme"), "kept in memory")
		_, status, _ = e.try(logical.ReadOperation, "creds/acme", nil)
		assert.GreaterOrEqual(t, status, 400, "nothing is handed out before it is stored")
		assert.Equal(t, 1, e.kaizala.CallCount(), "the engine repeats the write to storage, not the exchange")

		e.storage.heal()
		e.pass(2 * time.Minute)
		require.NotNil(t, e.stored("acme"))
		assert.Equal(t, e.kaizala.CurrentRefreshToken("acme"), e.stored("acme").RefreshToken)
		e.crash()
		e.read("creds/acme")
		assert.Equal(t, 1, e.kaizala.CallCount())
	})
}

// While storage does not take new tokens, readers still get the older access token.
// The stop of the engine tries to store the new tokens once more.
func TestUnstoredRotationLeavesTheOlderTokenInUse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		token := e.newToken("acme")
		time.Sleep(inWindow - 13*time.Hour)
		e.write("tenants/acme", map[string]any{"refresh_token": token})
		older := accessTokenOf(e.lease("acme"))
		time.Sleep(2 * time.Hour) // the window has begun, and the renewer is not due yet
		e.storage.failWith(func(op, key string) error {
			if op == "put" && !strings.HasPrefix(key, callPrefix) {
				return errStorage
			}
			return nil
		})
		_, status, _ := e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
		assert.Equal(t, http.StatusServiceUnavailable, status)
		resp := e.lease("acme")
		assert.Equal(t, older, accessTokenOf(resp))
		assert.NotEmpty(t, resp.Warnings)
		assert.Equal(t, statusDegraded, e.status("acme"))

		e.storage.heal()
		e.restart()
		assert.Equal(t, e.kaizala.CurrentRefreshToken("acme"), e.stored("acme").RefreshToken)
		assert.NotEqual(t, older, accessTokenOf(e.lease("acme")))
		assert.Equal(t, 2, e.kaizala.CallCount())
	})
}

// Storage does not answer for two minutes: the result of an exchange waits, and is stored then.
func TestRotationBehindAHangingWrite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newRotatingEngine(t)
		released := make(chan struct{})
		e.during(func() {
			e.storage.surround(func(op, _ string, do func() error) error {
				if op == "put" {
					<-released
					return errors.New("too late")
				}
				return do()
			})
			for range 3 {
				go func() { _, _, _ = e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"ttl": "1h"}) }()
			}
			go func() {
				time.Sleep(2 * time.Minute)
				e.storage.heal()
				close(released)
			}()
		})
		e.pass(5 * time.Minute)
		assert.Equal(t, e.kaizala.CurrentRefreshToken("acme"), e.stored("acme").RefreshToken)
	})
}

// While storage takes no writes, the engine makes no call. When storage works
// again, readers do not wait for the backoff.
func TestNoCallWhileStorageFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		e.storage.failWith(func(op, _ string) error {
			if op == "put" {
				return errStorage
			}
			return nil
		})
		for range 5 {
			_, status, text := e.try(logical.ReadOperation, "creds/acme", nil)
			assert.Equal(t, http.StatusServiceUnavailable, status)
			assert.Contains(t, text, "storage")
		}
		assert.Equal(t, statusDegraded, e.status("acme"))
		e.pass(10 * time.Minute)
		assert.Zero(t, e.kaizala.CallCount())
		e.storage.heal()
		e.read("creds/acme")
		assert.Equal(t, statusOK, e.status("acme"))
	})
}

// Storage takes a write and reports an error: the next read shows what storage
// has.
func TestWriteThatStorageTookUnheard(t *testing.T) {
	for name, verify := range map[string]bool{"verified": true, "unverified": false} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newConfiguredEngine(t)
				e.addTenant("acme")
				e.read("creds/acme")
				e.storage.surround(func(op, key string, do func() error) error {
					if err := do(); err != nil || op != "put" || strings.HasPrefix(key, callPrefix) {
						return err
					}
					return errStorage
				})
				token := e.newToken("operator")
				_, status, _ := e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": token, "ttl": "1h", "verify": verify})
				assert.GreaterOrEqual(t, status, 500)
				e.storage.heal()
				assert.EqualValues(t, 3600, e.read("tenants/acme")["ttl"])
				assert.Equal(t, token, e.held("acme"))
				e.read("creds/acme")
				assert.Equal(t, statusOK, e.status("acme"))
			})
		})
	}
}

func TestMovesAreCompared(t *testing.T) {
	here, there := &move{From: "a", To: "b"}, &move{From: "a", To: "c"}
	assert.True(t, (*move)(nil).equal(nil))
	assert.True(t, here.equal(&move{From: "a", To: "b"}))
	assert.False(t, here.equal(there))
	assert.False(t, here.equal(nil))
	assert.False(t, (*move)(nil).equal(here))
}
