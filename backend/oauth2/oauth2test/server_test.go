package oauth2test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"io"
	"net/http"
	"net/url"
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

const back = "https://vault.example.com/v1/kaizala/callback"

// caller is a client of a server.
type caller struct {
	t          *testing.T
	s          *Server
	rt         http.RoundTripper
	id, secret string
}

func newCaller(t *testing.T, set ...func(*Options)) *caller {
	s := New()
	for _, change := range set {
		s.Set(change)
	}
	id, secret := s.RegisterClient(AuthBasic, back)
	return &caller{t: t, s: s, rt: s.Transport(), id: id, secret: secret}
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

func (g got) code() string { return g.text("error") }

func (c *caller) do(r *http.Request) got {
	c.t.Helper()
	resp, err := c.rt.RoundTrip(r)
	if err != nil {
		return got{err: err}
	}
	raw, err := io.ReadAll(resp.Body)
	_ = resp.Body.Close()
	g := got{status: resp.StatusCode, header: resp.Header, raw: string(raw), err: err}
	decoder := json.NewDecoder(bytes.NewReader(raw))
	decoder.UseNumber()
	_ = decoder.Decode(&g.fields)
	return g
}

func (c *caller) request(ctx context.Context, to string, form ...string) *http.Request {
	c.t.Helper()
	values := url.Values{}
	for i := 0; i < len(form); i += 2 {
		values.Add(form[i], form[i+1])
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, to, strings.NewReader(values.Encode()))
	require.NoError(c.t, err)
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	return r
}

func (c *caller) post(to string, form ...string) got {
	c.t.Helper()
	r := c.request(c.t.Context(), to, form...)
	r.SetBasicAuth(url.QueryEscape(c.id), url.QueryEscape(c.secret))
	return c.do(r)
}

func (c *caller) exchange(token string, form ...string) got {
	c.t.Helper()
	return c.post(c.s.TokenURL(), append([]string{"grant_type", "refresh_token", "refresh_token", token}, form...)...)
}

// granted exchanges and returns the access token and the refresh token of the answer.
func (c *caller) granted(token string) (access, refresh string) {
	c.t.Helper()
	g := c.exchange(token)
	require.Equal(c.t, 200, g.status, g.raw)
	return g.text("access_token"), g.text("refresh_token")
}

func (c *caller) refused(token string) {
	c.t.Helper()
	g := c.exchange(token)
	require.Equal(c.t, 400, g.status, g.raw)
	require.Equal(c.t, "invalid_grant", g.code())
}

func (c *caller) revoke(token string) got {
	c.t.Helper()
	return c.post(c.s.RevocationURL(), "token", token)
}

func (c *caller) get(to, bearer string) got {
	c.t.Helper()
	r, err := http.NewRequestWithContext(c.t.Context(), http.MethodGet, to, nil)
	require.NoError(c.t, err)
	if bearer != "" {
		r.Header.Set("Authorization", "Bearer "+bearer)
	}
	return c.do(r)
}

// The measured columns of OAUTH.md, section 9, and its four classes.
func TestClasses(t *testing.T) {
	all := map[string]struct {
		set func(*Options)
		// sideBySide: the first access token lives on after the next exchange. reuseKills: the reuse of an old refresh token ends
		// the grant. revokeKillsToken, revokeKillsGrant: a revoked access token ends, and its grant ends. expiredKillsGrant: the
		// revocation of an expired access token ends the grant.
		sideBySide, reuseKills, revokeKillsToken, revokeKillsGrant, expiredKillsGrant bool
	}{
		"zero":          {func(*Options) {}, true, false, true, false, false},
		"A":             {ClassA, true, true, true, false, false},
		"B":             {ClassB, true, true, true, true, true},
		"C":             {ClassC, true, true, false, false, false},
		"D":             {ClassD, false, true, true, false, false},
		"oidc-provider": {OIDCProvider, true, true, true, true, true},
		"zitadel":       {Zitadel, false, false, true, false, false},
		"fosite":        {Fosite, false, true, true, true, true},
	}
	for name, want := range all {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := newCaller(t, want.set)
				rt0 := c.s.Grant(c.id, "ada", "a", "b")
				at1, rt1 := c.granted(rt0)
				require.True(t, c.s.Alive(at1))
				require.NotEqual(t, rt0, rt1)
				at2, rt2 := c.granted(rt1)
				assert.Equal(t, want.sideBySide, c.s.Alive(at1), "AT1 after the next exchange")
				require.True(t, c.s.Alive(at2))
				assert.Empty(t, c.s.LostGrants())
				assert.Zero(t, c.s.UsedTwice())

				c.refused(rt1)
				assert.Equal(t, 1, c.s.UsedTwice())
				assert.Equal(t, !want.reuseKills, c.s.RefreshTokenAlive(rt2))
				assert.Equal(t, !want.reuseKills || name == "C", c.s.Alive(at2), "the end of a grant ends its access tokens, but no JWTs")
				if want.reuseKills {
					assert.Equal(t, []Lost{{ClientID: c.id, User: "ada", Why: "a refresh token was used twice"}}, c.s.LostGrants())
					c.refused(rt2)
					assert.Equal(t, 1, c.s.UsedTwice(), "the newest refresh token was not used before")
				} else {
					assert.Empty(t, c.s.LostGrants())
				}

				other := c.s.Grant(c.id, "bob", "a")
				at, rt := c.granted(other)
				g := c.revoke(at)
				if name == "C" {
					require.Equal(t, 400, g.status)
					require.Equal(t, "unsupported_token_type", g.code())
				} else {
					require.Equal(t, 200, g.status)
					require.Empty(t, g.raw)
				}
				assert.Equal(t, !want.revokeKillsToken, c.s.Alive(at))
				assert.Equal(t, !want.revokeKillsGrant, c.s.RefreshTokenAlive(rt))

				rt = c.s.Grant(c.id, "cy", "a")
				at, rt = c.granted(rt)
				life := time.Until(c.s.TokenStatus(at).Expires)
				time.Sleep(life - time.Nanosecond)
				require.True(t, c.s.Alive(at))
				time.Sleep(time.Nanosecond)
				require.False(t, c.s.Alive(at))
				g = c.revoke(at)
				assert.Equal(t, name != "C", g.status == 200)
				assert.Equal(t, !want.expiredKillsGrant, c.s.RefreshTokenAlive(rt))
				calls := c.s.Calls(EndpointRevocation)
				require.Len(t, calls, 2)
				assert.Equal(t, []bool{false, true}, []bool{calls[0].Expired, calls[1].Expired})
				assert.Equal(t, life, calls[0].Left)
				assert.Equal(t, "cy", calls[1].User)

				g = c.revoke(rt)
				assert.Equal(t, 200, g.status, "a refresh token can be revoked everywhere")
				c.refused(rt)
			})
		})
	}
}

