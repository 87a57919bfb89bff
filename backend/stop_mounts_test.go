package backend

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/kaizala/kaizalatest"
)

// newMount starts another mount in the process of this one, with its own storage and service, and a tenant whose next exchange replaces the
// refresh token.
func (e *engine) newMount() *engine {
	other := newRotatingEngine(e.t.(*testing.T))
	other.stop()
	other.work = e.work
	other.start()
	return other
}

// exchangeTakes starts a read for which the service takes that long.
func (e *engine) exchangeTakes(d time.Duration) {
	e.kaizala.Inject(kaizalatest.Fault{Delay: d, Times: 1})
	go func() { _, _, _ = e.try(logical.ReadOperation, "creds/acme", nil) }()
	synctest.Wait()
}

// Vault stops one mount and ends the process, as it does when it reloads the plugin. The exchange of another mount is under way: the stop
// waits for it, so that its new refresh token is stored.
func TestStopWaitsForTheExchangesOfOtherMounts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		other := e.newMount()
		other.exchangeTakes(3 * time.Second)
		begun := time.Now()
		e.stop()
		assert.Equal(t, 3*time.Second, time.Since(begun))
		assert.Equal(t, other.kaizala.CurrentRefreshToken("acme"), other.stored("acme").RefreshToken)
		e.start()
	})
}

// Vault stops several mounts, one after another, while the service hangs: their exchanges get the time of one stop together, and an exchange
// that began later gets its own.
func TestStopsOfSeveralMountsTakeTheTimeOfOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mounts := []*engine{newConfiguredEngine(t)}
		for range 4 {
			mounts = append(mounts, mounts[0].newMount())
			mounts[len(mounts)-1].exchangeTakes(time.Minute)
		}
		last := mounts[0].newMount()
		begun := time.Now()
		for i, e := range mounts {
			e.stop()
			if i == 0 {
				last.exchangeTakes(2 * time.Second)
			}
		}
		assert.LessOrEqual(t, time.Since(begun), stopWithin+2*time.Second)
		last.stop()
		assert.Equal(t, last.kaizala.CurrentRefreshToken("acme"), last.stored("acme").RefreshToken)
		for _, e := range append(mounts, last) {
			e.start()
		}
	})
}
