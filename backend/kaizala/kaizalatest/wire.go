package kaizalatest

import (
	"encoding/pem"
	"io"
	"log"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
)

// ServeHTTP answers the token service's calls, below any path prefix: GET …/v1/accessToken (doc), POST …/v1/generatePin and
// POST …/v1/loginWithPinAndApplicationId (doc), and GET …/v1/users/me (client).
func (s *Service) ServeHTTP(w http.ResponseWriter, r *http.Request) {
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

// Transport returns a transport that answers requests to every host in process, with no socket and no goroutine of its own.
// A broken connection is [io.ErrUnexpectedEOF].
func (s *Service) Transport() http.RoundTripper { return transport{s} }

type transport struct{ service *Service }

func (t transport) RoundTrip(r *http.Request) (*http.Response, error) {
	ctx := r.Context()
	if r.Body != nil {
		defer func() { _ = r.Body.Close() }()
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	seen := r.Clone(ctx)
	if seen.Host == "" {
		seen.Host = r.URL.Host
	}
	a := t.service.answer(ctx, seen)
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
	header := a.header.Clone()
	if header == nil {
		header = http.Header{}
	}
	return &http.Response{
		Status:        strconv.Itoa(a.status) + " " + http.StatusText(a.status),
		StatusCode:    a.status,
		Proto:         "HTTP/1.1",
		ProtoMajor:    1,
		ProtoMinor:    1,
		Header:        header,
		Body:          io.NopCloser(body),
		ContentLength: int64(len(a.body)),
		Request:       r,
	}, nil
}

// broken is a connection that has broken.
type broken struct{}

func (broken) Read([]byte) (int, error) { return 0, io.ErrUnexpectedEOF }

// Server is a Service that listens on a loopback address.
type Server struct {
	*Service
	// URL is the server's base URL, which can be a connector's api_root.
	URL string
	// CACert is the certificate, in PEM, that a client of a TLS server has to trust; "" without TLS.
	CACert string

	server *httptest.Server
}

// NewServer starts a server without TLS on 127.0.0.1.
func NewServer() *Server { return serve((*httptest.Server).Start) }

// NewTLSServer starts a server with TLS on 127.0.0.1.
func NewTLSServer() *Server { return serve((*httptest.Server).StartTLS) }

func serve(start func(*httptest.Server)) *Server {
	s := New()
	server := httptest.NewUnstartedServer(s)
	server.Config.ErrorLog = log.New(io.Discard, "", 0) // for example errors of clients that reject the certificate
	start(server)
	s.mu.Lock()
	s.url = server.URL
	s.mu.Unlock()
	out := &Server{Service: s, URL: server.URL, server: server}
	if cert := server.Certificate(); cert != nil {
		out.CACert = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}))
	}
	return out
}

// Close ends the hangs, and then the server.
func (s *Server) Close() {
	s.ClearFaults()
	s.server.CloseClientConnections()
	s.server.Close()
}
