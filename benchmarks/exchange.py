"""What sums by exchange (`launcher/worker/exchange.py`) give: two processes of one device each.

    python benchmarks/exchange.py [--rounds=15] [--out=FILE.json]

The MLP and ResNet-8 of `scaling.py`, with BatchNorm over both processes and over each alone: the
same compiled step once with jax's sums and once with exchanges, in turns in the same two processes.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from layouts import join, run_layout, tell
from scaling import SEGMENTS, bare_loop, config_of


def worker(settings: dict[str, Any]) -> None:
    from turns import Turns

    from launcher.worker import exchange

    name, rounds = settings["model"], settings["rounds"]
    config = config_of(name)
    if settings["local"]:
        config.model.axis_name = None
    segment = SEGMENTS[name]
    by_exchange = bare_loop(config, segment)

    def begin_by_exchange(turn: Any) -> None:
        exchange.use()  # the other contestant has compiled its step by now
        by_exchange(turn)

    turns = Turns(rounds, warmup=3)
    turns.run({"gloo": bare_loop(config, segment), "exchange": begin_by_exchange})
    found = {f"{who} ms/step": 1000 * turns.median(who) / segment for who in turns.seconds}
    tell(settings, {**found, "gloo / exchange": turns.ratio("gloo", "exchange")})


def main() -> None:
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--out")
    options = parser.parse_args()
    if options.worker:
        settings = json.loads(options.worker)
        join(settings, exchanges=False)
        return worker(settings)
    record: dict[str, Any] = {"cores": os.cpu_count(), "load at the start": os.getloadavg()[0]}
    rows = record["rows"] = []
    for model in SEGMENTS:
        for local in (False, True):
            job = {"model": model, "local": local, "rounds": options.rounds}
            rows.append({"job": model, "local": local, **run_layout(__file__, 2, 1, job)})
            print(rows[-1], flush=True)
    record["load at the end"] = os.getloadavg()[0]
    if options.out:
        Path(options.out).write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
