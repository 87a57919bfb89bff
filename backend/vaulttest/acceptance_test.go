package vaulttest

import (
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/kaizala/kaizalatest"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// The contract, for each of the people and the operator, with the built plugin in a
// real Vault and an emulator of Kaizala. Each part has its own mount, and all share
// the Vault and the plugin's process.
func TestAcceptance(t *testing.T) {
	t.Parallel()
	v := Start(t, Raft())
	v.RegisterEngine(t)
	for _, part := range []struct {
		name string
		test func(*testing.T, *Vault)
	}{
		{"connectors", acceptConnectors},
		{"connector in use", acceptConnectorInUse},
		{"tenants", acceptTenants},
		{"verification", acceptVerification},
		{"status", acceptStatus},
		{"existence checks", acceptExistenceChecks},
		{"creds", acceptCreds},
		{"token", acceptToken},
		{"leases end before their token", acceptLeaseTTLs},
		{"renewal", acceptRenewal},
		{"renewal of an expired token", acceptRenewalOfExpired},
		{"renewals earn no warning", acceptRenewalsWithoutWarning},
		{"revocation", acceptRevocation},
		{"revocation with everything gone", acceptRevocationWithNothingLeft},
		{"policies", acceptPolicies},
		{"templated policy", acceptTemplatedPolicy},
		{"response wrapping", acceptWrapping},
		{"two mounts", acceptTwoMounts},
		{"unmount", acceptUnmount},
		{"interruptions", acceptInterruptions},
	} {
		t.Run(part.name, func(t *testing.T) { part.test(t, v) })
	}
	requireNoIrrevocableLeases(t, v)
}

func acceptConnectors(t *testing.T, v *Vault) {
	m := mountEngine(t, v, "connectors")
	require.Equal(t, 404, m.read("config").status)
	require.Equal(t, 404, m.list("config").status)

	m.write("config", fields{"connector_id": "main-id", "connector_secret": "MAINSECRET"}).ok(t)
	defaults := m.read("config").ok(t).data()
	require.Equal(t, map[string]any{
		"service":              "kaizala",
		"connector_id":         "main-id",
		"api_root":             "https://api.kaiza.la",
		"ca_cert":              "",
		"redirect_hosts":       []any{"kaiza.la", "osi.office.net"},
		"request_timeout":      60.0,
		"exchanges_per_minute": 50.0,
	}, defaults, "all fields but connector_secret, which cannot be read")

	require.Equal(t, defaults, m.read("config/default").ok(t).data(), "config and config/default are one entry")
	m.write("config/default", fields{"request_timeout": "30s"}).ok(t)
	require.EqualValues(t, 30, m.read("config").ok(t).number("request_timeout"))

	m.write("config/hr", m.connector()).ok(t)
	require.Equal(t, []any{"default", "hr"}, m.list("config").ok(t).data()["keys"])

	// A partial write changes only the fields that it names.
	m.write("config", fields{"exchanges_per_minute": 7, "redirect_hosts": "kaiza.la,example.com"}).ok(t)
	want := m.read("config").ok(t).data()
	require.Equal(t, "main-id", want["connector_id"])
	require.Equal(t, 30.0, want["request_timeout"])
	require.Equal(t, 7.0, want["exchanges_per_minute"])
	require.Equal(t, []any{"kaiza.la", "example.com"}, want["redirect_hosts"])

	m.patch("config", fields{"connector_id": "other-id"}).ok(t)
	want["connector_id"] = "other-id"
	require.Equal(t, want, m.read("config").ok(t).data())

	// In a patch, null sets the default.
	m.patch("config", fields{"request_timeout": nil, "exchanges_per_minute": nil, "redirect_hosts": nil, "api_root": nil, "ca_cert": nil}).ok(t)
	defaults["connector_id"] = "other-id"
	require.Equal(t, defaults, m.read("config").ok(t).data())
	for _, required := range []string{"connector_id", "connector_secret"} {
		m.patch("config", fields{required: nil}).refused(t, 400, required)
	}
	m.patch("config/absent", fields{"connector_id": "x"}).refused(t, 404)

	// There is no field "connector": with it, a policy for one connector would permit writes of another.
	warned := m.write("config", fields{"connector": "hr", "connector_id": "main-id"}).ok(t)
	require.Contains(t, strings.Join(warned.parsed().Warnings, "\n"), "connector")
	require.Equal(t, m.connectorID, m.read("config/hr").ok(t).text("connector_id"))

	require.Equal(t, 204, m.delete("config/absent").status, "a delete of a connector that does not exist")
	require.Equal(t, 204, m.delete("config").status)
	require.Equal(t, 404, m.read("config/default").status)
	require.Equal(t, []any{"hr"}, m.list("config").ok(t).data()["keys"])
}

func acceptConnectorInUse(t *testing.T, v *Vault) {
	m := configuredEngine(t, v, "used")
	m.write("config/hr", m.connector()).ok(t)
	for i := range 12 {
		m.addTenant(fmt.Sprintf("t%02d", i), fields{"verify": false})
	}
	before := m.read("config").ok(t).data()
	refused := m.delete("config")
	refused.refused(t, 400, "12 tenants", "t00", "t09")
	require.NotContains(t, refused.body, "t10", "the error has ten names, and the number of all")
	m.write("config", fields{"connector_id": "another"}).refused(t, 400, "12 tenants")
	require.Equal(t, before, m.read("config").ok(t).data())
	require.Equal(t, 204, m.delete("config/hr").status, "no tenant uses this connector")

	for i := range 12 {
		require.Equal(t, 204, m.delete(fmt.Sprintf("tenants/t%02d", i)).status)
	}
	require.Equal(t, 204, m.delete("config").status)
}

func acceptTenants(t *testing.T, v *Vault) {
	m := configuredEngine(t, v, "tenants")
	require.Equal(t, 404, m.read("tenants/acme").status)
	require.Equal(t, 404, m.list("tenants").status)

	refresh := m.addTenant("acme", fields{"ttl": "1h", "max_ttl": "2h"})
	read := m.read("tenants/acme").ok(t)
	require.NotContains(t, read.body, refresh)
	require.NotContains(t, read.data(), "verify", "verify is not stored")
	require.Subset(t, read.data(), map[string]any{
		"connector": "default", "ttl": 3600.0, "max_ttl": 7200.0, "min_ttl": 900.0,
		"status": "ok", "kind": "user", "refresh_token_origin": "operator",
		"scope": "token.write", "endpoint_url": m.kaizala.URL,
	})
	now := time.Now()
	require.WithinDuration(t, now.Add(kaizalatest.DefaultRefreshTokenLife), read.time(t, "refresh_token_expire_time"), time.Minute)
	require.WithinDuration(t, now.Add(kaizalatest.DefaultAccessTokenLife), read.time(t, "access_token_expire_time"), time.Minute)
	require.WithinDuration(t, now, read.time(t, "refresh_token_set_time"), time.Minute)
	require.WithinDuration(t, now, read.time(t, "last_exchange_time"), time.Minute)
	require.True(t, read.time(t, "next_exchange_time").After(now))
	for _, absent := range []string{"group_id", "last_error", "last_error_time"} {
		require.NotContains(t, read.data(), absent)
	}

	// A write of other fields neither exchanges nor gives up the access token.
	access := m.access("acme")
	m.write("tenants/acme", fields{"ttl": "30m"}).ok(t)
	m.patch("tenants/acme", fields{"max_ttl": nil, "min_ttl": "20m"}).ok(t)
	changed := m.read("tenants/acme").ok(t).data()
	require.Subset(t, changed, map[string]any{"ttl": 1800.0, "max_ttl": 0.0, "min_ttl": 1200.0, "connector": "default"})
	require.Equal(t, access, m.access("acme"))
	require.Equal(t, 1, m.kaizala.Exchanges("acme"))
	m.patch("tenants/absent", fields{"ttl": "1h"}).refused(t, 404, "absent")

	// White space around a token, which can come with a paste, is removed.
	m.write("tenants/acme", fields{"refresh_token": " \n" + m.kaizala.GenerateUserToken(m.connectorID, "acme") + "\n"}).ok(t)
	require.NotEqual(t, access, m.access("acme"), "writing a refresh token gives up the access token")

	m.write("tenants/group", fields{"refresh_token": m.kaizala.GenerateGroupToken(m.connectorID, "group", "group-7")}).ok(t)
	group := m.read("tenants/group").ok(t)
	require.Equal(t, "group", group.text("kind"))
	require.Equal(t, "group-7", group.text("group_id"))

	// A refresh token that is no JWT works too; only its end is unknown.
	m.write("tenants/opaque", fields{"refresh_token": "no-jwt-at-all", "verify": false}).ok(t)
	opaque := m.read("tenants/opaque").ok(t)
	require.Equal(t, "unknown", opaque.text("kind"))
	require.Equal(t, "unverified", opaque.text("status"))
	require.NotContains(t, opaque.data(), "refresh_token_expire_time")

	list := m.list("tenants").ok(t).data()
	require.Equal(t, []any{"acme", "group", "opaque"}, list["keys"])
	info := list["key_info"].(map[string]any)
	require.Subset(t, info["acme"], map[string]any{"status": "ok", "connector": "default"})
	require.Contains(t, info["acme"], "refresh_token_expire_time")
	require.Equal(t, map[string]any{"status": "unverified", "connector": "default"}, info["opaque"])

	// refresh retires the access token, also with live leases on it.
	retired := m.access("acme")
	exchanges := m.kaizala.Exchanges("acme")
	require.Equal(t, "ok", m.write("tenants/acme/refresh", nil).ok(t).text("status"))
	require.NotEqual(t, retired, m.access("acme"))
	require.Equal(t, exchanges+1, m.kaizala.Exchanges("acme"))
	m.write("tenants/absent/refresh", nil).refused(t, 404, "absent")

	require.Equal(t, 204, m.delete("tenants/acme").status)
	require.Equal(t, 204, m.delete("tenants/acme").status, "a delete of a tenant that does not exist")
	require.Equal(t, 404, m.read("tenants/acme").status)
	m.read("creds/acme").refused(t, 400, "acme", "tenants/acme")
	m.read("token/acme").refused(t, 400, "acme", "tenants/acme")
}

// A refresh token that Kaizala does not accept is not stored, and the tenant is not changed.
func acceptVerification(t *testing.T, v *Vault) {
	m := configuredEngine(t, v, "verify")
	dead := m.kaizala.GenerateUserToken(m.connectorID, "acme")
	good := m.addTenant("acme")
	access := m.access("acme")
	status := m.read("tenants/acme").ok(t).text("refresh_token_set_time")
	unchanged := func() {
		t.Helper()
		require.Equal(t, access, m.access("acme"))
		require.Equal(t, status, m.read("tenants/acme").ok(t).text("refresh_token_set_time"))
		require.Equal(t, []any{"acme"}, m.list("tenants").ok(t).data()["keys"])
	}

	for _, tenant := range []string{"acme", "fresh"} {
		m.write("tenants/"+tenant, fields{"refresh_token": dead}).refused(t, 400, "Kaizala refuses this refresh token", "nothing was stored")
		unchanged()
		m.kaizala.Inject(kaizalatest.Fault{Times: 1, Status: 502, Body: "<html>proxy</html>"})
		m.write("tenants/"+tenant, fields{"refresh_token": good}).refused(t, 503, "nothing was stored")
		unchanged()
		m.kaizala.Inject(kaizalatest.Fault{Times: 1, Reset: true})
		m.write("tenants/"+tenant, fields{"refresh_token": good}).refused(t, 503, "nothing was stored")
		unchanged()
	}
	m.write("config/wrong", fields{"connector_id": m.connectorID, "connector_secret": "NOTTHISONE", "api_root": m.kaizala.URL}).ok(t)
	m.write("tenants/fresh", fields{"refresh_token": good, "connector": "wrong"}).refused(t, 400, "config/wrong", "connector_secret", "nothing was stored")
	m.patch("tenants/acme", fields{"connector": "wrong"}).refused(t, 400, "config/wrong", "nothing was stored")
	unchanged()

	// After a 429 there is no call until Retry-After has passed.
	m.kaizala.Inject(kaizalatest.Fault{Times: 1, Status: 429, Header: http.Header{"Retry-After": {"120"}}})
	m.write("tenants/fresh", fields{"refresh_token": good}).refused(t, 429, "try again in 2m0s")
	calls := m.kaizala.CallCount()
	m.write("tenants/fresh", fields{"refresh_token": good}).refused(t, 429, "try again in")
	m.write("tenants/acme/refresh", nil).refused(t, 429, "try again in")
	require.Equal(t, calls, m.kaizala.CallCount())
	unchanged()

	// A write without verification makes no call either; the first read does.
	m.write("tenants/later", fields{"refresh_token": m.kaizala.GenerateUserToken(m.connectorID, "later"), "verify": false}).ok(t)
	require.Equal(t, calls, m.kaizala.CallCount())
	require.Equal(t, "unverified", m.read("tenants/later").ok(t).text("status"))
}

func acceptStatus(t *testing.T, v *Vault) {
	m := configuredEngine(t, v, "status")
	m.addTenant("acme")
	access := m.access("acme")

	// In an outage of Kaizala, readers get the access token that is still usable.
	m.kaizala.Inject(kaizalatest.Fault{Times: 1, Status: 503, Body: "down"})
	m.write("tenants/acme/refresh", nil).refused(t, 503, "acme", "nothing was lost")
	degraded := m.read("tenants/acme").ok(t)
	require.Equal(t, "degraded", degraded.text("status"))
	require.Contains(t, degraded.text("last_error"), "503")
	require.WithinDuration(t, time.Now(), degraded.time(t, "last_error_time"), time.Minute)
	for _, path := range []string{"creds/acme", "token/acme"} {
		served := m.read(path).ok(t)
		require.Equal(t, access, served.text("access_token"))
		require.Contains(t, strings.Join(served.parsed().Warnings, "\n"), "could not be renewed")
	}
	m.write("tenants/acme/refresh", nil).ok(t)
	require.Equal(t, "ok", m.read("tenants/acme").ok(t).text("status"))
	require.Empty(t, m.read("token/acme").ok(t).parsed().Warnings)

	// The user has generated a new refresh token, and not written it to Vault.
	current := m.kaizala.GenerateUserToken(m.connectorID, "acme")
	m.write("tenants/acme/refresh", nil).refused(t, 400, "tenant user", "tenants/acme")
	rejected := m.read("tenants/acme").ok(t)
	require.Equal(t, "rejected", rejected.text("status"))
	require.Contains(t, rejected.text("last_error"), "tenant user")
	require.NotContains(t, rejected.data(), "next_exchange_time")
	require.Equal(t, "rejected", m.list("tenants").ok(t).data()["key_info"].(map[string]any)["acme"].(map[string]any)["status"])
	require.Contains(t, strings.Join(m.read("creds/acme").ok(t).parsed().Warnings, "\n"), "refuses the refresh token")
	m.write("tenants/acme", fields{"refresh_token": current}).ok(t)
	require.Equal(t, "ok", m.read("tenants/acme").ok(t).text("status"))

	// A wrong connector secret is a failure of the connector, and rejects no tenant.
	m.kaizala.NewConnectorSecret(m.connectorID)
	m.write("tenants/acme/refresh", nil).refused(t, 400, "Kaizala refuses connector", "to config;")
	require.Equal(t, "degraded", m.read("tenants/acme").ok(t).text("status"))
	calls := m.kaizala.CallCount()
	m.write("tenants/acme/refresh", nil).refused(t, 400, "to config;")
	require.Equal(t, calls, m.kaizala.CallCount(), "no call until config is written")
	m.write("config", fields{"connector_secret": m.kaizala.NewConnectorSecret(m.connectorID)}).ok(t)
	require.Equal(t, "ok", m.write("tenants/acme/refresh", nil).ok(t).text("status"))
}

// A policy with create alone does not permit updates, and one with update alone no creates.
func acceptExistenceChecks(t *testing.T, v *Vault) {
	m := configuredEngine(t, v, "exists")
	v.Policy(t, "create", `
path "exists/tenants/*" { capabilities = ["create"] }
path "exists/config/*"  { capabilities = ["create"] }`)
	v.Policy(t, "update", `
path "exists/tenants/*" { capabilities = ["update"] }
path "exists/config/*"  { capabilities = ["update"] }`)
	creator, updater := m.as(v.TokenWith(t, "create")), m.as(v.TokenWith(t, "update"))

	body := fields{"refresh_token": m.kaizala.GenerateUserToken(m.connectorID, "acme"), "verify": false}
	require.Equal(t, 403, updater.write("tenants/acme", body).status)
	creator.write("tenants/acme", body).ok(t)
	require.Equal(t, 403, creator.write("tenants/acme", fields{"ttl": "1h"}).status)
	updater.write("tenants/acme", fields{"ttl": "1h"}).ok(t)

	require.Equal(t, 403, updater.write("config/hr", m.connector()).status)
	creator.write("config/hr", m.connector()).ok(t)
	require.Equal(t, 403, creator.write("config/hr", m.connector()).status)
	updater.write("config/hr", fields{"request_timeout": "10s"}).ok(t)
	require.Equal(t, 403, creator.write("config/default", m.connector()).status, "the default connector exists")
}

func acceptCreds(t *testing.T, v *Vault) {
	m := configuredEngine(t, v, "creds")
	m.addTenant("acme")
	creds := m.read("creds/acme").ok(t)
	require.ElementsMatch(t, []string{"access_token", "endpoint_url", "scope", "expire_time", "tenant"}, keys(creds.data()))
	require.Equal(t, "acme", creds.text("tenant"))
	require.Equal(t, m.kaizala.URL, creds.text("endpoint_url"))
	require.WithinDuration(t, time.Now().Add(24*time.Hour), creds.time(t, "expire_time"), time.Minute)
	require.True(t, strings.HasPrefix(creds.lease(), "creds/creds/acme/"), creds.lease())
	require.True(t, m.kaizala.AccessTokenAlive(creds.text("access_token")))

	// Every reader gets the same token, with a lease of his own.
	again := m.read("creds/acme").ok(t)
	require.Equal(t, creds.text("access_token"), again.text("access_token"))
	require.NotEqual(t, creds.lease(), again.lease())

	// A reader's min_ttl can ask for as much as half an access token's life.
	m.read("creds/acme?min_ttl=11h").ok(t)
	m.read("creds/acme?min_ttl=13h").refused(t, 400, "min_ttl")
	require.Equal(t, 1, m.kaizala.TotalExchanges())

	// Many readers of a tenant without an access token cause one exchange.
	m.addTenant("cold", fields{"verify": false})
	m.kaizala.Inject(kaizalatest.Fault{Times: 1, Delay: time.Second})
	tokens := make(chan string, 20)
	for range cap(tokens) {
		go func() {
			a, err := m.send(http.MethodGet, "creds/creds/cold", "", nil)
			if err != nil {
				a.body = err.Error()
			}
			tokens <- a.text("access_token")
		}()
	}
	first := <-tokens
	require.NotEmpty(t, first)
	for range cap(tokens) - 1 {
		require.Equal(t, first, <-tokens)
	}
	require.Equal(t, 1, m.kaizala.Exchanges("cold"))

	// A reader whose min_ttl the access token cannot fulfil causes an exchange.
	m.kaizala.SetAccessTokenLife(6 * time.Second)
	m.addTenant("short", fields{"min_ttl": "1s"})
	short := m.read("creds/short").ok(t)
	expires := short.time(t, "expire_time")
	Eventually(t, "half the token's life to pass", func() bool { return time.Until(expires) < 2900*time.Millisecond })
	require.NotEqual(t, short.text("access_token"), m.read("creds/short?min_ttl=3").ok(t).text("access_token"))
}

func keys(data map[string]any) (names []string) {
	for name := range data {
		names = append(names, name)
	}
	return names
}

// token/:tenant is creds/:tenant without a lease, and its ttl says when to read again.
func acceptToken(t *testing.T, v *Vault) {
	m := configuredEngine(t, v, "token")
	m.addTenant("acme", fields{"min_ttl": "1h"})
	v.Policy(t, "gateway", `path "token/token/acme" { capabilities = ["read"] }`)
	gateway := m.as(v.TokenWith(t, "gateway"))
	token := gateway.read("token/acme").ok(t)
	require.Empty(t, token.lease())
	require.Empty(t, m.leases())
	require.ElementsMatch(t, []string{"access_token", "endpoint_url", "scope", "expire_time", "tenant", "ttl", "rotation_period", "last_vault_rotation"}, keys(token.data()))
	require.Equal(t, 403, gateway.read("creds/acme").status, "a policy for token does not permit creds")
	require.Equal(t, m.read("creds/acme").ok(t).text("access_token"), token.text("access_token"))

	expires := token.time(t, "expire_time")
	require.LessOrEqual(t, token.number("ttl"), int64(time.Until(expires.Add(-time.Hour)).Seconds())+1)
	require.Greater(t, token.number("ttl"), int64(0))
	require.GreaterOrEqual(t, token.number("rotation_period"), token.number("ttl"))
	require.WithinDuration(t, time.Now(), token.time(t, "last_vault_rotation"), time.Minute)

	// When ttl and the second that Vault Agent adds have passed, a read returns a
	// newer token.
	m.kaizala.SetAccessTokenLife(5 * time.Second)
	m.addTenant("short")
	short := m.read("token/short").ok(t)
	back := time.Now().Add(time.Duration(short.number("ttl")+1) * time.Second)
	require.False(t, back.After(short.time(t, "expire_time")))
	Eventually(t, "the ttl to pass", func() bool { return time.Now().After(back) })
	require.NotEqual(t, short.text("access_token"), m.access("short"))
}

// A lease's TTL is the tenant's ttl, or else the mount's, and at most the rest of the
// access token's life, in whole seconds, less two.
func acceptLeaseTTLs(t *testing.T, v *Vault) {
	m := configuredEngine(t, v, "ttls")
	for _, c := range []struct {
		name               string
		life               time.Duration
		tenant             fields
		defaultTTL, maxTTL string        // those of the mount
		most               time.Duration // 0: the rest of the token's life
		renewable          bool
	}{
		{name: "mount's default", life: time.Minute},
		{name: "tenant's ttl is longer", life: time.Minute, tenant: fields{"ttl": "10m"}},
		{name: "tenant's ttl and max_ttl are longer", life: time.Minute, tenant: fields{"ttl": "10m", "max_ttl": "20m"}},
		{name: "mount tuned longer", life: time.Minute, defaultTTL: "2h", maxTTL: "4h"},
		{name: "tenant's ttl", life: time.Minute, tenant: fields{"ttl": "10s"}, most: 10 * time.Second, renewable: true},
		{name: "tenant's max_ttl", life: time.Minute, tenant: fields{"max_ttl": "15s"}, most: 15 * time.Second},
		{name: "tenant's ttl is its max_ttl", life: time.Minute, tenant: fields{"ttl": "15s", "max_ttl": "15s"}, most: 15 * time.Second},
		{name: "mount's default is shorter", life: time.Minute, defaultTTL: "20s", maxTTL: "4h", most: 20 * time.Second, renewable: true},
		{name: "mount's max is shorter", life: time.Minute, tenant: fields{"ttl": "40s"}, defaultTTL: "10s", maxTTL: "30s", most: 30 * time.Second},
		{name: "shortest life that carries a lease", life: 6 * time.Second},
	} {
		t.Run(c.name, func(t *testing.T) {
			tune(t, v, "ttls", c.defaultTTL, c.maxTTL)
			m := m.in(t)
			m.kaizala.SetAccessTokenLife(c.life)
			m.addTenant("acme", c.tenant, fields{"min_ttl": "0s"})
			defer func() { require.Equal(t, 204, m.delete("tenants/acme").status) }()
			before := time.Now()
			creds := m.read("creds/acme").ok(t)
			after := time.Now()
			expires := creds.time(t, "expire_time")
			left := func(at time.Time) time.Duration {
				most := expires.Sub(at).Truncate(time.Second) - 2*time.Second
				if c.most > 0 {
					most = min(most, c.most)
				}
				return most
			}
			require.GreaterOrEqual(t, creds.ttl(), left(after))
			require.LessOrEqual(t, creds.ttl(), left(before))
			require.Equal(t, c.renewable, creds.parsed().Renewable)
			require.False(t, m.leaseEnd(creds.lease()).After(expires), "the lease ends before its token")
		})
	}
}

// tune sets a mount's lease TTLs; "" is Vault's default.
func tune(t *testing.T, v *Vault, path, defaultTTL, maxTTL string) {
	t.Helper()
	orSystem := func(ttl string) string {
		if ttl == "" {
			return "system"
		}
		return ttl
	}
	_, err := v.Client.Logical().Write("sys/mounts/"+path+"/tune", map[string]any{
		"default_lease_ttl": orSystem(defaultTTL), "max_lease_ttl": orSystem(maxTTL),
	})
	require.NoError(t, err)
}

// leaseEnd returns when Vault will end a lease.
func (m mount) leaseEnd(lease string) time.Time {
	m.t.Helper()
	end, err := m.lookUp(lease)
	require.NoError(m.t, err)
	return end
}

func (m mount) lookUp(lease string) (time.Time, error) {
	return time.Parse(time.RFC3339, m.sys(http.MethodPut, "sys/leases/lookup", fields{"lease_id": lease}).text("expire_time"))
}

// A renewal does not extend a lease past the access token, the tenant's max_ttl or the
// mount's, whatever increment the client asks for.
func acceptRenewal(t *testing.T, v *Vault) {
	m := configuredEngine(t, v, "renewal")
	for _, c := range []struct {
		name   string
		life   time.Duration
		tenant fields
		max    string        // the mount's maximum
		most   time.Duration // from the lease's beginning; 0: the rest of the token's life
	}{
		{name: "token", life: time.Minute, tenant: fields{"ttl": "10s"}},
		{name: "tenant's max_ttl", life: time.Hour, tenant: fields{"ttl": "10s", "max_ttl": "40s"}, most: 40 * time.Second},
		{name: "mount's max", life: time.Hour, tenant: fields{"ttl": "10s"}, max: "50s", most: 50 * time.Second},
		{name: "max_ttl beyond the token", life: time.Minute, tenant: fields{"ttl": "10s", "max_ttl": "12h"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.max != "" {
				tune(t, v, "renewal", "10s", c.max)
			} else {
				tune(t, v, "renewal", "", "")
			}
			m := m.in(t)
			m.kaizala.SetAccessTokenLife(c.life)
			m.addTenant("acme", c.tenant)
			defer func() { require.Equal(t, 204, m.delete("tenants/acme").status) }()
			creds := m.read("creds/acme").ok(t)
			begun := time.Now()
			expires := creds.time(t, "expire_time")
			latest := expires.Add(-time.Second)
			if c.most > 0 {
				latest = begun.Add(c.most + time.Second)
			}
			for _, increment := range []time.Duration{20 * time.Second, time.Hour, 0, 10000 * time.Hour} {
				renewed := m.renew(creds.lease(), increment).ok(t)
				end := m.leaseEnd(creds.lease())
				require.False(t, end.After(latest), "an increment of %s leads to %s, and the token ends at %s", increment, end, expires)
				if increment > time.Minute {
					require.WithinDuration(t, latest, end, 5*time.Second, "the increment is shortened, and not refused")
				}
				require.Empty(t, renewed.text("access_token"), "the answer to a renewal has no token")
			}
			require.Equal(t, creds.text("access_token"), m.access("acme"))
		})
	}
	require.Equal(t, 4, m.kaizala.TotalExchanges(), "a renewal makes no call")
}

func acceptRenewalOfExpired(t *testing.T, v *Vault) {
	m := configuredEngine(t, v, "expired")
	m.kaizala.SetAccessTokenLife(6 * time.Second)
	m.addTenant("acme", fields{"ttl": "2s"})
	creds := m.read("creds/acme").ok(t)
	expires := creds.time(t, "expire_time")
	var refusal answer
	Eventually(t, "renewals to end", func() bool {
		if a := m.renew(creds.lease(), time.Hour); a.status != 200 {
			refusal = a
		} else if end, err := m.lookUp(creds.lease()); err == nil {
			require.False(t, end.After(expires), "lease until %s, token until %s", end, expires)
		}
		return refusal.status != 0
	})
	require.Equal(t, 400, refusal.status, refusal.body)
	Eventually(t, "the token to expire", func() bool { return time.Now().After(expires) })
	require.Equal(t, 400, m.renew(creds.lease(), time.Hour).status)
	require.False(t, m.kaizala.AccessTokenAlive(creds.text("access_token")))
	require.True(t, m.kaizala.AccessTokenAlive(m.access("acme")))
}

// Leases are renewed at different fractions of a second until they cannot be renewed any more: the engine never asks Vault for more than
// it may give, for which Vault would warn the client that its TTL "exceeded the effective max_ttl". Vault does warn a client that asks for
// more itself.
func acceptRenewalsWithoutWarning(t *testing.T, v *Vault) {
	kaizala := func(path string) mount {
		m := configuredEngine(t, v, path)
		m.kaizala.SetAccessTokenLife(14 * time.Second)
		m.addTenant("acme", fields{"ttl": "3s"})
		return m
	}
	planned := func(path string) mount {
		server := newAuthServer(t)
		server.Set(func(o *oauth2test.Options) { oauth2test.ClassD(o); o.AccessTokenLife = 28 * time.Second })
		id, secret := server.RegisterClient(oauth2test.AuthBasic)
		v.Mount(t, path)
		m := mount{t: t, vault: v, path: path, token: v.RootToken, heard: &answers{}}
		m.write("config", fields{"service": "oauth2", "issuer": server.Issuer(), "connector_id": id, "connector_secret": secret}).ok(t)
		m.write("tenants/acme", fields{"refresh_token": server.Grant(id, "asha"), "ttl": "3s"}).ok(t)
		return m
	}
	cases := []struct {
		name   string
		mount  mount
		tenant fields
		most   string // the mount's maximum
	}{
		{name: "Kaizala", mount: kaizala("unwarned-1")},
		{name: "Kaizala, tenant's max_ttl", mount: kaizala("unwarned-2"), tenant: fields{"max_ttl": "9s"}},
		{name: "Kaizala, mount's max", mount: kaizala("unwarned-3"), most: "9s"},
		{name: "planned exchange", mount: planned("unwarned-4")},
		{name: "planned exchange, tenant's max_ttl", mount: planned("unwarned-5"), tenant: fields{"max_ttl": "9s"}},
		{name: "planned exchange, mount's max", mount: planned("unwarned-6"), most: "9s"},
	}
	for _, c := range cases {
		if c.most != "" {
			tune(t, v, c.mount.path, "", c.most)
		}
		if c.tenant != nil {
			c.mount.write("tenants/acme", c.tenant).ok(t)
		}
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			m := c.mount.in(t)
			m.write("tenants/acme/refresh", nil).ok(t)
			lease := m.read("creds/acme").ok(t).lease()
			renewals := 0
			for range time.Tick(37 * time.Millisecond) {
				increment := time.Duration(renewals%3/2) * time.Second // 0, 0, 1 s
				renewed := m.renew(lease, increment)
				if renewed.status != 200 {
					require.Equal(t, 400, renewed.status, renewed.body)
					break
				}
				require.Empty(t, renewed.parsed().Warnings, "renewal %d, by %s", renewals, increment)
				renewals++
			}
			require.Greater(t, renewals, 30)
		})
	}
}

