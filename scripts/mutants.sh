#!/usr/bin/env bash
# Mutation testing with gremlins: changes the code of one package after the other, one small change at a time, and runs
# the package's own tests with -short on each. Prints the changes that no test noticed (LIVED), those that no test runs
# (NOT COVERED) and those on which the tests did not end (TIMED OUT), and at the end a line for each package. Efficacy is
# the part of the changes that tests noticed, of those that tests run.
#
#   scripts/mutants.sh                  every package below, which takes an hour or more
#   scripts/mutants.sh backend/share    one package
#
# It works on a copy of the tree in a temporary directory; what gremlins found is in bin/mutants/ as JSON.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

gremlins=${GREMLINS:-github.com/go-gremlins/gremlins/cmd/gremlins@v0.6.0}
packages=("$@")
if [[ $# == 0 ]]; then
  packages=(backend/tokenservice backend/share backend/kaizala backend/oauth2 backend)
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
out=$PWD/bin/mutants
mkdir -p "$out"
export TMPDIR=$work # gremlins copies the tree for each of its workers

GOBIN=$work go install "$gremlins"
summary=
for package in "${packages[@]}"; do
  package=${package#./}
  package=${package%/}
  tree=$work/tree
  rm -rf "$tree"
  mkdir "$tree"
  git ls-files -z --cached --others --exclude-standard --deduplicate |
    while IFS= read -r -d '' file; do
      if [[ -f $file ]]; then printf '%s\0' "$file"; fi
    done | tar -cf - --null -T - | tar -xf - -C "$tree"
  # gremlins measures coverage with the tests of the packages below, too, and would wait for a real Vault.
  find "$tree/$package" -mindepth 2 -name '*_test.go' -delete
  report=$out/${package//\//-}.json
  echo "== $package" >&2
  (cd "$tree" && GOFLAGS=-short "$work/gremlins" unleash "$package" \
    --exclude-files / --timeout-coefficient 5 --output-statuses lct --output "$report") | tee "$work/log"
  summary+=$(printf '%-22s %s' "$package" "$(
    awk '/^Killed:/ { sub(/^/, ""); counts = $0 } /^Timed out:/ { timed = $0 } /^Test efficacy:/ { efficacy = $3 } /^Mutator coverage:/ { coverage = $3 }
      END { printf "efficacy %s, covered %s; %s; %s", efficacy, coverage, counts, timed }' "$work/log"
  )")$'\n'
done
printf '\n%s' "$summary"
