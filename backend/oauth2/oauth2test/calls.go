package oauth2test

import "time"

// maxCalls is how many calls are kept for Calls; half of them are deleted when there are more.
const maxCalls = 100_000

// Call is a request that reached the server.
type Call struct {
	// Start is when the request came, End when its answer was ready or its client had cancelled; zero while it is under
	// way.
	Start, End time.Time
	// Endpoint is "" for a path that the server does not have.
	Endpoint Endpoint
	// Path is the request's.
	Path string
	// GrantType is grant_type, at the token endpoint.
	GrantType string
	// ClientID is the client ID in the request, right or wrong.
	ClientID string
	// User is the user of the token, code or device code in the request; "" if the server does not know that.
	User string
	// Token is the refresh token, or the token to be revoked or introspected, in the request.
	Token string
	// Expired is true if Token was known and had expired when it came; Left is the rest of its life, 0 if it has no end
	// or is not known.
	Expired bool
	Left    time.Duration
	// Status is the status of the answer, 0 if none was sent.
	Status int
	// Processed is true if the request was carried out, whether or not its answer was sent. Error is then the error code
	// of the answer without the fault, "" if the request was granted.
	Processed bool
	Error     string
	// AccessToken and RefreshToken are the issued ones, whether or not the answer arrived. Rotated is true if RefreshToken
	// is new and replaces Token.
	AccessToken, RefreshToken string
	Rotated                   bool
	// Reused is true if Token is a refresh token that had been replaced, in its grace or after it.
	Reused bool
}

// Granted returns whether the request was carried out without an error, whether or not its answer was sent.
func (c Call) Granted() bool { return c.Processed && c.Error == "" }

// window counts what happened in the last 60 seconds.
type window struct {
	times []time.Time
	most  int
}

func (w *window) prune(now time.Time) {
	old := 0
	for old < len(w.times) && now.Sub(w.times[old]) >= time.Minute {
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
	return time.Minute - now.Sub(w.times[len(w.times)-limit])
}

func windowOf(m map[string]*window, key string) *window {
	w := m[key]
	if w == nil {
		w = &window{}
		m[key] = w
	}
	return w
}

// counted returns whether an endpoint's calls count against the limit.
func (e Endpoint) counted() bool {
	return e == EndpointToken || e == EndpointRevocation || e == EndpointDevice
}

// begin records a call.
func (s *Server) begin(c *Call) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c.Start = time.Now()
	if len(s.calls) >= maxCalls {
		s.calls = append([]*Call(nil), s.calls[maxCalls/2:]...)
	}
	s.calls = append(s.calls, c)
	if c.Endpoint.counted() {
		windowOf(s.busiest, c.ClientID).add(c.Start)
	}
}

// end completes the record of a call.
func (s *Server) end(c *Call, status int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c.End, c.Status = time.Now(), status
}

// limited takes a call's place in its client's allowance, or returns how long to wait. Refused calls take no place.
func (s *Server) limited(c *Call) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !c.Endpoint.counted() {
		return 0
	}
	now, w := time.Now(), windowOf(s.windows, c.ClientID)
	wait := w.wait(now, s.opts.LimitPerMinute)
	if wait <= 0 {
		w.add(now)
	}
	return wait
}

// Calls returns the requests that the server got, in the order in which they came: the last 50,000 at least. With
// endpoints, only the requests to these.
func (s *Server) Calls(endpoints ...Endpoint) []Call {
	s.mu.Lock()
	defer s.mu.Unlock()
	calls := []Call{}
	for _, c := range s.calls {
		if len(endpoints) == 0 {
			calls = append(calls, *c)
		}
		for _, e := range endpoints {
			if c.Endpoint == e {
				calls = append(calls, *c)
			}
		}
	}
	return calls
}

// ResetCalls resets Calls, Exchanges, MaxPerMinute, UsedTwice, GraceUses and LostGrants. The limit goes on counting.
func (s *Server) ResetCalls() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls, s.busiest, s.exchanges, s.usedTwice, s.graceUses, s.lost = nil, map[string]*window{}, map[string]int{}, 0, 0, nil
}

// Exchanges returns how many of a user's refresh grants succeeded, whether or not the answer arrived.
func (s *Server) Exchanges(user string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.exchanges[user]
}

// TotalExchanges returns the same over all users.
func (s *Server) TotalExchanges() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	total := 0
	for _, n := range s.exchanges {
		total += n
	}
	return total
}

// MaxPerMinute returns the most calls of the token, revocation and device authorization endpoints that named a client
// in any 60 seconds, refused ones included.
func (s *Server) MaxPerMinute(clientID string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if w := s.busiest[clientID]; w != nil {
		return w.most
	}
	return 0
}

// UsedTwice returns how often a refresh token came after it had been replaced, in its grace or after it.
func (s *Server) UsedTwice() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.usedTwice
}

// GraceUses returns how many of those were granted, because the grace period was not over.
func (s *Server) GraceUses() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.graceUses
}

// Lost is a grant that ended although neither its user nor its client asked for that.
type Lost struct {
	ClientID, User string
	// Why is the reason, as text for people.
	Why string
}

// LostGrants returns the grants that ended because a refresh token or a code was used twice, because the revocation of
// an access token ended its grant, or because the revocation of another grant ended it.
func (s *Server) LostGrants() []Lost {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]Lost{}, s.lost...)
}
