package tokenservice

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

type transportFunc func(*http.Request) (*http.Response, error)

func (f transportFunc) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// call is a call of a URL, with the canary in its header.
func call(t *testing.T, rt http.RoundTripper, raw string) Call {
	t.Helper()
	u, err := url.Parse(raw)
	require.NoError(t, err)
	return Call{Transport: rt, Method: http.MethodPost, URL: u, Header: http.Header{"Token": {canary}}, Body: "x", Timeout: time.Minute, Spent: 50 * time.Second, Service: "The service at x", Field: "some_url"}
}

// served returns a call, with its own transport, of a server on a socket.
func served(t *testing.T, h http.HandlerFunc) Call {
	t.Helper()
	return call(t, NewTransport(nil), listen(t, (*httptest.Server).Start, h).URL)
}

func listen(t *testing.T, start func(*httptest.Server), h http.HandlerFunc) *httptest.Server {
	t.Helper()
	server := httptest.NewUnstartedServer(h)
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	start(server)
	t.Cleanup(server.Close)
	return server
}

func pemOf(der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

func certificate(t *testing.T) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	require.NoError(t, err)
	return pemOf(der)
}

func pool(t *testing.T, text string) *x509.CertPool {
	t.Helper()
	roots, problem := ParseCA(text)
	require.Empty(t, problem)
	return roots
}

func TestParseCA(t *testing.T) {
	cert := certificate(t)
	assert.Nil(t, pool(t, ""))
	for _, text := range []string{cert, "# ours\n" + cert + "# theirs\n" + cert} {
		assert.NotNil(t, pool(t, text))
	}
	key := string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte("junk")}))
	named := strings.ReplaceAll(cert, "CERTIFICATE", "TRUSTED CERTIFICATE")
	for _, text := range []string{canary, " \n", cert + key, key, named, cert + cert[:len(cert)/2], "-----BEGIN CERTIFICATE-----\nanVuaw==\n-----END CERTIFICATE-----\n"} {
		roots, problem := ParseCA(text)
		assert.Nil(t, roots)
		assert.Equal(t, "must hold certificates in PEM, and nothing else", problem)
	}
}

func TestAnswer(t *testing.T) {
	c := served(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		assert.Equal(t, "x", string(body))
		assert.Equal(t, canary, r.Header.Get("Token"))
		assert.Equal(t, "HTTP/1.1", r.Proto)
		w.Header().Set("X", "y")
		w.WriteHeader(http.StatusTeapot)
		_, _ = io.WriteString(w, "body")
	})
	before := time.Now()
	a, err := c.Do(t.Context())
	require.NoError(t, err)
	assert.Equal(t, http.StatusTeapot, a.Status)
	assert.Equal(t, "y", a.Header.Get("X"))
	assert.Equal(t, "body", string(a.Body))
	assert.Empty(t, a.Broken)
	assert.False(t, a.Lost)
	assert.False(t, a.Sent.Before(before) || a.Sent.After(time.Now()))
}

func TestNoRedirectIsFollowed(t *testing.T) {
	for _, status := range []int{301, 302, 303, 307, 308} {
		var requests atomic.Int32
		a, err := served(t, func(w http.ResponseWriter, _ *http.Request) {
			requests.Add(1)
			w.Header().Set("Location", "/elsewhere")
			w.WriteHeader(status)
			_, _ = io.WriteString(w, "body")
		}).Do(t.Context())
		require.NoError(t, err)
		assert.Equal(t, status, a.Status)
		assert.Equal(t, "/elsewhere", a.Header.Get("Location"))
		assert.Equal(t, status < 307, string(a.Body) == "body", "what a 307 or 308 says beside Location is not read")
		assert.False(t, a.Lost)
		assert.EqualValues(t, 1, requests.Load())
	}
}

// A service that switches protocols, though nobody has asked for that, and then says no more: its answer has no body, and the connection
// is closed.
func TestSwitchedProtocols(t *testing.T) {
	held := make(chan error, 1)
	a, err := served(t, func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		conn, _, err := http.NewResponseController(w).Hijack()
		assert.NoError(t, err)
		defer conn.Close()
		assert.NoError(t, conn.SetReadDeadline(time.Now().Add(3*time.Second)))
		_, _ = io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n")
		_, err = conn.Read(make([]byte, 1))
		held <- err
	}).Do(t.Context())
	require.NoError(t, err)
	assert.Equal(t, http.StatusSwitchingProtocols, a.Status)
	assert.Empty(t, a.Body)
	assert.Empty(t, a.Broken)
	assert.False(t, a.Lost)
	assert.Equal(t, io.EOF, <-held, "the client closes the connection")
}

