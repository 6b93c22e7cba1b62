"""Optimizers with weight decay of kernels and embeddings only, composed from optax."""

from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np
import optax

# A word in the name of a parameter that shifts or scales.
_SHIFTS_OR_SCALES = re.compile(
    r"(?:^|[^a-z])(?:bias|biases|scales?|gains?|gamma|beta|shift|offset|slope)(?:$|[^a-z])"
)


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
        weight_decay: applied to kernels and embeddings only; see `is_decayed`.
    """
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask=is_decayed),
        optax.sgd(learning_rate, momentum, nesterov),
    )


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
) -> optax.GradientTransformation:
    """Adam with decoupled weight decay (arXiv:1711.05101) of kernels and embeddings only.

    See `is_decayed`. `optax:adamw` decays every parameter.
    """
    return optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=is_decayed)


def is_decayed(params: Any) -> Any:
    """True for each leaf that weight decay applies to, by its name and that of its module.

    Shapes alone do not tell: the bias of an attention head and the scale of a LayerNorm under
    `nn.scan` have two axes. In this order:

    1. `kernel` and `embedding`, the names of Flax's layers in Linen and NNX, are decayed.
    2. A name that contains a word such as bias or scale (`layer_scale`), and any other leaf of a
       module whose name contains "norm" (`norm/weight`), is not.
    3. A parameter of another name, from `self.param("positions", ...)` or `nnx.Param`, is decayed
       if more than one of its axes is longer than 1. (A vector of such a name that `nn.scan` stacks
       counts as a matrix: name it by rule 2.)

    Args:
        params: arrays, or their shapes, in nested containers.

    Returns:
        Bools in the structure of `params`: a mask for optax.
    """
    return jax.tree_util.tree_map_with_path(_is_decayed, params)


def _is_decayed(path: Any, leaf: Any) -> bool:
    components = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    # The number of an item of a list names nothing.
    *modules, name = [part for part in components if not part.isdigit()] or [""]
    if name in ("kernel", "embedding"):
        return True
    if _SHIFTS_OR_SCALES.search(name.lower()):
        return False
    if modules and "norm" in modules[-1].lower():
        return False
    return int(np.sum(np.array(leaf.shape) > 1)) > 1
