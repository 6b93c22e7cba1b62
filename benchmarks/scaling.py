"""How one workload scales over devices and processes of one machine, and the overhead in it.

python benchmarks/scaling.py [--only=layouts,outside,dispatch] [--rounds=11] [--out=FILE.json]

layouts    one global batch on 1 and 2 processes of 1, 2, 4 and 8 devices: `trainer.train`
           ("loop"), the same compiled step on a batch that stays on the devices ("bare"), and
           that step without its collectives, each device on its own shard ("alone"). Devices
           share the cores, so the fastest "alone" of any layout is the limit of the machine.
           Contestants take turns in one process; ratios are within a round. The fourth one,
           "saves", is the loop with a checkpoint in the middle of each segment
outside    what the loop adds to a step in one process, with a row every 25 steps: "loop" and
           "bare" as above, and "loading", the bare step with each batch gathered and moved to
           the devices, as the loop does
dispatch   the time until a call of a step returns, by leaves and devices, and a fit of
           a + b * leaves * devices
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from typing import Any

from frame import parser_of, recording
from layouts import fit, parse, report, run_layout

LAYOUTS = [(processes, devices) for processes in (1, 2) for devices in (1, 2, 4, 8)]
SEGMENTS = {"mlp": 20, "resnet": 10}
EVERY = 25  # steps per row
LEAVES = (10, 50, 100, 200, 400)
OF_LIMIT = "of the machine's limit"


def config_of(name: str, **changes: Any) -> Any:
    from ml_collections import ConfigDict

    models = {
        "mlp": {"target": "trainer.models.mlp:MLP", "hidden_size": 512, "out_size": 10},
        "resnet": {"target": "trainer.models.resnet:ResNet", "num_classes": 10},
    }
    return ConfigDict(
        {
            "num_steps": 10**9,
            "global_batch_size": {"mlp": 1024, "resnet": 256}[name],
            "model": {**models[name], "axis_name": "batch"},
            "loss": {"target": "trainer.losses:softmax_cross_entropy"},
            "optimizer": {"target": "optax:sgd", "learning_rate": 0.01, "momentum": 0.9},
            "data": {"target": "scaling:load"},
            "eval": {"every_steps": 10**9},
            "checkpoint": {"every_steps": 10**9, "fast_every_secs": 0.0},
            **changes,
        }
    )


def load() -> dict[str, Any]:
    """Random examples, 64 batches of 1024."""
    import numpy as np

    random = np.random.default_rng(0)
    x = random.normal(size=(65536, 8, 8, 1)).astype(np.float32)
    return {"train": {"x": x, "y": random.integers(0, 10, 65536).astype(np.int32)}}


def trainers_loop(config: Any, segment: int, folder: str, rows: int = 2) -> Any:
    """`trainer.train` with `rows` rows in each `segment` steps, and a turn after the first row."""
    import trainer

    config.log_every_steps = segment // rows  # the loop drains at each row

    def contestant(turn: Any) -> None:
        calls = -1

        def stop_requested(step: int, phase: str) -> bool:
            nonlocal calls
            if phase not in ("compile", "train"):
                return False
            calls += 1
            return calls > 0 and calls % segment == segment // rows % segment and turn()

        with contextlib.suppress(trainer.Preempted):
            trainer.train(config, folder, stop_requested=stop_requested)

    return contestant


def bare_loop(config: Any, segment: int, *, alone: bool = False, loading: bool = False) -> Any:
    """The loop's step, repeated on one batch, or `loading` each; `alone` has no collectives."""
    import jax
    from turns import take_steps

    from trainer.config.settings import check
    from trainer.lift.lift import make_lift
    from trainer.step.init import init_state
    from trainer.step.job import build_job
    from trainer.step.task import Recipe
    from trainer.step.update import make_update_step, stack_metrics

    if alone:
        config.model.axis_name = None
    settings = check(config)
    job, lift = build_job(settings), make_lift(settings.lift)
    axis = None if alone else "batch"
    update = make_update_step(job.task, Recipe(flat=True), axis=axis)
    step = lift(stack_metrics(update))
    rows = lift.rows(settings.global_batch_size)
    batch = job.stream.batch_at(0, rows)
    init = jax.jit(lambda x: init_state(job.task, 0, x))
    state = lift.put_state(init(batch["x"][0]))
    on_devices = lift.put_batch(batch)
    numbers = itertools.count()

    def next_batch() -> Any:
        return lift.put_batch(job.stream.batch_at(next(numbers), rows)) if loading else on_devices

    def contestant(turn: Any) -> None:
        nonlocal state
        while True:
            batches = (next_batch() for _ in range(segment))
            state, _ = take_steps(step, state, batches)
            if alone:
                lift.gather(0)  # the slowest process determines the time
            if turn():
                return

    return contestant


