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

	"github.com/hashicorp/vault/sdk/helper/consts"
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

// grantEngine is an engine with Kaizala and two authorization servers. The connector "as" is for the first of the two.
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
	e.wire = e.transport
	synctest.Wait() // no goroutine reads the transport while it is replaced
	e.connectors.transport = e.transport()
	e.clientID, e.clientSecret = e.server.RegisterClient(oauth2test.AuthBasic, callbackTo, callbackTo+"/as")
	e.write("config/as", map[string]any{
		"service": "oauth2", "connector_id": e.clientID, "connector_secret": e.clientSecret, "exchanges_per_minute": 1000,
		"token_url": e.server.TokenURL(), "authorization_url": e.server.AuthorizationURL(), "revocation_url": e.server.RevocationURL(),
		"device_authorization_url": e.server.DeviceURL(), "redirect_uris": callbackTo, "scopes": "openid read offline_access",
	})
	t.Cleanup(e.server.ClearFaults)
	return e
}

func (e *grantEngine) transport() http.RoundTripper {
	return byHost{"as.example": e.server.Transport(), "other.example": e.other.Transport(), "": e.kaizala.Transport()}
}

// crash waits until all goroutines wait, because a request may still be under way in the engine that dies.
func (e *grantEngine) crash() {
	synctest.Wait()
	e.engine.crash()
}

// ask makes a request with the display name token-ada.
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

// start starts an attempt and returns the data of the answer.
func (e *grantEngine) start(path string, data map[string]any) map[string]any {
	e.t.Helper()
	if data == nil {
		data = map[string]any{"connector": "as"}
	}
	resp, status, text := e.ask(logical.UpdateOperation, "tenants/acme/"+path, data)
	require.Equal(e.t, 200, status, text)
	return resp.Data
}

// authorize starts an authorization, approves it as the user, and returns the parameters of the server's redirect.
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

// query returns the query parameters of an address.
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

// text is the text of the page without its markup.
func (p shown) text() string {
	return strings.Join(strings.Fields(html.UnescapeString(tags.ReplaceAllString(p.html, " "))), " ")
}

var (
	hidden = regexp.MustCompile(`<input type="hidden" name="(\w+)" value="([^"]*)">`)
	action = regexp.MustCompile(`<form method="post" action="([^"]*)"`)
)

// form returns the address and the fields of the page's form; nil fields if it has no form.
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

// sent returns the number of requests of this grant type that the server got.
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
		assert.Equal(t, map[string]any{"page": "1", "state": back["state"], "confirmation": fields["confirmation"]}, fields)

		p = e.visit(logical.UpdateOperation, to, fields)
		assert.Equal(t, 200, p.status)
		for _, text := range []string{"The tenant is connected", "Tenant acme", "Granted by", "vault delete kaizala/tenants/acme", "withdraw the access at the authorization server as.example."} {
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
		e.write("tenants/acme/refresh", nil)
		assert.Equal(t, oauth2test.Subject("jane"), e.read("tenants/acme")["subject"], "an exchange without a subject in its answer does not change it")
	})
}

