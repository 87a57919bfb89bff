package oauth2test

import (
	"net/http"
	"strconv"
	"time"
)

// The values of zero Options.
const (
	DefaultAccessTokenLife = time.Hour
	DefaultCodeLife        = time.Minute
	DefaultDeviceLife      = 10 * time.Minute
	DefaultDeviceInterval  = 5 * time.Second // RFC 8628, section 3.2
)

// Options are the server's switches. Zero Options are a server that rotates refresh tokens at each exchange, refuses
// replaced ones, lets all access tokens of a grant live side by side, revokes one alone, and does what the RFCs say.
// Changed options apply to later requests; a token keeps the life that it was issued with.
type Options struct {
	// Rotation is what an exchange does to the refresh token.
	Rotation Rotation
	// Grace is how long a replaced refresh token still works after it was first exchanged. It then gives a new pair of
	// tokens or, with GraceSame, the pair that it gave before, as long as the new refresh token was not used (Box).
	Grace     time.Duration
	GraceSame bool
	// ReuseKillsFamily ends the whole grant when a replaced refresh token comes after its grace (oidc-provider,
	// fosite, Hydra, Okta, Auth0). Without it that token is refused and the grant lives on (zitadel).
	ReuseKillsFamily bool
	// RefreshTokenLife is how long a refresh token lives, from its issue or last use, or with RefreshTokenAbsolute
	// from the consent. 0 is without an end.
	RefreshTokenLife     time.Duration
	RefreshTokenAbsolute bool
	// RefreshTokenLifeField is the name of the answer's field with the rest of that life, in seconds, 0 if it has no end.
	// Real servers use refresh_token_expires_in, x_refresh_token_expires_in and refresh_expires_in. "" is no field.
	RefreshTokenLifeField string
	// RefreshTokenJWT makes refresh tokens JWTs, with their end, if they have one, in exp.
	RefreshTokenJWT bool

	// AccessTokenLife is how long access tokens live; 0 is DefaultAccessTokenLife.
	AccessTokenLife time.Duration
	// ExpiresIn is how the answer writes that life.
	ExpiresIn ExpiresIn
	// TokenType is the answer's token_type; "" is Bearer.
	TokenType string
	// ExchangeInvalidates ends the access tokens before an exchange (class D).
	ExchangeInvalidates bool
	// JWT makes access tokens JWTs: only their expiry and ExchangeInvalidates end them, and their revocation is refused
	// with unsupported_token_type (class C).
	JWT bool
	// Scope is what a narrower scope in an exchange does.
	Scope ScopeRule

	// RevokeEnds is what the revocation of an access token ends. That of a refresh token always ends its grant.
	RevokeEnds RevokeEnds
	// RevokeExpiredEndsGrant ends the grant when an access token is revoked that has expired (oidc-provider, fosite,
	// Hydra).
	RevokeExpiredEndsGrant bool
	// RevokeRefreshEndsAll ends all grants that the user has of the client when one refresh token is revoked
	// (Keycloak).
	RevokeRefreshEndsAll bool
	// RevokeDead answers the revocation of a token that is not alive; zero is 200. Google answers InvalidToken.
	RevokeDead Answer

	// RefusedToken answers an exchange of a refresh token that is not alive; zero is InvalidGrant. RefusedClient answers a
	// wrong authentication; zero is InvalidClient. UnknownClient answers an authentication as an unknown client; zero is
	// RefusedClient (zitadel: ServerError).
	RefusedToken, RefusedClient, UnknownClient Answer
	// Echo quotes the request's parameters in error_description, which a client must not pass on.
	Echo bool
	// Format is the encoding of all answers of the token and device authorization endpoints, except canned ones.
	Format Format
	// Edit, if not nil, changes the fields of a successful answer of the token, device, metadata and userinfo endpoints
	// before it is encoded, for example adds instance_url. It must not call the server.
	Edit func(e Endpoint, fields map[string]any)

	// LimitPerMinute is how many calls of the token, revocation and device authorization endpoints a client may make
	// in 60 seconds, 0 is no limit. Further ones get TooManyRequests or, with LimitReset, RateLimitReset.
	LimitPerMinute int
	LimitReset     bool

	// Metadata is which metadata documents are served.
	Metadata Metadata
	// MetadataIssuer is the issuer in the documents; "" is Issuer().
	MetadataIssuer string
	// AuthMethods are the methods in the documents; nil is all three, and an empty list leaves the field out.
	AuthMethods []string

	// OddSecrets gives clients that are registered from now on an ID and a secret with ':', '+', '/', ' ', '%', '~',
	// '&' and '=', which a client has to encode before Basic (RFC 6749, section 2.3.1).
	OddSecrets bool
	// RequirePKCE refuses an authorization request without a code challenge. A challenge is always checked, and its
	// method must be S256.
	RequirePKCE bool
	// RequireOffline gives a refresh token only if the scope has offline_access, or the authorization request has
	// access_type=offline.
	RequireOffline bool
	// CodeLife is how long a code lives; 0 is DefaultCodeLife.
	CodeLife time.Duration
	// PromiseIss promises iss in the metadata, SendIss sends it with the redirect (RFC 9207), and WrongIss, if not "", is
	// sent instead of the right one.
	PromiseIss, SendIss bool
	WrongIss            string

	// DeviceLife and DeviceInterval are RFC 8628's expires_in and interval; 0 is DefaultDeviceLife and
	// DefaultDeviceInterval.
	DeviceLife, DeviceInterval time.Duration
	// VerificationURL sends verification_uri under the name verification_url (Google).
	VerificationURL bool
}

