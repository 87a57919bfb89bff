package kaizala

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"
)

const (
	// maxAnswerBytes bounds an answer's body after decompression, in bytes; the documented answer takes about 2 KiB.
	maxAnswerBytes = 256 << 10
	// maxRetryAfter bounds how long a Retry-After can silence a connector. The documented limits are per minute.
	maxRetryAfter = 24 * time.Hour
	// maxAccessTokenLife bounds an access token's expiry, which is 24 hours ahead (doc): beyond a refresh token's
	// life a number is likelier to be in another unit.
	maxAccessTokenLife = 400 * 24 * time.Hour
	// clockSkew is how far in the past an expiry may lie and still be blamed on two clocks that differ.
	clockSkew = 24 * time.Hour
)

// answer is one HTTP answer, as far as it arrived.
type answer struct {
	status int
	header http.Header
	body   []byte
	// broken says why the body is not all that was sent; "" when it is.
	broken string
}

// fields are the documented fields of an answer, grant or error.
type fields struct {
	accessToken, endpointURL, refreshToken, scope string
	expiry                                        json.Number
	message, errorCode                            string
	mistyped                                      string // the first field whose type is not the documented one
	whole                                         bool   // one JSON object, and nothing after it
}

// undocumented stands for an errorCode that is there and is no string.
const undocumented = "(undocumented)"

// decode reads the top-level object token by token, so that a refresh token is found although what comes after it is
// cut off. As with encoding/json, the last of two equal keys wins, null and a wrong type overwrite nothing, and a
// key's case does not matter.
func decode(body []byte) (f fields) {
	dec := json.NewDecoder(bytes.NewReader(body))
	dec.UseNumber()
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return f
	}
	for dec.More() {
		key, err := dec.Token()
		if err != nil {
			return f
		}
		value, err := dec.Token()
		if err != nil {
			return f
		}
		if _, nested := value.(json.Delim); nested && !skip(dec) {
			return f
		}
		name, _ := key.(string)
		f.set(name, value)
	}
	if _, err := dec.Token(); err != nil {
		return f
	}
	_, err := dec.Token()
	f.whole = err == io.EOF
	return f
}

// skip reads on to the end of the object or list that has just begun.
func skip(dec *json.Decoder) bool {
	for depth := 1; depth > 0; {
		t, err := dec.Token()
		if err != nil {
			return false
		}
		switch t {
		case json.Delim('{'), json.Delim('['):
			depth++
		case json.Delim('}'), json.Delim(']'):
			depth--
		}
	}
	return true
}

func (f *fields) set(name string, value json.Token) {
	if value == nil {
		return
	}
	text, isText := value.(string)
	var into *string
	switch {
	case strings.EqualFold(name, "accessToken"):
		name, into = "accessToken", &f.accessToken
	case strings.EqualFold(name, "endpointUrl"):
		name, into = "endpointUrl", &f.endpointURL
	case strings.EqualFold(name, "refreshToken"):
		name, into = "refreshToken", &f.refreshToken
	case strings.EqualFold(name, "scope"):
		name, into = "scope", &f.scope
	case strings.EqualFold(name, "accessTokenExpiry"):
		if number, ok := value.(json.Number); ok {
			f.expiry = number
			return
		}
		name, isText = "accessTokenExpiry", false
	case strings.EqualFold(name, "message"):
		if isText {
			f.message = text
		}
		return
	case strings.EqualFold(name, "errorCode"):
		switch {
		case isText:
			f.errorCode = strings.TrimSpace(text)
		case value != false && value != json.Number("0"):
			f.errorCode = undocumented
		}
		return
	default:
		return
	}
	if isText {
		*into = text
	} else if f.mistyped == "" {
		f.mistyped = name
	}
}

