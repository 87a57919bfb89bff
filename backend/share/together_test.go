package share

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"
)

// beginner is the tenant whose fifth the call counts against; "" for none.
func (w Want) beginner() string {
	if w.Hop {
		return ""
	}
	return w.Tenant
}

// rank is the place of a call in the queue: the least goes first, equal ones go as they came.
func (w Want) rank() int {
	if w.Hop {
		return 2 * int(w.Class)
	}
	return 2*int(w.Class) + 1
}

// caller is a goroutine that takes a call, and what it does with the call.
type caller struct {
	at       time.Duration
	want     Want
	givesUp  time.Duration // it cancels after this time; 0: never
	withdraw bool          // it withdraws the call after toService
	noNote   bool          // storage does not take the note
	// The service counts the call at a time between its permission and its end.
	toService, toEnd time.Duration
}

// life is one process.
type life struct {
	share *Share
	ctx   context.Context
	die   context.CancelFunc
	first bool // the first process: in later ones the calls of earlier ones count for longer than in theirs
}

// fact is the result of a caller.
type fact struct {
	caller
	life            *life
	asked, answered time.Time
	permitted       bool
	refused         bool // with a LimitError
	arrived         bool
	arrival         time.Time
	freed           time.Time // the earliest time at which the call stops counting
}

// counts returns whether the call has to count at that time.
func (f *fact) counts(at time.Time) bool {
	return f.permitted && !f.answered.After(at) && f.freed.After(at)
}

var callers = rapid.Custom(func(r *rapid.T) caller {
	half := func(name string, most int) time.Duration {
		return time.Duration(rapid.IntRange(0, most).Draw(r, name)) * 500 * time.Millisecond
	}
	c := caller{
		at: half("at", 300),
		want: Want{
			Tenant: rapid.SampledFrom([]string{"", "", "a", "b", "c"}).Draw(r, "tenant"),
			Class:  rapid.SampledFrom([]Class{Reader, Reader, RevocationWait, Background, Revocation, Housekeeping}).Draw(r, "class"),
			Hop:    rapid.IntRange(0, 3).Draw(r, "hop") == 0,
			Wait:   rapid.SampledFrom([]time.Duration{0, patience, patience, 30 * time.Second}).Draw(r, "wait"),
		},
		toService: half("to the service", 10),
		toEnd:     half("to the end", 10),
	}
	switch rapid.IntRange(0, 9).Draw(r, "fate") {
	case 0:
		c.givesUp = 500*time.Millisecond + half("patience", 10)
	case 1:
		c.withdraw = true
	case 2:
		c.noNote = true
	}
	return c
})

// Callers of all kinds come at the same time, and the process dies and starts again in between.
func TestRulesHoldWhateverTheOrder(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		limit := rapid.IntRange(1, 20).Draw(r, "limit")
		all := rapid.SliceOfN(callers, 10, 150).Draw(r, "callers")
		if rapid.Bool().Draw(r, "readers alone") {
			for i := range all {
				all[i].want.Class, all[i].want.Hop = Reader, false
				all[i].withdraw, all[i].noNote = false, false
			}
		}
		dies := time.Duration(rapid.IntRange(0, 300).Draw(r, "process dies")) * 500 * time.Millisecond
		var err error
		synctest.Test(t, func(t *testing.T) {
			facts, storage := play(t, limit, all, dies)
			err = check(facts, limit)
			if n := len(storage.keys(t)); err == nil && n > limit {
				err = fmt.Errorf("%d entries in storage and a limit of %d", n, limit)
			}
		})
		if err != nil {
			r.Fatal(err)
		}
	})
}

func play(t *testing.T, limit int, all []caller, dies time.Duration) ([]*fact, *store) {
	storage := &store{}
	var mu sync.Mutex
	begin := func(first bool) *life {
		l := &life{share: New(storage, "hr"), first: first}
		l.ctx, l.die = context.WithCancel(context.Background())
		l.share.Configure(limit, timeout)
		require.NoError(t, l.share.Load(l.ctx))
		return l
	}
	now := begin(true)
	var facts []*fact
	var exclusive sync.WaitGroup
	for _, c := range all {
		f := &fact{caller: c}
		facts = append(facts, f)
		exclusive.Go(func() {
			time.Sleep(c.at)
			mu.Lock()
			f.life = now
			mu.Unlock()
			f.call()
		})
	}
	time.Sleep(dies)
	mu.Lock()
	now.die()
	now = begin(false)
	mu.Unlock()
	exclusive.Wait()
	idle(t, now.share)
	now.die()
	return facts, storage
}

