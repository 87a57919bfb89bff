package backend

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"golang.org/x/sync/semaphore"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/share"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/tokenservice"
)

const (
	// connectorPrefix is where storage keeps connectors, each under its name.
	connectorPrefix = "config/"

	// callPrefix is where storage keeps the calls of all connectors: see package share.
	callPrefix = "calls/"

	// defaultConnector is the connector that the path config stands for.
	defaultConnector = "default"

	// probeEvery is how often a connector that the service refuses still makes an exchange, so that a passing
	// mistake of the service heals by itself.
	probeEvery = 10 * time.Minute

	// exclusive is the weight of the right to delete a connector, or to change what tenants rely on.
	exclusive = 1 << 30
)

// connector is one connector in memory. It stays when its configuration is written, because the calls that were made still count.
type connector struct {
	name  string
	share *share.Share
	// binding is held, together with others, by a write that makes a tenant use the connector; and exclusively by a write that deletes the
	// connector or changes what tenants rely on. So a connector in use is not deleted.
	binding *semaphore.Weighted
	// storing is the right to change the connector in storage.
	storing lock
	loaded  atomic.Pointer[loadedConnector] // the configuration as it is now; nil: memory has none
	refusal atomic.Pointer[refusal]         // nil: the service does not refuse the connector
	// changes counts the writes of the configuration, and the times that the service has taken the connector again. A load that began
	// before the last of these publishes nothing, and the backoff of the connector's tenants ends with each.
	changes atomic.Uint64
	hops    hops
}

// hopsKept is how long the redirects of an exchange are remembered.
const hopsKept = 2 * share.Window

// hops is how many redirects exchanges have lately followed, each with a further request. While the service redirects, each exchange will
// need as many: if exchanges left each other no places for these, all could begin and none end.
type hops struct {
	mu   sync.Mutex
	most int
	at   time.Time
}

// noted records that an exchange has asked for its n-th further request.
func (h *hops) noted(n int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if now := time.Now(); n >= h.most || now.Sub(h.at) > hopsKept {
		h.most, h.at = n, now
	}
}

// ahead is how many further requests an exchange is likely to take after n of its requests.
func (h *hops) ahead(n int) int {
	h.mu.Lock()
	defer h.mu.Unlock()
	if time.Since(h.at) > hopsKept {
		return 0
	}
	return max(0, h.most-n)
}

// refusal says that the service has refused a connector's ID or secret.
type refusal struct {
	failure *tokenservice.Failure
	// noted is when the service last said so, as storage has it, in nanoseconds since 1970.
	noted atomic.Int64
	probe atomic.Int64 // when the next exchange is made in spite of the refusal, in nanoseconds since 1970
}

// loadedConnector is a connector's configuration and the client made of it.
type loadedConnector struct {
	*connector
	entry    *connectorEntry
	service  tokenservice.Service
	about    tokenservice.About
	revision uint64
	// incomplete is the error that says what must be written before a call can be made; nil if nothing is missing.
	incomplete error
}

// connectors owns every connector of the mount, and what services say about them.
type connectors struct {
	storage   logical.Storage
	transport http.RoundTripper // nil but in tests
	announce  *announcer
	accepted  func(connector string) // called when the service takes a connector again

	mu     sync.Mutex
	byName map[string]*connector
}

// errReplaced ends a request whose connector has been written or deleted since the request began to wait: for its permission, or for its
// connection to the service.
var errReplaced = tokenservice.ErrClosed

// of returns the connector of that name. Its error is storage's, or says what is missing.
func (cs *connectors) of(ctx context.Context, name string) (*loadedConnector, error) {
	via, err := cs.get(ctx, name)
	if err == nil && via == nil {
		err = unknownConnector(name)
	}
	return via, err
}

// get returns the connector of that name, or nil where there is none. Its error is storage's, or says why the stored
// configuration cannot be used.
func (cs *connectors) get(ctx context.Context, name string) (*loadedConnector, error) {
	for {
		if l := cs.present(name); l != nil {
			return l, l.share.Load(ctx)
		}
		c, changes := cs.named(name), uint64(0)
		if c != nil {
			changes = c.changes.Load()
		}
		entry, err := getConnector(ctx, cs.storage, name)
		if err != nil || entry == nil {
			return nil, err
		}
		if c == nil {
			cs.record(name) // before storage is read again: it counts the writes that come meanwhile
			continue
		}
		service, err := entry.service(cs.transport)
		if err != nil {
			return nil, badStored(name, err)
		}
		cs.publish(c, changes, entry, service)
	}
}

// present returns the connector as memory has it now, or nil.
func (cs *connectors) present(name string) *loadedConnector {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	if c := cs.byName[name]; c != nil {
		return c.loaded.Load()
	}
	return nil
}

func (cs *connectors) named(name string) *connector {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	return cs.byName[name]
}

