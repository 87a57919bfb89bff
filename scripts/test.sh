#!/usr/bin/env bash
# All tests with the race detector, and then, without it, those that do only a part
# of their work with it: a test is ten times as slow then, and its races show in
# the part as well as in the whole.
# The acceptance tests get the plugin and the Vault that they run from here;
# go test ./... alone finds or builds both too. Arguments go to go test, after its
# own, and leave the second run out: scripts/test.sh -run Lease ./backend
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if ! command -v gcc >/dev/null; then
  echo "make test: the race detector needs gcc; install it and run again" >&2
  exit 1
fi
VAULT_BIN=$(scripts/vault.sh)
VAULT_OLDEST_BIN=$(scripts/vault.sh oldest)
export VAULT_BIN VAULT_OLDEST_BIN
export KAIZALA_PLUGIN_BIN=$PWD/bin/vault-plugin-secrets-kaizala
export KAIZALA_EMULATOR_BIN=$PWD/bin/kaizala-emulator

if (($# > 0)); then
  CGO_ENABLED=1 exec go test -race -count=1 -timeout 30m "$@"
fi
# Tests on a real Vault mostly wait for time to pass, so more of them run at once than there are processors.
CGO_ENABLED=1 go test -race -count=1 -timeout 30m -parallel 5 ./...
CGO_ENABLED=0 go test -v -count=1 -timeout 30m -run '^(TestFaultMatrix|TestPairMatrix|TestRevocationStorm|TestProperties|TestYear|TestAHundredThousandTenants)$' ./backend -rapid.checks=1000 |
  grep -Ev '^=== |^ +--- PASS'
