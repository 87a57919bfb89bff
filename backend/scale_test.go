package backend

import (
	"context"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"
)

func TestCachedReadAsksNobody(t *testing.T) {
	e := newConfiguredEngine(t)
	e.waitForIndex()
	e.addTenant("acme")
	e.read("creds/acme")
	ops, asked := e.storage.ops.Load(), e.system.asked.Load()
	e.storage.failWith(func(op, key string) error { return errors.New("storage is gone") })
	for range 100 {
		e.mustRead("creds/acme")
		e.mustRead("token/acme")
	}
	assert.Equal(t, ops, e.storage.ops.Load(), "storage operations")
	assert.Equal(t, asked, e.system.asked.Load(), "questions to Vault")
	assert.Equal(t, 1, e.kaizala.CallCount())
}

// emptyBackend is the SDK's framework with one path of the engine, with its fields,
// and a handler that does nothing.
func emptyBackend(t testing.TB, e *engine, name string) *framework.Backend {
	t.Helper()
	path := e.Route(name + "/acme")
	require.NotNil(t, path)
	empty := &framework.Backend{Paths: []*framework.Path{{
		Pattern: path.Pattern,
		Fields:  path.Fields,
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.ReadOperation: &framework.PathOperation{
				Callback: func(context.Context, *logical.Request, *framework.FieldData) (*logical.Response, error) {
					return nil, nil
				},
			},
		},
	}}}
	require.NoError(t, empty.Setup(context.Background(), &logical.BackendConfig{Logger: e.Logger(), System: e.system}))
	return empty
}

func TestCachedReadAllocatesLittle(t *testing.T) {
	const most = 12
	e := newConfiguredEngine(t)
	e.waitForIndex()
	e.addTenant("acme")
	for _, name := range []string{"creds", "token"} {
		empty := emptyBackend(t, e, name)
		req := &logical.Request{Operation: logical.ReadOperation, Path: name + "/acme", Storage: e.storage}
		measure := func(b logical.Backend) (allocations float64, each time.Duration) {
			const runs = 5000
			begun := time.Now()
			allocations = testing.AllocsPerRun(runs, func() {
				if _, err := b.HandleRequest(context.Background(), req); err != nil {
					t.Fatal(err)
				}
			})
			return allocations, time.Since(begun) / (runs + 1)
		}
		ours, oursTime := measure(e.backend)
		framework, frameworkTime := measure(empty)
		t.Logf("%s: %v allocations in %s; an empty path with the same fields: %v in %s", name, ours, oursTime, framework, frameworkTime)
		assert.LessOrEqual(t, ours-framework, float64(most), "%s allocates %v times, the framework alone %v", name, ours, framework)
	}
}

// Vault revokes all leases of a token that dies, up to 180 at a time.
func (e *engine) revokeAtOnce(leases []*logical.Response) {
	e.t.Helper()
	var revocations errgroup.Group
	revocations.SetLimit(180)
	for _, lease := range leases {
		revocations.Go(func() error { return e.revokeLease(lease) })
	}
	require.NoError(e.t, revocations.Wait())
}

func (e *engine) leases(tenant string, n int) []*logical.Response {
	e.t.Helper()
	leases := make([]*logical.Response, n)
	for i := range leases {
		leases[i] = e.lease(tenant)
	}
	return leases
}

