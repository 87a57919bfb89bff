package backend

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
)

// connectorPrefix is where storage keeps connectors, each under its name.
const connectorPrefix = "config/"

// defaultConnector is the connector that the path config stands for.
const defaultConnector = "default"

// connectorEntry is a connector as storage keeps it.
type connectorEntry struct {
	Format             int           `json:"format"`
	ConnectorID        string        `json:"connector_id"`
	ConnectorSecret    string        `json:"connector_secret"`
	APIRoot            string        `json:"api_root"`
	CACert             string        `json:"ca_cert,omitempty"`
	RedirectHosts      []string      `json:"redirect_hosts"`
	RequestTimeout     time.Duration `json:"request_timeout"`
	ExchangesPerMinute int           `json:"exchanges_per_minute"`
}

// connector is one connector in memory. It outlives writes of its
// configuration, so that these do not forget the calls that were made.
type connector struct {
	name    string
	share   share
	version atomic.Uint64 // counts what makes a load in progress out of date
	loaded  atomic.Pointer[loadedConnector]
	refused atomic.Pointer[serviceError] // Kaizala refuses it until config is written
}

// loadedConnector is a connector's configuration and the service made of it.
type loadedConnector struct {
	*connector
	entry   *connectorEntry
	service tokenService
	// revision changes with each write of the configuration, which ends the
	// backoff of the connector's tenants.
	revision uint64
}

// connectors owns every connector of the mount.
type connectors struct {
	storage   logical.Storage
	transport http.RoundTripper // nil but in tests

	mu     sync.Mutex
	byName map[string]*connector

	// binding is held by whoever makes a tenant use a connector, and held alone
	// by whoever deletes one or changes its ID: a connector in use stays. Only
	// operators' writes take it.
	binding sync.RWMutex
}

// get returns the connector of that name, or nil where there is none. Its error
// is storage's, or says why the stored configuration cannot be used.
func (cs *connectors) get(ctx context.Context, name string) (*loadedConnector, error) {
	for {
		c := cs.named(name)
		if c != nil {
			if l := c.loaded.Load(); l != nil {
				return l, nil
			}
		}
		var version uint64
		if c != nil {
			version = c.version.Load()
		}
		entry, err := getEntry[connectorEntry](ctx, cs.storage, connectorPrefix+name)
		if err != nil || entry == nil {
			return nil, err
		}
		if c == nil {
			cs.record(name)
			continue
		}
		service, err := newKaizalaService(entry, cs.transport)
		if err != nil {
			return nil, fmt.Errorf("the stored configuration of connector %q cannot be used: %w", name, err)
		}
		if l := cs.publish(c, version, entry, service); l != nil {
			return l, nil
		}
	}
}

func (cs *connectors) named(name string) *connector {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	return cs.byName[name]
}

// record returns the connector's record, made where there is none. There are as
// many as connectors were ever configured or used.
func (cs *connectors) record(name string) *connector {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	c := cs.byName[name]
	if c == nil {
		c = &connector{name: name}
		cs.byName[name] = c
	}
	return c
}

// publish makes a configuration the connector's present one, unless something
// has happened to the connector since version was read.
func (cs *connectors) publish(c *connector, version uint64, entry *connectorEntry, service tokenService) *loadedConnector {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	if c.version.Load() != version {
		service.close()
		return nil
	}
	l := &loadedConnector{connector: c, entry: entry, service: service, revision: version}
	c.loaded.Store(l)
	return l
}

// put stores a configuration. What Kaizala refused before is tried again with
// it. The caller holds binding.
func (cs *connectors) put(ctx context.Context, name string, entry *connectorEntry) error {
	service, err := newKaizalaService(entry, cs.transport)
	if err != nil {
		return badValue("%s", err)
	}
	if err := putEntry(ctx, cs.storage, connectorPrefix+name, entry); err != nil {
		service.close()
		cs.forget(name)
		return err
	}
	c := cs.forget(name)
	c.refused.Store(nil)
	cs.publish(c, c.version.Load(), entry, service)
	return nil
}

// forget drops what memory holds of a connector's configuration.
func (cs *connectors) forget(name string) *connector {
	c := cs.record(name)
	cs.mu.Lock()
	defer cs.mu.Unlock()
	c.version.Add(1)
	if l := c.loaded.Swap(nil); l != nil {
		l.service.close()
	}
	return c
}

// invalidate drops what another node has changed.
func (cs *connectors) invalidate(key string) {
	if name, ok := strings.CutPrefix(key, connectorPrefix); ok && cs.named(name) != nil {
		cs.forget(name).refused.Store(nil)
	}
}

func (cs *connectors) close() {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	for _, c := range cs.byName {
		if l := c.loaded.Load(); l != nil {
			l.service.close()
		}
	}
}

// permit asks for one call of a tenant through this connector. Its error is a
// *limitError, the connector's refusal, or the context's.
func (l *loadedConnector) permit(ctx context.Context, tenant string, wait time.Duration, background bool) (func(), error) {
	if refusal := l.refused.Load(); refusal != nil {
		return nil, refusal
	}
	return l.share.take(ctx, tenant, l.entry.ExchangesPerMinute, wait, background)
}
