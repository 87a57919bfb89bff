package backend

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/vault/sdk/helper/backoff"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/tokenservice"
)

// tenantEntry is all that storage keeps of a tenant, in one entry, so that a refresh token and the access token that
// came with it are stored together or not at all. An entry that has been published is never changed, but replaced.
type tenantEntry struct {
	Format int `json:"format"`
	// Lineage is random. An operator's write of refresh_token or connector gives the tenant a new one, and exchanges keep it: the result of
	// an exchange is superseded if storage has another lineage by then. It is empty in entries of version 0.1.0.
	Lineage string `json:"lineage,omitempty"`

	Connector     string        `json:"connector"`
	TTL           time.Duration `json:"ttl,omitempty"`     // 0: the mount's
	MaxTTL        time.Duration `json:"max_ttl,omitempty"` // 0: the mount's
	MinTTL        time.Duration `json:"min_ttl"`
	KeepOnRevoke  bool          `json:"keep_on_revoke,omitempty"` // retire_on_revoke is false
	TokenPerLease bool          `json:"token_per_lease,omitempty"`

	RefreshToken       string    `json:"refresh_token"`
	RefreshTokenOrigin string    `json:"refresh_token_origin"` // operator or service
	RefreshTokenSet    time.Time `json:"refresh_token_set_time"`
	// CameFrom is the hash of the refresh token that a write or a grant has brought. RefreshToken is that one, or a later one that the
	// service has sent. It is empty in older entries.
	CameFrom string             `json:"came_from,omitempty"`
	Facts    tokenservice.Facts `json:"facts"`

	// Granted: a person has granted access by one of the paths authorize, device or pin.
	Granted   time.Time `json:"granted_time,omitzero"`
	GrantedBy string    `json:"granted_by,omitempty"`
	Subject   string    `json:"subject,omitempty"`

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
	// EndsBy is when an access token expires that was given up but works until the next exchange, which is therefore due at once. Zero:
	// there is none.
	EndsBy time.Time `json:"ends_by,omitzero"`
	// Unleased is an access token for one lease, until the record of its own under heldPrefix is stored. If that never happens, it is
	// revoked.
	Unleased *accessEntry `json:"unleased,omitempty"`
}

// move says that the service has moved a tenant's exchanges from the connector's address to another URL. It is ignored once the connector
// has another address.
type move struct {
	From string `json:"from"`
	To   string `json:"to"`
}

// expired says whether the refresh token's end is known and over.
func (e *tenantEntry) expired(now time.Time) bool {
	return !e.Facts.Assumed && !e.Facts.Expires.IsZero() && !now.Before(e.Facts.Expires)
}

// noLineage stands for the lineage of a tenant that does not exist.
const noLineage = "-"

// tenant owns the state of one tenant and is the only type that writes it. Readers look at view; each change replaces
// view as a whole, in one of the transitions below.
type tenant struct {
	name string
	view atomic.Pointer[tenantView]
	// flight is the tenant's one exchange under way, or nil.
	flight atomic.Pointer[flight]

	// storing is the right to change the tenant in storage. Readers of a usable token never wait for it.
	storing lock

	// planning is held while the tenant is put into the index at the time that its view says, so that the index ends up with the last view;
	// and while the registry drops the record.
	planning sync.Mutex

	// users is how many requests and flights work on the record: the registry does not drop it under them.
	users atomic.Int32

	// warned is when the log last warned of the refresh token's end, in seconds since 1970.
	warned atomic.Int64

	// mu guards the replacement of view and flight, and what follows. It is never held while something is waited for.
	mu sync.Mutex
	// outdated: the connector was written while another flow held storing. The view that the flow publishes may still go by the connector's
	// former configuration.
	outdated bool
	// replaced are access tokens, by generation, that newer ones have replaced and that may still have leases.
	replaced map[string]*accessToken
	// issued is the generation of the last access token for one lease that has its own record in storage.
	issued string
	// used is the generation of the last access token that was read and has left memory.
	used  string
	retry *backoff.Backoff
	// cutShort is the latest end, in seconds since 1970, of leases on an access token that a refresh or a write has ended before the
	// leases.
	cutShort int64
}

type knowledge int8

const (
	unknown knowledge = iota // storage has to be asked
	absent                   // storage has no such tenant
	loaded                   // entry is what storage has
	doubted                  // storage may have something else than entry, after a write that failed
)

// tenantView is all that holds of a tenant at one moment. It is never changed once it is published.
type tenantView struct {
	knows   knowledge
	summary tenantSummary
	*tenantMemory
}