func TestRevocationStorm(t *testing.T) {
	storm := 10_000
	if testing.Short() || raceDetector {
		storm = 1_000
	}
	e := newConfiguredEngine(t)
	e.waitForIndex()
	e.addTenant("acme")
	e.addTenant("other")
	e.read("creds/other")
	kept := e.lease("acme")

	leases := e.leases("acme", storm)
	ops := e.storage.ops.Load()
	e.revokeAtOnce(leases)
	assert.Equal(t, ops, e.storage.ops.Load(), "one lease is still live: there is nothing to store")
	assert.Equal(t, accessTokenOf(kept), accessTokenOf(e.lease("acme")))

	// The process loses the count of leases: the first of these revocations gives the
	// token up, and the others find it given up. Storage is slow in that write.
	e.restart()
	e.waitForIndex()
	leases = e.leases("acme", storm)
	e.read("creds/other")
	puts, calls := e.storage.putsOf("tenants/acme"), e.kaizala.CallCount()
	writing, written := make(chan struct{}), make(chan struct{})
	e.storage.failWith(func(op, key string) error {
		if op == "put" && key == "tenants/acme" {
			close(writing) // panics at a second write
			<-written
		}
		return nil
	})
	var revoked sync.WaitGroup
	revoked.Go(func() { e.revokeAtOnce(leases) })
	<-writing
	for range 1000 {
		e.mustRead("creds/other") // it would hang if it waited for the revocations
	}
	close(written)
	revoked.Wait()
	assert.Equal(t, puts+1, e.storage.putsOf("tenants/acme"))
	assert.Equal(t, calls, e.kaizala.CallCount())
	e.storage.heal()
	assert.NotEqual(t, accessTokenOf(kept), accessTokenOf(e.lease("acme")))
}

func TestAHundredThousandTenants(t *testing.T) {
	t.Parallel()
	n, bound := 100_000, tenantsInMemory
	e := newConfiguredEngine(t)
	e.stop()
	if testing.Short() || raceDetector {
		n, bound = 2_000, 1_000
	}
	e.fill(n)

	// The index cannot go on, and readers are served all the same. Readers read only
	// tenant-000000, which the index waits for like any other.
	indexer, stop := context.WithCancel(context.Background())
	defer stop()
	var reading, most, gets atomic.Int64
	e.storage.failWith(func(op, key string) error {
		if op != "get" || !strings.HasPrefix(key, tenantPrefix) || key == tenantPrefix+tenantName(0) {
			return nil
		}
		gets.Add(1)
		now := reading.Add(1)
		defer reading.Add(-1)
		for {
			old := most.Load()
			if now <= old || most.CompareAndSwap(old, now) {
				break
			}
		}
		<-indexer.Done()
		return nil
	})
	begun := time.Now()
	e.start()
	if bound < tenantsInMemory {
		e.tenants.loaded.Resize(bound)
	}
	e.mustRead("creds/" + tenantName(0))
	t.Logf("the first read of a mount of %d tenants was answered after %s", n, time.Since(begun))
	require.Eventually(t, func() bool { return reading.Load() == storageReaders }, time.Minute, time.Millisecond)
	e.mustRead("token/" + tenantName(0))
	stop()
	begun = time.Now()
	e.waitForIndex()
	t.Logf("the index was complete %s later", time.Since(begun))
	assert.LessOrEqual(t, most.Load(), int64(storageReaders), "storage reads at once")
	assert.EqualValues(t, n-1, gets.Load(), "each tenant is read once")
	e.storage.heal()

	t.Run("a tick with nothing due", func(t *testing.T) {
		ops, asked := e.storage.ops.Load(), e.system.asked.Load()
		begun := time.Now()
		e.tick()
		t.Logf("took %s", time.Since(begun))
		assert.Equal(t, ops, e.storage.ops.Load())
		assert.Equal(t, asked, e.system.asked.Load())
	})

	t.Run("a LIST", func(t *testing.T) {
		ops := e.storage.ops.Load()
		begun := time.Now()
		resp := e.ok(logical.ListOperation, "tenants/", nil)
		t.Logf("took %s", time.Since(begun))
		assert.Len(t, resp.Data["keys"], n)
		assert.Len(t, resp.Data["key_info"], n)
		assert.Empty(t, resp.Warnings)
		assert.Equal(t, ops+1, e.storage.ops.Load(), "storage is only listed")
	})

	t.Run("no more tokens in memory than the bound", func(t *testing.T) {
		inMemory := func() (loaded int) {
			e.tenants.each(func(t *tenant) {
				if t.view.Load().entry != nil {
					loaded++
				}
			})
			return loaded
		}
		assert.Equal(t, 1, inMemory(), "the index keeps no tokens in memory")
		for i := range bound + 1000 {
			e.mustRead("token/" + tenantName(i))
		}
		assert.Equal(t, bound, inMemory())
		assert.Zero(t, e.kaizala.CallCount())
	})
}
