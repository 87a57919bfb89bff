package vaulttest

import (
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// The service takes longer than the engine lets a writer wait. Vault's API client repeats the write by itself after the engine's 503, and
// the service, which ends the grant of a replaced refresh token that comes again, does not see that token twice.
func TestClientRepeatsAWriteByItself(t *testing.T) {
	t.Parallel()
	v := Start(t)
	v.RegisterEngine(t)
	m := configuredEngine(t, v, "kaizala")
	server := newAuthServer(t)
	id, secret := server.RegisterClient(oauth2test.AuthBasic)
	m.write("config/as", fields{
		"service": "oauth2", "token_url": server.TokenURL(), "connector_id": id, "connector_secret": secret, "exchange_invalidates": false,
	}).ok(t)
	config := api.DefaultConfig()
	require.NoError(t, config.Error)
	require.NotZero(t, config.MaxRetries)
	config.Address = v.Addr
	client, err := api.NewClient(config)
	require.NoError(t, err)
	client.SetToken(v.RootToken)

	server.Inject(oauth2test.Fault{Delay: 11 * time.Second, Times: 1})
	began := time.Now()
	_, err = client.Logical().Write("kaizala/tenants/acme", map[string]any{"connector": "as", "refresh_token": server.Grant(id, "acme")})
	require.NoError(t, err)
	require.Greater(t, time.Since(began), 10*time.Second, "the first write was answered by the service")
	require.Empty(t, server.LostGrants())
	m.write("tenants/acme/refresh", nil).ok(t)
	require.Equal(t, "ok", m.read("tenants/acme").ok(t).text("status"))
}
