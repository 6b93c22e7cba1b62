"""Configs, and checks of a run's folder, shared by several tests."""

from __future__ import annotations

import dataclasses
import json
import sys
import time

import jax
import numpy as np
from conftest import ROOT

from trainer.checkpoints.manifest import Manifest
from trainer.metrics_writer.train_log import TrainLog


def wait_for(path, seconds=60):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)


def config_of(name, argument=None, **changes):
    sys.path.insert(0, str(ROOT))
    try:
        module = __import__(f"configs.{name}", fromlist=["get_config"])
    finally:
        sys.path.pop(0)
    config = module.get_config(argument) if argument else module.get_config()
    for key, value in changes.items():
        config[key] = value
    return config


def digits(steps, **changes):
    config = config_of("digits", num_steps=steps, log_every_steps=5, **changes)
    if "hidden_size" in config.model:
        config.model.hidden_size = 16
    config.eval = {"every_steps": 1000}
    return config


def assert_bitwise_equal(a, b):
    leaves_a, leaves_b = jax.tree.leaves(jax.device_get(a)), jax.tree.leaves(jax.device_get(b))
    assert len(leaves_a) == len(leaves_b)
    for x, y in zip(leaves_a, leaves_b, strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def steps_of(folder):
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def without_speed(path):
    speed = ("train/examples_per_second", "train/step_seconds")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in speed} for row in rows]


def data_files(step):
    return [path for path in (step / "state").rglob("*") if path.parent.name == "d"]


def flip_a_bit(step):
    path = data_files(step)[0]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(step):
    path = data_files(step)[0]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def save_another_state(step):
    """Makes files and manifest agree with one another, but not with the saved state."""
    path = step / "manifest.json"
    listed = Manifest.from_text(path.read_text())
    name = "params/Dense_0/kernel"
    leaf = dataclasses.replace(listed.leaves[name], checksum=1)
    leaves = {**listed.leaves, name: leaf}
    path.write_text(dataclasses.replace(listed, leaves=leaves).to_text())


def read_tensorboard(path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path))
    events.Reload()
    scalars = {
        (tag, event.step): event.value
        for tag in events.Tags()["scalars"]
        for event in events.Scalars(tag)
    }
    return scalars, events


def collect(steps_per_epoch=4, seconds_a_row=0.0):
    found = {"epochs": [], "rows": [], "now": 0.0}

    def write(row):
        found["rows"].append(row)
        found["now"] += seconds_a_row

    log = TrainLog(
        ["grad_norm", "learning_rate", "loss"],
        steps_per_epoch=steps_per_epoch,
        clock=lambda: found["now"],
        on_epoch=lambda epoch, loss: found["epochs"].append((epoch, loss)),
        on_row=write,
    )
    return log, found


def rows_of(losses):
    return np.array([[1.0, 0.1 * loss, loss] for loss in losses])
