package backend

import (
	"context"
	"fmt"
	"runtime"
	"strconv"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"
)

// sizes are the numbers of tenants at which the costs that grow with them are measured.
var sizes = []int{1_000, 10_000, 100_000}

// fill stores n tenants as they are after an exchange, with tokens of Kaizala's
// size, in storage and not in memory.
func (e *engine) fill(n int) {
	e.t.Helper()
	via, err := e.connectors.get(context.Background(), defaultConnector)
	require.NoError(e.t, err)
	refreshToken := e.newToken("asha")
	facts, err := via.service.Check(refreshToken)
	require.NoError(e.t, err)
	now := time.Now().Add(-time.Hour).UTC().Truncate(time.Millisecond) // idle for an hour
	entry := &tenantEntry{
		Format: entryFormat, Connector: defaultConnector, MinTTL: defaultMinTTL,
		RefreshToken: refreshToken, RefreshTokenOrigin: originOperator, RefreshTokenSet: now, Facts: facts,
		Verified: true, LastExchange: now, AccessTokenLife: day,
		Access: &accessEntry{
			Token: e.newToken("asha"), Generation: "generation", EndpointURL: "https://inc-000.kaizalamessaging.osi.office.net/",
			Scope: "user", Obtained: now, Expires: now.Add(day),
		},
	}
	raw, err := logical.StorageEntryJSON("", entry)
	require.NoError(e.t, err)
	for i := range n {
		err := e.storage.InmemStorage.Put(context.Background(), &logical.StorageEntry{Key: tenantPrefix + tenantName(i), Value: raw.Value})
		require.NoError(e.t, err)
	}
}

func tenantName(i int) string { return fmt.Sprintf("tenant-%06d", i) }

// waitForIndex waits until the index of tenants is complete, however long that takes.
func (e *engine) waitForIndex() {
	e.t.Helper()
	require.Eventually(e.t, func() bool { return e.awaitIndex(context.Background()) }, 5*time.Minute, time.Millisecond)
}

func (e *engine) mustRead(path string) *logical.Response {
	resp, err := e.HandleRequest(context.Background(), &logical.Request{Operation: logical.ReadOperation, Path: path, Storage: e.storage})
	if err != nil || resp == nil || resp.IsError() {
		e.t.Fatalf("reading %s: %v, %v", path, resp, err)
	}
	return resp
}

// heap is the size of the heap after a garbage collection.
func heap() int64 {
	runtime.GC()
	runtime.GC() // frees what the first collection has only finalized
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

func BenchmarkCachedRead(b *testing.B) {
	for _, path := range []string{"creds", "token"} {
		b.Run(path, func(b *testing.B) {
			e := newConfiguredEngine(b)
			e.addTenant("acme")
			e.read(path + "/acme")
			readLoop(b, e, path)
		})
	}
}

func readLoop(b *testing.B, backend logical.Backend, path string) {
	req := &logical.Request{Operation: logical.ReadOperation, Path: path + "/acme"}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := backend.HandleRequest(context.Background(), req); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkCachedReadParallel(b *testing.B) {
	e := newConfiguredEngine(b)
	e.addTenant("acme")
	e.read("creds/acme")
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		req := &logical.Request{Operation: logical.ReadOperation, Path: "creds/acme"}
		for pb.Next() {
			if _, err := e.HandleRequest(context.Background(), req); err != nil {
				b.Error(err)
			}
		}
	})
}

// The cost of the SDK's framework alone: see emptyBackend.
func BenchmarkEmptyPath(b *testing.B) {
	for _, path := range []string{"creds", "token"} {
		b.Run(path, func(b *testing.B) {
			readLoop(b, emptyBackend(b, newConfiguredEngine(b), path), path)
		})
	}
}

// A tenant that is not in memory and has a usable token in storage.
func BenchmarkReadFromStorage(b *testing.B) {
	e := newConfiguredEngine(b)
	e.fill(1)
	e.waitForIndex()
	path, key := "creds/"+tenantName(0), tenantPrefix+tenantName(0)
	b.ReportAllocs()
	for b.Loop() {
		e.InvalidateKey(context.Background(), key)
		e.mustRead(path)
	}
}

// A tenant without an access token: each read is an exchange with the emulator,
// which has no sockets here.
func BenchmarkColdRead(b *testing.B) {
	e := newConfiguredEngine(b)
	e.waitForIndex()
	paths := make([]string, b.N)
	for i := range paths {
		e.addTenant(tenantName(i))
		paths[i] = "creds/" + tenantName(i)
	}
	b.ReportAllocs()
	b.ResetTimer()
	for _, path := range paths {
		e.mustRead(path)
	}
}

func BenchmarkRenew(b *testing.B) {
	e := newConfiguredEngine(b)
	e.addTenant("acme")
	lease := e.lease("acme")
	b.ReportAllocs()
	for b.Loop() {
		req := &logical.Request{Operation: logical.RenewOperation, Secret: lease.Secret, Storage: e.storage}
		if resp, err := e.HandleRequest(context.Background(), req); err != nil || resp.IsError() {
			b.Fatal(resp, err)
		}
	}
}

// One of a token's many leases, and the last one, which is written to storage.
func BenchmarkRevoke(b *testing.B) {
	b.Run("one-of-many", func(b *testing.B) {
		e := newConfiguredEngine(b)
		e.addTenant("acme")
		e.lease("acme") // this lease is not revoked
		leases := make([]*logical.Response, b.N)
		for i := range leases {
			leases[i] = e.lease("acme")
		}
		b.ReportAllocs()
		b.ResetTimer()
		for _, lease := range leases {
			if err := e.revokeLease(lease); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("last", func(b *testing.B) {
		const tenants = 1000 // so many stay in memory at a time
		e := newConfiguredEngine(b)
		e.waitForIndex()
		b.ReportAllocs()
		b.ResetTimer()
		for done := 0; done < b.N; done += tenants {
			b.StopTimer()
			e.fill(tenants)
			leases := make([]*logical.Response, tenants)
			for i := range leases {
				e.InvalidateKey(context.Background(), tenantPrefix+tenantName(i))
				leases[i] = e.lease(tenantName(i))
			}
			b.StartTimer()
			for _, lease := range leases[:min(tenants, b.N-done)] {
				if err := e.revokeLease(lease); err != nil {
					b.Fatal(err)
				}
			}
		}
	})
}

// The costs that grow with the number of tenants: the time from the start of an
// engine to its complete index, the memory of an idle tenant after that, a tick with
// nothing due, and a LIST of all tenants.
func BenchmarkTenants(b *testing.B) {
	for _, n := range sizes {
		b.Run(strconv.Itoa(n), func(b *testing.B) {
			e := newConfiguredEngine(b)
			e.fill(n)
			e.stop()
			e.backend = nil
			before, begun := heap(), time.Now()
			e.start()
			e.waitForIndex()
			took, grown := time.Since(begun), heap()-before
			b.Run("index", func(b *testing.B) { // runs once, for any b.N
				b.ReportMetric(float64(took), "ns/op")
				b.ReportMetric(float64(grown)/float64(n), "B/tenant")
			})
			b.Run("tick", func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					e.tick()
				}
			})
			b.Run("list", func(b *testing.B) {
				for b.Loop() {
					resp, err := e.HandleRequest(context.Background(), &logical.Request{Operation: logical.ListOperation, Path: "tenants/", Storage: e.storage})
					if err != nil || len(resp.Data["key_info"].(map[string]any)) != n {
						b.Fatal(resp, err)
					}
				}
			})
		})
	}
}
