# shellcheck shell=bash
# What demo.sh and demo-oauth.sh have in common: a temporary directory, processes that end with the script, commands that
# are printed as one would type them, and a Vault in dev mode with the plugin registered. Sourced, with root set to the
# repository, after the script's own arguments were read.
#
# Secrets travel through files that only their owner may read, or through pipes: never on a command line.

: "${root:?}"
plugin=vault-plugin-secrets-kaizala

# A Vault that this shell usually talks to has no part in what follows.
unset "${!VAULT_@}"

umask 077
work=$(mktemp -d "${TMPDIR:-/tmp}/kaizala-demo.XXXXXX")
work=$(cd "$work" && pwd -P)
pids=()

# shellcheck disable=SC2317,SC2329 # called by trap
cleanup() {
  local status=$? pid
  trap '' INT TERM
  trap - EXIT
  for pid in ${pids[@]+"${pids[@]}"}; do
    kill -TERM -- "-$pid" 2>/dev/null || true
  done
  for pid in ${pids[@]+"${pids[@]}"}; do
    for _ in {1..50}; do
      kill -0 "$pid" 2>/dev/null || break
      sleep 0.1
    done
    # A plugin outlives a Vault that had to be killed: the whole group goes.
    kill -KILL -- "-$pid" 2>/dev/null || true
    wait "$pid" 2>/dev/null || true
  done
  rm -rf "$work"
  exit "$status"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

fail() {
  printf '\nFAILED: %s\n' "$*" >&2
  if [[ -s $work/vault.log ]]; then
    printf '\nThe end of the log of Vault:\n' >&2
    grep -E '\[(WARN|ERROR)\]|panic' "$work/vault.log" | tail -n 10 >&2 || true
    tail -n 5 "$work/vault.log" >&2
  fi
  exit 1
}

say() {
  echo
  printf '# %s\n' "$@"
}

# ran prints a command, runs it and prints its answer, which is then in
# $output, and its exit status in $status.
ran() {
  printf '\n$ %s\n' "$1"
  status=0
  output=$(eval "$1" 2>&1) || status=$?
  [[ -z $output ]] || printf '%s\n' "$output"
}

works() {
  ran "$1"
  ((status == 0)) || fail "this should have worked, and ended with status $status: $1"
}

denied() {
  ran "$1"
  ((status != 0)) || fail "this should have been refused: $1"
  [[ $output == *"permission denied"* ]] || fail "this should have been refused for lack of permission: $1"
}

# sets is a command for this shell itself, such as an assignment.
sets() {
  printf '\n$ %s\n' "$1"
  eval "$1" || fail "this should have worked: $1"
}

checked() { printf '  ✓ %s\n' "$*"; }

# field FILE NAME is the value of a field in what vault has printed.
field() { awk -v name="$2" '$1 == name { print $2 }' "$1"; }

# prepare VAULT puts the programs where one would have them, under the names
# that one would type.
prepare() {
  mkdir "$work/plugins" "$work/path"
  cp "$root/bin/$plugin" "$work/plugins/"
  chmod 0755 "$work/plugins/$plugin"
  ln -s "$1" "$work/path/vault"
  ln -s "$root/bootstrap" "$work/bootstrap"
  export PATH=$work/path:$PATH
  cd "$work" || return
  # From here on each background process leads a process group of its own, so
  # that it can be ended with all its children, and Ctrl-C reaches the script
  # alone.
  set -m
}

# start_vault sets VAULT_ADDR, ROOT_TOKEN and vault_pid.
start_vault() {
  local port started=
  cat >vault.hcl <<HCL
plugin_directory = "$work/plugins"
disable_mlock    = true
HCL
  ROOT_TOKEN=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
  # A port may be taken between the look and the start: then another one is tried.
  for _ in {1..5}; do
    port=$((20000 + RANDOM % 12000))
    export VAULT_ADDR=http://127.0.0.1:$port
    : >vault.log
    VAULT_DEV_ROOT_TOKEN_ID=$ROOT_TOKEN vault server -dev -dev-no-store-token \
      -dev-listen-address="127.0.0.1:$port" -config=vault.hcl >>vault.log 2>&1 &
    vault_pid=$!
    pids+=("$vault_pid")
    for _ in {1..300}; do
      kill -0 "$vault_pid" 2>/dev/null || break
      # Dev mode says this last, once the server is unsealed and active.
      if grep -q 'Development mode should NOT be used' vault.log; then
        started=yes
        break
      fi
      sleep 0.1
    done
    [[ -z $started ]] || break
    grep -q 'address already in use' vault.log || break
  done
  [[ -n $started ]] || fail "Vault did not start"
}

# register_plugin is what the operator does first.
register_plugin() {
  works "vault plugin register -sha256=\"\$(sha256sum plugins/$plugin | cut -d' ' -f1)\" -version=$("$root/bin/$plugin" -version) secret $plugin"
}
