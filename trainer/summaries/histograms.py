"""Histograms of the params and of their gradients, computed on the devices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trainer.config.settings import Settings
from trainer.lift.call import Call
from trainer.lift.lift import Lift
from trainer.lift.update import recipe_for
from trainer.metrics_writer.run_log import RunLog
from trainer.metrics_writer.step_metrics import StepMetrics
from trainer.metrics_writer.tensorboard import Histogram
from trainer.state.leaves import name_leaves
from trainer.step.gradients import make_gradient_step
from trainer.step.job import Job

BINS = 64


class Histograms:
    """Computes histograms of a state.

    The gradient is that of the next step, before clipping: of the same batch and with the same
    random numbers, computed once more by a separate program. The state is only read, so the run's
    numbers do not change. It costs the time and memory of a step without its update; sharded
    params are all-gathered for it, as in an evaluation.

    Args:
        settings: how to reduce.
        job: what is trained.
        lift: how the batch axis maps to devices.
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
        """Histograms by name, `params/...` and `gradients/...`, without arrays that are not finite.

        All processes must call it at the same point.

        Args:
            state: after `step` steps.
            step: the next step uses batch number `step`.
        """
        state = replace(state, opt_state=(), ema=None)  # unused, and perhaps sharded
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


class HistogramSummary:
    """Writes histograms to TensorBoard every `config.summaries.histograms_every_steps` steps.

    Args:
        histograms: computes them.
        every_steps: how often.
        metrics: of the steps; drained first.
        run_log: whose TensorBoard they go to.
        stop_requested: as for `trainer.train`.
    """

    def __init__(
        self,
        histograms: Histograms,
        every_steps: int,
        metrics: StepMetrics,
        run_log: RunLog,
        stop_requested: Callable[[int, str], bool],
    ) -> None:
        self._histograms = histograms
        self._every_steps = every_steps
        self._metrics = metrics
        self._run_log = run_log
        self._stop_requested = stop_requested

    @classmethod
    def of(
        cls,
        settings: Settings,
        job: Job,
        lift: Lift,
        metrics: StepMetrics,
        run_log: RunLog,
        stop_requested: Callable[[int, str], bool],
    ) -> HistogramSummary | None:
        """What a config asks for; None where it asks for none."""
        every_steps = settings.histograms_every_steps
        if every_steps is None:
            return None
        histograms = Histograms(settings, job, lift)
        return cls(histograms, every_steps, metrics, run_log, stop_requested)

    def due(self, call: Call) -> bool:
        """Every so many steps."""
        return call.reaches(self._every_steps)

    def run(self, call: Call, state: Any) -> None:
        """Computes the histograms in all processes, and writes them in one."""
        self._metrics.drain()
        self._stop_requested(call.step, "evaluate")  # the first one compiles, which takes a while
        with self._metrics.excluding("summaries"):
            found = self._histograms(state, call.step)
            if self._run_log.tensorboard is not None:
                self._run_log.tensorboard.histograms(call.step, found)


def _measured(tree: Any) -> dict[str, Any]:
    """The leaves with a histogram: floats."""
    return {
        name: leaf
        for name, leaf in name_leaves(tree).items()
        if leaf.size and jnp.issubdtype(leaf.dtype, jnp.floating)
    }


def _measure(tree: Any) -> tuple[jax.Array, jax.Array]:
    """Each leaf's smallest, largest, sum, sum of squares `(leaves, 4)`; counts `(leaves, BINS)`."""
    ranges, counts = [], []
    for leaf in _measured(tree).values():
        values = leaf.astype(jnp.float32).ravel()
        low, high = jnp.min(values), jnp.max(values)
        ranges.append(jnp.stack([low, high, jnp.sum(values), jnp.sum(values**2)]))
        edges = low + (high - low) * jnp.arange(1, BINS) / BINS
        # Not a scatter, which is serial where values share a bin.
        below = jax.lax.map(lambda edge, values=values: jnp.sum(values < edge), edges)
        counts.append(jnp.diff(below, prepend=0, append=values.size))
    return jnp.stack(ranges), jnp.stack(counts)
