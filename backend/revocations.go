package backend

import (
	"context"
	"crypto/rand"
	"errors"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"golang.org/x/sync/errgroup"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/share"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/tokenservice"
)

const (
	// intentPrefix is where storage keeps the tokens that are to be revoked: <connector>/<id>.
	intentPrefix = "revocations/"
	// heldPrefix is where storage keeps access tokens that have leases and are not their tenant's current one:
	// <tenant>/<generation>.
	heldPrefix = "held/"

	// refreshTokenTries is how long the engine tries to revoke a refresh token.
	refreshTokenTries = 24 * time.Hour
	// lastMoments is how long before its end a token is not sent any more: at some services the revocation of an
	// expired token ends the whole grant.
	lastMoments = 5 * time.Second

	// A revocation waits for its call so long at most, and only while the service answers quickly and such waits of the
	// last minute are short: Vault unmounts and moves a mount by revoking its leases one after another.
	revocationPatience = 5 * time.Second
	quickRevocation    = 2 * time.Second
	waitsPerMinute     = 10 * time.Second

	longestRevocationRest = 30 * time.Second
	// revocationsAtOnce bounds the revocation calls of a connector under way.
	revocationsAtOnce = 4
)

// intent is a token that is to be revoked at the service.
type intent struct {
	Format  int                    `json:"format"`
	Tenant  string                 `json:"tenant"`
	Token   string                 `json:"token"`
	Type    tokenservice.TokenType `json:"type"`
	Expires time.Time              `json:"expires"` // no call after
	// Obtained is when the exchange was sent that has brought an access token. It is zero in older entries.
	Obtained time.Time `json:"obtained,omitzero"`
	// Lineage is of the tenant that was to be deleted with its refresh token; "": none was, or it comes from version 0.1.0.
	Lineage string `json:"lineage,omitempty"`

	connector, id string
	next          time.Time // no call before
	rest          time.Duration
	under         chan struct{} // closed at the end of the call that is under way; nil: none is
	over          bool          // no call is needed any more, but storage has not taken that yet
	deleting      bool          // storage is deleting it
	spared        bool          // its refresh token is in use again: a call that waits for its place in the share is not made
	isDeleted     doubtfulDelete
	unstored      bool // storage has no such intent
}

// doubtfulDelete says, where that is in doubt, whether storage no longer has a tenant with a token. nil: there is no doubt, it has none.
type doubtfulDelete func(context.Context) (bool, error)

// held is an access token that has leases and is not its tenant's current one.
type held struct {
	Format    int       `json:"format"`
	Own       bool      `json:"own,omitempty"` // it is one lease's alone, and ends with that and not with its tenant
	Connector string    `json:"connector"`
	Token     string    `json:"token"`
	Expires   time.Time `json:"expires"`
	Obtained  time.Time `json:"obtained,omitzero"` // as the intent's
}

// revocations owns the tokens that are to be revoked at services, and those that may have to be.
type revocations struct {
	storage    logical.Storage
	connectors *connectors
	node       *node
	ctx        context.Context
	work       func(func()) bool
	tenants    *tenants
	stopping   chan struct{} // closed when the engine ends: no request waits for a next try any more
	stopOnce   sync.Once

	mu       sync.Mutex
	intents  map[string]map[string]*intent // by connector and id
	records  map[string]held               // what is held, by key below heldPrefix, without the tokens
	loaded   bool
	told     int                      // how often storage has changed, or may have, in a way that memory does not know
	deleted  map[string]bool          // keys of intents that were deleted before what storage has was loaded
	draining map[string]chan struct{} // by connector; a value in it wakes the worker
	errors   map[string]string        // why the last call failed, by connector and by connector/tenant
	writes   map[string]int           // how many writes of a refresh token are under way
	calls    map[*intent]time.Time    // those under way at a service, and when each was made
	slow     map[string]bool          // by connector: the last call that has ended failed, or took long
	waits    []*revocationWait        // of the last minute, and those that go on
}

// revocationWait is the wait of a request for its revocation call.
type revocationWait struct{ begun, ended time.Time } // ended is zero while it goes on

