package vaulttest

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/kaizala/kaizalatest"
)

// eagerKaizala replaces the refresh token of some users with each exchange, and
// not in the last tenth of its life alone: every exchange is a rotation, and the
// old token dies with it.
type eagerKaizala struct {
	*kaizalatest.Service
	connectorID string
	// late is how long the answer with the new token takes to arrive, in
	// nanoseconds, and onTheirWay how many such answers there are.
	late, onTheirWay atomic.Int64
}

func (k *eagerKaizala) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	// Whose token it is: each user has one that is alive.
	user := ""
	for i := range rotatingTenants {
		if name := rotatingTenant(i); k.CurrentRefreshToken(name) == r.Header.Get("refreshToken") {
			user = name
		}
	}
	answer := httptest.NewRecorder()
	k.Service.ServeHTTP(answer, r)
	var body map[string]any
	if user != "" && answer.Code == http.StatusOK && json.Unmarshal(answer.Body.Bytes(), &body) == nil {
		body["refreshToken"] = k.GenerateUserToken(k.connectorID, user)
		answer.Body.Reset()
		_ = json.NewEncoder(answer.Body).Encode(body)
		answer.Header().Del("Content-Length")
		k.onTheirWay.Add(1)
		time.Sleep(time.Duration(k.late.Load()))
		k.onTheirWay.Add(-1)
	}
	maps.Copy(w.Header(), answer.Header())
	w.WriteHeader(answer.Code)
	_, _ = w.Write(answer.Body.Bytes())
}

const rotatingTenants = 4

func rotatingTenant(i int) string { return fmt.Sprintf("rotating-%d", i) }

