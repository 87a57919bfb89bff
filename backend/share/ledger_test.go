package share

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// store is storage whose operations a test can delay, count or fail.
type store struct {
	logical.InmemStorage
	mu     sync.Mutex
	around func(ctx context.Context, op, key string) error // before the operation
	after  func(op, key string)
}

func (s *store) surround(around func(ctx context.Context, op, key string) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.around = around
}

func (s *store) before(ctx context.Context, op, key string) error {
	s.mu.Lock()
	around := s.around
	s.mu.Unlock()
	if around == nil {
		return nil
	}
	return around(ctx, op, key)
}

func (s *store) List(ctx context.Context, prefix string) ([]string, error) {
	if err := s.before(ctx, "list", prefix); err != nil {
		return nil, err
	}
	return s.InmemStorage.List(ctx, prefix)
}

func (s *store) Get(ctx context.Context, key string) (*logical.StorageEntry, error) {
	if err := s.before(ctx, "get", key); err != nil {
		return nil, err
	}
	return s.InmemStorage.Get(ctx, key)
}

func (s *store) Put(ctx context.Context, e *logical.StorageEntry) error {
	if err := s.before(ctx, "put", e.Key); err != nil {
		return err
	}
	err := s.InmemStorage.Put(ctx, e)
	if s.after != nil {
		s.after("put", e.Key)
	}
	return err
}

func (s *store) Delete(ctx context.Context, key string) error {
	if err := s.before(ctx, "delete", key); err != nil {
		return err
	}
	return s.InmemStorage.Delete(ctx, key)
}

func (s *store) keys(t *testing.T) []string {
	t.Helper()
	keys, err := logical.CollectKeys(context.Background(), &s.InmemStorage)
	require.NoError(t, err)
	return keys
}

// write stores an entry as another process does.
func (s *store) write(t *testing.T, key, value string) {
	t.Helper()
	require.NoError(t, s.InmemStorage.Put(context.Background(), &logical.StorageEntry{Key: key, Value: []byte(value)}))
}

func (s *store) read(t *testing.T, key string) string {
	t.Helper()
	e, err := s.InmemStorage.Get(context.Background(), key)
	require.NoError(t, err)
	if e == nil {
		return ""
	}
	return string(e.Value)
}

// from returns the share of a new process on this storage.
func from(t *testing.T, storage logical.Storage, limit int) *Share {
	t.Helper()
	s := New(storage, "hr")
	s.Configure(limit, timeout)
	require.NoError(t, s.Load(t.Context()))
	return s
}

// noted takes a call and notes it in storage.
func noted(t *testing.T, s *Share, want Want) *Call {
	t.Helper()
	c := take(t, s, want)
	require.NoError(t, c.Note(t.Context()))
	return c
}

// counts is how long a call counts in the next process, from when it was noted: its request may begin as late as storage may take its note,
// and take as long as it may.
const counts = gather + storeWithin + timeout + Window

func ahead(d time.Duration) string { return time.Now().Add(d).UTC().Format(time.RFC3339Nano) }

// The stored form is that of version 0.1.0: each version reads what the other has written.
func TestStoredForm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var storage store
		s := from(t, &storage, 10)
		until, at := ahead(counts), ahead(0)
		noted(t, s, Want{Tenant: "acme"})
		noted(t, s, Want{Tenant: "acme", Hop: true})
		noted(t, s, Want{Tenant: "acme", Class: Background})
		noted(t, s, Want{Class: Housekeeping})
		pause := ahead(90 * time.Second)
		require.NoError(t, s.pauseAndStore(t.Context(), time.Now().Add(90*time.Second)))
		assert.JSONEq(t, `{"format":1,"tenant":"acme","at":"`+at+`","until":"`+until+`"}`, storage.read(t, "calls/hr/0"))
		assert.JSONEq(t, `{"format":1,"until":"`+until+`"}`, storage.read(t, "calls/hr/1"))
		assert.JSONEq(t, `{"format":1,"tenant":"acme","at":"`+at+`","until":"`+until+`"}`, storage.read(t, "calls/hr/2"))
		assert.JSONEq(t, `{"format":1,"housekeeping":true,"until":"`+until+`"}`, storage.read(t, "calls/hr/3"))
		assert.JSONEq(t, `{"format":1,"until":"`+pause+`"}`, storage.read(t, "calls/hr/pause"))
		assert.Len(t, storage.keys(t), 5)
	})
}

