package oauth2

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/tokenservice"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// Canaries are texts that no error may have. bodyCanary is in the bodies and headers of the tests' servers.
const (
	clientID      = "client-id"
	secretCanary  = "SECRET9876"
	refreshCanary = "refresh-canary-token"
	accessCanary  = "access-canary-token"
	newCanary     = "new-refresh-canary-token"
	codeCanary    = "code-canary"
	bodyCanary    = "body-canary-text"
)

func requireNoCanary(t *testing.T, text string) {
	t.Helper()
	for _, canary := range []string{secretCanary, refreshCanary, accessCanary, newCanary, codeCanary, bodyCanary} {
		require.NotContains(t, strings.ToLower(text), strings.ToLower(canary))
	}
}

// config is a valid configuration without optional fields.
func config() Config {
	return Config{
		ClientID:        clientID,
		ClientSecret:    secretCanary,
		TokenURL:        "https://as.example.com/token",
		AccessTokenLife: time.Hour,
		KeepAlive:       72 * time.Hour,
		RequestTimeout:  15 * time.Second,
	}
}

// client returns a client of a valid configuration that edit has changed. edit may be nil.
func client(t testing.TB, edit func(*Config)) *Client {
	t.Helper()
	c := config()
	if edit != nil {
		edit(&c)
	}
	made, err := New(c)
	require.NoError(t, err)
	t.Cleanup(made.Close)
	return made
}

// server is an authorization server in process that gives the same answer to all requests, and records them.
type server struct {
	status int
	header http.Header
	body   string
	// cut breaks the connection after the body.
	cut bool
	// err is returned in place of an answer.
	err error
	// delay passes before the answer.
	delay time.Duration

	requests []*http.Request
	forms    []url.Values
}

func (s *server) RoundTrip(r *http.Request) (*http.Response, error) {
	form := url.Values(nil)
	if r.Body != nil {
		raw, err := io.ReadAll(r.Body)
		if err != nil {
			return nil, err
		}
		if r.ContentLength != int64(len(raw)) || r.GetBody != nil {
			return nil, fmt.Errorf("the request can be sent twice, or has a wrong length")
		}
		if form, err = url.ParseQuery(string(raw)); err != nil {
			return nil, err
		}
	}
	s.requests, s.forms = append(s.requests, r), append(s.forms, form)
	select {
	case <-time.After(s.delay):
	case <-r.Context().Done():
		return nil, r.Context().Err()
	}
	if s.err != nil {
		return nil, s.err
	}
	w := httptest.NewRecorder()
	for name, values := range s.header {
		w.Header()[name] = values
	}
	w.WriteHeader(s.status)
	_, _ = w.WriteString(s.body)
	resp := w.Result()
	if s.cut {
		resp.Body = io.NopCloser(io.MultiReader(strings.NewReader(s.body), brokenOff{}))
	}
	return resp, nil
}

type brokenOff struct{}

func (brokenOff) Read([]byte) (int, error) { return 0, io.ErrUnexpectedEOF }

// with makes the server the client's transport.
func (s *server) with(edit func(*Config)) func(*Config) {
	return func(c *Config) {
		c.Transport = s
		if edit != nil {
			edit(c)
		}
	}
}

func (s *server) exchange(t testing.TB, edit func(*Config)) tokenservice.Result {
	t.Helper()
	return client(t, s.with(edit)).Exchange(t.Context(), tokenservice.Exchange{RefreshToken: refreshCanary})
}

// requireFailure requires a failure of that kind without any canary, and returns it.
func requireFailure(t *testing.T, want tokenservice.Kind, err error) *tokenservice.Failure {
	t.Helper()
	var e *tokenservice.Failure
	require.ErrorAs(t, err, &e)
	require.Equal(t, want, e.Kind, "%s", e.Text)
	requireNoCanary(t, e.Text)
	requireNoCanary(t, e.Code)
	require.True(t, strings.HasSuffix(e.Text, "."), "%s", e.Text)
	require.Equal(t, strings.ToUpper(e.Text[:1]), e.Text[:1], "%s", e.Text)
	return e
}

func requireField(t *testing.T, want string, err error) *tokenservice.FieldError {
	t.Helper()
	var e *tokenservice.FieldError
	require.ErrorAs(t, err, &e)
	require.Equal(t, want, e.Field, "%s", e.Text)
	requireNoCanary(t, e.Text)
	return e
}

// body is a valid JSON answer with changes: nil deletes a field, and json.RawMessage is written as it is.
func body(changes map[string]any) string {
	fields := map[string]any{"access_token": accessCanary, "token_type": "Bearer", "expires_in": 3600}
	for name, value := range changes {
		fields[name] = value
		if value == nil {
			delete(fields, name)
		}
	}
	raw, err := json.Marshal(fields)
	if err != nil {
		panic(err)
	}
	return string(raw)
}

// jwt is an unsigned token with these claims.
func jwt(claims string) string {
	encode := base64.RawURLEncoding.EncodeToString
	return encode([]byte(`{"alg":"none"}`)) + "." + encode([]byte(claims)) + ".c2ln"
}

// permits counts the requests that were permitted, and those that have ended.
type permits struct{ asked, over int }

func (p *permits) permit(context.Context) (func(), error) {
	p.asked++
	return func() { p.over++ }, nil
}
