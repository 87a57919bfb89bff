package backend

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
)

// What each change makes of each state of the count of leases. A token that was given up stays so, whatever comes after.
func TestCountOfLeases(t *testing.T) {
	counted := func(a *accessToken) bool { ok, _ := a.handOut(true); return ok }
	doubted := func(a *accessToken) bool { a.doubt(); return a.current() }
	ends := func(early, replaced bool) func(*accessToken) bool {
		return func(a *accessToken) bool { return a.end(early, replaced) }
	}
	for name, c := range map[string]struct {
		from   int64
		change func(*accessToken) bool
		to     int64
		says   bool
	}{
		"a lease on a token without any":                           {0, counted, 1, true},
		"a lease on a token whose count is unknown":                {leasesUnknown, counted, leasesUnknown, true},
		"a lease on a token that was given up":                     {givenUp, counted, givenUp, false},
		"a count that becomes doubtful":                            {2, doubted, leasesUnknown, true},
		"a count of no lease that becomes doubtful":                {0, doubted, leasesUnknown, true},
		"a count that is unknown already":                          {leasesUnknown, doubted, leasesUnknown, true},
		"a reader who goes away after the token was given up":      {givenUp, doubted, givenUp, false},
		"one of two leases is revoked":                             {2, ends(true, false), 1, false},
		"the last lease is revoked":                                {1, ends(true, false), givenUp, true},
		"the last lease expires":                                   {1, ends(false, false), 0, false},
		"the last lease on a replaced token expires":               {1, ends(false, true), givenUp, true},
		"one of two leases on a replaced token expires":            {2, ends(false, true), 1, false},
		"a lease is revoked, and the count is unknown":             {leasesUnknown, ends(true, false), givenUp, true},
		"a lease expires, and the count is unknown":                {leasesUnknown, ends(false, false), leasesUnknown, false},
		"a lease on a replaced token expires, count unknown":       {leasesUnknown, ends(false, true), leasesUnknown, false},
		"a lease expires after the token was given up":             {givenUp, ends(false, false), givenUp, true},
		"a lease is revoked after the token was given up":          {givenUp, ends(true, false), givenUp, true},
		"Vault revokes a lease a second time":                      {0, ends(true, false), givenUp, true},
		"Vault tells of the end of an expired lease a second time": {0, ends(false, false), 0, false},
	} {
		t.Run(name, func(t *testing.T) {
			a := newAccessToken("acme", &accessEntry{})
			a.leases.Store(c.from)
			assert.Equal(t, c.says, c.change(a))
			assert.Equal(t, c.to, a.leases.Load())
		})
	}
}

// A token may have leases, and is renewed ahead of its end, if the count is unknown too.
func TestTokensWithLeases(t *testing.T) {
	for leases, has := range map[int64]bool{1: true, 0: false, leasesUnknown: true, givenUp: false} {
		a := newAccessToken("acme", &accessEntry{})
		a.leases.Store(leases)
		assert.Equal(t, has, a.leased(), leases)
		assert.Equal(t, has, a.wanted(), leases)
		a.use.Store(read)
		assert.True(t, a.wanted(), leases)
	}
}

// The latest end of a lease counts, and only where an exchange ends the token.
func TestLatestEndOfALease(t *testing.T) {
	now := time.Now()
	for planned, latest := range map[time.Time]int64{now: now.Add(2 * time.Minute).UnixNano(), {}: 0} {
		a := newAccessToken("acme", &accessEntry{Planned: planned})
		for _, end := range []time.Duration{time.Minute, 2 * time.Minute, time.Second} {
			a.leasedUntil(now.Add(end))
		}
		assert.Equal(t, latest, a.leasedTo.Load())
	}
}
