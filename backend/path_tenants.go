package backend

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/tokenservice"
)

const (
	originOperator = "operator" // a write or a person's consent has brought the refresh token
	originService  = "service"  // the service has replaced the one before
)

const defaultMinTTL = 15 * time.Minute

func (b *backend) tenantPaths() []*framework.Path {
	write := operation("write", "tenant", "Write a tenant's refresh token or its settings.",
		"Changes only the fields that the request names. A refresh token or a connector is first tried at the service, unless verify is false.",
		noContent("The tenant was written."), b.writeTenant)
	return []*framework.Path{
		{
			Pattern: "tenants/?$",
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.ListOperation: operation("list", "tenants", "List the tenants, with the status of each.",
					"A tenant that cannot be read, or that a newer version of the plugin has written, is listed without its status.",
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
					"Like a write, but the tenant must exist. A JSON null sets a field to its default: vault patch reads JSON from standard input where its argument is -.",
					noContent("The tenant was changed."), b.patchTenant),
				logical.ReadOperation: operation("read", "tenant", "Read a tenant's settings and state, without its tokens.",
					"Says whether exchanges succeed and, if they do not, who has to do what. Makes no call to the service.",
					responses(http.StatusOK, "The tenant's settings and state.", tenantStatusFields), b.readTenant),
				logical.DeleteOperation: operation("delete", "tenant", "Delete a tenant and its tokens.",
					"Its leases can still be revoked. At the service its tokens work until they expire, unless the connector's revocation or revoke_on_delete ends them.",
					noContent("There is no such tenant any more."), b.deleteTenant),
			},
			DisplayAttrs:    &framework.DisplayAttributes{OperationPrefix: operationPrefix},
			HelpSynopsis:    "A tenant's refresh token, which cannot be read back, and its settings.",
			HelpDescription: tenantHelp,
		},
		{
			Pattern: "tenants/" + framework.GenericNameRegex("tenant") + "/refresh",
			Fields:  map[string]*framework.FieldSchema{"tenant": tenantField},
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.UpdateOperation: operation("refresh", "tenant", "Exchange a tenant's refresh token now.",
					"From now on the new access token is handed out. Ignores the tenant's backoff and a rejected status, but not the service's Retry-After or the connector's share.",
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

// tenantChange is what a write of a tenant names.
type tenantChange struct {
	refreshToken, connector *string
	ttl, maxTTL, minTTL     *time.Duration
	keepOnRevoke            *bool // retire_on_revoke is false
	tokenPerLease           *bool
	patch                   bool
	verify                  bool

	// again: the write names a refresh token that the service has replaced by the tenant's present one, which stays. refreshToken is nil
	// then.
	again   bool
	written *string            // the refresh token as it was written; nil: none was
	lineage string             // the tenant's, once the write is stored, where it retires tokens
	target  string             // the connector that the tenant uses then
	checked string             // the refresh token that was checked
	facts   tokenservice.Facts // of the refresh token that was checked
	flight  *flight            // the exchange that verifies the write, and stores it; nil: none has begun
	grant   *grantOf           // the person's consent that has brought the refresh token; nil: an operator has written it
	// before is the entry that the write was checked with, nil for none. A setting that another write has changed since stays as that
	// write left it.
	before *tenantEntry
}

// grantOf is what is known of a person's consent.
type grantOf struct {
	by      string
	at      time.Time
	subject string
	from    string              // the lineage that the tenant must have still
	to      string              // the connector_id that it was granted to
	facts   *tokenservice.Facts // what the service has told of the refresh token beside it; nil: nothing
}

// newTenantChange reads a write. A null sets a field to its default.
func newTenantChange(d *framework.FieldData, patch bool) (*tenantChange, error) {
	c := &tenantChange{verify: true, patch: patch, lineage: rand.Text()}
	for name, raw := range d.Raw {
		var err error
		switch name {
		case "refresh_token":
			token, _ := raw.(string)
			token = strings.TrimSpace(token)
			c.refreshToken, c.written = &token, &token
			if token == "" {
				err = badValue("refresh_token is empty: give the refresh token that the service has issued")
			}
		case "connector":
			connector := d.Get("connector").(string)
			c.connector = &connector
			switch {
			case raw == nil:
				connector = defaultConnector
			case connector == "":
				err = badValue("connector is empty: give a connector's name, or leave it out for %q", defaultConnector)
			default:
				err = checkName(connector, "connector")
			}
		case "ttl":
			c.ttl, err = duration(d, name, 0)
		case "max_ttl":
			c.maxTTL, err = duration(d, name, 0)
		case "min_ttl":
			c.minTTL, err = duration(d, name, defaultMinTTL)
		case "retire_on_revoke":
			keeps := !*boolOr(d, name, true)
			c.keepOnRevoke = &keeps
		case "token_per_lease":
			c.tokenPerLease = boolOr(d, name, false)
		case "verify":
			c.verify = *boolOr(d, name, true)
		}
		if err != nil {
			return nil, err
		}
	}
	return c, nil
}

func duration(d *framework.FieldData, name string, byDefault time.Duration) (*time.Duration, error) {
	v, err := secondsOr(d, name, byDefault)
	return &v, err
}

func boolOr(d *framework.FieldData, name string, byDefault bool) *bool {
	if d.Raw[name] != nil {
		byDefault = d.Get(name).(bool)
	}
	return &byDefault
}

// retiresTokens says whether the write replaces what access tokens come from.
func (c *tenantChange) retiresTokens() bool {
	return c.refreshToken != nil || c.connector != nil || c.again
}

// repeats says whether the write names the refresh token that was written last, and that the service has replaced since: a client has
// sent its write a second time, perhaps because it got a 503. The service may end the grant of a replaced refresh token that is sent
// again. Where it refuses the present one, there is nothing to lose.
func (c *tenantChange) repeats(e *tenantEntry) bool {
	return c.written != nil && e != nil && e.RefreshToken != *c.written && e.CameFrom == hashOf(*c.written) && e.Rejected.IsZero()
}

// apply makes the change to an entry, nil for a tenant that is new.
func (c *tenantChange) apply(base *tenantEntry) *tenantEntry {
	next := &tenantEntry{Connector: defaultConnector, MinTTL: defaultMinTTL}
	if base != nil {
		*next = *base
	}
	next.Format = entryFormat
	was := next
	if c.before != nil {
		was = c.before
	}
	set(&next.Connector, c.connector, next.Connector)
	set(&next.TTL, c.ttl, was.TTL)
	set(&next.MaxTTL, c.maxTTL, was.MaxTTL)
	set(&next.MinTTL, c.minTTL, was.MinTTL)
	set(&next.TokenPerLease, c.tokenPerLease, was.TokenPerLease)
	set(&next.KeepOnRevoke, c.keepOnRevoke, was.KeepOnRevoke)
	if c.refreshToken != nil {
		next.RefreshToken, next.CameFrom = *c.refreshToken, hashOf(*c.refreshToken)
		next.RefreshTokenOrigin = originOperator
		next.RefreshTokenSet = time.Now().UTC().Truncate(time.Millisecond)
		next.Granted, next.GrantedBy, next.Subject = time.Time{}, "", ""
		if c.grant != nil {
			next.Granted, next.GrantedBy, next.Subject = c.grant.at, c.grant.by, c.grant.subject
		}
	}
	if c.retiresTokens() {
		next.Lineage = c.lineage
		next.Facts = c.facts
		next.Move = nil
		next.Verified, next.Rejected, next.LastExchange = false, time.Time{}, time.Time{}
		next.Access, next.AccessTokenLife = nil, 0
		next.EndsBy, next.Unleased = time.Time{}, nil
	}
	return next
}

// set sets a field to the value that a write names, if it does, unless the field is not what it was when the write was checked.
func set[T comparable](field, value *T, was T) {
	if value != nil && *field == was {
		*field = *value
	}
}

// tokensAlone is the change without its settings.
func (c *tenantChange) tokensAlone() *tenantChange {
	next := *c
	next.ttl, next.maxTTL, next.minTTL, next.tokenPerLease, next.keepOnRevoke = nil, nil, nil, nil, nil
	return &next
}

// settingsAreIn says whether an entry has the settings of the change.
func (c *tenantChange) settingsAreIn(e *tenantEntry) bool {
	return has(e.TTL, c.ttl) && has(e.MaxTTL, c.maxTTL) && has(e.MinTTL, c.minTTL) &&
		has(e.TokenPerLease, c.tokenPerLease) && has(e.KeepOnRevoke, c.keepOnRevoke)
}

func has[T comparable](field T, value *T) bool { return value == nil || field == *value }

// validate says what is wrong with an entry that is about to be stored.
func (ts *tenants) validate(ctx context.Context, e *tenantEntry) error {
	switch {
	case e.RefreshToken == "":
		return badValue("refresh_token is required: give the refresh token that the service has issued")
	case e.MaxTTL > 0 && e.TTL > e.MaxTTL:
		return badValue("ttl is over max_ttl: give a ttl of %s at most", e.MaxTTL)
	case !e.TokenPerLease:
		return nil
	}
	via, err := ts.connectors.of(ctx, e.Connector)
	if err != nil {
		return err
	}
	if !mayOwnTokens(via.about) {
		return badValue("token_per_lease needs a connector with revocation=access_token and exchange_invalidates=false: connector %q cannot revoke one access token alone while others live", e.Connector)
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
	change, err := newTenantChange(d, patch)
	if err != nil {
		return answer(err)
	}
	ctx, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	if change.retiresTokens() {
		if err = b.replaceTokens(ctx, name, change); err == nil {
			// What is pending has ended with the write; what is left of it goes with the next sweep otherwise.
			_ = b.endAttempts(ctx, name)
			b.revocations.wakeAll()
		}
	} else {
		err = b.changeSettings(ctx, name, change)
	}
	if err != nil {
		return answer(err)
	}
	resp := done(d)
	warn := func(text string) {
		if resp == nil {
			resp = &logical.Response{}
		}
		resp.AddWarning(text)
	}
	if t, v := b.tenants.cached(name); v != nil {
		if change.retiresTokens() && v.trouble != nil {
			warn("The write is stored, but " + v.trouble.text)
		}
		if (change.keepOnRevoke != nil || change.connector != nil) && v.entry.KeepOnRevoke {
			if retires, _ := b.retires(ctx, v.entry); retires {
				warn("retire_on_revoke=false has no effect: connector " + v.entry.Connector + " revokes access tokens at the service.")
			}
		}
		if change.retiresTokens() && t.hasCutShort(time.Now()) {
			warn(cutShortText)
		}
		if !change.settingsAreIn(v.entry) {
			warn("Another write of the tenant came meanwhile, and its settings were kept: read the tenant.")
		}
	}
	return resp, nil
}

// changeSettings stores a write that leaves the refresh token and the connector as they are. What the tenant then needs of its
// connector cannot be taken from that meanwhile.
func (b *backend) changeSettings(ctx context.Context, name string, change *tenantChange) error {
	if change.tokenPerLease == nil || !*change.tokenPerLease {
		return b.tenants.change(ctx, name, change)
	}
	for {
		t, v, err := b.tenants.load(ctx, name)
		if err != nil {
			return err
		}
		if t == nil {
			return b.tenants.change(ctx, name, change) // which says what is missing
		}
		via, err := b.connectors.of(ctx, v.entry.Connector)
		if err != nil {
			return err
		}
		change.target = v.entry.Connector
		if err := b.storeUnverified(ctx, name, via, change); !errors.Is(err, errSuperseded) {
			return err
		}
	}
}

// replaceTokens writes a refresh token or a connector, after all checks that need no call. With verify, the service has to accept it first.
func (b *backend) replaceTokens(ctx context.Context, name string, change *tenantChange) error {
	if change.refreshToken != nil {
		end, err := b.revocations.beginWrite(ctx, *change.refreshToken)
		defer func() { b.endWrite(change, end) }()
		if err == nil {
			err = b.revocations.load(ctx) // which the write needs when it is stored
		}
		if err != nil {
			return err
		}
	}
	for {
		t, v, err := b.tenants.load(ctx, name)
		if err != nil {
			return err
		}
		if t == nil && change.patch {
			return notFound("there is no tenant %q to patch", name)
		}
		via, err := b.prepare(ctx, v, change)
		if err != nil {
			return err
		}
		if change.verify {
			err = b.verify(ctx, name, t, v, via, change)
		} else {
			err = b.storeUnverified(ctx, name, via, change)
		}
		if !errors.Is(err, errSuperseded) {
			return err
		}
	}
}

// endWrite calls end once the write of a refresh token has ended, which may be after the writer has gone.
func (b *backend) endWrite(change *tenantChange, end func()) {
	if f := change.flight; f != nil {
		select {
		case <-f.done:
		default:
			b.goWork(func() {
				<-f.done
				end()
			})
			return
		}
	}
	end()
}

// prepare checks what can be known before the service is asked, and returns the connector.
func (b *backend) prepare(ctx context.Context, v *tenantView, change *tenantChange) (*loadedConnector, error) {
	change.before = v.entry
	if change.written != nil {
		change.refreshToken, change.again = change.written, change.repeats(v.newest())
		if change.again {
			change.refreshToken = nil
		}
	}
	next := change.apply(change.before)
	if next.RefreshToken == "" {
		return nil, b.tenants.validate(ctx, next)
	}
	change.target = next.Connector
	via, err := b.target(ctx, change)
	if err != nil {
		return nil, err
	}
	if g := change.grant; g != nil && g.facts != nil {
		change.facts = *g.facts // the service has just issued the refresh token: where its own exp is over, a clock is wrong
	} else if change.facts, err = via.service.Check(next.RefreshToken); err != nil {
		return nil, badValue("refresh_token does not fit connector %q: %s", next.Connector, err)
	}
	change.checked = next.RefreshToken
	return via, b.tenants.validate(ctx, next)
}

// target returns the connector that a tenant has once a write is stored.
func (b *backend) target(ctx context.Context, change *tenantChange) (*loadedConnector, error) {
	via, err := b.connectors.of(ctx, change.target)
	if err == nil && change.grant != nil && change.grant.to != via.entry.ConnectorID {
		return nil, badValue("connector %q was given another connector_id meanwhile, with which the new refresh token is of no use: start again", change.target)
	}
	return via, err
}

// storeUnverified stores a write without asking the service. The connector stays while that is done.
func (b *backend) storeUnverified(ctx context.Context, name string, via *loadedConnector, change *tenantChange) error {
	if err := via.binding.Acquire(ctx, 1); err != nil {
		return err
	}
	defer via.binding.Release(1)
	if _, err := b.target(ctx, change); err != nil {
		return err
	}
	return b.tenants.change(ctx, name, change)
}

// verify exchanges the refresh token that a write names, and stores the write when that succeeds. The exchange outlives the
// writer's patience: its answer may hold the only refresh token that is still good. errSuperseded says to look at the tenant
// again: nothing of the write has been tried yet.
func (b *backend) verify(ctx context.Context, name string, t *tenant, v *tenantView, via *loadedConnector, change *tenantChange) error {
	if v.kept != nil && change.refreshToken == nil {
		// The write goes on with the refresh token that the service has sent, once storage has that.
		if _, err := b.exchanger.exchange(ctx, t, v, want{}); err != nil && !errors.Is(err, errSuperseded) {
			return err
		}
		return errSuperseded
	}
	w := want{change: change}
	// Either a delete of the connector finds this flight, or startVerified finds that the connector is deleted.
	if err := via.binding.Acquire(ctx, 1); err != nil {
		return err
	}
	f, own, err := b.startVerified(ctx, name, t, v, w)
	via.binding.Release(1)
	if err != nil {
		return err
	}
	if own {
		change.flight = f
	}
	select {
	case <-f.done:
	case <-ctx.Done():
		if !own {
			return tryAgain("another exchange of tenant %q is under way: nothing of this write was stored; write again in a minute", name)
		}
		return tryAgain("%s has not answered yet, so nothing is stored for now: if it accepts the refresh token later, the write will be stored then, unless Vault is stopped before that; read tenants/%s in a minute, and write again if it is not there", upperFirst(via.about.Name), name)
	}
	switch {
	case !own:
		return errSuperseded // its turn comes now
	case errors.Is(f.err, errSuperseded):
		return tryAgain("another write or a delete of tenant %q came meanwhile: nothing of this write was stored; look at the tenant, and write again", name)
	case f.err != nil:
		return verifyError(via.about, name, change.target, f.err)
	}
	return nil
}

// startVerified starts the exchange that verifies a write, while its connector cannot be deleted or changed: it may have been
// since the write was checked. t is nil where there is no tenant of that name.
func (b *backend) startVerified(ctx context.Context, name string, t *tenant, v *tenantView, w want) (*flight, bool, error) {
	if t == nil {
		t = b.tenants.record(name)
		defer b.tenants.release(t)
		if v = t.view.Load(); v.summary.stored || v.kept != nil {
			return nil, false, errSuperseded // another request has made the tenant meanwhile
		}
	}
	if _, err := b.prepare(ctx, v, w.change); err != nil {
		return nil, false, err
	}
	return b.exchanger.start(ctx, t, v, w)
}

// verifyError says what a failed verification means to the writer.
func verifyError(about tokenservice.About, tenant, connector string, err error) error {
	if isRejection(err) {
		return badValue("%s refuses this refresh token with connector %q: nothing was stored; for that connector, %s", upperFirst(about.Name), connector, remedy(about, tenant))
	}
	var coded logical.HTTPCodedError
	switch err = readerError(about, tenant, connector, err); {
	case errors.Is(err, context.Canceled):
		return errStopping
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
	ctx, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	t, v, err := b.tenants.load(ctx, name)
	if err != nil {
		return answer(err)
	}
	if t == nil {
		return nil, nil
	}
	resp := b.statusResponse(t, v)
	if t.hasCutShort(time.Now()) {
		resp.AddWarning(cutShortText)
	}
	return resp, nil
}

const cutShortText = "A refresh or a write has ended an access token, or may have, before the leases on it end: leases on it are of no use any more."

// deleteTenant forgets a tenant, and has revoked at the service what its connector says.
func (b *backend) deleteTenant(ctx context.Context, _ *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	name, err := nameOf(d, "tenant")
	if err != nil {
		return nil, nil
	}
	ctx, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	for begun, again := time.Now(), true; again; again = b.grantedMeanwhile(ctx, name, begun) {
		if err := b.tenants.remove(ctx, name); err != nil {
			return answer(err)
		}
		b.revocations.wakeAll()
		if err := b.endAttempts(ctx, name); err != nil {
			return answer(err)
		}
	}
	if err := b.forgetUnreadable(ctx, name); err != nil {
		return answer(err)
	}
	b.grants.lookAt(name) // storage forgets what it has of them a day later
	return done(d), nil
}

// refreshTenant exchanges a tenant's refresh token now, so that the older access token is not handed out any more.
func (b *backend) refreshTenant(ctx context.Context, _ *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	name, err := nameOf(d, "tenant")
	if err != nil {
		return answer(err)
	}
	waiting, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	var retired *string // the generation that readers had when this began
	for {
		t, v, err := b.tenants.loadCreated(waiting, name)
		switch {
		case err != nil:
			return answer(err)
		case t == nil:
			return answer(notFound("there is no tenant %q", name))
		}
		generation := "" // of the access token that readers get: the entry may have one that memory keeps for another try to store it
		if v.access != nil {
			generation = v.access.Generation
		}
		if retired == nil {
			retired = &generation
		} else if generation != *retired && generation != "" {
			resp := b.statusResponse(t, v)
			if v.access != nil && !v.access.Planned.IsZero() && *retired != "" {
				resp.AddWarning("The exchange has ended the previous access token: leases on it are of no use any more.")
			}
			b.revocations.wakeAll()
			return resp, nil
		}
		switch _, err := b.exchanger.exchange(waiting, t, v, want{force: true}); {
		case err == nil, errors.Is(err, errSuperseded):
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case errors.Is(err, context.DeadlineExceeded) && t.isVerifying():
			return answer(tryAgain("%s has not answered yet to the exchange that verifies a write of tenant %q: the present access token was not retired; refresh again in a minute", upperFirst(b.serviceName(v.entry.Connector)), name))
		case errors.Is(err, context.DeadlineExceeded):
			return answer(tryAgain("%s has not answered for tenant %q yet: the exchange goes on, and its access token will be handed out once it is there, unless Vault is stopped before that; nothing was lost", upperFirst(b.serviceName(v.entry.Connector)), name))
		default:
			return answer(b.readerError(name, v.entry.Connector, err))
		}
	}
}

func (b *backend) listTenants(ctx context.Context, _ *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
	names, err := b.storage.List(ctx, tenantPrefix)
	if err != nil {
		return answer(err)
	}
	b.buildIndex()
	b.awaitIndex(ctx)
	now := time.Now()
	info := make(map[string]any, len(names))
	for _, name := range names {
		t := b.tenants.named(name)
		if t == nil {
			continue
		}
		v := t.view.Load()
		if !v.summary.stored {
			continue
		}
		one := map[string]any{"status": v.summary.status(now, v.trouble), "connector": v.summary.connector}
		if v.summary.expires != 0 {
			one["refresh_token_expire_time"] = stamp(time.Unix(v.summary.expires, 0))
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
