import flax.linen as nn
import jax


class SpiralNet(nn.Module):
    """A module as you would write it for one chip.

    `axis_name="batch"` makes its statistics those of the global batch, wherever it runs.
    """

    width: int = 64

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        for _ in range(3):
            x = nn.Dense(self.width)(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9, axis_name="batch")(x)
            x = nn.relu(x)
        return nn.Dense(1)(x)[:, 0]
