package backend

import (
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

func TestOAuthConfigDefaultsAndFields(t *testing.T) {
	e := newOAuthEngine(t, oauth2test.ClassD, map[string]any{"exchanges_per_minute": nil, "revocation_url": nil})
	defaults := map[string]any{
		"service": "oauth2", "connector_id": e.clientID, "ca_cert": "", "request_timeout": int64(15), "exchanges_per_minute": 50,
		"issuer": "", "token_url": e.server.TokenURL(), "revocation_url": "", "authorization_url": "", "device_authorization_url": "",
		"token_endpoint_auth_method": "client_secret_basic", "token_params": map[string]string{}, "authorization_params": map[string]string{},
		"scopes": []string{}, "redirect_uris": []string{}, "endpoint_url_field": "", "access_token_life": int64(3600),
		"refresh_token_life": int64(0), "keep_alive": int64(72 * 3600), "exchange_invalidates": true, "revocation": "none",
		"revoke_on_delete": false, "confirm": true,
	}
	assert.Equal(t, defaults, e.read("config"))
	written := map[string]any{
		"request_timeout": int64(9), "exchanges_per_minute": 70, "revocation_url": e.server.RevocationURL(),
		"authorization_url": "https://as.example.com/authorize", "device_authorization_url": "https://as.example.com/device",
		"token_endpoint_auth_method": "client_secret_post", "token_params": map[string]string{"audience": "x"},
		"authorization_params": map[string]string{"prompt": "consent"}, "redirect_uris": []string{"https://vault.example.com/v1/kaizala/callback"},
		"endpoint_url_field": "instance_url", "access_token_life": int64(60), "refresh_token_life": int64(7200), "keep_alive": int64(300),
		"exchange_invalidates": false, "revocation": "access_token", "revoke_on_delete": true, "confirm": false,
	}
	body := map[string]any{"scopes": []any{"a b", "c,d"}}
	for name, value := range written {
		body[name] = value
	}
	body["token_params"], body["authorization_params"] = map[string]any{"audience": "x"}, "prompt=consent"
	e.write("config", body)
	shown := e.read("config")
	for name, value := range written {
		assert.Equal(t, value, shown[name], name)
	}
	assert.Equal(t, []string{"a", "b", "c", "d"}, shown["scopes"])
	for _, scopes := range []any{"a b,c  d", " a\tb\n, c,,d "} {
		e.write("config", map[string]any{"scopes": scopes})
		assert.Equal(t, []string{"a", "b", "c", "d"}, e.read("config")["scopes"])
	}
	null := map[string]any{}
	for name := range body {
		null[name] = nil
	}
	e.ok(logical.PatchOperation, "config", null)
	assert.Equal(t, defaults, e.read("config"))
}

func TestOAuthConfigRefusals(t *testing.T) {
	e := newOAuthEngine(t, oauth2test.ClassD, nil)
	was := e.read("config")
	for says, body := range map[string]map[string]any{
		"api_root is not a field of a connector with service=oauth2: leave it out": {"api_root": "https://api.kaiza.la"},
		"redirect_hosts is not a field":                                            {"redirect_hosts": "kaiza.la"},
		"service has to be":                                                        {"service": "saml"},
		"token_url":                                                                {"token_url": nil},
		"token_url ":                                                               {"token_url": "http://as.example.com/token"},
		"revocation_url":                                                           {"revocation_url": "https://u:SECRETTEXT@as.example.com/revoke"},
		"authorization_url":                                                        {"authorization_url": "https://as.example.com/#SECRETTEXT"},
		"redirect_uris":                                                            {"redirect_uris": "vault.example.com"},
		"scopes must be of plain ASCII":                                            {"scopes": []any{"read", "SECRETTEXT\""}},
		"token_endpoint_auth_method":                                               {"token_endpoint_auth_method": "private_key_jwt"},
		"secret stands in quotes":                                                  {"connector_secret": "'SECRETTEXT'"},
		"connector_secret must be left":                                            {"token_endpoint_auth_method": "none"},
		"keep_alive":                                                               {"keep_alive": 0},
		"access_token_life":                                                        {"access_token_life": 0},
		"request_timeout has":                                                      {"request_timeout": 0},
		"exchanges_per_minute":                                                     {"exchanges_per_minute": 0},
		"revocation must":                                                          {"revocation": "grant"},
		"revocation cannot be access":                                              {"revocation": "access_token", "revocation_url": nil},
		"revocation cannot be exchange":                                            {"revocation": "exchange", "exchange_invalidates": false},
		"revoke_on_delete":                                                         {"revoke_on_delete": true, "revocation_url": nil},
		"token_params must not hold grant":                                         {"token_params": map[string]any{"grant_type": "SECRETTEXT"}},
		"client_*":                                                                 {"token_params": map[string]any{"Client_Assertion": "SECRETTEXT"}},
		"code_challenge*":                                                          {"authorization_params": map[string]any{"code_challenge_method": "plain"}},
		"authorization_params must not":                                            {"authorization_params": []any{"prompt=consent", "scope=x"}},
		"token_params has to be a map":                                             {"token_params": "SECRETTEXT"},
		"token_params has to":                                                      {"token_params": []any{"a=1", "SECRETTEXT"}},
		"token_params has":                                                         {"token_params": 5},
		"token_params has to be":                                                   {"token_params": "=SECRETTEXT"},
		"authorization_params has to be a":                                         {"authorization_params": []any{"a=1", "=SECRETTEXT"}},
		"revocation does not fit":                                                  {"revocation": 5},
		"connector_id does not fit":                                                {"connector_id": 12345678901234567890.0},
		"token_url does not fit":                                                   {"token_url": true},
		"a map of names to strings":                                                {"token_params": map[string]any{"a": true}},
		"authorization_params has to be":                                           {"authorization_params": map[string]any{"a": nil}},
	} {
		_, code, text := e.try(logical.UpdateOperation, "config", body)
		assert.Equal(t, 400, code, says)
		assert.Contains(t, text, strings.TrimSpace(says))
		assert.NotContains(t, text, "SECRETTEXT")
	}
	assert.Equal(t, was, e.read("config"), "nothing is stored")
	_, code, text := e.try(logical.UpdateOperation, "config/k", map[string]any{"connector_id": "i", "connector_secret": "s", "issuer": "https://as.example.com"})
	assert.Equal(t, 400, code)
	assert.Contains(t, text, "issuer is not a field of a connector with service=kaizala: leave it out, or give the right service with it")

	// A write replaces the whole map; null and {} make it empty; the command line sends a list.
	e.write("config", map[string]any{"token_params": []any{"a=1", "b=x=y,z"}})
	assert.Equal(t, map[string]string{"a": "1", "b": "x=y,z"}, e.read("config")["token_params"])
	e.ok(logical.PatchOperation, "config", map[string]any{"token_params": map[string]any{"c": "3"}})
	assert.Equal(t, map[string]string{"c": "3"}, e.read("config")["token_params"])
	e.ok(logical.PatchOperation, "config", map[string]any{"token_params": map[string]any{}})
	assert.Empty(t, e.read("config")["token_params"])
	e.ok(logical.PatchOperation, "config", map[string]any{"issuer": ""}) // no metadata is read
	// A number of JSON is a float64.
	for _, year := range []any{31536000, 31536000.0, "31536000", "365d"} {
		e.write("config", map[string]any{"refresh_token_life": year})
		assert.EqualValues(t, 31536000, e.read("config")["refresh_token_life"], "%T", year)
	}
	for _, confirm := range []any{false, true, nil} {
		e.ok(logical.PatchOperation, "config", map[string]any{"confirm": confirm, "revoke_on_delete": confirm})
		assert.Equal(t, confirm != false, e.read("config")["confirm"])
		assert.Equal(t, confirm == true, e.read("config")["revoke_on_delete"])
	}

	// A connector's service and connector_id cannot be changed while a tenant uses it.
	e.add("acme", nil)
	for _, body := range []map[string]any{{"service": "kaizala"}, {"connector_id": "another"}} {
		_, code, text := e.try(logical.UpdateOperation, "config", body)
		assert.Equal(t, 400, code)
		assert.Contains(t, text, "acme")
	}
	e.ok(logical.DeleteOperation, "tenants/acme", nil)
	e.write("config", map[string]any{"service": "kaizala"})
	assert.Equal(t, map[string]any{
		"service": "kaizala", "connector_id": e.clientID, "ca_cert": "", "request_timeout": int64(60), "exchanges_per_minute": was["exchanges_per_minute"],
		"api_root": "https://api.kaiza.la", "redirect_hosts": []string{"kaiza.la", "osi.office.net"},
	}, e.read("config"))
}

// A write of a map whose value looks like several parameters is stored as it is, and warns. A JSON object says where a value ends.
func TestParametersThatAreJoinedByCommas(t *testing.T) {
	e := newOAuthEngine(t, oauth2test.ClassD, nil)
	for _, c := range []struct {
		raw    any
		warned bool
	}{
		{"access_type=offline,prompt=SECRETTEXT", true},
		{[]any{"a=1", "access_type=offline, prompt=SECRETTEXT"}, true},
		{[]any{"access_type=offline", "prompt=consent"}, false},
		{"a=1,2,three", false},
		{"a=b=c", false},
		{map[string]any{"a": "1,b=2"}, false},
		{nil, false},
	} {
		for _, name := range []string{"authorization_params", "token_params"} {
			resp := e.ok(logical.PatchOperation, "config", map[string]any{name: c.raw, "scopes": "a=x,b=c"})
			if !c.warned {
				assert.Nil(t, resp, c.raw)
				continue
			}
			require.NotNil(t, resp, c.raw)
			require.Len(t, resp.Warnings, 1, c.raw)
			assert.Contains(t, resp.Warnings[0], "repeat the argument: "+name+"=NAME=VALUE "+name+"=NAME=VALUE")
			assert.NotContains(t, resp.Warnings[0], "SECRETTEXT")
		}
	}
	assert.Equal(t, map[string]string{}, e.read("config")["token_params"])
}

// The operator writes the connector, its owner adds ID and secret.
func TestOAuthConnectorWithoutItsSecret(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassD, map[string]any{"connector_id": nil, "connector_secret": nil})
		token := e.server.Grant(e.clientID, "acme")
		e.write("tenants/acme", map[string]any{"refresh_token": token, "verify": false})
		refused := func(says string) {
			t.Helper()
			for path, data := range map[string]map[string]any{"tenants/acme/refresh": nil, "tenants/new": {"refresh_token": token}} {
				_, code, text := e.try(logical.UpdateOperation, path, data)
				assert.Equal(t, 400, code)
				assert.Contains(t, text, says, path)
			}
			_, code, text := e.try(logical.ReadOperation, "creds/acme", nil)
			assert.Equal(t, 400, code)
			assert.Contains(t, text, says)
		}
		refused("connector_id")
		e.write("config", map[string]any{"connector_id": e.clientID})
		refused("connector_secret")
		e.pass(time.Hour)
		assert.Empty(t, e.server.Calls())
		e.write("config", map[string]any{"connector_secret": e.secret})
		e.lease("acme")
		e.kept()
	})
}

