#!/usr/bin/env bash
# Checks style, types, imports between rooms, shell scripts and docs. CI runs it before the tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh
bin=${PODLIFT_VENV:-.venv}/bin
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/python" -m mypy
"$bin/lint-imports" --no-logo --no-cache
"$bin/shellcheck" scripts/*.sh scripts/slurm.sbatch scripts/k8s/*.sh findings/*.sh .ci/run
"$bin/sphinx-build" -W -q docs docs/_build
