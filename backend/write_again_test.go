package backend

import (
	"context"
	"fmt"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// A client repeats a write of a refresh token while its verification is under way, or after that, as Vault's API client does after a 503.
// The service replaces refresh tokens, and ends a grant if a replaced one is sent again: the second write does not send it, and is stored.
func TestTheSameWriteAgain(t *testing.T) {
	for name, c := range map[string]struct {
		delay  time.Duration // of the verification
		again  time.Duration // after which the write comes again
		hangUp bool          // whether the first writer goes away before
	}{
		"at the same time":                 {delay: 3 * time.Second, again: time.Second},
		"after the engine's own 503":       {delay: answerWithin + 2*time.Second, again: answerWithin + time.Second},
		"after the 503, once it is stored": {delay: answerWithin + 500*time.Millisecond, again: answerWithin + time.Second},
		"after the writer's own patience":  {delay: 5 * time.Second, again: 3 * time.Second, hangUp: true},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, oauth2test.ClassA, classA)
				write := map[string]any{"refresh_token": e.server.Grant(e.clientID, "acme"), "ttl": "9m"}
				e.server.Inject(oauth2test.Fault{Delay: c.delay, Times: 1})
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				go func() { _, _, _ = e.tryContext(ctx, logical.CreateOperation, "tenants/acme", write) }()
				time.Sleep(c.again)
				if c.hangUp {
					cancel()
				}
				_, status, text := e.try(logical.UpdateOperation, "tenants/acme", write)
				assert.Less(t, status, 300, text)
				time.Sleep(time.Minute)
				synctest.Wait()
				assert.Empty(t, e.server.LostGrants())
				assert.Equal(t, statusOK, e.status("acme"))
				e.write("tenants/acme/refresh", nil)
			})
		})
	}
}

// A refresh token is written a second time, after the service has replaced it or while it does: the write stands for the refresh token
// that has come from it, verified or not, alone or with other fields, also after a restart. The service never sees the replaced one.
func TestRefreshTokenIsWrittenAgain(t *testing.T) {
	for name, between := range map[string]func(*oauthEngine){
		"after an exchange": func(e *oauthEngine) { e.write("tenants/acme/refresh", nil) },
		"after a restart": func(e *oauthEngine) {
			e.write("tenants/acme/refresh", nil)
			e.restart()
		},
		"during an exchange": func(e *oauthEngine) {
			e.server.Inject(oauth2test.Fault{Delay: 2 * time.Second, Times: 1})
			go e.try(logical.ReadOperation, "creds/acme", nil)
			synctest.Wait()
		},
		"while an exchange is stored": func(e *oauthEngine) {
			reached, release := e.storage.hold("put", tenantPrefix)
			go e.try(logical.ReadOperation, "creds/acme", nil)
			<-reached
			go func() {
				time.Sleep(time.Second)
				release()
			}()
		},
		"while the result is kept": func(e *oauthEngine) {
			e.failPuts()
			_, _, _ = e.try(logical.ReadOperation, "creds/acme", nil)
			e.storage.heal()
		},
	} {
		for _, verify := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, verify=%v", name, verify), func(t *testing.T) {
				bubble(t, func(t *testing.T) {
					e := newOAuthEngine(t, oauth2test.ClassA, classA)
					e.write("config/hr", map[string]any{"service": "oauth2", "token_url": e.server.TokenURL(), "connector_id": e.clientID, "connector_secret": e.secret})
					written := e.server.Grant(e.clientID, "acme")
					e.write("tenants/acme", map[string]any{"refresh_token": written, "verify": false})
					between(e)
					e.write("tenants/acme", map[string]any{"refresh_token": written, "verify": verify, "ttl": "9m"})
					time.Sleep(time.Minute)
					e.write("tenants/acme", map[string]any{"refresh_token": written, "verify": verify, "connector": "hr"})
					shown := e.read("tenants/acme")
					assert.EqualValues(t, 9*60, shown["ttl"])
					assert.Equal(t, "hr", shown["connector"])
					e.read("creds/acme")
					e.write("tenants/acme/refresh", nil)
					assert.Empty(t, e.server.LostGrants())
					assert.Zero(t, e.server.UsedTwice())
					assert.Equal(t, statusOK, e.status("acme"))
				})
			})
		}
	}
}

// A refresh token that is written again is sent to the service where the service refuses the present one, and where the tenant has got
// another one meanwhile.
func TestRefreshTokenIsWrittenAgainAfterAnother(t *testing.T) {
	for name, between := range map[string]func(*oauthEngine){
		"the present one is refused": func(e *oauthEngine) {
			e.server.Inject(oauth2test.Fault{Answer: oauth2test.InvalidGrant, Times: 1})
			_, status, _ := e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
			require.Equal(e.t, http.StatusBadRequest, status)
			require.Equal(e.t, statusRejected, e.status("acme"))
		},
		"another one is written": func(e *oauthEngine) { e.rewrite("acme", e.server.Grant(e.clientID, "other"), true) },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, func(o *oauth2test.Options) { o.Grace = time.Hour }, classB)
				written := e.server.Grant(e.clientID, "acme")
				e.rewrite("acme", written, true)
				between(e)
				uses := e.server.GraceUses()
				e.rewrite("acme", written, true)
				assert.Equal(t, uses+1, e.server.GraceUses())
				assert.Equal(t, statusOK, e.status("acme"))
			})
		})
	}
}

// A refresh token that is written again gives up the access token as every write of a refresh token does, although the tenant keeps the
// one that has come from it.
func TestRefreshTokenIsWrittenAgainGivesUpTheAccessToken(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		written := e.server.Grant(e.clientID, "acme")
		e.rewrite("acme", written, false)
		for _, verify := range []bool{true, false} {
			token := accessTokenOf(e.lease("acme"))
			e.rewrite("acme", written, verify)
			synctest.Wait()
			assert.False(t, e.server.Alive(token), "verify=%v", verify)
			assert.NotEqual(t, token, accessTokenOf(e.lease("acme")), "verify=%v", verify)
		}
		assert.Empty(t, e.server.LostGrants())
	})
}

// A refresh token that the service has not replaced is written again: that is a write as the first was.
func TestRefreshTokenThatWasNotReplacedIsWrittenAgain(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, func(o *oauth2test.Options) { o.Rotation = oauth2test.RotateNever }, classB)
		written := e.server.Grant(e.clientID, "acme")
		e.rewrite("acme", written, true)
		first := e.read("tenants/acme")["refresh_token_set_time"]
		time.Sleep(time.Hour)
		e.rewrite("acme", written, true)
		assert.NotEqual(t, first, e.read("tenants/acme")["refresh_token_set_time"])
	})
}

// The service replaces the refresh token once more while the write waits: the end that the tenant shows is that of the newest one.
func TestRefreshTokenIsWrittenAgainDuringARotation(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, func(o *oauth2test.Options) {
			o.RefreshTokenJWT, o.RefreshTokenLife, o.ReuseKillsFamily = true, 30*day, true
		}, classB)
		written := e.server.Grant(e.clientID, "acme")
		e.rewrite("acme", written, true)
		time.Sleep(day)
		reached, release := e.storage.hold("put", tenantPrefix)
		go e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
		<-reached
		go e.rewrite("acme", written, false)
		synctest.Wait()
		release()
		synctest.Wait()
		assert.WithinDuration(t, time.Now().Add(30*day), e.stored("acme").Facts.Expires, time.Minute)
		assert.Empty(t, e.server.LostGrants())
	})
}
