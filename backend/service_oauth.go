package backend

import (
	"context"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/tokenservice"
)

// oauthKind is any authorization server of RFC 6749 that issues refresh tokens.
var oauthKind = serviceKind{
	fields: map[string]*framework.FieldSchema{
		"issuer": oauthField(framework.TypeString, nil,
			"the authorization server's issuer URL. A write that names it asks the server for its metadata (RFC 8414 or OpenID Connect), once; the engine never asks again by itself."),
		"token_url": oauthField(framework.TypeString, nil,
			"the token endpoint. It decides where refresh tokens are sent. Required if issuer's metadata does not name it."),
		"revocation_url": oauthField(framework.TypeString, nil,
			"the revocation endpoint (RFC 7009). Not needed if issuer's metadata names it."),
		"authorization_url": oauthField(framework.TypeString, nil,
			"the authorization endpoint, to which authorize sends a person's browser. Not needed if issuer's metadata names it."),
		"device_authorization_url": oauthField(framework.TypeString, nil,
			"the device authorization endpoint (RFC 8628). Not needed if issuer's metadata names it."),
		"token_endpoint_auth_method": oauthField(framework.TypeString, oauth2.ClientSecretBasic,
			"how the connector authenticates: client_secret_basic, client_secret_post, or none if it has no secret."),
		"token_params": oauthField(framework.TypeKVPairs, nil,
			"parameters that the engine adds to each token request, such as audience or resource. A write replaces all of them."),
		"authorization_params": oauthField(framework.TypeKVPairs, nil,
			"parameters that the engine adds to the authorization URL, such as access_type or prompt. A write replaces all of them."),
		"scopes": oauthField(framework.TypeCommaStringSlice, nil,
			"scopes that authorize and device ask for. An exchange sends no scope."),
		"redirect_uris": oauthField(framework.TypeCommaStringSlice, nil,
			"the addresses to which the service may send a person's browser back: the callback path of this mount, exactly as registered with the authorization server."),
		"endpoint_url_field": oauthField(framework.TypeString, nil,
			"the field of the service's token answer that becomes endpoint_url, such as instance_url."),
		"access_token_life": oauthField(framework.TypeDurationSecond, int(defaultAccessTokenLife.Seconds()),
			"the life of an access token, used where the service's answer has no expires_in."),
		"refresh_token_life": oauthField(framework.TypeDurationSecond, 0,
			"the life of a refresh token, counted from when it came. Used where neither the service's answer nor the token says; 0: unknown. The engine warns before this end, and goes on using the refresh token after it."),
		"keep_alive": oauthField(framework.TypeDurationSecond, int(defaultKeepAlive.Seconds()),
			"the longest time between two exchanges of a refresh token. The engine exchanges it this often even if there is no reader, because many services end a refresh token that is not used."),
		"exchange_invalidates": oauthField(framework.TypeBool, true,
			"whether an exchange ends the access tokens that came before it. Leases then end before the next planned exchange."),
		"revocation": oauthField(framework.TypeString, oauth2.RevokeNothing,
			"how an access token is revoked at the service. none: not at all. access_token: by RFC 7009; only for services where this ends that one token (at Google and others it ends the whole grant). exchange: by an exchange, which ends the access tokens before it."),
		"revoke_on_delete": oauthField(framework.TypeBool, false,
			"whether deleting a tenant revokes its refresh token (RFC 7009). At some services this ends other grants of the same user."),
		"confirm": oauthField(framework.TypeBool, true,
			"whether a person has to confirm on the callback page which tenant is about to be connected, before the grant is stored."),
	},
	settings: func() serviceSettings {
		return &oauthSettings{
			AccessTokenLife: defaultAccessTokenLife, KeepAlive: defaultKeepAlive,
			ExchangeInvalidates: true, Revocation: oauth2.RevokeNothing, Confirm: true,
		}
	},
	requestTimeout: 15 * time.Second,
}

const (
	defaultAccessTokenLife = time.Hour
	defaultKeepAlive       = 72 * time.Hour
)

func oauthField(t framework.FieldType, byDefault any, description string) *framework.FieldSchema {
	return &framework.FieldSchema{Type: t, Default: byDefault, Description: "OAuth 2.0 only: " + description}
}