// A process ends before an exchange is answered: the next process gets that exchange from Unsettled once, however late it starts.
func TestUnsettled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var storage store
		s := from(t, &storage, 100)
		for _, tenant := range []string{"cut", "answered", "running"} {
			noted(t, s, Want{Tenant: tenant})
			time.Sleep(time.Second)
		}
		second := noted(t, s, Want{Tenant: "cut"})
		begun := time.Now()
		answered := noted(t, s, Want{Tenant: "answered"})
		_ = second
		noted(t, s, Want{Tenant: "", Class: Revocation})
		noted(t, s, Want{Tenant: "hop", Hop: true})
		noted(t, s, Want{Tenant: "unstored", Unstored: true})
		answered.End()
		answered.Settle(t.Context())
		assert.Zero(t, s.Unsettled("cut"), "Unsettled returns no exchange of this process")

		time.Sleep(time.Hour)
		s = from(t, &storage, 100)
		assert.Equal(t, begun.UTC(), s.Unsettled("cut").UTC(), "the time is that of the last exchange")
		assert.Zero(t, s.Unsettled("cut"), "a second time")
		assert.Equal(t, begun.Add(-2*time.Second).UTC(), s.Unsettled("answered").UTC(), "the exchange before was not settled")
		assert.Equal(t, begun.Add(-time.Second).UTC(), s.Unsettled("running").UTC())
		assert.Zero(t, s.Unsettled("hop"))
		assert.Zero(t, s.Unsettled("unstored"))
		assert.Zero(t, s.Unsettled(""))
	})
}

// Recalled returns until when a tenant's exchanges of an earlier process count, whether or not they were settled. It returns none of this
// process, none of another tenant, and none that was begun before the time.
func TestRecalled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var storage store
		s := from(t, &storage, 100)
		first := time.Now()
		noted(t, s, Want{Tenant: "acme"}).End()
		time.Sleep(time.Second)
		second := noted(t, s, Want{Tenant: "acme"})
		second.End()
		second.Settle(t.Context())
		assert.Zero(t, s.Recalled("acme", time.Time{}), "Recalled returns no exchange of this process")

		s = from(t, &storage, 100)
		assert.Equal(t, time.Now().Add(Window), s.Recalled("acme", first), "the exchange may have ended just before this process began")
		assert.Zero(t, s.Recalled("acme", first.Add(time.Second)))
		assert.Zero(t, s.Recalled("other", time.Time{}))

		time.Sleep(counts - Window + 10*time.Second)
		s = from(t, &storage, 100)
		assert.Equal(t, first.Add(time.Second+counts).UTC(), s.Recalled("acme", first).UTC())
	})
}

// Storage has two exchanges of a tenant whose answers were not noted, at places in either order: Unsettled returns the later one.
func TestUnsettledIsTheLatest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, first := range []time.Duration{-2 * time.Second, -time.Second} {
			var storage store
			for place, at := range []time.Duration{first, -3*time.Second - first} {
				storage.write(t, fmt.Sprint("calls/hr/", place), `{"format":1,"tenant":"acme","at":"`+ahead(at)+`","until":"`+ahead(time.Minute)+`"}`)
			}
			assert.Equal(t, ahead(-time.Second), from(t, &storage, 5).Unsettled("acme").UTC().Format(time.RFC3339Nano))
		}
	})
}

