"""Evaluation: every held-out example exactly once, at any device count."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import closing
from typing import Any

import jax
import numpy as np

from trainer.data.prefetch import prefetch
from trainer.data.stream import Source, eval_batches
from trainer.lift.in_flight import InFlight
from trainer.lift.lift import Lift
from trainer.step.evaluate import make_eval_step
from trainer.step.task import Task


class HeldOutSums:
    """Adds up what a function of the state and a batch gives, over one set of held-out examples.

    Args:
        function: `(state, batch) -> sums`, written for one shard and summed over the axis.
        source: the examples.
        lift: how a batch meets the devices.
        batch_size: rows a batch; rounded up to a multiple of the shards.
        depth: how many batches to prefetch.
    """

    def __init__(
        self,
        function: Callable[[Any, Any], Any],
        source: Source,
        lift: Lift,
        batch_size: int,
        depth: int = 0,
    ) -> None:
        self._source = source
        self._lift = lift
        self._batch_size = -(-batch_size // lift.num_shards) * lift.num_shards
        self._depth = depth
        self._function = lift(function, donate=False)

    def __call__(self, state: Any, stop_requested: Callable[[], bool] = lambda: False) -> Any:
        """The sums over all batches, added up in float64 on the host; None if asked to stop."""
        state = dataclasses.replace(state, opt_state=())  # of no use, and perhaps cut
        totals: Any = None
        asked_to_stop = False

        def read(sums: Any) -> Any:
            nonlocal asked_to_stop
            asked_to_stop |= stop_requested()
            return self._lift.read(sums)

        in_flight = InFlight(read)

        def add(finished: list[Any]) -> None:
            nonlocal totals
            for _, sums in finished:
                sums = jax.tree.map(lambda leaf: leaf.astype(np.float64), sums)
                with np.errstate(invalid="ignore"):  # infinities may cancel: that is a NaN
                    totals = sums if totals is None else jax.tree.map(np.add, totals, sums)

        rows = self._lift.rows(self._batch_size)
        batches = eval_batches(self._source, self._batch_size, rows)
        with closing(prefetch(self._lift.put_batch, batches, self._depth)) as on_devices:
            for batch in on_devices:
                if asked_to_stop or stop_requested():
                    return None
                add(in_flight.push(None, self._function(state, batch)))
        add(in_flight.drain())
        return totals


class Evaluator:
    """Evaluates states on one set of held-out examples.

    Args:
        task: what is evaluated.
        source: the examples, at least one.
        lift: how a batch meets the devices.
        batch_size: rows a batch; rounded up to a multiple of the shards.
        depth: how many batches to prefetch.
    """

    def __init__(
        self, task: Task, source: Source, lift: Lift, batch_size: int, depth: int = 0
    ) -> None:
        self._sums = HeldOutSums(make_eval_step(task), source, lift, batch_size, depth)

    def __call__(
        self, state: Any, stop_requested: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """The mean of the loss and of each metric over all examples, tagged `eval/...`.

        Returns None if asked to stop.
        """
        totals = self._sums(state, stop_requested)
        if totals is None:
            return None
        return {
            f"eval/{name}": float(total / count) if count else float("nan")
            for name, (total, count) in totals.items()
        }
