package backend

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/tokenservice"
)

const (
	// maxHintBytes bounds a login_hint.
	maxHintBytes = 320
	// maxByBytes bounds who has started an attempt, as a subject is bounded.
	maxByBytes = 255
)

// consentSettings are what a connector says about the paths authorize and device. The settings of a kind of service that has
// these paths have them; the others do not.
type consentSettings interface {
	consent() consent
}

type consent struct {
	scopes, redirectURIs                     []string
	authorizationURL, deviceAuthorizationURL string
	// confirm: a person confirms on the page before a grant is stored.
	confirm bool
}

func (l *loadedConnector) consent() consent {
	if s, ok := l.entry.Settings.(consentSettings); ok {
		return s.consent()
	}
	return consent{}
}

// server is the address of the service at which an attempt by a path begins; "" where it has none of its own.
func (l *loadedConnector) server(path string) string {
	switch c := l.consent(); path {
	case byCode:
		return c.authorizationURL
	case byDevice:
		return c.deviceAuthorizationURL
	}
	return ""
}

func (b *backend) grantPaths() []*framework.Path {
	authorize := b.grantPath(byCode, map[string]*framework.FieldSchema{
		"connector":  grantConnectorField,
		"scopes":     grantScopesField,
		"login_hint": loginHintField,
		"redirect_uri": str("The address to which the service sends the person's browser back: one of the connector's redirect_uris. " +
			"Needed if there are several."),
	})
	authorize.Operations = map[logical.Operation]framework.OperationHandler{
		logical.UpdateOperation: operation("start", "authorization", "Begin the authorization code flow for a tenant.",
			"Returns a URL for the browser of the person who grants access. It ends an earlier attempt that is still pending.",
			responses(http.StatusOK, "Where the person's browser goes, and until when.", authorizeFields), b.granting(b.startAuthorization)),
		logical.ReadOperation: operation("read", "authorization-status", "Read how a tenant's last authorization has ended.",
			"The answer holds no secret. It is a 404 before the first authorization.",
			responses(http.StatusOK, "How it has ended, or that it is pending.", attemptFields), b.granting(b.readAttempt(byCode))),
	}
	authorize.HelpSynopsis, authorize.HelpDescription = "Get a tenant's refresh token by a person's consent in a browser.", authorizeHelp

	device := b.grantPath(byDevice, map[string]*framework.FieldSchema{
		"connector": grantConnectorField, "scopes": grantScopesField, "login_hint": loginHintField,
	})
	device.Operations = map[logical.Operation]framework.OperationHandler{
		logical.UpdateOperation: operation("start", "device-authorization", "Begin the device authorization flow for a tenant.",
			"Returns a code that a person enters at the service, on any device. The engine asks the service until the person has decided.",
			responses(http.StatusOK, "The code, and where a person enters it.", deviceFields), b.granting(b.startDevice)),
		logical.ReadOperation: operation("read", "device-authorization-status", "Read how a tenant's last device authorization has ended.",
			"The answer holds no secret. It is a 404 before the first device authorization.",
			responses(http.StatusOK, "How it has ended, or that it is pending.", attemptFields), b.granting(b.readAttempt(byDevice))),
	}
	device.HelpSynopsis, device.HelpDescription = "Get a tenant's refresh token by a code that a person enters on another device.", deviceHelp

	pin := b.grantPath(byPIN, map[string]*framework.FieldSchema{
		"connector": grantConnectorField,
		"mobile_number": {
			Type:         framework.TypeString,
			Description:  "Phone number of the user, with a plus sign and the country code, that the service sends a PIN to. Kept until the PIN has come back, for ten minutes at most, and never returned.",
			DisplayAttrs: sensitive,
		},
		"pin": {
			Type:         framework.TypeString,
			Description:  "PIN that has come by SMS.",
			DisplayAttrs: sensitive,
		},
	})
	pin.Operations = map[logical.Operation]framework.OperationHandler{
		logical.UpdateOperation: operation("login", "with-pin", "Log a tenant's user in by a PIN that comes by SMS.",
			"With mobile_number the service sends a PIN; with pin, in a second request, the service hands the refresh token to the engine.",
			responses(http.StatusOK, "How it has ended, or that it is pending.", pinFields), b.granting(b.loginWithPIN)),
	}
	pin.HelpSynopsis, pin.HelpDescription = "Get a tenant's refresh token by a PIN that comes by SMS.", pinHelp
	return append([]*framework.Path{authorize, device, pin}, b.callbackPaths()...)
}

