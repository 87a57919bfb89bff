#!/usr/bin/env bash
# Runs every fuzz target of the module, one after the other, for $FUZZTIME.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Only packages that have targets are built.
for package in $(grep -rl --include='*_test.go' '^func Fuzz' backend cmd | xargs -n1 dirname | sort -u); do
  for target in $(go test -list '^Fuzz' "./$package" | sed -n '/^Fuzz/p'); do
    echo "$package $target"
    go test -run '^$' -fuzz "^$target\$" -fuzztime "${FUZZTIME:-30s}" "./$package"
  done
done
