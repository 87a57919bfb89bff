package oauth2

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/tokenservice"
)

// maxTypeBytes bounds a token_type; RFC 6749 knows "Bearer" and "mac".
const maxTypeBytes = 64

// answer is an answer with its fields. A form is read as an object whose values are all strings.
type answer struct {
	tokenservice.Answer
	fields tokenservice.Object
	// legible: the body is all there, and is JSON or a form.
	legible bool
}

// readAnswer reads a body as JSON if it begins with "{", and else as a form.
func readAnswer(a tokenservice.Answer) answer {
	body := bytes.TrimSpace(bytes.TrimPrefix(bytes.TrimSpace(a.Body), []byte("\ufeff")))
	if !bytes.HasPrefix(body, []byte("{")) {
		body = formObject(string(body), a.Lost)
	}
	o := tokenservice.ReadObject(body)
	return answer{Answer: a, fields: o, legible: o.Whole && !a.Lost}
}

// formObject writes a form as a JSON object; nil for what is no form, or none of an authorization server. A parameter that
// cannot be decoded is left out, without effect on the others. A form has no mark at its end, so of one that breaks off the last
// parameter may be a part of what was sent: it is left out too.
func formObject(body string, breaksOff bool) []byte {
	// A page of HTML can hold the URL of a form.
	if strings.ContainsAny(body, "<>\"\r\n\x00") {
		return nil
	}
	known := breaksOff // what is missing may tell
	if breaksOff {
		body = body[:strings.LastIndexByte(body, '&')+1]
	}
	var object bytes.Buffer
	for pair := range strings.SplitSeq(body, "&") {
		name, value, _ := strings.Cut(pair, "=")
		name, nameErr := url.QueryUnescape(name)
		value, valueErr := url.QueryUnescape(value)
		if nameErr != nil || valueErr != nil || name == "" {
			continue
		}
		known = known || strings.EqualFold(name, "access_token") || strings.EqualFold(name, "error")
		member, _ := json.Marshal(map[string]string{name: value}) // a map of strings always can be written
		object.WriteByte(',')
		object.Write(member[1 : len(member)-1])
	}
	if !known || object.Len() == 0 {
		return nil
	}
	return slices.Concat([]byte("{"), object.Bytes()[1:], []byte("}"))
}

// refused returns the code of an error, as it was sent, and whether the answer is one at all: it has an error that is
// not empty, or an "ok" that is false. A refusal has consequences, so half of one is none.
func (a answer) refused() (code string, refused bool) {
	if !a.legible {
		return "", false
	}
	if code = a.fields.Text("error"); code != "" {
		return code, true
	}
	notOK := strings.EqualFold(strings.Trim(string(a.fields.Value("ok")), `" `), "false") // also as text
	return "", notOK || !empty(a.fields.Value("error"))
}

// empty says whether a value is null, false, 0, or an empty text, list or object.
func empty(value json.RawMessage) bool {
	var v any
	_ = json.Unmarshal(value, &v) // a value that cannot be read counts as nothing
	switch v := v.(type) {
	case bool:
		return !v
	case float64:
		return v == 0
	case []any:
		return len(v) == 0
	case map[string]any:
		return len(v) == 0
	case string:
		return strings.TrimSpace(v) == ""
	}
	return true
}

// purpose is what a request is made for.
type purpose struct {
	field  string // of config, which says where the request goes
	thing  string // what the request is about, for texts: its token or code, or its tenant
	remedy string // the end of the sentence that the server refuses the thing, and what a person has to do
}

var (
	exchanging     = purpose{"token_url", "the refresh token", ". The tenant user has to " + newRefreshToken + "."}
	redeemingCode  = purpose{"token_url", "the authorization code", ": it has been used, is too old, or belongs to another client or redirect_uri. Start the authorization again."}
	startingDevice = purpose{"device_authorization_url", "the tenant", "."}
	pollingDevice  = purpose{"token_url", "the device code", ". Start the device authorization again."}
	revoking       = purpose{"revocation_url", "the token", "."}
)

