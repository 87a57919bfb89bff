package kaizalatest

import (
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func (c *caller) post(path string, body map[string]any) got {
	c.t.Helper()
	r, err := http.NewRequestWithContext(c.t.Context(), http.MethodPost, c.root+path, strings.NewReader(text(body)))
	require.NoError(c.t, err)
	resp, err := c.rt.RoundTrip(r)
	if err != nil {
		return got{err: err}
	}
	raw, err := io.ReadAll(resp.Body)
	_ = resp.Body.Close()
	g := got{status: resp.StatusCode, header: resp.Header, raw: string(raw), err: err}
	_ = json.Unmarshal(raw, &g.fields)
	return g
}

func (c *caller) sendPIN(number string) got {
	c.t.Helper()
	return c.post(sendPINPath, map[string]any{"mobileNumber": number, "applicationId": c.id})
}

func (c *caller) redeemPIN(number, pin string) got {
	c.t.Helper()
	return c.post(redeemPINPath, map[string]any{"mobileNumber": number, "applicationId": c.id, "applicationSecret": c.secret, "pin": pin})
}

func TestPIN(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New()
		c := inProcess(t, s)
		var sms []string
		s.OnSMS(func(number, text string) { sms = append(sms, number+": "+text) })
		old, group := s.GenerateUserToken(c.id, "ada"), s.GenerateGroupToken(c.id, "ada", "g-1")
		number := s.PhoneNumber("ada")
		require.Regexp(t, `^\+[0-9]{12}$`, number)
		send := func() string {
			t.Helper()
			require.Equal(t, 200, c.sendPIN(number).status)
			return s.PIN(c.id, "ada")
		}
		redeemed := func(pin string) {
			t.Helper()
			g := c.redeemPIN(number, pin)
			require.Equal(t, 200, g.status, g.raw)
			require.Equal(t, s.CurrentRefreshToken("ada"), g.text("refreshToken"))
		}
		refused := func(pin string) {
			t.Helper()
			g := c.redeemPIN(number, pin)
			require.Equal(t, 401, g.status)
			require.Equal(t, "InvalidPin", g.text("errorCode"))
		}
		wrong := func(pin string) string { return pin[1:] + string('0'+(pin[0]-'0'+1)%10) + "x" }

		assert.Empty(t, s.PIN(c.id, "ada"))
		refused("000000")
		pin := send()
		require.Regexp(t, `^[0-9]{6}$`, pin)
		require.Equal(t, []string{number + ": Your PIN for Kaizala is " + pin}, sms)

		g := c.redeemPIN(number, pin)
		require.Equal(t, 200, g.status, g.raw)
		token := g.text("refreshToken")
		assert.Equal(t, s.CurrentRefreshToken("ada"), token)
		assert.Equal(t, "token.write", g.text("grantedScope"))
		assert.Equal(t, DefaultEndpointURL, g.text("endpointUrl"))
		assert.EqualValues(t, time.Now().Add(365*day).UnixMilli(), g.fields["refreshTokenExpiry"])
		c.granted(token)
		c.granted(group)
		assert.False(t, s.RefreshTokenAlive(old), "the user's older token has ended")
		assert.Empty(t, s.PIN(c.id, "ada"))
		refused(pin)

		first := send()
		second := send()
		if first != second {
			refused(first)
		}
		redeemed(second)

		pin = send()
		time.Sleep(PINLife - time.Nanosecond)
		redeemed(pin)
		pin = send()
		time.Sleep(PINLife)
		assert.Empty(t, s.PIN(c.id, "ada"))
		refused(pin)

		pin = send()
		for range PINTries - 1 {
			refused(wrong(pin))
		}
		redeemed(pin)
		pin = send()
		for range PINTries {
			refused(wrong(pin))
		}
		assert.Empty(t, s.PIN(c.id, "ada"))
		refused(pin)

		pin = send()
		code := func(g got) string { return g.text("errorCode") }
		other := &caller{t: t, rt: c.rt, root: c.root, id: c.id, secret: "OTHER"}
		assert.Equal(t, "Unauthenticated", code(other.redeemPIN(number, pin)))
		assert.Contains(t, other.redeemPIN(number, pin).text("message"), "applicationId and secret")
		assert.Equal(t, "InvalidParameters", code(c.sendPIN("")))
		assert.Equal(t, "InvalidParameters", code(c.sendPIN("+1")))
		assert.Equal(t, "InvalidParameters", code(c.redeemPIN(number, "")))
		assert.Equal(t, "InvalidParameters", code(c.redeemPIN("+1", pin)))
		assert.Equal(t, "InvalidParameters", code(c.post(sendPINPath, nil)))
		assert.Equal(t, "InvalidParameters", code(c.post(redeemPINPath, map[string]any{"mobileNumber": number, "applicationId": c.id, "pin": pin})))
		assert.Equal(t, "Unauthenticated", code((&caller{t: t, rt: c.rt, root: c.root, id: "nobody's"}).sendPIN(number)))
		assert.Equal(t, "InvalidPin", code(inProcess(t, s).redeemPIN(number, pin)), "the PIN is for another connector")
		assert.Equal(t, http.StatusMethodNotAllowed, c.call(t.Context(), sendPINPath, nil).status)
		redeemed(pin)
		s.DeactivateConnector(c.id)
		assert.Equal(t, "Unauthenticated", code(c.sendPIN(number)))
	})
}

func TestPINCallsCount(t *testing.T) {
	s := New()
	c := inProcess(t, s)
	number := s.PhoneNumber("ada")
	s.SetLimits(3, 0)
	s.Inject(Fault{User: "ada", Times: 1, Status: 503, Body: "<html>"})
	assert.Equal(t, 503, c.sendPIN(number).status)
	assert.Empty(t, s.PIN(c.id, "ada"))
	s.Inject(Fault{Times: 1, Process: true, Reset: true})
	assert.ErrorIs(t, c.sendPIN(number).err, io.ErrUnexpectedEOF)
	assert.Equal(t, 400, c.redeemPIN("+1", s.PIN(c.id, "ada")).status)
	assert.Equal(t, 429, c.sendPIN(number).status)

	calls := s.Calls()
	require.Len(t, calls, 4)
	for i, want := range []Call{
		{Path: sendPINPath, User: "ada", Status: 503},
		{Path: sendPINPath, User: "ada", Status: 0},
		{Path: redeemPINPath, User: "", Status: 400},
		{Path: sendPINPath, User: "ada", Status: 429},
	} {
		assert.Equal(t, []any{c.id, want.Path, want.User, want.Status}, []any{calls[i].ConnectorID, calls[i].Path, calls[i].User, calls[i].Status}, i)
		assert.False(t, calls[i].End.IsZero())
	}
	assert.Zero(t, s.Exchanges("ada"))
}

func TestPINOnASocket(t *testing.T) {
	s := NewServer()
	defer s.Close()
	id, secret := s.RegisterConnector()
	transport := &http.Transport{DisableKeepAlives: true}
	c := &caller{t: t, rt: transport, root: s.URL, id: id, secret: secret}
	number := s.PhoneNumber("ada")
	require.Equal(t, 200, c.sendPIN(number).status)
	g := c.redeemPIN(number, s.PIN(id, "ada"))
	require.Equal(t, 200, g.status)
	assert.Equal(t, s.URL, g.text("endpointUrl"))
	c.granted(g.text("refreshToken"))
}