// record returns the connector's record, made where there is none. It is never dropped.
func (cs *connectors) record(name string) *connector {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	c := cs.byName[name]
	if c == nil {
		c = &connector{name: name, share: share.New(cs.storage, name), binding: semaphore.NewWeighted(exclusive)}
		cs.byName[name] = c
	}
	return c
}

// publish makes a configuration the connector's present one, unless the connector has changed since changes was read, or another
// request has published the same configuration: its client is in use and must not be replaced.
func (cs *connectors) publish(c *connector, changes uint64, entry *connectorEntry, service tokenservice.Service) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	if c.changes.Load() != changes || c.loaded.Load() != nil {
		service.Close()
		return
	}
	var r *refusal
	if !entry.Refused.IsZero() {
		r = refusedSince(entry.Refused)
	}
	c.share.Configure(entry.ExchangesPerMinute, entry.RequestTimeout)
	c.refusal.Store(r) // before loaded, so that no call is made to a connector that is refused
	c.loaded.Store(&loadedConnector{
		connector: c, entry: entry, service: service, about: service.About(), revision: changes, incomplete: entry.Settings.missing(entry, c.name),
	})
}

// again says whether a new refusal is to be stored, from which the next process counts its ten minutes. It returns true to one caller in
// ten minutes.
func (r *refusal) again(now time.Time) bool {
	noted := r.noted.Load()
	return now.Sub(time.Unix(0, noted)) >= probeEvery && r.noted.CompareAndSwap(noted, now.UnixNano())
}

func refusedSince(at time.Time) *refusal {
	r := &refusal{failure: &tokenservice.Failure{Kind: tokenservice.RefusedConnector}}
	at = earliest(at, time.Now())
	r.noted.Store(at.UnixNano())
	r.probe.Store(at.Add(probeEvery).UnixNano())
	return r
}

// put stores a configuration. A refusal by the service ends with it. The caller holds the binding exclusively.
func (cs *connectors) put(ctx context.Context, name string, entry *connectorEntry, service tokenservice.Service) error {
	c := cs.record(name)
	if err := c.storing.acquire(ctx); err != nil {
		return err
	}
	defer c.storing.release()
	entry.Refused = time.Time{}
	err := putEntry(ctx, cs.storage, connectorPrefix+name, entry)
	cs.forget(c)
	if err != nil {
		service.Close()
		return err
	}
	cs.publish(c, c.changes.Load(), entry, service)
	return nil
}

// remove deletes a configuration and what storage has of its calls. The caller holds the binding exclusively.
func (cs *connectors) remove(ctx context.Context, name string) error {
	c := cs.record(name)
	if err := c.storing.acquire(ctx); err != nil {
		return err
	}
	defer c.storing.release()
	err := cs.storage.Delete(ctx, connectorPrefix+name)
	cs.forget(c)
	if err != nil {
		return err
	}
	return c.share.Remove(ctx)
}

// forget drops what memory holds of a connector's configuration.
func (cs *connectors) forget(c *connector) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	c.changes.Add(1)
	if l := c.loaded.Swap(nil); l != nil {
		l.service.Close()
	}
}

// invalidate drops what another node has changed.
func (cs *connectors) invalidate(key string) {
	if name, ok := strings.CutPrefix(key, connectorPrefix); ok {
		if c := cs.named(name); c != nil {
			cs.forget(c)
		}
	}
	if place, ok := strings.CutPrefix(key, callPrefix); ok {
		name, _, _ := strings.Cut(place, "/")
		if c := cs.named(name); c != nil {
			c.share.Invalidate()
		}
	}
}

func (cs *connectors) close() {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	for _, c := range cs.byName {
		if l := c.loaded.Load(); l != nil {
			l.service.Close()
		}
	}
}

// blocked says why no call is made through the connector now.
func (l *loadedConnector) blocked(now time.Time) error {
	if l.incomplete != nil {
		return l.incomplete
	}
	if r := l.refusal.Load(); r != nil && r.probe.Load() > now.UnixNano() {
		return r.failure
	}
	if paused := l.share.PausedUntil(); paused.After(now) {
		return &share.LimitError{Until: paused, ByService: true}
	}
	return nil
}

// passage permits the requests to the service that one piece of work makes, such as an exchange with its redirects.
type passage struct {
	via    *loadedConnector
	want   share.Want      // of a tenant, if the work is its exchange, and of no other work
	alone  context.Context // ends when a reader begins to wait for background work, which then waits as a reader does; nil for other work
	probes *refusal        // the refusal in spite of which this work is done
	// discovery: the work asks the service about itself for a write of the connector. A refusal of the present configuration does not stop
	// it.
	discovery bool
	// tellsNothing: an answer to the work does not tell whether the service takes a connector that it refuses.
	tellsNothing bool
	// stopping says whether the engine stops. No call is made then, because the answer may come too late to be stored. nil: the answer
	// brings nothing to store.
	stopping func() bool
	// noted is called when the call is stored, before the last look at whether it may be made. It may use storage, and its error is
	// permit's; nil for none.
	noted  func(context.Context) error
	placed func()      // called when the work has a place in the share; nil for none
	call   *share.Call // the last that was permitted
	made   int         // how many calls were permitted
}

