package share

import (
	"context"
	"errors"
	"maps"
	"slices"
	"strconv"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"golang.org/x/sync/errgroup"
)

// Storage keeps under callPrefix, for each connector, the calls that count, each under its place, and under pausePlace
// the pause. Nothing there is a secret. Version 0.1.0 reads and writes the same.
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

	// longestPause bounds a pause. What lies further ahead was asked for, or stored, under a wrong clock.
	longestPause = 24 * time.Hour
)

// ErrRemoved is the error of a call or pause that cannot be stored because [Share.Remove] has been called.
var ErrRemoved = errors.New("the connector has been deleted")

// entry is a call, stored before it is made, or a pause.
type entry struct {
	Format int `json:"format"`
	// Tenant is whose fifth a call counts against.
	Tenant string `json:"tenant,omitempty"`
	// Housekeeping says that a call counts against that class's fifth.
	Housekeeping bool `json:"housekeeping,omitempty"`
	// At is when a call that begins the exchange of a tenant's stored refresh token was noted; zero where no process after this
	// one has to ask what became of it: see [Share.Unsettled].
	At time.Time `json:"at,omitzero"`
	// Until is from when on the entry does not count, at the latest; At still does.
	Until time.Time `json:"until"`
}

// Note stores the call before it is made, so that the process after this one counts it. The write takes 30 seconds at
// most. Where it fails, the call must not be made; Note cancels it, which may take as long again, and the error is storage's as
// it is, the context's, or [ErrRemoved].
func (c *Call) Note(ctx context.Context) error {
	s := c.share
	s.mu.Lock()
	e := entry{Tenant: c.tenant, Housekeeping: c.housekeeping, Until: time.Now().UTC().Add(s.timeout + Window)}
	if c.tenant != "" && !c.unstored {
		e.At = time.Now().UTC().Truncate(time.Millisecond)
	}
	s.noted[c.place] = e.Until
	s.mu.Unlock()
	err := s.put(ctx, strconv.Itoa(c.place), e)
	if err != nil {
		c.Cancel(ctx) // storage may have the entry though it says otherwise
	}
	return err
}

// Cancel is Withdraw for a call that was noted, and is not made after all: the process after this one need not ask what became of
// it. Where storage does not take that, within 30 seconds and whether or not the context has ended, that process asks.
func (c *Call) Cancel(ctx context.Context) {
	c.noteAnswered(context.WithoutCancel(ctx))
	c.Withdraw()
}

// Settle says that the exchange which the call began was answered, and that its answer has changed nothing: the process after
// this one need not ask what became of it. Where storage does not take that, that process asks.
func (c *Call) Settle(ctx context.Context) {
	c.share.mu.Lock()
	present := c.frees.After(time.Now()) // its place is still its own
	c.share.mu.Unlock()
	if present {
		c.noteAnswered(ctx)
	}
}

// noteAnswered stores the call without the time that has the process after this one ask what became of it.
func (c *Call) noteAnswered(ctx context.Context) {
	if c.tenant == "" || c.unstored {
		return // it was noted without that
	}
	s := c.share
	s.mu.Lock()
	e := entry{Tenant: c.tenant, Housekeeping: c.housekeeping, Until: s.noted[c.place]}
	s.mu.Unlock()
	_ = s.put(ctx, strconv.Itoa(c.place), e)
}

// Unsettled returns, once, when a process before this one has noted an exchange of the tenant whose answer it may not have
// had; zero where there is none. [Share.Load] comes before it.
func (s *Share) Unsettled(tenant string) time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	at := s.unsettled[tenant]
	delete(s.unsettled, tenant)
	return at
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
// [ErrRemoved]; the pause holds in this process even so.
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
	if !s.removed {
		s.stored = longest
	}
	return nil
}

// pause permits no call before that time, or for a day. It says whether that is less.
func (s *Share) pause(until time.Time) (cut bool) {
	end := bounded(until, longestPause)
	s.paused = latest(s.paused, end)
	return end.Before(until)
}

// bounded returns a time that is no further ahead than it could be. It passes as the process's own clock does, whatever
// becomes of the host's.
func bounded(t time.Time, ahead time.Duration) time.Time {
	now := time.Now()
	return now.Add(min(t.Sub(now), ahead))
}