func TestOAuthDiscovery(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, func(o *oauth2test.Options) {
			*o = oauth2test.Options{AuthMethods: []string{"client_secret_post", "none"}, ExchangeInvalidates: true}
		}, map[string]any{"token_url": oauth2test.DefaultURL + "/own", "revocation_url": nil})
		before := e.read("config")
		fails := func(code int, says string, body map[string]any) {
			t.Helper()
			_, got, text := e.try(logical.UpdateOperation, "config", body)
			assert.Equal(t, code, got, text)
			assert.Contains(t, text, says)
			assert.Equal(t, before, e.read("config"), "nothing is stored")
		}
		e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointMetadata, Reset: true})
		fails(503, "", map[string]any{"issuer": e.server.Issuer()})
		e.server.ClearFaults()
		e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointMetadata, Hang: true})
		fails(503, "", map[string]any{"issuer": e.server.Issuer()})
		e.server.ClearFaults()
		e.server.Set(func(o *oauth2test.Options) { o.MetadataIssuer = oauth2test.DefaultURL + "/" })
		fails(400, e.server.Issuer()+"/", map[string]any{"issuer": e.server.Issuer()})
		e.server.Set(func(o *oauth2test.Options) { o.MetadataIssuer = ""; o.Metadata = oauth2test.MetadataOpenID })

		e.write("config", map[string]any{"issuer": e.server.Issuer()})
		shown := e.read("config")
		assert.Equal(t, oauth2test.DefaultURL+"/own", shown["token_url"], "a written address is used in place of that of the metadata")
		assert.Equal(t, e.server.RevocationURL(), shown["revocation_url"])
		assert.Equal(t, e.server.AuthorizationURL(), shown["authorization_url"])
		assert.Equal(t, e.server.DeviceURL(), shown["device_authorization_url"])
		assert.Equal(t, "client_secret_post", shown["token_endpoint_auth_method"])
		calls := len(e.server.Calls())
		e.ok(logical.PatchOperation, "config", map[string]any{"token_url": nil})
		assert.Equal(t, e.server.TokenURL(), e.read("config")["token_url"])
		e.write("config", map[string]any{"revocation": "access_token", "exchange_invalidates": false})
		e.restart()
		assert.Equal(t, e.server.TokenURL(), e.read("config")["token_url"])
		assert.Len(t, e.server.Calls(), calls, "only a write that names issuer reads the metadata")
		before = e.read("config")
		fails(400, "token_url", map[string]any{"issuer": nil})
		e.write("config", map[string]any{"issuer": nil, "token_url": e.server.TokenURL(), "revocation": "none"})
		shown = e.read("config")
		for _, name := range []string{"issuer", "revocation_url", "authorization_url", "device_authorization_url"} {
			assert.Empty(t, shown[name], name)
		}
		assert.Equal(t, "client_secret_basic", shown["token_endpoint_auth_method"])
		assert.Len(t, e.server.Calls(), calls)
		e.system.replication.Store(uint32(consts.ReplicationPerformanceStandby))
		_, _, text := e.try(logical.UpdateOperation, "config", map[string]any{"issuer": e.server.Issuer()})
		assert.Contains(t, text, logical.ErrReadOnly.Error())
		assert.Len(t, e.server.Calls(), calls)
		e.system.replication.Store(0)
		synctest.Wait()
	})
}

