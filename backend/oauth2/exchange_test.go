package oauth2

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/tokenservice"
)

func TestExchangeRequest(t *testing.T) {
	form := func(more ...string) url.Values {
		v := url.Values{"grant_type": {"refresh_token"}, "refresh_token": {refreshCanary}}
		for i := 0; i < len(more); i += 2 {
			v.Set(more[i], more[i+1])
		}
		return v
	}
	basic := func(pair string) string { return "Basic " + base64.StdEncoding.EncodeToString([]byte(pair)) }
	for _, c := range []struct {
		name          string
		edit          func(*Config)
		url           string
		authorization string
		form          url.Values
	}{
		{"Basic is the default", nil, "https://as.example.com/token", basic(clientID + ":" + secretCanary), form()},
		{"Basic encodes both", func(c *Config) { c.ClientID, c.ClientSecret, c.AuthMethod = "a:b c", "+/~%&=ü"[:6], ClientSecretBasic },
			"https://as.example.com/token", basic("a%3Ab+c:%2B%2F~%25%26%3D"), form()},
		{"post", func(c *Config) { c.AuthMethod = ClientSecretPost }, "https://as.example.com/token", "",
			form("client_id", clientID, "client_secret", secretCanary)},
		{"none", func(c *Config) { c.AuthMethod, c.ClientSecret = NoSecret, "" }, "https://as.example.com/token", "", form("client_id", clientID)},
		{"parameters and a query", func(c *Config) {
			c.TokenURL = "https://AS.example.com:8443/t?tenant=1"
			c.TokenParams = map[string]string{"scope": "a b", "audience": "https://api"}
			c.Scopes, c.AuthorizationParams = []string{"unused"}, map[string]string{"prompt": "consent"}
		}, "https://AS.example.com:8443/t?tenant=1", basic(clientID + ":" + secretCanary), form("scope", "a b", "audience", "https://api")},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := &server{status: 200, body: body(nil)}
			p := &permits{}
			result := client(t, s.with(c.edit)).Exchange(t.Context(), tokenservice.Exchange{
				RefreshToken: refreshCanary, Endpoint: "https://elsewhere.example.com", Permit: p.permit,
			})
			require.NoError(t, result.Err)
			require.Len(t, s.requests, 1)
			require.Equal(t, &permits{1, 1}, p)
			r := s.requests[0]
			require.Equal(t, "POST", r.Method)
			require.Equal(t, c.url, r.URL.String())
			require.Equal(t, r.URL.Host, r.Host)
			want := http.Header{"Accept": {"application/json"}, "Content-Type": {"application/x-www-form-urlencoded"}}
			if c.authorization != "" {
				want.Set("Authorization", c.authorization)
			}
			require.Equal(t, want, r.Header)
			require.Equal(t, c.form, s.forms[0])
		})
	}
}

func TestExchangeGrant(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &server{status: 200, delay: 2 * time.Second, body: body(map[string]any{
			"refresh_token": newCanary, "scope": "read write", "instance_url": "https://eu.example.com/x",
		})}
		start := time.Now()
		result := s.exchange(t, func(c *Config) { c.EndpointURLField = "instance_url" })
		require.Equal(t, tokenservice.Result{
			AccessToken: &tokenservice.AccessToken{
				Token: accessCanary, Type: "Bearer", EndpointURL: "https://eu.example.com/x", Scope: "read write",
				Expires: start.Add(time.Hour).UTC(), // counted from when the request was sent
			},
			RefreshToken: newCanary,
			Facts:        &tokenservice.Facts{},
			Sent:         start,
		}, result)
	})
}

