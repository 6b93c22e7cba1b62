"""The learning rate that is reported is the one that the optimizer used."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import mesh_of, wide
from steps import BATCH, run

from trainer.lift.lift import make_lift
from trainer.losses import squared_error
from trainer.models.mlp import MLP
from trainer.state.freezing import freeze
from trainer.step.init import init_state
from trainer.step.precision import LossScale
from trainer.step.task import Recipe, Task
from trainer.step.update import make_update_step

STEPS = ["good", "bad", "good", "bad", "bad", "good", "good"]


def sgd(rate):
    return optax.chain(optax.clip(1.0), optax.sgd(rate))


OPTIMIZERS = {
    "sgd": sgd,
    "adamw": optax.adamw,
    "schedule-free": optax.contrib.schedule_free_sgd,
    "prodigy": optax.contrib.prodigy,  # counts, and scales by no schedule
    "injected": lambda rate: optax.inject_hyperparams(optax.adam)(learning_rate=rate),
    "frozen": lambda rate: freeze(optax.adafactor(rate), ("Dense_0",)),
    "of two": lambda rate: optax.MultiSteps(optax.adam(rate), 2).gradient_transformation(),
    "in parts": lambda rate: optax.partition({"all": optax.lion(rate)}, lambda tree: "all"),
}


MORE = [name for name in OPTIMIZERS if name not in ("sgd", "injected", "of two")]


def rates_of(optimizer, good):
    """The values of the schedule in the optimizer's last update, of `good` in all, op by op."""
    used = []

    def schedule(count):
        used.append(float(rate(count)))
        return used[-1]

    made = optimizer(schedule)
    params = {"Dense_0": jnp.ones((2, 2)), "Dense_1": jnp.ones((2, 2))}
    state = made.init(params)
    for _ in range(good):
        used.clear()
        _, state = made.update(params, state, params)
    return used


def rate(count):
    return 0.5 / (1.0 + count)


@pytest.mark.parametrize("lift", [("pmap", 2), wide(("shard_map", 2)), wide(("vmap", 2))], ids=str)
@pytest.mark.parametrize("name", ["sgd", "injected", "of two", *map(wide, MORE)])
def test_after_skipped_steps(name, lift):
    optimizer = OPTIMIZERS[name]
    frozen = ("Dense_0",) if name == "frozen" else ()
    task = Task(MLP(8, 1), squared_error, optimizer(rate), rate, frozen=frozen)
    recipe = Recipe(skip_nonfinite=True)
    placed = make_lift(lift[0], mesh_of(lift[1]))
    step = placed(make_update_step(task, recipe), donate=False)
    state = placed.put_state(jax.jit(lambda x: init_state(task, 0, x, recipe))(BATCH["x"][0]))
    good = 0
    for kind in STEPS:
        batch = BATCH if kind == "good" else {**BATCH, "x": BATCH["x"] * np.nan}
        state, metrics = step(state, placed.put_batch(batch))
        good += kind == "good"
        if kind == "good":
            with jax.disable_jit():
                used = rates_of(optimizer, good)
            # Of two, the first update uses none.
            found = placed.read(metrics["learning_rate"])
            assert not used or found == pytest.approx(used[-1], rel=1e-6)
    assert int(placed.read(state.step)) == len(STEPS)
    assert good == 4


def test_after_overflows_in_16_bits():
    task = Task(MLP(8, 1), squared_error, sgd(rate), rate, dtype=jnp.float16)
    recipe = Recipe(scale_loss=True)
    state = init_state(task, 0, BATCH["x"][0], recipe)
    huge = LossScale(jnp.float32(2.0**24), jnp.zeros((), jnp.int32))
    state = dataclasses.replace(state, loss_scale=huge)
    for _ in range(30):
        before = state
        state, metrics = run(task, recipe, steps=1, state=state)
        if not np.array_equal(
            state.params["Dense_0"]["kernel"], before.params["Dense_0"]["kernel"]
        ):
            break
    assert int(state.step) > 1, "nothing overflowed"
    assert metrics["learning_rate"] == pytest.approx(0.5)  # of the first update


def test_numbers_and_optimizers_without_a_count():
    task = Task(MLP(8, 1), squared_error, optax.sgd(0.125), 0.125)
    assert run(task, steps=2)[1]["learning_rate"] == 0.125
    uncounted = optax.stateless(lambda grads, params: grads)
    task = Task(MLP(8, 1), squared_error, uncounted, rate)
    assert run(task, steps=3)[1]["learning_rate"] == pytest.approx(rate(2))
