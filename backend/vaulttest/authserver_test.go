package vaulttest

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// tokenAnswer is the answer of a token endpoint.
type tokenAnswer struct {
	AccessToken  string  `json:"access_token"`
	RefreshToken string  `json:"refresh_token"`
	IDToken      string  `json:"id_token"`
	ExpiresIn    float64 `json:"expires_in"`
	Scope        string  `json:"scope"`
	Error        string  `json:"error"`
}

func exchange(t *testing.T, s *AuthServer, refreshToken string) (int, tokenAnswer) {
	t.Helper()
	var a tokenAnswer
	status := s.Post(t, s.TokenURL, url.Values{"grant_type": {"refresh_token"}, "refresh_token": {refreshToken}}, &a)
	return status, a
}

func exchanged(t *testing.T, s *AuthServer, refreshToken string) tokenAnswer {
	t.Helper()
	status, a := exchange(t, s, refreshToken)
	require.Equal(t, http.StatusOK, status, a.Error)
	require.NotEmpty(t, a.AccessToken)
	return a
}

func refusedExchange(t *testing.T, s *AuthServer, refreshToken string) {
	t.Helper()
	status, a := exchange(t, s, refreshToken)
	require.Equal(t, http.StatusBadRequest, status)
	require.Equal(t, "invalid_grant", a.Error)
}

func revoke(t *testing.T, s *AuthServer, token string) (int, string) {
	t.Helper()
	var a tokenAnswer
	status := s.Post(t, s.RevocationURL, url.Values{"token": {token}, "token_type_hint": {"access_token"}}, &a)
	return status, a.Error
}