func newRevocations(storage logical.Storage) *revocations {
	return &revocations{
		storage:  storage,
		stopping: make(chan struct{}),
		intents:  map[string]map[string]*intent{},
		records:  map[string]held{},
		deleted:  map[string]bool{},
		draining: map[string]chan struct{}{},
		errors:   map[string]string{},
		writes:   map[string]int{},
		calls:    map[*intent]time.Time{},
		slow:     map[string]bool{},
	}
}

// mayRevoke says whether something of a tenant may have to be revoked at its service. A connector that memory does not
// know may, and so may the one of a tenant that memory does not know.
func (r *revocations) mayRevoke(s tenantSummary) bool {
	via := r.connectors.present(s.connector)
	return via == nil || via.about.Revocation == tokenservice.RevokeAccessToken || via.about.RevokeOnDelete
}

// revokeLater notes an access token for revocation where its service can revoke it. The intent is in storage before it returns.
func (r *revocations) revokeLater(ctx context.Context, connector, tenant string, a *accessEntry) error {
	if !a.Expires.Add(-lastMoments).After(time.Now()) {
		return nil
	}
	via, err := r.connectors.get(ctx, connector)
	if via == nil || via.about.Revocation != tokenservice.RevokeAccessToken {
		return ignoreUnusable(err)
	}
	i := intentOf(connector, tenant, a)
	if err := r.store(ctx, i); err != nil {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.readAgain() // storage may have taken the intent
		return err
	}
	r.mu.Lock()
	if known := r.intents[connector][i.id]; known == nil || known.unstored || known.deleting { // storage may have deleted the known one before
		// Readers get the token until the flow that gives it up has stored that.
		i.isDeleted = r.isGone(i)
		r.add(i)
	}
	r.mu.Unlock()
	r.tenants.resolved(tenant, a.Generation)
	return nil
}

// readAgain has the next tick read what storage has. The caller holds mu.
func (r *revocations) readAgain() {
	r.loaded = false
	r.told++
}

func intentOf(connector, tenant string, a *accessEntry) *intent {
	return &intent{
		Format: entryFormat, Tenant: tenant, Token: a.Token, Type: tokenservice.TypeAccessToken,
		Expires: a.Expires.Add(-lastMoments), Obtained: a.Obtained, connector: connector, id: a.Generation,
	}
}

// key is where storage keeps the intent, below intentPrefix.
func (i *intent) key() string { return i.connector + "/" + i.id }

// remember has an access token revoked that storage has not taken an intent for: this process does it, or the next one finds
// the token in its tenant's entry. isGone says whether the entry has it no longer; nil: it has it no longer.
func (r *revocations) remember(connector, tenant string, a *accessEntry, isGone doubtfulDelete) {
	i := intentOf(connector, tenant, a)
	i.isDeleted, i.unstored = isGone, true
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.intents[connector][i.id] == nil {
		r.add(i)
	}
}

// isGivenUp says whether an access token is to be revoked, though its tenant's entry has it: the process before this one ended
// between the two writes.
func (r *revocations) isGivenUp(ctx context.Context, connector, generation string) (bool, error) {
	r.mu.Lock()
	i := r.intents[connector][generation]
	pending, loaded := i != nil && !i.unstored, r.loaded // an entry that has the token of an unstored intent keeps it
	r.mu.Unlock()
	if pending || loaded {
		return pending, nil
	}
	if via := r.connectors.present(connector); via != nil && via.about.Revocation != tokenservice.RevokeAccessToken {
		return false, nil
	}
	i, err := getEntry[intent](ctx, r.storage, intentPrefix+connector+"/"+generation)
	return i != nil, ignoreUnusable(err)
}

// isWanted says whether a token is still to be revoked, as its connector is now.
func (i *intent) isWanted(about tokenservice.About) bool {
	return about.Revocation == tokenservice.RevokeAccessToken || i.Type == tokenservice.TypeRefreshToken && about.RevokeOnDelete
}

