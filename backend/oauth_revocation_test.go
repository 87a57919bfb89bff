package backend

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

func TestOAuthTokenPerLease(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", map[string]any{"token_per_lease": true})
		one, other := e.lease("acme"), e.lease("acme")
		shared := e.read("token/acme")["access_token"].(string)
		assert.NotEqual(t, accessTokenOf(one), accessTokenOf(other))
		assert.NotContains(t, []string{accessTokenOf(one), accessTokenOf(other)}, shared)
		e.revoke(one)
		assert.False(t, e.server.Alive(accessTokenOf(one)))
		assert.True(t, e.server.Alive(accessTokenOf(other)))
		assert.True(t, e.server.Alive(shared))

		// Also a lease that expires ends its token.
		e.write("tenants/acme", map[string]any{"ttl": "1m"})
		short := e.lease("acme")
		require.Equal(t, time.Minute, short.Secret.TTL)
		time.Sleep(time.Minute)
		e.revoke(short)
		assert.False(t, e.server.Alive(accessTokenOf(short)))

		// refresh replaces the shared token alone, and a lease keeps its own token when token_per_lease is switched off.
		e.write("tenants/acme/refresh", nil)
		synctest.Wait()
		assert.False(t, e.server.Alive(shared))
		assert.True(t, e.server.Alive(accessTokenOf(other)))
		e.write("tenants/acme", map[string]any{"token_per_lease": false})
		sharing := e.lease("acme")
		assert.Equal(t, e.read("token/acme")["access_token"], accessTokenOf(sharing))
		e.revoke(other)
		assert.False(t, e.server.Alive(accessTokenOf(other)))
		assert.True(t, e.server.Alive(accessTokenOf(sharing)))
		calls := len(e.revocations())
		assert.Equal(t, 4, calls, "one call for each token")

		// A deleted tenant's leases keep their tokens until they end.
		e.write("tenants/acme", map[string]any{"token_per_lease": true})
		last := e.lease("acme")
		e.ok(logical.DeleteOperation, "tenants/acme", nil)
		synctest.Wait()
		assert.True(t, e.server.Alive(accessTokenOf(last)))
		assert.False(t, e.server.Alive(accessTokenOf(sharing)), "a delete revokes the shared token")
		e.revoke(last)
		assert.False(t, e.server.Alive(accessTokenOf(last)))
		e.kept()
	})
}

func TestOAuthTokenPerLeaseQueues(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", map[string]any{"token_per_lease": true})
		e.server.Inject(oauth2test.Fault{Delay: 2 * time.Second})
		type answer struct {
			token  string
			status int
		}
		answers := make(chan answer, 6)
		for range 6 {
			go func() {
				resp, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
				a := answer{status: status}
				if status == 200 {
					a.token = accessTokenOf(resp)
				}
				answers <- a
			}()
		}
		seen, refused := map[string]bool{}, 0
		for range 6 {
			if a := <-answers; a.status == 200 {
				assert.False(t, seen[a.token])
				seen[a.token] = true
			} else {
				assert.Equal(t, 503, a.status)
				refused++
			}
		}
		assert.Len(t, seen, 4, "one exchange after another, and no reader waits longer than 9 s")
		e.server.ClearFaults()
		e.quiet("acme")
		time.Sleep(time.Minute)
		alive := e.server.AccessTokens("acme")
		assert.Len(t, alive, 4, "an access token whose reader has stopped waiting is given up")
		assert.Equal(t, 2, refused)
		e.kept()
	})
}

// The error of a read that has waited too long says what becomes of the access token that still comes.
func TestAnswerThatComesAfterItsReaderHasLeft(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", map[string]any{"token_per_lease": true})
		e.server.Inject(oauth2test.Fault{Delay: 12 * time.Second, Times: 2})
		for _, read := range []struct {
			path, says string
			kept       int
		}{
			{"creds/acme", "in time: this read gets no access token, and one that still comes for it will be revoked; nothing else was lost, try again later", 0},
			{"token/acme", "yet: the exchange goes on and its result will be kept, unless Vault is stopped before that; nothing was lost, try again later", 1},
		} {
			_, status, text := e.try(logical.ReadOperation, read.path, nil)
			assert.Equal(t, 503, status)
			assert.Contains(t, text, `has not answered for tenant "acme" `+read.says)
			e.pass(time.Minute)
			assert.Len(t, e.server.AccessTokens("acme"), read.kept, read.path)
		}
		e.kept()
	})
}

