#!/usr/bin/env bash
# Kaizala's four steps on a real Vault, against the emulator, as the people
# with their policies: step 2 by a PIN, and as documented. Ends by itself; a step
# that does not do what it should ends it with status 1.
#
#   scripts/demo.sh          walk through, and clean up
#   scripts/demo.sh --dev    walk through, and leave all of it running until Ctrl-C
#
# shellcheck disable=SC2016 # the commands are expanded when they are run
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mode=demo
case ${1:-} in
'') ;;
--dev) mode=dev ;;
*)
  echo "usage: scripts/demo.sh [--dev]" >&2
  exit 2
  ;;
esac

echo "Building the plugin and the emulator; the first time this takes a minute or two." >&2
make -C "$root" --no-print-directory -s build
vault_path=$("$root/scripts/vault.sh" demo)
connector_id=

# shellcheck source=scripts/demo-lib.sh
source "$root/scripts/demo-lib.sh"
prepare "$vault_path"
ln -s "$root/bin/kaizala-emulator" "$work/path/kaizala-emulator"

: >emulator.log # there to be read before the process in the background has opened it
kaizala-emulator serve -listen 127.0.0.1:0 >>emulator.log 2>&1 &
pids+=($!)
KAIZALA_EMULATOR_URL=
for _ in {1..100}; do
  KAIZALA_EMULATOR_URL=$(sed -n 's/^listening on //p' emulator.log)
  [[ -z $KAIZALA_EMULATOR_URL ]] || break
  kill -0 "${pids[0]}" 2>/dev/null || break
  sleep 0.1
done
[[ -n $KAIZALA_EMULATOR_URL ]] || fail "the emulator did not start: $(cat emulator.log)"
export KAIZALA_EMULATOR_URL

start_vault
echo "Vault: $VAULT_ADDR ($(vault version))"
echo "Kaizala's emulator: $KAIZALA_EMULATOR_URL"

say "The Vault operator registers the plugin, mounts it and writes the policies."
export VAULT_TOKEN=$ROOT_TOKEN
register_plugin
works "vault secrets enable -path=kaizala $plugin"
for policy in connector-owner tenant-user app; do
  works "vault policy write $policy bootstrap/policies/$policy.hcl"
done
works "sed 's|/acme|/contoso|' bootstrap/policies/tenant-connect.hcl | vault policy write tenant-connect-contoso -"
sets 'OWNER_TOKEN=$(vault token create -policy=connector-owner -ttl=8h -field=token)'
sets 'USER_TOKEN=$(vault token create -policy=tenant-user -ttl=8h -field=token)'
sets 'CONNECT_TOKEN=$(vault token create -policy=tenant-connect-contoso -display-name=ravi -ttl=8h -field=token)'
sets 'APP_TOKEN=$(vault token create -policy=app -ttl=8h -field=token)'

say "Step 1. The connector owner registers a connector on Kaizala's portal, which shows its ID and secret," \
  "and writes both to Vault. The secret is read from standard input."
sets 'export VAULT_TOKEN=$OWNER_TOKEN'
works 'kaizala-emulator connector > portal'
sets "connector_id=\$(sed -n 's/^connector_id=//p' portal)"
works "sed -n 's/^connector_secret=//p' portal | tr -d '\\n' | vault write kaizala/config connector_id=\"\$connector_id\" connector_secret=-"
connector_secret=$(sed -n 's/^connector_secret=//p' portal)
denied 'vault write kaizala/config api_root=https://elsewhere.example'
checked "the connector owner cannot decide where refresh tokens are sent"
denied 'vault read kaizala/creds/acme'
rm portal

say "The Vault operator names the service: here the emulator. For Kaizala itself this step is left out."
sets 'export VAULT_TOKEN=$ROOT_TOKEN'
works 'vault write kaizala/config api_root="$KAIZALA_EMULATOR_URL"'
works 'vault read kaizala/config'
[[ $output == *"$connector_id"* ]] || fail "the connector's ID should be there"
[[ $output != *"$connector_secret"* ]] || fail "the connector's secret can be read"
checked "the connector secret cannot be read back"

