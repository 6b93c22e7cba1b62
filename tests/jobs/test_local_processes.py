"""Several processes on one machine: the same numbers, and one clear story when one fails."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import wide
from job_helpers import (
    AT_ONCE,
    CONFIG,
    ENVIRON,
    HERE,
    TWO,
    assert_same_state,
    log_of,
    processes_of,
    reference,
    rows_of,
    wait_for_line,
    worker_of,
)
from runs import flip_a_bit, save_another_state, truncate, wait_for

from launcher.rendezvous.address import hold_port
from launcher.report.attempts import read_attempts

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


@pytest.mark.parametrize(
    ("first", "then"), [wide("fsdp", "zero1"), pytest.param("zero1", "fsdp", marks=slow)]
)
def test_a_state_that_is_cut_over_processes(run, alone, tmp_path, first, then):
    wide = ["--config.num_steps=6", "--config.model.hidden_size=64"]
    wide += ["--config.optimizer.target=optax:adagrad", "--config.checkpoint.every_steps=2"]
    expected = reference(alone, run, "--fake_devices=4", *wide)
    cut = [*TWO, *wide, "--config.lift=shard_map"]
    code, out, err = run(
        tmp_path / "run", *cut, f"--config.state_sharding={first}", "--config.stop_at_step=4"
    )
    assert code == 0, out + err
    code, out, err = run(tmp_path / "run", *cut, f"--config.state_sharding={then}")
    assert code == 0, out + err
    assert "restored step 4" in out
    assert_same_state(tmp_path / "run", expected, atol=1e-5)
    assert rows_of(tmp_path / "run")[-1]["eval/loss"] == pytest.approx(
        rows_of(expected)[-1]["eval/loss"], abs=1e-5
    )


def cut(kind):
    """Flags of a model of which something is cut."""
    wide = ["--config.model.hidden_size=64", "--config.optimizer.target=optax:adagrad"]
    return [*wide, "--config.lift=shard_map", f"--config.state_sharding={kind}"]


@pytest.mark.slow
def test_a_cut_state_goes_on_with_other_processes_cut_in_another_way(run, alone, tmp_path):
    expected = reference(alone, run, "--fake_devices=4", *cut("replicated"))
    layouts = [
        (["--processes=4"], "fsdp"),
        (TWO, "zero1"),
        (["--fake_devices=4"], "fsdp"),
        (["--processes=2", "--fake_devices=4"], "fsdp"),
        (["--fake_devices=2"], "replicated"),
    ]
    for number, (layout, kind) in enumerate(layouts):
        stop = f"--config.stop_at_step={8 * (number + 1)}"
        code, out, err = run(tmp_path / "run", *layout, *cut(kind), stop)
        assert code == 0, out + err
        assert (f"restored step {8 * number}" in out) == (number > 0)
    assert_same_state(tmp_path / "run", expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp", "zero1"])
def test_a_killed_rank_of_a_cut_state_goes_on_from_the_last_checkpoint(run, alone, tmp_path, kind):
    """No host has all of it in its memory, however often copies are to be taken."""
    four = ["--processes=4", *cut(kind)]
    fault = ["--config.data.kind=kill", "--config.data.at_step=25", "--config.data.delay=0.02"]
    often = ["--config.checkpoint.fast_every_secs=0.1", f"--config.data.once={tmp_path}/once"]
    code, out, err = run(tmp_path / "run", *four, *fault, *often, "--max_restarts=1")
    assert code == 0, out + err
    assert "rank 1 was killed by SIGKILL" in err
    assert f"restored step 20 from {tmp_path}/run/checkpoints" in out
    assert_same_state(tmp_path / "run", reference(alone, run, *four), atol=0)
    steps = [row["step"] for row in rows_of(tmp_path / "run") if "train/loss" in row]
    assert steps == [10, 20, 30, 40]


@pytest.mark.slow
def test_a_cut_state_asked_to_stop_goes_on_bit_for_bit(begin, run, alone, tmp_path):
    four = ["--processes=4", *cut("fsdp")]
    process = begin(tmp_path / "run", *four, "--config.num_steps=40")
    os.kill(worker_of(tmp_path / "run", 2), signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 42, err
    code, out, err = run(tmp_path / "run", *four, "--config.data.delay=0.02")
    assert code == 0, out + err
    assert "restored step" in out
    assert_same_state(tmp_path / "run", reference(alone, run, *four), atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("damage", [flip_a_bit, truncate, save_another_state])
def test_a_damaged_checkpoint_of_a_state_cut_over_processes_gives_way(run, alone, tmp_path, damage):
    two = [*TWO, *cut("fsdp")]
    checkpoints = tmp_path / "run/checkpoints"
    assert run(tmp_path / "run", *two, "--config.stop_at_step=20")[0] == 0
    damage(checkpoints / "20")
    code, out, err = run(tmp_path / "run", *two)
    assert code == 0, out + err
    assert "warning: step 20 cannot be restored from the checkpoint" in err
    assert f"restored step 10 from {checkpoints}" in out
    assert len(list((checkpoints / "quarantine").glob("20-*"))) == 1
    assert_same_state(tmp_path / "run", reference(alone, run, *two), atol=0)


@pytest.mark.slow
def test_a_mesh_in_which_processes_take_turns(run, alone, tmp_path):
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
def test_a_run_goes_on_with_other_processes_and_devices(run, alone, tmp_path, steps_per_call):
    """2x2, then 1x8, then 4x1: the numbers of a run that never changed."""
    expected = reference(alone, run, "--fake_devices=4", "--config.num_steps=40")
    per_call = f"--config.steps_per_call={steps_per_call}"
    for stop, layout in ((15, TWO), (30, ["--fake_devices=8"]), (40, ["--processes=4"])):
        code, out, err = run(tmp_path / "run", *layout, f"--config.stop_at_step={stop}", per_call)
        assert code == 0, out + err
    assert_same_state(tmp_path / "run", expected, atol=1e-5)


def test_a_killed_rank_ends_the_job_at_once(begin, tmp_path):
    workdir = tmp_path / "run"
    process = begin(workdir, *TWO)
    os.kill(worker_of(workdir, 1), signal.SIGKILL)
    killed = time.monotonic()
    _, err = process.communicate(timeout=20)
    assert process.returncode == 42, err
    assert time.monotonic() - killed < AT_ONCE
    assert err.startswith("error: rank 1 was killed by SIGKILL around step "), err
    assert "out of memory?" in err
    assert f"full log: {log_of(workdir, 1)}" in err
    assert "rank 0" not in err.replace("rank-0", "")
    failure = json.loads((workdir / "failure.json").read_text())
    assert failure["rank"] == 1
    assert failure["exit_code"] == 42
    assert processes_of(workdir) == []


@pytest.mark.parametrize("rank", [pytest.param(0, marks=slow), 1])
def test_the_rank_that_raised_is_the_story(run, tmp_path, rank):
    workdir = tmp_path / "run"
    code, _, err = run(workdir, *TWO, "--config.data.kind=raise", f"--config.data.rank={rank}")
    assert code == 1
    assert err.count("Traceback") == 1
    assert "ValueError: a fault of the user's code" in err
    assert f"error: ValueError on rank {rank}: a fault of the user's code" in err
    assert "gloo" not in err.lower(), "what it did to the others is no story"
    assert "Traceback" in log_of(workdir, rank).read_text()
    assert json.loads((workdir / "failure.json").read_text())["rank"] == rank


@pytest.mark.slow
def test_what_a_rank_has_started_goes_with_it(begin, tmp_path):
    """Also what left its session."""
    notes = tmp_path / "children"
    arguments = ["--config.data.kind=children", "--config.data.at_step=3"]
    process = begin(tmp_path / "run", *TWO, *arguments, environ={"CHILDREN": str(notes)})
    os.kill(worker_of(tmp_path / "run", 0), signal.SIGKILL)
    process.communicate(timeout=20)
    for pid in notes.read_text().split():
        assert not os.path.exists(f"/proc/{pid}")


@pytest.mark.slow
def test_a_rank_that_exits_without_a_word(run, tmp_path):
    code, _, err = run(tmp_path / "run", *TWO, "--config.data.kind=exit")
    assert code == 1
    assert err.startswith("error: rank 1 exited with code 3 and no error message, around step 4")


@pytest.mark.slow
def test_a_crash_of_native_code(run, tmp_path):
    code, _, err = run(tmp_path / "run", *TWO, "--config.data.kind=abort")
    assert code == 1
    assert err.startswith("error: rank 1 was killed by SIGSEGV around step 4")


def test_a_stalled_rank_is_found_with_all_stacks(run, tmp_path):
    workdir = tmp_path / "run"
    code, _, err = run(
        workdir, *TWO, "--config.data.kind=stall", "--hang_timeout_secs=3", "--max_restarts=0"
    )
    assert code == 42
    assert "error: rank 1 has made no progress for 3 s, at step 4 (wait)" in err
    assert "in _fail" in log_of(workdir, 1).read_text()
    assert "most recent call first" in log_of(workdir, 0).read_text()
    assert processes_of(workdir) == []


@pytest.mark.slow
def test_a_suspended_rank_is_found(begin, tmp_path):
    process = begin(tmp_path / "run", *TWO, "--hang_timeout_secs=2")
    os.kill(worker_of(tmp_path / "run", 0), signal.SIGSTOP)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 42
    assert "rank 0 has made no progress" in err
    assert "is suspended (SIGSTOP)" in err
    assert processes_of(tmp_path / "run") == []


@pytest.mark.parametrize(
    ("target", "number"),
    [
        ("launcher", signal.SIGTERM),
        pytest.param("launcher", signal.SIGINT, marks=slow),
        pytest.param("launcher", signal.SIGUSR1, marks=slow),
        pytest.param("launcher", signal.SIGHUP, marks=slow),
        pytest.param("rank 0", signal.SIGTERM, marks=slow),
        ("rank 1", signal.SIGTERM),
        pytest.param("rank 1", signal.SIGINT, marks=slow),
        pytest.param("rank 1", signal.SIGUSR1, marks=slow),
    ],
)
def test_asked_to_stop_all_ranks_save_the_same_step(begin, run, tmp_path, target, number):
    workdir = tmp_path / "run"
    process = begin(workdir, *TWO)
    pid = process.pid if target == "launcher" else worker_of(workdir, int(target[-1]))
    os.kill(pid, number)
    asked = time.monotonic()
    out, err = process.communicate(timeout=30)
    assert process.returncode == 42, out + err
    assert time.monotonic() - asked < 3 * AT_ONCE
    stopped = [line for line in err.splitlines() if line.startswith("asked to stop: saved at")]
    assert len(stopped) == 1
    step = int(stopped[0].rsplit(maxsplit=1)[1])
    assert [p.name for p in (workdir / "checkpoints").iterdir() if p.name == str(step)]
    assert not (workdir / "failure.json").exists()
    assert processes_of(workdir) == []


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["before", "evaluation"])
def test_asked_to_stop_when_no_step_is_taken(begin, tmp_path, phase):
    workdir = tmp_path / "run"
    if phase == "before":
        process = begin(workdir, *TWO, until=None)
        worker_of(workdir, 1)
    else:
        slow = ["--config.eval.every_steps=10", "--config.eval.batch_size=4"]
        process = begin(workdir, *TWO, *slow, until="step 10/")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 42, out + err
    assert "asked to stop" in err
    assert not (workdir / "failure.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_twice_does_not_wait(begin, tmp_path, processes):
    # Slow batches: one process asks between steps, and would have saved before the second.
    process = begin(tmp_path / "run", f"--processes={processes}", "--config.data.delay=0.3")
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    pressed = time.monotonic()
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert time.monotonic() - pressed < AT_ONCE
    assert "Ctrl-C again to stop at once" in out + err
    assert processes_of(tmp_path / "run") == []
    (attempt,) = read_attempts(tmp_path / "run", {})
    assert (attempt.ending, attempt.went_well) == ("stopped at once; not saved", True)


@pytest.mark.slow
def test_a_rank_that_does_not_stop_is_killed_after_the_grace(begin, tmp_path):
    stalled = ["--config.data.kind=stall", f"--config.data.once={tmp_path}/stalled"]
    process = begin(tmp_path / "run", *TWO, *stalled, "--grace_secs=2", until=None)
    wait_for(tmp_path / "stalled")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 42
    assert "has not stopped within 2 s" in err
    assert processes_of(tmp_path / "run") == []


def test_workers_do_not_outlive_their_launcher(begin, tmp_path):
    process = begin(tmp_path / "run", *TWO)
    workers = [worker_of(tmp_path / "run", rank) for rank in (0, 1)]
    process.kill()
    process.communicate(timeout=20)
    deadline = time.monotonic() + 5
    while any(pid in processes_of(tmp_path / "run") for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_restart_goes_on_as_one_run(run, alone, tmp_path):
    workdir = tmp_path / "run"
    fault = ["--config.data.kind=kill", "--config.data.at_step=25", "--config.data.delay=0.05"]
    once = f"--config.data.once={tmp_path}/once"
    code, out, err = run(workdir, *TWO, *fault, once, "--max_restarts=2")
    assert code == 0, out + err
    assert "rank 1 was killed by SIGKILL" in err
    assert "HINT" not in err  # nobody has to do anything
    assert "restart 1 of 2\n" in out
    assert "restored step 20" in out
    expected = reference(alone, run, "--fake_devices=4", "--config.num_steps=40")
    assert_same_state(workdir, expected, atol=1e-6)
    steps = [row["step"] for row in rows_of(workdir) if "train/loss" in row]
    assert steps == [10, 20, 30, 40]
    assert log_of(workdir, 1, attempt=2).exists()
    assert not (workdir / "failure.json").exists()


@pytest.mark.slow
def test_what_fails_twice_at_the_same_step_is_not_tried_again(run, tmp_path):
    code, out, err = run(tmp_path / "run", *TWO, "--config.data.kind=raise", "--max_restarts=5")
    assert code == 1
    assert err.count("Traceback") == 2
    assert "failed twice at step 4" in out


@pytest.mark.slow
def test_retries_end_with_the_code_of_the_last_event(run, tmp_path):
    code, out, err = run(tmp_path / "run", *TWO, "--config.data.kind=kill", "--max_restarts=1")
    assert code == 42, out + err
    assert "no restart left" in out


@pytest.mark.slow
def test_one_supervised_process_is_restarted_too(run, tmp_path):
    fault = ["--config.data.kind=kill", "--config.data.rank=0", "--config.data.at_step=18"]
    once = [f"--config.data.once={tmp_path}/once", "--config.data.delay=0.05"]
    code, out, err = run(tmp_path / "run", "--fake_devices=2", *fault, *once, "--max_restarts=1")
    assert code == 0, out + err
    assert "restored step 10" in out


def test_a_refused_command_leaves_nothing(run, tmp_path):
    code, out, err = run(tmp_path / "run", *TWO, "--config.model.target=trainer.models.mlp:MPL")
    assert code == 2, out + err
    assert err.count("did you mean 'MLP'?") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_all_ranks_on_the_console(run, tmp_path):
    code, out, _ = run(tmp_path / "run", *TWO, "--log_ranks=all", "--config.num_steps=10")
    assert code == 0
    for line in out.splitlines():
        assert line.startswith(("[0] ", "[1] ")), line
    for rank in (0, 1):
        assert sum(line.startswith(f"[{rank}] step 10/10") for line in out.splitlines()) == 2


@pytest.mark.slow
@pytest.mark.parametrize("reader", ["gone", "asleep"])
def test_a_terminal_that_does_not_read_changes_nothing(begin, tmp_path, reader):
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
def test_children_of_others_are_left_alone(launch, tmp_path):
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