// A callback that fails shows the reason, as a page and as an API answer. It stores no tenant and makes no unnecessary call, and the
// attempt has the status of the contract afterwards.
func TestCallbacksThatConnectNothing(t *testing.T) {
	type try struct {
		change  func(e *grantEngine, back map[string]any)
		path    string // "": callback
		status  int    // the status of the page, 0: 400; that of the API answer is always 400
		title   string
		says    string // on the page and in the answer
		calls   int
		pending string // the attempt's status afterwards
	}
	promise := func(e *grantEngine) {
		e.server.Set(func(o *oauth2test.Options) { o.PromiseIss = true })
		e.write("config/as", map[string]any{"issuer": e.server.Issuer()})
	}
	for name, c := range map[string]try{
		"no state":        {change: func(_ *grantEngine, back map[string]any) { delete(back, "state") }, title: "not known", pending: attemptPending},
		"unknown state":   {change: func(_ *grantEngine, back map[string]any) { back["state"] = random256() }, title: "not known", pending: attemptPending},
		"malformed state": {change: func(_ *grantEngine, back map[string]any) { back["state"] = "../tenants/acme" }, title: "not known", pending: attemptPending},
		"another connector's callback": {path: "callback/as", change: func(*grantEngine, map[string]any) {},
			title: "for another address", pending: attemptPending},
		"callback/default in place of callback": {path: "callback/default", change: func(*grantEngine, map[string]any) {},
			title: "for another address", says: "another callback address than the one that this link was made for", pending: attemptPending},
		"expired":             {change: func(*grantEngine, map[string]any) { time.Sleep(attemptLife) }, title: "Too late", pending: attemptExpired},
		"a newer attempt":     {change: func(e *grantEngine, _ map[string]any) { e.start(byCode, nil) }, title: "out of date", pending: attemptPending},
		"a newer way":         {change: func(e *grantEngine, _ map[string]any) { e.start(byDevice, nil) }, title: "out of date", pending: attemptSuperseded},
		"denied":              {change: func(_ *grantEngine, back map[string]any) { delete(back, "code"); back["error"] = "access_denied" }, status: 200, title: "Access was denied", pending: attemptDenied},
		"another error":       {change: func(_ *grantEngine, back map[string]any) { delete(back, "code"); back["error"] = "invalid_scope" }, title: "Nothing was connected", says: "(invalid_scope)", pending: attemptFailed},
		"an error of its own": {change: func(_ *grantEngine, back map[string]any) { delete(back, "code"); back["error"] = canary }, title: "Nothing was connected", says: "grants nothing: the operator", pending: attemptFailed},
		"a login is required": {change: func(_ *grantEngine, back map[string]any) { delete(back, "code"); back["error"] = "login_required" },
			title: "Nothing was connected", says: "(login_required): start again, and log in", pending: attemptFailed},
		"a consent is required": {change: func(_ *grantEngine, back map[string]any) { delete(back, "code"); back["error"] = "consent_required" },
			title: "Nothing was connected", says: "(consent_required): start again, and log in", pending: attemptFailed},
		"neither code nor error": {change: func(_ *grantEngine, back map[string]any) { delete(back, "code") }, title: "Something is missing", pending: attemptPending},
		"a code that cannot be sent": {change: func(_ *grantEngine, back map[string]any) { back["code"] = "a\nb" },
			title: "Something is missing", pending: attemptPending},
		"a wrong iss": {change: func(e *grantEngine, back map[string]any) {
			e.write("config/as", map[string]any{"issuer": e.server.Issuer()})
			back["iss"] = "https://other.example"
		}, title: "Nothing was connected", says: "another issuer", pending: attemptFailed},
		"a wrong iss beside an error": {change: func(e *grantEngine, back map[string]any) {
			e.write("config/as", map[string]any{"issuer": e.server.Issuer()})
			delete(back, "code")
			back["iss"], back["error"] = "https://other.example", "access_denied"
		}, title: "Nothing was connected", says: "another issuer", pending: attemptFailed},
		"no iss, though it is promised": {change: func(e *grantEngine, _ map[string]any) { promise(e) }, title: "Nothing was connected", says: "iss is missing", pending: attemptFailed},
		"the connector is gone": {change: func(e *grantEngine, _ map[string]any) { e.ok(logical.DeleteOperation, "config/as", nil) },
			title: "Nothing was connected", says: "was deleted", pending: attemptFailed},
		"the connector is another's": {change: func(e *grantEngine, _ map[string]any) {
			e.write("config/as", map[string]any{"service": "kaizala"})
		}, title: "Nothing was connected", says: "another service", pending: attemptFailed},
		"a code for another client": {change: func(e *grantEngine, _ map[string]any) {
			id, secret := e.server.RegisterClient(oauth2test.AuthBasic, callbackTo)
			e.write("config/as", map[string]any{"connector_id": id, "connector_secret": secret})
		}, title: "Nothing was connected", says: "belongs to another client", calls: 1, pending: attemptFailed},
		"a forged code": {change: func(_ *grantEngine, back map[string]any) { back["code"] = "forged" },
			title: "Nothing was connected", says: "refuses the authorization code", calls: 1, pending: attemptFailed},
		"a code that is too old": {change: func(*grantEngine, map[string]any) { time.Sleep(2 * time.Minute) },
			title: "Nothing was connected", says: "refuses the authorization code", calls: 1, pending: attemptFailed},
		"a wrong secret": {change: func(e *grantEngine, _ map[string]any) { e.server.NewClientSecret(e.clientID) },
			title: "Nothing was connected", says: "refuses the connector", calls: 1, pending: attemptFailed},
		"a lost answer": {change: func(e *grantEngine, _ map[string]any) {
			e.server.Inject(oauth2test.Fault{Process: true, Reset: true})
		}, title: "Nothing was connected", calls: 1, pending: attemptFailed},
		"an outage": {change: func(e *grantEngine, _ map[string]any) {
			e.server.Inject(oauth2test.Fault{Answer: oauth2test.BadGateway})
		},
			title: "Nothing was connected", says: "502", calls: 1, pending: attemptFailed},
		"no refresh token": {change: func(e *grantEngine, _ map[string]any) {
			e.server.Set(func(o *oauth2test.Options) { o.Rotation = oauth2test.RotateNever })
			e.server.Set(func(o *oauth2test.Options) {
				o.Edit = func(_ oauth2test.Endpoint, fields map[string]any) { delete(fields, "refresh_token") }
			})
		}, title: "Nothing was connected", says: "offline_access", calls: 1, pending: attemptFailed},
	} {
		for _, way := range []string{"page", "answer"} {
			t.Run(name+"/"+way, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					e := newGrantEngine(t)
					e.write("config/as", map[string]any{"confirm": false})
					back := e.authorize(nil)
					c.change(e, back)
					e.server.ResetCalls()
					path := "callback"
					if c.path != "" {
						path = c.path
					}
					if way == "page" {
						want := http.StatusBadRequest
						if c.status != 0 {
							want = c.status
						}
						p := e.visit(logical.ReadOperation, path, back)
						assert.Equal(t, want, p.status)
						assert.Contains(t, p.text(), c.title)
						assert.Contains(t, p.text(), c.says)
						e.showsNothingOf(p.html, back)
					} else {
						resp, status, text := e.ask(logical.UpdateOperation, path, back)
						assert.Equal(t, http.StatusBadRequest, status, text)
						require.True(t, resp.IsError())
						assert.Contains(t, text, c.title)
						assert.Contains(t, text, c.says)
						e.showsNothingOf(text, back)
					}
					assert.Len(t, e.server.Calls(oauth2test.EndpointToken), c.calls)
					assert.Nil(t, e.stored("acme"))
					assert.Equal(t, c.pending, e.attemptStatus(byCode), e.attempt(byCode))

					// The same link, opened again, does nothing.
					e.server.ClearFaults()
					if c.pending != attemptPending {
						p := e.open(back)
						assert.Equal(t, 400, p.status)
						_, form := p.form()
						assert.Nil(t, form)
					}
					assert.Len(t, e.server.Calls(oauth2test.EndpointToken), c.calls)
					assert.Nil(t, e.stored("acme"))
				})
			})
		}
	}
}

