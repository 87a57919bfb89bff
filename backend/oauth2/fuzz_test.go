package oauth2

import (
	"cmp"
	"encoding/json"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/tokenservice"
)

// requireFiniteText requires that a failure has no text of the body: no mark that was put into each of its strings, and no code that is
// not a registered one.
func requireFiniteText(t *testing.T, c *Client, a tokenservice.Answer, e *tokenservice.Failure) {
	require.NotEmpty(t, e.Text)
	require.Equal(t, e.Code != "", meaning(e.Code) != 0)
	require.True(t, e.RetryAfter >= 0 && e.RetryAfter <= 24*time.Hour)
	require.Equal(t, a.Status, e.Status)
	marked := strings.ReplaceAll(string(a.Body), `"`, `"☃`)
	a.Body = []byte(marked)
	other := c.readGrant(exchanging, readAnswer(a), refreshCanary)
	if err, ok := other.Err.(*tokenservice.Failure); ok {
		require.NotContains(t, err.Text, "☃")
	}
}

// FuzzAnswer feeds the parser with answers. For every input: a grant is complete, no error repeats the answer, only an answer that can
// be read is a refusal, and if encoding/json or net/url can read the body, the parser finds the same new refresh token as they do.
func FuzzAnswer(f *testing.F) {
	good := body(map[string]any{"refresh_token": newCanary})
	for _, b := range []string{
		"", "null", "{}", "[]", `"`, "<html>", good, good[:len(good)/2], good + good, "\ufeff " + good, body(nil),
		body(map[string]any{"expires_in": "1e400", "refresh_token": newCanary}), body(map[string]any{"expires_in": -1}),
		`{"refresh_token":"a","refresh_token":null,"REFRESH_TOKEN":"b"}`, `{"refresh_token":"` + newCanary + `",`,
		`{"error":"invalid_grant"}`, `{"error":{}}`, `{"error":[0]}`, `{"ok":false}`, `{"error":"` + bodyCanary + `"}`,
		"access_token=a&refresh_token=b&expires_in=1", "error=bad_refresh_token", "refresh_token=a&access_token=%zz", "access_token=a&refresh_token=%22%5C",
		`{"access_token":"a","refresh_expires_in":1e99}`, `{"access_token":"a","refresh_token":"` + jwt(`{"exp":1e11}`) + `"}`,
	} {
		for _, status := range []int{200, 302, 401, 409, 429, 503} {
			f.Add(status, "17", b, false)
		}
	}
	f.Add(204, "Sun, 06 Nov 1994 08:49:37 GMT", good, true)
	f.Add(429, "", "", false)
	c := client(f, func(c *Config) { c.EndpointURLField, c.RefreshTokenLife = "instance_url", time.Hour })
	f.Fuzz(func(t *testing.T, status int, retry, b string, broken bool) {
		now := time.Now()
		a := tokenservice.Answer{
			Status: status, Header: http.Header{"Retry-After": {retry}, "X-Rate-Limit-Reset": {retry}}, Body: []byte(b), Sent: now,
		}
		if broken {
			a.Broken, a.Lost = "It broke off.", true
		}
		for _, p := range []purpose{exchanging, redeemingCode, pollingDevice} {
			r := c.readGrant(p, readAnswer(a), refreshCanary)
			require.Equal(t, r.Err == nil, r.AccessToken != nil)
			require.Equal(t, now, r.Sent)
			if r.Err != nil {
				e := r.Err.(*tokenservice.Failure)
				requireFiniteText(t, c, a, e)
				require.NotEqual(t, tokenservice.Unsupported, e.Kind)
				if broken {
					require.Contains(t, []tokenservice.Kind{tokenservice.Unavailable, tokenservice.Limited}, e.Kind)
					require.Empty(t, e.Code)
				}
				require.False(t, e.Lost && (r.RefreshToken != "" || status/100 != 2))
			} else {
				require.Equal(t, 2, status/100)
				require.False(t, broken)
				require.NoError(t, tokenservice.CheckToken(r.AccessToken.Token))
				require.True(t, r.AccessToken.Expires.After(now) && !r.AccessToken.Expires.After(now.Add(tokenservice.MaxAccessTokenLife)))
				require.True(t, printable(r.AccessToken.Scope+r.AccessToken.Type))
				require.LessOrEqual(t, len(r.AccessToken.EndpointURL), tokenservice.MaxURLBytes)
			}
			if r.RefreshToken != "" {
				require.NoError(t, tokenservice.CheckToken(r.RefreshToken))
				require.NotEqual(t, refreshCanary, r.RefreshToken)
				require.Equal(t, 2, status/100)
				require.NotNil(t, r.Facts)
			}
			if r.Facts != nil {
				raw, err := json.Marshal(r.Facts)
				require.NoError(t, err)
				require.Less(t, len(raw), 256)
				require.False(t, r.Facts.RotatesFrom.After(r.Facts.Expires))
			}

			// The expected result is what the standard library reads, if it can read the body.
			var fields map[string]any // whose names are exact
			want := ""
			if json.Unmarshal([]byte(b), &fields) == nil {
				want, _ = fields["refresh_token"].(string)
			} else {
				form, err := url.ParseQuery(b)
				if err != nil || broken || !form.Has("access_token") || strings.ContainsAny(b, "<>\"{\r\n\x00") || len(form["refresh_token"]) != 1 {
					continue
				}
				want = form.Get("refresh_token")
			}
			token := strings.TrimSpace(want)
			if status/100 == 2 && token != "" && token != refreshCanary && tokenservice.CheckToken(token) == nil {
				require.Equal(t, token, r.RefreshToken)
			}
		}
		if e := c.failure(revoking, readAnswer(a)); e != nil {
			require.NotEmpty(t, e.Text)
		}
	})
}