// A request on a connection that breaks must not be sent again without a permit.
func TestOneRequestForOnePermit(t *testing.T) {
	var requests atomic.Int32
	c := served(t, func(w http.ResponseWriter, _ *http.Request) {
		if requests.Add(1) == 2 {
			panic(http.ErrAbortHandler)
		}
	})
	c.Method, c.Body = http.MethodGet, ""
	for i := range 3 {
		_, err := c.Do(t.Context())
		assert.Equal(t, i != 1, err == nil)
	}
	assert.EqualValues(t, 3, requests.Load())

	// Go's transport may send a POST without a body again, so there is one even where it is empty.
	c.Transport = transportFunc(func(r *http.Request) (*http.Response, error) {
		assert.Equal(t, r.Method == http.MethodPost, r.Body != nil)
		assert.Nil(t, r.GetBody)
		return nil, io.EOF
	})
	for _, c.Method = range []string{http.MethodGet, http.MethodPost} {
		_, err := c.Do(t.Context())
		assert.Error(t, err)
	}
}

func TestHTTP1Alone(t *testing.T) {
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, r.Proto) }))
	server.EnableHTTP2 = true
	server.StartTLS()
	defer server.Close()
	a, err := call(t, NewTransport(pool(t, pemOf(server.Certificate().Raw))), server.URL).Do(t.Context())
	require.NoError(t, err)
	assert.Equal(t, "HTTP/1.1", string(a.Body))
}

func TestProxy(t *testing.T) {
	var asked []string
	proxy := listen(t, (*httptest.Server).Start, func(_ http.ResponseWriter, r *http.Request) {
		asked = append(asked, r.Method+" "+r.Host+" "+r.Header.Get("Token"))
	})
	at, err := url.Parse(proxy.URL)
	require.NoError(t, err)
	through := func(proxy func(*http.Request) (*url.URL, error)) *http.Transport {
		transport := NewTransport(nil)
		transport.Proxy = httpsOnly(proxy)
		return transport
	}
	server := listen(t, (*httptest.Server).Start, func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, r.Host) })
	for _, host := range []string{"127.0.0.1", "localhost", "LOCALHOST", "localhost."} {
		direct := through(http.ProxyURL(at))
		direct.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
			_, port, _ := net.SplitHostPort(address) // some machines do not resolve all of these names
			return new(net.Dialer).DialContext(ctx, network, "127.0.0.1:"+port)
		}
		a, err := call(t, direct, strings.Replace(server.URL, "127.0.0.1", host, 1)).Do(t.Context())
		require.NoError(t, err)
		assert.Contains(t, string(a.Body), host)
	}
	assert.Empty(t, asked, "plain http never goes through a proxy")

	a, err := call(t, through(http.ProxyURL(at)), "https://token.example").Do(t.Context())
	require.Error(t, err)
	assert.Equal(t, []string{"CONNECT token.example:443 "}, asked, "https goes through the proxy, which sees no header")
	assert.False(t, a.Lost)

	// NewTransport(nil) has the same rule, with the proxy of the environment.
	own := NewTransport(nil)
	for raw, want := range map[string]string{
		"http://LOCALHOST":      "",
		"http://localhost.":     "",
		"http://127.0.0.1":      "",
		"https://token.example": environmentProxy,
	} {
		u, err := url.Parse(raw)
		require.NoError(t, err)
		got, err := own.Proxy(&http.Request{URL: u})
		require.NoError(t, err)
		if want == "" {
			assert.Nil(t, got, raw)
		} else {
			assert.Equal(t, want, got.String())
		}
	}
}

