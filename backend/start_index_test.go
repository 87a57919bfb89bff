package backend

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// At a start more tenants are due than the share has calls, and storage gives the one whose refresh token ends in half a minute last. That
// one goes first all the same.
func TestWhoEndsFirstGoesFirstAfterAStart(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, func(o *oauth2test.Options) {
			oauth2test.ClassA(o)
			o.RefreshTokenLife, o.RefreshTokenLifeField = 30*day, "refresh_token_expires_in"
		}, classB)
		for i := range 8 {
			name := fmt.Sprint("t", i)
			e.add(name, nil)
			e.read("token/" + name)
			time.Sleep(time.Minute)
		}
		e.write("config", map[string]any{"exchanges_per_minute": 5})
		e.stop()
		time.Sleep(time.Until(e.stored("t0").Facts.Expires.Add(-30 * time.Second)))
		before := e.server.Exchanges("t0")
		e.storage.surround(func(op, key string, do func() error) error {
			if op == "get" && key == tenantPrefix+"t0" {
				time.Sleep(time.Second)
			}
			return do()
		})
		e.start()
		e.pass(time.Minute)
		assert.Equal(t, before+1, e.server.Exchanges("t0"))
		assert.Equal(t, statusOK, e.status("t0"))
	})
}

// Storage takes a minute to give one of the tenants at a start: what is due meanwhile goes after a few seconds.
func TestSlowStartHoldsUpWhatIsDueForSecondsOnly(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newRotatingEngine(t)
		e.addTenant("slow")
		e.stop()
		e.storage.surround(func(op, key string, do func() error) error {
			if op == "get" && key == tenantPrefix+"slow" {
				time.Sleep(time.Minute)
			}
			return do()
		})
		e.start()
		time.Sleep(patience - time.Second)
		require.Zero(t, e.kaizala.CallCount())
		time.Sleep(2 * time.Second)
		assert.Equal(t, 1, e.kaizala.CallCount())
		time.Sleep(time.Minute) // until storage has given the tenant
	})
}

// Storage fails at the start. What is due goes without an index, and does not have it built: the periodic function does, each minute, and so
// does the list of tenants.
func TestIndexIsBuiltAgainAfterAStartThatFailed(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		e.stop()
		e.storage.refuse("list", intentPrefix)
		e.start()
		failed := func() int {
			synctest.Wait()
			return e.log.count("the index of tenants could not be built yet")
		}
		require.Equal(t, 1, failed())
		e.tick()
		require.Equal(t, 1, failed())
		e.minute()
		require.Equal(t, 2, failed())
		e.storage.heal()
		assert.Len(t, e.ok(logical.ListOperation, "tenants/", nil).Data["key_info"], 1)
	})
}
