package backend

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// renewLease renews a lease as Vault does, and returns its new end.
func (e *engine) renewLease(lease *logical.Response, increment time.Duration) (time.Time, bool) {
	lease.Secret.Increment = increment
	resp, err := e.HandleRequest(context.Background(), &logical.Request{Operation: logical.RenewOperation, Secret: lease.Secret, Storage: e.storage})
	if err != nil || resp.IsError() {
		return time.Time{}, false
	}
	lease.Secret = resp.Secret
	ttl, _, err := framework.CalculateTTL(e.system, increment, resp.Secret.TTL, 0, resp.Secret.MaxTTL, 0, lease.Secret.IssueTime)
	return time.Now().Add(ttl), err == nil
}

// For ten minutes, with a restart in between, readers read creds and token, some with min_ttl, and renew leases: no access token ends
// before a lease on it, or before the ttl of a token read.
func TestOAuthNoTokenDiesBeforeItsLease(t *testing.T) {
	for _, life := range []time.Duration{6 * time.Second, time.Minute, 5 * time.Minute} {
		t.Run(life.String(), func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, func(o *oauth2test.Options) { oauth2test.ClassD(o); o.AccessTokenLife = life }, nil)
				e.add("acme", nil)
				var leases, renewals, tokens, refused, died atomic.Int64
				var checks sync.WaitGroup
				lives := func(token, what string, until time.Time) {
					checks.Go(func() {
						time.Sleep(time.Until(until) - time.Millisecond)
						if !e.server.Alive(token) && died.Add(1) < 5 {
							t.Errorf("%s of %s: the token died before %s", what, life, until.Format("15:04:05.000"))
						}
					})
				}
				reader := func(seed uint64, end time.Time) {
					r := rand.New(rand.NewPCG(seed, uint64(life)))
					for time.Now().Before(end) {
						time.Sleep(time.Duration(r.Int64N(int64(3 * time.Second))))
						data := map[string]any{}
						if r.IntN(3) == 0 {
							data["min_ttl"] = fmt.Sprint(1+r.Int64N(int64(life/2/time.Second)), "s")
						}
						path := []string{"creds/acme", "creds/acme", "token/acme"}[r.IntN(3)]
						resp, status, text := e.try(logical.ReadOperation, path, data)
						switch {
						case status == 400 && len(data) > 0:
							assert.Contains(t, text, "min_ttl")
							refused.Add(1)
							continue
						case status != 200:
							t.Errorf("%s %v: %d %s", path, data, status, text)
							return
						}
						token := accessTokenOf(resp)
						if resp.Secret == nil {
							tokens.Add(1)
							lives(token, "ttl", time.Now().Add(time.Duration(resp.Data["ttl"].(int64))*time.Second))
							continue
						}
						leases.Add(1)
						ttl, _, err := framework.CalculateTTL(e.system, 0, resp.Secret.TTL, 0, resp.Secret.MaxTTL, 0, time.Time{})
						require.NoError(t, err)
						time.Sleep(time.Duration(r.Int64N(int64(leaseRegistered)))) // until Vault has registered the lease
						resp.Secret.IssueTime, resp.Secret.TTL = time.Now(), ttl
						until := time.Now().Add(ttl)
						lives(token, "lease", until)
						for r.IntN(2) == 0 && time.Until(until) > 0 {
							time.Sleep(time.Duration(r.Int64N(int64(time.Until(until)))))
							next, ok := e.renewLease(resp, time.Duration(r.IntN(2))*life)
							if !ok {
								break
							}
							renewals.Add(1)
							until = next
							lives(token, "renewed lease", until)
						}
					}
				}
				phase := func(d time.Duration) {
					var readers sync.WaitGroup
					for i := range 8 {
						readers.Go(func() { reader(uint64(i), time.Now().Add(d)) })
					}
					e.pass(d)
					readers.Wait()
				}
				phase(5 * time.Minute)
				e.restart()
				phase(5 * time.Minute)
				checks.Wait()
				assert.Greater(t, leases.Load(), int64(100))
				assert.True(t, renewals.Load() > 5 || life < 10*time.Second)
				assert.Greater(t, tokens.Load(), int64(50))
				assert.Greater(t, refused.Load(), int64(5))
				most := 11*time.Minute/max(time.Second, life*45/100-leaseMargin) + 3
				assert.LessOrEqual(t, e.server.Exchanges("acme"), int(most), "exchanges come as late as they can")
				e.kept()
				t.Log(life, leases.Load(), renewals.Load(), tokens.Load(), refused.Load(), e.server.Exchanges("acme"))
			})
		})
	}
}

