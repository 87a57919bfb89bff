package backend

import (
	"context"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// newEngineWithDeletedTenant starts an engine with a deleted tenant z, whose refresh token waits for its revocation: the revocation endpoint fails.
func newEngineWithDeletedTenant(t *testing.T) (e *oauthEngine, token string) {
	e = newOAuthEngine(t, oauth2test.ClassD, map[string]any{"revoke_on_delete": true})
	e.add("z", nil)
	e.waitForIndex()
	token = e.held("z")
	e.revocationFails()
	e.ok(logical.DeleteOperation, "tenants/z", nil)
	synctest.Wait()
	require.Equal(t, 1, e.read("config")["pending_revocations"])
	return e, token
}

func (e *oauthEngine) revocationFails() {
	e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointRevocation, Answer: oauth2test.Unavailable(0)})
}

// rewrite writes a tenant with a refresh token, and returns the answer's status.
func (e *oauthEngine) rewrite(tenant, token string, verify bool) (status int) {
	_, status, _ = e.try(logical.UpdateOperation, "tenants/"+tenant, map[string]any{"refresh_token": token, "verify": verify})
	return status
}

// A write of a refresh token that waits for its revocation, and that is not stored: the refresh token is still revoked, also by the next
// process.
func TestOAuthWriteThatIsNotStoredLeavesTheRevocation(t *testing.T) {
	for name, c := range map[string]struct {
		answer oauth2test.Answer
		status int
	}{
		"outage": {oauth2test.Answer{Status: 500}, 503},
		"limit":  {oauth2test.TooManyRequests(30 * time.Second), 429},
		"scope":  {oauth2test.Answer{Status: 400, Body: `{"error": "invalid_scope"}`}, 400},
	} {
		for _, crashes := range []bool{false, true} {
			t.Run(name, func(t *testing.T) {
				bubble(t, func(t *testing.T) {
					e, token := newEngineWithDeletedTenant(t)
					e.server.Inject(oauth2test.Fault{Answer: c.answer})
					assert.Equal(t, c.status, e.rewrite("z", token, true))
					if crashes {
						e.crash()
						e.waitForIndex()
						e.minute()
						synctest.Wait()
					}
					assert.Equal(t, 1, e.read("config")["pending_revocations"])
					calls := len(e.revocations())
					assert.False(t, e.livesOn(token))
					assert.Len(t, e.revocations(), calls+1)
					assert.NotContains(t, e.storedText(), intentPrefix)
					e.backend.revocations.mu.Lock()
					assert.Empty(t, e.backend.revocations.writes)
					e.backend.revocations.mu.Unlock()
				})
			})
		}
	}
}

// The share has no place for the verification, and the revocation's call waits for its place, too: the call is made when it has that.
func TestOAuthWriteWithoutAPlaceLeavesTheRevocation(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassD, map[string]any{"revoke_on_delete": true, "exchanges_per_minute": 5})
		e.add("z", nil)
		e.waitForIndex()
		token := e.held("z")
		for _, name := range []string{"b", "c", "d", "e", "f"} {
			require.Equal(t, http.StatusNoContent, e.rewrite(name, e.server.Grant(e.clientID, name), true))
		}
		e.revocationFails()
		time.Sleep(40 * time.Second)
		e.ok(logical.DeleteOperation, "tenants/z", nil)
		synctest.Wait()
		require.Empty(t, e.revocations())
		assert.Equal(t, http.StatusTooManyRequests, e.rewrite("z", token, true))
		assert.Equal(t, 1, e.read("config")["pending_revocations"])
		time.Sleep(30 * time.Second)
		assert.NotEmpty(t, e.revocations())
		e.crash()
		assert.False(t, e.livesOn(token))
	})
}

