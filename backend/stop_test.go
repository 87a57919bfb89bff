package backend

import (
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/kaizala/kaizalatest"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/share"
)

// The service hangs, 200 tenants are due and readers wait: the engine stops within
// its limit, and the readers get their answers within theirs.
func TestStopWhileTheServiceHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		var tokens []string
		for i := range 200 {
			tokens = append(tokens, e.newToken(fmt.Sprint("u", i)))
		}
		time.Sleep(inWindow)
		e.kaizala.Inject(kaizalatest.Fault{Hang: true})
		for i, token := range tokens {
			e.write(fmt.Sprint("tenants/t", i), map[string]any{"refresh_token": token, "verify": false})
		}
		e.minute()
		var readers sync.WaitGroup
		for i := range 40 {
			readers.Go(func() {
				begun := time.Now()
				_, status, _ := e.try(logical.ReadOperation, fmt.Sprint("creds/t", i*5), nil)
				assert.Equal(t, http.StatusServiceUnavailable, status)
				assert.LessOrEqual(t, time.Since(begun), 10*time.Second)
			})
		}
		time.Sleep(2 * time.Second)
		begun := time.Now()
		e.stop()
		assert.LessOrEqual(t, time.Since(begun), 5*time.Second)
		readers.Wait()
		assert.LessOrEqual(t, time.Since(begun), 10*time.Second)

		calls := e.kaizala.CallCount()
		_, status, text := e.try(logical.ReadOperation, "creds/t1", nil)
		assert.Equal(t, http.StatusServiceUnavailable, status, text)
		time.Sleep(time.Hour)
		assert.Equal(t, calls, e.kaizala.CallCount(), "a stopped engine makes no call")

		e.kaizala.ClearFaults()
		e.start()
		e.pass(15 * time.Minute)
		for i := range tokens {
			assert.True(t, e.kaizala.RefreshTokenAlive(e.stored(fmt.Sprint("t", i)).RefreshToken))
		}
	})
}

// The answer to an exchange comes while the stop waits for it: it is stored before
// the stop ends.
func TestStopWaitsForAnExchange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newRotatingEngine(t)
		e.kaizala.Inject(kaizalatest.Fault{Delay: 3 * time.Second, Times: 1})
		go func() { _, _, _ = e.try(logical.ReadOperation, "creds/acme", nil) }()
		time.Sleep(time.Second)
		begun := time.Now()
		e.stop()
		assert.Equal(t, 2*time.Second, time.Since(begun))
		assert.Equal(t, e.kaizala.CurrentRefreshToken("acme"), e.stored("acme").RefreshToken)
		e.start()
	})
}

// The service has replaced the refresh token, and its answer takes longer than a stop waits for it: the new refresh token is lost. No text
// says the opposite: neither to a reader who has waited too long, nor to one whom the stop cuts off, nor in the status after the start.
func TestStopLosesALateAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.write("config", map[string]any{"request_timeout": "1m"})
		e.add("acme", nil)
		time.Sleep(time.Second)
		e.server.Inject(oauth2test.Fault{Hold: true, Times: 1})
		for op, path := range map[logical.Operation]string{logical.ReadOperation: "creds/acme", logical.UpdateOperation: "tenants/acme/refresh"} {
			_, status, text := e.try(op, path, nil)
			assert.Equal(t, http.StatusServiceUnavailable, status)
			assert.Contains(t, text, ", unless Vault is stopped before that; nothing was lost")
		}
		var reader sync.WaitGroup
		reader.Go(func() {
			_, status, text := e.try(logical.ReadOperation, "creds/acme", nil)
			assert.Equal(t, http.StatusServiceUnavailable, status)
			assert.Equal(t, "the engine is stopping: try again in a moment", text)
		})
		synctest.Wait()
		e.restart()
		reader.Wait()
		assert.Equal(t, "no access token for tenant \"acme\": Vault or the plugin ended before the answer to an exchange came. The exchange is tried again.",
			e.read("tenants/acme")["last_error"])
		e.pass(time.Minute)
		assert.Equal(t, statusRejected, e.status("acme"))
	})
}

func TestStopDuringALateVerification(t *testing.T) {
	for name, delay := range map[string]time.Duration{"in time": 13 * time.Second, "too late": 40 * time.Second} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newConfiguredEngine(t)
				token := e.newToken("acme")
				time.Sleep(inWindow)
				e.kaizala.Inject(kaizalatest.Fault{Delay: delay, Times: 1})
				_, status, text := e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": token})
				assert.Equal(t, http.StatusServiceUnavailable, status)
				assert.Contains(t, text, "the write will be stored then, unless Vault is stopped before that")
				time.Sleep(time.Second)
				begun := time.Now()
				e.stop()
				assert.LessOrEqual(t, time.Since(begun), 5*time.Second)
				if stored := e.stored("acme"); name == "in time" {
					assert.Equal(t, e.kaizala.CurrentRefreshToken("acme"), stored.RefreshToken)
				} else {
					assert.Nil(t, stored)
					assert.True(t, e.kaizala.RefreshTokenAlive(token), "the service has not replaced the refresh token")
				}
				e.start()
			})
		})
	}
}

