package backend

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/tokenservice"
)

// serviceKind is one kind of token service: what config says of it, and how a client is made of that.
type serviceKind struct {
	// fields are those of config that belong to this kind. Kinds may share a field of one name and type.
	fields map[string]*framework.FieldSchema
	// settings returns the defaults.
	settings func() serviceSettings
	// requestTimeout is the default of request_timeout.
	requestTimeout time.Duration
}

// serviceKinds are the kinds of service by the value of "service" in config.
var serviceKinds = map[string]serviceKind{
	"kaizala": kaizalaKind,
	"oauth2":  oauthKind,
}

// defaultService is the kind of a connector that names none.
const defaultService = "kaizala"

// serviceSettings are the fields of one kind. Their JSON form is stored.
type serviceSettings interface {
	// set sets a field that a write names. A null sets it to its default.
	set(d *framework.FieldData, name string) error
	// show adds the fields to what a read of config answers.
	show(data map[string]any)
	// check says what must be written before the connector can be stored.
	check(c *connectorEntry) error
	// missing says what must be written to the connector of that name before a call can be made.
	missing(c *connectorEntry, name string) error
	// discover asks the service for what it says about itself, where a write wants that.
	discover(ctx context.Context, c *connectorEntry, d *framework.FieldData, transport http.RoundTripper, permit tokenservice.Permit) error
	// isAt says whether exchanges go to the host of an issuer, which discover asks.
	isAt(issuer string) bool
	// take takes over what discover has found for others: settings of the same kind.
	take(others serviceSettings)
	// client makes the client. Its error is a *tokenservice.FieldError.
	client(c *connectorEntry, transport http.RoundTripper) (tokenservice.Service, error)
	// address is what a tenant's move holds for.
	address() string
	// clone returns a copy that set can change: set replaces lists and maps whole.
	clone() serviceSettings
}

// connectorEntry is a connector as storage keeps it.
type connectorEntry struct {
	Format             int           `json:"format"`
	Service            string        `json:"service"`
	ConnectorID        string        `json:"connector_id"`
	ConnectorSecret    string        `json:"connector_secret"`
	CACert             string        `json:"ca_cert,omitempty"`
	RequestTimeout     time.Duration `json:"request_timeout"`
	ExchangesPerMinute int           `json:"exchanges_per_minute"`
	// Refused is when the service refused the connector as it is; zero: it did not.
	Refused time.Time `json:"refused,omitzero"`

	Settings serviceSettings `json:"settings"`
}

// UnmarshalJSON reads the entry and its kind's settings. Version 0.1.0 knew one kind, whose settings stood beside the rest.
func (c *connectorEntry) UnmarshalJSON(data []byte) error {
	type plain connectorEntry
	stored := struct {
		*plain
		Settings json.RawMessage `json:"settings"`
	}{plain: (*plain)(c)}
	if err := json.Unmarshal(data, &stored); err != nil {
		return err
	}
	if c.Service == "" {
		c.Service, stored.Settings = defaultService, data
	}
	kind, ok := serviceKinds[c.Service]
	if !ok {
		return fmt.Errorf("unknown service")
	}
	c.Settings = kind.settings()
	return json.Unmarshal(stored.Settings, c.Settings)
}

// newConnectorEntry returns a connector of that kind with the defaults.
func newConnectorEntry(service string) *connectorEntry {
	kind := serviceKinds[service]
	return &connectorEntry{
		Service:            service,
		RequestTimeout:     kind.requestTimeout,
		ExchangesPerMinute: defaultExchangesPerMinute,
		Settings:           kind.settings(),
	}
}

func getConnector(ctx context.Context, s logical.Storage, name string) (*connectorEntry, error) {
	return getEntry[connectorEntry](ctx, s, connectorPrefix+name)
}

func (c *connectorEntry) service(transport http.RoundTripper) (tokenservice.Service, error) {
	return c.Settings.client(c, transport)
}

func (c *connectorEntry) address() string { return c.Settings.address() }

// change sets what a write names. A null sets a field to its default.
func (c *connectorEntry) change(d *framework.FieldData) (err error) {
	c.Format = entryFormat
	for _, name := range slices.Sorted(maps.Keys(d.Raw)) {
		raw := d.Raw[name]
		if d.Schema[name] == nil {
			continue
		}
		switch name {
		case "service", "connector":
		case "connector_id":
			c.ConnectorID = strings.TrimSpace(d.Get(name).(string))
		case "connector_secret":
			c.ConnectorSecret = strings.TrimSpace(d.Get(name).(string))
			if mistake := tokenservice.PasteMistake(c.ConnectorSecret); mistake != "" {
				err = badValue("%s %s", name, mistake)
			}
		case "ca_cert":
			if c.CACert = d.Get(name).(string); len(c.CACert) > tokenservice.MaxCABytes {
				err = badValue("%s must not be longer than %d bytes", name, tokenservice.MaxCABytes)
			}
		case "request_timeout":
			c.RequestTimeout = serviceKinds[c.Service].requestTimeout
			if raw != nil {
				c.RequestTimeout, err = seconds(d, name)
			}
		case "exchanges_per_minute":
			c.ExchangesPerMinute = defaultExchangesPerMinute
			if raw != nil {
				c.ExchangesPerMinute, err = wholeNumberOf(d, name)
			}
		default:
			if serviceKinds[c.Service].fields[name] == nil {
				return badValue("%s is not a field of a connector with service=%s: leave it out, or give the right service with it", name, c.Service)
			}
			err = c.Settings.set(d, name)
		}
		if err != nil {
			return err
		}
	}
	switch {
	case c.RequestTimeout < time.Second:
		return badValue("request_timeout has to be 1s or more")
	case c.ExchangesPerMinute < 1:
		return badValue("exchanges_per_minute has to be 1 or more")
	}
	return c.Settings.check(c)
}

// show is all of a connector that may be shown.
func (c *connectorEntry) show() map[string]any {
	data := map[string]any{
		"service":              c.Service,
		"connector_id":         c.ConnectorID,
		"ca_cert":              c.CACert,
		"request_timeout":      int64(c.RequestTimeout.Seconds()),
		"exchanges_per_minute": c.ExchangesPerMinute,
	}
	c.Settings.show(data)
	return data
}

// serviceNames returns the kinds of service, in order.
func serviceNames() []string { return slices.Sorted(maps.Keys(serviceKinds)) }

// serviceFields are the fields of all kinds together.
func serviceFields() map[string]*framework.FieldSchema {
	all := map[string]*framework.FieldSchema{}
	for _, name := range serviceNames() {
		maps.Copy(all, serviceKinds[name].fields)
	}
	return all
}

// fieldProblem turns a client's error about a field of config into an answer.
func fieldProblem(err error) error {
	if problem := (*tokenservice.FieldError)(nil); errors.As(err, &problem) {
		return badValue("%s", problem)
	}
	return err
}
