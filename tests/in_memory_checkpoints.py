"""In-memory checkpoints of small states, under a clock and threads that tests control."""

from __future__ import annotations

import jax
import numpy as np

from trainer.checkpoints.in_memory import InMemoryCheckpoints


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Inline:
    """A thread that runs in the one that starts it, so that what it raises is seen."""

    def __init__(self, target, args, **options):
        self._run = lambda: target(*args)

    def start(self):
        self._run()

    def is_alive(self):
        return False

    def join(self):
        pass


def in_memory_at(root, workdir="/runs/mine", every_secs=10.0, max_bytes=1e9, clock=None):
    root.mkdir(exist_ok=True)
    return InMemoryCheckpoints(workdir, root, every_secs, max_bytes, clock or Clock())


def save(checkpoints, step, arrays=None, run="r", blocked=0.0):
    arrays = arrays_of(step) if arrays is None else arrays
    checkpoints.save(step, {"run": run, "number": step}, arrays, blocked)
    checkpoints.wait()


def arrays_of(step):
    return {
        "params/w": np.full((3, 5), step, np.float32),
        "params/b": np.full(7, -step, jax.numpy.bfloat16),
        "empty": np.empty((0, 4), np.float32),
        "rng": np.array([step, 2**32 - 1], np.uint32),
        "step": np.array(step, np.int32),
    }


def assert_is_bitwise(found, expected):
    assert sorted(found) == sorted(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()


def steps_here(checkpoints, run="r"):
    """The steps that are offered, all of which are whole."""
    found = checkpoints.steps(run)
    slot = checkpoints._slot
    for step, place in found.items():
        arrays, listed = checkpoints.read(place)
        assert listed.step == step
        assert listed.meta == {"run": run, "number": step}
        assert_is_bitwise(arrays, arrays_of(step))
    checkpoints._slot = slot
    return found
