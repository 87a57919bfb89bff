package vaulttest

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/go-cleanhttp"
	"github.com/hashicorp/vault/api"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/kaizala/kaizalatest"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// The benchmarks here compare the engine with the floor: see floor/main.go. They make
// a fixed number of rounds, so run them with -benchtime=1x. scripts/bench.sh makes a
// table of their results.

const (
	connections  = 32
	warmUpRounds = 60
	blocks       = 20 // the rounds are divided into so many blocks, to measure the spread
)

// benchRounds is how many rounds of reads each side gets.
func benchRounds(b *testing.B) int {
	text := os.Getenv("KAIZALA_BENCH_ROUNDS")
	if text == "" {
		return 1000
	}
	n, err := strconv.Atoi(text)
	require.NoError(b, err, "KAIZALA_BENCH_ROUNDS")
	require.GreaterOrEqual(b, n, blocks, "KAIZALA_BENCH_ROUNDS")
	return n
}

// A side is one of the plugins that are compared: get reads it once.
type side struct {
	get    func() error
	rounds []time.Duration
}

// measure reads the sides in turn: in each round every connection reads one side once,
// and when all have their answers, the next side. So other work of the machine affects
// all sides alike. The order changes from round to round.
func measure(b *testing.B, rounds int, sides ...*side) {
	b.Helper()
	orders := permutations(len(sides))
	for i := -warmUpRounds; i < rounds; i++ {
		for _, n := range orders[(i+warmUpRounds)%len(orders)] {
			took := sides[n].round(b)
			if i >= 0 {
				sides[n].rounds = append(sides[n].rounds, took)
			}
		}
	}
}

func (s *side) round(b *testing.B) time.Duration {
	var failed error
	var once sync.Once
	var readers sync.WaitGroup
	begun := time.Now()
	for range connections {
		readers.Go(func() {
			if err := s.get(); err != nil {
				once.Do(func() { failed = err })
			}
		})
	}
	readers.Wait()
	took := time.Since(begun)
	require.NoError(b, failed)
	return took
}

func permutations(n int) (all [][]int) {
	if n == 0 {
		return [][]int{nil}
	}
	for _, shorter := range permutations(n - 1) {
		for at := range n {
			all = append(all, append(append(append([]int{}, shorter[:at]...), n-1), shorter[at:]...))
		}
	}
	return all
}

func total(rounds []time.Duration) (sum time.Duration) {
	for _, took := range rounds {
		sum += took
	}
	return sum
}

func median(rounds []time.Duration) time.Duration {
	sorted := slices.Sorted(slices.Values(rounds))
	return sorted[len(sorted)/2]
}

// block is the n-th of the blocks that the rounds are divided into.
func (s *side) block(n int) []time.Duration {
	return s.rounds[n*len(s.rounds)/blocks : (n+1)*len(s.rounds)/blocks]
}

// speed is the ratio of the total times of other and s, and half the width of its 95 %
// confidence interval over the blocks.
func (s *side) speed(other *side) (ratio, plusMinus float64) {
	ratio = float64(total(other.rounds)) / float64(total(s.rounds))
	var squares float64
	for i := range blocks {
		d := float64(total(other.block(i)))/float64(total(s.block(i))) - ratio
		squares += d * d
	}
	const t95 = 2.093 // Student's t for 19 degrees of freedom
	return ratio, t95 * math.Sqrt(squares/(blocks-1)/blocks)
}

func (s *side) perSecond(rounds []time.Duration) float64 {
	return float64(connections*len(rounds)) / total(rounds).Seconds()
}

// extremes are the slowest and the fastest of the blocks.
func (s *side) extremes() (slowest, fastest float64) {
	slowest = math.Inf(1)
	for i := range blocks {
		slowest, fastest = min(slowest, s.perSecond(s.block(i))), max(fastest, s.perSecond(s.block(i)))
	}
	return slowest, fastest
}

