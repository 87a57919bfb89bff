package backend

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// The planned exchange has failed, and a reader has a lease until the next try. After a restart, no exchange ends the access token before
// that lease. Readers get a new one a minute after the restart at the latest.
func TestOAuthRestartKeepsLeasesUntilTheNextTry(t *testing.T) {
	for name, tries := range map[string]int{"first try": 1, "eighth try": 8} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, dayD, nil)
				e.add("acme", nil)
				first := accessTokenOf(e.lease("acme"))
				e.server.Inject(oauth2test.Fault{Answer: oauth2test.BadGateway})
				time.Sleep(time.Until(e.stored("acme").Access.Planned))
				calls := len(e.server.Calls(oauth2test.EndpointToken))
				for len(e.server.Calls(oauth2test.EndpointToken)) < calls+tries {
					time.Sleep(time.Second)
					synctest.Wait()
				}
				lease := e.lease("acme")
				require.Equal(t, first, accessTokenOf(lease))
				end := time.Now().Add(lease.Secret.MaxTTL)
				e.server.ClearFaults()
				e.restart()
				e.waitForIndex()
				restarted := time.Now()
				e.lease("acme")
				time.Sleep(time.Until(end.Add(-10 * time.Second)))
				go e.lease("acme") // which may wait until an exchange is made
				time.Sleep(time.Until(end))
				assert.True(t, e.server.Alive(first), "until the lease ends")
				time.Sleep(time.Until(restarted.Add(time.Minute)))
				assert.NotEqual(t, first, accessTokenOf(e.lease("acme")))
				assert.Less(t, time.Since(restarted), time.Minute+3*time.Second)
				e.kept()
			})
		})
	}
}
