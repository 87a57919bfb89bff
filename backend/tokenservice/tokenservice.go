// Package tokenservice is the border between the secrets engine and the services that issue tokens: what the engine
// asks of any of them, and what they answer. A client of a service implements [Service]; what not every service can
// do is an interface of its own ([Revoker], [CodeFlow], [DeviceFlow], [PINFlow]), which a client implements where its
// service can.
//
// The package also holds what each client needs of HTTP: one request for one permission, bounded answers, and the
// rules for the URLs that tokens may travel to.
package tokenservice

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"
)

// Service is the token service of one connector as it is configured now. It is safe for concurrent use. It knows
// nothing of Vault, and it remembers nothing from one call to the next.
type Service interface {
	// About returns the facts that the engine needs about the service. It makes no call.
	About() About

	// Check reads what a refresh token says about itself, at the moment when a person has written it. It makes no call.
	// Its error says why the service would refuse the token and what to do, and never quotes it.
	Check(refreshToken string) (Facts, error)

	// KeepAlive returns how often a refresh token with these facts is exchanged at the least, so that it does not die of
	// disuse; 0 where there is no need.
	KeepAlive(Facts) time.Duration

	// Exchange turns a refresh token into an access token. It does not retry.
	Exchange(context.Context, Exchange) Result

	// Close closes idle connections. A request that has begun goes on. One whose connection is still being made is not sent, and its error
	// is [ErrClosed].
	Close()
}

// ErrClosed is the error of a request that had not begun when its client was closed.
var ErrClosed = errors.New("the client was closed before the request began")

// About is what a service states about itself as its connector is configured.
type About struct {
	// Name is what the service's users call it, for texts: "Kaizala", or "the authorization server login.example.com".
	Name string

	// NewRefreshToken is what a person does to get a new refresh token, as a part of a sentence: "generate a new one on
	// Kaizala's portal". NAME in it stands for the tenant's name.
	NewRefreshToken string

	// ExchangeInvalidates: an exchange ends the access tokens before it.
	ExchangeInvalidates bool

	// Revocation is how an access token is revoked at the service.
	Revocation Revocation

	// RevokeOnDelete: deleting a tenant revokes its refresh token. The service is then a [Revoker].
	RevokeOnDelete bool

	// RetryLost: an exchange whose answer was lost is tried once more at once, because the service has a grace period for
	// that (OAUTH.md).
	RetryLost bool
}

// Revocation is how a service revokes an access token.
type Revocation int

const (
	// RevokeNothing: an access token works until its end.
	RevokeNothing Revocation = iota
	// RevokeAccessToken: the service is a [Revoker], and revoking an access token ends that token alone.
	RevokeAccessToken
	// RevokeByExchange: an exchange ends the access tokens before it.
	RevokeByExchange
)

// Permit is asked before each HTTP request that leaves, redirect hops included. The client calls done once that request
// has been answered, body and all, or has failed. An error of Permit ends the client's work and is returned as it is.
// A client that is given no Permit needs none.
type Permit func(context.Context) (done func(), err error)

// Exchange is a request for an access token.
type Exchange struct {
	RefreshToken string
	// Endpoint is [Result.Endpoint] of the tenant's exchange before; "" stands for the service's usual place. An endpoint
	// to which the connector may not send tokens any more is ignored.
	Endpoint string
	Permit   Permit
}

// Format prints no secret, whatever the verb.
func (Exchange) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "tokenservice.Exchange{…}") }

// Result is what a service has given. Beside an error only RefreshToken, Facts and Endpoint can be set, and where a code
// or device code brought no refresh token (the kind is Refused), AccessToken: it is to be given up.
type Result struct {
	// AccessToken is nil where none came.
	AccessToken *AccessToken

	// RefreshToken is a new refresh token, which must be used from now on and must never be lost, whatever else is wrong
	// with the answer. "" where the service sent none, or the one that it was sent.
	RefreshToken string

	// Facts are about the refresh token that is to be used from now on, a new one or the one that was sent. nil where the
	// answer told nothing new.
	Facts *Facts

	// Endpoint is where the tenant's next exchange is to begin; "" stands for the service's usual place.
	Endpoint string

	// Subject is who has granted access, "sub" or "email" of an ID token; "" where unknown.
	Subject string

	// Sent is when the last request began, zero where none did.
	Sent time.Time

	// Err is nil, a [*Failure], the error of a Permit, [ErrClosed], or an error that wraps the context's.
	Err error
}

