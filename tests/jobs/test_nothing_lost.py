"""Kills, full disks, other machines and jobs: nothing is lost, and messages say what happened."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT, skip_here, wide
from job_helpers import (
    CONFIG,
    ENVIRON,
    TWO,
    alone,
    assert_same_state,
    begin,
    log_of,
    reference,
    rows_of,
    run,
    wait_for_line,
    worker_of,
)
from runs import wait_for

from trainer.workdir.paths import digest_of

__all__ = ["alone", "begin", "run"]  # fixtures

FAST = ["--config.checkpoint.every_steps=100000", "--config.checkpoint.fast_every_secs=0.2"]


def why_no_tmpfs():
    return "" if os.geteuid() == 0 else "mounting a small file system takes root"


@pytest.fixture
def memory(tmp_path):
    """The folder of a run's in-memory checkpoints, and the flag that sets it."""
    folder = tmp_path / "memory"
    folder.mkdir()

    def folder_of(workdir):
        return folder / f"podlift-{os.getuid()}" / digest_of(workdir)

    folder_of.flag = f"--config.checkpoint.fast_dir={folder}"
    return folder_of


def wait_for_in_memory(folder, count=2):
    deadline = time.monotonic() + 60
    while len(list(folder.glob("*/manifest.json"))) < count:
        assert time.monotonic() < deadline, f"no in-memory checkpoints in {folder}"
        time.sleep(0.02)


def kill_with_in_memory(begin, workdir, memory):
    """Leaves a run of two processes with both in-memory checkpoints, and none on disk."""
    process = begin(workdir, *TWO, *FAST, memory.flag, until=None)
    wait_for_in_memory(memory(workdir))
    process.kill()
    process.communicate(timeout=30)


@pytest.mark.parametrize("layout", [wide([]), TWO], ids=["1x4", "2x2"])
def test_a_killed_run_resumes_from_the_in_memory_checkpoint(
    begin, run, alone, tmp_path, memory, layout
):
    layout = layout or ["--fake_devices=4"]
    workdir = tmp_path / "run"
    process = begin(workdir, *layout, *FAST, memory.flag, "--config.num_steps=40", until=None)
    wait_for_in_memory(memory(workdir))
    if len(layout) > 1:
        os.kill(worker_of(workdir, 1), signal.SIGKILL)
    else:
        process.kill()
    process.communicate(timeout=30)
    code, out, err = run(workdir, *layout, *FAST, memory.flag, "--config.data.delay=0.02")
    assert code == 0, err
    restored = re.search(r"restored step (\d+) from memory", out)
    assert restored, out
    assert int(restored[1]) > 0
    expected = reference(alone, run, "--fake_devices=4", "--config.num_steps=40")
    assert_same_state(workdir, expected, atol=1e-6)
    assert rows_of(workdir)[-1]["step"] == 40
    assert not memory(workdir).exists()  # a run that is over takes no memory


@pytest.mark.slow
def test_a_damaged_in_memory_checkpoint_gives_way_to_the_one_before(begin, run, tmp_path, memory):
    workdir = tmp_path / "run"
    kill_with_in_memory(begin, workdir, memory)
    steps = {}
    for slot in memory(workdir).glob("*/manifest.json"):
        steps[json.loads(slot.read_text())["body"]["step"]] = slot.parent
    newest = steps[max(steps)] / "state.bin"
    data = bytearray(newest.read_bytes())
    data[100] ^= 4
    newest.write_bytes(data)
    stop = f"--config.stop_at_step={max(steps) + 5}"
    code, out, err = run(workdir, *TWO, *FAST, memory.flag, "--config.num_steps=2000", stop,
                         "--config.data.delay=0.02")  # fmt: skip
    assert code == 0, err
    assert (
        f"step {max(steps)} cannot be restored from its in-memory checkpoint: state.bin is not"
        in err
    )
    assert f"restored step {min(steps)} from memory" in out


