package main

import (
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

const classHelp = "oauth2: A, revoking an access token ends it alone; B, it ends the grant; C, access tokens are JWTs, which cannot " +
	"be revoked; D, an exchange ends those before it"

func classes() map[string]func(*oauth2test.Options) {
	return map[string]func(*oauth2test.Options){
		"A": oauth2test.ClassA, "B": oauth2test.ClassB, "C": oauth2test.ClassC, "D": oauth2test.ClassD,
	}
}

// setOptions sets the class and the rotation of an authorization server, where "" keeps the present ones, and then makes the
// other changes.
func setOptions(s *oauth2test.Server, class, rotation string, rest func(*oauth2test.Options)) error {
	preset := classes()[class]
	if preset == nil && class != "" {
		return errors.New("class must be A, B, C or D")
	}
	rotations := map[string]oauth2test.Rotation{
		"each": oauth2test.RotateEach, "never": oauth2test.RotateNever, "same": oauth2test.RotateSame, "empty": oauth2test.RotateEmpty,
	}
	rotate, known := rotations[rotation]
	if !known && rotation != "" {
		return errors.New("rotation must be each, never, same or empty")
	}
	s.Set(func(o *oauth2test.Options) {
		if preset != nil {
			preset(o)
		}
		if known {
			o.Rotation = rotate
		}
		rest(o)
	})
	return nil
}

// newOAuth2Handler serves an authorization server and its control API, which has the same names as Kaizala's.
func newOAuth2Handler(s *oauth2test.Server) http.Handler {
	return withPortal(s.Handler(), s, map[string]operation[*oauth2test.Server]{
		"connector":        {"method redirect-uri", oauth2Connector},
		"connector-secret": {"connector", oauth2ConnectorSecret},
		"delete-connector": {"connector", oauth2DeleteConnector},
		"token":            {"connector user scope", oauth2Token},
		"approve":          {"authorization-url user-code user", oauth2Approve},
		"deny":             {"authorization-url user-code", oauth2Deny},
		"withdraw":         {"user", oauth2Withdraw},
		"losses":           {"", oauth2Losses},
		"exchanges":        {"user", oauth2Exchanges},
		"settings":         {"class rotation grace access-token-life refresh-token-life limit-per-connector", oauth2Settings},
		"fault":            {"endpoint user times delay hang process reset truncate status body retry-after clear", oauth2Fault},
	})
}

func oauth2Connector(s *oauth2test.Server, f form) (string, error) {
	method := oauth2test.AuthBasic
	switch f.text("method") {
	case "", oauth2test.AuthBasic:
	case oauth2test.AuthPost, oauth2test.AuthNone:
		method = f.text("method")
	default:
		return "", errors.New("method must be client_secret_basic, client_secret_post or none")
	}
	redirectURIs := []string{}
	if f.text("redirect-uri") != "" {
		redirectURIs = append(redirectURIs, f.text("redirect-uri"))
	}
	id, secret := s.RegisterClient(method, redirectURIs...)
	return fmt.Sprintf("connector_id=%s\nconnector_secret=%s\n", id, secret), nil
}

func oauth2ConnectorSecret(s *oauth2test.Server, f form) (string, error) {
	secret := s.NewClientSecret(f.text("connector"))
	if secret == "" {
		return "", errors.New("there is no such connector that has a secret")
	}
	return secret + "\n", nil
}

func oauth2DeleteConnector(s *oauth2test.Server, f form) (string, error) {
	s.DeleteClient(f.text("connector"))
	return "", nil
}

func oauth2Token(s *oauth2test.Server, f form) (string, error) {
	user := strings.TrimSpace(f.text("user"))
	if user == "" {
		return "", errors.New("user must not be empty")
	}
	token := s.Grant(f.text("connector"), user, strings.Fields(f.text("scope"))...)
	if token == "" {
		return "", errors.New("there is no such connector")
	}
	return token + "\n", nil
}

var errWhat = errors.New("give an authorization-url or a user-code")

func oauth2Approve(s *oauth2test.Server, f form) (string, error) {
	if f.has("authorization-url") == f.has("user-code") {
		return "", errWhat
	}
	if f.has("user-code") {
		return "", s.ApproveDevice(f.text("user-code"), f.text("user"))
	}
	to, err := s.Approve(f.text("authorization-url"), f.text("user"))
	return to + "\n", err
}

func oauth2Deny(s *oauth2test.Server, f form) (string, error) {
	if f.has("authorization-url") == f.has("user-code") {
		return "", errWhat
	}
	if f.has("user-code") {
		return "", s.DenyDevice(f.text("user-code"))
	}
	to, err := s.Deny(f.text("authorization-url"))
	return to + "\n", err
}

func oauth2Withdraw(s *oauth2test.Server, f form) (string, error) {
	s.Withdraw(f.text("user"))
	return "", nil
}

func oauth2Losses(s *oauth2test.Server, _ form) (string, error) {
	out := fmt.Sprintf("used_twice=%d\nin_grace=%d\n", s.UsedTwice(), s.GraceUses())
	for _, lost := range s.LostGrants() {
		out += fmt.Sprintf("lost %s: %s\n", lost.User, lost.Why)
	}
	return out, nil
}

func oauth2Exchanges(s *oauth2test.Server, f form) (string, error) {
	n := s.TotalExchanges()
	if f.has("user") {
		n = s.Exchanges(f.text("user"))
	}
	return strconv.Itoa(n) + "\n", nil
}

func oauth2Settings(s *oauth2test.Server, f form) (string, error) {
	var accessLife, refreshLife, grace *time.Duration
	var limit *int
	pointer := func(to **time.Duration) func(time.Duration) { return func(d time.Duration) { *to = &d } }
	if err := errors.Join(
		read(f, "access-token-life", life, pointer(&accessLife)),
		read(f, "refresh-token-life", life, pointer(&refreshLife)),
		read(f, "grace", life, pointer(&grace)),
		read(f, "limit-per-connector", natural, func(n int) { limit = &n }),
	); err != nil {
		return "", err
	}
	return "", setOptions(s, f.text("class"), f.text("rotation"), func(o *oauth2test.Options) {
		if accessLife != nil {
			o.AccessTokenLife = *accessLife
		}
		if refreshLife != nil {
			o.RefreshTokenLife = *refreshLife
		}
		if grace != nil {
			o.Grace = *grace
		}
		if limit != nil {
			o.LimitPerMinute = *limit
		}
	})
}

func oauth2Fault(s *oauth2test.Server, f form) (string, error) {
	fault, clearFirst, err := readFault(f)
	if err != nil {
		return "", err
	}
	endpoint := oauth2test.Endpoint(f.text("endpoint"))
	switch endpoint {
	case "", oauth2test.EndpointToken, oauth2test.EndpointRevocation, oauth2test.EndpointDevice,
		oauth2test.EndpointMetadata, oauth2test.EndpointUserInfo:
	default:
		return "", errors.New("endpoint must be token, revocation, device, metadata or userinfo")
	}
	if clearFirst {
		s.ClearFaults()
	}
	if fault != nil {
		s.Inject(oauth2test.Fault{
			Endpoint: endpoint, User: fault.User, Times: fault.Times, Delay: fault.Delay, Hang: fault.Hang, Process: fault.Process,
			Reset: fault.Reset, Truncate: fault.Truncate,
			Answer: oauth2test.Answer{Status: fault.Status, Header: fault.Header, Body: fault.Body},
		})
	}
	return "", nil
}
