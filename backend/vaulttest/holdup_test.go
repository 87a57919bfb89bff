package vaulttest

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/kaizala/kaizalatest"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

const (
	dueTenants = 500
	// promptly is the limit for a seal, a step-down and a reload: 10 seconds for a
	// reader, 5 for the engine to stop, and some for Vault.
	promptly = 20 * time.Second
)

// hang makes Kaizala hang, and writes tenants whose refresh tokens are past 90 % of
// their lives, so that they are due. It returns when hundreds of background exchanges
// hang at Kaizala, and readers wait.
func hang(m mount, service *kaizalatest.Service, connectorID string) (readers *sync.WaitGroup) {
	m.t.Helper()
	service.ClearFaults()
	service.Inject(kaizalatest.Fault{Hang: true})
	service.SetRefreshTokenAge(330 * 24 * time.Hour)
	defer service.SetRefreshTokenAge(0)
	eachTenant(func(name string) {
		a := m.write("tenants/"+name, fields{"refresh_token": service.GenerateUserToken(connectorID, name), "verify": false})
		if a.status != 204 {
			m.t.Errorf("%s: %d %s", a.request, a.status, a.body)
		}
	})
	hanging := func() (n int) {
		for _, call := range service.Calls() {
			if call.End.IsZero() {
				n++
			}
		}
		return n
	}
	Eventually(m.t, "the tenants to come due", func() bool { return hanging() > dueTenants*9/10 })
	readers = &sync.WaitGroup{}
	var waiting atomic.Int64
	for i := range 100 {
		readers.Go(func() {
			waiting.Add(1)
			_, _ = m.send(http.MethodGet, fmt.Sprintf("%s/token/due-%03d", m.path, i), "", nil)
		})
	}
	Eventually(m.t, "readers to wait", func() bool { return waiting.Load() == 100 })
	return readers
}

func eachTenant(do func(name string)) {
	var workers sync.WaitGroup
	names := make(chan string)
	for range 16 {
		workers.Go(func() {
			for name := range names {
				do(name)
			}
		})
	}
	for i := range dueTenants {
		names <- fmt.Sprintf("due-%03d", i)
	}
	close(names)
	workers.Wait()
}

// otherMount reads another mount again and again. stop ends that, and returns the
// duration of the longest read and the number of reads that failed.
func otherMount(m mount) (stop func() (longest time.Duration, failed int)) {
	done := make(chan struct{})
	var reading sync.WaitGroup
	var longest time.Duration
	failed := 0
	reading.Go(func() {
		for {
			select {
			case <-done:
				return
			case <-time.After(20 * time.Millisecond):
			}
			began := time.Now()
			a, err := m.send(http.MethodGet, "cubbyhole/none", "", nil)
			longest = max(longest, time.Since(began))
			if err != nil || a.status != 404 {
				failed++
			}
		}
	})
	return func() (time.Duration, int) {
		close(done)
		reading.Wait()
		return longest, failed
	}
}

// Kaizala hangs, hundreds of tenants are due and readers wait: a reload, a seal and
// the readers of another mount do not wait for that.
func TestVaultIsNeverHeldUp(t *testing.T) {
	v := Start(t)
	v.RegisterEngine(t)
	m := mountEngine(t, v, "held")
	m.kaizala.SetLimits(0, 0)
	config := m.connector()
	config["exchanges_per_minute"] = 100000
	m.write("config", config).ok(t)

	t.Run("reload", func(t *testing.T) {
		m := m.in(t)
		readers := hang(m, m.kaizala.Service, m.connectorID)
		stop := otherMount(m)
		began := time.Now()
		out, exit := v.CLI(t, v.RootToken, "plugin", "reload", "-type=secret", "-plugin="+PluginName)
		took := time.Since(began)
		require.Zero(t, exit, out)
		require.Less(t, took, promptly)
		readers.Wait()
		require.Less(t, time.Since(began), promptly, "a reader gets an answer within 10 seconds")
		longest, failed := stop()
		t.Logf("the reload took %s, another mount's longest read %s", took.Round(time.Millisecond), longest.Round(time.Millisecond))
		require.Zero(t, failed, "reads of another mount")
		require.Less(t, longest, 5*time.Second, "a read of another mount")
	})

	t.Run("seal", func(t *testing.T) {
		m := m.in(t)
		readers := hang(m, m.kaizala.Service, m.connectorID)
		began := time.Now()
		v.Seal(t)
		took := time.Since(began)
		t.Logf("the seal took %s", took.Round(time.Millisecond))
		require.Less(t, took, promptly)
		readers.Wait()
		m.kaizala.ClearFaults()
		v.Unseal(t)
		// No tenant was lost by the seal.
		Eventually(t, "the engine to serve again", func() bool { return m.read("token/due-000").status == 200 })
	})
}

