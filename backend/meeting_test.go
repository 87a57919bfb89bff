package backend

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/kaizala/kaizalatest"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// Two flows run at the same time. Each test guards one race that has gone wrong before.

// failPuts makes storage fail each put of a tenant.
func (e *engine) failPuts() { e.storage.refuse("put", tenantPrefix) }

// A tenant that is deleted while its first write is verified stays deleted, also if another write creates it during the
// verification: the delete is the last request that ended, so it decides.
func TestDeleteWinsOverAVerificationThatCreates(t *testing.T) {
	for name, meanwhile := range map[string]func(*engine){
		"delete": func(*engine) {},
		"write and delete": func(e *engine) {
			e.write("tenants/acme", map[string]any{"refresh_token": e.newToken("other"), "verify": false})
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newConfiguredEngine(t)
				e.kaizala.Inject(kaizalatest.Fault{Delay: 4 * time.Second, Times: 1})
				told := make(chan int)
				go func() {
					_, status, _ := e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": e.newToken("acme")})
					told <- status
				}()
				time.Sleep(2 * time.Second)
				meanwhile(e)
				e.ok(logical.DeleteOperation, "tenants/acme", nil)
				assert.Equal(t, http.StatusServiceUnavailable, <-told)
				synctest.Wait() // the flight answers the writer first, and drops the record then
				assert.Nil(t, e.stored("acme"))
				assert.Nil(t, e.tenants.named("acme"))
			})
		})
	}
}

// A tenant is deleted, verified anew and deleted again while another request works on its record all the time: the write that was verified
// is not stored after the second delete.
func TestTenantIsDeletedTwiceAroundAVerification(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.waitForIndex()
		defer e.tenants.release(e.tenants.record("acme"))
		e.ok(logical.DeleteOperation, "tenants/acme", nil)
		e.kaizala.Inject(kaizalatest.Fault{Delay: 3 * time.Second, Times: 1})
		_, status := e.ask(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": e.newToken("acme")})
		time.Sleep(time.Second)
		e.ok(logical.DeleteOperation, "tenants/acme", nil)
		assert.Equal(t, http.StatusServiceUnavailable, <-status)
		assert.Nil(t, e.stored("acme"))
	})
}

// A tenant that is being stored stays in the registry when the service refuses another first write of the same tenant. Without its
// record in the registry no exchange could be made for it, and its readers would try again without end.
func TestFirstWriteIsRefusedWhileAnotherIsStored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.waitForIndex()
		e.kaizala.Inject(kaizalatest.Fault{Delay: 3 * time.Second, Times: 1})
		refused := make(chan int)
		go func() {
			_, status, _ := e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": "unknown"})
			refused <- status
		}()
		time.Sleep(time.Second)
		reached, release := e.storage.hold("put", tenantPrefix)
		stored := make(chan int)
		go func() {
			_, status, _ := e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": e.newToken("acme"), "verify": false})
			stored <- status
		}()
		<-reached
		require.Equal(t, http.StatusBadRequest, <-refused)
		synctest.Wait()
		release()
		require.Equal(t, http.StatusNoContent, <-stored)
		require.Contains(t, e.ok(logical.ListOperation, "tenants/", nil).Data["key_info"], "acme")
		e.read("creds/acme")

		e.ok(logical.DeleteOperation, "tenants/acme", nil)
		synctest.Wait() // the reader's exchange leaves the record after it has answered
		assert.Nil(t, e.tenants.named("acme"))
	})
}

// A read of a tenant that does not exist leaves no record of it in memory, also if the reader cancels at the moment when another
// reader of the same tenant ends.
func TestReaderOfNoTenantLeaves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.waitForIndex()
		for range 20 { // either of the two readers may end last
			reached, release := e.storage.hold("get", tenantPrefix)
			var readers sync.WaitGroup
			readers.Go(func() { _, _, _ = e.try(logical.ReadOperation, "creds/acme", nil) })
			<-reached
			ctx, leave := context.WithCancel(t.Context())
			readers.Go(func() { _, _, _ = e.tryContext(ctx, logical.ReadOperation, "creds/acme", nil) })
			synctest.Wait()
			leave()
			release()
			readers.Wait()
			require.Nil(t, e.tenants.named("acme"))
		}
	})
}

// A write of a new refresh token clears the failure and the backoff of the one that it replaces: the next read calls the service.
func TestWriteEndsTheTroubleBefore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		e.kaizala.Inject(kaizalatest.Fault{Status: http.StatusInternalServerError, Times: 1})
		_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
		require.Equal(t, http.StatusServiceUnavailable, status)
		require.Equal(t, statusDegraded, e.status("acme"))
		e.write("tenants/acme", map[string]any{"ttl": "1h"})
		require.Equal(t, statusDegraded, e.status("acme"), "it is the same refresh token")
		e.write("tenants/acme", map[string]any{"refresh_token": e.newToken("acme"), "verify": false})
		assert.Equal(t, statusUnverified, e.status("acme"))
		e.read("creds/acme")
	})
}

// A refresh token is replaced during its exchange, and the exchange fails. The failure does not count for the new refresh token, and
// the readers who waited get an access token of the new one.
func TestFailureOfAReplacedTokenIsNobodys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		e.kaizala.Inject(kaizalatest.Fault{Delay: 4 * time.Second, Status: http.StatusInternalServerError, Times: 1})
		told := make(chan int)
		go func() {
			_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
			told <- status
		}()
		time.Sleep(2 * time.Second)
		e.write("tenants/acme", map[string]any{"refresh_token": e.newToken("successor"), "verify": false})
		assert.Equal(t, http.StatusOK, <-told)
		assert.Equal(t, statusOK, e.status("acme"))
		assert.Zero(t, e.log.count("an exchange failed"))
	})
}

