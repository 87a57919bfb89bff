package backend

import (
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// usingUp sends the form of a page, and calls meanwhile while storage takes the mark that the form's state is used. It returns the next page.
func (e *grantEngine) usingUp(form map[string]any, meanwhile func()) shown {
	e.t.Helper()
	reached, release := e.storage.hold("put", attemptKeys)
	page := make(chan shown, 1)
	go func() {
		page <- e.visit(logical.UpdateOperation, "callback", form)
	}()
	<-reached
	meanwhile()
	release()
	return <-page
}

// toConfirm starts an authorization up to the page on which the person confirms it. It returns the callback and the page's form.
func (e *grantEngine) toConfirm() (back, form map[string]any) {
	e.t.Helper()
	back = e.authorize(nil)
	_, form = e.open(back).form()
	require.NotNil(e.t, form)
	return back, form
}

// refused is the text of the page of a callback that is refused.
func (e *grantEngine) refused(back map[string]any) string {
	e.t.Helper()
	p := e.open(back)
	_, fields := p.form()
	require.Nil(e.t, fields)
	return p.text()
}

// The connector is written while storage takes the mark that a state is used. The code goes to the connector as it is then, once.
func TestCodeWhoseConnectorIsWrittenWhileItsStateIsUsedUp(t *testing.T) {
	t.Run("another token_url", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			e := newGrantEngine(t)
			_, form := e.toConfirm()
			e.usingUp(form, func() {
				e.write("config/as", map[string]any{"token_url": e.other.TokenURL(), "connector_secret": "another"})
			})
			assert.Empty(t, e.server.Calls(oauth2test.EndpointToken))
			assert.Len(t, e.other.Calls(oauth2test.EndpointToken), 1)
			assert.Equal(t, attemptFailed, e.attemptStatus(byCode))
		})
	})
	t.Run("another setting", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			e := newGrantEngine(t)
			_, form := e.toConfirm()
			p := e.usingUp(form, func() { e.write("config/as", map[string]any{"access_token_life": "2h"}) })
			assert.Equal(t, 200, p.status, p.text())
			assert.Equal(t, 1, e.sent(codeGrant))
			assert.Equal(t, attemptGranted, e.attemptStatus(byCode))
		})
	})
}

// The connector is deleted while storage takes the mark that a state is used. The code is not sent, and the page's button works once the
// connector is there again.
func TestStateWhoseCodeIsNotSentStaysGood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		back, form := e.toConfirm()
		connector := e.get(connectorPrefix + "as")
		p := e.lostConnector(form, func() {})
		assert.Equal(t, 400, p.status)
		assert.Contains(t, p.text(), `Connector "as" is not configured`)
		assert.Contains(t, p.text(), "The link stays valid")
		assert.Zero(t, e.sent(codeGrant))
		assert.Equal(t, attemptPending, e.attemptStatus(byCode))

		e.put(connectorPrefix+"as", []byte(connector))
		p = e.visit(logical.UpdateOperation, "callback", form)
		assert.Equal(t, 200, p.status, p.text())
		assert.Equal(t, 1, e.sent(codeGrant))
		assert.Equal(t, attemptGranted, e.attemptStatus(byCode))
		assert.Contains(t, e.refused(back), "has been used")
	})
}

// lostConnector sends the form of a page, and deletes the connector while storage takes the mark that the state is used. It returns the
// next page.
func (e *grantEngine) lostConnector(form map[string]any, meanwhile func()) shown {
	e.t.Helper()
	return e.usingUp(form, func() {
		e.ok(logical.DeleteOperation, "config/as", nil)
		meanwhile()
	})
}

// A newer attempt comes while a code turns out not to be sent. The attempt before has ended, and storage does not keep its code.
func TestStateOfAnAttemptThatHasEndedIsNotGivenBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		back, form := e.toConfirm()
		require.Contains(t, e.storedText(), back["code"])
		var newer sync.WaitGroup
		e.lostConnector(form, func() {
			newer.Go(func() { _, _, _ = e.pin(map[string]any{"mobile_number": e.kaizala.PhoneNumber("acme")}) })
			synctest.Wait()
		})
		newer.Wait()
		assert.Equal(t, attemptSuperseded, e.attemptStatus(byCode))
		assert.NotContains(t, e.storedText(), back["code"])
		_, status, text := e.pin(map[string]any{"pin": e.sentPIN()})
		assert.Equal(t, 200, status, text)
	})
}

// The engine begins to stop while storage takes the mark that a state is used. The code is not sent: its tokens might come too late to be
// stored. The same page works at the next process. Where storage does not take that the state is good again, the person is told to start
// again.
func TestStopWhileAStateIsUsedUp(t *testing.T) {
	for _, fails := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			e := newGrantEngine(t)
			back, form := e.toConfirm()
			stopped := make(chan struct{})
			p := e.usingUp(form, func() {
				go func() {
					defer close(stopped)
					e.stop()
				}()
				time.Sleep(time.Second)
				if fails {
					e.storage.failWith(func(op, key string) error { // after the put that is held
						if op == "put" && strings.HasPrefix(key, attemptPrefix) {
							return errStorage
						}
						return nil
					})
				}
			})
			<-stopped
			assert.Contains(t, p.text(), "The engine is stopping")
			assert.Empty(t, e.server.Calls(oauth2test.EndpointToken))
			e.storage.heal()
			e.engine.start()
			if fails {
				assert.Contains(t, e.refused(back), "has been used")
				assert.Equal(t, attemptFailed, e.attemptStatus(byCode))
				assert.Contains(t, e.attempt(byCode)["last_error"], "start again")
				return
			}
			assert.Equal(t, attemptPending, e.attemptStatus(byCode))
			assert.Equal(t, 200, e.confirm(back).status)
			assert.Equal(t, attemptGranted, e.attemptStatus(byCode))
		})
	}
}

// The connector is written while storage is asked whether the attempt of a PIN is pending still. The PIN goes to the connector as it is
// then.
func TestPINWhoseConnectorIsWrittenWhileItsAttemptIsRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		e.phone()
		pin := e.sentPIN()
		var reads atomic.Int32
		e.storage.surround(func(op, key string, do func() error) error {
			if op == "get" && strings.HasPrefix(key, attemptKeys) && reads.Add(1) == 2 {
				e.write("config", map[string]any{"api_root": "https://other.example"})
			}
			return do()
		})
		_, status, _ := e.pin(map[string]any{"pin": pin})
		assert.GreaterOrEqual(t, reads.Load(), int32(2))
		assert.Equal(t, 503, status)
		assert.Zero(t, e.pinCalls(redeemPINPath))
		e.storage.heal()
		e.write("config", map[string]any{"api_root": nil})
		_, status, text := e.pin(map[string]any{"pin": pin})
		assert.Equal(t, 200, status, text)
	})
}