// A write of issuer reads the metadata within the share of the connector that is there: while that is used up, the write is refused, and
// nothing is read.
func TestDiscoveryWithinTheShare(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassD, map[string]any{"exchanges_per_minute": 1})
		e.add("acme", nil)
		e.read("creds/acme")
		issuer := map[string]any{"issuer": e.server.Issuer()}
		_, code, text := e.try(logical.UpdateOperation, "config", issuer)
		assert.Equal(t, 429, code)
		assert.Contains(t, text, "the share of calls of the connector is used up")
		assert.Empty(t, e.server.Calls(oauth2test.EndpointMetadata))
		assert.Empty(t, e.read("config")["issuer"], "nothing is stored")
		time.Sleep(time.Minute)
		e.write("config", issuer)
		assert.NotEmpty(t, e.server.Calls(oauth2test.EndpointMetadata))
	})
}

// A write of issuer creates a connector: the answers to a server that is not reached, or that wants no calls, are the same as for a
// connector that is there, and nothing is stored.
func TestDiscoveryForANewConnector(t *testing.T) {
	for status, answer := range map[int]oauth2test.Answer{503: oauth2test.BadGateway, 429: {Status: 429}} {
		bubble(t, func(t *testing.T) {
			e := newOAuthEngine(t, oauth2test.ClassD, nil)
			e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointMetadata, Answer: answer})
			_, code, text := e.try(logical.UpdateOperation, "config/new", map[string]any{"service": "oauth2", "issuer": e.server.Issuer()})
			assert.Equal(t, status, code)
			assert.Contains(t, text, "nothing was stored")
			_, code, _ = e.try(logical.ReadOperation, "config/new", nil)
			assert.Equal(t, 404, code)
		})
	}
}

