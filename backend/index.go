package backend

import (
	"context"
	"errors"
	"maps"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
)

// storageReaders bounds the storage reads that background work does at once.
const storageReaders = 8

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
		b.node.askTTLs()
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

// indexTenants puts every tenant into the index. A tenant that storage cannot give is left out, so that the others get their place, and is
// read again later: see readUnread. One whose entry cannot be used is named in the log.
func (b *backend) indexTenants() error {
	names, err := b.storage.List(b.ctx, tenantPrefix)
	if err != nil {
		return storageError(err)
	}
	var readers errgroup.Group
	readers.SetLimit(storageReaders)
	var failed atomic.Int64
	for _, name := range names {
		if b.isStopping() {
			break
		}
		readers.Go(func() error {
			err := b.indexTenant(b.ctx, name)
			if err == nil {
				return nil
			}
			b.readLater(name)
			if errors.Is(err, errUnreadable) {
				b.Logger().Error("a tenant is left out", "tenant", name, "error", err)
				return nil
			}
			failed.Add(1)
			return nil
		})
	}
	_ = readers.Wait()
	if failed.Load() == 0 {
		return nil
	}
	b.Logger().Warn("some tenants could not be read yet", "tenants", failed.Load())
	if int(failed.Load()) == len(names) {
		return errStorage // storage fails all reads: the next tick begins again
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
	if due := b.due(t, v, time.Now()); !due.IsZero() && t.view.Load().entry == nil && b.tenants.named(name) == t {
		b.index.atMost(name, due) // a request that has read the tenant meanwhile has planned it too
	}
	t.planning.Unlock()
	if e.Unleased != nil && b.node.WriteSafeReplicationState() {
		return b.tenants.resolveUnleased(ctx, t, e)
	}
	return nil
}

// readLater has a tenant put into the index within a minute.
func (b *backend) readLater(name string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.unread[name]++
}

// readUnread puts those tenants into the index that storage could not give, and those that another node has written.
func (b *backend) readUnread(ctx context.Context) {
	b.mu.Lock()
	unread := maps.Clone(b.unread)
	b.mu.Unlock()
	for name, times := range unread {
		if ctx.Err() != nil {
			return
		}
		if b.indexTenant(ctx, name) == nil {
			b.mu.Lock()
			if b.unread[name] == times { // and was not written again meanwhile
				delete(b.unread, name)
			}
			b.mu.Unlock()
		}
	}
}

// awaitIndex waits a moment for the index if it is being built, and says whether it is complete but for tenants that storage cannot give.
func (b *backend) awaitIndex(ctx context.Context) bool {
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
