"""The variables that Python reads when it starts, and jax when it is first imported."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from trainer.console import warn
from trainer.errors import UserError
from trainer.xla_flags import has_tpu, keep_nan

_JAX_COUNT = "JAX_NUM_CPU_DEVICES"
_COUNT = re.compile(r"--xla_force_host_platform_device_count=(\d+)")


def fake_device_count(environ: Mapping[str, str]) -> int:
    """The number of CPU devices that the environment asks to fake; 0 for none."""
    asked = environ.get(_JAX_COUNT, "")
    if asked.isdecimal() and int(asked):  # for jax it comes before XLA_FLAGS
        return int(asked)
    match = _COUNT.search(environ.get("XLA_FLAGS", ""))
    return int(match[1]) if match else 0


def prepare(environ: MutableMapping[str, str], fake_devices: int | None) -> None:
    """Sets up fake devices, NaN on CPU, the compilation cache and one order of sets everywhere.

    Variables that are set already stay; only JAX_NUM_CPU_DEVICES gives way to `fake_devices`.

    Args:
        environ: changed in place.
        fake_devices: number of CPU devices to fake, or None.

    Raises:
        UserError: XLA_FLAGS asks for another number of devices.
    """
    # Else every process and every start has its own order of a set of strings.
    environ.setdefault("PYTHONHASHSEED", "0")
    flags = environ.get("XLA_FLAGS", "")
    match = _COUNT.search(flags)
    if fake_devices is not None:
        if match and int(match[1]) != fake_devices:
            raise UserError(
                f"--fake_devices={fake_devices}, but XLA_FLAGS asks for {match[1]}",
                "leave one of them out",
            )
        if not match:
            option = f"--xla_force_host_platform_device_count={fake_devices}"
            environ["XLA_FLAGS"] = f"{flags} {option}".strip()
        environ["JAX_PLATFORMS"] = "cpu"
        asked = environ.get(_JAX_COUNT, str(fake_devices))
        if asked != str(fake_devices):
            warn(f"{_JAX_COUNT}={asked} is ignored: --fake_devices={fake_devices}")
            environ[_JAX_COUNT] = str(fake_devices)
    count = fake_devices or fake_device_count(environ)
    if count:
        # In a collective each virtual device blocks a thread of a pool with one thread a core; with
        # fewer threads than devices it deadlocks.
        environ.setdefault("PJRT_NPROC", str(max(2 * count, os.cpu_count() or 1)))
    keep_nan(environ)
    if importlib.util.find_spec("libtpu") and not has_tpu():
        quieten_libtpu(environ)
    if "JAX_COMPILATION_CACHE_DIR" not in environ:
        base = environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        cache = Path(base) / "podlift" / "xla"
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError:
            return  # a read-only home: no cache
        environ["JAX_COMPILATION_CACHE_DIR"] = str(cache)
        # By default jax caches only what took a second to compile.
        environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def quieten_libtpu(environ: MutableMapping[str, str]) -> None:
    """Answers what libtpu would query from a TPU machine, so that it prints no errors elsewhere.

    Without a TPU, libtpu is installed only for `podlift plan`.
    """
    environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
