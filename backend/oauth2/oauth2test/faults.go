package oauth2test

import "time"

// Endpoint is an endpoint of the server.
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

// Fault makes requests fail in some way.
type Fault struct {
	// Endpoint is the endpoint of the requests; "" is the token endpoint.
	Endpoint Endpoint
	// User and ClientID select the requests of a user and of a client; "" selects all. A request is a user's if it brings a
	// token, a code or a device code of that user.
	User, ClientID string
	// Times is the number of requests that the fault applies to; 0 is all requests until ClearFaults.
	Times int
	// Delay passes before anything else happens.
	Delay time.Duration
	// Hang waits until the client cancels, or ClearFaults is called; then the connection is reset.
	Hang bool
	// Hold carries the request out and holds the answer back until ClearFaults is called, or the client cancels.
	Hold bool
	// Process carries the request out before the fault answers: with Reset or Hang the right answer is lost.
	Process bool
	// Reset breaks the connection instead of answering.
	Reset bool
	// Truncate cuts the right answer off, after TruncateAt bytes of its body or, with 0, in the middle. It implies
	// Process. TruncateQuietly does the same, and ends the answer as if it were complete.
	Truncate, TruncateQuietly bool
	TruncateAt                int
	// Answer, if its Status is not 0, is sent instead of the right answer.
	Answer
}

// Inject queues a fault. A request takes the first fault in the queue that selects it and has uses left; a request that
// is over the limit takes none.
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

// fault returns the fault for a call, and the channel whose close ends its hang or hold.
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
