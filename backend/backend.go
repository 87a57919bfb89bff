// Package backend is the secrets engine: it keeps refresh tokens and hands out access tokens.
//
// What happens on a read of creds/:tenant stands in path_creds.go, from top to bottom; exchanger.go makes the exchange and
// lease.go the lease. tenant.go owns the state of one tenant and is the only file that writes it; tenants.go is all of them,
// and storage. connector.go owns connectors and what their services say about them, revocations.go what is to be revoked.
// renewer.go says when a tenant needs attention without a reader, and index.go finds it then. grants.go is about persons who
// grant access. Behind the border package tokenservice each service is a package of its own; services.go names them.
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
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/logical"
)

const (
	// answerWithin is how long a request waits for a service: Vault cannot seal
	// or step down while requests run.
	answerWithin = 9 * time.Second

	// storeWithin bounds each write to storage that goes on when its caller goes away, and each read.
	storeWithin = 30 * time.Second

	// stopWithin is how long Clean takes at most, and stopGrace how long a stop waits for each exchange that is under way.
	stopWithin = 5 * time.Second
	stopGrace  = stopWithin - time.Second
)

// processWork is the work of all mounts of the process.
var processWork = newServiceWork()

// Factory returns the engine's factory for Vault. The version is the plugin's
// own, a semantic version with a leading v, and shows in "vault plugin list".
func Factory(version string) logical.Factory {
	return func(ctx context.Context, conf *logical.BackendConfig) (logical.Backend, error) {
		return newBackend(ctx, conf, version, nil, processWork)
	}
}

// Stop stops all mounts of the process as Vault stops one: no new exchange begins, and what services answer to those under way is stored. It
// takes 5 seconds at most.
func Stop() { processWork.stop() }

type backend struct {
	*framework.Backend

	node        *node
	storage     logical.Storage
	tenants     *tenants
	connectors  *connectors
	exchanger   *exchanger
	revocations *revocations
	announce    *announcer
	grants      *grants
	index       index
	serviceWork *serviceWork

	ctx    context.Context // ends in Clean
	cancel context.CancelFunc

	mu       sync.Mutex
	stopping bool
	work     sync.WaitGroup // goroutines; none is added once stopping
	indexing chan struct{}  // closed when the building of the index of tenants has ended; nil: it has not begun, or is to begin again
	indexed  bool           // the index is complete, except for unread
	unread   map[string]int // tenants to be read again, because another node has written them or storage has failed, and how often that was
}

// newBackend makes an engine. It makes no call and does not use storage, which may not be there yet. transport is nil except
// in tests. work is what the mounts of the process have in common.
func newBackend(ctx context.Context, conf *logical.BackendConfig, version string, transport http.RoundTripper, work *serviceWork) (*backend, error) {
	if conf == nil {
		return nil, fmt.Errorf("no configuration was passed to the plugin's factory")
	}
	b := &backend{node: &node{system: conf.System}, storage: conf.StorageView, serviceWork: work, unread: map[string]int{}}
	b.ctx, b.cancel = context.WithCancel(context.Background())
	if err := b.assemble(transport); err != nil {
		return nil, err
	}
	b.Backend = &framework.Backend{
		BackendType:    logical.TypeLogical,
		RunningVersion: version,
		Help:           backendHelp,
		Paths: framework.PathAppend(
			b.credsPaths(),
			b.grantPaths(),
			b.tenantPaths(),
			b.configPaths(),
		),
		PathsSpecial: &logical.Paths{
			SealWrapStorage: []string{connectorPrefix, tenantPrefix, intentPrefix, heldPrefix, attemptPrefix},
			Unauthenticated: []string{"callback", "callback/*"},
		},
		Secrets:        []*framework.Secret{b.accessTokenSecret()},
		InitializeFunc: b.initialize,
		PeriodicFunc:   b.periodic,
		Invalidate:     b.invalidate,
		Clean:          b.clean,
	}
	routed := *conf
	if conf.System != nil {
		routed.System = routingView{conf.System}
	}
	if err := b.Setup(ctx, &routed); err != nil {
		return nil, err
	}
	work.mu.Lock()
	defer work.mu.Unlock()
	work.mounts[b], b.stopping = struct{}{}, work.stopped
	return b, nil
}

