package vaulttest

import (
	"encoding/json"
	"net/http"
	"net/url"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// grantMount is an engine with Kaizala and an authorization server, on a Vault whose listener adds its own headers.
func grantMount(t *testing.T, path string, opts ...Option) (m mount, server *oauth2test.Server, secret string) {
	t.Helper()
	v := Start(t, append(opts, WithConfig(func(config map[string]any) {
		config["raw_storage_endpoint"] = true
		config["listener"].(map[string]any)["tcp"].(map[string]any)["custom_response_headers"] = map[string]any{
			"default": map[string]any{"X-Frame-Options": []string{"DENY"}},
		}
	}))...)
	v.RegisterEngine(t)
	m = configuredEngine(t, v, path)
	server = newAuthServer(t)
	callback := v.Addr + "/v1/" + path + "/callback"
	id, secret := server.RegisterClient(oauth2test.AuthBasic, callback)
	m.write("config/as", fields{
		"service": "oauth2", "issuer": server.Issuer(), "connector_id": id, "connector_secret": secret, "exchanges_per_minute": 6000,
		"redirect_uris": callback, "scopes": "openid,offline_access", "revocation": "access_token", "exchange_invalidates": false,
	}).ok(t)
	return m, server, secret
}

// No refresh token, access token, code, verifier, device code, PIN or phone number is in an answer, a page, a status, the log or
// the audit log after any flow of a grant, with one exception: Vault writes the query of a callback, with code and state, into
// the audit log in clear.
func TestGrantsTellNothing(t *testing.T) {
	t.Parallel()
	m, server, clientSecret := grantMount(t, "canary", WithAudit())
	server.Set(func(o *oauth2test.Options) { o.Echo = true })
	known := &secrets{all: map[string]string{}}
	known.add("connector secret", m.connectorSecret, clientSecret)
	mounts, err := m.vault.Client.Logical().Read("sys/mounts/canary")
	require.NoError(t, err)
	stored := mounts.Data["uuid"].(string)
	inClear := fields{}
	for kind, keys := range keysInClear(t) {
		inClear[kind] = keys
	}
	require.Equal(t, 204, m.sys(http.MethodPut, "sys/mounts/canary/tune", inClear).status)
	outside := m.as("")

	// look reads the secrets of a pending attempt from storage.
	look := func() {
		t.Helper()
		raw, err := m.vault.Client.Logical().Read("sys/raw/logical/" + stored + "/attempts/tenants/acme")
		require.NoError(t, err)
		var all struct {
			Last map[string]struct {
				Verifier, Code string
				DeviceCode     string `json:"device_code"`
				MobileNumber   string `json:"mobile_number"`
			}
		}
		require.NoError(t, json.Unmarshal([]byte(raw.Data["value"].(string)), &all))
		for _, a := range all.Last {
			for what, text := range map[string]string{"verifier": a.Verifier, "code": a.Code, "device code": a.DeviceCode, "phone number": strings.TrimPrefix(a.MobileNumber, "+")} {
				if text != "" {
					known.add(what, text)
				}
			}
		}
		for _, user := range []string{"asha", "ravi"} {
			if token := server.CurrentRefreshToken(user); token != "" {
				known.add("refresh token", token)
			}
			for _, token := range server.AccessTokens(user) {
				known.add("access token", token)
			}
		}
	}
	by := fields{"connector": "as"}
	// back returns the parameters of the redirect after the person has consented.
	back := func() url.Values {
		t.Helper()
		to, err := server.Approve(m.write("tenants/acme/authorize", by).ok(t).text("authorization_url"), "asha")
		require.NoError(t, err)
		u, err := url.Parse(to)
		require.NoError(t, err)
		known.add("code", u.Query().Get("code"))
		known.add("state", u.Query().Get("state"))
		look()
		return u.Query()
	}
	open := func(query url.Values) answer {
		t.Helper()
		a := outside.read("callback?" + query.Encode())
		look()
		return a
	}
	press := func(query url.Values, page answer) {
		t.Helper()
		form := url.Values{"page": {"1"}, "state": query["state"], "confirmation": {confirmationIn(page.body)}}
		_, err := outside.send(http.MethodPost, "canary/callback", form.Encode(), http.Header{"Content-Type": {"application/x-www-form-urlencoded"}})
		require.NoError(t, err)
		look()
	}

	// The code flow: valid, repeated, pasted, forged, denied, failed, and with invalid fields.
	for _, change := range []func(url.Values){
		func(url.Values) {},
		func(q url.Values) { q.Set("code", "forged-canary-code") },
		func(q url.Values) { q.Set("iss", "https://elsewhere.example/canary-issuer") },
		func(q url.Values) { q.Del("code"); q.Set("error", "access_denied") },
		func(q url.Values) { q.Del("code"); q.Set("error", "canary-error") },
		func(q url.Values) { q.Add("code", "second-canary-code") },
		func(url.Values) { server.Inject(oauth2test.Fault{Answer: oauth2test.InvalidGrant, Times: 1}) },
		func(url.Values) { server.Inject(oauth2test.Fault{Truncate: true, Process: true, Times: 1}) },
	} {
		query := back()
		change(query)
		known.add("code", "forged-canary-code", "second-canary-code")
		known.add("error", "canary-error", "canary-issuer")
		for range 2 {
			press(query, open(query))
		}
		m.read("tenants/acme/authorize").ok(t)
		m.read("tenants/acme")
	}
	query := back()
	for _, wrong := range []fields{{"state": query["state"]}, {"state": query.Get("state"), "code": query["code"]}, {"state": query.Get("state"), "page": query.Get("code")}} {
		require.Equal(t, 400, outside.write("callback", wrong).status)
	}
	outside.write("callback", fields{"state": query.Get("state"), "code": query.Get("code")}).ok(t)
	look()

	// The device flow.
	for _, decide := range []func(string) error{func(code string) error { return server.ApproveDevice(code, "ravi") }, server.DenyDevice} {
		code := m.write("tenants/acme/device", by).ok(t).text("user_code")
		look()
		require.NoError(t, decide(code))
		Eventually(t, "the poll", func() bool { return m.read("tenants/acme/device").ok(t).text("status") != "pending" })
		look()
	}

	// The PIN login.
	number := m.kaizala.PhoneNumber("ravi")
	m.write("tenants/acme/pin", fields{"mobile_number": number, "connector": "default"}).ok(t)
	look()
	pin := m.kaizala.PIN(m.connectorID, "ravi")
	known.add("PIN", pin, "canary-PIN")
	for _, wrong := range []any{"canary-PIN", []string{"canary-PIN"}, fields{"a": pin}} {
		require.Equal(t, 400, m.write("tenants/acme/pin", fields{"pin": wrong}).status)
	}
	require.Equal(t, 400, m.write("tenants/acme/pin", fields{"mobile_number": []string{number}}).status)
	m.write("tenants/acme/pin", fields{"pin": pin}).ok(t)
	known.add("refresh token", m.kaizala.CurrentRefreshToken("ravi"))
	m.read("tenants/acme").ok(t)
	m.delete("tenants/acme").ok(t)

	kinds := map[string]bool{}
	for _, what := range known.all {
		kinds[what] = true
	}
	require.Len(t, kinds, 10, "%v", kinds)

	for _, a := range m.heard.list() {
		for _, what := range known.in(a.body) {
			shown := what == "state" && (strings.Contains(a.body, "authorization_url") || strings.Contains(a.body, `name="state"`))
			require.True(t, shown, "%s: the answer holds a %s: %s", a.request, what, a.body)
		}
	}
	for line := range strings.Lines(m.vault.Logs()) {
		require.Empty(t, known.in(line), "the log")
	}
	inQuery := 0
	for line := range strings.Lines(m.vault.Audit()) {
		entry := map[string]any{}
		require.NoError(t, json.Unmarshal([]byte(line), &entry))
		request, _ := entry["request"].(map[string]any)
		if uri, _ := request["request_uri"].(string); strings.HasPrefix(uri, "/v1/canary/callback?") {
			require.Subset(t, []string{"code", "state", "error"}, known.in(line))
			inQuery++
			delete(request, "request_uri")
		}
		rest, err := json.Marshal(entry)
		require.NoError(t, err)
		require.Empty(t, known.in(string(rest)), "%s", rest)
	}
	require.Positive(t, inQuery)
}

// Requests that a client without a Vault token can make at the callback, on a real Vault.
func TestCallbackFromOutside(t *testing.T) {
	t.Parallel()
	m, server, _ := grantMount(t, "outside")
	outside := m.as("")
	to, err := server.Approve(m.write("tenants/acme/authorize", fields{"connector": "as"}).ok(t).text("authorization_url"), "asha")
	require.NoError(t, err)
	u, err := url.Parse(to)
	require.NoError(t, err)
	path := "outside/callback?" + u.RawQuery
	both := fields{"state": u.Query().Get("state"), "code": u.Query().Get("code")}
	server.ResetCalls()

	for name, c := range map[string]struct {
		method, path string
		data         fields
		status       int
	}{
		"a read that asks to complete":  {http.MethodGet, path + "&page=1", nil, 200}, // the answer is the page that asks for confirmation
		"the head of a page":            {http.MethodHead, path, nil, 405},
		"a write without a body":        {http.MethodPut, path, nil, 400},
		"a form whose fields are asked": {http.MethodPut, path + "&page=1", fields{}, 400},
		"a delete":                      {http.MethodDelete, path, nil, 405},
		"a list":                        {"LIST", path, nil, 404},
		"a patch":                       {http.MethodPatch, path, both, 405},
		"another connector's":           {http.MethodGet, "outside/callback/as?" + u.RawQuery, nil, 400},
		"one that is not there":         {http.MethodGet, "outside/callback/none?" + u.RawQuery, nil, 400},
		"a connector in the body":       {http.MethodPut, "outside/callback/as", fields{"state": both["state"], "code": both["code"], "connector": ""}, 400},
		"below":                         {http.MethodGet, "outside/callback/as/more?" + u.RawQuery, nil, 404},
		"nothing":                       {http.MethodGet, "outside/callback", nil, 400},
		"the tenant":                    {http.MethodGet, "outside/tenants/acme", nil, 403},
		"the attempt":                   {http.MethodGet, "outside/tenants/acme/authorize", nil, 403},
		"its start":                     {http.MethodPut, "outside/tenants/acme/authorize", fields{}, 403},
	} {
		a := outside.request(c.method, c.path, c.data, nil)
		require.Equal(t, c.status, a.status, "%s: %s", name, a.body)
	}
	require.Empty(t, server.Calls(), "none of these requests causes a call")
	require.Equal(t, "pending", m.read("tenants/acme/authorize").ok(t).text("status"))

	// A request for wrapping, without a token, stores nothing: Vault would store a wrapped answer.
	before := wrappingTokens(t, m)
	wrap := http.Header{"X-Vault-Wrap-Ttl": {"60"}}
	for _, query := range []string{"", "?" + u.RawQuery, "?state=unknown"} {
		require.Equal(t, 400, outside.request(http.MethodGet, "outside/callback"+query, nil, wrap).status)
	}
	for _, data := range []fields{{}, both, {"state": []string{"x"}}} {
		a := outside.request(http.MethodPut, "outside/callback", data, wrap)
		require.Equal(t, 400, a.status)
		require.Empty(t, a.parsed().WrapInfo.Token)
	}
	require.Equal(t, before, wrappingTokens(t, m))
	require.Empty(t, server.Calls())

	// The page has the listener's headers and those of the engine.
	resp, err := m.vault.http.Get(m.vault.Addr + "/v1/" + path)
	require.NoError(t, err)
	require.NoError(t, resp.Body.Close())
	require.Equal(t, []string{"DENY"}, resp.Header["X-Frame-Options"])
	require.Equal(t, []string{"no-store"}, resp.Header["Cache-Control"])
	require.Equal(t, []string{"text/html; charset=utf-8"}, resp.Header["Content-Type"])

	// Ten requests with one state at the same time: one code is sent, and one request succeeds.
	statuses := make(chan int, 10)
	for range cap(statuses) {
		go func() {
			a, _ := outside.send(http.MethodPut, "outside/callback", `{"state":"`+u.Query().Get("state")+`","code":"`+u.Query().Get("code")+`"}`, nil)
			statuses <- a.status
		}()
	}
	count := map[int]int{}
	for range cap(statuses) {
		count[<-statuses]++
	}
	require.Equal(t, map[int]int{200: 1, 400: 9}, count)
	require.Len(t, server.Calls(oauth2test.EndpointToken), 1)
	require.Equal(t, "granted", m.read("tenants/acme/authorize").ok(t).text("status"))
	m.read("creds/acme").ok(t)
}

// wrappingTokens counts the tokens in Vault's storage, wrapping tokens included.
func wrappingTokens(t *testing.T, m mount) int {
	t.Helper()
	keys, _ := m.sys("LIST", "sys/raw/sys/token/id", nil).ok(t).data()["keys"].([]any)
	require.NotEmpty(t, keys)
	return len(keys)
}
