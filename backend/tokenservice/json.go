package tokenservice

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"math/big"
	"strconv"
	"strings"
	"time"
)

const (
	// maxUnix is the first second of the year 2200. A time beyond it is a mistake; the nanoseconds of [time.Time] overflow
	// in 2262.
	maxUnix = 7258118400
	// maxDigits and maxExponent bound a number.
	maxDigits, maxExponent = 1000, 2000
)

// Object is the top level of a JSON object, as far as it can be read. It is read more tolerantly than encoding/json does:
// what comes before an error counts, a byte-order mark, a missing or superfluous comma and a value that is none cost
// nothing else. A service's answer may hold the only good refresh token, and must not be lost to a slip in another field.
//
// Names are compared without case. Where one occurs more than once, the last value that is usable counts.
type Object struct {
	fields []field
	// Whole: the text is one JSON object by the letter of RFC 8259, but for a byte-order mark, and nothing comes after it.
	Whole bool
}

type field struct {
	name  string
	value json.RawMessage
}

// Format prints no secret, whatever the verb.
func (Object) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "tokenservice.Object{…}") }

// ReadObject reads an object. A text that is none has no fields.
func ReadObject(text []byte) (o Object) {
	text = trimSpace(bytes.TrimPrefix(text, []byte("\ufeff")))
	rest, ok := bytes.CutPrefix(text, []byte("{"))
	if !ok {
		return o
	}
	o.Whole = json.Valid(text)
	for {
		var name, value []byte
		if name, rest, ok = cutString(bytes.TrimLeft(rest, space+",")); !ok {
			return o
		}
		if rest, ok = bytes.CutPrefix(trimSpace(rest), []byte(":")); !ok {
			return o
		}
		if value, rest, ok = cutValue(trimSpace(rest)); !ok {
			return o
		}
		key, _ := stringOf(name)
		o.fields = append(o.fields, field{key, value})
	}
}

// space is what JSON takes for white space.
const space = " \t\r\n"

func trimSpace(b []byte) []byte { return bytes.TrimLeft(b, space) }

// cutString cuts off the string at the beginning of b, quotes included. It is not ok where there is none, or where it has
// no end.
func cutString(b []byte) (s, rest []byte, ok bool) {
	if !bytes.HasPrefix(b, []byte(`"`)) {
		return nil, nil, false
	}
	escaped := false
	for i, c := range b[1:] {
		switch {
		case escaped:
			escaped = false
		case c == '\\':
			escaped = true
		case c == '"':
			return b[:i+2], b[i+2:], true
		}
	}
	return nil, nil, false
}

// cutValue cuts off the value at the beginning of b, whatever it is. It is not ok where the value has no end.
func cutValue(b []byte) (v, rest []byte, ok bool) {
	switch {
	case bytes.HasPrefix(b, []byte(`"`)):
		return cutString(b)
	case !bytes.HasPrefix(b, []byte("{")) && !bytes.HasPrefix(b, []byte("[")):
		end := bytes.IndexAny(b, space+`,:"{}[]`)
		if end == -1 {
			return nil, nil, false
		}
		return b[:end], b[end:], true
	}
	depth := 0
	for rest = b; ; {
		i := bytes.IndexAny(rest, `"{}[]`)
		if i == -1 {
			return nil, nil, false
		}
		switch rest = rest[i:]; rest[0] {
		case '"':
			if _, rest, ok = cutString(rest); !ok {
				return nil, nil, false
			}
			continue
		case '{', '[':
			depth++
		default:
			depth--
		}
		if rest = rest[1:]; depth == 0 {
			return b[:len(b)-len(rest)], rest, true
		}
	}
}

func stringOf(raw []byte) (s string, ok bool) {
	ok = len(raw) > 0 && raw[0] == '"' && json.Unmarshal(raw, &s) == nil
	return s, ok
}

// Value returns the last value of a name that is neither null nor an empty string, as it was sent; nil where there is none.
func (o Object) Value(name string) (v json.RawMessage) {
	for _, f := range o.fields {
		if strings.EqualFold(f.name, name) && string(f.value) != "null" && string(f.value) != `""` {
			v = f.value
		}
	}
	return v
}

// Texts returns the values of a name that are strings, in their order and without white space around them. Empty ones are
// left out.
func (o Object) Texts(name string) (texts []string) {
	for _, f := range o.fields {
		if !strings.EqualFold(f.name, name) {
			continue
		}
		if s, _ := stringOf(f.value); strings.TrimSpace(s) != "" {
			texts = append(texts, strings.TrimSpace(s))
		}
	}
	return texts
}

// Text returns the last of Texts, "" where there is none.
func (o Object) Text(name string) string {
	if texts := o.Texts(name); len(texts) > 0 {
		return texts[len(texts)-1]
	}
	return ""
}

// Object returns an object inside of this one, which may also be sent as a string that holds it. Where there is none it has
// no fields.
func (o Object) Object(name string) Object {
	if s := o.Text(name); s != "" {
		return ReadObject([]byte(s))
	}
	return ReadObject(o.Value(name))
}

// List returns the strings of a list, as they were sent; one string is a list of one. What is no string in it is left
// out. nil where there is no such list.
func (o Object) List(name string) (list []string) {
	if s := o.Text(name); s != "" {
		return []string{s}
	}
	var items []any
	_ = json.Unmarshal(o.Value(name), &items) // what is no list has no items
	for _, item := range items {
		if s, ok := item.(string); ok {
			list = append(list, s)
		}
	}
	return list
}

// Millis reads a name's number of units as milliseconds, as [Millis] does. The last value that is a number counts.
func (o Object) Millis(name string, unit time.Duration) (millis int64, ok bool) {
	for _, f := range o.fields {
		if !strings.EqualFold(f.name, name) {
			continue
		}
		number, isText := stringOf(f.value)
		if !isText {
			number = string(f.value)
		}
		if n, good := Millis(number, unit); good {
			millis, ok = n, true
		}
	}
	return millis, ok
}

// Millis turns a number of units, whole milliseconds each, into milliseconds: a JSON number, also one with a fraction or an
// exponent, or the same as text, with white space around it. It is exact; a part of a millisecond is rounded down, and a
// number that is too large becomes the largest or smallest int64. ok is false for what is no number.
func Millis(number string, unit time.Duration) (millis int64, ok bool) {
	number = strings.TrimSpace(number)
	if len(number) > maxDigits || !json.Valid([]byte(number)) || strings.Trim(number, "+-.0123456789Ee") != "" {
		return 0, false
	}
	// With exponents of that size every number is too large or rounds to nothing, and with larger ones it fills the memory.
	mantissa, exponent, _ := strings.Cut(strings.ToLower(number), "e")
	e, _ := strconv.Atoi(exponent) // of a number out of range this is the largest or smallest
	n, ok := new(big.Rat).SetString(fmt.Sprintf("%se%d", mantissa, min(max(e, -maxExponent), maxExponent)))
	if !ok {
		return 0, false
	}
	n.Mul(n, big.NewRat(int64(unit/time.Millisecond), 1))
	whole := new(big.Int).Div(n.Num(), n.Denom()) // which rounds down
	switch {
	case whole.IsInt64():
		return whole.Int64(), true
	case whole.Sign() < 0:
		return math.MinInt64, true
	}
	return math.MaxInt64, true
}

// Time turns milliseconds since the epoch into a time in UTC; zero for what lies outside of the years 1970 to 2199.
func Time(millis int64) time.Time {
	if millis <= 0 || millis >= maxUnix*1000 {
		return time.Time{}
	}
	return time.UnixMilli(millis).UTC()
}
