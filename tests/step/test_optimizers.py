"""Weight decay: which parameters of a model it reaches, against masks written by hand."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from trainer.models.from_nnx import from_nnx
from trainer.models.transformer import Transformer
from trainer.optimizers import adamw, is_decayed, sgd
from trainer.state.leaves import name_leaves

NORM = {"scale": False, "bias": False}
DENSE = {"kernel": True, "bias": False}
ATTENTION = {"query": DENSE, "key": DENSE, "value": DENSE, "out": DENSE}
BLOCK = {
    "LayerNorm_0": NORM,
    "MultiHeadDotProductAttention_0": ATTENTION,
    "LayerNorm_1": NORM,
    "Dense_0": DENSE,
    "Dense_1": DENSE,
}


class Layer(nn.Module):
    """A layer as `nn.scan` takes it: normalised attention, scaled, and a gated sum."""

    @nn.compact
    def __call__(self, x, _):
        y = nn.RMSNorm(name="norm")(x)
        y = nn.MultiHeadDotProductAttention(2)(y, y)
        y = y * self.param("layer_scale", nn.initializers.ones, (8,))
        y = nn.WeightNorm(nn.Dense(8, use_bias=False))(y)
        return x + nn.PReLU()(y), None


class Scanned(nn.Module):
    """Layers whose parameters have a leading axis of layers."""

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return layers(name="layers")(x, None)[0]


class Convolved(nn.Module):
    """Grouped, depthwise and plain convolutions."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3,), feature_group_count=4)(x)
        x = nn.Conv(8, (3,), feature_group_count=8, use_bias=False)(x)
        x = nn.GroupNorm(2)(nn.ConvTranspose(8, (3,))(x))
        return nn.BatchNorm(use_running_average=True)(x)


class OwnNames(nn.Module):
    """Parameters that no layer of Flax's names."""

    @nn.compact
    def __call__(self, x):
        for name, shape in {
            "weight": (8, 8),
            "weights_0": (3, 8, 8),
            "positions": (1, 6, 8),
            "cls": (1, 1, 8),
            "rel_pos_bias": (2, 5),
            "log_scale": (2, 5),
            "temperature": (),
        }.items():
            self.param(name, nn.initializers.ones, shape)
        return OwnNorm(name="final_norm")(x)


class OwnNorm(nn.Module):
    """A normalisation with PyTorch's name for its scale; two axes, as after `nn.scan`."""

    @nn.compact
    def __call__(self, x):
        return x * self.param("weight", nn.initializers.ones, (3, 8))[0]


class InNNX(nnx.Module):
    """Embedding, attention, layers that are stacked by `nnx.vmap`, a list and own names."""

    def __init__(self, *, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked(rngs: nnx.Rngs):
            return nnx.List([nnx.LayerNorm(8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)])

        self.embed = nnx.Embed(5, 8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.layers = stacked(rngs)
        self.convolution = nnx.Conv(8, 8, (3,), feature_group_count=8, rngs=rngs)
        self.shift = nnx.Param(jnp.zeros((2, 8)))
        self.tables = nnx.List([nnx.Param(jnp.zeros((2, 8)))])

    def __call__(self, x):
        return x


SCANNED = {
    "layers": {
        "norm": {"scale": False},
        "MultiHeadDotProductAttention_0": ATTENTION,
        "layer_scale": False,
        "Dense_0": {"kernel": True},
        "WeightNorm_0": {"Dense_0/kernel/scale": False},
        "PReLU_0": {"negative_slope": False},
    }
}

MASKS = {
    "attention and embeddings": (
        Transformer(vocab_size=5, max_length=8, width=8, num_layers=2, num_heads=2),
        jnp.zeros((1, 6), jnp.int32),
        {
            "Embed_0": {"embedding": True},
            "positions": True,
            "Block_0": BLOCK,
            "Block_1": BLOCK,
            "LayerNorm_0": NORM,
            "Dense_0": DENSE,
        },
    ),
    "scanned layers": (Scanned(), jnp.zeros((1, 6, 8)), SCANNED),
    "convolutions in groups": (
        Convolved(),
        jnp.zeros((1, 6, 8)),
        {
            "Conv_0": DENSE,
            "Conv_1": {"kernel": True},
            "ConvTranspose_0": DENSE,
            "GroupNorm_0": NORM,
            "BatchNorm_0": NORM,
        },
    ),
    "own names": (
        OwnNames(),
        jnp.zeros((1, 6, 8)),
        {
            "weight": True,
            "weights_0": True,
            "positions": True,
            "cls": False,
            "rel_pos_bias": False,
            "log_scale": False,
            "temperature": False,
            "final_norm": {"weight": False},
        },
    ),
    "NNX": (
        from_nnx(lambda rngs: InNNX(rngs=rngs), "config.model"),
        jnp.zeros((1, 6, 8)),
        {
            "embed": {"embedding": True},
            "attention": ATTENTION,
            "layers": {"0": NORM, "1": DENSE},
            "convolution": DENSE,
            "shift": False,
            "tables": {"0": True},
        },
    ),
}


@pytest.mark.parametrize("case", MASKS)
def test_weight_decay_reaches_kernels_and_embeddings_only(case):
    model, x, expected = MASKS[case]
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    assert name_leaves(is_decayed(shapes)) == name_leaves(expected)
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes)
    zeros = jax.tree.map(np.zeros_like, params)
    for optimizer in (adamw(0.1, weight_decay=0.5), sgd(0.1, 0.0, weight_decay=0.5)):
        updates, _ = optimizer.update(zeros, optimizer.init(params), params)
        for name, decayed in name_leaves(expected).items():
            np.testing.assert_allclose(name_leaves(updates)[name], -0.05 * decayed, err_msg=name)
