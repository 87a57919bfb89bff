package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

var buildDir string

func TestMain(m *testing.M) {
	var err error
	if buildDir, err = os.MkdirTemp("", "kaizala-emulator"); err != nil {
		panic(err)
	}
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		_ = os.RemoveAll(buildDir)
		os.Exit(code)
	}))
}

// emulator is the built program.
type emulator struct {
	t    *testing.T
	path string
	url  string
}

// try runs a subcommand with a standard input.
func (e *emulator) try(in string, args ...string) (stdout, stderr string, err error) {
	e.t.Helper()
	cmd := exec.CommandContext(e.t.Context(), e.path, args...)
	var out, errs bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(in), &out, &errs
	cmd.Env = append(os.Environ(), "KAIZALA_EMULATOR_URL="+e.url)
	err = cmd.Run()
	return out.String(), errs.String(), err
}

func (e *emulator) run(args ...string) string {
	e.t.Helper()
	out, errs, err := e.try("", args...)
	require.NoError(e.t, err, "%s", errs)
	return strings.TrimSuffix(out, "\n")
}

// exchange makes an exchange as a client; the program has no subcommand for it.
func (e *emulator) exchange(id, secret, token string) (int, map[string]any) {
	e.t.Helper()
	r, err := http.NewRequestWithContext(e.t.Context(), http.MethodGet, e.url+"/v1/accessToken", nil)
	require.NoError(e.t, err)
	r.Header.Set("applicationId", id)
	r.Header.Set("applicationSecret", secret)
	r.Header.Set("refreshToken", token)
	resp, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(r)
	if err != nil {
		return 0, nil
	}
	defer func() { _ = resp.Body.Close() }()
	var fields map[string]any
	_ = json.NewDecoder(resp.Body).Decode(&fields)
	return resp.StatusCode, fields
}

// built builds the program once for all tests.
var built = sync.OnceValues(func() (string, error) {
	path := filepath.Join(buildDir, "kaizala-emulator")
	out, err := exec.Command("go", "build", "-o", path, ".").CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%w: %s", err, out)
	}
	return path, err
})

func newEmulator(t *testing.T) *emulator {
	path, err := built()
	require.NoError(t, err)
	return &emulator{t: t, path: path}
}

// serve starts the service and returns its process, and its output after the first line.
func (e *emulator) serve(stderr io.Writer, args ...string) (*exec.Cmd, *bufio.Reader) {
	e.t.Helper()
	serving := exec.CommandContext(e.t.Context(), e.path, append([]string{"serve"}, args...)...)
	serving.Stderr = stderr
	stdout, err := serving.StdoutPipe()
	require.NoError(e.t, err)
	require.NoError(e.t, serving.Start())
	lines := bufio.NewReader(stdout)
	line, err := lines.ReadString('\n')
	require.NoError(e.t, err)
	e.url = strings.TrimSuffix(strings.TrimPrefix(line, "listening on "), "\n")
	require.Regexp(e.t, `^http://127\.0\.0\.1:\d+$`, e.url)
	return serving, lines
}

