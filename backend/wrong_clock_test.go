package backend

import (
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// restartAfterAWrongClock starts the engine anew, as if the host's clock had been ten years ahead when storage took the entries below a
// prefix.
func (e *oauthEngine) restartAfterAWrongClock(prefix string) {
	e.t.Helper()
	e.stop()
	keys, err := logical.CollectKeys(e.t.Context(), logical.NewStorageView(e.storage.InmemStorage, prefix))
	require.NoError(e.t, err)
	require.Len(e.t, keys, 1)
	ahead := strings.ReplaceAll(e.get(prefix+keys[0]), `"2000-`, `"2010-`)
	e.put(prefix+keys[0], []byte(ahead))
	e.start()
}

// restartAfterAnExchangeOfAWrongClock starts the engine anew, as if the host's clock had been an hour ahead when the last exchange of the
// tenant acme was stored.
func (e *oauthEngine) restartAfterAnExchangeOfAWrongClock() {
	e.t.Helper()
	entry := *e.stored("acme")
	entry.LastExchange = time.Now().Add(time.Hour)
	require.NoError(e.t, putEntry(e.t.Context(), e.storage.InmemStorage, tenantPrefix+"acme", &entry))
	e.restart()
	e.waitForIndex()
}

// connectorIsFree says whether nothing needs the connector any more, by deleting it.
func (e *oauthEngine) connectorIsFree() bool {
	_, status, _ := e.try(logical.DeleteOperation, "config", nil)
	return status == 204
}

// An access token that was given up while the clock was wrong is tried to be revoked for as long as it lives, and a refresh token for a day.
func TestIntentOfAWrongClock(t *testing.T) {
	for name, c := range map[string]struct {
		giveUp func(*oauthEngine)
		until  time.Duration
	}{
		"an access token": {func(e *oauthEngine) {
			e.revoke(e.lease("acme"))
			e.ok(logical.DeleteOperation, "tenants/acme", nil)
		}, time.Hour},
		"an access token for one lease": {func(e *oauthEngine) {
			e.write("tenants/acme", map[string]any{"token_per_lease": true})
			e.revoke(e.lease("acme"))
			e.ok(logical.DeleteOperation, "tenants/acme", nil)
		}, time.Hour},
		"a refresh token": {func(e *oauthEngine) {
			e.write("config", map[string]any{"revoke_on_delete": true})
			e.ok(logical.DeleteOperation, "tenants/acme", nil)
		}, day},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, oauth2test.ClassA, classA)
				e.write("tenants/acme", map[string]any{"refresh_token": e.server.Grant(e.clientID, "acme"), "verify": false})
				e.waitForIndex()
				e.revocationFails()
				c.giveUp(e)
				e.restartAfterAWrongClock(intentPrefix)
				e.pass(c.until - 5*time.Minute)
				assert.Equal(t, 1, e.read("config")["pending_revocations"])
				e.pass(10 * time.Minute)
				assert.Nil(t, e.read("config")["pending_revocations"])
				assert.True(t, e.connectorIsFree())
			})
		})
	}
}

// The record of an access token that came while the clock was wrong is kept for as long as the token lives. So is the intent that the end of
// its lease makes of the record, after a restart too.
func TestRecordOfAWrongClock(t *testing.T) {
	for _, revoked := range []bool{false, true} {
		bubble(t, func(t *testing.T) {
			e := newOAuthEngine(t, oauth2test.ClassA, classA)
			e.add("acme", map[string]any{"token_per_lease": true})
			e.waitForIndex()
			e.revocationFails()
			lease := e.lease("acme")
			e.ok(logical.DeleteOperation, "tenants/acme", nil)
			e.restartAfterAWrongClock(heldPrefix)
			if revoked {
				e.revoke(lease)
			}
			e.pass(50 * time.Minute)
			if revoked {
				e.restart()
				e.pass(5 * time.Minute)
			}
			assert.False(t, e.connectorIsFree())
			e.pass(20 * time.Minute)
			assert.NotContains(t, e.storedText(), accessTokenOf(lease))
			assert.True(t, e.connectorIsFree())
		})
	}
}

// The intent of an access token that a grant has brought too late says when the token's life began, too.
func TestIntentOfAGrantSaysWhenItsTokenCame(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		e.write("config/as", map[string]any{"revocation": "access_token", "exchange_invalidates": false})
		back := e.authorize(nil)
		e.server.Inject(oauth2test.Fault{Delay: 3 * time.Second, Times: 1})
		go func() {
			time.Sleep(time.Second)
			e.ok(logical.DeleteOperation, "tenants/acme", nil)
			e.storage.refuse("delete", intentPrefix)
		}()
		e.confirm(back)
		keys, err := e.storage.List(t.Context(), intentPrefix+"as/")
		require.NoError(t, err)
		require.Len(t, keys, 1)
		i, err := getEntry[intent](t.Context(), e.storage, intentPrefix+"as/"+keys[0])
		require.NoError(t, err)
		assert.Equal(t, time.Hour, i.Expires.Add(lastMoments).Sub(i.Obtained))
	})
}

