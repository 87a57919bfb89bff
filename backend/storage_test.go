package backend

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/share"
)

// entriesOfFormat are the entries that an engine of that format has written, by
// key. The files are never changed: each later engine has to read them. Their times
// are those of a synctest bubble, which begins in the year 2000.
func entriesOfFormat(t *testing.T, format int) map[string][]byte {
	t.Helper()
	entries := map[string][]byte{}
	root := filepath.Join("testdata", fmt.Sprintf("format-%d", format))
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		key, err := filepath.Rel(root, strings.TrimSuffix(path, ".json"))
		if err != nil {
			return err
		}
		entries[filepath.ToSlash(key)], err = os.ReadFile(path)
		return err
	})
	require.NoError(t, err)
	return entries
}

// put stores an entry directly, as a start of the engine finds it.
func (e *engine) put(key string, value []byte) {
	e.t.Helper()
	require.NoError(e.t, e.storage.InmemStorage.Put(context.Background(), &logical.StorageEntry{Key: key, Value: value}))
}

func (e *engine) get(key string) string {
	e.t.Helper()
	entry, err := e.storage.InmemStorage.Get(context.Background(), key)
	require.NoError(e.t, err)
	if entry == nil {
		return ""
	}
	return string(entry.Value)
}

func TestEveryFormatLoads(t *testing.T) {
	for format := 1; format <= entryFormat; format++ {
		t.Run(fmt.Sprintf("format %d", format), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newEngine(t)
				server := oauth2test.New()
				e.wire = func() http.RoundTripper {
					return byHost{"as.example": server.Transport(), "": e.kaizala.Transport()}
				}
				for key, value := range entriesOfFormat(t, format) {
					e.put(key, value)
				}
				e.restart()

				states := map[string]string{}
				for name := range e.ok(logical.ListOperation, "tenants/", nil).Data["key_info"].(map[string]any) {
					states[name] = e.status(name)
				}
				want := map[string]string{
					"user": statusOK, "group": statusOK, "revoked": statusOK, "rejected": statusRejected,
					"unverified": statusUnverified, "opaque": statusUnverified,
				}
				if format >= 2 {
					want["planned"], want["ending"], want["own"] = statusOK, statusOK, statusOK
					checkOAuthFixtures(t, e)
				}
				assert.Equal(t, want, states)
				assert.Equal(t, "AB12CD34EF", must(e.storedConnector(context.Background(), "default")).ConnectorSecret)
				assert.Equal(t, "https://kaizala.example", e.read("config/hr")["api_root"])
				assert.Equal(t, "hr", e.read("tenants/opaque")["connector"])
				assert.Equal(t, "6c3e3a36-07a5-4b45-a5a9-3ae1b8aeff4b", e.read("tenants/group")["group_id"])
				assert.Equal(t, originService, e.read("tenants/group")["refresh_token_origin"])

				lease := e.lease("user")
				assert.Equal(t, "access-token-of-user", accessTokenOf(lease))
				assert.Equal(t, time.Hour, lease.Secret.TTL)
				assert.Equal(t, 8*time.Hour, lease.Secret.MaxTTL)
				assert.Equal(t, "access-token-of-group", e.read("token/group")["access_token"])
				_, status, text := e.try(logical.ReadOperation, "creds/user", map[string]any{"min_ttl": "13h"})
				assert.Equal(t, 400, status, "an access token's life is known: %s", text)
				hr := must(e.connectors.get(context.Background(), "hr"))
				assert.Equal(t, time.Date(2000, 1, 1, 0, 10, 0, 0, time.UTC), hr.share.PausedUntil().UTC())
				opaque := share.Want{Tenant: "opaque"}
				assert.True(t, hr.share.FreeAt(opaque).After(time.Now()), "its stored calls count")
				assert.NotNil(t, must(e.connectors.get(context.Background(), "refused")).refusal.Load())
				assert.Zero(t, e.kaizala.CallCount())

				// A write of one setting keeps the other settings, and stores the entry in the present format.
				e.write("tenants/user", map[string]any{"min_ttl": "20m"})
				after := e.stored("user")
				assert.Equal(t, entryFormat, after.Format)
				assert.Equal(t, "refresh-token-of-user", after.RefreshToken)
				assert.Equal(t, "access-token-of-user", after.Access.Token)
				e.write("config/hr", map[string]any{"request_timeout": "30s"})
				assert.Equal(t, entryFormat, must(e.storedConnector(context.Background(), "hr")).Format)
				assert.NotEmpty(t, e.read("config/hr")["ca_cert"])
				if format >= 2 {
					checkAttemptFixtures(t, e, server)
				}
			})
		})
	}
}

