package vaulttest

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// oauthMount mounts the engine, with the server's client as its connector. config are further fields of the connector.
func oauthMount(t *testing.T, v *Vault, s *AuthServer, path string, config fields) mount {
	t.Helper()
	m := mount{t: t, vault: v, path: path, token: v.RootToken, heard: &answers{}}
	v.Mount(t, path)
	t.Cleanup(func() {
		if !t.Failed() {
			require.NoError(t, v.Client.Sys().Unmount(path), "unmounting")
		}
	})
	body := fields{"service": "oauth2", "issuer": s.Issuer, "connector_id": s.ClientID, "connector_secret": s.ClientSecret, "exchanges_per_minute": 6000}
	for name, value := range config {
		body[name] = value
	}
	m.write("config", body).ok(t)
	return m
}

func (m mount) addGrant(s *AuthServer, tenant string, with fields) {
	m.t.Helper()
	body := fields{"refresh_token": s.Mint(m.t)}
	for name, value := range with {
		body[name] = value
	}
	m.write("tenants/"+tenant, body).ok(m.t)
}

// What the end of a lease does at a service, for each of OAUTH.md's classes, with a real Vault and servers of other projects.
func TestEngineOnAuthServers(t *testing.T) {
	v := Start(t)
	v.RegisterEngine(t)

	// shared reads twice and revokes both leases, and returns whether the token was alive after each.
	shared := func(t *testing.T, m mount, s *AuthServer) (afterFirst, afterLast bool) {
		t.Helper()
		m.addGrant(s, "shared", nil)
		one, other := m.read("creds/shared").ok(t), m.read("creds/shared").ok(t)
		token := one.text("access_token")
		require.Equal(t, token, other.text("access_token"))
		status, subject := s.Userinfo(t, token)
		require.Equal(t, 200, status)
		require.Equal(t, s.User, subject)
		m.revoke(one.lease())
		afterFirst = s.Alive(t, token)
		m.revoke(other.lease())
		afterLast = s.Alive(t, token)
		require.NotEqual(t, token, m.access("shared"), "the engine gives it up in each class")
		require.True(t, s.Alive(t, m.access("shared")))
		return afterFirst, afterLast
	}

	t.Run("class A", func(t *testing.T) {
		s := StartOIDCProvider(t, "REVOKE_CASCADE=access-only")
		m := oauthMount(t, v, s, "a", fields{"revocation": "access_token", "exchange_invalidates": false})
		afterFirst, afterLast := shared(t, m, s)
		require.True(t, afterFirst)
		require.False(t, afterLast)
		require.Equal(t, 1, s.Stats(t).RevokedAccessTokens)

		m.addGrant(s, "own", fields{"token_per_lease": true})
		one, other := m.read("creds/own").ok(t), m.read("creds/own").ok(t)
		require.NotEqual(t, one.text("access_token"), other.text("access_token"))
		require.True(t, s.Alive(t, one.text("access_token")))
		m.revoke(one.lease())
		require.False(t, s.Alive(t, one.text("access_token")))
		require.True(t, s.Alive(t, other.text("access_token")))

		// A lease that expires ends its token too.
		m.write("tenants/own", fields{"ttl": "2s"}).ok(t)
		short := m.read("creds/own").ok(t)
		Eventually(t, "the token to end with its lease", func() bool { return !s.Alive(t, short.text("access_token")) })
		require.True(t, s.Alive(t, other.text("access_token")))
		m.revoke(other.lease())
		require.False(t, s.Alive(t, other.text("access_token")))
		m.requireKept(t, s, "shared", "own")
	})

	t.Run("class B", func(t *testing.T) {
		s := StartOIDCProvider(t)
		m := oauthMount(t, v, s, "b", fields{"exchange_invalidates": false})
		afterFirst, afterLast := shared(t, m, s)
		require.True(t, afterFirst)
		require.True(t, afterLast)
		stats := s.Stats(t)
		require.Zero(t, stats.RevokedAccessTokens+stats.RevokedRefreshTokens+stats.RevokedEnded+stats.RevokedOther, "no revocation was sent")
		require.Equal(t, 1, stats.LiveGrants)
		m.requireKept(t, s, "shared")
	})

	t.Run("class C", func(t *testing.T) {
		s := StartOIDCProvider(t, "ACCESS_FORMAT=jwt")
		m := oauthMount(t, v, s, "c", fields{"revocation": "access_token", "exchange_invalidates": false})
		m.addGrant(s, "acme", nil)
		c := m.read("creds/acme").ok(t)
		m.revoke(c.lease())
		require.True(t, s.Alive(t, c.text("access_token")))
		Eventually(t, "the status to say that the service cannot", func() bool {
			data := m.read("tenants/acme").ok(t).data()
			return data["last_revocation_error"] != nil && data["pending_revocations"] == nil
		})
		t.Log(m.read("tenants/acme").ok(t).data()["last_revocation_error"])
		require.Equal(t, 1, s.Stats(t).LiveGrants)
		m.requireKept(t, s, "acme")
	})

	t.Run("class D", func(t *testing.T) {
		s := StartZitadel(t)
		m := oauthMount(t, v, s, "d", fields{"revocation": "access_token"})
		afterFirst, afterLast := shared(t, m, s)
		require.True(t, afterFirst)
		require.False(t, afterLast)
		require.Equal(t, 1, s.Stats(t).RevokedAccessTokens)
		m.requireKept(t, s, "shared")
	})

	t.Run("class D by exchange", func(t *testing.T) {
		s := StartZitadel(t)
		m := oauthMount(t, v, s, "x", fields{"revocation": "exchange"})
		m.addGrant(s, "acme", nil)
		c := m.read("creds/acme").ok(t)
		m.revoke(c.lease())
		Eventually(t, "the exchange to end the token", func() bool { return !s.Alive(t, c.text("access_token")) })
		require.Equal(t, 2, s.Stats(t).Exchanges)
		require.Zero(t, s.Stats(t).RevokedAccessTokens)
		m.requireKept(t, s, "acme")
	})

	t.Run("a delete", func(t *testing.T) {
		s := StartZitadel(t)
		m := oauthMount(t, v, s, "deleted", fields{"revocation": "access_token", "revoke_on_delete": true})
		m.addGrant(s, "acme", nil)
		m.addGrant(s, "other", nil)
		require.Equal(t, 2, s.Stats(t).LiveGrants)
		m.delete("tenants/acme").ok(t)
		Eventually(t, "the refresh token to end", func() bool { return s.Stats(t).LiveGrants == 1 })
		m.requireKept(t, s, "other")
	})
}