// showsNothingOf asserts that a text has no value of a request's parameters.
func (e *grantEngine) showsNothingOf(text string, data map[string]any) {
	e.t.Helper()
	for name, value := range data {
		if value, ok := value.(string); ok && len(value) > 5 && name != "error" { // the code of an error may be named
			assert.NotContains(e.t, text, value, name)
		}
	}
	assert.NotContains(e.t, text, canary)
}

// A connector has several redirect URIs: the authorization request has the one that the start names.
func TestRedirectURIThatIsAskedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		e.write("config/as", map[string]any{"redirect_uris": []string{callbackTo, callbackTo + "/as"}})
		for _, asked := range []string{callbackTo, callbackTo + "/as"} {
			begun := e.start("authorize", map[string]any{"connector": "as", "redirect_uri": asked})
			address, err := url.Parse(begun["authorization_url"].(string))
			require.NoError(t, err)
			assert.Equal(t, asked, address.Query().Get("redirect_uri"))
		}
	})
}

// A write, a delete or another attempt ends a pending attempt, and does not change the status of an attempt that has ended.
func TestAnAttemptThatHasEndedStaysSo(t *testing.T) {
	for name, next := range map[string]func(*grantEngine){
		"write": func(e *grantEngine) {
			e.write("tenants/acme", map[string]any{"refresh_token": e.server.Grant(e.clientID, "acme"), "connector": "as", "verify": false})
		},
		"delete":          func(e *grantEngine) { e.ok(logical.DeleteOperation, "tenants/acme", nil) },
		"another attempt": func(e *grantEngine) { e.start("device", nil) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newGrantEngine(t)
				back := e.authorize(nil)
				require.Equal(t, 200, e.open(map[string]any{"state": back["state"], "error": "access_denied"}).status)
				next(e)
				assert.Equal(t, attemptDenied, e.attemptStatus("authorize"))
			})
		})
	}
}

