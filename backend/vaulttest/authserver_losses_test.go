package vaulttest

import (
	"bytes"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/url"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// lossy is a proxy between the engine and a token endpoint. If lose returns true for an exchange, it cuts the connection after
// the server has answered.
type lossy struct {
	tokenURL string
	url      string // the address of the endpoint through the proxy

	mu   sync.Mutex
	lose func(refreshToken string, nth int) bool // nth is the number of the exchange, from 1
	sent []string                                // the refresh token of each exchange that the server has answered
	lost []string                                // the refresh token of each exchange whose answer was lost
}

func newLossy(t *testing.T, tokenURL string) *lossy {
	l := &lossy{tokenURL: tokenURL}
	server := httptest.NewServer(l)
	t.Cleanup(server.Close)
	l.url = server.URL
	return l
}

func (l *lossy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	// The server's exchange does not end with the engine's request.
	forwarded, err := http.NewRequest(r.Method, l.tokenURL, bytes.NewReader(body))
	if err != nil {
		return
	}
	forwarded.Header = r.Header.Clone()
	resp, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(forwarded)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	form, _ := url.ParseQuery(string(body))
	if err != nil || l.loses(form.Get("refresh_token")) {
		panic(http.ErrAbortHandler) // cuts the connection
	}
	maps.Copy(w.Header(), resp.Header)
	w.WriteHeader(resp.StatusCode)
	_, _ = w.Write(answer)
}

func (l *lossy) loses(refreshToken string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.sent = append(l.sent, refreshToken)
	if l.lose == nil || !l.lose(refreshToken, len(l.sent)) {
		return false
	}
	l.lost = append(l.lost, refreshToken)
	return true
}

func (l *lossy) set(lose func(refreshToken string, nth int) bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lose = lose
}

// uses returns how often each of these refresh tokens came to the server.
func (l *lossy) uses(of []string) (uses []int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, token := range of {
		n := 0
		for _, sent := range l.sent {
			if sent == token {
				n++
			}
		}
		uses = append(uses, n)
	}
	return uses
}

func (l *lossy) counts() (exchanges, lost int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.sent), len(l.lost)
}

// One of three answers is lost after the server has carried the exchange out, under a load of reads and refreshes. No tenant is
// lost at a server where a replaced refresh token still works for a while, or is not replaced.
func TestLostAnswersWithGrace(t *testing.T) {
	t.Parallel()
	const tenants = 6
	v := Start(t, WithConfig(func(config map[string]any) { config["log_level"] = "info" }))
	v.RegisterEngine(t)
	var loads sync.WaitGroup
	var checks []func(t *testing.T)
	begin := func(name string, l *lossy, m mount, kept func(t *testing.T)) {
		l.set(func(_ string, nth int) bool { return nth%3 == 0 })
		end := time.Now().Add(10 * time.Second)
		for i := range tenants {
			loads.Go(func() {
				for time.Now().Before(end) {
					method, path, body := "GET", fmt.Sprint("/creds/t", i), ""
					if rand.IntN(2) == 0 {
						method, path, body = "PUT", fmt.Sprint("/tenants/t", i, "/refresh"), "{}"
					}
					if a, err := m.send(method, m.path+path, body, nil); err != nil || a.status != 200 && a.status != 503 {
						t.Errorf("%s: %v %d %s", path, err, a.status, a.body)
						return
					}
					time.Sleep(rand.N(600 * time.Millisecond))
				}
			})
		}
		checks = append(checks, func(t *testing.T) {
			l.set(nil)
			m := m.in(t)
			for i := range tenants {
				Eventually(t, "the tenant to recover", func() bool {
					m.read(fmt.Sprint("token/t", i))
					return m.read(fmt.Sprint("tenants/t", i)).ok(t).text("status") == "ok"
				})
				m.read(fmt.Sprint("creds/t", i)).ok(t)
			}
			exchanges, lost := l.counts()
			t.Logf("%s: %d exchanges, the answers of %d lost, 0 of %d tenants", name, exchanges, lost, tenants)
			require.Greater(t, lost, tenants)
			kept(t)
		})
	}

	for name, rotate := range map[string]string{"never": "ROTATE=never", "rarely": "ROTATE=default"} {
		s := StartOIDCProvider(t, rotate, "REVOKE_CASCADE=access-only")
		l := newLossy(t, s.TokenURL)
		m := oauthMount(t, v, s, name, fields{"token_url": l.url, "revocation": "access_token", "exchange_invalidates": false})
		for i := range tenants {
			m.addGrant(s, fmt.Sprint("t", i), nil)
		}
		begin("oidc-provider, rotates "+name, l, m, func(t *testing.T) {
			stats := s.Stats(t)
			require.Zero(t, stats.Reused+stats.Refused+stats.RevokedEnded)
			require.Equal(t, tenants, stats.LiveGrants)
		})
	}
	for name, class := range map[string]func(*oauth2test.Options){"A": oauth2test.ClassA, "D": oauth2test.ClassD} {
		server := oauth2test.New()
		server.Set(func(o *oauth2test.Options) { class(o); o.Grace = time.Minute })
		t.Cleanup(server.Listen())
		id, secret := server.RegisterClient(oauth2test.AuthBasic)
		l := newLossy(t, server.TokenURL())
		v.Mount(t, "grace-"+name)
		m := mount{t: t, vault: v, path: "grace-" + name, token: v.RootToken, heard: &answers{}}
		m.write("config", fields{
			"service": "oauth2", "token_url": l.url, "connector_id": id, "connector_secret": secret,
			"exchange_invalidates": name == "D", "exchanges_per_minute": 6000,
		}).ok(t)
		for i := range tenants {
			m.write(fmt.Sprint("tenants/t", i), fields{"refresh_token": server.Grant(id, fmt.Sprint("t", i))}).ok(t)
		}
		begin("grace of a minute, class "+name, l, m, func(t *testing.T) {
			_, lost := l.counts()
			require.Equal(t, lost, server.UsedTwice(), "a lost answer is the only reason to use a refresh token again")
			require.Equal(t, lost, server.GraceUses())
			require.Empty(t, server.LostGrants())
		})
	}
	loads.Wait()
	for _, check := range checks {
		check(t)
	}
}

