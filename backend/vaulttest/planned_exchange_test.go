package vaulttest

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// classDLength is how long the readers of TestNoTokenDiesBeforeItsLease read: 25 seconds, or KAIZALA_CLASS_D_LENGTH. In ten minutes,
// the time that issue 9 asks for, access tokens of five minutes are replaced too.
func classDLength(t *testing.T) time.Duration {
	text := os.Getenv("KAIZALA_CLASS_D_LENGTH")
	if text == "" {
		return 25 * time.Second
	}
	length, err := time.ParseDuration(text)
	require.NoError(t, err, "KAIZALA_CLASS_D_LENGTH is a duration such as 10m")
	return length
}

// classDLoad are readers of one tenant at a server where an exchange ends older access tokens, and their results.
type classDLoad struct {
	mount
	life   time.Duration
	end    time.Time          // when the readers stop
	server *oauth2test.Server // nil for a server of another project
	others *AuthServer

	leases, renewals, tokens, refused, late, died atomic.Int64

	mu       sync.Mutex
	promises []promise // for the access tokens of server, which knows the exact time of their ends
	checks   sync.WaitGroup
}

// promise says that an access token lives until a time.
type promise struct {
	token, what string
	until       time.Time
}

// promised notes a promise. A server of another project is asked shortly before the promised end, or when the readers stop.
func (l *classDLoad) promised(p promise) {
	if l.server != nil {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.promises = append(l.promises, p)
		return
	}
	l.checks.Go(func() {
		time.Sleep(min(time.Until(p.until)-300*time.Millisecond, time.Until(l.end)))
		if !l.others.Alive(l.t, p.token) && time.Now().Before(p.until) {
			l.dead(p)
		}
	})
}

func (l *classDLoad) dead(p promise) {
	if l.died.Add(1) <= 5 {
		l.t.Errorf("%s: an access token ended before the end of its %s, %s", l.path, p.what, p.until.Format("15:04:05.000"))
	}
}

// settle checks all promises.
func (l *classDLoad) settle() {
	l.checks.Wait()
	for _, p := range l.promises {
		if ended := l.server.TokenStatus(p.token).Ended; !ended.IsZero() && ended.Before(p.until) {
			l.dead(p)
		}
	}
}

// leaseEnd returns when a lease ends by Vault's clock, or otherwise if it has ended.
func (l *classDLoad) leaseEnd(lease string, otherwise time.Time) time.Time {
	a, err := l.send(http.MethodPut, "sys/leases/lookup", `{"lease_id":"`+lease+`"}`, nil)
	if err != nil || a.status != 200 {
		return otherwise
	}
	end, err := time.Parse(time.RFC3339Nano, a.text("expire_time"))
	if err != nil {
		return otherwise
	}
	return end
}

// read reads until the end: creds, with renewals of some leases as long as that is possible, and token, with and without min_ttl.
func (l *classDLoad) read() {
	for time.Now().Before(l.end) {
		time.Sleep(rand.N(3 * time.Second))
		path := l.path + []string{"/creds/acme", "/creds/acme", "/token/acme"}[rand.IntN(3)]
		var minTTL time.Duration
		if rand.IntN(3) == 0 {
			minTTL = time.Second + rand.N(l.life/2-time.Second).Truncate(time.Second)
			path += fmt.Sprintf("?min_ttl=%s", minTTL)
		}
		sent := time.Now()
		a, err := l.send(http.MethodGet, path, "", nil)
		switch {
		case err != nil:
			l.t.Errorf("%s: %v", path, err)
			return
		case a.status == 400 && minTTL > 0 && strings.Contains(a.body, "min_ttl is more than"):
			l.refused.Add(1)
			continue
		case a.status == 503:
			l.late.Add(1) // the machine was too slow for a token of 6 seconds
			continue
		case a.status != 200:
			l.t.Errorf("%s: %d %s", path, a.status, a.body)
			return
		}
		token := a.text("access_token")
		if minTTL > 0 {
			l.promised(promise{token, "min_ttl", sent.Add(minTTL)})
		}
		lease := a.lease()
		if lease == "" {
			l.tokens.Add(1)
			l.promised(promise{token, "ttl", sent.Add(time.Duration(a.number("ttl")) * time.Second)})
			continue
		}
		l.leases.Add(1)
		until := l.leaseEnd(lease, sent.Add(a.ttl()))
		l.promised(promise{token, "lease", until})
		for rand.IntN(2) == 0 && time.Until(until) > 0 {
			time.Sleep(min(rand.N(max(time.Until(until), 1)), time.Until(l.end)))
			sent := time.Now()
			a, err := l.send(http.MethodPut, "sys/leases/renew", fmt.Sprintf(`{"lease_id":%q,"increment":%d}`, lease, rand.IntN(2)*int(l.life.Seconds())), nil)
			if err != nil || a.status != 200 {
				break // the lease has ended
			}
			l.renewals.Add(1)
			until = l.leaseEnd(lease, sent.Add(a.ttl()))
			l.promised(promise{token, "renewed lease", until})
		}
	}
}