func acceptRevocation(t *testing.T, v *Vault) {
	m := configuredEngine(t, v, "revocation")

	t.Run("the last lease retires the token", func(t *testing.T) {
		m := m.in(t)
		m.addTenant("last")
		creds := []answer{m.read("creds/last").ok(t), m.read("creds/last").ok(t), m.read("creds/last").ok(t)}
		token := creds[0].text("access_token")
		for _, c := range creds {
			require.Equal(t, token, m.access("last"), "the token stays until the last lease is revoked")
			calls := m.kaizala.CallCount()
			m.revoke(c.lease())
			require.Equal(t, calls, m.kaizala.CallCount(), "a revocation makes no call")
		}
		next := m.access("last")
		require.NotEqual(t, token, next)
		require.Equal(t, 2, m.kaizala.Exchanges("last"))
		m.revoke(creds[0].lease()) // revoked a second time
		require.Equal(t, next, m.access("last"))
	})

	t.Run("so does the reader's death", func(t *testing.T) {
		m := m.in(t)
		m.addTenant("death")
		v.Policy(t, "reader", `path "revocation/creds/death" { capabilities = ["read"] }`)
		reader := m.as(v.TokenWith(t, "reader"))
		token := reader.read("creds/death").ok(t).text("access_token")
		require.NoError(t, v.Client.Auth().Token().RevokeTree(reader.token))
		Eventually(t, "the token to be given up", func() bool { return m.access("death") != token })
	})

	t.Run("the leases' own end does not", func(t *testing.T) {
		m := m.in(t)
		m.addTenant("natural", fields{"ttl": "2s"})
		renewed, left := m.read("creds/natural").ok(t), m.read("creds/natural").ok(t)
		m.renew(renewed.lease(), 3*time.Second).ok(t)
		Eventually(t, "both leases to end", func() bool {
			one, _ := m.lookUp(renewed.lease())
			other, _ := m.lookUp(left.lease())
			return one.IsZero() && other.IsZero()
		})
		require.Equal(t, left.text("access_token"), m.access("natural"))
		require.Equal(t, 1, m.kaizala.Exchanges("natural"))
	})

	t.Run("-prefix empties a tenant", func(t *testing.T) {
		m := m.in(t)
		m.addTenant("prefix")
		token := m.read("creds/prefix").ok(t).text("access_token")
		for range 30 {
			m.read("creds/prefix").ok(t)
		}
		out, exit := v.CLI(t, v.RootToken, "lease", "revoke", "-prefix", "-sync", "revocation/creds/prefix")
		require.Zero(t, exit, out)
		require.Empty(t, m.leases())
		require.NotEqual(t, token, m.access("prefix"))
		require.Equal(t, 2, m.kaizala.Exchanges("prefix"))
	})
}

