package backend

import (
	"encoding/json"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/kaizala/kaizalatest"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// The answers to an exchange and to its second try are lost, and then the process dies: the next process tries at once, without a reader.
func TestNextProcessGoesOnAfterLostAnswers(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassD, classD)
		e.add("acme", nil)
		e.lease("acme")
		time.Sleep(time.Second)
		e.server.Inject(oauth2test.Fault{Reset: true, Times: 2})
		_, status, _ := e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
		require.Equal(t, http.StatusServiceUnavailable, status)
		e.crash()
		synctest.Wait()
		time.Sleep(2 * time.Second)
		assert.Equal(t, 2, e.server.Exchanges("acme"))
		e.kept()
	})
}

// An answer breaks off behind its new refresh token. The engine does not send the older one once more, which ends the grant at a service that
// takes that for theft: the next exchange goes on with the new one.
func TestAnswerThatBreaksOffBehindItsRefreshToken(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		access := accessTokenOf(e.lease("acme"))
		// The server sends the members in the order of their names, and all tokens of a kind have the same length.
		answer, err := json.Marshal(map[string]any{"access_token": access, "expires_in": 3600, "refresh_token": e.held("acme")})
		require.NoError(t, err)
		e.server.Inject(oauth2test.Fault{Truncate: true, TruncateAt: len(answer) - len("}"), Times: 1})
		exchanges := e.server.TotalExchanges()
		before := e.held("acme")
		_, status, _ := e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
		assert.Equal(t, http.StatusServiceUnavailable, status)
		assert.Equal(t, exchanges+1, e.server.TotalExchanges())
		assert.NotEqual(t, before, e.held("acme"))
		e.pass(time.Minute)
		assert.True(t, e.server.Alive(accessTokenOf(e.lease("acme"))))
		e.kept()
	})
}

// The answer to an exchange is lost, and then storage cannot read the connector that the second try needs. The tenant works again with
// storage. Readers who come meanwhile are told.
func TestConnectorCannotBeReadAfterALostAnswer(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		e.server.Inject(oauth2test.Fault{Delay: time.Second, Reset: true, Times: 1})
		_, status := e.ask(logical.ReadOperation, "creds/acme", nil)
		e.connectors.invalidate(connectorPrefix + defaultConnector)
		e.storage.refuse("get", connectorPrefix)
		assert.GreaterOrEqual(t, <-status, 500)
		_, again, _ := e.try(logical.ReadOperation, "creds/acme", nil)
		assert.GreaterOrEqual(t, again, 500)
		e.storage.heal()
		e.pass(2 * time.Minute)
		assert.True(t, e.server.Alive(accessTokenOf(e.lease("acme"))))
		e.kept()
	})
}

// The service carries an exchange out that no reader asked for, its answer is lost, and the second try gets an error. The access token
// that the exchange has ended goes to no reader.
func TestTokenThatALostExchangeEndedIsNotReadAnew(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, func(o *oauth2test.Options) {
			oauth2test.ClassD(o)
			o.AccessTokenLife, o.Grace = 24*time.Hour, time.Hour
		}, classD)
		e.add("acme", nil)
		e.write("tenants/acme/refresh", nil) // nobody reads the access token
		old := e.stored("acme").Access.Token
		e.server.Inject(oauth2test.Fault{Process: true, Reset: true, Times: 1})
		e.server.Inject(oauth2test.Fault{Answer: oauth2test.BadGateway, Times: 1})
		e.exchangeUnasked(e.tenants.named("acme"))
		synctest.Wait()
		require.False(t, e.server.Alive(old))
		resp, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
		if status == http.StatusOK {
			assert.True(t, e.server.Alive(accessTokenOf(resp)))
		}
		e.pass(2 * time.Minute)
		assert.True(t, e.server.Alive(accessTokenOf(e.lease("acme"))))
		assert.Empty(t, e.server.LostGrants())
	})
}

// The answer to the planned exchange is lost, and the tries after it fail until the access token has ended: no reader gets that token any
// more.
func TestTokenThatHasEndedIsNotReadAfterALostAnswer(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassD, classD)
		e.add("acme", nil)
		e.lease("acme")
		ends := e.stored("acme").Access.Expires
		e.server.Inject(oauth2test.Fault{Reset: true, Times: 1000})
		e.pass(time.Until(ends))
		require.Equal(t, statusDegraded, e.status("acme"))
		for _, path := range []string{"creds/acme", "token/acme"} {
			_, status, _ := e.try(logical.ReadOperation, path, nil)
			assert.Equal(t, http.StatusServiceUnavailable, status, path)
		}
	})
}

