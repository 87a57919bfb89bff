package backend

import (
	"context"
	"fmt"
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

// The entry of a tenant's attempts names its format, so that an older plugin does not misread what a newer one has written.
func TestAttemptsNameTheirFormat(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		e.start(byCode, nil)
		assert.Contains(t, e.get(attemptKeys+"acme"), `"format":2`)
	})
}

// Storage cannot read the entry of a state whose attempt ends: the request that ends the attempt succeeds all the same.
func TestAttemptEndsThoughItsStateCannotBeRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		older := e.authorize(nil)
		e.storage.refuse("get", stateKeys)
		e.start(byCode, nil)
		e.storage.heal()
		assert.Contains(t, e.open(older).text(), "out of date")
	})
}

// A process has not read yet which attempts there are. The delete of a tenant that does not exist ends the attempt that the process
// before has begun for it.
func TestDeleteEndsAnAttemptThatWasNotReadYet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		back := e.authorize(nil)
		next := &storage{InmemStorage: e.storage.InmemStorage}
		next.refuse("list", attemptKeys)
		synctest.Wait()
		e.crashOnto(next)
		synctest.Wait()
		e.ok(logical.DeleteOperation, "tenants/acme", nil)
		assert.Equal(t, attemptSuperseded, e.attemptStatus(byCode))
		assert.Contains(t, e.open(back).text(), "out of date")
		e.storage.heal()
		e.pass(time.Minute)
		assert.Nil(t, e.stored("acme"))
	})
}

// The time of an attempt is over while memory keeps an operator's write that storage does not take: the attempt has expired.
func TestAttemptExpiresBesideAKeptWrite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		e.write("tenants/acme", map[string]any{"connector": "as", "refresh_token": e.server.Grant(e.clientID, "bob", "offline_access")})
		e.start(byCode, nil)
		e.failPuts()
		_, status, _ := e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": e.server.Grant(e.clientID, "eve", "offline_access")})
		require.Equal(t, 503, status)
		require.NotNil(t, e.tenants.named("acme").view.Load().kept.change)
		time.Sleep(attemptLife)
		assert.Equal(t, attemptExpired, e.attemptStatus(byCode))
	})
}

// Storage cannot be read when the service has refused a code: the page says that storage failed.
func TestPageSaysThatStorageFailed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		back := e.authorize(nil)
		e.server.Inject(oauth2test.Fault{Delay: 2 * time.Second, Answer: oauth2test.InvalidGrant, Times: 1})
		go func() {
			time.Sleep(time.Second)
			e.storage.refuse("get", attemptKeys)
		}()
		assert.Contains(t, e.confirm(back).text(), "Vault's storage failed: start again.")
	})
}

// A tenant is deleted while a code is at the service, and no refresh token comes for the code: there is none to revoke.
func TestDeleteWhileACodeBringsNoRefreshToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t, func(o *oauth2test.Options) {
			o.Edit = func(_ oauth2test.Endpoint, fields map[string]any) { delete(fields, "refresh_token") }
		})
		e.write("config/as", map[string]any{"revoke_on_delete": true, "confirm": false})
		done := e.codeAtTheService()
		e.ok(logical.DeleteOperation, "tenants/acme", nil)
		e.server.ClearFaults()
		<-done
		e.pass(2 * time.Minute)
		assert.Empty(t, e.server.Calls(oauth2test.EndpointRevocation))
		assert.NotContains(t, e.storedText(), intentPrefix)
	})
}

// A tenant is written while a code is at the service, and storage cannot say whether the tenant exists when the refresh token comes for the
// code: nothing is revoked, which at some services would end the tenant's own grant.
func TestGrantIsNotRevokedWhereTheTenantMayExist(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		e.write("config/as", map[string]any{"revoke_on_delete": true, "confirm": false})
		done := e.codeAtTheService()
		e.write("tenants/acme", map[string]any{"connector": "as", "refresh_token": e.server.Grant(e.clientID, "jane"), "verify": false})
		e.storage.refuse("get", tenantPrefix)
		e.InvalidateKey(t.Context(), tenantPrefix+"acme")
		e.server.ClearFaults()
		assert.Contains(t, (<-done).text(), "out of date")
		e.storage.heal()
		e.pass(2 * time.Minute)
		assert.Empty(t, e.server.Calls(oauth2test.EndpointRevocation))
	})
}

