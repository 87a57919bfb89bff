package kaizalatest

import (
	"cmp"
	"context"
	"crypto/subtle"
	"net/http"
	"strconv"
	"strings"
	"time"
)

const (
	exchangePath = "/v1/accessToken" // (doc)
	mePath       = "/v1/users/me"    // (client)
)

// reply is an answer, or a broken connection.
type reply struct {
	status int
	header http.Header
	body   string
	// cut is the number of bytes of the body after which the connection breaks; less than 0 means that it does not.
	cut int
	// none breaks the connection without an answer.
	none bool
}

func jsonReply(status int, v map[string]any) reply {
	return reply{status: status, header: http.Header{"Content-Type": {"application/json; charset=utf-8"}}, body: text(v), cut: -1}
}

// errorReply is the error object (client). The status that goes with it is not documented (guess).
func errorReply(status int, message, code, category string) reply {
	return jsonReply(status, map[string]any{"message": message, "errorCode": code, "errorCategoryKey": category})
}

// answer answers a request. ServeHTTP and Transport both use it.
func (s *Service) answer(ctx context.Context, r *http.Request) reply {
	switch {
	case strings.HasSuffix(r.URL.Path, mePath):
		return s.me(r)
	case strings.HasSuffix(r.URL.Path, exchangePath):
		c := s.begin(Call{Path: r.URL.Path, ConnectorID: r.Header.Get("applicationId"), RefreshToken: r.Header.Get("refreshToken")})
		return s.serve(ctx, c, func() reply { return s.process(r, c) })
	case strings.HasSuffix(r.URL.Path, sendPINPath), strings.HasSuffix(r.URL.Path, redeemPINPath):
		return s.pin(ctx, r)
	}
	c := s.begin(Call{Path: r.URL.Path, ConnectorID: r.Header.Get("applicationId"), RefreshToken: r.Header.Get("refreshToken")})
	a := reply{status: http.StatusNotFound, header: http.Header{"Content-Type": {"text/html"}}, body: "<html><body>Not found</body></html>", cut: -1}
	s.end(c, a.status)
	return a
}

// limitReply is HTTP 429 with Retry-After in seconds (doc).
func limitReply(wait time.Duration) reply {
	a := reply{status: http.StatusTooManyRequests, header: http.Header{}, cut: -1}
	a.header.Set("Retry-After", strconv.Itoa(int((wait+time.Second-1)/time.Second)))
	return a
}

// serve answers a call that counts, within the limits and with the fault that was injected for it. process carries it out.
func (s *Service) serve(ctx context.Context, c *Call, process func() reply) reply {
	a := s.withFault(ctx, c, process)
	if a.none {
		a.status = 0
	}
	s.end(c, a.status)
	return a
}

func (s *Service) withFault(ctx context.Context, c *Call, process func() reply) reply {
	if wait := s.limited(c.ConnectorID); wait > 0 {
		return limitReply(wait)
	}
	f, cleared := s.fault(c.User)
	none := reply{none: true}
	if f.Delay > 0 {
		timer := time.NewTimer(f.Delay)
		defer timer.Stop()
		select {
		case <-ctx.Done():
			return none
		case <-timer.C:
		}
	}
	instead := f.Hang || f.Reset || f.Status != 0
	var a reply
	if !instead || f.Process || f.Truncate || f.Hold {
		a = process()
	}
	switch {
	case f.Hang:
		select {
		case <-ctx.Done():
		case <-cleared:
		}
		return none
	case f.Reset:
		return none
	case f.Status != 0:
		a = reply{status: f.Status, header: f.Header.Clone(), body: f.Body, cut: -1}
	}
	if f.Hold {
		select {
		case <-ctx.Done():
			return none
		case <-cleared:
		}
	}
	if f.Truncate {
		a.cut = len(a.body) / 2
		if f.TruncateAt > 0 {
			a.cut = min(f.TruncateAt, len(a.body))
		}
	}
	return a
}

// process carries an exchange out.
func (s *Service) process(r *http.Request, c *Call) reply {
	s.mu.Lock()
	defer s.mu.Unlock()
	given := r.Header.Get("applicationSecret")
	switch {
	case r.Method != http.MethodGet:
		return reply{status: http.StatusMethodNotAllowed, header: http.Header{}, cut: -1}
	case c.ConnectorID == "" || given == "" || c.RefreshToken == "":
		return errorReply(http.StatusBadRequest, "Invalid parameters", "InvalidParameters", "InvalidParametersException")
	}
	known := s.connectors[c.ConnectorID]
	if known == nil || known.deleted || subtle.ConstantTimeCompare([]byte(known.secret), []byte(given)) != 1 {
		// The message is from a published client, the errorCode is ours (guess).
		return errorReply(http.StatusUnauthorized, "Dont have correct applicationId and secret in header!", "Unauthenticated", "AuthException")
	}
	token := s.refresh[c.RefreshToken]
	if token == nil || !token.alive() || token.connector != c.ConnectorID {
		return errorReply(http.StatusUnauthorized, "Invalid refresh token", "InvalidToken", "AuthException")
	}
	if token.user.location != "" && !token.user.arrived(r) {
		status := http.StatusPermanentRedirect
		if token.user.locationIsPassing {
			status = http.StatusTemporaryRedirect
		}
		return reply{status: status, header: http.Header{"Location": {token.user.location}}, cut: -1}
	}

	access, expires := s.issueAccessToken(token.holder)
	token.user.granted++
	c.AccessToken = access
	// "" or null (doc): here in turn, so that clients get both.
	var newToken any
	if s.empty = !s.empty; s.empty {
		newToken = ""
	}
	// From 90 % of the life on, every exchange returns a new one (doc).
	if !time.Now().Before(token.issued.Add(token.expires.Sub(token.issued) / 10 * 9)) {
		newToken = s.issueRefreshToken(token.holder, now())
		token.dead = !s.oldLives
		c.Rotated = true
	}
	return jsonReply(http.StatusOK, map[string]any{
		"accessToken":       access,
		"endpointUrl":       s.endpointURL(),
		"accessTokenExpiry": expires.UnixMilli(),
		"refreshToken":      newToken,
		"scope":             "token.write",
	})
}

// endpointURL is the base URL of the apps' calls.
func (s *Service) endpointURL() string { return cmp.Or(s.endpoint, s.url, DefaultEndpointURL) }

// me is the call with which an app can check that its access token works (client). It counts against the limits (doc).
func (s *Service) me(r *http.Request) reply {
	s.mu.Lock()
	t, alive := s.accessToken(r.Header.Get("accessToken"))
	s.mu.Unlock()
	if !alive {
		return errorReply(http.StatusUnauthorized, "Access token is invalid or has expired", "Unauthenticated", "AuthException")
	}
	if wait := s.limited(t.connector); wait > 0 {
		return limitReply(wait)
	}
	return jsonReply(http.StatusOK, map[string]any{"id": t.user.id, "name": t.user.name})
}
