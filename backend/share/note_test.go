package share

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// noting is a call that a goroutine notes.
type noting struct {
	*Call
	begun time.Time
	err   error
	after time.Duration
	over  atomic.Bool // says that there is a result
}

// begin has a goroutine note a call, and returns once that waits.
func begin(t *testing.T, s *Share, ctx context.Context, want Want) *noting {
	t.Helper()
	n := &noting{Call: take(t, s, want), begun: time.Now()}
	go func() {
		n.err = n.Note(ctx)
		n.after = time.Since(n.begun)
		n.over.Store(true)
	}()
	synctest.Wait()
	return n
}

// slow has each write of storage take as long, or until its context ends, and returns their keys.
func (s *store) slow(takes time.Duration) *[]string {
	var mu sync.Mutex
	var puts []string
	s.surround(func(ctx context.Context, op, key string) error {
		if op != "put" {
			return nil
		}
		mu.Lock()
		puts = append(puts, strings.TrimPrefix(key, "calls/hr/"))
		mu.Unlock()
		select {
		case <-time.After(takes):
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	})
	return &puts
}

// pass lets the time pass, and all goroutines come to rest.
func pass(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// held are the places that are in use.
func held(s *Share) map[int]bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.places.taken)
}

const slowly = gather * 4 / 5

// Calls that come to be noted during a write are noted together, by the next one.
func TestCallsAreNotedTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var storage store
		s := from(t, &storage, 10)
		puts := storage.slow(slowly)
		first := begin(t, s, t.Context(), Want{Tenant: "a"})
		pass(slowly / 2)
		at, until := ahead(0), ahead(timeout+Window)
		others := []*noting{
			begin(t, s, t.Context(), Want{Tenant: "b"}), begin(t, s, t.Context(), Want{Class: Housekeeping}), begin(t, s, t.Context(), Want{Tenant: "c"}),
		}
		pass(time.Second)
		assert.Equal(t, slowly, first.after)
		for _, o := range others {
			require.NoError(t, o.err)
			assert.Equal(t, slowly*3/2, o.after)
		}
		assert.Equal(t, []string{"0", "1"}, *puts)
		assert.JSONEq(t, `{"format":1,"tenant":"b","at":"`+at+`","with":[{"housekeeping":true},{"tenant":"c","at":"`+at+`"}],"until":"`+until+`"}`,
			storage.read(t, "calls/hr/1"))

		// The next process counts them all, each against its own fifth, and asks what became of each exchange.
		s = from(t, &storage, 5)
		for _, tenant := range []string{"a", "b", "c"} {
			assert.NotZero(t, s.Unsettled(tenant), tenant)
			assert.Equal(t, 1, s.tenants[tenant].count(), tenant)
		}
		assert.Equal(t, 1, s.housekeeping.count())
		assert.Equal(t, 4, s.all.count())
		assert.Equal(t, map[int]bool{0: true, 1: true}, held(s))
		idle(t, s)
	})
}

// A write that hangs holds up the notes of others for a moment only; so does one that waits for it to grow.
func TestNotesBesideAWriteThatHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var storage store
		s := from(t, &storage, 300)
		puts := storage.slow(time.Hour)
		first := begin(t, s, t.Context(), Want{})
		storage.surround(nil)
		for range 2 {
			next := begin(t, s, t.Context(), Want{})
			pass(gather - 1)
			assert.False(t, next.over.Load())
			pass(1)
			assert.True(t, next.over.Load())
			require.NoError(t, next.err)
			assert.Equal(t, gather, next.after)
		}
		var many []*noting
		for range mostCalls + 1 {
			many = append(many, begin(t, s, t.Context(), Want{}))
		}
		for i, n := range many {
			assert.Equal(t, i < mostCalls, n.over.Load(), "a note that is full is written at once")
		}
		pass(storeWithin)
		assert.Equal(t, context.DeadlineExceeded, first.err)
		assert.Equal(t, storeWithin, first.after)
		assert.Equal(t, []string{"0"}, *puts)
		assert.Len(t, storage.keys(t), 4, "and the first, which storage did not take")
	})
}

