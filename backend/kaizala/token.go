package kaizala

import (
	"cmp"
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/tokenservice"
)

const (
	// refreshTokenLife is how long a refresh token lives (doc).
	refreshTokenLife = 365 * 24 * time.Hour
	// keepAlive is how often a refresh token is exchanged whose expiry is unknown (guess).
	keepAlive = 30 * 24 * time.Hour
	// maxIdentifierBytes bounds an ID that people will be shown; Kaizala's have 36 bytes (client).
	maxIdentifierBytes = 256
)

// Claims is what a token says about itself. Its signature is not checked: only the service has the key (client), so
// claims are good for planning and for telling a person of a mistake, never for a decision about trust.
type Claims struct {
	// IssuedAt is when the token's life began, by iat, or else nbf, or else tokenValidFrom (guess); zero when unknown.
	IssuedAt time.Time
	// Expires is when the token dies, by exp, in the years 1970 to 2199; zero when unknown.
	Expires time.Time
	// ConnectorID is the connector that the token was generated for, by applicationId; "" when unknown.
	ConnectorID string
	// Kind is "user", "group" or "unknown".
	Kind string
	// GroupID is the one group that a group token reaches; "" for any other.
	GroupID string
}

// Inspect reads a token's claims (client) without checking its signature. What is no JWT, or no token of Kaizala's, has
// the Kind "unknown" and whatever else could be read; it works like any other. The phone number among the claims is
// personal data and is not kept.
func Inspect(token string) Claims {
	claims := tokenservice.Claims(token)
	credentials := claims.Object("urn:microsoft:credentials")
	c := Claims{
		Expires:     claims.Time("exp", time.Second),
		ConnectorID: identifier(credentials, "applicationId"),
		GroupID:     identifier(credentials.Object("data"), "GroupId"),
		Kind:        "unknown",
	}
	c.IssuedAt = cmp.Or(claims.Time("iat", time.Second), claims.Time("nbf", time.Second), credentials.Time("tokenValidFrom", time.Millisecond))
	switch {
	case c.GroupID != "":
		c.Kind = "group"
	case c.ConnectorID != "":
		c.Kind = "user"
	}
	return c
}

// RotatesFrom returns the moment from which each exchange returns a new refresh token: when 90 % of the life has passed
// (doc). Where the token does not say when its life began, it is taken to be a refresh token of the documented 365
// days (guess). Zero when the expiry is unknown.
func (c Claims) RotatesFrom() time.Time {
	switch {
	case c.Expires.IsZero():
		return time.Time{}
	case c.IssuedAt.IsZero() || !c.IssuedAt.Before(c.Expires):
		return c.Expires.Add(-refreshTokenLife / 10)
	}
	return c.Expires.Add(-c.Expires.Sub(c.IssuedAt) / 10)
}

func (c Claims) facts() tokenservice.Facts {
	return tokenservice.Facts{Kind: c.Kind, GroupID: c.GroupID, Expires: c.Expires, RotatesFrom: c.RotatesFrom()}
}

// Check reads what a refresh token says about itself. Its error is about a token that cannot be sent or was copied with
// something around it, that has expired, or that was generated for another connector.
func (c *Client) Check(refreshToken string) (tokenservice.Facts, error) {
	if err := tokenservice.CheckPasted(refreshToken); err != nil {
		return tokenservice.Facts{}, err
	}
	claims := Inspect(refreshToken)
	if !claims.Expires.IsZero() && !time.Now().Before(claims.Expires) {
		return claims.facts(), fmt.Errorf("the token expired at %s; generate a new one on Kaizala's portal", claims.Expires.Format(time.RFC3339))
	}
	if claims.ConnectorID != "" && !strings.EqualFold(claims.ConnectorID, c.connectorID) {
		return claims.facts(), errors.New("the token was generated for another connector: its applicationId is not this connector's connector_id; " +
			"generate one from this connector's page on Kaizala's portal, or name the connector that it is for")
	}
	return claims.facts(), nil
}

// identifier reads a string that people will be shown, and that the service has written.
func identifier(o tokenservice.Object, name string) string {
	s := o.Text(name)
	if len(s) > maxIdentifierBytes || strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return ""
	}
	return s
}
