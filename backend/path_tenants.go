package backend

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/go-secure-stdlib/parseutil"
	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
)

const (
	originOperator = "operator" // somebody wrote the refresh token
	originService  = "service"  // Kaizala replaced the one before
)

const defaultMinTTL = 15 * time.Minute

func (b *backend) tenantPaths() []*framework.Path {
	write := operation("write", "tenant", "Write a tenant's refresh token or its settings.",
		"Changes what is named and nothing else. A refresh token or a connector is tried against Kaizala first, unless verify is false.",
		noContent("The tenant was written."), b.writeTenant)
	return []*framework.Path{
		{
			Pattern: "tenants/?$",
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.ListOperation: operation("list", "tenants", "List the tenants, with the status of each.",
					"A tenant that a newer version of the plugin has written, or that cannot be read, is named without its status.",
					responses(http.StatusOK, "The tenants' names and states.", tenantListFields), b.listTenants),
			},
			DisplayAttrs:    &framework.DisplayAttributes{OperationPrefix: operationPrefix},
			HelpSynopsis:    "List the tenants, with the status of each.",
			HelpDescription: tenantListHelp,
		},
		{
			Pattern:        "tenants/" + framework.GenericNameRegex("tenant"),
			Fields:         tenantFields,
			ExistenceCheck: b.tenantExists,
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.CreateOperation: write,
				logical.UpdateOperation: write,
				logical.PatchOperation: operation("patch", "tenant", "Change some of a tenant's settings.",
					"As a write, but of a tenant that exists; null sets a field to its default.",
					noContent("The tenant was changed."), b.patchTenant),
				logical.ReadOperation: operation("read", "tenant", "Read a tenant's settings and state, without its tokens.",
					"Says whether exchanges succeed and, where they don't, who has to do what. Makes no call to Kaizala.",
					responses(http.StatusOK, "The tenant's settings and state.", tenantStatusFields), b.readTenant),
				logical.DeleteOperation: operation("delete", "tenant", "Delete a tenant and its tokens.",
					"Its leases can still be revoked. Kaizala is not told: its tokens work there until they expire.",
					noContent("There is no such tenant any more."), b.deleteTenant),
			},
			DisplayAttrs:    &framework.DisplayAttributes{OperationPrefix: operationPrefix},
			HelpSynopsis:    "A tenant's refresh token, which nobody can read back, and its settings.",
			HelpDescription: tenantHelp,
		},
		{
			Pattern: "tenants/" + framework.GenericNameRegex("tenant") + "/refresh",
			Fields:  map[string]*framework.FieldSchema{"tenant": tenantField},
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.UpdateOperation: operation("refresh", "tenant", "Exchange a tenant's refresh token now.",
					"From now on the new access token is handed out. Disregards the tenant's backoff and rejection, but neither Kaizala's Retry-After nor the connector's share.",
					responses(http.StatusOK, "The tenant's settings and state after the exchange.", tenantStatusFields), b.refreshTenant),
			},
			DisplayAttrs:    &framework.DisplayAttributes{OperationPrefix: operationPrefix},
			HelpSynopsis:    "Exchange a tenant's refresh token now, and retire its access token.",
			HelpDescription: refreshHelp,
		},
	}
}

func (b *backend) tenantExists(ctx context.Context, _ *logical.Request, d *framework.FieldData) (bool, error) {
	name, err := nameOf(d, "tenant")
	if err != nil {
		return false, nil // for the handler to refuse
	}
	t, _, err := b.tenants.load(ctx, name)
	if errors.Is(err, errUnreadable) {
		return true, nil // for the handler to explain: Vault shows no error of this function
	}
	return t != nil, err
}

// tenantChange is what a write names.
type tenantChange struct {
	refreshToken, connector *string
	ttl, maxTTL, minTTL     *time.Duration
	verify                  bool
	facts                   refreshFacts // of the refresh token, once it is checked
}

