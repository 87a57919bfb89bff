package backend

import (
	"context"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"pgregory.net/rapid"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/kaizala/kaizalatest"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/share"
)

// rapidTB lets an engine run under rapid, which has a T of its own.
type rapidTB struct {
	testing.TB // nil: the engine uses only the methods below
	rt         *rapid.T
	cleanups   []func()
}

func (t *rapidTB) Cleanup(f func())                  { t.cleanups = append(t.cleanups, f) }
func (t *rapidTB) Helper()                           {}
func (t *rapidTB) Error(args ...any)                 { t.rt.Error(args...) }
func (t *rapidTB) Errorf(format string, args ...any) { t.rt.Errorf(format, args...) }
func (t *rapidTB) FailNow()                          { t.rt.FailNow() }

// model is the state that a client expects from the engine's answers alone.
type model struct {
	*engine
	rt      *rapid.T
	tenants map[string]*modelTenant
	broken  bool // storage takes no writes
	failing bool // the service fails
	losing  bool // the service fails after it has replaced refresh tokens
	share   int
}

type modelTenant struct {
	leases []*logical.Response
	// retired are access tokens that must not be handed out again.
	retired []string
	// exists and ttl are nil after a write has failed: storage may have taken it.
	exists *bool
	ttl    *time.Duration
	// lost: the refresh token is gone, and the engine could not have kept it: the
	// process ended before storage had it, or the answer with it never arrived.
	lost bool
}

func known[T any](v T) *T { return &v }

func (m *model) pick() (string, *modelTenant) {
	name := rapid.SampledFrom([]string{"a", "b", "c"}).Draw(m.rt, "tenant")
	return name, m.tenants[name]
}

func (m *model) request(op logical.Operation, path string, data map[string]any) (*logical.Response, int) {
	begun := time.Now()
	resp, status, text := m.try(op, path, data)
	if d := time.Since(begun); d > 10*time.Second {
		m.rt.Fatalf("%s %s took %s", op, path, d)
	}
	m.rt.Logf("%s %s: %d %s", op, path, status, text)
	if resp != nil && resp.Data["access_token"] != nil {
		name := resp.Data["tenant"].(string)
		token := accessTokenOf(resp)
		if !m.kaizala.AccessTokenAlive(token) || slices.Contains(m.tenants[name].retired, token) {
			m.rt.Fatalf("%s: a dead or retired access token was handed out", path)
		}
	}
	return resp, status
}

func (m *model) writeToken(*rapid.T) {
	name, tenant := m.pick()
	verify := rapid.Bool().Draw(m.rt, "verify")
	m.kaizala.SetRefreshTokenAge(rapid.SampledFrom([]time.Duration{0, inWindow - time.Hour, inWindow, 364 * day}).Draw(m.rt, "age"))
	token := m.newToken(name) // which ends the refresh token before
	_, status := m.request(logical.UpdateOperation, "tenants/"+name, map[string]any{"refresh_token": token, "verify": verify})
	if status < 300 {
		for _, lease := range tenant.leases {
			tenant.retired = append(tenant.retired, accessTokenOf(lease))
		}
		tenant.leases = nil
		tenant.exists, tenant.lost = known(true), false
		if tenant.ttl == nil {
			tenant.ttl = known(m.storedTTL(name))
		}
		return
	}
	// The service has given out a new refresh token, which has ended the older one,
	// and the engine may not have it: the tenant is lost until the next write.
	tenant.exists, tenant.ttl, tenant.lost = nil, nil, true
}

func (m *model) storedTTL(name string) time.Duration {
	if entry := m.stored(name); entry != nil {
		return entry.TTL
	}
	return 0
}

func (m *model) writeTTL(*rapid.T) {
	name, tenant := m.pick()
	ttl := time.Duration(rapid.IntRange(1, 20).Draw(m.rt, "hours")) * time.Hour
	_, status := m.request(logical.UpdateOperation, "tenants/"+name, map[string]any{"ttl": ttl.String()})
	switch {
	case status < 300:
		tenant.ttl = known(ttl)
	case status >= 500:
		tenant.ttl = nil
	}
}

func (m *model) remove(*rapid.T) {
	name, tenant := m.pick()
	_, status := m.request(logical.DeleteOperation, "tenants/"+name, nil)
	tenant.exists = nil
	if status < 300 {
		*tenant = modelTenant{exists: known(false), ttl: known(time.Duration(0)), retired: tenant.retired}
	}
}

