#!/usr/bin/env bash
# Creates a virtual environment with the CPU build of torch and Lightning Fabric, the peers in
# benchmarks/recovery.py and benchmarks/peers.py. podlift does not depend on them, in any extra.
#
#   benchmarks/install_torch.sh [FOLDER]    (default: podlift/torch in the user's cache)
#   PYTHON=python3.12                       the Python to use     (default: python3)
#   TORCH=2.13.0  FABRIC=2.6.6              the versions
#
# pip uses its configured index, which may be a mirror with a CPU build. PyPI's build for Linux needs
# gigabytes of CUDA libraries and is refused: set PIP_INDEX_URL to PyTorch's index of CPU builds (see
# its page on getting started).
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
