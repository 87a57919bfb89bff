package backend

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/tokenservice"
)

// When a tenant is exchanged without a reader: an access token that an exchange ends is left to its readers and leases until its planned
// time; a failed exchange is tried when its rest is over, and not before, also after the token's end.
func TestWhenAnExchangeIsDue(t *testing.T) {
	const unplanned = time.Duration(0)
	failed := func(until time.Duration, lost bool) *trouble {
		return &trouble{err: errors.New("failed"), at: time.Now(), until: time.Now().Add(until), lost: lost}
	}
	never := time.Duration(-1)
	for name, c := range map[string]struct {
		expires, planned time.Duration // of the access token, from now
		use, leases      int
		rotates          time.Duration // when the refresh token is due for its own sake, from now; 0: never
		trouble          func() *trouble
		owed             bool
		postponed        time.Duration
		want             time.Duration // from now
	}{
		"a token that was read is exchanged at its planned time": {
			expires: time.Hour, planned: 40 * time.Minute, use: read, rotates: 50 * time.Minute, want: 40 * time.Minute,
		},
		"a refresh token that is due before does not end a token that was read": {
			expires: time.Hour, planned: 40 * time.Minute, use: read, rotates: 10 * time.Minute, want: 40 * time.Minute,
		},
		"a refresh token that is due before does not end a token that may have leases": {
			expires: time.Hour, planned: 40 * time.Minute, leases: leasesUnknown, rotates: 10 * time.Minute, want: 40 * time.Minute,
		},
		"a token that may have leases and was not read is not renewed before the refresh token is due": {
			expires: time.Hour, planned: 40 * time.Minute, leases: leasesUnknown, rotates: 50 * time.Minute, want: 50 * time.Minute,
		},
		"after a lost answer it is, at the end of the rest": {
			expires: time.Hour, planned: 40 * time.Minute, leases: leasesUnknown, rotates: 50 * time.Minute,
			trouble: func() *trouble { return failed(20*time.Second, true) }, want: 20 * time.Second,
		},
		"a token without readers goes with the refresh token": {
			expires: time.Hour, planned: 40 * time.Minute, rotates: 10 * time.Minute, want: 10 * time.Minute,
		},
		"the exchange of a token without readers is tried again when its rest is over": {
			expires: time.Hour, planned: 40 * time.Minute, rotates: 10 * time.Minute,
			trouble: func() *trouble { return failed(20*time.Second, false) }, want: 20 * time.Second,
		},
		"a failed exchange is tried again at the end of its rest after the token's end": {
			expires: -time.Second, planned: -time.Minute, use: read,
			trouble: func() *trouble { return failed(20*time.Second, false) }, want: 20 * time.Second,
		},
		"a failed exchange is tried again at the end of its rest where exchanges end no token": {
			expires: time.Hour, planned: unplanned, use: read,
			trouble: func() *trouble { return failed(20*time.Second, false) }, want: 20 * time.Second,
		},
		"a token without readers that exchanges do not end, with nothing else due, is renewed once at its end": {
			expires: 100 * time.Hour, planned: unplanned, want: 96 * time.Hour,
		},
		"a token that was given up leaves nothing to exchange": {
			expires: time.Hour, planned: 40 * time.Minute, use: read, leases: givenUp, want: never,
		},
		"a given-up token that the next exchange ends is exchanged at once": {
			expires: time.Hour, planned: unplanned, leases: givenUp, owed: true, want: 0,
		},
		"a given-up token is not exchanged while no call is permitted": {
			expires: time.Hour, planned: unplanned, leases: givenUp, owed: true, postponed: time.Minute, want: time.Minute,
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				now := time.Now()
				e := newConfiguredEngine(t)
				entry := &tenantEntry{Connector: "gone", LastExchange: now.Add(-time.Minute), Verified: true, Facts: tokenservice.Facts{Expires: now.Add(1000 * time.Hour)}}
				if c.rotates != 0 {
					entry.Facts.RotatesFrom = now.Add(c.rotates)
					entry.Facts.Expires = entry.Facts.RotatesFrom.Add(time.Nanosecond) // so that the tenant's own part of the rest is nothing
				} else {
					entry.Facts.RotatesFrom = now.Add(900 * time.Hour)
				}
				a := newAccessToken("acme", &accessEntry{Obtained: now.Add(-time.Minute), Expires: now.Add(c.expires)})
				if c.planned != unplanned {
					a.Planned = now.Add(c.planned)
				}
				a.use.Store(int32(c.use))
				a.leases.Store(int64(c.leases))
				if c.owed {
					entry.EndsBy = now.Add(time.Hour)
				}
				v := &tenantView{tenantMemory: &tenantMemory{}}
				v.show(entry, a)
				if c.trouble != nil {
					v.trouble = c.trouble()
				}
				if c.postponed != 0 {
					v.postponed = now.Add(c.postponed)
				}
				v.derive()
				due := e.exchangeDue(newTenant("acme"), v, now)
				if c.want == never {
					assert.True(t, due.After(now.Add(900*time.Hour)), due.Sub(now))
					return
				}
				assert.InDelta(t, c.want, due.Sub(now), float64(c.want)/20+1)
			})
		})
	}
}