// requireKept requires that the tenants' status is ok, no refresh token was used twice or refused, and no expired token was
// revoked.
func (m mount) requireKept(t *testing.T, s *AuthServer, tenants ...string) {
	t.Helper()
	for _, tenant := range tenants {
		require.Equal(t, "ok", m.read("tenants/" + tenant).ok(t).data()["status"])
	}
	stats := s.Stats(t)
	require.Zero(t, stats.Reused, "refresh tokens used twice")
	require.Zero(t, stats.Refused, "exchanges refused")
	require.Zero(t, stats.RevokedEnded, "expired access tokens revoked")
	require.Equal(t, len(tenants), stats.LiveGrants)
}

// Readers also renew leases, read token, refresh and revoke, over many lives of an access token: no tenant is lost, and no
// refresh token is used twice. At a server whose exchanges end older access tokens, no token ends before a lease on it, except
// by a refresh or a revocation.
func TestLoadOnAuthServers(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name     string
		start    func(testing.TB, ...string) *AuthServer
		settings []string
		config   fields
		tenant   fields
		disturb  bool // refreshes and revocations, which end a shared token before its leases
	}{
		{"zitadel, readers alone", StartZitadel, []string{"ACCESS_TTL=20"}, fields{"revocation": "access_token"}, nil, false},
		{"zitadel, short tokens", StartZitadel, []string{"ACCESS_TTL=6"}, fields{"revocation": "access_token"}, nil, false},
		{"zitadel", StartZitadel, []string{"ACCESS_TTL=6"}, fields{"revocation": "access_token"}, nil, true},
		{"oidc-provider, class A", StartOIDCProvider, []string{"ACCESS_TTL=6", "REVOKE_CASCADE=access-only"}, fields{"revocation": "access_token", "exchange_invalidates": false}, nil, true},
		{"oidc-provider, a token per lease", StartOIDCProvider, []string{"ACCESS_TTL=20", "REVOKE_CASCADE=access-only"}, fields{"revocation": "access_token", "exchange_invalidates": false}, fields{"token_per_lease": true, "ttl": "4s"}, true},
		{"oidc-provider, class B", StartOIDCProvider, []string{"ACCESS_TTL=6"}, fields{"exchange_invalidates": false}, nil, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := c.start(t, c.settings...)
			v := Start(t)
			v.RegisterEngine(t)
			m := oauthMount(t, v, s, "load", c.config)
			const tenants = 4
			for i := range tenants {
				m.addGrant(s, fmt.Sprint("t", i), c.tenant)
			}
			length := 45 * time.Second
			if testing.Short() {
				length = 8 * time.Second
			}
			end := time.Now().Add(length)
			var reads, early atomic.Int64
			var wg sync.WaitGroup
			for i := range tenants {
				tenant := fmt.Sprint("t", i)
				for range 2 {
					wg.Go(func() {
						for time.Now().Before(end) {
							a, err := m.send("GET", "load/creds/"+tenant, "", nil)
							if err != nil || a.status != 200 {
								t.Errorf("a read failed: %v %d %s", err, a.status, a.body)
								return
							}
							reads.Add(1)
							began, p := time.Now(), a.parsed()
							// At a random time before the lease's end the token has to work.
							time.Sleep(time.Duration(rand.Float64() * 0.9 * float64(p.LeaseDuration) * float64(time.Second)))
							if time.Since(began) > time.Duration(p.LeaseDuration)*time.Second {
								continue // the machine was too slow: the lease may have ended
							}
							if !s.Alive(t, a.text("access_token")) && time.Since(began) < time.Duration(p.LeaseDuration)*time.Second {
								early.Add(1)
							}
							if c.disturb && rand.IntN(3) == 0 {
								_, _ = m.send("PUT", "sys/leases/revoke", `{"lease_id":"`+p.LeaseID+`","sync":true}`, nil)
							}
						}
					})
				}
				if c.disturb {
					wg.Go(func() {
						for time.Now().Before(end) {
							time.Sleep(time.Duration(1+rand.IntN(3)) * time.Second)
							_, _ = m.send("PUT", "load/tenants/"+tenant+"/refresh", "{}", nil)
						}
					})
				}
			}
			wg.Wait()
			stats := s.Stats(t)
			t.Logf("%d reads, %d tokens ended before their lease, %+v", reads.Load(), early.Load(), stats)
			if !c.disturb {
				require.Zero(t, early.Load(), "tokens that ended before their lease")
			}
			require.Zero(t, stats.Reused)
			require.Zero(t, stats.Refused)
			require.Zero(t, stats.RevokedEnded)
			require.Equal(t, tenants, stats.LiveGrants)
			for i := range tenants {
				require.Equal(t, "ok", m.read(fmt.Sprint("tenants/t", i)).ok(t).data()["status"])
			}
		})
	}
}

