package backend

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/kaizala/kaizalatest"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

func TestRefreshTokenIsVerifiedAndNeverRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		token := e.newToken("acme")
		e.write("tenants/acme", map[string]any{"refresh_token": "  " + token + "\n", "ttl": "1h"})
		assert.Equal(t, 1, e.kaizala.Exchanges("acme"), "the refresh token was verified")
		got := e.read("tenants/acme")
		assert.NotContains(t, fmt.Sprint(got), token)
		assert.Equal(t, "ok", got["status"])
		assert.Equal(t, "user", got["kind"])
		assert.Equal(t, "operator", got["refresh_token_origin"])
		assert.Equal(t, int64(3600), got["ttl"])
		assert.Equal(t, int64(900), got["min_ttl"])
		assert.Equal(t, time.Now().Add(365*24*time.Hour).UTC().Format(time.RFC3339), got["refresh_token_expire_time"])

		e.read("creds/acme")
		assert.Equal(t, 1, e.kaizala.CallCount(), "readers get the access token of the verification")
	})
}

func TestGroupTokenTellsItsGroup(t *testing.T) {
	e := newConfiguredEngine(t)
	e.write("tenants/acme", map[string]any{"refresh_token": e.kaizala.GenerateGroupToken(e.connectorID, "u", "group-7"), "verify": false})
	got := e.read("tenants/acme")
	assert.Equal(t, "group", got["kind"])
	assert.Equal(t, "group-7", got["group_id"])
	assert.Equal(t, "unverified", got["status"])
}

func TestRefusedVerificationStoresNothing(t *testing.T) {
	answers := []struct {
		name   string
		fault  kaizalatest.Fault
		status int
		says   string
	}{
		{"refresh token refused", kaizalatest.Fault{Status: 401, Body: `{"errorCode":"InvalidToken","errorCategoryKey":"AuthException","message":"no"}`}, 400, "generate a new one"},
		{"connector refused", kaizalatest.Fault{Status: 401, Body: `{"errorCode":"Unauthenticated","message":"Dont have correct applicationId and secret in header!"}`}, 400, "connector"},
		{"limit", kaizalatest.Fault{Status: 429}, 429, "try again in"},
		{"broken", kaizalatest.Fault{Status: 503, Body: "<html>"}, 503, "nothing was stored"},
		{"reset", kaizalatest.Fault{Reset: true}, 503, "nothing was stored"},
	}
	for _, answer := range answers {
		t.Run(answer.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newConfiguredEngine(t)
				answer.fault.Times = 1
				e.kaizala.Inject(answer.fault)
				_, status, text := e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": e.newToken("acme")})
				assert.Equal(t, answer.status, status)
				assert.Contains(t, text, answer.says)
				assert.Nil(t, e.stored("acme"))
				_, status, _ = e.try(logical.ReadOperation, "tenants/acme", nil)
				assert.Equal(t, 404, status)
				_, status, text = e.try(logical.ReadOperation, "creds/acme", nil)
				assert.Equal(t, 400, status)
				assert.Contains(t, text, `no tenant "acme"`)
			})
		})
	}
}

func TestTenantWriteChangesWhatItNames(t *testing.T) {
	e := newConfiguredEngine(t)
	e.addTenant("acme")
	token := accessTokenOf(e.lease("acme"))
	e.write("tenants/acme", map[string]any{"ttl": "1h", "max_ttl": "2h"})
	e.write("tenants/acme", map[string]any{"min_ttl": 60})
	got := e.read("tenants/acme")
	assert.Equal(t, []any{int64(3600), int64(7200), int64(60)}, []any{got["ttl"], got["max_ttl"], got["min_ttl"]})
	assert.Equal(t, token, accessTokenOf(e.lease("acme")), "a write of settings makes no exchange")

	e.ok(logical.PatchOperation, "tenants/acme", map[string]any{"ttl": nil, "min_ttl": nil})
	got = e.read("tenants/acme")
	assert.Equal(t, []any{int64(0), int64(7200), int64(900)}, []any{got["ttl"], got["max_ttl"], got["min_ttl"]})
	_, status, _ := e.try(logical.PatchOperation, "tenants/none", map[string]any{"ttl": 60})
	assert.Equal(t, 404, status)

	e.write("tenants/acme", map[string]any{"connector": "default", "verify": false})
	assert.NotEqual(t, token, accessTokenOf(e.lease("acme")), "writing connector gives the access token up")
}

