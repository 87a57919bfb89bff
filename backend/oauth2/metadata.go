package oauth2

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/tokenservice"
)

// Metadata is what an authorization server tells about itself, as far as a connector needs it. What it does not tell is "".
type Metadata struct {
	// The endpoints.
	TokenURL, RevocationURL, AuthorizationURL, DeviceAuthorizationURL string
	// AuthMethod is how a client is to authenticate: ClientSecretBasic if the server takes that, or else ClientSecretPost, or
	// else NoSecret.
	AuthMethod string
	// IssuerPromised: each authorization response has "iss" (RFC 9207).
	IssuerPromised bool
}

// DiscoverOptions are how the metadata is asked for. The fields are as in [Config]; RequestTimeout counts for each request.
type DiscoverOptions struct {
	CACert         string
	RequestTimeout time.Duration
	Transport      http.RoundTripper
	// Permit is asked before each of the requests, two at most.
	Permit tokenservice.Permit
}

// Discover asks an issuer for its metadata: by RFC 8414, and by OpenID Connect Discovery where that brings no JSON object
// with status 200. It returns a [*tokenservice.FieldError] where issuer, ca_cert or the metadata make no sense, a wrong or
// unusable endpoint included; a [*tokenservice.Failure] of the kind Unavailable or Limited where the server was not reached or
// fails; Permit's error; or an error that wraps ctx's.
func Discover(ctx context.Context, issuer string, o DiscoverOptions) (*Metadata, error) {
	u, err := parseIssuer(issuer)
	if err != nil {
		return nil, err
	}
	roots, err := parseCA(o.CACert)
	if err != nil {
		return nil, err
	}
	if o.Transport == nil {
		o.Transport = tokenservice.NewTransport(roots)
	}
	var outage *tokenservice.Failure
	path := strings.TrimSuffix(u.EscapedPath(), "/")
	for _, at := range []string{
		"/.well-known/oauth-authorization-server" + path, // RFC 8414, section 3.1
		path + "/.well-known/openid-configuration",       // OpenID Connect Discovery, section 4
	} {
		document, err := o.get(ctx, u, at)
		switch failure, failed := err.(*tokenservice.Failure); {
		case failed && failure.Kind == tokenservice.Unavailable && failure.RetryAfter == 0: // the server has not said that it wants no call for now
			outage = failure
		case err != nil:
			return nil, err
		case document.Whole:
			return readMetadata(issuer, document)
		}
	}
	if outage != nil {
		return nil, outage
	}
	return nil, fieldError("issuer", "has no metadata: neither RFC 8414's nor OpenID Connect's well-known URL below %s answers with a JSON object. "+
		"Give the issuer as the server itself spells it, or write token_url in its place", u.Host)
}

// get asks for one document. What was answered but is not one is an object that is not Whole.
func (o DiscoverOptions) get(ctx context.Context, issuer *url.URL, path string) (none tokenservice.Object, err error) {
	at := *issuer
	at.RawPath = path
	at.Path, _ = url.PathUnescape(path) // a path that was escaped can be unescaped
	name := "The authorization server " + strings.ToLower(at.Host)
	a, err := tokenservice.Call{
		Transport: o.Transport,
		Method:    http.MethodGet,
		URL:       &at,
		Header:    http.Header{"Accept": {"application/json"}},
		Permit:    o.Permit,
		Service:   name,
		Field:     "issuer",
		Timeout:   o.RequestTimeout,
	}.Do(ctx)
	if err != nil {
		return none, err
	}
	failure := &tokenservice.Failure{Kind: tokenservice.Unavailable, Status: a.Status, RetryAfter: tokenservice.RetryAfter(a.Header, time.Now())}
	switch {
	case a.Status == http.StatusTooManyRequests:
		failure.RetryAfter = cmp.Or(failure.RetryAfter, tokenservice.RateLimitReset(a.Header, time.Now()))
		failure.Kind = tokenservice.Limited
		failure.Text = fmt.Sprintf("%s permits no further calls for now. %s", name, tokenservice.TryAgain(failure.RetryAfter))
	case a.Status/100 == 5, a.Status == http.StatusForbidden && failure.RetryAfter > 0:
		failure.Text = fmt.Sprintf("%s is failing (HTTP status %d). %s", name, a.Status, tokenservice.TryAgain(min(failure.RetryAfter, tokenservice.LongestRest)))
	case a.Status == http.StatusOK && a.Broken != "":
		failure.Text = a.Broken
	case a.Status == http.StatusOK:
		return tokenservice.ReadObject(a.Body), nil
	default:
		return none, nil
	}
	return none, failure
}

func readMetadata(issuer string, document tokenservice.Object) (*Metadata, error) {
	if named := exactText(document, "issuer"); named != issuer {
		if _, err := parseIssuer(named); err != nil || !graphic(named) {
			named = "no usable issuer"
		}
		return nil, fieldError("issuer", "is %s, but the metadata there has %s. Both must be the same, character for character: write the one that the server names", issuer, named)
	}
	m := &Metadata{IssuerPromised: string(document.Value("authorization_response_iss_parameter_supported")) == "true"}
	for _, endpoint := range []struct {
		name string
		into *string
	}{
		{"token_endpoint", &m.TokenURL},
		{"revocation_endpoint", &m.RevocationURL},
		{"authorization_endpoint", &m.AuthorizationURL},
		{"device_authorization_endpoint", &m.DeviceAuthorizationURL},
	} {
		if document.Value(endpoint.name) == nil {
			continue
		}
		value := exactText(document, endpoint.name)
		if _, problem := parseURL(value); problem != "" {
			return nil, fieldError("issuer", "has metadata whose %s %s. Write the URLs of the endpoints in place of issuer", endpoint.name, problem)
		}
		*endpoint.into = value
	}
	const listed = "token_endpoint_auth_methods_supported"
	methods := document.List(listed)
	if methods == nil {
		methods = []string{ClientSecretBasic} // RFC 8414, section 2
	}
	for _, method := range []string{ClientSecretBasic, ClientSecretPost, NoSecret} {
		if slices.Contains(methods, method) {
			m.AuthMethod = method
			return m, nil
		}
	}
	return nil, fieldError("issuer", "has metadata whose %s has none of %s, %s and %s, and the engine supports no other",
		listed, ClientSecretBasic, ClientSecretPost, NoSecret)
}

// exactText returns a string as it was sent, "" for what is none.
func exactText(o tokenservice.Object, name string) (s string) {
	_ = json.Unmarshal(o.Value(name), &s)
	return s
}
