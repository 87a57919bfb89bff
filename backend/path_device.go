package backend

import (
	"context"
	"errors"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/share"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/tokenservice"
)

const (
	// slowerBy is what slow_down adds to the interval (RFC 8628, section 3.5).
	slowerBy = 5 * time.Second
	// longestInterval bounds the time between two polls while the service fails; each failure doubles it.
	longestInterval = time.Minute
)

// poll is the polling of a tenant's device code. It goes on while the [grants] have it.
type poll struct {
	tenant, id string        // id is the attempt's
	connector  string        // "": not polled yet
	rest       time.Duration // after a failure
}

// startDevice begins the device authorization flow (RFC 8628).
func (b *backend) startDevice(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	a, via, err := b.newAttempt(ctx, req, d, byDevice)
	if err != nil {
		return nil, err
	}
	scopes, hint, err := via.asked(d)
	if err != nil {
		return nil, err
	}
	p := passage{via: via, want: share.Want{Class: share.Background, Wait: patience}, tellsNothing: true}
	start, err := via.service.(tokenservice.DeviceFlow).StartDevice(ctx, tokenservice.DeviceRequest{Scopes: scopes, LoginHint: hint, Permit: p.permit})
	if err != nil {
		return nil, b.notBegun(ctx, a, via, err)
	}
	a.DeviceCode, a.Interval, a.Expires = start.DeviceCode, start.Interval, start.Expires
	if err := b.begin(ctx, a); err != nil {
		return nil, err
	}
	b.grants.mu.Lock()
	b.beginPolling(a)
	b.grants.mu.Unlock()
	data := map[string]any{
		"user_code":        start.UserCode,
		"verification_uri": start.VerificationURI,
		"expire_time":      stamp(a.Expires),
	}
	if start.VerificationURIComplete != "" {
		data["verification_uri_complete"] = start.VerificationURIComplete
	}
	return b.warnOfLeases(&logical.Response{Data: data}, a), nil
}

// notBegun says why the service has not begun an attempt. What was pending for the tenant is pending still.
func (b *backend) notBegun(ctx context.Context, a *attempt, via *loadedConnector, err error) error {
	b.connectors.judge(via, err)(ctx)
	failure := (*tokenservice.Failure)(nil)
	switch {
	case errors.Is(err, errReplaced):
		return tryAgain("connector %q was written meanwhile: try again", a.Connector)
	case errors.Is(err, context.DeadlineExceeded):
		return tryAgain("%s has not answered in time: try again", upperFirst(via.about.Name))
	case errors.As(err, &failure) && failure.Kind == tokenservice.Refused:
		return badValue("%s", failure.Text)
	case errors.As(err, &failure) && failure.Kind == tokenservice.Unavailable:
		return tryAgain("nothing was begun: %s", failure.Text)
	}
	return fieldProblem(b.readerError(a.Tenant, a.Connector, err))
}

// beginPolling has the service asked about an attempt's device code, an interval from now and then again and again. It ends the polling of
// another attempt of the tenant. The caller holds the grants' mu.
func (b *backend) beginPolling(a *attempt) {
	p := &poll{tenant: a.Tenant, id: a.ID}
	b.grants.polls[a.Tenant] = p
	b.pollAfter(p, a.Interval)
}

// pollAfter has the service asked some time from now, unless the polling has ended by then.
func (b *backend) pollAfter(p *poll, wait time.Duration) {
	time.AfterFunc(max(wait, time.Second), func() {
		b.goToService(func() { b.pollDevice(p) })
	})
}

// stopPolling ends the questions about a tenant's device code: of that attempt, or with "" of any.
func (g *grants) stopPolling(tenant, id string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if p := g.polls[tenant]; p != nil && (id == "" || p.id == id) {
		delete(g.polls, tenant)
	}
}

func (g *grants) isPolled(p *poll) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.polls[p.tenant] == p
}

// failed says how long the next question waits while the service fails: the interval, and twice as long each time.
func (p *poll) failed(interval time.Duration) time.Duration {
	p.rest = max(interval, min(2*max(p.rest, interval), longestInterval))
	return p.rest
}

