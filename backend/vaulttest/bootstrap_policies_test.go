package vaulttest

import (
	"encoding/json"
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hashicorp/vault/api"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/vaulttest/browser"
)

// The requests that each shipped policy allows and denies. The rows of a table run in
// order on one Vault, which has the engine mounted and nothing configured.
func TestPolicies(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	for _, path := range glob(t, bootstrapFile(t, "policies", "*.hcl")) {
		s.shippedPolicy(t, strings.TrimSuffix(filepath.Base(path), ".hcl"))
	}
	owner := s.TokenWith(t, "connector-owner")
	user := s.TokenWith(t, "tenant-user")
	operator := s.TokenWith(t, "operator")
	app := s.TokenWith(t, "app")
	sidecar := s.TokenWith(t, "sidecar")
	monitor := s.TokenWith(t, "monitor")
	connects := s.TokenWith(t, "tenant-connect")
	templated := s.entityToken(t, "acme-app", "app-templated", map[string]string{"tenant": "acme"})
	unnamed := s.entityToken(t, "nobodys-app", "app-templated", nil)
	wildcard := s.entityToken(t, "everybodys-app", "app-templated", map[string]string{"tenant": "a*"})

	type fields = map[string]any
	const (
		get, post, patch, del, list = http.MethodGet, http.MethodPost, http.MethodPatch, http.MethodDelete, "LIST"

		done, ok, bad, denied = 204, 200, 400, 403
	)
	type try struct {
		token, method, path string
		data                fields
		want                int
	}
	secret, id := s.connectorSecret, s.connectorID
	refresh := s.kaizala.GenerateUserToken(id, "acme")

	run := func(name string, tries []try) {
		t.Helper()
		for _, c := range tries {
			status, answer := s.request(t, c.token, c.method, c.path, c.data)
			require.Equal(t, c.want, status, "%s: %s %s %v: %s", name, c.method, c.path, c.data, answer)
			require.Empty(t, secretsIn(answer, secret, refresh), "%s: %s %s", name, c.method, c.path)
		}
	}

	run("before anything is there", []try{
		{operator, post, "kaizala/config", fields{"api_root": s.kaizala.URL}, bad}, // allowed by the policy, and refused by the engine: the owner creates the connector
		{operator, patch, "kaizala/config", fields{"api_root": s.kaizala.URL}, 404},
		{owner, post, "kaizala/config", fields{"connector_id": id}, bad},
		{owner, post, "kaizala/config", fields{"connector_id": id, "connector_secret": secret, "api_root": s.kaizala.URL}, denied},
		{owner, post, "kaizala/config", fields{"connector_id": id, "connector_secret": secret}, done},
		{operator, post, "kaizala/tenants/acme", fields{"ttl": "1h"}, denied},
		{operator, patch, "kaizala/tenants/acme", fields{"ttl": "1h"}, 404},
	})
	// The owner cannot change the address that refresh tokens are sent to.
	require.Equal(t, "https://api.kaiza.la", s.read(t, "kaizala/config")["api_root"])
	s.write(t, "kaizala/config/hr", fields{"connector_id": "another", "connector_secret": "HRHRHRHRHR", "api_root": s.kaizala.URL})

	run("operator", []try{
		{operator, get, "kaizala/config", nil, ok},
		{operator, list, "kaizala/config", nil, ok},
		{operator, post, "kaizala/config", fields{"api_root": s.kaizala.URL}, done},
		{operator, post, "kaizala/config/default", fields{"request_timeout": "30s", "redirect_hosts": "kaiza.la"}, done},
		{operator, post, "kaizala/config/hr", fields{"exchanges_per_minute": 20}, done},
		{operator, patch, "kaizala/config", fields{"ca_cert": nil, "redirect_hosts": nil}, done},
		{operator, post, "kaizala/config", fields{"connector_secret": "XXXXXXXXXX"}, denied},
		{operator, post, "kaizala/config", fields{"connector_id": "mine"}, denied},
		{operator, post, "kaizala/config/default", fields{"api_root": s.kaizala.URL, "connector_secret": "XXXXXXXXXX"}, denied},
		{operator, patch, "kaizala/config", fields{"connector_secret": "XXXXXXXXXX"}, denied},
		{operator, patch, "kaizala/config/hr", fields{"connector_secret": nil}, denied},
		{operator, post, "kaizala/config/new", fields{"api_root": s.kaizala.URL}, bad},
		{operator, del, "kaizala/config/hr", nil, done},
	})

	number := s.kaizala.PhoneNumber("ravi")
	run("tenant user who connects", []try{
		{connects, get, "kaizala/tenants/acme", nil, denied},
		{connects, get, "kaizala/tenants/acme/authorize", nil, 404},
		{connects, post, "kaizala/tenants/acme/authorize", nil, bad}, // allowed by the policy, and refused by the engine: Kaizala has the PIN login
		{connects, post, "kaizala/tenants/acme/device", nil, bad},
		{connects, post, "kaizala/tenants/acme/pin", fields{"mobile_number": number}, ok},
	})
	pin := s.kaizala.PIN(id, "ravi")
	run("tenant user who connects", []try{
		{user, post, "kaizala/tenants/acme/pin", fields{"pin": pin}, denied},
		{connects, post, "kaizala/tenants/acme/pin", fields{"pin": pin}, ok},
	})
	require.Equal(t, "ok", s.read(t, "kaizala/tenants/acme")["status"], "with this policy alone")
	run("and who can do nothing else", []try{
		{connects, get, "kaizala/tenants/acme", nil, denied},
		{connects, post, "kaizala/tenants/acme", fields{"refresh_token": refresh}, denied},
		{connects, post, "kaizala/tenants/acme", fields{"connector": "default"}, denied},
		{connects, patch, "kaizala/tenants/acme", fields{"ttl": "1h"}, denied},
		{connects, del, "kaizala/tenants/acme", nil, denied},
		{connects, post, "kaizala/tenants/acme/refresh", nil, denied},
		{connects, get, "kaizala/tenants/acme/pin", nil, denied},
		{connects, del, "kaizala/tenants/acme/authorize", nil, denied},
		{connects, get, "kaizala/creds/acme", nil, denied},
		{connects, get, "kaizala/token/acme", nil, denied},
		{connects, list, "kaizala/tenants", nil, denied},
		{connects, get, "kaizala/config", nil, denied},
		{connects, post, "kaizala/config", fields{"connector_secret": "XXXXXXXXXX"}, denied},
		{connects, post, "kaizala/tenants/other/authorize", nil, denied},
		{connects, get, "kaizala/tenants/other/authorize", nil, denied},
		{connects, post, "kaizala/tenants/other/device", nil, denied},
		{connects, post, "kaizala/tenants/other/pin", fields{"mobile_number": number}, denied},
		{connects, post, "sys/leases/revoke-prefix/kaizala/creds/acme", nil, denied},
	})
	for _, token := range []string{owner, user, operator, app, sidecar, monitor, templated} {
		run("these are for nobody else", []try{
			{token, post, "kaizala/tenants/acme/authorize", nil, denied},
			{token, get, "kaizala/tenants/acme/authorize", nil, denied},
			{token, post, "kaizala/tenants/acme/device", nil, denied},
			{token, post, "kaizala/tenants/acme/pin", fields{"mobile_number": number}, denied},
		})
	}
	_, err := s.Client.Logical().Delete("kaizala/tenants/acme")
	require.NoError(t, err)

	run("tenant user", []try{
		{user, get, "kaizala/tenants/acme", nil, 404},
		{user, post, "kaizala/tenants/acme", fields{"refresh_token": refresh}, done},
		{user, post, "kaizala/tenants/acme", fields{"refresh_token": refresh}, done},
		{user, get, "kaizala/tenants/acme", nil, ok},
		{user, patch, "kaizala/tenants/acme", fields{"ttl": "1h"}, done},
		{user, post, "kaizala/tenants/acme", fields{"connector": "default", "max_ttl": "2h", "min_ttl": "20m", "verify": false}, done},
		{user, post, "kaizala/tenants/acme", fields{"token_per_lease": false}, denied},
		{user, post, "kaizala/tenants/acme", fields{"refresh_token": refresh, "retire_on_revoke": false}, denied},
		{user, patch, "kaizala/tenants/acme", fields{"retire_on_revoke": nil}, denied},
		{user, del, "kaizala/tenants/acme", nil, denied},
		{user, post, "kaizala/tenants/acme/refresh", nil, denied},
		{user, post, "kaizala/tenants/other", fields{"refresh_token": refresh}, denied},
		{user, get, "kaizala/tenants/other", nil, denied},
		{user, list, "kaizala/tenants", nil, denied},
		{user, get, "kaizala/creds/acme", nil, denied},
		{user, get, "kaizala/token/acme", nil, denied},
		{user, get, "kaizala/config", nil, denied},
		{user, post, "kaizala/config", fields{"connector_secret": "XXXXXXXXXX"}, denied},
		{user, patch, "kaizala/config", fields{"api_root": "https://elsewhere.example"}, denied},
	})
	s.tenant(t, "other", nil)

	elsewhere := "https://elsewhere.example"
	run("connector owner", []try{
		{owner, post, "kaizala/config", fields{"connector_id": id, "connector_secret": secret}, done},
		{owner, post, "kaizala/config", fields{"connector_secret": secret}, done},
		{owner, post, "kaizala/config/default", fields{"connector_secret": secret}, done},
		{owner, post, "kaizala/config", fields{}, done},
		{owner, post, "kaizala/config", fields{"api_root": elsewhere}, denied},
		{owner, post, "kaizala/config", fields{"API_Root": elsewhere}, denied},
		{owner, post, "kaizala/config", fields{"connector_secret": secret, "api_root": elsewhere}, denied},
		{owner, post, "kaizala/config/default", fields{"connector_secret": secret, "api_root": elsewhere}, denied},
		{owner, post, "kaizala/config", fields{"connector_secret": secret, "api_root": nil}, denied},
		{owner, post, "kaizala/config", fields{"redirect_hosts": "elsewhere.example"}, denied},
		{owner, post, "kaizala/config", fields{"ca_cert": "a certificate"}, denied},
		{owner, post, "kaizala/config", fields{"request_timeout": "1s"}, denied},
		{owner, post, "kaizala/config", fields{"exchanges_per_minute": 100}, denied},
		{owner, post, "kaizala/config", fields{"connector": "hr", "connector_secret": secret}, denied},
		{owner, post, "kaizala/config?api_root=" + elsewhere, fields{"connector_secret": secret}, done},
		{owner, patch, "kaizala/config", fields{"connector_secret": secret}, denied},
		{owner, patch, "kaizala/config", fields{"api_root": elsewhere}, denied},
		{owner, post, "kaizala/config/", fields{"connector_secret": secret}, bad}, // refused by Vault itself
		{owner, post, "kaizala/config/hr", fields{"connector_id": id, "connector_secret": secret}, denied},
		{owner, get, "kaizala/config", nil, denied},
		{owner, list, "kaizala/config", nil, denied},
		{owner, del, "kaizala/config", nil, denied},
		{owner, get, "kaizala/tenants/acme", nil, denied},
		{owner, post, "kaizala/tenants/acme", fields{"ttl": "1h"}, denied},
		{owner, list, "kaizala/tenants", nil, denied},
		{owner, get, "kaizala/creds/acme", nil, denied},
		{owner, get, "kaizala/token/acme", nil, denied},
	})
	status, answer := s.requestRaw(t, owner, post, "kaizala/config", "application/x-www-form-urlencoded", []byte("api_root="+elsewhere))
	require.Equal(t, denied, status, answer)
	require.Equal(t, s.kaizala.URL, s.read(t, "kaizala/config")["api_root"], "the query of a write changes nothing")

	run("app", []try{
		{app, get, "kaizala/creds/acme", nil, ok},
		{app, get, "kaizala/creds/acme?min_ttl=1h", nil, ok},
		{app, post, "kaizala/creds/acme", nil, denied},
		{app, get, "kaizala/creds/other", nil, denied},
		{app, get, "kaizala/token/acme", nil, denied},
		{app, get, "kaizala/tenants/acme", nil, denied},
		{app, post, "kaizala/tenants/acme", fields{"ttl": "1h"}, denied},
		{app, post, "kaizala/tenants/acme/refresh", nil, denied},
		{app, get, "kaizala/config", nil, denied},
		{app, list, "kaizala/tenants", nil, denied},
		{app, post, "sys/leases/revoke-prefix/kaizala/creds/acme", nil, denied},

		{monitor, list, "kaizala/tenants", nil, ok},
		{monitor, get, "kaizala/tenants/acme", nil, ok},
		{monitor, list, "kaizala/config", nil, ok},
		{monitor, get, "kaizala/config", nil, ok},
		{monitor, get, "kaizala/config/default", nil, ok},
		{monitor, get, "sys/leases/count?type=irrevocable", nil, ok},
		{monitor, get, "sys/metrics", nil, ok},
		{monitor, get, "kaizala/creds/acme", nil, denied},
		{monitor, get, "kaizala/token/acme", nil, denied},
		{monitor, post, "kaizala/tenants/acme/refresh", nil, denied},
		{monitor, post, "kaizala/tenants/acme", fields{"ttl": "1h"}, denied},
		{monitor, post, "kaizala/config", fields{"exchanges_per_minute": 20}, denied},
		{monitor, del, "kaizala/config", nil, denied},

		{sidecar, get, "kaizala/token/acme", nil, ok},
		{sidecar, get, "kaizala/token/other", nil, denied},
		{sidecar, get, "kaizala/creds/acme", nil, denied},
		{sidecar, get, "kaizala/tenants/acme", nil, denied},

		{templated, get, "kaizala/creds/acme", nil, ok},
		{templated, get, "kaizala/creds/other", nil, denied},
		{wildcard, get, "kaizala/creds/acme", nil, ok},
		{wildcard, get, "kaizala/creds/other", nil, denied},
		{templated, get, "kaizala/token/acme", nil, denied},
		{templated, get, "kaizala/tenants/acme", nil, denied},
		{unnamed, get, "kaizala/creds/acme", nil, denied},
		{unnamed, get, "kaizala/creds/", nil, denied},
	})
	for _, token := range []string{app, templated} {
		lease := s.leaseOf(t, token)
		run("leases of an app", []try{
			{token, post, "sys/leases/renew", fields{"lease_id": lease, "increment": 7200}, ok},
			{token, post, "sys/leases/revoke/" + lease, nil, done},
			{token, post, "sys/leases/revoke", fields{"lease_id": s.leaseOf(t, token)}, done},
			{app, post, "sys/leases/revoke/kaizala/creds/other/abc", nil, denied},
			{templated, post, "sys/leases/revoke/kaizala/creds/other/abc", nil, denied},
		})
	}

	lease := s.leaseOf(t, app)
	run("operator, once tenants are there", []try{
		{operator, list, "kaizala/tenants", nil, ok},
		{operator, get, "kaizala/tenants/acme", nil, ok},
		{operator, post, "kaizala/tenants/acme", fields{"ttl": "1h", "max_ttl": "2h", "min_ttl": "20m"}, done},
		{operator, patch, "kaizala/tenants/acme", fields{"max_ttl": nil}, done},
		{operator, post, "kaizala/tenants/acme", fields{"retire_on_revoke": true, "token_per_lease": false}, done},
		{operator, post, "kaizala/tenants/acme", fields{"token_per_lease": true}, bad}, // allowed by the policy, and refused by the engine: Kaizala cannot revoke access tokens
		{operator, post, "kaizala/tenants/acme", fields{"refresh_token": "x"}, denied},
		{operator, post, "kaizala/tenants/acme", fields{"connector": "hr"}, denied},
		{operator, post, "kaizala/tenants/acme", fields{"verify": false}, denied},
		{operator, patch, "kaizala/tenants/acme", fields{"refresh_token": "x"}, denied},
		{operator, patch, "kaizala/tenants/acme", fields{"connector": nil}, denied},
		{operator, post, "kaizala/tenants/new", fields{"ttl": "1h"}, denied},
		{operator, post, "kaizala/tenants/acme/refresh", nil, ok},
		{operator, get, "kaizala/creds/acme", nil, denied},
		{operator, get, "kaizala/token/acme", nil, denied},
		{operator, list, "sys/leases/lookup/kaizala/creds/acme", nil, ok},
		{operator, post, "sys/leases/lookup", fields{"lease_id": lease}, ok},
		{operator, get, "sys/leases/count?type=irrevocable", nil, ok},
		{operator, post, "sys/leases/revoke/" + lease, nil, done},
		{operator, post, "sys/leases/revoke-prefix/kaizala/creds/acme", nil, done},
		{operator, get, "sys/metrics", nil, ok},
		{operator, del, "kaizala/config", nil, bad}, // allowed by the policy, and refused by the engine: tenants use the connector
		{operator, del, "kaizala/tenants/other", nil, done},
	})
}