// noSuchTenant is the view of a tenant that does not exist.
var noSuchTenant = &tenantView{knows: absent, tenantMemory: nothing}

// nothing is what all tenants share of which memory has the summary alone. On a large mount these are most.
var nothing = &tenantMemory{}

// tenantMemory is what memory has of a tenant beside its summary.
type tenantMemory struct {
	entry  *tenantEntry // nil unless loaded or doubted
	access *accessToken // entry's, unless it was given up
	// absence is the lineage while storage has no such tenant: a new one after each delete; "" stands for noLineage.
	absence string
	// kept is what the service has sent and storage has not taken yet.
	kept *outcome
	// trouble is why the last exchange failed; nil: it did not.
	trouble *trouble
	// postponed is until when no exchange is permitted, as far as is known, if one was due and the share or the service did not permit it.
	postponed time.Time

	// The rest follows from the above: see derive.

	// bound is when leases on the access token must be over: its end, or the exchange that ends it.
	bound time.Time
	// until is when the access token stops being handed out to readers who ask for no more than the tenant does.
	until time.Time
	// dangerFrom is when readers may have to be warned of the refresh token's end; zero: never.
	dangerFrom time.Time
}

// derive works out what readers need, so that a read of a usable token computes little.
func (v *tenantView) derive() {
	v.bound, v.until, v.dangerFrom = time.Time{}, time.Time{}, time.Time{}
	if v.entry == nil {
		return
	}
	switch facts := v.entry.Facts; {
	case !v.entry.Rejected.IsZero():
		v.dangerFrom = v.entry.Rejected
	case !facts.RotatesFrom.IsZero():
		v.dangerFrom = latest(facts.RotatesFrom, facts.Expires.Add(-dangerAhead))
	case !facts.Assumed:
		v.dangerFrom = facts.Expires
	}
	a := v.access
	if a == nil {
		return
	}
	v.bound, v.until = a.Expires, a.Expires.Add(-a.margin(v.entry.MinTTL))
	if a.Planned.IsZero() {
		return
	}
	// A min_ttl that was written after the token came counts for the next token: this one is handed out until its planned exchange.
	v.until = latest(v.until, a.Planned.Add(-leaseMargin))
	// An exchange ends this token: at the planned time, or later if a lease lasts longer or no exchange is permitted before. If the last
	// exchange has failed, the next try ends it, unless that is earlier. If its answer was lost, the next try ends it in any case.
	v.bound = latest(a.Planned, v.promised(), v.postponed)
	if v.trouble != nil && (v.trouble.lost || v.trouble.until.After(v.bound)) {
		v.bound = v.trouble.until
	}
	v.bound = earliest(v.bound, a.Expires)
	v.until = earliest(v.until, v.bound.Add(-leaseMargin)) // a lease has room before the exchange
}

// tenantSummary is what LIST and the renewer know without reading storage.
type tenantSummary struct {
	stored    bool // storage has the tenant
	rejected  bool
	verified  bool
	assumed   bool // expires is an assumption
	ownTokens bool // token_per_lease
	connector string
	expires   int64 // of the refresh token, in seconds since 1970; 0: unknown
	owesUntil int64 // the end, in seconds since 1970, of an access token that an exchange has to end before that; 0: none
}

// owes says whether an exchange has to end an access token that was given up. via is the tenant's connector as it is now; where memory does
// not have it (nil), the answer is as for a service whose exchanges end older access tokens.
func (s tenantSummary) owes(via *loadedConnector, now time.Time) bool {
	return s.owesUntil > now.Unix() && (via == nil || via.about.Revocation == tokenservice.RevokeByExchange)
}

// trouble is a failed exchange.
type trouble struct {
	err      error
	text     string // safe to show
	at       time.Time
	until    time.Time // no exchange before
	lost     bool      // the service may have carried the exchange out
	revision uint64    // of the connector: at another revision the next exchange does not wait for until
}

// flight is a tenant's one exchange under way, or a new try to store what an exchange has brought.
type flight struct {
	t    *tenant
	want want
	v    *tenantView // what it began with
	// connector is the name of the connector that the exchange uses. If the flight verifies a write, it is the one that the write names.
	connector string
	done      chan struct{}
	err       error        // to be read once done is closed
	token     *accessToken // for a lease of its own; to be read once done is closed

	alone context.Context // ends when a reader begins to wait for the flight, who calls join
	join  context.CancelFunc

	way *passage // of its last request
	// lost: the service has exchanged the refresh token, or may have, though no access token came of it.
	lost bool
	// parting says, of an access token for one lease, which came first: the reader has gone, or the flight has handed the token over.
	parting atomic.Int32

	placed chan struct{} // place closes it: the flight has its place in the share
	place  func()

	// outlived: the tenant has been deleted since, and may have been written anew.
	outlived atomic.Bool
}