// Each body is a success with the access token alone, or with the changes that the case names.
func TestExchangeFields(t *testing.T) {
	const hour = time.Hour
	raw := func(s string) json.RawMessage { return json.RawMessage(s) }
	for _, c := range []struct {
		name, body string
		change     func(*tokenservice.AccessToken)
		life       time.Duration
		newToken   string
	}{
		{"JSON", body(nil), nil, hour, ""},
		{"a byte-order mark and white space", "\ufeff \r\n\t" + body(nil) + "\n", nil, hour, ""},
		{"white space and a byte-order mark", "\n\ufeff" + body(map[string]any{"refresh_token": newCanary}), nil, hour, newCanary},
		{"a form", "access_token=" + accessCanary + "&token_type=Bearer&expires_in=3600", nil, hour, ""},
		{"a form with a byte-order mark", "\ufeffaccess_token=" + accessCanary + "&token_type=Bearer&expires_in=3600\n", nil, hour, ""},
		{"a form with all", "expires_in=60&refresh_token=" + newCanary + "&scope=a%2Cb+c&access_token=" + accessCanary + "&token_type=bearer",
			func(a *tokenservice.AccessToken) { a.Type, a.Scope = "bearer", "a,b c" }, time.Minute, newCanary},
		{"a form with a field that cannot be decoded", "scope=%zz&x%zz=1&=2&&access_token=" + accessCanary + "&token_type=Bearer&refresh_token=" + newCanary,
			nil, 2 * hour, newCanary},
		{"names in capitals", strings.ReplaceAll(body(map[string]any{"refresh_token": newCanary}), "_token", "_TOKEN"), nil, hour, newCanary},
		{"names in capitals behind the exact ones", strings.TrimSuffix(body(map[string]any{"refresh_token": newCanary, "error": "", "ok": true}), "}") +
			`,"Refresh_Token":"x","ACCESS_TOKEN":"x","EXPIRES_IN":0,"Token_Type":"x","OK":"false"}`, nil, hour, newCanary},
		{"a form with a name in capitals behind the exact one", "refresh_token=" + newCanary + "&access_token=" + accessCanary + "&token_type=Bearer&Refresh_Token=x&Access_Token=x", nil, 2 * hour, newCanary},
		{"a form with a name in capitals", "ACCESS_TOKEN=" + accessCanary + "&token_type=Bearer", nil, 2 * hour, ""},
		{"no token_type", body(map[string]any{"token_type": nil}), func(a *tokenservice.AccessToken) { a.Type = "" }, hour, ""},
		{"token_type of 64 bytes", body(map[string]any{"token_type": strings.Repeat("a", 64)}),
			func(a *tokenservice.AccessToken) { a.Type = strings.Repeat("a", 64) }, hour, ""},
		{"token_type too long", body(map[string]any{"token_type": strings.Repeat("a", 65)}), func(a *tokenservice.AccessToken) { a.Type = "" }, hour, ""},
		{"token_type odd", body(map[string]any{"token_type": "B\nearer"}), func(a *tokenservice.AccessToken) { a.Type = "" }, hour, ""},
		{"token_type with DEL", body(map[string]any{"token_type": "B\x7f"}), func(a *tokenservice.AccessToken) { a.Type = "" }, hour, ""},
		{"scope a list", body(map[string]any{"scope": []string{"a", "b"}}), func(a *tokenservice.AccessToken) { a.Scope = "a b" }, hour, ""},
		{"scope a number", body(map[string]any{"scope": 1}), nil, hour, ""},
		{"scope of 4 KiB", body(map[string]any{"scope": strings.Repeat("a", 4<<10)}),
			func(a *tokenservice.AccessToken) { a.Scope = strings.Repeat("a", 4<<10) }, hour, ""},
		{"scope too long", body(map[string]any{"scope": strings.Repeat("a", 4<<10+1), "refresh_token": newCanary}), nil, hour, newCanary},
		{"an endpoint that is not asked for", body(map[string]any{"api_domain": "https://x.example.com"}), nil, hour, ""},
		{"an endpoint", body(map[string]any{"instance_url": "https://x.example.com"}),
			func(a *tokenservice.AccessToken) { a.EndpointURL = "https://x.example.com" }, hour, ""},
		{"an endpoint without TLS", body(map[string]any{"instance_url": "http://x.example.com"}), nil, hour, ""},
		{"an endpoint on a loopback address", body(map[string]any{"instance_url": "http://localhost:8080/x"}), nil, hour, ""},
		{"an endpoint with a mark that turns the text", body(map[string]any{"instance_url": "https://x.example.com/\u202egpj.exe"}), nil, hour, ""},
		{"an endpoint with a quote", body(map[string]any{"instance_url": `https://x.example.com/";calc;"`}), nil, hour, ""},
		{"an endpoint with a user", body(map[string]any{"instance_url": "https://u:p@x.example.com"}), nil, hour, ""},
		{"an endpoint with a fragment", body(map[string]any{"instance_url": "https://x.example.com/#x"}), nil, hour, ""},
		{"an endpoint that is none", body(map[string]any{"instance_url": 5}), nil, hour, ""},

		{"expires_in missing", body(map[string]any{"expires_in": nil}), nil, 2 * hour, ""},
		{"expires_in null", body(map[string]any{"expires_in": raw("null")}), nil, 2 * hour, ""},
		{"expires_in empty", body(map[string]any{"expires_in": ""}), nil, 2 * hour, ""},
		{"expires_in a word", body(map[string]any{"expires_in": "soon", "refresh_token": newCanary}), nil, 2 * hour, newCanary},
		{"expires_in an object", body(map[string]any{"expires_in": []int{1}, "refresh_token": newCanary}), nil, 2 * hour, newCanary},
		{"expires_in true", body(map[string]any{"expires_in": true}), nil, 2 * hour, ""},
		{"expires_in a decimal", body(map[string]any{"expires_in": raw("3600.5")}), nil, hour + 500*time.Millisecond, ""},
		{"expires_in with an exponent", body(map[string]any{"expires_in": raw("3.6E3")}), nil, hour, ""},
		{"expires_in a numeric string", body(map[string]any{"expires_in": "300"}), nil, 5 * time.Minute, ""},
		{"expires_in one second", body(map[string]any{"expires_in": 1}), nil, time.Second, ""},
		{"expires_in 401 days", body(map[string]any{"expires_in": 401 * 86400}), nil, 400 * 24 * hour, ""},
		{"expires_in beyond all", body(map[string]any{"expires_in": raw("1e300")}), nil, 400 * 24 * hour, ""},

		{"refresh_token empty", body(map[string]any{"refresh_token": ""}), nil, hour, ""},
		{"refresh_token null", body(map[string]any{"refresh_token": raw("null")}), nil, hour, ""},
		{"refresh_token a number", body(map[string]any{"refresh_token": 7}), nil, hour, ""},
		{"refresh_token as it was", body(map[string]any{"refresh_token": refreshCanary}), nil, hour, ""},
		{"refresh_token with spaces around", body(map[string]any{"refresh_token": " " + newCanary + "\n"}), nil, hour, newCanary},
		{"refresh_token of 16 KiB", body(map[string]any{"refresh_token": strings.Repeat("r", 16<<10)}), nil, hour, strings.Repeat("r", 16<<10)},
		{"refresh_token too long", body(map[string]any{"refresh_token": strings.Repeat("r", 16<<10+1)}), nil, hour, ""},
		{"refresh_token that cannot be sent", body(map[string]any{"refresh_token": "a\u200bb"}), nil, hour, ""},
		{"two, the last is empty", strings.TrimSuffix(body(map[string]any{"refresh_token": newCanary}), "}") + `,"refresh_token":""}`, nil, hour, newCanary},
		{"two, the last is the old one", strings.TrimSuffix(body(map[string]any{"refresh_token": newCanary}), "}") + `,"refresh_token":"` + refreshCanary + `"}`,
			nil, hour, newCanary},
		{"two new ones", strings.TrimSuffix(body(map[string]any{"refresh_token": "first"}), "}") + `,"refresh_token":"` + newCanary + `"}`, nil, hour, newCanary},

		{"an empty error", body(map[string]any{"error": ""}), nil, hour, ""},
		{"a null error", body(map[string]any{"error": raw("null")}), nil, hour, ""},
		{"a false error", body(map[string]any{"error": false}), nil, hour, ""},
		{"an error of 0", body(map[string]any{"error": 0}), nil, hour, ""},
		{"an error of spaces", body(map[string]any{"error": " "}), nil, hour, ""},
		{"an empty list of errors", body(map[string]any{"error": []int{}}), nil, hour, ""},
		{"an empty object of errors", body(map[string]any{"error": raw("{ }")}), nil, hour, ""},
		{"ok", body(map[string]any{"ok": true}), nil, hour, ""},
		{"ok null", body(map[string]any{"ok": raw("null")}), nil, hour, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &server{status: 200, body: c.body}
				result := s.exchange(t, func(c *Config) { c.AccessTokenLife, c.EndpointURLField = 2*time.Hour, "instance_url" })
				require.NoError(t, result.Err)
				want := &tokenservice.AccessToken{Token: accessCanary, Type: "Bearer", Expires: time.Now().Add(c.life).UTC()}
				if c.change != nil {
					c.change(want)
				}
				require.Equal(t, want, result.AccessToken)
				require.Equal(t, c.newToken, result.RefreshToken)
				require.Equal(t, c.newToken != "", result.Facts != nil)
			})
		})
	}
}

