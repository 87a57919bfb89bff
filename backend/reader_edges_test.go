package backend

import (
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// A reader of token who comes back after ttl seconds gets a newer access token, with a min_ttl of its own too.
func TestReadAfterTTLGivesANewerToken(t *testing.T) {
	for name, c := range map[string]struct {
		kind   func(*oauth2test.Options)
		fields map[string]any
		minTTL string
		ttl    time.Duration // at most
	}{
		"A":              {oauth2test.ClassA, classA, "0", 59 * time.Second},
		"A with min_ttl": {oauth2test.ClassA, classA, "30s", 30 * time.Second},
		"D":              {oauth2test.ClassD, classD, "0", 58 * time.Second},
		"D with min_ttl": {oauth2test.ClassD, classD, "15s", 58 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, func(o *oauth2test.Options) { c.kind(o); o.AccessTokenLife = time.Minute }, c.fields)
				e.add("acme", map[string]any{"min_ttl": "1s"})
				read := func() map[string]any {
					return e.ok(logical.ReadOperation, "token/acme", map[string]any{"min_ttl": c.minTTL}).Data
				}
				read()
				time.Sleep(300 * time.Millisecond)
				for range 5 {
					data := read()
					ttl := time.Duration(data["ttl"].(int64)) * time.Second
					require.Positive(t, ttl)
					assert.LessOrEqual(t, ttl, c.ttl)
					plain := e.read("token/acme")["ttl"].(int64)
					if name == "D with min_ttl" {
						assert.Equal(t, plain, data["ttl"], "the planned exchange comes at its time, whatever a reader asks")
					}
					time.Sleep(ttl)
					next := read
					if name == "D with min_ttl" {
						next = func() map[string]any { return e.read("token/acme") } // the min_ttl is more than the token has left
					}
					require.NotEqual(t, data["access_token"], next()["access_token"])
				}
			})
		})
	}
}

// A reader, or refresh, that comes while the write that creates the tenant is being verified waits for its end.
func TestReadersWaitForTheWriteThatCreatesATenant(t *testing.T) {
	for _, accepted := range []bool{true, false} {
		for _, path := range []string{"creds/acme", "token/acme", "tenants/acme/refresh"} {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, oauth2test.ClassA, classA)
				fault := oauth2test.Fault{Delay: 3 * time.Second, Times: 1}
				if !accepted {
					fault.Answer = oauth2test.Answer{Status: 400, Body: `{"error":"invalid_grant"}`}
				}
				e.server.Inject(fault)
				go func() {
					_, _, _ = e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": e.server.Grant(e.clientID, "acme")})
				}()
				synctest.Wait()
				var op logical.Operation = logical.ReadOperation
				if path == "tenants/acme/refresh" {
					op = logical.UpdateOperation
				}
				begun := time.Now()
				_, status, text := e.try(op, path, nil)
				assert.Equal(t, 3*time.Second, time.Since(begun))
				if accepted {
					assert.Equal(t, 200, status, text)
				} else {
					assert.Contains(t, text, "there is no tenant")
				}
				synctest.Wait()
			})
		}
	}
}

// A refresh that waits for the verification of a write in vain does not promise an access token of its own.
func TestRefreshBesideAVerification(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		e.read("creds/acme")
		e.server.Inject(oauth2test.Fault{Delay: 12 * time.Second, Times: 1, Answer: oauth2test.Answer{Status: 400, Body: `{"error":"invalid_grant"}`}})
		go func() {
			_, _, _ = e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": "mistyped"})
		}()
		synctest.Wait()
		_, status, text := e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
		assert.Equal(t, 503, status)
		assert.Contains(t, text, "the present access token was not retired; refresh again in a minute")
		time.Sleep(time.Minute)
	})
}

// Storage takes the result of an exchange and reports an error, so readers get the older access token until the result is stored again. A
// refresh that has waited for that exchange, or comes after it, succeeds only once readers get another access token, and has the older one
// given up.
func TestRefreshAfterAResultThatStorageTookUnheard(t *testing.T) {
	classes := map[string]func(t *testing.T) *oauthEngine{
		"A": func(t *testing.T) *oauthEngine { return newOAuthEngine(t, oauth2test.ClassA, classA) },
		"B": func(t *testing.T) *oauthEngine { return newOAuthEngine(t, oauth2test.ClassB, classB) },
	}
	exchanges := map[string]func(e *oauthEngine){
		"a write that is verified": func(e *oauthEngine) {
			_, status, _ := e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": e.server.Grant(e.clientID, "acme")})
			assert.Equal(e.t, 503, status)
		},
		"an exchange that no reader asked for": func(e *oauthEngine) { e.exchangeUnasked(e.tenants.named("acme")) },
	}
	for class, newEngine := range classes {
		for name, exchange := range exchanges {
			for when, pause := range map[string]time.Duration{"joins": time.Second, "comes after": 3500 * time.Millisecond} {
				t.Run(class+", "+name+", "+when, func(t *testing.T) {
					bubble(t, func(t *testing.T) {
						e := newEngine(t)
						e.add("acme", nil)
						old := accessTokenOf(e.lease("acme"))
						e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointToken, Delay: 3 * time.Second, Times: 1})
						failed := e.storage.unheardOnce("put", tenantPrefix+"acme")
						go exchange(e)
						time.Sleep(pause)
						_, status, text := e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
						if status == 503 { // it has joined the exchange whose result was not stored
							_, status, text = e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
						}
						require.Equal(t, 200, status, text)
						assert.True(t, failed())
						next := accessTokenOf(e.lease("acme"))
						assert.NotEqual(t, old, next)
						assert.Equal(t, next, e.read("token/acme")["access_token"])
						if class == "A" { // which revokes access tokens
							e.pass(time.Minute)
							assert.False(t, e.server.Alive(old))
							assert.True(t, e.server.Alive(next))
						}
					})
				})
			}
		}
	}
}

