"""Histograms of the params and of their gradients, made on the devices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trainer.job import Job
from trainer.lift import Lift
from trainer.lifted import recipe_on
from trainer.settings import Settings
from trainer.state import name_leaves
from trainer.step import AXIS, mean_gradients

BINS = 64


@dataclass(frozen=True)
class Histogram:
    """How the values of an array are spread.

    Attributes:
        low: the least value.
        high: the largest.
        total: their sum.
        squares: the sum of their squares.
        counts: of equally wide bins from `low` to `high`, shape (BINS,).
    """

    low: float
    high: float
    total: float
    squares: float
    counts: np.ndarray

    @property
    def edges(self) -> np.ndarray:
        """Of the bins, shape (BINS + 1,)."""
        return np.linspace(self.low, self.high, BINS + 1)


class Histograms:
    """Makes histograms of a state.

    The gradient is that of the next step, before clipping: over the very batch and with the very
    random numbers, computed once more by a program of its own. The state is only read, so no number
    of the run changes. It costs the time and the memory of a step without its update.

    Args:
        settings: how to reduce.
        job: what is trained.
        lift: how the batch axis is laid over devices.
    """

    def __init__(self, settings: Settings, job: Job, lift: Lift) -> None:
        self._stream = job.stream
        self._lift = lift
        self._rows = lift.rows(settings.global_batch_size)
        on_cpu = lift.platform == "cpu"  # where convolutions in loops are slow
        recipe = recipe_on(settings, job, lift.platform, unroll=on_cpu)

        def measure(state: Any, batch: Any) -> Any:
            grads, _, _ = mean_gradients(job.task, recipe, AXIS, state, batch)
            return _measure({"params": state.params, "gradients": grads})

        self._function = lift(measure, donate=False)

    def __call__(self, state: Any, step: int) -> dict[str, Histogram]:
        """By name, `params/...` and `gradients/...`; arrays that are not finite are left out.

        All processes must call it at the same point.

        Args:
            state: after `step` steps.
            step: whose batch is the next.
        """
        batch = self._lift.put_batch(self._stream.batch_at(step, self._rows))
        ranges, counts = self._lift.read(self._function(state, batch))
        names = _measured({"params": state.params, "gradients": state.params})
        found = {}
        for name, numbers, spread in zip(names, ranges, counts, strict=True):
            if np.isfinite(numbers).all():
                low, high, total, squares = numbers.tolist()
                found[name] = Histogram(low, high, total, squares, spread)
        return found


def _measured(tree: Any) -> dict[str, Any]:
    """The leaves that have a histogram."""
    return {
        name: leaf
        for name, leaf in name_leaves(tree).items()
        if leaf.size and jnp.issubdtype(leaf.dtype, jnp.floating)
    }


def _measure(tree: Any) -> tuple[jax.Array, jax.Array]:
    """Least, largest, sum and sum of squares of each leaf, `(leaves, 4)`; `(leaves, BINS)`."""
    ranges, counts = [], []
    for leaf in _measured(tree).values():
        values = leaf.astype(jnp.float32).ravel()
        low, high = jnp.min(values), jnp.max(values)
        ranges.append(jnp.stack([low, high, jnp.sum(values), jnp.sum(values**2)]))
        share = (values - low) / jnp.where(high > low, high - low, 1.0)
        bins = jnp.clip((share * BINS).astype(jnp.int32), 0, BINS - 1)
        counts.append(jnp.zeros(BINS, jnp.int32).at[bins].add(1))
    return jnp.stack(ranges), jnp.stack(counts)
