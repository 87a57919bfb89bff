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
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/kaizala/kaizalatest"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// The fault matrix plays each flow of the engine with each storage fault at each of its steps, each answer of the service, each
// behaviour of the caller and each end of the process. cell.play checks what must hold in every cell.
//
// All combinations for Kaizala would be 46,504 cells, and 93 s of processor time. The matrix plays 2,800 of them, and 3,000 for OAuth,
// in 11 s. It was checked with 51 mutants of the engine, each a likely mistake: some 27 of them fail here; for 17 this was seen with
// exactly these cells. The full matrix was run, in part, with only 10 of the other mutants, so the cells that are left out may catch a
// mutant that these do not.

const (
	inWindow = 329 * 24 * time.Hour // past 90 % of a refresh token's life
	callTime = 2 * time.Second      // what each exchange takes
)

// canary is a text in the service's answers that must not appear in anything that the engine answers, logs or sends.
const canary = "CANARY-of-the-service"

// serviceAnswer is what the service does with each exchange until it heals.
type serviceAnswer struct {
	name string
	// rotates: the refresh token is past 90 % of its life.
	rotates bool
	// lost: the service has replaced the refresh token, and the answer that arrives
	// does not have the new one.
	lost   bool
	fault  kaizalatest.Fault
	until  time.Duration // the date in Retry-After is this long after the answer
	remedy string        // what the contract tells an operator to do
}

const (
	remedyConfig  = "write config"
	remedyRefresh = "refresh" // the service has refused a refresh token that is valid
)

// matrixService is the service of a cell, and its record of the engine's calls.
type matrixService interface {
	CallCount() int
	Calls() []kaizalatest.Call
	ResetCalls()
	MaxPerMinute(connectorID string) int
	Inject(kaizalatest.Fault)
	ClearFaults()
	SetOldTokenDies(bool)
	CurrentRefreshToken(user string) string
	RefreshTokenAlive(token string) bool
	AccessTokenAlive(token string) bool
	// Ended returns whether the service has ended a grant because a refresh token was used twice.
	Ended() bool
}

// matrixKind is a kind of service.
type matrixKind struct {
	name    string
	answers func(*testing.T) []serviceAnswer
	flows   []string // "" for all
	// begin starts the cell's engine and service, and returns the fields of a connector.
	begin func(*cell, *testing.T) map[string]any
	// eachRotates: every exchange replaces the refresh token, however young that is.
	eachRotates bool
	// revokes: the end of the last lease ends the access token at the service.
	revokes bool
	// waits: while there is a usable access token, the next exchange waits, because it would end that token.
	waits bool
	// reduced: storage that fails once or turns read-only, and callers who cancel early, are played with Kaizala only. The
	// engine's code there is the same for every kind of service.
	reduced bool
}

func matrixKinds() []matrixKind {
	oauth := func(class func(*oauth2test.Options), fields map[string]any) func(*cell, *testing.T) map[string]any {
		return func(c *cell, t *testing.T) map[string]any {
			e := newOAuthEngine(t, func(o *oauth2test.Options) {
				class(o)
				o.AccessTokenLife = day
			}, fields)
			c.engine, c.service = e.engine, oauthMatrix{e.server}
			c.connectorID, c.secret = e.clientID, e.secret
			c.grant = func(user string) string { return e.server.Grant(e.clientID, user) }
			config := map[string]any{"service": "oauth2", "token_url": e.server.TokenURL(), "revocation_url": e.server.RevocationURL()}
			maps.Copy(config, fields)
			return config
		}
	}
	return []matrixKind{
		{name: "Kaizala", answers: serviceAnswers, begin: func(c *cell, t *testing.T) map[string]any {
			c.engine = newConfiguredEngine(t)
			c.service, c.grant = kaizalaMatrix{c.kaizala}, c.engine.newToken
			return map[string]any{}
		}},
		{
			name: "OAuth, tokens are revoked", answers: oauthAnswers, begin: oauth(oauth2test.ClassA, classA),
			eachRotates: true, revokes: true, reduced: true,
		},
		{
			name: "OAuth, an exchange ends older tokens", answers: oauthAnswers, begin: oauth(oauth2test.ClassD, classD),
			flows:       []string{"cold read", "refresh", "revoke", "renew", "write ttl", "renew in the background"},
			eachRotates: true, waits: true, reduced: true,
		},
	}
}