say "Step 2, in the way that needs no step 3: contoso's tenant user logs in by a PIN, and Kaizala hands the refresh token to" \
  "Vault. His policy allows him to connect the tenant, and nothing else."
sets 'export VAULT_TOKEN=$CONNECT_TOKEN'
works "kaizala-emulator phone -user ravi | tr -d '\\n' | vault write kaizala/tenants/contoso/pin mobile_number=-"
grep -Eq '^status +pending$' <<<"$output" || fail "a PIN should be awaited"
works "grep '^SMS' emulator.log # his phone"
works "sed -n 's/^SMS .* //p' emulator.log | tr -d '\\n' | vault write kaizala/tenants/contoso/pin pin=-"
grep -Eq '^status +granted$' <<<"$output" || fail "contoso should be connected"
checked "contoso is connected, and no person and no shell has held a refresh token"
denied 'vault read kaizala/tenants/contoso'
checked "he can read nothing back"

say "Step 2, as Kaizala documents it: acme's tenant user opens the connector on the portal and generates the tenant's refresh" \
  "token."
sets 'export VAULT_TOKEN=$USER_TOKEN'
works 'kaizala-emulator token -connector "$connector_id" -user asha > refresh-token'
refresh_token=$(<refresh-token)

say "Step 3. Instead of giving it to the developer, the tenant user writes the refresh token to Vault. No other person sees it."
works 'vault write kaizala/tenants/acme refresh_token=- ttl=1h < refresh-token'
sets 'rm refresh-token'
works 'vault read kaizala/tenants/acme'
[[ $output == *"$refresh_token"* ]] && fail "the refresh token can be read"
grep -Eq '^status +ok$' <<<"$output" || fail "the tenant's status should be ok"
checked "the status is ok, and no token is in it"
denied 'vault read kaizala/creds/acme'
checked "the tenant user cannot read access tokens"

say "Step 4. The app reads an access token, which comes with a lease, and calls Kaizala with it."
sets 'export VAULT_TOKEN=$APP_TOKEN'
works 'vault read kaizala/creds/acme > creds; cat creds'
[[ -n $(field creds access_token) && -n $(field creds lease_id) ]] || fail "an access token and a lease should be there"
[[ $output != *"$refresh_token"* && $output != *"$connector_secret"* ]] || fail "a secret is in the answer"
works "awk '\$1 == \"access_token\" { print \$2 }' creds | kaizala-emulator me"
checked "Kaizala knows whom the token belongs to"
denied 'vault read kaizala/tenants/acme'

say "It renews the lease, and revokes it."
sets "lease_id=\$(awk '\$1 == \"lease_id\" { print \$2 }' creds)"
works 'vault lease renew "$lease_id"'
works 'vault lease revoke -sync "$lease_id"'

say "The last lease on that token is revoked, so the next read gets another token."
works 'vault read kaizala/creds/acme > creds-anew; cat creds-anew'
[[ $(field creds access_token) != $(field creds-anew access_token) ]] || fail "the revoked token was handed out again"
checked "the access token is a new one"
works "awk '\$1 == \"access_token\" { print \$2 }' creds-anew | kaizala-emulator me"

say "Acme has cost two exchanges: one when the refresh token was written, one after the revocation."
works 'kaizala-emulator exchanges -user asha'
[[ $output == 2 ]] || fail "there should have been two exchanges, and there were: $output"

if [[ $mode == demo ]]; then
  printf '\nDone. All of it is cleaned up; make dev leaves it running.\n'
  exit 0
fi

trap 'echo; exit 0' INT
cat <<EOF

Running until Ctrl-C. For another terminal:

export PATH=$work/path:\$PATH
export VAULT_ADDR=$VAULT_ADDR
export VAULT_TOKEN=$ROOT_TOKEN
export KAIZALA_EMULATOR_URL=$KAIZALA_EMULATOR_URL
export OWNER_TOKEN=$OWNER_TOKEN USER_TOKEN=$USER_TOKEN CONNECT_TOKEN=$CONNECT_TOKEN APP_TOKEN=$APP_TOKEN
export connector_id=$connector_id

Vault's log: $work/vault.log
EOF
wait "$vault_pid" || true
fail "Vault has ended"
