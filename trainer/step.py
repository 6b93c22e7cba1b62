"""The one update step, written for one shard of the batch in terms of one named axis.

Everything here is per shard. What the axis is (a `vmap`, a `pmap`, a mesh axis of a pod) is
decided in `trainer/lift.py` and nowhere else.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax

from trainer.errors import UserError
from trainer.mixup import mix
from trainer.precision import LossScale, to_dtype, to_float32
from trainer.reduce import global_norm, mean_over_axis
from trainer.state import TrainState, name_leaves

Batch = Mapping[str, jax.Array]
PerExample = Callable[[Any, Batch], jax.Array]
Metrics = dict[str, jax.Array]

AXIS = "batch"

# What profiles and plans call the step's own collectives.
MEAN_SCOPE = "mean_over_axis"


@dataclass(frozen=True)
class Task:
    """What is trained: a model, its loss and metrics, and the optimizer.

    Attributes:
        model: a Flax Linen module, called with `batch["x"]` and, where it takes it, `train`.
        loss: `(outputs, batch) -> (examples,)`, the loss of each example.
        optimizer: an optax transformation.
        learning_rate: a number or a schedule, for reporting only.
        metrics: more functions of the form of `loss`, by name.
        dtype: what the model computes in, bfloat16 or float16; its own choice where None.
    """

    model: nn.Module
    loss: PerExample
    optimizer: optax.GradientTransformation
    learning_rate: float | Callable[[jax.Array], Any] = float("nan")
    metrics: Mapping[str, PerExample] = field(default_factory=dict)
    dtype: Any = None

    def apply(self, params: Any, model_state: Any, batch: Batch, *, train: bool, rng: Any) -> Any:
        """Runs the model; returns (outputs, new model state), both without 16-bit casts in them."""
        outputs, updated = self.model.apply(
            {"params": to_dtype(params, self.dtype), **model_state},
            to_dtype(batch["x"], self.dtype),
            **self._train_keyword(train),
            mutable=list(model_state),
            rngs={"dropout": rng},
        )
        return to_float32(outputs, self.dtype), to_float32(updated, self.dtype)

    def init(self, rng: Any, x: jax.Array) -> Any:
        """Initialises the model's variables on a batch `x` of any values."""
        return self.model.init({"params": rng, "dropout": rng}, x, **self._train_keyword(False))

    def _train_keyword(self, train: bool) -> dict[str, Any]:
        parameters = inspect.signature(type(self.model).__call__).parameters
        return {"train": train} if "train" in parameters else {}


@dataclass(frozen=True)
class Recipe:
    """How a step is taken, beside its task. The defaults are those of a plain step.

    Attributes:
        flat: see `trainer.reduce.mean_over_axis`.
        skip_nonfinite: leave everything but the step's number as it is where the loss or the
            gradient is not finite. All shards decide alike: both are means over the axis.
        accum_steps: parts that a shard's examples are cut into, one after another, so that only one
            part's activations are in memory.
        unroll: write the parts out one by one. XLA:CPU runs convolutions inside loops 15-20x
            slower.
        clip_norm: the largest 2-norm of the gradient; it is scaled down to it. None: any.
        ema_decay: of the average of the params, a step; None: there is none.
        mixup: alpha of `trainer.mixup.mix`; 0: examples are not blended.
        scale_loss: by a factor that follows the gradients, for float16.
    """

    flat: bool = False
    skip_nonfinite: bool = False
    accum_steps: int = 1
    unroll: bool = False
    clip_norm: float | None = None
    ema_decay: float | None = None
    mixup: float = 0.0
    scale_loss: bool = False


PLAIN = Recipe()


def init_state(task: Task, seed: int, example: jax.Array, recipe: Recipe = PLAIN) -> TrainState:
    """Initialises variables and splits them into params and state. Jit it: eager init is slow.

    Args:
        task: the task.
        seed: of the parameters and of every later random number in a step.
        example: one example of `batch["x"]`, without a batch axis; its values do not matter.
        recipe: of the steps, which may keep state of their own.
    """
    params_key, run_key = jax.random.split(jax.random.key(seed))

    # Inside an axis of size one, so that a model may use the axis while it initialises.
    init = jax.vmap(functools.partial(task.init, params_key), axis_name=AXIS)
    variables = init(example[None, None])
    variables = jax.tree.map(lambda leaf: leaf[0], variables)
    model_state, params = flax.core.pop(variables, "params")
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        model_state=model_state,
        opt_state=task.optimizer.init(params),
        rng=jax.random.key_data(run_key),
        # Of its own, or donation would give one buffer away twice.
        ema=None if recipe.ema_decay is None else jax.tree.map(jnp.copy, params),
        loss_scale=LossScale.first() if recipe.scale_loss else None,
    )


