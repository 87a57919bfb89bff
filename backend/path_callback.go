package backend

import (
	"context"
	"errors"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/share"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/tokenservice"
)

// stateForm is the form of a state: 256 bits in the alphabet of URLs.
var stateForm = regexp.MustCompile(`^[A-Za-z0-9_-]{43}$`)

func (b *backend) callbackPaths() []*framework.Path {
	fields := func() map[string]*framework.FieldSchema {
		return map[string]*framework.FieldSchema{
			"state": {
				Type:         framework.TypeString,
				Query:        true,
				Description:  "The state of the authorization, as the service sends it back.",
				DisplayAttrs: sensitive,
			},
			"code": {
				Type:         framework.TypeString,
				Query:        true,
				Description:  "The authorization code, as the service sends it.",
				DisplayAttrs: sensitive,
			},
			"iss":   {Type: framework.TypeString, Query: true, Description: "The issuer, as the service sends it (RFC 9207)."},
			"error": {Type: framework.TypeString, Query: true, Description: "Why the service grants no access, as the service says."},
			"confirmation": {
				Type:         framework.TypeString,
				Description:  "What the page's own form sends to confirm, in place of the code.",
				DisplayAttrs: sensitive,
			},
			"page": {Type: framework.TypeBool, Description: "Whether the answer is an HTML page, as the page's own form asks for. A read always answers with a page."},
		}
	}
	one := b.callbackPath("callback", "callback", fields())
	named := fields()
	named["connector"] = namedConnectorField["connector"]
	return []*framework.Path{one, b.callbackPath("callback/"+framework.GenericNameRegex("connector"), "connector-callback", named)}
}

func (b *backend) callbackPath(pattern, suffix string, fields map[string]*framework.FieldSchema) *framework.Path {
	page := map[int][]framework.Response{http.StatusOK: {{Description: "An HTML page for the person. Errors are pages too, with status 400.", MediaType: "text/html"}}}
	return &framework.Path{
		Pattern: pattern,
		Fields:  fields,
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.ReadOperation: operation("show", suffix, "Receive the person's browser from the authorization server.",
				"Needs no Vault token. The page asks the person to confirm; if the connector has confirm=false, the grant is stored at once.", page, b.callback),
			logical.UpdateOperation: operation("complete", suffix, "Complete an authorization.",
				"Needs no Vault token. For what the service has sent to the browser, pasted by hand, and for the page's form.",
				responses(http.StatusOK, "What was connected.", callbackFields), b.callback),
		},
		DisplayAttrs:    &framework.DisplayAttributes{OperationPrefix: operationPrefix},
		HelpSynopsis:    "The address to which the service sends a person's browser back.",
		HelpDescription: callbackHelp,
	}
}

var callbackFields = always(map[string]*framework.FieldSchema{
	"tenant": str("Name of the tenant that is connected."),
	"status": oneOf("granted; pending: the service has not answered yet, and the engine goes on.", attemptGranted, attemptPending),
})

// verdict is the result of a callback.
type verdict struct {
	// what is one of the constants below, or the status of an attempt.
	what    string
	attempt *attempt // nil where the state is not known
	text    string   // why it failed
	service string   // the token service's name
	subject string   // who has granted access, where the service says so
	state   string   // for the form that confirms
	code    string   // the one that is to be sent, or that the page asks to confirm
	err     error    // where nothing was sent and the person can try again
}

const (
	endUnknown   = "unknown"   // there is no such state
	endMisplaced = "misplaced" // it was made for another callback path
	endUsed      = "used"
	endEmpty     = "empty"    // neither a code nor an error, or one that nothing can be made of
	endReplaced  = "replaced" // the page that confirms was shown for an older code
	endConfirm   = "confirm"
	endSend      = "send" // the code can be sent
	endLater     = "later"
)

// showsPage says whether a request is answered with a page whatever its fields are: the read of a person's browser.
func showsPage(req *logical.Request) bool {
	atCallback := req.Path == "callback" || strings.HasPrefix(req.Path, "callback/")
	return atCallback && req.Operation == logical.ReadOperation && !isWrapped(req)
}

func isWrapped(req *logical.Request) bool { return req.WrapInfo != nil && req.WrapInfo.TTL > 0 }

// callback handles the service's redirect. It needs no Vault token, so it makes only one read of storage before it has found the
// state.
func (b *backend) callback(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	if isWrapped(req) {
		// Vault would store the answer, on a request without a token.
		return nil, badValue("callback does not wrap its answer: send the request again without a wrapping TTL")
	}
	if !b.node.WriteSafeReplicationState() {
		return nil, logical.ErrReadOnly
	}
	ctx, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	page := req.Operation == logical.ReadOperation || d.Get("page").(bool)
	end, err := b.receive(ctx, req.Operation == logical.ReadOperation, d)
	switch {
	case err != nil:
		return answer(err)
	case page:
		return pageResponse(end, req.MountPoint), nil
	}
	return end.response(d)
}

