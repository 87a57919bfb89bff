package backend

import (
	"fmt"
	"net/http"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// readEach reads a tenant's creds again and again until stop is closed.
func (e *oauthEngine) readEach(every time.Duration, tenant string, stop <-chan struct{}, then func(status int)) {
	for {
		select {
		case <-stop:
			return
		case <-time.After(every):
			_, status, _ := e.try(logical.ReadOperation, "creds/"+tenant, nil)
			then(status)
		}
	}
}

// Readers whose every read is an exchange take nearly all calls of the share, and each read is answered; or they want more calls than there are. A
// tenant that no reader reads is exchanged as often as keep_alive says all the same.
func TestReadersLeaveCallsToBackgroundWork(t *testing.T) {
	for name, c := range map[string]struct {
		tenants  int
		each     time.Duration
		answered bool
	}{"enough calls": {5, 36 * time.Second, true}, "too few": {12, 2 * time.Second, false}} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, oauth2test.ClassA, with(with(classA, "keep_alive", "1h"), "exchanges_per_minute", 10))
				e.add("quiet", nil)
				e.pass(50 * time.Minute)
				stop := make(chan struct{})
				defer close(stop)
				for i := range c.tenants {
					name := fmt.Sprint("busy", i)
					e.add(name, map[string]any{"token_per_lease": true})
					go e.readEach(c.each, name, stop, func(status int) {
						if c.answered {
							assert.Equal(t, http.StatusOK, status)
						}
					})
					time.Sleep(7 * time.Second)
				}
				e.pass(16 * time.Minute)
				assert.Less(t, time.Since(e.stored("quiet").LastExchange), 20*time.Minute)
			})
		})
	}
}

// Readers of tenants that the service always refuses ask for more exchanges than the share has. A tenant that no reader reads is exchanged as often
// as keep_alive says all the same.
func TestReadersOfFailingTenantsLeaveCallsToBackgroundWork(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, with(with(classA, "keep_alive", "1h"), "exchanges_per_minute", 10))
		e.add("quiet", nil)
		e.pass(30 * time.Minute)
		stop := make(chan struct{})
		defer close(stop)
		for i := range 30 {
			name := fmt.Sprint("failing", i)
			e.server.Inject(oauth2test.Fault{User: name, Answer: oauth2test.InvalidScope})
			e.add(name, nil)
			go e.readEach(10*time.Second, name, stop, func(int) {})
		}
		e.pass(40 * time.Minute)
		assert.Less(t, time.Since(e.stored("quiet").LastExchange), 20*time.Minute)
	})
}

// The service wants a pause while tenants are due, and again and again a pause of a second. Their exchanges begin when a pause is over, and are not
// tried before.
func TestDueTenantsWaitForTheEndOfAPause(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, with(with(classA, "keep_alive", "1h"), "exchanges_per_minute", 50))
		for i := range 20 {
			e.add(fmt.Sprint("t", i), nil)
		}
		e.pass(40 * time.Minute)
		e.server.Inject(oauth2test.Fault{Answer: oauth2test.TooManyRequests(time.Second)})
		e.connectors.present(defaultConnector).share.Pause(time.Now().Add(25 * time.Minute))
		time.Sleep(24*time.Minute + 50*time.Second) // all are due
		before := e.system.asked.Load()             // Vault is asked before each exchange begins
		time.Sleep(9900 * time.Millisecond)
		assert.Equal(t, before, e.system.asked.Load())
		time.Sleep(10 * time.Second)
		assert.Less(t, e.system.asked.Load()-before, int64(1000))
	})
}
