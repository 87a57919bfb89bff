package tokenservice

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
	"net/http/httptrace"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hashicorp/go-cleanhttp"
)

const (
	// MaxAnswerBytes bounds an answer's body after decompression, in bytes.
	MaxAnswerBytes = 256 << 10
	// maxHeaderBytes bounds an answer's header.
	maxHeaderBytes = 64 << 10
	// maxRetryAfter bounds how long an answer can silence a connector.
	maxRetryAfter = 24 * time.Hour
	// LongestRest bounds how long an answer that is not about a limit can silence a connector.
	LongestRest = 10 * time.Minute
)

// NewTransport returns a transport that sends each request once, whatever happens. With connections kept open, Go's transport would send a
// GET again whose connection broke (HTTP/1), and any request whose stream was refused (HTTP/2), though the first may have rotated the
// refresh token. roots are the only certificates that are trusted; nil means the system's.
//
// https goes through the proxy of the environment. Plain http never does, for it is meant for this machine alone, and
// Go's own exception for loopback addresses knows neither LOCALHOST nor "localhost.".
func NewTransport(roots *x509.CertPool) *http.Transport {
	t := cleanhttp.DefaultTransport() // which keeps no connections
	t.Proxy = httpsOnly(http.ProxyFromEnvironment)
	t.TLSClientConfig = &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}
	t.MaxResponseHeaderBytes = maxHeaderBytes
	t.ForceAttemptHTTP2 = false
	t.Protocols = new(http.Protocols)
	t.Protocols.SetHTTP1(true)
	t.OnProxyConnectResponse = func(_ context.Context, _ *url.URL, _ *http.Request, answer *http.Response) error {
		if answer.StatusCode != http.StatusOK {
			return proxyRefusal(answer.StatusCode) // the transport's own error is the proxy's text
		}
		return nil
	}
	return t
}

// proxyRefusal is the HTTP status with which a proxy refuses to connect.
type proxyRefusal int

func (status proxyRefusal) Error() string {
	return fmt.Sprintf("the proxy of this machine's environment refuses to connect (HTTP status %d)", int(status))
}

func httpsOnly(proxy func(*http.Request) (*url.URL, error)) func(*http.Request) (*url.URL, error) {
	return func(r *http.Request) (*url.URL, error) {
		if r.URL.Scheme != "https" {
			return nil, nil
		}
		return proxy(r)
	}
}

// MaxCABytes bounds the certificates of a connector that is written; a system's own bundle is larger.
const MaxCABytes = 64 << 10

// ParseCA returns the certificates of a PEM text, nil for "". All of the text must be certificates: one that is left out without an error
// is noticed much later. Otherwise the second result says what is wrong, as the end of a sentence that begins with the field's name.
func ParseCA(text string) (*x509.CertPool, string) {
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

// Call is one HTTP request. It asks for one permission.
type Call struct {
	// Transport makes the request; redirects are not followed.
	Transport http.RoundTripper
	Method    string
	URL       *url.URL
	Header    http.Header
	// Body is a POST's.
	Body   string
	Permit Permit
	// Closed says whether the client has been closed; nil: it is not closed.
	Closed func() bool
	// Service begins the sentences about the network, and is nowhere else: "Kaizala's token service at api.kaiza.la".
	Service string
	// Field is the field of config to check where the service is not at its URL: "api_root".
	Field string
	// Timeout is request_timeout: what the request may take, waiting for Permit not counted. Spent is what the requests before it
	// have taken of that, 0 where it is the first.
	Timeout, Spent time.Duration
}

// Format prints no secret, whatever the verb.
func (Call) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "tokenservice.Call{…}") }

// Answer is one HTTP answer, as far as it arrived.
type Answer struct {
	// Status is 0 where nothing arrived.
	Status int
	Header http.Header
	// Body holds at most MaxAnswerBytes and a byte. It is not read with a 101, 307 or 308.
	Body []byte
	// Broken says in a whole sentence why Body is not all that was sent; "" when it is.
	Broken string
	// Sent is when the request began; zero where it did not.
	Sent time.Time
	// Lost: the request may have reached the service, and no complete answer came.
	Lost bool
}

// Format prints no secret, whatever the verb.
func (Answer) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "tokenservice.Answer{…}") }