// New tokens that storage has not taken stay in memory when a lease on the older access token is revoked. The next write of the
// tenant stores them, and the tenant's status is ok again.
func TestRevocationLeavesKeptTokensAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		token := e.newToken("acme")
		time.Sleep(inWindow - 13*time.Hour)
		e.write("tenants/acme", map[string]any{"refresh_token": token})
		lease := e.lease("acme")
		time.Sleep(2 * time.Hour)
		e.failPuts()
		_, status, _ := e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
		require.Equal(t, http.StatusServiceUnavailable, status)
		e.storage.heal()
		require.NoError(t, e.revokeLease(lease))
		v := e.tenants.named("acme").view.Load()
		require.NotNil(t, v.kept)
		assert.Equal(t, doubted, v.knows, "storage does not have the tokens that memory has")
		assert.Equal(t, e.kaizala.CurrentRefreshToken("acme"), e.held("acme"))
		e.write("tenants/acme", map[string]any{"ttl": "1h"}) // this write stores the tokens too
		assert.Equal(t, e.kaizala.CurrentRefreshToken("acme"), e.stored("acme").RefreshToken)
		assert.Equal(t, time.Hour, e.stored("acme").TTL)
		assert.Equal(t, statusOK, e.status("acme"))
		assert.Equal(t, 1, e.log.count("exchanges of a tenant succeed again"))
		synctest.Wait()
		assert.Equal(t, []string{eventRotated + " acme"}, e.events.all())
		e.read("creds/acme")
		assert.Equal(t, 2, e.kaizala.CallCount())
	})
}

// A connector is not deleted while memory has the new tokens of one of its tenants and storage does not.
func TestConnectorOfKeptTokensStays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		token := e.newToken("acme")
		time.Sleep(inWindow)
		e.failPuts()
		_, status, _ := e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": token})
		require.Equal(t, http.StatusServiceUnavailable, status)
		_, status, _ = e.try(logical.DeleteOperation, "config", nil)
		assert.Equal(t, http.StatusBadRequest, status)
		e.storage.heal()
		e.pass(2 * time.Minute)
		e.read("creds/acme")
	})
}

// The engine stops while storage does not answer the write of one tenant: the tokens that memory keeps for another tenant are stored
// all the same.
func TestStopSavesBesideAWriteThatHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		token, other := e.newToken("acme"), e.newToken("other")
		time.Sleep(inWindow)
		e.write("tenants/acme", map[string]any{"refresh_token": token, "verify": false})
		e.failPuts()
		_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
		require.Equal(t, http.StatusServiceUnavailable, status)
		e.storage.heal()
		hangs := make(chan struct{})
		e.storage.surround(func(op, key string, do func() error) error {
			if op == "put" && key == tenantPrefix+"other" {
				<-hangs
			}
			return do()
		})
		go func() {
			_, _, _ = e.try(logical.UpdateOperation, "tenants/other", map[string]any{"refresh_token": other})
		}()
		synctest.Wait()
		if v := e.tenants.named("acme").view.Load(); v.kept == nil {
			t.Fatal("nothing is kept")
		}
		e.stop()
		assert.Equal(t, e.kaizala.CurrentRefreshToken("acme"), e.stored("acme").RefreshToken)
		close(hangs)
		e.storage.heal()
		synctest.Wait()
		e.start()
	})
}

// The tokens of an exchange that ends while the engine stops are stored, also if storage fails at first, and their event is sent.
func TestStopSavesWhatComesMeanwhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		token := e.newToken("acme")
		time.Sleep(inWindow)
		e.write("tenants/acme", map[string]any{"refresh_token": token, "verify": false})
		var puts atomic.Int32
		e.storage.surround(func(op, key string, do func() error) error {
			if op == "put" && key == tenantPrefix+"acme" && puts.Add(1) == 1 {
				time.Sleep(stopWithin - time.Second/2)
				return errStorage
			}
			return do()
		})
		go func() { _, _, _ = e.try(logical.ReadOperation, "creds/acme", nil) }()
		synctest.Wait()
		e.stop()
		assert.Equal(t, e.kaizala.CurrentRefreshToken("acme"), e.stored("acme").RefreshToken)
		assert.Equal(t, []string{eventRotated + " acme"}, e.events.all())
		e.storage.heal()
		e.start()
	})
}

// A failed exchange changes nothing in storage but the note of its call.
func TestFailedExchangeStoresNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		e.kaizala.Inject(kaizalatest.Fault{Status: http.StatusInternalServerError})
		e.storage.failWith(func(op, key string) error {
			assert.False(t, op != "get" && op != "list" && !strings.HasPrefix(key, callPrefix), "%s %s", op, key)
			return nil
		})
		_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
		assert.Equal(t, http.StatusServiceUnavailable, status)
		e.storage.heal()
		e.kaizala.ClearFaults()
	})
}

// Storage takes a write of a tenant and reports an error. The engine finds the tenant without a read of it.
func TestTenantThatStorageTookUnheardIsInTheIndex(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		token := e.newToken("acme")
		time.Sleep(inWindow)
		e.storage.surround(func(op, key string, do func() error) error {
			if err := do(); err != nil || op != "put" {
				return err
			}
			return errStorage
		})
		_, status, _ := e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": token, "verify": false})
		require.GreaterOrEqual(t, status, 500)
		e.storage.heal()
		e.pass(5 * time.Minute)
		assert.Equal(t, e.kaizala.CurrentRefreshToken("acme"), e.stored("acme").RefreshToken, "it was past 90 % of its life")
		assert.Equal(t, originService, e.stored("acme").RefreshTokenOrigin)
	})
}

// A refresh token that was checked for one connector is not stored for another one.
func TestUnverifiedWriteIsCheckedForTheConnectorThatItGets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		id, secret := e.kaizala.RegisterConnector()
		e.write("config/other", map[string]any{"connector_id": id, "connector_secret": secret})
		e.addTenant("acme")
		theirs := e.kaizala.GenerateUserToken(id, "other")
		mine := e.newToken("acme")
		e.tenants.loaded.Purge()
		held := make(chan struct{})
		binding := e.connectors.record(defaultConnector).binding
		require.NoError(t, binding.Acquire(t.Context(), exclusive)) // the write has been checked, and waits here
		go func() {
			defer close(held)
			_, status, text := e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": mine, "verify": false})
			assert.Equal(t, http.StatusBadRequest, status, text)
		}()
		synctest.Wait()
		e.write("tenants/acme", map[string]any{"refresh_token": theirs, "connector": "other", "verify": false})
		binding.Release(exclusive)
		<-held
		assert.Equal(t, theirs, e.stored("acme").RefreshToken)
	})
}

