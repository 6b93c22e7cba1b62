"""The table of a model against counts by hand and those of the full step."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

from trainer.losses import softmax_cross_entropy
from trainer.metrics_writer.model_table import draw_table, model_rows
from trainer.models.from_nnx import from_nnx
from trainer.models.resnet import ResNet
from trainer.models.transformer import Transformer
from trainer.state.leaves import count_params
from trainer.step.analysis import count_flops
from trainer.step.init import init_state
from trainer.step.task import Task


class Scanned(nn.Module):
    """Three layers whose parameters are stacked, and one called twice, rematerialised."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        layers = nn.scan(
            lambda layer, x, _: (layer(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        x, _ = layers(nn.Dense(8, name="layers"), x, None)
        twice = nn.remat(nn.Dense)(8, name="twice")
        offset = self.param("offset", nn.initializers.zeros, (8,))
        return twice(twice(x)) + offset


def nnx_model():
    from nnx_models import MLP

    return from_nnx(lambda rngs: MLP(8, 16, 10, rngs=rngs), "config.model")


MODELS = {
    "resnet": (ResNet(10, features=4), (8, 8, 1), jnp.float32),
    "transformer": (Transformer(20, 16, width=8, num_layers=2, num_heads=2), (16,), jnp.int32),
    "scanned": (Scanned(), (8,), jnp.float32),
    "nnx": (nnx_model(), (8,), jnp.float32),
}


def rows_of(name, depth=9):
    model, shape, dtype = MODELS[name]
    task = Task(model, softmax_cross_entropy, optax.sgd(0.1))
    x = jax.ShapeDtypeStruct(shape, dtype)
    state = jax.eval_shape(lambda x: init_state(task, 0, x), x)
    return task, state, x, model_rows(task, state, x, depth)


@pytest.mark.parametrize("name", MODELS)
def test_the_total_is_the_sum_of_the_modules(name):
    task, state, x, rows = rows_of(name)
    whole = rows[0]
    assert whole.path == ()
    assert whole.params == count_params(state.params)

    def forward(params, model_state, x):
        rng = jax.random.key(0)
        return task.apply(params, model_state, {"x": x[None]}, train=False, rng=rng)[0]

    flops = count_flops(jax.make_jaxpr(forward)(state.params, state.model_state, x)).total()
    assert whole.flops == flops
    for parent in rows:
        parts = [row for row in rows if row.path[:-1] == parent.path and row.path]
        assert sum(row.params for row in parts) <= parent.params
        assert sum(row.flops for row in parts) <= parent.flops
    assert len({row.path for row in rows}) == len(rows)


def test_rows_by_hand():
    *_, rows = rows_of("resnet")
    by_path = {"/".join(row.path): row for row in rows}
    shortcut = by_path["Block_1/Conv_2"]  # of one place by one, 4 features to 8, at 4 x 4 places
    assert (shortcut.shapes, shortcut.params, shortcut.flops) == (((4, 4, 8),), 32, 2 * 32 * 16)
    assert by_path["Block_2"].shapes == ((2, 2, 16),)

    *_, rows = rows_of("scanned")
    by_path = {"/".join(row.path): row for row in rows}
    assert by_path["layers"].params == 3 * 72
    assert by_path["layers"].flops == 3 * 2 * 64
    assert by_path["twice"].params == 72
    assert by_path["twice"].flops == 2 * 2 * 64
    assert by_path[""].params == 3 * 72 + 72 + 8


def test_the_table_has_levels_and_one_width():
    *_, rows = rows_of("transformer", depth=1)
    lines = draw_table(rows).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert not any("/" in line for line in lines)
    assert lines[-1].startswith("all ")
    *_, rows = rows_of("nnx", depth=2)
    table = [line.split() for line in draw_table(rows).splitlines()]
    assert ["layers/1", "-", "272", "-"] in table
