package backend

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/kaizala"
)

const (
	defaultRequestTimeout     = time.Minute
	defaultExchangesPerMinute = 50
)

func (b *backend) configPaths() []*framework.Path {
	one := b.configPath("config/?$", "default connector", connectorFields)
	one.Operations[logical.ListOperation] = operation("list", "connectors", "List the connectors.",
		"Names alone, config's own \"default\" among them.",
		responses(http.StatusOK, "The connectors' names.", connectorListFields), b.listConnectors)
	named := b.configPath("config/"+framework.GenericNameRegex("connector"), "connector", namedConnectorFields)
	return []*framework.Path{one, named}
}

func (b *backend) configPath(pattern, what string, fields map[string]*framework.FieldSchema) *framework.Path {
	suffix := strings.ReplaceAll(what, " ", "-")
	write := operation("configure", suffix, "Configure the "+what+".",
		"Changes what is named and nothing else. Once it is written, exchanges that were refused or put off are tried again.",
		noContent("The connector was written."), b.writeConnector)
	return &framework.Path{
		Pattern:        pattern,
		Fields:         fields,
		ExistenceCheck: b.connectorExists,
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.CreateOperation: write,
			logical.UpdateOperation: write,
			logical.PatchOperation: operation("patch", suffix, "Change some settings of the "+what+".",
				"As a write, but of a connector that exists; null sets a field to its default.",
				noContent("The connector was changed."), b.patchConnector),
			logical.ReadOperation: operation("read", suffix, "Read the "+what+", without its secret.",
				"All of its settings but connector_secret, which nobody can read back.",
				responses(http.StatusOK, "The connector, without its secret.", connectorReadFields), b.readConnector),
			logical.DeleteOperation: operation("delete", suffix, "Delete the "+what+".",
				"Refused while tenants use it: move them to another connector, or delete them, first.",
				noContent("There is no such connector any more."), b.deleteConnector),
		},
		DisplayAttrs:    &framework.DisplayAttributes{OperationPrefix: operationPrefix},
		HelpSynopsis:    "The " + what + ": how the engine reaches Kaizala.",
		HelpDescription: configHelp,
	}
}

// connectorName is the name in the path, or the default connector's where the
// path has none.
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
	entry, err := b.storedConnector(ctx, name)
	if errors.Is(err, errUnreadable) {
		return true, nil // for the handler to explain: Vault shows no error of this function
	}
	return entry != nil, err
}

func (b *backend) storedConnector(ctx context.Context, name string) (*connectorEntry, error) {
	return getEntry[connectorEntry](ctx, b.storage, connectorPrefix+name)
}

func (b *backend) writeConnector(ctx context.Context, _ *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	return b.changeConnector(ctx, d, false)
}

func (b *backend) patchConnector(ctx context.Context, _ *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	return b.changeConnector(ctx, d, true)
}

func (b *backend) changeConnector(ctx context.Context, d *framework.FieldData, patch bool) (*logical.Response, error) {
	name, err := connectorName(d)
	if err != nil {
		return answer(err)
	}
	b.connectors.binding.Lock()
	defer b.connectors.binding.Unlock()
	entry, err := b.storedConnector(ctx, name)
	if err != nil {
		return answer(err)
	}
	isNew := entry == nil
	if isNew {
		if patch {
			return answer(notFound("connector %q is not configured, so there is nothing to patch", name))
		}
		entry = &connectorEntry{
			APIRoot:            kaizala.DefaultAPIRoot,
			RedirectHosts:      kaizala.DefaultRedirectHosts,
			RequestTimeout:     defaultRequestTimeout,
			ExchangesPerMinute: defaultExchangesPerMinute,
		}
	}
	was := entry.ConnectorID
	if err := entry.change(d); err != nil {
		return answer(err)
	}
	if !isNew && entry.ConnectorID != was {
		if err := b.unused(ctx, name, "its connector_id is not changed"); err != nil {
			return answer(err)
		}
	}
	// A write that was cut off would leave memory and storage in doubt.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), storeWithin)
	defer cancel()
	if err := b.connectors.put(ctx, name, entry); err != nil {
		return answer(err)
	}
	return done(d), nil
}

