package backend

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// Storage fails during a delete of a tenant or the revocation of a lease: the request fails. When it is repeated and succeeds, no token
// that it should end is alive at the service.
func TestOAuthStorageFailsWhileTokensAreGivenUp(t *testing.T) {
	older := func(e *oauthEngine) func() (int, string) { // a lease lives on an access token that a newer token has replaced
		e.add("acme", nil)
		e.lease("acme")
		e.pass(50 * time.Minute)
		require.Contains(e.t, e.storedText(), heldPrefix)
		return e.deleteAcme
	}
	used := func(e *oauthEngine) func() (int, string) {
		e.add("acme", nil)
		e.lease("acme")
		return e.deleteAcme
	}
	shared := func(e *oauthEngine) func() (int, string) {
		e.add("acme", nil)
		lease := e.lease("acme")
		return func() (int, string) { return e.revokeStatus(lease) }
	}
	own := func(e *oauthEngine) func() (int, string) {
		e.add("acme", map[string]any{"token_per_lease": true})
		lease := e.lease("acme")
		return func() (int, string) { return e.revokeStatus(lease) }
	}
	unused := func(e *oauthEngine) func() (int, string) {
		e.add("acme", nil)
		return e.deleteAcme
	}
	for name, c := range map[string]struct {
		begin    func(*oauthEngine) func() (int, string)
		op, key  string
		restarts bool // memory has neither the tenant nor its connector
	}{
		"older tokens, list":                {begin: older, op: "list", key: heldPrefix + "acme/"},
		"older tokens, get":                 {begin: older, op: "get", key: heldPrefix},
		"older tokens, intent":              {begin: older, op: "put", key: intentPrefix},
		"older tokens, record":              {begin: older, op: "delete", key: heldPrefix},
		"connector of a deleted tenant":     {begin: used, op: "get", key: connectorPrefix, restarts: true},
		"connector of an unused tenant":     {begin: unused, op: "get", key: connectorPrefix, restarts: true},
		"connector of a lease":              {begin: shared, op: "get", key: connectorPrefix, restarts: true},
		"intent of a lease":                 {begin: shared, op: "put", key: intentPrefix},
		"tenant of a lease":                 {begin: shared, op: "get", key: tenantPrefix, restarts: true},
		"own token, get":                    {begin: own, op: "get", key: heldPrefix},
		"own token, intent":                 {begin: own, op: "put", key: intentPrefix},
		"own token, record":                 {begin: own, op: "delete", key: heldPrefix},
		"refresh token's intent":            {begin: unused, op: "put", key: intentPrefix},
		"tenant that is not in memory, get": {begin: unused, op: "get", key: tenantPrefix, restarts: true},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, oauth2test.ClassA, revokeAll)
				e.waitForIndex()
				try := c.begin(e)
				refuse := func(s *storage) {
					s.failWith(func(op, key string) error {
						if op == c.op && strings.HasPrefix(key, c.key) || c.restarts && op == "list" && key == intentPrefix {
							return errStorage
						}
						return nil
					})
				}
				if c.restarts {
					next := &storage{InmemStorage: e.storage.InmemStorage}
					refuse(next)
					e.crashOnto(next)
				} else {
					refuse(e.storage)
				}
				synctest.Wait()
				status, text := try()
				assert.Equal(t, 500, status, text)
				e.storage.heal()
				status, text = try()
				assert.Less(t, status, 300, text)
				e.pass(2 * time.Minute)
				assert.Empty(t, e.server.AccessTokens("acme"))
				assert.Equal(t, e.stored("acme") != nil, e.server.RefreshTokenAlive(e.server.CurrentRefreshToken("acme")))
				assert.NotContains(t, e.storedText(), intentPrefix)
				assert.NotContains(t, e.storedText(), heldPrefix)
			})
		})
	}
}

func (e *oauthEngine) deleteAcme() (int, string) {
	_, status, text := e.try(logical.DeleteOperation, "tenants/acme", nil)
	return status, text
}

func (e *oauthEngine) revokeStatus(lease *logical.Response) (int, string) {
	resp, err := e.HandleRequest(context.Background(), &logical.Request{Operation: logical.RevokeOperation, Secret: lease.Secret, Storage: e.storage})
	return statusOf(logical.RevokeOperation, resp, err)
}