// Leaders come and go under a steady load of reads, in the middle of exchanges
// that replace refresh tokens: no tenant is lost, and no token that lasts is
// exchanged again.
//
// A SIGKILL hits while exchanges are on their way to Kaizala. What Kaizala has
// answered and nobody has stored yet is lost with the process, and with a
// service that kills the old token at once no engine could help it.
func TestFailover(t *testing.T) {
	if testing.Short() {
		t.Skip("starts three Vaults")
	}
	c := StartCluster(t, 3)
	leader := c.Leader(t)
	leader.MountEngine(t, "kaizala")

	service := kaizalatest.New()
	service.SetLimits(0, 0)
	kaizala := &eagerKaizala{Service: service}
	var secret string
	kaizala.connectorID, secret = service.RegisterConnector()
	server := httptest.NewServer(kaizala)
	stopKaizala := sync.OnceFunc(func() { service.ClearFaults(); server.CloseClientConnections(); server.Close() })
	t.Cleanup(stopKaizala)

	at := func(node *Vault) mount {
		return mount{t: t, vault: node, path: "kaizala", token: c.RootToken, heard: &answers{}}
	}
	m := at(leader)
	m.write("config", fields{"connector_id": kaizala.connectorID, "connector_secret": secret, "api_root": server.URL, "exchanges_per_minute": 100000}).ok(t)

	var lasting, rotating []string
	for i := range 4 {
		name := fmt.Sprintf("lasting-%d", i)
		lasting = append(lasting, name)
		m.write("tenants/"+name, fields{"refresh_token": service.GenerateUserToken(kaizala.connectorID, name), "ttl": "1h"}).ok(t)
	}
	tokens := map[string]string{}
	for _, name := range lasting {
		tokens[name] = m.access(name)
	}
	service.SetAccessTokenLife(8 * time.Second)
	for i := range rotatingTenants {
		name := rotatingTenant(i)
		rotating = append(rotating, name)
		m.write("tenants/"+name, fields{"refresh_token": service.GenerateUserToken(kaizala.connectorID, name)}).ok(t)
	}

	// The load: readers at every node, who take what a failover does to them and
	// try again.
	var served, failed atomic.Int64
	var why sync.Map // the last answer of each status that failed
	stop := make(chan struct{})
	var load sync.WaitGroup
	endLoad := sync.OnceFunc(func() { close(stop); load.Wait() })
	t.Cleanup(endLoad)
	all := append(append([]string{}, lasting...), rotating...)
	for reader := range 6 {
		load.Go(func() {
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
				name := all[i%len(all)]
				a, err := at(c.Nodes[reader%len(c.Nodes)]).send(http.MethodGet, path+name, "", nil)
				if err != nil || a.status != 200 {
					failed.Add(1)
					why.Store(fmt.Sprint(a.status), a.body)
					if strings.Contains(a.body, "refuse") {
						t.Errorf("%s: Kaizala should refuse nobody: %s", name, a.body)
					}
					time.Sleep(200 * time.Millisecond) // as a client that tries again would
					continue
				}
				served.Add(1)
				if want := tokens[name]; want != "" && a.text("access_token") != want {
					t.Errorf("%s was handed another token though its own lasts", name)
				}
			}
		})
	}
	serving := func() {
		t.Helper()
		before := served.Load()
		Eventually(t, "reads to be served", func() bool { return served.Load() > before+20 })
	}
	serving()

	// Step-down, twice, with new refresh tokens on their way: they are stored
	// before the leader goes.
	kaizala.late.Store(int64(1500 * time.Millisecond))
	for range 2 {
		Eventually(t, "a new refresh token to be on its way", func() bool { return kaizala.onTheirWay.Load() > 0 })
		took := stepDown(t, c)
		t.Logf("stepped down in %s", took.Round(time.Millisecond))
		serving()
	}
	kaizala.late.Store(0)

	// inFlight waits for exchanges that have just left and of which none has been
	// carried out lately: each takes delay to arrive.
	const delay = 1500 * time.Millisecond
	service.Inject(kaizalatest.Fault{Delay: delay})
	inFlight := func() {
		t.Helper()
		Eventually(t, "exchanges to be on their way and nowhere else", func() bool {
			now, waiting := time.Now(), 0
			for _, call := range service.Calls() {
				switch {
				case call.End.IsZero() && now.Sub(call.Start) < delay/2:
					waiting++
				case call.End.IsZero() || now.Sub(call.End) < 300*time.Millisecond:
					return false
				}
			}
			return waiting > 0 && kaizala.onTheirWay.Load() == 0
		})
	}

	// SIGKILL, twice.
	for range 2 {
		leader := c.Leader(t)
		inFlight()
		c.Kill(leader)
		began := time.Now()
		next := c.WaitForLeader(t)
		Eventually(t, "the next leader to serve", func() bool { return at(next).read("token/"+lasting[0]).status == 200 })
		t.Logf("killed: the next leader served after %s", time.Since(began).Round(time.Millisecond))
		serving()
		c.RestartNode(t, leader)
	}
	endLoad()
	t.Logf("%d reads were served and %d failed; %d exchanges", served.Load(), failed.Load(), service.TotalExchanges())
	why.Range(func(status, body any) bool { t.Logf("among those that failed: %s %s", status, body); return true })
	service.ClearFaults()
	service.SetAccessTokenLife(time.Hour)
	m = at(c.Leader(t))

	for _, name := range lasting {
		require.Equal(t, tokens[name], m.access(name))
		require.Equal(t, 1, service.Exchanges(name), "%s lasts", name)
	}
	for _, name := range rotating {
		require.Greater(t, service.Exchanges(name), 3)
		require.True(t, service.AccessTokenAlive(m.access(name)))
		status := m.read("tenants/" + name).ok(t)
		require.Equal(t, "ok", status.text("status"), "%s", status.body)
		require.Equal(t, "service", status.text("refresh_token_origin"))
		// What Vault has stored is what Kaizala has issued last. (The first of the
		// two may have had an exchange without a reader beside it.)
		m.write("tenants/"+name+"/refresh", nil).ok(t)
		current := service.CurrentRefreshToken(name)
		m.write("tenants/"+name+"/refresh", nil).ok(t)
		used := ""
		for _, call := range service.Calls() {
			if call.User == name {
				used = call.RefreshToken
			}
		}
		require.Equal(t, current, used)
	}

	t.Run("nobody hangs", func(t *testing.T) { stepDownWhileHanging(t, c, service, at) })

	// With Kaizala gone, all that is left can be taken away.
	service.ClearFaults()
	stopKaizala()
	leader = c.Leader(t)
	m = at(leader)
	require.NotEmpty(t, m.leases())
	out, exit := leader.CLI(t, c.RootToken, "lease", "revoke", "-prefix", "-sync", "kaizala/creds")
	require.Zero(t, exit, out)
	require.Empty(t, m.leases())
	requireNoIrrevocableLeases(t, leader)
	require.NoError(t, leader.Client.Sys().Unmount("kaizala"))
}

// stepDown makes the leader step down and says how long that took. Vault may
// answer that it will and not do it, some seconds after an election: then it is
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
