package share

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	patience = 5 * time.Second
	timeout  = 10 * time.Second // the time limit of a request
)

// limited returns a share with this limit of calls.
func limited(limit int) *Share {
	s := New(&logical.InmemStorage{}, "default")
	s.Configure(limit, timeout)
	return s
}

// reader is a reader's exchange for a tenant.
func reader(tenant string) Want { return Want{Tenant: tenant, Wait: patience} }

// take takes a call that must be permitted at once.
func take(t *testing.T, s *Share, want Want) *Call {
	t.Helper()
	want.Wait = 0
	c, err := s.Take(t.Context(), want)
	require.NoError(t, err)
	return c
}

// spend makes n calls that end at once.
func spend(t *testing.T, s *Share, n int) {
	t.Helper()
	for range n {
		take(t, s, Want{}).End()
	}
}

// refused expects that a call is refused at once, until that time from now.
func refused(t *testing.T, s *Share, want Want, until time.Duration) {
	t.Helper()
	begun := time.Now()
	_, err := s.Take(t.Context(), want)
	assert.Equal(t, &LimitError{Until: begun.Add(until)}, err)
	assert.Equal(t, begun, time.Now(), "the refusal comes at once")
}

// answer is how a Take ended, and when.
type answer struct {
	*Call
	err   error
	after time.Duration
	done  atomic.Bool // true when Take has returned
}

// ask starts a goroutine that takes a call. When ask returns, the goroutine has its call or waits in the queue.
func ask(t *testing.T, s *Share, ctx context.Context, want Want) *answer {
	t.Helper()
	a := &answer{}
	begun := time.Now()
	go func() {
		a.Call, a.err = s.Take(ctx, want)
		a.after = time.Since(begun)
		a.done.Store(true)
	}()
	synctest.Wait()
	return a
}

// idle expects that the share is empty again when all calls have stopped counting.
func idle(t *testing.T, s *Share) {
	t.Helper()
	time.Sleep(Window)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.arrange() // drops the calls that have stopped counting
	assert.Empty(t, s.queue)
	assert.Zero(t, s.all.count)
	assert.Zero(t, s.housekeeping.count)
	assert.Empty(t, s.tenants)
	assert.Empty(t, s.notes)
}

func TestLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := limited(3)
		c := take(t, s, Want{})
		time.Sleep(time.Second)
		spend(t, s, 2)
		time.Sleep(time.Second)
		c.End()
		c.End() // counts once
		c.Withdraw()
		time.Sleep(Window - time.Second - 1)
		refused(t, s, Want{}, 1)
		time.Sleep(time.Nanosecond)
		spend(t, s, 2)
		refused(t, s, Want{}, time.Second)
		time.Sleep(time.Second)
		spend(t, s, 1)
		refused(t, s, Want{}, Window-time.Second)
		idle(t, s)
	})
}

func TestCallThatRunsCountsForAWindowAtLeast(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := limited(2)
		c := take(t, s, Want{})
		time.Sleep(10 * time.Minute)
		spend(t, s, 1)
		time.Sleep(time.Second)
		refused(t, s, Want{}, Window-time.Second)
		a := ask(t, s, t.Context(), Want{Wait: patience})
		assert.Equal(t, &LimitError{Until: time.Now().Add(Window - time.Second)}, a.err)
		time.Sleep(Window - time.Second)
		spend(t, s, 1)
		refused(t, s, Want{}, Window)
		c.End()
		refused(t, s, Want{}, Window)
		idle(t, s)
	})
}

// With the real clock, some time passes between the reading of the clock for the deadline and the one for the plan: a call that is free
// at once is permitted all the same.
func TestCallThatNeedsNoWaitNeedsNoTime(t *testing.T) {
	s := limited(2)
	for range 2 {
		c, err := s.Take(t.Context(), Want{Tenant: "a", Wait: -1})
		require.NoError(t, err)
		c.Withdraw()
	}
	assert.False(t, s.FreeAt(Want{}).After(time.Now()))
}

// Readers of a tenant who wait count against the tenant's fifth, before any of its calls counts.
func TestWaitersCountAgainstTheirFifth(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := limited(5)
		spend(t, s, 5)
		time.Sleep(Window - time.Second)
		first := ask(t, s, t.Context(), reader("a"))
		refused(t, s, reader("a"), Window)
		other := ask(t, s, t.Context(), reader("b"))
		time.Sleep(time.Second)
		synctest.Wait()
		require.NoError(t, first.err)
		require.NoError(t, other.err)
	})
}

