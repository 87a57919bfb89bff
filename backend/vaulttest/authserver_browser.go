package vaulttest

import (
	"fmt"
	"html"
	"io"
	"net/http"
	"net/http/cookiejar"
	"net/url"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// Consent opens an authorization URL in a browser of its own, logs in and allows what is asked for. It returns the address
// that the browser is sent back to, with code, state and, from oidc-provider, iss, and does not go there.
func (s *AuthServer) Consent(t testing.TB, authorizationURL string) string {
	t.Helper()
	return s.decide(t, authorizationURL, true)
}

// Deny is Consent by somebody who refuses. The login page of zitadel's example has no way to.
func (s *AuthServer) Deny(t testing.TB, authorizationURL string) string {
	t.Helper()
	return s.decide(t, authorizationURL, false)
}

func (s *AuthServer) decide(t testing.TB, authorizationURL string, allow bool) string {
	t.Helper()
	u, err := url.Parse(authorizationURL)
	require.NoError(t, err)
	b := newBrowser(t, s, u.Query().Get("redirect_uri"))
	b.open(t, authorizationURL)
	b.fillIn(t, allow)
	if b.sentBack == "" {
		t.Fatalf("%s ended at %s without sending the browser back", s.Name, b.where())
	}
	return b.sentBack
}

// DeviceApprove types a device's user code, logs in and allows what is asked for.
func (s *AuthServer) DeviceApprove(t testing.TB, userCode string) {
	t.Helper()
	s.device(t, userCode, true)
}

// DeviceDeny is DeviceApprove by somebody who refuses.
func (s *AuthServer) DeviceDeny(t testing.TB, userCode string) {
	t.Helper()
	s.device(t, userCode, false)
}

func (s *AuthServer) device(t testing.TB, userCode string, allow bool) {
	t.Helper()
	b := newBrowser(t, s, "")
	b.open(t, s.VerificationURL+"?"+url.Values{"user_code": {userCode}}.Encode())
	b.fillIn(t, allow)
	done := `(?i)sign-in success|authorization allowed`
	if !allow {
		done = `(?i)the sign-in request was interrupted|authorization denied`
	}
	if !regexp.MustCompile(done).MatchString(b.page) {
		t.Fatalf("%s did not take the user code; it ended at %s", s.Name, b.where())
	}
}

// browser goes through the pages of an authorization server as a person would.
type browser struct {
	http     *http.Client
	server   *AuthServer
	page     string // the present page
	at       *url.URL
	status   int
	sentBack string // the redirect to the client, which is not followed
}

func newBrowser(t testing.TB, s *AuthServer, redirectURI string) *browser {
	t.Helper()
	jar, err := cookiejar.New(nil)
	require.NoError(t, err)
	b := &browser{server: s}
	b.http = &http.Client{
		Transport: loopbackTransport(),
		Timeout:   patience,
		Jar:       jar,
		CheckRedirect: func(r *http.Request, _ []*http.Request) error {
			to := *r.URL
			to.RawQuery = ""
			if redirectURI == "" || to.String() != redirectURI {
				return nil
			}
			b.sentBack = r.URL.String()
			return http.ErrUseLastResponse
		},
	}
	return b
}

func (b *browser) where() string {
	return fmt.Sprintf("%s (%d): %s", b.at.Path, b.status, strings.Join(strings.Fields(regexp.MustCompile(`(?s)<style>.*?</style>|<[^>]*>`).ReplaceAllString(b.page, " ")), " "))
}

func (b *browser) open(t testing.TB, address string) {
	t.Helper()
	req, err := http.NewRequest(http.MethodGet, address, nil)
	require.NoError(t, err)
	b.send(t, req)
}

func (b *browser) send(t testing.TB, req *http.Request) {
	t.Helper()
	req.Header.Set("Accept", "text/html")
	resp, err := b.http.Do(req)
	require.NoError(t, err)
	defer resp.Body.Close()
	page, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	b.page, b.at, b.status = string(page), resp.Request.URL, resp.StatusCode
}

var (
	formPattern  = regexp.MustCompile(`(?s)<form\b([^>]*)>(.*?)</form>`)
	inputPattern = regexp.MustCompile(`<input\b([^>]*)>`)
	attrPattern  = regexp.MustCompile(`\b(action|name|value)="([^"]*)"`)
	abortPattern = regexp.MustCompile(`href="([^"]*/abort)"`)                  // oidc-provider's [ Cancel ]
	allowPattern = regexp.MustCompile(`location\.href='(\./confirm)\?action=`) // zitadel's Allow and Deny
)

// fillIn submits one form after another until the client's turn comes, or there is nothing left to fill in.
func (b *browser) fillIn(t testing.TB, allow bool) {
	t.Helper()
	for range 6 {
		if b.sentBack != "" {
			return
		}
		if link := allowPattern.FindStringSubmatch(b.page); link != nil {
			action := "denied"
			if allow {
				action = "allowed"
			}
			b.open(t, b.resolve(t, link[1]+"?action="+action))
			return
		}
		if link := abortPattern.FindStringSubmatch(b.page); link != nil && !allow {
			b.open(t, b.resolve(t, html.UnescapeString(link[1])))
			continue
		}
		form := formPattern.FindStringSubmatch(b.page)
		if form == nil {
			return
		}
		fields := url.Values{}
		for _, input := range inputPattern.FindAllStringSubmatch(form[2], -1) {
			a := attributes(input[1])
			fields.Set(a["name"], a["value"])
		}
		fields.Del("")
		for _, name := range []string{"username", "login"} {
			if fields.Has(name) {
				fields.Set(name, b.server.User)
			}
		}
		if fields.Has("password") {
			fields.Set("password", b.server.Password)
		}
		abort := fields.Has("confirm") && !allow
		if abort {
			fields.Set("abort", "yes") // the page's other button
		}
		to := b.resolve(t, attributes(form[1])["action"])
		req, err := http.NewRequest(http.MethodPost, to, strings.NewReader(fields.Encode()))
		require.NoError(t, err)
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		b.send(t, req)
		if abort {
			return // the next page asks for a user code again
		}
	}
}

func (b *browser) resolve(t testing.TB, reference string) string {
	t.Helper()
	to, err := b.at.Parse(reference)
	require.NoError(t, err)
	return to.String()
}

func attributes(tag string) map[string]string {
	found := map[string]string{}
	for _, a := range attrPattern.FindAllStringSubmatch(tag, -1) {
		found[a[1]] = html.UnescapeString(a[2])
	}
	return found
}