// A process ends between the two writes that give an access token up: the next process does not hand the token out, also if storage
// fails to read the intents or the connector at first.
func TestOAuthTokenThatIsGivenUpByHalf(t *testing.T) {
	for _, fails := range []string{intentPrefix, connectorPrefix} {
		bubble(t, func(t *testing.T) {
			e := newOAuthEngine(t, oauth2test.ClassA, classA)
			e.add("acme", nil)
			lease := e.lease("acme")
			e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointRevocation, Hang: true})
			e.waitForIndex()
			e.storage.refuse("put", tenantPrefix)
			require.Error(t, e.revokeLease(lease))
			next := &storage{InmemStorage: e.storage.InmemStorage}
			next.failWith(func(op, key string) error {
				if op == "get" && strings.HasPrefix(key, fails) || op == "list" && key == intentPrefix {
					return errStorage
				}
				return nil
			})
			e.crashOnto(next)
			synctest.Wait()
			_, status, _ := e.try(logical.ReadOperation, "token/acme", nil)
			assert.GreaterOrEqual(t, status, 500)
			next.refuse("list", intentPrefix)
			assert.NotEqual(t, accessTokenOf(lease), e.read("token/acme")["access_token"])
			e.storage.heal()
			e.server.ClearFaults()
			e.pass(2 * time.Minute)
			assert.False(t, e.server.Alive(accessTokenOf(lease)))
		})
	}
}

// Storage does not take that an access token was given up, which an exchange has to end: when storage takes that again, the exchange is
// made at once.
func TestOAuthExchangeIsMadeOnceStorageKnowsThatItIsOwed(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassD, map[string]any{"revocation": "exchange"})
		e.add("acme", nil)
		lease := e.lease("acme")
		e.failPuts()
		require.Error(t, e.revokeLease(lease))
		e.pass(5 * time.Minute)
		synctest.Wait()
		e.status("acme") // which reads the tenant from storage, access token and all
		require.True(t, e.server.Alive(accessTokenOf(lease)))
		e.storage.heal()
		e.pass(time.Minute)
		synctest.Wait()
		assert.False(t, e.server.Alive(accessTokenOf(lease)))
		assert.Equal(t, 2, e.server.Exchanges("acme"))
	})
}

// The start of the engine cannot read a key: the engine reads it again within minutes.
func TestStartThatStorageFails(t *testing.T) {
	for _, c := range []struct{ op, key string }{
		{"list", intentPrefix}, {"list", intentPrefix + "default/"}, {"get", intentPrefix}, {"list", heldPrefix}, {"get", heldPrefix},
		{"list", attemptKeys}, {"get", attemptKeys}, {"list", stateKeys}, {"get", stateKeys}, {"get", connectorPrefix},
	} {
		t.Run(c.op+" "+c.key, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, oauth2test.ClassA, map[string]any{
					"revocation": "access_token", "exchange_invalidates": false, "authorization_url": "https://as.example/authorize", "redirect_uris": callbackTo,
				})
				e.add("acme", nil)
				lease := e.lease("acme")
				e.lease("acme")
				e.pass(50 * time.Minute)
				e.write("tenants/other/authorize", nil)
				e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointRevocation, Answer: oauth2test.BadGateway})
				e.revoke(e.lease("acme"))
				synctest.Wait()
				next := &storage{InmemStorage: e.storage.InmemStorage}
				next.refuse(c.op, c.key)
				e.crashOnto(next)
				e.pass(2 * time.Minute)
				e.backend.revocations.mu.Lock()
				loaded := e.backend.revocations.loaded
				e.backend.revocations.mu.Unlock()
				e.grants.mu.Lock()
				loaded = loaded && e.grants.loaded
				e.grants.mu.Unlock()
				assert.Equal(t, c.key == connectorPrefix, loaded)
				assert.Contains(t, e.storedText(), intentPrefix)
				_, status, _ := e.try(logical.UpdateOperation, "tenants/next", map[string]any{"refresh_token": e.server.Grant(e.clientID, "next"), "verify": false})
				assert.Equal(t, slices.Contains([]string{attemptKeys, stateKeys}, c.key), status == 204, "the engine does not know whether this refresh token waits for its revocation")
				e.storage.heal()
				e.server.ClearFaults()
				e.pass(2 * time.Minute)
				assert.NotContains(t, e.storedText(), intentPrefix, "the token is revoked")
				e.pass(2 * time.Hour)
				for _, over := range []string{heldPrefix, stateKeys} {
					assert.NotContains(t, e.storedText(), over)
				}
				assert.False(t, e.server.Alive(accessTokenOf(lease)))
				e.kept()
			})
		})
	}
}

