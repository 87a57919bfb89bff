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

// The service keeps the refresh token and its end, of which it sends the rest in whole seconds. The end that the tenant shows, and the time
// from which an exchange is due, stay the same.
func TestEndThatExchangesRepeat(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, func(o *oauth2test.Options) {
			oauth2test.ClassA(o)
			o.Rotation, o.RefreshTokenLife, o.RefreshTokenAbsolute, o.RefreshTokenLifeField = oauth2test.RotateNever, 10*day, true, "refresh_expires_in"
		}, classB)
		e.add("acme", nil)
		e.write("tenants/acme/refresh", nil)
		facts := e.stored("acme").Facts
		for _, later := range []time.Duration{5 * day, 700 * time.Millisecond, 600 * time.Millisecond} {
			time.Sleep(later)
			e.write("tenants/acme/refresh", nil)
			assert.Equal(t, facts, e.stored("acme").Facts)
		}
	})
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
