package backend

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"

	"github.com/hashicorp/vault/sdk/logical"
)

// entryFormat is the format of what storage holds. A change that an older engine could not read raises it.
const entryFormat = 2

// errUnreadable is the error of an entry that storage has and that this engine cannot use.
var errUnreadable = errors.New("cannot be read")

// getEntry reads an entry, or nil where there is none.
func getEntry[T any](ctx context.Context, s logical.Storage, key string) (*T, error) {
	ctx, cancel := context.WithTimeout(ctx, storeWithin)
	defer cancel()
	raw, err := s.Get(ctx, key)
	if err != nil {
		return nil, storageError(err)
	}
	if raw == nil {
		return nil, nil
	}
	var format struct {
		Format int `json:"format"`
	}
	entry := new(T)
	_ = raw.DecodeJSON(&format) // if this fails, so does the next
	switch {
	case format.Format > entryFormat:
		return nil, fmt.Errorf("the stored entry %q %w: a newer version of this plugin has written it in format %d; upgrade the plugin", key, errUnreadable, format.Format)
	case raw.DecodeJSON(entry) != nil:
		// The decoder's error may quote the entry.
		return nil, fmt.Errorf("the stored entry %q %w: delete it and write it again", key, errUnreadable)
	}
	return entry, nil
}

func putEntry(ctx context.Context, s logical.Storage, key string, entry any) error {
	raw, err := logical.StorageEntryJSON(key, entry)
	if err != nil {
		return err
	}
	return storageError(s.Put(ctx, raw))
}

// storageError returns logical.ErrReadOnly or logical.ErrSetupReadOnly for an error with that text, because errors come from Vault's
// process as texts. Vault sends a request that ends in logical.ErrReadOnly to the node that may write.
func storageError(err error) error {
	switch {
	case err == nil:
		return nil
	case strings.Contains(err.Error(), logical.ErrReadOnly.Error()):
		return logical.ErrReadOnly
	case strings.Contains(err.Error(), logical.ErrSetupReadOnly.Error()):
		return logical.ErrSetupReadOnly
	}
	return err
}

// lock is a mutex that may be held while storage is read and written: a waiter gives up when its context ends. Waiters get it in the order
// in which they came. Its channel is allocated on first use and dropped when idle, because each tenant has a lock.
type lock struct {
	mu    sync.Mutex
	users int32 // how many hold the lock or wait for it
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
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.users--; l.users == 0 { // the holder has released the lock at the same moment
		l.held = nil
	}
	return ctx.Err()
}

func (l *lock) release() {
	l.mu.Lock()
	defer l.mu.Unlock()
	<-l.held
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
