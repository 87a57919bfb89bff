package kaizala

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/kaizala/kaizalatest"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/tokenservice"
)

const phoneCanary = "+915550112345"

type claimSet = map[string]any

// jwt is a token with these claims and an invalid signature.
func jwt(t testing.TB, claims any) string {
	t.Helper()
	raw, err := json.Marshal(claims)
	require.NoError(t, err)
	return encoded(`{"alg":"HS256"}`) + "." + encoded(string(raw)) + ".c2ln"
}

func encoded(s string) string { return base64.RawURLEncoding.EncodeToString([]byte(s)) }

func text(t testing.TB, v any) string {
	t.Helper()
	raw, err := json.Marshal(v)
	require.NoError(t, err)
	return string(raw)
}

func TestInspectEmulatorsTokens(t *testing.T) {
	s := kaizalatest.New()
	id, _ := s.RegisterConnector()
	before := time.Now().Truncate(time.Second)
	user := Inspect(s.GenerateUserToken(id, "ada"))
	assert.Equal(t, "user", user.Kind)
	assert.Equal(t, id, user.ConnectorID)
	assert.Empty(t, user.GroupID)
	assert.WithinDuration(t, before, user.IssuedAt, 5*time.Second)
	assert.Equal(t, user.IssuedAt.Add(365*24*time.Hour), user.Expires)
	assert.Equal(t, user.IssuedAt.Add(328*24*time.Hour+12*time.Hour), user.RotatesFrom(), "day 328")

	group := Inspect(s.GenerateGroupToken(id, "ada", "g-1"))
	assert.Equal(t, "group", group.Kind)
	assert.Equal(t, "g-1", group.GroupID)
	assert.Equal(t, id, group.ConnectorID)
}

func TestInspect(t *testing.T) {
	at := func(unix int64) time.Time { return time.Unix(unix, 0).UTC() }
	const credentials = "urn:microsoft:credentials"
	group := text(t, claimSet{"AppName": "A", "GroupId": "g-1"})
	for _, c := range []struct {
		name   string
		claims any
		want   Claims
	}{
		{"a user's", claimSet{"iat": 1000, "nbf": 2000, "exp": 9000, credentials: text(t, claimSet{"applicationId": "c-1", "phoneNumber": phoneCanary, "data": text(t, claimSet{"AppName": "A"})})},
			Claims{IssuedAt: at(1000), Expires: at(9000), ConnectorID: "c-1", Kind: "user"}},
		{"a group's", claimSet{"exp": 9000, credentials: text(t, claimSet{"applicationId": "c-1", "tokenValidFrom": 3000000, "data": group})},
			Claims{IssuedAt: at(3000), Expires: at(9000), ConnectorID: "c-1", Kind: "group", GroupID: "g-1"}},
		{"objects instead of strings", claimSet{credentials: claimSet{"applicationId": "c-1", "data": claimSet{"GroupId": "g-1"}}},
			Claims{ConnectorID: "c-1", Kind: "group", GroupID: "g-1"}},
		{"nbf instead of iat", claimSet{"nbf": 2000, "exp": 9000}, Claims{IssuedAt: at(2000), Expires: at(9000), Kind: "unknown"}},
		{"an expiry alone", claimSet{"exp": 9000}, Claims{Expires: at(9000), Kind: "unknown"}},
		{"a fraction", claimSet{"exp": 9000.5}, Claims{Expires: at(9000).Add(500 * time.Millisecond), Kind: "unknown"}},
		{"nothing", claimSet{}, Claims{Kind: "unknown"}},
		{"wrong types hurt nobody else", claimSet{"iat": "x", "nbf": []int{1}, "exp": 9000, credentials: text(t, claimSet{"applicationId": 5, "data": group})},
			Claims{Expires: at(9000), Kind: "group", GroupID: "g-1"}},
		{"credentials that are no JSON", claimSet{"exp": 9000, credentials: "{"}, Claims{Expires: at(9000), Kind: "unknown"}},
		{"times that no calendar holds", claimSet{"iat": -5, "nbf": 0, "exp": json.RawMessage("1e300")}, Claims{Kind: "unknown"}},
		{"an expiry in milliseconds", claimSet{"exp": time.Now().UnixMilli()}, Claims{Kind: "unknown"}},
		{"the last second of 2199", claimSet{"exp": 7258118399}, Claims{Expires: at(7258118399), Kind: "unknown"}},
		{"the year 2200", claimSet{"iat": 7258118400, "nbf": 2000, "exp": 7258118400}, Claims{IssuedAt: at(2000), Kind: "unknown"}},
		{"numbers that are strings", claimSet{"iat": "1000", "exp": json.RawMessage("9.0e3"), credentials: text(t, claimSet{"tokenValidFrom": "3000000"})},
			Claims{IssuedAt: at(1000), Expires: at(9000), Kind: "unknown"}},
		{"the longest IDs", claimSet{credentials: claimSet{"applicationId": strings.Repeat("c", 256), "data": claimSet{"GroupId": strings.Repeat("g", 256)}}},
			Claims{ConnectorID: strings.Repeat("c", 256), Kind: "group", GroupID: strings.Repeat("g", 256)}},
		{"an ID with a line break", claimSet{credentials: text(t, claimSet{"applicationId": "a\nb", "data": text(t, claimSet{"GroupId": strings.Repeat("g", 257)})})}, Claims{Kind: "unknown"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := Inspect(jwt(t, c.claims))
			assert.Equal(t, c.want, got)
			assert.NotContains(t, fmt.Sprintf("%+v", got), phoneCanary)
		})
	}
	for name, token := range map[string]string{
		"empty":            "",
		"opaque":           refreshCanary,
		"two parts":        encoded(`{}`) + "." + encoded(`{"exp":9000}`),
		"four parts":       jwt(t, claimSet{"exp": 9000}) + ".x",
		"no base64":        encoded(`{}`) + ".{}.x",
		"no object":        encoded(`{}`) + "." + encoded(`[]`) + ".x",
		"no JSON":          encoded(`{}`) + "." + encoded(`{"exp":9000`) + ".x",
		"a header of junk": "junk." + encoded(`{"exp":9000}`) + ".x",
	} {
		t.Run(name, func(t *testing.T) { assert.Equal(t, Claims{Kind: "unknown"}, Inspect(token)) })
	}
}