// Storage hangs: the stop ends within the same limit as with a service that hangs.
func TestStopWhileStorageHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newRotatingEngine(t)
		released := make(chan struct{})
		e.storage.surround(func(_, _ string, do func() error) error {
			<-released
			return do()
		})
		go func() { _, _, _ = e.try(logical.ReadOperation, "creds/acme", nil) }()
		time.Sleep(time.Second)
		begun := time.Now()
		e.stop()
		assert.LessOrEqual(t, time.Since(begun), 5*time.Second)
		close(released)
		e.storage.heal()
		synctest.Wait()
		e.start()
	})
}

// The stop ends a verification whose call storage does not finish to note: the writer is told of the stop, and not that storage has failed.
func TestStopWhileACallIsBeingNoted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		reached, release := e.storage.hold("put", callPrefix)
		var writer sync.WaitGroup
		writer.Go(func() {
			_, status, text := e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": e.newToken("acme")})
			assert.Equal(t, http.StatusServiceUnavailable, status)
			assert.Contains(t, text, "the engine is stopping")
		})
		<-reached
		e.stop()
		writer.Wait()
		release()
		e.storage.heal()
		e.start()
	})
}

// The stop begins while an exchange waits for its place in the share or for its note: it is not made, because the stop could lose its
// answer. The next process does not take it for an exchange whose answer was lost.
func TestStopDuringAWaitBeforeTheCall(t *testing.T) {
	for name, hold := range map[string]func(e *engine){
		"for a place": func(e *engine) {
			e.write("config", map[string]any{"exchanges_per_minute": 5})
			e.write("tenants/acme/refresh", nil)
			time.Sleep(share.Window - 2*time.Second)
		},
		"for its note": func(e *engine) {
			e.storage.surround(func(op, key string, do func() error) error {
				if op == "put" && strings.HasPrefix(key, "calls/") {
					time.Sleep(2 * time.Second)
				}
				return do()
			})
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newConfiguredEngine(t)
				e.addTenant("acme")
				hold(e)
				calls, begun := e.kaizala.CallCount(), time.Now()
				var readers sync.WaitGroup
				readers.Go(func() {
					_, status, text := e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
					assert.Equal(t, http.StatusServiceUnavailable, status)
					assert.Contains(t, text, "the engine is stopping")
				})
				time.Sleep(time.Second)
				e.stop()
				readers.Wait()
				assert.Equal(t, calls, e.kaizala.CallCount())
				e.storage.heal()
				assert.Zero(t, e.log.count("an exchange failed"))
				next := share.New(e.storage, defaultConnector)
				assert.NoError(t, next.Load(t.Context()))
				assert.True(t, next.Unsettled("acme").Before(begun))
			})
		})
	}
}

// The stop begins while the call that sends a code or a PIN, or that polls, is noted: the call is not made, because the stop could lose the
// refresh token of its answer. The next process goes on with the attempt.
func TestStopBeforeTheCallOfAGrant(t *testing.T) {
	for path, flow := range map[string]func(e *grantEngine) (send func() string, calls func() int){
		byCode: func(e *grantEngine) (func() string, func() int) {
			e.write("config/as", map[string]any{"confirm": false})
			back := e.authorize(nil)
			return func() string { return e.open(back).text() }, func() int { return e.sent("authorization_code") }
		},
		byDevice: func(e *grantEngine) (func() string, func() int) {
			code := e.start(byDevice, nil)["user_code"].(string)
			require.NoError(e.t, e.server.ApproveDevice(code, "jane"))
			return nil, func() int { return e.sent(deviceGrant) }
		},
		byPIN: func(e *grantEngine) (func() string, func() int) {
			e.phone()
			pin := e.sentPIN()
			return func() string {
				_, _, text := e.pin(map[string]any{"pin": pin})
				return text
			}, func() int { return e.pinCalls(redeemPINPath) }
		},
	} {
		t.Run(path, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newGrantEngine(t)
				send, calls := flow(e)
				noted, release := e.storage.hold("put", callPrefix)
				var sender sync.WaitGroup
				if send != nil {
					sender.Go(func() { assert.Contains(t, send(), "ngine is stopping") })
				}
				<-noted
				sender.Go(e.stop)
				time.Sleep(time.Second)
				release()
				sender.Wait()
				assert.Zero(t, calls())
				e.engine.start()
				if send != nil {
					send()
				}
				e.pass(time.Minute)
				assert.NotNil(t, e.stored("acme"))
				assert.Equal(t, 1, calls())
			})
		})
	}
}
