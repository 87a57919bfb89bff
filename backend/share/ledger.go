package share

import (
	"context"
	"errors"
	"slices"
	"strconv"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"golang.org/x/sync/errgroup"
)

// Storage keeps the calls of a connector that count under callPrefix<connector>/<place of their note>, and its pause under
// callPrefix<connector>/pausePlace. Nothing there is a secret. Version 0.1.0 wrote one call to a note.
const (
	callPrefix = "calls/"
	pausePlace = "pause"
)

// entryFormat is the format of an entry. A change that an older engine could not read raises it.
const entryFormat = 1

const (
	// storeWithin bounds each write, and all reads of one load together.
	storeWithin = 30 * time.Second

	// storageReaders is how many reads a load does at once.
	storageReaders = 8

	// gather is how long a call waits, behind a write that is under way, to be noted together with others.
	gather = 50 * time.Millisecond

	// mostCalls is how many calls one note holds at most, so that every storage takes it.
	mostCalls = 100

	// longestPause bounds a pause. One that ends later was asked for, or stored, while a clock was wrong.
	longestPause = 24 * time.Hour

	// countsFor is how long a call counts in the next process, from when its caller began to note it, beside the time that its request takes:
	// the request begins once storage has the note.
	countsFor = gather + storeWithin + Window
)

// ErrRemoved is the error of a call or pause that cannot be stored because [Share.Remove] has been called.
var ErrRemoved = errors.New("the connector has been deleted")

// entry is calls, stored before they are made, or a pause.
type entry struct {
	Format int `json:"format"`
	notedCall
	// With are the calls that were noted together with the first. Version 0.1.0 does not count them.
	With []notedCall `json:"with,omitempty"`
	// Until is when the calls stop counting, at the latest; or the end of the pause. At has its meaning after that, too.
	Until time.Time `json:"until"`
}

type notedCall struct {
	// Tenant is whose fifth a call counts against.
	Tenant string `json:"tenant,omitempty"`
	// Housekeeping says that a call counts against that class's fifth.
	Housekeeping bool `json:"housekeeping,omitempty"`
	// At is when a call was noted that begins the exchange of a tenant's stored refresh token; zero for any other, and where the next
	// process need not ask what became of the exchange: see [Share.Unsettled].
	At time.Time `json:"at,omitzero"`
}

// note is one entry in storage. It holds calls that are noted at about the same time, so that one write stores them all.
type note struct {
	place   int // no other note gets it while a call of this note counts, or a write of it is under way or to come
	calls   []*Call
	counted int // how many of calls still count
	writing bool
	next    *write // the write that stores what changes from now on, after the one that is under way; nil: none
	// withdrawn is the last call that counts, if it was withdrawn during a write. It counts until the write ends.
	withdrawn *Call
}

// write is one write of a note.
type write struct {
	waiting int                // how many callers wait for it
	cancel  context.CancelFunc // set when the write begins; the last caller that gives up calls it
	done    chan struct{}
	err     error // set before done is closed
}

// Note stores the call before it is made, so that the next process counts it. The calls that come while a note is being written are noted
// together, by the next write. A write takes 30 seconds at most. If it fails, the call must not be made: Note cancels it, which may take as
// long again, and returns storage's error as it is, the context's, or [ErrRemoved].
func (c *Call) Note(ctx context.Context) error {
	s := c.share
	s.mu.Lock()
	now := time.Now().UTC()
	if c.noted.Tenant != "" && !c.unstored {
		c.noted.At = now.Truncate(time.Millisecond)
	}
	n := s.gathering
	if n == nil {
		for s.notes[s.free] != nil {
			s.free++
		}
		n = &note{place: s.free}
		s.notes[n.place], s.gathering = n, n
		if s.writes > 0 {
			time.AfterFunc(gather, func() { // even if the write that is under way hangs
				s.mu.Lock()
				defer s.mu.Unlock()
				if s.gathering != nil {
					s.write(s.gathering)
				}
			})
		}
	}
	c.note, n.calls, n.counted = n, append(n.calls, c), n.counted+1
	s.noted[n.place] = now.Add(s.timeout + countsFor)
	err := s.store(ctx, n)
	if err != nil && n == s.gathering {
		c.noted.At = time.Time{} // its write has not begun: there is nothing to take back
	}
	s.mu.Unlock()
	if err != nil {
		c.Cancel(ctx) // storage may have the entry though it says otherwise
	}
	return err
}

// Cancel is Withdraw for a call that was noted and is not made after all. It notes, too, that the next process need not ask what became of
// the call; if storage does not take that within 30 seconds, that process asks. It does not end with the context.
func (c *Call) Cancel(ctx context.Context) {
	c.Settle(context.WithoutCancel(ctx))
	c.Withdraw()
}

