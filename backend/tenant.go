package backend

import (
	"context"
	"maps"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/hashicorp/vault/sdk/helper/backoff"
	"github.com/hashicorp/vault/sdk/logical"
)

// tenantPrefix is where storage keeps tenants, each under its name.
const tenantPrefix = "tenants/"

// tenantEntry is all that storage keeps of a tenant, in one entry, so that a
// refresh token and the access token that came with it are stored together or
// not at all. An entry that has been published is never changed, but replaced.
type tenantEntry struct {
	Format    int           `json:"format"`
	Connector string        `json:"connector"`
	TTL       time.Duration `json:"ttl,omitempty"`     // 0: the mount's
	MaxTTL    time.Duration `json:"max_ttl,omitempty"` // 0: the mount's
	MinTTL    time.Duration `json:"min_ttl"`

	RefreshToken       string       `json:"refresh_token"`
	RefreshTokenOrigin string       `json:"refresh_token_origin"` // operator or service
	RefreshTokenSet    time.Time    `json:"refresh_token_set_time"`
	Facts              refreshFacts `json:"facts"`

	// Verified: the service has accepted this refresh token with this connector.
	Verified bool `json:"verified"`
	// Rejected is when the service refused the refresh token; zero: it did not.
	Rejected     time.Time `json:"rejected,omitzero"`
	LastExchange time.Time `json:"last_exchange_time,omitzero"`

	// Move is where the service wants this tenant's exchanges.
	Move *move `json:"move,omitempty"`

	// AccessTokenLife outlasts the access token: it bounds what a reader may ask.
	AccessTokenLife time.Duration `json:"access_token_life,omitempty"`
	Access          *accessEntry  `json:"access,omitempty"`
}

// move holds for as long as the connector has the api_root that it came from.
type move struct {
	From string `json:"from"`
	To   string `json:"to"`
}

type accessEntry struct {
	Token       string    `json:"token"`
	Generation  string    `json:"generation"` // random; leases carry it
	EndpointURL string    `json:"endpoint_url"`
	Scope       string    `json:"scope"`
	Obtained    time.Time `json:"obtained"`
	Expires     time.Time `json:"expires"`
}

func (e *tenantEntry) expired(now time.Time) bool {
	return !e.Facts.Expires.IsZero() && !now.Before(e.Facts.Expires)
}

// tenant is the one owner of a tenant's state. It is small, for there is one
// for each tenant of the mount; what is large hangs off state, and leaves memory
// when it has not been used for long.
type tenant struct {
	name string

	// state is what readers see; nil: storage has to be read.
	state atomic.Pointer[tenantState]
	// trouble is why the last exchange failed; nil: it did not.
	trouble atomic.Pointer[trouble]
	// used: somebody has read the current access token.
	used atomic.Bool

	// doubted: storage may have something else, after a write that failed. Readers
	// of a usable token go on; whoever needs more reads storage again.
	doubted atomic.Bool

	// writing is the right to change the tenant's entry in storage, and is held
	// for as long as that takes. Readers of a usable token never wait for it. It
	// is there while somebody holds it or waits: of an idle tenant's memory it
	// would be a quarter.
	writing chan struct{}

	// mu guards writing, and what follows, and is never held while something is
	// waited for.
	mu      sync.Mutex
	writers int32 // who hold writing or wait for it
	flight  *flight
	epoch   uint64 // counts operators' writes of refresh_token and connector, and deletes
	version uint64 // counts what makes a load in progress out of date
	stored  bool   // storage has the tenant
	removed bool   // the registry has dropped this record
	// unsaved is what the service has sent and storage has not taken yet.
	unsaved *tenantEntry
	// fresh is the last access token that this process has obtained: the count
	// of its leases begins at a known zero.
	fresh *accessToken
	// pending is the connector of a write that is being verified.
	pending string
	retry   *backoff.Backoff
	warned  int64 // in seconds since 1970, when the log last warned of the refresh token's end
	summary tenantSummary
}

// tenantSummary is what LIST and the renewer know without reading storage.
type tenantSummary struct {
	connector string
	expires   int64 // of the refresh token, in seconds since 1970; 0: unknown
	rejected  bool
	verified  bool
}

