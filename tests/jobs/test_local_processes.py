"""Several processes on one machine: the same numbers, and one terminal."""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from job_helpers import (
    CONFIG,
    ENVIRON,
    HERE,
    TWO,
    alone,
    assert_same_state,
    begin,
    log_of,
    reference,
    rows_of,
    run,
    wait_for_line,
)

from launcher.rendezvous.address import hold_port

__all__ = ["alone", "begin", "run"]  # fixtures

slow = pytest.mark.slow


@pytest.mark.parametrize(
    "lift", ["pmap", pytest.param("shard_map", marks=slow), pytest.param("vmap", marks=slow)]
)
@pytest.mark.parametrize(
    ("processes", "devices"), [(2, 2), pytest.param(4, 1, marks=pytest.mark.slow)]
)
def test_the_numbers_of_one_process(run, alone, tmp_path, lift, processes, devices):
    expected = reference(alone, run, "--fake_devices=4", "--config.num_steps=5")
    code, out, err = run(
        tmp_path / "run",
        f"--processes={processes}",
        f"--fake_devices={devices}",
        "--config.num_steps=5",
        f"--config.lift={lift}",
    )
    assert code == 0, out + err
    assert f"4 cpu devices in {processes} processes" in out
    assert_same_state(tmp_path / "run", expected, atol=1e-6)
    losses = [row["eval/loss"] for row in rows_of(tmp_path / "run") if "eval/loss" in row]
    expected_losses = [row["eval/loss"] for row in rows_of(expected) if "eval/loss" in row]
    np.testing.assert_allclose(losses, expected_losses, rtol=0, atol=1e-6)
    assert err == ""
    # gloo has connected the processes before they load data, which may take long in one of them.
    lines = log_of(tmp_path / "run", 1).read_text().splitlines()
    connected = [number for number, line in enumerate(lines) if "[Gloo] Rank " in line]
    first = next(number for number, line in enumerate(lines) if " cpu devices in " in line)
    assert connected
    assert max(connected) < first


@pytest.mark.slow
def test_a_mesh_in_which_processes_alternate(run, alone, tmp_path):
    """As on a v5e:4x4; and `trainer.train` in processes that no launcher has started."""
    expected = reference(alone, run, "--fake_devices=4", "--config.num_steps=5")
    environ = {**os.environ, **ENVIRON, "PJRT_NPROC": "4"}
    environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    with hold_port("127.0.0.1") as held:
        command = [sys.executable, HERE / "interleaved.py", str(held.getsockname()[1])]
        processes = [
            subprocess.Popen([*command, str(rank), tmp_path / "run"], env=environ)
            for rank in range(2)
        ]
        assert [process.wait(timeout=100) for process in processes] == [0, 0]
    assert_same_state(tmp_path / "run", expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("steps_per_call", [1, 5])
def test_a_run_resumes_with_other_processes_and_devices(run, alone, tmp_path, steps_per_call):
    """2x2, then 1x8, then 4x1: the numbers of a run that never changed."""
    expected = reference(alone, run, "--fake_devices=4", "--config.num_steps=40")
    per_call = f"--config.steps_per_call={steps_per_call}"
    for stop, layout in ((15, TWO), (30, ["--fake_devices=8"]), (40, ["--processes=4"])):
        code, out, err = run(tmp_path / "run", *layout, f"--config.stop_at_step={stop}", per_call)
        assert code == 0, out + err
    assert_same_state(tmp_path / "run", expected, atol=1e-5)


def test_a_refused_command_leaves_nothing(run, tmp_path):
    code, out, err = run(tmp_path / "run", *TWO, "--config.model.target=trainer.models.mlp:MPL")
    assert code == 2, out + err
    assert err.count("did you mean 'MLP'?") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_all_ranks_on_the_terminal(run, tmp_path):
    code, out, _ = run(tmp_path / "run", *TWO, "--log_ranks=all", "--config.num_steps=10")
    assert code == 0
    for line in out.splitlines():
        assert line.startswith(("[0] ", "[1] ")), line
    for rank in (0, 1):
        assert sum(line.startswith(f"[{rank}] step 10/10") for line in out.splitlines()) == 2


@pytest.mark.slow
@pytest.mark.parametrize("reader", ["gone", "asleep"])
def test_a_terminal_that_blocks_changes_nothing(begin, tmp_path, reader):
    """`| head`, a closed terminal; Ctrl-S, `less`."""
    process = begin(tmp_path / "run", *TWO, "--config.log_every_steps=1", until="step 10/")
    if reader == "gone":
        process.stdout.close()
        process.stdout = None
    else:
        fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 4096)
        wait_for_line(log_of(tmp_path / "run", 0), "step 150/")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 42
    assert any(p.name.isdigit() for p in (tmp_path / "run/checkpoints").iterdir())


@pytest.mark.slow
def test_other_children_are_not_killed(launch, tmp_path):
    """`tensorboard & exec python -m launcher`: what was there before is not the run's."""
    command = [sys.executable, "-m", "launcher", CONFIG, f"--workdir={tmp_path}/run"]
    script = "sleep 1000 & echo $! >$0; exec " + shlex.join([*command, "--max_restarts=1"])
    note = tmp_path / "pid"
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "PJRT_"))}
    subprocess.run(
        ["bash", "-c", script, note],
        env={**environ, **ENVIRON},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    os.kill(int(note.read_text()), signal.SIGKILL)  # still there


@pytest.mark.slow
def test_a_second_job_is_refused_while_the_first_runs(begin, run, tmp_path):
    process = begin(tmp_path / "run", *TWO)
    shutil.copy(tmp_path / "run/config.json", tmp_path)
    code, _, err = run(
        tmp_path / "run", *TWO, "--config.num_steps=2000", "--config.data.delay=0.02"
    )
    assert code == 2, err
    assert "already training" in err
    process.kill()


def test_ranks_with_another_order_of_examples_are_refused(launch, tmp_path):
    """Python orders a set anew in every process, unless PYTHONHASHSEED is the same."""
    config, folder = f"--config={HERE}/set_order.py", f"--workdir={tmp_path}/run"
    environ = {**ENVIRON, "PYTHONHASHSEED": "random"}
    code, out, err = launch(config, folder, *TWO, environ=environ)
    assert code == 2, out + err
    assert err.startswith("error: rank 1 has other data than rank 0: train: row 0 differs (x"), err
    assert "HINT: every process must load the same examples in the same order" in err
    assert not (tmp_path / "run").exists()
    code, out, err = launch(config, folder, *TWO, environ=ENVIRON)
    assert code == 0, out + err
