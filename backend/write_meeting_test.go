package backend

import (
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// A write of settings meets a write that is being verified. The later one's settings hold, and what both make together is valid; a new
// refresh token that the service has sent is kept in any case.
func TestSettingsMeetAVerifiedWrite(t *testing.T) {
	type data = map[string]any
	for name, c := range map[string]struct {
		rotates bool
		delay   time.Duration // of the verification
		first   data          // what the tenant has
		write   data          // beside the refresh token; is being verified
		patch   data          // comes meanwhile
		status  int           // of the write
		says    string
		has     data // what the tenant has at the end
	}{
		"other settings": {
			delay: 2 * time.Second, write: data{"ttl": "1h"}, patch: data{"max_ttl": "2h"},
			status: 204, has: data{"ttl": int64(3600), "max_ttl": int64(7200)},
		},
		"the same setting": {
			delay: 2 * time.Second, write: data{"ttl": "1h", "min_ttl": "1m"}, patch: data{"ttl": "9m"},
			status: 200, says: "its settings were kept", has: data{"ttl": int64(540), "min_ttl": int64(60)},
		},
		"the same setting after the writer's 503": {
			delay: 12 * time.Second, write: data{"ttl": "1h", "min_ttl": "1m"}, patch: data{"ttl": "9m", "retire_on_revoke": false},
			status: 503, says: "has not answered yet", has: data{"ttl": int64(540), "min_ttl": int64(60), "retire_on_revoke": false},
		},
		"settings that do not go together": {
			delay: 2 * time.Second, first: data{"min_ttl": "3m"}, write: data{"ttl": "2h", "min_ttl": "1m"}, patch: data{"max_ttl": "1h"},
			status: 400, says: "nothing was stored: ttl is over max_ttl", has: data{"ttl": int64(0), "max_ttl": int64(3600), "min_ttl": int64(180)},
		},
		"settings that do not go together, and a rotation": {
			rotates: true, delay: 2 * time.Second, write: data{"ttl": "2h"}, patch: data{"max_ttl": "1h"},
			status: 200, says: "its settings were kept", has: data{"ttl": int64(0), "max_ttl": int64(3600)},
		},
		"token_per_lease, and a connector that cannot": {
			delay: 2 * time.Second, write: data{"connector": "other"}, patch: data{"token_per_lease": true},
			status: 400, says: "token_per_lease needs a connector", has: data{"token_per_lease": true, "connector": "default"},
		},
		"token_per_lease, a connector that cannot, and a rotation": {
			rotates: true, delay: 2 * time.Second, write: data{"connector": "other"}, patch: data{"token_per_lease": true},
			status: 204, has: data{"token_per_lease": false, "connector": "other"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, func(o *oauth2test.Options) {
					oauth2test.ClassA(o)
					if !c.rotates {
						o.Rotation = oauth2test.RotateNever
					}
				}, classA)
				e.write("config/other", data{
					"service": "oauth2", "token_url": e.server.TokenURL(), "connector_id": e.clientID, "connector_secret": e.secret,
				})
				e.add("acme", c.first)
				write := data{"refresh_token": e.server.Grant(e.clientID, "acme")}
				for field, value := range c.write {
					write[field] = value
				}
				e.server.Inject(oauth2test.Fault{Delay: c.delay, Times: 1})
				type end struct {
					status int
					text   string
				}
				done := make(chan end, 1)
				go func() {
					resp, status, text := e.try(logical.UpdateOperation, "tenants/acme", write)
					if resp != nil && len(resp.Warnings) > 0 {
						text = resp.Warnings[0]
					}
					done <- end{status, text}
				}()
				synctest.Wait()
				if c.delay > answerWithin {
					time.Sleep(answerWithin)
					synctest.Wait()
				}
				e.ok(logical.PatchOperation, "tenants/acme", c.patch)
				got := <-done
				assert.Equal(t, c.status, got.status, got.text)
				assert.Contains(t, got.text, c.says)
				time.Sleep(c.delay)
				synctest.Wait()
				if c.status == 400 && c.write["connector"] == nil {
					assert.Empty(t, e.server.AccessTokens("acme"), "the access token of the verification is revoked")
				}
				shown := e.read("tenants/acme")
				for field, value := range c.has {
					assert.EqualValues(t, value, shown[field], field)
				}
				// What is stored is valid: another write of a setting succeeds, and readers get an access token.
				e.write("tenants/acme", data{"min_ttl": "2m"})
				e.read("creds/acme")
				e.restart()
				e.read("creds/acme")
				e.kept()
			})
		})
	}
}

// A tenant is deleted, and written anew, while its exchange is at the service: the refresh token that the exchange brings is revoked as
// the delete has said. A tenant that is only written anew keeps what the write has replaced as it is.
func TestDeleteAndWriteDuringAnExchange(t *testing.T) {
	for name, c := range map[string]struct{ deleted, written bool }{
		"deleted":              {deleted: true},
		"deleted and written":  {deleted: true, written: true},
		"written, not deleted": {written: true},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, oauth2test.ClassA, revokeAll)
				e.add("acme", nil)
				e.server.Inject(oauth2test.Fault{Hold: true, Times: 1})
				go func() { _, _, _ = e.try(logical.ReadOperation, "creds/acme", nil) }()
				synctest.Wait()
				brought := e.server.CurrentRefreshToken("acme")
				if c.deleted {
					e.ok(logical.DeleteOperation, "tenants/acme", nil)
				}
				if c.written {
					e.write("tenants/acme", map[string]any{"refresh_token": e.server.Grant(e.clientID, "anew"), "verify": false})
				}
				e.server.ClearFaults()
				time.Sleep(time.Minute)
				require.Equal(t, !c.deleted, e.server.RefreshTokenAlive(brought))
				sent := slices.ContainsFunc(e.revocations(), func(call oauth2test.Call) bool { return call.Token == brought })
				assert.Equal(t, c.deleted, sent, "the delete's own refresh token may have ended the grant")
				if c.written {
					e.read("creds/acme")
				}
			})
		})
	}
}
