"""A benchmark's own processes, of so many fake devices each, and what the first of them found."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def run_layout(script: str, processes: int, devices: int, job: dict[str, Any]) -> Any:
    """Runs `script --worker SETTINGS` in each process; returns what rank 0 gives to `tell`.

    Args:
        script: a path.
        processes: how many.
        devices: of each.
        job: more settings, as JSON has them.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environ = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PJRT_NPROC": str(max(2 * devices, os.cpu_count() or 1)),
        "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}",
        "PYTHONWARNINGS": "ignore",
    }
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "told.json"
        settings = {**job, "processes": processes, "port": port, "folder": folder, "out": str(out)}
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


def join(settings: dict[str, Any], *, exchanges: bool = True) -> None:
    """In a worker: joins the others; sums are exchanges where a run has them so, or jax's."""
    import jax

    if settings["processes"] > 1:
        jax.distributed.initialize(
            f"127.0.0.1:{settings['port']}", settings["processes"], settings["rank"]
        )
        if exchanges:
            from launcher.worker import exchange

            exchange.use_where_it_pays()


def tell(settings: dict[str, Any], found: Any) -> None:
    """In a worker: rank 0 hands over what it found, and ends with the others."""
    import jax

    if settings["rank"] == 0:
        Path(settings["out"]).write_text(json.dumps(found))
    if settings["processes"] > 1:
        jax.distributed.shutdown()


def fit(rows: list[list[float]], values: list[float]) -> list[float]:
    """The least squares coefficients of `values` over the columns of `rows`."""
    import numpy as np

    return np.linalg.lstsq(np.array(rows), np.array(values), rcond=None)[0].tolist()
