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

// Two flows that meet, one test for each way in which that has gone wrong.

// failPuts makes storage take no tenants.
func (e *engine) failPuts() { e.storage.refuse("put", tenantPrefix) }

// A tenant that was deleted while its first write was being verified stays deleted, also where another write has made it
// meanwhile: the delete is the last word.
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
				synctest.Wait() // the flight drops the record once it has told the writer
				assert.Nil(t, e.stored("acme"))
				assert.Nil(t, e.tenants.named("acme"))
			})
		})
	}
}

// A tenant that is being stored stays in the registry, though the service refuses another first write of it meanwhile: nobody
// could exchange it any more, and its readers would try without end.
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
		assert.Nil(t, e.tenants.named("acme"))
	})
}

// A reader of a tenant that is not there leaves no record of it, also where he goes away at the moment when another is done with it.
func TestReaderOfNoTenantLeaves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.waitForIndex()
		for range 20 { // either of the two may be the last one
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

// A write ends the trouble of the refresh token that it replaces, and the backoff: the next read goes to the service.
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

// What fails with a refresh token that has been replaced meanwhile is no failure of its successor, and readers who waited get the
// successor's access token.
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

// Tokens that storage has not taken stay kept when the older access token's lease is revoked; then they are stored, and all is
// well again.
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
		assert.Equal(t, doubted, v.knows, "storage has not what memory knows")
		assert.Equal(t, e.kaizala.CurrentRefreshToken("acme"), e.held("acme"))
		e.write("tenants/acme", map[string]any{"ttl": "1h"}) // another write stores them
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

// The connector of a tenant that is in memory alone stays.
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

// One tenant's write that hangs costs no other tenant its kept tokens when the engine stops.
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

// What an exchange brings while the engine stops is stored, though storage fails at first, and its event is sent.
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

// An exchange that brings nothing leaves storage as it is, but for the note of its call.
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

// A write that storage took without saying so is found, even where nobody reads.
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
		require.NoError(t, binding.Acquire(t.Context(), exclusive)) // the write has been checked, and waits
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

// A reader and a refresh that come while an operator's refresh token is verified wait for its end, and then go by what is
// stored: a mistyped one is the writer's alone, and so is what the right one brings.
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

// Of two writes whose settings do not fit together the later one is refused.
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

// A 429 holds for the connector, whatever has become of the tenant that it was answered to.
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

// What another node has written while this one was reading is read again.
func TestTenantIsInvalidatedDuringALoad(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		e.read("tenants/acme")
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

// Likewise for a connector.
func TestConnectorIsInvalidatedDuringALoad(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		key := connectorPrefix + defaultConnector
		e.connectors.invalidate(key) // and nothing reads it in the background
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

// Leases of a process before this one are not counted, and so their access token is given up by the first early end of any.
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

// A token that was given up stays so in memory until storage has that: it does not leave memory before.
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

// Nobody sees a write that storage has not taken: its refresh token might be replaced by the service, and nothing would know the
// new one.
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

// A config write says that exchanges end older access tokens, while one is under way.
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

// token_per_lease and revocation are switched off while a token for one lease is on its way: once they are on again, the token ends with
// its lease, and not with the next exchange after a restart.
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

// A call that has its place when the service answers another one with a 429 is not made.
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

// A call that has waited for its place while its connector was written is not even written down.
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

// Who verifies a write with a connector that the service refuses is told so, though the share is used up, too.
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

// unheard makes storage do what it is asked below a prefix, and say that it has not.
func (s *storage) unheard(op, prefix string) {
	s.surround(func(asked, key string, do func() error) error {
		err := do()
		if asked == op && strings.HasPrefix(key, prefix) {
			return errStorage
		}
		return err
	})
}

// once calls f at the first operation of that kind below a prefix, before that is done. over says whether it has.
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

// A write or a delete that storage fails leaves a tenant that works: its refresh token lives, and nobody gets the access token
// that was to be revoked, not after a restart either.
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

// What a delete leaves is revoked where storage has done it and said that it has not.
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

// A refresh token that is written before the process knows what is to be revoked is spared all the same.
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

// A delete revokes the refresh token that storage has, where a write before it was taken unheard.
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

// An access token for one lease that storage took when its reader had got an error is revoked; the record of such a token that
// storage took unheard is swept.
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

// The process dies before an access token for one lease has its record, and a request reads the tenant before the next process
// has looked through all tenants, as the one that starts a plugin again does: the token is revoked all the same.
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

// A write that is not verified has the access token of before revoked at once, and the tenant shows what is pending at the
// connector that it has left.
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

// A write that the service refuses is no exchange that a process did not live to see: the next process does not ask about it, and
// ends nobody's access token.
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

// A tenant that is scheduled while memory does not have its connector is exchanged as often as that says all the same.
func TestKeepAliveOfAConnectorThatHasLeftMemory(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		lease := e.lease("acme")
		e.storage.surround(func(op, key string, do func() error) error {
			err := do()
			if op == "put" && key == "tenants/acme" {
				e.connectors.invalidate(connectorPrefix + defaultConnector) // and nothing reads it in the background
			}
			return err
		})
		e.revoke(lease)
		e.storage.heal()
		time.Sleep(73 * time.Hour)
		assert.Equal(t, 2, e.server.Exchanges("acme"))
	})
}

// Storage forgets the attempts of a tenant that is deleted long after they ended.
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
			assert.LessOrEqual(t, looks, 3, "a day is no reason to look each minute")
			assert.NotContains(t, e.storedText(), attemptPrefix)
		})
	}
}

