package backend

import (
	"context"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/kaizala/kaizalatest"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// No client can be made of a stored connector. Requests say so, and a write puts it right.
func TestStoredConnectorThatCannotBeUsed(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		e.stop()
		e.put("config/default", []byte(`{"format": 1, "connector_id": "i", "connector_secret": "s", "exchanges_per_minute": 50, "request_timeout": 60000000000, "api_root": "https://api.kaiza.la", "ca_cert": "none"}`))
		e.start()
		_, status, text := e.try(logical.ReadOperation, "creds/acme", nil)
		assert.GreaterOrEqual(t, status, http.StatusBadRequest)
		assert.Contains(t, text, `the stored configuration of connector "default" cannot be read by this version`)
		e.pass(2 * time.Minute)
		assert.Zero(t, e.kaizala.CallCount())
	})
}

// A stored connector is of a service that this version of the engine does not know. Requests say that it cannot be read.
func TestStoredConnectorOfAnUnknownService(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.put("config/hr", []byte(`{"format": 1, "service": "saml", "connector_id": "i", "settings": {}}`))
		for op, data := range map[logical.Operation]map[string]any{logical.ReadOperation: nil, logical.UpdateOperation: {"connector_id": "j"}} {
			_, status, text := e.try(op, "config/hr", data)
			assert.Equal(t, http.StatusInternalServerError, status)
			assert.Contains(t, text, `the stored entry "config/hr" cannot be read`)
		}
		_, exists, err := e.HandleExistenceCheck(t.Context(), &logical.Request{Operation: logical.CreateOperation, Path: "config/hr", Storage: e.storage})
		require.NoError(t, err)
		assert.True(t, exists, "for the handler to explain")
	})
}

// Storage does not finish the note that the service refuses the connector. A write or a delete of the connector ends after its time limit,
// and the next ones work.
func TestConnectorIsChangedWhileItsRefusalIsBeingStored(t *testing.T) {
	for _, op := range []logical.Operation{logical.UpdateOperation, logical.DeleteOperation} {
		t.Run(string(op), func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newConfiguredEngine(t)
				e.addTenant("acme")
				e.kaizala.SetConnectorSecret(e.connectorID, "NEWSECRET1")
				reached, release := e.storage.hold("put", connectorPrefix)
				var all sync.WaitGroup
				all.Go(func() { _, _, _ = e.try(logical.ReadOperation, "creds/acme", nil) })
				<-reached
				e.kaizala.SetConnectorSecret(e.connectorID, e.secret)
				service := e.connectors.present(defaultConnector).service
				entry := must(e.storedConnector(t.Context(), defaultConnector))
				ctx, cancel := context.WithTimeout(t.Context(), storeWithin)
				defer cancel()
				if op == logical.UpdateOperation {
					require.ErrorIs(t, e.connectors.put(ctx, defaultConnector, entry, service), context.DeadlineExceeded)
				} else {
					require.ErrorIs(t, e.connectors.remove(ctx, defaultConnector), context.DeadlineExceeded)
				}
				release()
				all.Wait()
				e.quiet("acme")
				e.storage.heal()
				e.write("config", map[string]any{"connector_secret": e.secret})
				e.read("creds/acme")
			})
		})
	}
}

// The exchange that a refused connector makes every ten minutes is redirected, and storage does not take the note of its next request: the
// following exchange is due ten minutes later all the same.
func TestProbeThatIsRedirectedCounts(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenants(2)
		e.kaizala.SetConnectorSecret(e.connectorID, "NEWSECRET1")
		_, status, _ := e.try(logical.ReadOperation, "creds/t0", nil)
		require.Equal(t, http.StatusBadRequest, status)
		e.restart()
		e.index.stop() // without background work
		_, _, _ = e.try(logical.ReadOperation, "creds/t0", nil)
		time.Sleep(probeEvery)
		e.kaizala.SetConnectorSecret(e.connectorID, e.secret)
		e.kaizala.MoveUser("t0", "https://second.kaiza.la/")
		notes := 0
		e.storage.failWith(func(op, key string) error {
			if op == "put" && strings.HasPrefix(key, callPrefix) {
				if notes++; notes > 1 {
					return errStorage
				}
			}
			return nil
		})
		calls := e.kaizala.CallCount()
		_, _, _ = e.try(logical.ReadOperation, "creds/t0", nil)
		require.Equal(t, calls+1, e.kaizala.CallCount())
		require.Equal(t, 2, notes)
		e.storage.heal()
		time.Sleep(time.Minute)
		_, _, _ = e.try(logical.ReadOperation, "creds/t1", nil)
		assert.Equal(t, calls+1, e.kaizala.CallCount())
	})
}