// readGrant says what the answer to a token request means. sent is the refresh token that the request was made with. Beside
// an error the result holds at most a new refresh token, with its facts.
func (c *Client) readGrant(p purpose, a answer, sent string) tokenservice.Result {
	now := time.Now()
	result := tokenservice.Result{Sent: a.Sent}
	// Only a success can hold a new refresh token: an error page that shows one in some field must not replace a good one.
	if a.Status/100 == 2 {
		result.RefreshToken = a.fields.NewToken("refresh_token", sent)
		result.Facts = c.factsOf(a.fields, result.RefreshToken, a.Sent)
	}
	fail := func(e *tokenservice.Failure) tokenservice.Result {
		// With the new refresh token at hand, nothing is lost.
		e.Lost = e.Lost && result.RefreshToken == ""
		result.Err = e
		return result
	}
	if e := c.failure(p, a); e != nil {
		return fail(e)
	}
	senseless := func(why string, lost bool) tokenservice.Result {
		return fail(&tokenservice.Failure{Kind: tokenservice.Unavailable, Status: a.Status, Lost: lost, Text: c.senseless(why)})
	}
	token := a.fields.Text("access_token")
	if tokenservice.CheckToken(token) != nil {
		return senseless("its access_token is missing, too long, or cannot be sent in a header", true)
	}
	life := c.config.AccessTokenLife
	if millis, ok := a.fields.Millis("expires_in", time.Second); ok {
		if millis <= 0 {
			return senseless("its access token has expired already (expires_in)", false)
		}
		life = time.Duration(min(millis, tokenservice.MaxAccessTokenLife.Milliseconds())) * time.Millisecond
	}
	expires := a.Sent.Add(min(life, tokenservice.MaxAccessTokenLife)).UTC().Truncate(time.Millisecond)
	if !expires.After(now) {
		return senseless("its access token expired before the answer came", false)
	}
	endpointURL := tokenservice.ShownURL(a.fields.Text(c.config.EndpointURLField))
	if u, problem := parseURL(endpointURL); problem != "" || u.Scheme != "https" || c.config.EndpointURLField == "" {
		endpointURL = "" // apps send access tokens there, and not from this machine, so http on a loopback address is none
	}
	result.AccessToken = &tokenservice.AccessToken{
		Token:       token,
		Type:        tokenservice.ShownText(a.fields.Text("token_type"), maxTypeBytes),
		EndpointURL: endpointURL,
		Scope:       tokenservice.ShownText(strings.Join(a.fields.List("scope"), " "), tokenservice.MaxScopeBytes),
		Expires:     expires,
	}
	return result
}

// factsOf returns what an answer tells about the refresh token that is to be used from now on: a new one, or else the one
// that was sent. nil where it tells nothing about the latter.
func (c *Client) factsOf(o tokenservice.Object, newToken string, sent time.Time) *tokenservice.Facts {
	for _, name := range []string{"refresh_token_expires_in", "x_refresh_token_expires_in", "refresh_expires_in"} {
		if millis, ok := o.Millis(name, time.Second); ok && millis >= 0 {
			return lasting(sent, time.Duration(min(millis, maxLife.Milliseconds()+1))*time.Millisecond, false)
		}
	}
	if newToken == "" {
		return nil
	}
	facts := c.ownFacts(newToken, sent)
	if !facts.Expires.IsZero() && !facts.Expires.After(sent) {
		// The server has just issued the token, so its clock and this machine's differ.
		return lasting(sent, c.config.RefreshTokenLife, true)
	}
	return facts
}

// lasting returns the facts about a refresh token with that much life from a time on. No life, or more than can be planned
// for, is none that ends.
func lasting(from time.Time, life time.Duration, assumed bool) *tokenservice.Facts {
	if life <= 0 || life > maxLife {
		return &tokenservice.Facts{}
	}
	return &tokenservice.Facts{
		Expires:     from.Add(life).UTC().Truncate(time.Millisecond),
		RotatesFrom: from.Add(life / 10 * 9).UTC().Truncate(time.Millisecond),
		Assumed:     assumed,
	}
}

// codes are the error codes that a text may name, by what they mean. The names that no RFC has are those of GitHub, Slack and
// Microsoft. Those that are Refused here say no more than that, and are registered with IANA for the endpoints in use.
var codes = map[tokenservice.Kind][]string{
	tokenservice.RefusedRefreshToken: {"invalid_grant", "bad_refresh_token", "invalid_refresh_token", "token_revoked", "token_expired"},
	tokenservice.RefusedConnector:    {"invalid_client", "incorrect_client_credentials", "bad_client_secret", "invalid_client_id"},
	tokenservice.Unavailable:         {"temporarily_unavailable", "server_error"},
	tokenservice.Pending:             {"authorization_pending"},
	tokenservice.SlowDown:            {"slow_down"},
	tokenservice.Denied:              {"access_denied", "authorization_declined"},
	tokenservice.Expired:             {"expired_token"},
	tokenservice.Unsupported:         {"unsupported_token_type"},
	tokenservice.Refused: {
		"invalid_request", "unauthorized_client", "unsupported_grant_type", "invalid_scope", "invalid_target", "invalid_token",
		"insufficient_scope", "interaction_required", "login_required", "consent_required",
		"account_selection_required", "invalid_dpop_proof", "use_dpop_nonce", "invalid_authorization_details",
		"insufficient_user_authentication", "unmet_authentication_requirements",
	},
}

