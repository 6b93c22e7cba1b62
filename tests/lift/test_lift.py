"""The three lifts give the numbers of the tutorial's own code, at every device count."""

from __future__ import annotations

import functools

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import mesh_of, wide

from trainer.data import tutorial
from trainer.errors import ReplicasDiffer, UserError
from trainer.lift.lift import make_lift
from trainer.lift.replicas import check_replicas
from trainer.lift.unsynced import unsynced_state
from trainer.losses import softmax_cross_entropy, squared_distance_to_input, squared_error
from trainer.models.bias_adder import BiasAdderWithRunningMean
from trainer.models.mlp import MLP
from trainer.models.resnet import ResNet
from trainer.step.init import init_state
from trainer.step.task import Recipe, Task
from trainer.step.update import make_update_step

STEPS = 5
LIFTS = ["vmap", "pmap", "shard_map"]


def make_problem(name):
    """A task and its whole batch."""
    random = np.random.default_rng(1)
    sgd = optax.sgd(0.02)
    if name == "resnet":
        batch = {
            "x": random.uniform(size=(32, 8, 8, 1)).astype(np.float32),
            "y": random.integers(10, size=32).astype(np.int32),
        }
        return Task(ResNet(num_classes=10, features=4), softmax_cross_entropy, sgd, 0.02), batch
    batch = tutorial.linear(seed=0)["train"]
    if name == "bias_adder":
        return Task(BiasAdderWithRunningMean(), squared_distance_to_input, sgd, 0.02), batch
    axis_name = "batch" if name == "mlp" else None
    model = MLP(hidden_size=10, out_size=1, axis_name=axis_name)
    return Task(model, squared_error, sgd, 0.02), batch


@functools.cache
def start_of(name):
    """The initial state of a problem, on the host."""
    task, batch = make_problem(name)
    return jax.device_get(jax.jit(lambda x: init_state(task, 0, x))(batch["x"][0]))


def tutorial_reference(name):
    """The guide's code: one vmap over examples inside the gradient, the state unmapped.

    Different from the guide only in `train=True` and in averaging the state, which the guide's
    `out_axes=None` demands of the model itself.
    """
    task, batch = make_problem(name)
    state = start_of(name)
    variables = {"params": state.params, **state.model_state}
    model_state, params = flax.core.pop(variables, "params")
    opt_state = task.optimizer.init(params)

    @jax.jit
    def update_step(opt_state, params, model_state):
        def batch_loss(params):
            def loss_fn(x, y):
                example = {"x": x[None]} if y is None else {"x": x[None], "y": y[None]}
                outputs, updated = task.model.apply(
                    {"params": params, **model_state},
                    example["x"],
                    train=True,
                    mutable=list(model_state),
                )
                updated = jax.tree.map(lambda leaf: jax.lax.pmean(leaf, "batch"), updated)
                return task.loss(outputs, example)[0], updated

            axes = (0, None if batch.get("y") is None else 0)
            loss, updated = jax.vmap(loss_fn, in_axes=axes, out_axes=(0, None), axis_name="batch")(
                batch["x"], batch.get("y")
            )
            return jnp.mean(loss), updated

        (loss, updated), grads = jax.value_and_grad(batch_loss, has_aux=True)(params)
        updates, new_opt_state = task.optimizer.update(grads, opt_state)
        return new_opt_state, optax.apply_updates(params, updates), updated, loss

    losses = []
    for _ in range(STEPS):
        opt_state, params, model_state, loss = update_step(opt_state, params, model_state)
        losses.append(float(loss))
    return params, model_state, losses


def lifted(name, lift, *, flat, scan=False, unroll=False):
    task, batch = make_problem(name)
    step = lift(make_update_step(task, Recipe(flat=flat)), scan=scan, unroll=unroll)
    state = lift.put_state(start_of(name))
    if scan:
        stacked = {k: np.stack([v] * STEPS) for k, v in batch.items()}
        state, metrics = step(state, lift.put_batch(stacked, scan=True))
        return state.params, state.model_state, lift.read(metrics)["loss"].tolist()
    on_devices = lift.put_batch(batch)
    losses = []
    for _ in range(STEPS):
        state, metrics = step(state, on_devices)
        losses.append(float(lift.read(metrics)["loss"]))
    return state.params, state.model_state, losses


def assert_same(actual, expected, atol=1e-6):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=atol),
        actual,
        expected,
    )


@pytest.mark.parametrize(
    "name", ["mlp", "bias_adder", pytest.param("resnet", marks=pytest.mark.slow)]
)
def test_every_lift_equals_the_tutorial(name):
    params, model_state, losses = tutorial_reference(name)
    start = start_of(name).model_state
    moved = jax.tree.map(lambda a, b: np.abs(a - np.asarray(b)).max(), start, model_state)
    assert max(jax.tree.leaves(moved)) > 0.01, "the running statistics must move"
    for devices in (1, 2, 4, 8):
        of_first_lift = None
        for kind in LIFTS:
            lift = make_lift(kind, mesh_of(devices))
            # Whether the reduction is flat matters only where there is one.
            actual = lifted(name, lift, flat=kind != "shard_map")
            assert_same(actual[:2], (params, model_state))
            of_first_lift = of_first_lift or actual
            assert_same(actual[2], of_first_lift[2])
            # The bias adder's outputs contain the shard's own mean, by its definition, so its
            # loss depends on the shards; its gradient and its averaged state do not.
            if name != "bias_adder":
                assert_same(actual[2], losses)