func must[T any](value T, err error) T {
	if err != nil {
		panic(err)
	}
	return value
}

// checkOAuthFixtures checks the OAuth 2.0 entries that version 0.2.0 has stored.
func checkOAuthFixtures(t *testing.T, e *engine) {
	synctest.Wait()
	as := e.read("config/as")
	assert.Equal(t, "https://as.example/written/token", as["token_url"])
	assert.Equal(t, "client_secret_post", as["token_endpoint_auth_method"])
	assert.EqualValues(t, 2, as["pending_revocations"])
	e.ok(logical.PatchOperation, "config/as", map[string]any{"token_url": nil})
	assert.Equal(t, "https://as.example/found/token", e.read("config/as")["token_url"])
	planned := e.read("tenants/planned")
	assert.Equal(t, "token-ada", planned["granted_by"])
	assert.Equal(t, "ada@example.com", planned["subject"])
	assert.Equal(t, 11*time.Hour-leaseMargin, e.lease("planned").Secret.MaxTTL)
	assert.Equal(t, "access-token-of-own", e.read("token/own")["access_token"])
	assert.EqualValues(t, 1, e.read("tenants/own")["pending_revocations"], "the token for one lease has its record")
	require.NoError(t, e.revokeLease(&logical.Response{Secret: &logical.Secret{
		LeaseOptions: logical.LeaseOptions{TTL: time.Hour, IssueTime: time.Now()},
		InternalData: map[string]any{"secret_type": accessTokenType, "tenant": "own", "generation": "GENERATIONOFUNLEASED", "expires": "2000-01-01T12:00:00Z", "own": "true"},
	}}))
	assert.EqualValues(t, 2, e.read("tenants/own")["pending_revocations"])
}

// checkAttemptFixtures goes on with the attempts that version 0.2.0 has stored: each of the three flows ends as in that version.
func checkAttemptFixtures(t *testing.T, e *engine, server *oauth2test.Server) {
	as := &grantEngine{engine: e, server: server}
	status := func(path string) string { return e.read("tenants/" + path)["status"].(string) }
	assert.Equal(t, attemptPending, status("browsed/authorize"))
	assert.Equal(t, attemptDenied, status("browsed/device"))
	assert.Equal(t, attemptPending, status("polled/device"))
	assert.Equal(t, map[string]any{"status": attemptFailed, "expire_time": "2000-01-01T00:10:00Z", "last_error": "The service refuses."}, e.read("tenants/polled/authorize"))
	_, code, _ := as.ask(logical.ReadOperation, "tenants/phoned/authorize", nil)
	assert.Equal(t, 404, code)

	// The services of this test do not know these attempts. The test checks that the engine calls each of them.
	server.SetURL("https://as.example")
	e.write("config/as", map[string]any{"token_url": server.TokenURL()})
	time.Sleep(time.Minute)
	assert.NotEmpty(t, as.polls())
	used := as.visit(logical.ReadOperation, "callback", map[string]any{"state": strings.Repeat("u", 43), "code": "code"})
	assert.Contains(t, used.text(), "has been used")
	e.write("config/as", map[string]any{"connector_secret": "another"}) // the service has refused the one before
	all, err := getEntry[attempts](t.Context(), e.storage, attemptKeys+"browsed")
	require.NoError(t, err)
	confirmed := as.visit(logical.UpdateOperation, "callback/as", map[string]any{"state": strings.Repeat("s", 43), "page": "1", "confirmation": hashOf(all.Last[byCode].Code)})
	assert.Contains(t, confirmed.text(), "Started by token-ada")
	assert.Equal(t, 1, as.sent(codeGrant))
	assert.Equal(t, attemptFailed, status("browsed/authorize"))
	_, code, _ = as.ask(logical.UpdateOperation, "tenants/phoned/pin", map[string]any{"pin": "123456"})
	assert.Equal(t, 400, code)
	assert.Equal(t, 1, e.pinCalls(redeemPINPath))
}

