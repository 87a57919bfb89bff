package kaizala

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/tokenservice"
)

// DefaultAPIRoot is where the service was (doc). Some clients used https://kms.kaiza.la (client).
const DefaultAPIRoot = "https://api.kaiza.la"

// DefaultRequestTimeout is how long a client should wait for an answer (doc).
const DefaultRequestTimeout = time.Minute

// DefaultRedirectHosts are the domains that the service's own hosts were in: api.kaiza.la and
// inc-000.kaizalamessaging.osi.office.net (doc).
var DefaultRedirectHosts = []string{"kaiza.la", "osi.office.net"}

// The calls' paths below the api root (doc).
const (
	exchangePath  = "/v1/accessToken"
	sendPINPath   = "/v1/generatePin"
	redeemPINPath = "/v1/loginWithPinAndApplicationId"
)

const (
	// maxHops bounds the redirects of one exchange; each is a call that counts (doc).
	maxHops = 5
	// maxFieldBytes bounds the connector's ID and secret, of 36 and 10 bytes (client).
	maxFieldBytes = 256
)

// Config is a connector and the way to the service.
type Config struct {
	// ConnectorID and ConnectorSecret are what the portal showed when the connector was registered: a GUID, and 10
	// upper-case letters and digits (client). Any other text that a header can carry is sent as well.
	ConnectorID, ConnectorSecret string
	// APIRoot is an https URL, or an http one on 127.0.0.0/8, ::1 or localhost. It may have a path, and no query, fragment or
	// user name.
	APIRoot string
	// CACert holds, in PEM, the only certificates that are trusted to sign the service's; "" means the system's.
	CACert string
	// RedirectHosts are the domains that a redirect may lead to, themselves or their subdomains, beside the api root's own
	// host. Empty means none.
	RedirectHosts []string
	// RequestTimeout bounds what one exchange spends on HTTP, all hops together and waiting for Permit not counted; 0 or
	// less means DefaultRequestTimeout.
	RequestTimeout time.Duration
	// Transport makes the requests; CACert does not reach it. It should not keep connections: Go's transport sends a GET a
	// second time, unasked, when a kept connection breaks, and the first may have rotated the refresh token. nil means a
	// transport of the client's own, which makes exactly one request for each that is permitted.
	Transport http.RoundTripper
}

// Format prints no secret, whatever the verb.
func (Config) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "kaizala.Config{…}") }

// Client makes exchanges for one connector. It is safe for concurrent use, and remembers nothing between exchanges.
type Client struct {
	connectorID, connectorSecret string
	root                         *url.URL
	rootHost                     tokenservice.Host
	redirectHosts                []string
	timeout                      time.Duration
	transport                    http.RoundTripper
	closed                       atomic.Bool
}

// Format prints no secret, whatever the verb.
func (*Client) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "kaizala.Client{…}") }

// New returns a client, or a [*tokenservice.FieldError] that names the field at fault. It makes no call.
func New(c Config) (*Client, error) {
	for _, field := range []struct{ name, value string }{
		{"connector_id", c.ConnectorID},
		{"connector_secret", c.ConnectorSecret},
	} {
		switch {
		case field.value == "":
			return nil, fieldError(field.name, "must not be empty; Kaizala's portal shows it with the connector")
		case len(field.value) > maxFieldBytes:
			return nil, fieldError(field.name, fmt.Sprintf("must not be longer than %d bytes", maxFieldBytes))
		case !tokenservice.Sendable(field.value):
			return nil, fieldError(field.name, "must be plain ASCII in one line, with no space around it")
		}
	}
	root, rootHost, problem := tokenservice.ParseTarget(c.APIRoot)
	switch {
	case problem != "":
		return nil, fieldError("api_root", problem+"; give one such as "+DefaultAPIRoot)
	case strings.ContainsAny(c.APIRoot, "?#"):
		return nil, fieldError("api_root", "must have no query and no fragment; give a URL such as "+DefaultAPIRoot)
	case root.Path == "":
		root.Path = "/" // what JoinPath joins to nothing is relative
	}
	roots, problem := tokenservice.ParseCA(c.CACert)
	if problem != "" {
		return nil, fieldError("ca_cert", problem)
	}
	client := &Client{
		connectorID:     c.ConnectorID,
		connectorSecret: c.ConnectorSecret,
		root:            root,
		rootHost:        rootHost,
		timeout:         c.RequestTimeout,
		transport:       c.Transport,
	}
	for _, raw := range c.RedirectHosts {
		domain, ok := tokenservice.ParseHost(raw)
		if !ok || domain.IsAddress() {
			return nil, fieldError("redirect_hosts", "must be domain names without scheme, port, path or *, such as kaiza.la; each stands for its subdomains too")
		}
		client.redirectHosts = append(client.redirectHosts, domain.String())
	}
	if client.timeout <= 0 {
		client.timeout = DefaultRequestTimeout
	}
	if client.transport == nil {
		client.transport = tokenservice.NewTransport(roots)
	}
	return client, nil
}

func fieldError(field, text string) error { return &tokenservice.FieldError{Field: field, Text: text} }

// Close implements [tokenservice.Service].
func (c *Client) Close() { c.closed.Store(true) }

// About returns what the engine has to know about Kaizala: there is no call that revokes a token (doc), and no grace period
// for a lost answer is known.
func (c *Client) About() tokenservice.About {
	return tokenservice.About{Name: "Kaizala", NewRefreshToken: "generate a new one on Kaizala's portal", Revocation: tokenservice.RevokeNothing}
}

// KeepAlive returns 30 days for a refresh token whose end is unknown, and 0 for any other: those are exchanged in time.
func (c *Client) KeepAlive(f tokenservice.Facts) time.Duration {
	if f.Expires.IsZero() {
		return keepAlive
	}
	return 0
}

