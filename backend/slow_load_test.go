package backend

import (
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
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
