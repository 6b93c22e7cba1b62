"""Learning rate schedules over the entire run; the trainer passes `num_steps`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import jax
import jax.numpy as jnp
import optax


def warmup_cosine(
    peak_value: float, num_steps: int, warmup_fraction: float = 0.1, end_value: float = 0.0
) -> optax.Schedule:
    """Linear warm-up from 0 to `peak_value`, then cosine decay to `end_value` at `num_steps`."""
    warmup_steps = max(1, round(warmup_fraction * num_steps))
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=peak_value,
        warmup_steps=warmup_steps,
        decay_steps=max(num_steps, warmup_steps + 1),
        end_value=end_value,
    )


def onecycle(peak_value: float, num_steps: int) -> optax.Schedule:
    """The cosine one-cycle policy of Smith and Topin (arXiv:1708.07120) over the run."""
    return optax.cosine_onecycle_schedule(max(num_steps, 4), peak_value)


def step_decay(
    peak_value: float,
    num_steps: int,
    fractions: Sequence[float] = (0.5, 0.75),
    factor: float = 0.1,
    warmup_fraction: float = 0.0,
) -> optax.Schedule:
    """`peak_value`, multiplied by `factor` at each of several points, after a linear warm-up.

    Args:
        peak_value: the rate after the warm-up.
        num_steps: the length of the run.
        fractions: the points as fractions of the run, ascending, in (0, 1).
        factor: the factor at each point.
        warmup_fraction: the length of the warm-up from 0 to `peak_value`, as a fraction of the run.
    """
    decay = optax.piecewise_constant_schedule(
        peak_value, {round(fraction * num_steps): factor for fraction in fractions}
    )
    warmup_steps = round(warmup_fraction * num_steps)
    if not warmup_steps:
        return decay

    def schedule(step: jax.Array) -> jax.Array:
        return cast(jax.Array, decay(step) * jnp.minimum(1.0, step / warmup_steps))

    return schedule
