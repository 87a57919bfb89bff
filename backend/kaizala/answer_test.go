package kaizala

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/tokenservice"
)

// body is a valid answer with changes: nil deletes a field, and json.RawMessage is written as it is.
func body(t testing.TB, changes map[string]any) string {
	t.Helper()
	fields := map[string]any{
		"accessToken":       accessCanary,
		"endpointUrl":       "https://inc-000.KaizalaMessaging.osi.office.net/",
		"accessTokenExpiry": time.Now().Add(24 * time.Hour).UnixMilli(),
		"refreshToken":      "",
		"scope":             "token.write",
	}
	for k, v := range changes {
		fields[k] = v
		if v == nil {
			delete(fields, k)
		}
	}
	raw, err := json.Marshal(fields)
	require.NoError(t, err)
	return string(raw)
}

func TestGrant(t *testing.T) {
	null := json.RawMessage("null")
	for _, c := range []struct {
		name     string
		changes  map[string]any
		newToken string
	}{
		{"refreshToken empty", nil, ""},
		{"refreshToken null", map[string]any{"refreshToken": null}, ""},
		{"refreshToken absent", map[string]any{"refreshToken": nil}, ""},
		{"refreshToken new", map[string]any{"refreshToken": newCanary}, newCanary},
		{"refreshToken new, with spaces around it", map[string]any{"refreshToken": " " + newCanary + "\n"}, newCanary},
		{"refreshToken as it was", map[string]any{"refreshToken": refreshCanary}, ""},
		{"an empty errorCode", map[string]any{"errorCode": ""}, ""},
		{"a null errorCode", map[string]any{"errorCode": null}, ""},
		{"an errorCode of 0", map[string]any{"errorCode": 0}, ""},
		{"refreshToken new, then as it was", map[string]any{"RefreshToken": newCanary, "refreshToken": refreshCanary}, newCanary},
		{"refreshToken a number", map[string]any{"refreshToken": 5}, ""},
		{"refreshToken false", map[string]any{"refreshToken": false}, ""},
		{"an errorCode of \"0\"", map[string]any{"errorCode": "0"}, ""},
		{"an errorCode of white space", map[string]any{"errorCode": " "}, ""},
		{"an errorCode that is false", map[string]any{"errorCode": false}, ""},
		{"fields that nobody knows", map[string]any{"x": map[string]any{"refreshToken": "inner", "list": []any{1, []any{}, "a"}}}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := through(t, answering(200, nil, body(t, c.changes)+"\n")).exchange(t)
			g := requireGranted(t, r)
			assert.Equal(t, accessCanary, g.Token)
			assert.Equal(t, "https://inc-000.KaizalaMessaging.osi.office.net/", g.EndpointURL, "as sent")
			assert.Equal(t, "token.write", g.Scope)
			assert.Equal(t, c.newToken, r.RefreshToken)
			assert.Equal(t, c.newToken != "", r.Facts != nil)
			assert.Empty(t, g.Type)
			assert.Empty(t, r.Endpoint)
			assert.Equal(t, time.UTC, g.Expires.Location())
			assert.WithinDuration(t, time.Now().Add(24*time.Hour), g.Expires, time.Minute)
		})
	}

	t.Run("scope is optional", func(t *testing.T) {
		r := through(t, answering(200, nil, body(t, map[string]any{"scope": nil}))).exchange(t)
		g := requireGranted(t, r)
		assert.Empty(t, g.Scope)
	})
	t.Run("an endpoint on a loopback address", func(t *testing.T) {
		r := through(t, answering(200, nil, body(t, map[string]any{"endpointUrl": "http://127.0.0.1:1"}))).exchange(t)
		g := requireGranted(t, r)
		assert.Equal(t, "http://127.0.0.1:1", g.EndpointURL)
	})
	t.Run("the expiry is milliseconds, exactly", func(t *testing.T) {
		millis := time.Now().Add(time.Hour).UnixMilli()
		r := through(t, answering(200, nil, body(t, map[string]any{"accessTokenExpiry": millis}))).exchange(t)
		g := requireGranted(t, r)
		assert.Equal(t, millis, g.Expires.UnixMilli())
	})
	t.Run("an expiry is capped at 400 days", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			far := time.Now().Add(401 * 24 * time.Hour).UnixMilli()
			r := through(t, answering(200, nil, body(t, map[string]any{"accessTokenExpiry": far}))).exchange(t)
			g := requireGranted(t, r)
			assert.Equal(t, time.Now().Add(400*24*time.Hour).UTC(), g.Expires)
		})
	})
	t.Run("the last of two keys wins", func(t *testing.T) {
		b := strings.Replace(body(t, map[string]any{"refreshToken": newCanary}), "{", `{"refreshToken":"first",`, 1)
		r := through(t, answering(200, nil, b)).exchange(t)
		requireGranted(t, r)
		assert.Equal(t, newCanary, r.RefreshToken)
	})
	t.Run("but a null or an empty one takes nothing away", func(t *testing.T) {
		b := strings.TrimSuffix(body(t, map[string]any{"refreshToken": newCanary}), "}") + `,"refreshToken":null,"accessToken":null,"refreshToken":"","accessToken":" ","endpointUrl":"","accessTokenExpiry":""}`
		r := through(t, answering(200, nil, b)).exchange(t)
		g := requireGranted(t, r)
		assert.Equal(t, newCanary, r.RefreshToken)
		assert.Equal(t, accessCanary, g.Token)
	})
}