func TestErrorSaysWhenToComeBack(t *testing.T) {
	err := &LimitError{Until: time.Date(2026, 11, 27, 3, 4, 5, 6, time.FixedZone("", 3600))}
	assert.EqualError(t, err, "too many calls; the next is permitted at 2026-11-27T02:04:05Z")
}

func TestTenantBeginsAFifthOfTheExchanges(t *testing.T) {
	for limit, fifth := range map[int]int{1: 1, 4: 1, 9: 1, 10: 2, 14: 2, 15: 3} {
		for _, class := range []Class{Reader, RevocationWait, Background} {
			synctest.Test(t, func(t *testing.T) {
				s := limited(limit)
				greedy := Want{Tenant: "greedy", Class: class}
				for range fifth {
					take(t, s, greedy).End()
				}
				refused(t, s, greedy, Window)
				if limit > fifth {
					take(t, s, Want{Tenant: "modest", Class: class}).End()
				}
				time.Sleep(Window)
				c := take(t, s, greedy)
				c.Withdraw()
				c.Withdraw() // two calls of Withdraw give back one place
				for range fifth {
					take(t, s, greedy).End()
				}
				refused(t, s, greedy, Window)
				idle(t, s)
			})
		}
	}
}

// A tenant whose exchanges are redirected is served with any share: the hops of a redirect, and calls that begin no exchange, do not
// count against its fifth.
func TestHopsCountAgainstTheShareAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := limited(4)
		take(t, s, Want{Tenant: "moved"}).End()
		take(t, s, Want{Tenant: "moved", Hop: true}).End()
		refused(t, s, Want{Tenant: "moved"}, Window)
		take(t, s, Want{}).End()
		take(t, s, Want{Tenant: "moved", Hop: true}).End()
		refused(t, s, Want{Tenant: "moved", Hop: true}, Window)
		time.Sleep(Window)

		take(t, s, Want{Tenant: "moved", Hop: true}).End()
		take(t, s, Want{Tenant: "moved"}).End() // the hop has not used up the tenant's fifth
		idle(t, s)
	})
}

// While a call runs, the places that its next hops are expected to need stay free for it, and no longer.
func TestPlacesAreLeftToWorkThatHasBegun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := limited(3)
		begun := take(t, s, Want{Tenant: "moved", Ahead: 2})
		for class := Reader; class <= Housekeeping; class++ {
			refused(t, s, Want{Class: class}, glance)
		}
		assert.Equal(t, time.Now().Add(glance), s.FreeAt(reader("other")))
		take(t, s, Want{Tenant: "other", Hop: true}).Withdraw() // a hop of other work that has begun need not wait
		begun.End()
		hop := take(t, s, Want{Tenant: "moved", Hop: true, Ahead: 1})
		refused(t, s, Want{}, glance)
		hop.End()
		take(t, s, Want{Tenant: "moved", Hop: true}).End()
		refused(t, s, Want{}, Window)
		idle(t, s)

		for name, end := range map[string]func(*Call){"ended": (*Call).End, "withdrawn": (*Call).Withdraw} {
			begun = take(t, s, Want{Tenant: "moved", Ahead: 2})
			other := ask(t, s, t.Context(), reader("other"))
			end(begun)
			time.Sleep(glance)
			synctest.Wait()
			require.True(t, other.done.Load(), name)
			require.NoError(t, other.err, "the places are free again")
			other.End()
			idle(t, s)
			spend(t, s, 3)
			idle(t, s)
		}
	})
}

// Two calls are permitted at the same moment: the second leaves the places free that the first is likely to need.
func TestPlacesAreLeftToWorkThatBeginsAtTheSameMoment(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := limited(3)
		s.Pause(time.Now().Add(time.Second))
		first := ask(t, s, t.Context(), Want{Tenant: "a", Ahead: 2, Wait: patience})
		second := ask(t, s, t.Context(), reader("b"))
		pass(time.Second)
		require.True(t, first.done.Load())
		require.NoError(t, first.err)
		assert.False(t, second.done.Load())
		first.End()
		pass(glance)
		require.True(t, second.done.Load())
		require.NoError(t, second.err)
		second.End()
		idle(t, s)
	})
}

