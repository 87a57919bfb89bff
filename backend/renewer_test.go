package backend

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/kaizala/kaizalatest"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/tokenservice"
)

// altered is the emulator with changed requests or answers.
type altered struct {
	http.RoundTripper
	request func(*http.Request)
	answer  func(map[string]any)
}

func (a altered) RoundTrip(r *http.Request) (*http.Response, error) {
	if a.request != nil {
		r = r.Clone(r.Context())
		a.request(r)
	}
	resp, err := a.RoundTripper.RoundTrip(r)
	if err != nil || a.answer == nil {
		return resp, err
	}
	var body map[string]any
	if err := json.NewDecoder(resp.Body).Decode(&body); err != nil {
		return nil, err
	}
	a.answer(body)
	raw, err := json.Marshal(body)
	resp.Body, resp.ContentLength = io.NopCloser(bytes.NewReader(raw)), int64(len(raw))
	return resp, err
}

// alter replaces the emulator by an altered one.
func (e *engine) alter(a altered) {
	a.RoundTripper = e.kaizala.Transport()
	e.connectors.transport = a
	e.write("config", map[string]any{"request_timeout": "60s"})
}

func TestThousandTenantsDoNotComeDueTogether(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenants(1000)
		time.Sleep(inWindow - day)
		assert.Zero(t, e.kaizala.CallCount(), "no call before the rotation window")
		e.restart()
		time.Sleep(9 * day)
		assert.Equal(t, 1000, e.kaizala.CallCount())
		t.Logf("%d exchanges in the busiest minute", e.kaizala.MaxPerMinute(e.connectorID))
		assert.LessOrEqual(t, e.kaizala.MaxPerMinute(e.connectorID), 10)
		for i := range 1000 {
			assert.Equal(t, originService, e.stored(fmt.Sprint("t", i)).RefreshTokenOrigin)
		}
	})
}

// Each tenant's own part of a time lies between the two fractions, and the tenants spread over all of that.
func TestOwnPart(t *testing.T) {
	least, most := time.Hour, time.Duration(0)
	for i := range 1000 {
		part := ownPart(fmt.Sprint("t", i), time.Hour, leadLeast, leadMost)
		least, most = min(least, part), max(most, part)
	}
	assert.GreaterOrEqual(t, least, 72*time.Second)
	assert.Less(t, least, 73*time.Second)
	assert.LessOrEqual(t, most, 180*time.Second)
	assert.Greater(t, most, 179*time.Second)
}

// A refresh token in its last tenth that an exchange has not replaced is exchanged again after a thirtieth of that tenth, and after a day
// at most: each tenant up to a quarter of that time earlier, and none later.
func TestRefreshTokenThatIsNotReplacedIsDueAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for lastTenth, again := range map[time.Duration]time.Duration{30 * time.Hour: time.Hour, 90 * day: day} {
			now := time.Now()
			e := &tenantEntry{LastExchange: now, Facts: tokenservice.Facts{RotatesFrom: now.Add(-time.Second), Expires: now.Add(lastTenth - time.Second)}}
			for i := range 100 {
				after := refreshDue(fmt.Sprint("t", i), e, 0).Sub(now)
				assert.GreaterOrEqual(t, after, again*3/4)
				assert.LessOrEqual(t, after, again)
			}
		}
	})
}

// A refresh token that an exchange in its last day has not replaced is exchanged again in the half of the time that is left, but for the last
// hour, and but for an end that is only assumed.
func TestRefreshTokenIsDueAgainBeforeItsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, c := range []struct {
			left, again time.Duration
			assumed     bool
		}{{left: 20 * time.Hour, again: 10 * time.Hour}, {left: 2 * time.Hour, again: time.Hour}, {left: time.Hour, again: day}, {left: 20 * time.Hour, again: day, assumed: true}} {
			now := time.Now()
			e := &tenantEntry{LastExchange: now, Facts: tokenservice.Facts{RotatesFrom: now.Add(c.left - 36*day), Expires: now.Add(c.left), Assumed: c.assumed}}
			for i := range 20 {
				after := refreshDue(fmt.Sprint("t", i), e, 0).Sub(now)
				assert.GreaterOrEqual(t, after, c.again*3/4)
				assert.LessOrEqual(t, after, c.again)
			}
		}
	})
}

