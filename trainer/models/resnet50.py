"""ResNet-50 (He et al., arXiv:1512.03385), version 1.5: the stride is in the 3x3."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from trainer.errors import UserError

# Of ImageNet's training images, in units of uint8.
MEAN_RGB = (0.485 * 255, 0.456 * 255, 0.406 * 255)
STDDEV_RGB = (0.229 * 255, 0.224 * 255, 0.225 * 255)


class Bottleneck(nn.Module):
    """Convolutions 1x1, 3x3 and 1x1 with batch normalisation and a shortcut.

    `Conv_3` and `BatchNorm_3`, if present, belong to the shortcut.
    """

    features: int
    strides: int
    dtype: jnp.dtype
    axis_name: str | None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """`(examples, h, w, channels)` to `(examples, h/strides, w/strides, 4 * features)`."""
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = partial(_norm, train, self.dtype, self.axis_name)
        y = nn.relu(norm()(conv(self.features, (1, 1))(x)))
        y = nn.relu(norm()(conv(self.features, (3, 3), strides=self.strides)(y)))
        # Zero, so that each block starts as the identity (arXiv:1706.02677, section 5.1).
        y = norm(scale_init=nn.initializers.zeros)(conv(4 * self.features, (1, 1))(y))
        if x.shape != y.shape:
            x = norm()(conv(4 * self.features, (1, 1), strides=self.strides)(x))
        return nn.relu(x + y)


class ResNet50(nn.Module):
    """A stem, four stages of bottlenecks whose features double, a mean over space, and a Dense.

    25,557,032 parameters with the defaults. Parameters and batch normalisation statistics are
    float32; activations between layers are of `dtype`.

    Attributes:
        num_classes: logits per image.
        features: of the stem and of the first stage; the output of a stage has four times as many.
        stage_blocks: bottlenecks per stage.
        dtype: "bfloat16" or "float32".
        axis_name: the axis over which batches are normalised.
    """

    num_classes: int = 1000
    features: int = 64
    stage_blocks: Sequence[int] = (3, 4, 6, 3)
    dtype: str = "bfloat16"
    axis_name: str | None = "batch"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """`(examples, height, width, 3)` to float32 logits `(examples, num_classes)`.

        uint8 images are normalised here; images of any other dtype are used as they are.
        """
        if self.dtype not in ("bfloat16", "float32"):
            raise UserError(f"config.model.dtype={self.dtype!r} is not one of bfloat16, float32")
        dtype = jnp.dtype(self.dtype)
        if x.dtype == jnp.uint8:
            # On the device, because as bytes an image takes a quarter of the bandwidth to it.
            x = (x.astype(jnp.float32) - jnp.array(MEAN_RGB)) / jnp.array(STDDEV_RGB)
        x = nn.Conv(
            self.features, (7, 7), strides=2, padding=[(3, 3), (3, 3)], use_bias=False, dtype=dtype
        )(x.astype(dtype))
        x = nn.relu(_norm(train, dtype, self.axis_name)(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for stage, blocks in enumerate(self.stage_blocks):
            for block in range(blocks):
                strides = 2 if stage > 0 and block == 0 else 1
                x = Bottleneck(self.features * 2**stage, strides, dtype, self.axis_name)(x, train)
        x = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        return nn.Dense(self.num_classes)(x)


def _norm(
    train: bool,
    dtype: jnp.dtype,
    axis_name: str | None,
    scale_init: nn.initializers.Initializer = nn.initializers.ones,
) -> nn.BatchNorm:
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        epsilon=1e-5,
        dtype=dtype,  # of the output; means and variances are float32
        axis_name=axis_name,
        scale_init=scale_init,
    )
