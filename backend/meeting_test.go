package backend

import (
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

// Two flows that meet, one test for each way in which that has gone wrong.

// failPuts makes storage take no tenants.
func (e *engine) failPuts() {
	e.storage.failWith(func(op, key string) error {
		if op == "put" && strings.HasPrefix(key, tenantPrefix) {
			return errStorage
		}
		return nil
	})
}

// A tenant that was deleted while its first write was being verified stays deleted.
func TestDeleteWinsOverAVerificationThatCreates(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.kaizala.Inject(kaizalatest.Fault{Delay: 4 * time.Second, Times: 1})
		told := make(chan int)
		go func() {
			_, status, _ := e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": e.newToken("acme")})
			told <- status
		}()
		time.Sleep(2 * time.Second)
		e.ok(logical.DeleteOperation, "tenants/acme", nil)
		assert.Equal(t, http.StatusServiceUnavailable, <-told)
		assert.Nil(t, e.stored("acme"))
		assert.Nil(t, e.tenants.named("acme"))
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
		assert.Equal(t, e.kaizala.CurrentRefreshToken("acme"), e.held("acme"))
		e.write("tenants/acme", map[string]any{"ttl": "1h"}) // another write stores them
		assert.Equal(t, e.kaizala.CurrentRefreshToken("acme"), e.stored("acme").RefreshToken)
		assert.Equal(t, time.Hour, e.stored("acme").TTL)
		assert.Equal(t, statusOK, e.status("acme"))
		assert.Equal(t, 1, e.log.count("exchanges of a tenant succeed again"))
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
		require.NoError(t, binding.Acquire(t.Context(), everybody)) // the write has been checked, and waits
		go func() {
			defer close(held)
			_, status, text := e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": mine, "verify": false})
			assert.Equal(t, http.StatusBadRequest, status, text)
		}()
		synctest.Wait()
		e.write("tenants/acme", map[string]any{"refresh_token": theirs, "connector": "other", "verify": false})
		binding.Release(everybody)
		<-held
		assert.Equal(t, theirs, e.stored("acme").RefreshToken)
	})
}
