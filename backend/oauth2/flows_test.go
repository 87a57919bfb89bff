package oauth2

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"net/url"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/tokenservice"
)

const (
	redirectURI = "https://vault.example.com/v1/kaizala/callback"
	verifier    = "verifier-verifier-verifier-verifier-verifier"
)

func challenge() string {
	sum := sha256.Sum256([]byte(verifier))
	return base64.RawURLEncoding.EncodeToString(sum[:])
}

func TestAuthorizationURL(t *testing.T) {
	request := tokenservice.AuthorizationRequest{
		RedirectURI: redirectURI, State: "st", Challenge: "ch", Scopes: []string{"a", "b"}, LoginHint: "ada@example.com",
	}
	with := func(more url.Values) url.Values {
		v := url.Values{
			"response_type": {"code"}, "client_id": {clientID}, "redirect_uri": {redirectURI}, "state": {"st"},
			"code_challenge": {"ch"}, "code_challenge_method": {"S256"},
		}
		for name, values := range more {
			v[name] = values
		}
		return v
	}
	for _, c := range []struct {
		name string
		edit func(*Config, *tokenservice.AuthorizationRequest)
		base string
		want url.Values
	}{
		{"all", nil, "https://as.example.com/authorize?", with(url.Values{"scope": {"a b"}, "login_hint": {"ada@example.com"}})},
		{"the least", func(_ *Config, r *tokenservice.AuthorizationRequest) { r.Scopes, r.LoginHint = nil, "" },
			"https://as.example.com/authorize?", with(nil)},
		{"parameters and a query", func(c *Config, r *tokenservice.AuthorizationRequest) {
			c.AuthorizationURL = "http://localhost:1/a?tenant=1&state=evil&prompt=none"
			c.AuthorizationParams = map[string]string{"prompt": "consent", "login_hint": "default"}
			c.TokenParams, c.Scopes = map[string]string{"audience": "x"}, []string{"c"}
			r.Scopes, r.LoginHint = nil, ""
		}, "http://localhost:1/a?", with(url.Values{"tenant": {"1"}, "prompt": {"consent"}, "login_hint": {"default"}})},
		{"login_hint of the request wins", func(c *Config, r *tokenservice.AuthorizationRequest) {
			c.AuthorizationParams, r.Scopes = map[string]string{"login_hint": "default"}, nil
		}, "https://as.example.com/authorize?", with(url.Values{"login_hint": {"ada@example.com"}})},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := request
			made := client(t, func(config *Config) {
				config.AuthorizationURL = "https://as.example.com/authorize"
				if c.edit != nil {
					c.edit(config, &r)
				}
			})
			for range 2 {
				got, err := made.AuthorizationURL(r)
				require.NoError(t, err)
				rest, ok := strings.CutPrefix(got, c.base)
				require.True(t, ok, got)
				query, err := url.ParseQuery(rest)
				require.NoError(t, err)
				require.Equal(t, c.want, query)
			}
		})
	}
	_, err := client(t, nil).AuthorizationURL(request)
	require.Contains(t, requireField(t, "authorization_url", err).Text, "is missing")
	_, err = client(t, func(c *Config) { c.AuthorizationURL, c.ClientID = "https://as.example.com", "" }).AuthorizationURL(request)
	requireField(t, "connector_id", err)
}

func TestIssuer(t *testing.T) {
	issuer, promised := client(t, nil).Issuer()
	require.Empty(t, issuer)
	require.False(t, promised)
	issuer, promised = client(t, func(c *Config) { c.Issuer, c.IssuerPromised = "https://As.example.com/", true }).Issuer()
	require.Equal(t, "https://As.example.com/", issuer)
	require.True(t, promised)
}

