package tokenservice

import (
	"encoding/base64"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

const canary = "canary-token"

func TestCheckToken(t *testing.T) {
	for _, token := range []string{canary, "opaque, with spaces\tand a tab", strings.Repeat("a", MaxTokenBytes), "~", "\"x\""} {
		assert.NoError(t, CheckToken(token))
	}
	for name, token := range map[string]string{
		"empty":                   "",
		"too long":                strings.Repeat("a", MaxTokenBytes+1),
		"CR":                      canary + "\rx",
		"LF":                      canary + "\nx",
		"NUL":                     canary + "\x00x",
		"DEL":                     canary + "\x7fx",
		"the first non-ASCII":     canary + "\x80",
		"the first letter beyond": canary + "\u0080x",
		"not ASCII":               canary + "\u200bx",
		"not UTF-8":               canary + "\xff",
		"space that Go trims":     canary + " ",
		"a line break at the end": canary + "\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			for _, err := range []error{CheckToken(token), CheckPasted(token)} {
				require.Error(t, err)
				assert.NotContains(t, err.Error(), canary)
			}
		})
	}
	assert.EqualError(t, CheckToken(""), "the token is empty")
	assert.EqualError(t, CheckToken(strings.Repeat("a", MaxTokenBytes+1)), "the token is longer than 16384 bytes")
}

func TestCheckPasted(t *testing.T) {
	for token, says := range map[string]string{
		`"` + canary + `"`:        "write it without the quotes",
		`'` + canary + `'`:        "write it without the quotes",
		"`" + canary + "`":        "write it without the quotes",
		`""`:                      "write it without the quotes",
		"Bearer " + canary:        "write it without Bearer",
		"bearer " + canary:        "write it without Bearer",
		"bearer  " + canary:       "write it without Bearer",
		`"Bearer ` + canary + `"`: "write it without the quotes",
	} {
		err := CheckPasted(token)
		require.ErrorContains(t, err, says)
		assert.NotContains(t, err.Error(), canary)
	}
	for _, token := range []string{canary, `"`, `"` + canary, canary + `'`, `'` + canary + `"`, "Bearer", "bearer-" + canary, "bearers" + canary, "a" + canary + "a"} {
		assert.NoError(t, CheckPasted(token), token)
	}
}

func TestNothingPrintsASecret(t *testing.T) {
	for _, v := range []any{
		Exchange{RefreshToken: canary}, &Exchange{RefreshToken: canary},
		Result{RefreshToken: canary}, &Result{RefreshToken: canary},
		AccessToken{Token: canary}, &AccessToken{Token: canary},
		CodeRedemption{Code: canary}, &CodeRedemption{Code: canary},
		DeviceStart{DeviceCode: canary}, &DeviceStart{DeviceCode: canary},
		Call{Header: http.Header{"X": {canary}}}, &Call{Header: http.Header{"X": {canary}}},
		Answer{Body: []byte(canary)}, &Answer{Body: []byte(canary)},
		ReadObject([]byte(`{"a":"` + canary + `"}`)),
	} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q"} {
			text := fmt.Sprintf(verb, v)
			assert.NotContains(t, text, canary)
			assert.Contains(t, text, "tokenservice.")
		}
	}
}

func TestClaims(t *testing.T) {
	encode := base64.RawURLEncoding.EncodeToString
	jwt := func(header, claims string) string {
		return encode([]byte(header)) + "." + encode([]byte(claims)) + ".c2ln"
	}
	for _, token := range []string{
		jwt(`{}`, `{"a":"x"}`),
		jwt(`{"alg":"none"}`, `{"a":"x"}`),
		encode([]byte(`{}`)) + "." + base64.URLEncoding.EncodeToString([]byte(`{"a":"x"} `)) + ".",
		base64.URLEncoding.EncodeToString([]byte(`{}`)) + "." + encode([]byte(`{"a":"x"}`)) + ".c2ln",
		jwt(`{}`, `{"a":"x"}`) + strings.Repeat("a", MaxTokenBytes), // an ID token may be longer than one that is sent
	} {
		assert.Equal(t, "x", Claims(token).Text("a"), token)
	}
	for name, token := range map[string]string{
		"empty":              "",
		"two parts":          encode([]byte(`{}`)) + "." + encode([]byte(`{"a":"x"}`)),
		"four parts":         jwt(`{}`, `{"a":"x"}`) + ".x",
		"a header of junk":   jwt(`x`, `{"a":"x"}`),
		"a header's base64":  "!." + encode([]byte(`{"a":"x"}`)) + ".x",
		"claims of junk":     jwt(`{}`, `{"a":"x"`),
		"junk behind claims": encode([]byte(`{}`)) + "." + encode([]byte(`{"a":"wxyz"}`)) + "!!.x", // whole before the junk
		"claims in base64":   encode([]byte(`{}`)) + ".{}.x",
		"claims with junk":   jwt(`{}`, `{"a":"x"}{}`),
		"a list":             jwt(`{}`, `[{"a":"x"}]`),
	} {
		assert.Equal(t, Object{}, Claims(token), name)
	}
}

func TestShownText(t *testing.T) {
	const signs = "a Z09 ~!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}"
	assert.Equal(t, signs, ShownText(signs, len(signs)))
	assert.Empty(t, ShownText(signs, len(signs)-1))
	for _, odd := range []string{"\x1b", "\n", "\t", "\x7f", "\u009b", "\u202e", "\u200b", "é", "\xff"} {
		assert.Empty(t, ShownText("a"+odd, 100), "%q", odd)
	}
}
