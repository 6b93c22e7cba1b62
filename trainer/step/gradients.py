"""Gradients of one shard of the batch, and their mean over the axis.

Everything that happens per shard happens here. What `gradient_step` returns is the same on all
shards, or sharded over them (`trainer.state.partition`), so the optimizer needs no axis.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax

from trainer.state.leaves import fill_in, widen
from trainer.state.partition import ParamSharding
from trainer.state.train_state import TrainState
from trainer.step.accumulation import accumulate, check_shapes
from trainer.step.analysis import rematerialises
from trainer.step.collectives import (
    all_gather,
    global_norm,
    mean_over_axis,
    reduce_scatter_mean,
    sharded_norm,
    slice_shard,
)
from trainer.step.mixup import mix
from trainer.step.per_example import blend, metric_sums, per_example, sum_and_count
from trainer.step.task import AXIS, PLAIN, Batch, Metrics, Recipe, Task

# Profiles and plans show the step's own collectives under these names.
MEAN_SCOPE = "mean_over_axis"
GATHER_SCOPE = "gather_over_axis"

# What the backward pass recomputes: the all-gather, and what layers do with params before they
# multiply.
_RECOMPUTED = frozenset(
    ("all_gather", "convert_element_type", "reshape", "transpose", "squeeze", "broadcast_in_dim")
)

Apply = Callable[..., tuple[Any, Any]]


class Gradients(NamedTuple):
    """The result of a step before the optimizer.

    Attributes:
        grads: of the mean loss over the global batch, in the structure of the trainable params;
            float32 where the params have less bits.
        model_state: after the step.
        metrics: `loss`, `grad_norm` and the metrics of the task.
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
        recipe: how to take a step.
        axis: the name of the axis over the shards; None if there is one shard and no axis.
        sharding: how gradients, and params if any, are sharded; None: both are replicated.
    """
    flat = recipe.flat

    def gradient_step(state: TrainState, batch: Batch) -> Gradients:
        rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        if axis is not None:
            rng = jax.random.fold_in(rng, lax.axis_index(axis))
        params, apply = _gather_params(task, recipe, axis, sharding, state.params)
        grads, model_state, sums, weighted = _shard_gradients(
            task, recipe, axis, apply, dataclasses.replace(state, params=params), batch, rng
        )
        check_shapes(state.model_state, model_state)
        # The mean of float model state costs nothing where the layers synchronise it themselves
        # (XLA sees equal values), and makes a plain running mean right where they do not.
        with jax.named_scope(MEAN_SCOPE):
            if sharding is None or flat:
                grads, model_state, sums = mean_over_axis(
                    (grads, model_state, sums), axis, flat=flat
                )
            else:
                model_state, sums = mean_over_axis((model_state, sums), axis, flat=flat)
                grads = reduce_scatter_mean(grads, axis, sharding)
        if weighted:  # the gradient is that of a sum so far, divided by the number of examples
            count = sums["loss"][1]
            factor = jnp.where(count > 0, batch["x"].shape[0] / count, 0.0)
            grads = jax.tree.map(lambda leaf: leaf * factor.astype(leaf.dtype), grads)
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


def _shard_gradients(
    task: Task,
    recipe: Recipe,
    axis: str | None,
    apply: Apply,
    state: TrainState,
    batch: Batch,
    rng: jax.Array,
) -> tuple[Any, Any, dict[str, Any], bool]:
    """A shard's gradients, its new model state, the sums and counts of loss and metrics, a flag.

    The flag says that examples have weights; the gradients are then those of
    `sum(weights * losses) / examples`, because the sum of the weights of all shards is not known
    yet.
    """
    partners, ratio = None, jnp.ones(())
    if recipe.mixup:
        batch, partners, ratio = mix(batch, recipe.mixup, jax.random.fold_in(rng, 1))
    examples = batch["x"].shape[0]
    weighted = False  # known once the loss is traced

    def gradients(model_state: Any, rng: jax.Array, batch: Batch, partners: Batch | None) -> Any:
        def objective(trainable: Any) -> tuple[jax.Array, Any]:
            nonlocal weighted
            params = fill_in(state.params, trainable)
            outputs, updated = apply(params, model_state, batch, train=True, rng=rng)
            losses = per_example(task.loss, outputs, batch, "config.loss")
            if partners is not None:
                second = per_example(task.loss, outputs, partners, "config.loss")
                losses = blend(losses, second, ratio)
            weighted = losses.weights is not None
            total = sum_and_count(losses)[0] / examples
            if state.loss_scale is not None:
                total = total * state.loss_scale.scale
            return total, (outputs, updated, losses)

        grads, (outputs, updated, losses) = jax.grad(objective, has_aux=True)(
            task.trainable(state.params)
        )
        sums = {"loss": sum_and_count(losses)} | metric_sums(task, outputs, batch)
        return widen(grads), updated, sums

    if recipe.accum_steps == 1:
        found = gradients(state.model_state, rng, batch, partners)
    else:
        found = accumulate(
            gradients,
            state.model_state,
            rng,
            batch,
            partners,
            steps=recipe.accum_steps,
            unroll=recipe.unroll,
        )
    return *found, weighted


def _gather_params(
    task: Task, recipe: Recipe, axis: str | None, sharding: ParamSharding | None, params: Any
) -> tuple[Any, Apply]:
    """The params to differentiate with respect to, and the function that applies the model.

    Sharded params are all-gathered for the forward pass and once more for the backward pass, so
    that they are not kept in between; their gradients then arrive summed and scattered. There are
    two cases with a single all-gather. With a flat buffer it is cheaper. And if the model uses
    `jax.checkpoint` itself, jax consults only the outermost policy, which would keep everything
    that the model means to recompute.
    """
    if sharding is None or not sharding.shards_params:
        return params, task.apply
    if recipe.flat:
        with jax.named_scope(GATHER_SCOPE):
            return all_gather(params, axis, sharding, flat=True), task.apply

    def gathered(params: Any, model_state: Any, batch: Batch, rng: Any) -> tuple[Any, Any]:
        with jax.named_scope(GATHER_SCOPE):
            params = all_gather(params, axis, sharding, flat=False)
        applied = task.apply(params, model_state, batch, train=True, rng=rng)
        return cast(tuple[Any, Any], applied)

    recomputed: Apply = jax.checkpoint(
        gathered, policy=lambda prim, *_, **__: prim.name not in _RECOMPUTED
    )

    def apply(
        params: Any, model_state: Any, batch: Batch, *, train: bool, rng: Any
    ) -> tuple[Any, Any]:
        args = params, model_state, batch, rng
        chosen: Apply = gathered if rematerialises(gathered, *args) else recomputed
        return chosen(*args)

    return params, apply
