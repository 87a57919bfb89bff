package kaizalatest

import (
	"net/http"
	"time"
)

// Fault makes an exchange, or a call of the PIN login, fail in some way. The zero Fault changes nothing.
type Fault struct {
	// User is the user whose exchanges fail; "" is every user.
	User string
	// Times is the number of exchanges that the fault applies to; 0 is all until ClearFaults.
	Times int
	// Delay passes before anything else happens.
	Delay time.Duration
	// Hang waits until the client cancels, or ClearFaults or Close is called; then the connection is reset.
	Hang bool
	// Hold carries the exchange out and holds the answer back until ClearFaults or Close is called, or the client cancels.
	Hold bool
	// Process carries the exchange out before the fault answers: an access token is issued, and in the rotation window a new
	// refresh token, which may end the old one.
	Process bool
	// Reset breaks the connection instead of answering.
	Reset bool
	// Truncate cuts the right answer off, after TruncateAt bytes of its body or, with 0, in the middle. It implies Process.
	Truncate   bool
	TruncateAt int
	// Status, if not 0, is sent with Header and Body instead of the right answer.
	Status int
	Header http.Header
	Body   string
}

// Inject queues a fault. An exchange takes the first fault in the queue that is for its user and has uses left; a call
// that is over the limits takes none.
func (s *Service) Inject(f Fault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f.Header = f.Header.Clone()
	s.faults = append(s.faults, &f)
}

// ClearFaults empties the queue, ends the hangs, and sends the answers that were held.
func (s *Service) ClearFaults() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults = nil
	close(s.cleared)
	s.cleared = make(chan struct{})
}

// fault returns the fault for an exchange of that user, and the channel whose close ends its hang or hold.
func (s *Service) fault(name string) (Fault, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, f := range s.faults {
		if f.User != "" && f.User != name {
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
