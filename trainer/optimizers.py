"""Optimizers with weight decay of kernels only, composed from optax."""

from __future__ import annotations

from typing import Any

import jax
import optax


def sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float = 0.9,
    nesterov: bool = True,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """Gradient descent with momentum and an L2 penalty, `weight_decay / 2 * sum(w**2)`.

    The gradient of the penalty passes through the momentum like that of the loss (as in Flax's
    ImageNet example, and unlike `optax.adamw`), but is not part of `train/loss` or
    `train/grad_norm`.

    Args:
        learning_rate: a number or a schedule.
        momentum: the fraction of the last update that carries over to the next.
        nesterov: use Nesterov momentum (Sutskever et al., ICML 2013).
        weight_decay: applied to kernels only; see `is_kernel`.
    """
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask=is_kernel),
        optax.sgd(learning_rate, momentum, nesterov),
    )


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
) -> optax.GradientTransformation:
    """Adam with decoupled weight decay (arXiv:1711.05101) of kernels only; see `is_kernel`.

    `optax:adamw` decays every parameter.
    """
    return optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=is_kernel)


def is_kernel(params: Any) -> Any:
    """True for each leaf with more than one axis, so neither for biases nor for scales."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)