func TestProgram(t *testing.T) {
	e := newEmulator(t)

	t.Run("it listens on loopback addresses alone", func(t *testing.T) {
		for _, address := range []string{":0", "0.0.0.0:0", "[::]:0", "10.0.0.1:0", "example.net:0", "127.0.0.1", "127.1:0"} {
			out, errs, err := e.try("", "serve", "-listen", address)
			assert.Error(t, err, address)
			assert.Empty(t, out)
			assert.Contains(t, errs, "loopback", address)
		}
	})
	t.Run("it says how it is used", func(t *testing.T) {
		for _, args := range [][]string{nil, {"unknown"}} {
			_, errs, err := e.try("", args...)
			assert.Error(t, err)
			assert.Contains(t, errs, "delete-connector")
		}
		_, errs, err := e.try("", "help")
		assert.NoError(t, err)
		assert.Contains(t, errs, "usage")
		_, errs, err = e.try("", "connector")
		assert.Error(t, err)
		assert.Contains(t, errs, "-url")
		_, errs, err = e.try("", "token", "-url", "http://127.0.0.1:1", "-connector", "x")
		assert.Error(t, err)
		assert.Contains(t, errs, "-user")
	})

	var logged bytes.Buffer
	serving, lines := e.serve(&logged, "-access-token-life", "1h")

	registered := e.run("connector")
	require.Regexp(t, `^connector_id=\S+\nconnector_secret=\S+$`, registered)
	idLine, secretLine, _ := strings.Cut(registered, "\n")
	id, secret := strings.TrimPrefix(idLine, "connector_id="), strings.TrimPrefix(secretLine, "connector_secret=")

	token := e.run("token", "-connector", id, "-user", "ada")
	group := e.run("token", "-connector", id, "-user", "ada", "-group", "g-1")
	status, grant := e.exchange(id, secret, token)
	require.Equal(t, 200, status)
	assert.Equal(t, e.url, grant["endpointUrl"])
	assert.InDelta(t, time.Now().Add(time.Hour).UnixMilli(), grant["accessTokenExpiry"], 60_000)
	assert.Equal(t, "1", e.run("exchanges"))
	assert.Equal(t, "0", e.run("exchanges", "-user", "bob"))

	out, _, err := e.try(grant["accessToken"].(string)+"\n", "me")
	require.NoError(t, err)
	assert.Contains(t, out, "200 OK\n")
	assert.Contains(t, out, `"name":"ada"`)
	for _, junk := range []string{"junk", "", "a\nb"} {
		out, errs, err := e.try(junk, "me")
		assert.Error(t, err, "%q", junk)
		assert.NotContains(t, out+errs, "a\nb")
	}

	e.run("settings", "-access-token-life", "1ms", "-limit-per-tenant", "0")
	_, short := e.exchange(id, secret, token)
	out, _, err = e.try(short["accessToken"].(string), "me")
	assert.Error(t, err, "the access token has expired")
	assert.Contains(t, out, "401 Unauthorized\n")
	e.run("settings", "-refresh-token-life", "1s", "-limit-per-connector", "1")
	status, _ = e.exchange(id, secret, group)
	assert.Equal(t, 429, status)
	e.run("settings", "-limit-per-connector", "0")
	status, _ = e.exchange(id, secret, group)
	assert.Equal(t, 200, status, "existing refresh tokens live on")

	e.run("fault", "-status", "503", "-retry-after", "9", "-times", "1")
	status, _ = e.exchange(id, secret, token)
	assert.Equal(t, 503, status)
	e.run("fault", "-reset")
	status, _ = e.exchange(id, secret, token)
	assert.Zero(t, status)
	e.run("fault", "-clear")
	for _, bad := range [][]string{{"fault"}, {"fault", "-status", "42"}, {"settings", "-access-token-life", "-1s"}, {"settings", "-limit-per-tenant", "-1"}, {"connector", "extra"}} {
		_, errs, err := e.try("", bad...)
		assert.Error(t, err, "%q", bad)
		assert.NotEmpty(t, errs)
	}

	renewed := e.run("connector-secret", "-connector", id)
	status, _ = e.exchange(id, secret, token)
	assert.Equal(t, 401, status)
	status, _ = e.exchange(id, renewed, token)
	assert.Equal(t, 200, status)
	e.run("delete-connector", "-connector", id)
	status, _ = e.exchange(id, renewed, token)
	assert.Equal(t, 401, status)
	_, errs, err := e.try("", "token", "-connector", id, "-user", "ada")
	assert.Error(t, err)
	assert.Contains(t, errs, "no such connector")

	id3, _, _ := strings.Cut(strings.TrimPrefix(e.run("connector"), "connector_id="), "\n")
	phone := e.run("phone", "-user", "ada")
	resp, err := postJSON(t, e.url+"/v1/generatePin", map[string]string{"mobileNumber": phone, "applicationId": id3})
	require.NoError(t, err)
	require.Equal(t, 200, resp)
	sms, err := lines.ReadString('\n')
	require.NoError(t, err)
	assert.Regexp(t, `^SMS to \`+phone+`: .* \d{6}\n$`, sms)
	for _, foreign := range [][]string{{"losses"}, {"withdraw", "-user", "ada"}, {"settings", "-class", "A"}, {"connector", "-method", "none"}} {
		_, errs, err := e.try("", foreign...)
		assert.Error(t, err, "%q", foreign)
		assert.Contains(t, errs, "the service that runs here")
	}

	// The service ends at once, although an exchange hangs.
	id2 := strings.TrimPrefix(strings.Split(e.run("connector"), "\n")[0], "connector_id=")
	e.run("fault", "-hang")
	hung := make(chan int)
	go func() {
		status, _ := e.exchange(id2, "x", "y")
		hung <- status
	}()
	require.NoError(t, serving.Process.Signal(syscall.SIGTERM))
	rest, err := io.ReadAll(lines)
	require.NoError(t, err)
	assert.Empty(t, rest, "only one line of output")
	require.NoError(t, serving.Wait(), "SIGTERM ends it without an error")
	assert.Zero(t, <-hung)

	for _, secret := range []string{token, group, secret, renewed, grant["accessToken"].(string)} {
		assert.NotContains(t, logged.String(), secret)
	}
	assert.Contains(t, logged.String(), `GET "/v1/accessToken" 503`)
}

func postJSON(t *testing.T, to string, fields map[string]string) (int, error) {
	raw, err := json.Marshal(fields)
	require.NoError(t, err)
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, to, bytes.NewReader(raw))
	require.NoError(t, err)
	r.Header.Set("Content-Type", "application/json")
	resp, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(r)
	if err != nil {
		return 0, err
	}
	return resp.StatusCode, resp.Body.Close()
}
