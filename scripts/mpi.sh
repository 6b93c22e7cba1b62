#!/usr/bin/env bash
# Trains with Open MPI's mpirun; see --help.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() {
  cat <<'EOF'
Trains with Open MPI's mpirun, one process per rank.

  scripts/mpi.sh -n N [-H HOSTS | --hostfile FILE] [--] --config=FILE [flags of python -m launcher]

  -n N              total number of ranks
  -H HOST,...       the machines, HOST or HOST:SLOTS
  --hostfile FILE   the same, one per line
  --dry-run         print the command and do nothing
  --help            this text

On several machines, the checkout, its .venv and --workdir must be in folders that all machines
share. On one machine, --workdir defaults to runs/mpi-DATE-TIME, and more ranks than cores are
allowed. On Ctrl-C or SIGTERM, all ranks save and exit with code 42; the same command resumes the
run. A second Ctrl-C ends it at once. Nothing restarts it automatically.

  PODLIFT_COORDINATOR_ADDRESS   HOST:PORT of the rendezvous, for several machines (default: this
                                machine if it is listed, else the first; a random port)
  PODLIFT_PYTHON                a Python that has podlift (default: that of .venv)
  OMPI_MCA_*                    settings of Open MPI, such as
                                OMPI_MCA_oob_tcp_if_include=eth0

Variables that start with JAX_, XLA_, NCCL_ or PODLIFT_ are exported to all machines. Open MPI
refuses to run as root; in your own container, set both
OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1.
EOF
}

fail() {
  echo "error: $1" >&2
  echo "  HINT: $2" >&2
  exit 2
}

dry_run=
count=
where=()
names=()
while (($#)); do
  case $1 in
    -h | --help)
      usage
      exit 0
      ;;
    --dry-run)
      dry_run=1
      shift
      ;;
    -n | -np | -H | --host | --hostfile)
      (($# > 1)) || fail "$1 needs a value" "$0 -n 2 -H host1,host2 --config=configs/mlp.py"
      [[ $1 == -n* || ${#where[@]} == 0 ]] || fail "the hosts are given twice" "use either -H or --hostfile"
      case $1 in
        -n*) count=$2 ;;
        -H | --host)
          where=(-H "$2")
          IFS=, read -r -a names <<<"$2"
          ;;
        *)
          [[ -r $2 ]] || fail "there is no file $2" "--hostfile FILE, one host per line"
          where=(--hostfile "$2")
          while read -r name _ || [[ -n $name ]]; do
            [[ -z $name || $name == \#* ]] || names+=("$name")
          done <"$2"
          ;;
      esac
      shift 2
      ;;
    --)
      shift
      break
      ;;
    *) break ;;
  esac
done
workdir=
for argument in "$@"; do
  case $argument in
    -h | --help)
      usage
      exit 0
      ;;
    --workdir | --workdir=* | -workdir | -workdir=*) workdir=1 ;;
    --dry-run | -n | -H | --hostfile) fail "$argument must come before --config" "see --help" ;;
  esac
done
[[ -n $count ]] || fail "the number of ranks is missing" "$0 -n 2 --config=configs/mlp.py"
[[ $count =~ ^[1-9][0-9]*$ ]] || fail "-n $count is not a number of ranks" "-n 2"
(($#)) || fail "--config is missing" "$0 -n $count --config=configs/mlp.py"

# Rank 0 runs on this machine if the list contains it at any position, else on the first.
several=
first=${names[0]:-}
first=${first%%:*}
here=$(hostname)
mine=" localhost $here ${here%%.*} $(hostname -I 2>/dev/null || true) "
for name in "${names[@]+"${names[@]}"}"; do
  name=${name%%:*}
  [[ $name == "${names[0]%%:*}" ]] || several=1
  [[ $mine != *" $name "* ]] || first=$name
done
[[ $first != localhost ]] || first=$here
if [[ -n $several && -z ${PODLIFT_COORDINATOR_ADDRESS:-} ]]; then
  # Random, so that two jobs on the same machines do not collide; below the ephemeral ports.
  export PODLIFT_COORDINATOR_ADDRESS="$first:$((20000 + RANDOM % 10000))"
fi
if [[ -z $several ]]; then
  [[ -n $workdir ]] || set -- "$@" "--workdir=runs/mpi-$(date +%Y%m%d-%H%M%S)"
  export OMPI_MCA_rmaps_base_oversubscribe=${OMPI_MCA_rmaps_base_oversubscribe:-1}
fi
exported=()
for name in "${!JAX_@}" "${!XLA_@}" "${!NCCL_@}" "${!PODLIFT_@}"; do
  exported+=(-x "$name")
done
# Seconds that mpirun waits after a rank's exit code before it asks the others to stop, and again
# before it kills them. It always waits in full. Launchers end together, so a short time is enough.
export OMPI_MCA_odls_base_sigkill_timeout=${OMPI_MCA_odls_base_sigkill_timeout:-2}
export PRTE_MCA_odls_base_sigkill_timeout=${PRTE_MCA_odls_base_sigkill_timeout:-2}

venv=${PODLIFT_VENV:-.venv}
[[ $venv == /* ]] || venv=$root/$venv
python=${PODLIFT_PYTHON:-$venv/bin/python}
command=(mpirun -n "$count" "${where[@]+"${where[@]}"}" "${exported[@]+"${exported[@]}"}"
  "$python" -m launcher "$@")
if [[ -n $dry_run ]]; then
  printf -v line ' %q' "${command[@]}"
  [[ -z $several ]] || line=" PODLIFT_COORDINATOR_ADDRESS=$PODLIFT_COORDINATOR_ADDRESS$line"
  echo "${line:1}"
  exit 0
fi
command -v mpirun >/dev/null || fail "there is no mpirun" "install Open MPI, or load its module"
if ((EUID == 0)) && [[ ${OMPI_ALLOW_RUN_AS_ROOT:-}${OMPI_ALLOW_RUN_AS_ROOT_CONFIRM:-} != 11 ]]; then
  # Only the user knows whether this is a throw-away container.
  fail "Open MPI does not run as root" \
    "run as a user, or set OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"
fi
[[ -n ${PODLIFT_PYTHON:-} ]] || "$root/scripts/setup.sh"

# mpirun kills its ranks one second after SIGTERM, but forwards SIGUSR1, which asks them to save. It
# gets its own process group so that Ctrl-C does not reach it.
set -m
"${command[@]}" </dev/null &
mpirun=$!
set +m
signalled=
interrupts=0
# shellcheck disable=SC2329 # by trap
request() {
  signalled=1
  kill -USR1 "$mpirun" 2>/dev/null || true
}
# shellcheck disable=SC2329 # by trap
interrupt() {
  interrupts=$((interrupts + 1))
  if ((interrupts > 1)); then
    echo "stopping at once" >&2
    kill -TERM "$mpirun" 2>/dev/null || true
    signalled=1
  else
    request
  fi
}
trap request TERM HUP USR1 USR2 XCPU
trap interrupt INT
while true; do
  signalled=
  code=0
  wait "$mpirun" || code=$?
  [[ -n $signalled ]] || break
done
((interrupts < 2)) || exit 130
((code <= 128)) || code=42 # a rank was killed from outside
exit "$code"
