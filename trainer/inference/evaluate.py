"""Evaluation: every held-out example exactly once, on any number of devices."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable
from contextlib import closing
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from trainer.console import warn
from trainer.data.fingerprint import describe_change
from trainer.data.prefetch import depth_for, prefetch
from trainer.data.stream import HostBatch, Source, eval_batches
from trainer.errors import UserError
from trainer.inference.trained_model import TrainedModel, restored_onto_devices
from trainer.lift.in_flight import InFlight
from trainer.lift.lift import Lift
from trainer.lift.same_data import agree_on_data
from trainer.step.evaluate import NAN, make_eval_step
from trainer.step.labels import LabelCheck
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
        CheckpointsUnreadable: the checkpoint does not exist, is damaged or is not finite.
        UserError: `workdir` is not the folder of a run, the data has no held-out examples, or the
            config, its targets or the mesh are invalid; or processes have different examples.
    """
    with restored_onto_devices(
        workdir, best=best, step=step, config=config, mesh=mesh, is_trusted=trust
    ) as (trained, lift):
        return evaluate_trained(trained, lift)


def evaluate_trained(trained: TrainedModel, lift: Lift) -> dict[str, float]:
    """The same for a model whose state is on the devices of a lift.

    Warns if the examples are not those that the run was evaluated on.

    Raises:
        UserError: the data has no held-out examples, or processes have different ones.
    """
    source = trained.examples("eval")
    now = agree_on_data(lift, {"eval": source})["eval"]
    what = describe_change(trained.data.get("eval"), now) if trained.data else ""
    if what and lift.writes:
        warn(f"the held-out examples are not those of the run: {what}")
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

    Attributes:
        after: called with each host batch and the numbers of its examples, once the function is
            dispatched on it; None: nothing is called.
    """

    after: Callable[[HostBatch, np.ndarray], None] | None = None

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

        def add(finished: Iterable[Any]) -> None:
            nonlocal totals
            for _, sums in finished:
                sums = jax.tree.map(lambda leaf: leaf.astype(np.float64), sums)
                with np.errstate(invalid="ignore"):  # inf - inf is NaN, as it should be
                    totals = sums if totals is None else jax.tree.map(np.add, totals, sums)

        rows = self._lift.rows(self._batch_size)
        numbers = np.arange(self._batch_size)[rows]
        batches = eval_batches(self._source, self._batch_size, rows)

        def put(batch: HostBatch) -> tuple[HostBatch | None, Any]:
            return batch if self.after else None, self._lift.put_batch(batch)

        with closing(prefetch(put, batches, self._depth)) as on_devices:
            for batch, on_device in on_devices:
                if asked_to_stop or stop_requested():
                    return None
                add(in_flight.push(None, self._function(state, on_device)))
                if batch is not None and self.after is not None:
                    self.after(batch, numbers)
                numbers = numbers + self._batch_size
        add(in_flight.drain())
        return totals


class Evaluator:
    """Evaluates states on one set of held-out examples; the first time it checks their labels.

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
        self._warns = lift.writes
        self._sums = HeldOutSums(make_eval_step(task), source, lift, batch_size, depth)
        rank = lift.process if lift.num_processes > 1 else None
        self._sums.after = LabelCheck(task, "held-out", rank).check

    def __call__(
        self, state: Any, stop_requested: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """The mean of the loss and of each metric over all examples, tagged `eval/...`.

        Returns None if asked to stop. Warns of outputs with NaN and of a loss that is not finite.

        Raises:
            UserError: a label is no class of the model, or no example counts.
        """
        totals = self._sums(state, stop_requested)
        if totals is None:
            return None
        self._sums.after = None
        if not totals["loss"][1]:
            raise UserError(
                "no held-out example counts: all are masked, or have the label "
                "config.loss.ignore_index",
                'correct the data, or return no "eval" source',
            )
        bad, examples = totals.pop(NAN)
        means = {
            f"eval/{name}": float(total / count) if count else float("nan")
            for name, (total, count) in totals.items()
        }
        if self._warns and bad:
            warn(f"the model's outputs hold a NaN for {bad:g} of {examples:g} held-out examples")
        elif self._warns and examples and not math.isfinite(means["eval/loss"]):
            warn(f"eval/loss is {means['eval/loss']}, although no output of the model is a NaN")
        return means
