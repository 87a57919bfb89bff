package kaizala

import (
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/kaizala/kaizalatest"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/tokenservice"
)

const pinCanary = "918273"

// requirePINFailure requires a failure whose text has neither the number nor the PIN.
func requirePINFailure(t *testing.T, want tokenservice.Kind, err error) *tokenservice.Failure {
	t.Helper()
	f := requireKind(t, want, err)
	require.False(t, f.TakesConnector, "what the refusal of a PIN looks like is not documented")
	for _, canary := range []string{phoneCanary, phoneCanary[1:], pinCanary} {
		require.NotContains(t, f.Text, canary)
	}
	return f
}

func TestPINOnAnEmulator(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := kaizalatest.New()
		c, old := connectorOf(t, s, nil)
		number := s.PhoneNumber("ada")
		send := func() string {
			t.Helper()
			require.NoError(t, c.SendPIN(t.Context(), number, nil))
			return s.PIN(c.connectorID, "ada")
		}
		pin := send()
		start := time.Now()
		r := c.RedeemPIN(t.Context(), number, pin, nil)
		require.NoError(t, r.Err)
		assert.Equal(t, s.CurrentRefreshToken("ada"), r.RefreshToken)
		assert.Equal(t, Inspect(r.RefreshToken).facts(), *r.Facts)
		assert.Equal(t, start, r.Sent)
		assert.Nil(t, r.AccessToken)
		assert.Empty(t, r.Endpoint)
		assert.False(t, s.RefreshTokenAlive(old))
		requireGranted(t, c.Exchange(t.Context(), tokenservice.Exchange{RefreshToken: r.RefreshToken}))

		f := requirePINFailure(t, tokenservice.RefusedRefreshToken, c.RedeemPIN(t.Context(), number, pin, nil).Err)
		assert.Equal(t, "Kaizala refuses the PIN (an unknown errorCode): it is wrong, has expired or was used already. The tenant user has to write the right one, or to have a new one sent.", f.Text)

		pin = send()
		time.Sleep(kaizalatest.PINLife)
		requirePINFailure(t, tokenservice.RefusedRefreshToken, c.RedeemPIN(t.Context(), number, pin, nil).Err)

		f = requirePINFailure(t, tokenservice.Refused, c.SendPIN(t.Context(), phoneCanary, nil))
		assert.Equal(t, "Kaizala refuses to send a PIN (InvalidParameters). The tenant user has to check the phone number: "+
			"it must be the one that Kaizala knows the user by, country code included.", f.Text)

		s.SetLimits(1, 0)
		assert.NotZero(t, requirePINFailure(t, tokenservice.Limited, c.SendPIN(t.Context(), number, nil)).RetryAfter)
		assert.NotZero(t, requirePINFailure(t, tokenservice.Limited, c.RedeemPIN(t.Context(), number, pin, nil).Err).RetryAfter)
		s.SetLimits(0, 0)

		s.SetConnectorSecret(c.connectorID, "OTHER")
		requirePINFailure(t, tokenservice.RefusedConnector, c.RedeemPIN(t.Context(), number, send(), nil).Err)
		s.DeleteConnector(c.connectorID)
		f = requirePINFailure(t, tokenservice.Refused, c.SendPIN(t.Context(), number, nil))
		assert.Contains(t, f.Text, "check on Kaizala's portal that it is active")
	})
}

// The client sends the documented requests.
func TestPINRequests(t *testing.T) {
	var seen []string
	c := served(t, func(w http.ResponseWriter, r *http.Request) {
		raw, _ := io.ReadAll(r.Body)
		seen = append(seen, r.Method+" "+r.RequestURI+" "+r.Header.Get("Content-Type")+" "+string(raw))
		assert.Empty(t, r.Header.Get("applicationSecret"))
		assert.EqualValues(t, len(raw), r.ContentLength)
		_, _ = io.WriteString(w, `{"refreshToken":"`+newCanary+`"}`)
	})
	require.NoError(t, c.SendPIN(t.Context(), phoneCanary, nil))
	require.NoError(t, c.RedeemPIN(t.Context(), " +91 (555) 011-23.45", " "+pinCanary+"\n", nil).Err)
	assert.Equal(t, []string{
		`POST /v1/generatePin application/json {"applicationId":"` + connectorID + `","mobileNumber":"` + phoneCanary + `"}`,
		`POST /v1/loginWithPinAndApplicationId application/json {"applicationId":"` + connectorID + `","applicationSecret":"` + secretCanary +
			`","mobileNumber":"+915550112345","pin":"` + pinCanary + `"}`,
	}, seen)
}

