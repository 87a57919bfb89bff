package share

import (
	"fmt"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
)

// A call while this many calls count already.
func BenchmarkTake(b *testing.B) {
	for _, counted := range []int{0, 1_000, 100_000} {
		b.Run(fmt.Sprint("counted=", counted), func(b *testing.B) {
			s := New(&logical.InmemStorage{}, "default")
			s.Configure(counted+1, time.Minute)
			for i := range counted {
				c, err := s.Take(b.Context(), Want{Tenant: fmt.Sprint(i)})
				if err != nil {
					b.Fatal(err)
				}
				c.End()
			}
			b.ReportAllocs()
			for b.Loop() {
				c, err := s.Take(b.Context(), Want{Tenant: "acme"})
				if err != nil {
					b.Fatal(err)
				}
				c.Withdraw()
			}
		})
	}
}

// The limit is used up and this many readers wait: one more reader gets the time when to come back.
func BenchmarkRefuse(b *testing.B) {
	for _, waiting := range []int{0, 100, 1_000} {
		b.Run(fmt.Sprint("waiting=", waiting), func(b *testing.B) {
			s := New(&logical.InmemStorage{}, "default")
			s.Configure(1, time.Minute)
			if _, err := s.Take(b.Context(), Want{Tenant: "runs"}); err != nil {
				b.Fatal(err)
			}
			now := time.Now()
			for i := range waiting {
				s.queue = append(s.queue, &waiter{Want: Want{Tenant: fmt.Sprint(i)}, deadline: now.Add(time.Hour), answered: make(chan struct{})})
			}
			b.ReportAllocs()
			for b.Loop() {
				if _, err := s.Take(b.Context(), Want{Tenant: "acme", Wait: time.Second}); err == nil {
					b.Fatal("permitted")
				}
			}
		})
	}
}
