package backend

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/kaizala/kaizalatest"
)

// yearTenant is a tenant in the simulated year, with an app that starts and ends.
type yearTenant struct {
	name    string
	inUse   bool
	changes int // the minute when the app starts or ends next
	lease   *logical.Response
	evicted bool // its access token was given up, and no reader has come since
	usedOn  int  // the last day on which it was read
}

// TestYear runs 200 tenants for 370 days without an operator: within the documented
// limits, through restarts and an outage of a day in the rotation window.
func TestYear(t *testing.T) {
	if testing.Short() {
		t.Skip("simulates a year")
	}
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		tenants := 200
		if raceDetector {
			tenants = 20 // 200 take ten times as long, and the race detector finds no more races with them
		}
		const (
			days        = 370
			perDay      = 24 * 60
			restarted   = 100 * perDay
			outageBegun = 325 * perDay // tenants are 325 to 342 days old
			crashed     = outageBegun + 600
			outageEnds  = 326 * perDay
			appsEvery   = 30 // minutes
		)
		// Vault calls the periodic function each minute. Here it is called less often
		// far from an event: the engine's own timer makes the exchanges in between.
		near := func(minute, event int) bool { return minute >= event-60 && minute < event+2*perDay }
		chance := rand.New(rand.NewPCG(1, 2))
		e := newEngine(t)
		e.connectorID, e.secret = e.kaizala.RegisterConnector()
		e.write("config", map[string]any{"connector_id": e.connectorID, "connector_secret": e.secret})
		all := make([]*yearTenant, tenants)
		for i := range all {
			all[i] = &yearTenant{name: fmt.Sprintf("t%03d", i), changes: (1 + chance.IntN(120*perDay/appsEvery)) * appsEvery, usedOn: -1}
			e.addTenant(all[i].name)
			time.Sleep(400 * time.Hour / time.Duration(tenants)) // spread over days, so that the outage 330 days later finds tenants before, in and after their rotation
		}

		var exchanges, afterEvictions, usedDays, busiest, failedReads int
		// count is also called at the end of a process: the next process does not know
		// the last calls, so the calls in a minute are counted for each process.
		count := func() {
			exchanges += e.kaizala.TotalExchanges()
			busiest = max(busiest, e.kaizala.MaxPerMinute(e.connectorID))
			for _, call := range e.kaizala.Calls() {
				require.NotEqual(t, http.StatusTooManyRequests, call.Status, "Kaizala's own limit was hit")
			}
			e.kaizala.ResetCalls()
		}
		read := func(tenant *yearTenant, minute int) {
			resp, status, text := e.try(logical.ReadOperation, "creds/"+tenant.name, nil)
			if status != http.StatusOK {
				failedReads++
				require.True(t, status == http.StatusServiceUnavailable && minute > outageBegun && minute < outageEnds+2,
					"minute %d of the outage's end, %s: %d %s", minute-outageEnds, tenant.name, status, text)
				return
			}
			if tenant.evicted {
				tenant.evicted = false
				afterEvictions++
			}
			if today := minute / perDay; tenant.usedOn != today {
				tenant.usedOn = today
				usedDays++
			}
			resp.Secret.IssueTime = time.Now()
			tenant.lease = resp
		}
		for minute := 0; minute < days*perDay; {
			step := appsEvery
			if near(minute, restarted) || near(minute, outageBegun) || near(minute, outageEnds) {
				step = 1
			}
			minute += step
			time.Sleep(time.Duration(step) * time.Minute)
			e.minute()
			switch minute {
			case restarted:
				count()
				e.restart()
			case outageBegun:
				e.kaizala.Inject(kaizalatest.Fault{Status: http.StatusServiceUnavailable, Body: "<html>"})
			case crashed:
				count()
				e.crash()
			case outageEnds:
				e.kaizala.ClearFaults()
			}
			if minute%appsEvery != 0 {
				continue
			}
			for i, tenant := range all {
				if minute == tenant.changes {
					tenant.inUse = !tenant.inUse
					tenant.changes += (60 + chance.IntN(60)) * perDay
					if tenant.inUse {
						tenant.changes -= 50 * perDay
						read(tenant, minute)
					}
				}
				if !tenant.inUse || (minute/appsEvery+i)%(perDay/4/appsEvery) != 0 {
					continue
				}
				if tenant.lease != nil && chance.IntN(200) == 0 { // the app is restarted
					if !tenant.evicted {
						require.NoError(t, e.revokeLease(tenant.lease))
						entry := e.stored(tenant.name)
						tenant.evicted = entry.Access == nil
					}
				}
				read(tenant, minute)
			}
			if minute%(30*perDay) == 0 {
				count()
			}
		}
		count()

		for _, tenant := range all {
			assert.Equal(t, originService, e.stored(tenant.name).RefreshTokenOrigin, "%s has its second refresh token", tenant.name)
			assert.True(t, e.kaizala.RefreshTokenAlive(e.stored(tenant.name).RefreshToken), tenant.name)
			time.Sleep(5 * time.Second)
			e.read("creds/" + tenant.name)
			assert.Equal(t, statusOK, e.status(tenant.name))
		}
		rate := float64(exchanges-afterEvictions) / float64(usedDays)
		t.Logf("%d tenants, %d days, of which tenants were in use on %d: %d exchanges, %d of them after evictions; %.3f a day in use without those; %d calls in the busiest minute; %d reads failed in the outage",
			tenants, days, usedDays, exchanges, afterEvictions, rate, busiest, failedReads)
		assert.Less(t, rate, 1.1)
		assert.LessOrEqual(t, busiest, defaultExchangesPerMinute)
	})
}
