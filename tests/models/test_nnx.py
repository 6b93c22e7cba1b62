"""NNX modules as models: the numbers of Linen, in every lift, and states that are saved."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import mesh_of
from flax import traverse_util
from runs import assert_bitwise_equal, digits

import trainer
from trainer.config.settings import check
from trainer.data.digits import load
from trainer.errors import UserError
from trainer.lift.lift import make_lift
from trainer.losses import softmax_cross_entropy
from trainer.models.mlp import MLP
from trainer.state.leaves import name_leaves
from trainer.step.evaluate import make_eval_step
from trainer.step.init import init_state
from trainer.step.job import build_job, make_init
from trainer.step.task import Task
from trainer.step.update import make_update_step

# Where a leaf of `trainer.models.mlp:MLP` is in `nnx_models:MLP`.
PLACES = {
    "Dense_0": ("layers", "0"),
    "Dense_1": ("layers", "1"),
    "BatchNorm_0": ("norms", "0"),
    "BatchNorm_1": ("norms", "1"),
    "Dense_2": ("head",),
}


def config_of(steps=20, target="MLP", **arguments):
    config = digits(steps)
    if target == "MLP":
        arguments = {"in_size": 64, "hidden_size": 16, "out_size": 10, **arguments}
    config.model = {"target": f"nnx_models:{target}", **arguments}
    return config


def placed(linen):
    """Linen's leaves under the names of the NNX model."""
    flat = {
        (*PLACES[name], leaf): value
        for name, branch in linen.items()
        for leaf, value in branch.items()
    }
    return traverse_util.unflatten_dict(flat)


def assert_close(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), actual, expected)


def train_both(kind):
    """Five steps and an evaluation of both; (state, metrics, sums) of Linen's and of NNX's."""
    job = build_job(check(config_of()))
    data = {name: array[:64] for name, array in load()["train"].items()}
    linen = Task(MLP(16, 10), softmax_cross_entropy, optax.sgd(0.1, momentum=0.9))
    start = jax.device_get(jax.jit(lambda x: init_state(linen, 0, x))(data["x"][0]))
    nnx_start = jax.device_get(make_init(job, 0)())
    params = placed(start.params)
    assert jax.tree.structure(params) == jax.tree.structure(nnx_start.params)
    nnx_task = Task(job.task.model, linen.loss, linen.optimizer)
    nnx_start = nnx_start.replace(
        params=params, opt_state=jax.device_get(linen.optimizer.init(params))
    )
    lift = make_lift(kind, mesh_of(4))
    for task, state in ((linen, start), (nnx_task, nnx_start)):
        update, evaluate = lift(make_update_step(task)), lift(make_eval_step(task), donate=False)
        state, batch, metrics = lift.put_state(state), lift.put_batch(data), []
        for _ in range(5):
            state, values = update(state, batch)
            metrics.append(values)
        sums = evaluate(state, batch)
        yield lift.read(state), lift.read(metrics), lift.read(sums)


@pytest.mark.parametrize(
    "kind",
    [
        "pmap",
        pytest.param("shard_map", marks=pytest.mark.slow),
        pytest.param("vmap:4", marks=pytest.mark.slow),
    ],
)
def test_the_numbers_are_those_of_linen(kind):
    (linen, linen_metrics, linen_sums), (nnx, metrics, sums) = train_both(kind)
    stats = nnx.model_state["batch_stats"]
    assert_close(nnx.params, placed(linen.params))
    assert_close(stats, placed(linen.model_state["batch_stats"]))
    assert_close([m["loss"] for m in metrics], [m["loss"] for m in linen_metrics])
    assert_close(sums["loss"][0] / 64, linen_sums["loss"][0] / 64)
    assert nnx.model_state["Counter"] == {"calls": 5}
    assert (stats["norms"]["0"]["mean"] != 0).any()


@pytest.mark.slow
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one_with_dropout(tmp_path):
    mesh = mesh_of(4)
    whole = trainer.train(config_of(dropout=0.3), tmp_path / "whole", mesh)
    halves = config_of(dropout=0.3)
    halves.stop_at_step = 9
    trainer.train(halves, tmp_path / "halves", mesh)
    result = trainer.train(config_of(dropout=0.3), tmp_path / "halves", mesh)
    assert_bitwise_equal(result.state, whole.state)
    assert set(name_leaves(whole.state.params)) == {
        *(f"layers/{n}/{leaf}" for n in (0, 1) for leaf in ("bias", "kernel")),
        *(f"norms/{n}/{leaf}" for n in (0, 1) for leaf in ("bias", "scale")),
        "head/bias",
        "head/kernel",
    }
    loaded = trainer.load(tmp_path / "whole")
    np.testing.assert_array_equal(
        loaded["params"]["layers"]["0"]["kernel"], whole.state.params["layers"]["0"]["kernel"]
    )
    assert whole.metrics["eval/accuracy"] > 0.3


def test_dropout_differs_between_layers_and_calls_and_is_off_in_evaluation():
    task = build_job(check(config_of(dropout=0.5))).task
    state = jax.jit(lambda x: init_state(task, 0, x))(jnp.zeros(64))
    batch = {"x": jnp.ones((8, 64))}

    def outputs(train, seed):
        def apply(batch):
            rng = jax.random.key(seed)
            return task.apply(state.params, state.model_state, batch, train=train, rng=rng)[0]

        return jax.vmap(apply, axis_name="batch")(jax.tree.map(lambda leaf: leaf[None], batch))

    assert (outputs(True, 0) != outputs(True, 1)).any()
    np.testing.assert_array_equal(outputs(True, 0), outputs(True, 0))
    np.testing.assert_array_equal(outputs(False, 0), outputs(False, 1))
    variables = {"params": state.params, **state.model_state}
    drawn = task.model.bind(variables, rngs={"dropout": jax.random.key(0)})._values()
    keys = [jax.random.key_data(leaf).tolist() for path, leaf in drawn.items() if path[-1] == "key"]
    assert len(keys) == 2
    assert keys[0] != keys[1]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("Growing", "state mean is created by a call of the model"),
        ("Meddling", "a call of the model changes its parameter layer/bias"),
        ("WithKeys", "keys contains random keys"),
        ("fixed", "built a Linear, not a Linen module"),
    ],
)
def test_state_that_cannot_be_kept_is_refused(tmp_path, target, expected):
    with pytest.raises(UserError, match=expected):
        trainer.train(config_of(target=target), tmp_path, mesh_of(2))
