package backend

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// The pair matrix: a flow A is held at one of its steps, a flow B runs to its end or until it waits, and A goes on. The service
// gives A one of several answers. meeting.check checks what must hold for every pair.

// pairAnswer is what the service does with A's exchange.
type pairAnswer int

const (
	answersOK pairAnswer = iota
	answersRotated
	answersLimited
	answersTokenRefused
	answersConnectorRefused
	answersError
	answersNever
)

func (a pairAnswer) String() string {
	return [...]string{"ok", "rotated", "429", "token refused", "connector refused", "500", "hang"}[a]
}

// fails returns whether the answer has no access token.
func (a pairAnswer) fails() bool { return a > answersRotated }

// status is the HTTP status that a read or a verified write gets.
func (a pairAnswer) status() int {
	return [...]int{200, 200, 429, 400, 400, 503, 503}[a]
}

const pairPause = 30 * time.Second // Retry-After of a 429

// pairStep is where A is held.
type pairStep int

const (
	beforeLoad pairStep = iota
	afterLoad
	beforeNote
	afterNote
	atService // the service has carried the exchange out, and its answer has not arrived
	beforeStore
	afterStore
)

func (s pairStep) String() string {
	return [...]string{"before its load", "after its load", "before its call is noted", "after its call is noted", "at the service", "before it is stored", "after it is stored"}[s]
}

// pairKind is a kind of service, and the pairs that are played with it.
type pairKind struct {
	name string
	// begin makes the service.
	begin func(*meeting)
	// place returns the fields of a connector that name its service and the addresses of its calls.
	place func(host string) map[string]any
	// tokenRefused and connectorRefused are the answers that refuse the refresh token, and the connector.
	tokenRefused, connectorRefused func() (status int, header http.Header, body string)
	// secretOf returns the connector's secret of a request; withSecret replaces it.
	secretOf   func(*http.Request) string
	withSecret func(*http.Request, string)
	// eachRotates: every exchange replaces the refresh token.
	eachRotates bool
	// endsOlder: an exchange ends the access tokens before it.
	endsOlder bool
	// revokes: an access token that is given up dies at the service.
	revokes bool
	// ownTokens: each lease has an access token of its own.
	ownTokens bool
	// The pairs that are played, nil for all: most of the engine's code is the same for every kind of service.
	flows   []string // names of flow A
	steps   []pairStep
	answers []pairAnswer
}

func pairKinds() []pairKind {
	kaizala := pairKind{
		name: "Kaizala",
		begin: func(p *meeting) {
			p.kaizala.SetLimits(0, 0)
			p.connectorID, p.secret = p.kaizala.RegisterConnector()
			p.service, p.transport = kaizalaMatrix{p.kaizala}, p.kaizala.Transport()
			p.grant = func(user string) string { return p.kaizala.GenerateUserToken(p.connectorID, user) }
		},
		place: func(host string) map[string]any { return map[string]any{"api_root": "https://" + host} },
		tokenRefused: func() (int, http.Header, string) {
			return 401, nil, `{"message": "no", "errorCode": "InvalidToken"}`
		},
		connectorRefused: func() (int, http.Header, string) {
			return 401, nil, `{"message": "Dont have correct applicationId and secret in header!", "errorCode": "Unauthenticated"}`
		},
		secretOf:   func(r *http.Request) string { return r.Header.Get("applicationSecret") },
		withSecret: func(r *http.Request, secret string) { r.Header.Set("applicationSecret", secret) },
	}
	refused := func(status int, code string) func() (int, http.Header, string) {
		return func() (int, http.Header, string) {
			return status, http.Header{"Content-Type": {"application/json"}}, fmt.Sprintf(`{"error": %q}`, code)
		}
	}
	oauth := func(class func(*oauth2test.Options), fields map[string]any) pairKind {
		return pairKind{
			begin: func(p *meeting) {
				server := oauth2test.New()
				server.Set(func(o *oauth2test.Options) {
					class(o)
					o.ReuseKillsFamily, o.AccessTokenLife = true, day
				})
				p.connectorID, p.secret = server.RegisterClient(oauth2test.AuthBasic)
				p.service, p.transport, p.server = oauthMatrix{server}, server.Transport(), server
				p.grant = func(user string) string { return server.Grant(p.connectorID, user) }
			},
			place: func(host string) map[string]any {
				place := map[string]any{"service": "oauth2", "token_url": "https://" + host + "/token", "revocation_url": "https://" + host + "/revoke"}
				maps.Copy(place, fields)
				return place
			},
			tokenRefused:     refused(400, "invalid_grant"),
			connectorRefused: refused(401, "invalid_client"),
			secretOf: func(r *http.Request) string {
				_, secret, _ := r.BasicAuth()
				return secret
			},
			withSecret: func(r *http.Request, secret string) {
				id, _, _ := r.BasicAuth()
				r.SetBasicAuth(id, secret)
				at, _ := url.Parse(oauth2test.DefaultURL)
				r.URL.Host, r.Host = at.Host, at.Host
			},
			eachRotates: true,
			steps:       []pairStep{afterLoad, afterNote, atService, beforeStore, afterStore},
		}
	}
	revoked := oauth(oauth2test.ClassA, classA)
	revoked.name, revoked.revokes = "OAuth, tokens are revoked", true
	revoked.flows = []string{"cold read", "refresh", "write verified", "connector verified", "delete", "last lease revoked", "config secret", "config place", "background", revocationUnderWay, revocationWorker}
	revoked.answers = []pairAnswer{answersRotated, answersLimited, answersConnectorRefused, answersNever}

	planned := oauth(oauth2test.ClassD, map[string]any{"revocation": "exchange"})
	planned.name, planned.endsOlder = "OAuth, an exchange ends older tokens", true
	planned.flows = []string{"cold read", "refresh", "last lease revoked", "background"}
	planned.answers = []pairAnswer{answersRotated, answersError, answersNever}

	own := oauth(oauth2test.ClassA, classA)
	own.name, own.revokes, own.ownTokens = "OAuth, a token for each lease", true, true
	own.flows = []string{"cold read", "delete", "last lease revoked", revocationUnderWay}
	own.answers = []pairAnswer{answersRotated, answersNever}
	return []pairKind{kaizala, revoked, planned, own}
}

