package oauth2

import (
	"encoding/base64"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/tokenservice"
)

func TestCheck(t *testing.T) {
	at := func(s int64) time.Time { return time.Unix(946684800+s, 0).UTC() } // synctest's clock begins there
	synctest.Test(t, func(t *testing.T) {
		plain, lasting := client(t, nil), client(t, func(c *Config) { c.RefreshTokenLife = 1000 * time.Second })
		for _, c := range []struct {
			name   string
			client *Client
			token  string
			want   tokenservice.Facts
		}{
			{"opaque", plain, refreshCanary, tokenservice.Facts{}},
			{"opaque, with a life", lasting, refreshCanary, tokenservice.Facts{Expires: at(1000), RotatesFrom: at(900), Assumed: true}},
			{"a JWT", lasting, jwt(`{"exp":946685000,"iat":946684000}`), tokenservice.Facts{Expires: at(200), RotatesFrom: at(100)}},
			{"a JWT without end", lasting, jwt(`{"exp":0}`), tokenservice.Facts{Expires: at(1000), RotatesFrom: at(900), Assumed: true}},
			{"a JWT with padding", plain, "e30." + base64.URLEncoding.EncodeToString([]byte(`{"exp":946684801}`)) + ".x",
				tokenservice.Facts{Expires: at(1), RotatesFrom: at(1).Add(-100 * time.Millisecond)}},
			{"four parts", plain, jwt(`{"exp":946685000}`) + ".x", tokenservice.Facts{}},
			{"two parts", plain, strings.TrimSuffix(jwt(`{"exp":946685000}`), ".c2ln"), tokenservice.Facts{}},
			{"a header of junk", plain, "junk" + jwt(`{"exp":946685000}`), tokenservice.Facts{}},
			{"no base64", plain, "a.!!.b", tokenservice.Facts{}},
			{"junk behind whole claims", plain, "e30." + base64.RawURLEncoding.EncodeToString([]byte(`{"exp":946685000} `)) + "!!.b", tokenservice.Facts{}},
		} {
			facts, err := c.client.Check(c.token)
			require.NoError(t, err, c.name)
			require.Equal(t, c.want, facts, c.name)
		}
		for _, c := range []struct{ token, text string }{
			{"", "empty"},
			{`"` + refreshCanary + `"`, "without the quotes"},
			{"Bearer " + refreshCanary, "without Bearer"},
			{refreshCanary + "\n", "line break"},
			{strings.Repeat("a", 16<<10+1), "longer than"},
			{jwt(`{"exp":946684800}`), "it expired at 2000-01-01T00:00:00Z (its own exp); authorize the tenant again (tenants/NAME/authorize), or get a new refresh token"},
		} {
			_, err := plain.Check(c.token)
			require.ErrorContains(t, err, c.text)
			requireNoCanary(t, err.Error())
		}
	})
}

func TestSubject(t *testing.T) {
	for claims, want := range map[string]string{
		`{"sub":"42","email":"ada@example.com","email_verified":true}`:   "ada@example.com",
		`{"sub":"42","email":"ada@example.com","email_verified":"true"}`: "42",
		`{"sub":"42","email":"ada@example.com"}`:                         "42",
		`{"sub":"42","email_verified":true}`:                             "42",
		`{"email":"ada@example.com"}`:                                    "ada@example.com",
		`{"sub":"` + strings.Repeat("s", 255) + `"}`:                     strings.Repeat("s", 255),
		`{"sub":"` + strings.Repeat("s", 256) + `"}`:                     "",
		`{"sub":"a\u0007"}`:                                              "",
		`{"sub":"a\ufffd"}`:                                              "",
		`{"sub":"ådå ☃"}`:                                                "ådå ☃",
		`{"sub":42}`:                                                     "",
		`{}`:                                                             "",
	} {
		require.Equal(t, want, subjectOf(jwt(claims)), claims)
	}
	require.Equal(t, "42", subjectOf(jwt(`{"sub":"42","groups":"`+strings.Repeat("g", tokenservice.MaxTokenBytes)+`"}`)))
	require.Empty(t, subjectOf("ada"))
}