// A write of issuer waits a few seconds for a place in the connector's share.
func TestDiscoveryWaitsForTheShare(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassD, map[string]any{"exchanges_per_minute": 1})
		e.add("acme", nil)
		e.read("creds/acme")
		time.Sleep(time.Minute - 3*time.Second)
		e.write("config", map[string]any{"issuer": e.server.Issuer(), "exchanges_per_minute": 1})
		assert.NotEmpty(t, e.server.Calls(oauth2test.EndpointMetadata))
	})
}

// Storage does not tell which calls the connector has made: a write of issuer makes none.
func TestDiscoveryWhileStorageFails(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassD, nil)
		e.restart()
		e.storage.refuse("list", callPrefix)
		_, code, _ := e.try(logical.UpdateOperation, "config", map[string]any{"issuer": e.server.Issuer()})
		assert.GreaterOrEqual(t, code, 500)
		assert.Empty(t, e.server.Calls())
	})
}

// The metadata and the tokens of a server whose certificate ca_cert has signed are asked for over TLS, and of no other server.
func TestCACertOfAnOAuthConnector(t *testing.T) {
	server := oauth2test.New()
	ca, stop := server.ListenTLS()
	defer stop()
	id, secret := server.RegisterClient(oauth2test.AuthBasic)
	e := newEngine(t)
	e.stop()
	e.wire = func() http.RoundTripper { return nil } // each connector has its own
	e.start()
	config := map[string]any{"service": "oauth2", "connector_id": id, "connector_secret": secret, "issuer": server.Issuer()}
	_, code, text := e.try(logical.UpdateOperation, "config", config)
	assert.Equal(t, 503, code)
	assert.Contains(t, text, "The operator has to set ca_cert")
	config["ca_cert"] = ca
	e.write("config", config)
	e.write("tenants/acme", map[string]any{"refresh_token": server.Grant(id, "acme")})
	assert.True(t, server.Alive(accessTokenOf(e.ok(logical.ReadOperation, "creds/acme", nil))))
}

