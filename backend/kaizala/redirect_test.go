package kaizala

import (
	"context"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/kaizala/kaizalatest"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/tokenservice"
)

// redirecting is a service that redirects each URL of the map to the Location in the map, and grants all other requests. It also returns
// the requested URLs.
func redirecting(status int, to map[string]string, grant string) (http.RoundTripper, *[]string) {
	var asked []string
	return handled(func(w http.ResponseWriter, r *http.Request) {
		asked = append(asked, r.URL.String())
		if location, ok := to[r.URL.String()]; ok {
			w.Header().Set("Location", location)
			w.WriteHeader(status)
			return
		}
		_, _ = w.Write([]byte(grant))
	}), &asked
}

const start = DefaultAPIRoot + "/v1/accessToken"

func TestRedirectsThatAreFollowed(t *testing.T) {
	longest := strings.Repeat("a", tokenservice.MaxURLBytes-len(DefaultAPIRoot+"/"))
	for location, next := range map[string]string{
		"https://kaiza.la/v1/accessToken":                            "https://kaiza.la/v1/accessToken",
		"https://eu.kaiza.la/v1/accessToken":                         "https://eu.kaiza.la/v1/accessToken",
		"https://a.b.KAIZA.la/v1/accessToken":                        "https://a.b.KAIZA.la/v1/accessToken",
		"https://eu.kaiza.la./v1/accessToken":                        "https://eu.kaiza.la./v1/accessToken",
		"https://inc-000.KaizalaMessaging.osi.office.net/other/path": "https://inc-000.KaizalaMessaging.osi.office.net/other/path",
		"https://eu.kaiza.la:8443/v1/accessToken?x=1#fragment":       "https://eu.kaiza.la:8443/v1/accessToken?x=1",
		"https://api.kaiza.la:8443/v1/accessToken":                   "https://api.kaiza.la:8443/v1/accessToken",
		"HTTPS://eu.kaiza.la":                                        "https://eu.kaiza.la/v1/accessToken",
		"https://eu.kaiza.la/":                                       "https://eu.kaiza.la/v1/accessToken",
		"//eu.kaiza.la/v1/accessToken":                               "https://eu.kaiza.la/v1/accessToken",
		"/eu/v1/accessToken":                                         DefaultAPIRoot + "/eu/v1/accessToken",
		"/" + longest:                                                DefaultAPIRoot + "/" + longest,
		"other":                                                      DefaultAPIRoot + "/v1/other",
	} {
		for _, status := range []int{307, 308} {
			t.Run(location, func(t *testing.T) {
				rt, asked := redirecting(status, map[string]string{start: location}, body(t, nil))
				r := through(t, rt).exchange(t)
				assert.Equal(t, accessCanary, requireGranted(t, r).Token)
				assert.Equal(t, []string{start, next}, *asked)
				if status == 308 {
					assert.Equal(t, next, r.Endpoint)
				} else {
					assert.Empty(t, r.Endpoint, "a 307 is not remembered")
				}
			})
		}
	}
}

// Where the api root itself is http on a loopback address, so may be where a redirect leads.
func TestRedirectFromHTTPToHTTP(t *testing.T) {
	rt, asked := redirecting(308, map[string]string{"http://127.0.0.1:1/v1/accessToken": "http://127.0.0.1:2"}, body(t, nil))
	r := client(t, func(c *Config) { c.APIRoot, c.Transport = "http://127.0.0.1:1", rt }).exchange(t)
	requireGranted(t, r)
	assert.Equal(t, []string{"http://127.0.0.1:1/v1/accessToken", "http://127.0.0.1:2/v1/accessToken"}, *asked)
}