// Do makes the request. Its error is Permit's as it is, or [ErrClosed], or one that wraps ctx's, or a [*Failure] of the kind Unavailable
// whose Lost is the answer's. With an error the answer holds what had arrived. An answer that breaks off in its body is no
// error, but has Broken and Lost set.
func (c Call) Do(ctx context.Context) (a Answer, err error) {
	if ctx.Err() != nil {
		return a, givenUp(ctx)
	}
	if c.Permit != nil {
		done, err := c.Permit(ctx)
		if err != nil {
			return a, err
		}
		if done != nil {
			defer done()
		}
	}
	a.Sent = time.Now()
	attempt, cancel := context.WithTimeout(ctx, c.Timeout-c.Spent)
	defer cancel()

	// Go's transport tells when it begins to look for a connection, and when it has one, TLS included. Of a transport that
	// tells nothing it is assumed that all is sent at once.
	var connecting atomic.Bool
	closed := func() bool { return c.Closed != nil && c.Closed() }
	traced := httptrace.WithClientTrace(attempt, &httptrace.ClientTrace{
		GetConn: func(string) { connecting.Store(true) },
		GotConn: func(got httptrace.GotConnInfo) {
			if closed() {
				_ = got.Conn.Close() // nothing of the request can be written then
				return
			}
			connecting.Store(false)
		},
	})
	request := &http.Request{Method: c.Method, URL: c.URL, Host: c.URL.Host, Header: c.Header, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1}
	if c.Method == http.MethodPost { // even an empty body, without GetBody, keeps Go from sending the request a second time
		request.Body, request.ContentLength = io.NopCloser(strings.NewReader(c.Body)), int64(len(c.Body))
	}
	// http.Client is not used: it would follow redirects, headers and all.
	resp, err := c.Transport.RoundTrip(request.WithContext(traced))
	if err != nil {
		a.Lost = !connecting.Load()
		if ctx.Err() != nil {
			return a, givenUp(ctx)
		}
		if !a.Lost && closed() {
			return Answer{}, ErrClosed
		}
		return a, &Failure{Kind: Unavailable, Lost: a.Lost, Text: c.networkText(attempt, err)}
	}
	defer func() { _ = resp.Body.Close() }()
	a.Status, a.Header = resp.StatusCode, resp.Header
	switch a.Status {
	case http.StatusPermanentRedirect, http.StatusTemporaryRedirect,
		http.StatusSwitchingProtocols: // Go's body of a 101 is the connection itself, whose reads do not end with the context
		return a, nil
	}
	a.Body, err = io.ReadAll(io.LimitReader(resp.Body, MaxAnswerBytes+1))
	a.Lost = err != nil || len(a.Body) > MaxAnswerBytes
	switch {
	case err != nil && ctx.Err() != nil:
		return a, givenUp(ctx)
	case err != nil:
		a.Broken = c.networkText(attempt, err)
	case a.Lost:
		a.Broken = fmt.Sprintf("%s gave an answer that cannot be used: it is longer than %d KiB.", c.Service, MaxAnswerBytes>>10)
	}
	return a, nil
}

func givenUp(ctx context.Context) error {
	return fmt.Errorf("the request was given up: %w", ctx.Err())
}

// networkText says which kind of failure it was, in words of its own: net/http's errors quote URLs, and what a server
// sent in place of HTTP.
func (c Call) networkText(attempt context.Context, err error) string {
	var (
		certErr *tls.CertificateVerificationError
		nameErr x509.HostnameError
		tlsErr  tls.RecordHeaderError
		dnsErr  *net.DNSError
		opErr   *net.OpError
		netErr  net.Error
		refusal proxyRefusal
	)
	switch {
	case attempt.Err() != nil:
		return fmt.Sprintf("%s timed out after request_timeout (%v). Try again later.", c.Service, c.Timeout)
	case errors.As(err, &refusal):
		return fmt.Sprintf("%s is unreachable: %v. The operator has to check it.", c.Service, refusal)
	case errors.As(err, &nameErr):
		return fmt.Sprintf("%s has a certificate for another name. The operator has to check %s.", c.Service, c.Field)
	case errors.As(err, &certErr):
		return c.Service + " has a certificate that is not trusted. The operator has to set ca_cert to the CA that signed it, or have it renewed."
	case errors.As(err, &tlsErr), strings.Contains(err.Error(), "HTTP response to HTTPS client"):
		return fmt.Sprintf("%s does not speak TLS as it should. The operator has to check %s.", c.Service, c.Field)
	case errors.As(err, &dnsErr):
		return fmt.Sprintf("%s is unreachable: its name does not resolve. The operator has to check %s and DNS.", c.Service, c.Field)
	case errors.As(err, &opErr) && opErr.Op == "remote error": // a TLS alert
		return fmt.Sprintf("%s refuses the TLS connection, perhaps because it wants a client certificate. The operator has to check %s.", c.Service, c.Field)
	case errors.As(err, &opErr) && opErr.Op == "proxyconnect":
		return c.Service + " is unreachable: the proxy of this machine's environment does not answer. The operator has to check it."
	case errors.Is(err, syscall.ECONNREFUSED):
		return c.Service + " is unreachable: it refuses connections. Try again later."
	case errors.As(err, &netErr) && netErr.Timeout():
		return c.Service + " is unreachable: connecting timed out. Try again later."
	case errors.As(err, &opErr) && opErr.Op == "dial":
		return c.Service + " is unreachable. Try again later."
	}
	return c.Service + " closed the connection too early, or answered with something that is not HTTP. Try again later."
}

// RetryAfter reads the header of that name, seconds or a date (RFC 9110), as a duration from now: 24 hours at most, and 0
// for anything else.
func RetryAfter(h http.Header, now time.Time) time.Duration {
	value := strings.TrimSpace(h.Get("Retry-After"))
	if strings.Trim(value, "0123456789") == "" {
		seconds, _ := strconv.ParseInt(value, 10, 64) // 0 for an empty value, and the largest number for one out of range
		return time.Duration(min(seconds, int64(maxRetryAfter/time.Second))) * time.Second
	}
	if at, err := http.ParseTime(value); err == nil {
		return min(max(at.Sub(now), 0), maxRetryAfter)
	}
	return 0
}

// TryAgain is the sentence that says to try again after a time, or later where that is 0.
func TryAgain(after time.Duration) string {
	if after == 0 {
		return "Try again later."
	}
	return fmt.Sprintf("Try again in %v.", after.Round(time.Second))
}

// RateLimitReset reads X-Rate-Limit-Reset, seconds since the epoch, which some authorization servers send in place of
// Retry-After, as a duration from now: 24 hours at most, and 0 for anything else.
func RateLimitReset(h http.Header, now time.Time) time.Duration {
	seconds, err := strconv.ParseUint(strings.TrimSpace(h.Get("X-Rate-Limit-Reset")), 10, 64)
	if err != nil || seconds > maxUnix {
		return 0
	}
	return min(max(time.Unix(int64(seconds), 0).Sub(now), 0), maxRetryAfter)
}
