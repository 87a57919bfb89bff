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
Kaizala's portal, or from an authorization server's client registration. The path
config is the connector named default; config/<connector> is a further one. All
fields but connector_id and connector_secret decide where refresh tokens are sent
and what is done with them: they are the Vault operator's to write, and the policy
of the connector's owner withholds them with allowed_parameters.
`
	tenantListHelp = `
Names every tenant. In key_info each has its status, its connector and, where it
is known, the end of its refresh token: what a monitor needs, in one read, with
no secret in it.
`
	tenantHelp = `
The tenant user writes a refresh token here, or grants access by authorize, device
or pin. No request can read the refresh token back. The engine replaces it with
each new one that the service sends. A read shows the settings, the status, and
who has to do what where something is wrong.
`
	refreshHelp = `
Exchanges the refresh token now, whatever the tenant's backoff or a rejection
say, but within the service's limits. From then on the new access token is handed
out: this is the sure way to retire an access token. Where the service can revoke
access tokens, the connector says so, and the one of before is revoked.
`
	authorizeHelp = `
A write returns a URL. The person who grants access opens it in a browser, logs in
at the service and allows what it asks; the service sends the browser back to the
mount's callback, and the engine gets the refresh token itself. Nobody else ever
holds it. A read says what has become of that. Ten minutes are left for it.
`
	deviceHelp = `
A write returns a short code and an address. A person opens the address on any
device, enters the code and allows what the service asks; meanwhile the engine asks
the service every few seconds. A read says what has become of that.
`
	pinHelp = `
Kaizala sends a PIN to the user's phone and takes it for a refresh token, which the
engine gets itself. A write of mobile_number has the PIN sent; a write of pin within
ten minutes completes the login. A PIN that was mistyped can be written again.
`
	callbackHelp = `
The authorization server sends the browser of a person here, who has begun with
tenants/<tenant>/authorize. It needs no Vault token, because a browser has none: the
state, 256 random bits that work once, is what counts. A read is answered with a
page; a write, by somebody who pastes what the browser shows, with JSON.
`
	credsHelp = `
Every reader gets the same access token while it is usable, each with a lease of
its own that ends before the token does. When the last live lease is revoked
before its end, the token is never handed out again, and is revoked at the service
where the connector says that this can be done. Kaizala cannot revoke a token:
until it expires it works.
`
	tokenHelp = `
The access token that creds/<tenant> hands out, without a lease, for readers that
come with each of their own requests. ttl says when a read is sure to return a
newer one; Vault Agent and the Vault Secrets Operator schedule by it.
`
)
