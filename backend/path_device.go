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

// poll is the next question about a device code.
type poll struct {
	id        string // of the attempt
	connector string // "": not polled yet
	timer     *time.Timer
	rest      time.Duration // after a failure
}

// startDevice begins the device authorization flow (RFC 8628).
func (b *backend) startDevice(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	if !b.node.WriteSafeReplicationState() {
		return nil, logical.ErrReadOnly
	}
	ctx, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	a, via, err := b.newAttempt(ctx, req, d, byDevice)
	if err != nil {
		return answer(err)
	}
	scopes, hint, err := via.asked(d)
	if err != nil {
		return answer(err)
	}
	p := passage{via: via, want: share.Want{Class: share.Background, Wait: patience}, tellsNothing: true}
	start, err := via.service.(tokenservice.DeviceFlow).StartDevice(ctx, tokenservice.DeviceRequest{Scopes: scopes, LoginHint: hint, Permit: p.permit})
	if err != nil {
		return answer(b.notBegun(ctx, a, via, err))
	}
	a.DeviceCode, a.Interval, a.Expires = start.DeviceCode, start.Interval, start.Expires
	if err := b.begin(ctx, a); err != nil {
		return answer(err)
	}
	b.pollAfter(a.Tenant, a.ID, a.Interval)
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

// pollAfter has the service asked about a device code some time from now.
func (b *backend) pollAfter(tenant, id string, d time.Duration) {
	b.grants.mu.Lock()
	defer b.grants.mu.Unlock()
	b.planPoll(tenant, id, d)
}

// planPoll is pollAfter for a caller that holds the grants' mu.
func (b *backend) planPoll(tenant, id string, d time.Duration) {
	g := b.grants
	p := g.polls[tenant]
	if p == nil || p.id != id {
		if p != nil {
			p.timer.Stop()
		}
		p = &poll{id: id}
		g.polls[tenant] = p
	} else if p.timer != nil {
		p.timer.Stop()
	}
	p.timer = time.AfterFunc(max(d, time.Second), func() {
		b.goToService(func() { b.pollDevice(tenant, id) })
	})
}

// stopPolling ends the questions about a tenant's device code: of that attempt, or with "" of any.
func (b *backend) stopPolling(tenant, id string) {
	b.grants.mu.Lock()
	defer b.grants.mu.Unlock()
	if p := b.grants.polls[tenant]; p != nil && (id == "" || p.id == id) {
		p.timer.Stop()
		delete(b.grants.polls, tenant)
	}
}

// polls says whether the service is still to be asked for an attempt.
func (g *grants) isPolled(tenant, id string) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	p := g.polls[tenant]
	return p != nil && p.id == id
}

// rested says how long the next poll waits: the interval, or longer while the service fails.
func (g *grants) rested(tenant, id string, interval time.Duration, failed bool) time.Duration {
	g.mu.Lock()
	defer g.mu.Unlock()
	p := g.polls[tenant]
	if p == nil || p.id != id {
		return interval
	}
	if !failed {
		p.rest = 0
		return interval
	}
	p.rest = max(interval, min(2*max(p.rest, interval), longestInterval))
	return p.rest
}

// turn says how long a poll through a connector waits for the next at the least, so that each of those that are polled has a
// place in the share in its turn, and none goes without one by chance.
func (g *grants) turn(tenant string, via *loadedConnector) time.Duration {
	g.mu.Lock()
	defer g.mu.Unlock()
	if p := g.polls[tenant]; p != nil {
		p.connector = via.name
	}
	polled := 0
	for _, p := range g.polls {
		if p.connector == via.name {
			polled++
		}
	}
	return time.Duration(polled) * share.Window / time.Duration(share.Fifth(via.entry.ExchangesPerMinute))
}

// pollDevice asks the service once whether the person has decided, and says when it is asked again.
func (b *backend) pollDevice(tenant, id string) {
	if !b.grants.isPolled(tenant, id) || b.ctx.Err() != nil {
		return
	}
	if !b.node.WriteSafeReplicationState() {
		b.pollAfter(tenant, id, longestInterval) // another node asks; look again when this one may have become it
		return
	}
	a, v, err := b.pending(b.ctx, tenant, byDevice)
	switch {
	case err != nil:
		b.pollAfter(tenant, id, longestInterval)
		return
	case a == nil:
		b.stopPolling(tenant, id)
		b.sweep(tenant)
		return
	case a.ID != id:
		b.pollAfter(tenant, a.ID, a.Interval) // another node has begun a newer one since
		return
	}
	via, err := b.connectors.of(b.ctx, a.Connector)
	if err != nil {
		b.pollAfter(tenant, id, b.grants.rested(tenant, id, a.Interval, true))
		return
	}
	flow, ok := via.service.(tokenservice.DeviceFlow)
	if !ok || !a.comesFrom(via) {
		b.endPolling(a, via, a.connectorHasMoved())
		return
	}
	b.grants.work(id, true)
	p := passage{
		via: via, want: share.Want{Class: share.Housekeeping, Wait: hopPatience}, stopping: b.isStopping,
		noted: func(context.Context) error {
			if !b.grants.isPolled(tenant, id) {
				return errUsed // it has ended while this waited
			}
			return nil
		},
	}
	result := flow.PollDevice(b.ctx, a.DeviceCode, p.permit)
	storeVerdict := b.connectors.judge(via, result.Err)
	b.decide(a, v, via, result)
	storeVerdict(b.ctx)
}

// decide handles the answer to a poll.
func (b *backend) decide(a *attempt, v *tenantView, via *loadedConnector, result tokenservice.Result) {
	failure, limit := (*tokenservice.Failure)(nil), (*share.LimitError)(nil)
	wait := a.Interval
	switch {
	case result.Err == nil || result.RefreshToken != "" || result.AccessToken != nil:
		b.endPolling(a, via, result)
		return
	case errors.As(result.Err, &limit):
		wait = max(wait, time.Until(limit.Until))
	case errors.As(result.Err, &failure):
		switch failure.Kind {
		case tokenservice.Pending:
			wait = max(b.grants.rested(a.Tenant, a.ID, a.Interval, false), b.grants.turn(a.Tenant, via))
		case tokenservice.SlowDown:
			wait = b.slowDown(a)
		case tokenservice.Unavailable, tokenservice.Limited, tokenservice.RefusedConnector:
			// It may pass before the code has expired.
			wait = max(b.grants.rested(a.Tenant, a.ID, a.Interval, true), time.Until(via.share.PausedUntil()))
		default:
			b.endPolling(a, via, result)
			return
		}
	}
	b.grants.work(a.ID, false)
	if b.grants.isPolled(a.Tenant, a.ID) {
		b.pollAfter(a.Tenant, a.ID, wait)
	}
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
	b.stopPolling(a.Tenant, a.ID)
}
