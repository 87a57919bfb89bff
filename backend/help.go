package backend

// The texts of "vault path-help".
const (
	backendHelp = `
This secrets engine keeps refresh tokens, of Microsoft Kaizala or of any OAuth
2.0 authorization server, and hands out access tokens. The connector's owner
writes config, a tenant user writes tenants/<tenant>, and apps read
creds/<tenant>; each sees nothing of the others' secrets.
`
	configHelp = `
A connector acts for tenant users at a token service. Its ID and secret come from
Kaizala's portal, or from the client registration at an authorization server. The
path config is the connector named default; config/<connector> is a further one.
connector_id and connector_secret are for the connector's owner. All other fields
decide where refresh tokens are sent and what is done with them, so only the Vault
operator should write them: the policy of the connector's owner withholds them with
allowed_parameters.
`
	tenantListHelp = `
Lists the names of all tenants. key_info has the status of each, its connector and,
where it is known, the end of its refresh token. A monitor needs only this read, and
it shows no secret.
`
	tenantHelp = `
The tenant user writes a refresh token here, or grants access by authorize, device
or pin. No request can read the refresh token back. The engine replaces it with
each new one that the service sends. A read shows the settings and the status. Where
something is wrong, it says who has to do what.
`
	refreshHelp = `
Exchanges the refresh token now, even during the tenant's backoff or when the tenant
is rejected, but within the service's limits. From then on the new access token is
handed out: this is the sure way to retire an access token. Where the connector says
that the service can revoke access tokens, the previous one is revoked.
`
	authorizeHelp = `
A write returns a URL. The person who grants access opens it in a browser within ten
minutes, logs in at the service and allows what it asks. The service sends the
browser back to the mount's callback, and the engine fetches the refresh token
itself: no person, shell or browser ever holds it. A read says how it has ended.
`
	deviceHelp = `
A write returns a short code and an address. A person opens the address on any
device, enters the code and allows what the service asks. Meanwhile the engine asks
the service every few seconds. A read says how it has ended.
`
	pinHelp = `
Kaizala sends a PIN to the user's phone. For the PIN the engine gets the refresh
token itself. A write of mobile_number has the PIN sent; a write of pin within
ten minutes completes the login. A PIN that was mistyped can be written again.
`
	callbackHelp = `
A person starts with tenants/<tenant>/authorize, and the authorization server then
sends the browser here. The path needs no Vault token, because a browser has none.
The state protects it: 256 random bits that work once. A read answers with a page; a
write, for a person who pastes what the browser shows, answers with JSON.
`
	credsHelp = `
All readers get the same access token while it is usable. Each has a lease of its
own, which ends before the token does. When the last live lease is revoked before
its end, the token is never handed out again (see retire_on_revoke of the tenant);
it is also revoked at the service where the connector says that this can be done.
Elsewhere, and at Kaizala, a token that was handed out works until it expires. A
lease is not renewed once the engine has ended its token at the service: read a new
one.
`
	tokenHelp = `
The access token that creds/<tenant> hands out, without a lease, for programs that
read it with each of their own requests. ttl says when a read is sure to return a
newer one; Vault Agent and the Vault Secrets Operator schedule by it.
`
)