// The numbers of the contract: the times X and C, the length of a lease and of a token read's ttl, and which min_ttl is refused.
func TestOAuthPlannedExchange(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassD, nil)
		e.add("acme", nil)
		begun := time.Now()
		lease := e.lease("acme")
		a := e.stored("acme").Access
		left := a.Expires.Sub(a.Planned)
		assert.Equal(t, begun.Add(time.Hour).UTC(), a.Expires)
		assert.GreaterOrEqual(t, left, 15*time.Minute+72*time.Second)
		assert.LessOrEqual(t, left, 15*time.Minute+180*time.Second)
		c := a.Planned.Add(-2 * time.Second)
		whole := c.Sub(begun).Truncate(time.Second)
		assert.Equal(t, whole, lease.Secret.MaxTTL)
		assert.Equal(t, int64(whole.Seconds()), e.read("token/acme")["ttl"])
		_, status, text := e.try(logical.ReadOperation, "creds/acme", map[string]any{"min_ttl": "30m"})
		assert.Equal(t, 200, status, text)
		time.Sleep(20 * time.Minute)
		_, status, text = e.try(logical.ReadOperation, "creds/acme", map[string]any{"min_ttl": "29m"})
		assert.Equal(t, 400, status)
		assert.Contains(t, text, c.Truncate(time.Second).Format("15:04:05"))
		assert.Equal(t, 1, e.server.Exchanges("acme"), "min_ttl makes no exchange earlier")
		end, ok := e.renewLease(lease, 10*time.Hour)
		require.True(t, ok)
		assert.LessOrEqual(t, end, c)
		assert.Greater(t, end, c.Add(-2*time.Second))

		// A read shortly before C waits for C, and for the end of a lease that Vault registered a moment after the engine's answer.
		time.Sleep(time.Until(c) - 5*time.Second + time.Millisecond)
		next := e.lease("acme")
		assert.Equal(t, begun.Add(whole+leaseRegistered).UTC(), time.Now().UTC())
		assert.NotEqual(t, accessTokenOf(lease), accessTokenOf(next))
		assert.Equal(t, 2, e.server.Exchanges("acme"))

		// refresh ends the access token before its leases end, and its answer says so.
		resp := e.write("tenants/acme/refresh", nil)
		require.NotEmpty(t, resp.Warnings)
		assert.Contains(t, resp.Warnings[0], "leases on it are of no use")

		// The renewer makes an exchange at X if a reader got the access token.
		e.read("token/acme")
		x := e.stored("acme").Access.Planned
		exchanges := e.server.Exchanges("acme")
		time.Sleep(time.Until(x) - time.Millisecond)
		assert.Equal(t, exchanges, e.server.Exchanges("acme"))
		time.Sleep(time.Second)
		assert.Equal(t, exchanges+1, e.server.Exchanges("acme"))
		// No reader got the new access token, so the next exchange is that of keep_alive.
		e.pass(50 * time.Hour)
		assert.Equal(t, exchanges+1, e.server.Exchanges("acme"))
		e.pass(22 * time.Hour)
		assert.Equal(t, exchanges+2, e.server.Exchanges("acme"))
		e.kept()
	})
}

