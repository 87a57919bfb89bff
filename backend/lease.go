package backend

import (
	"context"
	"errors"
	"strconv"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/tokenservice"
)

// A lease ends leaseMargin before its access token, or before the exchange that ends the token. It lasts whole seconds, one at the least:
// an access token with less left than leaseLeast is not leased.
const (
	leaseMargin = 2 * time.Second
	leaseLeast  = leaseMargin + time.Second

	// leaseRegistered is how long Vault may take to register a lease: it counts the TTL from then on, not from the engine's answer.
	leaseRegistered = time.Second
)

// accessTokenType names the engine's leases. Vault revokes a lease by this name, so it never changes.
const accessTokenType = "kaizala_access_token"

// The internal data of a lease: enough to renew or revoke it with everything else gone, and no token. Values are strings, because numbers
// lose digits on their way through Vault.
const (
	leaseTenant     = "tenant"
	leaseGeneration = "generation"
	leaseExpires    = "expires" // the access token's end, RFC 3339
	leaseBound      = "bound"   // when leases on the access token must be over, if that is before its end
	leaseOwn        = "own"     // "true": the access token is this lease's alone
	leaseRenewed    = "renewed" // the last renewal, nanoseconds since 1970
)

func (b *backend) accessTokenSecret() *framework.Secret {
	return &framework.Secret{
		Type:   accessTokenType,
		Fields: credsFields,
		Renew:  b.renew,
		Revoke: b.revoke,
	}
}

// newLease returns an access token with a lease, which ends before the token does. So does each renewal.
func (b *backend) newLease(v *tenantView, token *accessToken, own bool) *logical.Response {
	now := time.Now()
	bound := token.Expires
	if !own {
		bound = v.bound
	}
	// Whole seconds, one at the least: Vault takes a TTL of 0 for its default, and a MaxTTL of 0 for no limit.
	most := max(bound.Sub(now).Truncate(time.Second)-leaseMargin, time.Second)
	if v.entry.MaxTTL > 0 {
		most = min(most, v.entry.MaxTTL)
	}
	token.leasedUntil(now.Add(most + leaseRegistered))
	internal := map[string]any{
		"secret_type":   accessTokenType,
		leaseTenant:     token.shown.tenant,
		leaseGeneration: token.shown.generation,
		leaseExpires:    token.shown.expires,
	}
	if bound.Before(token.Expires) {
		internal[leaseBound] = stamp(bound)
	}
	if own {
		internal[leaseOwn] = "true"
	}
	ttl, renewable := b.leaseTTL(v.entry, most)
	return &logical.Response{
		Data: token.response(),
		Secret: &logical.Secret{
			LeaseOptions: logical.LeaseOptions{TTL: ttl, MaxTTL: most, Renewable: renewable},
			InternalData: internal,
		},
	}
}

// leaseTTL is the TTL of a lease that may last for most: the tenant's ttl or the mount's, or most if that is less. 0 stands for the
// mount's, which Vault itself knows best; it is not returned where that is longer than most, because Vault would warn each reader that it
// has cut the TTL. renewable says whether the lease leaves room for a renewal.
func (b *backend) leaseTTL(e *tenantEntry, most time.Duration) (ttl time.Duration, renewable bool) {
	if b.node.defaultTTL.Load() == 0 {
		b.node.askTTLs() // this reader has come before buildIndex has asked
	}
	lasts, longest := e.TTL, most
	if lasts == 0 {
		lasts = time.Duration(b.node.defaultTTL.Load())
	}
	if mounts := time.Duration(b.node.maxTTL.Load()); mounts > 0 {
		longest = min(longest, mounts)
	}
	ttl = min(lasts, most)
	if e.TTL == 0 && lasts < most {
		ttl = 0
	}
	return ttl, lasts > 0 && lasts < longest
}

