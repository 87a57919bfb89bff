package backend

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/kaizala/kaizalatest"
)

// The fault matrix: each flow, with each way for storage to fail at each of its
// steps, for the service to answer, for the caller to behave and for the process
// to end. What must hold in every cell stands in cell.play.

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

func serviceAnswers(t *testing.T) []serviceAnswer {
	refusal := func(status int, message, code string) kaizalatest.Fault {
		return kaizalatest.Fault{Status: status, Body: fmt.Sprintf(
			`{"message": %q, "errorCode": %q, "errorCategoryKey": "AuthException", "detail": %q}`, message, code, canary)}
	}
	const wrongConnector = "Dont have correct applicationId and secret in header!"
	html := "<html><body>" + canary + "</body></html>"
	refreshTokenEnds := rotatedAnswerLength(t) - len(`,"scope":"token.write"}`)
	return []serviceAnswer{
		{name: "ok"},
		{name: "rotated", rotates: true},
		{name: "429 with seconds", fault: kaizalatest.Fault{Status: 429, Header: http.Header{"Retry-After": {"30"}}}},
		{name: "429 with a date", rotates: true, fault: kaizalatest.Fault{Status: 429}, until: 30 * time.Second},
		{name: "429 alone", rotates: true, fault: kaizalatest.Fault{Status: 429, Body: html}},
		{name: "400 InvalidToken", rotates: true, fault: refusal(400, canary, "InvalidToken"), remedy: remedyRefresh},
		{name: "401 InvalidToken", fault: refusal(401, canary, "InvalidToken"), remedy: remedyRefresh},
		{name: "403 InvalidToken", rotates: true, fault: refusal(403, canary, "InvalidToken"), remedy: remedyRefresh},
		{name: "401 wrong connector", rotates: true, fault: refusal(401, wrongConnector, "Unauthenticated"), remedy: remedyConfig},
		{name: "403 Unauthenticated", rotates: true, fault: refusal(403, canary, "Unauthenticated")},
		{name: "500", rotates: true, fault: kaizalatest.Fault{Status: 500, Body: canary}},
		{name: "503 HTML", fault: kaizalatest.Fault{Status: 503, Body: html}},
		{name: "hang", rotates: true, fault: kaizalatest.Fault{Hang: true}},
		{name: "hang, processed", rotates: true, lost: true, fault: kaizalatest.Fault{Hang: true, Process: true}},
		{name: "reset, processed", rotates: true, lost: true, fault: kaizalatest.Fault{Reset: true, Process: true}},
		{name: "cut behind the refresh token", rotates: true, fault: kaizalatest.Fault{Truncate: true, TruncateAt: refreshTokenEnds}},
		{name: "cut within the refresh token", rotates: true, lost: true, fault: kaizalatest.Fault{Truncate: true, TruncateAt: refreshTokenEnds - 10}},
		{name: "junk, processed", rotates: true, lost: true, fault: kaizalatest.Fault{Process: true, Status: 200, Body: canary + ` {"accessToken": `}},
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
		c.age(2 * time.Hour) // the window has begun, and the renewer is not due yet
	}
	written := func(c *cell) {
		if c.stored("acme") == nil {
			c.assertf(!c.succeeded, "the write succeeded, and nothing is stored")
		}
		if c.succeeded {
			c.assertf(c.stored("acme").RefreshToken == c.operators || c.kaizala.CurrentRefreshToken("operator") == c.stored("acme").RefreshToken,
				"the operator's refresh token, or its successor, is stored")
		}
	}
	return []flow{
		{name: "create verified", calls: true, prepare: oldToken, run: writeToken(true), ended: written},
		{name: "create unverified", prepare: oldToken, run: writeToken(false), ended: written},
		{name: "rewrite", calls: true, prepare: func(c *cell) {
			oldToken(c)
			c.addTenant("acme")
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
			calls := c.kaizala.CallCount()
			_, status, _ := c.try(logical.ReadOperation, "creds/acme", nil)
			c.assertf(status == 400, "a deleted tenant is read: %d", status)
			c.pass(2 * time.Minute)
			c.assertf(c.stored("acme") == nil && c.kaizala.CallCount() == calls, "a deleted tenant lives on")
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
			c.write("config/spare", map[string]any{"connector_id": c.connectorID, "connector_secret": c.secret})
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
			c.write("config/other", map[string]any{"connector_id": c.connectorID, "connector_secret": c.secret})
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
			if !c.answer.rotates {
				c.read("creds/acme")
				time.Sleep(22*time.Hour + 30*time.Minute)
			}
		}, run: func(c *cell, _ context.Context) {
			if c.answer.rotates {
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
	return fmt.Sprintf("%s | service: %s | storage %s%s | caller %s | process %s | old refresh token %s", c.flow.name, c.answer.name, c.steps.fault, at, c.caller, process, old)
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
	if c.answer.rotates {
		time.Sleep(d)
	}
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
		c.assertf(c.kaizala.AccessTokenAlive(accessTokenOf(resp)), "a dead access token was handed out")
		entry := c.stored("acme")
		for _, call := range c.kaizala.Calls() {
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
	for _, call := range c.kaizala.Calls() {
		if call.Rotated {
			rotated = append(rotated, call)
		}
	}
	return rotated
}

// isLost says whether neither a refresh token nor what the service has replaced
// it with can be used any more.
func (c *cell) isLost(token string) bool {
	if token == "" || c.kaizala.RefreshTokenAlive(token) {
		return false
	}
	held := c.held("acme")
	for _, call := range c.kaizala.Calls() {
		if call.RefreshToken == token && held == c.kaizala.CurrentRefreshToken(call.User) {
			return !c.kaizala.RefreshTokenAlive(held)
		}
	}
	return true
}

// play plays the cell, and says what must hold.
func (c *cell) play(t *testing.T) {
	c.engine = newConfiguredEngine(t)
	c.kaizala.SetOldTokenDies(!c.oldLives)
	c.flow.prepare(c)
	c.kaizala.ResetCalls()

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
		c.kaizala.Inject(held)
		time.AfterFunc(callTime*3/2, cancel)
		time.AfterFunc(callTime*2, func() {
			c.kaizala.ClearFaults()
			c.kaizala.Inject(fault)
		})
	case c.caller == callerCancels && c.flow.calls:
		time.AfterFunc(callTime/2, cancel)
	case c.caller == callerCancels:
		c.steps.onFirst = cancel
	}
	c.kaizala.Inject(fault)
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
		c.calls = c.kaizala.CallCount()
		c.steps.revive()
		c.crashOnto(&storage{InmemStorage: c.storage.InmemStorage, around: c.steps.around})
		c.crashed = true
	}
	c.pass(2 * time.Minute)
	c.steps.next = len(c.steps.seen())
	c.readMeanwhile()
	for i, call := range c.kaizala.Calls() {
		if call.Rotated && i >= c.calls && !c.answer.lost && !(c.flow.name == "delete" && c.succeeded) {
			c.assertf(c.held("acme") == c.kaizala.CurrentRefreshToken(call.User), "a refresh token that was delivered is lost, though the process lives")
		}
	}

	c.storage.heal()
	c.kaizala.ClearFaults()
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
		c.assertf(c.engine.status("acme") == statusOK, "the tenant is %s", c.engine.status("acme"))
	}
	c.assertf(c.kaizala.MaxPerMinute(c.connectorID) <= 15, "%d calls in a minute", c.kaizala.MaxPerMinute(c.connectorID))
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
	for _, call := range c.kaizala.Calls() {
		secrets = append(secrets, call.RefreshToken, c.kaizala.CurrentRefreshToken(call.User))
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

// Without the race detector each cell is played, with it one in thinned: it makes
// a cell ten times as slow, and finds its races in many cells or in none.
const thinned = 12

func TestFaultMatrix(t *testing.T) {
	t.Parallel()
	answers := serviceAnswers(t)
	var cells, losses, failures atomic.Int64
	t.Run("flows", func(t *testing.T) {
		for _, f := range flows() {
			t.Run(f.name, func(t *testing.T) {
				t.Parallel()
				eachCell(f, answers, func(c *cell) {
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
	})
	t.Logf("%d cells; in %d of them a refresh token was lost that nobody could have kept: the service had killed it, and the new one never arrived or had not reached storage when the process died", cells.Load(), losses.Load())
}

// eachCell plays all cells of a flow. Which steps there are is seen where storage
// works, for each step at which the process may die.
func eachCell(f flow, answers []serviceAnswer, play func(*cell)) {
	n := 0
	for _, a := range answers {
		for _, oldLives := range []bool{false, true} {
			for _, caller := range []caller{callerWaits, callerCancels, callerCancelsLate} {
				if oldLives && !a.rotates || caller != callerWaits && f.unasked || caller == callerCancelsLate && !(f.calls && a.answers()) {
					continue
				}
				with := func(s *steps) *steps {
					c := &cell{flow: f, answer: a, oldLives: oldLives, caller: caller, steps: s}
					if n++; s.fault == storageWorks || !raceDetector || n%thinned == 0 {
						play(c)
					}
					return s
				}
				for dies, last := 0, 0; dies <= last; dies++ {
					clean := with(&steps{dies: dies})
					if dies == 0 {
						last = clean.flow
					}
					for i, op := range clean.ops[:clean.next] {
						at, writes := i+1, isWrite(op)
						faults := []storageFault{storageFailsOnce, storageFailsLong}
						switch {
						case dies == 0 && at > last:
							continue // of no flow
						case dies > 0 && at > dies && (caller != callerWaits || !isWrite(clean.ops[dies-1])):
							continue // the next process finds what it finds in another cell
						case writes && (dies == 0 || at <= dies):
							faults = append(faults, storageLies, storageTurnsReadOnly)
						}
						for _, fault := range faults {
							with(&steps{fault: fault, at: at, dies: dies})
						}
					}
				}
			}
		}
	}
}

func isWrite(op string) bool { return op == "put" || op == "delete" }
