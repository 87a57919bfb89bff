package oauth2

import (
	"fmt"
	"strings"
	"time"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/tokenservice"
)

// maxSubjectBytes bounds the subject of an ID token; OpenID Connect allows 255 characters for "sub".
const maxSubjectBytes = 255

// ownFacts returns what a refresh token says about itself, or else what the configuration assumes, from a time on.
func (c *Client) ownFacts(token string, from time.Time) *tokenservice.Facts {
	claims := tokenservice.Claims(token)
	expires, issued := claims.Time("exp", time.Second), claims.Time("iat", time.Second)
	if expires.IsZero() {
		return lasting(from, c.config.RefreshTokenLife, true)
	}
	if issued.IsZero() || issued.After(expires) {
		issued = from
	}
	return &tokenservice.Facts{Expires: expires, RotatesFrom: expires.Add(-expires.Sub(issued) / 10)}
}

// Check implements [tokenservice.Service].
func (c *Client) Check(refreshToken string) (tokenservice.Facts, error) {
	if err := tokenservice.CheckPasted(refreshToken); err != nil {
		return tokenservice.Facts{}, err
	}
	now := time.Now()
	facts := *c.ownFacts(refreshToken, now)
	if !facts.Expires.IsZero() && !facts.Expires.After(now) {
		return facts, fmt.Errorf("it expired at %s (its own exp); %s", facts.Expires.Format(time.RFC3339), newRefreshToken)
	}
	return facts, nil
}

// subjectOf returns who an ID token is about, for people to read: the email address if the server has verified it, or else
// "sub", or else the address. The ID token came from the token endpoint itself, whose TLS stands in for its signature (OpenID
// Connect Core, section 3.1.3.7).
func subjectOf(idToken string) string {
	claims := tokenservice.Claims(idToken)
	sub, email := shown(claims.Text("sub")), shown(claims.Text("email"))
	verified := string(claims.Value("email_verified")) == "true"
	if email != "" && (verified || sub == "") {
		return email
	}
	return sub
}

// shown returns a text that people will be shown and that the service has written, "" where it is too long or cannot
// be shown.
func shown(s string) string {
	if len(s) > maxSubjectBytes || strings.ContainsFunc(s, notText) {
		return ""
	}
	return s
}
