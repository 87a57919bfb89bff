package backend

import (
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/kaizala/kaizalatest"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// moveTo starts the mount anew in the process of another one.
func (e *engine) moveTo(other *engine) {
	e.stop()
	e.work = other.work
	e.start()
}

// newMount starts another mount in the process of this one, with its own storage and service, and a tenant whose next exchange replaces the
// refresh token.
func (e *engine) newMount() *engine {
	other := newConfiguredEngine(e.t)
	other.kaizala.SetRefreshTokenAge(330 * day)
	other.write("tenants/acme", map[string]any{"refresh_token": other.newToken("acme"), "verify": false})
	other.moveTo(e)
	return other
}

// exchangeTakes starts an exchange for which the service takes that long.
func (e *engine) exchangeTakes(d time.Duration) {
	e.kaizala.Inject(kaizalatest.Fault{Delay: d, Times: 1})
	go func() { _, _, _ = e.try(logical.UpdateOperation, "tenants/acme/refresh", nil) }()
}

// Vault stops one mount and ends the process, as it does when it reloads the plugin. The exchange of another mount is under way: the stop
// waits for it, so that its new refresh token is stored.
func TestStopWaitsForTheExchangesOfOtherMounts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		other := e.newMount()
		other.exchangeTakes(3 * time.Second)
		synctest.Wait()
		begun := time.Now()
		e.stop()
		assert.Equal(t, 3*time.Second, time.Since(begun))
		assert.Equal(t, other.kaizala.CurrentRefreshToken("acme"), other.stored("acme").RefreshToken)
		e.start()
	})
}

// Vault stops several mounts, one after another, while the service hangs: their exchanges get the time of one stop together, and an exchange
// that begins during the first stop gets its own.
func TestStopsOfSeveralMountsTakeTheTimeOfOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mounts := []*engine{newConfiguredEngine(t)}
		for range 5 {
			mounts = append(mounts, mounts[0].newMount())
		}
		last := mounts[5]
		for _, e := range mounts[1:5] {
			e.exchangeTakes(time.Minute)
		}
		synctest.Wait()
		time.AfterFunc(3900*time.Millisecond, func() { last.exchangeTakes(3 * time.Second) })
		for i, want := range []time.Duration{4 * time.Second, 0, 0, 0, 0, 2900 * time.Millisecond} {
			begun := time.Now()
			mounts[i].stop()
			assert.Equal(t, want, time.Since(begun), i)
		}
		assert.Equal(t, last.kaizala.CurrentRefreshToken("acme"), last.stored("acme").RefreshToken)
		for _, e := range mounts {
			e.start()
		}
	})
}

// Vault stops one mount after another, with other work of its own in between, while the exchanges of all of them hang: the first stop waits
// for them, and the others do not.
func TestStopsOfBusyMountsABitApart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mounts := []*engine{newConfiguredEngine(t).newMount()}
		for range 2 {
			mounts = append(mounts, mounts[0].newMount())
		}
		for _, e := range mounts {
			e.exchangeTakes(time.Minute)
		}
		synctest.Wait()
		for i, e := range mounts {
			begun := time.Now()
			e.stop()
			if i == 0 {
				assert.Equal(t, stopGrace, time.Since(begun))
			} else {
				assert.Zero(t, time.Since(begun), i)
			}
			time.Sleep(500 * time.Millisecond)
		}
		for _, e := range mounts {
			e.start()
		}
	})
}

// A stop of another mount waits for the tokens of a grant, whichever way they come.
func TestStopWaitsForTheGrantsOfOtherMounts(t *testing.T) {
	for path, begin := range map[string]func(*grantEngine){
		byCode: func(e *grantEngine) {
			_, form := e.toConfirm()
			e.server.Inject(oauth2test.Fault{Delay: 2 * time.Second, Times: 1})
			go e.visit(logical.UpdateOperation, "callback", form)
		},
		byDevice: func(e *grantEngine) {
			code := e.start(byDevice, nil)["user_code"].(string)
			require.NoError(e.t, e.server.ApproveDevice(code, "jane"))
			e.server.Inject(oauth2test.Fault{Delay: 2 * time.Second, Times: 1})
			time.Sleep(5 * time.Second)
		},
		byPIN: func(e *grantEngine) {
			e.phone()
			e.kaizala.Inject(kaizalatest.Fault{Delay: 2 * time.Second, Times: 1})
			go func() { _, _, _ = e.pin(map[string]any{"pin": e.sentPIN()}) }()
		},
	} {
		t.Run(path, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newGrantEngine(t)
				other := newEngine(t)
				other.moveTo(e.engine)
				begin(e)
				synctest.Wait()
				begun := time.Now()
				other.stop()
				assert.GreaterOrEqual(t, time.Since(begun), 2*time.Second)
				assert.Less(t, time.Since(begun), 3*time.Second)
				assert.NotNil(t, e.stored("acme"))
				other.start()
			})
		})
	}
}

// A mount that stops while it has nothing to do leaves no work behind that the stops of other mounts would wait for: neither the exchange
// that it refuses nor one that has ended.
func TestStopLeavesNoWorkBehind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		other := e.newMount()
		other.read("creds/acme")
		other.stop()
		_, status, _ := other.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
		assert.Equal(t, 503, status)
		begun := time.Now()
		e.stop()
		assert.Equal(t, begun, time.Now())
		e.start()
		other.start()
	})
}

