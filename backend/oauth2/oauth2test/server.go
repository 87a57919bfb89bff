// Package oauth2test is an OAuth 2.0 authorization server for tests, in the manner of net/http/httptest: refresh,
// code and device grants (RFC 6749, 7636, 8628), revocation (RFC 7009), introspection (RFC 7662), metadata (RFC 8414,
// OpenID Connect) and userinfo. [Options] make it behave like the servers that are in use, as the project's notes
// (OAUTH.md) describe them; [Fault] makes requests fail; [Server.Calls] and the counters show what clients did.
//
// Where real servers differ, it is as strict as the strictest, so that a client that works here works with all of them:
// the registered way of client authentication is required, two ways at once are refused, Basic must be encoded, and no
// parameter may come twice.
//
// Only parts of the tokens are random, and time is [time.Now], so a [Server] that was made inside a testing/synctest
// bubble uses the bubble's clock; reach it there through [Server.Transport], which needs no socket.
package oauth2test

import (
	"cmp"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"
)

// DefaultURL is a new server's issuer.
const DefaultURL = "https://as.example.com"

// The ways of client authentication, as RFC 8414 names them.
const (
	AuthBasic = "client_secret_basic"
	AuthPost  = "client_secret_post"
	AuthNone  = "none"
)

// Server is an authorization server, in memory. It is safe for concurrent use.
type Server struct {
	key []byte // of the JWTs

	mu      sync.Mutex
	opts    Options
	url     string
	clients map[string]*client
	grants  []*grant
	refresh map[string]*token // also ended ones, for their user and their successor
	access  map[string]*token // those that ended more than a day ago are deleted from time to time
	pruneAt int
	newest  map[string]string // the newest refresh token of each user
	codes   map[string]*code
	devices map[string]*device // by device code

	faults               []*Fault
	cleared              chan struct{} // closed by ClearFaults, which ends the hangs
	windows, busiest     map[string]*window
	calls                []*Call
	exchanges            map[string]int // by user
	usedTwice, graceUses int
	lost                 []Lost
}

type client struct {
	id, secret, method string
	redirectURIs       []string
}

// grant is what a user has consented to: a family of refresh tokens and their access tokens.
type grant struct {
	client *client
	user   string
	scopes []string
	begun  time.Time
	ended  time.Time
	why    string
	access []*token // the access tokens that have not ended
}

// token is a refresh token or an access token.
type token struct {
	grant  *grant
	value  string
	scopes []string
	issued time.Time
	// expires is zero for a refresh token without an end.
	expires time.Time
	// ended is when the token was ended before it expired, and why is the reason.
	ended time.Time
	why   string

	// For refresh tokens: when it was replaced, by which token, and whether it was exchanged.
	replaced                time.Time
	nextRefresh, nextAccess *token
	used                    bool
}

// New returns a server with zero [Options] and no client.
func New() *Server {
	s := &Server{
		key:       make([]byte, 32),
		url:       DefaultURL,
		clients:   map[string]*client{},
		refresh:   map[string]*token{},
		access:    map[string]*token{},
		pruneAt:   1024,
		newest:    map[string]string{},
		codes:     map[string]*code{},
		devices:   map[string]*device{},
		cleared:   make(chan struct{}),
		windows:   map[string]*window{},
		busiest:   map[string]*window{},
		exchanges: map[string]int{},
	}
	_, _ = rand.Read(s.key)
	return s
}

// Set changes the options. A preset, such as [ClassA], is such a change.
func (s *Server) Set(change func(*Options)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(&s.opts)
}

// SetURL sets the base URL of all addresses, which is the issuer; DefaultURL without it. It may have a path, and has
// no "/" at its end.
func (s *Server) SetURL(base string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.url = base
}

func (s *Server) at(path string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.url + path
}

// The paths below the issuer.
const (
	pathToken         = "/token"
	pathRevocation    = "/revoke"
	pathAuthorization = "/authorize"
	pathDevice        = "/device_authorization"
	pathVerification  = "/device"
	pathIntrospection = "/introspect"
	pathUserInfo      = "/userinfo"
	pathOAuth         = "/.well-known/oauth-authorization-server"
	pathOpenID        = "/.well-known/openid-configuration"
)

// Issuer returns the server's issuer, which is its base URL.
func (s *Server) Issuer() string { return s.at("") }

// TokenURL returns the token endpoint.
func (s *Server) TokenURL() string { return s.at(pathToken) }

// RevocationURL returns the revocation endpoint.
func (s *Server) RevocationURL() string { return s.at(pathRevocation) }

// AuthorizationURL returns the authorization endpoint.
func (s *Server) AuthorizationURL() string { return s.at(pathAuthorization) }

// DeviceURL returns the device authorization endpoint.
func (s *Server) DeviceURL() string { return s.at(pathDevice) }

// VerificationURL returns the page where a person types the user code of a device.
func (s *Server) VerificationURL() string { return s.at(pathVerification) }

// IntrospectionURL returns the introspection endpoint.
func (s *Server) IntrospectionURL() string { return s.at(pathIntrospection) }