// An exchange was noted while the clock was far ahead: Unsettled does not return it, because its time cannot be compared with later ones.
func TestUnsettledUnderAWrongClock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for ahead, known := range map[time.Duration]bool{Window: true, Window + time.Second: false} {
			var storage store
			at := time.Now().Add(ahead).UTC()
			raw, err := logical.StorageEntryJSON("calls/hr/0", map[string]any{"format": 1, "tenant": "acme", "at": at, "until": at.Add(2 * Window)})
			require.NoError(t, err)
			require.NoError(t, storage.Put(t.Context(), raw))
			assert.Equal(t, known, !from(t, &storage, 1).Unsettled("acme").IsZero(), ahead)
		}
	})
}

func TestSettleTouchesItsOwnPlaceAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var storage store
		s := from(t, &storage, 1)
		old := noted(t, s, Want{Tenant: "old"})
		old.End()
		time.Sleep(Window)
		noted(t, s, Want{Tenant: "new"}).End()
		was := storage.read(t, "calls/hr/0")
		old.Settle(t.Context())
		assert.Equal(t, was, storage.read(t, "calls/hr/0"))
	})
}

func TestRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var storage store
		s := from(t, &storage, 10)
		noted(t, s, Want{Tenant: "acme"}).End()
		noted(t, s, Want{Tenant: "acme", Hop: true}).End()
		noted(t, s, Want{Class: Housekeeping}).End()
		noted(t, s, Want{Class: Housekeeping}).End()
		const left = 49 * time.Second
		time.Sleep(counts - left - time.Second)
		noted(t, s, Want{Tenant: "acme"}) // it runs when the process dies
		time.Sleep(time.Second)

		// In the next process all these calls count until the time in their notes, also those that ended earlier.
		s = from(t, &storage, 10)
		refused(t, s, Want{Tenant: "acme"}, left)
		refused(t, s, Want{Class: Housekeeping}, left)
		spend(t, s, 5)
		refused(t, s, Want{}, left)
		assert.Equal(t, map[int]bool{0: true, 1: true, 2: true, 3: true, 4: true}, held(s))
		time.Sleep(left)
		take(t, s, Want{Class: Housekeeping})
		take(t, s, Want{Class: Housekeeping})
		take(t, s, Want{Tenant: "acme"})
		take(t, s, Want{})
		refused(t, s, Want{}, 11*time.Second)
		time.Sleep(11 * time.Second)
		take(t, s, Want{Tenant: "acme"})
	})
}

// Storage takes half a minute to take the note of a call, whose request begins after that and takes as long as it may: the next process
// counts the call until a Window after its end.
func TestCallThatIsNotedSlowly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var storage store
		s := from(t, &storage, 1)
		storage.slow(storeWithin - 1)
		call := noted(t, s, Want{})
		time.Sleep(timeout - time.Millisecond)
		call.End()
		time.Sleep(Window - time.Second)
		_, err := from(t, &storage, 1).Take(t.Context(), Want{})
		assert.Error(t, err)
	})
}

func TestCallThatNoLongerMattersIsNotCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var storage store
		c := noted(t, from(t, &storage, 1), Want{})
		c.End()
		time.Sleep(counts)
		spend(t, from(t, &storage, 1), 1)
	})
}

// A new process uses the places of stored calls that do not count any more.
func TestPlacesAfterARestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var storage store
		for _, place := range []string{"1", "3", "pause", "x", "4x"} {
			storage.write(t, "calls/hr/"+place, `{"format":1,"until":"`+ahead(time.Second)+`"}`)
		}
		storage.write(t, "calls/hr/0", `{"format":1,"until":"`+ahead(0)+`"}`)
		storage.write(t, "calls/hr/2", `{"format":2,"until":"`+ahead(time.Second)+`"}`)
		storage.write(t, "calls/hr/5", `{"format":1,"until":0}`)
		storage.write(t, "calls/hr/6", `nonsense`)
		storage.write(t, "calls/hr2/7", `{"format":1,"until":"`+ahead(time.Second)+`"}`)
		s := from(t, &storage, 6)
		assert.Equal(t, map[int]bool{1: true, 3: true}, held(s))
		assert.Equal(t, time.Now().Add(time.Second), s.PausedUntil())
		time.Sleep(time.Second)
		s.Configure(10, timeout)
		var got []int
		for range 7 {
			got = append(got, noted(t, s, Want{}).note.place)
		}
		assert.ElementsMatch(t, []int{0, 1, 2, 3, 4, 5, 6}, got)
	})
}