// storedFields lists the fields of an entry's JSON form, those of entries in it by their path.
func storedFields(in string, of reflect.Type) (fields []string) {
	for of.Kind() == reflect.Pointer {
		of = of.Elem()
	}
	if of.Kind() != reflect.Struct || of == reflect.TypeFor[time.Time]() {
		return nil
	}
	for i := range of.NumField() {
		name, _, _ := strings.Cut(of.Field(i).Tag.Get("json"), ",")
		if name != "" {
			fields = append(append(fields, in+name), storedFields(in+name+".", of.Field(i).Type)...)
		}
	}
	return fields
}

func seenFields(in string, value any, seen map[string]bool) {
	of, _ := value.(map[string]any)
	for name, value := range of {
		seen[in+name] = true
		seenFields(in+name+".", value, seen)
	}
}

// Reading and writing an entry of the present format does not change it. So a change
// that renames a field, or changes its meaning, needs a new format.
func TestTodaysFormatIsWhatTheFixturesHold(t *testing.T) {
	seen := map[string]bool{}
	roundTrip := func(key string, value []byte, entry any) {
		decoder := json.NewDecoder(bytes.NewReader(value))
		decoder.DisallowUnknownFields()
		require.NoError(t, decoder.Decode(entry), key)
		again, err := json.Marshal(entry)
		require.NoError(t, err)
		assert.JSONEq(t, string(value), string(again), key)
		fields := map[string]any{}
		require.NoError(t, json.Unmarshal(again, &fields))
		seenFields(strings.Split(key, "/")[0]+" ", fields, seen)
		if c, ok := entry.(*connectorEntry); ok {
			seenFields(c.Service+" ", fields["settings"], seen)
		}
	}
	for key, value := range entriesOfFormat(t, entryFormat) {
		switch {
		case strings.HasPrefix(key, connectorPrefix):
			roundTrip(key, value, &connectorEntry{})
		case strings.HasPrefix(key, callPrefix):
			roundTrip(key, value, &map[string]any{}) // package share tests these entries
		case strings.HasPrefix(key, heldPrefix):
			roundTrip(key, value, &held{})
		case strings.HasPrefix(key, intentPrefix):
			roundTrip(key, value, &intent{})
		case strings.HasPrefix(key, stateKeys):
			roundTrip(key, value, &stateEntry{})
		case strings.HasPrefix(key, attemptKeys):
			all := &attempts{}
			roundTrip(key, value, all)
			for _, a := range all.Last {
				raw, err := json.Marshal(a)
				require.NoError(t, err)
				fields := map[string]any{}
				require.NoError(t, json.Unmarshal(raw, &fields))
				seenFields("attempt ", fields, seen)
			}
		default:
			roundTrip(key, value, &tenantEntry{})
		}
	}
	every := slices.Concat(
		storedFields("config ", reflect.TypeFor[connectorEntry]()), storedFields("tenants ", reflect.TypeFor[tenantEntry]()),
		storedFields("held ", reflect.TypeFor[held]()), storedFields("revocations ", reflect.TypeFor[intent]()),
		storedFields("attempts ", reflect.TypeFor[attempts]()), storedFields("attempts ", reflect.TypeFor[stateEntry]()), storedFields("attempt ", reflect.TypeFor[attempt]()),
	)
	for name, kind := range serviceKinds {
		every = append(every, storedFields(name+" ", reflect.TypeOf(kind.settings()))...)
	}
	for _, field := range every {
		known := strings.HasPrefix(field, "tenants unleased.") || seen[field]
		assert.True(t, known, "the fixtures hold every field: %s", field)
	}
	assert.Greater(t, len(every), 110)
}