// newTenantChange reads a write. A null sets a field to its default.
func newTenantChange(d *framework.FieldData) (*tenantChange, error) {
	c := &tenantChange{verify: true}
	for name, raw := range d.Raw {
		if d.Schema[name] == nil {
			continue
		}
		var err error
		switch name {
		case "refresh_token":
			token, _ := raw.(string)
			token = strings.TrimSpace(token)
			c.refreshToken = &token
			if token == "" {
				err = badValue("refresh_token is empty: give the refresh token that Kaizala's portal shows")
			}
		case "connector":
			connector := d.Get("connector").(string)
			c.connector = &connector
			if connector == "" {
				err = badValue("connector is empty: give a connector's name, or leave it out for %q", defaultConnector)
			} else if len(connector) > maxName || strings.Contains(connector, "/") || strings.Contains(connector, "..") {
				err = badValue("connector is not a connector's name, such as %q", defaultConnector)
			}
		case "ttl":
			c.ttl, err = duration(d, name, raw, 0)
		case "max_ttl":
			c.maxTTL, err = duration(d, name, raw, 0)
		case "min_ttl":
			c.minTTL, err = duration(d, name, raw, defaultMinTTL)
		case "verify":
			c.verify = raw == nil || d.Get("verify").(bool)
		}
		if err != nil {
			return nil, err
		}
	}
	return c, nil
}

func duration(d *framework.FieldData, name string, raw any, byDefault time.Duration) (*time.Duration, error) {
	if raw == nil {
		return &byDefault, nil
	}
	v, err := seconds(d, name)
	return &v, err
}

// seconds reads a duration. The framework would cut off fractions of seconds
// without a word, and make 0.5s the default.
func seconds(d *framework.FieldData, name string) (time.Duration, error) {
	v, err := parseutil.ParseDurationSecond(plain(d.Raw[name]))
	if err != nil || v < 0 || v%time.Second != 0 {
		return 0, badValue("%s has to be a duration of whole seconds, such as 90s, 15m or 24h", name)
	}
	return v, nil
}

// plain is a value as a person would have typed it. A number of JSON comes
// through Vault as a float64.
func plain(raw any) string {
	if n, ok := raw.(float64); ok {
		return strconv.FormatFloat(n, 'f', -1, 64)
	}
	return fmt.Sprint(raw)
}

// retiresTokens says whether the write replaces what access tokens come from.
func (c *tenantChange) retiresTokens() bool { return c.refreshToken != nil || c.connector != nil }

// apply makes the change to an entry, nil for a tenant that is new.
func (c *tenantChange) apply(base *tenantEntry) *tenantEntry {
	next := &tenantEntry{Format: entryFormat, Connector: defaultConnector, MinTTL: defaultMinTTL}
	if base != nil {
		*next = *base
		next.Format = entryFormat
	}
	set(&next.Connector, c.connector)
	set(&next.TTL, c.ttl)
	set(&next.MaxTTL, c.maxTTL)
	set(&next.MinTTL, c.minTTL)
	if c.refreshToken != nil {
		next.RefreshToken = *c.refreshToken
		next.RefreshTokenOrigin = originOperator
		next.RefreshTokenSet = time.Now().UTC().Truncate(time.Millisecond)
		next.Facts = c.facts
		next.Move = nil
	}
	if c.retiresTokens() {
		next.Verified, next.Rejected, next.LastExchange = false, time.Time{}, time.Time{}
		next.Access, next.AccessTokenLife = nil, 0
	}
	return next
}

func set[T any](field *T, value *T) {
	if value != nil {
		*field = *value
	}
}

func (e *tenantEntry) validate() error {
	if e.RefreshToken == "" {
		return badValue("refresh_token is required: give the refresh token that Kaizala's portal shows")
	}
	if e.MaxTTL > 0 && e.TTL > e.MaxTTL {
		return badValue("ttl is over max_ttl: give a ttl of %s at most", e.MaxTTL)
	}
	return nil
}

func (b *backend) writeTenant(ctx context.Context, _ *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	return b.changeTenant(ctx, d, false)
}

func (b *backend) patchTenant(ctx context.Context, _ *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	return b.changeTenant(ctx, d, true)
}

func (b *backend) changeTenant(ctx context.Context, d *framework.FieldData, patch bool) (*logical.Response, error) {
	name, err := nameOf(d, "tenant")
	if err != nil {
		return answer(err)
	}
	change, err := newTenantChange(d)
	if err != nil {
		return answer(err)
	}
	ctx, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	t, s, err := b.tenants.load(ctx, name)
	if err != nil {
		return answer(err)
	}
	var base *tenantEntry
	if t != nil {
		base = s.entry
	} else if patch {
		return answer(notFound("there is no tenant %q to patch", name))
	}
	if err := change.apply(base).validate(); err != nil {
		return answer(err)
	}
	if !change.retiresTokens() {
		err = b.storeTenant(ctx, name, change, patch)
	} else {
		err = b.replaceTokens(ctx, name, base, change, patch)
	}
	if err != nil {
		return answer(err)
	}
	resp := done(d)
	if t, _ := b.tenants.cached(name); t != nil && change.retiresTokens() {
		if trouble := t.trouble.Load(); trouble != nil {
			resp = &logical.Response{}
			resp.AddWarning("The write is stored, but " + trouble.text)
		}
	}
	return resp, nil
}

