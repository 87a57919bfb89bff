package backend

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// moveToTheOther writes the connector "as" for the other server.
func (e *grantEngine) moveToTheOther() {
	e.t.Helper()
	id, secret := e.other.RegisterClient(oauth2test.AuthBasic, callbackTo)
	e.write("config/as", map[string]any{
		"token_url": e.other.TokenURL(), "authorization_url": e.other.AuthorizationURL(), "device_authorization_url": e.other.DeviceURL(),
		"connector_id": id, "connector_secret": secret,
	})
}

// A connector is written for another server before the code of the former one comes back, or is sent: the other server does not get it, and
// the person has to start again.
func TestCodeDoesNotGoToAnotherServer(t *testing.T) {
	for name, comeBack := range map[string]func(*grantEngine) shown{
		"before the page": func(e *grantEngine) shown {
			back := e.authorize(nil)
			e.moveToTheOther()
			return e.open(back)
		},
		"before the form": func(e *grantEngine) shown {
			_, form := e.toConfirm()
			e.moveToTheOther()
			return e.visit(logical.UpdateOperation, "callback", form)
		},
		"while the state is used up": func(e *grantEngine) shown {
			_, form := e.toConfirm()
			return e.usingUp(form, e.moveToTheOther)
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newGrantEngine(t)
				p := comeBack(e)
				assert.Equal(t, 400, p.status)
				assert.Contains(t, p.text(), "is for another service now: start again")
				assert.Equal(t, attemptFailed, e.attemptStatus(byCode))
				assert.Empty(t, e.other.Calls(oauth2test.EndpointToken))
				assert.Empty(t, e.server.Calls(oauth2test.EndpointToken))
				assert.NotContains(t, e.storedText(), `"verifier"`)
			})
		})
	}
}

// A connector is written for another server while the former one's device code is polled for: the other server is not asked.
func TestDeviceCodeDoesNotGoToAnotherServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		e.start(byDevice, nil)
		time.Sleep(6 * time.Second)
		require.Len(t, e.polls(), 1)
		e.moveToTheOther()
		e.pass(time.Minute)
		assert.Empty(t, e.other.Calls(oauth2test.EndpointToken))
		attempt := e.attempt(byDevice)
		assert.Equal(t, attemptFailed, attempt["status"])
		assert.Contains(t, attempt["last_error"], "is for another service now: start again")
	})
}

// An attempt of an engine that did not store its server goes on.
func TestCodeOfAnAttemptWithoutAServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		back := e.authorize(nil)
		all, err := e.attemptsOf(t.Context(), "acme")
		require.NoError(t, err)
		all.Last[byCode].Server = ""
		require.NoError(t, putEntry(t.Context(), e.storage, attemptKeys+"acme", all))
		assert.Equal(t, 200, e.confirm(back).status)
		assert.Equal(t, attemptGranted, e.attemptStatus(byCode))
	})
}
