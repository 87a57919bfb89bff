package tokenservice

import (
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"unicode"

	"golang.org/x/net/http/httpguts"
)

const (
	// MaxTokenBytes is the longest token that is stored or sent, in bytes (guess): servers commonly refuse headers of more
	// than 16 KiB.
	MaxTokenBytes = 16 << 10
	// MaxScopeBytes is the longest scope that is kept, in bytes (guess). A longer one is left out.
	MaxScopeBytes = 4 << 10
)

// CheckToken says what is wrong with a token that the caller has trimmed, or returns nil when it can be sent in a header
// as it is. Non-ASCII is refused though a header could carry it: no service issues such tokens, and a zero-width space
// that came with a paste is found best when it is written. The error never quotes the token.
func CheckToken(token string) error {
	switch {
	case token == "":
		return errors.New("the token is empty")
	case len(token) > MaxTokenBytes:
		return fmt.Errorf("the token is longer than %d bytes", MaxTokenBytes)
	case !Sendable(token):
		return errors.New("the token holds a character that no HTTP header may hold, such as a line break or a letter that is not ASCII")
	}
	return nil
}

// CheckPasted does what [CheckToken] does for a token that a person has written, and finds what is easily copied along
// with one.
func CheckPasted(token string) error {
	if mistake := PasteMistake(token); mistake != "" {
		return errors.New("the token " + mistake)
	}
	return CheckToken(token)
}

// PasteMistake says what was copied along with a secret that a person has written, and what to do: the rest of a sentence
// that begins with the secret's name. It is "" where nothing was.
func PasteMistake(secret string) string {
	const quotes, bearer = "\"'`", "bearer "
	n := len(secret)
	switch {
	case n >= 2 && secret[0] == secret[n-1] && strings.IndexByte(quotes, secret[0]) >= 0:
		return "stands in quotes; write it without the quotes"
	case n >= len(bearer) && strings.EqualFold(secret[:len(bearer)], bearer):
		return "has the word Bearer before it; write it without Bearer"
	}
	return ""
}

// Sendable says whether a header brings s to the other side unchanged.
func Sendable(s string) bool {
	notASCII := func(r rune) bool { return r > unicode.MaxASCII }
	return strings.TrimSpace(s) == s && httpguts.ValidHeaderFieldValue(s) && !strings.ContainsFunc(s, notASCII)
}

// ShownText returns a text that a service has sent and that people are shown, perhaps in a terminal; "" where it is longer than most bytes
// or not plain ASCII in one line.
func ShownText(s string, most int) string {
	if len(s) > most || strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r > '~' }) {
		return ""
	}
	return s
}

// Claims reads the claims of a JWT (RFC 7519) without checking its signature, which only the service can: they are good for
// planning and for telling a person of a mistake, never for a decision about trust. What is no signed JWT has none.
func Claims(token string) Object {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return Object{}
	}
	var objects [2]Object
	for i := range objects {
		raw, err := base64.RawURLEncoding.DecodeString(strings.TrimRight(parts[i], "="))
		if err != nil {
			return Object{}
		}
		if objects[i] = ReadObject(raw); !objects[i].Whole {
			return Object{}
		}
	}
	return objects[1]
}
