"""The part of a step that is written for one shard of the batch: gradients and their means.

What it returns is the same on all shards, or cut over them (`trainer.state.partition`); what
follows it knows of no axis.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from trainer.errors import UserError
from trainer.state.leaves import fill_in, name_leaves
from trainer.state.partition import ParamSharding
from trainer.state.train_state import TrainState
from trainer.step.collectives import (
    all_gather,
    global_norm,
    mean_over_axis,
    reduce_scatter_mean,
    sharded_norm,
    slice_shard,
)
from trainer.step.mixup import mix
from trainer.step.task import AXIS, PLAIN, Batch, Metrics, PerExample, Recipe, Task
from trainer.step.tracing import rematerialises

# What profiles and plans call the step's own collectives.
MEAN_SCOPE = "mean_over_axis"
GATHER_SCOPE = "gather_over_axis"


# What the backward pass does anew: putting params together, and what a layer makes of them before
# it multiplies.
_NOT_KEPT = frozenset(
    ("all_gather", "convert_element_type", "reshape", "transpose", "squeeze", "broadcast_in_dim")
)

Apply = Callable[..., tuple[Any, Any]]


class Gradients(NamedTuple):
    """What all shards together have found in a batch.

    Attributes:
        grads: of the mean loss over all examples, in the structure of the params.
        model_state: after the step.
        metrics: `loss`, `grad_norm`, and those of the task.
    """

    grads: Any
    model_state: Any
    metrics: Metrics


def make_gradient_step(
    task: Task,
    recipe: Recipe = PLAIN,
    *,
    axis: str | None = AXIS,
    sharding: ParamSharding | None = None,
) -> Callable[[TrainState, Batch], Gradients]:
    """Builds `gradient_step(state, batch) -> Gradients` for one shard of the batch.

    Args:
        task: what to train.
        recipe: how.
        axis: the name of the axis over the shards; None where there is only one and no axis.
        sharding: how the gradients are cut, and whether the params are; whole where None.
    """
    flat = recipe.flat

    def gradient_step(state: TrainState, batch: Batch) -> Gradients:
        rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        if axis is not None:
            rng = jax.random.fold_in(rng, lax.axis_index(axis))
        params, apply = _whole(task, recipe, axis, sharding, state.params)
        grads, model_state, sums = _gradients(
            task, recipe, axis, apply, dataclasses.replace(state, params=params), batch, rng
        )
        _same_shapes(state.model_state, model_state)
        # The mean of float model state is free where the layers already synchronise it (XLA sees
        # equal values) and is what makes a plain running mean right where they do not.
        with jax.named_scope(MEAN_SCOPE):
            if sharding is None or flat:
                grads, model_state, sums = mean_over_axis(
                    (grads, model_state, sums), axis, flat=flat
                )
            else:
                model_state, sums = mean_over_axis((model_state, sums), axis, flat=flat)
                grads = reduce_scatter_mean(grads, axis, sharding)
        if state.loss_scale is not None:
            grads = jax.tree.map(lambda leaf: leaf / state.loss_scale.scale, grads)
        metrics = {name: numerator / count for name, (numerator, count) in sums.items()}
        if sharding is None or flat:
            metrics["grad_norm"] = global_norm(grads, flat=flat)
        else:
            metrics["grad_norm"] = sharded_norm(grads, axis, sharding)
        if sharding is not None and flat:
            grads = slice_shard(grads, axis, sharding)
        return Gradients(grads, model_state, metrics)

    return gradient_step


def _whole(
    task: Task, recipe: Recipe, axis: str | None, sharding: ParamSharding | None, params: Any
) -> tuple[Any, Apply]:
    """Params to differentiate by, and how the model is applied to them.

    Cut params are put together for the forward pass and, so that they need not be held in between,
    once more for the backward pass, whose gradients come out cut and summed over the shards. That
    is done once and for both where one buffer is cheaper, and where the model has a
    `jax.checkpoint` of its own: jax asks the outermost policy alone what is kept, and it would keep
    all that the model means to compute anew.
    """
    if sharding is None or not sharding.shards_params:
        return params, task.apply
    if recipe.flat:
        with jax.named_scope(GATHER_SCOPE):
            return all_gather(params, axis, sharding, flat=True), task.apply

    def gathered(params: Any, model_state: Any, batch: Batch, rng: Any) -> tuple[Any, Any]:
        with jax.named_scope(GATHER_SCOPE):
            params = all_gather(params, axis, sharding, flat=False)
        return task.apply(params, model_state, batch, train=True, rng=rng)

    again = jax.checkpoint(gathered, policy=lambda prim, *_, **__: prim.name not in _NOT_KEPT)

    def apply(
        params: Any, model_state: Any, batch: Batch, *, train: bool, rng: Any
    ) -> tuple[Any, Any]:
        args = params, model_state, batch, rng
        return (gathered if rematerialises(gathered, *args) else again)(*args)

    return params, apply


def _gradients(
    task: Task,
    recipe: Recipe,
    axis: str | None,
    apply: Apply,
    state: TrainState,
    batch: Batch,
    rng: jax.Array,
) -> tuple[Any, Any, dict[str, Any]]:
    """A shard's gradients, its new model state, and the sums and counts of loss and metrics."""
    others, share = None, jnp.ones(())
    if recipe.mixup:
        batch, others, share = mix(batch, recipe.mixup, jax.random.fold_in(rng, 1))
    weight = _weight(batch, axis)

    def part(model_state: Any, rng: jax.Array, batch: Batch, others: Batch | None) -> Any:
        def objective(trained: Any) -> tuple[jax.Array, Any]:
            params = fill_in(state.params, trained)
            outputs, updated = apply(params, model_state, batch, train=True, rng=rng)
            losses = per_example(task.loss, outputs, batch, "config.loss")
            if others is not None:
                second = per_example(task.loss, outputs, others, "config.loss")
                losses = share * losses + (1 - share) * second
            total = weight(losses, _mask_of(batch))
            if state.loss_scale is not None:
                total = total * state.loss_scale.scale
            return total, (outputs, updated, losses)

        grads, (outputs, updated, losses) = jax.grad(objective, has_aux=True)(
            task.trainable(state.params)
        )
        sums = {"loss": sums_of(losses, batch)} | metric_sums(task, outputs, batch)
        return grads, updated, sums

    if recipe.accum_steps == 1:
        return part(state.model_state, rng, batch, others)
    return _accumulated(recipe, part, state, batch, others, rng)