// FuzzMetadata checks that metadata that is accepted is for this issuer, and can be used.
func FuzzMetadata(f *testing.F) {
	for _, b := range []string{
		"", "{}", "[]", metadata(nil).body, `{"issuer":"` + issuer + `"}`, `{"issuer":"` + bodyCanary + `"}`,
		metadata(map[string]any{"revocation_endpoint": 5}).body, metadata(map[string]any{"token_endpoint": "https://x/#"}).body,
		metadata(map[string]any{"token_endpoint_auth_methods_supported": []any{1, "none"}}).body,
		`{"issuer":"` + issuer + `","ISSUER":"x","token_endpoint":"https://a.b"}`,
	} {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b string) {
		m, err := readMetadata(issuer, tokenservice.ReadObject([]byte(b)))
		if err != nil {
			e := requireField(t, "issuer", err)
			require.LessOrEqual(t, len(e.Text), 4<<10)
			require.True(t, printable(e.Text))
			return
		}
		_, err = New(Config{
			TokenURL: cmp.Or(m.TokenURL, "https://written.example.com"), RevocationURL: m.RevocationURL, AuthorizationURL: m.AuthorizationURL,
			DeviceAuthorizationURL: m.DeviceAuthorizationURL, AuthMethod: m.AuthMethod, AccessTokenLife: 1, KeepAlive: 1, RequestTimeout: time.Second,
		})
		require.NoError(t, err)
		require.Contains(t, b, "issuer")
	})
}

// FuzzChallenge checks that the parser ends, that its value is in the header, and that it finds the value of a well-formed header.
func FuzzChallenge(f *testing.F) {
	for _, h := range []string{"", `Bearer error="invalid_token"`, `Basic YWJj==, Bearer realm="a\"b", error=x`, `"`, `error="\`, `a="b`} {
		f.Add(h)
	}
	f.Fuzz(func(t *testing.T, h string) {
		got := challengeError([]string{h})
		require.LessOrEqual(t, len(got), len(h))
		require.Equal(t, got, challengeError([]string{"", h}))
		if strings.Count(h, `"`) == 0 && !strings.Contains(strings.ToLower(h), "error") {
			require.Empty(t, got)
			require.Equal(t, "invalid_token", challengeError([]string{h + `, Bearer error="invalid_token"`}))
		}
	})
}
