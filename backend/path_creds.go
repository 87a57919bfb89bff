package backend

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"math"
	"net/http"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
)

// A lease ends leaseMargin before its access token, by whole seconds, and lasts
// one at the least; an access token that cannot carry such a lease is not leased.
const (
	leaseMargin = 2 * time.Second
	leaseLeast  = leaseMargin + time.Second
)

func (b *backend) credsPaths() []*framework.Path {
	fields := map[string]*framework.FieldSchema{
		"tenant": tenantField,
		"min_ttl": {
			Type:        framework.TypeDurationSecond,
			Query:       true,
			Description: "Life that the access token must have left. Can only raise the tenant's min_ttl, to half an access token's life at most.",
		},
	}
	return []*framework.Path{
		{
			Pattern: "creds/" + framework.GenericNameRegex("tenant"),
			Fields:  fields,
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.ReadOperation: operation("generate", "credentials", "Read a leased access token of a tenant.",
					"Every reader gets the tenant's current access token while it is usable. Revoking the last lease on it before its end makes sure that it is never handed out again.",
					responses(http.StatusOK, "A leased access token.", credsFields), b.readCreds),
			},
			DisplayAttrs:    &framework.DisplayAttributes{OperationPrefix: operationPrefix},
			HelpSynopsis:    "Read a leased access token of a tenant.",
			HelpDescription: credsHelp,
		},
		{
			Pattern: "token/" + framework.GenericNameRegex("tenant"),
			Fields:  fields,
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.ReadOperation: operation("read", "token", "Read an access token of a tenant without a lease.",
					"For sidecars and gateways that read on every request. Nothing is left behind in Vault; the answer says when to read again.",
					responses(http.StatusOK, "An access token without a lease.", credsFields, tokenFields), b.readToken),
			},
			DisplayAttrs:    &framework.DisplayAttributes{OperationPrefix: operationPrefix},
			HelpSynopsis:    "Read an access token of a tenant without a lease.",
			HelpDescription: tokenHelp,
		},
	}
}

// readCreds answers creds/:tenant with the tenant's access token and a lease.
func (b *backend) readCreds(ctx context.Context, _ *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	minTTL, err := minTTLOf(d)
	if err != nil {
		return answer(err)
	}
	t, s, token, err := b.accessToken(ctx, d, minTTL, leaseLeast, (*accessToken).lease)
	if err != nil {
		return answer(err)
	}
	resp := b.leaseOf(s.entry, token)
	b.warn(resp, t, s.entry)
	if ctx.Err() != nil {
		// Vault may or may not have registered a lease for a reader who has gone.
		token.doubt()
	}
	return resp, nil
}

// readToken answers token/:tenant with the tenant's access token alone.
func (b *backend) readToken(ctx context.Context, _ *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	minTTL, err := minTTLOf(d)
	if err != nil {
		return answer(err)
	}
	t, s, token, err := b.accessToken(ctx, d, minTTL, 0, (*accessToken).current)
	if err != nil {
		return answer(err)
	}
	until := s.entry.usableUntil(minTTL)
	data := token.response()
	data["ttl"] = max(0, int64(time.Until(until)/time.Second))
	data["rotation_period"] = max(1, int64(until.Sub(token.Obtained)/time.Second))
	data["last_vault_rotation"] = token.shown.obtained
	resp := &logical.Response{Data: data}
	b.warn(resp, t, s.entry)
	return resp, nil
}

func (a *accessToken) response() map[string]any {
	return map[string]any{
		"access_token": a.shown.token,
		"endpoint_url": a.shown.endpointURL,
		"scope":        a.shown.scope,
		"expire_time":  a.shown.expires,
		"tenant":       a.shown.tenant,
	}
}

// minTTLOf returns the reader's own min_ttl, 0 where he has none.
func minTTLOf(d *framework.FieldData) (time.Duration, error) {
	if d.Raw["min_ttl"] == nil {
		return 0, nil
	}
	return seconds(d, "min_ttl")
}