// kaizalaMatrix is Kaizala, where an exchange leaves older access tokens valid.
type kaizalaMatrix struct{ *kaizalatest.Service }

func (kaizalaMatrix) Ended() bool { return false }

// oauthMatrix is an authorization server as the matrix sees it. A replaced refresh token that comes again ends the grant.
type oauthMatrix struct{ *oauth2test.Server }

func (s oauthMatrix) Calls() []kaizalatest.Call {
	var calls []kaizalatest.Call
	for _, c := range s.Server.Calls(oauth2test.EndpointToken) {
		calls = append(calls, kaizalatest.Call{Start: c.Start, User: c.User, RefreshToken: c.Token, AccessToken: c.AccessToken, Rotated: c.Rotated})
	}
	return calls
}

func (s oauthMatrix) CallCount() int { return len(s.Calls()) }

func (s oauthMatrix) AccessTokenAlive(token string) bool { return s.Alive(token) }

func (s oauthMatrix) Ended() bool { return len(s.LostGrants()) > 0 }

func (s oauthMatrix) SetOldTokenDies(dies bool) {
	s.Set(func(o *oauth2test.Options) {
		if !dies {
			o.Grace = 365 * day
		}
	})
}

func (s oauthMatrix) Inject(f kaizalatest.Fault) {
	s.Server.Inject(oauth2test.Fault{
		Times: f.Times, Delay: f.Delay, Hang: f.Hang, Hold: f.Hold, Process: f.Process, Reset: f.Reset,
		Answer: oauth2test.Answer{Status: f.Status, Header: f.Header, Body: f.Body},
	})
}

func oauthAnswers(*testing.T) []serviceAnswer {
	refusal := func(status int, code string) kaizalatest.Fault {
		return kaizalatest.Fault{
			Status: status, Header: http.Header{"Content-Type": {"application/json"}},
			Body: fmt.Sprintf(`{"error": %q, "error_description": %q}`, code, canary),
		}
	}
	return []serviceAnswer{
		{name: "rotated", rotates: true},
		{name: "429 with a date", rotates: true, fault: kaizalatest.Fault{Status: 429}, until: 30 * time.Second},
		{name: "invalid_grant", rotates: true, fault: refusal(400, "invalid_grant"), remedy: remedyRefresh},
		{name: "invalid_client", rotates: true, fault: refusal(401, "invalid_client"), remedy: remedyConfig},
		{name: "500", rotates: true, fault: kaizalatest.Fault{Status: 500, Body: canary}},
		{name: "hang", rotates: true, fault: kaizalatest.Fault{Hang: true}},
		{name: "reset, processed", rotates: true, lost: true, fault: kaizalatest.Fault{Reset: true, Process: true}},
	}
}

func serviceAnswers(t *testing.T) []serviceAnswer {
	refusal := func(status int, message, code string) kaizalatest.Fault {
		return kaizalatest.Fault{Status: status, Body: fmt.Sprintf(
			`{"message": %q, "errorCode": %q, "errorCategoryKey": "AuthException", "detail": %q}`, message, code, canary)}
	}
	const wrongConnector = "Dont have correct applicationId and secret in header!"
	refreshTokenEnds := rotatedAnswerLength(t) - len(`,"scope":"token.write"}`)
	return []serviceAnswer{
		{name: "ok"},
		{name: "rotated", rotates: true},
		{name: "429 with a date", rotates: true, fault: kaizalatest.Fault{Status: 429}, until: 30 * time.Second},
		{name: "401 InvalidToken", fault: refusal(401, canary, "InvalidToken"), remedy: remedyRefresh},
		{name: "401 wrong connector", rotates: true, fault: refusal(401, wrongConnector, "Unauthenticated"), remedy: remedyConfig},
		{name: "500", rotates: true, fault: kaizalatest.Fault{Status: 500, Body: canary}},
		{name: "hang", rotates: true, fault: kaizalatest.Fault{Hang: true}},
		{name: "reset, processed", rotates: true, lost: true, fault: kaizalatest.Fault{Reset: true, Process: true}},
		{name: "cut behind the refresh token", rotates: true, fault: kaizalatest.Fault{Truncate: true, TruncateAt: refreshTokenEnds}},
	}
}

