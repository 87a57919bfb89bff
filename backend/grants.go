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

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/tokenservice"
)

// A person grants access by one of the paths authorize, device and pin. Each start of one is an attempt, which is in storage
// until it has ended, so that any node goes on with it. An attempt notes the lineage that its tenant had when it began and the
// one that the tenant will have by it. So even where an attempt's entry is lost or out of date, the tenant's own entry says whether the
// attempt was granted, or whether a write or a delete has ended it.

const (
	attemptPrefix = "attempts/"
	// attemptKeys is where storage keeps the attempts of a tenant, under its name.
	attemptKeys = attemptPrefix + "tenants/"
	// stateKeys is where storage keeps which tenant a state belongs to, under the state's SHA-256.
	stateKeys = attemptPrefix + "states/"

	// attemptLife is how long a person has, where the service does not say.
	attemptLife = 10 * time.Minute
	// longestAttempt is longer than any attempt lasts. An attempt that seems to end later was started while the clock was wrong.
	longestAttempt = 25 * time.Hour
	// statesKnown is how long a state is kept after its attempt's end, so that a callback can tell it from an unknown one.
	statesKnown = time.Hour
	// attemptsKnown is how long the attempts of a tenant that does not exist are kept after their end.
	attemptsKnown = day
)

// The paths by which access is granted.
const (
	byCode   = "authorize"
	byDevice = "device"
	byPIN    = "pin"
)

// The statuses of an attempt.
const (
	attemptPending    = "pending"
	attemptGranted    = "granted"
	attemptDenied     = "denied"
	attemptExpired    = "expired"
	attemptFailed     = "failed"
	attemptSuperseded = "superseded" // by a newer attempt, a write of the tenant, or its delete
)

// attempts are the attempts of a tenant as storage keeps them: the last one by each path. At most one of them is pending.
type attempts struct {
	Format int                 `json:"format"`
	Last   map[string]*attempt `json:"last"`
}

// attempt is one try of a person to grant access.
type attempt struct {
	ID        string `json:"id"`
	Path      string `json:"path"`
	Tenant    string `json:"tenant"`
	Connector string `json:"connector"`
	// Server is the connector's address at which the attempt began: see [loadedConnector.server]. It is empty in older entries.
	Server  string    `json:"server,omitempty"`
	By      string    `json:"by"` // the display name of the Vault token that has started it
	Begun   time.Time `json:"begun"`
	Expires time.Time `json:"expires"`
	Status  string    `json:"status"`
	Error   string    `json:"error,omitempty"` // why it failed
	// Lineage is the tenant's lineage when the attempt began. Next is the lineage that the grant gives the tenant.
	Lineage string `json:"lineage"`
	Next    string `json:"next"`

	// State is the SHA-256 of the state, in hexadecimal. Used: the code is being sent, or was. Code is the one that a person
	// has been asked to confirm.
	State       string `json:"state,omitempty"`
	Callback    string `json:"callback,omitempty"` // the connector in the callback's path, "" where it has none
	RedirectURI string `json:"redirect_uri,omitempty"`
	Verifier    string `json:"verifier,omitempty"`
	Code        string `json:"code,omitempty"`
	Used        bool   `json:"used,omitempty"`

	DeviceCode string        `json:"device_code,omitempty"`
	Interval   time.Duration `json:"interval,omitempty"`

	MobileNumber string `json:"mobile_number,omitempty"`
}

// comesFrom says whether what an attempt waits for comes from the server that a connector is for now. It is of use to no other server, which
// could misuse it (RFC 9700, section 4.4).
func (a *attempt) comesFrom(via *loadedConnector) bool {
	return a.Server == "" || a.Server == via.server(a.Path)
}

// connectorHasMoved is the result of an attempt whose connector is for another server now.
func (a *attempt) connectorHasMoved() tokenservice.Result {
	return tokenservice.Result{Err: &tokenservice.Failure{Text: "Connector \"" + a.Connector + "\" is for another service now: start again."}}
}

// close ends an attempt, and forgets what only a pending one needs.
func (a *attempt) close(status, text string) {
	a.Status, a.Error = status, text
	a.Verifier, a.Code, a.DeviceCode, a.MobileNumber = "", "", "", ""
}

