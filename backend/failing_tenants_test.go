package backend

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// The service refuses more tenants for good than the share has calls a minute, and each is tried again every minute. The other tenants are
// exchanged as often as keep_alive says all the same, also those that have failed once.
func TestFailingTenantsLeaveCallsToTheOthers(t *testing.T) {
	for name, c := range map[string]struct {
		life     time.Duration // of the failing tenants' refresh tokens; 0: unknown
		failOnce bool          // the other tenants fail once
	}{"ends are known": {life: 30 * day}, "ends are unknown": {}, "the others have failed once": {30 * day, true}} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, func(o *oauth2test.Options) {
					oauth2test.ClassA(o)
					o.RefreshTokenLife, o.RefreshTokenLifeField = c.life, "refresh_token_expires_in"
				}, with(classB, "keep_alive", "1h"))
				for i := range 8 {
					name := fmt.Sprint("failing", i)
					e.add(name, nil)
					e.read("token/" + name)
					e.server.Inject(oauth2test.Fault{User: name, Answer: oauth2test.InvalidScope})
				}
				e.server.Set(func(o *oauth2test.Options) { o.RefreshTokenLife *= 2 })
				for i := range 3 {
					name := fmt.Sprint("sound", i)
					e.add(name, nil)
					e.read("token/" + name)
					if c.failOnce {
						e.server.Inject(oauth2test.Fault{User: name, Answer: oauth2test.InvalidScope, Times: 1})
					}
				}
				e.write("config", map[string]any{"exchanges_per_minute": 5})
				e.pass(3 * time.Hour)
				for i := range 3 {
					assert.Less(t, time.Since(e.stored(fmt.Sprint("sound", i)).LastExchange), time.Hour+12*time.Minute)
				}
			})
		})
	}
}

// Tenants whose last exchange has not failed get every other place at least, by the end of the refresh token. Those that have failed go by
// that end and by who has waited longest, in turn.
func TestOrderOfALine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x, _ := newIndex(t)
		wait := func(name string, end int64, failed bool) {
			time.Sleep(time.Second)
			x.wait("hr", name, end, failed)
		}
		order := func() (names []string) {
			for {
				name, ok := x.next("hr")
				if !ok {
					return names
				}
				names = append(names, name)
			}
		}
		for i, name := range []string{"failed longest", "failed c", "failed b", "failed a"} {
			wait(name, int64(9-i), true)
		}
		wait("failed and gone", 1, true)
		x.at("failed and gone", time.Time{})
		for i, name := range []string{"c", "b", "a"} {
			wait(name, int64(99-i), false)
		}
		assert.Equal(t, []string{"a", "failed a", "b", "failed longest", "c", "failed b", "failed c"}, order())

		wait("failed", 1, true)
		_, connectors := x.due(time.Now())
		assert.Equal(t, []string{"hr"}, connectors)
		assert.Equal(t, []string{"failed"}, order(), "a line of failed tenants alone")

		come := func(name string, end time.Duration) {
			s := tenantSummary{}
			if end != 0 {
				s.expires = time.Now().Add(end).Unix()
			}
			wait(name, placeInLine(s, time.Now()), false)
		}
		come("first", 0)
		come("second", 0)
		come("third", 0)
		come("known", 1000*day)
		assert.Equal(t, []string{"known", "first", "second", "third"}, order(), "tenants whose ends are unknown go as they have come")

		come("in 40 days", 40*day)
		come("unknown", 0)
		come("in 30 days", 30*day)
		time.Sleep(time.Hour)
		come("in 20 days", 20*day)
		come("in 10 days", 10*day)
		come("soon", 2*time.Hour)
		time.Sleep(day - 2*time.Hour)
		come("tomorrow", day)
		assert.Equal(t, []string{"soon", "in 30 days", "in 40 days", "unknown", "in 10 days", "in 20 days", "tomorrow"}, order(),
			"a tenant waits an hour at most for those that come later, if these end later than a day after its coming")
	})
}
