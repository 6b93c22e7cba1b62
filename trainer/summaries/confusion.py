"""Which class was taken for which: counts over all held-out examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from trainer.data.stream import Source, eval_batches
from trainer.errors import UserError
from trainer.inference.evaluate import HeldOutSums
from trainer.lift.lift import Lift
from trainer.step.task import AXIS, Batch, Task

# A matrix of more is no picture, and four million counts an evaluation batch.
_MOST_CLASSES = 2000


def make_confusion_step(
    task: Task, *, axis: str | None = AXIS
) -> Callable[[Any, Batch], jax.Array]:
    """Builds `(state, batch) -> counts (classes, classes)`, int32, summed over the axis.

    Row: the label; column: the class with the largest logit. Examples whose `mask` is 0, or whose
    label is none of the classes, count for nothing.
    """

    def confusion_step(state: Any, batch: Batch) -> jax.Array:
        rng = jax.random.wrap_key_data(state.rng)
        outputs, _ = task.apply(state.eval_params, state.model_state, batch, train=False, rng=rng)
        classes = _classes_of(outputs, batch)
        labels = batch["y"].astype(jnp.int32)  # of 8 bits would not hold a place in the matrix
        counted = (labels >= 0) & (labels < classes)
        if "mask" in batch:
            counted &= batch["mask"] > 0
        places = jnp.where(counted, labels, 0) * classes + jnp.argmax(outputs, axis=-1)
        counts = jnp.zeros(classes * classes, jnp.int32).at[places].add(counted.astype(jnp.int32))
        counts = counts.reshape(classes, classes)
        return counts if axis is None else lax.psum(counts, axis)

    return confusion_step


def make_confusion(
    task: Task, source: Source, lift: Lift, batch_size: int, depth: int, state: Any
) -> HeldOutSums:
    """What counts over all held-out examples; see `HeldOutSums` for the arguments.

    Args:
        state: shapes of a state.

    Raises:
        UserError: this is no classification, one label an example.
    """
    step = make_confusion_step(task)
    example = next(iter(eval_batches(source, 1)))
    batch = {k: jax.ShapeDtypeStruct((1, *a.shape), a.dtype) for k, a in example.items()}
    jax.eval_shape(jax.vmap(step, axis_name=AXIS, in_axes=(None, 0), out_axes=None), state, batch)
    return HeldOutSums(step, source, lift, batch_size, depth)


def shares(counts: np.ndarray) -> np.ndarray:
    """Of the examples of each label, the part that was taken for each class; rows add up to 1."""
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def _classes_of(outputs: Any, batch: Batch) -> int:
    labels = batch.get("y")
    given = f"outputs are {_describe(outputs)} and labels {_describe(labels)}"
    if (
        labels is None
        or not hasattr(outputs, "ndim")
        or outputs.ndim != 2
        or labels.shape != outputs.shape[:1]
        or not jnp.issubdtype(labels.dtype, jnp.integer)
    ):
        raise UserError(
            f"config.summaries.confusion=True is for one class an example; the {given}",
            "logits (examples, classes) and integers batch['y'] (examples,); or leave it out",
        )
    if outputs.shape[1] > _MOST_CLASSES:
        raise UserError(
            f"config.summaries.confusion=True: {outputs.shape[1]} classes are more than "
            f"{_MOST_CLASSES}",
            "leave it out",
        )
    return int(outputs.shape[1])


def _describe(value: Any) -> str:
    if not hasattr(value, "shape"):
        return f"a {type(value).__name__}"
    return f"{value.dtype}{list(value.shape)}"