func TestRedeemCode(t *testing.T) {
	redeem := func(t *testing.T, s *server, edit func(*Config)) tokenservice.Result {
		p := &permits{}
		result := client(t, s.with(edit)).RedeemCode(t.Context(), tokenservice.CodeRedemption{
			Code: codeCanary, RedirectURI: redirectURI, Verifier: verifier, Permit: p.permit,
		})
		require.Equal(t, &permits{1, 1}, p)
		require.Len(t, s.requests, 1, "the code is sent once")
		return result
	}
	t.Run("granted", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s := &server{status: 200, body: body(map[string]any{
				"refresh_token": newCanary, "id_token": jwt(`{"sub":"42"}`), "refresh_token_expires_in": 100,
			})}
			result := redeem(t, s, func(c *Config) {
				c.AuthMethod, c.TokenParams = ClientSecretPost, map[string]string{"audience": "x"}
			})
			require.Equal(t, url.Values{
				"grant_type": {"authorization_code"}, "code": {codeCanary}, "redirect_uri": {redirectURI}, "code_verifier": {verifier},
				"client_id": {clientID}, "client_secret": {secretCanary}, "audience": {"x"},
			}, s.forms[0])
			require.Equal(t, tokenservice.Result{
				AccessToken:  &tokenservice.AccessToken{Token: accessCanary, Type: "Bearer", Expires: time.Now().Add(time.Hour).UTC()},
				RefreshToken: newCanary,
				Facts:        &tokenservice.Facts{Expires: time.Now().Add(100 * time.Second).UTC(), RotatesFrom: time.Now().Add(90 * time.Second).UTC()},
				Subject:      "42",
				Sent:         time.Now(),
			}, result)
		})
	})
	t.Run("no refresh token", func(t *testing.T) {
		result := redeem(t, &server{status: 200, body: body(map[string]any{"id_token": jwt(`{"sub":"42"}`), "refresh_expires_in": 100})}, nil)
		e := requireFailure(t, tokenservice.Refused, result.Err)
		require.Contains(t, e.Text, "offline_access")
		require.Contains(t, e.Text, "access_type=offline")
		require.Equal(t, accessCanary, result.AccessToken.Token, "so that it can be revoked")
		require.Nil(t, result.Facts)
		require.Empty(t, result.Subject)
	})
	t.Run("refused", func(t *testing.T) {
		result := redeem(t, &server{status: 400, body: `{"error":"invalid_grant","error_description":"` + codeCanary + `"}`}, nil)
		e := requireFailure(t, tokenservice.RefusedRefreshToken, result.Err)
		require.Equal(t, "The authorization server as.example.com refuses the authorization code (invalid_grant): it has been used, is too old, or belongs to another client or redirect_uri. Start the authorization again.", e.Text)
		require.Nil(t, result.AccessToken)
	})
	t.Run("refused for something else", func(t *testing.T) {
		result := redeem(t, &server{status: 400, body: `{"error":"invalid_request"}`}, nil)
		require.Contains(t, requireFailure(t, tokenservice.Refused, result.Err).Text, "says neither that the authorization code nor that the connector is wrong")
	})
	t.Run("lost", func(t *testing.T) {
		require.True(t, requireFailure(t, tokenservice.Unavailable, redeem(t, &server{err: errors.New(codeCanary)}, nil).Err).Lost)
	})
	t.Run("an access token that has expired", func(t *testing.T) {
		result := redeem(t, &server{status: 200, body: body(map[string]any{"refresh_token": newCanary, "expires_in": 0})}, nil)
		requireFailure(t, tokenservice.Unavailable, result.Err)
		require.Equal(t, newCanary, result.RefreshToken)
		require.Nil(t, result.AccessToken)
	})
}

// The whole code flow on the test server, with each way of authentication.
func TestCodeFlow(t *testing.T) {
	for _, method := range []string{oauth2test.AuthBasic, oauth2test.AuthPost, oauth2test.AuthNone} {
		synctest.Test(t, func(t *testing.T) {
			s := oauth2test.New()
			s.Set(oauth2test.OIDCProvider)
			id, secret := s.RegisterClient(method, redirectURI)
			c := client(t, func(c *Config) {
				c.ClientID, c.ClientSecret, c.AuthMethod = id, secret, method
				c.TokenURL, c.AuthorizationURL, c.Transport = s.TokenURL(), s.AuthorizationURL(), s.Transport()
			})
			run := func(verifier string, scopes ...string) tokenservice.Result {
				u, err := c.AuthorizationURL(tokenservice.AuthorizationRequest{RedirectURI: redirectURI, State: "st", Challenge: challenge(), Scopes: scopes})
				require.NoError(t, err)
				back, err := s.Approve(u, "ada")
				require.NoError(t, err)
				to, err := url.Parse(back)
				require.NoError(t, err)
				require.Equal(t, "st", to.Query().Get("state"))
				return c.RedeemCode(t.Context(), tokenservice.CodeRedemption{Code: to.Query().Get("code"), RedirectURI: redirectURI, Verifier: verifier})
			}
			result := run(verifier, "openid", "offline_access")
			require.NoError(t, result.Err)
			require.Equal(t, s.CurrentRefreshToken("ada"), result.RefreshToken)
			require.Contains(t, []string{oauth2test.Subject("ada"), oauth2test.Email("ada")}, result.Subject)
			requireFailure(t, tokenservice.RefusedRefreshToken, run("another-verifier-another-verifier-another-v", "offline_access").Err)
			requireFailure(t, tokenservice.Refused, run(verifier, "openid").Err)
		})
	}
}

