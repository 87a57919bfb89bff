package kaizala

import (
	"strings"
	"time"
)

// Kind says what an [Error] asks for.
type Kind int

const (
	// RefusedRefreshToken: the service refuses the refresh token; the tenant user has to generate a new one (client).
	RefusedRefreshToken Kind = iota + 1
	// RefusedConnector: the service refuses the connector's ID or secret; the connector owner has to correct it (client).
	RefusedConnector
	// Refused: the service refuses the exchange and blames neither the refresh token nor the connector.
	Refused
	// Limited: the service's limit of calls is used up, 100 a minute for a connector or 300 for a tenant (doc).
	Limited
	// Unavailable: the service was not reached, did not answer in time, fails, or does not make sense. Nothing is known
	// to be wrong with what was sent, and a later try may succeed.
	Unavailable
)

// String returns the kind's name in lower case.
func (k Kind) String() string {
	switch k {
	case RefusedRefreshToken:
		return "refused refresh token"
	case RefusedConnector:
		return "refused connector"
	case Refused:
		return "refused"
	case Limited:
		return "limited"
	case Unavailable:
		return "unavailable"
	}
	return "unknown"
}

// Error is an exchange that brought no access token. It holds nothing that was sent and nothing of the answer's text.
type Error struct {
	Kind Kind
	// Status is the HTTP status of the last answer, 0 where there was none.
	Status int
	// Code is the answer's errorCode where that is one of the documented ones (InvalidToken, Unauthenticated,
	// InvalidParameters), in that spelling, and "" otherwise.
	Code string
	// RetryAfter is how long the service asked to be left alone, with 429 or a 5xx: 0 when it did not say, 24 hours at most.
	RetryAfter time.Duration
	// Text says what happened and who has to do what.
	Text string
}

// Error returns the text.
func (e *Error) Error() string { return e.Text }

// FieldError is a [Config] that cannot work.
type FieldError struct {
	// Field is the configuration field's name: "connector_id", "connector_secret", "api_root", "ca_cert" or
	// "redirect_hosts".
	Field string
	// Text says what would be right, without quoting what was given.
	Text string
}

// Error returns the field and the text.
func (e *FieldError) Error() string { return e.Field + " " + e.Text }

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