// https reaches the service through a proxy that connects it, and trusts the service's certificate alone.
func TestProxyThatConnects(t *testing.T) {
	service := listen(t, (*httptest.Server).StartTLS, func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, r.Proto) })
	proxy := listen(t, (*httptest.Server).Start, func(w http.ResponseWriter, r *http.Request) {
		to, err := net.Dial("tcp", r.Host)
		if !assert.NoError(t, err) {
			return
		}
		defer to.Close()
		from, buffered, err := http.NewResponseController(w).Hijack()
		if !assert.NoError(t, err) {
			return
		}
		defer from.Close()
		_, _ = io.WriteString(from, "HTTP/1.1 200 OK\r\n\r\n")
		go func() { _, _ = io.Copy(to, buffered) }()
		_, _ = io.Copy(from, to)
	})
	at, err := url.Parse(proxy.URL)
	require.NoError(t, err)
	transport := NewTransport(pool(t, pemOf(service.Certificate().Raw)))
	transport.Proxy = httpsOnly(http.ProxyURL(at))
	a, err := call(t, transport, service.URL).Do(t.Context())
	require.NoError(t, err)
	assert.Equal(t, "HTTP/1.1", string(a.Body))
}

func TestFailures(t *testing.T) {
	hang := func(r *http.Request) { _, _ = io.Copy(io.Discard, r.Body); <-r.Context().Done() }
	short := func(c Call) Call { c.Spent = c.Timeout - 50*time.Millisecond; return c }
	to := func(raw, from, into string) string { return strings.Replace(raw, from, into, 1) }
	closed := httptest.NewServer(nil)
	closed.Close()
	closedURL, err := url.Parse(closed.URL)
	require.NoError(t, err)
	plain := listen(t, (*httptest.Server).Start, http.NotFound)
	secure := listen(t, (*httptest.Server).StartTLS, http.NotFound)
	ca := pool(t, pemOf(secure.Certificate().Raw))
	wantsCertificate := listen(t, func(s *httptest.Server) {
		s.TLS = &tls.Config{ClientAuth: tls.RequireAnyClientCert, MaxVersion: tls.VersionTLS12} // later versions ask after the request
		s.StartTLS()
	}, http.NotFound)
	failing := func(err error) http.RoundTripper {
		return transportFunc(func(*http.Request) (*http.Response, error) { return nil, err })
	}
	dialing := func(err error) *http.Transport {
		transport := NewTransport(nil)
		transport.Proxy = nil
		transport.DialContext = func(context.Context, string, string) (net.Conn, error) { return nil, err }
		return transport
	}
	proxied := NewTransport(nil)
	proxied.Proxy = http.ProxyURL(closedURL)
	proxy := listen(t, (*httptest.Server).Start, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Proxy-Authenticate", "Basic realm="+canary)
		w.WriteHeader(http.StatusProxyAuthRequired)
		_, _ = io.WriteString(w, canary)
	})
	proxyURL, err := url.Parse(proxy.URL)
	require.NoError(t, err)
	refused := NewTransport(nil)
	refused.Proxy = http.ProxyURL(proxyURL)

	for _, c := range []struct {
		name, says string
		call       Call
		lost       bool
	}{
		{"nobody listens", " is unreachable: it refuses connections. Try again later.", call(t, NewTransport(nil), closed.URL), false},
		{"no such name", " is unreachable: its name does not resolve. The operator has to check some_url and DNS.",
			call(t, dialing(&net.OpError{Op: "dial", Err: &net.DNSError{IsNotFound: true}}), "https://service.invalid"), false},
		{"no route", " is unreachable. Try again later.", call(t, dialing(&net.OpError{Op: "dial", Err: errors.New(canary)}), "https://service.invalid"), false},
		{"a connection that takes too long", " is unreachable: connecting timed out. Try again later.",
			call(t, dialing(&net.OpError{Op: "dial", Err: context.DeadlineExceeded}), "https://service.invalid"), false},
		{"a proxy that does not answer", " is unreachable: the proxy of this machine's environment does not answer. The operator has to check it.",
			call(t, proxied, "https://service.invalid"), false},
		{"a proxy that refuses", " is unreachable: the proxy of this machine's environment refuses to connect (HTTP status 407). The operator has to check it.",
			call(t, refused, "https://service.invalid"), false},
		{"a CA that nobody trusts", " has a certificate that is not trusted. The operator has to set ca_cert to the CA that signed it, or have it renewed.",
			call(t, NewTransport(nil), secure.URL), false},
		{"another CA", " has a certificate that is not trusted. The operator has to set ca_cert to the CA that signed it, or have it renewed.",
			call(t, NewTransport(pool(t, certificate(t))), secure.URL), false},
		{"a certificate for another name", " has a certificate for another name. The operator has to check some_url.",
			call(t, NewTransport(ca), to(secure.URL, "127.0.0.1", "localhost")), false},
		{"http where https should be", " does not speak TLS as it should. The operator has to check some_url.",
			call(t, NewTransport(nil), to(plain.URL, "http:", "https:")), false},
		{"a client certificate is wanted", " refuses the TLS connection, perhaps because it wants a client certificate. The operator has to check some_url.",
			call(t, NewTransport(pool(t, pemOf(wantsCertificate.Certificate().Raw))), wantsCertificate.URL), false},
		{"a hang", " timed out after request_timeout (1m0s). Try again later.", short(served(t, func(_ http.ResponseWriter, r *http.Request) { hang(r) })), true},
		{"a reset", " closed the connection too early, or answered with something that is not HTTP. Try again later.",
			served(t, func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }), true},
		{"a connection that is reset while the answer is awaited", " closed the connection too early, or answered with something that is not HTTP. Try again later.",
			served(t, func(w http.ResponseWriter, r *http.Request) {
				_, _ = io.Copy(io.Discard, r.Body)
				conn, _, err := http.NewResponseController(w).Hijack()
				assert.NoError(t, err)
				assert.NoError(t, conn.(*net.TCPConn).SetLinger(0)) // a close is a reset then
				_ = conn.Close()
			}), true},
		{"something that is not HTTP", " closed the connection too early, or answered with something that is not HTTP. Try again later.",
			served(t, func(w http.ResponseWriter, r *http.Request) {
				_, _ = io.Copy(io.Discard, r.Body)
				conn, _, err := http.NewResponseController(w).Hijack()
				assert.NoError(t, err)
				_, _ = io.WriteString(conn, canary+"\r\n\r\n")
				_ = conn.Close()
			}), true},
		{"a header that is too long", " closed the connection too early, or answered with something that is not HTTP. Try again later.",
			served(t, func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("X", strings.Repeat("x", maxHeaderBytes)) }), true},
		{"an error that quotes", " closed the connection too early, or answered with something that is not HTTP. Try again later.",
			call(t, failing(errors.New(canary)), "https://service.invalid"), true},
	} {
		t.Run(c.name, func(t *testing.T) {
			a, err := c.call.Do(t.Context())
			assert.Equal(t, &Failure{Kind: Unavailable, Lost: c.lost, Text: "The service at x" + c.says}, err)
			assert.Equal(t, c.lost, a.Lost)
			assert.Zero(t, a.Status)
			assert.False(t, a.Sent.IsZero())
		})
	}
}