// Without endpoint_url_field no field of the answer becomes the endpoint URL, whatever its name.
func TestNoFieldIsTheEndpoint(t *testing.T) {
	s := &server{status: 200, body: body(map[string]any{"": "https://x.example.com", "endpoint_url": "https://x.example.com"})}
	result := s.exchange(t, nil)
	require.NoError(t, result.Err)
	require.Empty(t, result.AccessToken.EndpointURL)
}

// The client returns the new refresh token of each answer, also if something else in the answer is wrong.
func TestNewRefreshTokenIsNeverLost(t *testing.T) {
	token := `"refresh_token":"` + newCanary + `"`
	with := func(field string, v any) string { return body(map[string]any{"refresh_token": newCanary, field: v}) }
	for name, c := range map[string]struct {
		body string
		kind tokenservice.Kind
	}{
		"cut off after it":            {`{` + token + `,`, tokenservice.Unavailable},
		"cut off in the next value":   {`{` + token + `,"access_token":"` + bodyCanary, tokenservice.Unavailable},
		"junk after it":               {`{` + token + `,` + bodyCanary, tokenservice.Unavailable},
		"a missing comma":             {`{` + token + ` "access_token":"` + accessCanary + `"}`, tokenservice.Unavailable},
		"followed by junk":            {with("x", 1) + bodyCanary, tokenservice.Unavailable},
		"over the bound":              {with("x", 1) + strings.Repeat(" ", tokenservice.MaxAnswerBytes), tokenservice.Unavailable},
		"no access_token":             {with("access_token", nil), tokenservice.Unavailable},
		"access_token empty":          {with("access_token", ""), tokenservice.Unavailable},
		"access_token a number":       {with("access_token", 7), tokenservice.Unavailable},
		"access_token with LF":        {with("access_token", accessCanary+"\nx"), tokenservice.Unavailable},
		"access_token too long":       {with("access_token", strings.Repeat("a", 16<<10+1)), tokenservice.Unavailable},
		"expires_in 0":                {with("expires_in", 0), tokenservice.Unavailable},
		"expires_in negative":         {with("expires_in", "-1"), tokenservice.Unavailable},
		"expires_in 0 as a form":      {"access_token=" + accessCanary + "&expires_in=0&refresh_token=" + newCanary, tokenservice.Unavailable},
		"an error beside it":          {with("error", "invalid_scope"), tokenservice.Refused},
		"an error that is an object":  {with("error", map[string]any{"code": bodyCanary}), tokenservice.Refused},
		"an error that is a list":     {with("error", []string{bodyCanary}), tokenservice.Refused},
		"an error that is a number":   {with("error", 5), tokenservice.Refused},
		"an error that is true":       {with("error", true), tokenservice.Refused},
		"ok false":                    {with("ok", false), tokenservice.Refused},
		"ok false as a string":        {with("ok", "False"), tokenservice.Refused},
		"a form with an error beside": {"error=" + bodyCanary + "&refresh_token=" + newCanary, tokenservice.Refused},
	} {
		t.Run(name, func(t *testing.T) {
			result := (&server{status: 200, body: c.body}).exchange(t, nil)
			e := requireFailure(t, c.kind, result.Err)
			require.Equal(t, newCanary, result.RefreshToken)
			require.Equal(t, &tokenservice.Facts{}, result.Facts)
			require.Nil(t, result.AccessToken)
			require.False(t, e.Lost, "no refresh token is lost")
			require.False(t, result.Sent.IsZero())
		})
		t.Run(name+", with a status that is no success", func(t *testing.T) {
			result := (&server{status: 400, body: c.body}).exchange(t, nil)
			require.Error(t, result.Err)
			require.Empty(t, result.RefreshToken)
			require.Nil(t, result.Facts)
		})
	}
	t.Run("the connection breaks", func(t *testing.T) {
		result := (&server{status: 200, body: with("x", 1), cut: true}).exchange(t, nil)
		e := requireFailure(t, tokenservice.Unavailable, result.Err)
		require.Contains(t, e.Text, "closed the connection too early")
		require.Equal(t, newCanary, result.RefreshToken)
		require.False(t, e.Lost)
	})
	for name, form := range map[string]string{
		"between two parameters of a form": "access_token=" + accessCanary + "&refresh_token=" + newCanary + "&",
		"in the value of a form":           "access_token=" + accessCanary + "&refresh_token=" + newCanary + "&refresh_token_expires_in=1",
		"before the rest of a form":        "refresh_token=" + newCanary + "&acc",
	} {
		t.Run("the connection breaks "+name, func(t *testing.T) {
			result := (&server{status: 200, body: form, cut: true}).exchange(t, nil)
			e := requireFailure(t, tokenservice.Unavailable, result.Err)
			require.Equal(t, newCanary, result.RefreshToken)
			require.Equal(t, &tokenservice.Facts{}, result.Facts)
			require.Nil(t, result.AccessToken)
			require.False(t, e.Lost)
		})
	}
	t.Run("the caller gives up", func(t *testing.T) {
		result := (&server{status: 200, body: with("x", 1), cut: true}).exchangeGivenUp(t)
		require.ErrorIs(t, result.Err, context.Canceled)
		require.Equal(t, newCanary, result.RefreshToken)
		require.Nil(t, result.AccessToken)
	})
}