func (b *backend) grantPath(name string, fields map[string]*framework.FieldSchema) *framework.Path {
	fields["tenant"] = tenantField
	return &framework.Path{
		Pattern:      "tenants/" + framework.GenericNameRegex("tenant") + "/" + name,
		Fields:       fields,
		DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: operationPrefix},
	}
}

// granting is what the operations of the paths by which access is granted have in common: they run on the node that may write alone, answer
// in time, and have their errors turned into answers.
func (b *backend) granting(f framework.OperationFunc) framework.OperationFunc {
	return func(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
		if !b.node.WriteSafeReplicationState() {
			return nil, logical.ErrReadOnly
		}
		ctx, cancel := context.WithTimeout(ctx, answerWithin)
		defer cancel()
		resp, err := f(ctx, req, d)
		if err != nil {
			return answer(err)
		}
		return resp, nil
	}
}

var (
	grantConnectorField = str("Name of the connector that the grant is for: the tenant's own where it is left out, or else \"" + defaultConnector + "\".")
	grantScopesField    = &framework.FieldSchema{
		Type:        framework.TypeCommaStringSlice,
		Description: "Scopes to ask for, of those that the connector names: all of them where it is left out.",
	}
	loginHintField = str("Which user is expected to grant access, as the service knows the user; sent to the service as login_hint.")

	authorizeFields = always(map[string]*framework.FieldSchema{
		"authorization_url": str("Where the person's browser goes. A person who has this URL can connect another account to the tenant: give it only to the person who grants access."),
		"expire_time":       timeOf("The time by which the person has to come back"),
	})
	deviceFields = merged(always(map[string]*framework.FieldSchema{
		"user_code":        str("Code that the person enters."),
		"verification_uri": str("Where the person enters it."),
		"expire_time":      timeOf("The time by which the person has to decide"),
	}), map[string]*framework.FieldSchema{
		"verification_uri_complete": str("The same with the code in it, where the service has one."),
	})
	pinFields = always(map[string]*framework.FieldSchema{
		"status":      oneOf("pending: the PIN was sent by SMS, or the service has not answered yet; granted: the refresh token is stored.", attemptPending, attemptGranted),
		"expire_time": timeOf("The time by which the PIN has to be written"),
	})
	attemptFields = merged(always(map[string]*framework.FieldSchema{
		"status": oneOf("pending; granted: the refresh token is stored; denied: the person, or the service, has denied access; expired: the person has not decided in time; failed: see last_error; superseded: a newer attempt, a write of the tenant's refresh_token or connector, or a delete of the tenant came meanwhile.",
			attemptPending, attemptGranted, attemptDenied, attemptExpired, attemptFailed, attemptSuperseded),
		"expire_time": timeOf("End of the attempt"),
	}), map[string]*framework.FieldSchema{
		"last_error": str("Why it failed, and what to do. Absent otherwise."),
	})
)

// newAttempt makes an attempt for a tenant, after all checks that need no call. The caller stores it.
func (b *backend) newAttempt(ctx context.Context, req *logical.Request, d *framework.FieldData, path string) (*attempt, *loadedConnector, error) {
	name, err := nameOf(d, "tenant")
	if err != nil {
		return nil, nil, err
	}
	t, v, err := b.tenants.load(ctx, name)
	if err != nil {
		return nil, nil, err
	}
	if v.kept != nil && v.kept.granted() {
		return nil, nil, keptTrouble(name) // which ends this attempt once storage takes it
	}
	next := tenantEntry{Connector: defaultConnector, RefreshToken: "to come"}
	if t != nil {
		next = *v.entry
	}
	if d.Raw["connector"] != nil {
		next.Connector = textOf(d, "connector")
		if err := checkName(next.Connector, "connector"); err != nil {
			return nil, nil, err
		}
	}
	via, err := b.connectors.of(ctx, next.Connector)
	if err == nil {
		err = via.offers(path)
	}
	if err == nil {
		err = via.incomplete
	}
	if err == nil {
		err = b.tenants.validate(ctx, &next)
	}
	if err != nil {
		return nil, nil, err
	}
	// Who logs in to Vault may choose the display name, a claim of a JWT for example. A person goes by it on the confirmation page, so it
	// is bounded, and has no control characters and none that turn the direction of the text.
	by := strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return unicode.ReplacementChar
		}
		return r
	}, req.DisplayName)
	if len(by) > maxByBytes {
		by = strings.ToValidUTF8(by[:maxByBytes], "") + "…"
	}
	now := time.Now().UTC().Truncate(time.Millisecond)
	return &attempt{
		ID: rand.Text(), Path: path, Tenant: name, Connector: next.Connector, Server: via.server(path), By: by,
		Begun: now, Expires: now.Add(attemptLife), Status: attemptPending, Lineage: v.storedLineage(), Next: rand.Text(),
	}, via, nil
}

