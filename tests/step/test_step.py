"""The step: masks, flat reductions, randomness, and what it refuses."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import mesh_of

from trainer.data.stream import ArraySource
from trainer.errors import UserError
from trainer.inference.evaluate import Evaluator
from trainer.lift.lift import make_lift
from trainer.losses import squared_error
from trainer.metrics import accuracy, bits, mean_per_example
from trainer.models.mlp import MLP, PlainMLP
from trainer.step.collectives import mean_over_axis
from trainer.step.init import init_state
from trainer.step.task import Task
from trainer.step.update import make_update_step

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(48, 3)).astype(np.float32)
Y = RANDOM.normal(size=(48, 1)).astype(np.float32)
LINEAR = Task(nn.Dense(1), squared_error, optax.sgd(0.1), 0.1)


def state_of(task):
    return init_state(task, 0, X[0])


@pytest.mark.parametrize("devices", [1, 4, 8])
@pytest.mark.parametrize("kind", ["vmap", "pmap", "shard_map"])
def test_masked_examples_do_not_count_wherever_they_are(kind, devices):
    """Shards with unequal numbers of real examples give the gradient over the real ones."""
    mask = (np.arange(48) < 21).astype(np.float32)
    y = np.where(mask[:, None] > 0, Y, 1e6)
    kernel, bias = state_of(LINEAR).params["kernel"], state_of(LINEAR).params["bias"]
    residual = X[:21] @ np.asarray(kernel) + np.asarray(bias) - Y[:21]
    lift = make_lift(kind, mesh_of(devices))
    step = lift(make_update_step(LINEAR))
    state, metrics = step(
        lift.put_state(state_of(LINEAR)), lift.put_batch({"x": X, "y": y, "mask": mask})
    )
    np.testing.assert_allclose(lift.read(metrics)["loss"], (residual**2).mean(), rtol=1e-5)
    expected = np.asarray(kernel) - 0.1 * 2 * X[:21].T @ residual / 21
    np.testing.assert_allclose(np.asarray(state.params["kernel"]), expected, atol=1e-6)


@pytest.mark.parametrize("examples", [5, 48, 41])
@pytest.mark.parametrize("devices", [1, 2, 8])
def test_evaluation_is_exact_at_any_device_count(examples, devices):
    task = Task(nn.Dense(1), squared_error, optax.sgd(0.1), metrics={"twice": squared_error})
    state = state_of(task)
    source = ArraySource({"x": X[:examples], "y": Y[:examples]})
    lift = make_lift("pmap", mesh_of(devices))
    found = Evaluator(task, source, lift, batch_size=10)(lift.put_state(state))
    outputs = X[:examples] @ np.asarray(state.params["kernel"]) + np.asarray(state.params["bias"])
    expected = ((outputs - Y[:examples]) ** 2).mean()
    np.testing.assert_allclose([found["eval/loss"], found["eval/twice"]], expected, rtol=1e-6)


def test_batches_whose_infinities_cancel_evaluate_to_nan():
    task = Task(nn.Dense(1), lambda outputs, batch: batch["y"][:, 0], optax.sgd(0.1))
    source = ArraySource({"x": X[:4], "y": np.float32([[np.inf], [1.0], [-np.inf], [1.0]])})
    lift = make_lift("pmap", mesh_of(2))
    found = Evaluator(task, source, lift, batch_size=2)(lift.put_state(state_of(task)))
    assert np.isnan(found["eval/loss"])


def test_a_flat_mean_is_the_mean_and_leaves_integers_alone():
    tree = {
        "a": RANDOM.normal(size=(4, 3, 2)).astype(np.float32),
        "b": RANDOM.normal(size=(4,)).astype(np.float32),
        "c": RANDOM.normal(size=(4, 5)).astype(np.float16),
    }
    for flat in (False, True):
        mean = jax.vmap(
            lambda t, flat=flat: mean_over_axis({**t, "n": 3}, "i", flat=flat),
            axis_name="i",
            out_axes=None,
        )(tree)
        for name, value in tree.items():
            assert mean[name].dtype == value.dtype
            np.testing.assert_allclose(
                mean[name],
                value.mean(axis=0, dtype=np.float32),
                atol=1e-3 if value.dtype == np.float16 else 1e-6,
            )
        assert mean["n"] == 3


def test_dropout_differs_between_shards_and_steps_and_repeats_itself():
    model = PlainMLP(hidden_sizes=(64,), out_size=1, dropout=0.5)
    task = Task(model, squared_error, optax.sgd(0.0))
    batch = {"x": np.tile(X[:1], (8, 1)), "y": np.tile(Y[:1], (8, 1))}

    def losses(kind):
        lift = make_lift(kind, mesh_of(8))
        step = lift(make_update_step(task))
        state, found = lift.put_state(state_of(task)), []
        for _ in range(3):
            state, metrics = step(state, lift.put_batch(batch))
            found.append(float(lift.read(metrics)["loss"]))
        return found

    first = losses("pmap")
    assert first == losses("pmap")
    np.testing.assert_allclose(first, losses("vmap"), rtol=1e-6)
    assert len(set(first)) == 3
    # Equal examples on all shards: with equal masks the mean loss would be that of one shard.
    one = make_lift("pmap", mesh_of(1))
    step = one(make_update_step(task))
    _, metrics = step(
        one.put_state(state_of(task)), one.put_batch({k: v[:1] for k, v in batch.items()})
    )
    assert abs(float(one.read(metrics)["loss"]) - first[0]) > 1e-4


def test_a_loss_that_is_not_per_example_is_refused():
    task = Task(nn.Dense(1), lambda o, b: jnp.mean((o - b["y"]) ** 2), optax.sgd(0.1))
    lift = make_lift("pmap", mesh_of(2))
    with pytest.raises(UserError, match=r"shape \(\) for 24 examples"):
        lift(make_update_step(task))(
            lift.put_state(state_of(task)), lift.put_batch({"x": X, "y": Y})
        )


class GrowingMean(nn.Module):
    """The guide's running mean, whose shape changes at its first update."""

    @nn.compact
    def __call__(self, x):
        initialized = self.has_variable("batch_stats", "mean")
        mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[1:])
        if initialized:
            mean.value = 0.9 * mean.value + 0.1 * jnp.mean(x, axis=0, keepdims=True)
        return mean.value + self.param("bias", nn.initializers.zeros, x.shape[1:])


