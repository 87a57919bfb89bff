package backend

import (
	"fmt"
	"net/http"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/kaizala/kaizalatest"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/share"
)

// setShare sets the default connector's share of calls a minute.
func (e *engine) setShare(n int) { e.write("config", map[string]any{"exchanges_per_minute": n}) }

// addTenants adds tenants named t0, t1 and so on, whose users are named likewise.
func (e *engine) addTenants(n int) {
	for i := range n {
		e.addTenant(fmt.Sprint("t", i))
	}
}

// hammer reads creds of all tenants at once, again and again, and returns how
// many of them have ever been served.
func (e *engine) hammer(tenants int, every, d time.Duration) int {
	var mu sync.Mutex
	served := map[int]bool{}
	var readers sync.WaitGroup
	for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(every) {
		for i := range tenants {
			readers.Go(func() {
				begun := time.Now()
				_, status, _ := e.try(logical.ReadOperation, fmt.Sprint("creds/t", i), nil)
				assert.LessOrEqual(e.t, time.Since(begun), 10*time.Second)
				mu.Lock()
				defer mu.Unlock()
				served[i] = served[i] || status == http.StatusOK
			})
		}
	}
	readers.Wait()
	return len(served) - func() (n int) {
		for _, ok := range served {
			if !ok {
				n++
			}
		}
		return n
	}()
}

func TestShareHoldsInEachMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.setShare(10)
		e.addTenants(60)
		served := e.hammer(60, 7*time.Second, 15*time.Minute)
		assert.Equal(t, 60, served, "all tenants are served")
		assert.Equal(t, 10, e.kaizala.MaxPerMinute(e.connectorID), "the share is used up, and not exceeded")
	})
}

// Retries and the hops of a redirect count in the share as well.
func TestShareCountsHops(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.setShare(10)
		e.addTenants(20)
		for i := range 20 {
			e.kaizala.MoveUser(fmt.Sprint("t", i), "https://inc-001.osi.office.net")
		}
		e.hammer(20, 3*time.Second, 10*time.Minute)
		assert.LessOrEqual(t, e.kaizala.MaxPerMinute(e.connectorID), 10)
		assert.Equal(t, 20, e.kaizala.TotalExchanges())
	})
}

func TestReaderOfAUsedUpShareIsToldWhenToComeBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.setShare(3)
		e.addTenants(4)
		for i := range 3 {
			e.read(fmt.Sprint("creds/t", i))
		}
		begun := time.Now()
		_, status, text := e.try(logical.ReadOperation, "creds/t3", nil)
		assert.Equal(t, http.StatusTooManyRequests, status)
		assert.Zero(t, time.Since(begun), "the answer comes at once, because the wait would be longer than 5 seconds")
		assert.Contains(t, text, "try again in 1m0s")
		assert.Equal(t, statusUnverified, e.status("t3"), "no exchange has failed")
		time.Sleep(57 * time.Second)
		e.read("creds/t3")
		assert.Equal(t, time.Minute, time.Since(begun), "the read waits for a place that comes within 5 seconds")
	})
}

