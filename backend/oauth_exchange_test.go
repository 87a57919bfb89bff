package backend

import (
	"context"
	"errors"
	"maps"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/tokenservice"
)

func TestOAuthRotation(t *testing.T) {
	for rotation, rotates := range map[oauth2test.Rotation]bool{
		oauth2test.RotateEach: true, oauth2test.RotateNever: false, oauth2test.RotateSame: false, oauth2test.RotateEmpty: false,
	} {
		bubble(t, func(t *testing.T) {
			e := newOAuthEngine(t, func(o *oauth2test.Options) { oauth2test.ClassD(o); o.Rotation = rotation }, nil)
			e.add("acme", nil)
			first := e.stored("acme").RefreshToken
			for range 3 {
				e.write("tenants/acme/refresh", nil)
			}
			assert.Equal(t, rotates, first != e.stored("acme").RefreshToken)
			assert.Equal(t, e.server.CurrentRefreshToken("acme"), e.stored("acme").RefreshToken)
			origin := map[bool]string{true: originService, false: originOperator}
			assert.Equal(t, origin[rotates], e.read("tenants/acme")["refresh_token_origin"])
			e.kept()
		})
	}
}

// For each refusal: the status that a reader gets, the number of calls, and the status of the tenant.
func TestOAuthRefusals(t *testing.T) {
	for name, c := range map[string]struct {
		fault        oauth2test.Fault
		code         int
		says, status string
	}{
		"invalid_grant":      {oauth2test.Fault{Answer: oauth2test.InvalidGrant}, 400, "refuses the refresh token", statusRejected},
		"at 401":             {oauth2test.Fault{Answer: oauth2test.InvalidGrant401}, 400, "refuses the refresh token", statusRejected},
		"at 200":             {oauth2test.Fault{Answer: oauth2test.BadRefreshToken}, 400, "refuses the refresh token", statusRejected},
		"not ok":             {oauth2test.Fault{Answer: oauth2test.InvalidRefreshToken}, 400, "refuses the refresh token", statusRejected},
		"client":             {oauth2test.Fault{Answer: oauth2test.InvalidClient}, 400, "connector_secret to config", statusDegraded},
		"scope":              {oauth2test.Fault{Answer: oauth2test.InvalidScope}, 400, "invalid_scope", statusDegraded},
		"unauthorized":       {oauth2test.Fault{Answer: oauth2test.UnauthorizedClient}, 400, "unauthorized_client", statusDegraded},
		"limit":              {oauth2test.Fault{Answer: oauth2test.TooManyRequests(time.Minute)}, 429, "try again in 1m0s", statusDegraded},
		"server_error":       {oauth2test.Fault{Answer: oauth2test.ServerError}, 503, "nothing was lost", statusDegraded},
		"conflict":           {oauth2test.Fault{Answer: oauth2test.Conflict}, 503, "nothing was lost", statusDegraded},
		"reset before it is": {oauth2test.Fault{Reset: true}, 503, "nothing was lost", statusDegraded},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, oauth2test.ClassA, classA)
				e.add("acme", nil)
				e.server.Inject(c.fault)
				_, code, text := e.try(logical.ReadOperation, "creds/acme", nil)
				assert.Equal(t, c.code, code, text)
				assert.Contains(t, text, c.says)
				asked := 1
				if c.fault.Reset {
					asked = 2 // its answer may have been lost
				}
				_, _, _ = e.try(logical.ReadOperation, "creds/acme", nil)
				assert.Len(t, e.server.Calls(oauth2test.EndpointToken), asked)
				assert.Equal(t, c.status, e.status("acme"))
				e.server.ClearFaults()
				e.pass(11 * time.Minute)
				want := statusOK
				if c.status == statusRejected {
					want = statusRejected
					assert.Len(t, e.server.Calls(oauth2test.EndpointToken), asked)
				}
				assert.Equal(t, want, e.status("acme"))
				assert.Empty(t, e.server.LostGrants())
			})
		})
	}
}

