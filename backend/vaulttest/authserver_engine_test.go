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

// oauthMount mounts the engine, with the server's client as its connector. Config is what describes the server further.
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

// What a lease's end does at a service, for each of OAUTH.md's classes, on a real Vault and servers that others wrote.
func TestEngineOnAuthServers(t *testing.T) {
	v := Start(t)
	v.RegisterEngine(t)

	// shared reads twice and revokes both leases; the tokens' state follows.
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
		require.NotEqual(t, token, m.access("shared"), "it is given up either way")
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

		// The natural end of a lease ends its token too.
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
		require.Zero(t, stats.RevokedAccessTokens+stats.RevokedRefreshTokens+stats.RevokedEnded+stats.RevokedOther, "no revocation call ever")
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

// requireKept: the tenants are well, no refresh token was used twice, none was refused, and no token was revoked past its
// end.
func (m mount) requireKept(t *testing.T, s *AuthServer, tenants ...string) {
	t.Helper()
	for _, tenant := range tenants {
		require.Equal(t, "ok", m.read("tenants/" + tenant).ok(t).data()["status"])
	}
	stats := s.Stats(t)
	require.Zero(t, stats.Reused, "refresh tokens used twice")
	require.Zero(t, stats.Refused, "exchanges refused")
	require.Zero(t, stats.RevokedEnded, "access tokens revoked past their end")
	require.Equal(t, len(tenants), stats.LiveGrants)
}

// Readers who also renew, read token, force refreshes and revoke, over many token lives: no tenant is lost, no refresh token
// used twice, and where an exchange ends older access tokens none dies before its lease, but by a refresh or a revocation.
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
							// Somewhere before the lease's end the token has to work.
							time.Sleep(time.Duration(rand.Float64() * 0.9 * float64(p.LeaseDuration) * float64(time.Second)))
							if time.Since(began) > time.Duration(p.LeaseDuration)*time.Second {
								continue // this machine was too slow to say
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
			t.Logf("%d reads, %d tokens dead before their lease, %+v", reads.Load(), early.Load(), stats)
			if !c.disturb {
				require.Zero(t, early.Load(), "tokens that were dead before their lease")
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

// Readers and forced refreshes on three nodes, whose leader is killed twice and steps down once. A kill may cut an exchange
// after the server has replaced the refresh token: that tenant is lost, having used its old one once more. Nothing else is.
func TestFailoverOnAuthServers(t *testing.T) {
	if testing.Short() {
		t.Skip("a cluster on servers that others wrote is left out of -short")
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
						if rand.IntN(4) == 0 && !rejected {
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
				// A tenant whose last exchange was cut says so once the next one was tried.
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
			require.Equal(t, stats.Reused, lost, "a refresh token used twice, other than after a kill")
			require.Equal(t, stats.Refused, lost)
			require.Equal(t, cut, lost, "tenants lost to a step-down")
			require.Zero(t, stats.RevokedEnded)
			cluster.Leader(t).Unmount(t, path)
		})
	}
}
