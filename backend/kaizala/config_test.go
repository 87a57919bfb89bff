package kaizala

import (
	"context"
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

	"github.com/stretchr/testify/assert"
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

func TestNewAccepts(t *testing.T) {
	cert := certificate(t)
	for name, edit := range map[string]func(*Config){
		"the defaults":              func(*Config) {},
		"a long ID and secret":      func(c *Config) { c.ConnectorID, c.ConnectorSecret = strings.Repeat("a", 256), strings.Repeat("b", 256) },
		"another root":              func(c *Config) { c.APIRoot = "https://kms.kaiza.la" },
		"a slash":                   func(c *Config) { c.APIRoot = "https://kms.kaiza.la/" },
		"a port and a path":         func(c *Config) { c.APIRoot = "https://gateway.example:8443/kaizala/eu" },
		"an address":                func(c *Config) { c.APIRoot = "https://10.0.0.1" },
		"http on 127.0.0.1":         func(c *Config) { c.APIRoot = "http://127.0.0.1:8080" },
		"http on 127.8.8.8":         func(c *Config) { c.APIRoot = "http://127.8.8.8" },
		"http on ::1":               func(c *Config) { c.APIRoot = "http://[::1]:8080" },
		"http on localhost":         func(c *Config) { c.APIRoot = "http://LocalHost:8080" },
		"one certificate":           func(c *Config) { c.CACert = cert },
		"two, and words about them": func(c *Config) { c.CACert = "# ours\n" + cert + "# theirs\n" + cert },
		"no redirect hosts":         func(c *Config) { c.RedirectHosts = nil },
		"a host with a final dot":   func(c *Config) { c.RedirectHosts = []string{"Kaiza.LA."} },
		"no timeout":                func(c *Config) { c.RequestTimeout = 0 },
	} {
		t.Run(name, func(t *testing.T) { client(t, edit) })
	}
}

func TestNewRefuses(t *testing.T) {
	cert := certificate(t)
	key := string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte("junk")}))
	root := func(v string) func(*Config) { return func(c *Config) { c.APIRoot = v } }
	ca := func(v string) func(*Config) { return func(c *Config) { c.CACert = v } }
	hosts := func(v string) func(*Config) { return func(c *Config) { c.RedirectHosts = []string{"kaiza.la", v} } }
	id := func(v string) func(*Config) { return func(c *Config) { c.ConnectorID = v } }
	secret := func(v string) func(*Config) { return func(c *Config) { c.ConnectorSecret = v } }

	for _, c := range []struct {
		name, field string
		edit        func(*Config)
	}{
		{"no ID", "connector_id", id("")},
		{"an ID with CR and LF", "connector_id", id("a\r\nX-Evil: 1")},
		{"an ID with NUL", "connector_id", id("a\x00")},
		{"an ID too long", "connector_id", id(strings.Repeat("a", 257))},
		{"no secret", "connector_secret", secret("")},
		{"a secret with LF", "connector_secret", secret(secretCanary + "\n")},
		{"a secret with CR inside", "connector_secret", secret(secretCanary + "\rx")},
		{"a secret with a space", "connector_secret", secret(" " + secretCanary)},
		{"a secret with a zero-width space", "connector_secret", secret(secretCanary + "\u200b")},
		{"a secret too long", "connector_secret", secret(strings.Repeat(secretCanary, 26))},
		{"no root", "api_root", root("")},
		{"a bare host", "api_root", root("api.kaiza.la")},
		{"an opaque URL", "api_root", root("https:api.kaiza.la")},
		{"no host", "api_root", root("https:///v1")},
		{"another scheme", "api_root", root("ftp://api.kaiza.la")},
		{"http on another host", "api_root", root("http://api.kaiza.la")},
		{"http on a host that looks local", "api_root", root("http://localhost.example")},
		{"http on a host named after an address", "api_root", root("http://127.0.0.1.example")},
		{"http on a short address", "api_root", root("http://127.1")},
		{"http on any address", "api_root", root("http://0.0.0.0")},
		{"a hexadecimal address", "api_root", root("https://0x7f000001")},
		{"an IPv6 zone", "api_root", root("https://[fe80::1%25eth0]")},
		{"a user name", "api_root", root("https://u:" + secretCanary + "@api.kaiza.la")},
		{"a query", "api_root", root("https://api.kaiza.la/?" + bodyCanary)},
		{"an empty query", "api_root", root("https://api.kaiza.la?")},
		{"a fragment", "api_root", root("https://api.kaiza.la/#" + bodyCanary)},
		{"a line break", "api_root", root("https://api.kaiza.la\n")},
		{"a port out of range", "api_root", root("https://api.kaiza.la:65536")},
		{"an empty port", "api_root", root("https://api.kaiza.la:")},
		{"letters beyond ASCII", "api_root", root("https://api.kaizа.la")},
		{"a URL too long", "api_root", root("https://api.kaiza.la/" + strings.Repeat("a", 2048))},
		{"junk", "ca_cert", ca(bodyCanary)},
		{"white space", "ca_cert", ca(" \n")},
		{"a private key", "ca_cert", ca(cert + key)},
		{"half a certificate", "ca_cert", ca(cert + cert[:len(cert)/2])},
		{"a certificate of junk", "ca_cert", ca("-----BEGIN CERTIFICATE-----\nanVuaw==\n-----END CERTIFICATE-----\n")},
		{"an empty host", "redirect_hosts", hosts("")},
		{"a wildcard", "redirect_hosts", hosts("*.kaiza.la")},
		{"a leading dot", "redirect_hosts", hosts(".kaiza.la")},
		{"a URL for a host", "redirect_hosts", hosts("https://kaiza.la")},
		{"a port", "redirect_hosts", hosts("kaiza.la:443")},
		{"an address for a host", "redirect_hosts", hosts("10.0.0.1")},
		{"an IPv6 address for a host", "redirect_hosts", hosts("::1")},
		{"the end of an address", "redirect_hosts", hosts("0.1")},
	} {
		t.Run(c.name, func(t *testing.T) {
			config := Config{ConnectorID: connectorID, ConnectorSecret: secretCanary, APIRoot: DefaultAPIRoot}
			c.edit(&config)
			_, err := New(config)
			var e *tokenservice.FieldError
			require.ErrorAs(t, err, &e)
			assert.Equal(t, c.field, e.Field)
			assert.Regexp(t, "^"+c.field+" (must|is) [a-z]", err.Error())
			requireNoCanary(t, err)
		})
	}
}

