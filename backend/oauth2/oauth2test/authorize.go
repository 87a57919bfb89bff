package oauth2test

import (
	"bytes"
	"cmp"
	"errors"
	"html/template"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"
)

// code is an authorization code. It is kept after its use, so that a second use is found.
type code struct {
	authorization
	user    string
	expires time.Time
	// grant is the grant that the code was redeemed for, nil before that.
	grant *grant
}

// authorization is what an authorization request asks for.
type authorization struct {
	client                               *client
	redirectURI, state, challenge, nonce string
	scopes                               []string
	offline                              bool
	hint                                 string
}

// challengeS256 is the form of a code challenge by S256 (RFC 7636, section 4.2).
var challengeS256 = regexp.MustCompile(`^[A-Za-z0-9_-]{43}$`)

// readAuthorization reads an authorization request. An error is shown on a page, because the redirect URI cannot be
// trusted; refusal is an error code that the redirect brings to the client (RFC 6749, section 4.1.2.1).
func (s *Server) readAuthorization(q url.Values) (a authorization, refusal string, err error) {
	a.client = s.clients[q.Get("client_id")]
	a.redirectURI, a.state, a.nonce, a.hint = q.Get("redirect_uri"), q.Get("state"), q.Get("nonce"), q.Get("login_hint")
	switch {
	case a.client == nil:
		return a, "", errors.New("there is no such client")
	case !slices.Contains(a.client.redirectURIs, a.redirectURI):
		return a, "", errors.New("redirect_uri is not one of the client's")
	}
	for _, values := range q {
		if len(values) > 1 {
			return a, "invalid_request", nil
		}
	}
	a.challenge = q.Get("code_challenge")
	pkce := q.Has("code_challenge") || q.Has("code_challenge_method")
	switch {
	case q.Has("request"):
		return a, "request_not_supported", nil
	case q.Has("request_uri"):
		return a, "request_uri_not_supported", nil
	case q.Get("response_type") == "":
		return a, "invalid_request", nil
	case q.Get("response_type") != "code":
		return a, "unsupported_response_type", nil
	case q.Has("client_secret"):
		return a, "invalid_request", nil
	case pkce && (q.Get("code_challenge_method") != "S256" || !challengeS256.MatchString(a.challenge)):
		return a, "invalid_request", nil
	case !pkce && s.opts.RequirePKCE:
		return a, "invalid_request", nil
	}
	a.scopes = strings.Fields(q.Get("scope"))
	a.offline = slices.Contains(a.scopes, "offline_access") || q.Get("access_type") == "offline"
	return a, "", nil
}

// Approve plays the browser and the person who consents. It returns the URL that the server redirects the browser to,
// with a code or, if the request is wrong, an error. err is the text of a page without a redirect. If user is "", it is
// that of login_hint.
func (s *Server) Approve(authorizationURL, user string) (redirectURL string, err error) {
	return s.visit(authorizationURL, user, true)
}

// Deny is like Approve, but the person does not consent.
func (s *Server) Deny(authorizationURL string) (redirectURL string, err error) {
	return s.visit(authorizationURL, "", false)
}

func (s *Server) visit(authorizationURL, user string, allow bool) (string, error) {
	u, err := url.Parse(authorizationURL)
	if err != nil || !s.sameURL(u, pathAuthorization) {
		return "", errors.New("oauth2test: this is not the authorization endpoint")
	}
	to, err := s.decide(u.Query(), user, allow)
	if err != nil {
		return "", errors.New("oauth2test: the page says: " + err.Error())
	}
	return to, nil
}

// decide returns the redirect after the person's decision. Its error is the text of a page.
func (s *Server) decide(q url.Values, user string, allow bool) (string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	a, refusal, err := s.readAuthorization(q)
	if err != nil {
		return "", err
	}
	user = cmp.Or(user, a.hint)
	back := url.Values{}
	switch {
	case refusal != "":
		back.Set("error", refusal)
	case !allow:
		back.Set("error", "access_denied")
	case user == "":
		return "", errors.New("name the user")
	default:
		value := "code_" + random(24)
		expires := time.Now().Add(cmp.Or(s.opts.CodeLife, DefaultCodeLife))
		s.codes[value] = &code{authorization: a, user: user, expires: expires}
		back.Set("code", value)
	}
	if a.state != "" {
		back.Set("state", a.state)
	}
	if s.opts.SendIss {
		back.Set("iss", cmp.Or(s.opts.WrongIss, s.url))
	}
	to, err := url.Parse(a.redirectURI)
	if err != nil {
		return "", errors.New("redirect_uri cannot be read")
	}
	// The query of the redirect URI stays (RFC 6749, section 3.1.2).
	if to.RawQuery != "" {
		to.RawQuery += "&"
	}
	to.RawQuery += back.Encode()
	return to.String(), nil
}

// page is the template of all pages.
var page = template.Must(template.New("page").Parse(`<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{{.Title}}</title></head>
<body><h1>{{.Title}}</h1><p>{{.Text}}</p>
{{- if .Form}}
<form method="post">
{{- if .Code}}<p><label>Code <input name="user_code" value="{{.UserCode}}" required></label></p>{{end}}
<p><label>User <input name="user" value="{{.User}}"></label></p>
<p><button name="decision" value="allow">Allow</button> <button name="decision" value="deny">Deny</button></p>
</form>{{end}}
</body></html>
`))

type pageData struct {
	Title, Text, User, UserCode string
	Form, Code                  bool
}

func htmlReply(status int, d pageData) reply {
	var b bytes.Buffer
	if err := page.Execute(&b, d); err != nil {
		panic(err) // strings into a buffer cannot fail
	}
	a := canned(status, typeHTML, b.String()).reply("")
	a.header.Set("Cache-Control", "no-store")
	return a
}

func errorPage(err error) reply {
	a := htmlReply(http.StatusBadRequest, pageData{Title: "This does not work", Text: err.Error()})
	a.code = "invalid_request"
	return a
}

// authorizationPage is the authorization endpoint: GET shows the request, POST to the same URL with "decision" (allow or
// deny) and "user" is the person's decision.
func (s *Server) authorizationPage(q *request, _ *Call) reply {
	query := q.URL.Query()
	s.mu.Lock()
	a, refusal, err := s.readAuthorization(query)
	s.mu.Unlock()
	decision := q.form.Get("decision")
	switch {
	case err != nil:
		return errorPage(err)
	case q.bad != "":
		return errorPage(errors.New(q.bad))
	case refusal == "" && (q.Method != http.MethodPost || decision == ""):
		return htmlReply(http.StatusOK, pageData{
			Title: "Allow access?", Text: "The client " + a.client.id + " asks for: " + strings.Join(a.scopes, ", ") + ".",
			User: a.hint, Form: true,
		})
	}
	to, err := s.decide(query, q.form.Get("user"), decision == "allow")
	if err != nil {
		return errorPage(err)
	}
	reply := reply{status: http.StatusSeeOther, header: http.Header{"Location": {to}}, cut: -1, code: refusal}
	if refusal == "" && decision != "allow" {
		reply.code = "access_denied"
	}
	return reply
}
