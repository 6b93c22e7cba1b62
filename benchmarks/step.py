"""Step time: the trainer's loop against a bare loop and a hand-written loop.

    python benchmarks/step.py [--rounds=15] [--only=mlp,resnet,transformer,calls] [--out=FILE.json]

The contestants take turns, segment by segment, in one process on 8 fake CPU devices. Ratios are
medians over the rounds, which makes them robust to noise:

    loop      trainer.train, as a user runs it: data, step, metrics, log rows
    bare      the same compiled step in a plain loop, on one batch that stays on the devices
    by hand   a loop in the style of Flax's ImageNet example: replicated TrainState, pmap over
              stacked arrays, a pmean of each leaf, prefetch_to_device (same model, same numbers)
    K=1, K=100    `config.steps_per_call` of the tiny MLP, on one device and on eight
"""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
from collections import deque

from frame import fake_devices, parser_of, shown, write

DEVICES = 8
fake_devices(DEVICES, override=False)

import jax
import numpy as np
import optax
from flax import jax_utils
from flax.training import train_state
from jax.sharding import Mesh
from ml_collections import ConfigDict
from turns import Turns, take_steps

import trainer
from trainer.config.settings import check
from trainer.lift.in_flight import MAX_IN_FLIGHT
from trainer.lift.lift import make_lift
from trainer.step.init import init_state
from trainer.step.job import build_job
from trainer.step.task import Recipe
from trainer.step.update import make_update_step, stack_metrics


def digits(model: dict, batch: int) -> dict:
    return {
        "global_batch_size": batch,
        "model": model,
        "loss": {"target": "trainer.losses:softmax_cross_entropy"},
        "metrics": {"accuracy": {"target": "trainer.metrics:accuracy"}},
        "data": {"target": "trainer.data.digits:load"},
        "optimizer": {"target": "optax:sgd", "learning_rate": 0.01, "momentum": 0.9},
    }


CASES = {
    "mlp": (
        500,
        {  # the tutorial's job, at half its batch
            "global_batch_size": 64,
            "model": {"target": "trainer.models.mlp:MLP", "hidden_size": 10, "out_size": 1},
            "loss": {"target": "trainer.losses:squared_error"},
            "data": {"target": "trainer.data.tutorial:linear", "num_examples": 32000},
            "optimizer": {"target": "optax:sgd", "learning_rate": 0.01, "momentum": 0.9},
        },
    ),
    "resnet": (
        40,
        digits({"target": "trainer.models.resnet:ResNet", "num_classes": 10}, 256),
    ),
    "transformer": (
        20,
        {
            "global_batch_size": 64,
            "model": {
                "target": "trainer.models.transformer:Transformer",
                "vocab_size": 96,
                "max_length": 64,
                "width": 96,
            },
            "loss": {"target": "trainer.losses:softmax_cross_entropy"},
            "metrics": {"accuracy": {"target": "trainer.metrics:accuracy"}},
            "data": {"target": "trainer.data.text:characters", "length": 64, "vocab_size": 96},
            "optimizer": {"target": "optax:sgd", "learning_rate": 0.01, "momentum": 0.9},
        },
    ),
}


def config_of(case: dict, segment: int, **changes) -> ConfigDict:
    return ConfigDict(
        {
            **case,
            "num_steps": 10**9,
            "log_every_steps": segment,
            "eval": {"every_steps": 10**9},
            "checkpoint": {"every_steps": 10**9},
            **changes,
        }
    )


def mesh_of(devices: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:devices]), ("batch",))


def trainers_loop(config: ConfigDict, segment: int, mesh: Mesh, folder: str):
    """`trainer.train`; a turn ends in its stop hook, which it calls once per call of the step."""

    def contestant(turn) -> None:
        calls, per_call = -1, config.get("steps_per_call", 1)

        def stop_requested(step: int, phase: str) -> bool:
            nonlocal calls
            if phase not in ("compile", "train"):
                return False
            calls += 1
            # The loop drains at each multiple of log_every_steps.
            return calls > 0 and calls * per_call % segment == 0 and turn()

        with contextlib.suppress(trainer.Preempted):
            trainer.train(config, tempfile.mkdtemp(dir=folder), mesh, stop_requested=stop_requested)

    return contestant


def bare_loop(config: ConfigDict, segment: int, mesh: Mesh):
    settings = check(config)
    job, lift = build_job(settings), make_lift(settings.lift, mesh)
    step = lift(stack_metrics(make_update_step(job.task, Recipe(flat=True))))
    batch = job.stream.batch_at(0)
    first = batch["x"][0]
    state = lift.put_state(jax.jit(lambda x: init_state(job.task, 0, x))(first))
    on_devices = lift.put_batch(batch)

    def contestant(turn) -> None:
        nonlocal state
        while True:
            state, _ = take_steps(step, state, itertools.repeat(on_devices, segment))
            if turn():
                return

    return contestant


