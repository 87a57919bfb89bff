package kaizala

import (
	"context"
	"errors"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/kaizala/kaizalatest"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/tokenservice"
)

// served returns a client, with its own transport, of a server on a socket.
func served(t *testing.T, h http.HandlerFunc) *Client {
	t.Helper()
	server := httptest.NewUnstartedServer(h)
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.Start()
	t.Cleanup(server.Close)
	return client(t, func(c *Config) { c.APIRoot = server.URL })
}

// A client that has been closed sends nothing.
func TestClosed(t *testing.T) {
	c := served(t, func(http.ResponseWriter, *http.Request) { t.Error("a request of a closed client") })
	c.Close()
	assert.Equal(t, tokenservice.ErrClosed, c.exchange(t).Err)
	assert.Equal(t, tokenservice.ErrClosed, c.SendPIN(t.Context(), phoneCanary, nil))
	assert.Equal(t, tokenservice.ErrClosed, c.RedeemPIN(t.Context(), phoneCanary, pinCanary, nil).Err)
}

func TestExchange(t *testing.T) {
	for name, start := range map[string]func() *kaizalatest.Server{"http": kaizalatest.NewServer, "https": kaizalatest.NewTLSServer} {
		t.Run(name, func(t *testing.T) {
			s := start()
			defer s.Close()
			c, token := connectorOf(t, s.Service, func(c *Config) { c.APIRoot, c.CACert, c.Transport = s.URL, s.CACert, nil })
			before := time.Now()
			r := c.Exchange(t.Context(), tokenservice.Exchange{RefreshToken: token})
			g := requireGranted(t, r)
			assert.True(t, s.AccessTokenAlive(g.Token))
			assert.Equal(t, s.URL, g.EndpointURL)
			assert.Empty(t, r.RefreshToken)
			assert.Nil(t, r.Facts)
			assert.False(t, r.Sent.Before(before) || r.Sent.After(time.Now()))
			assert.WithinDuration(t, time.Now().Add(24*time.Hour), g.Expires, time.Minute)
		})
	}
}

func TestExchangeSaysWhatTheServiceMeans(t *testing.T) {
	s := kaizalatest.New()
	c, token := connectorOf(t, s, nil)
	id := c.connectorID
	exchange := func(token string) error {
		return c.Exchange(t.Context(), tokenservice.Exchange{RefreshToken: token}).Err
	}
	require.NoError(t, exchange(token))
	requireKind(t, tokenservice.RefusedRefreshToken, exchange(token+"x"))

	newer := s.GenerateUserToken(id, "ada")
	requireKind(t, tokenservice.RefusedRefreshToken, exchange(token))
	require.NoError(t, exchange(newer))

	s.SetConnectorSecret(id, "OTHER")
	requireKind(t, tokenservice.RefusedConnector, exchange(newer))
	s.SetConnectorSecret(id, c.connectorSecret)

	s.SetLimits(1, 0)
	e := requireKind(t, tokenservice.Limited, exchange(newer))
	assert.InDelta(t, 60, e.RetryAfter.Seconds(), 5)
	s.SetLimits(0, 0)

	s.DeleteConnector(id)
	requireKind(t, tokenservice.RefusedConnector, exchange(newer))
}