// The same for a connector of OAuth 2.0: the operator creates it, and its owner writes its ID and secret.
func TestPoliciesForOAuth(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	server := newAuthServer(t)
	callback := s.Addr + "/v1/kaizala/callback/default"
	id, secret := server.RegisterClient(oauth2test.AuthBasic, callback)
	refresh := server.Grant(id, "asha")
	for _, name := range []string{"connector-owner", "operator", "tenant-user", "app"} {
		s.shippedPolicy(t, name)
	}
	owner := s.TokenWith(t, "connector-owner")
	operator := s.TokenWith(t, "operator")
	user := s.TokenWith(t, "tenant-user")
	app := s.TokenWith(t, "app")

	type fields = map[string]any
	const (
		get, post, patch      = http.MethodGet, http.MethodPost, http.MethodPatch
		done, ok, bad, denied = 204, 200, 400, 403
	)
	elsewhere := "https://elsewhere.example/token"
	for _, c := range []struct {
		token, method, path string
		data                fields
		want                int
	}{
		{operator, post, "kaizala/config", fields{"service": "oauth2", "issuer": server.Issuer(), "revocation": "access_token", "exchange_invalidates": false, "connector_id": id}, denied},
		{operator, post, "kaizala/config", fields{"service": "oauth2", "issuer": server.Issuer(), "revocation": "access_token", "exchange_invalidates": false}, done},
		{operator, post, "kaizala/config/crm", fields{
			"service": "oauth2", "token_url": server.TokenURL(), "revocation_url": server.RevocationURL(), "authorization_url": server.AuthorizationURL(),
			"device_authorization_url": server.DeviceURL(), "token_endpoint_auth_method": "client_secret_post",
			"token_params": fields{"audience": "x"}, "authorization_params": fields{"prompt": "consent"}, "scopes": "a b", "redirect_uris": "https://vault.example/v1/kaizala/callback",
			"endpoint_url_field": "instance_url", "access_token_life": "1h", "refresh_token_life": "0s", "keep_alive": "24h", "exchange_invalidates": true,
			"revocation": "exchange", "revoke_on_delete": true, "confirm": true, "ca_cert": "", "request_timeout": "20s", "exchanges_per_minute": 30,
		}, done},
		{user, post, "kaizala/tenants/acme", fields{"refresh_token": refresh}, bad}, // ID and secret are missing

		{owner, post, "kaizala/config", fields{"connector_id": id, "connector_secret": secret, "token_url": elsewhere}, denied},
		{owner, post, "kaizala/config", fields{"service": "kaizala"}, denied},
		{owner, post, "kaizala/config", fields{"issuer": "https://elsewhere.example"}, denied},
		{owner, post, "kaizala/config", fields{"revocation_url": elsewhere}, denied},
		{owner, post, "kaizala/config", fields{"token_params": fields{"audience": "x"}}, denied},
		{owner, post, "kaizala/config", fields{"redirect_uris": elsewhere}, denied},
		{owner, post, "kaizala/config", fields{"confirm": false}, denied},
		{owner, post, "kaizala/config/default", fields{"connector_secret": secret, "revocation": nil}, denied},
		{owner, patch, "kaizala/config", fields{"token_url": elsewhere}, denied},
		{owner, get, "kaizala/config", nil, denied},
		{owner, post, "kaizala/config", fields{"connector_id": id, "connector_secret": secret}, done},
		{owner, post, "kaizala/config/default", fields{"connector_secret": secret}, done},

		{user, post, "kaizala/tenants/acme", fields{"refresh_token": refresh, "token_per_lease": true}, denied},
		{user, post, "kaizala/tenants/acme", fields{"refresh_token": refresh}, done},
		{user, patch, "kaizala/tenants/acme", fields{"token_per_lease": true}, denied},
		{user, post, "kaizala/tenants/acme/authorize", nil, denied}, // another policy allows it
		{operator, post, "kaizala/tenants/acme", fields{"token_per_lease": true}, done},
		{app, get, "kaizala/creds/acme", nil, ok},
		{app, post, "kaizala/tenants/acme", fields{"token_per_lease": false}, denied},
		{operator, post, "kaizala/tenants/acme/refresh", nil, ok},
		{operator, get, "kaizala/creds/acme", nil, denied},
		{operator, get, "kaizala/config", nil, ok},
	} {
		status, answer := s.request(t, c.token, c.method, c.path, c.data)
		require.Equal(t, c.want, status, "%s %s %v: %s", c.method, c.path, c.data, answer)
		require.Empty(t, secretsIn(answer, secret, refresh, server.CurrentRefreshToken("asha")), "%s %s", c.method, c.path)
	}

	// A token with only tenant-connect can connect a new tenant, and cannot read its tokens.
	s.shippedPolicy(t, "tenant-connect")
	connects := s.TokenWith(t, "tenant-connect")
	s.write(t, "kaizala/config", fields{"redirect_uris": callback, "scopes": "offline_access"})
	starts := func(path string) map[string]any {
		t.Helper()
		_, err := s.Client.Logical().Delete("kaizala/tenants/acme")
		require.NoError(t, err)
		status, answer := s.request(t, connects, post, path, nil)
		require.Equal(t, ok, status, answer)
		var secret api.Secret
		require.NoError(t, json.Unmarshal([]byte(answer), &secret))
		return secret.Data
	}
	ends := func(path string) {
		t.Helper()
		Eventually(t, path+" to end", func() bool {
			status, answer := s.request(t, connects, get, path, nil)
			require.Equal(t, ok, status, answer)
			require.Empty(t, secretsIn(answer, server.CurrentRefreshToken("ravi")))
			return strings.Contains(answer, `"status":"granted"`)
		})
		require.Equal(t, "ok", s.read(t, "kaizala/tenants/acme")["status"])
		for _, secret := range []string{"kaizala/tenants/acme", "kaizala/creds/acme", "kaizala/token/acme"} {
			status, answer := s.request(t, connects, get, secret, nil)
			require.Equal(t, denied, status, answer)
		}
	}
	back, err := server.Approve(starts("kaizala/tenants/acme/authorize")["authorization_url"].(string), "ravi")
	require.NoError(t, err)
	visit, err := browser.Person{}.Open(back)
	require.NoError(t, err)
	require.Contains(t, visit.Last().Text(), "The tenant is connected")
	ends("kaizala/tenants/acme/authorize")
	require.NoError(t, server.ApproveDevice(starts("kaizala/tenants/acme/device")["user_code"].(string), "ravi"))
	ends("kaizala/tenants/acme/device")

	config := s.read(t, "kaizala/config")
	require.Equal(t, server.TokenURL(), config["token_url"], "the owner cannot change the address that refresh tokens are sent to")
	require.Equal(t, id, config["connector_id"])
}