// The client understands answers that differ from the documented form but have one clear meaning.
func TestSpellings(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		millis := time.Now().Add(24 * time.Hour).UnixMilli()
		for name, spelling := range map[string]string{
			"a number":    fmt.Sprint(millis),
			"a decimal":   fmt.Sprintf("%d.0", millis),
			"a fraction":  fmt.Sprintf("%d.999", millis),
			"E notation":  fmt.Sprintf("%d.%012de12", millis/1e12, millis%1e12),
			"a string":    fmt.Sprintf("%q", fmt.Sprint(millis)),
			"all of them": fmt.Sprintf(`" %d.%012dE+12\n"`, millis/1e12, millis%1e12),
		} {
			r := through(t, answering(200, nil, body(t, map[string]any{"accessTokenExpiry": json.RawMessage(spelling)}))).exchange(t)
			assert.Equal(t, millis, requireGranted(t, r).Expires.UnixMilli(), name)
		}
		for name, far := range map[string]string{
			"beyond 400 days": fmt.Sprint(time.Now().Add(400*24*time.Hour + time.Millisecond).UnixMilli()),
			"microseconds":    fmt.Sprintf("%d000", millis),
			"beyond 2262":     "1e15",
			"beyond 64 bits":  "99999999999999999999",
			"beyond reason":   "1e999999999",
		} {
			r := through(t, answering(200, nil, body(t, map[string]any{"accessTokenExpiry": json.RawMessage(far)}))).exchange(t)
			assert.Equal(t, time.Now().Add(400*24*time.Hour).UTC(), requireGranted(t, r).Expires, name)
		}
		r := through(t, answering(200, nil, "\ufeff"+body(t, map[string]any{"refreshToken": newCanary}))).exchange(t)
		requireGranted(t, r)
		assert.Equal(t, newCanary, r.RefreshToken, "behind a byte-order mark")
	})
	for name, c := range map[string]struct {
		field       string
		value, want any
	}{
		"a scope that is a list": {"scope", []any{"token.write", 5, "token.read"}, "token.write,token.read"},
		"a scope that is none":   {"scope", map[string]any{"a": 1}, ""},
		"the longest scope":      {"scope", strings.Repeat("a", 4<<10), strings.Repeat("a", 4<<10)},
		"a longer scope":         {"scope", strings.Repeat("a", 4<<10+1), ""},
		"a scope with ESC":       {"scope", "a\x1b[2J", ""},
		"a scope with LF":        {"scope", "a\nb", ""},
	} {
		g := requireGranted(t, through(t, answering(200, nil, body(t, map[string]any{c.field: c.value}))).exchange(t))
		assert.Equal(t, c.want, g.Scope, name)
	}
	const e = "https://e.osi.office.net/"
	for url, want := range map[string]string{
		" " + e + "\n":                         e,
		e + strings.Repeat("a", 2048-len(e)):   e + strings.Repeat("a", 2048-len(e)),
		e + strings.Repeat("a", 2048-len(e)+1): "",
		e + "\u202e":                           "",
		e + "\x1b":                             "",
	} {
		g := requireGranted(t, through(t, answering(200, nil, body(t, map[string]any{"endpointUrl": url}))).exchange(t))
		assert.Equal(t, want, g.EndpointURL)
	}
}