// oauthSettings are the settings of an OAuth 2.0 connector.
type oauthSettings struct {
	Issuer string `json:"issuer,omitempty"`
	// Written are the addresses that a write names, Found those that issuer's metadata names. A written one wins.
	Written oauthAddresses `json:"written"`
	Found   oauthAddresses `json:"found"`
	// IssuerPromised: the metadata promises iss in each authorization response.
	IssuerPromised bool `json:"issuer_promised,omitempty"`

	TokenParams         map[string]string `json:"token_params,omitempty"`
	AuthorizationParams map[string]string `json:"authorization_params,omitempty"`
	Scopes              []string          `json:"scopes,omitempty"`
	RedirectURIs        []string          `json:"redirect_uris,omitempty"`
	EndpointURLField    string            `json:"endpoint_url_field,omitempty"`
	AccessTokenLife     time.Duration     `json:"access_token_life"`
	RefreshTokenLife    time.Duration     `json:"refresh_token_life,omitempty"`
	KeepAlive           time.Duration     `json:"keep_alive"`
	ExchangeInvalidates bool              `json:"exchange_invalidates"`
	Revocation          string            `json:"revocation"`
	RevokeOnDelete      bool              `json:"revoke_on_delete,omitempty"`
	Confirm             bool              `json:"confirm"`
}

// oauthAddresses are what metadata can tell; "" where unknown.
type oauthAddresses struct {
	TokenURL               string `json:"token_url,omitempty"`
	RevocationURL          string `json:"revocation_url,omitempty"`
	AuthorizationURL       string `json:"authorization_url,omitempty"`
	DeviceAuthorizationURL string `json:"device_authorization_url,omitempty"`
	AuthMethod             string `json:"token_endpoint_auth_method,omitempty"`
}

func (a *oauthAddresses) field(name string) *string {
	switch name {
	case "token_url":
		return &a.TokenURL
	case "revocation_url":
		return &a.RevocationURL
	case "authorization_url":
		return &a.AuthorizationURL
	case "device_authorization_url":
		return &a.DeviceAuthorizationURL
	case "token_endpoint_auth_method":
		return &a.AuthMethod
	}
	return nil
}

var oauthAddressFields = []string{"token_url", "revocation_url", "authorization_url", "device_authorization_url", "token_endpoint_auth_method"}

// addressOf returns the value of one of the fields that metadata can tell, "" where neither knows it.
func (s *oauthSettings) addressOf(name string) string {
	if written := *s.Written.field(name); written != "" {
		return written
	}
	return *s.Found.field(name)
}

func (s *oauthSettings) set(d *framework.FieldData, name string) (err error) {
	isNull := d.Raw[name] == nil
	switch name {
	case "issuer":
		// Found has the addresses of the issuer before; discover reads those of the new one.
		s.Issuer, s.Found, s.IssuerPromised = textOf(d, name), oauthAddresses{}, false
	case "token_params":
		s.TokenParams, err = pairsOf(d, name)
	case "authorization_params":
		s.AuthorizationParams, err = pairsOf(d, name)
	case "scopes":
		s.Scopes = scopesOf(d, name)
	case "redirect_uris":
		s.RedirectURIs = d.Get(name).([]string)
		err = oauth2.CheckRedirectURIs(s.RedirectURIs)
	case "endpoint_url_field":
		s.EndpointURLField = textOf(d, name)
	case "access_token_life":
		s.AccessTokenLife, err = secondsOr(d, name, defaultAccessTokenLife)
	case "refresh_token_life":
		s.RefreshTokenLife, err = secondsOr(d, name, 0)
	case "keep_alive":
		s.KeepAlive, err = secondsOr(d, name, defaultKeepAlive)
	case "exchange_invalidates":
		s.ExchangeInvalidates = isNull || d.Get(name).(bool)
	case "revocation":
		if s.Revocation = textOf(d, name); s.Revocation == "" {
			s.Revocation = oauth2.RevokeNothing
		}
	case "revoke_on_delete":
		s.RevokeOnDelete = !isNull && d.Get(name).(bool)
	case "confirm":
		s.Confirm = isNull || d.Get(name).(bool)
	default:
		*s.Written.field(name) = textOf(d, name)
	}
	return fieldProblem(err)
}

func (s *oauthSettings) show(data map[string]any) {
	for _, name := range oauthAddressFields {
		data[name] = s.addressOf(name)
	}
	if data["token_endpoint_auth_method"] == "" {
		data["token_endpoint_auth_method"] = oauth2.ClientSecretBasic
	}
	data["issuer"] = s.Issuer
	data["token_params"] = orEmpty(s.TokenParams)
	data["authorization_params"] = orEmpty(s.AuthorizationParams)
	data["scopes"] = append([]string{}, s.Scopes...)
	data["redirect_uris"] = append([]string{}, s.RedirectURIs...)
	data["endpoint_url_field"] = s.EndpointURLField
	data["access_token_life"] = int64(s.AccessTokenLife.Seconds())
	data["refresh_token_life"] = int64(s.RefreshTokenLife.Seconds())
	data["keep_alive"] = int64(s.KeepAlive.Seconds())
	data["exchange_invalidates"] = s.ExchangeInvalidates
	data["revocation"] = s.Revocation
	data["revoke_on_delete"] = s.RevokeOnDelete
	data["confirm"] = s.Confirm
}

