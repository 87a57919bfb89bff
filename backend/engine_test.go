package backend

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/kaizala/kaizalatest"
)

func TestMain(m *testing.M) {
	// The tests make much garbage and keep little: a garbage collection less often saves a quarter of their processor time.
	debug.SetGCPercent(400)
	// The SDK imports a package that starts this goroutine when it is loaded.
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("go.opencensus.io/stats/view.(*worker).start"))
}

// engine is an engine under test, in process. Kaizala is an emulator without sockets,
// and the test decides what storage does, so that the engine also runs in a synctest
// bubble, with the bubble's clock.
type engine struct {
	t testing.TB
	*backend
	kaizala     *kaizalatest.Service
	storage     *storage
	system      *system
	events      *events
	work        *serviceWork // of the process
	log         *lockedBuffer
	connectorID string
	secret      string
	// wire makes each process's transport; nil: it is the emulator's.
	wire func() http.RoundTripper
}

// newEngine starts an engine with nothing configured.
func newEngine(t testing.TB) *engine {
	e := &engine{
		t:       t,
		kaizala: kaizalatest.New(),
		storage: &storage{InmemStorage: &logical.InmemStorage{}},
		system:  newSystem(),
		events:  &events{},
		log:     &lockedBuffer{},
	}
	e.start()
	t.Cleanup(func() {
		e.kaizala.ClearFaults()
		e.stop()
	})
	return e
}

// newConfiguredEngine starts an engine with the default connector, whose share is so
// large that no exchange waits for it.
func newConfiguredEngine(t testing.TB) *engine {
	e := newEngine(t)
	e.kaizala.SetLimits(0, 0)
	e.connectorID, e.secret = e.kaizala.RegisterConnector()
	e.write("config", map[string]any{
		"connector_id": e.connectorID, "connector_secret": e.secret, "exchanges_per_minute": 100_000,
	})
	return e
}

func (e *engine) start() {
	transport := e.kaizala.Transport()
	if e.wire != nil {
		transport = e.wire()
	}
	if e.work == nil {
		e.work = newServiceWork()
	}
	b, err := newBackend(context.Background(), &logical.BackendConfig{
		Logger:       hclog.New(&hclog.LoggerOptions{Level: hclog.Trace, Output: e.log, JSONFormat: true}),
		System:       e.system,
		StorageView:  e.storage,
		EventsSender: e.events,
	}, "v0.0.0", transport, e.work)
	require.NoError(e.t, err)
	e.backend = b
	require.NoError(e.t, b.Initialize(context.Background(), &logical.InitializationRequest{Storage: e.storage}))
}

func (e *engine) stop() { e.Cleanup(context.Background()) }

// restart stops the engine as Vault does, and starts another one on the same storage.
func (e *engine) restart() {
	e.stop()
	e.start()
}

// crash ends the engine between two steps, as SIGKILL does: its later writes do not
// reach storage. Another engine starts on what is stored.
func (e *engine) crash() { e.crashOnto(&storage{InmemStorage: e.storage.InmemStorage}) }

func (e *engine) crashOnto(next *storage) {
	dead := e.storage
	e.storage = next
	dead.failWith(func(string, string) error { return errors.New("this process is dead") })
	old := e.backend
	old.cancel()
	old.index.stop() // a dead process has no timers
	e.start()
	e.t.Cleanup(func() { old.Cleanup(context.Background()) })
}

// do is one request, as Vault makes it: with an existence check before a write.
func (e *engine) do(ctx context.Context, op logical.Operation, path string, data map[string]any) (*logical.Response, error) {
	req := &logical.Request{Operation: op, Path: path, Data: data, Storage: e.storage}
	if op == logical.UpdateOperation {
		found, exists, err := e.HandleExistenceCheck(ctx, req)
		if err != nil {
			return nil, err
		}
		if found && !exists {
			req.Operation = logical.CreateOperation
		}
	}
	return e.HandleRequest(ctx, req)
}

// try makes a request and returns its answer, its HTTP status and its error's
// text as Vault would give them.
func (e *engine) try(op logical.Operation, path string, data map[string]any) (*logical.Response, int, string) {
	return e.tryContext(context.Background(), op, path, data)
}

func (e *engine) tryContext(ctx context.Context, op logical.Operation, path string, data map[string]any) (*logical.Response, int, string) {
	resp, err := e.do(ctx, op, path, data)
	status, text := statusOf(op, resp, err)
	return resp, status, text
}

