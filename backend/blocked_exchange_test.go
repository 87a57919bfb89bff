package backend

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// dayD is a service where an exchange ends older access tokens, and an access token lives for a day.
func dayD(o *oauth2test.Options) { oauth2test.ClassD(o); o.AccessTokenLife = day }

// The service refuses the connector at the planned exchange. Readers go on getting the access token, with a warning, also after a restart.
func TestOAuthReadersWhileTheConnectorIsRefused(t *testing.T) {
	for name, restarts := range map[string]bool{"restart": true, "no restart": false} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, dayD, nil)
				e.add("acme", nil)
				first := accessTokenOf(e.lease("acme"))
				a := e.stored("acme").Access
				e.server.NewClientSecret(e.clientID)
				time.Sleep(time.Until(a.Planned.Add(time.Second)))
				synctest.Wait()
				require.Equal(t, first, accessTokenOf(e.lease("acme")))
				if restarts {
					e.restart()
					e.waitForIndex()
				}
				for time.Until(a.Expires) > 20*time.Minute {
					e.pass(time.Minute)
					resp, status, text := e.try(logical.ReadOperation, "creds/acme", nil)
					require.Equal(t, 200, status, "%s before the end: %s", time.Until(a.Expires), text)
					require.Equal(t, first, accessTokenOf(resp))
					require.NotEmpty(t, resp.Warnings)
				}
				require.True(t, e.server.Alive(first))
			})
		})
	}
}

// The service refuses the connector already when a tenant's planned exchange comes near.
func TestOAuthReadersNearThePlannedExchangeOfARefusedConnector(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, dayD, nil)
		e.add("acme", nil)
		e.add("other", nil)
		first := accessTokenOf(e.lease("acme"))
		a := e.stored("acme").Access
		time.Sleep(time.Until(a.Planned.Add(-30 * time.Second)))
		e.server.Inject(oauth2test.Fault{Answer: oauth2test.InvalidClient})
		_, status, _ := e.try(logical.ReadOperation, "creds/other", nil)
		require.Equal(t, 400, status)
		for range 400 {
			time.Sleep(100 * time.Millisecond)
			_, status, text := e.try(logical.ReadOperation, "creds/acme", nil)
			assert.Equal(t, 200, status, "%s before the planned exchange: %s", time.Until(a.Planned), text)
		}
		require.True(t, e.server.Alive(first))
	})
}

// sharedTokenClasses are servers where an exchange leaves older access tokens alone, and where it ends them, with their connectors' fields.
var sharedTokenClasses = map[string]struct {
	server func(*oauth2test.Options)
	fields map[string]any
}{"A": {oauth2test.ClassA, classA}, "D": {oauth2test.ClassD, classD}}

// The refresh token ends while exchanges fail. No exchange ends the access token any more: readers get it to its own end.
func TestOAuthReadersAfterTheEndOfTheRefreshToken(t *testing.T) {
	for name, class := range sharedTokenClasses {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, func(o *oauth2test.Options) {
					class.server(o)
					o.AccessTokenLife = 8 * time.Hour
					o.RefreshTokenLife = 2 * time.Hour
					o.RefreshTokenLifeField = "refresh_token_expires_in"
				}, class.fields)
				e.add("acme", nil)
				first := accessTokenOf(e.lease("acme"))
				e.server.Inject(oauth2test.Fault{Answer: oauth2test.Answer{Status: 500}})
				e.pass(3 * time.Hour)
				require.True(t, e.server.Alive(first))
				require.Equal(t, "expired", e.status("acme"))
				resp, status, text := e.try(logical.ReadOperation, "creds/acme", nil)
				require.Equal(t, 200, status, text)
				assert.NotEmpty(t, resp.Warnings)
			})
		})
	}
}

// The service refuses the refresh token by mistake.
func TestOAuthReadersWhileTheRefreshTokenIsRejected(t *testing.T) {
	for name, class := range sharedTokenClasses {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, func(o *oauth2test.Options) {
					class.server(o)
					o.AccessTokenLife = day
				}, class.fields)
				e.add("acme", nil)
				first := accessTokenOf(e.lease("acme"))
				a := e.stored("acme").Access
				e.server.Inject(oauth2test.Fault{Answer: oauth2test.InvalidGrant})
				x := a.Planned
				if x.IsZero() {
					x = a.Expires.Add(-30 * time.Minute)
				}
				time.Sleep(time.Until(x))
				e.pass(5 * time.Minute)
				require.True(t, e.server.Alive(first))
				resp, status, text := e.try(logical.ReadOperation, "creds/acme", nil)
				require.Equal(t, 200, status, text)
				assert.NotEmpty(t, resp.Warnings)
			})
		})
	}
}

// The service has rejected the refresh token by mistake, and readers get the older access token. A refresh is carried out and its answer is
// lost: no reader gets the older access token for longer than until the next try.
func TestOAuthReadersAfterALostRefreshOfARejectedRefreshToken(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, dayD, classD)
		e.add("acme", nil)
		first := accessTokenOf(e.lease("acme"))
		e.server.Inject(oauth2test.Fault{Answer: oauth2test.InvalidGrant, Times: 1})
		time.Sleep(time.Until(e.stored("acme").Access.Planned))
		e.pass(2 * time.Minute)
		require.Equal(t, first, accessTokenOf(e.lease("acme")))
		e.server.Inject(oauth2test.Fault{Process: true, Reset: true})
		_, status, _ := e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
		require.NotEqual(t, 200, status)
		require.False(t, e.server.Alive(first))
		e.pass(2 * time.Minute)
		_, status, _ = e.try(logical.ReadOperation, "creds/acme", nil)
		assert.NotEqual(t, 200, status)
	})
}