func TestBackgroundLeavesAFifthToReaders(t *testing.T) {
	for limit, fifth := range map[int]int{1: 0, 4: 0, 5: 1, 9: 1, 10: 2, 50: 10} {
		for _, hop := range []bool{false, true} {
			synctest.Test(t, func(t *testing.T) {
				s := limited(limit)
				background := Want{Class: Background, Hop: hop}
				for range limit - fifth {
					take(t, s, background).End()
				}
				refused(t, s, background, Window)
				refused(t, s, Want{Class: Housekeeping, Hop: hop}, Window)
				refused(t, s, Want{Class: Revocation, Hop: hop}, Window)
				assert.Equal(t, time.Now().Add(Window), s.FreeAt(background))
				for i := range fifth {
					take(t, s, Want{Class: Class(i % 2), Hop: hop}).End() // Reader, or RevocationWait, which may use the readers' fifth too
				}
				refused(t, s, Want{Hop: hop}, Window)
				idle(t, s)
			})
		}
	}
}

func TestHousekeepingTakesAFifthAtMost(t *testing.T) {
	for limit, fifth := range map[int]int{1: 1, 4: 1, 9: 1, 10: 2, 50: 10} {
		synctest.Test(t, func(t *testing.T) {
			s := limited(limit)
			housekeeping := Want{Class: Housekeeping}
			for range fifth {
				take(t, s, housekeeping).End()
			}
			refused(t, s, housekeeping, Window)
			for range limit - limit/5 - fifth {
				take(t, s, Want{Class: Revocation}).End() // revocations do not count as housekeeping
			}
			time.Sleep(Window)
			take(t, s, housekeeping).Withdraw()
			for range fifth {
				take(t, s, housekeeping).End()
			}
			refused(t, s, housekeeping, Window)
			idle(t, s)
		})
	}
}

// A waiter of a lower class is served before those of a higher class who came earlier.
func TestTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := limited(10)
		for i := range 10 { // a place comes free each 100 ms, from 3 s on
			spend(t, s, 1)
			if i < 9 {
				time.Sleep(100 * time.Millisecond)
			}
		}
		time.Sleep(Window - 3900*time.Millisecond)
		wants := []Want{
			{Class: Revocation}, {Class: Background}, {Class: Background, Hop: true}, {Class: RevocationWait},
			{Tenant: "a"}, {Tenant: "b"}, {Hop: true}, {Tenant: "c", Hop: true},
		}
		var answers []*answer
		for _, want := range wants {
			want.Wait = patience
			answers = append(answers, ask(t, s, t.Context(), want))
		}
		time.Sleep(patience)
		synctest.Wait()
		var order []time.Duration
		for _, a := range answers {
			require.NoError(t, a.err)
			order = append(order, a.after/time.Millisecond)
		}
		// The last three are served only while two more places stay free for readers.
		assert.Equal(t, []time.Duration{3900, 3800, 3700, 3400, 3200, 3300, 3000, 3100}, order)
	})
}

// Many wait for few places: as many as there are places are served, and the others are refused at once.
func TestScarcityIsNoLottery(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := limited(5)
		spend(t, s, 2)
		time.Sleep(10 * time.Second)
		spend(t, s, 2)
		running := take(t, s, Want{})
		time.Sleep(Window - 14*time.Second) // two places come free in 4 s
		var answers []*answer
		for i := range 100 {
			answers = append(answers, ask(t, s, t.Context(), reader(fmt.Sprint(i))))
		}
		begun := time.Now()
		time.Sleep(4 * time.Second)
		synctest.Wait()
		for i, a := range answers {
			switch {
			case i < 2:
				require.NoError(t, a.err)
				assert.Equal(t, 4*time.Second, a.after)
			default:
				until := begun.Add(14 * time.Second)
				assert.Equal(t, &LimitError{Until: until}, a.err)
				assert.Zero(t, a.after)
			}
		}
		running.End()
		answers[0].End()
		answers[1].End()
		idle(t, s)
	})
}

