"""Properties of a function, found by tracing it on shapes; nothing is compiled or run."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax

from trainer.step.task import AXIS


def has_convolution(function: Callable[[Any, Any], Any], state: Any, batch: Any) -> bool:
    """Whether a per-shard function contains a convolution.

    Args:
        function: `(state, batch) -> any`, written for one shard.
        state: a state, or its shapes.
        batch: the shapes of one shard of a batch, with a leading axis of size 1.
    """
    mapped = jax.vmap(function, axis_name=AXIS, in_axes=(None, 0), out_axes=None)
    return "conv_general_dilated" in str(jax.make_jaxpr(mapped)(state, batch))


def rematerialises(function: Callable[..., Any], *args: Any) -> bool:
    """Whether a function contains a `jax.checkpoint` (`nn.remat`).

    Args:
        function: takes arrays; may use the axes that are bound at the call.
        args: arrays, tracers or shapes.
    """
    return re.search(r"\b(remat2?|checkpoint)\[", str(jax.make_jaxpr(function)(*args))) is not None
