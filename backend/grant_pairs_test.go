package backend

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/kaizala/kaizalatest"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// pairFlow is a flow and its steps. pairEvents are the events that come between two steps.
type pairFlow struct {
	name, path string
	steps      []func(*pair)
}

// pair is one flow with one event between two of its steps.
type pair struct {
	*grantEngine
	started map[string]any
	back    map[string]any
	form    map[string]any
	done    chan struct{} // closed when the step in the background has ended
}

// slow delays the service's next answer by 3 s, so that an event can come before it.
func (p *pair) slow() {
	p.server.Inject(oauth2test.Fault{Delay: 3 * time.Second, Times: 1})
	p.kaizala.Inject(kaizalatest.Fault{Delay: 3 * time.Second, Times: 1})
}

func (p *pair) begin(f func()) {
	p.done = make(chan struct{})
	go func() {
		defer close(p.done)
		f()
	}()
	time.Sleep(time.Second)
}

func (p *pair) await() {
	if p.done == nil {
		return
	}
	<-p.done
	time.Sleep(5 * time.Second)
}

var pairFlows = []pairFlow{
	{"code", byCode, []func(*pair){
		func(p *pair) { p.started = p.start(byCode, nil) },
		func(p *pair) { p.back = p.allowed(p.started["authorization_url"].(string)) },
		func(p *pair) { _, p.form = p.open(p.back).form() },
		func(p *pair) {
			p.slow()
			p.grantEngine.begin(p)
		},
		func(p *pair) { p.await() },
	}},
	{"device", byDevice, []func(*pair){
		func(p *pair) { p.started = p.start(byDevice, nil) },
		func(p *pair) { time.Sleep(6 * time.Second) },
		func(p *pair) {
			require.NoError(p.t, p.server.ApproveDevice(p.started["user_code"].(string), "jane"))
			p.slow()
			p.begin(func() { time.Sleep(9 * time.Second) })
			time.Sleep(4 * time.Second) // the poll has been sent by then
		},
		func(p *pair) { p.await() },
	}},
	{"pin", byPIN, []func(*pair){
		func(p *pair) { p.phone() },
		func(p *pair) {
			p.slow()
			p.begin(func() { _, _, _ = p.pin(map[string]any{"pin": p.sentPIN()}) })
		},
		func(p *pair) { p.await() },
	}},
}

// begin presses the button of the page, and does not wait for the answer.
func (e *grantEngine) begin(p *pair) {
	p.begin(func() {
		data := p.form
		if data == nil {
			data = p.back
		}
		_, _, _ = e.ask(logical.UpdateOperation, "callback", data)
	})
}

const rotation = "the refresh token is rotated"

// pairEvents are the events between two steps. connects says whether the flow connects the tenant after the event.
var pairEvents = []struct {
	name     string
	happens  func(*pair)
	connects bool
}{
	{"nothing", func(*pair) {}, true},
	{"settings are written", func(p *pair) { p.write("tenants/acme", map[string]any{"ttl": "1h"}) }, true},
	{"refresh_token is written", func(p *pair) {
		p.write("tenants/acme", map[string]any{"refresh_token": p.newToken("operator"), "connector": "default", "verify": false})
	}, false},
	{"refresh_token is verified and written", func(p *pair) {
		p.write("tenants/acme", map[string]any{"refresh_token": p.newToken("operator"), "connector": "default"})
	}, false},
	{"connector is written", func(p *pair) {
		p.write("config/copy", map[string]any{"connector_id": p.connectorID, "connector_secret": p.secret})
		p.write("tenants/acme", map[string]any{"connector": "copy", "verify": false})
	}, false},
	{"delete", func(p *pair) { p.ok(logical.DeleteOperation, "tenants/acme", nil) }, false},
	{"delete and create", func(p *pair) {
		p.ok(logical.DeleteOperation, "tenants/acme", nil)
		p.write("tenants/acme", map[string]any{"refresh_token": p.newToken("operator"), "verify": false})
	}, false},
	{"a refused write", func(p *pair) {
		_, status, _ := p.try(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": "unknown"})
		require.Equal(p.t, 400, status)
	}, true},
	{"a second attempt", func(p *pair) {
		p.ask(logical.UpdateOperation, "tenants/acme/authorize", map[string]any{"connector": "as"})
	}, false},
	{"config is written", func(p *pair) {
		p.write("config/as", map[string]any{"request_timeout": "20s"})
		p.write("config", map[string]any{"request_timeout": "50s"})
	}, true},
	{"read", func(p *pair) { p.try(logical.ReadOperation, "creds/acme", nil) }, true},
	{"refresh", func(p *pair) { p.try(logical.UpdateOperation, "tenants/acme/refresh", nil) }, true},
	{rotation, func(p *pair) {
		before := p.stored("acme")
		time.Sleep(10 * time.Second) // the refresh token is in the last tenth of its life then
		p.write("tenants/acme/refresh", nil)
		if p.stored("acme").Lineage == before.Lineage {
			require.Equal(p.t, originService, p.stored("acme").RefreshTokenOrigin)
		}
	}, true},
	{"stop and start", func(p *pair) { p.restart(); p.minute() }, true},
	{"invalidated", func(p *pair) {
		for _, key := range []string{"tenants/acme", "config/as", "config/default", attemptKeys + "acme"} {
			p.InvalidateKey(p.t.Context(), key)
		}
	}, true},
}

// Each flow with each event between two of its steps: either the grant is stored completely, or the tenant is as the event left it, and
// the tokens of the grant are given up.
func TestGrantPairs(t *testing.T) {
	t.Parallel()
	for _, f := range pairFlows {
		for _, event := range pairEvents {
			for at := 1; at < len(f.steps); at++ {
				t.Run(fmt.Sprintf("%s/%s/%d", f.name, event.name, at), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						p := &pair{grantEngine: newGrantEngine(t)}
						p.write("config/as", map[string]any{"revocation": "access_token", "exchange_invalidates": false})
						p.kaizala.SetOldTokenDies(false)
						if event.name == rotation {
							p.kaizala.SetRefreshTokenAge(kaizalatest.DefaultRefreshTokenLife*9/10 - 5*time.Second)
						}
						p.write("tenants/acme", map[string]any{"refresh_token": p.newToken("before")})
						p.kaizala.SetRefreshTokenAge(0)
						p.play(f, event.happens, event.connects, at)
					})
				})
			}
		}
	}
}