// stateEntry has the tenant of a state, and its status.
type stateEntry struct {
	Format   int       `json:"format"`
	Tenant   string    `json:"tenant"`
	Callback string    `json:"callback"`
	Expires  time.Time `json:"expires"`
	Status   string    `json:"status"` // as far as is known: the attempt itself decides
	Used     bool      `json:"used,omitempty"`
}

// grants is what memory has of attempts: those that are worked on, and when each is to be checked. Their entries are in storage alone.
type grants struct {
	attending sync.Mutex // held while [backend.attendGrants] runs
	mu        sync.Mutex
	locks     map[string]*attemptsLock // by tenant, while a flow holds or awaits it
	working   map[string]bool          // attempts, by ID, whose code, device code or PIN is on its way or has come through
	due       map[string]time.Time     // tenants whose attempts need a look then
	forget    map[string]time.Time     // states, by SHA-256, that storage forgets then
	polls     map[string]*poll         // by tenant
	loaded    bool
}

func newGrants() *grants {
	return &grants{
		locks: map[string]*attemptsLock{}, working: map[string]bool{}, due: map[string]time.Time{},
		forget: map[string]time.Time{}, polls: map[string]*poll{},
	}
}

// attemptsLock is the right to change a tenant's attempts.
type attemptsLock struct {
	lock
	users int // how many hold the lock or wait for it; the grants' mu guards it
}

// lock takes the right to change a tenant's attempts. A lock that no flow uses is not kept, because any name can be asked for.
func (g *grants) lock(ctx context.Context, tenant string) (release func(), err error) {
	g.mu.Lock()
	l := g.locks[tenant]
	if l == nil {
		l = &attemptsLock{}
		g.locks[tenant] = l
	}
	l.users++
	g.mu.Unlock()
	leave := func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		if l.users--; l.users == 0 {
			delete(g.locks, tenant)
		}
	}
	if err := l.acquire(ctx); err != nil {
		leave()
		return nil, err
	}
	return func() {
		l.release()
		leave()
	}, nil
}

// claim makes the caller the only one who works on an attempt, until leave.
func (g *grants) claim(id string) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.working[id] {
		return false
	}
	g.working[id] = true
	return true
}

func (g *grants) leave(id string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.working, id)
}

func (g *grants) works(id string) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.working[id]
}

// note notes when the attempts of a tenant are to be checked, and when a state is to be deleted.
func (g *grants) note(a *attempt) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if a.Status == attemptPending {
		g.due[a.Tenant] = earliest(g.due[a.Tenant], a.Expires)
	}
	if a.State != "" {
		g.forget[a.State] = a.Expires.Add(statesKnown)
	}
}

// invalidate handles the change of an attempt by another node: all attempts are read again when this node is the active node.
func (g *grants) invalidate(key string) {
	if strings.HasPrefix(key, attemptPrefix) {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.loaded = false
	}
}

// lookAt makes the next sweep check a tenant's attempts.
func (g *grants) lookAt(tenant string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.due[tenant] = time.Now()
}

// storedLineage is the tenant's lineage as storage has it.
func (v *tenantView) storedLineage() string {
	if v.entry == nil {
		return noLineage
	}
	return v.entry.Lineage
}

// keeps says whether memory has the grant of an attempt, and storage has not taken it yet.
func (v *tenantView) keeps(a *attempt) bool {
	return v.kept != nil && v.kept.change != nil && v.kept.change.lineage == a.Next
}

// statusOf returns the status of an attempt, from its entry and its tenant's entry.
func (b *backend) statusOf(a *attempt, v *tenantView) (status, text string) {
	now := time.Now()
	switch lineage := v.storedLineage(); {
	case a.Status != attemptPending:
		return a.Status, a.Error
	case lineage == a.Next:
		return attemptGranted, ""
	case v.keeps(a):
		return attemptPending, ""
	case lineage != a.Lineage:
		return attemptSuperseded, ""
	case b.grants.works(a.ID):
		return attemptPending, ""
	case a.Used:
		return attemptFailed, "The engine stopped while it waited for the service, so the service's answer is unknown: start again."
	case !now.Before(a.Expires), a.Expires.Sub(now) > longestAttempt:
		return attemptExpired, ""
	}
	return attemptPending, ""
}

