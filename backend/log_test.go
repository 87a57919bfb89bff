package backend

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/kaizala/kaizalatest"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// logLine is a line of the plugin's log as Vault gets it.
type logLine struct {
	Level     string `json:"@level"`
	Message   string `json:"@message"`
	Tenant    string
	Connector string
	Reason    string
}

// lines returns the log's lines from this line on.
func (e *engine) lines(from int) (lines []logLine) {
	e.t.Helper()
	for text := range strings.Lines(e.log.String()) {
		var line logLine
		require.NoError(e.t, json.Unmarshal([]byte(text), &line), text)
		lines = append(lines, line)
	}
	return lines[from:]
}

// says requires that the log has exactly these new lines since the last call.
func (e *engine) says(seen *int, want ...logLine) {
	e.t.Helper()
	synctest.Wait()
	got := e.lines(*seen)
	*seen += len(got)
	require.Equal(e.t, len(want), len(got), "%+v", got[:min(5, len(got))])
	for i, line := range got {
		assert.Equal(e.t, want[i].Level, line.Level, line)
		assert.Contains(e.t, line.Message, want[i].Message)
		assert.Contains(e.t, line.Reason, want[i].Reason)
		assert.Equal(e.t, want[i].Tenant, line.Tenant, line)
		assert.Equal(e.t, want[i].Connector, line.Connector, line)
	}
}

func TestReadsAndWritesLogNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.write("tenants/acme", map[string]any{"refresh_token": e.newToken("acme"), "ttl": "1h"})
		e.addTenant("beta")
		for range 10 {
			e.revokeLease(e.lease("acme"))
			e.read("token/beta")
			e.read("tenants/acme")
			e.read("config")
			e.ok(logical.ListOperation, "tenants/", nil)
			e.ok(logical.ListOperation, "config/", nil)
			e.write("tenants/acme/refresh", nil)
			e.try(logical.ReadOperation, "creds/nobody", nil)
			e.try(logical.ReadOperation, "creds/acme", map[string]any{"min_ttl": "20h"})
			e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": "known to nobody"})
			time.Sleep(24 * time.Hour) // access tokens of tenants in use are renewed
		}
		e.ok(logical.DeleteOperation, "tenants/acme", nil)
		seen := 0
		e.says(&seen)
	})
}

func TestOneLineForEachChangeOfATenantsState(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.write("config/hr", map[string]any{"connector_id": e.connectorID, "connector_secret": e.secret})
		e.write("tenants/acme", map[string]any{"refresh_token": e.newToken("acme"), "connector": "hr"})
		seen := 0
		about := func(level, message, reason string) logLine {
			return logLine{Level: level, Message: message, Tenant: "acme", Connector: "hr", Reason: reason}
		}
		readFor := func(d time.Duration) {
			for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(10 * time.Second) {
				e.try(logical.ReadOperation, "token/acme", nil)
			}
		}
		failAndRecover := func(reason string, faults ...kaizalatest.Fault) {
			t.Helper()
			e.revokeLease(e.lease("acme"))
			for _, fault := range faults {
				fault.User = "acme"
				e.kaizala.Inject(fault)
			}
			readFor(time.Hour)
			require.Equal(t, statusDegraded, e.status("acme"))
			e.says(&seen, about("warn", "failed and will be tried again", reason))
			e.kaizala.ClearFaults()
			readFor(3 * time.Minute)
			require.Equal(t, statusOK, e.status("acme"))
			e.says(&seen, about("info", "succeed again", ""))
		}
		failAndRecover("nothing was lost", kaizalatest.Fault{Status: 500})
		failAndRecover("refused further calls", kaizalatest.Fault{Status: 429, Header: http.Header{"Retry-After": {"7"}}})
		failAndRecover("nothing was lost",
			kaizalatest.Fault{Status: 500, Times: 1}, kaizalatest.Fault{Status: 200, Body: "<html>", Times: 1},
			kaizalatest.Fault{Reset: true, Times: 1}, kaizalatest.Fault{Status: 503})

		e.revokeLease(e.lease("acme"))
		e.storage.failWith(func(op, key string) error {
			if op == "put" {
				return errors.New("the disk is full")
			}
			return nil
		})
		readFor(time.Hour)
		e.says(&seen, about("warn", "failed and will be tried again", "storage"))
		e.storage.heal()
		readFor(3 * time.Minute)
		e.says(&seen, about("info", "succeed again", ""))

		e.newToken("acme") // the user generates a new one on the portal, which ends the one that Vault has
		e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
		require.Equal(t, statusRejected, e.status("acme"))
		readFor(time.Hour)
		e.says(&seen, about("error", "refuses a tenant's refresh token", ""))
		for range 3 {
			e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
			time.Sleep(2 * time.Minute)
		}
		e.says(&seen)
		time.Sleep(3 * 24 * time.Hour)
		reminder := about("warn", "ends soon", "has to generate a new one")
		e.says(&seen, reminder, reminder, reminder)

		e.write("tenants/acme", map[string]any{"refresh_token": e.newToken("acme")})
		e.says(&seen, about("info", "succeed again", ""))
		for e.read("tenants/acme")["refresh_token_origin"] == originOperator {
			time.Sleep(24 * time.Hour)
		}
		e.says(&seen, about("info", "the refresh token of a tenant was replaced", ""))
	})
}