// After a lost answer the engine tries once more at once, and then waits for the backoff.
func TestOAuthLostAnswer(t *testing.T) {
	lost := map[string]oauth2test.Fault{
		"reset": {Process: true, Reset: true}, "cut": {Truncate: true}, "cut quietly": {TruncateQuietly: true},
		"page": {Process: true, Answer: oauth2test.HTML},
	}
	for name, fault := range lost {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, func(o *oauth2test.Options) { oauth2test.ClassD(o); o.Grace = 10 * time.Second }, nil)
				e.add("acme", nil)
				fault.Times = 1
				e.server.Inject(fault)
				lease := e.lease("acme")
				assert.True(t, e.server.Alive(accessTokenOf(lease)))
				assert.Len(t, e.server.Calls(oauth2test.EndpointToken), 2)
				assert.Equal(t, 1, e.server.GraceUses())

				fault.Times = 2
				e.server.Inject(fault)
				_, code, _ := e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
				assert.Equal(t, 503, code)
				assert.Len(t, e.server.Calls(oauth2test.EndpointToken), 4)
				_, code, _ = e.try(logical.ReadOperation, "token/acme", nil)
				assert.Contains(t, []int{200, 503}, code)
				assert.Len(t, e.server.Calls(oauth2test.EndpointToken), 4, "the backoff holds")
				time.Sleep(5 * time.Second)
				assert.True(t, e.server.Alive(e.read("token/acme")["access_token"].(string)))
				assert.Empty(t, e.server.LostGrants())
			})
		})
	}
}

// The answer of an exchange is lost, and its retry is refused or fails: the older access token may have ended at the service. The next
// exchange waits for the backoff and not for the planned time, and after that no reader gets the older token.
func TestOAuthLostAnswerAndARetryThatFails(t *testing.T) {
	lose := func(t *testing.T, grace time.Duration, retry ...oauth2test.Fault) (e *oauthEngine, dead string) {
		e = newOAuthEngine(t, func(o *oauth2test.Options) { oauth2test.ClassD(o); o.Grace = grace }, nil)
		e.add("acme", nil)
		dead = accessTokenOf(e.lease("acme"))
		e.server.Inject(oauth2test.Fault{Process: true, Reset: true, Times: 1})
		for _, fault := range retry {
			e.server.Inject(fault)
		}
		_, _, _ = e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
		require.False(t, e.server.Alive(dead))
		require.Len(t, e.server.Calls(oauth2test.EndpointToken), 3)
		return e, dead
	}
	t.Run("outage", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			e, dead := lose(t, time.Hour, oauth2test.Fault{Answer: oauth2test.BadGateway})
			warned := 0
			for range 60 {
				time.Sleep(time.Second)
				if resp, code, _ := e.try(logical.ReadOperation, "token/acme", nil); code == 200 {
					assert.Contains(t, resp.Warnings[0], "may have ended this one")
					warned++
				}
			}
			assert.Positive(t, warned)
			assert.Equal(t, statusDegraded, e.status("acme"))
			e.server.ClearFaults()
			time.Sleep(time.Minute)
			assert.Equal(t, statusOK, e.status("acme"), "without a read")
			assert.NotEqual(t, dead, e.read("token/acme")["access_token"])
			assert.Empty(t, e.server.LostGrants())
		})
	})
	t.Run("not noted", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			e := newOAuthEngine(t, func(o *oauth2test.Options) { oauth2test.ClassD(o); o.Grace = time.Hour }, nil)
			e.add("acme", nil)
			e.lease("acme")
			e.server.Inject(oauth2test.Fault{Process: true, Reset: true, Times: 1})
			var notes atomic.Int32
			e.storage.failWith(func(op, key string) error {
				if op == "put" && strings.HasPrefix(key, "calls/") {
					notes.Add(1)
				}
				if notes.Load() == 2 {
					return errors.New("storage is down")
				}
				return nil
			})
			_, code, text := e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
			assert.Equal(t, 503, code)
			assert.Contains(t, text, "closed the connection", "the text names the failure of the first request")
			_, _, _ = e.try(logical.ReadOperation, "token/acme", nil)
			assert.Len(t, e.server.Calls(oauth2test.EndpointToken), 2, "the backoff holds")
			e.storage.heal()
			time.Sleep(time.Minute)
			assert.Equal(t, statusOK, e.status("acme"))
		})
	})
	t.Run("refused", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			e, _ := lose(t, 0)
			assert.Equal(t, statusRejected, e.status("acme"))
			time.Sleep(plannedRetryLeast + time.Second)
			_, code, text := e.try(logical.ReadOperation, "token/acme", nil)
			assert.Equal(t, 400, code)
			assert.Contains(t, text, "refuses the refresh token")
			assert.Contains(t, text, "(tenants/acme/authorize), or get a new refresh token and write it to tenants/acme")
			assert.Len(t, e.server.Calls(oauth2test.EndpointToken), 3)
		})
	})
}