def make_update_step(
    task: Task, recipe: Recipe = PLAIN, *, axis: str | None = AXIS
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Builds `update_step(state, batch) -> (state, metrics)` for one shard of the batch.

    Args:
        task: what to train.
        recipe: how.
        axis: the name of the axis over the shards; None where there is only one and no axis.
    """
    flat = recipe.flat

    def update_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        grads, model_state, sums = mean_gradients(task, recipe, axis, state, batch)
        metrics = {name: numerator / count for name, (numerator, count) in sums.items()}
        metrics["grad_norm"] = norm = global_norm(grads, flat=flat)
        if recipe.clip_norm is not None:
            factor = jnp.minimum(1.0, recipe.clip_norm / (norm + 1e-12))
            grads = jax.tree.map(lambda leaf: leaf * factor.astype(leaf.dtype), grads)
        updates, opt_state = task.optimizer.update(grads, state.opt_state, state.params)
        rate = task.learning_rate
        metrics["learning_rate"] = jnp.asarray(
            rate(state.step) if callable(rate) else rate, jnp.float32
        )
        params = optax.apply_updates(state.params, updates)
        updated = dataclasses.replace(
            state, params=params, model_state=model_state, opt_state=opt_state
        )
        if state.ema is not None:
            ema = optax.incremental_update(params, state.ema, 1 - (recipe.ema_decay or 0.0))
            updated = dataclasses.replace(updated, ema=ema)
        good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        if recipe.skip_nonfinite or state.loss_scale is not None:
            updated = jax.tree.map(functools.partial(jnp.where, good), updated, state)
        if state.loss_scale is not None:
            # An overflow is the scale's doing, and no news, until it cannot be lower.
            expected = ~good & jnp.isfinite(metrics["loss"]) & ~state.loss_scale.is_lowest
            metrics["grad_norm"] = jnp.where(expected, 0.0, norm)
            metrics["loss_scale"] = state.loss_scale.scale
            updated = dataclasses.replace(updated, loss_scale=state.loss_scale.after(good))
        return dataclasses.replace(updated, step=state.step + 1), metrics

    return update_step


def mean_gradients(
    task: Task, recipe: Recipe, axis: str | None, state: TrainState, batch: Batch
) -> tuple[Any, Any, dict[str, Any]]:
    """What the next step computes before it clips and updates, the same in all shards.

    Returns:
        The gradient of the loss, the new model state, and (numerator, count) of loss and metrics.
    """
    rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    if axis is not None:
        rng = jax.random.fold_in(rng, lax.axis_index(axis))
    grads, model_state, sums = _gradients(task, recipe, axis, state, batch, rng)
    _same_shapes(state.model_state, model_state)
    # The mean of float model state is free where the layers already synchronise it (XLA sees
    # equal values) and is what makes a plain running mean right where they do not.
    with jax.named_scope(MEAN_SCOPE):
        means = mean_over_axis((grads, model_state, sums), axis, flat=recipe.flat)
    grads, model_state, sums = means
    if state.loss_scale is not None:
        grads = jax.tree.map(lambda leaf: leaf / state.loss_scale.scale, grads)
    return grads, model_state, sums


def _gradients(
    task: Task, recipe: Recipe, axis: str | None, state: TrainState, batch: Batch, rng: jax.Array
) -> tuple[Any, Any, dict[str, Any]]:
    """A shard's gradients, its new model state, and the sums and counts of loss and metrics."""
    others, share = None, jnp.ones(())
    if recipe.mixup:
        batch, others, share = mix(batch, recipe.mixup, jax.random.fold_in(rng, 1))
    weight = _weight(batch, axis)

    def part(model_state: Any, rng: jax.Array, batch: Batch, others: Batch | None) -> Any:
        def objective(params: Any) -> tuple[jax.Array, Any]:
            outputs, updated = task.apply(params, model_state, batch, train=True, rng=rng)
            losses = _per_example(task.loss, outputs, batch, "config.loss")
            if others is not None:
                second = _per_example(task.loss, outputs, others, "config.loss")
                losses = share * losses + (1 - share) * second
            total = weight(losses, _mask_of(batch))
            if state.loss_scale is not None:
                total = total * state.loss_scale.scale
            return total, (outputs, updated, losses)

        grads, (outputs, updated, losses) = jax.grad(objective, has_aux=True)(state.params)
        sums = {"loss": _sums(losses, batch)} | _metric_sums(task, outputs, batch)
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


def stack_metrics(
    update_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
) -> Callable[[TrainState, Batch], tuple[TrainState, jax.Array]]:
    """Returns the metrics as one array, in the order of their sorted names.

    Every output costs a dispatch per device (~2 us on CPU), and the loop reads metrics together.
    """

    def stacked(state: TrainState, batch: Batch) -> tuple[TrainState, jax.Array]:
        state, metrics = update_step(state, batch)
        return state, jnp.stack([metrics[name] for name in sorted(metrics)])

    return stacked


def make_eval_step(
    task: Task, *, axis: str | None = AXIS
) -> Callable[[TrainState, Batch], dict[str, tuple[jax.Array, jax.Array]]]:
    """Builds `eval_step(state, batch) -> {name: (numerator, count)}`, summed over the axis.

    The model runs with `train=False`; what it would write to its state is thrown away. Examples
    whose `mask` is 0 count for nothing, so the sums of a padded last batch are exact.
    """

    def eval_step(state: TrainState, batch: Batch) -> dict[str, tuple[jax.Array, jax.Array]]:
        rng = jax.random.wrap_key_data(state.rng)
        outputs, _ = task.apply(state.evaluated, state.model_state, batch, train=False, rng=rng)
        losses = _per_example(task.loss, outputs, batch, "config.loss")
        sums = {"loss": _sums(losses, batch)} | _metric_sums(task, outputs, batch)
        return sums if axis is None else lax.psum(sums, axis)

    return eval_step


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


def _sums(values: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    mask = _mask_of(batch)
    if mask is None:
        return jnp.sum(values), jnp.asarray(values.size, jnp.float32)
    return jnp.sum(jnp.where(mask > 0, values * mask, 0.0)), jnp.sum(mask)


def _metric_sums(task: Task, outputs: Any, batch: Batch) -> dict[str, Any]:
    return {
        name: _sums(_per_example(metric, outputs, batch, f"config.metrics.{name}"), batch)
        for name, metric in task.metrics.items()
    }


def _per_example(function: PerExample, outputs: Any, batch: Batch, where: str) -> jax.Array:
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