func TestAStateWorksOnce(t *testing.T) {
	for name, first := range map[string]func(*grantEngine, map[string]any){
		"granted": func(e *grantEngine, back map[string]any) { assert.Equal(e.t, 200, e.confirm(back).status) },
		"denied": func(e *grantEngine, back map[string]any) {
			assert.Equal(e.t, 200, e.open(map[string]any{"state": back["state"], "error": "access_denied"}).status)
		},
		"failed": func(e *grantEngine, back map[string]any) {
			e.server.Inject(oauth2test.Fault{Answer: oauth2test.BadGateway, Times: 1})
			assert.Equal(e.t, 400, e.confirm(back).status)
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newGrantEngine(t)
				back := e.authorize(nil)
				first(e, back)
				calls, entry := len(e.server.Calls()), e.stored("acme")
				for range 2 {
					before := e.storage.ops.Load()
					p := e.open(back)
					assert.Equal(t, int64(1), e.storage.ops.Load()-before)
					assert.Equal(t, 400, p.status)
					assert.Contains(t, p.text(), "has been used")
					_, status, _ := e.ask(logical.UpdateOperation, "callback", back)
					assert.Equal(t, 400, status)
					_, status, _ = e.ask(logical.UpdateOperation, "callback", map[string]any{"state": back["state"]})
					assert.Equal(t, 400, status)
					e.crash()
					synctest.Wait()
				}
				assert.Len(t, e.server.Calls(), calls)
				assert.Equal(t, entry, e.stored("acme"))
			})
		})
	}
}

// Ten requests bring the same state at the same moment, as two browsers or a double click do: one of them succeeds.
func TestOneStateAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		back := e.authorize(nil)
		_, fields := e.open(back).form()
		e.server.Inject(oauth2test.Fault{Delay: 2 * time.Second})
		// All of them check the state before the first one has stored that it is used.
		e.storage.failWith(func(op, key string) error {
			if op == "put" && (strings.HasPrefix(key, callPrefix) || strings.HasPrefix(key, attemptKeys)) {
				time.Sleep(time.Second)
			}
			return nil
		})
		go func() {
			time.Sleep(3500 * time.Millisecond)
			assert.Equal(t, attemptPending, e.attemptStatus(byCode), "the service has not answered yet")
		}()
		good := make(chan int, 10)
		for range cap(good) {
			go func() {
				p := e.visit(logical.UpdateOperation, "callback", fields)
				assert.Equal(t, p.status == 400, strings.Contains(p.text(), "This link has been used"), p.text())
				good <- p.status
			}()
		}
		count := map[int]int{}
		for range cap(good) {
			count[<-good]++
		}
		assert.Equal(t, map[int]int{200: 1, 400: 9}, count)
		assert.Equal(t, 1, e.sent(codeGrant))
		assert.Equal(t, attemptGranted, e.attemptStatus(byCode))

		e.storage.heal()

		// The requests that failed have given their places in the share back.
		time.Sleep(2 * time.Minute)
		e.write("config/as", map[string]any{"exchanges_per_minute": 1})
		e.write("tenants/acme/refresh", nil)
	})
}