// Settle notes that the exchange which the call began was answered, and that the answer has changed nothing: the next process need not ask
// what became of it. If storage does not take that, that process asks.
func (c *Call) Settle(ctx context.Context) {
	s := c.share
	s.mu.Lock()
	defer s.mu.Unlock()
	if c.noted.At.IsZero() || s.notes[c.note.place] != c.note {
		return // the note does not have the next process ask about the call, or its place is not the note's any more
	}
	c.noted.At = time.Time{}
	_ = s.store(ctx, c.note)
}

// store waits until storage has a note as it is now. A write that no caller waits for is given up. The caller holds s.mu, which store
// unlocks while it waits.
func (s *Share) store(ctx context.Context, n *note) (err error) {
	if n.next == nil {
		n.next = &write{done: make(chan struct{})}
	}
	w := n.next
	w.waiting++
	if !n.writing && (n != s.gathering || s.writes == 0 || len(n.calls) == mostCalls) {
		s.write(n)
	}
	s.mu.Unlock()
	select {
	case <-w.done:
		err = w.err
	case <-ctx.Done():
		err = ctx.Err()
	}
	s.mu.Lock()
	w.waiting--
	if w.waiting == 0 && w.cancel != nil {
		w.cancel()
	}
	return err
}

// write begins the next write of a note. The note takes in no more calls after that. The caller holds s.mu.
func (s *Share) write(n *note) {
	if s.gathering == n {
		s.gathering = nil
	}
	w := n.next
	n.writing, n.next = true, nil
	s.writes++
	e := entry{Until: s.noted[n.place]}
	for _, c := range n.calls {
		e.With = append(e.With, c.noted)
	}
	e.notedCall, e.With = e.With[0], e.With[1:]
	var ctx context.Context
	ctx, w.cancel = context.WithCancel(context.Background())
	if w.waiting == 0 {
		w.cancel() // all callers gave up before it began: storage is not touched
	}
	go func() {
		err := s.put(ctx, strconv.Itoa(n.place), e)
		w.cancel()
		s.mu.Lock()
		w.err = err
		close(w.done)
		n.writing = false
		s.writes--
		switch {
		case n.next != nil:
			s.write(n)
		case n.withdrawn != nil:
			s.withdraw(n.withdrawn) // which vacates the note
			s.arrange()
		default:
			s.vacate(n)
		}
		if s.gathering != nil {
			s.write(s.gathering)
		}
		s.mu.Unlock()
	}()
}

// vacate gives the note's place back, unless a call of it counts, a write of it is under way or to come, or the place is another note's by
// now. The caller holds s.mu.
func (s *Share) vacate(n *note) {
	if n.counted == 0 && !n.writing && n.next == nil && s.notes[n.place] == n {
		delete(s.notes, n.place)
		s.free = min(s.free, n.place)
	}
}

// forget takes a call out of its note, once it does not count.
func (s *Share) forget(c *Call) {
	if c.note != nil {
		c.note.counted--
		s.vacate(c.note)
	}
}

// Unsettled returns when an earlier process noted an exchange of the tenant that it may have had no answer to; zero where there is none,
// and from the second call on. [Share.Load] comes before it.
func (s *Share) Unsettled(tenant string) time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	at := s.unsettled[tenant]
	delete(s.unsettled, tenant)
	return at
}

// Recalled returns when the last of the tenant's exchanges stops counting that an earlier process began after the given time; zero where
// there is none. [Share.Load] comes before it.
func (s *Share) Recalled(tenant string, after time.Time) (until time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if t := s.tenants[tenant]; t != nil {
		for _, c := range t.ended {
			if c.foreign && c.noted.At.After(after) {
				until = latest(until, c.frees)
			}
		}
	}
	return until
}

// Pause permits no call before that time, a day ahead at most. A shorter pause does not shorten a longer one. It touches
// memory alone: [Share.StorePause] comes after it.
func (s *Share) Pause(until time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pause(until)
	s.arrange()
}

// StorePause stores the present pause, unless that has been done, for the process after this one. One write runs at a time, so
// that the longest pause is written last; it takes 30 seconds at most. The error is storage's as it is, the context's, or
// [ErrRemoved]; the pause holds in this process in any case.
func (s *Share) StorePause(ctx context.Context) error {
	select {
	case s.pausing <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-s.pausing }()
	s.mu.Lock()
	longest, stored := s.paused, s.stored
	s.mu.Unlock()
	if !longest.After(stored) {
		return nil
	}
	if err := s.put(ctx, pausePlace, entry{Until: longest.UTC()}); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.removed.Load() {
		s.stored = longest
	}
	return nil
}

// pause permits no call before that time, a day ahead at most. cut: the time lay further ahead.
func (s *Share) pause(until time.Time) (cut bool) {
	end := bounded(until, longestPause)
	s.paused = latest(s.paused, end)
	return end.Before(until)
}

// bounded returns t, but no time further ahead than that. The result goes by the process's monotonic clock, which a change of the host's
// clock does not affect.
func bounded(t time.Time, ahead time.Duration) time.Time {
	now := time.Now()
	return now.Add(min(t.Sub(now), ahead))
}