func TestRotation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := kaizalatest.New()
		c, token := connectorOf(t, s, nil)
		time.Sleep(time.Until(Inspect(token).RotatesFrom()) - time.Second)
		r := c.Exchange(t.Context(), tokenservice.Exchange{RefreshToken: token})
		requireGranted(t, r)
		require.Empty(t, r.RefreshToken)

		time.Sleep(time.Second)
		r = c.Exchange(t.Context(), tokenservice.Exchange{RefreshToken: token})
		requireGranted(t, r)
		require.Equal(t, s.CurrentRefreshToken("ada"), r.RefreshToken)
		require.NotEqual(t, token, r.RefreshToken)
		require.Equal(t, time.Now().Truncate(time.Second).Add(365*24*time.Hour).UTC(), r.Facts.Expires)

		// The answer is cut off after the next refresh token, and the connection breaks.
		time.Sleep(time.Until(r.Facts.RotatesFrom))
		s.Inject(kaizalatest.Fault{Times: 1, Truncate: true, TruncateAt: 1 << 20})
		lost := c.Exchange(t.Context(), tokenservice.Exchange{RefreshToken: r.RefreshToken})
		require.True(t, requireKind(t, tokenservice.Unavailable, lost.Err).Lost)
		requireRescued(t, s.CurrentRefreshToken("ada"), lost)
	})
}

// The client sends the documented request, and nothing else that could identify it.
func TestRequest(t *testing.T) {
	for root, path := range map[string]string{"": "/v1/accessToken", "/": "/v1/accessToken", "/kaizala/eu": "/kaizala/eu/v1/accessToken", "/kaizala/": "/kaizala/v1/accessToken"} {
		var seen *http.Request
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			seen = r
			w.Header().Set("Set-Cookie", "a=b")
			_, _ = io.WriteString(w, body(t, nil))
		}))
		c := client(t, func(c *Config) { c.APIRoot = server.URL + root })
		for range 2 {
			requireGranted(t, c.exchange(t))
		}
		server.Close()
		assert.Equal(t, http.MethodGet, seen.Method)
		assert.Equal(t, path, seen.RequestURI)
		assert.Equal(t, connectorID, seen.Header.Get("applicationId"))
		assert.Equal(t, secretCanary, seen.Header.Get("applicationSecret"))
		assert.Equal(t, refreshCanary, seen.Header.Get("refreshToken"))
		assert.Empty(t, seen.Header.Get("Cookie"))
		assert.Empty(t, seen.Header.Get("Referer"))
		assert.Zero(t, seen.ContentLength)
	}
}

// Go's transport must not send a GET again when its connection breaks: the first request may have rotated the refresh token, and the
// second would be a call without a permit.
func TestOneRequestForOnePermit(t *testing.T) {
	var requests atomic.Int32
	c := served(t, func(w http.ResponseWriter, _ *http.Request) {
		if requests.Add(1) == 1 {
			_, _ = io.WriteString(w, body(t, nil))
			return
		}
		panic(http.ErrAbortHandler)
	})
	requireGranted(t, c.exchange(t))
	requireKind(t, tokenservice.Unavailable, c.exchange(t).Err)
	assert.EqualValues(t, 2, requests.Load())
}