// The process dies before the answer to an exchange arrives: the next process tries at once, within the service's grace.
func TestOAuthExchangeThatAProcessDidNotLiveToSee(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, func(o *oauth2test.Options) { oauth2test.ClassD(o); o.Grace = 10 * time.Second }, nil)
		e.add("acme", nil)
		e.add("quiet", nil)
		e.lease("quiet")
		lease := e.lease("acme")
		time.Sleep(time.Second)
		e.server.Inject(oauth2test.Fault{User: "acme", Hold: true, Times: 1})
		go func() { _, _, _ = e.try(logical.UpdateOperation, "tenants/acme/refresh", nil) }()
		synctest.Wait()
		assert.False(t, e.server.Alive(accessTokenOf(lease)))
		e.crash()
		synctest.Wait()
		time.Sleep(2 * time.Second)
		assert.True(t, e.server.Alive(e.stored("acme").Access.Token), "without a read")
		assert.Equal(t, statusOK, e.status("acme"))
		assert.Equal(t, 1, e.server.GraceUses())
		assert.Equal(t, 1, e.server.Exchanges("quiet"), "the answer to its exchange had arrived")
		e.crash()
		time.Sleep(time.Minute)
		assert.Equal(t, 3, e.server.Exchanges("acme"))
		assert.Empty(t, e.server.LostGrants())
	})
	// An exchange that the service has refused has its answer: the leases on the older token live.
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, oauth2test.ClassD, nil)
		e.add("acme", nil)
		lease := e.lease("acme")
		time.Sleep(time.Second)
		e.server.Inject(oauth2test.Fault{Answer: oauth2test.BadGateway, Times: 1})
		_, code, _ := e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
		require.Equal(t, 503, code)
		e.crash()
		time.Sleep(time.Minute)
		assert.True(t, e.server.Alive(accessTokenOf(lease)))
		assert.Equal(t, accessTokenOf(lease), e.read("token/acme")["access_token"])
	})
}

// No answer came to the verification of another refresh token. After a restart the next process makes no exchange because of that, and
// the leases on the access token live.
func TestOAuthRestartAfterAVerificationWithoutAnswer(t *testing.T) {
	verify := func(e *oauthEngine, fault oauth2test.Fault) {
		fault.User = "other"
		e.server.Inject(fault)
		go func() {
			_, _, _ = e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": e.server.Grant(e.clientID, "other")})
		}()
		synctest.Wait()
	}
	for name, meanwhile := range map[string]func(*oauthEngine){
		"the answer to a verification is lost": func(e *oauthEngine) { verify(e, oauth2test.Fault{Reset: true}) },
		"the process ends in a verification":   func(e *oauthEngine) { verify(e, oauth2test.Fault{Hold: true}) },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, oauth2test.ClassD, nil)
				e.add("acme", nil)
				lease := e.lease("acme")
				time.Sleep(time.Minute)
				meanwhile(e)
				require.True(t, e.server.Alive(accessTokenOf(lease)))
				e.crash()
				e.pass(2 * time.Minute)
				assert.True(t, e.server.Alive(accessTokenOf(lease)))
				assert.Equal(t, statusOK, e.status("acme"))
			})
		})
	}
}

// A call was noted while the host's clock was a day ahead, or moments ahead of the next host's, and its exchange was stored. After a
// restart the engine does not take it for an exchange whose answer was lost, and makes no call.
func TestOAuthRestartAfterAWrongClock(t *testing.T) {
	for _, ahead := range []time.Duration{30 * time.Second, day} {
		bubble(t, func(t *testing.T) {
			e := newOAuthEngine(t, oauth2test.ClassD, nil)
			e.add("acme", nil)
			lease := e.lease("acme")
			places, err := e.storage.List(t.Context(), callPrefix+"default/")
			require.NoError(t, err)
			require.Len(t, places, 1)
			for key, times := range map[string][]string{
				callPrefix + "default/" + places[0]: {"at", "until"},
				tenantPrefix + "acme":               {"last_exchange_time", "refresh_token_set_time"},
			} {
				fields, err := getEntry[map[string]any](t.Context(), e.storage, key)
				require.NoError(t, err)
				for _, name := range times {
					at, err := time.Parse(time.RFC3339Nano, (*fields)[name].(string))
					require.NoError(t, err)
					(*fields)[name] = at.Add(ahead)
				}
				raw, err := logical.StorageEntryJSON(key, fields)
				require.NoError(t, err)
				require.NoError(t, e.storage.Put(t.Context(), raw))
			}
			for range 2 {
				e.crash()
				e.pass(2 * time.Minute)
				assert.True(t, e.server.Alive(accessTokenOf(lease)), ahead)
				assert.Equal(t, statusOK, e.status("acme"), ahead)
			}
		})
	}
}