// accessToken returns an access token with minTTL of life left, by the reader's
// wish, and leastLeft for the engine's own reasons. take claims it for the
// reader, and fails on a token that was given up meanwhile.
//
// While there is a usable token this waits for nobody. Otherwise it starts the
// tenant's one exchange, or joins it, and waits no longer than answerWithin; the
// exchange goes on without its readers.
func (b *backend) accessToken(ctx context.Context, d *framework.FieldData, minTTL, leastLeft time.Duration, take func(*accessToken) bool) (*tenant, *tenantState, *accessToken, error) {
	name, err := nameOf(d, "tenant")
	if err != nil {
		return nil, nil, nil, err
	}
	serve := func(t *tenant, s *tenantState) (*accessToken, error) {
		if err := minTTLFits(s.entry, minTTL); err != nil {
			return nil, err
		}
		token := s.usable(time.Now(), max(minTTL, leastLeft))
		if token == nil || !take(token) {
			return nil, nil
		}
		b.markUsed(t, s)
		return token, nil
	}
	if t, s := b.tenants.cached(name); s != nil {
		if token, err := serve(t, s); token != nil || err != nil {
			return t, s, token, err
		}
	}

	waiting, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	for exchanges := 0; ; {
		t, s, err := b.tenants.load(waiting, name)
		switch {
		case ctx.Err() != nil:
			return nil, nil, nil, ctx.Err()
		case err != nil:
			return nil, nil, nil, err
		case t == nil:
			return nil, nil, nil, unknownTenant(name)
		}
		if token, err := serve(t, s); token != nil || err != nil {
			return t, s, token, err
		}
		if exchanges == 2 {
			return nil, nil, nil, tryAgain("tenant %q: Kaizala's new access token was given up, or lives too shortly, before it could be read: compare the clocks of Vault and Kaizala, and try again", name)
		}
		err = b.exchangeAndWait(waiting, t, s, false)
		switch {
		case ctx.Err() != nil:
			return nil, nil, nil, ctx.Err()
		case errors.Is(err, errSuperseded):
			continue
		case errors.Is(err, context.DeadlineExceeded):
			return nil, nil, nil, tryAgain("Kaizala has not answered for tenant %q yet: the exchange goes on and its result will be kept; nothing was lost, try again later", name)
		case err != nil:
			return nil, nil, nil, readerError(name, s.entry.Connector, err)
		}
		exchanges++
	}
}

// minTTLFits refuses what no access token of the tenant can give, as soon as the
// life of one is known.
func minTTLFits(e *tenantEntry, minTTL time.Duration) error {
	if half := e.AccessTokenLife / 2; e.AccessTokenLife > 0 && minTTL > half {
		return badValue("min_ttl is more than half of an access token's life: %s at most", half.Truncate(time.Second))
	}
	return nil
}

// markUsed notes that somebody uses the current access token, which is why it
// will be renewed ahead of its end.
func (b *backend) markUsed(t *tenant, s *tenantState) {
	if !t.used.Load() && !t.used.Swap(true) {
		b.schedule(t, s.entry)
	}
}

// warn adds what whoever reads should pass on.
func (b *backend) warn(resp *logical.Response, t *tenant, e *tenantEntry) {
	now := time.Now()
	if trouble := t.trouble.Load(); trouble != nil {
		resp.AddWarning(fmt.Sprintf("The access token could not be renewed, and this one ends at %s: %s", e.Access.Expires.Format(time.RFC3339), trouble.text))
	}
	if danger := t.danger(e, now); danger != "" {
		resp.AddWarning(danger)
	}
}

// flight is a tenant's one exchange under way.
type flight struct {
	done chan struct{}
	err  error // to be read once done is closed
}

// errSuperseded ends an exchange whose refresh token was replaced or deleted
// by an operator meanwhile: its result is worth nothing.
var errSuperseded = errors.New("superseded by a write or a delete")