func TestStartDevice(t *testing.T) {
	const url1, url2 = "https://as.example.com/device", "http://localhost:1/device?user_code=WDJB-MJHT"
	device := func(changes map[string]any) string {
		all := map[string]any{"access_token": nil, "token_type": nil, "device_code": codeCanary, "user_code": "WDJB-MJHT", "verification_uri": url1, "expires_in": 1800, "interval": 7}
		for name, value := range changes {
			all[name] = value
		}
		return body(all)
	}
	start := func(t *testing.T, s *server, edit func(*Config), r tokenservice.DeviceRequest) (*tokenservice.DeviceStart, error) {
		return client(t, s.with(func(c *Config) {
			c.DeviceAuthorizationURL = "https://as.example.com/device_authorization"
			if edit != nil {
				edit(c)
			}
		})).StartDevice(t.Context(), r)
	}
	t.Run("the request", func(t *testing.T) {
		s, p := &server{status: 200, body: device(nil)}, &permits{}
		_, err := start(t, s, func(c *Config) {
			c.AuthMethod, c.TokenParams, c.AuthorizationParams = ClientSecretPost, map[string]string{"a": "b"}, map[string]string{"c": "d"}
		}, tokenservice.DeviceRequest{Scopes: []string{"a", "b"}, LoginHint: "ada", Permit: p.permit})
		require.NoError(t, err)
		require.Equal(t, url.Values{"scope": {"a b"}, "login_hint": {"ada"}, "client_id": {clientID}, "client_secret": {secretCanary}}, s.forms[0])
		require.Equal(t, "https://as.example.com/device_authorization", s.requests[0].URL.String())
		require.Equal(t, &permits{1, 1}, p)
		_, err = start(t, s, func(c *Config) { c.AuthMethod, c.ClientSecret = NoSecret, "" }, tokenservice.DeviceRequest{})
		require.NoError(t, err)
		require.Equal(t, url.Values{"client_id": {clientID}}, s.forms[1])
	})
	for _, c := range []struct {
		name    string
		changes map[string]any
		change  func(*tokenservice.DeviceStart)
	}{
		{"the usual", nil, func(*tokenservice.DeviceStart) {}},
		{"all", map[string]any{"verification_uri_complete": url2}, func(d *tokenservice.DeviceStart) { d.VerificationURIComplete = url2 }},
		{"Google's", map[string]any{"verification_uri": nil, "verification_url": url1, "verification_url_complete": url2},
			func(d *tokenservice.DeviceStart) { d.VerificationURIComplete = url2 }},
		{"a complete URL that is none", map[string]any{"verification_uri_complete": "javascript:" + bodyCanary}, func(*tokenservice.DeviceStart) {}},
		{"a complete URL that cannot be shown", map[string]any{"verification_uri_complete": url2 + "\u202e"}, func(*tokenservice.DeviceStart) {}},
		{"no interval", map[string]any{"interval": nil}, func(d *tokenservice.DeviceStart) { d.Interval = 5 * time.Second }},
		{"an interval of 0", map[string]any{"interval": 0}, func(d *tokenservice.DeviceStart) { d.Interval = 5 * time.Second }},
		{"an interval as a string", map[string]any{"interval": "1"}, func(d *tokenservice.DeviceStart) { d.Interval = time.Second }},
		{"a long interval", map[string]any{"interval": 301}, func(d *tokenservice.DeviceStart) { d.Interval = 5 * time.Minute }},
		{"no end", map[string]any{"expires_in": nil}, func(d *tokenservice.DeviceStart) { d.Expires = time.Now().Add(10 * time.Minute).UTC() }},
		{"a far end", map[string]any{"expires_in": 86401}, func(d *tokenservice.DeviceStart) { d.Expires = time.Now().Add(24 * time.Hour).UTC() }},
		{"a long user code", map[string]any{"user_code": strings.Repeat("u", 64)}, func(d *tokenservice.DeviceStart) { d.UserCode = strings.Repeat("u", 64) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				got, err := start(t, &server{status: 200, body: device(c.changes)}, nil, tokenservice.DeviceRequest{})
				require.NoError(t, err)
				want := &tokenservice.DeviceStart{
					DeviceCode: codeCanary, UserCode: "WDJB-MJHT", VerificationURI: url1,
					Expires: time.Now().Add(30 * time.Minute).UTC(), Interval: 7 * time.Second,
				}
				c.change(want)
				require.Equal(t, want, got)
			})
		})
	}
	for name, changes := range map[string]map[string]any{
		"no device code":                 {"device_code": nil},
		"a device code with LF":          {"device_code": codeCanary + "\nx"},
		"no user code":                   {"user_code": nil},
		"a user code that is too long":   {"user_code": strings.Repeat("u", 65)},
		"a user code with BEL":           {"user_code": "a\ab"},
		"no verification_uri":            {"verification_uri": nil},
		"a verification_uri without TLS": {"verification_uri": "http://as.example.com"},
		"a verification_uri with CSI":    {"verification_uri": "https://as.example.com/\u009b2J"},
		"a verification_uri with spaces": {"verification_uri": "https://as.example.com/a b"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := start(t, &server{status: 200, body: device(changes)}, nil, tokenservice.DeviceRequest{})
			e := requireFailure(t, tokenservice.Unavailable, err)
			require.Equal(t, 200, e.Status)
			require.Contains(t, e.Text, "its device_code, user_code or verification_uri")
		})
	}
	for _, c := range []struct {
		status int
		body   string
		kind   tokenservice.Kind
		text   string
	}{
		{401, `{"error":"invalid_client"}`, tokenservice.Refused, "refuses connector_id for the device flow (invalid_client)"},
		{400, `{"error":"invalid_scope"}`, tokenservice.Refused, "says neither that the tenant nor that the connector is wrong"},
		{400, `{"error":"invalid_grant"}`, tokenservice.Refused, "invalid_grant"},
		{404, `<html>`, tokenservice.Unavailable, "device_authorization_url"},
		{429, ``, tokenservice.Limited, "no further calls"},
		{400, `{"error":"slow_down"}`, tokenservice.Limited, "no further calls"},
		{200, `<html>`, tokenservice.Unavailable, "neither JSON nor a form"},
	} {
		_, err := start(t, &server{status: c.status, body: c.body}, nil, tokenservice.DeviceRequest{})
		require.Contains(t, requireFailure(t, c.kind, err).Text, c.text)
	}
	_, err := start(t, &server{err: errors.New(bodyCanary)}, nil, tokenservice.DeviceRequest{})
	require.Contains(t, requireFailure(t, tokenservice.Unavailable, err).Text, "closed the connection too early")
	no := errors.New("no")
	_, err = start(t, &server{}, nil, tokenservice.DeviceRequest{Permit: func(context.Context) (func(), error) { return nil, no }})
	require.Equal(t, no, err)
	_, err = client(t, nil).StartDevice(t.Context(), tokenservice.DeviceRequest{})
	require.Contains(t, requireField(t, "device_authorization_url", err).Text, "is missing")
	_, err = start(t, &server{}, func(c *Config) { c.ClientSecret = "" }, tokenservice.DeviceRequest{})
	requireField(t, "connector_secret", err)
}

