package oauth2

import (
	"context"
	"encoding/json"
	"errors"
	"maps"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/tokenservice"
)

const issuer = "https://as.example.com"

// documents is a host with some documents, by their paths; it answers 404 to other paths.
type documents struct {
	found map[string]*server
	asked []string
}

func (d *documents) RoundTrip(r *http.Request) (*http.Response, error) {
	d.asked = append(d.asked, r.Method+" "+r.URL.String())
	if s := d.found[r.URL.EscapedPath()]; s != nil {
		return s.RoundTrip(r)
	}
	w := httptest.NewRecorder()
	w.WriteHeader(404)
	return w.Result(), nil
}

func (d *documents) discover(t *testing.T, issuer string) (*Metadata, error) {
	t.Helper()
	p := &permits{}
	m, err := Discover(t.Context(), issuer, DiscoverOptions{RequestTimeout: 15 * time.Second, Transport: d, Permit: p.permit})
	require.Equal(t, &permits{len(d.asked), len(d.asked)}, p)
	return m, err
}

func metadata(changes map[string]any) *server {
	fields := map[string]any{"issuer": issuer, "token_endpoint": "https://token.example.com/t"}
	maps.Copy(fields, changes)
	for name, value := range fields {
		if value == nil {
			delete(fields, name)
		}
	}
	raw, err := json.Marshal(fields)
	if err != nil {
		panic(err)
	}
	return &server{status: 200, body: string(raw)}
}

const (
	oauthPath  = "/.well-known/oauth-authorization-server"
	openIDPath = "/.well-known/openid-configuration"
)

func TestWhereMetadataIs(t *testing.T) {
	for _, c := range []struct {
		issuer, path string
		asked        []string
	}{
		{issuer, oauthPath, []string{"GET " + issuer + oauthPath}},
		{issuer, openIDPath, []string{"GET " + issuer + oauthPath, "GET " + issuer + openIDPath}},
		{issuer + "/", openIDPath, []string{"GET " + issuer + oauthPath, "GET " + issuer + openIDPath}},
		{issuer + "/realms/a%2Fb", oauthPath + "/realms/a%2Fb", []string{"GET " + issuer + oauthPath + "/realms/a%2Fb"}},
		{issuer + "/realms/a%2Fb/", "/realms/a%2Fb" + openIDPath,
			[]string{"GET " + issuer + oauthPath + "/realms/a%2Fb", "GET " + issuer + "/realms/a%2Fb" + openIDPath}},
		{issuer + "//evil.example.com", "//evil.example.com" + openIDPath,
			[]string{"GET " + issuer + oauthPath + "//evil.example.com", "GET " + issuer + "//evil.example.com" + openIDPath}},
	} {
		t.Run(c.issuer+" "+c.path, func(t *testing.T) {
			d := &documents{found: map[string]*server{c.path: metadata(map[string]any{"issuer": c.issuer})}}
			m, err := d.discover(t, c.issuer)
			require.NoError(t, err)
			require.Equal(t, "https://token.example.com/t", m.TokenURL)
			require.Equal(t, c.asked, d.asked)
			r := d.found[c.path].requests[0]
			require.Equal(t, http.Header{"Accept": {"application/json"}}, r.Header)
			require.Equal(t, "as.example.com", r.Host)
		})
	}
	for name, first := range map[string]*server{
		"HTML":                   {status: 200, body: "<html>"},
		"a list":                 {status: 200, body: "[]"},
		"half":                   {status: 200, body: `{"issuer":"` + issuer + `"`},
		"another 2xx":            {status: 203, body: metadata(nil).body},
		"a redirect":             {status: 302},
		"an outage":              {status: 503},
		"cut off":                {status: 200, body: `{}`, cut: true},
		"unreachable":            {err: errors.New(bodyCanary)},
		"a 404 with Retry-After": {status: 404, header: http.Header{"Retry-After": {"17"}}},
	} {
		t.Run("OpenID's after "+name, func(t *testing.T) {
			d := &documents{found: map[string]*server{oauthPath: first, openIDPath: metadata(nil)}}
			_, err := d.discover(t, issuer)
			require.NoError(t, err)
			require.Len(t, d.asked, 2)
		})
	}
	t.Run("a document with Retry-After", func(t *testing.T) {
		first := metadata(nil)
		first.header = http.Header{"Retry-After": {"17"}}
		d := &documents{found: map[string]*server{oauthPath: first}}
		_, err := d.discover(t, issuer)
		require.NoError(t, err)
		require.Len(t, d.asked, 1)
	})
	t.Run("a document with another issuer is not passed over", func(t *testing.T) {
		d := &documents{found: map[string]*server{oauthPath: metadata(map[string]any{"issuer": issuer + "/"}), openIDPath: metadata(nil)}}
		_, err := d.discover(t, issuer)
		requireField(t, "issuer", err)
		require.Len(t, d.asked, 1)
	})
}

