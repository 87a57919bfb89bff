package oauth2test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"maps"
	"mime"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// reply is an answer, or a broken connection.
type reply struct {
	status int
	header http.Header
	body   string
	// code is the error code in the body.
	code string
	// cut is the number of bytes of the body after which the connection breaks; less than 0 means that it does not.
	cut int
	// none breaks the connection without an answer.
	none bool
}

func (a Answer) reply(code string) reply {
	header := a.Header.Clone()
	if header == nil {
		header = http.Header{}
	}
	return reply{status: a.Status, header: header, body: a.Body, code: code, cut: -1}
}

// request is a request with its body read and its credentials found.
type request struct {
	*http.Request
	path string // the path below the issuer's
	form url.Values
	// bad is what is wrong with the body, as an error_description; "" if nothing is.
	bad string

	// The client's credentials. method is how they came, "" if there were none.
	id, secret, method string
	// authBad is what is wrong with them.
	authBad string
}

const maxBody = 1 << 20

func (s *Server) read(r *http.Request) (*request, error) {
	q := &request{Request: r, form: url.Values{}}
	base := ""
	if u, err := url.Parse(s.Issuer()); err == nil {
		base = u.Path
	}
	q.path = strings.TrimPrefix(r.URL.Path, base)
	// RFC 8414, section 3.1: the well-known part comes before the issuer's path.
	if base != "" && r.URL.Path == pathOAuth+base {
		q.path = pathOAuth
	} else if base != "" && (q.path == pathOAuth || !strings.HasPrefix(r.URL.Path, base+"/")) {
		q.path = ""
	}
	if r.Body != nil {
		raw, err := io.ReadAll(io.LimitReader(r.Body, maxBody))
		if err != nil {
			return nil, err
		}
		q.readForm(string(raw))
	}
	q.readCredentials()
	return q, nil
}

func (q *request) readForm(raw string) {
	if raw == "" {
		return
	}
	kind, _, err := mime.ParseMediaType(q.Header.Get("Content-Type"))
	if err != nil || kind != typeForm {
		q.bad = "The body must be application/x-www-form-urlencoded."
		return
	}
	if q.form, err = url.ParseQuery(raw); err != nil {
		q.bad = "The form cannot be read."
	}
	for name, values := range q.form {
		if len(values) > 1 {
			q.bad = "A parameter came twice: " + name // RFC 6749, section 3.2
		}
	}
	for _, name := range []string{"client_secret", "refresh_token", "code", "token"} {
		if q.URL.Query().Has(name) {
			q.bad = "A secret came in the URL." // RFC 6749, section 2.3.1
		}
	}
}

// readCredentials finds how the client authenticates (RFC 6749, section 2.3.1).
func (q *request) readCredentials() {
	header := q.Header.Values("Authorization")
	switch {
	case len(header) == 0 && q.form.Has("client_secret"):
		q.id, q.secret, q.method = q.form.Get("client_id"), q.form.Get("client_secret"), AuthPost
		return
	case len(header) == 0 && q.form.Has("client_id"):
		q.id, q.method = q.form.Get("client_id"), AuthNone
		return
	case len(header) == 0:
		return
	}
	q.method = AuthBasic
	scheme, value, _ := strings.Cut(header[0], " ")
	raw, err := base64.StdEncoding.DecodeString(value)
	id, secret, colon := strings.Cut(string(raw), ":")
	basic := len(header) == 1 && strings.EqualFold(scheme, "Basic") && err == nil && colon
	if !basic || !formEncoded(id) || !formEncoded(secret) {
		q.authBad = "Authorization is not Basic with a form-encoded ID and secret."
		return
	}
	q.id, _ = url.QueryUnescape(id)
	q.secret, _ = url.QueryUnescape(secret)
	if q.form.Has("client_secret") || (q.form.Has("client_id") && q.form.Get("client_id") != q.id) {
		q.authBad = "The client authenticates in two ways."
	}
}

// formEncoded returns whether this can be the result of form encoding. "~" may be unencoded.
func formEncoded(s string) bool {
	for i := range len(s) {
		c := s[i]
		letter := c|0x20 >= 'a' && c|0x20 <= 'z' || c >= '0' && c <= '9'
		if !letter && !strings.ContainsRune("*-._~+%", rune(c)) {
			return false
		}
	}
	_, err := url.QueryUnescape(s)
	return err == nil
}