func TestFactsOfANewRefreshToken(t *testing.T) {
	issued := time.Now().Truncate(time.Second).UTC()
	token := jwt(t, claimSet{"iat": issued.Unix(), "exp": issued.Add(1000 * time.Hour).Unix(), "urn:microsoft:credentials": claimSet{"applicationId": connectorID, "data": claimSet{"GroupId": "g-1"}}})
	r := through(t, answering(200, nil, body(t, map[string]any{"refreshToken": token}))).exchange(t)
	requireGranted(t, r)
	assert.Equal(t, &tokenservice.Facts{Kind: "group", GroupID: "g-1", Expires: issued.Add(1000 * time.Hour), RotatesFrom: issued.Add(900 * time.Hour)}, r.Facts)

	r = through(t, answering(200, nil, body(t, map[string]any{"refreshToken": newCanary}))).exchange(t)
	assert.Equal(t, &tokenservice.Facts{Kind: "unknown"}, r.Facts)
}

// An answer counts as lost if it may have something that the client could not read.
func TestLost(t *testing.T) {
	whole := body(t, nil)
	for name, c := range map[string]struct {
		status int
		body   string
		lost   bool
	}{
		"half a success":               {200, whole[:len(whole)/2], true},
		"a web page that is a success": {200, "<html>", true},
		"no body":                      {204, "", true},
		"over the cap":                 {200, whole + strings.Repeat(" ", tokenservice.MaxAnswerBytes), true},
		"an error over the cap":        {500, strings.Repeat(" ", tokenservice.MaxAnswerBytes+1), true},
		"a refusal over the cap":       {400, strings.Repeat(" ", tokenservice.MaxAnswerBytes+1), true},
		"a success without a token":    {200, "{}", false},
		"a refusal":                    {401, `{"errorCode":"InvalidToken"}`, false},
		"an error":                     {503, "<html>", false},
		"a web page":                   {404, "<html>", false},
		"a redirect to a stranger":     {308, "", false},
	} {
		var f *tokenservice.Failure
		require.ErrorAs(t, through(t, answering(c.status, nil, c.body)).exchange(t).Err, &f, name)
		assert.Equal(t, c.lost, f.Lost, name)
		assert.Equal(t, c.status, f.Status, name)
	}
}

