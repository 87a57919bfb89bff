package tokenservice

import (
	"bytes"
	"cmp"
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

// Object is the top level of a JSON object, as far as it can be read. It is read more tolerantly than by encoding/json: the fields before
// an error count, and a byte-order mark, a missing or superfluous comma, or a value that is not JSON do not spoil the other fields. A
// service's answer may hold the only good refresh token, which must not be lost to a mistake in another field.
//
// Where a name occurs more than once, the last value that is usable counts. Where it has none, one whose name differs only in case does.
type Object struct {
	fields []field
	// Whole: the text is one JSON object as RFC 8259 defines it, after a byte-order mark if there is one, and nothing else.
	Whole bool
}

type field struct {
	name  string
	value json.RawMessage
	text  string // of a value that is a string, without white space around it
}

// unquoted is the text of a string, and any other value as it was sent.
func (f field) unquoted() string { return cmp.Or(f.text, string(f.value)) }

// Format prints no secret, whatever the verb.
func (Object) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "tokenservice.Object{…}") }

// space is what JSON takes for white space.
const space = " \t\r\n"

// ReadObject reads an object. A text that is none has no fields.
func ReadObject(text []byte) (o Object) {
	text = bytes.TrimLeft(bytes.TrimPrefix(text, []byte("\ufeff")), space)
	rest, ok := bytes.CutPrefix(text, []byte("{"))
	if !ok {
		return o
	}
	o.Whole = json.Valid(text)
	for {
		var f field
		var name []byte
		if name, rest, ok = cutValue(bytes.TrimLeft(rest, space+",")); !ok || !bytes.HasPrefix(name, []byte(`"`)) {
			return o
		}
		if rest, ok = bytes.CutPrefix(bytes.TrimLeft(rest, space), []byte(":")); !ok {
			return o
		}
		if f.value, rest, ok = cutValue(bytes.TrimLeft(rest, space)); !ok {
			return o
		}
		_ = json.Unmarshal(name, &f.name)    // "" if it cannot be read
		_ = json.Unmarshal(f.value, &f.text) // "" if it is no string
		f.text = strings.TrimSpace(f.text)
		o.fields = append(o.fields, f)
	}
}

// cutValue cuts off the value at the beginning of b: a string, an object or a list with all that is in it; anything else up to white space
// or the next character that has a meaning in JSON. ok is false if the value has no end.
func cutValue(b []byte) (v, rest []byte, ok bool) {
	end := bytes.IndexAny(b, space+`,:"{}[]`)
	if end == -1 {
		return nil, nil, false
	}
	if !bytes.ContainsAny(b[:1], `"{[`) {
		return b[:end], b[end:], true
	}
	depth, quoted, escaped := 0, false, false
	for i, c := range b {
		switch {
		case escaped:
			escaped = false
		case quoted:
			escaped, quoted = c == '\\', c != '"'
		case c == '"':
			quoted = true
		case c == '{', c == '[':
			depth++
		case c == '}', c == ']':
			depth--
		}
		if depth == 0 && !quoted {
			return b[:i+1], b[i+1:], true
		}
	}
	return nil, nil, false
}

// last returns the last field of a name that is usable, or else the last one whose name differs only in case. Without either it is empty.
func (o Object) last(name string, usable func(field) bool) (last field) {
	for _, f := range o.fields {
		if (f.name == name || last.name != name && strings.EqualFold(f.name, name)) && usable(f) {
			last = f
		}
	}
	return last
}

// Value returns the last value of a name that is neither null nor an empty string, as it was sent; nil where there is none.
func (o Object) Value(name string) json.RawMessage {
	return o.last(name, func(f field) bool { return string(f.value) != "null" && string(f.value) != `""` }).value
}

// Text returns the last value of a name that is a string of more than white space, without white space around it; "" where
// there is none.
func (o Object) Text(name string) string {
	return o.last(name, func(f field) bool { return f.text != "" }).text
}

// NewToken returns the last value of a name that is a token which can be sent, and another one than was sent; "" where there
// is none.
func (o Object) NewToken(name, sent string) string {
	return o.last(name, func(f field) bool { return f.text != sent && CheckToken(f.text) == nil }).text
}

// Object returns an object inside of this one, which may also be sent as a string that holds it. Where there is none it has
// no fields.
func (o Object) Object(name string) Object {
	return ReadObject([]byte(o.last(name, func(f field) bool { return strings.HasPrefix(f.unquoted(), "{") }).unquoted()))
}

// List returns the strings of a list, as they were sent; one string is a list of one. What is no string in it is left
// out. nil where there is no such list.
func (o Object) List(name string) (list []string) {
	found := o.last(name, func(f field) bool { return f.text != "" || bytes.HasPrefix(f.value, []byte("[")) })
	if found.text != "" {
		return []string{found.text}
	}
	var items []any
	_ = json.Unmarshal(found.value, &items) // a list that cannot be read has no items
	for _, item := range items {
		if s, ok := item.(string); ok {
			list = append(list, s)
		}
	}
	return list
}

// Millis returns the last value of a name that is a number of units, whole milliseconds each, in milliseconds: a JSON
// number, also one with a fraction or an exponent, or the same as text. It is exact; a part of a millisecond is rounded
// down, and a number that is too large becomes the largest or smallest int64. ok is false where there is no number.
func (o Object) Millis(name string, unit time.Duration) (millis int64, ok bool) {
	number := o.last(name, func(f field) bool {
		n := f.unquoted()
		return len(n) <= maxDigits && json.Valid([]byte(n)) && strings.Trim(n, "+-.0123456789Ee") == ""
	}).unquoted()
	if number == "" {
		return 0, false
	}
	// With an exponent of maxExponent any number is too large or rounds to 0 already. A larger one would fill the memory.
	mantissa, exponent, _ := strings.Cut(strings.ToLower(number), "e")
	e, _ := strconv.Atoi(exponent) // for a number out of range, the largest or smallest int
	n, _ := new(big.Rat).SetString(fmt.Sprintf("%se%d", mantissa, min(max(e, -maxExponent), maxExponent)))
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

// Time returns the time of a name's number of units since the epoch, as [Object.Millis] reads it, in UTC; zero where there is
// no number, and for what lies outside of the years 1970 to 2199.
func (o Object) Time(name string, unit time.Duration) time.Time {
	millis, _ := o.Millis(name, unit)
	if millis <= 0 || millis >= maxUnix*1000 {
		return time.Time{}
	}
	return time.UnixMilli(millis).UTC()
}
