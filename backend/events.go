package backend

import (
	"context"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/sdk/logical"
)

// Events about tenants, as Vault's subscribers see them.
const (
	eventRotated  = "kaizala/tenant-rotated"  // the service has replaced the refresh token
	eventRejected = "kaizala/tenant-rejected" // the service refuses the refresh token
	eventExpiring = "kaizala/tenant-expiring" // the refresh token ends before it can be replaced
)

// announcer tells the log, and Vault's events, of changes of state: one line for each.
type announcer struct {
	log    func() hclog.Logger
	events logical.EventSender
	about  func(connector string) (name string)
	ctx    context.Context   // the engine's
	work   func(func()) bool // runs a function in a goroutine that the engine's end waits for
}

func (a *announcer) rotated(tenant string, e *tenantEntry) {
	a.log().Info("the refresh token of a tenant was replaced", "tenant", tenant, "connector", e.Connector, "service", a.about(e.Connector))
	a.send(eventRotated, tenant, e.Connector)
}

func (a *announcer) rejected(tenant string, e *tenantEntry) {
	a.log().Error("the service refuses a tenant's refresh token: its tenant user has to write a new one", "tenant", tenant, "connector", e.Connector, "service", a.about(e.Connector))
	a.send(eventRejected, tenant, e.Connector)
}

func (a *announcer) expiring(tenant string, e *tenantEntry, reason string) {
	a.log().Warn("a tenant's refresh token ends soon, and the service has not replaced it", "tenant", tenant, "connector", e.Connector, "reason", reason)
	a.send(eventExpiring, tenant, e.Connector)
}

func (a *announcer) failed(tenant, connector string, t *trouble) {
	a.log().Warn("an exchange failed and will be tried again", "tenant", tenant, "connector", connector, "reason", t.text, "next_try", t.until.UTC().Format(time.RFC3339))
}

func (a *announcer) recovered(tenant, connector string) {
	a.log().Info("exchanges of a tenant succeed again", "tenant", tenant, "connector", connector)
}

func (a *announcer) lost(tenant, connector string) {
	a.log().Error("a new refresh token could not be stored before the engine stopped, and is lost: its tenant user may have to write another", "tenant", tenant, "connector", connector)
}

func (a *announcer) connectorRefused(via *loadedConnector) {
	a.log().Error("the service refuses a connector: its owner has to write the right connector_id and connector_secret; until then one exchange every 10 minutes tries it", "connector", via.name, "service", via.about.Name)
}

func (a *announcer) connectorAccepted(via *loadedConnector) {
	a.log().Info("the service accepts a connector again", "connector", via.name, "service", via.about.Name)
}

// send sends an event. No reader and no lock waits for that, except while the engine stops: then for a second at most. An error is
// ignored: Vault may have no events.
func (a *announcer) send(event, tenant, connector string) {
	send := func(ctx context.Context) {
		_ = logical.SendEvent(ctx, a.events, event, "tenant", tenant, "connector", connector, logical.EventMetadataPath, tenantPrefix+tenant)
	}
	if a.work(func() { send(a.ctx) }) {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(a.ctx), time.Second) // the engine stops: its own context may have ended
	defer cancel()
	send(ctx)
}