def _accumulated(
    recipe: Recipe,
    part: Callable[..., Any],
    state: TrainState,
    batch: Batch,
    others: Batch | None,
    rng: jax.Array,
) -> tuple[Any, Any, dict[str, Any]]:
    """The same from a shard's parts, one after another; model state goes from each to the next.

    A part holds every `accum_steps`-th example, so that neighbours (of one document, say) are in
    different ones.
    """
    count = recipe.accum_steps

    def cut(leaf: jax.Array) -> jax.Array:
        return jnp.swapaxes(leaf.reshape(leaf.shape[0] // count, count, *leaf.shape[1:]), 0, 1)

    parts = jax.tree.map(cut, (dict(batch), others))

    def add(carry: Any, numbered: Any) -> tuple[Any, None]:
        so_far, model_state = carry
        number, (batch, others) = numbered
        grads, model_state, sums = part(model_state, jax.random.fold_in(rng, number), batch, others)
        return (jax.tree.map(jnp.add, so_far, (grads, sums)), model_state), None

    first = jax.tree.map(lambda leaf: leaf[0], parts)
    shapes = jax.eval_shape(part, state.model_state, rng, *first)
    _same_shapes(state.model_state, shapes[1])
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (shapes[0], shapes[2]))
    ((grads, sums), model_state), _ = lax.scan(
        add,
        (zeros, state.model_state),
        (jnp.arange(count), parts),
        unroll=True if recipe.unroll else 1,
    )
    return grads, model_state, sums


def _weight(batch: Batch, axis: str | None) -> Callable[[jax.Array, jax.Array | None], jax.Array]:
    """How the losses of a shard, or of parts of it, add up to its share of the whole loss.

    The mean of the shards' losses is the mean over all real examples.
    """
    mask = _mask_of(batch)
    examples = batch["x"].shape[0]
    if mask is None:

        def mean(losses: jax.Array, mask: jax.Array | None) -> jax.Array:
            if losses.shape[0] == examples:
                return jnp.mean(losses)
            return jnp.sum(losses) / examples

        return mean
    count = jnp.sum(mask)
    if axis is not None:
        count = lax.pmean(count, axis)

    def masked(losses: jax.Array, mask: jax.Array | None) -> jax.Array:
        assert mask is not None
        return jnp.sum(jnp.where(mask > 0, losses * mask, 0.0)) / jnp.maximum(count, 1e-9)

    return masked


def _mask_of(batch: Batch) -> jax.Array | None:
    mask = batch.get("mask")
    if mask is None:
        return None
    examples = batch["x"].shape[0]
    if mask.shape != (examples,):
        raise UserError(f"the data's mask has shape {mask.shape} for {examples} examples a shard")
    return mask.astype(jnp.float32)  # a count of another type would not be summed over the shards


def sums_of(values: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The sum and the count of values, (examples,), of a shard; masked ones are left out."""
    mask = _mask_of(batch)
    if mask is None:
        return jnp.sum(values), jnp.asarray(values.size, jnp.float32)
    return jnp.sum(jnp.where(mask > 0, values * mask, 0.0)), jnp.sum(mask)


def metric_sums(task: Task, outputs: Any, batch: Batch) -> dict[str, Any]:
    """A shard's numerator and count of each metric of a task."""
    return {
        name: sums_of(per_example(metric, outputs, batch, f"config.metrics.{name}"), batch)
        for name, metric in task.metrics.items()
    }


def per_example(function: PerExample, outputs: Any, batch: Batch, where: str) -> jax.Array:
    """Calls a loss or metric, which is to return one value an example.

    Raises:
        UserError: it returns something else; `where` says what it is.
    """
    values = function(outputs, batch)
    examples = batch["x"].shape[0]
    if jnp.shape(values) != (examples,):
        raise UserError(
            f"{where} returned shape {jnp.shape(values)} for {examples} examples a shard",
            f"return one value per example, shape ({examples},): take the mean over other axes",
        )
    return values.astype(jnp.float32) if values.dtype != jnp.float64 else values


def _same_shapes(before: Any, after: Any) -> None:
    """State that changes its shape would recompile the step and break its checkpoints."""
    old, new = name_leaves(before), name_leaves(after)
    for name in [*old, *(name for name in new if name not in old)]:
        shapes = [jnp.shape(leaves[name]) if name in leaves else None for leaves in (old, new)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"the model's state {name} has shape {shapes[0]} after init and {shapes[1]} after "
                "a step",
                "state must keep its shape; keepdims=True in a mean and sown values change it",
            )