// renew prolongs a lease, but not past its access token, the exchange that ends the token, the tenant's max_ttl or the mount's: Vault cuts
// what the client asks for to MaxTTL, counted from the beginning of the lease. Vault compares whole seconds, and so does this: with
// fractions, the TTL could be a second too long, of which Vault would warn.
func (b *backend) renew(ctx context.Context, req *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
	secret := req.Secret
	name, _ := secret.InternalData[leaseTenant].(string)
	bound, err := leaseTime(secret, leaseBound)
	planned := err == nil
	if !planned {
		bound, err = leaseTime(secret, leaseExpires)
	}
	if err != nil {
		return answer(badValue("this lease does not say when its access token ends: revoke it and read a new one"))
	}
	ctx, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	t, v, err := b.tenants.load(ctx, name)
	if err != nil {
		return answer(err)
	}
	if t == nil {
		return answer(unknownTenant(name))
	}
	if ended, err := b.hasEnded(ctx, secret, name, v); ended || err != nil {
		if err == nil {
			err = badValue("the access token of this lease is not in use any more, since a refresh, a write or a revocation: read creds/%s for a new one", name)
		}
		return answer(err)
	}
	if !planned && v.access.isOf(secret) && !v.access.Planned.IsZero() {
		v.access.leasedUntil(v.bound)
		bound, planned = v.bound, true // exchange_invalidates was written since the lease was given
	}
	if planned {
		// Vault adds the part of a second that it has cut off to the increment that a client asks for. leaseMargin covers that only if
		// bound is the access token's own end.
		bound = bound.Add(-time.Second)
	}
	now := time.Now()
	issued := secret.IssueTime.Truncate(time.Second)
	end := issued.Add(bound.Sub(issued).Truncate(time.Second) - leaseMargin)
	left := end.Sub(now).Truncate(time.Second)
	if left < time.Second {
		return answer(badValue("the access token of this lease has expired, or is about to: read creds/%s for a new one", name))
	}
	b.node.askTTLs()
	secret.MaxTTL = end.Sub(issued)
	for _, most := range []time.Duration{v.entry.MaxTTL, time.Duration(b.node.maxTTL.Load())} {
		if most > 0 && most < secret.MaxTTL {
			secret.MaxTTL = most
			left = max(min(left, issued.Add(most).Sub(now).Truncate(time.Second)), time.Second)
		}
	}
	secret.TTL, _ = b.leaseTTL(v.entry, left)
	// Vault counts from its answer, which storage may have kept waiting.
	secret.InternalData[leaseRenewed] = strconv.FormatInt(time.Now().UnixNano(), 10)
	return &logical.Response{Secret: secret}, nil
}

// hasEnded says whether the access token of a lease has ended at the service before the lease: because it was given up and the service
// revokes such tokens, or because an exchange has ended it. It goes by the tenant's connector as it is now.
func (b *backend) hasEnded(ctx context.Context, secret *logical.Secret, tenant string, v *tenantView) (bool, error) {
	if v.access.isOf(secret) && v.access.current() {
		return !v.access.Planned.IsZero() && (v.isEnded() || v.access.use.Load() == ending), nil
	}
	generation, _ := secret.InternalData[leaseGeneration].(string)
	if v.kept != nil && v.kept.isIn(v.entry) && v.kept.access.current() && v.entry.Access.Generation == generation {
		return false, nil // what is kept was stored after all, and another node has handed it out
	}
	if secret.InternalData[leaseOwn] != "true" {
		via, err := b.connectors.get(ctx, v.entry.Connector)
		switch {
		case via == nil:
			return false, ignoreUnusable(err)
		case via.about.ExchangeInvalidates:
			return true, nil
		case via.about.Revocation != tokenservice.RevokeAccessToken:
			return false, nil
		}
	}
	held, err := b.revocations.holds(ctx, tenant, generation)
	return !held, err
}

// leaseTime reads a time from a lease's internal data.
func leaseTime(secret *logical.Secret, name string) (time.Time, error) {
	text, _ := secret.InternalData[name].(string)
	return time.Parse(time.RFC3339Nano, text)
}

// revoke ends a lease on an access token. If it is the last lease and ends early, the engine gives the token up, in memory at once and then
// in storage, and has it revoked if the service can do that. revoke fails only if storage does, so that Vault tries again: any other
// failure would leave a lease that can never be revoked.
func (b *backend) revoke(ctx context.Context, req *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
	name, _ := req.Secret.InternalData[leaseTenant].(string)
	generation, _ := req.Secret.InternalData[leaseGeneration].(string)
	now := time.Now()
	expires, err := leaseTime(req.Secret, leaseExpires)
	if name == "" || generation == "" || err == nil && !now.Before(expires) {
		return nil, nil
	}
	if req.Secret.InternalData[leaseOwn] == "true" {
		err = b.endHeld(ctx, name, generation)
	} else {
		err = b.endShared(ctx, name, generation, endsEarly(req.Secret, now))
	}
	if errors.Is(err, errUnreadable) || errors.Is(err, logical.ErrReadOnly) && !b.revokesAtService(ctx, req.Secret, name) {
		return nil, nil // an entry that cannot be read is not handed out; and the node that may write gives the token up as well
	}
	return nil, err
}