func TestNetworkErrors(t *testing.T) {
	short := func(c *Client) *Client { c.timeout = 50 * time.Millisecond; return c }
	hang := func(r *http.Request) { <-r.Context().Done() }
	quiet := func(start func(*httptest.Server)) *httptest.Server {
		server := httptest.NewUnstartedServer(http.NotFoundHandler())
		server.Config.ErrorLog = log.New(io.Discard, "", 0)
		start(server)
		t.Cleanup(server.Close)
		return server
	}
	closed := httptest.NewServer(nil)
	closed.Close()
	secure := kaizalatest.NewTLSServer()
	defer secure.Close()
	plain := quiet((*httptest.Server).Start)
	untrusted := quiet((*httptest.Server).StartTLS)

	for _, c := range []struct {
		name, says string
		client     *Client
	}{
		{"nobody listens", "refuses connections", client(t, func(c *Config) { c.APIRoot = closed.URL })},
		{"no such name", "check api_root and DNS", client(t, func(c *Config) {
			direct := tokenservice.NewTransport(nil)
			direct.Proxy = nil
			c.APIRoot, c.Transport = "https://kaizala.invalid", direct
		})},
		{"a CA that nobody trusts", "set ca_cert", client(t, func(c *Config) { c.APIRoot = untrusted.URL })},
		{"another CA", "set ca_cert", client(t, func(c *Config) { c.APIRoot, c.CACert = untrusted.URL, certificate(t) })},
		{"a certificate for another name", "another name", client(t, func(c *Config) {
			c.APIRoot, c.CACert = strings.Replace(secure.URL, "127.0.0.1", "localhost", 1), secure.CACert
		})},
		{"http where https should be", "TLS", client(t, func(c *Config) { c.APIRoot = strings.Replace(plain.URL, "http:", "https:", 1) })},
		{"a hang", "timed out after request_timeout (50ms)", short(served(t, func(_ http.ResponseWriter, r *http.Request) { hang(r) }))},
		{"a trickle", "timed out after request_timeout (50ms)", short(served(t, func(w http.ResponseWriter, r *http.Request) {
			for r.Context().Err() == nil {
				_, _ = io.WriteString(w, " ")
				_ = http.NewResponseController(w).Flush()
				select {
				case <-r.Context().Done():
				case <-time.After(time.Millisecond):
				}
			}
		}))},
		{"a reset", "closed the connection too early", served(t, func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) })},
		{"something that is not HTTP", "not HTTP", served(t, func(w http.ResponseWriter, _ *http.Request) {
			conn, _, err := http.NewResponseController(w).Hijack()
			assert.NoError(t, err)
			_, _ = io.WriteString(conn, bodyCanary+" "+refreshCanary+"\r\n\r\n")
			_ = conn.Close()
		})},
		{"an error that quotes", "closed the connection too early", through(t, transportFunc(func(r *http.Request) (*http.Response, error) {
			return nil, errors.New(r.Header.Get("refreshToken") + r.Header.Get("applicationSecret") + bodyCanary)
		}))},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := c.client.exchange(t)
			e := requireKind(t, tokenservice.Unavailable, r.Err)
			assert.True(t, strings.HasPrefix(e.Text, "Kaizala's token service at "+c.client.root.Hostname()+" "), e.Text)
			assert.Contains(t, e.Text, c.says)
			assert.False(t, r.Sent.IsZero())
			assert.Equal(t, c.name == "a trickle", e.Status == 200, "the answer's status, 0 without an answer")
			assert.NotContains(t, e.Text, exchangePath)
			requireRescued(t, "", r)
		})
	}
}

// The client returns the new refresh token of an answer that breaks off after it.
func TestBrokenAnswers(t *testing.T) {
	start := func(w http.ResponseWriter) {
		_, _ = io.WriteString(w, `{"refreshToken":"`+newCanary+`",`)
		_ = http.NewResponseController(w).Flush()
	}
	t.Run("reset", func(t *testing.T) {
		r := served(t, func(w http.ResponseWriter, _ *http.Request) {
			start(w)
			panic(http.ErrAbortHandler)
		}).exchange(t)
		assert.Contains(t, requireKind(t, tokenservice.Unavailable, r.Err).Text, "closed the connection too early")
		requireRescued(t, newCanary, r)
	})
	t.Run("reset after the whole object", func(t *testing.T) {
		r := served(t, func(w http.ResponseWriter, _ *http.Request) {
			_, _ = io.WriteString(w, body(t, map[string]any{"refreshToken": newCanary}))
			_ = http.NewResponseController(w).Flush()
			panic(http.ErrAbortHandler)
		}).exchange(t)
		requireKind(t, tokenservice.Unavailable, r.Err)
		requireRescued(t, newCanary, r)
	})
	t.Run("a refusal in a broken answer is not believed", func(t *testing.T) {
		r := served(t, func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusUnauthorized)
			_, _ = io.WriteString(w, `{"errorCode":"InvalidToken"}`)
			_ = http.NewResponseController(w).Flush()
			panic(http.ErrAbortHandler)
		}).exchange(t)
		requireKind(t, tokenservice.Unavailable, r.Err)
	})
	t.Run("timed out", func(t *testing.T) {
		c := served(t, func(w http.ResponseWriter, r *http.Request) { start(w); <-r.Context().Done() })
		c.timeout = 100 * time.Millisecond
		r := c.exchange(t)
		assert.Contains(t, requireKind(t, tokenservice.Unavailable, r.Err).Text, "timed out")
		requireRescued(t, newCanary, r)
	})
	t.Run("given up by the caller", func(t *testing.T) {
		// After a timeout the client does not use the access token, even of a complete answer.
		for _, begun := range []string{`{"refreshToken":"` + newCanary + `",`, body(t, map[string]any{"refreshToken": newCanary})} {
			ctx, cancel := context.WithCancel(t.Context())
			r := through(t, transportFunc(func(*http.Request) (*http.Response, error) {
				b := io.MultiReader(strings.NewReader(begun), readerFunc(func([]byte) (int, error) {
					cancel()
					return 0, context.Canceled
				}))
				return &http.Response{StatusCode: 200, Header: http.Header{}, Body: io.NopCloser(b)}, nil
			})).Exchange(ctx, tokenservice.Exchange{RefreshToken: refreshCanary})
			require.ErrorIs(t, r.Err, context.Canceled)
			requireRescued(t, newCanary, r)
		}
	})
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

