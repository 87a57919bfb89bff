package oauth2test

import "time"

// maxCalls is how many calls are kept for Calls; half of them are forgotten when there are more.
const maxCalls = 100_000

// Call is a request that reached the server.
type Call struct {
	// Start is when it came in, End when its answer was ready or its client had gone away; zero while it is under
	// way.
	Start, End time.Time
	// Endpoint is "" for a path that the server does not have.
	Endpoint Endpoint
	// Path is the request's.
	Path string
	// GrantType is the one that was sent to the token endpoint.
	GrantType string
	// ClientID is the one that the request named, right or wrong.
	ClientID string
	// User is whose token, code or device code it brought; "" where the server does not know it.
	User string
	// Token is the refresh token, or the token to be revoked or introspected, that the request brought.
	Token string
	// Expired says that Token was known and past its end when it came; Left is what was left of its life, 0 where it
	// has no end or is not known.
	Expired bool
	Left    time.Duration
	// Status is that of the answer that was sent, 0 where none was.
	Status int
	// Processed says that the request was carried out, whether or not its answer was sent. Error is then the error
	// code of the right answer, "" where it was granted.
	Processed bool
	Error     string
	// AccessToken and RefreshToken are those that were given, whether or not the answer arrived. Rotated says that
	// the refresh token is a new one in the place of the one that came.
	AccessToken, RefreshToken string
	Rotated                   bool
	// Reused says that a refresh token came that had been replaced, in its grace or after it.
	Reused bool
}

// Granted says that the request was carried out and was no error, whether or not its answer was sent.
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

// wait returns how long to wait for a place in a window of that size, 0 when there is one.
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

// counted says which endpoints count against the limit.
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

// end completes its record.
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

// Calls returns the requests that were seen, in the order in which they came: the last 50,000 at least. With
// endpoints, only those that came there.
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

// ResetCalls forgets what Calls, Exchanges, MaxPerMinute, UsedTwice, GraceUses and LostGrants tell. The limit goes on
// counting.
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

// Lost is a grant that ended though neither the user nor its client asked for that.
type Lost struct {
	ClientID, User string
	// Why is what ended it, for people.
	Why string
}

// LostGrants returns the grants that ended because a refresh token or a code was used twice, because the revocation
// of an access token took the grant with it, or because the revocation of another grant did.
func (s *Server) LostGrants() []Lost {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]Lost{}, s.lost...)
}