// exchangeGivenUp makes an exchange whose caller gives up once the request is sent.
func (s *server) exchangeGivenUp(t testing.TB) tokenservice.Result {
	ctx, cancel := context.WithCancel(t.Context())
	c := client(t, func(c *Config) {
		c.Transport = roundTrip(func(r *http.Request) (*http.Response, error) {
			cancel()
			return s.RoundTrip(r.WithContext(context.WithoutCancel(r.Context())))
		})
	})
	return c.Exchange(ctx, tokenservice.Exchange{RefreshToken: refreshCanary})
}

// Where a form breaks off in its refresh token, or before it, the client uses no part of the token, and the answer is lost.
func TestFormThatBreaksOff(t *testing.T) {
	whole := "access_token=" + accessCanary + "&refresh_token=" + newCanary
	for at := range len(whole) + 1 {
		result := (&server{status: 200, body: whole[:at], cut: true}).exchange(t, nil)
		e := requireFailure(t, tokenservice.Unavailable, result.Err)
		require.Empty(t, result.RefreshToken, whole[:at])
		require.Nil(t, result.Facts)
		require.Nil(t, result.AccessToken)
		require.True(t, e.Lost)
		require.Empty(t, (&server{status: 200, body: whole[:at], cut: true}).exchangeGivenUp(t).RefreshToken, "the caller has given up")
	}
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// The table of SERVICES.md, section 2, and the answers of OAUTH.md, section 3.
func TestExchangeFailures(t *testing.T) {
	const (
		refusedToken, refusedConnector = tokenservice.RefusedRefreshToken, tokenservice.RefusedConnector
		refused, limited, unavailable  = tokenservice.Refused, tokenservice.Limited, tokenservice.Unavailable
	)
	code := func(c string) string { return `{"error":"` + c + `","error_description":"` + bodyCanary + `"}` }
	for _, c := range []struct {
		name   string
		status int
		body   string
		kind   tokenservice.Kind
		code   string
		lost   bool
		text   string
	}{
		{"", 400, code("invalid_grant"), refusedToken, "invalid_grant", false,
			"The authorization server as.example.com refuses the refresh token (invalid_grant). The tenant user has to authorize the tenant again (tenants/NAME/authorize), or get a new refresh token."},
		{"", 401, code("invalid_grant"), refusedToken, "invalid_grant", false, "refuses the refresh token (invalid_grant)"},
		{"", 403, code("invalid_grant"), refusedToken, "invalid_grant", false, ""},
		{"", 429, code("invalid_grant"), refusedToken, "invalid_grant", false, ""},
		{"", 500, code("invalid_grant"), refusedToken, "invalid_grant", false, ""},
		{"", 200, code("bad_refresh_token"), refusedToken, "bad_refresh_token", false, ""},
		{"a form", 200, "error=bad_refresh_token&error_description=" + bodyCanary, refusedToken, "bad_refresh_token", false, ""},
		{"a form, name in capitals", 200, "ERROR=bad_refresh_token", refusedToken, "bad_refresh_token", false, ""},
		{"capitals", 400, code("INVALID_GRANT"), refusedToken, "invalid_grant", false, ""},
		{"ok false", 200, `{"ok":false,"error":"invalid_refresh_token"}`, refusedToken, "invalid_refresh_token", false, ""},
		{"", 200, code("token_revoked"), refusedToken, "token_revoked", false, ""},
		{"", 200, code("token_expired"), refusedToken, "token_expired", false, ""},
		{"beside an access token", 200, body(map[string]any{"error": "invalid_grant"}), refusedToken, "invalid_grant", false, ""},

		{"", 401, code("invalid_client"), refusedConnector, "invalid_client", false,
			"The authorization server as.example.com refuses the connector (invalid_client). Its owner has to check connector_id and connector_secret and write them again; if they are right, the operator has to check token_endpoint_auth_method."},
		{"", 200, code("incorrect_client_credentials"), refusedConnector, "incorrect_client_credentials", false, ""},
		{"", 503, code("invalid_client"), refusedConnector, "invalid_client", false, ""},

		{"", 429, "", limited, "", false, "The authorization server as.example.com permits no further calls for now. Try again later."},
		{"", 429, code(bodyCanary), limited, "", false, ""},
		{"", 429, code("server_error"), limited, "server_error", false, ""},
		{"", 429, code("invalid_request"), limited, "invalid_request", false, ""},
		{"", 400, code("slow_down"), limited, "slow_down", false, ""},

		{"", 500, code("server_error"), unavailable, "server_error", false,
			"The authorization server as.example.com is failing (HTTP status 500, server_error). Try again later."},
		{"", 400, code("temporarily_unavailable"), unavailable, "temporarily_unavailable", false, ""},
		{"", 200, code("server_error"), unavailable, "server_error", false, ""},
		{"no body", 409, "", unavailable, "", false, "is failing (HTTP status 409). Try again later."},
		{"", 409, code(bodyCanary), unavailable, "", false, ""},
		{"", 500, code("invalid_request"), unavailable, "invalid_request", false, ""},
		{"", 500, code(bodyCanary), unavailable, "", false, "is failing (HTTP status 500)."},
		{"", 599, "<html>", unavailable, "", false, "is failing"},
		{"", 502, "access_token=" + accessCanary, unavailable, "", false, "is failing"},

		{"HTML", 200, "<html>" + bodyCanary, unavailable, "", true, "The answer of the authorization server as.example.com cannot be used: it is neither JSON nor a form."},
		{"HTML with the URL of a form", 200, `<a href="/?x&access_token=` + accessCanary + `&refresh_token=` + newCanary + `&">`, unavailable, "", true, ""},
		{"nothing", 200, "", unavailable, "", true, ""},
		{"nothing", 204, "", unavailable, "", true, ""},
		{"a list", 200, `["` + bodyCanary + `"]`, unavailable, "", true, ""},
		{"a form of something else", 200, "a=b&refresh_token=" + bodyCanary, unavailable, "", true, ""},
		{"two lines", 200, "access_token=" + accessCanary + "\nrefresh_token=" + newCanary, unavailable, "", true, ""},
		{"half JSON", 200, `{"access_token":"` + accessCanary, unavailable, "", true, ""},
		{"half an error", 200, `{"error":"invalid_grant"`, unavailable, "", true, ""},
		{"half an error", 400, `{"error":"invalid_grant"`, unavailable, "", false,
			"The authorization server as.example.com gave an answer that cannot be used: HTTP status 400 and neither JSON nor a form. If that goes on, the operator has to check token_url, and any proxy on the way."},
		{"an empty object", 200, "{}", unavailable, "", true, "cannot be used: its access_token is missing, too long, or cannot be sent in a header."},
		{"an empty access token", 200, `{"access_token":""}`, unavailable, "", true, ""},
		{"expires_in 0", 200, body(map[string]any{"expires_in": 0}), unavailable, "", false, "cannot be used: its access token has expired already (expires_in)."},
		{"expires_in negative", 200, body(map[string]any{"expires_in": -0.5}), unavailable, "", false, "expires_in"},
		{"a redirect", 302, code("invalid_grant")[:10], unavailable, "", false, "redirects the call (HTTP status 302), and no redirect is followed. If that goes on, the operator has to check token_url."},
		{"a redirect with JSON", 301, "{}", unavailable, "", false, "redirects"},
		{"a redirect that keeps the method", 308, "", unavailable, "", false, "redirects"},
		{"a redirect that keeps the method", 307, "", unavailable, "", false, "redirects"},
		{"HTML", 404, "<html>" + bodyCanary, unavailable, "", false, "neither JSON nor a form"},
		{"a form whose error cannot be decoded", 400, "error=%zz", unavailable, "", false, "neither JSON nor a form"},
		{"nothing", 401, "", unavailable, "", false, "neither JSON nor a form"},
		{"nothing", 101, "", unavailable, "", false, "HTTP status 101 and neither JSON nor a form"},

		{"", 400, code("invalid_scope"), refused, "invalid_scope", false,
			"The authorization server as.example.com refuses the request (HTTP status 400, invalid_scope) and says neither that the refresh token nor that the connector is wrong. The operator has to check the connector's settings there and here."},
		{"", 200, code("unauthorized_client"), refused, "unauthorized_client", false, "(HTTP status 200, unauthorized_client)"},
		{"", 400, code("unsupported_grant_type"), refused, "unsupported_grant_type", false, ""},
		{"", 400, code("invalid_request"), refused, "invalid_request", false, ""},
		{"", 400, code("unsupported_token_type"), refused, "unsupported_token_type", false, ""},
		{"", 400, code("authorization_pending"), refused, "authorization_pending", false, ""},
		{"", 400, code("access_denied"), refused, "access_denied", false, ""},
		{"", 400, code("expired_token"), refused, "expired_token", false, ""},
		{"a code that nobody knows", 400, code(bodyCanary), refused, "", false, "(HTTP status 400)"},
		{"a secret as a code", 400, code(secretCanary), refused, "", false, ""},
		{"an error that is an object", 400, `{"error":{"message":"` + bodyCanary + `"}}`, refused, "", false, ""},
		{"JSON without an error", 403, `{"message":"` + bodyCanary + `"}`, refused, "", false, ""},
		{"ok false alone", 200, `{"ok":false}`, refused, "", false, ""},
		{"ok false in a form", 200, `ok=false&access_token=x`, refused, "", false, ""},
		{"an access token with an odd status", 400, body(nil), refused, "", false, ""},
		{"an access token with an odd status", 199 + 201, "access_token=" + accessCanary, refused, "", false, ""},
	} {
		t.Run(strconv.Itoa(c.status)+" "+c.code+" "+c.name, func(t *testing.T) {
			s := &server{status: c.status, body: c.body, header: http.Header{"Location": {"https://evil.example.com"}}}
			result := s.exchange(t, nil)
			e := requireFailure(t, c.kind, result.Err)
			require.Equal(t, c.code, e.Code)
			require.Equal(t, c.status, e.Status)
			require.Equal(t, c.lost, e.Lost)
			require.Contains(t, e.Text, c.text)
			require.Zero(t, e.RetryAfter)
			require.Len(t, s.requests, 1)
			require.Nil(t, result.AccessToken)
			require.Empty(t, result.RefreshToken)
			require.Nil(t, result.Facts)
		})
	}
}

func TestKnownCodes(t *testing.T) {
	for _, code := range []string{
		"invalid_token", "invalid_target", "insufficient_scope", "interaction_required", "login_required", "consent_required",
		"account_selection_required", "invalid_dpop_proof", "use_dpop_nonce", "invalid_authorization_details",
		"insufficient_user_authentication", "unmet_authentication_requirements", "authorization_declined",
	} {
		require.NotZero(t, meaning(code), code)
	}
	require.Zero(t, meaning("invalid_grants"))
	require.Zero(t, meaning(""))
}

func TestRetryAfter(t *testing.T) {
	for _, c := range []struct {
		name   string
		status int
		header map[string]string
		want   time.Duration
		text   string
	}{
		{"seconds", 429, map[string]string{"Retry-After": "17"}, 17 * time.Second, "Try again in 17s."},
		{"a day at most", 429, map[string]string{"Retry-After": "999999999"}, 24 * time.Hour, "Try again in 24h0m0s."},
		{"Okta's", 429, map[string]string{"X-Rate-Limit-Reset": "946684890"}, 90 * time.Second, "Try again in 1m30s."},
		{"both", 429, map[string]string{"Retry-After": "17", "X-Rate-Limit-Reset": "946684890"}, 17 * time.Second, "Try again in 17s."},
		{"Okta's in the past", 429, map[string]string{"X-Rate-Limit-Reset": "946684000"}, 0, "Try again later."},
		{"junk", 429, map[string]string{"Retry-After": bodyCanary}, 0, "Try again later."},
		{"an outage", 503, map[string]string{"Retry-After": "17"}, 17 * time.Second, "Try again in 17s."},
		{"an outage, ten minutes at most", 503, map[string]string{"Retry-After": "86400"}, 24 * time.Hour, "Try again in 10m0s."},
		{"an outage, Okta's", 503, map[string]string{"X-Rate-Limit-Reset": "946684890"}, 0, "Try again later."},
		{"forbidden", 403, map[string]string{"Retry-After": "17"}, 17 * time.Second, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { // its clock starts at midnight of 2000-01-01, UTC
				header := http.Header{}
				for name, value := range c.header {
					header.Set(name, value)
				}
				var e *tokenservice.Failure
				require.ErrorAs(t, (&server{status: c.status, header: header}).exchange(t, nil).Err, &e)
				require.Equal(t, c.want, e.RetryAfter)
				require.Contains(t, e.Text, c.text)
			})
		})
	}
}

