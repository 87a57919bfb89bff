package vaulttest

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/kaizala/kaizalatest"
)

// secrets are the texts that must not be found, with their kind.
type secrets struct {
	mu  sync.Mutex
	all map[string]string
}

func (s *secrets) add(what string, texts ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, text := range texts {
		s.all[text] = what
	}
}

// in returns the kinds of the secrets in a text, whole or the identifying part of a JWT.
func (s *secrets) in(text string) (found []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for secret, what := range s.all {
		signature := secret[strings.LastIndex(secret, ".")+1:]
		if strings.Contains(text, secret) || len(signature) > 20 && strings.Contains(text, signature) {
			found = append(found, what)
		}
	}
	slices.Sort(found)
	return slices.Compact(found)
}

// No secret is in a place where it must not be: the test plays all flows, and then
// searches every answer, the audit log, the log of Vault and the plugin at trace level,
// and the internal data of leases.
func TestNoSecretTurnsUp(t *testing.T) {
	t.Parallel()
	v := Start(t, WithAudit(), WithConfig(func(config map[string]any) { config["raw_storage_endpoint"] = true }))
	v.RegisterEngine(t)
	m := mountEngine(t, v, "canary")
	m.kaizala.SetLimits(0, 0)
	known := &secrets{all: map[string]string{}}
	known.add("connector secret", m.connectorSecret)
	config := m.connector()
	config["exchanges_per_minute"] = 10000
	m.write("config", config).ok(t)

	write := func(tenant string, with ...fields) {
		t.Helper()
		known.add("refresh token", m.addTenant(tenant, with...))
	}
	// vend reads an access token, which may be in this answer and in no other.
	vend := func(path string) answer {
		t.Helper()
		a := m.read(path).ok(t)
		require.NotEmpty(t, a.text("access_token"))
		known.add("access token", a.text("access_token"))
		return a
	}

	// The normal flow: written, read, vended, renewed, revoked.
	write("acme", fields{"ttl": "1h"})
	creds := vend("creds/acme")
	vend("token/acme")
	m.renew(creds.lease(), time.Hour).ok(t)
	m.sys(http.MethodPut, "sys/leases/lookup", fields{"lease_id": creds.lease()}).ok(t)
	kept := vend("creds/acme")
	requireInternalDataHoldsNoSecret(t, m, known, kept.lease())
	m.renew(kept.lease(), time.Hour).ok(t)
	requireInternalDataHoldsNoSecret(t, m, known, kept.lease())
	m.write("tenants/acme/refresh", nil).ok(t)
	vend("creds/acme")
	m.revoke(creds.lease())
	m.patch("tenants/acme", fields{"min_ttl": "1h"}).ok(t)
	m.list("tenants").ok(t)
	m.list("config").ok(t)

	// The service replaces the refresh token several times, and access tokens and
	// refresh tokens expire.
	m.kaizala.SetRefreshTokenLife(10 * time.Second)
	m.kaizala.SetAccessTokenLife(8 * time.Second)
	write("rotating")
	m.kaizala.SetRefreshTokenLife(0)
	vend("creds/rotating")
	rotation := time.Now().Add(patience)

	// All failures, with all secrets in the answer's body.
	bodies := []string{
		m.connectorSecret + " " + m.kaizala.CurrentRefreshToken("acme"),
		`{"message": "` + m.connectorSecret + " " + m.kaizala.CurrentRefreshToken("acme") + `", "errorCode": "` + m.connectorSecret + `", "errorCategoryKey": "AuthException"}`,
		`{"accessToken": "` + kept.text("access_token") + `", "refreshToken": {"t": "` + m.kaizala.CurrentRefreshToken("acme") + `"}}`,
	}
	for _, status := range []int{200, 400, 401, 403, 404, 500, 502, 503} {
		for _, body := range bodies {
			m.kaizala.Inject(kaizalatest.Fault{User: "acme", Status: status, Body: body, Header: http.Header{
				"Www-Authenticate": {m.connectorSecret}, "Content-Type": {m.connectorSecret},
			}})
			if a := m.write("tenants/acme/refresh", nil); a.status == 200 {
				t.Errorf("a refresh that Kaizala answered with %d and %s succeeded: %s", status, body, a.body)
			}
			m.read("tenants/acme").ok(t)
			m.kaizala.ClearFaults()
			m.write("tenants/acme", fields{"refresh_token": m.kaizala.CurrentRefreshToken("acme")})
			m.write("config", fields{"connector_secret": m.connectorSecret}).ok(t) // ends a refusal
		}
	}
	for _, fault := range []kaizalatest.Fault{{Reset: true}, {Truncate: true}, {Process: true, Reset: true}} {
		fault.User = "acme" // in the background too
		m.kaizala.Inject(fault)
		require.Equal(t, 503, m.write("tenants/acme/refresh", nil).status)
		m.read("tenants/acme").ok(t)
		m.kaizala.ClearFaults()
		m.write("config", fields{"connector_secret": m.connectorSecret}).ok(t)
	}

	// A 429 pauses its whole connector, so another connector gets it.
	limitedID, limitedSecret := m.kaizala.RegisterConnector()
	limited := m.kaizala.GenerateUserToken(limitedID, "limited")
	known.add("connector secret", limitedSecret)
	known.add("refresh token", limited)
	m.write("config/limited", fields{"connector_id": limitedID, "connector_secret": limitedSecret, "api_root": m.kaizala.URL}).ok(t)
	m.write("tenants/limited", fields{"refresh_token": limited, "connector": "limited"}).ok(t)
	m.kaizala.Inject(kaizalatest.Fault{User: "limited", Times: 1, Status: 429, Body: bodies[1], Header: http.Header{"Retry-After": {limitedSecret}}})
	for range 2 {
		m.write("tenants/limited/refresh", nil).refused(t, 429, "try again in")
		m.read("tenants/limited").ok(t)
	}

	// A move to a host that is not permitted, with a secret in its address: the host
	// gets no call.
	var strange atomic.Int64
	elsewhere := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { strange.Add(1) }))
	defer elsewhere.Close()
	there := strings.Replace(elsewhere.URL, "127.0.0.1", "localhost", 1)
	for _, location := range []string{
		there, there + "/" + m.connectorSecret + "/v1/accessToken?token=" + m.kaizala.CurrentRefreshToken("acme"),
		"https://" + strings.ToLower(m.connectorSecret) + ".example.com/", "https://kaiza.la:" + m.connectorSecret + "@localhost/",
	} {
		for _, move := range []func(string, string){m.kaizala.MoveUser, m.kaizala.MoveUserTemporarily} {
			move("acme", location)
			m.write("tenants/acme/refresh", nil).refused(t, 503, "redirect")
			m.read("tenants/acme").ok(t)
			m.write("tenants/acme", fields{"refresh_token": m.kaizala.CurrentRefreshToken("acme")})
			move("acme", "")
		}
	}
	require.Zero(t, strange.Load(), "calls to a host that is not permitted")
	known.add("connector secret", strings.ToLower(m.connectorSecret))

	// Refusals of the connector and of the refresh token.
	m.write("config/wrong", fields{"connector_id": m.connectorID, "connector_secret": "WRONGSECRET0815", "api_root": m.kaizala.URL}).ok(t)
	known.add("connector secret", "WRONGSECRET0815")
	m.patch("tenants/acme", fields{"connector": "wrong"}).refused(t, 400)
	known.add("refresh token", m.kaizala.CurrentRefreshToken("acme"), m.kaizala.GenerateUserToken(m.connectorID, "acme"))
	m.write("tenants/acme/refresh", nil).refused(t, 400, "tenant user")
	m.read("tenants/acme").ok(t)
	m.read("creds/acme")
	m.write("tenants/acme", fields{"refresh_token": m.kaizala.CurrentRefreshToken("acme") + "\r\nX: y"}).refused(t, 400)
	m.write("tenants/acme", fields{"refresh_token": m.kaizala.CurrentRefreshToken("acme"), "ttl": "abc"}).refused(t, 400)
	m.write("tenants/acme", fields{"refresh_token": []string{m.kaizala.CurrentRefreshToken("acme")}}).refused(t, 400)
	m.write("config", fields{"connector_secret": fields{"a": m.connectorSecret}}).refused(t, 400)
	m.write("config", fields{"connector_secret": m.connectorSecret, "api_root": "http://kaiza.la"}).refused(t, 400)

	// A rotation ends, with and without an interruption.
	await := func() {
		t.Helper()
		was := m.kaizala.CurrentRefreshToken("rotating")
		Eventually(t, "the refresh token to be replaced", func() bool {
			return m.kaizala.CurrentRefreshToken("rotating") != was || time.Now().After(rotation)
		})
		known.add("refresh token", m.kaizala.CurrentRefreshToken("rotating"))
		Eventually(t, "the new refresh token to be stored", func() bool {
			return m.read("tenants/rotating").ok(t).text("refresh_token_origin") == "service"
		})
	}
	if m.read("tenants/rotating").ok(t).text("refresh_token_origin") != "service" {
		await()
	}
	known.add("refresh token", m.kaizala.CurrentRefreshToken("rotating"))
	vend("creds/rotating")
	out, exit := v.CLI(t, v.RootToken, "plugin", "reload", "-type=secret", "-plugin="+PluginName)
	require.Zero(t, exit, out)
	vend("creds/rotating")
	v.Seal(t)
	v.Unseal(t)
	m.write("tenants/rotating/refresh", nil).ok(t)
	vend("token/rotating")

	for _, path := range []string{"", "config", "config/x", "tenants/x", "creds/x", "token/x", "tenants/x/refresh"} {
		m.request(http.MethodGet, "canary/"+path+"?help=1", nil, nil).ok(t)
	}
	m.request(http.MethodGet, "sys/internal/specs/openapi", nil, nil).ok(t)
	m.kaizala.Close()
	m.read("creds/absent")
	m.write("tenants/rotating/refresh", nil)
	m.read("tenants/rotating").ok(t)
	require.NoError(t, v.Client.Sys().Unmount("canary"))
	v.Mount(t, "canary") // the end of the test unmounts it

	// Every token in a call to the service is a secret too.
	for _, call := range m.kaizala.Calls() {
		if strings.HasPrefix(call.RefreshToken, "eyJ") {
			known.add("refresh token", call.RefreshToken)
		}
	}
	require.Greater(t, len(known.all), 10)

	for _, a := range m.heard.list() {
		vended := strings.HasPrefix(a.request, "GET canary/creds/") || strings.HasPrefix(a.request, "GET canary/token/")
		for _, what := range known.in(a.body) {
			if !(vended && what == "access token") {
				t.Errorf("%s: the answer holds a %s: %s", a.request, what, a.body)
			}
		}
	}
	for place, text := range map[string]string{"audit log": v.Audit(), "log": v.Logs()} {
		require.NotEmpty(t, text)
		for line := range strings.Lines(text) {
			if found := known.in(line); found != nil {
				t.Errorf("the %s holds a %s: %s", place, strings.Join(found, " and a "), line)
			}
		}
		require.NotContains(t, text, "eyJ", "a token that this test does not know, in the %s", place)
		require.NotContains(t, text, "panic", place)
	}
}

// requireInternalDataHoldsNoSecret checks the internal data of a lease as Vault stores
// it. Vault also stores the whole response, which proves that this is the entry of the
// lease.
func requireInternalDataHoldsNoSecret(t *testing.T, m mount, known *secrets, lease string) {
	t.Helper()
	raw := m.in(t).as(m.vault.RootToken)
	quiet := &answers{} // Vault's own storage may hold the response
	raw.heard = quiet
	value := raw.sys(http.MethodGet, "sys/raw/sys/expire/id/"+lease, nil).ok(t).text("value")
	var entry struct {
		Data   json.RawMessage `json:"data"`
		Secret struct {
			InternalData map[string]any `json:"internal_data"`
		} `json:"secret"`
	}
	require.NoError(t, json.Unmarshal([]byte(value), &entry), "%s", value)
	internal := entry.Secret.InternalData
	require.Subset(t, []string{"tenant", "generation", "expires", "renewed", "secret_type"}, keys(internal))
	require.Equal(t, "acme", internal["tenant"])
	require.NotEmpty(t, internal["generation"])
	text, err := json.Marshal(entry.Secret)
	require.NoError(t, err)
	require.Empty(t, known.in(string(text)))
	require.NotContains(t, string(text), "eyJ")
}