func orEmpty(m map[string]string) map[string]string {
	if m == nil {
		return map[string]string{}
	}
	return m
}

// check leaves it to the client to say what is wrong.
func (s *oauthSettings) check(*connectorEntry) error { return nil }

func (s *oauthSettings) missing(c *connectorEntry, name string) error {
	for _, field := range []struct {
		name  string
		empty bool
	}{
		{"connector_id", c.ConnectorID == ""},
		{"connector_secret", c.ConnectorSecret == "" && s.addressOf("token_endpoint_auth_method") != oauth2.NoSecret},
	} {
		if field.empty {
			return badValue("%s of connector %q is missing: its owner has to write it to %s first", field.name, name, configPath(name))
		}
	}
	return nil
}

func (s *oauthSettings) discover(ctx context.Context, c *connectorEntry, d *framework.FieldData, transport http.RoundTripper, permit tokenservice.Permit) error {
	if d.Raw["issuer"] == nil || s.Issuer == "" {
		return nil
	}
	found, err := oauth2.Discover(ctx, s.Issuer, oauth2.DiscoverOptions{
		CACert: c.CACert, RequestTimeout: c.RequestTimeout, Transport: transport, Permit: permit,
	})
	if err != nil {
		return err
	}
	s.Found = oauthAddresses{
		TokenURL:               found.TokenURL,
		RevocationURL:          found.RevocationURL,
		AuthorizationURL:       found.AuthorizationURL,
		DeviceAuthorizationURL: found.DeviceAuthorizationURL,
		AuthMethod:             found.AuthMethod,
	}
	s.IssuerPromised = found.IssuerPromised
	return nil
}

func (s *oauthSettings) isAt(issuer string) bool {
	there, err := url.Parse(issuer)
	own, ownErr := url.Parse(s.addressOf("token_url"))
	return err == nil && ownErr == nil && strings.EqualFold(there.Host, own.Host)
}

func (s *oauthSettings) take(others serviceSettings) {
	if found, ok := others.(*oauthSettings); ok {
		s.Found, s.IssuerPromised = found.Found, found.IssuerPromised
	}
}

func (s *oauthSettings) client(c *connectorEntry, transport http.RoundTripper) (tokenservice.Service, error) {
	client, err := oauth2.New(oauth2.Config{
		ClientID:               c.ConnectorID,
		ClientSecret:           c.ConnectorSecret,
		TokenURL:               s.addressOf("token_url"),
		RevocationURL:          s.addressOf("revocation_url"),
		AuthorizationURL:       s.addressOf("authorization_url"),
		DeviceAuthorizationURL: s.addressOf("device_authorization_url"),
		Issuer:                 s.Issuer,
		IssuerPromised:         s.IssuerPromised,
		AuthMethod:             s.addressOf("token_endpoint_auth_method"),
		TokenParams:            s.TokenParams,
		AuthorizationParams:    s.AuthorizationParams,
		Scopes:                 s.Scopes,
		EndpointURLField:       s.EndpointURLField,
		AccessTokenLife:        s.AccessTokenLife,
		RefreshTokenLife:       s.RefreshTokenLife,
		KeepAlive:              s.KeepAlive,
		ExchangeInvalidates:    s.ExchangeInvalidates,
		Revocation:             s.Revocation,
		RevokeOnDelete:         s.RevokeOnDelete,
		CACert:                 c.CACert,
		RequestTimeout:         c.RequestTimeout,
		Transport:              transport,
	})
	if err != nil {
		return nil, err
	}
	return client, nil
}

func (*oauthSettings) address() string { return "" }

func (s *oauthSettings) consent() consent {
	return consent{
		scopes: s.Scopes, redirectURIs: s.RedirectURIs, confirm: s.Confirm,
		authorizationURL: s.addressOf("authorization_url"), deviceAuthorizationURL: s.addressOf("device_authorization_url"),
	}
}

func (s *oauthSettings) clone() serviceSettings {
	next := *s
	return &next
}