// Readers and refreshes on three nodes, whose leader is killed twice and steps down once. A kill may cut an exchange after
// the server has replaced the refresh token: that tenant is lost, and its old refresh token is used once more. No other tenant
// is lost.
func TestFailoverOnAuthServers(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: three Vaults beside a server of another project; make test runs it")
	}
	t.Parallel()
	for _, c := range []struct {
		name     string
		start    func(testing.TB, ...string) *AuthServer
		settings []string
		config   fields
	}{
		{"zitadel", StartZitadel, []string{"ACCESS_TTL=6"}, fields{"revocation": "access_token"}},
		{"oidc-provider", StartOIDCProvider, []string{"ACCESS_TTL=6", "REVOKE_CASCADE=access-only"}, fields{"revocation": "access_token", "exchange_invalidates": false}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := c.start(t, c.settings...)
			cluster := StartCluster(t, 3)
			var leader atomic.Pointer[Vault]
			leader.Store(cluster.Leader(t))
			leader.Load().RegisterEngine(t)
			path := "failover"
			m := mount{t: t, vault: leader.Load(), path: path, token: cluster.RootToken, heard: &answers{}}
			m.vault.Mount(t, path)
			config := fields{"service": "oauth2", "issuer": s.Issuer, "connector_id": s.ClientID, "connector_secret": s.ClientSecret, "exchanges_per_minute": 6000}
			maps.Copy(config, c.config)
			m.write("config", config).ok(t)
			const tenants = 8
			for i := range tenants {
				m.addGrant(s, fmt.Sprint("t", i), nil)
			}

			stop := make(chan struct{})
			var reads atomic.Int64
			var wg sync.WaitGroup
			for i := range tenants {
				wg.Go(func() {
					rejected := false // a refresh by hand would send the refused refresh token again
					for {
						select {
						case <-stop:
							return
						case <-time.After(time.Duration(rand.IntN(200)) * time.Millisecond):
						}
						m := m
						m.vault = leader.Load()
						method, to, body := "GET", fmt.Sprint(path, "/creds/t", i), ""
						refresh := rand.IntN(4) == 0 && !rejected
						if refresh { // the engine may have exchanged by itself, and been refused
							a, err := m.send("GET", fmt.Sprint(path, "/tenants/t", i), "", nil)
							refresh = err == nil && a.data()["status"] != "rejected"
						}
						if refresh {
							method, to, body = "PUT", fmt.Sprint(path, "/tenants/t", i, "/refresh"), "{}"
						}
						a, err := m.send(method, to, body, nil)
						switch {
						case err != nil:
						case a.status == 200:
							reads.Add(1)
						case a.status == 400:
							rejected = true
						}
					}
				})
			}
			for range 2 {
				time.Sleep(8 * time.Second)
				killed := leader.Load()
				cluster.Kill(killed)
				leader.Store(cluster.Leader(t))
				time.Sleep(4 * time.Second)
				cluster.RestartNode(t, killed)
			}
			cut := s.Stats(t).Refused
			leader.Store(cluster.StepDown(t))
			time.Sleep(8 * time.Second)
			close(stop)
			wg.Wait()

			m.vault = cluster.Leader(t)
			lost := 0
			for i := range tenants {
				// The status of a tenant whose last exchange was cut is rejected after the next exchange.
				if m.read(fmt.Sprint("tenants/t", i)).ok(t).data()["status"] != "rejected" {
					m.send("PUT", fmt.Sprint(path, "/tenants/t", i, "/refresh"), "{}", nil)
				}
				if status := m.read(fmt.Sprint("tenants/t", i)).ok(t).text("status"); status != "ok" {
					require.Equal(t, "rejected", status)
					lost++
				}
			}
			stats := s.Stats(t)
			t.Logf("%d answers, %d tenants lost to an exchange that a kill cut, %+v", reads.Load(), lost, stats)
			require.Greater(t, reads.Load(), int64(tenants*10))
			require.Equal(t, stats.Reused, lost, "only after a kill is a refresh token used twice")
			require.Equal(t, stats.Refused, lost)
			require.Equal(t, cut, lost, "tenants lost to a step-down")
			require.Zero(t, stats.RevokedEnded)
			cluster.Leader(t).Unmount(t, path)
		})
	}
}