const (
	revocationUnderWay = "revocation under way"
	revocationWorker   = "revocation worker"
)

// plays returns whether the pairs with this flow A, step and answer are played.
func (k *pairKind) plays(a meetingFlow, step pairStep, answer pairAnswer) bool {
	switch {
	case a.key == "", k.flows != nil && !slices.Contains(k.flows, a.name), a.revokes && k.flows == nil:
		return false
	case k.steps != nil && !slices.Contains(k.steps, step), k.answers != nil && !slices.Contains(k.answers, answer):
		return false
	case a.revokes:
		return answer != answersTokenRefused && step > afterLoad
	}
	return a.calls || !answer.fails()
}

// meetingFlow is one thing that the engine does: a request, or work in the background.
type meetingFlow struct {
	name string
	// calls: the flow calls the service. asks: its caller also waits for the service's answer.
	asks, calls bool
	// revokes: the call of the flow at which A is held is a revocation.
	revokes bool
	// retires: after the flow, the engine does not hand out the access token that was in use before.
	retires bool
	// passive: the flow changes neither the refresh token nor the connector of an exchange.
	passive bool
	// state is what the flow needs: no tenant, a refresh token alone, or an access token with a lease too.
	state tenantState
	// key is the storage key, or its prefix, that the flow reads and writes; "": none.
	key string
	run func(p *meeting, e *engine, who string)
}

type tenantState int

const (
	anyState tenantState = iota
	noTenant
	coldTenant
	warmTenant
)

// pairState is the state of the tenant that a test compares with storage.
type pairState struct {
	exists    bool
	user      string // the user of the refresh token
	connector string
	ttl       time.Duration
}

// pairOp is one request of a flow.
type pairOp struct {
	who, what string
	effect    func(*pairState)
	replaces  bool // it replaces or deletes the refresh token or the connector of an exchange under way
	verified  bool
	status    int
	text      string
	ended     bool
	early     bool // it ended before A was released
}

