package oauth2

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/tokenservice"
)

// wire is a token endpoint behind connections in memory. It counts connections and requests, and asks answer about each request of a
// connection, counted from 0: false closes the connection instead of an answer.
type wire struct {
	client                *Client
	connections, requests int
	answer                func(connection, request int) bool
	closesAfter           bool // the server closes each connection after its answer, without Connection: close
}

func newWire(t *testing.T) *wire {
	t.Helper()
	client, err := New(Config{
		ClientID: "id", ClientSecret: "secret", TokenURL: "http://127.0.0.1:1/token", RequestTimeout: 10 * time.Second,
		RefreshTokenLife: time.Hour, AccessTokenLife: time.Hour, KeepAlive: time.Hour,
	})
	require.NoError(t, err)
	w := &wire{client: client, answer: func(int, int) bool { return true }}
	client.transport.(*http.Transport).DialContext = func(context.Context, string, string) (net.Conn, error) {
		near, far := net.Pipe()
		connection := w.connections
		w.connections++
		go func() {
			defer far.Close()
			reader := bufio.NewReader(far)
			for n := 0; ; n++ {
				r, err := http.ReadRequest(reader)
				if err != nil {
					return
				}
				_, _ = io.Copy(io.Discard, r.Body)
				w.requests++
				if !w.answer(connection, n) {
					return
				}
				const body = `{"access_token":"a","token_type":"bearer","refresh_token":"r"}`
				_, _ = fmt.Fprintf(far, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
				if w.closesAfter {
					return
				}
			}
		}()
		return near, nil
	}
	t.Cleanup(client.Close)
	return w
}

func (w *wire) exchange(t *testing.T) error {
	t.Helper()
	result := w.client.Exchange(t.Context(), tokenservice.Exchange{RefreshToken: "sent"})
	synctest.Wait()
	return result.Err
}

// Exchanges within a second use one connection, and an exchange after more than a second uses a new one.
func TestConnectionIsKeptForASecond(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWire(t)
		for range 3 {
			require.NoError(t, w.exchange(t))
			time.Sleep(time.Second - 1)
		}
		assert.Equal(t, 1, w.connections)
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		require.NoError(t, w.exchange(t))
		assert.Equal(t, 2, w.connections)
		w.client.Close()
		assert.Equal(t, tokenservice.ErrClosed, w.exchange(t))
		assert.Equal(t, 3, w.connections, "Close has closed the kept connection")
		assert.Equal(t, 4, w.requests)
	})
}

// A connection that the server has closed is not used again.
func TestConnectionThatTheServerHasClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWire(t)
		w.closesAfter = true
		for range 3 {
			require.NoError(t, w.exchange(t))
		}
		assert.Equal(t, 3, w.connections)
		assert.Equal(t, 3, w.requests)
	})
}

// A request on a kept connection that breaks is not sent again: the first may have been carried out.
func TestRequestOnAKeptConnectionIsNotRepeated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWire(t)
		w.answer = func(connection, request int) bool { return connection > 0 || request < 2 }
		require.NoError(t, w.exchange(t))
		require.NoError(t, w.exchange(t))
		failure, ok := w.exchange(t).(*tokenservice.Failure)
		require.True(t, ok)
		assert.True(t, failure.Lost)
		assert.Contains(t, failure.Text, "closed the connection too early")
		assert.Equal(t, 1, w.connections)
		assert.Equal(t, 3, w.requests)
		require.NoError(t, w.exchange(t))
		assert.Equal(t, 2, w.connections)
	})
}