// report compares the engine with the floor, and the floor with itself.
func report(b *testing.B, rounds int, engine, floor, again func() error) {
	ours, base, twin := &side{get: engine}, &side{get: floor}, &side{get: again}
	measure(b, rounds, ours, base, twin)
	ratio, ratioSpread := ours.speed(base)
	noise, noiseSpread := twin.speed(base)
	slowest, fastest := ours.extremes()
	for _, metric := range []struct {
		value float64
		unit  string
	}{
		{ours.perSecond(ours.rounds), "reads/s"},
		{slowest, "slowest-reads/s"},
		{fastest, "fastest-reads/s"},
		{base.perSecond(base.rounds), "floor-reads/s"},
		{ratio, "ratio"},
		{ratioSpread, "±ratio"},
		{noise, "noise"},
		{noiseSpread, "±noise"},
		{float64(median(base.rounds)) / float64(median(ours.rounds)), "median-ratio"},
		{float64(median(base.rounds)) / float64(median(twin.rounds)), "median-noise"},
		{0, "ns/op"}, // has no meaning here: 0 leaves it out
	} {
		b.ReportMetric(metric.value, metric.unit)
	}
}

// reportAlone measures an operation without a floor.
func reportAlone(b *testing.B, rounds int, get func() error) {
	ours := &side{get: get}
	measure(b, rounds, ours)
	slowest, fastest := ours.extremes()
	b.ReportMetric(ours.perSecond(ours.rounds), "reads/s")
	b.ReportMetric(slowest, "slowest-reads/s")
	b.ReportMetric(fastest, "fastest-reads/s")
	b.ReportMetric(0, "ns/op")
}

// buildFloor builds the floor from this tree, in the way the engine is built.
func buildFloor(b *testing.B) string {
	b.Helper()
	root, err := Root()
	require.NoError(b, err)
	path := filepath.Join(b.TempDir(), "floor")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", path, "./backend/vaulttest/floor")
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := cmd.CombinedOutput()
	require.NoError(b, err, "%s", out)
	return path
}

// settings are the configuration and the tenant acme of an engine whose Kaizala is
// an emulator on loopback.
func settings(b *testing.B) (config, tenant map[string]any) {
	b.Helper()
	kaizala := kaizalatest.NewServer()
	b.Cleanup(kaizala.Close)
	id, secret := kaizala.RegisterConnector()
	return map[string]any{"connector_id": id, "connector_secret": secret, "api_root": kaizala.URL},
		map[string]any{"refresh_token": kaizala.GenerateUserToken(id, "asha")}
}

// oauthSettings are the configuration of an authorization server on loopback, whose access tokens can be revoked, and a way
// to get a refresh token for a tenant. The connector's share is so large that no call waits for it.
func oauthSettings(b *testing.B) (config map[string]any, grant func(user string) string) {
	b.Helper()
	server := oauth2test.New()
	server.Set(oauth2test.ClassA)
	b.Cleanup(server.Listen())
	id, secret := server.RegisterClient(oauth2test.AuthBasic)
	return map[string]any{
		"service": "oauth2", "token_url": server.TokenURL(), "revocation_url": server.RevocationURL(),
		"connector_id": id, "connector_secret": secret, "exchange_invalidates": false,
		"exchanges_per_minute": 10_000_000,
	}, func(user string) string { return server.Grant(id, user) }
}

func request(b testing.TB, mount logical.Backend, op logical.Operation, path string, data map[string]any) *logical.Response {
	b.Helper()
	resp, err := mount.HandleRequest(context.Background(), &logical.Request{Operation: op, Path: path, Data: data})
	require.NoError(b, err)
	require.False(b, resp.IsError(), "%s: %v", path, resp)
	return resp
}

// startEngine starts the engine over go-plugin, with the tenants acme, of Kaizala, and oauth.
func startEngine(b *testing.B, p *Plugin, storage logical.Storage) logical.Backend {
	b.Helper()
	config, tenant := settings(b)
	mount := p.Mount(b, storage, logical.TestSystemView())
	request(b, mount, logical.CreateOperation, "config", config)
	request(b, mount, logical.CreateOperation, "tenants/acme", tenant)
	config, grant := oauthSettings(b)
	request(b, mount, logical.CreateOperation, "config/oauth", config)
	request(b, mount, logical.CreateOperation, "tenants/oauth", map[string]any{"connector": "oauth", "refresh_token": grant("oauth")})
	return mount
}