func meetingFlows() []meetingFlow {
	const tenantKey, configKey = tenantPrefix + "acme", connectorPrefix + defaultConnector
	writeToken := func(verify bool) func(*meeting, *engine, string) {
		return func(p *meeting, e *engine, who string) {
			p.do(e, &pairOp{who: who, what: "write token", replaces: true, verified: verify, effect: func(s *pairState) {
				if !s.exists {
					*s = pairState{exists: true, connector: defaultConnector}
				}
				s.user = "operator" + who
			}}, logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": p.operators[who], "verify": verify})
		}
	}
	writeConnector := func(verify bool) func(*meeting, *engine, string) {
		return func(p *meeting, e *engine, who string) {
			p.do(e, &pairOp{who: who, what: "write connector", replaces: true, verified: verify, effect: func(s *pairState) { s.connector = "other" }},
				logical.UpdateOperation, "tenants/acme", map[string]any{"connector": "other", "verify": verify})
		}
	}
	settings := func(op logical.Operation) func(*meeting, *engine, string) {
		return func(p *meeting, e *engine, who string) {
			ttl := map[string]time.Duration{"A": time.Hour, "B": 2 * time.Hour}[who]
			p.do(e, &pairOp{who: who, what: string(op) + " ttl", effect: func(s *pairState) { s.ttl = ttl }}, op, "tenants/acme", map[string]any{"ttl": ttl.String()})
		}
	}
	revoke := func(p *meeting, e *engine, who string) {
		op := p.begin(&pairOp{who: who, what: "revoke"})
		secret := *p.lease.Secret
		resp, err := e.HandleRequest(context.Background(), &logical.Request{Operation: logical.RevokeOperation, Secret: &secret, Storage: e.storage})
		status, text := statusOf(logical.RevokeOperation, resp, err)
		p.end(op, status, text)
	}
	remove := func(p *meeting, e *engine, who string) {
		p.do(e, &pairOp{who: who, what: "delete", replaces: true, effect: func(s *pairState) { *s = pairState{} }}, logical.DeleteOperation, "tenants/acme", nil)
	}
	return []meetingFlow{
		{name: "cold read", asks: true, calls: true, passive: true, state: coldTenant, key: tenantKey, run: func(p *meeting, e *engine, who string) {
			p.do(e, &pairOp{who: who, what: "read"}, logical.ReadOperation, "creds/acme", nil)
		}},
		{name: "refresh", asks: true, calls: true, retires: true, passive: true, state: warmTenant, key: tenantKey, run: func(p *meeting, e *engine, who string) {
			p.do(e, &pairOp{who: who, what: "refresh"}, logical.UpdateOperation, "tenants/acme/refresh", nil)
		}},
		{name: "write verified", asks: true, calls: true, state: warmTenant, key: tenantKey, run: writeToken(true)},
		{name: "create verified", asks: true, calls: true, state: noTenant, key: tenantKey, run: writeToken(true)},
		{name: "write unverified", state: warmTenant, key: tenantKey, run: writeToken(false)},
		{name: "create unverified", state: noTenant, key: tenantKey, run: writeToken(false)},
		{name: "connector verified", asks: true, calls: true, state: coldTenant, key: tenantKey, run: writeConnector(true)},
		{name: "connector unverified", state: coldTenant, key: tenantKey, run: writeConnector(false)},
		{name: "write settings", passive: true, state: warmTenant, key: tenantKey, run: settings(logical.UpdateOperation)},
		{name: "patch", passive: true, state: coldTenant, key: tenantKey, run: settings(logical.PatchOperation)},
		{name: "delete", state: warmTenant, key: tenantKey, run: remove},
		{name: "delete and write anew", state: coldTenant, key: tenantKey, run: func(p *meeting, e *engine, who string) {
			remove(p, e, who)
			writeToken(false)(p, e, who)
		}},
		{name: "last lease revoked", retires: true, passive: true, state: warmTenant, key: tenantKey, run: revoke},
		{name: revocationUnderWay, passive: true, revokes: true, state: warmTenant, key: intentPrefix, run: revoke},
		{name: revocationWorker, passive: true, revokes: true, state: warmTenant, key: intentPrefix, run: func(p *meeting, e *engine, who string) {
			time.Sleep(45 * time.Second) // the worker tries again within this time
		}},
		{name: "config secret", state: coldTenant, key: configKey, run: func(p *meeting, e *engine, who string) {
			p.do(e, &pairOp{who: who, what: "config secret"}, logical.UpdateOperation, "config", map[string]any{"connector_secret": "NEWSECRET" + who})
		}},
		{name: "config place", state: coldTenant, key: configKey, run: func(p *meeting, e *engine, who string) {
			p.do(e, &pairOp{who: who, what: "config place"}, logical.UpdateOperation, "config", p.kind.place("third.kaiza.la"))
		}},
		{name: "config delete", passive: true, key: connectorPrefix + "other", run: func(p *meeting, e *engine, who string) {
			p.do(e, &pairOp{who: who, what: "delete config/other"}, logical.DeleteOperation, "config/other", nil)
		}},
		{name: "background", calls: true, passive: true, state: coldTenant, key: tenantKey, run: func(p *meeting, e *engine, who string) {
			op := p.begin(&pairOp{who: who, what: "background"})
			if t, v, err := e.tenants.load(context.Background(), "acme"); err == nil && t != nil && v != nil {
				e.exchangeUnasked(t)
				for f := t.flight.Load(); f != nil && who == "A"; f = t.flight.Load() {
					<-f.done
				}
			}
			p.end(op, 200, "")
		}},
		{name: "invalidation", passive: true, run: func(p *meeting, e *engine, who string) {
			for _, key := range []string{tenantKey, configKey, callPrefix + defaultConnector + "/0"} {
				e.InvalidateKey(context.Background(), key)
			}
		}},
		{name: "leaving memory", passive: true, run: func(p *meeting, e *engine, who string) { e.tenants.loaded.Purge() }},
		{name: "stop and start", run: func(p *meeting, _ *engine, who string) {
			// Before Vault stops an engine it cancels the requests, and waits for their ends.
			p.cancel()
			<-p.ended
			p.restart()
		}},
		{name: "sudden death", run: func(p *meeting, _ *engine, who string) {
			p.mu.Lock()
			p.died = true
			p.mu.Unlock()
			p.crash()
		}},
	}
}

// meeting is one pair of flows.
type meeting struct {
	*engine
	kind      *pairKind
	service   matrixService
	server    *oauth2test.Server // nil for Kaizala
	transport http.RoundTripper
	grant     func(user string) (refreshToken string)

	a, b   meetingFlow
	step   pairStep
	answer pairAnswer

	operators map[string]string // the refresh tokens that the flows write
	lease     *logical.Response
	real      string          // the connector's secret as the service knows it
	ctx       context.Context // of A's requests
	cancel    func()
	ended     chan struct{} // closed when A has ended

	mu       sync.Mutex
	armed    bool
	reached  chan struct{}
	release  chan struct{}
	released bool
	over     bool // both flows have ended
	died     bool
	answered bool // A's exchange has its answer
	rotated  bool // A's exchange has replaced a refresh token
	ops      []*pairOp
	paused   map[bool]time.Time // the end of the pause of config/other (true) and of config (false)
	due0     time.Time          // when the tenant was due before the flows
	secrets  []string           // connector secrets that an acknowledged write has replaced
	roots    []string           // hosts that an acknowledged write has replaced
	calls    []string
	process  int
	failed   bool
}

func (p *meeting) String() string {
	return fmt.Sprintf("%s | A: %s | held %s | B: %s | service: %s", p.kind.name, p.a.name, p.step, p.b.name, p.answer)
}

func (p *meeting) assertf(ok bool, format string, args ...any) {
	p.t.Helper()
	if ok {
		return
	}
	p.failed = true
	var said []string
	for _, op := range p.ops {
		said = append(said, fmt.Sprintf("%s %s: %d %s (early: %t)", op.who, op.what, op.status, op.text, op.early))
	}
	p.t.Errorf("%s\n    %s\n    %s\n    %s", p, fmt.Sprintf(format, args...), strings.Join(said, "\n    "), strings.Join(p.calls, "\n    "))
}

func (p *meeting) begin(op *pairOp) *pairOp {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ops = append(p.ops, op)
	return op
}

func (p *meeting) end(op *pairOp, status int, text string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	op.status, op.text, op.ended, op.early = status, text, true, !p.released
}

// do makes one request of a flow.
func (p *meeting) do(e *engine, op *pairOp, do logical.Operation, path string, data map[string]any) {
	p.begin(op)
	begun := time.Now()
	ctx := context.Background()
	if op.who == "A" {
		ctx = p.ctx
	}
	resp, status, text := e.tryContext(ctx, do, path, data)
	p.end(op, status, text)
	p.mu.Lock()
	dead := p.died && op.who == "A"
	if status < 300 && !dead {
		switch op.what {
		case "config secret":
			p.secrets = append(p.secrets, p.secret)
		case "config place":
			p.roots = append(p.roots, "first.kaiza.la")
		}
	}
	p.mu.Unlock()
	if dead {
		return
	}
	p.assertf(time.Since(begun) <= 10*time.Second, "%s took %s", op.what, time.Since(begun))
	if resp != nil && resp.Data["access_token"] != nil {
		// The other flow may end the token at the service while this reader gets its answer.
		retired := p.kind.endsOlder && (p.a.retires || p.b.retires) || p.kind.revokes && (p.a.retires || p.b.retires || !p.a.passive || !p.b.passive)
		p.assertf(retired || p.service.AccessTokenAlive(accessTokenOf(resp)), "a dead access token was handed out")
		entry := p.stored("acme")
		for _, call := range p.service.Calls() {
			if call.Rotated && call.AccessToken == accessTokenOf(resp) {
				p.assertf(entry == nil || entry.RefreshToken != call.RefreshToken, "an access token was handed out before its refresh token was stored")
			}
		}
	}
}

func (p *meeting) newToken(user string) string { return p.grant(user) }

// hold holds the first flow that comes to A's step until A is released. It returns whether the process has died by then.
func (p *meeting) hold(process int) (dead bool) {
	p.mu.Lock()
	if !p.armed {
		p.mu.Unlock()
		return false
	}
	p.armed = false
	p.mu.Unlock()
	close(p.reached)
	<-p.release
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.died && process == 1
}

// around is A's storage.
func (p *meeting) around(op, key string, do func() error) error {
	var at bool
	switch p.step {
	case beforeNote, afterNote:
		at = op == "put" && strings.HasPrefix(key, callPrefix)
	case beforeStore, afterStore:
		at = isWrite(op) && strings.HasPrefix(key, p.a.key)
	case beforeLoad, afterLoad:
		at = op == "get" && key == p.a.key
	}
	before := p.step == beforeLoad || p.step == beforeNote || p.step == beforeStore
	if at && before && p.hold(1) {
		return errTold
	}
	err := do()
	if at && !before && p.hold(1) {
		return errTold
	}
	return err
}

// pairWire is the transport of one process to the service.
type pairWire struct {
	p       *meeting
	process int
}

func isOther(r *http.Request) bool { return r.URL.Host == "second.kaiza.la" }

func (w pairWire) RoundTrip(r *http.Request) (*http.Response, error) {
	p := w.p
	p.mu.Lock()
	if p.died && w.process == 1 {
		p.mu.Unlock()
		return nil, errors.New("this process is dead")
	}
	secret, now := p.kind.secretOf(r), time.Now()
	p.calls = append(p.calls, fmt.Sprintf("call of process %d at %s to %s", w.process, now.Format(time.TimeOnly), r.URL.Host))
	p.assertf(isOther(r) || !slices.Contains(p.secrets, secret) && !slices.Contains(p.roots, r.URL.Host), "a request has a connector secret, or goes to a host, that a config write has replaced")
	p.assertf(!now.Before(p.paused[isOther(r)]), "a call within the service's pause")
	revocation := strings.HasSuffix(r.URL.Path, "/revoke")
	mine := p.reached != nil && !p.answered && !p.over && w.process == 1 && revocation == p.a.revokes
	if mine {
		p.answered = true
	}
	p.mu.Unlock()
	answer := answersOK
	if mine {
		answer = p.answer
	}
	resp, err := w.send(r, answer)
	if mine && p.step == atService && p.hold(w.process) {
		return nil, errTold
	}
	if answer == answersNever {
		<-r.Context().Done()
		return nil, r.Context().Err()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if err == nil && resp.StatusCode == http.StatusTooManyRequests {
		p.paused[isOther(r)] = time.Now().Add(pairPause)
	}
	return resp, err
}

func (w pairWire) send(r *http.Request, answer pairAnswer) (*http.Response, error) {
	p := w.p
	canned := func(status int, header http.Header, body string) (*http.Response, error) {
		return &http.Response{StatusCode: status, Status: http.StatusText(status), Header: header, Request: r, Body: io.NopCloser(strings.NewReader(body)), ContentLength: int64(len(body))}, nil
	}
	switch answer {
	case answersLimited:
		return canned(429, http.Header{"Retry-After": {"30"}}, "")
	case answersTokenRefused:
		return canned(p.kind.tokenRefused())
	case answersConnectorRefused:
		return canned(p.kind.connectorRefused())
	case answersError:
		return canned(500, nil, "")
	case answersNever:
		return nil, nil
	}
	r = r.Clone(r.Context())
	p.kind.withSecret(r, p.real) // the service accepts each request: RoundTrip has checked its secret
	resp, err := p.transport.RoundTrip(r)
	if err == nil {
		body, _ := io.ReadAll(resp.Body)
		resp.Body = io.NopCloser(bytes.NewReader(body))
		p.mu.Lock()
		calls := p.service.Calls()
		p.rotated = p.rotated || len(calls) > 0 && calls[len(calls)-1].Rotated
		p.mu.Unlock()
	}
	return resp, err
}

// play plays the pair. It returns false if A does not come to the step.
func (p *meeting) play(t *testing.T) bool {
	p.engine = newEngine(t)
	p.stop()
	p.wire = func() http.RoundTripper {
		p.process++
		return pairWire{p, p.process}
	}
	p.start()
	p.kind.begin(p)
	p.real = p.secret
	for path, host := range map[string]string{"config": "first.kaiza.la", "config/other": "second.kaiza.la"} {
		config := p.kind.place(host)
		config["connector_id"], config["connector_secret"], config["exchanges_per_minute"] = p.connectorID, p.secret, 100_000
		p.write(path, config)
	}
	p.operators = map[string]string{"A": p.newToken("operatorA"), "B": p.newToken("operatorB")}
	state := p.prepare()
	p.service.ResetCalls()
	p.mu.Lock()
	p.calls, p.rotated, p.paused = nil, false, map[bool]time.Time{}
	p.due0, _ = p.indexed()
	p.reached, p.release, p.armed = make(chan struct{}), make(chan struct{}), true
	p.mu.Unlock()
	p.storage.surround(p.around)

	var flows sync.WaitGroup
	first := *p.engine
	p.ended = make(chan struct{})
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	p.cancel, p.ctx = cancel, ctx
	flows.Go(func() {
		defer close(p.ended)
		p.a.run(p, &first, "A")
	})
	select {
	case <-p.reached:
	case <-p.ended:
		p.storage.heal()
		p.mu.Lock()
		p.armed = false
		p.mu.Unlock()
		close(p.release) // work that A has started in the background may wait there
		return false
	}
	first.storage.surround(nil)
	flows.Go(func() { p.b.run(p, p.engine, "B") })
	synctest.Wait()
	p.mu.Lock()
	p.released = true
	p.mu.Unlock()
	close(p.release)
	flows.Wait()
	synctest.Wait()
	p.mu.Lock()
	p.over = true
	p.mu.Unlock()
	p.check(state)
	return true
}

// prepare makes the state that A needs, and returns it.
func (p *meeting) prepare() pairState {
	state := pairState{exists: true, user: "acme", connector: defaultConnector}
	if p.a.state == noTenant {
		state = pairState{}
	}
	token := p.newToken("acme")
	if p.answer != answersOK && !p.kind.eachRotates {
		time.Sleep(inWindow - 13*time.Hour)
	}
	if state.exists {
		tenant := map[string]any{"refresh_token": token, "verify": false}
		if p.kind.ownTokens {
			tenant["token_per_lease"] = true
		}
		p.write("tenants/acme", tenant)
		if p.a.state == warmTenant || p.b.state == warmTenant && p.a.state == anyState {
			p.lease = p.engine.lease("acme")
		}
	}
	// In the pairs with a rotation, the rotation window has begun by then, and the renewer is not due yet.
	time.Sleep(2 * time.Hour)
	if p.a.name == revocationWorker {
		p.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointRevocation, Answer: oauth2test.BadGateway, Times: 1})
		require.NoError(p.t, p.engine.revokeLease(p.lease))
	}
	if p.step == beforeLoad || p.step == afterLoad {
		p.tenants.loaded.Purge()
		for _, name := range []string{defaultConnector, "other"} {
			p.InvalidateKey(context.Background(), connectorPrefix+name)
		}
	}
	return state
}