// The process dies at each write to storage that a read of creds and the revocation of its lease make.
func TestOAuthCrashAtEachStep(t *testing.T) {
	for _, own := range []bool{true, false} {
		for step := 1; step <= 9; step++ {
			for _, arrives := range []bool{false, true} {
				t.Run(fmt.Sprintf("own %t step %d arrives %t", own, step, arrives), func(t *testing.T) {
					bubble(t, func(t *testing.T) {
						e := newOAuthEngine(t, func(o *oauth2test.Options) { oauth2test.ClassA(o); o.Grace = 30 * time.Second }, classA)
						e.add("acme", map[string]any{"token_per_lease": own})
						warm := e.lease("acme")
						time.Sleep(time.Second)
						var writes atomic.Int64 // a revocation in the background writes too
						e.storage.surround(func(op, key string, do func() error) error {
							if op != "put" && op != "delete" {
								return do()
							}
							n := int(writes.Add(1))
							if n < step {
								return do()
							}
							if n == step && arrives {
								_ = do()
							}
							return errors.New("the process is dead")
						})
						read, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
						var err error
						if status == 200 {
							read.Secret.IssueTime = time.Now()
							read.Secret.TTL = min(e.system.DefaultLeaseTTLVal, read.Secret.MaxTTL)
							if err = e.revokeLease(read); err == nil && !own {
								err = e.revokeLease(warm)
							}
						}
						e.crash()
						e.pass(2 * time.Minute)
						handed := map[string]bool{}
						for range 3 {
							resp, status, text := e.try(logical.ReadOperation, "token/acme", nil)
							require.Equal(t, 200, status, text)
							handed[accessTokenOf(resp)] = true
							e.pass(time.Minute)
						}
						for token := range handed {
							assert.True(t, e.server.Alive(token), "a dead token is handed out")
						}
						if err != nil {
							// Vault tries again.
							require.NoError(t, e.revokeLease(read))
							if !own {
								require.NoError(t, e.revokeLease(warm))
							}
							e.pass(time.Minute)
						}
						if status == 200 {
							assert.False(t, e.server.Alive(accessTokenOf(read)), "its lease has ended")
						}
						for _, token := range e.server.AccessTokens("acme") {
							if handed[token] || own && token == accessTokenOf(warm) {
								continue
							}
							if own && (step == 3 && arrives || step == 2 && !arrives) {
								continue // its record says that there may be a lease, and the process has died before it gave one
							}
							t.Errorf("an access token lives that no reader and no lease has")
						}
						assert.Empty(t, e.server.LostGrants())
						assert.True(t, e.server.RefreshTokenAlive(e.held("acme")))
					})
				})
			}
		}
	}
}

func TestOAuthClassesBAndC(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassB, classB)
		e.add("acme", nil)
		one, other := e.lease("acme"), e.lease("acme")
		e.revoke(one, other)
		e.write("tenants/acme/refresh", nil)
		e.ok(logical.DeleteOperation, "tenants/acme", nil)
		e.pass(5 * time.Minute)
		assert.Empty(t, e.revocations(), "no revocation is sent")
		e.kept()
		e.add("acme", nil)
		lease := e.lease("acme")
		e.pass(50 * time.Minute)
		assert.NotEqual(t, accessTokenOf(lease), e.read("token/acme")["access_token"])
		assert.NotContains(t, e.storedText(), heldPrefix)
	})
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassC, classA)
		e.add("acme", nil)
		e.revoke(e.lease("acme"))
		e.pass(5 * time.Minute)
		assert.Len(t, e.revocations(), 1)
		status := e.read("tenants/acme")
		assert.Contains(t, status["last_revocation_error"], "cannot revoke")
		assert.NotContains(t, status, "pending_revocations")
		assert.Contains(t, e.read("config"), "last_revocation_error")
		e.kept()
	})
}

