package backend

import (
	"context"
	"html"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// byHost sends requests to one of several services.
type byHost map[string]http.RoundTripper

func (x byHost) RoundTrip(r *http.Request) (*http.Response, error) {
	if to := x[r.URL.Hostname()]; to != nil {
		return to.RoundTrip(r)
	}
	return x[""].RoundTrip(r)
}

const (
	mountPoint = "kaizala/"
	callbackTo = "https://vault.example/v1/kaizala/callback"
)

// grantEngine is an engine with an authorization server, and another one, beside Kaizala. The connector "as" is for the first.
type grantEngine struct {
	*engine
	server, other *oauth2test.Server
	clientID      string
	clientSecret  string
}

func newGrantEngine(t testing.TB, options ...func(*oauth2test.Options)) *grantEngine {
	e := &grantEngine{engine: newConfiguredEngine(t), server: oauth2test.New(), other: oauth2test.New()}
	e.server.SetURL("https://as.example")
	e.other.SetURL("https://other.example")
	for _, set := range options {
		e.server.Set(set)
	}
	e.route()
	e.clientID, e.clientSecret = e.server.RegisterClient(oauth2test.AuthBasic, callbackTo, callbackTo+"/as")
	e.write("config/as", map[string]any{
		"service": "oauth2", "connector_id": e.clientID, "connector_secret": e.clientSecret, "exchanges_per_minute": 1000,
		"token_url": e.server.TokenURL(), "authorization_url": e.server.AuthorizationURL(), "revocation_url": e.server.RevocationURL(),
		"device_authorization_url": e.server.DeviceURL(), "redirect_uris": callbackTo, "scopes": "openid read offline_access",
	})
	t.Cleanup(e.server.ClearFaults)
	return e
}

func (e *grantEngine) route() {
	e.connectors.transport = byHost{"as.example": e.server.Transport(), "other.example": e.other.Transport(), "": e.kaizala.Transport()}
}

func (e *grantEngine) restart() {
	e.engine.restart()
	e.route()
}

func (e *grantEngine) crash() {
	e.engine.crash()
	e.route()
}

// ask makes a request as a person whom Vault calls token-ada.
func (e *grantEngine) ask(op logical.Operation, path string, data map[string]any) (*logical.Response, int, string) {
	return e.askContext(context.Background(), op, path, data)
}

func (e *grantEngine) askContext(ctx context.Context, op logical.Operation, path string, data map[string]any) (*logical.Response, int, string) {
	if data == nil {
		data = map[string]any{}
	}
	resp, err := e.HandleRequest(ctx, &logical.Request{
		Operation: op, Path: path, Data: data, Storage: e.storage, MountPoint: mountPoint, DisplayName: "token-ada",
	})
	status, text := statusOf(op, resp, err)
	return resp, status, text
}

// start begins an attempt and returns the answer.
func (e *grantEngine) start(path string, data map[string]any) map[string]any {
	e.t.Helper()
	if data == nil {
		data = map[string]any{"connector": "as"}
	}
	resp, status, text := e.ask(logical.UpdateOperation, "tenants/acme/"+path, data)
	require.Equal(e.t, 200, status, text)
	return resp.Data
}

// authorize begins an authorization, and returns what the server's redirect brings once the user has allowed it.
func (e *grantEngine) authorize(data map[string]any) map[string]any {
	e.t.Helper()
	return e.allowed(e.start(byCode, data)["authorization_url"].(string))
}

func (e *grantEngine) allowed(address string) map[string]any {
	e.t.Helper()
	to, err := e.server.Approve(address, "jane")
	require.NoError(e.t, err)
	return query(e.t, to)
}

func (e *grantEngine) denied(address string) map[string]any {
	e.t.Helper()
	to, err := e.server.Deny(address)
	require.NoError(e.t, err)
	return query(e.t, to)
}

// query is what a request has that a browser makes by itself.
func query(t testing.TB, address string) map[string]any {
	t.Helper()
	u, err := url.Parse(address)
	require.NoError(t, err)
	data := map[string]any{}
	for name, values := range u.Query() {
		data[name] = values[0]
	}
	return data
}

// shown is a page as a person sees it.
type shown struct {
	status int
	html   string
}

var tags = regexp.MustCompile(`(?s)<style>.*?</style>|<[^>]*>`)

// text is what a person reads.
func (p shown) text() string {
	return strings.Join(strings.Fields(html.UnescapeString(tags.ReplaceAllString(p.html, " "))), " ")
}

var (
	hidden = regexp.MustCompile(`<input type="hidden" name="(\w+)" value="([^"]*)">`)
	action = regexp.MustCompile(`<form method="post" action="([^"]*)"`)
)

// form is what the page's form sends, and where: nil where it has none.
func (p shown) form() (to string, fields map[string]any) {
	found := action.FindStringSubmatch(p.html)
	if found == nil {
		return "", nil
	}
	fields = map[string]any{}
	for _, input := range hidden.FindAllStringSubmatch(p.html, -1) {
		fields[input[1]] = html.UnescapeString(input[2])
	}
	return found[1], fields
}

// visit opens the callback in a browser.
func (e *grantEngine) visit(op logical.Operation, path string, data map[string]any) shown {
	e.t.Helper()
	resp, _, text := e.ask(op, path, data)
	require.NotNil(e.t, resp, text)
	require.Contains(e.t, resp.Data, logical.HTTPRawBody, text)
	assert.Equal(e.t, "text/html; charset=utf-8", resp.Data[logical.HTTPContentType])
	assert.Equal(e.t, "no-store", resp.Data[logical.HTTPCacheControlHeader])
	return shown{resp.Data[logical.HTTPStatusCode].(int), string(resp.Data[logical.HTTPRawBody].([]byte))}
}

func (e *grantEngine) open(back map[string]any) shown {
	e.t.Helper()
	return e.visit(logical.ReadOperation, "callback", back)
}

// confirm opens the callback and presses the button.
func (e *grantEngine) confirm(back map[string]any) shown {
	e.t.Helper()
	p := e.open(back)
	to, fields := p.form()
	require.NotNil(e.t, fields, p.text())
	assert.Equal(e.t, 200, p.status)
	return e.visit(logical.UpdateOperation, to, fields)
}

func (e *grantEngine) attempt(path string) map[string]any {
	e.t.Helper()
	resp, status, text := e.ask(logical.ReadOperation, "tenants/acme/"+path, nil)
	require.Equal(e.t, 200, status, text)
	return resp.Data
}

func (e *grantEngine) attemptStatus(path string) string {
	e.t.Helper()
	return e.attempt(path)["status"].(string)
}

// sent is how many codes the server has been sent.
func (e *grantEngine) sent(grantType string) (n int) {
	for _, call := range e.server.Calls(oauth2test.EndpointToken) {
		if call.GrantType == grantType {
			n++
		}
	}
	return n
}

const codeGrant = "authorization_code"

func TestCodeFlow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		_, status, _ := e.ask(logical.ReadOperation, "tenants/acme/authorize", nil)
		assert.Equal(t, 404, status)
		begun := time.Now()
		started := e.start(byCode, map[string]any{"connector": "as", "login_hint": "jane", "scopes": "openid offline_access"})
		asked := query(t, started["authorization_url"].(string))
		assert.Equal(t, "S256", asked["code_challenge_method"])
		assert.Equal(t, "openid offline_access", asked["scope"])
		assert.Equal(t, "jane", asked["login_hint"])
		assert.Equal(t, callbackTo, asked["redirect_uri"])
		assert.Regexp(t, stateForm, asked["state"])
		assert.Equal(t, stamp(begun.Add(attemptLife).Truncate(time.Millisecond)), started["expire_time"])
		assert.Equal(t, map[string]any{"status": attemptPending, "expire_time": started["expire_time"]}, e.attempt(byCode))

		time.Sleep(time.Minute)
		back := e.allowed(started["authorization_url"].(string))
		p := e.open(back)
		assert.Equal(t, 200, p.status)
		for _, text := range []string{"Connect this tenant?", "Tenant acme", "Mount kaizala/", "Started by token-ada", begun.UTC().Format(time.RFC1123), "as.example"} {
			assert.Contains(t, p.text(), text)
		}
		assert.NotContains(t, p.html, back["code"])
		assert.Zero(t, e.sent(codeGrant))
		to, fields := p.form()
		assert.Equal(t, "callback", to)
		assert.Equal(t, map[string]any{"page": "1", "state": back["state"]}, fields)

		p = e.visit(logical.UpdateOperation, to, fields)
		assert.Equal(t, 200, p.status)
		for _, text := range []string{"The tenant is connected", "Tenant acme", "Granted by", "vault delete kaizala/tenants/acme"} {
			assert.Contains(t, p.text(), text)
		}
		assert.Equal(t, attemptGranted, e.attemptStatus(byCode))
		tenant := e.read("tenants/acme")
		assert.Equal(t, "as", tenant["connector"])
		assert.Equal(t, statusOK, tenant["status"])
		assert.Equal(t, originOperator, tenant["refresh_token_origin"])
		assert.Equal(t, "token-ada", tenant["granted_by"])
		assert.Equal(t, stamp(time.Now().Truncate(time.Millisecond)), tenant["granted_time"])
		assert.Equal(t, oauth2test.Subject("jane"), tenant["subject"])
		assert.Equal(t, e.server.CurrentRefreshToken("jane"), e.stored("acme").RefreshToken)
		assert.True(t, e.server.Alive(accessTokenOf(e.lease("acme"))))
		assert.Zero(t, e.server.TotalExchanges(), "the access token that came with the code is used")
		assert.Equal(t, 1, e.sent(codeGrant))
	})
}
