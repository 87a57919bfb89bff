package backend

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/kaizala/kaizalatest"
)

func takeAll(t *testing.T, s *share, n, limit int, background bool) {
	for i := range n {
		c, err := s.take(context.Background(), fmt.Sprint(i), limit, 0, background)
		require.NoError(t, err)
		s.end(c)
	}
}

func TestNoMinuteSeesMoreCallsThanTheShare(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		synctest.Test(t, func(t *testing.T) {
			limit := rapid.IntRange(1, 12).Draw(r, "limit")
			var s share
			var arrivals []time.Time // anywhere between permission and end
			for range rapid.IntRange(1, 60).Draw(r, "calls") {
				time.Sleep(time.Duration(rapid.IntRange(0, 15_000).Draw(r, "pause ms")) * time.Millisecond)
				c, err := s.take(context.Background(), rapid.SampledFrom([]string{"a", "b", "c"}).Draw(r, "tenant"), limit, patience, rapid.Bool().Draw(r, "background"))
				if err != nil {
					continue
				}
				before := time.Duration(rapid.IntRange(0, 9_000).Draw(r, "ms to the service")) * time.Millisecond
				time.Sleep(before)
				arrivals = append(arrivals, time.Now())
				s.end(c)
			}
			for i, from := range arrivals {
				n := 0
				for _, at := range arrivals[i:] {
					if at.Sub(from) < window {
						n++
					}
				}
				if n > limit {
					r.Fatalf("%d calls within a minute, and a share of %d", n, limit)
				}
			}
		})
	})
}

func TestTenantTakesAFifthOfTheShare(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s share
		for range 2 {
			_, err := s.take(t.Context(), "greedy", 10, 0, false)
			require.NoError(t, err)
		}
		_, err := s.take(t.Context(), "greedy", 10, patience, false)
		assert.ErrorAs(t, err, new(*limitError))
		_, err = s.take(t.Context(), "modest", 10, 0, false)
		assert.NoError(t, err)

		var small share
		_, err = small.take(t.Context(), "a", 1, 0, false)
		assert.NoError(t, err, "at least one")
	})
}

func TestReaderWaitsAMomentOrIsToldAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s share
		takeAll(t, &s, 5, 5, false)
		time.Sleep(window - patience - time.Second)
		begun := time.Now()
		_, err := s.take(t.Context(), "x", 5, patience, false)
		limit := (*limitError)(nil)
		require.ErrorAs(t, err, &limit)
		assert.Equal(t, begun, time.Now(), "at once")
		assert.Equal(t, begun.Add(patience+time.Second), limit.until)

		time.Sleep(time.Second)
		_, err = s.take(t.Context(), "x", 5, patience, false)
		assert.NoError(t, err)
		assert.Equal(t, begun.Add(patience+time.Second), time.Now())
	})
}

func TestWaitersComeInTurnAndAllCome(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s share
		for i := range 5 { // places that come free a second apart
			takeAll(t, &s, 1, 100, false)
			_ = i
			time.Sleep(time.Second)
		}
		time.Sleep(window - 5*time.Second)
		var readers sync.WaitGroup
		for i := range 5 {
			readers.Go(func() {
				_, err := s.take(context.Background(), fmt.Sprint("reader", i), 5, patience, false)
				assert.NoError(t, err)
			})
		}
		readers.Wait()
	})
}

func TestBackgroundLeavesRoomForReaders(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s share
		takeAll(t, &s, 8, 10, true)
		_, err := s.take(t.Context(), "due", 10, 0, true)
		assert.ErrorAs(t, err, new(*limitError))
		takeAll(t, &s, 2, 10, false)
	})
}

func TestPauseHoldsEverybody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s share
		s.pause(time.Now().Add(30 * time.Second))
		s.pause(time.Now().Add(time.Second))
		_, err := s.take(t.Context(), "a", 10, patience, false)
		limit := (*limitError)(nil)
		require.ErrorAs(t, err, &limit)
		assert.True(t, limit.byService)
		time.Sleep(30 * time.Second)
		_, err = s.take(t.Context(), "a", 10, 0, false)
		assert.NoError(t, err)
	})
}

func TestShareOutlivesTheProcess(t *testing.T) {
	for name, c := range map[string]struct {
		fault  kaizalatest.Fault
		status int
	}{
		"calls that succeeded":  {kaizalatest.Fault{}, 200},
		"calls that failed":     {kaizalatest.Fault{Status: 500}, 503},
		"calls without an end":  {kaizalatest.Fault{Hang: true}, 503},
		"calls that took long":  {kaizalatest.Fault{Delay: 8 * time.Second}, 200},
		"calls sent elsewhere":  {kaizalatest.Fault{Status: 308, Header: http.Header{"Location": {"https://inc.osi.office.net/v1/accessToken"}}}, 429},
		"calls that never came": {kaizalatest.Fault{Reset: true}, 503},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newConfiguredEngine(t)
				e.setShare(5)
				e.addTenants(8)
				e.kaizala.Inject(c.fault)
				var readers sync.WaitGroup
				for i := range 4 {
					readers.Go(func() {
						_, status, text := e.try(logical.ReadOperation, fmt.Sprint("creds/t", i), nil)
						assert.Equal(t, c.status, status, text)
					})
				}
				readers.Wait()
				time.Sleep(time.Second)
				e.crash()
				e.kaizala.ClearFaults()
				// Another process for each moment at which a call could come.
				for range 90 {
					dying := *e
					for i := range 8 {
						go func() { _, _, _ = dying.try(logical.ReadOperation, fmt.Sprint("creds/t", i), nil) }()
					}
					time.Sleep(2 * time.Second)
					e.crash()
				}
				assert.LessOrEqual(t, e.kaizala.MaxPerMinute(e.connectorID), 5)
				e.pass(10 * time.Minute)
				for i := range 8 {
					e.read(fmt.Sprint("creds/t", i))
					time.Sleep(window) // no more than the share
				}
			})
		})
	}
}