// turn says how long a poll through a connector waits for the next at the least, so that each of those that are polled has a
// place in the share in its turn, and none goes without one by chance.
func (g *grants) turn(p *poll, via *loadedConnector) time.Duration {
	g.mu.Lock()
	defer g.mu.Unlock()
	p.connector = via.name
	polled := 0
	for _, p := range g.polls {
		if p.connector == via.name {
			polled++
		}
	}
	return time.Duration(polled) * share.Window / time.Duration(share.Fifth(via.entry.ExchangesPerMinute))
}

// pollDevice asks the service once whether the person has decided, and plans the next question.
func (b *backend) pollDevice(p *poll) {
	if !b.grants.isPolled(p) || b.ctx.Err() != nil {
		return
	}
	if !b.node.WriteSafeReplicationState() {
		b.pollAfter(p, longestInterval) // another node asks; look again when this one may have become it
		return
	}
	a, err := b.pending(b.ctx, p.tenant, byDevice)
	switch {
	case err != nil:
		b.pollAfter(p, longestInterval)
		return
	case a == nil:
		b.grants.stopPolling(p.tenant, p.id)
		b.sweep(p.tenant)
		return
	case a.ID != p.id: // another node has begun a newer one since
		b.grants.mu.Lock()
		defer b.grants.mu.Unlock()
		b.beginPolling(a)
		return
	}
	via, err := b.connectors.of(b.ctx, a.Connector)
	if err != nil {
		b.pollAfter(p, p.failed(a.Interval))
		return
	}
	flow, ok := via.service.(tokenservice.DeviceFlow)
	if !ok || !a.comesFrom(via) {
		b.endPolling(a, via, a.connectorHasMoved())
		return
	}
	b.grants.claim(p.id)
	way := passage{
		via: via, want: share.Want{Class: share.Housekeeping, Wait: hopPatience}, stopping: b.isStopping,
		noted: func(context.Context) error {
			if !b.grants.isPolled(p) {
				return errUsed // it has ended while this waited
			}
			return nil
		},
	}
	result := flow.PollDevice(b.ctx, a.DeviceCode, way.permit)
	storeVerdict := b.connectors.judge(via, result.Err)
	wait, over := b.nextPoll(p, a, via, result)
	if over {
		b.endPolling(a, via, result)
	}
	b.grants.leave(p.id) // before the next poll claims it
	if !over {
		b.pollAfter(p, wait)
	}
	storeVerdict(b.ctx)
}

// nextPoll says how long the next question waits after this result. over: there is none, because this is the last.
func (b *backend) nextPoll(p *poll, a *attempt, via *loadedConnector, result tokenservice.Result) (wait time.Duration, over bool) {
	failure, limit := (*tokenservice.Failure)(nil), (*share.LimitError)(nil)
	switch {
	case result.Err == nil || result.RefreshToken != "" || result.AccessToken != nil:
		return 0, true
	case errors.As(result.Err, &limit):
		return max(a.Interval, time.Until(limit.Until)), false
	case !errors.As(result.Err, &failure):
		return a.Interval, false
	}
	switch failure.Kind {
	case tokenservice.Pending:
		p.rest = 0
		return max(a.Interval, b.grants.turn(p, via)), false
	case tokenservice.SlowDown:
		return b.slowDown(a), false
	case tokenservice.Unavailable, tokenservice.Limited, tokenservice.RefusedConnector:
		// It may pass before the code has expired.
		return max(p.failed(a.Interval), time.Until(via.share.PausedUntil())), false
	}
	return 0, true
}

// slowDown makes the interval longer, for the node that goes on after this one too.
func (b *backend) slowDown(a *attempt) time.Duration {
	wait := a.Interval + slowerBy
	// Where storage fails, the service says it again.
	_ = b.changeAttempts(b.ctx, a.Tenant, func(all *attempts) error {
		if present := all.byID(a.ID); present != nil && present.Status == attemptPending {
			present.Interval = wait
		}
		return nil
	})
	return wait
}

// endPolling handles the last answer about a device code.
func (b *backend) endPolling(a *attempt, via *loadedConnector, result tokenservice.Result) {
	b.finish(a, via, result)
	b.grants.stopPolling(a.Tenant, a.ID)
}