// attemptsOf reads a tenant's attempts.
func (b *backend) attemptsOf(ctx context.Context, tenant string) (*attempts, error) {
	all, err := getEntry[attempts](ctx, b.storage, attemptKeys+tenant)
	if all == nil {
		all = &attempts{}
	}
	if all.Last == nil {
		all.Last = map[string]*attempt{}
	}
	return all, err
}

// changeAttempts has f change a tenant's attempts, and stores what has changed. It runs to its end when the caller goes away.
func (b *backend) changeAttempts(ctx context.Context, tenant string, f func(*attempts) error) error {
	release, err := b.grants.lock(ctx, tenant)
	if err != nil {
		return err
	}
	defer release()
	all, err := b.attemptsOf(ctx, tenant)
	if err != nil {
		return err
	}
	before := map[string]attempt{}
	for path, a := range all.Last {
		before[path] = *a
	}
	err = f(all)
	if err != nil || maps.EqualFunc(before, all.Last, func(was attempt, a *attempt) bool { return was == *a }) {
		return err
	}
	return b.putAttempts(ctx, tenant, all)
}

// putAttempts stores a tenant's attempts. Where there are none any more, it deletes their entry. The caller has the lock.
func (b *backend) putAttempts(ctx context.Context, tenant string, all *attempts) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), storeWithin)
	defer cancel()
	if len(all.Last) == 0 {
		return storageError(b.storage.Delete(ctx, attemptKeys+tenant))
	}
	all.Format = entryFormat
	if err := putEntry(ctx, b.storage, attemptKeys+tenant, all); err != nil {
		return err
	}
	for _, a := range all.Last {
		if a.Status != attemptPending || a.Used {
			b.noteState(ctx, a)
		}
	}
	return nil
}

// noteState stores the status of the attempt in the entry of its state, so that the next callback with the state needs one read. A
// failure of storage is ignored, because the status in the attempt's own entry decides.
func (b *backend) noteState(ctx context.Context, a *attempt) {
	b.grants.mu.Lock()
	_, known := b.grants.forget[a.State]
	b.grants.mu.Unlock()
	if !known {
		return // it was noted long ago, or has none
	}
	ctx, cancel := context.WithTimeout(ctx, storeWithin)
	defer cancel()
	s, _ := getEntry[stateEntry](ctx, b.storage, stateKeys+a.State)
	if s == nil || s.Status == a.Status && s.Used == a.Used {
		return
	}
	s.Status, s.Used = a.Status, a.Used
	_ = putEntry(ctx, b.storage, stateKeys+a.State, s)
}

// begin makes an attempt its tenant's pending one. It ends the one before. The error of an attempt whose tenant was written meanwhile
// tells the person to start again: a write of the tenant, or a grant, would have ended it already.
func (b *backend) begin(ctx context.Context, a *attempt) error {
	var before, device *attempt
	err := b.changeAttempts(ctx, a.Tenant, func(all *attempts) error {
		_, v, err := b.tenants.load(ctx, a.Tenant)
		switch {
		case err != nil:
			return err
		case v.kept != nil && v.kept.granted():
			return keptTrouble(a.Tenant)
		case v.storedLineage() != a.Lineage:
			return tryAgain("tenant %q was written or deleted meanwhile: nothing was begun; start again", a.Tenant)
		}
		b.grants.note(a) // before the write: storage may have the state though it says otherwise
		if a.State != "" {
			s := &stateEntry{Format: entryFormat, Tenant: a.Tenant, Callback: a.Callback, Expires: a.Expires, Status: attemptPending}
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), storeWithin)
			defer cancel()
			if err := putEntry(ctx, b.storage, stateKeys+a.State, s); err != nil {
				return err
			}
		}
		for _, old := range all.Last {
			b.supersede(old, v)
		}
		before, device = all.Last[a.Path], all.Last[byDevice]
		all.Last[a.Path] = a
		return nil
	})
	if err != nil {
		return err // what was pending may be so still
	}
	if device != nil {
		b.grants.stopPolling(a.Tenant, device.ID)
	}
	if before != nil {
		b.noteState(context.WithoutCancel(ctx), before)
	}
	return nil
}

