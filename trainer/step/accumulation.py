"""Gradient accumulation: the examples of a shard in microbatches, one after another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from trainer.errors import UserError
from trainer.state.leaves import name_leaves
from trainer.step.task import Batch

# `(model_state, rng, batch, partners) -> (grads, model state, sums)`
ShardGradients = Callable[..., tuple[Any, Any, dict[str, Any]]]


def accumulate(
    gradients: ShardGradients,
    model_state: Any,
    rng: jax.Array,
    batch: Batch,
    partners: Batch | None,
    *,
    steps: int,
    unroll: bool,
) -> tuple[Any, Any, dict[str, Any]]:
    """Adds up the gradients and sums of microbatches; each passes its model state to the next.

    A microbatch holds every `steps`-th example, so neighbours (passages of one document, for
    example) end up in different ones.

    Args:
        gradients: computes the gradients of one microbatch.
        model_state: before the step.
        rng: a key; each microbatch folds its number in.
        batch: one shard; `steps` divides its examples.
        partners: what mixup blends with the examples, if anything.
        steps: the number of microbatches.
        unroll: unroll the loop over them.
    """

    def split(leaf: jax.Array) -> jax.Array:
        return jnp.swapaxes(leaf.reshape(leaf.shape[0] // steps, steps, *leaf.shape[1:]), 0, 1)

    microbatches = jax.tree.map(split, (dict(batch), partners))

    def add(carry: Any, numbered: Any) -> tuple[Any, None]:
        totals, model_state = carry
        number, (batch, partners) = numbered
        rng_here = jax.random.fold_in(rng, number)
        grads, model_state, sums = gradients(model_state, rng_here, batch, partners)
        return (jax.tree.map(jnp.add, totals, (grads, sums)), model_state), None

    first = jax.tree.map(lambda leaf: leaf[0], microbatches)
    shapes = jax.eval_shape(gradients, model_state, rng, *first)
    check_shapes(model_state, shapes[1])
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (shapes[0], shapes[2]))
    ((grads, sums), model_state), _ = lax.scan(
        add,
        (zeros, model_state),
        (jnp.arange(steps), microbatches),
        unroll=True if unroll else 1,
    )
    return grads, model_state, sums


def check_shapes(before: Any, after: Any) -> None:
    """Checks that a step keeps the shapes of the model state.

    Model state that changes its shape would recompile the step and break its checkpoints.

    Raises:
        UserError: a leaf changes its shape, appears or disappears.
    """
    old, new = name_leaves(before), name_leaves(after)
    for name in [*old, *(name for name in new if name not in old)]:
        shapes = [jnp.shape(leaves[name]) if name in leaves else None for leaves in (old, new)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"the model's state {name} has shape {shapes[0]} after init and {shapes[1]} after "
                "a step",
                "state must keep its shape; keepdims=True in a mean and sown values change it",
            )