// A standby revokes nothing and deletes no records, and does both when it becomes the active node.
func TestOAuthRevocationsOnANodeThatMayNotWrite(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, func(o *oauth2test.Options) { oauth2test.ClassA(o); o.AccessTokenLife = 5 * time.Minute }, classA)
		e.add("acme", map[string]any{"token_per_lease": true})
		lease := e.lease("acme")
		e.lease("acme")
		e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointRevocation, Answer: oauth2test.BadGateway, Times: 1})
		e.revoke(lease)
		e.system.replication.Store(uint32(consts.ReplicationPerformanceStandby))
		for range 8 {
			time.Sleep(20 * time.Second)
			e.minute()
		}
		assert.Len(t, e.revocations(), 1)
		e.system.replication.Store(0)
		e.minute()
		synctest.Wait()
		assert.False(t, e.server.Alive(accessTokenOf(lease)))

		e.system.replication.Store(uint32(consts.ReplicationPerformanceStandby))
		e.storage.failWith(func(op, key string) error {
			if op == "delete" {
				t.Error("the standby deletes", key)
			}
			return nil
		})
		e.pass(10 * time.Minute)
		synctest.Wait() // the last minute's work ends while the node is a standby
		assert.Contains(t, e.storedText(), heldPrefix)
		e.storage.heal()
		e.system.replication.Store(0)
		swept := 0
		e.storage.failWith(func(op, key string) error {
			if op == "delete" && strings.HasPrefix(key, heldPrefix) {
				swept++
			}
			return nil
		})
		e.pass(5 * time.Minute)
		assert.Equal(t, 1, swept, "one delete")
		e.kept()
	})
}

// Storage takes an intent and reports an error, and Vault does not repeat the revocation: the token is revoked all the same, and the
// intent is deleted without a restart.
func TestOAuthIntentIsStoredWithoutAWord(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		lease := e.lease("acme")
		e.pass(50 * time.Minute)
		current := e.read("token/acme")["access_token"].(string)
		require.NotEqual(t, accessTokenOf(lease), current, "a newer access token has replaced it")
		e.storage.surround(func(op, key string, do func() error) error {
			err := do()
			if op == "put" && strings.HasPrefix(key, intentPrefix) {
				return errStorage
			}
			return err
		})
		require.Error(t, e.revokeLease(lease))
		e.storage.heal()
		e.pass(2 * time.Minute)
		synctest.Wait()
		assert.False(t, e.server.Alive(accessTokenOf(lease)))
		assert.True(t, e.server.Alive(current))
		assert.NotContains(t, e.storedText(), intentPrefix)
		assert.Len(t, e.revocations(), 1)
		e.kept()
	})
}

// Another node stores or deletes an intent or a record: this node acts on that when the key is invalidated.
func TestOAuthRevocationsOfAnotherNode(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		lease := e.lease("acme")
		e.waitForIndex()
		e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointRevocation, Answer: oauth2test.BadGateway})
		e.revoke(lease)
		synctest.Wait()
		keys, err := e.storage.List(t.Context(), intentPrefix+"default/")
		require.NoError(t, err)
		require.Len(t, keys, 1)
		key := intentPrefix + "default/" + keys[0]
		text := e.get(key)
		require.NoError(t, e.storage.InmemStorage.Delete(t.Context(), key))
		e.InvalidateKey(t.Context(), key)
		e.server.ClearFaults()
		calls := len(e.revocations())
		e.pass(2 * time.Minute)
		assert.Len(t, e.revocations(), calls)
		e.put(key, []byte(text))
		e.pass(2 * time.Minute)
		assert.Len(t, e.revocations(), calls, "the key is not invalidated yet")
		e.InvalidateKey(t.Context(), key)
		e.pass(time.Minute)
		synctest.Wait()
		assert.False(t, e.server.Alive(accessTokenOf(lease)))

		record := heldPrefix + "acme/X"
		require.NoError(t, putEntry(t.Context(), e.storage.InmemStorage, record, &held{Format: entryFormat, Connector: "default", Expires: time.Now()}))
		e.pass(2 * time.Minute)
		assert.NotEmpty(t, e.get(record), "the key is not invalidated yet")
		e.InvalidateKey(t.Context(), record)
		e.pass(2 * time.Minute)
		synctest.Wait()
		assert.Empty(t, e.get(record))
	})
}

