package backend

import (
	"context"
	"errors"
	"net/http"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/share"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/tokenservice"
)

// loginWithPIN has a PIN sent to a phone, and in a second request takes it for a refresh token.
func (b *backend) loginWithPIN(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	number, pin := textOf(d, "mobile_number"), textOf(d, "pin")
	if (number == "") == (pin == "") {
		return nil, badValue("give mobile_number, and the service sends a PIN there; then give pin alone")
	}
	if number != "" {
		return b.sendPIN(ctx, req, d, number)
	}
	return b.takePIN(ctx, d, pin)
}

func (b *backend) sendPIN(ctx context.Context, req *logical.Request, d *framework.FieldData, number string) (*logical.Response, error) {
	a, via, err := b.newAttempt(ctx, req, d, byPIN)
	if err != nil {
		return nil, err
	}
	p := passage{via: via, want: share.Want{Class: share.Background, Wait: patience}, tellsNothing: true} // no secret is sent
	if err := via.service.(tokenservice.PINFlow).SendPIN(ctx, number, p.permit); err != nil {
		return nil, b.notBegun(ctx, a, via, err)
	}
	a.MobileNumber = number
	if err := b.begin(ctx, a); err != nil {
		return nil, err
	}
	return b.warnOfLeases(&logical.Response{Data: attemptData(a, attemptPending, "")}, a), nil
}

// takePIN turns a PIN into a refresh token. A PIN that is refused can be corrected while the attempt is pending.
func (b *backend) takePIN(ctx context.Context, d *framework.FieldData, pin string) (*logical.Response, error) {
	name, err := nameOf(d, "tenant")
	if err != nil {
		return nil, err
	}
	a, err := b.pending(ctx, name, byPIN)
	switch {
	case err != nil:
		return nil, err
	case a == nil:
		return nil, badValue("no PIN is awaited for tenant %q: give mobile_number first, and then the PIN within ten minutes", name)
	case d.Raw["connector"] != nil && textOf(d, "connector") != a.Connector:
		return nil, badValue("the PIN of tenant %q was sent through connector %q: give that one, or none", name, a.Connector)
	case !b.grants.claim(a.ID):
		return nil, tryAgain("a PIN of tenant %q is being tried already: read tenants/%s in a minute", name, name)
	}
	end := &verdict{attempt: a}
	done := make(chan struct{})
	if !b.goToService(func() {
		defer close(done)
		err = b.redeemPIN(a, pin, end)
	}) {
		b.grants.leave(a.ID)
		return nil, errStopping
	}
	select {
	case <-done:
	case <-ctx.Done():
		return nil, tryAgain("%s has not answered yet: the engine goes on; read tenants/%s in a minute", upperFirst(b.serviceName(a.Connector)), name)
	}
	switch {
	case err != nil:
		return nil, err
	case end.what == attemptGranted, end.what == attemptPending:
		resp := &logical.Response{Data: attemptData(a, end.what, "")}
		if _, v := b.tenants.cached(name); v != nil && v.trouble != nil && end.what == attemptGranted {
			resp.AddWarning("The refresh token is stored, but " + v.trouble.text)
		}
		return resp, nil
	case end.what == attemptSuperseded:
		return nil, badValue("a newer attempt, a write or a delete of tenant %q came meanwhile: nothing was stored; look at the tenant, and start again", name)
	}
	return nil, badValue("%s", end.text)
}

// redeemPIN sends a PIN, and stores what comes for it. Its error says what to do where the attempt goes on.
func (b *backend) redeemPIN(a *attempt, pin string, end *verdict) error {
	defer b.grants.leave(a.ID)
	for {
		via, err := b.connectors.of(b.ctx, a.Connector)
		if err != nil {
			return err
		}
		flow, ok := via.service.(tokenservice.PINFlow)
		if !ok {
			return via.offers(byPIN)
		}
		p := passage{
			via: via, want: share.Want{Class: share.Background, Wait: patience}, stopping: b.isStopping,
			noted: func(ctx context.Context) error {
				// For a PIN, Kaizala ends the user's present refresh token: one of an attempt that has ended is not sent.
				present, err := b.pending(ctx, a.Tenant, byPIN)
				if err == nil && (present == nil || present.ID != a.ID) {
					err = errUsed
				}
				return err
			},
		}
		result := flow.RedeemPIN(b.ctx, a.MobileNumber, pin, p.permit)
		switch {
		case result.RefreshToken != "":
		case errors.Is(result.Err, errReplaced):
			continue // the connector was written meanwhile: go by what it is now
		case errors.Is(result.Err, errUsed):
			end.what = attemptSuperseded
			return nil
		}
		storeVerdict := b.connectors.judge(via, result.Err)
		if result.RefreshToken != "" {
			end.what, end.text = b.finish(a, via, result)
			storeVerdict(b.ctx)
			return nil
		}
		storeVerdict(b.ctx)
		return b.pinRefused(a, via, result.Err)
	}
}

// pinRefused says what is wrong with a PIN, or with the service.
func (b *backend) pinRefused(a *attempt, via *loadedConnector, err error) error {
	failure := (*tokenservice.Failure)(nil)
	if errors.As(err, &failure) {
		switch failure.Kind {
		case tokenservice.RefusedRefreshToken, tokenservice.Refused:
			return badValue("%s", failure.Text)
		case tokenservice.Unavailable:
			return logical.CodedError(http.StatusServiceUnavailable, "nothing was stored: "+failure.Text)
		}
	}
	return b.readerError(a.Tenant, a.Connector, err)
}