// Exchange exchanges a refresh token for an access token. It follows redirects to permitted hosts; each hop asks Permit.
//
// The result's Endpoint is the URL to which a 308 (doc) led, if all redirects before it were 308s too; otherwise the one
// that the exchange was given, if it may still go there. A 307 is followed and not remembered. An exchange that touched a
// remembered URL and ends in Unavailable or in 404, 405 or 410 returns "", so that the next one starts at the api root.
func (c *Client) Exchange(ctx context.Context, e tokenservice.Exchange) tokenservice.Result {
	if err := tokenservice.CheckToken(e.RefreshToken); err != nil {
		return tokenservice.Result{Endpoint: e.Endpoint, Err: &tokenservice.Failure{
			Kind: tokenservice.Refused,
			Text: "The exchange was not made: " + err.Error() + ". The tenant user has to write a good one.",
		}}
	}
	x := exchange{Client: c, Exchange: e, at: c.root.JoinPath(exchangePath), unbroken: true}
	x.Endpoint = ""
	if u, _, problem := tokenservice.ParseTarget(e.Endpoint); problem == "" {
		if u = withExchangePath(u); x.permitted(c.root, u) == "" {
			x.at, x.Endpoint = u, e.Endpoint
		}
	}
	r := x.run(ctx)
	r.Sent, r.Endpoint = x.sent, x.Endpoint
	gone := []int{http.StatusNotFound, http.StatusMethodNotAllowed, http.StatusGone}
	if f, ok := r.Err.(*tokenservice.Failure); ok && (f.Kind == tokenservice.Unavailable || slices.Contains(gone, f.Status)) {
		r.Endpoint = "" // the remembered URL may be the cause, and to forget it without need costs one redirect
	}
	return r
}

// exchange is the state of one exchange from hop to hop. Its Endpoint is the URL to remember.
type exchange struct {
	*Client
	tokenservice.Exchange
	at       *url.URL
	sent     time.Time // when the last request began
	unbroken bool      // all redirects so far were permanent
}

// run makes the exchange's requests, one for each hop.
func (x *exchange) run(ctx context.Context) tokenservice.Result {
	for hops, spent := 0, time.Duration(0); ; hops++ {
		a, err := tokenservice.Call{
			Transport: x.transport,
			Method:    http.MethodGet,
			URL:       x.at,
			Header: http.Header{
				"Applicationid":     {x.connectorID},
				"Applicationsecret": {x.connectorSecret},
				"Refreshtoken":      {x.RefreshToken},
			},
			Permit:  x.Permit,
			Closed:  x.closed.Load,
			Service: "Kaizala's token service at " + x.nameHost(x.at.Hostname()),
			Field:   "api_root",
			Timeout: x.timeout,
			Spent:   spent,
		}.Do(ctx)
		x.sent = cmp.Or(a.Sent, x.sent) // one that does not begin leaves the time of the one before it
		spent += time.Since(a.Sent)
		if a.Status != http.StatusPermanentRedirect && a.Status != http.StatusTemporaryRedirect {
			r := readGrant(a, x.RefreshToken, time.Now())
			if err != nil {
				r.AccessToken, r.Err = nil, err
			}
			return r
		}
		if hops == maxHops {
			text := fmt.Sprintf("Kaizala's token service redirected the exchange more than %d times. Try again later.", maxHops)
			return tokenservice.Result{Err: unavailable(a, text)}
		}
		if f := x.hop(a); f != nil {
			return tokenservice.Result{Err: f}
		}
	}
}

// hop moves on to where a redirect leads, if the secrets may go there.
func (x *exchange) hop(a tokenservice.Answer) *tokenservice.Failure {
	location := a.Header.Get("Location")
	next, err := x.at.Parse(location)
	if err == nil {
		next = withExchangePath(next)
	}
	if location == "" || err != nil || len(next.String()) > tokenservice.MaxURLBytes {
		return senseless(a, "it is a redirect without a usable Location")
	}
	if why := x.permitted(x.at, next); why != "" {
		return unavailable(a, "Kaizala's token service redirected the exchange to an address that is not allowed. "+why)
	}
	x.at = next
	x.unbroken = x.unbroken && a.Status == http.StatusPermanentRedirect
	if x.unbroken {
		x.Endpoint = next.String()
	}
	return nil
}

// withExchangePath completes a URL that names a base alone. Kaizala's documentation says that Location holds the new
// endpoint, and not whether it repeats the call's path (guess): a path is taken as the whole call's, no path as the
// base.
func withExchangePath(u *url.URL) *url.URL {
	whole := *u
	whole.Fragment, whole.RawFragment = "", ""
	if whole.Path == "" || whole.Path == "/" {
		whole.Path, whole.RawPath = exchangePath, ""
	}
	return &whole
}

// permitted says why the secrets may not travel on from one URL to another, or "" where they may.
func (x *exchange) permitted(from, to *url.URL) string {
	h, problem := tokenservice.CheckTarget(to)
	switch {
	case problem != "":
		return "Its address " + problem + "."
	case from.Scheme == "https" && to.Scheme != "https":
		return "It leads from https to http, which is never followed."
	case h == x.rootHost:
		return ""
	}
	for _, domain := range x.redirectHosts {
		if h.Within(domain) {
			return ""
		}
	}
	return "If " + x.nameHost(h.String()) + " is Kaizala's, the operator can add it to redirect_hosts."
}

// nameHost returns a host's name for the text of an error, or "that host" where the name holds a secret that was sent.
func (x *exchange) nameHost(name string) string {
	name = strings.ToLower(name)
	for _, secret := range []string{x.connectorSecret, x.RefreshToken} {
		if strings.Contains(name, strings.ToLower(secret)) {
			return "that host"
		}
	}
	return name
}