// How long the revocation of a lease waits for its call, and how many calls are made at once.
func TestOAuthRevocationsThatAreSlow(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		leases := make([]*logical.Response, 40)
		for i := range leases {
			e.add(fmt.Sprint("t", i), nil)
			leases[i] = e.lease(fmt.Sprint("t", i))
		}
		next := 0
		revoke := func(fault oauth2test.Fault) time.Duration {
			fault.Endpoint = oauth2test.EndpointRevocation
			e.server.Inject(fault)
			begun, token := time.Now(), accessTokenOf(leases[next])
			e.revoke(leases[next])
			next++
			synctest.Wait()
			assert.True(t, slices.ContainsFunc(e.revocations(), func(c oauth2test.Call) bool { return c.Token == token }), "the call is made at once, whether or not the request waits for it")
			return time.Since(begun)
		}
		slow := oauth2test.Fault{Delay: 3 * time.Second, Times: 1}
		assert.Equal(t, 3*time.Second, revoke(slow))
		assert.Zero(t, revoke(slow), "the service is slow")
		time.Sleep(2 * time.Minute)
		assert.Zero(t, revoke(oauth2test.Fault{Delay: time.Second, Times: 1}), "the last call was slow")
		time.Sleep(2 * time.Minute)
		for range 6 {
			assert.Equal(t, 1900*time.Millisecond, revoke(oauth2test.Fault{Delay: 1900 * time.Millisecond, Times: 1}))
		}
		assert.Zero(t, revoke(oauth2test.Fault{Delay: 1900 * time.Millisecond, Times: 1}), "requests have waited for more than 10 s of this minute")
		time.Sleep(2 * time.Minute)
		assert.Equal(t, time.Second, revoke(oauth2test.Fault{Delay: time.Second, Times: 1}), "the waits are more than a minute ago")
		assert.Zero(t, revoke(oauth2test.Fault{Times: 1, Answer: oauth2test.BadGateway}))
		assert.Zero(t, revoke(slow), "the service fails")

		time.Sleep(time.Minute)
		assert.Zero(t, revoke(oauth2test.Fault{Delay: time.Millisecond, Times: 1}))
		time.Sleep(time.Second)
		assert.Equal(t, 3*time.Second, revoke(slow))
		e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointRevocation, Delay: 10 * time.Second})
		e.revoke(leases[next:]...)
		for i := range 4 {
			synctest.Wait()
			under := slices.DeleteFunc(e.revocations(), func(c oauth2test.Call) bool { return !c.End.IsZero() })
			assert.Len(t, under, 4, "calls at once")
			if i == 2 {
				e.crash()
			} else {
				time.Sleep(10 * time.Second)
			}
		}
		e.server.ClearFaults()
		e.pass(time.Minute)
		for _, lease := range leases {
			assert.False(t, e.server.Alive(accessTokenOf(lease)))
		}
		e.kept()
	})
}

// Vault may revoke a lease twice at the same moment: the service is called once.
func TestOAuthLeaseIsRevokedTwiceAtOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", map[string]any{"token_per_lease": true})
		lease := e.lease("acme")
		e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointRevocation, Delay: 2 * time.Second})
		e.storage.surround(func(op, key string, do func() error) error {
			if op == "put" && strings.HasPrefix(key, intentPrefix) {
				time.Sleep(time.Second) // until both revocations have read the token's record
			}
			return do()
		})
		begun := time.Now()
		var both sync.WaitGroup
		for range 2 {
			both.Go(func() { assert.NoError(t, e.revokeLease(lease)) })
		}
		both.Wait()
		assert.Equal(t, 3*time.Second, time.Since(begun))
		assert.False(t, e.server.Alive(accessTokenOf(lease)))
		assert.Len(t, e.revocations(), 1)
	})
}

