package oauth2test

import (
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

const verifier = "a-verifier-of-forty-three-characters-0123456"

func (c *caller) authorizationURL(change ...string) string {
	sum := sha256.Sum256([]byte(verifier))
	q := url.Values{
		"response_type": {"code"}, "client_id": {c.id}, "redirect_uri": {back}, "scope": {"openid email a offline_access"},
		"state": {"s t"}, "code_challenge": {encode(sum[:])}, "code_challenge_method": {"S256"}, "nonce": {"n"},
	}
	for i := 0; i < len(change); i += 2 {
		if change[i+1] == "" {
			q.Del(change[i])
		} else {
			q.Set(change[i], change[i+1])
		}
	}
	return c.s.AuthorizationURL() + "?" + q.Encode()
}

func (c *caller) approved(user string, change ...string) url.Values {
	c.t.Helper()
	to, err := c.s.Approve(c.authorizationURL(change...), user)
	require.NoError(c.t, err)
	require.True(c.t, strings.HasPrefix(to, back+"?"), to)
	u, err := url.Parse(to)
	require.NoError(c.t, err)
	return u.Query()
}

func (c *caller) redeem(code string, change ...string) got {
	c.t.Helper()
	form := map[string]string{"grant_type": "authorization_code", "code": code, "redirect_uri": back, "code_verifier": verifier}
	for i := 0; i < len(change); i += 2 {
		form[change[i]] = change[i+1]
	}
	flat := []string{}
	for k, v := range form {
		if v != "" {
			flat = append(flat, k, v)
		}
	}
	return c.post(c.s.TokenURL(), flat...)
}

func TestCodeFlow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCaller(t, ClassA, func(o *Options) { o.RequirePKCE, o.RequireOffline = true, true })
		q := c.approved("ada")
		assert.Equal(t, "s t", q.Get("state"))
		assert.False(t, q.Has("iss"))
		code := q.Get("code")
		for _, bad := range [][]string{{"redirect_uri", back + "/"}, {"redirect_uri", ""}, {"code_verifier", ""}, {"code_verifier", verifier + "x"}, {"code", "x"}} {
			assert.Equal(t, "invalid_grant", c.redeem(code, bad...).code(), "%q", bad)
		}
		assert.Equal(t, "invalid_request", c.redeem("").code())
		g := c.redeem(code)
		require.Equal(t, 200, g.status, g.raw)
		id := claims(t, g.text("id_token"))
		assert.Equal(t, []any{"sub-ada", "ada@example.com", c.id, DefaultURL, "n"}, []any{id["sub"], id["email"], id["aud"], id["iss"], id["nonce"]})
		require.True(t, c.s.Alive(g.text("access_token")))
		call := c.s.Calls()[len(c.s.Calls())-1]
		assert.Equal(t, []any{"authorization_code", "ada", false, g.text("refresh_token")}, []any{call.GrantType, call.User, call.Rotated, call.RefreshToken})
		at, rt := c.granted(g.text("refresh_token"))

		assert.Equal(t, "invalid_grant", c.redeem(code).code(), "a code is used once")
		assert.False(t, c.s.Alive(at), "the second use ends the tokens of the first")
		assert.False(t, c.s.RefreshTokenAlive(rt))
		assert.Equal(t, "a code was used twice", c.s.LostGrants()[0].Why)

		code = c.approved("ada").Get("code")
		time.Sleep(time.Minute)
		assert.Equal(t, "invalid_grant", c.redeem(code).code(), "the code has expired")
		code = c.approved("ada").Get("code")
		time.Sleep(time.Minute - 1)
		assert.Equal(t, 200, c.redeem(code).status)

		code = c.approved("ada").Get("code")
		other := *c
		other.id, other.secret = c.s.RegisterClient(AuthBasic, back)
		assert.Equal(t, "invalid_grant", other.redeem(code).code(), "the code is for another client")

		assert.NotContains(t, c.redeem(c.approved("ada", "scope", "a").Get("code")).fields, "refresh_token")
		g = c.redeem(c.approved("", "scope", "a", "access_type", "offline", "login_hint", "bo@b.example").Get("code"))
		assert.Contains(t, g.fields, "refresh_token")
		assert.NotContains(t, g.fields, "id_token")
		assert.Equal(t, "bo@b.example", c.s.TokenStatus(g.text("refresh_token")).User)
		c.s.Set(func(o *Options) { o.RequireOffline = false })
		assert.Contains(t, c.redeem(c.approved("ada", "scope", "a").Get("code")).fields, "refresh_token")
	})
}

