package backend

import (
	"context"
	"errors"
	"maps"
	"slices"
	"sync"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/tokenservice"
)

const (
	// tenantPrefix is where storage keeps tenants, each under its name.
	tenantPrefix = "tenants/"

	// tenantsInMemory bounds the tenants whose tokens are held in memory.
	tenantsInMemory = 10_000
)

// tenants is all tenants of the mount: their records, which of them are in memory, and what storage has of them.
type tenants struct {
	storage     logical.Storage
	connectors  *connectors
	revocations *revocations
	announce    *announcer
	// schedule puts a tenant where the index of due times has to have it.
	schedule func(t *tenant, rest ...time.Time)

	loaded *lru.Cache[string, *tenant] // those whose entry is in memory
	mu     sync.RWMutex
	byName map[string]*tenant
}

func newTenants() (*tenants, error) {
	ts := &tenants{byName: map[string]*tenant{}}
	var err error
	ts.loaded, err = lru.NewWithEvict(tenantsInMemory, func(_ string, t *tenant) { t.forget() })
	return ts, err
}

// each calls f for every tenant in the registry.
func (ts *tenants) each(f func(*tenant)) {
	ts.mu.RLock()
	all := slices.Collect(maps.Values(ts.byName))
	ts.mu.RUnlock()
	for _, t := range all {
		f(t)
	}
}

func (ts *tenants) named(name string) *tenant {
	ts.mu.RLock()
	defer ts.mu.RUnlock()
	return ts.byName[name]
}

// record returns the tenant's record, made where there is none. The registry has it until the caller calls release, at the least.
func (ts *tenants) record(name string) *tenant {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	t := ts.byName[name]
	if t == nil {
		t = newTenant(name)
		ts.byName[name] = t
	}
	t.users.Add(1)
	return t
}

// release takes a user off the tenant's record. It drops the record if that was the last and storage has no such tenant, as far as is known.
func (ts *tenants) release(t *tenant) {
	t.planning.Lock()
	defer t.planning.Unlock()
	ts.mu.Lock()
	defer ts.mu.Unlock()
	if v := t.view.Load(); t.users.Add(-1) == 0 && !v.summary.stored && v.kept == nil && v.knows != doubted {
		delete(ts.byName, t.name)
	}
}

// cached returns a tenant and what memory has of its entry, without waiting. The view is nil where memory has none.
func (ts *tenants) cached(name string) (*tenant, *tenantView) {
	t, ok := ts.loaded.Get(name)
	if !ok {
		if t = ts.named(name); t == nil {
			return nil, nil
		}
	}
	v := t.view.Load()
	if v.entry == nil {
		return t, nil
	}
	if !ok {
		ts.loaded.Add(name, t) // it was busy when its turn came to leave memory
	}
	return t, v
}

// load returns a tenant and its view, from storage where memory has it not or doubts it: nil and noSuchTenant where there is no such tenant.
func (ts *tenants) load(ctx context.Context, name string) (t *tenant, v *tenantView, err error) {
	if t, v := ts.cached(name); v != nil && v.knows == loaded {
		return t, v, nil
	}
	v = noSuchTenant
	err = ts.locked(ctx, name, func(record *tenant) error {
		now, err := ts.read(ctx, record)
		switch {
		case err != nil:
			return err
		case now.knows == loaded:
			t, v = record, now
		case now.kept != nil:
			return keptTrouble(name) // a new tenant that storage has not taken yet
		}
		return nil
	})
	return t, v, err
}

// loadCreated is load for a reader: where the service is still being asked about the refresh token of a write that creates the tenant,
// it waits for the end of that.
func (ts *tenants) loadCreated(ctx context.Context, name string) (*tenant, *tenantView, error) {
	for {
		t, v, err := ts.load(ctx, name)
		if t != nil || err != nil {
			return t, v, err
		}
		f := (*flight)(nil)
		if t := ts.named(name); t != nil {
			f = t.flight.Load()
		}
		if f == nil || f.want.change == nil || f.outlived.Load() {
			return nil, v, nil
		}
		select {
		case <-f.done:
		case <-ctx.Done():
			return nil, nil, tryAgain("tenant %q is being created: its service has not answered yet; try again in a minute", name)
		}
	}
}