// A read and a refresh that come during the verification of a write wait for its end, and then use what is stored. If the written
// refresh token was wrong, only the write fails. If it was right, the refresh uses it.
func TestVerificationIsTheWritersAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		var flows sync.WaitGroup
		e.kaizala.Inject(kaizalatest.Fault{Delay: 4 * time.Second, Times: 1})
		flows.Go(func() {
			_, status, text := e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": "mistyped"})
			assert.Equal(t, http.StatusBadRequest, status, text)
		})
		time.Sleep(time.Second)
		flows.Go(func() { e.read("creds/acme") })
		flows.Go(func() { e.write("tenants/acme/refresh", nil) })
		flows.Wait()
		assert.Equal(t, statusOK, e.status("acme"))
		assert.Equal(t, "acme", e.kaizala.Calls()[1].User)

		before := e.read("token/acme")["access_token"]
		e.kaizala.Inject(kaizalatest.Fault{Delay: 4 * time.Second, Times: 1})
		flows.Go(func() { e.write("tenants/acme", map[string]any{"refresh_token": e.newToken("successor")}) })
		time.Sleep(time.Second)
		flows.Go(func() {
			e.write("tenants/acme/refresh", nil)
			calls := e.kaizala.Calls()
			assert.Equal(t, "successor", calls[len(calls)-1].User)
			assert.NotEqual(t, before, e.read("token/acme")["access_token"])
		})
		flows.Wait()
	})
}

// Two writes come at the same time, and their settings contradict each other: the later one is refused.
func TestSettingsOfTwoWritesAreValidatedTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		e.storage.surround(func(op, _ string, do func() error) error {
			if op == "put" {
				time.Sleep(time.Second)
			}
			return do()
		})
		var writes sync.WaitGroup
		var refused atomic.Int64
		for field, value := range map[string]string{"ttl": "2h", "max_ttl": "1h"} {
			writes.Go(func() {
				_, status, text := e.try(logical.UpdateOperation, "tenants/acme", map[string]any{field: value})
				if status == http.StatusBadRequest {
					assert.Contains(t, text, "ttl is over max_ttl")
					refused.Add(1)
				}
			})
		}
		writes.Wait()
		assert.EqualValues(t, 1, refused.Load())
	})
}

// A 429 pauses the connector, also if the tenant whose exchange got it has been deleted or written since.
func TestLimitHoldsThoughItsTenantIsGone(t *testing.T) {
	for name, goes := range map[string]func(*engine){
		"deleted": func(e *engine) { e.ok(logical.DeleteOperation, "tenants/acme", nil) },
		"written": func(e *engine) {
			e.write("tenants/acme", map[string]any{"refresh_token": e.newToken("successor"), "verify": false})
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newConfiguredEngine(t)
				e.addTenant("acme")
				e.addTenant("other")
				e.kaizala.Inject(kaizalatest.Fault{Delay: 2 * time.Second, Status: 429, Header: http.Header{"Retry-After": {"300"}}, Times: 1})
				go func() { _, _, _ = e.try(logical.ReadOperation, "creds/acme", nil) }()
				time.Sleep(time.Second)
				goes(e)
				time.Sleep(2 * time.Second)
				_, status, _ := e.try(logical.ReadOperation, "creds/other", nil)
				assert.Equal(t, http.StatusTooManyRequests, status)
				e.restart()
				_, status, _ = e.try(logical.ReadOperation, "creds/other", nil)
				assert.Equal(t, http.StatusTooManyRequests, status)
				assert.Equal(t, 1, e.kaizala.CallCount())
				time.Sleep(5 * time.Minute)
				e.read("creds/other")
			})
		})
	}
}

// Another node writes a tenant while this node reads it from storage: this node reads it again.
func TestTenantIsInvalidatedDuringALoad(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		e.read("tenants/acme")
		e.waitForIndex() // a tenant that the index is being built of stays in memory
		e.tenants.loaded.Purge()
		read := false
		e.storage.surround(func(op, key string, do func() error) error {
			err := do()
			if op == "get" && key == "tenants/acme" && !read {
				read = true
				entry := *e.stored("acme")
				entry.TTL = 77 * time.Minute
				require.NoError(t, putEntry(t.Context(), e.storage.InmemStorage, key, &entry))
				e.InvalidateKey(t.Context(), key)
			}
			return err
		})
		assert.EqualValues(t, 77*60, e.read("tenants/acme")["ttl"])
		assert.True(t, read)
	})
}

// Another node writes a connector while this node reads it from storage: this node reads it again.
func TestConnectorIsInvalidatedDuringALoad(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		key := connectorPrefix + defaultConnector
		e.connectors.invalidate(key) // unlike InvalidateKey, this starts no read in the background
		var read atomic.Bool
		e.storage.surround(func(op, at string, do func() error) error {
			err := do()
			if op == "get" && at == key && read.CompareAndSwap(false, true) {
				entry, failure := e.storedConnector(t.Context(), defaultConnector)
				require.NoError(t, failure)
				entry.ExchangesPerMinute = 7
				require.NoError(t, putEntry(t.Context(), e.storage.InmemStorage, key, entry))
				e.InvalidateKey(t.Context(), key)
			}
			return err
		})
		via, err := e.connectors.get(t.Context(), defaultConnector)
		require.NoError(t, err)
		assert.Equal(t, 7, via.entry.ExchangesPerMinute)
		assert.True(t, read.Load())
	})
}

// The engine does not know the number of leases that an earlier process gave on an access token. So the first lease on that token
// that is revoked gives the token up.
func TestLeasesOfBeforeARestartAreNotForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		e.lease("acme")
		e.restart()
		lease := e.lease("acme")
		e.lease("acme")
		require.NoError(t, e.revokeLease(lease))
		assert.NotEqual(t, accessTokenOf(lease), accessTokenOf(e.lease("acme")))
	})
}

// A token is given up, and storage does not take that. The tenant then stays in memory, so that the token is not handed out again.
func TestWhatIsGivenUpInMemoryAloneStays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		lease := e.lease("acme")
		e.failPuts()
		require.Error(t, e.revokeLease(lease))
		e.tenants.loaded.Purge()
		e.storage.heal()
		assert.NotEqual(t, accessTokenOf(lease), e.read("token/acme")["access_token"])
	})
}

