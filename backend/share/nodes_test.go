package share

import (
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// A node becomes the active node again, after another node has noted a call at the place of one of its own notes. Its next call has another
// place: the process after it counts both.
func TestPlaceOfAnotherNodesNote(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var storage store
		one, other := from(t, &storage, 2), from(t, &storage, 2)
		noted(t, one, Want{}).End()
		time.Sleep(counts) // the first note does not count any more
		other.Invalidate()
		require.NoError(t, other.Load(t.Context()))
		noted(t, other, Want{}).End()
		one.Invalidate()
		require.NoError(t, one.Load(t.Context()))
		noted(t, one, Want{}).End()
		assert.Len(t, storage.keys(t), 2)
		refused(t, from(t, &storage, 2), Want{}, Window)
	})
}

// Two nodes take over from each other, and their processes are restarted, at random: no Window sees more calls than the limit, and none of
// a tenant more than its fifth.
func TestNodesAtRandom(t *testing.T) {
	type request struct {
		*Call
		begun, end time.Time // end is zero while it runs
	}
	for seed := range uint64(12) {
		synctest.Test(t, func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 7))
			var storage store
			limit, active := 5+r.IntN(8), 0
			nodes := []*Share{from(t, &storage, limit), from(t, &storage, limit)}
			storage.after = func(string, string) { nodes[1-active].Invalidate() }
			var all []*request
			end := func(ends func(*request) bool) {
				for _, q := range all {
					// No request takes longer than timeout.
					if last := q.begun.Add(timeout); q.end.IsZero() && (ends(q) || !time.Now().Before(last)) {
						q.end = time.Now()
						if q.end.After(last) {
							q.end = last
						}
						q.End()
					}
				}
			}
			each := func(*request) bool { return true }
			for range 400 {
				switch n := r.IntN(40); {
				case n == 0:
					end(each)
					active = 1 - active
				case n == 1:
					end(each)
					nodes[active] = from(t, &storage, limit)
				case n < 12:
					time.Sleep(time.Duration(r.IntN(8000)) * time.Millisecond)
				case n < 14:
					time.Sleep(time.Duration(r.IntN(70000)) * time.Millisecond)
				case n < 24:
					end(func(*request) bool { return r.IntN(2) == 0 })
				}
				end(func(*request) bool { return false })
				require.NoError(t, nodes[active].Load(t.Context()))
				c, err := nodes[active].Take(t.Context(), Want{Tenant: []string{"", "", "", "a", "b", "c"}[r.IntN(6)], Class: Class(r.IntN(5))})
				if err != nil {
					continue
				}
				require.NoError(t, c.Note(t.Context()))
				all = append(all, &request{Call: c, begun: time.Now()})
				total, own := 0, 0
				for _, q := range all {
					if q.end.IsZero() || time.Since(q.end) < Window {
						total++
						if q.noted.Tenant == c.noted.Tenant {
							own++
						}
					}
				}
				require.LessOrEqual(t, total, limit, "seed %d", seed)
				if c.noted.Tenant != "" {
					require.LessOrEqual(t, own, Fifth(limit), "seed %d", seed)
				}
			}
		})
	}
}
