package backend

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// What a service has sent is kept in memory, because storage has not taken it, and a write or a delete of the tenant fails: the access
// token that was given up for that is handed out to nobody, also after a restart. The refresh token is stored.
func TestWriteFailsWhileTokensAreKept(t *testing.T) {
	for cause, exchange := range map[string]func(*oauthEngine) int{
		"read": func(e *oauthEngine) int {
			_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
			return status
		},
		"refresh": func(e *oauthEngine) int {
			_, status, _ := e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
			return status
		},
	} {
		for name, op := range map[string]func(*oauthEngine) int{
			"verified write":   func(e *oauthEngine) int { return e.rewrite("acme", e.server.Grant(e.clientID, "other"), true) },
			"unverified write": func(e *oauthEngine) int { return e.rewrite("acme", e.server.Grant(e.clientID, "other"), false) },
			"delete": func(e *oauthEngine) int {
				_, status, _ := e.try(logical.DeleteOperation, "tenants/acme", nil)
				return status
			},
		} {
			for _, unheard := range []bool{true, false} {
				for _, restarts := range []bool{true, false} {
					t.Run(fmt.Sprintf("%s, %s, unheard: %t, restarts: %t", cause, name, unheard, restarts), func(t *testing.T) {
						bubble(t, func(t *testing.T) {
							e := newOAuthEngine(t, oauth2test.ClassA, classA)
							e.server.Set(func(o *oauth2test.Options) { o.Rotation = oauth2test.RotateNever })
							e.add("acme", nil)
							e.waitForIndex()
							if unheard {
								e.storage.unheard("put", tenantPrefix)
							} else {
								e.storage.refuse("put", tenantPrefix)
							}
							require.Equal(t, http.StatusServiceUnavailable, exchange(e))
							e.storage.heal()
							e.storage.failWith(func(op, key string) error {
								if isWrite(op) && strings.HasPrefix(key, tenantPrefix) {
									return errStorage
								}
								return nil
							})
							require.GreaterOrEqual(t, op(e), 500)
							e.storage.heal()
							time.Sleep(2 * time.Minute)
							if restarts {
								e.crash()
							}
							assert.True(t, e.server.Alive(e.read("token/acme")["access_token"].(string)))
							assert.True(t, e.server.Alive(accessTokenOf(e.lease("acme"))))
							e.kept()
						})
					})
				}
			}
		}
	}
}

// Storage hangs until two requests have held up the answer of an exchange for 30 seconds: memory keeps that answer while the second
// request changes the tenant in storage.

// hang makes each write of a tenant wait until the engine gives it up, or release is called.
func (s *storage) hang() (release func()) {
	released := make(chan struct{})
	s.surround(func(op, key string, do func() error) error {
		if isWrite(op) && strings.HasPrefix(key, tenantPrefix) {
			select {
			case <-released:
			case <-time.After(storeWithin):
				return context.DeadlineExceeded
			}
		}
		return do()
	})
	return func() { close(released) }
}

// keepsDuring has the service answer exchange, which is the first request of acme, while storage hangs. Memory keeps that answer during
// the operation, which storage then takes.
func (e *oauthEngine) keepsDuring(exchange func(), op logical.Operation, data map[string]any) {
	e.t.Helper()
	e.server.Inject(oauth2test.Fault{Delay: 25 * time.Second, Times: 1})
	go exchange()
	synctest.Wait()
	release := e.storage.hang()
	go func() { _, _, _ = e.try(logical.PatchOperation, "tenants/acme", map[string]any{"min_ttl": "1m"}) }()
	time.Sleep(24 * time.Second)
	done := make(chan int)
	go func() {
		_, status, _ := e.try(op, "tenants/acme", data)
		done <- status
	}()
	time.Sleep(storeWithin + time.Second)
	synctest.Wait()
	release()
	require.Equal(e.t, 204, <-done)
	e.pass(2 * time.Minute)
}

var slowly = map[string]any{"revocation": "access_token", "exchange_invalidates": false, "request_timeout": "60s"}

func TestTokensAreKeptWhileSettingsAreStored(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, slowly)
		e.add("acme", nil)
		e.keepsDuring(func() { _, _, _ = e.try(logical.ReadOperation, "creds/acme", nil) }, logical.PatchOperation, map[string]any{"ttl": "2h"})
		assert.Equal(t, e.server.CurrentRefreshToken("acme"), e.stored("acme").RefreshToken)
		assert.Equal(t, 2*time.Hour, e.stored("acme").TTL)
		e.read("creds/acme")
		e.kept()
	})
}

// The access token that comes for a tenant which is being deleted is revoked.
func TestTokensAreKeptDuringADelete(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, slowly)
		e.add("acme", nil)
		e.keepsDuring(func() { _, _, _ = e.try(logical.ReadOperation, "creds/acme", nil) }, logical.DeleteOperation, nil)
		assert.Empty(t, e.server.AccessTokens("acme"))
		assert.Nil(t, e.tenants.named("acme"))
	})
}

// A verified write that brought no new refresh token is not kept: its access token is revoked, and the tenant works on as it was.
func TestWriteIsVerifiedWhileSettingsAreStored(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, func(o *oauth2test.Options) { oauth2test.ClassA(o); o.Rotation = oauth2test.RotateNever }, slowly)
		e.add("acme", nil)
		token := e.held("acme")
		e.keepsDuring(func() {
			_, _, _ = e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": e.server.Grant(e.clientID, "acme"), "ttl": "2h"})
		}, logical.PatchOperation, map[string]any{"max_ttl": "1h"})
		assert.Equal(t, token, e.stored("acme").RefreshToken)
		assert.Empty(t, e.server.AccessTokens("acme"))
		e.read("creds/acme")
		e.kept()
	})
}