// An operator writes the tenant while a code is at the service, and storage does not take the end of the attempt: the person reads at once
// that the attempt is out of date.
func TestPageOfAGrantThatAWriteHasOvertaken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		e.write("config/as", map[string]any{"confirm": false})
		done := e.codeAtTheService()
		e.storage.refuse("put", attemptKeys)
		token := e.server.Grant(e.clientID, "bob")
		e.write("tenants/acme", map[string]any{"connector": "as", "refresh_token": token, "verify": false})
		e.storage.heal()
		begun := time.Now()
		e.server.ClearFaults()
		assert.Contains(t, (<-done).text(), "out of date")
		assert.Less(t, time.Since(begun), time.Second)
		assert.Equal(t, token, e.stored("acme").RefreshToken)
	})
}

// Storage takes no write for some seconds after a PIN has come to the service: the refresh token that comes for the PIN is stored when
// storage works.
func TestPINWhoseRefreshTokenIsStoredLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.phone()
		pin := e.sentPIN()
		e.kaizala.Inject(kaizalatest.Fault{Delay: time.Second, Process: true, Times: 1})
		go func() {
			time.Sleep(500 * time.Millisecond)
			e.storage.failWith(func(op, _ string) error {
				if op == "put" {
					return errStorage
				}
				return nil
			})
			time.Sleep(5 * time.Second)
			e.storage.heal()
		}()
		resp, status, text := e.pin(map[string]any{"pin": pin})
		require.Equal(t, 200, status, text)
		assert.Equal(t, attemptGranted, resp.Data["status"])
		require.NotNil(t, e.stored("acme"))
		assert.Equal(t, "token-ada", e.stored("acme").GrantedBy)
	})
}

// Memory keeps an operator's write that storage does not take, and storage cannot be read when the tokens come for a code: the grant is
// tried again, takes the place of that write in memory, and is stored when storage works.
func TestGrantBesideAKeptWriteIsTriedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		e.write("config/as", map[string]any{"revocation": "access_token", "exchange_invalidates": false, "confirm": false})
		e.write("tenants/acme", map[string]any{"connector": "as", "refresh_token": e.server.Grant(e.clientID, "bob", "offline_access")})
		e.failPuts()
		_, status, _ := e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": e.server.Grant(e.clientID, "eve", "offline_access")})
		require.Equal(t, 503, status)
		require.NotNil(t, e.tenants.named("acme").view.Load().kept.change)
		done := e.codeAtTheService()
		e.storage.failWith(func(op, key string) error {
			if op == "put" && strings.HasPrefix(key, tenantPrefix) || op == "list" && key == intentPrefix {
				return errStorage
			}
			return nil
		})
		e.InvalidateKey(t.Context(), intentPrefix+"as/x")
		e.server.ClearFaults()
		time.Sleep(2500 * time.Millisecond)
		e.failPuts()
		assert.Contains(t, (<-done).text(), "Not finished yet")
		e.storage.heal()
		e.pass(2 * time.Minute)
		assert.Equal(t, attemptGranted, e.attemptStatus(byCode))
		assert.Equal(t, "token-ada", e.stored("acme").GrantedBy)
		assert.Equal(t, e.server.CurrentRefreshToken("jane"), e.stored("acme").RefreshToken)
		assert.Empty(t, e.server.AccessTokens("eve"), "the access token of the kept write is given up")
	})
}

// A config write is being stored when the tokens come for a code, and an exchange of the tenant ends meanwhile: the grant is stored after
// that.
func TestGrantWaitsForAConfigWriteAndAnExchange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		e.write("config/as", map[string]any{"confirm": false})
		e.write("tenants/acme", map[string]any{"connector": "as", "refresh_token": e.server.Grant(e.clientID, "bob", "offline_access"), "verify": false})
		back := e.authorize(nil)
		e.server.Inject(oauth2test.Fault{User: "bob", Delay: 3 * time.Second, Times: 1})
		go func() { _, _, _ = e.try(logical.UpdateOperation, "tenants/acme/refresh", nil) }()
		synctest.Wait()
		reached, release := e.storage.hold("put", connectorPrefix)
		go e.write("config/as", map[string]any{"request_timeout": "14s"})
		<-reached
		page := make(chan shown, 1)
		go func() { page <- e.open(back) }()
		time.Sleep(4 * time.Second)
		require.Equal(t, 1, e.sent(codeGrant))
		release()
		assert.Contains(t, (<-page).text(), "The tenant is connected")
		assert.Equal(t, e.server.CurrentRefreshToken("jane"), e.stored("acme").RefreshToken)
	})
}

