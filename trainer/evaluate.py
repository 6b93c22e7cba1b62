"""Evaluation: every held-out example exactly once, at any device count."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import closing
from typing import Any

from trainer.data.prefetch import prefetch
from trainer.data.stream import Source, eval_batches
from trainer.lift import Lift
from trainer.progress import InFlight
from trainer.step import Task, make_eval_step


class Evaluator:
    """Evaluates states on one set of held-out examples.

    Args:
        task: what is evaluated.
        source: the examples.
        lift: how a batch meets the devices.
        batch_size: rows a batch; rounded up to a multiple of the shards.
        depth: how many batches to prefetch.
    """

    def __init__(
        self, task: Task, source: Source, lift: Lift, batch_size: int, depth: int = 0
    ) -> None:
        self._source = source
        self._lift = lift
        self._batch_size = -(-batch_size // lift.num_shards) * lift.num_shards
        self._depth = depth
        self._step = lift(make_eval_step(task), donate=False)

    def __call__(
        self, state: Any, stop_requested: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """The mean of the loss and of each metric over all examples, tagged `eval/...`.

        Sums and counts are added up in float64 on the host. Returns None if asked to stop.
        """
        state = dataclasses.replace(state, opt_state=())  # of no use, and perhaps cut
        totals: dict[str, list[float]] = {}
        asked_to_stop = False

        def read(sums: Any) -> Any:
            nonlocal asked_to_stop
            asked_to_stop |= stop_requested()
            return self._lift.read(sums)

        in_flight = InFlight(read)

        def add(finished: list[Any]) -> None:
            for _, sums in finished:
                for name, (numerator, count) in sums.items():
                    total = totals.setdefault(name, [0.0, 0.0])
                    total[0] += float(numerator)
                    total[1] += float(count)

        rows = self._lift.rows(self._batch_size)
        batches = eval_batches(self._source, self._batch_size, rows)
        with closing(prefetch(self._lift.put_batch, batches, self._depth)) as on_devices:
            for batch in on_devices:
                if asked_to_stop or stop_requested():
                    return None
                add(in_flight.push(None, self._step(state, batch)))
        add(in_flight.drain())
        return {
            f"eval/{name}": total / count if count else float("nan")
            for name, (total, count) in totals.items()
        }