// supersede ends an attempt that is pending still. An attempt whose answer is unknown is superseded as well: a delete may have dropped a
// grant that only memory had.
func (b *backend) supersede(a *attempt, v *tenantView) {
	if a.Status != attemptPending {
		return
	}
	switch status, _ := b.statusOf(a, v); status {
	case attemptGranted, attemptExpired:
		a.close(status, "")
	default:
		a.close(attemptSuperseded, "")
	}
}

// endAttempts ends what is pending for a tenant that an operator has written or deleted. The tenant's entry says the same by
// now, so an attempt whose entry cannot be changed has ended too; what it keeps goes with the next sweep.
func (b *backend) endAttempts(ctx context.Context, tenant string) error {
	b.grants.stopPolling(tenant, "")
	b.grants.mu.Lock()
	_, pending := b.grants.due[tenant]
	pending = pending || !b.grants.loaded
	b.grants.mu.Unlock()
	if !pending {
		return nil
	}
	_, v, err := b.tenants.load(ctx, tenant)
	if err != nil {
		return ignoreUnusable(err)
	}
	err = b.changeAttempts(ctx, tenant, func(all *attempts) error {
		for _, a := range all.Last {
			b.supersede(a, v)
		}
		return nil
	})
	if errors.Is(err, context.DeadlineExceeded) {
		return nil // what an attempt has brought is being stored, and is found to be superseded
	}
	return ignoreUnusable(err)
}

// forgetUnreadable deletes the attempts of a deleted tenant if they cannot be read: with them no new attempt could begin.
func (b *backend) forgetUnreadable(ctx context.Context, tenant string) error {
	release, err := b.grants.lock(ctx, tenant)
	if err != nil {
		return nil // they are being stored, and so were read
	}
	defer release()
	if _, err := b.attemptsOf(ctx, tenant); !errors.Is(err, errUnreadable) {
		return nil
	}
	return storageError(b.storage.Delete(ctx, attemptKeys+tenant))
}

// grantedMeanwhile says whether a tenant that has been deleted is there again by an attempt that began before the delete: the grant was
// stored after the tenant was removed and before its attempts were ended.
func (b *backend) grantedMeanwhile(ctx context.Context, tenant string, begun time.Time) bool {
	_, v, err := b.tenants.load(ctx, tenant)
	if err != nil {
		return false
	}
	all, err := b.attemptsOf(ctx, tenant)
	if err != nil {
		return false
	}
	for _, a := range all.Last {
		if a.Next == v.storedLineage() && a.Begun.Before(begun) {
			return true
		}
	}
	return false
}

// finish stores what a service has given for an attempt, if that is still its tenant's pending one, and ends it. An access
// token that is not kept is given up.
func (b *backend) finish(of *attempt, via *loadedConnector, r tokenservice.Result) (status, text string) {
	tenant := of.Tenant
	release, err := b.grants.lock(b.ctx, tenant)
	if err != nil {
		return attemptPending, "" // the engine stops
	}
	defer release()
	reads, writes := 0, 0 // how often they are repeated
	if of.Path == byDevice {
		reads, writes = endTries, endTries
	}
	if r.RefreshToken != "" {
		reads = grantTries // it is nowhere else
	}
	var all *attempts
	err = b.insist(reads, func() (err error) {
		all, err = b.attemptsOf(b.ctx, tenant)
		return err
	})
	a := all.byID(of.ID)
	switch {
	case err != nil:
		b.abandon(tenant, via, r)
		return attemptFailed, "Vault's storage failed: start again."
	case a == nil: // a newer one has taken its place
		b.abandon(tenant, via, r)
		return attemptSuperseded, ""
	case a.Status != attemptPending:
		b.abandon(tenant, via, r)
		if all.newest() == a {
			b.abandonDeleted(tenant, via, r.RefreshToken, r.Facts)
		}
		return a.Status, a.Error
	}
	if status, text = b.storeTokens(a, via, r); status == attemptPending {
		return status, text
	}
	a.close(status, text)
	_ = b.insist(writes, func() error { return b.putAttempts(b.ctx, tenant, all) })
	// Where storage fails, the tenant's entry still shows that the attempt was granted, and the attempt's own entry that its code was used.
	return status, text
}

// insist calls f, and repeats it where storage fails, with longer and longer pauses. It returns the last error.
func (b *backend) insist(repeats int, f func() error) error {
	err := f()
	for pause := time.Second; err != nil && !errors.Is(err, errUnreadable) && repeats > 0 && b.rest(pause); pause, repeats = 2*pause, repeats-1 {
		err = f()
	}
	return err
}

