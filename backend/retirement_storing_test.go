package backend

import (
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// An access token is revoked after the refresh, write or delete that gives it up is stored, and not before: until then readers get it. A
// lease of another tenant, whose revocation makes the worker look for calls to make, changes nothing.
func TestAccessTokenIsNotRevokedBeforeItsRetirementIsStored(t *testing.T) {
	for name, retire := range map[string]func(e *oauthEngine){
		"refresh":        func(e *oauthEngine) { e.write("tenants/acme/refresh", nil) },
		"write":          func(e *oauthEngine) { e.rewrite("acme", e.server.Grant(e.clientID, "acme"), false) },
		"verified write": func(e *oauthEngine) { e.rewrite("acme", e.server.Grant(e.clientID, "acme"), true) },
		"delete":         func(e *oauthEngine) { e.ok(logical.DeleteOperation, "tenants/acme", nil) },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, oauth2test.ClassA, classA)
				e.add("acme", nil)
				e.add("other", nil)
				old := e.read("token/acme")["access_token"].(string)
				lease := e.lease("other")
				var slow atomic.Bool
				slow.Store(true)
				e.storage.surround(func(op, key string, do func() error) error {
					if (op == "put" || op == "delete") && key == tenantPrefix+"acme" && slow.CompareAndSwap(true, false) {
						time.Sleep(8 * time.Second)
					}
					return do()
				})
				go retire(e)
				time.Sleep(time.Second)
				e.revoke(lease)
				time.Sleep(time.Second)
				got := accessTokenOf(e.lease("acme"))
				assert.Equal(t, old, got)
				assert.True(t, e.server.Alive(got))
				time.Sleep(8 * time.Second)
				assert.False(t, e.server.Alive(old))
				e.kept()
			})
		})
	}
}
