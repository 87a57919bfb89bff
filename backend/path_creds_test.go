package backend

import (
	"context"
	"math/rand/v2"
	"net/http"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/kaizala/kaizalatest"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

func TestReadersShareOneAccessToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		first := e.lease("acme")
		assert.True(t, e.kaizala.AccessTokenAlive(accessTokenOf(first)))
		for range 3 {
			time.Sleep(time.Hour)
			assert.Equal(t, accessTokenOf(first), accessTokenOf(e.lease("acme")))
			assert.Equal(t, first.Data["access_token"], e.read("token/acme")["access_token"])
		}
		assert.Equal(t, 1, e.kaizala.Exchanges("acme"))
	})
}

func TestColdHerdCausesOneExchange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		e.kaizala.Inject(kaizalatest.Fault{Delay: 2 * time.Second, Process: true, Times: 1})
		var readers sync.WaitGroup
		for range 1000 {
			readers.Go(func() { e.read("creds/acme") })
		}
		readers.Wait()
		assert.Equal(t, 1, e.kaizala.CallCount())
	})
}

func TestReaderIsAnsweredWithinTenSeconds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		e.kaizala.Inject(kaizalatest.Fault{Delay: 25 * time.Second, Process: true, Times: 1})
		begun := time.Now()
		_, status, text := e.try(logical.ReadOperation, "creds/acme", nil)
		assert.Equal(t, 503, status)
		assert.Contains(t, text, "nothing was lost")
		assert.LessOrEqual(t, time.Since(begun), 10*time.Second)

		time.Sleep(20 * time.Second) // the exchange goes on, and its result is stored
		e.read("creds/acme")
		assert.Equal(t, 1, e.kaizala.CallCount())
	})
}

func TestLeaseEndsBeforeItsToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		lease := e.lease("acme")
		expires, err := time.Parse(time.RFC3339, lease.Data["expire_time"].(string))
		require.NoError(t, err)
		assert.Equal(t, time.Until(expires).Truncate(time.Second)-2*time.Second, lease.Secret.MaxTTL)
		assert.False(t, lease.Secret.Renewable, "the mount's TTL leaves no room for a renewal")

		e.write("tenants/acme", map[string]any{"ttl": "1h"})
		lease = e.lease("acme")
		assert.Equal(t, time.Hour, lease.Secret.TTL)
		assert.True(t, lease.Secret.Renewable)

		synctest.Wait()
		e.system.MaxLeaseTTLVal = time.Hour
		e.node.askTTLs()
		assert.False(t, e.lease("acme").Secret.Renewable, "the mount's max_lease_ttl leaves no room for a renewal")
		e.system.MaxLeaseTTLVal = time.Hour + time.Second
		e.node.askTTLs()
		assert.True(t, e.lease("acme").Secret.Renewable)
	})
}

// A reader's min_ttl is compared with the access token that he would get, and not with one that has been given up.
func TestMinTTLAfterTheTokenIsGivenUp(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassD, classD)
		e.add("acme", nil)
		e.read("creds/acme")
		time.Sleep(30 * time.Minute)
		lease := e.lease("acme")
		asks := map[string]any{"min_ttl": "25m"}
		_, status, text := e.try(logical.ReadOperation, "creds/acme", asks)
		assert.Equal(t, 400, status)
		assert.Contains(t, text, "has left before the exchange that ends it")
		require.NoError(t, e.revokeLease(lease))
		e.InvalidateKey(t.Context(), tenantPrefix+"acme")
		require.NoError(t, e.revokeLease(lease))
		assert.NotEqual(t, accessTokenOf(lease), accessTokenOf(e.ok(logical.ReadOperation, "creds/acme", asks)))
		_, status, text = e.try(logical.ReadOperation, "creds/acme", map[string]any{"min_ttl": "1500ms"})
		assert.Equal(t, 400, status)
		assert.Contains(t, text, "whole seconds")
	})
}

func TestMinTTLOfAReaderIsHalfALifeAtMost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		e.read("creds/acme")
		half := e.stored("acme").AccessTokenLife / 2
		require.Zero(t, half%time.Second)
		e.ok(logical.ReadOperation, "creds/acme", map[string]any{"min_ttl": half.String()})
		_, status, text := e.try(logical.ReadOperation, "creds/acme", map[string]any{"min_ttl": (half + time.Second).String()})
		assert.Equal(t, 400, status)
		assert.Contains(t, text, half.String()+" at most")
	})
}

