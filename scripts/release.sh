#!/usr/bin/env bash
# Builds what a release consists of into dist/, and publishes nothing: archives,
# their checksums, and a list of each binary's modules (an SBOM in CycloneDX).
#
# On a clean checkout of a tag such as v1.2.3 that is the version. Anything else
# is a snapshot, whose version says so.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

goreleaser=github.com/goreleaser/goreleaser/v2@v2.13.3
if [[ $(go version -m bin/goreleaser 2>/dev/null | awk '$1 == "mod" { print $3 }') != "${goreleaser#*@}" ]]; then
  echo "Building GoReleaser from its Go module, which takes some 5 minutes on two cores." >&2
  GOBIN=$PWD/bin go install "$goreleaser"
fi

args=(release --clean --skip=publish)
if ! tag=$(git describe --exact-match --tags --match 'v[0-9]*' 2>/dev/null); then
  echo "No tag at this commit: building a snapshot." >&2
  args+=(--snapshot)
elif [[ -n $(git status --porcelain) ]]; then
  echo "Uncommitted changes on top of $tag: building a snapshot." >&2
  args+=(--snapshot)
else
  export GORELEASER_CURRENT_TAG=$tag
fi
if ! git remote get-url origin >/dev/null 2>&1; then
  # GoReleaser asks for the repository's address even where it publishes nothing.
  export GIT_CONFIG_COUNT=1 GIT_CONFIG_KEY_0=remote.origin.url GIT_CONFIG_VALUE_0=$PWD
fi
bin/goreleaser "${args[@]}"

# The version is set by name: a name that does not exist is passed over in silence.
built=$(go env GOOS)_$(go env GOARCH)
for binary in dist/*_"$built"*/vault-plugin-secrets-kaizala*; do
  version=$("$binary" -version)
  if [[ ! -e dist/vault-plugin-secrets-kaizala_${version#v}_$built.cdx.json ]]; then
    echo "release.sh: $binary says that it is $version, and dist/ does not" >&2
    exit 1
  fi
  echo "Built $version:"
done
ls dist/SHA256SUMS dist/*.tar.gz dist/*.zip dist/*.cdx.json