// The leases that are given while the connector is refused end before its next try. Once the owner has written the right secret, no
// exchange ends the access token before them.
func TestOAuthLeasesWhileTheConnectorIsRefused(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, dayD, nil)
		e.add("acme", nil)
		e.add("other", nil)
		first := accessTokenOf(e.lease("acme"))
		time.Sleep(time.Until(e.stored("acme").Access.Planned.Add(-30 * time.Second)))
		e.server.Inject(oauth2test.Fault{Answer: oauth2test.InvalidClient, Times: 1})
		_, status, _ := e.try(logical.ReadOperation, "creds/other", nil)
		require.Equal(t, 400, status)
		time.Sleep(30 * time.Second)
		lease := e.lease("acme")
		require.Equal(t, first, accessTokenOf(lease))
		require.Greater(t, lease.Secret.MaxTTL, 9*time.Minute)
		e.write("config", map[string]any{"connector_secret": e.secret})
		time.Sleep(lease.Secret.MaxTTL - time.Millisecond)
		require.True(t, e.server.Alive(first))
		e.pass(time.Minute)
		require.NotEqual(t, first, accessTokenOf(e.lease("acme")))
	})
}

// No reader has got the access token, and it has too little life left for one, when a read finds that the service refuses the connector.
// Further reads do not move the next try, which the renewer makes.
func TestOAuthBlockedReadIsTriedAgain(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, dayD, nil)
		e.add("acme", nil)
		e.add("other", nil)
		e.write("tenants/acme/refresh", nil) // brings an access token that no one reads
		time.Sleep(time.Until(e.stored("acme").Access.Expires.Add(-14 * time.Minute)))
		e.server.Inject(oauth2test.Fault{Answer: oauth2test.InvalidClient, Times: 1})
		_, status, _ := e.try(logical.UpdateOperation, "tenants/other/refresh", nil)
		require.Equal(t, 400, status)
		e.ok(logical.DeleteOperation, "tenants/other", nil) // which would be exchanged at the next try, too
		var failed []any
		for range 2 {
			time.Sleep(time.Second)
			_, status, _ = e.try(logical.ReadOperation, "creds/acme", nil)
			require.Equal(t, 400, status)
			failed = append(failed, e.read("tenants/acme")["last_error_time"])
		}
		assert.Equal(t, failed[0], failed[1])
		e.pass(11 * time.Minute)
		assert.Equal(t, 2, e.server.Exchanges("acme"))
	})
}

// The service hangs. Once the answer to an exchange has been lost, readers get the access token, with a warning, also while the next exchange
// hangs. Once that is answered, they get the new one.
func TestOAuthReadersWhileTheServiceHangs(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, dayD, nil)
		e.add("acme", nil)
		first := accessTokenOf(e.lease("acme"))
		a := e.stored("acme").Access
		e.server.Inject(oauth2test.Fault{Hang: true})
		time.Sleep(time.Until(a.Planned))
		_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
		require.Equal(t, 503, status, "the answer may still come")
		time.Sleep(2 * time.Minute)
		waited := 0
		for i := 0; time.Until(a.Expires) > 20*time.Minute; i++ {
			resp, status, text := e.try(logical.ReadOperation, []string{"creds/acme", "token/acme"}[i%2], nil)
			require.Equal(t, 200, status, text)
			require.Equal(t, first, accessTokenOf(resp))
			require.NotEmpty(t, resp.Warnings)
			if resp.Secret != nil && resp.Secret.TTL == time.Second {
				waited++
			}
			time.Sleep(7 * time.Second)
		}
		assert.Greater(t, waited, 5, "readers have waited for the exchange")
		e.server.ClearFaults()
		e.pass(2 * time.Minute)
		assert.NotEqual(t, first, accessTokenOf(e.lease("acme")))
	})
}

// The answer to an exchange was lost, and the next is answered: while storage is slow to take what came, no reader gets the access token
// that the exchange has ended.
func TestOAuthReadersWhileTheAnswerAfterALostOneIsStored(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, dayD, nil)
		e.add("acme", nil)
		first := accessTokenOf(e.lease("acme"))
		e.server.Inject(oauth2test.Fault{Reset: true, Times: 2})
		time.Sleep(time.Until(e.stored("acme").Access.Planned))
		synctest.Wait()
		require.True(t, e.server.Alive(first))
		e.storage.surround(func(op, key string, do func() error) error {
			if op == "put" && key == "tenants/acme" {
				time.Sleep(20 * time.Second)
			}
			return do()
		})
		for e.server.Alive(first) {
			time.Sleep(time.Second)
		}
		_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
		assert.Equal(t, 503, status)
		time.Sleep(time.Minute)
		assert.NotEqual(t, first, accessTokenOf(e.lease("acme")))
	})
}