// put stores an entry, unless the connector is removed before that has been done.
func (s *Share) put(ctx context.Context, place string, e entry) error {
	if s.isRemoved() {
		return ErrRemoved
	}
	e.Format = entryFormat
	raw, err := logical.StorageEntryJSON(s.prefix+place, e)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, storeWithin)
	defer cancel()
	err = s.storage.Put(ctx, raw)
	if s.isRemoved() { // also where the write has failed: it may have arrived
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), storeWithin)
		defer cancel()
		return errors.Join(ErrRemoved, s.storage.Delete(ctx, raw.Key))
	}
	return err
}

func (s *Share) isRemoved() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.removed
}

// Load counts the calls of the process before this one, and goes on with its pause. Storage is read once for all who ask;
// each waits no longer than its own context allows. The error is storage's as it is, or the context's; the next who asks
// tries again. An entry that cannot be decoded is left out.
func (s *Share) Load(ctx context.Context) error {
	for !s.isLoaded() {
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
	return nil
}

func (s *Share) isLoaded() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.loaded
}

// Invalidate says that another node has changed what storage holds: the next [Share.Load] reads it again.
func (s *Share) Invalidate() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.loaded = false
	s.version++
}

func (s *Share) read(ctx context.Context) error {
	s.mu.Lock()
	version := s.version
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
	s.loaded = s.version == version
	s.mu.Unlock()
	if cut {
		// Otherwise each restart would begin the day anew. A node that may not write goes on without.
		_ = s.StorePause(ctx)
	}
	return nil
}

// recall counts what storage holds at each place; nil stands for nothing. It says whether the pause lay too far ahead.
func (s *Share) recall(at []string, entries []*entry) (cut bool) {
	now := time.Now()
	var calls []*Call
	for _, c := range s.all.ended {
		if c.foreign {
			s.places.give(c.place)
		} else {
			calls = append(calls, c)
		}
	}
	for i, e := range entries {
		if e == nil {
			continue
		}
		// What lies further ahead was noted under a wrong clock, and cannot be compared with what has been stored since.
		passed := !e.At.IsZero() && !e.At.After(now.Add(Window))
		if place, err := strconv.Atoi(at[i]); err == nil && passed && e.Until.After(s.noted[place]) {
			s.unsettled[e.Tenant] = latest(s.unsettled[e.Tenant], e.At)
		}
		if !e.Until.After(now) {
			continue
		}
		if at[i] == pausePlace {
			cut = s.pause(e.Until)
			continue
		}
		place, err := strconv.Atoi(at[i])
		if err != nil || !e.Until.After(s.noted[place]) {
			continue // what this process has stored, it knows better
		}
		s.places.taken[place] = true
		calls = append(calls, &Call{
			share: s, tenant: e.Tenant, housekeeping: e.Housekeeping, place: place, foreign: true,
			frees: bounded(e.Until, Window), // who made it has ended by now
		})
	}
	slices.SortStableFunc(calls, func(a, b *Call) int { return a.frees.Compare(b.frees) })
	s.all.ended, s.housekeeping.ended = nil, nil
	for _, t := range s.tenants {
		t.ended = nil
	}
	for _, c := range calls {
		s.tallies(c, func(t *tally) { t.ended = append(t.ended, c) })
	}
	maps.DeleteFunc(s.tenants, func(_ string, t *tally) bool { return t.count() == 0 })
	s.arrange()
	return cut
}

// Remove deletes what storage holds of the connector's calls, for when the connector is deleted. From then on nothing is
// stored until [Share.Configure] is called; a write that is under way is undone. The calls still count in memory. The
// error is storage's as it is: some entries may be left then, and calls and pauses are stored as before.
func (s *Share) Remove(ctx context.Context) error {
	s.setRemoved(true)
	err := s.deleteAll(ctx)
	if err != nil {
		s.setRemoved(false)
	}
	return err
}

func (s *Share) setRemoved(removed bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.removed, s.stored = removed, time.Time{}
}

func (s *Share) deleteAll(ctx context.Context) error {
	places, err := s.storage.List(ctx, s.prefix)
	if err != nil {
		return err
	}
	for _, place := range places {
		if err := s.storage.Delete(ctx, s.prefix+place); err != nil {
			return err
		}
	}
	return nil
}
