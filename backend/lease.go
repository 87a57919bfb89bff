package backend

import (
	"context"
	"errors"
	"strconv"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
)

// accessTokenType names the engine's leases. Vault revokes a lease by this name,
// so it never changes.
const accessTokenType = "kaizala_access_token"

// What a lease knows: enough to revoke it with everything else gone, and no
// token. Values are strings, for numbers lose digits on their way through Vault.
const (
	leaseTenant     = "tenant"
	leaseGeneration = "generation"
	leaseExpires    = "expires" // the access token's end, RFC 3339
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

// renew prolongs a lease, never past its access token, the tenant's max_ttl or
// the mount's: Vault cuts whatever the client asks for to MaxTTL, counted from
// the lease's beginning.
func (b *backend) renew(ctx context.Context, req *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
	secret := req.Secret
	name, _ := secret.InternalData[leaseTenant].(string)
	expires, err := leaseEnd(secret)
	if err != nil {
		return answer(err)
	}
	now := time.Now()
	if wholeSeconds(expires.Sub(now)) <= leaseMargin {
		return answer(badValue("the access token of this lease has expired, or is about to: read creds/%s for a new one", name))
	}
	ctx, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	t, s, err := b.tenants.load(ctx, name)
	if err != nil {
		return answer(err)
	}
	if t == nil {
		return answer(unknownTenant(name))
	}
	b.askTTLs()
	secret.TTL = b.leaseTTL(s.entry, wholeSeconds(expires.Sub(now))-leaseMargin)
	secret.MaxTTL = wholeSeconds(expires.Sub(secret.IssueTime)) - leaseMargin
	if s.entry.MaxTTL > 0 {
		secret.MaxTTL = min(secret.MaxTTL, s.entry.MaxTTL)
	}
	secret.InternalData[leaseRenewed] = strconv.FormatInt(now.UnixNano(), 10)
	return &logical.Response{Secret: secret}, nil
}

func leaseEnd(secret *logical.Secret) (time.Time, error) {
	text, _ := secret.InternalData[leaseExpires].(string)
	expires, err := time.Parse(time.RFC3339Nano, text)
	if err != nil {
		return time.Time{}, badValue("this lease does not say when its access token ends: revoke it and read a new one")
	}
	return expires, nil
}

// revoke takes a lease off its access token. Kaizala cannot revoke the token, so
// when the last lease has ended before its time the engine gives it up instead,
// in memory at once and then in storage. It makes no call, and fails only where
// storage does, so that Vault tries again: nothing else may leave a lease that
// cannot be revoked.
func (b *backend) revoke(ctx context.Context, req *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
	name, _ := req.Secret.InternalData[leaseTenant].(string)
	generation, _ := req.Secret.InternalData[leaseGeneration].(string)
	expires, err := leaseEnd(req.Secret)
	if now := time.Now(); name == "" || generation == "" || err == nil && !now.Before(expires) {
		return nil, nil
	}
	early := endsEarly(req.Secret, time.Now())
	if _, s := b.tenants.cached(name); s == nil {
		if !early {
			return nil, nil // the count is unknown, and stays so
		}
	} else if s.access == nil || s.access.Generation != generation || !s.access.end(early) {
		return nil, nil
	}
	err = b.giveUp(ctx, name, generation)
	if errors.Is(err, logical.ErrReadOnly) || errors.Is(err, errUnreadable) {
		return nil, nil // the node that may write revokes too; what cannot be read is not handed out
	}
	return nil, err
}

// giveUp makes sure that an access token is never handed out again, not after a
// restart either.
func (b *backend) giveUp(ctx context.Context, name, generation string) error {
	return b.tenants.with(ctx, name, func(t *tenant, base *tenantEntry) error {
		s := t.state.Load()
		if s == nil || s.access == nil || s.access.Generation != generation {
			return nil
		}
		s.access.leases.Store(givenUp)
		next := *base
		if next.Access != nil && next.Access.Generation == generation {
			next.Access = nil
		}
		return b.tenants.saveDetached(ctx, t, &next)
	})
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
