package vaulttest

import (
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// shortLived is how long access tokens live here. The tenant's min_ttl leaves
// Vault Agent, which adds a second of its own, some room on a busy machine.
const shortLived = 14 * time.Second

func agentSite(t *testing.T, tenant map[string]any) *site {
	t.Helper()
	s := newSite(t)
	s.kaizala.SetAccessTokenLife(shortLived)
	s.configure(t, nil)
	tenant["min_ttl"] = "5s"
	s.tenant(t, "acme", tenant)
	require.NoError(t, s.Client.Sys().EnableAuthWithOptions("approle", &api.EnableAuthOptions{Type: "approle"}))
	return s
}

// startAgent runs the pinned Vault's agent with a shipped configuration, in a
// directory that it returns, as an AppRole with a shipped policy.
func (s *site) startAgent(t *testing.T, config, policy string) (dir string) {
	t.Helper()
	s.shippedPolicy(t, policy)
	s.write(t, "auth/approle/role/"+policy, map[string]any{"token_policies": policy, "token_ttl": "1h"})
	secretID, err := s.Client.Logical().Write("auth/approle/role/"+policy+"/secret-id", nil)
	require.NoError(t, err)

	dir, err = os.MkdirTemp("", "agent") // a short path, because the path of a socket is limited
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	file := func(name string, text any) {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), []byte(text.(string)), 0o600))
	}
	file("role-id", s.read(t, "auth/approle/role/"+policy+"/role-id")["role_id"])
	file("secret-id", secretID.Data["secret_id"])
	log, err := os.Create(filepath.Join(dir, "agent.log"))
	require.NoError(t, err)
	defer log.Close()
	agent, err := startProcess(s.binary, dir, log, cleanEnv("HOME="+dir, "VAULT_ADDR="+s.Addr), "agent", "-config="+bootstrapFile(t, "agent", config))
	require.NoError(t, err)
	t.Cleanup(func() {
		agent.kill()
		if t.Failed() {
			t.Logf("the end of Agent's log:\n%s", tail(contents(log.Name()), 30))
		}
	})
	return dir
}

// rendered is the access token in the file that Agent keeps, or "".
func (s *site) rendered(t *testing.T, dir string) string {
	t.Helper()
	text := contents(filepath.Join(dir, "access-token.json"))
	if text == "" {
		return ""
	}
	var file struct {
		AccessToken string    `json:"access_token"`
		EndpointURL string    `json:"endpoint_url"`
		ExpireTime  time.Time `json:"expire_time"`
	}
	require.NoError(t, json.Unmarshal([]byte(text), &file), "%s", text)
	require.Equal(t, s.kaizala.URL, file.EndpointURL)
	require.NotZero(t, file.ExpireTime)
	return file.AccessToken
}

// firstToken waits until the file has a token.
func (s *site) firstToken(t *testing.T, dir string) (token string) {
	t.Helper()
	Eventually(t, "Agent to render", func() bool { token = s.rendered(t, dir); return token != "" })
	info, err := os.Stat(filepath.Join(dir, "access-token.json"))
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o600), info.Mode().Perm())
	return token
}

// The file that Agent renders always has a token that works, also after the first one has
// expired.
func TestAgentRenders(t *testing.T) {
	t.Parallel()
	s := agentSite(t, map[string]any{})
	unleased := s.startAgent(t, "token.hcl", "sidecar")
	s.firstToken(t, unleased)
	leases, err := s.Client.Logical().List("sys/leases/lookup/kaizala/")
	require.NoError(t, err)
	require.Nil(t, leases, "a read of token makes no lease")

	leased := s.startAgent(t, "creds.hcl", "app")
	first := s.firstToken(t, leased)
	Eventually(t, "the first access token to expire", func() bool {
		for _, dir := range []string{unleased, leased} {
			require.True(t, s.kaizala.AccessTokenAlive(s.rendered(t, dir)), "a token that does not work in the file")
		}
		return !s.kaizala.AccessTokenAlive(first)
	})

	// After a refresh by hand, the new token is in the file no later than the old one
	// would have been replaced.
	refreshed := s.rendered(t, unleased)
	s.write(t, "kaizala/tenants/acme/refresh", nil)
	Eventually(t, "the token that was refreshed to go", func() bool { return s.rendered(t, unleased) != refreshed })
	require.True(t, s.kaizala.AccessTokenAlive(s.rendered(t, unleased)))
}