func TestOAuthLives(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, func(o *oauth2test.Options) {
			oauth2test.ClassD(o)
			o.ExpiresIn, o.Rotation = oauth2test.ExpiresInMissing, oauth2test.RotateNever
			o.Edit = func(_ oauth2test.Endpoint, fields map[string]any) {
				fields["instance_url"] = "https://eu.example.com"
				delete(fields, "scope")
			}
		}, map[string]any{"access_token_life": "10m", "refresh_token_life": "240h", "endpoint_url_field": "instance_url"})
		e.add("acme", nil)
		set := time.Now()
		data := e.read("token/acme")
		assert.Equal(t, stamp(set.Add(10*time.Minute)), data["expire_time"])
		assert.Equal(t, "https://eu.example.com", data["endpoint_url"])
		assert.NotContains(t, data, "scope")
		status := e.read("tenants/acme")
		assert.Equal(t, stamp(set.Add(240*time.Hour)), status["refresh_token_expire_time"])
		assert.NotContains(t, status, "kind")
		assert.NotContains(t, status, "group_id")
		// From 90 % of its life on, the refresh token is exchanged once in life/300, also after its assumed end.
		e.pass(218 * time.Hour)
		before := e.server.Exchanges("acme")
		e.pass(8 * time.Hour)
		assert.InDelta(t, 8*60/48, e.server.Exchanges("acme")-before, 3)
		e.pass(20 * time.Hour)
		status = e.read("tenants/acme")
		assert.Equal(t, statusOK, status["status"])
		assert.NotContains(t, status, "refresh_token_expire_time", "the refresh token has lived past its assumed end")
		e.read("creds/acme")
	})
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, func(o *oauth2test.Options) {
			oauth2test.ClassD(o)
			o.Edit = func(_ oauth2test.Endpoint, fields map[string]any) { fields["expires_in"] = 0 }
		}, nil)
		e.add("acme", nil)
		_, code, _ := e.try(logical.ReadOperation, "creds/acme", nil)
		assert.Equal(t, 503, code, "no reader gets the access token")
		assert.Equal(t, e.server.CurrentRefreshToken("acme"), e.stored("acme").RefreshToken, "the new refresh token is stored")
		e.kept()
	})
	for _, odd := range []oauth2test.ExpiresIn{oauth2test.ExpiresInDecimal, oauth2test.ExpiresInString, oauth2test.ExpiresInNull, oauth2test.ExpiresInEmpty} {
		bubble(t, func(t *testing.T) {
			e := newOAuthEngine(t, func(o *oauth2test.Options) { oauth2test.ClassD(o); o.ExpiresIn = odd }, nil)
			e.add("acme", nil)
			assert.Equal(t, stamp(time.Now().Add(time.Hour)), e.read("token/acme")["expire_time"], odd)
		})
	}
}

// The engine revokes the access tokens that it receives and does not use.
func TestOAuthSupersededTokensAreGivenUp(t *testing.T) {
	for name, meanwhile := range map[string]func(*oauthEngine){
		"delete": func(e *oauthEngine) { e.ok(logical.DeleteOperation, "tenants/acme", nil) },
		"write": func(e *oauthEngine) {
			e.write("tenants/acme", map[string]any{"refresh_token": e.server.Grant(e.clientID, "acme"), "verify": false})
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, oauth2test.ClassA, classA)
				e.add("acme", nil)
				lease := e.lease("acme")
				e.pass(50 * time.Minute) // leases live on an access token that is replaced by then
				e.server.Inject(oauth2test.Fault{Hold: true, Times: 1})
				go func() { _, _, _ = e.try(logical.UpdateOperation, "tenants/acme/refresh", nil) }()
				synctest.Wait()
				require.Len(t, e.server.AccessTokens("acme"), 3)
				meanwhile(e)
				e.server.ClearFaults()
				time.Sleep(time.Second)
				synctest.Wait()
				var kept []string
				if entry := e.stored("acme"); entry != nil {
					kept = append(kept, entry.Access.Token) // refresh uses the refresh token that was written
				}
				assert.ElementsMatch(t, kept, e.server.AccessTokens("acme"))
				assert.False(t, e.server.Alive(accessTokenOf(lease)))
				e.kept()
			})
		})
	}
}

