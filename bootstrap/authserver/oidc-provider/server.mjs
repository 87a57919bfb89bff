#!/usr/bin/env node
// panva's oidc-provider on a loopback address: an authorization server that others wrote, for tests and for trying the
// engine. This file is its configuration, a store without a limit, and what counts.
//
// Settings come from the environment:
//
//   PORT            the port to listen on; 0, the default, takes any free one
//   CLIENT_ID       the client that is registered; default engine
//   CLIENT_SECRET   its secret; the default has characters that Basic authentication has to encode (RFC 6749 §2.3.1)
//   REDIRECT_URIS   where the client may have browsers sent back, separated by spaces
//   ACCESS_TTL      an access token's life in seconds; default 3600
//   REFRESH_TTL     a refresh token's and its grant's life in seconds; default 86400
//   ROTATE          always (default): each exchange replaces the refresh token; never; default: the library's own rule
//   REVOKE_CASCADE  default: revoking an access token ends its grant, as the library does; access-only: it ends alone
//   ACCESS_FORMAT   opaque (default), or jwt: access tokens that cannot be revoked
//
// When it is ready it prints one line of JSON: the endpoints, the client, a user who can log in, and two addresses that are
// not OAuth: a POST to mint answers with the refresh token of a new grant, a GET of stats with what was counted.
import { createServer } from 'node:http';
import { Provider } from 'oidc-provider';

const env = (name, otherwise) => process.env[name] || otherwise;

function fail(message) {
  console.error(`oidc-provider: ${message}`);
  process.exit(1);
}

function choice(name, ...values) {
  const value = env(name, values[0]);
  if (!values.includes(value)) fail(`${name} is one of ${values.join(', ')}`);
  return value;
}

function seconds(name, otherwise) {
  const value = Number(env(name, otherwise));
  if (!Number.isInteger(value) || value < 1) fail(`${name} is a number of seconds from 1`);
  return value;
}

const clientId = env('CLIENT_ID', 'engine');
const clientSecret = env('CLIENT_SECRET', 's3cr:t+/ %~&=');
const redirectURIs = env('REDIRECT_URIS', 'http://127.0.0.1:8200/v1/kaizala/callback').trim().split(/\s+/);
const accessTTL = seconds('ACCESS_TTL', 3600);
const refreshTTL = seconds('REFRESH_TTL', 86400);
const rotate = choice('ROTATE', 'always', 'never', 'default');
const accessOnly = choice('REVOKE_CASCADE', 'default', 'access-only') === 'access-only';
const jwt = choice('ACCESS_FORMAT', 'opaque', 'jwt') === 'jwt';
const resource = 'urn:example:api'; // a JWT access token has to be for some resource

const now = () => Math.floor(Date.now() / 1000);

// The library's default, by which it goes on knowing a token for some seconds after its end: introspection says that it is
// not active, and its revocation still ends its grant.
const clockTolerance = 15;

// The library's own store keeps a thousand entries or two and silently drops the oldest, a grant that has not been used for
// a while among them. This one keeps everything as long as the library asks it to.
const entries = new Map(); // "Kind:id" to { payload, until in milliseconds }
const byGrant = new Map(); // grant to the keys of what was issued from it
const accessTokenEnds = new Map(); // access token to its end in seconds, after it is gone too

class Store {
  constructor(kind) { this.kind = kind; }

  key(id) { return `${this.kind}:${id}`; }

  async upsert(id, payload, life) {
    entries.set(this.key(id), { payload, until: life ? Date.now() + (life + clockTolerance) * 1000 : Infinity });
    if (payload.grantId) {
      if (!byGrant.has(payload.grantId)) byGrant.set(payload.grantId, new Set());
      byGrant.get(payload.grantId).add(this.key(id));
    }
    if (this.kind === 'AccessToken') accessTokenEnds.set(id, payload.exp);
  }

  async find(id) {
    const entry = entries.get(this.key(id));
    return entry && entry.until > Date.now() ? entry.payload : undefined;
  }

  async findBy(field, value) {
    for (const [key, { payload, until }] of entries) {
      if (key.startsWith(`${this.kind}:`) && payload[field] === value && until > Date.now()) return payload;
    }
    return undefined;
  }

  async findByUid(uid) { return this.findBy('uid', uid); }

  async findByUserCode(userCode) { return this.findBy('userCode', userCode); }

  async consume(id) { entries.get(this.key(id)).payload.consumed = now(); }

  async destroy(id) { entries.delete(this.key(id)); }

  async revokeByGrantId(grantId) {
    for (const key of byGrant.get(grantId) ?? []) {
      if (key.startsWith(`${this.kind}:`)) entries.delete(key);
    }
  }
}

const counted = {
  exchanges: 0, // refresh tokens exchanged
  refused: 0, // exchanges refused for their refresh token, reused included
  reused: 0, // exchanges with a refresh token that an earlier one had replaced
  revoked_access_tokens: 0, // revocations of an access token that was valid until then
  revoked_refresh_tokens: 0, // revocations of a refresh token that was valid until then
  revoked_ended: 0, // revocations of an access token past its end
  revoked_other: 0, // revocations of what is unknown, or was dead before its end
};