// An authorization server names no endpoint: the file has null.
func TestAgentRendersForOAuth(t *testing.T) {
	t.Parallel()
	s := &site{Vault: Start(t)}
	s.MountEngine(t, "kaizala")
	server := newAuthServer(t)
	id, secret := server.RegisterClient(oauth2test.AuthBasic)
	s.write(t, "kaizala/config", map[string]any{"service": "oauth2", "issuer": server.Issuer(), "connector_id": id, "connector_secret": secret})
	s.write(t, "kaizala/tenants/acme", map[string]any{"refresh_token": server.Grant(id, "asha"), "ttl": "15m"})
	require.NoError(t, s.Client.Sys().EnableAuthWithOptions("approle", &api.EnableAuthOptions{Type: "approle"}))
	for config, policy := range map[string]string{"token.hcl": "sidecar", "creds.hcl": "app"} {
		dir := s.startAgent(t, config, policy)
		Eventually(t, "Agent to render by "+config, func() bool { return contents(filepath.Join(dir, "access-token.json")) != "" })
		var file map[string]any
		require.NoError(t, json.Unmarshal([]byte(contents(filepath.Join(dir, "access-token.json"))), &file))
		require.True(t, server.Alive(file["access_token"].(string)))
		require.Contains(t, file, "endpoint_url")
		require.Nil(t, file["endpoint_url"])
	}
}

// With a ttl the leases are renewable: Agent notices a revocation, and its proxy
// caches them.
func TestAgentNoticesRevocation(t *testing.T) {
	t.Parallel()
	s := agentSite(t, map[string]any{"ttl": "4s"})
	rendering := s.startAgent(t, "creds.hcl", "app")
	s.firstToken(t, rendering)
	dir := s.startAgent(t, "proxy.hcl", "app")
	socket := filepath.Join(dir, "agent.sock")
	through := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
	}}
	// read returns what the proxy answers, and whether its cache had it.
	read := func() (secret api.Secret, hit bool) {
		resp, err := through.Get("http://agent/v1/kaizala/creds/acme")
		require.NoError(t, err)
		defer resp.Body.Close()
		text, err := io.ReadAll(resp.Body)
		require.NoError(t, err)
		require.Equal(t, 200, resp.StatusCode, "%s", text)
		require.NoError(t, json.Unmarshal(text, &secret))
		require.True(t, s.kaizala.AccessTokenAlive(secret.Data["access_token"].(string)), "a token that does not work")
		return secret, resp.Header.Get("X-Cache") == "HIT"
	}
	Eventually(t, "Agent to listen", func() bool {
		resp, err := through.Get("http://agent/v1/auth/token/lookup-self")
		if err != nil {
			return false
		}
		defer resp.Body.Close()
		return resp.StatusCode == 200
	})

	first, hit := read()
	require.False(t, hit)
	require.True(t, first.Renewable)
	again, hit := read()
	require.True(t, hit, "readers share one lease")
	require.Equal(t, first.LeaseID, again.LeaseID)

	var fresh api.Secret
	Eventually(t, "the first access token to expire", func() bool {
		fresh, _ = read()
		require.True(t, s.kaizala.AccessTokenAlive(s.rendered(t, rendering)), "a token that does not work in the file")
		return !s.kaizala.AccessTokenAlive(first.Data["access_token"].(string))
	})
	require.NotEqual(t, first.LeaseID, fresh.LeaseID)

	revoked := s.rendered(t, rendering)
	require.NoError(t, s.Client.Sys().RevokePrefix("kaizala/creds/acme"))
	Eventually(t, "the revoked lease to leave the cache", func() bool {
		now, _ := read()
		return now.LeaseID != fresh.LeaseID && now.Data["access_token"] != fresh.Data["access_token"]
	})

	Eventually(t, "the revoked token to leave the file", func() bool { return s.rendered(t, rendering) != revoked })
	require.True(t, s.kaizala.AccessTokenAlive(s.rendered(t, rendering)))

	// Without a ttl the lease is not renewable, and nothing is cached.
	_, err := s.Client.Logical().JSONMergePatch(t.Context(), "kaizala/tenants/acme", map[string]any{"ttl": nil})
	require.NoError(t, err)
	require.NoError(t, s.Client.Sys().RevokePrefix("kaizala/creds/acme"))
	Eventually(t, "the cache to let go of the last renewable lease", func() bool {
		secret, hit := read()
		return !hit && !secret.Renewable
	})
	_, hit = read()
	require.False(t, hit)

	// The vault command works through the socket too.
	cli := exec.Command(s.binary, "read", "-field=tenant", "kaizala/creds/acme")
	cli.Env = cleanEnv("HOME="+dir, "VAULT_AGENT_ADDR=unix://"+socket)
	out, err := cli.CombinedOutput()
	require.NoError(t, err, "%s", out)
	require.Equal(t, "acme", strings.TrimSpace(string(out)))
}
