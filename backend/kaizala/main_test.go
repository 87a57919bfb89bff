package kaizala

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/kaizala/kaizalatest"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/tokenservice"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// Canaries are texts that no error may have. bodyCanary is in the bodies and headers of the tests' services.
const (
	connectorID   = "37ba1e41-d55c-43bf-a2fa-d72c97aa080a"
	secretCanary  = "SECRET9876"
	refreshCanary = "refresh-canary-token"
	accessCanary  = "access-canary-token"
	newCanary     = "new-refresh-canary-token"
	bodyCanary    = "body-canary-text"
)

// requireNoCanary requires that an error, and every error that it wraps, has no canary.
func requireNoCanary(t *testing.T, err error) {
	t.Helper()
	text := strings.ToLower(err.Error())
	for _, canary := range []string{secretCanary, refreshCanary, accessCanary, newCanary, bodyCanary} {
		require.NotContains(t, text, strings.ToLower(canary))
	}
}

// transportFunc is a service in a function.
type transportFunc func(*http.Request) (*http.Response, error)

func (f transportFunc) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// handled is a transport that calls a handler in process.
func handled(h http.HandlerFunc) http.RoundTripper {
	return transportFunc(func(r *http.Request) (*http.Response, error) {
		w := httptest.NewRecorder()
		h(w, r)
		return w.Result(), nil
	})
}

// answering is a transport that gives the same answer to each request.
func answering(status int, header http.Header, body string) http.RoundTripper {
	return handled(func(w http.ResponseWriter, _ *http.Request) {
		for k, v := range header {
			w.Header()[k] = v
		}
		w.WriteHeader(status)
		_, _ = w.Write([]byte(body))
	})
}

// client returns a client of the canaries' connector. edit may be nil.
func client(t *testing.T, edit func(*Config)) *Client {
	t.Helper()
	config := Config{
		ConnectorID:     connectorID,
		ConnectorSecret: secretCanary,
		APIRoot:         DefaultAPIRoot,
		RedirectHosts:   DefaultRedirectHosts,
		RequestTimeout:  10 * time.Second,
	}
	if edit != nil {
		edit(&config)
	}
	c, err := New(config)
	require.NoError(t, err)
	t.Cleanup(c.Close)
	return c
}

// through returns a client with this transport as its service.
func through(t *testing.T, rt http.RoundTripper) *Client {
	t.Helper()
	return client(t, func(c *Config) { c.Transport = rt })
}

// exchange makes the canaries' exchange.
func (c *Client) exchange(t *testing.T) tokenservice.Result {
	t.Helper()
	return c.Exchange(t.Context(), tokenservice.Exchange{RefreshToken: refreshCanary})
}

// exchangeAt makes the same exchange with a remembered endpoint.
func (c *Client) exchangeAt(t *testing.T, endpoint string) tokenservice.Result {
	t.Helper()
	return c.Exchange(t.Context(), tokenservice.Exchange{RefreshToken: refreshCanary, Endpoint: endpoint})
}

// requireGranted requires a result with an access token and no error.
func requireGranted(t *testing.T, r tokenservice.Result) *tokenservice.AccessToken {
	t.Helper()
	require.NoError(t, r.Err)
	require.NotNil(t, r.AccessToken)
	return r.AccessToken
}

// requireKind requires a *Failure of that kind without any canary, and returns it.
func requireKind(t *testing.T, want tokenservice.Kind, err error) *tokenservice.Failure {
	t.Helper()
	var f *tokenservice.Failure
	require.ErrorAs(t, err, &f)
	require.Equal(t, want, f.Kind, "%s", f.Text)
	require.NotEmpty(t, f.Text)
	requireNoCanary(t, err)
	return f
}

// requireRescued requires a result without an access token, and with that new refresh token and its facts; "" requires none.
func requireRescued(t *testing.T, want string, r tokenservice.Result) {
	t.Helper()
	require.Error(t, r.Err)
	require.Nil(t, r.AccessToken)
	require.Equal(t, want, r.RefreshToken)
	if want == "" {
		require.Nil(t, r.Facts)
	} else {
		require.Equal(t, Inspect(want).facts(), *r.Facts)
	}
}

// connectorOf registers a connector with an emulator and returns a client of it, and a user's refresh token.
func connectorOf(t *testing.T, s *kaizalatest.Service, edit func(*Config)) (*Client, string) {
	t.Helper()
	id, secret := s.RegisterConnector()
	c := client(t, func(config *Config) {
		config.ConnectorID, config.ConnectorSecret = id, secret
		config.Transport = s.Transport()
		if edit != nil {
			edit(config)
		}
	})
	return c, s.GenerateUserToken(id, "ada")
}

// recorder is a host that must get no request: it records every request.
type recorder struct {
	*httptest.Server
	mu   sync.Mutex
	seen []string
}

func newRecorder(t *testing.T) *recorder {
	r := &recorder{}
	r.Server = httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, q *http.Request) {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.seen = append(r.seen, q.Method+" "+q.URL.String())
	}))
	t.Cleanup(r.Close)
	return r
}

func (r *recorder) requireUntouched(t *testing.T) {
	t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	assert.Empty(t, r.seen)
}