// pauseAndStore pauses the share and stores the pause, as the engine does.
func (s *Share) pauseAndStore(ctx context.Context, until time.Time) error {
	s.Pause(until)
	return s.StorePause(ctx)
}

func TestPause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var storage store
		s := from(t, &storage, 10)
		assert.True(t, s.PausedUntil().IsZero())
		begun := time.Now()
		end := begun.Add(30 * time.Second)
		require.NoError(t, s.pauseAndStore(t.Context(), end))
		require.NoError(t, s.pauseAndStore(t.Context(), begun.Add(time.Second)))
		for range 2 {
			assert.True(t, s.PausedUntil().Equal(end))
			_, err := s.Take(t.Context(), reader("a"))
			limit, _ := err.(*LimitError)
			require.NotNil(t, limit)
			assert.True(t, limit.ByService)
			assert.True(t, limit.Until.Equal(end))
			assert.Equal(t, begun, time.Now())
			s = from(t, &storage, 10) // a new process
		}
		time.Sleep(30*time.Second - patience)
		a := ask(t, s, t.Context(), reader("a"))
		time.Sleep(patience)
		synctest.Wait()
		require.NoError(t, a.err)
		assert.Equal(t, patience, a.after)
		spend(t, from(t, &storage, 10), 1)
	})
}

func TestPauseIsNotTheShare(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := limited(1)
		spend(t, s, 1)
		require.NoError(t, s.pauseAndStore(t.Context(), time.Now().Add(30*time.Second)))
		refused(t, s, Want{}, Window)
	})
}

func TestPauseSendsAwayWhoWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var storage store
		s := from(t, &storage, 1)
		spend(t, s, 1)
		time.Sleep(Window - 4*time.Second)
		storage.surround(func(ctx context.Context, _, _ string) error { <-ctx.Done(); return ctx.Err() })
		a := ask(t, s, t.Context(), reader("a"))
		time.Sleep(time.Second)
		until := time.Now().Add(20 * time.Second)
		begun := time.Now()
		err := s.pauseAndStore(t.Context(), until) // storage does not take the pause
		assert.Equal(t, context.DeadlineExceeded, err)
		assert.Equal(t, storeWithin, time.Since(begun))
		synctest.Wait()
		assert.Equal(t, &LimitError{Until: until, ByService: true}, a.err)
		assert.Equal(t, time.Second, a.after)
	})
}

// Pauses at the same time: storage has the longest one, in any order of the writes.
func TestPausesAtTheSameTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var storage store
		writes := 0
		s := from(t, &storage, 1)
		storage.surround(func(context.Context, string, string) error { writes++; time.Sleep(time.Second); return nil })
		begun := time.Now()
		var pauses sync.WaitGroup
		for _, d := range []time.Duration{1, 3, 2, 3} {
			pauses.Go(func() { assert.NoError(t, s.pauseAndStore(t.Context(), begun.Add(d*time.Hour))) })
			synctest.Wait()
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		assert.Equal(t, context.DeadlineExceeded, s.pauseAndStore(ctx, begun.Add(time.Minute)), "it waits no longer than its context")
		pauses.Wait()
		assert.Equal(t, 2, writes)
		assert.Equal(t, 2*time.Second, time.Since(begun))
		assert.True(t, from(t, &storage, 1).PausedUntil().Equal(begun.Add(3*time.Hour)))

		// A pause that storage did not take is stored with the next one.
		storage.surround(func(context.Context, string, string) error { return errors.New("no") })
		assert.EqualError(t, s.pauseAndStore(t.Context(), begun.Add(4*time.Hour)), "no")
		storage.surround(nil)
		require.NoError(t, s.pauseAndStore(t.Context(), begun.Add(time.Hour)))
		assert.True(t, from(t, &storage, 1).PausedUntil().Equal(begun.Add(4*time.Hour)))
	})
}