// locked calls f with the right to change a tenant in storage.
func (ts *tenants) locked(ctx context.Context, name string, f func(*tenant) error) error {
	t := ts.record(name)
	defer ts.release(t)
	if err := t.storing.acquire(ctx); err != nil {
		return err
	}
	defer t.storing.release()
	return f(t)
}

// read makes sure that memory knows what storage has of a tenant. The caller holds its lock.
func (ts *tenants) read(ctx context.Context, t *tenant) (*tenantView, error) {
	for {
		before := t.view.Load()
		if before.knows == loaded || before.knows == absent {
			return before, nil
		}
		e, err := getEntry[tenantEntry](ctx, ts.storage, tenantPrefix+t.name)
		if err != nil {
			return nil, err
		}
		givenUp, fixed := false, false
		if e != nil {
			if givenUp, fixed, err = ts.recover(ctx, t, e); err != nil {
				return nil, err
			}
		}
		if fixed && ts.revocations.node.WriteSafeReplicationState() {
			_ = putEntry(ctx, ts.storage, tenantPrefix+t.name, e) // memory goes by it even where that fails
		}
		if t.found(before, e, givenUp) && e != nil {
			ts.loaded.Add(t.name, t)
			ts.schedule(t)
		}
	}
}

// recover makes an entry of storage fit for memory. It corrects times that lie in the future, because the host's clock was wrong when they
// were written; it plans the end of the access token by the connector as it is now; and it notes an exchange whose answer the process
// before this one may not have had. givenUp says that the access token is about to be revoked: readers do not get it, and its revocation
// takes it out of the entry. fixed says that storage has to have what became of the access token: leases are given until its planned end,
// so a later write of the connector must not make it earlier, also after a restart; and a life that was corrected must not begin anew each
// time that the tenant is read. The caller holds the tenant's lock.
func (ts *tenants) recover(ctx context.Context, t *tenant, e *tenantEntry) (givenUp, fixed bool, err error) {
	changed := latest(e.LastExchange, e.RefreshTokenSet, e.Rejected) // not corrected: the share's notes have the same clock
	now := time.Now().UTC()
	for _, at := range []*time.Time{&e.RefreshTokenSet, &e.LastExchange, &e.Rejected} {
		if at.After(now) {
			*at = now.Truncate(time.Millisecond)
		}
	}
	via, _ := ts.connectors.get(ctx, e.Connector) // without the notes of its calls where storage cannot give them
	if a := e.Access; a != nil {
		was := *a
		correctLife(&a.Obtained, &a.Expires)
		if a.Planned.After(a.Expires) {
			a.Planned = a.Expires
		}
		plan(t.name, e, via)
		fixed = was.Planned.IsZero() && !a.Planned.IsZero() || !was.Obtained.Equal(a.Obtained)
		if givenUp, err = ts.revocations.isGivenUp(ctx, e.Connector, a.Generation); err != nil {
			return false, false, err
		}
	}
	if via == nil || !via.about.RetryLost || !ts.revocations.node.WriteSafeReplicationState() {
		return givenUp, fixed, nil
	}
	if at := via.share.Unsettled(t.name); at.After(changed) {
		t.cutOff(via)
	} else if e.Access != nil && !e.Access.Planned.IsZero() {
		// An exchange has failed just before that process ended, and leases may have been given until its next try, a minute later at most.
		t.postpone(via.share.Recalled(t.name, changed))
	}
	return givenUp, fixed, nil
}