func TestRefreshTokenLife(t *testing.T) {
	raw := func(s string) json.RawMessage { return json.RawMessage(s) }
	at := func(s int64) time.Time { return time.Unix(946684800+s, 0).UTC() } // synctest's clock begins there
	told := func(seconds int64) *tokenservice.Facts {
		return &tokenservice.Facts{Expires: at(seconds), RotatesFrom: at(seconds * 9 / 10)}
	}
	const day = 86400
	assumed := told(30 * day)
	assumed.Assumed = true
	for _, c := range []struct {
		name    string
		changes map[string]any
		want    *tokenservice.Facts
	}{
		{"a new one, assumed", map[string]any{"refresh_token": newCanary}, assumed},
		{"none", nil, nil},
		{"the old one again", map[string]any{"refresh_token": refreshCanary}, nil},
		{"told", map[string]any{"refresh_token": newCanary, "refresh_token_expires_in": 100}, told(100)},
		{"told by Intuit", map[string]any{"refresh_token": newCanary, "x_refresh_token_expires_in": "100"}, told(100)},
		{"told by Keycloak", map[string]any{"refresh_token": newCanary, "refresh_expires_in": raw("1e2")}, told(100)},
		{"told of the old one", map[string]any{"refresh_token_expires_in": 100}, told(100)},
		{"the first of two", map[string]any{"refresh_token_expires_in": 100, "x_refresh_token_expires_in": 200, "refresh_expires_in": 300}, told(100)},
		{"the second of two", map[string]any{"x_refresh_token_expires_in": 200, "refresh_expires_in": 300}, told(200)},
		{"odd", map[string]any{"refresh_token": newCanary, "refresh_token_expires_in": "never"}, assumed},
		{"negative", map[string]any{"refresh_token": newCanary, "refresh_token_expires_in": -1}, assumed},
		{"negative, of the old one", map[string]any{"refresh_token_expires_in": -1}, nil},
		{"no end", map[string]any{"refresh_token": newCanary, "refresh_expires_in": 0}, &tokenservice.Facts{}},
		{"no end of the old one", map[string]any{"refresh_expires_in": 0}, &tokenservice.Facts{}},
		{"a hundred years", map[string]any{"refresh_token": newCanary, "refresh_expires_in": 100 * 365 * day}, told(100 * 365 * day)},
		{"beyond", map[string]any{"refresh_token": newCanary, "refresh_expires_in": raw("3153600001")}, &tokenservice.Facts{}},
		{"beyond all", map[string]any{"refresh_token": newCanary, "refresh_expires_in": raw("1e300")}, &tokenservice.Facts{}},
		{"2^64 nanoseconds", map[string]any{"refresh_token": newCanary, "refresh_expires_in": raw("18446744074")}, &tokenservice.Facts{}},
		{"a JWT", map[string]any{"refresh_token": jwt(`{"exp":946685800}`)}, told(1000)},
		{"a JWT of some age", map[string]any{"refresh_token": jwt(`{"exp":946685800,"iat":946683800}`)},
			&tokenservice.Facts{Expires: at(1000), RotatesFrom: at(800)}},
		{"a JWT that was issued after its end", map[string]any{"refresh_token": jwt(`{"exp":946685800,"iat":946685801}`)}, told(1000)},
		{"a JWT that was issued at its end", map[string]any{"refresh_token": jwt(`{"exp":946685800,"iat":946685800}`)},
			&tokenservice.Facts{Expires: at(1000), RotatesFrom: at(1000)}},
		{"a JWT without end", map[string]any{"refresh_token": jwt(`{"exp":0}`)}, assumed},
		{"a JWT with a negative end", map[string]any{"refresh_token": jwt(`{"exp":-5}`)}, assumed},
		{"a JWT by another clock", map[string]any{"refresh_token": jwt(`{"exp":946684800}`)}, assumed},
		{"a JWT beside a field", map[string]any{"refresh_token": jwt(`{"exp":946685800}`), "refresh_token_expires_in": 100}, told(100)},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &server{status: 200, body: body(c.changes)}
				result := s.exchange(t, func(c *Config) { c.RefreshTokenLife = 30 * 24 * time.Hour })
				require.NoError(t, result.Err)
				require.Equal(t, c.want, result.Facts)
			})
		})
	}
}

