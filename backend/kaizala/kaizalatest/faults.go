package kaizalatest

import (
	"net/http"
	"time"
)

// Fault is something that goes wrong with an exchange, or with a call of the PIN login. The zero Fault changes nothing.
type Fault struct {
	// User is whose exchanges go wrong; "" is every user's.
	User string
	// Times is how many exchanges it befalls; 0 means all until ClearFaults.
	Times int
	// Delay passes before anything else happens.
	Delay time.Duration
	// Hang waits until the client goes away, or ClearFaults or Close is called; then the connection is reset.
	Hang bool
	// Hold carries the exchange out and keeps the answer back until ClearFaults or Close is called, or the client goes away.
	Hold bool
	// Process carries the exchange out before the fault answers: an access token is issued, and in the rotation window a new
	// refresh token, which may kill the old one.
	Process bool
	// Reset breaks the connection instead of answering.
	Reset bool
	// Truncate cuts the right answer off, after TruncateAt bytes of its body or, with 0, in the middle. It implies Process.
	Truncate   bool
	TruncateAt int
	// Status, where it is not 0, is answered with Header and Body instead of the right answer.
	Status int
	Header http.Header
	Body   string
}

// Inject queues a fault. An exchange takes the first fault in the queue that is meant for its user and has uses left; a
// call that is over the limits takes none.
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

// fault returns the fault that befalls an exchange of that user, and what ends its hang or hold.
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
