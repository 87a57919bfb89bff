package backend

import (
	"fmt"
	"net/http"
	"runtime"
	"slices"
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

// An access token with a lease is replaced while storage cannot say what its connector does: the new token waits until the older one is on
// record, so that the older one ends with its lease.
func TestReplacedTokenIsHeldThoughItsConnectorCouldNotBeRead(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		lease := e.lease("acme")
		e.server.Inject(oauth2test.Fault{Delay: 2 * time.Second, Times: 1})
		e.storage.once("put", callPrefix, func() {
			go func() {
				time.Sleep(time.Second)
				e.storage.refuse("get", connectorPrefix)
				e.connectors.invalidate(connectorPrefix + defaultConnector)
				time.Sleep(2 * time.Second)
				e.storage.heal()
			}()
		})
		e.pass(55 * time.Minute)
		assert.NotEqual(t, accessTokenOf(lease), e.read("token/acme")["access_token"])
		assert.True(t, e.server.Alive(accessTokenOf(lease)))
		e.revoke(lease)
		assert.False(t, e.server.Alive(accessTokenOf(lease)))
		e.kept()
	})
}

// A lease that is revoked while the engine stops does not wait for a call: none is made. Its intent is stored, and the next process makes it.
// Where nothing is left to revoke, no worker stays.
func TestRevocationWhileTheEngineStops(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		lease := e.lease("acme")
		e.stop()
		begun := time.Now()
		require.NoError(t, e.revokeLease(lease))
		assert.Zero(t, time.Since(begun))
		assert.Empty(t, e.revocations())
		assert.Contains(t, e.storedText(), intentPrefix)
		e.restart()
		e.pass(2 * time.Minute)
		assert.False(t, e.server.Alive(accessTokenOf(lease)))
		e.backend.revocations.mu.Lock()
		defer e.backend.revocations.mu.Unlock()
		assert.Empty(t, e.backend.revocations.draining)
	})
}

// The stop of the engine waits for a revocation that is at the service, and notes its success: the next process does not send it again.
func TestStopWaitsForARevocation(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		e.read("token/acme")
		e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointRevocation, Delay: 2 * time.Second})
		e.ok(logical.DeleteOperation, "tenants/acme", nil)
		synctest.Wait()
		require.Len(t, e.revocations(), 1)
		e.restart()
		assert.NotContains(t, e.storedText(), intentPrefix)
		e.pass(2 * time.Minute)
		assert.Len(t, e.revocations(), 1)
	})
}

// Nothing is left running when the revocations of a connector have been made.
func TestRevocationsLeaveNoGoroutine(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		revokeOne := func() {
			e.add("acme", nil)
			e.read("token/acme")
			e.ok(logical.DeleteOperation, "tenants/acme", nil)
			time.Sleep(2 * time.Minute)
		}
		revokeOne()
		before := runtime.NumGoroutine()
		for range 20 {
			revokeOne()
		}
		assert.Len(t, e.revocations(), 21)
		assert.Less(t, runtime.NumGoroutine(), before+10)
	})
}

// The service permits no call for 20 seconds: a revocation is made when they are over.
func TestRevocationComesWhenTheServicePermitsCallsAgain(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		e.add("other", nil)
		e.read("token/acme")
		e.server.Inject(oauth2test.Fault{Answer: oauth2test.TooManyRequests(20 * time.Second), Times: 1})
		_, status, _ := e.try(logical.ReadOperation, "token/other", nil)
		require.Equal(t, http.StatusTooManyRequests, status)
		begun := time.Now()
		e.ok(logical.DeleteOperation, "tenants/acme", nil)
		e.pass(time.Minute)
		require.Len(t, e.revocations(), 1)
		assert.InDelta(t, 20, e.revocations()[0].Start.Sub(begun).Seconds(), 1)
	})
}

// Storage takes a verified write and reports an error, and the tenant is deleted before the engine could see that: the access token that the
// write has brought is revoked once the delete has ended, and not forgotten because the entry had it before.
func TestTokenOfAnUnheardWriteIsRevokedWithItsTenant(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, func(o *oauth2test.Options) { oauth2test.ClassA(o); o.Rotation = oauth2test.RotateNever }, classA)
		e.add("acme", nil)
		e.waitForIndex()
		e.storage.unheard("put", tenantPrefix)
		e.storage.refuse("get", tenantPrefix)
		require.Equal(t, 503, e.rewrite("acme", e.server.Grant(e.clientID, "acme"), true))
		time.Sleep(4 * time.Second) // the next try is at 7 seconds
		e.storage.heal()
		require.Len(t, e.server.AccessTokens("acme"), 1)
		reached, release := e.storage.hold("delete", tenantPrefix)
		deleted := make(chan int)
		go func() {
			status, _ := e.deleteAcme()
			deleted <- status
		}()
		<-reached
		time.Sleep(5 * time.Second)
		release()
		assert.Equal(t, 204, <-deleted)
		e.pass(time.Minute)
		assert.Empty(t, e.server.AccessTokens("acme"))
	})
}