// check checks what must hold after both flows have ended.
func (p *meeting) check(initial pairState) {
	if p.failed {
		return
	}
	states, superseded := p.expected(initial)
	p.checkAnswers()
	p.checkIndex("at once")
	if t := p.tenants.named("acme"); t != nil && p.stored("acme") != nil {
		p.checkStatus(superseded)
	}
	p.quiet("acme")
	p.pass(2 * time.Minute)
	p.checkIndex("after two minutes")

	entry := p.stored("acme")
	found := pairState{}
	if entry != nil {
		found = pairState{exists: true, connector: entry.Connector, ttl: entry.TTL}
		for _, user := range []string{"acme", "operatorA", "operatorB"} {
			if p.service.CurrentRefreshToken(user) == entry.RefreshToken {
				found.user = user
			}
		}
		lost := !p.service.RefreshTokenAlive(entry.RefreshToken)
		p.assertf(!lost || p.died && p.rotated, "a refresh token is lost")
		if lost {
			return // the process died between the service and storage
		}
		config, err := p.storedConnector(context.Background(), entry.Connector)
		p.assertf(err == nil && config != nil, "the tenant's connector was deleted")
	}
	if !slices.Contains(states, found) {
		p.assertf(false, "the tenant is %+v, and should be one of %+v", found, states)
	}
	if entry == nil {
		_, status, _ := p.try(logical.ReadOperation, "creds/acme", nil)
		p.assertf(status == 400, "a tenant that is not there is read: %d", status)
		p.assertf(p.tenants.named("acme") == nil, "memory has a record of a tenant that is not there")
		p.healConnectors()
		p.pass(2 * time.Minute)
		p.checkGivenUp()
		return
	}
	p.heal()
	if p.failed {
		return
	}
	p.checkGivenUp()
	p.checkIndex("in the end")
	p.checkRestart()
	if t := p.tenants.named("acme"); t != nil {
		p.assertf(!t.storing.busy() && t.flight.Load() == nil, "a lock is held")
	}
	binding := p.connectors.record(defaultConnector).binding
	p.assertf(binding.TryAcquire(exclusive), "the connector is held")
}

