package backend

import (
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// The service replaces the refresh token at each exchange, and all of them end at the same fixed time. Readers and the tenant's status
// are warned from 30 days before that end, or from 90 % of the life: an exchange does not move the warning.
func TestEndThatExchangesDoNotMoveIsWarnedOf(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, func(o *oauth2test.Options) {
			oauth2test.ClassA(o)
			o.RefreshTokenLife, o.RefreshTokenAbsolute, o.RefreshTokenLifeField = 100*day, true, "refresh_expires_in"
			o.AccessTokenLife = 24 * time.Hour
		}, classB)
		e.add("acme", nil)
		for range 95 {
			e.read("token/acme")
			time.Sleep(day)
		}
		assert.Greater(t, e.server.Exchanges("acme"), 90)
		assert.NotEmpty(t, e.ok(logical.ReadOperation, "token/acme", nil).Warnings, "a reader")
		assert.NotEmpty(t, e.ok(logical.ReadOperation, "tenants/acme", nil).Warnings, "the status")
	})
}

// The service repeats the refresh token and prolongs its life: the tenant works on after the first end.
func TestEndThatExchangesMoveWithoutANewRefreshToken(t *testing.T) {
	for _, rotation := range []oauth2test.Rotation{oauth2test.RotateSame, oauth2test.RotateNever} {
		bubble(t, func(t *testing.T) {
			e := newOAuthEngine(t, func(o *oauth2test.Options) {
				oauth2test.ClassA(o)
				o.Rotation, o.RefreshTokenLife, o.RefreshTokenLifeField = rotation, 10*day, "refresh_expires_in"
			}, classB)
			e.add("acme", nil)
			e.read("token/acme")
			first := e.stored("acme").Facts.Expires
			time.Sleep(5 * day)
			e.read("token/acme")
			assert.InDelta(t, 5*day, e.stored("acme").Facts.Expires.Sub(first), float64(time.Minute))
			time.Sleep(30 * day)
			assert.True(t, e.server.Alive(accessTokenOf(e.lease("acme"))))
			assert.Equal(t, statusOK, e.status("acme"))
		})
	}
}

// The service counts the life of each new refresh token from its exchange, and exchanges are frequent: the end moves by seconds each time.
// The tenant is not exchanged more often than its readers need, and nobody is warned.
func TestEndThatFrequentExchangesMove(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, func(o *oauth2test.Options) {
			oauth2test.ClassA(o)
			o.RefreshTokenLife, o.RefreshTokenLifeField, o.AccessTokenLife = 5*time.Minute, "refresh_expires_in", 20*time.Second
		}, classB)
		e.add("acme", nil)
		for range 600 {
			assert.Empty(t, e.ok(logical.ReadOperation, "token/acme", nil).Warnings)
			time.Sleep(time.Second)
		}
		assert.Less(t, e.server.Exchanges("acme"), 100)
	})
}

// The refresh token lives a minute from its last use, and stays the same: the tenant works as long as it is used.
func TestEndThatExchangesMoveBySeconds(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, func(o *oauth2test.Options) {
			oauth2test.ClassA(o)
			o.Rotation, o.RefreshTokenLife, o.RefreshTokenLifeField = oauth2test.RotateNever, time.Minute, "refresh_expires_in"
		}, classB)
		e.add("acme", nil)
		e.read("token/acme")
		for range 40 {
			e.pass(2 * time.Second)
			assert.Equal(t, statusOK, e.status("acme"))
		}
		assert.True(t, e.server.Alive(accessTokenOf(e.lease("acme"))))
	})
}

// The service sends the rest of a fixed life in whole seconds: exchanges within a second show the same rest, and the warning of the end
// does not move.
func TestEndThatIsFixedAndExchangesWithinASecond(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, func(o *oauth2test.Options) {
			oauth2test.ClassA(o)
			o.Rotation, o.RefreshTokenAbsolute = oauth2test.RotateNever, true
			o.RefreshTokenLife, o.RefreshTokenLifeField = 100*day, "refresh_expires_in"
		}, classB)
		e.add("acme", nil)
		e.read("token/acme")
		from := e.stored("acme").Facts.RotatesFrom
		time.Sleep(50 * day)
		for range 5 {
			e.write("tenants/acme/refresh", nil)
			assert.Equal(t, from, e.stored("acme").Facts.RotatesFrom)
			time.Sleep(700 * time.Millisecond)
		}
	})
}

// The answer of the second exchange comes quicker than that of the first, so the end that is counted from the request moves by seconds: a
// fixed end is told from one that goes on by the time that has passed.
func TestEndThatIsFixedAndAnswersOfDifferentSpeed(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, func(o *oauth2test.Options) {
			oauth2test.ClassA(o)
			o.Rotation, o.RefreshTokenAbsolute = oauth2test.RotateNever, true
			o.RefreshTokenLife, o.RefreshTokenLifeField = 100*day, "refresh_expires_in"
		}, classB)
		e.server.Inject(oauth2test.Fault{Delay: 8 * time.Second, Times: 1})
		e.add("acme", nil)
		e.read("token/acme")
		was := e.stored("acme").Facts
		time.Sleep(time.Hour)
		e.write("tenants/acme/refresh", nil)
		assert.Greater(t, e.stored("acme").Facts.Expires, was.Expires)
		assert.Equal(t, was.RotatesFrom, e.stored("acme").Facts.RotatesFrom)
	})
}

// The first answer tells another end than the connector's refresh_token_life: the time of the warning is counted from it.
func TestEndThatTheFirstAnswerTells(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, func(o *oauth2test.Options) {
			oauth2test.ClassA(o)
			o.Rotation, o.RefreshTokenLife, o.RefreshTokenLifeField = oauth2test.RotateNever, 10*day, "refresh_expires_in"
		}, with(classB, "refresh_token_life", "2400h"))
		e.add("acme", nil)
		e.read("token/acme")
		assert.WithinDuration(t, time.Now().Add(9*day), e.stored("acme").Facts.RotatesFrom, time.Minute)
	})
}