// constants are the engine's answers in the form that the floor gets them.
func constants(b *testing.B, engine logical.Backend) map[string]string {
	b.Helper()
	answers := map[string]string{}
	for _, path := range []string{"creds/acme", "token/acme", "creds/oauth", "token/oauth"} {
		text, err := json.Marshal(request(b, engine, logical.ReadOperation, path, nil))
		require.NoError(b, err)
		answers[path] = string(text)
	}
	return answers
}

// BenchmarkGoPlugin measures the plugin's process without a Vault.
func BenchmarkGoPlugin(b *testing.B) {
	engine := startEngine(b, StartPlugin(b, PluginBinary(b), nil), &logical.InmemStorage{})
	binary := buildFloor(b)
	var floors [2]logical.Backend
	for i := range floors {
		floors[i] = Dispense(b, binary, &logical.InmemStorage{}, logical.TestSystemView())
		for path, answer := range constants(b, engine) {
			request(b, floors[i], logical.UpdateOperation, path, map[string]any{"response": answer})
		}
	}
	for _, path := range []string{"creds/acme", "token/acme"} {
		name, _, _ := strings.Cut(path, "/")
		b.Run(name, func(b *testing.B) {
			reader := func(mount logical.Backend) func() error {
				return func() error {
					resp, err := mount.HandleRequest(context.Background(), &logical.Request{Operation: logical.ReadOperation, Path: path})
					if err == nil && len(resp.Data) == 0 {
						err = fmt.Errorf("no secret: %v", resp)
					}
					return err
				}
			}
			report(b, benchRounds(b), reader(engine), reader(floors[0]), reader(floors[1]))
		})
	}
}

// BenchmarkGoPluginIndex starts a mount of 100,000 tenants, and measures how long its
// index takes across the process boundary, and how much memory the process gets.
func BenchmarkGoPluginIndex(b *testing.B) {
	const tenants = 100_000
	ctx := context.Background()
	storage := &countingStorage{InmemStorage: &logical.InmemStorage{}}
	p := StartPlugin(b, PluginBinary(b), nil)
	engine := startEngine(b, p, storage)
	entry, err := storage.Get(ctx, "tenants/acme")
	require.NoError(b, err)
	engine.Cleanup(ctx)
	for i := range tenants - 2 { // the other two are acme and oauth
		entry.Key = fmt.Sprintf("tenants/tenant-%06d", i)
		require.NoError(b, storage.Put(ctx, entry))
	}
	before := residentBytes(b, p)
	storage.gets.Store(0)
	begun := time.Now()
	engine = p.Mount(b, storage, logical.TestSystemView())
	request(b, engine, logical.ReadOperation, "creds/acme", nil)
	b.ReportMetric(time.Since(begun).Seconds()*1000, "ms/first-read")
	Eventually(b, "the index to be complete", func() bool { return storage.gets.Load() >= tenants })
	b.ReportMetric(time.Since(begun).Seconds(), "s/index")
	b.ReportMetric(float64(residentBytes(b, p)-before)/(1<<20), "MiB/index")
	begun = time.Now()
	resp := request(b, engine, logical.ListOperation, "tenants/", nil)
	b.ReportMetric(time.Since(begun).Seconds(), "s/list")
	b.ReportMetric(float64(residentBytes(b, p)-before)/(1<<20), "MiB/list")
	require.Len(b, resp.Data["key_info"], tenants)
	b.ReportMetric(0, "ns/op")
}

type countingStorage struct {
	*logical.InmemStorage
	gets atomic.Int64
}

func (s *countingStorage) Get(ctx context.Context, key string) (*logical.StorageEntry, error) {
	defer s.gets.Add(1)
	return s.InmemStorage.Get(ctx, key)
}

// residentBytes is the resident memory of the plugin's process, with the memory that
// its garbage collector has not returned.
func residentBytes(b *testing.B, p *Plugin) int64 {
	b.Helper()
	statm, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", p.client.ReattachConfig().Pid))
	if err != nil {
		b.Skip("no /proc here")
	}
	pages, err := strconv.ParseInt(strings.Fields(string(statm))[1], 10, 64)
	require.NoError(b, err)
	return pages * int64(os.Getpagesize())
}