// Format prints no secret, whatever the verb.
func (Result) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "tokenservice.Result{…}") }

// MaxAccessTokenLife is the longest life of an access token that is believed: a larger number is probably in another unit.
const MaxAccessTokenLife = 400 * 24 * time.Hour

// AccessToken is an access token as a service issues it.
type AccessToken struct {
	Token string
	// Type is the token's type as sent, such as "Bearer"; "" where the service names none.
	Type string
	// EndpointURL is the base URL of calls with the token; "" where unknown.
	EndpointURL string
	// Scope is what the token may do, as sent; "" where unknown.
	Scope string
	// Expires is the token's end in UTC, to the millisecond; never more than MaxAccessTokenLife ahead.
	Expires time.Time
}

// Format prints no secret, whatever the verb.
func (AccessToken) Format(f fmt.State, _ rune) {
	_, _ = io.WriteString(f, "tokenservice.AccessToken{…}")
}

// Facts are what is known about a refresh token. Claims of a token are not verified, so facts serve for planning and for
// telling a person of a mistake, and never for a decision about trust. The JSON form is stored.
type Facts struct {
	// Kind is "user", "group" or "unknown" for Kaizala's tokens, and "" for others.
	Kind string `json:"kind"`
	// GroupID is the one group that a group token of Kaizala's reaches.
	GroupID string `json:"group_id,omitempty"`
	// Expires is the refresh token's end in UTC; zero where unknown.
	Expires time.Time `json:"expires,omitzero"`
	// RotatesFrom is from when on the engine exchanges the token, without any reader, until a later end is known: after
	// 90 % of its life. Zero where Expires is.
	RotatesFrom time.Time `json:"rotates_from,omitzero"`
	// Assumed: Expires comes from the connector's configuration alone. It warns, and stops no call.
	Assumed bool `json:"assumed,omitempty"`
}

// Kind says what a [Failure] asks for.
type Kind int

const (
	// RefusedRefreshToken: the service refuses the refresh token (or the code, device code or PIN); a person has to get a
	// new one.
	RefusedRefreshToken Kind = iota + 1
	// RefusedConnector: the service refuses the connector's ID or secret; the connector's owner has to correct them.
	RefusedConnector
	// Refused: the service refuses the request and says neither that the refresh token nor that the connector is wrong.
	Refused
	// Limited: the service permits no further calls for now.
	Limited
	// Unavailable: the service was not reached, did not answer in time, fails, or does not make sense. Nothing is known to
	// be wrong with what was sent, and a later try may succeed.
	Unavailable
	// Pending: the person has not decided yet about a device code (RFC 8628).
	Pending
	// SlowDown: as Pending, and the interval between polls grows by 5 seconds (RFC 8628).
	SlowDown
	// Denied: the person has denied access.
	Denied
	// Expired: the device code's time is over.
	Expired
	// Unsupported: the service cannot revoke tokens of this type (RFC 7009); a later try cannot succeed.
	Unsupported
)

// Failure is an answer that brought no access token, or the lack of an answer. It holds nothing that was sent and nothing
// of the answer's text.
type Failure struct {
	Kind Kind
	// Status is the HTTP status of the last answer, 0 where there was none.
	Status int
	// Code is the answer's error code where that is a registered one, and "" otherwise.
	Code string
	// RetryAfter is how long the service asked to be left alone; 0 where it did not say; 24 hours at most.
	RetryAfter time.Duration
	// Lost: the request was sent, the service may have carried it out, and its answer did not come or cannot be read. A
	// new refresh token may be lost with it.
	Lost bool
	// TakesConnector: the service refuses what was sent, and the answer shows that it takes the connector's ID and secret.
	TakesConnector bool
	// Text says what happened and what a person has to do: whole sentences, for people.
	Text string
}

