package kaizalatest

import (
	"time"
)

// Call is a call that reached the token service. Calls of apps with an access token (/v1/users/me) are not recorded.
type Call struct {
	// Start is when the call came, End when its answer was ready or its client had cancelled; zero while it is under way.
	Start, End time.Time
	// ConnectorID is the connector ID in the call, right or wrong.
	ConnectorID string
	// User is the user of the refresh token in the call, dead or alive, or of the phone number; "" if the service has never
	// issued the token, or does not know the number.
	User string
	// Path is the path of the request.
	Path string
	// Status is the status of the answer, 0 if none was sent.
	Status int
	// Rotated is true if the service issued a new refresh token in an exchange, whether or not the answer arrived.
	Rotated bool
	// RefreshToken is the refresh token in the call, AccessToken the one that the service issued for it, whether or not the
	// answer arrived; "" if it issued none.
	RefreshToken, AccessToken string
}

// window counts what happened in the last 60 seconds.
type window struct {
	times []time.Time
	most  int
}

const minute = time.Minute

// prune drops calls that are 60 seconds old.
func (w *window) prune(now time.Time) {
	old := 0
	for old < len(w.times) && now.Sub(w.times[old]) >= minute {
		old++
	}
	w.times = w.times[old:]
}

func (w *window) add(now time.Time) {
	w.prune(now)
	w.times = append(w.times, now)
	w.most = max(w.most, len(w.times))
}

// wait returns how long to wait for a place in a window of that size, 0 if there is one.
func (w *window) wait(now time.Time, limit int) time.Duration {
	w.prune(now)
	if limit <= 0 || len(w.times) < limit {
		return 0
	}
	return minute - now.Sub(w.times[len(w.times)-limit])
}

func windowOf(m map[string]*window, key string) *window {
	w := m[key]
	if w == nil {
		w = &window{}
		m[key] = w
	}
	return w
}

// begin records a call; end must be called with it.
func (s *Service) begin(c Call) *Call {
	s.mu.Lock()
	defer s.mu.Unlock()
	c.Start = time.Now()
	if t := s.refresh[c.RefreshToken]; t != nil {
		c.User = t.user.name
	}
	if len(s.calls) >= maxCalls {
		s.calls = append([]*Call(nil), s.calls[maxCalls/2:]...)
	}
	s.calls = append(s.calls, &c)
	s.callCount++
	windowOf(s.busiest, c.ConnectorID).add(c.Start)
	return &c
}

func (s *Service) end(c *Call, status int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c.End, c.Status = time.Now(), status
}

// limited takes a call's place in the allowances of its connector and of the tenant (doc), or returns how long to wait.
// Calls that are refused take no place, and the 60 seconds slide (guess).
func (s *Service) limited(connectorID string) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	own := windowOf(s.windows, connectorID)
	if wait := max(own.wait(now, s.perConnector), s.all.wait(now, s.perTenant)); wait > 0 {
		return wait
	}
	own.add(now)
	s.all.add(now)
	return 0
}

// Calls returns the calls that the service got, in the order in which they came: the last 50,000 at least.
func (s *Service) Calls() []Call {
	s.mu.Lock()
	defer s.mu.Unlock()
	calls := make([]Call, len(s.calls))
	for i, c := range s.calls {
		calls[i] = *c
	}
	return calls
}

// ResetCalls resets Calls, CallCount, Exchanges and MaxPerMinute. The limits go on counting.
func (s *Service) ResetCalls() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls, s.callCount, s.busiest = nil, 0, map[string]*window{}
	for _, u := range s.users {
		u.granted = 0
	}
}

// CallCount returns how many calls the service got, also redirected, refused and unanswered ones.
func (s *Service) CallCount() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.callCount
}

// Exchanges returns how many of a user's exchanges were granted, whether or not the answer arrived.
func (s *Service) Exchanges(name string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if u := s.users[name]; u != nil {
		return u.granted
	}
	return 0
}

// TotalExchanges returns the same over all users.
func (s *Service) TotalExchanges() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	total := 0
	for _, u := range s.users {
		total += u.granted
	}
	return total
}

// MaxPerMinute returns the most calls with a connector's ID in any 60 seconds, also refused ones.
func (s *Service) MaxPerMinute(connectorID string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if w := s.busiest[connectorID]; w != nil {
		return w.most
	}
	return 0
}