def test_one_example_per_shard_is_the_vmap_of_the_tutorial():
    _, batch = make_problem("mlp")
    lift = make_lift(f"vmap:{len(batch['x'])}", mesh_of(1))
    assert_same(lifted("mlp", lift, flat=False), tutorial_reference("mlp"))


def test_without_an_axis_name_the_numbers_are_wrong():
    """The comparison above can fail: an unsynchronised BatchNorm fails it."""
    expected = tutorial_reference("mlp")
    for kind in LIFTS:
        with pytest.raises(AssertionError, match="Not equal to tolerance"):
            assert_same(lifted("unsynced", make_lift(kind, mesh_of(8)), flat=True), expected)


def test_unsynchronised_state_is_found_before_a_step_runs():
    def found(name):
        task, batch = make_problem(name)
        return unsynced_state(task, start_of(name), batch, 8)

    assert found("mlp") == []
    assert found("bias_adder") == ["batch_stats/mean"]
    assert [name.split("/")[1] for name in found("unsynced")] == ["BatchNorm_0"] * 2 + [
        "BatchNorm_1"
    ] * 2


@pytest.mark.parametrize("kind", LIFTS)
@pytest.mark.parametrize("unroll", [False, wide(True)])
def test_several_steps_in_one_call_are_the_same_steps(kind, unroll):
    lift = make_lift(kind, mesh_of(4))
    once = lifted("mlp", lift, flat=True)
    assert_same(lifted("mlp", lift, flat=True, scan=True, unroll=unroll), once)


def test_without_an_axis_under_plain_jit():
    """The guide's first form: a state update under jit, no axis anywhere."""
    task, batch = make_problem("bias_adder")
    step = jax.jit(make_update_step(task, axis=None))
    state = start_of("bias_adder")
    for _ in range(STEPS):
        state, _ = step(state, batch)
    params, model_state, _ = tutorial_reference("bias_adder")
    assert_same((state.params, state.model_state), (params, model_state))


def test_in_float64_the_difference_is_rounding():
    with jax.enable_x64(True):
        task, batch = make_problem("mlp")
        batch = {k: v.astype(np.float64) for k, v in batch.items()}
        start = start_of("mlp")
        wide = start.replace(
            params=jax.tree.map(lambda leaf: leaf.astype(np.float64), start.params),
            model_state=jax.tree.map(lambda leaf: leaf.astype(np.float64), start.model_state),
        )
        results = []
        for kind, devices in (("vmap", 1), ("pmap", 8), ("shard_map", 4)):
            lift = make_lift(kind, mesh_of(devices))
            step = lift(make_update_step(task), donate=False)
            state = lift.put_state(wide)
            for _ in range(STEPS):
                state, _ = step(state, lift.put_batch(batch))
            results.append((state.params, state.model_state))
        for result in results[1:]:
            assert_same(result, results[0], atol=1e-14)


@pytest.mark.parametrize("kind", LIFTS)
def test_a_step_compiles_once(kind):
    task, batch = make_problem("mlp")
    lift = make_lift(kind, mesh_of(8))
    traces = []
    update_step = make_update_step(task)

    def counted(state, batch):
        traces.append(1)
        return update_step(state, batch)

    step = lift(counted)
    state = lift.put_state(start_of("mlp"))
    for _ in range(3):
        state, _ = step(state, lift.put_batch(batch))
    assert len(traces) == 1
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(state))


def test_a_batch_that_does_not_divide_is_refused_with_sizes_that_do():
    with pytest.raises(UserError) as error:
        make_lift("pmap", mesh_of(8)).check_divides(100)
    assert "global_batch_size=100" in str(error.value)
    assert "8 devices" in str(error.value)
    assert "96 or 104" in str(error.value)


class CountsPositives(nn.Module):
    """Integer state that depends on the shard, which no mean can mend."""

    @nn.compact
    def __call__(self, x, train=False):
        seen = self.variable("counters", "positives", jnp.zeros, (), jnp.int32)
        if not self.is_initializing():
            seen.value = seen.value + jnp.sum(x > 0.5, dtype=jnp.int32)
        return nn.Dense(1)(x)


@pytest.mark.parametrize("kind", ["pmap", "shard_map"])
def test_replicas_that_differ_are_found_and_named(kind):
    _, batch = make_problem("mlp")
    task = Task(CountsPositives(), squared_error, optax.sgd(0.02))
    lift = make_lift(kind, mesh_of(8))
    state = lift.put_state(jax.jit(lambda x: init_state(task, 0, x))(batch["x"][0]))
    assert set(check_replicas(lift, state).checksums) == {
        "step",
        "rng",
        "params/Dense_0/kernel",
        "params/Dense_0/bias",
        "model_state/counters/positives",
    }
    state, _ = lift(make_update_step(task))(state, lift.put_batch(batch))
    with pytest.raises(ReplicasDiffer, match="counters/positives differs between devices"):
        check_replicas(lift, state)


def test_a_mesh_with_another_axis_is_refused():
    with pytest.raises(UserError, match="exactly one, named 'batch'"):
        make_lift("pmap", jax.sharding.Mesh(np.array(jax.devices()), ("data",)))
