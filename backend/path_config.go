package backend

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/share"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/tokenservice"
)

const defaultExchangesPerMinute = 50

func (b *backend) configPaths() []*framework.Path {
	fields := connectorFields()
	one := b.configPath("config/?$", "default connector", fields)
	one.Operations[logical.ListOperation] = operation("list", "connectors", "List the connectors.",
		"Only the names. The connector at config is named \"default\".",
		responses(http.StatusOK, "The connectors' names.", connectorListFields), b.listConnectors)
	named := b.configPath("config/"+framework.GenericNameRegex("connector"), "connector", merged(fields, namedConnectorField))
	return []*framework.Path{one, named}
}

func (b *backend) configPath(pattern, what string, fields map[string]*framework.FieldSchema) *framework.Path {
	suffix := strings.ReplaceAll(what, " ", "-")
	write := operation("configure", suffix, "Configure the "+what+".",
		"Changes only the fields that the request names. After it, exchanges that were refused or postponed are tried again.",
		noContent("The connector was written."), b.writeConnector)
	return &framework.Path{
		Pattern:        pattern,
		Fields:         fields,
		ExistenceCheck: b.connectorExists,
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.CreateOperation: write,
			logical.UpdateOperation: write,
			logical.PatchOperation: operation("patch", suffix, "Change some settings of the "+what+".",
				"Like a write, but the connector must exist. A JSON null sets a field to its default: vault patch reads JSON from standard input where its argument is -.",
				noContent("The connector was changed."), b.patchConnector),
			logical.ReadOperation: operation("read", suffix, "Read the "+what+", without its secret.",
				"All of its settings except connector_secret, which cannot be read back.",
				responses(http.StatusOK, "The connector, without its secret.", connectorReadFields()), b.readConnector),
			logical.DeleteOperation: operation("delete", suffix, "Delete the "+what+".",
				"Refused while tenants use it: first move them to another connector, or delete them. Refused, too, while its access tokens are still to be revoked, now or with their leases.",
				noContent("There is no such connector any more."), b.deleteConnector),
		},
		DisplayAttrs:    &framework.DisplayAttributes{OperationPrefix: operationPrefix},
		HelpSynopsis:    "The " + what + ": how the engine reaches a token service.",
		HelpDescription: configHelp,
	}
}

// connectorName is the name in the path, or the default connector's where the path has none.
func connectorName(d *framework.FieldData) (string, error) {
	if d.Schema["connector"] == nil {
		return defaultConnector, nil
	}
	return nameOf(d, "connector")
}

func (b *backend) connectorExists(ctx context.Context, _ *logical.Request, d *framework.FieldData) (bool, error) {
	name, err := connectorName(d)
	if err != nil {
		return false, nil // for the handler to refuse
	}
	entry, err := getConnector(ctx, b.storage, name)
	if errors.Is(err, errUnreadable) {
		return true, nil // for the handler to explain: Vault shows no error of this function
	}
	return entry != nil, err
}

func (b *backend) writeConnector(ctx context.Context, _ *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	return b.changeConnector(ctx, d, false)
}

func (b *backend) patchConnector(ctx context.Context, _ *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	return b.changeConnector(ctx, d, true)
}