func TestPollDevice(t *testing.T) {
	poll := func(t *testing.T, s *server) tokenservice.Result {
		return client(t, s.with(func(c *Config) { c.AuthMethod, c.TokenParams = ClientSecretPost, map[string]string{"a": "b"} })).
			PollDevice(t.Context(), codeCanary, nil)
	}
	s := &server{status: 200, body: body(map[string]any{"refresh_token": newCanary, "id_token": jwt(`{"sub":"42"}`)})}
	result := poll(t, s)
	require.NoError(t, result.Err)
	require.Equal(t, accessCanary, result.AccessToken.Token)
	require.Equal(t, newCanary, result.RefreshToken)
	require.Equal(t, "42", result.Subject)
	require.Equal(t, url.Values{
		"grant_type": {"urn:ietf:params:oauth:grant-type:device_code"}, "device_code": {codeCanary},
		"client_id": {clientID}, "client_secret": {secretCanary}, "a": {"b"},
	}, s.forms[0])

	result = poll(t, &server{status: 200, body: body(nil)})
	requireFailure(t, tokenservice.Refused, result.Err)
	require.Equal(t, accessCanary, result.AccessToken.Token)

	for _, c := range []struct {
		status int
		code   string
		kind   tokenservice.Kind
		text   string
	}{
		{400, "authorization_pending", tokenservice.Pending, "waits for a person to enter the code."},
		{200, "authorization_pending", tokenservice.Pending, "waits"},
		{428, "authorization_pending", tokenservice.Pending, "waits"},
		{400, "slow_down", tokenservice.SlowDown, "waits"},
		{429, "slow_down", tokenservice.SlowDown, "waits"},
		{400, "access_denied", tokenservice.Denied, "access was denied"},
		{403, "authorization_declined", tokenservice.Denied, "access was denied"},
		{400, "expired_token", tokenservice.Expired, "the time for entering the code is over"},
		{400, "invalid_grant", tokenservice.RefusedRefreshToken, "refuses the device code (invalid_grant). Start the device authorization again."},
		{401, "invalid_client", tokenservice.RefusedConnector, "refuses the connector"},
		{400, "invalid_request", tokenservice.Refused, "says neither that the device code nor that the connector is wrong"},
		{429, "", tokenservice.Limited, "no further calls"},
		{503, "", tokenservice.Unavailable, "is failing"},
	} {
		result := poll(t, &server{status: c.status, body: `{"error":"` + c.code + `"}`})
		e := requireFailure(t, c.kind, result.Err)
		require.Contains(t, e.Text, c.text)
		require.Equal(t, c.code, e.Code)
		require.Equal(t, c.status, e.Status)
		require.Nil(t, result.AccessToken)
	}
}

