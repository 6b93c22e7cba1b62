#!/usr/bin/env bash
# Makes a virtual environment with the CPU build of torch and Lightning Fabric, for
# benchmarks/recovery.py and benchmarks/peers.py: opponents, not a part of podlift, and so none of
# its extras.
#
#   benchmarks/install_torch.sh [FOLDER]    (default: podlift/torch in the user's cache)
#   PYTHON=python3.12                       the Python to use     (default: python3)
#   TORCH=2.13.0  FABRIC=2.6.6              the versions
#
# pip is asked as it is configured, where a mirror may hold a CPU build. On Linux, PyPI's own build
# is for CUDA and takes gigabytes, so that one is left alone: then name PyTorch's index of CPU builds
# (see its page on getting started) in PIP_INDEX_URL.
set -euo pipefail
folder=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/podlift/torch}
python=${PYTHON:-python3}
wanted=("torch==${TORCH:-2.13.0}" "lightning-fabric==${FABRIC:-2.6.6}" numpy)
pip=("$folder/bin/python" -m pip --disable-pip-version-check)

if ! "$folder/bin/python" -W ignore -c "import lightning_fabric, numpy, torch" 2>/dev/null; then
  "$python" -m venv --clear "$folder"
  plan=$(mktemp)
  trap 'rm -f "$plan"' EXIT
  if "${pip[@]}" install --quiet --dry-run --report "$plan" "${wanted[@]}" 2>/dev/null &&
    ! grep -qiE '"name": "(nvidia|cuda|triton)' "$plan"; then
    "${pip[@]}" install --quiet "${wanted[@]}"
  else
    echo "pip finds no CPU build of ${wanted[*]}: name an index that has one in PIP_INDEX_URL" >&2
    rm -rf -- "$folder"
    exit 1
  fi
fi
"$folder/bin/python" -W ignore -c '
import lightning_fabric, torch
print("torch", torch.__version__, "lightning-fabric", lightning_fabric.__version__)' >&2
echo "$folder/bin/python"