// The revocation endpoint is down for an hour, with a restart in between.
func TestOAuthRevocationOutage(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, func(o *oauth2test.Options) { oauth2test.ClassA(o); o.AccessTokenLife = 3 * time.Hour }, classA)
		e.write("config", map[string]any{"exchanges_per_minute": 600})
		e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointRevocation, Answer: oauth2test.BadGateway})
		var tokens []string
		for i := range 100 {
			name := fmt.Sprint("t", i)
			e.add(name, nil)
			lease := e.lease(name)
			tokens = append(tokens, accessTokenOf(lease))
			begun := time.Now()
			e.revoke(lease)
			assert.Less(t, time.Since(begun), 6*time.Second)
		}
		synctest.Wait() // the worker has tried them all
		status := e.read("tenants/t5")
		assert.EqualValues(t, 1, status["pending_revocations"])
		assert.NotEmpty(t, status["last_revocation_error"])
		assert.NotContains(t, status["last_revocation_error"], tokens[5])
		assert.EqualValues(t, 100, e.read("config")["pending_revocations"])
		for i := range 100 {
			e.ok(logical.DeleteOperation, fmt.Sprint("tenants/t", i), nil)
		}
		for path, data := range map[string]map[string]any{"config": {"connector_id": "another"}, "config ": {"service": "kaizala", "connector_id": "i", "connector_secret": "s"}} {
			_, code, text := e.try(logical.UpdateOperation, strings.TrimSpace(path), data)
			assert.Equal(t, 400, code)
			assert.Contains(t, text, "pending_revocations")
		}
		_, code, _ := e.try(logical.DeleteOperation, "config", nil)
		assert.Equal(t, 400, code)
		e.pass(30 * time.Minute)
		begun := time.Now()
		e.restart()
		assert.Less(t, time.Since(begun), time.Second, "a stop does not wait for the next try")
		e.pass(30 * time.Minute)
		calls := e.revocations()
		last := map[string]time.Time{}
		for _, c := range calls {
			if at, ok := last[c.Token]; ok && c.Start.Before(begun) {
				assert.GreaterOrEqual(t, c.Start.Sub(at), time.Second)
			}
			last[c.Token] = c.Start
		}
		assert.LessOrEqual(t, e.server.MaxPerMinute(e.clientID), 600)
		for _, token := range tokens {
			assert.True(t, e.server.Alive(token))
		}
		e.server.ClearFaults()
		e.pass(2 * time.Minute)
		for _, token := range tokens {
			assert.False(t, e.server.Alive(token))
		}
		assert.NotContains(t, e.read("config"), "pending_revocations")
		intents, err := e.storage.List(context.Background(), intentPrefix)
		require.NoError(t, err)
		assert.Empty(t, intents)
		e.ok(logical.DeleteOperation, "config", nil)
		e.kept()
	})
}

// A revocation that fails is tried again after 1, 2, 4, ... 30 seconds. The revocation of a lease waits for its call, for a few
// seconds, and does not wait while calls are slow or fail.
func TestOAuthRevocationBackoffAndWaits(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, func(o *oauth2test.Options) { oauth2test.ClassA(o); o.AccessTokenLife = 5 * time.Minute }, classA)
		e.add("acme", map[string]any{"min_ttl": "1s"})
		lease := e.lease("acme")
		e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointRevocation, Answer: oauth2test.BadGateway})
		begun := time.Now()
		e.revoke(lease)
		e.pass(6 * time.Minute)
		var after []time.Duration
		for _, c := range e.revocations() {
			after = append(after, c.Start.Sub(begun).Round(time.Second))
		}
		want := []time.Duration{0, 1, 3, 7, 15, 31, 61, 91, 121, 151, 181, 211, 241, 271}
		for i := range want {
			want[i] *= time.Second
		}
		assert.Equal(t, want, after, "and no try in the token's last 5 seconds")
		assert.Nil(t, e.pending("acme"), "a token that has ended needs no revocation")
		e.kept()
	})
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		var leases []*logical.Response
		for i := range 6 {
			e.add(fmt.Sprint("t", i), nil)
			leases = append(leases, e.lease(fmt.Sprint("t", i)))
		}
		revoke := func(i int) time.Duration {
			begun := time.Now()
			e.revoke(leases[i])
			return time.Since(begun)
		}
		assert.Zero(t, revoke(0))
		e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointRevocation, Delay: 1900 * time.Millisecond, Times: 1})
		assert.Equal(t, 1900*time.Millisecond, revoke(1))
		e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointRevocation, Hang: true})
		assert.Equal(t, 5*time.Second, revoke(2))
		assert.Zero(t, revoke(3), "the call before has been under way for more than 2 s")
		assert.Zero(t, revoke(4), "and so have both")
		time.Sleep(70 * time.Second)
		assert.Zero(t, revoke(5), "the last call has failed")
		e.server.ClearFaults()
		e.pass(time.Minute)
		for _, lease := range leases {
			assert.False(t, e.server.Alive(accessTokenOf(lease)))
		}
	})
}

