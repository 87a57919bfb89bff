package oauth2

import "strings"

// challengeError returns the first "error" parameter of WWW-Authenticate headers (RFC 6750, section 3), "" where there is
// none.
func challengeError(headers []string) string {
	for _, rest := range headers {
		for rest != "" {
			name := rest[:tokenLen(rest)]
			rest = rest[len(name):]
			value, isParam := strings.CutPrefix(strings.TrimLeft(rest, " \t"), "=")
			switch {
			case name != "" && isParam:
				var v string
				v, rest = challengeValue(strings.TrimLeft(value, " \t"))
				if strings.EqualFold(name, "error") {
					return v
				}
			case name != "":
			case rest[0] == '"':
				_, rest = challengeValue(rest)
			default:
				rest = rest[1:]
			}
		}
	}
	return ""
}

// challengeValue reads a token or a quoted string, and returns what comes after it.
func challengeValue(s string) (value, rest string) {
	if !strings.HasPrefix(s, `"`) {
		n := tokenLen(s)
		return s[:n], s[n:]
	}
	var b strings.Builder
	for i := 1; i < len(s); i++ {
		switch s[i] {
		case '"':
			return b.String(), s[i+1:]
		case '\\':
			if i++; i == len(s) {
				return "", ""
			}
		}
		b.WriteByte(s[i])
	}
	return "", "" // it has no end
}

// tokenLen returns the length of the token (RFC 9110, section 5.6.2) at the beginning of s.
func tokenLen(s string) int {
	n := strings.IndexFunc(s, func(r rune) bool {
		return r <= ' ' || r > '~' || strings.ContainsRune(`"(),/:;<=>?@[\]{}`, r)
	})
	if n < 0 {
		return len(s)
	}
	return n
}