// A lease can be revoked after its tenant, its connector and Kaizala are gone.
func acceptRevocationWithNothingLeft(t *testing.T, v *Vault) {
	m := configuredEngine(t, v, "nothing")
	m.addTenant("acme")
	m.addTenant("kept")
	creds := []answer{m.read("creds/acme").ok(t), m.read("creds/acme").ok(t), m.read("creds/kept").ok(t)}
	m.kaizala.Close()
	m.revoke(creds[2].lease())
	require.Equal(t, 503, m.read("creds/kept").status, "the access token is given up, and Kaizala is not there to issue another")
	require.Equal(t, 204, m.delete("tenants/acme").status)
	m.revoke(creds[0].lease())
	require.Equal(t, 204, m.delete("tenants/kept").status)
	require.Equal(t, 204, m.delete("config").status)
	m.revoke(creds[1].lease())
	require.Empty(t, m.leases())
	requireNoIrrevocableLeases(t, v)
}

// The repository's policies for the three people.
func acceptPolicies(t *testing.T, v *Vault) {
	m := mountEngine(t, v, "kaizala")
	as := map[string]mount{}
	for _, name := range []string{"connector-owner", "tenant-user", "app"} {
		v.Policy(t, name, policyFile(t, name))
		as[name] = m.as(v.TokenWith(t, name))
	}
	owner, user, app := as["connector-owner"], as["tenant-user"], as["app"]

	// The owner writes the connector's ID and secret, and cannot change the address
	// that refresh tokens are sent to.
	mine := fields{"connector_id": m.connectorID, "connector_secret": m.connectorSecret}
	owner.write("config", mine).ok(t)
	for field, value := range map[string]any{
		"api_root": "https://elsewhere.example", "redirect_hosts": "elsewhere.example", "ca_cert": "x",
		"request_timeout": "1s", "exchanges_per_minute": 1,
	} {
		require.Equal(t, 403, owner.write("config", fields{field: value}).status, field)
		require.Equal(t, 403, owner.patch("config", fields{field: value}).status, field)
		require.Equal(t, 403, owner.write("config", fields{"connector_id": m.connectorID, "connector_secret": m.connectorSecret, field: value}).status, field)
	}
	require.Equal(t, "https://api.kaiza.la", m.read("config").ok(t).text("api_root"))
	m.write("config", fields{"api_root": m.kaizala.URL}).ok(t)
	owner.write("config", mine).ok(t)
	require.Equal(t, m.kaizala.URL, m.read("config").ok(t).text("api_root"), "the operator's setting stays")

	refresh := m.kaizala.GenerateUserToken(m.connectorID, "acme")
	user.write("tenants/acme", fields{"refresh_token": refresh}).ok(t)
	require.Equal(t, "ok", user.read("tenants/acme").ok(t).text("status"))
	user.patch("tenants/acme", fields{"ttl": "1h"}).ok(t)

	creds := app.read("creds/acme").ok(t)
	require.True(t, m.kaizala.AccessTokenAlive(creds.text("access_token")))
	app.renew(creds.lease(), time.Hour).ok(t)
	app.revoke(creds.lease())

	for person, m := range as {
		for _, other := range []string{"tenants/other", "creds/other", "token/acme", "config/hr"} {
			require.Equal(t, 403, m.read(other).status, "%s reads %s", person, other)
		}
	}
	for _, denied := range []answer{
		owner.read("config"), owner.read("tenants/acme"), owner.write("tenants/acme", fields{"ttl": "1h"}), owner.read("creds/acme"), owner.delete("config"),
		user.read("config"), user.write("config", mine), user.read("creds/acme"),
		app.read("config"), app.read("tenants/acme"), app.write("tenants/acme", fields{"refresh_token": refresh}), app.write("tenants/acme/refresh", nil),
	} {
		require.Equal(t, 403, denied.status, "%s: %s", denied.request, denied.body)
	}
	for _, a := range m.heard.list() {
		require.NotContains(t, a.body, m.connectorSecret, a.request)
		require.NotContains(t, a.body, refresh, a.request)
	}
}