func TestOAuthRevokeOnDelete(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassD, map[string]any{"revoke_on_delete": true})
		e.add("acme", nil)
		e.lease("acme")
		// The delete comes during an exchange: the newest refresh token is revoked.
		e.server.Inject(oauth2test.Fault{Hold: true, Times: 1})
		go func() { _, _, _ = e.try(logical.UpdateOperation, "tenants/acme/refresh", nil) }()
		synctest.Wait()
		e.ok(logical.DeleteOperation, "tenants/acme", nil)
		synctest.Wait()
		e.server.ClearFaults()
		time.Sleep(time.Second)
		e.pass(time.Minute)
		assert.False(t, e.server.RefreshTokenAlive(e.server.CurrentRefreshToken("acme")))
		assert.Empty(t, e.server.AccessTokens("acme"))

		// A refresh token that is written again is not revoked any more.
		token := e.server.Grant(e.clientID, "other")
		e.write("tenants/other", map[string]any{"refresh_token": token, "verify": false})
		e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointRevocation, Answer: oauth2test.BadGateway})
		e.ok(logical.DeleteOperation, "tenants/other", nil)
		time.Sleep(100 * time.Millisecond)
		assert.EqualValues(t, 1, e.read("config")["pending_revocations"])
		gone := e.server.Grant(e.clientID, "gone")
		e.write("tenants/gone", map[string]any{"refresh_token": gone, "verify": false})
		e.ok(logical.DeleteOperation, "tenants/gone", nil)
		e.write("tenants/other", map[string]any{"refresh_token": token, "verify": false})
		e.server.ClearFaults()
		e.pass(2 * time.Minute)
		assert.NotContains(t, e.read("config"), "pending_revocations")
		e.read("creds/other")
		assert.False(t, e.server.RefreshTokenAlive(gone))
		// A refresh token that a write replaces is not revoked.
		before := len(e.revocations())
		e.write("tenants/other", map[string]any{"refresh_token": e.server.Grant(e.clientID, "other")})
		e.pass(2 * time.Minute)
		assert.Len(t, e.revocations(), before)
	})
}

func TestOAuthRevocationByExchange(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassD, map[string]any{"revocation": "exchange"})
		e.add("acme", nil)
		lease := e.lease("acme")
		e.revoke(lease)
		synctest.Wait()
		assert.False(t, e.server.Alive(accessTokenOf(lease)))
		assert.Equal(t, 2, e.server.Exchanges("acme"))

		// The exchange is still pending after an outage and a restart.
		lease = e.lease("acme")
		e.server.Inject(oauth2test.Fault{Answer: oauth2test.BadGateway})
		e.revoke(lease)
		synctest.Wait()
		assert.EqualValues(t, 1, e.pending("acme"))
		e.crash()
		e.pass(2 * time.Minute)
		assert.True(t, e.server.Alive(accessTokenOf(lease)))
		assert.EqualValues(t, 1, e.read("config")["pending_revocations"])
		assert.EqualValues(t, 1, e.pending("acme"))
		e.server.ClearFaults()
		e.pass(2 * time.Minute)
		assert.Nil(t, e.pending("acme"))
		assert.NotContains(t, e.read("config"), "pending_revocations")
		assert.False(t, e.server.Alive(accessTokenOf(lease)))
		exchanges := e.server.Exchanges("acme")
		e.pass(10 * time.Minute)
		assert.Equal(t, exchanges, e.server.Exchanges("acme"), "one exchange is enough")

		// A delete makes no exchange.
		e.lease("acme")
		e.ok(logical.DeleteOperation, "tenants/acme", nil)
		e.pass(2 * time.Minute)
		assert.Equal(t, exchanges, e.server.Exchanges("acme"))
		e.kept()
	})
}