// The service refuses a connector and asks for a rest in one answer: the rest outlasts a restart.
func TestRestBesideARefusalOutlastsARestart(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("t0", nil)
		e.add("t1", nil)
		e.server.Inject(oauth2test.Fault{Times: 1, Answer: oauth2test.Answer{
			Status: http.StatusTooManyRequests, Header: http.Header{"Retry-After": {"7200"}}, Body: `{"error":"invalid_client"}`,
		}})
		_, status, _ := e.try(logical.ReadOperation, "creds/t0", nil)
		require.GreaterOrEqual(t, status, http.StatusBadRequest)
		require.NotNil(t, e.connectors.present(defaultConnector).refusal.Load(), "the service refuses the connector")
		e.crash()
		time.Sleep(probeEvery + time.Minute)
		_, _, _ = e.try(logical.ReadOperation, "creds/t1", nil)
		assert.Zero(t, e.server.Exchanges("t1"))
		time.Sleep(2 * time.Hour)
		e.read("creds/t1")
	})
}

// Several exchanges under way find that the service refuses the connector: that is stored once in ten minutes, and told once.
func TestRefusalIsStoredOnceInTenMinutes(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenants(5)
		e.kaizala.SetConnectorSecret(e.connectorID, "NEWSECRET1")
		e.kaizala.Inject(kaizalatest.Fault{Delay: time.Second, Process: true})
		writes := e.storage.putsOf(connectorPrefix + defaultConnector)
		var all sync.WaitGroup
		for i := range 5 {
			all.Go(func() {
				_, _, _ = e.try(logical.ReadOperation, "creds/"+[]string{"t0", "t1", "t2", "t3", "t4"}[i], nil)
			})
		}
		all.Wait()
		synctest.Wait()
		require.Equal(t, 5, e.kaizala.CallCount())
		assert.Equal(t, writes+1, e.storage.putsOf(connectorPrefix+defaultConnector))
		assert.Equal(t, 1, e.log.count("the service refuses a connector"))
	})
}

// A token endpoint that refuses a refresh token, a code or a device code takes the client, which it authenticates first (RFC 6749, section
// 5.2): such an answer to the probe of a refused connector ends the refusal, so one tenant's bad token does not keep the others out.
func TestProbeThatFindsABadTokenAcceptsTheConnector(t *testing.T) {
	for name, probe := range map[string]func(*grantEngine) int{
		"refresh token": func(e *grantEngine) int {
			_, status, _ := e.try(logical.UpdateOperation, "tenants/mallory", map[string]any{"connector": "as", "refresh_token": "junk"})
			return status
		},
		"code": func(e *grantEngine) int {
			state := query(e.t, e.start(byCode, nil)["authorization_url"].(string))["state"]
			_, status, _ := e.ask(logical.UpdateOperation, "callback", map[string]any{"state": state, "code": "junk"})
			return status
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newGrantEngine(t)
				beta := map[string]any{"connector": "as", "refresh_token": e.server.Grant(e.clientID, "bob", "offline_access"), "verify": false}
				e.write("tenants/beta", beta)
				e.server.Inject(oauth2test.Fault{Times: 1, Answer: oauth2test.InvalidClient})
				_, status, _ := e.try(logical.ReadOperation, "creds/beta", nil)
				require.Equal(t, http.StatusBadRequest, status)
				e.ok(logical.DeleteOperation, "tenants/beta", nil) // an exchange of this tenant would be the probe
				time.Sleep(probeEvery)
				calls := len(e.server.Calls(oauth2test.EndpointToken))
				assert.Equal(t, http.StatusBadRequest, probe(e))
				assert.Len(t, e.server.Calls(oauth2test.EndpointToken), calls+1)
				e.write("tenants/beta", beta)
				e.read("creds/beta")
			})
		})
	}
}

