package backend

import (
	"context"
	"sync"
)

// lock is a mutual exclusion that a context can give up, so that it may be held while storage is read and written.
// Waiters get it in the order in which they came. Its channel is allocated on first use and dropped when idle.
type lock struct {
	mu    sync.Mutex
	users int32 // who hold the lock or wait for it
	held  chan struct{}
}

// acquire takes the lock, or returns the context's error.
func (l *lock) acquire(ctx context.Context) error {
	l.mu.Lock()
	if l.held == nil {
		l.held = make(chan struct{}, 1)
	}
	held := l.held
	l.users++
	l.mu.Unlock()
	select {
	case held <- struct{}{}:
		return nil
	case <-ctx.Done():
		l.leave()
		return ctx.Err()
	}
}

func (l *lock) release() {
	<-l.held
	l.leave()
}

func (l *lock) leave() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.users--; l.users == 0 {
		l.held = nil
	}
}

// busy says whether the lock is held or waited for.
func (l *lock) busy() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.users > 0
}