// tenantState is what readers see of a tenant: an entry, and its access token
// unless that was given up.
type tenantState struct {
	entry  *tenantEntry
	access *accessToken
}

// trouble is a failed exchange.
type trouble struct {
	err      error
	text     string // safe to show
	at       time.Time
	until    time.Time // no exchange before
	revision uint64    // of the connector's configuration; another one ends the trouble's backoff
}

// accessToken is an access token in memory, with the parts of its responses and
// the count of its live leases.
type accessToken struct {
	*accessEntry
	// shown is what responses are made of, strings all: to make an interface
	// value of each anew would be half of what a read allocates.
	shown struct{ token, endpointURL, scope, expires, obtained, tenant, generation any }
	// leases is the number of live leases, or one of the two states below.
	leases atomic.Int64
}

const (
	leasesUnknown = -1 // the count cannot be trusted: one early revocation is enough
	givenUp       = -2 // never to be handed out again
)

// lease counts a lease that is about to be issued, unless the token was given up.
func (a *accessToken) lease() bool {
	for {
		n := a.leases.Load()
		switch {
		case n == givenUp:
			return false
		case n == leasesUnknown || a.leases.CompareAndSwap(n, n+1):
			return true
		}
	}
}

// current says whether the token may be handed out without a lease.
func (a *accessToken) current() bool { return a.leases.Load() != givenUp }

// doubt makes the count unknown.
func (a *accessToken) doubt() {
	for {
		n := a.leases.Load()
		if n < 0 || a.leases.CompareAndSwap(n, leasesUnknown) {
			return
		}
	}
}

// end takes a lease off the count and says whether the token is given up now, or
// was before: that is so once the last lease has ended before its time.
func (a *accessToken) end(early bool) bool {
	for {
		n := a.leases.Load()
		next := max(n-1, 0)
		switch {
		case n == givenUp:
			return true
		case n == leasesUnknown && !early:
			return false
		case early && (n == leasesUnknown || next == 0):
			next = givenUp
		}
		if a.leases.CompareAndSwap(n, next) {
			return next == givenUp
		}
	}
}

// life is how long the token lived when it was obtained, by Vault's clock.
func (a *accessEntry) life() time.Duration { return a.Expires.Sub(a.Obtained) }

// usableUntil is when the token stops being handed out to readers who want
// minTTL of life left, or what the tenant asks for where that is more.
func (e *tenantEntry) usableUntil(minTTL time.Duration) time.Time {
	return e.Access.Expires.Add(-max(min(e.MinTTL, e.Access.life()/2), minTTL))
}

// usable returns the access token if it may be handed out now.
func (s *tenantState) usable(now time.Time, minTTL time.Duration) *accessToken {
	if s.access == nil || !s.access.current() || now.After(s.entry.usableUntil(minTTL)) {
		return nil
	}
	return s.access
}

// lock takes the right to change the tenant's entry in storage.
func (t *tenant) lock(ctx context.Context) error {
	t.mu.Lock()
	if t.writing == nil {
		t.writing = make(chan struct{}, 1)
	}
	writing := t.writing
	t.writers++
	t.mu.Unlock()
	select {
	case writing <- struct{}{}:
		return nil
	case <-ctx.Done():
		t.mu.Lock()
		defer t.mu.Unlock()
		t.leaveWriting()
		return ctx.Err()
	}
}

func (t *tenant) unlock() {
	t.mu.Lock()
	defer t.mu.Unlock()
	<-t.writing
	t.leaveWriting()
}

func (t *tenant) leaveWriting() {
	if t.writers--; t.writers == 0 {
		t.writing = nil
	}
}

// base is the entry that the next change is made to: what the service has sent,
// stored or not. It is nil where there is no tenant, or none in memory.
func (t *tenant) base() *tenantEntry {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.latest()
}

// latest is base, for who holds mu.
func (t *tenant) latest() *tenantEntry {
	if t.unsaved != nil {
		return t.unsaved
	}
	if s := t.state.Load(); s != nil {
		return s.entry
	}
	return nil
}

