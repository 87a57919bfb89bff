package backend

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/hashicorp/vault/sdk/queue"
	"golang.org/x/sync/errgroup"
)

// storageReaders bounds the storage reads that background work does at once.
const storageReaders = 8

// index is one index, by due time, of all tenants: when each needs attention next without a reader. Those that are due wait
// there for a place in their connector's share, the one whose refresh token ends first at the head. A timer runs ahead of
// Vault's periodic function, which also comes where the timer has died with its process.
type index struct {
	mu      sync.Mutex
	queue   *queue.PriorityQueue // tenants' names by due time, in nanoseconds since 1970
	waiting map[string]*line     // by connector
	waitsAt map[string]string    // the connector in whose line a tenant waits
	timer   *time.Timer
	armed   time.Time // when the timer fires; zero: it does not
	stopped bool
}

// line is the tenants that wait for a place in a connector's share.
type line struct {
	queue  *queue.PriorityQueue // by the end of the refresh token, in seconds since 1970
	served bool                 // a goroutine serves the line
	from   time.Time            // when the line is served next; zero: at once
}

func (x *index) init(tick func()) {
	x.queue, x.waiting, x.waitsAt = queue.New(), map[string]*line{}, map[string]string{}
	x.timer = time.AfterFunc(time.Hour, tick)
	x.timer.Stop()
}

// at makes a tenant due at that time alone; the zero time makes it never due.
func (x *index) at(name string, due time.Time) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.takeOut(name)
	if due.IsZero() || x.stopped {
		return
	}
	// Push fails on a name that is empty or there already.
	_ = x.queue.Push(&queue.Item{Key: name, Priority: due.UnixNano()})
	x.arm(due)
}

// atMost makes a tenant due at that time, unless it is due before.
func (x *index) atMost(name string, due time.Time) {
	x.mu.Lock()
	item, _ := x.queue.PopByKey(name)
	_, waits := x.waitsAt[name]
	if item != nil {
		due = earliest(due, time.Unix(0, item.Priority))
	}
	x.mu.Unlock()
	if !waits {
		x.at(name, due)
	}
}

func (x *index) takeOut(name string) {
	_, _ = x.queue.PopByKey(name)
	if connector, ok := x.waitsAt[name]; ok {
		_, _ = x.waiting[connector].queue.PopByKey(name)
		delete(x.waitsAt, name)
	}
}

func (x *index) remove(name string) { x.at(name, time.Time{}) }

// arm makes the timer fire then, unless it fires before.
func (x *index) arm(due time.Time) {
	if x.armed.IsZero() || due.Before(x.armed) {
		x.armed = due
		x.timer.Reset(max(time.Until(due), time.Millisecond))
	}
}

func (x *index) stop() {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.stopped = true
	x.timer.Stop()
}

// due takes the tenants that are due off the index, and returns the connectors whose line is to be served.
func (x *index) due(now time.Time) (names, connectors []string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.armed = time.Time{}
	for !x.stopped {
		item, err := x.queue.Pop()
		if err != nil {
			break // empty
		}
		if item.Priority > now.UnixNano() {
			_ = x.queue.Push(item)
			x.arm(time.Unix(0, item.Priority))
			break
		}
		names = append(names, item.Key)
	}
	for connector, l := range x.waiting {
		switch {
		case l.served || l.queue.Len() == 0:
		case l.from.After(now):
			x.arm(l.from)
		default:
			connectors = append(connectors, connector)
		}
	}
	return names, connectors
}

// wait puts a tenant that is due into the line of its connector.
func (x *index) wait(connector, name string, end int64) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.takeOut(name)
	l := x.waiting[connector]
	if l == nil {
		l = &line{queue: queue.New()}
		x.waiting[connector] = l
	}
	_ = l.queue.Push(&queue.Item{Key: name, Priority: end})
	x.waitsAt[name] = connector
}

// serve claims the line of a connector. It fails where another goroutine has it.
func (x *index) serve(connector string) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	l := x.waiting[connector]
	if l == nil || l.served {
		return false
	}
	l.served, l.from = true, time.Time{}
	return true
}

