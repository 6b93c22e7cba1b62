#!/usr/bin/env bash
# Prints a Kubernetes manifest of a training job; see --help.
set -euo pipefail
folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

usage() {
  cat <<'EOF'
Prints the manifest of a JobSet that trains on GKE TPU slices or on GPU nodes.

  scripts/k8s/render.sh --name=NAME --image=IMAGE --kind=tpu|gpu --workdir=DIR --config=FILE
                        [options] [-- flags of python -m launcher] | kubectl apply -f -

  --name=NAME            of the JobSet
  --image=IMAGE          an image that can run python -m launcher and contains FILE
  --kind=tpu|gpu
  --hosts=N              pods per slice, one process each
                         (default: 4 with TPUs, 2 with GPUs)
  --workdir=DIR          gs://BUCKET/RUN, or /runs/RUN together with --claim
  --claim=CLAIM          a persistent volume claim that all pods can write, mounted at /runs
  --chips=N              TPU chips per host (default: 4)
  --accelerator=TYPE     TPUs, the node label of GKE (default: tpu-v5-lite-podslice)
                         GPUs, the node label of GKE, such as nvidia-h100-80gb (default: any)
  --topology=AxB[xC]     chips of a slice; the product is hosts x chips (default: 4x4)
  --slices=N             TPU slices, or groups of GPU hosts (default: 1)
  --gpus=N               GPUs per host (default: 8)
  --queue=QUEUE          a local queue of Kueue, which starts the job when there is quota
  --account=ACCOUNT      a Kubernetes service account with access to the bucket
  --user=UID             of the processes (default: 1000); 0 if only root may open the
                         accelerators
  --max-restarts=N       maximum number of restarts after a preemption (default: 100)
  --dry-run              accepted; this script only prints
  --help                 this text

The JobSet resumes by itself after a preemption, a lost node or a killed pod. It ends when the
program fails (exit code 1) or on a mistake in the flags (2). kubectl delete jobset NAME saves and
ends it.
EOF
}

fail() {
  echo "error: $1" >&2
  echo "  HINT: $2" >&2
  exit 2
}

name=
image=
kind=
hosts=
workdir=
config=
claim=
chips=4
accelerator=
topology=4x4
slices=1
gpus=8
queue=
account=
user=1000
max_restarts=100
while (($#)); do
  case $1 in
    -h | --help)
      usage
      exit 0
      ;;
    --dry-run) ;;
    --name=*) name=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --kind=*) kind=${1#*=} ;;
    --hosts=*) hosts=${1#*=} ;;
    --workdir=*) workdir=${1#*=} ;;
    --config=*) config=${1#*=} ;;
    --claim=*) claim=${1#*=} ;;
    --chips=*) chips=${1#*=} ;;
    --accelerator=*) accelerator=${1#*=} ;;
    --topology=*) topology=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --gpus=*) gpus=${1#*=} ;;
    --queue=*) queue=${1#*=} ;;
    --account=*) account=${1#*=} ;;
    --user=*) user=${1#*=} ;;
    --max-restarts=*) max_restarts=${1#*=} ;;
    --)
      shift
      break
      ;;
    *) fail "there is no option $1" "flags of the launcher go after --; see --help" ;;
  esac
  shift
done

# Pods are called NAME-train-SLICE-HOST, which must be a DNS label of at most 63 characters.
[[ $name =~ ^[a-z]([-a-z0-9]{0,40}[a-z0-9])?$ ]] ||
  fail "--name='$name' is not a name" "at most 42 of a-z, 0-9 and -, starting with a letter: --name=mlp"
[[ $image =~ ^[A-Za-z0-9][A-Za-z0-9._/:@-]*$ ]] ||
  fail "--image='$image' is not an image" "--image=REGISTRY/IMAGE:TAG"
[[ $kind == tpu || $kind == gpu ]] || fail "--kind='$kind' is not tpu or gpu" "--kind=tpu"
[[ -n $config ]] || fail "--config is missing" "--config=configs/mlp.py"
if [[ $kind == tpu ]]; then
  hosts=${hosts:-4}
  accelerator=${accelerator:-tpu-v5-lite-podslice}
  resource=google.com/tpu
  count=$chips
else
  hosts=${hosts:-2}
  resource=nvidia.com/gpu
  count=$gpus
fi
for option in "hosts=$hosts" "chips=$chips" "slices=$slices" "gpus=$gpus"; do
  [[ $option =~ =[1-9][0-9]{0,3}$ ]] || fail "--$option is not a number of at least 1" "see --help"
done
for option in "user=$user" "max-restarts=$max_restarts"; do
  [[ $option =~ =(0|[1-9][0-9]{0,8})$ ]] || fail "--$option is not a number" "see --help"