// The answers to an exchange that no reader asked for are lost. Once the connector is written, there is no backoff: the next exchange is
// made at once.
func TestConnectorIsWrittenAfterALostUnaskedExchange(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, func(o *oauth2test.Options) { oauth2test.ClassD(o); o.AccessTokenLife = 24 * time.Hour }, classD)
		e.add("acme", nil)
		e.write("tenants/acme/refresh", nil) // nobody reads the access token
		e.server.Inject(oauth2test.Fault{Reset: true, Times: 12})
		e.exchangeUnasked(e.tenants.named("acme"))
		for len(e.server.Calls()) < 12 { // the backoff has grown
			time.Sleep(time.Second)
		}
		synctest.Wait()
		calls := len(e.server.Calls())
		e.write("config", map[string]any{"request_timeout": "14s"})
		synctest.Wait()
		time.Sleep(time.Second)
		assert.Len(t, e.server.Calls(), calls+1)
		assert.Equal(t, statusOK, e.status("acme"))
	})
}

// The service answers with a new refresh token and no access token, and has ended the older access tokens: readers of the older one are
// warned of that, and the next exchange comes soon.
func TestReadersAfterAnExchangeThatBroughtNoAccessToken(t *testing.T) {
	bubble(t, func(t *testing.T) {
		dead := false
		e := newOAuthEngine(t, func(o *oauth2test.Options) {
			oauth2test.ClassD(o)
			o.Edit = func(_ oauth2test.Endpoint, fields map[string]any) {
				if dead {
					fields["expires_in"] = 0
				}
			}
		}, classD)
		e.add("acme", nil)
		e.lease("acme")
		dead = true
		_, status, _ := e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
		require.Equal(t, http.StatusServiceUnavailable, status)
		dead = false
		resp, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
		if status == http.StatusOK {
			require.Len(t, resp.Warnings, 1)
			assert.Contains(t, resp.Warnings[0], "may have ended this one")
		}
		time.Sleep(3 * time.Second)
		assert.True(t, e.server.Alive(accessTokenOf(e.lease("acme"))))
		e.kept()
	})
}

// The service refuses to exchange the tenant's own refresh token for the verification of a write. After a restart the next process does
// not take that for a lost answer: the leases on the access token live.
func TestRestartAfterARefusedVerification(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassD, classD)
		e.add("acme", nil)
		lease := e.lease("acme")
		time.Sleep(time.Second)
		e.server.Inject(oauth2test.Fault{Answer: oauth2test.BadGateway, Times: 1})
		_, status, _ := e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"connector": "default"})
		require.Equal(t, http.StatusServiceUnavailable, status)
		assert.Equal(t, statusOK, e.status("acme"), "the tenant's own exchange has not failed")
		e.crash()
		e.pass(2 * time.Minute)
		assert.True(t, e.server.Alive(accessTokenOf(lease)))
		assert.Equal(t, 1, e.server.Exchanges("acme"))
	})
}

// Kaizala has no grace for a lost answer: after a restart the next process makes no exchange because the last one has failed.
func TestRestartAfterAFailureAtKaizala(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		token := accessTokenOf(e.lease("acme"))
		time.Sleep(time.Second)
		e.kaizala.Inject(kaizalatest.Fault{Status: 502, Times: 1})
		_, status, _ := e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
		require.Equal(t, http.StatusServiceUnavailable, status)
		calls := e.kaizala.CallCount()
		e.crash()
		e.pass(2 * time.Minute)
		assert.Equal(t, calls, e.kaizala.CallCount())
		assert.Equal(t, token, accessTokenOf(e.lease("acme")))
		assert.Equal(t, statusOK, e.status("acme"))
	})
}

// The answer to a verification of the tenant's own refresh token is lost: Kaizala may have replaced the refresh token, so the tenant's own
// exchange is tried soon, and the status says so.
func TestLostVerificationOfTheTenantsOwnRefreshToken(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		e.read("creds/acme")
		e.kaizala.Inject(kaizalatest.Fault{Reset: true, Times: 1})
		_, status, _ := e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"connector": "default"})
		require.Equal(t, http.StatusServiceUnavailable, status)
		assert.Equal(t, statusDegraded, e.status("acme"))
		calls := e.kaizala.CallCount()
		e.pass(2 * time.Minute)
		assert.Equal(t, calls+1, e.kaizala.CallCount())
		assert.Equal(t, statusOK, e.status("acme"))
	})
}