const (
	abandoned  = 1
	handedOver = 2
)

// answered notes in storage that the service has answered the flight's exchange with a refusal, so that the next process does not take it
// for an exchange whose answer was lost.
func (f *flight) answered(ctx context.Context, err error) {
	failure, ok := errors.AsType[*tokenservice.Failure](err)
	if ok && !failure.Lost && f.way != nil && f.way.call != nil && f.way.via.about.RetryLost {
		f.way.call.Settle(ctx)
	}
}

// retires says whether the flight gives up the access token that there was, and does not merely replace it.
func (f *flight) retires() bool {
	if f.want.change == nil && f.v.kept != nil {
		return f.v.kept.retires
	}
	return f.want.force || f.want.change != nil
}

func newTenant(name string) *tenant {
	t := &tenant{name: name}
	t.view.Store(&tenantView{tenantMemory: nothing})
	return t
}

// update replaces the view. The caller holds mu.
func (t *tenant) update(change func(*tenantView)) {
	next := *t.view.Load()
	state := *next.tenantMemory
	next.tenantMemory = &state
	change(&next)
	next.derive()
	if state == *nothing {
		next.tenantMemory = nothing
	}
	t.view.Store(&next)
}

func (v *tenantView) show(e *tenantEntry, a *accessToken) {
	v.knows, v.entry, v.access = loaded, e, a
	v.summary = tenantSummary{stored: true, rejected: !e.Rejected.IsZero(), verified: e.Verified, assumed: e.Facts.Assumed, ownTokens: e.TokenPerLease, connector: e.Connector}
	if !e.Facts.Expires.IsZero() {
		v.summary.expires = e.Facts.Expires.Unix()
	}
	if !e.EndsBy.IsZero() {
		v.summary.owesUntil = e.EndsBy.Unix()
	}
}

// found records what storage has: e, or nil where it has no such tenant. It does nothing and returns false where the view has changed since
// storage was asked. An access token that memory had before keeps the count of its leases; the count of another one is unknown.
// accessGivenUp: readers do not get the entry's access token.
func (t *tenant) found(before *tenantView, e *tenantEntry, accessGivenUp bool) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.view.Load() != before {
		return false
	}
	t.update(func(v *tenantView) {
		if e == nil {
			v.knows, v.summary, v.entry, v.access, v.postponed = absent, tenantSummary{}, nil, nil, time.Time{}
			return
		}
		t.overtake(v, e)
		a := t.known(v, e)
		if accessGivenUp && a != nil && a.Generation == e.Access.Generation {
			a.leases.Store(givenUp)
		}
		v.show(e, a)
	})
	return true
}

// overtake ends trouble that is older than what storage has: another node has exchanged the refresh token since, or a write has
// replaced it there. The caller holds mu.
func (t *tenant) overtake(v *tenantView, e *tenantEntry) {
	if v.trouble != nil && latest(e.LastExchange, e.RefreshTokenSet).After(v.trouble.at) {
		t.retry, v.trouble = nil, nil
	}
}

// known returns the access token that readers get of an entry. If v has the same token, that is v's, with its count of leases. If the
// entry's token is the one that is kept, it is the older token of v: readers get a kept token once [tenants.store] knows that it is stored,
// and the count of its leases begins then. The caller holds mu.
func (t *tenant) known(v *tenantView, e *tenantEntry) *accessToken {
	if e.Access == nil {
		return nil
	}
	if v.kept != nil && v.kept.isIn(e) {
		return v.access
	}
	if a := v.access; a != nil && a.Generation == e.Access.Generation {
		return a
	}
	a := newAccessToken(t.name, e.Access)
	a.leases.Store(leasesUnknown)
	if a.Generation == t.used {
		a.use.Store(read)
	}
	if !e.Access.Planned.IsZero() {
		bound := latest(e.Access.Planned, v.postponed)
		if v.trouble != nil {
			bound = latest(bound, v.trouble.until)
		}
		// The last lease lasts a second at the least.
		a.leasedTo.Store(earliest(bound, e.Access.Expires).Add(leaseLeast - 2*leaseMargin + leaseRegistered).UnixNano())
	}
	return a
}