func (all *attempts) byID(id string) *attempt {
	for _, a := range all.Last {
		if a.ID == id {
			return a
		}
	}
	return nil
}

// newest is the attempt that was begun last.
func (all *attempts) newest() (last *attempt) {
	for _, a := range all.Last {
		if last == nil || a.Begun.After(last.Begun) {
			last = a
		}
	}
	return last
}

// storeTokens stores the tokens of a result, and says what that makes of the attempt.
func (b *backend) storeTokens(a *attempt, via *loadedConnector, r tokenservice.Result) (status, text string) {
	failure := (*tokenservice.Failure)(nil)
	switch {
	case r.RefreshToken != "":
		status, text = b.storeGrant(a, via, r)
		if status == attemptFailed {
			b.abandon(a.Tenant, via, r)
		}
		return status, text
	case errors.As(r.Err, &failure):
		b.abandon(a.Tenant, via, r)
		switch failure.Kind {
		case tokenservice.Denied:
			return attemptDenied, ""
		case tokenservice.Expired:
			return attemptExpired, ""
		}
		text = failure.Text
		if failure.Kind == tokenservice.Unavailable || failure.Kind == tokenservice.Limited {
			text += " A code is sent once: start again in Vault."
		}
	default:
		text = "The engine stopped before the service had answered: start again."
	}
	return attemptFailed, text
}

// abandon gives up an access token that is not stored.
func (b *backend) abandon(tenant string, via *loadedConnector, r tokenservice.Result) {
	if r.AccessToken == nil {
		return
	}
	// Where storage fails, the token lives to its end.
	_ = b.revocations.revokeLater(b.ctx, via.name, tenant, &accessEntry{
		Token: r.AccessToken.Token, Generation: rand.Text(), Obtained: r.Sent, Expires: r.AccessToken.Expires,
	})
	b.revocations.wake(via.name)
}

// abandonDeleted gives up a refresh token whose tenant was deleted while the service was asked for it, as the delete did with the one
// that the tenant had. It does nothing where there is a tenant.
func (b *backend) abandonDeleted(tenant string, via *loadedConnector, token string, facts *tokenservice.Facts) {
	t, _, err := b.tenants.load(b.ctx, tenant)
	if token == "" || t != nil || err != nil {
		return
	}
	b.revocations.abandonRefreshToken(b.ctx, via.name, tenant, token, facts)
	b.revocations.wake(via.name)
}

// grantTries is how often the engine tries to store a grant. The tokens of a grant cannot be had again, but the person cannot wait for
// ever.
const grantTries = 6

// endTries is how often the engine repeats what stores the end of a device login that has brought nothing: 7 seconds. Requests for the
// tenant's attempts wait meanwhile.
const endTries = 3

// storeGrant stores a refresh token that a service has given, as a verified write of it: with the access token that came beside
// it, or else by an exchange.
func (b *backend) storeGrant(a *attempt, via *loadedConnector, r tokenservice.Result) (status, text string) {
	token := r.RefreshToken
	end, _ := b.revocations.beginWrite(b.ctx, token) // where the engine stops, the grant is stored without a wait
	defer end()
	change := &tenantChange{
		refreshToken: &token, connector: &a.Connector, verify: true, lineage: a.Next,
		grant: &grantOf{by: a.By, at: time.Now().UTC().Truncate(time.Millisecond), subject: r.Subject, from: a.Lineage, to: via.entry.ConnectorID, facts: r.Facts},
	}
	w := want{change: change}
	if r.Err == nil && r.AccessToken != nil {
		r.RefreshToken = "" // it is the change's
		w.result = &granted{via: via, result: r}
	}
	pause := time.Second
	var err error
	for range grantTries {
		err = b.tryGrant(a, w)
		kept := b.keeps(a)
		switch {
		case err == nil:
			return attemptGranted, ""
		case kept:
			return attemptPending, "" // memory has it, and storing it is tried again
		case errors.Is(err, errSuperseded):
			b.abandonDeleted(a.Tenant, via, token, r.Facts)
			b.revocations.wake(via.name) // what is not kept has been given up
			return attemptSuperseded, ""
		case isRejection(err):
			return attemptFailed, verifyError(b.connectors.about(a.Connector), a.Tenant, a.Connector, err).Error()
		}
		// The service has given its only good refresh token: it is stored unverified rather than lost.
		if w.result == nil || errors.Is(err, errStopping) {
			if b.storeUnasked(a, change) == nil {
				b.abandon(a.Tenant, via, r)
				return attemptGranted, ""
			}
		}
		if errors.As(err, new(logical.HTTPCodedError)) && !isTryAgain(err) || errors.Is(err, logical.ErrReadOnly) {
			break // another try cannot succeed
		}
		if !b.rest(pause) {
			break
		}
		pause *= 2
	}
	var coded logical.HTTPCodedError
	if errors.As(err, &coded) {
		return attemptFailed, "The service has granted access, but that could not be stored: " + coded.Error()
	}
	return attemptFailed, "The service has granted access, but Vault's storage did not take it: start again."
}