// The engine does not use a written refresh token before storage has taken the write: in an exchange the service might replace it,
// and the new refresh token would be lost with a write that fails.
func TestWriteIsNotSeenBeforeItIsStored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		token := e.read("token/acme")["access_token"]
		e.storage.failWith(func(op, key string) error {
			if op == "put" && key == "tenants/acme" {
				time.Sleep(3 * time.Second)
				return errStorage
			}
			return nil
		})
		told := make(chan int)
		go func() {
			_, status, _ := e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": e.newToken("operator"), "verify": false})
			told <- status
		}()
		time.Sleep(time.Second)
		assert.Equal(t, token, e.read("token/acme")["access_token"])
		assert.Equal(t, http.StatusInternalServerError, <-told)
		e.storage.heal()
		assert.Equal(t, token, e.read("token/acme")["access_token"])
		assert.Zero(t, e.kaizala.Exchanges("operator"))
	})
}

// A config write sets exchange_invalidates during an exchange: the access token of that exchange gets a planned time.
func TestConfigWriteDuringAnExchangePlansItsToken(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassD, classB)
		e.add("acme", nil)
		e.server.Inject(oauth2test.Fault{Delay: 2 * time.Second, Times: 1})
		var lease *logical.Response
		var reads sync.WaitGroup
		reads.Go(func() { lease = e.lease("acme") })
		synctest.Wait()
		e.write("config", map[string]any{"exchange_invalidates": true})
		reads.Wait()
		planned := e.stored("acme").Access.Planned
		require.False(t, planned.IsZero())
		assert.False(t, time.Now().Add(lease.Secret.MaxTTL).After(planned), "the lease ends before the exchange that ends its token")
	})
}

// token_per_lease and revocation are switched off during the exchange for a lease's own access token. When revocation is on again,
// the token ends with its lease, and not with the next exchange after a restart.
func TestOwnTokenComesWhileRevocationIsSwitchedOff(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", map[string]any{"token_per_lease": true})
		e.server.Inject(oauth2test.Fault{Delay: 2 * time.Second, Times: 1})
		var lease *logical.Response
		var reads sync.WaitGroup
		reads.Go(func() { lease = e.lease("acme") })
		synctest.Wait()
		e.write("tenants/acme", map[string]any{"token_per_lease": false})
		e.write("config", map[string]any{"revocation": "none"})
		reads.Wait()
		require.Equal(t, "true", lease.Secret.InternalData[leaseOwn])
		e.write("config", classA)
		e.restart()
		e.lease("acme")
		synctest.Wait()
		assert.True(t, e.server.Alive(accessTokenOf(lease)))
		e.revoke(lease)
		assert.False(t, e.server.Alive(accessTokenOf(lease)))
		e.kept()
	})
}

func TestConfigWriteKeepsTheCountOfLeases(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		one, other := e.lease("acme"), e.lease("acme")
		e.write("config", map[string]any{"exchanges_per_minute": 50_000})
		e.revoke(one)
		assert.True(t, e.server.Alive(accessTokenOf(other)), "a lease on it lives")
		e.revoke(other)
		assert.False(t, e.server.Alive(accessTokenOf(other)))
	})
}

// A call has its place in the share and is not made yet when the service answers another call with a 429: it is not made.
func TestPauseStopsACallThatIsAboutToBeMade(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenants(2)
		e.kaizala.Inject(kaizalatest.Fault{User: "t0", Status: 429, Header: http.Header{"Retry-After": {"300"}}, Delay: 2 * time.Second})
		var readers sync.WaitGroup
		told := [2]int{}
		read := func(i int) {
			readers.Go(func() { _, told[i], _ = e.try(logical.ReadOperation, fmt.Sprint("creds/t", i), nil) })
		}
		read(0)
		time.Sleep(time.Second)
		e.storage.surround(func(op, key string, do func() error) error {
			if op == "put" && strings.HasPrefix(key, callPrefix) {
				time.Sleep(3 * time.Second)
			}
			return do()
		})
		read(1)
		readers.Wait()
		assert.Equal(t, [2]int{429, 429}, told)
		assert.Equal(t, 1, e.kaizala.CallCount())
	})
}

// A connector is written while a call of it waits for a place in the share: storage gets no note of that call.
func TestReplacedConnectorsCallIsNotNoted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.setShare(1)
		e.addTenants(2)
		e.read("creds/t0")
		time.Sleep(57 * time.Second)
		done := make(chan struct{})
		go func() {
			defer close(done)
			e.read("creds/t1")
		}()
		time.Sleep(time.Second)
		e.write("config", map[string]any{"request_timeout": "50s"})
		<-done
		assert.Equal(t, 2, e.storage.putsOf(callPrefix+"default/0"))
		assert.Zero(t, e.storage.putsOf(callPrefix+"default/1"))
	})
}

// The service refuses a connector, and the connector's share is used up too: the answer to a verified write names the refusal.
func TestRefusalIsToldThoughTheShareIsUsedUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.write("config", map[string]any{"exchanges_per_minute": 1, "connector_secret": "wrong"})
		e.addTenants(1)
		_, status, _ := e.try(logical.ReadOperation, "creds/t0", nil)
		require.Equal(t, http.StatusBadRequest, status)
		_, status, text := e.try(logical.UpdateOperation, "tenants/t1", map[string]any{"refresh_token": e.newToken("t1")})
		assert.Equal(t, http.StatusBadRequest, status)
		assert.Contains(t, text, "connector_secret")
		assert.Equal(t, 1, e.kaizala.CallCount())
	})
}

// unheard makes storage carry out an operation below a prefix, and report an error.
func (s *storage) unheard(op, prefix string) {
	s.surround(func(asked, key string, do func() error) error {
		err := do()
		if asked == op && strings.HasPrefix(key, prefix) {
			return errStorage
		}
		return err
	})
}

// unheardOnce does so for the first such operation alone. over returns whether that has come.
func (s *storage) unheardOnce(op, prefix string) (over func() bool) {
	var done atomic.Bool
	s.surround(func(asked, key string, do func() error) error {
		err := do()
		if asked == op && strings.HasPrefix(key, prefix) && done.CompareAndSwap(false, true) {
			return errStorage
		}
		return err
	})
	return done.Load
}

// once calls f before the first operation of that kind below a prefix. over returns whether f has been called.
func (s *storage) once(op, prefix string, f func()) (over func() bool) {
	var done atomic.Bool
	s.surround(func(asked, key string, do func() error) error {
		if asked == op && strings.HasPrefix(key, prefix) && done.CompareAndSwap(false, true) {
			f()
		}
		return do()
	})
	return done.Load
}

