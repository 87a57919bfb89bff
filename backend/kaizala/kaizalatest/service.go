// Package kaizalatest emulates Kaizala for tests, in the manner of net/http/httptest: the portal, where connectors are
// registered and refresh tokens are generated, and the token service, which exchanges them.
//
// Only parts of the tokens are random, and time is [time.Now], so a [Service] that was made inside a testing/synctest
// bubble uses the bubble's clock; reach it there through [Service.Transport], which needs no socket.
//
// The source of each behaviour is marked as in the project's notes: (doc) is Microsoft's documentation, (client) is at
// least one published client, (guess) is ours.
package kaizalatest

import (
	"crypto/rand"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"
)

// The documented values, which the switches change.
const (
	DefaultAccessTokenLife   = 24 * time.Hour       // (doc)
	DefaultRefreshTokenLife  = 365 * 24 * time.Hour // (doc)
	DefaultLimitPerConnector = 100                  // calls in a minute (doc)
	DefaultLimitPerTenant    = 300                  // calls in a minute, over all connectors (doc)
	// DefaultEndpointURL is the base URL of an app's calls in an exchange's answer, if the Service has no URL of its own (doc).
	DefaultEndpointURL = "https://inc-000.kaizalamessaging.osi.office.net"
)

// maxCalls is how many calls are kept for Calls; half of them are deleted when there are more.
const maxCalls = 100_000

// Service is Kaizala's portal and token service, in memory: one tenant (one organization) with its connectors and users.
// It is safe for concurrent use.
type Service struct {
	key []byte
	url string // the URL of the Server around it

	mu         sync.Mutex
	connectors map[string]*connector
	users      map[string]*user
	refresh    map[string]*refreshToken   // also dead ones, for their user
	held       map[holder][]*refreshToken // those that end when the portal generates the next one for the holder
	access     map[string]accessToken
	pruneAt    int // the size at which access is pruned of what has expired

	accessLife, refreshLife time.Duration
	refreshAge              time.Duration // the age of a refresh token that the portal generates
	oldLives                bool
	perConnector, perTenant int
	endpoint                string
	empty                   bool // whether the next empty refreshToken is "" or null
	windows                 map[string]*window
	all                     window
	faults                  []*Fault
	cleared                 chan struct{} // closed by ClearFaults, which ends the hangs
	calls                   []*Call
	callCount               int
	busiest                 map[string]*window
	pins                    map[holder]*pin
	sms                     func(mobileNumber, text string)
}

type connector struct {
	secret               string
	deleted, deactivated bool
}

type user struct {
	name, id, phone   string
	newest            string // the newest refresh token
	granted           int
	location          string
	locationIsPassing bool
}

// holder is the user, connector and group that a token was made for.
type holder struct {
	connector string
	user      *user
	group     string
}

type refreshToken struct {
	holder
	issued, expires time.Time
	dead            bool
}

type accessToken struct {
	holder
	expires time.Time
}

// New returns a Service with nothing registered and the documented limits and lives. A refresh token ends when a new one
// replaces it.
func New() *Service {
	s := &Service{
		key:          make([]byte, 32),
		connectors:   map[string]*connector{},
		users:        map[string]*user{},
		refresh:      map[string]*refreshToken{},
		held:         map[holder][]*refreshToken{},
		access:       map[string]accessToken{},
		pruneAt:      1024,
		accessLife:   DefaultAccessTokenLife,
		refreshLife:  DefaultRefreshTokenLife,
		perConnector: DefaultLimitPerConnector,
		perTenant:    DefaultLimitPerTenant,
		windows:      map[string]*window{},
		busiest:      map[string]*window{},
		pins:         map[holder]*pin{},
		cleared:      make(chan struct{}),
	}
	_, _ = rand.Read(s.key)
	return s
}