// changeConnector answers a write of config: it makes the connector that the write asks for, makes sure that what uses the
// connector allows the change, and stores it.
func (b *backend) changeConnector(ctx context.Context, d *framework.FieldData, patch bool) (*logical.Response, error) {
	name, err := connectorName(d)
	if err != nil {
		return answer(err)
	}
	ctx, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	found, err := b.discovered(ctx, name, d, patch)
	if err != nil {
		return answer(err)
	}
	binding := b.connectors.record(name).binding
	if err := binding.Acquire(ctx, exclusive); err != nil {
		return answer(err)
	}
	defer binding.Release(exclusive)

	was, next, err := b.changedConnector(ctx, name, d, patch)
	if err != nil {
		return answer(err)
	}
	if found != nil {
		found(next)
	}
	service, err := next.service(b.connectors.transport)
	if err != nil {
		return answer(fieldProblem(err))
	}
	if err := b.mayChange(ctx, name, was, next, service.About()); err != nil {
		service.Close()
		return answer(err)
	}
	// A write that was cut off would leave memory and storage in doubt.
	ctx, cancel = context.WithTimeout(context.WithoutCancel(ctx), storeWithin)
	defer cancel()
	before, owed := b.connectors.present(name), b.owedBy(name)
	err = b.connectors.put(ctx, name, next, service)
	b.tenants.connectorChanged(name, !before.plansAs(service.About())) // where the write has failed, storage may have it
	if err != nil {
		return answer(err)
	}
	b.index.resume(name)
	warnings := joinedPairs(d)
	dropped, err := b.revocations.drop(ctx, name, service.About())
	if err != nil {
		return answer(err)
	}
	if service.About().Revocation != tokenservice.RevokeByExchange {
		dropped += owed
	}
	if dropped > 0 {
		warnings = append(warnings, plural(dropped, "revocation")+" that had not been sent yet will not be made.")
	}
	if warnings != nil {
		return &logical.Response{Warnings: warnings}, nil
	}
	return done(d), nil
}

// furtherPair is what looks like a further name=value inside of a value.
var furtherPair = regexp.MustCompile(`,\s*[A-Za-z_][A-Za-z0-9_.-]*=`)

// joinedPairs warns of maps that were probably meant to have more names: the command line splits no argument at its commas.
func joinedPairs(d *framework.FieldData) (warnings []string) {
	for name, raw := range d.Raw {
		if d.Schema[name] == nil || d.Schema[name].Type != framework.TypeKVPairs {
			continue
		}
		if _, isObject := raw.(map[string]any); isObject {
			continue // which says where a value ends
		}
		given, _ := pairs(raw) // what cannot be read was refused
		if slices.ContainsFunc(slices.Collect(maps.Values(given)), furtherPair.MatchString) {
			warnings = append(warnings, fmt.Sprintf("%s: what follows a comma belongs to the value before it. To write several parameters on the command line, repeat the argument: %s=NAME=VALUE %s=NAME=VALUE", name, name, name))
		}
	}
	return warnings
}

// changedConnector returns the stored connector, nil for none, and what a write makes of it.
func (b *backend) changedConnector(ctx context.Context, name string, d *framework.FieldData, patch bool) (was, next *connectorEntry, err error) {
	if was, err = getConnector(ctx, b.storage, name); err != nil {
		return nil, nil, err
	}
	if was == nil && patch {
		return nil, nil, notFound("connector %q is not configured, so there is nothing to patch", name)
	}
	service := defaultService
	if was != nil {
		service = was.Service
	}
	if raw, ok := d.Raw["service"]; ok {
		service = textOf(d, "service")
		if raw == nil {
			service = defaultService
		}
		if _, ok := serviceKinds[service]; !ok {
			return nil, nil, badValue("service has to be one of %s", strings.Join(serviceNames(), ", "))
		}
	}
	if was == nil {
		next = newConnectorEntry(service)
		return was, next, next.change(d)
	}
	copied := *was
	next = &copied
	next.Settings = was.Settings.clone()
	if service != was.Service {
		next.Service, next.Settings = service, serviceKinds[service].settings()
		if was.RequestTimeout == serviceKinds[was.Service].requestTimeout {
			next.RequestTimeout = serviceKinds[service].requestTimeout // each kind has its own default
		}
	}
	return was, next, next.change(d)
}