// A call under way may have reached the service as late as the process ended.
func TestCallUnderWayAtACrash(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.setShare(1)
		e.addTenants(1)
		e.kaizala.Inject(kaizalatest.Fault{Hang: true})
		_, _, _ = e.try(logical.ReadOperation, "creds/t0", nil)
		time.Sleep(41 * time.Second)
		e.crash()
		e.kaizala.ClearFaults()
		_, status, _ := e.try(logical.ReadOperation, "creds/t0", nil)
		assert.Equal(t, http.StatusTooManyRequests, status, "50 seconds after the call")
		time.Sleep(54 * time.Second)
		_, status, _ = e.try(logical.ReadOperation, "creds/t0", nil)
		assert.Equal(t, http.StatusTooManyRequests, status, "54 seconds after the process")
		time.Sleep(2 * time.Second)
		e.read("creds/t0") // within a reader's patience
		assert.Equal(t, 2, e.kaizala.CallCount())
	})
}

func TestFifthOfATenantOutlivesTheProcess(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.setShare(10)
		e.addTenants(2)
		for range 2 {
			e.write("tenants/t0/refresh", nil)
			e.crash()
		}
		_, status, _ := e.try(logical.UpdateOperation, "tenants/t0/refresh", nil)
		assert.Equal(t, http.StatusTooManyRequests, status)
		e.write("tenants/t1/refresh", nil)
	})
}

func TestPauseOutlivesTheProcess(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenants(3)
		e.kaizala.Inject(kaizalatest.Fault{Status: http.StatusTooManyRequests, Header: http.Header{"Retry-After": {"600"}}})
		_, _, _ = e.try(logical.ReadOperation, "creds/t0", nil)
		e.kaizala.ClearFaults()
		begun := time.Now()
		for time.Since(begun) < 590*time.Second {
			e.crash()
			_, status, text := e.try(logical.ReadOperation, "creds/t1", nil)
			assert.Equal(t, http.StatusTooManyRequests, status)
			assert.Contains(t, text, begun.Add(600*time.Second).UTC().Format(time.RFC3339))
			e.pass(20 * time.Second)
		}
		assert.Equal(t, 1, e.kaizala.CallCount())
		time.Sleep(20 * time.Second)
		e.read("creds/t1")
	})
}

func TestRefusedConnectorOutlivesTheProcess(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenants(1)
		e.kaizala.SetConnectorSecret(e.connectorID, "NEWSECRET1")
		_, _, _ = e.try(logical.ReadOperation, "creds/t0", nil)
		for _, ends := range []func(){e.crash, e.restart, func() { e.InvalidateKey(t.Context(), connectorPrefix+defaultConnector) }} {
			ends()
			e.pass(time.Hour)
			_, status, text := e.try(logical.UpdateOperation, "tenants/t0/refresh", nil)
			assert.Equal(t, http.StatusBadRequest, status)
			assert.Contains(t, text, "connector_secret")
		}
		assert.Equal(t, 1, e.kaizala.CallCount())
		e.write("config", map[string]any{"connector_secret": "NEWSECRET1"})
		e.crash()
		e.read("creds/t0")
	})
}

// A refusal of what the operator has replaced meanwhile is worth nothing.
func TestRefusalThatComesLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenants(2)
		e.write("config", map[string]any{"connector_secret": "WRONGSECRET"})
		e.kaizala.Inject(kaizalatest.Fault{Delay: 5 * time.Second, Times: 1})
		go func() { _, _, _ = e.try(logical.ReadOperation, "creds/t0", nil) }()
		time.Sleep(time.Second)
		e.write("config", map[string]any{"connector_secret": e.secret})
		time.Sleep(10 * time.Second)
		e.read("creds/t1")
		e.crash()
		e.read("creds/t1")
		e.write("tenants/t1/refresh", nil)
	})
}

func TestDeletedConnectorLeavesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenants(1)
		e.read("creds/t0")
		e.kaizala.Inject(kaizalatest.Fault{Status: http.StatusTooManyRequests, Times: 1})
		_, _, _ = e.try(logical.UpdateOperation, "tenants/t0/refresh", nil)
		e.ok(logical.DeleteOperation, "tenants/t0", nil)
		e.ok(logical.DeleteOperation, "config", nil)
		left, err := logical.CollectKeys(t.Context(), e.storage.InmemStorage)
		require.NoError(t, err)
		assert.Empty(t, left)
	})
}

// After a start, all who come at once wait for one reading of what was written
// down, each no longer than he would anyway.
func TestCallsAreRecalledOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenants(40)
		for i := range 20 {
			e.read(fmt.Sprint("creds/t", i))
		}
		e.crash()
		var reads sync.Map
		e.storage.surround(func(op, key string, do func() error) error {
			if strings.HasPrefix(key, callPrefix) && op != "put" {
				time.Sleep(time.Second)
				if _, again := reads.LoadOrStore(op+key, true); again {
					t.Errorf("%s %s for the second time", op, key)
				}
			}
			return do()
		})
		var readers sync.WaitGroup
		for i := range 40 {
			readers.Go(func() { e.read(fmt.Sprint("creds/t", i)) })
		}
		readers.Go(func() {
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			defer cancel()
			begun := time.Now()
			_, err := e.do(ctx, logical.ReadOperation, "creds/t30", nil)
			assert.Error(t, err)
			assert.Equal(t, time.Second, time.Since(begun))
		})
		readers.Wait()
	})
}
