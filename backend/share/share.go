// Package share limits the calls that an engine makes to a token service through one connector, and keeps in storage what
// the next process has to know of them.
package share

import (
	"cmp"
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"golang.org/x/sync/singleflight"
)

// Window is the time over which calls are counted. No Window sees more calls than the limit.
const Window = time.Minute

// glance is how soon a waiter looks again whether work that has begun still needs the places that are left to it: see [Want.Ahead].
const glance = time.Second

// Class is the kind of work that a call is for. A lower class goes first.
type Class int

const (
	// Reader: a reader or a writer waits for the call.
	Reader Class = iota
	// RevocationWait: a request that revokes a lease waits for the call.
	RevocationWait
	// Background: an exchange that no reader waits for; or a code or a PIN, because a client that may start a grant can start any number of
	// them. It leaves a fifth of the limit free, rounded down, but it gets one call in ten in any case.
	Background
	// Revocation: a revocation that no request waits for. It leaves as much free as Background does.
	Revocation
	// Housekeeping: polls. It leaves as much free as Background does, and takes no more than a fifth of the limit (but at least one call).
	Housekeeping
)

// Want describes a call that is to be made.
type Want struct {
	// Tenant is set for a call that begins an exchange: no tenant begins more of them within a [Window] than a fifth of the
	// limit (but at least one). It is "" for all other calls: revocations, polls, codes, PINs.
	Tenant string
	Class  Class
	// Unstored: the exchange is of a refresh token that storage does not have, so the next process need not ask what became of it. See
	// [Share.Unsettled].
	Unstored bool
	// Hop: the call is a further request of work that has begun, such as a redirect that is followed. It counts against the
	// limit alone, not against the tenant's fifth, and goes before the calls of its class that begin work.
	Hop bool
	// Ahead is how many further calls the same work is likely to need. While this call runs, their places are left free: no other work
	// begins in them.
	Ahead int
	// Wait is how long the caller waits at most; less than a [Window].
	Wait time.Duration
}

// LimitError says when a call would be permitted.
type LimitError struct {
	// Until is when to try again, as far as is known.
	Until time.Time
	// ByService: the service has asked for the pause. Otherwise this connector's own limit is used up.
	ByService bool
}

func (e *LimitError) Error() string {
	return "too many calls; the next is permitted at " + e.Until.UTC().Format(time.RFC3339)
}

// Share is one connector's share of a service's limit, and the only user of what storage holds about its calls. A call
// counts from its permission until a [Window] after its end, because the service may have counted it at any moment in
// between.
type Share struct {
	storage logical.Storage
	prefix  string // of the keys in storage
	reads   singleflight.Group
	// pausing is held, by a value in it, while the pause is stored.
	pausing chan struct{}

	mu      sync.Mutex
	limit   int
	timeout time.Duration // of one request to the service

	all          tally
	housekeeping tally
	ahead        int               // places that are left to further calls of the work whose calls run
	tenants      map[string]*tally // none without a call that counts
	queue        []*waiter         // by rank, then first come, first served
	turn         time.Time         // when the next call of the class Background is permitted where a reader's would be
	again        *time.Timer       // goes through the queue when its next call can be permitted
	paused       time.Time         // the service wants no call before

	// notes are those of calls that count, by their places. Where another node has written one at the place of a note of this node, recall
	// gives the place to that.
	notes     map[int]*note
	free      int   // no place below is free. A new note gets the lowest free place, so that storage holds few entries.
	gathering *note // the note to which calls are added until its write begins
	writes    int   // of notes, that are under way
	// noted is, for each place, the latest time that this process has stored.
	noted   map[int]time.Time
	stored  time.Time // the pause that this process has stored
	changes int       // of storage by another node
	loaded  int       // changes, when the load began that has counted the calls in storage; below 0 before the first
	// removed: the connector has been deleted, and nothing is stored. It changes together with stored, under mu.
	removed atomic.Bool
	// unsettled is, by tenant, when an earlier process last noted an exchange without noting that it was answered.
	unsettled map[string]time.Time
}

// New returns the share of a connector. [Share.Configure] and [Share.Load] come before the first call.
func New(storage logical.Storage, connector string) *Share {
	s := &Share{
		storage: storage,
		prefix:  callPrefix + connector + "/",
		pausing: make(chan struct{}, 1),
		limit:   1,
		loaded:  -1,
		tenants: map[string]*tally{},
		notes:   map[int]*note{},
		noted:   map[int]time.Time{},

		unsettled: map[string]time.Time{},
	}
	s.again = time.AfterFunc(Window, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.arrange()
	})
	s.again.Stop() // until a call waits
	return s
}

// Configure sets how many calls a [Window] may see, 1 or more, and how long one request to the service takes at most. Both also apply to
// calls that wait already. It ends the effect of [Share.Remove].
func (s *Share) Configure(limit int, requestTimeout time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.limit, s.timeout = limit, requestTimeout
	s.removed.Store(false)
	s.arrange()
}