func TestAuthorizationRequests(t *testing.T) {
	c := newCaller(t, func(o *Options) { o.RequirePKCE = true })
	for _, page := range [][]string{{"client_id", "x"}, {"redirect_uri", back + "/"}, {"redirect_uri", ""}} {
		_, err := c.s.Approve(c.authorizationURL(page...), "ada")
		assert.Error(t, err, "%q", page)
	}
	_, err := c.s.Approve("https://evil.example/authorize?"+strings.SplitN(c.authorizationURL(), "?", 2)[1], "ada")
	assert.ErrorContains(t, err, "not the authorization endpoint")
	_, err = c.s.Approve(c.authorizationURL(), "")
	assert.ErrorContains(t, err, "user")
	for code, requests := range map[string][][]string{
		"unsupported_response_type": {{"response_type", "token"}},
		"invalid_request": {
			{"response_type", ""}, {"code_challenge", ""}, {"code_challenge_method", ""}, {"code_challenge_method", "plain"},
			{"code_challenge", "short"}, {"code_challenge", "", "code_challenge_method", ""}, {"client_secret", "x"},
		},
		"request_not_supported":     {{"request", "x"}},
		"request_uri_not_supported": {{"request_uri", "x"}},
	} {
		for _, change := range requests {
			q := c.approved("ada", change...)
			assert.Equal(t, []string{code, "s t", ""}, []string{q.Get("error"), q.Get("state"), q.Get("code")}, "%q", change)
		}
	}
	to, err := c.s.Approve(c.authorizationURL()+"&scope=a", "ada")
	require.NoError(t, err)
	assert.Contains(t, to, "error=invalid_request", "twice")
	to, err = c.s.Deny(c.authorizationURL())
	require.NoError(t, err)
	assert.Contains(t, to, "error=access_denied")

	c.s.Set(func(o *Options) { o.SendIss, o.RequirePKCE = true, false })
	assert.Equal(t, "invalid_request", c.approved("ada", "code_challenge_method", "").Get("error"))
	q := c.approved("ada", "code_challenge", "", "code_challenge_method", "")
	assert.Equal(t, DefaultURL, q.Get("iss"))
	assert.Equal(t, "invalid_grant", c.redeem(q.Get("code")).code(), "a verifier without a challenge")
	assert.Equal(t, 200, c.redeem(q.Get("code"), "code_verifier", "").status)
	c.s.Set(func(o *Options) { o.WrongIss = "https://evil.example" })
	assert.Equal(t, "https://evil.example", c.approved("ada").Get("iss"))
}

func TestDeviceFlow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCaller(t, ClassA, func(o *Options) { o.RequireOffline = true })
		start := func() (code, user string) {
			g := c.post(c.s.DeviceURL(), "scope", "openid offline_access")
			require.Equal(t, 200, g.status)
			assert.Equal(t, c.s.VerificationURL(), g.text("verification_uri"))
			assert.Equal(t, c.s.VerificationURL()+"?user_code="+g.text("user_code"), g.text("verification_uri_complete"))
			assert.Equal(t, "600 5", g.fields["expires_in"].(interface{ String() string }).String()+" "+g.fields["interval"].(interface{ String() string }).String())
			return g.text("device_code"), g.text("user_code")
		}
		poll := func(code string) string {
			g := c.post(c.s.TokenURL(), "grant_type", deviceGrant, "device_code", code)
			if g.status == 200 {
				return "ok"
			}
			return g.code()
		}
		code, user := start()
		assert.Equal(t, "authorization_pending", poll(code))
		time.Sleep(5*time.Second - 1)
		assert.Equal(t, "slow_down", poll(code))
		time.Sleep(10*time.Second - 1)
		assert.Equal(t, "slow_down", poll(code), "the interval has grown by 5 seconds")
		time.Sleep(15 * time.Second)
		assert.Equal(t, "authorization_pending", poll(code))
		require.NoError(t, c.s.ApproveDevice(strings.ToLower(strings.ReplaceAll(user, "-", "")), "ada"))
		assert.Error(t, c.s.ApproveDevice(user, "ada"), "the user code was used")
		assert.Error(t, c.s.DenyDevice("XXXX"))
		time.Sleep(15 * time.Second)
		assert.Equal(t, "ok", poll(code))
		assert.True(t, c.s.RefreshTokenAlive(c.s.CurrentRefreshToken("ada")))
		assert.Equal(t, "invalid_grant", poll(code))
		calls := c.s.Calls(EndpointToken)
		assert.Equal(t, "ada", calls[len(calls)-1].User)

		code, user = start()
		require.NoError(t, c.s.DenyDevice(user))
		assert.Equal(t, "access_denied", poll(code))
		code, user = start()
		time.Sleep(10 * time.Minute)
		assert.Equal(t, "expired_token", poll(code))
		assert.ErrorContains(t, c.s.ApproveDevice(user, "ada"), "expired")

		other := *c
		other.id, other.secret = c.s.RegisterClient(AuthBasic)
		code, _ = start()
		assert.Equal(t, "invalid_grant", other.post(c.s.TokenURL(), "grant_type", deviceGrant, "device_code", code).code())
		assert.Equal(t, "invalid_request", c.post(c.s.TokenURL(), "grant_type", deviceGrant).code())

		c.s.Set(func(o *Options) { o.VerificationURL, o.DeviceInterval, o.DeviceLife = true, time.Second, time.Minute })
		g := c.post(c.s.DeviceURL())
		assert.NotContains(t, g.fields, "verification_uri")
		assert.Equal(t, c.s.VerificationURL(), g.text("verification_url"))
		require.NoError(t, c.s.ApproveDevice(g.text("user_code"), "ada"))
		g = c.post(c.s.TokenURL(), "grant_type", deviceGrant, "device_code", g.text("device_code"))
		assert.Equal(t, 200, g.status)
		assert.NotContains(t, g.fields, "refresh_token", "the request had no offline_access")
	})
}

