package oauth2

import (
	"crypto/x509"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"time"
	"unicode"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/tokenservice"
)

// How a client authenticates at the token endpoint, as RFC 8414 spells it.
const (
	ClientSecretBasic = "client_secret_basic"
	ClientSecretPost  = "client_secret_post"
	NoSecret          = "none"
)

// The values of [Config.Revocation].
const (
	RevokeNothing     = "none"
	RevokeAccessToken = "access_token"
	RevokeByExchange  = "exchange"
)

// Bounds of a configuration, which is stored as one entry. Sizes are in bytes.
const (
	maxIDBytes     = 1 << 10
	maxSecretBytes = 4 << 10
	maxParams      = 32
	maxNameBytes   = 128
	maxParamBytes  = 2 << 10  // one value
	maxParamsBytes = 16 << 10 // a whole map
	maxScopes      = 100
	maxScopeBytes  = 4 << 10 // all scopes, joined
	maxRedirects   = 10
)

// maxLife bounds the durations that are configured.
const maxLife = 100 * 365 * 24 * time.Hour

// Config is a client of an authorization server, and how that server behaves.
type Config struct {
	// ClientID and ClientSecret are what the server registered. They may be empty at New: a call is then refused, see
	// [Client.Missing]. There is no secret where AuthMethod is NoSecret.
	ClientID, ClientSecret string

	// The server's endpoints: https, or http on a loopback address. TokenURL is required. A query is kept.
	TokenURL, RevocationURL, AuthorizationURL, DeviceAuthorizationURL string

	// Issuer is the server's issuer identifier, "" where unknown. IssuerPromised: its metadata promises "iss" in each
	// authorization response (RFC 9207).
	Issuer         string
	IssuerPromised bool

	// AuthMethod is ClientSecretBasic, ClientSecretPost or NoSecret; "" means ClientSecretBasic.
	AuthMethod string

	// TokenParams are sent with each token request, AuthorizationParams are put into the authorization URL.
	TokenParams, AuthorizationParams map[string]string

	// Scopes are only checked here: a request names its own.
	Scopes []string

	// EndpointURLField is the field of a token's answer that becomes [tokenservice.AccessToken.EndpointURL]; "" for none.
	EndpointURLField string

	// AccessTokenLife is assumed where an answer names no expires_in; more than 0.
	AccessTokenLife time.Duration
	// RefreshTokenLife is counted from when a refresh token came, where nothing else tells its end; 0 where unknown.
	RefreshTokenLife time.Duration
	// KeepAlive is how often a refresh token is exchanged at the least; more than 0.
	KeepAlive time.Duration

	// ExchangeInvalidates: an exchange ends the access tokens before it.
	ExchangeInvalidates bool
	// Revocation is RevokeNothing, RevokeAccessToken or RevokeByExchange; "" means RevokeNothing.
	Revocation string
	// RevokeOnDelete: deleting a tenant revokes its refresh token.
	RevokeOnDelete bool

	// CACert holds, in PEM, the only certificates that are trusted to sign the server's; "" means the system's.
	CACert string
	// RequestTimeout bounds each request, waiting for Permit not counted; a second at least.
	RequestTimeout time.Duration
	// Transport makes the requests; CACert does not reach it, and it must not repeat a request by itself. nil means a
	// transport of the client's own.
	Transport http.RoundTripper
}

// Format prints no secret, whatever the verb.
func (Config) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "oauth2.Config{…}") }

// Client makes the requests of one connector. It is safe for concurrent use, and remembers nothing between requests.
type Client struct {
	config    Config
	endpoints map[string]*url.URL // by the name of its field; those that are configured
	name      string              // for texts, with the host of the issuer, or else of the token endpoint
	transport http.RoundTripper
	closed    atomic.Bool
}

// Format prints no secret, whatever the verb.
func (*Client) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "oauth2.Client{…}") }

func fieldError(field, format string, args ...any) error {
	return &tokenservice.FieldError{Field: field, Text: fmt.Sprintf(format, args...)}
}

// New returns a client, or a [*tokenservice.FieldError] that names the field at fault. It makes no call.
func New(c Config) (*Client, error) {
	c.TokenParams, c.AuthorizationParams = maps.Clone(c.TokenParams), maps.Clone(c.AuthorizationParams)
	if c.AuthMethod == "" {
		c.AuthMethod = ClientSecretBasic
	}
	if c.Revocation == "" {
		c.Revocation = RevokeNothing
	}
	client := &Client{config: c, endpoints: map[string]*url.URL{}, transport: c.Transport}
	if err := client.readURLs(); err != nil {
		return nil, err
	}
	for _, check := range []func() error{c.checkClient, c.checkMaps, c.checkScopes, c.checkDurations, c.checkRevocation} {
		if err := check(); err != nil {
			return nil, err
		}
	}
	roots, err := parseCA(c.CACert)
	if err != nil {
		return nil, err
	}
	if client.transport == nil {
		// Requests that follow one another within a second use the same connection. Go never repeats a request of this client
		// on another connection: each is a POST with a body that cannot be read twice. Servers keep an idle connection for
		// longer than a second (Node and Apache 5 seconds, gunicorn 2), so that a request seldom meets a connection that its
		// server is closing. One that does fails, and its answer counts as lost.
		transport := tokenservice.NewTransport(roots)
		transport.DisableKeepAlives, transport.MaxIdleConnsPerHost, transport.IdleConnTimeout = false, 32, time.Second
		client.transport = transport
	}
	return client, nil
}