func TestReadersBehindAllThatIsKnown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := limited(1)
		spend(t, s, 1)
		time.Sleep(Window - 2*time.Second)
		first := ask(t, s, t.Context(), reader("a"))
		refused(t, s, reader("b"), Window)
		time.Sleep(2 * time.Second)
		synctest.Wait()
		require.NoError(t, first.err)
	})
}

// A withdrawn call frees its place earlier than planned: the first in the queue gets it.
func TestWithdrawnCallMakesRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := limited(4)
		spend(t, s, 3)
		unused := take(t, s, Want{})
		time.Sleep(Window - 4*time.Second)
		var answers []*answer
		for range 2 {
			answers = append(answers, ask(t, s, t.Context(), Want{Wait: patience}))
		}
		time.Sleep(time.Second)
		unused.Withdraw()
		unused.End()
		synctest.Wait()
		assert.Equal(t, time.Second, answers[0].after)
		assert.False(t, answers[1].done.Load())
		time.Sleep(3 * time.Second)
		synctest.Wait()
		assert.Equal(t, 4*time.Second, answers[1].after)
		for _, a := range answers {
			a.End()
		}
		idle(t, s)
	})
}

// twoPlacesUsedUp returns a share of two places, which come free in 2 s and in 4 s.
func twoPlacesUsedUp(t *testing.T) *Share {
	s := limited(2)
	spend(t, s, 1)
	time.Sleep(2 * time.Second)
	spend(t, s, 1)
	time.Sleep(Window - 4*time.Second)
	return s
}

func TestWhoGivesUpLeavesTheQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := twoPlacesUsedUp(t)
		ctx, cancel := context.WithCancel(t.Context())
		gone := ask(t, s, ctx, reader("a"))
		next := ask(t, s, t.Context(), reader("a2"))
		refused(t, s, reader("b"), Window)
		time.Sleep(time.Second)
		cancel()
		synctest.Wait()
		assert.Equal(t, context.Canceled, gone.err)
		assert.Equal(t, time.Second, gone.after)
		last := ask(t, s, t.Context(), reader("b"))
		time.Sleep(patience)
		synctest.Wait()
		assert.Equal(t, 2*time.Second, next.after, "it gets the place of the one that gave up")
		require.NoError(t, next.err)
		assert.Equal(t, 3*time.Second, last.after)
		require.NoError(t, last.err)

		_, err := s.Take(ctx, Want{})
		assert.Equal(t, context.Canceled, err)
		next.End()
		last.End()
		idle(t, s)
	})
}

// A waiter gives up, and nothing else happens: who waits behind it is given its place when that comes free.
func TestPlaceOfWhoGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := twoPlacesUsedUp(t)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		ask(t, s, ctx, reader("a"))
		next := ask(t, s, t.Context(), reader("b"))
		pass(patience)
		require.NoError(t, next.err)
		assert.Equal(t, 2*time.Second, next.after)
	})
}

// A reader whose context has ended already does not have a call refused that waits behind readers.
func TestReaderWhoIsGoneAlreadyTakesNoPlace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := limited(1)
		spend(t, s, 1)
		time.Sleep(Window - time.Second)
		background := ask(t, s, t.Context(), Want{Class: Background, Wait: patience})
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		_, err := s.Take(ctx, reader("a"))
		assert.Equal(t, context.Canceled, err)
		pass(time.Second)
		require.NoError(t, background.err)
		assert.Equal(t, time.Second, background.after)
	})
}

// A call is permitted at the moment when its reader gives up: its place is free again.
func TestCancelledAtItsTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := limited(1)
		unused := take(t, s, Want{})
		unused.End()
		time.Sleep(Window - time.Second)
		ctx, cancel := context.WithCancel(t.Context())
		a := ask(t, s, ctx, reader("a"))
		s.Configure(2, timeout) // permits the reader's call
		cancel()
		synctest.Wait()
		if a.err == nil { // the permission came first
			a.Withdraw()
		}
		spend(t, s, 1)

		// The same with a waiter who leaves after the permission, in a fixed order.
		ctx, cancel = context.WithCancel(t.Context())
		a = ask(t, s, ctx, reader("b"))
		next := ask(t, s, t.Context(), Want{Wait: 2 * Window})
		s.mu.Lock()
		s.limit = 3
		s.arrange() // permits the reader's call
		cancel()
		s.mu.Unlock()
		synctest.Wait()
		assert.Equal(t, context.Canceled, a.err)
		require.True(t, next.done.Load(), "who waits behind it gets its place at once")
		next.Withdraw()
		take(t, s, Want{Tenant: "b"}).End()
		refused(t, s, Want{}, time.Second)
		idle(t, s)
	})
}