// answer answers a request. Handler and Transport both use it.
func (s *Server) answer(ctx context.Context, r *http.Request) reply {
	q, err := s.read(r)
	if err != nil {
		return reply{none: true}
	}
	e, handle := s.route(q.path)
	c := &Call{Endpoint: e, Path: r.URL.Path, ClientID: q.id}
	s.identify(q, c)
	s.begin(c)
	a := s.withFaults(ctx, c, func() reply { return handle(q, c) })
	if a.none {
		a.status = 0
	}
	s.end(c, a.status)
	return a
}

func (s *Server) route(path string) (Endpoint, func(*request, *Call) reply) {
	switch path {
	case pathToken:
		return EndpointToken, s.token
	case pathRevocation:
		return EndpointRevocation, s.revocation
	case pathDevice:
		return EndpointDevice, s.deviceAuthorization
	case pathIntrospection:
		return EndpointIntrospection, s.introspection
	case pathUserInfo:
		return EndpointUserInfo, s.userInfo
	case pathOAuth, pathOpenID:
		return EndpointMetadata, s.metadata
	case pathAuthorization:
		return EndpointAuthorization, s.authorizationPage
	case pathVerification:
		return EndpointVerification, s.verificationPage
	}
	return "", func(*request, *Call) reply { return notFound() }
}

func notFound() reply {
	return canned(http.StatusNotFound, typeHTML, "<html><body>Not found</body></html>").reply("not_found")
}

// identify records the user of the token, code or device code in a request.
func (s *Server) identify(q *request, c *Call) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var t *token
	switch c.Endpoint {
	case EndpointToken:
		c.GrantType, c.Token = q.form.Get("grant_type"), q.form.Get("refresh_token")
		t = s.refresh[c.Token]
		if code := s.codes[q.form.Get("code")]; code != nil {
			c.User = code.user
		}
		if d := s.devices[q.form.Get("device_code")]; d != nil {
			c.User = d.user
		}
	case EndpointRevocation, EndpointIntrospection:
		c.Token = q.form.Get("token")
		t = s.anyToken(c.Token)
	case EndpointUserInfo:
		_, c.Token, _ = strings.Cut(q.Header.Get("Authorization"), " ")
		t = s.access[c.Token]
	}
	if t == nil {
		return
	}
	c.User = t.grant.user
	if now := time.Now(); t.expired(now) {
		c.Expired = true
	} else if !t.expires.IsZero() {
		c.Left = t.expires.Sub(now)
	}
}

func (s *Server) anyToken(value string) *token {
	if t := s.access[value]; t != nil {
		return t
	}
	return s.refresh[value]
}

// withFaults carries a call out, with the fault that was injected for it.
func (s *Server) withFaults(ctx context.Context, c *Call, handle func() reply) reply {
	if wait := s.limited(c); wait > 0 {
		if s.options().LimitReset {
			return RateLimitReset(time.Now().Add(wait)).reply("slow_down")
		}
		return TooManyRequests(wait).reply("slow_down")
	}
	process := func() reply {
		a := handle()
		s.mu.Lock()
		defer s.mu.Unlock()
		c.Processed, c.Error = true, a.code
		return a
	}
	f, cleared := s.fault(c)
	none := reply{none: true}
	if f.Delay > 0 {
		timer := time.NewTimer(f.Delay)
		defer timer.Stop()
		select {
		case <-ctx.Done():
			return none
		case <-timer.C:
		}
	}
	instead := f.Hang || f.Reset || f.Status != 0
	truncate := f.Truncate || f.TruncateQuietly
	var a reply
	if !instead || f.Process || truncate || f.Hold {
		a = process()
	}
	switch {
	case f.Hang:
		select {
		case <-ctx.Done():
		case <-cleared:
		}
		return none
	case f.Reset:
		return none
	case f.Status != 0:
		a = f.Answer.reply("")
	}
	if f.Hold {
		select {
		case <-ctx.Done():
			return none
		case <-cleared:
		}
	}
	if truncate {
		at := len(a.body) / 2
		if f.TruncateAt > 0 {
			at = min(f.TruncateAt, len(a.body))
		}
		if f.TruncateQuietly {
			a.body = a.body[:at]
		} else {
			a.cut = at
		}
	}
	return a
}

