"""The confusion matrix over all held-out examples."""

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

# Larger matrices are no use as an image, and cost millions of counts a batch.
_MOST_CLASSES = 2000


def make_confusion_step(
    task: Task, *, axis: str | None = AXIS
) -> Callable[[Any, Batch], jax.Array]:
    """Builds `(state, batch) -> counts (classes, classes)`, int32, summed over the axis.

    Rows are labels, columns the classes with the largest logit. Examples with a `mask` of 0, or
    with a label out of range, are not counted.
    """

    def confusion_step(state: Any, batch: Batch) -> jax.Array:
        rng = jax.random.wrap_key_data(state.rng)
        outputs, _ = task.apply(state.eval_params, state.model_state, batch, train=False, rng=rng)
        classes = _classes_of(outputs, batch)
        labels = batch["y"].astype(jnp.int32)  # 8 bits do not hold an index into the matrix
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
    """Counts over all held-out examples; see `HeldOutSums` for the arguments.

    Args:
        state: shapes of a state.

    Raises:
        UserError: the task is not a classification with one label an example.
    """
    step = make_confusion_step(task)
    example = next(iter(eval_batches(source, 1)))
    batch = {k: jax.ShapeDtypeStruct((1, *a.shape), a.dtype) for k, a in example.items()}
    jax.eval_shape(jax.vmap(step, axis_name=AXIS, in_axes=(None, 0), out_axes=None), state, batch)
    return HeldOutSums(step, source, lift, batch_size, depth)


def shares(counts: np.ndarray) -> np.ndarray:
    """The share of each predicted class among the examples of a label; rows sum to 1."""
    return np.asarray(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1))


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
