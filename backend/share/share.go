// Package share limits the calls that an engine makes to a token service through one connector, and keeps in storage what
// the next process has to know of them.
package share

import (
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
	// RevocationWait: a revocation waits for the call.
	RevocationWait
	// Background: an exchange that no reader waits for; or a code or a PIN, because a client that may start a grant can start any number of
	// them. It leaves a fifth of the limit free, rounded down.
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

// rank is the place of a call in the queue: the least goes first, equal ones go as they came.
func (w Want) rank() int {
	if w.Hop {
		return 2 * int(w.Class)
	}
	return 2*int(w.Class) + 1
}

// beginner is the tenant whose fifth the call counts against; "" for none.
func (w Want) beginner() string {
	if w.Hop {
		return ""
	}
	return w.Tenant
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
	again        *time.Timer       // goes through the queue when its next call can be permitted; nil before the first
	paused       time.Time         // the service wants no call before

	places    places // of notes
	gathering *note  // the note to which calls are added until its write begins
	writes    int    // of notes, that are under way
	// noted is, for each place, the latest time that this process has stored.
	noted   map[int]time.Time
	stored  time.Time // the pause that this process has stored
	loaded  bool      // the calls in storage are counted
	version uint64    // counts changes of storage by another node: a load that began before the last one is out of date
	// removed: the connector has been deleted, and nothing is stored. It changes together with stored, under mu.
	removed atomic.Bool
	// unsettled is, by tenant, when an earlier process last noted an exchange without noting that it was answered.
	unsettled map[string]time.Time
}

// New returns the share of a connector. [Share.Configure] and [Share.Load] come before the first call.
func New(storage logical.Storage, connector string) *Share {
	return &Share{
		storage: storage,
		prefix:  callPrefix + connector + "/",
		pausing: make(chan struct{}, 1),
		limit:   1,
		tenants: map[string]*tally{},
		places:  places{taken: map[int]*note{}},
		noted:   map[int]time.Time{},

		unsettled: map[string]time.Time{},
	}
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
	share        *Share
	tenant       string // whose fifth it counts against; "" for none
	housekeeping bool
	ahead        int
	unstored     bool
	note         *note     // nil until it is noted
	at           time.Time // when it was noted, as notedCall.At is
	running      bool
	foreign      bool      // another process made it
	frees        time.Time // from when on it does not count, once it has ended
}

// waiter is a goroutine that waits for a call.
type waiter struct {
	Want
	deadline time.Time
	until    time.Time     // when the call is permitted, as far as is known
	answered chan struct{} // closed when call or err is set
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
	s.queue = slices.Insert(s.queue, s.position(want), w)
	s.arrange()
	s.mu.Unlock()
	select {
	case <-w.answered:
	case <-ctx.Done():
	}
	s.mu.Lock()
	if err := ctx.Err(); err != nil { // also where the call was permitted at the same moment
		s.queue = slices.DeleteFunc(s.queue, func(other *waiter) bool { return other == w })
		if w.call != nil {
			s.withdraw(w.call)
		}
		s.arrange()
		return nil, err
	}
	return w.call, w.err
}

// position is where the queue takes a call in.
func (s *Share) position(want Want) int {
	rank := want.rank()
	i := slices.IndexFunc(s.queue, func(w *waiter) bool { return w.rank() > rank })
	if i < 0 {
		return len(s.queue)
	}
	return i
}

// FreeAt says when a call would be permitted that is wanted now, as far as is known. The time has passed where it would be permitted at
// once.
func (s *Share) FreeAt(want Want) time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.plan()
	for _, w := range s.queue[:s.position(want)] {
		p.hold(p.slot(w.Want))
	}
	return latest(p.slot(want).at, s.paused)
}

// arrange goes through the queue: it permits the calls that can be permitted now, and refuses those that would wait too long. It does so
// again when the next call that waits can be permitted.
func (s *Share) arrange() {
	p := s.plan()
	s.queue = slices.DeleteFunc(s.queue, func(w *waiter) bool {
		slot := p.slot(w.Want)
		w.until = latest(slot.at, s.paused)
		switch {
		case !w.until.After(p.now): // whether or not the deadline has just passed
			w.call = s.begin(w.Want)
			p.hold(slot)
		case w.until.After(w.deadline):
			w.err = &LimitError{Until: w.until, ByService: w.until.Equal(s.paused)}
		default:
			p.hold(slot)
			return false
		}
		close(w.answered)
		return true
	})
	if s.again != nil {
		s.again.Stop()
	}
	if len(s.queue) > 0 {
		next := slices.MinFunc(s.queue, func(a, b *waiter) int { return a.until.Compare(b.until) })
		s.again = time.AfterFunc(time.Until(next.until), func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.arrange()
		})
	}
}

// begin begins a call that is permitted now.
func (s *Share) begin(want Want) *Call {
	c := &Call{
		share:        s,
		tenant:       want.beginner(),
		housekeeping: want.Class == Housekeeping,
		ahead:        want.Ahead,
		unstored:     want.Unstored,
		running:      true,
	}
	s.ahead += c.ahead
	s.tallies(c, func(t *tally) { t.running++ })
	return c
}

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
	s.tallies(c, func(t *tally) {
		t.running--
		t.ended = append(t.ended, c)
	})
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
	if n := c.note; n != nil && n.counted == 1 && n.writing != nil {
		n.withdrawn = c // until storage has answered: it may take the entry, and has no more entries than calls are permitted
		return
	}
	c.running = false
	s.ahead -= c.ahead
	s.tallies(c, func(t *tally) { t.running-- })
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
	running int
	ended   []*Call // that still count, by when they stop
}