// The writer has stopped waiting when the verification ends.
func TestOAuthLateVerificationAndTheRevocation(t *testing.T) {
	for _, fails := range []bool{true, false} {
		bubble(t, func(t *testing.T) {
			e, token := newEngineWithDeletedTenant(t)
			fault := oauth2test.Fault{Delay: 12 * time.Second}
			if fails {
				fault.Answer = oauth2test.Answer{Status: 500}
			}
			e.server.Inject(fault)
			assert.Equal(t, http.StatusServiceUnavailable, e.rewrite("z", token, true))
			assert.Equal(t, 1, e.read("config")["pending_revocations"], "the verification goes on")
			assert.Contains(t, e.storedText(), intentPrefix, "and the next process would revoke the token")
			calls := len(e.revocations())
			e.server.ClearFaults()
			time.Sleep(4 * time.Second)
			e.pass(2 * time.Minute)
			if fails {
				assert.Len(t, e.revocations(), calls+1)
				assert.False(t, e.server.RefreshTokenAlive(token))
				return
			}
			assert.Len(t, e.revocations(), calls)
			assert.True(t, e.server.RefreshTokenAlive(e.held("z")))
		})
	}
}

// A write may be in storage, although storage has reported an error: its refresh token is not revoked.
func TestOAuthWriteInDoubtCancelsTheRevocation(t *testing.T) {
	for _, verify := range []bool{true, false} {
		for _, kept := range []bool{true, false} {
			bubble(t, func(t *testing.T) {
				e, token := newEngineWithDeletedTenant(t)
				e.server.Set(func(o *oauth2test.Options) { o.Rotation = oauth2test.RotateNever })
				if kept {
					e.storage.unheard("put", tenantPrefix)
				} else {
					e.storage.refuse("put", tenantPrefix)
				}
				assert.GreaterOrEqual(t, e.rewrite("z", token, verify), 500)
				assert.True(t, e.livesOn(token))
			})
		}
	}
}

// A write waits for another exchange of its tenant, begins anew, and fails.
func TestOAuthWriteThatBeginsAnewLeavesTheRevocation(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e, token := newEngineWithDeletedTenant(t)
		e.add("z", nil) // with another refresh token
		e.server.Inject(oauth2test.Fault{Delay: 3 * time.Second, Times: 1})
		go e.try(logical.UpdateOperation, "tenants/z/refresh", nil)
		synctest.Wait()
		e.server.Inject(oauth2test.Fault{Answer: oauth2test.Answer{Status: 500}})
		assert.Equal(t, http.StatusServiceUnavailable, e.rewrite("z", token, true))
		assert.Equal(t, 1, e.read("config")["pending_revocations"])
		assert.False(t, e.livesOn(token))
		assert.True(t, e.server.RefreshTokenAlive(e.held("z")))
	})
}

// The tenant is deleted while a write of it is verified, or the writer gives up while another exchange of the tenant goes on.
func TestOAuthWriteThatIsOvertakenLeavesTheRevocation(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e, token := newEngineWithDeletedTenant(t)
		e.server.Set(func(o *oauth2test.Options) { o.Rotation = oauth2test.RotateNever })
		e.server.Inject(oauth2test.Fault{Delay: 3 * time.Second, Times: 1})
		go e.rewrite("z", token, true)
		synctest.Wait()
		e.ok(logical.DeleteOperation, "tenants/z", nil)
		e.server.ClearFaults()
		time.Sleep(4 * time.Second)
		e.pass(2 * time.Minute)
		assert.False(t, e.server.RefreshTokenAlive(token))
	})
	bubble(t, func(t *testing.T) {
		e, token := newEngineWithDeletedTenant(t)
		e.add("z", nil)
		e.server.Inject(oauth2test.Fault{Delay: 20 * time.Second, Times: 1})
		go e.try(logical.UpdateOperation, "tenants/z/refresh", nil)
		synctest.Wait()
		assert.Equal(t, http.StatusServiceUnavailable, e.rewrite("z", token, true))
		assert.False(t, e.livesOn(token))
	})
}