func TestRedirectsThatAreNotFollowed(t *testing.T) {
	for location, says := range map[string]string{
		"https://kaiza.la.example/v1/accessToken":                               "add it to redirect_hosts",
		"https://notkaiza.la/v1/accessToken":                                    "add it to redirect_hosts",
		"https://example/kaiza.la":                                              "add it to redirect_hosts",
		"https://la/v1/accessToken":                                             "add it to redirect_hosts",
		"//example.net/v1/accessToken":                                          "add it to redirect_hosts",
		"https://10.0.0.1/v1/accessToken":                                       "add it to redirect_hosts",
		"https://[::1]/v1/accessToken":                                          "add it to redirect_hosts",
		"http://127.0.0.1/v1/accessToken":                                       "from https to http",
		"http://localhost/v1/accessToken":                                       "from https to http",
		"http://eu.kaiza.la/v1/accessToken":                                     "https URL",
		"http://api.kaiza.la/v1/accessToken":                                    "https URL",
		"ftp://eu.kaiza.la/v1/accessToken":                                      "https URL",
		"https://user@eu.kaiza.la/v1/accessToken":                               "user name",
		"https://kaiza.la@example.net":                                          "user name",
		"https://kaiza。la/v1/accessToken":                                       "plain ASCII",
		"https://eu.kaiza.la:0/v1/accessToken":                                  "port",
		"https://eu..kaiza.la/v1/accessToken":                                   "plain ASCII",
		"https://" + secretCanary + ".example.net":                              "that host",
		"https://example.net/" + bodyCanary:                                     "example.net",
		"https:///v1/accessToken":                                               "plain ASCII",
		"javascript:" + bodyCanary:                                              "plain ASCII",
		"https://%zz" + bodyCanary:                                              "without a usable Location",
		"":                                                                      "without a usable Location",
		"https://eu.kaiza.la/" + strings.Repeat("a", tokenservice.MaxURLBytes):  "without a usable Location",
		"/" + strings.Repeat("a", tokenservice.MaxURLBytes-len(DefaultAPIRoot)): "without a usable Location",
		"/" + strings.Repeat("é", tokenservice.MaxURLBytes/4):                   "without a usable Location",
	} {
		for _, status := range []int{307, 308} {
			t.Run(location, func(t *testing.T) {
				rt, asked := redirecting(status, map[string]string{start: location}, body(t, nil))
				r := through(t, rt).exchange(t)
				e := requireKind(t, tokenservice.Unavailable, r.Err)
				assert.Contains(t, e.Text, says)
				assert.Equal(t, status, e.Status)
				assert.Empty(t, r.Endpoint)
				requireRescued(t, "", r)
				assert.Equal(t, []string{start}, *asked)
			})
		}
	}
	for _, status := range []int{300, 301, 302, 303, 304, 305} {
		rt, asked := redirecting(status, map[string]string{start: "https://eu.kaiza.la/v1/accessToken"}, body(t, nil))
		requireKind(t, tokenservice.Unavailable, through(t, rt).exchange(t).Err)
		assert.Equal(t, []string{start}, *asked, "%d", status)
	}
}

// A permitted host may have a secret in its name: the error does not name it.
func TestHostThatIsNotNamed(t *testing.T) {
	for _, secret := range []string{secretCanary, refreshCanary} {
		r := through(t, transportFunc(func(r *http.Request) (*http.Response, error) {
			if r.URL.Host != "api.kaiza.la" {
				return nil, http.ErrServerClosed
			}
			header := http.Header{"Location": {"https://" + secret + ".kaiza.la"}}
			return &http.Response{StatusCode: 307, Header: header, Body: http.NoBody}, nil
		})).exchange(t)
		assert.Contains(t, requireKind(t, tokenservice.Unavailable, r.Err).Text, "Kaizala's token service at that host closed")
	}
}

// Nothing is sent to a host that is not permitted, shown with a server on a socket that records each request.
func TestNothingIsSentToAStrangeHost(t *testing.T) {
	stranger := newRecorder(t)
	u, err := url.Parse(stranger.URL)
	require.NoError(t, err)
	// "localhost" is another host name than 127.0.0.1, and leads to the same server.
	elsewhere := "http://localhost:" + u.Port() + exchangePath
	for _, status := range []int{301, 302, 303, 307, 308} {
		c := served(t, func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, elsewhere, status) })
		requireKind(t, tokenservice.Unavailable, c.exchange(t).Err)
		requireKind(t, tokenservice.Unavailable, c.exchangeAt(t, elsewhere).Err)
	}
	stranger.requireUntouched(t)
	// The server can be reached there: otherwise this test could not fail.
	_, err = http.Get(elsewhere)
	require.NoError(t, err)
	assert.NotEmpty(t, stranger.seen)
	http.DefaultClient.CloseIdleConnections()
}