// refuse makes storage fail one operation below a prefix.
func (s *storage) refuse(op, prefix string) {
	s.failWith(func(asked, key string) error {
		if asked == op && strings.HasPrefix(key, prefix) {
			return errStorage
		}
		return nil
	})
}

var revokeAll = map[string]any{"revocation": "access_token", "exchange_invalidates": false, "revoke_on_delete": true}

// Storage fails during a write or a delete: the tenant still works. Its refresh token lives, and no reader gets an access token that
// has been revoked, also after a restart.
func TestFailedWriteLeavesATenantThatWorks(t *testing.T) {
	for name, c := range map[string]struct {
		op   logical.Operation
		data func(*oauthEngine) map[string]any
		fail func(*storage)
	}{
		"delete":              {op: logical.DeleteOperation, fail: func(s *storage) { s.refuse("delete", tenantPrefix) }},
		"delete, intent":      {op: logical.DeleteOperation, fail: func(s *storage) { s.refuse("put", intentPrefix) }},
		"delete, intent kept": {op: logical.DeleteOperation, fail: func(s *storage) { s.unheard("put", intentPrefix) }},
		"delete, second intent kept": {op: logical.DeleteOperation, fail: func(s *storage) {
			intents := 0
			s.surround(func(op, key string, do func() error) error {
				err := do()
				if op == "put" && strings.HasPrefix(key, intentPrefix) {
					if intents++; intents == 2 {
						return errStorage
					}
				}
				return err
			})
		}},
		"write": {op: logical.UpdateOperation, fail: func(s *storage) { s.refuse("put", tenantPrefix) }, data: func(e *oauthEngine) map[string]any {
			return map[string]any{"refresh_token": e.server.Grant(e.clientID, "other"), "verify": false}
		}},
		"delete, older tokens": {op: logical.DeleteOperation, fail: func(s *storage) { s.refuse("list", heldPrefix) }},
		"write, older tokens": {op: logical.UpdateOperation, fail: func(s *storage) { s.refuse("list", heldPrefix) }, data: func(e *oauthEngine) map[string]any {
			return map[string]any{"refresh_token": e.server.Grant(e.clientID, "other"), "verify": false}
		}},
		"verified write, older tokens": {op: logical.UpdateOperation, fail: func(s *storage) { s.refuse("list", heldPrefix) }, data: func(e *oauthEngine) map[string]any {
			return map[string]any{"refresh_token": e.server.Grant(e.clientID, "other")}
		}},
	} {
		for _, restart := range []bool{false, true} {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, func(o *oauth2test.Options) { oauth2test.ClassA(o); o.Rotation = oauth2test.RotateNever }, revokeAll)
				e.add("acme", nil)
				e.lease("acme")
				e.waitForIndex()
				var data map[string]any
				if c.data != nil {
					data = c.data(e)
				}
				c.fail(e.storage)
				_, status, _ := e.try(c.op, "tenants/acme", data)
				require.GreaterOrEqual(t, status, 500, name)
				e.storage.heal()
				e.pass(3 * time.Minute)
				if restart {
					e.restart()
					e.pass(2 * time.Minute)
				}
				assert.True(t, e.server.Alive(accessTokenOf(e.lease("acme"))), name)
				assert.True(t, e.server.RefreshTokenAlive(e.server.CurrentRefreshToken("acme")), name)
				e.ok(logical.DeleteOperation, "tenants/acme", nil)
				e.pass(time.Minute)
				assert.Empty(t, e.server.AccessTokens("acme"), name)
				assert.False(t, e.server.RefreshTokenAlive(e.server.CurrentRefreshToken("acme")), name)
				assert.NotContains(t, e.storedText(), intentPrefix, name)
			})
		}
	}
}

// Storage carries out a delete and reports an error: the tokens of the deleted tenant are revoked all the same.
func TestDeleteThatStorageDoesUnheardRevokes(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, revokeAll)
		e.add("acme", nil)
		e.lease("acme")
		e.waitForIndex()
		e.storage.unheard("delete", tenantPrefix)
		_, status, _ := e.try(logical.DeleteOperation, "tenants/acme", nil)
		require.Equal(t, 500, status)
		e.storage.heal()
		e.pass(2 * time.Minute)
		assert.False(t, e.server.RefreshTokenAlive(e.server.CurrentRefreshToken("acme")))
		assert.Empty(t, e.server.AccessTokens("acme"))
		assert.NotContains(t, e.storedText(), intentPrefix)
	})
}

// A refresh token waits for its revocation, the process restarts, and the token is written again before the new process has read the
// intents of revocations: the token is not revoked.
func TestRefreshTokenIsSparedAfterAStart(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, revokeAll)
		token := e.server.Grant(e.clientID, "acme")
		e.write("tenants/acme", map[string]any{"refresh_token": token, "verify": false})
		e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointRevocation, Answer: oauth2test.BadGateway})
		e.ok(logical.DeleteOperation, "tenants/acme", nil)
		synctest.Wait()
		e.crash()
		e.storage.refuse("list", intentPrefix)
		synctest.Wait()
		e.storage.heal()
		e.write("tenants/acme", map[string]any{"refresh_token": token, "verify": false})
		e.server.ClearFaults()
		e.pass(3 * time.Minute)
		assert.True(t, e.server.RefreshTokenAlive(token))
	})
}

// Storage takes a write and reports an error, and then the tenant is deleted: the delete revokes the refresh token that storage had.
func TestDeleteRevokesWhatStorageHas(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, revokeAll)
		e.add("acme", nil)
		token := e.server.Grant(e.clientID, "other")
		e.storage.unheard("put", tenantPrefix)
		_, status, _ := e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": token, "verify": false})
		require.Equal(t, 500, status)
		e.storage.heal()
		e.ok(logical.DeleteOperation, "tenants/acme", nil)
		e.pass(time.Minute)
		assert.False(t, e.server.RefreshTokenAlive(token))
	})
}

