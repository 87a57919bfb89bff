package backend

import (
	"sync/atomic"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
)

// accessEntry is an access token as storage keeps it.
type accessEntry struct {
	Token       string    `json:"token"`
	Generation  string    `json:"generation"` // random; leases carry it
	Type        string    `json:"token_type,omitempty"`
	EndpointURL string    `json:"endpoint_url,omitempty"`
	Scope       string    `json:"scope,omitempty"`
	Obtained    time.Time `json:"obtained"` // when its exchange was sent
	Expires     time.Time `json:"expires"`
	// Planned is when the exchange is planned that ends this token. It is fixed when the token arrives; zero where exchanges do not end
	// older access tokens.
	Planned time.Time `json:"planned,omitzero"`
}

// life is how long the token lived when it was obtained, by Vault's clock.
func (a *accessEntry) life() time.Duration { return a.Expires.Sub(a.Obtained) }

// margin is how much life the token must have left to be handed out to readers who ask for no more than the tenant's min_ttl.
func (a *accessEntry) margin(minTTL time.Duration) time.Duration { return min(minTTL, a.life()/2) }

// guard is how near a planned exchange has to be, beyond leaseMargin, for a reader to wait for the next token.
func (a *accessEntry) guard() time.Duration { return max(time.Second, min(5*time.Second, a.life()/10)) }

// accessToken is an access token in memory, with the parts of its responses and what is known of its use.
type accessToken struct {
	*accessEntry
	// shown has the strings of responses as values of type any: to convert them for each answer would be half of a read's allocations.
	shown struct{ token, endpointURL, scope, kind, expires, obtained, tenant, generation any }
	// leases is the number of live leases, or leasesUnknown or givenUp.
	leases atomic.Int64
	// use is unread, read or ending.
	use atomic.Int32
	// leasedTo is the latest end of a lease on the token, or of the ttl that a read of token/ was told, in nanoseconds since 1970.
	leasedTo atomic.Int64
}

const (
	leasesUnknown = -1 // the count is not known: the first lease that is revoked early gives the token up
	givenUp       = -2 // the token is not handed out any more
)

const (
	unread = iota
	read
	ending // no reader gets it: an exchange that ends it has begun before any reader had it, or has ended it
)

func newAccessToken(tenant string, e *accessEntry) *accessToken {
	a := &accessToken{accessEntry: e}
	a.shown.token, a.shown.endpointURL, a.shown.scope, a.shown.kind = e.Token, e.EndpointURL, e.Scope, e.Type
	a.shown.expires, a.shown.obtained = stamp(e.Expires), stamp(e.Obtained)
	a.shown.tenant, a.shown.generation = tenant, e.Generation
	return a
}

// stamp is how the engine writes times: RFC 3339, in UTC.
func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339Nano) }

func latest(a time.Time, others ...time.Time) time.Time {
	for _, t := range others {
		if t.After(a) {
			a = t
		}
	}
	return a
}

// earliest returns the earlier of two times; a zero time stands for none.
func earliest(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

// response is the data that the answers of creds and token have in common.
func (a *accessToken) response() map[string]any {
	data := map[string]any{
		"access_token": a.shown.token,
		"expire_time":  a.shown.expires,
		"tenant":       a.shown.tenant,
	}
	if a.EndpointURL != "" {
		data["endpoint_url"] = a.shown.endpointURL
	}
	if a.Scope != "" {
		data["scope"] = a.shown.scope
	}
	if a.Type != "" {
		data["token_type"] = a.shown.kind
	}
	return data
}

// handOut notes that a reader gets the token, and counts the reader's lease if there is one. ok: the reader may have it, because it was not
// given up, and no exchange that ends it has begun. first: no reader has had it before.
func (a *accessToken) handOut(leased bool) (ok, first bool) {
	first = a.use.Load() == unread && a.use.CompareAndSwap(unread, read)
	if a.use.Load() != read {
		return false, false
	}
	for {
		n := a.leases.Load()
		switch {
		case n == givenUp:
			return false, false
		case !leased, n == leasesUnknown, a.leases.CompareAndSwap(n, n+1):
			return true, first
		}
	}
}

// current says whether the token was not given up.
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

// end takes a lease off the count, and returns whether the token is given up, now or before. The early end of the last lease gives it up;
// if a newer token has replaced it, so does the last lease's own end.
func (a *accessToken) end(early, replaced bool) bool {
	for {
		n := a.leases.Load()
		next := max(n-1, 0)
		switch {
		case n == givenUp:
			return true
		case n == leasesUnknown && !early:
			return false
		case next == 0 && (early || replaced):
			next = givenUp
		}
		if a.leases.CompareAndSwap(n, next) {
			return next == givenUp
		}
	}
}

// isOf says whether the access token is the one of a lease. It is false for nil.
func (a *accessToken) isOf(lease *logical.Secret) bool {
	return a != nil && a.Generation == lease.InternalData[leaseGeneration]
}

// leased says whether a live lease may exist.
func (a *accessToken) leased() bool {
	n := a.leases.Load()
	return n > 0 || n == leasesUnknown
}

// wanted says whether the token has been read, or may have been before this process started.
func (a *accessToken) wanted() bool { return a.use.Load() == read || a.leased() }

// leasedUntil notes when a lease on the token ends, or when a reader without a lease is to read again: the exchange that ends the token
// comes after that.
func (a *accessToken) leasedUntil(end time.Time) {
	if a.Planned.IsZero() {
		return // no exchange ends the token
	}
	for {
		old := a.leasedTo.Load()
		if old >= end.UnixNano() || a.leasedTo.CompareAndSwap(old, end.UnixNano()) {
			return
		}
	}
}
