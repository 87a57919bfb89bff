package backend

import (
	"encoding/json"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// recipe is a file of bootstrap/services, and how its service behaves.
type recipe struct {
	name string
	auth string // how the client authenticates
	// options are the service's quirks.
	options func(*oauth2test.Options)
	// refusal is how the service refuses a refresh token.
	refusal oauth2test.Answer
	// life is what an access token lives, by the answer or by the recipe.
	life time.Duration
	// endpoint is the endpoint_url that an answer brings.
	endpoint string
	// newEach: each exchange brings another refresh token.
	newEach bool
	// told: the answer has the refresh token's life.
	told bool
}

func edit(change func(fields map[string]any)) func(oauth2test.Endpoint, map[string]any) {
	return func(e oauth2test.Endpoint, fields map[string]any) {
		if e == oauth2test.EndpointToken {
			change(fields)
		}
	}
}

var recipes = []recipe{
	{name: "google", auth: oauth2test.AuthPost, life: time.Hour, refusal: oauth2test.InvalidGrant, options: func(o *oauth2test.Options) {
		o.Rotation, o.RevokeEnds, o.RevokeDead = oauth2test.RotateNever, oauth2test.RevokeGrant, oauth2test.InvalidToken
	}},
	{name: "entra", auth: oauth2test.AuthPost, life: time.Hour, newEach: true, refusal: oauth2test.InvalidGrant, options: func(o *oauth2test.Options) {
		o.Grace, o.JWT = 90*day, true
	}},
	{name: "github-app", auth: oauth2test.AuthPost, life: 8 * time.Hour, newEach: true, told: true, refusal: oauth2test.BadRefreshTokenForm, options: func(o *oauth2test.Options) {
		o.Format, o.ExchangeInvalidates, o.ExpiresIn = oauth2test.FormatAccept, true, oauth2test.ExpiresInString
		o.AccessTokenLife, o.RefreshTokenLife, o.RefreshTokenLifeField = 8*time.Hour, 180*day, "refresh_token_expires_in"
		o.Edit = edit(func(fields map[string]any) { fields["scope"], fields["token_type"] = "", "bearer" })
	}},
	{name: "gitlab", auth: oauth2test.AuthPost, life: 2 * time.Hour, newEach: true, refusal: oauth2test.InvalidGrant, options: func(o *oauth2test.Options) {
		o.ExchangeInvalidates, o.AccessTokenLife, o.RevokeEnds = true, 2*time.Hour, oauth2test.RevokeGrant
		o.Edit = edit(func(fields map[string]any) { fields["created_at"] = time.Now().Unix() })
	}},
	{name: "slack", auth: oauth2test.AuthBasic, life: 12 * time.Hour, newEach: true, refusal: oauth2test.InvalidRefreshToken, options: func(o *oauth2test.Options) {
		o.AccessTokenLife = 12 * time.Hour
		o.Edit = edit(func(fields map[string]any) {
			fields["ok"], fields["token_type"], fields["authed_user"] = true, "bot", map[string]any{"id": "U1"}
		})
	}},
	{name: "salesforce", auth: oauth2test.AuthPost, life: time.Hour, endpoint: "https://example.my.salesforce.com", refusal: oauth2test.InvalidGrant, options: func(o *oauth2test.Options) {
		o.Rotation, o.ExpiresIn = oauth2test.RotateNever, oauth2test.ExpiresInMissing
		o.Edit = edit(func(fields map[string]any) {
			fields["instance_url"], fields["issued_at"] = "https://example.my.salesforce.com", "1790000000000"
		})
	}},
	{name: "atlassian", auth: oauth2test.AuthPost, life: time.Hour, newEach: true, refusal: oauth2test.InvalidGrant403, options: func(o *oauth2test.Options) {
		o.Grace = 10 * time.Minute
	}},
	{name: "okta", auth: oauth2test.AuthBasic, life: time.Hour, newEach: true, refusal: oauth2test.InvalidGrant, options: func(o *oauth2test.Options) {
		o.Grace, o.ReuseKillsFamily, o.LimitReset = 30*time.Second, true, true
	}},
	{name: "auth0", auth: oauth2test.AuthPost, life: 24 * time.Hour, newEach: true, refusal: oauth2test.InvalidGrant403, options: func(o *oauth2test.Options) {
		o.JWT, o.ReuseKillsFamily, o.AccessTokenLife = true, true, 24*time.Hour
	}},
	{name: "keycloak", auth: oauth2test.AuthBasic, life: 5 * time.Minute, newEach: true, told: true, refusal: oauth2test.InvalidGrant, options: func(o *oauth2test.Options) {
		o.Grace, o.AccessTokenLife, o.RefreshTokenLife, o.RefreshTokenLifeField = 30*day, 5*time.Minute, 30*day, "refresh_expires_in"
	}},
	{name: "hubspot", auth: oauth2test.AuthPost, life: 30 * time.Minute, refusal: oauth2test.InvalidGrant, options: func(o *oauth2test.Options) {
		o.Rotation, o.AccessTokenLife = oauth2test.RotateSame, 30*time.Minute
	}},
	{name: "xero", auth: oauth2test.AuthBasic, life: 30 * time.Minute, newEach: true, refusal: oauth2test.InvalidGrant, options: func(o *oauth2test.Options) {
		o.Grace, o.AccessTokenLife, o.RefreshTokenLife = 30*time.Minute, 30*time.Minute, 60*day
	}},
	{name: "quickbooks", auth: oauth2test.AuthBasic, life: time.Hour, told: true, refusal: oauth2test.InvalidGrant, options: func(o *oauth2test.Options) {
		o.Rotation, o.RefreshTokenLife, o.RefreshTokenLifeField = oauth2test.RotateSame, 100*day, "x_refresh_token_expires_in"
	}},
	{name: "zoom", auth: oauth2test.AuthBasic, life: time.Hour, newEach: true, refusal: oauth2test.InvalidGrant401, options: func(*oauth2test.Options) {}},
	{name: "dropbox", auth: oauth2test.AuthBasic, life: 4 * time.Hour, refusal: oauth2test.InvalidGrant, options: func(o *oauth2test.Options) {
		o.Rotation, o.AccessTokenLife, o.RevokeEnds = oauth2test.RotateNever, 4*time.Hour, oauth2test.RevokeGrant
	}},
	{name: "box", auth: oauth2test.AuthPost, life: time.Hour, newEach: true, refusal: oauth2test.InvalidGrant, options: func(o *oauth2test.Options) {
		o.Grace, o.GraceSame = 60*day, true
	}},
}

// elsewhere sends requests for one address to another.
type elsewhere struct {
	http.RoundTripper
	to map[string]string
}

func (x elsewhere) RoundTrip(r *http.Request) (*http.Response, error) {
	to, ok := x.to[r.URL.String()]
	if !ok {
		return nil, os.ErrNotExist
	}
	r = r.Clone(r.Context())
	r.URL, _ = url.Parse(to)
	r.Host = r.URL.Host
	return x.RoundTripper.RoundTrip(r)
}

// recipeFile reads a file of bootstrap/services.
func recipeFile(t *testing.T, name string) map[string]any {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join("..", "bootstrap", "services", name+".json"))
	require.NoError(t, err)
	fields := map[string]any{}
	require.NoError(t, json.Unmarshal(raw, &fields))
	return fields
}