// A connector shows the revocations that its own tenants wait for, and no other connector's. A write that leaves revocation=exchange drops
// none of them, and does not warn.
func TestOAuthRevocationByExchangeIsShownAtItsConnector(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassD, map[string]any{"revocation": "exchange"})
		e.write("config/other", map[string]any{
			"service": "oauth2", "token_url": e.server.TokenURL(), "connector_id": e.clientID, "connector_secret": e.secret, "revocation": "exchange",
		})
		e.add("acme", nil)
		lease := e.lease("acme")
		e.server.Inject(oauth2test.Fault{Answer: oauth2test.BadGateway})
		e.revoke(lease)
		assert.EqualValues(t, 1, e.read("config")["pending_revocations"])
		assert.NotContains(t, e.read("config/other"), "pending_revocations")
		assert.Nil(t, e.write("config", map[string]any{"exchanges_per_minute": 1000}))
		resp := e.write("config", map[string]any{"revocation": "none"})
		require.NotNil(t, resp)
		assert.Equal(t, []string{"1 revocation that had not been sent yet will not be made."}, resp.Warnings)
	})
}

// Of several tenants with token_per_lease, the refusal of a connector's change names the first by name, each time.
func TestOAuthConnectorChangeNamesTheFirstTenant(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		for _, name := range []string{"f", "e", "d", "c", "b", "a", "g", "h"} {
			e.add(name, map[string]any{"token_per_lease": true})
		}
		_, _, text := e.try(logical.PatchOperation, "config", map[string]any{"revocation": "none"})
		assert.Contains(t, text, `tenant "a" has token_per_lease`)
	})
}

// Writes of a connector that has tenants with token_per_lease, or pending revocations.
func TestOAuthConnectorChanges(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("own", map[string]any{"token_per_lease": true})
		for _, change := range []map[string]any{{"exchange_invalidates": true}, {"revocation": "none"}, {"revocation": nil}} {
			_, code, text := e.try(logical.PatchOperation, "config", change)
			assert.Equal(t, 400, code)
			assert.Contains(t, text, "token_per_lease")
		}
		e.write("config/careful", map[string]any{"service": "oauth2", "token_url": e.server.TokenURL(), "connector_id": e.clientID, "connector_secret": e.secret})
		_, code, text := e.try(logical.UpdateOperation, "tenants/own", map[string]any{"connector": "careful"})
		assert.Equal(t, 400, code)
		assert.Contains(t, text, "token_per_lease")
		e.write("tenants/own", map[string]any{"token_per_lease": false})

		e.add("acme", nil)
		lease := e.lease("acme")
		e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointRevocation, Answer: oauth2test.BadGateway})
		e.revoke(lease)
		resp := e.write("config", map[string]any{"revocation": "none", "revocation_url": nil})
		require.NotNil(t, resp)
		assert.Contains(t, resp.Warnings[0], "1 revocation ")
		e.server.ClearFaults()
		sent := len(e.revocations())
		e.restart()
		e.pass(2 * time.Minute)
		assert.Len(t, e.revocations(), sent)
		assert.True(t, e.server.Alive(accessTokenOf(lease)))
	})
}

// A token is revoked while the start reads the pending revocations: it is sent once.
func TestOAuthRevocationWhileIntentsAreRead(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointRevocation, Delay: 1500 * time.Millisecond})
		e.storage.surround(func(op, key string, do func() error) error {
			switch {
			case op == "list" && key == intentPrefix:
				time.Sleep(time.Second)
			case op == "get" && strings.HasPrefix(key, intentPrefix):
				defer time.Sleep(time.Second) // the intent that was read is out of date when the read returns
			}
			return do()
		})
		e.restart()
		e.revoke(e.lease("acme"))
		e.pass(2 * time.Minute)
		assert.Len(t, e.revocations(), 1)
		assert.Nil(t, e.pending("acme"))
		e.kept()
	})
}