// Each answer has a new refresh token and something that is wrong: the client returns the token with the error, and nothing else.
func TestNewRefreshTokenIsNeverLost(t *testing.T) {
	with := func(field string, v any) string {
		return body(t, map[string]any{"refreshToken": newCanary, field: v})
	}
	token := `"refreshToken":"` + newCanary + `"`
	whole := with("x", 1)
	for name, b := range map[string]string{
		"cut off after it":          `{` + token,
		"cut off in the next key":   `{` + token + `,"acc`,
		"cut off in the next value": `{` + token + `,"accessToken":"abc`,
		"cut off in a number":       `{` + token + `,"accessTokenExpiry":17`,
		"cut off before the brace":  whole[:len(whole)-1],
		"followed by junk":          whole + bodyCanary,
		"followed by an object":     whole + whole,
		"junk after it":             `{` + token + ` ` + bodyCanary,
		"over the cap":              whole + strings.Repeat(" ", tokenservice.MaxAnswerBytes),
		"over the cap in a string":  `{` + token + `,"x":"` + strings.Repeat("a", tokenservice.MaxAnswerBytes) + `"}`,
		"nested over the cap":       `{` + token + `,"x":` + strings.Repeat("[", tokenservice.MaxAnswerBytes),
		"no accessToken":            with("accessToken", nil),
		"empty accessToken":         with("accessToken", ""),
		"accessToken with LF":       with("accessToken", accessCanary+"\nx"),
		"accessToken of 17 KiB":     with("accessToken", strings.Repeat("a", 17<<10)),
		"accessToken a number":      with("accessToken", 5),
		"accessToken an object":     with("accessToken", map[string]any{"a": accessCanary}),
		"no expiry":                 with("accessTokenExpiry", nil),
		"expiry a string":           with("accessTokenExpiry", bodyCanary),
		"expiry a fraction":         with("accessTokenExpiry", 1.5),
		"expiry negative":           with("accessTokenExpiry", -1),
		"expiry in seconds":         with("accessTokenExpiry", time.Now().Add(time.Hour).Unix()),
		"expiry just past":          with("accessTokenExpiry", time.Now().UnixMilli()),
		"no endpointUrl":            with("endpointUrl", nil),
		"endpointUrl relative":      with("endpointUrl", "/"+bodyCanary),
		"endpointUrl http":          with("endpointUrl", "http://"+bodyCanary+".osi.office.net"),
		"endpointUrl with a user":   with("endpointUrl", "https://"+bodyCanary+"@osi.office.net"),
		"endpointUrl a list":        with("endpointUrl", []string{bodyCanary}),
		"junk before it":            `{"accessToken":` + bodyCanary + `,` + token + `}`,
		"a line break before it":    "{\"scope\":\"a\nb\"," + token + "}",
		"a comma too many":          strings.TrimSuffix(whole, "}") + ",}",
	} {
		t.Run(name, func(t *testing.T) {
			r := through(t, answering(200, nil, b)).exchange(t)
			e := requireKind(t, tokenservice.Unavailable, r.Err)
			assert.Contains(t, e.Text, "cannot be used")
			requireRescued(t, newCanary, r)

			// The same answer without a new refresh token is only an error.
			r = through(t, answering(200, nil, strings.ReplaceAll(b, newCanary, refreshCanary))).exchange(t)
			requireKind(t, tokenservice.Unavailable, r.Err)
			requireRescued(t, "", r)
		})
	}

	t.Run("beside an errorCode", func(t *testing.T) {
		r := through(t, answering(200, nil, with("errorCode", "InvalidParameters"))).exchange(t)
		requireKind(t, tokenservice.Refused, r.Err)
		requireRescued(t, newCanary, r)
	})
	t.Run("but an error page's is not believed", func(t *testing.T) {
		for _, status := range []int{301, 400, 404, 429, 500, 503} {
			r := through(t, answering(status, nil, whole)).exchange(t)
			require.Error(t, r.Err)
			requireRescued(t, "", r)
		}
	})
	t.Run("nor half of one", func(t *testing.T) {
		r := through(t, answering(200, nil, `{"refreshToken":"`+newCanary)).exchange(t)
		requireKind(t, tokenservice.Unavailable, r.Err)
		requireRescued(t, "", r)
	})
	for name, bad := range map[string]string{"LF": newCanary + "\nx", "not ASCII": newCanary + "é", "too long": strings.Repeat("a", tokenservice.MaxTokenBytes+1)} {
		t.Run("nor one that cannot be sent, which costs itself alone: "+name, func(t *testing.T) {
			r := through(t, answering(200, nil, with("refreshToken", bad))).exchange(t)
			requireGranted(t, r)
			assert.Empty(t, r.RefreshToken)
			assert.Nil(t, r.Facts)

			r = through(t, answering(200, nil, strings.TrimSuffix(whole, "}")+`,"refreshToken":`+text(t, bad)+`}`)).exchange(t)
			requireGranted(t, r)
			assert.Equal(t, newCanary, r.RefreshToken, "this refresh token and no other")
		})
	}
}