// Metadata may leave the token endpoint out: then token_url has to be written, in the same write or before.
func TestIssuerWithoutATokenEndpoint(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassD, nil)
		issuer := e.server.Issuer()
		e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointMetadata, Answer: oauth2test.Answer{Status: 200, Body: `{"issuer":"` + issuer +
			`","revocation_endpoint":"https://as.example.com/revoke","token_endpoint_auth_methods_supported":["client_secret_post"]}`}})
		refused := func(path string, body map[string]any) {
			t.Helper()
			_, code, text := e.try(logical.UpdateOperation, path, body)
			assert.Equal(t, 400, code)
			assert.Contains(t, text, "token_url is missing: the issuer's metadata names no token endpoint, so write token_url beside issuer")
		}
		body := map[string]any{"service": "oauth2", "connector_id": "i", "connector_secret": "s", "issuer": issuer}
		refused("config/new", body)
		_, code, _ := e.try(logical.ReadOperation, "config/new", nil)
		assert.Equal(t, 404, code, "nothing is stored")
		body["token_url"] = "https://as.example.com/token"
		e.write("config/new", body)
		for name, value := range map[string]any{
			"token_url": "https://as.example.com/token", "revocation_url": "https://as.example.com/revoke", "token_endpoint_auth_method": "client_secret_post",
		} {
			assert.Equal(t, value, e.read("config/new")[name], name)
		}
		refused("config/new", map[string]any{"token_url": nil})
		refused("config/new", map[string]any{"token_url": nil, "issuer": issuer})
		assert.Equal(t, "https://as.example.com/token", e.read("config/new")["token_url"], "nothing is stored")

		written := e.read("config")["token_url"] // before issuer is
		e.write("config", map[string]any{"issuer": issuer, "revocation_url": nil, "token_endpoint_auth_method": "client_secret_basic"})
		assert.Equal(t, written, e.read("config")["token_url"])
		assert.Equal(t, "https://as.example.com/revoke", e.read("config")["revocation_url"])
		e.server.ClearFaults()
		e.add("acme", nil)
		e.lease("acme")
	})
}

// Only the files of each kind of service may compare with its name: the rest of the engine works for every kind.
func TestNothingAsksWhichServiceItIs(t *testing.T) {
	files, err := filepath.Glob("*.go")
	require.NoError(t, err)
	more, err := filepath.Glob("share/*.go")
	require.NoError(t, err)
	asks := regexp.MustCompile(`"kaizala"|"oauth2"|\.Service ==|switch .*\.Service\b|backend/kaizala"|backend/oauth2"|kaizalaKind|oauthKind|(kaizala|oauth)Settings`)
	own := map[string]bool{"services.go": true, "service_kaizala.go": true, "service_oauth.go": true}
	checked := 0
	for _, file := range append(files, more...) {
		if strings.HasSuffix(file, "_test.go") || own[file] {
			continue
		}
		text, err := os.ReadFile(file)
		require.NoError(t, err)
		checked++
		for i, line := range strings.Split(string(text), "\n") {
			if asks.MatchString(line) && !strings.Contains(line, `operationPrefix = "kaizala"`) {
				t.Errorf("%s:%d asks which service it is: %s", file, i+1, strings.TrimSpace(line))
			}
		}
	}
	assert.Greater(t, checked, 15)
}

// The least values that a connector takes.
func TestLeastLimits(t *testing.T) {
	e := newOAuthEngine(t, oauth2test.ClassD, nil)
	e.write("config", map[string]any{"request_timeout": "1s", "exchanges_per_minute": 1})
	config := e.read("config")
	assert.EqualValues(t, 1, config["request_timeout"])
	assert.EqualValues(t, 1, config["exchanges_per_minute"])
}
