"""Which leaves of a state must be finite: a model that holds another value computes nothing.

No leaf of the params, of their average and of the model's state may hold a NaN. Infinities are
refused in the params, their average and `batch_stats`, of which Flax's layers make them 0 without
a trace; other model state may hold them, as masks and running extremes do. The optimizer's state is
its own affair: some optimizers begin at infinity.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np


def find_unusable(leaves: Mapping[str, np.ndarray]) -> dict[str, int]:
    """How many elements of each leaf in host memory are not what they must be, where any is not.

    Args:
        leaves: of a state, by name.
    """
    found = {}
    for name, leaf in leaves.items():
        if must_be_usable(name) and _is_inexact(leaf):
            bad = np.isnan(leaf) if allows_infinity(name) else ~np.isfinite(leaf)
            if count := int(np.count_nonzero(bad)):
                found[name] = count
    return found


def must_be_usable(name: str) -> bool:
    """Whether a run cannot resume, nor a model be used, with a NaN in this leaf."""
    return name.startswith(("params/", "ema/", "model_state/"))


def allows_infinity(name: str) -> bool:
    """Whether this leaf of the model's state may hold infinities."""
    return name.startswith("model_state/") and not name.startswith("model_state/batch_stats/")


def _is_inexact(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jnp.inexact))
