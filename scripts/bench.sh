#!/usr/bin/env bash
# Measures the engine, and prints one table: in process, over go-plugin, and
# through the pinned Vault beside a plugin that does nothing (see
# backend/vaulttest/floor). All of it on loopback; nothing is left running.
# Takes about 10 minutes, and tells more the less else the machine does.
#
#   scripts/bench.sh                      everything
#   KAIZALA_BENCH_QUICK=1 scripts/bench.sh  a minute or two, to see that it works
#
# What go test printed is in bin/bench.txt, for benchstat and the like.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

count=6
benchtime=300ms
export KAIZALA_BENCH_ROUNDS=${KAIZALA_BENCH_ROUNDS:-2000}
if [[ -n ${KAIZALA_BENCH_QUICK:-} ]]; then
  count=2
  benchtime=50ms
  KAIZALA_BENCH_ROUNDS=100
fi

VAULT_BIN=$(scripts/vault.sh)
export VAULT_BIN
export KAIZALA_PLUGIN_BIN=$PWD/bin/vault-plugin-secrets-kaizala
out=bin/bench.txt
: >"$out"

measure() {
  go test -run '^$' -timeout 20m "$@" >>"$out" 2>&1 || {
    tail -n 30 "$out" >&2
    exit 1
  }
}

# One process after another, rather than -count: what a process happens to be
# like is part of the spread.
for ((i = 1; i <= count; i++)); do
  echo "In process: $i of $count" >&2
  measure -bench . -benchtime "$benchtime" ./backend
done
echo "Over go-plugin and through Vault: $KAIZALA_BENCH_ROUNDS rounds of each side" >&2
measure -bench . -benchtime 1x ./backend/vaulttest

load=
if [[ -r /proc/loadavg ]]; then
  load=", load average $(cut -d' ' -f1-3 /proc/loadavg) at the end"
fi
cpu=$(sed -n 's/^cpu: //p' "$out" | head -n 1)
echo "$(date -u +%Y-%m-%d), $(git describe --always --dirty), $(go env GOVERSION) $(go env GOOS)/$(go env GOARCH), $(getconf _NPROCESSORS_ONLN) × ${cpu:-unknown processor}, $("$VAULT_BIN" version | cut -d, -f1)$load."
echo
go run ./backend/vaulttest/benchtable <"$out"
