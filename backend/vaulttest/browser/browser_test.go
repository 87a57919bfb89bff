package browser

import (
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// pages is a server with a login, a confirmation on the same address as its page, and a last page.
func pages(t *testing.T) string {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /start", func(w http.ResponseWriter, _ *http.Request) {
		http.SetCookie(w, &http.Cookie{Name: "session", Value: "1"})
		_, _ = w.Write([]byte(`<html><head><title>Not seen</title></head><body><h1>Log&nbsp;in</h1>
			<form method="post" action="/login?x=1&amp;y=2"><input type=hidden name='id' value=7><INPUT name="username" value="">
			<input name="password"><button type="submit">Go</button></form></body></html>`))
	})
	mux.HandleFunc("POST /login", func(w http.ResponseWriter, r *http.Request) {
		require.NoError(t, r.ParseForm())
		cookie, err := r.Cookie("session")
		require.NoError(t, err)
		require.Equal(t, "1", cookie.Value)
		require.Equal(t, "x=1&y=2", r.URL.RawQuery)
		require.Equal(t, map[string][]string{"id": {"7"}, "username": {"asha"}, "password": {"a&b"}}, map[string][]string(r.PostForm))
		http.Redirect(w, r, "/callback?code=c&state=s", http.StatusFound)
	})
	mux.HandleFunc("GET /callback", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write([]byte(`<p>Connect <b>acme</b>?</p><form method="post"><input type="hidden" name="page" value="1"><button name="go" value="yes">Connect</button></form>`))
	})
	mux.HandleFunc("POST /callback", func(w http.ResponseWriter, r *http.Request) {
		require.NoError(t, r.ParseForm())
		require.Equal(t, "code=c&state=s", r.URL.RawQuery)
		require.Equal(t, map[string][]string{"page": {"1"}, "go": {"yes"}}, map[string][]string(r.PostForm))
		w.WriteHeader(http.StatusBadRequest)
		_, _ = w.Write([]byte("<p>Done &amp; dusted</p>"))
	})
	mux.HandleFunc("/again", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write([]byte(`<p>No</p><form action="/again"></form>`))
	})
	mux.HandleFunc("/round", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/round", http.StatusFound) })
	server := httptest.NewServer(mux)
	t.Cleanup(server.Close)
	return server.URL
}

func TestVisit(t *testing.T) {
	url := pages(t)
	asha := Person{User: "asha", Password: "a&b"}
	visit, err := asha.Open(url + "/start")
	require.NoError(t, err)
	require.Empty(t, visit.StoppedAt)
	require.Len(t, visit.Pages, 3)
	require.Equal(t, "Log in Go", visit.Pages[0].Text())
	require.Equal(t, "Connect acme ? Connect", visit.Pages[1].Text())
	require.Equal(t, "Done & dusted", visit.Last().Text())
	require.Equal(t, http.StatusBadRequest, visit.Last().Status)

	asha.StopAt = url + "/callback"
	visit, err = asha.Open(url + "/start")
	require.NoError(t, err)
	require.Equal(t, url+"/callback?code=c&state=s", visit.StoppedAt)
}

func TestVisitEnds(t *testing.T) {
	url := pages(t)
	_, err := Person{}.Open(url + "/again")
	require.EqualError(t, err, "/again asks again and again: No")
	_, err = Person{}.Open(url + "/round")
	require.ErrorContains(t, err, "redirected ten times in a row")
	_, err = Person{}.Open("http://127.0.0.1:1/")
	require.Error(t, err)
}
