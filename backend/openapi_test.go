package backend

import (
	"cmp"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/helper/testhelpers/schema"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/kaizala/kaizalatest"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

//go:generate go test -count=1 -run ^TestGenerated . -update

var update = flag.Bool("update", false, "write the files that are generated from the engine's own definitions")

// isCurrent checks that a generated file has this content.
func isCurrent(t *testing.T, file, want string) {
	t.Helper()
	if *update {
		require.NoError(t, os.WriteFile(file, []byte(want), 0o644))
		return
	}
	have, err := os.ReadFile(file)
	require.NoError(t, err, "run make generate")
	assert.Equal(t, want, string(have), "%s is stale: run make generate", file)
}

// openAPI is the OpenAPI document of the engine, from before Vault drops its
// references.
func openAPI(t *testing.T) *framework.OASDocument {
	t.Helper()
	b, err := newBackend(context.Background(), &logical.BackendConfig{
		StorageView: &logical.InmemStorage{},
		System:      &logical.StaticSystemView{PluginEnvironment: &logical.PluginEnvironment{VaultVersion: "any"}},
	}, "v0.0.0", nil, newServiceWork())
	require.NoError(t, err)
	resp, err := b.HandleRequest(context.Background(), &logical.Request{Operation: logical.HelpOperation})
	require.NoError(t, err)
	return resp.Data["openapi"].(*framework.OASDocument)
}

func TestGeneratedOpenAPI(t *testing.T) {
	text, err := json.MarshalIndent(openAPI(t), "", "  ")
	require.NoError(t, err)
	isCurrent(t, filepath.Join("testdata", "openapi.json"), string(text)+"\n")
}

func TestOperationIDsAreUnique(t *testing.T) {
	doc := openAPI(t)
	seen := map[string]string{}
	for path, item := range doc.Paths {
		assert.NotEmpty(t, item.Description, path)
		for method, op := range map[string]*framework.OASOperation{"GET": item.Get, "POST": item.Post, "PATCH": item.Patch, "DELETE": item.Delete} {
			if op == nil {
				continue
			}
			assert.Empty(t, seen[op.OperationID], "%s is also %s %s", op.OperationID, method, path)
			assert.Regexp(t, `^kaizala-[a-z]+-[a-z-]+$`, op.OperationID)
			seen[op.OperationID] = method + " " + path
		}
	}
	operations := 0
	for _, p := range newEngine(t).Paths {
		for op := range p.Operations {
			if op != logical.CreateOperation {
				operations++ // OpenAPI has one operation for both kinds of write
			}
		}
	}
	assert.Len(t, seen, operations, "the document has every operation")
}

func TestEverythingIsDocumented(t *testing.T) {
	for _, path := range newEngine(t).Paths {
		for _, problem := range undocumented(path) {
			t.Errorf("%s: %s", path.Pattern, problem)
		}
	}
}

// undocumented lists what is missing in vault path-help and in the OpenAPI document
// of a path.
func undocumented(path *framework.Path) (problems []string) {
	want := func(ok bool, format string, args ...any) {
		if !ok {
			problems = append(problems, fmt.Sprintf(format, args...))
		}
	}
	sentence := func(what, text string) {
		text = strings.TrimSpace(text)
		want(len(text) > 10 && strings.ContainsAny(text[len(text)-1:], ".?"), "%s is no sentence: %q", what, text)
	}
	fields := func(where string, all map[string]*framework.FieldSchema, answer bool) {
		for name, field := range all {
			sentence(where+" "+name, field.Description)
			secret := slices.Contains([]string{"access_token", "refresh_token", "connector_secret", "state", "code", "confirmation", "pin", "mobile_number"}, name)
			want(isSecret(field) == secret, "%s %s: sensitive is %t", where, name, isSecret(field))
			want(!answer || !secret || name == "access_token", "%s gives %s away", where, name)
		}
	}
	want(path.DisplayAttrs != nil && path.DisplayAttrs.OperationPrefix == operationPrefix, "no operation prefix")
	sentence("the synopsis", path.HelpSynopsis)
	sentence("the description", path.HelpDescription)
	want(strings.TrimSpace(path.HelpDescription) != strings.TrimSpace(path.HelpSynopsis), "the description only repeats the synopsis")
	fields("field", path.Fields, false)
	want(len(path.Operations) > 0, "no operations")
	for kind, handler := range path.Operations {
		op := handler.Properties()
		sentence(string(kind)+"'s summary", op.Summary)
		sentence(string(kind)+"'s description", op.Description)
		want(op.DisplayAttrs != nil && op.DisplayAttrs.OperationVerb != "" && op.DisplayAttrs.OperationSuffix != "", "%s has no verb or no suffix", kind)
		want(len(op.Responses) == 1, "%s has %d responses", kind, len(op.Responses))
		for status, responses := range op.Responses {
			want(len(responses) == 1, "%s: %d has %d forms", kind, status, len(responses))
			for _, response := range responses {
				sentence(fmt.Sprintf("%s's %d", kind, status), response.Description)
				page := response.MediaType == "text/html"
				want((status == http.StatusOK && !page) == (len(response.Fields) > 0), "%s: %d has %d fields", kind, status, len(response.Fields))
				fields(fmt.Sprintf("%s's answer", kind), response.Fields, true)
			}
		}
	}
	return problems
}

func TestWhatIsNotDocumentedIsNoticed(t *testing.T) {
	mutations := map[string]func(*framework.Path, *framework.PathOperation){
		"summary":             func(_ *framework.Path, op *framework.PathOperation) { op.Summary = "" },
		"description":         func(_ *framework.Path, op *framework.PathOperation) { op.Description = "" },
		"verb":                func(_ *framework.Path, op *framework.PathOperation) { op.DisplayAttrs.OperationVerb = "" },
		"operation's display": func(_ *framework.Path, op *framework.PathOperation) { op.DisplayAttrs = nil },
		"responses":           func(_ *framework.Path, op *framework.PathOperation) { op.Responses = nil },
		"typed responses":     func(_ *framework.Path, op *framework.PathOperation) { op.Responses[200][0].Fields = nil },
		"sensitive field": func(_ *framework.Path, op *framework.PathOperation) {
			op.Responses[200][0].Fields["access_token"] = str("A token, to see.")
		},
		"synopsis":            func(p *framework.Path, _ *framework.PathOperation) { p.HelpSynopsis = "" },
		"help":                func(p *framework.Path, _ *framework.PathOperation) { p.HelpDescription = "" },
		"prefix":              func(p *framework.Path, _ *framework.PathOperation) { p.DisplayAttrs = nil },
		"field's description": func(p *framework.Path, _ *framework.PathOperation) { p.Fields["tenant"] = str("") },
		"secret in the answer": func(_ *framework.Path, op *framework.PathOperation) {
			op.Responses[200][0].Fields["refresh_token"] = tenantFields["refresh_token"]
		},
	}
	for name, mutate := range mutations {
		t.Run(name, func(t *testing.T) {
			path := newEngine(t).Route("token/acme")
			require.Empty(t, undocumented(path))
			mutate(path, path.Operations[logical.ReadOperation].(*framework.PathOperation))
			assert.NotEmpty(t, undocumented(path))
		})
	}
}

// schemaError returns how an answer differs from its schema. The SDK's own helper,
// which the tests call too, accepts "1" as a whole number, and any string where only
// some are allowed.
func schemaError(fields map[string]*framework.FieldSchema, data map[string]any) error {
	text, err := json.Marshal(data)
	if err != nil {
		return err
	}
	answer := map[string]any{}
	if err := json.Unmarshal(text, &answer); err != nil {
		return err
	}
	for name, field := range fields {
		if _, found := answer[name]; field.Required && !found {
			return fmt.Errorf("%s is missing", name)
		}
	}
	for name, value := range answer {
		field := fields[name]
		if field == nil {
			return fmt.Errorf("%s is not in the schema", name)
		}
		fits := false
		switch field.Type {
		case framework.TypeString:
			_, fits = value.(string)
		case framework.TypeTime:
			text, _ := value.(string)
			at, err := time.Parse(time.RFC3339, text)
			fits = err == nil && at.Location() == time.UTC
		case framework.TypeInt, framework.TypeInt64:
			number, isNumber := value.(float64)
			fits = isNumber && number == float64(int64(number))
		case framework.TypeStringSlice, framework.TypeCommaStringSlice:
			_, fits = value.([]any)
		case framework.TypeBool:
			_, fits = value.(bool)
		case framework.TypeMap:
			_, fits = value.(map[string]any)
		}
		if !fits {
			return fmt.Errorf("%s is no %s: %T", name, field.Type, value)
		}
		if len(field.AllowedValues) > 0 && !slices.Contains(field.AllowedValues, value) {
			return fmt.Errorf("%s is none of %v: %v", name, field.AllowedValues, value)
		}
	}
	return nil
}

func TestSchemaErrors(t *testing.T) {
	right := func() map[string]any {
		return map[string]any{
			"access_token": "t", "endpoint_url": "https://example.com", "scope": "s", "expire_time": "2031-01-02T03:04:05.678Z",
			"tenant": "acme", "ttl": int64(5), "rotation_period": int64(9), "last_vault_rotation": "2031-01-01T03:04:05Z",
		}
	}
	fields := merged(credsFields, tokenFields)
	require.NoError(t, schemaError(fields, right()))
	for name, mutate := range map[string]func(map[string]any){
		"missing":      func(d map[string]any) { delete(d, "rotation_period") },
		"extra":        func(d map[string]any) { d["refresh_token"] = "r" },
		"null":         func(d map[string]any) { d["scope"] = nil },
		"text":         func(d map[string]any) { d["ttl"] = "5" },
		"fraction":     func(d map[string]any) { d["ttl"] = 5.5 },
		"no time":      func(d map[string]any) { d["expire_time"] = "tomorrow" },
		"not in UTC":   func(d map[string]any) { d["expire_time"] = "2031-01-02T03:04:05+02:00" },
		"nothing":      func(d map[string]any) { clear(d) },
		"no such type": func(d map[string]any) { d["tenant"] = []string{"acme"} },
	} {
		t.Run(name, func(t *testing.T) {
			data := right()
			mutate(data)
			assert.Error(t, schemaError(fields, data))
		})
	}
	assert.Error(t, schemaError(map[string]*framework.FieldSchema{"status": oneOf("One.", "ok")}, map[string]any{"status": "fine"}))
}

// checkedEngine checks each answer against the schema of its operation, and notes
// the operations, fields and statuses that it has seen.
type checkedEngine struct {
	*engine
	seen map[string]bool // operations, fields and statuses
}

func (e *checkedEngine) request(op logical.Operation, path string, data map[string]any) (*logical.Response, int) {
	e.t.Helper()
	route := e.Route(path)
	require.NotNil(e.t, route, path)
	if _, exists, _ := e.HandleExistenceCheck(context.Background(), &logical.Request{Path: path, Operation: op, Storage: e.engine.storage}); op == logical.UpdateOperation && route.ExistenceCheck != nil && !exists {
		e.seen[route.Pattern+" "+string(logical.CreateOperation)] = true
	}
	resp, status, text := e.try(op, path, data)
	if status >= 300 {
		require.NotEqual(e.t, 500, status, "%s %s: %s", op, path, text)
		return resp, status
	}
	want := schema.GetResponseSchema(e.t.(*testing.T), route, op)
	schema.ValidateResponse(e.t.(*testing.T), want, resp, true)
	var got map[string]any
	if resp != nil {
		got = resp.Data
	}
	require.NoError(e.t, schemaError(want.Fields, got), "%s %s", op, path)
	operation := route.Pattern + " " + string(op)
	e.seen[operation] = true
	for field := range got {
		e.seen[operation+" "+field] = true
	}
	if status, ok := got["status"].(string); ok {
		e.seen["status "+status] = true
	}
	return resp, status
}

func (e *checkedEngine) ok(op logical.Operation, path string, data map[string]any) *logical.Response {
	e.t.Helper()
	resp, status := e.request(op, path, data)
	require.Less(e.t, status, 300, "%s %s", op, path)
	return resp
}

func TestEveryAnswerFitsItsSchema(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := &checkedEngine{newEngine(t), map[string]bool{}}
		e.kaizala.SetLimits(0, 0)
		e.connectorID, e.secret = e.kaizala.RegisterConnector()
		const (
			read, write, patch = logical.ReadOperation, logical.UpdateOperation, logical.PatchOperation
			remove, list       = logical.DeleteOperation, logical.ListOperation
		)
		for _, path := range []string{"config", "config/hr"} {
			_, status := e.request(read, path, nil)
			require.Equal(t, 404, status)
			e.ok(write, path, map[string]any{"connector_id": e.connectorID, "connector_secret": e.secret})
			e.ok(read, path, nil)
			e.ok(write, path, map[string]any{"exchanges_per_minute": 100_000, "unknown": 1})
			e.ok(patch, path, map[string]any{"redirect_hosts": []string{}, "request_timeout": "30s"})
			e.ok(read, path, nil)
		}
		e.ok(list, "config/", nil)

		group := e.kaizala.GenerateGroupToken(e.connectorID, "group", "6c3e3a36-07a5-4b45-a5a9-3ae1b8aeff4b")
		tokens := map[string]string{
			"fresh": e.newToken("fresh"), "group": group, "rejected": e.newToken("rejected"), "degraded": e.newToken("degraded"),
			"opaque": "neither a JWT nor known to Kaizala", "unverified": e.newToken("unverified"),
		}
		for name, token := range tokens {
			verify := name != "opaque" && name != "unverified"
			e.ok(write, "tenants/"+name, map[string]any{"refresh_token": token, "verify": verify})
			e.ok(read, "tenants/"+name, nil)
		}
		e.ok(patch, "tenants/fresh", map[string]any{"ttl": "1h", "min_ttl": nil})
		for range 2 {
			e.ok(read, "creds/fresh", nil)
			e.ok(read, "token/fresh", nil)
		}
		e.ok(read, "token/group", map[string]any{"min_ttl": "1h"})
		e.ok(write, "tenants/group/refresh", nil)

		e.newToken("rejected") // ends the refresh token before
		_, status := e.request(write, "tenants/rejected/refresh", nil)
		require.Equal(t, 400, status)
		e.ok(read, "tenants/rejected", nil)
		e.ok(read, "token/rejected", nil) // the access token still lives

		e.kaizala.Inject(kaizalatest.Fault{User: "degraded", Status: 500})
		_, status = e.request(write, "tenants/degraded/refresh", nil)
		require.Equal(t, 503, status)
		e.ok(read, "tenants/degraded", nil)
		require.NotEmpty(t, e.ok(read, "creds/degraded", nil).Warnings)
		e.kaizala.ClearFaults()
		for name, info := range e.ok(list, "tenants/", nil).Data["key_info"].(map[string]any) {
			fields := merged(tenantStatusFields)
			maps.DeleteFunc(fields, func(field string, _ *framework.FieldSchema) bool {
				return field != "status" && field != "connector" && (field != "refresh_token_expire_time" || name == "opaque")
			})
			require.NoError(t, schemaError(always(fields), info.(map[string]any)), name)
		}

		time.Sleep(350 * 24 * time.Hour)
		e.ok(read, "tenants/fresh", nil)
		require.Equal(t, originService, e.read("tenants/fresh")["refresh_token_origin"], "it was rotated")
		e.ok(read, "creds/fresh", nil)
		time.Sleep(30 * 24 * time.Hour)
		e.ok(read, "tenants/rejected", nil)
		e.ok(list, "tenants/", nil)

		for name := range tokens {
			e.ok(remove, "tenants/"+name, nil)
		}
		e.ok(remove, "config/hr", nil)
		e.ok(remove, "config", nil)
		e.askOAuth()

		for _, status := range []string{statusOK, statusDegraded, statusRejected, statusExpired, statusUnverified} {
			assert.True(t, e.seen["status "+status], "no tenant was %s", status)
		}
		e.wasAllTried(func(path *framework.Path, field string) bool {
			grant := strings.HasPrefix(field, "grant") || field == "subject" // see TestEveryAnswerAboutGrantsFitsItsSchema
			return grant || strings.Contains(path.Pattern, "refresh") && strings.HasPrefix(field, "last_error")
		}, slices.DeleteFunc(slices.Clone(e.Paths), isGrants))
	})
}

