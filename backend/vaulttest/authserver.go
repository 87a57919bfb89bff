package vaulttest

import (
	"bytes"
	"cmp"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-cleanhttp"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/vaulttest/browser"
)

// AuthServer is an OAuth 2.0 authorization server of another project, which runs on loopback until the test ends. It has
// one client, which may use the code flow, the device flow and refresh tokens, and keeps everything in memory.
type AuthServer struct {
	Name                   string `json:"-"` // "zitadel" or "oidc-provider"
	LogFile                string `json:"-"` // standard output and standard error
	Issuer                 string `json:"issuer"`
	AuthorizationURL       string `json:"authorization_endpoint"`
	TokenURL               string `json:"token_endpoint"`
	RevocationURL          string `json:"revocation_endpoint"`
	IntrospectionURL       string `json:"introspection_endpoint"`
	UserinfoURL            string `json:"userinfo_endpoint"`
	DeviceAuthorizationURL string `json:"device_authorization_endpoint"`
	VerificationURL        string `json:"verification_uri"` // where a person types a user code
	ClientID               string `json:"client_id"`
	ClientSecret           string `json:"client_secret"` // has characters that Basic authentication must encode
	User                   string `json:"user"`          // the user who logs in and consents, and who has the grants of Mint
	Password               string `json:"password"`
	MintURL                string `json:"mint"`
	StatsURL               string `json:"stats"`

	http *http.Client // follows no redirect
	proc *process
}

// AuthServerStats is what a server has counted since its start.
type AuthServerStats struct {
	Exchanges            int `json:"exchanges"`              // refresh tokens exchanged
	Refused              int `json:"refused"`                // exchanges refused for their refresh token, Reused included
	Reused               int `json:"reused"`                 // exchanges with a refresh token that an earlier one had replaced
	RevokedAccessTokens  int `json:"revoked_access_tokens"`  // revocations of an access token that was valid until then
	RevokedRefreshTokens int `json:"revoked_refresh_tokens"` // revocations of a refresh token that was valid until then
	RevokedEnded         int `json:"revoked_ended"`          // revocations of an expired access token
	RevokedOther         int `json:"revoked_other"`          // revocations of an unknown token, or one that was ended before it expired
	LiveGrants           int `json:"live_grants"`            // refresh tokens that can be exchanged now
	LiveAccessTokens     int `json:"live_access_tokens"`     // access tokens that are valid now; 0 if they are JWTs
}

// StartZitadel starts zitadel/oidc's example server: each exchange replaces the refresh token and ends the access token
// before it; a replaced refresh token is refused, and its grant lives on; the revocation of an access token ends that token
// alone; redirects have no iss. Access tokens live 5 minutes.
//
// Settings are "NAME=value": ACCESS_TTL in seconds (300 at most), REDIRECT_URIS separated by spaces, CLIENT_ID,
// CLIENT_SECRET.
func StartZitadel(t testing.TB, settings ...string) *AuthServer {
	t.Helper()
	return startAuthServer(t, "zitadel", found(t, zitadelOnce), settings)
}

// StartOIDCProvider starts npm's oidc-provider: each exchange replaces the refresh token and leaves older access tokens
// valid; a replaced refresh token that comes again ends its grant and all its tokens, and so does the revocation of an
// access token; redirects have iss; PKCE is required, and a refresh token comes only for the scope offline_access with
// prompt=consent. Access tokens live an hour. The test is skipped if node is not installed.
//
// Settings are those of [StartZitadel] without its limit, and REFRESH_TTL in seconds, ROTATE=never or ROTATE=default (once a
// refresh token has lived 70 % of its life), REVOKE_CASCADE=access-only (an access token is revoked alone), ACCESS_FORMAT=jwt
// (access tokens cannot be revoked).
func StartOIDCProvider(t testing.TB, settings ...string) *AuthServer {
	t.Helper()
	path, err := oidcProviderOnce()
	if errors.Is(err, errNoNode) {
		t.Skip("node 20 is not installed here: tests with oidc-provider are left out")
	}
	require.NoError(t, err)
	return startAuthServer(t, "oidc-provider", path, settings)
}