// Callbacks that an attacker can send without a valid state cost one read of storage at most, and no call.
func TestWhatACallbackCosts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		back := e.authorize(nil)
		cost := func(op logical.Operation, data map[string]any) int64 {
			before := e.storage.ops.Load()
			_, _, _ = e.ask(op, "callback", data)
			return e.storage.ops.Load() - before
		}
		for _, op := range []logical.Operation{logical.ReadOperation, logical.UpdateOperation} {
			assert.EqualValues(t, 1, cost(op, map[string]any{"state": random256(), "code": "c"}))
			assert.EqualValues(t, 0, cost(op, map[string]any{"state": "x", "code": "c"}))
		}
		time.Sleep(attemptLife)
		assert.EqualValues(t, 1, cost(logical.ReadOperation, back), "expired")
		back = e.authorize(nil)
		e.authorize(nil)
		assert.EqualValues(t, 1, cost(logical.ReadOperation, back), "superseded")

		// Vault would wrap a normal answer to these requests, and store it.
		e.storage.failWith(func(string, string) error { t.Error("storage was touched"); return nil })
		for _, data := range []map[string]any{back, {"state": random256()}} {
			for _, op := range []logical.Operation{logical.ReadOperation, logical.UpdateOperation} {
				_, err := e.HandleRequest(t.Context(), &logical.Request{
					Operation: op, Path: "callback", Data: data, Storage: e.storage, WrapInfo: &logical.RequestWrapInfo{TTL: time.Minute},
				})
				coded, ok := err.(logical.HTTPCodedError)
				require.True(t, ok, "the answer is no coded error, so Vault would wrap it: %v", err)
				assert.Equal(t, 400, coded.Code())
			}
		}
		e.storage.heal()
		_, err := e.HandleRequest(t.Context(), &logical.Request{
			Operation: logical.ReadOperation, Path: "callback", Data: back, Storage: e.storage, WrapInfo: &logical.RequestWrapInfo{},
		})
		assert.NoError(t, err, "a WrapInfo without a TTL asks for no wrapping")
	})
}

// Storage did not take that a state is out of date: the first callback with the state notes it, so each further one costs one read again.
func TestWhatACallbackOfAnEndedAttemptCosts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		back := e.authorize(nil)
		e.storage.refuse("put", stateKeys)
		e.ok(logical.UpdateOperation, "tenants/acme", map[string]any{"connector": "as", "refresh_token": e.server.Grant(e.clientID, "acme"), "verify": false})
		e.storage.heal()
		for _, most := range []int64{10, 1} {
			before := e.storage.ops.Load()
			assert.Contains(t, e.open(back).text(), "out of date")
			assert.LessOrEqual(t, e.storage.ops.Load()-before, most)
		}
	})
}

func BenchmarkUnknownState(b *testing.B) {
	e := newConfiguredEngine(b)
	ctx := context.Background()
	b.ReportAllocs()
	for b.Loop() {
		resp, err := e.HandleRequest(ctx, &logical.Request{
			Operation: logical.ReadOperation, Path: "callback", Storage: e.storage,
			Data: map[string]any{"state": "0123456789012345678901234567890123456789012", "code": "code"},
		})
		if err != nil || resp.Data[logical.HTTPStatusCode] != 400 {
			b.Fatal(err)
		}
	}
}

// A standby answers ErrReadOnly to each request about grants before it reads storage, so that Vault sends it to the active node.
func TestGrantsOnANodeThatMayNotWrite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		back := e.authorize(nil)
		synctest.Wait()
		e.system.replication.Store(uint32(consts.ReplicationPerformanceStandby))
		e.storage.failWith(func(op, key string) error { t.Error(op, key); return nil })
		const read, write = logical.ReadOperation, logical.UpdateOperation
		for _, c := range []struct {
			op   logical.Operation
			path string
			data map[string]any
		}{
			{write, "tenants/acme/authorize", map[string]any{"connector": "as"}}, {read, "tenants/acme/authorize", nil},
			{write, "tenants/acme/device", map[string]any{"connector": "as"}}, {read, "tenants/acme/device", nil},
			{write, "tenants/acme/pin", map[string]any{"mobile_number": "+911234567890"}}, {write, "tenants/acme/pin", map[string]any{"pin": "123456"}},
			{read, "callback", back}, {write, "callback", back}, {read, "callback/as", back}, {write, "callback/as", back},
			{read, "callback", map[string]any{"state": "x"}},
		} {
			_, err := e.HandleRequest(t.Context(), &logical.Request{Operation: c.op, Path: c.path, Data: c.data, Storage: e.storage})
			assert.Equal(t, logical.ErrReadOnly, err, "%s %s", c.op, c.path)
		}
		e.attendGrants()
		e.storage.heal()
		e.system.replication.Store(0)
		assert.Equal(t, 200, e.confirm(back).status)

		e.start(byDevice, nil)
		polls := len(e.polls())
		e.system.replication.Store(uint32(consts.ReplicationPerformanceStandby))
		e.storage.failWith(func(op, key string) error { t.Error(op, key); return nil })
		e.pass(attemptLife + time.Minute)
		e.storage.heal()
		assert.Len(t, e.polls(), polls)
		e.system.replication.Store(0)
		code := e.start(byDevice, nil)["user_code"].(string)
		require.NoError(t, e.server.ApproveDevice(code, "jane"))
		e.system.replication.Store(uint32(consts.ReplicationPerformanceStandby))
		e.pass(time.Minute)
		e.system.replication.Store(0)
		e.pass(2 * time.Minute)
		assert.Equal(t, attemptGranted, e.attemptStatus(byDevice), "the node polls again when it is the active node")
	})
}

