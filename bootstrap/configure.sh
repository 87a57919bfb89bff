#!/usr/bin/env bash
# Registers the plugin in a running Vault, mounts and tunes it, writes the
# policies and, where that is wanted, the connector. Running it again changes
# nothing that is right already, and upgrades the mount to a newer plugin.
#
#   export VAULT_ADDR=https://vault.example:8200     # and VAULT_TOKEN, or vault login
#   bootstrap/configure.sh
#
# Asks on a terminal for what these variables do not say:
#
#   KAIZALA_PLUGIN                 the plugin's binary, bin/vault-plugin-secrets-kaizala by default
#   KAIZALA_PLUGIN_COMMAND         its file name in Vault's plugin_directory, where it lies already; the same by default
#   KAIZALA_PLUGIN_VERSION         its version, where the binary does not run on this machine
#   KAIZALA_MOUNT                  kaizala by default
#   KAIZALA_DEFAULT_LEASE_TTL      of the mount; Vault's own by default
#   KAIZALA_MAX_LEASE_TTL
#   KAIZALA_TENANTS                names of tenants, with spaces between, whose users and apps get a policy each
#   KAIZALA_CALLBACKS_PER_MINUTE   what one address may ask of the mount's callback, which needs no Vault token; by default
#                                  what is set already, or else 60
#   KAIZALA_CONNECTOR              name of the connector that this writes; default by default
#   KAIZALA_CONNECTOR_FILE         for an OAuth 2.0 service: a JSON file with its fields, such as services/google.json
#   KAIZALA_REDIRECT_URIS          for it: the connector's redirect_uris, which are not in services/*.json
#   KAIZALA_API_ROOT               for Kaizala: another address than its own
#   KAIZALA_CA_CERT_FILE           certificates, in PEM, to check the service against
#   KAIZALA_EXCHANGES_PER_MINUTE   this mount's share of the calls that the service allows the connector
#   KAIZALA_CONNECTOR_ID           empty: leave the ID and the secret to the connector's owner
#   KAIZALA_CONNECTOR_SECRET_FILE  a file with its secret; or, where a CI system sets it:
#   KAIZALA_CONNECTOR_SECRET
#
# No secret is ever on a command line, and none is printed. Refresh tokens are
# not asked for: each tenant user writes his own.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
name=vault-plugin-secrets-kaizala

# What is read from vault below is read as it prints it by itself.
unset VAULT_FORMAT

# A secret in the environment goes no further than this shell.
connector_secret=${KAIZALA_CONNECTOR_SECRET:-}
unset KAIZALA_CONNECTOR_SECRET

say() { printf '%s\n' "$*" >&2; }
die() {
  say "configure.sh: $*"
  exit 1
}

case ${1:-} in
"") ;;
-h | --help)
  # The comment above.
  awk 'NR > 1 { if (!sub(/^# ?/, "")) exit; print }' "${BASH_SOURCE[0]}"
  exit
  ;;
*) die "there is no argument $1; variables say what to configure, and configure.sh --help names them" ;;
esac

# ask VARIABLE TEXT DEFAULT sets the variable to its value in the environment,
# to what is typed, or to the default.
ask() {
  local answer=
  if [[ -z ${!1+set} && -t 0 ]]; then
    read -r -p "$2 [$3]: " answer
  fi
  printf -v "$1" %s "${!1:-${answer:-$3}}"
}

ask KAIZALA_PLUGIN "The plugin's binary" "$here/../bin/$name"
ask KAIZALA_MOUNT "Mount path" kaizala
ask KAIZALA_TENANTS "Tenants, separated by spaces" ""
ask KAIZALA_CONNECTOR_ID "Connector ID (empty: its owner writes it)" ""

