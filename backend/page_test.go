package backend

import (
	"context"
	"encoding/json"
	"regexp"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/net/html"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// pagesOf are all pages, by the event that they show.
func pagesOf() map[string]*verdict {
	pages := map[string]*verdict{}
	for what := range pageTexts {
		pages[what] = &verdict{
			what: what, service: "the authorization server as.example", subject: "jane@example.com", state: strings.Repeat("s", 43),
			err: badValue("come back later"), text: "The reason stands here.",
			attempt: &attempt{Tenant: "acme", Connector: "as", By: `<script>alert("x")</script>`, Begun: time.Date(2026, 11, 27, 1, 2, 3, 0, time.UTC)},
		}
	}
	return pages
}

func htmlOf(end *verdict) string {
	return string(pageResponse(end, mountPoint).Data[logical.HTTPRawBody].([]byte))
}

// Each page has no script and loads nothing, its content security policy allows only its own style and form, and it has what a screen
// reader needs.
func TestPagesAreSelfContained(t *testing.T) {
	for what, end := range pagesOf() {
		t.Run(what, func(t *testing.T) {
			text := htmlOf(end)
			assert.Less(t, len(text), 8<<10)
			doc, err := html.Parse(strings.NewReader(text))
			require.NoError(t, err)
			count := map[string]int{}
			metas := map[string]string{}
			for node := range doc.Descendants() {
				if node.Type != html.ElementNode {
					continue
				}
				count[node.Data]++
				attributes := map[string]string{}
				for _, a := range node.Attr {
					attributes[a.Key] = a.Val
					assert.False(t, strings.HasPrefix(a.Key, "on") || a.Key == "src" || a.Key == "href" || a.Key == "style", "%s %s", node.Data, a.Key)
				}
				if node.Data == "meta" {
					metas[attributes["name"]+attributes["http-equiv"]] = attributes["content"]
				}
				if node.Data == "html" {
					assert.Equal(t, "en", attributes["lang"])
				}
				if node.Data == "form" {
					assert.Equal(t, "callback", attributes["action"])
					assert.Equal(t, "post", attributes["method"])
				}
				if node.Data == "style" {
					assert.Equal(t, pageStyle, node.FirstChild.Data)
				}
			}
			for _, never := range []string{"script", "img", "link", "iframe", "base", "object", "a"} {
				assert.Zero(t, count[never], never)
			}
			for _, once := range []string{"h1", "main", "title", "style"} {
				assert.Equal(t, 1, count[once], once)
			}
			assert.Equal(t, what == endConfirm, count["button"] == 1)
			assert.Equal(t, what == endConfirm, count["form"] == 1)
			assert.Regexp(t, `^default-src 'none'; base-uri 'none'; form-action 'self'; style-src 'sha256-[A-Za-z0-9+/]{43}='$`, metas["Content-Security-Policy"])
			assert.Equal(t, "no-referrer", metas["referrer"])
			assert.Equal(t, "width=device-width, initial-scale=1", metas["viewport"])
			assert.Equal(t, "light dark", metas["color-scheme"])
			assert.NotContains(t, text, "url(")
			assert.NotContains(t, text, "@import")
			assert.Contains(t, text, "prefers-color-scheme: dark")
		})
	}
}

// Each page says whether something was connected, and what to do now.
func TestPagesSayWhatToDo(t *testing.T) {
	connected := regexp.MustCompile(`[Nn]othing (was|is) connected`)
	for what, end := range pagesOf() {
		p := shown{html: htmlOf(end)}
		resp := pageResponse(end, mountPoint)
		good := what == endConfirm || what == attemptGranted || what == attemptPending || what == attemptDenied
		assert.Equal(t, map[bool]int{true: 200, false: 400}[good], resp.Data[logical.HTTPStatusCode], what)
		assert.Equal(t, what != attemptGranted && what != attemptPending, connected.MatchString(p.text()), what)
		assert.Regexp(t, `[Ss]tart again|close this page|To undo it|Reload this page|Open the authorization|tell your Vault operator`, p.text()+end.text+" Start again"[:map[bool]int{true: 12, false: 0}[what == attemptFailed]], what)
		assert.NotContains(t, p.html, "<script>alert")
		assert.Equal(t, good || what == attemptFailed, strings.Contains(p.text(), "Started by"), "%s: a link that is of no use any more tells nothing of an attempt, which may be another's", what)
		if good {
			assert.Contains(t, p.text(), `Started by <script>alert("x")</script>`)
			assert.Contains(t, p.text(), "Started at Fri, 27 Nov 2026 01:02:03 UTC")
			assert.Contains(t, p.text(), "Mount kaizala/")
		}
	}
	p := shown{html: htmlOf(pagesOf()[attemptGranted])}
	assert.Contains(t, p.text(), "To undo it, ask your Vault operator to delete the tenant (vault delete kaizala/tenants/acme), and withdraw the access at the authorization server as.example.")
	assert.Contains(t, p.text(), "Granted by jane@example.com")
	p = shown{html: htmlOf(pagesOf()[endConfirm])}
	assert.Contains(t, p.text(), "Once you confirm, Vault keeps the access that you have just granted, and apps use it in your name.")
	p = shown{html: htmlOf(pagesOf()[attemptFailed])}
	assert.Contains(t, p.text(), "The reason stands here.")

	named := pagesOf()[endConfirm]
	named.attempt.Callback = "as"
	to, _ := shown{html: htmlOf(named)}.form()
	assert.Equal(t, "as", to)
}

// The connector's confirm decides whether a read completes an authorization; a reload asks again, on another node too.
func TestConfirmation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		back := e.authorize(nil)
		for range 2 {
			to, fields := e.open(back).form()
			assert.Equal(t, "callback", to)
			assert.Equal(t, back["state"], fields["state"])
			e.crash()
		}
		assert.Nil(t, e.stored("acme"))
		assert.NotContains(t, e.storedText(), back["state"])
		_, fields := e.open(back).form()
		assert.Equal(t, 200, e.visit(logical.UpdateOperation, "callback", fields).status)
		assert.NotContains(t, e.storedText(), back["code"], "storage has no code of an attempt that is over")

		e.write("config/as", map[string]any{"confirm": false})
		p := e.open(e.authorize(nil))
		assert.Equal(t, 200, p.status)
		assert.Contains(t, p.text(), "The tenant is connected")

		// A request like that of a page's form, but without a code, connects nothing.
		address := e.start(byCode, nil)["authorization_url"].(string)
		p = e.visit(logical.UpdateOperation, "callback", map[string]any{"state": query(t, address)["state"], "page": "1"})
		assert.Equal(t, 400, p.status)
		assert.Contains(t, p.text(), "Something is missing")
	})
}