function stats() {
  let grants = 0;
  let accessTokens = 0;
  for (const [key, { payload }] of entries) {
    if (payload.exp <= now()) continue;
    if (key.startsWith('RefreshToken:') && !payload.consumed && entries.has(`Grant:${payload.grantId}`)) grants += 1;
    if (key.startsWith('AccessToken:')) accessTokens += 1;
  }
  return { ...counted, live_grants: grants, live_access_tokens: accessTokens };
}

const server = createServer();
await new Promise((listening) => { server.listen(Number(env('PORT', '0')), '127.0.0.1', listening); });
const issuer = `http://127.0.0.1:${server.address().port}`;

const provider = new Provider(issuer, {
  adapter: Store,
  clients: [{
    client_id: clientId,
    client_secret: clientSecret,
    redirect_uris: redirectURIs,
    grant_types: ['authorization_code', 'refresh_token', 'urn:ietf:params:oauth:grant-type:device_code'],
    response_types: ['code'],
  }],
  scopes: ['openid', 'offline_access', 'read', 'write'],
  clockTolerance,
  pkce: { required: () => true },
  ...(rotate === 'default' ? {} : { rotateRefreshToken: rotate === 'always' }),
  ttl: {
    AccessToken: accessTTL, RefreshToken: refreshTTL, Grant: refreshTTL, AuthorizationCode: 60, DeviceCode: 600, IdToken: 3600, Interaction: 600, Session: 3600,
  },
  expiresWithSession: async () => false, // a grant outlives the browser's session
  features: {
    devInteractions: { enabled: true },
    deviceFlow: { enabled: true },
    introspection: { enabled: true },
    revocation: {
      enabled: true,
      allowedPolicy: async (ctx, client, token) => {
        if (token.clientId !== client.clientId) return false;
        ctx.state.found = token.isValid ? token.kind : undefined;
        if (!accessOnly || token.kind !== 'AccessToken') return true;
        await token.destroy();
        return false;
      },
    },
    resourceIndicators: {
      enabled: jwt,
      defaultResource: () => resource,
      useGrantedResource: () => true,
      getResourceServerInfo: () => ({ scope: 'read write', accessTokenTTL: accessTTL, accessTokenFormat: 'jwt' }),
    },
  },
  findAccount: (_, id) => ({ accountId: id, claims: () => ({ sub: id }) }),
});

const replaced = new Set(); // refresh tokens
provider.on('refresh_token.consumed', (token) => {
  if (replaced.has(token.jti)) counted.reused += 1; // two exchanges at once, both of which succeeded
  replaced.add(token.jti);
});
provider.on('grant.success', (ctx) => {
  if (ctx.oidc.params.grant_type === 'refresh_token') counted.exchanges += 1;
});
provider.on('grant.error', (ctx, err) => {
  if (ctx.oidc.params?.grant_type !== 'refresh_token' || err.error !== 'invalid_grant') return;
  counted.refused += 1;
  if (replaced.has(ctx.oidc.params.refresh_token)) counted.reused += 1;
});
provider.on('server_error', (ctx, err) => console.error(err));
provider.use(async (ctx, next) => {
  await next();
  if (ctx.oidc?.route !== 'revocation' || ctx.status !== 200) return;
  if (ctx.state.found === 'AccessToken') counted.revoked_access_tokens += 1;
  else if (ctx.state.found === 'RefreshToken') counted.revoked_refresh_tokens += 1;
  else if (accessTokenEnds.get(ctx.oidc.params.token) <= now()) counted.revoked_ended += 1;
  else counted.revoked_other += 1;
});

const user = 'asha'; // the library's login page takes any name and any password

// mint makes a grant as if its user had consented.
async function mint() {
  const client = await provider.Client.find(clientId);
  const scope = 'openid offline_access read write';
  const grant = new provider.Grant({ accountId: user, clientId });
  grant.addOIDCScope(scope);
  if (jwt) grant.addResourceScope(resource, 'read write');
  return new provider.RefreshToken({
    accountId: user, client, grantId: await grant.save(), gty: 'authorization_code', scope, ...(jwt ? { resource } : {}),
  }).save();
}

const callback = provider.callback();
server.on('request', async (req, res) => {
  const control = { 'POST /control/mint': async () => ({ refresh_token: await mint() }), 'GET /control/stats': stats }[`${req.method} ${req.url}`];
  if (!control) {
    callback(req, res);
    return;
  }
  try {
    res.setHeader('content-type', 'application/json');
    res.end(JSON.stringify(await control()));
  } catch (err) {
    console.error(err);
    res.writeHead(500).end();
  }
});

console.log(JSON.stringify({
  issuer,
  authorization_endpoint: `${issuer}/auth`,
  token_endpoint: `${issuer}/token`,
  revocation_endpoint: `${issuer}/token/revocation`,
  introspection_endpoint: `${issuer}/token/introspection`,
  userinfo_endpoint: `${issuer}/me`,
  device_authorization_endpoint: `${issuer}/device/auth`,
  verification_uri: `${issuer}/device`,
  client_id: clientId,
  client_secret: clientSecret,
  user,
  password: 'any',
  mint: `${issuer}/control/mint`,
  stats: `${issuer}/control/stats`,
}));
process.on('SIGTERM', () => process.exit(0));