// revokeRefreshTokenLater stores that a deleted tenant's refresh token is to be revoked, where its connector says so. The caller has the
// intent taken once the tenant is deleted, or may be.
func (r *revocations) revokeRefreshTokenLater(ctx context.Context, connector, tenant, lineage, token string, facts tokenservice.Facts) (*intent, error) {
	via, err := r.connectors.get(ctx, connector)
	if via == nil || !via.about.RevokeOnDelete {
		return nil, ignoreUnusable(err)
	}
	expires := time.Now().Add(refreshTokenTries)
	if !facts.Assumed && !facts.Expires.IsZero() {
		expires = earliest(expires, facts.Expires.Add(-lastMoments))
	}
	i := &intent{
		Format: entryFormat, Tenant: tenant, Token: token, Type: tokenservice.TypeRefreshToken,
		Expires: expires.UTC().Truncate(time.Millisecond), Lineage: lineage, connector: connector, id: rand.Text(),
	}
	if err := r.store(ctx, i); err != nil {
		r.take(i, func(context.Context) (bool, error) { return false, nil }) // storage may have taken the intent
		return nil, err
	}
	return i, nil
}

// take takes a refresh token's intent into memory, where there is one. isDeleted is nil where the tenant is deleted.
func (r *revocations) take(i *intent, isDeleted doubtfulDelete) {
	if i == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	i.isDeleted = isDeleted
	r.add(i)
}

// abandonRefreshToken gives up a refresh token that came for a tenant which is deleted already. Where storage fails, the token lives to
// its end. facts are nil where the service has told none.
func (r *revocations) abandonRefreshToken(ctx context.Context, connector, tenant, token string, facts *tokenservice.Facts) {
	if facts == nil {
		facts = &tokenservice.Facts{}
	}
	i, _ := r.revokeRefreshTokenLater(ctx, connector, tenant, "", token, *facts)
	r.take(i, nil)
}

// ignoreUnusable leaves of a connector's error only what a later try may not meet: a connector that cannot be used
// revokes nothing.
func ignoreUnusable(err error) error {
	if errors.Is(err, errUnreadable) {
		return nil
	}
	return err
}

func (r *revocations) store(ctx context.Context, i *intent) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), storeWithin)
	defer cancel()
	return putEntry(ctx, r.storage, intentPrefix+i.key(), i)
}

// add takes an intent into memory. The caller holds mu.
func (r *revocations) add(i *intent) {
	of := r.intents[i.connector]
	if of == nil {
		of = map[string]*intent{}
		r.intents[i.connector] = of
	}
	of[i.id] = i
}

// beginWrite notes that a refresh token is being written. Until the caller calls end, no call to revoke it begins: the service may be
// verifying it. beginWrite waits for the end of a call that has begun, so that the service does not accept a token which is revoked a
// moment later.
func (r *revocations) beginWrite(ctx context.Context, token string) (end func(), err error) {
	r.mu.Lock()
	r.writes[token]++
	var calls []<-chan struct{}
	for i := range r.calls {
		if i.isToRevoke(token) {
			calls = append(calls, i.under)
		}
	}
	r.mu.Unlock()
	for _, call := range calls {
		select {
		case <-call:
		case <-ctx.Done():
			err = tryAgain("the refresh token is being revoked at its service, because a tenant that had it was deleted: nothing of this write was stored; write again in a minute")
		}
	}
	return func() {
		r.mu.Lock()
		if r.writes[token]--; r.writes[token] == 0 {
			delete(r.writes, token)
		}
		r.mu.Unlock()
		r.wakeAll()
	}, err
}

// isToRevoke says whether the intent is to revoke this refresh token.
func (i *intent) isToRevoke(token string) bool {
	return i.Type == tokenservice.TypeRefreshToken && i.Token == token
}

// spare deletes the intents of a refresh token, because a write of the token is about to be stored.
func (r *revocations) spare(ctx context.Context, token string) error {
	if err := r.load(ctx); err != nil {
		return err
	}
	found := r.disarm(token)
	for n, i := range found {
		if err := r.endIntent(ctx, i); err != nil {
			r.mu.Lock()
			defer r.mu.Unlock()
			for _, i := range found[n:] {
				i.spared = false // the write is not stored
			}
			return err
		}
	}
	return nil
}

