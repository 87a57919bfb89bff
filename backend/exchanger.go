package backend

import (
	"context"
	"crypto/rand"
	"errors"
	"sync"
	"time"

	"github.com/hashicorp/vault/sdk/logical"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/share"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/tokenservice"
)

// exchanger makes exchanges: one at a time for a tenant, on the engine's own context. Each call is noted in storage before it is made, and
// what it brings is stored before a reader gets it.
type exchanger struct {
	tenants     *tenants
	connectors  *connectors
	revocations *revocations
	announce    *announcer
	node        *node
	ctx         context.Context
	work        func(func()) bool // runs a function in a goroutine that the engine's end waits for
	stopping    func() bool
	landed      func(t *tenant, err error) // schedules a tenant after its flight
}

// want is what a request asks of an exchange.
type want struct {
	// force: make the exchange whatever the tenant's backoff or a rejection say, and give up the access token that there is.
	force bool
	// background: no reader waits.
	background bool
	// ownToken: the access token is for one lease alone.
	ownToken bool
	// change is an operator's write that the exchange verifies; nil: none. It is stored when the exchange succeeds, and
	// nothing of it when that fails.
	change *tenantChange
	// result is what a grant has brought already: no exchange is needed to verify the change. nil for any other change.
	result *granted
}

// granted is what a service has given for a code, a device code or a PIN.
type granted struct {
	via    *loadedConnector
	result tokenservice.Result
}

// errSuperseded ends an exchange whose refresh token an operator has replaced or deleted meanwhile.
var errSuperseded = errors.New("superseded by a write or a delete")

// outcome is what an exchange has brought, as it can be stored at once or later, on top of what storage has by then.
type outcome struct {
	from      string        // the lineage that was exchanged; noLineage where the exchange makes the tenant
	change    *tenantChange // the operator's write that it verified, or nil
	connector string
	sent      string // the refresh token that was exchanged
	at        time.Time

	access       *accessToken // nil: none came
	refreshToken string       // "": no new one came
	facts        *tokenservice.Facts
	subject      string
	move         *move
	rejected     bool // the service refuses the refresh token
	retires      bool // the access token that there was is given up
	ownToken     bool
}

// precious says whether what the exchange has brought must not be lost.
func (o *outcome) precious() bool { return o.access != nil || o.refreshToken != "" }

// granted says whether a person's consent has brought the refresh token, which then exists nowhere else.
func (o *outcome) granted() bool { return o.change != nil && o.change.grant != nil }

// isWritersAlone says whether the outcome verifies a write and has brought no refresh token that exists nowhere else: the writer can write
// again, so it is not kept.
func (o *outcome) isWritersAlone() bool {
	return o.change != nil && o.refreshToken == "" && !o.granted()
}

// changes says whether there is anything to store.
func (o *outcome) changes(e *tenantEntry) bool {
	return o.precious() || o.change != nil || o.rejected && e.Rejected.IsZero() || !o.move.equal(e.Move)
}

// isIn says whether an entry has the access token already: storage has taken it although it reported an error, or the service has sent the
// same token once more, as some do while it lives.
func (o *outcome) isIn(e *tenantEntry) bool {
	return o.access != nil && e != nil && e.Access != nil && e.Access.Token == o.access.Token
}

func (m *move) equal(other *move) bool {
	return m == other || m != nil && other != nil && *m == *other
}

// rotates says whether the service has replaced the refresh token that an entry holds.
func (o *outcome) rotates(e *tenantEntry) bool {
	return e != nil && o.refreshToken != "" && e.RefreshToken == o.sent
}

// rotationAlone is the outcome's new refresh token without the rest, for a tenant that an operator has written meanwhile.
func (o *outcome) rotationAlone(e *tenantEntry) *outcome {
	return &outcome{from: e.Lineage, connector: e.Connector, sent: o.sent, at: o.at, refreshToken: o.refreshToken, facts: o.facts, move: e.Move}
}