// assemble makes the engine's parts, and tells each which others it needs.
func (b *backend) assemble(transport http.RoundTripper) (err error) {
	if b.tenants, err = newTenants(); err != nil {
		return err
	}
	b.connectors = &connectors{storage: b.storage, transport: transport, byName: map[string]*connector{}}
	b.announce = &announcer{log: func() hclog.Logger { return b.Logger() }, events: b, about: b.serviceName, ctx: b.ctx, work: b.goWork}
	b.connectors.announce, b.connectors.accepted = b.announce, b.rescheduleTroubled
	b.revocations = newRevocations(b.storage)
	b.revocations.connectors, b.revocations.node, b.revocations.ctx, b.revocations.work = b.connectors, b.node, b.ctx, b.goWork
	b.revocations.tenants = b.tenants
	b.tenants.storage, b.tenants.connectors, b.tenants.revocations = b.storage, b.connectors, b.revocations
	b.tenants.announce, b.tenants.schedule = b.announce, b.schedule
	b.exchanger = &exchanger{
		tenants: b.tenants, connectors: b.connectors, revocations: b.revocations, announce: b.announce,
		node: b.node, ctx: b.ctx, work: b.goToService, stopping: b.isStopping, landed: b.landed,
	}
	b.grants = newGrants()
	b.index.init(b.tick)
	return nil
}

// node is what Vault says of the node that the engine runs on, and of the mount. Each question is a round trip to Vault's
// process, so a read of a usable token asks none.
type node struct {
	system logical.SystemView
	// defaultTTL and maxTTL are the mount's lease TTLs, as they were when Vault was last asked.
	defaultTTL, maxTTL atomic.Int64

	asking lock // held while Vault is asked
	mu     sync.Mutex
	next   *look // the one that begins when asking is free; exchanges that come until then share it. nil: there is none
}

// look is one set of questions to Vault. asking guards it.
type look struct{ over, mayWrite bool }

// ready says whether an exchange may begin on this node, and notes the lease TTLs for the access token that the exchange brings. Exchanges
// that come while Vault is being asked wait for that, and share the next question.
func (n *node) ready() bool {
	n.mu.Lock()
	if n.next == nil {
		n.next = &look{}
	}
	l := n.next
	n.mu.Unlock()
	_ = n.asking.acquire(context.Background())
	defer n.asking.release()
	if l.over {
		return l.mayWrite
	}
	n.mu.Lock()
	n.next = nil
	n.mu.Unlock()
	l.over, l.mayWrite = true, n.WriteSafeReplicationState()
	if l.mayWrite {
		n.askTTLs()
	}
	return l.mayWrite
}

// askTTLs notes the mount's lease TTLs: see leaseTTL.
func (n *node) askTTLs() {
	n.defaultTTL.Store(int64(n.system.DefaultLeaseTTL()))
	n.maxTTL.Store(int64(n.system.MaxLeaseTTL()))
}

// WriteSafeReplicationState says whether the engine may write here. It is [framework.Backend.WriteSafeReplicationState] with one
// question in place of two: whether the mount is local matters on a performance secondary alone.
func (n *node) WriteSafeReplicationState() bool {
	state := n.system.ReplicationState()
	return !state.HasState(consts.ReplicationDRSecondary|consts.ReplicationPerformanceStandby) &&
		(!state.HasState(consts.ReplicationPerformanceSecondary) || n.system.LocalMount())
}

// routingView is what the framework sees of Vault. Before each operation the
// framework asks for the replication state, for flags that no path here sets;
// left alone, that would be a round trip to Vault on each read.
type routingView struct{ logical.SystemView }

func (routingView) ReplicationState() consts.ReplicationState { return consts.ReplicationUnknown }

// HandleRequest refuses values that do not fit their fields before the framework
// does: its own message quotes the value, and ends up in the audit log.
func (b *backend) HandleRequest(ctx context.Context, req *logical.Request) (*logical.Response, error) {
	if req.Operation != logical.HelpOperation && len(req.Data) > 0 {
		if err := b.checkFields(req); err != nil {
			if showsPage(req) {
				return pageResponse(&verdict{what: endEmpty}, req.MountPoint), nil
			}
			return answer(err)
		}
	}
	return b.Backend.HandleRequest(ctx, req)
}

// HandleExistenceCheck uses only the path: the handler of the operation checks the
// values, after Vault has checked the policies.
func (b *backend) HandleExistenceCheck(ctx context.Context, req *logical.Request) (bool, bool, error) {
	pathOnly := *req
	pathOnly.Data = nil
	return b.Backend.HandleExistenceCheck(ctx, &pathOnly)
}

