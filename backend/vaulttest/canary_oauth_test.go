package vaulttest

import (
	"cmp"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// No secret of an OAuth connector is in a place where it must not be: the test plays all flows, at a server that quotes the
// requests in its answers, and then searches every answer, the audit log, the log of Vault and the plugin at trace level, and the
// files of Vault's storage.
func TestNoOAuthSecretTurnsUp(t *testing.T) {
	t.Parallel()
	v := Start(t, WithAudit(), Raft())
	v.MountEngine(t, "canary")
	m := mount{t: t, vault: v, path: "canary", token: v.RootToken, heard: &answers{}}
	server := newAuthServer(t)
	server.Set(func(o *oauth2test.Options) { o.Echo, o.OddSecrets, o.Grace = true, true, time.Hour })
	known := &secrets{all: map[string]string{}}
	callback := v.Addr + "/v1/canary/callback"
	register := func(connector, method string, with fields) (id, secret string) {
		t.Helper()
		id, secret = server.RegisterClient(method, callback, callback+"/"+connector)
		if secret != "" {
			basic := url.QueryEscape(id) + ":" + url.QueryEscape(secret)
			known.add("client secret", secret, url.QueryEscape(secret), base64.StdEncoding.EncodeToString([]byte(basic)))
		}
		config := fields{
			"service": "oauth2", "issuer": server.Issuer(), "connector_id": id, "token_endpoint_auth_method": method,
			"revocation": "access_token", "exchange_invalidates": false, "revoke_on_delete": true, "exchanges_per_minute": 100000,
			"redirect_uris": callback + "/" + connector, "scopes": "offline_access",
		}
		if secret != "" {
			config["connector_secret"] = secret
		}
		for field, value := range with {
			config[field] = value
		}
		m.write("config/"+connector, config).ok(t)
		return id, secret
	}
	id, secret := register("basic", oauth2test.AuthBasic, nil)
	grant := func(user string) string {
		t.Helper()
		token := server.Grant(id, user)
		known.add("refresh token", token)
		return token
	}
	write := func(tenant string, with fields) {
		t.Helper()
		body := fields{"connector": "basic", "refresh_token": grant(tenant)}
		for field, value := range with {
			body[field] = value
		}
		m.write("tenants/"+tenant, body).ok(t)
	}
	// fail injects each fault at an endpoint in turn, with all secrets in the answers, and calls try each time.
	fail := func(endpoint oauth2test.Endpoint, user string, try func()) {
		t.Helper()
		current := cmp.Or(server.CurrentRefreshToken(user), server.CurrentRefreshToken("acme"))
		known.add("refresh token", current)
		bodies := []string{
			secret + " " + current,
			fmt.Sprintf(`{"error":%q,"error_description":%q,"error_uri":"https://example.com/%s"}`, current, secret, current),
			fmt.Sprintf(`{"error":"invalid_request","error_description":%q,"message":%q}`, secret+" "+current, current),
			"error=" + url.QueryEscape(current) + "&error_description=" + url.QueryEscape(secret),
			fmt.Sprintf(`{"ok":false,"error":%q}`, current),
		}
		for _, status := range []int{200, 307, 400, 401, 403, 500, 503} {
			for _, body := range bodies {
				server.Inject(oauth2test.Fault{Endpoint: endpoint, User: user, Times: 1, Answer: oauth2test.Answer{Status: status, Body: body, Header: http.Header{
					"Www-Authenticate": {`Basic realm="` + url.QueryEscape(secret) + `", error="` + current + `"`},
					"Location":         {server.Issuer() + "/" + current},
				}}})
				try()
				server.ClearFaults()
			}
		}
		for _, fault := range []oauth2test.Fault{{Reset: true}, {Truncate: true}, {Process: true, Reset: true}, {Process: true, Answer: oauth2test.HTML}} {
			fault.Endpoint, fault.User, fault.Times = endpoint, user, 2
			server.Inject(fault)
			try()
			server.ClearFaults()
		}
	}
	// healed ends the effects of the failures.
	healed := func(tenant string) {
		t.Helper()
		m.write("config/basic", fields{"connector_secret": secret}).ok(t)
		m.write("tenants/"+tenant, fields{"refresh_token": grant(tenant)}).ok(t)
	}

	// The normal flows, with each way of client authentication.
	write("acme", fields{"ttl": "10m"})
	creds := m.read("creds/acme").ok(t)
	m.read("token/acme").ok(t)
	m.renew(creds.lease(), 15*time.Minute).ok(t)
	m.sys(http.MethodPut, "sys/leases/lookup", fields{"lease_id": creds.lease()}).ok(t)
	m.write("tenants/acme/refresh", nil).ok(t)
	m.revoke(creds.lease())
	m.revoke(m.read("creds/acme").ok(t).lease())
	write("own", fields{"token_per_lease": true})
	m.revoke(m.read("creds/own").ok(t).lease())
	left := m.read("creds/own").ok(t)
	for _, method := range []string{oauth2test.AuthPost, oauth2test.AuthNone} {
		other, _ := register(method, method, nil)
		token := server.Grant(other, method)
		known.add("refresh token", token)
		m.write("tenants/"+method, fields{"connector": method, "refresh_token": token}).ok(t)
		m.revoke(m.read("creds/" + method).ok(t).lease())
	}

	// A person connects tenants, or refuses.
	start := func(tenant string) (code url.Values) {
		t.Helper()
		to := m.write("tenants/"+tenant+"/authorize", fields{"connector": "basic"}).ok(t).text("authorization_url")
		back, err := server.Approve(to, tenant)
		require.NoError(t, err)
		u, err := url.Parse(back)
		require.NoError(t, err)
		known.add("code", u.Query().Get("code"))
		known.add("state", u.Query().Get("state"))
		return u.Query()
	}
	body := func(q url.Values, with fields) fields {
		all := fields{"code": q.Get("code"), "state": q.Get("state")}
		for field, value := range with {
			all[field] = value
		}
		return all
	}
	nobody := m.as("")
	back := start("browser")
	page, err := nobody.send(http.MethodGet, "canary/callback/basic?"+back.Encode(), "", nil)
	require.NoError(t, err)
	page.ok(t)
	nobody.write("callback/basic", body(back, fields{"page": "1"})).ok(t)
	m.read("creds/browser").ok(t)
	require.Equal(t, 400, nobody.write("callback/basic", body(back, nil)).status)
	nobody.write("callback/basic", body(start("pasted"), nil)).ok(t)
	m.read("tenants/pasted/authorize").ok(t)
	for _, bad := range []fields{{"code": []string{"x"}}, {"state": fields{"a": "b"}}, {"iss": "https://elsewhere.example.com"}, {"code": "wrong"}} {
		nobody.write("callback/basic", body(start("pasted"), bad))
		m.read("tenants/pasted/authorize").ok(t)
	}
	fail(oauth2test.EndpointToken, "failing", func() {
		nobody.write("callback/basic", body(start("failing"), nil))
		m.read("tenants/failing/authorize").ok(t)
		m.write("config/basic", fields{"connector_secret": secret}).ok(t)
	})
	device := m.write("tenants/device/device", fields{"connector": "basic"}).ok(t)
	require.NoError(t, server.ApproveDevice(device.text("user_code"), "device"))
	Eventually(t, "the engine's poll", func() bool { return m.read("tenants/device/device").ok(t).text("status") == "granted" })
	m.read("creds/device").ok(t)

	// Failures of exchanges and revocations.
	fail(oauth2test.EndpointToken, "acme", func() {
		m.write("tenants/acme/refresh", nil)
		m.read("creds/acme")
		m.read("tenants/acme").ok(t)
		m.write("config/basic", fields{"connector_secret": secret}).ok(t)
	})
	healed("acme")
	fail(oauth2test.EndpointRevocation, "acme", func() {
		if a := m.read("creds/acme"); a.status == 200 {
			m.revoke(a.lease())
		}
		m.read("tenants/acme").ok(t)
		m.read("config/basic").ok(t)
		m.write("config/basic", fields{"connector_secret": secret}).ok(t)
	})
	healed("acme")
	fail(oauth2test.EndpointMetadata, "", func() { m.write("config/basic", fields{"issuer": server.Issuer()}) })
	healed("acme")

	// Refusals of the refresh token and of the connector, and invalid values.
	m.write("config/wrong", fields{
		"service": "oauth2", "token_url": server.TokenURL(), "connector_id": id, "connector_secret": "WRONG SECRET 0815",
	}).ok(t)
	known.add("client secret", "WRONG SECRET 0815", "WRONG+SECRET+0815")
	m.write("tenants/wrong", fields{"connector": "wrong", "refresh_token": grant("wrong")}).refused(t, 400)
	m.write("tenants/wrong", fields{"connector": "wrong", "refresh_token": grant("wrong"), "verify": false}).ok(t)
	m.read("creds/wrong").refused(t, 400)
	m.read("config/wrong").ok(t)

	// A server sends a further answer that was not asked for, and one that is longer than it says.
	known.add("access token", "CANARY-ACCESS-TOKEN")
	known.add("refresh token", "CANARY-REFRESH-TOKEN")
	tokens := `{"access_token":"CANARY-ACCESS-TOKEN","refresh_token":"CANARY-REFRESH-TOKEN","token_type":"Bearer","expires_in":3600}`
	for name, answers := range map[string]string{
		"twice": strings.Repeat(fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(tokens), tokens), 2),
		"long":  "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n" + tokens,
	} {
		odd := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			conn, _, err := w.(http.Hijacker).Hijack()
			if err != nil {
				return
			}
			_, _ = conn.Write([]byte(answers))
			time.Sleep(100 * time.Millisecond)
			_ = conn.Close()
		}))
		t.Cleanup(odd.Close)
		m.write("config/"+name, fields{"service": "oauth2", "token_url": odd.URL, "connector_id": "odd", "connector_secret": "odd"}).ok(t)
		m.write("tenants/"+name, fields{"connector": name, "refresh_token": grant(name)})
	}
	m.read("tenants/wrong").ok(t)
	write("withdrawn", nil)
	server.Withdraw("withdrawn")
	m.write("tenants/withdrawn/refresh", nil).refused(t, 400)
	m.read("tenants/withdrawn").ok(t)
	m.read("creds/withdrawn")
	for _, bad := range []fields{
		{"refresh_token": grant("acme") + "\r\nX: y"}, {"refresh_token": []string{grant("acme")}}, {"refresh_token": grant("acme"), "ttl": "abc"},
		{"refresh_token": fields{"a": grant("acme")}},
	} {
		m.write("tenants/acme", bad).refused(t, 400)
	}
	for _, bad := range []fields{
		{"connector_secret": fields{"a": secret}}, {"connector_secret": []string{secret}}, {"connector_secret": secret, "token_url": "http://example.com/"},
		{"token_params": fields{"client_secret": secret}}, {"token_params": fields{"audience": []string{secret}}}, {"token_params": secret},
		{"authorization_params": fields{"state": secret}},
	} {
		m.write("config/basic", bad).refused(t, 400)
	}
	m.list("tenants").ok(t)
	m.list("config").ok(t)

	// Deletes with a revocation that fails, a reload, a seal, a kill, and the end of the service.
	server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointRevocation, Answer: oauth2test.BadGateway})
	m.delete("tenants/browser").ok(t)
	m.revoke(left.lease())
	v.Reload(t)
	m.read("token/acme").ok(t)
	v.Seal(t)
	v.Unseal(t)
	m.read("token/acme").ok(t)
	v.Restart(t)
	Eventually(t, "the engine to serve", func() bool { return m.read("token/acme").status == 200 })
	m.read("config/basic").ok(t)
	server.ClearFaults()
	Eventually(t, "nothing to be pending", func() bool { return m.read("config/basic").ok(t).data()["pending_revocations"] == nil })
	server.Inject(oauth2test.Fault{Reset: true})
	m.write("tenants/acme/refresh", nil)
	m.read("tenants/acme").ok(t)
	v.Unmount(t, "canary")

	// Every token that the service has issued or received is a secret.
	for _, c := range server.Calls() {
		for what, token := range map[string]string{"access token": c.AccessToken, "refresh token": c.RefreshToken} {
			if token != "" {
				known.add(what, token)
			}
		}
	}
	counted := map[string]int{}
	for _, what := range known.all {
		counted[what]++
	}
	t.Logf("%d answers were searched for %v", len(m.heard.list()), counted)
	require.Greater(t, counted["access token"], 50)
	require.Greater(t, counted["refresh token"], 50)

	for _, a := range m.heard.list() {
		vended := strings.HasPrefix(a.request, "GET canary/creds/") || strings.HasPrefix(a.request, "GET canary/token/")
		starts := strings.HasSuffix(a.request, "/authorize") && !strings.HasPrefix(a.request, "GET")
		for _, what := range known.in(a.body) {
			// The page that asks for confirmation has code and state in its form.
			form := (what == "code" || what == "state") && strings.HasPrefix(a.request, "GET canary/callback")
			if !(vended && what == "access token" || starts && what == "state" || form) {
				t.Errorf("%s: the answer holds a %s: %s", a.request, what, a.body)
			}
		}
	}
	require.NotEmpty(t, v.Audit())
	for line := range strings.Lines(v.Audit()) {
		// Vault writes the query of a callback in clear, and nothing else of the callback.
		var entry struct {
			Request map[string]any `json:"request"`
		}
		require.NoError(t, json.Unmarshal([]byte(line), &entry))
		uri, _ := entry.Request["request_uri"].(string)
		if strings.HasPrefix(uri, "/v1/canary/callback/basic?") {
			escaped, err := json.Marshal(uri)
			require.NoError(t, err)
			line = strings.ReplaceAll(line, string(escaped), `""`)
		}
		if found := known.in(line); found != nil {
			t.Errorf("the audit log holds a %s: %s", strings.Join(found, " and a "), line)
		}
	}
	require.NotEmpty(t, v.Logs())
	for line := range strings.Lines(v.Logs()) {
		if found := known.in(line); found != nil {
			t.Errorf("the log holds a %s: %s", strings.Join(found, " and a "), line)
		}
	}
	require.NotContains(t, v.Logs(), "panic")
	keys := false
	require.NoError(t, filepath.WalkDir(filepath.Join(v.Dir, "data"), func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		raw, err := os.ReadFile(path)
		if err == nil && len(raw) > 0 {
			keys = keys || strings.Contains(string(raw), "core/seal-config")
			if found := known.in(string(raw)); found != nil {
				t.Errorf("%s holds a %s", path, strings.Join(found, " and a "))
			}
		}
		return err
	}))
	require.True(t, keys, "these are the files of the storage: keys are not encrypted")
}
