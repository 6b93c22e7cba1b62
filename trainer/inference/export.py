"""Exports a trained model as one `jax.export` program, which needs only jax to run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from trainer.errors import UserError
from trainer.inference.trained_model import TrainedModel
from trainer.state.leaves import name_leaves

# The serialised format (a flatbuffer) has 32-bit signed offsets.
_MOST_BYTES = 2**31

PLATFORMS = ("cpu", "cuda", "tpu")


def export_model(
    trained: TrainedModel, platforms: Sequence[str] = PLATFORMS, batch: int | None = None
) -> jax.export.Exported:
    """Exports the model as a function of `x`, with `train=False` and its parameters as constants.

    Args:
        trained: the model.
        platforms: the platforms to compile for, as `jax.export` names them.
        batch: the number of examples; None for any number, shown as "b" in shapes.

    Returns:
        A function of `x`, `(examples, ...)` in the shape and dtype of the training data.

    Raises:
        UserError: the parameters and model state are larger than the format allows.
        Exception: of many types, where the model cannot be traced with a symbolic number of
            examples, needs the axis "batch", or has no lowering for one of the platforms.
    """
    task = trained.job.task
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(trained.state))
    if size >= _MOST_BYTES:
        raise UserError(
            f"the model's parameters and state take {size / 1e9:.2f} GB, and a file of jax.export "
            f"holds less than {_MOST_BYTES / 1e9:.2f} GB",
            "trainer.load(RUN) gives them as arrays",
        )
    state = jax.tree.map(jnp.asarray, trained.state)
    x = jnp.asarray(trained.job.stream.source[np.zeros(1, np.int64)]["x"])

    def model(x: jax.Array) -> Any:
        rng = jax.random.wrap_key_data(state.rng)
        outputs, _ = task.apply(
            state.eval_params, state.model_state, {"x": x}, train=False, rng=rng
        )
        return outputs

    sizes = ["b" if batch is None else str(batch), *map(str, x.shape[1:])]
    shape = jax.export.symbolic_shape(",".join(sizes))
    export = jax.export.export(jax.jit(model), platforms=list(platforms))
    return export(jax.ShapeDtypeStruct(shape, x.dtype))


def signature(exported: jax.export.Exported) -> str:
    """Formats the signature as `float32[b,8,8] -> float32[b,10]`; several outputs have names.

    Args:
        exported: a function of one array.
    """
    (x,) = exported.in_avals
    named = name_leaves(jax.tree.unflatten(exported.out_tree, exported.out_avals))
    outputs = (f"{name} {_show(leaf)}".lstrip() for name, leaf in named.items())
    return f"{_show(x)} -> {', '.join(outputs)}"


def _show(array: Any) -> str:
    return f"{array.dtype}[{','.join(map(str, array.shape))}]"
