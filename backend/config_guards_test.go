package backend

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/tokenservice"
)

// The writer of a connector goes away when storage is about to take the write or the delete: it is carried out, and memory goes by it.
func TestConfigChangeWhoseWriterGoesAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.waitForIndex()
		for _, c := range []struct {
			op    logical.Operation
			data  map[string]any
			write string
		}{{logical.UpdateOperation, map[string]any{"request_timeout": "7s"}, "put"}, {logical.DeleteOperation, nil, "delete"}} {
			ctx, cancel := context.WithCancel(t.Context())
			e.storage.failWith(func(op, key string) error {
				if op == c.write && strings.HasPrefix(key, connectorPrefix) {
					cancel()
				}
				return nil
			})
			_, status, text := e.tryContext(ctx, c.op, "config", c.data)
			assert.Error(t, ctx.Err())
			assert.Equal(t, 204, status, text)
			e.storage.heal()
			entry, err := e.storedConnector(t.Context(), "default")
			require.NoError(t, err)
			if c.op == logical.DeleteOperation {
				assert.Nil(t, entry)
			} else {
				assert.Equal(t, "7s", entry.RequestTimeout.String())
			}
		}
	})
}

// A null makes service the default in a patch, as with every field.
func TestPatchOfServiceWithNull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.write("config/as", map[string]any{"service": "oauth2", "token_url": "https://as.example/token", "connector_id": "i", "connector_secret": "s"})
		for _, path := range []string{"config", "config/as"} {
			_, status, text := e.try(logical.PatchOperation, path, map[string]any{"service": nil})
			assert.Equal(t, 204, status, text)
			assert.Equal(t, "kaizala", e.read(path)["service"])
		}
	})
}

// The issuer does not answer a write that names it: the answer is a 503 that says so, and nothing is stored.
func TestIssuerThatDoesNotAnswer(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, nil)
		e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointMetadata, Hang: true})
		_, status, text := e.try(logical.UpdateOperation, "config", map[string]any{"issuer": e.server.Issuer()})
		assert.Equal(t, http.StatusServiceUnavailable, status)
		assert.Contains(t, text, "the issuer has not answered in time")
		assert.Empty(t, e.read("config")["authorization_url"])
	})
}

// A write that asks the issuer nothing waits for one that does: what the issuer has said stays.
func TestWriteKeepsWhatAnotherHasDiscovered(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, nil)
		reached, release := e.storage.hold("put", connectorPrefix)
		discovered := make(chan struct{})
		go func() {
			defer close(discovered)
			e.write("config", map[string]any{"issuer": e.server.Issuer()})
		}()
		<-reached
		written := make(chan struct{})
		go func() {
			defer close(written)
			e.write("config", map[string]any{"request_timeout": "14s"})
		}()
		synctest.Wait()
		release()
		<-discovered
		<-written
		config := e.read("config")
		assert.Equal(t, e.server.AuthorizationURL(), config["authorization_url"])
		assert.EqualValues(t, 14, config["request_timeout"])
	})
}

// Storage does not list the tenants: a config write that no tenant can prevent is stored, and one that a tenant with token_per_lease
// prevents is not.
func TestConfigWriteWhileTenantsAreNotKnown(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", map[string]any{"token_per_lease": true})
		e.write("config/careful", map[string]any{
			"service": "oauth2", "token_url": e.server.TokenURL(), "connector_id": e.clientID, "connector_secret": e.secret,
		})
		next := &storage{InmemStorage: e.storage.InmemStorage}
		next.refuse("list", tenantPrefix)
		e.crashOnto(next)
		synctest.Wait()
		for path, data := range map[string]map[string]any{
			"config/careful": {"request_timeout": "14s"}, "config": {"request_timeout": "14s"},
		} {
			_, status, text := e.try(logical.UpdateOperation, path, data)
			assert.Equal(t, 204, status, text)
		}
		_, status, _ := e.try(logical.UpdateOperation, "config", map[string]any{"revocation": "none"})
		assert.Equal(t, 503, status)
		assert.Equal(t, "access_token", e.read("config")["revocation"])
		_, status, _ = e.try(logical.DeleteOperation, "config/absent", nil)
		assert.Equal(t, 204, status, "what is not there is not in use")
	})
}

// The refusal of a config write names the first of the tenants that have token_per_lease.
func TestRefusalNamesTheFirstTenant(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		for _, name := range []string{"e", "c", "a", "b", "d", "f", "g", "h"} {
			e.add(name, map[string]any{"token_per_lease": true})
		}
		_, status, text := e.try(logical.UpdateOperation, "config", map[string]any{"revocation": "none"})
		assert.Equal(t, 400, status)
		assert.Contains(t, text, `tenant "a" has token_per_lease`)
	})
}

// Storage takes the writes that move tenants to a connector and reports errors, and then cannot read one of the tenants: the connector is not
// deleted.
func TestConnectorOfATenantInDoubtIsNotDeleted(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassB, classB)
		fields := map[string]any{"service": "oauth2", "token_url": e.server.TokenURL(), "connector_id": e.clientID, "connector_secret": e.secret}
		e.write("config/other", fields)
		e.waitForIndex()
		for i := range 10 {
			e.add(fmt.Sprint("t", i), nil)
		}
		e.storage.unheard("put", tenantPrefix)
		_, status, _ := e.try(logical.UpdateOperation, "tenants/t0", map[string]any{"connector": "other", "verify": false})
		require.Equal(t, 500, status)
		e.storage.refuse("put", tenantPrefix)
		for i := range 9 {
			_, status, _ = e.try(logical.UpdateOperation, fmt.Sprint("tenants/t", i+1), map[string]any{"connector": "other", "verify": false})
			require.Equal(t, 500, status)
		}
		e.storage.refuse("get", tenantPrefix+"t0")
		_, status, _ = e.try(logical.DeleteOperation, "config/other", nil)
		assert.Equal(t, 503, status)
		e.storage.heal()
		_, status, text := e.try(logical.DeleteOperation, "config/other", nil)
		assert.Equal(t, 400, status)
		assert.Contains(t, text, "is used by 1 tenant")
	})
}