func TestRetryAfter(t *testing.T) {
	for name, c := range map[string]struct {
		header func(time.Time) string
		rest   time.Duration
	}{
		"in seconds": {func(time.Time) string { return "300" }, 300 * time.Second},
		"as a date":  {func(now time.Time) string { return now.Add(300 * time.Second).UTC().Format(http.TimeFormat) }, 300 * time.Second},
		"not at all": {func(time.Time) string { return "" }, time.Minute},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newConfiguredEngine(t)
				e.addTenants(20)
				id, secret := e.kaizala.RegisterConnector()
				e.write("config/other", map[string]any{"connector_id": id, "connector_secret": secret})
				e.write("tenants/x", map[string]any{"refresh_token": e.kaizala.GenerateUserToken(id, "x"), "connector": "other", "verify": false})
				header := http.Header{}
				if value := c.header(time.Now()); value != "" {
					header.Set("Retry-After", value)
				}
				e.kaizala.Inject(kaizalatest.Fault{Status: http.StatusTooManyRequests, Header: header, Times: 1})
				_, status, _ := e.try(logical.ReadOperation, "creds/t0", nil)
				assert.Equal(t, http.StatusTooManyRequests, status)
				first := e.kaizala.Calls()[0]

				for time.Since(first.End) < c.rest-2*time.Second {
					for i := range 20 {
						_, status, _ := e.try(logical.ReadOperation, fmt.Sprint("creds/t", i), nil)
						require.Equal(t, http.StatusTooManyRequests, status)
					}
					_, status, _ := e.try(logical.UpdateOperation, "tenants/t1/refresh", nil)
					require.Equal(t, http.StatusTooManyRequests, status)
					_, status, _ = e.try(logical.UpdateOperation, "tenants/t2", map[string]any{"refresh_token": e.newToken("t2")})
					require.Equal(t, http.StatusTooManyRequests, status)
					e.minute()
					require.Equal(t, 1, e.kaizala.CallCount())
					time.Sleep(time.Second)
					if time.Since(first.End) > c.rest-7*time.Second {
						break // a reader would wait for the rest of it
					}
				}
				e.read("creds/x") // another connector is not concerned
				require.Equal(t, 2, e.kaizala.CallCount())
				time.Sleep(time.Until(first.End.Add(c.rest + time.Second)))
				e.read("creds/t1")
				e.read("creds/t0")
			})
		})
	}
}

// A failed exchange is tried again after seconds at first and a minute at most, with
// jitter. A write of config ends the wait.
func TestBackoff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenants(5)
		e.kaizala.Inject(kaizalatest.Fault{Status: http.StatusInternalServerError})
		e.hammer(5, time.Second, 30*time.Minute)
		gaps := map[string][]time.Duration{}
		last := map[string]time.Time{}
		for _, call := range e.kaizala.Calls() {
			if at, ok := last[call.User]; ok {
				gaps[call.User] = append(gaps[call.User], call.Start.Sub(at))
			}
			last[call.User] = call.Start
		}
		distinct := map[time.Duration]bool{}
		for user, some := range gaps {
			assert.Less(t, len(some), 60, "%s: half an hour of a reader each second", user)
			assert.Greater(t, len(some), 25, user)
			assert.LessOrEqual(t, some[0], 3*time.Second)
			for _, gap := range some {
				assert.LessOrEqual(t, gap, 62*time.Second)
			}
			for _, gap := range some[10:] {
				assert.GreaterOrEqual(t, gap, 30*time.Second)
				distinct[gap.Truncate(time.Second)] = true
			}
		}
		assert.Greater(t, len(distinct), 10, "there is jitter")

		e.kaizala.ClearFaults()
		time.Sleep(time.Second)
		_, status, _ := e.try(logical.ReadOperation, "creds/t0", nil)
		if status == http.StatusServiceUnavailable {
			e.write("config", map[string]any{"request_timeout": "50s"})
			e.read("creds/t0")
		}
		e.read("creds/t0")
		assert.Equal(t, statusOK, e.status("t0"))

		// After a success the first wait is seconds again.
		e.kaizala.Inject(kaizalatest.Fault{Status: http.StatusInternalServerError, Times: 1})
		_, status, _ = e.try(logical.UpdateOperation, "tenants/t0/refresh", nil)
		require.Equal(t, http.StatusServiceUnavailable, status)
		assert.WithinDuration(t, time.Now(), e.tenants.named("t0").view.Load().trouble.until, 3*time.Second)
	})
}

func TestConfigWrittenForgetsTheBackoff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenants(1)
		e.kaizala.Inject(kaizalatest.Fault{Status: http.StatusInternalServerError})
		e.hammer(1, time.Second, 10*time.Minute)
		e.kaizala.ClearFaults()
		calls := e.kaizala.CallCount()
		for e.kaizala.CallCount() == calls { // until just after a failure, with a minute of backoff to go
			e.kaizala.Inject(kaizalatest.Fault{Status: http.StatusInternalServerError, Times: 1})
			time.Sleep(time.Second)
			_, _, _ = e.try(logical.ReadOperation, "creds/t0", nil)
		}
		e.kaizala.ClearFaults()
		_, status, _ := e.try(logical.ReadOperation, "creds/t0", nil)
		require.Equal(t, http.StatusServiceUnavailable, status)
		e.write("config", map[string]any{"request_timeout": "50s"})
		e.read("creds/t0")
	})
}

