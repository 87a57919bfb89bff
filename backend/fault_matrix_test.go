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

// The fault matrix: each flow, with each way for storage to fail at each of its
// steps, for the service to answer, for the caller to behave and for the process
// to end. What must hold in every cell stands in cell.play.
//
// Of 46,504 cells for Kaizala, in 93 s of processor time, 2,800 are left, and 3,000 are OAuth's: 11 s. 51 changes of the
// engine that somebody could make by mistake were tried on what is left: some 27 turn it red, 17 of them seen on today's
// cells. The matrix of before was tried on 10 of the others only, in part, so a change that it alone caught is not ruled out.

const (
	inWindow = 329 * 24 * time.Hour // past 90 % of a refresh token's life
	callTime = 2 * time.Second      // what each exchange takes
)

// canary is in what the service says, and must be in nothing that the engine says.
const canary = "CANARY-of-the-service"

// serviceAnswer is what the service does with each exchange until it heals.
type serviceAnswer struct {
	name string
	// rotates: the refresh token is past 90 % of its life.
	rotates bool
	// lost: the service has replaced the refresh token, and what arrives does not
	// hold the new one.
	lost   bool
	fault  kaizalatest.Fault
	until  time.Duration // a Retry-After with a date so far ahead
	remedy string        // what the contract asks an operator for
}

const (
	remedyConfig  = "write config"
	remedyRefresh = "refresh" // where the service was wrong to refuse the refresh token
)

// matrixService is the service of a cell, and what it knows of the engine's calls.
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
	// Ended says whether a refresh token that came twice has ended everything that a consent gave.
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
	// waits: a usable access token puts the next exchange off, because that would end it.
	waits bool
	// reduced: storage that fails once or turns read-only, and callers who leave at once, are left to Kaizala's cells. The
	// engine does not ask which kind of service it has.
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

// kaizalaMatrix is Kaizala, which lets access tokens live on.
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