func TestBrokenAnswers(t *testing.T) {
	begin := func(w http.ResponseWriter) {
		_, _ = io.WriteString(w, "begun")
		_ = http.NewResponseController(w).Flush()
	}
	bomb := func() []byte {
		var b bytes.Buffer
		z := gzip.NewWriter(&b)
		_, _ = z.Write(bytes.Repeat([]byte("0"), 4<<20))
		_ = z.Close()
		return b.Bytes()
	}()
	for name, c := range map[string]struct {
		says string
		body int
		call Call
	}{
		"a reset": {" closed the connection too early, or answered with something that is not HTTP. Try again later.", 5,
			served(t, func(w http.ResponseWriter, _ *http.Request) { begin(w); panic(http.ErrAbortHandler) })},
		"a hang": {" timed out after request_timeout (1m0s). Try again later.", 5, func() Call {
			c := served(t, func(w http.ResponseWriter, r *http.Request) {
				_, _ = io.Copy(io.Discard, r.Body)
				begin(w)
				<-r.Context().Done()
			})
			c.Spent = c.Timeout - 100*time.Millisecond
			return c
		}()},
		"a byte too much": {" gave an answer that cannot be used: it is longer than 256 KiB.", MaxAnswerBytes + 1,
			served(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(make([]byte, MaxAnswerBytes+1)) })},
		"too much, compressed": {" gave an answer that cannot be used: it is longer than 256 KiB.", MaxAnswerBytes + 1,
			served(t, func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Content-Encoding", "gzip")
				_, _ = w.Write(bomb)
			})},
	} {
		t.Run(name, func(t *testing.T) {
			a, err := c.call.Do(t.Context())
			require.NoError(t, err)
			assert.Equal(t, 200, a.Status)
			assert.Equal(t, "The service at x"+c.says, a.Broken)
			assert.Len(t, a.Body, c.body)
			assert.True(t, a.Lost)
		})
	}
	a, err := served(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(make([]byte, MaxAnswerBytes)) }).Do(t.Context())
	require.NoError(t, err)
	assert.Len(t, a.Body, MaxAnswerBytes)
	assert.Empty(t, a.Broken)
	assert.False(t, a.Lost)
}

func TestContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	hanging := transportFunc(func(r *http.Request) (*http.Response, error) {
		cancel()
		<-r.Context().Done()
		return nil, r.Context().Err()
	})
	a, err := call(t, hanging, "https://service.invalid").Do(ctx)
	require.ErrorIs(t, err, context.Canceled)
	assert.EqualError(t, err, "the request was given up: context canceled")
	assert.True(t, a.Lost)
	assert.False(t, a.Sent.IsZero())

	c := call(t, hanging, "https://service.invalid")
	c.Permit = func(context.Context) (func(), error) {
		t.Error("a cancelled call asks for a permit")
		return nil, nil
	}
	a, err = c.Do(ctx)
	require.ErrorIs(t, err, context.Canceled)
	assert.Equal(t, Answer{}, a)

	ctx, cancel = context.WithCancel(t.Context())
	a, err = call(t, transportFunc(func(*http.Request) (*http.Response, error) {
		body := io.MultiReader(strings.NewReader("begun"), readerFunc(func([]byte) (int, error) { cancel(); return 0, context.Canceled }))
		return &http.Response{StatusCode: 200, Body: io.NopCloser(body)}, nil
	}), "https://service.invalid").Do(ctx)
	require.ErrorIs(t, err, context.Canceled)
	assert.Equal(t, "begun", string(a.Body), "the part of the body that had arrived")
	assert.True(t, a.Lost)
}

// The context ends as the last byte of an answer arrives: the answer counts, since it may hold the only good refresh token.
func TestContextThatEndsWithTheAnswer(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	a, err := call(t, transportFunc(func(*http.Request) (*http.Response, error) {
		body := io.MultiReader(strings.NewReader("whole"), readerFunc(func([]byte) (int, error) { cancel(); return 0, io.EOF }))
		return &http.Response{StatusCode: 200, Body: io.NopCloser(body)}, nil
	}), "https://service.invalid").Do(ctx)
	require.NoError(t, err)
	assert.Equal(t, "whole", string(a.Body))
	assert.Empty(t, a.Broken)
	assert.False(t, a.Lost)
}

// A client is closed while the connection for its request is being made: the request is not sent. One that has begun goes on, and the loss
// of its answer is what it is for any other.
func TestClosed(t *testing.T) {
	for name, start := range map[string]func(*httptest.Server){"http": (*httptest.Server).Start, "https": (*httptest.Server).StartTLS} {
		var closed, broken atomic.Bool
		var requests atomic.Int32
		server := listen(t, start, func(w http.ResponseWriter, _ *http.Request) {
			requests.Add(1)
			closed.Store(true)
			if broken.Load() {
				panic(http.ErrAbortHandler)
			}
			_, _ = io.WriteString(w, "body")
		})
		transport := NewTransport(nil)
		if server.TLS != nil {
			transport = NewTransport(pool(t, pemOf(server.Certificate().Raw)))
		}
		do := func() (Answer, error) {
			closed.Store(false)
			c := call(t, transport, server.URL)
			c.Closed = closed.Load
			return c.Do(t.Context())
		}
		a, err := do()
		require.NoError(t, err, name)
		assert.Equal(t, "body", string(a.Body), name)

		broken.Store(true)
		a, err = do()
		var failure *Failure
		require.ErrorAs(t, err, &failure, name)
		assert.Equal(t, Unavailable, failure.Kind, name)
		assert.True(t, failure.Lost && a.Lost, name)
		assert.False(t, a.Sent.IsZero(), name)
		assert.EqualValues(t, 2, requests.Load(), name)
		broken.Store(false)

		dial := transport.DialContext
		transport.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := dial(ctx, network, address)
			closed.Store(true)
			return conn, err
		}
		a, err = do()
		assert.Equal(t, ErrClosed, err, name)
		assert.Equal(t, Answer{}, a, name)
		server.Close() // which waits for the requests that have come
		assert.EqualValues(t, 2, requests.Load(), name)

		a, err = do()
		assert.Equal(t, ErrClosed, err, "%s: nobody listens any more", name)
		assert.Equal(t, Answer{}, a, name)
	}
}

