"""The speed-up from sums by exchange (`launcher/worker/exchange.py`), on two processes.

    python benchmarks/exchange.py [--rounds=15] [--out=FILE.json]

The MLP and ResNet-8 of `scaling.py`, one device per process, with BatchNorm over both processes
and over each alone. The same step, compiled once with jax's sums and once with exchanges, takes
turns in the same two processes.
"""

from __future__ import annotations

from typing import Any

from frame import parser_of, recording
from layouts import parse, report, run_layout
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
    report(settings, {**found, "gloo / exchange": turns.ratio("gloo", "exchange")})


def main() -> None:
    parser = parser_of(__doc__, rounds=15)
    options = parse(parser, worker, exchanges=False)
    with recording(options.out) as record:
        rows = record["rows"] = []
        for model in SEGMENTS:
            for local in (False, True):
                job = {"model": model, "local": local, "rounds": options.rounds}
                rows.append({"job": model, "local": local, **run_layout(__file__, 2, 1, job)})
                print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