// disarm makes sure that no call to revoke a refresh token begins, and returns its intents: the token is in use again, or memory keeps
// what the service has replaced it by. The next process, which does not know that, revokes the token.
func (r *revocations) disarm(token string) (found []*intent) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, of := range r.intents {
		for _, i := range of {
			if i.isToRevoke(token) {
				i.spared = true
				found = append(found, i)
			}
		}
	}
	return found
}

// endIntent deletes an intent, in storage and in memory. Where storage fails it stays, and the next call ends it.
func (r *revocations) endIntent(ctx context.Context, i *intent) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), storeWithin)
	defer cancel()
	r.mu.Lock()
	i.deleting = true
	r.mu.Unlock()
	err := storageError(r.storage.Delete(ctx, intentPrefix+i.key()))
	r.mu.Lock()
	defer r.mu.Unlock()
	i.deleting = false
	if err != nil {
		return err
	}
	if !r.loaded {
		r.deleted[i.key()] = true
	}
	r.note(i, "")
	if of := r.intents[i.connector]; of[i.id] == i {
		delete(of, i.id)
	}
	return nil
}

// hold stores an access token that has leases, if its service can revoke it. A token of one lease alone is stored in any case: the
// connector may be written during its exchange, and written again while the lease lives.
func (r *revocations) hold(ctx context.Context, connector, tenant string, a *accessEntry, own bool) error {
	if !own {
		via, err := r.connectors.get(ctx, connector)
		if via == nil || via.about.Revocation != tokenservice.RevokeAccessToken {
			return ignoreUnusable(err)
		}
	}
	key := tenant + "/" + a.Generation
	r.mu.Lock()
	r.records[key] = held{Connector: connector, Expires: a.Expires} // before the write: storage may take the record and report an error
	r.mu.Unlock()
	return putEntry(ctx, r.storage, heldPrefix+key, &held{
		Format: entryFormat, Own: own, Connector: connector, Token: a.Token, Expires: a.Expires, Obtained: a.Obtained,
	})
}

// record reads the record of a token, nil where there is none.
func (r *revocations) record(ctx context.Context, key string) (*held, error) {
	h, err := getEntry[held](ctx, r.storage, heldPrefix+key)
	if h != nil {
		correctLife(&h.Obtained, &h.Expires)
	}
	return h, err
}

// correctLife makes the life of a token begin now which begins in the future by what storage has: the host's clock was wrong then.
func correctLife(obtained, expires *time.Time) {
	if ahead := time.Until(*obtained); ahead > 0 {
		*obtained, *expires = obtained.Add(-ahead), expires.Add(-ahead)
	}
}

// holds says whether the record of a token is in storage.
func (r *revocations) holds(ctx context.Context, tenant, generation string) (bool, error) {
	h, err := r.record(ctx, tenant+"/"+generation)
	return h != nil, err
}

// revokeHeldLater notes the access token of a record for revocation, and deletes the record. It returns the token's connector, "" where
// there is nothing to revoke.
func (r *revocations) revokeHeldLater(ctx context.Context, tenant, generation string) (connector string, err error) {
	h, err := r.record(ctx, tenant+"/"+generation)
	if h == nil {
		return "", err
	}
	return r.revokeRecordLater(ctx, tenant, generation, h)
}

// revokeRecordLater is revokeHeldLater for a caller who has read the record.
func (r *revocations) revokeRecordLater(ctx context.Context, tenant, generation string, h *held) (connector string, err error) {
	a := &accessEntry{Token: h.Token, Generation: generation, Obtained: h.Obtained, Expires: h.Expires}
	if err := r.revokeLater(ctx, h.Connector, tenant, a); err != nil {
		return "", err
	}
	return h.Connector, r.release(ctx, tenant+"/"+generation)
}