func TestClocksThatDiffer(t *testing.T) {
	for ago, mentioned := range map[time.Duration]bool{0: true, 23 * time.Hour: true, 25 * time.Hour: false} {
		b := body(t, map[string]any{"accessTokenExpiry": time.Now().Add(-ago).UnixMilli()})
		r := through(t, answering(200, nil, b)).exchange(t)
		assert.Equal(t, mentioned, strings.Contains(requireKind(t, tokenservice.Unavailable, r.Err).Text, "clock"), "%v", ago)
	}
}

// The text for an answer without an expiry does not speak of clocks or of a token that has expired.
func TestTextOfAMissingExpiry(t *testing.T) {
	for _, expiry := range []any{nil, bodyCanary} {
		r := through(t, answering(200, nil, body(t, map[string]any{"accessTokenExpiry": expiry}))).exchange(t)
		assert.EqualError(t, r.Err, "Kaizala's answer cannot be used: its accessTokenExpiry is missing, or no number of milliseconds.")
	}
}

func TestRefusals(t *testing.T) {
	const wrongConnector = "Dont have correct applicationId and secret in header!"
	object := func(message, code any) string {
		raw, err := json.Marshal(map[string]any{"message": message, "errorCode": code, "errorCategoryKey": bodyCanary})
		require.NoError(t, err)
		return string(raw)
	}
	invalidToken := object(bodyCanary, "InvalidToken")
	for _, c := range []struct {
		name   string
		body   string
		status []int
		kind   tokenservice.Kind
		code   string
	}{
		{"InvalidToken", invalidToken, []int{200, 302, 400, 401, 403, 500, 503}, tokenservice.RefusedRefreshToken, "InvalidToken"},
		{"InvalidToken in another case", object("", " invalidTOKEN "), []int{200, 401}, tokenservice.RefusedRefreshToken, "InvalidToken"},
		{"the connector's message", object(wrongConnector, "Unauthenticated"), []int{200, 401, 500}, tokenservice.RefusedConnector, "Unauthenticated"},
		{"the connector's message in another case", object(strings.ToUpper(wrongConnector), bodyCanary), []int{401}, tokenservice.RefusedConnector, ""},
		{"the connector's message outweighs InvalidToken", object(wrongConnector, "InvalidToken"), []int{401}, tokenservice.RefusedConnector, "InvalidToken"},
		{"the connector's message without errorCode", object(wrongConnector, ""), []int{400, 401, 403}, tokenservice.RefusedConnector, ""},
		{"the connector's message without errorCode, but no 4xx", object(wrongConnector, ""), []int{200, 302, 500}, tokenservice.Unavailable, ""},
		{"half of the connector's message", object("no secret "+bodyCanary, "InvalidParameters"), []int{400}, tokenservice.Refused, "InvalidParameters"},
		{"the other half", object("no applicationId "+bodyCanary, "InvalidParameters"), []int{400}, tokenservice.Refused, "InvalidParameters"},
		{"Unauthenticated", object(bodyCanary, "unauthenticated"), []int{200, 401}, tokenservice.Refused, "Unauthenticated"},
		{"an unknown code", object(bodyCanary, bodyCanary), []int{200, 400}, tokenservice.Refused, ""},
		{"a code that is a number", object(bodyCanary, 7), []int{200, 400}, tokenservice.Refused, ""},
		{"a code that is an object", object(bodyCanary, map[string]any{"a": 1}), []int{200, 400}, tokenservice.Refused, ""},
		{"a code, then a number", `{"errorCode":"InvalidToken","errorCode":7}`, []int{401}, tokenservice.RefusedRefreshToken, "InvalidToken"},
		{"an unknown code with a 5xx", object(bodyCanary, bodyCanary), []int{500, 503}, tokenservice.Unavailable, ""},
		{"a documented code with a 5xx", object(bodyCanary, "InvalidParameters"), []int{500}, tokenservice.Unavailable, "InvalidParameters"},
		{"no code", object(bodyCanary, ""), []int{200, 400, 404, 500}, tokenservice.Unavailable, ""},
		{"a code beside a whole grant", body(t, map[string]any{"errorCode": "InvalidToken"}), []int{200}, tokenservice.RefusedRefreshToken, "InvalidToken"},
		{"half an InvalidToken", invalidToken[:len(invalidToken)-1], []int{200, 401, 500}, tokenservice.Unavailable, ""},
		{"InvalidToken and junk", invalidToken + bodyCanary, []int{200, 401}, tokenservice.Unavailable, ""},
		{"InvalidToken in a list", "[" + invalidToken + "]", []int{200, 401}, tokenservice.Unavailable, ""},
		{"a proxy's HTML", "<html>" + bodyCanary, []int{200, 301, 302, 303, 304, 400, 401, 403, 404, 407, 500, 502, 503}, tokenservice.Unavailable, ""},
		{"nothing", "", []int{101, 200, 204, 400, 401, 500}, tokenservice.Unavailable, ""},
		{"null", "null", []int{200, 400}, tokenservice.Unavailable, ""},
	} {
		for _, status := range c.status {
			t.Run(fmt.Sprintf("%s, %d", c.name, status), func(t *testing.T) {
				r := through(t, answering(status, nil, c.body)).exchange(t)
				e := requireKind(t, c.kind, r.Err)
				assert.Equal(t, status, e.Status)
				assert.Equal(t, c.code, e.Code)
				assert.Equal(t, c.kind == tokenservice.RefusedRefreshToken, e.TakesConnector)
				requireRescued(t, "", r)
				if c.kind == tokenservice.Refused && c.code == "" {
					assert.Contains(t, e.Text, "an unknown errorCode")
				}
			})
		}
	}
}