// A tenant that waits for its own fifth does not delay other tenants behind it, and gets the place that its own call frees.
func TestTenantsFifthBlocksNobodyElse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := limited(5)
		spend(t, s, 2)
		time.Sleep(time.Second)
		take(t, s, Want{Tenant: "a"}).End()
		time.Sleep(time.Second)
		spend(t, s, 1)
		time.Sleep(Window - 5*time.Second) // one place is free; two come free in 3 s, that of a's call in 4 s and one in 5 s
		a := ask(t, s, t.Context(), reader("a"))
		again := ask(t, s, t.Context(), reader("a"))
		_, limit := again.err.(*LimitError)
		assert.True(t, limit, "the reader before it takes the tenant's fifth")
		take(t, s, Want{Tenant: "b"})
		var others []*answer
		for i := range 4 {
			others = append(others, ask(t, s, t.Context(), reader(fmt.Sprint(i))))
		}
		time.Sleep(patience)
		synctest.Wait()
		assert.Equal(t, 4*time.Second, a.after)
		require.NoError(t, a.err)
		for i, after := range []time.Duration{3 * time.Second, 3 * time.Second, 5 * time.Second, 0} {
			assert.Equal(t, after, others[i].after, i)
			assert.Equal(t, i == 3, others[i].err != nil, i)
		}
	})
}

// Background work whose call runs finds the places of its redirects, and leaves the readers' fifth free all the same: other background work begins
// in neither.
func TestPlacesAreLeftToBackgroundWorkBesideTheReadersFifth(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := limited(10)
		spend(t, s, 5)
		first := take(t, s, Want{Class: Background, Ahead: 2})
		refused(t, s, Want{Class: Background}, glance)
		first.End()
		next := take(t, s, Want{Class: Background, Hop: true, Ahead: 1})
		refused(t, s, Want{Class: Background}, glance)
		next.End()
		take(t, s, Want{Class: Background, Hop: true}).End()
		spend(t, s, 2)
		idle(t, s)
	})
}

// A tenant that waits for its own fifth leaves no places to further calls of its work, which has not begun.
func TestNoPlacesAreLeftToWorkThatWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := limited(3)
		take(t, s, Want{Tenant: "a"}).End()
		time.Sleep(Window - 4*time.Second)
		a := ask(t, s, t.Context(), Want{Tenant: "a", Ahead: 2, Wait: patience})
		take(t, s, Want{Tenant: "b"}).End()
		pass(4 * time.Second)
		require.NoError(t, a.err)
		assert.Equal(t, 4*time.Second, a.after)
	})
}

// A tenant waits for its own call to stop counting, which is also the call that frees the next place: the other tenant gets the place
// that is free already.
func TestTenantsPlaceIsTheFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := limited(2)
		take(t, s, Want{Tenant: "a"}).End()
		time.Sleep(Window - 4*time.Second)
		require.NoError(t, s.pauseAndStore(t.Context(), time.Now().Add(2*time.Second)))
		a := ask(t, s, t.Context(), reader("a"))
		b := ask(t, s, t.Context(), reader("b"))
		refused(t, s, reader("c"), Window)
		time.Sleep(patience)
		synctest.Wait()
		assert.Equal(t, 4*time.Second, a.after)
		assert.Equal(t, 2*time.Second, b.after)
		require.NoError(t, a.err)
		require.NoError(t, b.err)
	})
}

func TestTenantWaitsForTheLaterOfShareAndFifth(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := limited(10)
		take(t, s, Want{Tenant: "a"}).End()
		time.Sleep(time.Second)
		spend(t, s, 8)
		take(t, s, Want{Tenant: "a"}).End()
		time.Sleep(time.Second)
		refused(t, s, Want{Tenant: "a"}, Window-2*time.Second)
		time.Sleep(Window - 4*time.Second) // places come free in 2 s (a's), in 3 s (nine)
		first := ask(t, s, t.Context(), reader("b"))
		second := ask(t, s, t.Context(), reader("a"))
		third := ask(t, s, t.Context(), reader("a"))
		time.Sleep(patience)
		synctest.Wait()
		assert.Equal(t, 2*time.Second, first.after)
		assert.Equal(t, 3*time.Second, second.after)
		assert.Equal(t, 3*time.Second, third.after)
		require.NoError(t, third.err)
		for _, a := range []*answer{first, second, third} {
			a.End()
		}
		idle(t, s)
	})
}