// TestAuthServers checks the behaviours in which the servers differ and that the engine has to know: OAUTH.md's classes.
func TestAuthServers(t *testing.T) {
	start := map[string]func(testing.TB, ...string) *AuthServer{"zitadel": StartZitadel, "oidc-provider": StartOIDCProvider}
	for _, c := range []struct {
		name, server string
		settings     []string
		expiresIn    float64 // expires_in of the first exchange's answer
		rotates      bool
		superseded   bool // an exchange ends the access token before it
		familyDies   bool // a replaced refresh token that comes again ends the grant
		revokes      string
	}{
		{"class D", "zitadel", nil, 299, true, true, false, "alone"},
		{"class A", "oidc-provider", []string{"REVOKE_CASCADE=access-only"}, 3600, true, false, true, "alone"},
		{"class B", "oidc-provider", nil, 3600, true, false, true, "grant"},
		{"class B without rotation", "oidc-provider", []string{"ROTATE=never"}, 3600, false, false, false, "grant"},
		{"class C", "oidc-provider", []string{"ACCESS_FORMAT=jwt"}, 3600, true, false, true, "unsupported"},
		{"rotation by the library's rule", "oidc-provider", []string{"ROTATE=default", "REVOKE_CASCADE=access-only"}, 3600, false, false, false, "alone"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := start[c.server](t, c.settings...)

			first := s.Mint(t)
			a1 := exchanged(t, s, first)
			require.Equal(t, c.expiresIn, a1.ExpiresIn)
			require.True(t, s.Alive(t, a1.AccessToken))
			current := first
			if c.rotates {
				require.NotEmpty(t, a1.RefreshToken)
				require.NotEqual(t, first, a1.RefreshToken)
				current = a1.RefreshToken
			} else {
				require.Contains(t, []string{"", first}, a1.RefreshToken)
			}
			a2 := exchanged(t, s, current)
			if c.rotates {
				current = a2.RefreshToken
			}
			require.NotEqual(t, a1.AccessToken, a2.AccessToken)
			require.Equal(t, !c.superseded, s.Alive(t, a1.AccessToken))
			require.True(t, s.Alive(t, a2.AccessToken))
			require.Equal(t, 2, s.Stats(t).Exchanges)
			require.Zero(t, s.Stats(t).Refused)
			require.Equal(t, 1, s.Stats(t).LiveGrants)

			status, code := revoke(t, s, a2.AccessToken)
			stats := s.Stats(t)
			switch c.revokes {
			case "alone":
				require.Equal(t, http.StatusOK, status)
				require.False(t, s.Alive(t, a2.AccessToken))
				require.Equal(t, !c.superseded, s.Alive(t, a1.AccessToken))
				require.Equal(t, 1, stats.RevokedAccessTokens)
				require.Equal(t, 1, stats.LiveGrants)
				a3 := exchanged(t, s, current)
				if c.rotates {
					current = a3.RefreshToken
				}
			case "grant":
				require.Equal(t, http.StatusOK, status)
				require.False(t, s.Alive(t, a2.AccessToken))
				require.False(t, s.Alive(t, a1.AccessToken))
				require.Equal(t, 1, stats.RevokedAccessTokens)
				require.Zero(t, stats.LiveGrants)
				refusedExchange(t, s, current)
				require.Equal(t, 1, s.Stats(t).Refused)
				require.Zero(t, s.Stats(t).Reused, "the refresh token was never replaced")
				current = ""
			case "unsupported":
				require.Equal(t, http.StatusBadRequest, status)
				require.Equal(t, "unsupported_token_type", code)
				require.True(t, s.Alive(t, a2.AccessToken))
				require.Equal(t, 1, stats.LiveGrants)
			}
			status, _ = revoke(t, s, "never heard of")
			require.Equal(t, http.StatusOK, status)
			require.Equal(t, 1, s.Stats(t).RevokedOther)

			if current != "" && c.rotates {
				refusedExchange(t, s, first)
				require.Equal(t, 1, s.Stats(t).Reused)
				require.Equal(t, 1, s.Stats(t).Refused)
				if c.familyDies {
					require.Zero(t, s.Stats(t).LiveGrants)
					refusedExchange(t, s, current)
					require.Equal(t, 1, s.Stats(t).Reused)
				} else {
					require.Equal(t, 1, s.Stats(t).LiveGrants)
					exchanged(t, s, current)
				}
			}

			// The revocation of a refresh token ends its own grant, and not another one.
			one, other := exchanged(t, s, s.Mint(t)), exchanged(t, s, s.Mint(t))
			if c.rotates {
				before := s.Stats(t).LiveGrants
				var a tokenAnswer
				require.Equal(t, http.StatusOK, s.Post(t, s.RevocationURL, url.Values{"token": {one.RefreshToken}}, &a), a.Error)
				require.Equal(t, 1, s.Stats(t).RevokedRefreshTokens)
				require.Equal(t, before-1, s.Stats(t).LiveGrants)
				refusedExchange(t, s, one.RefreshToken)
				if c.revokes != "unsupported" {
					require.False(t, s.Alive(t, one.AccessToken))
				}
				exchanged(t, s, other.RefreshToken)
			}
		})
	}
}

// The servers count revocations of expired tokens, and this is what such a revocation does there.
func TestAuthServersRevokeEndedTokens(t *testing.T) {
	for name, start := range map[string]func(testing.TB, ...string) *AuthServer{"zitadel": StartZitadel, "oidc-provider": StartOIDCProvider} {
		t.Run(name, func(t *testing.T) {
			s := start(t, "ACCESS_TTL=2")
			began := time.Now()
			a := exchanged(t, s, s.Mint(t))
			require.LessOrEqual(t, a.ExpiresIn, 2.0)
			Eventually(t, "the access token to end", func() bool { return !s.Alive(t, a.AccessToken) })
			require.Greater(t, time.Since(began), time.Second)
			require.Less(t, time.Since(began), 4*time.Second)
			require.Zero(t, s.Stats(t).LiveAccessTokens)

			status, _ := revoke(t, s, a.AccessToken)
			require.Equal(t, http.StatusOK, status)
			require.Equal(t, 1, s.Stats(t).RevokedEnded)
			require.Zero(t, s.Stats(t).RevokedAccessTokens)
			if name == "oidc-provider" { // for 15 seconds after the end
				require.Zero(t, s.Stats(t).LiveGrants)
				refusedExchange(t, s, a.RefreshToken)
			} else {
				require.Equal(t, 1, s.Stats(t).LiveGrants)
				exchanged(t, s, a.RefreshToken)
			}
		})
	}
}