// rotatedAnswerLength is how long an answer with a new refresh token is; all of
// the emulator's tokens are of one length.
func rotatedAnswerLength(t *testing.T) (length int) {
	synctest.Test(t, func(t *testing.T) {
		s := kaizalatest.New()
		id, secret := s.RegisterConnector()
		token := s.GenerateUserToken(id, "acme")
		time.Sleep(inWindow)
		req, err := http.NewRequest(http.MethodGet, "https://api.kaiza.la/v1/accessToken", nil)
		require.NoError(t, err)
		req.Header.Set("applicationId", id)
		req.Header.Set("applicationSecret", secret)
		req.Header.Set("refreshToken", token)
		resp, err := s.Transport().RoundTrip(req)
		require.NoError(t, err)
		require.NoError(t, resp.Body.Close())
		require.True(t, s.Calls()[0].Rotated)
		length = int(resp.ContentLength)
	})
	return length
}

// flow is one thing that the engine does: a request, or work in the background.
type flow struct {
	name string
	// calls: the flow itself calls the service; otherwise only later exchanges do.
	calls bool
	// unasked: no caller waits for the flow, so there is no caller to cancel it.
	unasked bool
	prepare func(*cell)
	run     func(*cell, context.Context)
	// ended checks the effect of the flow after storage and service work again, and
	// repeats a request that failed.
	ended func(*cell)
}

