"""Histograms of the params and of their gradients, made on the devices."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trainer.config.settings import Settings
from trainer.lift.lift import Lift
from trainer.lift.update import recipe_for
from trainer.state.leaves import name_leaves
from trainer.step.gradients import make_gradient_step
from trainer.step.job import Job

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
    of the run changes. It costs the time and the memory of a step without its update; a state that
    is cut has its params put together for it, as an evaluation does.

    Args:
        settings: how to reduce.
        job: what is trained.
        lift: how the batch axis is laid over devices.
    """

    def __init__(self, settings: Settings, job: Job, lift: Lift) -> None:
        self._job = job
        self._lift = lift
        self._rows = lift.rows(settings.global_batch_size)
        on_cpu = lift.platform == "cpu"  # where convolutions in loops are slow
        recipe = recipe_for(settings, job, lift.platform, unroll=on_cpu)
        gradient_step = make_gradient_step(job.task, recipe)

        def measure(state: Any, batch: Any) -> Any:
            grads = gradient_step(state, batch).grads
            return _measure({"params": state.params, "gradients": grads})

        self._function = lift(measure, donate=False)

    def __call__(self, state: Any, step: int) -> dict[str, Histogram]:
        """By name, `params/...` and `gradients/...`; arrays that are not finite are left out.

        All processes must call it at the same point.

        Args:
            state: after `step` steps.
            step: whose batch is the next.
        """
        state = replace(state, opt_state=(), ema=None)  # of no use, and perhaps cut
        batch = self._lift.put_batch(self._job.stream.batch_at(step, self._rows))
        ranges, counts = self._lift.read(self._function(state, batch))
        trained = self._job.task.trainable(state.params)
        names = _measured({"params": state.params, "gradients": trained})
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
        edges = low + (high - low) * jnp.arange(1, BINS) / BINS
        # Not a scatter, which goes one by one where values share a bin.
        below = jax.lax.map(lambda edge, values=values: jnp.sum(values < edge), edges)
        counts.append(jnp.diff(below, prepend=0, append=values.size))
    return jnp.stack(ranges), jnp.stack(counts)