// onto returns base, the tenant's entry in storage or nil for none, with the result of the exchange.
func (o *outcome) onto(base *tenantEntry) *tenantEntry {
	var next tenantEntry
	if o.change != nil {
		next = *o.change.apply(base)
	} else {
		next = *base
	}
	next.Move, next.Unleased = o.move, nil
	if o.refreshToken != "" {
		next.RefreshToken, next.RefreshTokenOrigin, next.RefreshTokenSet = o.refreshToken, originService, o.at
		next.Rejected = time.Time{}
	}
	switch {
	case o.facts != nil && o.refreshToken == "" && sameEnd(o.facts.Expires, next.Facts.Expires):
		// The same end as before. RotatesFrom stays, which the answer would count from the rest of the life.
	case o.facts != nil:
		before := next.Facts
		next.Facts = *o.facts
		if moved := o.facts.Expires.Sub(before.Expires); sameEnd(o.facts.Expires, before.Expires) && moved < o.at.Sub(next.LastExchange)/2 {
			next.Facts.RotatesFrom = before.RotatesFrom // the new refresh token ends with the former one, and does not prolong the grant
		}
	case o.access != nil && next.Facts.Assumed && !o.at.Before(next.Facts.Expires):
		// The refresh token has outlived what was assumed.
		next.Facts.Expires, next.Facts.RotatesFrom, next.Facts.Assumed = time.Time{}, time.Time{}, false
	}
	if o.subject != "" {
		next.Subject = o.subject
	}
	if o.rejected {
		next.Rejected = o.at
	}
	if o.access == nil {
		return &next
	}
	next.Verified, next.Rejected, next.LastExchange, next.EndsBy = true, time.Time{}, o.at, time.Time{}
	next.AccessTokenLife = o.access.life()
	if o.ownToken {
		next.Unleased = o.access.accessEntry
	} else {
		next.Access = o.access.accessEntry
	}
	return &next
}

// sameEnd says whether two ends of a refresh token are the same: the service sends the rest of the life in whole seconds, so the ends
// that are computed at different times may differ a little.
func sameEnd(a, b time.Time) bool {
	return !a.IsZero() && !b.IsZero() && a.Sub(b).Abs() < time.Minute
}

// exchange has the tenant's refresh token exchanged, or joins the exchange under way, and waits for its end. It returns the access token if
// that is for one lease alone (w.ownToken); other requests find it in the tenant's view. errSuperseded says to look at the tenant again.
func (x *exchanger) exchange(ctx context.Context, t *tenant, v *tenantView, w want) (*accessToken, error) {
	f, own, err := x.start(ctx, t, v, w)
	if err != nil {
		return nil, err
	}
	f.join()
	select {
	case <-f.done:
	case <-ctx.Done():
		if !own || f.parting.CompareAndSwap(0, abandoned) {
			return nil, ctx.Err()
		}
		<-f.done // storage has all of it
	}
	if !own && (w.ownToken || f.want.ownToken || f.want.change != nil) {
		// A token for one lease is for its reader alone, and the result of a verification for its writer.
		return nil, errSuperseded
	}
	if w.force && f.err == nil && !f.retires() {
		return nil, x.retire(ctx, t, v)
	}
	return f.token, f.err
}

// retire gives up the access token of v for a request that has joined an exchange which was begun for another reason: that exchange has
// left the older token to its leases.
func (x *exchanger) retire(ctx context.Context, t *tenant, v *tenantView) error {
	_, now, err := x.tenants.load(ctx, t.name)
	if err != nil || now.entry == nil || v.access == nil || now.access != nil && now.access.Token == v.access.Token {
		return err
	}
	connector, err := x.revocations.revokeHeldLater(ctx, t.name, v.access.Generation)
	if err != nil {
		return err
	}
	t.forgetReplaced(v.access.Generation)
	if connector != "" {
		return nil
	}
	return x.revocations.revokeLater(ctx, v.entry.Connector, t.name, v.access.accessEntry)
}

// start begins the tenant's flight, or returns the one under way. own says that it is a new one, for this request.
func (x *exchanger) start(ctx context.Context, t *tenant, v *tenantView, w want) (_ *flight, own bool, _ error) {
	if !x.node.ready() {
		return nil, false, logical.ErrReadOnly
	}
	f := &flight{t: t, want: w, v: v, done: make(chan struct{}), placed: make(chan struct{})}
	f.alone, f.join = context.WithCancel(context.Background())
	f.place = sync.OnceFunc(func() { close(f.placed) })
	switch {
	case w.change != nil:
		f.connector = w.change.target
	case v.kept != nil:
		f.connector = v.kept.connector
	default:
		f.connector = v.entry.Connector
		if busy := t.flight.Load(); busy != nil {
			return busy, false, nil
		}
		if err := x.blocked(ctx, t, v, w); err != nil {
			return nil, false, err
		}
	}
	begun, err := t.begin(f, func() bool { return x.work(func() { x.fly(f) }) })
	return begun, begun == f, err
}

