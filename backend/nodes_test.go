package backend

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// Two nodes on one storage: each write of one node invalidates the key in the memory of the other node.

// newStandby starts another node on the storage of e, as a performance standby: each write of e invalidates the key in its memory.
func (e *oauthEngine) newStandby() *oauthEngine {
	other := &oauthEngine{server: e.server, clientID: e.clientID, secret: e.secret}
	other.engine = &engine{
		t: e.t, kaizala: e.kaizala, storage: &storage{InmemStorage: e.storage.InmemStorage}, system: newSystem(),
		events: &events{}, log: &lockedBuffer{}, wire: e.wire,
	}
	other.mayWrite(false)
	other.start()
	e.t.Cleanup(other.stop)
	e.tell(other)
	other.waitForIndex()
	return other
}

// tell makes each write of e invalidate the key in the memory of the other node.
func (e *oauthEngine) tell(other *oauthEngine) {
	e.storage.surround(func(op, key string, do func() error) error {
		err := do()
		if err == nil && (op == "put" || op == "delete") {
			other.InvalidateKey(context.Background(), key)
		}
		return err
	})
}

// mayWrite makes the node the active node, which may write, or a standby.
func (e *oauthEngine) mayWrite(may bool) {
	if may {
		e.system.replication.Store(0)
		e.storage.heal()
		return
	}
	e.system.replication.Store(uint32(consts.ReplicationPerformanceStandby))
	e.storage.failWith(func(op, _ string) error {
		if op == "put" || op == "delete" {
			return logical.ErrReadOnly
		}
		return nil
	})
}

// swap makes the other node the active node, and e a standby.
func (e *oauthEngine) swap(other *oauthEngine) {
	e.storage.heal()
	e.mayWrite(false)
	other.mayWrite(true)
	other.tell(e)
}

// swapUnstored makes an exchange for the tenant acme whose tokens storage does not take, makes another node the active node, and
// returns that node.
func (e *oauthEngine) swapUnstored() (other *oauthEngine) {
	e.t.Helper()
	e.add("acme", nil)
	other = e.newStandby()
	e.storage.surround(func(op, key string, do func() error) error {
		if op == "put" && strings.HasPrefix(key, tenantPrefix) {
			return logical.ErrReadOnly
		}
		return do()
	})
	_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
	require.Equal(e.t, http.StatusServiceUnavailable, status)
	e.swap(other)
	return other
}

// A standby's list of tenants is at most a minute old.
func TestStandbyListsWhatTheOtherNodeWrites(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("old", nil)
		standby := e.newStandby()
		e.add("new", nil)
		e.server.Withdraw("old")
		_, _, _ = e.try(logical.ReadOperation, "creds/old", nil)
		standby.pass(time.Minute)
		synctest.Wait()
		active, listed := e.ok(logical.ListOperation, "tenants/", nil), standby.ok(logical.ListOperation, "tenants/", nil)
		assert.Equal(t, active.Data["key_info"], listed.Data["key_info"])
		assert.Empty(t, listed.Warnings)
	})
}

// A standby that becomes the active node knows at once which tenants use a connector, and which do not any more.
func TestPromotedNodeKnowsWhoUsesAConnector(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.write("config/other", map[string]any{
			"service": "oauth2", "token_url": e.server.TokenURL(), "connector_id": e.clientID, "connector_secret": e.secret,
		})
		e.add("old", nil)
		standby := e.newStandby()
		for _, name := range []string{"new", "old"} {
			e.write("tenants/"+name, map[string]any{"connector": "other", "refresh_token": e.server.Grant(e.clientID, name), "verify": false})
			e.swap(standby)
			_, status, _ := standby.try(logical.DeleteOperation, "config/other", nil)
			assert.Equal(t, http.StatusBadRequest, status, name)
			standby.swap(e)
			e.ok(logical.DeleteOperation, "tenants/"+name, nil)
		}
		e.swap(standby)
		standby.ok(logical.DeleteOperation, "config/other", nil)
	})
}

