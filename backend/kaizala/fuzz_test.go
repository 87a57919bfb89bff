package kaizala

import (
	"encoding/json"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/tokenservice"
)

// FuzzResponse feeds the parser with answers. For every input: a grant is complete, a rescued refresh token can be sent, no error repeats
// the answer, and if encoding/json can read the body, both find the same new refresh token.
func FuzzResponse(f *testing.F) {
	good := body(f, nil)
	for _, b := range []string{
		"", "null", "{}", "[]", `"`, "<html>", good, good[:len(good)/2], good + good,
		body(f, map[string]any{"refreshToken": newCanary}),
		body(f, map[string]any{"refreshToken": refreshCanary}),
		`{"refreshToken":"` + newCanary + `",`,
		`{"refreshToken":"a","refreshToken":null,"refreshToken":"b","REFRESHTOKEN":1}`,
		`{"refreshToken":"a","refreshToken":null}`,
		`{"x":{"refreshToken":"a"},"y":[{"refreshToken":"b"}],"refreshToken":"\u00e9"}`,
		`{"message":"Dont have correct applicationId and secret in header!","errorCode":"Unauthenticated"}`,
		`{"errorCode":"InvalidToken"}`, `{"errorCode":{}}`, `{"errorCode":0}`, `{"errorCode":true}`,
		`{"accessTokenExpiry":1e9999}`, `{"accessTokenExpiry":-0}`, strings.Replace(good, `"accessTokenExpiry":1`, `"accessTokenExpiry":1.0e0`, 1),
		strings.Replace(good, `"scope":"token.write"`, `"scope":["a","b"],"accessTokenExpiry":"1e400"`, 1), `{"accessToken":tru,"refreshToken":"` + newCanary + `"`, "{\"a\":\"\xff\"}", "\ufeff{}",
	} {
		for _, status := range []int{200, 401, 429, 503} {
			f.Add(status, "17", b, "")
		}
	}
	f.Add(204, "Sun, 06 Nov 1994 08:49:37 GMT", good, "broken")
	f.Fuzz(func(t *testing.T, status int, retry, b, broken string) {
		now := time.Now()
		a := tokenservice.Answer{Status: status, Header: http.Header{"Retry-After": {retry}}, Body: []byte(b), Broken: broken, Lost: broken != ""}
		r := readGrant(a, refreshCanary, now)
		require.NotEqual(t, r.AccessToken == nil, r.Err == nil)
		require.Equal(t, r.RefreshToken != "", r.Facts != nil)

		if r.Err != nil {
			var f *tokenservice.Failure
			require.ErrorAs(t, r.Err, &f)
			require.NotEmpty(t, f.Text)
			require.Contains(t, []tokenservice.Kind{tokenservice.RefusedRefreshToken, tokenservice.RefusedConnector, tokenservice.Refused, tokenservice.Limited, tokenservice.Unavailable}, f.Kind)
			require.True(t, f.RetryAfter >= 0 && f.RetryAfter <= 24*time.Hour)
			require.Equal(t, status, f.Status)
			require.Contains(t, append([]string{""}, documentedCodes...), f.Code)
			// The error's text does not depend on the body, apart from a documented code.
			marked, _ := json.Marshal("\u2603" + bodyCanary)
			a.Body = []byte(strings.ReplaceAll(b, `"message":"`, `"message":`+string(marked)+`,"x":"`))
			if other := readGrant(a, refreshCanary, now); other.Err != nil {
				require.NotContains(t, other.Err.Error(), bodyCanary)
			}
		} else {
			require.True(t, status >= 200 && status <= 299)
			require.Empty(t, broken)
			require.NoError(t, tokenservice.CheckToken(r.AccessToken.Token))
			require.True(t, r.AccessToken.Expires.After(now) && !r.AccessToken.Expires.After(now.Add(tokenservice.MaxAccessTokenLife)))
			require.LessOrEqual(t, len(r.AccessToken.Scope), tokenservice.MaxScopeBytes)
			if r.AccessToken.EndpointURL != "" {
				_, _, problem := tokenservice.ParseTarget(r.AccessToken.EndpointURL)
				require.Empty(t, problem)
			}
		}
		if r.RefreshToken != "" {
			require.NoError(t, tokenservice.CheckToken(r.RefreshToken))
			require.NotEqual(t, refreshCanary, r.RefreshToken)
			require.Equal(t, 2, status/100)
		}

		var oracle map[string]any // whose names are exact
		if json.Unmarshal([]byte(b), &oracle) != nil || status/100 != 2 {
			return
		}
		// If the new refresh token is empty or cannot be sent, the older one stays.
		sent, _ := oracle["refreshToken"].(string)
		if want := strings.TrimSpace(sent); want != refreshCanary && tokenservice.CheckToken(want) == nil {
			require.Equal(t, want, r.RefreshToken)
		}
	})
}
