package main

import (
	"encoding/json"
	"io"
	"net/http"
	"net/url"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// form posts a form as a client; the program has no subcommand for it.
func (e *emulator) form(path, id, secret string, fields ...string) (int, map[string]any) {
	e.t.Helper()
	values := url.Values{}
	for i := 0; i < len(fields); i += 2 {
		values.Set(fields[i], fields[i+1])
	}
	r, err := http.NewRequestWithContext(e.t.Context(), http.MethodPost, e.url+path, strings.NewReader(values.Encode()))
	require.NoError(e.t, err)
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	r.SetBasicAuth(id, secret)
	resp, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(r)
	if err != nil {
		return 0, nil
	}
	defer func() { _ = resp.Body.Close() }()
	var answer map[string]any
	_ = json.NewDecoder(resp.Body).Decode(&answer)
	return resp.StatusCode, answer
}

func (e *emulator) refresh(id, secret, token string) (int, map[string]any) {
	e.t.Helper()
	return e.form("/token", id, secret, "grant_type", "refresh_token", "refresh_token", token)
}

func TestOAuth2(t *testing.T) {
	e := newEmulator(t)
	for _, bad := range [][]string{
		{"-service", "x"}, {"-class", "B"}, {"-grace", "1s"}, {"-service", "oauth2", "-old-token-lives"},
		{"-service", "oauth2", "-class", "E"}, {"-service", "oauth2", "-rotation", "x"}, {"-service", "oauth2", "-grace", "-1s"},
	} {
		out, _, err := e.try("", append([]string{"serve"}, bad...)...)
		assert.Error(t, err, "%q", bad)
		assert.Empty(t, out)
	}

	var logged strings.Builder
	serving, lines := e.serve(&logged, "-service", "oauth2", "-class", "D", "-access-token-life", "90s", "-grace", "1h")
	const back = "https://vault.example.com/callback"
	id, secret, _ := strings.Cut(e.run("connector", "-redirect-uri", back), "\n")
	id, secret = strings.TrimPrefix(id, "connector_id="), strings.TrimPrefix(secret, "connector_secret=")

	token := e.run("token", "-connector", id, "-user", "ada", "-scope", "a b")
	status, first := e.refresh(id, secret, token)
	require.Equal(t, 200, status)
	assert.Equal(t, []any{"a b", 90.0}, []any{first["scope"], first["expires_in"]})
	userinfo := func(access any) error {
		out, _, err := e.try(access.(string)+"\n", "userinfo")
		assert.Equal(t, err == nil, strings.HasPrefix(out, "200 OK\n") && strings.Contains(out, `"name":"ada"`))
		return err
	}
	require.NoError(t, userinfo(first["access_token"]))
	_, second := e.refresh(id, secret, token)
	require.NoError(t, userinfo(second["access_token"]))
	assert.Error(t, userinfo(first["access_token"]), "class D: the exchange has ended it")
	assert.Equal(t, "used_twice=1\nin_grace=1", e.run("losses"))
	e.run("settings", "-grace", "0s", "-limit-per-connector", "0")
	status, _ = e.refresh(id, secret, token)
	assert.Equal(t, 400, status)
	assert.Equal(t, "used_twice=2\nin_grace=1\nlost ada: a refresh token was used twice", e.run("losses"))
	assert.Equal(t, "2 0", e.run("exchanges", "-user", "ada")+" "+e.run("exchanges", "-user", "bob"))

	e.run("settings", "-class", "A", "-rotation", "never")
	token = e.run("token", "-connector", id, "-user", "ada")
	_, answer := e.refresh(id, secret, token)
	assert.NotContains(t, answer, "refresh_token")
	assert.Equal(t, 3600.0, answer["expires_in"])
	e.run("withdraw", "-user", "ada")
	assert.Error(t, userinfo(answer["access_token"]))

	at := e.url + "/authorize?" + url.Values{"response_type": {"code"}, "client_id": {id}, "redirect_uri": {back}, "state": {"s"}}.Encode()
	to, err := url.Parse(e.run("approve", "-authorization-url", at, "-user", "ada"))
	require.NoError(t, err)
	status, answer = e.form("/token", id, secret, "grant_type", "authorization_code", "code", to.Query().Get("code"), "redirect_uri", back)
	assert.Equal(t, 200, status)
	code := to.Query().Get("code")
	assert.Contains(t, e.run("deny", "-authorization-url", at), "error=access_denied")

	_, device := e.form("/device_authorization", id, secret)
	assert.Empty(t, e.run("approve", "-user-code", device["user_code"].(string), "-user", "ada"))
	const grantType = "urn:ietf:params:oauth:grant-type:device_code"
	status, _ = e.form("/token", id, secret, "grant_type", grantType, "device_code", device["device_code"].(string))
	assert.Equal(t, 200, status)
	_, device = e.form("/device_authorization", id, secret)
	e.run("deny", "-user-code", device["user_code"].(string))
	_, denied := e.form("/token", id, secret, "grant_type", grantType, "device_code", device["device_code"].(string))
	assert.Equal(t, "access_denied", denied["error"])

	for _, bad := range [][]string{
		{"approve"}, {"deny", "-user-code", "x"}, {"approve", "-authorization-url", "https://example.com", "-user", "ada"},
		{"token", "-connector", id, "-user", "ada", "-group", "g"}, {"token", "-connector", "x", "-user", "ada"}, {"phone", "-user", "ada"},
		{"settings", "-class", "E"}, {"fault"}, {"fault", "-endpoint", "x", "-reset"}, {"connector", "-method", "x"},
		{"connector-secret", "-connector", "x"}, {"withdraw"},
	} {
		_, errs, err := e.try("", bad...)
		assert.Error(t, err, "%q", bad)
		assert.NotEmpty(t, errs, "%q", bad)
	}

	token = answer["refresh_token"].(string)
	e.run("fault", "-endpoint", "revocation", "-status", "503", "-times", "1")
	status, _ = e.form("/revoke", id, secret, "token", token)
	assert.Equal(t, 503, status)
	e.run("fault", "-reset", "-times", "1")
	status, _ = e.refresh(id, secret, token)
	assert.Zero(t, status)
	renewed := e.run("connector-secret", "-connector", id)
	status, _ = e.refresh(id, secret, token)
	assert.Equal(t, 401, status)
	status, _ = e.refresh(id, renewed, token)
	assert.Equal(t, 200, status)
	e.run("delete-connector", "-connector", id)
	status, _ = e.refresh(id, renewed, token)
	assert.Equal(t, 401, status)

	e.run("fault", "-hang")
	hung := make(chan int)
	go func() {
		status, _ := e.refresh("x", "y", "z")
		hung <- status
	}()
	require.NoError(t, serving.Process.Signal(syscall.SIGTERM))
	rest, err := io.ReadAll(lines)
	require.NoError(t, err)
	assert.Empty(t, rest, "only one line of output")
	require.NoError(t, serving.Wait(), "SIGTERM ends it without an error")
	select {
	case status := <-hung:
		assert.Zero(t, status)
	case <-time.After(10 * time.Second):
		t.Error("the exchange still hangs")
	}
	for _, secret := range []string{token, secret, renewed, code, first["access_token"].(string), device["device_code"].(string)} {
		assert.NotContains(t, logged.String(), secret)
	}
	assert.Contains(t, logged.String(), `POST "/token" 200`)
}