// Storage deletes a tenant and reports an error: the refresh token is not revoked before a read of storage shows that the tenant is
// gone.
func TestOAuthDeleteInDoubt(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassD, map[string]any{"revoke_on_delete": true})
		e.add("acme", nil)
		e.waitForIndex()
		e.storage.unheard("delete", tenantPrefix)
		require.Equal(t, 500, first(e.deleteAcme()))
		e.storage.heal()
		e.storage.refuse("get", tenantPrefix)
		e.pass(2 * time.Minute)
		assert.Empty(t, e.revocations())
		e.storage.heal()
		e.pass(time.Minute)
		assert.False(t, e.server.RefreshTokenAlive(e.server.CurrentRefreshToken("acme")))
	})
}

func first[A, B any](a A, _ B) A { return a }

// A write of the connector drops the pending revocations that the connector cannot make any more, and no others.
func TestOAuthConnectorWriteDrops(t *testing.T) {
	for _, c := range []struct {
		change  map[string]any
		dropped string
	}{
		{map[string]any{"revocation": "none"}, "1 revocation "},
		{map[string]any{"revocation": "none", "revoke_on_delete": false}, "2 revocations "},
		{map[string]any{"keep_alive": "24h"}, ""},
	} {
		bubble(t, func(t *testing.T) {
			e := newOAuthEngine(t, oauth2test.ClassA, revokeAll)
			e.add("acme", nil)
			e.add("gone", nil)
			lease := e.lease("acme")
			e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointRevocation, Answer: oauth2test.BadGateway})
			e.revoke(lease)
			e.ok(logical.DeleteOperation, "tenants/gone", nil)
			synctest.Wait()
			if c.dropped != "" {
				e.storage.refuse("delete", intentPrefix)
				_, status, _ := e.try(logical.UpdateOperation, "config", c.change)
				assert.Equal(t, 500, status, "storage does not delete the intents")
				e.storage.heal()
			}
			resp := e.write("config", c.change)
			if c.dropped == "" {
				assert.Nil(t, resp)
			} else {
				assert.Contains(t, resp.Warnings[0], c.dropped)
			}
			e.server.ClearFaults()
			e.pass(2 * time.Minute)
			assert.Equal(t, c.dropped != "", e.server.Alive(accessTokenOf(lease)))
			assert.Equal(t, c.dropped == "2 revocations ", e.server.RefreshTokenAlive(e.server.CurrentRefreshToken("gone")))
		})
	}
}

// The service refuses the connector, so no revocation can be sent: a token that has expired is not pending any more.
func TestOAuthTokenEndsWhileTheConnectorIsRefused(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, func(o *oauth2test.Options) { oauth2test.ClassA(o); o.AccessTokenLife = 5 * time.Minute }, classA)
		e.add("acme", nil)
		lease := e.lease("acme")
		e.server.NewClientSecret(e.clientID)
		e.revoke(lease)
		e.pass(2 * time.Minute)
		assert.Equal(t, 1, e.pending("acme"))
		e.pass(4 * time.Minute)
		assert.Nil(t, e.pending("acme"))
		assert.Len(t, e.revocations(), 1)
	})
}

// The service wants no call for ten hours, and a token ends meanwhile: its revocation is not pending any more, and its connector can be
// deleted.
func TestOAuthTokenEndsDuringAPause(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, func(o *oauth2test.Options) { oauth2test.ClassA(o); o.AccessTokenLife = 5 * time.Minute }, classA)
		e.add("acme", nil)
		lease := e.lease("acme")
		e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointRevocation, Times: 1, Answer: oauth2test.TooManyRequests(10 * time.Hour)})
		e.revoke(lease)
		e.pass(2 * time.Minute)
		assert.EqualValues(t, 1, e.pending("acme"))
		e.pass(4 * time.Minute)
		assert.Nil(t, e.pending("acme"))
		assert.Len(t, e.revocations(), 1)
		e.ok(logical.DeleteOperation, "tenants/acme", nil)
		e.ok(logical.DeleteOperation, "config", nil)
	})
}