// next takes the tenant out of the connector's line whose refresh token ends first. Where there is none it lets go of the
// line.
func (x *index) next(connector string) (name string, ok bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	l := x.waiting[connector]
	item, err := l.queue.Pop()
	if err != nil {
		delete(x.waiting, connector)
		return "", false
	}
	delete(x.waitsAt, item.Key)
	return item.Key, true
}

// pause lets go of a connector's line until then.
func (x *index) pause(connector string, until time.Time) {
	x.mu.Lock()
	defer x.mu.Unlock()
	l := x.waiting[connector]
	l.served, l.from = false, until
	if !x.stopped {
		x.arm(until)
	}
}

// resume has a connector's line served now: the connector has been written.
func (x *index) resume(connector string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if l := x.waiting[connector]; l != nil && !x.stopped {
		l.from = time.Time{}
		x.arm(time.Now())
	}
}

// buildIndex reads all tenants into the index, in the background, unless that has been done or is being done.
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
		err := b.revocations.load(b.ctx)
		if err == nil {
			err = b.indexTenants() // which finds the access tokens that were being given up
		}
		if err == nil {
			b.revocations.tick()
		}
		b.attendGrants()
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

// indexTenants puts every tenant into the index. One that storage cannot give is left out and named in the log: it costs
// neither the others their place nor each tick another try of all. A request for it reads it again.
func (b *backend) indexTenants() error {
	names, err := b.storage.List(b.ctx, tenantPrefix)
	if err != nil {
		return storageError(err)
	}
	var readers errgroup.Group
	readers.SetLimit(storageReaders)
	var mu sync.Mutex
	unread := map[string]bool{}
	failed := 0
	for _, name := range names {
		if b.isStopping() {
			break
		}
		readers.Go(func() error {
			err := b.indexTenant(b.ctx, name)
			if err == nil {
				return nil
			}
			mu.Lock()
			defer mu.Unlock()
			unread[name] = true
			if errors.Is(err, errUnreadable) {
				b.Logger().Error("a tenant is left out", "tenant", name, "error", err)
				return nil
			}
			failed++
			return nil
		})
	}
	_ = readers.Wait()
	b.mu.Lock()
	b.unread = unread
	b.mu.Unlock()
	if failed == 0 {
		return nil
	}
	b.Logger().Warn("some tenants could not be read yet", "tenants", failed)
	if failed == len(names) {
		return errStorage // storage gives nothing: the next tick begins anew
	}
	return nil
}

// indexTenant puts one tenant into the index.
func (b *backend) indexTenant(ctx context.Context, name string) error {
	e, err := b.tenants.index(ctx, name)
	if err != nil || e == nil {
		return err
	}
	t := b.tenants.named(name)
	if t == nil {
		return nil
	}
	v := &tenantView{tenantMemory: &tenantMemory{trouble: t.view.Load().trouble}}
	v.show(e, nil)
	if e.Access != nil {
		v.access = newAccessToken(name, e.Access)
		v.access.leases.Store(leasesUnknown)
	}
	v.derive()
	t.planning.Lock()
	if due := b.due(t, v, time.Now()); !due.IsZero() && t.view.Load().entry == nil && !t.isDropped() {
		b.index.atMost(name, due) // whoever has read the tenant meanwhile has planned it too
	}
	t.planning.Unlock()
	if b.node.WriteSafeReplicationState() {
		return b.tenants.resolveUnleased(ctx, t, e)
	}
	return nil
}

// readUnread tries again to put those tenants into the index that storage could not give.
func (b *backend) readUnread() {
	b.mu.Lock()
	var names []string
	for name := range b.unread {
		names = append(names, name)
	}
	b.mu.Unlock()
	for _, name := range names {
		err := b.indexTenant(b.ctx, name)
		if err != nil && !errors.Is(err, errUnreadable) {
			return
		}
		if err == nil {
			b.mu.Lock()
			delete(b.unread, name)
			b.mu.Unlock()
		}
	}
}

// awaitIndex waits a moment for the index, and says whether it is complete but for tenants that storage cannot give.
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