// rotatingMount makes a mount with a tenant whose exchanges replace the refresh token at once.
func rotatingMount(t *testing.T, v *Vault, path string) (m mount, server *oauth2test.Server) {
	t.Helper()
	server = newAuthServer(t)
	id, secret := server.RegisterClient(oauth2test.AuthBasic)
	v.Mount(t, path)
	m = mount{vault: v, t: t, path: path, token: v.RootToken, heard: &answers{}}
	m.write("config", fields{"service": "oauth2", "token_url": server.TokenURL(), "connector_id": id, "connector_secret": secret, "request_timeout": "60s"}).ok(t)
	m.write("tenants/acme", fields{"refresh_token": server.Grant(id, "acme"), "verify": false}).ok(t)
	return m, server
}

// exchangeWith has the mount's tenant exchanged at a service with a fault, and returns once the service has the request.
func exchangeWith(m mount, server *oauth2test.Server, fault oauth2test.Fault) (ended <-chan struct{}) {
	m.t.Helper()
	server.Inject(fault)
	done := make(chan struct{})
	calls := len(server.Calls())
	go func() {
		defer close(done)
		_, _ = m.send(http.MethodPut, m.path+"/tenants/acme/refresh", "{}", nil)
	}()
	Eventually(m.t, "the exchange to be at the service", func() bool { return len(server.Calls()) > calls })
	return done
}

// Vault reloads the plugin while an exchange is under way. It ends the process of all mounts after it has stopped one of them: that stop
// waits for the exchange, whichever mount it is of, so that the new refresh token is stored.
func TestReloadWaitsForTheExchangesOfAllMounts(t *testing.T) {
	t.Parallel()
	v := Start(t)
	v.RegisterEngine(t)
	before, _ := rotatingMount(t, v, "before")
	m, server := rotatingMount(t, v, "middle")
	later, _ := rotatingMount(t, v, "later")
	before.read("config").ok(t)
	later.read("config").ok(t)
	ended := exchangeWith(m, server, oauth2test.Fault{Hold: true})
	time.AfterFunc(2*time.Second, server.ClearFaults)
	v.Reload(t)
	<-ended
	server.ClearFaults()
	m.write("tenants/acme/refresh", nil).ok(t)
	require.Equal(t, "ok", m.read("tenants/acme").ok(t).text("status"))
	require.Zero(t, server.UsedTwice())
}

// A container is stopped while an exchange is under way, and the signal reaches the plugin too: the plugin ends once the new refresh token is
// stored.
func TestTerminationWaitsForTheExchange(t *testing.T) {
	t.Parallel()
	v := Start(t, Raft())
	v.RegisterEngine(t)
	m, server := rotatingMount(t, v, "kaizala")
	ended := exchangeWith(m, server, oauth2test.Fault{Hold: true})
	time.AfterFunc(2*time.Second, server.ClearFaults)
	v.Terminate()
	<-ended
	v.StartAgain(t)
	v.WaitActive(t)
	m.write("tenants/acme/refresh", nil).ok(t)
	require.Equal(t, "ok", m.read("tenants/acme").ok(t).text("status"))
	require.Zero(t, server.UsedTwice())
}

// A service hangs, and an exchange of each mount waits for it: to seal takes as long as with one mount.
func TestSealOfSeveralMountsTakesTheTimeOfOne(t *testing.T) {
	t.Parallel()
	v := Start(t, Raft())
	v.RegisterEngine(t)
	var readers []<-chan struct{}
	for i := range 5 {
		m, server := rotatingMount(t, v, fmt.Sprint("mount", i))
		readers = append(readers, exchangeWith(m, server, oauth2test.Fault{Hang: true}))
		t.Cleanup(server.ClearFaults)
	}
	for _, answered := range readers {
		<-answered
	}
	began := time.Now()
	v.Seal(t)
	took := time.Since(began)
	t.Logf("the seal took %s", took.Round(time.Millisecond))
	require.Less(t, took, promptly)
}

// stepDownWhileHanging is the same for a leader that steps down.
func stepDownWhileHanging(t *testing.T, c *Cluster, service *kaizalatest.Service, at func(*Vault) mount) {
	leader := c.Leader(t)
	m := at(leader).in(t)
	readers := hang(m, service, m.read("config").ok(t).text("connector_id"))
	took := stepDown(t, c)
	next := c.Leader(t)
	t.Logf("the step-down took %s", took.Round(time.Millisecond))
	require.Less(t, took, promptly)
	service.ClearFaults()
	readers.Wait()
	Eventually(t, "the next leader to serve", func() bool { return at(next).in(t).read("token/due-000").status == 200 })
	require.Equal(t, 404, at(next).in(t).read("tenants/none").status)
}

