"""scripts/slurm.sbatch, with stand-ins for the programs of SLURM."""

from __future__ import annotations

import signal
import subprocess

import pytest
from conftest import ROOT
from script_runs import HOSTILE, MLP, SCRIPTS, SLURM, only, shlex_of_bash, wait_for


@pytest.fixture
def job(run_script, tmp_path):
    """Runs the batch script with an srun that runs one task and returns the code it is given."""
    run_script.stand_in("python", 'record "$@"; exit "${TASK:-0}"')
    run_script.stand_in(
        "srun",
        'record "$@"; while [[ $1 == --* ]]; do shift; done; code=0; "$@" || code=$?\n'
        '[[ -z ${HANG:-} ]] || sleep 1; exit "${STEP:-$code}"',
    )
    run_script.stand_in("scancel", 'record "$@"')
    run_script.stand_in("squeue", 'record "$@"; echo "${STATE-RUNNING}"')
    run_script.stand_in("scontrol", 'record "$@"; exit "${SCONTROL:-0}"')

    def run_job(*arguments, **environ):
        given = {
            "SLURM_JOB_ID": "77",
            "SLURM_SUBMIT_DIR": tmp_path,
            "PODLIFT_PYTHON": tmp_path / "bin" / "python",
        }
        done = run_script(SLURM, *(arguments or [MLP]), cwd=tmp_path, **(given | environ))
        assert not list(tmp_path.glob("*.failed"))
        return done

    run_job.calls = run_script.calls
    return run_job


REQUEUE = ["requeue", "77"]


@pytest.mark.parametrize(
    ("environ", "code", "requeued", "says"),
    [
        ({}, 0, False, ""),
        ({"TASK": 1}, 1, False, ""),
        ({"TASK": 2}, 2, False, ""),
        ({"TASK": 127}, 127, False, ""),
        ({"TASK": 42}, 42, True, "asked to stop; requeuing job 77"),
        ({"STEP": 137}, 42, True, "a task was killed (code 137); requeuing job 77"),
        ({"STEP": 143}, 42, True, "requeuing"),
        # One task fails, and srun kills the others because of it.
        ({"TASK": 1, "STEP": 42}, 1, False, ""),
        ({"TASK": 2, "STEP": 137}, 2, False, ""),
        ({"TASK": 42, "SLURM_RESTART_COUNT": 99}, 42, True, "requeuing"),
        ({"TASK": 42, "SLURM_RESTART_COUNT": 100}, 42, False, "already requeued 100 times"),
        ({"TASK": 42, "PODLIFT_MAX_REQUEUES": 0}, 42, False, "already requeued 0 times"),
        ({"TASK": 42, "STATE": "COMPLETING"}, 42, False, "COMPLETING, so it is not requeued"),
        ({"TASK": 42, "STATE": ""}, 42, False, "gone, so it is not requeued"),
        ({"TASK": 42, "SCONTROL": 1}, 42, True, "scontrol requeue 77 failed"),
    ],
)
def test_slurm_requeues_what_can_resume(job, environ, code, requeued, says):
    done = job(**environ)
    assert done.returncode == code, done
    assert job.calls("scontrol") == ([REQUEUE] if requeued else [])
    assert says in done.stderr
    if not says:
        assert done.stderr == ""


def test_slurm_passes_arguments_on_and_adds_a_workdir(job, tmp_path):
    assert job(MLP, HOSTILE).returncode == 0
    expected = ["-m", "launcher", MLP, HOSTILE, f"--workdir={tmp_path}/runs/slurm-77"]
    assert only(job.calls("python")) == expected
    options = [option for option in only(job.calls("srun")) if option.startswith("--")][:2]
    assert options == ["--kill-on-bad-exit=1", "--wait=60"]


def test_slurm_keeps_a_given_workdir(job, tmp_path):
    job(MLP, "--workdir=/shared/run")
    job(MLP, "--workdir", "/shared/run")
    job(MLP, PODLIFT_RUNS="/shared/all runs")
    given, apart, default = (call[3:] for call in job.calls("python"))
    assert given == ["--workdir=/shared/run"]
    assert apart == ["--workdir", "/shared/run"]
    assert default == ["--workdir=/shared/all runs/slurm-77"]


def test_each_job_of_a_slurm_array_takes_a_run_of_the_sweep(job, tmp_path):
    array = {"SLURM_ARRAY_JOB_ID": "75", "SLURM_ARRAY_TASK_ID": "2"}
    done = job(MLP, "--sweep_index=$SLURM_ARRAY_TASK_ID", TASK=42, **array)
    assert done.returncode == 42
    sweep = ["--sweep_index=2", f"--workdir={tmp_path}/runs/slurm-75"]
    assert only(job.calls("python")) == ["-m", "launcher", MLP, *sweep]
    assert only(job.calls("scontrol")) == ["requeue", "75_2"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_slurm_forwards_signals_to_the_tasks(run_script, job, tmp_path, number):
    run_script.stand_in("python", f"touch {tmp_path}/started; sleep 2; exit 42")
    environ = {
        **run_script.environ,
        "SLURM_JOB_ID": "77",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "PODLIFT_PYTHON": str(tmp_path / "bin/python"),
    }
    with subprocess.Popen(["bash", str(SCRIPTS / SLURM), MLP], env=environ, cwd=tmp_path) as shell:
        wait_for((tmp_path / "started").exists)
        shell.send_signal(number)
        assert shell.wait(20) == 42
    assert only(run_script.calls("scancel")) == ["--signal=TERM", "77"]
    assert only(run_script.calls("scontrol")) == REQUEUE


def test_slurm_finds_the_checkout_or_says_so(job, tmp_path):
    done = job(PODLIFT_PYTHON="")
    assert done.returncode == 2
    assert f"there is no podlift in {tmp_path}" in done.stderr
    assert "PODLIFT_HOME" in done.stderr
    done = job(PODLIFT_PYTHON="", PODLIFT_HOME=ROOT, PODLIFT_VENV="/nowhere")
    assert done.returncode == 2
    assert "there is no /nowhere/bin/python" in done.stderr
    assert job.calls("srun") == []


def test_slurm_dry_run(run_script):
    done = run_script(SLURM, "--dry-run", MLP, HOSTILE, PODLIFT_PYTHON="/my python")
    words = shlex_of_bash(done.stdout)
    assert words[:2] == ["srun", "--kill-on-bad-exit=1"]
    assert words[-6:-1] == ["/my python", "-m", "launcher", MLP, HOSTILE]
    assert words[-1] == f"--workdir={ROOT}/runs/slurm-JOB"


def test_slurm_defaults_come_before_any_command():
    lines = (SCRIPTS / SLURM).read_text().splitlines()
    head = [line for line in lines[: lines.index("set -euo pipefail")] if line]
    assert all(line.startswith("#") for line in head)
    assert {line.partition("=")[0] for line in head if line.startswith("#SBATCH")} == {
        "#SBATCH --job-name",
        "#SBATCH --output",
        "#SBATCH --open-mode",
        "#SBATCH --requeue",
        "#SBATCH --signal",
    }
