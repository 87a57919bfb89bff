package backend

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// newIndex returns an index and the times at which its timer has fired, counted from now.
func newIndex(t *testing.T) (x *index, fired func() []time.Duration) {
	x = &index{}
	begun := time.Now()
	var times []time.Duration
	x.init(func() { times = append(times, time.Since(begun)) })
	t.Cleanup(x.stop)
	return x, func() []time.Duration { synctest.Wait(); return times }
}

// The timer fires when the first tenant is due. What is due is handed out once, the earliest first.
func TestIndexByDueTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x, fired := newIndex(t)
		begun := time.Now()
		at := func(minutes int) time.Time { return begun.Add(time.Duration(minutes) * time.Minute) }
		x.at("second", at(2))
		x.at("third", at(3))
		x.at("first", at(1))
		x.at("moved", at(1))
		x.at("moved", at(9))
		x.at("never", at(1))
		x.at("never", time.Time{})
		x.atMost("kept", at(2)) // a new name
		x.atMost("kept", at(5)) // later: it stays
		x.atMost("third", at(2))
		time.Sleep(time.Minute + time.Second)
		assert.Equal(t, []time.Duration{time.Minute}, fired())
		names, connectors := x.due(time.Now())
		assert.Equal(t, []string{"first"}, names)
		assert.Empty(t, connectors)
		time.Sleep(time.Minute)
		assert.Equal(t, []time.Duration{time.Minute, 2 * time.Minute}, fired())
		names, _ = x.due(time.Now())
		assert.ElementsMatch(t, []string{"second", "kept", "third"}, names)
		names, _ = x.due(at(9).Add(-1))
		assert.Empty(t, names)
		time.Sleep(time.Until(at(9)))
		require.Len(t, fired(), 3)
		x.stop()
		names, _ = x.due(time.Now())
		assert.Empty(t, names, "once it is stopped")
		x.at("late", at(10))
		time.Sleep(time.Hour)
		assert.Len(t, fired(), 3)
	})
}

// A line in which as many tenants have failed as have not is served like any other when its pause has ended.
func TestLineOfSoundAndFailedTenants(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x, _ := newIndex(t)
		x.wait("hr", "sound", 10, false)
		x.wait("hr", "failed", 10, true)
		require.True(t, x.serve("hr"))
		x.pause("hr", time.Now().Add(time.Minute))
		time.Sleep(time.Minute)
		_, connectors := x.due(time.Now())
		assert.Equal(t, []string{"hr"}, connectors)
	})
}

// A line is served by one goroutine at a time, the tenant whose refresh token ends first at its head, and rests until its share permits
// more.
func TestIndexLines(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x, fired := newIndex(t)
		lines := func() []string {
			_, connectors := x.due(time.Now())
			return connectors
		}
		assert.False(t, x.serve("hr"), "a line without a tenant")
		x.at("b", time.Now())
		x.wait("hr", "b", 20, false)
		x.wait("hr", "a", 10, false)
		x.wait("hr", "c", 30, false)
		x.wait("hr", "gone", 5, false)
		x.at("gone", time.Time{})
		x.atMost("c", time.Now()) // it waits already
		names, connectors := x.due(time.Now())
		assert.Empty(t, names)
		assert.Equal(t, []string{"hr"}, connectors)
		require.True(t, x.serve("hr"))
		assert.False(t, x.serve("hr"), "another goroutine serves it")
		assert.Empty(t, lines())
		name, ok := x.next("hr")
		assert.True(t, ok)
		assert.Equal(t, "a", name)

		x.pause("hr", time.Now().Add(time.Minute))
		assert.Empty(t, lines())
		time.Sleep(time.Minute)
		assert.Equal(t, []time.Duration{time.Minute}, fired()[len(fired())-1:], "when the pause ends")
		assert.Equal(t, []string{"hr"}, lines())
		require.True(t, x.serve("hr"))
		x.pause("hr", time.Now().Add(time.Hour))
		x.resume("hr")
		x.resume("other")
		time.Sleep(time.Millisecond)
		assert.Equal(t, []time.Duration{time.Minute + time.Millisecond}, fired()[len(fired())-1:], "when the connector is written")
		assert.Equal(t, []string{"hr"}, lines())

		x.at("c", time.Now().Add(time.Hour)) // c leaves the line, and is due by its time alone
		x.atMost("c", time.Now())
		names, _ = x.due(time.Now())
		assert.Equal(t, []string{"c"}, names)
		require.True(t, x.serve("hr"))
		name, _ = x.next("hr")
		assert.Equal(t, "b", name)
		_, ok = x.next("hr")
		assert.False(t, ok, "the line is empty, and given up")
		assert.False(t, x.serve("hr"))
		x.wait("hr", "a", 10, false)
		assert.True(t, x.serve("hr"), "a new line")
	})
}
