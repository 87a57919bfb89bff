#!/usr/bin/env bash
# Prints the path of a Vault to use, and builds it first where that is needed.
#
#   scripts/vault.sh            $VAULT_BIN, or else the pinned version
#   scripts/vault.sh VERSION    1.21.0 (the pinned one) or 1.19.0
#   scripts/vault.sh oldest     $VAULT_OLDEST_BIN, or else 1.19.0
#   scripts/vault.sh demo       $VAULT_BIN, or else a vault on the PATH of 1.19 or later, or else the pinned version
#
# Only the path goes to standard output; the rest is said on standard error.
set -euo pipefail

pinned=1.21.0
oldest=1.19.0

say() { printf '%s\n' "$*" >&2; }
die() { say "vault.sh: $*"; exit 1; }

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
version=${1:-$pinned}
if [[ $version == demo ]]; then
  version=$pinned
  found=$(type -P vault || true)
  says='^Vault v([0-9]+)\.([0-9]+)\.([0-9]+)[ ,]' # an Enterprise edition, v1.20.0+ent, does not start without a license
  if [[ -z ${VAULT_BIN:-} && -n $found && $("$found" version 2>/dev/null) =~ $says ]] &&
    ((BASH_REMATCH[1] > 1 || BASH_REMATCH[1] == 1 && BASH_REMATCH[2] >= 19)); then
    VAULT_BIN=$found
    say "Using the vault on the PATH, ${BASH_REMATCH[1]}.${BASH_REMATCH[2]}.${BASH_REMATCH[3]}: $found"
  fi
fi
case $version in
pinned) version=$pinned ;;
oldest) version=$oldest ;;
esac

# A Vault of the user's own.
case $version in
"$pinned") own=VAULT_BIN modfile=go.mod ;;
"$oldest") own=VAULT_OLDEST_BIN modfile=oldest.mod ;;
*) die "no Vault $version here: ask for $pinned or $oldest, or set VAULT_BIN" ;;
esac
if [[ -n ${!own:-} ]]; then
  path=$(command -v -- "${!own}") || die "$own=${!own}: no such program; unset it to have Vault $version built"
  [[ $path == /* ]] || path=$PWD/$path
  "$path" version >/dev/null 2>&1 || die "$own=${!own} does not run: '${!own} version' fails"
  printf '%s\n' "$path"
  exit 0
fi

module=$root/bootstrap/vault
out=$root/bin/vault-$version

current() {
  [[ -x $out && ! $module/$modfile -nt $out && ! $module/${modfile%.mod}.sum -nt $out && ! $module/main.go -nt $out ]]
}

if current; then
  printf '%s\n' "$out"
  exit 0
fi

mkdir -p "$root/bin"

# Tests of several packages may ask at once: one builds, the others wait. A
# directory is the lock that every system has; it holds its owner's pid.
lock=$root/bin/.vault-$version.lock
until mkdir "$lock" 2>/dev/null; do
  if current; then
    printf '%s\n' "$out"
    exit 0
  fi
  owner=$(cat "$lock/pid" 2>/dev/null || true)
  if [[ -n $owner ]] && ! kill -0 "$owner" 2>/dev/null; then
    rm -rf "$lock"
  fi
  sleep 1
done
echo $$ >"$lock/pid"

tmp=$out.$$
log=$root/bin/vault-$version.log
build=
cleanup() {
  if [[ -n $build ]]; then kill "$build" 2>/dev/null || true; fi
  rm -rf "$tmp" "$lock"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

if ! current; then
  say "Building Vault $version from its Go module. The first time this takes about 5 minutes on two cores;"
  say "set $own to the path of a Vault of your own to do without."
  (
    cd "$module"
    # Vault reports its version from a file of its own; the date would
    # otherwise be the moment at which one asks.
    exec go build -modfile="$modfile" -tags minimal \
      -ldflags "-s -w -X github.com/hashicorp/vault/version.BuildDate=$(date -u +%Y-%m-%dT%H:%M:%SZ)" \
      -o "$tmp" .
  ) >"$log" 2>&1 &
  build=$!
  SECONDS=0
  next=10
  while kill -0 "$build" 2>/dev/null; do
    if ((SECONDS >= next)); then
      say "  … still building Vault $version, $SECONDS s"
      next=$((next + 10))
    fi
    sleep 0.2
  done
  if ! wait "$build"; then
    build=
    tail -n 20 "$log" >&2
    die "Vault $version did not build; the whole output is in $log"
  fi
  build=
  mv -f "$tmp" "$out"
  rm -f "$log"
  say "Built $("$out" version) in $SECONDS s: $out"
fi
printf '%s\n' "$out"