func TestSixAtOnce(t *testing.T) {
	for name, want := range map[string]struct {
		set   func(*Options)
		ok    int
		alive bool
	}{
		"dies":    {ClassA, 1, false},
		"refused": {Zitadel, 1, true},
		"grace":   {func(o *Options) { ClassA(o); o.Grace = time.Minute }, 6, true},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCaller(t, want.set)
			rt := c.s.Grant(c.id, "ada")
			var wg sync.WaitGroup
			var mu sync.Mutex
			ok := 0
			for range 6 {
				wg.Go(func() {
					if c.exchange(rt).status == 200 {
						mu.Lock()
						defer mu.Unlock()
						ok++
					}
				})
			}
			wg.Wait()
			assert.Equal(t, want.ok, ok)
			assert.Equal(t, 5, c.s.UsedTwice())
			assert.Equal(t, want.ok-1, c.s.GraceUses())
			assert.Equal(t, want.ok, c.s.Exchanges("ada"))
			assert.Equal(t, want.alive, c.s.RefreshTokenAlive(c.s.CurrentRefreshToken("ada")))
		})
	}
}

func TestGrace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCaller(t, ClassA, func(o *Options) { o.Grace = 30 * time.Second })
		rt0 := c.s.Grant(c.id, "ada")
		at1, rt1 := c.granted(rt0)
		time.Sleep(30*time.Second - 1)
		at2, rt2 := c.granted(rt0)
		assert.NotEqual(t, []string{at1, rt1}, []string{at2, rt2})
		c.granted(rt1)
		c.granted(rt2)
		require.True(t, c.s.RefreshTokenAlive(c.s.CurrentRefreshToken("ada")))
		time.Sleep(time.Nanosecond)
		c.refused(rt0)
		c.refused(c.s.CurrentRefreshToken("ada"))
		assert.Equal(t, []int{2, 1}, []int{c.s.UsedTwice(), c.s.GraceUses()})

		c.s.Set(func(o *Options) { o.GraceSame, o.ExchangeInvalidates = true, true })
		rt0 = c.s.Grant(c.id, "bob")
		at1, rt1 = c.granted(rt0)
		time.Sleep(time.Second)
		g := c.exchange(rt0)
		assert.Equal(t, []string{at1, rt1, "3599"}, []string{g.text("access_token"), g.text("refresh_token"), g.fields["expires_in"].(json.Number).String()})
		assert.True(t, c.s.Alive(at1))
		c.granted(rt1)
		c.refused(rt0)
		assert.Len(t, c.s.LostGrants(), 2, "the grace of the old refresh token ends when the new one is used")
	})
}