// response is the answer to a person who has pasted a code by hand.
func (e *verdict) response(d *framework.FieldData) (*logical.Response, error) {
	switch e.what {
	case attemptGranted, attemptPending:
		resp := &logical.Response{Data: map[string]any{"tenant": e.attempt.Tenant, "status": e.what}}
		if e.what == attemptPending {
			resp.AddWarning("The service has not answered yet. The engine waits for it: read tenants/" + e.attempt.Tenant + "/authorize in a minute.")
		}
		return resp, nil
	case endLater:
		return answer(e.err)
	}
	text := pageTexts[e.what]
	why := text.title + ". " + text.text
	if e.text != "" {
		why = text.title + ": " + e.text
	}
	return answer(badValue("%s", why))
}

// receive handles a callback, and returns its result.
func (b *backend) receive(ctx context.Context, asks bool, d *framework.FieldData) (*verdict, error) {
	callback := ""
	if d.Schema["connector"] != nil {
		callback, _ = d.Raw["connector"].(string)
	}
	state := textOf(d, "state")
	if !stateForm.MatchString(state) {
		return &verdict{what: endUnknown}, nil
	}
	hash := hashOf(state)
	s, err := getEntry[stateEntry](ctx, b.storage, stateKeys+hash)
	if err != nil {
		return nil, err
	}
	switch {
	case s == nil:
		return &verdict{what: endUnknown}, nil
	case s.Callback != callback:
		return &verdict{what: endMisplaced}, nil
	case s.Status == attemptSuperseded, s.Status == attemptExpired:
		return &verdict{what: s.Status}, nil
	case s.Used || s.Status != attemptPending:
		return &verdict{what: endUsed}, nil
	case !time.Now().Before(s.Expires):
		return &verdict{what: attemptExpired}, nil
	}
	var end *verdict
	err = b.changeAttempts(ctx, s.Tenant, func(all *attempts) (err error) {
		end, err = b.examine(ctx, all.Last[byCode], hash, asks, d)
		return err
	})
	if err != nil || end.what != endSend {
		return end, err
	}
	return b.redeem(ctx, end.attempt, end.code)
}

// examine checks a callback for an attempt, and ends the attempt if it fails or is denied.
func (b *backend) examine(ctx context.Context, a *attempt, hash string, asks bool, d *framework.FieldData) (*verdict, error) {
	if a == nil || a.State != hash {
		return &verdict{what: attemptSuperseded}, nil
	}
	_, v, err := b.tenants.load(ctx, a.Tenant)
	if err != nil {
		return nil, err
	}
	switch status, text := b.statusOf(a, v); {
	case status == attemptSuperseded, status == attemptExpired:
		if a.Status == status {
			b.noteState(ctx, a) // storage has it, but for the entry of the state
		}
		a.close(status, text)
		return &verdict{what: status, attempt: a}, nil
	case status != attemptPending, a.Used, b.grants.works(a.ID):
		return &verdict{what: endUsed, attempt: a}, nil
	}
	via, err := b.connectors.get(ctx, a.Connector)
	if err != nil {
		return nil, err
	}
	end := &verdict{attempt: a, service: b.serviceName(a.Connector)}
	end.what, end.text, end.code = a.meaning(via, asks, d)
	switch end.what {
	case endConfirm:
		a.Code, end.state = end.code, textOf(d, "state")
	case attemptFailed, attemptDenied:
		a.close(end.what, end.text)
	}
	return end, nil
}

// meaning says what the parameters of a callback mean for a pending attempt, and why it has failed if it has. via is nil where the connector
// was deleted.
func (a *attempt) meaning(via *loadedConnector, asks bool, d *framework.FieldData) (what, text, code string) {
	flow := tokenservice.CodeFlow(nil)
	if via != nil {
		flow, _ = via.service.(tokenservice.CodeFlow)
	}
	if flow == nil || !a.comesFrom(via) {
		return attemptFailed, "Connector \"" + a.Connector + "\" was deleted, or is for another service now: start again.", ""
	}
	code, refusal := textOf(d, "code"), textOf(d, "error")
	issuer, promised := flow.Issuer()
	switch iss := textOf(d, "iss"); {
	case issuer != "" && iss != "" && iss != issuer:
		return attemptFailed, "The answer names another issuer (iss) than the connector does, so nothing was sent to the service: check the address that the browser was sent to, and start again.", ""
	case code == "" && refusal == "" && !asks && textOf(d, "confirmation") != "":
		// The browser that has brought the code confirms what the page was shown for. The state alone does not: who has started the
		// attempt knows it.
		if textOf(d, "confirmation") != hashOf(a.Code) {
			return endReplaced, "", ""
		}
		code = a.Code
	case promised && iss == "" && (code != "" || refusal != ""):
		return attemptFailed, "The service promises to send iss with its answer, and iss is missing. The answer may come from another server, so nothing was sent to the service: start again.", ""
	}
	service := upperFirst(via.about.Name)
	switch {
	case refusal == "access_denied":
		return attemptDenied, "", ""
	case refusal == "server_error", refusal == "temporarily_unavailable":
		return attemptFailed, service + " is failing (" + refusal + "): start again later.", ""
	case slices.Contains(asksPerson, refusal):
		return attemptFailed, service + " has to ask the person first (" + refusal + "): start again, and log in and answer there. " +
			"If it asks nothing, the operator has to check prompt in authorization_params.", ""
	case slices.Contains(refusesSettings, refusal):
		return attemptFailed, service + " grants nothing (" + refusal + "): the operator has to check the connector's settings there and here.", ""
	case refusal != "":
		return attemptFailed, service + " grants nothing: the operator has to check the connector's settings there and here.", ""
	case tokenservice.CheckToken(code) != nil:
		return endEmpty, "", ""
	case asks && via.consent().confirm:
		return endConfirm, "", code
	}
	return endSend, "", code
}

