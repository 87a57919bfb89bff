#!/usr/bin/env bash
# Connects a tenant by a person's consent, so that no person holds its refresh token:
# starts the authorization, shows the person where to go, and waits for the end.
#
#   export VAULT_ADDR=https://vault.example:8200     # and VAULT_TOKEN, or vault login
#   bootstrap/connect.sh TENANT             # in a browser on this machine, or any other
#   bootstrap/connect.sh --device TENANT    # by a code that is entered on a phone
#
# The policy tenant-connect is all that it needs. It goes by these variables:
#
#   KAIZALA_MOUNT         kaizala by default
#   KAIZALA_CONNECTOR     the tenant's own connector by default, or else the one named default
#   KAIZALA_REDIRECT_URI  where the connector has several redirect_uris
#   KAIZALA_NO_BROWSER    1: show the address, and open nothing
#
# Ends with 0 where the tenant is connected, and with 1 otherwise.
set -euo pipefail

# What is read from vault below is read as it prints it by itself.
unset VAULT_FORMAT

say() { printf '%s\n' "$*" >&2; }
die() {
  say "connect.sh: $*"
  exit 1
}

way=authorize
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  # The comment above.
  awk 'NR > 1 { if (!sub(/^# ?/, "")) exit; print }' "${BASH_SOURCE[0]}"
  exit
fi
if [[ ${1:-} == --device ]]; then
  way=device
  shift
fi
(($# == 1)) || die "usage: connect.sh [--device] TENANT"
tenant=$1
[[ $tenant =~ ^[A-Za-z0-9_]([A-Za-z0-9_.-]{0,126}[A-Za-z0-9_])?$ && $tenant != *..* ]] || die "$tenant cannot be a tenant's name"
mount=${KAIZALA_MOUNT:-kaizala}
path=${mount%/}/tenants/$tenant/$way
command -v vault >/dev/null || die "vault is not in PATH"

fields=()
[[ -z ${KAIZALA_CONNECTOR:-} ]] || fields+=("connector=$KAIZALA_CONNECTOR")
[[ -z ${KAIZALA_REDIRECT_URI:-} || $way == device ]] || fields+=("redirect_uri=$KAIZALA_REDIRECT_URI")

# field NAME of the table that vault prints: a user code can have spaces.
field() { awk -v name="$1" '$1 == name { sub(/^[^ ]+ +/, ""); print }' <<<"$started"; }

# Vault's warnings go to the terminal with the rest of standard error.
started=$(vault write -force "$path" ${fields[@]+"${fields[@]}"}) || exit 1
if [[ $way == device ]]; then
  address=$(field verification_uri_complete)
  say "Open $(field verification_uri) on any device, enter this code, and allow what the service asks:"
  printf '\n    %s\n\n' "$(field user_code)" >&2
  address=${address:-$(field verification_uri)}
else
  address=$(field authorization_url)
  say "Open this address, log in at the service, and allow what it asks. Give it only to the person who grants access:"
  printf '\n%s\n\n' "$address" >&2
fi

# A browser on this machine, where there is one and a screen.
if [[ ${KAIZALA_NO_BROWSER:-} != 1 ]]; then
  for opener in wslview open xdg-open; do
    [[ $opener != xdg-open || -n ${DISPLAY:-}${WAYLAND_DISPLAY:-} ]] || continue
    [[ $opener != open || $(uname) == Darwin ]] || continue
    if command -v "$opener" >/dev/null; then
      "$opener" "$address" >/dev/null 2>&1 || say "$opener could not open it."
      break
    fi
  done
fi

until=$(field expire_time)
say "Waiting until $until."
while sleep 3; do
  if ! started=$(vault read "$path" 2>&1); then
    say "$started"
    look="look with vault read $path"
    [[ $started != *"Code: 403"* ]] ||
      die "this Vault token has ended, or may not read the result. The authorization goes on: log in again, and $look"
    [[ ! $(date -u +%Y-%m-%dT%H:%M:%SZ) > $until ]] ||
      die "Vault does not answer, and the time to grant access is over. Later, $look"
    continue # Vault may be changing its leader
  fi
  case $(field status) in
  pending) ;;
  granted)
    say "The tenant $tenant is connected."
    exit 0
    ;;
  denied) die "access was denied, and nothing was connected" ;;
  expired) die "access was not allowed in time, and nothing was connected" ;;
  superseded) die "this attempt was ended by a newer authorization, or by a write or a delete of the tenant" ;;
  *) die "nothing was connected: $(field last_error)" ;;
  esac
done