func TestRotation(t *testing.T) {
	for rotation, want := range map[Rotation]any{RotateNever: nil, RotateEmpty: "", RotateSame: "same"} {
		c := newCaller(t, func(o *Options) { o.Rotation = rotation; o.ReuseKillsFamily = true })
		rt := c.s.Grant(c.id, "ada")
		if want == "same" {
			want = rt
		}
		for range 3 {
			g := c.exchange(rt)
			require.Equal(t, 200, g.status)
			assert.Equal(t, want, g.fields["refresh_token"], rotation)
		}
		assert.Zero(t, c.s.UsedTwice())
		assert.Len(t, c.s.AccessTokens("ada"), 3)
		for _, call := range c.s.Calls() {
			assert.False(t, call.Rotated || call.Reused)
			assert.True(t, call.Granted())
		}
	}
}

func TestRefreshTokenLife(t *testing.T) {
	for _, absolute := range []bool{false, true} {
		for _, rotation := range []Rotation{RotateEach, RotateNever} {
			synctest.Test(t, func(t *testing.T) {
				c := newCaller(t, func(o *Options) {
					o.RefreshTokenLife, o.RefreshTokenAbsolute, o.Rotation = 10*time.Hour, absolute, rotation
					o.RefreshTokenLifeField = "refresh_token_expires_in"
				})
				rt := c.s.Grant(c.id, "ada")
				time.Sleep(6 * time.Hour)
				g := c.exchange(rt)
				want := "36000"
				if absolute {
					want = "14400"
				}
				assert.Equal(t, json.Number(want), g.fields["refresh_token_expires_in"])
				if rotation == RotateEach {
					rt = g.text("refresh_token")
				}
				time.Sleep(4 * time.Hour)
				assert.Equal(t, !absolute, c.s.RefreshTokenAlive(rt))
				time.Sleep(6 * time.Hour)
				c.refused(rt)
				assert.Empty(t, c.s.LostGrants(), "a refresh token that expires is no lost grant")
			})
		}
	}
	c := newCaller(t, func(o *Options) { o.RefreshTokenLifeField = "refresh_expires_in"; o.RefreshTokenJWT = true })
	g := c.exchange(c.s.Grant(c.id, "ada"))
	assert.Equal(t, json.Number("0"), g.fields["refresh_expires_in"])
	assert.NotContains(t, claims(t, g.text("refresh_token")), "exp")
	c.s.Set(func(o *Options) { o.RefreshTokenLife = time.Hour })
	assert.InDelta(t, time.Now().Add(time.Hour).Unix(), claims(t, c.s.Grant(c.id, "ada"))["exp"], 2)
}

func claims(t *testing.T, token string) (claims map[string]any) {
	t.Helper()
	parts := strings.Split(token, ".")
	require.Len(t, parts, 3)
	raw, err := base64.RawURLEncoding.DecodeString(parts[1])
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(raw, &claims))
	return claims
}

