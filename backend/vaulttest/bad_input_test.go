package vaulttest

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/kaizala/kaizalatest"
)

// badInput is a request that is refused.
type badInput struct {
	name   string
	method string // "": PUT
	path   string
	body   fields
	raw    string // sent in place of body: no JSON, or JSON that fields cannot express
	form   bool   // raw is a form
	status int    // 0: 400
	// says are parts of the error's text: the wrong field or name.
	says []string
}

// inputCanary is in each secret of these requests, so that the test can search for it.
const inputCanary = "CANARY"

// Bad input gets a clear 4xx, never a 500, and changes nothing. The requests are made
// with HTTP, because client libraries refuse many of them.
func TestBadInput(t *testing.T) {
	v := Start(t, WithAudit())
	v.RegisterEngine(t)

	t.Run("before any connector", func(t *testing.T) {
		m := mountEngine(t, v, "empty")
		m.write("tenants/acme", fields{"refresh_token": m.kaizala.GenerateUserToken(m.connectorID, "acme")}).refused(t, 400, `"default"`, "config")
		m.write("tenants/acme", fields{"refresh_token": "x", "connector": "hr"}).refused(t, 400, `"hr"`, "config/hr")
		m.write("tenants/acme", fields{}).refused(t, 400, "refresh_token")
		m.write("tenants/acme", nil).refused(t, 400, "refresh_token")
		m.write("tenants/acme", fields{"ttl": "1h"}).refused(t, 400, "refresh_token")
		m.write("config", fields{}).refused(t, 400, "connector_id")
		m.write("config", nil).refused(t, 400, "connector_id")
		m.write("config", fields{"connector_id": "id"}).refused(t, 400, "connector_secret")
		m.write("config", fields{"connector_secret": "CANARYALONE"}).refused(t, 400, "connector_id")
		m.write("config/hr", fields{"api_root": "https://api.kaiza.la"}).refused(t, 400, "connector_id")
		require.Equal(t, 404, m.list("config").status)
		require.Equal(t, 404, m.list("tenants").status)
		require.Zero(t, m.kaizala.CallCount())
	})

	m := configuredEngine(t, v, "bad")
	m.write("config/hr", m.connector()).ok(t)
	m.addTenant("acme", fields{"ttl": "1h", "max_ttl": "2h"})
	m.addTenant("long", fields{"connector": "hr"})
	m.read("creds/acme").ok(t)
	otherID, _ := m.kaizala.RegisterConnector()
	good := m.kaizala.GenerateUserToken(m.connectorID, "spare")
	long := strings.Repeat("n", 200)

	config := func(field string, value any) badInput {
		return badInput{name: fmt.Sprintf("%s: %.40s", field, fmt.Sprint(value)), path: "config", body: fields{field: value}, says: []string{field}}
	}
	tenant := func(field string, value any) badInput {
		return badInput{name: fmt.Sprintf("%s: %.40s", field, fmt.Sprint(value)), path: "tenants/acme", body: fields{field: value}, says: []string{field}}
	}
	var cases []badInput
	add := func(more ...badInput) { cases = append(cases, more...) }

	// config: bad values of each field.
	for field, values := range map[string][]any{
		"connector_id": {
			"", " ", nil, "a\r\nb", "a\nrefreshToken: b", "a\x00b", "idé", long + long, []any{"CANARYID"}, fields{"CANARYKEY": 1},
		},
		"connector_secret": {
			"", "  ", nil, "CANARY\r\nX-Evil: 1", "CANARY\nB", "CANARY\x00B", "CANARYé", strings.Repeat("CANARY", 50), strings.Repeat("CANARY", 150_000),
			[]any{"CANARYLIST"}, []any{}, fields{"a": "CANARYOBJECT"}, fields{}, 4711471147114711, 4711.5, true, false,
		},
		"api_root": {
			"", " ", "kaiza.la", "http://api.kaiza.la", "http://127.0.0.1.example.com", "http://0.0.0.0:80", "https://user:CANARYPASS@api.kaiza.la",
			"https://user@api.kaiza.la", "ftp://api.kaiza.la", "https://", "https:///path", "https://api.kaiza.la:99999", "https://api.kaiza.la?q=1",
			"https://api.kaiza.la/#f", "file:///etc/passwd", "unix:///tmp/x", "https://api kaiza.la", "https://api.ka\r\niza.la", "javascript:alert(1)",
			"https://" + strings.Repeat("a.", 2000) + "la", []any{"https://api.kaiza.la", "https://x"}, fields{"url": "https://api.kaiza.la"}, true, 7,
		},
		"ca_cert": {
			"junk", "-----BEGIN CERTIFICATE-----\nCANARY\n-----END CERTIFICATE-----", "-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n",
			"-----BEGIN PRIVATE KEY-----\nCANARYKEY\n-----END PRIVATE KEY-----", []any{"a", "b"}, fields{"pem": "x"}, 12,
		},
		"redirect_hosts": {
			"https://kaiza.la", "kaiza.la/path", "kaiza.la:443", "*.kaiza.la", "*", "127.0.0.1", "a..b", "kaiza la", []any{"kaiza.la", "*"},
			[]any{"ok.example", fields{"host": "x"}}, fields{"host": "kaiza.la"}, "kaiza.la\r\n.evil", []any{long + "." + long}, 5, true,
		},
		"request_timeout": {"", " ", "abc", -5, "-5s", 0, "0s", "500ms", "1.5s", 0.5, true, []any{}, []any{"60s", "30s"}, fields{"s": 1}, "9223372036854775807", 1e300, "1e3"},
		"exchanges_per_minute": {
			"", 0, -1, 1.9, true, false, "0x10", "abc", " ", "1.5", "50/min", []any{50}, []any{}, fields{"n": 50}, "-1", "0", 1e30, "99999999999999999999",
		},
	} {
		for _, value := range values {
			add(config(field, value))
		}
	}
	// tenants: bad values of each field.
	for field, values := range map[string][]any{
		"refresh_token": {
			"", " \n", nil, "CANARY\r\nX-Evil: 1", "CANARY\nB", "CANARY\x00B", "CANARY\u200bB", "CANARY" + strings.Repeat("x", 17<<10), strings.Repeat("CANARY", 150_000),
			[]any{"CANARYLIST"}, []any{}, []any{"CANARYONE", "CANARYTWO"}, fields{"a": "CANARYOBJECT"}, fields{}, 4711471147114711, -1, true, false,
		},
		"connector": {"", "absent", "hr/../default", "a..b", "HR", []any{"hr", "default"}, fields{"name": "hr"}, long, true},
		"ttl":       {"", "abc", -5, "-5s", "500ms", "1.5s", 0.5, true, "3h", 10801, []any{}, []any{"1h", "2h"}, fields{"s": 1}, "9223372036854775807", 1e300},
		"max_ttl":   {"", "abc", -5, "-1h", "500ms", 0.5, true, "30m", []any{"1h", "2h"}, fields{"s": 1}, "9223372036854775807"},
		"min_ttl":   {"", "abc", -5, "-1m", "1500ms", 1.5, false, []any{"1h", "2h"}, fields{"s": 1}, "9223372036854775807"},
		"verify":    {"", "maybe", " ", "yes please", []any{true, false}, fields{"v": true}},
	} {
		for _, value := range values {
			add(tenant(field, value))
		}
	}
	add(
		badInput{name: "expired token", path: "tenants/acme", body: fields{"refresh_token": jwt(m.connectorID, -time.Hour)}, says: []string{"refresh_token", "expired"}},
		badInput{name: "expired token unverified", path: "tenants/fresh", body: fields{"refresh_token": jwt(m.connectorID, -time.Hour), "verify": false}, says: []string{"refresh_token", "expired"}},
		badInput{name: "another connector's token", path: "tenants/acme", body: fields{"refresh_token": m.kaizala.GenerateUserToken(otherID, "x")}, says: []string{"refresh_token", `"default"`, "another connector"}},
		badInput{name: "another connector's token unverified", path: "tenants/fresh", body: fields{"refresh_token": jwt(otherID, time.Hour), "verify": false}, says: []string{"refresh_token", "another connector"}},
		badInput{name: "good token with a bad ttl", path: "tenants/acme", body: fields{"refresh_token": good, "ttl": "abc"}, says: []string{"ttl"}},
		badInput{name: "good token with ttl over max_ttl", path: "tenants/fresh", body: fields{"refresh_token": good, "ttl": "2h", "max_ttl": "1h"}, says: []string{"ttl", "max_ttl"}},
		badInput{name: "good secret with a bad api_root", path: "config", body: fields{"connector_secret": "CANARYGOOD", "api_root": "http://api.kaiza.la"}, says: []string{"api_root", "https"}},
		badInput{name: "connector_id of a connector in use", path: "config/hr", body: fields{"connector_id": "another"}, says: []string{"connector_id", `"hr"`, "long"}},
		badInput{name: "unknown connector", path: "tenants/acme", body: fields{"connector": "absent"}, says: []string{`"absent"`, "config/absent"}},
		badInput{name: "patch of ttl over max_ttl", method: "PATCH", path: "tenants/acme", body: fields{"ttl": "3h"}, says: []string{"ttl"}},
		badInput{name: "patch with junk", method: "PATCH", path: "config", body: fields{"exchanges_per_minute": 0}, says: []string{"exchanges_per_minute"}},
		badInput{name: "patch of a secret with a list", method: "PATCH", path: "config", body: fields{"connector_secret": []any{"CANARYPATCH"}}, says: []string{"connector_secret"}},
		badInput{name: "patch of a token with an object", method: "PATCH", path: "tenants/acme", body: fields{"refresh_token": fields{"x": "CANARYPATCH"}}, says: []string{"refresh_token"}},
		badInput{name: "patch of a token to null", method: "PATCH", path: "tenants/acme", body: fields{"refresh_token": nil}, says: []string{"refresh_token"}},
	)
	// A key that is given twice, whose values Vault joins with a comma, and bodies that
	// are no objects.
	add(
		badInput{name: "ttl twice in a form", path: "tenants/acme", form: true, raw: "ttl=1h&ttl=2h", says: []string{"ttl"}},
		badInput{name: "no JSON", path: "config", raw: `CANARYBROKEN`},
		badInput{name: "JSON list", path: "config", raw: `["CANARYTOP"]`},
		badInput{name: "JSON string", path: "tenants/acme", raw: `"CANARYTOP"`},
	)
	// Reads with parameters.
	for _, path := range []string{"creds/acme", "token/acme"} {
		for _, minTTL := range []string{"13h", "48h", "abc", "-5", "500ms", "", "1.5", "1h&min_ttl=2h", "9223372036854775807"} {
			add(badInput{name: "GET " + path + "?min_ttl=" + minTTL, method: "GET", path: path + "?min_ttl=" + minTTL, says: []string{"min_ttl"}})
		}
	}
	add(
		badInput{name: "token as a query", method: "GET", path: "tenants/acme?refresh_token=CANARYONE&refresh_token=CANARYTWO", says: []string{"refresh_token"}},
		badInput{name: "secret as a query", method: "GET", path: "config?connector_secret=CANARYONE&connector_secret=CANARYTWO", says: []string{"connector_secret"}},
		badInput{name: "secret as a list on delete", method: "DELETE", path: "config/hr?connector_secret=CANARYONE&connector_secret=CANARYTWO"},
		badInput{name: "unknown tenant", method: "GET", path: "creds/absent", says: []string{`"absent"`, "tenants/absent"}},
		badInput{name: "unknown tenant", method: "GET", path: "token/absent", says: []string{`"absent"`, "tenants/absent"}},
		badInput{name: "unknown tenant refreshed", path: "tenants/absent/refresh", status: 404, says: []string{`"absent"`}},
		badInput{name: "unknown tenant patched", method: "PATCH", path: "tenants/absent", body: fields{"ttl": "1h"}, status: 404, says: []string{`"absent"`}},
	)
	// Names.
	for _, path := range []string{"config/" + long, "tenants/" + long} {
		add(badInput{name: "PUT " + path[:20] + "…", path: path, body: fields{"connector_id": "x", "connector_secret": "y", "refresh_token": good}, says: []string{"128 characters"}})
		add(badInput{name: "PATCH " + path[:20] + "…", method: "PATCH", path: path, body: fields{"ttl": "1h", "connector_id": "x"}, says: []string{"128 characters"}})
		add(badInput{name: "GET " + path[:20] + "…", method: "GET", path: path, status: 404})
	}
	for _, path := range []string{"creds/" + long, "token/" + long} {
		add(badInput{name: "GET " + path[:20] + "…", method: "GET", path: path, says: []string{"128 characters"}})
	}
	add(badInput{name: "refresh of a long name", path: "tenants/" + long + "/refresh", says: []string{"128 characters"}})

	before := snapshot(t, m)
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			a := c.send(t, m)
			want := c.status
			if want == 0 {
				want = 400
			}
			require.Equal(t, want, a.status, "%s", a.body)
			for _, text := range c.says {
				require.Contains(t, strings.Join(a.parsed().Errors, "\n"), text)
			}
			require.NotContains(t, a.body, inputCanary)
			require.NotContains(t, a.body, "4711", "a secret given as a number")
			require.NotContains(t, a.body, "eyJ", "a token")
		})
	}
	require.Equal(t, before, snapshot(t, m), "nothing is lost or changed")

	t.Run("paths that are none", func(t *testing.T) {
		m := m.in(t)
		for _, path := range []string{
			"", "/", "nothing", "tenant/acme", "tenants/acme/", "tenants/acme/other", "tenants/acme/refresh/", "tenants/acme/refresh/now",
			"creds", "creds/", "creds/acme/", "creds/acme/x", "token", "token/", "config/hr/", "config/hr/x", "Config", "CREDS/acme",
			"tenants/.acme", "tenants/acme.", "tenants/-acme", "tenants/a%20b", "tenants/a@b", "tenants/a+b", "tenants/%C3%A9", "tenants/%E2%80%8B",
			"tenants/a%0d%0ab", "tenants/a%00b", "tenants/*", "tenants/a%2fb", "tenants/a:b", "tenants/~", "config/a@b", "config/%20", "creds/a@b", "token/a%20b",
			"tenants/a%5cb", "tenants/..", "tenants/a..b", "tenants/%2e%2e", "tenants/../config", "config/a..b", "creds/a..b", "token/a..b", "tenants/a..b/refresh",
		} {
			for _, method := range []string{"GET", "PUT", "PATCH", "DELETE", "LIST"} {
				if a := m.do(method, path, body(method)); a.status == 500 || a.status/100 == 2 && method != "LIST" && !harmless[method+" "+path] {
					t.Errorf("%s %q: %d %s", method, path, a.status, a.body)
				}
			}
		}
	})
	t.Run("operations that are none", func(t *testing.T) {
		for _, operation := range []string{
			"PUT creds/acme", "PATCH creds/acme", "DELETE creds/acme", "LIST creds", "PUT token/acme", "DELETE token/acme", "LIST token",
			"GET tenants/acme/refresh", "DELETE tenants/acme/refresh", "LIST tenants/acme", "PUT tenants", "DELETE tenants", "GET tenants",
		} {
			method, path, _ := strings.Cut(operation, " ")
			a := m.in(t).do(method, path, body(method))
			require.Equal(t, 4, a.status/100, "%s: %d %s", operation, a.status, a.body)
		}
		a, err := m.send("PATCH", "bad/config", `{"exchanges_per_minute": 1}`, http.Header{"Content-Type": {"application/json"}})
		require.NoError(t, err)
		require.Equal(t, 415, a.status, "a patch needs its own content type")
	})
	require.Equal(t, before, snapshot(t, m), "nothing is lost or changed")

	t.Run("a secret given twice on the command line", func(t *testing.T) {
		for path, field := range map[string]string{"bad/config": "connector_secret", "bad/tenants/acme": "refresh_token", "bad/tenants/fresh": "refresh_token"} {
			for _, command := range []string{"write", "patch"} {
				out, exit := v.CLI(t, v.RootToken, command, path, field+"=CANARYONE", field+"=CANARYTWO")
				require.NotZero(t, exit, out)
				require.Contains(t, out, field+" must be given once")
				require.NotContains(t, out, inputCanary)
			}
		}
	})

	t.Run("unknown fields are warned of", func(t *testing.T) {
		m := m.in(t)
		for _, a := range []answer{
			m.write("config", fields{"conector_secret": "x"}),
			m.write("tenants/acme", fields{"refreshtoken": "x"}),
			m.patch("tenants/acme", fields{"tll": "1h"}),
			m.write("tenants/acme", fields{"ttl": "1h", "frob": fields{"a": 1}}),
		} {
			require.Contains(t, strings.Join(a.ok(t).parsed().Warnings, "\n"), "unrecognized parameters", a.request)
		}
		// A name in the body does not change the name in the path.
		m.write("tenants/acme", fields{"tenant": "victim", "ttl": "1h"})
		m.write("config/hr", fields{"connector": "default", "connector_id": m.connectorID})
	})
	require.Equal(t, before, snapshot(t, m), "nothing is lost or changed")

	t.Run("good input that looks odd", func(t *testing.T) {
		m := m.in(t)
		m.write("config/odd", fields{"connector_id": " odd ", "connector_secret": "S", "exchanges_per_minute": 1000000, "request_timeout": "1m"}).ok(t)
		require.Equal(t, "odd", m.read("config/odd").ok(t).text("connector_id"))
		require.EqualValues(t, 1000000, m.read("config/odd").ok(t).number("exchanges_per_minute"))
		m.write("config/odd", fields{"exchanges_per_minute": "12", "redirect_hosts": ""}).ok(t)
		require.Equal(t, []any{}, m.read("config/odd").ok(t).data()["redirect_hosts"])
		for _, name := range []string{"ACME", "a.b", "a-b", "a_b", "7", strings.Repeat("n", 128)} {
			m.write("tenants/"+name, fields{"refresh_token": "opaque", "verify": false, "ttl": "1h"}).ok(t)
			require.Equal(t, "unverified", m.read("tenants/"+name).ok(t).text("status"))
			require.Equal(t, 204, m.delete("tenants/"+name).status)
		}
		require.Equal(t, "ok", m.read("tenants/acme").ok(t).text("status"), "a write of ACME does not change acme")
		require.Equal(t, 204, m.delete("config/odd").status)
	})

	// Vault hashes the strings of a request in the audit log, but not what a plugin
	// quotes in its answer.
	for place, text := range map[string]string{"audit log": v.Audit(), "Vault's and the plugin's log": v.Logs()} {
		require.NotEmpty(t, text)
		for line := range strings.Lines(text) {
			if strings.Contains(withoutURI(line), inputCanary) || strings.Contains(line, "eyJ") {
				t.Errorf("a secret is in the %s: %s", place, line)
			}
		}
		require.NotContains(t, text, "panic", place)
	}
	require.Len(t, pluginsIn(t, v.PluginDir), 1)
}

