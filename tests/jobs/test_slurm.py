"""scripts/slurm.sbatch on a real SLURM: it trains, is preempted, requeued, and finishes."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest
from conftest import ROOT, skip_here
from job_helpers import CONFIG, DIGITS, HERE, log_of, losses_of, wait_for_line
from slurm import Slurm, why_not

pytestmark = [
    pytest.mark.slow,
    skip_here(why_not()),
    pytest.mark.xdist_group("slurm"),
]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.stop()


@pytest.fixture
def submit(slurm, cache_dir):
    """Submits scripts/slurm.sbatch; returns the job's number."""

    def sbatch(options, *arguments):
        environ = {
            "PODLIFT_PYTHON": sys.executable,
            "PYTHONPATH": f"{ROOT}:{HERE}",
            "PODLIFT_RUNS": str(slurm.folder / "runs"),
            "JAX_COMPILATION_CACHE_DIR": str(cache_dir),
        }
        script = str(ROOT / "scripts/slurm.sbatch")
        return slurm.run("sbatch", "--parsable", *options, script, *arguments, **environ).strip()

    return sbatch


def test_preempted_requeued_and_finished_with_the_same_curve(slurm, submit, launch, tmp_path):
    steps = ["--config.num_steps=300", "--config.log_every_steps=10"]
    job = submit(["-N4", "-n4"], DIGITS, "--fake_devices=2", *steps)
    workdir = slurm.folder / f"runs/slurm-{job}"
    slurm.wait_for(lambda: log_of(workdir, 0).exists(), 60)
    wait_for_line(log_of(workdir, 0), "step 20/")
    urgent = slurm.run(
        "sbatch", "--parsable", "-phigh", "-N4", "--exclusive", "--wrap=sleep 1"
    ).strip()
    slurm.wait_for(lambda: slurm.state(urgent)["JobState"] == "COMPLETED", 60)
    slurm.wait_for(lambda: slurm.state(job)["JobState"] == "COMPLETED", 120)
    assert slurm.state(job)["Restarts"] == "1"
    output = (slurm.folder / f"slurm-{job}.out").read_text()
    assert "slurm: process 0 of 4, rank 0 at n1:" in output
    assert "SLURM_PROCID" in output
    assert "asked to stop: saved at step" in output
    assert "restored step" in output
    code, out, err = launch(
        DIGITS, f"--workdir={tmp_path}/run", "--processes=4", "--fake_devices=2", *steps
    )
    assert code == 0, out + err
    actual, expected = losses_of(workdir), losses_of(tmp_path / "run")
    assert actual.keys() == expected.keys()
    for key, loss in expected.items():
        np.testing.assert_allclose(actual[key], loss, rtol=1e-5, err_msg=str(key))


@pytest.mark.parametrize(
    ("tasks", "arguments", "code", "printed"),
    [
        (2, [DIGITS, "--config.model.target=a.b:c"], 2, "there is no module 'a'"),
        # A crash in native code, with no launcher to say so.
        (1, [CONFIG, "--config.data.kind=abort", "--config.data.rank=0"], 1, "Segmentation fault"),
    ],
)
def test_a_failure_of_the_program_is_not_requeued(slurm, submit, tasks, arguments, code, printed):
    job = submit([f"-N{tasks}", f"-n{tasks}"], *arguments, "--fake_devices=1")
    slurm.wait_for(lambda: slurm.state(job)["JobState"] == "FAILED", 60)
    assert slurm.state(job)["ExitCode"] == f"{code}:0"
    assert slurm.state(job)["Restarts"] == "0"
    assert printed in (slurm.folder / f"slurm-{job}.out").read_text()


def test_a_killed_task_is_requeued_and_resumes(slurm, submit):
    steps = ["--config.num_steps=120", "--config.checkpoint.every_steps=20"]
    job = submit(["-N2", "-n2"], DIGITS, "--fake_devices=1", *steps, "--config.log_every_steps=10")
    workdir = slurm.folder / f"runs/slurm-{job}"
    slurm.wait_for(lambda: log_of(workdir, 0).exists(), 60)
    wait_for_line(log_of(workdir, 0), "step 50/")
    os.system(f"pkill -KILL -f 'rank 1 of 2, {workdir}'")
    slurm.wait_for(lambda: slurm.state(job)["JobState"] == "COMPLETED", 120)
    assert slurm.state(job)["Restarts"] == "1"
    output = (slurm.folder / f"slurm-{job}.out").read_text()
    assert "rank 1 was killed by SIGKILL" in output
    assert "restored step" in output


def test_a_batch_shell_without_srun_gets_a_hint(slurm):
    command = f"{sys.executable} -m launcher {DIGITS} --workdir=x"
    job = slurm.run(
        "sbatch",
        "--parsable",
        "-n2",
        "--output=bare.out",
        f"--wrap={command}",
        PYTHONPATH=str(ROOT),
    ).strip()
    slurm.wait_for(lambda: slurm.state(job)["JobState"] == "FAILED", 60)
    output = (slurm.folder / "bare.out").read_text()
    assert "srun" in output
    assert "HINT" in output
    assert slurm.state(job)["ExitCode"] == "2:0"