// offers says what a service can do where it cannot do this.
func (l *loadedConnector) offers(path string) error {
	_, code := l.service.(tokenservice.CodeFlow)
	_, device := l.service.(tokenservice.DeviceFlow)
	_, pin := l.service.(tokenservice.PINFlow)
	var can []string
	for _, flow := range []struct {
		path string
		can  bool
	}{{byCode, code}, {byDevice, device}, {byPIN, pin}} {
		if flow.can && flow.path == path {
			return nil
		}
		if flow.can {
			can = append(can, "tenants/NAME/"+flow.path)
		}
	}
	return badValue("connector %q is for %s, which does not offer %s: use %s", l.name, l.about.Name, path, orNone(append(can, "a write of refresh_token to tenants/NAME")))
}

func orNone(texts []string) string {
	if len(texts) == 0 {
		return "none"
	}
	return strings.Join(texts, " or ")
}

// warnOfLeases says what a grant will do to the leases that there are.
func (b *backend) warnOfLeases(resp *logical.Response, a *attempt) *logical.Response {
	if t := b.tenants.named(a.Tenant); t != nil && t.hasLeases(time.Now()) {
		resp.AddWarning("Tenant \"" + a.Tenant + "\" has live leases: once access is granted, their access tokens are given up.")
	}
	return resp
}

// asked reads the scopes and the hint of a request.
func (l *loadedConnector) asked(d *framework.FieldData) (scopes []string, hint string, err error) {
	scopes, err = scopesWithin(scopesOf(d, "scopes"), l.consent().scopes)
	hint = textOf(d, "login_hint")
	if err == nil && (len(hint) > maxHintBytes || strings.ContainsFunc(hint, func(r rune) bool { return r < ' ' })) {
		err = badValue("login_hint has to be one line of %d bytes at most", maxHintBytes)
	}
	return scopes, hint, err
}

// startAuthorization begins the authorization code flow with PKCE (RFC 7636).
func (b *backend) startAuthorization(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	a, via, err := b.newAttempt(ctx, req, d, byCode)
	if err != nil {
		return nil, err
	}
	scopes, hint, err := via.asked(d)
	if err != nil {
		return nil, err
	}
	if a.RedirectURI, err = via.redirectURI(textOf(d, "redirect_uri")); err != nil {
		return nil, err
	}
	a.Callback = callbackOf(a.RedirectURI)
	flow := via.service.(tokenservice.CodeFlow)
	if err := b.unmixed(ctx, a, flow); err != nil {
		return nil, err
	}
	state := random256()
	a.State, a.Verifier = hashOf(state), random256()
	challenge := sha256.Sum256([]byte(a.Verifier))
	address, err := flow.AuthorizationURL(tokenservice.AuthorizationRequest{
		RedirectURI: a.RedirectURI, State: state, Challenge: base64.RawURLEncoding.EncodeToString(challenge[:]),
		Scopes: scopes, LoginHint: hint,
	})
	if err != nil {
		return nil, fieldProblem(err)
	}
	if err := b.begin(ctx, a); err != nil {
		return nil, err
	}
	resp := &logical.Response{Data: map[string]any{
		"authorization_url": address,
		"expire_time":       stamp(a.Expires),
	}}
	if r := via.refusal.Load(); r != nil {
		resp.AddWarning("The person's consent may have to wait. " + readerError(via.about, a.Tenant, via.name, r.failure).Error() + ".")
	}
	return b.warnOfLeases(resp, a), nil
}