// revokeReplacedLater notes for revocation the access tokens of a tenant that have leases and that newer tokens have replaced. It leaves a
// token of one lease alone to that lease.
func (r *revocations) revokeReplacedLater(ctx context.Context, tenant string) error {
	generations, err := r.storage.List(ctx, heldPrefix+tenant+"/")
	if err != nil {
		return storageError(err)
	}
	for _, generation := range generations {
		h, err := r.record(ctx, tenant+"/"+generation)
		if err != nil && !errors.Is(err, errUnreadable) {
			return err
		}
		if h == nil || h.Own {
			continue
		}
		if _, err := r.revokeRecordLater(ctx, tenant, generation, h); err != nil {
			return err
		}
	}
	return nil
}

// release deletes the record of a token.
func (r *revocations) release(ctx context.Context, key string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), storeWithin)
	defer cancel()
	if err := storageError(r.storage.Delete(ctx, heldPrefix+key)); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.records, key)
	return nil
}

// revokeNow has an intent's call made, and waits for it while that does not hold Vault up.
func (r *revocations) revokeNow(ctx context.Context, connector, generation string) {
	r.mu.Lock()
	i := r.intents[connector][generation]
	if i == nil || !r.mayWait(connector) || !r.begins(i) {
		r.mu.Unlock()
		r.wake(connector)
		return
	}
	under, wait := i.under, &revocationWait{begun: time.Now()}
	r.waits = append(r.waits, wait)
	r.mu.Unlock()
	timer := time.NewTimer(revocationPatience)
	defer timer.Stop()
	select {
	case <-under:
	case <-timer.C:
	case <-ctx.Done():
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	wait.ended = time.Now()
}

// begins makes sure that a try is under way for a request that waits for it. It returns false where the engine ends. The caller holds mu.
func (r *revocations) begins(i *intent) bool {
	if i.under != nil {
		return true
	}
	if !r.work(func() {
		r.call(i, share.RevocationWait)
		r.wake(i.connector)
	}) {
		return false
	}
	i.under = make(chan struct{})
	return true
}

// mayWait says whether a revocation may wait for its call. The caller holds mu.
func (r *revocations) mayWait(connector string) bool {
	if r.slow[connector] {
		return false
	}
	now := time.Now()
	for i, made := range r.calls {
		if i.connector == connector && now.Sub(made) > quickRevocation {
			return false
		}
	}
	r.waits = slices.DeleteFunc(r.waits, func(w *revocationWait) bool { return !w.ended.IsZero() && now.Sub(w.ended) > time.Minute })
	var spent time.Duration
	for _, w := range r.waits {
		spent += earliest(w.ended, now).Sub(w.begun)
	}
	return spent < waitsPerMinute
}

// wake makes sure that a worker handles a connector's intents.
func (r *revocations) wake(connector string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.intents[connector]) == 0 {
		return
	}
	if wake, ok := r.draining[connector]; ok {
		select {
		case wake <- struct{}{}:
		default:
		}
		return
	}
	wake := make(chan struct{}, 1)
	if r.work(func() { r.drain(connector, wake) }) {
		r.draining[connector] = wake
	}
}

// wakeAll makes sure that a worker handles the intents of each connector.
func (r *revocations) wakeAll() {
	r.mu.Lock()
	connectors := slices.Collect(maps.Keys(r.intents))
	r.mu.Unlock()
	for _, connector := range connectors {
		r.wake(connector)
	}
}

// drain revokes a connector's tokens, one after another as the share allows, until none is left.
func (r *revocations) drain(connector string, wake <-chan struct{}) {
	var calls errgroup.Group
	calls.SetLimit(revocationsAtOnce)
	defer func() { _ = calls.Wait() }()
	for !r.isStopping() && r.node.WriteSafeReplicationState() {
		i, next := r.pick(connector)
		if i != nil {
			calls.Go(func() error {
				r.call(i, share.Revocation)
				r.wake(connector)
				return nil
			})
			continue
		}
		if next.IsZero() {
			return // pick has taken the worker off
		}
		timer := time.NewTimer(time.Until(next))
		select {
		case <-timer.C:
		case <-wake:
		case <-r.stopping:
		}
		timer.Stop()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.draining, connector)
}

// stop has the workers end: what is pending is in storage.
func (r *revocations) stop() { r.stopOnce.Do(func() { close(r.stopping) }) }