// ownTokens makes a mount with this many leases, each with its own access token, at a service that needs 2 seconds for each
// revocation until its faults are cleared.
func ownTokens(t *testing.T, v *Vault, path string, leases int) (m mount, server *oauth2test.Server, tokens []string) {
	t.Helper()
	server = newAuthServer(t)
	id, secret := server.RegisterClient(oauth2test.AuthBasic)
	v.Mount(t, path)
	m = mount{vault: v, t: t, path: path, token: v.RootToken, heard: &answers{}}
	m.write("config", fields{
		"service": "oauth2", "issuer": server.Issuer(), "connector_id": id, "connector_secret": secret,
		"revocation": "access_token", "exchange_invalidates": false, "exchanges_per_minute": 100000,
	}).ok(t)
	// The exchanges of one tenant are made one after another, and those of several tenants at the same time.
	const tenants = 10
	var readers sync.WaitGroup
	var mu sync.Mutex
	for i := range tenants {
		tenant := fmt.Sprint("t", i)
		m.write("tenants/"+tenant, fields{"refresh_token": server.Grant(id, tenant), "token_per_lease": true}).ok(t)
		readers.Go(func() {
			for range leases / tenants {
				a, err := m.send(http.MethodGet, path+"/creds/"+tenant, "", nil)
				if err != nil || a.status != 200 {
					t.Errorf("reading creds/%s: %v %d %s", tenant, err, a.status, a.body)
					return
				}
				mu.Lock()
				tokens = append(tokens, a.text("access_token"))
				mu.Unlock()
			}
		})
	}
	readers.Wait()
	require.Len(t, tokens, leases)
	server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointRevocation, Delay: 2 * time.Second})
	return m, server, tokens
}

// Each lease has its own access token, at a service that needs 2 seconds for each revocation: the disable and the move of the mount
// do not wait for the service, and neither do the readers of another mount nor a seal.
func TestMountsAreNotHeldUpByRevocations(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: 1,000 leases, each of which takes the service 2 seconds to revoke; make test runs it")
	}
	t.Parallel()
	v := Start(t, WithConfig(func(config map[string]any) { config["log_level"] = "info" }))
	v.RegisterEngine(t)
	for _, end := range []string{"disable", "move"} {
		begin := func(t *testing.T, path string) (server *oauth2test.Server, ended chan time.Duration) {
			_, server, _ = ownTokens(t, v, path, 500)
			ended = make(chan time.Duration, 1)
			go func() {
				began := time.Now()
				if end == "disable" {
					out, exit := v.CLI(t, v.RootToken, "secrets", "disable", path)
					if exit != 0 && !strings.Contains(out, "Vault is sealed") {
						t.Errorf("secrets disable: %s", out)
					}
				} else {
					// Not "vault secrets move": it asks every 10 seconds only whether the move has ended.
					if _, err := v.Client.Sys().StartRemount(path, path+"-moved"); err != nil {
						t.Errorf("secrets move: %v", err)
					}
					poll(patience, func() bool {
						mounts, err := v.Client.Sys().ListMounts()
						return err == nil && mounts[path+"-moved/"] != nil
					})
				}
				ended <- time.Since(began)
			}()
			return server, ended
		}

		t.Run(end, func(t *testing.T) {
			stop := otherMount(mount{vault: v, t: t, token: v.RootToken, heard: &answers{}})
			server, ended := begin(t, end)
			took := <-ended
			longest, failed := stop()
			t.Logf("%s took %s, another mount's longest read %s", end, took.Round(time.Millisecond), longest.Round(time.Millisecond))
			require.Less(t, took, promptly)
			require.Less(t, longest, promptly)
			require.Zero(t, failed)
			server.ClearFaults()
			requireNoIrrevocableLeases(t, v)
		})

		t.Run(end+" and seal", func(t *testing.T) {
			server, ended := begin(t, end+"-sealed")
			Eventually(t, "the first revocation", func() bool { return len(server.Calls(oauth2test.EndpointRevocation)) > 0 })
			began := time.Now()
			v.Seal(t)
			took := time.Since(began)
			v.Unseal(t)
			server.ClearFaults()
			t.Logf("the seal took %s, %s %s with the unsealing", took.Round(time.Millisecond), end, (<-ended).Round(time.Millisecond))
			require.Less(t, took, promptly)
			requireNoIrrevocableLeases(t, v)
		})
	}
}