// rest waits, and says whether the engine goes on.
func (b *backend) rest(d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-b.ctx.Done():
		return false
	}
}

// isTryAgain says whether an error is one that passes.
func isTryAgain(err error) bool {
	var coded logical.HTTPCodedError
	return errors.As(err, &coded) && coded.Code() >= 429
}

func (b *backend) keeps(a *attempt) bool {
	t := b.tenants.named(a.Tenant)
	return t != nil && t.view.Load().keeps(a)
}

// tryGrant has the tenant's next flight store a grant. Its error is errSuperseded where the tenant is not what it was when the
// attempt began.
func (b *backend) tryGrant(a *attempt, w want) error {
	ctx := b.ctx
	if err := b.revocations.load(ctx); err != nil { // which the grant needs when it is stored
		return err
	}
	for {
		t, v, err := b.tenants.load(ctx, a.Tenant)
		if err != nil {
			return err
		}
		if v.storedLineage() != a.Lineage {
			if w.result != nil {
				b.abandon(a.Tenant, w.result.via, w.result.result)
			}
			return errSuperseded
		}
		via, err := b.prepare(ctx, v, w.change)
		if err != nil {
			return err
		}
		if err := via.binding.Acquire(ctx, 1); err != nil {
			return err
		}
		f, own, err := b.startVerified(ctx, a.Tenant, t, v, w)
		via.binding.Release(1)
		switch {
		case errors.Is(err, errSuperseded):
			continue // a write, a delete or an exchange has changed the tenant: look again
		case err != nil:
			return err
		}
		select {
		case <-f.done:
		case <-ctx.Done():
			return ctx.Err()
		}
		if own {
			return f.err
		}
	}
}

// storeUnasked stores a grant without asking the service.
func (b *backend) storeUnasked(a *attempt, change *tenantChange) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(b.ctx), storeWithin)
	defer cancel()
	via, err := b.connectors.of(ctx, a.Connector)
	if err != nil {
		return err
	}
	return b.storeUnverified(ctx, a.Tenant, via, change)
}

// attendGrants is called each minute: it goes on with what another process has begun, and ends what is over. With nothing
// pending it reads no storage.
func (b *backend) attendGrants() {
	if !b.node.WriteSafeReplicationState() {
		return
	}
	g := b.grants
	if !g.attending.TryLock() {
		return
	}
	defer g.attending.Unlock()
	g.mu.Lock()
	loaded := g.loaded
	g.mu.Unlock()
	if !loaded && b.loadAttempts() != nil {
		return // the next tick tries again
	}
	g.mu.Lock()
	tenants, states := dueNow(g.due), dueNow(g.forget)
	g.mu.Unlock()
	for _, name := range tenants {
		b.sweep(name)
	}
	for _, state := range states {
		ctx, cancel := context.WithTimeout(b.ctx, storeWithin)
		err := b.storage.Delete(ctx, stateKeys+state)
		cancel()
		if err != nil {
			return
		}
		g.mu.Lock()
		delete(g.forget, state)
		g.mu.Unlock()
	}
}

// dueNow returns the keys whose time has come.
func dueNow(due map[string]time.Time) (keys []string) {
	now := time.Now()
	for key, at := range due {
		if !at.After(now) {
			keys = append(keys, key)
		}
	}
	return keys
}

