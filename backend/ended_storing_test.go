package backend

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// A refresh, or a write of the tenant's own refresh token, has ended the access token at the service, and storage is slow to take the new
// one: readers wait for that, and leases on the older one are not renewed.
func TestReaderWhileTheNextAccessTokenIsStored(t *testing.T) {
	for name, exchange := range map[string]func(*oauthEngine){
		"refresh": func(e *oauthEngine) { _, _, _ = e.try(logical.UpdateOperation, "tenants/acme/refresh", nil) },
		"write":   func(e *oauthEngine) { e.rewrite("acme", e.held("acme"), true) },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, oauth2test.ClassD, classD)
				e.add("acme", nil)
				lease := e.lease("acme")
				reached, release := e.storage.hold("put", tenantPrefix)
				go exchange(e)
				<-reached
				synctest.Wait()
				assert.False(t, renews(e, lease))
				for _, path := range []string{"creds/acme", "token/acme"} {
					go func() { assert.True(t, e.server.Alive(e.read(path)["access_token"].(string)), path) }()
				}
				time.Sleep(5 * time.Second)
				release()
				time.Sleep(time.Second)
				assert.True(t, e.server.Alive(accessTokenOf(e.lease("acme"))))
				e.kept()
			})
		})
	}
}