def test_state_that_changes_its_shape_is_refused():
    task = Task(GrowingMean(), lambda o, b: mean_per_example((o - b["x"]) ** 2), optax.sgd(0.1))
    lift = make_lift("pmap", mesh_of(2))
    with pytest.raises(UserError, match=r"batch_stats/mean has shape \(3,\).*\(1, 3\)"):
        lift(make_update_step(task))(lift.put_state(state_of(task)), lift.put_batch({"x": X}))


class UsesTheAxis(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(1)(x - jax.lax.pmean(jnp.mean(x, axis=0), "batch"))


def test_a_model_may_use_the_axis_while_it_initialises():
    assert init_state(Task(UsesTheAxis(), squared_error, optax.sgd(0.1)), 0, X[0]).params


def test_init_does_not_depend_on_the_axis_around_it():
    model = MLP(hidden_size=4, out_size=1)
    state = init_state(Task(model, squared_error, optax.sgd(0.1)), 7, X[0])
    key, _ = jax.random.split(jax.random.key(7))
    plain = model.init({"params": key, "dropout": key}, X[:1])
    jax.tree.map(np.testing.assert_array_equal, state.params, plain["params"])


@pytest.mark.parametrize("dtype", [bool, np.int32])
def test_a_mask_of_another_type_is_the_same_mask(dtype):
    """The first shard has no real example at all."""
    mask = np.arange(48) >= 24
    lift = make_lift("pmap", mesh_of(2))
    step = lift(make_update_step(LINEAR), donate=False)
    losses = []
    for kind in (np.float32, dtype):
        batch = lift.put_batch({"x": X, "y": Y, "mask": mask.astype(kind)})
        losses.append(float(lift.read(step(lift.put_state(state_of(LINEAR)), batch)[1])["loss"]))
    assert np.isfinite(losses[0])
    assert losses[0] == losses[1]


def test_labels_that_would_broadcast_are_refused():
    with pytest.raises(UserError, match=r"\(4, 1\).*\(4,\)"):
        squared_error(jnp.zeros((4, 1)), {"y": jnp.zeros(4)})
    with pytest.raises(UserError, match="labels"):
        accuracy(jnp.zeros((4, 3)), {"y": jnp.zeros((4, 1))})


def test_bits_are_those_of_an_ideal_code():
    batch = {"y": jnp.array([[3, 0], [1, 7]])}
    even = jnp.zeros((2, 2, 8))
    np.testing.assert_allclose(bits(even, batch), [3.0, 3.0], rtol=1e-6)
    half_each = jnp.where(jnp.arange(8) < 2, 0.0, -1e9) + jnp.zeros((1, 2, 8))
    np.testing.assert_allclose(bits(half_each, {"y": jnp.array([[0, 1]])}), [1.0], rtol=1e-6)


class NeedsTrain(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        return nn.Dropout(0.5, deterministic=not train)(nn.Dense(1)(x))


class SowsValues(nn.Module):
    @nn.compact
    def __call__(self, x):
        self.sow("aux", "seen", jnp.mean(x))
        return nn.Dense(1)(x)


def test_train_may_have_no_default():
    assert state_of(Task(NeedsTrain(), squared_error, optax.sgd(0.1))).params


def test_state_that_gains_leaves_is_refused():
    task = Task(SowsValues(), squared_error, optax.sgd(0.1))
    lift = make_lift("pmap", mesh_of(2))
    with pytest.raises(UserError, match="must keep its shape"):
        lift(make_update_step(task))(
            lift.put_state(state_of(task)), lift.put_batch({"x": X, "y": Y})
        )