// At a server where an exchange ends older access tokens (class D), readers also renew leases, read token and ask for min_ttl: no
// access token ends before a lease on it, or before the ttl of a token read. The tokens live 6 seconds, a minute and five minutes. A
// refresh ends a token before its lease, and its answer says so.
func TestNoTokenDiesBeforeItsLease(t *testing.T) {
	t.Parallel()
	length := classDLength(t)
	v := Start(t, WithConfig(func(config map[string]any) { config["log_level"] = "info" }))
	v.RegisterEngine(t)
	var loads []*classDLoad
	for _, life := range []time.Duration{6 * time.Second, time.Minute, 5 * time.Minute} {
		s := StartZitadel(t, fmt.Sprint("ACCESS_TTL=", life.Seconds()))
		m := oauthMount(t, v, s, "zitadel-"+life.String(), nil)
		m.addGrant(s, "acme", nil)
		loads = append(loads, &classDLoad{mount: m, life: life, others: s})

		server := oauth2test.New()
		server.Set(func(o *oauth2test.Options) { oauth2test.ClassD(o); o.AccessTokenLife = life })
		t.Cleanup(server.Listen())
		id, secret := server.RegisterClient(oauth2test.AuthBasic)
		m.path = "emulator-" + life.String()
		v.Mount(t, m.path)
		m.write("config", fields{"service": "oauth2", "issuer": server.Issuer(), "connector_id": id, "connector_secret": secret, "exchanges_per_minute": 6000}).ok(t)
		m.write("tenants/acme", fields{"refresh_token": server.Grant(id, "acme")}).ok(t)
		loads = append(loads, &classDLoad{mount: m, life: life, server: server})
	}
	var readers sync.WaitGroup
	for _, l := range loads {
		l.write("tenants/acme", fields{"ttl": int(max(l.life/10, time.Second).Seconds())}).ok(t) // so that leases are renewed
		l.end = time.Now().Add(length)
		for range 8 {
			readers.Go(l.read)
		}
	}
	readers.Wait()
	for _, l := range loads {
		t.Run(l.path, func(t *testing.T) {
			m := l.in(t)
			l.settle()
			exchanges := 0
			if l.server != nil {
				exchanges = l.server.Exchanges("acme")
				require.Empty(t, l.server.LostGrants())
				require.Zero(t, l.server.UsedTwice())
			} else {
				stats := l.others.Stats(t)
				exchanges = stats.Exchanges
				require.Zero(t, stats.Reused+stats.Refused)
			}
			t.Logf("%s: %d leases, %d renewals, %d answers of token, %d refused for their min_ttl, %d without a token in time; %d exchanges; %d tokens ended too early",
				length, l.leases.Load(), l.renewals.Load(), l.tokens.Load(), l.refused.Load(), l.late.Load(), exchanges, l.died.Load())
			require.Zero(t, l.died.Load())
			require.Greater(t, l.leases.Load(), int64(8))
			require.Equal(t, "ok", m.read("tenants/acme").ok(t).text("status"))

			c := m.read("creds/acme").ok(t)
			require.True(t, l.alive(c.text("access_token")) || l.life < 10*time.Second)
			a := m.write("tenants/acme/refresh", nil).ok(t)
			require.False(t, l.alive(c.text("access_token")))
			require.Contains(t, strings.Join(a.parsed().Warnings, "\n"), "leases on it are of no use")
		})
	}
}

func (l *classDLoad) alive(token string) bool {
	if l.server != nil {
		return l.server.Alive(token)
	}
	return l.others.Alive(l.t, token)
}