// exchangeAndWait joins the tenant's exchange or starts one, and waits for it.
// A forced one disregards the tenant's backoff and rejection.
func (b *backend) exchangeAndWait(ctx context.Context, t *tenant, s *tenantState, force bool) error {
	f, err := b.join(ctx, t, s, force)
	if err != nil {
		return err
	}
	select {
	case <-f.done:
		return f.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// join returns the tenant's exchange under way, or starts one, unless the state
// has changed since it was read.
func (b *backend) join(ctx context.Context, t *tenant, s *tenantState, force bool) (*flight, error) {
	if !b.node.WriteSafeReplicationState() {
		return nil, logical.ErrReadOnly
	}
	via, err := b.connectorOf(ctx, s.entry)
	if err != nil {
		return nil, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case t.flight != nil:
		return t.flight, nil
	case t.unsaved != nil:
		return b.launch(t, func() error { return b.saveUnsaved(t) })
	case t.state.Load() != s:
		return nil, errSuperseded
	}
	if err := b.blocked(t, s.entry, via, force); err != nil {
		return nil, err
	}
	a := attempt{t: t, entry: s.entry, via: via, epoch: t.epoch}
	return b.launch(t, func() error { return b.exchange(b.ctx, a) })
}

// connectorOf returns the connector that a tenant uses.
func (b *backend) connectorOf(ctx context.Context, e *tenantEntry) (*loadedConnector, error) {
	via, err := b.connectors.get(ctx, e.Connector)
	if err == nil && via == nil {
		err = unknownConnector(e.Connector)
	}
	return via, err
}

// blocked says why the tenant is not to be exchanged now, without a call.
func (b *backend) blocked(t *tenant, e *tenantEntry, via *loadedConnector, force bool) error {
	now := time.Now()
	refusal := via.refused.Load()
	paused := via.share.pausedUntil()
	trouble := t.trouble.Load()
	switch {
	case refusal != nil:
		return refusal
	case paused.After(now):
		return &limitError{until: paused, byService: true}
	case e.expired(now):
		return badValue("%s", expiredText(t.name, e))
	case force:
		return nil
	case !e.Rejected.IsZero():
		return &serviceError{kind: refusedRefreshToken}
	case trouble != nil && trouble.until.After(now) && trouble.revision == via.revision && errors.As(trouble.err, new(*serviceError)):
		return trouble.err // what storage alone is to blame for is tried at once
	}
	return nil
}

// launch runs the tenant's one flight. The caller holds t.mu, and there is none.
func (b *backend) launch(t *tenant, run func() error) (*flight, error) {
	f := &flight{done: make(chan struct{})}
	started := b.goWork(func() {
		err := run()
		t.mu.Lock()
		t.flight, t.pending = nil, ""
		t.mu.Unlock()
		f.err = err
		close(f.done)
		b.tenants.drop(t)
		switch e := t.base(); {
		case e == nil:
		case errors.Is(err, logical.ErrReadOnly):
			b.later(t.name, time.Now().Add(window)) // no failure to back off from, and no reason to try at once
		default:
			b.schedule(t, e)
		}
	})
	if !started {
		return nil, errStopping
	}
	t.flight = f
	return f, nil
}

// attempt is what an exchange is made of.
type attempt struct {
	t     *tenant
	entry *tenantEntry // its refresh token is exchanged
	via   *loadedConnector
	epoch uint64 // of the tenant, when the attempt began

	// change is an operator's write that this exchange verifies; nil: none. It
	// is stored when the exchange succeeds, and nothing of it when it fails.
	change *tenantChange
	// permitted is the first call, where its place in the share has been taken
	// already.
	permitted *call
}

// exchange turns the tenant's refresh token into an access token, stores what
// comes back, and then lets readers see it.
func (b *backend) exchange(ctx context.Context, a attempt) error {
	call := serviceCall{refreshToken: a.entry.RefreshToken}
	asked := time.Now() // an access token's life is counted from here
	call.permit = func(ctx context.Context) (func(), error) {
		c := a.permitted
		a.permitted = nil
		if c == nil {
			var err error
			if c, err = a.via.permit(ctx, a.t.name, patience, false); err != nil {
				return nil, err
			}
		}
		// A node that cannot write calls nobody, whatever the reason: what came back
		// would be lost with the process, and the next one, or another node that
		// leads already, would not know of the call.
		if err := b.connectors.note(ctx, a.via, c); err != nil {
			a.via.share.withdraw(c)
			return nil, storageTrouble(a.t.name, err)
		}
		asked = time.Now()
		return func() { a.via.share.end(c) }, nil
	}
	to := a.entry.Move
	if to != nil && to.From == a.via.entry.APIRoot {
		call.endpoint = to.To
	}
	call.moved = func(endpoint string) {
		if to = nil; endpoint != "" {
			to = &move{From: a.via.entry.APIRoot, To: endpoint}
		}
	}
	b.askTTLs()
	g, err := a.via.service.exchange(ctx, call)
	return b.settle(a, g, err, to, asked)
}

// settle takes in the result of an exchange. It runs to its end whoever has gone
// away meanwhile.
func (b *backend) settle(a attempt, g *grant, failure error, to *move, asked time.Time) error {
	t := a.t
	_ = t.lock(context.WithoutCancel(b.ctx)) // whoever holds it is bounded
	defer t.unlock()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(b.ctx), storeWithin)
	defer cancel()

	base := a.entry
	if b.tenants.read(ctx, t) == nil {
		base = t.base()
	}
	t.mu.Lock()
	stale := t.epoch != a.epoch
	t.mu.Unlock()
	if a.change == nil {
		stale = stale || base == nil || base.RefreshToken != a.entry.RefreshToken
	}
	if stale {
		return errSuperseded
	}
	if g == nil {
		return b.settleFailure(ctx, a, base, failure, to)
	}

	var next tenantEntry
	if a.change != nil {
		next = *a.change.apply(base)
		next.Access = nil
	} else {
		next = *base
	}
	now := time.Now().UTC().Truncate(time.Millisecond)
	next.Move = to
	rotated := g.refreshToken != ""
	if rotated {
		next.RefreshToken, next.RefreshTokenOrigin, next.RefreshTokenSet = g.refreshToken, originService, now
		next.Facts, _ = a.via.service.check(g.refreshToken)
		next.Rejected = time.Time{}
	}
	var fresh *accessToken
	if failure == nil {
		next.Access = &accessEntry{
			Token:       g.accessToken,
			Generation:  rand.Text(),
			EndpointURL: g.endpointURL,
			Scope:       g.scope,
			Obtained:    asked.UTC().Truncate(time.Millisecond),
			Expires:     g.expires,
		}
		next.AccessTokenLife = next.Access.life()
		next.Verified, next.Rejected, next.LastExchange = true, time.Time{}, now
		fresh = newAccessToken(t.name, next.Access)
	}
	t.mu.Lock()
	t.fresh = fresh
	if a.change != nil {
		t.epoch++
	}
	t.mu.Unlock()
	t.used.Store(false)
	if err := b.tenants.save(ctx, t, &next); err != nil {
		if a.change != nil && !rotated {
			t.doubted.Store(true)
			return storageTrouble(t.name, err) // the writer still has what he wrote
		}
		t.mu.Lock()
		t.unsaved = &next
		t.mu.Unlock()
		return b.fail(a, keptTrouble(t.name))
	}
	if rotated {
		b.announce(ctx, t, &next, eventRotated)
	}
	if failure == nil {
		b.recover(t, &next)
		return nil
	}
	err := b.fail(a, failure)
	if a.change != nil {
		return nil // the write is stored, and the tenant says what is wrong
	}
	return err
}

// settleFailure takes in that the service gave nothing.
func (b *backend) settleFailure(ctx context.Context, a attempt, base *tenantEntry, failure error, to *move) error {
	refusal := (*serviceError)(nil)
	if errors.As(failure, &refusal) {
		switch {
		case refusal.kind == refusedConnector:
			if b.connectors.refuse(ctx, a.via, refusal) {
				b.Logger().Error("Kaizala refuses a connector: no calls through it until its owner has written the right connector_id and connector_secret", "connector", a.via.name)
			}
		case refusal.kind == limited:
			b.connectors.pause(ctx, a.via, retryAfter(refusal))
		}
	}
	if a.change != nil {
		return failure
	}
	rejected := isRejection(failure)
	if rejected && base.Rejected.IsZero() || !moveEqual(to, base.Move) {
		next := *base
		next.Move = to
		if rejected {
			next.Rejected = time.Now().UTC().Truncate(time.Millisecond)
		}
		if err := b.tenants.save(ctx, a.t, &next); err != nil {
			// Memory knows it all the same; a restart would ask the service once more.
			b.tenants.publish(a.t, &next)
		}
		if rejected {
			b.announce(ctx, a.t, &next, eventRejected)
		}
	}
	return b.fail(a, failure)
}

func moveEqual(a, b *move) bool {
	return a == b || a != nil && b != nil && *a == *b
}

// saveUnsaved tries again to store what the service has sent.
func (b *backend) saveUnsaved(t *tenant) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(b.ctx), storeWithin)
	defer cancel()
	if err := t.lock(ctx); err != nil {
		return storageTrouble(t.name, err)
	}
	defer t.unlock()
	t.mu.Lock()
	next := t.unsaved
	t.mu.Unlock()
	if next == nil {
		return nil
	}
	rotated := t.rotatedTo(next)
	if err := b.tenants.save(ctx, t, next); err != nil {
		return b.fail(attempt{t: t, entry: next}, keptTrouble(t.name))
	}
	b.recover(t, next)
	if rotated {
		b.announce(ctx, t, next, eventRotated)
	}
	return nil
}