func TestRefreshRetiresTheAccessToken(t *testing.T) {
	e := newConfiguredEngine(t)
	e.addTenant("acme")
	old := accessTokenOf(e.lease("acme"))
	e.write("tenants/acme/refresh", nil)
	assert.NotEqual(t, old, accessTokenOf(e.lease("acme")))
	assert.Equal(t, 2, e.kaizala.CallCount())
	_, status, _ := e.try(logical.UpdateOperation, "tenants/none/refresh", nil)
	assert.Equal(t, 404, status)
}

func TestDeletedTenantIsGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		lease := e.lease("acme")
		for range 2 {
			_, status, _ := e.try(logical.DeleteOperation, "tenants/acme", nil)
			assert.Equal(t, 204, status)
		}
		_, status, _ := e.try(logical.ReadOperation, "creds/acme", nil)
		assert.Equal(t, 400, status)
		require.NoError(t, e.revokeLease(lease))
		assert.Nil(t, e.stored("acme"))
		synctest.Wait() // until the index is built
		assert.Empty(t, e.tenants.byName)
		assert.False(t, e.tenants.loaded.Contains("acme"))
	})
}

func TestTenantsAreListedWithTheirState(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		_, status, _ := e.try(logical.ListOperation, "tenants/", nil)
		assert.Equal(t, 404, status)
		e.addTenant("a")
		e.write("tenants/b", map[string]any{"refresh_token": "opaque", "verify": false})
		e.read("creds/a")
		e.restart()
		list := e.ok(logical.ListOperation, "tenants/", nil)
		assert.Equal(t, []string{"a", "b"}, list.Data["keys"])
		assert.Equal(t, map[string]any{
			"a": map[string]any{"status": "ok", "connector": "default", "refresh_token_expire_time": e.read("tenants/a")["refresh_token_expire_time"]},
			"b": map[string]any{"status": "unverified", "connector": "default"},
		}, list.Data["key_info"])
	})
}

func TestBadTenantsAreRefusedBeforeAnyCall(t *testing.T) {
	e := newConfiguredEngine(t)
	good := e.newToken("acme")
	otherID, _ := e.kaizala.RegisterConnector()
	tests := []struct {
		name  string
		value any
		says  string
	}{
		{"refresh_token", "", "refresh_token is empty"},
		{"refresh_token", " \n", "refresh_token is empty"},
		{"refresh_token", nil, "refresh_token is empty"},
		{"refresh_token", "CANARY\r\nX: y", "refresh_token does not fit"},
		{"refresh_token", "CANARY" + strings.Repeat("x", 16<<10), "refresh_token does not fit"},
		{"refresh_token", `"CANARY"`, "the token stands in quotes; write it without the quotes"},
		{"refresh_token", "bearer CANARY", "the token has the word Bearer before it; write it without Bearer"},
		{"refresh_token", []any{"CANARY"}, "refresh_token must be given once, as a string"},
		{"refresh_token", map[string]any{"CANARY": "x"}, "refresh_token must be given once, as a string"},
		{"refresh_token", 5, "refresh_token must be given once, as a string"},
		{"refresh_token", e.kaizala.GenerateUserToken(otherID, "acme"), "another connector"},
		{"connector", "", "connector is empty"},
		{"connector", "none", `connector "none" is not configured`},
		{"ttl", "-1s", "ttl"},
		{"ttl", "0.5s", "whole seconds"},
		{"ttl", 1.5, "whole seconds"}, // a number, as JSON has it
		{"ttl", "", "ttl"},
		{"ttl", "CANARY", "ttl"},
		{"ttl", "99999999999h", "ttl"},
		{"max_ttl", []any{1}, "max_ttl"},
		{"min_ttl", true, "min_ttl"},
		{"verify", "maybe", "verify"},
		{"verify", "", "verify"},
	}
	for _, test := range tests {
		t.Run(fmt.Sprintf("%s=%.20v", test.name, test.value), func(t *testing.T) {
			_, status, text := e.try(logical.UpdateOperation, "tenants/acme", with(map[string]any{"refresh_token": good}, test.name, test.value))
			assert.Equal(t, 400, status, text)
			assert.Contains(t, text, test.says)
			assert.NotContains(t, text, "CANARY")
		})
	}
	_, status, text := e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": good, "ttl": "2h", "max_ttl": "1h"})
	assert.Equal(t, 400, status)
	assert.Contains(t, text, "ttl is over max_ttl")
	_, status, text = e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"ttl": "2h"})
	assert.Equal(t, 400, status)
	assert.Contains(t, text, "refresh_token is required")
	e.write("tenants/"+strings.Repeat("x", 128), map[string]any{"refresh_token": good, "verify": false})
	_, status, text = e.try(logical.UpdateOperation, "tenants/"+strings.Repeat("x", 129), map[string]any{"refresh_token": good})
	assert.Equal(t, 400, status)
	assert.Contains(t, text, "128 characters")
	assert.Zero(t, e.kaizala.CallCount())
	assert.Nil(t, e.stored("acme"))
}

func TestExpiredRefreshTokenIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		token := e.newToken("acme")
		time.Sleep(366 * 24 * time.Hour)
		_, status, text := e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": token})
		assert.Equal(t, 400, status)
		assert.Contains(t, text, "the token expired at")
		assert.Zero(t, e.kaizala.CallCount())
	})
}

func TestTenantBeforeAnyConnector(t *testing.T) {
	e := newEngine(t)
	_, status, text := e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": "x"})
	assert.Equal(t, 400, status)
	assert.Contains(t, text, `connector "default" is not configured: its owner (for Kaizala) or the Vault operator (for an OAuth 2.0 service) has to write config first`)
}

func TestReaderMayOnlyRaiseMinTTL(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		first := accessTokenOf(e.lease("acme"))
		for path, min := range map[string]string{"creds/acme": "1s", "token/acme": "12h"} {
			got := e.ok(logical.ReadOperation, path, map[string]any{"min_ttl": min})
			assert.Equal(t, first, accessTokenOf(got))
		}
		time.Sleep(13 * time.Hour)
		got := e.ok(logical.ReadOperation, "creds/acme", map[string]any{"min_ttl": "12h"})
		assert.NotEqual(t, first, accessTokenOf(got))
		calls := e.kaizala.CallCount()
		_, status, text := e.try(logical.ReadOperation, "creds/acme", map[string]any{"min_ttl": "12h1s"})
		assert.Equal(t, 400, status)
		assert.Contains(t, text, "half of an access token's life: 12h0m0s at most")
		assert.Equal(t, calls, e.kaizala.CallCount())
	})
}

func TestTokenPathSaysWhenToReadAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		first := e.read("token/acme")
		usable := 24*time.Hour - 15*time.Minute
		assert.EqualValues(t, usable.Seconds(), first["ttl"])
		assert.EqualValues(t, usable.Seconds(), first["rotation_period"])
		assert.Equal(t, time.Now().UTC().Format(time.RFC3339), first["last_vault_rotation"])
		assert.NotContains(t, first, "lease_id")

		time.Sleep(usable + time.Second)
		assert.NotEqual(t, first["access_token"], e.read("token/acme")["access_token"])
	})
}

func TestFailedWriteLeavesReadersAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		token := accessTokenOf(e.lease("acme"))
		for _, took := range []bool{false, true} { // whether storage takes the write that it reports as failed
			e.storage.failWith(func(op, key string) error {
				if op == "put" && took {
					entry := *e.stored("acme")
					entry.TTL = time.Hour
					require.NoError(t, putEntry(context.Background(), e.storage.InmemStorage, key, &entry))
				}
				return errors.New("storage fails")
			})
			_, status, _ := e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"ttl": "1h"})
			assert.Equal(t, 500, status)
			assert.Equal(t, token, accessTokenOf(e.lease("acme")))
			e.storage.heal()
			assert.Equal(t, map[bool]int64{false: 0, true: 3600}[took], e.read("tenants/acme")["ttl"], "what storage has")
			assert.Equal(t, token, accessTokenOf(e.lease("acme")))
		}
		assert.Equal(t, 1, e.kaizala.CallCount())
	})
}