plugin=$KAIZALA_PLUGIN
[[ $plugin == */* ]] || plugin=./$plugin # which is run below
command=${KAIZALA_PLUGIN_COMMAND:-$(basename "$plugin")}
mount=${KAIZALA_MOUNT%/}
connector=${KAIZALA_CONNECTOR:-default}
read -r -d "" -a tenants <<<"$KAIZALA_TENANTS" || true # to its end, over several lines too
# The engine's rule for names.
named() { [[ $1 =~ ^[A-Za-z0-9_]([A-Za-z0-9_.-]{0,126}[A-Za-z0-9_])?$ && $1 != *..* ]]; }
[[ $mount =~ ^[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*$ ]] ||
  die "KAIZALA_MOUNT: a path such as teams/kaizala, of letters, digits and _, and inside also . and -"
named "$connector" || die "KAIZALA_CONNECTOR: $connector cannot be a connector's name"
for tenant in ${tenants[@]+"${tenants[@]}"}; do
  named "$tenant" || die "KAIZALA_TENANTS: $tenant cannot be a tenant's name"
done
# vault would take what stands before = for the name of a field.
[[ ${KAIZALA_CONNECTOR_FILE:-} != *=* ]] || die "KAIZALA_CONNECTOR_FILE: a path without ="
command -v vault >/dev/null || die "vault is not in PATH"
[[ -f $plugin ]] || die "no plugin at $plugin: run make build-plugin, or set KAIZALA_PLUGIN"
vault token lookup >/dev/null || die "VAULT_ADDR names no Vault, or the token is not good"

# Policies and the quota are named after the mount, with - for /, which two mounts can have in common.
prefix=${mount//\//-}
quota=sys/quotas/rate-limit/$prefix-callback
limited=$(vault read -field=path "$quota" 2>&1) || {
  [[ $limited == *"No value found"* ]] || die "cannot read $quota: $limited"
  limited=
}
[[ -z $limited || $limited == *"$mount/callback*" ]] ||
  die "the mount ${limited%/callback*}/ has the names of policies and quota that $mount/ would get ($prefix-…): choose another path, or delete $quota if that mount is gone"

# The shipped policies speak of the mount kaizala and the tenant acme.
policy() { # policy FILE TENANT
  # @ stands for the tenant while the mount's name is put in: each name may contain kaizala or acme.
  sed -e 's#/acme\([/"]\)#/@\1#g' -e "s#kaizala/#$mount/#g" -e "s#/@\([/\"]\)#/$2\1#g" "$here/policies/$1.hcl"
}
policies=() # name, file and tenant of each
for file in connector-owner operator monitor app-templated; do
  policies+=("$prefix-$file $file acme")
done
for tenant in ${tenants[@]+"${tenants[@]}"}; do
  for file in tenant-user tenant-connect app sidecar; do
    policies+=("$prefix-$file-$tenant $file $tenant")
  done
done

# Vault overwrites a policy without an error, and ignores case in its name. Nothing is changed where that would give somebody
# the rights of another mount or tenant.
present=$(vault policy list) || die "the token must be allowed to list policies (sys/policies/acl)"
names=" "
for entry in "${policies[@]}"; do
  read -r policy file tenant <<<"$entry"
  policy=$(tr '[:upper:]' '[:lower:]' <<<"$policy")
  [[ $names != *" $policy "* ]] ||
    die "KAIZALA_TENANTS: two policies would have the name $policy, where case does not count: choose another name for $tenant"
  names+="$policy "
  grep -qxF -- "$policy" <<<"$present" || continue
  text=$(vault policy read "$policy") || die "the token must be allowed to read policies (sys/policies/acl)"
  [[ $(policy "$file" "$tenant") =~ path\ \"[^\"]*\" ]]
  [[ $text == *"${BASH_REMATCH[0]}"* ]] ||
    die "the policy $policy is there for something else, since it has no ${BASH_REMATCH[0]}: choose another mount path or tenant name, or delete that policy if nobody uses it"
done

status=$(vault status) || die "cannot tell whether Vault is an Enterprise edition, whose mount is seal-wrapped from the start: vault status fails"
enterprise=no
if grep -q '^Version .*+ent' <<<"$status"; then
  enterprise=yes
fi

# The plugin, by its checksum and version.
if command -v sha256sum >/dev/null; then
  sum=$(sha256sum "$plugin")
else
  sum=$(shasum -a 256 "$plugin")
fi
sum=${sum%% *}
version=${KAIZALA_PLUGIN_VERSION:-$("$plugin" -version)} ||
  die "$plugin does not run here: set KAIZALA_PLUGIN_VERSION to its version"
say "Registering $name $version, $sum"
vault plugin register -sha256="$sum" -version="$version" -command="$command" secret "$name" >/dev/null ||
  die "Vault refuses the plugin: is it $command in Vault's plugin_directory, on every node?"

# While a version is pinned, Vault runs that one and takes no version of a mount.
pin=$(vault read -field=version "sys/plugins/pins/secret/$name" 2>/dev/null) || pin=
if [[ -n $pin && $pin != "$version" ]]; then
  say "Moving the pin from $pin to $version"
  vault write "sys/plugins/pins/secret/$name" version="$version" >/dev/null
fi

# What audit logs may show in clear. Everything else is there as an HMAC: tokens above all, and what may hold a secret or
# names a person. authorization_url is in the requests alone: in the answer of tenants/NAME/authorize it holds a state that
# is still valid.
request_keys=(
  service connector_id ca_cert request_timeout exchanges_per_minute api_root redirect_hosts
  issuer token_url revocation_url authorization_url device_authorization_url token_endpoint_auth_method
  scopes redirect_uris redirect_uri endpoint_url_field access_token_life refresh_token_life keep_alive
  exchange_invalidates revocation revoke_on_delete confirm
  connector ttl max_ttl min_ttl retire_on_revoke token_per_lease verify
)
response_keys=(
  endpoint_url scope token_type expire_time tenant rotation_period last_vault_rotation
  service connector_id ca_cert request_timeout exchanges_per_minute api_root redirect_hosts
  issuer token_url revocation_url device_authorization_url token_endpoint_auth_method
  scopes redirect_uris endpoint_url_field access_token_life refresh_token_life keep_alive
  exchange_invalidates revocation revoke_on_delete confirm
  connector ttl max_ttl min_ttl retire_on_revoke token_per_lease status kind group_id granted_time granted_by
  refresh_token_expire_time refresh_token_set_time refresh_token_origin
  access_token_expire_time last_exchange_time next_exchange_time
  last_error last_error_time pending_revocations last_revocation_error keys key_info
)
options=()
for key in "${request_keys[@]}"; do options+=("-audit-non-hmac-request-keys=$key"); done
for key in "${response_keys[@]}"; do options+=("-audit-non-hmac-response-keys=$key"); done
[[ -z ${KAIZALA_DEFAULT_LEASE_TTL:-} ]] || options+=("-default-lease-ttl=$KAIZALA_DEFAULT_LEASE_TTL")
[[ -z ${KAIZALA_MAX_LEASE_TTL:-} ]] || options+=("-max-lease-ttl=$KAIZALA_MAX_LEASE_TTL")
if [[ -z $pin ]]; then
  options+=("-plugin-version=$version")
else
  say "The version is pinned, so $mount/ gets none of its own. After the pin is deleted, run this again before Vault restarts."
fi

# sys/mounts/PATH is a 400 where nothing is mounted.
if type=$(vault read -field=type "sys/mounts/$mount" 2>/dev/null); then
  [[ $type == "$name" ]] || die "$mount/ is a mount of $type"
  running=$(vault read -field=running_plugin_version "sys/mounts/$mount")
  say "Tuning $mount/"
  vault secrets tune "${options[@]}" "$mount" >/dev/null
  if [[ $running != "$version" ]]; then
    say "Upgrading $mount/ from $running: every mount of the plugin is reloaded"
    scope=()
    [[ $enterprise == no ]] || scope=(-scope=global) # other nodes and clusters run the plugin too
    vault plugin reload -type=secret -plugin="$name" ${scope[@]+"${scope[@]}"} >/dev/null
  fi
else
  seal_wrap=()
  [[ $enterprise == no ]] || seal_wrap=(-seal-wrap)
  say "Mounting $mount/"
  vault secrets enable -path="$mount" -description="Access tokens of OAuth 2.0 services and of Kaizala" \
    "${options[@]}" ${seal_wrap[@]+"${seal_wrap[@]}"} "$name" >/dev/null
fi

for entry in "${policies[@]}"; do
  read -r policy file tenant <<<"$entry"
  say "Writing policy $policy"
  policy "$file" "$tenant" | vault policy write "$policy" - >/dev/null
done

# A request for callback needs no token, and costs a storage read.
if [[ -z $limited || -n ${KAIZALA_CALLBACKS_PER_MINUTE:-} ]]; then
  say "Limiting $mount/callback to ${KAIZALA_CALLBACKS_PER_MINUTE:-60} requests a minute of one address"
  vault write "$quota" path="$mount/callback*" rate="${KAIZALA_CALLBACKS_PER_MINUTE:-60}" interval=1m >/dev/null
fi

# The connector. A new one of Kaizala takes its ID and secret together; one of OAuth 2.0 can have them later, from its owner.
config=$mount/config
callback=$mount/callback
via= # what a tenant's writes name, which go to the connector default otherwise
if [[ $connector != default ]]; then
  config+=/$connector
  callback+=/$connector
  via=" connector=$connector"
fi
settings=()
[[ -z ${KAIZALA_CONNECTOR_FILE:-} ]] || settings+=("@$KAIZALA_CONNECTOR_FILE")
[[ -z ${KAIZALA_REDIRECT_URIS:-} ]] || settings+=("redirect_uris=$KAIZALA_REDIRECT_URIS")
[[ -z ${KAIZALA_API_ROOT:-} ]] || settings+=("api_root=$KAIZALA_API_ROOT")
[[ -z ${KAIZALA_CA_CERT_FILE:-} ]] || settings+=("ca_cert=@$KAIZALA_CA_CERT_FILE")
[[ -z ${KAIZALA_EXCHANGES_PER_MINUTE:-} ]] || settings+=("exchanges_per_minute=$KAIZALA_EXCHANGES_PER_MINUTE")
if [[ -n $KAIZALA_CONNECTOR_ID ]]; then
  settings+=("connector_id=$KAIZALA_CONNECTOR_ID")
  if [[ -n ${KAIZALA_CONNECTOR_SECRET_FILE:-} ]]; then
    connector_secret=$(<"$KAIZALA_CONNECTOR_SECRET_FILE")
  elif [[ -z $connector_secret && -t 0 ]]; then
    read -r -s -p "Connector secret (not shown; empty: keep the one that is there): " connector_secret
    echo >&2
  fi
fi
if ((${#settings[@]} > 0)); then
  say "Writing $config"
  if [[ -n $connector_secret ]]; then
    # printf is the shell's own, and no process with a command line.
    printf %s "$connector_secret" | vault write "$config" "${settings[@]}" connector_secret=- >/dev/null
  else
    vault write "$config" "${settings[@]}" >/dev/null
  fi
fi

service=$(vault read -field=service "$config" 2>/dev/null) || service=
say "Done. What is left for others:"
if [[ -z $service ]]; then
  say "  for an OAuth 2.0 service, the operator ($prefix-operator) before the connector owner:  vault write $config service=oauth2 issuer=… scopes=… redirect_uris=https://VAULT/v1/$callback"
fi
if [[ -z $(vault read -field=connector_id "$config" 2>/dev/null) ]]; then
  owner=$prefix-connector-owner
  [[ $connector == default ]] || owner="a policy like $owner, for $config"
  say "  the connector owner ($owner):  vault write $config connector_id=… connector_secret=-"
fi
if [[ $(vault read -field=redirect_uris "$config" 2>/dev/null) == "[]" ]]; then
  say "  the operator, with the address that is registered with the service:  vault write $config redirect_uris=https://VAULT/v1/$callback"
fi
for tenant in "${tenants[@]:-TENANT}"; do
  consent="vault write -f $mount/tenants/$tenant/authorize$via"
  [[ $service != kaizala ]] || consent="vault write $mount/tenants/$tenant/pin$via mobile_number=…"
  say "  the tenant user ($prefix-tenant-user-$tenant):  vault write $mount/tenants/$tenant$via refresh_token=-"
  say "  or, by consent ($prefix-tenant-connect-$tenant):  $consent"
  say "  the app ($prefix-app-$tenant):  vault read $mount/creds/$tenant"
done