func flows() []flow {
	oldTenant := func(c *cell) {
		token := c.newToken("acme")
		c.age(inWindow)
		c.write("tenants/acme", map[string]any{"refresh_token": token, "verify": false})
	}
	oldToken := func(c *cell) {
		c.operators = c.newToken("operator")
		c.age(inWindow)
	}
	writeToken := func(verify bool) func(*cell, context.Context) {
		return func(c *cell, ctx context.Context) {
			c.request(ctx, logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": c.operators, "verify": verify})
		}
	}
	readCreds := func(c *cell, ctx context.Context) { c.request(ctx, logical.ReadOperation, "creds/acme", nil) }
	leased := func(c *cell) {
		token := c.newToken("acme")
		c.age(inWindow - 13*time.Hour)
		c.write("tenants/acme", map[string]any{"refresh_token": token, "verify": false, "ttl": "20h"})
		c.lease = c.engine.lease("acme")
		time.Sleep(2 * time.Hour) // the window has begun, and the renewer is not due yet
	}
	written := func(c *cell) {
		if c.stored("acme") == nil {
			c.assertf(!c.succeeded, "the write succeeded, and nothing is stored")
		}
		if c.succeeded {
			c.assertf(c.stored("acme").RefreshToken == c.operators || c.service.CurrentRefreshToken("operator") == c.stored("acme").RefreshToken,
				"the operator's refresh token, or its successor, is stored")
		}
	}
	return []flow{
		{name: "create verified", calls: true, prepare: oldToken, run: writeToken(true), ended: written},
		{name: "create unverified", prepare: oldToken, run: writeToken(false), ended: written},
		{name: "rewrite", calls: true, prepare: func(c *cell) {
			oldToken(c)
			c.write("tenants/acme", map[string]any{"refresh_token": c.newToken("acme"), "verify": false})
			c.read("creds/acme")
		}, run: writeToken(true), ended: written},
		{name: "write ttl", prepare: oldTenant, run: func(c *cell, ctx context.Context) {
			c.request(ctx, logical.UpdateOperation, "tenants/acme", map[string]any{"ttl": "1h"})
		}, ended: func(c *cell) {
			if c.succeeded {
				c.assertf(c.stored("acme").TTL == time.Hour, "the ttl is lost")
			}
		}},
		{name: "cold read", calls: true, prepare: func(c *cell) {
			oldTenant(c)
			c.restart()
			synctest.Wait()
		}, run: readCreds},
		{name: "rotating read", calls: true, prepare: oldTenant, run: readCreds},
		{name: "refresh", calls: true, prepare: leased, run: func(c *cell, ctx context.Context) {
			c.request(ctx, logical.UpdateOperation, "tenants/acme/refresh", nil)
		}, ended: func(c *cell) {
			if c.succeeded {
				c.assertf(c.read("token/acme")["access_token"] != accessTokenOf(c.lease), "the retired access token came back")
			}
		}},
		{name: "revoke", prepare: leased, run: func(c *cell, ctx context.Context) {
			c.leaseRequest(ctx, logical.RevokeOperation)
			if c.steps.isDead() {
				return
			}
			// Memory gives the token up, also if storage fails.
			resp, err := c.do(context.Background(), logical.ReadOperation, "token/acme", nil)
			c.assertf(err != nil || resp.IsError() || accessTokenOf(resp) != accessTokenOf(c.lease) || !c.loaded(), "a token that was given up is handed out")
		}, ended: func(c *cell) {
			if !c.succeeded {
				c.leaseRequest(context.Background(), logical.RevokeOperation) // as Vault does
				c.assertf(c.succeeded, "the lease cannot be revoked: %s", c.text)
			} else if c.steps.fault == storageTurnsReadOnly && c.crashed {
				return // memory alone knew that the token was given up, and the process has died
			}
			c.assertf(c.read("token/acme")["access_token"] != accessTokenOf(c.lease), "a revoked token is handed out")
			if c.kind.revokes {
				c.pass(2 * time.Minute)
				c.assertf(!c.service.AccessTokenAlive(accessTokenOf(c.lease)), "a revoked token lives on at the service")
			}
			c.crash()
			c.assertf(c.read("token/acme")["access_token"] != accessTokenOf(c.lease), "a revoked token came back with a restart")
		}},
		{name: "renew", prepare: leased, run: func(c *cell, ctx context.Context) {
			c.leaseRequest(ctx, logical.RenewOperation)
		}},
		{name: "delete", prepare: oldTenant, run: func(c *cell, ctx context.Context) {
			c.request(ctx, logical.DeleteOperation, "tenants/acme", nil)
		}, ended: func(c *cell) {
			if !c.succeeded {
				c.request(context.Background(), logical.DeleteOperation, "tenants/acme", nil)
				c.assertf(c.succeeded, "the tenant cannot be deleted: %s", c.text)
			}
			c.assertf(c.stored("acme") == nil, "a deleted tenant came back")
			calls := c.service.CallCount()
			_, status, _ := c.try(logical.ReadOperation, "creds/acme", nil)
			c.assertf(status == 400, "a deleted tenant is read: %d", status)
			c.pass(2 * time.Minute)
			c.assertf(c.stored("acme") == nil && c.service.CallCount() == calls, "a deleted tenant lives on")
		}},
		{name: "write config", prepare: oldTenant, run: func(c *cell, ctx context.Context) {
			c.request(ctx, logical.UpdateOperation, "config", map[string]any{"request_timeout": "50s"})
		}, ended: func(c *cell) {
			if c.succeeded {
				c.assertf(c.read("config")["request_timeout"] == int64(50), "the write is lost")
			}
		}},
		{name: "delete config", prepare: func(c *cell) {
			oldTenant(c)
			c.write("config/spare", c.connectorFields())
		}, run: func(c *cell, ctx context.Context) {
			c.request(ctx, logical.DeleteOperation, "config/spare", nil)
		}, ended: func(c *cell) {
			if !c.succeeded {
				c.request(context.Background(), logical.DeleteOperation, "config/spare", nil)
				c.assertf(c.succeeded, "the connector cannot be deleted: %s", c.text)
			}
			_, status, _ := c.try(logical.ReadOperation, "config/spare", nil)
			c.assertf(status == 404, "a deleted connector came back")
		}},
		{name: "change connector", calls: true, prepare: func(c *cell) {
			oldTenant(c)
			c.write("config/other", c.connectorFields())
		}, run: func(c *cell, ctx context.Context) {
			c.request(ctx, logical.UpdateOperation, "tenants/acme", map[string]any{"connector": "other"})
		}, ended: func(c *cell) {
			if c.succeeded {
				c.assertf(c.stored("acme").Connector == "other", "the write is lost")
			}
		}},
		{name: "start", unasked: true, prepare: func(c *cell) {
			oldTenant(c)
			c.stop()
		}, run: func(c *cell, _ context.Context) {
			c.start()
			synctest.Wait()
		}},
		{name: "renew in the background", calls: true, unasked: true, prepare: func(c *cell) {
			oldTenant(c)
			if !c.answer.rotates || c.kind.eachRotates {
				c.read("creds/acme")
				time.Sleep(22*time.Hour + 30*time.Minute)
			}
		}, run: func(c *cell, _ context.Context) {
			if c.answer.rotates && !c.kind.eachRotates {
				time.Sleep(time.Second)
			} else {
				time.Sleep(55 * time.Minute)
			}
		}},
	}
}

type caller int

const (
	callerWaits       caller = iota
	callerCancels            // before the service answers the first call, or at the first step of a flow without a call
	callerCancelsLate        // after the service has carried out the first call, and before its answer arrives
)

func (c caller) String() string {
	return [...]string{"waits", "cancels", "cancels as the answer is on its way"}[c]
}

// answers returns whether the service carries an exchange out and answers it.
func (a serviceAnswer) answers() bool {
	f := a.fault
	return !f.Hang && !f.Reset && (f.Status == 0 || f.Process)
}

type storageFault int

const (
	storageWorks storageFault = iota
	storageFailsOnce
	storageFailsLong
	storageLies          // it takes the write and reports an error
	storageTurnsReadOnly // as on a node that is no longer the leader
)

func (f storageFault) String() string {
	return [...]string{"works", "fails once", "fails for long", "writes and reports failure", "turns read-only"}[f]
}

var errTold = errors.New("storage fails, as told")

// steps counts the storage operations of a cell, and makes one of them fail, or
// the process die at it.
type steps struct {
	fault   storageFault
	at      int    // the number of the operation that fails first, from 1
	dies    int    // the process dies after this operation, and the next one goes on counting; 0: it lives
	onFirst func() // called when the first operation begins

	flow    int // the number of operations of the flow itself
	next    int // the number of operations of the flow and of the next process
	mu      sync.Mutex
	ops     []string
	dead    bool
	written time.Time // the time of the first write
}

func (s *steps) around(op, key string, do func() error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.dead {
		return errTold
	}
	s.ops = append(s.ops, op)
	step := len(s.ops)
	if step == 1 && s.onFirst != nil {
		s.onFirst()
	}
	s.dead = step == s.dies
	writes := isWrite(op)
	switch {
	case s.fault == storageFailsOnce && step == s.at, s.fault == storageFailsLong && step >= s.at:
		return errTold
	case s.fault == storageTurnsReadOnly && step >= s.at && writes:
		return logical.ErrReadOnly
	}
	err := do()
	if writes && err == nil && s.written.IsZero() {
		s.written = time.Now()
	}
	if s.fault == storageLies && step == s.at {
		return errTold
	}
	return err
}

func (s *steps) isDead() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.dead
}