// UserInfoURL returns the userinfo endpoint, which takes an access token as Bearer.
func (s *Server) UserInfoURL() string { return s.at(pathUserInfo) }

// RegisterClient registers a client with one way of authentication (AuthBasic, AuthPost or AuthNone) and the URIs
// that the browser may be sent back to. The secret is "" with AuthNone.
func (s *Server) RegisterClient(method string, redirectURIs ...string) (id, secret string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	id = "client-" + random(6)
	if s.opts.OddSecrets {
		id = "client:+/ %~&=" + random(6)
	}
	if method != AuthNone {
		secret = s.newSecret()
	}
	s.clients[id] = &client{id: id, secret: secret, method: method, redirectURIs: redirectURIs}
	return id, secret
}

func (s *Server) newSecret() string {
	if s.opts.OddSecrets {
		return random(12) + ":+/ %~&=%2B" + random(12)
	}
	return random(24)
}

// NewClientSecret gives a client a new secret and returns it. The old one is refused from now on. It returns "" if
// there is no such client, or if the client has no secret.
func (s *Server) NewClientSecret(id string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.clients[id]
	if c == nil || c.method == AuthNone {
		return ""
	}
	c.secret = s.newSecret()
	return c.secret
}

// DeleteClient deletes a client, and with it its grants.
func (s *Server) DeleteClient(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.clients, id)
	for _, g := range s.grants {
		if g.client.id == id {
			s.endGrant(g, "the client was deleted")
		}
	}
}

// Grant returns the refresh token of a new grant, as if the user had consented; "" if there is no such client.
func (s *Server) Grant(clientID, user string, scopes ...string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.clients[clientID]
	if c == nil {
		return ""
	}
	return s.issueRefresh(s.newGrant(c, user, scopes)).value
}

// Withdraw ends all grants of a user, as if he had withdrawn his consent. They do not count as lost grants.
func (s *Server) Withdraw(user string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, g := range s.grants {
		if g.user == user {
			s.endGrant(g, "the user withdrew it")
		}
	}
}

// CurrentRefreshToken returns the newest refresh token that was issued to a user, alive or not; "" when there was
// none.
func (s *Server) CurrentRefreshToken(user string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.newest[user]
}

// AccessTokens returns a user's access tokens that are alive, the oldest first.
func (s *Server) AccessTokens(user string) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	alive := []*token{}
	for _, g := range s.grants {
		if g.user == user {
			for _, t := range g.access {
				if t.alive(time.Now()) {
					alive = append(alive, t)
				}
			}
		}
	}
	slices.SortStableFunc(alive, func(a, b *token) int { return a.issued.Compare(b.issued) })
	values := []string{}
	for _, t := range alive {
		values = append(values, t.value)
	}
	return values
}

// Alive returns whether an access token works now.
func (s *Server) Alive(accessToken string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.access[accessToken]
	return t != nil && t.alive(time.Now())
}

// RefreshTokenAlive returns whether an exchange with that refresh token would be granted now, also within its grace.
func (s *Server) RefreshTokenAlive(refreshToken string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.refresh[refreshToken]
	return t != nil && s.exchangeable(t, time.Now())
}

// Status is what the server knows about a token.
type Status struct {
	// Known: the server has issued the token. The other fields are zero otherwise.
	Known bool
	// Alive: the access token works, or the refresh token would be exchanged.
	Alive bool
	// Type is "access_token" or "refresh_token".
	Type string

	ClientID, User string
	Scopes         []string
	Issued         time.Time
	// Expires is the end that the token was issued with; zero for a refresh token without an end.
	Expires time.Time
	// Replaced is when another refresh token replaced it; zero if none did.
	Replaced time.Time
	// Ended is when the token was ended before it expired, zero if it was not; Why is the reason, as text for people.
	Ended time.Time
	Why   string
}

// TokenStatus returns what the server knows about a token.
func (s *Server) TokenStatus(value string) Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	t, typ, alive := s.access[value], "access_token", false
	switch {
	case t != nil:
		alive = t.alive(time.Now())
	case s.refresh[value] != nil:
		t, typ = s.refresh[value], "refresh_token"
		alive = s.exchangeable(t, time.Now())
	default:
		return Status{}
	}
	st := Status{
		Known: true, Alive: alive, Type: typ, ClientID: t.grant.client.id, User: t.grant.user, Scopes: slices.Clone(t.scopes),
		Issued: t.issued, Expires: t.expires, Replaced: t.replaced, Ended: t.ended, Why: t.why,
	}
	if typ == "refresh_token" && !t.grant.ended.IsZero() {
		st.Ended, st.Why = t.grant.ended, t.grant.why
	}
	return st
}

// Subject returns a user's sub, and Email his email, in ID tokens and at userinfo.
func Subject(user string) string { return "sub-" + user }

// Email returns a user's email address: the name itself if it is one.
func Email(user string) string {
	if strings.Contains(user, "@") {
		return user
	}
	return user + "@example.com"
}

func (s *Server) newGrant(c *client, user string, scopes []string) *grant {
	g := &grant{client: c, user: user, scopes: slices.Clone(scopes), begun: time.Now()}
	s.grants = append(s.grants, g)
	return g
}