// asksPerson are the codes by which the server says that it must ask the person something, and has not (OpenID Connect Core, section
// 3.1.2.6).
var asksPerson = []string{"interaction_required", "login_required", "account_selection_required", "consent_required"}

// refusesSettings are the other registered codes of an authorization error. What is no registered code is text of the service, or of
// another sender, which no answer of the engine may hold.
var refusesSettings = []string{"invalid_request", "unauthorized_client", "unsupported_response_type", "invalid_scope", "invalid_target"}

// errUsed ends a redemption whose state is used up, or whose attempt has ended.
var errUsed = errors.New("the state is used up")

// redeem sends a code, and stores the tokens that come for it. It waits no longer than its context; the work goes on after that.
func (b *backend) redeem(ctx context.Context, a *attempt, code string) (*verdict, error) {
	end := &verdict{attempt: a}
	done := make(chan struct{})
	var err error
	if !b.goToService(func() {
		defer close(done)
		err = b.sendCode(a, code, end)
	}) {
		return nil, errStopping
	}
	select {
	case <-done:
		return end, err
	case <-ctx.Done():
		return &verdict{what: attemptPending, attempt: a, service: b.serviceName(a.Connector)}, nil
	}
}

func (b *backend) sendCode(a *attempt, code string, end *verdict) error {
	for {
		via, err := b.connectors.of(b.ctx, a.Connector)
		if err != nil {
			return b.notSent(end, err)
		}
		end.service = via.about.Name
		flow, ok := via.service.(tokenservice.CodeFlow)
		if !ok {
			return b.notSent(end, via.offers(byCode))
		}
		if !a.comesFrom(via) {
			end.what, end.text = b.finish(a, via, a.connectorHasMoved())
			return nil
		}
		used := false
		p := passage{
			via: via, want: share.Want{Class: share.Background, Wait: patience}, stopping: b.isStopping,
			noted: func(ctx context.Context) error {
				// A state is used up before its code is sent, and the code is sent once.
				err := b.useUp(ctx, a)
				used = err == nil
				return err
			},
		}
		result := flow.RedeemCode(b.ctx, tokenservice.CodeRedemption{Code: code, RedirectURI: a.RedirectURI, Verifier: a.Verifier, Permit: p.permit})
		sent := p.call != nil && !errors.Is(result.Err, errReplaced)
		if used && !sent {
			b.giveBack(a)
		}
		switch {
		case sent:
			storeVerdict := b.connectors.judge(via, result.Err)
			end.what, end.text = b.finish(a, via, result)
			b.grants.leave(a.ID)
			storeVerdict(b.ctx)
			end.subject = result.Subject
			return nil
		case errors.Is(result.Err, errReplaced):
			continue // the connector was written meanwhile: go by what it is now
		case errors.Is(result.Err, errUsed):
			end.what = endUsed
			return nil
		}
		// Nothing was sent, so the state can still be used.
		return b.notSent(end, result.Err)
	}
}

// notSent says why a request to the service was not made.
func (b *backend) notSent(end *verdict, err error) error {
	a := end.attempt
	if err = b.readerError(a.Tenant, a.Connector, err); !errors.As(err, new(logical.HTTPCodedError)) {
		return err
	}
	end.what, end.err = endLater, err
	return nil
}

// useUp stores, before a code is sent, that its state is used, so that the code is not sent again, also after a restart.
func (b *backend) useUp(ctx context.Context, a *attempt) error {
	claimed := false
	err := b.changeAttempts(ctx, a.Tenant, func(all *attempts) error {
		present := all.byID(a.ID)
		if present == nil || present.Used {
			return errUsed
		}
		_, v, err := b.tenants.load(ctx, a.Tenant)
		if err != nil {
			return err
		}
		if status, _ := b.statusOf(present, v); status != attemptPending {
			return errUsed
		}
		if claimed = b.grants.claim(a.ID); !claimed {
			return errUsed
		}
		present.Used, present.Code = true, ""
		return nil
	})
	if err != nil && claimed {
		b.grants.leave(a.ID) // storage has not taken it, so nothing is sent
	}
	return err
}

// giveBack makes a state good again whose code was not sent. Where storage fails, the person has to start again.
func (b *backend) giveBack(a *attempt) {
	_ = b.changeAttempts(b.ctx, a.Tenant, func(all *attempts) error {
		if present := all.byID(a.ID); present != nil && present.Status == attemptPending {
			present.Used, present.Code = false, a.Code
			b.noteState(b.ctx, present) // first, so that the attempt is not pending with a state that is used
		}
		return nil
	})
	b.grants.leave(a.ID)
}