// replaceTokens writes a refresh token or a connector, once what can be known
// beforehand speaks for it, and Kaizala does.
func (b *backend) replaceTokens(ctx context.Context, name string, base *tenantEntry, change *tenantChange, patch bool) error {
	next := change.apply(base)
	via, err := b.connectorOf(ctx, next)
	if err != nil {
		return err
	}
	facts, err := via.service.check(next.RefreshToken)
	if err != nil {
		return badValue("refresh_token does not fit connector %q: %s", next.Connector, err)
	}
	change.facts, next.Facts = facts, facts
	if next.expired(time.Now()) {
		return badValue("refresh_token expired at %s: generate a new one on Kaizala's portal", stamp(facts.Expires))
	}
	if !change.verify {
		b.connectors.binding.RLock()
		defer b.connectors.binding.RUnlock()
		if _, err := b.connectorOf(ctx, next); err != nil {
			return err
		}
		return b.storeTenant(ctx, name, change, patch)
	}
	if !b.node.WriteSafeReplicationState() {
		return logical.ErrReadOnly
	}
	return b.verify(ctx, name, via, next, change)
}

// storeTenant stores an operator's write, on top of whatever is there by then.
func (b *backend) storeTenant(ctx context.Context, name string, change *tenantChange, patch bool) error {
	return b.tenants.with(ctx, name, func(t *tenant, base *tenantEntry) error {
		if base == nil && (patch || change.refreshToken == nil) {
			return notFound("tenant %q was deleted meanwhile", name)
		}
		next := change.apply(base)
		if err := next.validate(); err != nil {
			return err
		}
		if err := b.tenants.saveDetached(ctx, t, next); err != nil {
			t.doubted.Store(true) // storage may have taken it all the same
			return err
		}
		if change.retiresTokens() {
			t.mu.Lock()
			t.epoch++
			t.mu.Unlock()
			t.recovered()
		}
		return nil
	})
}

// verify exchanges a refresh token that somebody wrote, and stores it when that
// succeeds. The exchange outlives the writer's patience: its answer may hold the
// only refresh token that is still good.
func (b *backend) verify(ctx context.Context, name string, via *loadedConnector, next *tenantEntry, change *tenantChange) error {
	f, err := b.launchVerification(ctx, name, via, next, change)
	if err != nil {
		return err
	}
	select {
	case <-f.done:
		if errors.Is(f.err, errSuperseded) {
			return tryAgain("somebody else wrote or deleted tenant %q meanwhile: nothing of this write was stored; look at the tenant, and write again", name)
		}
		return verifyError(name, next.Connector, f.err)
	case <-ctx.Done():
		return tryAgain("Kaizala has not answered yet, so nothing is stored for now: if it accepts the refresh token later, the write will be stored then; read tenants/%s in a minute, and write again if it is not there", name)
	}
}

func (b *backend) launchVerification(ctx context.Context, name string, via *loadedConnector, next *tenantEntry, change *tenantChange) (*flight, error) {
	for {
		t := b.tenants.record(name)
		t.mu.Lock()
		if t.removed {
			t.mu.Unlock()
			continue
		}
		if busy := t.flight; busy != nil {
			t.mu.Unlock()
			select {
			case <-busy.done:
				continue
			case <-ctx.Done():
				return nil, tryAgain("another exchange of tenant %q is under way: nothing of this write was stored; write again in a minute", name)
			}
		}
		if change.refreshToken == nil {
			// The exchange that was waited for may have replaced the refresh token.
			if base := t.latest(); base != nil {
				next = change.apply(base)
			}
		}
		a := attempt{t: t, entry: next, via: via, epoch: t.epoch, change: change}
		t.pending = next.Connector
		f, err := b.launch(t, func() error {
			// Whoever deletes the connector sees pending, or is seen here.
			b.connectors.binding.RLock()
			_, err := b.connectorOf(b.ctx, next)
			b.connectors.binding.RUnlock()
			if err != nil {
				return err
			}
			return b.exchange(b.ctx, a)
		})
		if err != nil {
			t.pending = ""
		}
		t.mu.Unlock()
		return f, err
	}
}

