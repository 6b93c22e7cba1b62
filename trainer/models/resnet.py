"""A small residual network for small images (He et al., arXiv:1512.03385, section 4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp


class Block(nn.Module):
    """Two 3x3 convolutions with batch normalisation and a shortcut."""

    features: int
    strides: int
    axis_name: str | None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """`(examples, height, width, channels)` to `(examples, h/strides, w/strides, features)`."""
        conv = partial(nn.Conv, use_bias=False)
        norm = partial(
            nn.BatchNorm, use_running_average=not train, momentum=0.9, axis_name=self.axis_name
        )
        y = conv(self.features, (3, 3), strides=self.strides)(x)
        y = nn.relu(norm()(y))
        y = conv(self.features, (3, 3))(y)
        y = norm(scale_init=nn.initializers.zeros)(y)
        if x.shape != y.shape:
            x = conv(self.features, (1, 1), strides=self.strides)(x)
            x = norm()(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A stem, stages of blocks whose features double, a mean over space, and a Dense layer.

    With three stages of one block it is ResNet-8: 77,754 parameters with 16 features, one input
    channel and 10 classes.
    """

    num_classes: int
    features: int = 16
    stage_blocks: Sequence[int] = (1, 1, 1)
    stem_strides: int = 1
    axis_name: str | None = "batch"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """`(examples, height, width, channels)` to logits `(examples, num_classes)`.

        uint8 images are scaled to [0, 1]; images of any other dtype are used as they are.
        """
        if x.dtype == jnp.uint8:
            x = x.astype(jnp.float32) / 255
        x = nn.Conv(self.features, (3, 3), strides=self.stem_strides, use_bias=False)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, axis_name=self.axis_name)(x)
        x = nn.relu(x)
        for stage, blocks in enumerate(self.stage_blocks):
            for block in range(blocks):
                strides = 2 if stage > 0 and block == 0 else 1
                x = Block(self.features * 2**stage, strides, self.axis_name)(x, train)
        return nn.Dense(self.num_classes)(jnp.mean(x, axis=(1, 2)))
