"""The vocabulary of a step: `Task` (what to train), `Recipe` (how to take a step), the axis."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import optax

from trainer.metrics import Values
from trainer.state.freezing import without_frozen
from trainer.step.precision import to_dtype, to_float32

Batch = Mapping[str, jax.Array]
PerExample = Callable[[Any, Batch], Values]
Metrics = dict[str, jax.Array]

AXIS = "batch"


@dataclass(frozen=True)
class Task:
    """What to train: a model, its loss and metrics, and the optimizer.

    Attributes:
        model: a Flax Linen module (`trainer.models.from_nnx` turns an NNX module into one), called
            with `batch["x"]` and, if it has such a parameter, `train`.
        loss: `(outputs, batch) -> (examples,)`, the loss of each example, or a pair of these
            losses and their weights in the mean.
        optimizer: an optax transformation.
        learning_rate: a number or a schedule, for reporting only.
        metrics: functions with the signature of `loss`, by name.
        dtype: the model computes in bfloat16 or float16; None: the model decides.
        frozen: paths of the subtrees of the params that are not trained; the optimizer must come
            from `trainer.state.freezing.freeze` with the same paths.
        traced: filled by tracing: each shape of the model's outputs for one example, if they are
            one array. Training and evaluation may differ, as in the length of texts.
    """

    model: nn.Module
    loss: PerExample
    optimizer: optax.GradientTransformation
    learning_rate: float | Callable[[jax.Array], Any] = float("nan")
    metrics: Mapping[str, PerExample] = field(default_factory=dict)
    dtype: Any = None
    frozen: tuple[str, ...] = ()
    traced: set[tuple[int, ...]] = field(default_factory=set, compare=False, repr=False)

    def trainable(self, params: Any) -> Any:
        """Params, or a tree of the same structure, without the frozen leaves."""
        return without_frozen(params, self.frozen)

    def apply(self, params: Any, model_state: Any, batch: Batch, *, train: bool, rng: Any) -> Any:
        """Applies the model; returns (outputs, new model state), cast back to float32."""
        outputs, updated = self.model.apply(
            {"params": to_dtype(params, self.dtype), **model_state},
            to_dtype(batch["x"], self.dtype),
            **self._train_keyword(train),
            mutable=list(model_state),
            rngs={"dropout": rng},
        )
        if hasattr(outputs, "shape"):
            self.traced.add(tuple(outputs.shape[1:]))
        return to_float32(outputs, self.dtype), to_float32(updated, self.dtype)

    def init(self, rng: Any, x: jax.Array) -> Any:
        """Initialises the model's variables on a batch `x`, of which the values do not matter."""
        return self.model.init({"params": rng, "dropout": rng}, x, **self._train_keyword(False))

    def _train_keyword(self, train: bool) -> dict[str, Any]:
        parameters = inspect.signature(type(self.model).__call__).parameters
        return {"train": train} if "train" in parameters else {}


@dataclass(frozen=True)
class Recipe:
    """How to take a step. The defaults are those of a plain step.

    Attributes:
        flat: see `trainer.step.collectives.mean_over_axis`.
        skip_nonfinite: if the loss or the gradient is not finite, change nothing but the step
            number. All shards decide alike, because both are means over the axis.
        accum_steps: the number of microbatches into which a shard's examples are split. Only one
            microbatch's activations are in memory at a time.
        unroll: unroll the loop over microbatches. XLA:CPU runs convolutions inside loops 15-20x
            slower.
        clip_norm: the largest 2-norm of the gradient, which is scaled down to it; None: no limit.
        ema_decay: the decay per step of an average of the params; None: keep no average.
        mixup: alpha of `trainer.step.mixup.mix`; 0: no mixup.
        scale_loss: multiply the loss by a dynamic scale, for float16.
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