// A read of creds fails because storage fails, or reports an error after it has taken the record: the access token for that lease is
// revoked, and its record is deleted.
func TestTokenForOneLeaseThatWasNotIssued(t *testing.T) {
	for _, fail := range []func(*storage){
		func(s *storage) { s.refuse("put", tenantPrefix) },
		func(s *storage) { s.unheard("put", heldPrefix) },
	} {
		bubble(t, func(t *testing.T) {
			e := newOAuthEngine(t, oauth2test.ClassA, classA)
			e.add("acme", map[string]any{"token_per_lease": true})
			e.waitForIndex()
			fail(e.storage)
			_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
			require.Equal(t, 503, status)
			e.storage.heal()
			e.pass(3 * time.Minute)
			assert.Empty(t, e.server.AccessTokens("acme"))
			e.pass(time.Hour)
			assert.NotContains(t, e.storedText(), heldPrefix)
		})
	}
}

// The process dies before the access token for one lease has its record. In the next process, a request reads the tenant before the
// index has listed the tenants; the request that starts a plugin again always does. The token is revoked all the same.
func TestTenantIsReadBeforeTheIndexLooksAtItsTokenForOneLease(t *testing.T) {
	for _, request := range []string{"tenants/acme", "token/acme"} {
		bubble(t, func(t *testing.T) {
			e := newOAuthEngine(t, oauth2test.ClassA, classA)
			e.add("acme", map[string]any{"token_per_lease": true})
			shared := e.read("token/acme")["access_token"]
			e.waitForIndex()
			e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointRevocation, Answer: oauth2test.BadGateway})
			dead := false
			e.storage.surround(func(op, key string, do func() error) error {
				if dead = dead || op == "put" && strings.HasPrefix(key, heldPrefix); dead {
					return errStorage
				}
				return do()
			})
			_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
			require.Equal(t, 503, status)
			require.Len(t, e.server.AccessTokens("acme"), 2)

			next := &storage{InmemStorage: e.storage.InmemStorage}
			_, look := next.hold("list", tenantPrefix)
			e.crashOnto(next)
			e.server.ClearFaults()
			e.read(request)
			look()
			e.pass(3 * time.Minute)
			assert.Equal(t, []string{shared.(string)}, e.server.AccessTokens("acme"))
		})
	}
}

// A write without verification moves a tenant to another connector: the older access token is revoked at once, and the tenant shows
// the revocations that are pending at the connector that it left.
func TestTenantThatMovesShowsWhatIsPending(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		id, secret := e.server.RegisterClient(oauth2test.AuthBasic)
		e.write("config/hr", map[string]any{
			"service": "oauth2", "token_url": e.server.TokenURL(), "connector_id": id, "connector_secret": secret,
		})
		e.add("acme", nil)
		e.lease("acme")
		e.waitForIndex()
		e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointRevocation, Answer: oauth2test.BadGateway, Times: 1})
		e.write("tenants/acme", map[string]any{"refresh_token": e.server.Grant(id, "acme"), "connector": "hr", "verify": false})
		synctest.Wait()
		assert.Equal(t, 1, e.pending("acme"))
		assert.Contains(t, e.read("tenants/acme")["last_revocation_error"], "502")
		time.Sleep(2 * time.Second)
		assert.Nil(t, e.pending("acme"))
		assert.NotContains(t, e.read("tenants/acme"), "last_revocation_error")
		assert.Len(t, e.revocations(), 2)
	})
}

// The service refuses the verification of a write, and the process restarts. The next process does not take that for an exchange whose
// answer was lost: it makes no exchange, and so ends no access token.
func TestRefusedWriteAsksNothingAfterARestart(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassD, classD)
		e.add("acme", nil)
		lease := e.lease("acme")
		time.Sleep(time.Minute)
		_, status, _ := e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": "mistyped"})
		require.Equal(t, http.StatusBadRequest, status)
		e.restart()
		e.pass(2 * time.Minute)
		assert.Equal(t, 1, e.server.Exchanges("acme"))
		assert.True(t, e.server.Alive(accessTokenOf(lease)))
	})
}

// A tenant is scheduled while its connector is not in memory: its exchanges come as often as the connector's keep_alive says all the
// same.
func TestKeepAliveOfAConnectorThatHasLeftMemory(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		lease := e.lease("acme")
		e.storage.surround(func(op, key string, do func() error) error {
			err := do()
			if op == "put" && key == "tenants/acme" {
				e.connectors.invalidate(connectorPrefix + defaultConnector) // unlike InvalidateKey, this starts no read in the background
			}
			return err
		})
		e.revoke(lease)
		e.storage.heal()
		time.Sleep(73 * time.Hour)
		assert.Equal(t, 2, e.server.Exchanges("acme"))
	})
}

// A tenant is deleted long after its attempts at a grant ended: their records are deleted from storage within a day, and are not read
// each minute until then.
func TestAttemptsOfADeletedTenantAreForgotten(t *testing.T) {
	for _, restart := range []bool{false, true} {
		bubble(t, func(t *testing.T) {
			e := newGrantEngine(t)
			e.write("config/as", map[string]any{"confirm": false})
			require.Equal(t, 200, e.open(e.authorize(nil)).status)
			e.pass(time.Hour)
			if restart {
				e.restart()
				e.pass(time.Hour)
			}
			e.ok(logical.DeleteOperation, "tenants/acme", nil)
			e.pass(time.Hour)
			assert.Equal(t, attemptGranted, e.attemptStatus(byCode))
			looks := 0
			e.storage.failWith(func(op, key string) error {
				if op == "get" && strings.HasPrefix(key, attemptKeys) {
					looks++
				}
				return nil
			})
			e.pass(29 * time.Hour)
			assert.LessOrEqual(t, looks, 3, "an attempt that is kept for a day is not read each minute")
			assert.NotContains(t, e.storedText(), attemptPrefix)
		})
	}
}

// A config write that drops the pending revocations also clears their last error.
func TestDroppedRevocationsLeaveNoError(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		lease := e.lease("acme")
		e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointRevocation, Answer: oauth2test.BadGateway})
		e.revoke(lease)
		synctest.Wait()
		require.Contains(t, e.read("config"), "last_revocation_error")
		e.write("config", map[string]any{"revocation": "none"})
		assert.NotContains(t, e.read("config"), "last_revocation_error")
		assert.NotContains(t, e.read("tenants/acme"), "last_revocation_error")
	})
}