// loadAttempts notes what storage has of attempts, and goes on polling.
func (b *backend) loadAttempts() error {
	names, err := b.storage.List(b.ctx, attemptKeys)
	if err != nil {
		return storageError(err)
	}
	err = forEach(names, func(name string) error {
		all, err := b.attemptsOf(b.ctx, name)
		if err != nil {
			return ignoreUnusable(err)
		}
		b.goOn(name, all)
		return nil
	})
	if err != nil {
		return err
	}
	states, err := b.storage.List(b.ctx, stateKeys)
	if err != nil {
		return storageError(err)
	}
	err = forEach(states, func(state string) error {
		s, err := getEntry[stateEntry](b.ctx, b.storage, stateKeys+state)
		if s == nil {
			return ignoreUnusable(err)
		}
		b.grants.mu.Lock()
		defer b.grants.mu.Unlock()
		b.grants.forget[state] = earliest(s.Expires, time.Now().Add(longestAttempt)).Add(statesKnown)
		return nil
	})
	if err != nil {
		return err
	}
	b.grants.mu.Lock()
	defer b.grants.mu.Unlock()
	b.grants.loaded = true
	return nil
}

// goOn goes on with the attempts of a tenant that another process may have started, or of a tenant that does not exist any more.
func (b *backend) goOn(name string, all *attempts) {
	t := b.tenants.named(name)
	gone := t == nil || !t.view.Load().summary.stored
	for _, a := range all.Last {
		if a.Status != attemptPending && !gone {
			continue
		}
		b.grants.mu.Lock()
		b.grants.due[name] = earliest(b.grants.due[name], earliest(a.Expires, time.Now().Add(longestAttempt)))
		if a.Path == byDevice && a.Status == attemptPending && b.grants.polls[name] == nil {
			b.beginPolling(a) // the process before may have polled a moment ago
		}
		b.grants.mu.Unlock()
	}
}

// sweep ends a tenant's attempts whose time is over. Of a tenant that is not there storage forgets them a day later.
func (b *backend) sweep(name string) {
	ctx, cancel := context.WithTimeout(b.ctx, storeWithin)
	defer cancel()
	var next time.Time
	err := b.changeAttempts(ctx, name, func(all *attempts) error {
		t, v, err := b.tenants.load(ctx, name) // a grant may have been stored while this waited
		if err != nil {
			return err
		}
		now := time.Now()
		over := true
		for _, a := range all.Last {
			status, text := b.statusOf(a, v)
			switch {
			case a.Status != attemptPending:
			case status != attemptPending:
				a.close(status, text)
			default:
				next = earliest(next, latest(a.Expires, now.Add(time.Minute)))
			}
			over = over && now.After(a.Expires.Add(attemptsKnown))
		}
		switch {
		case t != nil || len(all.Last) == 0 || !next.IsZero():
		case !over:
			next = now.Add(attemptsKnown)
		default:
			clear(all.Last)
		}
		return nil
	})
	if ignoreUnusable(err) != nil {
		return // the next tick tries again
	}
	b.grants.mu.Lock()
	defer b.grants.mu.Unlock()
	if next.IsZero() {
		delete(b.grants.due, name)
	} else {
		b.grants.due[name] = next
	}
}

// pending returns a tenant's pending attempt by a path, or nil.
func (b *backend) pending(ctx context.Context, name, path string) (*attempt, error) {
	all, err := b.attemptsOf(ctx, name)
	if err != nil {
		return nil, err
	}
	_, v, err := b.tenants.load(ctx, name)
	if err != nil {
		return nil, err
	}
	if a := all.Last[path]; a != nil {
		if status, _ := b.statusOf(a, v); status == attemptPending {
			return a, nil
		}
	}
	return nil, nil
}

// scopesWithin returns the scopes to ask for: those of the request, or else all of the connector's.
func scopesWithin(asked, configured []string) ([]string, error) {
	if len(asked) == 0 {
		return configured, nil
	}
	allowed := map[string]bool{}
	for _, scope := range configured {
		allowed[scope] = true
	}
	for _, scope := range asked {
		if !allowed[scope] {
			return nil, badValue("each of scopes has to be one of the connector's: %s", orNone(slices.Sorted(maps.Keys(allowed))))
		}
	}
	return asked, nil
}