// plan sets when the exchange is planned that ends an entry's access token, if exchanges do that by the tenant's connector as it is now,
// nil where it cannot be had. No reader has seen the entry yet.
func plan(name string, e *tenantEntry, via *loadedConnector) {
	switch a := e.Access; {
	case via == nil:
	case !via.about.ExchangeInvalidates:
		a.Planned = time.Time{}
	case a.Planned.IsZero():
		a.Planned = plannedExchange(name, e, via.service.KeepAlive(e.Facts))
	}
}

// index reads a tenant for the index of due times, and takes nothing but its summary into memory.
func (ts *tenants) index(ctx context.Context, name string) (*tenantEntry, error) {
	var e *tenantEntry
	err := ts.locked(ctx, name, func(t *tenant) (err error) {
		v := t.view.Load()
		if v.knows != unknown {
			e = v.entry // a request has read the tenant
			return nil
		}
		if e, err = getEntry[tenantEntry](ctx, ts.storage, tenantPrefix+name); err != nil {
			return err
		}
		if e == nil {
			t.found(v, nil, false) // another node has deleted it
			return nil
		}
		if _, _, err := ts.recover(ctx, t, e); err != nil {
			return err
		}
		t.summarized(e)
		return nil
	})
	return e, err
}

// change stores an operator's write on top of what storage has by then. It runs to its end when the caller goes away: a
// write that is cut off would leave memory and storage in doubt about one another.
func (ts *tenants) change(ctx context.Context, name string, c *tenantChange) error {
	return ts.locked(ctx, name, func(t *tenant) error {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), storeWithin)
		defer cancel()
		v, err := ts.read(ctx, t)
		if err != nil {
			return err
		}
		if v.kept != nil {
			// The write is merged with what the service has sent: a rotated refresh token is not lost to a change of ttl.
			err := ts.store(ctx, t, v.kept)
			if err != nil && !errors.Is(err, errSuperseded) && c.refreshToken == nil {
				return err
			}
			if v, err = ts.read(ctx, t); err != nil {
				return err
			}
		}
		switch {
		case c.grant != nil && v.storedLineage() != c.grant.from:
			return errSuperseded
		case v.entry == nil && c.patch:
			return notFound("there is no tenant %q to patch", name)
		case v.entry == nil && c.refreshToken == nil:
			return badValue("there is no tenant %q yet: refresh_token is required, the refresh token that the service has issued", name)
		}
		next := c.apply(v.entry)
		switch {
		case c.target != "" && next.Connector != c.target:
			return errSuperseded
		case c.again != c.repeats(v.entry), c.retiresTokens() && c.refreshToken == nil && next.RefreshToken != c.checked:
			return errSuperseded // the service has replaced it since
		}
		if err := ts.validate(ctx, next); err != nil {
			return err
		}
		if c.retiresTokens() {
			err := ts.revokeAllLater(ctx, t, v.entry, v.kept)
			if err == nil && c.refreshToken != nil {
				err = ts.revocations.spare(ctx, *c.refreshToken)
			}
			if err != nil {
				ts.withdraw(ctx, t, v)
				return err
			}
		}
		if err := putEntry(ctx, ts.storage, tenantPrefix+t.name, next); err != nil {
			if c.retiresTokens() {
				ts.withdraw(ctx, t, v)
			}
			ts.doubt(t)
			return err
		}
		t.stored(next, nil, v.kept)
		ts.loaded.Add(t.name, t)
		ts.schedule(t)
		return nil
	})
}

