package kaizala

import (
	"bytes"
	"context"
	"encoding/json"
	"net/http"
	"strings"
	"time"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/tokenservice"
)

const (
	// maxPINBytes bounds a PIN (guess): one that is sent by SMS has a few digits.
	maxPINBytes = 32
	// maxPhoneDigits bounds a phone number, without its plus sign (E.164).
	maxPhoneDigits = 15
)

// SendPIN has Kaizala send a PIN by SMS to a phone number with its country code, such as +911234567890 (doc). What the
// answer holds is not documented: any success without an errorCode will do, except a web page (guess). Redirects are not
// followed, since credentials are in the body here.
func (c *Client) SendPIN(ctx context.Context, mobileNumber string, permit tokenservice.Permit) error {
	number, f := phoneNumber(mobileNumber)
	if f != nil {
		return f
	}
	a, err := c.post(ctx, permit, sendPINPath, map[string]string{"mobileNumber": number, "applicationId": c.connectorID})
	if err != nil {
		return err
	}
	if f := failure(sendingPIN, a, tokenservice.ReadObject(a.Body)); f != nil {
		return f
	}
	if bytes.HasPrefix(bytes.TrimSpace(a.Body), []byte("<")) {
		return senseless(a, "it is a web page")
	}
	return nil
}

// RedeemPIN turns the PIN into a refresh token (doc). The answer's endpointUrl and grantedScope come again with each
// exchange, and are not read. Redirects are not followed.
func (c *Client) RedeemPIN(ctx context.Context, mobileNumber, pin string, permit tokenservice.Permit) tokenservice.Result {
	number, f := phoneNumber(mobileNumber)
	if f != nil {
		return tokenservice.Result{Err: f}
	}
	pin = strings.TrimSpace(pin)
	if pin == "" || len(pin) > maxPINBytes || !tokenservice.Sendable(pin) {
		return tokenservice.Result{Err: notSent("the PIN must be the few digits that came by SMS")}
	}
	a, err := c.post(ctx, permit, redeemPINPath, map[string]string{
		"mobileNumber": number, "applicationId": c.connectorID, "applicationSecret": c.connectorSecret, "pin": pin,
	})
	o, now := tokenservice.ReadObject(a.Body), time.Now()
	r := withRefreshToken(a, o, "")
	r.Sent = a.Sent
	if r.Facts != nil && r.Facts.Expires.IsZero() {
		// A token that does not tell its end itself; its life begins now.
		if expires := o.Time("refreshTokenExpiry", time.Millisecond); expires.After(now) {
			r.Facts.Expires = expires
			r.Facts.RotatesFrom = Claims{IssuedAt: now, Expires: expires}.RotatesFrom()
		}
	}
	switch f := failure(redeemingPIN, a, o); {
	case err != nil:
		r.Err = err
	case f != nil:
		r.Err = f
	case r.RefreshToken == "":
		r.Err = senseless(a, "its refreshToken is missing, or cannot be sent in a header")
	}
	return r
}

// post sends a JSON object to a path below the api root.
func (c *Client) post(ctx context.Context, permit tokenservice.Permit, path string, fields map[string]string) (tokenservice.Answer, error) {
	raw, _ := json.Marshal(fields) // which cannot fail with a map of strings
	at := c.root.JoinPath(path)
	return tokenservice.Call{
		Transport: c.transport,
		Method:    http.MethodPost,
		URL:       at,
		Header:    http.Header{"Content-Type": {"application/json"}},
		Body:      string(raw),
		Permit:    permit,
		Closed:    c.closed.Load,
		Service:   "Kaizala's token service at " + strings.ToLower(at.Hostname()),
		Field:     "api_root",
		Timeout:   c.timeout,
	}.Do(ctx)
}

// phoneNumber returns a phone number as Kaizala takes it (doc): a plus sign, the country code and the number. What people
// put between the digits is left out.
func phoneNumber(s string) (string, *tokenservice.Failure) {
	s = strings.NewReplacer(" ", "", "-", "", ".", "", "(", "", ")", "").Replace(s)
	digits, ok := strings.CutPrefix(s, "+")
	if !ok || digits == "" || len(digits) > maxPhoneDigits || strings.Trim(digits, "0123456789") != "" {
		return "", notSent("the phone number must have a plus sign, its country code and at most 15 digits")
	}
	return s, nil
}

func notSent(why string) *tokenservice.Failure {
	return &tokenservice.Failure{Kind: tokenservice.Refused, Text: "Nothing was sent to Kaizala: " + why + "."}
}
