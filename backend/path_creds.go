package backend

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/share"
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
					"Every reader gets the tenant's current access token while it is usable. If its last lease is revoked early, that token is never handed out again.",
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
					"For sidecars and gateways that read on every request. It leaves no lease in Vault; the answer says when to read again.",
					responses(http.StatusOK, "An access token without a lease.", credsFields, tokenFields), b.readToken),
			},
			DisplayAttrs:    &framework.DisplayAttributes{OperationPrefix: operationPrefix},
			HelpSynopsis:    "Read an access token of a tenant without a lease.",
			HelpDescription: tokenHelp,
		},
	}
}

// readCreds answers creds/:tenant with an access token and a lease on it.
func (b *backend) readCreds(ctx context.Context, _ *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	r, err := newReader(d, true)
	if err != nil {
		return answer(err)
	}
	t, v, token, err := b.accessToken(ctx, r)
	if err != nil {
		return answer(err)
	}
	resp := b.newLease(v, token, r.own)
	b.warn(resp, t, v)
	// If the reader has gone, Vault may have registered the lease or not.
	switch err := ctx.Err(); {
	case err == nil:
	case r.own:
		return nil, errors.Join(err, b.endHeld(context.WithoutCancel(ctx), r.tenant, token.Generation))
	default:
		token.doubt()
	}
	return resp, nil
}

// readToken answers token/:tenant with the tenant's shared access token, without a lease.
func (b *backend) readToken(ctx context.Context, _ *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	r, err := newReader(d, false)
	if err != nil {
		return answer(err)
	}
	t, v, token, err := b.accessToken(ctx, r)
	if err != nil {
		return answer(err)
	}
	until := v.until // when the token stops being handed out to such readers
	if token.Planned.IsZero() {
		until = earliest(until, token.Expires.Add(-r.minTTL))
	}
	token.leasedUntil(until)
	data := token.response()
	data["ttl"] = max(0, int64(time.Until(until)/time.Second))
	data["rotation_period"] = max(1, int64(until.Sub(token.Obtained)/time.Second))
	data["last_vault_rotation"] = token.shown.obtained
	resp := &logical.Response{Data: data}
	b.warn(resp, t, v)
	return resp, nil
}

// reader is a request for an access token.
type reader struct {
	tenant string
	minTTL time.Duration // the request's own; 0: none
	leases bool          // the request is for a lease
	own    bool          // the access token is to be for this lease alone
	waited bool          // the reader has waited for an exchange, or for its planned time
	failed bool          // the reader's exchange has failed, or has not ended in time
	// exchanges counts the exchanges that have succeeded while the reader waited.
	exchanges int
}

func newReader(d *framework.FieldData, leases bool) (*reader, error) {
	name, err := nameOf(d, "tenant")
	if err != nil {
		return nil, err
	}
	r := &reader{tenant: name, leases: leases}
	if d.Raw["min_ttl"] != nil {
		r.minTTL, err = seconds(d, "min_ttl")
	}
	return r, err
}

// accessToken returns an access token that fits the reader.
//
// While there is a usable one this does not wait. Otherwise it starts the tenant's one exchange, or joins it, and waits no
// longer than answerWithin; the exchange goes on without its readers. The view that it returns goes with the token: a lease ends by it.
func (b *backend) accessToken(ctx context.Context, r *reader) (*tenant, *tenantView, *accessToken, error) {
	if t, v := b.tenants.cached(r.tenant); v != nil {
		if token, err := b.serve(t, v, r); token != nil || err != nil {
			return t, v, token, err
		}
	}
	waiting, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	for {
		t, v, err := b.tenants.loadCreated(waiting, r.tenant)
		switch {
		case ctx.Err() != nil:
			return nil, nil, nil, ctx.Err()
		case err != nil:
			return nil, nil, nil, err
		case t == nil:
			return nil, nil, nil, unknownTenant(r.tenant)
		}
		if token, err := b.serve(t, v, r); token != nil || err != nil {
			return t, v, token, err
		}
		if r.exchanges == 2 {
			return nil, nil, nil, tryAgain("tenant %q: the new access token was retired or has expired before it could be read: compare the clocks of Vault and of the service, and try again", r.tenant)
		}
		token, err := b.nextToken(waiting, t, v, r)
		switch {
		case token != nil:
			if _, now := b.tenants.cached(r.tenant); now != nil {
				v = now // which has no trouble of before the exchange
			}
			return t, v, token, nil
		case ctx.Err() != nil:
			return nil, nil, nil, ctx.Err()
		case errors.Is(err, errSuperseded):
			continue
		case err != nil:
			if limit, ok := errors.AsType[*share.LimitError](err); ok {
				t.postpone(limit.Until)
			}
			// An access token that the exchange was to end lives until the next try, and is handed out until then, in its last second too.
			r.failed = true
			if t, now := b.tenants.cached(r.tenant); now != nil {
				if token, _ := b.serve(t, now, r); token != nil {
					return t, now, token, nil
				}
			}
			if errors.Is(err, context.DeadlineExceeded) {
				return nil, nil, nil, b.notYet(v, r)
			}
			return nil, nil, nil, b.readerError(r.tenant, v.entry.Connector, err)
		}
	}
}