def layout_worker(settings: dict[str, Any]) -> None:
    from turns import Turns

    name, folder = settings["model"], settings["folder"]
    segment = SEGMENTS[name]
    turns = Turns(settings["rounds"], warmup=3)
    saving = config_of(name)
    saving.checkpoint.every_steps = segment
    turns.run(
        {
            "loop": trainers_loop(config_of(name), segment, f"{folder}/loop"),
            "bare": bare_loop(config_of(name), segment),
            "alone": bare_loop(config_of(name), segment, alone=True),
            "saves": trainers_loop(saving, segment, f"{folder}/saves"),
        }
    )
    pairs = zip(turns.seconds["saves"], turns.seconds["loop"], strict=True)
    costs = [saved - plain for saved, plain in pairs]
    error = statistics.stdev(costs) / len(costs) ** 0.5
    report(
        settings,
        {
            **{f"{who} ms/step": 1000 * turns.median(who) / segment for who in turns.seconds},
            "loop / bare": turns.ratio("loop", "bare"),
            "alone / loop": turns.ratio("alone", "loop"),
            "seconds a save": statistics.median(costs),
            "seconds a save, standard error": error,
        },
    )


def outside_worker(settings: dict[str, Any]) -> None:
    from turns import Turns

    name = settings["model"]
    turns = Turns(settings["rounds"], warmup=2)
    loop = trainers_loop(config_of(name), EVERY, f"{settings['folder']}/loop", rows=1)
    turns.run(
        {
            "loop": loop,
            "bare": bare_loop(config_of(name), EVERY),
            "loading": bare_loop(config_of(name), EVERY, loading=True),
        }
    )
    found = {f"{who} ms/step": 1000 * turns.median(who) / EVERY for who in turns.seconds}
    for who in ("loop", "loading"):
        pairs = zip(turns.seconds[who], turns.seconds["bare"], strict=True)
        percents = [100 * (time / bare - 1) for time, bare in pairs]
        middle = found[f"percent, {who}"] = statistics.median(percents)
        deviation = statistics.median(abs(percent - middle) for percent in percents)
        # Standard error of the median of normal samples, from their median absolute deviation.
        error = 1.2533 * 1.4826 * deviation / len(percents) ** 0.5
        found[f"percent, {who}, standard error"] = error
    report(settings, found)