func TestOneLineForARefusedConnector(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		for _, name := range []string{"acme", "beta"} {
			e.addTenant(name)
		}
		e.kaizala.NewConnectorSecret(e.connectorID)
		for range 20 {
			e.try(logical.ReadOperation, "creds/acme", nil)
			time.Sleep(time.Minute)
		}
		seen := 0
		e.says(&seen,
			logLine{Level: "error", Message: "refuses a connector", Connector: "default"},
			logLine{Level: "warn", Message: "failed", Tenant: "acme", Connector: "default", Reason: "config"})
	})
}

// sender is Vault's event bus.
type sender struct {
	mu     sync.Mutex
	sent   []map[string]any
	answer error
}

func (s *sender) SendEvent(_ context.Context, event logical.EventType, data *logical.EventData) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	sent := data.Metadata.AsMap()
	sent["event"] = string(event)
	s.sent = append(s.sent, sent)
	return s.answer
}

// counted returns the number of events about a tenant, by type.
func (s *sender) counted(t *testing.T, tenant string) map[string]int {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	count := map[string]int{}
	for _, sent := range s.sent {
		assert.Equal(t, "default", sent["connector"])
		assert.Equal(t, "tenants/"+sent["tenant"].(string), sent[logical.EventMetadataPath])
		assert.Len(t, sent, 4, "an event has other fields than these four: %v", sent)
		if sent["tenant"] == tenant {
			count[sent["event"].(string)]++
		}
	}
	return count
}

// restartWith restarts the engine with another event bus, nil for none.
func (e *engine) restartWith(events logical.EventSender) {
	e.t.Helper()
	e.stop()
	b, err := newBackend(context.Background(), &logical.BackendConfig{
		Logger:       hclog.New(&hclog.LoggerOptions{Level: hclog.Trace, Output: e.log, JSONFormat: true}),
		System:       e.system,
		StorageView:  e.storage,
		EventsSender: events,
	}, "v0.0.0", e.kaizala.Transport(), e.work)
	require.NoError(e.t, err)
	e.backend = b
	require.NoError(e.t, b.Initialize(context.Background(), &logical.InitializationRequest{Storage: e.storage}))
}

// live lets a little more than the life of a refresh token pass with three tenants:
// one is rotated, one is rejected, and one expires because Kaizala is down for the
// last eighth of that time.
func live(t *testing.T, e *engine, life time.Duration) {
	t.Helper()
	e.kaizala.SetRefreshTokenLife(life)
	for _, name := range []string{"rotated", "rejected", "expiring"} {
		e.write("tenants/"+name, map[string]any{"refresh_token": e.newToken(name)})
	}
	time.Sleep(life * 7 / 8)
	e.newToken("rejected")
	_, status, _ := e.try(logical.UpdateOperation, "tenants/rejected/refresh", nil)
	require.Equal(t, 400, status)
	e.kaizala.Inject(kaizalatest.Fault{User: "expiring", Status: 500})
	time.Sleep(life / 10)
	require.Equal(t, originService, e.read("tenants/rotated")["refresh_token_origin"])
	require.Equal(t, statusRejected, e.status("rejected"))
	require.Equal(t, statusDegraded, e.status("expiring"))
	time.Sleep(life / 20)
	require.Equal(t, statusOK, e.status("rotated"))
	require.Equal(t, statusExpired, e.status("rejected"))
	require.Equal(t, statusExpired, e.status("expiring"))
}

func TestEvents(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		bus := &sender{}
		e.restartWith(bus)
		live(t, e, 40*day)
		assert.Equal(t, map[string]int{eventRotated: 1}, bus.counted(t, "rotated"))
		assert.Equal(t, 1, bus.counted(t, "rejected")[eventRejected])
		expiring := bus.counted(t, "expiring")
		assert.Zero(t, expiring[eventRejected]+expiring[eventRotated])
		assert.Equal(t, 5, expiring[eventExpiring], "one event a day, from when a replacement is due")
	})
}

