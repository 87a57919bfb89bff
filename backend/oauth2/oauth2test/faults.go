package oauth2test

import "time"

// Endpoint is one of the server's.
type Endpoint string

// The endpoints. EndpointDevice is where device authorizations begin; polls come to EndpointToken.
// EndpointVerification is the page where a person types the user code.
const (
	EndpointToken         Endpoint = "token"
	EndpointRevocation    Endpoint = "revocation"
	EndpointDevice        Endpoint = "device"
	EndpointMetadata      Endpoint = "metadata"
	EndpointIntrospection Endpoint = "introspection"
	EndpointUserInfo      Endpoint = "userinfo"
	EndpointAuthorization Endpoint = "authorization"
	EndpointVerification  Endpoint = "verification"
)

// Fault is something that goes wrong with a request.
type Fault struct {
	// Endpoint is where; "" is the token endpoint.
	Endpoint Endpoint
	// User and ClientID are whose requests go wrong; "" is everyone's. A request is a user's if it brings a token, a
	// code or a device code of that user.
	User, ClientID string
	// Times is how many requests it befalls; 0 means all until ClearFaults.
	Times int
	// Delay passes before anything else happens.
	Delay time.Duration
	// Hang waits until the client goes away, or ClearFaults is called; then the connection is reset.
	Hang bool
	// Hold carries the request out and keeps the answer back until ClearFaults is called, or the client goes away.
	Hold bool
	// Process carries the request out before the fault answers: with Reset or Hang the right answer is lost.
	Process bool
	// Reset breaks the connection instead of answering.
	Reset bool
	// Truncate cuts the right answer off, after TruncateAt bytes of its body or, with 0, in the middle. It implies
	// Process. TruncateQuietly does the same and ends the answer as if it were whole.
	Truncate, TruncateQuietly bool
	TruncateAt                int
	// Answer, where its Status is not 0, is given instead of the right answer.
	Answer
}

// Inject queues a fault. A request takes the first fault in the queue that is meant for it and has uses left; one
// that is over the limit takes none.
func (s *Server) Inject(f Fault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if f.Endpoint == "" {
		f.Endpoint = EndpointToken
	}
	f.Header = f.Header.Clone()
	s.faults = append(s.faults, &f)
}

// ClearFaults empties the queue, ends the hangs, and sends the answers that were held.
func (s *Server) ClearFaults() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults = nil
	close(s.cleared)
	s.cleared = make(chan struct{})
}

// fault returns the fault that befalls a call, and what ends its hang or hold.
func (s *Server) fault(c *Call) (Fault, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, f := range s.faults {
		if f.Endpoint != c.Endpoint || (f.User != "" && f.User != c.User) || (f.ClientID != "" && f.ClientID != c.ClientID) {
			continue
		}
		found := *f
		if f.Times == 1 {
			s.faults = append(s.faults[:i:i], s.faults[i+1:]...)
		} else if f.Times > 1 {
			f.Times--
		}
		return found, s.cleared
	}
	return Fault{}, s.cleared
}