func TestErrorsSayWhoHasToDoWhat(t *testing.T) {
	for want, b := range map[string]string{
		"tenant user":     `{"errorCode":"InvalidToken"}`,
		"connector_id":    `{"errorCode":"x","message":"applicationId and secret"}`,
		"connector owner": `{"errorCode":"x"}`,
		"api_root":        `<html>`,
	} {
		r := through(t, answering(403, nil, b)).exchange(t)
		assert.ErrorContains(t, r.Err, want)
	}
}

func TestLimit(t *testing.T) {
	// The status decides, whatever the body says.
	for _, b := range []string{"", "<html>", `{"errorCode":"InvalidToken"}`, body(t, nil)} {
		r := through(t, answering(429, http.Header{"Retry-After": {"30"}}, b)).exchange(t)
		e := requireKind(t, tokenservice.Limited, r.Err)
		assert.Equal(t, 429, e.Status)
		assert.Equal(t, 30*time.Second, e.RetryAfter)
		assert.Contains(t, e.Text, "30s")
	}
}

func TestTextsOfLimitsAndFailures(t *testing.T) {
	for _, c := range []struct {
		status int
		retry  string
		body   string
		want   string
	}{
		{429, "", "", "Kaizala's limit of calls is used up. Try again later."},
		{429, "0", "", "Kaizala's limit of calls is used up. Try again later."},
		{429, "90", "", "Kaizala's limit of calls is used up. Try again in 1m30s."},
		{503, "", "<html>", "Kaizala's token service is failing (HTTP status 503). Try again later."},
		{500, "", "<html>", "Kaizala's token service is failing (HTTP status 500). Try again later."},
		{500, "", `{"errorCode":"InvalidParameters"}`, "Kaizala's token service is failing (HTTP status 500, InvalidParameters). Try again later."},
		{500, "", `{"errorCode":"` + bodyCanary + `"}`, "Kaizala's token service is failing (HTTP status 500, an unknown errorCode). Try again later."},
	} {
		r := through(t, answering(c.status, http.Header{"Retry-After": {c.retry}}, c.body)).exchange(t)
		assert.EqualError(t, r.Err, c.want)
	}
}