// A config write comes while a call waits for its place in the share, or while storage takes the note of it: the call is not made, and
// gives its place back.
func TestOvertakenCallGivesItsPlaceBack(t *testing.T) {
	for name, overtake := range map[string]func(*engine, func()){
		"in the queue": func(e *engine, write func()) {
			time.Sleep(27 * time.Second)
			go func() {
				time.Sleep(time.Second)
				write()
			}()
		},
		"while it is noted": func(e *engine, write func()) {
			time.Sleep(31 * time.Second)
			once := true
			e.storage.surround(func(op, key string, do func() error) error {
				if op == "put" && strings.HasPrefix(key, callPrefix) && once {
					once = false
					write()
				}
				return do()
			})
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newConfiguredEngine(t)
				e.setShare(2)
				for _, tenant := range []string{"first", "second", "third"} {
					e.addTenant(tenant)
				}
				e.read("creds/first")
				time.Sleep(30 * time.Second)
				e.read("creds/second")
				overtake(e, func() { e.write("config", map[string]any{"request_timeout": "6s"}) })
				e.read("creds/third") // it takes the only free place
				assert.Equal(t, 3, e.kaizala.CallCount())
			})
		})
	}
}

// A verification that begins during the delete of its connector waits for the delete, and is refused: the connector does not exist
// any more.
func TestVerificationMeetsTheDeleteOfItsConnector(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		token := e.newToken("acme")
		e.storage.surround(func(op, key string, do func() error) error {
			if op == "delete" && key == connectorPrefix+defaultConnector {
				time.Sleep(2 * time.Second)
			}
			return do()
		})
		var flows sync.WaitGroup
		flows.Go(func() { e.ok(logical.DeleteOperation, "config", nil) })
		time.Sleep(time.Second)
		_, status, text := e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": token})
		assert.Equal(t, http.StatusBadRequest, status, text)
		flows.Wait()
		assert.Nil(t, e.stored("acme"))
		assert.Zero(t, e.kaizala.CallCount())
	})
}

// Memory keeps a new refresh token, and storage refuses it again during a write of settings: the write fails, so that it does not
// store the older refresh token.
func TestSettingsDoNotOvertakeKeptTokens(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		token := e.newToken("acme")
		time.Sleep(inWindow)
		e.write("tenants/acme", map[string]any{"refresh_token": token, "verify": false})
		e.failPuts()
		_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
		require.Equal(t, http.StatusServiceUnavailable, status)
		refused := false
		e.storage.failWith(func(op, key string) error {
			if op == "put" && key == tenantPrefix+"acme" && !refused {
				refused = true
				return errStorage
			}
			return nil
		})
		_, status, _ = e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"ttl": "1h"})
		assert.GreaterOrEqual(t, status, 500)
		assert.Equal(t, e.kaizala.CurrentRefreshToken("acme"), e.held("acme"))
		e.write("tenants/acme", map[string]any{"ttl": "1h"})
		assert.Equal(t, e.kaizala.CurrentRefreshToken("acme"), e.stored("acme").RefreshToken)
	})
}

// Storage reports an error for the write of a tenant. The delete of the tenant's connector then depends on what storage has: it is
// refused if storage has the tenant, and succeeds if not.
func TestConnectorOfADoubtedTenant(t *testing.T) {
	for name, taken := range map[string]bool{"taken": true, "not taken": false} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newConfiguredEngine(t)
				e.storage.surround(func(op, key string, do func() error) error {
					if op != "put" || !strings.HasPrefix(key, tenantPrefix) {
						return do()
					}
					if taken {
						_ = do()
					}
					return errStorage
				})
				_, status, _ := e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": e.newToken("acme"), "verify": false})
				require.GreaterOrEqual(t, status, 500)
				e.storage.heal()
				_, status, text := e.try(logical.DeleteOperation, "config", nil)
				if taken {
					assert.Equal(t, http.StatusBadRequest, status)
					assert.Contains(t, text, "acme")
				} else {
					assert.Equal(t, http.StatusNoContent, status, text)
				}
			})
		})
	}
}

// An exchange that would have ended an access token, and that no reader waits for, has failed: readers get that access token again.
func TestReadersAfterAnExchangeThatEndedNothing(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassD, classD)
		e.write("tenants/acme", map[string]any{"refresh_token": e.server.Grant(e.clientID, "acme")})
		e.server.Inject(oauth2test.Fault{Answer: oauth2test.Answer{Status: http.StatusInternalServerError}})
		_, status, _ := e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
		require.Equal(t, http.StatusServiceUnavailable, status)
		calls := len(e.server.Calls(oauth2test.EndpointToken))
		e.pass(3 * time.Minute)
		failed := len(e.server.Calls(oauth2test.EndpointToken))
		require.Greater(t, failed, calls, "the exchange is tried again without a reader")
		token := e.read("token/acme")["access_token"].(string)
		assert.True(t, e.server.Alive(token))
		assert.Len(t, e.server.Calls(oauth2test.EndpointToken), failed)
		e.server.ClearFaults()
		e.kept()
	})
}

// Storage does not take an access token that came without a new refresh token: memory keeps it, and the service is not called again.
func TestAccessTokenAloneIsKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		e.failPuts()
		_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
		require.Equal(t, http.StatusServiceUnavailable, status)
		e.storage.heal()
		e.read("creds/acme")
		assert.Equal(t, 1, e.kaizala.CallCount())
	})
}

// A connector is not deleted while a refresh token is verified with it.
func TestConnectorOfAVerificationStays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.kaizala.Inject(kaizalatest.Fault{Delay: 4 * time.Second, Times: 1})
		var flows sync.WaitGroup
		flows.Go(func() { e.write("tenants/acme", map[string]any{"refresh_token": e.newToken("acme")}) })
		time.Sleep(time.Second)
		_, status, text := e.try(logical.DeleteOperation, "config", nil)
		assert.Equal(t, http.StatusBadRequest, status)
		assert.Contains(t, text, "acme")
		flows.Wait()
		e.read("creds/acme")
	})
}

