package kaizala

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode"

	jwtlib "github.com/golang-jwt/jwt/v5"
	"golang.org/x/net/http/httpguts"
)

// MaxTokenBytes is the longest token that is stored or sent, in bytes (guess): the service's own were JWTs of about 1 KiB
// (client), and servers commonly refuse headers of more than 16 KiB.
const MaxTokenBytes = 16 << 10

// refreshTokenLife is how long a refresh token lives (doc).
const refreshTokenLife = 365 * 24 * time.Hour

// CheckToken says what is wrong with a token that the caller has trimmed, or returns nil when it can be sent in a header
// as it is. Non-ASCII is refused though a header could carry it: no JWT holds any, and a zero-width space that came with
// a paste is found best when it is written. The error never quotes the token.
func CheckToken(token string) error {
	switch {
	case token == "":
		return errors.New("the token is empty")
	case len(token) > MaxTokenBytes:
		return fmt.Errorf("the token is longer than %d bytes", MaxTokenBytes)
	case !sendable(token):
		return errors.New("the token holds a character that no HTTP header may hold, such as a line break or a letter that is not ASCII")
	}
	return nil
}

// sendable says whether a header brings s to the other side unchanged.
func sendable(s string) bool {
	for i := range len(s) {
		if s[i] >= 0x80 {
			return false
		}
	}
	return strings.TrimSpace(s) == s && httpguts.ValidHeaderFieldValue(s)
}

// Claims is what a token says about itself. Nobody has checked its signature: only the service has the key (client), so
// claims are good for planning and for telling a person of a mistake, never for a decision about trust.
type Claims struct {
	// IssuedAt is when the token's life began, by iat, or else nbf, or else tokenValidFrom (guess); zero when unknown.
	IssuedAt time.Time
	// Expires is when the token dies, by exp; zero when unknown.
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
	c := Claims{Kind: "unknown"}
	if len(token) > MaxTokenBytes {
		return c
	}
	// The error of a token that is read and merely signed in a way that the library does not know is none here.
	claims := jwtlib.MapClaims{}
	if _, _, err := jwtlib.NewParser(jwtlib.WithPaddingAllowed()).ParseUnverified(token, claims); err != nil && !errors.Is(err, jwtlib.ErrTokenUnverifiable) {
		return c
	}
	credentials := embedded(claims["urn:microsoft:credentials"])
	data := embedded(credentials["data"])

	c.Expires = timeOf(claims["exp"], time.Second)
	for _, at := range []time.Time{
		timeOf(claims["iat"], time.Second),
		timeOf(claims["nbf"], time.Second),
		timeOf(credentials["tokenValidFrom"], time.Millisecond),
	} {
		if !at.IsZero() {
			c.IssuedAt = at
			break
		}
	}
	c.ConnectorID = identifier(credentials["applicationId"])
	c.GroupID = identifier(data["GroupId"])
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

// embedded decodes an object that is given as a string holding JSON (client), or as it is.
func embedded(value any) map[string]any {
	if text, ok := value.(string); ok {
		var fields map[string]any
		_ = json.Unmarshal([]byte(text), &fields) // what is no object has no fields
		return fields
	}
	fields, _ := value.(map[string]any)
	return fields
}

// timeOf reads a number of units since the epoch; zero for what is no such number or lies outside of the years 1970 to
// 9999, which JSON times cannot hold.
func timeOf(value any, unit time.Duration) time.Time {
	n, _ := value.(float64)
	const year10000 = 253402300800
	millis := n * float64(unit/time.Millisecond)
	if millis <= 0 || millis >= year10000*1000 {
		return time.Time{}
	}
	return time.UnixMilli(int64(millis)).UTC()
}

// identifier reads a string that people will be shown, and that somebody else has written.
func identifier(value any) string {
	s, _ := value.(string)
	if len(s) > 256 {
		return ""
	}
	for _, r := range s {
		if !unicode.IsPrint(r) {
			return ""
		}
	}
	return s
}
