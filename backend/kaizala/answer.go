package kaizala

import (
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/tokenservice"
)

// clockSkew is how far in the past an expiry may lie so that clocks which differ are named as the likely cause.
const clockSkew = 24 * time.Hour

// documentedCodes are the errorCodes that published clients knew (client). Any other is the service's own text, which
// no error may hold.
var documentedCodes = []string{"InvalidToken", "Unauthenticated", "InvalidParameters"}

// purpose is what a request is made for, which says what its refusals mean.
type purpose int

const (
	exchanging purpose = iota
	sendingPIN
	redeemingPIN
)

// readGrant says what the answer to an exchange means. sent is the refresh token that the exchange was made with. The result lacks Endpoint
// and Sent. An endpointUrl or a scope that is too long or cannot be shown is left out. An answer without accessToken, endpointUrl or
// accessTokenExpiry is an error, because apps cannot do without these.
func readGrant(a tokenservice.Answer, sent string, now time.Time) tokenservice.Result {
	o := tokenservice.ReadObject(a.Body)
	r := withRefreshToken(a, o, sent)
	if f := failure(exchanging, a, o); f != nil {
		r.Err = f
		return r
	}
	fail := func(why string) tokenservice.Result {
		r.Err = senseless(a, why)
		return r
	}
	endpointURL := o.Text("endpointUrl")
	t := &tokenservice.AccessToken{
		Token:       o.Text("accessToken"),
		EndpointURL: tokenservice.ShownURL(endpointURL),
		Scope:       tokenservice.ShownText(strings.Join(o.List("scope"), ","), tokenservice.MaxScopeBytes),
	}
	if tokenservice.CheckToken(t.Token) != nil {
		return fail("its accessToken is missing, or cannot be sent in a header")
	}
	if _, _, problem := tokenservice.ParseTarget(t.EndpointURL); problem != "" && t.EndpointURL == endpointURL {
		return fail("its endpointUrl is missing, or no https URL")
	}
	millis, ok := o.Millis("accessTokenExpiry", time.Millisecond)
	if !ok {
		return fail("its accessTokenExpiry is missing, or no number of milliseconds")
	}
	t.Expires = time.UnixMilli(millis).UTC()
	switch {
	case t.Expires.Before(now.Add(-clockSkew)):
		return fail("its accessToken has long expired")
	case !t.Expires.After(now):
		return fail("its accessToken has expired already. Perhaps this machine's clock and Kaizala's differ: the operator has to check it")
	case t.Expires.After(now.Add(tokenservice.MaxAccessTokenLife)):
		t.Expires = now.Add(tokenservice.MaxAccessTokenLife).UTC().Truncate(time.Millisecond)
	}
	r.AccessToken = t
	return r
}

// withRefreshToken returns a result that has the new refresh token of an answer, if there is one, and nothing else. An answer that breaks
// off may have one too. An answer with an error status has none: what an error page shows in such a field must not replace a good refresh
// token.
func withRefreshToken(a tokenservice.Answer, o tokenservice.Object, sent string) (r tokenservice.Result) {
	if a.Status/100 != 2 {
		return r
	}
	if r.RefreshToken = o.NewToken("refreshToken", sent); r.RefreshToken != "" {
		facts := Inspect(r.RefreshToken).facts()
		r.Facts = &facts
	}
	return r
}