// One policy for all apps: each reads the tenant that its entity names.
func acceptTemplatedPolicy(t *testing.T, v *Vault) {
	m := configuredEngine(t, v, "templated")
	m.addTenant("acme")
	m.addTenant("globex")
	v.Policy(t, "own-tenant", `path "templated/creds/{{identity.entity.metadata.tenant}}" { capabilities = ["read"] }`)

	require.NoError(t, v.Client.Sys().EnableAuthWithOptions("userpass", &api.EnableAuthOptions{Type: "userpass"}))
	auths, err := v.Client.Sys().ListAuth()
	require.NoError(t, err)
	login := func(app, tenant string) mount {
		m.sys(http.MethodPut, "auth/userpass/users/"+app, fields{"password": "pw-" + app, "token_policies": "own-tenant"}).ok(t)
		entity := m.sys(http.MethodPut, "identity/entity", fields{"name": app, "metadata": fields{"tenant": tenant}}).ok(t).text("id")
		m.sys(http.MethodPut, "identity/entity-alias", fields{"name": app, "canonical_id": entity, "mount_accessor": auths["userpass/"].Accessor}).ok(t)
		in := m.sys(http.MethodPut, "auth/userpass/login/"+app, fields{"password": "pw-" + app}).ok(t)
		return m.as(in.parsed().Auth.ClientToken)
	}
	one, other := login("acme-app", "acme"), login("globex-app", "globex")
	require.Equal(t, "acme", one.read("creds/acme").ok(t).text("tenant"))
	require.Equal(t, "globex", other.read("creds/globex").ok(t).text("tenant"))
	require.Equal(t, 403, one.read("creds/globex").status)
	require.Equal(t, 403, other.read("creds/acme").status)
}