// leaseOf reads creds/acme and returns the lease.
func (s *site) leaseOf(t *testing.T, token string) string {
	t.Helper()
	status, answer := s.request(t, token, http.MethodGet, "kaizala/creds/acme", nil)
	require.Equal(t, 200, status, answer)
	var secret api.Secret
	require.NoError(t, json.Unmarshal([]byte(answer), &secret))
	require.NotEmpty(t, secret.LeaseID)
	return secret.LeaseID
}

// entityToken creates an entity with this metadata, and returns a token of its login.
func (v *Vault) entityToken(t *testing.T, name, policy string, metadata map[string]string) string {
	t.Helper()
	auths, err := v.Client.Sys().ListAuth()
	require.NoError(t, err)
	if auths["userpass/"] == nil {
		require.NoError(t, v.Client.Sys().EnableAuthWithOptions("userpass", &api.EnableAuthOptions{Type: "userpass"}))
		auths, err = v.Client.Sys().ListAuth()
		require.NoError(t, err)
	}
	write := func(path string, data map[string]any) *api.Secret {
		secret, err := v.Client.Logical().Write(path, data)
		require.NoError(t, err, path)
		return secret
	}
	write("auth/userpass/users/"+name, map[string]any{"password": "test", "token_policies": policy})
	entity := write("identity/entity", map[string]any{"name": name, "metadata": metadata})
	write("identity/entity-alias", map[string]any{
		"name":           name,
		"canonical_id":   entity.Data["id"],
		"mount_accessor": auths["userpass/"].Accessor,
	})
	return write("auth/userpass/login/"+name, map[string]any{"password": "test"}).Auth.ClientToken
}

func glob(t *testing.T, pattern string) []string {
	t.Helper()
	paths, err := filepath.Glob(pattern)
	require.NoError(t, err)
	require.NotEmpty(t, paths, pattern)
	return paths
}
