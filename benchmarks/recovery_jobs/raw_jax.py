"""The same job by hand: `raw_jax.py PORT RANK SETTINGS`, one command per process.

In the style of Flax's examples: pmap, a pmean of each gradient, Orbax's CheckpointManager.
"""

from __future__ import annotations

import json
import sys
import time

import flax.linen as nn
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from fault import strike
from flax.training.train_state import TrainState

port, rank, settings = int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.relu(nn.Dense(128)(x))
        return nn.Dense(10)(x)


def update(state, x, y):
    def loss_of(params):
        logits = state.apply_fn({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    grads = jax.lax.pmean(grads, "batch")
    return state.apply_gradients(grads=grads), jax.lax.pmean(loss, "batch")


def main() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(settings["examples"], 64)).astype(np.float32)
    y = random.integers(0, 10, settings["examples"]).astype(np.int32)
    model = MLP()
    params = jax.jit(model.init)(jax.random.key(0), x[:1])["params"]
    tx = optax.sgd(0.05, momentum=0.9)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    options = ocp.CheckpointManagerOptions(save_interval_steps=settings["every"], max_to_keep=3)
    manager = ocp.CheckpointManager(settings["folder"], options=options)
    resumed = manager.latest_step()
    if resumed is not None:
        host = jax.tree.map(np.asarray, state)
        state = manager.restore(resumed, args=ocp.args.StandardRestore(host))
        print(f"restored step {resumed}", flush=True)
    step = resumed or 0
    state = jax.tree.map(lambda leaf: np.asarray(leaf)[None], state)
    run = jax.pmap(update, axis_name="batch")
    first = True
    while step < settings["steps"]:
        rows = random.integers(0, len(x), 32)
        time.sleep(settings["delay"])
        if rank == 1 and step == settings["after"]:
            strike(settings["kind"], settings["mark"])
        state, loss = run(state, x[rows][None], y[rows][None])
        step += 1
        if first:
            first = False
            jax.block_until_ready(loss)
            print("first step done", flush=True)
        if step % 10 == 0:
            print(f"step {step} loss {loss.addressable_data(0)}", flush=True)
        if manager.should_save(step):
            host = jax.tree.map(lambda leaf: np.asarray(leaf.addressable_data(0))[0], state)
            manager.save(step, args=ocp.args.StandardSave(host))
    manager.wait_until_finished()
    manager.close()


if __name__ == "__main__":
    main()