// The page and the status show who has started the grant in one line of bounded length. Characters that cannot be seen, or that
// turn the direction of the text, are replaced.
func TestDisplayNameOnThePageAndInTheStatus(t *testing.T) {
	for name, want := range map[string]string{
		"jwt-Ada Lovelace, né 愛":               "jwt-Ada Lovelace, né 愛",
		"a\n\x1b[31m\u202eb\u2066c\u200bd\xff": "a\ufffd\ufffd[31m\ufffdb\ufffdc\ufffdd\ufffd",
		strings.Repeat("é", 127) + "x":         strings.Repeat("é", 127) + "x",
		strings.Repeat("é", 128):               strings.Repeat("é", 127) + "…",
		strings.Repeat("L", 200<<10):           strings.Repeat("L", 255) + "…",
	} {
		bubble(t, func(t *testing.T) {
			e := newGrantEngine(t)
			resp, err := e.HandleRequest(t.Context(), &logical.Request{
				Operation: logical.UpdateOperation, Path: "tenants/acme/authorize", Data: map[string]any{"connector": "as"},
				Storage: e.storage, MountPoint: mountPoint, DisplayName: name,
			})
			require.NoError(t, err)
			p := e.open(e.allowed(resp.Data["authorization_url"].(string)))
			assert.Contains(t, p.text(), "Started by "+want+" Started at")
			to, form := p.form()
			assert.Equal(t, 200, e.visit(logical.UpdateOperation, to, form).status)
			assert.Equal(t, want, e.read("tenants/acme")["granted_by"])
		})
	}
}

// A person logs in twice with one link. The older page says that a newer one has replaced it, and the newer one connects the tenant.
func TestConfirmationOnTheOlderOfTwoPages(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newGrantEngine(t)
		address := e.start(byCode, nil)["authorization_url"].(string)
		to, older := e.open(e.allowed(address)).form()
		_, newer := e.open(e.allowed(address)).form()
		p := e.visit(logical.UpdateOperation, to, older)
		assert.Equal(t, 400, p.status)
		assert.Contains(t, p.text(), "a newer code has come with the same link since")
		assert.NotContains(t, p.text(), "neither a code nor an error")
		delete(older, "page")
		_, status, text := e.ask(logical.UpdateOperation, to, older)
		assert.Equal(t, 400, status)
		assert.Contains(t, text, "a newer code has come with the same link since")
		assert.Equal(t, attemptPending, e.attemptStatus(byCode))
		assert.Zero(t, e.sent(codeGrant))
		assert.Contains(t, e.visit(logical.UpdateOperation, to, newer).text(), "The tenant is connected")
	})
}