// expected returns the states that storage may have after these answers, and whether B has superseded A's exchange.
func (p *meeting) expected(initial pairState) (states []pairState, superseded bool) {
	var early []*pairOp
	late := map[string][]*pairOp{}
	for _, op := range p.ops {
		if op.early {
			early = append(early, op)
			superseded = superseded || op.who == "B" && op.replaces && op.status < 300
		} else {
			late[op.who] = append(late[op.who], op)
		}
	}
	from := []pairState{initial}
	for _, op := range early {
		from = p.apply(from, op, false)
	}
	// B may take effect before A while A is held in a load, and between two requests of A after the one at which A was held.
	var orders func(from []pairState, a, b []*pairOp)
	orders = func(from []pairState, a, b []*pairOp) {
		if len(a) == 0 && len(b) == 0 {
			states = append(states, from...)
			return
		}
		if len(a) > 0 {
			orders(p.apply(from, a[0], superseded), a[1:], b)
		}
		if len(b) > 0 && (len(a) < len(late["A"]) || p.step <= afterLoad || len(a) == 0) {
			orders(p.apply(from, b[0], superseded), a, b[1:])
		}
	}
	orders(from, late["A"], late["B"])
	return states, superseded
}

// apply returns the states that storage may have after a request with this answer.
func (p *meeting) apply(from []pairState, op *pairOp, superseded bool) (to []pairState) {
	if op.who == "A" && op.verified && superseded && p.step >= beforeNote {
		p.assertf(op.status >= 400, "a verification has undone a write or a delete that came during it")
		return from
	}
	unheard := op.who == "A" && p.died && !op.early
	for _, s := range from {
		next := s
		if op.effect != nil && (s.exists || op.what == "write token") {
			op.effect(&next)
		}
		switch {
		case op.status >= 500 || unheard:
			to = append(to, s, next)
		case op.status < 300:
			to = append(to, next)
		default:
			to = append(to, s)
		}
	}
	return to
}

