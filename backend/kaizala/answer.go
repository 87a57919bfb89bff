package kaizala

import (
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/tokenservice"
)

const (
	// maxAccessTokenLife bounds an access token's expiry, which is 24 hours ahead (doc): beyond a refresh token's
	// life a number is likelier to be in another unit.
	maxAccessTokenLife = 400 * 24 * time.Hour
	// clockSkew is how far in the past an expiry may lie and still be blamed on two clocks that differ.
	clockSkew = 24 * time.Hour
)

// documentedCodes are the errorCodes that published clients knew (client). Any other is the service's own text, which
// no error may hold.
var documentedCodes = []string{"InvalidToken", "Unauthenticated", "InvalidParameters"}

// documentedCode returns the documented spelling of a code, or "".
func documentedCode(code string) string {
	for _, known := range documentedCodes {
		if strings.EqualFold(code, known) {
			return known
		}
	}
	return ""
}

// operation is what was asked of the service, for what its refusals mean.
type operation int

const (
	exchanging operation = iota
	sendingPIN
	redeemingPIN
)

// interpret says what the answer to an exchange means. sent is the refresh token that the exchange was made with. The
// result lacks Endpoint and Sent.
func interpret(a tokenservice.Answer, sent string, now time.Time) tokenservice.Result {
	o := tokenservice.ReadObject(a.Body)
	r := withRefreshToken(newRefreshToken(a, o, sent))
	if f := failure(exchanging, a, o, now); f != nil {
		r.Err = f
		return r
	}
	t, why := accessTokenOf(o, now)
	if why != "" {
		r.Err = unavailable(a, senseless(why))
		return r
	}
	r.AccessToken = t
	return r
}

// newRefreshToken returns the new refresh token in an answer, or "". An answer that is broken off may hold one, but only a
// success can: what an error page shows in such a field must not replace a good one.
func newRefreshToken(a tokenservice.Answer, o tokenservice.Object, sent string) (token string) {
	if a.Status/100 != 2 {
		return ""
	}
	for _, t := range o.Texts("refreshToken") {
		if t != sent && tokenservice.CheckToken(t) == nil {
			token = t
		}
	}
	return token
}

// withRefreshToken is a result that holds a new refresh token alone, if there is one.
func withRefreshToken(token string) (r tokenservice.Result) {
	if token != "" {
		facts := Inspect(token).facts()
		r.RefreshToken, r.Facts = token, &facts
	}
	return r
}

// failure says what is wrong with an answer as a whole; nil for a success, whatever it holds.
func failure(op operation, a tokenservice.Answer, o tokenservice.Object, now time.Time) *tokenservice.Failure {
	retry := tokenservice.RetryAfter(a.Header, now)
	if a.Status == http.StatusTooManyRequests {
		again := "later"
		if retry > 0 {
			again = fmt.Sprintf("in %v", retry.Round(time.Second))
		}
		return &tokenservice.Failure{
			Kind: tokenservice.Limited, Status: a.Status, RetryAfter: retry,
			Text: "Kaizala's limit of calls is used up. Try again " + again + ".",
		}
	}
	// A refusal has consequences, so half of one is not believed.
	if o.Whole && a.Broken == "" {
		if f := refusal(op, a.Status, o); f != nil {
			f.RetryAfter = retry
			return f
		}
	}
	switch {
	case a.Status >= 500:
		f := failing(a.Status, "")
		f.RetryAfter, f.Lost = retry, a.Lost
		return f
	case a.Broken != "":
		return unavailable(a, a.Broken)
	case a.Status/100 != 2:
		f := unavailable(a, fmt.Sprintf("Kaizala's token service gave an answer that cannot be used: HTTP status %d and no errorCode. "+
			"If that goes on, the operator has to check api_root, and any proxy on the way.", a.Status))
		f.RetryAfter = retry
		return f
	case !o.Whole && op != sendingPIN:
		f := unavailable(a, senseless("it is not one JSON object"))
		f.Lost = true
		return f
	}
	return nil
}

func unavailable(a tokenservice.Answer, text string) *tokenservice.Failure {
	return &tokenservice.Failure{Kind: tokenservice.Unavailable, Status: a.Status, Lost: a.Lost, Text: text}
}

func senseless(why string) string {
	return "Kaizala's answer cannot be used: " + why + "."
}