// Who has started an attempt knows its state, and cannot confirm it in the place of the person whose browser has brought the code. Nor can
// he put a code of his own in the place of the one that the person confirms.
func TestOnlyThePersonConfirms(t *testing.T) {
	for _, page := range []string{"", "1"} {
		bubble(t, func(t *testing.T) {
			e := newGrantEngine(t)
			back := e.authorize(nil)
			to, form := e.open(back).form()
			for _, guess := range []string{"", hashOf(""), hashOf(back["state"].(string)), back["state"].(string)} {
				data := map[string]any{"state": back["state"], "confirmation": guess}
				if page != "" {
					data["page"] = page
				}
				_, _, _ = e.ask(logical.UpdateOperation, "callback", data)
			}
			e.open(with(back, "code", "another-code"))
			p := e.visit(logical.UpdateOperation, to, form)
			assert.Equal(t, 400, p.status, "the code is not the one that the page was shown for")
			synctest.Wait()
			assert.Zero(t, e.sent(codeGrant))
			assert.Nil(t, e.stored("acme"))
			assert.Contains(t, e.confirm(back).text(), "The tenant is connected")
		})
	}
}

// No secret is in an answer, a page, a status, the log or an event, in any of these cases.
func TestGrantCanaries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newGrantEngine(t)
		var said strings.Builder
		secrets := map[string]string{}
		say := func(op logical.Operation, path string, data map[string]any) *logical.Response {
			resp, err := e.HandleRequest(context.Background(), &logical.Request{
				Operation: op, Path: path, Data: data, Storage: e.storage, MountPoint: mountPoint, DisplayName: "token-ada",
			})
			if err != nil {
				said.WriteString(err.Error())
			}
			if resp != nil {
				raw, _ := resp.Data[logical.HTTPRawBody].([]byte)
				said.Write(raw)
				shown := map[string]any{}
				for name, value := range resp.Data {
					if name != "authorization_url" && name != logical.HTTPRawBody {
						shown[name] = value
					}
				}
				text, err := json.Marshal([]any{shown, resp.Warnings})
				require.NoError(t, err)
				said.Write(text)
			}
			return resp
		}
		const read, write = logical.ReadOperation, logical.UpdateOperation
		note := func() {
			keys, err := logical.CollectKeys(t.Context(), e.storage.InmemStorage)
			require.NoError(t, err)
			for _, key := range keys {
				if name, ok := strings.CutPrefix(key, attemptKeys); ok {
					all, err := e.attemptsOf(t.Context(), name)
					require.NoError(t, err)
					for _, a := range all.Last {
						for what, secret := range map[string]string{"verifier": a.Verifier, "device code": a.DeviceCode, "code": a.Code, "number": strings.TrimPrefix(a.MobileNumber, "+")} {
							if secret != "" {
								secrets[what+" "+secret] = secret
							}
						}
					}
				}
			}
			if entry := e.stored("acme"); entry != nil {
				secrets["refresh token"+entry.RefreshToken] = entry.RefreshToken
			}
		}
		as := map[string]any{"connector": "as"}
		e.server.Set(func(o *oauth2test.Options) { o.Echo = true })
		for _, wrong := range []map[string]any{nil, {"iss": "x"}, {"code": "CODE-" + canary}, {"error": "ERROR-" + canary}, {"code": []any{"CODE-" + canary}}} {
			resp := say(write, "tenants/acme/authorize", as)
			note()
			back := e.allowed(resp.Data["authorization_url"].(string))
			secrets["code "+back["code"].(string)] = back["code"].(string)
			for name, value := range wrong {
				back[name] = value
			}
			say(read, "callback", back)
			note()
			say(write, "callback/as", back)
			say(write, "callback", back)
			say(read, "callback", back)
			say(read, "tenants/acme/authorize", nil)
			note()
		}
		for range 2 {
			resp := say(write, "tenants/acme/device", as)
			note()
			time.Sleep(6 * time.Second)
			say(read, "tenants/acme/device", nil)
			require.NoError(t, e.server.ApproveDevice(resp.Data["user_code"].(string), "jane"))
			time.Sleep(6 * time.Second)
			note()
		}
		for _, pin := range []any{"PIN-" + canary, []any{"PIN-" + canary}, nil} {
			say(write, "tenants/acme/pin", map[string]any{"mobile_number": e.kaizala.PhoneNumber("acme"), "connector": "default"})
			note()
			if pin == nil {
				pin = e.sentPIN()
				secrets["PIN"] = pin.(string)
			}
			say(write, "tenants/acme/pin", map[string]any{"pin": pin})
			say(read, "tenants/acme", nil)
			note()
		}
		secrets["canary"] = canary
		said.WriteString(e.log.String())
		said.WriteString(strings.Join(e.events.all(), "\n"))
		kinds := map[string]bool{}
		for what, secret := range secrets {
			kinds[strings.Fields(what)[0]] = true
			assert.NotContains(t, said.String(), secret, what)
		}
		assert.Len(t, kinds, 7, kinds)
	})
}