func (c *Client) readURLs() error {
	for _, field := range []struct{ name, value string }{
		{"token_url", c.config.TokenURL},
		{"revocation_url", c.config.RevocationURL},
		{"authorization_url", c.config.AuthorizationURL},
		{"device_authorization_url", c.config.DeviceAuthorizationURL},
	} {
		if field.value == "" {
			continue
		}
		u, problem := parseURL(field.value)
		if problem != "" {
			return fieldError(field.name, "%s; give a URL such as https://login.example.com/oauth2/token", problem)
		}
		c.endpoints[field.name] = u
	}
	switch {
	case c.endpoints["token_url"] != nil:
	case c.config.Issuer != "":
		return fieldError("token_url", "is missing: the issuer's metadata names no token endpoint, so write token_url beside issuer")
	default:
		return fieldError("token_url", "is missing: write it, or issuer, whose metadata names it")
	}
	host := c.endpoints["token_url"].Host
	if c.config.Issuer != "" {
		issuer, err := parseIssuer(c.config.Issuer)
		if err != nil {
			return err
		}
		host = issuer.Host
	}
	c.name = "authorization server " + strings.ToLower(host)
	return nil
}

// parseURL parses a URL that tokens, codes or a person's browser may travel to. The second result says what is wrong
// otherwise, without quoting it.
func parseURL(raw string) (*url.URL, string) {
	u, _, problem := tokenservice.ParseTarget(raw)
	if problem != "" {
		return nil, problem
	}
	if strings.Contains(raw, "#") {
		return nil, "must have no fragment"
	}
	if _, err := url.ParseQuery(u.RawQuery); err != nil {
		return nil, "has a query that cannot be read"
	}
	return u, ""
}

func parseIssuer(raw string) (*url.URL, error) {
	u, problem := parseURL(raw)
	if problem == "" && strings.Contains(raw, "?") {
		problem = "must have no query"
	}
	if problem != "" {
		return nil, fieldError("issuer", "%s; give a URL such as https://login.example.com, as the server itself spells it", problem)
	}
	return u, nil
}

func parseCA(text string) (*x509.CertPool, error) {
	if len(text) > tokenservice.MaxCABytes {
		return nil, fieldError("ca_cert", "must not be longer than %d bytes", tokenservice.MaxCABytes)
	}
	roots, problem := tokenservice.ParseCA(text)
	if problem != "" {
		return nil, fieldError("ca_cert", "%s", problem)
	}
	return roots, nil
}

// CheckRedirectURIs returns nil, or a [*tokenservice.FieldError] where one of the URLs cannot be a redirect URI of the
// authorization code flow.
func CheckRedirectURIs(uris []string) error {
	if len(uris) > maxRedirects {
		return fieldError("redirect_uris", "must not be more than %d", maxRedirects)
	}
	for _, raw := range uris {
		if _, problem := parseURL(raw); problem != "" {
			return fieldError("redirect_uris", "has a URL that %s; give URLs such as https://vault.example.com/v1/kaizala/callback", problem)
		}
	}
	return nil
}

func (c Config) checkClient() error {
	for _, field := range []struct {
		name, value string
		most        int
	}{
		{"connector_id", c.ClientID, maxIDBytes},
		{"connector_secret", c.ClientSecret, maxSecretBytes},
	} {
		switch {
		case len(field.value) > field.most:
			return fieldError(field.name, "must not be longer than %d bytes", field.most)
		case !printable(field.value), strings.TrimSpace(field.value) != field.value:
			return fieldError(field.name, "must be plain ASCII in one line, with no space around it")
		}
	}
	switch {
	case !slices.Contains([]string{ClientSecretBasic, ClientSecretPost, NoSecret}, c.AuthMethod):
		return fieldError("token_endpoint_auth_method", "must be %s, %s or %s", ClientSecretBasic, ClientSecretPost, NoSecret)
	case c.AuthMethod == NoSecret && c.ClientSecret != "":
		return fieldError("connector_secret", "must be left out where token_endpoint_auth_method is %s", NoSecret)
	}
	return nil
}

// The parameters that the client itself sends, in lower case. A name that ends in "*" stands for all with this beginning.
var (
	reservedTokenParams = []string{
		"grant_type", "refresh_token", "code", "code_verifier", "redirect_uri", "device_code", "client_*",
	}
	reservedAuthorizationParams = []string{
		"response_type", "client_id", "redirect_uri", "scope", "state", "code_challenge*", "request", "request_uri",
	}
)

