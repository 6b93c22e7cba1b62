"""podlift against its peers: torchrun's DDP, Lightning Fabric and the loop of Flax's example.

    python benchmarks/peers.py --torch_python=PATH [--only=agree,steps,saves,startup]
        [--rounds=15] [--out=FILE.json]

Each framework runs the same jobs (`benchmarks/peer_jobs/`): an MLP of 64-512-512-10 with BatchNorm
on a batch of 1024, and ResNet-8 on 256 images of 8x8, with SGD with momentum and with weights and
examples from one file. `benchmarks/install_torch.sh` prints PATH; without it, torch is left out.

    agree      the losses of 20 steps, unshuffled, against podlift's with the same kind of
               BatchNorm. A difference above 1e-5 is an error
    steps      milliseconds per step and peak memory of each process. All contestants are alive at
               once and take turns, one segment each; ratios are within a round
    saves      the cost of a checkpoint: a segment with one in its middle minus the next without
               one, which includes the time of writes in the background
    startup    from the command to the end of the first step; "cold" has an empty compilation cache

torch has no synchronised BatchNorm on CPU, and Flax's example does not use it: "local" is BatchNorm
over the examples of one device, in podlift too. Each of two processes has a core. In-memory
checkpoints (`checkpoint.fast_every_secs`) are off: `benchmarks/copies.py` measures their cost.
"""

from __future__ import annotations

import json
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from contestants import BATCHES, NEVER, RIVALS, Bench, Contestant, Taking, settings_of, started
from frame import parser_of, recording, versions, write
from turns import Turns

SEGMENTS = {"mlp": 40, "wide": 40, "resnet": 20}  # steps in a turn
TOLERANCE = 1e-5


def losses(bench: Bench, contestant: Contestant, model: str, steps: int) -> list[float]:
    """Of each of the first steps."""
    job = settings_of(bench, contestant, steps=steps, log_every=1, shuffle=False)
    with started(bench, contestant, bench.commands(contestant, model, job)) as (processes, log):
        for process in processes:
            if process.wait(300):
                raise SystemExit(f"{contestant.name} failed:\n{log.read_text()}")
        text = log.read_text()
    if contestant.who == "podlift":
        rows = map(json.loads, (Path(job["folder"]) / "metrics.jsonl").read_text().splitlines())
        return [row["train/loss"] for row in rows if "train/loss" in row]
    return [float(loss) for loss in re.findall(r"^step \d+ loss (\S+)$", text, re.MULTILINE)]


def agree(bench: Bench, rounds: int) -> list[dict[str, Any]]:
    """The largest difference of losses from podlift's with the same kind of BatchNorm."""
    rows, steps = [], 20
    for model in ("mlp", "resnet"):
        found = {c.name: losses(bench, c, model, steps) for c in bench.contestants()}
        for contestant in bench.contestants():
            mine = found[contestant.name]
            # One device normalises over all examples, like several with synchronised BatchNorm.
            of = "podlift 2 processes local" if contestant.local else "podlift 1 process"
            assert len(mine) == len(found[of]) == steps, (contestant.name, mine)
            apart = max(abs(a - b) for a, b in zip(mine, found[of], strict=True))
            row = {"job": model, "who": contestant.name, "first loss": mine[0]}
            rows.append({**row, "last loss": mine[-1], "apart": apart, "against": of})
            print(f"{model:8} {contestant.name:32} loss {mine[0]:.6f} to {mine[-1]:.6f}"
                  f"  at most {apart:.1e} from {of}", flush=True)  # fmt: skip
            if apart > TOLERANCE:
                raise SystemExit("the losses differ")
    return rows


def steps(bench: Bench, rounds: int) -> list[dict[str, Any]]:
    rows = []
    for model in ("mlp", "resnet"):
        segment = SEGMENTS[model]
        taking = {c.name: Taking(bench, c, model, NEVER, segment) for c in bench.contestants()}
        turns = Turns(rounds)
        turns.run(taking)
        for name, contestant in taking.items():
            seconds = turns.median(name) / segment
            row: dict[str, Any] = {
                "job": model,
                "who": name,
                "ms/step": 1000 * seconds,
                "examples/s": BATCHES[model] / seconds,
                "peak MB a process": [round(peak / 1e6) for peak in contestant.peak_bytes],
            }
            shown = f"{model:8} {name:32} {row['ms/step']:8.2f} ms {row['examples/s']:9.0f}/s"
            shown += f"  {row['peak MB a process']} MB"
            if name in RIVALS:
                row["podlift"] = RIVALS[name]
                row["it / podlift"] = turns.ratio(name, RIVALS[name])
                shown += f"  {row['it / podlift']:.2f} x {RIVALS[name]}"
            rows.append(row)
            print(shown, flush=True)
    return rows


