package backend

import (
	"bytes"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"html/template"
	"net/http"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
)

// The page that a person's browser shows is one document: no script, nothing from elsewhere, and nothing of what the browser
// has sent. Vault lets an engine set few headers, so the policies for content and for the referrer are in the document.

//go:embed page.html
var pageSource string

//go:embed page.css
var pageStyle string

var pageTemplate = template.Must(template.New("page").Parse(pageSource))

// pagePolicy allows the page's own style sheet and its own form.
func pagePolicy() string {
	sum := sha256.Sum256([]byte(pageStyle))
	return "default-src 'none'; base-uri 'none'; form-action 'self'; style-src 'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"
}

// page is what the template shows.
type page struct {
	Policy  string
	Style   template.CSS
	Title   string
	Good    bool // something was connected
	Texts   []string
	Details []detail
	Form    string // where the form goes; "" for no form
	// State and Confirmation are what the form sends.
	State, Confirmation string
}

type detail struct{ Name, Value string }

// pageText is what a callback's end means to a person, on the page and in an answer.
type pageText struct{ title, text string }

var pageTexts = map[string]pageText{
	endConfirm: {"Connect this tenant?",
		"If you did not start this, and do not know who did, close this page: then nothing is connected."},
	attemptGranted: {"The tenant is connected",
		"Vault keeps the access that you have granted. You can close this page."},
	attemptPending: {"Not finished yet",
		"The service has not answered yet. Vault waits for it, and you can close this page. The person who started this can see the result in Vault."},
	attemptDenied: {"Access was denied",
		"Nothing was connected. If that was a mistake, start again in Vault."},
	attemptExpired: {"Too late",
		"Nothing was connected: the time to grant access had passed. Start again in Vault."},
	attemptFailed: {"Nothing was connected",
		"Start again in Vault."},
	attemptSuperseded: {"This link is out of date",
		"Nothing was connected with this link: after it was made, the tenant was written or deleted, or a newer authorization was started. Look at the tenant in Vault, and start again if it is not as it should be."},
	endUsed: {"This link has been used",
		"A link works once, so nothing was connected now. Look at the tenant in Vault, and start again if it is not as it should be."},
	endUnknown: {"This link is not known",
		"Nothing was connected: the link is incomplete, is not from this Vault, or is too old. Start again in Vault."},
	endMisplaced: {"This link is for another address",
		"Nothing was connected: the service's answer came to another callback address than the one that this link was made for. Start again in Vault. If another person has sent you the link, tell your Vault operator."},
	endEmpty: {"Something is missing",
		"Nothing was connected: the service has sent neither a code nor an error that can be used. Open the authorization again."},
	endReplaced: {"This page is out of date",
		"Nothing was connected: a newer code has come with the same link since, as happens when you log in twice. Confirm on the page that your last login has shown, or start again in Vault."},
	endLater: {"Not now",
		"Nothing was sent to the service, and nothing was connected. The link stays valid until its ten minutes are over. Reload this page later. The reason is below."},
}

// pageResponse makes the page of what a callback has come to.
func pageResponse(end *verdict, mount string) *logical.Response {
	text := pageTexts[end.what]
	p := page{Policy: pagePolicy(), Style: template.CSS(pageStyle), Title: text.title, Texts: []string{text.text}}
	status := http.StatusBadRequest
	a := end.attempt
	switch end.what {
	case endConfirm:
		status = http.StatusOK
		p.Texts = []string{"Once you confirm, Vault keeps the access that you have just granted, and apps use it in your name.", text.text}
		// The address of the page has the code in it; the form's does not.
		p.Form, p.State, p.Confirmation = "callback", end.state, hashOf(end.code)
		if a.Callback != "" {
			p.Form = a.Callback
		}
	case attemptGranted:
		status, p.Good = http.StatusOK, true
		p.Texts = append(p.Texts, "To undo it, ask your Vault operator to delete the tenant (vault delete "+mount+"tenants/"+a.Tenant+"), and withdraw the access at "+end.service+".")
	case attemptPending, attemptDenied:
		status = http.StatusOK
	case attemptFailed:
		if end.text != "" {
			p.Texts = []string{end.text}
		}
	case endLater:
		p.Texts = append(p.Texts, upperFirst(end.err.Error())+".")
	}
	if a != nil && (end.what == endConfirm || end.what == attemptGranted || end.what == attemptPending || end.what == attemptDenied || end.what == attemptFailed) {
		p.Details = []detail{
			{"Tenant", a.Tenant},
			{"Mount", mount},
			{"Service", end.service},
			{"Started by", a.By},
			{"Started at", a.Begun.UTC().Format(time.RFC1123)},
		}
		if end.subject != "" {
			p.Details = append(p.Details, detail{"Granted by", end.subject})
		}
	}
	var body bytes.Buffer
	if err := pageTemplate.Execute(&body, p); err != nil {
		status = http.StatusInternalServerError // strings into a buffer: it cannot be
	}
	return &logical.Response{Data: map[string]any{
		logical.HTTPContentType:        "text/html; charset=utf-8",
		logical.HTTPStatusCode:         status,
		logical.HTTPRawBody:            body.Bytes(),
		logical.HTTPCacheControlHeader: "no-store",
	}}
}
