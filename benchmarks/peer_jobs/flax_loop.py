"""The jobs of `benchmarks/peers.py` by hand: `flax_loop.py RANK SETTINGS`, one per process.

In the style of Flax's ImageNet example: pmap over a replicated TrainState, a pmean of each
gradient, `prefetch_to_device`, metrics kept on the devices and averaged at each log, and
`flax.training.checkpoints`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import jax_utils, traverse_util
from flax.training import checkpoints, train_state
from ml_collections import ConfigDict
from pauses import Pauses
from podlift_config import BATCHES, get_config

from trainer.config.targets import build  # only for the same model class

rank, settings = int(sys.argv[1]), json.loads(sys.argv[2])


class TrainState(train_state.TrainState):
    batch_stats: Any


def create_state(config: ConfigDict, shape: tuple[int, ...]) -> TrainState:
    model = build(config.model.to_dict(), "config.model")
    variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, *shape), np.float32))
    with np.load(settings["weights"]) as arrays:
        params = traverse_util.unflatten_dict(dict(arrays), sep="/")
    tx = optax.sgd(config.optimizer.learning_rate, momentum=config.optimizer.momentum)
    return TrainState.create(
        apply_fn=model.apply, params=params, tx=tx, batch_stats=variables["batch_stats"]
    )


def train_step(state: TrainState, batch: dict[str, jax.Array]) -> Any:
    def loss_fn(params: Any) -> Any:
        logits, updated = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            batch["x"],
            train=True,
            mutable=["batch_stats"],
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()
        return loss, updated

    (loss, updated), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    grads = jax.lax.pmean(grads, axis_name="batch")
    metrics = jax.lax.pmean({"loss": loss}, axis_name="batch")
    return state.apply_gradients(grads=grads, batch_stats=updated["batch_stats"]), metrics


def batches(x: np.ndarray, y: np.ndarray, size: int) -> Any:
    """This process's rows of each batch, split by local device."""
    random = np.random.default_rng(0)
    share = size // jax.process_count()
    start, devices = rank * share, jax.local_device_count()
    while True:
        order = random.permutation(len(x)) if settings["shuffle"] else np.arange(len(x))
        for batch in order.reshape(-1, size):
            rows = batch[start : start + share].reshape(devices, -1)
            yield {"x": x[rows], "y": y[rows]}


def main() -> None:
    if settings["ranks"] > 1:
        jax.distributed.initialize(f"127.0.0.1:{settings['port']}", settings["ranks"], rank)
    config = get_config(settings["config"])
    with np.load(settings["examples"]) as arrays:
        x, y = arrays["x"], arrays["y"]
    state = jax_utils.replicate(create_state(config, x.shape[1:]))
    # The model may not use the axis name, but the gradients always do.
    step_fn = jax.pmap(train_step, axis_name="batch", donate_argnums=0)
    size = BATCHES[settings["config"].partition("-")[0]]
    source = jax_utils.prefetch_to_device(batches(x, y, size), 2)
    pauses = Pauses(settings["address"], settings["segment"], rank)
    collected: list[Any] = []
    for step in range(settings["steps"]):
        if pauses.is_due(step):
            jax.block_until_ready(state)
            pauses.wait()
        state, metrics = step_fn(state, next(source))
        if step == 0:
            jax.block_until_ready(state)
            print("first step done", flush=True)
        collected.append(metrics)
        if (step + 1) % settings["log_every"] == 0:
            # As common_utils.get_metrics does: the first replica of each, and their mean.
            host = jax.device_get([m["loss"].addressable_data(0)[0] for m in collected])
            collected = []
            if rank == 0:
                print(f"step {step + 1} loss {float(np.mean(host))!r}", flush=True)
        if (step + 1) % settings["save_every"] == 0:
            save(state, step + 1)


def save(state: TrainState, step: int) -> None:
    host = jax.device_get(jax.tree.map(lambda leaf: leaf.addressable_data(0)[0], state))
    folder = str(Path(settings["folder"]).absolute())
    checkpoints.save_checkpoint_multiprocess(folder, host, step, keep=3)


if __name__ == "__main__":
    main()