// verifyError says what a failed verification means to the writer.
func verifyError(tenant, connector string, err error) error {
	refusal := (*serviceError)(nil)
	if errors.As(err, &refusal) && refusal.kind == refusedRefreshToken {
		return badValue("Kaizala refuses this refresh token with connector %q: nothing was stored; generate a new one for that connector on Kaizala's portal and write it to tenants/%s", connector, tenant)
	}
	var coded logical.HTTPCodedError
	switch err = readerError(tenant, connector, err); {
	case errors.As(err, &coded):
		return logical.CodedError(coded.Code(), "nothing was stored: "+coded.Error())
	default:
		return err
	}
}

func (b *backend) readTenant(ctx context.Context, _ *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	name, err := nameOf(d, "tenant")
	if err != nil {
		return nil, nil
	}
	t, s, err := b.tenants.load(ctx, name)
	if err != nil {
		return answer(err)
	}
	if t == nil {
		return nil, nil
	}
	return b.statusResponse(t, s.entry), nil
}

// deleteTenant forgets a tenant. Nothing of it needs to be readable, and an
// exchange under way will find that it has come too late.
func (b *backend) deleteTenant(ctx context.Context, _ *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	name, err := nameOf(d, "tenant")
	if err != nil {
		return nil, nil
	}
	err = b.tenants.locked(ctx, name, func(t *tenant) error {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), storeWithin)
		defer cancel()
		if err := b.storage.Delete(ctx, tenantPrefix+name); err != nil {
			t.doubted.Store(true)
			return err
		}
		t.mu.Lock()
		t.epoch++
		t.version++
		t.stored, t.unsaved, t.fresh = false, nil, nil
		t.state.Store(nil)
		t.mu.Unlock()
		t.recovered()
		b.renewer.remove(name)
		return nil
	})
	if err != nil {
		return answer(err)
	}
	b.tenants.loaded.Remove(name)
	return done(d), nil
}

func (b *backend) refreshTenant(ctx context.Context, _ *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	name, err := nameOf(d, "tenant")
	if err != nil {
		return answer(err)
	}
	waiting, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	var retired *string // the generation that readers had when this began
	for {
		t, s, err := b.tenants.load(waiting, name)
		switch {
		case err != nil:
			return answer(err)
		case t == nil:
			return answer(notFound("there is no tenant %q", name))
		}
		generation := ""
		if s.entry.Access != nil {
			generation = s.entry.Access.Generation
		}
		if retired == nil {
			retired = &generation
		} else if generation != *retired && generation != "" {
			return b.statusResponse(t, s.entry), nil
		}
		switch err := b.exchangeAndWait(waiting, t, s, true); {
		case err == nil, errors.Is(err, errSuperseded):
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case errors.Is(err, context.DeadlineExceeded):
			return answer(tryAgain("Kaizala has not answered for tenant %q yet: the exchange goes on, and its access token will be handed out once it is there", name))
		default:
			return answer(readerError(name, s.entry.Connector, err))
		}
	}
}

func (b *backend) listTenants(ctx context.Context, _ *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
	names, err := b.storage.List(ctx, tenantPrefix)
	if err != nil {
		return answer(err)
	}
	b.awaitIndex(ctx)
	now := time.Now()
	info := make(map[string]any, len(names))
	for _, name := range names {
		t := b.tenants.named(name)
		if t == nil {
			continue
		}
		t.mu.Lock()
		known, summary := t.stored, t.summary
		t.mu.Unlock()
		if !known {
			continue
		}
		one := map[string]any{"status": summary.status(now, t.trouble.Load()), "connector": summary.connector}
		if summary.expires != 0 {
			one["refresh_token_expire_time"] = stamp(time.Unix(summary.expires, 0))
		}
		info[name] = one
	}
	resp := logical.ListResponseWithInfo(names, info)
	if missing := len(names) - len(info); missing > 0 {
		resp.AddWarning(fmt.Sprintf("key_info of %d tenants is missing: the engine is still reading them, or cannot, as its log says then.", missing))
	}
	return resp, nil
}

// noContent documents an operation that answers nothing.
func noContent(description string) map[int][]framework.Response {
	return responses(http.StatusNoContent, description)
}
