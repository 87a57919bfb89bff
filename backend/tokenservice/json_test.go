package tokenservice

import (
	"encoding/json"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestReadObject(t *testing.T) {
	for _, c := range []struct {
		name, text string
		whole      bool
		a, b       string // Text of these
	}{
		{"whole", `{"a":"x","b":"y"}`, true, "x", "y"},
		{"empty", ` {} `, true, "", ""},
		{"white space", "\r\n\t {\r\n\t \"a\"\r\n\t :\r\n\t \"x\"\r\n\t ,\r\n\t \"b\"\r\n\t :\r\n\t \"y\"\r\n\t }\r\n\t ", true, "x", "y"},
		{"a byte-order mark", "\ufeff{\"a\":\"x\"}", true, "x", ""},
		{"a byte-order mark and white space", "\ufeff\n{\"a\":\"x\"}", true, "x", ""},
		{"two byte-order marks", "\ufeff\ufeff{\"a\":\"x\"}", false, "", ""},
		{"nothing", "", false, "", ""},
		{"a list", `[{"a":"x"}]`, false, "", ""},
		{"junk before it", `x{"a":"x"}`, false, "", ""},
		{"names without case", `{"A":"x"}`, true, "x", ""},
		{"names with escapes", `{"\u0061":"x"}`, true, "x", ""},
		{"texts with escapes", `{"a":"\"\\\u00e9\\","b":"y"}`, true, `"\é\`, "y"},
		{"the last wins", `{"a":"x","a":"y"}`, true, "y", ""},
		{"a name in another case before the exact one", `{"A":"y","a":"x"}`, true, "x", ""},
		{"a name in another case behind the exact one", `{"a":"x","A":"y"}`, true, "x", ""},
		{"the last of two names in another case", `{"A":"x","\u0041":"y","b":"z"}`, true, "y", "z"},
		{"a name in another case where the exact one has no text", `{"a":"","A":"x","a":null}`, true, "x", ""},
		{"but an empty one does not", `{"a":"x","a":""}`, true, "x", ""},
		{"nor white space", `{"a":"x","a":" \n"}`, true, "x", ""},
		{"nor null, a number, an object", `{"a":"x","a":null,"a":1,"a":{"a":"z"}}`, true, "x", ""},
		{"trimmed", `{"a":" x\n"}`, true, "x", ""},
		{"nested", `{"n":{"a":"x","n":[{"a":"]}"},[]]},"b":"y"}`, true, "", "y"},
		{"all kinds of values", `{"n":1.5e-3,"n":true,"n":false,"n":null,"n":[],"b":"y"}`, true, "", "y"},
		{"cut off behind a value", `{"a":"x"`, false, "x", ""},
		{"cut off behind a comma", `{"a":"x",`, false, "x", ""},
		{"cut off in a name", `{"a":"x","b`, false, "x", ""},
		{"cut off behind a name", `{"a":"x","b"`, false, "x", ""},
		{"cut off behind a colon", `{"a":"x","b":`, false, "x", ""},
		{"cut off in a text", `{"a":"x","b":"y`, false, "x", ""},
		{"cut off in an escape", `{"a":"x","b":"y\`, false, "x", ""},
		{"cut off behind an escaped quote", `{"a":"x","b":"y\"`, false, "x", ""},
		{"cut off in a nested text", `{"a":"x","n":{"b":"y`, false, "x", ""},
		{"cut off in a list", `{"a":"x","n":["b"`, false, "x", ""},
		{"a second object", `{"a":"x"}{"b":"y"}`, false, "x", ""},
		{"junk after it", `{"a":"x"}b`, false, "x", ""},
		{"a word that is none", `{"n":undefined,"b":"y"}`, false, "", "y"},
		{"no value", `{"n":,"b":"y"}`, false, "", "y"},
		{"a control character in a text", "{\"a\":\"x\n\",\"b\":\"y\"}", false, "", "y"},
		{"an escape that is none", `{"a":"\x","b":"y"}`, false, "", "y"},
		{"a comma too many", `{,"a":"x",,"b":"y",}`, false, "x", "y"},
		{"no comma", `{"a":"x" "b":"y"}`, false, "x", "y"},
		{"no comma behind an object", `{"n":{}"b":"y"}`, false, "", "y"},
		{"a brace too many", `{"n":1},"b":"y"}`, false, "", ""},
		{"a name without quotes", `{"a":"x",b:"y"}`, false, "x", ""},
		{"what comes behind one", `{"a":"x",b:1,"b":"y"}`, false, "x", ""},
		{"two colons", `{"a"::"x"}`, false, "", ""},
		{"no colon", `{"a":"x","b" "y"}`, false, "x", ""},
		{"what comes behind a name alone", `{"a":"x","n","b":"y"}`, false, "x", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := ReadObject([]byte(c.text))
			assert.Equal(t, c.whole, o.Whole)
			assert.Equal(t, c.a, o.Text("a"))
			assert.Equal(t, c.b, o.Text("b"))
		})
	}
}

func TestNewToken(t *testing.T) {
	for text, want := range map[string]string{
		`{"a":"x","b":"z"}`:                "x",
		`{"a":"x","a":" y\n"}`:             "y",
		`{"a":"x","A":"y"}`:                "x",
		`{"a":"sent","A":"y"}`:             "y",
		`{"a":"x","a":"sent"}`:             "x",
		`{"a":"x","a":" sent\t"}`:          "x",
		`{"a":"x","a":" ","a":1}`:          "x",
		`{"a":"x","a":"y\nz","a":"é"}`:     "x",
		`{"a":"x","a":null,"a":["y"]}`:     "x",
		`{"a":"sent","a":"","a":"\u00e9"}`: "",
		`{"b":"x"}`:                        "",
	} {
		assert.Equal(t, want, ReadObject([]byte(text)).NewToken("a", "sent"), text)
	}
}

func TestValueAndList(t *testing.T) {
	for text, want := range map[string]struct {
		value string
		list  []string
	}{
		`{"a":1.50}`:                        {"1.50", nil},
		`{"a":false,"a":null,"a":"","b":1}`: {"false", nil},
		`{"a":null}`:                        {"", nil},
		`{"a":,"b":1}`:                      {"", nil},
		`{}`:                                {"", nil},
		`{"a":{"x":[1]} }`:                  {`{"x":[1]}`, nil},
		`{"a":"x y"}`:                       {`"x y"`, []string{"x y"}},
		`{"a":["x", 5, null, " y ", ""]}`:   {`["x", 5, null, " y ", ""]`, []string{"x", " y ", ""}},
		`{"a":["x"],"a":["y"]}`:             {`["y"]`, []string{"y"}},
		`{"a":["x"],"A":["y"]}`:             {`["x"]`, []string{"x"}},
		`{"a":["x"],"A":"y"}`:               {`["x"]`, []string{"x"}},
		`{"a":"","A":["y"]}`:                {`["y"]`, []string{"y"}},
		`{"a":["x"],"a":["y"`:               {`["x"]`, []string{"x"}}, // the last one is cut off
	} {
		o := ReadObject([]byte(text))
		assert.Equal(t, want.value, string(o.Value("a")), text)
		assert.Equal(t, want.list, o.List("a"), text)
	}
}

func TestObjectInAnObject(t *testing.T) {
	for _, text := range []string{
		`{"o":{"a":"x"}}`,
		`{"o":"{\"a\":\"x\"}"}`,
		`{"O":{"a":"x"},"o":null,"o":""}`,
		`{"o":{"a":"x"},"O":"{\"a\":\"y\"}"}`,
	} {
		assert.Equal(t, "x", ReadObject([]byte(text)).Object("o").Text("a"), text)
	}
	for _, text := range []string{`{}`, `{"o":5}`, `{"o":["a"]}`, `{"o":"a"}`, `{"a":"x"}`} {
		assert.Empty(t, ReadObject([]byte(text)).Object("o").Text("a"), text)
	}
}

func TestMillis(t *testing.T) {
	const ms, s = time.Millisecond, time.Second
	texts := func(number string) Object {
		raw, err := json.Marshal(map[string]string{"a": number})
		require.NoError(t, err)
		return ReadObject(raw)
	}
	long := strings.Repeat("9", 1000)
	for _, c := range []struct {
		number string
		unit   time.Duration
		want   int64
	}{
		{"1790000000000", ms, 1790000000000},
		{"1790000000000.0", ms, 1790000000000},
		{"1.79e12", ms, 1790000000000},
		{"1.79E+12", ms, 1790000000000},
		{"17900000000000e-1", ms, 1790000000000},
		{"1790000000000.999", ms, 1790000000000},
		{" 17\n", ms, 17},
		{"3600", s, 3600000},
		{"0.0015", s, 1},
		{"-1", s, -1000},
		{"-1.5", ms, -2},
		{"-0", ms, 0},
		{"9223372036854775807", ms, math.MaxInt64},
		{"9223372036854775808", ms, math.MaxInt64},
		{"-9223372036854775808", ms, math.MinInt64},
		{"-9223372036854775809", ms, math.MinInt64},
		{"9007199254740993", ms, 9007199254740993}, // no float64 has this value
		{"1e999999999999999999999", ms, math.MaxInt64},
		{"-1e999999999", ms, math.MinInt64},
		{"1e-999999999999999999999", ms, 0},
		{"0e999999999", ms, 0},
		{long, ms, math.MaxInt64},
	} {
		got, ok := texts(c.number).Millis("a", c.unit)
		assert.True(t, ok, c.number)
		assert.Equal(t, c.want, got, c.number)
	}
	for _, number := range []string{"", " ", "x", "1x", "0x10", "1_000", "1/2", "+1", "1 2", "1e", "e1", ".5", "1.", "NaN", "Inf", "true", "null", "[]", `"1"`, long + "9"} {
		_, ok := texts(number).Millis("a", ms)
		assert.False(t, ok, number)
	}
}

func TestObjectMillis(t *testing.T) {
	for text, want := range map[string]int64{
		`{"a":17}`:                         17000,
		`{"a":"17"}`:                       17000,
		`{"a":17,"a":"","a":"x","a":null}`: 17000,
		`{"a":16,"a":1.7e1}`:               17000,
		`{"a":17,"A":16}`:                  17000,
		`{"a":"soon","A":17}`:              17000,
		`{"a":"soon"}`:                     -1,
		`{"a":true}`:                       -1,
		`{"a":"\"17\""}`:                   -1,
		`{"b":17}`:                         -1,
	} {
		got, ok := ReadObject([]byte(text)).Millis("a", time.Second)
		assert.Equal(t, want >= 0, ok, text)
		assert.Equal(t, max(want, 0), got, text)
	}
}

func TestTime(t *testing.T) {
	for millis, want := range map[string]string{
		`-1e99`:           "0001-01-01T00:00:00Z",
		`0`:               "0001-01-01T00:00:00Z",
		`1`:               "1970-01-01T00:00:00.001Z",
		`"1"`:             "1970-01-01T00:00:00.001Z",
		`7258118399999`:   "2199-12-31T23:59:59.999Z",
		`7258118399999.9`: "2199-12-31T23:59:59.999Z",
		`7258118400000`:   "0001-01-01T00:00:00Z",
		`1e99`:            "0001-01-01T00:00:00Z",
		`true`:            "0001-01-01T00:00:00Z",
	} {
		assert.Equal(t, want, ReadObject([]byte(`{"a":`+millis+`}`)).Time("a", time.Millisecond).Format(time.RFC3339Nano), millis)
	}
	assert.Equal(t, time.Unix(17, 0).UTC(), ReadObject([]byte(`{"a":17}`)).Time("A", time.Second))
}

// If encoding/json can read an object, both find the same. For any other input, no text is found that is not in it.
func FuzzReadObject(f *testing.F) {
	for _, text := range []string{"", `{}`, `{"a":"x"}`, `{"a":"x","A":"y"}`, `{"a":[{}],"b":"\\"`, "\ufeff{\"a\":1e5}", `{"a":tru,"b":"y"`, `{"a":{"a":"}"}}`} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		o := ReadObject(text)
		millis, isNumber := o.Millis("a", time.Second)
		var oracle map[string]any // whose names are exact
		whole := json.Unmarshal([]byte(strings.TrimPrefix(string(text), "\ufeff")), &oracle) == nil
		if o.Whole {
			assert.True(t, whole)
		}
		if !whole {
			return
		}
		if s, ok := oracle["a"].(string); ok && strings.TrimSpace(s) != "" {
			assert.Equal(t, strings.TrimSpace(s), o.Text("a"))
		}
		assert.Equal(t, strings.TrimSpace(o.Text("a")), o.Text("a"))
		if n, ok := oracle["a"].(float64); ok && math.Abs(n) < 1<<50 {
			assert.True(t, isNumber)
			assert.InDelta(t, n*1000, float64(millis), 1)
		}
	})
}
