package backend

import (
	"context"
	"errors"
	"hash/fnv"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/hashicorp/vault/sdk/queue"
	"golang.org/x/sync/errgroup"
)

const (
	// unknownLife is how often a refresh token is exchanged at the least whose
	// end is unknown: an exchange is how a new one comes.
	unknownLife = 30 * 24 * time.Hour

	// storageReaders bounds the storage reads that background work does at once.
	storageReaders = 8

	day = 24 * time.Hour
)

// renewer is one index, by due time, of all tenants: when each is next to be
// exchanged, or warned about, without a reader. A timer runs ahead of Vault's
// periodic function, which also comes where the timer has died with its process.
type renewer struct {
	queue *queue.PriorityQueue // tenants' names by due time, in nanoseconds since 1970

	mu      sync.Mutex
	timer   *time.Timer
	armed   time.Time // when the timer fires; zero: it does not
	stopped bool
}

func (r *renewer) init(tick func()) {
	r.queue = queue.New()
	r.timer = time.AfterFunc(time.Hour, tick)
	r.timer.Stop()
}

// at makes a tenant due at that time alone; the zero time makes it never due.
func (r *renewer) at(name string, due time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	_, _ = r.queue.PopByKey(name)
	if due.IsZero() || r.stopped {
		return
	}
	// Push fails on a name that is empty or there already.
	_ = r.queue.Push(&queue.Item{Key: name, Priority: due.UnixNano()})
	r.arm(due)
}

// arm makes the timer fire then, unless it fires before.
func (r *renewer) arm(due time.Time) {
	if r.armed.IsZero() || due.Before(r.armed) {
		r.armed = due
		r.timer.Reset(max(time.Until(due), time.Millisecond))
	}
}

func (r *renewer) remove(name string) { r.at(name, time.Time{}) }

func (r *renewer) stop() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.stopped = true
	r.timer.Stop()
}

// due takes the tenants that are due off the index.
func (r *renewer) due(now time.Time) (names []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.armed = time.Time{}
	for !r.stopped {
		item, err := r.queue.Pop()
		if err != nil {
			break // empty
		}
		if item.Priority > now.UnixNano() {
			_ = r.queue.Push(item)
			r.arm(time.Unix(0, item.Priority))
			break
		}
		names = append(names, item.Key)
	}
	return names
}

// schedule puts a tenant where its entry says it belongs.
func (b *backend) schedule(t *tenant, e *tenantEntry) {
	now := time.Now()
	due := t.exchangeDue(e, now)
	if warn := t.warnDue(e, now); due.IsZero() || !warn.IsZero() && warn.Before(due) {
		due = warn
	}
	b.renewer.at(t.name, due)
}

// exchangeDue says when a tenant is next exchanged without a reader; zero: not
// before somebody writes it.
func (t *tenant) exchangeDue(e *tenantEntry, now time.Time) time.Time {
	if !e.Rejected.IsZero() || e.expired(now) {
		return time.Time{}
	}
	spread := t.spread()
	var due time.Time
	switch rotates := e.Facts.RotatesFrom; {
	case rotates.IsZero():
		due = latest(e.LastExchange, e.RefreshTokenSet).Add(unknownLife - part(unknownLife/5, spread))
	case now.Before(rotates):
		due = rotates.Add(part(e.Facts.Expires.Sub(rotates)/5, spread))
	case e.LastExchange.Before(rotates):
		due = rotates
	default: // it was exchanged, and no new one came
		again := min(max(e.Facts.Expires.Sub(rotates)/30, time.Second), day)
		due = e.LastExchange.Add(again - part(again/4, spread))
	}
	if a := e.Access; a != nil {
		// Ahead of the end, by more than what a few failures take, and little
		// enough for about one exchange a day.
		renew := e.usableUntil(0).Add(-part(a.life(), 0.02+0.03*spread))
		if (t.used.Load() || now.Before(renew)) && renew.Before(due) {
			due = renew
		}
	}
	if trouble := t.trouble.Load(); trouble != nil {
		due = trouble.until
	}
	return due
}

