package kaizalatest

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const day = 24 * time.Hour

// caller makes calls through a transport, with a connector.
type caller struct {
	t          *testing.T
	rt         http.RoundTripper
	root       string
	id, secret string
}

func inProcess(t *testing.T, s *Service) *caller {
	id, secret := s.RegisterConnector()
	return &caller{t: t, rt: s.Transport(), root: "https://api.kaiza.la", id: id, secret: secret}
}

// got is an answer. err is the error of the transport, or of reading the body.
type got struct {
	status int
	header http.Header
	fields map[string]any
	raw    string
	err    error
}

func (g got) text(name string) string { s, _ := g.fields[name].(string); return s }

func (c *caller) call(ctx context.Context, path string, header map[string]string) got {
	c.t.Helper()
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, c.root+path, nil)
	require.NoError(c.t, err)
	for k, v := range header {
		r.Header.Set(k, v)
	}
	resp, err := c.rt.RoundTrip(r)
	if err != nil {
		return got{err: err}
	}
	raw, err := io.ReadAll(resp.Body)
	_ = resp.Body.Close()
	g := got{status: resp.StatusCode, header: resp.Header, raw: string(raw), err: err}
	_ = json.Unmarshal(raw, &g.fields)
	return g
}

func (c *caller) exchange(token string) got {
	c.t.Helper()
	return c.call(c.t.Context(), exchangePath, map[string]string{"applicationId": c.id, "applicationSecret": c.secret, "refreshToken": token})
}

func (c *caller) granted(token string) got {
	c.t.Helper()
	g := c.exchange(token)
	require.NoError(c.t, g.err)
	require.Equal(c.t, http.StatusOK, g.status, g.raw)
	return g
}

func (c *caller) refused(token, code string) {
	c.t.Helper()
	g := c.exchange(token)
	require.NoError(c.t, g.err)
	require.Equal(c.t, http.StatusUnauthorized, g.status)
	require.Equal(c.t, code, g.text("errorCode"))
}