// A call that waits for the running call of its own tenant takes no place from other tenants.
func TestTenantBehindItsRunningCall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := limited(2)
		running := take(t, s, Want{Tenant: "a"})
		a := ask(t, s, t.Context(), Want{Tenant: "a", Wait: 2 * Window})
		spend(t, s, 1)
		time.Sleep(3 * time.Second)
		running.End()
		time.Sleep(3 * Window)
		synctest.Wait()
		require.NoError(t, a.err)
		assert.Equal(t, Window+3*time.Second, a.after)
	})
}

func TestBackgroundGivesWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := limited(10)
		spend(t, s, 7)
		time.Sleep(time.Second)
		spend(t, s, 3)
		time.Sleep(Window - 4*time.Second) // seven come free in 3 s, three in 4 s
		begun := time.Now()
		assert.Equal(t, begun.Add(3*time.Second), s.FreeAt(Want{Class: Background}))
		assert.Equal(t, begun.Add(3*time.Second), s.FreeAt(Want{Class: Housekeeping}))
		var readers []*answer
		for i := range 5 {
			readers = append(readers, ask(t, s, t.Context(), reader(fmt.Sprint(i))))
		}
		assert.Equal(t, begun.Add(4*time.Second), s.FreeAt(Want{Class: Background}), "of 7 places 5 are for the readers who wait, and 2 stay free")
		polls := []*answer{
			ask(t, s, t.Context(), Want{Class: Housekeeping, Wait: patience}),
			ask(t, s, t.Context(), Want{Class: Housekeeping, Wait: patience}),
		}
		refused(t, s, Want{Class: Housekeeping, Wait: patience}, Window)
		assert.Equal(t, begun.Add(3*time.Second), s.FreeAt(Want{}), "readers do not wait for housekeeping")
		background := ask(t, s, t.Context(), Want{Class: Background, Wait: patience})
		time.Sleep(patience)
		synctest.Wait()
		for _, a := range append(readers, background, polls[0], polls[1]) {
			require.NoError(t, a.err)
			a.End()
		}
		for _, a := range append(readers[:0:0], background, polls[0], polls[1]) {
			assert.Equal(t, 4*time.Second, a.after)
		}
		idle(t, s)
	})
}

// A waiter is refused as soon as others of a lower class take the place that he waited for.
func TestLowerClassesLearnAtOnceThatTheyAreOvertaken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := limited(1)
		spend(t, s, 1)
		time.Sleep(Window - 4*time.Second)
		waits := ask(t, s, t.Context(), Want{Class: RevocationWait, Wait: patience})
		time.Sleep(time.Second)
		first := ask(t, s, t.Context(), reader("a"))
		assert.Equal(t, time.Second, waits.after)
		assert.Equal(t, &LimitError{Until: time.Now().Add(Window)}, waits.err)
		time.Sleep(3 * time.Second)
		synctest.Wait()
		require.NoError(t, first.err)
	})
}

// A tenant waits for a place of its own, which comes free before others do: background work, which leaves places free, is not promised it.
func TestBackgroundIsNotPromisedATenantsOwnPlace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := limited(10)
		for _, tenant := range []string{"", "a", "", ""} { // these places come free in 1, 2, 3 and 4 s
			take(t, s, Want{Tenant: tenant}).End()
			time.Sleep(time.Second)
		}
		take(t, s, Want{Tenant: "a"}).End()
		spend(t, s, 5)
		time.Sleep(Window - 5*time.Second)
		a := ask(t, s, t.Context(), reader("a"))
		assert.Equal(t, time.Now().Add(4*time.Second), s.FreeAt(Want{Class: Background}))
		refused(t, s, Want{Class: Background, Wait: 4*time.Second - 1}, 4*time.Second)
		background := ask(t, s, t.Context(), Want{Class: Background, Wait: 4 * time.Second})
		pass(4 * time.Second)
		assert.Equal(t, 2*time.Second, a.after)
		require.NoError(t, background.err)
		assert.Equal(t, 4*time.Second, background.after)
	})
}