func statusOf(op logical.Operation, resp *logical.Response, err error) (int, string) {
	status, mapped := logical.RespondErrorCommon(&logical.Request{Operation: op}, resp, err)
	if mapped != nil {
		logical.AdjustErrorStatusCode(&status, mapped)
		return status, mapped.Error()
	}
	switch {
	case status != 0:
		return status, ""
	case resp == nil:
		return http.StatusNoContent, ""
	}
	return http.StatusOK, ""
}

func (e *engine) ok(op logical.Operation, path string, data map[string]any) *logical.Response {
	e.t.Helper()
	resp, status, text := e.try(op, path, data)
	require.Less(e.t, status, 300, "%s %s: %s", op, path, text)
	return resp
}

func (e *engine) write(path string, data map[string]any) *logical.Response {
	e.t.Helper()
	return e.ok(logical.UpdateOperation, path, data)
}

func (e *engine) read(path string) map[string]any {
	e.t.Helper()
	return e.ok(logical.ReadOperation, path, nil).Data
}

func (e *engine) status(tenant string) string {
	e.t.Helper()
	return e.read("tenants/" + tenant)["status"].(string)
}

// addTenant generates a user token for a user with the tenant's name, and writes it
// without verification.
func (e *engine) addTenant(name string) {
	e.t.Helper()
	e.write("tenants/"+name, map[string]any{"refresh_token": e.newToken(name), "verify": false})
}

func (e *engine) newToken(user string) string {
	return e.kaizala.GenerateUserToken(e.connectorID, user)
}

// lease reads creds and returns the answer with its lease as Vault issues it.
func (e *engine) lease(tenant string) *logical.Response {
	e.t.Helper()
	resp := e.ok(logical.ReadOperation, "creds/"+tenant, nil)
	resp.Secret.IssueTime = time.Now()
	if resp.Secret.TTL == 0 {
		resp.Secret.TTL = min(e.system.DefaultLeaseTTLVal, resp.Secret.MaxTTL)
	}
	return resp
}

func accessTokenOf(resp *logical.Response) string { return resp.Data["access_token"].(string) }

func (e *engine) revokeLease(lease *logical.Response) error {
	resp, err := e.HandleRequest(context.Background(), &logical.Request{
		Operation: logical.RevokeOperation, Secret: lease.Secret, Storage: e.storage,
	})
	if err == nil && resp.IsError() {
		err = resp.Error()
	}
	return err
}

// minute calls the periodic function as Vault does, and checks that it returns at once.
func (e *engine) minute() {
	e.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 90*time.Second)
	defer cancel()
	begun := time.Now()
	_, err := e.HandleRequest(ctx, &logical.Request{Operation: logical.RollbackOperation, Storage: e.storage})
	require.NoError(e.t, err)
	require.Less(e.t, time.Since(begun), time.Second, "the periodic function did not return at once")
}

// pass lets time pass with a periodic function each minute, as Vault does.
func (e *engine) pass(d time.Duration) {
	e.t.Helper()
	for end := time.Now().Add(d); time.Now().Before(end); {
		time.Sleep(min(time.Minute, time.Until(end)))
		e.minute()
	}
}

// quiet waits for the tenant's exchange under way, if there is one.
func (e *engine) quiet(name string) {
	for range 300 {
		synctest.Wait()
		t := e.tenants.named(name)
		if t == nil {
			return
		}
		if t.flight.Load() == nil {
			return
		}
		time.Sleep(time.Second)
	}
	e.t.Error("an exchange does not end")
}

// held is the refresh token that the engine would use next, stored or not.
func (e *engine) held(name string) string {
	if t := e.tenants.named(name); t != nil {
		v := t.view.Load()
		if v.kept != nil && v.kept.refreshToken != "" {
			return v.kept.refreshToken
		}
		if v.entry != nil {
			return v.entry.RefreshToken
		}
	}
	if entry := e.stored(name); entry != nil {
		return entry.RefreshToken
	}
	return ""
}

// stored is the tenant's entry in storage, nil if there is none.
func (e *engine) stored(tenant string) *tenantEntry {
	e.t.Helper()
	entry, err := getEntry[tenantEntry](context.Background(), e.storage.InmemStorage, tenantPrefix+tenant)
	require.NoError(e.t, err)
	return entry
}

