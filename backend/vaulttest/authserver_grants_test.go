package vaulttest

import (
	"fmt"
	"net/url"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/vaulttest/browser"
)

// A person connects a tenant at servers of other projects, and never sees a refresh token: by the code flow with a browser,
// which ends on the engine's own pages, and by the device flow. Each grant is then used like any other.
func TestGrantsOnAuthServers(t *testing.T) {
	t.Parallel()
	v := Start(t)
	v.RegisterEngine(t)
	for _, c := range []struct {
		name   string
		start  func(testing.TB, ...string) *AuthServer
		config fields
	}{
		{"zitadel", StartZitadel, fields{"revocation": "access_token"}},
		{"oidc-provider", StartOIDCProvider, fields{"exchange_invalidates": false, "authorization_params": map[string]string{"prompt": "consent"}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			callback := fmt.Sprintf("%s/v1/%s/callback", v.Addr, c.name)
			s := c.start(t, "REDIRECT_URIS="+callback)
			config := fields{"scopes": "openid,offline_access", "redirect_uris": callback}
			for name, value := range c.config {
				config[name] = value
			}
			m := oauthMount(t, v, s, c.name, config)
			person := browser.Person{User: s.User, Password: s.Password}
			granted := func(t *testing.T, tenant, by string) {
				t.Helper()
				require.Equal(t, "granted", m.read("tenants/" + tenant + "/" + by).ok(t).data()["status"])
				status := m.read("tenants/" + tenant).ok(t).data()
				require.Equal(t, "ok", status["status"])
				require.Equal(t, s.User, status["subject"])
				require.Equal(t, "root", status["granted_by"])
				creds := m.read("creds/" + tenant).ok(t)
				require.True(t, s.Alive(t, creds.text("access_token")))
				require.Zero(t, s.Stats(t).Reused+s.Stats(t).Refused)
				m.revoke(creds.lease())
				require.True(t, s.Alive(t, m.access(tenant)), "the access token of an exchange of the grant's refresh token")
			}
			start := func(t *testing.T, tenant string) string {
				t.Helper()
				return m.write("tenants/"+tenant+"/authorize", fields{}).ok(t).text("authorization_url")
			}

			t.Run("code", func(t *testing.T) {
				visit, err := person.Open(start(t, "acme"))
				require.NoError(t, err)
				for _, page := range visit.Pages {
					t.Log(page.Status, page.URL.Path, page.Text())
				}
				require.Equal(t, 200, visit.Last().Status)
				require.Contains(t, visit.Last().Text(), "acme")
				granted(t, "acme", "authorize")
			})

			t.Run("code, pasted by hand", func(t *testing.T) {
				back := s.Consent(t, start(t, "pasted"))
				u, err := url.Parse(back)
				require.NoError(t, err)
				query := fields{}
				for name, values := range u.Query() {
					query[name] = values[0]
				}
				m.write("callback", query).ok(t)
				granted(t, "pasted", "authorize")
				require.Equal(t, 400, m.write("callback", query).status, "a state works once")
			})

			t.Run("denied", func(t *testing.T) {
				if c.name == "zitadel" {
					return // its login page has no way to refuse
				}
				refuses := person
				refuses.Refuses = true
				visit, err := refuses.Open(start(t, "denied"))
				require.NoError(t, err)
				t.Log(visit.Last().Text())
				require.Equal(t, 200, visit.Last().Status)
				require.Equal(t, "denied", m.read("tenants/denied/authorize").ok(t).data()["status"])
				require.Equal(t, 404, m.read("tenants/denied").status)
			})

			t.Run("device", func(t *testing.T) {
				d := m.write("tenants/device/device", fields{}).ok(t)
				s.DeviceApprove(t, d.text("user_code"))
				began := time.Now()
				Eventually(t, "the engine's poll", func() bool { return m.read("tenants/device/device").ok(t).data()["status"] != "pending" })
				t.Logf("granted after %s", time.Since(began).Round(time.Millisecond))
				granted(t, "device", "device")

				d = m.write("tenants/refused/device", fields{}).ok(t)
				s.DeviceDeny(t, d.text("user_code"))
				Eventually(t, "the engine's poll", func() bool { return m.read("tenants/refused/device").ok(t).data()["status"] != "pending" })
				require.Equal(t, "denied", m.read("tenants/refused/device").ok(t).data()["status"])
				require.Equal(t, 404, m.read("tenants/refused").status)
			})

			t.Run("without a refresh token", func(t *testing.T) {
				m.write("config", fields{"scopes": "openid"}).ok(t)
				visit, err := person.Open(start(t, "none"))
				require.NoError(t, err)
				t.Log(visit.Last().Status, visit.Last().Text())
				a := m.read("tenants/none/authorize").ok(t).data()
				require.Equal(t, "failed", a["status"])
				require.Contains(t, a["last_error"], "offline_access")
				require.Equal(t, 404, m.read("tenants/none").status)
			})
		})
	}
}