func (r *revocations) isStopping() bool {
	select {
	case <-r.stopping:
		return true
	default:
		return false
	}
}

// pick chooses the intent whose token ends first among those that may be tried now, or says when to look again. Where there is none left,
// it takes the worker off, and next is zero.
func (r *revocations) pick(connector string) (best *intent, next time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.intents[connector]) == 0 {
		delete(r.draining, connector)
		return nil, time.Time{}
	}
	now := time.Now()
	next = now.Add(time.Minute)
	for _, i := range r.intents[connector] {
		switch {
		case i.under != nil, r.isBeingWritten(i):
		case i.next.After(now):
			next = earliest(next, i.next)
		case best == nil || i.Expires.Before(best.Expires):
			best = i
		}
	}
	if best != nil {
		best.under = make(chan struct{})
	}
	return best, next
}

// call makes one try to revoke a token.
func (r *revocations) call(i *intent, class share.Class) {
	var err error
	if i.isDeleted != nil {
		var deleted bool
		if deleted, err = i.isDeleted(r.ctx); err == nil {
			i.over, i.isDeleted = !deleted, nil // under guards both
		}
	}
	if err == nil && !i.over {
		err = r.try(i, class)
	}
	failure, limit := (*tokenservice.Failure)(nil), (*share.LimitError)(nil)
	isFailure := errors.As(err, &failure)
	ended := err == nil || isFailure && failure.Kind == tokenservice.Unsupported
	if ended {
		i.over = true // under guards it
		err = r.endIntent(r.ctx, i)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	close(i.under)
	i.under = nil
	if isFailure && (ended || r.intents[i.connector][i.id] == i) { // and was not dropped meanwhile
		r.note(i, failure.Text)
	}
	switch {
	case err == nil, errors.Is(err, errBeingWritten):
	case errors.As(err, &limit):
		i.next = earliest(limit.Until, i.Expires) // once its token has ended, it waits for nothing
	default:
		i.rest = min(max(2*i.rest, time.Second), longestRevocationRest)
		i.next = time.Now().Add(i.rest)
	}
}

// note keeps why the last call for a tenant failed; "" where it did not. The caller holds mu.
func (r *revocations) note(i *intent, text string) {
	for _, about := range []string{i.connector, i.connector + "/" + i.Tenant} {
		if text == "" {
			delete(r.errors, about)
		} else {
			r.errors[about] = text
		}
	}
}

// try makes one call. It returns nil where the token is not valid any more, or past its end.
func (r *revocations) try(i *intent, class share.Class) error {
	via, err := r.connectors.get(r.ctx, i.connector)
	if err != nil && time.Now().Before(i.Expires) {
		return err
	}
	revoker, ok := tokenservice.Revoker(nil), false
	if via != nil {
		revoker, ok = via.service.(tokenservice.Revoker)
	}
	if !ok || !i.isWanted(via.about) || !time.Now().Before(i.Expires) {
		return nil
	}
	p := passage{via: via, want: share.Want{Class: class}}
	if class == share.Revocation {
		p.want.Wait = hopPatience
	}
	// The connection may take a while: a request that cannot be sent before the token's last moments is not sent.
	ctx, cancel := context.WithDeadline(r.ctx, i.Expires)
	defer cancel()
	err = revoker.Revoke(ctx, i.Token, i.Type, func(ctx context.Context) (func(), error) {
		done, err := p.permit(ctx)
		if err != nil {
			return nil, err
		}
		if err := r.begin(i); err != nil {
			done() // it has waited too long
			return nil, err
		}
		return done, nil
	})
	r.ended(i, err)
	switch {
	case errors.Is(err, errNotWanted):
		return nil
	case err == nil || errors.As(err, new(*tokenservice.Failure)):
		r.connectors.judge(via, err)(r.ctx)
	}
	return err
}

var (
	errNotWanted    = errors.New("the token has ended, or is in use again")
	errBeingWritten = errors.New("the refresh token is being written")
)

// begin notes that an intent's call is made now, if the token is to be revoked still.
func (r *revocations) begin(i *intent) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.isBeingWritten(i): // it is spared if the write is stored
		return errBeingWritten
	case i.spared || !time.Now().Before(i.Expires):
		return errNotWanted
	}
	r.calls[i] = time.Now()
	return nil
}

