package backend

import (
	"context"
	"fmt"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
)

// A tenant's status, as its path and LIST show it.
const (
	statusOK         = "ok"
	statusDegraded   = "degraded"   // the last exchange failed and will be tried again
	statusRejected   = "rejected"   // the service refuses the refresh token
	statusExpired    = "expired"    // the refresh token's life is over
	statusUnverified = "unverified" // the service has not seen the refresh token yet
)

// dangerAhead is how long before a refresh token's end its tenant's users are
// warned, where no new one has come.
const dangerAhead = 30 * 24 * time.Hour

func (s tenantSummary) status(now time.Time, trouble *trouble) string {
	switch {
	case s.expires != 0 && now.Unix() >= s.expires:
		return statusExpired
	case s.rejected:
		return statusRejected
	case trouble != nil:
		return statusDegraded
	case !s.verified:
		return statusUnverified
	}
	return statusOK
}

// danger says who has to do what before a tenant's refresh token ends, or "".
func (t *tenant) danger(e *tenantEntry, now time.Time) string {
	trouble := t.trouble.Load()
	switch {
	case e.expired(now):
		return expiredText(t.name, e)
	case !e.Rejected.IsZero():
		return fmt.Sprintf("Kaizala refuses the refresh token of tenant %q: its tenant user has to generate a new one on Kaizala's portal and write it to tenants/%s.", t.name, t.name)
	case e.Facts.RotatesFrom.IsZero() || now.Before(latest(e.Facts.RotatesFrom, e.Facts.Expires.Add(-dangerAhead))):
		return ""
	case trouble == nil && e.LastExchange.Before(e.Facts.RotatesFrom):
		return "" // nobody has tried yet
	}
	return fmt.Sprintf("The refresh token of tenant %q ends at %s and Kaizala has not replaced it: if tenants/%s does not show a later refresh_token_expire_time soon, its tenant user has to generate a new one on Kaizala's portal and write it there.", t.name, stamp(e.Facts.Expires), t.name)
}

func expiredText(name string, e *tenantEntry) string {
	return fmt.Sprintf("The refresh token of tenant %q expired at %s: its tenant user has to generate a new one on Kaizala's portal and write it to tenants/%s.", name, stamp(e.Facts.Expires), name)
}

// stamp is how the engine writes times: RFC 3339, in UTC.
func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339Nano) }

// statusResponse is all about a tenant that may be shown.
func (b *backend) statusResponse(t *tenant, e *tenantEntry) *logical.Response {
	now := time.Now()
	trouble := t.trouble.Load()
	data := map[string]any{
		"connector":            e.Connector,
		"ttl":                  int64(e.TTL.Seconds()),
		"max_ttl":              int64(e.MaxTTL.Seconds()),
		"min_ttl":              int64(e.MinTTL.Seconds()),
		"status":               summarize(e).status(now, trouble),
		"kind":                 e.Facts.Kind,
		"refresh_token_origin": e.RefreshTokenOrigin,
	}
	text := func(name, value string) {
		if value != "" {
			data[name] = value
		}
	}
	at := func(name string, value time.Time) {
		if !value.IsZero() {
			data[name] = stamp(value)
		}
	}
	text("group_id", e.Facts.GroupID)
	at("refresh_token_set_time", e.RefreshTokenSet)
	at("refresh_token_expire_time", e.Facts.Expires)
	at("last_exchange_time", e.LastExchange)
	at("next_exchange_time", t.exchangeDue(e, now).Truncate(time.Second))
	if a := e.Access; a != nil {
		text("scope", a.Scope)
		text("endpoint_url", a.EndpointURL)
		at("access_token_expire_time", a.Expires)
	}
	switch {
	case trouble != nil:
		data["last_error"] = trouble.text
		at("last_error_time", trouble.at.UTC().Truncate(time.Millisecond))
	case !e.Rejected.IsZero():
		data["last_error"] = t.danger(e, now)
		at("last_error_time", e.Rejected)
	}
	resp := &logical.Response{Data: data}
	if danger := t.danger(e, now); danger != "" {
		resp.AddWarning(danger)
	}
	return resp
}

// Events about tenants, as Vault's subscribers see them.
const (
	eventRotated  = "kaizala/tenant-rotated"  // the service has replaced the refresh token
	eventRejected = "kaizala/tenant-rejected" // the service refuses the refresh token
	eventExpiring = "kaizala/tenant-expiring" // the refresh token ends before it can be replaced
)

// announce tells the log and Vault's events of a change of a tenant's state.
func (b *backend) announce(ctx context.Context, t *tenant, e *tenantEntry, event string) {
	about := []any{"tenant", t.name, "connector", e.Connector}
	switch event {
	case eventRotated:
		b.Logger().Info("Kaizala has replaced a tenant's refresh token", about...)
	case eventRejected:
		b.Logger().Error("Kaizala refuses a tenant's refresh token: its tenant user has to generate a new one and write it", about...)
	case eventExpiring:
		b.Logger().Warn("a tenant's refresh token is at its end", append(about, "reason", t.danger(e, time.Now()))...)
	}
	// Where Vault has no events, or nobody listens, there is nothing to do.
	_ = logical.SendEvent(ctx, b, event, "tenant", t.name, "connector", e.Connector, logical.EventMetadataPath, tenantPrefix+t.name)
}
