package backend

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// The link of an attempt whose end storage has noted says that it is too late, and not that the link was used.
func TestLinkThatHasExpiredSaysSo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		back := e.authorize(nil)
		e.pass(attemptLife + 2*time.Minute)
		synctest.Wait()
		require.Contains(t, e.get(stateKeys+hashOf(back["state"].(string))), attemptExpired)
		assert.Contains(t, e.open(back).text(), "Too late")
	})
}

// An attempt was begun while the clock was days ahead: its link says that it is too late, and its secrets leave storage with that visit.
func TestLinkOfAnAttemptOfAWrongClock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		back := e.authorize(nil)
		for _, key := range []string{attemptKeys + "acme", stateKeys + hashOf(back["state"].(string))} {
			e.put(key, []byte(strings.ReplaceAll(e.get(key), `"expires":"2000-01-01`, `"expires":"2000-01-09`)))
		}
		require.Contains(t, e.storedText(), `"verifier"`)
		assert.Contains(t, e.open(back).text(), "Too late")
		assert.NotContains(t, e.storedText(), `"verifier"`)
		assert.Equal(t, attemptExpired, e.attemptStatus(byCode))
	})
}

// A grant is stored, or memory keeps it until storage takes it, and storage has not noted that the state is used: an error that comes with
// the same state changes nothing.
func TestErrorAfterAGrantChangesNothing(t *testing.T) {
	for _, kept := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			e := newGrantEngine(t)
			e.write("config/as", map[string]any{"confirm": false})
			e.write("tenants/acme", map[string]any{"connector": "as", "refresh_token": e.server.Grant(e.clientID, "bob"), "verify": false})
			back := e.authorize(nil)
			e.storage.failWith(func(op, key string) error {
				if op == "put" && (strings.HasPrefix(key, stateKeys) || kept && strings.HasPrefix(key, tenantPrefix)) {
					return errStorage
				}
				return nil
			})
			e.open(back)
			e.storage.refuse("put", tenantPrefix)
			refused := map[string]any{"state": back["state"], "error": "access_denied"}
			assert.Contains(t, e.open(refused).text(), "This link has been used")
			assert.Contains(t, e.open(back).text(), "This link has been used")
			e.storage.heal()
			e.pass(2 * time.Minute)
			assert.Equal(t, attemptGranted, e.attemptStatus(byCode))
			assert.Equal(t, 1, e.sent(codeGrant))
		})
	}
}

// Access was denied, and storage has not noted that the state is used: a code that comes with the same state is not sent.
func TestCodeAfterADenialIsNotSent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		e.write("config/as", map[string]any{"confirm": false})
		back := e.authorize(nil)
		e.storage.refuse("put", stateKeys)
		e.open(map[string]any{"state": back["state"], "error": "access_denied"})
		e.storage.heal()
		assert.Contains(t, e.open(back).text(), "This link has been used")
		assert.Zero(t, e.sent(codeGrant))
		assert.Equal(t, attemptDenied, e.attemptStatus(byCode))
	})
	synctest.Test(t, func(t *testing.T) { // with a page that confirms, too
		e := newGrantEngine(t)
		back := e.authorize(nil)
		e.storage.refuse("put", stateKeys)
		e.open(map[string]any{"state": back["state"], "error": "access_denied"})
		e.storage.heal()
		assert.Contains(t, e.open(back).text(), "This link has been used")
	})
}

// Memory keeps a grant that storage does not take: the link cannot be used again meanwhile, because at some services a code that is sent
// twice ends what it has granted.
func TestLinkOfAKeptGrantIsUsed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		e.write("config/as", map[string]any{"confirm": false})
		back := e.authorize(nil)
		e.failPuts()
		assert.Contains(t, e.open(back).text(), "Not finished yet")
		assert.Contains(t, e.open(back).text(), "This link has been used")
		assert.Equal(t, 1, e.sent(codeGrant))
		e.storage.heal()
		e.pass(2 * time.Minute)
		assert.Equal(t, attemptGranted, e.attemptStatus(byCode))
	})
}

// A newer authorization begins while a code waits for its call, or storage cannot say then whether the tenant was written: the code is not
// sent.
func TestCodeThatIsOvertakenIsNotSent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		back := e.authorize(nil)
		over := e.storage.once("put", callPrefix, func() { e.start(byCode, nil) })
		_, status, text := e.ask(logical.UpdateOperation, "callback", back)
		assert.True(t, over())
		assert.Equal(t, 400, status, text)
		assert.Zero(t, e.sent(codeGrant))
	})
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		back := e.authorize(nil)
		e.storage.once("put", callPrefix, func() { e.storage.refuse("get", tenantPrefix) })
		_, status, _ := e.ask(logical.UpdateOperation, "callback", back)
		assert.Equal(t, 500, status)
		assert.Zero(t, e.sent(codeGrant))
		e.storage.heal()
		_, status, text := e.ask(logical.UpdateOperation, "callback", back)
		assert.Equal(t, 200, status, text)
	})
}

// The connector is written while a code is about to be sent, and a newer authorization begins before the state of the older one is good
// again: the older one stays ended.
func TestNewerAttemptWhileACodeIsGivenBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		back := e.authorize(nil)
		begun := make(chan int, 1)
		e.storage.once("put", attemptKeys, func() { // that the state is used
			go func() {
				_, status, _ := e.ask(logical.UpdateOperation, "tenants/acme/authorize", map[string]any{"connector": "as"})
				begun <- status
			}()
			time.Sleep(time.Second)
			e.write("config/as", map[string]any{"request_timeout": "14s"})
		})
		_, status, text := e.ask(logical.UpdateOperation, "callback", back)
		assert.Equal(t, 400, status, text)
		assert.Equal(t, 200, <-begun)
		assert.Zero(t, e.sent(codeGrant))
		assert.Equal(t, attemptPending, e.attemptStatus(byCode))
	})
}

// Only the read of the callback is answered with a page for a person.
func TestOtherReadsGetNoPage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		resp, status, _ := e.ask(logical.ReadOperation, "creds/acme", map[string]any{"min_ttl": "not a duration"})
		assert.Equal(t, 400, status)
		if resp != nil {
			assert.NotContains(t, resp.Data, logical.HTTPRawBody)
		}
	})
}

// A connector's own callback answers a browser with a page, too, for what is wrong in its address.
func TestPageOfAConnectorsCallbackForWhatIsGivenTwice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		p := e.visit(logical.ReadOperation, "callback/as", map[string]any{"state": []any{"a", "b"}, "code": "c"})
		assert.Equal(t, 400, p.status)
		assert.Contains(t, p.text(), "Something is missing")
	})
}
