package oauth2

import (
	"context"
	"net/url"
	"strings"
	"time"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/tokenservice"
)

const (
	// defaultDeviceLife is how long an attempt lasts where the answer does not say, though RFC 8628 requires that.
	defaultDeviceLife = 10 * time.Minute
	maxDeviceLife     = 24 * time.Hour
	// defaultInterval is what RFC 8628, section 3.2, says.
	defaultInterval = 5 * time.Second
	maxInterval     = 5 * time.Minute
	// maxUserCodeBytes bounds what a person has to type.
	maxUserCodeBytes = 64
)

// AuthorizationURL implements [tokenservice.CodeFlow].
func (c *Client) AuthorizationURL(r tokenservice.AuthorizationRequest) (string, error) {
	u := c.endpoints["authorization_url"]
	if u == nil {
		return "", fieldError("authorization_url", "is missing: write it, or issuer, if its metadata names one")
	}
	if missing := c.Missing(); missing != nil {
		return "", missing
	}
	query := u.Query()
	for name, value := range c.config.AuthorizationParams {
		query.Set(name, value)
	}
	query.Set("response_type", "code")
	query.Set("client_id", c.config.ClientID)
	query.Set("redirect_uri", r.RedirectURI)
	query.Set("state", r.State)
	query.Set("code_challenge", r.Challenge)
	query.Set("code_challenge_method", "S256")
	if len(r.Scopes) > 0 {
		query.Set("scope", strings.Join(r.Scopes, " "))
	}
	if r.LoginHint != "" {
		query.Set("login_hint", r.LoginHint)
	}
	whole := *u
	whole.RawQuery = query.Encode()
	return whole.String(), nil
}

// Issuer implements [tokenservice.CodeFlow].
func (c *Client) Issuer() (issuer string, promised bool) {
	return c.config.Issuer, c.config.IssuerPromised
}

// RedeemCode implements [tokenservice.CodeFlow]. Where the answer has an access token and no refresh token, the result has
// an error of the kind Refused, and the access token beside it, which is not to be kept.
func (c *Client) RedeemCode(ctx context.Context, r tokenservice.CodeRedemption) tokenservice.Result {
	return c.firstTokens(ctx, redeemingCode, r.Permit, url.Values{
		"grant_type":    {"authorization_code"},
		"code":          {r.Code},
		"redirect_uri":  {r.RedirectURI},
		"code_verifier": {r.Verifier},
	})
}

// firstTokens makes a token request that must bring a refresh token.
func (c *Client) firstTokens(ctx context.Context, p purpose, permit tokenservice.Permit, form url.Values) tokenservice.Result {
	result, a := c.requestToken(ctx, p, permit, "", form)
	switch {
	case result.Err != nil:
	case result.RefreshToken == "":
		result.Facts = nil
		result.Err = &tokenservice.Failure{
			Kind: tokenservice.Refused,
			Text: c.sentence("granted access, but sent no refresh token that could be kept. Usually the scope offline_access is missing in scopes, " +
				"or access_type=offline and prompt=consent in authorization_params: the operator has to add what the server asks for."),
		}
	default:
		result.Subject = subjectOf(a.fields.Text("id_token"))
	}
	return result
}

// StartDevice implements [tokenservice.DeviceFlow].
func (c *Client) StartDevice(ctx context.Context, r tokenservice.DeviceRequest) (*tokenservice.DeviceStart, error) {
	if c.endpoints[startingDevice.field] == nil {
		return nil, fieldError("device_authorization_url", "is missing: write it, or issuer, if its metadata names one")
	}
	if missing := c.Missing(); missing != nil {
		return nil, missing
	}
	form := url.Values{}
	if len(r.Scopes) > 0 {
		form.Set("scope", strings.Join(r.Scopes, " "))
	}
	if r.LoginHint != "" {
		form.Set("login_hint", r.LoginHint)
	}
	a, err := c.post(ctx, startingDevice, r.Permit, form)
	if err != nil {
		return nil, err
	}
	if e := c.failure(startingDevice, a); e != nil {
		return nil, e
	}
	start := &tokenservice.DeviceStart{
		DeviceCode:              a.fields.Text("device_code"),
		UserCode:                shown(a.fields.Text("user_code")),
		VerificationURI:         webURL(a.fields, "verification_uri", "verification_url"),
		VerificationURIComplete: webURL(a.fields, "verification_uri_complete", "verification_url_complete"),
		Interval:                seconds(a.fields, "interval", defaultInterval, maxInterval),
		Expires:                 a.Sent.Add(seconds(a.fields, "expires_in", defaultDeviceLife, maxDeviceLife)).UTC().Truncate(time.Millisecond),
	}
	if tokenservice.CheckToken(start.DeviceCode) != nil || start.UserCode == "" || len(start.UserCode) > maxUserCodeBytes || start.VerificationURI == "" {
		return nil, &tokenservice.Failure{
			Kind: tokenservice.Unavailable, Status: a.Status,
			Text: c.senseless("its device_code, user_code or verification_uri is missing, too long, or cannot be used"),
		}
	}
	return start, nil
}

// webURL returns the first of the fields that a person can be sent to.
func webURL(o tokenservice.Object, names ...string) string {
	for _, name := range names {
		value := tokenservice.ShownURL(o.Text(name))
		if _, _, problem := tokenservice.ParseTarget(value); problem == "" {
			return value
		}
	}
	return ""
}

// seconds reads a field that is more than 0.
func seconds(o tokenservice.Object, name string, otherwise, most time.Duration) time.Duration {
	millis, ok := o.Millis(name, time.Second)
	if !ok || millis <= 0 {
		return otherwise
	}
	return time.Duration(min(millis, most.Milliseconds())) * time.Millisecond
}

// PollDevice implements [tokenservice.DeviceFlow]. An access token without a refresh token is as with RedeemCode.
func (c *Client) PollDevice(ctx context.Context, deviceCode string, permit tokenservice.Permit) tokenservice.Result {
	return c.firstTokens(ctx, pollingDevice, permit, url.Values{
		"grant_type":  {"urn:ietf:params:oauth:grant-type:device_code"},
		"device_code": {deviceCode},
	})
}