func TestCheck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		now := time.Now().UTC()
		token := func(exp time.Duration, connector string) string {
			return jwt(t, claimSet{"iat": now.Unix(), "exp": now.Add(exp).Unix(), "urn:microsoft:credentials": claimSet{"applicationId": connector}})
		}
		facts := tokenservice.Facts{Kind: "user", Expires: now.Add(10 * time.Second), RotatesFrom: now.Add(9 * time.Second)}
		for _, c := range []struct {
			name, token string
			facts       tokenservice.Facts
			says        string
		}{
			{"a good one", token(10*time.Second, connectorID), facts, ""},
			{"a connector in capitals", token(10*time.Second, strings.ToUpper(connectorID)), facts, ""},
			{"an opaque one", refreshCanary, tokenservice.Facts{Kind: "unknown"}, ""},
			{"another connector's", token(10*time.Second, "other"), facts,
				"the token was generated for another connector: its applicationId is not this connector's connector_id; " +
					"generate one from this connector's page on Kaizala's portal, or name the connector that it is for"},
			{"an expired one", token(0, "other"), tokenservice.Facts{Kind: "user", Expires: now, RotatesFrom: now.Add(-36*24*time.Hour - 12*time.Hour)},
				"the token expired at 2000-01-01T00:00:00Z; generate a new one on Kaizala's portal"},
			{"quotes", `"` + refreshCanary + `"`, tokenservice.Facts{}, "the token stands in quotes; write it without the quotes"},
			{"Bearer", "Bearer " + refreshCanary, tokenservice.Facts{}, "the token has the word Bearer before it; write it without Bearer"},
			{"nothing", "", tokenservice.Facts{}, "the token is empty"},
		} {
			got, err := client(t, nil).Check(c.token)
			assert.Equal(t, c.facts, got, c.name)
			if c.says == "" {
				assert.NoError(t, err, c.name)
			} else {
				assert.EqualError(t, err, c.says, c.name)
			}
		}
	})
}

func TestRotatesFrom(t *testing.T) {
	const day = 24 * time.Hour
	issued := time.Date(2023, 1, 1, 0, 0, 0, 0, time.UTC)
	for name, c := range map[string]struct {
		claims Claims
		want   time.Time
	}{
		"a year":                      {Claims{IssuedAt: issued, Expires: issued.Add(365 * day)}, issued.Add(328*day + 12*time.Hour)},
		"an hour":                     {Claims{IssuedAt: issued, Expires: issued.Add(time.Hour)}, issued.Add(54 * time.Minute)},
		"no expiry":                   {Claims{IssuedAt: issued}, time.Time{}},
		"nothing":                     {Claims{}, time.Time{}},
		"no issue":                    {Claims{Expires: issued}, issued.Add(-36*day - 12*time.Hour)},
		"issued after it has expired": {Claims{IssuedAt: issued.Add(1), Expires: issued}, issued.Add(-36*day - 12*time.Hour)},
	} {
		assert.Equal(t, c.want, c.claims.RotatesFrom(), name)
	}
}

func FuzzInspect(f *testing.F) {
	s := kaizalatest.New()
	id, _ := s.RegisterConnector()
	for _, token := range []string{"", "..", "a.b.c", refreshCanary, s.GenerateUserToken(id, "ada"), s.GenerateGroupToken(id, "ada", "g")} {
		f.Add(token)
	}
	for _, claims := range []string{`{"exp":1e18}`, `{"exp":1e999}`, `{"exp":"1"}`, `null`, `{"urn:microsoft:credentials":"{\"data\":\"{\\\"GroupId\\\":\\\"\\u0000\\\"}\"}"}`, `{"iat":5,"exp":4}`} {
		f.Add(encoded(`{}`) + "." + encoded(claims) + ".")
	}
	f.Fuzz(func(t *testing.T, token string) {
		c := Inspect(token)
		require.Contains(t, []string{"user", "group", "unknown"}, c.Kind)
		require.Equal(t, c.Kind == "group", c.GroupID != "")
		if c.Kind == "user" {
			require.NotEmpty(t, c.ConnectorID)
		}
		for _, at := range []time.Time{c.IssuedAt, c.Expires, c.RotatesFrom()} {
			_, err := at.MarshalJSON()
			require.NoError(t, err)
		}
		require.Equal(t, c.Expires.IsZero(), c.RotatesFrom().IsZero())
		require.False(t, c.RotatesFrom().After(c.Expires))
		if strings.Count(token, ".") != 2 {
			require.Equal(t, Claims{Kind: "unknown"}, c)
		}
	})
}