func TestSpent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := call(t, transportFunc(func(r *http.Request) (*http.Response, error) {
			<-r.Context().Done()
			return nil, r.Context().Err()
		}), "https://service.invalid")
		c.Permit = func(context.Context) (func(), error) { time.Sleep(time.Hour); return nil, nil }
		start := time.Now()
		a, err := c.Do(t.Context())
		require.ErrorContains(t, err, "timed out after request_timeout (1m0s)")
		assert.Equal(t, time.Hour+10*time.Second, time.Since(start), "waiting for Permit does not count")
		assert.Equal(t, start.Add(time.Hour), a.Sent)
	})
}

func TestPermit(t *testing.T) {
	var events []string
	answer := transportFunc(func(*http.Request) (*http.Response, error) {
		events = append(events, "request")
		return &http.Response{StatusCode: 200, Body: io.NopCloser(readerFunc(func([]byte) (int, error) {
			events = append(events, "body")
			return 0, io.EOF
		}))}, nil
	})
	permit := func(context.Context) (func(), error) {
		events = append(events, "permit")
		return func() { events = append(events, "done") }, nil
	}
	c := call(t, answer, "https://service.invalid")
	c.Permit = permit
	_, err := c.Do(t.Context())
	require.NoError(t, err)
	assert.Equal(t, []string{"permit", "request", "body", "done"}, events)

	events = nil
	c.Transport = transportFunc(func(*http.Request) (*http.Response, error) { return nil, io.EOF })
	_, err = c.Do(t.Context())
	require.Error(t, err)
	assert.Equal(t, []string{"permit", "done"}, events)

	full := errors.New("the share is used up")
	c.Permit = func(context.Context) (func(), error) { return func() { t.Error("done without a permit") }, full }
	c.Transport = transportFunc(func(*http.Request) (*http.Response, error) { t.Error("a request without a permit"); return nil, io.EOF })
	a, err := c.Do(t.Context())
	assert.True(t, err == full, "the permit's error is returned unchanged")
	assert.Equal(t, Answer{}, a)
}

func TestTryAgain(t *testing.T) {
	assert.Equal(t, "Try again later.", TryAgain(0))
	assert.Equal(t, "Try again in 1m30s.", TryAgain(90*time.Second+time.Millisecond))
}

func TestRetryAfter(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	in := func(d time.Duration) string { return now.Add(d).Format(http.TimeFormat) }
	for value, want := range map[string]time.Duration{
		"":                      0,
		"0":                     0,
		"17":                    17 * time.Second,
		" 17 ":                  17 * time.Second,
		"-17":                   0,
		"+17":                   0,
		"1.5":                   0,
		"1e3":                   0,
		canary:                  0,
		"86399":                 24*time.Hour - time.Second,
		"86400":                 24 * time.Hour,
		"86401":                 24 * time.Hour,
		"99999999999999999999":  24 * time.Hour,
		"99999999999999999999x": 0,
		in(90 * time.Second):    90 * time.Second,
		in(-90 * time.Second):   0,
		in(25 * time.Hour):      24 * time.Hour,
		now.String():            0,
	} {
		assert.Equal(t, want, RetryAfter(http.Header{"Retry-After": {value}}, now), "%q", value)
	}
	assert.Zero(t, RetryAfter(nil, now))
}

func TestRateLimitReset(t *testing.T) {
	now := time.Unix(1_790_000_000, 0)
	for value, want := range map[string]time.Duration{
		"":                     0,
		"17":                   0,
		"1790000000":           0,
		"1790000017":           17 * time.Second,
		" 1790000017 ":         17 * time.Second,
		"1789999999":           0,
		"1790086399":           24*time.Hour - time.Second,
		"1790086401":           24 * time.Hour,
		"7258118400":           24 * time.Hour,
		"7258118401":           0,
		"1790000017000":        0, // milliseconds, or no time at all
		"99999999999999999999": 0,
		"-1790000017":          0,
		canary:                 0,
	} {
		assert.Equal(t, want, RateLimitReset(http.Header{"X-Rate-Limit-Reset": {value}}, now), "%q", value)
	}
	assert.Zero(t, RateLimitReset(http.Header{"Retry-After": {"17"}}, now))
}