// A caller who gives up leaves the others' calls noted; its own is not asked about.
func TestOneOfManyGivesUp(t *testing.T) {
	for _, during := range []string{"before the write", "the write"} {
		synctest.Test(t, func(t *testing.T) {
			var storage store
			s := from(t, &storage, 10)
			puts := storage.slow(slowly)
			ctx, cancel := context.WithCancel(t.Context())
			begin(t, s, t.Context(), Want{})
			gone, stays := begin(t, s, ctx, Want{Tenant: "gone"}), begin(t, s, t.Context(), Want{Tenant: "stays"})
			alone := begin(t, s, ctx, Want{Class: Revocation})
			if during == "the write" {
				pass(slowly + 1)
			}
			cancel()
			pass(time.Second)
			assert.Equal(t, context.Canceled, gone.err)
			assert.Equal(t, context.Canceled, alone.err)
			require.NoError(t, stays.err)
			assert.Equal(t, 2*slowly, stays.after)
			if during == "the write" {
				assert.Equal(t, []string{"0", "1", "1"}, *puts)
			} else {
				assert.Equal(t, []string{"0", "1"}, *puts)
			}
			assert.Equal(t, 2, s.all.count(), "who has gone makes no call")
			after := from(t, &storage, 10)
			assert.Zero(t, after.Unsettled("gone"))
			assert.NotZero(t, after.Unsettled("stays"))
		})
	}
}

// When all callers have gone, the write is given up, and its place is used again once storage knows that no call was made.
func TestAllGiveUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var storage store
		s := from(t, &storage, 10)
		storage.slow(20 * time.Second)
		ctx, cancel := context.WithCancel(t.Context())
		a := begin(t, s, ctx, Want{Tenant: "a"})
		b := begin(t, s, ctx, Want{Class: Revocation})
		pass(time.Second)
		storage.slow(3 * time.Second)
		cancel()
		pass(3*time.Second - 1)
		assert.False(t, a.over.Load(), "the process ends after storage has been told")
		assert.True(t, b.over.Load())
		assert.Equal(t, map[int]bool{0: true}, held(s))
		pass(1)
		assert.Equal(t, context.Canceled, a.err)
		assert.Empty(t, held(s))
		assert.NotContains(t, storage.read(t, "calls/hr/0"), `"at"`)
	})
}

// Where all callers give up before their note's write begins, storage is not asked: the engine may have ended, and Vault may have deleted
// what it stored.
func TestAllGiveUpBeforeTheWrite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var storage store
		s := from(t, &storage, 10)
		puts := storage.slow(time.Hour)
		ctx, cancel := context.WithCancel(t.Context())
		first := begin(t, s, t.Context(), Want{})
		gone := begin(t, s, ctx, Want{Class: Revocation})
		cancel()
		synctest.Wait()
		assert.Equal(t, context.Canceled, gone.err)
		pass(gather)
		assert.Equal(t, []string{"0"}, *puts)
		assert.Equal(t, map[int]bool{0: true}, held(s))
		pass(storeWithin)
		assert.Equal(t, context.DeadlineExceeded, first.err)
		assert.Equal(t, []string{"0"}, *puts)
		idle(t, s)
	})
}

// A note whose calls are not made keeps its place until it has been written: another call may join it, or storage may take it yet.
func TestNoteWithoutCallsKeepsItsPlace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var storage store
		s := from(t, &storage, 10)
		storage.surround(func(context.Context, string, string) error { time.Sleep(slowly); return nil }) // whether or not the caller waits
		ctx, cancel := context.WithCancel(t.Context())
		first, gone := begin(t, s, ctx, Want{Class: Revocation}), begin(t, s, ctx, Want{Class: Revocation})
		cancel()
		synctest.Wait()
		assert.Equal(t, context.Canceled, first.err)
		assert.Equal(t, context.Canceled, gone.err)
		assert.Equal(t, map[int]bool{0: true, 1: true}, held(s))
		joins := begin(t, s, t.Context(), Want{})
		pass(slowly)
		assert.Equal(t, map[int]bool{1: true}, held(s))
		pass(slowly)
		require.NoError(t, joins.err)
		joins.End()
		idle(t, s)
	})
}

// Where storage fails, all whose calls it was asked to take at once learn of it, with at most two more writes for all.
func TestNoteTogetherThatFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var storage store
		s := from(t, &storage, 10)
		var puts atomic.Int32
		broken := errors.New("storage is away")
		storage.surround(func(context.Context, string, string) error { puts.Add(1); time.Sleep(slowly); return broken })
		var all []*noting
		for i := range 6 {
			all = append(all, begin(t, s, t.Context(), Want{Tenant: fmt.Sprint(i)}))
		}
		pass(time.Second)
		for _, n := range all {
			assert.Equal(t, broken, n.err)
		}
		assert.Equal(t, int32(5), puts.Load(), "two notes; the first again, and the second, which is stored while the other four come")
		assert.Zero(t, s.all.count())
		assert.Empty(t, held(s))
	})
}