// checkAnswers checks the status that A's caller gets.
func (p *meeting) checkAnswers() {
	if !p.a.asks || !p.b.passive || p.died || p.b.calls || p.b.name == "config delete" {
		return
	}
	for _, op := range p.ops {
		if op.who != "A" {
			continue
		}
		want := p.answer.status()
		if want == 200 && op.status < 300 {
			continue
		}
		p.assertf(op.status == want, "A gets %d, and should get %d after this answer of the service", op.status, want)
	}
}

// checkStatus checks the tenant's status after both flows have ended.
func (p *meeting) checkStatus(superseded bool) {
	status := p.engine.status("acme")
	switch {
	case p.died, p.b.name == "stop and start", p.answer == answersNever:
	case superseded && p.answer != answersConnectorRefused:
		p.assertf(status == statusOK || status == statusUnverified, "the tenant is %s, and its new refresh token has not failed", status)
	case p.a.asks && !p.a.passive:
	case p.answer == answersTokenRefused && p.answered && p.a.calls && p.b.passive && !p.b.calls:
		p.assertf(status == statusRejected, "the tenant is %s, and the service has refused its refresh token", status)
	case p.answer.fails() && p.answered && p.a.calls && p.b.passive && !p.b.calls:
		p.assertf(status == statusDegraded || status == statusOK, "the tenant is %s after a failure", status)
	case !p.answer.fails():
		p.assertf(status == statusOK || status == statusUnverified, "the tenant is %s, and nothing has failed", status)
	}
}