// Error returns the text.
func (e *Failure) Error() string { return e.Text }

// FieldError is a configuration that cannot work.
type FieldError struct {
	// Field is the name of the field of config.
	Field string
	// Text says what would be right, without quoting what was given.
	Text string
}

// Error returns the field and the text.
func (e *FieldError) Error() string { return e.Field + " " + e.Text }

// TokenType says what a token is, for a revocation.
type TokenType string

// The types of tokens, as RFC 7009 spells them in token_type_hint.
const (
	TypeAccessToken  TokenType = "access_token"
	TypeRefreshToken TokenType = "refresh_token"
)

// Revoker is a service that can revoke tokens. The configuration decides whether it does: see [About].
type Revoker interface {
	// Revoke ends a token. It returns nil where the token is not valid any more, whatever the reason; or a [*Failure], whose
	// kind is Unsupported where no later try can succeed; or the error of permit; or [ErrClosed]; or an error that wraps the context's.
	Revoke(ctx context.Context, token string, t TokenType, permit Permit) error
}

// CodeFlow is a service with the authorization code flow (RFC 6749, section 4.1) and PKCE (RFC 7636).
type CodeFlow interface {
	// AuthorizationURL returns where a person's browser goes. Its error is a [*FieldError]: a field of the connector is
	// missing. It makes no call.
	AuthorizationURL(AuthorizationRequest) (string, error)

	// RedeemCode turns a code into tokens. It sends the code once.
	RedeemCode(context.Context, CodeRedemption) Result

	// Issuer returns the issuer that an answer of the authorization server must name in "iss" (RFC 9207), "" where unknown;
	// and whether the server promises to send it.
	Issuer() (issuer string, promised bool)
}

// AuthorizationRequest is what an authorization URL is made of.
type AuthorizationRequest struct {
	RedirectURI string
	State       string
	// Challenge is the S256 code challenge of PKCE.
	Challenge string
	// Scopes to ask for; none leaves "scope" out.
	Scopes []string
	// LoginHint is sent as login_hint; "" leaves it out.
	LoginHint string
}

// CodeRedemption is a request for the tokens of an authorization code.
type CodeRedemption struct {
	Code, RedirectURI, Verifier string
	Permit                      Permit
}

// Format prints no secret, whatever the verb.
func (CodeRedemption) Format(f fmt.State, _ rune) {
	_, _ = io.WriteString(f, "tokenservice.CodeRedemption{…}")
}

// DeviceFlow is a service with the device authorization grant (RFC 8628).
type DeviceFlow interface {
	// StartDevice begins an attempt. Its error is a [*FieldError], a [*Failure], the error of a Permit, [ErrClosed], or one that wraps the
	// context's.
	StartDevice(context.Context, DeviceRequest) (*DeviceStart, error)

	// PollDevice asks whether the person has decided.
	PollDevice(ctx context.Context, deviceCode string, permit Permit) Result
}

// DeviceRequest asks for a device code.
type DeviceRequest struct {
	Scopes    []string
	LoginHint string
	Permit    Permit
}

// DeviceStart is the beginning of a device authorization.
type DeviceStart struct {
	DeviceCode, UserCode                     string
	VerificationURI, VerificationURIComplete string
	// Expires is the end of the attempt.
	Expires time.Time
	// Interval is the least time between two polls; 5 seconds where the service names none.
	Interval time.Duration
}

// Format prints no secret, whatever the verb.
func (DeviceStart) Format(f fmt.State, _ rune) {
	_, _ = io.WriteString(f, "tokenservice.DeviceStart{…}")
}

// PINFlow is a service that sends a person a PIN by SMS and takes it for a refresh token.
type PINFlow interface {
	// SendPIN has a PIN sent. Its error is as Revoke's.
	SendPIN(ctx context.Context, mobileNumber string, permit Permit) error

	// RedeemPIN turns a PIN into a refresh token; its Result has no access token.
	RedeemPIN(ctx context.Context, mobileNumber, pin string, permit Permit) Result
}
