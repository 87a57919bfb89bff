#!/usr/bin/env bash
# An OAuth 2.0 service, a real Vault and the three people with their policies: the story of demo.sh on an authorization
# server that others wrote, zitadel/oidc's. No person in it sees a refresh token. Ends by itself, and cleans up; a step
# that does not do what it should ends it with status 1.
#
# shellcheck disable=SC2016 # the commands are expanded when they are run
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if (($# > 0)); then
  echo "usage: scripts/demo-oauth.sh" >&2
  exit 2
fi

echo "Building the plugin and the authorization server; the first time this takes a minute or two." >&2
make -C "$root" --no-print-directory -s build-plugin
vault_path=$("$root/scripts/vault.sh" demo)
server_path=$("$root/scripts/authserver.sh" zitadel)

# shellcheck source=scripts/demo-lib.sh
source "$root/scripts/demo-lib.sh"
(cd "$root" && go build -o "$work/visit" ./backend/vaulttest/browser/visit) || fail "the scripted browser does not build"
prepare "$vault_path"
mv visit path/
start_vault

# The client is registered as the server starts: its redirect URI is this Vault's callback.
CALLBACK=$VAULT_ADDR/v1/oauth/callback
client_secret=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
: >server.log
CLIENT_ID=vault CLIENT_SECRET=$client_secret REDIRECT_URIS=$CALLBACK "$server_path" >>server.log 2>&1 &
pids+=($!)
for _ in {1..100}; do
  grep -q '^{' server.log && break
  kill -0 "${pids[${#pids[@]} - 1]}" 2>/dev/null || break
  sleep 0.1
done
said() { sed -n "s/.*\"$1\":\"\([^\"]*\)\".*/\1/p" server.log; }
ISSUER=$(said issuer)
[[ -n $ISSUER ]] || fail "the authorization server did not start: $(cat server.log)"
USERINFO=$(said userinfo_endpoint)
STATS=$(said stats)
password=$(said password)
printf '%s' "$password" >password

echo "Vault: $VAULT_ADDR ($(vault version))"
echo "The authorization server: $ISSUER"

say "The Vault operator registers the plugin, mounts it and writes the policies."
export VAULT_TOKEN=$ROOT_TOKEN
register_plugin
works "vault secrets enable -path=oauth $plugin"
for policy in connector-owner tenant-user tenant-connect app; do
  works "sed 's|kaizala/|oauth/|' bootstrap/policies/$policy.hcl | vault policy write $policy -"
done
sets 'OWNER_TOKEN=$(vault token create -policy=connector-owner -ttl=8h -field=token)'
sets 'USER_TOKEN=$(vault token create -policy=tenant-user -policy=tenant-connect -display-name=asha -ttl=8h -field=token)'
sets 'APP_TOKEN=$(vault token create -policy=app -ttl=8h -field=token)'

say "The operator names the service. In this write, and never later by itself, Vault asks it for its endpoints." \
  "The operator knows from its documentation that this service can revoke one access token alone."
works "vault write oauth/config service=oauth2 issuer=$ISSUER scopes=openid,offline_access,profile redirect_uris=$CALLBACK revocation=access_token"
works 'vault read oauth/config'
[[ $output == *"$ISSUER/oauth/token"* ]] || fail "the token endpoint should have been found"
checked "the token endpoint was found"

say "Step 1. The connector owner registers a client at the service, which shows its ID and secret, and writes both."
sets 'export VAULT_TOKEN=$OWNER_TOKEN'
printf '%s' "$client_secret" >client-secret
works 'vault write oauth/config connector_id=vault connector_secret=- < client-secret'
rm client-secret
denied 'vault write oauth/config token_url=https://elsewhere.example'
checked "the connector owner cannot decide where refresh tokens are sent"

say "Step 2. The tenant user connects the tenant. His browser goes to the service, where he logs in; the service sends it" \
  "back to Vault, which asks him to confirm the tenant. visit plays the browser: it prints the pages' text."
sets 'export VAULT_TOKEN=$USER_TOKEN'
works 'vault write -force -field=authorization_url oauth/tenants/acme/authorize > authorization-url && cat authorization-url'
works 'visit -user asha "$(cat authorization-url)" < password'
works 'vault read oauth/tenants/acme/authorize'
grep -Eq '^status +granted$' <<<"$output" || fail "the grant should be there"
works 'vault write oauth/tenants/acme ttl=1m'
works 'vault read oauth/tenants/acme'
grep -Eq '^status +ok$' <<<"$output" || fail "the tenant's status should be ok"
grep -Eq '^subject +asha$' <<<"$output" || fail "the tenant's status should say who has granted"
checked "the tenant is connected, and step 3 is gone: no person and no shell has held a refresh token"
denied 'vault read oauth/creds/acme'
checked "the tenant user cannot read access tokens"

say "Step 4. The app reads an access token, which comes with a lease, and calls the service with it."
sets 'export VAULT_TOKEN=$APP_TOKEN'
works 'vault read oauth/creds/acme > creds; cat creds'
[[ -n $(field creds access_token) && -n $(field creds lease_id) ]] || fail "an access token and a lease should be there"
[[ $output != *"$client_secret"* ]] || fail "the client's secret is in the answer"
works "awk '\$1 == \"access_token\" { print \$2 }' creds | visit $USERINFO"
[[ $output == *'"sub":"asha"'* ]] || fail "the service should know whose token it is"
checked "the service knows whom the token belongs to"

say "It renews the lease, and revokes it. The access token ends at the service with its last lease."
sets "lease_id=\$(awk '\$1 == \"lease_id\" { print \$2 }' creds)"
works 'vault lease renew "$lease_id"'
works 'vault lease revoke -sync "$lease_id"'
ran "awk '\$1 == \"access_token\" { print \$2 }' creds | visit $USERINFO"
# Most services say 401.
[[ $status != 0 && $output == *"403 Forbidden"* ]] || fail "the service should refuse the revoked token"
checked "the service refuses it now"

say "The next read gets another token."
works 'vault read oauth/creds/acme > creds-anew; cat creds-anew'
[[ $(field creds access_token) != $(field creds-anew access_token) ]] || fail "the revoked token was handed out again"
checked "the access token is a new one"
works "awk '\$1 == \"access_token\" { print \$2 }' creds-anew | visit $USERINFO"

say "What the service has counted: one exchange, after the revocation (the first access token came with the consent); no" \
  "refresh token was used twice, and the grant is valid."
works "visit $STATS </dev/null"
[[ $output == *'"exchanges":1,'* && $output == *'"reused":0,'* && $output == *'"revoked_access_tokens":1,'* && $output == *'"live_grants":1,'* ]] ||
  fail "the service has counted something else"

printf '\nDone. All of it is cleaned up.\n'