// A write of a refresh token whose revocation is pending fails if it cannot delete the intent: the tenant is not written, and the
// refresh token is revoked.
func TestOAuthRefreshTokenThatCannotBeSpared(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassD, map[string]any{"revoke_on_delete": true})
		e.add("acme", nil)
		token := e.server.CurrentRefreshToken("acme")
		e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointRevocation, Answer: oauth2test.BadGateway})
		e.ok(logical.DeleteOperation, "tenants/acme", nil)
		synctest.Wait()
		write := map[string]any{"refresh_token": token, "verify": false}
		e.storage.refuse("delete", intentPrefix)
		_, status, _ := e.try(logical.UpdateOperation, "tenants/acme", write)
		assert.Equal(t, 500, status)
		e.storage.heal()
		assert.Nil(t, e.stored("acme"))
		e.write("tenants/acme", write)
		assert.NotContains(t, e.storedText(), intentPrefix, "the write deletes the intent")
		e.ok(logical.DeleteOperation, "tenants/acme", nil)
		e.storage.refuse("delete", intentPrefix)
		_, status, _ = e.try(logical.UpdateOperation, "tenants/acme", write)
		assert.Equal(t, 500, status)
		e.storage.heal()
		e.server.ClearFaults()
		e.pass(2 * time.Minute)
		assert.False(t, e.server.RefreshTokenAlive(token))
	})
}

// A delete reads the tenant from storage only if it has to revoke its refresh token.
func TestDeleteReadsWhatItRevokesAlone(t *testing.T) {
	for name, c := range map[string]struct {
		fields map[string]any
		status int
	}{
		"nothing": {nil, 204}, "the refresh token": {map[string]any{"revoke_on_delete": true}, 500},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, oauth2test.ClassD, c.fields)
				e.add("acme", nil)
				e.restart()
				e.waitForIndex()
				e.storage.refuse("get", tenantPrefix)
				e.storage.surround(func(op, key string, do func() error) error {
					assert.NotEqual(t, "list "+heldPrefix+"acme/", op+" "+key)
					return do()
				})
				assert.Equal(t, c.status, first(e.deleteAcme()))
				e.storage.heal()
				e.ok(logical.DeleteOperation, "tenants/acme", nil)
				e.pass(time.Minute)
				assert.Equal(t, c.fields == nil, e.server.RefreshTokenAlive(e.server.CurrentRefreshToken("acme")))
			})
		})
	}
}

// The write of a tenant whose connector revokes nothing does not look for older access tokens.
func TestWriteReadsWhatItRevokesAlone(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassD, nil)
		e.add("acme", nil)
		e.lease("acme")
		e.storage.surround(func(op, key string, do func() error) error {
			assert.NotEqual(t, "list "+heldPrefix+"acme/", op+" "+key)
			return do()
		})
		e.add("acme", nil)
	})
}

// Storage fails for a moment to read the record of an access token for one lease: the token still belongs to its lease, and lives.
func TestOAuthOwnTokenWhoseRecordCannotBeRead(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", map[string]any{"token_per_lease": true})
		lease := e.lease("acme")
		e.restart()
		e.waitForIndex()
		e.storage.refuse("get", heldPrefix)
		_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
		assert.Equal(t, 503, status)
		e.storage.heal()
		e.pass(2 * time.Minute)
		assert.True(t, e.server.Alive(accessTokenOf(lease)))
		e.lease("acme")
		assert.True(t, e.server.Alive(accessTokenOf(lease)))
	})
}

// A record that is no valid JSON does not stop the work on other records: leases are revoked, and tenants deleted.
func TestUnreadableRecords(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, revokeAll)
		e.add("acme", map[string]any{"token_per_lease": true})
		lease := e.lease("acme")
		e.add("other", nil)
		other := e.lease("other")
		e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointRevocation, Answer: oauth2test.BadGateway})
		e.revoke(other)
		synctest.Wait()
		generation := lease.Secret.InternalData[leaseGeneration].(string)
		for _, key := range []string{intentPrefix + "default/x", heldPrefix + "acme/" + generation, attemptKeys + "acme", stateKeys + "x"} {
			e.put(key, []byte("{"))
		}
		e.put(connectorPrefix+"broken", []byte("{"))
		require.NoError(t, putEntry(t.Context(), e.storage.InmemStorage, tenantPrefix+"lost", &tenantEntry{
			Format: entryFormat, Connector: "broken", RefreshToken: "r", Access: &accessEntry{Token: "a", Generation: "G", Obtained: time.Now(), Expires: time.Now().Add(time.Hour)},
		}))
		e.crash()
		e.server.ClearFaults()
		e.pass(2 * time.Minute)
		assert.False(t, e.server.Alive(accessTokenOf(other)))
		e.grants.mu.Lock()
		assert.True(t, e.grants.loaded)
		e.grants.mu.Unlock()
		e.revoke(lease, &logical.Response{Secret: &logical.Secret{
			LeaseOptions: logical.LeaseOptions{TTL: time.Hour, IssueTime: time.Now()},
			InternalData: map[string]any{"secret_type": accessTokenType, leaseTenant: "lost", leaseGeneration: "G", leaseExpires: stamp(time.Now().Add(time.Hour))},
		}})
		for _, name := range []string{"acme", "other", "lost"} {
			e.ok(logical.DeleteOperation, "tenants/"+name, nil)
		}
	})
}

