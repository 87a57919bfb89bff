package oauth2

import (
	"context"
	"encoding/base64"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/tokenservice"
)

var (
	_ tokenservice.Service    = (*Client)(nil)
	_ tokenservice.Revoker    = (*Client)(nil)
	_ tokenservice.CodeFlow   = (*Client)(nil)
	_ tokenservice.DeviceFlow = (*Client)(nil)
)

// newRefreshToken is what a person does to get one.
const newRefreshToken = "authorize the tenant again (tenants/NAME/authorize), or get a new refresh token"

// About implements [tokenservice.Service].
func (c *Client) About() tokenservice.About {
	return tokenservice.About{
		Name:                "the " + c.name,
		NewRefreshToken:     newRefreshToken,
		ExchangeInvalidates: c.config.ExchangeInvalidates,
		Revocation: map[string]tokenservice.Revocation{
			RevokeAccessToken: tokenservice.RevokeAccessToken,
			RevokeByExchange:  tokenservice.RevokeByExchange,
		}[c.config.Revocation],
		RevokeOnDelete: c.config.RevokeOnDelete,
		RetryLost:      true,
	}
}

// KeepAlive implements [tokenservice.Service].
func (c *Client) KeepAlive(tokenservice.Facts) time.Duration { return c.config.KeepAlive }

// Exchange implements [tokenservice.Service]. The endpoint of the request is ignored: the token endpoint never moves.
func (c *Client) Exchange(ctx context.Context, x tokenservice.Exchange) tokenservice.Result {
	if err := tokenservice.CheckToken(x.RefreshToken); err != nil {
		return tokenservice.Result{Err: &tokenservice.Failure{
			Kind: tokenservice.Refused,
			Text: "The exchange was not made: " + err.Error() + ". The tenant user has to " + newRefreshToken + ".",
		}}
	}
	result, _ := c.requestToken(ctx, exchanging, x.Permit, x.RefreshToken, url.Values{
		"grant_type":    {"refresh_token"},
		"refresh_token": {x.RefreshToken},
	})
	return result
}

// requestToken makes a token request, and returns its answer too. sent is the refresh token in it, if any.
func (c *Client) requestToken(ctx context.Context, p purpose, permit tokenservice.Permit, sent string, form url.Values) (tokenservice.Result, answer) {
	for name, value := range c.config.TokenParams {
		form.Set(name, value)
	}
	a, err := c.post(ctx, p, permit, form)
	result := c.readGrant(p, a, sent)
	if err != nil {
		result.AccessToken, result.Err = nil, err
	}
	return result, a
}

// post makes one request with the client's credentials. Its error is a [*tokenservice.Failure], permit's, or one that wraps
// ctx's.
func (c *Client) post(ctx context.Context, p purpose, permit tokenservice.Permit, form url.Values) (answer, error) {
	u := c.endpoints[p.field]
	if missing := c.Missing(); missing != nil {
		return answer{}, &tokenservice.Failure{Kind: tokenservice.Refused, Text: "The call was not made: " + missing.Error() + "."}
	}
	header := http.Header{
		"Accept":       {"application/json"},
		"Content-Type": {"application/x-www-form-urlencoded"},
	}
	switch c.config.AuthMethod {
	case ClientSecretBasic:
		// RFC 6749, section 2.3.1: both are form-encoded before they are joined.
		pair := url.QueryEscape(c.config.ClientID) + ":" + url.QueryEscape(c.config.ClientSecret)
		header.Set("Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(pair)))
	case ClientSecretPost:
		form.Set("client_id", c.config.ClientID)
		form.Set("client_secret", c.config.ClientSecret)
	case NoSecret:
		form.Set("client_id", c.config.ClientID)
	}
	a, err := tokenservice.Call{
		Transport: c.transport,
		Method:    http.MethodPost,
		URL:       u,
		Header:    header,
		Body:      form.Encode(),
		Permit:    permit,
		Closed:    c.closed.Load,
		Service:   "The authorization server " + strings.ToLower(u.Host),
		Field:     p.field,
		Timeout:   c.config.RequestTimeout,
	}.Do(ctx)
	return readAnswer(a), err
}

// Revoke implements [tokenservice.Revoker], by RFC 7009.
func (c *Client) Revoke(ctx context.Context, token string, t tokenservice.TokenType, permit tokenservice.Permit) error {
	if c.endpoints[revoking.field] == nil {
		return &tokenservice.Failure{
			Kind: tokenservice.Unsupported,
			Text: "The call was not made: revocation_url is missing. The operator has to write it.",
		}
	}
	a, err := c.post(ctx, revoking, permit, url.Values{"token": {token}, "token_type_hint": {string(t)}})
	// A status that says that the token is not valid any more needs no body.
	if a.Status/100 == 2 || a.Status == http.StatusNotFound || a.Status == http.StatusGone {
		return nil
	}
	if err != nil {
		return err
	}
	code, refused := a.refused()
	if !refused && a.Status/100 == 4 {
		code = challengeError(a.Header.Values("WWW-Authenticate"))
	}
	if strings.EqualFold(code, "invalid_token") {
		return nil
	}
	e := c.failure(revoking, a)
	if e.Kind == tokenservice.RefusedRefreshToken {
		return nil
	}
	return e
}
