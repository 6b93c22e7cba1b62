"""Whether the devices keep NaN; see `trainer.xla_flags`."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from trainer.console import warn
from trainer.xla_flags import KEEP_NAN


@functools.cache
def warn_if_nan_is_lost(platform: str) -> None:
    """Warns, once, if jax's CPU backend drops NaN: it began before XLA_FLAGS could be set.

    Args:
        platform: of the devices; only "cpu" is asked.
    """
    if platform != "cpu":
        return
    total = jax.jit(lambda x: jnp.maximum(x, 0).sum())
    if np.isfinite(total(np.full((64, 64), np.nan, np.float32))):
        warn(
            "jax drops NaN on this CPU: a relu followed by a mean makes it 0, so a loss can be "
            f"finite where it should not be; set XLA_FLAGS={KEEP_NAN} before jax is first used"
        )
