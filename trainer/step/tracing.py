"""What a per-shard function does, from tracing it on shapes: nothing is compiled or run."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax

from trainer.step.task import AXIS


def has_convolution(function: Callable[[Any, Any], Any], state: Any, batch: Any) -> bool:
    """Whether a per-shard function contains a convolution, from tracing it on abstract values.

    Args:
        function: written for one shard, as for `Lift.__call__`.
        state: a state, or its shapes.
        batch: shapes of one shard of a batch, with a leading axis of size 1.
    """
    mapped = jax.vmap(function, axis_name=AXIS, in_axes=(None, 0), out_axes=None)
    return "conv_general_dilated" in str(jax.make_jaxpr(mapped)(state, batch))


def rematerialises(function: Callable[..., Any], *args: Any) -> bool:
    """Whether a function contains a `jax.checkpoint` (`nn.remat`), from tracing it.

    Args:
        function: of arrays; may use axes that are bound where this is called.
        args: arrays, tracers or shapes.
    """
    return re.search(r"\b(remat2?|checkpoint)\[", str(jax.make_jaxpr(function)(*args))) is not None