func TestFreeAt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := limited(5)
		now := time.Now()
		for _, class := range []Class{Reader, RevocationWait, Background, Revocation, Housekeeping} {
			assert.Equal(t, now, s.FreeAt(Want{Class: class, Tenant: "a"}))
		}
		take(t, s, Want{Tenant: "a"}).End()
		assert.Equal(t, now.Add(Window), s.FreeAt(Want{Tenant: "a", Class: Background}))
		assert.Equal(t, now, s.FreeAt(Want{Tenant: "a", Hop: true}))
		assert.Equal(t, now, s.FreeAt(Want{Tenant: "b", Class: Background}))
		_ = s.pauseAndStore(t.Context(), now.Add(time.Second))
		assert.Equal(t, now.Add(time.Second), s.FreeAt(Want{Tenant: "b", Class: Background}))
		assert.Equal(t, now.Add(Window), s.FreeAt(Want{Tenant: "a", Class: Background}))
		assert.Empty(t, s.queue)
		time.Sleep(Window)
		assert.Equal(t, time.Now(), s.FreeAt(Want{Tenant: "a"}))
		assert.Empty(t, s.tenants)
	})
}

func TestNewLimitHoldsForThoseWhoWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := limited(4)
		spend(t, s, 4)
		time.Sleep(Window - 4*time.Second)
		var answers []*answer
		for range 3 {
			answers = append(answers, ask(t, s, t.Context(), Want{Wait: patience}))
		}
		time.Sleep(time.Second)
		s.Configure(5, timeout)
		synctest.Wait()
		assert.Equal(t, time.Second, answers[0].after)
		require.NoError(t, answers[0].err)
		s.Configure(2, timeout)
		synctest.Wait()
		assert.False(t, answers[1].done.Load(), "it waits for the only place")
		assert.Equal(t, &LimitError{Until: time.Now().Add(Window)}, answers[2].err)
		assert.Equal(t, time.Second, answers[2].after)
		time.Sleep(3 * time.Second)
		synctest.Wait()
		require.NoError(t, answers[1].err)
		assert.Equal(t, 4*time.Second, answers[1].after)
	})
}

func TestWaitEndsExactly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := limited(1)
		spend(t, s, 1)
		time.Sleep(Window - patience - 1)
		refused(t, s, reader("a"), patience+1)
		time.Sleep(time.Nanosecond)
		a := ask(t, s, t.Context(), reader("a"))
		time.Sleep(patience)
		synctest.Wait()
		require.NoError(t, a.err)
		assert.Equal(t, patience, a.after)
	})
}

// Places are used again, so that storage has no more entries than the limit of calls.
func TestPlacesAreUsedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := limited(7)
		places := map[int]bool{}
		for range 50 {
			var calls []*Call
			counting := map[int]bool{}
			for range 7 {
				c := noted(t, s, Want{})
				places[c.note.place], counting[c.note.place] = true, true
				calls = append(calls, c)
			}
			assert.Len(t, counting, 7)
			calls[3].Withdraw()
			for _, c := range calls {
				c.End()
			}
			time.Sleep(Window)
		}
		assert.Len(t, places, 7)
	})
}

func TestManyAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := limited(100)
		spend(t, s, 100)
		time.Sleep(Window - 3*time.Second)
		var readers sync.WaitGroup
		for i := range 100 {
			readers.Go(func() {
				c, err := s.Take(context.Background(), reader(fmt.Sprint(i)))
				if assert.NoError(t, err) {
					c.End()
				}
			})
		}
		readers.Wait()
		refused(t, s, reader("late"), Window)
		idle(t, s)
	})
}

