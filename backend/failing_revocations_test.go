package backend

import (
	"fmt"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// The service fails to revoke more tokens than the share has calls a minute, and each is due again every half a minute. Another token, which
// ends later, is revoked within a few minutes all the same, also if its first call has failed.
func TestFailingRevocationsLeaveCallsToTheOthers(t *testing.T) {
	for name, c := range map[string]struct {
		share    int
		delay    time.Duration
		failOnce bool
	}{"the first call succeeds": {5, 0, false}, "one call a minute": {1, 0, false}, "the first call fails": {5, 100 * time.Millisecond, true}} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, func(o *oauth2test.Options) {
					oauth2test.ClassA(o)
					o.AccessTokenLife = day
				}, classA)
				fault := oauth2test.Fault{Endpoint: oauth2test.EndpointRevocation, Answer: oauth2test.ServerError, Delay: c.delay}
				var failing []*logical.Response
				for i := range 10 {
					fault.User = fmt.Sprint("failing", i)
					e.server.Inject(fault)
					e.add(fault.User, nil)
					failing = append(failing, e.lease(fault.User))
				}
				time.Sleep(time.Minute)
				if c.failOnce {
					fault.User, fault.Times = "acme", 1
					e.server.Inject(fault)
				}
				e.add("acme", nil)
				lease := e.lease("acme")
				e.write("config", map[string]any{"exchanges_per_minute": c.share})
				e.revoke(failing...)
				e.pass(5 * time.Minute)
				e.revoke(lease)
				e.pass(10 * time.Minute)
				assert.False(t, e.server.Alive(accessTokenOf(lease)))
			})
		})
	}
}