// A stored time is further in the future than is possible, because a clock was wrong: it delays calls no longer than its longest
// possible time, counted from when it is first read, also over restarts.
func TestWrongClockPasses(t *testing.T) {
	month := 30 * 24 * time.Hour
	for _, wrong := range []time.Duration{month, 200 * 365 * 24 * time.Hour} {
		synctest.Test(t, func(t *testing.T) {
			var storage store
			storage.write(t, "calls/hr/0", `{"format":1,"tenant":"a","until":"`+ahead(wrong)+`"}`)
			storage.write(t, "calls/hr/pause", `{"format":1,"until":"`+ahead(wrong)+`"}`)
			begun := time.Now()
			for time.Since(begun) < 24*time.Hour {
				s := from(t, &storage, 1)
				assert.Equal(t, begun.Add(24*time.Hour).UTC(), s.PausedUntil().UTC())
				time.Sleep(4 * time.Hour)
			}
			require.NoError(t, storage.InmemStorage.Delete(t.Context(), "calls/hr/pause"))
			s := from(t, &storage, 1)
			refused(t, s, Want{}, Window)
			time.Sleep(Window)
			spend(t, s, 1)

			require.NoError(t, s.pauseAndStore(t.Context(), time.Now().Add(wrong)))
			assert.Equal(t, time.Now().Add(24*time.Hour), s.PausedUntil())
		})
	}
}

func TestLongestPauseIsNotWrittenAnew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var storage store
		storage.write(t, "calls/hr/pause", `{"format":1,"until":"`+ahead(24*time.Hour)+`"}`)
		storage.surround(func(_ context.Context, op, _ string) error { assert.NotEqual(t, "put", op); return nil })
		from(t, &storage, 1)
	})
}

// A standby cannot correct a wrong pause in storage: it corrects it in memory alone.
func TestWrongPauseThatCannotBeWritten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var storage store
		storage.write(t, "calls/hr/pause", `{"format":1,"until":"`+ahead(25*time.Hour)+`"}`)
		storage.surround(func(_ context.Context, op, _ string) error {
			if op == "put" {
				return logical.ErrReadOnly
			}
			return nil
		})
		assert.Equal(t, time.Now().Add(24*time.Hour), from(t, &storage, 1).PausedUntil())
	})
}

func TestNoteThatFailsGivesBackThePlace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var storage store
		s := from(t, &storage, 1)
		storage.surround(func(context.Context, string, string) error { return logical.ErrReadOnly })
		for range 3 {
			assert.Equal(t, logical.ErrReadOnly, take(t, s, Want{Tenant: "a"}).Note(t.Context()))
		}
		storage.surround(func(ctx context.Context, _, _ string) error { <-ctx.Done(); return ctx.Err() })
		begun := time.Now()
		assert.Equal(t, context.DeadlineExceeded, take(t, s, Want{}).Note(t.Context()))
		assert.Equal(t, storeWithin, time.Since(begun))
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		assert.Equal(t, context.DeadlineExceeded, take(t, s, Want{}).Note(ctx))
		idle(t, s)
	})
}

