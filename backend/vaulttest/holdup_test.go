package vaulttest

import (
	"fmt"
	"net/http"
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
	// promptly is what seal, step-down and reload have: 10 seconds for a reader, 5
	// for the engine to stop, and some for Vault.
	promptly = 20 * time.Second
)

// hang lets Kaizala hang, writes tenants whose refresh tokens are past 90 % of
// their lives, so that they are due, and returns once hundreds of exchanges that
// nobody asked for hang there, and so do readers.
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

// otherMount reads another mount over and over. Its stop says how long the
// longest read took, and how many did not succeed.
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

// A hanging Kaizala, with hundreds of tenants due and readers waiting, holds up
// neither a reload nor a seal, nor anybody else's mount.
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
		require.Less(t, time.Since(began), promptly, "a reader has an answer within 10 seconds")
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
		// Nothing was lost by it.
		Eventually(t, "the engine to serve again", func() bool { return m.read("token/due-000").status == 200 })
	})
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

// Leases with access tokens of their own, at a service that takes 2 seconds for each revocation, hold up neither the end nor
// the move of their mount, and nobody else meanwhile.
func TestMountsAreNotHeldUpByRevocations(t *testing.T) {
	if testing.Short() {
		t.Skip("reads 1,000 leases")
	}
	const leases = 500
	v := Start(t)
	v.RegisterEngine(t)
	server := newAuthServer(t)
	id, secret := server.RegisterClient(oauth2test.AuthBasic)
	mounted := func(t *testing.T, path string) mount {
		v.Mount(t, path)
		m := mount{vault: v, t: t, path: path, token: v.RootToken, heard: &answers{}}
		m.write("config", fields{
			"service": "oauth2", "issuer": server.Issuer(), "connector_id": id, "connector_secret": secret,
			"revocation": "access_token", "exchange_invalidates": false, "exchanges_per_minute": 100000,
		}).ok(t)
		m.write("tenants/acme", fields{"refresh_token": server.Grant(id, path), "token_per_lease": true}).ok(t)
		for range leases {
			m.read("creds/acme").ok(t)
		}
		return m
	}
	for name, end := range map[string]func(path string) []string{
		"disable": func(path string) []string { return []string{"secrets", "disable", path} },
		"move":    func(path string) []string { return []string{"secrets", "move", path, path + "-moved"} },
	} {
		t.Run(name, func(t *testing.T) {
			m := mounted(t, name)
			server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointRevocation, Delay: 2 * time.Second})
			defer server.ClearFaults()
			stop := otherMount(m)
			began := time.Now()
			out, exit := v.CLI(t, v.RootToken, end(name)...)
			require.Zero(t, exit, out)
			if name == "move" { // goes on behind the answer
				Eventually(t, "the mount to have moved", func() bool {
					mounts, err := v.Client.Sys().ListMounts()
					return err == nil && mounts["move-moved/"] != nil
				})
			}
			took := time.Since(began)
			longest, failed := stop()
			t.Logf("%s took %s, another mount's longest read %s", name, took.Round(time.Millisecond), longest.Round(time.Millisecond))
			require.Less(t, took, promptly)
			require.Less(t, longest, promptly)
			require.Zero(t, failed)
		})
	}
	requireNoIrrevocableLeases(t, v)
}