// blocked says why no exchange is made for the tenant now; nil: one may be made. A reason that lies in the connector it notes as a failed
// exchange, if no reader waits or if an exchange would end the access token: readers get that token until the next try.
func (x *exchanger) blocked(ctx context.Context, t *tenant, v *tenantView, w want) error {
	now := time.Now()
	via, err := x.connectors.of(ctx, v.entry.Connector)
	rests := v.trouble != nil && v.rests(now) && (via == nil || v.trouble.revision == via.revision)
	if err == nil {
		err = via.blocked(now)
	}
	ends := v.access != nil && !v.access.Planned.IsZero()
	switch {
	case err != nil && !rests && ctx.Err() == nil && (w.background || ends):
		err = x.fail(&flight{t: t, v: v, connector: v.entry.Connector}, via, err)
		x.landed(t, err)
		return err
	case err != nil:
		return err
	case v.entry.expired(now), !w.force && !v.entry.Rejected.IsZero():
		if ends {
			t.postpone(v.access.Expires) // only a write or a refresh makes an exchange
		}
		if v.entry.expired(now) {
			return badValue("%s", expiredText(via.about, t.name, v.entry))
		}
		return &tokenservice.Failure{Kind: tokenservice.RefusedRefreshToken}
	case w.force:
		return nil
	case rests && errors.As(v.trouble.err, new(*tokenservice.Failure)): // after a failure of storage the exchange is tried at once
		return v.trouble.err
	}
	if until := v.promised(); !w.background && now.Before(until) {
		return tryAgain("tenant %q: leases on its access token last until %s, and an exchange would end that before: try again then; an update of tenants/%s/refresh does not wait", t.name, stamp(until.Truncate(time.Second)), t.name)
	}
	return nil
}

// fly is a tenant's flight from its start to its end.
func (x *exchanger) fly(f *flight) {
	t := f.t
	var err error
	if f.want.change == nil && f.v.kept != nil {
		err = x.tenants.lockAndStore(x.ctx, t, f.v.kept, func() {})
		if err != nil && !errors.Is(err, errSuperseded) {
			x.fail(f, nil, err)
		}
	} else {
		err = x.call(f)
	}
	t.land(f, err)
	x.landed(t, err)
	x.tenants.release(t)
	x.revocations.wakeAll() // the flight may have given up tokens
}

// call makes the exchange of a flight, and stores its result.
func (x *exchanger) call(f *flight) error {
	entry := f.v.entry
	if c := f.want.change; c != nil {
		entry = c.apply(entry)
	}
	if entry.Unleased != nil {
		if err := x.tenants.resolveUnleased(x.ctx, f.t, entry); err != nil {
			return storageTrouble(f.t.name, err)
		}
	}
	if f.want.background && !f.t.mayEnd(time.Now()) {
		return errSuperseded // a reader has just got the access token that this exchange would end
	}
	var lost *tokenservice.Result // of the first request, where its answer was lost
	for {
		via, err := x.connectors.of(x.ctx, f.connector)
		if err != nil {
			return x.storeAnswer(f, entry, nil, tokenservice.Result{Err: err})
		}
		if f.want.result != nil {
			// A grant has brought an access token already, by a connector that may have been written since: it says nothing of the present one.
			return x.storeAnswer(f, entry, via, f.want.result.result)
		}
		var result tokenservice.Result
		if result.Err = via.incomplete; result.Err == nil {
			f.way = x.newPassage(f, entry, via)
			request := tokenservice.Exchange{RefreshToken: entry.RefreshToken, Permit: f.way.permit}
			if m := entry.Move; m != nil && m.From == via.entry.address() {
				request.Endpoint = m.To // the service has moved this tenant
			}
			result = via.service.Exchange(x.ctx, request)
		}
		if errors.Is(result.Err, errReplaced) && result.RefreshToken == "" {
			if c := f.way.call; c != nil {
				c.Settle(x.ctx) // it was noted, and not sent
			}
			continue // the connector was written meanwhile: begin again with the present one
		}
		storeVerdict := x.connectors.judge(via, result.Err)
		if lost != nil && result.Sent.IsZero() {
			result = *lost // there was no second request, and the service may have carried out the first
		}
		if result.Err != nil && lostAnswer(result) && via.about.RetryLost && lost == nil && x.ctx.Err() == nil {
			lost, f.lost = &result, true
			storeVerdict(x.ctx)
			continue
		}
		err = x.storeAnswer(f, entry, via, result)
		storeVerdict(x.ctx)
		return err
	}
}

