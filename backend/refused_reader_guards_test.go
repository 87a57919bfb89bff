package backend

import (
	"net/http"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/kaizala/kaizalatest"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// The service refuses the connector. A reader of another tenant is told that, and no exchange of his tenant has failed: its status stays,
// and no exchange of it is made later without a reader, whether it has an old access token or none.
func TestReaderAtARefusedConnectorFailsNoTenant(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		for _, name := range []string{"probe", "old", "none"} {
			e.addTenant(name)
		}
		e.read("token/old")
		e.index.stop() // no renewal
		time.Sleep(25 * time.Hour)
		e.restart()
		e.waitForIndex()
		e.kaizala.SetConnectorSecret(e.connectorID, "another")
		_, status, _ := e.try(logical.ReadOperation, "creds/probe", nil)
		require.Equal(t, http.StatusBadRequest, status)
		before := map[string]string{"old": e.status("old"), "none": e.status("none")}
		for name := range before {
			_, status, _ := e.try(logical.ReadOperation, "creds/"+name, nil)
			require.Equal(t, http.StatusBadRequest, status)
			assert.Equal(t, before[name], e.status(name))
		}
		e.kaizala.SetConnectorSecret(e.connectorID, e.secret)
		e.pass(time.Hour)
		assert.Equal(t, 1, e.kaizala.Exchanges("old"))
		assert.Zero(t, e.kaizala.Exchanges("none"))
	})
}

// An exchange fails where that ends no access token. The next reader makes none before the backoff is over, also if there is an old
// access token that is not usable any more.
func TestReaderRespectsTheBackoffBesideAnOldToken(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		e.read("token/acme")
		e.index.stop()
		time.Sleep(time.Until(e.stored("acme").Access.Expires.Add(-5 * time.Minute)))
		e.kaizala.Inject(kaizalatest.Fault{Status: 502})
		for range 3 {
			_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
			assert.Equal(t, http.StatusServiceUnavailable, status)
		}
		assert.Equal(t, 2, e.kaizala.CallCount())
	})
}

// The same where an exchange ends access tokens, and the old one has ended by itself.
func TestReaderRespectsTheBackoffBesideATokenThatHasEnded(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassD, classD)
		e.add("acme", nil)
		e.read("token/acme")
		e.index.stop()
		time.Sleep(61 * time.Minute)
		e.server.Inject(oauth2test.Fault{Answer: oauth2test.BadGateway})
		for range 3 {
			_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
			assert.Equal(t, http.StatusServiceUnavailable, status)
		}
		assert.Len(t, e.server.Calls(), 2)
	})
}

// The service permits no exchange for longer than the access token lives. Readers get the token, and no lease on it is longer than that.
func TestLeaseEndsWithItsTokenDuringALongPause(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassD, classD)
		e.add("acme", nil)
		e.lease("acme")
		expires := e.stored("acme").Access.Expires
		e.server.Inject(oauth2test.Fault{Answer: oauth2test.TooManyRequests(3 * time.Hour)})
		given := 0
		for time.Now().Before(expires) {
			time.Sleep(10 * time.Second)
			resp, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
			if status != http.StatusOK {
				continue
			}
			given++
			assert.False(t, time.Now().Add(resp.Secret.MaxTTL).After(expires), "at %s", time.Now())
		}
		assert.Greater(t, given, 260)
	})
}

// The refresh token has expired. A reader is told that, and not that the service refuses it.
func TestReaderIsToldThatTheRefreshTokenHasExpired(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.kaizala.SetRefreshTokenLife(10 * day)
		e.addTenant("acme")
		e.stop()
		time.Sleep(10 * day)
		e.start()
		_, status, text := e.try(logical.ReadOperation, "creds/acme", nil)
		assert.Equal(t, http.StatusBadRequest, status)
		assert.Contains(t, text, "expired at 2000-01-11")
		assert.Zero(t, e.kaizala.CallCount())
	})
}

// Storage becomes read-only, because this node is no more the active one. That is no failed exchange.
func TestReadOnlyStorageIsNoFailedExchange(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		before := e.status("acme")
		e.storage.failWith(func(op, _ string) error {
			if op == "put" {
				return logical.ErrReadOnly
			}
			return nil
		})
		_, err := e.do(t.Context(), logical.ReadOperation, "creds/acme", nil)
		require.ErrorIs(t, err, logical.ErrReadOnly)
		e.storage.heal()
		assert.Equal(t, before, e.status("acme"))
		assert.Zero(t, e.log.count("an exchange failed"))
	})
}

// An exchange that gets no place in the share tells nothing about where the service has moved the tenant: the move stays remembered.
func TestMoveIsRememberedAfterARefusalOfTheShare(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenants(2)
		e.kaizala.MoveUser("t0", "https://moved.kaiza.la/v1/accessToken")
		e.read("creds/t0")
		moved := e.stored("t0").Move
		require.NotNil(t, moved)
		time.Sleep(2 * time.Minute)
		e.setShare(1)
		e.write("tenants/t1/refresh", nil)
		_, status, _ := e.try(logical.UpdateOperation, "tenants/t0/refresh", nil)
		require.Equal(t, http.StatusTooManyRequests, status)
		assert.Equal(t, moved, e.stored("t0").Move)
	})
}
