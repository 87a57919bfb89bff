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

var noAccessToken = oauth2test.Fault{Times: 1, Answer: oauth2test.Answer{Status: 200, Body: `{"refresh_token":"rotated"}`}}

// Memory keeps tokens that a tenant without token_per_lease has got, or a write that is to give it none. A write of the connector with
// which no tenant may have token_per_lease is not refused because of that.
func TestKeptTokensDoNotClaimTokenPerLease(t *testing.T) {
	for name, op := range map[string]func(*oauthEngine) (int, string){
		"an exchange": func(e *oauthEngine) (int, string) {
			_, status, text := e.try(logical.ReadOperation, "creds/acme", nil)
			return status, text
		},
		"a verification": func(e *oauthEngine) (int, string) {
			_, status, text := e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": e.server.Grant(e.clientID, "acme")})
			return status, text
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, oauth2test.ClassA, classA)
				e.add("acme", nil)
				e.waitForIndex()
				e.failPuts()
				status, text := op(e)
				require.Equal(t, http.StatusServiceUnavailable, status, text)
				e.write("config", map[string]any{"exchange_invalidates": true})
			})
		})
	}
}

// Memory keeps the write that gives a tenant token_per_lease: the connector cannot be written so that it could not be stored any more.
func TestKeptWriteClaimsTokenPerLease(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.waitForIndex()
		e.failPuts()
		_, status, _ := e.try(logical.UpdateOperation, "tenants/acme", map[string]any{
			"refresh_token": e.server.Grant(e.clientID, "acme"), "token_per_lease": true,
		})
		require.Equal(t, http.StatusServiceUnavailable, status)
		_, status, _ = e.try(logical.UpdateOperation, "config", map[string]any{"exchange_invalidates": true})
		assert.Equal(t, http.StatusBadRequest, status)
		e.write("config/other", map[string]any{"service": "oauth2", "token_url": e.server.TokenURL()})
		e.write("config/other", map[string]any{"exchange_invalidates": false})
		e.write("config/other", map[string]any{"exchange_invalidates": true}) // the tenant does not use it
		e.storage.heal()
		e.pass(2 * time.Minute)
		assert.True(t, e.stored("acme").TokenPerLease)
	})
}

// The answer has a new refresh token and no access token, and storage does not take it. It is stored later, and a delete or a write of
// another refresh token before that works too.
func TestKeptRefreshTokenAlone(t *testing.T) {
	for name, own := range map[string]bool{"shared": false, "for one lease": true} {
		for then, f := range map[string]func(*oauthEngine){
			"nothing": func(e *oauthEngine) {
				e.pass(time.Minute)
				assert.Equal(e.t, "rotated", e.stored("acme").RefreshToken)
			},
			"delete": func(e *oauthEngine) {
				e.ok(logical.DeleteOperation, "tenants/acme", nil)
				_, status, _ := e.try(logical.ReadOperation, "tenants/acme", nil)
				assert.Equal(e.t, http.StatusNotFound, status)
				assert.Nil(e.t, e.stored("acme"))
			},
			"write": func(e *oauthEngine) {
				e.write("tenants/acme", map[string]any{"refresh_token": e.server.Grant(e.clientID, "acme"), "verify": false})
				assert.True(e.t, e.server.Alive(accessTokenOf(e.lease("acme"))))
			},
		} {
			t.Run(name+" "+then, func(t *testing.T) {
				bubble(t, func(t *testing.T) {
					e := newOAuthEngine(t, oauth2test.ClassA, classA)
					e.add("acme", map[string]any{"token_per_lease": own})
					e.server.Inject(noAccessToken)
					e.failPuts()
					_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
					require.Equal(t, http.StatusServiceUnavailable, status)
					require.Equal(t, "rotated", e.held("acme"))
					e.storage.heal()
					f(e)
				})
			})
		}
	}
}