// tenants owns every tenant of the mount.
type tenants struct {
	storage logical.Storage
	loaded  *lru.Cache[string, *tenant] // those whose state is in memory
	changed func(*tenant, *tenantEntry)

	mu     sync.RWMutex
	byName map[string]*tenant
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

// record returns the tenant's record, made where there is none. Whoever finds
// that storage has no such tenant drops it again.
func (ts *tenants) record(name string) *tenant {
	if t := ts.named(name); t != nil {
		return t
	}
	ts.mu.Lock()
	defer ts.mu.Unlock()
	t := ts.byName[name]
	if t == nil {
		t = &tenant{name: name}
		ts.byName[name] = t
	}
	return t
}

// drop removes the record of a tenant that neither storage nor a flight has.
func (ts *tenants) drop(t *tenant) {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.stored && t.flight == nil && t.unsaved == nil && !t.removed {
		t.removed = true
		delete(ts.byName, t.name)
	}
}

// cached returns a tenant whose state is in memory, without waiting for anybody.
func (ts *tenants) cached(name string) (*tenant, *tenantState) {
	t, ok := ts.loaded.Get(name)
	if !ok {
		if t = ts.named(name); t == nil {
			return nil, nil
		}
		if t.state.Load() != nil {
			ts.loaded.Add(name, t) // it was busy when its turn came to leave memory
		}
	}
	return t, t.state.Load()
}

// load returns a tenant and its state, from storage where memory has it not. The
// tenant is nil where there is none.
func (ts *tenants) load(ctx context.Context, name string) (t *tenant, s *tenantState, err error) {
	if t, s := ts.cached(name); s != nil && !t.doubted.Load() {
		return t, s, nil
	}
	err = ts.with(ctx, name, func(found *tenant, base *tenantEntry) error {
		switch s = found.state.Load(); {
		case s != nil:
			t = found
		case base != nil:
			return keptTrouble(name) // a new tenant that storage has not taken yet
		}
		return nil
	})
	return t, s, err
}

// with calls f with the right to change a tenant's entry, once that is in
// memory. The entry is nil where there is no such tenant.
func (ts *tenants) with(ctx context.Context, name string, f func(t *tenant, base *tenantEntry) error) error {
	return ts.locked(ctx, name, func(t *tenant) error {
		if err := ts.read(ctx, t); err != nil {
			return err
		}
		return f(t, t.base())
	})
}

// locked calls f with the right to change a tenant's entry in storage.
func (ts *tenants) locked(ctx context.Context, name string, f func(t *tenant) error) error {
	for {
		t := ts.record(name)
		if err := t.lock(ctx); err != nil {
			return err
		}
		t.mu.Lock()
		removed := t.removed
		t.mu.Unlock()
		if removed {
			t.unlock()
			continue
		}
		err := f(t)
		t.unlock()
		ts.drop(t)
		return err
	}
}

// read loads a tenant's state into memory. The caller holds its lock.
func (ts *tenants) read(ctx context.Context, t *tenant) error {
	for t.state.Load() == nil || t.doubted.Load() {
		t.mu.Lock()
		version := t.version
		t.mu.Unlock()
		entry, err := getEntry[tenantEntry](ctx, ts.storage, tenantPrefix+t.name)
		if err != nil {
			return err
		}
		t.mu.Lock()
		fresh := t.version == version
		if fresh {
			t.stored = entry != nil
			t.doubted.Store(false)
		}
		if fresh && entry == nil {
			t.state.Store(nil)
		}
		t.mu.Unlock()
		switch {
		case fresh && entry == nil:
			return nil
		case fresh:
			ts.publish(t, entry)
		}
	}
	return nil
}

// index notes what the index needs of a tenant, without taking its tokens into
// memory.
func (ts *tenants) index(ctx context.Context, name string) error {
	return ts.locked(ctx, name, func(t *tenant) error {
		if t.state.Load() != nil {
			return nil
		}
		entry, err := getEntry[tenantEntry](ctx, ts.storage, tenantPrefix+name)
		if err != nil || entry == nil {
			return err
		}
		t.mu.Lock()
		t.stored, t.summary = true, summarize(entry)
		t.mu.Unlock()
		ts.changed(t, entry)
		return nil
	})
}

// save stores an entry and lets readers see it. The caller holds the tenant's
// lock. What is not stored is not seen.
func (ts *tenants) save(ctx context.Context, t *tenant, next *tenantEntry) error {
	if err := ts.put(ctx, t, next); err != nil {
		return err
	}
	t.mu.Lock()
	t.unsaved, t.stored = nil, true
	t.mu.Unlock()
	ts.publish(t, next)
	return nil
}

// saveDetached saves whatever becomes of the caller: a write that was cut off
// would leave memory and storage in doubt about one another.
func (ts *tenants) saveDetached(ctx context.Context, t *tenant, next *tenantEntry) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), storeWithin)
	defer cancel()
	return ts.save(ctx, t, next)
}