// warnDue says when the log next warns of a tenant's end; zero: no need.
func (t *tenant) warnDue(e *tenantEntry, now time.Time) time.Time {
	if t.danger(e, now) == "" {
		return time.Time{}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	// A rejection has had a line of its own.
	return latest(time.Unix(t.warned, 0), e.Rejected).Add(day)
}

// spread is the tenant's own fraction of 1: it keeps tenants that were written
// together from coming due together, and stays the same after a restart.
func (t *tenant) spread() float64 {
	h := fnv.New64a()
	_, _ = h.Write([]byte(t.name))
	return rand.New(rand.NewPCG(h.Sum64(), 0)).Float64()
}

func part(d time.Duration, fraction float64) time.Duration {
	return time.Duration(float64(d) * fraction)
}

// tick hands the tenants that are due to workers, and returns at once. With
// nothing due it reads no storage.
func (b *backend) tick() {
	names := b.renewer.due(time.Now())
	if len(names) == 0 {
		return
	}
	b.goWork(func() {
		if !b.node.WriteSafeReplicationState() {
			// Another node calls Kaizala; look again when this one may have become it.
			for _, name := range names {
				b.renewer.at(name, time.Now().Add(window))
			}
			return
		}
		var workers errgroup.Group
		workers.SetLimit(storageReaders)
		for _, name := range names {
			workers.Go(func() error {
				b.attend(name)
				return nil
			})
		}
		_ = workers.Wait()
	})
}

// attend does what a tenant is due for, if it still is.
func (b *backend) attend(name string) {
	t := b.tenants.named(name)
	if t == nil || b.ctx.Err() != nil {
		return
	}
	t.mu.Lock()
	summary, unsaved := t.summary, t.unsaved != nil
	if unsaved && t.flight == nil {
		_, _ = b.launch(t, func() error { return b.saveUnsaved(t) })
	}
	t.mu.Unlock()
	if unsaved {
		return // the flight's end puts the tenant back into the index
	}
	via, err := b.connectors.get(b.ctx, summary.connector)
	if err != nil {
		b.later(name, time.Now().Add(window))
		return
	}
	if via != nil && !summary.rejected {
		// Without a place in the share there is no need to read storage.
		if until := via.share.backgroundFrom(name, via.entry.ExchangesPerMinute); until.After(time.Now()) {
			b.later(name, until)
			return
		}
	}
	ctx, cancel := context.WithTimeout(b.ctx, storeWithin)
	defer cancel()
	t, s, err := b.tenants.load(ctx, name)
	if err != nil {
		b.later(name, time.Now().Add(window))
		return
	}
	if t == nil {
		return
	}
	now := time.Now()
	if warn := t.warnDue(s.entry, now); !warn.IsZero() && !warn.After(now) {
		t.mu.Lock()
		t.warned = now.Unix()
		t.mu.Unlock()
		b.announce(ctx, t, s.entry, eventExpiring)
	}
	if due := t.exchangeDue(s.entry, now); due.IsZero() || due.After(now) {
		b.schedule(t, s.entry)
		return
	}
	b.exchangeUnasked(ctx, t, s, via)
}

// later puts a tenant off, to a place of its own in the seconds after until.
func (b *backend) later(name string, until time.Time) {
	b.renewer.at(name, until.Add(rand.N(window/4)))
}

// exchangeUnasked starts a tenant's exchange without a reader. It does not wait
// for it: the flight's end puts the tenant back into the index.
func (b *backend) exchangeUnasked(ctx context.Context, t *tenant, s *tenantState, via *loadedConnector) {
	a := attempt{t: t, entry: s.entry, via: via}
	err := unknownConnector(s.entry.Connector)
	if via != nil {
		err = b.launchUnasked(ctx, a, s)
	}
	limit := (*limitError)(nil)
	switch {
	case err == nil:
	case errors.As(err, &limit):
		b.later(t.name, limit.until)
	case errors.Is(err, errSuperseded):
		b.schedule(t, s.entry)
	default:
		_ = b.fail(a, err)
		b.schedule(t, s.entry)
	}
}

// launchUnasked launches an attempt that has a place in the share, unless the
// state has changed since it was read.
func (b *backend) launchUnasked(ctx context.Context, a attempt, s *tenantState) error {
	t := a.t
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case t.flight != nil:
		return nil
	case t.unsaved != nil || t.state.Load() != s:
		return errSuperseded
	}
	permitted, err := a.via.permit(ctx, t.name, 0, true)
	if err != nil {
		return err
	}
	a.permitted, a.epoch = permitted, t.epoch
	_, err = b.launch(t, func() error { return b.exchange(b.ctx, a) })
	return err
}

// buildIndex reads all tenants into the index, in the background, unless that
// has been done or is being done.
func (b *backend) buildIndex() {
	b.mu.Lock()
	started := b.indexing != nil
	if !started {
		b.indexing = make(chan struct{})
	}
	complete := b.indexing
	b.mu.Unlock()
	if started {
		return
	}
	b.goWork(func() {
		b.askTTLs()
		err := b.indexTenants()
		b.mu.Lock()
		b.indexed = err == nil
		if err != nil {
			b.indexing = nil // the next tick tries again
		}
		b.mu.Unlock()
		close(complete)
		if err != nil {
			b.Logger().Warn("the index of tenants could not be built yet, and will be tried again", "error", err)
		}
	})
}

func (b *backend) indexTenants() error {
	names, err := b.storage.List(b.ctx, tenantPrefix)
	if err != nil {
		return err
	}
	var readers errgroup.Group
	readers.SetLimit(storageReaders)
	for _, name := range names {
		if b.isStopping() {
			break
		}
		readers.Go(func() error {
			err := b.tenants.index(b.ctx, name)
			if errors.Is(err, errUnreadable) {
				b.Logger().Error("a tenant is left out", "tenant", name, "error", err)
				err = nil
			}
			return err
		})
	}
	return readers.Wait()
}

// awaitIndex waits a moment for the index and says whether it is complete.
func (b *backend) awaitIndex(ctx context.Context) bool {
	b.buildIndex()
	b.mu.Lock()
	complete := b.indexing
	b.mu.Unlock()
	if complete != nil {
		ctx, cancel := context.WithTimeout(ctx, patience)
		defer cancel()
		select {
		case <-complete:
		case <-ctx.Done():
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.indexed
}