// The service accepts a connector again in the exchange of one tenant: its other tenants are tried at once, and not after their own
// backoff.
func TestTenantsOfAConnectorThatIsTakenAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		tokens := []string{e.newToken("a"), e.newToken("b")}
		time.Sleep(inWindow)
		e.kaizala.SetConnectorSecret(e.connectorID, "another")
		for i, name := range []string{"a", "b"} {
			e.write("tenants/"+name, map[string]any{"refresh_token": tokens[i], "verify": false})
		}
		e.pass(3 * time.Minute)
		require.Equal(t, statusDegraded, e.status("a"))
		require.Equal(t, statusDegraded, e.status("b"))
		e.kaizala.SetConnectorSecret(e.connectorID, e.secret)
		e.pass(probeEvery) // the exchange of one tenant shows that the service accepts the connector again
		e.pass(time.Minute)
		for _, name := range []string{"a", "b"} {
			assert.Equal(t, originService, e.stored(name).RefreshTokenOrigin)
		}
	})
}

// A tenant is deleted during an exchange or a verification, at a connector with revoke_on_delete: the new refresh token that the
// service sends in that exchange is revoked.
func TestDeleteRevokesTheRefreshTokenThatCameMeanwhile(t *testing.T) {
	for name, start := range map[string]func(*oauthEngine) (logical.Operation, string, map[string]any){
		"exchange": func(*oauthEngine) (logical.Operation, string, map[string]any) {
			return logical.UpdateOperation, "tenants/acme/refresh", nil
		},
		"verification": func(e *oauthEngine) (logical.Operation, string, map[string]any) {
			return logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": e.server.Grant(e.clientID, "new")}
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, oauth2test.ClassA, revokeAll)
				e.add("acme", nil)
				op, path, data := start(e)
				user := "acme"
				if data != nil {
					user = "new"
				}
				e.server.Inject(oauth2test.Fault{User: user, Hold: true})
				go func() { _, _, _ = e.try(op, path, data) }()
				synctest.Wait()
				rotated := e.server.CurrentRefreshToken(user)
				require.True(t, e.server.RefreshTokenAlive(rotated))
				e.ok(logical.DeleteOperation, "tenants/acme", nil)
				e.server.ClearFaults()
				e.pass(2 * time.Minute)
				assert.False(t, e.server.RefreshTokenAlive(rotated))
				assert.Empty(t, e.server.AccessTokens(user))
			})
		})
	}
}

// A new refresh token comes during the delete of its tenant, with its lifetime: when that has passed, its revocation is not tried any
// more.
func TestRevocationOfARefreshTokenThatCameMeanwhileEndsWithIt(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, func(o *oauth2test.Options) {
			oauth2test.ClassA(o)
			o.RefreshTokenLife, o.RefreshTokenLifeField = time.Hour, "refresh_token_expires_in"
		}, revokeAll)
		e.add("acme", nil)
		e.write("tenants/acme/refresh", nil) // now the end of the refresh token before is known, too
		e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointRevocation, Answer: oauth2test.BadGateway})
		e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointToken, Process: true, Delay: 5 * time.Second})
		go func() { _, _, _ = e.try(logical.UpdateOperation, "tenants/acme/refresh", nil) }()
		synctest.Wait()
		e.ok(logical.DeleteOperation, "tenants/acme", nil)
		e.pass(time.Hour)
		calls := len(e.revocations())
		assert.Greater(t, calls, 60)
		e.pass(time.Hour)
		assert.Len(t, e.revocations(), calls)
		assert.Nil(t, e.read("config")["pending_revocations"])
	})
}

// The answer of a verification has a refresh token and no access token: the refresh token is stored, and so is the write. The tenant's
// status says what is wrong.
func TestVerificationThatBringsNoAccessToken(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.server.Inject(oauth2test.Fault{Times: 1, Answer: oauth2test.Answer{Status: 200, Body: `{"refresh_token":"rotated"}`}})
		e.write("tenants/acme", map[string]any{"refresh_token": e.server.Grant(e.clientID, "acme")})
		assert.Equal(t, "rotated", e.stored("acme").RefreshToken)
		assert.Contains(t, e.read("tenants/acme")["last_error"], "access token")
	})
}

// The times of an entry are in the future, because the clock was wrong when they were written: they postpone no exchange.
func TestEntryOfAWrongClock(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		e.read("token/acme")
		entry := *e.stored("acme")
		ahead := time.Now().Add(60 * 24 * time.Hour)
		entry.LastExchange, entry.RefreshTokenSet = ahead, ahead
		require.NoError(t, putEntry(t.Context(), e.storage.InmemStorage, tenantPrefix+"acme", &entry))
		e.restart()
		e.pass(4 * 24 * time.Hour) // keep_alive is three days
		assert.Greater(t, len(e.server.Calls(oauth2test.EndpointToken)), 1)
		e.kept()
	})
}

// Storage deletes a tenant and reports an error, while memory keeps the tokens of an exchange of that tenant. The delete is sent again,
// and succeeds.
func TestDeleteIsRepeatedWhileTokensAreKept(t *testing.T) {
	for name, class := range map[string]map[string]any{"D": classD, "A": revokeAll} {
		bubble(t, func(t *testing.T) {
			e := newOAuthEngine(t, oauth2test.ClassA, class)
			e.add("acme", nil)
			e.waitForIndex()
			e.failPuts()
			_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
			require.Equal(t, http.StatusServiceUnavailable, status)
			e.storage.unheard("delete", tenantPrefix)
			_, status, _ = e.try(logical.DeleteOperation, "tenants/acme", nil)
			require.GreaterOrEqual(t, status, 500, name)
			e.storage.surround(nil)
			_, _, _ = e.try(logical.ReadOperation, "tenants/acme", nil) // the tenant is not in storage
			e.ok(logical.DeleteOperation, "tenants/acme", nil)
			e.storage.heal()
			e.pass(time.Minute)
			_, status, _ = e.try(logical.ReadOperation, "tenants/acme", nil)
			assert.Equal(t, http.StatusNotFound, status, name)
		})
	}
}

// The service refuses a refresh token, and storage does not take that: this process knows it all the same, and does not ask again.
func TestRejectionThatIsNotStored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		e.kaizala.Inject(kaizalatest.Fault{Status: 400, Body: `{"errorCode":"InvalidToken"}`, Times: 1})
		e.failPuts()
		for range 2 {
			_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
			assert.Equal(t, 400, status)
			assert.Equal(t, statusRejected, e.status("acme"))
		}
		assert.Equal(t, 1, e.kaizala.CallCount())
	})
}