// A token in its last 5 seconds is not sent: at some services the revocation of an expired one ends the grant. It gets no intent either.
func TestOAuthLastMoments(t *testing.T) {
	for left, calls := range map[time.Duration]int{5 * time.Second: 0, 5*time.Second + time.Millisecond: 1} {
		bubble(t, func(t *testing.T) {
			e := newOAuthEngine(t, func(o *oauth2test.Options) { oauth2test.ClassA(o); o.RevokeExpiredEndsGrant = true }, classA)
			e.add("acme", map[string]any{"token_per_lease": true})
			lease := e.lease("acme")
			time.Sleep(time.Hour - left)
			intents := 0
			e.storage.failWith(func(op, key string) error {
				if op == "put" && strings.HasPrefix(key, intentPrefix) {
					intents++
				}
				return nil
			})
			e.revoke(lease)
			e.pass(time.Minute)
			assert.Len(t, e.revocations(), calls)
			assert.Equal(t, calls, intents)
			e.kept()
		})
	}
}

// slowRevocations starts the engine anew, with slow connections to the revocation endpoint.
func (e *oauthEngine) slowRevocations(takes time.Duration) {
	e.stop()
	e.wire = func() http.RoundTripper {
		return slowConnection{e.server.Transport(), takes, e.server.RevocationURL()}
	}
	e.start()
}

// A token whose last 5 seconds begin while its revocation is being connected is not sent. Its revocation is not pending any more.
func TestOAuthTokenEndsWhileItsRevocationConnects(t *testing.T) {
	for left, calls := range map[time.Duration]int{12 * time.Second: 0, 14 * time.Second: 1} {
		bubble(t, func(t *testing.T) {
			e := newOAuthEngine(t, func(o *oauth2test.Options) { oauth2test.ClassA(o); o.RevokeExpiredEndsGrant = true }, classA)
			e.slowRevocations(8 * time.Second)
			e.add("acme", map[string]any{"token_per_lease": true})
			lease := e.lease("acme")
			time.Sleep(time.Hour - left)
			e.revoke(lease)
			e.pass(time.Minute)
			assert.Len(t, e.revocations(), calls)
			assert.Nil(t, e.pending("acme"))
			e.write("tenants/acme/refresh", nil)
			e.kept()
		})
	}
}

// A write gives a tenant token_per_lease while a config write takes from its connector the revocation that token_per_lease needs: the
// config write is refused.
func TestTokenPerLeaseMeetsAConfigWrite(t *testing.T) {
	play := func(t *testing.T, data func(*oauthEngine) map[string]any, hold func(*oauthEngine) (release func())) {
		bubble(t, func(t *testing.T) {
			e := newOAuthEngine(t, oauth2test.ClassA, classA)
			e.add("acme", nil)
			e.waitForIndex()
			write := data(e)
			release := hold(e)
			var codes [2]int
			var writes sync.WaitGroup
			writes.Go(func() { _, codes[0], _ = e.try(logical.UpdateOperation, "tenants/acme", write) })
			synctest.Wait()
			writes.Go(func() {
				_, codes[1], _ = e.try(logical.PatchOperation, "config", map[string]any{"revocation": "none"})
			})
			synctest.Wait()
			release()
			writes.Wait()
			assert.Equal(t, [2]int{204, 400}, codes)
		})
	}
	t.Run("settings", func(t *testing.T) {
		play(t, func(*oauthEngine) map[string]any { return map[string]any{"token_per_lease": true} }, func(e *oauthEngine) func() {
			held := make(chan struct{})
			e.storage.surround(func(op, key string, do func() error) error {
				if op == "put" && key == tenantPrefix+"acme" {
					<-held
				}
				return do()
			})
			return func() { close(held) }
		})
	})
	t.Run("verified", func(t *testing.T) {
		play(t, func(e *oauthEngine) map[string]any {
			return map[string]any{"token_per_lease": true, "refresh_token": e.server.Grant(e.clientID, "acme")}
		}, func(e *oauthEngine) func() {
			e.server.Inject(oauth2test.Fault{Delay: 3 * time.Second}) // a normal answer, after 3 s
			return func() {}
		})
	})
}