func TestATokenThatCannotBeSent(t *testing.T) {
	for name, token := range map[string]string{
		"empty":    "",
		"too long": strings.Repeat("a", tokenservice.MaxTokenBytes+1),
		"LF":       refreshCanary + "\nx",
	} {
		t.Run(name, func(t *testing.T) {
			r := through(t, handled(nil)).Exchange(t.Context(), tokenservice.Exchange{RefreshToken: token, Endpoint: "https://eu.kaiza.la", Permit: func(context.Context) (func(), error) {
				t.Error("it must not come to a call")
				return nil, nil
			}})
			requireKind(t, tokenservice.Refused, r.Err)
			requireRescued(t, "", r)
			assert.Equal(t, "https://eu.kaiza.la", r.Endpoint)
			assert.Zero(t, r.Sent)
		})
	}
}

func TestAbout(t *testing.T) {
	c := client(t, nil)
	assert.Equal(t, tokenservice.About{Name: "Kaizala", NewRefreshToken: "generate a new one on Kaizala's portal", Revocation: tokenservice.RevokeNothing}, c.About())
	assert.Equal(t, 30*24*time.Hour, c.KeepAlive(tokenservice.Facts{}))
	assert.Zero(t, c.KeepAlive(tokenservice.Facts{Expires: time.Unix(1, 0)}))

	var service tokenservice.Service = c
	_, revokes := service.(tokenservice.Revoker)
	assert.False(t, revokes)
	_, pins := service.(tokenservice.PINFlow)
	assert.True(t, pins)
}

func TestNothingPrintsASecret(t *testing.T) {
	config := Config{ConnectorID: connectorID, ConnectorSecret: secretCanary, APIRoot: DefaultAPIRoot}
	c, err := New(config)
	require.NoError(t, err)
	defer c.Close()
	for _, v := range []any{
		config, &config, c,
	} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
			requireNoCanary(t, fmt.Errorf(verb, v))
			assert.Contains(t, fmt.Sprintf(verb, v), "kaizala.")
		}
	}
}
