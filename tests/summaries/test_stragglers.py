"""The rank that the others wait for is named, and why."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from conftest import ROOT
from runs import assert_bitwise_equal, read_tensorboard, without_speed

import trainer
from trainer.data.digits import load
from trainer.metrics_writer.goodput import Goodput
from trainer.summaries.stragglers import find_slowest


def test_the_slowest_rank_and_whether_it_matters():
    # 40 ms of data on rank 2 of 4, in a step of 50 ms.
    found = find_slowest([0.001, 0.001, 0.040, 0.002], [0.002, 0.004, 0.002, 0.001], 0.050)
    assert (found.rank, found.cause, found.is_notable) == (2, "waiting for data", True)
    assert found.seconds == pytest.approx(0.042)
    assert found.others == pytest.approx(0.003)
    # The same difference on the host.
    found = find_slowest([0.001, 0.001], [0.042, 0.002], 0.050)
    assert (found.rank, found.cause, found.is_notable) == (0, "busy on its host", True)
    # Hidden behind a step of two seconds; or hardly slower than the others.
    assert not find_slowest([0.001, 0.040], [0.002, 0.002], 2.0).is_notable
    assert not find_slowest([0.040, 0.045, 0.050], [0.0, 0.0, 0.0], 0.055).is_notable


def test_waiting_is_not_computing():
    """Wall time and processor time of each kind are distinct."""
    now = {"wall": 0.0, "cpu": 0.0}
    goodput = Goodput(lambda: now["wall"], lambda: now["cpu"])
    now["cpu"] += 5.0
    goodput.begin_steps()
    now["wall"] += 10.0  # of which the thread computes for one, while the devices work
    now["cpu"] += 1.0
    with goodput.spending("data"):
        now["wall"] += 3.0
        now["cpu"] += 2.0
    now["cpu"] += 0.5
    assert goodput.cpu_seconds("step") == 1.5
    assert goodput.cpu_seconds("evaluate") == 0.0
    assert goodput.seconds()["data"] == 3.0


@pytest.mark.slow
@pytest.mark.parametrize("lift", ["pmap", "shard_map"])
def test_a_rank_with_slow_data_is_named(launch, tmp_path, lift):
    """Two real processes; with all other summaries too, which both have to make together.

    The numbers are those of a run without.
    """
    workdir = tmp_path / "run"
    command = [
        "--config=configs/digits.py",
        f"--config.lift={lift}",
        "--processes=2",
        "--fake_devices=2",
        "--config.num_steps=40",
        "--config.log_every_steps=10",
    ]
    code, out, err = launch(
        *command,
        f"--workdir={workdir}",
        "--config.data.target=slow_data:digits",
        "--config.summaries.stragglers",
        "--config.summaries.confusion",
        "--config.summaries.images=4",
        "--config.summaries.histograms_every_steps=20",
        environ={"PYTHONPATH": f"{ROOT}:{ROOT}/tests/jobs"},
    )
    assert code == 0, out + err
    lines = [line for line in out.splitlines() if "slowest rank" in line]
    assert len(lines) == 1, out  # not at every row
    pattern = r"slowest rank 1: (\S+) ms a step of its own against (\S+) ms .*: waiting for data"
    own, others = map(float, re.search(pattern, lines[0]).groups())
    assert own > 50
    assert others < own / 1.5
    scalars, events = read_tensorboard(workdir)
    tags = {tag for tag, _ in scalars if tag.startswith("straggler/")}
    assert len(tags) == 3
    for step in (20, 30, 40):
        assert scalars["straggler/slowest_rank", step] == 1
        assert scalars["straggler/slowest_seconds", step] > 0.05
    assert "straggler" not in (workdir / "metrics.jsonl").read_text()

    counts = np.array(json.loads((workdir / "confusion.json").read_text())["counts"])
    np.testing.assert_array_equal(counts.sum(axis=1), np.bincount(load()["eval"]["y"]))
    accuracy = scalars["eval/accuracy", 40]
    assert np.trace(counts) / counts.sum() == pytest.approx(accuracy, abs=1e-6)
    assert {e.step for e in events.Histograms("gradients/Dense_0/kernel")} <= {20, 40}
    assert set(events.Tags()["images"]) == {"held_out/images", "eval/confusion"}

    code, out, err = launch(*command, f"--workdir={tmp_path}/plain")
    assert code == 0, out + err
    rows = [without_speed(path / "metrics.jsonl") for path in (workdir, tmp_path / "plain")]
    assert rows[0] == rows[1]
    assert_bitwise_equal(trainer.load(workdir, step=40), trainer.load(tmp_path / "plain", step=40))
