"""The variables that jax reads once, when it is first imported."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from trainer.errors import UserError
from trainer.xla_flags import has_tpu, keep_nan

_COUNT = re.compile(r"--xla_force_host_platform_device_count=(\d+)")


def fake_device_count(environ: Mapping[str, str]) -> int:
    """The number of CPU devices that XLA_FLAGS asks to fake; 0 for none."""
    match = _COUNT.search(environ.get("XLA_FLAGS", ""))
    return int(match[1]) if match else 0


def prepare(environ: MutableMapping[str, str], fake_devices: int | None) -> None:
    """Sets up fake devices, NaN on CPU and the compilation cache; what is set already stays.

    Args:
        environ: changed in place.
        fake_devices: number of CPU devices to fake, or None.

    Raises:
        UserError: XLA_FLAGS asks for another number of devices.
    """
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
    count = fake_devices or (int(match[1]) if match else 0)
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