// RegisterConnector registers a connector (step 1 of the procedure, doc) and returns its ID, a GUID, and its secret, 10
// upper-case letters and digits (client).
func (s *Service) RegisterConnector() (id, connectorSecret string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	id, connectorSecret = guid(), secret()
	s.connectors[id] = &connector{secret: connectorSecret}
	return id, connectorSecret
}

// SetConnectorSecret replaces a connector's secret; the old one is refused from now on (guess). It does nothing for an
// unknown connector.
func (s *Service) SetConnectorSecret(id, connectorSecret string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c := s.connectors[id]; c != nil {
		c.secret = connectorSecret
	}
}

// NewConnectorSecret replaces a connector's secret with a random one and returns it; "" when there is no such connector.
func (s *Service) NewConnectorSecret(id string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.connectors[id]
	if c == nil || c.deleted {
		return ""
	}
	c.secret = secret()
	return c.secret
}

// DeleteConnector deletes a connector: its refresh tokens end (doc), its access tokens live until they expire.
func (s *Service) DeleteConnector(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c := s.connectors[id]; c != nil {
		c.deleted = true
	}
	for _, t := range s.refresh {
		if t.connector == id {
			t.dead = true
		}
	}
}

// DeactivateConnector deactivates a connector: the portal generates no new tokens for it (doc), and its existing tokens are
// still exchanged and rotated (guess).
func (s *Service) DeactivateConnector(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c := s.connectors[id]; c != nil {
		c.deactivated = true
	}
}

// GenerateUserToken generates a user's refresh token for a connector (step 2 of the procedure, doc). The user's token for
// the same connector before it ends (doc). It returns "" if the portal would refuse: the connector is unknown, deleted or
// deactivated.
func (s *Service) GenerateUserToken(connectorID, user string) string {
	return s.generate(connectorID, user, "")
}

// GenerateGroupToken does the same from a group's page: the token gives access to that group alone (doc). It replaces the
// user's token for that group and no other (guess).
func (s *Service) GenerateGroupToken(connectorID, user, groupID string) string {
	return s.generate(connectorID, user, groupID)
}

func (s *Service) generate(connectorID, name, group string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.connectors[connectorID]
	if c == nil || c.deleted || c.deactivated {
		return ""
	}
	h := holder{connector: connectorID, user: s.user(name), group: group}
	return s.replaceRefreshToken(h, now().Add(-s.refreshAge))
}

// replaceRefreshToken issues a refresh token, and ends those that the holder had.
func (s *Service) replaceRefreshToken(h holder, issued time.Time) string {
	for _, t := range s.held[h] {
		t.dead = true
	}
	s.held[h] = nil
	return s.issueRefreshToken(h, issued)
}

// user returns the user of that name, and creates it if there is none.
func (s *Service) user(name string) *user {
	u := s.users[name]
	if u == nil {
		u = &user{name: name, id: guid(), phone: "+9155501" + digits(len(s.users))}
		s.users[name] = u
	}
	return u
}

func digits(n int) string {
	const width = 5
	b := []byte(strings.Repeat("0", width))
	for i := width - 1; i >= 0; i-- {
		b[i] += byte(n % 10)
		n /= 10
	}
	return string(b)
}

func (s *Service) issueRefreshToken(h holder, issued time.Time) string {
	expires := issued.Add(s.refreshLife)
	token := s.jwt(h, issued, expires)
	t := &refreshToken{holder: h, issued: issued, expires: expires}
	s.refresh[token] = t
	s.held[h] = append(s.held[h], t)
	h.user.newest = token
	return token
}

// now is the time in whole seconds, the precision of a JWT's claims.
func now() time.Time { return time.Now().Truncate(time.Second) }

// SetAccessTokenLife sets how long access tokens live that are issued from now on; 0 is the documented 24 hours.
func (s *Service) SetAccessTokenLife(d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.accessLife = orDefault(d, DefaultAccessTokenLife)
}

// SetRefreshTokenLife sets how long refresh tokens live that are issued from now on, in whole seconds; 0 is the documented
// 365 days.
func (s *Service) SetRefreshTokenLife(d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.refreshLife = orDefault(d, DefaultRefreshTokenLife)
}

