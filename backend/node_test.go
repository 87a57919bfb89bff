package backend

import (
	"context"
	"maps"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/kaizala/kaizalatest"
)

// A standby makes no call, because it could not store the answer: it answers
// ErrReadOnly, and Vault sends the request to the active node.
func TestOnlyTheNodeThatMayWriteCalls(t *testing.T) {
	states := map[string]consts.ReplicationState{
		"performance standby":   consts.ReplicationPerformanceStandby,
		"performance secondary": consts.ReplicationPerformanceSecondary,
		"DR secondary":          consts.ReplicationDRSecondary,
	}
	for name, state := range states {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newConfiguredEngine(t)
				e.addTenant("warm")
				e.addTenant("cold")
				token := accessTokenOf(e.lease("warm"))
				e.restart()
				e.kaizala.ResetCalls()
				e.system.replication.Store(uint32(state))

				assert.Equal(t, token, accessTokenOf(e.lease("warm")), "the stored access token is served")
				assert.Equal(t, token, e.read("token/warm")["access_token"])
				for _, request := range []struct {
					op   logical.Operation
					path string
					data map[string]any
				}{
					{logical.ReadOperation, "creds/cold", nil},
					{logical.ReadOperation, "token/cold", nil},
					{logical.UpdateOperation, "tenants/warm/refresh", nil},
					{logical.UpdateOperation, "tenants/cold", map[string]any{"refresh_token": e.newToken("writer")}},
					{logical.UpdateOperation, "tenants/new", map[string]any{"refresh_token": e.newToken("new")}},
				} {
					_, err := e.do(context.Background(), request.op, request.path, request.data)
					assert.True(t, err == logical.ErrReadOnly, "%s %s: %v is not the bare ErrReadOnly", request.op, request.path, err)
				}
				ops := e.storage.putsOf(tenantPrefix + "warm")
				calls := e.storage.putsOf(callPrefix + "default/0")
				e.pass(30 * time.Hour)
				assert.Zero(t, e.kaizala.CallCount())
				assert.Equal(t, ops, e.storage.putsOf(tenantPrefix+"warm"))
				assert.Equal(t, calls, e.storage.putsOf(callPrefix+"default/0"), "no call is noted either")

				e.system.replication.Store(0) // the node becomes the active node
				e.read("creds/warm")
				e.read("creds/cold")
			})
		})
	}
}

// A standby that becomes the active node makes the renewals that are due.
func TestPromotedNodeRenews(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		e.system.replication.Store(uint32(consts.ReplicationPerformanceStandby))
		e.pass(time.Hour)
		time.Sleep(338 * day)
		e.pass(time.Hour)
		assert.Zero(t, e.kaizala.CallCount())
		e.system.replication.Store(0)
		e.pass(3 * time.Minute)
		assert.Equal(t, e.kaizala.CurrentRefreshToken("acme"), e.stored("acme").RefreshToken)
		assert.Equal(t, 1, e.kaizala.CallCount())
	})
}

func TestLocalMountOfASecondaryWrites(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		synctest.Wait() // the start of the engine asks the system view too
		e.system.LocalMountVal = true
		e.system.replication.Store(uint32(consts.ReplicationPerformanceSecondary))
		e.addTenant("acme")
		e.read("creds/acme")
		assert.Equal(t, 1, e.kaizala.CallCount())
	})
}

// Storage becomes read-only on a node that Vault says may write: in the rotation
// window the engine finds that out before it calls the service.
func TestReadOnlyStorage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newRotatingEngine(t)
		e.storage.failWith(func(op, _ string) error {
			if op == "put" || op == "delete" {
				// Through the plugin protocol only the error's text arrives.
				return &strippedError{logical.ErrReadOnly.Error()}
			}
			return nil
		})
		for _, path := range []string{"creds/acme", "token/acme"} {
			_, err := e.do(context.Background(), logical.ReadOperation, path, nil)
			assert.True(t, err == logical.ErrReadOnly, "%s: %v", path, err)
		}
		_, err := e.do(context.Background(), logical.UpdateOperation, "tenants/acme", map[string]any{"ttl": "1h"})
		assert.True(t, err == logical.ErrReadOnly, "%v", err)
		ops := e.storage.ops.Load()
		e.pass(time.Hour)
		assert.Zero(t, e.kaizala.CallCount())
		assert.Less(t, e.storage.ops.Load()-ops, int64(200), "the engine does not try without a pause")
	})
}

type strippedError struct{ text string }

func (e *strippedError) Error() string { return e.text }