func (p *pair) play(f pairFlow, happens func(*pair), connects bool, at int) {
	t := p.t
	var after *tenantEntry
	for i, step := range f.steps {
		if i == at {
			happens(p)
			if p.done != nil && at < len(f.steps)-1 {
				<-p.done
			}
			after = p.stored("acme")
		}
		if connects || i <= at || i == len(f.steps)-1 {
			step(p)
		} else if f.path == byCode && p.back != nil && i >= 3 {
			step(p) // presses the button of a page that is out of date
		}
	}
	p.pass(2 * time.Minute)
	entry := p.stored("acme")
	status := attemptStatusOf(p, f.path)
	if connects {
		assert.Equal(t, attemptGranted, status)
		require.NotNil(t, entry)
		assert.Equal(t, "token-ada", entry.GrantedBy)
		p.read("creds/acme")
		assert.Equal(t, statusOK, p.status("acme"))
		switch f.path {
		case byPIN:
			assert.Equal(t, p.kaizala.CurrentRefreshToken("acme"), p.held("acme"))
		default:
			assert.Equal(t, p.server.CurrentRefreshToken("jane"), p.held("acme"))
			p.noneLeft(accessTokenOf(p.ok(logical.ReadOperation, "token/acme", nil)))
		}
		return
	}
	assert.NotEqual(t, attemptGranted, status)
	switch {
	case after == nil:
		assert.Nil(t, entry)
	default:
		require.NotNil(t, entry)
		assert.Equal(t, after.Lineage, entry.Lineage)
		assert.Empty(t, entry.GrantedBy)
		assert.Equal(t, after.RefreshToken, entry.RefreshToken)
	}
	p.noneLeft("")
}

// noneLeft asserts that no access token of the user but this one is alive at the service.
func (p *pair) noneLeft(but string) {
	for _, token := range p.server.AccessTokens("jane") {
		assert.Equal(p.t, token == but, p.server.Alive(token), "an access token that the engine does not keep is given up")
	}
}

func attemptStatusOf(p *pair, path string) string {
	all, err := p.attemptsOf(p.t.Context(), "acme")
	require.NoError(p.t, err)
	_, v, err := p.tenants.load(p.t.Context(), "acme")
	require.NoError(p.t, err)
	if all.Last[path] == nil {
		return ""
	}
	status, _ := p.statusOf(all.Last[path], v)
	return status
}

// The process dies between two steps, or while a code, a poll or a PIN is at the service. The next process goes on with the attempt,
// or its status says that it failed.
func TestGrantsOverACrash(t *testing.T) {
	for _, f := range pairFlows {
		for at := 1; at < len(f.steps); at++ {
			t.Run(fmt.Sprintf("%s/%d", f.name, at), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					p := &pair{grantEngine: newGrantEngine(t)}
					away := at == len(f.steps)-1
					p.play(f, func(p *pair) {
						p.crash()
						p.minute()
						if !away {
							return
						}
						<-p.done
						p.pass(time.Minute)
						p.done = nil
						status := attemptStatusOf(p, f.path)
						switch f.path {
						case byDevice:
							assert.Equal(t, attemptGranted, status, "the poll of the first process had not reached the service")
							return
						case byPIN:
							assert.Equal(t, attemptPending, status, "a PIN can be written again")
						default:
							assert.Equal(t, attemptFailed, status)
						}
						assert.Nil(t, p.stored("acme"))
						f.steps, p.done = f.steps[:at], nil
					}, !away || f.path == byDevice, at)
				})
			})
		}
	}
}