// Two tenants are written with the same refresh token at the same time: it is revoked if neither write is stored, and only then.
func TestOAuthWritesOfOneRefreshTokenAndTheRevocation(t *testing.T) {
	failing := oauth2test.Fault{Delay: 3 * time.Second, Answer: oauth2test.Answer{Status: 500}, Times: 1}
	for name, c := range map[string]struct {
		first  oauth2test.Fault
		second func(e *oauthEngine, token string) int
		status [2]int
		alive  bool
	}{
		"the first fails, the second is stored": {failing, func(e *oauthEngine, token string) int { return e.rewrite("y", token, false) }, [2]int{503, 204}, true},
		"the second fails, the first is stored": {oauth2test.Fault{Delay: 3 * time.Second, Times: 1}, func(e *oauthEngine, token string) int {
			e.server.Inject(oauth2test.Fault{Answer: oauth2test.Answer{Status: 500}, Times: 1})
			return e.rewrite("y", token, true)
		}, [2]int{204, 503}, true},
		"both fail": {failing, func(e *oauthEngine, token string) int {
			e.server.Inject(oauth2test.Fault{Answer: oauth2test.Answer{Status: 500}, Times: 1})
			return e.rewrite("y", token, true)
		}, [2]int{503, 503}, false},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e, token := newEngineWithDeletedTenant(t)
				e.server.Set(func(o *oauth2test.Options) { o.Rotation = oauth2test.RotateNever })
				e.server.Inject(c.first)
				var status [2]int
				var first sync.WaitGroup
				first.Go(func() { status[0] = e.rewrite("z", token, true) })
				synctest.Wait()
				status[1] = c.second(e, token)
				first.Wait()
				assert.Equal(t, c.status, status)
				calls := len(e.revocations())
				assert.Equal(t, c.alive, e.livesOn(token))
				if c.alive {
					assert.Len(t, e.revocations(), calls)
				}
				e.backend.revocations.mu.Lock()
				assert.Empty(t, e.backend.revocations.writes)
				e.backend.revocations.mu.Unlock()
			})
		})
	}
}

// The process ends while the service verifies a refresh token that waits for its revocation: the next process revokes it.
func TestOAuthWriteThatACrashCutsLeavesTheRevocation(t *testing.T) {
	for _, byStop := range []bool{false, true} {
		bubble(t, func(t *testing.T) {
			e, token := newEngineWithDeletedTenant(t)
			e.server.Set(func(o *oauth2test.Options) { o.Rotation = oauth2test.RotateNever })
			e.server.Inject(oauth2test.Fault{Delay: 14 * time.Second})
			go e.rewrite("z", token, true)
			synctest.Wait()
			if byStop {
				e.restart()
			} else {
				e.crash()
			}
			e.waitForIndex()
			assert.False(t, e.livesOn(token))
		})
	}
}

// The revocation's call waits for its place in the share when a write of its refresh token begins, and has it while the service verifies
// the token: the call is not made then. It is made once the write has failed.
func TestOAuthRevocationThatWaitsBesideAWrite(t *testing.T) {
	for _, fails := range []bool{true, false} {
		bubble(t, func(t *testing.T) {
			e, token := newEngineWithDeletedTenant(t)
			e.server.ClearFaults()
			begins, release := e.storage.hold("put", "calls/")
			<-begins                                                // the revocation's call has its place, and is being noted
			fault := oauth2test.Fault{Delay: time.Second, Times: 1} // shorter than the rest after another failure
			if fails {
				fault.Answer = oauth2test.Answer{Status: 500}
			}
			e.server.Inject(fault)
			var write sync.WaitGroup
			status := 0
			write.Go(func() { status = e.rewrite("z", token, true) })
			synctest.Wait()
			calls := len(e.revocations())
			release()
			synctest.Wait()
			assert.Len(t, e.revocations(), calls, "the write goes on")
			assert.Equal(t, 1, e.read("config")["pending_revocations"])
			write.Wait()
			if fails {
				assert.Equal(t, http.StatusServiceUnavailable, status)
				synctest.Wait()
				assert.False(t, e.server.RefreshTokenAlive(token), "the call is made at once")
				return
			}
			assert.Equal(t, http.StatusNoContent, status)
			e.pass(2 * time.Minute)
			assert.Len(t, e.revocations(), calls)
			assert.True(t, e.server.RefreshTokenAlive(e.held("z")))
		})
	}
}

