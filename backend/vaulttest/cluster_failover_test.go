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
)

// The leader changes several times under a steady load of reads, in the middle of
// exchanges and of rotations, which are exchanges that bring a new refresh token: no
// tenant is lost, and no tenant with a usable access token is exchanged again.
//
// One case is not tested, because no engine could prevent it: a SIGKILL between
// Kaizala's rotation and Vault's write of the new refresh token, if Kaizala ends the
// old one at once. The only valid refresh token is lost with the process.
func TestFailover(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: three Vaults; make test runs it")
	}
	t.Parallel()
	f := startFailover(t)
	service, c := f.kaizala.Service, f.cluster

	var lasting, brief []string
	tokens := map[string]string{}
	m := f.leader(t)
	for i := range 4 {
		name := fmt.Sprintf("lasting-%d", i)
		lasting = append(lasting, name)
		m.write("tenants/"+name, fields{"refresh_token": service.GenerateUserToken(f.connectorID, name), "ttl": "1h"}).ok(t)
		tokens[name] = m.access(name)
	}
	// An emulator with short access tokens causes exchanges all the time.
	short := kaizalatest.NewServer()
	t.Cleanup(short.Close)
	short.SetAccessTokenLife(8 * time.Second)
	shortID := f.connect(t, "config/short", short)
	for i := range 4 {
		name := fmt.Sprintf("brief-%d", i)
		brief = append(brief, name)
		m.write("tenants/"+name, fields{"refresh_token": short.GenerateUserToken(shortID, name), "connector": "short"}).ok(t)
	}
	serving, endLoad := f.load(t, append(append([]string{}, lasting...), brief...), tokens)
	serving(t)

	// part ends the whole test if the part fails: later parts need a complete cluster.
	part := func(name string, run func(t *testing.T)) {
		if !t.Run(name, run) {
			t.FailNow()
		}
	}
	for i := range 2 {
		part(fmt.Sprintf("step-down %d: answers are on their way back", i+1), func(t *testing.T) {
			service.SetOldTokenDies(true)
			names := f.rotate(t, fmt.Sprintf("stepped-%d", i+1), 24, 24)
			// Kaizala answers after Vault has told the engine to stop: no request is
			// running then.
			leader := c.Leader(t)
			stops := func() int { return strings.Count(leader.Logs(), "cleanup: transport=gRPC status=started") }
			before := stops()
			var answering sync.WaitGroup
			answering.Go(func() {
				if !poll(patience, func() bool { return stops() > before }) {
					t.Error("Vault does not stop the engine")
				}
				if processed, _ := underWay(service, names); processed != len(names) {
					t.Errorf("%d of %d exchanges were under way", processed, len(names))
				}
				service.ClearFaults()
			})
			defer answering.Wait() // also if stepDown fails
			took := stepDown(t, c)
			answering.Wait()
			t.Logf("stepped down in %s", took.Round(time.Millisecond))
			f.kept(t, names...)
			serving(t)
		})
	}

	// kill ends the leader in the middle of the rotations that rotate has begun, and of
	// two exchanges that readers wait for.
	kill := func(t *testing.T, label string, n, held int) {
		t.Helper()
		leader := c.Leader(t)
		short.Inject(kaizalatest.Fault{User: brief[0], Hang: true})
		short.Inject(kaizalatest.Fault{User: brief[1], Hold: true})
		Eventually(t, "exchanges without a rotation to be on their way", func() bool {
			processed, coming := underWay(short.Service, brief[:2])
			return processed == 1 && coming == 1
		})
		names := f.rotate(t, label, n, held)
		for _, name := range names[:held] {
			f.rotations[name]++ // the answer is lost with the leader
		}
		c.Kill(leader)
		began := time.Now()
		service.ClearFaults()
		short.ClearFaults()
		next := c.WaitForLeader(t)
		Eventually(t, "the next leader to serve", func() bool { return f.at(next).in(t).read("token/"+lasting[0]).status == 200 })
		t.Logf("the next leader served after %s", time.Since(began).Round(time.Millisecond))
		f.kept(t, names...)
		serving(t)
		c.RestartNode(t, leader)
	}
	part("SIGKILL: rotations are on their way there and back, the old token lives on", func(t *testing.T) {
		service.SetOldTokenDies(false)
		kill(t, "killed-alive", 32, 16)
	})
	part("SIGKILL: rotations are on their way there, the old token dies", func(t *testing.T) {
		service.SetOldTokenDies(true)
		kill(t, "killed-dead", 24, 0)
	})
	Eventually(t, "access tokens to have been renewed all along", func() bool {
		return !slices.ContainsFunc(brief, func(name string) bool { return short.Exchanges(name) <= 3 })
	})
	endLoad(t)
	t.Logf("%d exchanges", service.TotalExchanges()+short.TotalExchanges())

	m = f.leader(t)
	for _, name := range lasting {
		require.Equal(t, tokens[name], m.access(name))
		require.Equal(t, 1, service.Exchanges(name), "%s lasts", name)
	}
	for _, name := range brief {
		status := m.read("tenants/" + name).ok(t)
		require.Equal(t, "ok", status.text("status"), "%s", status.body)
	}

	part("nobody hangs", func(t *testing.T) { stepDownWhileHanging(t, c, service, f.at) })

	// The refresh tokens of the rotations are stored after all later failovers: they
	// are those that Kaizala has issued last, and no tenant was exchanged again.
	m = f.leader(t)
	service.SetAccessTokenLife(time.Hour)
	for name := range f.rotations {
		f.kept(t, name)
		current := service.CurrentRefreshToken(name)
		m.write("tenants/"+name+"/refresh", nil).ok(t)
		used := ""
		for _, call := range service.Calls() {
			if call.User == name {
				used = call.RefreshToken
			}
		}
		require.Equal(t, current, used, "%s", name)
		require.True(t, service.AccessTokenAlive(m.access(name)))
	}

	// Without Kaizala, all that is left can be deleted.
	f.kaizala.Close()
	require.NotEmpty(t, m.leases())
	out, exit := m.vault.CLI(t, c.RootToken, "lease", "revoke", "-prefix", "-sync", "kaizala/creds")
	require.Zero(t, exit, out)
	require.Empty(t, m.leases())
	requireNoIrrevocableLeases(t, m.vault)
	require.NoError(t, m.vault.Client.Sys().Unmount("kaizala"))
}

