"""The learning rate that an optimizer used in an update, for reporting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

_SCHEDULED = "ScaleByScheduleState"  # of optax.scale_by_schedule, below every scheduled optimizer


def used_rate(
    rate: float | Callable[[jax.Array], Any], before: Any, after: Any, step: jax.Array
) -> jax.Array:
    """The rate of one update, float32, shape ().

    An optimizer counts its updates, from which a skipped step is left out; so its own count is the
    argument of its schedule, and not the number of steps.

    Args:
        rate: a number or a schedule.
        before: the optimizer's state before the update.
        after: its state after it. `optax.inject_hyperparams` keeps the rate that it used there.
        step: the number of steps before, for an optimizer that keeps no count.
    """
    for _, injected in optax.tree_utils.tree_get_all_with_path(after, "hyperparams"):
        if "learning_rate" in injected:
            return jnp.asarray(injected["learning_rate"], jnp.float32)
    if not callable(rate):
        return jnp.asarray(rate, jnp.float32)
    counts = {
        getattr(path[-1], "tuple_name", ""): count
        for path, count in reversed(optax.tree_utils.tree_get_all_with_path(before, "count"))
    }
    *_, outermost = [step, *counts.values()]
    return jnp.asarray(rate(counts.get(_SCHEDULED, outermost)), jnp.float32)