// The delete of a tenant that is not in memory revokes its access token.
func TestOAuthDeleteOfATenantThatIsNotInMemory(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		token := accessTokenOf(e.lease("acme"))
		e.restart()
		e.waitForIndex()
		require.Nil(t, e.tenants.named("acme").view.Load().entry)
		e.ok(logical.DeleteOperation, "tenants/acme", nil)
		e.pass(time.Minute)
		assert.False(t, e.server.Alive(token))
	})
}

// The record of an access token for one lease is deleted when the token has expired, also if Vault never revokes the lease. One tick
// deletes all such records. While storage fails the records stay, and the next tick deletes them.
func TestOAuthHeldTokensEndAfterARestart(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", map[string]any{"token_per_lease": true})
		e.lease("acme")
		expires, err := time.Parse(time.RFC3339, e.lease("acme").Data["expire_time"].(string))
		require.NoError(t, err)
		held := func() []string {
			keys, err := e.storage.List(context.Background(), heldPrefix+"acme/")
			require.NoError(t, err)
			return keys
		}
		e.restart()
		e.waitForIndex()
		e.storage.refuse("delete", heldPrefix)
		e.pass(time.Until(expires) + 2*time.Minute)
		synctest.Wait()
		assert.Len(t, held(), 2)
		e.storage.heal()
		e.minute()
		synctest.Wait()
		assert.Empty(t, held())
	})
}

// A lease that is given while storage takes the next access token is a lease on the older one, and its revocation revokes that one.
func TestOAuthLeaseWhileTheNextTokenIsStored(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		old := e.read("token/acme")["access_token"].(string)
		var lease *logical.Response
		e.storage.surround(func(op, key string, do func() error) error {
			if op == "put" && key == tenantPrefix+"acme" && lease == nil {
				lease = e.lease("acme")
			}
			return do()
		})
		e.pass(50 * time.Minute)
		synctest.Wait()
		require.NotNil(t, lease)
		require.Equal(t, old, accessTokenOf(lease))
		current := e.read("token/acme")["access_token"].(string)
		require.NotEqual(t, old, current)
		e.crash()
		synctest.Wait()
		e.revoke(lease)
		assert.False(t, e.server.Alive(old))
		assert.True(t, e.server.Alive(current))
		e.kept()
	})
}

// A delete revokes an access token that memory keeps and storage has not taken yet, and the one that storage has.
func TestOAuthDeleteOfAKeptToken(t *testing.T) {
	for _, stored := range []bool{false, true} {
		bubble(t, func(t *testing.T) {
			e := newOAuthEngine(t, oauth2test.ClassA, classA)
			e.add("acme", nil)
			alive := 1
			if stored {
				e.lease("acme")
				alive = 2
			}
			e.failPuts()
			if stored {
				e.pass(50 * time.Minute) // the renewal comes
			} else {
				_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
				require.Equal(t, 503, status)
			}
			require.Len(t, e.server.AccessTokens("acme"), alive)
			e.storage.heal()
			e.ok(logical.DeleteOperation, "tenants/acme", nil)
			e.pass(time.Minute)
			assert.Empty(t, e.server.AccessTokens("acme"))
		})
	}
}

// A write replaces the refresh token during an exchange: the answer to the older refresh token is not used. Its grant is not ended,
// also with revoke_on_delete, because the write is not a delete.
func TestOAuthWriteOvertakesAnExchange(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassD, map[string]any{"revoke_on_delete": true})
		e.add("acme", nil)
		e.server.Inject(oauth2test.Fault{Hold: true, Times: 1})
		go func() { _, _, _ = e.try(logical.UpdateOperation, "tenants/acme/refresh", nil) }()
		synctest.Wait()
		e.write("tenants/acme", map[string]any{"refresh_token": e.server.Grant(e.clientID, "successor"), "verify": false})
		e.server.ClearFaults()
		e.pass(2 * time.Minute)
		assert.True(t, e.server.RefreshTokenAlive(e.server.CurrentRefreshToken("acme")))
		e.read("creds/acme")
		assert.True(t, e.server.RefreshTokenAlive(e.server.CurrentRefreshToken("successor")))
	})
}

