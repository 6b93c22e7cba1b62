"""A user's code that raises something at one place, for runs in this process and in others."""

from __future__ import annotations

import errno
import os
import queue
import sys

import jax
import numpy as np
from flax import linen as nn

from trainer.data.stream import ArraySource


class Unprintable(Exception):
    def __str__(self):
        raise SystemExit(0)


class PoolError(Exception):
    """As libraries have them: not an OSError, with the words of one."""


ERRORS = {
    "stop": StopIteration,
    "stop-async": StopAsyncIteration,
    "generator-exit": GeneratorExit,
    "interrupt": KeyboardInterrupt,
    "exit-0": lambda: SystemExit(0),
    "exit-none": lambda: SystemExit(None),
    "assertion": AssertionError,
    "empty": lambda: ValueError(""),
    "lines": lambda: ValueError("the first line\nthe second line"),
    "unprintable": Unprintable,
    "queue": queue.Empty,
    "timeout": lambda: TimeoutError("it took too long"),
    "connection": lambda: ConnectionError("Connection reset by peer"),
    "pool": lambda: PoolError("Connection reset by peer"),
    "disk": lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "file": lambda: FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "part-7"),
}

# Which error to raise, where, and from which batch on.
fault = {"error": "", "place": "", "batch": 0, "rank": 0}


def check(place):
    if fault["place"] == place and jax.process_index() == fault["rank"]:
        raise ERRORS[fault["error"]]()


class Source:
    def __init__(self, place, arrays):
        self._source, self._place, self._batches = ArraySource(arrays), place, 0

    def __len__(self):
        return len(self._source)

    def __getitem__(self, indices):
        if indices.size > 1:  # not the single example that is read for its shapes
            self._batches += 1
            if self._batches > fault["batch"]:
                check(self._place)
        return self._source[indices]


def load(error="", place="", batch=0, rank=0):
    if error:
        fault.update(error=error, place=place, batch=batch, rank=rank)
    check("load")
    random = np.random.default_rng(0)
    arrays = {"x": random.normal(size=(64, 4)).astype(np.float32), "y": np.arange(64) % 3}
    return {"train": Source("source", arrays), "eval": Source("eval", arrays)}


def augment(batch, random):
    check("augment")
    return batch


class Model(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        check("model")
        return nn.Dense(3)(x)


def loss(outputs, batch):
    check("loss")
    return -jax.numpy.take_along_axis(nn.log_softmax(outputs), batch["y"][:, None], -1)[:, 0]


def metric(outputs, batch):
    check("metric")
    return outputs.mean(-1)


def schedule(num_steps):
    check("schedule")
    return lambda step: 0.1


def config_of():
    return {
        "num_steps": 30,
        "global_batch_size": 16,
        "log_every_steps": 1,
        "model": {"target": "user_code:Model"},
        "loss": {"target": "user_code:loss"},
        "metrics": {"mine": {"target": "user_code:metric"}},
        "data": {
            "target": "user_code:load",
            "augment": {"target": "user_code:augment"},
            "error": "",
            "place": "",
            "batch": 0,
            "rank": 0,
        },
        "eval": {"every_steps": 2},
        "checkpoint": {"fast_every_secs": 0.0},
        "optimizer": {"target": "optax:sgd", "learning_rate": {"target": "user_code:schedule"}},
    }


def get_config(argument=""):
    if argument:
        if argument == "exit-0":
            sys.exit(0)
        raise ERRORS[argument]()
    return config_of()