// damage are stored entries that the engine cannot read.
var damage = map[string]struct{ connector, tenant, says string }{
	"newer format": {
		`{"format": NEWER, "connector_id": {"was": "a string"}}`,
		`{"format": NEWER, "refresh_token": ["were", "one"]}`, "upgrade the plugin",
	},
	"newer format that looks the same": {
		`{"format": NEWER, "connector_id": "i", "connector_secret": "SECRETTEXT", "api_root": "https://api.kaiza.la"}`,
		`{"format": NEWER, "connector": "default", "refresh_token": "SECRETTEXT"}`, "upgrade the plugin",
	},
	"no JSON":    {`SECRETTEXT`, `{"refresh_token": "SECRETTEXT`, "delete it"},
	"wrong type": {`{"format": 1, "connector_secret": 1, "connector_id": "SECRETTEXT"}`, `{"format": 1, "ttl": "SECRETTEXT"}`, "delete it"},
}

func TestUnreadableEntries(t *testing.T) {
	for name, damaged := range damage {
		t.Run(name, func(t *testing.T) {
			e := newConfiguredEngine(t)
			e.addTenant("acme")
			e.addTenant("well")
			lease := e.lease("acme")
			newer := strings.NewReplacer("NEWER", fmt.Sprint(entryFormat+1))
			damaged.tenant, damaged.connector = newer.Replace(damaged.tenant), newer.Replace(damaged.connector)
			e.put("tenants/acme", []byte(damaged.tenant))
			e.put("config/hr", []byte(damaged.connector))
			e.put("calls/default/0", []byte(damaged.tenant))
			e.put("calls/default/pause", []byte(damaged.tenant))
			e.restart()

			for _, try := range []struct {
				op   logical.Operation
				path string
				data map[string]any
			}{
				{logical.ReadOperation, "tenants/acme", nil},
				{logical.ReadOperation, "creds/acme", nil},
				{logical.ReadOperation, "token/acme", nil},
				{logical.UpdateOperation, "tenants/acme", map[string]any{"ttl": "1h"}},
				{logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": e.newToken("acme")}},
				{logical.PatchOperation, "tenants/acme", map[string]any{"ttl": "1h"}},
				{logical.UpdateOperation, "tenants/acme/refresh", nil},
				{logical.ReadOperation, "config/hr", nil},
				{logical.UpdateOperation, "config/hr", map[string]any{"connector_id": "i", "connector_secret": "s"}},
				{logical.PatchOperation, "config/hr", map[string]any{"request_timeout": "9s"}},
				{logical.UpdateOperation, "tenants/new", map[string]any{"refresh_token": e.newToken("new"), "connector": "hr"}},
			} {
				// Vault does not show the error of an existence check, so the request itself has to return it.
				req := &logical.Request{Operation: try.op, Path: try.path, Data: try.data, Storage: e.storage}
				if try.op == logical.UpdateOperation {
					_, _, err := e.HandleExistenceCheck(context.Background(), req)
					require.NoError(t, err, try.path)
				}
				resp, err := e.HandleRequest(context.Background(), req)
				_, text := statusOf(try.op, resp, err)
				assert.Contains(t, text, damaged.says, "%s %s", try.op, try.path)
				assert.NotContains(t, text, "SECRETTEXT")
			}
			assert.Equal(t, damaged.tenant, e.get("tenants/acme"), "the entry is not changed")
			assert.Equal(t, damaged.connector, e.get("config/hr"), "the entry is not changed")

			e.read("creds/well")
			listed := e.ok(logical.ListOperation, "tenants/", nil)
			assert.Equal(t, []string{"acme", "well"}, listed.Data["keys"])
			assert.NotContains(t, listed.Data["key_info"], "acme")
			assert.Contains(t, listed.Warnings[0], "key_info of 1 tenants is missing")
			assert.Equal(t, 1, e.log.count(damaged.says), "the log says why")
			assert.NotContains(t, e.log.String(), "SECRETTEXT")
			require.NoError(t, e.revokeLease(lease), "the lease can be revoked")
			assert.Equal(t, damaged.tenant, e.get("tenants/acme"))

			e.ok(logical.DeleteOperation, "tenants/acme", nil)
			e.ok(logical.DeleteOperation, "config/hr", nil)
			assert.Empty(t, e.get("tenants/acme")+e.get("config/hr"))
			e.addTenant("acme")
			e.read("creds/acme")
		})
	}
}

// Storage fails to read one tenant: a LIST and a tick do not read the other tenants again because of that, and a connector without
// tenants can be deleted.
func TestOneKeyThatStorageCannotGive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEngine(t)
		e.write("config/unused", map[string]any{"connector_id": "i", "connector_secret": "s"})
		e.addTenants(20)
		e.stop()
		e.storage.failWith(func(op, key string) error {
			if op == "get" && key == "tenants/t7" {
				return errStorage
			}
			return nil
		})
		e.start()
		e.pass(time.Minute)
		synctest.Wait()
		ops := e.storage.ops.Load()
		for range 10 {
			listed := e.ok(logical.ListOperation, "tenants/", nil)
			assert.Len(t, listed.Data["keys"], 20)
			assert.Len(t, listed.Data["key_info"], 19)
			e.minute()
		}
		synctest.Wait()
		assert.LessOrEqual(t, e.storage.ops.Load()-ops, int64(30), "a LIST, a read of the one tenant, and no more")
		e.ok(logical.DeleteOperation, "config/unused", nil)
		e.storage.heal()
		e.minute()
		synctest.Wait()
		assert.Len(t, e.ok(logical.ListOperation, "tenants/", nil).Data["key_info"], 20)
	})
}