// accessTokenOf reads the access token, or says what is wrong with it. An endpointUrl or a scope that is too long is left
// out; what apps cannot do without must be there.
func accessTokenOf(o tokenservice.Object, now time.Time) (t *tokenservice.AccessToken, why string) {
	t = &tokenservice.AccessToken{Token: o.Text("accessToken"), EndpointURL: o.Text("endpointUrl")}
	if tokenservice.CheckToken(t.Token) != nil {
		return nil, "its accessToken is missing, or cannot be sent in a header"
	}
	if len(t.EndpointURL) > tokenservice.MaxURLBytes {
		t.EndpointURL = ""
	} else if _, _, problem := tokenservice.ParseTarget(t.EndpointURL); problem != "" {
		return nil, "its endpointUrl is missing, or no https URL"
	}
	if scope := strings.Join(o.List("scope"), ","); len(scope) <= tokenservice.MaxScopeBytes {
		t.Scope = scope
	}
	millis, ok := o.Millis("accessTokenExpiry", time.Millisecond)
	if !ok {
		return nil, "its accessTokenExpiry is missing, or no number of milliseconds"
	}
	t.Expires = time.UnixMilli(millis).UTC()
	switch {
	case t.Expires.Before(now.Add(-clockSkew)):
		return nil, "its accessToken has long expired"
	case !t.Expires.After(now):
		return nil, "its accessToken has expired already. Perhaps this machine's clock and Kaizala's differ: the operator has to check it"
	case t.Expires.After(now.Add(maxAccessTokenLife)):
		t.Expires = now.Add(maxAccessTokenLife).UTC().Truncate(time.Millisecond)
	}
	return t, ""
}

// errorCode returns the code of an error body (client), "" where there is none, and something else that is no documented
// code where it is no string.
func errorCode(o tokenservice.Object) string {
	code := o.Text("errorCode")
	if v := o.Value("errorCode"); code == "" && len(v) > 0 && v[0] != '"' {
		code = string(v)
	}
	if code == "0" || code == "false" {
		return ""
	}
	return code
}

// refusal reads an error body (client), or returns nil. What a refused PIN looks like is not documented (guess): any
// errorCode that does not blame the connector.
func refusal(op operation, status int, o tokenservice.Object) *tokenservice.Failure {
	code := errorCode(o)
	f := &tokenservice.Failure{Status: status, Code: documentedCode(code)}
	named := f.Code
	if named == "" {
		named = "an unknown errorCode"
	}
	message := strings.ToLower(o.Text("message"))
	blamesConnector := strings.Contains(message, "applicationid") && strings.Contains(message, "secret")
	asked := status/100 == 2 || status/100 == 4
	switch {
	case blamesConnector && op == sendingPIN && asked:
		// No secret was sent. A connector that was deactivated gets no new tokens, and those that it has go on (doc).
		f.Kind = tokenservice.Refused
		f.Text = "Kaizala refuses to send a PIN for this connector. Its owner has to check on Kaizala's portal that it is active, and its connector_id."
	case blamesConnector && (code != "" || status/100 == 4):
		f.Kind = tokenservice.RefusedConnector
		f.Text = "Kaizala refuses the connector. Its owner has to check connector_id and connector_secret, and write them again."
	case code == "":
		return nil
	case op == redeemingPIN && asked:
		f.Kind = tokenservice.RefusedRefreshToken
		f.Text = "Kaizala refuses the PIN (" + named + "): it is wrong, has expired or was used already. The tenant user has to ask for a new PIN."
	case op == sendingPIN && asked:
		f.Kind = tokenservice.Refused
		f.Text = "Kaizala refuses to send a PIN (" + named + "). The tenant user has to check the phone number: " +
			"it must be the one that Kaizala knows the user by, country code included."
	case op == exchanging && f.Code == "InvalidToken":
		f.Kind = tokenservice.RefusedRefreshToken
		f.Text = "Kaizala refuses the refresh token (InvalidToken). The tenant user has to generate a new one on Kaizala's portal, and write it."
	case asked:
		f.Kind = tokenservice.Refused
		f.Text = "Kaizala refuses the exchange (" + named + ") and says neither that the refresh token nor that the connector is wrong. " +
			"The connector owner has to check the connector on Kaizala's portal."
	default:
		return failing(status, named)
	}
	return f
}

// failing is a service that fails by its own account.
func failing(status int, named string) *tokenservice.Failure {
	with := fmt.Sprintf("HTTP status %d", status)
	if named != "" {
		with += ", " + named
	}
	return &tokenservice.Failure{
		Kind: tokenservice.Unavailable, Status: status, Code: documentedCode(named),
		Text: "Kaizala's token service is failing (" + with + "). Try again later.",
	}
}