func TestRetryAfter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in := func(d time.Duration) string { return time.Now().Add(d).UTC().Format(http.TimeFormat) }
		for value, want := range map[string]time.Duration{
			"":                        0,
			"0":                       0,
			"17":                      17 * time.Second,
			" 17 ":                    17 * time.Second,
			"-17":                     0,
			"+17":                     0,
			"1.5":                     0,
			"1e3":                     0,
			bodyCanary:                0,
			"86400":                   24 * time.Hour,
			"86401":                   24 * time.Hour,
			"99999999999999999999":    24 * time.Hour,
			in(90 * time.Second):      90 * time.Second,
			in(-90 * time.Second):     0,
			in(25 * time.Hour):        24 * time.Hour,
			time.Now().UTC().String(): 0,
		} {
			header := http.Header{"Retry-After": {value}}
			r := through(t, answering(429, header, "")).exchange(t)
			assert.Equal(t, want, requireKind(t, tokenservice.Limited, r.Err).RetryAfter, "%q", value)
			for _, b := range []string{"<html>", `{"errorCode":"` + bodyCanary + `"}`} {
				r = through(t, answering(503, header, b)).exchange(t)
				assert.Equal(t, want, requireKind(t, tokenservice.Unavailable, r.Err).RetryAfter, "%q", value)
			}
			r = through(t, answering(403, header, "<html>")).exchange(t)
			assert.Equal(t, want, requireKind(t, tokenservice.Unavailable, r.Err).RetryAfter, "%q", value)
			r = through(t, answering(403, header, `{"errorCode":"x"}`)).exchange(t)
			assert.Equal(t, want, requireKind(t, tokenservice.Refused, r.Err).RetryAfter, "%q", value)
		}
	})
}

func TestNoMoreIsReadThanTheCap(t *testing.T) {
	read := 0
	endless := readerFunc(func(p []byte) (int, error) {
		if read > 2*tokenservice.MaxAnswerBytes {
			return 0, io.EOF
		}
		n := copy(p, " ")
		read += n
		return n, nil
	})
	r := through(t, transportFunc(func(*http.Request) (*http.Response, error) {
		return &http.Response{StatusCode: 200, Body: io.NopCloser(endless)}, nil
	})).exchange(t)
	assert.Contains(t, requireKind(t, tokenservice.Unavailable, r.Err).Text, "256 KiB")
	assert.Equal(t, tokenservice.MaxAnswerBytes+1, read)
}

func TestCapCountsDecompressedBytes(t *testing.T) {
	var bomb bytes.Buffer
	z := gzip.NewWriter(&bomb)
	_, _ = z.Write([]byte(`{"refreshToken":"` + newCanary + `","x":"`))
	zeros := bytes.Repeat([]byte("0"), 1<<20)
	for range 4 {
		_, _ = z.Write(zeros)
	}
	require.NoError(t, z.Close())
	require.Less(t, bomb.Len(), tokenservice.MaxAnswerBytes)

	c := served(t, func(w http.ResponseWriter, r *http.Request) {
		assert.Equal(t, "gzip", r.Header.Get("Accept-Encoding"))
		w.Header().Set("Content-Encoding", "gzip")
		_, _ = w.Write(bomb.Bytes())
	})
	r := c.exchange(t)
	assert.Contains(t, requireKind(t, tokenservice.Unavailable, r.Err).Text, "256 KiB")
	requireRescued(t, newCanary, r)
}