// An access token's life is 400 days at most, also where the connector's settings assume more.
func TestAssumedLifeOfAnAccessToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &server{status: 200, body: body(map[string]any{"expires_in": nil})}
		result := s.exchange(t, func(c *Config) { c.AccessTokenLife = 500 * 24 * time.Hour })
		require.NoError(t, result.Err)
		require.Equal(t, time.Now().Add(400*24*time.Hour).UTC(), result.AccessToken.Expires)
	})
}

func TestLateAnswer(t *testing.T) {
	for delay, dead := range map[time.Duration]bool{time.Second: false, 2 * time.Second: true, 3 * time.Second: true} {
		synctest.Test(t, func(t *testing.T) {
			s := &server{status: 200, delay: delay, body: body(map[string]any{"expires_in": 2, "refresh_token": newCanary})}
			result := s.exchange(t, nil)
			require.Equal(t, newCanary, result.RefreshToken)
			if !dead {
				require.NoError(t, result.Err)
				return
			}
			e := requireFailure(t, tokenservice.Unavailable, result.Err)
			require.Contains(t, e.Text, "expired before the answer came")
			require.False(t, e.Lost)
		})
	}
}

func TestNoAnswer(t *testing.T) {
	t.Run("the connection breaks", func(t *testing.T) {
		result := (&server{err: errors.New(bodyCanary)}).exchange(t, nil)
		e := requireFailure(t, tokenservice.Unavailable, result.Err)
		require.True(t, e.Lost)
		require.Zero(t, e.Status)
		require.Equal(t, "The authorization server as.example.com closed the connection too early, or answered with something that is not HTTP. Try again later.", e.Text)
		require.False(t, result.Sent.IsZero())
	})
	t.Run("the name does not resolve", func(t *testing.T) {
		s := &server{err: &net.DNSError{IsNotFound: true}}
		c := client(t, s.with(func(c *Config) {
			c.RevocationURL, c.DeviceAuthorizationURL = "https://as.example.com/revoke", "https://as.example.com/device"
		}))
		_, start := c.StartDevice(t.Context(), tokenservice.DeviceRequest{})
		for field, err := range map[string]error{
			"token_url":                c.Exchange(t.Context(), tokenservice.Exchange{RefreshToken: refreshCanary}).Err,
			"device_authorization_url": start,
			"revocation_url":           c.Revoke(t.Context(), accessCanary, tokenservice.TypeAccessToken, nil),
		} {
			require.Contains(t, requireFailure(t, tokenservice.Unavailable, err).Text, "The operator has to check "+field+" and DNS.")
		}
	})
	for status, lost := range map[int]bool{200: true, 400: false} {
		t.Run("the body breaks off "+strconv.Itoa(status), func(t *testing.T) {
			e := requireFailure(t, tokenservice.Unavailable, (&server{status: status, body: body(nil), cut: true}).exchange(t, nil).Err)
			require.Equal(t, lost, e.Lost)
			require.Contains(t, e.Text, "closed the connection too early")
		})
	}
	t.Run("the body of a refusal breaks off", func(t *testing.T) {
		e := requireFailure(t, tokenservice.Unavailable, (&server{status: 400, body: `{"error":"invalid_grant"}`, cut: true}).exchange(t, nil).Err)
		require.Empty(t, e.Code)
	})
	t.Run("too slow", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			start := time.Now()
			result := (&server{delay: time.Minute}).exchange(t, nil)
			e := requireFailure(t, tokenservice.Unavailable, result.Err)
			require.True(t, e.Lost)
			require.Equal(t, "The authorization server as.example.com timed out after request_timeout (15s). Try again later.", e.Text)
			require.Equal(t, 15*time.Second, time.Since(start))
		})
	})
	t.Run("no permit", func(t *testing.T) {
		s, no := &server{}, errors.New("no")
		result := client(t, s.with(nil)).Exchange(t.Context(), tokenservice.Exchange{
			RefreshToken: refreshCanary,
			Permit:       func(context.Context) (func(), error) { return nil, no },
		})
		require.Equal(t, tokenservice.Result{Err: no}, result)
		require.Empty(t, s.requests)
	})
	t.Run("given up before", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		result := client(t, (&server{}).with(nil)).Exchange(ctx, tokenservice.Exchange{RefreshToken: refreshCanary})
		require.ErrorIs(t, result.Err, context.Canceled)
		require.True(t, result.Sent.IsZero())
	})
	for field, edit := range map[string]func(*Config){
		"connector_id":     func(c *Config) { c.ClientID = "" },
		"connector_secret": func(c *Config) { c.ClientSecret = "" },
	} {
		t.Run("no "+field, func(t *testing.T) {
			s, p := &server{}, &permits{}
			c := client(t, s.with(edit))
			require.Equal(t, field, c.Missing().Field)
			result := c.Exchange(t.Context(), tokenservice.Exchange{RefreshToken: refreshCanary, Permit: p.permit})
			e := requireFailure(t, tokenservice.Refused, result.Err)
			require.Equal(t, "The call was not made: "+field+" is missing: the connector's owner has to write it.", e.Text)
			require.False(t, e.Lost)
			require.Empty(t, s.requests)
			require.Zero(t, p.asked)
		})
	}
	t.Run("a refresh token that cannot be sent", func(t *testing.T) {
		s := &server{}
		result := client(t, s.with(nil)).Exchange(t.Context(), tokenservice.Exchange{RefreshToken: refreshCanary + "\n"})
		e := requireFailure(t, tokenservice.Refused, result.Err)
		require.True(t, strings.HasPrefix(e.Text, "The exchange was not made: the token holds a character"))
		require.Empty(t, s.requests)
	})
}