func TestShapesOfAnswers(t *testing.T) {
	for shape, want := range map[ExpiresIn]any{
		ExpiresInNumber: json.Number("3600"), ExpiresInDecimal: json.Number("3600.5"), ExpiresInString: "3600",
		ExpiresInNull: nil, ExpiresInEmpty: "",
	} {
		synctest.Test(t, func(t *testing.T) {
			c := newCaller(t, func(o *Options) { o.AccessTokenLife, o.ExpiresIn = 3600500*time.Millisecond, shape })
			g := c.exchange(c.s.Grant(c.id, "ada", "a", "b"))
			require.Contains(t, g.fields, "expires_in")
			assert.Equal(t, want, g.fields["expires_in"])
			assert.Equal(t, []string{"Bearer", "a b", "no-store"}, []string{g.text("token_type"), g.text("scope"), g.header.Get("Cache-Control")})
		})
	}
	c := newCaller(t, func(o *Options) {
		o.ExpiresIn, o.TokenType = ExpiresInMissing, "mac"
		o.Edit = func(e Endpoint, f map[string]any) { f["instance_url"] = "https://" + string(e); delete(f, "scope") }
	})
	g := c.exchange(c.s.Grant(c.id, "ada"))
	assert.NotContains(t, g.fields, "expires_in")
	assert.NotContains(t, g.fields, "scope")
	assert.Equal(t, []string{"mac", "https://token"}, []string{g.text("token_type"), g.text("instance_url")})

	c = newCaller(t, func(o *Options) { o.Format = FormatBOM })
	rt := c.s.Grant(c.id, "ada")
	g = c.exchange(rt)
	require.True(t, strings.HasPrefix(g.raw, "\xef\xbb\xbf{"))
	c.s.Set(func(o *Options) { o.Format = FormatForm })
	g = c.exchange(c.s.CurrentRefreshToken("ada"))
	form, err := url.ParseQuery(g.raw)
	require.NoError(t, err)
	assert.Equal(t, c.s.CurrentRefreshToken("ada"), form.Get("refresh_token"))
	assert.Equal(t, "3600", form.Get("expires_in"))
	assert.Contains(t, g.header.Get("Content-Type"), "application/x-www-form-urlencoded")
	assert.Contains(t, c.exchange("x").raw, "error=invalid_grant")

	c.s.Set(func(o *Options) { o.Format = FormatAccept })
	assert.Contains(t, c.exchange("x").raw, "error=invalid_grant")
	r := c.request(t.Context(), c.s.TokenURL(), "grant_type", "refresh_token", "refresh_token", "x")
	r.SetBasicAuth(c.id, c.secret)
	r.Header.Set("Accept", "application/json")
	assert.Equal(t, "invalid_grant", c.do(r).code())

	assert.NotContains(t, c.exchange("my-token").raw, "my-token")
	c.s.Set(func(o *Options) { o.Echo = true })
	assert.Contains(t, c.exchange("my-token").raw, "my-token")
	assert.Contains(t, c.exchange("my-token").raw, c.secret)
}

func TestScopes(t *testing.T) {
	for rule, want := range map[ScopeRule]struct{ first, next, unknown string }{
		ScopeOnce: {"a", "a b", "invalid_scope"}, ScopeNarrows: {"a", "a", "invalid_scope"}, ScopeIgnored: {"a b", "a b", ""},
	} {
		c := newCaller(t, func(o *Options) { o.Scope = rule; o.ReuseKillsFamily = true })
		g := c.exchange(c.s.Grant(c.id, "ada", "a", "b"), "scope", "a")
		assert.Equal(t, want.first, g.text("scope"), rule)
		g = c.exchange(g.text("refresh_token"))
		assert.Equal(t, want.next, g.text("scope"), rule)
		rt := g.text("refresh_token")
		g = c.exchange(rt, "scope", "a z")
		assert.Equal(t, want.unknown, g.code(), rule)
		assert.Equal(t, rule != ScopeIgnored, c.s.RefreshTokenAlive(rt), "a refused scope does not use up the refresh token")
	}
}