def dispatch_worker(settings: dict[str, Any]) -> None:
    """Microseconds until a call returns, with idle devices, by number of leaves."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from trainer.lift.lift import make_lift

    lift = make_lift(settings["lift"])
    found = {}
    for leaves in LEAVES:

        def step(state: Any, batch: Any) -> Any:
            mean = jax.lax.pmean(jnp.mean(batch["x"]), "batch")
            return jax.tree.map(lambda leaf: leaf * 0.9 + mean, state), mean

        state = lift.put_state({f"{n:03}": jnp.zeros(8) for n in range(leaves)})
        rows = np.ones((lift.mesh.size, 1), np.float32)[lift.rows(lift.mesh.size)]
        batch = lift.put_batch({"x": rows})
        lifted = lift(step)
        seconds = []
        for _ in range(settings["calls"]):
            began = time.perf_counter()
            state, _ = lifted(state, batch)
            seconds.append(time.perf_counter() - began)
            jax.block_until_ready(state)
        found[leaves] = 1e6 * statistics.median(seconds[5:])
    report(settings, found)


def worker(settings: dict[str, Any]) -> None:
    workers = {
        "layouts": layout_worker,
        "outside": outside_worker,
        "dispatch": dispatch_worker,
    }
    workers[settings["part"]](settings)


def layouts(rounds: int, models: list[str]) -> list[dict[str, Any]]:
    rows = []
    for model in models:
        of_model = []
        for processes, devices in LAYOUTS:
            job = {"part": "layouts", "model": model, "rounds": rounds}
            found = run_layout(__file__, processes, devices, job)
            of_model.append(
                {"job": model, "processes": processes, "devices of each": devices, **found}
            )
        limit = min(row["alone ms/step"] for row in of_model)
        for row in of_model:
            row[OF_LIMIT] = limit / row["loop ms/step"]
            row["percent in saves, one a minute"] = 100 * row["seconds a save"] / 60
            print(
                f"{model:7} {row['processes']} x {row['devices of each']}:",
                *(f"{who} {row[f'{who} ms/step']:.2f}" for who in ("loop", "bare", "alone")),
                "ms;",
                f"{100 * row[OF_LIMIT]:.0f} % of the limit;",
                f"a save {1000 * row['seconds a save']:.0f}",
                f"+- {1000 * row['seconds a save, standard error']:.0f} ms",
                flush=True,
            )
        rows += of_model
    return rows


def outside(rounds: int, models: list[str]) -> list[dict[str, Any]]:
    rows = []
    for model in models:
        for devices in (1, 2, 8):
            job = {"part": "outside", "model": model, "rounds": rounds}
            found = run_layout(__file__, 1, devices, job)
            rows.append({"job": model, "devices": devices, **found})
            print(
                f"{model:7} {devices} devices: step {found['bare ms/step']:.2f} ms;",
                *(
                    f"{who} {found[f'percent, {who}']:+.1f} %"
                    f" +- {found[f'percent, {who}, standard error']:.1f}"
                    for who in ("loading", "loop")
                ),
                flush=True,
            )
    return rows


def dispatch(calls: int) -> list[dict[str, Any]]:
    rows = []
    for processes in (1, 2):
        for lift in ("pmap", "shard_map"):
            points = []
            for devices in (1, 2, 4, 8):
                job = {"part": "dispatch", "lift": lift, "calls": calls}
                found = run_layout(__file__, processes, devices, job)
                points += [(int(leaves), devices, micros) for leaves, micros in found.items()]
            a, b = fit(
                [[1.0, leaves * devices] for leaves, devices, _ in points],
                [micros for *_, micros in points],
            )
            row = {"processes": processes, "lift": lift, "a, us": a, "b, us": b}
            rows.append({**row, "leaves, devices of each, us a call": points})
            shown = f"{a:.0f} us + {b:.2f} us * leaves * devices of each"
            print(f"{processes} processes, {lift}: {shown}", flush=True)
    return rows


def main() -> None:
    parser = parser_of(__doc__, rounds=11)
    parser.add_argument("--only", default="layouts,outside,dispatch")
    parser.add_argument("--models", default="mlp,resnet")
    options = parse(parser, worker)
    parts, models = options.only.split(","), options.models.split(",")
    with recording(options.out) as record:
        if "layouts" in parts:
            record["layouts"] = layouts(options.rounds, models)
        if "outside" in parts:
            record["outside"] = outside(options.rounds, models)
        if "dispatch" in parts:
            record["dispatch"] = dispatch(20 * options.rounds)


if __name__ == "__main__":
    main()
