package main

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/zitadel/oidc/v3/example/server/storage"
	"github.com/zitadel/oidc/v3/pkg/oidc"
	"github.com/zitadel/oidc/v3/pkg/op"
)

// stats are the server's counts, which a test reads.
type stats struct {
	Exchanges            int `json:"exchanges"`              // refresh tokens exchanged
	Refused              int `json:"refused"`                // exchanges refused for their refresh token, Reused included
	Reused               int `json:"reused"`                 // exchanges with a refresh token that an earlier one had replaced
	RevokedAccessTokens  int `json:"revoked_access_tokens"`  // revocations of an access token that was valid until then
	RevokedRefreshTokens int `json:"revoked_refresh_tokens"` // revocations of a refresh token that was valid until then
	RevokedEnded         int `json:"revoked_ended"`          // revocations of an expired access token
	RevokedOther         int `json:"revoked_other"`          // revocations of an unknown token, or one that was ended before it expired
	LiveGrants           int `json:"live_grants"`            // refresh tokens that can be exchanged now
	LiveAccessTokens     int `json:"live_access_tokens"`     // access tokens that are valid now
}

// recorder is zitadel's example storage with these additions:
//   - It counts, and knows which refresh tokens were replaced.
//   - Access tokens can live shorter than the example's five minutes.
//   - A device's grant belongs to its client and its user. In the example it belongs to no user, so its refresh token is always
//     refused, and it has the user's name in place of his ID.
//   - One lock for all reads and writes of refresh tokens: the example reads its map without a lock when a token is revoked, and
//     a concurrent exchange would end the process.
type recorder struct {
	*storage.Storage
	accessTTL time.Duration

	mu       sync.Mutex
	counted  stats
	replaced map[string]bool         // replaced refresh tokens
	grants   map[string]string       // the ID of the access token of each live refresh token
	tokens   map[string]*accessToken // by ID
}

type accessToken struct {
	end  time.Time
	dead bool // revoked, or replaced with its refresh token
}

func newRecorder(accessTTL time.Duration) *recorder {
	return &recorder{
		Storage:   storage.NewStorage(users{}),
		accessTTL: accessTTL,
		replaced:  map[string]bool{},
		grants:    map[string]string{},
		tokens:    map[string]*accessToken{},
	}
}

func (r *recorder) snapshot() stats {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.counted
	s.LiveGrants = len(r.grants)
	for _, token := range r.tokens {
		if !token.dead && time.Now().Before(token.end) {
			s.LiveAccessTokens++
		}
	}
	return s
}

// mint makes a grant as if its user had consented.
func (r *recorder) mint(ctx context.Context, clientID string) (string, error) {
	_, refreshToken, _, err := r.CreateAccessAndRefreshTokens(ctx, &storage.AuthRequest{
		ApplicationID: clientID,
		UserID:        userID,
		Scopes:        []string{oidc.ScopeOpenID, oidc.ScopeOfflineAccess, oidc.ScopeProfile, oidc.ScopeEmail},
	}, "")
	return refreshToken, err
}

func (r *recorder) CreateAccessToken(ctx context.Context, request op.TokenRequest) (string, time.Time, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	id, _, err := r.Storage.CreateAccessToken(ctx, deviceGrant(request))
	if err != nil {
		return "", time.Time{}, err
	}
	return id, r.issued(id), nil
}

func (r *recorder) CreateAccessAndRefreshTokens(ctx context.Context, request op.TokenRequest, current string) (string, string, time.Time, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	id, refreshToken, _, err := r.Storage.CreateAccessAndRefreshTokens(ctx, deviceGrant(request), current)
	if err != nil {
		if current != "" {
			r.refused(current)
		}
		return "", "", time.Time{}, err
	}
	if current != "" {
		r.counted.Exchanges++
		r.replaced[current] = true
		r.tokens[r.grants[current]].dead = true
		delete(r.grants, current)
	}
	r.grants[refreshToken] = id
	return id, refreshToken, r.issued(id), nil
}