// A whole exchange with TLS over the network, and one with a server that does not answer.
func TestOverTheNetwork(t *testing.T) {
	s := oauth2test.New()
	ca, stop := s.ListenTLS()
	defer stop()
	id, secret := s.RegisterClient(oauth2test.AuthBasic)
	of := func(c *Config) { c.ClientID, c.ClientSecret, c.TokenURL, c.CACert = id, secret, s.TokenURL(), ca }
	token := s.Grant(id, "ada")
	c := client(t, of)
	result := c.Exchange(t.Context(), tokenservice.Exchange{RefreshToken: token})
	require.NoError(t, result.Err)
	require.Equal(t, s.CurrentRefreshToken("ada"), result.RefreshToken)
	require.True(t, s.Alive(result.AccessToken.Token))

	for name, c := range map[string]struct {
		fault oauth2test.Fault
		lost  bool
		kept  bool
	}{
		"reset after it was carried out": {oauth2test.Fault{Process: true, Reset: true}, true, false},
		"cut off early":                  {oauth2test.Fault{Truncate: true, TruncateAt: 2}, true, false},
		"cut off early and quietly":      {oauth2test.Fault{TruncateQuietly: true, TruncateAt: 2}, true, false},
		"HTML after it was carried out":  {oauth2test.Fault{Process: true, Answer: oauth2test.HTML}, true, false},
		"a refusal of the gateway":       {oauth2test.Fault{Answer: oauth2test.BadGateway}, false, false},
	} {
		t.Run(name, func(t *testing.T) {
			c.fault.Times = 1
			s.Inject(c.fault)
			token := s.Grant(id, "bob")
			result := client(t, of).Exchange(t.Context(), tokenservice.Exchange{RefreshToken: token})
			e := requireFailure(t, tokenservice.Unavailable, result.Err)
			require.Equal(t, c.lost, e.Lost)
			require.Empty(t, result.RefreshToken)
		})
	}
	t.Run("a certificate that is not trusted", func(t *testing.T) {
		c := client(t, func(c *Config) { of(c); c.CACert = "" })
		e := requireFailure(t, tokenservice.Unavailable, c.Exchange(t.Context(), tokenservice.Exchange{RefreshToken: "x"}).Err)
		require.False(t, e.Lost)
		require.Contains(t, e.Text, "ca_cert")
	})
}

