package backend

import (
	"net/http"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// An access token with exactly min_ttl left is usable: a read of creds gets it, and causes no exchange.
func TestTokenWithExactlyMinTTLLeft(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		token := accessTokenOf(e.lease("acme"))
		e.index.stop() // no renewal ahead
		time.Sleep(time.Until(e.stored("acme").Access.Expires.Add(-15 * time.Minute)))
		assert.Equal(t, token, accessTokenOf(e.lease("acme")))
		time.Sleep(time.Millisecond)
		assert.NotEqual(t, token, accessTokenOf(e.lease("acme")))
	})
}

// An access token lives so shortly that an exchange which ends it is planned within a second. The reader who has waited for it gets it.
func TestReaderGetsAShortTokenThatHeHasWaitedFor(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, func(o *oauth2test.Options) { oauth2test.ClassD(o); o.AccessTokenLife = 6 * time.Second }, nil)
		e.add("acme", nil)
		e.server.Inject(oauth2test.Fault{Delay: 10 * time.Millisecond})
		lease := e.lease("acme")
		assert.True(t, e.server.Alive(accessTokenOf(lease)))
		assert.Equal(t, 1, e.server.Exchanges("acme"))
	})
}

// Storage does not take what came of an exchange that has ended the access token: no reader gets that token any more, while its life by
// the clock lasts.
func TestEndedTokenIsNotHandedOutWhileTheNextOneIsUnstored(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassD, nil)
		e.add("acme", nil)
		old := accessTokenOf(e.lease("acme"))
		e.failPuts()
		_, status, _ := e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
		require.Equal(t, http.StatusServiceUnavailable, status)
		require.False(t, e.server.Alive(old))
		for range 3 {
			for _, path := range []string{"creds/acme", "token/acme"} {
				_, status, text := e.try(logical.ReadOperation, path, nil)
				assert.Equal(t, http.StatusServiceUnavailable, status, text)
			}
			time.Sleep(20 * time.Second)
		}
		e.storage.heal()
		e.pass(2 * time.Minute)
		assert.True(t, e.server.Alive(accessTokenOf(e.lease("acme"))))
	})
}

// A reader waits for a planned exchange only if leases on a good access token last until then. Otherwise the exchange is made at once.
func TestReaderDoesNotWaitWithoutReason(t *testing.T) {
	for name, c := range map[string]struct {
		class map[string]any
		life  time.Duration
		until func(*oauthEngine) time.Time // when the reader comes
		first func(*oauthEngine, *logical.Response)
	}{
		"an exchange does not end the token": {
			class: classB, life: 10 * time.Second,
			until: func(*oauthEngine) time.Time { return time.Now().Add(7500 * time.Millisecond) },
			first: func(*oauthEngine, *logical.Response) {},
		},
		"the token is given up": {
			class: classD, life: time.Hour,
			until: func(e *oauthEngine) time.Time { return e.stored("acme").Access.Planned.Add(-8 * time.Second) },
			first: func(e *oauthEngine, lease *logical.Response) {
				e.failPuts()
				require.Error(e.t, e.revokeLease(lease))
				e.storage.heal()
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, func(o *oauth2test.Options) { oauth2test.ClassD(o); o.AccessTokenLife = c.life }, c.class)
				e.add("acme", map[string]any{"min_ttl": 0})
				lease := e.lease("acme")
				e.index.stop()
				time.Sleep(time.Until(c.until(e)))
				c.first(e, lease)
				begun := time.Now()
				assert.NotEqual(t, accessTokenOf(lease), accessTokenOf(e.lease("acme")))
				assert.Zero(t, time.Since(begun))
			})
		})
	}
}

// A request with a bad name says what a good one is, also beside a min_ttl.
func TestBadNameBesideMinTTL(t *testing.T) {
	e := newConfiguredEngine(t)
	for _, path := range []string{"creds/a..b", "token/a..b"} {
		_, status, text := e.try(logical.ReadOperation, path, map[string]any{"min_ttl": "1m"})
		assert.Equal(t, http.StatusBadRequest, status)
		assert.Contains(t, text, nameRule)
	}
}

// The last exchange of a tenant with token_per_lease has failed, and the next one succeeds: the reader gets its access token.
func TestOwnTokenAfterAFailure(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", map[string]any{"token_per_lease": true})
		e.server.Inject(oauth2test.Fault{Answer: oauth2test.BadGateway, Times: 1})
		_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
		require.Equal(t, http.StatusServiceUnavailable, status)
		e.index.stop() // no exchange without a reader
		time.Sleep(time.Minute)
		resp := e.ok(logical.ReadOperation, "creds/acme", nil)
		assert.True(t, e.server.Alive(accessTokenOf(resp)))
		assert.Empty(t, resp.Warnings)
	})
}

// The same with a shared access token: the warning that readers of the shared token get is not for the reader whose own exchange has
// succeeded.
func TestOwnTokenBringsNoWarningOfTheSharedOne(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", map[string]any{"token_per_lease": true})
		e.read("token/acme")
		e.server.Inject(oauth2test.Fault{Answer: oauth2test.BadGateway, Times: 1})
		_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
		require.Equal(t, http.StatusServiceUnavailable, status)
		e.index.stop()
		time.Sleep(time.Minute)
		resp := e.ok(logical.ReadOperation, "creds/acme", nil)
		assert.Empty(t, resp.Warnings)
	})
}

// A reader gets an access token that could not be renewed. The warning says when that token ends, unless the answer to an exchange that
// ends older access tokens was lost.
func TestWarningOfARenewalThatFailed(t *testing.T) {
	for name, c := range map[string]struct {
		class map[string]any
		fault oauth2test.Fault
	}{
		"an exchange ends the token, and has failed":     {classD, oauth2test.Fault{Answer: oauth2test.BadGateway}},
		"an exchange ends no token, its answer was lost": {classB, oauth2test.Fault{Reset: true}},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, oauth2test.ClassA, c.class)
				e.add("acme", nil)
				e.read("token/acme")
				e.server.Inject(c.fault)
				_, status, _ := e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
				require.Equal(t, http.StatusServiceUnavailable, status)
				resp := e.ok(logical.ReadOperation, "token/acme", nil)
				require.Len(t, resp.Warnings, 1)
				assert.Contains(t, resp.Warnings[0], "and this one ends at ")
			})
		})
	}
}