func TestFaults(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCaller(t, ClassA)
		ada, bob := c.s.Grant(c.id, "ada"), c.s.Grant(c.id, "bob")
		last := func() Call { calls := c.s.Calls(); return calls[len(calls)-1] }

		c.s.Inject(Fault{Times: 2, User: "bob", Answer: Unavailable(9 * time.Second)})
		_, ada = c.granted(ada)
		for range 2 {
			g := c.exchange(bob)
			assert.Equal(t, []any{503, "9"}, []any{g.status, g.header.Get("Retry-After")})
			assert.False(t, last().Processed)
		}
		c.granted(bob)

		c.s.Inject(Fault{Endpoint: EndpointRevocation, Times: 1, Answer: HTML})
		_, ada = c.granted(ada)
		assert.Equal(t, HTML.Body, c.revoke(ada).raw)
		require.True(t, c.s.RefreshTokenAlive(ada))

		c.s.Inject(Fault{Times: 1, Reset: true})
		assert.ErrorIs(t, c.exchange(ada).err, io.ErrUnexpectedEOF)
		require.True(t, c.s.RefreshTokenAlive(ada))
		assert.Equal(t, []any{0, false, ""}, []any{last().Status, last().Processed, last().AccessToken})

		c.s.Inject(Fault{Times: 1, Reset: true, Process: true})
		assert.ErrorIs(t, c.exchange(ada).err, io.ErrUnexpectedEOF)
		require.False(t, c.s.RefreshTokenAlive(ada))
		call := last()
		assert.Equal(t, []any{0, true, true, true, c.s.CurrentRefreshToken("ada")}, []any{call.Status, call.Processed, call.Granted(), call.Rotated, call.RefreshToken})
		ada = call.RefreshToken

		c.s.Inject(Fault{Times: 1, Process: true, Answer: BadGateway})
		assert.Equal(t, 502, c.exchange(ada).status)
		ada = last().RefreshToken

		c.s.Inject(Fault{Times: 1, Truncate: true})
		g := c.exchange(ada)
		assert.Equal(t, 200, g.status)
		assert.ErrorIs(t, g.err, io.ErrUnexpectedEOF)
		ada = last().RefreshToken
		c.s.Inject(Fault{Times: 1, TruncateQuietly: true, TruncateAt: 7})
		g = c.exchange(ada)
		require.NoError(t, g.err)
		assert.Len(t, g.raw, 7)
		ada = last().RefreshToken

		for _, process := range []bool{false, true} {
			c.s.Inject(Fault{Times: 1, Hang: true, Process: process})
			ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
			r := c.request(ctx, c.s.TokenURL(), "grant_type", "refresh_token", "refresh_token", ada)
			r.SetBasicAuth(c.id, c.secret)
			started := time.Now()
			g = c.do(r)
			cancel()
			assert.ErrorIs(t, g.err, context.DeadlineExceeded)
			assert.Equal(t, 3*time.Second, time.Since(started))
			assert.Equal(t, !process, c.s.RefreshTokenAlive(ada))
		}
		ada = last().RefreshToken

		for _, fault := range []Fault{{Hang: true}, {Hold: true}} {
			c.s.Inject(fault)
			done := make(chan got)
			go func() { done <- c.exchange(ada) }()
			synctest.Wait()
			assert.Equal(t, fault.Hang, c.s.RefreshTokenAlive(ada))
			c.s.ClearFaults()
			g = <-done
			assert.Equal(t, fault.Hang, errors.Is(g.err, io.ErrUnexpectedEOF))
		}
		ada = last().RefreshToken

		c.s.Inject(Fault{Times: 1, Delay: time.Minute})
		started := time.Now()
		c.granted(ada)
		assert.Equal(t, time.Minute, time.Since(started))
		assert.Equal(t, time.Minute, last().End.Sub(last().Start))
		assert.Zero(t, c.s.UsedTwice())

		c.s.Inject(Fault{Endpoint: EndpointMetadata, ClientID: "x", Reset: true})
		assert.Equal(t, 200, c.get(c.s.Issuer()+pathOAuth, "").status)
		c.s.ResetCalls()
		assert.Empty(t, c.s.Calls())
		assert.Equal(t, []int{0, 0}, []int{c.s.TotalExchanges(), c.s.MaxPerMinute(c.id)})
	})
}

func TestLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCaller(t, func(o *Options) { o.LimitPerMinute = 3 })
		rt := c.s.Grant(c.id, "ada")
		_, rt = c.granted(rt)
		time.Sleep(20 * time.Second)
		c.revoke("x")
		c.post(c.s.DeviceURL())
		c.get(c.s.Issuer()+pathOAuth, "")
		g := c.exchange(rt)
		assert.Equal(t, []any{429, "40"}, []any{g.status, g.header.Get("Retry-After")})
		c.s.Set(func(o *Options) { o.LimitReset = true })
		g = c.exchange(rt)
		assert.Equal(t, RateLimitReset(time.Now().Add(40*time.Second)).Header, g.header)
		assert.Equal(t, 5, c.s.MaxPerMinute(c.id))
		time.Sleep(40 * time.Second)
		_, rt = c.granted(rt)
		assert.Equal(t, 429, c.exchange(rt).status)
		other := *c
		other.id, other.secret = c.s.RegisterClient(AuthBasic)
		other.granted(c.s.Grant(other.id, "bob"))
	})
}

// TestSockets plays the flows over a socket, with the pages that people see.
func TestSockets(t *testing.T) {
	c := newCaller(t)
	ca, closeServer := c.s.ListenTLS()
	assert.Contains(t, ca, "BEGIN CERTIFICATE")
	assert.True(t, strings.HasPrefix(c.s.Issuer(), "https://127.0.0.1:"))
	closeServer()

	closeServer = c.s.Listen()
	defer closeServer()
	rt := &http.Transport{DisableKeepAlives: true}
	c.rt = rt
	defer rt.CloseIdleConnections()
	_, token := c.granted(c.s.Grant(c.id, "ada"))
	assert.Equal(t, c.s.TokenURL(), c.get(c.s.Issuer()+pathOpenID, "").fields["token_endpoint"])

	c.s.Inject(Fault{Times: 1, Reset: true, Process: true})
	assert.Error(t, c.exchange(token).err)
	assert.False(t, c.s.RefreshTokenAlive(token))
	c.s.Inject(Fault{Times: 1, Truncate: true})
	assert.ErrorIs(t, c.exchange(c.s.CurrentRefreshToken("ada")).err, io.ErrUnexpectedEOF)

	at := c.authorizationURL("login_hint", `"><script>`)
	g := c.get(at, "")
	assert.Equal(t, 200, g.status)
	assert.Contains(t, g.raw, `value="allow"`)
	assert.NotContains(t, g.raw, "<script>")
	g = c.do(c.request(t.Context(), at, "decision", "allow", "user", "ada"))
	assert.Equal(t, 303, g.status)
	to, err := url.Parse(g.header.Get("Location"))
	require.NoError(t, err)
	assert.Equal(t, 200, c.redeem(to.Query().Get("code")).status)
	assert.Contains(t, c.do(c.request(t.Context(), at, "decision", "deny")).header.Get("Location"), "error=access_denied")
	assert.Equal(t, 400, c.get(c.authorizationURL("client_id", "x"), "").status)
	assert.Contains(t, c.get(c.authorizationURL("response_type", "x"), "").header.Get("Location"), "unsupported_response_type")

	d := c.post(c.s.DeviceURL())
	assert.Contains(t, c.get(d.text("verification_uri_complete"), "").raw, `value="`+d.text("user_code")+`"`)
	g = c.do(c.request(t.Context(), c.s.VerificationURL(), "user_code", d.text("user_code"), "user", "bob", "decision", "allow"))
	assert.Contains(t, g.raw, "The device is connected")
	assert.Equal(t, 400, c.do(c.request(t.Context(), c.s.VerificationURL(), "user_code", "x", "decision", "deny")).status)
	assert.Equal(t, 200, c.post(c.s.TokenURL(), "grant_type", deviceGrant, "device_code", d.text("device_code")).status)
	assert.Equal(t, 404, c.get(c.s.Issuer()+"/nothing", "").status)
}
