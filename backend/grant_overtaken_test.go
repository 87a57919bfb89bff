package backend

import (
	"testing"
	"testing/synctest"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
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