// serve returns the tenant's access token, with a lease counted on it if the reader is for one; nil if the token does not live long
// enough for the reader, or is not handed out any more.
func (b *backend) serve(t *tenant, v *tenantView, r *reader) (*accessToken, error) {
	now := time.Now()
	if r.minTTL > 0 {
		if err := v.minTTLFits(r.minTTL, now); err != nil {
			return nil, err
		}
	}
	if r.leases && v.entry.TokenPerLease {
		return nil, nil
	}
	r.own = false // it was true if the tenant had token_per_lease when the reader began to wait
	token := v.access
	if token == nil {
		return nil, nil
	}
	least := r.minTTL // the life that the token must have left
	if r.leases {
		least = max(least, leaseLeast)
	}
	until := earliest(v.until, token.Expires.Add(-least))
	if !r.leases && !r.waited && !r.failed {
		until = until.Add(-time.Second) // the answer's ttl is cut to whole seconds, and a read after that has to get a newer token
	}
	if !token.Planned.IsZero() {
		if v.isEnded() {
			return nil, nil
		}
		switch {
		case r.failed && v.trouble != nil && v.trouble.lost && v.entry.Rejected.IsZero():
			// After a lost answer nothing tells whether the token still works. While the next try hangs it is handed out with a lease of a second.
			until = token.Expires.Add(-max(least, token.margin(v.entry.MinTTL)))
		case !r.waited && !r.failed: // a reader who has waited gets the token also in the moments before its planned exchange
			until = earliest(until, v.until.Add(-token.guard()))
		}
		until = until.Add(-1) // a read at that moment makes the exchange
	}
	if now.After(until) {
		return nil, nil
	}
	ok, first := token.handOut(r.leases)
	if !ok {
		return nil, nil // an exchange has begun to end the token, or it was given up
	}
	if first {
		b.schedule(t) // a token that is used is renewed ahead of its end
	}
	return token, nil
}

// isEnded says whether an exchange has ended the access token and storage has not taken what came instead. It is false where the view's
// token is newer than what is kept, because another node has made an exchange since.
func (v *tenantView) isEnded() bool { return v.kept != nil && !v.supersedes(v.kept) }

// nextToken waits until the tenant may have another access token: for the planned time of the exchange, where that is near and leases on
// the present token live until then; otherwise for an exchange. It returns the new token if that is for this reader's lease alone.
func (b *backend) nextToken(ctx context.Context, t *tenant, v *tenantView, r *reader) (own *accessToken, err error) {
	r.own = r.leases && v.entry.TokenPerLease
	if a := v.access; !r.own && a != nil && !a.Planned.IsZero() && a.current() && !v.isEnded() {
		left := time.Until(latest(v.bound.Add(-leaseMargin), time.Unix(0, a.leasedTo.Load())))
		if left > 0 && left <= a.guard()+leaseMargin {
			timer := time.NewTimer(left)
			defer timer.Stop()
			select {
			case <-timer.C:
				r.waited = true // also where the exchange of another reader has replaced the token by then
				return nil, nil
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}
	}
	own, err = b.exchanger.exchange(ctx, t, v, want{ownToken: r.own})
	if err == nil {
		r.waited = true
		r.exchanges++
	}
	return own, err
}

// minTTLFits refuses a min_ttl that no access token of the tenant can have left, once the life of one is known.
func (v *tenantView) minTTLFits(minTTL time.Duration, now time.Time) error {
	if half := v.entry.AccessTokenLife / 2; half > 0 && minTTL > half {
		return badValue("min_ttl is more than half of an access token's life: %s at most", half.Truncate(time.Second))
	}
	if a := v.access; a != nil && !a.Planned.IsZero() && a.current() {
		until := v.bound.Add(-leaseMargin)
		if left := until.Sub(now); left > 0 && minTTL > left {
			return badValue("min_ttl is more than this access token has left before the exchange that ends it: a new one comes at %s", stamp(until.Truncate(time.Second)))
		}
	}
	return nil
}

func (b *backend) notYet(v *tenantView, r *reader) error {
	service := b.serviceName(v.entry.Connector)
	if r.own {
		return tryAgain("%s has not answered for tenant %q in time: this read gets no access token, and one that still comes for it will be revoked; nothing else was lost, try again later", service, r.tenant)
	}
	return tryAgain("%s has not answered for tenant %q yet: the exchange goes on and its result will be kept, unless Vault is stopped before that; nothing was lost, try again later", service, r.tenant)
}

// warn adds what a reader should pass on.
func (b *backend) warn(resp *logical.Response, t *tenant, v *tenantView) {
	if a := v.entry.Access; v.trouble != nil && a != nil {
		ends := "this one ends at " + a.Expires.Format(time.RFC3339)
		if v.trouble.lost && !a.Planned.IsZero() {
			ends = "the exchange whose answer was lost may have ended this one"
		}
		resp.AddWarning(fmt.Sprintf("The access token could not be renewed, and %s: %s", ends, v.trouble.text))
	}
	if danger := b.danger(t, v, time.Now()); danger != "" {
		resp.AddWarning(danger)
	}
}

// danger says who has to do what before a tenant's refresh token ends, or "".
func (b *backend) danger(t *tenant, v *tenantView, now time.Time) string {
	e := v.entry
	switch {
	case v.dangerFrom.IsZero() || now.Before(v.dangerFrom):
		return ""
	case e.expired(now):
		return expiredText(b.connectors.about(e.Connector), t.name, e)
	case !e.Rejected.IsZero():
		return rejectedText(b.connectors.about(e.Connector), t.name) + "."
	case v.trouble == nil && e.LastExchange.Before(e.Facts.RotatesFrom):
		return "" // no exchange has been due yet that could replace the refresh token
	}
	about := b.connectors.about(e.Connector)
	return fmt.Sprintf("The refresh token of tenant %q ends at %s, and %s has not prolonged it: if tenants/%s does not show a later refresh_token_expire_time soon, its tenant user has to %s.",
		t.name, stamp(e.Facts.Expires), about.Name, t.name, remedy(about, t.name))
}