// The whole device flow on the test server.
func TestDeviceFlow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := oauth2test.New()
		s.Set(func(o *oauth2test.Options) { o.VerificationURL = true })
		id, secret := s.RegisterClient(oauth2test.AuthBasic)
		c := client(t, func(c *Config) {
			c.ClientID, c.ClientSecret = id, secret
			c.TokenURL, c.DeviceAuthorizationURL, c.Transport = s.TokenURL(), s.DeviceURL(), s.Transport()
		})
		begin := func() *tokenservice.DeviceStart {
			start, err := c.StartDevice(t.Context(), tokenservice.DeviceRequest{Scopes: []string{"openid", "offline_access"}})
			require.NoError(t, err)
			require.Equal(t, s.VerificationURL(), start.VerificationURI)
			require.Equal(t, oauth2test.DefaultDeviceInterval, start.Interval)
			time.Sleep(start.Interval)
			return start
		}
		start := begin()
		requireFailure(t, tokenservice.Pending, c.PollDevice(t.Context(), start.DeviceCode, nil).Err)
		requireFailure(t, tokenservice.SlowDown, c.PollDevice(t.Context(), start.DeviceCode, nil).Err)
		require.NoError(t, s.ApproveDevice(start.UserCode, "ada"))
		time.Sleep(2 * start.Interval)
		result := c.PollDevice(t.Context(), start.DeviceCode, nil)
		require.NoError(t, result.Err)
		require.Equal(t, s.CurrentRefreshToken("ada"), result.RefreshToken)

		start = begin()
		require.NoError(t, s.DenyDevice(start.UserCode))
		requireFailure(t, tokenservice.Denied, c.PollDevice(t.Context(), start.DeviceCode, nil).Err)
		start = begin()
		time.Sleep(time.Until(start.Expires) + time.Second)
		requireFailure(t, tokenservice.Expired, c.PollDevice(t.Context(), start.DeviceCode, nil).Err)
	})
}

