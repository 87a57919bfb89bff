package tokenservice

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestParseTarget(t *testing.T) {
	const (
		long     = "is too long for a URL"
		absolute = "is not an absolute URL"
		user     = "must hold no user name or password"
		ascii    = "must name its host in plain ASCII, or as a full IP address"
		port     = "must name a port from 1 to 65535, or none"
		https    = "must be an https URL (http is for loopback addresses alone)"
	)
	label63 := strings.Repeat("a", 63)
	host253 := strings.Repeat(label63+".", 3) + strings.Repeat("a", 61)
	for raw, want := range map[string]struct{ host, problem string }{
		"https://api.kaiza.la":                   {"api.kaiza.la", ""},
		"HTTPS://API.Kaiza.LA./x?y#z":            {"api.kaiza.la", ""},
		"https://gateway_1.example:8443/a":       {"gateway_1.example", ""},
		"https://example:1":                      {"example", ""},
		"https://example:65535":                  {"example", ""},
		"https://10.0.0.1":                       {"10.0.0.1", ""},
		"https://[2001:db8::1]:8443":             {"2001:db8::1", ""},
		"https://[::ffff:10.0.0.1]":              {"10.0.0.1", ""},
		"https://1e100.example1":                 {"1e100.example1", ""},
		"https://0x1.example":                    {"0x1.example", ""},
		"https://" + label63:                     {label63, ""},
		"https://" + host253:                     {host253, ""},
		"https://e/" + strings.Repeat("a", 2038): {"e", ""},
		"http://127.0.0.1:8080":                  {"127.0.0.1", ""},
		"http://127.8.8.8":                       {"127.8.8.8", ""},
		"http://[::1]:8080":                      {"::1", ""},
		"http://[::ffff:127.0.0.1]":              {"127.0.0.1", ""},
		"http://localhost":                       {"localhost", ""},
		"http://LOCALHOST:80":                    {"localhost", ""},
		"http://localhost.":                      {"localhost", ""},

		"https://e/" + strings.Repeat("a", 2039): {"", long},
		"":                                       {"", absolute},
		"api.kaiza.la":                           {"", absolute},
		"/v1":                                    {"", absolute},
		"https:api.kaiza.la":                     {"", absolute},
		"https:///v1":                            {"", absolute},
		"https://api.kaiza.la\n":                 {"", absolute},
		"https://%zz":                            {"", absolute},
		"https://u@e":                            {"", user},
		"https://u:p@e":                          {"", user},
		"https://@e":                             {"", user},
		"https://:80":                            {"", ascii},
		"https://.":                              {"", ascii},
		"https://a..b":                           {"", ascii},
		"https://a..":                            {"", ascii},
		"https://kaizа.la":                       {"", ascii},
		"https://a!b":                            {"", ascii},
		"https://127.1":                          {"", ascii},
		"https://1.2.3.4.5":                      {"", ascii},
		"https://0x7f000001":                     {"", ascii},
		"https://a.0X7f":                         {"", ascii},
		"https://[fe80::1%25eth0]":               {"", ascii},
		"https://" + label63 + "a":               {"", ascii},
		"https://" + host253 + "a":               {"", ascii},
		"https://e:":                             {"", port},
		"https://e:0":                            {"", port},
		"https://e:65536":                        {"", port},
		"http://example":                         {"", https},
		"http://localhost.example":               {"", https},
		"http://127.0.0.1.example":               {"", https},
		"http://0.0.0.0":                         {"", https},
		"http://10.0.0.1":                        {"", https},
		"ftp://example":                          {"", https},
		"ftp://localhost":                        {"", https},
	} {
		u, h, problem := ParseTarget(raw)
		assert.Equal(t, want.problem, problem, "%q", raw)
		assert.Equal(t, want.host, h.String(), "%q", raw)
		if problem == "" {
			require.NotNil(t, u)
			again, ok := ParseHost(u.Hostname())
			assert.True(t, ok && again == h)
		}
	}
}

func TestHost(t *testing.T) {
	parse := func(raw string) Host {
		h, ok := ParseHost(raw)
		require.True(t, ok, raw)
		return h
	}
	assert.Equal(t, parse("Kaiza.LA."), parse("kaiza.la"))
	assert.Equal(t, parse("::ffff:10.0.0.1"), parse("10.0.0.1"))
	assert.NotEqual(t, parse("localhost"), parse("127.0.0.1"))

	assert.True(t, parse("10.0.0.1").IsAddress())
	assert.False(t, parse("kaiza.la").IsAddress())

	assert.True(t, parse("kaiza.la").Within("kaiza.la"))
	assert.True(t, parse("a.b.kaiza.la").Within("kaiza.la"))
	assert.False(t, parse("notkaiza.la").Within("kaiza.la"))
	assert.False(t, parse("kaiza.la.example").Within("kaiza.la"))
	assert.False(t, parse("la").Within("kaiza.la"))
	assert.False(t, parse("10.0.0.1").Within("0.1"))
	assert.False(t, parse("10.0.0.1").Within("10.0.0.1"))
}

func TestShownURL(t *testing.T) {
	const url = "https://user-1.example:8443/a/b;c=1/%20@(d)*+,~_?x=1&y=!#z"
	assert.Equal(t, url, ShownURL(url))
	for _, odd := range []string{"\x1b[2J", "\u009b2J", "\x7f", "\n", " ", "\t", "\u202e", "\u200b", "\u2028", "é", "\xff", `"`, "'", "`", "$(id)", "<", `\`, "^", "{", "|"} {
		assert.Empty(t, ShownURL("https://example/"+odd), "%q", odd)
	}
	longest := "https://example/" + strings.Repeat("a", MaxURLBytes-len("https://example/"))
	assert.Equal(t, longest, ShownURL(longest))
	assert.Empty(t, ShownURL(longest+"a"))
}
