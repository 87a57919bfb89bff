package backend

import (
	"fmt"
	"net/http"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/share"
)

// Readers whose every read is an exchange take nearly all calls of the share, and each read is answered. A tenant that no reader reads is
// exchanged as often as keep_alive says all the same.
func TestReadersLeaveCallsToBackgroundWork(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, with(with(classA, "keep_alive", "1h"), "exchanges_per_minute", 10))
		e.add("quiet", nil)
		e.pass(50 * time.Minute)
		stop := make(chan struct{})
		defer close(stop)
		for i := range 5 {
			name := fmt.Sprint("busy", i)
			e.add(name, map[string]any{"token_per_lease": true})
			go func() {
				for {
					select {
					case <-stop:
						return
					case <-time.After(36 * time.Second):
						_, status, _ := e.try(logical.ReadOperation, "creds/"+name, nil)
						assert.Equal(t, http.StatusOK, status)
					}
				}
			}()
			time.Sleep(7 * time.Second)
		}
		e.pass(25 * time.Minute)
		assert.Less(t, time.Since(e.stored("quiet").LastExchange), 20*time.Minute)
	})
}

// Readers of tenants whose exchanges have failed several times ask for more exchanges than the share has. Neither readers of another tenant nor its
// keep_alive wait for them.
func TestReadersOfFailingTenantsGiveWay(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, with(with(classA, "keep_alive", "1h"), "exchanges_per_minute", 10))
		e.add("quiet", nil)
		e.add("read", map[string]any{"token_per_lease": true})
		e.pass(30 * time.Minute)
		stop := make(chan struct{})
		defer close(stop)
		for i := range 30 {
			name := fmt.Sprint("failing", i)
			e.server.Inject(oauth2test.Fault{User: name, Answer: oauth2test.InvalidScope})
			e.add(name, nil)
			go func() {
				for {
					select {
					case <-stop:
						return
					case <-time.After(10 * time.Second):
						_, _, _ = e.try(logical.ReadOperation, "creds/"+name, nil)
					}
				}
			}()
		}
		e.pass(20 * time.Minute) // each of them has failed often by now
		for range 10 {
			_, status, text := e.try(logical.ReadOperation, "creds/read", nil)
			assert.Equal(t, http.StatusOK, status, text)
			e.pass(2 * time.Minute)
		}
		assert.Less(t, time.Since(e.stored("quiet").LastExchange), 20*time.Minute)
	})
}

// leaveReaders makes calls until only the fifth of the share is left that is the readers'.
func (e *oauthEngine) leaveReaders() {
	e.t.Helper()
	via, err := e.connectors.of(e.t.Context(), defaultConnector)
	require.NoError(e.t, err)
	for !via.share.FreeAt(share.Want{Class: share.Retry}).After(time.Now()) {
		call, err := via.share.Take(e.t.Context(), share.Want{})
		require.NoError(e.t, err)
		call.End()
	}
}

// A tenant's exchanges have failed several times, and only the fifth of the share is left that is the readers'. Who has it exchanged, or writes
// it, waits as a reader of any other tenant does.
func TestOperatorsOfFailingTenantsDoNotGiveWay(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, with(classA, "exchanges_per_minute", 20))
		e.server.Inject(oauth2test.Fault{Answer: oauth2test.InvalidScope})
		e.add("failing", nil)
		for range 10 {
			_, _, _ = e.try(logical.ReadOperation, "creds/failing", nil)
			e.pass(2 * time.Minute)
		}
		e.leaveReaders()
		calls := len(e.server.Calls(oauth2test.EndpointToken))
		_, _, text := e.try(logical.UpdateOperation, "tenants/failing/refresh", nil)
		assert.Len(t, e.server.Calls(oauth2test.EndpointToken), calls+1, text)
		_, _, text = e.try(logical.UpdateOperation, "tenants/failing", map[string]any{"refresh_token": e.server.Grant(e.clientID, "failing")})
		assert.Len(t, e.server.Calls(oauth2test.EndpointToken), calls+2, text)
	})
}

// A tenant's exchange has failed once: its readers still get the places that are left to readers. Nor do readers give way whose tenant has been
// exchanged since it failed.
func TestReadersGiveWayAfterSeveralFailuresAlone(t *testing.T) {
	for name, fails := range map[string]int{"it has failed once": 1, "it works again": 8} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, oauth2test.ClassA, with(classA, "exchanges_per_minute", 20))
				e.server.Inject(oauth2test.Fault{Answer: oauth2test.InvalidScope, Times: fails})
				e.add("acme", map[string]any{"token_per_lease": true})
				_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
				require.NotEqual(t, http.StatusOK, status)
				if fails > 1 {
					e.pass(20 * time.Minute)
					e.lease("acme")
				}
				e.leaveReaders()
				time.Sleep(2 * time.Second) // the backoff
				_, status, text := e.try(logical.ReadOperation, "creds/acme", nil)
				assert.Equal(t, http.StatusOK, status, text)
			})
		})
	}
}
