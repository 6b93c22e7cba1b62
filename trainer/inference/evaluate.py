"""Evaluation: every held-out example exactly once, on any number of devices."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from contextlib import closing
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from trainer.data.prefetch import depth_for, prefetch
from trainer.data.stream import Source, eval_batches
from trainer.inference.trained_model import TrainedModel, restored_onto_devices
from trainer.lift.in_flight import InFlight
from trainer.lift.lift import Lift
from trainer.step.evaluate import make_eval_step
from trainer.step.task import Task


def evaluate(
    workdir: str | os.PathLike[str],
    *,
    best: bool = False,
    step: int | None = None,
    config: ConfigDict | None = None,
    mesh: Mesh | None = None,
    trust: bool = False,
) -> dict[str, float]:
    """Evaluates a saved state of a run, by default the newest, on its held-out examples.

    The numbers are those that training reports, on any number of devices. The run may be training
    meanwhile; nothing is written and no lock is taken. Where jax runs several processes
    (`jax.distributed.initialize`), all of them call this with the same arguments.

    Args:
        workdir: the run's folder.
        best: the state in `best/` instead of the newest in `checkpoints/`.
        step: the state of this step, from `checkpoints/` or else from `best/`.
        config: the run's own where None; another one needs a model with the same parameters.
            `config.eval.batch_size` examples are evaluated at a time.
        mesh: the devices, on the one axis "batch"; all devices where None.
        trust: whether the run's own config may name any code, not only that of podlift, optax and
            packages in the current folder.

    Returns:
        The means over the examples, each of which counts exactly once, by the tags that training
        uses, "eval/loss" and "eval/<metric>". Batches are added up in float64.

    Raises:
        CheckpointsUnreadable: the checkpoint does not exist or is damaged.
        UserError: `workdir` is not the folder of a run, the data has no held-out examples, or the
            config, its targets or the mesh are invalid.
    """
    with restored_onto_devices(
        workdir, best=best, step=step, config=config, mesh=mesh, is_trusted=trust
    ) as (trained, lift):
        return evaluate_trained(trained, lift)


def evaluate_trained(trained: TrainedModel, lift: Lift) -> dict[str, float]:
    """The same for a model whose state is on the devices of a lift.

    Raises:
        UserError: the data has no held-out examples.
    """
    source = trained.examples("eval")
    depth = depth_for(trained.settings.prefetch, lift.platform)
    metrics = Evaluator(trained.job.task, source, lift, trained.batch_size, depth)(trained.state)
    assert metrics is not None  # nothing asks it to stop
    return metrics


class HeldOutSums:
    """Sums a function of the state and a batch over all held-out examples.

    Args:
        function: `(state, batch) -> sums`, written for one shard and summed over the axis.
        source: the examples.
        lift: the lift over the devices.
        batch_size: examples per batch; rounded up to a multiple of the shards.
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
        """The sums over all batches, in float64 on the host; None if asked to stop."""
        state = dataclasses.replace(state, opt_state=())  # not needed here, and may be sharded
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
                with np.errstate(invalid="ignore"):  # inf - inf is NaN, as it should be
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
        task: the model, its loss and its metrics.
        source: the examples, at least one.
        lift: the lift over the devices.
        batch_size: examples per batch; rounded up to a multiple of the shards.
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