func (b *backend) checkFields(req *logical.Request) error {
	path := b.Route(req.Path)
	if path == nil {
		return nil
	}
	for name, value := range req.Data {
		schema := path.Fields[name]
		if schema == nil || value == nil {
			continue
		}
		text, isString := value.(string)
		one := framework.FieldData{Raw: map[string]any{name: value}, Schema: path.Fields}
		switch {
		case isSecret(schema) && !isString:
			return badValue("%s must be given once, as a string", name)
		case isString && strings.TrimSpace(text) == "" && schema.Type != framework.TypeString && schema.Type != framework.TypeCommaStringSlice:
			return badValue("%s is empty: give a value, or leave it out", name)
		case schema.Type == framework.TypeKVPairs:
			if _, err := pairs(value); err != nil {
				return badValue("%s %s", name, err)
			}
		case one.Validate() != nil, schema.Type == framework.TypeString && !isString:
			// The framework would make a string of a number, but a number may have lost digits on its way.
			return badValue("%s does not fit: it has to be %s", name, fieldForm[schema.Type])
		}
	}
	return nil
}

func isSecret(schema *framework.FieldSchema) bool {
	return schema.DisplayAttrs != nil && schema.DisplayAttrs.Sensitive
}

var fieldForm = map[framework.FieldType]string{
	framework.TypeString:           "a string",
	framework.TypeBool:             "true or false",
	framework.TypeInt:              "a whole number",
	framework.TypeDurationSecond:   "a duration such as 90s, 15m or 24h",
	framework.TypeCommaStringSlice: "a list of strings",
	framework.TypeKVPairs:          "a map of names to strings",
}

// done is the answer to a successful write: nothing, unless the framework has
// unknown fields to warn about, which it can only do on a response.
func done(d *framework.FieldData) *logical.Response {
	for name := range d.Raw {
		if d.Schema[name] == nil {
			return &logical.Response{}
		}
	}
	return nil
}

// maxName bounds the names of tenants and connectors: some of Vault's storage backends fail on long keys.
const maxName = 128

const nameRule = "1 to 128 characters: letters and digits of ASCII and _, and inside also - and . (no two dots in a row)"

var nameForm = regexp.MustCompile(`^[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?$`)

// nameOf returns the name of a tenant or a connector from a request's path.
func nameOf(d *framework.FieldData, field string) (string, error) {
	name, _ := d.Raw[field].(string)
	return name, checkName(name, field)
}

func checkName(name, field string) error {
	if len(name) > maxName || !nameForm.MatchString(name) || strings.Contains(name, "..") {
		return badValue("the name of a %s has %s", field, nameRule)
	}
	return nil
}

func (b *backend) initialize(context.Context, *logical.InitializationRequest) error {
	b.buildIndex()
	return nil
}

// periodic runs every minute. It also starts the work of an engine that runs in a new
// process without an initialization of this mount.
func (b *backend) periodic(context.Context, *logical.Request) error {
	b.buildIndex()
	b.goWork(func() {
		b.node.askTTLs()
		b.readUnread(b.ctx)
		if b.revocations.load(b.ctx) == nil { // another node may have written
			b.revocations.tick()
		}
		b.attendGrants()
	})
	b.tick()
	return nil
}

func (b *backend) invalidate(_ context.Context, key string) {
	if name, ok := strings.CutPrefix(key, tenantPrefix); ok {
		b.tenants.invalidate(name)
		b.readLater(name)
	}
	name, isConnector := strings.CutPrefix(key, connectorPrefix)
	before := b.connectors.present(name)
	b.connectors.invalidate(key)
	if isConnector {
		b.goWork(func() { b.connectorWritten(name, before) }) // which reads storage
	}
	b.revocations.invalidate(key)
	b.grants.invalidate(key)
}

// connectorWritten follows the write of a connector by another node. The connector's tenants stay in memory if the planned ends of their
// access tokens stay the same, as when the active node notes that the service refuses the connector.
func (b *backend) connectorWritten(name string, before *loadedConnector) {
	if before != nil {
		if now, err := b.connectors.get(b.ctx, name); err == nil && now != nil && before.plansAs(now.about) {
			return
		}
	}
	b.tenants.connectorChanged(name, true)
}

// goWork runs f in a goroutine that Clean waits for, and says whether it does.
func (b *backend) goWork(f func()) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.stopping {
		return false
	}
	b.work.Go(f)
	return true
}

// goToService is goWork for work that waits for a service and stores what comes.
func (b *backend) goToService(f func()) bool {
	end := b.serviceWork.begin(b)
	if !b.goWork(func() {
		defer end()
		f()
	}) {
		end()
		return false
	}
	return true
}

func (b *backend) isStopping() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.stopping
}

// serviceWork is the work under way, of all mounts of the process, that waits for services and stores what comes. Vault runs the mounts of a
// plugin in one process. When it reloads the plugin it calls Clean of one mount, ends the process, and tells the other mounts nothing: so a
// stop waits for the work of all mounts. A revocation need not be waited for: it is in storage until it has ended.
//
// When Vault seals, it stops all mounts, one after another. For work of other mounts, and for work that was under way when the first stop
// began, all these stops together wait no longer than one stop may.
type serviceWork struct {
	mu      sync.Mutex
	mounts  map[*backend]struct{} // those that have not stopped
	stopped bool                  // no work begins in a mount that comes later
	running map[*pieceOfWork]struct{}
	first   time.Time // when the first stop of a series began: see stopsApart
	last    time.Time // when a stop last looked for work
}

