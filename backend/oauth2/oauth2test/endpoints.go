package oauth2test

import (
	"cmp"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

// deviceGrant is the grant type of RFC 8628.
const deviceGrant = "urn:ietf:params:oauth:grant-type:device_code"

// encode encodes an answer.
func (s *Server) encode(q *request, status int, fields map[string]any) reply {
	a := canned(status, typeJSON, text(fields)).reply("")
	a.header.Set("Cache-Control", "no-store")
	a.code, _ = fields["error"].(string)
	if q.path != pathToken && q.path != pathDevice {
		return a
	}
	format := s.opts.Format
	if format == FormatAccept && !strings.Contains(q.Header.Get("Accept"), typeJSON) {
		format = FormatForm
	}
	switch format {
	case FormatBOM:
		a.body = "\ufeff" + a.body
	case FormatForm:
		form := url.Values{}
		for name, value := range fields {
			if value == nil {
				value = ""
			}
			form.Set(name, fmt.Sprint(value))
		}
		a.body = form.Encode()
		a.header.Set("Content-Type", typeForm+"; charset=utf-8")
	}
	return a
}

// granted encodes a successful answer.
func (s *Server) granted(q *request, e Endpoint, fields map[string]any) reply {
	if s.opts.Edit != nil {
		s.opts.Edit(e, fields)
	}
	return s.encode(q, http.StatusOK, fields)
}

// fail is an error (RFC 6749, section 5.2).
func (s *Server) fail(q *request, status int, code, description string) reply {
	if s.opts.Echo {
		description += " The request was " + q.form.Encode() + " of " + q.id + " with " + q.secret
	}
	return s.encode(q, status, map[string]any{"error": code, "error_description": description})
}

func (s *Server) invalid(q *request, description string) reply {
	return s.fail(q, http.StatusBadRequest, "invalid_request", description)
}

// refusedToken is the refusal of a refresh token, a code or a device code.
func (s *Server) refusedToken(q *request) reply {
	if s.opts.RefusedToken.Status != 0 {
		return s.opts.RefusedToken.reply("invalid_grant")
	}
	return s.fail(q, http.StatusBadRequest, "invalid_grant", "The grant is invalid, expired or revoked.")
}

// authenticate returns the client that a request comes from, or nil and its refusal.
func (s *Server) authenticate(q *request) (*client, reply) {
	switch {
	case q.Method != http.MethodPost:
		a := s.invalid(q, "Use POST.")
		a.status = http.StatusMethodNotAllowed
		a.header.Set("Allow", http.MethodPost)
		return nil, a
	case q.bad != "":
		return nil, s.invalid(q, q.bad)
	case q.authBad != "":
		return nil, s.invalid(q, q.authBad)
	}
	c := s.clients[q.id]
	if c == nil && s.opts.UnknownClient.Status != 0 {
		return nil, s.opts.UnknownClient.reply("invalid_client")
	}
	if c != nil && c.method == q.method && subtle.ConstantTimeCompare([]byte(c.secret), []byte(q.secret)) == 1 {
		return c, reply{}
	}
	if s.opts.RefusedClient.Status != 0 {
		return nil, s.opts.RefusedClient.reply("invalid_client")
	}
	a := s.fail(q, http.StatusUnauthorized, "invalid_client", "The client's authentication failed.")
	a.header.Set("WWW-Authenticate", InvalidClient.Header.Get("WWW-Authenticate"))
	return nil, a
}

// token is the token endpoint.
func (s *Server) token(q *request, c *Call) reply {
	s.mu.Lock()
	defer s.mu.Unlock()
	cl, refusal := s.authenticate(q)
	if cl == nil {
		return refusal
	}
	switch c.GrantType {
	case "refresh_token":
		return s.refreshGrant(q, c, cl)
	case "authorization_code":
		return s.codeGrant(q, c, cl)
	case deviceGrant:
		return s.deviceGrant(q, c, cl)
	case "":
		return s.invalid(q, "grant_type is missing.")
	}
	return s.fail(q, http.StatusBadRequest, "unsupported_grant_type", "This grant type is not supported.")
}

// refreshGrant is RFC 6749, section 6. A refusal for another reason than the refresh token does not use the token up.
func (s *Server) refreshGrant(q *request, c *Call, cl *client) reply {
	if c.Token == "" {
		return s.invalid(q, "refresh_token is missing.")
	}
	t, now := s.refresh[c.Token], time.Now()
	if t == nil || t.grant.client != cl {
		return s.refusedToken(q)
	}
	g, again := t.grant, !t.replaced.IsZero()
	if again {
		s.usedTwice++
		c.Reused = true
		if s.opts.ReuseKillsFamily && !s.exchangeable(t, now) && !t.expired(now) {
			s.loseGrant(g, "a refresh token was used twice")
		}
	}
	if !s.exchangeable(t, now) {
		return s.refusedToken(q)
	}
	scopes := t.scopes
	if asked := strings.Fields(q.form.Get("scope")); len(asked) > 0 && s.opts.Scope != ScopeIgnored {
		for _, scope := range asked {
			if !slices.Contains(t.scopes, scope) {
				return s.fail(q, http.StatusBadRequest, "invalid_scope", "A scope was never granted.")
			}
		}
		scopes = asked
		if s.opts.Scope == ScopeNarrows {
			g.scopes, t.scopes = asked, asked
		}
	}

	s.exchanges[g.user]++
	t.used = true
	if again {
		s.graceUses++
		if s.opts.GraceSame {
			return s.tokens(q, c, now, t.nextAccess, t.nextRefresh, "")
		}
	}
	if s.opts.ExchangeInvalidates {
		s.endAccess(g, "superseded by an exchange", false)
	}
	access := s.issueAccess(g, scopes)
	if s.opts.Rotation != RotateEach {
		t.expires = s.refreshEnd(g, access.issued)
		return s.tokens(q, c, access.issued, access, t, "")
	}
	next := s.issueRefresh(g)
	t.nextAccess, t.nextRefresh = access, next
	if !again {
		t.replaced = now
	}
	return s.tokens(q, c, access.issued, access, next, "")
}

// tokens is the answer with tokens (RFC 6749, section 5.1), with lives counted from now. refresh is the refresh token to
// be used from now on, nil if there is none.
func (s *Server) tokens(q *request, c *Call, now time.Time, access, refresh *token, idToken string) reply {
	c.User, c.AccessToken = access.grant.user, access.value
	fields := map[string]any{
		"access_token": access.value,
		"token_type":   cmp.Or(s.opts.TokenType, "Bearer"),
		"scope":        strings.Join(access.scopes, " "),
	}
	left := access.expires.Sub(now)
	whole := int64(left / time.Second)
	switch s.opts.ExpiresIn {
	case ExpiresInNumber:
		fields["expires_in"] = whole
	case ExpiresInDecimal:
		decimal := strconv.FormatFloat(left.Seconds(), 'f', -1, 64)
		if !strings.Contains(decimal, ".") {
			decimal += ".0"
		}
		fields["expires_in"] = json.Number(decimal)
	case ExpiresInString:
		fields["expires_in"] = strconv.FormatInt(whole, 10)
	case ExpiresInNull:
		fields["expires_in"] = nil
	case ExpiresInEmpty:
		fields["expires_in"] = ""
	}
	if refresh != nil {
		rotated := refresh.value != c.Token
		switch {
		case rotated || s.opts.Rotation == RotateSame:
			fields["refresh_token"] = refresh.value
			c.RefreshToken, c.Rotated = refresh.value, rotated && c.GrantType == "refresh_token"
		case s.opts.Rotation == RotateEmpty:
			fields["refresh_token"] = ""
		}
		if name := s.opts.RefreshTokenLifeField; name != "" {
			fields[name] = 0
			if !refresh.expires.IsZero() {
				fields[name] = int64(refresh.expires.Sub(now) / time.Second)
			}
		}
	}
	if idToken != "" {
		fields["id_token"] = idToken
	}
	return s.granted(q, EndpointToken, fields)
}

// codeGrant is RFC 6749, section 4.1.3, with RFC 7636.
func (s *Server) codeGrant(q *request, c *Call, cl *client) reply {
	if q.form.Get("code") == "" {
		return s.invalid(q, "code is missing.")
	}
	code := s.codes[q.form.Get("code")]
	if code == nil || code.client != cl {
		return s.refusedToken(q)
	}
	if code.grant != nil {
		s.loseGrant(code.grant, "a code was used twice") // RFC 6749, section 4.1.2
		return s.refusedToken(q)
	}
	verifier := q.form.Get("code_verifier")
	sum := sha256.Sum256([]byte(verifier))
	switch {
	case !time.Now().Before(code.expires), q.form.Get("redirect_uri") != code.redirectURI:
		return s.refusedToken(q)
	case code.challenge == "" && verifier != "":
		return s.refusedToken(q)
	case code.challenge != "" && (len(verifier) < 43 || len(verifier) > 128 || encode(sum[:]) != code.challenge):
		return s.refusedToken(q)
	}
	code.grant = s.newGrant(cl, code.user, code.scopes)
	return s.firstTokens(q, c, code.grant, code.offline, code.nonce)
}

// firstTokens answers with the first tokens of a grant.
func (s *Server) firstTokens(q *request, c *Call, g *grant, offline bool, nonce string) reply {
	access := s.issueAccess(g, g.scopes)
	var refresh *token
	if offline || !s.opts.RequireOffline {
		refresh = s.issueRefresh(g)
	}
	idToken := ""
	if slices.Contains(g.scopes, "openid") {
		now := time.Now()
		claims := map[string]any{"sub": Subject(g.user), "aud": g.client.id, "iat": now.Unix(), "exp": now.Add(time.Hour).Unix()}
		if slices.Contains(g.scopes, "email") {
			claims["email"] = Email(g.user)
		}
		if nonce != "" {
			claims["nonce"] = nonce
		}
		idToken = s.jwt("JWT", claims, []byte(cmp.Or(g.client.secret, string(s.key))))
	}
	return s.tokens(q, c, access.issued, access, refresh, idToken)
}

// revocation is RFC 7009.
func (s *Server) revocation(q *request, c *Call) reply {
	s.mu.Lock()
	defer s.mu.Unlock()
	cl, refusal := s.authenticate(q)
	if cl == nil {
		return refusal
	}
	if c.Token == "" {
		return s.invalid(q, "token is missing.")
	}
	done := canned(http.StatusOK, typeJSON, "").reply("")
	dead := done
	if s.opts.RevokeDead.Status != 0 {
		dead = s.opts.RevokeDead.reply("invalid_token")
	}
	t, now := s.anyToken(c.Token), time.Now()
	switch {
	case t == nil:
		return dead
	case t.grant.client != cl:
		return s.fail(q, http.StatusBadRequest, "unauthorized_client", "The token was issued to another client.")
	case s.refresh[c.Token] != nil:
		// A replaced refresh token ends the grant too.
		if !t.grant.ended.IsZero() || t.expired(now) {
			return dead
		}
		s.endGrant(t.grant, "its refresh token was revoked")
		for _, other := range s.grants {
			if s.opts.RevokeRefreshEndsAll && other.client == cl && other.user == t.grant.user {
				s.loseGrant(other, "another refresh token of the user was revoked")
			}
		}
		return done
	case s.opts.JWT:
		return s.fail(q, http.StatusBadRequest, "unsupported_token_type", "A JWT is not revoked.")
	}
	if t.ended.IsZero() && t.expired(now) && s.opts.RevokeExpiredEndsGrant {
		s.loseGrant(t.grant, "an expired access token was revoked")
	}
	if !t.alive(now) {
		return dead
	}
	switch s.opts.RevokeEnds {
	case RevokeToken:
		t.ended, t.why = now, "revoked"
	case RevokeGrant:
		s.loseGrant(t.grant, "an access token was revoked")
	}
	return done
}

// introspection is RFC 7662.
func (s *Server) introspection(q *request, c *Call) reply {
	s.mu.Lock()
	defer s.mu.Unlock()
	if cl, refusal := s.authenticate(q); cl == nil {
		return refusal
	}
	t := s.anyToken(c.Token)
	now := time.Now()
	if t == nil || !t.alive(now) || (s.refresh[c.Token] != nil && !s.exchangeable(t, now)) {
		return s.encode(q, http.StatusOK, map[string]any{"active": false})
	}
	fields := map[string]any{
		"active": true, "iss": s.url, "sub": Subject(t.grant.user), "username": t.grant.user, "client_id": t.grant.client.id,
		"scope": strings.Join(t.scopes, " "), "iat": t.issued.Unix(),
	}
	if !t.expires.IsZero() {
		fields["exp"] = t.expires.Unix()
	}
	return s.encode(q, http.StatusOK, fields)
}

// userInfo answers with the user of an access token, or with 401 if the token does not work (RFC 6750).
func (s *Server) userInfo(q *request, _ *Call) reply {
	s.mu.Lock()
	defer s.mu.Unlock()
	scheme, value, _ := strings.Cut(q.Header.Get("Authorization"), " ")
	t := s.access[value]
	if !strings.EqualFold(scheme, "Bearer") || t == nil || !t.alive(time.Now()) {
		a := s.fail(q, http.StatusUnauthorized, "invalid_token", "The access token does not work.")
		a.header.Set("WWW-Authenticate", `Bearer realm="oauth2test", error="invalid_token"`)
		return a
	}
	return s.granted(q, EndpointUserInfo, map[string]any{
		"sub": Subject(t.grant.user), "name": t.grant.user, "email": Email(t.grant.user),
	})
}

// metadata is RFC 8414's document and OpenID Connect Discovery's.
func (s *Server) metadata(q *request, _ *Call) reply {
	s.mu.Lock()
	defer s.mu.Unlock()
	served := s.opts.Metadata == MetadataBoth || (s.opts.Metadata == MetadataOAuth && q.path == pathOAuth) ||
		(s.opts.Metadata == MetadataOpenID && q.path == pathOpenID)
	if !served || q.Method != http.MethodGet {
		return notFound()
	}
	fields := map[string]any{
		"issuer":                                cmp.Or(s.opts.MetadataIssuer, s.url),
		"token_endpoint":                        s.url + pathToken,
		"revocation_endpoint":                   s.url + pathRevocation,
		"authorization_endpoint":                s.url + pathAuthorization,
		"device_authorization_endpoint":         s.url + pathDevice,
		"introspection_endpoint":                s.url + pathIntrospection,
		"userinfo_endpoint":                     s.url + pathUserInfo,
		"response_types_supported":              []string{"code"},
		"grant_types_supported":                 []string{"authorization_code", "refresh_token", deviceGrant},
		"code_challenge_methods_supported":      []string{"S256"},
		"id_token_signing_alg_values_supported": []string{"HS256"},
		"subject_types_supported":               []string{"public"},
	}
	methods := s.opts.AuthMethods
	if methods == nil {
		methods = []string{AuthBasic, AuthPost, AuthNone}
	}
	if len(methods) > 0 {
		fields["token_endpoint_auth_methods_supported"] = methods
	}
	if s.opts.PromiseIss {
		fields["authorization_response_iss_parameter_supported"] = true
	}
	return s.granted(q, EndpointMetadata, fields)
}
