package backend

import (
	"errors"
	"net"
	"net/http"
	"net/http/httptrace"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/share"
)

// slowConnection is a network where a connection to a URL takes a while, as Go's transport tells of it: nothing of the request is sent before there
// is one, or on one that has been closed.
type slowConnection struct {
	http.RoundTripper
	takes time.Duration
	to    string // "": each URL
}

type connection struct {
	net.Conn
	closed atomic.Bool
}

func (c *connection) Close() error {
	c.closed.Store(true)
	return nil
}

func (s slowConnection) RoundTrip(r *http.Request) (*http.Response, error) {
	if s.to != "" && r.URL.String() != s.to {
		return s.RoundTripper.RoundTrip(r)
	}
	trace := httptrace.ContextClientTrace(r.Context())
	trace.GetConn(r.URL.Host)
	select {
	case <-r.Context().Done():
		return nil, r.Context().Err()
	case <-time.After(s.takes):
	}
	c := &connection{}
	trace.GotConn(httptrace.GotConnInfo{Conn: c})
	if c.closed.Load() {
		return nil, errors.New("the connection is closed")
	}
	return s.RoundTripper.RoundTrip(r)
}

// A connector is written while the connection for an exchange is being made: neither the refresh token nor the former secret is sent on
// it. The exchange is made with the present connector, and if that fails, the next process asks about neither call.
func TestConnectorIsWrittenWhileAnExchangeConnects(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, nil)
		e.stop()
		e.wire = func() http.RoundTripper { return slowConnection{e.server.Transport(), 3 * time.Second, ""} }
		e.start()
		e.add("acme", nil)
		e.server.Inject(oauth2test.Fault{Answer: oauth2test.BadGateway})
		done := make(chan int)
		go func() {
			_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
			done <- status
		}()
		time.Sleep(time.Second)
		e.write("config", map[string]any{"connector_secret": e.server.NewClientSecret(e.clientID)})
		assert.Equal(t, http.StatusServiceUnavailable, <-done)
		assert.Len(t, e.server.Calls(), 1)
		next := share.New(e.storage, defaultConnector)
		require.NoError(t, next.Load(t.Context()))
		assert.Zero(t, next.Unsettled("acme"))
		e.server.ClearFaults()
		e.pass(time.Minute)
		e.lease("acme")
		e.kept()
	})
}

// As above, with Kaizala.
func TestKaizalasConnectorIsWrittenWhileAnExchangeConnects(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		e.connectors.transport = slowConnection{e.kaizala.Transport(), 3 * time.Second, ""}
		e.write("config", map[string]any{"connector_secret": e.secret})
		begun, done := time.Now(), make(chan struct{})
		go func() {
			defer close(done)
			e.lease("acme")
		}()
		time.Sleep(time.Second)
		e.write("config", map[string]any{"connector_secret": e.secret})
		<-done
		assert.Equal(t, 6*time.Second, time.Since(begun), "a second connection was made")
		assert.Equal(t, 1, e.kaizala.CallCount())
	})
}

// A connector is written while the connection for an authorization code is being made: the code is sent once, with the present connector.
func TestConnectorIsWrittenWhileACodeConnects(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		e.connectors.transport = slowConnection{e.transport(), 3 * time.Second, ""}
		e.write("config/as", map[string]any{"connector_secret": e.clientSecret})
		_, form := e.open(e.authorize(nil)).form()
		done := make(chan struct{})
		go func() {
			defer close(done)
			_, _, _ = e.ask(logical.UpdateOperation, "callback", form)
		}()
		time.Sleep(time.Second)
		e.write("config/as", map[string]any{"connector_secret": e.server.NewClientSecret(e.clientID)})
		<-done
		assert.Equal(t, 1, e.sent("authorization_code"))
		assert.Equal(t, attemptGranted, e.attemptStatus(byCode))
	})
}