// interpret says what an answer means. sent is the refresh token that the exchange was made with. Beside an error there
// is a grant only where the answer holds a new refresh token, and then it holds nothing else.
func interpret(a answer, sent string, now time.Time) (*Grant, *Error) {
	if a.status == http.StatusTooManyRequests {
		e := &Error{Kind: Limited, Status: a.status, RetryAfter: retryAfter(a.header, now)}
		e.Text = "Kaizala's limit of calls is used up. Try again later."
		if e.RetryAfter > 0 {
			e.Text = fmt.Sprintf("Kaizala's limit of calls is used up. Try again in %v.", e.RetryAfter.Round(time.Second))
		}
		return nil, e
	}
	f := decode(a.body)
	success := a.status/100 == 2

	// Only a success can hold a new refresh token: an error page that shows one in some field must not replace a good one.
	var rescued *Grant
	newToken := strings.TrimSpace(f.refreshToken)
	if newToken == sent || !success {
		newToken = ""
	}
	badToken := newToken != "" && CheckToken(newToken) != nil
	if newToken != "" && !badToken {
		rescued = &Grant{RefreshToken: newToken}
	}

	// A refusal has consequences, so half of one is not believed.
	if f.whole && a.broken == "" {
		if e := refusal(a.status, f); e != nil {
			if a.status >= 500 {
				e.RetryAfter = retryAfter(a.header, now)
			}
			return rescued, e
		}
	}
	unavailable := func(text string) (*Grant, *Error) {
		return rescued, &Error{Kind: Unavailable, Status: a.status, Text: text}
	}
	switch {
	case a.status >= 500:
		return nil, failing(a.status, "", retryAfter(a.header, now))
	case a.broken != "":
		return unavailable(a.broken)
	case !success:
		return unavailable(fmt.Sprintf("Kaizala's token service did not make sense: it answered with HTTP status %d and no errorCode. "+
			"If that goes on, the operator has to check api_root, and any proxy on the way.", a.status))
	case !f.whole:
		return unavailable(senseless("it is not one JSON object"))
	case f.mistyped != "":
		return unavailable(senseless(f.mistyped + " has the wrong type"))
	case badToken:
		return unavailable(senseless("its refreshToken cannot be sent in a header"))
	case CheckToken(f.accessToken) != nil:
		return unavailable(senseless("its accessToken is missing, or cannot be sent in a header"))
	}
	if _, _, problem := parseTarget(f.endpointURL); problem != "" {
		return unavailable(senseless("its endpointUrl is missing, or no https URL"))
	}
	millis, err := strconv.ParseInt(f.expiry.String(), 10, 64)
	if err != nil {
		return unavailable(senseless("its accessTokenExpiry is missing, or no whole number of milliseconds"))
	}
	expires := time.UnixMilli(millis).UTC()
	switch {
	case expires.Before(now.Add(-clockSkew)):
		return unavailable(senseless("its accessToken has long expired"))
	case !expires.After(now):
		return unavailable(senseless("its accessToken has expired already. Perhaps this machine's clock and Kaizala's differ: the operator has to check it"))
	case expires.After(now.Add(maxAccessTokenLife)):
		expires = now.Add(maxAccessTokenLife).UTC()
	}
	return &Grant{
		AccessToken:  f.accessToken,
		EndpointURL:  f.endpointURL,
		Expires:      expires,
		RefreshToken: newToken,
		Scope:        f.scope,
	}, nil
}

func senseless(why string) string {
	return "Kaizala's answer did not make sense: " + why + "."
}

// refusal reads an error body (client), or returns nil.
func refusal(status int, f fields) *Error {
	e := &Error{Status: status, Code: documentedCode(f.errorCode)}
	named := e.Code
	if named == "" {
		named = "an unknown errorCode"
	}
	message := strings.ToLower(f.message)
	blamesConnector := strings.Contains(message, "applicationid") && strings.Contains(message, "secret")
	switch {
	case blamesConnector && (f.errorCode != "" || status/100 == 4):
		e.Kind = RefusedConnector
		e.Text = "Kaizala refuses the connector. Its owner has to check connector_id and connector_secret, and write them anew."
	case f.errorCode == "":
		return nil
	case e.Code == "InvalidToken":
		e.Kind = RefusedRefreshToken
		e.Text = "Kaizala refuses the refresh token (InvalidToken). The tenant user has to generate a new one on Kaizala's portal, and write it."
	case status/100 == 2 || status/100 == 4:
		e.Kind = Refused
		e.Text = "Kaizala refuses the exchange (" + named + ") and blames neither the refresh token nor the connector. " +
			"The connector owner has to check the connector on Kaizala's portal."
	default:
		return failing(status, named, 0)
	}
	return e
}

// failing is a service that fails by its own account.
func failing(status int, named string, retry time.Duration) *Error {
	with := fmt.Sprintf("HTTP status %d", status)
	if named != "" {
		with += ", " + named
	}
	return &Error{
		Kind: Unavailable, Status: status, Code: documentedCode(named), RetryAfter: retry,
		Text: "Kaizala's token service is failing (" + with + "). Try again later.",
	}
}

// retryAfter reads the header of that name, seconds (doc) or a date (RFC 9110), as a duration from now; 0 for anything
// else.
func retryAfter(h http.Header, now time.Time) time.Duration {
	value := strings.TrimSpace(h.Get("Retry-After"))
	if value != "" && strings.Trim(value, "0123456789") == "" {
		seconds, err := strconv.ParseInt(value, 10, 64)
		if err != nil || seconds > int64(maxRetryAfter/time.Second) {
			return maxRetryAfter
		}
		return time.Duration(seconds) * time.Second
	}
	if at, err := http.ParseTime(value); err == nil {
		return min(max(at.Sub(now), 0), maxRetryAfter)
	}
	return 0
}
