#!/usr/bin/env bash
# Prints the path of an authorization server to run, and builds or installs it first where that is needed.
#
#   scripts/authserver.sh zitadel         zitadel/oidc's example server, from its Go module
#   scripts/authserver.sh oidc-provider   npm's oidc-provider; needs node 20 and npm
#
# Only the path goes to standard output; the rest is said on standard error. Status 3: there is no node, or an old one.
set -euo pipefail

say() { printf '%s\n' "$*" >&2; }
die() { say "authserver.sh: $*"; exit 1; }

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
module=$root/bootstrap/authserver
case ${1:-} in
zitadel)
  out=$root/bin/authserver-zitadel
  program=$out
  sources=("$module"/go.mod "$module"/go.sum "$module"/*.go)
  ;;
oidc-provider)
  out=$root/bin/authserver-oidc-provider
  program=$out/server.mjs
  sources=("$module"/oidc-provider/{package.json,package-lock.json,server.mjs})
  node=$(node --version 2>/dev/null || true)
  if [[ ! $node =~ ^v([0-9]+)\. ]] || ((BASH_REMATCH[1] < 20)) || ! command -v npm >/dev/null; then
    say "authserver.sh: oidc-provider needs node 20 or later, and npm: install both, or do without it"
    exit 3
  fi
  ;;
*)
  say "usage: scripts/authserver.sh zitadel|oidc-provider"
  exit 2
  ;;
esac

# The program is put in its place last, with the time of that moment.
current() {
  local source
  [[ -x $program ]] || return 1
  for source in "${sources[@]}"; do
    [[ ! $source -nt $program ]] || return 1
  done
}

if current; then
  printf '%s\n' "$program"
  exit 0
fi

mkdir -p "$root/bin"

# Tests of several packages may ask at once: one builds, the others wait. A
# directory is the lock that every system has; it holds its owner's pid.
lock=$root/bin/.authserver-$1.lock
until mkdir "$lock" 2>/dev/null; do
  if current; then
    printf '%s\n' "$program"
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
trap 'rm -rf "$tmp" "$lock"' EXIT
trap 'exit 130' INT TERM

if ! current; then
  SECONDS=0
  case $1 in
  zitadel)
    say "Building zitadel's example server; the first time this takes half a minute."
    (cd "$module" && CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -o "$tmp" .) >&2 || die "it did not build"
    mv -f "$tmp" "$out"
    ;;
  oidc-provider)
    say "Installing oidc-provider and its dependencies, as package-lock.json names them."
    mkdir "$tmp"
    cp "$module"/oidc-provider/package*.json "$tmp/"
    # Nothing of what is installed runs a script of its own.
    npm ci --prefix "$tmp" --omit=dev --ignore-scripts --no-audit --no-fund --loglevel=error >&2 || die "npm could not install it"
    install -m 0755 "$module/oidc-provider/server.mjs" "$tmp/server.mjs"
    rm -rf "$out"
    mv "$tmp" "$out"
    ;;
  esac
  say "Ready in $SECONDS s: $program"
fi
printf '%s\n' "$program"
