"""Runs a benchmark's worker in several processes of fake devices, and returns rank 0's result."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from frame import cpu_environ, free_port


def run_layout(script: str, processes: int, devices: int, job: dict[str, Any]) -> Any:
    """Runs `script --worker SETTINGS` in each process; returns what rank 0 passes to `report`.

    Args:
        script: path of the benchmark.
        processes: number of processes.
        devices: fake devices of each process.
        job: settings for the worker, as JSON can hold them.

    Raises:
        SystemExit: a process failed; the message holds what all of them printed.
    """
    environ = cpu_environ(devices, path=Path(__file__).parent) | {"PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        settings = {**job, "processes": processes, "port": free_port()}
        settings |= {"folder": folder, "out": str(out)}
        log = Path(folder) / "log"
        started = []
        with log.open("w") as output:
            for rank in range(processes):
                text = json.dumps({**settings, "rank": rank})
                command = [sys.executable, script, "--worker", text]
                started.append(subprocess.Popen(command, env=environ, stdout=output, stderr=output))
        try:
            codes = [process.wait(600) for process in started]
        finally:
            for process in started:
                process.kill()
        if any(codes):
            raise SystemExit(f"{processes} x {devices} {job}: {codes}\n{log.read_text()}")
        return json.loads(out.read_text())


def parse(
    parser: argparse.ArgumentParser,
    worker: Callable[[dict[str, Any]], None],
    *,
    exchanges: bool = True,
) -> argparse.Namespace:
    """Parses the command line; in a process that `run_layout` started, runs `worker` and exits.

    Args:
        parser: without `--worker`, which this adds.
        worker: takes the settings that `run_layout` passed.
        exchanges: sums between processes go by exchange where a run has them so; else jax's own.
    """
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.worker:
        return options
    settings = json.loads(options.worker)
    _join(settings, exchanges)
    worker(settings)
    sys.exit()


def _join(settings: dict[str, Any], exchanges: bool) -> None:
    import jax

    if settings["processes"] > 1:
        jax.distributed.initialize(
            f"127.0.0.1:{settings['port']}", settings["processes"], settings["rank"]
        )
        if exchanges:
            from launcher.worker import exchange

            exchange.use_where_it_pays()


def report(settings: dict[str, Any], found: Any) -> None:
    """In a worker: rank 0 writes the result for `run_layout`; all processes shut down together."""
    import jax

    if settings["rank"] == 0:
        Path(settings["out"]).write_text(json.dumps(found))
    if settings["processes"] > 1:
        jax.distributed.shutdown()


def fit(rows: list[list[float]], values: list[float]) -> list[float]:
    """The least squares coefficients of `values` over the columns of `rows`."""
    import numpy as np

    return np.linalg.lstsq(np.array(rows), np.array(values), rcond=None)[0].tolist()