func TestClientAuthentication(t *testing.T) {
	c := newCaller(t, ClassA, func(o *Options) { o.OddSecrets = true })
	require.Subset(t, strings.Split(c.secret, ""), strings.Split(":+/ %~&=", ""))
	require.Contains(t, c.id, ":")
	postID, postSecret := c.s.RegisterClient(AuthPost)
	publicID, none := c.s.RegisterClient(AuthNone)
	require.Empty(t, none)
	rt, ofPost, ofPublic := c.s.Grant(c.id, "ada"), c.s.Grant(postID, "bob"), c.s.Grant(publicID, "cy")
	basic := func(id, secret string) string {
		return "Basic " + base64.StdEncoding.EncodeToString([]byte(id+":"+secret))
	}
	esc := url.QueryEscape

	for name, bad := range map[string]struct {
		header string
		form   []string
		status int
		code   string
	}{
		"nothing":                      {"", nil, 401, "invalid_client"},
		"wrong secret":                 {basic(esc(c.id), "wrong"), nil, 401, "invalid_client"},
		"unknown client":               {basic("unknown", "x"), nil, 401, "invalid_client"},
		"Basic, raw":                   {basic(c.id, c.secret), nil, 400, "invalid_request"},
		"Basic, the ID raw":            {basic(strings.TrimPrefix(c.id, "client:"), esc(c.secret)), nil, 400, "invalid_request"},
		"Basic, the secret raw":        {basic(esc(c.id), c.secret), nil, 400, "invalid_request"},
		"Basic, a slash raw":           {basic(esc(c.id), strings.ReplaceAll(esc(c.secret), "%2F", "/")), nil, 400, "invalid_request"},
		"Basic, no colon":              {"Basic eA==", nil, 400, "invalid_request"},
		"no Basic":                     {"Bearer x", nil, 400, "invalid_request"},
		"post":                         {"", []string{"client_id", c.id, "client_secret", c.secret}, 401, "invalid_client"},
		"the ID alone":                 {"", []string{"client_id", c.id}, 401, "invalid_client"},
		"the ID and an empty secret":   {"", []string{"client_id", publicID, "client_secret", ""}, 401, "invalid_client"},
		"both":                         {basic(esc(c.id), esc(c.secret)), []string{"client_id", c.id, "client_secret", c.secret}, 400, "invalid_request"},
		"Basic, and another client_id": {basic(esc(c.id), esc(c.secret)), []string{"client_id", postID}, 400, "invalid_request"},
		"Basic of a post client":       {basic(esc(postID), esc(postSecret)), nil, 401, "invalid_client"},
		"a grant type":                 {basic(esc(c.id), esc(c.secret)), []string{"grant_type", "x"}, 400, "invalid_request"},
	} {
		for _, to := range []string{c.s.TokenURL(), c.s.RevocationURL(), c.s.DeviceURL(), c.s.IntrospectionURL()} {
			r := c.request(t.Context(), to, append([]string{"grant_type", "refresh_token", "refresh_token", rt, "token", rt}, bad.form...)...)
			if bad.header != "" {
				r.Header.Set("Authorization", bad.header)
			}
			g := c.do(r)
			assert.Equal(t, bad.status, g.status, name)
			assert.Equal(t, bad.code, g.code(), name)
			assert.Equal(t, bad.status == 401, strings.HasPrefix(g.header.Get("WWW-Authenticate"), "Basic "), name)
		}
	}
	r := c.request(t.Context(), c.s.TokenURL()+"?refresh_token="+rt, "grant_type", "refresh_token", "refresh_token", rt)
	r.SetBasicAuth(esc(c.id), esc(c.secret))
	assert.Equal(t, 400, c.do(r).status, "no token in the URL")
	r = c.request(t.Context(), c.s.TokenURL(), "grant_type", "refresh_token", "refresh_token", rt)
	r.SetBasicAuth(esc(c.id), esc(c.secret))
	r.Header.Set("Content-Type", "application/json")
	assert.Equal(t, 400, c.do(r).status)
	r, _ = http.NewRequestWithContext(t.Context(), http.MethodGet, c.s.TokenURL(), nil)
	assert.Equal(t, 405, c.do(r).status)
	assert.Equal(t, "unsupported_grant_type", c.post(c.s.TokenURL(), "grant_type", "x").code())
	c.refused(ofPost)
	assert.Equal(t, 400, c.revoke(ofPost).status, "another client's token")
	require.True(t, c.s.RefreshTokenAlive(ofPost))

	c.granted(rt)
	assert.Zero(t, c.s.UsedTwice(), "no refused request has used the refresh token")
	assert.Equal(t, 200, c.do(c.request(t.Context(), c.s.TokenURL(), "grant_type", "refresh_token", "refresh_token", ofPost,
		"client_id", postID, "client_secret", postSecret)).status)
	assert.Equal(t, 200, c.do(c.request(t.Context(), c.s.TokenURL(), "grant_type", "refresh_token", "refresh_token", ofPublic,
		"client_id", publicID)).status)

	old := c.secret
	renewed := c.s.NewClientSecret(c.id)
	assert.Equal(t, 401, c.exchange(c.s.CurrentRefreshToken("ada")).status)
	c.secret = renewed
	require.NotEqual(t, old, renewed)
	c.granted(c.s.CurrentRefreshToken("ada"))
	c.s.Set(func(o *Options) { o.UnknownClient = ServerError })
	c.s.DeleteClient(c.id)
	assert.Equal(t, 500, c.exchange(c.s.CurrentRefreshToken("ada")).status)
	assert.Equal(t, []string{"", "", ""}, []string{c.s.Grant(c.id, "ada"), c.s.NewClientSecret(c.id), c.s.NewClientSecret(publicID)})
}

