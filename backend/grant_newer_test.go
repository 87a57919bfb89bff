package backend

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
)

// An attempt ends, and its entry does not show that yet. A newer attempt leaves the end as it was.
func TestNewerAttemptLeavesTheEndOfTheOneBefore(t *testing.T) {
	for end, reach := range map[string]func(*grantEngine){
		attemptGranted: func(e *grantEngine) {
			back := e.authorize(nil)
			granted := false
			e.storage.failWith(func(op, key string) error {
				granted = granted || op == "put" && key == tenantPrefix+"acme"
				if granted && op == "put" && strings.HasPrefix(key, attemptKeys) {
					return errStorage
				}
				return nil
			})
			e.confirm(back)
			e.storage.heal()
		},
		attemptExpired: func(e *grantEngine) {
			e.authorize(nil)
			time.Sleep(attemptLife)
		},
	} {
		t.Run(end, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newGrantEngine(t)
				reach(e)
				all, err := e.attemptsOf(t.Context(), "acme")
				assert.NoError(t, err)
				assert.Equal(t, attemptPending, all.Last[byCode].Status, "what storage has")
				e.start(byDevice, nil)
				assert.Equal(t, end, e.attemptStatus(byCode))
			})
		})
	}
}