// Call is a call that is permitted. Its user calls Note, then makes the call, then calls End; or Withdraw, where the call
// is not made after all.
type Call struct {
	share    *Share
	noted    notedCall // as storage has it, or is to have it
	unstored bool
	ahead    int
	note     *note // nil until it is noted
	running  bool
	foreign  bool      // another process made it
	frees    time.Time // from when on it does not count, once it has ended
}

// waiter is a call in the queue.
type waiter struct {
	Want
	rank     int // its place in the queue: the least goes first, equal ones go as they came
	deadline time.Time
	until    time.Time     // when the call is permitted, as far as is known
	answered chan struct{} // closed when the call is permitted, or refused with err; nil in FreeAt, which wants until alone
	call     *Call
	err      error
}

// Take permits one call, and waits up to want.Wait until it can. It uses no storage. Its error is the context's, or a [*LimitError] as soon
// as it is known that the wait would be longer.
func (s *Share) Take(ctx context.Context, want Want) (*Call, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	w := &waiter{Want: want, deadline: time.Now().Add(want.Wait), answered: make(chan struct{})}
	s.enqueue(w)
	s.mu.Unlock()
	select {
	case <-w.answered:
	case <-ctx.Done():
	}
	s.mu.Lock()
	if err := ctx.Err(); err != nil { // also where the call was permitted at the same moment
		s.queue = slices.DeleteFunc(s.queue, func(other *waiter) bool { return other == w })
		s.withdraw(w.call)
		s.arrange()
		return nil, err
	}
	if w.err != nil {
		return nil, w.err
	}
	return w.call, nil
}

// FreeAt says when a call would be permitted that is wanted now, as far as is known. The time has passed where it would be permitted at
// once.
func (s *Share) FreeAt(want Want) time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	w := &waiter{Want: want}
	s.enqueue(w)
	return w.until
}

// enqueue takes a call into the queue, behind those of its rank, and goes through the queue. The caller holds s.mu.
func (s *Share) enqueue(w *waiter) {
	w.rank = 2 * int(w.Class)
	if w.Hop {
		w.Tenant = "" // it begins nothing
	} else {
		w.rank++
	}
	noted := notedCall{Tenant: w.Tenant, Housekeeping: w.Class == Housekeeping}
	w.call = &Call{share: s, noted: noted, unstored: w.Unstored, ahead: w.Ahead}
	behind, _ := slices.BinarySearchFunc(s.queue, w.rank+1, func(other *waiter, rank int) int { return other.rank - rank })
	s.queue = slices.Insert(s.queue, behind, w)
	s.arrange()
}

// arrange goes through the queue, and does so again when the next call that waits can be permitted. It first drops the calls that have
// stopped counting.
func (s *Share) arrange() {
	now := time.Now()
	for len(s.all.ended) > 0 && !s.all.ended[0].frees.After(now) {
		s.forget(s.shift())
	}
	p := plan{share: s, now: now, ended: s.all.ended, own: make(map[string]int, len(s.queue))}
	var first *waiter // the background work whose turn it is, which goes before readers
	i := slices.IndexFunc(s.queue, func(w *waiter) bool { return w.Class == Background })
	if i >= 0 && (now.Sub(s.turn) > Window+s.timeout || s.turn.Sub(now) > max(Window, s.turnEvery())) {
		s.turn = now.Add(s.turnEvery()) // none has waited for the turn that has passed, or the limit was smaller
	}
	p.turn = s.turn.Sub(now)
	if i >= 0 && p.turn <= 0 {
		first = s.queue[i]
		if p.answer(first) {
			s.queue = slices.Delete(s.queue, i, i+1)
		}
	}
	s.queue = slices.DeleteFunc(s.queue, func(w *waiter) bool { return w != first && p.answer(w) })
	if len(s.queue) > 0 {
		next := slices.MinFunc(s.queue, func(a, b *waiter) int { return a.until.Compare(b.until) })
		s.again.Reset(time.Until(next.until))
	}
}

// plan is one pass through the queue. It counts the places that calls which go on waiting will take, so that no call behind gets these.
type plan struct {
	share        *Share
	now          time.Time
	ended        []*Call        // without those whose places go to a call of the same tenant
	places       int            // places that are free, or come free when one of ended stops counting
	own          map[string]int // beginnings of each tenant
	housekeeping int            // calls of that class
	turn         time.Duration  // as the share's, from now on
}

// turnEvery is how often work of the class Background gets a place for sure, beside readers who take all that there are. Without that, refresh
// tokens would die of disuse.
func (s *Share) turnEvery() time.Duration { return 10 * Window / time.Duration(s.limit) }