// newPassage returns what permits the requests of a flight. A flight that a reader waits for goes before background work.
func (x *exchanger) newPassage(f *flight, entry *tenantEntry, via *loadedConnector) *passage {
	stored := f.v.entry
	p := &passage{via: via, stopping: x.stopping, placed: f.place, want: share.Want{
		Tenant: f.t.name, Wait: patience,
		Unstored: stored == nil || stored.RefreshToken != entry.RefreshToken,
		Hop:      f.lost, // one more try after a lost answer belongs to the exchange that has begun
	}}
	if f.want.background {
		p.alone = f.alone
	}
	return p
}

func lostAnswer(r tokenservice.Result) bool {
	failure, ok := errors.AsType[*tokenservice.Failure](r.Err)
	return ok && failure.Lost && r.RefreshToken == ""
}

// storeAnswer turns the service's answer into an outcome and stores it. It runs to its end when the callers have gone.
func (x *exchanger) storeAnswer(f *flight, entry *tenantEntry, via *loadedConnector, r tokenservice.Result) error {
	o := x.outcome(f, entry, via, r)
	if f.want.change != nil && !o.precious() {
		f.answered(x.ctx, r.Err)
		if stored := f.v.entry; stored != nil && stored.RefreshToken == o.sent && (f.lost || lostAnswer(r)) {
			x.failLost(f, stored.Connector)
		}
		return r.Err // the operator's write is not stored
	}
	if r.Err != nil && !o.changes(entry) {
		f.answered(x.ctx, r.Err)
		return x.fail(f, via, r.Err)
	}
	if o.access != nil {
		f.t.ended(o.sent)
	}
	var issued error
	err := x.tenants.lockAndStore(x.ctx, f.t, o, func() {
		if r.Err == nil && o.ownToken {
			issued = x.issueOwn(f, o)
		}
	})
	switch {
	case errors.Is(err, errSuperseded), err != nil && o.isWritersAlone():
		return err
	case err != nil:
		return x.fail(f, via, err)
	case r.Err == nil:
		return issued
	}
	f.lost = f.lost || o.refreshToken != "" // and the exchange has ended older access tokens where the service does that
	if err := x.fail(f, via, r.Err); f.want.change == nil {
		return err
	}
	return nil // the write is stored, and the tenant says what is wrong
}

// failLost notes that an answer was lost to a verification which sent the refresh token that the tenant has already. The service may have
// replaced that, and ended the access token, so the tenant's own exchange is tried soon.
func (x *exchanger) failLost(f *flight, connector string) {
	own := &flight{t: f.t, v: f.v, connector: connector}
	_ = x.fail(own, x.connectors.present(connector), &tokenservice.Failure{
		Kind: tokenservice.Unavailable, Lost: true,
		Text: "The answer to the exchange that verified a write was lost, and the service may have carried it out. The exchange is tried again.",
	})
}

// outcome makes a value of what the service has answered.
func (x *exchanger) outcome(f *flight, entry *tenantEntry, via *loadedConnector, r tokenservice.Result) *outcome {
	o := &outcome{
		from:         f.v.lineage(),
		change:       f.want.change,
		connector:    f.connector,
		sent:         entry.RefreshToken,
		at:           time.Now().UTC().Truncate(time.Millisecond),
		refreshToken: r.RefreshToken,
		facts:        r.Facts,
		subject:      r.Subject,
		move:         entry.Move,
		rejected:     r.Err != nil && isRejection(r.Err) && f.want.change == nil && r.RefreshToken == "",
		retires:      f.retires(),
		ownToken:     f.want.ownToken,
	}
	if via == nil {
		return o
	}
	if f.want.result == nil && !r.Sent.IsZero() {
		o.move = nil
		if r.Endpoint != "" {
			o.move = &move{From: via.entry.address(), To: r.Endpoint}
		}
	}
	if r.Err != nil || r.AccessToken == nil {
		return o
	}
	o.access = newAccessToken(f.t.name, &accessEntry{
		Token:       r.AccessToken.Token,
		Generation:  rand.Text(),
		Type:        r.AccessToken.Type,
		EndpointURL: r.AccessToken.EndpointURL,
		Scope:       r.AccessToken.Scope,
		Obtained:    r.Sent.UTC().Truncate(time.Millisecond),
		Expires:     r.AccessToken.Expires,
	})
	return o
}

