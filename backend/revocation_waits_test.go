package backend

import (
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// leasesOf creates a tenant with a token for each lease and reads n leases.
func (e *oauthEngine) leasesOf(tenant string, n int) (leases []*logical.Response) {
	e.t.Helper()
	e.add(tenant, map[string]any{"token_per_lease": true})
	for range n {
		leases = append(leases, e.lease(tenant))
	}
	return leases
}

// A revocation does not wait for its call while another call of the connector has been under way for more than 2 seconds.
func TestOAuthRevocationDoesNotWaitBehindASlowCall(t *testing.T) {
	for _, c := range []struct{ until, wait time.Duration }{
		{2 * time.Second, 5 * time.Second},
		{2*time.Second + time.Millisecond, 0},
		{7 * time.Second, 0},
	} {
		bubble(t, func(t *testing.T) {
			e := newOAuthEngine(t, oauth2test.ClassA, classA)
			leases := e.leasesOf("acme", 2)
			e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointRevocation, Delay: 8 * time.Second})
			begun := time.Now()
			var first sync.WaitGroup
			first.Go(func() {
				e.revoke(leases[0])
				assert.Equal(t, 5*time.Second, time.Since(begun))
			})
			time.Sleep(c.until)
			second := time.Now()
			e.revoke(leases[1])
			assert.Equal(t, c.wait, time.Since(second), c.until)
			first.Wait()
			time.Sleep(20 * time.Second)
			for _, lease := range leases {
				assert.False(t, e.server.Alive(accessTokenOf(lease)))
			}
			assert.Len(t, e.revocations(), 2)
		})
	}
}

// A call of one connector that is slow keeps no request of another connector from waiting.
func TestOAuthRevocationWaitsBesideASlowCallOfAnotherConnector(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		id, secret := e.server.RegisterClient(oauth2test.AuthBasic)
		e.write("config/other", map[string]any{
			"service": "oauth2", "token_url": e.server.TokenURL(), "revocation_url": e.server.RevocationURL(),
			"connector_id": id, "connector_secret": secret, "exchanges_per_minute": 60_000, "revocation": "access_token", "exchange_invalidates": false,
		})
		slow := e.leasesOf("acme", 1)
		e.write("tenants/other", map[string]any{"refresh_token": e.server.Grant(id, "other"), "connector": "other", "verify": false})
		lease := e.lease("other")
		e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointRevocation, Delay: 8 * time.Second, Times: 1})
		e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointRevocation, Delay: time.Second, Times: 1})
		e.revoke(slow...)
		begun := time.Now()
		e.revoke(lease)
		assert.Equal(t, time.Second, time.Since(begun))
	})
}

// Requests that wait for their calls at the same time count with the time that they have waited so far.
func TestOAuthRevocationWaitsThatGoOnCount(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		leases := e.leasesOf("acme", 14)
		e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointRevocation, Delay: 1900 * time.Millisecond})
		waited := make([]time.Duration, len(leases))
		var all sync.WaitGroup
		for i := range leases {
			all.Go(func() {
				begun := time.Now()
				e.revoke(leases[i])
				waited[i] = time.Since(begun)
			})
			time.Sleep(400 * time.Millisecond)
		}
		all.Wait()
		// When the eighth comes, after 2.8 s, three have waited for 1.9 s and four wait: 3 × 1.9 s + (1.6 + 1.2 + 0.8 + 0.4) s is
		// 9.7 s. When the ninth comes it is 11.6 s.
		for i, d := range waited {
			if i < 8 {
				assert.Equal(t, 1900*time.Millisecond, d, i)
			} else {
				assert.Zero(t, d, i)
			}
		}
		time.Sleep(20 * time.Second)
		for _, lease := range leases {
			assert.False(t, e.server.Alive(accessTokenOf(lease)))
		}
	})
}

// A write of revocation=none counts those revocations as dropped that have not been sent, and not one whose call is under way.
func TestOAuthConnectorWriteCountsWhatIsNotSent(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		for _, name := range []string{"acme", "other"} {
			e.add(name, nil)
		}
		sent, waiting := e.lease("acme"), e.lease("other")
		e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointRevocation, User: "other", Answer: oauth2test.BadGateway})
		e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointRevocation, User: "acme", Delay: 8 * time.Second})
		e.revoke(waiting)
		go e.revoke(sent)
		synctest.Wait()
		require.EqualValues(t, 2, e.read("config")["pending_revocations"])
		resp := e.write("config", map[string]any{"revocation": "none"})
		require.NotNil(t, resp)
		assert.Equal(t, []string{"1 revocation that had not been sent yet will not be made."}, resp.Warnings)
		time.Sleep(20 * time.Second)
		assert.False(t, e.server.Alive(accessTokenOf(sent)))
		assert.True(t, e.server.Alive(accessTokenOf(waiting)))
	})
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		lease := e.lease("acme")
		e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointRevocation, Delay: 8 * time.Second})
		e.revoke(lease)
		assert.Nil(t, e.write("config", map[string]any{"revocation": "none"}))
		time.Sleep(20 * time.Second)
		assert.False(t, e.server.Alive(accessTokenOf(lease)))
		assert.NotContains(t, e.storedText(), intentPrefix)
	})
}