// Another node has deleted a connector, or set its revocation to none: its pending revocations are dropped.
func TestOAuthIntentsOfAConnectorThatRevokesNoMore(t *testing.T) {
	for name, change := range map[string]func(*oauthEngine){
		"deleted": func(e *oauthEngine) {
			require.NoError(e.t, e.storage.InmemStorage.Delete(e.t.Context(), connectorPrefix+defaultConnector))
		},
		"changed": func(e *oauthEngine) {
			e.put(connectorPrefix+defaultConnector, []byte(strings.Replace(e.get(connectorPrefix+defaultConnector), `"revocation":"access_token"`, `"revocation":"none"`, 1)))
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, oauth2test.ClassA, classA)
				e.add("acme", nil)
				lease := e.lease("acme")
				e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointRevocation, Answer: oauth2test.BadGateway, Times: 1})
				e.revoke(lease)
				change(e)
				e.InvalidateKey(t.Context(), connectorPrefix+defaultConnector)
				e.pass(2 * time.Minute)
				assert.Len(t, e.revocations(), 1)
				assert.NotContains(t, e.storedText(), intentPrefix)
			})
		})
	}
}

// A read of a tenant that has left memory needs one read of storage, also at a connector that revokes access tokens.
func TestOAuthTenantThatHasLeftMemoryCostsOneRead(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		e.read("token/acme")
		e.minute()
		synctest.Wait()
		e.tenants.loaded.Purge()
		ops := e.storage.ops.Load()
		e.read("token/acme")
		assert.EqualValues(t, 1, e.storage.ops.Load()-ops)
	})
}

// A tenant is deleted and created again with another refresh token: after a restart, the deleted refresh token is revoked, and the new
// one is not.
func TestOAuthRevocationOfARefreshTokenBesideItsSuccessor(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, revokeAll)
		e.add("acme", nil)
		deleted := e.stored("acme").RefreshToken
		e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointRevocation, Answer: oauth2test.BadGateway})
		e.ok(logical.DeleteOperation, "tenants/acme", nil)
		e.add("acme", nil)
		e.crash()
		e.server.ClearFaults()
		e.pass(2 * time.Minute)
		assert.False(t, e.server.RefreshTokenAlive(deleted))
		assert.True(t, e.server.RefreshTokenAlive(e.stored("acme").RefreshToken))
		assert.Nil(t, e.read("config")["pending_revocations"])
	})
}

// Storage has refused a write, or a delete, that gives the access token up. The next exchange's answer is lost. It is tried again while the
// service still takes the replaced refresh token, as after any lost answer, and not after a minute.
func TestLostAnswerAfterARefusedWriteIsTriedAgainInTime(t *testing.T) {
	for _, refused := range []string{intentPrefix, tenantPrefix, "delete"} {
		bubble(t, func(t *testing.T) {
			e := newOAuthEngine(t, func(o *oauth2test.Options) { oauth2test.ClassA(o); o.Grace = 10 * time.Second }, classA)
			e.add("acme", nil)
			e.read("token/acme")
			if refused == "delete" {
				e.storage.refuse("delete", tenantPrefix)
				_, status, _ := e.try(logical.DeleteOperation, "tenants/acme", nil)
				require.Equal(t, 500, status)
			} else {
				e.storage.refuse("put", refused)
				_, status, _ := e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": "another", "verify": false})
				require.Equal(t, 500, status)
			}
			e.storage.heal()
			e.server.Inject(oauth2test.Fault{Reset: true, Process: true, Times: 2}) // the exchange, and its next try at once
			_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
			require.Equal(t, 503, status)
			time.Sleep(2 * time.Minute)
			assert.Equal(t, statusOK, e.status("acme"), refused)
			assert.Empty(t, e.server.LostGrants(), refused)
		})
	}
}