// Storage takes a verified write and reports an error: a reader gets the access token that storage has, although memory would have it
// revoked if storage had not.
func TestTokenOfAnUnheardWriteIsHandedOut(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, func(o *oauth2test.Options) { oauth2test.ClassA(o); o.Rotation = oauth2test.RotateNever }, classA)
		e.add("acme", nil)
		e.waitForIndex()
		e.storage.unheard("put", tenantPrefix)
		e.storage.refuse("get", tenantPrefix)
		require.Equal(t, 503, e.rewrite("acme", e.server.Grant(e.clientID, "acme"), true))
		time.Sleep(4 * time.Second)
		e.storage.heal()
		token := e.read("token/acme")["access_token"].(string)
		assert.Equal(t, 1, e.server.TotalExchanges())
		e.pass(2 * time.Minute)
		assert.True(t, e.server.Alive(token))
		assert.Empty(t, e.revocations())
	})
}

// Another node has deleted the record of an access token: a connector that no lease needs any more can be deleted.
func TestRecordThatAnotherNodeHasDeletedHoldsNoConnector(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", map[string]any{"token_per_lease": true})
		e.lease("acme")
		e.ok(logical.DeleteOperation, "tenants/acme", nil)
		e.pass(time.Minute)
		_, status, text := e.try(logical.DeleteOperation, "config", nil)
		require.Equal(t, 400, status)
		require.Contains(t, text, "has leases of 1 tenant")
		keys, err := e.storage.List(t.Context(), heldPrefix+"acme/")
		require.NoError(t, err)
		require.Len(t, keys, 1)
		require.NoError(t, e.storage.InmemStorage.Delete(t.Context(), heldPrefix+"acme/"+keys[0]))
		e.InvalidateKey(t.Context(), heldPrefix+"acme/"+keys[0])
		_, status, text = e.try(logical.DeleteOperation, "config", nil)
		assert.Equal(t, 204, status, text)
	})
}

// The refusal to delete a connector counts each tenant once, however many leases it has, and names the tenants in order.
func TestRefusalCountsTenantsOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		for _, name := range []string{"c", "a", "b"} {
			e.add(name, map[string]any{"token_per_lease": true})
			e.leasesOf(name, 4)
		}
		for _, name := range []string{"a", "b", "c"} {
			e.ok(logical.DeleteOperation, "tenants/"+name, nil)
		}
		_, status, text := e.try(logical.DeleteOperation, "config", nil)
		assert.Equal(t, 400, status)
		assert.Contains(t, text, "has leases of 3 tenants")
		assert.Contains(t, text, "(a, b, c)")
	})
}

// The start reads what is to be revoked with few reads at once, however much there is.
func TestStartReadsRecordsAFewAtATime(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newEngine(t)
		for i := range 200 {
			require.NoError(t, putEntry(t.Context(), e.storage.InmemStorage, fmt.Sprint(heldPrefix, "acme/", i),
				&held{Format: entryFormat, Connector: "default", Expires: time.Now().Add(time.Hour)}))
		}
		e.stop()
		var now, most atomic.Int64
		e.storage.surround(func(op, key string, do func() error) error {
			if op == "get" && strings.HasPrefix(key, heldPrefix) {
				most.Store(max(most.Load(), now.Add(1)))
				time.Sleep(time.Millisecond)
				now.Add(-1)
			}
			return do()
		})
		e.start()
		time.Sleep(time.Second)
		e.minute()
		time.Sleep(time.Second)
		assert.EqualValues(t, storageReaders, most.Load())
	})
}

// A refresh token's end that is only assumed does not keep it from being revoked when its tenant is deleted.
func TestAssumedEndDoesNotPreventARevocation(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, with(revokeAll, "refresh_token_life", "1h"))
		e.add("acme", nil)
		token := e.held("acme")
		e.server.Inject(oauth2test.Fault{Answer: oauth2test.BadGateway})
		e.pass(2 * time.Hour)
		e.ok(logical.DeleteOperation, "tenants/acme", nil)
		e.pass(time.Minute)
		assert.False(t, e.server.RefreshTokenAlive(token))
	})
}

// Storage takes an intent and reports an error while the engine reads what is to be revoked: the intent is read later, and its token is
// revoked without another request.
func TestUnheardIntentWhileIntentsAreRead(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		lease := e.lease("acme")
		e.pass(50 * time.Minute)
		require.NotEqual(t, accessTokenOf(lease), e.read("token/acme")["access_token"])
		e.InvalidateKey(t.Context(), intentPrefix+"default/x")
		release := make(chan struct{})
		e.storage.surround(func(op, key string, do func() error) error {
			if op == "list" && key == heldPrefix { // the intents have been read
				<-release
			}
			err := do()
			if op == "put" && strings.HasPrefix(key, intentPrefix) {
				return errStorage
			}
			return err
		})
		e.minute()
		synctest.Wait()
		require.Error(t, e.revokeLease(lease))
		e.storage.heal()
		close(release)
		e.pass(3 * time.Minute)
		assert.False(t, e.server.Alive(accessTokenOf(lease)))
		assert.NotContains(t, e.storedText(), intentPrefix)
	})
}