func (ts *tenants) put(ctx context.Context, t *tenant, e *tenantEntry) error {
	return putEntry(ctx, ts.storage, tenantPrefix+t.name, e)
}

// publish lets readers see an entry. An access token that they have seen before
// keeps its count of leases; one that comes from storage has none to be trusted.
func (ts *tenants) publish(t *tenant, e *tenantEntry) {
	next := &tenantState{entry: e}
	if e.Access != nil {
		next.access = t.known(e.Access.Generation)
		if next.access == nil {
			next.access = newAccessToken(t.name, e.Access)
			next.access.leases.Store(leasesUnknown)
		}
	}
	ts.show(t, next)
}

// known returns the access token of that generation if memory has it.
func (t *tenant) known(generation string) *accessToken {
	t.mu.Lock()
	defer t.mu.Unlock()
	if s := t.state.Load(); s != nil && s.access != nil && s.access.Generation == generation {
		return s.access
	}
	if t.fresh != nil && t.fresh.Generation == generation {
		return t.fresh
	}
	return nil
}

func newAccessToken(tenant string, e *accessEntry) *accessToken {
	a := &accessToken{accessEntry: e}
	a.shown.token, a.shown.endpointURL, a.shown.scope = e.Token, e.EndpointURL, e.Scope
	a.shown.expires, a.shown.obtained = stamp(e.Expires), stamp(e.Obtained)
	a.shown.tenant, a.shown.generation = tenant, e.Generation
	return a
}

func (ts *tenants) show(t *tenant, s *tenantState) {
	t.mu.Lock()
	t.state.Store(s)
	t.summary = summarize(s.entry)
	t.mu.Unlock()
	ts.loaded.Add(t.name, t)
	ts.changed(t, s.entry)
}

func summarize(e *tenantEntry) tenantSummary {
	s := tenantSummary{connector: e.Connector, rejected: !e.Rejected.IsZero(), verified: e.Verified}
	if !e.Facts.Expires.IsZero() {
		s.expires = e.Facts.Expires.Unix()
	}
	return s
}

// forget lets a tenant's state leave memory, and with it the count of leases. It
// stays while somebody works on it, or while it holds what storage has not.
func (t *tenant) forget() {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.state.Load()
	givenUp := s != nil && s.access != nil && !s.access.current() // and storage may not know it yet
	if t.flight == nil && t.unsaved == nil && len(t.writing) == 0 && !givenUp {
		t.fresh = nil
		t.state.Store(nil)
	}
}

// invalidate drops what another node has changed.
func (ts *tenants) invalidate(name string) {
	t := ts.named(name)
	if t == nil {
		return
	}
	t.mu.Lock()
	t.version++
	t.state.Store(nil)
	t.mu.Unlock()
	ts.loaded.Remove(name)
}

// backOff says how long a tenant rests after another failure: seconds at first,
// a minute at most, with jitter.
func (t *tenant) backOff() time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.retry == nil {
		t.retry = backoff.NewBackoff(math.MaxInt, time.Second, window)
	}
	d, _ := t.retry.Next()
	return d
}

// recovered ends a tenant's trouble.
func (t *tenant) recovered() {
	t.mu.Lock()
	t.retry = nil
	t.mu.Unlock()
	t.trouble.Store(nil)
}
