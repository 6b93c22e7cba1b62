"""How a step is taken: in parts, clipped, averaged, in 16 bits, blended; in every lift."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import mesh_of, wide
from steps import BATCH, LIFTS, RANDOM, assert_close, run

import trainer
from trainer.config.settings import check
from trainer.errors import UserError
from trainer.lift.lift import make_lift
from trainer.losses import softmax_cross_entropy, squared_error
from trainer.models.mlp import MLP
from trainer.models.resnet import ResNet
from trainer.optimizers import adamw
from trainer.schedules import step_decay
from trainer.step.evaluate import make_eval_step
from trainer.step.init import init_state
from trainer.step.mixup import mix
from trainer.step.precision import DTYPES, LossScale
from trainer.step.task import Recipe, Task
from trainer.step.update import make_update_step

IMAGES = {
    "x": RANDOM.normal(size=(16, 8, 8, 1)).astype(np.float32),
    "y": RANDOM.integers(10, size=16).astype(np.int32),
}


def unnormalised():
    """A model with nothing that depends on the rest of a batch."""
    import flax.linen as nn

    return nn.Sequential([nn.Dense(7), nn.tanh, nn.Dense(1)])


PLAIN = Task(unnormalised(), squared_error, optax.adam(0.05), 0.05)
NORMALISED = Task(MLP(hidden_size=8, out_size=1), squared_error, optax.sgd(0.05), 0.05)


@pytest.mark.parametrize("lift", LIFTS, ids=str)
@pytest.mark.parametrize("unroll", [False, wide(True)])
@pytest.mark.parametrize("masked", [wide(False), True])
def test_accumulated_microbatches_are_the_batch(lift, unroll, masked):
    batch = BATCH | ({"mask": np.arange(16) % 5 != 1} if masked else {})
    whole, metrics = run(PLAIN, batch=batch, lift=lift)
    parts = Recipe(accum_steps=4, unroll=unroll)
    found, also = run(PLAIN, parts, batch=batch, lift=lift)
    assert_close(found, whole, 1e-6)
    assert_close(also, metrics, 1e-6)


def test_normalisation_sees_the_microbatches_one_after_another():
    state, _ = run(NORMALISED, Recipe(accum_steps=2), lift=("pmap", 1), steps=1)
    expected = init_state(NORMALISED, 0, BATCH["x"][0])
    variables = {"params": expected.params, **expected.model_state}
    for part in (0, 1):
        _, updated = NORMALISED.model.clone(axis_name=None).apply(
            variables, BATCH["x"][part::2], train=True, mutable=["batch_stats"]
        )
        variables |= updated
    assert_close(state.model_state["batch_stats"], variables["batch_stats"], 1e-6)


@pytest.mark.parametrize("lift", [LIFTS[0], *map(wide, LIFTS[1:])], ids=str)
def test_the_gradient_is_clipped_as_optax_does(lift):
    by_optax = optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.05))
    expected, metrics = run(dataclasses.replace(NORMALISED, optimizer=by_optax), lift=lift)
    found, also = run(NORMALISED, Recipe(clip_norm=0.1), lift=lift)
    assert_close(found.params, expected.params, 1e-6)
    assert also["grad_norm"] > 0.1  # what it was before
    assert also["grad_norm"] == pytest.approx(metrics["grad_norm"], abs=1e-6)
    unclipped, _ = run(NORMALISED, Recipe(clip_norm=1e9), lift=lift)
    assert_close(unclipped.params, run(NORMALISED, lift=lift)[0].params, 0)


@pytest.mark.parametrize("lift", [LIFTS[0], *map(wide, LIFTS[1:])], ids=str)
def test_an_average_of_the_params_is_kept_and_evaluated(lift):
    states = [run(NORMALISED, lift=lift, steps=steps)[0].params for steps in range(5)]
    expected = states[0]
    for params in states[1:]:
        expected = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, expected, params)
    state, _ = run(NORMALISED, Recipe(ema_decay=0.9), lift=lift, steps=4)
    assert_close(state.params, states[-1], 0)
    assert_close(state.ema, expected, 1e-6)
    lift = make_lift(lift[0], mesh_of(lift[1]))
    evaluate = lift(make_eval_step(NORMALISED), donate=False)
    averaged = dataclasses.replace(state, params=state.ema, ema=None)
    batch = lift.put_batch(BATCH)
    assert_close(
        lift.read(evaluate(lift.put_state(state), batch)),
        lift.read(evaluate(lift.put_state(averaged), batch)),
        0,
    )


CONVOLVED = Task(ResNet(num_classes=10, features=4), softmax_cross_entropy, optax.sgd(0.05), 0.05)


@pytest.mark.parametrize(
    ("task", "batch", "lift"),
    [
        *((NORMALISED, BATCH, lift) for lift in LIFTS),
        pytest.param(CONVOLVED, IMAGES, ("pmap", 1), marks=pytest.mark.slow),
    ],
    ids=[*map(str, LIFTS), "convolutions"],
)
@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_in_16_bits_the_state_keeps_32_and_the_numbers_are_close(task, batch, lift, name):
    recipe = Recipe(scale_loss=name == "fp16")
    expected, metrics = run(task, batch=batch, lift=lift)
    task = dataclasses.replace(task, dtype=DTYPES[name])
    state = jax.jit(lambda x: init_state(task, 0, x, recipe))(batch["x"][0])
    if name == "fp16":  # low enough that no step of these is left out
        scale = LossScale(jnp.float32(256.0), jnp.zeros((), jnp.int32))
        state = dataclasses.replace(state, loss_scale=scale)
    found, also = run(task, recipe, batch=batch, lift=lift, state=state)
    for leaf in jax.tree.leaves((found.params, found.model_state, found.opt_state)):
        assert leaf.dtype in (np.float32, np.int32)
    assert also["loss"].dtype == np.float32
    assert also["loss"] == pytest.approx(metrics["loss"], rel=0.02)
    assert also["loss"] != metrics["loss"]
    assert_close(found.params, expected.params, 0.02)
    step = jax.vmap(make_update_step(task, recipe), axis_name="batch", in_axes=(None, 0))
    jaxpr = str(jax.make_jaxpr(step)(found, {k: v[None] for k, v in batch.items()}))
    products = re.findall(r"(\w+)\[[\d,]*\] = (?:conv_general_dilated|dot_general)\[", jaxpr)
    assert set(products) == {{"bf16": "bf16", "fp16": "f16"}[name]}


def test_the_lifts_agree_in_16_bits():
    task = dataclasses.replace(NORMALISED, dtype=jnp.bfloat16)
    expected, _ = run(task, lift=("vmap", 4))
    for lift in ("pmap", "shard_map"):
        assert_close(run(task, lift=(lift, 4))[0], expected, 1e-3)


def test_the_scale_of_the_loss_follows_the_gradients():
    task, recipe = dataclasses.replace(PLAIN, dtype=jnp.float16), Recipe(scale_loss=True)
    state = init_state(task, 0, BATCH["x"][0], recipe)
    assert state.loss_scale.scale == 2.0**15
    huge = dataclasses.replace(
        state, loss_scale=LossScale(jnp.float32(2.0**24), jnp.zeros((), jnp.int32))
    )
    after, metrics = run(task, recipe, state=huge, steps=1)
    assert_close(after.params, state.params, 0)  # it overflowed: no step
    assert after.loss_scale.scale == 2.0**23
    assert metrics["grad_norm"] == 0  # nobody is alarmed
    after, metrics = run(task, recipe, state=huge, steps=30)
    assert after.loss_scale.scale < 2.0**20
    assert metrics["loss"] < 0.9 * run(task, recipe, steps=1)[1]["loss"]

    patient = LossScale(jnp.float32(8.0), jnp.int32(1999))
    assert patient.updated(jnp.array(True)) == LossScale(jnp.float32(16.0), jnp.int32(0))
    lowest = LossScale(jnp.float32(1.0), jnp.int32(3)).updated(jnp.array(False))
    assert (lowest.scale, lowest.is_lowest) == (1.0, True)


def test_a_nan_loss_is_reported_in_16_bits_too():
    task, recipe = dataclasses.replace(PLAIN, dtype=jnp.float16), Recipe(scale_loss=True)
    bad = {**BATCH, "x": BATCH["x"] * np.nan}
    _, metrics = run(task, recipe, batch=bad, steps=1)
    assert np.isnan(metrics["loss"])
    assert np.isnan(metrics["grad_norm"])


@pytest.mark.parametrize("lift", ["pmap", wide("shard_map"), wide("vmap")])
def test_mixup_is_the_same_in_every_lift(lift):
    recipe = Recipe(mixup=0.4)
    expected, first = run(PLAIN, recipe, lift=("vmap", 4))
    found, metrics = run(PLAIN, recipe, lift=(lift, 4))
    assert_close((found, metrics), (expected, first), 1e-6)
    assert abs(first["loss"] - run(PLAIN, lift=("vmap", 4))[1]["loss"]) > 1e-4


def test_the_mixup_loss_is_that_of_blended_labels():
    key = jax.random.key(1)
    blended, others, share = mix(IMAGES, 0.4, key)
    outputs = jnp.asarray(RANDOM.normal(size=(16, 10)), jnp.float32)
    pair = functools.partial(softmax_cross_entropy, outputs)
    labels = jax.nn.one_hot(IMAGES["y"], 10)
    soft = share * labels + (1 - share) * jnp.roll(labels, 1, axis=0)
    expected = optax.softmax_cross_entropy(outputs, soft)
    found = share * pair(blended) + (1 - share) * pair(others)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    x = share * IMAGES["x"] + (1 - share) * np.roll(IMAGES["x"], 1, axis=0)
    np.testing.assert_allclose(blended["x"], x, atol=1e-6)
    as_bytes = {"x": np.arange(256, dtype=np.uint8), "y": IMAGES["y"]}
    assert mix(as_bytes, 0.4, key)[0]["x"].dtype == np.uint8
    with pytest.raises(UserError, match="int32"):
        mix({"x": np.arange(4, dtype=np.int32)}, 0.4, key)
    with pytest.raises(UserError, match="masked"):
        mix({**IMAGES, "mask": np.ones(16)}, 0.4, key)


def config(**changes):
    from configs.digits import get_config

    found = get_config()
    found.update(num_epochs=None, num_steps=12, global_batch_size=64, **changes)
    found.checkpoint = {"every_steps": 6}
    return found


ALL = {"precision": "fp16", "grad_accum_steps": 2, "clip_norm": 1.0, "ema_decay": 0.9, "mixup": 0.2}


@pytest.mark.parametrize("steps_per_call", [wide(1), 3])
def test_all_options_together_resume_bit_for_bit(tmp_path, steps_per_call):
    options = {**ALL, "steps_per_call": steps_per_call}
    whole = trainer.train(config(**options), tmp_path / "whole", mesh_of(4))
    trainer.train(config(**options, stop_at_step=6), tmp_path / "parts", mesh_of(4))
    parts = trainer.train(config(**options), tmp_path / "parts", mesh_of(4))
    assert_close(jax.device_get(parts.state), jax.device_get(whole.state), 0)
    assert whole.metrics["train/loss_scale"] > 0
    assert whole.metrics["train/loss"] < 2.5
    assert "ema" in trainer.load(tmp_path / "whole")


def test_a_batch_that_does_not_divide_into_microbatches_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"4 devices x 3 microbatches .*grad_accum_steps") as error:
        trainer.train(config(grad_accum_steps=3), tmp_path / "run", mesh_of(4))
    assert "60 or 72" in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [("precision", "fp8"), ("ema_decay", 1.0), ("clip_norm", 0.0), ("mixup", -1.0)],
)
def test_values_out_of_range_are_refused(key, value):
    with pytest.raises(UserError, match=key):
        check(config(**{key: value}))


def test_the_rate_falls_in_steps_after_a_warm_up():
    rate = step_decay(0.4, 100, fractions=(0.5, 0.8), factor=0.1, warmup_fraction=0.1)
    found = [float(rate(jnp.int32(step))) for step in (0, 5, 10, 49, 51, 79, 81)]
    np.testing.assert_allclose(found, [0, 0.2, 0.4, 0.4, 0.04, 0.04, 0.004], rtol=1e-6)


def test_weights_decay_and_biases_do_not():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    optimizer = adamw(0.1, weight_decay=0.5)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.05)
    np.testing.assert_allclose(updates["bias"], 0)