// endGrant ends a grant and its tokens, except JWTs, which live until they expire.
func (s *Server) endGrant(g *grant, why string) {
	if !g.ended.IsZero() {
		return
	}
	g.ended, g.why = time.Now(), why
	s.endAccess(g, why, s.opts.JWT)
}

// loseGrant ends a grant that its user has not withdrawn, and records it as lost.
func (s *Server) loseGrant(g *grant, why string) {
	if g.ended.IsZero() {
		s.lost = append(s.lost, Lost{ClientID: g.client.id, User: g.user, Why: why})
	}
	s.endGrant(g, why)
}

// endAccess ends a grant's access tokens.
func (s *Server) endAccess(g *grant, why string, spare bool) {
	if spare {
		return
	}
	now := time.Now()
	for _, t := range g.access {
		if t.alive(now) {
			t.ended, t.why = now, why
		}
	}
	g.access = nil
}

func (t *token) expired(now time.Time) bool { return !t.expires.IsZero() && !now.Before(t.expires) }

// alive returns whether a token has neither expired nor been ended.
func (t *token) alive(now time.Time) bool { return t.ended.IsZero() && !t.expired(now) }

// exchangeable returns whether a refresh token works.
func (s *Server) exchangeable(t *token, now time.Time) bool {
	return t.grant.ended.IsZero() && !t.expired(now) && (t.replaced.IsZero() || s.inGrace(t, now))
}

// inGrace returns whether a replaced refresh token still works.
func (s *Server) inGrace(t *token, now time.Time) bool {
	return now.Before(t.replaced.Add(s.opts.Grace)) && (!s.opts.GraceSame || !t.nextRefresh.used)
}

// issueRefresh issues a refresh token of a grant.
func (s *Server) issueRefresh(g *grant) *token {
	now := time.Now()
	t := &token{grant: g, scopes: g.scopes, issued: now, expires: s.refreshEnd(g, now)}
	t.value = "rt_" + random(32)
	if s.opts.RefreshTokenJWT {
		claims := map[string]any{"typ": "Refresh", "sub": Subject(g.user), "iat": now.Unix()}
		if !t.expires.IsZero() {
			claims["exp"] = t.expires.Unix()
		}
		t.value = s.jwt("JWT", claims, s.key)
	}
	s.refresh[t.value] = t
	s.newest[g.user] = t.value
	return t
}

// refreshEnd returns the end of a refresh token that is issued or used now.
func (s *Server) refreshEnd(g *grant, now time.Time) time.Time {
	switch {
	case s.opts.RefreshTokenLife <= 0:
		return time.Time{}
	case s.opts.RefreshTokenAbsolute:
		return g.begun.Add(s.opts.RefreshTokenLife)
	}
	return now.Add(s.opts.RefreshTokenLife)
}

// issueAccess issues an access token of a grant.
func (s *Server) issueAccess(g *grant, scopes []string) *token {
	now := time.Now()
	t := &token{grant: g, scopes: scopes, issued: now, expires: now.Add(cmp.Or(s.opts.AccessTokenLife, DefaultAccessTokenLife))}
	t.value = "at_" + random(32)
	if s.opts.JWT {
		t.value = s.jwt("at+jwt", map[string]any{
			"sub": Subject(g.user), "client_id": g.client.id, "scope": strings.Join(scopes, " "),
			"iat": now.Unix(), "exp": t.expires.Unix(),
		}, s.key)
	}
	if len(s.access) >= s.pruneAt {
		for value, old := range s.access {
			if now.Sub(old.expires) > 24*time.Hour {
				delete(s.access, value)
			}
		}
		s.pruneAt = max(1024, 2*len(s.access))
	}
	s.access[t.value] = t
	g.access = append(slices.DeleteFunc(g.access, func(t *token) bool { return !t.alive(now) }), t)
	return t
}

// jwt signs a token by HS256. jti makes two tokens of the same second different.
func (s *Server) jwt(typ string, claims map[string]any, key []byte) string {
	claims["iss"], claims["jti"] = s.url, random(12)
	signed := encode([]byte(`{"alg":"HS256","typ":"`+typ+`"}`)) + "." + encode([]byte(text(claims)))
	mac := hmac.New(sha256.New, key)
	mac.Write([]byte(signed))
	return signed + "." + encode(mac.Sum(nil))
}

func text(v any) string {
	raw, err := json.Marshal(v)
	if err != nil {
		panic(err) // Edit has set a value that JSON cannot encode
	}
	return string(raw)
}

func encode(raw []byte) string { return base64.RawURLEncoding.EncodeToString(raw) }

// random returns n random bytes as text.
func random(n int) string {
	b := make([]byte, n)
	_, _ = rand.Read(b)
	return encode(b)
}

// sameURL returns whether a URL is the endpoint at that path, without regard to its query.
func (s *Server) sameURL(u *url.URL, path string) bool {
	base := *u
	base.RawQuery, base.Fragment = "", ""
	return base.String() == s.at(path)
}