// change sets what a write names. A null sets a field to its default.
func (e *connectorEntry) change(d *framework.FieldData) (err error) {
	e.Format = entryFormat
	for name, raw := range d.Raw {
		if d.Schema[name] == nil {
			continue
		}
		isNull := raw == nil
		switch name {
		case "connector_id":
			e.ConnectorID = strings.TrimSpace(d.Get(name).(string))
		case "connector_secret":
			e.ConnectorSecret = strings.TrimSpace(d.Get(name).(string))
		case "api_root":
			e.APIRoot = strings.TrimSpace(d.Get(name).(string))
			if isNull {
				e.APIRoot = kaizala.DefaultAPIRoot
			}
		case "ca_cert":
			e.CACert = d.Get(name).(string)
		case "redirect_hosts":
			e.RedirectHosts = d.Get(name).([]string)
			if isNull {
				e.RedirectHosts = kaizala.DefaultRedirectHosts
			}
		case "request_timeout":
			e.RequestTimeout = defaultRequestTimeout
			if !isNull {
				if e.RequestTimeout, err = seconds(d, name); err != nil {
					return err
				}
			}
		case "exchanges_per_minute":
			e.ExchangesPerMinute = defaultExchangesPerMinute
			if !isNull {
				// The framework would take 1.9, true and 0x10 as well.
				if e.ExchangesPerMinute, err = strconv.Atoi(plain(raw)); err != nil {
					return badValue("exchanges_per_minute has to be a whole number, 1 or more")
				}
			}
		}
	}
	switch {
	case e.ConnectorID == "":
		return badValue("connector_id is required: give the ID that Kaizala's portal shows for the connector")
	case e.ConnectorSecret == "":
		return badValue("connector_secret is required: give the secret that Kaizala's portal shows for the connector")
	case e.APIRoot == "":
		return badValue("api_root is empty: give an https URL, or leave it out for %s", kaizala.DefaultAPIRoot)
	case e.RequestTimeout < time.Second:
		return badValue("request_timeout has to be 1s or more")
	case e.ExchangesPerMinute < 1:
		return badValue("exchanges_per_minute has to be 1 or more")
	}
	return nil
}

// unused refuses what is not done to a connector that tenants use. The caller
// holds binding alone.
func (b *backend) unused(ctx context.Context, name, refusal string) error {
	if !b.awaitIndex(ctx) {
		return tryAgain("the engine is still reading its tenants, so it cannot tell yet who uses connector %q: try again in a moment", name)
	}
	var users []string
	b.tenants.each(func(t *tenant) {
		t.mu.Lock()
		defer t.mu.Unlock()
		if t.stored && t.summary.connector == name || t.pending == name {
			users = append(users, t.name)
		}
	})
	if len(users) == 0 {
		return nil
	}
	slices.Sort(users)
	const shown = 10
	return badValue("%d tenants use connector %q, so %s: move them to another connector or delete them first (%s)",
		len(users), name, refusal, strings.Join(users[:min(shown, len(users))], ", "))
}

func (b *backend) readConnector(ctx context.Context, _ *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	name, err := connectorName(d)
	if err != nil {
		return nil, nil
	}
	entry, err := b.storedConnector(ctx, name)
	if err != nil || entry == nil {
		return nil, err
	}
	return &logical.Response{Data: map[string]any{
		"connector_id":         entry.ConnectorID,
		"api_root":             entry.APIRoot,
		"ca_cert":              entry.CACert,
		"redirect_hosts":       entry.RedirectHosts,
		"request_timeout":      int64(entry.RequestTimeout.Seconds()),
		"exchanges_per_minute": entry.ExchangesPerMinute,
	}}, nil
}

func (b *backend) deleteConnector(ctx context.Context, _ *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	name, err := connectorName(d)
	if err != nil {
		return nil, nil
	}
	b.connectors.binding.Lock()
	defer b.connectors.binding.Unlock()
	entry, err := b.storedConnector(ctx, name)
	switch {
	case entry == nil && err == nil:
		return done(d), nil
	case err != nil && !errors.Is(err, errUnreadable):
		return answer(err)
	}
	if err := b.unused(ctx, name, "it is not deleted"); err != nil {
		return answer(err)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), storeWithin)
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