func TestAuthServersCodeFlow(t *testing.T) {
	const redirect = "http://127.0.0.1:1/v1/kaizala/callback"
	for name, start := range map[string]func(testing.TB, ...string) *AuthServer{"zitadel": StartZitadel, "oidc-provider": StartOIDCProvider} {
		t.Run(name, func(t *testing.T) {
			s := start(t, "REDIRECT_URIS=http://127.0.0.1:1/other "+redirect)
			verifier := rand.Text() + rand.Text()
			challenge := sha256.Sum256([]byte(verifier))
			query := url.Values{
				"response_type": {"code"}, "client_id": {s.ClientID}, "redirect_uri": {redirect}, "state": {"a state"},
				"scope": {"openid offline_access"}, "prompt": {"consent"},
				"code_challenge": {base64.RawURLEncoding.EncodeToString(challenge[:])}, "code_challenge_method": {"S256"},
			}
			consent := func() url.Values {
				t.Helper()
				back, err := url.Parse(s.Consent(t, s.AuthorizationURL+"?"+query.Encode()))
				require.NoError(t, err)
				require.Equal(t, "127.0.0.1:1", back.Host)
				require.Equal(t, "a state", back.Query().Get("state"))
				require.NotEmpty(t, back.Query().Get("code"))
				return back.Query()
			}
			form := func(code, verifier string) url.Values {
				return url.Values{"grant_type": {"authorization_code"}, "code": {code}, "redirect_uri": {redirect}, "code_verifier": {verifier}}
			}

			back := consent()
			if name == "zitadel" {
				require.False(t, back.Has("iss"))
			} else {
				require.Equal(t, s.Issuer, back.Get("iss"))
			}
			var a tokenAnswer
			status := s.Post(t, s.TokenURL, form(back.Get("code"), verifier), &a)
			require.Equal(t, http.StatusOK, status, a.Error)
			require.NotEmpty(t, a.RefreshToken)
			require.NotEmpty(t, a.IDToken)
			status, subject := s.Userinfo(t, a.AccessToken)
			require.Equal(t, http.StatusOK, status)
			require.Equal(t, s.User, subject)
			exchanged(t, s, a.RefreshToken)

			// A verifier that does not match the challenge.
			a = tokenAnswer{}
			require.Equal(t, http.StatusBadRequest, s.Post(t, s.TokenURL, form(consent().Get("code"), rand.Text()+rand.Text()), &a))
			require.Equal(t, "invalid_grant", a.Error)

			// Without offline_access there is no refresh token.
			query.Set("scope", "openid")
			a = tokenAnswer{}
			require.Equal(t, http.StatusOK, s.Post(t, s.TokenURL, form(consent().Get("code"), verifier), &a), a.Error)
			require.NotEmpty(t, a.AccessToken)
			require.Empty(t, a.RefreshToken)

			if name == "oidc-provider" {
				query.Set("scope", "openid offline_access")
				back, err := url.Parse(s.Deny(t, s.AuthorizationURL+"?"+query.Encode()))
				require.NoError(t, err)
				require.Equal(t, "access_denied", back.Query().Get("error"))
				require.Equal(t, s.Issuer, back.Query().Get("iss"))

				query.Del("prompt")
				a = tokenAnswer{}
				require.Equal(t, http.StatusOK, s.Post(t, s.TokenURL, form(consent().Get("code"), verifier), &a), a.Error)
				require.Empty(t, a.RefreshToken, "no refresh token without prompt=consent")
			}
		})
	}
}

