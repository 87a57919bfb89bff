package backend

import (
	"context"
	"fmt"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// A write of a connector that leaves exchange_invalidates as it is costs no reader the access token in memory, though storage fails the
// write, or another node makes it, and storage then fails every read.
func TestReadersKeepTheirTokensWhenAConnectorIsWritten(t *testing.T) {
	for name, write := range map[string]func(e, other *oauthEngine){
		"storage fails the write": func(e, _ *oauthEngine) {
			e.storage.refuse("put", connectorPrefix)
			_, status, _ := e.try(logical.UpdateOperation, "config", map[string]any{"connector_secret": "another"})
			require.GreaterOrEqual(e.t, status, http.StatusInternalServerError)
		},
		"another node writes": func(e, other *oauthEngine) {
			e.swap(other)
			other.write("config", map[string]any{"connector_secret": "another"})
			synctest.Wait()
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, oauth2test.ClassD, nil)
				e.add("acme", nil)
				token := accessTokenOf(e.lease("acme"))
				write(e, e.newStandby())
				e.storage.failWith(func(string, string) error { return errStorage })
				assert.Equal(t, token, accessTokenOf(e.lease("acme")))
				e.storage.heal()
			})
		})
	}
}

// A write of exchange_invalidates that storage takes, and whose answer comes after the write's time, plans the ends of the access tokens
// of all tenants.
func TestExchangeInvalidatesIsWrittenTooSlowly(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassD, classB)
		for i := range 20 {
			e.add(fmt.Sprint("acme", i), nil)
			e.lease(fmt.Sprint("acme", i))
		}
		e.storage.surround(func(op, key string, do func() error) error {
			err := do()
			if op == "put" && key == connectorPrefix+defaultConnector {
				time.Sleep(storeWithin + time.Second)
				return context.DeadlineExceeded
			}
			return err
		})
		_, status, _ := e.try(logical.UpdateOperation, "config", map[string]any{"exchange_invalidates": true})
		require.GreaterOrEqual(t, status, http.StatusInternalServerError)
		e.storage.heal()
		synctest.Wait()
		for i := range 20 {
			name := fmt.Sprint("acme", i)
			planned := plannedExchange(name, e.stored(name), 0)
			assert.EqualValues(t, time.Until(planned.Add(-leaseMargin))/time.Second, e.read("token/" + name)["ttl"])
		}
	})
}