func (s *Server) options() Options {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.opts
}

// Handler returns the server as a handler. It accepts every host name, and serves below the path of the server's URL (SetURL).
func (s *Server) Handler() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		a := s.answer(r.Context(), r)
		if a.none {
			reset(w)
		}
		maps.Copy(w.Header(), a.header)
		w.Header().Set("Content-Length", strconv.Itoa(len(a.body)))
		w.WriteHeader(a.status)
		if a.cut < 0 {
			_, _ = io.WriteString(w, a.body)
			return
		}
		_, _ = io.WriteString(w, a.body[:a.cut])
		_ = http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	})
}

// reset breaks the connection, with a TCP reset if possible, and does not return.
func reset(w http.ResponseWriter) {
	if conn, _, err := http.NewResponseController(w).Hijack(); err == nil {
		if tcp, ok := conn.(*net.TCPConn); ok {
			_ = tcp.SetLinger(0)
		}
		_ = conn.Close()
	}
	panic(http.ErrAbortHandler)
}

// Transport returns a transport that answers in process, with no socket and no goroutine of its own. A request to
// another scheme or host than the server's is an error, as if no server were there. A broken connection is
// [io.ErrUnexpectedEOF].
func (s *Server) Transport() http.RoundTripper { return transport{s} }

type transport struct{ server *Server }

func (t transport) RoundTrip(r *http.Request) (*http.Response, error) {
	ctx := r.Context()
	seen := r.Clone(ctx)
	if r.Body != nil {
		raw, err := io.ReadAll(io.LimitReader(r.Body, maxBody))
		_ = r.Body.Close()
		if err != nil {
			return nil, err
		}
		seen.Body = io.NopCloser(bytes.NewReader(raw))
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	base, err := url.Parse(t.server.Issuer())
	if err != nil || base.Scheme != r.URL.Scheme || !strings.EqualFold(base.Host, r.URL.Host) {
		return nil, fmt.Errorf("oauth2test: no server listens at %s://%s", r.URL.Scheme, r.URL.Host)
	}
	a := t.server.answer(ctx, seen)
	if a.none {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		return nil, io.ErrUnexpectedEOF
	}
	var body io.Reader = strings.NewReader(a.body)
	if a.cut >= 0 {
		body = io.MultiReader(strings.NewReader(a.body[:a.cut]), broken{})
	}
	return &http.Response{
		Status:        strconv.Itoa(a.status) + " " + http.StatusText(a.status),
		StatusCode:    a.status,
		Proto:         "HTTP/1.1",
		ProtoMajor:    1,
		ProtoMinor:    1,
		Header:        a.header,
		Body:          io.NopCloser(body),
		ContentLength: int64(len(a.body)),
		Request:       r,
	}, nil
}

// broken is a connection that has broken.
type broken struct{}

func (broken) Read([]byte) (int, error) { return 0, io.ErrUnexpectedEOF }

// Listen serves on a port of 127.0.0.1, and sets the server's URL to that address. closeServer ends the hangs and the
// listening.
func (s *Server) Listen() (closeServer func()) {
	_, closeServer = s.listen((*httptest.Server).Start)
	return closeServer
}

// ListenTLS is Listen with TLS. caCert is the certificate, in PEM, that a client has to trust.
func (s *Server) ListenTLS() (caCert string, closeServer func()) {
	server, closeServer := s.listen((*httptest.Server).StartTLS)
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})), closeServer
}

func (s *Server) listen(start func(*httptest.Server)) (*httptest.Server, func()) {
	server := httptest.NewUnstartedServer(s.Handler())
	server.Config.ErrorLog = log.New(io.Discard, "", 0) // for example errors of clients that reject the certificate
	start(server)
	s.SetURL(server.URL)
	return server, func() {
		s.ClearFaults()
		server.CloseClientConnections()
		server.Close()
	}
}