func TestTenantPastItsTimeGoesAtTheNextTick(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newRotatingEngine(t)
		e.pass(time.Minute)
		assert.Equal(t, 1, e.kaizala.CallCount())
		assert.Equal(t, e.kaizala.CurrentRefreshToken("acme"), e.stored("acme").RefreshToken)
	})
	synctest.Test(t, func(t *testing.T) { // Vault was down when the tenant was due
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		e.stop()
		time.Sleep(360 * day)
		e.start()
		assert.Zero(t, e.kaizala.CallCount(), "the initialization makes no call")
		e.pass(time.Minute)
		assert.Equal(t, e.kaizala.CurrentRefreshToken("acme"), e.stored("acme").RefreshToken)
	})
}

// The index's timer does not fire: the periodic function alone makes the exchange
// that is due.
func TestPeriodicFunctionAloneRenews(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		e.index.mu.Lock()
		e.index.timer.Stop()
		e.index.armed = time.Unix(0, 0)
		e.index.mu.Unlock()
		time.Sleep(340 * day)
		require.Zero(t, e.kaizala.CallCount())
		e.minute()
		e.quiet("acme")
		assert.Equal(t, 1, e.kaizala.CallCount())
	})
}

func TestOpaqueTokenIsExchangedEachMonth(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		genuine := e.newToken("acme")
		e.alter(altered{request: func(r *http.Request) {
			if r.Header.Get("refreshToken") == "opaque" {
				r.Header.Set("refreshToken", genuine)
			}
		}})
		e.write("tenants/acme", map[string]any{"refresh_token": "opaque", "verify": false})
		assert.NotContains(t, e.read("tenants/acme"), "refresh_token_expire_time")
		time.Sleep(320 * day)
		calls := e.kaizala.Calls()
		require.NotEmpty(t, calls)
		last := e.stored("acme").RefreshTokenSet
		for _, call := range calls {
			assert.LessOrEqual(t, call.Start.Sub(last), (30 * day))
			last = call.Start
		}
		assert.LessOrEqual(t, time.Since(last), (30 * day))
		assert.LessOrEqual(t, len(calls), 16, "not much more often than once a month")
		time.Sleep(40 * day) // in the rotation window a refresh token comes whose end is known
		assert.Equal(t, e.kaizala.CurrentRefreshToken("acme"), e.stored("acme").RefreshToken)
	})
}

func TestIdleTickReadsNoStorage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenants(200)
		e.read("creds/t1")
		e.restart()
		e.pass(time.Minute)
		synctest.Wait() // the first tick reads the keys that each process reads once
		ops := e.storage.ops.Load()
		e.pass(3 * time.Hour)
		assert.Equal(t, ops, e.storage.ops.Load())
	})
}

func TestAccessTokensInUseAreRenewedAhead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("busy")
		e.addTenant("idle")
		e.read("creds/idle")
		for range 10 * 24 {
			e.read("token/busy")
			calls := e.kaizala.CallCount()
			e.pass(time.Hour)
			before := e.kaizala.CallCount()
			e.read("creds/busy")
			assert.Equal(t, before, e.kaizala.CallCount(), "no reader waits for Kaizala (%d calls before)", calls)
		}
		assert.LessOrEqual(t, e.kaizala.Exchanges("busy"), 11)
		assert.LessOrEqual(t, e.kaizala.Exchanges("idle"), 2, "an access token that is not read is not renewed")
	})
}