// Another node gives a tenant to a connector. The node that becomes the active node refuses to delete that connector while it still
// reads the tenant from storage, and also after it has read the tenant as it was before the write.
func TestPromotedNodeStillReadsATenant(t *testing.T) {
	for _, before := range []bool{false, true} {
		bubble(t, func(t *testing.T) {
			e := newOAuthEngine(t, oauth2test.ClassA, classA)
			e.write("config/other", map[string]any{
				"service": "oauth2", "token_url": e.server.TokenURL(), "connector_id": e.clientID, "connector_secret": e.secret,
			})
			other := e.newStandby()
			connector := map[bool]string{false: "other", true: defaultConnector}[before]
			e.add("acme", map[string]any{"connector": connector})
			read := make(chan struct{})
			other.storage.surround(func(op, key string, do func() error) error {
				err := do()
				if op == "get" && key == tenantPrefix+"acme" {
					<-read
				}
				return err
			})
			other.minute()
			synctest.Wait()
			if before {
				e.write("tenants/acme", map[string]any{"connector": "other", "verify": false})
				close(read)
				synctest.Wait()
			} else {
				time.AfterFunc(time.Second, func() { close(read) })
			}
			e.swap(other)
			_, status, _ := other.try(logical.DeleteOperation, "config/other", nil)
			assert.Equal(t, http.StatusBadRequest, status, before)
		})
	}
}

// The active node keeps a refresh token alive, also if another node wrote the tenant.
func TestPromotedNodeRenewsWhatTheOtherHasMade(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, func(o *oauth2test.Options) {
			oauth2test.ClassA(o)
			o.RefreshTokenLife, o.RefreshTokenLifeField = 10*time.Hour, "refresh_token_expires_in"
		}, classA)
		standby := e.newStandby()
		e.add("acme", nil)
		e.lease("acme")
		e.swap(standby)
		standby.pass(15 * time.Hour)
		assert.True(t, e.server.RefreshTokenAlive(e.stored("acme").RefreshToken))
		assert.Equal(t, 2, e.server.Exchanges("acme"))
		e.kept()
	})
}

// A node stores the intent of a revocation and stops, and the stored tenant still has the access token. The standby has handed that
// token out from memory. It becomes the active node, revokes the token, and does not hand it out any more.
func TestPromotedNodeGoesOnWithAnIntent(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		lease := e.lease("acme")
		standby := e.newStandby()
		require.Equal(t, accessTokenOf(lease), standby.read("token/acme")["access_token"])
		e.storage.refuse("put", tenantPrefix)
		e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointRevocation, Answer: oauth2test.BadGateway, Times: 1})
		require.Error(t, e.revokeLease(lease))
		e.swap(standby)
		standby.pass(2 * time.Minute)
		assert.True(t, e.server.Alive(standby.read("token/acme")["access_token"].(string)))
		assert.False(t, e.server.Alive(accessTokenOf(lease)))
		e.kept()
	})
}

// The active node stores an intent while the standby reads all intents: when the standby becomes the active node, it has that intent
// too.
func TestIntentIsStoredWhileAnotherNodeReadsThem(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		lease := e.lease("acme")
		other := e.newStandby()
		listed := make(chan struct{})
		other.storage.surround(func(op, key string, do func() error) error {
			err := do()
			if op == "list" && key == intentPrefix {
				<-listed
			}
			return err
		})
		other.InvalidateKey(t.Context(), intentPrefix+"default/ANOTHER")
		other.minute()
		synctest.Wait()
		e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointRevocation, Answer: oauth2test.BadGateway})
		e.revoke(lease)
		close(listed)
		synctest.Wait()
		e.swap(other)
		e.server.ClearFaults()
		other.pass(2 * time.Minute)
		assert.False(t, e.server.Alive(accessTokenOf(lease)))
	})
}