// A rejected tenant makes no call until it is refreshed by hand or rewritten.
func TestRejectedTenantIsLeftAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenants(1)
		e.newToken("t0") // a new refresh token ends the one that is written
		_, status, text := e.try(logical.ReadOperation, "creds/t0", nil)
		assert.Equal(t, http.StatusBadRequest, status)
		assert.Contains(t, text, "tenants/t0")
		assert.Equal(t, statusRejected, e.status("t0"))
		for range 3 {
			e.hammer(1, time.Minute, time.Hour)
			time.Sleep(100 * day)
			e.pass(time.Hour)
			e.restart()
		}
		assert.Equal(t, 1, e.kaizala.CallCount())

		_, status, _ = e.try(logical.UpdateOperation, "tenants/t0/refresh", nil)
		assert.Equal(t, http.StatusBadRequest, status)
		assert.Equal(t, 2, e.kaizala.CallCount(), "a refresh by hand calls once more")
		e.write("tenants/t0", map[string]any{"refresh_token": e.newToken("t0")})
		e.read("creds/t0")
		assert.Equal(t, statusOK, e.status("t0"))
	})
}

// Only an answer that names the refresh token rejects it.
func TestOnlyInvalidTokenRejects(t *testing.T) {
	for name, fault := range map[string]kaizalatest.Fault{
		"403 without errorCode": {Status: 403, Body: `{"message": "InvalidToken"}`},
		"403 HTML":              {Status: 403, Body: "<html>InvalidToken</html>"},
		"401 empty":             {Status: 401},
		"Unauthenticated":       {Status: 401, Body: `{"message": "no", "errorCode": "Unauthenticated"}`},
		"InvalidParameters":     {Status: 400, Body: `{"message": "no", "errorCode": "InvalidParameters"}`},
		"404":                   {Status: 404, Body: `{"message": "no"}`},
		"500":                   {Status: 500, Body: `{"errorCode": ""}`},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newConfiguredEngine(t)
				e.addTenants(1)
				e.kaizala.Inject(fault)
				_, status, _ := e.try(logical.ReadOperation, "creds/t0", nil)
				assert.GreaterOrEqual(t, status, 400)
				assert.Equal(t, statusDegraded, e.status("t0"))
				assert.True(t, e.stored("t0").Rejected.IsZero())
				e.kaizala.ClearFaults()
				time.Sleep(2 * time.Minute)
				e.read("creds/t0")
			})
		})
	}
}

// A wrong connector secret costs one call in ten minutes, and no refresh token.
func TestRefusedConnectorCostsNoTenant(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenants(50)
		e.kaizala.SetConnectorSecret(e.connectorID, "NEWSECRET1")
		_, status, text := e.try(logical.ReadOperation, "creds/t0", nil)
		assert.Equal(t, http.StatusBadRequest, status)
		assert.Contains(t, text, "connector_secret")
		e.hammer(50, time.Minute, 30*time.Minute)
		_, status, _ = e.try(logical.UpdateOperation, "tenants/t1/refresh", nil)
		assert.Equal(t, http.StatusBadRequest, status)
		e.pass(day / 4)
		synctest.Wait()
		calls := e.kaizala.CallCount()
		assert.InDelta(t, 39, calls, 1, "one exchange every ten minutes")
		for i := range 50 {
			assert.NotEqual(t, statusRejected, e.status(fmt.Sprint("t", i)))
		}
		e.write("config", map[string]any{"connector_secret": "NEWSECRET1"})
		for i := range 50 {
			e.read(fmt.Sprint("creds/t", i))
		}
		assert.InDelta(t, calls+50, e.kaizala.CallCount(), 1)
	})
}

