package backend

import (
	"context"
	"errors"
	"hash/fnv"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/hashicorp/vault/sdk/queue"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/share"
)

const (
	day = 24 * time.Hour

	// An access token is renewed ahead of its end by 2 to 5 % of its life; each tenant has its own part, see ownPart. That leaves time for
	// several tries, and costs few additional exchanges.
	leadLeast, leadMost = 0.02, 0.05

	// plannedRetryLeast is the least time between a failed exchange and the next if exchanges end older access tokens: leases that are
	// given in between end before the next, and must be long enough to be useful.
	plannedRetryLeast = 15 * time.Second

	// hopPatience is how long background work that has begun waits for a further call.
	hopPatience = 30 * time.Second

	// lineAhead is how long before a place is free background work begins to wait for it. If it began when the place is free, a reader who
	// waits already would always get the place.
	lineAhead = time.Second / 2
	// patience is how long a reader waits for a place in the share.
	patience = 5 * time.Second
)

// schedule puts a tenant into the index at its due time. If its entry is not in memory, it is read when the tenant is due. rest
// is a time before which the tenant is not due, if there is one.
func (b *backend) schedule(t *tenant, rest ...time.Time) {
	t.planning.Lock()
	defer t.planning.Unlock()
	v := t.view.Load()
	now := time.Now()
	switch {
	case b.tenants.named(t.name) != t: // the name may be another record's by now
	case v.kept != nil && v.trouble != nil:
		b.index.at(t.name, v.trouble.until)
	case v.kept != nil:
		b.index.at(t.name, now.Add(time.Second))
	case v.entry == nil && v.summary.stored, v.knows == doubted: // storage has to be read first
		b.index.atMost(t.name, now.Add(time.Minute))
	case !v.summary.stored:
		b.index.at(t.name, time.Time{})
	default:
		due := b.due(t, v, now)
		if !due.IsZero() {
			due = latest(due, rest...)
		}
		if v.access == nil || v.access.current() {
			b.index.at(t.name, due)
		} else {
			b.index.atMost(t.name, earliest(due, now.Add(time.Minute))) // storage has to know that the access token is given up
		}
	}
}

// rescheduleTroubled schedules the tenants of a connector again whose last exchange failed.
func (b *backend) rescheduleTroubled(connector string) {
	b.tenants.each(func(t *tenant) {
		if v := t.view.Load(); v.summary.connector == connector && v.trouble != nil {
			b.schedule(t)
		}
	})
}

// due says when a tenant needs attention next without a reader; zero: not before it is written.
func (b *backend) due(t *tenant, v *tenantView, now time.Time) time.Time {
	due := earliest(b.exchangeDue(t, v, now), b.warnDue(t, v, now))
	if !due.IsZero() && b.connectors.present(v.entry.Connector) == nil {
		due = earliest(due, now.Add(time.Minute)) // memory does not have the connector, which is read then and says more
	}
	return due
}

// exchangeDue says when a tenant is next exchanged without a reader; zero: not before it is written.
func (b *backend) exchangeDue(t *tenant, v *tenantView, now time.Time) time.Time {
	e := v.entry
	if !e.Rejected.IsZero() || e.expired(now) {
		return time.Time{}
	}
	var keepAlive time.Duration
	via := b.connectors.present(e.Connector)
	if via != nil {
		keepAlive = via.service.KeepAlive(e.Facts)
	} else if e.Facts.RotatesFrom.IsZero() {
		keepAlive = 30 * day
	}
	due := refreshDue(t.name, e, keepAlive)
	a := v.access
	handedOut := a != nil && a.current()
	switch {
	case handedOut && !a.Planned.IsZero() && a.wanted() && now.Before(a.Expires):
		// The exchange that ends the token comes at its planned time. Where only leases of before a restart may need the token, a new one is
		// not needed before the refresh token is due.
		if a.use.Load() == read || v.trouble != nil && v.trouble.lost {
			return v.bound
		}
		return latest(due, v.bound)
	case v.trouble != nil && via != nil && v.trouble.revision != via.revision:
		return v.trouble.at // the connector has changed since the failure, so there is no backoff
	case v.trouble != nil:
		return v.trouble.until
	case v.summary.owes(via, now):
		return latest(now, v.postponed)
	case handedOut && a.Planned.IsZero():
		renew := a.Expires.Add(-a.margin(e.MinTTL)).Add(-ownPart(t.name, a.life(), leadLeast, leadMost))
		if a.use.Load() == read || now.Before(renew) {
			return earliest(due, renew)
		}
	}
	return due
}