// A refresh token is written again, which cancels its revocation, while the standby reads the intents: when the standby becomes the
// active node, it does not revoke the token.
func TestIntentIsCalledOffWhileAnotherNodeReadsThem(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, revokeAll)
		e.add("old", nil)
		token := e.stored("old").RefreshToken
		other := e.newStandby()
		read := make(chan struct{})
		other.storage.surround(func(op, key string, do func() error) error {
			err := do()
			if op == "get" && strings.HasPrefix(key, intentPrefix) {
				<-read
			}
			return err
		})
		e.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointRevocation, Answer: oauth2test.BadGateway})
		e.ok(logical.DeleteOperation, "tenants/old", nil)
		other.minute()
		synctest.Wait()
		e.write("tenants/new", map[string]any{"refresh_token": token, "verify": false})
		close(read)
		synctest.Wait()
		e.swap(other)
		e.server.ClearFaults()
		other.pass(2 * time.Minute)
		assert.True(t, e.server.RefreshTokenAlive(token))
		assert.Nil(t, other.read("config")["pending_revocations"])
	})
}

// A node keeps tokens that storage has not taken, and then another node makes an exchange for the same tenant: the older tokens do not
// replace the newer ones in storage.
func TestKeptTokenOfBeforeAnotherNodesExchange(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, func(o *oauth2test.Options) { oauth2test.ClassC(o); o.Grace = time.Minute }, classB)
		other := e.swapUnstored()
		other.read("creds/acme")
		other.swap(e)
		e.pass(3 * time.Minute)
		assert.Equal(t, e.server.CurrentRefreshToken("acme"), e.stored("acme").RefreshToken)
		assert.Equal(t, statusOK, e.status("acme"))
		assert.Empty(t, e.server.LostGrants())
	})
}

// A node keeps tokens that storage has not taken, and becomes a standby. Then another node makes an exchange: the standby hands out the
// access token of that exchange.
func TestStandbyWithAKeptTokenServesAnotherNodesExchange(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, func(o *oauth2test.Options) { oauth2test.ClassD(o); o.Grace = time.Minute }, classD)
		other := e.swapUnstored()
		lease := other.lease("acme")
		assert.Equal(t, accessTokenOf(lease), e.read("token/acme")["access_token"])
		other.swap(e)
		e.pass(3 * time.Minute)
		assert.True(t, e.server.Alive(accessTokenOf(lease)))
		assert.Equal(t, accessTokenOf(lease), accessTokenOf(e.lease("acme")))
	})
}

// Storage takes no intent, so the revocation of a lease fails, and Vault does not try it again. When storage works, the engine revokes
// the access token by itself, and the next process does not hand it out.
func TestTokenGivenUpWhileStorageTakesNoIntent(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		lease := e.lease("acme")
		e.waitForIndex()
		e.storage.refuse("put", intentPrefix)
		require.Error(t, e.revokeLease(lease))
		e.storage.heal()
		e.pass(3 * time.Minute)
		assert.False(t, e.server.Alive(accessTokenOf(lease)))
		e.crash()
		assert.True(t, e.server.Alive(accessTokenOf(e.lease("acme"))))
	})
}

// An exchange fails on one node, and then another node makes an exchange or gets another refresh token. The first node hands out the
// new access token, without a warning, and makes no exchange that ends it when it becomes the active node again.
func TestTroubleOfBeforeAnotherNodesExchange(t *testing.T) {
	for name, heal := range map[string]func(other *oauthEngine){
		"exchange": func(other *oauthEngine) { other.read("creds/acme") },
		"write": func(other *oauthEngine) {
			other.write("tenants/acme", map[string]any{"refresh_token": other.server.Grant(other.clientID, "jane")})
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, oauth2test.ClassD, nil)
				e.add("acme", nil)
				other := e.newStandby()
				e.server.Inject(oauth2test.Fault{Reset: true, Times: 2})
				_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
				require.Equal(t, http.StatusServiceUnavailable, status)
				e.swap(other)
				time.Sleep(time.Second)
				heal(other)
				lease := other.lease("acme")
				e.pass(time.Minute)
				synctest.Wait()
				assert.Equal(t, other.ok(logical.ListOperation, "tenants/", nil).Data, e.ok(logical.ListOperation, "tenants/", nil).Data)
				resp, status, text := e.try(logical.ReadOperation, "token/acme", nil)
				require.Equal(t, http.StatusOK, status, text)
				assert.Empty(t, resp.Warnings)
				assert.Equal(t, statusOK, e.status("acme"))
				other.swap(e)
				assert.Equal(t, accessTokenOf(lease), accessTokenOf(e.lease("acme")))
				e.pass(5 * time.Minute)
				assert.True(t, e.server.Alive(accessTokenOf(lease)))
			})
		})
	}
}