// The delete of a connector reads no tenant whose state memory knows.
func TestDeleteOfAConnectorReadsNoTenant(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassB, classB)
		e.write("config/other", map[string]any{"service": "oauth2", "token_url": e.server.TokenURL(), "connector_id": "i", "connector_secret": "s"})
		e.add("acme", nil)
		e.crash()
		e.waitForIndex()
		e.storage.failWith(func(op, key string) error {
			if strings.HasPrefix(key, tenantPrefix) {
				t.Error(op, key)
			}
			return nil
		})
		e.ok(logical.DeleteOperation, "config/other", nil)
	})
}

// Storage does not answer whether a connector is there: it is not deleted.
func TestDeleteOfAConnectorThatCannotBeRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.waitForIndex()
		e.storage.refuse("get", connectorPrefix)
		_, status, _ := e.try(logical.DeleteOperation, "config", nil)
		assert.Equal(t, 500, status)
		e.storage.heal()
		assert.Equal(t, e.connectorID, e.read("config")["connector_id"])
		e.storage.refuse("list", connectorPrefix)
		_, status, _ = e.try(logical.ListOperation, "config/", nil)
		assert.Equal(t, 500, status)
	})
}

// A config write or delete waits for another config write until its answer is due: the other one goes on.
func TestConfigChangeBehindAHangingConfigWrite(t *testing.T) {
	for _, op := range []logical.Operation{logical.UpdateOperation, logical.DeleteOperation} {
		synctest.Test(t, func(t *testing.T) {
			e := newConfiguredEngine(t)
			e.waitForIndex()
			reached, release := e.storage.hold("put", connectorPrefix)
			configured := make(chan struct{})
			go func() {
				defer close(configured)
				e.write("config", map[string]any{"request_timeout": "14s"})
			}()
			<-reached
			begun := time.Now()
			_, status, _ := e.try(op, "config", map[string]any{"request_timeout": "13s"})
			assert.GreaterOrEqual(t, status, 500)
			assert.Equal(t, answerWithin, time.Since(begun))
			release()
			<-configured
			assert.EqualValues(t, 14, e.read("config")["request_timeout"])
		})
	}
}

// The entry of a tenant is in doubt and damaged: that does not prevent the delete of a connector.
func TestDamagedTenantInDoubtKeepsNoConnector(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassB, classB)
		e.write("config/other", map[string]any{"service": "oauth2", "token_url": e.server.TokenURL(), "connector_id": "i", "connector_secret": "s"})
		e.waitForIndex()
		e.add("acme", nil)
		e.storage.refuse("put", tenantPrefix)
		_, status, _ := e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"connector": "other", "verify": false})
		require.Equal(t, 500, status)
		e.storage.heal()
		e.put(tenantPrefix+"acme", []byte("{"))
		_, status, text := e.try(logical.DeleteOperation, "config/other", nil)
		assert.Equal(t, 204, status, text)
	})
}

// A change of service keeps what both kinds of connector have. Where request_timeout was the default, it becomes that of the new kind.
func TestChangeOfServiceKeepsCommonSettings(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newEngine(t)
		e.write("config", with(with(aConnector, "exchanges_per_minute", 20), "request_timeout", "20s"))
		e.ok(logical.PatchOperation, "config", map[string]any{"service": "oauth2", "token_url": "https://as.example.com/token"})
		shown := e.read("config")
		assert.Equal(t, aConnector["connector_id"], shown["connector_id"])
		assert.Equal(t, 20, shown["exchanges_per_minute"])
		assert.EqualValues(t, 20, shown["request_timeout"])
		e.ok(logical.PatchOperation, "config", map[string]any{"request_timeout": nil})
		e.ok(logical.PatchOperation, "config", map[string]any{"service": nil})
		assert.EqualValues(t, 60, e.read("config")["request_timeout"])
		assert.Equal(t, 20, e.read("config")["exchanges_per_minute"])
	})
}

// A write of a Kaizala connector bounds redirect_hosts and ca_cert. A connector that an older version has stored with more goes on, and its
// other fields can be written.
func TestBoundsOfKaizalasLists(t *testing.T) {
	ca, stop := oauth2test.New().ListenTLS()
	stop()
	bubble(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		hosts := make([]string, maxRedirectHosts)
		for i := range hosts {
			hosts[i] = fmt.Sprintf("h%d.kaiza.la", i)
		}
		e.write("config", map[string]any{"redirect_hosts": hosts, "ca_cert": ca + strings.Repeat("\n", tokenservice.MaxCABytes-len(ca))})
		for field, value := range map[string]any{
			"redirect_hosts": append(hosts, "kaiza.la"), "ca_cert": strings.Repeat("\n", tokenservice.MaxCABytes+1),
		} {
			_, status, text := e.try(logical.UpdateOperation, "config", map[string]any{field: value})
			assert.Equal(t, http.StatusBadRequest, status)
			assert.Contains(t, text, field+" must")
		}
		stored := e.get(connectorPrefix + defaultConnector)
		e.stop()
		e.put(connectorPrefix+defaultConnector, []byte(strings.Replace(stored, `"h0.kaiza.la"`, `"h0.kaiza.la","more.kaiza.la"`, 1)))
		e.start()
		e.read("creds/acme")
		e.write("config", map[string]any{"request_timeout": "7s"})
		assert.Len(t, e.read("config")["redirect_hosts"], maxRedirectHosts+1)
	})
}