def saves(bench: Bench, rounds: int) -> list[dict[str, Any]]:
    """The cost of a checkpoint, with two processes and unsynchronised BatchNorm."""
    rows = []
    for model in ("mlp", "wide"):
        segment = 2 * SEGMENTS[model]
        contestants = bench.contestants(keep=lambda c: c.ranks == 2 and c.local)
        # The first segment is half as long; from the third on, every other one contains a save.
        turns = Turns(2 * rounds, warmup=4)
        turns.run({c.name: Taking(bench, c, model, 2 * segment, segment) for c in contestants})
        for contestant in contestants:
            times = turns.seconds[contestant.name]
            costs = [saved - plain for saved, plain in zip(times[::2], times[1::2], strict=True)]
            cost = statistics.median(costs)
            spread = statistics.stdev(costs) / len(costs) ** 0.5 if len(costs) > 1 else float("nan")
            state = bench.state_bytes(model)
            rows.append(
                {
                    "job": model,
                    "who": contestant.name,
                    "state MB": state / 1e6,
                    "ms a save": 1000 * cost,
                    "standard error": 1000 * spread,
                    "plain segment, s": statistics.median(times[1::2]),
                }
            )
            print(f"{model:8} {contestant.name:32} {1000 * cost:7.1f} ms a save"
                  f" +- {1000 * spread:.1f}, {state / 1e6:.1f} MB", flush=True)  # fmt: skip
    return rows


def first_step(bench: Bench, contestant: Contestant, model: str, cache: str) -> float:
    """Seconds from the command to the end of the first step."""
    job = settings_of(bench, contestant)
    commands = bench.commands(contestant, model, job)
    began = time.monotonic()
    with started(bench, contestant, commands, cache) as (processes, log):
        while "first step done" not in log.read_text():
            if time.monotonic() - began > 120 or any(p.poll() for p in processes):
                raise SystemExit(f"{contestant.name} failed:\n{log.read_text()}")
            time.sleep(0.005)
        seconds = time.monotonic() - began
        for process in processes:
            process.wait(60)
    return seconds


def startup(bench: Bench, rounds: int) -> list[dict[str, Any]]:
    rows = []
    for model in ("mlp", "resnet"):
        contestants = bench.contestants(keep=lambda c: c.local or c.devices == c.ranks == 1)
        found: dict[str, list[float]] = {}
        for number in range(min(rounds, 5)):
            for contestant in contestants:
                for state in ("cold", "warm"):
                    if state == "cold" or contestant.who in ("podlift", "flax"):
                        cache = f"cache-{contestant.name.replace(' ', '-')}-{number}"
                        seconds = first_step(bench, contestant, model, cache)
                        found.setdefault(f"{contestant.name}, {state}", []).append(seconds)
        for who, seconds in found.items():
            rows.append({"job": model, "who": who, "s": statistics.median(seconds)})
            print(f"{model:8} {who:38} {rows[-1]['s']:6.2f} s", flush=True)
    return rows


PARTS = {"agree": agree, "steps": steps, "saves": saves, "startup": startup}


def all_versions(torch_python: str | None) -> dict[str, str]:
    found = versions("jax", "flax", "optax")
    if torch_python:
        code = "import importlib.metadata as m; print(m.version('torch'), m.version('{}'))"
        command = [torch_python, "-c", code.format("lightning-fabric")]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found["torch"], found["lightning-fabric"] = shown.split()
    return found


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    parser = parser_of(__doc__, rounds=15)
    parser.add_argument("--only", default="agree,steps,saves,startup")
    parser.add_argument("--torch_python", help="a Python that has torch")
    options = parser.parse_args()
    parts = options.only.split(",")
    with (
        recording(options.out, versions=all_versions(options.torch_python)) as record,
        tempfile.TemporaryDirectory() as name,
    ):
        bench = Bench(Path(name), options.torch_python)
        for part in parts:
            record[part] = PARTS[part](bench, options.rounds)
            write(record, options.out)  # a later part may fail


if __name__ == "__main__":
    main()