// refreshDue says when a refresh token has to be exchanged for its own sake: in the last tenth of its life, until the service sends one
// with a later end; and as often as the service's keepAlive says. Zero: never.
func refreshDue(name string, e *tenantEntry, keepAlive time.Duration) (due time.Time) {
	now := time.Now()
	if rotates := e.Facts.RotatesFrom; !rotates.IsZero() {
		last := e.Facts.Expires.Sub(rotates) // the last tenth of its life
		switch {
		case now.Before(rotates):
			due = rotates.Add(ownPart(name, last, 0, 0.2))
		case e.LastExchange.Before(rotates):
			due = rotates
		default: // it was exchanged since, and its end is the same
			again := min(max(last/30, time.Second), day)
			if left := e.Facts.Expires.Sub(e.LastExchange); left > time.Hour && !e.Facts.Assumed {
				again = min(again, left/2) // so that another exchange comes before the end
			}
			due = e.LastExchange.Add(again - ownPart(name, again, 0, 0.25))
		}
	}
	if keepAlive > 0 {
		due = earliest(due, latest(e.LastExchange, e.RefreshTokenSet).Add(keepAlive-ownPart(name, keepAlive, 0, 0.2)))
	}
	return due
}

// warnDue says when the log next warns of a tenant's end; zero: no need.
func (b *backend) warnDue(t *tenant, v *tenantView, now time.Time) time.Time {
	if b.danger(t, v, now) == "" {
		return time.Time{}
	}
	// The log had a line about a rejection already.
	return latest(time.Unix(t.warned.Load(), 0), v.entry.Rejected).Add(day)
}

// ownPart is a part of a duration, between two fractions of it, that differs from tenant to tenant and stays the same after a restart:
// tenants that were written together do not come due together.
func ownPart(tenant string, of time.Duration, least, most float64) time.Duration {
	h := fnv.New64a()
	_, _ = h.Write([]byte(tenant))
	fraction := rand.New(rand.NewPCG(h.Sum64(), 0)).Float64()
	return time.Duration(float64(of) * (least + fraction*(most-least)))
}

// tick has a worker hand on the tenants that are due, and returns at once. With nothing due it reads no storage.
func (b *backend) tick() {
	b.goWork(func() {
		// Otherwise after a start the order in which storage gives the tenants would be the order in which they go.
		b.awaitIndex(b.ctx)
		names, connectors := b.index.due(time.Now())
		if len(names) == 0 && len(connectors) == 0 {
			return
		}
		if !b.node.WriteSafeReplicationState() {
			// Another node calls the service. Look again in a minute, when this one may be the one that does.
			for _, name := range names {
				b.index.at(name, time.Now().Add(time.Minute))
			}
			return
		}
		lines := map[string]bool{}
		for _, connector := range connectors {
			lines[connector] = true
		}
		for _, name := range names {
			if t := b.tenants.named(name); t != nil {
				v := t.view.Load()
				if v.kept != nil {
					b.attend(name) // no call is needed
					continue
				}
				b.index.wait(v.summary.connector, name, placeInLine(v.summary, time.Now()), v.trouble != nil)
				lines[v.summary.connector] = true
			}
		}
		for connector := range lines {
			b.goWork(func() { b.serveLine(connector) })
		}
	})
}