func (s *steps) revive() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.dead = false
}

func (s *steps) seen() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.ops...)
}

// cell is one cell of the matrix.
type cell struct {
	*engine
	kind     matrixKind
	service  matrixService
	config   map[string]any // a connector's fields without its ID and secret
	grant    func(user string) (refreshToken string)
	flow     flow
	answer   serviceAnswer
	oldLives bool
	caller   caller
	steps    *steps

	operators string // the refresh token that the flow's operator writes
	lease     *logical.Response

	succeeded bool     // whether the last answer of the flow was a success
	text      string   // the error of the flow's last answer
	said      []string // all texts and warnings of answers
	crashed   bool
	calls     int // the number of calls that the service got before the crash
	failed    bool
	loss      bool // the refresh token was lost, and the engine could not have kept it
}

func (c *cell) String() string {
	old, process, at := "dies", "lives", ""
	if c.oldLives {
		old = "lives on"
	}
	if c.steps.dies > 0 {
		process = fmt.Sprintf("dies after step %d", c.steps.dies)
	}
	if c.steps.fault != storageWorks {
		at = fmt.Sprintf(" at step %d", c.steps.at)
	}
	return fmt.Sprintf("%s: %s | service: %s | storage %s%s | caller %s | process %s | old refresh token %s", c.kind.name, c.flow.name, c.answer.name, c.steps.fault, at, c.caller, process, old)
}

func (c *cell) assertf(ok bool, format string, args ...any) {
	c.t.Helper()
	if !ok {
		c.failed = true
		c.t.Errorf("%s\n    steps %s\n    %s", c, c.steps.seen(), fmt.Sprintf(format, args...))
	}
}

// age lets time pass in the cells with an old refresh token.
func (c *cell) age(d time.Duration) {
	if c.answer.rotates && !c.kind.eachRotates {
		time.Sleep(d)
	}
}

func (c *cell) newToken(user string) string { return c.grant(user) }

func (c *cell) connectorFields() map[string]any {
	fields := maps.Clone(c.config)
	fields["connector_id"], fields["connector_secret"] = c.connectorID, c.secret
	return fields
}