// failover is the engine on a cluster of three, with its own emulator of Kaizala.
type failover struct {
	cluster     *Cluster
	kaizala     *kaizalatest.Server
	connectorID string
	// rotations is the number of exchanges that each tenant of rotate must have: one,
	// and one more if its answer was lost with the leader. All of them are rotations.
	rotations map[string]int
}

func startFailover(t *testing.T) *failover {
	t.Helper()
	f := &failover{cluster: StartCluster(t, 3), kaizala: kaizalatest.NewServer(), rotations: map[string]int{}}
	t.Cleanup(f.kaizala.Close)
	m := f.leader(t)
	m.vault.MountEngine(t, m.path)
	f.connectorID = f.connect(t, "config", f.kaizala)
	return f
}

// connect writes a connector of this emulator, which has no limits then.
func (f *failover) connect(t *testing.T, config string, kaizala *kaizalatest.Server) (connectorID string) {
	t.Helper()
	kaizala.SetLimits(0, 0)
	connectorID, secret := kaizala.RegisterConnector()
	f.leader(t).write(config, fields{"connector_id": connectorID, "connector_secret": secret, "api_root": kaizala.URL, "exchanges_per_minute": 100000}).ok(t)
	return connectorID
}

// at is the mount on one of the nodes.
func (f *failover) at(node *Vault) mount {
	return mount{vault: node, path: "kaizala", token: f.cluster.RootToken, heard: &answers{}}
}

func (f *failover) leader(t *testing.T) mount {
	t.Helper()
	return f.at(f.cluster.Leader(t)).in(t)
}

// rotate writes n tenants whose refresh tokens are past 90 % of their lives, so that
// the engine exchanges each at once, and returns when all of these exchanges are under
// way. Kaizala has processed the first held of them, and holds its answers back; the
// others hang before it processes them. ClearFaults ends both.
func (f *failover) rotate(t *testing.T, label string, n, held int) (names []string) {
	t.Helper()
	f.kaizala.SetRefreshTokenAge(330 * 24 * time.Hour)
	m := f.leader(t)
	for i := range n {
		name := fmt.Sprintf("%s-%02d", label, i)
		names = append(names, name)
		hold := i < held
		f.kaizala.Inject(kaizalatest.Fault{User: name, Hold: hold, Hang: !hold})
		m.write("tenants/"+name, fields{"refresh_token": f.kaizala.GenerateUserToken(f.connectorID, name), "verify": false}).ok(t)
	}
	Eventually(t, fmt.Sprintf("%d rotations to be on their way to Kaizala, and %d on their way back", n-held, held), func() bool {
		processed, coming := underWay(f.kaizala.Service, names)
		return processed == held && coming == n-held
	})
	f.kaizala.SetRefreshTokenAge(0)
	for _, name := range names {
		f.rotations[name] = 1
	}
	return names
}