// 200 tenants that are due at once leave the readers their part of the share.
func TestReadersGoBeforeBackgroundWork(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.setShare(10)
		var tokens []string
		for i := range 200 {
			tokens = append(tokens, e.newToken(fmt.Sprint("b", i)))
		}
		time.Sleep(inWindow)
		for i, token := range tokens {
			e.write(fmt.Sprint("tenants/b", i), map[string]any{"refresh_token": token, "verify": false})
		}
		e.addTenants(30)
		for i := range 30 {
			e.pass(31 * time.Second) // two readers a minute
			begun := time.Now()
			e.read(fmt.Sprint("creds/t", i))
			assert.LessOrEqual(t, time.Since(begun), patience)
		}
		e.pass(15 * time.Minute)
		for i := range tokens {
			assert.Equal(t, originService, e.stored(fmt.Sprint("b", i)).RefreshTokenOrigin)
		}
		assert.LessOrEqual(t, e.kaizala.MaxPerMinute(e.connectorID), 10)
	})
}

// The hops of a background exchange leave the readers' fifth free.
func TestBackgroundHopsGiveWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.setShare(10)
		token := e.newToken("b")
		e.kaizala.MoveUser("b", "https://inc-001.osi.office.net")
		time.Sleep(inWindow)
		e.addTenants(9)
		for i := range 7 {
			e.read(fmt.Sprint("creds/t", i))
		}
		e.write("tenants/b", map[string]any{"refresh_token": token, "verify": false})
		time.Sleep(time.Second)
		require.Equal(t, "b", e.kaizala.Calls()[7].User, "the background exchange has a place")
		begun := time.Now()
		e.read("creds/t7")
		e.read("creds/t8")
		assert.Zero(t, time.Since(begun))
		e.pass(3 * time.Minute)
		assert.Equal(t, originService, e.stored("b").RefreshTokenOrigin)
	})
}

// A client that reads and revokes leases of one tenant in a loop gets a fifth of the
// share, and the readers of other tenants are served.
func TestOneTenantCannotStarveTheRest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.setShare(20)
		e.addTenant("greedy")
		e.addTenants(40)
		stop := make(chan struct{})
		var loops sync.WaitGroup
		for range 3 {
			loops.Go(func() {
				for {
					select {
					case <-stop:
						return
					case <-time.After(250 * time.Millisecond):
					}
					if resp, status, _ := e.try(logical.ReadOperation, "creds/greedy", nil); status == http.StatusOK {
						resp.Secret.IssueTime = time.Now()
						resp.Secret.TTL = resp.Secret.MaxTTL
						assert.NoError(t, e.revokeLease(resp))
					}
				}
			})
		}
		for i := range 40 {
			time.Sleep(10 * time.Second)
			e.read(fmt.Sprint("creds/t", i))
		}
		close(stop)
		loops.Wait()
		perMinute := map[int]int{}
		for _, call := range e.kaizala.Calls() {
			if call.User == "greedy" {
				perMinute[call.Start.Minute()]++
			}
		}
		assert.NotEmpty(t, perMinute)
		for minute, n := range perMinute {
			assert.LessOrEqual(t, n, 4, "minute %d", minute)
		}
	})
}

// An exchange with a 307, which the engine does not remember, needs two calls, which may be more than a fifth of the share: the tenant
// is served all the same. (With a share of one call a minute, the second call would have to wait for a minute, which is longer than an
// exchange may wait.)
func TestTenantBehindA307IsServed(t *testing.T) {
	for n := 2; n <= 9; n++ {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newConfiguredEngine(t)
				e.setShare(n)
				e.addTenants(1)
				e.kaizala.MoveUserTemporarily("t0", "https://inc-001.osi.office.net")
				assert.Equal(t, 1, e.hammer(1, 7*time.Second, 5*time.Minute))
				assert.LessOrEqual(t, e.kaizala.MaxPerMinute(e.connectorID), n)
			})
		})
	}
}