// askOAuth asks for what an OAuth 2.0 connector and its tenants answer, with revocations that fail.
func (e *checkedEngine) askOAuth() {
	const read, write, remove = logical.ReadOperation, logical.UpdateOperation, logical.DeleteOperation
	server := oauth2test.New()
	e.connectors.transport = server.Transport()
	id, secret := server.RegisterClient(oauth2test.AuthBasic)
	server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointRevocation, Answer: oauth2test.BadGateway})
	for _, path := range []string{"config", "config/hr"} {
		connector := cmp.Or(strings.TrimPrefix(strings.TrimPrefix(path, "config"), "/"), defaultConnector)
		e.ok(write, path, map[string]any{
			"service": "oauth2", "connector_id": id, "connector_secret": secret, "issuer": server.Issuer(),
			"revocation": "access_token", "exchange_invalidates": false, "token_params": map[string]any{"audience": "a"},
		})
		e.ok(write, "tenants/oauth", map[string]any{"refresh_token": server.Grant(id, connector), "connector": connector})
		lease := e.ok(read, "creds/oauth", nil)
		e.ok(read, "token/oauth", nil)
		lease.Secret.IssueTime, lease.Secret.TTL = time.Now(), lease.Secret.MaxTTL
		require.NoError(e.t, e.revokeLease(lease))
		e.ok(write, "tenants/oauth/refresh", nil)
		e.ok(read, "tenants/oauth", nil)
		e.ok(read, path, nil)
		e.ok(remove, "tenants/oauth", nil)
	}
	server.ClearFaults()
	e.pass(2 * time.Minute)
	e.ok(remove, "config/hr", nil)
	e.ok(remove, "config", nil)
}

