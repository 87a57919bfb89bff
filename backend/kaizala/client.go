package kaizala

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"syscall"
	"time"

	"github.com/hashicorp/go-cleanhttp"
)

// DefaultAPIRoot is where the service was (doc). Some clients used https://kms.kaiza.la (client).
const DefaultAPIRoot = "https://api.kaiza.la"

// DefaultRequestTimeout is how long a client should wait for an answer (doc).
const DefaultRequestTimeout = time.Minute

// DefaultRedirectHosts are the domains that the service's own hosts were in: api.kaiza.la and
// inc-000.kaizalamessaging.osi.office.net (doc).
var DefaultRedirectHosts = []string{"kaiza.la", "osi.office.net"}

const (
	// maxHops bounds the redirects of one exchange; each is a call that counts (doc).
	maxHops = 5
	// maxHeaderBytes bounds an answer's header.
	maxHeaderBytes = 64 << 10
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
	root                         *url.URL // the exchange's, at the api root
	rootHost                     host
	redirectHosts                []string
	timeout                      time.Duration
	transport                    http.RoundTripper
	own                          *http.Transport
}

// Format prints no secret, whatever the verb.
func (*Client) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "kaizala.Client{…}") }

// New returns a client, or a [*FieldError] that names the field at fault. It makes no call.
func New(c Config) (*Client, error) {
	for _, field := range []struct{ name, value string }{
		{"connector_id", c.ConnectorID},
		{"connector_secret", c.ConnectorSecret},
	} {
		switch {
		case field.value == "":
			return nil, &FieldError{field.name, "must not be empty; Kaizala's portal shows it with the connector"}
		case len(field.value) > maxFieldBytes:
			return nil, &FieldError{field.name, fmt.Sprintf("must not be longer than %d bytes", maxFieldBytes)}
		case !sendable(field.value):
			return nil, &FieldError{field.name, "must be plain ASCII in one line, with no space around it"}
		}
	}
	root, rootHost, problem := parseRoot(c.APIRoot)
	if problem != "" {
		return nil, &FieldError{"api_root", problem}
	}
	roots, problem := parseCA(c.CACert)
	if problem != "" {
		return nil, &FieldError{"ca_cert", problem}
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
		domain, problem := parseDomain(raw)
		if problem != "" {
			return nil, &FieldError{"redirect_hosts", problem}
		}
		client.redirectHosts = append(client.redirectHosts, domain)
	}
	if client.timeout <= 0 {
		client.timeout = DefaultRequestTimeout
	}
	if client.transport == nil {
		client.own = newTransport(roots)
		client.transport = client.own
	}
	return client, nil
}

// newTransport returns a transport that makes one request of one, whatever happens: with connections kept open, HTTP/1
// repeats a GET whose connection broke, and HTTP/2 one whose stream was refused.
func newTransport(roots *x509.CertPool) *http.Transport {
	t := cleanhttp.DefaultTransport()
	t.TLSClientConfig = &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}
	t.MaxResponseHeaderBytes = maxHeaderBytes
	t.ForceAttemptHTTP2 = false
	t.Protocols = new(http.Protocols)
	t.Protocols.SetHTTP1(true)
	return t
}

// parseCA returns the certificates of a PEM text, nil for "". All of it must be good: a certificate that is left out
// in silence is found much later.
func parseCA(text string) (*x509.CertPool, string) {
	if text == "" {
		return nil, ""
	}
	const right = "must hold certificates in PEM, and nothing else"
	pool, rest, blocks := x509.NewCertPool(), []byte(text), 0
	for {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if block.Type != "CERTIFICATE" || err != nil {
			return nil, right
		}
		pool.AddCert(cert)
		blocks++
	}
	if blocks == 0 || blocks != strings.Count(text, "-----BEGIN") {
		return nil, right
	}
	return pool, ""
}

// Close closes idle connections. Exchanges in flight go on.
func (c *Client) Close() {
	if c.own != nil {
		c.own.CloseIdleConnections()
	}
}