func TestRevoke(t *testing.T) {
	revocable := func(c *Config) { c.RevocationURL = "https://revoke.example.com/revoke?x=y" }
	revoke := func(t *testing.T, s *server) error {
		return client(t, s.with(revocable)).Revoke(t.Context(), accessCanary, tokenservice.TypeAccessToken, nil)
	}
	t.Run("the request", func(t *testing.T) {
		s, p := &server{status: 200}, &permits{}
		c := client(t, s.with(func(c *Config) {
			revocable(c)
			c.AuthMethod, c.TokenParams = ClientSecretPost, map[string]string{"a": "b"}
		}))
		require.NoError(t, c.Revoke(t.Context(), refreshCanary, tokenservice.TypeRefreshToken, p.permit))
		require.Len(t, s.requests, 1)
		require.Equal(t, "https://revoke.example.com/revoke?x=y", s.requests[0].URL.String())
		require.Equal(t, url.Values{
			"token": {refreshCanary}, "token_type_hint": {"refresh_token"}, "client_id": {clientID}, "client_secret": {secretCanary},
		}, s.forms[0])
		require.Equal(t, &permits{1, 1}, p)
	})
	bearer := func(v ...string) map[string][]string { return map[string][]string{"Www-Authenticate": v} }
	for name, s := range map[string]*server{
		"200":                     {status: 200},
		"200 with anything":       {status: 200, body: `{"error":"invalid_client"}`},
		"200 cut off":             {status: 200, body: "x", cut: true},
		"204":                     {status: 204},
		"404":                     {status: 404, body: "<html>"},
		"404 cut off":             {status: 404, cut: true},
		"410":                     {status: 410},
		"invalid_token":           {status: 400, body: `{"error":"invalid_token"}`},
		"invalid_token as a form": {status: 400, body: `error=INVALID_TOKEN`},
		"invalid_grant":           {status: 400, body: `{"error":"invalid_grant"}`},
		"token_revoked":           {status: 400, body: `{"ok":false,"error":"token_revoked"}`},
		"a challenge":             {status: 401, header: bearer(`Basic realm="x"`, `Bearer error="invalid_token"`)},
		"a challenge beside HTML": {status: 400, header: bearer(`Bearer error=invalid_token`), body: `<html>`},
		"a challenge beside JSON": {status: 400, header: bearer(`Bearer error=Invalid_Token`), body: `{"message":"x"}`},
		"a challenge beside half": {status: 400, header: bearer(`Bearer error=invalid_token`), body: `{"error":"invalid_client"`},
	} {
		t.Run(name, func(t *testing.T) { require.NoError(t, revoke(t, s)) })
	}
	for _, c := range []struct {
		name string
		s    server
		kind tokenservice.Kind
		text string
	}{
		{"unsupported", server{status: 400, body: `{"error":"unsupported_token_type"}`}, tokenservice.Unsupported,
			"The authorization server as.example.com cannot revoke tokens of this type (unsupported_token_type). They work until they expire."},
		{"unsupported at 503", server{status: 503, body: `{"error":"unsupported_token_type"}`}, tokenservice.Unsupported, ""},
		{"client", server{status: 401, body: `{"error":"invalid_client"}`}, tokenservice.RefusedConnector, "refuses the connector (invalid_client)"},
		{"client, whatever the challenge", server{status: 401, body: `{"error":"invalid_client"}`, header: bearer(`Bearer error="invalid_token"`)},
			tokenservice.RefusedConnector, ""},
		{"request", server{status: 400, body: `{"error":"invalid_request"}`}, tokenservice.Refused, "says neither that the token nor that the connector is wrong"},
		{"unknown", server{status: 400, body: `{"error":"` + bodyCanary + `"}`}, tokenservice.Refused, ""},
		{"forbidden", server{status: 403, body: `<html>`}, tokenservice.Unavailable, "revocation_url"},
		{"another challenge", server{status: 401, header: bearer(`Basic realm="invalid_token"`)}, tokenservice.Unavailable, ""},
		{"a redirect", server{status: 301, header: bearer(`Bearer error="invalid_token"`)}, tokenservice.Unavailable, "check revocation_url"},
		{"an outage", server{status: 503, body: `{"error":"x"}`, header: bearer(`Bearer error="invalid_token"`)}, tokenservice.Unavailable, "is failing"},
		{"half an invalid_token in an outage", server{status: 500, body: `{"error":"invalid_token"`}, tokenservice.Unavailable, "is failing"},
		{"a limit", server{status: 429}, tokenservice.Limited, ""},
		{"no answer", server{err: errors.New(bodyCanary)}, tokenservice.Unavailable, "The authorization server revoke.example.com closed the connection too early"},
	} {
		t.Run(c.name, func(t *testing.T) {
			require.Contains(t, requireFailure(t, c.kind, revoke(t, &c.s)).Text, c.text)
		})
	}
	t.Run("Retry-After", func(t *testing.T) {
		s := &server{status: 503, header: map[string][]string{"Retry-After": {"17"}}}
		require.Equal(t, 17*time.Second, requireFailure(t, tokenservice.Unavailable, revoke(t, s)).RetryAfter)
	})
	t.Run("no URL", func(t *testing.T) {
		err := client(t, nil).Revoke(t.Context(), accessCanary, tokenservice.TypeAccessToken, nil)
		require.Contains(t, requireFailure(t, tokenservice.Unsupported, err).Text, "revocation_url is missing")
	})
	t.Run("no permit", func(t *testing.T) {
		no := errors.New("no")
		err := client(t, revocable).Revoke(t.Context(), accessCanary, tokenservice.TypeAccessToken, func(context.Context) (func(), error) { return nil, no })
		require.Equal(t, no, err)
	})
	t.Run("given up", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		require.ErrorIs(t, client(t, revocable).Revoke(ctx, accessCanary, tokenservice.TypeAccessToken, nil), context.Canceled)
	})
	t.Run("on the test server", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s := oauth2test.New()
			id, secret := s.RegisterClient(oauth2test.AuthBasic)
			c := client(t, func(c *Config) {
				c.ClientID, c.ClientSecret, c.TokenURL, c.RevocationURL, c.Transport = id, secret, s.TokenURL(), s.RevocationURL(), s.Transport()
			})
			result := c.Exchange(t.Context(), tokenservice.Exchange{RefreshToken: s.Grant(id, "ada")})
			require.NoError(t, result.Err)
			for range 2 {
				require.NoError(t, c.Revoke(t.Context(), result.AccessToken.Token, tokenservice.TypeAccessToken, nil))
				require.False(t, s.Alive(result.AccessToken.Token))
			}
			require.True(t, s.RefreshTokenAlive(result.RefreshToken))
			require.NoError(t, c.Revoke(t.Context(), result.RefreshToken, tokenservice.TypeRefreshToken, nil))
			require.False(t, s.RefreshTokenAlive(result.RefreshToken))
			s.Set(oauth2test.ClassC)
			result = c.Exchange(t.Context(), tokenservice.Exchange{RefreshToken: s.Grant(id, "bob")})
			requireFailure(t, tokenservice.Unsupported, c.Revoke(t.Context(), result.AccessToken.Token, tokenservice.TypeAccessToken, nil))
		})
	})
}