// BenchmarkVault measures a whole request: HTTP, Vault with its leases, go-plugin.
func BenchmarkVault(b *testing.B) {
	answers := constants(b, startEngine(b, StartPlugin(b, PluginBinary(b), nil), &logical.InmemStorage{}))
	floor := buildFloor(b)
	for _, storage := range []string{"inmem", "raft"} {
		b.Run(storage, func(b *testing.B) {
			option := map[string]Option{"inmem": InMem(), "raft": Raft()}[storage]
			v := Start(b, option, WithConfig(func(config map[string]any) { config["log_level"] = "warn" }))
			v.MountEngine(b, "kaizala")
			config, tenant := settings(b)
			write := func(path string, data map[string]any) {
				_, err := v.Client.Logical().Write(path, data)
				require.NoError(b, err)
			}
			write("kaizala/config", config)
			write("kaizala/tenants/acme", tenant)
			// Two plugin names run in two processes, and the engine in a third. Vault has
			// the names in its answers, so they are as long as the engine's.
			for _, mount := range []string{"floor-a", "floor-b"} {
				plugin := "vault-plugin-secrets-" + mount
				v.RegisterAs(b, plugin, "v0.0.1", floor)
				require.NoError(b, v.Client.Sys().Mount(mount, &api.MountInput{Type: plugin}))
				for path, answer := range answers {
					write(mount+"/"+path, map[string]any{"response": answer})
				}
			}
			transport := cleanhttp.DefaultPooledTransport()
			transport.Proxy = nil
			transport.MaxIdleConnsPerHost, transport.MaxConnsPerHost = connections, connections
			b.Cleanup(transport.CloseIdleConnections)
			config, grant := oauthSettings(b)
			write("kaizala/config/oauth", config)
			config["revocation"] = "access_token"
			write("kaizala/config/revoking", config)
			write("kaizala/tenants/oauth", map[string]any{"connector": "oauth", "refresh_token": grant("oauth")})
			get := func(path string) func() error { return v.requester(b, transport, http.MethodGet, path, "") }
			for _, path := range []string{"token/acme", "creds/acme", "token/oauth", "creds/oauth"} {
				name, tenant, _ := strings.Cut(path, "/")
				if tenant == "oauth" {
					name = tenant + "-" + name
				}
				b.Run(name, func(b *testing.B) {
					report(b, benchRounds(b), get("kaizala/"+path), get("floor-a/"+path), get("floor-b/"+path))
				})
			}
			for i := range connections {
				write(fmt.Sprintf("kaizala/tenants/x%d", i), map[string]any{"connector": "oauth", "refresh_token": grant(fmt.Sprintf("x%d", i))})
				write(fmt.Sprintf("kaizala/tenants/own%d", i), map[string]any{"connector": "revoking", "refresh_token": grant(fmt.Sprintf("own%d", i)), "token_per_lease": true})
			}
			// Each connection has its own tenant, or its own secret.
			each := func(method, path, body string) func() error {
				return spread(func(i int) func() error { return v.requester(b, transport, method, path+strconv.Itoa(i), body) })
			}
			// A write takes as long as some hundred reads.
			rounds := max(benchRounds(b)/10, blocks)
			b.Run("exchange", func(b *testing.B) {
				for _, mount := range []string{"kv-a", "kv-b"} {
					require.NoError(b, v.Client.Sys().Mount(mount, &api.MountInput{Type: "kv", Options: map[string]string{"version": "1"}}))
				}
				secret := fmt.Sprintf(`{"refresh_token": %q}`, strings.Repeat("x", 1000))
				exchange := spread(func(i int) func() error {
					return v.requester(b, transport, http.MethodPut, fmt.Sprintf("kaizala/tenants/x%d/refresh", i), "")
				})
				report(b, rounds, exchange, each(http.MethodPut, "kv-a/", secret), each(http.MethodPut, "kv-b/", secret))
			})
			b.Run("token-per-lease", func(b *testing.B) {
				reportAlone(b, rounds, each(http.MethodGet, "kaizala/creds/own", ""))
			})
			b.Run("flooded", func(b *testing.B) {
				reportFlooded(b, get("kaizala/token/acme"), v.unknownState(b, transport), get("floor-a/token/acme"))
			})
		})
	}
}