// The status names the time of the next try that the connector's pause permits, whatever kind of answer has asked for the pause.
func TestNextTryIsAfterThePause(t *testing.T) {
	for name, c := range map[string]struct {
		kind   func(*oauth2test.Options)
		answer oauth2test.Answer
		rest   time.Duration
	}{
		"A, 503": {oauth2test.ClassA, oauth2test.Answer{Status: 503}, 45 * time.Second},
		"A, 403": {oauth2test.ClassA, oauth2test.Answer{Status: 403, Body: `{"error":"invalid_scope"}`}, 45 * time.Second},
		"A, 429": {oauth2test.ClassA, oauth2test.Answer{Status: 429}, 45 * time.Second},
		"D, 503": {oauth2test.ClassD, oauth2test.Answer{Status: 503}, 45*time.Second + leaseMargin}, // at the planned time
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				fields := classA
				if name[0] == 'D' {
					fields = classD
				}
				e := newOAuthEngine(t, c.kind, fields)
				e.add("acme", nil)
				e.read("creds/acme")
				c.answer.Header = http.Header{"Retry-After": {"45"}}
				e.server.Inject(oauth2test.Fault{Times: 1, Answer: c.answer})
				if name[0] == 'D' {
					time.Sleep(e.planned())
				}
				if name[0] != 'D' {
					_, _, _ = e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
				}
				synctest.Wait()
				calls := e.server.Calls()
				begun := calls[len(calls)-1].Start
				next, err := time.Parse(time.RFC3339Nano, e.read("tenants/acme")["next_exchange_time"].(string))
				require.NoError(t, err)
				assert.InDelta(t, c.rest.Seconds(), next.Sub(begun).Seconds(), 0.999, "the status shows whole seconds")
			})
		})
	}
}

// The status 429 is a limit whatever the answer says: no call follows until Retry-After has passed.
func TestTooManyRequestsIsALimitWhateverItSays(t *testing.T) {
	for _, code := range []string{"invalid_grant", "invalid_client", "invalid_scope", "server_error"} {
		t.Run(code, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, oauth2test.ClassA, classA)
				e.add("acme", nil)
				e.add("other", nil)
				e.server.Inject(oauth2test.Fault{Times: 1, Answer: oauth2test.Answer{
					Status: 429, Header: http.Header{"Retry-After": {"20"}}, Body: `{"error":"` + code + `"}`,
				}})
				_, _, _ = e.try(logical.ReadOperation, "creds/acme", nil)
				e.write("config", map[string]any{"connector_secret": e.secret})
				calls := len(e.server.Calls())
				_, status, text := e.try(logical.ReadOperation, "creds/other", nil)
				assert.Equal(t, 429, status, text)
				assert.Len(t, e.server.Calls(), calls)
				time.Sleep(21 * time.Second)
				e.read("creds/other")
			})
		})
	}
}

// exchange_invalidates is written while leases live: a renewal ends before the exchange that ends the access token from then on.
func TestRenewalsEndBeforeAnExchangeThatEndsTheToken(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, func(o *oauth2test.Options) { oauth2test.ClassD(o); o.AccessTokenLife = time.Minute }, classB)
		e.add("acme", map[string]any{"ttl": "10s", "min_ttl": "30s"})
		lease := e.lease("acme")
		e.write("config", map[string]any{"exchange_invalidates": true})
		time.Sleep(8 * time.Second)
		end, renewed := e.renewLease(lease, 50*time.Second)
		require.True(t, renewed)
		planned := time.Now().Add(e.planned())
		assert.False(t, end.After(planned.Add(-leaseMargin)), "the lease ends at %s, and the exchange is planned at %s", end, planned)
		assert.Greater(t, time.Until(end), 15*time.Second)
		time.Sleep(time.Until(end) - time.Millisecond)
		assert.True(t, e.server.Alive(accessTokenOf(lease)))
	})
}

// A tenant with retire_on_revoke=false is moved to a connector where that has no effect: the answer says so.
func TestMoveWarnsOfRetireOnRevoke(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classB)
		e.write("config/revoking", map[string]any{
			"service": "oauth2", "connector_id": e.clientID, "connector_secret": e.secret, "token_url": e.server.TokenURL(),
			"revocation_url": e.server.RevocationURL(), "revocation": "access_token", "exchange_invalidates": false,
		})
		e.add("acme", map[string]any{"retire_on_revoke": false})
		resp := e.ok(logical.UpdateOperation, "tenants/acme", map[string]any{"connector": "revoking", "verify": false})
		require.NotNil(t, resp)
		assert.Contains(t, resp.Warnings[0], "retire_on_revoke=false has no effect")
	})
}

// The last moments before a planned exchange are a tenth of the access token's life, a second at the least and five at the most.
func TestGuard(t *testing.T) {
	for life, guard := range map[time.Duration]time.Duration{5 * time.Second: time.Second, 20 * time.Second: 2 * time.Second, time.Hour: 5 * time.Second} {
		a := &accessEntry{Obtained: time.Unix(0, 0), Expires: time.Unix(0, 0).Add(life)}
		assert.Equal(t, guard, a.guard(), life)
	}
}
