#!/usr/bin/env bash
# Makes .venv with everything podlift and its tests need, at the versions and hashes of
# requirements.lock. Does nothing when it is up to date.
#
#   PYTHON=python3.13         the Python to use     (default: the first of 3.11 or newer)
#   PODLIFT_VENV=.venv-313    where                 (default: .venv in the checkout)
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
  echo "error: podlift needs Python 3.11 or newer${PYTHON:+; $PYTHON is not}" >&2
  echo "  HINT: install it, or name it: PYTHON=/path/to/python3.11 $0" >&2
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
if [[ -f $venv/podlift-setup && $(<"$venv/podlift-setup") == "$wanted" ]]; then
  exit 0
fi

echo "setting up $venv ($("$python" --version)), once" >&2
if ! "$python" -m venv --clear "$venv"; then
  echo "error: $python cannot make a virtual environment" >&2
  echo "  HINT: on Debian and Ubuntu, apt-get install python3-venv" >&2
  exit 2
fi
if command -v uv >/dev/null; then
  # Byte code is compiled now, or the first run would pay two seconds for it.
  uv pip install --quiet --python "$venv/bin/python" --compile-bytecode --require-hashes \
    -r requirements.lock
  uv pip install --quiet --python "$venv/bin/python" --no-deps -e .
else
  export PIP_DISABLE_PIP_VERSION_CHECK=1
  "$venv/bin/python" -m pip install --quiet --require-hashes -r requirements.lock
  "$venv/bin/python" -m pip install --quiet --no-deps -e .
fi
printf '%s\n' "$wanted" >"$venv/podlift-setup"