// discovered asks the service for what it says about itself, where the write wants that, before anything is locked. It returns
// a function that takes the answer into the connector.
func (b *backend) discovered(ctx context.Context, name string, d *framework.FieldData, patch bool) (func(*connectorEntry), error) {
	_, next, err := b.changedConnector(ctx, name, d, patch)
	if err != nil {
		return nil, err
	}
	asked := false
	var via *loadedConnector
	permit := func(ctx context.Context) (func(), error) {
		if !b.node.WriteSafeReplicationState() {
			return nil, logical.ErrReadOnly
		}
		asked = true
		var err error
		if via, err = b.connectors.get(ctx, name); err != nil || via == nil {
			return func() {}, ignoreUnusable(err) // one that is not there yet, or that this write is to mend, has no share
		}
		p := passage{via: via, want: share.Want{Wait: patience}, discovery: true}
		return p.permit(ctx)
	}
	err = next.Settings.discover(ctx, next, d, b.connectors.transport, permit)
	failure := (*tokenservice.Failure)(nil)
	limit := (*share.LimitError)(nil)
	// Another server than the connector's may have been asked, because of a typing error, or before a move: that one's limit is not the
	// connector's.
	if errors.As(err, &failure) && via != nil && via.entry.Settings.isAt(textOf(d, "issuer")) {
		b.connectors.judge(via, failure)(ctx)
	}
	switch {
	case errors.Is(err, errReplaced):
		return b.discovered(ctx, name, d, patch) // the connector was written meanwhile: go by what it is now
	case failure != nil && isLimit(failure):
		return nil, tooMany(time.Now().Add(restOf(failure)), "nothing was stored: the issuer permits no further calls")
	case failure != nil:
		return nil, tryAgain("nothing was stored: %s", failure.Text)
	case errors.As(err, &limit):
		return nil, limitReached(b.connectors.about(name), name, limit, "the share of calls of the connector is used up")
	case errors.Is(err, context.DeadlineExceeded):
		return nil, tryAgain("nothing was stored: the issuer has not answered in time; try again later")
	case err != nil:
		return nil, fieldProblem(err)
	case !asked:
		return nil, nil
	}
	return func(c *connectorEntry) { c.Settings.take(next.Settings) }, nil
}

// mayChange refuses changes that what uses the connector does not allow. The caller holds the binding alone.
func (b *backend) mayChange(ctx context.Context, name string, was, next *connectorEntry, about tokenservice.About) error {
	if was == nil {
		return nil
	}
	if next.Service != was.Service {
		if err := b.unused(ctx, name, "its service is not changed"); err != nil {
			return err
		}
	}
	if next.ConnectorID != was.ConnectorID && was.ConnectorID != "" {
		if err := b.unused(ctx, name, "its connector_id is not changed"); err != nil {
			return err
		}
	}
	if before, err := was.service(b.connectors.transport); err == nil {
		defer before.Close()
		if mayOwnTokens(before.About()) && !mayOwnTokens(about) {
			if err := b.noTokenPerLease(ctx, name); err != nil {
				return err
			}
		}
	}
	return nil
}

// mayOwnTokens says whether a service can give each lease an access token of its own.
func mayOwnTokens(about tokenservice.About) bool {
	return about.Revocation == tokenservice.RevokeAccessToken && !about.ExchangeInvalidates
}

// noTokenPerLease refuses what a tenant with token_per_lease does not allow.
func (b *backend) noTokenPerLease(ctx context.Context, name string) error {
	if err := b.knowsTenants(ctx, name); err != nil {
		return err
	}
	var found []string
	b.tenants.each(func(t *tenant) {
		if t.ownsTokens(name) {
			found = append(found, t.name)
		}
	})
	if len(found) == 0 {
		return nil
	}
	slices.Sort(found)
	return badValue("tenant %q has token_per_lease, which needs revocation=access_token and exchange_invalidates=false: write token_per_lease=false there first", found[0])
}

func stillReading(connector string) error {
	return tryAgain("the engine is still reading its tenants, so it cannot tell yet who uses connector %q: try again in a moment", connector)
}

