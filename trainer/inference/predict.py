"""Outputs of a model: those of every example exactly once, in order, at any device count."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from trainer.console import warn
from trainer.data.prefetch import prefetch
from trainer.data.stream import HostBatch, Source, eval_batches
from trainer.errors import UserError
from trainer.lift.in_flight import InFlight
from trainer.lift.lift import Lift
from trainer.state.leaves import name_leaves
from trainer.step.task import AXIS, Batch, Task


def predict(
    task: Task, state: Any, source: Source, lift: Lift, batch_size: int, depth: int = 0
) -> dict[str, np.ndarray]:
    """What the model makes of each example, with `train=False`, as `(examples, ...)` by name.

    The names are "outputs", or "outputs/<name>" where the model returns a dict, and "y" if the data
    has it. What has no row for each example is left out. dtypes that numpy lacks become float32.

    Args:
        task: whose model it is.
        state: on the devices.
        source: the examples.
        lift: how a batch meets the devices; of one process.
        batch_size: rows a batch; rounded up to a multiple of the shards.
        depth: how many batches to prefetch.

    Raises:
        UserError: no output has a row for each example.
    """
    batch_size = -(-batch_size // lift.num_shards) * lift.num_shards
    left_out: set[str] = set()
    step = lift(_make_predict_step(task, left_out), donate=False)
    arrays: dict[str, np.ndarray] = {}

    def put(batch: HostBatch) -> tuple[np.ndarray | None, Any]:
        return batch.get("y"), lift.put_batch({"x": batch["x"]})

    def fill(finished: list[Any]) -> None:
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
        warn(f"left out, as it has no row for each example: {', '.join(sorted(left_out))}")
    return arrays


def _make_predict_step(task: Task, left_out: set[str]) -> Any:
    """`(state, batch) -> {name: (rows of all shards, ...)}`; every device gets all of them.

    Names of what has no rows are added to `left_out` when it is traced.
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
                "the model returns nothing with a row for each example",
                "return arrays of shape (examples, ...)",
            )
        return lax.all_gather(rows, AXIS, tiled=True)

    return predict_step


def _as_numpy_has_it(values: np.ndarray) -> np.ndarray:
    """Numbers of a dtype that a file of numpy's would keep as bytes only, such as bfloat16."""
    if values.dtype.kind != "V":
        return values
    is_float = jnp.issubdtype(values.dtype, jnp.floating)
    return values.astype(np.float32 if is_float else np.int32)
