#!/usr/bin/env bash
# Runs the tests: scripts/test.sh [--fast | --wide] [arguments of pytest]
#
#   --fast    skip tests marked slow or wide
#   --wide    skip tests marked slow
#
# Sets up .venv the first time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh
python=${PODLIFT_VENV:-.venv}/bin/python
arguments=()
for argument in "$@"; do
  if [[ $argument == --fast ]]; then
    arguments+=(-m "not slow and not wide")
  elif [[ $argument == --wide ]]; then
    arguments+=(-m "not slow")
  else
    arguments+=("$argument")
  fi
done
exec "$python" -m pytest -n 2 --dist=worksteal "${arguments[@]+"${arguments[@]}"}"