// A refresh token that waits for its revocation is written again. While the service verifies it, memory loses what waits for its revocation,
// and storage cannot be read when the write is to be stored: the write is refused, because the token would be revoked later.
func TestVerifiedWriteWhoseIntentCannotBeReadAgain(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e, token := newEngineWithDeletedTenant(t)
		e.server.Set(func(o *oauth2test.Options) { o.Rotation = oauth2test.RotateNever })
		e.server.Inject(oauth2test.Fault{Delay: 3 * time.Second, Times: 1})
		go func() {
			time.Sleep(time.Second)
			e.storage.refuse("list", intentPrefix)
			e.InvalidateKey(t.Context(), intentPrefix+"default/x")
		}()
		assert.Equal(t, 503, e.rewrite("z", token, true))
		assert.Nil(t, e.stored("z"))
		assert.False(t, e.livesOn(token))
	})
}

// After a restart the access tokens that end first are revoked first.
func TestTokensThatEndFirstAreRevokedFirst(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.revocationFails()
		order := map[string]int{}
		for i := range 12 {
			name, at := fmt.Sprint("t", i), (i*5)%12
			e.server.Set(func(o *oauth2test.Options) { o.AccessTokenLife = time.Duration(20+at) * time.Minute })
			e.add(name, nil)
			order[e.read("token/" + name)["access_token"].(string)] = at
			e.ok(logical.DeleteOperation, "tenants/"+name, nil)
		}
		synctest.Wait()
		e.server.ClearFaults()
		e.server.ResetCalls()
		e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointRevocation, Delay: time.Second})
		e.crash()
		time.Sleep(500 * time.Millisecond)
		calls := e.revocations()
		assert.Len(t, calls, revocationsAtOnce)
		for _, c := range calls {
			assert.Less(t, order[c.Token], revocationsAtOnce)
		}
	})
}

// Storage does not delete the intent of a token that was revoked: the service is not asked again.
func TestRevokedTokenIsNotSentAgain(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		lease := e.lease("acme")
		e.storage.refuse("delete", intentPrefix)
		e.revoke(lease)
		time.Sleep(10 * time.Second)
		e.storage.heal()
		e.pass(time.Minute)
		assert.Len(t, e.revocations(), 1)
		assert.NotContains(t, e.storedText(), intentPrefix)
	})
}

// A token ends while the revocation that nobody waits for has its turn in the share before it: it is not sent.
func TestTokenEndsWhileItsRevocationQueues(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, func(o *oauth2test.Options) { oauth2test.ClassA(o); o.AccessTokenLife = 50 * time.Second }, classA)
		e.write("config", map[string]any{"exchanges_per_minute": 5})
		for _, name := range []string{"acme", "b", "c", "d", "e"} {
			e.add(name, nil)
			e.read("token/" + name)
		}
		time.Sleep(35 * time.Second)
		e.ok(logical.DeleteOperation, "tenants/acme", nil)
		e.pass(2 * time.Minute)
		assert.Empty(t, e.revocations())
		assert.NotContains(t, e.storedText(), intentPrefix)
		e.kept()
	})
}

// The engine reads again what is to be revoked while a revocation is at the service: that one is not sent a second time.
func TestReadingIntentsAgainRepeatsNoCall(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		e.add("other", nil)
		token := e.read("token/acme")["access_token"].(string)
		lease := e.lease("other")
		e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointRevocation, Delay: 10 * time.Second})
		e.ok(logical.DeleteOperation, "tenants/acme", nil)
		synctest.Wait()
		require.Len(t, e.revocations(), 1)
		e.storage.refuse("put", intentPrefix)
		require.Error(t, e.revokeLease(lease))
		e.storage.heal()
		e.minute()
		synctest.Wait()
		assert.Len(t, e.revocations(), 1)
		time.Sleep(11 * time.Second)
		e.pass(time.Minute)
		assert.False(t, e.server.Alive(token))
		calls := slices.DeleteFunc(e.revocations(), func(c oauth2test.Call) bool { return c.Token != token })
		assert.Len(t, calls, 1)
	})
}

// The write of another key by another node does not make this node read again what is to be revoked.
func TestOtherKeysDoNotMakeIntentsBeRead(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		e.pass(time.Minute)
		var lists atomic.Int64
		e.storage.failWith(func(op, key string) error {
			if op == "list" && (key == intentPrefix || key == heldPrefix) {
				lists.Add(1)
			}
			return nil
		})
		for _, key := range []string{tenantPrefix + "acme", connectorPrefix + defaultConnector, attemptKeys + "acme"} {
			e.InvalidateKey(t.Context(), key)
		}
		e.pass(2 * time.Minute)
		assert.Zero(t, lists.Load())
		e.InvalidateKey(t.Context(), heldPrefix+"acme/x")
		e.pass(2 * time.Minute)
		assert.EqualValues(t, 2, lists.Load())
	})
}
