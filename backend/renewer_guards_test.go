package backend

import (
	"fmt"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/tokenservice"
)

// Storage fails to read the tenant, or its connector, when the tenant is due. The tenant is exchanged once storage works again.
func TestStorageFailsWhenATenantIsDue(t *testing.T) {
	for _, prefix := range []string{tenantPrefix, connectorPrefix} {
		t.Run(prefix, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newConfiguredEngine(t)
				e.kaizala.SetRefreshTokenLife(10 * day)
				e.addTenant("acme")
				time.Sleep(9*day - time.Minute)
				e.tenants.loaded.Purge()
				e.connectors.invalidate(connectorPrefix + defaultConnector)
				e.storage.refuse("get", prefix)
				e.pass(6 * time.Hour) // in which the tenant comes due
				require.Zero(t, e.kaizala.CallCount())
				e.storage.heal()
				e.pass(3 * time.Minute)
				assert.NotZero(t, e.kaizala.CallCount())
				assert.Equal(t, e.kaizala.CurrentRefreshToken("acme"), e.stored("acme").RefreshToken)
			})
		})
	}
}

// Storage does not take a new refresh token. The write is tried again although the service permits no call for now: the write makes none.
func TestUnstoredTokensAreStoredDuringAPause(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newRotatingEngine(t)
		e.failPuts()
		_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
		require.Equal(t, http.StatusServiceUnavailable, status)
		e.connectors.present(defaultConnector).share.Pause(time.Now().Add(time.Hour))
		e.storage.heal()
		e.pass(3 * time.Minute)
		assert.Equal(t, e.kaizala.CurrentRefreshToken("acme"), e.stored("acme").RefreshToken)
	})
}

// Storage does not take a new refresh token for a long time. The write is tried again with a backoff, which is a minute at most.
func TestWritesOfUnstoredTokensBackOff(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newRotatingEngine(t)
		var tries atomic.Int64
		e.storage.failWith(func(op, key string) error {
			if op == "put" && strings.HasPrefix(key, tenantPrefix) {
				tries.Add(1)
				return errStorage
			}
			return nil
		})
		_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
		require.Equal(t, http.StatusServiceUnavailable, status)
		e.pass(10 * time.Minute)
		assert.Greater(t, tries.Load(), int64(10))
		before := tries.Load()
		e.pass(time.Hour)
		assert.InDelta(t, 65, tries.Load()-before, 20)
		e.storage.heal()
		e.pass(2 * time.Minute)
		assert.Equal(t, e.kaizala.CurrentRefreshToken("acme"), e.stored("acme").RefreshToken)
	})
}

// A tenant whose refresh token is rejected or expired has no next exchange. The engine's daily warnings make none, and change nothing
// that its status shows.
func TestTenantWithoutAGoodRefreshTokenRests(t *testing.T) {
	for _, want := range []string{statusRejected, statusExpired} {
		t.Run(want, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newConfiguredEngine(t)
				e.kaizala.SetRefreshTokenLife(10 * day)
				e.addTenant("acme")
				e.read("creds/acme")
				if want == statusRejected {
					e.newToken("acme") // ends the stored refresh token
					_, status, _ := e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
					require.Equal(t, http.StatusBadRequest, status)
				} else {
					e.stop()
					time.Sleep(10 * day)
					e.start()
				}
				require.Equal(t, want, e.status("acme"))
				before, calls := e.read("tenants/acme"), e.kaizala.CallCount()
				assert.NotContains(t, before, "next_exchange_time")
				failed := e.log.count("an exchange failed")
				time.Sleep(3 * day)
				synctest.Wait()
				assert.Equal(t, before, e.read("tenants/acme"))
				assert.Equal(t, calls, e.kaizala.CallCount())
				assert.Equal(t, failed, e.log.count("an exchange failed"))
			})
		})
	}
}

// A tenant that was deleted leaves the index.
func TestDeletedTenantLeavesTheIndex(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		e.read("creds/acme")
		e.ok(logical.DeleteOperation, "tenants/acme", nil)
		names, lines := e.index.due(time.Now().Add(400 * day))
		assert.Empty(t, names)
		assert.Empty(t, lines)
	})
}

// A reader gets a 429. The engine does not make the exchange later by itself: nobody may want the access token any more.
func TestRefusedReadIsNotMadeUpFor(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenants(2)
		e.setShare(1)
		e.read("creds/t0")
		_, status, _ := e.try(logical.ReadOperation, "creds/t1", nil)
		require.Equal(t, http.StatusTooManyRequests, status)
		e.write("config", map[string]any{"request_timeout": "50s"}) // which plans the tenants' work again
		e.pass(time.Hour)
		assert.Zero(t, e.kaizala.Exchanges("t1"))
	})
}

// A refresh token that was exchanged shortly before its last tenth began is due as soon as that begins, and not a day later.
func TestExchangeJustBeforeTheLastTenth(t *testing.T) {
	bubble(t, func(t *testing.T) {
		now := time.Now()
		e := &tenantEntry{LastExchange: now.Add(-time.Hour), Facts: tokenservice.Facts{RotatesFrom: now, Expires: now.Add(36 * day)}}
		for i := range 20 {
			assert.Equal(t, now, refreshDue(fmt.Sprint("t", i), e, 0))
		}
	})
}

// When calls are scarce, a refresh token whose end is unknown goes behind one whose end is known.
func TestUnknownEndGoesLast(t *testing.T) {
	now := time.Now()
	assert.Greater(t, placeInLine(tenantSummary{}, now), placeInLine(tenantSummary{expires: now.Add(1000 * day).Unix()}, now))
}

// A write of another field comes while a tenant's own exchange begins. The exchange is not counted as failed: the tenant is looked at
// again.
func TestWriteWhileAnExchangeBegins(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newRotatingEngine(t)
		e.waitForIndex()
		e.read("tenants/acme")
		e.system.answers = make(chan struct{})
		go e.exchangeUnasked(e.tenants.named("acme"))
		synctest.Wait()
		e.tenants.named("acme").postpone(time.Now()) // any change
		close(e.system.answers)
		synctest.Wait()
		assert.Zero(t, e.log.count("an exchange failed"))
		e.pass(2 * time.Minute)
		assert.Equal(t, e.kaizala.CurrentRefreshToken("acme"), e.stored("acme").RefreshToken)
	})
}