// remove deletes a tenant. Nothing of it needs to be readable, and an exchange under way finds that it is superseded.
func (ts *tenants) remove(ctx context.Context, name string) error {
	err := ts.locked(ctx, name, func(t *tenant) error {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), storeWithin)
		defer cancel()
		v := t.view.Load()
		if v.knows != loaded && ts.revocations.mayRevoke(v.summary) {
			switch read, err := ts.read(ctx, t); {
			case err == nil:
				v = read
			case !errors.Is(err, errUnreadable):
				return err
			}
		}
		var i *intent
		newest := v.newest()
		err := ts.revokeAllLater(ctx, t, v.entry, v.kept)
		if err == nil && newest != nil {
			i, err = ts.revocations.revokeRefreshTokenLater(ctx, newest.Connector, name, v.storedLineage(), newest.RefreshToken, newest.Facts)
		}
		if err != nil {
			ts.withdraw(ctx, t, v)
			return err
		}
		if err := ts.storage.Delete(ctx, tenantPrefix+name); err != nil {
			ts.withdraw(ctx, t, v)
			ts.doubt(t)
			lineage := v.storedLineage()
			ts.revocations.take(i, func(ctx context.Context) (bool, error) {
				t, v, err := ts.load(ctx, name) // which fails while memory keeps tokens of a new tenant
				if t == nil {
					return true, ignoreUnusable(err)
				}
				// A tenant that has moved to another connector since goes on with its refresh token, or with the one that has replaced it.
				e := v.entry
				return e.Lineage != lineage && e.RefreshToken != newest.RefreshToken && e.RefreshTokenOrigin == originOperator, nil
			})
			return err
		}
		ts.revocations.take(i, nil)
		t.deleted(v.kept)
		ts.schedule(t)
		return nil
	})
	if err == nil {
		ts.loaded.Remove(name)
	}
	return err
}

// doubt records that storage has reported an error for a write or a delete, and may have carried it out. The tenant is due within a
// minute: if its access token was given up, storage must not keep it, because the next process would hand it out.
func (ts *tenants) doubt(t *tenant) {
	t.doubt()
	ts.schedule(t)
}

// withdraw makes sure that no reader gets an access token that may be revoked by now, after the write or delete that gives it up has
// failed. Storage may still have the token.
func (ts *tenants) withdraw(ctx context.Context, t *tenant, v *tenantView) {
	if v.access != nil && ts.revokesAccess(ctx, v.entry.Connector) {
		t.withhold(v.access.Generation)
		ts.doubt(t)
	}
}

// withdrawEnded makes sure that no reader gets the tenant's access token if a verification has ended it at the service. The write that was
// verified is not stored.
func (ts *tenants) withdrawEnded(t *tenant, o *outcome) {
	v := t.view.Load()
	if a := v.access; a != nil && !a.Planned.IsZero() && o.access != nil && v.entry != nil && v.entry.RefreshToken == o.sent {
		t.withhold(a.Generation)
		ts.doubt(t)
	}
}

// revokeAllLater notes a tenant's access tokens for revocation when the tenant is rewritten or deleted: also older ones that have leases, but
// not those of one lease alone that have records of their own.
func (ts *tenants) revokeAllLater(ctx context.Context, t *tenant, e *tenantEntry, kept *outcome) error {
	if kept != nil && kept.access != nil {
		if ts.revokesAccess(ctx, kept.connector) {
			kept.access.leases.Store(givenUp) // if the write or delete fails, what is kept is stored without its access token
		}
		if err := ts.revocations.revokeLater(ctx, kept.connector, t.name, kept.access.accessEntry); err != nil {
			return err
		}
	}
	if e == nil {
		return nil
	}
	if e.Access != nil {
		if err := ts.revocations.revokeLater(ctx, e.Connector, t.name, e.Access); err != nil {
			return err
		}
	}
	if ts.revocations.mayRevoke(t.view.Load().summary) {
		if err := ts.revocations.revokeReplacedLater(ctx, t.name); err != nil {
			return err
		}
	}
	if e.Unleased == nil {
		return nil
	}
	return ts.resolveUnleased(ctx, t, e)
}

