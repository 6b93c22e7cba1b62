"""Mixup (Zhang et al., arXiv:1710.09412): training on convex combinations of examples."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from trainer.errors import UserError

Batch = Mapping[str, jax.Array]


def mix(batch: Batch, alpha: float, rng: jax.Array) -> tuple[Batch, Batch, jax.Array]:
    """Blends the `x` of each example of a shard with that of its neighbour, all by one ratio.

    Labels are not blended, so any loss works: the loss of a pair is the same blend of the losses
    with either label. For cross entropy that equals the loss with blended labels.

    Args:
        batch: one shard; `x` holds floats or bytes.
        alpha: the ratio is drawn from Beta(alpha, alpha).
        rng: a key.

    Returns:
        The batch with blended `x`, the same with the labels of the neighbours, and the ratio, shape
        (): the weight of the batch's own labels.

    Raises:
        UserError: `x` holds integers, or the batch has a mask.
    """
    x = batch["x"]
    is_bytes = x.dtype == jnp.uint8
    if not is_bytes and not jnp.issubdtype(x.dtype, jnp.floating):
        raise UserError(f"config.mixup blends floats or bytes; the data's x is {x.dtype}")
    if "mask" in batch:
        raise UserError("config.mixup cannot blend masked examples", "train without a mask")
    ratio = jax.random.beta(rng, alpha, alpha)
    partners = {name: jnp.roll(leaf, 1, axis=0) for name, leaf in batch.items()}
    blend = ratio * x.astype(jnp.float32) + (1 - ratio) * partners["x"].astype(jnp.float32)
    blend = (jnp.round(blend) if is_bytes else blend).astype(x.dtype)
    return {**batch, "x": blend}, {**partners, "x": blend}, ratio
