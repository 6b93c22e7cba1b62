"""Outputs of a model for every example exactly once, in order, on any number of devices."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import closing
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from trainer.console import warn
from trainer.data.prefetch import depth_for, prefetch
from trainer.data.stream import HostBatch, Source, eval_batches
from trainer.errors import UserError
from trainer.inference.trained_model import TrainedModel, restored_onto_devices
from trainer.lift.in_flight import InFlight
from trainer.lift.lift import Lift
from trainer.state.leaves import name_leaves
from trainer.step.task import AXIS, Batch, Task


def predict(
    workdir: str | os.PathLike[str],
    *,
    split: str = "eval",
    best: bool = False,
    step: int | None = None,
    config: ConfigDict | None = None,
    mesh: Mesh | None = None,
    trust: bool = False,
) -> dict[str, np.ndarray]:
    """The outputs of a saved state of a run, by default the newest, for every example of a split.

    The model runs with `train=False`, in one process. The run may be training meanwhile; nothing is
    written and no lock is taken.

    Args:
        workdir: the run's folder.
        split: "eval" for the held-out examples, or "train" for the others, without augmentation.
        best: the state in `best/` instead of the newest in `checkpoints/`.
        step: the state of this step, from `checkpoints/` or else from `best/`.
        config: the run's own where None; another one needs a model with the same parameters.
            `config.eval.batch_size` examples are predicted at a time.
        mesh: the devices, on the one axis "batch"; all devices where None.
        trust: whether the run's own config may name any code, not only that of podlift, optax and
            packages in the current folder.

    Returns:
        Arrays of shape `(examples, ...)` in the order of the data: "outputs", or "outputs/<name>"
        where the model returns a dict, and "y" if the data has it. dtypes are the model's, except
        that those which numpy lacks, such as bfloat16, become float32 or int32. An output without
        an example axis is left out, with a warning; NaN is kept, with a warning.

    Raises:
        CheckpointsUnreadable: the checkpoint does not exist, is damaged or is not finite.
        UserError: `workdir` is not the folder of a run, the data has no such split, no output has
            an example axis, jax runs several processes, or the config, its targets or the mesh
            are invalid.
    """
    with restored_onto_devices(
        workdir, best=best, step=step, config=config, mesh=mesh, is_trusted=trust
    ) as (trained, lift):
        return predict_trained(trained, lift, split)


def predict_trained(trained: TrainedModel, lift: Lift, split: str) -> dict[str, np.ndarray]:
    """The same for a model whose state is on the devices of a lift.

    Raises:
        UserError: the data has no such split, no output has an example axis, or the lift is over
            several processes.
    """
    source = trained.examples(split)
    depth = depth_for(trained.settings.prefetch, lift.platform)
    return predict_source(trained.job.task, trained.state, source, lift, trained.batch_size, depth)


def predict_source(
    task: Task, state: Any, source: Source, lift: Lift, batch_size: int, depth: int = 0
) -> dict[str, np.ndarray]:
    """The outputs for every example of a source; see `predict` for names, shapes and dtypes.

    Args:
        task: holds the model.
        state: on the devices.
        source: the examples.
        lift: the lift over the devices of one process.
        batch_size: examples per batch; rounded up to a multiple of the shards.
        depth: how many batches to prefetch.

    Raises:
        UserError: no output has an example axis, or the lift is over several processes.
    """
    if lift.num_processes > 1:
        raise UserError(
            f"predict runs in one process, and jax runs {lift.num_processes}",
            "start one process",
        )
    batch_size = -(-batch_size // lift.num_shards) * lift.num_shards
    left_out: set[str] = set()
    step = lift(_make_predict_step(task, left_out), donate=False)
    arrays: dict[str, np.ndarray] = {}

    def put(batch: HostBatch) -> tuple[np.ndarray | None, Any]:
        return batch.get("y"), lift.put_batch({"x": batch["x"]})

    def fill(finished: Iterable[Any]) -> None:
        for (start, y), outputs in finished:
            rows = {**outputs, "y": y} if y is not None else outputs
            for name, values in rows.items():
                values = _as_numpy_has_it(values[: len(source) - start])
                if name not in arrays:
                    arrays[name] = np.empty((len(source), *values.shape[1:]), values.dtype)
                arrays[name][start : start + len(values)] = values

    in_flight = InFlight(lift.read)
    batches = eval_batches(source, batch_size)
    with closing(prefetch(put, batches, depth)) as on_devices:
        for number, (y, batch) in enumerate(on_devices):
            fill(in_flight.push((number * batch_size, y), step(state, batch)))
    fill(in_flight.drain())
    if left_out:
        warn(f"left out, without an example axis: {', '.join(sorted(left_out))}")
    _warn_of_nan({name: array for name, array in arrays.items() if name != "y"})
    return arrays


def _warn_of_nan(outputs: dict[str, np.ndarray]) -> None:
    for name, array in outputs.items():
        if array.dtype.kind in "fc":
            bad = np.flatnonzero(np.isnan(array.reshape(len(array), -1)).any(axis=1))
            if bad.size:
                first = f"the first is {bad[0]}, counted from 0"
                warn(f"{name} hold a NaN for {bad.size} of {len(array)} examples; {first}")


def _make_predict_step(
    task: Task, left_out: set[str]
) -> Callable[[Any, Batch], dict[str, jax.Array]]:
    """`(state, batch) -> {name: (rows of all shards, ...)}`, replicated on every device.

    Tracing it adds the names of outputs without an example axis to `left_out`.
    """

    def predict_step(state: Any, batch: Batch) -> dict[str, jax.Array]:
        rng = jax.random.wrap_key_data(state.rng)
        outputs, _ = task.apply(state.eval_params, state.model_state, batch, train=False, rng=rng)
        leaves = name_leaves({"outputs": outputs})
        examples = batch["x"].shape[:1]
        rows = {n: jnp.asarray(leaf) for n, leaf in leaves.items() if leaf.shape[:1] == examples}
        left_out.update(name for name in leaves if name not in rows)
        if not rows:
            raise UserError(
                "no output of the model has an example axis",
                "return arrays of shape (examples, ...)",
            )
        return cast(dict[str, jax.Array], lax.all_gather(rows, AXIS, tiled=True))

    return predict_step


def _as_numpy_has_it(values: np.ndarray) -> np.ndarray:
    """Casts dtypes that numpy's files keep only as raw bytes, such as bfloat16."""
    if values.dtype.kind != "V":
        return values
    is_float = jnp.issubdtype(values.dtype, jnp.floating)
    return values.astype(np.float32 if is_float else np.int32)