// A token that ends while its revocation waits for a place in the share is not sent.
func TestOAuthTokenEndsBeforeItsRevocationHasAPlace(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.server.Set(func(o *oauth2test.Options) { o.AccessTokenLife = 50 * time.Second })
		e.write("config", map[string]any{"exchanges_per_minute": 5})
		for _, name := range []string{"acme", "b", "c", "d", "e"} {
			e.add(name, nil)
		}
		lease := e.lease("acme")
		for _, name := range []string{"b", "c", "d", "e"} {
			e.read("token/" + name)
		}
		time.Sleep(35 * time.Second)
		begun := time.Now()
		e.revoke(lease)
		assert.Zero(t, time.Since(begun), "Vault's request does not wait for a place in the share")
		assert.EqualValues(t, 1, e.pending("acme"))
		e.pass(2 * time.Minute)
		assert.Empty(t, e.revocations())
		assert.Nil(t, e.pending("acme"))
		e.kept()
	})
}

// A revocation that the service carries out shows that the service accepts the connector again.
func TestOAuthRevocationShowsThatTheConnectorIsGood(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		e.add("other", nil)
		lease := e.lease("acme")
		e.server.Inject(oauth2test.Fault{Times: 1, Answer: oauth2test.Answer{Status: 401, Body: `{"error": "invalid_client"}`}})
		_, status, _ := e.try(logical.ReadOperation, "creds/other", nil)
		require.GreaterOrEqual(t, status, 400)
		e.ok(logical.DeleteOperation, "tenants/other", nil) // an exchange of this tenant would show it too
		e.revoke(lease)
		e.pass(probeEvery + time.Minute)
		assert.False(t, e.server.Alive(accessTokenOf(lease)))
		e.add("next", nil)
		e.read("creds/next")
		e.kept()
	})
}

// A request that ends an access token fails while storage does not take the token's intent, and ends the token when storage takes it.
func TestNothingEndsAnAccessTokenWithoutItsIntent(t *testing.T) {
	refresh := func(e *oauthEngine, _ *logical.Response) int {
		_, status, _ := e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
		return status
	}
	rewrite := func(verify bool) func(*oauthEngine, *logical.Response) int {
		return func(e *oauthEngine, _ *logical.Response) int {
			data := map[string]any{"refresh_token": e.server.Grant(e.clientID, "acme"), "verify": verify}
			_, status, _ := e.try(logical.UpdateOperation, "tenants/acme", data)
			return status
		}
	}
	for name, end := range map[string]func(e *oauthEngine, lease *logical.Response) (status int){
		"refresh":        refresh,
		"write":          rewrite(false),
		"verified write": rewrite(true),
		"delete": func(e *oauthEngine, _ *logical.Response) int {
			_, status, _ := e.try(logical.DeleteOperation, "tenants/acme", nil)
			return status
		},
		"last lease": func(e *oauthEngine, lease *logical.Response) int {
			if e.revokeLease(lease) != nil {
				return http.StatusServiceUnavailable
			}
			return http.StatusOK
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, oauth2test.ClassA, classA)
				e.add("acme", nil)
				lease := e.lease("acme")
				token := accessTokenOf(lease)
				e.storage.refuse("put", intentPrefix)
				assert.GreaterOrEqual(t, end(e, lease), 500)
				assert.True(t, e.server.Alive(token))
				e.storage.heal()
				e.pass(2 * time.Minute)
				if name != "refresh" {
					assert.Less(t, end(e, lease), 300)
				}
				e.pass(2 * time.Minute)
				assert.False(t, e.server.Alive(token))
				assert.Empty(t, e.server.LostGrants())
			})
		})
	}
}

// Storage takes neither the record of an access token for one lease nor its intent: the token is revoked all the same.
func TestTokenForOneLeaseThatStorageTakesNothingOf(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", map[string]any{"token_per_lease": true})
		e.storage.failWith(func(op, key string) error {
			if op == "put" && (strings.HasPrefix(key, intentPrefix) || strings.HasPrefix(key, heldPrefix)) {
				return errStorage
			}
			return nil
		})
		_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
		assert.Equal(t, http.StatusServiceUnavailable, status)
		require.Len(t, e.server.Calls(oauth2test.EndpointToken), 1)
		e.storage.heal()
		e.pass(2 * time.Minute)
		assert.Empty(t, e.server.AccessTokens("acme"))
	})
}