// giveUp makes sure that an access token is never handed out again, not after a restart either, and notes it for
// revocation where the service can revoke it. It returns the connector that the token came from, "" where the tenant
// has no such token.
func (ts *tenants) giveUp(ctx context.Context, name, generation string) (connector string, err error) {
	err = ts.locked(ctx, name, func(t *tenant) error {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), storeWithin)
		defer cancel()
		v, err := ts.read(ctx, t)
		if err == nil && v.kept != nil && v.kept.isIn(v.entry) && v.entry.Access.Generation == generation {
			// Another node has handed the token out. Without this, it would be stored again with what is kept.
			if err = ts.store(ctx, t, v.kept); err == nil {
				v, err = ts.read(ctx, t)
			}
		}
		if err != nil {
			return err
		}
		if v.entry == nil || v.entry.Access == nil || v.entry.Access.Generation != generation {
			return nil
		}
		next := *v.entry
		next.Access = nil
		err = ts.revocations.revokeLater(ctx, v.entry.Connector, name, v.entry.Access) // which has read the connector
		if via := ts.connectors.present(next.Connector); via != nil && via.about.Revocation == tokenservice.RevokeByExchange {
			next.EndsBy = v.entry.Access.Expires
		}
		if err == nil {
			err = putEntry(ctx, ts.storage, tenantPrefix+t.name, &next)
		}
		if err != nil {
			ts.doubt(t)
			return err
		}
		connector = next.Connector
		t.stored(&next, nil, nil) // what is kept stays so
		ts.loaded.Add(t.name, t)
		ts.schedule(t)
		return nil
	})
	return connector, err
}

// lockAndStore stores what an exchange has brought, on top of what storage has by then. If that succeeds, it calls issue before another
// request can change the tenant. It runs to its end when the caller goes away.
func (ts *tenants) lockAndStore(ctx context.Context, t *tenant, o *outcome, issue func()) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), storeWithin)
	defer cancel()
	if err := t.storing.acquire(ctx); err != nil {
		return ts.unstored(t, o, nil, nil)
	}
	defer t.storing.release()
	if err := ts.store(ctx, t, o); err != nil {
		return err
	}
	issue()
	return nil
}

// store is lockAndStore for a caller who holds the tenant's lock. Its error is errSuperseded if an operator has written or deleted the
// tenant since the exchange began, and a 400 if the write that the exchange verifies does not fit what was written since.
func (ts *tenants) store(ctx context.Context, t *tenant, o *outcome) error {
	v, err := ts.read(ctx, t)
	if err != nil {
		return ts.unstored(t, o, nil, nil)
	}
	superseded := v.supersedes(o)
	if superseded && !o.rotates(v.entry) {
		if v.kept == o {
			t.dropKept()
		}
		f := t.flight.Load()
		ts.abandon(ctx, t, o, v.entry == nil || f != nil && f.outlived.Load())
		return errSuperseded
	}
	if superseded {
		// The operator's write left the refresh token as it was, and the service has replaced that: the new one is stored.
		ts.abandon(ctx, t, o, false)
		o = o.rotationAlone(v.entry)
	}
	current := v.access != nil && v.access.current()
	kept := v.kept == o
	next := o.onto(v.entry)
	if o.change != nil {
		if o, next, err = ts.checkAgain(ctx, t, o, v.entry, next); err != nil {
			return err
		}
	}
	ended := o.access != nil && !o.access.current() // given up by a write or a delete that has failed
	switch {
	case ended:
		next.Access, next.Unleased = nil, nil
	case o.access != nil && !o.ownToken:
		via, _ := ts.connectors.get(ctx, next.Connector) // without the notes of its calls where storage cannot give them
		plan(t.name, next, via)
	}
	err = ts.replace(ctx, t, o, v, kept)
	if c := o.change; err == nil && c != nil && c.refreshToken != nil {
		err = ts.revocations.spare(ctx, *c.refreshToken)
	}
	if err == nil {
		err = putEntry(ctx, ts.storage, tenantPrefix+t.name, next)
	}
	if err != nil {
		if o.retires {
			ts.withdraw(ctx, t, v)
		}
		return ts.unstored(t, o, next, v.kept)
	}
	switch {
	case ended:
	case o.isIn(v.entry) && v.entry.Access.Generation != o.access.Generation:
		o.access.leases.Store(leasesUnknown) // the service has sent the same token again: there may be leases on it
	case o.access != nil && !o.retires && !o.ownToken && current && !v.access.leases.CompareAndSwap(0, givenUp):
		// A replaced token without leases gets none any more. One with leases may have got its first since replace looked.
		_ = ts.revocations.hold(ctx, v.entry.Connector, t.name, v.access.accessEntry, false)
	}
	ts.publish(t, o, next, v.kept)
	if o.ownToken && o.access != nil && kept && !ended {
		// The reader whose lease it was for does not wait any more. Where storage fails, the next exchange finds it in the entry.
		_ = ts.revocations.revokeLater(ctx, o.connector, t.name, o.access.accessEntry)
	}
	if superseded {
		return errSuperseded
	}
	return nil
}

