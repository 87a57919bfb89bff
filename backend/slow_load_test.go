package backend

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/tokenservice"
)

// Two flows read at a start what waits for its revocation. The slow one has read a refresh token's intent that the write of the token deletes
// meanwhile: the intent does not come back.
func TestSlowLoadBringsNoSettledIntentBack(t *testing.T) {
	for _, tenant := range []string{"z", "y"} {
		t.Run(tenant, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e, token := newEngineWithDeletedTenant(t)
				var slow atomic.Bool
				slow.Store(true)
				e.storage.surround(func(op, key string, do func() error) error {
					err := do()
					if op == "get" && strings.HasPrefix(key, intentPrefix) && slow.CompareAndSwap(true, false) {
						time.Sleep(3 * time.Second)
					}
					return err
				})
				e.restart()
				time.Sleep(time.Second)
				require.Equal(t, http.StatusNoContent, e.rewrite(tenant, token, true))
				assert.True(t, e.livesOn(e.held(tenant)))
				assert.Nil(t, e.read("config")["pending_revocations"])
				e.kept()
			})
		})
	}
}

// A load of what waits for its revocation ends with its caller: the next load reads the rest alone, so that however much there is, callers
// come to the end of it. After another node's write each intent is read again.
func TestLoadGoesOnWhereAnotherEnded(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, map[string]any{"revocation": "access_token", "exchange_invalidates": false})
		e.stop()
		const n = 20 * storageReaders
		for i := range n {
			name := fmt.Sprintf("G%d", i)
			expires := time.Now().Add(day)
			require.NoError(t, putEntry(t.Context(), e.storage, intentPrefix+"default/"+name, &intent{
				Format: entryFormat, Tenant: "acme", Token: name, Type: tokenservice.TypeAccessToken, Expires: expires,
			}))
			require.NoError(t, putEntry(t.Context(), e.storage, heldPrefix+"acme/"+name, &held{Format: entryFormat, Connector: "default", Token: name, Expires: expires}))
		}
		r := newRevocations(e.storage)
		var reads atomic.Int64
		e.storage.surround(func(op, _ string, do func() error) error {
			if op == "get" {
				time.Sleep(time.Second)
			}
			err := do()
			if op == "get" && err == nil {
				reads.Add(1)
			}
			return err
		})
		loads := func() (n int) {
			for n = 1; ; n++ {
				ctx, cancel := context.WithTimeout(t.Context(), 9500*time.Millisecond)
				err := r.load(ctx)
				cancel()
				if err == nil || n > 10 {
					return n
				}
			}
		}
		assert.Equal(t, 5, loads())
		assert.EqualValues(t, 2*n, reads.Load())
		r.invalidate(intentPrefix + "default/G0")
		assert.Equal(t, 5, loads())
		pending, _ := r.pendingOf("default")
		assert.Equal(t, n, pending)
		assert.Equal(t, n, len(r.records)) // Len would print them
	})
}