// 2,000 leases are revoked at once, at a service that needs 2 seconds for each of their access tokens: a seal and the readers of
// another mount do not wait for that. When the service is fast again, all these tokens are revoked.
func TestThousandsOfRevocationsHoldNobodyUp(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: 2,000 leases and a seal; make test runs it")
	}
	t.Parallel()
	v := Start(t, WithConfig(func(config map[string]any) { config["log_level"] = "info" }))
	v.RegisterEngine(t)
	m, server, tokens := ownTokens(t, v, "many", 2000)
	stop := otherMount(m)
	out, exit := v.CLI(t, v.RootToken, "lease", "revoke", "-prefix", "many/creds")
	require.Zero(t, exit, out)
	Eventually(t, "revocations to be under way", func() bool { return len(server.Calls(oauth2test.EndpointRevocation)) >= 8 })
	longest, failed := stop()
	began := time.Now()
	v.Seal(t)
	took := time.Since(began)
	made := len(server.Calls(oauth2test.EndpointRevocation))
	t.Logf("the seal took %s after %d of 2,000 revocations, another mount's longest read %s", took.Round(time.Millisecond), made, longest.Round(time.Millisecond))
	require.Less(t, took, promptly)
	require.Less(t, longest, 5*time.Second)
	require.Zero(t, failed)
	require.Less(t, made, 1000, "the seal came before all revocations were made")

	server.ClearFaults()
	v.Unseal(t)
	began = time.Now()
	Eventually(t, "all tokens to be dead", func() bool { return !slices.ContainsFunc(tokens, server.Alive) })
	Eventually(t, "nothing to be pending", func() bool { return m.read("config").ok(t).data()["pending_revocations"] == nil })
	t.Logf("all tokens were revoked %s after the unsealing", time.Since(began).Round(time.Millisecond))
	require.Empty(t, m.leases())
	require.Empty(t, server.LostGrants())
	requireNoIrrevocableLeases(t, v)
}

// The revocation endpoint is down, Vault and the plugin are killed during that, and then the endpoint works again: every token is
// revoked, as fast as the connector's share permits. (A test in process has an outage of an hour.)
func TestRevocationOutageOnVault(t *testing.T) {
	t.Parallel()
	const tenants, limit = 100, 600
	v := Start(t, Raft())
	v.MountEngine(t, "outage")
	server := newAuthServer(t)
	id, secret := server.RegisterClient(oauth2test.AuthBasic)
	m := mount{vault: v, t: t, path: "outage", token: v.RootToken, heard: &answers{}}
	m.write("config", fields{
		"service": "oauth2", "issuer": server.Issuer(), "connector_id": id, "connector_secret": secret,
		"revocation": "access_token", "exchange_invalidates": false, "exchanges_per_minute": limit,
	}).ok(t)
	var tokens []string
	for i := range tenants {
		name := fmt.Sprint("t", i)
		m.write("tenants/"+name, fields{"refresh_token": server.Grant(id, name)}).ok(t)
		tokens = append(tokens, m.read("creds/"+name).ok(t).text("access_token"))
	}
	server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointRevocation, Answer: oauth2test.BadGateway})
	require.NoError(t, v.Client.Sys().RevokePrefix("outage/creds"))
	require.Empty(t, m.leases(), "no lease waits for the service")
	pending := func() int64 { return m.read("config").ok(t).number("pending_revocations") }
	require.EqualValues(t, tenants, pending())
	tried := func(since time.Time) int {
		tokens := map[string]bool{}
		for _, c := range server.Calls(oauth2test.EndpointRevocation) {
			if c.Start.After(since) {
				tokens[c.Token] = true
			}
		}
		return len(tokens)
	}
	Eventually(t, "each token to be tried", func() bool { return tried(time.Time{}) == tenants })
	status := m.read("tenants/t0").ok(t)
	require.EqualValues(t, 1, status.number("pending_revocations"))
	require.NotEmpty(t, status.text("last_revocation_error"))

	killed := time.Now()
	v.Restart(t)
	Eventually(t, "the next process to know them", func() bool { return pending() == tenants })
	Eventually(t, "tokens to be tried again", func() bool { return tried(killed) > 0 })
	for _, token := range tokens {
		require.True(t, server.Alive(token))
	}
	began, calls := time.Now(), len(server.Calls())
	server.ClearFaults()
	Eventually(t, "all tokens to be dead", func() bool { return !slices.ContainsFunc(tokens, server.Alive) })
	t.Logf("%d calls in the outage; all tokens were revoked %s after it", calls, time.Since(began).Round(time.Millisecond))
	Eventually(t, "nothing to be pending", func() bool { return m.read("config").ok(t).data()["pending_revocations"] == nil })
	require.LessOrEqual(t, server.MaxPerMinute(id), limit)
	for _, c := range server.Calls(oauth2test.EndpointRevocation) {
		require.False(t, c.Expired)
	}
	require.Empty(t, server.LostGrants())
	requireNoIrrevocableLeases(t, v)
	v.Unmount(t, "outage")
}