// Many tenants with a 307 are due at once, and all are served: an exchange does not begin if the others that have begun would not have
// a place for their second call.
func TestTenantsBehindA307AreServed(t *testing.T) {
	for _, n := range []int{2, 3, 10} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newConfiguredEngine(t)
				e.setShare(n)
				e.kaizala.Inject(kaizalatest.Fault{Delay: 100 * time.Millisecond})
				tenants := 2 * n
				tokens := make([]string, tenants)
				for i := range tokens {
					tokens[i] = e.newToken(fmt.Sprint("t", i))
					e.kaizala.MoveUserTemporarily(fmt.Sprint("t", i), "https://inc-001.osi.office.net")
				}
				time.Sleep(inWindow)
				for i, token := range tokens {
					e.write(fmt.Sprint("tenants/t", i), map[string]any{"refresh_token": token, "verify": false})
				}
				e.pass(time.Duration(2*n+1) * time.Minute)
				for i := range tokens {
					assert.Equal(t, originService, e.stored(fmt.Sprint("t", i)).RefreshTokenOrigin)
				}
				for i := range tokens {
					e.write(fmt.Sprint("tenants/t", i), map[string]any{"refresh_token": e.newToken(fmt.Sprint("t", i)), "verify": false})
				}
				assert.Equal(t, tenants, e.hammer(tenants, 7*time.Second, time.Duration(2*n+1)*time.Minute))
				assert.LessOrEqual(t, e.kaizala.MaxPerMinute(e.connectorID), n)
			})
		})
	}
}

// The longest chain of redirects in the last two minutes is the number of hops that an exchange is expected to need.
func TestHopsAhead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var h hops
		assert.Zero(t, h.ahead(0))
		h.noted(1)
		h.noted(2)
		time.Sleep(2 * share.Window)
		h.noted(1)
		assert.Equal(t, []int{2, 1, 0, 0}, []int{h.ahead(0), h.ahead(1), h.ahead(2), h.ahead(3)})
		time.Sleep(time.Nanosecond)
		assert.Zero(t, h.ahead(0))
		h.noted(1)
		assert.Equal(t, 1, h.ahead(0))
	})
}

// While the service goes on redirecting, its redirects are not forgotten: the time for which they are remembered begins anew with each.
func TestHopsAheadOfASteadyRedirect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var h hops
		for range 3 {
			h.noted(1)
			time.Sleep(hopsKept * 3 / 4)
			assert.Equal(t, 1, h.ahead(0))
		}
	})
}

// The engine remembers where a 308 has moved a tenant: the next exchange needs one request. It forgets that when the connector gets
// another address. A 307 is followed each time and not remembered.
func TestMoveIsRemembered(t *testing.T) {
	for name, c := range map[string]struct {
		move func(e *engine, user, to string)
		next int // requests of the next exchange
		kept *move
	}{
		"308": {func(e *engine, user, to string) { e.kaizala.MoveUser(user, to) }, 1, &move{From: "https://api.kaiza.la", To: "https://inc-001.osi.office.net/v1/accessToken"}},
		"307": {func(e *engine, user, to string) { e.kaizala.MoveUserTemporarily(user, to) }, 2, nil},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newConfiguredEngine(t)
				e.addTenants(1)
				c.move(e, "t0", "https://inc-001.osi.office.net")
				requests := func() int {
					before := e.kaizala.CallCount()
					e.write("tenants/t0/refresh", nil)
					return e.kaizala.CallCount() - before
				}
				assert.Equal(t, 2, requests())
				assert.Equal(t, c.next, requests())
				assert.Equal(t, c.kept, e.stored("t0").Move)
				e.write("config", map[string]any{"api_root": "https://api2.kaiza.la"})
				assert.Equal(t, 2, requests(), "the move was from the former address")
				assert.Equal(t, c.next, requests())
			})
		})
	}
}

// A refused connector's tenant that fails later than the others is due at the connector's next probe, as they are, and not ten minutes
// after its own failure.
func TestLaterFailureOfARefusedConnectorWaitsForTheProbe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenants(2)
		e.kaizala.SetConnectorSecret(e.connectorID, "NEWSECRET1")
		_, status, _ := e.try(logical.ReadOperation, "creds/t0", nil)
		require.Equal(t, http.StatusBadRequest, status)
		probe := e.read("tenants/t0")["next_exchange_time"]
		require.NotNil(t, probe)
		time.Sleep(5 * time.Minute)
		e.exchangeUnasked(e.tenants.named("t1"))
		assert.Equal(t, probe, e.read("tenants/t1")["next_exchange_time"])
		assert.Equal(t, 1, e.kaizala.CallCount())
	})
}