// A refresh token is written while the call that revokes it is under way: the write waits for the end of that. So the verification shows
// whether the service has revoked the token. Where the call has failed, the token is not revoked any more.
func TestOAuthWriteWhileItsRefreshTokenIsBeingRevoked(t *testing.T) {
	for name, c := range map[string]struct {
		takes   time.Duration
		fails   bool
		verify  bool
		status  int
		waits   time.Duration
		revoked bool
	}{
		"the service revokes it":                   {300 * time.Millisecond, false, true, 400, 200 * time.Millisecond, true},
		"the call fails":                           {300 * time.Millisecond, true, true, 204, 200 * time.Millisecond, false},
		"the service revokes it; no verification":  {300 * time.Millisecond, false, false, 204, 200 * time.Millisecond, true},
		"the call fails; no verification":          {300 * time.Millisecond, true, false, 204, 200 * time.Millisecond, false},
		"the call outlasts the writer":             {9500 * time.Millisecond, false, true, 503, 9 * time.Second, true},
		"the call fails and outlasts the writer":   {9500 * time.Millisecond, true, true, 503, 9 * time.Second, true},
		"the call outlasts the writer; unverified": {9500 * time.Millisecond, false, false, 503, 9 * time.Second, true},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, oauth2test.ClassA, revokeAll)
				e.server.Set(func(o *oauth2test.Options) { o.Rotation = oauth2test.RotateNever })
				e.slowRevocations(c.takes)
				e.add("z", nil)
				token := e.held("z")
				e.ok(logical.DeleteOperation, "tenants/z", nil)
				if c.fails {
					e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointRevocation, Answer: oauth2test.BadGateway, Times: 1})
				}
				time.Sleep(100 * time.Millisecond)
				begun := time.Now()
				assert.Equal(t, c.status, e.rewrite("z", token, c.verify))
				assert.Equal(t, c.waits, time.Since(begun))
				assert.Equal(t, c.status == http.StatusNoContent, e.stored("z") != nil)
				assert.Equal(t, !c.revoked, e.livesOn(token))
				assert.Nil(t, e.read("config")["pending_revocations"])
				e.backend.revocations.mu.Lock()
				assert.Empty(t, e.backend.revocations.writes)
				e.backend.revocations.mu.Unlock()
			})
		})
	}
}

// The revocation's call waits to be noted when a write of its refresh token begins, and is noted while storage is deleting the intent for the
// write. Storage refuses that, so nothing is written: the token is revoked.
func TestOAuthRevocationBesideAWriteThatCannotSpareItsToken(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e, token := newEngineWithDeletedTenant(t)
		e.server.ClearFaults()
		noting, noted := make(chan struct{}), make(chan struct{})
		e.storage.surround(func(op, key string, do func() error) error {
			switch {
			case op == "put" && strings.HasPrefix(key, callPrefix):
				close(noting)
				<-noted
			case op == "delete" && strings.HasPrefix(key, intentPrefix):
				e.storage.heal()
				close(noted)
				time.Sleep(time.Second)
				return errStorage
			}
			return do()
		})
		<-noting
		assert.Equal(t, http.StatusInternalServerError, e.rewrite("z", token, false))
		assert.False(t, e.livesOn(token))
		assert.NotContains(t, e.storedText(), intentPrefix)
	})
}

// Storage does not list what waits for its revocation: the service is not asked, because the result could not be stored.
func TestOAuthWriteWhileRevocationsCannotBeRead(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e, token := newEngineWithDeletedTenant(t)
		e.storage.refuse("list", intentPrefix)
		e.InvalidateKey(t.Context(), intentPrefix+"default/x")
		exchanges := e.server.TotalExchanges()
		assert.GreaterOrEqual(t, e.rewrite("z", token, true), 500)
		assert.Equal(t, exchanges, e.server.TotalExchanges())
		assert.False(t, e.livesOn(token))
	})
}

// Storage does not delete the intent, or does not note the tenant's access token for revocation, when the write is to be stored: the
// write is refused, and the refresh token is revoked.
func TestOAuthWriteThatCannotSpareItsRefreshToken(t *testing.T) {
	for _, verify := range []bool{true, false} {
		bubble(t, func(t *testing.T) {
			e, token := newEngineWithDeletedTenant(t)
			e.server.Set(func(o *oauth2test.Options) { o.Rotation = oauth2test.RotateNever })
			e.storage.refuse("delete", intentPrefix)
			assert.GreaterOrEqual(t, e.rewrite("z", token, verify), 500)
			assert.Nil(t, e.stored("z"))
			assert.False(t, e.livesOn(token))
		})
	}
}