// rotatedTo says whether an entry that is not stored yet has another refresh
// token than the one that is, and not just another access token.
func (t *tenant) rotatedTo(next *tenantEntry) bool {
	s := t.state.Load()
	return s == nil || s.entry.RefreshToken != next.RefreshToken
}

func (b *backend) saveAll(ctx context.Context) {
	b.tenants.each(func(t *tenant) {
		if ctx.Err() != nil || t.lock(ctx) != nil {
			return
		}
		defer t.unlock()
		t.mu.Lock()
		next := t.unsaved
		t.mu.Unlock()
		if next != nil {
			if err := b.tenants.save(ctx, t, next); err != nil && t.rotatedTo(next) {
				b.Logger().Error("a new refresh token could not be stored before the engine stopped, and is lost: its tenant user may have to generate another", "tenant", t.name, "connector", next.Connector)
			}
		}
	})
}

// storageTrouble says that Vault's storage failed a tenant. Read-only storage
// stays what it is, so that Vault asks the node that may write.
func storageTrouble(tenant string, err error) error {
	if errors.Is(err, logical.ErrReadOnly) {
		return err
	}
	return tryAgain("Vault's storage did not take what tenant %q needs stored: nothing was lost, and it will be tried again", tenant)
}

// keptTrouble says that what the service has sent is in memory alone. It is not
// read-only storage's error: another node would exchange the refresh token that
// the service has replaced.
func keptTrouble(tenant string) error {
	return tryAgain("Vault's storage has not taken the new tokens of tenant %q yet: they are kept in memory, and storing them is tried again; nothing was lost", tenant)
}