// underWay counts the exchanges of these tenants that Kaizala has processed and
// not answered yet, and those that it has not processed.
func underWay(service *kaizalatest.Service, names []string) (processed, coming int) {
	for _, call := range service.Calls() {
		switch {
		case !call.End.IsZero() || !slices.Contains(names, call.User):
		case call.AccessToken != "":
			processed++
		default:
			coming++
		}
	}
	return processed, coming
}

// kept requires that the tenants whose rotations were interrupted can be read, with the
// status ok, after no more exchanges than necessary. It causes no exchange itself,
// which would store what must be stored already.
func (f *failover) kept(t *testing.T, names ...string) {
	t.Helper()
	m := f.leader(t)
	for _, name := range names {
		Eventually(t, name+" to be read", func() bool {
			a := m.read("token/" + name)
			require.NotContains(t, a.body, "refuse")
			return a.status == 200
		})
		status := m.read("tenants/" + name).ok(t)
		require.Equal(t, "ok", status.text("status"), "%s", status.body)
		require.Equal(t, "service", status.text("refresh_token_origin"), "%s", status.body)
		require.True(t, f.kaizala.RefreshTokenAlive(f.kaizala.CurrentRefreshToken(name)))
		require.Equal(t, f.rotations[name], f.kaizala.Exchanges(name), "%s", name)
		for _, call := range f.kaizala.Calls() {
			require.True(t, call.User != name || call.AccessToken == "" || call.Rotated, "an exchange of %s that is no rotation", name)
		}
	}
}

// load starts readers at every node, who try again after the errors of a failover.
// serving waits until they are all served. A reader of a tenant in tokens must get the
// access token there.
func (f *failover) load(t *testing.T, names []string, tokens map[string]string) (serving, end func(t *testing.T)) {
	var served, failed atomic.Int64
	var why sync.Map // the last answer of each status that failed
	stop := make(chan struct{})
	var readers sync.WaitGroup
	stopAll := sync.OnceFunc(func() { close(stop); readers.Wait() })
	t.Cleanup(stopAll)
	for reader := range 6 {
		m := f.at(f.cluster.Nodes[reader%len(f.cluster.Nodes)])
		readers.Go(func() {
			for i := reader; ; i++ {
				select {
				case <-stop:
					return
				case <-time.After(50 * time.Millisecond):
				}
				path := "kaizala/token/"
				if i%4 == 0 {
					path = "kaizala/creds/"
				}
				name := names[i%len(names)]
				a, err := m.send(http.MethodGet, path+name, "", nil)
				if err != nil || a.status != 200 {
					failed.Add(1)
					why.Store(fmt.Sprint(a.status), a.body)
					if strings.Contains(a.body, "refuse") {
						t.Errorf("%s: Kaizala should refuse no request: %s", name, a.body)
					}
					time.Sleep(200 * time.Millisecond) // as a client that tries again would
					continue
				}
				served.Add(1)
				if want := tokens[name]; want != "" && a.text("access_token") != want {
					t.Errorf("%s got another access token although its older one is valid", name)
				}
			}
		})
	}
	serving = func(t *testing.T) {
		t.Helper()
		before := served.Load()
		Eventually(t, "reads to be served", func() bool { return served.Load() > before+20 })
	}
	end = func(t *testing.T) {
		stopAll()
		t.Logf("%d reads were served and %d failed", served.Load(), failed.Load())
		why.Range(func(status, body any) bool { t.Logf("among those that failed: %s %s", status, body); return true })
	}
	return serving, end
}

// stepDown makes the leader step down and returns how long that took. In the first
// seconds after an election Vault may accept the request and not step down: then it is
// asked again.
func stepDown(t *testing.T, c *Cluster) (took time.Duration) {
	t.Helper()
	leader := c.Leader(t)
	var asked time.Time
	Eventually(t, leader.Addr+" to step down", func() bool {
		if !leader.Active() {
			return true
		}
		if time.Since(asked) > promptly {
			if !asked.IsZero() {
				t.Log("asked again to step down")
			}
			asked = time.Now()
			require.NoError(t, leader.Client.Sys().StepDown())
		}
		return false
	})
	took = time.Since(asked)
	c.WaitForLeader(t)
	return took
}
