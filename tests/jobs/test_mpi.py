"""scripts/mpi.sh with a real mpirun."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, skip_here
from job_helpers import DIGITS, log_of, losses_of, processes_of, wait_for_line

pytestmark = [
    pytest.mark.slow,
    skip_here("" if shutil.which("mpirun") else "mpirun not installed (Debian: openmpi-bin)"),
]

STEPS = ["--config.num_steps=120", "--config.log_every_steps=10"]


@pytest.fixture
def mpi(cache_dir, tmp_path):
    """Starts scripts/mpi.sh with two ranks."""

    def start(*arguments):
        return subprocess.Popen(
            [ROOT / "scripts/mpi.sh", "-n", "2", "--", DIGITS, "--fake_devices=2", *arguments],
            env={
                **{k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PJRT_NPROC")},
                "PODLIFT_PYTHON": sys.executable,
                "PYTHONPATH": str(ROOT),
                "JAX_COMPILATION_CACHE_DIR": str(cache_dir),
                "OMPI_ALLOW_RUN_AS_ROOT": "1",
                "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
                "OMPI_MCA_rmaps_base_oversubscribe": "1",
                "OMPI_MCA_oob_tcp_if_include": "lo",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def test_stopped_and_resumed_with_the_same_curve(mpi, launch, tmp_path):
    workdir = tmp_path / "run"
    first = mpi(f"--workdir={workdir}", *STEPS)
    wait_for_line(log_of(workdir, 0), "step 20/")
    first.send_signal(signal.SIGTERM)
    out, _ = first.communicate(timeout=60)
    assert first.returncode == 42, out
    assert "open_mpi: process 0 of 2" in out
    assert "asked to stop: saved at step" in out
    second = mpi(f"--workdir={workdir}", *STEPS)
    out, _ = second.communicate(timeout=120)
    assert second.returncode == 0, out
    code, out, err = launch(
        DIGITS, f"--workdir={tmp_path}/whole", "--processes=2", "--fake_devices=2", *STEPS
    )
    assert code == 0, out + err
    actual, expected = losses_of(workdir), losses_of(tmp_path / "whole")
    assert actual.keys() == expected.keys()
    for key, loss in expected.items():
        np.testing.assert_allclose(actual[key], loss, rtol=1e-5, err_msg=str(key))


def test_a_killed_rank_ends_all(mpi, tmp_path):
    workdir = tmp_path / "run"
    job = mpi(f"--workdir={workdir}", "--config.num_epochs=1000")
    wait_for_line(log_of(workdir, 0), "step 100/")
    os.system(f"pkill -KILL -f 'rank 1 of 2, {workdir}'")
    killed = time.monotonic()
    out, _ = job.communicate(timeout=60)
    assert job.returncode == 42, out
    assert time.monotonic() - killed < 15  # mpirun's own
    assert "rank 1 was killed by SIGKILL" in out
    assert processes_of(workdir) == []