// At a server that replaces the refresh token with each exchange and refuses the old one at once, a tenant whose answer is lost
// is lost, whatever a client does. No other tenant is lost, and the old refresh token is used once more and then never again.
func TestLostAnswersWithoutGrace(t *testing.T) {
	t.Parallel()
	const tenants, unlucky = 6, 3
	v := Start(t, WithConfig(func(config map[string]any) { config["log_level"] = "info" }))
	v.RegisterEngine(t)
	for _, c := range []struct {
		name   string
		start  func(testing.TB, ...string) *AuthServer
		config fields
		live   int // the live grants afterwards: zitadel's live on, although their refresh token was lost
	}{
		{"zitadel", StartZitadel, fields{"revocation": "access_token"}, tenants},
		{"oidc-provider", StartOIDCProvider, fields{"exchange_invalidates": false}, tenants - unlucky},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := c.start(t)
			l := newLossy(t, s.TokenURL)
			config := fields{"token_url": l.url}
			maps.Copy(config, c.config)
			m := oauthMount(t, v, s, c.name, config)
			for i := range tenants {
				m.addGrant(s, fmt.Sprint("t", i), nil)
			}
			first := m.read("creds/t0").ok(t).text("access_token")
			l.set(func(refreshToken string, _ int) bool { return l.once(refreshToken) })
			for i := range unlucky {
				m.write(fmt.Sprint("tenants/t", i, "/refresh"), nil).refused(t, 400, "refuses the refresh token")
			}
			l.set(nil)
			end := time.Now().Add(5 * time.Second)
			for time.Now().Before(end) {
				for i := range tenants {
					a := m.read(fmt.Sprint("creds/t", i))
					if i >= unlucky {
						a.ok(t)
						m.write(fmt.Sprint("tenants/t", i, "/refresh"), nil).ok(t)
					}
				}
			}
			a := m.read("token/t0")
			t.Logf("a reader of a lost tenant gets %d, and the tenant's older access token is alive: %t", a.status, s.Alive(t, first))
			for i := range tenants {
				want := "ok"
				if i < unlucky {
					want = "rejected"
				}
				require.Equal(t, want, m.read(fmt.Sprint("tenants/t", i)).ok(t).text("status"))
			}
			exchanges, lost := l.counts()
			stats := s.Stats(t)
			t.Logf("%d exchanges, %d answers lost, %d tenants lost, %+v", exchanges, lost, unlucky, stats)
			require.Equal(t, []int{2, 2, 2}, l.uses(l.lost), "the exchange and one retry")
			require.Equal(t, unlucky, stats.Reused)
			require.Equal(t, unlucky, stats.Refused)
			require.Equal(t, c.live, stats.LiveGrants)

			m.addGrant(s, "t0", nil) // as the status tells the person to do
			require.Equal(t, "ok", m.read("tenants/t0").ok(t).text("status"))
		})
	}
}

// once returns whether no answer to this refresh token was lost before. The caller holds mu.
func (l *lossy) once(refreshToken string) bool {
	for _, lost := range l.lost {
		if lost == refreshToken {
			return false
		}
	}
	return true
}