func TestNewTenantInMemoryAloneIsNotUnknown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		token := e.newToken("acme")
		time.Sleep(340 * 24 * time.Hour) // its exchange returns a new one
		e.storage.failWith(func(op, key string) error {
			if op == "put" && key == "tenants/acme" {
				return errors.New("storage fails")
			}
			return nil
		})
		_, status, text := e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": token})
		assert.Equal(t, 503, status)
		assert.Contains(t, text, "nothing was lost")
		_, status, text = e.try(logical.ReadOperation, "creds/acme", nil)
		assert.Equal(t, 503, status)
		assert.Contains(t, text, "kept in memory")
		e.storage.heal()
		time.Sleep(2 * time.Minute)
		e.read("creds/acme")
		assert.Equal(t, e.kaizala.CurrentRefreshToken("acme"), e.stored("acme").RefreshToken)
	})
}

// The answer to a write warns of a setting without effect, and not of the failure of an earlier exchange.
func TestWarningsOfAWrite(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		e.add("acme", nil)
		resp := e.write("tenants/acme", map[string]any{"retire_on_revoke": false})
		require.Len(t, resp.Warnings, 1)
		assert.Contains(t, resp.Warnings[0], "retire_on_revoke=false has no effect")
		assert.Nil(t, e.write("tenants/acme", map[string]any{"ttl": "1h"}))
		assert.Nil(t, e.write("tenants/acme", map[string]any{"retire_on_revoke": true}))
		e.read("creds/acme")
		e.server.Inject(oauth2test.Fault{Answer: oauth2test.BadGateway})
		e.pass(44*time.Minute + 30*time.Second)
		require.Equal(t, statusDegraded, e.status("acme"))
		assert.Nil(t, e.write("tenants/acme", map[string]any{"ttl": "2h"}), "the failed exchange is not the write's")
		warnings := e.ok(logical.ReadOperation, "creds/acme", nil).Warnings
		require.Len(t, warnings, 1)
		assert.Contains(t, warnings[0], "this one ends at")
		resp = e.ok(logical.UpdateOperation, "tenants/acme", map[string]any{"ttl": "3h", "unknown": "x"})
		require.NotNil(t, resp)
		assert.Contains(t, resp.Warnings[0], "unknown")
	})
}

// The answer to a refresh warns if the refresh has ended an older access token, and not otherwise.
func TestWarningsOfARefresh(t *testing.T) {
	for name, c := range map[string]struct {
		kind   func(*oauth2test.Options)
		fields map[string]any
		ends   bool
	}{"ends": {oauth2test.ClassD, classD, true}, "ends none": {oauth2test.ClassB, classB, false}} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, c.kind, c.fields)
				e.add("acme", nil)
				assert.Empty(t, e.write("tenants/acme/refresh", nil).Warnings, "there was no access token")
				assert.Equal(t, c.ends, len(e.write("tenants/acme/refresh", nil).Warnings) == 1)
				e.lease("acme")
				e.write("tenants/acme/refresh", nil)
				assert.Nil(t, e.write("tenants/acme", map[string]any{"ttl": "1h"}), "the refresh, and not the write, ended the access token")
			})
		})
	}
}

// Leases on an access token end two seconds before its planned exchange: a refresh before that cuts them short, and reads of the tenant
// say so; a refresh in the last two seconds does not.
func TestRefreshJustBeforeThePlannedExchange(t *testing.T) {
	for before, cut := range map[time.Duration]bool{leaseMargin + time.Millisecond: true, leaseMargin - time.Millisecond: false} {
		bubble(t, func(t *testing.T) {
			e := newOAuthEngine(t, oauth2test.ClassD, classD)
			e.add("acme", nil)
			e.lease("acme")
			time.Sleep(time.Until(e.stored("acme").Access.Planned) - before)
			e.write("tenants/acme/refresh", nil)
			assert.Equal(t, cut, slices.Contains(e.ok(logical.ReadOperation, "tenants/acme", nil).Warnings, cutShortText), before)
			assert.Equal(t, 2, e.server.Exchanges("acme"))
		})
	}
}