func (r *recorder) issued(id string) time.Time {
	end := time.Now().Add(r.accessTTL)
	r.tokens[id] = &accessToken{end: end}
	return end
}

func (r *recorder) refused(refreshToken string) {
	r.counted.Refused++
	if r.replaced[refreshToken] {
		r.counted.Reused++
	}
}

// deviceGrant returns a device's grant in a form in which the example's storage finds its client.
func deviceGrant(request op.TokenRequest) op.TokenRequest {
	if state, ok := request.(*op.DeviceAuthorizationState); ok {
		return &storage.AuthRequest{ApplicationID: state.ClientID, UserID: state.Subject, Scopes: state.Scopes}
	}
	return request
}

func (r *recorder) TokenRequestByRefreshToken(ctx context.Context, refreshToken string) (op.RefreshTokenRequest, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	request, err := r.Storage.TokenRequestByRefreshToken(ctx, refreshToken)
	if err != nil {
		r.refused(refreshToken)
	}
	return request, err
}

func (r *recorder) GetRefreshTokenInfo(ctx context.Context, clientID, token string) (string, string, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.Storage.GetRefreshTokenInfo(ctx, clientID, token)
}

func (r *recorder) RevokeToken(ctx context.Context, tokenOrID, userID, clientID string) *oidc.Error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.Storage.RevokeToken(ctx, tokenOrID, userID, clientID); err != nil {
		return err
	}
	switch token, known := r.tokens[tokenOrID]; {
	case known && !time.Now().Before(token.end):
		r.counted.RevokedEnded++
	case known && !token.dead:
		r.counted.RevokedAccessTokens++
		token.dead = true
	case r.grants[tokenOrID] != "":
		r.counted.RevokedRefreshTokens++
		r.tokens[r.grants[tokenOrID]].dead = true
		delete(r.grants, tokenOrID)
	default:
		r.counted.RevokedOther++
	}
	return nil
}

func (r *recorder) SetUserinfoFromToken(ctx context.Context, userinfo *oidc.UserInfo, tokenID, subject, origin string) error {
	if r.ended(tokenID) {
		return errors.New("token is expired")
	}
	return r.Storage.SetUserinfoFromToken(ctx, userinfo, tokenID, subject, origin)
}

func (r *recorder) SetIntrospectionFromToken(ctx context.Context, answer *oidc.IntrospectionResponse, tokenID, subject, clientID string) error {
	if r.ended(tokenID) {
		return errors.New("token is expired")
	}
	return r.Storage.SetIntrospectionFromToken(ctx, answer, tokenID, subject, clientID)
}

func (r *recorder) ended(id string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	token, known := r.tokens[id]
	return known && !time.Now().Before(token.end)
}

func (r *recorder) CompleteDeviceAuthorization(ctx context.Context, userCode, userName string) error {
	return r.Storage.CompleteDeviceAuthorization(ctx, userCode, users{}.GetUserByUsername(userName).ID)
}

// GetClientByClientID permits the client the device flow too; the example has another kind of client for it, which gets no
// refresh tokens.
func (r *recorder) GetClientByClientID(ctx context.Context, clientID string) (op.Client, error) {
	c, err := r.Storage.GetClientByClientID(ctx, clientID)
	if err != nil {
		return nil, err
	}
	return client{c}, nil
}

type client struct{ op.Client }

func (c client) GrantTypes() []oidc.GrantType {
	return append(slices.Clone(c.Client.GrantTypes()), oidc.GrantTypeDeviceCode)
}

// The only user who can log in.
const (
	userID   = "asha"
	password = "verysecure"
)

// users is a storage.UserStore.
type users struct{}

func (users) GetUserByID(id string) *storage.User {
	if id != userID {
		return nil
	}
	return &storage.User{
		ID: userID, Username: userID, Password: password,
		FirstName: "Asha", LastName: "Rao", Email: "asha@example.com", EmailVerified: true,
	}
}

func (u users) GetUserByUsername(name string) *storage.User { return u.GetUserByID(name) }

func (users) ExampleClientID() string { return storage.ServiceUserID }