// fail notes why the tenant's exchange failed, and when it is tried again.
func (b *backend) fail(a attempt, err error) error {
	if b.ctx.Err() != nil || errors.As(err, new(*limitError)) || errors.Is(err, logical.ErrReadOnly) {
		return err // nobody has failed
	}
	now := time.Now()
	next := &trouble{err: err, at: now, until: now.Add(a.t.backOff())}
	if a.via != nil {
		next.revision = a.via.revision
	}
	next.text = readerError(a.t.name, a.entry.Connector, err).Error()
	if refusal := (*serviceError)(nil); errors.As(err, &refusal) {
		switch refusal.kind {
		case unavailable:
			next.until = latest(next.until, now.Add(min(refusal.retryAfter, window)))
		case limited:
			next.until = a.via.share.pausedUntil()
		case refusedConnector:
			next.until = now.Add(window) // no call is made before config is written
		}
	}
	// Once for each outage: reasons differ from one try to the next, and the
	// status has the last.
	if old := a.t.trouble.Swap(next); old == nil && !isRejection(err) {
		b.Logger().Warn("an exchange failed and will be tried again", "tenant", a.t.name, "connector", a.entry.Connector, "reason", next.text, "next_try", next.until.UTC().Format(time.RFC3339))
	}
	return err
}

func isRejection(err error) bool {
	refusal := (*serviceError)(nil)
	return errors.As(err, &refusal) && refusal.kind == refusedRefreshToken
}

// recover ends a tenant's trouble.
func (b *backend) recover(t *tenant, e *tenantEntry) {
	if t.trouble.Load() != nil {
		b.Logger().Info("exchanges of a tenant succeed again", "tenant", t.name, "connector", e.Connector)
	}
	t.recovered()
}

// leaseOf makes the lease that goes with an access token. It ends before the
// token does, and so does any renewal of it.
func (b *backend) leaseOf(e *tenantEntry, token *accessToken) *logical.Response {
	most := wholeSeconds(time.Until(token.Expires)) - leaseMargin
	if e.MaxTTL > 0 {
		most = min(most, e.MaxTTL)
	}
	return &logical.Response{
		Data: token.response(),
		Secret: &logical.Secret{
			LeaseOptions: logical.LeaseOptions{
				TTL:       b.leaseTTL(e, most),
				MaxTTL:    most,
				Renewable: b.leavesRoom(e, most),
			},
			InternalData: map[string]any{
				"secret_type":   accessTokenType,
				leaseTenant:     token.shown.tenant,
				leaseGeneration: token.shown.generation,
				leaseExpires:    token.shown.expires,
			},
		},
	}
}

// leaseTTL is the TTL of a lease that ends within most: the tenant's or the
// mount's. 0 leaves the mount's to Vault, which knows it best; but where that is
// beyond most, Vault would warn each reader that it had to be cut.
func (b *backend) leaseTTL(e *tenantEntry, most time.Duration) time.Duration {
	if e.TTL == 0 && time.Duration(b.defaultTTL.Load()) < most {
		return 0
	}
	if e.TTL == 0 {
		return most
	}
	return min(e.TTL, most)
}

// leavesRoom says whether a lease can be renewed before it has lasted for most,
// or for as long as the mount allows.
func (b *backend) leavesRoom(e *tenantEntry, most time.Duration) bool {
	if longest := time.Duration(b.maxTTL.Load()); longest > 0 {
		most = min(most, longest)
	}
	ttl := e.TTL
	if ttl == 0 {
		ttl = time.Duration(b.defaultTTL.Load())
	}
	return ttl > 0 && ttl < most
}

func wholeSeconds(d time.Duration) time.Duration {
	return time.Duration(math.Floor(d.Seconds())) * time.Second
}