// An access token came while the clock was wrong. It is handed out for no longer than it lives from now on, and the next exchange comes
// by then.
func TestAccessTokenOfAWrongClock(t *testing.T) {
	for class, newEngine := range map[string]func(t *testing.T) *oauthEngine{
		"A": func(t *testing.T) *oauthEngine { return newOAuthEngine(t, oauth2test.ClassA, classA) },
		"D": func(t *testing.T) *oauthEngine { return newOAuthEngine(t, oauth2test.ClassD, classD) },
	} {
		t.Run(class, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newEngine(t)
				e.add("acme", nil)
				e.read("token/acme")
				e.restartAfterAWrongClock(tenantPrefix)
				before := e.server.Exchanges("acme")
				lease := e.lease("acme")
				assert.Equal(t, before, e.server.Exchanges("acme"))
				assert.LessOrEqual(t, lease.Secret.MaxTTL, time.Hour)
				e.pass(61 * time.Minute)
				assert.NotEqual(t, accessTokenOf(lease), accessTokenOf(e.lease("acme")))
				e.kept()
			})
		})
	}
}

// The host's clock was an hour ahead when the last exchange was stored, and is right now. Storage does not take the next exchange at first,
// so memory keeps it. Readers get what it has brought once storage works, not the token that it has ended.
func TestKeptTokenAfterAWrongClock(t *testing.T) {
	for name, options := range map[string]func(*oauth2test.Options){
		"rotating": oauth2test.ClassD,
		"the same": func(o *oauth2test.Options) { oauth2test.ClassD(o); o.Rotation = oauth2test.RotateNever },
	} {
		t.Run(name, func(t *testing.T) { keptTokenAfterAWrongClock(t, options) })
	}
}

func keptTokenAfterAWrongClock(t *testing.T, options func(*oauth2test.Options)) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, options, classD)
		e.add("acme", nil)
		e.read("token/acme")
		e.restartAfterAnExchangeOfAWrongClock()
		time.Sleep(time.Minute)
		e.storage.failWith(func(op, key string) error {
			if op == "put" && strings.HasPrefix(key, tenantPrefix) {
				return errStorage
			}
			return nil
		})
		_, status, text := e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
		require.Equal(t, http.StatusServiceUnavailable, status, text)
		e.storage.heal()
		time.Sleep(time.Second)
		token := e.read("token/acme")["access_token"].(string)
		assert.True(t, e.server.Alive(token), "a reader gets a token that the exchange has ended")
		e.pass(3 * time.Minute)
		token = e.read("token/acme")["access_token"].(string)
		assert.True(t, e.server.Alive(token), "a reader gets a token that the exchange has ended, after three minutes")
		assert.Len(t, e.server.Calls(oauth2test.EndpointToken), 2)
	})
}

// As above, and storage works: the tenant's entry is read again while the exchange is under way.
func TestExchangeAfterAWrongClockIsReadAgain(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, func(o *oauth2test.Options) { oauth2test.ClassD(o); o.Rotation = oauth2test.RotateNever }, classD)
		e.add("acme", nil)
		e.read("token/acme")
		e.restartAfterAnExchangeOfAWrongClock()
		e.read("tenants/acme")
		time.Sleep(time.Minute)
		var held atomic.Bool
		e.storage.surround(func(op, key string, do func() error) error {
			switch {
			case op == "put" && strings.HasPrefix(key, callPrefix):
				e.tenants.invalidate("acme")
			case op == "get" && key == tenantPrefix+"acme" && held.CompareAndSwap(false, true):
				time.Sleep(time.Second)
			}
			return do()
		})
		_, status, text := e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
		assert.Less(t, status, 300, text)
		assert.True(t, e.server.Alive(e.read("token/acme")["access_token"].(string)))
		assert.Len(t, e.server.Calls(oauth2test.EndpointToken), 2)
	})
}

// The host's clock was ten minutes ahead when this process stored the tenant's last exchange, and has been set right since. The next exchange
// is stored and handed out. (The bubble's clock cannot be set back: memory is made as it is then.)
func TestClockIsSetBackWhileTheProcessRuns(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		e.read("token/acme")
		entry := *e.stored("acme")
		ahead := time.Now().Add(10 * time.Minute)
		entry.LastExchange = ahead
		require.NoError(t, putEntry(t.Context(), e.storage.InmemStorage, tenantPrefix+"acme", &entry))
		record := e.tenants.named("acme")
		v := record.view.Load()
		require.NotNil(t, v.entry)
		v.entry.LastExchange = ahead
		calls := len(e.server.Calls(oauth2test.EndpointToken))
		_, status, text := e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
		assert.Less(t, status, 300, text)
		assert.Equal(t, 1, len(e.server.Calls(oauth2test.EndpointToken))-calls, "exchanges for one refresh")
		_, status, text = e.try(logical.ReadOperation, "creds/acme", nil)
		assert.Equal(t, 200, status, text)
	})
}

// An access token came while the clock was a year ahead. Its life begins when storage is first read with the right clock, and does not begin
// anew when its tenant has left memory, or with another restart.
func TestLifeOfAWrongClockBeginsOnce(t *testing.T) {
	for class, fields := range map[string]map[string]any{"A": classA, "D": classD} {
		t.Run(class, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newOAuthEngine(t, oauth2test.ClassA, fields)
				e.add("acme", nil)
				e.read("token/acme")
				entry := *e.stored("acme")
				access := *entry.Access
				for _, at := range []*time.Time{&access.Obtained, &access.Expires, &access.Planned} {
					if !at.IsZero() {
						*at = at.Add(365 * day)
					}
				}
				entry.Access = &access
				require.NoError(t, putEntry(t.Context(), e.storage.InmemStorage, tenantPrefix+"acme", &entry))
				e.restart()
				expires := e.read("token/acme")["expire_time"]
				for _, leave := range []func(){e.tenants.loaded.Purge, e.restart} {
					time.Sleep(10 * time.Minute)
					leave()
					assert.Equal(t, expires, e.read("token/acme")["expire_time"])
				}
			})
		})
	}
}