// The same at Kaizala, for a refresh token.
func TestProbeThatFindsABadTokenAcceptsTheConnectorOfKaizala(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newRefusedEngine(t, 1)
		e.ok(logical.DeleteOperation, "tenants/acme", nil) // an exchange of this tenant would be the probe
		time.Sleep(probeEvery)
		_, status, _ := e.try(logical.UpdateOperation, "tenants/mallory", map[string]any{"refresh_token": "junk"})
		assert.Equal(t, http.StatusBadRequest, status)
		assert.Equal(t, 2, e.kaizala.CallCount())
		e.addTenant("beta")
		e.read("creds/beta")
	})
}

// An answer that refuses a refresh token and names a limit does both: it ends the refusal of the connector, and pauses it.
func TestAnswerThatAcceptsAndPausesAConnector(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		e.server.Inject(oauth2test.Fault{Times: 1, Answer: oauth2test.InvalidClient})
		_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
		require.Equal(t, http.StatusBadRequest, status)
		e.ok(logical.DeleteOperation, "tenants/acme", nil) // an exchange of this tenant would be the probe
		time.Sleep(probeEvery)
		e.server.Inject(oauth2test.Fault{Times: 1, Answer: oauth2test.Answer{
			Status: http.StatusTooManyRequests, Header: http.Header{"Retry-After": {"60"}}, Body: `{"error":"invalid_grant"}`,
		}})
		_, _, _ = e.try(logical.UpdateOperation, "tenants/mallory", map[string]any{"refresh_token": "junk"})
		via := e.connectors.present(defaultConnector)
		assert.Nil(t, via.refusal.Load())
		assert.Equal(t, time.Now().Add(time.Minute), via.share.PausedUntil())
	})
}

// A refresh token is sent before the service refuses the connector, and refused after that: the server may look at the token first. The connector
// stays refused.
func TestLateRefusalOfATokenAcceptsNoConnector(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		e.server.Inject(oauth2test.Fault{Times: 1, Delay: 2 * time.Second, Process: true})
		e.server.Inject(oauth2test.Fault{Times: 1, Answer: oauth2test.InvalidClient})
		go func() {
			_, _, _ = e.try(logical.UpdateOperation, "tenants/mallory", map[string]any{"refresh_token": "junk"})
		}()
		time.Sleep(time.Second)
		_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
		require.Equal(t, http.StatusBadRequest, status)
		time.Sleep(5 * time.Second)
		assert.Len(t, e.server.Calls(oauth2test.EndpointToken), 2)
		assert.NotNil(t, e.connectors.present(defaultConnector).refusal.Load())
	})
}

// Other connectors are written one after another, each within less time than storage takes to read one. A tenant's reader must get its
// token all the same.
func TestLoadBesideManyWrites(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		e.restart()
		synctest.Wait()
		e.connectors.invalidate(connectorPrefix + defaultConnector) // nothing has asked for the connector yet
		e.storage.surround(func(op, key string, do func() error) error {
			if op == "get" && key == connectorPrefix+defaultConnector {
				time.Sleep(20 * time.Millisecond)
			}
			return do()
		})
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		for i := range 10 { // as Terraform does
			name := "c" + string(rune('0'+i))
			go func() {
				time.Sleep(time.Duration(i) * 15 * time.Millisecond)
				for ctx.Err() == nil {
					e.ok(logical.UpdateOperation, "config/"+name, map[string]any{"connector_id": "a", "connector_secret": "b"})
					time.Sleep(150 * time.Millisecond)
				}
			}()
		}
		time.Sleep(200 * time.Millisecond)
		begun := time.Now()
		_, status, text := e.try(logical.ReadOperation, "creds/acme", nil)
		cancel()
		time.Sleep(time.Second)
		assert.Equal(t, 200, status, text)
		t.Logf("took %s", time.Since(begun)-time.Second)
		assert.Less(t, time.Since(begun)-time.Second, time.Second)
	})
}