func acceptWrapping(t *testing.T, v *Vault) {
	m := configuredEngine(t, v, "wrapped")
	m.addTenant("acme")
	wrapped := m.request(http.MethodGet, "wrapped/creds/acme", nil, http.Header{"X-Vault-Wrap-Ttl": {"60"}}).ok(t)
	require.Empty(t, wrapped.data())
	token := wrapped.parsed().WrapInfo.Token
	require.NotEmpty(t, token)
	creds := m.as(token).sys(http.MethodPut, "sys/wrapping/unwrap", nil).ok(t)
	require.True(t, m.kaizala.AccessTokenAlive(creds.text("access_token")))
	require.NotEmpty(t, creds.lease())
	require.Equal(t, 400, m.as(token).sys(http.MethodPut, "sys/wrapping/unwrap", nil).status, "once")
	m.revoke(creds.lease())
	require.NotEqual(t, creds.text("access_token"), m.access("acme"))
}

// Two mounts share the plugin's process, and nothing else.
func acceptTwoMounts(t *testing.T, v *Vault) {
	one, two := configuredEngine(t, v, "one"), configuredEngine(t, v, "two")
	require.Len(t, pluginsIn(t, v.PluginDir), 1)
	one.addTenant("acme")
	require.Equal(t, 404, two.read("tenants/acme").status)
	two.read("creds/acme").refused(t, 400, "acme")
	two.addTenant("acme")
	creds, others := one.read("creds/acme").ok(t), two.read("creds/acme").ok(t)
	require.NotEqual(t, creds.text("access_token"), others.text("access_token"))
	one.revoke(creds.lease())
	require.Equal(t, others.text("access_token"), two.access("acme"))
	require.Equal(t, 204, one.delete("tenants/acme").status)
	require.Equal(t, 204, one.delete("config").status)
	require.Equal(t, others.text("access_token"), two.access("acme"))
	require.Equal(t, 1, two.kaizala.CallCount())
}