// If the service does not replace a refresh token, then in its last 30 days the
// answers to readers and to reads of the tenant have a warning, and the log has one
// line a day.
func TestWarningThirtyDaysAhead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.kaizala.SetOldTokenDies(false)
		e.alter(altered{answer: func(body map[string]any) { body["refreshToken"] = nil }})
		e.addTenant("acme")
		const line = "a tenant's refresh token ends soon, and the service has not replaced it"
		told := func() []string {
			resp := e.ok(logical.ReadOperation, "creds/acme", nil)
			return append(resp.Warnings, e.ok(logical.ReadOperation, "tenants/acme", nil).Warnings...)
		}
		time.Sleep(334 * day)
		assert.Empty(t, told())
		assert.Zero(t, e.log.count(line))
		time.Sleep(2 * day)
		for range 5 {
			warnings := told()
			require.Len(t, warnings, 2)
			for _, warning := range warnings {
				assert.Contains(t, warning, "tenant user has to generate a new one")
				assert.Contains(t, warning, "tenants/acme")
			}
			e.pass(time.Hour)
		}
		lines := e.log.count(line)
		e.pass(10 * day)
		assert.InDelta(t, 10, e.log.count(line)-lines, 1, "one line a day")
		assert.Equal(t, e.log.count(line), strings.Count(strings.Join(e.events.all(), "\n"), eventExpiring+" acme"))
		// From 90 % of its life on, the refresh token is exchanged about once a day, because the service may replace it.
		assert.LessOrEqual(t, e.kaizala.MaxPerMinute(e.connectorID), 2)

		e.write("tenants/acme", map[string]any{"refresh_token": e.newToken("acme")})
		assert.Empty(t, told())
		lines = e.log.count(line)
		e.pass(3 * day)
		assert.Equal(t, lines, e.log.count(line))
	})
}

func TestExpiredTenant(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.kaizala.SetRefreshTokenLife(10 * day)
		e.addTenant("acme")
		e.kaizala.Inject(kaizalatest.Fault{Status: 500})
		time.Sleep(11 * day)
		assert.Equal(t, statusExpired, e.status("acme"))
		warnings := e.ok(logical.ReadOperation, "tenants/acme", nil).Warnings
		require.Len(t, warnings, 1)
		assert.Regexp(t, `^The refresh token of tenant "acme" expired at .*: its tenant user has to generate a new one .* and write it to tenants/acme\.$`, warnings[0])
		e.kaizala.ClearFaults()
		e.kaizala.ResetCalls()
		_, status, text := e.try(logical.ReadOperation, "creds/acme", nil)
		assert.Equal(t, http.StatusBadRequest, status)
		assert.Contains(t, text, "tenant user has to generate a new one")
		e.pass(time.Hour)
		assert.Zero(t, e.kaizala.CallCount())
		e.write("tenants/acme", map[string]any{"refresh_token": e.newToken("acme")})
		assert.Equal(t, statusOK, e.status("acme"))
	})
}

// Vault does not take an event: no reader and no write waits for that, and the stop of the engine waits only for its limit.
func TestEventHoldsUpNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newRotatingEngine(t)
		e.events.hang.Store(true)
		begun := time.Now()
		e.read("creds/acme")
		e.write("tenants/acme", map[string]any{"ttl": "1h"})
		assert.Equal(t, begun, time.Now())
		assert.Equal(t, e.kaizala.CurrentRefreshToken("acme"), e.stored("acme").RefreshToken)
		e.stop()
		assert.Equal(t, stopWithin-time.Second, time.Since(begun))
	})
}

func TestEventsAreSentOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newRotatingEngine(t)
		e.read("creds/acme")
		synctest.Wait()
		assert.Equal(t, []string{eventRotated + " acme"}, e.events.all())
		e.newToken("acme") // ends the stored refresh token
		_, _, _ = e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
		_, _, _ = e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
		synctest.Wait()
		assert.Equal(t, []string{eventRotated + " acme", eventRejected + " acme"}, e.events.all())
	})
}