// Request is one exchange.
type Request struct {
	// RefreshToken is sent as it is; see [CheckToken].
	RefreshToken string
	// URL is what Moved was last called with for this user; "" means the api root. A URL that is no permitted target any
	// more is ignored, and the exchange starts at the api root.
	URL string
	// Permit is asked before every HTTP request, hops included. done, if any, is called once that request has been answered,
	// body and all, or has failed. An error ends the exchange and is returned as it is. nil permits everything.
	Permit func(context.Context) (done func(), err error)
	// Moved is told where this user's endpoint is, before the client goes there: when a 308 (doc) names a permitted host, and
	// so do all redirects before it. A 307 is followed and not remembered. Moved is called with "" when an exchange that
	// touched a remembered URL ends in Unavailable or in 404, 405 or 410, so that the next one starts at the api root. It is
	// called on Exchange's own goroutine. nil means that nobody remembers.
	Moved func(url string)
}

// Format prints no secret, whatever the verb.
func (Request) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "kaizala.Request{…}") }

// Grant is what an exchange brought.
type Grant struct {
	// AccessToken is sent by apps as the header accessToken (doc).
	AccessToken string
	// EndpointURL is the base URL of the apps' calls, as sent; it may end in / (doc).
	EndpointURL string
	// Expires is when the access token dies, in UTC and by the service's clock, to the millisecond (doc); never more than 400
	// days ahead.
	Expires time.Time
	// RefreshToken is the new refresh token, which must be used from now on (doc); "" where the service sent none or the
	// one that it was sent.
	RefreshToken string
	// Scope is what the access token may do, comma-separated, as sent (doc).
	Scope string
}

// Format prints no secret, whatever the verb.
func (Grant) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "kaizala.Grant{…}") }

// Exchange exchanges a refresh token for an access token. It returns a Grant, or an [*Error], or Permit's error, or
// an error that wraps ctx's. With an error the Grant is nil, unless the answer held a new refresh token: then
// Grant.RefreshToken alone is set, and must not be lost. Exchange does not retry.
func (c *Client) Exchange(ctx context.Context, r Request) (*Grant, error) {
	if err := CheckToken(r.RefreshToken); err != nil {
		return nil, &Error{Kind: Refused, Text: "The exchange was not made: " + err.Error() + ". The tenant user has to write a good one."}
	}
	x := exchange{Client: c, Request: r, at: c.root, left: c.timeout, unbroken: true}
	if u, _, problem := parseTarget(r.URL); problem == "" {
		if u = withCallPath(u); x.permitted(c.root, u) == "" {
			x.at, x.remembered = u, true
		}
	}
	grant, err := x.run(ctx)
	var e *Error
	if x.remembered && errors.As(err, &e) && stale(e) && r.Moved != nil {
		r.Moved("")
	}
	return grant, err
}

// stale says whether an error may be the fault of the URL. A URL that is given up without need costs one hop.
func stale(e *Error) bool {
	return e.Kind == Unavailable || e.Status == http.StatusNotFound || e.Status == http.StatusMethodNotAllowed || e.Status == http.StatusGone
}

// exchange is the state of one exchange from hop to hop.
type exchange struct {
	*Client
	Request
	at         *url.URL
	left       time.Duration // of request_timeout
	unbroken   bool          // all redirects so far were permanent
	remembered bool          // the exchange started at a remembered URL, or has reported one
}

func (x *exchange) run(ctx context.Context) (*Grant, error) {
	for hops := 0; ; hops++ {
		a, err := x.call(ctx)
		if err != nil {
			grant, _ := interpret(a, x.RefreshToken, time.Now())
			return onlyRefreshToken(grant), err
		}
		if a.status != http.StatusPermanentRedirect && a.status != http.StatusTemporaryRedirect {
			grant, e := interpret(a, x.RefreshToken, time.Now())
			if e != nil {
				return grant, e
			}
			return grant, nil
		}
		if hops == maxHops {
			return nil, x.unavailable(a.status, fmt.Sprintf("Kaizala's token service redirected the exchange more than %d times. Try again later.", maxHops))
		}
		if err := x.hop(a); err != nil {
			return nil, err
		}
	}
}

func onlyRefreshToken(g *Grant) *Grant {
	if g == nil || g.RefreshToken == "" {
		return nil
	}
	return &Grant{RefreshToken: g.RefreshToken}
}

func (x *exchange) unavailable(status int, text string) *Error {
	return &Error{Kind: Unavailable, Status: status, Text: text}
}