// revokesAtService says whether the end of a lease may end its access token at the service. A tenant or a connector that is
// not there ends nothing.
func (b *backend) revokesAtService(ctx context.Context, secret *logical.Secret, tenant string) bool {
	if secret.InternalData[leaseOwn] == "true" {
		return true
	}
	t := b.tenants.named(tenant)
	if t == nil {
		return false
	}
	summary := t.view.Load().summary
	via, err := b.connectors.get(ctx, summary.connector)
	return b.revocations.mayRevoke(summary) && (via != nil || ignoreUnusable(err) != nil)
}

// endHeld has an access token revoked that has a record under heldPrefix: the one of one lease alone, or one that a newer has replaced.
func (b *backend) endHeld(ctx context.Context, name, generation string) error {
	connector, err := b.revocations.revokeHeldLater(ctx, name, generation)
	if connector != "" {
		b.revocations.revokeNow(ctx, connector, generation)
	}
	return err
}

// endShared takes a lease off the count of a shared access token.
func (b *backend) endShared(ctx context.Context, name, generation string, early bool) error {
	t, v := b.tenants.cached(name)
	switch {
	case v != nil && v.access != nil && v.access.Generation == generation:
		if early {
			retires, err := b.retires(ctx, v.entry)
			if err != nil {
				return err
			}
			if !retires {
				v.access.end(false, false)
				return nil
			}
		}
		if !v.access.end(early, false) {
			return nil
		}
	case t != nil:
		if known, last := t.endReplaced(generation, early); known {
			if !last {
				return nil
			}
			err := b.endHeld(ctx, name, generation)
			if err == nil {
				t.forgetReplaced(generation)
			}
			return err
		}
		fallthrough
	default:
		if !early {
			return nil // the count is unknown, and stays so
		}
	}
	return b.giveUp(ctx, name, generation)
}

// giveUp gives an access token up, whether it is its tenant's current one or one that a newer one has replaced.
func (b *backend) giveUp(ctx context.Context, name, generation string) error {
	ctx, cancel := context.WithTimeout(ctx, storeWithin)
	defer cancel()
	t, v, err := b.tenants.load(ctx, name)
	switch {
	case err != nil && !errors.Is(err, errUnreadable):
		return err
	case t != nil && v.entry.Access != nil && v.entry.Access.Generation == generation:
		if retires, err := b.retires(ctx, v.entry); !retires || err != nil {
			return err
		}
		t.withhold(generation)
		connector, err := b.tenants.giveUp(ctx, name, generation)
		if err != nil {
			return err
		}
		if connector != "" {
			b.afterGivingUp(ctx, t, connector, generation)
			return nil
		}
		// A newer one has replaced it meanwhile.
	}
	return b.endHeld(ctx, name, generation)
}

// afterGivingUp has a token that was given up revoked at the service, in the way that the connector says.
func (b *backend) afterGivingUp(ctx context.Context, t *tenant, connector, generation string) {
	via := b.connectors.present(connector)
	switch {
	case via == nil:
	case via.about.Revocation == tokenservice.RevokeAccessToken:
		b.revocations.revokeNow(ctx, connector, generation)
	case via.about.Revocation == tokenservice.RevokeByExchange:
		b.exchangeUnasked(t)
	}
}

// retires says whether the early end of the last lease gives an access token up: by the tenant's retire_on_revoke, and always if that ends
// the token at the service.
func (b *backend) retires(ctx context.Context, e *tenantEntry) (bool, error) {
	if !e.KeepOnRevoke {
		return true, nil
	}
	via, err := b.connectors.get(ctx, e.Connector)
	return via != nil && via.about.Revocation != tokenservice.RevokeNothing, ignoreUnusable(err)
}

// endsEarly tells a revocation from a lease that has come to its end.
func endsEarly(secret *logical.Secret, now time.Time) bool {
	begun := secret.IssueTime
	if text, ok := secret.InternalData[leaseRenewed].(string); ok {
		if nanos, err := strconv.ParseInt(text, 10, 64); err == nil {
			begun = time.Unix(0, nanos)
		}
	}
	return now.Before(begun.Add(secret.TTL))
}
