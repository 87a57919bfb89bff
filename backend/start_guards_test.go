package backend

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// Another node deletes a tenant between the start's list of the tenants and its read of that one: the others are found.
func TestTenantIsDeletedDuringTheStart(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenants(3)
		e.stop()
		e.storage.once("get", tenantPrefix+"t1", func() {
			require.NoError(t, e.storage.InmemStorage.Delete(t.Context(), tenantPrefix+"t1"))
		})
		e.start()
		e.waitForIndex()
		assert.Len(t, e.ok(logical.ListOperation, "tenants/", nil).Data["key_info"], 2)
	})
}

// A tenant that another node has written is read once, and not each minute from then on.
func TestTenantOfAnotherNodeIsReadOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		standby := e.newStandby()
		e.write("tenants/acme", map[string]any{"ttl": "1h"})
		standby.pass(2 * time.Minute)
		synctest.Wait()
		ops := 0
		standby.storage.surround(func(_, key string, do func() error) error {
			if strings.HasPrefix(key, tenantPrefix) {
				ops++
			}
			return do()
		})
		standby.pass(10 * time.Minute)
		synctest.Wait()
		assert.Zero(t, ops)
	})
}

// Storage fails at the start. The log says so. Once storage works again, the delete of a connector finds out who uses the connector, without
// waiting for the next tick.
func TestDeleteAfterAStartThatFailed(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenants(2)
		e.stop()
		e.storage.refuse("get", tenantPrefix)
		e.start()
		synctest.Wait()
		assert.Equal(t, 1, e.log.count("some tenants could not be read yet"))
		assert.Equal(t, 1, e.log.count("the index of tenants could not be built yet"))
		e.storage.heal()
		_, status, text := e.try(logical.DeleteOperation, "config", nil)
		assert.Equal(t, http.StatusBadRequest, status)
		assert.Contains(t, text, "t0, t1")
	})
}

// A standby finds the access token of a lease whose record is missing. It leaves that to the active node, and has read the tenant.
func TestStandbyLeavesUnleasedTokensAlone(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", map[string]any{"token_per_lease": true})
		e.lease("acme")
		entry := e.stored("acme")
		entry.Unleased = &accessEntry{Token: "unleased", Generation: "G", Obtained: time.Now(), Expires: time.Now().Add(time.Hour)}
		require.NoError(t, putEntry(t.Context(), e.storage.InmemStorage, tenantPrefix+"acme", entry))
		standby := e.newStandby()
		assert.Zero(t, standby.log.count("could not be read yet"))
		assert.Zero(t, standby.log.count("could not be built yet"))
	})
}

// An access token came while the clock was ahead. A standby goes by the right time and leaves storage as it is.
func TestStandbyStoresNoCorrection(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		e.lease("acme")
		standby := e.newStandby()
		entry := e.stored("acme")
		entry.Access.Obtained, entry.Access.Expires = entry.Access.Obtained.Add(day), entry.Access.Expires.Add(day)
		require.NoError(t, putEntry(t.Context(), e.storage.InmemStorage, tenantPrefix+"acme", entry))
		standby.storage.failWith(func(op, _ string) error {
			assert.NotEqual(t, "put", op)
			return nil
		})
		standby.InvalidateKey(t.Context(), tenantPrefix+"acme")
		ends, err := time.Parse(time.RFC3339, standby.read("tenants/acme")["access_token_expire_time"].(string))
		require.NoError(t, err)
		assert.WithinDuration(t, time.Now(), ends, 2*time.Hour)
	})
}

// The stop of the engine waits for work that ends soon after it was told to.
func TestStopWaitsForItsWork(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		ended := false
		e.goWork(func() {
			<-e.ctx.Done()
			time.Sleep(stopWithin / 10)
			ended = true
		})
		e.stop()
		assert.True(t, ended)
	})
}

// The engine stops while storage fails. The log names the tenant whose grant, given by a person, is lost.
func TestLostGrantIsLogged(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.phone()
		e.failPuts()
		_, _, _ = e.pin(map[string]any{"pin": e.sentPIN()})
		e.stop()
		assert.Equal(t, 1, e.log.count("could not be stored before the engine stopped, and is lost"))
		e.storage.heal()
	})
}

// An empty string is an empty list.
func TestEmptyListAsAString(t *testing.T) {
	e := newConfiguredEngine(t)
	e.write("config", map[string]any{"redirect_hosts": ""})
	assert.Empty(t, e.read("config")["redirect_hosts"])
}

// Vault's errors about storage that takes no writes lose their identity on their way to the plugin, and get it back.
func TestReadOnlyErrorsKeepTheirIdentity(t *testing.T) {
	for _, err := range []error{logical.ErrReadOnly, logical.ErrSetupReadOnly} {
		assert.Equal(t, err, storageError(errors.New("rpc error: "+err.Error())))
	}
}

// A reader comes while the index reads its tenant: the tenant's tokens stay in memory outside of the bound.
func TestReaderBesideTheIndexStaysWithinTheBound(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		e.read("token/acme")
		e.stop()
		e.storage.surround(func(op, key string, do func() error) error {
			if op == "get" && key == tenantPrefix+"acme" {
				time.Sleep(time.Second)
			}
			return do()
		})
		e.start()
		time.Sleep(time.Second / 2)
		e.read("token/acme")
		synctest.Wait()
		time.Sleep(time.Minute)
		if e.tenants.named("acme").view.Load().entry != nil {
			assert.True(t, e.tenants.loaded.Contains("acme"), "in memory, and not among those that leave it when others come")
		}
	})
}

// The index reads tenants that no request reads, while as many hot tenants as memory holds are read again and again. They stay in memory, with
// the counts of their leases.
func TestIndexLeavesHotTenantsInMemory(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		const hot, cold = 20, 300
		for i := range hot {
			e.addTenant(fmt.Sprint("hot", i))
		}
		for i := range cold {
			e.addTenant(fmt.Sprint("cold", i))
		}
		e.stop()
		gate := make(chan struct{})
		e.storage.surround(func(op, key string, do func() error) error {
			if op == "get" && strings.HasPrefix(key, tenantPrefix+"cold") {
				<-gate
				time.Sleep(10 * time.Millisecond)
			}
			return do()
		})
		e.start()
		e.tenants.loaded.Resize(hot)
		for i := range hot {
			e.lease(fmt.Sprint("hot", i))
		}
		synctest.Wait()
		close(gate)
		counted, reads := 0, 0
		for range 50 { // while the index goes on
			time.Sleep(10 * time.Millisecond)
			for i := range hot {
				tn := e.tenants.named(fmt.Sprint("hot", i))
				if tn.view.Load().entry == nil {
					reads++
				}
				e.mustRead(fmt.Sprint("token/hot", i))
			}
		}
		for i := range hot {
			if v := e.tenants.named(fmt.Sprint("hot", i)).view.Load(); v.access != nil && v.access.leases.Load() == 1 {
				counted++
			}
		}
		assert.Zero(t, reads, "hot tenants had left memory")
		assert.Equal(t, hot, counted, "of %d hot tenants with a lease that is still counted", hot)
	})
}