// The engine stops while the tokens of a code wait for a config write: both end.
func TestStopWhileAGrantWaitsForAConfigWrite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		e.write("config/as", map[string]any{"confirm": false})
		back := e.authorize(nil)
		reached, release := e.storage.hold("put", connectorPrefix)
		written := make(chan struct{})
		go func() {
			defer close(written)
			_, _, _ = e.try(logical.UpdateOperation, "config/as", map[string]any{"request_timeout": "14s"})
		}()
		<-reached
		page := make(chan shown, 1)
		go func() { page <- e.open(back) }()
		time.Sleep(time.Second)
		require.Equal(t, 1, e.sent(codeGrant))
		begun := time.Now()
		e.stop()
		assert.LessOrEqual(t, time.Since(begun), stopWithin)
		release()
		<-written
		assert.Equal(t, 400, (<-page).status)
		e.engine.start() // for the end of the test
	})
}

// The connector is deleted while a PIN is at the service: the answer says that the connector is missing, and no tenant is there.
func TestConnectorIsDeletedWhileAPINIsAtTheService(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.phone()
		pin := e.sentPIN()
		e.kaizala.Inject(kaizalatest.Fault{Delay: time.Second, Process: true, Times: 1})
		go func() {
			time.Sleep(500 * time.Millisecond)
			e.ok(logical.DeleteOperation, "config", nil)
		}()
		_, status, text := e.pin(map[string]any{"pin": pin})
		assert.Equal(t, 400, status)
		assert.Contains(t, text, `could not be stored: connector "default" is not configured`)
		assert.Nil(t, e.stored("acme"))
	})
}

// Storage does not answer when the engine reads which attempts there are: it is not asked again each minute.
func TestAttemptsAreReadOnceAtATime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		e.start(byCode, nil)
		e.pass(time.Minute)
		e.InvalidateKey(t.Context(), attemptKeys+"acme")
		var lists atomic.Int64
		held := make(chan struct{})
		e.storage.surround(func(op, key string, do func() error) error {
			if op == "list" && key == attemptKeys {
				lists.Add(1)
				<-held
			}
			return do()
		})
		e.pass(5 * time.Minute)
		synctest.Wait()
		assert.EqualValues(t, 1, lists.Load())
		close(held)
	})
}

// An attempt that a newer one has ended would have expired while the newer one is pending. The secrets of the newer one leave storage when
// its own time is over.
func TestSecretsOfANewerAttemptLeaveStorage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		e.start(byCode, nil)
		e.pass(5 * time.Minute)
		e.start(byCode, nil)
		e.pass(6 * time.Minute)
		synctest.Wait()
		require.Contains(t, e.storedText(), `"verifier"`, "the newer one is pending")
		e.pass(6 * time.Minute)
		synctest.Wait()
		assert.NotContains(t, e.storedText(), `"verifier"`)
		assert.Equal(t, attemptExpired, e.attemptStatus(byCode))
	})
}

// Storage forgets the attempts of a tenant that does not exist a day after the last of them has ended.
func TestAttemptsAreForgottenADayAfterTheLast(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		names := []string{"a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l"} // the order in which a tenant's attempts are looked at is by chance
		start := func(path string, data map[string]any) {
			for _, name := range names {
				_, status, text := e.ask(logical.UpdateOperation, "tenants/"+name+"/"+path, data)
				require.Equal(t, 200, status, text)
			}
		}
		start(byCode, map[string]any{"connector": "as"})
		time.Sleep(12 * time.Hour)
		start(byPIN, map[string]any{"connector": "default", "mobile_number": e.kaizala.PhoneNumber("acme")})
		time.Sleep(13 * time.Hour)
		forgotten := func() (n int) {
			for _, name := range names {
				e.ok(logical.DeleteOperation, "tenants/"+name, nil)
			}
			e.pass(2 * time.Minute)
			synctest.Wait()
			for _, name := range names {
				if e.get(attemptKeys+name) == "" {
					n++
				}
			}
			return n
		}
		assert.Zero(t, forgotten())
		time.Sleep(12 * time.Hour)
		assert.Equal(t, len(names), forgotten())
	})
}