// Rotation is what an exchange does to the refresh token.
type Rotation string

const (
	RotateEach  Rotation = ""      // a new one, the old one is replaced
	RotateNever Rotation = "never" // the answer has none
	RotateSame  Rotation = "same"  // the answer repeats it
	RotateEmpty Rotation = "empty" // the answer has ""
)

// ExpiresIn is how the answer writes an access token's life. The examples below are for an hour.
type ExpiresIn string

const (
	ExpiresInNumber  ExpiresIn = ""        // 3600, whole seconds rounded down
	ExpiresInDecimal ExpiresIn = "decimal" // 3600.0
	ExpiresInString  ExpiresIn = "string"  // "3600"
	ExpiresInMissing ExpiresIn = "missing"
	ExpiresInNull    ExpiresIn = "null"
	ExpiresInEmpty   ExpiresIn = "empty" // ""
)

// RevokeEnds is what the revocation of an access token ends.
type RevokeEnds string

const (
	RevokeToken   RevokeEnds = ""        // that token alone (class A)
	RevokeGrant   RevokeEnds = "grant"   // the refresh token and all access tokens (class B)
	RevokeNothing RevokeEnds = "nothing" // nothing, with the answer 200
)

// ScopeRule is what a scope in an exchange does.
type ScopeRule string

const (
	ScopeOnce    ScopeRule = ""        // holds for this exchange's access token (oidc-provider)
	ScopeNarrows ScopeRule = "narrows" // holds for the refresh token too (zitadel, go-oauth2)
	ScopeIgnored ScopeRule = "ignored" // is ignored (fosite, Hydra)
)

// Format is how an answer is encoded.
type Format string

const (
	FormatJSON   Format = ""
	FormatBOM    Format = "bom"    // JSON after a UTF-8 byte-order mark
	FormatForm   Format = "form"   // application/x-www-form-urlencoded
	FormatAccept Format = "accept" // a form, unless Accept asks for application/json (GitHub)
)

// Metadata is which metadata documents are served.
type Metadata string

const (
	MetadataBoth   Metadata = ""
	MetadataOAuth  Metadata = "oauth"  // RFC 8414's alone
	MetadataOpenID Metadata = "openid" // OpenID Connect's alone (zitadel, Hydra)
	MetadataNone   Metadata = "none"   // (fosite)
)

// ClassA to ClassD set all options to one of OAUTH.md's four classes, with rotation at each exchange, and with the end
// of the grant when a replaced refresh token comes again. A: access tokens are independent.
func ClassA(o *Options) { *o = Options{ReuseKillsFamily: true} }

// ClassB: the revocation of an access token, also of an expired one, ends the grant.
func ClassB(o *Options) {
	*o = Options{ReuseKillsFamily: true, RevokeEnds: RevokeGrant, RevokeExpiredEndsGrant: true}
}

// ClassC: access tokens are JWTs, which cannot be revoked.
func ClassC(o *Options) { *o = Options{ReuseKillsFamily: true, JWT: true} }

// ClassD: an exchange ends the access tokens before it.
func ClassD(o *Options) { *o = Options{ReuseKillsFamily: true, ExchangeInvalidates: true} }

