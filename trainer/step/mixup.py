"""Mixup (Zhang et al., arXiv:1710.09412): examples are trained on in pairs, blended."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from trainer.errors import UserError

Batch = Mapping[str, jax.Array]


def mix(batch: Batch, alpha: float, rng: jax.Array) -> tuple[Batch, Batch, jax.Array]:
    """Blends the `x` of each example of a shard with that of the next, all by one share.

    Labels are not blended, so any loss will do: that of a pair is the blend of the losses with
    either label, which for cross entropy is the loss of blended labels.

    Args:
        batch: of one shard; `x` is of floats or of bytes.
        alpha: the share is Beta(alpha, alpha).
        rng: a key.

    Returns:
        The batch with `x` blended, the same with the labels of the others, and the share of the
        first.

    Raises:
        UserError: `x` is of integers, or some examples are masked.
    """
    x = batch["x"]
    is_bytes = x.dtype == jnp.uint8
    if not is_bytes and not jnp.issubdtype(x.dtype, jnp.floating):
        raise UserError(f"config.mixup blends floats or bytes, and the data's x is {x.dtype}")
    if "mask" in batch:
        raise UserError("config.mixup would blend examples with masked ones", "train without masks")
    share = jax.random.beta(rng, alpha, alpha)
    others = {name: jnp.roll(leaf, 1, axis=0) for name, leaf in batch.items()}
    blend = share * x.astype(jnp.float32) + (1 - share) * others["x"].astype(jnp.float32)
    blend = (jnp.round(blend) if is_bytes else blend).astype(x.dtype)
    return {**batch, "x": blend}, {**others, "x": blend}, share