// checkIndex checks that the index has the tenant no later than it is due.
func (p *meeting) checkIndex(when string) {
	synctest.Wait()
	if p.stored("acme") == nil {
		return
	}
	t := p.tenants.named("acme")
	if t == nil {
		p.assertf(false, "%s: the tenant is not known", when)
		return
	}
	v := t.view.Load()
	limit := time.Now().Add(time.Minute)
	if v.kept == nil && v.knows != doubted {
		if v.entry == nil {
			v = &tenantView{tenantMemory: &tenantMemory{trouble: v.trouble}}
			v.show(p.stored("acme"), nil)
		}
		due := p.due(t, v, time.Now())
		if due.IsZero() {
			return
		}
		limit = latest(limit, due.Add(time.Minute), p.paused[true].Add(time.Second), p.paused[false].Add(time.Second))
		if v.access == nil {
			limit = latest(limit, p.due0)
		}
	}
	at, waits := p.indexed()
	p.index.mu.Lock()
	armed := p.index.armed
	p.index.mu.Unlock()
	switch {
	case t.flight.Load() != nil || waits:
	case at.IsZero():
		p.assertf(false, "%s: the tenant is not in the index", when)
	default:
		p.assertf(!at.After(limit), "%s: the tenant is looked at at %s, and is due at %s", when, at, limit)
		p.assertf(!armed.IsZero() && !armed.After(at), "%s: nothing wakes the index in time", when)
	}
}

// indexed returns when the tenant is due in the index, and whether it waits for a place in a connector's share.
func (p *meeting) indexed() (due time.Time, waits bool) {
	x := &p.index
	x.mu.Lock()
	defer x.mu.Unlock()
	_, waits = x.waitsAt["acme"]
	if item, _ := x.queue.PopByKey("acme"); item != nil {
		_ = x.queue.Push(item)
		due = time.Unix(0, item.Priority)
	}
	return due, waits
}

// healConnectors writes the connectors that the service has refused, as their owner is told to.
func (p *meeting) healConnectors() {
	if p.answer != answersConnectorRefused {
		return
	}
	for _, path := range []string{"config", "config/other"} {
		if _, status, _ := p.try(logical.ReadOperation, path, nil); status == 200 {
			p.write(path, map[string]any{"request_timeout": "59s"})
		}
	}
}

// checkGivenUp checks that at the service the access tokens in the engine's storage are alive, and all others are dead.
func (p *meeting) checkGivenUp() {
	if !p.kind.revokes || p.died {
		return // an access token that only a dead process had may live until it expires
	}
	kept := map[string]bool{}
	if entry := p.stored("acme"); entry != nil && entry.Access != nil {
		kept[entry.Access.Token] = true
	}
	keys, err := listBelow(context.Background(), p.storage, heldPrefix)
	require.NoError(p.t, err)
	for _, key := range keys {
		h, err := getEntry[held](context.Background(), p.storage, heldPrefix+key)
		require.NoError(p.t, err)
		kept[h.Token] = true
	}
	for _, user := range []string{"acme", "operatorA", "operatorB"} {
		for _, token := range p.server.AccessTokens(user) {
			p.assertf(kept[token], "an access token that the engine does not keep lives on at the service")
			delete(kept, token)
		}
	}
	p.assertf(len(kept) == 0, "an access token that is kept is dead at the service")
	p.assertf(len(p.server.LostGrants()) == 0 && p.server.UsedTwice() == 0, "a refresh token was used twice")
}