func TestChallengeError(t *testing.T) {
	for header, want := range map[string]string{
		``:                                     "",
		`Bearer`:                               "",
		`Bearer error="invalid_token"`:         "invalid_token",
		`Bearer error=invalid_token`:           "invalid_token",
		`Bearer ERROR = "invalid_token" , x=y`: "invalid_token",
		`Bearer error	=	"invalid_token"`:       "invalid_token",
		`Bearer realm="a, error=\"no\"", error="b"`: "b",
		`Bearer realm="error=no\\", error="b\"c\d"`: `b"cd`,
		`Basic YWJj=, Bearer error="x"`:             "x",
		`Basic YWJj==, Bearer error="x"`:            "x",
		`Negotiate, Bearer scope="a b" error="x"`:   "x",
		`Bearer xerror="a", error_description="b"`:  "",
		`Bearer error="first", error="second"`:      "first",
		`Bearer error=""`:                           "",
		`Bearer error="open`:                        "",
		`Bearer error="open\`:                       "",
		`Bearer realm="open, error="x"`:             "",
		`"error="x", Bearer error="y"`:              "",
		`"error=\"x", Bearer error="y"`:             "y",
		`;;é Bearer error="x"`:                      "x",
		`=error="x"`:                                "x",
		`éerror="x"`:                                "x",
		`~error="x"`:                                "",
		`error`:                                     "",
		`error=`:                                    "",
	} {
		require.Equal(t, want, challengeError([]string{header}), header)
	}
	require.Equal(t, "x", challengeError([]string{"Basic", `Bearer error="x"`, `Bearer error="y"`}))
	require.Empty(t, challengeError(nil))
}