// OIDCProvider sets all options to what npm's oidc-provider 9.13.3 was measured to do with rotation on.
func OIDCProvider(o *Options) {
	ClassB(o)
	o.AuthMethods = []string{"client_secret_basic", "client_secret_post", "none"}
	o.RequireOffline, o.RequirePKCE, o.SendIss, o.PromiseIss = true, true, true, true
}

// Zitadel sets all options to what zitadel/oidc v3.51.17's example server was measured to do.
func Zitadel(o *Options) {
	*o = Options{
		ExchangeInvalidates: true, AccessTokenLife: 5 * time.Minute, Scope: ScopeNarrows, Metadata: MetadataOpenID,
		UnknownClient: ServerError, RequireOffline: true,
	}
}

// Fosite sets all options to what ory/fosite v0.49.0 was measured to do.
func Fosite(o *Options) {
	*o = Options{
		ExchangeInvalidates: true, ReuseKillsFamily: true, RevokeEnds: RevokeGrant, RevokeExpiredEndsGrant: true,
		Scope: ScopeIgnored, Metadata: MetadataNone,
	}
}

// Answer is a canned answer. The zero Answer is no answer.
type Answer struct {
	Status int
	Header http.Header
	Body   string
}

func canned(status int, contentType, body string) Answer {
	return Answer{Status: status, Header: http.Header{"Content-Type": {contentType}}, Body: body}
}

const (
	typeJSON = "application/json"
	typeForm = "application/x-www-form-urlencoded"
	typeHTML = "text/html; charset=utf-8"
)

// The answers of OAUTH.md, section 3, for Options and Faults. They must not be changed.
var (
	InvalidGrant        = canned(400, typeJSON, `{"error":"invalid_grant"}`)
	InvalidGrant401     = canned(401, typeJSON, `{"error":"invalid_grant"}`)                                           // go-oauth2
	InvalidGrant403     = canned(403, typeJSON, `{"error":"invalid_grant"}`)                                           // Atlassian
	BadRefreshToken     = canned(200, typeJSON, `{"error":"bad_refresh_token","error_description":"It has expired."}`) // GitHub
	BadRefreshTokenForm = canned(200, typeForm, `error=bad_refresh_token&error_description=It+has+expired.`)           // GitHub
	InvalidRefreshToken = canned(200, typeJSON, `{"ok":false,"error":"invalid_refresh_token"}`)                        // Slack
	InvalidClient       = Answer{
		Status: 401,
		Header: http.Header{"Content-Type": {typeJSON}, "Www-Authenticate": {`Basic realm="oauth2test", error="invalid_client"`}},
		Body:   `{"error":"invalid_client"}`,
	}
	ServerError          = canned(500, typeJSON, `{"error":"server_error"}`) // zitadel, Hydra
	InvalidScope         = canned(400, typeJSON, `{"error":"invalid_scope"}`)
	UnauthorizedClient   = canned(400, typeJSON, `{"error":"unauthorized_client"}`)
	UnsupportedTokenType = canned(400, typeJSON, `{"error":"unsupported_token_type"}`)
	InvalidToken         = canned(400, typeJSON, `{"error":"invalid_token"}`)                            // Google's revocation
	Conflict             = Answer{Status: 409}                                                           // Box
	HTML                 = canned(200, typeHTML, "<!DOCTYPE html><title>Sign in to the network</title>") // a proxy
	BadGateway           = canned(502, typeHTML, "<html><body><h1>502 Bad Gateway</h1></body></html>")
)

// TooManyRequests is HTTP 429 with Retry-After, in whole seconds.
func TooManyRequests(retryAfter time.Duration) Answer {
	return Answer{Status: http.StatusTooManyRequests, Header: http.Header{"Retry-After": {seconds(retryAfter)}}}
}

// RateLimitReset is HTTP 429 with X-Rate-Limit-Reset, in epoch seconds (Okta).
func RateLimitReset(at time.Time) Answer {
	return Answer{
		Status: http.StatusTooManyRequests,
		Header: http.Header{"X-Rate-Limit-Reset": {strconv.FormatInt(at.Add(time.Second-1).Unix(), 10)}},
	}
}

// Unavailable is HTTP 503 with Retry-After, in whole seconds (RFC 7009, section 2.2.1).
func Unavailable(retryAfter time.Duration) Answer {
	return Answer{Status: http.StatusServiceUnavailable, Header: http.Header{"Retry-After": {seconds(retryAfter)}}}
}

func seconds(d time.Duration) string { return strconv.Itoa(int((d + time.Second - 1) / time.Second)) }