// What a config write drops leaves no error behind.
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

// A call that a config write has overtaken is not made, and gives its place in the share back: whether the write came while the
// call waited for its place, or while storage took the note of it.
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
				e.read("creds/third") // with the one place that there is
				assert.Equal(t, 3, e.kaizala.CallCount())
			})
		})
	}
}

// A verification that begins while its connector is being deleted waits for the delete, and then there is no connector.
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

// A write of settings that storage takes does not replace a new refresh token that storage has just refused again.
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

// A connector is not deleted while storage may have a tenant of it though it has said otherwise; and is, once that is known not
// to be so.
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

// Readers have the access token again that an exchange without a reader was to end, when that exchange has failed.
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
		require.Greater(t, failed, calls, "it is tried again though nobody reads")
		token := e.read("token/acme")["access_token"].(string)
		assert.True(t, e.server.Alive(token))
		assert.Len(t, e.server.Calls(oauth2test.EndpointToken), failed)
		e.server.ClearFaults()
		e.kept()
	})
}

// An access token that storage does not take is kept though no refresh token came with it: the service is not asked again.
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

// A connector stays while a refresh token is verified with it.
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

// Once a connector is taken again, its other tenants are tried at once and not after their own backoff.
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
		e.pass(probeEvery) // one of them shows it
		e.pass(time.Minute)
		for _, name := range []string{"a", "b"} {
			assert.Equal(t, originService, e.stored(name).RefreshTokenOrigin)
		}
	})
}

// A delete that overtakes an exchange or a verification ends the refresh token that the service has sent instead of the
// deleted one, where deletes revoke.
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

// A refresh token that came while its tenant was deleted is not sent past its end, which came with it.
func TestRevocationOfARefreshTokenThatCameMeanwhileEndsWithIt(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, func(o *oauth2test.Options) {
			oauth2test.ClassA(o)
			o.RefreshTokenLife, o.RefreshTokenLifeField = time.Hour, "refresh_token_expires_in"
		}, revokeAll)
		e.add("acme", nil)
		e.write("tenants/acme/refresh", nil) // now the end of the one before is known, too
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

// What an exchange brings beside an answer that cannot be used is stored, and so is the write that it verified. The tenant's
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

// Times of an entry that lie ahead of the clock, for it was wrong when they were written, postpone no exchange.
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

// A tenant is deleted a second time, after storage has deleted it and said that it has not, while the engine keeps what an exchange of it
// has brought.
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
			_, _, _ = e.try(logical.ReadOperation, "tenants/acme", nil) // which finds nothing
			e.ok(logical.DeleteOperation, "tenants/acme", nil)
			e.storage.heal()
			e.pass(time.Minute)
			_, status, _ = e.try(logical.ReadOperation, "tenants/acme", nil)
			assert.Equal(t, http.StatusNotFound, status, name)
		})
	}
}