// A write of another refresh token clears the rejection, the last error and the move of the one before.
func TestWriteBeginsAnew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		e.read("creds/acme")
		entry := *e.stored("acme")
		entry.Move, entry.Rejected = &move{From: "https://a.example", To: "https://b.example"}, time.Now().UTC()
		require.NoError(t, putEntry(t.Context(), e.storage.InmemStorage, tenantPrefix+"acme", &entry))
		e.restart()
		rejected := e.read("tenants/acme")
		assert.Equal(t, statusRejected, rejected["status"])
		assert.Contains(t, rejected["last_error"], "refuses the refresh token")
		assert.Equal(t, stamp(entry.Rejected), rejected["last_error_time"])
		e.addTenant("acme")
		after := e.read("tenants/acme")
		assert.Equal(t, statusUnverified, after["status"])
		assert.NotContains(t, after, "last_error")
		assert.NotContains(t, after, "last_exchange_time")
		assert.Nil(t, e.stored("acme").Move)
	})
}

// Requests about a tenant that does not exist, whose connector does not exist, or that storage fails to read.
func TestRequestsAboutNoTenant(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassA, classA)
		for _, c := range []struct {
			op     logical.Operation
			data   map[string]any
			status int
			says   string
		}{
			{logical.PatchOperation, map[string]any{"refresh_token": e.server.Grant(e.clientID, "none")}, 404, "to patch"},
			{logical.PatchOperation, map[string]any{"token_per_lease": true}, 404, "to patch"},
			{logical.UpdateOperation, map[string]any{"token_per_lease": true}, 400, "refresh_token is required"},
			{logical.UpdateOperation, map[string]any{"connector": "default"}, 400, "refresh_token is required"},
		} {
			_, status, text := e.try(c.op, "tenants/none", c.data)
			assert.Equal(t, c.status, status)
			assert.Contains(t, text, c.says)
		}
		assert.Nil(t, e.stored("none"))
		assert.Empty(t, e.server.Calls())
		e.add("acme", nil)
		require.NoError(t, e.storage.InmemStorage.Delete(t.Context(), connectorPrefix+defaultConnector))
		e.InvalidateKey(t.Context(), connectorPrefix+defaultConnector)
		_, status, text := e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"token_per_lease": true})
		assert.Equal(t, 400, status)
		assert.Contains(t, text, "is not configured")
		e.restart()
		e.waitForIndex()
		e.storage.refuse("get", tenantPrefix)
		_, _, err := e.HandleExistenceCheck(t.Context(), &logical.Request{Operation: logical.CreateOperation, Path: "tenants/acme", Storage: e.storage})
		require.Error(t, err, "storage fails, so it is unknown whether the tenant exists")
		e.storage.refuse("list", tenantPrefix)
		_, status, _ = e.try(logical.ListOperation, "tenants/", nil)
		assert.Equal(t, 500, status)
	})
}

// A connector whose token_endpoint_auth_method is none needs no connector_secret.
func TestOAuthPublicClient(t *testing.T) {
	e := newOAuthEngine(t, oauth2test.ClassA, map[string]any{"token_endpoint_auth_method": oauth2test.AuthNone, "connector_secret": nil})
	via, err := e.connectors.of(t.Context(), defaultConnector)
	require.NoError(t, err)
	assert.NoError(t, via.incomplete)
}

// ttl may be equal to max_ttl.
func TestTTLUpToMaxTTL(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.addTenant("acme")
		e.write("tenants/acme", map[string]any{"ttl": "1h", "max_ttl": "1h"})
		assert.EqualValues(t, 3600, e.read("tenants/acme")["ttl"])
	})
}