// Storage cannot say, when a device code has come, whether the tenant was created meanwhile: nothing is begun.
func TestStartWhoseTenantCannotBeRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		e.storage.once("put", callPrefix, func() { e.storage.refuse("get", tenantPrefix) })
		_, status, _ := e.ask(logical.UpdateOperation, "tenants/acme/device", map[string]any{"connector": "as"})
		assert.Equal(t, 500, status)
		e.storage.heal()
		_, status, _ = e.ask(logical.ReadOperation, "tenants/acme/device", nil)
		assert.Equal(t, 404, status)
	})
}

// An attempt can begin while memory keeps a refresh token that an exchange has brought. It cannot while memory keeps a grant, which will end
// it, also where that grant comes while the service is asked for a device code.
func TestStartBesideWhatMemoryKeeps(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		e.write("config/as", map[string]any{"confirm": false})
		e.write("tenants/acme", map[string]any{"connector": "as", "refresh_token": e.server.Grant(e.clientID, "bob", "offline_access")})
		e.failPuts()
		_, status, _ := e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
		require.Equal(t, 503, status)
		require.NotNil(t, e.tenants.named("acme").view.Load().kept)
		address := e.start(byCode, nil)["authorization_url"].(string)
		e.storage.heal()
		e.pass(time.Minute)

		back := e.allowed(address)
		e.failPuts()
		e.server.Inject(oauth2test.Fault{Delay: time.Second, Times: 1})
		e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointDevice, Delay: 3 * time.Second, Times: 1})
		go e.open(back)
		_, status, text := e.ask(logical.UpdateOperation, "tenants/acme/device", nil)
		require.NotNil(t, e.tenants.named("acme").view.Load().kept)
		assert.Equal(t, 503, status)
		assert.Contains(t, text, "has not taken the new tokens")
		e.storage.heal()
		e.pass(time.Minute)
		assert.Equal(t, attemptGranted, e.attemptStatus(byCode))
	})
}

// A delete ends the pending attempt of a tenant that does not exist, whatever other attempts there were.
func TestDeleteEndsThePendingAttemptAmongOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		for _, name := range []string{"a", "b", "c", "d", "e", "f", "g", "h", "i", "j"} { // the order in which a tenant's attempts are looked at is by chance
			for path, data := range map[string]map[string]any{
				byPIN:  {"connector": "default", "mobile_number": e.kaizala.PhoneNumber("acme")},
				byCode: {"connector": "as"},
			} {
				_, status, text := e.ask(logical.UpdateOperation, "tenants/"+name+"/"+path, data)
				require.Equal(t, 200, status, text)
			}
			e.ok(logical.DeleteOperation, "tenants/"+name, nil)
			resp, _, _ := e.ask(logical.ReadOperation, "tenants/"+name+"/authorize", nil)
			assert.Equal(t, attemptSuperseded, resp.Data["status"], name)
			_, status, _ := e.ask(logical.UpdateOperation, "tenants/"+name+"/pin", map[string]any{"pin": "123456"})
			assert.Equal(t, 400, status)
		}
		assert.Zero(t, e.pinCalls(redeemPINPath))
	})
}

// A tenant is written again while it is being deleted, after its removal: the delete leaves what the write has stored, also if there was an
// attempt before.
func TestDeleteLeavesWhatAWriteHasStored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		e.start(byCode, nil)
		e.addTenant("acme")
		time.Sleep(time.Minute)
		reached, release := e.storage.hold("delete", tenantPrefix)
		deleted := make(chan struct{})
		go func() {
			defer close(deleted)
			e.ok(logical.DeleteOperation, "tenants/acme", nil)
		}()
		<-reached
		token := e.newToken("acme")
		written := make(chan struct{})
		go func() {
			defer close(written)
			e.write("tenants/acme", map[string]any{"refresh_token": token, "verify": false})
		}()
		synctest.Wait()
		release()
		<-written
		<-deleted
		require.NotNil(t, e.stored("acme"))
		assert.Equal(t, token, e.stored("acme").RefreshToken)
	})
}

// The entry of a tenant's attempts is damaged when the tokens come for a code: the person reads at once that storage failed.
func TestPageOfAGrantWhoseAttemptIsDamaged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		e.write("config/as", map[string]any{"confirm": false})
		done := e.codeAtTheService()
		e.put(attemptKeys+"acme", []byte("{"))
		begun := time.Now()
		e.server.ClearFaults()
		assert.Contains(t, (<-done).text(), "Vault's storage failed: start again.")
		assert.Less(t, time.Since(begun), time.Second)
	})
}