func (c *cell) loaded() bool {
	_, s := c.tenants.cached("acme")
	return s != nil
}

// hear records an answer, unless the process that gave it is dead.
func (c *cell) hear(resp *logical.Response, status int, text string) {
	if c.steps.isDead() && !c.crashed {
		return
	}
	c.succeeded, c.text = status < 300, text
	c.said = append(c.said, text)
	if resp != nil {
		c.said = append(c.said, resp.Warnings...)
	}
}

// request is the flow's own request.
func (c *cell) request(ctx context.Context, op logical.Operation, path string, data map[string]any) {
	begun := time.Now()
	resp, status, text := c.tryContext(ctx, op, path, data)
	c.hear(resp, status, text)
	c.assertf(time.Since(begun) <= 10*time.Second, "an answer took %s", time.Since(begun))
	if !c.steps.isDead() { // the answer of a dead process does not reach the caller
		c.checkDurable(resp, status)
	}
}

// readMeanwhile reads the tenant while storage or the service still fails.
func (c *cell) readMeanwhile() {
	resp, status, text := c.try(logical.ReadOperation, "token/acme", nil)
	c.said = append(c.said, text)
	c.checkDurable(resp, status)
}

func (c *cell) checkDurable(resp *logical.Response, status int) {
	// A reader gets an access token only after the refresh token that came with it
	// has been stored.
	if status == 200 && resp.Data["access_token"] != nil {
		// After a lost answer the engine cannot know whether the service has ended the older access token.
		unknowable := c.service.Ended() || c.kind.waits && c.answer.lost
		c.assertf(unknowable || c.service.AccessTokenAlive(accessTokenOf(resp)), "a dead access token was handed out")
		entry := c.stored("acme")
		for _, call := range c.service.Calls() {
			if call.Rotated && call.AccessToken == accessTokenOf(resp) {
				c.assertf(entry != nil && call.RefreshToken != entry.RefreshToken,
					"an access token was handed out before its refresh token was stored")
			}
		}
	}
}

func (c *cell) leaseRequest(ctx context.Context, op logical.Operation) {
	secret := *c.lease.Secret
	resp, err := c.HandleRequest(ctx, &logical.Request{Operation: op, Secret: &secret, Storage: c.storage})
	status, text := statusOf(op, resp, err)
	c.hear(resp, status, text)
}

// rotations are the exchanges in which the service replaced a refresh token.
func (c *cell) rotations() (rotated []kaizalatest.Call) {
	for _, call := range c.service.Calls() {
		if call.Rotated {
			rotated = append(rotated, call)
		}
	}
	return rotated
}

// isLost returns whether the engine can use neither a refresh token nor its
// successor any more.
func (c *cell) isLost(token string) bool {
	if token == "" || c.service.RefreshTokenAlive(token) {
		return false
	}
	held := c.held("acme")
	for _, call := range c.service.Calls() {
		if call.RefreshToken == token && held == c.service.CurrentRefreshToken(call.User) {
			return !c.service.RefreshTokenAlive(held)
		}
	}
	return true
}

