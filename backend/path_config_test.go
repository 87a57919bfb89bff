package backend

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

var aConnector = map[string]any{"connector_id": "37ba1e41-d55c-43bf-a2fa-d72c97aa080a", "connector_secret": "CANARYSECR"}

func with(base map[string]any, name string, value any) map[string]any {
	changed := map[string]any{name: value}
	for k, v := range base {
		if k != name {
			changed[k] = v
		}
	}
	return changed
}

func TestConnectorIsReadWithoutItsSecret(t *testing.T) {
	e := newEngine(t)
	_, status, _ := e.try(logical.ReadOperation, "config", nil)
	assert.Equal(t, 404, status)
	e.write("config", aConnector)
	want := map[string]any{
		"connector_id":         "37ba1e41-d55c-43bf-a2fa-d72c97aa080a",
		"api_root":             "https://api.kaiza.la",
		"ca_cert":              "",
		"redirect_hosts":       []string{"kaiza.la", "osi.office.net"},
		"service":              "kaizala",
		"request_timeout":      int64(60),
		"exchanges_per_minute": 50,
	}
	assert.Equal(t, want, e.read("config"))
	assert.Equal(t, want, e.read("config/default"), "config is the connector named default")
}

func TestConnectorWriteChangesWhatItNames(t *testing.T) {
	e := newEngine(t)
	e.write("config/hr", aConnector)
	e.write("config/hr", map[string]any{"request_timeout": "5s", "redirect_hosts": "a.example,b.example"})
	e.write("config/hr", map[string]any{"exchanges_per_minute": 7})
	got := e.read("config/hr")
	assert.Equal(t, int64(5), got["request_timeout"])
	assert.Equal(t, []string{"a.example", "b.example"}, got["redirect_hosts"])
	assert.Equal(t, 7, got["exchanges_per_minute"])
	assert.Equal(t, aConnector["connector_id"], got["connector_id"])

	e.ok(logical.PatchOperation, "config/hr", map[string]any{"request_timeout": nil, "redirect_hosts": nil, "exchanges_per_minute": nil, "api_root": nil})
	got = e.read("config/hr")
	assert.Equal(t, int64(60), got["request_timeout"])
	assert.Equal(t, []string{"kaiza.la", "osi.office.net"}, got["redirect_hosts"])
	assert.Equal(t, 50, got["exchanges_per_minute"])

	_, status, _ := e.try(logical.PatchOperation, "config/none", map[string]any{"request_timeout": 5})
	assert.Equal(t, 404, status)
	assert.Equal(t, []string{"hr"}, e.ok(logical.ListOperation, "config/", nil).Data["keys"])
}

func TestConnectorPathTakesNoName(t *testing.T) {
	e := newEngine(t)
	resp := e.write("config", with(aConnector, "connector", "hr"))
	require.NotEmpty(t, resp.Warnings)
	assert.Contains(t, resp.Warnings[0], "unrecognized parameters: [connector]")
	assert.Equal(t, []string{"default"}, e.ok(logical.ListOperation, "config/", nil).Data["keys"])
}

func TestConnectorInUseStays(t *testing.T) {
	e := newConfiguredEngine(t)
	for i := range 12 {
		e.addTenant(fmt.Sprintf("tenant-%02d", i))
	}
	_, status, text := e.try(logical.DeleteOperation, "config", nil)
	assert.Equal(t, 400, status)
	assert.Contains(t, text, `connector "default" is used by 12 tenants, so it is not deleted`)
	assert.Contains(t, text, "tenant-09")
	assert.NotContains(t, text, "tenant-10", "the error names ten tenants")

	_, status, text = e.try(logical.UpdateOperation, "config", map[string]any{"connector_id": aConnector["connector_id"]})
	assert.Equal(t, 400, status)
	assert.Contains(t, text, "connector_id is not changed")
	assert.Equal(t, e.connectorID, e.read("config")["connector_id"])
	e.write("config", map[string]any{"connector_id": e.connectorID, "connector_secret": "OTHER"})

	e.restart() // a process without the count in memory refuses it too
	_, status, _ = e.try(logical.DeleteOperation, "config", nil)
	assert.Equal(t, 400, status)
	for i := range 12 {
		e.ok(logical.DeleteOperation, fmt.Sprintf("tenants/tenant-%02d", i), nil)
	}
	e.storage.failWith(func(op, key string) error {
		if op == "delete" && key == connectorPrefix+defaultConnector {
			return errStorage
		}
		return nil
	})
	_, status, _ = e.try(logical.DeleteOperation, "config", nil)
	assert.Equal(t, 500, status)
	e.storage.heal()
	_, status, _ = e.try(logical.DeleteOperation, "config", nil)
	assert.Equal(t, 204, status)
	calls, err := e.storage.List(context.Background(), callPrefix)
	require.NoError(t, err)
	assert.Empty(t, calls, "the notes of its calls are deleted too")
	_, status, _ = e.try(logical.DeleteOperation, "config", nil)
	assert.Equal(t, 204, status, "a connector that is not there can be deleted")
}