// call makes one call.
func (f *fact) call() {
	ctx := f.life.ctx
	if f.givesUp > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, f.givesUp)
		defer cancel()
	}
	f.asked = time.Now()
	c, err := f.life.share.Take(ctx, f.want)
	f.answered = time.Now()
	f.permitted = err == nil
	f.refused = errors.As(err, new(*LimitError))
	if err != nil {
		return
	}
	f.freed = f.answered
	noting := f.life.ctx
	if f.noNote {
		var cancel context.CancelFunc
		noting, cancel = context.WithCancel(noting)
		cancel()
	}
	if c.Note(noting) != nil {
		return
	}
	if f.wait(f.toService) {
		return
	}
	if f.withdraw {
		c.Withdraw()
		f.freed = time.Now()
		return
	}
	f.arrived, f.arrival = true, time.Now()
	if !f.wait(f.toEnd) {
		c.End()
	}
	f.freed = time.Now().Add(Window)
}

// wait waits, and returns whether the process has died in this time.
func (f *fact) wait(d time.Duration) bool {
	select {
	case <-time.After(d):
		return false
	case <-f.life.ctx.Done():
		f.freed = time.Now()
		return true
	}
}

func check(facts []*fact, limit int) error {
	fifth := max(1, limit/5)
	for _, f := range facts {
		if f.arrived {
			n := 0
			for _, other := range facts {
				if since := other.arrival.Sub(f.arrival); other.arrived && since >= 0 && since < Window {
					n++
				}
			}
			if n > limit {
				return fmt.Errorf("%d calls in a window, and a limit of %d", n, limit)
			}
		}
		if err := f.checkTurn(facts, limit); err != nil {
			return err
		}
		at := f.answered
		total, own, housekeeping := 0, 0, 0
		for _, other := range facts {
			if !other.counts(at) {
				continue
			}
			// Within the same moment, readers may have come after all others, and background work that has its turn after the classes behind it.
			if other.answered.Before(at) || other.want.Class >= min(f.want.Class, Revocation) {
				total++
			}
			if other.want.Class == Housekeeping {
				housekeeping++
			}
			if other.want.beginner() == f.want.beginner() {
				own++
			}
		}
		if f.permitted && f.want.Class >= Background && total > limit-limit/5 && !f.hasItsTurn(facts, limit) {
			return fmt.Errorf("background work takes %d of %d", total, limit)
		}
		if housekeeping > fifth {
			return fmt.Errorf("housekeeping takes %d of %d", housekeeping, limit)
		}
		if f.want.beginner() != "" && own > fifth {
			return fmt.Errorf("tenant %q begins %d of %d", f.want.Tenant, own, limit)
		}
	}
	return nil
}

// hasItsTurn returns whether the call may take a place of the readers' fifth: it is of the class Background, which has had no call for the time
// of a turn, and has waited for one that long.
func (f *fact) hasItsTurn(facts []*fact, limit int) bool {
	turn := f.answered.Add(-10 * Window / time.Duration(limit))
	waited := false
	for _, other := range facts {
		if other.life != f.life || other.want.Class != Background {
			continue
		}
		if other != f && other.permitted && other.answered.After(turn) && !other.answered.After(f.answered) {
			return false
		}
		waited = waited || !other.asked.After(turn)
	}
	return f.want.Class == Background && waited
}

// checkTurn checks a caller against those that came before it or at the same time.
func (f *fact) checkTurn(facts []*fact, limit int) error {
	alone, readers, counting, own := true, true, 0, 0
	for _, other := range facts {
		if other.life == f.life && f.permitted && other.permitted && f.want.rank() == other.want.rank() &&
			f.want.beginner() == "" && f.asked.Before(other.asked) && f.answered.After(other.answered) {
			return fmt.Errorf("%v, asked at %v, was served after %v, asked at %v", f.want, f.asked, other.want, other.asked)
		}
		if other != f && !other.asked.After(f.answered) && !other.answered.Before(f.answered) {
			alone = false
		}
		readers = readers && other.want.rank() == f.want.rank() && !other.withdraw && !other.noNote
		if other.permitted && !other.freed.Before(f.answered) {
			counting++
			if other.want.beginner() == f.want.beginner() {
				own++
			}
		}
	}
	if f.refused && readers && f.answered != f.asked {
		return fmt.Errorf("%v learned after %v what was known at once", f.want, f.answered.Sub(f.asked))
	}
	blocked := counting >= limit || f.want.beginner() != "" && own >= max(1, limit/5)
	if f.refused && f.life.first && alone && f.want.Class <= RevocationWait && !blocked {
		return fmt.Errorf("%v was refused, and %d calls count of %d, %d of its own", f.want, counting, limit, own)
	}
	return nil
}
