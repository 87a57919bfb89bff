package backend

import (
	"context"
	"slices"
	"sync"
	"time"
)

const (
	// window is the time over which Kaizala counts calls (doc).
	window = time.Minute

	// patience is how long a reader waits for a place in the share.
	patience = 5 * time.Second
)

// share is a connector's part of Kaizala's limit: no window sees more calls
// than its limit, and no tenant takes more than a fifth of it. A call counts
// from its permission until a window after its end, because the service may have
// counted it at any moment in between. A token bucket would let twice the limit
// through in some windows. What counts is in storage, too, under the call's
// place, for the process that comes after this one.
type share struct {
	mu      sync.Mutex
	calls   []*call
	waiting []*call   // readers, first come first served
	paused  time.Time // Kaizala wants no call before this
}

type call struct {
	tenant string
	place  int       // no other call that counts has it
	ended  time.Time // zero while it runs
}

// limitError says when a call would be permitted.
type limitError struct {
	until time.Time
	// byService tells Kaizala's own limit from the share.
	byService bool
}

func (e *limitError) Error() string {
	return "too many calls; the next is permitted at " + e.until.UTC().Format(time.RFC3339)
}

// take permits one call of a tenant, waiting for it up to wait. The caller says
// when the call has ended. Background work leaves a fifth of the share to
// readers and gives way to those who wait. Its error is a *limitError, at once
// where the wait would be too long, or the context's.
func (s *share) take(ctx context.Context, tenant string, limit int, wait time.Duration, background bool) (_ *call, err error) {
	deadline := time.Now().Add(wait)
	c := &call{tenant: tenant}
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		now := time.Now()
		ahead := slices.Index(s.waiting, c)
		if ahead < 0 {
			ahead = len(s.waiting)
		}
		until := s.freeAt(now, tenant, limit, ahead, background)
		if !until.After(now) || until.After(deadline) {
			s.waiting = slices.DeleteFunc(s.waiting, func(w *call) bool { return w == c })
			if until.After(deadline) {
				return nil, &limitError{until: until, byService: until.Equal(s.paused)}
			}
			c.place = s.freePlace()
			s.calls = append(s.calls, c)
			return c, nil
		}
		if ahead == len(s.waiting) {
			s.waiting = append(s.waiting, c)
		}
		s.mu.Unlock()
		timer := time.NewTimer(until.Sub(now))
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			err = ctx.Err()
		}
		s.mu.Lock()
		if err != nil {
			s.waiting = slices.DeleteFunc(s.waiting, func(w *call) bool { return w == c })
			return nil, err
		}
	}
}

// backgroundFrom says when background work of a tenant would be permitted.
func (s *share) backgroundFrom(tenant string, limit int) time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.freeAt(time.Now(), tenant, limit, len(s.waiting), true)
}

// freeAt says when the next call of this tenant is permitted behind so many
// others that wait, as far as is known now.
func (s *share) freeAt(now time.Time, tenant string, limit, ahead int, background bool) time.Time {
	s.calls = slices.DeleteFunc(s.calls, func(c *call) bool {
		return !c.ended.IsZero() && !c.ended.Add(window).After(now)
	})
	perTenant := max(1, limit/5)
	if background {
		limit -= limit / 5
	}
	var all, own []time.Time // when each counted call stops counting
	for _, c := range s.calls {
		free := now.Add(window)
		if !c.ended.IsZero() {
			free = c.ended.Add(window)
		}
		all = append(all, free)
		if c.tenant == tenant {
			own = append(own, free)
		}
	}
	until := latest(s.paused, kth(all, len(all)+ahead-limit), kth(own, len(own)-perTenant))
	if background && ahead > 0 {
		until = latest(until, now.Add(patience))
	}
	return until
}

// kth returns the k-th time, counted from 0, that must pass before there is
// room; the zero time where k is negative.
func kth(times []time.Time, k int) time.Time {
	if k < 0 || len(times) == 0 {
		return time.Time{}
	}
	slices.SortFunc(times, time.Time.Compare)
	return times[min(k, len(times)-1)]
}

func latest(times ...time.Time) time.Time { return slices.MaxFunc(times, time.Time.Compare) }

func (s *share) end(c *call) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c.ended.IsZero() {
		c.ended = time.Now()
	}
}

// withdraw gives back the place of a call that was never made.
func (s *share) withdraw(c *call) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls = slices.DeleteFunc(s.calls, func(other *call) bool { return other == c })
}

// freePlace is the least place that no call has.
func (s *share) freePlace() int {
	taken := make([]bool, len(s.calls)+1)
	for _, c := range s.calls {
		if c.place < len(taken) {
			taken[c.place] = true
		}
	}
	return slices.Index(taken, false)
}

// remember counts a call that a process before this one made, until that time,
// unless it is counted already.
func (s *share) remember(tenant string, place int, until time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !slices.ContainsFunc(s.calls, func(c *call) bool { return c.place == place }) {
		s.calls = append(s.calls, &call{tenant: tenant, place: place, ended: until.Add(-window)})
	}
}

// pause permits no call before that time, and returns when the pause ends.
func (s *share) pause(until time.Time) time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.paused = latest(s.paused, until)
	return s.paused
}

// pausedUntil returns the end of Kaizala's own pause, or a time that has passed.
func (s *share) pausedUntil() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.paused
}