// publish shows readers, the index and the log what storage has taken of an exchange. kept is as [tenant.stored] has it.
func (ts *tenants) publish(t *tenant, o *outcome, next *tenantEntry, kept *outcome) {
	recovered := t.stored(next, o, kept)
	ts.loaded.Add(t.name, t)
	if o.refreshToken != "" {
		ts.announce.rotated(t.name, next)
	}
	if o.rejected {
		ts.announce.rejected(t.name, next)
	}
	if recovered {
		ts.announce.recovered(t.name, next.Connector)
	}
	ts.schedule(t)
}

// checkAgain checks a write whose verification has ended once more: what it was checked with may have been written since. next is the
// tenant's entry with the write. If it does not fit any more, checkAgain leaves out the write's settings where new tokens have come,
// which are stored in any case, and returns a 400 where none have.
func (ts *tenants) checkAgain(ctx context.Context, t *tenant, o *outcome, base, next *tenantEntry) (*outcome, *tenantEntry, error) {
	err := ts.validate(ctx, next)
	switch {
	case !isBadValue(err):
		return o, next, nil
	case o.isWritersAlone():
		ts.abandon(ctx, t, o, false)
		ts.withdrawEnded(t, o)
		return nil, nil, err
	}
	alone := *o
	alone.change = o.change.tokensAlone()
	next = alone.onto(base)
	next.TokenPerLease = next.TokenPerLease && !isBadValue(ts.validate(ctx, next))
	return &alone, next, nil
}

// replace notes for revocation the access tokens that a new one retires. One that is only replaced, has leases and can be revoked at the
// service is recorded under heldPrefix until its last lease ends.
func (ts *tenants) replace(ctx context.Context, t *tenant, o *outcome, v *tenantView, kept bool) error {
	switch old := v.access; {
	case o.isIn(v.entry):
		return nil
	case o.change != nil && kept:
		return ts.revokeAllLater(ctx, t, v.entry, nil)
	case o.change != nil:
		return ts.revokeAllLater(ctx, t, v.entry, v.kept)
	case o.access == nil || old == nil || o.ownToken:
		return nil
	case o.retires || !old.current(): // storage may not know yet that the old one is given up
		return ts.revocations.revokeLater(ctx, v.entry.Connector, t.name, old.accessEntry)
	case old.leased():
		return ts.revocations.hold(ctx, v.entry.Connector, t.name, old.accessEntry, false)
	}
	return nil
}

