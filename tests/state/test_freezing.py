"""Frozen params stay bit for bit, in every lift, and cost no gradient."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import mesh_of, wide
from runs import digits
from steps import BATCH, LIFTS, assert_close, run

import trainer
from launcher.planning.hlo import find_collectives
from trainer.errors import UserError
from trainer.lift.lift import make_lift
from trainer.losses import squared_error
from trainer.models.mlp import MLP
from trainer.state.freezing import freeze
from trainer.state.leaves import name_leaves
from trainer.step.init import init_state
from trainer.step.task import Recipe, Task
from trainer.step.update import make_update_step

FROZEN = ("Dense_0", "BatchNorm_1/scale")
# Not Adam: it turns the rounding noise in the gradient of a bias in front of BatchNorm into steps.
SGD = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.05, momentum=0.9))
WHOLE = Task(MLP(hidden_size=8, out_size=1), squared_error, SGD, 0.05)


def frozen(task=WHOLE, parts=FROZEN):
    return dataclasses.replace(task, optimizer=freeze(task.optimizer, parts), frozen=parts)


def is_frozen(name):
    return name.startswith("Dense_0/") or name == "BatchNorm_1/scale"


def reference(steps):
    """By hand, on the whole batch: all gradients are taken, those of frozen leaves left out."""
    model = MLP(hidden_size=8, out_size=1, axis_name=None)
    state = init_state(WHOLE, 0, BATCH["x"][0])
    params, stats = state.params, state.model_state

    def loss(params, stats):
        outputs, stats = model.apply(
            {"params": params, **stats}, BATCH["x"], train=True, mutable=["batch_stats"]
        )
        return jnp.mean(squared_error(outputs, BATCH)), stats

    def trained(tree):
        return {name: leaf for name, leaf in name_leaves(tree).items() if not is_frozen(name)}

    opt_state = SGD.init(trained(params))
    for _ in range(steps):
        grads, stats = jax.grad(loss, has_aux=True)(params, stats)
        grads = trained(grads)
        norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in grads.values()))
        grads = jax.tree.map(lambda g, norm=norm: g * jnp.minimum(1.0, 0.1 / norm), grads)
        updates, opt_state = SGD.update(grads, opt_state, trained(params))
        leaves = name_leaves(params) | optax.apply_updates(trained(params), updates)
        params = jax.tree.unflatten(jax.tree.structure(params), leaves.values())
    return params, stats, norm


@pytest.mark.parametrize("lift", [LIFTS[0], *map(wide, LIFTS[1:])], ids=str)
def test_the_other_params_are_trained_as_if_alone(lift):
    params, stats, norm = reference(4)
    recipe = Recipe(clip_norm=0.1, ema_decay=0.9)
    state, metrics = run(frozen(), recipe, lift=lift, steps=4)
    assert_close(state.params, params, 1e-6)
    assert_close(state.model_state, stats, 1e-6)  # statistics move, also those of a frozen module
    assert metrics["grad_norm"] == pytest.approx(float(norm), abs=1e-6)
    begun = name_leaves(init_state(WHOLE, 0, BATCH["x"][0]).params)
    now, averaged = name_leaves(state.params), name_leaves(state.ema)
    for name in begun:
        assert np.array_equal(now[name], begun[name]) == is_frozen(name)
        assert np.array_equal(averaged[name], now[name]) == is_frozen(name)


def test_frozen_params_stay_unchanged_with_accumulation_too():
    parts = run(frozen(), Recipe(accum_steps=2, skip_nonfinite=True), steps=2)[0]
    begun = name_leaves(init_state(WHOLE, 0, BATCH["x"][0]).params)
    for name, leaf in name_leaves(parts.params).items():
        assert np.array_equal(leaf, begun[name]) == is_frozen(name)


def test_the_optimizer_keeps_no_state_of_frozen_params_and_other_names_stay():
    adam = dataclasses.replace(WHOLE, optimizer=optax.adamw(0.05))
    whole = name_leaves(init_state(adam, 0, BATCH["x"][0]).opt_state)
    found = name_leaves(init_state(frozen(adam), 0, BATCH["x"][0]).opt_state)
    left_out = {f"0/{kind}/{n}" for kind in ("mu", "nu") for n in FROZEN}
    assert set(found) == {n for n in whole if not any(n.startswith(part) for part in left_out)}


@pytest.mark.parametrize("flat", [False, True])
def test_gradients_of_frozen_params_are_neither_computed_nor_reduced(flat):
    lift = make_lift("shard_map", mesh_of(2))
    batch = {"x": np.ones((16, 500), np.float32), "y": np.ones((16, 1), np.float32)}

    def cost(task):
        state = lift.put_state(init_state(task, 0, batch["x"][0]))
        step = lift(make_update_step(task, Recipe(flat=flat)), donate=False)
        compiled = step.lower(state, lift.put_batch(batch)).compile()
        sent = sum(c.bytes for c in find_collectives(compiled.as_text()) if c.kind == "all-reduce")
        return compiled.cost_analysis()["flops"], sent

    sgd = dataclasses.replace(WHOLE, optimizer=optax.sgd(0.05))
    flops, sent = cost(sgd)
    fewer_flops, less_sent = cost(frozen(sgd, ("Dense_0",)))
    kernel = 500 * 8
    assert sent - less_sent >= 4 * (kernel + 8)
    assert flops - fewer_flops > 2 * 8 * kernel  # of the 8 examples of a shard


def test_a_negative_zero_stays_one():
    params = {"a": jnp.array([-0.0, 0.0]), "b": jnp.ones(2)}
    held = freeze(optax.sgd(1.0), ("a",))
    updates, _ = held.update({"b": jnp.ones(2)}, held.init(params), params)
    found = optax.apply_updates(params, updates)
    assert np.signbit(found["a"]).tolist() == [True, False]
    assert found["b"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("freeze", "told"),
    [
        (
            "Dense_0, Dens_1",
            r"'Dens_1' matches no part[^\n]*\n  HINT: did you mean Dense_1",
        ),
        ("Dense", r"'Dense' matches no part"),  # a whole name, not how one begins
        ("backbone", r"HINT: there are BatchNorm_0, "),
        ("Dense_0,Dense_1,Dense_2,BatchNorm_0,BatchNorm_1", "leaves nothing to train"),
    ],
)
def test_a_path_that_matches_nothing_is_an_error(tmp_path, freeze, told):
    with pytest.raises(UserError, match=told):
        trainer.train(digits(5, freeze=freeze), tmp_path / "run", mesh_of(2))
    assert not (tmp_path / "run").exists()


def test_a_resume_changes_what_is_frozen_only_if_allowed(tmp_path):
    run_of = tmp_path / "run"
    state = trainer.train(digits(10, freeze="Dense_0"), run_of, mesh_of(2)).state
    with pytest.raises(UserError, match=r"allow=freeze,missing to resume anyway") as refused:
        trainer.train(digits(20), run_of, mesh_of(2))
    assert '  freeze: "Dense_0" -> ""' in str(refused.value)
    assert "opt_state/0/mu/Dense_0/kernel  missing" in str(refused.value)
    assert "Dense_1" not in str(refused.value)
    config = digits(20)
    config.checkpoint.allow = "freeze,missing"
    after = trainer.train(config, run_of, mesh_of(2)).state
    begun = np.asarray(state.params["Dense_0"]["kernel"])
    assert not np.array_equal(np.asarray(after.params["Dense_0"]["kernel"]), begun)
