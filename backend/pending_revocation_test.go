package backend

import (
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// A refresh token that waits for its revocation is written again and verified, the service replaces it, and storage does not take that for a
// while: it deletes no intent, or takes nothing at all. The replaced refresh token is not revoked, which would end the grant of the new one.
func TestKeptRotationSparesTheReplacedRefreshToken(t *testing.T) {
	t.Run("storage deletes no intent", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			e, token := newEngineWithDeletedTenant(t)
			e.server.ClearFaults()
			e.revocationFails()
			e.storage.refuse("delete", intentPrefix)
			require.Equal(t, http.StatusServiceUnavailable, e.rewrite("z", token, true))
			require.NotEqual(t, token, e.held("z"))
			e.server.ClearFaults()
			calls := len(e.revocations())
			time.Sleep(40 * time.Second)
			assert.Len(t, e.revocations(), calls)
			assert.True(t, e.livesOn(e.held("z")))
			e.write("tenants/z/refresh", nil)
			assert.Nil(t, e.read("config")["pending_revocations"])
			e.kept()
		})
	})
	for _, outage := range []time.Duration{0, 20 * time.Second, time.Minute, 90 * time.Second} {
		t.Run("storage takes nothing for "+outage.String(), func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e, token := newEngineWithDeletedTenant(t)
				e.pass(time.Minute)
				e.storage.surround(func(op, key string, do func() error) error {
					if op == "delete" || op == "put" && !strings.HasPrefix(key, callPrefix) {
						e.storage.failWith(func(op, _ string) error {
							if op == "put" || op == "delete" {
								return errStorage
							}
							return nil
						})
						return errStorage
					}
					return do()
				})
				require.Equal(t, http.StatusServiceUnavailable, e.rewrite("z", token, true))
				require.NotEqual(t, token, e.held("z"))
				e.server.ClearFaults()
				time.Sleep(outage)
				assert.True(t, e.livesOn(e.held("z")))
				assert.NotContains(t, e.storedText(), intentPrefix)
				e.kept()
			})
		})
	}
}