// The write that an exchange verifies does not go with a write that came meanwhile. The new refresh token is stored without its settings,
// and the tenant's token_per_lease stays off.
func TestVerifiedWriteWhoseSettingsDoNotFitAnyMore(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		e.server.Inject(oauth2test.Fault{Delay: 2 * time.Second, Times: 1})
		_, status := e.ask(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": e.server.Grant(e.clientID, "acme"), "ttl": "2h"})
		e.write("tenants/acme", map[string]any{"max_ttl": "1h"})
		assert.Less(t, <-status, 300)
		entry := e.stored("acme")
		assert.Equal(t, e.server.CurrentRefreshToken("acme"), entry.RefreshToken)
		assert.Zero(t, entry.TTL)
		assert.False(t, entry.TokenPerLease)
		e.kept()
	})
}

// An operator gives the tenant another connector during an exchange, and leaves the refresh token as it was. The new refresh token is
// stored with that connector. The access token is of the older connector: no reader gets it, and it is revoked.
func TestConnectorIsWrittenDuringAnExchange(t *testing.T) {
	for name, own := range map[string]bool{"shared": false, "for one lease": true} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, oauth2test.ClassA, classA)
				other := map[string]any{
					"service": "oauth2", "token_url": e.server.TokenURL(), "revocation_url": e.server.RevocationURL(),
					"connector_id": e.clientID, "connector_secret": e.secret,
				}
				for field, value := range classA {
					other[field] = value
				}
				e.write("config/other", other)
				e.add("acme", map[string]any{"token_per_lease": own})
				e.server.Inject(oauth2test.Fault{Delay: 2 * time.Second, Times: 1})
				resp, status := e.ask(logical.ReadOperation, "creds/acme", nil)
				e.write("tenants/acme", map[string]any{"connector": "other", "verify": false})
				lease := <-resp
				require.Equal(t, http.StatusOK, <-status)
				e.pass(time.Minute)
				assert.Equal(t, "other", e.stored("acme").Connector)
				assert.Equal(t, e.server.CurrentRefreshToken("acme"), e.stored("acme").RefreshToken)
				first := e.server.Calls(oauth2test.EndpointToken)[0].AccessToken
				assert.False(t, e.server.Alive(first))
				assert.NotEqual(t, first, accessTokenOf(lease))
				assert.True(t, e.server.Alive(accessTokenOf(lease)))
				e.kept()
			})
		})
	}
}

// Storage takes a verified write with a new refresh token, and reports an error, or takes it at the second try. What it has then is right:
// no further exchange is made, and the access token lives.
func TestVerifiedWriteThatIsStoredLater(t *testing.T) {
	for name, fail := range map[string]func(*oauthEngine){
		"taken":   func(e *oauthEngine) { e.storage.unheard("put", tenantPrefix) },
		"refused": func(e *oauthEngine) { e.failPuts() },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, oauth2test.ClassA, classA)
				e.add("acme", nil)
				fail(e)
				_, status, _ := e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": e.server.Grant(e.clientID, "acme")})
				require.Equal(t, http.StatusServiceUnavailable, status)
				e.storage.heal()
				e.pass(2 * time.Minute)
				assert.True(t, e.server.Alive(accessTokenOf(e.lease("acme"))))
				assert.Len(t, e.server.Calls(), 1)
				e.kept()
			})
		})
	}
}

// A renewal is not stored yet when a refresh comes. The refresh retires the access token that readers had.
func TestRefreshRetiresTheTokenThatAKeptOneReplaces(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		lease := e.lease("acme")
		e.failPuts()
		time.Sleep(50 * time.Minute)
		synctest.Wait()
		require.NotEqual(t, e.held("acme"), e.stored("acme").RefreshToken)
		e.storage.heal()
		e.write("tenants/acme/refresh", nil)
		e.pass(time.Minute)
		assert.False(t, e.server.Alive(accessTokenOf(lease)))
		assert.True(t, e.server.Alive(accessTokenOf(e.lease("acme"))))
		e.kept()
	})
}

