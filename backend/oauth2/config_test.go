package oauth2

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/tokenservice"
)

func certificate(t *testing.T) string {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	require.NoError(t, err)
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

// params returns n parameters with values of that size.
func params(n, size int) map[string]string {
	m := map[string]string{}
	for i := range n {
		m[fmt.Sprintf("p%02d", i)] = strings.Repeat("v", size)
	}
	return m
}

func TestNewAccepts(t *testing.T) {
	cert := certificate(t)
	for name, edit := range map[string]func(*Config){
		"the least":             nil,
		"no ID and no secret":   func(c *Config) { c.ClientID, c.ClientSecret = "", "" },
		"no secret with none":   func(c *Config) { c.AuthMethod, c.ClientSecret = NoSecret, "" },
		"an ID with all":        func(c *Config) { c.ClientID = "a b~!" + strings.Repeat("x", maxIDBytes-5) },
		"a long secret":         func(c *Config) { c.ClientSecret = strings.Repeat("x", maxSecretBytes) },
		"a URL on loopback":     func(c *Config) { c.TokenURL = "http://127.0.0.1:8080/token?a=b" },
		"a issuer with a slash": func(c *Config) { c.Issuer = "https://login.example.com/" },
		"as many parameters":    func(c *Config) { c.TokenParams = params(maxParams, 509) }, // 32 × (3 + 509) = 16 KiB
		"a long parameter": func(c *Config) {
			c.TokenParams = map[string]string{strings.Repeat("n", maxNameBytes): strings.Repeat("v", maxParamBytes)}
		},
		"letters beyond ASCII":   func(c *Config) { c.AuthorizationParams = map[string]string{"ui": "é ☃", "empty": ""} },
		"scope among token's":    func(c *Config) { c.TokenParams = map[string]string{"scope": "a"} },
		"names like reserved":    func(c *Config) { c.TokenParams = map[string]string{"codes": "a", "xclient_id": "b", "state": "c"} },
		"client_x to authorize":  func(c *Config) { c.AuthorizationParams = map[string]string{"client_x": "a", "code": "b", "nonce": "c"} },
		"many scopes":            func(c *Config) { c.Scopes = strings.Fields(strings.Repeat("a ", maxScopes)) },
		"long scopes":            func(c *Config) { c.Scopes = []string{"a", strings.Repeat("~", maxScopeBytes-2)} },
		"a URL as scope":         func(c *Config) { c.Scopes = []string{"https://www.example.com/auth/x.y"} },
		"an endpoint field":      func(c *Config) { c.EndpointURLField = strings.Repeat("f", maxNameBytes) },
		"short lives":            func(c *Config) { c.AccessTokenLife, c.KeepAlive, c.RequestTimeout = 1, 1, time.Second },
		"long lives":             func(c *Config) { c.RefreshTokenLife, c.KeepAlive = maxLife, maxLife },
		"revocation":             func(c *Config) { c.Revocation, c.RevocationURL = RevokeAccessToken, "https://as.example.com/revoke" },
		"revocation by exchange": func(c *Config) { c.Revocation, c.ExchangeInvalidates = RevokeByExchange, true },
		"revocation of a grant":  func(c *Config) { c.RevokeOnDelete, c.RevocationURL = true, "https://as.example.com/revoke" },
		"no revocation, by name": func(c *Config) { c.Revocation = RevokeNothing },
		"a certificate":          func(c *Config) { c.CACert = cert },
		"a long file":            func(c *Config) { c.CACert = cert + strings.Repeat("\n", tokenservice.MaxCABytes-len(cert)) },
	} {
		t.Run(name, func(t *testing.T) { client(t, edit) })
	}
}

func TestNewRefuses(t *testing.T) {
	type edit = func(*Config)
	for _, c := range []struct {
		name, field, text string
		edit              edit
	}{
		{"ID too long", "connector_id", "1024 bytes", func(c *Config) { c.ClientID = strings.Repeat("a", maxIDBytes+1) }},
		{"ID with LF", "connector_id", "plain ASCII in one line", func(c *Config) { c.ClientID = "a\n" }},
		{"ID with a space", "connector_id", "no space around it", func(c *Config) { c.ClientID = " a" }},
		{"secret too long", "connector_secret", "4096 bytes", func(c *Config) { c.ClientSecret = strings.Repeat("a", maxSecretBytes+1) }},
		{"secret with a zero-width space", "connector_secret", "plain ASCII", func(c *Config) { c.ClientSecret = secretCanary + "\u200b" }},
		{"a secret with none", "connector_secret", "left out where token_endpoint_auth_method is none", func(c *Config) { c.AuthMethod = NoSecret }},
		{"another method", "token_endpoint_auth_method", "must be client_secret_basic, client_secret_post or none", func(c *Config) { c.AuthMethod = "private_key_jwt" }},
		{"no token URL", "token_url", "is missing: write it, or issuer", func(c *Config) { c.TokenURL = "" }},
		{"no token URL beside an issuer", "token_url", "the issuer's metadata names no token endpoint", func(c *Config) { c.TokenURL, c.Issuer = "", "https://login.example.com" }},
		{"http", "token_url", "https", func(c *Config) { c.TokenURL = "http://as.example.com" }},
		{"a fragment", "token_url", "must have no fragment", func(c *Config) { c.TokenURL = "https://as.example.com/#" }},
		{"a query that cannot be read", "authorization_url", "query that cannot be read", func(c *Config) { c.AuthorizationURL = "https://as.example.com/?a;b" }},
		{"a user", "revocation_url", "no user name", func(c *Config) { c.RevocationURL = "https://u:" + secretCanary + "@as.example.com" }},
		{"no URL", "device_authorization_url", "such as https://", func(c *Config) { c.DeviceAuthorizationURL = bodyCanary }},
		{"a bare host", "issuer", "is not an absolute URL; give a URL such as https://login.example.com", func(c *Config) { c.Issuer = "login.example.com" }},
		{"a query", "issuer", "must have no query", func(c *Config) { c.Issuer = "https://login.example.com?" }},
		{"too many parameters", "token_params", "more than 32", func(c *Config) { c.TokenParams = params(maxParams+1, 1) }},
		{"parameters too long", "authorization_params", "16384 bytes altogether", func(c *Config) { c.AuthorizationParams = params(maxParams, 510) }},
		{"a value too long", "token_params", "2048 bytes", func(c *Config) { c.TokenParams = params(1, maxParamBytes+1) }},
		{"a value with LF", "token_params", "in one line", func(c *Config) { c.TokenParams = map[string]string{"a": bodyCanary + "\n"} }},
		{"a value that is no text", "token_params", "of text", func(c *Config) { c.TokenParams = map[string]string{"a": "\xff"} }},
		{"no name", "token_params", "1 to 128", func(c *Config) { c.TokenParams = map[string]string{"": "a"} }},
		{"a name too long", "token_params", "1 to 128", func(c *Config) { c.TokenParams = map[string]string{strings.Repeat("a", maxNameBytes+1): "a"} }},
		{"a name with a space", "token_params", "plain ASCII", func(c *Config) { c.TokenParams = map[string]string{"a b": "a"} }},
		{"a name beyond ASCII", "token_params", "plain ASCII", func(c *Config) { c.TokenParams = map[string]string{"é": "a"} }},
		{"too many scopes", "scopes", "more than 100", func(c *Config) { c.Scopes = strings.Fields(strings.Repeat("a ", maxScopes+1)) }},
		{"scopes too long", "scopes", "4096 bytes", func(c *Config) { c.Scopes = []string{"a", strings.Repeat("a", maxScopeBytes-1)} }},
		{"an empty scope", "scopes", "plain ASCII", func(c *Config) { c.Scopes = []string{"a", ""} }},
		{"a scope with a space", "scopes", "plain ASCII", func(c *Config) { c.Scopes = []string{"a b"} }},
		{"a scope with a quote", "scopes", "without quotes", func(c *Config) { c.Scopes = []string{`a"b`} }},
		{"a scope with a backslash", "scopes", "backslashes", func(c *Config) { c.Scopes = []string{`a\b`} }},
		{"an endpoint field too long", "endpoint_url_field", "one field", func(c *Config) { c.EndpointURLField = strings.Repeat("f", maxNameBytes+1) }},
		{"two endpoint fields", "endpoint_url_field", "one field", func(c *Config) { c.EndpointURLField = "a b" }},
		{"no access token's life", "access_token_life", "must be more than 0", func(c *Config) { c.AccessTokenLife = 0 }},
		{"a refresh token's life below 0", "refresh_token_life", "must not be less than 0", func(c *Config) { c.RefreshTokenLife = -1 }},
		{"a refresh token's life too long", "refresh_token_life", "100 years", func(c *Config) { c.RefreshTokenLife = maxLife + 1 }},
		{"no keep_alive", "keep_alive", "must be more than 0", func(c *Config) { c.KeepAlive = 0 }},
		{"too short a timeout", "request_timeout", "must be a second at least", func(c *Config) { c.RequestTimeout = time.Second - 1 }},
		{"another revocation", "revocation", "must be none, access_token or exchange", func(c *Config) { c.Revocation = "grant" }},
		{"no URL for it", "revocation", "without revocation_url", func(c *Config) { c.Revocation = RevokeAccessToken }},
		{"an exchange that ends nothing", "revocation", "exchange_invalidates is false", func(c *Config) { c.Revocation = RevokeByExchange }},
		{"no URL for deletes", "revoke_on_delete", "needs revocation_url", func(c *Config) { c.RevokeOnDelete = true }},
		{"junk", "ca_cert", "in PEM", func(c *Config) { c.CACert = bodyCanary }},
		{"a certificate file too long", "ca_cert", "65536 bytes", func(c *Config) { c.CACert = certificate(t) + strings.Repeat("\n", tokenservice.MaxCABytes) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			config := config()
			c.edit(&config)
			_, err := New(config)
			require.Contains(t, requireField(t, c.field, err).Text, c.text)
			require.True(t, strings.HasPrefix(err.Error(), c.field+" "))
		})
	}
}

func TestReservedParameters(t *testing.T) {
	for field, c := range map[string]struct {
		set   func(*Config, map[string]string)
		names map[string]string // what is refused: the name in the text
	}{
		"token_params": {
			func(c *Config, m map[string]string) { c.TokenParams = m },
			map[string]string{
				"grant_type": "grant_type", "refresh_token": "refresh_token", "code": "code", "code_verifier": "code_verifier",
				"redirect_uri": "redirect_uri", "device_code": "device_code", "client_id": "client_*", "client_secret": "client_*",
				"client_assertion_type": "client_*", "Client_ID": "client_*", "GRANT_TYPE": "grant_type",
			},
		},
		"authorization_params": {
			func(c *Config, m map[string]string) { c.AuthorizationParams = m },
			map[string]string{
				"response_type": "response_type", "client_id": "client_id", "redirect_uri": "redirect_uri", "scope": "scope", "state": "state",
				"code_challenge": "code_challenge*", "code_challenge_method": "code_challenge*", "request": "request", "request_uri": "request_uri",
			},
		},
	} {
		for name, text := range c.names {
			t.Run(field+" "+name, func(t *testing.T) {
				config := config()
				c.set(&config, map[string]string{"good": "x", name: bodyCanary})
				_, err := New(config)
				require.Equal(t, "must not hold "+text+", which the engine sets itself", requireField(t, field, err).Text)
			})
		}
	}
}

func TestMapsAreCopied(t *testing.T) {
	s, m := &server{status: 200, body: body(nil)}, map[string]string{"a": "1"}
	c := client(t, s.with(func(c *Config) {
		c.TokenParams, c.AuthorizationParams, c.AuthorizationURL = m, m, "https://as.example.com"
	}))
	m["a"] = "2"
	require.NoError(t, c.Exchange(t.Context(), tokenservice.Exchange{RefreshToken: refreshCanary}).Err)
	require.Equal(t, "1", s.forms[0].Get("a"))
	u, err := c.AuthorizationURL(tokenservice.AuthorizationRequest{})
	require.NoError(t, err)
	require.Contains(t, u, "a=1")
}

func TestCheckRedirectURIs(t *testing.T) {
	good := "https://vault.example.com/v1/kaizala/callback"
	require.NoError(t, CheckRedirectURIs(nil))
	require.NoError(t, CheckRedirectURIs([]string{good, "http://localhost:8250/x?y=z"}))
	require.NoError(t, CheckRedirectURIs(strings.Fields(strings.Repeat(good+" ", maxRedirects))))
	for text, uris := range map[string][]string{
		"not be more than 10": strings.Fields(strings.Repeat(good+" ", maxRedirects+1)),
		"no fragment":         {good, good + "#x"},
		"https URL":           {"http://vault.example.com"},
		"absolute URL":        {"com.example.app:/x"},
		"such as https://":    {""},
	} {
		require.Contains(t, requireField(t, "redirect_uris", CheckRedirectURIs(uris)).Text, text)
	}
}

func TestMissing(t *testing.T) {
	require.Nil(t, client(t, nil).Missing())
	require.Nil(t, client(t, func(c *Config) { c.AuthMethod, c.ClientSecret = NoSecret, "" }).Missing())
	require.Equal(t, "connector_id", client(t, func(c *Config) { c.AuthMethod, c.ClientID, c.ClientSecret = NoSecret, "", "" }).Missing().Field)
}

func TestAbout(t *testing.T) {
	const text = "authorize the tenant again (tenants/NAME/authorize), or get a new refresh token"
	require.Equal(t, tokenservice.About{
		Name: "the authorization server as.example.com", NewRefreshToken: text, RetryLost: true,
	}, client(t, nil).About())
	require.Equal(t, tokenservice.About{
		Name: "the authorization server login.example.com:8443", NewRefreshToken: text, RetryLost: true,
		Revocation: tokenservice.RevokeAccessToken, RevokeOnDelete: true,
	}, client(t, func(c *Config) {
		c.Issuer, c.RevocationURL, c.Revocation, c.RevokeOnDelete = "https://LOGIN.example.com:8443/x", "https://as.example.com/r", RevokeAccessToken, true
	}).About())
	require.Equal(t, tokenservice.About{
		Name: "the authorization server as.example.com", NewRefreshToken: text, RetryLost: true,
		Revocation: tokenservice.RevokeByExchange, ExchangeInvalidates: true,
	}, client(t, func(c *Config) { c.Revocation, c.ExchangeInvalidates = RevokeByExchange, true }).About())
	require.Equal(t, 72*time.Hour, client(t, nil).KeepAlive(tokenservice.Facts{}))
}

func TestNothingPrintsASecret(t *testing.T) {
	for _, v := range []any{config(), client(t, nil)} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%d"} {
			requireNoCanary(t, fmt.Sprintf(verb, v))
			require.Contains(t, fmt.Sprintf(verb, v), "oauth2.C")
		}
	}
}
