package kaizala

import (
	"encoding/json"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// FuzzResponse feeds the parser with answers. Whatever comes, a grant is a whole one, what is rescued can be sent, no
// error repeats the answer, and where encoding/json understands the body, it finds the same new refresh token.
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
		`{"accessTokenExpiry":1e9999}`, `{"accessTokenExpiry":-0}`, "{\"a\":\"\xff\"}", "\ufeff{}",
	} {
		for _, status := range []int{200, 401, 429, 503} {
			f.Add(status, "17", b, "")
		}
	}
	f.Add(204, "Sun, 06 Nov 1994 08:49:37 GMT", good, "broken")
	f.Fuzz(func(t *testing.T, status int, retry, b, broken string) {
		now := time.Now()
		a := answer{status: status, header: http.Header{"Retry-After": {retry}}, body: []byte(b), broken: broken}
		g, e := interpret(a, refreshCanary, now)
		require.False(t, g == nil && e == nil)

		if e != nil {
			require.NotEmpty(t, e.Text)
			require.Contains(t, []Kind{RefusedRefreshToken, RefusedConnector, Refused, Limited, Unavailable}, e.Kind)
			require.True(t, e.RetryAfter >= 0 && e.RetryAfter <= 24*time.Hour)
			require.Equal(t, status, e.Status)
			require.Equal(t, documentedCode(e.Code), e.Code)
			if g != nil {
				require.Equal(t, &Grant{RefreshToken: g.RefreshToken}, g)
				require.NotEmpty(t, g.RefreshToken)
			}
			// The texts are finite: they are the same whatever the body says, apart from a documented code.
			marked, _ := json.Marshal("\u2603" + bodyCanary)
			_, other := interpret(answer{status: status, header: a.header, body: []byte(strings.ReplaceAll(b, `"message":"`, `"message":`+string(marked)+`,"x":"`)), broken: broken}, refreshCanary, now)
			if other != nil {
				require.NotContains(t, other.Text, bodyCanary)
			}
		} else {
			require.True(t, status >= 200 && status <= 299)
			require.Empty(t, broken)
			require.NoError(t, CheckToken(g.AccessToken))
			require.True(t, g.Expires.After(now) && !g.Expires.After(now.Add(maxAccessTokenLife)))
			_, _, problem := parseTarget(g.EndpointURL)
			require.Empty(t, problem)
		}
		if g != nil && g.RefreshToken != "" {
			require.NoError(t, CheckToken(g.RefreshToken))
			require.NotEqual(t, refreshCanary, g.RefreshToken)
			require.Equal(t, 2, status/100)
		}

		var oracle struct {
			RefreshToken string `json:"refreshToken"`
		}
		if json.Unmarshal([]byte(b), &oracle) != nil || status/100 != 2 {
			return
		}
		want := strings.TrimSpace(oracle.RefreshToken)
		if want == refreshCanary || CheckToken(want) != nil {
			want = ""
		}
		got := ""
		if g != nil {
			got = g.RefreshToken
		}
		require.Equal(t, want, got)
	})
}