@pytest.mark.slow
def test_in_memory_checkpoints_of_a_removed_run_are_not_restored(begin, run, tmp_path, memory):
    workdir = tmp_path / "run"
    kill_with_in_memory(begin, workdir, memory)
    workdir.rename(tmp_path / "moved")
    code, out, err = run(workdir, *TWO, *FAST, memory.flag)
    assert code == 0, err
    assert "restored" not in out


@pytest.fixture
def two_memories(tmp_path):
    """The memory of two hosts, and the path at which each host has its own."""
    places = [tmp_path / "memory-of-0", tmp_path / "memory-of-1", tmp_path / "memory"]
    for place in places:
        place.mkdir()
    for place in places[:2]:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", place], check=True)
    yield places
    for place in places[:2]:
        subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.slow
@skip_here(why_no_tmpfs())
def test_the_in_memory_checkpoint_of_one_surviving_host_is_enough(
    cache_dir, tmp_path, two_memories
):
    """Rank 0's host restarts with an empty memory, rank 1's with its checkpoints."""
    *of_hosts, here = two_memories
    workdir = tmp_path / "run"

    def start_both(*arguments):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environ = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PJRT_NPROC")}
        return [
            subprocess.Popen(
                [
                    *(
                        "unshare",
                        "--mount",
                        "bash",
                        "-c",
                        'mount --bind "$0" "$1" && exec "${@:2}"',
                    ),
                    *(of_host, here, sys.executable, "-m", "launcher", CONFIG),
                    *(f"--workdir={workdir}", "--fake_devices=2", *FAST),
                    *(f"--config.checkpoint.fast_dir={here}", "--config.data.delay=0.02"),
                    *(f"--coordinator_address=127.0.0.1:{port}", "--num_processes=2"),
                    *(f"--process_id={rank}", *arguments),
                ],
                cwd=ROOT,
                env={**environ, **ENVIRON, "JAX_COMPILATION_CACHE_DIR": str(cache_dir)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank, of_host in enumerate(of_hosts)
        ]

    processes = start_both("--config.num_steps=2000")
    try:
        for of_host in of_hosts:
            wait_for_in_memory(of_host / f"podlift-{os.getuid()}" / digest_of(workdir))
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    shutil.rmtree(of_hosts[0] / f"podlift-{os.getuid()}")
    ended = [(p.returncode, *texts) for p in start_both() for texts in [p.communicate(timeout=90)]]
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert re.search(r"restored step \d+ from memory of rank 1's host", ended[0][1]), ended[0][1]
    assert rows_of(workdir)[-1]["step"] == 40


# (processes, devices in each, lift)
LAYOUTS = [(1, 1, "vmap:4"), (1, 8, "pmap"), (2, 4, "shard_map"), (4, 2, "pmap"), (2, 1, "vmap")]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run of 2x2 that stopped at step 20, and the same run undisturbed."""
    folder = tmp_path_factory.mktemp("elastic")
    return {"stopped": folder / "stopped", "whole": folder / "whole"}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "x".join(map(str, layout)))
def test_any_layout_resumes_with_the_same_losses(run, tmp_path, stopped, layout):
    every = ["--config.log_every_steps=1"]
    if not stopped["whole"].exists():
        assert run(stopped["stopped"], *TWO, *every, "--config.stop_at_step=20")[0] == 0
        assert run(stopped["whole"], *TWO, *every)[0] == 0
    subprocess.run(["cp", "-r", stopped["stopped"], tmp_path / "run"], check=True)
    processes, devices, lift = layout
    flags = [f"--processes={processes}", f"--fake_devices={devices}", f"--config.lift={lift}"]
    code, out, err = run(tmp_path / "run", *every, *flags)
    assert code == 0, err
    assert "restored step 20" in out
    after, expected = (
        {row["step"]: row["train/loss"] for row in rows_of(w) if "train/loss" in row}
        for w in (tmp_path / "run", stopped["whole"])
    )
    assert list(after) == list(expected) == list(range(1, 41))
    assert after == pytest.approx(expected, rel=0, abs=1e-5)


WHERE = {
    "restoring": "attempt-2",
    "the first step": " parameters, ",
    "training": "step 30/",
}


@pytest.mark.slow
@pytest.mark.parametrize("where", WHERE)
def test_asked_to_stop_anywhere_ends_with_the_step_just_finished(begin, run, tmp_path, where):
    workdir = tmp_path / "run"
    assert run(workdir, *TWO, "--config.num_steps=2000", "--config.stop_at_step=20",
               "--config.data.delay=0.02")[0] == 0  # fmt: skip
    process = begin(workdir, *TWO, "--config.checkpoint.every_steps=100000", until=None)
    if where == "restoring":
        worker_of(workdir, 1)
    else:
        wait_for_line(log_of(workdir, 0, attempt=2), WHERE[where])
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 42, err
    newest = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    last_row = max(row["step"] for row in rows_of(workdir) if "train/loss" in row)
    assert newest >= max(20, last_row)
    if where == "training":
        assert f"saved at step {newest}" in err


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place], check=True)
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def fill(disk):
    """Fills a disk; returns the file that does."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while file.write(b"x" * 4096):
                pass
        except OSError:
            return ballast


@pytest.mark.slow
@skip_here(why_no_tmpfs())
@pytest.mark.parametrize("layout", [["--fake_devices=4"], TWO], ids=["1x4", "2x2"])
def test_a_full_disk_does_not_end_the_training(begin, small_disk, tmp_path, memory, layout):
    workdir = small_disk / "run"
    process = begin(workdir, *layout, memory.flag, "--config.num_steps=400",
                    "--config.log_every_steps=5", until=None)  # fmt: skip
    wait_for(workdir / "checkpoints/10")
    ballast = fill(small_disk)
    time.sleep(2)
    assert process.poll() is None
    ballast.unlink()
    out, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    told = re.search(r"warning: step \d+ could not be saved: (.*)", err)
    assert told, err
    assert re.search(r"No space left .*needs about [\d.,]+ MB, [\d.,]+ MB free", told[1]), told[1]
    assert [row["step"] for row in rows_of(workdir) if "train/loss" in row] == [*range(5, 401, 5)]
    assert "restart" not in out


@pytest.mark.slow
@skip_here(why_no_tmpfs())
def test_a_disk_that_stays_full_ends_the_run_with_the_last_good_checkpoint(
    begin, small_disk, memory
):
    workdir = small_disk / "run"
    process = begin(workdir, *TWO, memory.flag, "--config.checkpoint.max_failures=2", until=None)
    wait_for(workdir / "checkpoints/10")
    fill(small_disk)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    told = re.search(r"error: 2 saves in a row failed.*last good checkpoint is step (\d+)", err)
    assert told, err
    assert (workdir / "checkpoints" / told[1] / "manifest.json").exists()


def test_a_second_job_reports_the_owner_of_the_folder(begin, run, tmp_path):
    begin(tmp_path / "run", *TWO)
    same = ["--config.num_steps=2000", "--config.data.delay=0.02"]
    code, _, err = run(tmp_path / "run", *TWO, *same)
    assert code == 2
    pid = worker_of(tmp_path / "run", 0)
    who = f"process {pid} on {platform.node()} is already training in {tmp_path}/run since 20"
    assert who in err
    assert f"kill {pid}" in err
    code, out, _ = run(tmp_path / "run", *TWO, *same, "--dry_run")
    assert code == 0, out


@pytest.mark.slow
def test_launchers_with_different_code_are_refused(start, tmp_path):
    from job_helpers import ends

    folders = []
    for name in "ab":
        folder = tmp_path / name
        folder.mkdir()
        git = ["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@b.c"]
        (folder / "model.py").write_text(f"name = {name!r}\n")
        subprocess.run([*git, "init", "-q"], check=True)
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "-qm", name], check=True)
        folders.append(folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        start(
            CONFIG,
            f"--workdir={tmp_path}/run",
            f"--coordinator_address=127.0.0.1:{port}",
            "--num_processes=2",
            f"--process_id={rank}",
            cwd=folders[rank],
            environ=ENVIRON,
        )
        for rank in (0, 1)
    ]
    for code, _, err in ends(*processes):
        assert code == 2, err
        assert "has the versions podlift" in err
        assert ", code " in err
