#!/usr/bin/env bash
# Creates .venv with everything that podlift and its tests need, at the versions and hashes of
# requirements.lock. Does nothing if it is up to date.
#
#   scripts/setup.sh tpu      adds an extra of setup.cfg (tpu, cuda13, cuda12, k8s, profile, ...)
#   scripts/setup.sh plan-gpu adds the compiler for GPUs, without CUDA, for `python -m launcher plan`
#
#   PYTHON=python3.13         the Python to use     (default: the first of 3.11 or newer)
#   PODLIFT_VENV=.venv-313    the environment       (default: .venv in the checkout)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${PODLIFT_VENV:-.venv}

is_new_enough() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

python=
for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11; do
  if [[ -n $candidate ]] && is_new_enough "$candidate"; then
    python=$candidate
    break
  fi
done
if [[ -z $python || (-n ${PYTHON:-} && $python != "$PYTHON") ]]; then
  echo "error: podlift needs Python 3.11 or newer${PYTHON:+, and $PYTHON is not}" >&2
  echo "  HINT: install it, or set PYTHON=/path/to/python3.11 for $0" >&2
  exit 2
fi

wanted=$("$python" - <<'PY'
import hashlib, pathlib, sys
digest = hashlib.sha256(sys.version.encode())
for name in ("requirements.lock", "setup.cfg"):
    digest.update(pathlib.Path(name).read_bytes())
print(digest.hexdigest())
PY
)
make_venv() {
  echo "setting up $venv ($("$python" --version)), once" >&2
  if ! "$python" -m venv --clear "$venv"; then
    echo "error: $python cannot make a virtual environment" >&2
    echo "  HINT: on Debian and Ubuntu, apt-get install python3-venv" >&2
    exit 2
  fi
  if command -v uv >/dev/null; then
    # Else the first run spends two seconds on byte code.
    uv pip install --quiet --python "$venv/bin/python" --compile-bytecode --require-hashes \
      -r requirements.lock
    uv pip install --quiet --python "$venv/bin/python" --no-deps -e .
  else
    export PIP_DISABLE_PIP_VERSION_CHECK=1
    "$venv/bin/python" -m pip install --quiet --require-hashes -r requirements.lock
    "$venv/bin/python" -m pip install --quiet --no-deps -e .
  fi
  printf '%s\n' "$wanted" >"$venv/podlift-setup"
}

# install ARGUMENTS: as for `pip install`.
install() {
  if command -v uv >/dev/null; then
    uv pip install --quiet --python "$venv/bin/python" "$@"
  else
    PIP_DISABLE_PIP_VERSION_CHECK=1 "$venv/bin/python" -m pip install --quiet "$@"
  fi
}

add_extra() {
  local versions jax
  if [[ $1 == plan-gpu ]]; then
    # In a separate folder that only a plan reads: in the environment, jax would find the plugin at
    # each start and warn about missing CUDA libraries.
    jax=$("$venv/bin/python" -c 'import importlib.metadata as m; print(m.version("jax"))')
    echo "adding the GPU compiler of jax $jax to $venv/plan-gpu" >&2
    rm -rf "$venv/plan-gpu"
    install --no-deps --target "$venv/plan-gpu" \
      "jax-cuda13-plugin==$jax.*" "jax-cuda13-pjrt==$jax.*"
    return
  fi
  echo "adding the extra '$1' to $venv" >&2
  versions=$(mktemp)
  # Without hashes, which pip would demand of packages outside the lock too.
  sed -n 's/^\([A-Za-z0-9][^\\]*[^ \\]\).*/\1/p' requirements.lock >"$versions"
  install --constraint "$versions" -e ".[$1]"
  rm -f "$versions"
}

# The requested extras are listed beside the environment, which is rebuilt when versions change; the
# installed ones inside it.
known=$(sed -n '/^\[options.extras_require\]/,/^\[tool/s/^\([a-z0-9]*\) *=.*/\1/p' setup.cfg | tr '\n' ' ')
for extra in "$@"; do
  if [[ -z $extra || " $known plan-gpu " != *" $extra "* ]]; then
    echo "error: there is no extra '$extra'" >&2
    echo "  HINT: there are plan-gpu and those of setup.cfg: $known" >&2
    exit 2
  fi
  if ! grep -Fqsx -- "$extra" "$venv.extras"; then
    printf '%s\n' "$extra" >>"$venv.extras"
  fi
done
if [[ ! -f $venv/podlift-setup || $(<"$venv/podlift-setup") != "$wanted" ]]; then
  make_venv
fi
if [[ -f $venv.extras ]]; then
  while IFS= read -r extra; do
    if ! grep -Fqsx -- "$extra" "$venv/podlift-extras"; then
      add_extra "$extra"
      printf '%s\n' "$extra" >>"$venv/podlift-extras"
    fi
  done <"$venv.extras"
fi