type pieceOfWork struct {
	of    *backend
	begun time.Time
	done  chan struct{}
}

// stopsApart is the longest time between two stops of one series, such as those of a seal.
const stopsApart = 2 * time.Second

func newServiceWork() *serviceWork {
	return &serviceWork{mounts: map[*backend]struct{}{}, running: map[*pieceOfWork]struct{}{}}
}

// stop stops all mounts at once.
func (w *serviceWork) stop() {
	w.mu.Lock()
	w.stopped = true
	mounts := slices.Collect(maps.Keys(w.mounts))
	w.mu.Unlock()
	var stops sync.WaitGroup
	for _, b := range mounts {
		stops.Go(func() { b.clean(context.Background()) })
	}
	stops.Wait()
}

// begin notes a piece of a mount's work. Its caller calls end once.
func (w *serviceWork) begin(of *backend) (end func()) {
	piece := &pieceOfWork{of: of, begun: time.Now(), done: make(chan struct{})}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.running[piece] = struct{}{}
	return func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		delete(w.running, piece)
		close(piece.done)
	}
}

// next returns a piece of work that the stop of a mount has to wait for, and until when; nil where there is none. own is false if work of the
// mount itself goes on although its time is over. begun is when the stop began.
func (w *serviceWork) next(of *backend, begun time.Time) (wait *pieceOfWork, until time.Time, own bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	now := time.Now()
	if begun.Sub(w.last) > stopsApart {
		w.first = begun
	}
	w.last, own = now, true
	for piece := range w.running {
		end := earliest(w.first, begun).Add(stopGrace) // another stop may have begun since, much later
		if piece.of == of && piece.begun.After(w.first) {
			end = begun.Add(stopGrace)
		}
		if end.After(now) {
			wait, until = piece, end
		} else if piece.of == of {
			own = false
		}
	}
	return wait, until, own
}

// wait waits, for the stop of a mount, until each piece of work has ended or has had its time. It says whether all of the mount's own work
// has ended.
func (w *serviceWork) wait(of *backend) bool {
	begun := time.Now()
	for {
		piece, until, own := w.next(of, begun)
		if piece == nil {
			return own
		}
		over := time.NewTimer(time.Until(until))
		select {
		case <-piece.done:
		case <-over.C:
		}
		over.Stop()
	}
}

// clean stops the engine. It starts no new work, waits a few seconds until the work under way at services has ended and its results are
// stored, and then cancels it.
func (b *backend) clean(context.Context) {
	b.mu.Lock()
	b.stopping = true
	b.mu.Unlock()
	b.index.stop()
	b.revocations.stop()
	defer b.connectors.close()
	defer func() {
		b.serviceWork.mu.Lock()
		defer b.serviceWork.mu.Unlock()
		delete(b.serviceWork.mounts, b)
	}()

	ended := make(chan struct{})
	go func() {
		b.work.Wait()
		close(ended)
	}()
	ctx, cancel := context.WithTimeout(context.Background(), stopWithin)
	defer cancel()
	grace, over := context.WithTimeout(ctx, stopGrace)
	defer over()
	if b.serviceWork.wait(b) {
		select {
		case <-ended: // events and revocations have ended too
		case <-grace.Done():
		}
	}
	b.cancel()
	saved := make(chan struct{})
	go func() {
		b.saveKept(ctx)
		<-ended
		close(saved)
	}()
	select {
	case <-saved:
	case <-ctx.Done():
	}
}

// saveKept tries once more to store what services have sent and storage has not taken. It waits for each tenant's flight to end, for all
// tenants at once.
func (b *backend) saveKept(ctx context.Context) {
	var saves sync.WaitGroup
	b.tenants.each(func(t *tenant) {
		f := t.flight.Load()
		if f == nil && t.view.Load().kept == nil {
			return
		}
		saves.Go(func() {
			if f != nil {
				select {
				case <-f.done:
				case <-ctx.Done():
				}
			}
			kept := t.view.Load().kept
			if kept == nil {
				return
			}
			err := t.storing.acquire(ctx)
			if err == nil {
				defer t.storing.release()
				if kept = t.view.Load().kept; kept == nil {
					return
				}
				err = b.tenants.store(ctx, t, kept)
			}
			if err != nil && !errors.Is(err, errSuperseded) && (kept.refreshToken != "" || kept.granted()) {
				b.announce.lost(t.name, kept.connector)
			}
		})
	})
	saves.Wait()
}