func TestAuthServersDeviceFlow(t *testing.T) {
	for name, start := range map[string]func(testing.TB, ...string) *AuthServer{"zitadel": StartZitadel, "oidc-provider": StartOIDCProvider} {
		t.Run(name, func(t *testing.T) {
			s := start(t)
			begin := func() (deviceCode, userCode string) {
				t.Helper()
				var d struct {
					DeviceCode string  `json:"device_code"`
					UserCode   string  `json:"user_code"`
					URI        string  `json:"verification_uri"`
					Complete   string  `json:"verification_uri_complete"`
					ExpiresIn  float64 `json:"expires_in"`
					Interval   float64 `json:"interval"`
				}
				// oidc-provider requires the client's ID in the form too, as RFC 8628 does for clients that do not authenticate.
				require.Equal(t, http.StatusOK, s.Post(t, s.DeviceAuthorizationURL, url.Values{"scope": {"openid offline_access"}}, &d))
				require.NotEmpty(t, d.DeviceCode)
				require.Equal(t, s.VerificationURL, d.URI)
				require.Equal(t, s.VerificationURL+"?user_code="+d.UserCode, d.Complete)
				require.Positive(t, d.ExpiresIn)
				t.Logf("interval %v, expires_in %v", d.Interval, d.ExpiresIn)
				return d.DeviceCode, d.UserCode
			}
			poll := func(deviceCode string) (int, tokenAnswer) {
				t.Helper()
				var a tokenAnswer
				status := s.Post(t, s.TokenURL, url.Values{
					"grant_type": {"urn:ietf:params:oauth:grant-type:device_code"}, "device_code": {deviceCode},
				}, &a)
				return status, a
			}

			deviceCode, userCode := begin()
			status, a := poll(deviceCode)
			require.Equal(t, http.StatusBadRequest, status)
			require.Equal(t, "authorization_pending", a.Error)
			s.DeviceApprove(t, userCode)
			status, a = poll(deviceCode)
			require.Equal(t, http.StatusOK, status, a.Error)
			status, subject := s.Userinfo(t, a.AccessToken)
			require.Equal(t, http.StatusOK, status)
			require.Equal(t, s.User, subject)
			require.Equal(t, 1, s.Stats(t).LiveGrants)
			exchanged(t, s, exchanged(t, s, a.RefreshToken).RefreshToken)

			deviceCode, userCode = begin()
			s.DeviceDeny(t, userCode)
			status, a = poll(deviceCode)
			require.Equal(t, http.StatusBadRequest, status)
			require.Equal(t, "access_denied", a.Error)
		})
	}
}

// A server keeps two thousand grants, most of them long unused: a test with many tenants must not lose a grant at the server.
func TestAuthServersForgetNothing(t *testing.T) {
	for name, start := range map[string]func(testing.TB, ...string) *AuthServer{"zitadel": StartZitadel, "oidc-provider": StartOIDCProvider} {
		t.Run(name, func(t *testing.T) {
			s := start(t)
			oldest := s.Mint(t)
			n := 2000
			if testing.Short() {
				n = 20
			}
			for range n {
				s.Mint(t)
			}
			require.Equal(t, n+1, s.Stats(t).LiveGrants)
			exchanged(t, s, oldest)
		})
	}
}

func TestAuthServersEndWithTheirTest(t *testing.T) {
	var group int
	t.Run("inner", func(t *testing.T) {
		s := StartZitadel(t)
		group = s.proc.cmd.Process.Pid
		require.True(t, groupRuns(group))
	})
	require.False(t, groupRuns(group))
}

// The script has a status of its own if node is missing or too old.
func TestAuthServerScriptWithoutNode(t *testing.T) {
	root, err := Root()
	require.NoError(t, err)
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "node"), []byte("#!/bin/sh\necho v18.20.4\n"), 0o755))
	cmd := exec.Command(filepath.Join(root, "scripts", "authserver.sh"), "oidc-provider")
	cmd.Env = append(os.Environ(), "PATH="+dir+string(os.PathListSeparator)+os.Getenv("PATH"))
	out, err := cmd.CombinedOutput()
	require.Error(t, err)
	require.Equal(t, 3, cmd.ProcessState.ExitCode())
	require.Contains(t, string(out), "oidc-provider needs node 20 or later")
}
