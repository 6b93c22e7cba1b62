import jax
import jax.numpy as jnp


def hinge(scores, batch, margin: float = 1.0) -> jax.Array:
    """Scores `(examples,)` to losses `(examples,)`; `margin` comes from the config."""
    return jnp.maximum(0.0, margin - scores * batch["y"])


def accuracy(scores, batch) -> jax.Array:
    return (scores * batch["y"] > 0).astype(jnp.float32)