// The exchange at X fails: the access token still lives, and new leases on it end before the next try.
func TestOAuthPlannedExchangeFails(t *testing.T) {
	for name, fault := range map[string]oauth2test.Fault{
		"outage": {Answer: oauth2test.BadGateway, Times: 1},
		"limit":  {Answer: oauth2test.TooManyRequests(40 * time.Second), Times: 1},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, oauth2test.ClassD, nil)
				e.add("acme", nil)
				old := accessTokenOf(e.lease("acme"))
				x := e.stored("acme").Access.Planned
				e.server.Inject(fault)
				time.Sleep(time.Until(x) + time.Millisecond)
				synctest.Wait()
				require.Len(t, e.server.Calls(oauth2test.EndpointToken), 2)
				time.Sleep(time.Second)
				lease := e.lease("acme")
				assert.Equal(t, old, accessTokenOf(lease))
				end := time.Now().Add(lease.Secret.MaxTTL)
				time.Sleep(time.Until(end) - time.Millisecond)
				assert.True(t, e.server.Alive(old), "until the lease ends")
				assert.Equal(t, 1, e.server.Exchanges("acme"))
				next := e.lease("acme")
				assert.NotEqual(t, old, accessTokenOf(next))
				assert.Equal(t, statusOK, e.status("acme"))
				e.kept()
			})
		})
	}
}

// The answer to another tenant's exchange has paused the connector, so no exchange is permitted: readers get the older access token,
// which still lives.
func TestOAuthPlannedExchangeIsPostponed(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassD, nil)
		e.add("acme", nil)
		e.add("loud", nil)
		lease := e.lease("acme")
		c := e.stored("acme").Access.Planned.Add(-leaseMargin)
		time.Sleep(time.Until(c) - time.Minute)
		e.server.Inject(oauth2test.Fault{User: "loud", Answer: oauth2test.TooManyRequests(10 * time.Minute), Times: 1})
		_, status, _ := e.try(logical.UpdateOperation, "tenants/loud/refresh", nil)
		require.Equal(t, 429, status)
		until := time.Now().Add(10 * time.Minute)
		e.pass(2 * time.Minute)
		again := e.lease("acme")
		assert.Equal(t, accessTokenOf(lease), accessTokenOf(again))
		assert.True(t, e.server.Alive(accessTokenOf(again)))
		end := time.Now().Add(again.Secret.MaxTTL)
		assert.False(t, end.After(until))
		assert.Greater(t, again.Secret.MaxTTL, 6*time.Minute)
		e.pass(time.Until(end) - time.Millisecond)
		assert.True(t, e.server.Alive(accessTokenOf(again)))
		e.pass(time.Minute)
		assert.Equal(t, 2, e.server.Exchanges("acme"))
		e.kept()
	})
}

// A write of settings while a planned exchange is postponed leaves it postponed: readers still get the older access token. The access
// token that a write of another connector brings is exchanged at its own planned time.
func TestOAuthWritesWhileTheExchangeIsPostponed(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassD, nil)
		e.add("acme", nil)
		e.add("loud", nil)
		lease := e.lease("acme")
		time.Sleep(time.Until(e.stored("acme").Access.Planned) - time.Minute)
		e.server.Inject(oauth2test.Fault{User: "loud", Answer: oauth2test.TooManyRequests(time.Hour), Times: 1})
		_, status, _ := e.try(logical.UpdateOperation, "tenants/loud/refresh", nil)
		require.Equal(t, 429, status)
		e.pass(2 * time.Minute)
		require.Equal(t, accessTokenOf(lease), accessTokenOf(e.lease("acme")))
		next := e.read("tenants/acme")["next_exchange_time"]
		e.write("tenants/acme", map[string]any{"ttl": "5m"})
		assert.Equal(t, next, e.read("tenants/acme")["next_exchange_time"])
		assert.Equal(t, accessTokenOf(lease), accessTokenOf(e.lease("acme")))

		e.write("config/other", map[string]any{
			"service": "oauth2", "token_url": e.server.TokenURL(), "connector_id": e.clientID, "connector_secret": e.secret,
		})
		e.write("tenants/acme", map[string]any{"refresh_token": e.server.Grant(e.clientID, "acme"), "connector": "other"})
		planned := e.stored("acme").Access.Planned
		assert.Equal(t, time.Until(planned).Truncate(time.Second)-leaseMargin, e.lease("acme").Secret.MaxTTL)
		e.kept()
	})
}

// A reader gets an access token that no one has read, after the renewer has decided to exchange the refresh token and before the exchange
// begins: the exchange would end that access token, so it is not made.
func TestOAuthReaderComesBeforeAnUnaskedExchange(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassD, nil)
		e.add("acme", nil)
		e.write("tenants/acme/refresh", nil) // brings an access token that no one reads
		token := e.read("token/acme")["access_token"].(string)
		e.exchangeUnasked(e.tenants.named("acme"))
		synctest.Wait()
		assert.Equal(t, 1, e.server.Exchanges("acme"))
		assert.True(t, e.server.Alive(token))
	})
}