// random256 returns 256 random bits in the alphabet of URLs.
func random256() string {
	var bits [32]byte
	_, _ = rand.Read(bits[:]) // which never fails
	return base64.RawURLEncoding.EncodeToString(bits[:])
}

// hashOf is what storage keeps in place of a state or of a refresh token that the service has replaced, and what the page has in place of
// a code.
func hashOf(secret string) string {
	sum := sha256.Sum256([]byte(secret))
	return hex.EncodeToString(sum[:])
}

// redirectURI returns the redirect URI that a request names, or the connector's only one.
func (l *loadedConnector) redirectURI(asked string) (string, error) {
	configured := l.consent().redirectURIs
	switch {
	case len(configured) == 0:
		return "", badValue("redirect_uris of connector %q is missing: the operator has to write it to %s, such as https://vault.example.com/v1/kaizala/callback, exactly as registered with the service", l.name, configPath(l.name))
	case asked == "" && len(configured) > 1:
		return "", badValue("redirect_uri is required, since connector %q has several: %s", l.name, orNone(configured))
	case asked == "":
		return configured[0], nil
	case !slices.Contains(configured, asked):
		return "", badValue("redirect_uri has to be one of connector %q's redirect_uris: %s", l.name, orNone(configured))
	}
	return asked, nil
}

// callbackOf returns the connector's name in a redirect URI that ends in callback/NAME, "" in any other.
func callbackOf(redirectURI string) string {
	u, err := url.Parse(redirectURI)
	if err != nil {
		return ""
	}
	parts := strings.Split(strings.Trim(u.Path, "/"), "/")
	if n := len(parts); n >= 2 && parts[n-2] == "callback" {
		return parts[n-1]
	}
	return ""
}

// unmixed refuses an authorization whose answer could be taken for one of another authorization server (RFC 9700, section
// 4.4): where several connectors of the mount have this flow, either the callback or iss must tell them apart.
func (b *backend) unmixed(ctx context.Context, a *attempt, flow tokenservice.CodeFlow) error {
	if a.Callback != "" && a.Callback != a.Connector {
		return badValue("redirect_uri ends in callback/%s, which is not connector %q's: use one that ends in callback/%s", a.Callback, a.Connector, a.Connector)
	}
	if _, promised := flow.Issuer(); promised || a.Callback == a.Connector {
		return nil
	}
	names, err := b.storage.List(ctx, connectorPrefix)
	if err != nil {
		return err
	}
	for _, name := range names {
		if name == a.Connector {
			continue
		}
		other, err := getConnector(ctx, b.storage, name)
		if ignoreUnusable(err) != nil {
			return err
		}
		if other == nil {
			continue
		}
		if _, also := other.Settings.(consentSettings); also {
			return badValue("connector %q is not the only one of this mount with this flow, and its server does not promise iss: use a redirect_uri that ends in callback/%s, or an answer of one server could be taken for one of the other", a.Connector, a.Connector)
		}
	}
	return nil
}

// readAttempt answers with the status of a tenant's last attempt by a path.
func (b *backend) readAttempt(path string) framework.OperationFunc {
	return func(ctx context.Context, _ *logical.Request, d *framework.FieldData) (*logical.Response, error) {
		name, err := nameOf(d, "tenant")
		if err != nil {
			return nil, nil
		}
		all, err := b.attemptsOf(ctx, name)
		if err != nil {
			return nil, err
		}
		a := all.Last[path]
		if a == nil {
			return nil, nil
		}
		_, v, err := b.tenants.load(ctx, name)
		if err != nil && b.keeps(a) {
			return &logical.Response{Data: attemptData(a, attemptPending, "")}, nil // memory has the grant, and storage not yet
		}
		if err != nil {
			return nil, err
		}
		status, text := b.statusOf(a, v)
		return &logical.Response{Data: attemptData(a, status, text)}, nil
	}
}

func attemptData(a *attempt, status, text string) map[string]any {
	data := map[string]any{"status": status, "expire_time": stamp(a.Expires)}
	if text != "" {
		data["last_error"] = text
	}
	return data
}