// hop moves on to where a redirect leads, if the secrets may go there.
func (x *exchange) hop(a answer) error {
	location := a.header.Get("Location")
	next, err := x.at.Parse(location)
	if location == "" || len(location) > maxURLBytes || err != nil {
		return x.unavailable(a.status, senseless("it is a redirect without a usable Location"))
	}
	next = withCallPath(next)
	if why := x.permitted(x.at, next); why != "" {
		return x.unavailable(a.status, "Kaizala's token service redirected the exchange to where nothing may be sent. "+why)
	}
	x.at = next
	x.unbroken = x.unbroken && a.status == http.StatusPermanentRedirect
	if x.unbroken && x.Moved != nil {
		x.Moved(next.String())
		x.remembered = true
	}
	return nil
}

// call makes one HTTP request. With an error that is ctx's, the answer holds what had arrived.
func (x *exchange) call(ctx context.Context) (a answer, err error) {
	if ctx.Err() != nil {
		return a, givenUp(ctx)
	}
	if x.Permit != nil {
		done, err := x.Permit(ctx)
		if err != nil {
			return a, err
		}
		if done != nil {
			defer done()
		}
	}
	start := time.Now()
	attempt, cancel := context.WithTimeout(ctx, x.left)
	defer cancel()
	defer func() { x.left -= time.Since(start) }()

	// The transport is used without http.Client, which would follow redirects, headers and all.
	req := (&http.Request{
		Method: http.MethodGet,
		URL:    x.at,
		Host:   x.at.Host,
		Header: http.Header{
			"Applicationid":     {x.connectorID},
			"Applicationsecret": {x.connectorSecret},
			"Refreshtoken":      {x.RefreshToken},
		},
		Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
	}).WithContext(attempt)
	resp, err := x.transport.RoundTrip(req)
	if err != nil {
		if ctx.Err() != nil {
			return a, givenUp(ctx)
		}
		return a, x.unavailable(0, x.networkText(attempt, err))
	}
	defer func() { _ = resp.Body.Close() }()
	a.status, a.header = resp.StatusCode, resp.Header
	if a.status == http.StatusPermanentRedirect || a.status == http.StatusTemporaryRedirect {
		return a, nil
	}
	a.body, err = io.ReadAll(io.LimitReader(resp.Body, maxAnswerBytes+1))
	switch {
	case err != nil && ctx.Err() != nil:
		return a, givenUp(ctx)
	case err != nil:
		a.broken = x.networkText(attempt, err)
	case len(a.body) > maxAnswerBytes:
		a.broken = senseless(fmt.Sprintf("it is longer than %d KiB", maxAnswerBytes>>10))
	}
	return a, nil
}

func givenUp(ctx context.Context) error {
	return fmt.Errorf("the exchange was given up: %w", ctx.Err())
}

// networkText says which kind of failure it was, in words of its own: net/http's errors quote URLs, and what a server
// sent in place of HTTP.
func (x *exchange) networkText(attempt context.Context, err error) string {
	service := "Kaizala's token service at " + x.nameHost(strings.ToLower(x.at.Hostname()))
	var (
		certErr *tls.CertificateVerificationError
		nameErr x509.HostnameError
		tlsErr  tls.RecordHeaderError
		alert   tls.AlertError
		dnsErr  *net.DNSError
		opErr   *net.OpError
		netErr  net.Error
	)
	switch {
	case attempt.Err() != nil:
		return fmt.Sprintf("%s timed out after request_timeout (%v). Try again later.", service, x.timeout)
	case errors.As(err, &nameErr):
		return service + " has a certificate for another name. The operator has to check api_root."
	case errors.As(err, &certErr):
		return service + " has a certificate that is not trusted. The operator has to set ca_cert to the CA that signed it, or have it renewed."
	case errors.As(err, &tlsErr), errors.As(err, &alert), strings.Contains(err.Error(), "HTTP response to HTTPS client"):
		return service + " does not speak TLS as it should. The operator has to check api_root."
	case errors.As(err, &dnsErr):
		return service + " is unreachable: its name does not resolve. The operator has to check api_root and DNS."
	case errors.As(err, &opErr) && opErr.Op == "proxyconnect":
		return service + " is unreachable: the proxy of this machine's environment does not answer. The operator has to check it."
	case errors.Is(err, syscall.ECONNREFUSED):
		return service + " is unreachable: it refuses connections. Try again later."
	case errors.As(err, &netErr) && netErr.Timeout():
		return service + " is unreachable: connecting timed out. Try again later."
	case errors.As(err, &opErr) && opErr.Op == "dial":
		return service + " is unreachable. Try again later."
	}
	return service + " broke the connection off, or answered with something that is not HTTP. Try again later."
}