func TestPINInputs(t *testing.T) {
	c := through(t, answering(200, nil, `{"refreshToken":"`+newCanary+`"}`))
	for number, ok := range map[string]bool{
		phoneCanary:             true,
		"+1":                    true,
		"+123456789012345":      true,
		"+1234567890123456":     false,
		"":                      false,
		"+":                     false,
		phoneCanary[1:]:         false,
		"00" + phoneCanary[1:]:  false,
		"+" + phoneCanary:       false,
		phoneCanary + "x":       false,
		phoneCanary + "\n":      false,
		"tel:" + phoneCanary:    false,
		"+９１" + phoneCanary[3:]: false,
	} {
		err, r := c.SendPIN(t.Context(), number, nil), c.RedeemPIN(t.Context(), number, pinCanary, nil)
		if ok {
			require.NoError(t, err, number)
			require.NoError(t, r.Err, number)
			continue
		}
		for _, err := range []error{err, r.Err} {
			f := requirePINFailure(t, tokenservice.Refused, err)
			assert.Equal(t, "Nothing was sent to Kaizala: the phone number must have a plus sign, its country code and at most 15 digits.", f.Text, number)
		}
		assert.Zero(t, r.Sent)
		requireRescued(t, "", r)
	}
	for pin, ok := range map[string]bool{
		pinCanary:               true,
		"a":                     true,
		strings.Repeat("1", 32): true,
		strings.Repeat("1", 33): false,
		"":                      false,
		" ":                     false,
		pinCanary + "\n1":       false,
		"１２３":                   false,
	} {
		r := c.RedeemPIN(t.Context(), phoneCanary, pin, nil)
		if ok {
			require.NoError(t, r.Err)
			continue
		}
		f := requirePINFailure(t, tokenservice.Refused, r.Err)
		assert.Equal(t, "Nothing was sent to Kaizala: the PIN must be the few digits that came by SMS.", f.Text)
		assert.Zero(t, r.Sent)
	}
}

func TestPINAnswers(t *testing.T) {
	const wrongConnector = `{"errorCode":"Unauthenticated","message":"Dont have correct applicationId and secret in header!"}`
	token := `"refreshToken":"` + newCanary + `"`
	const none = tokenservice.Kind(0)
	for _, c := range []struct {
		name, body   string
		status       int
		send, redeem tokenservice.Kind
		rescued      bool
	}{
		{"a token", "{" + token + "}", 200, none, none, true},
		{"a token behind a byte-order mark", "\ufeff{" + token + "}", 200, none, none, true},
		{"no body", "", 200, none, tokenservice.Unavailable, false},
		{"an empty object", "{}", 200, none, tokenservice.Unavailable, false},
		{"a word", "OK", 200, none, tokenservice.Unavailable, false},
		{"an empty token", `{"refreshToken":" "}`, 200, none, tokenservice.Unavailable, false},
		{"half an answer", "{" + token, 200, none, tokenservice.Unavailable, true},
		{"a web page", " \n<html>" + bodyCanary, 200, tokenservice.Unavailable, tokenservice.Unavailable, false},
		{"too much", "{" + token + "}" + strings.Repeat(" ", tokenservice.MaxAnswerBytes), 200, tokenservice.Unavailable, tokenservice.Unavailable, true},
		{"InvalidToken", `{"errorCode":"InvalidToken"}`, 401, tokenservice.Refused, tokenservice.RefusedRefreshToken, false},
		{"Unauthenticated", `{"errorCode":"Unauthenticated"}`, 200, tokenservice.Refused, tokenservice.RefusedRefreshToken, false},
		{"an unknown code", `{"errorCode":"` + bodyCanary + `"}`, 400, tokenservice.Refused, tokenservice.RefusedRefreshToken, false},
		{"the connector's message", wrongConnector, 401, tokenservice.Refused, tokenservice.RefusedConnector, false},
		{"a code beside a token", `{"errorCode":"x",` + token + "}", 200, tokenservice.Refused, tokenservice.RefusedRefreshToken, true},
		{"a code with a 5xx", `{"errorCode":"InvalidToken"}`, 500, tokenservice.Unavailable, tokenservice.Unavailable, false},
		{"an error page with a token", "{" + token + "}", 404, tokenservice.Unavailable, tokenservice.Unavailable, false},
		{"429", "", 429, tokenservice.Limited, tokenservice.Limited, false},
		{"503", "<html>", 503, tokenservice.Unavailable, tokenservice.Unavailable, false},
		{"307", "", 307, tokenservice.Unavailable, tokenservice.Unavailable, false},
		{"308", "", 308, tokenservice.Unavailable, tokenservice.Unavailable, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			calls := 0
			client := through(t, handled(func(w http.ResponseWriter, r *http.Request) {
				calls++
				w.Header().Set("Location", DefaultAPIRoot+"/elsewhere")
				w.WriteHeader(c.status)
				_, _ = io.WriteString(w, c.body)
			}))
			err := client.SendPIN(t.Context(), phoneCanary, nil)
			if c.send == none {
				assert.NoError(t, err)
			} else {
				assert.Equal(t, c.status, requirePINFailure(t, c.send, err).Status)
			}
			r := client.RedeemPIN(t.Context(), phoneCanary, pinCanary, nil)
			if c.redeem == none {
				assert.NoError(t, r.Err)
			} else {
				assert.Equal(t, c.status, requirePINFailure(t, c.redeem, r.Err).Status)
			}
			assert.Equal(t, c.rescued, r.RefreshToken == newCanary)
			assert.Equal(t, c.rescued, r.Facts != nil)
			assert.Equal(t, 2, calls, "no redirect is followed, and nothing tried again")
		})
	}
}