// An exchange with each kind of server that the test server can play.
func TestKindsOfServers(t *testing.T) {
	for _, method := range []string{oauth2test.AuthBasic, oauth2test.AuthPost, oauth2test.AuthNone} {
		for name, options := range map[string]func(*oauth2test.Options){
			"class A":   oauth2test.ClassA,
			"zitadel":   oauth2test.Zitadel,
			"no new":    func(o *oauth2test.Options) { o.Rotation = oauth2test.RotateNever },
			"the same":  func(o *oauth2test.Options) { o.Rotation = oauth2test.RotateSame },
			"empty":     func(o *oauth2test.Options) { o.Rotation = oauth2test.RotateEmpty },
			"a form":    func(o *oauth2test.Options) { o.Format = oauth2test.FormatForm },
			"BOM":       func(o *oauth2test.Options) { o.Format = oauth2test.FormatBOM },
			"GitHub":    func(o *oauth2test.Options) { o.Format = oauth2test.FormatAccept },
			"a decimal": func(o *oauth2test.Options) { o.ExpiresIn = oauth2test.ExpiresInDecimal },
			"a string":  func(o *oauth2test.Options) { o.ExpiresIn = oauth2test.ExpiresInString },
			"missing":   func(o *oauth2test.Options) { o.ExpiresIn = oauth2test.ExpiresInMissing },
			"odd":       func(o *oauth2test.Options) { o.OddSecrets = true },
			"JWT": func(o *oauth2test.Options) {
				o.JWT, o.RefreshTokenJWT, o.RefreshTokenLife = true, true, 30*24*time.Hour
			},
		} {
			t.Run(method+" "+name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					s := oauth2test.New()
					s.Set(options)
					s.Set(func(o *oauth2test.Options) { o.Echo = true })
					id, secret := s.RegisterClient(method)
					c := client(t, func(c *Config) {
						c.ClientID, c.ClientSecret, c.AuthMethod, c.TokenURL, c.Transport = id, secret, method, s.TokenURL(), s.Transport()
					})
					token := s.Grant(id, "ada")
					for range 3 {
						result := c.Exchange(t.Context(), tokenservice.Exchange{RefreshToken: token})
						require.NoError(t, result.Err)
						require.True(t, s.Alive(result.AccessToken.Token))
						if result.RefreshToken != "" {
							token = result.RefreshToken
						}
						require.Equal(t, s.CurrentRefreshToken("ada"), token)
						require.WithinDuration(t, s.TokenStatus(result.AccessToken.Token).Expires, result.AccessToken.Expires, time.Second)
					}
					require.Zero(t, s.UsedTwice())
					s.Withdraw("ada")
					requireFailure(t, tokenservice.RefusedRefreshToken, c.Exchange(t.Context(), tokenservice.Exchange{RefreshToken: token}).Err)
				})
			})
		}
	}
}