// uri is the part of an audit line that Vault always writes in clear, like the key of
// an object.
var uri = regexp.MustCompile(`"request_uri":"[^"]*"`)

func withoutURI(line string) string {
	return strings.ReplaceAll(uri.ReplaceAllString(line, ""), `"CANARYKEY"`, "")
}

// harmless are deletes of names that cannot exist, and other spellings of valid
// paths.
var harmless = map[string]bool{
	"GET tenants/../config": true,
	"DELETE tenants/a..b":   true,
	"DELETE config/a..b":    true,
}

func body(method string) fields {
	if method == "PUT" || method == "PATCH" {
		return fields{"refresh_token": "CANARYPATH", "connector_secret": "CANARYPATH", "connector_id": "x", "verify": false}
	}
	return nil
}

func (c badInput) send(t *testing.T, m mount) answer {
	t.Helper()
	text := c.raw
	if c.raw == "" && c.body != nil {
		encoded, err := json.Marshal(c.body)
		require.NoError(t, err)
		text = string(encoded)
	}
	method := c.method
	if method == "" {
		method = http.MethodPut
	}
	header := http.Header{}
	if c.form {
		header.Set("Content-Type", "application/x-www-form-urlencoded")
		method = http.MethodPost
	}
	a, err := m.send(method, m.path+"/"+c.path, text, header)
	require.NoError(t, err)
	return a
}