// Callers that load at the same time wait for one read of storage, each no longer than its context.
func TestLoadsOnceForAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var storage store
		for i := range 40 {
			storage.write(t, fmt.Sprint("calls/hr/", i), `{"format":1,"until":"`+ahead(time.Hour)+`"}`)
		}
		var mu sync.Mutex
		reads, now, most := 0, 0, 0
		storage.surround(func(_ context.Context, op, _ string) error {
			mu.Lock()
			reads++
			now++
			most = max(most, now)
			mu.Unlock()
			time.Sleep(time.Second)
			mu.Lock()
			now--
			mu.Unlock()
			return nil
		})
		s := New(&storage, "hr")
		s.Configure(50, timeout)
		begun := time.Now()
		var all sync.WaitGroup
		for range 20 {
			all.Go(func() {
				assert.NoError(t, s.Load(context.Background()))
				assert.Equal(t, 6*time.Second, time.Since(begun))
			})
		}
		ctx, cancel := context.WithTimeout(t.Context(), 1500*time.Millisecond)
		defer cancel()
		assert.Equal(t, context.DeadlineExceeded, s.Load(ctx))
		assert.Equal(t, 1500*time.Millisecond, time.Since(begun))
		spend(t, s, 1) // no lock is held
		all.Wait()
		assert.Equal(t, 41, reads)
		assert.Equal(t, 8, most)
		require.NoError(t, s.Load(t.Context()))
		assert.Equal(t, 41, reads)
		spend(t, s, 9)
		refused(t, s, Want{}, Window-4500*time.Millisecond)
	})
}

func TestLoadThatFailsIsTriedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var storage store
		storage.write(t, "calls/hr/0", `{"format":1,"until":"`+ahead(time.Hour)+`"}`)
		s := New(&storage, "hr")
		s.Configure(1, timeout)
		broken := errors.New("storage is away")
		for _, fails := range []string{"list", "get"} {
			storage.surround(func(_ context.Context, op, _ string) error {
				if op == fails {
					return broken
				}
				return nil
			})
			assert.Equal(t, broken, s.Load(t.Context()))
		}
		storage.surround(func(ctx context.Context, _, _ string) error { <-ctx.Done(); return ctx.Err() })
		begun := time.Now()
		assert.Equal(t, context.DeadlineExceeded, s.Load(context.Background()))
		assert.Equal(t, storeWithin, time.Since(begun))
		storage.surround(nil)
		require.NoError(t, s.Load(t.Context()))
		refused(t, s, Want{}, Window)
	})
}

// An entry is deleted between the list of a load and the read of the entry: the load counts the others.
func TestEntryIsDeletedDuringALoad(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var storage store
		for _, place := range []string{"0", "1", "2"} {
			storage.write(t, "calls/hr/"+place, `{"format":1,"until":"`+ahead(time.Minute)+`"}`)
		}
		storage.surround(func(ctx context.Context, op, key string) error {
			if op == "get" && key == "calls/hr/1" {
				return storage.InmemStorage.Delete(ctx, key)
			}
			return nil
		})
		assert.Equal(t, map[int]bool{0: true, 2: true}, held(from(t, &storage, 3)))
	})
}

// After an invalidation the calls of another process count as storage has them, and those of this process as memory has them.
func TestInvalidate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var storage store
		storage.write(t, "calls/hr/0", `{"format":1,"tenant":"gone","until":"`+ahead(50*time.Second)+`"}`)
		storage.write(t, "calls/hr/9", `{"format":1,"tenant":"b","until":"`+ahead(20*time.Second)+`"}`)
		s := from(t, &storage, 5)
		noted(t, s, Want{Tenant: "a"}).End()
		running := noted(t, s, Want{Tenant: "r"})
		storage.write(t, "calls/hr/9", `{"format":1,"tenant":"b","until":"`+ahead(40*time.Second)+`"}`)
		require.NoError(t, storage.InmemStorage.Delete(t.Context(), "calls/hr/0"))
		require.NoError(t, s.Load(t.Context()))
		refused(t, s, Want{Tenant: "b"}, 20*time.Second)
		refused(t, s, Want{Tenant: "gone"}, 50*time.Second)

		s.Invalidate()
		require.NoError(t, s.Load(t.Context()))
		refused(t, s, Want{Tenant: "b"}, 40*time.Second)
		refused(t, s, Want{Tenant: "a"}, Window)
		refused(t, s, Want{Tenant: "r"}, Window)
		assert.NotContains(t, s.tenants, "gone")
		assert.Equal(t, map[int]bool{1: true, 2: true, 9: true}, held(s))
		spend(t, s, 2)
		refused(t, s, Want{}, 40*time.Second)
		running.Withdraw()
		time.Sleep(Window)

		// Calls of this process that have stopped counting stay so, although their notes in storage say otherwise.
		s.Invalidate()
		require.NoError(t, s.Load(t.Context()))
		spend(t, s, 5)
		idle(t, s)
	})
}

