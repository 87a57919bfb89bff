package vaulttest

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// The other secrets engine for OAuth 2.0, the subject of bootstrap/coming-from-oauthapp.md.
const (
	oauthappModule  = "github.com/puppetlabs/vault-plugin-secrets-oauthapp/v3"
	oauthappVersion = "v3.1.1"
)

// oauthappBinary returns the path of oauthapp, and builds it from its module if it is missing, which takes minutes.
func oauthappBinary(t *testing.T) string {
	t.Helper()
	root, err := Root()
	require.NoError(t, err)
	path := filepath.Join(root, "bin", "oauthapp-"+oauthappVersion)
	if _, err := os.Stat(path); err == nil {
		return path
	}
	dir := t.TempDir()
	tmp := fmt.Sprintf("%s.%d", path, os.Getpid())
	defer os.Remove(tmp)
	require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
	program := oauthappModule + "/cmd/vault-plugin-secrets-oauthapp"
	for _, args := range [][]string{
		{"mod", "init", "oauthapp"},
		{"get", program + "@" + oauthappVersion},
		{"build", "-trimpath", "-ldflags=-s -w", "-o", tmp, program},
	} {
		cmd := exec.Command("go", args...)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, "go %s\n%s", strings.Join(args, " "), out)
	}
	require.NoError(t, os.Rename(tmp, path))
	return path
}

// oauthapp makes an exchange when a reader asks for more life than an access token of an hour has left after overlong.
const (
	moreThanLeft = "minimum_seconds=3597"
	overlong     = 4 * time.Second
)

// withOAuthApp starts a Vault that has both engines, oauthapp at oauth2/ and this one at kaizala/, with the same client of one
// authorization server.
func withOAuthApp(t *testing.T) (ours, theirs mount, service *oauth2test.Server, clientID string) {
	t.Helper()
	oauthapp := oauthappBinary(t)
	t.Parallel() // so that other tests run during the build
	v := Start(t)
	v.MountEngine(t, "kaizala")
	// oauthapp reports no version, so Vault accepts none for it.
	v.RegisterAs(t, "oauthapp", "", oauthapp)
	require.NoError(t, v.Client.Sys().Mount("oauth2", &api.MountInput{Type: "oauthapp"}))

	service = oauth2test.New()
	service.Set(oauth2test.ClassA) // in this class, the reuse of a refresh token ends the grant
	t.Cleanup(service.Listen())
	callback := v.Addr + "/v1/kaizala/callback"
	clientID, secret := service.RegisterClient(oauth2test.AuthBasic, callback)

	theirs = mount{t: t, vault: v, path: "oauth2", token: v.RootToken, heard: &answers{}}
	theirs.write("servers/example", fields{
		"provider": "custom", "client_id": clientID, "client_secret": secret,
		"provider_options": map[string]string{"token_url": service.TokenURL(), "auth_code_url": service.AuthorizationURL(), "auth_style": "in_header"},
	}).ok(t)
	ours = theirs
	ours.path = "kaizala"
	ours.write("config", fields{
		"service": "oauth2", "issuer": service.Issuer(), "redirect_uris": callback, "exchange_invalidates": false,
		"connector_id": clientID, "connector_secret": secret, "exchanges_per_minute": 6000,
	}).ok(t)
	return ours, theirs, service, clientID
}

// The steps of bootstrap/coming-from-oauthapp.md: readers of both engines are served all the time.
func TestComingFromOAuthApp(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: another engine, which has to be built; make test runs it")
	}
	ours, theirs, service, clientID := withOAuthApp(t)
	old := service.Grant(clientID, "asha")
	theirs.write("creds/acme", fields{"server": "example", "grant_type": "refresh_token", "refresh_token": old}).ok(t)
	before := theirs.read("creds/acme").ok(t)
	require.Zero(t, before.lease(), "oauthapp has no leases")
	for _, field := range []string{"access_token", "type", "expire_time", "server"} {
		require.NotEmpty(t, before.text(field), field)
	}
	for _, held := range []string{"creds/acme", "servers/example", "config"} {
		require.NotContains(t, theirs.read(held).body, service.CurrentRefreshToken("asha"), "the refresh token cannot be read out")
	}

	// The tenant gets its own grant, and the old one stays.
	started := ours.write("tenants/acme/authorize", nil).ok(t)
	back, err := service.Approve(started.text("authorization_url"), "asha")
	require.NoError(t, err)
	u, err := url.Parse(back)
	require.NoError(t, err)
	ours.write("callback", fields{"code": u.Query().Get("code"), "state": u.Query().Get("state")}).ok(t)
	after := ours.read("creds/acme").ok(t)
	require.NotZero(t, after.lease())
	require.Equal(t, before.text("type"), after.text("token_type"))
	require.NotEqual(t, before.text("access_token"), after.text("access_token"))

	// Both engines serve readers and make exchanges.
	require.Equal(t, before.text("access_token"), theirs.read("creds/acme").ok(t).text("access_token"))
	time.Sleep(overlong)
	require.NotEqual(t, before.text("access_token"), theirs.read("creds/acme?"+moreThanLeft).ok(t).text("access_token"))
	ours.write("tenants/acme/refresh", nil).ok(t)
	require.True(t, service.Alive(before.text("access_token")))
	require.True(t, service.Alive(after.text("access_token")))
	require.True(t, service.Alive(ours.access("acme")))

	// When the old credential has no readers any more, it is deleted. That ends nothing at the service.
	theirs.delete("creds/acme").ok(t)
	require.NotEqual(t, 200, theirs.read("creds/acme").status)
	require.True(t, service.Alive(before.text("access_token")))
	require.Equal(t, "ok", ours.read("tenants/acme").ok(t).data()["status"])
	require.Empty(t, service.LostGrants())
}

