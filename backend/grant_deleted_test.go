package backend

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// A grant creates a tenant, and storage does not take it, so memory keeps it. A delete of the tenant drops it: the attempt is superseded, as
// any other that a delete ends.
func TestDeleteSupersedesAKeptGrant(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		back := e.authorize(nil)
		e.storage.refuse("put", tenantPrefix+"acme")
		e.confirm(back)
		require.Equal(t, attemptPending, e.attemptStatus(byCode))
		e.storage.heal()
		e.ok(logical.DeleteOperation, "tenants/acme", nil)
		e.pass(2 * time.Minute)
		assert.Nil(t, e.stored("acme"))
		attempt := e.attempt(byCode)
		assert.Equal(t, attemptSuperseded, attempt["status"])
		assert.NotContains(t, attempt, "last_error")
	})
}

// Attempts that cannot be read block the tenant's next ones. A delete of the tenant removes them, and is an error as long as storage keeps
// them.
func TestDeleteRemovesUnreadableAttempts(t *testing.T) {
	for name, entry := range map[string]string{"broken": "{", "of a newer version": `{"format":1000}`} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newGrantEngine(t)
				e.put(attemptKeys+"acme", []byte(entry))
				for _, path := range []string{byCode, byDevice} {
					_, status, text := e.ask(logical.UpdateOperation, "tenants/acme/"+path, map[string]any{"connector": "as"})
					assert.Equal(t, 500, status)
					assert.Contains(t, text, "cannot be read")
				}
				e.storage.refuse("delete", attemptKeys)
				_, status, _ := e.ask(logical.DeleteOperation, "tenants/acme", nil)
				assert.Equal(t, 500, status)
				e.storage.heal()
				e.ok(logical.DeleteOperation, "tenants/acme", nil)
				e.start(byCode, nil)
				e.start(byDevice, nil)
				e.ok(logical.DeleteOperation, "tenants/acme", nil)
				assert.Equal(t, attemptSuperseded, e.attemptStatus(byDevice), "attempts that can be read are kept")
			})
		})
	}
}