// isBeingWritten says whether the intent's refresh token is being written. The caller holds mu.
func (r *revocations) isBeingWritten(i *intent) bool {
	return i.Type == tokenservice.TypeRefreshToken && r.writes[i.Token] > 0
}

// ended notes that an intent's call has ended, if it was made.
func (r *revocations) ended(i *intent, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if made, ok := r.calls[i]; ok {
		delete(r.calls, i)
		r.slow[i.connector] = err != nil || time.Since(made) > quickRevocation
	}
}

// heldOf says of which tenants a connector's access tokens are held, and when the last of these tokens ends.
func (r *revocations) heldOf(connector string) (tenants []string, until time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for key, h := range r.records {
		if h.Connector == connector && time.Now().Before(h.Expires) {
			tenant, _, _ := strings.Cut(key, "/")
			tenants = append(tenants, tenant)
			until = latest(until, h.Expires)
		}
	}
	slices.Sort(tenants)
	return slices.Compact(tenants), until
}

// pendingOf says how many revocations of a connector wait, and why the last call failed.
func (r *revocations) pendingOf(connector string) (pending int, lastError string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.intents[connector]), r.errors[connector]
}

// pendingOfTenant is pendingOf for one tenant, which may have revocations waiting at connectors that it has left.
func (r *revocations) pendingOfTenant(connector, tenant string) (pending int, lastError string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	lastError = r.errors[connector+"/"+tenant]
	for at, of := range r.intents {
		for _, i := range of {
			if i.Tenant != tenant {
				continue
			}
			pending++
			if lastError == "" {
				lastError = r.errors[at+"/"+tenant]
			}
		}
	}
	return pending, lastError
}

// drop forgets the intents of a connector that are not wanted any more, and says how many of them are not being sent.
func (r *revocations) drop(ctx context.Context, connector string, about tokenservice.About) (dropped int, err error) {
	_ = r.load(ctx) // what storage cannot give now is not counted, and dropped once it is read
	r.mu.Lock()
	all := slices.Collect(maps.Values(r.intents[connector]))
	r.mu.Unlock()
	for _, i := range all {
		if i.isWanted(about) {
			continue
		}
		r.mu.Lock()
		_, sent := r.calls[i]
		r.mu.Unlock()
		if err := r.endIntent(ctx, i); err != nil {
			return dropped, err
		}
		if !sent {
			dropped++
		}
	}
	return dropped, nil
}

// load reads what storage has into memory, unless that has been done. It does not read again what memory has already: a load that ends with
// its caller leaves the rest to the next one.
func (r *revocations) load(ctx context.Context) error {
	r.mu.Lock()
	loaded, told := r.loaded, r.told
	r.mu.Unlock()
	if loaded {
		return nil
	}
	err := readBelow(ctx, r, intentPrefix, func(key string) bool {
		connector, id, _ := strings.Cut(key, "/")
		return r.intents[connector][id] != nil
	}, func(key string, i *intent) {
		i.connector, i.id, _ = strings.Cut(key, "/")
		i.isDeleted = r.isGone(i)
		correctLife(&i.Obtained, &i.Expires)
		if i.Type == tokenservice.TypeRefreshToken {
			i.Expires = earliest(i.Expires, time.Now().Add(refreshTokenTries))
		}
		// An intent that was read before another node's write was announced may be out of date: the next tick reads it again. One that was
		// deleted after another load had ended must not come back.
		if r.told == told && !r.loaded && r.intents[i.connector][i.id] == nil && !r.deleted[key] {
			r.add(i)
		}
	})
	if err != nil {
		return err
	}
	err = readBelow(ctx, r, heldPrefix, func(key string) bool {
		_, known := r.records[key]
		return known
	}, func(key string, h *held) {
		correctLife(&h.Obtained, &h.Expires)
		r.records[key] = held{Connector: h.Connector, Expires: h.Expires}
	})
	if err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.told != told {
		return nil
	}
	r.loaded = true
	clear(r.deleted)
	return nil
}