// Readers of both engines cancel after the service has replaced the refresh token and before it answers: 20 tenants, 3 times. Then
// each tenant is read once more. A tenant without an access token is lost: a person has to consent again.
func TestHangUpsBesideOAuthApp(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: another engine, which has to be built; make test runs it")
	}
	const tenants, rounds = 20, 3
	ours, theirs, service, clientID := withOAuthApp(t)
	ours.write("config", fields{"revocation": "access_token"}).ok(t)
	for i := range tenants {
		ours.write(fmt.Sprint("tenants/t", i), fields{"refresh_token": service.Grant(clientID, fmt.Sprint("ours", i)), "token_per_lease": true}).ok(t)
		theirs.write(fmt.Sprint("creds/t", i), fields{"server": "example", "grant_type": "refresh_token", "refresh_token": service.Grant(clientID, fmt.Sprint("theirs", i))}).ok(t)
	}
	// Each of these reads causes an exchange: by token_per_lease in this engine, and by a token that is too old in oauthapp.
	read := func(ctx context.Context, m mount, tenant int) (int, error) {
		path := fmt.Sprintf("%s/v1/%s/creds/t%d", m.vault.Addr, m.path, tenant)
		if m.path == theirs.path {
			path += "?" + moreThanLeft
		}
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, path, nil)
		if err != nil {
			return 0, err
		}
		req.Header.Set("X-Vault-Token", m.token)
		resp, err := m.vault.http.Do(req)
		if err != nil {
			return 0, err
		}
		defer resp.Body.Close()
		var body map[string]any
		return resp.StatusCode, json.NewDecoder(resp.Body).Decode(&body)
	}

	lost := map[string]int{}
	for _, m := range []mount{theirs, ours} {
		user := map[string]string{theirs.path: "theirs", ours.path: "ours"}[m.path]
		for range rounds {
			time.Sleep(overlong)
			before := len(service.Calls(oauth2test.EndpointToken))
			service.Inject(oauth2test.Fault{Hold: true})
			ctx, hangUp := context.WithCancel(t.Context())
			var readers sync.WaitGroup
			for i := range tenants {
				readers.Go(func() { _, _ = read(ctx, m, i) })
			}
			// For a tenant that is lost already, the engine may make no call.
			poll(3*time.Second, func() bool {
				processed := 0
				for _, call := range service.Calls(oauth2test.EndpointToken)[before:] {
					if call.Processed {
						processed++
					}
				}
				return processed >= tenants
			})
			hangUp()
			readers.Wait()
			time.Sleep(300 * time.Millisecond) // until the engine knows that the reader has cancelled
			service.ClearFaults()
		}
		for i := range tenants {
			if status, err := read(t.Context(), m, i); err != nil || status != http.StatusOK {
				lost[user]++
			}
		}
	}
	ended := map[string]int{}
	for _, grant := range service.LostGrants() {
		ended[strings.TrimRight(grant.User, "0123456789")]++
	}
	t.Logf("readers hung up in %d rounds, of %d tenants each:", rounds, tenants)
	t.Logf("oauthapp %s: %d tenants lost, %d grants ended by the service", oauthappVersion, lost["theirs"], ended["theirs"])
	t.Logf("this engine:     %d tenants lost, %d grants ended by the service", lost["ours"], ended["ours"])
	require.Zero(t, lost["ours"])
	require.Zero(t, ended["ours"])
	require.Positive(t, lost["theirs"], "bootstrap/coming-from-oauthapp.md says that it loses tenants")
}