// A tenant is deleted while a code is at the service, and storage does not take the end of the attempt: with revoke_on_delete the refresh
// token that comes for the code is revoked all the same.
func TestGrantOfADeletedTenantIsRevokedThoughItsEndIsNotNoted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		e.write("config/as", map[string]any{"revoke_on_delete": true, "confirm": false})
		e.write("tenants/acme", map[string]any{"connector": "as", "refresh_token": e.server.Grant(e.clientID, "bob"), "verify": false})
		done := e.codeAtTheService()
		brought := e.server.CurrentRefreshToken("jane")
		require.True(t, e.server.RefreshTokenAlive(brought))
		e.storage.refuse("put", attemptKeys)
		_, status, _ := e.try(logical.DeleteOperation, "tenants/acme", nil)
		require.Equal(t, 500, status)
		e.storage.heal()
		e.server.ClearFaults()
		assert.Contains(t, (<-done).text(), "out of date")
		e.pass(2 * time.Minute)
		assert.False(t, e.server.RefreshTokenAlive(brought))
		assert.Nil(t, e.stored("acme"))
	})
}

// The lock of a tenant's attempts is one for all that hold or await it, and no lock is kept for a tenant whose attempts no flow changes.
func TestLocksOfAttemptsAreNotKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGrants()
		holders := 0 // the lock guards it
		var all sync.WaitGroup
		for i := range 100 {
			all.Go(func() {
				time.Sleep(time.Duration(i%7) * time.Millisecond)
				ctx, cancel := context.WithTimeout(t.Context(), time.Duration(i)*time.Millisecond)
				defer cancel()
				release, err := g.lock(ctx, "acme")
				if err != nil {
					return // it has waited for too long
				}
				holders++
				assert.Equal(t, 1, holders)
				time.Sleep(time.Millisecond)
				holders--
				release()
			})
		}
		all.Wait()
		assert.Empty(t, g.locks)

		e := newGrantEngine(t)
		e.start(byCode, nil)
		for i := range 3 {
			e.ok(logical.DeleteOperation, fmt.Sprintf("tenants/none%d", i), nil)
		}
		assert.Empty(t, e.grants.locks)
	})
}

// A person grants access for a tenant that does not exist. While the grant waits for its connector, because that is being written, an
// operator writes the tenant. The grant is superseded: it must not replace what the operator has written, who was told that it is stored.
func TestGrantOfATenantThatIsWrittenMeanwhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		operators := e.newToken("operator")
		back := e.authorize(nil)
		binding := e.connectors.record("as").binding
		require.NoError(t, binding.Acquire(t.Context(), exclusive)) // as a write of config/as that storage keeps waiting
		var confirmed sync.WaitGroup
		confirmed.Go(func() { e.confirm(back) })
		synctest.Wait() // the grant waits for the connector
		go e.write("tenants/acme", map[string]any{"refresh_token": operators, "verify": false})
		synctest.Wait()
		require.Equal(t, operators, e.stored("acme").RefreshToken)
		binding.Release(exclusive)
		confirmed.Wait()
		synctest.Wait()
		time.Sleep(10 * time.Second)
		assert.Equal(t, attemptSuperseded, e.attemptStatus(byCode))
		assert.Equal(t, operators, e.stored("acme").RefreshToken, "the grant has replaced the operator's write")
		assert.Equal(t, defaultConnector, e.stored("acme").Connector)
	})
}

// A write has ended an attempt, and storage has not taken that. Nor does it take it at the first callback with the state: the next callback
// closes the attempt, whose secrets then leave storage.
func TestSecretsOfAnEndedAttemptLeaveStorageWithACallback(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		back := e.authorize(nil)
		e.open(back) // the code waits to be confirmed
		e.storage.refuse("put", attemptKeys)
		e.ask(logical.UpdateOperation, "tenants/acme", map[string]any{"connector": "as", "refresh_token": e.server.Grant(e.clientID, "acme"), "verify": false})
		require.Contains(t, e.storedText(), `"verifier"`)
		_, status, _ := e.ask(logical.ReadOperation, "callback", back)
		assert.Equal(t, 500, status)
		e.storage.heal()
		assert.Contains(t, e.open(back).text(), "out of date")
		assert.NotContains(t, e.storedText(), `"verifier"`)
		assert.NotContains(t, e.storedText(), back["code"])
	})
}