// fakeSettings are a third kind of service. They show everything that the engine needs of a kind.
type fakeSettings struct {
	Greeting string `json:"greeting"`
}

type fakeService struct{ greeting string }

func (s *fakeSettings) set(d *framework.FieldData, name string) error {
	s.Greeting = textOf(d, name)
	return nil
}
func (s *fakeSettings) show(data map[string]any)            { data["greeting"] = s.Greeting }
func (*fakeSettings) check(*connectorEntry) error           { return nil }
func (*fakeSettings) missing(*connectorEntry, string) error { return nil }
func (*fakeSettings) address() string                       { return "" }
func (*fakeSettings) isAt(string) bool                      { return true }
func (s *fakeSettings) clone() serviceSettings              { next := *s; return &next }
func (*fakeSettings) take(serviceSettings)                  {}
func (s *fakeSettings) client(*connectorEntry, http.RoundTripper) (tokenservice.Service, error) {
	return fakeService{s.Greeting}, nil
}

func (*fakeSettings) discover(context.Context, *connectorEntry, *framework.FieldData, http.RoundTripper, tokenservice.Permit) error {
	return nil
}

func (fakeService) About() tokenservice.About {
	return tokenservice.About{Name: "the fake", NewRefreshToken: "make one up"}
}
func (fakeService) Check(string) (tokenservice.Facts, error)   { return tokenservice.Facts{}, nil }
func (fakeService) KeepAlive(tokenservice.Facts) time.Duration { return 0 }
func (fakeService) Close()                                     {}
func (s fakeService) Exchange(ctx context.Context, x tokenservice.Exchange) tokenservice.Result {
	done, err := x.Permit(ctx)
	if err != nil {
		return tokenservice.Result{Err: err}
	}
	defer done()
	if x.RefreshToken == "bad" {
		return tokenservice.Result{Sent: time.Now(), Err: &tokenservice.Failure{Kind: tokenservice.RefusedRefreshToken}}
	}
	return tokenservice.Result{
		AccessToken: &tokenservice.AccessToken{Token: s.greeting + " " + x.RefreshToken, Expires: time.Now().Add(time.Hour).UTC()},
		Sent:        time.Now(), RefreshToken: x.RefreshToken + "+",
	}
}

func TestAThirdKindOfService(t *testing.T) {
	kinds := maps.Clone(serviceKinds)
	defer func() { serviceKinds = kinds }()
	serviceKinds = maps.Clone(kinds)
	serviceKinds["fake"] = serviceKind{
		fields:         map[string]*framework.FieldSchema{"greeting": str("What it says.")},
		settings:       func() serviceSettings { return &fakeSettings{} },
		requestTimeout: 5 * time.Second,
	}
	bubble(t, func(t *testing.T) {
		e := newEngine(t)
		e.write("config", map[string]any{"service": "fake", "greeting": "hello"})
		_, code, text := e.try(logical.UpdateOperation, "config", map[string]any{"api_root": "x"})
		assert.Equal(t, 400, code)
		assert.Contains(t, text, "api_root is not a field")
		e.write("tenants/acme", map[string]any{"refresh_token": "you"})
		e.restart()
		assert.Equal(t, "hello", e.read("config")["greeting"])
		assert.Equal(t, "hello you", e.read("token/acme")["access_token"])
		lease := e.lease("acme")
		require.NoError(t, e.revokeLease(lease))
		assert.Equal(t, "hello you+", e.read("token/acme")["access_token"])
		_, code, text = e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"refresh_token": "bad"})
		assert.Equal(t, 400, code)
		assert.Contains(t, text, "The fake refuses")
		assert.Contains(t, text, "make one up")
		_, code, text = e.try(logical.UpdateOperation, "tenants/acme", map[string]any{"token_per_lease": true})
		assert.Equal(t, 400, code, text)
	})
}
