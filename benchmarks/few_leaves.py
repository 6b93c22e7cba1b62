"""Keeping the state in a few flat buffers between steps: an experiment.

    python benchmarks/few_leaves.py [--rounds=9] [--out=FILE.json]

Each leaf adds to the time of a call, on each device (`benchmarks/scaling.py`, "dispatch"). The
contestants run the trainer's step on one batch that stays on the devices, on one process of 8
devices and on two processes of one. They differ in how the state is stored:

    leaves     as the trainer stores it
    packed     one buffer per dtype between steps; the step splits it and joins it again
    flat       the same, and the optimizer updates the flat buffers of params and momentum
               (`optax.flatten`), which is correct for an elementwise optimizer such as SGD

"400 leaves" is a chain of 100 Dense layers, 8 wide, with their momentum.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from frame import parser_of, recording, shown
from layouts import parse, report, run_layout

LAYOUTS = [(1, 8), (2, 1)]
SEGMENTS = {"mlp": 20, "resnet": 10, "400 leaves": 20}


def config_of(name: str) -> Any:
    from scaling import config_of

    if name != "400 leaves":
        return config_of(name)
    config = config_of("mlp")
    config.global_batch_size = 64
    config.model = {
        "target": "trainer.models.mlp:PlainMLP",
        "hidden_sizes": (8,) * 99,
        "out_size": 10,
    }
    return config


def packed_step(step: Any, state: Any) -> tuple[Any, Any]:
    """The step on a state as one buffer a dtype, and the first such state."""
    import jax
    import jax.numpy as jnp

    leaves, treedef = jax.tree.flatten(state)
    dtypes = sorted({str(leaf.dtype) for leaf in leaves})

    def pack(state: Any) -> list[Any]:
        leaves = jax.tree.leaves(state)
        return [
            jnp.concatenate([jnp.ravel(leaf) for leaf in leaves if str(leaf.dtype) == dtype])
            for dtype in dtypes
        ]

    def unpack(buffers: list[Any]) -> Any:
        offsets = dict.fromkeys(dtypes, 0)
        unpacked = []
        for leaf in leaves:
            dtype = str(leaf.dtype)
            start = offsets[dtype]
            offsets[dtype] += leaf.size
            buffer = buffers[dtypes.index(dtype)]
            unpacked.append(buffer[start : start + leaf.size].reshape(leaf.shape))
        return jax.tree.unflatten(treedef, unpacked)

    def packed(buffers: list[Any], batch: Any) -> tuple[list[Any], Any]:
        state, metrics = step(unpack(buffers), batch)
        return pack(state), metrics

    return packed, jax.jit(pack)(state)


def contestant_of(kind: str, config: Any, segment: int) -> Any:
    import jax
    import optax
    from turns import take_steps

    from trainer.config.settings import check
    from trainer.lift.lift import make_lift
    from trainer.step.init import init_state
    from trainer.step.job import build_job
    from trainer.step.task import Recipe
    from trainer.step.update import make_update_step, stack_metrics

    settings = check(config)
    job, lift = build_job(settings), make_lift(settings.lift)
    task = job.task
    if kind == "flat":
        task = dataclasses.replace(task, optimizer=optax.flatten(task.optimizer))
    update = stack_metrics(make_update_step(task, Recipe(flat=True)))
    batch = job.stream.batch_at(0, lift.rows(settings.global_batch_size))
    state = jax.jit(lambda x: init_state(task, 0, x))(batch["x"][0])
    leaves = len(jax.tree.leaves(state))
    if kind != "leaves":
        update, state = packed_step(update, state)
    step, state = lift(update), lift.put_state(state)
    on_devices = lift.put_batch(batch)
    losses: list[float] = []

    def contestant(turn: Any) -> None:
        nonlocal state
        while True:
            state, metrics = take_steps(step, state, itertools.repeat(on_devices, segment))
            losses.append(float(lift.read(metrics)[-1]))
            if turn():
                return

    return contestant, losses, leaves


def worker(settings: dict[str, Any]) -> None:
    import jax
    from turns import Turns

    name = settings["model"]
    segment = SEGMENTS[name]
    made = {
        kind: contestant_of(kind, config_of(name), segment) for kind in ("leaves", "packed", "flat")
    }
    turns = Turns(settings["rounds"])
    turns.run({kind: contestant for kind, (contestant, *_) in made.items()})
    for _, losses, _ in made.values():
        apart = abs(losses[0] - made["leaves"][1][0])
        assert apart < 1e-4, {kind: losses[0] for kind, (_, losses, _) in made.items()}
    report(
        settings,
        {
            "leaves": made["leaves"][2],
            **{f"{kind} ms/step": 1000 * turns.median(kind) / segment for kind in made},
            "packed / leaves": turns.ratio("packed", "leaves"),
            "flat / leaves": turns.ratio("flat", "leaves"),
            "jax": jax.__version__,
        },
    )


def main() -> None:
    parser = parser_of(__doc__, rounds=9)
    options = parse(parser, worker)
    with recording(options.out) as record:
        rows = record["rows"] = []
        for model in SEGMENTS:
            for processes, devices in LAYOUTS:
                job = {"model": model, "rounds": options.rounds}
                found = run_layout(__file__, processes, devices, job)
                rows.append(
                    {"job": model, "processes": processes, "devices of each": devices, **found}
                )
                print(shown(rows[-1]), flush=True)


if __name__ == "__main__":
    main()