func (c Config) checkMaps() error {
	if err := checkParams("token_params", c.TokenParams, reservedTokenParams); err != nil {
		return err
	}
	return checkParams("authorization_params", c.AuthorizationParams, reservedAuthorizationParams)
}

func checkParams(field string, params map[string]string, reserved []string) error {
	if len(params) > maxParams {
		return fieldError(field, "must not hold more than %d parameters", maxParams)
	}
	size := 0
	for name, value := range params {
		size += len(name) + len(value)
		switch {
		case name == "" || len(name) > maxNameBytes || !graphic(name):
			return fieldError(field, "must have names of 1 to %d letters, digits and signs of plain ASCII", maxNameBytes)
		case len(value) > maxParamBytes || strings.ContainsFunc(value, notText):
			return fieldError(field, "must have values of at most %d bytes of text in one line", maxParamBytes)
		}
		for _, r := range reserved {
			prefix, open := strings.CutSuffix(r, "*")
			lower := strings.ToLower(name)
			if lower == r || open && strings.HasPrefix(lower, prefix) {
				return fieldError(field, "must not hold %s, which the engine sets itself", r)
			}
		}
	}
	if size > maxParamsBytes {
		return fieldError(field, "must not be longer than %d bytes altogether", maxParamsBytes)
	}
	return nil
}

func (c Config) checkScopes() error {
	if len(c.Scopes) > maxScopes || len(strings.Join(c.Scopes, " ")) > maxScopeBytes {
		return fieldError("scopes", "must not be more than %d, nor longer than %d bytes altogether", maxScopes, maxScopeBytes)
	}
	for _, scope := range c.Scopes {
		if scope == "" || !graphic(scope) || strings.ContainsAny(scope, `"\`) {
			return fieldError("scopes", "must be of plain ASCII without quotes and backslashes (RFC 6749, section 3.3)")
		}
	}
	if len(c.EndpointURLField) > maxNameBytes || !graphic(c.EndpointURLField) {
		return fieldError("endpoint_url_field", "must be the name of one field, such as instance_url, of at most %d letters, digits and signs of plain ASCII", maxNameBytes)
	}
	return nil
}

func (c Config) checkDurations() error {
	for _, d := range []struct {
		name  string
		value time.Duration
		least time.Duration
	}{
		{"access_token_life", c.AccessTokenLife, time.Nanosecond},
		{"refresh_token_life", c.RefreshTokenLife, 0},
		{"keep_alive", c.KeepAlive, time.Nanosecond},
		{"request_timeout", c.RequestTimeout, time.Second},
	} {
		switch {
		case d.value > maxLife:
			return fieldError(d.name, "must not be longer than 100 years")
		case d.value >= d.least:
		case d.least == time.Second:
			return fieldError(d.name, "must be a second at least")
		case d.least == 0:
			return fieldError(d.name, "must not be less than 0")
		default:
			return fieldError(d.name, "must be more than 0")
		}
	}
	return nil
}

func (c Config) checkRevocation() error {
	switch {
	case !slices.Contains([]string{RevokeNothing, RevokeAccessToken, RevokeByExchange}, c.Revocation):
		return fieldError("revocation", "must be %s, %s or %s", RevokeNothing, RevokeAccessToken, RevokeByExchange)
	case c.Revocation == RevokeAccessToken && c.RevocationURL == "":
		return fieldError("revocation", "cannot be %s without revocation_url", RevokeAccessToken)
	case c.Revocation == RevokeByExchange && !c.ExchangeInvalidates:
		return fieldError("revocation", "cannot be %s where exchange_invalidates is false: an exchange then ends no access token", RevokeByExchange)
	case c.RevokeOnDelete && c.RevocationURL == "":
		return fieldError("revoke_on_delete", "needs revocation_url")
	}
	return nil
}

// Missing returns what has to be written before the client can make a call, nil where nothing is missing.
func (c *Client) Missing() *tokenservice.FieldError {
	switch {
	case c.config.ClientID == "":
		return &tokenservice.FieldError{Field: "connector_id", Text: "is missing: the connector's owner has to write it"}
	case c.config.ClientSecret == "" && c.config.AuthMethod != NoSecret:
		return &tokenservice.FieldError{Field: "connector_secret", Text: "is missing: the connector's owner has to write it"}
	}
	return nil
}

// Close implements [tokenservice.Service].
func (c *Client) Close() {
	c.closed.Store(true)
	(&http.Client{Transport: c.transport}).CloseIdleConnections()
}

// printable says whether s holds nothing but the letters, digits, signs and spaces of ASCII: what a token may be made of
// (RFC 6749, appendix A).
func printable(s string) bool {
	return !strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r > '~' })
}

// graphic is printable without spaces.
func graphic(s string) bool { return printable(s) && !strings.Contains(s, " ") }

func notText(r rune) bool { return !unicode.IsPrint(r) || r == unicode.ReplacementChar }