// tick wakes the workers, and sweeps the records of tokens that have ended. With nothing pending it reads no storage.
func (r *revocations) tick() {
	if !r.node.WriteSafeReplicationState() {
		return
	}
	r.wakeAll()
	r.mu.Lock()
	var over []string
	for key, h := range r.records {
		if time.Now().After(h.Expires) {
			over = append(over, key)
		}
	}
	r.mu.Unlock()
	for _, key := range over {
		if r.release(r.ctx, key) != nil {
			return // the next tick tries again
		}
	}
}

// invalidate drops what another node has changed.
func (r *revocations) invalidate(key string) {
	if !strings.HasPrefix(key, intentPrefix) && !strings.HasPrefix(key, heldPrefix) {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.readAgain()
	clear(r.intents)
	clear(r.records)
}

// readBelow reads what storage has two levels below a prefix, but for what memory knows, some at once. It calls known and take with the lock
// of the revocations, and take with what can be used.
func readBelow[T any](ctx context.Context, r *revocations, prefix string, known func(key string) bool, take func(key string, entry *T)) error {
	keys, err := listBelow(ctx, r.storage, prefix)
	if err != nil {
		return err
	}
	return forEach(keys, func(key string) error {
		r.mu.Lock()
		skip := known(key)
		r.mu.Unlock()
		if skip {
			return nil
		}
		entry, err := getEntry[T](ctx, r.storage, prefix+key)
		if entry == nil {
			return ignoreUnusable(err)
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		take(key, entry)
		return nil
	})
}

// listBelow lists the keys two levels below a prefix.
func listBelow(ctx context.Context, s logical.Storage, prefix string) (keys []string, err error) {
	folders, err := s.List(ctx, prefix)
	if err != nil {
		return nil, storageError(err)
	}
	for _, folder := range folders {
		below, err := s.List(ctx, prefix+folder)
		if err != nil {
			return nil, storageError(err)
		}
		for _, key := range below {
			keys = append(keys, folder+key)
		}
	}
	return keys, nil
}

// isGone says whether a tenant has given up an intent's token: the flow that stored the intent changes or deletes the tenant after that,
// and may be slow, fail, or have ended with its process. It waits for that flow, and gives up an access token that the tenant has still.
func (r *revocations) isGone(i *intent) doubtfulDelete {
	return func(ctx context.Context) (bool, error) {
		if i.Type == tokenservice.TypeAccessToken {
			_, err := r.tenants.giveUp(ctx, i.Tenant, i.id)
			return true, ignoreUnusable(err)
		}
		t, v, err := r.tenants.load(ctx, i.Tenant)
		// The exchanges of a tenant whose delete has failed replace its refresh token, and keep its lineage.
		return t == nil || v.entry.Lineage != i.Lineage && v.entry.RefreshToken != i.Token, ignoreUnusable(err)
	}
}

// forEach calls f for each key, some at once.
func forEach(keys []string, f func(key string) error) error {
	var readers errgroup.Group
	readers.SetLimit(storageReaders)
	for _, key := range keys {
		readers.Go(func() error { return f(key) })
	}
	return readers.Wait()
}

// resolveUnleased makes sure that an access token for one lease is revoked where the lease's own record has never come.
func (ts *tenants) resolveUnleased(ctx context.Context, t *tenant, e *tenantEntry) error {
	if t.wasIssued(e.Unleased.Generation) {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, storeWithin)
	defer cancel()
	if held, err := ts.revocations.holds(ctx, t.name, e.Unleased.Generation); held || err != nil {
		return ignoreUnusable(err)
	}
	return ts.revocations.revokeLater(ctx, e.Connector, t.name, e.Unleased)
}

// resolved notes that an access token's intent is in storage: if the token is the one of a tenant's entry whose own record had not come,
// the next exchange does not give it up again.
func (ts *tenants) resolved(name, generation string) {
	t := ts.named(name)
	if t == nil {
		return
	}
	if e := t.view.Load().entry; e != nil && e.Unleased != nil && e.Unleased.Generation == generation {
		t.noteIssued(generation)
	}
}
