package backend

import (
	"context"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/share"
)

// The service refused the connector while the host's clock was a month ahead. The next process tries the connector ten minutes after it
// has started, and not a month later.
func TestConnectorRefusedUnderAWrongClock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		connector, err := e.storedConnector(t.Context(), "default")
		require.NoError(t, err)
		connector.Refused = time.Now().Add(30 * day)
		require.NoError(t, putEntry(t.Context(), e.storage.InmemStorage, connectorPrefix+"default", connector))
		e.restart()
		_, status, _ := e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
		require.Equal(t, 400, status)
		time.Sleep(probeEvery + time.Second)
		e.write("tenants/acme/refresh", nil)
	})
}

// slow_down is about one device code, also with the status 429: the connector's other work goes on.
func TestSlowDownWithTheStatusOfALimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		e.write("tenants/bob", map[string]any{"connector": "as", "refresh_token": e.server.Grant(e.clientID, "bob", "offline_access")})
		slow := oauth2test.Answer{Status: http.StatusTooManyRequests, Header: http.Header{"Retry-After": {"3600"}}, Body: `{"error":"slow_down"}`}
		e.server.Inject(oauth2test.Fault{Answer: slow, Times: 1})
		code := e.start(byDevice, nil)["user_code"].(string)
		time.Sleep(6 * time.Second)
		require.Len(t, e.polls(), 1)
		e.write("tenants/bob/refresh", nil)
		require.NoError(t, e.server.ApproveDevice(code, "jane"))
		time.Sleep(time.Minute)
		assert.Equal(t, attemptGranted, e.attemptStatus(byDevice))
	})
}

// Tenants that are due wait for a place in their connector's share. They are exchanged at once when the share becomes larger.
func TestDueTenantsGoOnWithALargerShare(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenants(5)
		e.setShare(1)
		e.stop()
		time.Sleep(inWindow)
		e.kaizala.ResetCalls()
		e.start()
		e.minute()
		time.Sleep(time.Second)
		require.Equal(t, 1, e.kaizala.CallCount())
		e.setShare(100)
		time.Sleep(time.Second)
		assert.Equal(t, 5, e.kaizala.CallCount())
	})
}

// A tenant that is due and has used up its fifth of the share waits until a call of it stops counting: the engine does not look again before.
func TestDueTenantWaitsForItsFifth(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		e.setShare(5)
		time.Sleep(time.Hour)
		e.write("tenants/acme/refresh", nil)
		used := time.Now()
		time.Sleep(10 * time.Second)
		e.index.at("acme", time.Now())
		e.index.wait(defaultConnector, "acme", 0, false)
		e.serveLine(defaultConnector)
		item, err := e.index.queue.PopByKey("acme")
		require.NoError(t, err)
		require.NotNil(t, item)
		assert.Equal(t, used.Add(time.Minute), time.Unix(0, item.Priority))
	})
}

// Vault is asked for the mount's lease TTLs each minute: leases go by a tuned mount without an exchange.
func TestTunedMountCountsWithinAMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		assert.False(t, e.lease("acme").Secret.Renewable, "a lease of the default TTL lasts as long as its access token")
		synctest.Wait()
		e.system.DefaultLeaseTTLVal = time.Hour
		e.minute()
		synctest.Wait()
		assert.True(t, e.lease("acme").Secret.Renewable)
	})
}

// Storage does not take a new refresh token until the engine stops. It takes that at the stop, so the log does not say that it is lost.
func TestRefreshTokenThatIsStoredAtTheStopIsNotLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newRotatingEngine(t)
		e.storage.refuse("put", tenantPrefix)
		_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
		require.Equal(t, 503, status)
		e.storage.heal()
		e.stop()
		assert.Equal(t, e.kaizala.CurrentRefreshToken("acme"), e.stored("acme").RefreshToken)
		assert.NotContains(t, e.log.String(), "is lost")
		e.start()
	})
}

// After an answer the waits between polls begin anew: an outage later does not go on with the long waits of an earlier outage.
func TestPollsRestAnewInEachOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		e.start(byDevice, nil)
		outage := oauth2test.Fault{Answer: oauth2test.BadGateway, Times: 3}
		e.server.Inject(outage)
		time.Sleep(82 * time.Second)
		polls := len(e.polls())
		require.Greater(t, polls, 4, "the outage is over")
		e.server.Inject(outage)
		time.Sleep(82 * time.Second)
		first, second := gaps(e.polls())[:3], gaps(e.polls()[polls:])[:3]
		assert.Equal(t, first, second)
	})
}

// A restart writes nothing for a tenant whose access token has its planned exchange already.
func TestLoadOfAPlannedTokenWritesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newOAuthEngine(t, func(*oauth2test.Options) {}, classD)
		e.add("acme", nil)
		e.lease("acme")
		puts := e.storage.putsOf(tenantPrefix + "acme")
		e.restart()
		e.lease("acme")
		assert.Equal(t, puts, e.storage.putsOf(tenantPrefix+"acme"))
	})
}

// A write of a connector that plans the ends of access tokens anew leaves the tenants of other connectors in memory: their leases stay
// counted.
func TestConnectorWriteLeavesOtherConnectorsTenantsInMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newOAuthEngine(t, func(*oauth2test.Options) {}, classB)
		e.add("acme", nil)
		e.write("config/other", map[string]any{
			"service": "oauth2", "token_url": e.server.TokenURL(), "connector_id": e.clientID, "connector_secret": e.secret,
		})
		first, second := e.lease("acme"), e.lease("acme")
		e.write("config/other", map[string]any{"exchange_invalidates": false})
		e.revoke(first)
		assert.Equal(t, accessTokenOf(second), accessTokenOf(e.lease("acme")))
		assert.Equal(t, 1, e.server.Exchanges("acme"))
	})
}

// A reader has joined background work before that asks for its place: the work takes one that is kept for readers.
func TestReaderJoinsBeforeBackgroundWorkAsks(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.write("config", map[string]any{"exchanges_per_minute": 5})
		via, err := e.connectors.get(t.Context(), defaultConnector)
		require.NoError(t, err)
		for range 4 {
			_, err := via.share.Take(t.Context(), share.Want{})
			require.NoError(t, err)
		}
		alone, join := context.WithCancel(t.Context())
		p := &passage{via: via, alone: alone, want: share.Want{Wait: patience}}
		_, err = p.permit(t.Context())
		assert.ErrorAs(t, err, new(*share.LimitError))
		join()
		_, err = p.permit(t.Context())
		assert.NoError(t, err)
	})
}