// placeInLine is the place of a tenant that is due now: the least goes first. Tenants go by the hour in which the refresh token ends, and within
// an hour by the end itself. An end that is unknown, or more than a day ahead, counts as a day from now when the hour is compared. Without that,
// tenants that are due again and again would always go before one that is due once in a while and ends later or at an unknown time.
func placeInLine(s tenantSummary, now time.Time) int64 {
	end := now.AddDate(1000, 0, 0).Unix()
	if s.expires != 0 {
		end = s.expires
	}
	hour := min(end, now.Add(day).Unix()) / 3600
	return hour<<36 + min(end, 1<<36-1)
}

// serveLine attends to the tenants that are due at a connector, as its share allows, in the order that [line] says.
func (b *backend) serveLine(connector string) {
	if !b.index.serve(connector) {
		return
	}
	for b.ctx.Err() == nil && !b.isStopping() {
		via, err := b.connectors.get(b.ctx, connector)
		if err != nil {
			b.index.pause(connector, time.Now().Add(time.Minute))
			return
		}
		if via != nil {
			free := via.share.FreeAt(share.Want{Class: share.Background})
			if next := latest(free.Add(-lineAhead), via.share.PausedUntil()); next.After(time.Now()) {
				b.index.pause(connector, next)
				return
			}
		}
		name, ok := b.index.next(connector)
		if !ok {
			return
		}
		if via != nil {
			// The tenant's own part of the share may be used up.
			if free := via.share.FreeAt(share.Want{Tenant: name, Class: share.Background}); free.After(time.Now().Add(lineAhead)) {
				b.index.at(name, free)
				continue
			}
		}
		b.attend(name)
	}
}

// attend does what a tenant is due for, if it is still due.
func (b *backend) attend(name string) {
	t := b.tenants.named(name)
	if t == nil || b.ctx.Err() != nil {
		return
	}
	if v := t.view.Load(); v.kept != nil {
		if _, _, err := b.exchanger.start(b.ctx, t, v, want{background: true}); err != nil {
			b.landed(t, err)
		}
		return // the flight's end schedules the tenant
	}
	ctx, cancel := context.WithTimeout(b.ctx, storeWithin)
	defer cancel()
	t, v, err := b.tenants.load(ctx, name)
	switch {
	case err != nil:
		b.index.at(name, time.Now().Add(time.Minute))
		return
	case t == nil:
		return
	}
	if _, err := b.connectors.get(ctx, v.entry.Connector); err != nil {
		b.index.at(name, time.Now().Add(time.Minute))
		return
	}
	if a := v.access; a != nil && !a.current() {
		// Storage does not know yet that the token was given up: the next process would hand it out.
		if _, err := b.tenants.giveUp(ctx, name, a.Generation); err != nil {
			b.index.at(name, time.Now().Add(time.Minute))
			return
		}
		v = t.view.Load()
		if v.entry == nil {
			b.schedule(t)
			return
		}
	}
	now := time.Now()
	if warn := b.warnDue(t, v, now); !warn.IsZero() && !warn.After(now) {
		t.warned.Store(now.Unix())
		b.announce.expiring(t.name, v.entry, b.danger(t, v, now))
	}
	if due := b.exchangeDue(t, v, now); due.IsZero() || due.After(now) {
		b.schedule(t)
		return
	}
	b.exchangeUnasked(t)
}

// exchangeUnasked starts a tenant's exchange without a reader. It waits until the exchange has its place in the share, but not for its end,
// which schedules the tenant.
func (b *backend) exchangeUnasked(t *tenant) {
	v := t.view.Load()
	if v.entry == nil {
		b.schedule(t)
		return
	}
	f, _, err := b.exchanger.start(b.ctx, t, v, want{background: true})
	if err == nil {
		select {
		case <-f.placed:
		case <-f.done:
		case <-b.ctx.Done():
		}
		return
	}
	b.landed(t, err)
}