func TestPortal(t *testing.T) {
	s := New()
	c := inProcess(t, s)
	assert.Regexp(t, regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`), c.id)
	assert.Regexp(t, regexp.MustCompile(`^[A-Z0-9]{10}$`), c.secret)

	ada, bob := s.GenerateUserToken(c.id, "ada"), s.GenerateUserToken(c.id, "bob")
	group := s.GenerateGroupToken(c.id, "ada", "g-1")
	c.granted(ada)
	c.granted(bob)
	c.granted(group)
	assert.Equal(t, group, s.CurrentRefreshToken("ada"))

	t.Run("a second token kills the first, and no other", func(t *testing.T) {
		ada2 := s.GenerateUserToken(c.id, "ada")
		assert.False(t, s.RefreshTokenAlive(ada))
		c.refused(ada, "InvalidToken")
		c.granted(ada2)
		c.granted(bob)
		c.granted(group)
	})
	t.Run("another connector's token is refused", func(t *testing.T) {
		inProcess(t, s).refused(bob, "InvalidToken")
	})
	t.Run("a secret can be replaced", func(t *testing.T) {
		old := *c
		c.secret = s.NewConnectorSecret(c.id)
		assert.Contains(t, old.exchange(bob).text("message"), "Dont have correct applicationId and secret in header!")
		c.granted(bob)
		s.SetConnectorSecret(c.id, "OTHER")
		old.secret = "OTHER"
		old.granted(bob)
		s.SetConnectorSecret(c.id, c.secret)
	})
	t.Run("a deactivated connector gets no new tokens", func(t *testing.T) {
		s.DeactivateConnector(c.id)
		assert.Empty(t, s.GenerateUserToken(c.id, "eve"))
		c.granted(bob)
	})
	t.Run("a deleted connector's refresh tokens die, its access tokens do not", func(t *testing.T) {
		access := c.granted(bob).text("accessToken")
		s.DeleteConnector(c.id)
		assert.False(t, s.RefreshTokenAlive(bob))
		assert.Contains(t, c.exchange(bob).text("message"), "applicationId and secret")
		assert.True(t, s.AccessTokenAlive(access))
		assert.Empty(t, s.GenerateUserToken(c.id, "ada"))
		assert.Empty(t, s.NewConnectorSecret(c.id))
	})
	assert.Empty(t, s.GenerateUserToken("nobody's", "ada"))
	assert.Empty(t, s.CurrentRefreshToken("nobody"))
}

func TestAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New()
		c := inProcess(t, s)
		token := s.GenerateUserToken(c.id, "ada")
		first, second := c.granted(token), c.granted(token)

		assert.Equal(t, DefaultEndpointURL, first.text("endpointUrl"))
		assert.Equal(t, "token.write", first.text("scope"))
		assert.EqualValues(t, time.Now().Add(day).UnixMilli(), first.fields["accessTokenExpiry"])
		assert.NotEqual(t, first.text("accessToken"), second.text("accessToken"), "two tokens of the same second")
		assert.Equal(t, "", first.fields["refreshToken"])
		assert.Contains(t, second.fields, "refreshToken")
		assert.Nil(t, second.fields["refreshToken"])

		s.SetEndpointURL("https://other.osi.office.net/")
		assert.Equal(t, "https://other.osi.office.net/", c.granted(token).text("endpointUrl"))
	})
}

// claims reads a token's claims, and the objects that are strings in them.
func claims(t *testing.T, token string) (all, credentials, data map[string]any) {
	t.Helper()
	parts := strings.Split(token, ".")
	require.Len(t, parts, 3)
	raw, err := base64.RawURLEncoding.DecodeString(parts[1])
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(raw, &all))
	require.NoError(t, json.Unmarshal([]byte(all["urn:microsoft:credentials"].(string)), &credentials))
	require.NoError(t, json.Unmarshal([]byte(credentials["data"].(string)), &data))
	return all, credentials, data
}

func TestClaims(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New()
		c := inProcess(t, s)
		user := s.GenerateUserToken(c.id, "ada")
		for _, token := range []string{user, c.granted(user).text("accessToken")} {
			all, credentials, data := claims(t, token)
			assert.EqualValues(t, time.Now().Unix(), all["iat"])
			assert.EqualValues(t, time.Now().Unix(), all["nbf"])
			assert.Equal(t, "urn:microsoft:windows-azure:zumo", all["iss"])
			assert.Equal(t, "urn:microsoft:windows-azure:zumo", all["aud"])
			assert.Regexp(t, "^MobileAppsService:", all["uid"])
			assert.Equal(t, "2", all["ver"])
			assert.Equal(t, c.id, credentials["applicationId"])
			assert.Regexp(t, `^\+91\d{10}$`, credentials["phoneNumber"])
			assert.Equal(t, "8.4", credentials["permissions"])
			assert.EqualValues(t, -1, credentials["applicationType"])
			assert.NotContains(t, credentials, "tokenValidFrom")
			assert.Contains(t, data, "AppName")
			assert.NotContains(t, data, "GroupId")
		}
		all, _, _ := claims(t, user)
		assert.EqualValues(t, time.Now().Add(365*day).Unix(), all["exp"])
		_, credentials, data := claims(t, s.GenerateGroupToken(c.id, "ada", "g-1"))
		assert.Equal(t, "g-1", data["GroupId"])
		assert.EqualValues(t, time.Now().UnixMilli(), credentials["tokenValidFrom"])
	})
}

func TestErrors(t *testing.T) {
	s := New()
	c := inProcess(t, s)
	token := s.GenerateUserToken(c.id, "ada")
	c.refused("unknown", "InvalidToken")
	assert.Equal(t, "AuthException", c.exchange("unknown").text("errorCategoryKey"))

	whole := map[string]string{"applicationId": c.id, "applicationSecret": c.secret, "refreshToken": token}
	for missing := range whole {
		header := map[string]string{}
		for k, v := range whole {
			if k != missing {
				header[k] = v
			}
		}
		g := c.call(t.Context(), exchangePath, header)
		assert.Equal(t, http.StatusBadRequest, g.status)
		assert.Equal(t, "InvalidParameters", g.text("errorCode"), missing)
	}
	assert.Equal(t, http.StatusNotFound, c.call(t.Context(), "/v2/accessToken", whole).status)
	assert.Equal(t, http.StatusOK, c.call(t.Context(), "/some/prefix"+exchangePath, whole).status)
}

func TestRotation(t *testing.T) {
	for _, oldDies := range []bool{true, false} {
		t.Run(fmt.Sprintf("old token dies: %v", oldDies), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := New()
				s.SetOldTokenDies(oldDies)
				c := inProcess(t, s)
				first := s.GenerateUserToken(c.id, "ada")
				born := time.Now()

				time.Sleep(328*day + 12*time.Hour - time.Nanosecond)
				assert.Empty(t, c.granted(first).text("refreshToken"), "a moment before the rotation window")
				time.Sleep(time.Nanosecond)
				second := c.granted(first).text("refreshToken")
				require.NotEmpty(t, second)
				assert.Equal(t, second, s.CurrentRefreshToken("ada"))
				assert.Equal(t, !oldDies, s.RefreshTokenAlive(first))
				if oldDies {
					c.refused(first, "InvalidToken")
				} else {
					third := c.granted(first).text("refreshToken")
					assert.NotEqual(t, second, third, "every exchange returns a new one")
				}
				assert.Empty(t, c.granted(second).text("refreshToken"), "the new refresh token is not in the rotation window")

				time.Sleep(365*day - time.Since(born))
				c.refused(first, "InvalidToken")
				c.granted(second)
				assert.NotEmpty(t, s.GenerateUserToken(c.id, "ada"))
				c.refused(second, "InvalidToken")

				calls := s.Calls()
				assert.False(t, calls[0].Rotated)
				assert.True(t, calls[1].Rotated)
			})
		})
	}
}

func TestAge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New()
		c := inProcess(t, s)
		s.SetRefreshTokenAge(329 * day)
		old := s.GenerateUserToken(c.id, "ada")
		group := s.GenerateGroupToken(c.id, "ada", "g-1")
		s.SetRefreshTokenAge(0)
		other := s.GenerateUserToken(c.id, "bob")

		all, _, _ := claims(t, old)
		assert.EqualValues(t, time.Now().Add(-329*day).Unix(), all["iat"])
		assert.EqualValues(t, time.Now().Add(36*day).Unix(), all["exp"])
		assert.Empty(t, c.granted(other).text("refreshToken"))
		assert.NotEmpty(t, c.granted(group).text("refreshToken"))

		next := c.granted(old).text("refreshToken")
		require.NotEmpty(t, next)
		all, _, _ = claims(t, next)
		assert.EqualValues(t, time.Now().Unix(), all["iat"])
		assert.EqualValues(t, time.Now().Add(365*day).Unix(), all["exp"])
		assert.Empty(t, c.granted(next).text("refreshToken"), "the new refresh token is not in the rotation window")

		s.SetRefreshTokenAge(364*day + 1500*time.Millisecond)
		old = s.GenerateUserToken(c.id, "ada")
		time.Sleep(day - time.Second - time.Nanosecond)
		assert.True(t, s.RefreshTokenAlive(old))
		time.Sleep(time.Nanosecond)
		c.refused(old, "InvalidToken")
	})
}

func TestLives(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New()
		s.SetRefreshTokenLife(100 * time.Second)
		s.SetAccessTokenLife(30 * time.Second)
		c := inProcess(t, s)
		token := s.GenerateUserToken(c.id, "ada")
		access := c.granted(token).text("accessToken")
		me := func() got { return c.call(t.Context(), "/v1/users/me", map[string]string{"accessToken": access}) }

		time.Sleep(30*time.Second - time.Nanosecond)
		assert.True(t, s.AccessTokenAlive(access))
		assert.Equal(t, http.StatusOK, me().status)
		assert.Equal(t, "ada", me().text("name"))
		time.Sleep(time.Nanosecond)
		assert.False(t, s.AccessTokenAlive(access))
		assert.Equal(t, http.StatusUnauthorized, me().status)
		assert.Equal(t, "Unauthenticated", me().text("errorCode"))

		time.Sleep(70*time.Second - time.Nanosecond)
		assert.True(t, s.RefreshTokenAlive(token))
		time.Sleep(time.Nanosecond)
		c.refused(token, "InvalidToken")
	})
}

func TestLimits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New()
		a, b, x, y := inProcess(t, s), inProcess(t, s), inProcess(t, s), inProcess(t, s)
		of := map[*caller]string{}
		for _, c := range []*caller{a, b, x, y} {
			of[c] = s.GenerateUserToken(c.id, "ada")
		}
		use := func(c *caller, n int) {
			for range n {
				c.granted(of[c])
			}
		}
		limited := func(c *caller, seconds string) {
			t.Helper()
			g := c.exchange(of[c])
			assert.Equal(t, http.StatusTooManyRequests, g.status)
			assert.Equal(t, seconds, g.header.Get("Retry-After"))
		}
		use(a, 60)
		time.Sleep(10*time.Second + time.Millisecond)
		use(a, 40)
		limited(a, "50") // until the first call is 60 seconds old, rounded up
		assert.Equal(t, 101, s.MaxPerMinute(a.id))
		use(b, 100)
		use(x, 100)
		limited(y, "50") // the tenant's 300 are used up
		time.Sleep(50 * time.Second)
		use(y, 60)
		limited(y, "10")

		s.SetLimits(0, 0)
		use(y, 500)
		s.SetLimits(1, 0)
		time.Sleep(time.Minute)
		access := a.granted(of[a]).text("accessToken")
		me := a.call(t.Context(), mePath, map[string]string{"accessToken": access})
		assert.Equal(t, http.StatusTooManyRequests, me.status, "an app's calls count against the same limit")
		perConnector, perTenant := s.Limits()
		assert.Equal(t, [2]int{1, 0}, [2]int{perConnector, perTenant})
	})
}

func TestMoves(t *testing.T) {
	s := New()
	c := inProcess(t, s)
	token, other := s.GenerateUserToken(c.id, "ada"), s.GenerateUserToken(c.id, "bob")
	for _, move := range []struct {
		status int
		do     func(string, string)
	}{{308, s.MoveUser}, {307, s.MoveUserTemporarily}} {
		for _, location := range []string{"https://eu.kaiza.la", "https://eu.kaiza.la/", "https://EU.kaiza.la/v1/accessToken"} {
			move.do("ada", location)
			g := c.exchange(token)
			assert.Equal(t, move.status, g.status)
			assert.Equal(t, location, g.header.Get("Location"))
			c.granted(other)
			there := *c
			there.root = "https://eu.kaiza.la"
			there.granted(token)
			there.granted(other)
		}
		move.do("ada", "/eu/v1/accessToken")
		assert.Equal(t, move.status, c.exchange(token).status)
		there := *c
		there.root += "/eu"
		there.granted(token)
	}
	s.MoveUser("ada", "")
	c.granted(token)
}

func TestFaults(t *testing.T) {
	t.Run("are used up in their order, by their user", func(t *testing.T) {
		s := New()
		c := inProcess(t, s)
		ada, bob := s.GenerateUserToken(c.id, "ada"), s.GenerateUserToken(c.id, "bob")
		header := http.Header{"Retry-After": {"7"}}
		s.Inject(Fault{User: "ada", Times: 2, Status: 503, Header: header, Body: "<html>"})
		s.Inject(Fault{Status: 418})
		header.Set("Retry-After", "8")
		for range 2 {
			g := c.exchange(ada)
			assert.Equal(t, 503, g.status)
			assert.Equal(t, "7", g.header.Get("Retry-After"))
			assert.Equal(t, "<html>", g.raw)
			assert.Equal(t, 418, c.exchange(bob).status)
		}
		assert.Equal(t, 418, c.exchange(ada).status)
		assert.Zero(t, s.Exchanges("ada"), "nothing was carried out")
		s.ClearFaults()
		c.granted(ada)
	})
	t.Run("Process rotates although nobody hears of it", func(t *testing.T) {
		for _, f := range []Fault{{Process: true, Status: 503}, {Process: true, Reset: true}, {Truncate: true}} {
			synctest.Test(t, func(t *testing.T) {
				s := New()
				c := inProcess(t, s)
				token := s.GenerateUserToken(c.id, "ada")
				time.Sleep(330 * day)
				f.Times = 1
				s.Inject(f)
				g := c.exchange(token)
				assert.True(t, g.err != nil || g.status == 503)
				assert.Equal(t, 1, s.Exchanges("ada"))
				assert.False(t, s.RefreshTokenAlive(token))
				assert.NotEqual(t, token, s.CurrentRefreshToken("ada"))
				assert.True(t, s.Calls()[0].Rotated)
			})
		}
	})
	t.Run("Hang ends with its client", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s := New()
			c := inProcess(t, s)
			token := s.GenerateUserToken(c.id, "ada")
			s.Inject(Fault{Hang: true})
			ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
			defer cancel()
			g := c.call(ctx, exchangePath, map[string]string{"refreshToken": token})
			require.ErrorIs(t, g.err, context.DeadlineExceeded)
			call := s.Calls()[0]
			assert.Equal(t, time.Hour, call.End.Sub(call.Start))
			assert.Zero(t, call.Status)
		})
	})
	t.Run("Hang ends with ClearFaults", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s := New()
			c := inProcess(t, s)
			s.Inject(Fault{Hang: true})
			time.AfterFunc(time.Minute, s.ClearFaults)
			require.ErrorIs(t, c.exchange("any").err, io.ErrUnexpectedEOF)
		})
	})
	t.Run("Hold carries out and answers at ClearFaults", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s := New()
			c := inProcess(t, s)
			s.SetRefreshTokenAge(330 * day)
			token := s.GenerateUserToken(c.id, "ada")
			s.Inject(Fault{Hold: true})
			time.AfterFunc(time.Minute, func() {
				call := s.Calls()[0]
				assert.True(t, call.Rotated)
				assert.Zero(t, call.End)
				assert.False(t, s.RefreshTokenAlive(token))
				s.ClearFaults()
			})
			g := c.granted(token)
			assert.Equal(t, s.CurrentRefreshToken("ada"), g.text("refreshToken"))
			assert.Equal(t, time.Minute, s.Calls()[0].End.Sub(s.Calls()[0].Start))

			s.Inject(Fault{Hold: true, Status: 503})
			time.AfterFunc(time.Minute, s.ClearFaults)
			assert.Equal(t, 503, c.exchange(g.text("refreshToken")).status)
		})
	})
	t.Run("Hold ends with its client", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s := New()
			c := inProcess(t, s)
			s.SetRefreshTokenAge(330 * day)
			token := s.GenerateUserToken(c.id, "ada")
			s.Inject(Fault{Hold: true})
			ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
			defer cancel()
			g := c.call(ctx, exchangePath, map[string]string{"applicationId": c.id, "applicationSecret": c.secret, "refreshToken": token})
			require.ErrorIs(t, g.err, context.DeadlineExceeded)
			call := s.Calls()[0]
			assert.Equal(t, time.Hour, call.End.Sub(call.Start))
			assert.Zero(t, call.Status)
			assert.True(t, call.Rotated)
			assert.Equal(t, 1, s.Exchanges("ada"))
		})
	})
	t.Run("Delay comes before anything", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s := New()
			c := inProcess(t, s)
			token := s.GenerateUserToken(c.id, "ada")
			s.Inject(Fault{Delay: time.Minute})
			began := time.Now()
			g := c.granted(token)
			assert.Equal(t, time.Minute, time.Since(began))
			assert.EqualValues(t, time.Now().Add(day).UnixMilli(), g.fields["accessTokenExpiry"])

			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			g = c.call(ctx, exchangePath, map[string]string{"refreshToken": token})
			require.ErrorIs(t, g.err, context.DeadlineExceeded)
			assert.Equal(t, 1, s.Exchanges("ada"))
		})
	})
	t.Run("a call over the limit uses none up", func(t *testing.T) {
		s := New()
		s.SetLimits(1, 0)
		c := inProcess(t, s)
		token := s.GenerateUserToken(c.id, "ada")
		c.granted(token)
		s.Inject(Fault{Status: 418, Times: 1})
		assert.Equal(t, 429, c.exchange(token).status)
		s.SetLimits(0, 0)
		assert.Equal(t, 418, c.exchange(token).status)
	})
}

func TestTruncateAt(t *testing.T) {
	s := New()
	c := inProcess(t, s)
	token := s.GenerateUserToken(c.id, "ada")
	length := len(c.granted(token).raw)
	for at, want := range map[int]int{0: length / 2, 5: 5, 1 << 20: length} {
		s.Inject(Fault{Truncate: true, TruncateAt: at, Times: 1})
		g := c.exchange(token)
		require.ErrorIs(t, g.err, io.ErrUnexpectedEOF)
		assert.InDelta(t, want, len(g.raw), 4, "two answers differ by \"\" and null")
	}
}

func TestCalls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New()
		c := inProcess(t, s)
		token := s.GenerateUserToken(c.id, "ada")
		access := c.granted(token).text("accessToken")
		c.exchange("unknown")
		c.call(t.Context(), mePath, map[string]string{"accessToken": access})
		at := time.Now()
		assert.Equal(t, []Call{
			{Start: at, End: at, ConnectorID: c.id, User: "ada", Path: exchangePath, Status: 200, RefreshToken: token, AccessToken: access},
			{Start: at, End: at, ConnectorID: c.id, Path: exchangePath, Status: 401, RefreshToken: "unknown"},
		}, s.Calls())
		assert.Equal(t, 2, s.CallCount())
		assert.Equal(t, 1, s.Exchanges("ada"))
		assert.Equal(t, 1, s.TotalExchanges())

		for range 3 {
			time.Sleep(time.Minute)
			c.granted(token)
		}
		assert.Equal(t, 2, s.MaxPerMinute(c.id), "calls that are 60 seconds apart are not in the same minute")

		s.ResetCalls()
		assert.Empty(t, s.Calls())
		assert.Zero(t, s.CallCount()+s.Exchanges("ada")+s.MaxPerMinute(c.id))
		assert.True(t, s.RefreshTokenAlive(token))
	})
}

// A year of 200 tenants is 73,000 calls, and must neither take long nor grow without end.
func TestCallsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New()
		s.SetLimits(0, 0)
		c := inProcess(t, s)
		var first *Call
		for i := range maxCalls + 1 {
			call := s.begin(Call{ConnectorID: c.id})
			if i == maxCalls/2 {
				first = call
			}
		}
		assert.Len(t, s.Calls(), maxCalls/2+1)
		assert.Same(t, first, s.calls[0])
		assert.Equal(t, maxCalls+1, s.CallCount())

		token := s.GenerateUserToken(c.id, "ada")
		for range 5000 {
			c.granted(token)
			time.Sleep(time.Hour)
		}
		assert.Less(t, len(s.access), 1100, "expired access tokens are forgotten")
		assert.LessOrEqual(t, len(s.busiest[c.id].times), maxCalls+1)
	})
}

func TestServers(t *testing.T) {
	for name, start := range map[string]func() *Server{"http": NewServer, "https": NewTLSServer} {
		t.Run(name, func(t *testing.T) {
			s := start()
			defer s.Close()
			h := s.server.Client()
			// On a connection that was kept, Go's transport would send the exchange again after a reset.
			h.Transport.(*http.Transport).DisableKeepAlives = true
			assert.True(t, strings.HasPrefix(s.URL, name+"://127.0.0.1:"))
			assert.Equal(t, name == "https", strings.Contains(s.CACert, "BEGIN CERTIFICATE"))
			c := inProcess(t, s.Service)
			c.rt, c.root = h.Transport, s.URL
			token := s.GenerateUserToken(c.id, "ada")
			assert.Equal(t, s.URL, c.granted(token).text("endpointUrl"))

			s.Inject(Fault{Reset: true, Times: 1})
			assert.Error(t, c.exchange(token).err)
			length := len(c.granted(token).raw)
			s.Inject(Fault{Truncate: true, TruncateAt: 100, Times: 1})
			g := c.exchange(token)
			assert.ErrorIs(t, g.err, io.ErrUnexpectedEOF)
			assert.Len(t, g.raw, 100)
			assert.Greater(t, length, 100)

			// Close ends a hang.
			s.Inject(Fault{Hang: true})
			before := s.CallCount()
			var hung sync.WaitGroup
			hung.Go(func() {
				r, _ := http.NewRequest(http.MethodGet, s.URL+exchangePath, nil)
				if resp, err := h.Transport.RoundTrip(r); err == nil {
					t.Error("answered:", resp.Status)
				}
			})
			require.Eventually(t, func() bool { return s.CallCount() > before }, 5*time.Second, time.Millisecond)
			s.Close()
			hung.Wait()
		})
	}
}

func TestConcurrentUse(t *testing.T) {
	s := New()
	s.SetLimits(0, 0)
	c := inProcess(t, s)
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			user := fmt.Sprint("user", i)
			for range 50 {
				c.granted(s.GenerateUserToken(c.id, user))
				s.Calls()
				s.MaxPerMinute(c.id)
				s.Inject(Fault{User: "nobody"})
			}
			assert.Equal(t, 50, s.Exchanges(user))
		})
	}
	all.Wait()
}