// storage records its operations, and fails when a test wants it to.
type storage struct {
	*logical.InmemStorage
	ops  atomic.Int64
	mu   sync.Mutex
	keys map[string]bool // every key ever written
	puts map[string]int
	fail func(op, key string) error
	// around carries the operation out or not, and returns the error that the engine gets.
	around func(op, key string, do func() error) error
}

// failWith makes each operation (get, put, delete, list) ask f for its error.
func (s *storage) failWith(f func(op, key string) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fail = f
}

// surround makes storage call f in place of each operation; f carries it out by calling do.
func (s *storage) surround(f func(op, key string, do func() error) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.around = f
}

func (s *storage) heal() {
	s.failWith(nil)
	s.surround(nil)
}

func (s *storage) perform(ctx context.Context, op, key string, do func() error) error {
	s.ops.Add(1)
	s.mu.Lock()
	fail, around := s.fail, s.around
	s.mu.Unlock()
	if fail != nil {
		if err := fail(op, key); err != nil {
			return err
		}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if around != nil {
		return around(op, key, do)
	}
	return do()
}

func (s *storage) Get(ctx context.Context, key string) (entry *logical.StorageEntry, err error) {
	err = s.perform(ctx, "get", key, func() error {
		entry, err = s.InmemStorage.Get(ctx, key)
		return err
	})
	return entry, err
}

func (s *storage) Put(ctx context.Context, entry *logical.StorageEntry) error {
	return s.perform(ctx, "put", entry.Key, func() error {
		s.mu.Lock()
		if s.keys == nil {
			s.keys, s.puts = map[string]bool{}, map[string]int{}
		}
		s.keys[entry.Key] = true
		s.puts[entry.Key]++
		s.mu.Unlock()
		return s.InmemStorage.Put(ctx, entry)
	})
}

func (s *storage) Delete(ctx context.Context, key string) error {
	return s.perform(ctx, "delete", key, func() error { return s.InmemStorage.Delete(ctx, key) })
}

func (s *storage) List(ctx context.Context, prefix string) (keys []string, err error) {
	err = s.perform(ctx, "list", prefix, func() error {
		keys, err = s.InmemStorage.List(ctx, prefix)
		return err
	})
	return keys, err
}

func (s *storage) putsOf(key string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.puts[key]
}

// system is Vault's system view. It counts the questions.
type system struct {
	logical.StaticSystemView
	asked       atomic.Int64
	replication atomic.Uint32
	// answers, if not nil, delays each answer about the replication state until the test sends to it. The answer is the state at the
	// time of the question.
	answers chan struct{}
}

func newSystem() *system {
	return &system{StaticSystemView: logical.StaticSystemView{
		DefaultLeaseTTLVal: 768 * time.Hour, MaxLeaseTTLVal: 768 * time.Hour, VersionString: "1.21.0",
	}}
}

func (s *system) DefaultLeaseTTL() time.Duration {
	s.asked.Add(1)
	return s.StaticSystemView.DefaultLeaseTTL()
}

func (s *system) MaxLeaseTTL() time.Duration {
	s.asked.Add(1)
	return s.StaticSystemView.MaxLeaseTTL()
}

func (s *system) ReplicationState() consts.ReplicationState {
	s.asked.Add(1)
	state := consts.ReplicationState(s.replication.Load())
	if s.answers != nil {
		<-s.answers
	}
	return state
}

// events is Vault's event sender.
type events struct {
	mu   sync.Mutex
	sent []string
	// hang: Vault takes no event.
	hang atomic.Bool
}

func (s *events) SendEvent(ctx context.Context, event logical.EventType, data *logical.EventData) error {
	if s.hang.Load() {
		<-ctx.Done()
	}
	if ctx.Err() != nil {
		return ctx.Err() // as the connection to Vault does
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sent = append(s.sent, fmt.Sprintf("%s %s", event, data.Metadata.AsMap()["tenant"]))
	return nil
}

func (s *events) all() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.sent...)
}

type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

func (b *lockedBuffer) count(text string) int { return strings.Count(b.String(), text) }

// storedConnector is a connector as storage has it.
func (e *engine) storedConnector(ctx context.Context, name string) (*connectorEntry, error) {
	return getConnector(ctx, e.storage.InmemStorage, name)
}