// Each key that the engine writes is under seal wrap if its entry has a secret, and
// is dropped from memory when another node has written it.
func TestEveryKeyWritten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		otherID, otherSecret := e.kaizala.RegisterConnector()
		e.write("config/hr", map[string]any{"connector_id": otherID, "connector_secret": otherSecret})
		e.addTenant("acme")
		e.write("tenants/staff", map[string]any{"refresh_token": e.kaizala.GenerateUserToken(otherID, "staff"), "connector": "hr"})
		lease := e.lease("acme")
		e.write("tenants/acme/refresh", nil)
		require.NoError(t, e.revokeLease(lease))
		e.write("tenants/gone", map[string]any{"refresh_token": e.newToken("gone")})
		e.ok(logical.DeleteOperation, "tenants/gone", nil)
		e.kaizala.Inject(kaizalatest.Fault{Status: 429, Times: 1})
		_, _, _ = e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
		e.pass(30 * time.Hour)
		time.Sleep(335 * day)
		e.pass(time.Hour)

		e.storage.mu.Lock()
		keys := maps.Clone(e.storage.keys)
		e.storage.mu.Unlock()
		assert.Contains(t, keys, callPrefix+"default/0")
		assert.Contains(t, keys, callPrefix+"default/pause")
		assert.Contains(t, keys, "tenants/acme")
		assert.Contains(t, keys, "config/hr")
		wrapped := e.SpecialPaths().SealWrapStorage
		for key := range keys {
			raw, err := e.storage.InmemStorage.Get(context.Background(), key)
			require.NoError(t, err)
			if strings.HasPrefix(key, callPrefix) {
				entry := map[string]any{}
				require.NoError(t, raw.DecodeJSON(&entry))
				for field := range entry {
					assert.Contains(t, []string{"format", "tenant", "at", "until"}, field, "the note of a call has no secret")
				}
				continue
			}
			assert.True(t, slices.ContainsFunc(wrapped, func(prefix string) bool {
				return strings.HasSuffix(prefix, "/") && strings.HasPrefix(key, prefix)
			}), "%s is not under seal wrap", key)
		}

		// Another node changes each entry, and Vault invalidates the key on this node.
		for key := range keys {
			name, isTenant := strings.CutPrefix(key, tenantPrefix)
			if entry := e.stored(name); isTenant && entry != nil {
				assert.NotEqual(t, 77*time.Minute, entry.TTL)
				entry.TTL = 77 * time.Minute
				require.NoError(t, putEntry(context.Background(), e.storage.InmemStorage, key, entry))
				e.InvalidateKey(context.Background(), key)
				assert.EqualValues(t, 77*60, e.read("tenants/" + name)["ttl"])
			}
			if name, isConnector := strings.CutPrefix(key, connectorPrefix); isConnector {
				entry, err := e.storedConnector(context.Background(), name)
				require.NoError(t, err)
				before, err := e.connectors.get(context.Background(), name)
				require.NoError(t, err)
				entry.ExchangesPerMinute = 7
				require.NoError(t, putEntry(context.Background(), e.storage.InmemStorage, key, entry))
				e.InvalidateKey(context.Background(), key)
				after, err := e.connectors.get(context.Background(), name)
				require.NoError(t, err)
				assert.NotEqual(t, 7, before.entry.ExchangesPerMinute)
				assert.Equal(t, 7, after.entry.ExchangesPerMinute)
			}
			if strings.HasPrefix(key, callPrefix+"default/pause") {
				require.NoError(t, putEntry(context.Background(), e.storage.InmemStorage, key, map[string]any{"format": 1, "until": time.Now().Add(time.Hour)}))
				e.InvalidateKey(context.Background(), key)
				_, status, _ := e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
				assert.Equal(t, 429, status)
			}
		}
	})
}

// In each replication state of Vault, the engine and the framework agree on whether the node may write.
func TestMayWriteAsTheFrameworkSays(t *testing.T) {
	for bits := range consts.ReplicationState(1 << 11) {
		state := bits * consts.ReplicationPerformancePrimary // the lowest of the eleven bits
		for _, local := range []bool{false, true} {
			view := &logical.StaticSystemView{ReplicationStateVal: state, LocalMountVal: local}
			var sdk framework.Backend
			require.NoError(t, sdk.Setup(t.Context(), &logical.BackendConfig{System: view}))
			require.Equal(t, sdk.WriteSafeReplicationState(), (&node{system: view}).WriteSafeReplicationState(), "state %b, local %t", state, local)
		}
	}
}

// Exchanges that begin while a question to Vault is under way share the answer to the next question. An exchange never uses an answer to
// a question from before it began.
func TestExchangesShareWhatVaultAnswers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		system := newSystem()
		system.answers = make(chan struct{})
		n := &node{system: system}
		ready := make(chan bool, 5)
		begin := func() { go func() { ready <- n.ready() }() }
		begin()
		synctest.Wait()
		system.replication.Store(uint32(consts.ReplicationPerformanceStandby))
		for range 3 {
			begin()
		}
		synctest.Wait()
		assert.EqualValues(t, 1, system.asked.Load(), "the others wait for the first answer")
		system.answers <- struct{}{}
		synctest.Wait()
		assert.True(t, <-ready)
		assert.EqualValues(t, 768*time.Hour, n.defaultTTL.Load())
		assert.EqualValues(t, 768*time.Hour, n.maxTTL.Load())
		assert.EqualValues(t, 1+2+1, system.asked.Load(), "replication, two TTLs, and one question for the three")
		system.replication.Store(0)
		begin()
		system.answers <- struct{}{}
		for range 3 {
			assert.False(t, <-ready)
		}
		system.answers <- struct{}{}
		assert.True(t, <-ready)
		assert.EqualValues(t, 4+3, system.asked.Load(), "a standby does not ask for the TTLs")
	})
}