// summarized records what the index needs of a tenant, without its tokens.
func (t *tenant) summarized(e *tenantEntry) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.view.Load().knows != unknown {
		return
	}
	t.update(func(v *tenantView) {
		t.overtake(v, e)
		v.show(e, nil)
		v.knows, v.entry = unknown, nil
	})
}

// stored records that storage has an entry. o is the outcome of an exchange that the entry has, nil where it has none: the count of leases
// on an access token of o begins at a known zero. kept is what memory kept when the caller read the tenant: it is part of the entry, or
// superseded by it. What memory keeps since then stays. recovered: the trouble of an earlier exchange ends with o.
func (t *tenant) stored(e *tenantEntry, o, kept *outcome) (recovered bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.update(func(v *tenantView) {
		fresh := (*accessToken)(nil)
		if o != nil {
			fresh = o.access
			// Where no access token has come, only trouble that comes from storage alone ends.
			recovered = v.trouble != nil && (fresh != nil || !errors.As(v.trouble.err, new(*tokenservice.Failure)))
		}
		a := fresh
		if a == nil || e.Access == nil || a.Generation != e.Access.Generation {
			a = t.known(v, e)
		}
		if old := v.access; old != nil && old != a && old.leased() {
			if t.replaced == nil {
				t.replaced = map[string]*accessToken{}
			}
			now := time.Now() // Vault may not have told of the end of every lease
			maps.DeleteFunc(t.replaced, func(_ string, a *accessToken) bool { return !now.Before(a.Expires) })
			t.replaced[old.Generation] = old
			if !old.Planned.IsZero() && now.Before(v.bound.Add(-leaseMargin)) {
				t.cutShort = max(t.cutShort, v.bound.Unix())
			}
		}
		if recovered || fresh == nil && v.lineage() != e.Lineage {
			// The exchange has succeeded, or an operator has written another refresh token or connector: what failed before is over.
			t.retry, v.trouble = nil, nil
		}
		if a != v.access {
			v.postponed = time.Time{}
		}
		v.show(e, a)
		if v.kept == kept {
			v.kept = nil
		} else {
			v.knows = doubted
		}
	})
	if t.outdated {
		t.leave() // readers read storage again
	}
	return recovered
}

// lineage is the tenant's. After each delete it is another one.
func (v *tenantView) lineage() string {
	switch {
	case v.entry != nil:
		return v.entry.Lineage
	case v.absence != "":
		return v.absence
	}
	return noLineage
}

// supersedes says whether an operator has written or deleted the tenant since the exchange that o comes from began, or another
// node has exchanged its refresh token since.
func (v *tenantView) supersedes(o *outcome) bool {
	if e := v.entry; e != nil && o.change == nil && o.refreshToken != "" && e.RefreshToken != o.sent && e.RefreshToken != o.refreshToken {
		return true
	}
	lineage := v.lineage()
	return lineage != o.from && (o.change == nil || lineage != o.change.lineage)
}

// deleted records that storage does not have the tenant any more. kept is what memory kept when the caller read the tenant. What it
// keeps since then stays until its tokens are given up.
func (t *tenant) deleted(kept *outcome) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.retry, t.replaced, t.cutShort = nil, nil, 0
	t.warned.Store(0)
	if f := t.flight.Load(); f != nil {
		f.outlived.Store(true)
	}
	late := t.view.Load().kept
	if late == kept {
		late = nil
	}
	t.view.Store(&tenantView{knows: absent, tenantMemory: &tenantMemory{absence: noLineage + rand.Text(), kept: late}})
}

// doubt notes that a write has failed and that storage may have taken it. Readers still get a usable token; other requests read
// storage again.
func (t *tenant) doubt() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.update(func(v *tenantView) {
		if v.knows != unknown {
			v.knows = doubted
		}
	})
}

// keep keeps in memory what the service has sent and storage has not taken, until stored, deleted or dropKept.
func (t *tenant) keep(o *outcome) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.update(func(v *tenantView) {
		v.kept = o
		if v.knows != unknown {
			v.knows = doubted
		}
	})
}

// dropKept drops what was kept, because it is superseded.
func (t *tenant) dropKept() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.update(func(v *tenantView) { v.kept = nil })
}

// withhold makes sure that readers do not see an access token any more.
func (t *tenant) withhold(generation string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if a := t.view.Load().access; a != nil && a.Generation == generation {
		a.leases.Store(givenUp)
	}
}

