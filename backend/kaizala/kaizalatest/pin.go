package kaizalatest

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"encoding/json"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"strings"
	"time"
)

const (
	sendPINPath   = "/v1/generatePin"                  // (doc)
	redeemPINPath = "/v1/loginWithPinAndApplicationId" // (doc)
)

const (
	// PINLife is how long a PIN can be redeemed (guess).
	PINLife = 10 * time.Minute
	// PINTries is the number of wrong PINs after which a PIN cannot be redeemed any more (guess).
	PINTries = 5
	// maxPINBody is the maximum size of the body of a call, in bytes.
	maxPINBody = 64 << 10
)

// pin is the PIN that was sent to a user for a connector. A new one replaces it, and a success uses it up (guess).
type pin struct {
	digits  string
	expires time.Time
	tries   int // the tries that are left
}

// PhoneNumber returns a user's phone number, with its country code. A new user gets one.
func (s *Service) PhoneNumber(name string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.user(name).phone
}

// PIN returns the newest PIN that was sent to a user for a connector and can still be redeemed; "" if there is none.
func (s *Service) PIN(connectorID, name string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p := s.pins[holder{connector: connectorID, user: s.user(name)}]; p != nil && p.good() {
		return p.digits
	}
	return ""
}

func (p *pin) good() bool { return p.tries > 0 && time.Now().Before(p.expires) }

// OnSMS sets a function that is called with each SMS that the service sends. It must not call the Service.
func (s *Service) OnSMS(f func(mobileNumber, text string)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sms = f
}

// pin answers both calls of the PIN login. The form of their errors is not documented; it is that of the exchange's (guess).
func (s *Service) pin(ctx context.Context, r *http.Request) reply {
	var body struct{ MobileNumber, ApplicationID, ApplicationSecret, PIN string }
	if r.Body != nil {
		_ = json.NewDecoder(io.LimitReader(r.Body, maxPINBody)).Decode(&body) // a body that is no such object has no fields
	}
	s.mu.Lock()
	var known *user
	for _, u := range s.users {
		if u.phone == body.MobileNumber {
			known = u
		}
	}
	s.mu.Unlock()
	c := Call{Path: r.URL.Path, ConnectorID: body.ApplicationID}
	if known != nil {
		c.User = known.name
	}
	begun := s.begin(c)
	return s.serve(ctx, begun, func() reply {
		s.mu.Lock()
		defer s.mu.Unlock()
		redeeming := strings.HasSuffix(r.URL.Path, redeemPINPath)
		connector := s.connectors[body.ApplicationID]
		switch {
		case r.Method != http.MethodPost:
			return reply{status: http.StatusMethodNotAllowed, header: http.Header{}, cut: -1}
		case body.MobileNumber == "" || body.ApplicationID == "" || redeeming && (body.ApplicationSecret == "" || body.PIN == ""):
			return errorReply(http.StatusBadRequest, "Invalid parameters", "InvalidParameters", "InvalidParametersException")
		case connector == nil || connector.deleted || connector.deactivated,
			redeeming && subtle.ConstantTimeCompare([]byte(connector.secret), []byte(body.ApplicationSecret)) != 1:
			return errorReply(http.StatusUnauthorized, "Dont have correct applicationId and secret in header!", "Unauthenticated", "AuthException")
		case known == nil:
			return errorReply(http.StatusBadRequest, "Unknown mobile number", "InvalidParameters", "InvalidParametersException")
		}
		h := holder{connector: body.ApplicationID, user: known}
		if redeeming {
			return s.redeem(h, body.PIN)
		}
		return s.sendPIN(h)
	})
}

func (s *Service) sendPIN(h holder) reply {
	n, _ := rand.Int(rand.Reader, big.NewInt(1_000_000))
	p := &pin{digits: fmt.Sprintf("%06d", n), expires: time.Now().Add(PINLife), tries: PINTries}
	s.pins[h] = p
	if s.sms != nil {
		s.sms(h.user.phone, "Your PIN for Kaizala is "+p.digits)
	}
	return jsonReply(http.StatusOK, map[string]any{})
}

func (s *Service) redeem(h holder, digits string) reply {
	p := s.pins[h]
	if p == nil || !p.good() || p.digits != digits {
		if p != nil {
			p.tries--
		}
		return errorReply(http.StatusUnauthorized, "Invalid pin", "InvalidPin", "AuthException")
	}
	delete(s.pins, h)
	token := s.replaceRefreshToken(h, now())
	return jsonReply(http.StatusOK, map[string]any{
		"refreshToken":       token,
		"grantedScope":       "token.write",
		"refreshTokenExpiry": s.refresh[token].expires.UnixMilli(),
		"endpointUrl":        s.endpointURL(),
	})
}
