"""metrics.jsonl and TensorBoard hold the same numbers, and survive a resume."""

from __future__ import annotations

import json
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of
from runs import collect, digits, read_tensorboard, rows_of

import trainer
from trainer.checkpoints.saver import Saver
from trainer.errors import NonFiniteLoss
from trainer.lift.in_flight import InFlight
from trainer.losses import softmax_cross_entropy

TAGS = {
    "train/loss",
    "train/accuracy",
    "train/learning_rate",
    "train/grad_norm",
    "train/examples_per_second",
    "train/step_seconds",
    "eval/loss",
    "eval/accuracy",
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_both_files_hold_the_same_numbers_across_a_resume(tmp_path):
    config = digits(30, stop_at_step=10)
    trainer.train(config, tmp_path / "run", mesh_of(2))
    trainer.train(digits(30), tmp_path / "run", mesh_of(2))
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert set().union(*rows) == TAGS | {"step"}
    steps = [row["step"] for row in rows]
    assert steps == sorted(steps)
    scalars, events = read_tensorboard(tmp_path / "run")
    for row in rows:
        for tag, value in row.items():
            if tag != "step":
                np.testing.assert_allclose(scalars.pop((tag, row["step"])), value, rtol=1e-5)
    others = {tag for tag, _ in scalars if not tag.startswith("goodput/")}
    assert others == {"train/examples_per_second_per_device"}  # of these no two runs agree
    assert "config/text_summary" in events.Tags()["tensors"]
    assert "_hparams_/session_start_info" in events.summary_metadata


def test_means_over_epochs_and_rows_whatever_the_calls():
    log, found = collect()
    log.add(0, rows_of([1, 2, 3, 4, 5, 6]))
    log.add(6, rows_of([7, 8, 9, 10]))
    assert found["epochs"] == [(1, 2.5), (2, 6.5)]
    log.emit(10)
    (row,) = found["rows"]
    assert (row.step, row.values["loss"]) == (10, 5.5)
    assert row.values["learning_rate"] == pytest.approx(1.0)
    assert log.to_json() == {
        "epoch": 19.0,
        "epoch_skipped": 0,
        "row": [0.0, 0.0, 0.0],
        "steps": 0,
        "skipped": 0,
    }
    log.emit(10)
    assert len(found["rows"]) == 1


def test_the_first_call_and_what_is_excluded_do_not_count_as_speed():
    log, found = collect()
    found["now"] = 50.0  # compiling
    log.add(0, rows_of([1]))
    found["now"] = 52.0
    log.add(1, rows_of([1, 1]))
    log.emit(3)
    assert found["rows"][0].step_seconds == pytest.approx(1.0)
    found["now"] = 62.0
    log.exclude(8.0)  # an evaluation
    log.add(3, rows_of([1]))
    log.emit(4)
    assert found["rows"][1].step_seconds == pytest.approx(2.0)


def test_what_it_takes_to_write_a_row_is_no_part_of_the_next():
    log, found = collect(seconds_a_row=5.0)  # the first one opens files
    for step in range(3):
        found["now"] += 2.0
        log.add(step, rows_of([1]))
        log.emit(step + 1)
    assert [row.step_seconds for row in found["rows"][1:]] == pytest.approx([2.0, 2.0])


def slow_loss(outputs, batch):
    """A loss that takes 30 ms."""

    def wait(x):
        time.sleep(0.03)
        return np.zeros((), np.float32)

    shape = jax.ShapeDtypeStruct((), jnp.float32)
    zero = jax.pure_callback(wait, shape, jax.lax.stop_gradient(outputs))
    return softmax_cross_entropy(outputs, batch) + zero


@pytest.mark.slow
def test_waiting_for_devices_before_an_in_memory_checkpoint_is_step_time(tmp_path, monkeypatch):
    monkeypatch.setattr(Saver, "in_memory_is_due", True)
    config = digits(20, loss={"target": "test_metrics_writer:slow_loss"})
    config.checkpoint.fast_dir = str(tmp_path)
    metrics = trainer.train(config, tmp_path / "run", mesh_of(2)).metrics
    assert metrics["train/step_seconds"] > 0.03


def test_nan_names_its_step():
    log, _ = collect()
    with pytest.raises(NonFiniteLoss) as error:
        log.add(10, rows_of([1, 2, math.nan, 4]))
    assert error.value.step == 13
    assert "step 13" in str(error.value)


def test_no_more_than_the_limit_is_in_flight():
    read = []
    in_flight = InFlight(lambda value: read.append(value) or value, limit=16)
    for i in range(40):
        in_flight.push(i, i)
        assert len(read) == max(0, i - 15)
    list(in_flight.drain())
    assert read == list(range(40))
