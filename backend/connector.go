package backend

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/singleflight"
)

// connectorPrefix is where storage keeps connectors, each under its name.
const connectorPrefix = "config/"

// callPrefix is where storage keeps, for each connector, the calls that count
// against its share, each under its place, and under pausePlace the pause that
// the service has asked for. Nothing there is a secret.
const (
	callPrefix = "calls/"
	pausePlace = "pause"
)

// callsOf is the prefix of what is written down of a connector's calls.
func callsOf(connector string) string { return callPrefix + connector + "/" }

// callEntry is a call, written down before it is made, or a pause.
type callEntry struct {
	Format int       `json:"format"`
	Tenant string    `json:"tenant,omitempty"`
	Until  time.Time `json:"until"` // from when it does not matter any more, at the latest
}

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
	// Refused is when the service refused the connector as it is; zero: it did not.
	Refused time.Time `json:"refused,omitzero"`
}

// connector is one connector in memory. It outlives writes of its
// configuration, so that these do not forget the calls that were made.
type connector struct {
	name     string
	share    share
	recalled atomic.Bool   // share counts what storage knows of calls
	version  atomic.Uint64 // counts what makes a load in progress out of date
	loaded   atomic.Pointer[loadedConnector]
	refused  atomic.Pointer[serviceError] // Kaizala refuses it until config is written
	writing  sync.Mutex                   // held by whoever changes the connector's entry in storage
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
	recalls   singleflight.Group

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
				if err := cs.recall(ctx, c); err != nil {
					return nil, err
				}
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
		cs.publish(c, version, entry, service)
	}
}

// recall makes a connector's share count the calls of the process before this
// one, and go on with its pause. It is done once, for all who wait for it.
func (cs *connectors) recall(ctx context.Context, c *connector) error {
	if c.recalled.Load() {
		return nil
	}
	recalled := cs.recalls.DoChan(c.name, func() (any, error) {
		ctx, cancel := context.WithTimeout(context.Background(), storeWithin)
		defer cancel()
		return nil, cs.readCalls(ctx, c)
	})
	select {
	case result := <-recalled:
		return result.Err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (cs *connectors) readCalls(ctx context.Context, c *connector) error {
	places, err := cs.storage.List(ctx, callsOf(c.name))
	if err != nil {
		return storageError(err)
	}
	now := time.Now()
	var readers errgroup.Group
	readers.SetLimit(storageReaders)
	for _, place := range places {
		readers.Go(func() error {
			entry, err := getEntry[callEntry](ctx, cs.storage, callsOf(c.name)+place)
			if errors.Is(err, errUnreadable) {
				return nil
			}
			if err != nil || entry == nil || !entry.Until.After(now) {
				return err
			}
			if place == pausePlace {
				c.share.pause(entry.Until)
			} else if n, err := strconv.Atoi(place); err == nil {
				// Whoever made it has ended by now.
				until := slices.MinFunc([]time.Time{entry.Until, now.Add(window)}, time.Time.Compare)
				c.share.remember(entry.Tenant, n, until)
			}
			return nil
		})
	}
	if err := readers.Wait(); err != nil {
		return err
	}
	c.recalled.Store(true)
	return nil
}

// note writes a call down that is about to be made. That it can is also a sign
// that what comes back can be stored.
func (cs *connectors) note(ctx context.Context, l *loadedConnector, c *call) error {
	return cs.putCall(ctx, l, strconv.Itoa(c.place), callEntry{
		Tenant: c.tenant,
		Until:  time.Now().UTC().Add(l.entry.RequestTimeout + window),
	})
}

// pause makes a connector rest as the service asked.
func (cs *connectors) pause(ctx context.Context, l *loadedConnector, rest time.Duration) {
	l.writing.Lock()
	defer l.writing.Unlock()
	until := l.share.pause(time.Now().Add(rest))
	// Where storage fails, a restart forgets the pause.
	_ = cs.putCall(ctx, l, pausePlace, callEntry{Until: until.UTC()})
}

func (cs *connectors) putCall(ctx context.Context, l *loadedConnector, place string, entry callEntry) error {
	ctx, cancel := context.WithTimeout(ctx, storeWithin)
	defer cancel()
	entry.Format = entryFormat
	return putEntry(ctx, cs.storage, callsOf(l.name)+place, entry)
}

// refuse notes that the service refuses a connector as it is configured, and
// says whether that is news.
func (cs *connectors) refuse(ctx context.Context, l *loadedConnector, refusal *serviceError) bool {
	l.writing.Lock()
	defer l.writing.Unlock()
	if l.loaded.Load() != l || l.refused.Swap(refusal) != nil {
		return false
	}
	entry := *l.entry
	entry.Refused = time.Now().UTC().Truncate(time.Millisecond)
	// Where storage fails, a restart asks the service once more.
	_ = putEntry(ctx, cs.storage, connectorPrefix+l.name, entry)
	return true
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
func (cs *connectors) publish(c *connector, version uint64, entry *connectorEntry, service tokenService) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	if c.version.Load() != version {
		service.close()
		return
	}
	var refusal *serviceError
	if !entry.Refused.IsZero() {
		refusal = &serviceError{kind: refusedConnector}
	}
	c.refused.Store(refusal) // in one step: a reload lets no call through
	c.loaded.Store(&loadedConnector{connector: c, entry: entry, service: service, revision: version})
}

// put stores a configuration. What Kaizala refused before is tried again with
// it. The caller holds binding.
func (cs *connectors) put(ctx context.Context, name string, entry *connectorEntry) error {
	service, err := newKaizalaService(entry, cs.transport)
	if err != nil {
		return badValue("%s", err)
	}
	c := cs.record(name)
	c.writing.Lock()
	defer c.writing.Unlock()
	entry.Refused = time.Time{}
	err = putEntry(ctx, cs.storage, connectorPrefix+name, entry)
	cs.forget(c)
	if err != nil {
		service.close()
		return err
	}
	cs.publish(c, c.version.Load(), entry, service)
	return nil
}

// remove deletes a configuration and what was written down of its calls. The
// caller holds binding.
func (cs *connectors) remove(ctx context.Context, name string) error {
	c := cs.record(name)
	c.writing.Lock()
	defer c.writing.Unlock()
	places, err := cs.storage.List(ctx, callsOf(name))
	if err != nil {
		return err
	}
	for _, place := range places {
		if err := cs.storage.Delete(ctx, callsOf(name)+place); err != nil {
			return err
		}
	}
	err = cs.storage.Delete(ctx, connectorPrefix+name)
	cs.forget(c)
	return err
}

// forget drops what memory holds of a connector's configuration.
func (cs *connectors) forget(c *connector) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	c.version.Add(1)
	if l := c.loaded.Swap(nil); l != nil {
		l.service.close()
	}
}

// invalidate drops what another node has changed.
func (cs *connectors) invalidate(key string) {
	if name, ok := strings.CutPrefix(key, connectorPrefix); ok {
		if c := cs.named(name); c != nil {
			cs.forget(c)
		}
	}
	if place, ok := strings.CutPrefix(key, callPrefix); ok {
		name, _, _ := strings.Cut(place, "/")
		if c := cs.named(name); c != nil {
			c.recalled.Store(false)
		}
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
func (l *loadedConnector) permit(ctx context.Context, tenant string, wait time.Duration, background bool) (*call, error) {
	if refusal := l.refused.Load(); refusal != nil {
		return nil, refusal
	}
	return l.share.take(ctx, tenant, l.entry.ExchangesPerMinute, wait, background)
}