// play plays the cell, and checks what must hold.
func (c *cell) play(t *testing.T) {
	c.config = c.kind.begin(c, t)
	c.service.SetOldTokenDies(!c.oldLives)
	c.flow.prepare(c)
	c.service.ResetCalls()

	fault := c.answer.fault
	fault.Delay = callTime
	if c.answer.until > 0 {
		fault.Header = http.Header{"Retry-After": {time.Now().UTC().Add(callTime + c.answer.until).Format(http.TimeFormat)}}
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	switch {
	case c.caller == callerCancelsLate:
		held := fault
		held.Hold, held.Times = true, 1
		c.service.Inject(held)
		time.AfterFunc(callTime*3/2, cancel)
		time.AfterFunc(callTime*2, func() {
			c.service.ClearFaults()
			c.service.Inject(fault)
		})
	case c.caller == callerCancels && c.flow.calls:
		time.AfterFunc(callTime/2, cancel)
	case c.caller == callerCancels:
		c.steps.onFirst = cancel
	}
	c.service.Inject(fault)
	c.storage.surround(c.steps.around)
	c.flow.run(c, ctx)
	c.quiet("acme")
	c.steps.flow = len(c.steps.seen())
	succeeded := c.succeeded

	// In the rotation window the engine calls the service only after a write to storage has succeeded.
	rotated := c.rotations()
	if len(rotated) > 0 {
		c.assertf(!c.steps.written.IsZero() && !c.steps.written.After(rotated[0].Start), "the service was asked for a new refresh token before storage was known to take it")
	}
	if c.steps.dies == 0 {
		c.readMeanwhile()
	} else {
		c.calls = c.service.CallCount()
		c.steps.revive()
		c.crashOnto(&storage{InmemStorage: c.storage.InmemStorage, around: c.steps.around})
		c.crashed = true
	}
	c.pass(2 * time.Minute)
	c.steps.next = len(c.steps.seen())
	c.readMeanwhile()
	for i, call := range c.service.Calls() {
		if call.Rotated && i >= c.calls && !c.answer.lost && !(c.flow.name == "delete" && c.succeeded) {
			c.assertf(c.held("acme") == c.service.CurrentRefreshToken(call.User), "a refresh token that was delivered is lost, though the process lives")
		}
	}

	c.storage.heal()
	c.service.ClearFaults()
	c.pass(3 * time.Minute)
	deleted := c.flow.name == "delete" && c.stored("acme") == nil
	exists := c.stored("acme") != nil
	// If storage has taken an operator's write and reported an error, the engine
	// goes on with the refresh token before: the operator was told to write again.
	unknowing := exists && c.steps.fault == storageLies && c.stored("acme").RefreshToken == c.operators
	c.assertf(deleted || unknowing || !exists && c.held("acme") == "" || exists && c.stored("acme").RefreshToken == c.held("acme"), "a refresh token is in memory alone, though storage works")
	switch {
	case c.answer.remedy == remedyConfig:
		c.write("config", map[string]any{"connector_secret": c.secret})
		if c.flow.name == "change connector" {
			c.write("config/other", map[string]any{"connector_secret": c.secret})
		}
	case c.answer.remedy == remedyRefresh && exists && c.engine.status("acme") == statusRejected:
		c.hear(c.try(logical.UpdateOperation, "tenants/acme/refresh", nil))
		c.assertf(c.succeeded, "a refresh by hand does not help: %s", c.text)
	}

	for _, token := range []string{c.held("acme"), c.operators} {
		if deleted || !c.isLost(token) {
			continue
		}
		c.loss = true
		c.assertf(!c.oldLives && (c.answer.lost || c.crashed && len(rotated) > 0), "a refresh token is lost without need")
		if token == c.held("acme") {
			resp, status, text := c.try(logical.ReadOperation, "creds/acme", nil)
			c.hear(resp, status, text)
			if status == 200 {
				text = strings.Join(resp.Warnings, " ") // the older access token is still valid
			}
			c.assertf(strings.Contains(text, "write it to tenants/acme"), "the answer does not say what to do: %d %s", status, text)
			c.assertf(c.engine.status("acme") == statusRejected, "the tenant is %s", c.engine.status("acme"))
		}
	}
	if c.loss || !exists && c.operators != "" {
		if c.loss {
			c.operators = c.newToken("operator")
		}
		c.request(context.Background(), logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": c.operators})
		c.assertf(c.succeeded, "the operator cannot write: %s", c.text)
	}
	if c.flow.ended != nil {
		c.succeeded = succeeded
		c.flow.ended(c)
	}
	if c.flow.name != "delete" {
		c.request(context.Background(), logical.ReadOperation, "creds/acme", nil)
		c.assertf(c.succeeded, "the tenant cannot be read: %s", c.text)
		c.pass(2 * time.Minute)
		if c.kind.waits && c.engine.status("acme") == statusDegraded {
			// Until the planned time the engine makes no exchange by itself, because it would end an access token in use.
			c.request(context.Background(), logical.UpdateOperation, "tenants/acme/refresh", nil)
		}
		c.assertf(c.engine.status("acme") == statusOK, "the tenant is %s", c.engine.status("acme"))
	}
	most := 15
	if c.kind.eachRotates {
		most = 30 // after a lost answer the engine makes a second exchange at once
	}
	c.assertf(c.service.MaxPerMinute(c.connectorID) <= most, "%d calls in a minute", c.service.MaxPerMinute(c.connectorID))
	c.checkSecrets()
}

func (c *cell) list() *logical.Response {
	resp, err := c.do(context.Background(), logical.ListOperation, "tenants", nil)
	require.NoError(c.t, err)
	return resp
}

// checkSecrets looks for secrets in the log, the answers, the status and the events.
func (c *cell) checkSecrets() {
	secrets := []string{canary, c.secret, c.operators, c.held("acme")}
	for _, call := range c.service.Calls() {
		secrets = append(secrets, call.RefreshToken, c.service.CurrentRefreshToken(call.User))
	}
	if entry := c.stored("acme"); entry != nil && entry.Access != nil {
		secrets = append(secrets, entry.Access.Token)
	}
	status, err := json.Marshal([]any{
		c.list(),
		c.ok(logical.ReadOperation, "config", nil),
	})
	require.NoError(c.t, err)
	if c.stored("acme") != nil {
		one, err := json.Marshal(c.ok(logical.ReadOperation, "tenants/acme", nil))
		require.NoError(c.t, err)
		status = append(status, one...)
	}
	everything := strings.Join(append(append(c.said, c.events.all()...), c.log.String(), string(status)), "\n")
	for _, secret := range secrets {
		c.assertf(secret == "" || !strings.Contains(everything, secret), "a secret is in a log, an answer, a status or an event")
	}
}

// thinned is how many cells there are for each one that -short, or the race detector, plays. The race detector makes a cell ten
// times as slow, and what it finds, it finds in many cells.
const thinned = 36

// mostSteps is the number of steps of a flow at which storage fails or the process dies: later steps only repeat these.
const mostSteps = 12

func TestFaultMatrix(t *testing.T) {
	t.Parallel()
	var cells, losses, failures atomic.Int64
	t.Run("flows", func(t *testing.T) {
		for _, kind := range matrixKinds() {
			answers := kind.answers(t)
			for _, f := range flows() {
				if kind.flows != nil && !slices.Contains(kind.flows, f.name) {
					continue
				}
				t.Run(kind.name+"/"+f.name, func(t *testing.T) {
					t.Parallel()
					eachCell(kind, f, answers, func(c *cell) {
						if failures.Load() >= 10 {
							t.FailNow() // ten failures are enough to find the cause
						}
						synctest.Test(t, c.play)
						cells.Add(1)
						if c.loss {
							losses.Add(1)
						}
						if c.failed || t.Failed() {
							failures.Add(1)
						}
					})
				})
			}
		}
	})
	t.Logf("%d cells; in %d of them a refresh token was lost that the engine could not have kept: the service had ended it, and the new one never arrived or was not stored when the process died", cells.Load(), losses.Load())
}

// eachCell plays the cells of a flow. A first run, in which storage works, shows the steps at which storage can fail and the process
// can die. The combinations that are left out caught no mutant of the engine that the other cells do not catch.
func eachCell(kind matrixKind, f flow, answers []serviceAnswer, play func(*cell)) {
	n := 0
	for _, a := range answers {
		for _, oldLives := range []bool{false, true} {
			for _, caller := range []caller{callerWaits, callerCancels, callerCancelsLate} {
				if oldLives && !a.lost || caller != callerWaits && f.unasked || caller == callerCancelsLate && !(f.calls && a.answers()) {
					continue
				}
				if kind.reduced && caller == callerCancels {
					continue
				}
				with := func(s *steps) *steps {
					if n++; s.fault == storageWorks && s.dies == 0 || !raceDetector && !testing.Short() || n%thinned == 0 {
						play(&cell{kind: kind, flow: f, answer: a, oldLives: oldLives, caller: caller, steps: s})
					}
					return s
				}
				clean := with(&steps{})
				if oldLives {
					continue
				}
				for i, op := range clean.ops[:min(clean.flow, mostSteps)] {
					at, writes, waits := i+1, isWrite(op), caller == callerWaits
					with(&steps{fault: storageFailsLong, at: at})
					if writes {
						with(&steps{fault: storageLies, at: at})
					}
					if waits && !kind.reduced {
						with(&steps{fault: storageFailsOnce, at: at})
					}
					if waits && writes && !kind.reduced {
						with(&steps{fault: storageTurnsReadOnly, at: at})
					}
					if !waits {
						continue
					}
					with(&steps{dies: at})
					if writes {
						with(&steps{fault: storageLies, at: at, dies: at})
						with(&steps{fault: storageFailsLong, at: at + 1, dies: at})
					}
				}
			}
		}
	}
}

func isWrite(op string) bool { return op == "put" || op == "delete" }