// pollTexts are what the answer to a poll means.
var pollTexts = map[tokenservice.Kind]string{
	tokenservice.Pending:  "waits for a person to enter the code.",
	tokenservice.SlowDown: "waits for a person to enter the code.",
	tokenservice.Denied:   "says that access was denied. Start the device authorization again if that was a mistake.",
	tokenservice.Expired:  "says that the time for entering the code is over. Start the device authorization again.",
}

// meaning returns what a code means in its usual spelling, 0 for one that is not known.
func meaning(code string) tokenservice.Kind {
	for kind, known := range codes {
		if slices.Contains(known, code) {
			return kind
		}
	}
	return 0
}

// failure returns what an answer refuses or fails to do, nil where it is a legible success. What the answer says decides,
// and then its status.
func (c *Client) failure(p purpose, a answer) *tokenservice.Failure {
	now, success := time.Now(), a.Status/100 == 2
	sent, isRefusal := a.refused()
	e := &tokenservice.Failure{Kind: tokenservice.Unavailable, Status: a.Status, RetryAfter: tokenservice.RetryAfter(a.Header, now)}
	with, named := fmt.Sprintf("HTTP status %d", a.Status), ""
	code := strings.ToLower(sent)
	means := meaning(code)
	if means != 0 { // any other is the server's own text, which could be a secret
		e.Code = code
		with += ", " + code
		named = " (" + code + ")"
	}
	switch {
	case means == tokenservice.RefusedRefreshToken && p != startingDevice:
		e.Kind, e.Text = tokenservice.RefusedRefreshToken, c.sentence("refuses %s%s%s", p.thing, named, p.remedy)
		e.TakesConnector = true // a server authenticates the client first (RFC 6749, sections 3.2.1 and 5.2)
	case means == tokenservice.RefusedConnector && p == startingDevice:
		// Servers say so of a client that may not use this flow, and take its exchanges.
		e.Kind = tokenservice.Refused
		e.Text = c.sentence("refuses connector_id for the device flow%s. The operator has to check that this client may use the device flow there; "+
			"if exchanges are refused too, the connector's owner has to check connector_id and connector_secret.", named)
	case means == tokenservice.RefusedConnector:
		e.Kind = tokenservice.RefusedConnector
		e.Text = c.sentence("refuses the connector%s. Its owner has to check connector_id and connector_secret and write them again; "+
			"if they are right, the operator has to check token_endpoint_auth_method.", named)
	case p == pollingDevice && pollTexts[means] != "":
		e.Kind, e.Text = means, c.sentence("%s", pollTexts[means])
	case means == tokenservice.Unsupported && p == revoking:
		e.Kind = tokenservice.Unsupported
		e.Text = c.sentence("cannot revoke tokens of this type%s. They work until they expire.", named)
	case means == tokenservice.SlowDown, a.Status == http.StatusTooManyRequests:
		e.RetryAfter = cmp.Or(e.RetryAfter, tokenservice.RateLimitReset(a.Header, now))
		e.Kind, e.Text = tokenservice.Limited, c.sentence("permits no further calls for now. %s", tokenservice.TryAgain(e.RetryAfter))
	case means == tokenservice.Unavailable, a.Status/100 == 5, a.Status == http.StatusConflict:
		e.Text = c.sentence("is failing (%s). %s", with, tokenservice.TryAgain(min(e.RetryAfter, tokenservice.LongestRest)))
	case a.Status/100 == 3:
		e.Text = c.sentence("redirects the call (%s), and no redirect is followed. If that goes on, the operator has to check %s.", with, p.field)
	case a.Broken != "":
		e.Lost, e.Text = success, a.Broken
	case !a.legible && success:
		e.Lost, e.Text = true, c.senseless("it is neither JSON nor a form")
	case !a.legible:
		e.Text = c.sentence("gave an answer that cannot be used: %s and neither JSON nor a form. "+
			"If that goes on, the operator has to check %s, and any proxy on the way.", with, p.field)
	case isRefusal || !success:
		e.Kind = tokenservice.Refused
		e.Text = c.sentence("refuses the request (%s) and says neither that %s nor that the connector is wrong. The operator has to check the connector's settings there and here.", with, p.thing)
	default:
		return nil
	}
	return e
}

// sentence begins with the server's name.
func (c *Client) sentence(format string, args ...any) string {
	return "The " + c.name + " " + fmt.Sprintf(format, args...)
}

func (c *Client) senseless(why string) string {
	return "The answer of the " + c.name + " cannot be used: " + why + "."
}
