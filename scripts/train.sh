#!/usr/bin/env bash
# Trains on this machine: scripts/train.sh --config=configs/mlp.py [flags of python -m launcher]
# Sets up .venv the first time. Paths are relative to the current folder.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/scripts/setup.sh"
venv=${PODLIFT_VENV:-.venv}
[[ $venv == /* ]] || venv=$root/$venv
exec "$venv/bin/python" -m launcher "$@"