// Vault asks the engine whether a connector exists before it checks a policy: a write is a create or an update.
func TestExistenceIsTold(t *testing.T) {
	e := newConfiguredEngine(t)
	e.addTenant("acme")
	for path, want := range map[string]bool{"config": true, "config/other": false, "tenants/acme": true, "tenants/other": false} {
		_, exists, err := e.HandleExistenceCheck(context.Background(), &logical.Request{Operation: logical.CreateOperation, Path: path, Storage: e.storage})
		require.NoError(t, err)
		assert.Equal(t, want, exists, path)
	}
}

func TestBadConnectorsAreRefused(t *testing.T) {
	tests := []struct {
		field string
		value any
		says  string
	}{
		{"connector_id", "", "connector_id is required"},
		{"connector_id", "  ", "connector_id is required"},
		{"connector_id", nil, "for an OAuth 2.0 service, give service=oauth2 too"},
		{"connector_id", "a\r\nb", "connector_id"},
		{"connector_id", []any{"a"}, "connector_id does not fit: it has to be a string"},
		{"connector_secret", "", "connector_secret is required"},
		{"connector_secret", "CANARY\nX", "connector_secret"},
		{"connector_secret", `"CANARY"`, "connector_secret stands in quotes; write it without the quotes"},
		{"connector_secret", " 'CANARY'\n", "connector_secret stands in quotes; write it without the quotes"},
		{"connector_secret", "Bearer CANARY", "connector_secret has the word Bearer before it; write it without Bearer"},
		{"connector_secret", []any{"CANARY"}, "connector_secret must be given once, as a string"},
		{"connector_secret", map[string]any{"a": "CANARY"}, "connector_secret must be given once, as a string"},
		{"connector_secret", 12345, "connector_secret must be given once, as a string"},
		{"connector_secret", true, "connector_secret must be given once, as a string"},
		{"api_root", "", "api_root is empty"},
		{"api_root", "http://kaizala.example", "api_root"},
		{"api_root", "ftp://127.0.0.1", "api_root"},
		{"api_root", "https://user:pass@kaizala.example", "api_root"},
		{"api_root", "https://kaizala.example?x=y", "api_root"},
		{"api_root", "no url", "api_root"},
		{"ca_cert", "junk", "ca_cert"},
		{"redirect_hosts", "https://kaiza.la", "redirect_hosts"},
		{"redirect_hosts", map[string]any{"a": "b"}, "redirect_hosts"},
		{"request_timeout", "0s", "request_timeout"},
		{"request_timeout", "-5s", "request_timeout"},
		{"request_timeout", "1500ms", "request_timeout"},
		{"request_timeout", 1.5, "request_timeout has to be a duration of whole seconds"},
		{"request_timeout", "soon", "request_timeout"},
		{"request_timeout", "", "request_timeout"},
		{"exchanges_per_minute", 0, "exchanges_per_minute"},
		{"exchanges_per_minute", -1, "exchanges_per_minute"},
		{"exchanges_per_minute", 1.9, "exchanges_per_minute has to be a whole number"},
		{"exchanges_per_minute", true, "exchanges_per_minute"},
		{"exchanges_per_minute", "0x10", "exchanges_per_minute"},
		{"exchanges_per_minute", "", "exchanges_per_minute"},
		{"exchanges_per_minute", "many", "exchanges_per_minute"},
	}
	e := newEngine(t)
	e.write("config", aConnector)
	before := e.read("config")
	for _, test := range tests {
		t.Run(fmt.Sprintf("%s=%v", test.field, test.value), func(t *testing.T) {
			_, status, text := e.try(logical.UpdateOperation, "config/new", with(aConnector, test.field, test.value))
			assert.Equal(t, 400, status)
			assert.Contains(t, text, test.says)
			assert.NotContains(t, text, "CANARY")
			_, status, _ = e.try(logical.UpdateOperation, "config", map[string]any{test.field: test.value})
			assert.Equal(t, 400, status)
		})
	}
	assert.Equal(t, before, e.read("config"), "the connector is not changed")
	assert.Equal(t, []string{"default"}, e.ok(logical.ListOperation, "config/", nil).Data["keys"])

	_, status, text := e.try(logical.UpdateOperation, "config/"+strings.Repeat("x", 129), aConnector)
	assert.Equal(t, 400, status)
	assert.Contains(t, text, "128 characters")
}

// The engine does not use a configuration that storage does not take, and the answer says so.
func TestConfigThatStorageDoesNotTake(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		e.storage.refuse("put", connectorPrefix)
		_, status, _ := e.try(logical.UpdateOperation, "config", map[string]any{"connector_secret": "another"})
		assert.GreaterOrEqual(t, status, 500)
		e.storage.heal()
		e.read("creds/acme")
	})
}