// An exchange without a reader brings a new refresh token and no access token: it has ended the older access token, which no reader gets
// any more. If the service refuses that exchange, the older access token lives, and readers get it.
func TestOAuthUnaskedExchangeWithoutAnAccessToken(t *testing.T) {
	for name, refused := range map[string]bool{"carried out": false, "refused": true} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, oauth2test.ClassD, nil)
				e.add("acme", nil)
				e.write("tenants/acme/refresh", nil) // brings an access token that no one reads
				old := e.stored("acme").Access.Token
				if refused {
					e.server.Inject(oauth2test.Fault{Answer: oauth2test.InvalidGrant, Times: 1})
				} else {
					e.server.Set(func(o *oauth2test.Options) {
						o.Edit = func(_ oauth2test.Endpoint, fields map[string]any) { delete(fields, "access_token") }
					})
				}
				e.exchangeUnasked(e.tenants.named("acme"))
				e.quiet("acme")
				require.Len(t, e.server.Calls(oauth2test.EndpointToken), 2)
				require.Equal(t, refused, e.server.Alive(old))
				e.server.Set(func(o *oauth2test.Options) { o.Edit = nil })
				resp, status, _ := e.try(logical.ReadOperation, "token/acme", nil)
				assert.Equal(t, refused, status == 200 && accessTokenOf(resp) == old)
			})
		})
	}
}

func TestOAuthExchangeInvalidatesIsWritten(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassD, classB)
		e.add("acme", nil)
		lease := e.lease("acme")
		assert.Equal(t, time.Hour-leaseMargin, lease.Secret.MaxTTL)
		e.write("config", map[string]any{"exchange_invalidates": true})
		careful := e.lease("acme")
		assert.Equal(t, accessTokenOf(lease), accessTokenOf(careful))
		assert.Less(t, careful.Secret.MaxTTL, 45*time.Minute)
		e.write("config", map[string]any{"exchange_invalidates": false})
		end, ok := e.renewLease(careful, time.Hour)
		require.True(t, ok)
		assert.Less(t, time.Until(end), 45*time.Minute, "the renewed lease keeps its end")
		assert.Equal(t, time.Hour-leaseMargin, e.lease("acme").Secret.MaxTTL)
	})
}

// A write of exchange_invalidates applies to the next lease of a tenant, also if storage holds up a write of the tenant's settings, or a
// read of the tenant, at that time.
func TestOAuthExchangeInvalidatesIsWrittenDuringAWrite(t *testing.T) {
	for name, work := range map[string]func(e *oauthEngine){
		"a write of settings": func(e *oauthEngine) { e.write("tenants/acme", map[string]any{"max_ttl": "50m"}) },
		"a read": func(e *oauthEngine) {
			e.tenants.loaded.Remove("acme")
			e.lease("acme")
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, oauth2test.ClassD, classB)
				e.add("acme", nil)
				first := e.lease("acme")
				e.storage.surround(func(op, key string, do func() error) error {
					err := do()
					if key == "tenants/acme" {
						time.Sleep(2 * time.Second)
					}
					return err
				})
				go work(e)
				time.Sleep(time.Second)
				e.write("config", map[string]any{"exchange_invalidates": true})
				lease := e.lease("acme")
				assert.Equal(t, accessTokenOf(first), accessTokenOf(lease))
				assert.Less(t, lease.Secret.MaxTTL, 45*time.Minute)
				e.storage.heal()
				synctest.Wait()
				assert.Less(t, e.lease("acme").Secret.MaxTTL, 45*time.Minute)
				e.write("tenants/acme", map[string]any{"max_ttl": "40m"})
				assert.NotNil(t, e.tenants.named("acme").view.Load().entry, "the tenant is in memory from then on")
				e.kept()
			})
		})
	}
}

