"""Models with params in 16 bits: sums, means and averages keep 32, against numpy in float64."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import mesh_of, wide
from runs import digits

import trainer
from trainer.checkpoints import differences
from trainer.checkpoints.manifest import Leaf
from trainer.config.settings import check
from trainer.lift.lift import make_lift
from trainer.lift.update import make_sharded_step
from trainer.losses import softmax_cross_entropy
from trainer.metrics import bits
from trainer.optimizers import adamw
from trainer.state.leaves import name_leaves
from trainer.step.evaluate import make_eval_step
from trainer.step.init import init_state
from trainer.step.job import build_job, make_init
from trainer.step.task import Recipe, Task
from trainer.step.update import make_update_step

SIZE = 4096  # large enough to be sharded


class Weights(nn.Module):
    """Params in bfloat16; `x` is their gradient."""

    dtype: str = "bfloat16"

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.ones, (SIZE,), jnp.dtype(self.dtype))
        return jnp.sum(w * x.astype(w.dtype), axis=-1, dtype=jnp.float32)


def total(outputs, batch):
    return outputs


def task_of(optimizer):
    return Task(Weights(), total, optimizer)


def gradients_of(rows):
    """A batch whose example i has the gradient `rows[i]` everywhere, exact in bfloat16."""
    return {"x": np.repeat(np.asarray(rows, np.float32)[:, None], SIZE, axis=1)}


# Each a little more than 1, in steps of bfloat16's: their mean in bfloat16 depends on the order.
UNEVEN = 1 + np.arange(8) % 3 * 2.0**-7


def test_a_moving_average_of_bfloat16_params_follows_them():
    climbs = optax.stateless(lambda grads, params: jax.tree.map(jnp.ones_like, grads))
    task, recipe = task_of(climbs), Recipe(ema_decay=0.999)
    step = make_update_step(task, recipe, axis=None)
    batch = gradients_of([1])
    state = init_state(task, 0, batch["x"][0], recipe)
    state, _ = jax.jit(lambda s: jax.lax.scan(step, s, {"x": jnp.tile(batch["x"], (200, 1, 1))}))(
        state
    )
    params = np.minimum(1.0 + np.arange(201), 201)
    expected = params[0]
    for value in params[1:]:
        expected = 0.999 * expected + 0.001 * value
    assert state.params["w"].dtype == jnp.bfloat16
    assert state.params["w"][0] == params[-1]
    assert state.ema["w"].dtype == jnp.float32
    np.testing.assert_allclose(state.ema["w"], expected, rtol=1e-5)
    assert state.eval_params["w"].dtype == jnp.bfloat16
    sums = make_eval_step(task, axis=None)(state, batch)
    value = np.float64(jnp.bfloat16(expected))  # what the model computes with
    np.testing.assert_allclose(sums["loss"][0], SIZE * value, rtol=1e-3)


@pytest.mark.parametrize("flat", [wide(False), True])
@pytest.mark.parametrize("steps", [1, 1024])
def test_bfloat16_gradients_are_added_up_in_float32(steps, flat):
    task = task_of(optax.sgd(1.0))
    rows = np.ones(1024) if steps > 1 else UNEVEN
    batch = gradients_of(rows)
    lift = make_lift("pmap", mesh_of(1 if steps > 1 else 8))
    step = lift(make_update_step(task, Recipe(accum_steps=steps, flat=flat)), donate=False)
    state = init_state(task, 0, batch["x"][0])
    state, metrics = step(lift.put_state(state), lift.put_batch(batch))
    expected = rows.mean(dtype=np.float64)
    norm = lift.read(metrics)["grad_norm"]
    np.testing.assert_allclose(norm, expected * np.sqrt(SIZE), rtol=1e-6)
    np.testing.assert_array_equal(lift.read(state.params)["w"], jnp.bfloat16(1 - expected))


@pytest.mark.parametrize("flat", [False, wide(True)])
@pytest.mark.parametrize("fields", ["zero1", "fsdp"])
def test_sharded_bfloat16_gradients_are_added_up_in_float32(fields, flat):
    task = task_of(optax.sgd(1.0, momentum=0.5))
    # A running sum in bfloat16 stands still at the first gradient.
    rows = np.array([256.0, *[0.5] * 7])
    batch = gradients_of(rows)
    lift = make_lift("shard_map", mesh_of(8), fields)
    state = lift.make_state(lambda: init_state(task, 0, batch["x"][0]))
    step = lift.compile(make_sharded_step(task, Recipe(flat=flat), lift, state), state)
    state, metrics = step(state, lift.put_batch(batch))
    # Gradients of sharded params are rounded once, after the sum over the shards.
    mean = (
        np.float64(jnp.bfloat16(rows.sum())) / 8 if fields == "fsdp" and not flat else rows.mean()
    )
    np.testing.assert_allclose(lift.read(metrics)["grad_norm"], mean * np.sqrt(SIZE), rtol=1e-6)
    trace = np.asarray(name_leaves(state.opt_state)["0/trace/w"])
    assert trace.dtype == np.float32
    np.testing.assert_allclose(trace, mean, rtol=1e-6)


def test_the_optimizers_averages_of_bfloat16_params_are_those_of_float32():
    optimizer, recipe = adamw(0.0, b2=0.999), Recipe()
    x = np.linspace(0.5, 1.5, 300)[:, None, None] * np.ones((300, 1, SIZE))
    x = np.asarray(jnp.bfloat16(x), np.float32)
    found = {}
    for dtype in ("bfloat16", "float32"):
        task = Task(Weights(dtype), total, optimizer)
        step = make_update_step(task, recipe, axis=None)
        state = init_state(task, 0, x[0, 0])
        state, _ = jax.jit(lambda s, step=step: jax.lax.scan(step, s, {"x": jnp.asarray(x)}))(state)
        found[dtype] = name_leaves(state.opt_state)["0/nu/w"]
    expected = 0.0
    for gradient in x[:, 0, 0].astype(np.float64):
        expected = 0.999 * expected + 0.001 * gradient**2
    np.testing.assert_allclose(found["float32"], expected, rtol=1e-5)
    np.testing.assert_allclose(found["bfloat16"], expected, rtol=1e-5)


def test_losses_and_metrics_of_a_model_in_16_bits_are_those_of_its_outputs():
    class Constant(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.param("w", nn.initializers.ones, ())
            return x.astype(jnp.bfloat16)

    logits = np.random.default_rng(0).normal(size=(64, 7, 9)).astype(jnp.bfloat16)
    labels = np.random.default_rng(1).integers(9, size=(64, 7))
    batch = {"x": logits.astype(np.float32), "y": labels.astype(np.int32)}
    task = Task(Constant(), softmax_cross_entropy, optax.sgd(0.1), metrics={"bits": bits})
    state = init_state(task, 0, batch["x"][0])
    sums = make_eval_step(task, axis=None)(state, batch)
    exact = logits.astype(np.float64)
    chosen = np.take_along_axis(exact, labels[..., None], -1)[..., 0]
    expected = (np.log(np.exp(exact).sum(-1)) - chosen).mean()
    np.testing.assert_allclose(sums["loss"][0] / sums["loss"][1], expected, rtol=1e-6)
    np.testing.assert_allclose(sums["bits"][0] / 64, expected / np.log(2), rtol=1e-6)


class NarrowMLP(nn.Module):
    """Params and outputs in bfloat16."""

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(10, param_dtype=jnp.bfloat16)(x.reshape(len(x), -1).astype(jnp.bfloat16))


def test_a_run_warns_of_its_params_and_an_average_in_16_bits_is_taken_up(tmp_path, capsys):
    config = digits(4)
    config.model = {"target": "test_narrow_floats:NarrowMLP"}
    config.ema_decay = 0.9
    result = trainer.train(config, tmp_path / "run", mesh_of(2))
    assert (
        "Dense_0/bias and 1 more are bfloat16: a change of less than 1/512"
        in capsys.readouterr().err
    )
    metrics = trainer.evaluate(tmp_path / "run", mesh=mesh_of(2), trust=True)
    assert metrics["eval/loss"] == pytest.approx(result.metrics["eval/loss"], abs=1e-6)

    # What an earlier podlift saved: the average, and the optimizer's, in bfloat16.
    wanted = name_leaves(jax.eval_shape(make_init(build_job(check(config)), 0)))
    saved = {
        name: Leaf(leaf.shape, "bfloat16" if leaf.dtype == np.float32 else str(leaf.dtype), 0)
        for name, leaf in wanted.items()
    }
    found = differences.compare(saved, wanted)
    assert {d.kind for d in found} == {differences.WIDER}
    assert "ema/Dense_0/kernel" in {d.name for d in found}
    differences.check_allowed(found, [], "there")
    differences.refuse(found, "there", "")
    arrays = {
        name: np.ones(leaf.shape, jnp.dtype(saved[name].dtype)) for name, leaf in wanted.items()
    }
    adapted = differences.adapt(arrays, wanted, found, dict)
    assert all(adapted[name].dtype == leaf.dtype for name, leaf in wanted.items())
    narrower = {"ema/w": Leaf((), "float32", 0), "params/w": Leaf((), "bfloat16", 0)}
    here = {"ema/w": np.zeros((), jnp.bfloat16), "params/w": np.zeros((), np.float32)}
    assert [d.kind for d in differences.compare(narrower, here)] == ["dtype", "dtype"]