var (
	zitadelOnce      = sync.OnceValues(func() (string, error) { return authServerScript("zitadel") })
	oidcProviderOnce = sync.OnceValues(func() (string, error) { return authServerScript("oidc-provider") })
)

var errNoNode = errors.New("there is no node, or an old one")

func authServerScript(name string) (string, error) {
	root, err := Root()
	if err != nil {
		return "", err
	}
	var stderr bytes.Buffer
	cmd := exec.Command(filepath.Join(root, "scripts", "authserver.sh"), name)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok && exit.ExitCode() == 3 {
		return "", errNoNode
	}
	if err != nil {
		return "", fmt.Errorf("scripts/authserver.sh %s: %w\n%s", name, err, stderr.String())
	}
	return strings.TrimSpace(string(out)), nil
}

func startAuthServer(t testing.TB, name, path string, settings []string) *AuthServer {
	t.Helper()
	// No connection is kept, so that no goroutine runs after the test.
	transport := cleanhttp.DefaultTransport()
	transport.Proxy = nil
	s := &AuthServer{
		Name:    name,
		LogFile: filepath.Join(t.TempDir(), name+".log"),
		http: &http.Client{
			Transport:     transport,
			Timeout:       patience,
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	}
	log, err := os.Create(s.LogFile)
	require.NoError(t, err)
	defer log.Close()
	s.proc, err = startProcess(path, filepath.Dir(s.LogFile), log, cleanEnv(append([]string{"PORT=0"}, settings...)...))
	require.NoError(t, err)
	t.Cleanup(func() {
		s.proc.kill()
		if t.Failed() {
			t.Logf("the log of %s ends with:\n%s", name, tail(contents(s.LogFile), 15))
		}
	})
	ready := func() bool {
		for line := range strings.Lines(contents(s.LogFile)) {
			if strings.HasPrefix(line, "{") && json.Unmarshal([]byte(line), s) == nil && s.Issuer != "" {
				return true
			}
		}
		return false
	}
	poll(patience, func() bool { return ready() || s.proc.ended() })
	if s.Issuer == "" {
		t.Fatalf("%s did not start:\n%s", name, tail(contents(s.LogFile), 15))
	}
	return s
}

// Mint makes a new grant, as if the user had consented, and returns its refresh token.
func (s *AuthServer) Mint(t testing.TB) string {
	t.Helper()
	var answer struct {
		RefreshToken string `json:"refresh_token"`
	}
	s.control(t, http.MethodPost, s.MintURL, &answer)
	require.NotEmpty(t, answer.RefreshToken)
	return answer.RefreshToken
}

// Stats asks the server what it has counted.
func (s *AuthServer) Stats(t testing.TB) AuthServerStats {
	t.Helper()
	var stats AuthServerStats
	s.control(t, http.MethodGet, s.StatsURL, &stats)
	return stats
}

func (s *AuthServer) control(t testing.TB, method, url string, answer any) {
	t.Helper()
	req, err := http.NewRequest(method, url, nil)
	require.NoError(t, err)
	resp, err := s.http.Do(req)
	require.NoError(t, err)
	defer resp.Body.Close()
	require.Equal(t, http.StatusOK, resp.StatusCode, "%s %s", method, url)
	require.NoError(t, json.NewDecoder(resp.Body).Decode(answer))
}

// Alive returns whether the server accepts an access token now. A JWT is alive until it expires, also if its grant has
// ended, because a resource server checks it without a call.
func (s *AuthServer) Alive(t testing.TB, accessToken string) bool {
	t.Helper()
	if parts := strings.Split(accessToken, "."); len(parts) == 3 {
		payload, err := base64.RawURLEncoding.DecodeString(parts[1])
		require.NoError(t, err)
		var claims struct {
			Exp int64 `json:"exp"`
		}
		require.NoError(t, json.Unmarshal(payload, &claims))
		return time.Now().Before(time.Unix(claims.Exp, 0))
	}
	var answer struct {
		Active bool `json:"active"`
	}
	status := s.Post(t, s.IntrospectionURL, url.Values{"token": {accessToken}}, &answer)
	require.Equal(t, http.StatusOK, status)
	return answer.Active
}

// Userinfo reads the userinfo endpoint with an access token, and returns the status and the token's user.
func (s *AuthServer) Userinfo(t testing.TB, accessToken string) (status int, subject string) {
	t.Helper()
	req, err := http.NewRequest(http.MethodGet, s.UserinfoURL, nil)
	require.NoError(t, err)
	req.Header.Set("Authorization", "Bearer "+accessToken)
	resp, err := s.http.Do(req)
	require.NoError(t, err)
	defer resp.Body.Close()
	var claims struct {
		Subject string `json:"sub"`
	}
	_ = json.NewDecoder(resp.Body).Decode(&claims)
	return resp.StatusCode, claims.Subject
}

// Post sends a form with the client's ID and secret (Basic), as a client of the server would, and returns the answer's
// status. The answer is decoded from JSON unless it is empty.
func (s *AuthServer) Post(t testing.TB, to string, form url.Values, answer any) int {
	t.Helper()
	req, err := http.NewRequest(http.MethodPost, to, strings.NewReader(form.Encode()))
	require.NoError(t, err)
	req.SetBasicAuth(url.QueryEscape(s.ClientID), url.QueryEscape(s.ClientSecret))
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	req.Header.Set("Accept", "application/json")
	resp, err := s.http.Do(req)
	require.NoError(t, err)
	defer resp.Body.Close()
	var body bytes.Buffer
	_, err = body.ReadFrom(resp.Body)
	require.NoError(t, err)
	if answer != nil && body.Len() > 0 {
		require.NoError(t, json.Unmarshal(body.Bytes(), answer), "%s: %s", to, cmp.Or(resp.Header.Get("Content-Type"), "no Content-Type"))
	}
	return resp.StatusCode
}

// Consent opens an authorization URL in a browser of its own, logs in and allows what is asked for. It returns the address
// that the browser is sent back to, with code, state and, from oidc-provider, iss, and does not go there.
func (s *AuthServer) Consent(t testing.TB, authorizationURL string) string {
	t.Helper()
	return s.decide(t, authorizationURL, false)
}

// Deny is like Consent, but the person refuses. The login page of zitadel's example cannot refuse.
func (s *AuthServer) Deny(t testing.TB, authorizationURL string) string {
	t.Helper()
	return s.decide(t, authorizationURL, true)
}

func (s *AuthServer) decide(t testing.TB, authorizationURL string, refuses bool) string {
	t.Helper()
	u, err := url.Parse(authorizationURL)
	require.NoError(t, err)
	person := browser.Person{User: s.User, Password: s.Password, Refuses: refuses, StopAt: u.Query().Get("redirect_uri")}
	visit, err := person.Open(authorizationURL)
	require.NoError(t, err)
	require.NotEmpty(t, visit.StoppedAt, "%s did not send the browser back; it says: %s", s.Name, visit.Last().Text())
	return visit.StoppedAt
}

// DeviceApprove types a device's user code, logs in and allows what is asked for.
func (s *AuthServer) DeviceApprove(t testing.TB, userCode string) {
	t.Helper()
	require.Regexp(t, `Sign-in Success|authorization allowed`, s.device(t, userCode, false))
}

// DeviceDeny is like DeviceApprove, but the person refuses.
func (s *AuthServer) DeviceDeny(t testing.TB, userCode string) {
	t.Helper()
	require.Regexp(t, `request was interrupted|authorization denied`, s.device(t, userCode, true))
}

func (s *AuthServer) device(t testing.TB, userCode string, refuses bool) string {
	t.Helper()
	person := browser.Person{User: s.User, Password: s.Password, Refuses: refuses}
	visit, err := person.Open(s.VerificationURL + "?" + url.Values{"user_code": {userCode}}.Encode())
	require.NoError(t, err)
	return visit.Last().Text()
}
