"""Every script explains itself, and answers a mistake with one error and a hint."""

from __future__ import annotations

import pytest
from script_runs import FAKE_DEVICES, MLP, MPI, RENDER, RENDERED, SLURM, TPU_POD


@pytest.mark.parametrize("script", [FAKE_DEVICES, SLURM, MPI, TPU_POD, RENDER])
def test_help(run_script, script):
    done = run_script(script, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"scripts/{script}" in done.stdout
    assert "--dry-run" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100


POD = [TPU_POD, "run", "pod", "--zone=us-west4-a"]


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ([FAKE_DEVICES], "number of devices is missing"),
        ([FAKE_DEVICES, MLP], "is not a number of devices"),
        ([FAKE_DEVICES, "0", MLP], "0 is not a number"),
        ([SLURM, "--dry-run"], "--config is missing"),
        ([SLURM, MLP], "not a SLURM job"),
        ([MPI, MLP], "number of ranks is missing"),
        ([MPI, "-n", "two", MLP], "-n two is not"),
        ([MPI, "-n"], "-n needs a value"),
        ([MPI, "-n", "2"], "--config is missing"),
        ([MPI, "-n", "2", MLP, "-H", "a"], "-H must come before --config"),
        ([MPI, "-n", "2", "-H", "a", "--hostfile", "/dev/null", MLP], "given twice"),
        ([MPI, "-n", "2", "--hostfile", "/nowhere", MLP], "no file /nowhere"),
        ([TPU_POD], "the action is missing"),
        ([TPU_POD, "make", "pod"], "make is not"),
        ([TPU_POD, "create", "My Pod"], "'My Pod' is not a name"),
        ([TPU_POD, "create", "--zone=x"], "'--zone=x' is not a name"),
        ([TPU_POD, "create", "pod"], "--zone is missing"),
        ([TPU_POD, "create", "pod", "--zone=a", "--yes"], "create does not take --yes"),
        ([*POD, "--workdir=gs://b/r", "--dry-run"], "--config is missing"),
        ([*POD, MLP, "--workdir=runs/x", "--dry-run"], "folder that all hosts share"),
        ([*RENDERED, "--name=My_Job"], "'My_Job' is not a name"),
        ([*RENDERED, "--name=a\nb"], "is not a name"),
        ([*RENDERED, "--name=" + "a" * 43], "is not a name"),
        ([*RENDERED, '--image=i"'], "is not an image"),
        ([*RENDERED, "--kind=cpu"], "is not tpu or gpu"),
        ([*RENDERED, "--hosts=0"], "--hosts=0"),
        ([*RENDERED, "--hosts=2"], "4x4 has 16 chips, but --hosts=2 with --chips=4 have 8"),
        ([*RENDERED, "--topology=4x"], "is not a topology"),
        ([*RENDERED, "--workdir=/data"], "not a folder that all pods share"),
        ([*RENDERED, "--claim=disk"], "is not on the claim"),
        ([*RENDERED, "--claim=a b"], "not a name in Kubernetes"),
        ([*RENDERED, "--max_restarts=1"], "there is no option --max_restarts"),
        ([*RENDERED, "--accelerator=a: b"], "is not a label"),
        ([*RENDERED, "--", "\x07"], "control character"),
    ],
)
def test_a_mistake_gets_one_error_and_a_hint(run_script, command, error):
    done = run_script(*command)
    lines = done.stderr.splitlines()
    assert done.returncode == 2, done
    assert sum(line.startswith("error: ") for line in lines) == 1
    assert error in done.stderr
    assert lines[-1].startswith("  HINT: ")
    assert done.stdout == ""