func (m *model) readCreds(*rapid.T) {
	name, tenant := m.pick()
	resp, status := m.request(logical.ReadOperation, "creds/"+name, nil)
	if status != http.StatusOK {
		return
	}
	resp.Secret.IssueTime = time.Now()
	if resp.Secret.TTL == 0 {
		resp.Secret.TTL = resp.Secret.MaxTTL
	}
	tenant.leases = append(tenant.leases, resp)
}

func (m *model) readToken(*rapid.T) {
	name, _ := m.pick()
	m.request(logical.ReadOperation, "token/"+name, nil)
}

func (m *model) refresh(*rapid.T) {
	name, tenant := m.pick()
	var before string
	if entry := m.stored(name); entry != nil && entry.Access != nil {
		before = entry.Access.Token
	}
	if _, status := m.request(logical.UpdateOperation, "tenants/"+name+"/refresh", nil); status < 300 && before != "" {
		tenant.retired = append(tenant.retired, before)
	}
}

// revokeAll revokes all leases of a tenant. If the last lease on an access token is
// revoked before its end, the token is retired.
func (m *model) revokeAll(*rapid.T) {
	_, tenant := m.pick()
	for i, lease := range tenant.leases {
		token := accessTokenOf(lease)
		early := time.Now().Before(lease.Secret.IssueTime.Add(lease.Secret.TTL))
		err := m.revokeLease(lease)
		if err != nil && !m.broken {
			m.rt.Fatalf("a lease cannot be revoked: %s", err)
		}
		last := !slices.ContainsFunc(tenant.leases[i+1:], func(l *logical.Response) bool { return accessTokenOf(l) == token })
		if err == nil && early && last {
			tenant.retired = append(tenant.retired, token)
		}
	}
	tenant.leases = nil
}

func (m *model) clockJumps(*rapid.T) {
	d := time.Duration(rapid.SampledFrom([]int{1, 30, 60, 25 * 60, 10 * 24 * 60, 40 * 24 * 60, 329 * 24 * 60}).Draw(m.rt, "minutes")) * time.Minute
	if m.failing || m.broken {
		d = min(d, 3*time.Hour) // the engine tries again each minute, and each try takes real time
	}
	time.Sleep(d)
	m.minute()
}

func (m *model) serviceFails(*rapid.T) {
	m.failing = true
	fault := rapid.SampledFrom([]kaizalatest.Fault{
		{Status: 500}, {Status: 503, Body: "<html>"}, {Status: 429, Header: http.Header{"Retry-After": {"90"}}},
		{Hang: true}, {Delay: 20 * time.Second}, {Reset: true}, {Status: 200, Body: "junk"},
		{Hang: true, Process: true}, {Reset: true, Process: true}, {Truncate: true, TruncateAt: 50},
	}).Draw(m.rt, "fault")
	m.losing = m.losing || fault.Process || fault.Truncate
	m.kaizala.Inject(fault)
}

func (m *model) serviceHeals(*rapid.T) {
	m.kaizala.ClearFaults()
	m.failing, m.losing = false, false
}

func (m *model) storageFails(*rapid.T) {
	once := rapid.Bool().Draw(m.rt, "once")
	spares := rapid.SampledFrom([]string{"nothing", callPrefix}).Draw(m.rt, "spares")
	m.broken = true
	m.engine.storage.surround(func(op, key string, do func() error) error {
		if op != "put" && op != "delete" || strings.HasPrefix(key, spares) {
			return do()
		}
		if once {
			m.engine.storage.surround(nil)
		}
		return errStorage
	})
}

func (m *model) storageHeals(*rapid.T) {
	m.engine.storage.heal()
	m.broken = false
}

// processEnds ends the process by a stop or a crash. What storage has refused is lost with it.
func (m *model) processEnds(*rapid.T) {
	crash := rapid.Bool().Draw(m.rt, "crash")
	busy := crash && rapid.Bool().Draw(m.rt, "in the middle of exchanges")
	dying := *m.engine
	for name := range m.tenants {
		if busy {
			go func() { _, _, _ = dying.try(logical.UpdateOperation, "tenants/"+name+"/refresh", nil) }()
		} else {
			m.quiet(name)
		}
	}
	if busy {
		synctest.Wait()
	}
	held := map[string]string{}
	for name := range m.tenants {
		held[name] = m.held(name)
	}
	if crash {
		m.crash()
		m.broken = false // the process after a crash has another storage, which works
	} else {
		m.restart()
	}
	for name, tenant := range m.tenants {
		if entry := m.stored(name); m.broken || crash {
			tenant.lost = tenant.lost || held[name] != "" && (entry == nil || entry.RefreshToken != held[name] || busy && !m.kaizala.RefreshTokenAlive(held[name]))
		} else if held[name] != "" && (entry == nil || entry.RefreshToken != held[name]) {
			m.rt.Fatalf("%s: a restart has lost a refresh token", name)
		}
	}
	synctest.Wait()
}