func TestLock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var l lock
		assert.False(t, l.busy())
		require.NoError(t, l.acquire(t.Context()))
		assert.True(t, l.busy())
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		require.ErrorIs(t, l.acquire(ctx), context.DeadlineExceeded)
		assert.True(t, l.busy(), "a caller whose wait ends does not take the lock from its holder")
		l.release()
		assert.False(t, l.busy())
		assert.Nil(t, l.held)
	})
}

// A tenant is expired from the second in which its refresh token ends, unless that end is only assumed.
func TestStatusAtTheEnd(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	s := tenantSummary{stored: true, verified: true, expires: now.Unix()}
	assert.Equal(t, statusOK, s.status(now.Add(-time.Second), nil))
	assert.Equal(t, statusExpired, s.status(now, nil))
	s.assumed = true
	assert.Equal(t, statusOK, s.status(now, nil))
}

// Storage fails to list or read the tenants at the start. The engine does not take that for a mount without tenants: the connector is not
// deleted, and the next tick builds the index.
func TestStartWhileStorageGivesNothing(t *testing.T) {
	for name, fails := range map[string]func(op, key string) bool{
		"the list":   func(op, key string) bool { return op == "list" && key == tenantPrefix },
		"each entry": func(op, key string) bool { return op == "get" && strings.HasPrefix(key, tenantPrefix) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newConfiguredEngine(t)
				e.addTenants(3)
				e.stop()
				e.storage.failWith(func(op, key string) error {
					if fails(op, key) {
						return errStorage
					}
					return nil
				})
				e.start()
				synctest.Wait()
				_, status, _ := e.try(logical.DeleteOperation, "config/default", nil)
				assert.Equal(t, http.StatusServiceUnavailable, status)
				e.storage.heal()
				e.minute()
				synctest.Wait()
				assert.Len(t, e.ok(logical.ListOperation, "tenants/", nil).Data["key_info"], 3)
				_, status, _ = e.try(logical.DeleteOperation, "config/default", nil)
				assert.Equal(t, http.StatusBadRequest, status)
			})
		})
	}
}