// An invalidation comes before storage is read: storage is read.
func TestInvalidateBeforeTheFirstLoad(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var storage store
		storage.write(t, "calls/hr/0", `{"format":1,"until":"`+ahead(time.Minute)+`"}`)
		s := New(&storage, "hr")
		s.Configure(5, timeout)
		s.Invalidate()
		require.NoError(t, s.Load(t.Context()))
		assert.Equal(t, 1, s.all.count)
	})
}

// An invalidation comes during a read of storage: storage is read again.
func TestInvalidateDuringALoad(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var storage store
		storage.write(t, "calls/hr/0", `{"format":1,"until":"`+ahead(time.Minute)+`"}`)
		s := New(&storage, "hr")
		s.Configure(1, timeout)
		storage.surround(func(_ context.Context, op, _ string) error { time.Sleep(time.Second); return nil })
		var loads sync.WaitGroup
		loads.Go(func() { assert.NoError(t, s.Load(context.Background())) })
		time.Sleep(1500 * time.Millisecond) // the list has been read, and the first entry has not
		storage.write(t, "calls/hr/1", `{"format":1,"until":"`+ahead(time.Minute)+`"}`)
		s.Invalidate()
		loads.Wait()
		assert.Equal(t, 2, s.all.count)
	})
}

func TestRecalledCallsSendAwayWhoWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var storage store
		s := from(t, &storage, 1)
		spend(t, s, 1)
		time.Sleep(Window - 3*time.Second)
		a := ask(t, s, t.Context(), reader("a"))
		storage.write(t, "calls/hr/7", `{"format":1,"until":"`+ahead(time.Minute)+`"}`)
		s.Invalidate()
		require.NoError(t, s.Load(t.Context()))
		synctest.Wait()
		assert.Equal(t, &LimitError{Until: time.Now().Add(time.Minute)}, a.err)
	})
}

func TestRemove(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var storage store
		storage.write(t, "calls/other/0", "{}")
		s := from(t, &storage, 3)
		noted(t, s, Want{}).End()
		require.NoError(t, s.pauseAndStore(t.Context(), time.Now().Add(time.Second)))
		time.Sleep(time.Second)
		late := take(t, s, Want{})

		broken := errors.New("storage is away")
		for _, fails := range []string{"list calls/hr/", "delete calls/hr/0"} { // the first of two
			storage.surround(func(_ context.Context, op, key string) error {
				if op+" "+key == fails {
					return broken
				}
				return nil
			})
			assert.Equal(t, broken, s.Remove(t.Context()))
			require.NoError(t, late.Note(t.Context()), "the connector is still there")
		}
		storage.surround(nil)
		require.NoError(t, s.Remove(t.Context()))
		assert.Equal(t, []string{"calls/other/0"}, storage.keys(t))

		assert.Equal(t, ErrRemoved, take(t, s, Want{}).Note(t.Context()))
		assert.Equal(t, ErrRemoved, s.pauseAndStore(t.Context(), time.Now().Add(time.Second)))
		assert.Equal(t, []string{"calls/other/0"}, storage.keys(t))
		time.Sleep(time.Second)
		late.End()
		spend(t, s, 1) // the call that was not made gave its place back; the others still count
		refused(t, s, Want{}, Window-2*time.Second)

		// The connector is created again.
		s.Configure(4, timeout)
		noted(t, s, Want{})
		require.NoError(t, s.pauseAndStore(t.Context(), time.Now().Add(time.Millisecond)))
		assert.Len(t, storage.keys(t), 3)
	})
}