// failed notes why an exchange failed. news: the exchange before it did not fail. superseded: the tenant has none of these lineages any
// more, and nothing was noted.
func (t *tenant) failed(next *trouble, of ...string) (news, superseded bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if v := t.view.Load(); v.knows != unknown && len(of) > 0 && !slices.Contains(of, v.lineage()) {
		return false, true
	}
	t.update(func(v *tenantView) {
		news = v.trouble == nil
		v.trouble = next
	})
	return news, false
}

// cutOff records that a process has ended while it waited for the answer to the tenant's exchange. The next is made as soon as
// it can: services give a replaced refresh token some seconds' grace.
func (t *tenant) cutOff(via *loadedConnector) {
	now := time.Now()
	failure := &tokenservice.Failure{
		Kind: tokenservice.Unavailable, Lost: true,
		Text: "Vault or the plugin ended before the answer to an exchange came. The exchange is tried again.",
	}
	t.failed(&trouble{
		// Unlike the text of another lost answer, this one does not say that nothing was lost: the service may have sent a new refresh token.
		err: failure, text: fmt.Sprintf("no access token for tenant %q: %s", t.name, failure.Text),
		at: now, until: now, lost: true, revision: via.revision,
	})
}

// backOff says how long the tenant rests after another failure: seconds at first, a minute at most, with jitter.
func (t *tenant) backOff() time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.retry == nil {
		t.retry = backoff.NewBackoff(math.MaxInt, time.Second, time.Minute)
	}
	d, _ := t.retry.Next()
	return d
}

// forget lets what storage has leave memory, and with it the count of leases. It stays while a flight or a write works on the
// tenant, or while memory knows what storage does not.
func (t *tenant) forget() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.flight.Load() == nil && !t.storing.busy() { // users says more than that: a flight counts until after its answer
		t.leave()
	}
}

// replan lets the tenant leave memory, so that the end of its access token is planned again, by the connector as it is now. busy: another
// flow holds storing, so what that flow stores leaves memory again; the caller calls replan once more when it holds storing itself.
func (t *tenant) replan(busy bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.outdated = busy
	t.leave()
}

// leave clears the tenant, unless memory has something that storage does not have. The caller holds mu.
func (t *tenant) leave() {
	if v := t.view.Load(); v.kept == nil && (v.access == nil || v.access.current()) {
		t.clear()
	}
}

// invalidate records that another node has changed the tenant in storage.
func (t *tenant) invalidate() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.clear()
}

// clear makes the tenant unknown, except for its summary. The caller holds mu.
func (t *tenant) clear() {
	t.replaced = nil
	if a := t.view.Load().access; a != nil && a.use.Load() == read {
		t.used = a.Generation // once it is in memory again, it is renewed ahead of its end
	}
	t.update(func(v *tenantView) { v.knows, v.entry, v.access = unknown, nil, nil })
}

// endReplaced takes a lease off an access token that another has replaced. It says whether memory knows the token, and
// whether it is given up with this lease. [tenant.forgetReplaced] follows once that is in storage.
func (t *tenant) endReplaced(generation string, early bool) (known, last bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	a := t.replaced[generation]
	if a == nil {
		return false, false
	}
	return true, a.end(early, true)
}

// hasLeases says whether leases may live on the tenant's access token, or on one that it has replaced.
func (t *tenant) hasLeases(now time.Time) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, a := range t.replaced {
		if now.Before(a.Expires) {
			return true
		}
	}
	a := t.view.Load().access
	return a != nil && a.leased()
}

// forgetReplaced forgets an access token that has been given up.
func (t *tenant) forgetReplaced(generation string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.replaced, generation)
}

// begin makes f the tenant's flight. Where there is one already it returns that; where the view has changed since f was
// planned, it returns errSuperseded.
func (t *tenant) begin(f *flight, start func() bool) (*flight, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	v, busy := t.view.Load(), t.flight.Load()
	switch {
	case busy != nil:
		return busy, nil
	case v != f.v:
		return nil, errSuperseded
	}
	if !start() {
		return nil, errStopping
	}
	t.flight.Store(f)
	t.users.Add(1) // until the flight's end
	return f, nil
}

// isVerifying says whether the tenant's flight verifies a write, or stores a grant.
func (t *tenant) isVerifying() bool {
	f := t.flight.Load()
	return f != nil && f.want.change != nil
}

