package vaulttest

import (
	"io"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-cleanhttp"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/vaulttest/browser"
)

// Each flow begins on one leader, whose Vault and plugin are then killed, and ends on the next leader. The kill comes before the
// person comes back or while the page asks for confirmation (code flow), before the person decides (device flow), and between the
// two requests (PIN login). Each tenant is then read.
func TestGrantsOverAFailover(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: three Vaults, whose leader is killed; make test runs it")
	}
	t.Parallel()
	f := startFailover(t)
	killed := f.cluster.Leader(t)
	// The browser comes back to a node that still runs, as the leader or not.
	other := slices.IndexFunc(f.cluster.Nodes, func(v *Vault) bool { return v != killed })
	callback := f.cluster.Nodes[other].Addr + "/v1/kaizala/callback"
	s := StartZitadel(t, "REDIRECT_URIS="+callback)
	m := f.leader(t)
	m.write("config/zitadel", fields{
		"service": "oauth2", "issuer": s.Issuer, "connector_id": s.ClientID, "connector_secret": s.ClientSecret, "revocation": "access_token",
		"scopes": "openid,offline_access", "redirect_uris": callback,
	}).ok(t)
	person := browser.Person{User: s.User, Password: s.Password}
	by := fields{"connector": "zitadel"}

	// On the first leader.
	authorized := m.write("tenants/authorized/authorize", by).ok(t).text("authorization_url")
	asked := s.Consent(t, m.write("tenants/asked/authorize", by).ok(t).text("authorization_url"))
	client := cleanhttp.DefaultClient()
	status, page := browse(t, func() (*http.Response, error) { return client.Get(asked) })
	require.Equal(t, 200, status)
	require.Contains(t, page, "Connect this tenant?")
	confirm := page
	userCode := m.write("tenants/device/device", by).ok(t).text("user_code")
	m.write("tenants/phone/pin", fields{"mobile_number": f.kaizala.PhoneNumber("phone")}).ok(t)
	pin := f.kaizala.PIN(f.connectorID, "phone")
	require.NotEmpty(t, pin)

	f.cluster.Kill(killed)
	began := time.Now()
	m = f.at(f.cluster.WaitForLeader(t)).in(t)
	require.NotEqual(t, killed, m.vault)
	Eventually(t, "the next leader to serve", func() bool { return m.read("tenants/device/device").status == 200 })
	t.Logf("the next leader served after %s", time.Since(began).Round(time.Millisecond))
	for _, path := range []string{"authorized/authorize", "asked/authorize", "device/device"} {
		require.Equal(t, "pending", m.read("tenants/"+path).ok(t).text("status"), path)
	}

	// On the next one.
	visit, err := person.Open(authorized)
	require.NoError(t, err)
	require.Contains(t, visit.Last().Text(), "The tenant is connected")
	back, err := url.Parse(asked)
	require.NoError(t, err)
	press := func() (*http.Response, error) {
		return client.PostForm(callback, url.Values{"page": {"1"}, "state": {back.Query().Get("state")}, "confirmation": {confirmationIn(confirm)}})
	}
	status, page = browse(t, press)
	require.Equal(t, 200, status, page)
	require.Contains(t, page, "The tenant is connected")
	status, page = browse(t, press)
	require.Equal(t, 400, status)
	require.Contains(t, page, "This link has been used")
	s.DeviceApprove(t, userCode)
	approved := time.Now()
	Eventually(t, "the next leader's poll", func() bool { return m.read("tenants/device/device").ok(t).text("status") != "pending" })
	t.Logf("the device flow ended %s after the person had decided", time.Since(approved).Round(time.Millisecond))
	require.Equal(t, "granted", m.write("tenants/phone/pin", fields{"pin": pin}).ok(t).text("status"))

	for tenant, path := range map[string]string{"authorized": "authorize", "asked": "authorize", "device": "device"} {
		require.Equal(t, "granted", m.read("tenants/"+tenant+"/"+path).ok(t).text("status"), tenant)
		require.True(t, s.Alive(t, m.read("creds/"+tenant).ok(t).text("access_token")), tenant)
		require.Equal(t, s.User, m.read("tenants/"+tenant).ok(t).text("subject"))
	}
	require.True(t, f.kaizala.AccessTokenAlive(m.read("creds/phone").ok(t).text("access_token")))
	stats := s.Stats(t)
	require.Zero(t, stats.Reused+stats.Refused)
	require.Equal(t, 3, stats.LiveGrants)

	// Without the services, everything can be deleted.
	f.kaizala.Close()
	s.proc.kill()
	require.NoError(t, m.vault.Client.Sys().Unmount("kaizala"))
}

var confirmationInput = regexp.MustCompile(`name="confirmation" value="([^"]+)"`)

// confirmationIn is what the form of a page sends to confirm; "" where the page has no form.
func confirmationIn(page string) string {
	if found := confirmationInput.FindStringSubmatch(page); found != nil {
		return found[1]
	}
	return ""
}

// browse makes a request as a browser does, and returns the page.
func browse(t *testing.T, request func() (*http.Response, error)) (status int, page string) {
	t.Helper()
	resp, err := request()
	require.NoError(t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	require.True(t, strings.HasPrefix(resp.Header.Get("Content-Type"), "text/html"), "%s", body)
	return resp.StatusCode, string(body)
}