// The request for a PIN holds no secret: its refusal refuses no connector, which would stop the exchanges of all its tenants, whatever the
// status that it comes with.
func TestPINThatIsNotSentRefusesNoConnector(t *testing.T) {
	const wrongConnector = `{"errorCode":"Unauthenticated","message":"Dont have correct applicationId and secret in header!"}`
	for _, status := range []int{200, 302, 400, 401, 403, 500, 503} {
		err := through(t, answering(status, nil, wrongConnector)).SendPIN(t.Context(), phoneCanary, nil)
		var f *tokenservice.Failure
		require.ErrorAs(t, err, &f)
		assert.NotEqual(t, tokenservice.RefusedConnector, f.Kind, status)
	}
}

func TestRefreshTokenExpiry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		now := time.Now().UTC()
		redeem := func(token string, expires string) tokenservice.Facts {
			r := through(t, answering(200, nil, `{"refreshToken":"`+token+`","refreshTokenExpiry":`+expires+`}`)).RedeemPIN(t.Context(), phoneCanary, pinCanary, nil)
			require.NoError(t, r.Err)
			return *r.Facts
		}
		unknown := tokenservice.Facts{Kind: "unknown"}
		known := tokenservice.Facts{Kind: "unknown", Expires: now.Add(10 * time.Second), RotatesFrom: now.Add(9 * time.Second)}
		assert.Equal(t, known, redeem(newCanary, "946684810000"), "an opaque token's end is in the answer")
		assert.Equal(t, known, redeem(newCanary, `"946684810000.0"`))
		assert.Equal(t, unknown, redeem(newCanary, "946684800000"), "an end in the past is ignored")
		assert.Equal(t, unknown, redeem(newCanary, "1e300"))
		assert.Equal(t, unknown, redeem(newCanary, `"soon"`))
		assert.Equal(t, known, redeem(jwt(t, claimSet{"iat": now.Unix(), "exp": now.Unix() + 10}), "946684899000"), "the end in the token itself is used first")
	})
}

func TestPINPermitAndContext(t *testing.T) {
	var events []string
	permit := func(context.Context) (func(), error) {
		events = append(events, "permit")
		return func() { events = append(events, "done") }, nil
	}
	c := through(t, answering(200, nil, `{"refreshToken":"`+newCanary+`"}`))
	require.NoError(t, c.SendPIN(t.Context(), phoneCanary, permit))
	require.NoError(t, c.RedeemPIN(t.Context(), phoneCanary, pinCanary, permit).Err)
	assert.Equal(t, []string{"permit", "done", "permit", "done"}, events)

	full := errors.New("the share is used up")
	refuse := func(context.Context) (func(), error) { return nil, full }
	assert.True(t, c.SendPIN(t.Context(), phoneCanary, refuse) == full)
	r := c.RedeemPIN(t.Context(), phoneCanary, pinCanary, refuse)
	assert.True(t, r.Err == full)
	assert.Zero(t, r.Sent)

	synctest.Test(t, func(t *testing.T) {
		hanging := through(t, transportFunc(func(r *http.Request) (*http.Response, error) {
			<-r.Context().Done()
			return nil, r.Context().Err()
		}))
		start := time.Now()
		f := requirePINFailure(t, tokenservice.Unavailable, hanging.SendPIN(t.Context(), phoneCanary, nil))
		assert.Equal(t, "Kaizala's token service at api.kaiza.la timed out after request_timeout (10s). Try again later.", f.Text)
		assert.True(t, f.Lost)
		assert.Equal(t, 10*time.Second, time.Since(start))

		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		require.ErrorIs(t, hanging.SendPIN(ctx, phoneCanary, nil), context.DeadlineExceeded)
		require.ErrorIs(t, hanging.RedeemPIN(ctx, phoneCanary, pinCanary, nil).Err, context.DeadlineExceeded)
	})
}