func TestFromHTTPSToHTTP(t *testing.T) {
	plain := newRecorder(t)
	secure := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, plain.URL+exchangePath, http.StatusPermanentRedirect)
	}))
	defer secure.Close()
	c := client(t, func(c *Config) { c.APIRoot, c.Transport = secure.URL, secure.Client().Transport })
	assert.Contains(t, requireKind(t, tokenservice.Unavailable, c.exchange(t).Err).Text, "from https to http")
	requireKind(t, tokenservice.Unavailable, c.exchangeAt(t, plain.URL+exchangePath).Err)
	plain.requireUntouched(t)
}

func TestRedirectHosts(t *testing.T) {
	rt, asked := redirecting(308, map[string]string{"https://10.0.0.1/v1/accessToken": "https://10.0.0.1:8443/"}, body(t, nil))
	requireGranted(t, client(t, func(c *Config) { c.APIRoot, c.RedirectHosts, c.Transport = "https://10.0.0.1", nil, rt }).exchange(t))
	assert.Len(t, *asked, 2)

	rt, asked = redirecting(308, map[string]string{start: "https://eu.kaiza.la/"}, body(t, nil))
	requireKind(t, tokenservice.Unavailable, client(t, func(c *Config) { c.RedirectHosts, c.Transport = nil, rt }).exchange(t).Err)
	assert.Len(t, *asked, 1)

	rt, asked = redirecting(308, map[string]string{start: "https://eu.kaiza.la/"}, body(t, nil))
	requireGranted(t, client(t, func(c *Config) { c.RedirectHosts, c.Transport = []string{"Kaiza.LA."}, rt }).exchange(t))
	assert.Len(t, *asked, 2, "a host in another spelling")
}

func TestHops(t *testing.T) {
	chain := map[string]string{start: "/1"}
	for i := range 4 {
		chain[DefaultAPIRoot+"/"+string(rune('1'+i))] = "/" + string(rune('2'+i))
	}
	rt, asked := redirecting(308, chain, body(t, nil))
	r := through(t, rt).exchange(t)
	requireGranted(t, r)
	assert.Equal(t, DefaultAPIRoot+"/5", r.Endpoint)
	assert.Len(t, *asked, 6, "five hops are followed")

	chain[DefaultAPIRoot+"/5"] = "/6"
	rt, asked = redirecting(308, chain, body(t, nil))
	r = through(t, rt).exchange(t)
	assert.Equal(t, 308, requireKind(t, tokenservice.Unavailable, r.Err).Status)
	assert.Len(t, *asked, 6, "the sixth hop is not followed")
	assert.Equal(t, "", r.Endpoint, "no endpoint is remembered")
}

func TestOnlyPermanentMovesAreRemembered(t *testing.T) {
	rt := handled(func(w http.ResponseWriter, r *http.Request) {
		next, ok := map[string]string{"/v1/accessToken": "308/a", "/a": "307/b", "/b": "308/c"}[r.URL.Path]
		if !ok {
			_, _ = w.Write([]byte(body(t, nil)))
			return
		}
		w.Header().Set("Location", next[3:])
		w.WriteHeader(map[string]int{"307": 307, "308": 308}[next[:3]])
	})
	r := through(t, rt).exchange(t)
	requireGranted(t, r)
	assert.Equal(t, DefaultAPIRoot+"/a", r.Endpoint, "a 308 after a 307 is not remembered")
}

