"""A small decoder-only transformer with dropout and no batch normalisation."""

from __future__ import annotations

from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp


class Block(nn.Module):
    """Pre-norm causal self-attention and a GELU MLP, each with a residual (arXiv:2002.04745)."""

    num_heads: int
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, train: bool) -> jax.Array:
        """`(examples, length, width)` to the same shape."""
        width = x.shape[-1]
        y = nn.LayerNorm()(x)
        y = nn.MultiHeadDotProductAttention(
            self.num_heads, dropout_rate=self.dropout, deterministic=not train
        )(y, y, mask=mask)
        x = x + nn.Dropout(self.dropout, deterministic=not train)(y)
        y = nn.LayerNorm()(x)
        y = nn.Dense(width)(nn.gelu(nn.Dense(4 * width)(y)))
        return cast(jax.Array, x + nn.Dropout(self.dropout, deterministic=not train)(y))


class Transformer(nn.Module):
    """A language model: tokens in, logits of each next token out."""

    vocab_size: int
    max_length: int
    width: int = 128
    num_layers: int = 2
    num_heads: int = 4
    dropout: float = 0.1

    @nn.compact
    def __call__(self, tokens: jax.Array, train: bool = False) -> jax.Array:
        """Integer `(examples, length)` to logits `(examples, length, vocab_size)`."""
        tokens = tokens.astype(jnp.int32)
        x = nn.Embed(self.vocab_size, self.width)(tokens)
        positions = self.param(
            "positions", nn.initializers.normal(0.02), (self.max_length, self.width)
        )
        x = x + positions[: tokens.shape[1]]
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        mask = nn.make_causal_mask(tokens)
        for _ in range(self.num_layers):
            x = Block(self.num_heads, self.dropout)(x, mask, train)
        return nn.Dense(self.vocab_size)(nn.LayerNorm()(x))