func TestMetadata(t *testing.T) {
	least := Metadata{TokenURL: "https://token.example.com/t", AuthMethod: ClientSecretBasic}
	with := func(change func(*Metadata)) *Metadata {
		m := least
		change(&m)
		return &m
	}
	for _, c := range []struct {
		name    string
		changes map[string]any
		want    *Metadata
	}{
		{"the least", nil, &least},
		{"all", map[string]any{
			"revocation_endpoint": "https://r.example.com", "authorization_endpoint": "https://a.example.com?x=y",
			"device_authorization_endpoint": "http://localhost:1/d", "authorization_response_iss_parameter_supported": true,
			"token_endpoint_auth_methods_supported": []string{"none", "client_secret_post", "client_secret_basic"},
		}, &Metadata{
			TokenURL: least.TokenURL, RevocationURL: "https://r.example.com", AuthorizationURL: "https://a.example.com?x=y",
			DeviceAuthorizationURL: "http://localhost:1/d", AuthMethod: ClientSecretBasic, IssuerPromised: true,
		}},
		{"post", map[string]any{"token_endpoint_auth_methods_supported": []string{"private_key_jwt", "none", "client_secret_post"}},
			with(func(m *Metadata) { m.AuthMethod = ClientSecretPost })},
		{"none", map[string]any{"token_endpoint_auth_methods_supported": []string{"none"}}, with(func(m *Metadata) { m.AuthMethod = NoSecret })},
		{"no methods", map[string]any{"token_endpoint_auth_methods_supported": []string{}}, &least},
		{"a promise that is none", map[string]any{"authorization_response_iss_parameter_supported": "true"}, &least},
		{"an empty endpoint", map[string]any{"revocation_endpoint": ""}, &least},
		{"no token endpoint", map[string]any{"token_endpoint": nil}, with(func(m *Metadata) { m.TokenURL = "" })},
		{"a null endpoint", map[string]any{"revocation_endpoint": json.RawMessage("null")}, &least},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := (&documents{found: map[string]*server{oauthPath: metadata(c.changes)}}).discover(t, issuer)
			require.NoError(t, err)
			require.Equal(t, c.want, got)
		})
	}
	for _, c := range []struct {
		name    string
		changes map[string]any
		text    string
	}{
		{"another issuer", map[string]any{"issuer": issuer + "/"},
			"is https://as.example.com, but the metadata there has https://as.example.com/. Both must be the same, character for character: write the one that the server names"},
		{"an issuer with a space", map[string]any{"issuer": issuer + " "}, "has no usable issuer"},
		{"an issuer with a letter beyond ASCII", map[string]any{"issuer": issuer + "/é"}, "has no usable issuer"},
		{"an issuer with a placeholder", map[string]any{"issuer": issuer + "/{tenantid}/v2.0"}, "has " + issuer + "/{tenantid}/v2.0."},
		{"an issuer that is no URL", map[string]any{"issuer": bodyCanary}, "has no usable issuer"},
		{"an issuer with LF", map[string]any{"issuer": "\n" + bodyCanary}, "has no usable issuer"},
		{"an issuer that is too long", map[string]any{"issuer": "https://" + strings.Repeat("a", 60) + "/" + strings.Repeat("a", 1980)}, "has no usable issuer"},
		{"a long issuer", map[string]any{"issuer": "https://" + strings.Repeat("a", 60) + "/" + strings.Repeat("a", 1979)}, "has https://aaaa"},
		{"no issuer", map[string]any{"issuer": nil}, "has no usable issuer"},
		{"an issuer that is a number", map[string]any{"issuer": 5}, "has no usable issuer"},
		{"a token endpoint without TLS", map[string]any{"token_endpoint": "http://as.example.com"}, "has metadata whose token_endpoint must be an https URL"},
		{"a token endpoint that is a number", map[string]any{"token_endpoint": 5}, "has metadata whose token_endpoint is not an absolute URL"},
		{"a fragment", map[string]any{"authorization_endpoint": "https://as.example.com/#a"}, "whose authorization_endpoint must have no fragment"},
		{"a user", map[string]any{"device_authorization_endpoint": "https://u@as.example.com"}, "whose device_authorization_endpoint must hold no user name"},
		{"no method", map[string]any{"token_endpoint_auth_methods_supported": []string{"private_key_jwt"}},
			"has metadata whose token_endpoint_auth_methods_supported has none of client_secret_basic, client_secret_post and none, and the engine supports no other"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := (&documents{found: map[string]*server{oauthPath: metadata(c.changes)}}).discover(t, issuer)
			require.Contains(t, requireField(t, "issuer", err).Text, c.text)
		})
	}
}