func acceptUnmount(t *testing.T, v *Vault) {
	m := configuredEngine(t, v, "unmounted")
	m.addTenant("acme")
	for range 10 {
		m.read("creds/acme").ok(t)
	}
	require.Len(t, m.leases(), 10)
	require.NoError(t, v.Client.Sys().Unmount("unmounted"))
	require.Empty(t, m.leases())
	// A mount at the path of an earlier one has none of its data.
	v.Mount(t, "unmounted")
	require.Equal(t, 404, m.read("config").status)
	require.Equal(t, 404, m.list("tenants").status)
}

// A reload, a kill of the plugin, a seal or a restart of Vault causes no exchange while
// an access token is usable, and a token that was given up is not handed out again.
func acceptInterruptions(t *testing.T, v *Vault) {
	m := configuredEngine(t, v, "lasting")
	m.addTenant("kept", fields{"ttl": "1h"})
	kept := m.read("creds/kept").ok(t)
	m.kaizala.SetAccessTokenLife(2 * time.Hour)
	m.addTenant("given-up")
	for _, interruption := range []struct {
		name  string
		cause func(t *testing.T)
	}{
		{"seal and unseal", func(t *testing.T) {
			v.Seal(t)
			v.Unseal(t)
		}},
		{"plugin reload", func(t *testing.T) {
			out, exit := v.CLI(t, v.RootToken, "plugin", "reload", "-type=secret", "-plugin="+PluginName)
			require.Zero(t, exit, out)
		}},
		{"death of the plugin's process", func(t *testing.T) {
			running := pluginsIn(t, v.PluginDir)
			require.Len(t, running, 1)
			pid, err := strconv.Atoi(running[0])
			require.NoError(t, err)
			require.NoError(t, syscall.Kill(pid, syscall.SIGKILL))
			Eventually(t, "the plugin to be dead", func() bool { return !slices.Contains(pluginsIn(t, v.PluginDir), running[0]) })
		}},
		{"restart of Vault", func(t *testing.T) { v.Restart(t) }},
	} {
		t.Run(interruption.name, func(t *testing.T) {
			m := m.in(t)
			given := m.read("creds/given-up").ok(t)
			other := m.read("creds/given-up").ok(t)
			m.revoke(given.lease())
			m.revoke(other.lease())
			exchanges := m.kaizala.Exchanges("given-up")

			interruption.cause(t)

			// Vault needs a moment to see that a process has died.
			Eventually(t, "the engine to answer", func() bool { return m.read("token/kept").status == 200 })
			require.Equal(t, kept.text("access_token"), m.read("creds/kept").ok(t).text("access_token"))
			require.Equal(t, 1, m.kaizala.Exchanges("kept"))
			require.Equal(t, "ok", m.read("tenants/kept").ok(t).text("status"))
			require.Equal(t, m.connectorID, m.read("config").ok(t).text("connector_id"))
			require.NotEqual(t, given.text("access_token"), m.access("given-up"))
			require.Equal(t, exchanges+1, m.kaizala.Exchanges("given-up"))
			m.renew(kept.lease(), time.Hour).ok(t)
		})
	}

	// The count of the leases from before is lost: one revocation gives the token
	// up.
	m.revoke(kept.lease())
	require.NotEqual(t, kept.text("access_token"), m.access("kept"))
}