// answer permits a call if that can be done now, and refuses it if it would wait too long.
func (p *plan) answer(w *waiter) (answered bool) {
	s, fifth := p.share, Fifth(p.share.limit)
	// The call takes the place of ended[next], once that stops counting; below 0, a place is free.
	next := s.all.count + p.places - s.limit
	byTurn := max(p.frees(p.ended, next), p.turn)
	if w.Class >= Background {
		next += s.limit / 5
	}
	wait := p.frees(p.ended, next)
	if w.Class == Background && byTurn <= wait {
		wait, next = byTurn, next-s.limit/5
	}
	if !w.Hop {
		// It looks again after a glance, because the work that has begun may not need the places that are left to it.
		wait = max(wait, min(p.frees(p.ended, next+s.ahead), glance))
	}
	if w.Class == Housekeeping {
		wait = max(wait, p.frees(s.housekeeping.ended, s.housekeeping.count+p.housekeeping-fifth))
	}
	own := cmp.Or(s.tenants[w.Tenant], &tally{})
	nextOwn := own.count + p.own[w.Tenant] - fifth
	behindOwn := w.Tenant != "" && p.frees(own.ended, nextOwn) > wait
	if behindOwn {
		wait = p.frees(own.ended, nextOwn)
	}
	paused := s.paused.Sub(p.now)
	wait = max(wait, paused)
	w.until = p.now.Add(wait)
	switch {
	case w.answered == nil:
		return true
	case wait <= 0: // whether or not the deadline has just passed
		w.call.running = true
		s.ahead += w.Ahead
		s.tallies(w.call, func(t *tally) { t.count++ })
		if w.Class == Background {
			p.turn = min(max(p.turn, 0)+s.turnEvery(), max(Window, s.turnEvery()))
			s.turn = p.now.Add(p.turn)
		}
	case w.until.After(w.deadline):
		w.err = &LimitError{Until: w.until, ByService: wait == paused}
	default:
		p.own[w.Tenant]++
		if w.Class == Housekeeping {
			p.housekeeping++
		}
		if !behindOwn {
			p.places++
			if w.Class == Background {
				p.turn = wait + s.turnEvery()
			}
		} else if nextOwn < len(own.ended) { // otherwise it waits for a call that still runs
			i := slices.Index(p.ended, own.ended[nextOwn])
			p.ended = slices.Concat(p.ended[:i], p.ended[i+1:])
		}
		return false
	}
	close(w.answered)
	return true
}

// frees says how long it takes until the k-th of some calls, counted from 0, stops counting. Of a call that still runs, or waits, that is
// not known; it counts for a [Window] at least.
func (p *plan) frees(ended []*Call, k int) time.Duration {
	switch {
	case k < 0:
		return 0
	case k < len(ended):
		return ended[k].frees.Sub(p.now)
	}
	return Window
}

// Fifth is how many calls of a limit one tenant's beginnings, or housekeeping, may have within a [Window]: one at the least.
func Fifth(limit int) int { return max(1, limit/5) }

// End says that the call has been answered, or has failed. Only the first of End and Withdraw counts.
func (c *Call) End() {
	s := c.share
	s.mu.Lock()
	defer s.mu.Unlock()
	if !c.running {
		return
	}
	c.running = false
	s.ahead -= c.ahead
	c.frees = time.Now().Add(Window)
	s.tallies(c, func(t *tally) { t.ended = append(t.ended, c) })
}

// Withdraw gives back the place of a call that was never made.
func (c *Call) Withdraw() {
	s := c.share
	s.mu.Lock()
	defer s.mu.Unlock()
	s.withdraw(c)
	s.arrange()
}

func (s *Share) withdraw(c *Call) {
	if !c.running {
		return
	}
	if n := c.note; n != nil && n.counted == 1 && n.writing {
		n.withdrawn = c // until storage has answered: it may take the entry, and has no more entries than calls are permitted
		return
	}
	c.running = false
	s.ahead -= c.ahead
	s.tallies(c, func(t *tally) { t.count-- })
	s.forget(c)
}

// PausedUntil returns the end of the pause that the service has asked for: a time that has passed, or zero, where there
// is none.
func (s *Share) PausedUntil() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.paused
}

// tally counts calls.
type tally struct {
	count int
	ended []*Call // those that have ended, by when they stop counting
}

// shift takes the call out of the tallies that stops counting first.
func (s *Share) shift() *Call {
	c := s.all.ended[0]
	s.tallies(c, func(t *tally) {
		t.ended[0] = nil // frees the memory
		t.ended = t.ended[1:]
		t.count--
	})
	return c
}

// tallies has f change every tally that a call counts in.
func (s *Share) tallies(c *Call, f func(*tally)) {
	f(&s.all)
	if c.noted.Housekeeping {
		f(&s.housekeeping)
	}
	if c.noted.Tenant == "" {
		return
	}
	t := s.tenants[c.noted.Tenant]
	if t == nil {
		t = &tally{}
		s.tenants[c.noted.Tenant] = t
	}
	f(t)
	if t.count == 0 {
		delete(s.tenants, c.noted.Tenant)
	}
}

func latest(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}