// permit is asked before every request to the service. Its error is a *share.LimitError, the connector's refusal,
// errReplaced, errStopping, noted's, storage's (for an exchange, what storageTrouble makes of that) or the context's.
func (p *passage) permit(ctx context.Context) (done func(), err error) {
	if err := p.via.blocked(time.Now()); err != nil && p.probes == nil && !p.discovery {
		return nil, err
	}
	if p.want.Tenant != "" {
		if p.made > 0 {
			p.via.hops.noted(p.made)
		}
		p.want.Ahead = p.via.hops.ahead(p.made)
	}
	take := p.via.share.Take
	if p.alone != nil && p.alone.Err() == nil {
		take = p.takeBehind
	}
	call, err := take(ctx, p.want)
	if err != nil {
		return nil, err
	}
	if p.placed != nil {
		p.placed()
	}
	if err := p.mayCall(); err != nil {
		call.Withdraw()
		return nil, err
	}
	// The call is stored before it is made. If storage takes that, it will probably take the tokens of the answer too. If it does not, no
	// call is made: a new refresh token would be lost with the process.
	switch err := call.Note(ctx); {
	case errors.Is(err, share.ErrRemoved):
		return nil, errReplaced
	case err != nil:
		p.leaveProbe()
		err = storageError(err)
		if p.want.Tenant != "" && ctx.Err() == nil {
			err = storageTrouble(p.want.Tenant, err)
		}
		return nil, err
	}
	// Each step above may have waited. Between the last mayCall and the call nothing waits.
	err = p.mayCall()
	if err == nil && p.noted != nil {
		if err = p.noted(ctx); err == nil {
			err = p.mayCall()
		}
	}
	if err != nil {
		p.leaveProbe()
		call.Cancel(ctx)
		return nil, err
	}
	p.call, p.made = call, p.made+1
	p.want.Hop = true // what follows belongs to work that has begun
	return call.End, nil
}

// takeBehind takes a place in the share behind readers, or as a reader does once one has joined the work.
func (p *passage) takeBehind(ctx context.Context, want share.Want) (*share.Call, error) {
	asBackground, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(p.alone, cancel)()
	behind := want
	behind.Class, behind.Wait = share.Background, 2*lineAhead
	if want.Hop {
		behind.Wait = hopPatience
	}
	call, err := p.via.share.Take(asBackground, behind)
	if errors.Is(err, context.Canceled) && ctx.Err() == nil {
		return p.via.share.Take(ctx, want)
	}
	return call, err
}

// plansAs says whether the ends of access tokens are planned in the same way with another configuration of the connector. It is false where
// memory has no configuration (nil).
func (l *loadedConnector) plansAs(about tokenservice.About) bool {
	return l != nil && l.about.ExchangeInvalidates == about.ExchangeInvalidates
}

// mayCall says why a call may not be made any more, because of what has happened while it waited; nil: it may be made. Through a connector
// that the service refuses, one piece of work in ten minutes is let through.
func (p *passage) mayCall() error {
	switch {
	case p.via.loaded.Load() != p.via:
		return errReplaced
	case p.stopping != nil && p.stopping():
		return errStopping
	}
	now := time.Now()
	if paused := p.via.share.PausedUntil(); paused.After(now) {
		return &share.LimitError{Until: paused, ByService: true}
	}
	r := p.via.refusal.Load()
	if r == nil || r == p.probes || p.discovery {
		return nil
	}
	probe := r.probe.Load()
	if p.want.Hop || p.tellsNothing || probe > now.UnixNano() || !r.probe.CompareAndSwap(probe, now.Add(probeEvery).UnixNano()) {
		return r.failure
	}
	p.probes = r
	return nil
}

// leaveProbe lets other work through a refused connector in place of this, if this has made no call.
func (p *passage) leaveProbe() {
	if p.probes != nil && p.call == nil {
		p.probes.probe.Store(time.Now().UnixNano())
		p.probes = nil
	}
}

// nextProbe is when a refused connector makes its next exchange.
func (l *loadedConnector) nextProbe() time.Time {
	if r := l.refusal.Load(); r != nil {
		return time.Unix(0, r.probe.Load())
	}
	return time.Now().Add(probeEvery)
}