func TestRefusalsAreCanned(t *testing.T) {
	for _, want := range []Answer{
		InvalidGrant, InvalidGrant401, InvalidGrant403, BadRefreshToken, BadRefreshTokenForm, InvalidRefreshToken,
		ServerError, Conflict, HTML, TooManyRequests(1500 * time.Millisecond), Unavailable(time.Minute),
	} {
		c := newCaller(t, func(o *Options) { o.RefusedToken = want })
		g := c.exchange("x")
		assert.Equal(t, []any{want.Status, want.Body}, []any{g.status, g.raw})
		for name := range want.Header {
			assert.Equal(t, want.Header.Get(name), g.header.Get(name))
		}
		c.s.Set(func(o *Options) { o.RefusedClient = want })
		rt := c.s.Grant(c.id, "ada")
		secret := c.secret
		c.secret = "wrong"
		assert.Equal(t, want.Status, c.exchange(rt).status)
		c.secret = secret
		c.granted(rt)
		calls := c.s.Calls()
		assert.Equal(t, []string{"invalid_grant", "invalid_client", ""}, []string{calls[0].Error, calls[1].Error, calls[2].Error})
	}
	assert.Equal(t, "2", TooManyRequests(1500*time.Millisecond).Header.Get("Retry-After"))
	assert.Equal(t, "101", RateLimitReset(time.UnixMilli(100_001)).Header.Get("X-Rate-Limit-Reset"))
}

func TestRevocation(t *testing.T) {
	c := newCaller(t)
	at1, rt := c.granted(c.s.Grant(c.id, "ada"))
	at2, rt := c.granted(rt)
	assert.Equal(t, 200, c.revoke("unknown").status)
	assert.Equal(t, 400, c.post(c.s.RevocationURL()).status)
	require.Equal(t, 200, c.post(c.s.RevocationURL(), "token", at1, "token_type_hint", "refresh_token").status, "a wrong hint")
	assert.Equal(t, []bool{false, true}, []bool{c.s.Alive(at1), c.s.Alive(at2)})
	assert.Equal(t, "revoked", c.s.TokenStatus(at1).Why)
	assert.Equal(t, []string{at2}, c.s.AccessTokens("ada"))

	c.s.Set(func(o *Options) { o.RevokeDead = InvalidToken })
	for _, dead := range []string{at1, "unknown"} {
		g := c.revoke(dead)
		assert.Equal(t, []any{400, "invalid_token"}, []any{g.status, g.code()})
	}
	c.s.Set(func(o *Options) { o.RevokeEnds = RevokeNothing })
	assert.Equal(t, 200, c.revoke(at2).status)
	assert.True(t, c.s.Alive(at2))

	other := c.s.Grant(c.id, "ada")
	bob := c.s.Grant(c.id, "bob")
	require.Equal(t, 200, c.revoke(rt).status)
	assert.False(t, c.s.Alive(at2))
	c.refused(rt)
	assert.True(t, c.s.RefreshTokenAlive(other))
	assert.Empty(t, c.s.LostGrants(), "the client asked for this end")
	c.s.Set(func(o *Options) { o.RevokeRefreshEndsAll = true })
	third := c.s.Grant(c.id, "ada")
	require.Equal(t, 200, c.revoke(third).status)
	assert.Equal(t, []bool{false, true}, []bool{c.s.RefreshTokenAlive(other), c.s.RefreshTokenAlive(bob)})
	assert.Len(t, c.s.LostGrants(), 1)

	// A revocation does not change the user's grants to other clients.
	public, _ := c.s.RegisterClient(AuthNone)
	elsewhere := c.s.Grant(public, "ada")
	require.Equal(t, 200, c.revoke(c.s.Grant(c.id, "ada")).status)
	assert.True(t, c.s.RefreshTokenAlive(elsewhere))
	assert.Equal(t, 400, c.revoke(third).status, "the token has ended: RevokeDead")

	at, rt := c.granted(bob)
	c.s.Withdraw("bob")
	c.refused(rt)
	assert.Equal(t, Status{}, c.s.TokenStatus("unknown"))
	st := c.s.TokenStatus(at)
	assert.Equal(t, []any{true, false, "access_token", c.id, "bob", "the user withdrew it"}, []any{st.Known, st.Alive, st.Type, st.ClientID, st.User, st.Why})
	assert.Len(t, c.s.LostGrants(), 1)
}