done
for option in "claim=$claim" "queue=$queue" "account=$account"; do
  [[ $option =~ =([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?)?$ ]] ||
    fail "--$option is not a name in Kubernetes" "a-z, 0-9, - and ."
done
[[ $accelerator =~ ^[A-Za-z0-9._-]{0,63}$ ]] ||
  fail "--accelerator=$accelerator is not a label" "--accelerator=tpu-v5-lite-podslice"
if [[ $kind == tpu ]]; then
  [[ $topology =~ ^[1-9][0-9]{0,2}(x[1-9][0-9]{0,2}){1,2}$ ]] ||
    fail "--topology=$topology is not a topology" "--topology=4x4"
  total=$((${topology//x/*}))
  have=$((hosts * chips))
  ((total == have)) ||
    fail "--topology=$topology has $total chips, but --hosts=$hosts with --chips=$chips have $have" \
      "--hosts=$(((total + chips - 1) / chips))"
fi
if [[ -n $claim ]]; then
  [[ $workdir == /runs/?* ]] ||
    fail "--workdir='$workdir' is not on the claim" "the claim is mounted at /runs: --workdir=/runs/$name"
else
  [[ $workdir == *://?* ]] ||
    fail "--workdir='$workdir' is not a folder that all pods share" "gs://BUCKET/$name, or --claim"
fi

# A YAML string in double quotes, which takes the escapes of JSON.
quote() {
  local text=$1
  text=${text//\\/\\\\}
  text=${text//\"/\\\"}
  text=${text//$'\n'/\\n}
  text=${text//$'\t'/\\t}
  [[ $text != *[[:cntrl:]]* ]] || fail "'$1' has a control character" "remove it"
  printf '"%s"' "$text"
}

# The same for an argument. Kubernetes expands $(NAME), and reads $$ as $.
quote_argument() {
  quote "${1//\$/\$\$}"
}

arguments=$(quote_argument "--config=$config")
for argument in "--workdir=$workdir" "$@"; do
  quoted=$(quote_argument "$argument")
  arguments+=", $quoted"
done
coordinator=$name-train-0-0.$name

conditions=" $kind "
[[ -z $queue ]] || conditions+="queue "
[[ -z $account ]] || conditions+="account "
[[ -z $claim ]] || conditions+="claim "
[[ -z $accelerator ]] || conditions+="accelerator "
[[ $kind == tpu || -z $accelerator ]] || conditions+="gpu_type "
[[ $kind == gpu || $slices == 1 ]] || conditions+="multislice "
[[ $kind == gpu || $user != 0 ]] || conditions+="tpu_root "

value_of() {
  case $1 in
    NAME) quote "$name" ;;
    MAX_RESTARTS) printf %s "$max_restarts" ;;
    SLICES) printf %s "$slices" ;;
    HOSTS) printf %s "$hosts" ;;
    QUEUE) quote "$queue" ;;
    ACCOUNT) quote "$account" ;;
    ACCELERATOR) quote "$accelerator" ;;
    TOPOLOGY) quote "$topology" ;;
    RESOURCE) printf %s "$resource" ;;
    COUNT) quote "$count" ;;
    NON_ROOT) if ((user)); then printf true; else printf false; fi ;;
    USER) printf %s "$user" ;;
    IMAGE) quote "$image" ;;
    ARGUMENTS) printf %s "$arguments" ;;
    PROCESSES) quote "$((hosts * slices))" ;;
    PODS_PER_JOB) quote "$hosts" ;;
    NUM_SLICES) quote "$slices" ;;
    COORDINATOR) quote "$coordinator:8476" ;;
    SLICE_COORDINATOR) quote "$coordinator" ;;
    CLAIM) quote "$claim" ;;
    *) fail "jobset.yaml has an unknown @$1@" "see value_of in $0" ;;
  esac
}

# One pass from left to right, so that a value is never expanded again.
while IFS= read -r line; do
  [[ $line != \#* ]] || continue
  if [[ $line =~ ^(.*)\ \#\ if\ ([a-z_]+)$ ]]; then
    line=${BASH_REMATCH[1]}
    [[ $conditions == *" ${BASH_REMATCH[2]} "* ]] || continue
  fi
  out=
  while [[ $line =~ ^([^@]*)@([A-Z_]+)@(.*)$ ]]; do
    before=${BASH_REMATCH[1]}
    key=${BASH_REMATCH[2]}
    line=${BASH_REMATCH[3]}
    value=$(value_of "$key")
    out+=$before$value
  done
  printf '%s\n' "$out$line"
done <"$folder/jobset.yaml"