// landed schedules a tenant after its flight, or after one that could not begin. A flight that the share did not permit needs no backoff:
// serveLine begins the next one when the share permits it.
func (b *backend) landed(t *tenant, err error) {
	if errors.Is(err, logical.ErrReadOnly) {
		b.schedule(t, time.Now().Add(time.Minute)) // no failure to back off from, and no reason to try at once
		return
	}
	b.schedule(t)
}

// index says when each tenant needs attention next without a reader. Tenants that are due wait there, in a line for each connector, for a
// place in the connector's share. A timer serves the index in time. Vault's periodic function serves it too, because the timer ends with its
// process.
type index struct {
	mu      sync.Mutex
	queue   *queue.PriorityQueue // tenants' names by due time, in nanoseconds since 1970
	waiting map[string]*line     // by connector
	waitsAt map[string]string    // the connector in whose line a tenant waits
	timer   *time.Timer
	armed   time.Time // when the timer fires; zero: it does not
	stopped bool
}

// line is the tenants that wait for a place in a connector's share. When calls are scarce, they go by [placeInLine].
// But a tenant that always fails is due again within a minute, and many of them would take all places. So tenants whose last exchange has
// failed get every other place at most while others wait, and half of these places go by who has waited longest: a tenant that has failed
// once is not kept waiting by those that always fail.
type line struct {
	sound   *queue.PriorityQueue // tenants whose last exchange has not failed, by placeInLine
	failed  *queue.PriorityQueue // the others, by the same
	patient *queue.PriorityQueue // those in failed once more, by when they came, in nanoseconds since 1970
	turn    int                  // how many turns the queues have had
	served  bool                 // a goroutine is serving the line
	from    time.Time            // when the line is served next; zero: at once
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
	// Push fails on a name that is empty or in the queue already, which this one is not.
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
		l := x.waiting[connector]
		for _, q := range []*queue.PriorityQueue{l.sound, l.failed, l.patient} {
			_, _ = q.PopByKey(name)
		}
		delete(x.waitsAt, name)
	}
}

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
		case l.served || l.sound.Len()+l.failed.Len() == 0:
		case l.from.After(now):
			x.arm(l.from)
		default:
			connectors = append(connectors, connector)
		}
	}
	return names, connectors
}

// wait puts a tenant that is due into the line of its connector, at a place of [placeInLine]. failed: its last exchange has failed.
func (x *index) wait(connector, name string, place int64, failed bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.takeOut(name)
	l := x.waiting[connector]
	if l == nil {
		l = &line{sound: queue.New(), failed: queue.New(), patient: queue.New()}
		x.waiting[connector] = l
	}
	if failed {
		_ = l.failed.Push(&queue.Item{Key: name, Priority: place})
		_ = l.patient.Push(&queue.Item{Key: name, Priority: time.Now().UnixNano()})
	} else {
		_ = l.sound.Push(&queue.Item{Key: name, Priority: place})
	}
	x.waitsAt[name] = connector
}

// serve claims the line of a connector for the caller. It returns false where there is none, or another goroutine serves it.
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

// next takes the tenant whose turn it is out of the connector's line. If the line is empty, it drops the line and returns false.
func (x *index) next(connector string) (name string, ok bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	l := x.waiting[connector]
	turns := []*queue.PriorityQueue{l.sound, l.failed, l.sound, l.patient}
	for range turns {
		item, err := turns[l.turn%len(turns)].Pop()
		l.turn++
		if err == nil {
			x.takeOut(item.Key)
			return item.Key, true
		}
	}
	delete(x.waiting, connector)
	return "", false
}

// pause ends the serving of a connector's line, which is served again then.
func (x *index) pause(connector string, until time.Time) {
	x.mu.Lock()
	defer x.mu.Unlock()
	l := x.waiting[connector]
	l.served, l.from = false, until
	if !x.stopped {
		x.arm(until)
	}
}

// resume has a connector's line served now, because the connector has been written.
func (x *index) resume(connector string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if l := x.waiting[connector]; l != nil && !x.stopped {
		l.from = time.Time{}
		x.arm(time.Now())
	}
}