func (t *tally) count() int { return t.running + len(t.ended) }

// tallies has f change every tally that a call counts in.
func (s *Share) tallies(c *Call, f func(*tally)) {
	f(&s.all)
	if c.housekeeping {
		f(&s.housekeeping)
	}
	if c.tenant == "" {
		return
	}
	t := s.tenants[c.tenant]
	if t == nil {
		t = &tally{}
		s.tenants[c.tenant] = t
	}
	f(t)
	if t.count() == 0 {
		delete(s.tenants, c.tenant)
	}
}

// plan says, for one call after the other in the order of the queue, when it is permitted. Within a pass through the
// queue, each call takes what the calls before it have left.
type plan struct {
	share *Share
	now   time.Time
	// next is the index in all.ended of the call whose place the next call takes, once that stops counting; below 0, a place is free.
	next     int
	reserved bool // next includes the fifth that is left to readers
	// own is next among the calls of each tenant that has been looked at.
	own map[string]int
	// used are ended calls whose places a call of the same tenant takes.
	used         map[*Call]bool
	housekeeping int // next among the calls of that class
	ahead        int // places that are left to further calls of work that has begun
}

// slot is when a call is permitted, and what it takes.
type slot struct {
	Want
	at  time.Time
	own int // next among the calls of the tenant that begins an exchange
	// byTenant: the call waits until a call of its own tenant, freed, stops counting, and takes the place of that. freed is nil if that
	// call still runs.
	byTenant bool
	freed    *Call
}

// plan begins a pass through the queue. It first drops the calls that have stopped counting.
func (s *Share) plan() *plan {
	now := time.Now()
	for len(s.all.ended) > 0 && !s.all.ended[0].frees.After(now) {
		c := s.all.ended[0]
		s.tallies(c, func(t *tally) {
			t.ended[0] = nil // frees the memory
			t.ended = t.ended[1:]
		})
		s.forget(c)
	}
	return &plan{
		share:        s,
		now:          now,
		next:         s.all.count() - s.limit,
		own:          make(map[string]int, len(s.queue)),
		used:         map[*Call]bool{},
		housekeeping: s.housekeeping.count() - Fifth(s.limit),
		ahead:        s.ahead,
	}
}

// Fifth is how many calls of a limit one tenant's beginnings, or housekeeping, may have within a [Window]: one at the least.
func Fifth(limit int) int { return max(1, limit/5) }

// slot looks for the first time at which a call is permitted.
func (p *plan) slot(want Want) slot {
	s := p.share
	if want.Class >= Background && !p.reserved {
		p.reserved = true // also for the calls behind this one, which do not go before it
		p.next += s.limit / 5
	}
	for p.next >= 0 && p.next < len(s.all.ended) && p.used[s.all.ended[p.next]] {
		p.next++
	}
	found := slot{Want: want, at: p.frees(&s.all, p.next)}
	if !want.Hop {
		left, soon := p.frees(&s.all, p.next+p.ahead), p.now.Add(glance)
		if left.After(soon) {
			left = soon // the work may not need the places that are left to it
		}
		found.at = latest(found.at, left)
	}
	if want.Class == Housekeeping {
		found.at = latest(found.at, p.frees(&s.housekeeping, p.housekeeping))
	}
	if tenant := want.beginner(); tenant != "" {
		own, ok := s.tenants[tenant]
		if !ok {
			own = &tally{}
		}
		if found.own, ok = p.own[tenant]; !ok {
			found.own = own.count() - Fifth(s.limit)
		}
		if at := p.frees(own, found.own); at.After(found.at) {
			found.at, found.byTenant = at, true
			if found.own < len(own.ended) {
				found.freed = own.ended[found.own]
			}
		}
	}
	return found
}

// hold takes a slot for the call that it was found for, so that the calls behind that do not get it.
func (p *plan) hold(taken slot) {
	if tenant := taken.beginner(); tenant != "" {
		p.own[tenant] = taken.own + 1
	}
	if taken.Class == Housekeeping {
		p.housekeeping++
	}
	p.ahead += taken.Ahead
	if !taken.byTenant {
		p.next++
	} else if taken.freed != nil {
		p.used[taken.freed] = true
	}
}

// frees says when the k-th call of a tally, counted from 0, stops counting. Of a call that still runs, or waits, that is not known; it
// counts for a [Window] at least.
func (p *plan) frees(t *tally, k int) time.Time {
	if k < 0 {
		return p.now
	}
	if k < len(t.ended) {
		return t.ended[k].frees
	}
	return p.now.Add(Window)
}

// places numbers the notes of calls that count. A number is used again, so that storage holds few entries.
type places struct {
	// taken is the note at each place. Where another node has written one at the place of a note of this node, recall gives the place to that.
	taken map[int]*note
	free  []int // given back; take skips one that recall has taken since
	next  int   // every number below has been taken at least once
}

func (p *places) take(n *note) {
	for len(p.free) > 0 {
		n.place = p.free[len(p.free)-1]
		p.free = p.free[:len(p.free)-1]
		if p.taken[n.place] == nil {
			p.taken[n.place] = n
			return
		}
	}
	for p.taken[p.next] != nil {
		p.next++
	}
	n.place = p.next
	p.taken[n.place] = n
	p.next++
}

// give gives a note's place back, if it is still that note's.
func (p *places) give(n *note) {
	if p.taken[n.place] == n {
		delete(p.taken, n.place)
		p.free = append(p.free, n.place)
	}
}

func latest(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}
