package share

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// Callers give up while storage takes their entries, and still takes them: storage has no more entries than calls are permitted, and
// the places of both are given to one later call each.
func TestCallersGiveUpWhileStorageTakesTheirEntries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		storage := &store{}
		s := New(storage, "hr")
		s.Configure(2, timeout)
		require.NoError(t, s.Load(t.Context()))
		release := make(chan struct{})
		storage.surround(func(_ context.Context, op, _ string) error {
			if op == "put" {
				<-release // though the context has ended
			}
			return nil
		})
		ctx, cancel := context.WithCancel(t.Context())
		for range 2 {
			c, err := s.Take(ctx, Want{})
			require.NoError(t, err)
			go func() { _ = c.Note(ctx) }()
		}
		synctest.Wait()
		time.Sleep(time.Second)
		cancel()
		synctest.Wait()
		_, err := s.Take(t.Context(), Want{Wait: time.Second})
		require.ErrorAs(t, err, new(*LimitError), "storage may take the entries yet")
		close(release)
		synctest.Wait()
		for range 2 {
			c, err := s.Take(t.Context(), Want{})
			require.NoError(t, err)
			require.NoError(t, c.Note(t.Context()))
		}
		_, err = s.Take(t.Context(), Want{})
		require.ErrorAs(t, err, new(*LimitError))
		assert.Len(t, storage.keys(t), 2)
	})
}

// A caller gives up before the write of its note begins: also an exchange, which the next process would ask about, is not written then.
func TestExchangeGivesUpBeforeTheWrite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var storage store
		s := from(t, &storage, 10)
		puts := storage.slow(time.Hour)
		ctx, cancel := context.WithCancel(t.Context())
		begin(t, s, t.Context(), Want{})
		begin(t, s, ctx, Want{Tenant: "acme"})
		cancel()
		synctest.Wait()
		pass(gather)
		pass(storeWithin)
		pass(storeWithin)
		assert.Equal(t, []string{"0"}, *puts)
	})
}

// A caller gives up while storage takes its entry: who waits is given its place as soon as storage has answered.
func TestWaiterIsGivenAWithdrawnPlace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var storage store
		s := from(t, &storage, 2)
		spend(t, s, 1)
		time.Sleep(Window - 4*time.Second)
		release := make(chan struct{})
		storage.surround(func(context.Context, string, string) error { <-release; return nil }) // though the context has ended
		ctx, cancel := context.WithCancel(t.Context())
		gone := begin(t, s, ctx, Want{})
		cancel()
		synctest.Wait()
		require.True(t, gone.over.Load())
		waits := ask(t, s, t.Context(), reader("acme"))
		pass(time.Second)
		assert.False(t, waits.done.Load(), "storage may take the entry yet")
		close(release)
		pass(patience)
		require.NoError(t, waits.err)
		assert.Equal(t, time.Second, waits.after)
	})
}

// Two callers of one note give up while storage takes it: the places of both are free once storage has answered.
func TestCallersOfOneNoteGiveUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var storage store
		s := from(t, &storage, 3)
		release := make(chan struct{})
		storage.surround(func(context.Context, string, string) error { <-release; return nil }) // though the context has ended
		begin(t, s, t.Context(), Want{}).End()
		ctx, cancel := context.WithCancel(t.Context())
		for range 2 {
			begin(t, s, ctx, Want{}) // noted together, behind the first
		}
		pass(gather)
		cancel()
		synctest.Wait()
		close(release)
		synctest.Wait()
		storage.surround(nil)
		spend(t, s, 2)
		idle(t, s)
	})
}
