"""The frame of every benchmark: options, the environment of fake CPU devices, the JSON record.

Nothing here imports jax, so that a benchmark can ask for its devices first.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def parser_of(description: str | None, *, rounds: int | None = None) -> argparse.ArgumentParser:
    """A parser with `--out` and, with a default, `--rounds`; `--help` shows the description."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=raw)
    parser.add_argument("--out", metavar="FILE.json", help="also write the result to this file")
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds, help=f"default: {rounds}")
    return parser


def cpu_environ(devices: int | None = None, *, path: str | Path = "") -> dict[str, str]:
    """The environment of a process on fake CPU devices that imports this checkout.

    Args:
        devices: how many; None for the backend's default.
        path: more folders for PYTHONPATH, separated by ":".
    """
    environ = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}:{path}".rstrip(":")}
    return environ if devices is None else environ | _fake(devices)


def _fake(devices: int) -> dict[str, str]:
    return {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        # With as many threads as devices, steps in flight can block one another for good.
        "PJRT_NPROC": str(max(2 * devices, os.cpu_count() or 1)),
    }


def cache_environ(folder: str | Path) -> dict[str, str]:
    """The variables that make jax keep every compilation in a folder."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def fake_devices(devices: int, *, override: bool = True) -> None:
    """Gives this process fake CPU devices and the packages of this checkout; before jax only.

    Args:
        devices: how many.
        override: replace what the environment already says of them.
    """
    for name, value in _fake(devices).items():
        os.environ[name] = value if override else os.environ.get(name, value)
    sys.path.insert(0, str(ROOT))
    from trainer.xla_flags import keep_nan

    keep_nan(os.environ)  # as podlift does, for all contestants in this process


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def versions(*names: str) -> dict[str, str]:
    """The versions of Python and of installed packages."""
    found = {"python": platform.python_version()}
    return found | {name: importlib.metadata.version(name) for name in names}


def shown(row: dict[str, Any], digits: int = 3) -> str:
    """A row of results on one line."""
    return "  ".join(f"{k} {v:.{digits}f}" if isinstance(v, float) else f"{k} {v}"
                     for k, v in row.items())  # fmt: skip


def write(result: dict[str, Any], path: str | None) -> None:
    """Writes a result as JSON, if a file is asked for."""
    if path:
        Path(path).write_text(json.dumps(result, indent=2) + "\n")


def write_and_print(result: dict[str, Any], path: str | None) -> None:
    """Writes a result as JSON, and prints it too."""
    print(json.dumps(result, indent=2))
    write(result, path)


@contextlib.contextmanager
def recording(path: str | None, **first: Any) -> Iterator[dict[str, Any]]:
    """A record of one run: cores, the machine's load before and after, and what the body adds.

    Args:
        path: of the file; None to write none.
        first: more entries, behind the number of cores.
    """
    record: dict[str, Any] = {"cores": os.cpu_count(), **first}
    record["load at the start"] = os.getloadavg()[0]
    yield record
    record["load at the end"] = os.getloadavg()[0]
    write(record, path)