// The same where the service has a grace period, and the second try of the verification gets an error.
func TestLostVerificationWhoseSecondTryFails(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, func(o *oauth2test.Options) { oauth2test.ClassD(o); o.Grace = time.Hour }, classD)
		e.add("acme", nil)
		old := accessTokenOf(e.lease("acme"))
		e.server.Inject(oauth2test.Fault{Process: true, Reset: true, Times: 1})
		e.server.Inject(oauth2test.Fault{Answer: oauth2test.BadGateway, Times: 1})
		_, status, _ := e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"connector": "default"})
		require.Equal(t, http.StatusServiceUnavailable, status)
		require.False(t, e.server.Alive(old))
		assert.Equal(t, statusDegraded, e.status("acme"))
		e.pass(time.Minute)
		assert.True(t, e.server.Alive(accessTokenOf(e.lease("acme"))))
		assert.Empty(t, e.server.LostGrants())
	})
}

// The answer to an exchange is lost while leases live. Once the backoff is over a reader's exchange is made: he does not wait for the end
// of leases on a token that may have ended.
func TestReaderAfterALostAnswerDoesNotWaitForLeases(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, func(o *oauth2test.Options) { oauth2test.ClassD(o); o.Grace = time.Hour }, classD)
		e.add("acme", nil)
		old := accessTokenOf(e.lease("acme"))
		e.server.Inject(oauth2test.Fault{Process: true, Reset: true, Times: 2})
		_, status, _ := e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
		require.Equal(t, http.StatusServiceUnavailable, status)
		e.index.stop()
		time.Sleep(time.Minute)
		assert.NotEqual(t, old, accessTokenOf(e.lease("acme")))
		assert.True(t, e.server.Alive(accessTokenOf(e.lease("acme"))))
		assert.Empty(t, e.server.LostGrants())
	})
}

// The answer to the exchange for one lease's own token has a new refresh token alone: the reader is told, and the next one gets a token.
func TestOwnExchangeThatBringsNoAccessToken(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", map[string]any{"token_per_lease": true})
		e.server.Inject(noAccessToken)
		_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
		assert.Equal(t, http.StatusServiceUnavailable, status)
		assert.Equal(t, "rotated", e.stored("acme").RefreshToken)
	})
}

// The process dies during an exchange, and storage fails to say what is to be revoked when the next process reads the tenant. The
// exchange is tried soon after storage works again, without a reader.
func TestNextProcessGoesOnOnceStorageWorks(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, func(o *oauth2test.Options) { oauth2test.ClassA(o); o.Grace = time.Hour }, classA)
		e.add("acme", nil)
		e.lease("acme")
		time.Sleep(time.Second)
		e.server.Inject(oauth2test.Fault{Hold: true, Times: 1})
		e.ask(logical.UpdateOperation, "tenants/acme/refresh", nil)
		next := &storage{InmemStorage: e.storage.InmemStorage}
		next.failWith(func(op, key string) error {
			if op != "put" && len(key) >= len(intentPrefix) && key[:len(intentPrefix)] == intentPrefix {
				return errStorage
			}
			return nil
		})
		e.crashOnto(next)
		time.Sleep(5 * time.Second)
		e.storage.heal()
		e.pass(3 * time.Minute)
		assert.Equal(t, 3, e.server.Exchanges("acme"))
		assert.Empty(t, e.server.LostGrants())
	})
}

// The service refuses the refresh token and sends a new one in the same answer. The new one is stored, and the tenant is not rejected,
// though it was before.
func TestRefusalThatBringsANewRefreshToken(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classB)
		e.add("acme", nil)
		e.server.Inject(oauth2test.Fault{Times: 1, Answer: oauth2test.InvalidGrant})
		_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
		require.Equal(t, http.StatusBadRequest, status)
		require.Equal(t, statusRejected, e.status("acme"))
		e.server.Inject(oauth2test.Fault{Times: 1, Answer: oauth2test.Answer{
			Status: 200, Body: `{"error":"invalid_grant","refresh_token":"the-next-one"}`,
		}})
		_, status, _ = e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
		require.GreaterOrEqual(t, status, 400)
		assert.Equal(t, "the-next-one", e.stored("acme").RefreshToken)
		assert.NotEqual(t, statusRejected, e.status("acme"))
	})
}
