"""Eight virtual CPU devices in this process, and fixtures that start others."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["PJRT_NPROC"] = "16"

from trainer.xla_flags import keep_nan

keep_nan(os.environ)

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from jax.sharding import Mesh
from script_runs import ScriptRuns

ROOT = Path(__file__).parent.parent

# `nohup` and `&` ignore these signals, children inherit that, and podlift respects it.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)

# The same examples every time; `--hypothesis-profile=search` tries others.
_SAME = {"deadline": None, "database": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("same", derandomize=True, **_SAME)
settings.register_profile("search", max_examples=2000, **_SAME)
settings.load_profile("same")


def skip_here(reason: str) -> pytest.MarkDecorator:
    """Skips if there is a `reason`, except in CI, which installs everything."""
    return pytest.mark.skipif(bool(reason) and "CI" not in os.environ, reason=reason or "-")


def wide(*values):
    """A case that a quick run of the tests skips."""
    return pytest.param(*values, marks=pytest.mark.wide)


def mesh_of(count: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:count]), ("batch",))


@pytest.fixture(scope="session", autouse=True)
def cache_dir(tmp_path_factory):
    """One compilation cache for this process and all processes that the tests start."""
    directory = tmp_path_factory.getbasetemp().parent / "cache"
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return directory


@pytest.fixture(scope="module", autouse=True)
def _few_memory_maps():
    """Releases what jax has compiled before the process has as many memory maps as Linux allows.

    Each program of XLA:CPU holds about ten of the 65,530 (`vm.max_map_count`), and XLA dies without
    a word of them.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > 20_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def start(cache_dir, tmp_path):
    """Starts `python -m launcher ARGUMENTS` in the checkout; returns the process."""
    started = []

    def start_process(*arguments, cwd=ROOT, environ=None, module="launcher"):
        inherited = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PJRT_NPROC")}
        process = subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            cwd=cwd,
            env={
                **inherited,
                "JAX_COMPILATION_CACHE_DIR": str(cache_dir),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
                "PYTHONPATH": str(ROOT),
                **(environ or {}),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start_process
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def launch(start):
    """Runs `python -m launcher ARGUMENTS` to its end; returns (exit code, stdout, stderr)."""

    def run(*arguments, **options):
        process = start(*arguments, **options)
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err

    return run


@pytest.fixture
def run_script(tmp_path):
    """Runs `scripts/NAME ARGUMENTS` to its end, with stand-ins for the programs it calls."""
    return ScriptRuns(tmp_path)