// A note keeps its place until none of its calls counts, and is written again as its exchanges are answered.
func TestNoteKeepsItsPlace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var storage store
		s := from(t, &storage, 10)
		storage.slow(slowly)
		begin(t, s, t.Context(), Want{}).End()
		a, b := begin(t, s, t.Context(), Want{Tenant: "a"}), begin(t, s, t.Context(), Want{Tenant: "b"})
		pass(2 * slowly)
		storage.surround(nil)
		a.End()
		a.Settle(t.Context())
		pass(Window)
		next := begin(t, s, t.Context(), Want{})
		assert.Equal(t, 0, next.note.place)
		assert.Equal(t, map[int]bool{0: true, 1: true}, s.places.taken, "b still runs")
		b.End()
		b.Settle(t.Context())
		after := from(t, &storage, 10)
		assert.Zero(t, after.Unsettled("a"))
		assert.Zero(t, after.Unsettled("b"))
		next.End()
		idle(t, s)
	})
}

// Settles that come during a write of their note are one more write.
func TestSettlesTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var storage store
		s := from(t, &storage, 10)
		storage.slow(slowly)
		begin(t, s, t.Context(), Want{})
		var all []*noting
		for i := range 5 {
			all = append(all, begin(t, s, t.Context(), Want{Tenant: fmt.Sprint(i)}))
		}
		pass(2 * slowly)
		puts := storage.slow(time.Second)
		begun := time.Now()
		var settles sync.WaitGroup
		for _, n := range all {
			n.End()
			settles.Go(func() { n.Settle(t.Context()) })
			synctest.Wait()
		}
		settles.Wait()
		assert.Equal(t, 2*time.Second, time.Since(begun))
		assert.Equal(t, []string{"1", "1"}, *puts)
		after := from(t, &storage, 10)
		for i := range 5 {
			assert.Zero(t, after.Unsettled(fmt.Sprint(i)))
		}
	})
}

// Readers, storage that is slow, hangs or fails, callers who give up, and answers, in an order that is drawn: no two notes have one
// place, and a process that starts at any moment knows each exchange that may be under way, and none that was answered.
func TestNotesAtRandom(t *testing.T) {
	for seed := range uint64(25) {
		synctest.Test(t, func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 1))
			var storage store
			s := from(t, &storage, 1000)
			type call struct {
				*noting
				tenant  string
				cancel  func()
				ended   time.Time
				settled atomic.Bool
			}
			var calls []*call
			check := func() {
				notes := map[int]*note{}
				s.mu.Lock()
				for _, c := range calls {
					counts := c.running || c.frees.After(time.Now())
					if c.note == nil || !counts {
						continue
					}
					if other := notes[c.note.place]; other != nil {
						assert.Same(t, other, c.note, "seed %d", seed)
					}
					notes[c.note.place] = c.note
					assert.True(t, s.places.taken[c.note.place], "seed %d", seed)
				}
				s.mu.Unlock()
				after := New(&logical.InmemStorage{}, "hr")
				after.storage = &storage.InmemStorage
				after.Configure(1000, timeout)
				require.NoError(t, after.Load(t.Context()))
				for _, c := range calls {
					at := after.Unsettled(c.tenant)
					switch {
					case c.over.Load() && c.err == nil && c.ended.IsZero():
						assert.NotZero(t, at, "seed %d: exchange %s is under way", seed, c.tenant)
						assert.Equal(t, time.Since(c.begun) < timeout+Window, after.tenants[c.tenant] != nil, "seed %d: %s counts", seed, c.tenant)
					case c.settled.Load() && time.Since(c.ended) < Window/2:
						assert.Zero(t, at, "seed %d: exchange %s was answered", seed, c.tenant)
					}
				}
			}
			healthy := true
			for step := range 120 {
				switch r.IntN(12) {
				case 0:
					healthy = true
					storage.surround(nil)
				case 1:
					healthy = true
					storage.slow(time.Duration(r.IntN(200)) * time.Millisecond)
				case 2:
					healthy = false
					storage.slow(time.Hour)
				case 3:
					healthy = false
					storage.surround(func(context.Context, string, string) error { return errors.New("no") })
				case 4, 5, 6, 7:
					ctx, cancel := context.WithCancel(context.Background())
					c := &call{tenant: fmt.Sprint(step), cancel: cancel}
					c.noting = begin(t, s, ctx, Want{Tenant: c.tenant})
					calls = append(calls, c)
				case 8:
					if len(calls) > 0 {
						calls[r.IntN(len(calls))].cancel()
					}
				default:
					if len(calls) == 0 {
						break
					}
					c := calls[r.IntN(len(calls))]
					if c.over.Load() && c.err == nil && c.ended.IsZero() {
						c.ended = time.Now()
						c.End()
						if healthy {
							go func() {
								c.Settle(context.Background())
								c.settled.Store(true)
							}()
						}
					}
				}
				pass([]time.Duration{0, time.Millisecond, gather, time.Second, 40 * time.Second}[r.IntN(5)])
				check()
			}
			storage.surround(nil)
			pass(3 * storeWithin)
			for _, c := range calls {
				c.cancel()
				c.End()
			}
			idle(t, s)
		})
	}
}