// A verified write gives the connector a new tenant, or a tenant of another connector. A write of exchange_invalidates that comes while
// that is stored applies to the tenant's first lease.
func TestOAuthExchangeInvalidatesIsWrittenWhileATenantComes(t *testing.T) {
	for _, name := range []string{"acme", "new"} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, oauth2test.ClassD, classB)
				e.write("config/other", map[string]any{
					"service": "oauth2", "token_url": e.server.TokenURL(), "connector_id": e.clientID, "connector_secret": e.secret,
				})
				e.add("acme", map[string]any{"connector": "other"})
				e.lease("acme")
				e.storage.surround(func(op, key string, do func() error) error {
					err := do()
					if op == "put" && key == "tenants/"+name {
						time.Sleep(2 * time.Second)
					}
					return err
				})
				go e.write("tenants/"+name, map[string]any{"refresh_token": e.server.Grant(e.clientID, name), "connector": defaultConnector})
				time.Sleep(time.Second)
				e.write("config", map[string]any{"exchange_invalidates": true})
				lease := e.lease(name)
				assert.Less(t, lease.Secret.MaxTTL, 45*time.Minute)
				e.storage.heal()
				time.Sleep(2 * time.Second)
				assert.Equal(t, defaultConnector, e.stored(name).Connector)
				assert.Less(t, e.lease(name).Secret.MaxTTL, 45*time.Minute)
				e.kept()
			})
		})
	}
}

// A write of exchange_invalidates plans the end of the present access token. A later write of keep_alive does not make that end earlier,
// also after the tenant has left memory or the process has restarted.
func TestOAuthEndPlannedByAWriteIsFixed(t *testing.T) {
	for name, leave := range map[string]func(e *oauthEngine){
		"restart":     func(e *oauthEngine) { e.restart() },
		"left memory": func(e *oauthEngine) { e.tenants.loaded.Remove("acme") },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, oauth2test.ClassD, classB)
				e.add("acme", nil)
				e.lease("acme")
				e.write("config", map[string]any{"exchange_invalidates": true})
				lease := e.lease("acme")
				end := time.Now().Add(lease.Secret.MaxTTL)
				e.write("config", map[string]any{"keep_alive": "10m"})
				leave(e)
				assert.Equal(t, lease.Secret.MaxTTL, e.lease("acme").Secret.MaxTTL)
				e.pass(time.Until(end) - time.Millisecond)
				assert.True(t, e.server.Alive(accessTokenOf(lease)))
				e.kept()
			})
		})
	}
}

// If keep_alive is due before the end of the access token's life, the exchange is planned for keep_alive.
func TestOAuthPlannedExchangeForTheRefreshToken(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassD, map[string]any{"keep_alive": "20m"})
		e.add("acme", nil)
		ttl := e.read("token/acme")["ttl"].(int64)
		assert.LessOrEqual(t, ttl, int64(20*60-2))
		assert.Greater(t, ttl, int64(15*60))
		assert.LessOrEqual(t, e.lease("acme").Secret.MaxTTL, 20*time.Minute-leaseMargin)
	})
}

// While planned exchanges fail, every reader gets the older access token until it has less than min_ttl, or half of its life, left.
func TestReadersDuringAnOutageAfterThePlannedExchange(t *testing.T) {
	for _, life := range []time.Duration{40 * time.Second, 100 * time.Second, time.Hour} {
		t.Run(life.String(), func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, func(o *oauth2test.Options) { oauth2test.ClassD(o); o.AccessTokenLife = life }, nil)
				e.add("acme", nil)
				token := accessTokenOf(e.lease("acme"))
				a := e.stored("acme").Access
				e.server.Inject(oauth2test.Fault{Answer: oauth2test.BadGateway})
				time.Sleep(time.Until(a.Planned.Add(-leaseMargin - time.Second)))
				least := a.margin(defaultMinTTL)
				for time.Until(a.Expires) > least {
					for _, path := range []string{"creds/acme", "token/acme"} {
						resp, status, text := e.try(logical.ReadOperation, path, nil)
						if time.Until(a.Expires) < least {
							break // the reader has waited for the next try
						}
						if assert.Equal(t, 200, status, "%s, %s before the token's end: %s", path, time.Until(a.Expires), text) {
							assert.Equal(t, token, resp.Data["access_token"])
						}
					}
					time.Sleep(time.Second)
				}
				assert.True(t, e.server.Alive(token))
				e.server.ClearFaults()
			})
		})
	}
}