func TestUserInfoAndIntrospection(t *testing.T) {
	c := newCaller(t)
	at, rt := c.granted(c.s.Grant(c.id, "ada", "a"))
	g := c.get(c.s.UserInfoURL(), at)
	assert.Equal(t, []string{"sub-ada", "ada@example.com"}, []string{g.text("sub"), g.text("email")})
	g = c.post(c.s.IntrospectionURL(), "token", at)
	assert.Equal(t, []any{true, "ada", "a", c.id}, []any{g.fields["active"], g.text("username"), g.text("scope"), g.text("client_id")})
	c.granted(rt)
	assert.Equal(t, map[string]any{"active": false}, c.post(c.s.IntrospectionURL(), "token", rt).fields, "the refresh token was replaced")
	c.revoke(at)
	assert.Equal(t, false, c.post(c.s.IntrospectionURL(), "token", at).fields["active"])
	for _, bad := range []string{at, "", "x", rt} {
		g = c.get(c.s.UserInfoURL(), bad)
		assert.Equal(t, 401, g.status)
		assert.Contains(t, g.header.Get("WWW-Authenticate"), `error="invalid_token"`)
	}
}

func TestMetadata(t *testing.T) {
	c := newCaller(t)
	c.s.SetURL("https://as.example.com/tenant")
	oauth, openID := "https://as.example.com/.well-known/oauth-authorization-server/tenant", "https://as.example.com/tenant/.well-known/openid-configuration"
	for mode, want := range map[Metadata][2]int{
		MetadataBoth: {200, 200}, MetadataOAuth: {200, 404}, MetadataOpenID: {404, 200}, MetadataNone: {404, 404},
	} {
		c.s.Set(func(o *Options) { o.Metadata = mode })
		assert.Equal(t, want, [2]int{c.get(oauth, "").status, c.get(openID, "").status}, mode)
	}
	c.s.Set(func(o *Options) { o.Metadata = MetadataBoth })
	for _, wrong := range []string{"/tenant/.well-known/oauth-authorization-server", "/.well-known/openid-configuration/tenant", "/.well-known/oauth-authorization-server", "/token"} {
		assert.Equal(t, 404, c.get("https://as.example.com"+wrong, "").status, wrong)
	}
	f := c.get(oauth, "").fields
	for name, want := range map[string]any{
		"issuer": c.s.Issuer(), "token_endpoint": c.s.TokenURL(), "revocation_endpoint": c.s.RevocationURL(),
		"authorization_endpoint": c.s.AuthorizationURL(), "device_authorization_endpoint": c.s.DeviceURL(),
		"token_endpoint_auth_methods_supported": []any{"client_secret_basic", "client_secret_post", "none"},
	} {
		assert.Equal(t, want, f[name], name)
	}
	assert.NotContains(t, f, "authorization_response_iss_parameter_supported")
	c.s.Set(func(o *Options) {
		o.MetadataIssuer, o.AuthMethods, o.PromiseIss = "https://evil.example", []string{}, true
	})
	f = c.get(openID, "").fields
	assert.Equal(t, []any{"https://evil.example", true}, []any{f["issuer"], f["authorization_response_iss_parameter_supported"]})
	assert.NotContains(t, f, "token_endpoint_auth_methods_supported")
	c.granted(c.s.Grant(c.id, "ada"))
	_, err := c.rt.RoundTrip(c.request(t.Context(), "https://other.example.com/tenant/token"))
	assert.ErrorContains(t, err, "no server listens")
	_, err = c.rt.RoundTrip(c.request(t.Context(), "http://as.example.com/tenant/token"))
	assert.Error(t, err)
}