// put stores an entry, unless the connector is removed before that has been done.
func (s *Share) put(ctx context.Context, place string, e entry) error {
	if s.removed.Load() {
		return ErrRemoved
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	e.Format = entryFormat
	raw, err := logical.StorageEntryJSON(s.prefix+place, e)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, storeWithin)
	defer cancel()
	err = s.storage.Put(ctx, raw)
	if s.removed.Load() { // also if the write has failed: storage may have done it
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), storeWithin)
		defer cancel()
		return errors.Join(ErrRemoved, s.storage.Delete(ctx, raw.Key))
	}
	return err
}

// Load counts the calls of the process before this one, and goes on with its pause. Storage is read once for all callers;
// each waits no longer than its own context allows. The error is storage's as it is, or the context's; the next call of Load
// tries again. An entry that cannot be decoded is left out.
func (s *Share) Load(ctx context.Context) error {
	for {
		s.mu.Lock()
		loaded := s.loaded == s.changes
		s.mu.Unlock()
		if loaded {
			return nil
		}
		read := s.reads.DoChan("", func() (any, error) {
			ctx, cancel := context.WithTimeout(context.Background(), storeWithin)
			defer cancel()
			return nil, s.read(ctx)
		})
		select {
		case result := <-read:
			if result.Err != nil {
				return result.Err
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Invalidate says that another node has changed what storage holds: the next [Share.Load] reads it again.
func (s *Share) Invalidate() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.changes++
}

func (s *Share) read(ctx context.Context) error {
	s.mu.Lock()
	changes := s.changes
	s.mu.Unlock()
	places, err := s.storage.List(ctx, s.prefix)
	if err != nil {
		return err
	}
	entries := make([]*entry, len(places))
	readers, reading := errgroup.WithContext(ctx)
	readers.SetLimit(storageReaders)
	for i, place := range places {
		readers.Go(func() error {
			raw, err := s.storage.Get(reading, s.prefix+place)
			if err != nil || raw == nil {
				return err
			}
			var e entry
			if raw.DecodeJSON(&e) == nil && e.Format <= entryFormat {
				entries[i] = &e
			}
			return nil
		})
	}
	if err := readers.Wait(); err != nil {
		return err
	}
	s.mu.Lock()
	cut := s.recall(places, entries)
	s.loaded = changes
	s.mu.Unlock()
	if cut {
		// Otherwise the day would begin again with each restart. On a standby, which cannot write, it does.
		_ = s.StorePause(ctx)
	}
	return nil
}

// recall counts the calls that storage has, entries[i] at the place at[i]; nil stands for no entry. cut: the pause lay too far ahead.
func (s *Share) recall(at []string, entries []*entry) (cut bool) {
	now := time.Now()
	var calls []*Call
	for len(s.all.ended) > 0 {
		if c := s.shift(); c.foreign {
			s.forget(c)
		} else {
			calls = append(calls, c)
		}
	}
	for i, e := range entries {
		if e == nil {
			continue
		}
		place, err := strconv.Atoi(at[i])
		if at[i] == pausePlace && e.Until.After(now) {
			cut = s.pause(e.Until)
		}
		if err != nil || !e.Until.After(s.noted[place]) {
			continue // this process has stored it: memory has the calls
		}
		n := &note{place: place}
		for _, noted := range append(e.With, e.notedCall) {
			// A time further ahead was noted while a clock was wrong, and cannot be compared with what has been stored since.
			if !noted.At.IsZero() && !noted.At.After(now.Add(Window)) {
				s.unsettled[noted.Tenant] = latest(s.unsettled[noted.Tenant], noted.At)
			}
			if !e.Until.After(now) {
				continue
			}
			s.notes[place] = n
			n.counted++
			noted.At = e.Until.Add(-s.timeout - countsFor).Truncate(time.Millisecond)
			frees := bounded(e.Until, Window) // the process that made it has ended by now
			calls = append(calls, &Call{share: s, noted: noted, note: n, foreign: true, frees: frees})
		}
	}
	slices.SortStableFunc(calls, func(a, b *Call) int { return a.frees.Compare(b.frees) })
	for _, c := range calls {
		s.tallies(c, func(t *tally) {
			t.count++
			t.ended = append(t.ended, c)
		})
	}
	s.arrange()
	return cut
}

// Remove deletes what storage holds of the connector's calls, for when the connector is deleted. From then on nothing is
// stored until [Share.Configure] is called; a write that is under way is undone. The calls still count in memory. The
// error is storage's as it is: some entries may be left then, and calls and pauses are stored as before.
func (s *Share) Remove(ctx context.Context) error {
	s.setRemoved(true)
	places, err := s.storage.List(ctx, s.prefix)
	for _, place := range places {
		if err == nil {
			err = s.storage.Delete(ctx, s.prefix+place)
		}
	}
	if err != nil {
		s.setRemoved(false)
	}
	return err
}

func (s *Share) setRemoved(removed bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.removed.Store(removed)
	s.stored = time.Time{}
}