// SetRefreshTokenAge sets the age, in whole seconds, of the refresh tokens that the portal generates from now on, as if
// their users had kept them for so long (ours, for tests that cannot wait: the documented age is 0). Their lives are
// shorter by that. Refresh tokens of exchanges are always new.
func (s *Service) SetRefreshTokenAge(d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.refreshAge = max(0, d.Truncate(time.Second))
}

func orDefault(d, otherwise time.Duration) time.Duration {
	if d <= 0 {
		return otherwise
	}
	return d
}

// SetOldTokenDies sets whether a refresh token ends when an exchange returns a new one, which is not documented. The
// default is true.
func (s *Service) SetOldTokenDies(dies bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.oldLives = !dies
}

// SetLimits sets how many calls a connector, and the tenant over all its connectors, may make in 60 seconds; 0 is no limit.
// The defaults are the documented 100 and 300.
func (s *Service) SetLimits(perConnector, perTenant int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.perConnector, s.perTenant = perConnector, perTenant
}

// Limits returns what SetLimits has set.
func (s *Service) Limits() (perConnector, perTenant int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.perConnector, s.perTenant
}

// SetEndpointURL sets the base URL of the apps' calls in the answers to exchanges. "" is the Server's own URL, or
// DefaultEndpointURL.
func (s *Service) SetEndpointURL(u string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.endpoint = u
}

// MoveUser answers each exchange of a user with a 308 to location (doc), except an exchange that comes to location's host
// and path, which are the parts of the URL that the Service sees. A location without a path is a base URL. "" ends the
// move.
func (s *Service) MoveUser(name, location string) { s.move(name, location, false) }

// MoveUserTemporarily is like MoveUser, with a 307 (guess).
func (s *Service) MoveUserTemporarily(name, location string) { s.move(name, location, true) }

func (s *Service) move(name, location string, passing bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	u := s.user(name)
	u.location, u.locationIsPassing = location, passing
}

// arrived returns whether a request has come to the location that its user was moved to.
func (u *user) arrived(r *http.Request) bool {
	to, err := url.Parse(u.location)
	if err != nil {
		return false
	}
	path := to.Path
	if path == "" || path == "/" {
		path = exchangePath
	}
	return (to.Host == "" || strings.EqualFold(to.Host, r.Host)) && path == r.URL.Path
}

// RefreshTokenAlive returns whether an exchange with that refresh token would be granted.
func (s *Service) RefreshTokenAlive(token string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.refresh[token]
	return t != nil && t.alive()
}

func (t *refreshToken) alive() bool { return !t.dead && time.Now().Before(t.expires) }

// CurrentRefreshToken returns the newest refresh token that was issued to a user, by the portal or by an exchange, for any
// connector or group; "" if there was none.
func (s *Service) CurrentRefreshToken(name string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if u := s.users[name]; u != nil {
		return u.newest
	}
	return ""
}

// AccessTokenAlive returns whether an app can use that access token now.
func (s *Service) AccessTokenAlive(token string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, alive := s.accessToken(token)
	return alive
}

func (s *Service) accessToken(token string) (accessToken, bool) {
	t, ok := s.access[token]
	return t, ok && time.Now().Before(t.expires)
}

// issueAccessToken issues an access token, and from time to time deletes those that have expired.
func (s *Service) issueAccessToken(h holder) (string, time.Time) {
	if len(s.access) >= s.pruneAt {
		for token, t := range s.access {
			if !time.Now().Before(t.expires) {
				delete(s.access, token)
			}
		}
		s.pruneAt = max(1024, 2*len(s.access))
	}
	// In whole milliseconds, the precision of accessTokenExpiry.
	expires := time.UnixMilli(time.Now().Add(s.accessLife).UnixMilli())
	token := s.jwt(h, time.Now(), expires)
	s.access[token] = accessToken{holder: h, expires: expires}
	return token, expires
}
