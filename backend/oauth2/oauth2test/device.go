package oauth2test

import (
	"cmp"
	"crypto/rand"
	"errors"
	"net/http"
	"slices"
	"strings"
	"time"
)

// device is a device authorization (RFC 8628).
type device struct {
	client         *client
	userCode       string
	scopes         []string
	expires        time.Time
	interval       time.Duration
	polled         time.Time
	user           string // who approved it
	denied, redeem bool
}

// deviceAuthorization is RFC 8628, section 3.1.
func (s *Server) deviceAuthorization(q *request, _ *Call) reply {
	s.mu.Lock()
	defer s.mu.Unlock()
	cl, refusal := s.authenticate(q)
	if cl == nil {
		return refusal
	}
	life := cmp.Or(s.opts.DeviceLife, DefaultDeviceLife)
	d := &device{
		client: cl, userCode: userCode(), scopes: strings.Fields(q.form.Get("scope")), expires: time.Now().Add(life),
		interval: cmp.Or(s.opts.DeviceInterval, DefaultDeviceInterval),
	}
	value := "dc_" + random(24)
	s.devices[value] = d
	uri := "verification_uri"
	if s.opts.VerificationURL {
		uri = "verification_url"
	}
	return s.granted(q, EndpointDevice, map[string]any{
		"device_code":     value,
		"user_code":       d.userCode,
		uri:               s.url + pathVerification,
		uri + "_complete": s.url + pathVerification + "?user_code=" + d.userCode,
		"expires_in":      int64(life / time.Second),
		"interval":        int64(d.interval / time.Second),
	})
}

// userCode returns eight consonants (RFC 8628, section 6.1).
func userCode() string {
	const letters = "BCDFGHJKLMNPQRSTVWXZ"
	var b [8]byte
	_, _ = rand.Read(b[:])
	for i := range b {
		b[i] = letters[int(b[i])%len(letters)]
	}
	return string(b[:4]) + "-" + string(b[4:])
}

// deviceGrant is a poll (RFC 8628, sections 3.4 and 3.5). A poll before the end of the interval makes the interval 5
// seconds longer.
func (s *Server) deviceGrant(q *request, c *Call, cl *client) reply {
	if q.form.Get("device_code") == "" {
		return s.invalid(q, "device_code is missing.")
	}
	d, now := s.devices[q.form.Get("device_code")], time.Now()
	if d == nil || d.client != cl || d.redeem {
		return s.refusedToken(q)
	}
	if !now.Before(d.expires) {
		return s.fail(q, http.StatusBadRequest, "expired_token", "The device code has expired.")
	}
	early := now.Sub(d.polled) < d.interval
	d.polled = now
	switch {
	case early:
		d.interval += 5 * time.Second
		return s.fail(q, http.StatusBadRequest, "slow_down", "Poll less often.")
	case d.denied:
		return s.fail(q, http.StatusBadRequest, "access_denied", "The user has denied access.")
	case d.user == "":
		return s.fail(q, http.StatusBadRequest, "authorization_pending", "The user has not decided.")
	}
	d.redeem = true
	return s.firstTokens(q, c, s.newGrant(cl, d.user, d.scopes), slices.Contains(d.scopes, "offline_access"), "")
}

// ApproveDevice plays the person who types the user code and consents. Its error is the text of the page.
func (s *Server) ApproveDevice(userCode, user string) error {
	if user == "" {
		return errors.New("name the user")
	}
	return s.decideDevice(userCode, func(d *device) { d.user = user })
}

// DenyDevice is like ApproveDevice, but the person does not consent.
func (s *Server) DenyDevice(userCode string) error {
	return s.decideDevice(userCode, func(d *device) { d.denied = true })
}

func (s *Server) decideDevice(userCode string, decide func(*device)) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, d := range s.devices {
		switch {
		case plain(d.userCode) != plain(userCode):
		case !time.Now().Before(d.expires):
			return errors.New("the code has expired")
		case d.user != "" || d.denied:
			return errors.New("the code was used already")
		default:
			decide(d)
			return nil
		}
	}
	return errors.New("there is no such code")
}

// plain returns a user code as a person has typed it without hyphens and spaces, in upper case.
func plain(userCode string) string {
	return strings.ToUpper(strings.NewReplacer("-", "", " ", "").Replace(userCode))
}

// verificationPage is where a person types the user code: POST has "user_code", "decision" (allow or deny) and
// "user".
func (s *Server) verificationPage(q *request, _ *Call) reply {
	if q.Method != http.MethodPost {
		return htmlReply(http.StatusOK, pageData{
			Title: "Connect a device", Text: "Type the code that the device shows.",
			UserCode: q.URL.Query().Get("user_code"), Form: true, Code: true,
		})
	}
	title, err := "The device is connected", error(nil)
	if q.form.Get("decision") == "allow" {
		err = s.ApproveDevice(q.form.Get("user_code"), q.form.Get("user"))
	} else {
		title = "Access is denied"
		err = s.DenyDevice(q.form.Get("user_code"))
	}
	if err != nil {
		return errorPage(err)
	}
	return htmlReply(http.StatusOK, pageData{Title: title, Text: "You can close this window."})
}