func TestCallersContext(t *testing.T) {
	for _, fault := range []kaizalatest.Fault{{Hang: true}, {Delay: time.Hour}} {
		synctest.Test(t, func(t *testing.T) {
			s := kaizalatest.New()
			c, token := connectorOf(t, s, nil)
			s.Inject(fault)
			request := tokenservice.Exchange{RefreshToken: token, Endpoint: DefaultAPIRoot}

			ctx, cancel := context.WithCancel(t.Context())
			time.AfterFunc(5*time.Second, cancel)
			require.ErrorIs(t, c.Exchange(ctx, request).Err, context.Canceled)

			ctx, cancel = context.WithTimeout(t.Context(), 5*time.Second)
			defer cancel()
			start := time.Now()
			r := c.Exchange(ctx, request)
			require.ErrorIs(t, r.Err, context.DeadlineExceeded)
			assert.Equal(t, 5*time.Second, time.Since(start))
			var e *tokenservice.Failure
			assert.NotErrorAs(t, r.Err, &e, "the error is no failure of the service")
			assert.Equal(t, DefaultAPIRoot, r.Endpoint)
			assert.Equal(t, start, r.Sent)

			calls := s.CallCount()
			request.Permit = func(context.Context) (func(), error) {
				t.Error("a cancelled exchange asks for a permit")
				return nil, nil
			}
			r = c.Exchange(ctx, request)
			require.ErrorIs(t, r.Err, context.DeadlineExceeded)
			assert.Zero(t, r.Sent)
			assert.Equal(t, calls, s.CallCount(), "no call for a cancelled exchange")
		})
	}
}

func TestRequestTimeout(t *testing.T) {
	t.Run("all hops together, and no waiting for Permit", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s := kaizalatest.New()
			c, token := connectorOf(t, s, nil)
			s.MoveUser("ada", "https://eu.kaiza.la/")
			s.Inject(kaizalatest.Fault{Delay: 6 * time.Second})
			start := time.Now()
			r := c.Exchange(t.Context(), tokenservice.Exchange{RefreshToken: token, Permit: func(ctx context.Context) (func(), error) {
				time.Sleep(time.Minute)
				return nil, ctx.Err()
			}})
			assert.Contains(t, requireKind(t, tokenservice.Unavailable, r.Err).Text, "request_timeout (10s)")
			assert.Equal(t, 2*time.Minute+10*time.Second, time.Since(start))
			assert.Equal(t, start.Add(2*time.Minute+6*time.Second), r.Sent, "the time at which the last request began")
		})
	})
	t.Run("three requests together", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			c := through(t, transportFunc(func(r *http.Request) (*http.Response, error) {
				select {
				case <-time.After(4 * time.Second):
					return &http.Response{StatusCode: 307, Header: http.Header{"Location": {"/next"}}, Body: http.NoBody}, nil
				case <-r.Context().Done():
					return nil, r.Context().Err()
				}
			}))
			start := time.Now()
			assert.Contains(t, requireKind(t, tokenservice.Unavailable, c.exchange(t).Err).Text, "request_timeout (10s)")
			assert.Equal(t, 10*time.Second, time.Since(start))
		})
	})
	t.Run("a minute by default", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s := kaizalatest.New()
			c, token := connectorOf(t, s, func(c *Config) { c.RequestTimeout = 0 })
			s.Inject(kaizalatest.Fault{Hang: true})
			start := time.Now()
			requireKind(t, tokenservice.Unavailable, c.Exchange(t.Context(), tokenservice.Exchange{RefreshToken: token}).Err)
			assert.Equal(t, time.Minute, time.Since(start))
		})
	})
}

