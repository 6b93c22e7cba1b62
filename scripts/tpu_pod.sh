#!/usr/bin/env bash
# Trains on a TPU pod slice without Kubernetes; see --help.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() {
  cat <<'EOF'
Trains on a slice of Cloud TPU VMs, one process per host.

  scripts/tpu_pod.sh create NAME --zone=ZONE [--accelerator-type=v5litepod-16]
                                 [--version=v2-alpha-tpuv5-lite] [--spot]
  scripts/tpu_pod.sh run    NAME --zone=ZONE --workdir=gs://BUCKET/RUN --config=FILE [flags]
  scripts/tpu_pod.sh logs   NAME --zone=ZONE [--worker=0]
  scripts/tpu_pod.sh stop   NAME --zone=ZONE
  scripts/tpu_pod.sh delete NAME --zone=ZONE [--yes]

  create    creates the slice; it costs money until it is deleted
  run       copies the last commit of this checkout to all hosts, installs it there and starts
            python -m launcher with the flags; it does not need this machine afterwards
  logs      follows the output of one host, and prints the exit code at its end
  stop      asks the run to save and exit with code 42; run with the same --workdir resumes it
  delete    deletes the slice; asks first unless --yes is given

  --project=PROJECT   of Google Cloud (default: from gcloud config)
  --dry-run           print the commands and do nothing
  --help              this text

Nothing restarts a run. A preempted spot slice is gone: delete it, create it again and run with the
same --workdir.

Google only maintains the API behind gcloud compute tpus, which does not support TPU7x and later.
For new work use GKE: scripts/k8s/render.sh --kind=tpu.
EOF
}

fail() {
  echo "error: $1" >&2
  echo "  HINT: $2" >&2
  exit 2
}

for argument in "$@"; do
  case $argument in
    -h | --help)
      usage
      exit 0
      ;;
  esac
done
action=${1:-}
case $action in
  create | run | logs | stop | delete) ;;
  "") fail "the action is missing" "$0 create|run|logs|stop|delete NAME --zone=ZONE; see --help" ;;
  *) fail "$action is not create, run, logs, stop or delete" "see --help" ;;
esac
name=${2:-}
[[ $name =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] ||
  fail "'$name' is not a name of a TPU" "$0 $action NAME: a-z, 0-9 and -, starting with a letter"
shift 2

zone=
project=
accelerator=v5litepod-16
version=v2-alpha-tpuv5-lite
spot=
worker=0
yes=
dry_run=
config=
workdir=
arguments=()
while (($#)); do
  case $action:$1 in
    *:--zone=*) zone=${1#*=} ;;
    *:--project=*) project=${1#*=} ;;
    *:--dry-run) dry_run=1 ;;
    create:--accelerator-type=*) accelerator=${1#*=} ;;
    create:--version=*) version=${1#*=} ;;
    create:--spot) spot=1 ;;
    logs:--worker=*) worker=${1#*=} ;;
    delete:--yes) yes=1 ;;
    run:--) ;;
    run:*)
      case $1 in
        --config=*) config=1 ;;
        --workdir=*) workdir=${1#*=} ;;
      esac
      arguments+=("$1")
      ;;
    *) fail "$action does not take $1" "options are written --name=value; see --help" ;;
  esac
  shift
done
[[ $zone =~ ^[a-z0-9-]+$ ]] || fail "--zone is missing" "$0 $action $name --zone=us-west4-a"
[[ $worker =~ ^[0-9]+$ ]] || fail "--worker=$worker is not the number of a host" "--worker=0"

# These run on each host, in its home folder.
# shellcheck disable=SC2016
install='set -e
if [ -f podlift.pid ] && kill -0 "$(cat podlift.pid)" 2>/dev/null; then
  echo "error: a run is active on this host" >&2
  echo "  HINT: scripts/tpu_pod.sh logs or stop" >&2
  exit 2
fi
rm -rf podlift podlift.exit podlift.log podlift.pid
mkdir podlift
tar -xzf podlift.tar.gz -C podlift
if [ ! -x podlift-venv/bin/python ]; then
  python3 -m pip install --quiet --user uv
  python3 -m uv venv --quiet --python 3.12 podlift-venv
fi
cd podlift
python3 -m uv pip install --quiet --python ../podlift-venv/bin/python \
  --constraint requirements.lock --editable ".[tpu,data]" "etils[epath-gcs]"'
# shellcheck disable=SC2016
start='"$@" >../podlift.log 2>&1 & echo $! >../podlift.pid; wait $!; echo $? >../podlift.exit'
# shellcheck disable=SC2016
follow='tail -n 100 -f --pid="$(cat podlift.pid)" podlift.log
sleep 2
echo "exit code: $(cat podlift.exit)"'
# shellcheck disable=SC2016
stop='kill -TERM "$(cat podlift.pid)"'

tpu_vm=(gcloud compute tpus tpu-vm)
place=("--zone=$zone")
[[ -z $project ]] || place+=("--project=$project")

run() {
  if [[ -n $dry_run ]]; then
    printf -v line ' %q' "$@"
    echo "${line:1}"
  else
    "$@"
  fi
}
[[ -n $dry_run ]] || command -v gcloud >/dev/null ||
  fail "there is no gcloud" "https://cloud.google.com/sdk/docs/install, or --dry-run"

case $action in
  create)
    options=("--accelerator-type=$accelerator" "--version=$version")
    [[ -z $spot ]] || options+=(--spot)
    run "${tpu_vm[@]}" create "$name" "${place[@]}" "${options[@]}"
    ;;
  run)
    [[ -n $config ]] || fail "--config is missing" "$0 run $name ... --config=configs/mlp.py"
    [[ $workdir == *://* || $workdir == /* ]] ||
      fail "--workdir must be a folder that all hosts share" "--workdir=gs://BUCKET/RUN"
    [[ -z $(git -C "$root" status --porcelain --untracked-files=no) ]] ||
      echo "warning: copying the last commit, without the uncommitted changes" >&2
    folder=podlift
    if [[ -z $dry_run ]]; then
      folder=$(mktemp -d)
      trap 'rm -rf "$folder"' EXIT
    fi
    printf -v quoted ' %q' "${arguments[@]}"
    run git -C "$root" archive --format=tar.gz --output="$folder/podlift.tar.gz" HEAD
    place+=(--worker=all)
    run "${tpu_vm[@]}" scp "$folder/podlift.tar.gz" "$name:podlift.tar.gz" "${place[@]}"
    run "${tpu_vm[@]}" ssh "$name" "${place[@]}" --command="$install"
    # ssh returns only when nothing holds its output open.
    run "${tpu_vm[@]}" ssh "$name" "${place[@]}" --command="cd podlift
exec </dev/null >/dev/null 2>&1
setsid nohup bash -c '$start' podlift ../podlift-venv/bin/python -m launcher$quoted &"
    ;;
  logs)
    run "${tpu_vm[@]}" ssh "$name" "${place[@]}" "--worker=$worker" --command="$follow"
    ;;
  stop)
    run "${tpu_vm[@]}" ssh "$name" "${place[@]}" --worker=0 --command="$stop"
    ;;
  delete)
    if [[ -z $yes && -z $dry_run ]]; then
      question="Delete the TPU $name in $zone with its disks? [y/N] "
      read -r -p "$question" answer || answer=
      [[ $answer == [yY] ]] || fail "$name is not deleted" "answer y, or add --yes"
    fi
    run "${tpu_vm[@]}" delete "$name" "${place[@]}" --quiet
    ;;
esac
