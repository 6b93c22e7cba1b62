#!/usr/bin/env bash
# Trains on N virtual CPU devices of this machine; see --help.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() {
  cat <<'EOF'
Trains on N virtual CPU devices of this machine, as if it had N chips.

  scripts/fake_devices.sh N --config=configs/mlp.py [flags of python -m launcher]

  N            devices in each process: XLA_FLAGS=--xla_force_host_platform_device_count=N;
               other flags in XLA_FLAGS are kept
  --dry-run    print the command and do nothing
  --help       this text

With --processes=P among the flags, P processes have N devices each. The launcher's own flag does
the same without XLA_FLAGS: scripts/train.sh --fake_devices=N.
EOF
}

fail() {
  echo "error: $1" >&2
  echo "  HINT: $2" >&2
  exit 2
}

dry_run=
arguments=()
for argument in "$@"; do
  case $argument in
    -h | --help)
      usage
      exit 0
      ;;
    --dry-run) dry_run=1 ;;
    *) arguments+=("$argument") ;;
  esac
done
((${#arguments[@]})) || fail "the number of devices is missing" "$0 8 --config=configs/mlp.py"
count=${arguments[0]}
[[ $count =~ ^[1-9][0-9]{0,3}$ ]] ||
  fail "$count is not a number of devices" "$0 8 --config=configs/mlp.py"

kept=()
IFS=$' \t\n' read -r -d '' -a flags <<<"${XLA_FLAGS:-}" || true
for flag in "${flags[@]+"${flags[@]}"}"; do
  [[ $flag == --xla_force_host_platform_device_count=* ]] || kept+=("$flag")
done
kept+=("--xla_force_host_platform_device_count=$count")
export XLA_FLAGS="${kept[*]}"
if [[ ${JAX_NUM_CPU_DEVICES:-$count} != "$count" ]]; then
  echo "warning: JAX_NUM_CPU_DEVICES=$JAX_NUM_CPU_DEVICES is ignored: $count devices" >&2
fi
unset JAX_NUM_CPU_DEVICES # jax would take it before XLA_FLAGS
export JAX_PLATFORMS=cpu # else jax uses the accelerators of a machine that has some

command=("$root/scripts/train.sh" "${arguments[@]:1}")
if [[ -n $dry_run ]]; then
  printf -v line ' %q' "${command[@]}"
  printf 'XLA_FLAGS=%q JAX_PLATFORMS=%q%s\n' "$XLA_FLAGS" "$JAX_PLATFORMS" "$line"
  exit 0
fi
exec "${command[@]}"