// The settings of the write do not go with those that another write has stored during the verification.
func TestOAuthWriteThatDoesNotFitLeavesTheRevocation(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e, token := newEngineWithDeletedTenant(t)
		e.server.Set(func(o *oauth2test.Options) { o.Rotation = oauth2test.RotateNever })
		e.add("z", map[string]any{"ttl": "5m"})
		e.server.Inject(oauth2test.Fault{Delay: 3 * time.Second, Times: 1})
		var write sync.WaitGroup
		write.Go(func() {
			_, status, _ := e.try(logical.UpdateOperation, "tenants/z", map[string]any{"refresh_token": token, "max_ttl": "10m"})
			assert.Equal(t, http.StatusBadRequest, status)
		})
		synctest.Wait()
		e.write("tenants/z", map[string]any{"ttl": "20m"})
		write.Wait()
		assert.Equal(t, 1, e.read("config")["pending_revocations"])
		assert.False(t, e.livesOn(token))
		assert.True(t, e.server.RefreshTokenAlive(e.held("z")))
	})
}

// A write that storage was never asked to take leaves the revocation of its refresh token pending, whatever has ended the write: a patch
// whose tenant is deleted meanwhile, a call that storage does not note, or a tenant that storage does not give.
func TestWritesThatWereNotTriedKeepTheRevocation(t *testing.T) {
	t.Run("the tenant of a patch is deleted", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			e, token := newEngineWithDeletedTenant(t)
			e.add("y", nil)
			reached, release := e.storage.hold("delete", tenantPrefix+"y")
			go e.try(logical.DeleteOperation, "tenants/y", nil)
			<-reached
			done := make(chan int)
			go func() {
				_, status, _ := e.try(logical.PatchOperation, "tenants/y", map[string]any{"refresh_token": token, "verify": false})
				done <- status
			}()
			synctest.Wait()
			release()
			assert.Equal(t, http.StatusNotFound, <-done)
			assert.False(t, e.livesOn(token), "nothing was stored")
		})
	})
	t.Run("the call is not noted", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			e, token := newEngineWithDeletedTenant(t)
			e.storage.refuse("put", "calls/")
			assert.Equal(t, 503, e.rewrite("z", token, true))
			assert.False(t, e.livesOn(token), "nothing was sent")
		})
	})
	t.Run("the intent of the access token is not stored", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			e := newOAuthEngine(t, func(o *oauth2test.Options) { oauth2test.ClassA(o); o.Rotation = oauth2test.RotateNever }, revokeAll)
			e.add("z", nil)
			e.add("y", nil)
			e.read("creds/y")
			e.waitForIndex()
			token := e.held("z")
			e.revocationFails()
			e.ok(logical.DeleteOperation, "tenants/z", nil)
			e.server.Inject(oauth2test.Fault{Delay: 3 * time.Second, Times: 1})
			done := make(chan int, 1)
			go func() { done <- e.rewrite("y", token, true) }()
			synctest.Wait()
			e.storage.refuse("put", intentPrefix)
			assert.Equal(t, 503, <-done)
			assert.False(t, e.livesOn(token))
		})
	})
	t.Run("the tenant cannot be read", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			e, token := newEngineWithDeletedTenant(t)
			e.server.Set(func(o *oauth2test.Options) { o.Rotation = oauth2test.RotateNever })
			e.server.Inject(oauth2test.Fault{Delay: 3 * time.Second, Times: 1})
			done := make(chan int, 1)
			go func() { done <- e.rewrite("z", token, true) }()
			synctest.Wait()
			e.invalidate(context.Background(), tenantPrefix+"z")
			e.storage.refuse("get", tenantPrefix)
			assert.Equal(t, 503, <-done)
			assert.False(t, e.livesOn(token))
		})
	})
}

// livesOn lets storage and the service work again, waits, and returns whether a refresh token is alive then.
func (e *oauthEngine) livesOn(token string) bool {
	e.storage.heal()
	e.server.ClearFaults()
	e.pass(2 * time.Minute)
	return e.server.RefreshTokenAlive(token)
}
