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
    """

    model: nn.Module
    loss: PerExample
    optimizer: optax.GradientTransformation
    learning_rate: float | Callable[[jax.Array], Any] = float("nan")
    metrics: Mapping[str, PerExample] = field(default_factory=dict)

    def apply(self, params: Any, model_state: Any, batch: Batch, *, train: bool, rng: Any) -> Any:
        """Runs the model; returns (outputs, new model state)."""
        return self.model.apply(
            {"params": params, **model_state},
            batch["x"],
            **self._train_keyword(train),
            mutable=list(model_state),
            rngs={"dropout": rng},
        )

    def init(self, rng: Any, x: jax.Array) -> Any:
        """Initialises the model's variables on a batch `x` of any values."""
        return self.model.init({"params": rng, "dropout": rng}, x, **self._train_keyword(False))

    def _train_keyword(self, train: bool) -> dict[str, Any]:
        parameters = inspect.signature(type(self.model).__call__).parameters
        return {"train": train} if "train" in parameters else {}


def init_state(task: Task, seed: int, example: jax.Array) -> TrainState:
    """Initialises variables and splits them into params and state. Jit it: eager init is slow.

    Args:
        task: the task.
        seed: of the parameters and of every later random number in a step.
        example: one example of `batch["x"]`, without a batch axis; its values do not matter.
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
    )


def make_update_step(
    task: Task, *, axis: str | None = AXIS, flat: bool = False, skip_nonfinite: bool = False
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Builds `update_step(state, batch) -> (state, metrics)` for one shard of the batch.

    Args:
        task: what to train.
        axis: the name of the axis over the shards; None where there is only one and no axis.
        flat: see `trainer.reduce.mean_over_axis`.
        skip_nonfinite: leave everything but the step's number as it is where the loss or the
            gradient is not finite. All shards decide alike: both are means over the axis.
    """

    def update_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        if axis is not None:
            rng = jax.random.fold_in(rng, lax.axis_index(axis))

        def objective(params: Any) -> tuple[jax.Array, Any]:
            outputs, model_state = task.apply(params, state.model_state, batch, train=True, rng=rng)
            losses = _per_example(task.loss, outputs, batch, "config.loss")
            return _mean_loss(losses, _mask_of(batch), axis), (outputs, model_state, losses)

        grads, (outputs, model_state, losses) = jax.grad(objective, has_aux=True)(state.params)
        _same_shapes(state.model_state, model_state)
        sums = {"loss": _sums(losses, batch)} | _metric_sums(task, outputs, batch)
        # The mean of float model state is free where the layers already synchronise it (XLA sees
        # equal values) and is what makes a plain running mean right where they do not.
        with jax.named_scope(MEAN_SCOPE):
            grads, model_state, sums = mean_over_axis((grads, model_state, sums), axis, flat=flat)
        updates, opt_state = task.optimizer.update(grads, state.opt_state, state.params)
        rate = task.learning_rate
        metrics = {name: numerator / count for name, (numerator, count) in sums.items()}
        metrics["grad_norm"] = global_norm(grads, flat=flat)
        metrics["learning_rate"] = jnp.asarray(
            rate(state.step) if callable(rate) else rate, jnp.float32
        )
        updated = dataclasses.replace(
            state,
            params=optax.apply_updates(state.params, updates),
            model_state=model_state,
            opt_state=opt_state,
        )
        if skip_nonfinite:
            good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
            updated = jax.tree.map(functools.partial(jnp.where, good), updated, state)
        return dataclasses.replace(updated, step=state.step + 1), metrics

    return update_step


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
        outputs, _ = task.apply(state.params, state.model_state, batch, train=False, rng=rng)
        losses = _per_example(task.loss, outputs, batch, "config.loss")
        sums = {"loss": _sums(losses, batch)} | _metric_sums(task, outputs, batch)
        return sums if axis is None else lax.psum(sums, axis)

    return eval_step


def _mean_loss(losses: jax.Array, mask: jax.Array | None, axis: str | None) -> jax.Array:
    """The shard's loss, scaled so that its mean over the shards is the mean over real examples."""
    if mask is None:
        return jnp.mean(losses)
    count = jnp.sum(mask)
    if axis is not None:
        count = lax.pmean(count, axis)
    return jnp.sum(jnp.where(mask > 0, losses * mask, 0.0)) / jnp.maximum(count, 1e-9)


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