// ended notes that an exchange of the refresh token sent has brought a new access token, which is about to be stored. If that has ended the
// tenant's access token at the service, readers wait for the new one.
func (t *tenant) ended(sent string) {
	v := t.view.Load()
	if a := v.access; a != nil && !a.Planned.IsZero() && v.entry.RefreshToken == sent {
		a.use.Store(ending)
	}
}

// land ends the tenant's flight.
func (t *tenant) land(f *flight, err error) {
	f.err = err
	failure, ok := errors.AsType[*tokenservice.Failure](err)
	if a := t.view.Load().access; a != nil && err != nil && !f.lost && !(ok && failure.Lost) {
		a.use.CompareAndSwap(ending, unread) // readers have the access token again that the exchange was to end
	}
	t.mu.Lock()
	t.flight.Store(nil)
	t.mu.Unlock()
	close(f.done)
}

// uses says whether the tenant uses a connector, or is about to.
func (t *tenant) uses(connector string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	v, f := t.view.Load(), t.flight.Load()
	return v.summary.stored && v.summary.connector == connector ||
		f != nil && f.connector == connector ||
		v.kept != nil && v.kept.connector == connector
}

// ownsTokens says whether the tenant has token_per_lease with a connector, or is about to.
func (t *tenant) ownsTokens(connector string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	v, f := t.view.Load(), t.flight.Load()
	aboutTo := func(c *tenantChange) bool { return c != nil && c.target == connector && c.apply(v.entry).TokenPerLease }
	return v.summary.stored && v.summary.ownTokens && v.summary.connector == connector ||
		f != nil && aboutTo(f.want.change) ||
		v.kept != nil && aboutTo(v.kept.change)
}

// hasCutShort says whether leases may live on an access token that a refresh or a write has ended before them.
func (t *tenant) hasCutShort(now time.Time) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return now.Unix() < t.cutShort
}

// noteIssued notes that storage has the record of an access token for one lease.
func (t *tenant) noteIssued(generation string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.issued = generation
}

func (t *tenant) wasIssued(generation string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.issued == generation
}

// newest is the entry with what is kept, nil where there is no tenant.
func (v *tenantView) newest() *tenantEntry {
	if v.kept == nil || v.entry == nil && v.kept.change == nil {
		return v.entry
	}
	return v.kept.onto(v.entry)
}

// mayEnd says whether an exchange that no reader asked for may begin, though it ends the access token that there is: of a token that has
// been read or leased, not before its planned time. Once it returns true before that time, readers do not get the token any more.
func (t *tenant) mayEnd(now time.Time) bool {
	v := t.view.Load()
	a := v.access
	if a == nil || !a.current() || a.Planned.IsZero() || !now.Before(v.bound) {
		return true
	}
	return !a.leased() && (a.use.CompareAndSwap(unread, ending) || a.use.Load() == ending)
}

// rests says whether the tenant's last exchange has failed so recently that none is made yet. Where an exchange ends older access
// tokens, the rest ends leaseMargin earlier: from then on no lease fits before the next try, so a reader may wait for that.
func (v *tenantView) rests(now time.Time) bool {
	until := v.trouble.until
	if a := v.access; a != nil && !a.Planned.IsZero() && !v.trouble.lost && now.Before(a.Expires) {
		until = until.Add(-leaseMargin)
	}
	return until.After(now)
}

// promised is the latest end of the leases on an access token that an exchange would end; zero: there are none. Leases that were given
// until the next try of an exchange that failed or was not permitted count too, although the exchange may be possible earlier, because
// storage works again or the connector was written.
func (v *tenantView) promised() time.Time {
	a := v.access
	if a == nil || a.Planned.IsZero() || !a.current() || v.trouble != nil && v.trouble.lost {
		return time.Time{}
	}
	return time.Unix(0, a.leasedTo.Load())
}

// postpone notes that an exchange was due and is not permitted before until. An access token that the exchange would have ended lives on,
// and is handed out until then.
func (t *tenant) postpone(until time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	v := t.view.Load()
	if a := v.access; a != nil {
		lost := v.trouble != nil && v.trouble.lost
		if now := time.Now(); a.Planned.IsZero() || lost || !a.current() || now.Before(v.bound.Add(-leaseMargin)) || !now.Before(a.Expires) {
			return
		}
		until = until.Add(leaseMargin) // leases on the token end when the exchange is permitted
	}
	if !until.After(v.postponed) {
		return
	}
	t.update(func(v *tenantView) { v.postponed = until })
}