// check checks what must hold after each step.
func (m *model) check(*rapid.T) {
	synctest.Wait()
	for name, tenant := range m.tenants {
		t := m.engine.tenants.named(name)
		busy := false
		if t != nil {
			busy = t.flight.Load() != nil
		}
		entry, held := m.stored(name), m.held(name)
		tenant.lost = tenant.lost || m.losing && held != "" && !m.kaizala.RefreshTokenAlive(held)
		switch {
		case tenant.exists == nil, busy:
		case !*tenant.exists:
			if entry != nil {
				m.rt.Fatalf("%s: the tenant was deleted, and exists again", name)
			}
		case held == "":
			m.rt.Fatalf("%s: the tenant does not exist any more", name)
		case !tenant.lost && !m.kaizala.RefreshTokenAlive(held) && time.Now().Before(m.expires(held)):
			m.rt.Fatalf("%s: its refresh token is lost", name)
		case tenant.ttl != nil && entry != nil && entry.TTL != *tenant.ttl:
			m.rt.Fatalf("%s: ttl is %s, and was written as %s", name, entry.TTL, *tenant.ttl)
		}
	}
	if most := m.kaizala.MaxPerMinute(m.connectorID); most > m.share {
		m.rt.Fatalf("%d calls in a minute", most)
	}
}

func (m *model) expires(token string) time.Time {
	via, err := m.connectors.get(context.Background(), defaultConnector)
	if err != nil || via == nil {
		return time.Time{}
	}
	facts, _ := via.service.Check(token)
	return facts.Expires
}

// stepper carries out storage operations one at a time.
type stepper struct {
	mu     sync.Mutex
	parked map[string][]chan struct{} // by operation and key
}

func (s *stepper) around(op, key string, do func() error) error {
	s.mu.Lock()
	at, turn := op+" "+key, make(chan struct{})
	s.parked[at] = append(s.parked[at], turn)
	s.mu.Unlock()
	<-turn
	return do()
}

// step carries out the operation that pick chooses, and returns whether there was one.
func (s *stepper) step(pick func([]string) string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.parked) == 0 {
		return false
	}
	at := pick(slices.Sorted(maps.Keys(s.parked)))
	close(s.parked[at][0])
	if s.parked[at] = s.parked[at][1:]; len(s.parked[at]) == 0 {
		delete(s.parked, at)
	}
	return true
}

