"""What is trained, and how a step is taken: the terms that everything per shard is written in."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import optax

from trainer.step.freezing import without_frozen
from trainer.step.precision import to_dtype, to_float32

Batch = Mapping[str, jax.Array]
PerExample = Callable[[Any, Batch], jax.Array]
Metrics = dict[str, jax.Array]

AXIS = "batch"


@dataclass(frozen=True)
class Task:
    """What is trained: a model, its loss and metrics, and the optimizer.

    Attributes:
        model: a Flax Linen module (`trainer.models.from_nnx` makes one of an NNX module), called
            with `batch["x"]` and, where it takes it, `train`.
        loss: `(outputs, batch) -> (examples,)`, the loss of each example.
        optimizer: an optax transformation.
        learning_rate: a number or a schedule, for reporting only.
        metrics: more functions of the form of `loss`, by name.
        dtype: what the model computes in, bfloat16 or float16; its own choice where None.
        frozen: parts of the params that are not trained, by path; the optimizer is one that
            `trainer.step.freezing.freeze` has made for them.
    """

    model: nn.Module
    loss: PerExample
    optimizer: optax.GradientTransformation
    learning_rate: float | Callable[[jax.Array], Any] = float("nan")
    metrics: Mapping[str, PerExample] = field(default_factory=dict)
    dtype: Any = None
    frozen: tuple[str, ...] = ()

    def trainable(self, params: Any) -> Any:
        """Params, or what is shaped like them, without the frozen leaves."""
        return without_frozen(params, self.frozen)

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
        flat: see `trainer.step.collectives.mean_over_axis`.
        skip_nonfinite: leave everything but the step's number as it is where the loss or the
            gradient is not finite. All shards decide alike: both are means over the axis.
        accum_steps: parts that a shard's examples are cut into, one after another, so that only one
            part's activations are in memory.
        unroll: write the parts out one by one. XLA:CPU runs convolutions inside loops 15-20x
            slower.
        clip_norm: the largest 2-norm of the gradient; it is scaled down to it. None: any.
        ema_decay: of the average of the params, a step; None: there is none.
        mixup: alpha of `trainer.step.mixup.mix`; 0: examples are not blended.
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
