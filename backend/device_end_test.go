package backend

import (
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// The service says that the person has denied access, while storage fails for a while: the attempt is denied once storage works.
func TestDeniedWhileStorageFails(t *testing.T) {
	for op, failures := range map[string]int32{"get": 1, "put": endTries} {
		t.Run(op, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newGrantEngine(t)
				started := e.start(byDevice, nil)
				time.Sleep(6 * time.Second)
				require.NoError(t, e.server.DenyDevice(started["user_code"].(string)))
				var failed atomic.Int32
				e.storage.surround(func(o, key string, do func() error) error {
					if o == op && strings.HasPrefix(key, attemptKeys) && len(e.polls()) > 1 && failed.Add(1) <= failures {
						return errStorage
					}
					return do()
				})
				e.pass(time.Minute)
				assert.GreaterOrEqual(t, failed.Load(), failures)
				e.pass(time.Minute)
				assert.Equal(t, attemptDenied, e.attemptStatus(byDevice))
				assert.Len(t, e.polls(), 2, "the service is not asked again")
			})
		})
	}
}

// Storage refuses for twenty seconds to note that the person has denied a device login. Once it works, other requests for the tenant do.
func TestRequestsAfterStorageHealsDuringADenial(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		started := e.start(byDevice, nil)
		time.Sleep(6 * time.Second)
		require.NoError(t, e.server.DenyDevice(started["user_code"].(string)))
		e.storage.surround(func(o, key string, do func() error) error {
			if o == "put" && strings.HasPrefix(key, attemptKeys) && len(e.polls()) > 1 {
				return errStorage
			}
			return do()
		})
		time.Sleep(5 * time.Second)
		require.Len(t, e.polls(), 2)
		time.Sleep(16 * time.Second)
		e.storage.surround(nil)
		begun := time.Now()
		_, status, text := e.ask(logical.UpdateOperation, "tenants/acme/authorize", map[string]any{"connector": "as"})
		assert.Equal(t, 200, status, "%v %v", text, time.Since(begun))
	})
}