// exchange_invalidates is written on another node, or storage takes the write and reports an error: the access tokens get their planned
// ends all the same, and the ttl of a token read ends before the exchange that ends its token.
func TestExchangeInvalidatesIsWrittenElsewhere(t *testing.T) {
	for name, write := range map[string]func(e, other *oauthEngine){
		"another node": func(e, other *oauthEngine) {
			other.write("config", map[string]any{"exchange_invalidates": true})
			synctest.Wait() // this node reads the connector in the background
		},
		"not acknowledged": func(e, _ *oauthEngine) {
			e.storage.surround(func(op, key string, do func() error) error {
				err := do()
				if op == "put" && key == connectorPrefix+defaultConnector {
					return errors.New("the answer was lost")
				}
				return err
			})
			_, status, _ := e.try(logical.UpdateOperation, "config", map[string]any{"exchange_invalidates": true})
			require.GreaterOrEqual(e.t, status, http.StatusInternalServerError)
			e.storage.heal()
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, oauth2test.ClassD, classB)
				e.add("acme", nil)
				before := e.read("token/acme")
				other := e.newStandby()
				if name == "another node" {
					e.swap(other)
				}
				write(e, other)
				after := e.read("token/acme")
				assert.Equal(t, before["access_token"], after["access_token"])
				planned := plannedExchange("acme", e.stored("acme"), 0)
				assert.EqualValues(t, time.Until(planned.Add(-leaseMargin))/time.Second, after["ttl"])
			})
		})
	}
}

// A node becomes the active node again, and goes on with an attempt that another node has started.
func TestNodeGoesOnWithAnotherNodesAttempt(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.write("config", map[string]any{"device_authorization_url": e.server.DeviceURL()})
		e.waitForIndex()
		other := e.newStandby()
		e.swap(other)
		code := other.write("tenants/acme/device", nil).Data["user_code"].(string)
		other.swap(e)
		require.NoError(t, e.server.ApproveDevice(code, "jane"))
		e.pass(2 * time.Minute)
		require.NotNil(t, e.stored("acme"))
		assert.Equal(t, attemptGranted, e.read("tenants/acme/device")["status"])
	})
}

// Storage takes an access token and reports an error, so the active node keeps the token in memory. The standby hands it out. When its
// lease is revoked, the active node does not hand it out or store it again.
func TestLeaseOnATokenThatTheOtherNodeKeeps(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		e.waitForIndex()
		other := e.newStandby()
		e.storage.surround(func(op, key string, do func() error) error {
			err := do()
			if op == "put" && strings.HasPrefix(key, tenantPrefix) {
				return errStorage
			}
			return err
		})
		_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
		require.Equal(t, http.StatusServiceUnavailable, status)
		e.storage.heal()
		lease := other.lease("acme")
		e.revoke(lease)
		assert.False(t, e.server.Alive(accessTokenOf(lease)))
		e.pass(time.Minute)
		assert.True(t, e.server.Alive(accessTokenOf(e.lease("acme"))))
		e.crash()
		assert.True(t, e.server.Alive(accessTokenOf(e.lease("acme"))))
	})
}

// What an exchange has brought cannot be stored by a node that has become a standby since it was due. The node stores that once it may
// write again.
func TestKeptTokensAreStoredOnceTheNodeMayWrite(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassD, nil)
		e.add("acme", nil)
		e.failPuts()
		_, _, _ = e.try(logical.ReadOperation, "creds/acme", nil)
		e.quiet("acme")
		kept := e.held("acme")
		require.NotEqual(t, kept, e.stored("acme").RefreshToken)
		due, _ := e.index.due(time.Now().Add(time.Hour)) // as a tick takes it off the index
		require.Equal(t, []string{"acme"}, due)
		e.mayWrite(false)
		e.attend("acme")
		e.pass(2 * time.Minute)
		e.mayWrite(true)
		e.pass(2 * time.Minute)
		assert.Equal(t, kept, e.stored("acme").RefreshToken)
		assert.Equal(t, 1, e.server.Exchanges("acme"))
	})
}