// snapshot is all that can be read from a mount, and how often it called Kaizala.
func snapshot(t *testing.T, m mount) map[string]any {
	t.Helper()
	m = m.in(t)
	all := map[string]any{"calls": m.kaizala.CallCount()}
	for _, path := range []string{"config", "config/hr", "tenants/acme", "tenants/long"} {
		all[path] = m.read(path).ok(t).data()
	}
	all["access"] = m.access("acme")
	all["connectors"] = m.list("config").ok(t).data()
	all["tenants"] = m.list("tenants").ok(t).data()
	return all
}

// jwt is a token like Kaizala's that expires after life.
func jwt(connectorID string, life time.Duration) string {
	part := func(v any) string {
		text, _ := json.Marshal(v)
		return base64.RawURLEncoding.EncodeToString(text)
	}
	data, _ := json.Marshal(fields{"AppName": "x"})
	credentials, _ := json.Marshal(fields{"applicationId": connectorID, "data": string(data)})
	end := time.Now().Add(life)
	return part(fields{"alg": "HS256", "typ": "JWT"}) + "." + part(fields{
		"iat": end.Add(-kaizalatest.DefaultRefreshTokenLife).Unix(), "exp": end.Unix(), "urn:microsoft:credentials": string(credentials),
	}) + "." + base64.RawURLEncoding.EncodeToString([]byte(url.QueryEscape("signature")))
}