func TestJWTsThatExchangesEnd(t *testing.T) {
	// Hydra with JWTs: after an exchange, introspection says that the older access token is not active.
	c := newCaller(t, ClassC, func(o *Options) { o.ExchangeInvalidates = true })
	at, rt := c.granted(c.s.Grant(c.id, "ada@a.example", "a"))
	assert.Equal(t, []any{"sub-ada@a.example", c.id, "a"}, []any{claims(t, at)["sub"], claims(t, at)["client_id"], claims(t, at)["scope"]})
	assert.Equal(t, "ada@a.example", c.get(c.s.UserInfoURL(), at).text("email"))
	_, rt = c.granted(rt)
	assert.False(t, c.s.Alive(at))
	assert.Equal(t, "superseded by an exchange", c.s.TokenStatus(at).Why)
	assert.Equal(t, 2, c.s.TotalExchanges())
	c.s.Withdraw("ada@a.example")
	st := c.s.TokenStatus(rt)
	assert.Equal(t, []any{"refresh_token", false, "the user withdrew it"}, []any{st.Type, st.Alive, st.Why})
	assert.False(t, st.Ended.IsZero())
}

func TestWhatARequestLacks(t *testing.T) {
	c := newCaller(t)
	for _, form := range [][]string{
		{}, {"grant_type", "refresh_token"}, {"grant_type", "refresh_token", "refresh_token", ""}, {"refresh_token", "x"},
		{"grant_type", "refresh_token", "grant_type", "refresh_token", "refresh_token", "x"},
	} {
		assert.Equal(t, "invalid_request", c.post(c.s.TokenURL(), form...).code(), "%q", form)
	}
	c.s.Set(func(o *Options) { o.ExpiresIn, o.Format = ExpiresInNull, FormatForm })
	assert.Contains(t, c.exchange(c.s.Grant(c.id, "ada")).raw, "expires_in=&")
}

func TestOldAccessTokensAreForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCaller(t, func(o *Options) { o.Rotation = RotateNever })
		rt := c.s.Grant(c.id, "ada")
		first, _ := c.granted(rt)
		time.Sleep(24*time.Hour + time.Minute)
		second, _ := c.granted(rt)
		time.Sleep(time.Hour)
		for range 1100 {
			c.granted(rt)
		}
		assert.Equal(t, []bool{false, true}, []bool{c.s.TokenStatus(first).Known, c.s.TokenStatus(second).Known})
	})
}

func TestExpiredTokensEndNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCaller(t, Fosite, func(o *Options) { o.RefreshTokenLife, o.AccessTokenLife = 24*time.Hour, time.Minute })
		old := c.s.Grant(c.id, "ada")
		at, rt := c.granted(old)
		_, rt = c.granted(rt)
		require.False(t, c.s.Alive(at))
		time.Sleep(23 * time.Hour)
		assert.Equal(t, 200, c.revoke(at).status)
		require.True(t, c.s.RefreshTokenAlive(rt), "an exchange had ended that access token before it expired")
		_, rt = c.granted(rt)
		time.Sleep(time.Hour)
		c.refused(old)
		require.Equal(t, 200, c.revoke(old).status)
		assert.True(t, c.s.RefreshTokenAlive(rt), "an expired refresh token that comes again does not end the grant")
		assert.Empty(t, c.s.LostGrants())
	})
}
