package backend

import (
	"context"
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

// A reader of a token for one lease hangs up during the exchange, or storage fails to take the token's record: the token is revoked once,
// also if the next exchange fails at first.
func TestOAuthTokenWithoutItsLeaseIsRevokedOnce(t *testing.T) {
	for name, read := range map[string]func(*oauthEngine){
		"the reader hangs up": (*oauthEngine).hangUp,
		"storage fails": func(e *oauthEngine) {
			e.storage.refuse("put", heldPrefix)
			_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
			assert.Equal(e.t, http.StatusServiceUnavailable, status)
			e.storage.heal()
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, oauth2test.ClassA, classA)
				e.add("acme", map[string]any{"token_per_lease": true})
				e.waitForIndex()
				read(e)
				synctest.Wait()
				assert.Len(t, e.revocations(), 1)
				assert.Empty(t, e.server.AccessTokens("acme"))
				e.server.Inject(oauth2test.Fault{Answer: oauth2test.Answer{Status: 500}, Times: 1})
				_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
				assert.Equal(t, http.StatusServiceUnavailable, status)
				e.pass(2 * time.Minute)
				lease := e.lease("acme")
				e.pass(2 * time.Minute)
				assert.Len(t, e.revocations(), 1)
				assert.True(t, e.server.Alive(accessTokenOf(lease)))
				e.revoke(lease)
				e.lease("acme")
				assert.Len(t, e.revocations(), 2)
				e.kept()
			})
		})
	}
}

// The reader hangs up and storage does not take the token's intent either: the next exchange has the token revoked.
func TestOAuthTokenWithoutItsLeaseAndItsIntent(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", map[string]any{"token_per_lease": true})
		e.waitForIndex()
		e.storage.refuse("put", intentPrefix)
		e.hangUp()
		assert.Empty(t, e.revocations())
		e.storage.heal()
		lease := e.lease("acme")
		synctest.Wait()
		assert.Equal(t, []string{accessTokenOf(lease)}, e.server.AccessTokens("acme"))
		assert.Len(t, e.revocations(), 1)
	})
}

// Storage takes neither the record of a token for one lease nor the token's intent. Once storage works again the token is revoked, although
// no reader comes.
func TestOAuthTokenWithoutItsRecordAndItsIntent(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", map[string]any{"token_per_lease": true})
		e.waitForIndex()
		e.storage.failWith(func(op, key string) error {
			if op == "put" && (strings.HasPrefix(key, heldPrefix) || strings.HasPrefix(key, intentPrefix)) {
				return errStorage
			}
			return nil
		})
		_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
		require.Equal(t, http.StatusServiceUnavailable, status)
		e.storage.heal()
		e.pass(2 * time.Minute)
		assert.Empty(t, e.server.AccessTokens("acme"))
		assert.Len(t, e.revocations(), 1)
	})
}

// The process ends before it has stored the record of a token for one lease. The tenant is deleted, or written anew, before the next
// process has read it: the token is revoked.
func TestOAuthTokenWithoutItsLeaseAndItsTenant(t *testing.T) {
	for name, end := range map[string]func(*oauthEngine){
		"deleted": func(e *oauthEngine) { e.ok(logical.DeleteOperation, "tenants/acme", nil) },
		"written": func(e *oauthEngine) { e.add("acme", nil) },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, oauth2test.ClassA, classA)
				e.add("acme", map[string]any{"token_per_lease": true})
				e.waitForIndex()
				reached, release := e.storage.hold("put", heldPrefix)
				go func() { _, _, _ = e.try(logical.ReadOperation, "creds/acme", nil) }()
				<-reached
				defer release() // the process that has died stores nothing any more
				require.Len(t, e.server.AccessTokens("acme"), 1)
				next := &storage{InmemStorage: e.storage.InmemStorage}
				next.refuse("list", tenantPrefix)
				e.crashOnto(next)
				end(e)
				synctest.Wait()
				assert.Empty(t, e.server.AccessTokens("acme"))
			})
		})
	}
}

// Leases are revoked in another order than they were given: each token is revoked once.
func TestOAuthTokensOfLeasesAreRevokedOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", map[string]any{"token_per_lease": true})
		one, other := e.lease("acme"), e.lease("acme")
		e.revoke(other, one)
		e.lease("acme")
		synctest.Wait()
		assert.Len(t, e.revocations(), 2)
	})
}

// hangUp reads a lease of acme, and hangs up before the service answers.
func (e *oauthEngine) hangUp() {
	ctx, cancel := context.WithCancel(e.t.Context())
	e.server.Inject(oauth2test.Fault{Delay: 2 * time.Second, Times: 1})
	go func() { _, _ = e.do(ctx, logical.ReadOperation, "creds/acme", nil) }()
	time.Sleep(time.Second)
	cancel()
	time.Sleep(2 * time.Second)
}