// unstored records that storage has not taken the result of an exchange. next is what was to be stored, nil where storage could
// not be read before. kept is what memory kept when the caller read the tenant: see [tenant.stored].
func (ts *tenants) unstored(t *tenant, o *outcome, next *tenantEntry, kept *outcome) error {
	switch {
	case o.isWritersAlone():
		t.doubt()
		ts.withdrawEnded(t, o)
		ts.revokeUnstored(t.name, o)
		return storageTrouble(t.name, errStorage) // the writer still has what he wrote
	case o.precious():
		t.keep(o)
		if o.refreshToken != "" || o.granted() {
			ts.revocations.disarm(o.sent) // a revocation of the token that was sent or granted would end the grant
		}
		return keptTrouble(t.name)
	case next != nil:
		// A rejection or a move. Memory goes by it although storage may not have it: the next process asks the service again.
		t.stored(next, nil, kept)
	}
	return nil
}

// revokeUnstored has the access token of a verification revoked, because storage has reported an error for it. If storage has the token
// nevertheless, it is not revoked.
func (ts *tenants) revokeUnstored(name string, o *outcome) {
	via := ts.connectors.present(o.connector)
	if o.access == nil || via == nil || via.about.Revocation != tokenservice.RevokeAccessToken {
		return
	}
	ts.revocations.remember(o.connector, name, o.access.accessEntry, func(ctx context.Context) (bool, error) {
		e, err := getEntry[tenantEntry](ctx, ts.storage, tenantPrefix+name)
		return e == nil || e.Access == nil || e.Access.Generation != o.access.Generation, ignoreUnusable(err)
	})
}

// abandon gives up the tokens that an exchange has brought, because it is superseded or its write is refused: the access token, and the
// refresh token if the tenant was deleted.
func (ts *tenants) abandon(ctx context.Context, t *tenant, o *outcome, deleted bool) {
	// Where storage fails here, the tokens live to their end.
	if o.access != nil {
		_ = ts.revocations.revokeLater(ctx, o.connector, t.name, o.access.accessEntry)
	}
	if deleted && o.refreshToken != "" {
		ts.revocations.abandonRefreshToken(ctx, o.connector, t.name, o.refreshToken, o.facts)
	}
}

// invalidate drops what another node has changed.
func (ts *tenants) invalidate(name string) {
	if t := ts.named(name); t != nil {
		t.invalidate()
		ts.loaded.Remove(name)
		ts.schedule(t)
	}
}

// connectorChanged schedules the tenants of a connector that has been written. anew says that the ends of their access tokens are to be
// planned again, too. A tenant that is being read or stored, perhaps with this connector as its new one, follows afterwards.
func (ts *tenants) connectorChanged(connector string, anew bool) {
	ts.each(func(t *tenant) {
		busy, v := t.storing.busy(), t.view.Load() // in this order: what ends in between is in the view
		if v.summary.connector != connector && !(busy && t.uses(connector)) {
			return
		}
		again := func() {
			_ = ts.locked(ts.revocations.ctx, t.name, func(t *tenant) error {
				t.replan(false)
				ts.schedule(t)
				return nil
			})
		}
		switch {
		case !anew, v.access == nil && !busy:
			ts.schedule(t)
		case busy:
			t.replan(true) // no reader gets a lease by the connector as it was
			ts.revocations.work(again)
		default:
			again()
		}
	})
}

// plannedExchange is when the exchange that ends an entry's access token is planned (SERVICES.md, section 3): in time to
// hand out another one that has min_ttl left, and no later than the refresh token asks for an exchange.
func plannedExchange(name string, e *tenantEntry, keepAlive time.Duration) time.Time {
	a := e.Access
	x := a.Expires.Add(-a.margin(e.MinTTL)).Add(-ownPart(name, a.life(), leadLeast, leadMost))
	if r := refreshDue(name, e, keepAlive); !r.IsZero() && r.After(a.Obtained) {
		x = earliest(x, r)
	}
	return x.UTC().Truncate(time.Millisecond)
}

// revokesAccess says whether access tokens of a connector are revoked at its service.
func (ts *tenants) revokesAccess(ctx context.Context, connector string) bool {
	via, err := ts.connectors.get(ctx, connector)
	return err == nil && via != nil && via.about.Revocation == tokenservice.RevokeAccessToken
}