class HandState(train_state.TrainState):
    batch_stats: dict


def by_hand(config: ConfigDict, segment: int, mesh: Mesh):
    """The loop of Flax's ImageNet example with the same model, loss and data."""
    settings = check(config)
    job = build_job(settings)
    task, devices = job.task, mesh.size
    keys = jax.random.split(jax.random.key(0))

    def init(x):
        return task.model.init({"params": keys[0], "dropout": keys[1]}, x[None])

    variables = jax.jit(init)(job.stream.batch_at(0)["x"][0])
    state = HandState.create(
        apply_fn=task.model.apply,
        params=variables["params"],
        tx=optax.sgd(0.01, momentum=0.9),
        batch_stats=variables.get("batch_stats", {}),
    )

    def train_step(state, batch):
        rng = jax.random.fold_in(keys[1], state.step)

        def loss_fn(params):
            outputs, updated = state.apply_fn(
                {"params": params, "batch_stats": state.batch_stats},
                batch["x"],
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.fold_in(rng, jax.lax.axis_index("batch"))},
            )
            loss = task.loss(outputs, batch).mean()
            return loss, (updated, outputs, loss)

        grads, (updated, outputs, loss) = jax.grad(loss_fn, has_aux=True)(state.params)
        grads = jax.lax.pmean(grads, axis_name="batch")
        metrics = {name: metric(outputs, batch).mean() for name, metric in task.metrics.items()}
        metrics |= {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        metrics = jax.lax.pmean(metrics, axis_name="batch")
        new = state.apply_gradients(grads=grads, batch_stats=updated.get("batch_stats", {}))
        return new, metrics

    step = jax.pmap(
        train_step, axis_name="batch", donate_argnums=0, devices=list(mesh.devices.flat)
    )
    state = jax_utils.replicate(state, list(mesh.devices.flat))

    def batches():
        number = 0
        while True:
            batch = job.stream.batch_at(number)
            yield {k: v.reshape(devices, -1, *v.shape[1:]) for k, v in batch.items()}
            number += 1

    def contestant(turn) -> None:
        nonlocal state
        on_devices = jax_utils.prefetch_to_device(batches(), 2, list(mesh.devices.flat))
        while True:
            window: deque = deque()
            collected = []
            for _ in range(segment):
                state, metrics = step(state, next(on_devices))
                collected.append(metrics)
                window.append(metrics["loss"])
                if len(window) > MAX_IN_FLIGHT:
                    window.popleft().block_until_ready()
            # As common_utils.get_metrics does: one replica of each, to the host.
            host = jax.device_get(
                [jax.tree.map(lambda x: x.addressable_data(0), m) for m in collected]
            )
            np.mean([m["loss"] for m in host])
            if turn():
                return

    return contestant


def main() -> None:
    parser = parser_of(__doc__, rounds=15)
    parser.add_argument("--only", default="mlp,resnet,transformer,calls")
    parser.add_argument("--lift", default="pmap")
    options = parser.parse_args()
    results: list[dict] = []
    folder = tempfile.TemporaryDirectory()

    for name, (segment, case) in CASES.items():
        if name not in options.only.split(","):
            continue
        config, mesh = config_of(case, segment, lift=options.lift), mesh_of(DEVICES)
        turns = Turns(options.rounds)
        turns.run(
            {
                "loop": trainers_loop(config, segment, mesh, folder.name),
                "bare": bare_loop(config, segment, mesh),
                "by hand": by_hand(config, segment, mesh),
            }
        )
        results.append(
            {
                "case": name,
                "devices": DEVICES,
                **{
                    f"{who} ms/step": 1000 * turns.median(who) / segment
                    for who in ("loop", "bare", "by hand")
                },
                "loop / bare": turns.ratio("loop", "bare"),
                "by hand / loop": turns.ratio("by hand", "loop"),
            }
        )
    if "calls" in options.only.split(","):
        segment, case = CASES["mlp"]
        for devices in (1, DEVICES):
            turns = Turns(options.rounds)
            turns.run(
                {
                    f"K={calls}": trainers_loop(
                        config_of(case, 1000, steps_per_call=calls, lift=options.lift),
                        1000,
                        mesh_of(devices),
                        folder.name,
                    )
                    for calls in (1, 100)
                }
            )
            results.append(
                {
                    "case": "mlp steps_per_call",
                    "devices": devices,
                    **{f"K={k} ms/step": turns.median(f"K={k}") for k in (1, 100)},
                    "K=1 / K=100": turns.ratio("K=1", "K=100"),
                }
            )
    print(f"jax {jax.__version__}, {os.cpu_count()} cores, lift {options.lift}")
    for row in results:
        print(shown(row))
    write({"jax": jax.__version__, "cores": os.cpu_count(), "rows": results}, options.out)
    folder.cleanup()


if __name__ == "__main__":
    main()