// heal does what the answers tell an operator to do, and checks that the tenant can be read then, with the status ok.
func (p *meeting) heal() {
	p.healConnectors()
	if p.engine.status("acme") == statusRejected {
		_, status, text := p.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
		p.assertf(status == 200, "a refresh by hand does not help: %d %s", status, text)
	}
	resp, status, text := p.try(logical.ReadOperation, "creds/acme", nil)
	p.assertf(status == 200, "the tenant cannot be read: %d %s", status, text)
	if status != 200 {
		return
	}
	p.assertf(p.service.AccessTokenAlive(accessTokenOf(resp)), "a dead access token was handed out")
	p.pass(2 * time.Minute)
	if p.kind.endsOlder && p.engine.status("acme") == statusDegraded {
		// Until the planned time the engine makes no exchange by itself, because it would end an access token in use.
		p.write("tenants/acme/refresh", nil)
	}
	p.assertf(p.engine.status("acme") == statusOK, "the tenant is %s after everything was healed", p.engine.status("acme"))
	p.assertf(p.service.RefreshTokenAlive(p.stored("acme").RefreshToken), "its refresh token is dead")
}

// checkRestart checks that a restart changes nothing and calls nothing.
func (p *meeting) checkRestart() {
	if p.kind.ownTokens {
		p.read("token/acme") // leases had tokens of their own
	}
	look := func() string {
		p.tenants.loaded.Purge() // compare what is stored, without what memory alone knows
		if t := p.tenants.named("acme"); t != nil {
			t.mu.Lock()
			t.used = ""
			t.mu.Unlock()
		}
		entry, err := json.Marshal(p.stored("acme"))
		require.NoError(p.t, err)
		status, err := json.Marshal(p.read("tenants/acme"))
		require.NoError(p.t, err)
		return fmt.Sprint(string(entry), string(status), p.read("token/acme")["access_token"])
	}
	before, calls := look(), p.service.CallCount()
	p.restart()
	synctest.Wait()
	p.pass(time.Minute)
	p.assertf(before == look(), "a restart has changed something:\n    %s\n    %s", before, look())
	p.assertf(p.service.CallCount() == calls, "a restart has made a call")
}

func TestPairMatrix(t *testing.T) {
	t.Parallel()
	var failures atomic.Int64
	kinds := pairKinds()
	played := make([]atomic.Int64, len(kinds))
	t.Run("flows", func(t *testing.T) {
		for i := range kinds {
			for _, a := range meetingFlows() {
				if !slices.ContainsFunc(allSteps, func(s pairStep) bool { return kinds[i].plays(a, s, answersRotated) }) {
					continue
				}
				t.Run(kinds[i].name+"/"+a.name, func(t *testing.T) {
					t.Parallel()
					eachPair(&kinds[i], a, func(p *meeting) (comes bool) {
						if failures.Load() >= 10 {
							t.FailNow() // ten failures are enough to find the cause
						}
						synctest.Test(t, func(t *testing.T) { comes = p.play(t) })
						if comes {
							played[i].Add(1)
						}
						if p.failed {
							failures.Add(1)
						}
						return comes
					})
				})
			}
		}
	})
	for i := range kinds {
		t.Logf("%s: %d pairs", kinds[i].name, played[i].Load())
	}
}

var allSteps = []pairStep{beforeLoad, afterLoad, beforeNote, afterNote, atService, beforeStore, afterStore}

// eachPair plays all pairs with a flow A. play returns whether A comes to the step.
func eachPair(kind *pairKind, a meetingFlow, play func(*meeting) bool) {
	n := 0
	for _, step := range allSteps {
		for answer := answersOK; answer <= answersNever; answer++ {
			if !kind.plays(a, step, answer) {
				continue
			}
			comes := true
			for _, b := range meetingFlows() {
				switch {
				case !comes, b.revokes, a.state != warmTenant && a.state != anyState && b.name == "last lease revoked",
					a.state == anyState && b.state == coldTenant && b.calls:
					continue
				}
				if n++; (testing.Short() || raceDetector) && n%pairsThinned != 0 {
					continue
				}
				comes = play(&meeting{kind: kind, a: a, b: b, step: step, answer: answer})
			}
		}
	}
}

// pairsThinned is how many pairs there are for each one that -short, or the race detector, plays.
const pairsThinned = 36