// After a long downtime more tenants are due than the share can serve at once: the tenants whose refresh tokens end first are served
// first, so that none of these tokens ends while the engine exchanges others that have days left.
func TestWhoEndsFirstGoesFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.setShare(5) // four of the five are for background work
		var hasty, patient []string
		for i := range 50 {
			hasty = append(hasty, e.newToken(fmt.Sprint("hasty", i)))
		}
		time.Sleep(5 * day)
		for i := range 100 {
			patient = append(patient, e.newToken(fmt.Sprint("patient", i)))
		}
		for i, token := range hasty {
			e.write(fmt.Sprint("tenants/hasty", i), map[string]any{"refresh_token": token, "verify": false})
		}
		for i, token := range patient {
			e.write(fmt.Sprint("tenants/patient", i), map[string]any{"refresh_token": token, "verify": false})
		}
		e.stop()
		time.Sleep(360*day - 20*time.Minute)
		e.start()
		e.pass(15 * time.Minute)
		for i, token := range hasty {
			assert.NotEqual(t, token, e.stored(fmt.Sprint("hasty", i)).RefreshToken)
		}
		e.pass(time.Hour)
		for i, token := range patient {
			assert.NotEqual(t, token, e.stored(fmt.Sprint("patient", i)).RefreshToken)
		}
	})
}

// After a refused connector is written, or accepted again, its failed tenants are tried at once, without a reader.
func TestTroubledTenantsAreTriedOnceTheConnectorIsRight(t *testing.T) {
	for name, right := range map[string]func(*engine){
		"written":  func(e *engine) { e.write("config", map[string]any{"connector_secret": e.secret}) },
		"accepted": func(*engine) { time.Sleep(probeEvery) }, // the exchange of one of the tenants is the probe
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newConfiguredEngine(t)
				tenants := []string{"acme", "beta"}
				for _, tenant := range tenants {
					e.addTenant(tenant)
					e.lease(tenant)
				}
				e.kaizala.Inject(kaizalatest.Fault{Delay: time.Second, Times: 2, Status: 401, Body: connectorsRefusal})
				e.kaizala.Inject(kaizalatest.Fault{Delay: time.Second, Process: true})
				for _, tenant := range tenants {
					go func() { _, _, _ = e.try(logical.UpdateOperation, "tenants/"+tenant+"/refresh", nil) }()
				}
				time.Sleep(2 * time.Second)
				for _, tenant := range tenants {
					require.Equal(t, statusDegraded, e.status(tenant))
				}
				right(e)
				time.Sleep(5 * time.Second)
				for _, tenant := range tenants {
					assert.Equal(t, statusOK, e.status(tenant))
				}
			})
		})
	}
}

// The registry keeps a record under a request and a flight: an exchange could begin on the next record of the same name beside the one on this,
// with the same refresh token.
func TestRecordStaysWhileItIsUsed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		record := e.tenants.record("acme")
		_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
		require.Equal(t, 400, status)
		require.Same(t, record, e.tenants.named("acme"), "a request has it")
		f, err := record.begin(&flight{t: record, v: record.view.Load(), done: make(chan struct{})}, func() bool { return true })
		require.NoError(t, err)
		e.tenants.release(record)
		require.Same(t, record, e.tenants.named("acme"), "a flight has it")
		record.land(f, nil)
		e.tenants.release(record)
		assert.Nil(t, e.tenants.named("acme"))
	})
}

// A write of an unknown tenant that cannot begin its exchange leaves no record.
func TestWriteThatDoesNotBeginLeavesNoRecord(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.stopping = true // no flight begins
		_, status, text := e.try(logical.CreateOperation, "tenants/acme", map[string]any{"refresh_token": e.newToken("acme")})
		e.stopping = false
		require.Equal(t, 503, status, text)
		assert.Nil(t, e.tenants.named("acme"))
	})
}

// A record that the registry has dropped does not change the index entry of the record with the same name.
func TestDroppedRecordLeavesTheIndexAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		dropped := e.tenants.record("acme")
		e.tenants.release(dropped)
		e.addTenant("acme")
		require.NotSame(t, dropped, e.tenants.named("acme"))
		e.schedule(dropped)
		names, _ := e.index.due(time.Now().Add(366 * day))
		assert.Equal(t, []string{"acme"}, names)
	})
}
