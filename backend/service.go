package backend

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"time"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/kaizala"
)

// tokenService is all that the engine knows of the service behind a
// connector: it turns refresh tokens into access tokens. Headers, token
// formats, the moment from which refresh tokens are replaced and the meaning of
// answers stay behind it.
type tokenService interface {
	// check reads what a refresh token says about itself, without a call. Its
	// error says, without quoting the token, why the service would refuse it.
	check(refreshToken string) (refreshFacts, error)

	// exchange turns a refresh token into an access token. Its error is a
	// *serviceError, the error of call.permit, or the context's. Beside an error
	// the grant may still hold a new refresh token, and nothing else.
	exchange(ctx context.Context, call serviceCall) (*grant, error)

	// close gives up idle connections.
	close()
}

// serviceCall is one exchange.
type serviceCall struct {
	refreshToken string
	// endpoint is where an earlier exchange was told to go instead, or "".
	endpoint string
	// permit is asked before each request that leaves; done when it is over.
	permit func(context.Context) (done func(), err error)
	// moved is told where the next exchange is to go, "" for the usual place.
	moved func(endpoint string)
}

// grant is what the service gives for a refresh token.
type grant struct {
	accessToken  string
	endpointURL  string
	scope        string
	expires      time.Time
	refreshToken string // "" unless the service sent a new one
}

// refreshFacts is what a refresh token tells about itself. Nobody has checked
// its signature, so it serves for planning and early refusal alone.
type refreshFacts struct {
	Kind        string    `json:"kind"`
	GroupID     string    `json:"group_id,omitempty"`
	Expires     time.Time `json:"expires,omitzero"`
	RotatesFrom time.Time `json:"rotates_from,omitzero"` // exchanges return a new refresh token from here on
}

type failureKind int

const (
	refusedRefreshToken failureKind = iota + 1 // a new refresh token must be written
	refusedConnector                           // the connector's ID or secret is wrong
	refused                                    // refused without naming either
	limited                                    // too many calls
	unavailable                                // no answer, or one that makes no sense
)

// serviceError is the service's refusal or failure; its text holds nothing that
// the service or the caller keeps secret.
type serviceError struct {
	kind       failureKind
	retryAfter time.Duration // 0: the service named no time
	text       string
}

func (e *serviceError) Error() string { return e.text }

// kaizalaService is the tokenService of one Kaizala connector.
type kaizalaService struct {
	client      *kaizala.Client
	connectorID string
}

// newKaizalaService makes the service of a connector. The transport is nil but
// in tests. Its error names the field that is wrong.
func newKaizalaService(c *connectorEntry, transport http.RoundTripper) (tokenService, error) {
	client, err := kaizala.New(kaizala.Config{
		ConnectorID:     c.ConnectorID,
		ConnectorSecret: c.ConnectorSecret,
		APIRoot:         c.APIRoot,
		CACert:          c.CACert,
		RedirectHosts:   c.RedirectHosts,
		RequestTimeout:  c.RequestTimeout,
		Transport:       transport,
	})
	if err != nil {
		return nil, err
	}
	return &kaizalaService{client: client, connectorID: c.ConnectorID}, nil
}

func (s *kaizalaService) close() { s.client.Close() }

func (s *kaizalaService) check(refreshToken string) (refreshFacts, error) {
	if err := kaizala.CheckToken(refreshToken); err != nil {
		return refreshFacts{}, err
	}
	claims := kaizala.Inspect(refreshToken)
	facts := refreshFacts{
		Kind:        claims.Kind,
		GroupID:     claims.GroupID,
		Expires:     claims.Expires.UTC(),
		RotatesFrom: claims.RotatesFrom().UTC(),
	}
	if claims.ConnectorID != "" && !strings.EqualFold(claims.ConnectorID, s.connectorID) {
		return facts, errors.New("it was generated for another connector: its applicationId is not this connector's connector_id")
	}
	return facts, nil
}

func (s *kaizalaService) exchange(ctx context.Context, call serviceCall) (*grant, error) {
	g, err := s.client.Exchange(ctx, kaizala.Request{
		RefreshToken: call.refreshToken,
		URL:          call.endpoint,
		Permit:       call.permit,
		Moved:        call.moved,
	})
	if failure := (*kaizala.Error)(nil); errors.As(err, &failure) {
		err = &serviceError{kind: kinds[failure.Kind], retryAfter: failure.RetryAfter, text: failure.Text}
	}
	if g == nil {
		return nil, err
	}
	return &grant{
		accessToken:  g.AccessToken,
		endpointURL:  g.EndpointURL,
		scope:        g.Scope,
		expires:      g.Expires.UTC(),
		refreshToken: g.RefreshToken,
	}, err
}

var kinds = map[kaizala.Kind]failureKind{
	kaizala.RefusedRefreshToken: refusedRefreshToken,
	kaizala.RefusedConnector:    refusedConnector,
	kaizala.Refused:             refused,
	kaizala.Limited:             limited,
	kaizala.Unavailable:         unavailable,
}
