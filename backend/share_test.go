package backend

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"
)

func takeAll(t *testing.T, s *share, n, limit int, background bool) {
	for i := range n {
		done, err := s.take(context.Background(), fmt.Sprint(i), limit, 0, background)
		require.NoError(t, err)
		done()
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
				done, err := s.take(context.Background(), rapid.SampledFrom([]string{"a", "b", "c"}).Draw(r, "tenant"), limit, patience, rapid.Bool().Draw(r, "background"))
				if err != nil {
					continue
				}
				before := time.Duration(rapid.IntRange(0, 9_000).Draw(r, "ms to the service")) * time.Millisecond
				time.Sleep(before)
				arrivals = append(arrivals, time.Now())
				done()
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
		s.pause(30 * time.Second)
		s.pause(time.Second)
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
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.write("config", map[string]any{"exchanges_per_minute": 5})
		for i := range 5 {
			e.addTenant(fmt.Sprint("t", i))
			e.read(fmt.Sprint("creds/t", i))
		}
		e.addTenant("more")
		e.crash()
		e.awaitIndex(context.Background())
		_, status, _ := e.try(logical.ReadOperation, "creds/more", nil)
		assert.Equal(t, 429, status)
		time.Sleep(window)
		e.read("creds/more")
		assert.Equal(t, 5, e.kaizala.MaxPerMinute(e.connectorID))
	})
}