// issueOwn stores the record of an access token for one lease, and hands the token over to its reader. Without the record the token is
// revoked. The caller holds the tenant's lock: a write or a delete of the tenant comes after the record, and leaves the token to its lease.
func (x *exchanger) issueOwn(f *flight, o *outcome) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(x.ctx), storeWithin)
	defer cancel()
	if f.parting.Load() == abandoned {
		return x.revocations.revokeLater(ctx, o.connector, f.t.name, o.access.accessEntry)
	}
	if err := x.revocations.hold(ctx, o.connector, f.t.name, o.access.accessEntry, true); err != nil {
		if x.revocations.revokeLater(ctx, o.connector, f.t.name, o.access.accessEntry) != nil {
			x.revocations.remember(o.connector, f.t.name, o.access.accessEntry, nil)
		}
		return storageTrouble(f.t.name, errStorage)
	}
	f.t.noteIssued(o.access.Generation)
	if !f.parting.CompareAndSwap(0, handedOver) {
		_, err := x.revocations.revokeHeldLater(ctx, f.t.name, o.access.Generation)
		if err != nil {
			x.revocations.remember(o.connector, f.t.name, o.access.accessEntry, nil)
		}
		return err
	}
	f.token = o.access
	return nil
}

// fail notes why the tenant's exchange failed, and when it is tried again. It returns the error.
func (x *exchanger) fail(f *flight, via *loadedConnector, err error) error {
	switch {
	case x.ctx.Err() != nil, errors.As(err, new(*share.LimitError)), errors.Is(err, logical.ErrReadOnly), errors.Is(err, errReplaced), errors.Is(err, errStopping):
		return err // not a failure of the service
	}
	now, before := time.Now(), f.t.view.Load()
	next := &trouble{err: err, at: now, until: now.Add(f.t.backOff()), lost: f.lost}
	if before.trouble != nil {
		next.lost = next.lost || before.trouble.lost // until an exchange succeeds
	}
	about := tokenservice.About{Name: "the service"}
	if via != nil {
		next.revision, about = via.revision, via.about
	}
	next.text = readerError(about, f.t.name, f.connector, err).Error()
	failure, ok := errors.AsType[*tokenservice.Failure](err)
	if ok {
		next.lost = next.lost || failure.Lost
		switch {
		case via == nil:
		case failure.Kind == tokenservice.RefusedConnector:
			next.until = via.nextProbe()
		case failure.Kind == tokenservice.Limited:
			next.until = via.share.PausedUntil()
		default:
			next.until = latest(next.until, via.share.PausedUntil())
		}
	}
	if a := before.access; a != nil && !a.Planned.IsZero() && !next.lost {
		// The access token lives until the next try, and is handed out for leases that end before it.
		next.until = latest(next.until, earliest(now.Add(plannedRetryLeast), a.Expires))
		if failure != nil && (isLimit(failure) || failure.Kind == tokenservice.RefusedConnector || asksForRest(failure)) {
			next.until = next.until.Add(leaseMargin) // the rest ends leaseMargin earlier, and no call is permitted before
		}
	}
	// The log has one line for each outage, though reasons differ from one try to the next: the status shows the last reason.
	of := []string{f.v.lineage()}
	if c := f.want.change; c != nil {
		of = append(of, c.lineage)
	}
	news, superseded := f.t.failed(next, of...)
	if superseded {
		return errSuperseded // it was another refresh token, or another connector, that failed
	}
	if news && !isRejection(err) {
		x.announce.failed(f.t.name, f.connector, next)
	}
	return err
}

func isRejection(err error) bool {
	failure, ok := errors.AsType[*tokenservice.Failure](err)
	return ok && failure.Kind == tokenservice.RefusedRefreshToken
}