// The first access token of a tenant is not stored yet, and storage takes no intent. A delete fails, or it has the token revoked.
func TestDeleteThatCannotGiveUpAKeptToken(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		e.failPuts()
		_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
		require.Equal(t, http.StatusServiceUnavailable, status)
		e.storage.refuse("put", intentPrefix)
		_, status, _ = e.try(logical.DeleteOperation, "tenants/acme", nil)
		assert.GreaterOrEqual(t, status, 500)
		e.storage.heal()
		e.ok(logical.DeleteOperation, "tenants/acme", nil)
		e.pass(time.Minute)
		assert.Empty(t, e.server.AccessTokens("acme"))
	})
}

// A node keeps tokens that storage has not taken, and another node exchanges or writes the refresh token meanwhile. That is no failed
// exchange, also where a write of the tenant finds it.
func TestKeptTokensOfBeforeAnotherNodesWriteAreNoFailure(t *testing.T) {
	for name, meanwhile := range map[string]func(other *oauthEngine){
		"exchange": func(other *oauthEngine) { other.read("creds/acme") },
		"write":    func(other *oauthEngine) { other.add("acme", nil) },
	} {
		for then, f := range map[string]func(*oauthEngine){
			"nothing": func(e *oauthEngine) { e.pass(3 * time.Minute) },
			"write":   func(e *oauthEngine) { e.write("tenants/acme", map[string]any{"ttl": "1h"}) },
		} {
			t.Run(name+" "+then, func(t *testing.T) {
				bubble(t, func(t *testing.T) {
					e := newOAuthEngine(t, func(o *oauth2test.Options) { oauth2test.ClassC(o); o.Grace = time.Minute }, classB)
					other := e.swapUnstored()
					time.Sleep(time.Second)
					failed := e.log.count("an exchange failed")
					meanwhile(other)
					stored := e.stored("acme").RefreshToken
					other.swap(e)
					f(e)
					synctest.Wait()
					assert.Equal(t, failed, e.log.count("an exchange failed"))
					assert.Equal(t, stored, e.stored("acme").RefreshToken)
					assert.NotEqual(t, statusDegraded, e.status("acme"))
				})
			})
		}
	}
}

// A node keeps a new refresh token, and another node deletes the tenant. Once the first node may write again, it has the refresh token
// revoked that nobody else knows.
func TestKeptRefreshTokenOfATenantThatAnotherNodeDeletes(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, func(o *oauth2test.Options) { oauth2test.ClassA(o); o.Grace = time.Minute }, revokeAll)
		other := e.swapUnstored()
		kept := e.held("acme")
		other.ok(logical.DeleteOperation, "tenants/acme", nil)
		other.swap(e)
		e.pass(3 * time.Minute)
		var sent []string
		for _, c := range e.revocations() {
			sent = append(sent, c.Token)
		}
		assert.Contains(t, sent, kept)
	})
}

// Two leases are on an access token that a newer one has replaced. Another node becomes the active one, sees one of them end, and writes
// the tenant: the first node's count is not known any more. The revocation of the other lease ends the token.
func TestCountOfAReplacedTokenOfBeforeAnotherNode(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		one, two := e.lease("acme"), e.lease("acme")
		e.pass(50 * time.Minute)
		require.NotEqual(t, accessTokenOf(one), e.read("token/acme")["access_token"])
		other := e.newStandby()
		e.swap(other)
		one.Secret.IssueTime, one.Secret.TTL = time.Now().Add(-time.Minute), time.Minute
		other.revoke(one) // it has come to its end
		other.write("tenants/acme", map[string]any{"ttl": "1h"})
		other.swap(e)
		e.revoke(two)
		assert.False(t, e.server.Alive(accessTokenOf(two)))
		e.kept()
	})
}
