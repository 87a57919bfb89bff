#!/usr/bin/env bash
# gofmt, go vet and staticcheck on the Go files; bash -n and shellcheck on
# the scripts; shellcheck is installed where that is possible without asking. bootstrap/vault is formatted only: to vet it
# is to compile Vault.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

staticcheck=${STATICCHECK:-honnef.co/go/tools/cmd/staticcheck@v0.8.2}

echo "gofmt"
mapfile -t files < <(git ls-files --cached --others --exclude-standard -- '*.go')
unformatted=$(gofmt -l -s "${files[@]}")
if [[ -n $unformatted ]]; then
  printf 'not formatted; run gofmt -s -w on:\n%s\n' "$unformatted" >&2
  exit 1
fi

echo "go vet"
go vet ./...
(cd bootstrap/authserver && go vet ./...)

echo "staticcheck"
go run "$staticcheck" ./...
(cd bootstrap/authserver && go run "$staticcheck" ./...)

mapfile -t scripts < <(git ls-files --cached --others --exclude-standard -- '*.sh' .ci/run)
echo "bash -n"
for script in "${scripts[@]}"; do
  bash -n "$script"
done
if ! command -v shellcheck >/dev/null && [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
  echo "installing shellcheck from Debian's packages"
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y shellcheck >/dev/null
fi
if command -v shellcheck >/dev/null; then
  echo "shellcheck"
  shellcheck -x "${scripts[@]}"
else
  echo "shellcheck is not installed here: left out"
fi