// unused refuses what is not done to a connector that tenants use, or that still has revocations to make or may have to. The caller
// holds the binding alone.
func (b *backend) unused(ctx context.Context, name, refusal string) error {
	if err := b.knowsTenants(ctx, name); err != nil {
		return err
	}
	var users []string
	b.tenants.each(func(t *tenant) {
		if t.uses(name) {
			users = append(users, t.name)
		}
	})
	const shown = 10
	if len(users) > 0 {
		slices.Sort(users)
		return badValue("connector %q is used by %s, so %s: move each to another connector or delete it first (%s)",
			name, plural(len(users), "tenant"), refusal, strings.Join(users[:min(shown, len(users))], ", "))
	}
	if err := b.revocations.load(ctx); err != nil {
		return err
	}
	// In this order: the end of a lease makes a pending revocation of what was held.
	if of, until := b.revocations.heldOf(name); len(of) > 0 {
		return badValue("connector %q has leases of %s whose access tokens are revoked with them, so %s: revoke these leases (such as vault lease revoke -prefix kaizala/creds/%s), or wait until %s (%s)",
			name, plural(len(of), "tenant"), refusal, of[0], stamp(until), strings.Join(of[:min(shown, len(of))], ", "))
	}
	if pending, _ := b.revocations.pendingOf(name); pending > 0 {
		return badValue("connector %q still has %s to make, so %s: wait until pending_revocations is gone", name, plural(pending, "revocation"), refusal)
	}
	return nil
}

// knowsTenants makes sure that memory knows what each tenant in storage needs of a connector, except a tenant that storage still fails
// to read: one bad key must not prevent the delete of every connector for ever.
func (b *backend) knowsTenants(ctx context.Context, connector string) error {
	b.buildIndex()
	if !b.awaitIndex(ctx) {
		return stillReading(connector)
	}
	b.readUnread(ctx)
	if !b.readDoubted(ctx) {
		return stillReading(connector)
	}
	return nil
}

// readDoubted reads those tenants again of which storage may have something else than memory. It says whether it could.
func (b *backend) readDoubted(ctx context.Context) bool {
	done := true
	b.tenants.each(func(t *tenant) {
		if v := t.view.Load(); v.knows == doubted && v.kept == nil {
			_, _, err := b.tenants.load(ctx, t.name)
			done = done && (err == nil || errors.Is(err, errUnreadable))
		}
	})
	return done
}

func (b *backend) readConnector(ctx context.Context, _ *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	name, err := connectorName(d)
	if err != nil {
		return nil, nil
	}
	entry, err := getConnector(ctx, b.storage, name)
	if err != nil || entry == nil {
		return nil, err
	}
	data := entry.show()
	b.showRevocations(data, name, nil)
	return &logical.Response{Data: data}, nil
}

func (b *backend) deleteConnector(ctx context.Context, _ *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	name, err := connectorName(d)
	if err != nil {
		return nil, nil
	}
	ctx, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	binding := b.connectors.record(name).binding
	if err := binding.Acquire(ctx, exclusive); err != nil {
		return answer(err)
	}
	defer binding.Release(exclusive)
	entry, err := getConnector(ctx, b.storage, name)
	switch {
	case entry == nil && err == nil: // a delete that failed may have left what is stored of the connector's calls
	case err != nil && !errors.Is(err, errUnreadable):
		return answer(err)
	default:
		if err := b.unused(ctx, name, "it is not deleted"); err != nil {
			return answer(err)
		}
	}
	ctx, cancel = context.WithTimeout(context.WithoutCancel(ctx), storeWithin)
	defer cancel()
	if err := b.connectors.remove(ctx, name); err != nil {
		return answer(err)
	}
	return done(d), nil
}

func (b *backend) listConnectors(ctx context.Context, _ *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
	names, err := b.storage.List(ctx, connectorPrefix)
	if err != nil {
		return answer(err)
	}
	return logical.ListResponse(names), nil
}