// Another mount stops at the beginning of a slow exchange and waits for it in vain. Later the exchange's own mount stops, shortly before the
// answer comes: it waits for that.
func TestStopWaitsThoughAnotherStopHas(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		other := e.newMount()
		begun := time.Now()
		other.exchangeTakes(30 * time.Second)
		synctest.Wait()
		e.stop()
		assert.Equal(t, 4*time.Second, time.Since(begun))
		time.Sleep(time.Until(begun.Add(27 * time.Second)))
		other.stop()
		assert.Equal(t, 30*time.Second, time.Since(begun))
		assert.Equal(t, other.kaizala.CurrentRefreshToken("acme"), other.stored("acme").RefreshToken)
		e.start()
		other.start()
	})
}

// The service of one mount hangs, and the mount begins one exchange after another. The stops of mounts that have nothing to do wait for
// these as long as one stop may.
func TestIdleMountsStopTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		busy := newOAuthEngine(t, oauth2test.ClassA, classB)
		var idle []*engine
		for range 5 {
			e := newConfiguredEngine(t)
			e.moveTo(busy.engine)
			idle = append(idle, e)
		}
		for i := range 30 {
			busy.add(fmt.Sprint("t", i), nil)
			busy.read(fmt.Sprint("token/t", i))
		}
		busy.server.Inject(oauth2test.Fault{Hang: true})
		busy.pass(70 * time.Minute)
		begun := time.Now()
		for _, e := range idle {
			e.stop()
		}
		assert.Equal(t, stopGrace, time.Since(begun))
		busy.stop()
		assert.LessOrEqual(t, time.Since(begun), 2*stopWithin)
		busy.server.ClearFaults()
		for _, e := range append(idle, busy.engine) {
			e.start()
		}
	})
}

// Mounts are stopped at the same time, a little apart, while the exchange of another hangs: no stop waits longer because others have begun.
func TestStopsThatOverlap(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		busy := newConfiguredEngine(t).newMount()
		var idle []*engine
		for range 4 {
			idle = append(idle, busy.newMount())
		}
		busy.exchangeTakes(time.Minute)
		synctest.Wait()
		var stops sync.WaitGroup
		for i, e := range idle {
			stops.Go(func() {
				time.Sleep(time.Duration(i) * 2500 * time.Millisecond)
				begun := time.Now()
				e.stop()
				assert.LessOrEqual(t, time.Since(begun), stopGrace)
			})
		}
		stops.Wait()
		busy.stop()
		for _, e := range append(idle, busy) {
			e.start()
		}
	})
}

// A process without work under way stops at once.
func TestIdleProcessStopsAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.newMount()
		begun := time.Now()
		e.work.stop()
		assert.Zero(t, time.Since(begun))
	})
}

// The process stops soon after one of its mounts, whose service hung: it waits for the exchange of another mount that began since.
func TestProcessStopsSoonAfterAMount(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		gone, other := e.newMount(), e.newMount()
		gone.exchangeTakes(time.Minute)
		synctest.Wait()
		gone.stop()
		time.Sleep(time.Second)
		other.exchangeTakes(2 * time.Second)
		synctest.Wait()
		begun := time.Now()
		e.work.stop()
		assert.Equal(t, 2*time.Second, time.Since(begun))
		assert.Equal(t, other.kaizala.CurrentRefreshToken("acme"), other.stored("acme").RefreshToken)
		gone.kaizala.ClearFaults()
		gone.start()
	})
}

// Once the process is to stop, no exchange begins: it could not wait for that.
func TestNoExchangeBeginsWhileTheProcessStops(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		one, other := e.newMount(), e.newMount()
		one.exchangeTakes(time.Minute)
		synctest.Wait()
		time.AfterFunc(3500*time.Millisecond, func() { other.exchangeTakes(time.Second) })
		e.work.stop()
		synctest.Wait()
		assert.Zero(t, other.kaizala.Exchanges("acme"))
		one.kaizala.ClearFaults()
	})
}

// Storage has refused a new refresh token, and works again: the stop of the process stores it.
func TestStopOfTheProcessStoresWhatStorageHasRefused(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.waitForIndex()
		e.kaizala.SetRefreshTokenAge(330 * day)
		e.write("tenants/acme", map[string]any{"refresh_token": e.newToken("acme"), "verify": false})
		e.storage.refuse("put", tenantPrefix)
		_, status, _ := e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
		require.Equal(t, 503, status)
		e.storage.heal()
		e.work.stop()
		assert.Equal(t, e.kaizala.CurrentRefreshToken("acme"), e.stored("acme").RefreshToken)
		assert.Empty(t, e.work.mounts)
	})
}

// A mount that is set up while the process stops begins no exchange.
func TestMountSetUpWhileTheProcessStops(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		one, late := e.newMount(), e.newMount()
		late.stop()
		time.Sleep(time.Minute)
		one.exchangeTakes(time.Minute)
		synctest.Wait()
		time.AfterFunc(time.Second, func() {
			late.start()
			late.exchangeTakes(10 * time.Second)
		})
		e.work.stop()
		synctest.Wait()
		assert.Empty(t, late.kaizala.Calls())
		one.kaizala.ClearFaults()
	})
}