// A pause outlives its connector in memory. After the connector is created again, storage gets the pause again.
func TestPauseIsStoredAgainAfterRemove(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var storage store
		s := from(t, &storage, 1)
		require.NoError(t, s.pauseAndStore(t.Context(), time.Now().Add(time.Hour)))
		require.NoError(t, s.Remove(t.Context()))
		s.Configure(1, timeout)
		require.NoError(t, s.StorePause(t.Context()))
		assert.Equal(t, time.Now().Add(time.Hour), from(t, &storage, 1).PausedUntil())
	})
}

// A connector is deleted while notes of it are written: storage has nothing of it afterwards.
func TestRemoveDuringAWrite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var storage store
		s := from(t, &storage, 1)
		storage.surround(func(_ context.Context, op, _ string) error {
			if op == "put" {
				time.Sleep(time.Second)
			}
			return nil
		})
		ctx, cancel := context.WithCancel(t.Context())
		storage.after = func(string, string) { cancel() } // the note is deleted although its caller has cancelled
		c := take(t, s, Want{})
		var writers sync.WaitGroup
		writers.Go(func() { assert.ErrorIs(t, c.Note(t.Context()), ErrRemoved) })
		writers.Go(func() { assert.ErrorIs(t, s.pauseAndStore(ctx, time.Now().Add(time.Hour)), ErrRemoved) })
		synctest.Wait()
		require.NoError(t, s.Remove(t.Context()))
		writers.Wait()
		assert.Empty(t, storage.keys(t))

		// After the connector is created again, the next pause is stored.
		s.Configure(1, timeout)
		require.NoError(t, s.pauseAndStore(t.Context(), time.Now()))
		assert.Equal(t, []string{"calls/hr/pause"}, storage.keys(t))
	})
}

// If a note that was written during the delete of its connector cannot be deleted, the error says so.
func TestRemoveDuringAWriteThatStays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var storage store
		s := from(t, &storage, 1)
		broken := errors.New("storage is away")
		storage.surround(func(_ context.Context, op, _ string) error {
			if op == "put" {
				time.Sleep(time.Second)
			}
			if op == "delete" {
				return broken
			}
			return nil
		})
		go func() {
			synctest.Wait()
			assert.NoError(t, s.Remove(t.Context()))
		}()
		err := take(t, s, Want{}).Note(t.Context())
		assert.ErrorIs(t, err, ErrRemoved)
		assert.ErrorIs(t, err, broken)
	})
}

func TestConnectorsKeepTheirCallsApart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var storage store
		a, b := New(&storage, "a"), New(&storage, "a.b")
		for _, s := range []*Share{a, b} {
			require.NoError(t, take(t, s, Want{}).Note(t.Context()))
		}
		require.NoError(t, a.Remove(t.Context()))
		assert.Equal(t, "calls/a.b/0", strings.Join(storage.keys(t), " "))
	})
}

// The exchange of a refresh token that storage does not have is noted with one write, and neither its answer nor its withdrawal writes
// again: the next process has no refresh token to ask the service about.
func TestUnstoredExchangeIsNotedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for name, end := range map[string]func(*Call){
			"answered": func(c *Call) { c.End(); c.Settle(t.Context()) },
			"not made": func(c *Call) { c.Cancel(t.Context()) },
		} {
			var storage store
			puts := 0
			storage.after = func(string, string) { puts++ }
			end(noted(t, from(t, &storage, 100), Want{Tenant: "acme", Unstored: true}))
			assert.Equal(t, 1, puts, name)
		}
	})
}