// A limit that ends a background exchange of a tenant delays the next one at the same connector, and none at the connector that the
// tenant has moved to meanwhile.
func TestLimitOfTheConnectorThatATenantHasLeft(t *testing.T) {
	for _, moves := range []bool{true, false} {
		t.Run(fmt.Sprintf("moves=%v", moves), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newConfiguredEngine(t)
				e.setShare(2)
				id, secret := e.kaizala.RegisterConnector()
				e.write("config/hr", map[string]any{"connector_id": id, "connector_secret": secret})
				e.kaizala.SetRefreshTokenAge(kaizalatest.DefaultRefreshTokenLife * 9 / 10)
				e.addTenants(2)
				e.quiet("t0")
				e.quiet("t1") // both exchanges of this minute at the default connector
				time.Sleep(2 * share.Window)
				e.lease("t1")
				e.write("tenants/t1/refresh", nil)
				time.Sleep(40 * time.Second)
				e.kaizala.MoveUserTemporarily("t0", "https://inc-001.osi.office.net")
				e.write("tenants/t0", map[string]any{"refresh_token": e.newToken("t0"), "verify": false})
				time.Sleep(time.Second) // its first request has the second place of this minute; the redirect's waits for another
				require.NotNil(t, e.tenants.named("t0").flight.Load())
				if moves {
					e.write("tenants/t0", map[string]any{"connector": "hr", "refresh_token": e.kaizala.GenerateUserToken(id, "t0"), "verify": false})
				}
				before := e.kaizala.Exchanges("t0")
				asked := e.system.asked.Load()
				e.connectors.present(defaultConnector).share.Pause(time.Now().Add(time.Hour))
				e.pass(5 * time.Minute)
				assert.Equal(t, moves, e.kaizala.Exchanges("t0") > before)
				assert.Less(t, e.system.asked.Load()-asked, int64(50), "questions to Vault: exchanges are tried again and again")
			})
		})
	}
}

// While places are left to the redirects of an exchange under way, a background exchange that could have one of them is tried each
// second, and not again and again.
func TestBackgroundExchangeLeavesPlacesToHops(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.setShare(10)
		e.addTenants(7)
		for i := range 6 {
			e.lease(fmt.Sprint("t", i))
		}
		e.connectors.present(defaultConnector).hops.noted(1)
		e.kaizala.Inject(kaizalatest.Fault{Delay: 20 * time.Second})
		e.kaizala.SetRefreshTokenAge(kaizalatest.DefaultRefreshTokenLife * 9 / 10)
		go e.try(logical.ReadOperation, "creds/t6", nil) // the seventh of the eight places that background work may have
		synctest.Wait()
		asked := e.system.asked.Load()
		e.addTenant("due")
		time.Sleep(10 * time.Second)
		assert.Zero(t, e.kaizala.Exchanges("due"))
		assert.Less(t, e.system.asked.Load()-asked, int64(50), "questions to Vault: the exchange is tried again and again")
		time.Sleep(time.Minute)
	})
}

// A reader who joins a background exchange between its two requests does not wait behind the readers' fifth.
func TestReaderJoinsABackgroundHop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.setShare(10)
		token := e.newToken("b")
		e.kaizala.MoveUserTemporarily("b", "https://inc-001.osi.office.net")
		time.Sleep(inWindow)
		e.addTenants(7)
		for i := range 7 {
			e.read(fmt.Sprint("creds/t", i))
		}
		time.Sleep(40 * time.Second)
		e.write("tenants/b", map[string]any{"refresh_token": token, "verify": false})
		time.Sleep(time.Second)
		require.Equal(t, 8, e.kaizala.CallCount(), "the second request of the background exchange waits")
		begun := time.Now()
		e.read("creds/b")
		assert.Zero(t, time.Since(begun))
		assert.Equal(t, 9, e.kaizala.CallCount())
	})
}