// failure says what is wrong with an answer as a whole; nil for a success, whatever it holds.
func failure(p purpose, a tokenservice.Answer, o tokenservice.Object) *tokenservice.Failure {
	retry := tokenservice.RetryAfter(a.Header, time.Now())
	if a.Status == http.StatusTooManyRequests {
		return &tokenservice.Failure{
			Kind: tokenservice.Limited, Status: a.Status, RetryAfter: retry,
			Text: "Kaizala's limit of calls is used up. " + tokenservice.TryAgain(retry),
		}
	}
	// A refusal has consequences, so it counts only if the whole answer has arrived.
	if o.Whole && a.Broken == "" {
		if f := refusal(p, a.Status, o); f != nil {
			f.RetryAfter = retry
			return f
		}
	}
	switch {
	case a.Status >= 500:
		f := unavailable(a, fmt.Sprintf("Kaizala's token service is failing (HTTP status %d). Try again later.", a.Status))
		f.RetryAfter = retry
		return f
	case a.Broken != "":
		return unavailable(a, a.Broken)
	case a.Status/100 != 2:
		f := unavailable(a, fmt.Sprintf("Kaizala's token service gave an answer that cannot be used: HTTP status %d and no errorCode. "+
			"If that goes on, the operator has to check api_root, and any proxy on the way.", a.Status))
		f.RetryAfter = retry
		return f
	case !o.Whole && p != sendingPIN:
		f := senseless(a, "it is not one JSON object")
		f.Lost = true
		return f
	}
	return nil
}

func unavailable(a tokenservice.Answer, text string) *tokenservice.Failure {
	return &tokenservice.Failure{Kind: tokenservice.Unavailable, Status: a.Status, Lost: a.Lost, Text: text}
}

func senseless(a tokenservice.Answer, why string) *tokenservice.Failure {
	return unavailable(a, "Kaizala's answer cannot be used: "+why+".")
}

// refusal reads an error body (client), or returns nil. What a refused PIN looks like is not documented (guess): any
// errorCode that does not blame the connector.
func refusal(p purpose, status int, o tokenservice.Object) *tokenservice.Failure {
	code := o.Text("errorCode")
	if v := string(o.Value("errorCode")); code == "" && !strings.HasPrefix(v, `"`) {
		code = v // a number or another value that is no string: no documented code
	}
	if code == "0" || code == "false" {
		code = ""
	}
	f, named := &tokenservice.Failure{Status: status}, "an unknown errorCode"
	for _, known := range documentedCodes {
		if strings.EqualFold(code, known) {
			f.Code, named = known, known
		}
	}
	message := strings.ToLower(o.Text("message"))
	blamesConnector := strings.Contains(message, "applicationid") && strings.Contains(message, "secret")
	asked := status/100 == 2 || status/100 == 4
	switch {
	case blamesConnector && p == sendingPIN:
		// No secret was sent. A connector that was deactivated gets no new tokens, and those that it has go on (doc).
		f.Kind = tokenservice.Refused
		f.Text = "Kaizala refuses to send a PIN for this connector. Its owner has to check on Kaizala's portal that it is active, and its connector_id."
	case blamesConnector && (code != "" || status/100 == 4):
		f.Kind = tokenservice.RefusedConnector
		f.Text = "Kaizala refuses the connector. Its owner has to check connector_id and connector_secret, and write them again."
	case code == "":
		return nil
	case p == redeemingPIN && asked:
		f.Kind = tokenservice.RefusedRefreshToken
		f.Text = "Kaizala refuses the PIN (" + named + "): it is wrong, has expired or was used already. The tenant user has to write the right one, or to have a new one sent."
	case p == sendingPIN && asked:
		f.Kind = tokenservice.Refused
		f.Text = "Kaizala refuses to send a PIN (" + named + "). The tenant user has to check the phone number: " +
			"it must be the one that Kaizala knows the user by, country code included."
	case p == exchanging && f.Code == "InvalidToken":
		f.Kind, f.TakesConnector = tokenservice.RefusedRefreshToken, true // it has another answer for a wrong ID or secret (guess: which it checks first)
		f.Text = "Kaizala refuses the refresh token (InvalidToken). The tenant user has to generate a new one on Kaizala's portal, and write it."
	case asked:
		f.Kind = tokenservice.Refused
		f.Text = "Kaizala refuses the exchange (" + named + ") and says neither that the refresh token nor that the connector is wrong. " +
			"The connector owner has to check the connector on Kaizala's portal."
	default:
		f.Kind = tokenservice.Unavailable
		f.Text = fmt.Sprintf("Kaizala's token service is failing (HTTP status %d, %s). Try again later.", status, named)
	}
	return f
}