// isGrants returns whether a path belongs to a flow in which a person grants access.
func isGrants(path *framework.Path) bool {
	return regexp.MustCompile(`^callback|/(authorize|device|pin)$`).MatchString(strings.Trim(path.Pattern, "^$"))
}

// wasAllTried asserts that each operation of the paths was called, and that each field was in an answer, but those for which never is
// true.
func (e *checkedEngine) wasAllTried(never func(*framework.Path, string) bool, paths []*framework.Path) {
	e.t.Helper()
	for _, path := range paths {
		for op, handler := range path.Operations {
			operation := path.Pattern + " " + string(op)
			assert.True(e.t, e.seen[operation], "%s was not tried", operation)
			for _, response := range handler.Properties().Responses[http.StatusOK] {
				for field := range response.Fields {
					assert.True(e.t, e.seen[operation+" "+field] != never(path, field), "%s was answered with %s: %t", operation, field, never(path, field))
				}
			}
		}
	}
}

func TestEveryAnswerAboutGrantsFitsItsSchema(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGrantEngine(t)
		e := &checkedEngine{g.engine, map[string]bool{}}
		const read, write = logical.ReadOperation, logical.UpdateOperation
		as := func(more ...string) map[string]any {
			data := map[string]any{"connector": "as"}
			for _, name := range more {
				data[name] = nil
			}
			return data
		}
		attempts := []string{"tenants/acme/authorize", "tenants/acme/device"}
		for _, path := range attempts {
			_, status := e.request(read, path, nil)
			require.Equal(t, 404, status)
			e.ok(write, path, as("unknown"))
			e.ok(read, path, nil)
		}
		for _, path := range attempts {
			time.Sleep(11 * time.Minute)
			e.ok(read, path, nil) // superseded, expired
		}
		back := func(more map[string]any) map[string]any {
			data := g.allowed(e.ok(write, "tenants/acme/authorize", as()).Data["authorization_url"].(string))
			maps.Copy(data, more)
			return data
		}
		wrong := back(map[string]any{"iss": "https://elsewhere.example"})
		e.write("config/as", map[string]any{"issuer": g.server.Issuer()})
		_, status := e.request(write, "callback", wrong)
		require.Equal(t, 400, status)
		e.ok(read, "tenants/acme/authorize", nil) // failed
		e.ok(write, "callback", back(nil))
		e.ok(read, "tenants/acme/authorize", nil)
		require.NoError(t, schemaError(tenantStatusFields, e.read("tenants/acme")))
		require.Contains(t, e.read("tenants/acme"), "subject")
		e.write("config/as", map[string]any{"redirect_uris": callbackTo + "/as"})
		e.ok(write, "callback/as", back(nil))
		for _, path := range []string{"callback", "callback/as"} {
			resp, status, _ := e.try(read, path, nil)
			require.Equal(t, 200, status) // the status of the page, 400, is in its data
			require.Equal(t, 400, resp.Data[logical.HTTPStatusCode])
			e.seen[e.Route(path).Pattern+" read"] = true
		}

		device := e.ok(write, "tenants/acme/device", as())
		require.NoError(t, g.server.DenyDevice(device.Data["user_code"].(string)))
		time.Sleep(time.Minute)
		require.Equal(t, attemptDenied, e.ok(read, "tenants/acme/device", nil).Data["status"])
		g.server.Inject(oauth2test.Fault{Answer: oauth2test.InvalidGrant})
		e.ok(write, "tenants/acme/device", as())
		time.Sleep(time.Minute)
		require.Equal(t, attemptFailed, e.ok(read, "tenants/acme/device", nil).Data["status"])

		phone := e.kaizala.PhoneNumber("acme")
		e.ok(write, "tenants/beta/pin", map[string]any{"mobile_number": phone})
		e.ok(write, "tenants/beta/pin", map[string]any{"pin": e.kaizala.PIN(e.connectorID, "acme")})

		for _, status := range []string{attemptPending, attemptGranted, attemptDenied, attemptExpired, attemptFailed, attemptSuperseded} {
			assert.True(t, e.seen["status "+status], "no attempt was %s", status)
		}
		e.wasAllTried(func(path *framework.Path, field string) bool { return false },
			slices.DeleteFunc(slices.Clone(e.Paths), func(path *framework.Path) bool { return !isGrants(path) }))
	})
}