func TestEventsAreHarmlessWithoutABus(t *testing.T) {
	for name, bus := range map[string]logical.EventSender{
		"no bus":            nil,
		"a bus that is off": &sender{answer: errors.New("events are not enabled")},
		"a bus that fails":  &sender{answer: context.DeadlineExceeded},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newConfiguredEngine(t)
				e.restartWith(bus)
				live(t, e, 4*day)
				assert.Zero(t, e.log.count("events are not enabled")+e.log.count("no event sender"))
			})
		})
	}
}

// The engine stops while storage fails: the log names a lost refresh token, and not
// a lost access token, which the engine can get again.
func TestLostRefreshTokensAreLogged(t *testing.T) {
	for _, rotated := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			e := newConfiguredEngine(t)
			e.addTenant("acme")
			if rotated {
				e.kaizala.SetRefreshTokenLife(40 * day)
				e.write("tenants/acme", map[string]any{"refresh_token": e.newToken("acme"), "verify": false})
				e.stop()
				time.Sleep(37 * day)
				e.start()
			}
			e.storage.failWith(func(op, key string) error {
				if op == "put" && key == "tenants/acme" {
					return errors.New("the disk is full")
				}
				return nil
			})
			_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
			require.Equal(t, 503, status)
			require.Equal(t, 1, e.kaizala.Exchanges("acme"))
			e.stop()
			assert.Equal(t, rotated, e.log.count("could not be stored before the engine stopped, and is lost") == 1)
		})
	}
}

// The service accepts a connector again: the log says so once, and neither a tenant nor the stored connector has the refusal any more.
func TestServiceTakesARefusedConnectorAgain(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		e.add("beta", nil)
		e.server.Inject(oauth2test.Fault{Answer: oauth2test.Answer{Status: http.StatusUnauthorized, Body: `{"error":"invalid_client"}`}})
		for _, name := range []string{"acme", "beta"} {
			_, status, _ := e.try(logical.ReadOperation, "creds/"+name, nil)
			require.Equal(t, http.StatusBadRequest, status)
		}
		entry, err := e.storedConnector(t.Context(), "default")
		require.NoError(t, err)
		require.NotZero(t, entry.Refused)
		e.server.ClearFaults()
		time.Sleep(probeEvery)
		synctest.Wait() // the engine makes the probe itself
		e.lease("acme")
		e.lease("beta")
		assert.Equal(t, 1, e.log.count("accepts a connector again"))
		entry, err = e.storedConnector(t.Context(), "default")
		require.NoError(t, err)
		assert.Zero(t, entry.Refused)
	})
}

// A call is under way when the service refuses the connector in another call, and succeeds then. That shows that the service accepts the
// connector: the tenant whose call was refused does not wait for the next probe.
func TestAnswerShowsThatAConnectorIsTaken(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		e.add("beta", nil)
		e.server.Inject(oauth2test.Fault{User: "acme", Hold: true})
		go func() { _, _, _ = e.try(logical.ReadOperation, "creds/acme", nil) }()
		synctest.Wait()
		e.server.Inject(oauth2test.Fault{User: "beta", Times: 1, Answer: oauth2test.Answer{Status: http.StatusUnauthorized, Body: `{"error":"invalid_client"}`}})
		_, status, _ := e.try(logical.ReadOperation, "creds/beta", nil)
		require.Equal(t, http.StatusBadRequest, status)
		e.server.ClearFaults()
		synctest.Wait()
		e.lease("beta")
		assert.Equal(t, statusOK, e.status("beta"))
		e.kept()
	})
}

// Two answers refuse a connector at the same time: the log says so once.
func TestOneLineForTwoRefusalsAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		e.addTenant("beta")
		e.kaizala.Inject(kaizalatest.Fault{Delay: time.Second, Status: 401, Body: connectorsRefusal})
		for _, tenant := range []string{"acme", "beta"} {
			go func() { _, _, _ = e.try(logical.ReadOperation, "creds/"+tenant, nil) }()
		}
		time.Sleep(2 * time.Second)
		require.Equal(t, 2, e.kaizala.CallCount())
		refused := 0
		for _, line := range e.lines(0) {
			if strings.Contains(line.Message, "the service refuses a connector") {
				refused++
			}
		}
		assert.Equal(t, 1, refused)
	})
}
