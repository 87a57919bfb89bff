package share

import (
	"context"
	"errors"
	"fmt"
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
	over  atomic.Bool // true when there is a result
}

// begin starts a goroutine that notes a call, and returns when that waits or is done.
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

// slow makes each write of storage take this long, or until its context ends. It returns the list of their keys, which grows.
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

// pass lets this time pass, and waits until all goroutines wait.
func pass(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// held are the places that are in use.
func held(s *Share) map[int]bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	places := map[int]bool{}
	for place := range s.notes {
		places[place] = true
	}
	return places
}

const slowly = gather * 4 / 5

// Calls that come while a note is written are noted together in the next write.
func TestCallsAreNotedTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var storage store
		s := from(t, &storage, 10)
		puts := storage.slow(slowly)
		first := begin(t, s, t.Context(), Want{Tenant: "a"})
		pass(slowly / 2)
		at, until := ahead(0), ahead(counts)
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

		// The next process counts them all, each against its tenant's fifth, and Unsettled returns each exchange.
		s = from(t, &storage, 5)
		for _, tenant := range []string{"a", "b", "c"} {
			assert.NotZero(t, s.Unsettled(tenant), tenant)
			assert.Equal(t, 1, s.tenants[tenant].count, tenant)
		}
		assert.Equal(t, 1, s.housekeeping.count)
		assert.Equal(t, 4, s.all.count)
		assert.Equal(t, map[int]bool{0: true, 1: true}, held(s))
		idle(t, s)
	})
}

// While the write of a note hangs, other calls wait for it only for the time gather, and then another note is written.
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
		assert.Len(t, storage.keys(t), 4, "the notes but the first, which storage did not take")
	})
}

// The end of an earlier exchange is written while calls gather for the next note: that note is written all the same.
func TestNoteGathersBesideAnotherWrite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var storage store
		s := from(t, &storage, 10)
		answered := noted(t, s, Want{Tenant: "a"})
		answered.End()
		storage.slow(slowly)
		begin(t, s, t.Context(), Want{})
		next := begin(t, s, t.Context(), Want{})
		answered.Settle(t.Context())
		pass(time.Second)
		require.True(t, next.over.Load())
		require.NoError(t, next.err)
		assert.Equal(t, 2*slowly, next.after)
	})
}

// One of several callers of a note cancels: the calls of the others stay noted, and Unsettled does not return the cancelled one.
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
			assert.Equal(t, 2, s.all.count, "the cancelled calls do not count")
			after := from(t, &storage, 10)
			assert.Zero(t, after.Unsettled("gone"))
			assert.NotZero(t, after.Unsettled("stays"))
		})
	}
}

// All callers of a note cancel during its write: the write is cancelled, and its place is free when storage has the note without calls.
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
		assert.False(t, a.over.Load(), "the exchange's caller waits until storage has the note without its call")
		assert.True(t, b.over.Load())
		assert.Equal(t, map[int]bool{0: true}, held(s))
		pass(1)
		assert.Equal(t, context.Canceled, a.err)
		assert.Empty(t, held(s))
		assert.NotContains(t, storage.read(t, "calls/hr/0"), `"at"`)
	})
}

// All callers of a note cancel before its write begins: nothing is written, because the engine may have ended, and Vault may have deleted
// its storage.
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

// A note without calls keeps its place until its write has ended: storage may still take it, or another call may join it.
func TestNoteWithoutCallsKeepsItsPlace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var storage store
		s := from(t, &storage, 10)
		storage.surround(func(context.Context, string, string) error { time.Sleep(slowly); return nil }) // does not end with its context
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

// Storage fails a note with several calls: all their callers get the error, after two more writes at most.
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
		assert.Equal(t, int32(5), puts.Load(), "two notes, and the writes of these notes without their calls")
		assert.Zero(t, s.all.count)
		assert.Empty(t, held(s))
	})
}

// A note keeps its place until none of its calls counts, and is written again when its exchanges are answered.
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
		assert.Equal(t, map[int]bool{0: true, 1: true}, held(s), "the call of b still runs")
		b.End()
		b.Settle(t.Context())
		after := from(t, &storage, 10)
		assert.Zero(t, after.Unsettled("a"))
		assert.Zero(t, after.Unsettled("b"))
		next.End()
		idle(t, s)
	})
}

// A call stops counting while its note is written, because the exchange has been answered late: no other note has the place before that
// write has ended, which would overwrite it.
func TestNoteIsWrittenWhenItsCallStopsCounting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var storage store
		s := from(t, &storage, 2)
		old := noted(t, s, Want{Tenant: "a"})
		old.End()
		time.Sleep(Window - time.Second)
		release := make(chan struct{})
		storage.surround(func(_ context.Context, _, key string) error {
			if key == "calls/hr/0" {
				<-release
			}
			return nil
		})
		go old.Settle(t.Context())
		pass(time.Second)
		next := begin(t, s, t.Context(), Want{})
		pass(gather)
		require.True(t, next.over.Load())
		require.NoError(t, next.err)
		close(release)
		synctest.Wait()
		_, err := from(t, &storage, 2).Take(t.Context(), Want{})
		assert.Error(t, err, "storage has both calls")
		next.End()
		idle(t, s)
	})
}

// Several Settles that come during a write of their note need one more write together.
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

// Calls, cancelled callers, answers, and storage that is slow, hangs or fails come in a random order: no two notes have the same place,
// and a process that starts at any moment gets each exchange that may be under way from Unsettled, and none that was answered.
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
					assert.Same(t, c.note, s.notes[c.note.place], "seed %d", seed)
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
						assert.Equal(t, time.Since(c.begun) < counts, after.tenants[c.tenant] != nil, "seed %d: %s counts", seed, c.tenant)
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
