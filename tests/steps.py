"""A small batch, and steps on it under each lift."""

from __future__ import annotations

import jax
import numpy as np
from conftest import mesh_of

from trainer.lift.lift import make_lift
from trainer.state.leaves import name_leaves
from trainer.step.init import init_state
from trainer.step.task import Recipe
from trainer.step.update import make_update_step

LIFTS = [("vmap", 1), ("pmap", 1), ("pmap", 4), ("shard_map", 4)]

RANDOM = np.random.default_rng(3)

BATCH = {
    "x": RANDOM.normal(size=(16, 5)).astype(np.float32),
    "y": RANDOM.normal(size=(16, 1)).astype(np.float32),
}


def run(task, recipe=Recipe(), batch=BATCH, lift=("pmap", 4), steps=3, state=None):  # noqa: B008
    """The state, on the host, and the metrics after some steps."""
    lift = make_lift(lift[0], mesh_of(lift[1]))
    step = lift(make_update_step(task, recipe), donate=False)
    if state is None:
        state = jax.jit(lambda x: init_state(task, 0, x, recipe))(batch["x"][0])
    state, metrics = lift.put_state(state), None
    for _ in range(steps):
        state, metrics = step(state, lift.put_batch(batch))
    return jax.device_get(state), lift.read(metrics)


def assert_close(a, b, atol):
    a, b = name_leaves(a), name_leaves(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=0, atol=atol, err_msg=name)
