package backend

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/logical"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/tokenservice"
)

// A tenant's status, as its path and LIST show it.
const (
	statusOK         = "ok"
	statusDegraded   = "degraded"   // the last exchange failed and will be tried again
	statusRejected   = "rejected"   // the service refuses the refresh token
	statusExpired    = "expired"    // the refresh token's life is over
	statusUnverified = "unverified" // the service has not seen the refresh token yet
)

// dangerAhead is how long before a refresh token's end its tenant's readers are warned, where no new one has come.
const dangerAhead = 30 * 24 * time.Hour

func (s tenantSummary) status(now time.Time, trouble *trouble) string {
	switch {
	case s.expires != 0 && !s.assumed && now.Unix() >= s.expires:
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

// about returns what a connector's service says of itself, as far as memory knows it.
func (cs *connectors) about(connector string) tokenservice.About {
	if via := cs.present(connector); via != nil {
		return via.about
	}
	return tokenservice.About{Name: "the token service", NewRefreshToken: "get a new one"}
}

func (b *backend) serviceName(connector string) string { return b.connectors.about(connector).Name }

func rejectedText(about tokenservice.About, tenant string) string {
	return fmt.Sprintf("%s refuses the refresh token of tenant %q: its tenant user has to %s", upperFirst(about.Name), tenant, remedy(about, tenant))
}

func expiredText(about tokenservice.About, tenant string, e *tenantEntry) string {
	return fmt.Sprintf("The refresh token of tenant %q expired at %s: its tenant user has to %s.", tenant, stamp(e.Facts.Expires), remedy(about, tenant))
}

// remedy is what a person does about a refresh token that is of no use any more, as a part of a sentence.
func remedy(about tokenservice.About, tenant string) string {
	return strings.ReplaceAll(about.NewRefreshToken, "NAME", tenant) + " and write it to tenants/" + tenant
}

// statusResponse is all about a tenant that may be shown.
func (b *backend) statusResponse(t *tenant, v *tenantView) *logical.Response {
	now := time.Now()
	e, trouble := v.entry, v.trouble
	data := map[string]any{
		"connector":            e.Connector,
		"ttl":                  int64(e.TTL.Seconds()),
		"max_ttl":              int64(e.MaxTTL.Seconds()),
		"min_ttl":              int64(e.MinTTL.Seconds()),
		"retire_on_revoke":     !e.KeepOnRevoke,
		"token_per_lease":      e.TokenPerLease,
		"status":               v.summary.status(now, trouble),
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
	text("kind", e.Facts.Kind)
	text("group_id", e.Facts.GroupID)
	text("granted_by", e.GrantedBy)
	text("subject", e.Subject)
	at("granted_time", e.Granted)
	at("refresh_token_set_time", e.RefreshTokenSet)
	at("refresh_token_expire_time", e.Facts.Expires)
	at("last_exchange_time", e.LastExchange)
	at("next_exchange_time", b.exchangeDue(t, v, now).Truncate(time.Second))
	if a := e.Access; a != nil {
		text("scope", a.Scope)
		text("endpoint_url", a.EndpointURL)
		at("access_token_expire_time", a.Expires)
	}
	danger := b.danger(t, v, now)
	switch {
	case trouble != nil:
		data["last_error"] = trouble.text
		at("last_error_time", trouble.at.UTC().Truncate(time.Millisecond))
	case !e.Rejected.IsZero():
		data["last_error"] = danger
		at("last_error_time", e.Rejected)
	}
	b.showRevocations(data, e.Connector, t)
	resp := &logical.Response{Data: data}
	if danger != "" {
		resp.AddWarning(danger)
	}
	return resp
}

// showRevocations adds how many revocations wait, of a connector or, where t is not nil, of one of its tenants. An exchange that
// has to end an access token is one.
func (b *backend) showRevocations(data map[string]any, connector string, t *tenant) {
	pending, lastError := b.revocations.pendingOf(connector)
	if t == nil {
		pending += b.owedBy(connector)
	} else {
		pending, lastError = b.revocations.pendingOfTenant(connector, t.name)
		if s := t.view.Load().summary; s.owes(b.connectors.present(s.connector), time.Now()) {
			pending++
		}
	}
	if pending > 0 {
		data["pending_revocations"] = pending
	}
	if lastError != "" {
		data["last_revocation_error"] = lastError
	}
}

// owedBy is how many of a connector's tenants owe an exchange.
func (b *backend) owedBy(connector string) (owed int) {
	via, now := b.connectors.present(connector), time.Now()
	b.tenants.each(func(t *tenant) {
		if s := t.view.Load().summary; s.connector == connector && s.owes(via, now) {
			owed++
		}
	})
	return owed
}

// readerError says what the failure of a tenant's exchange means to the reader, and who has to do what.
func (b *backend) readerError(tenant, connector string, err error) error {
	if errors.Is(err, context.Canceled) {
		return errStopping
	}
	return readerError(b.connectors.about(connector), tenant, connector, err)
}