// judge notes in memory what an answer shows about the connector: that the service refuses it, takes it again, or wants a pause. It does so
// even if the work of the request is superseded. The function that it returns stores the same; the caller calls it after the tokens of the
// answer are stored, so that a new refresh token does not wait.
func (cs *connectors) judge(via *loadedConnector, answer error) (store func(context.Context)) {
	failure, isFailure := errors.AsType[*tokenservice.Failure](answer)
	rest := time.Duration(0)
	switch {
	case !isFailure:
	case isLimit(failure):
		rest = restOf(failure)
	case asksForRest(failure):
		rest = min(failure.RetryAfter, tokenservice.LongestRest)
	}
	if rest > 0 {
		via.share.Pause(time.Now().Add(rest))
	}
	var storeVerdict func(context.Context) // nil: nothing is to be stored
	r := via.refusal.Load()
	lately := r != nil && time.Since(time.Unix(0, r.noted.Load())) < via.entry.RequestTimeout // the call may have been made before that refusal
	switch {
	case answer == nil, isFailure && failure.TakesConnector && !lately:
		storeVerdict = cs.accept(via)
	case isFailure && failure.Kind == tokenservice.RefusedConnector:
		storeVerdict = cs.refuse(via, failure)
	}
	return func(ctx context.Context) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), storeWithin)
		defer cancel()
		if rest > 0 {
			_ = via.share.StorePause(ctx) // where storage fails, a restart forgets it
		}
		if storeVerdict != nil {
			storeVerdict(ctx)
		}
	}
}

// isLimit says whether the service permits no further calls for now: by what it says, or by the status 429 whatever it says.
func isLimit(failure *tokenservice.Failure) bool {
	return failure.Kind == tokenservice.Limited || failure.Status == http.StatusTooManyRequests && !isAboutDeviceCode(failure)
}

// isAboutDeviceCode says whether an answer is about the poll of one device code, and about no other call.
func isAboutDeviceCode(failure *tokenservice.Failure) bool {
	return failure.Kind == tokenservice.Pending || failure.Kind == tokenservice.SlowDown
}

// asksForRest says whether an answer that is not about a limit wants no call for a while: a 503 or a 403 does, whatever else it
// says.
func asksForRest(failure *tokenservice.Failure) bool {
	switch {
	case failure.RetryAfter <= 0, isAboutDeviceCode(failure):
		return false
	case failure.Status == http.StatusServiceUnavailable, failure.Status == http.StatusForbidden:
		return true
	}
	return failure.Kind == tokenservice.Unavailable || failure.Kind == tokenservice.Refused
}

// restOf is how long a limited connector rests. Services count by the minute where they name no time.
func restOf(failure *tokenservice.Failure) time.Duration {
	if failure.RetryAfter > 0 {
		return failure.RetryAfter
	}
	return time.Minute
}

// refuse notes that the service refuses a connector as it is configured. store is nil where nothing is to be stored.
func (cs *connectors) refuse(via *loadedConnector, failure *tokenservice.Failure) (store func(context.Context)) {
	now := time.Now()
	r := refusedSince(now)
	told := *failure
	told.RetryAfter, told.Status = 0, 0 // the pause has begun: work that is told of this refusal later must not prolong it
	r.failure = &told
	cs.mu.Lock()
	present, known := via.loaded.Load() == via, via.refusal.Load()
	if present && known == nil {
		via.refusal.Store(r)
	}
	cs.mu.Unlock()
	switch {
	case !present:
		return nil
	case known == nil:
		cs.announce.connectorRefused(via)
	case failure == known.failure || !known.again(now):
		return nil
	}
	return func(ctx context.Context) { cs.noteRefusal(ctx, via, now.UTC().Truncate(time.Millisecond)) }
}

// accept notes that the service takes a connector which it refused. store is nil where nothing is to be stored.
func (cs *connectors) accept(via *loadedConnector) (store func(context.Context)) {
	cs.mu.Lock()
	news := via.loaded.Load() == via && via.refusal.Swap(nil) != nil
	if news {
		via.changes.Add(1)
		next := *via
		next.revision = via.changes.Load()
		via.loaded.Store(&next)
		via = &next
	}
	cs.mu.Unlock()
	if !news {
		return nil
	}
	cs.announce.connectorAccepted(via)
	cs.accepted(via.name)
	return func(ctx context.Context) { cs.noteRefusal(ctx, via, time.Time{}) }
}

// noteRefusal stores since when the service has refused a connector; zero: it does not. Where storage fails, a restart asks
// the service once more.
func (cs *connectors) noteRefusal(ctx context.Context, via *loadedConnector, since time.Time) {
	if via.storing.acquire(ctx) != nil {
		return
	}
	defer via.storing.release()
	if via.loaded.Load() != via {
		return
	}
	entry := *via.entry
	entry.Refused = since
	_ = putEntry(ctx, cs.storage, connectorPrefix+via.name, &entry)
}
