"""Jobs of several processes on this machine, and their logs."""

from __future__ import annotations

import json
import os
import time

import numpy as np
import pytest
from conftest import ROOT

import trainer
from trainer.state.leaves import name_leaves

DIGITS = f"--config={ROOT}/configs/digits.py"


def losses_of(workdir):
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {
        (row["step"], tag): row[tag]
        for row in rows
        for tag in ("train/loss", "eval/loss")
        if tag in row
    }


HERE = ROOT / "tests/jobs"


CONFIG = f"--config={HERE}/digits_config.py"


ENVIRON = {"PYTHONPATH": f"{ROOT}:{HERE}"}


# Seconds: under one on a quiet machine (benchmarks/faults.py), and jax alone takes a hundred.
AT_ONCE = 5.0


def processes_of(workdir):
    """Processes whose command line names a folder: launchers and workers of that run."""
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                with open(f"/proc/{entry.name}/cmdline", "rb") as file:
                    if str(workdir).encode() in file.read():
                        found.append(int(entry.name))
            except OSError:
                continue
    return sorted(found)


def wait_for_line(path, text, seconds=90):
    deadline = time.monotonic() + seconds
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < deadline, f"no {text!r} in {path}"
        time.sleep(0.02)


def log_of(workdir, rank, attempt=1):
    return workdir / f"logs/attempt-{attempt}/rank-{rank}.log"


def ends(*processes, timeout=60):
    """(exit code, stdout, stderr) of each, once all have ended."""
    texts = [process.communicate(timeout=timeout) for process in processes]
    return [(process.returncode, *text) for process, text in zip(processes, texts, strict=True)]


TWO = ["--processes=2", "--fake_devices=2"]


def rows_of(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    speed = ("train/examples_per_second", "train/step_seconds")
    return [{k: v for k, v in json.loads(line).items() if k not in speed} for line in lines]


def assert_same_state(a, b, atol):
    a, b = name_leaves(trainer.load(a)), name_leaves(trainer.load(b))
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=0, atol=atol, err_msg=name)


def worker_of(workdir, rank, seconds=60):
    """The process id of a worker, once it is there."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for pid in processes_of(workdir):
            try:
                with open(f"/proc/{pid}/cmdline", "rb") as file:
                    if f"rank {rank} of ".encode() in file.read():
                        return pid
            except OSError:
                continue
        time.sleep(0.02)
    raise AssertionError(f"rank {rank} did not start")


@pytest.fixture
def run(launch):
    """Runs the small config to its end; returns (exit code, stdout, stderr)."""

    def run_config(workdir, *arguments, environ=None):
        return launch(
            CONFIG, f"--workdir={workdir}", *arguments, environ={**ENVIRON, **(environ or {})}
        )

    return run_config


@pytest.fixture
def begin(start):
    """Starts the small config, slowed down, and waits until it trains."""

    def begin_config(workdir, *arguments, until="step 10/", environ=None):
        process = start(
            CONFIG,
            f"--workdir={workdir}",
            "--config.num_steps=2000",
            "--config.data.delay=0.02",
            *arguments,
            environ={**ENVIRON, **(environ or {})},
        )
        if until:
            wait_for_line(log_of(workdir, 0), until)
        return process

    return begin_config


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The workdir of the same run in one process on four devices."""
    return {"path": tmp_path_factory.mktemp("alone") / "run"}


def reference(alone, run, *arguments):
    key = arguments
    if key not in alone:
        workdir = alone["path"].with_name(f"run{len(alone)}")
        code, out, err = run(workdir, *arguments)
        assert code == 0, out + err
        alone[key] = workdir
    return alone[key]