func TestNoMetadata(t *testing.T) {
	t.Run("not there", func(t *testing.T) {
		d := &documents{}
		_, err := d.discover(t, issuer)
		require.Equal(t, "has no metadata: neither RFC 8414's nor OpenID Connect's well-known URL below as.example.com answers with a JSON object. "+
			"Give the issuer as the server itself spells it, or write token_url in its place", requireField(t, "issuer", err).Text)
		require.Len(t, d.asked, 2)
	})
	for _, c := range []struct {
		name string
		s    *server
		kind tokenservice.Kind
		text string
	}{
		{"an outage", &server{status: 503, header: http.Header{"Retry-After": {"17"}}}, tokenservice.Unavailable, "The authorization server as.example.com is failing (HTTP status 503). Try again in 17s."},
		{"a long outage", &server{status: 503, header: http.Header{"Retry-After": {"86400"}}}, tokenservice.Unavailable, "Try again in 10m0s."},
		{"a limit", &server{status: 429, header: http.Header{"Retry-After": {"17"}}}, tokenservice.Limited, "The authorization server as.example.com permits no further calls for now. Try again in 17s."},
		{"no answer", &server{err: errors.New(bodyCanary)}, tokenservice.Unavailable, "The authorization server as.example.com closed the connection too early"},
		{"cut off", &server{status: 200, body: "{}", cut: true}, tokenservice.Unavailable, "closed the connection too early"},
	} {
		for _, path := range []string{oauthPath, openIDPath} {
			t.Run(c.name+" "+path, func(t *testing.T) {
				_, err := (&documents{found: map[string]*server{path: c.s}}).discover(t, issuer)
				e := requireFailure(t, c.kind, err)
				require.Contains(t, e.Text, c.text)
				require.Equal(t, c.s.status, e.Status)
				require.Equal(t, tokenservice.RetryAfter(c.s.header, time.Now()), e.RetryAfter)
			})
		}
	}
	for name, c := range map[string]struct {
		s    *server
		kind tokenservice.Kind
		rest time.Duration
	}{
		"a limit":                         {&server{status: 429}, tokenservice.Limited, 0},
		"a limit with Retry-After":        {&server{status: 429, header: http.Header{"Retry-After": {"17"}}}, tokenservice.Limited, 17 * time.Second},
		"an outage with Retry-After":      {&server{status: 503, header: http.Header{"Retry-After": {"17"}}}, tokenservice.Unavailable, 17 * time.Second},
		"a refusal with Retry-After":      {&server{status: 403, header: http.Header{"Retry-After": {"17"}}}, tokenservice.Unavailable, 17 * time.Second},
		"a limit with X-Rate-Limit-Reset": {&server{status: 429, header: http.Header{"X-Rate-Limit-Reset": {"4102444800"}}}, tokenservice.Limited, 24 * time.Hour},
		"a limit with both":               {&server{status: 429, header: http.Header{"Retry-After": {"17"}, "X-Rate-Limit-Reset": {"4102444800"}}}, tokenservice.Limited, 17 * time.Second},
	} {
		t.Run("nothing is asked after "+name, func(t *testing.T) {
			d := &documents{found: map[string]*server{oauthPath: c.s, openIDPath: metadata(nil)}}
			_, err := d.discover(t, issuer)
			require.Equal(t, c.rest, requireFailure(t, c.kind, err).RetryAfter)
			require.Len(t, d.asked, 1)
		})
	}
	t.Run("a refusal without Retry-After", func(t *testing.T) {
		_, err := (&documents{found: map[string]*server{oauthPath: {status: 403}}}).discover(t, issuer)
		require.Contains(t, requireField(t, "issuer", err).Text, "has no metadata")
	})
	t.Run("not there, and cut off", func(t *testing.T) {
		_, err := (&documents{found: map[string]*server{oauthPath: {status: 404, body: "{}", cut: true}}}).discover(t, issuer)
		require.Contains(t, requireField(t, "issuer", err).Text, "has no metadata")
	})
	t.Run("too slow", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			_, err := (&documents{found: map[string]*server{oauthPath: {delay: time.Minute}, openIDPath: {delay: time.Minute}}}).discover(t, issuer)
			require.Contains(t, requireFailure(t, tokenservice.Unavailable, err).Text, "timed out after request_timeout (15s)")
		})
	})
	t.Run("no permit", func(t *testing.T) {
		no := errors.New("no")
		_, err := Discover(t.Context(), issuer, DiscoverOptions{Permit: func(context.Context) (func(), error) { return nil, no }})
		require.Equal(t, no, err)
	})
	t.Run("given up", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		_, err := Discover(ctx, issuer, DiscoverOptions{})
		require.ErrorIs(t, err, context.Canceled)
	})
	for _, bad := range []string{"", "as.example.com", issuer + "?a=b", issuer + "#", "http://as.example.com"} {
		_, err := Discover(t.Context(), bad, DiscoverOptions{})
		requireField(t, "issuer", err)
	}
	_, err := Discover(t.Context(), issuer, DiscoverOptions{CACert: "x"})
	requireField(t, "ca_cert", err)
}

func TestDiscoverOnTheTestServer(t *testing.T) {
	s := oauth2test.New()
	ca, stop := s.ListenTLS()
	defer stop()
	for _, kind := range []oauth2test.Metadata{oauth2test.MetadataBoth, oauth2test.MetadataOAuth, oauth2test.MetadataOpenID} {
		s.Set(func(o *oauth2test.Options) { o.Metadata, o.PromiseIss = kind, true })
		m, err := Discover(t.Context(), s.Issuer(), DiscoverOptions{CACert: ca, RequestTimeout: 15 * time.Second})
		require.NoError(t, err)
		require.Equal(t, &Metadata{
			TokenURL: s.TokenURL(), RevocationURL: s.RevocationURL(), AuthorizationURL: s.AuthorizationURL(), DeviceAuthorizationURL: s.DeviceURL(),
			AuthMethod: ClientSecretBasic, IssuerPromised: true,
		}, m)
	}
	_, err := Discover(t.Context(), s.Issuer(), DiscoverOptions{RequestTimeout: 15 * time.Second})
	requireFailure(t, tokenservice.Unavailable, err)
}