// flood is how many requests a second an outsider makes.
const flood = 1000

// reportFlooded measures how long one reader waits: without other requests, while an outsider makes [flood] requests a second at
// the callback, and, for comparison, while readers of the floor make as many. The three are measured in turn.
func reportFlooded(b *testing.B, read, outsider, floor func() error) {
	const turns, turn = 5, 500 * time.Millisecond
	waits := make([][]time.Duration, 3)
	var sent atomic.Int64
	for i := range 3 * turns {
		side := i % 3
		stop := make(chan struct{})
		var others sync.WaitGroup
		if request := []func() error{nil, outsider, floor}[side]; request != nil {
			for range connections - 1 { // the reader has the last one
				others.Go(func() {
					tick := time.NewTicker((connections - 1) * time.Second / flood)
					defer tick.Stop()
					for {
						select {
						case <-stop:
							return
						case <-tick.C:
						}
						if err := request(); err != nil {
							b.Error(err)
							return
						}
						if side == 1 {
							sent.Add(1)
						}
					}
				})
			}
		}
		for end := time.Now().Add(turn); time.Now().Before(end); {
			begun := time.Now()
			require.NoError(b, read())
			waits[side] = append(waits[side], time.Since(begun))
		}
		close(stop)
		others.Wait()
	}
	for i, side := range []string{"quiet", "flooded", "floored"} {
		slices.Sort(waits[i])
		b.ReportMetric(float64(waits[i][len(waits[i])/2].Microseconds()), side+"-µs")
		b.ReportMetric(float64(waits[i][len(waits[i])*99/100].Microseconds()), side+"-99%-µs")
	}
	b.ReportMetric(float64(sent.Load())/(turns*turn).Seconds(), "states/s")
	b.ReportMetric(0, "ns/op")
}

// unknownState is a request at the callback that needs no token, with a state of the right form that the engine has not issued.
func (v *Vault) unknownState(b *testing.B, transport http.RoundTripper) func() error {
	b.Helper()
	return func() error {
		req, err := http.NewRequest(http.MethodGet, v.Addr+"/v1/kaizala/callback?code=code&state="+strings.Repeat("s", 43), nil)
		if err != nil {
			return err
		}
		resp, err := transport.RoundTrip(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		page, err := io.ReadAll(resp.Body)
		if err == nil && (resp.StatusCode != http.StatusBadRequest || !strings.Contains(string(page), "This link is not known")) {
			err = fmt.Errorf("the callback answered with %d\n%s", resp.StatusCode, page)
		}
		return err
	}
}

// spread gives each of the goroutines that call it at the same time a function of its own.
func spread(of func(i int) func() error) func() error {
	all := make([]func() error, connections)
	for i := range all {
		all[i] = of(i)
	}
	var next atomic.Int64
	return func() error { return all[int(next.Add(1))%connections]() }
}

// requester makes a request to Vault without the costs of the API client.
func (v *Vault) requester(b *testing.B, transport http.RoundTripper, method, path, body string) func() error {
	b.Helper()
	request := func() (string, error) {
		req, err := http.NewRequest(method, v.Addr+"/v1/"+path, strings.NewReader(body))
		if err != nil {
			return "", err
		}
		req.Header.Set("X-Vault-Token", v.RootToken)
		resp, err := transport.RoundTrip(req)
		if err != nil {
			return "", err
		}
		defer resp.Body.Close()
		answer, err := io.ReadAll(resp.Body)
		if err == nil && resp.StatusCode >= 300 {
			err = fmt.Errorf("%s %s: %d\n%s", method, path, resp.StatusCode, answer)
		}
		return string(answer), err
	}
	answer, err := request()
	require.NoError(b, err)
	if method == http.MethodGet {
		require.Contains(b, answer, `"access_token"`)
		b.Logf("an answer of %s has %d bytes", path, len(answer))
	}
	return func() error { _, err := request(); return err }
}
