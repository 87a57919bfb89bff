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