// Each recipe is written by the operator and the connector's owner, and then serves a tenant of a service with its quirks.
func TestRecipes(t *testing.T) {
	files, err := filepath.Glob(filepath.Join("..", "bootstrap", "services", "*.json"))
	require.NoError(t, err)
	assert.Len(t, files, len(recipes), "each file has a recipe in this test")
	for _, r := range recipes {
		t.Run(r.name, func(t *testing.T) { synctest.Test(t, r.test) })
	}
}

func (r recipe) test(t *testing.T) {
	service := oauth2test.New()
	service.Set(r.options)
	id, secret := service.RegisterClient(r.auth)
	file := recipeFile(t, r.name)
	e := newEngine(t)
	text := func(name string) string { s, _ := file[name].(string); return s }
	e.connectors.transport = elsewhere{service.Transport(), map[string]string{
		text("token_url"): service.TokenURL(), text("revocation_url"): service.RevocationURL(),
	}}
	e.write("config/"+r.name, file)
	e.write("config/"+r.name, map[string]any{"connector_id": id, "connector_secret": secret})
	shown := e.read("config/" + r.name)
	for name := range file {
		assert.Contains(t, shown, name)
	}

	first := service.Grant(id, "ada", "read", "offline_access")
	e.write("tenants/acme", map[string]any{"connector": r.name, "refresh_token": first})
	begun := time.Now()
	lease := e.lease("acme")
	assert.True(t, service.Alive(accessTokenOf(lease)))
	assert.NotEmpty(t, lease.Data["token_type"])
	if r.endpoint != "" {
		assert.Equal(t, r.endpoint, lease.Data["endpoint_url"])
	} else {
		assert.NotContains(t, lease.Data, "endpoint_url")
	}
	ends, err := time.Parse(time.RFC3339, lease.Data["expire_time"].(string))
	require.NoError(t, err)
	assert.WithinDuration(t, begun.Add(r.life), ends, 2*time.Second)

	e.ok(logical.UpdateOperation, "tenants/acme/refresh", nil)
	held := e.held("acme")
	assert.Equal(t, r.newEach, held != first)
	assert.Equal(t, service.CurrentRefreshToken("ada"), held)
	assert.Zero(t, service.UsedTwice())
	_, told := e.read("tenants/acme")["refresh_token_expire_time"]
	assert.Equal(t, r.told || file["refresh_token_life"] != nil, told)

	// The service refuses the refresh token in its own way, and the error says so to the tenant user.
	service.Inject(oauth2test.Fault{Answer: r.refusal, Times: 1})
	_, status, why := e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
	assert.Equal(t, http.StatusBadRequest, status)
	assert.True(t, strings.Contains(why, "refuses the refresh token"), why)
	assert.Equal(t, statusRejected, e.status("acme"))
}

// Each answer of a service like QuickBooks has the rest of the same life of a refresh token. The last tenth of that life, in which
// the engine makes more exchanges, does not move with these answers.
func TestToldRestOfALifeDoesNotMoveItsLastTenth(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		service := oauth2test.New()
		service.Set(func(o *oauth2test.Options) {
			o.Rotation, o.RefreshTokenLife, o.RefreshTokenAbsolute, o.RefreshTokenLifeField = oauth2test.RotateSame, 100*day, true, "x_refresh_token_expires_in"
		})
		id, secret := service.RegisterClient(oauth2test.AuthBasic)
		e := newEngine(t)
		e.connectors.transport = service.Transport()
		e.write("config", map[string]any{"service": "oauth2", "token_url": service.TokenURL(), "connector_id": id, "connector_secret": secret})
		e.write("tenants/acme", map[string]any{"refresh_token": service.Grant(id, "ada", "read")})
		from := e.stored("acme").Facts.RotatesFrom
		assert.WithinDuration(t, time.Now().Add(90*day), from, time.Minute)
		time.Sleep(50 * day)
		assert.Equal(t, from, e.stored("acme").Facts.RotatesFrom)
	})
}