// The service answers the code after 12 seconds: the callback is answered within 10 seconds, and the grant is stored later.
func TestASlowRedemption(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		for _, way := range []string{"page", "answer"} {
			back := e.authorize(nil)
			e.server.Inject(oauth2test.Fault{Delay: 12 * time.Second, Times: 1})
			begun := time.Now()
			if way == "page" {
				p := e.confirm(back)
				assert.Equal(t, 200, p.status)
				assert.Contains(t, p.text(), "Not finished yet")
				assert.Contains(t, p.text(), "Service the authorization server as.example")
			} else {
				resp, status, _ := e.ask(logical.UpdateOperation, "callback", back)
				assert.Equal(t, 200, status)
				assert.Equal(t, map[string]any{"tenant": "acme", "status": attemptPending}, resp.Data)
				assert.NotEmpty(t, resp.Warnings)
			}
			assert.LessOrEqual(t, time.Since(begun), 10*time.Second)
			assert.Equal(t, attemptPending, e.attemptStatus(byCode))
			assert.Contains(t, e.open(back).text(), "has been used")
			time.Sleep(5 * time.Second)
			assert.Equal(t, attemptGranted, e.attemptStatus(byCode))
			assert.Equal(t, e.server.CurrentRefreshToken("jane"), e.stored("acme").RefreshToken)
		}
	})
}

// An authorization can be started while the service refuses the connector, and the answer says what has to come first.
func TestAuthorizeWhileTheConnectorIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		ask := map[string]any{"connector": "as"}
		warnings := func() []string {
			resp, status, text := e.ask(logical.UpdateOperation, "tenants/acme/authorize", ask)
			require.Equal(t, 200, status, text)
			return resp.Warnings
		}
		require.Empty(t, warnings())
		e.write("config/as", map[string]any{"connector_secret": "WRONG"})
		require.Empty(t, warnings(), "the service has not been asked yet")
		_, status, text := e.try(logical.UpdateOperation, "tenants/beta", map[string]any{"connector": "as", "refresh_token": "x"})
		require.Equal(t, 400, status)
		require.Contains(t, text, `refuses connector "as"`)
		require.Equal(t, []string{"The person's consent may have to wait. The authorization server as.example refuses connector \"as\": " +
			"its owner has to write the right connector_id and connector_secret to config/as; no refresh token was lost."}, warnings())
		e.write("config/as", map[string]any{"connector_secret": e.clientSecret})
		require.Empty(t, warnings())
	})
}

// The share is used up, so the code is not sent: the same state works later.
func TestACallbackWithoutAPlaceInTheShare(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		e.write("config/as", map[string]any{"exchanges_per_minute": 1})
		back := e.authorize(map[string]any{"connector": "as"})
		e.write("tenants/beta", map[string]any{"connector": "as", "refresh_token": e.server.Grant(e.clientID, "bob", "offline_access")})
		p := e.confirm(back)
		assert.Equal(t, 400, p.status)
		assert.Contains(t, p.text(), "Not now")
		assert.Contains(t, p.text(), "try again in 1m")
		_, status, _ := e.ask(logical.UpdateOperation, "callback", back)
		assert.Equal(t, 429, status)
		assert.Equal(t, attemptPending, e.attemptStatus(byCode))
		time.Sleep(50 * time.Second)
		e.write("config/as", map[string]any{"exchanges_per_minute": 10})
		p = e.confirm(back)
		assert.Equal(t, 200, p.status, p.text())
		assert.Equal(t, 1, e.sent(codeGrant))
	})
}