// Vault compares times in whole seconds. At whatever part of a second a renewal comes, the engine asks for no more than Vault may give:
// otherwise Vault would warn the client that its TTL "exceeded the effective max_ttl".
func TestRenewalEarnsNoWarning(t *testing.T) {
	kaizala := func(t *testing.T) *engine {
		e := newConfiguredEngine(t)
		e.kaizala.SetAccessTokenLife(time.Minute)
		e.addTenant("acme")
		return e
	}
	planned := func(t *testing.T) *engine {
		e := newOAuthEngine(t, func(o *oauth2test.Options) { oauth2test.ClassD(o); o.AccessTokenLife = 2 * time.Minute }, nil)
		e.add("acme", nil)
		return e.engine
	}
	for _, c := range []struct {
		name   string
		engine func(*testing.T) *engine
		tenant map[string]any
		mount  time.Duration // its max_lease_ttl
	}{
		{"token's end", kaizala, map[string]any{"ttl": "7s"}, 0},
		{"tenant's max_ttl", kaizala, map[string]any{"ttl": "7s", "max_ttl": "31s"}, 0},
		{"mount's max", kaizala, map[string]any{"ttl": "7s"}, 31 * time.Second},
		{"mount's default", kaizala, nil, 0},
		{"planned exchange", planned, map[string]any{"ttl": "7s"}, 0},
		{"planned exchange, tenant's max_ttl", planned, map[string]any{"ttl": "7s", "max_ttl": "31s"}, 0},
		{"planned exchange, mount's max", planned, map[string]any{"ttl": "7s"}, 31 * time.Second},
	} {
		t.Run(c.name, func(t *testing.T) {
			for seed := range uint64(30) {
				bubble(t, func(t *testing.T) {
					r := rand.New(rand.NewPCG(seed, 0))
					within := func(d time.Duration) { time.Sleep(time.Duration(r.Int64N(int64(d)))) }
					e := c.engine(t)
					if c.tenant != nil {
						e.write("tenants/acme", c.tenant)
					} else {
						synctest.Wait() // the engine asks for the mount's TTLs while it starts
						e.system.DefaultLeaseTTLVal = 5 * time.Second
					}
					if c.mount != 0 {
						synctest.Wait()
						e.system.MaxLeaseTTLVal = c.mount
					}
					within(time.Second)
					lease := e.lease("acme")
					renewals := 0
					for range 200 {
						within(time.Second)
						resp, err := e.HandleRequest(context.Background(), &logical.Request{Operation: logical.RenewOperation, Secret: lease.Secret, Storage: e.storage})
						require.NoError(t, err)
						if resp.IsError() {
							break
						}
						lease.Secret = resp.Secret
						within(500 * time.Millisecond) // until Vault has the answer
						_, warnings, err := framework.CalculateTTL(e.system, 0, resp.Secret.TTL, 0, resp.Secret.MaxTTL, 0, resp.Secret.IssueTime)
						require.Empty(t, warnings, "after %s", time.Since(resp.Secret.IssueTime))
						if err != nil {
							break // Vault refuses the renewal, because max_ttl is over
						}
						renewals++
					}
					require.Greater(t, renewals, 20)
				})
			}
		})
	}
}

func TestRestartIsSilent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		token := accessTokenOf(e.lease("acme"))
		e.restart()
		assert.Equal(t, token, accessTokenOf(e.lease("acme")))
		e.crash()
		assert.Equal(t, token, accessTokenOf(e.lease("acme")))
		assert.Equal(t, 1, e.kaizala.CallCount())
	})
}

func TestLastLeaseRevokedEarlyGivesTheTokenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		a, b := e.lease("acme"), e.lease("acme")
		require.NoError(t, e.revokeLease(a))
		assert.Equal(t, accessTokenOf(b), accessTokenOf(e.lease("acme")), "two leases on the access token live")
		require.NoError(t, e.revokeLease(b))
		require.NoError(t, e.revokeLease(b))
		assert.NotEqual(t, accessTokenOf(a), accessTokenOf(e.lease("acme")))
		e.crash()
		assert.NotEqual(t, accessTokenOf(a), accessTokenOf(e.lease("acme")))
	})
}