// flow is something that the engine does.
type flow struct {
	name string
	// calls: it asks the service, and not just the exchanges that come after it.
	calls bool
	// unasked: nobody waits for it, so nobody can go away.
	unasked bool
	prepare func(*cell)
	run     func(*cell, context.Context)
	// ended checks, once all has healed, what the flow was to bring about, and
	// tries again where it was told to.
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
			// In memory the token is given up whatever becomes of storage.
			resp, err := c.do(context.Background(), logical.ReadOperation, "token/acme", nil)
			c.assertf(err != nil || resp.IsError() || accessTokenOf(resp) != accessTokenOf(c.lease) || !c.loaded(), "a token that was given up is handed out")
		}, ended: func(c *cell) {
			if !c.succeeded {
				c.leaseRequest(context.Background(), logical.RevokeOperation) // as Vault does
				c.assertf(c.succeeded, "the lease cannot be revoked: %s", c.text)
			} else if c.steps.fault == storageTurnsReadOnly && c.crashed {
				return // it had to succeed, and nobody was left to know of it
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
	callerCancels            // while the first call is on its way to the service, or at the first step
	callerCancelsLate        // while the first call's answer is on its way back
)

func (c caller) String() string {
	return [...]string{"waits", "cancels", "cancels as the answer is on its way"}[c]
}

// answers says whether the service carries an exchange out and answers it.
func (a serviceAnswer) answers() bool {
	f := a.fault
	return !f.Hang && !f.Reset && (f.Status == 0 || f.Process)
}

type storageFault int

const (
	storageWorks storageFault = iota
	storageFailsOnce
	storageFailsLong
	storageLies          // it is written, and the engine is told otherwise
	storageTurnsReadOnly // as when the node has just lost its leadership
)

func (f storageFault) String() string {
	return [...]string{"works", "fails once", "fails for long", "writes and reports failure", "turns read-only"}[f]
}

var errTold = errors.New("storage fails, as told")

// steps counts the storage operations of a cell, and makes happen what is to
// happen at one of them.
type steps struct {
	fault   storageFault
	at      int
	dies    int    // the process dies after this one, and the next goes on counting; 0: it lives
	onFirst func() // called as the first begins

	flow    int // how many there were in the flow itself
	next    int // and with what the next process did
	mu      sync.Mutex
	ops     []string
	dead    bool
	written time.Time // when something was written first
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
	config   map[string]any // a connector's fields, but for its ID and secret
	grant    func(user string) (refreshToken string)
	flow     flow
	answer   serviceAnswer
	oldLives bool
	caller   caller
	steps    *steps

	operators string // the refresh token that the flow's operator writes
	lease     *logical.Response

	succeeded bool // the flow's last answer
	text      string
	said      []string // all that was said to callers
	crashed   bool
	calls     int // that the service saw before the crash
	failed    bool
	loss      bool // one that nobody could have prevented
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

// age lets time pass where the cell is about an old refresh token.
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

// hear takes in an answer, unless it comes from a dead process.
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
	if !c.steps.isDead() { // nobody hears a dead process
		c.checkDurable(resp, status)
	}
}

// readMeanwhile is a reader who comes while not all is well.
func (c *cell) readMeanwhile() {
	resp, status, text := c.try(logical.ReadOperation, "token/acme", nil)
	c.said = append(c.said, text)
	c.checkDurable(resp, status)
}

func (c *cell) checkDurable(resp *logical.Response, status int) {
	// Durable first: whoever sees an access token, sees it after the refresh token
	// that came with it was stored.
	if status == 200 && resp.Data["access_token"] != nil {
		// After a lost answer nobody knows whether the service has ended the older one.
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

// rotations are the exchanges by which the service replaced a refresh token.
func (c *cell) rotations() (rotated []kaizalatest.Call) {
	for _, call := range c.service.Calls() {
		if call.Rotated {
			rotated = append(rotated, call)
		}
	}
	return rotated
}

// isLost says whether neither a refresh token nor what the service has replaced
// it with can be used any more.
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

// play plays the cell, and says what must hold.
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

	// In the rotation window storage is known to be writable before the call.
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
	// Where storage has taken an operator's write and said that it has not, the
	// engine goes on with what it had: the operator was told to write again.
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
				text = strings.Join(resp.Warnings, " ") // an access token from before is still good
			}
			c.assertf(strings.Contains(text, "write it to tenants/acme"), "nobody is told what to do: %d %s", status, text)
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
			// An access token that an exchange would end is left to its readers until its planned time.
			c.request(context.Background(), logical.UpdateOperation, "tenants/acme/refresh", nil)
		}
		c.assertf(c.engine.status("acme") == statusOK, "the tenant is %s", c.engine.status("acme"))
	}
	most := 15
	if c.kind.eachRotates {
		most = 30 // an exchange whose answer was lost is made once more at once
	}
	c.assertf(c.service.MaxPerMinute(c.connectorID) <= most, "%d calls in a minute", c.service.MaxPerMinute(c.connectorID))
	c.checkSecrets()
}

func (c *cell) list() *logical.Response {
	resp, err := c.do(context.Background(), logical.ListOperation, "tenants", nil)
	require.NoError(c.t, err)
	return resp
}

// checkSecrets looks for secrets where none may be.
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

// Without the race detector each cell is played, with it and with -short one in thinned: the race detector makes a cell ten
// times as slow, and finds its races in many cells or in none.
const thinned = 36

// mostSteps is how many steps of a flow fail or are the last: those behind them are tries of the same again.
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
							t.FailNow() // enough is known
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
	t.Logf("%d cells; in %d of them a refresh token was lost that nobody could have kept: the service had killed it, and the new one never arrived or had not reached storage when the process died", cells.Load(), losses.Load())
}

// eachCell plays all cells of a flow. Which steps there are is seen where storage works, for each step at which the process
// may die. What is left out caught no mutant of the engine that the other cells do not catch.
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