func TestRememberedURL(t *testing.T) {
	for given, asked := range map[string]string{
		"":                                     start,
		"https://eu.kaiza.la/v1/accessToken":   "https://eu.kaiza.la/v1/accessToken",
		"https://eu.kaiza.la":                  "https://eu.kaiza.la/v1/accessToken",
		"https://example.net/v1/accessToken":   start,
		"http://eu.kaiza.la/v1/accessToken":    start,
		"http://127.0.0.1/v1/accessToken":      start,
		"https://u@eu.kaiza.la/v1/accessToken": start,
		"/v1/accessToken":                      start,
		"junk\n":                               start,
	} {
		rt, seen := redirecting(0, nil, body(t, nil))
		r := through(t, rt).exchangeAt(t, given)
		requireGranted(t, r)
		assert.Equal(t, []string{asked}, *seen, "%q", given)
		if asked == start {
			assert.Empty(t, r.Endpoint, "a remembered endpoint that is not permitted any more is forgotten")
		} else {
			assert.Equal(t, given, r.Endpoint, "the remembered endpoint stays unchanged")
		}
	}
}

func TestRememberedURLThatDoesNotWork(t *testing.T) {
	refused := `{"errorCode":"InvalidToken"}`
	for _, c := range []struct {
		name      string
		rt        http.RoundTripper
		forgotten bool
	}{
		{"a grant", answering(200, nil, body(t, nil)), false},
		{"a refusal", answering(401, nil, refused), false},
		{"a limit", answering(429, nil, ""), false},
		{"a network error", transportFunc(func(*http.Request) (*http.Response, error) { return nil, http.ErrServerClosed }), true},
		{"404", answering(404, nil, ""), true},
		{"404 with an errorCode", answering(404, nil, refused), true},
		{"405", answering(405, nil, ""), true},
		{"410", answering(410, nil, ""), true},
		{"405 with an errorCode", answering(405, nil, refused), true},
		{"410 with an errorCode", answering(410, nil, refused), true},
		{"403 with an errorCode", answering(403, nil, refused), false},
		{"500", answering(500, nil, ""), true},
		{"503", answering(503, nil, ""), true},
		{"somebody's home page", answering(200, nil, "<html>"), true},
		{"a redirect to a stranger", answering(308, http.Header{"Location": {"https://example.net"}}, ""), true},
	} {
		t.Run(c.name, func(t *testing.T) {
			calls := 0
			for _, remembered := range []string{"https://eu.kaiza.la/v1/accessToken", ""} {
				r := through(t, c.rt).Exchange(t.Context(), tokenservice.Exchange{
					RefreshToken: refreshCanary,
					Endpoint:     remembered,
					Permit:       func(context.Context) (func(), error) { calls++; return nil, nil },
				})
				if c.forgotten {
					remembered = ""
				}
				assert.Equal(t, remembered, r.Endpoint)
			}
			assert.Equal(t, 2, calls, "the client does not try again by itself")
		})
	}

	t.Run("a move to a host that is down", func(t *testing.T) {
		r := through(t, handled(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Location", "https://eu.kaiza.la")
			w.WriteHeader(map[string]int{"api.kaiza.la": 308, "eu.kaiza.la": 503}[r.URL.Host])
		})).exchange(t)
		requireKind(t, tokenservice.Unavailable, r.Err)
		assert.Empty(t, r.Endpoint)
	})
}

func TestMovesOnAnEmulator(t *testing.T) {
	s := kaizalatest.New()
	c, token := connectorOf(t, s, nil)
	remembered := ""
	exchange := func() {
		t.Helper()
		s.ResetCalls()
		r := c.Exchange(t.Context(), tokenservice.Exchange{RefreshToken: token, Endpoint: remembered})
		requireGranted(t, r)
		remembered = r.Endpoint
	}
	s.MoveUser("ada", "https://eu.kaiza.la")
	exchange()
	assert.Equal(t, 2, s.CallCount())
	exchange()
	assert.Equal(t, 1, s.CallCount(), "the move is remembered")

	s.MoveUserTemporarily("ada", "https://us.kaiza.la")
	exchange()
	exchange()
	assert.Equal(t, 2, s.CallCount(), "this move is not remembered")
	assert.Equal(t, "https://eu.kaiza.la/v1/accessToken", remembered)
}