// Storage does not take the tokens of a grant: memory keeps them, and they are stored when storage works again.
func TestGrantWhileStorageFails(t *testing.T) {
	for name, exists := range map[string]bool{"a new tenant": false, "a tenant": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newGrantEngine(t)
				if exists {
					e.addTenant("acme")
				}
				back := e.authorize(nil)
				e.storage.failWith(func(op, key string) error {
					if op == "put" && key == "tenants/acme" {
						return errors.New("the disk is full")
					}
					return nil
				})
				p := e.confirm(back)
				assert.Equal(t, 200, p.status, p.text())
				assert.Contains(t, p.text(), "Not finished yet")
				e.pass(attemptLife + time.Minute)
				assert.Equal(t, attemptPending, e.attemptStatus(byCode))
				assert.Equal(t, e.server.CurrentRefreshToken("jane"), e.tenants.named("acme").view.Load().kept.change.token())
				assert.Equal(t, 1, e.sent(codeGrant))
				e.storage.heal()
				e.pass(2 * time.Minute)
				require.NotNil(t, e.stored("acme"))
				assert.Equal(t, e.server.CurrentRefreshToken("jane"), e.stored("acme").RefreshToken)
				assert.Equal(t, attemptGranted, e.attemptStatus(byCode))
				assert.Equal(t, "token-ada", e.stored("acme").GrantedBy)
				assert.Equal(t, 1, e.sent(codeGrant))
			})
		})
	}
}

// While memory keeps a grant that storage has not taken, a start of another grant is refused: the first grant would supersede it when
// storage takes it. A device code that has given its tokens is not polled any more.
func TestAttemptsBesideAKeptGrant(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		e.addTenant("acme")
		started := e.start(byDevice, nil)
		e.storage.refuse("put", "tenants/acme")
		require.NoError(t, e.server.ApproveDevice(started["user_code"].(string), "jane"))
		e.pass(time.Minute)
		require.Equal(t, attemptPending, e.attemptStatus(byDevice))
		_, status, text := e.ask(logical.UpdateOperation, "tenants/acme/authorize", map[string]any{"connector": "as"})
		assert.Equal(t, 503, status)
		assert.Contains(t, text, "kept in memory")
		e.storage.heal()
		e.pass(2 * time.Minute)
		assert.Equal(t, attemptGranted, e.attemptStatus(byDevice))
		e.start(byCode, nil)
		e.grants.mu.Lock()
		defer e.grants.mu.Unlock()
		assert.Empty(t, e.grants.polls, "the device code is not polled any more")
	})
}

// A write changes a connector's connector_id while a code is at the service. The tokens of that code belong to the older connector_id,
// so they are not stored, and the attempt's last_error says so.
func TestConnectorIDIsWrittenDuringAGrant(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		_, form := e.open(e.authorize(nil)).form()
		e.server.Inject(oauth2test.Fault{Delay: 3 * time.Second, Times: 1})
		done := make(chan struct{})
		go func() {
			defer close(done)
			_, _, _ = e.ask(logical.UpdateOperation, "callback", form)
		}()
		time.Sleep(time.Second)
		id, secret := e.server.RegisterClient(oauth2test.AuthBasic, callbackTo)
		e.ok(logical.PatchOperation, "config/as", map[string]any{"connector_id": id, "connector_secret": secret})
		<-done
		assert.Nil(t, e.stored("acme"))
		attempt := e.attempt(byCode)
		assert.Equal(t, attemptFailed, attempt["status"])
		assert.Contains(t, attempt["last_error"], "another connector_id")
		e.confirm(e.authorize(nil))
		e.write("tenants/acme/refresh", nil)
	})
}

func (c *tenantChange) token() string { return *c.refreshToken }

// Each write to storage during a grant fails once, and the person tries again as the page says: the grant succeeds.
func TestEachWriteOfAGrantFails(t *testing.T) {
	for n := range 12 {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newGrantEngine(t)
				writes, failed := 0, ""
				e.storage.failWith(func(op, key string) error {
					if op != "put" || strings.HasPrefix(key, callPrefix) {
						return nil
					}
					if writes++; writes-1 == n {
						failed = key
						return errors.New("the disk is full")
					}
					return nil
				})
				for tries := 0; ; tries++ {
					require.Less(t, tries, 3)
					resp, status, _ := e.ask(logical.UpdateOperation, "tenants/acme/authorize", map[string]any{"connector": "as"})
					if status != 200 {
						continue
					}
					back := e.allowed(resp.Data["authorization_url"].(string))
					_, _, _ = e.ask(logical.ReadOperation, "callback", back)
					_, _, _ = e.ask(logical.UpdateOperation, "callback", back)
					_, _, _ = e.ask(logical.UpdateOperation, "callback", back)
					e.pass(2 * time.Minute)
					if e.attemptStatus(byCode) == attemptGranted {
						break
					}
				}
				assert.Equal(t, e.server.CurrentRefreshToken("jane"), e.stored("acme").RefreshToken, failed)
				assert.Equal(t, 1, e.sent(codeGrant), failed)
				e.crash()
				assert.Equal(t, attemptGranted, e.attemptStatus(byCode), failed)
			})
		})
	}
}