func TestPermit(t *testing.T) {
	s := kaizalatest.New()
	c, token := connectorOf(t, s, nil)
	s.MoveUser("ada", "https://eu.kaiza.la/v1/accessToken")
	var events []string
	permit := func(context.Context) (func(), error) {
		events = append(events, "permit")
		return func() { events = append(events, "done") }, nil
	}
	requireGranted(t, c.Exchange(t.Context(), tokenservice.Exchange{RefreshToken: token, Permit: permit}))
	assert.Equal(t, []string{"permit", "done", "permit", "done"}, events)

	t.Run("done after a failure too, once", func(t *testing.T) {
		events = nil
		s.Inject(kaizalatest.Fault{Reset: true, Times: 1})
		requireKind(t, tokenservice.Unavailable, c.Exchange(t.Context(), tokenservice.Exchange{RefreshToken: token, Permit: permit}).Err)
		assert.Equal(t, []string{"permit", "done"}, events)
	})
	t.Run("done after the body", func(t *testing.T) {
		read := false
		c := through(t, transportFunc(func(*http.Request) (*http.Response, error) {
			return &http.Response{StatusCode: 200, Body: io.NopCloser(readerFunc(func([]byte) (int, error) { read = true; return 0, io.EOF }))}, nil
		}))
		_ = c.Exchange(t.Context(), tokenservice.Exchange{RefreshToken: token, Permit: func(context.Context) (func(), error) {
			return func() { assert.True(t, read) }, nil
		}})
		assert.True(t, read)
	})
	t.Run("its error ends the exchange", func(t *testing.T) {
		full := errors.New("the share is used up")
		for allowed, calls := range []int{0, 1} {
			s.ResetCalls()
			left := allowed
			r := c.Exchange(t.Context(), tokenservice.Exchange{RefreshToken: token, Permit: func(context.Context) (func(), error) {
				if left--; left < 0 {
					return nil, full
				}
				return nil, nil
			}})
			assert.True(t, r.Err == full, "the permit's error is returned unchanged")
			assert.Equal(t, allowed == 0, r.Sent.IsZero())
			assert.Equal(t, []string{"", "https://eu.kaiza.la/v1/accessToken"}[allowed], r.Endpoint, "the move is known, although no request was sent there")
			requireRescued(t, "", r)
			assert.Equal(t, calls, s.CallCount())
		}
	})
}

func TestConcurrentUse(t *testing.T) {
	s := kaizalatest.NewServer()
	defer s.Close()
	c, token := connectorOf(t, s.Service, func(c *Config) { c.APIRoot, c.Transport = s.URL, nil })
	var all sync.WaitGroup
	for range 20 {
		all.Go(func() {
			assert.NoError(t, c.Exchange(t.Context(), tokenservice.Exchange{RefreshToken: token}).Err)
		})
	}
	all.Wait()
	assert.Equal(t, 20, s.Exchanges("ada"))
}