// Readers take each place that comes free. Background work gets one call in ten all the same, and readers get the others.
func TestBackgroundHasItsTurnBesideReaders(t *testing.T) {
	for limit, turns := range map[int]int{1: 6, 10: 60, 50: 300} { // in an hour, one call in ten
		synctest.Test(t, func(t *testing.T) {
			s := limited(limit)
			for range limit {
				take(t, s, Want{}).End()
				time.Sleep(Window / time.Duration(limit))
			}
			ctx, stop := context.WithCancel(t.Context())
			var served [Background + 1]atomic.Int64
			for range 3 {
				go func() {
					for ctx.Err() == nil {
						if c, err := s.Take(ctx, Want{Wait: patience}); err == nil {
							c.End()
							served[Reader].Add(1)
						} else {
							time.Sleep(100 * time.Millisecond)
						}
					}
				}()
			}
			go func() {
				for ctx.Err() == nil { // as the engine does: it waits for a place from a second before it is free
					time.Sleep(time.Until(s.FreeAt(Want{Class: Background})) - time.Second)
					if c, err := s.Take(ctx, Want{Class: Background, Wait: patience}); err == nil {
						c.End()
						served[Background].Add(1)
					}
				}
			}()
			time.Sleep(time.Hour)
			stop()
			idle(t, s)
			assert.InEpsilon(t, turns, served[Background].Load(), 0.2, "limit %d", limit)
			assert.InEpsilon(t, 60*limit-turns, served[Reader].Load(), 0.1, "limit %d", limit)
		})
	}
}

// In its turn, background work gets a place where a reader would, beside work that has places left to it. Those places it leaves.
func TestBackgroundInItsTurnIsPermittedWhereAReaderIs(t *testing.T) {
	for spent, wait := range map[int]time.Duration{6: 0, 7: glance} {
		synctest.Test(t, func(t *testing.T) {
			s := limited(10)
			s.FreeAt(Want{Class: Background}) // waits for its turn from now on
			time.Sleep(Window)
			spend(t, s, spent)
			take(t, s, Want{Ahead: 2})
			for _, class := range []Class{Reader, Background} {
				assert.Equal(t, wait, time.Until(s.FreeAt(Want{Class: class})), "class %d, %d calls spent", class, spent)
			}
		})
	}
}

// The turn of background work is no right to the readers' fifth: background work that has had its part of the share waits for it.
func TestTurnIsForBackgroundWorkThatHasHadNoPart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := limited(10)
		background := Want{Class: Background}
		spend(t, s, 10)
		refused(t, s, background, Window) // and waits for its turn from now on
		time.Sleep(Window)
		for range 8 {
			take(t, s, background).End()
		}
		refused(t, s, background, Window)
		time.Sleep(Window - time.Second)
		assert.Equal(t, time.Now().Add(time.Second), s.FreeAt(background))

		// A turn that no call has waited for does not go before readers a long time later.
		time.Sleep(time.Hour)
		spend(t, s, 9)
		refused(t, s, background, Window)
		time.Sleep(time.Second)
		refused(t, s, background, Window-time.Second)
	})
}

// The turn of background work permits no call beyond the limit, nor a redirect of work that has begun.
func TestTurnKeepsTheLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := limited(10)
		s.FreeAt(Want{Class: Background}) // it waits for its turn from now on
		time.Sleep(Window)
		spend(t, s, 10)
		refused(t, s, Want{Class: Background}, Window)
		refused(t, s, Want{Class: Background, Hop: true}, Window)
	})
}

// Two background calls that wait for their turn have it one after the other, and a burst of background calls delays the next turn by a [Window] at
// most. A turn of a smaller limit does not hold for a larger one.
func TestTurnsComeOneAfterTheOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := limited(20) // a turn each 30 s
		background := Want{Class: Background, Wait: Window - 1}
		for range 5 {
			for range 16 {
				take(t, s, background).End()
			}
			time.Sleep(Window)
		}
		time.Sleep(Window / 2)
		spend(t, s, 17)        // only readers may have the other three places
		take(t, s, background) // five minutes of background calls have delayed the turn by one
		assert.Equal(t, time.Now().Add(30*time.Second), s.FreeAt(background))
		second := ask(t, s, t.Context(), background)
		assert.Equal(t, time.Now().Add(Window), s.FreeAt(background))
		pass(Window)
		assert.Equal(t, 30*time.Second, second.after)

		s = limited(1) // a turn in ten minutes
		take(t, s, background).End()
		time.Sleep(Window)
		s.Configure(100, timeout) // a turn each 6 s
		spend(t, s, 80)
		assert.Equal(t, time.Now().Add(6*time.Second), s.FreeAt(background))
	})
}