func TestReaderWhoGoesAwayMakesTheCountUnknown(t *testing.T) {
	e := newConfiguredEngine(t)
	e.addTenant("acme")
	lease := e.lease("acme")
	gone, cancel := context.WithCancel(context.Background())
	cancel()
	_, _ = e.do(gone, logical.ReadOperation, "creds/acme", nil)
	require.NoError(t, e.revokeLease(lease))
	assert.NotEqual(t, accessTokenOf(lease), accessTokenOf(e.lease("acme")))
}

func TestNaturalEndKeepsTheToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		e.write("tenants/acme", map[string]any{"ttl": "1h"})
		lease := e.lease("acme")
		time.Sleep(time.Hour)
		require.NoError(t, e.revokeLease(lease))
		assert.Equal(t, accessTokenOf(lease), accessTokenOf(e.lease("acme")))
	})
}

// A reader is delayed between the check of an access token and its lease, and the time that is left is over: the lease has a TTL of a
// second at least, because Vault takes a TTL or MaxTTL of 0 or less for no limit.
func TestLeaseOfAReaderWhoIsHeldUpEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.write("tenants/acme", map[string]any{"refresh_token": e.newToken("acme"), "ttl": "1h", "max_ttl": "2h"})
		_, v := e.tenants.cached("acme")
		for _, left := range []time.Duration{time.Second, 0, -time.Second, -time.Hour} {
			time.Sleep(time.Until(v.access.Expires.Add(-left)))
			options := e.newLease(v, v.access, false).Secret.LeaseOptions
			assert.Equal(t, time.Second, options.TTL, left)
			assert.Equal(t, time.Second, options.MaxTTL, left)
		}
	})
}

// A connector's request_timeout is the time that one exchange may take.
func TestRequestTimeoutOfAKaizalaConnector(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.write("config", map[string]any{"request_timeout": "7s"})
		e.addTenant("acme")
		e.kaizala.Inject(kaizalatest.Fault{Hang: true})
		begun := time.Now()
		_, status, text := e.try(logical.ReadOperation, "creds/acme", nil)
		assert.Equal(t, 503, status)
		assert.Contains(t, text, "timed out after request_timeout (7s)")
		assert.Equal(t, 7*time.Second, time.Since(begun))
	})
}

// Storage has a tenant and not its connector: the text of the tenant's status is a whole sentence all the same.
func TestStatusWithoutAConnector(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		e.kaizala.Inject(kaizalatest.Fault{Times: 1, Status: 401, Body: `{"errorCode":"InvalidToken"}`})
		_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
		require.Equal(t, 400, status)
		require.NoError(t, e.storage.InmemStorage.Delete(t.Context(), connectorPrefix+defaultConnector))
		e.crash()
		assert.Equal(t, `The token service refuses the refresh token of tenant "acme": its tenant user has to get a new one and write it to tenants/acme.`,
			e.read("tenants/acme")["last_error"])
	})
}

// No text says to come back in no time: a second is the least.
func TestTextsOfShortWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for in, says := range map[time.Duration]string{-time.Minute: "1s", 0: "1s", 400 * time.Millisecond: "1s", 1600 * time.Millisecond: "2s"} {
			assert.ErrorContains(t, tooMany(time.Now().Add(in), "no call"), "no call: try again in "+says+", at ")
		}
	})
}

// After a 429 each reader is told that Kaizala has refused further calls, and not that the connector's own share is used up: also a reader
// who causes no call.
func TestReadersAreToldWhoseLimitItIs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		e.addTenant("globex")
		e.kaizala.Inject(kaizalatest.Fault{Times: 1, Status: http.StatusTooManyRequests, Header: http.Header{"Retry-After": {"60"}}})
		for _, tenant := range []string{"acme", "acme", "globex"} {
			_, status, text := e.try(logical.ReadOperation, "creds/"+tenant, nil)
			assert.Equal(t, 429, status)
			assert.Contains(t, text, `Kaizala has refused further calls of connector "default": try again in 1m0s`)
		}
		assert.Equal(t, 1, e.kaizala.CallCount())
	})
}

// The service sends access tokens that are about to expire: after two of them the reader gets an error that says what to check.
func TestAccessTokensThatComeDead(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.server.Set(func(o *oauth2test.Options) { o.AccessTokenLife = 2 * time.Second })
		e.add("acme", nil)
		_, status, text := e.try(logical.ReadOperation, "creds/acme", nil)
		assert.Equal(t, http.StatusServiceUnavailable, status)
		assert.Contains(t, text, "compare the clocks")
		assert.Len(t, e.server.Calls(oauth2test.EndpointToken), 2)
	})
}