// together makes requests at the same time, and carries out their storage operations, and those of the engine's background work, in a
// drawn order. At most one of the requests changes each tenant, so that the model knows the result.
func (m *model) together(*rapid.T) {
	if m.broken {
		return
	}
	type request struct {
		tenant, what, path string
		op                 logical.Operation
		data               map[string]any
		resp               *logical.Response
		status             int
		text               string
	}
	var requests []*request
	for _, name := range []string{"a", "b", "c"} {
		add := func(what string, op logical.Operation, path string, data map[string]any) {
			requests = append(requests, &request{tenant: name, what: what, op: op, path: path, data: data})
		}
		change := rapid.SampledFrom([]string{"", "token", "ttl", "delete"}).Draw(m.rt, "change")
		switch change {
		case "token":
			m.kaizala.SetRefreshTokenAge(rapid.SampledFrom([]time.Duration{0, inWindow}).Draw(m.rt, "age"))
			verify := rapid.Bool().Draw(m.rt, "verify")
			add(change, logical.UpdateOperation, "tenants/"+name, map[string]any{"refresh_token": m.newToken(name), "verify": verify})
		case "ttl":
			ttl := time.Duration(rapid.IntRange(1, 20).Draw(m.rt, "hours")) * time.Hour
			add(change, logical.UpdateOperation, "tenants/"+name, map[string]any{"ttl": ttl.String()})
		case "delete":
			add(change, logical.DeleteOperation, "tenants/"+name, nil)
		}
		for range rapid.IntRange(0, 2).Draw(m.rt, "readers") {
			switch rapid.SampledFrom([]string{"creds", "token", "refresh"}).Draw(m.rt, "reads") {
			case "creds":
				add("creds", logical.ReadOperation, "creds/"+name, nil)
			case "token":
				add("read", logical.ReadOperation, "token/"+name, nil)
			case "refresh":
				add("refresh", logical.UpdateOperation, "tenants/"+name+"/refresh", nil)
			}
		}
	}
	s := &stepper{parked: map[string][]chan struct{}{}}
	m.engine.storage.surround(s.around)
	var all sync.WaitGroup
	ended := make(chan struct{})
	for _, r := range requests {
		all.Go(func() { r.resp, r.status, r.text = m.try(r.op, r.path, r.data) })
	}
	go func() {
		all.Wait()
		close(ended)
	}()
	pick := func(of []string) string { return rapid.SampledFrom(of).Draw(m.rt, "next") }
	for over := false; !over; {
		synctest.Wait()
		if s.step(pick) {
			continue
		}
		select {
		case <-ended:
			over = true
		case <-time.After(time.Second):
		}
	}
	m.engine.storage.surround(nil)
	for s.step(func(of []string) string { return of[0] }) {
		synctest.Wait()
	}
	for _, r := range requests {
		m.rt.Logf("%s %s: %d %s", r.op, r.path, r.status, r.text)
		tenant := m.tenants[r.tenant]
		if r.resp != nil && r.resp.Data["access_token"] != nil && !m.kaizala.AccessTokenAlive(accessTokenOf(r.resp)) {
			m.rt.Fatalf("%s: a dead access token was handed out", r.path)
		}
		switch {
		case r.what == "ttl" && r.status < 300:
			ttl, _ := time.ParseDuration(r.data["ttl"].(string))
			tenant.ttl = &ttl
		case r.what == "delete" && r.status < 300:
			*tenant = modelTenant{exists: known(false), ttl: known(time.Duration(0)), retired: tenant.retired}
		case r.what == "token" && r.status < 300:
			tenant.exists, tenant.lost, tenant.leases = known(true), false, nil
			if tenant.ttl == nil {
				tenant.ttl = known(m.storedTTL(r.tenant))
			}
		case r.what == "token":
			tenant.exists, tenant.ttl, tenant.lost = nil, nil, true
		case r.what == "ttl" && r.status >= 500:
			tenant.ttl = nil
		case r.what == "delete":
			tenant.exists = nil
		case r.what == "creds" && r.status == http.StatusOK:
			// A lease that was read during a write may be on the access token from before the write, or from after it.
			r.resp.Secret.IssueTime = time.Now()
			if r.resp.Secret.TTL == 0 {
				r.resp.Secret.TTL = r.resp.Secret.MaxTTL
			}
			tenant.leases = append(tenant.leases, r.resp)
		}
	}
}

// heals checks that each tenant that was not lost can be read when storage and service work again.
func (m *model) heals() {
	m.serviceHeals(nil)
	m.storageHeals(nil)
	m.pass(5 * time.Minute)
	m.check(nil)
	time.Sleep(share.Window) // a tenant's fifth of the share may be a single call
	for name, tenant := range m.tenants {
		if tenant.exists == nil || !*tenant.exists || tenant.lost || !time.Now().Before(m.expires(m.held(name))) {
			continue
		}
		if _, status := m.request(logical.ReadOperation, "creds/"+name, nil); status != http.StatusOK {
			m.rt.Fatalf("%s cannot be read when storage and service work: %d", name, status)
		}
		if status := m.engine.status(name); status != statusOK {
			m.rt.Fatalf("%s is %s when storage and service work", name, status)
		}
	}
}

func TestProperties(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(rt *rapid.T) {
		rapid.SyncTest(rt, func(rt *rapid.T) {
			tb := &rapidTB{rt: rt}
			defer func() {
				for _, f := range slices.Backward(tb.cleanups) {
					f()
				}
			}()
			m := &model{engine: newConfiguredEngine(tb), rt: rt, tenants: map[string]*modelTenant{}}
			m.share = rapid.SampledFrom([]int{5, 20}).Draw(rt, "share")
			m.setShare(m.share)
			m.kaizala.SetOldTokenDies(rapid.Bool().Draw(rt, "the old refresh token dies"))
			for _, name := range []string{"a", "b", "c"} {
				m.tenants[name] = &modelTenant{exists: known(true), ttl: known(time.Duration(0))}
				m.addTenant(name)
			}
			rt.Repeat(map[string]func(*rapid.T){
				"":             m.check,
				"writeToken":   m.writeToken,
				"writeTTL":     m.writeTTL,
				"delete":       m.remove,
				"readCreds":    m.readCreds,
				"readAgain":    m.readCreds,
				"readToken":    m.readToken,
				"refresh":      m.refresh,
				"revokeAll":    m.revokeAll,
				"clockJumps":   m.clockJumps,
				"serviceFails": m.serviceFails,
				"serviceHeals": m.serviceHeals,
				"storageFails": m.storageFails,
				"storageHeals": m.storageHeals,
				"processEnds":  m.processEnds,
				"together":     m.together,
			})
			m.heals()
		})
	})
}
