"""`python -m launcher env`: what a bug report needs, without secrets."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence

from launcher.cli.run_command import run_command
from launcher.cli.shown_variables import relevant
from launcher.clusters.detect import detect, with_machine
from launcher.launch.dry_run import describe_placement
from launcher.launch.workers import count_gpus
from trainer.console import show
from trainer.errors import UserError
from trainer.workdir.environment import redact

HELP = """\
Prints versions, devices, the detected cluster and the environment variables that matter, for a bug
report. Other variables are only counted, and passwords in URLs are left out.

  python -m launcher env

  --help                 prints this text
"""

_PACKAGES = (
    "podlift",
    "jax",
    "jaxlib",
    "libtpu",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "grain",
    "tensorboardX",
)
_DEVICES = """
import jax
for process in range(jax.process_count()):
    devices = jax.local_devices(process)
    print(len(devices), devices[0].platform, devices[0].device_kind)
"""


def main(argv: Sequence[str]) -> int:
    """Runs `python -m launcher env`; returns the exit code.

    Args:
        argv: the arguments after `env`.
    """
    return run_command(argv, HELP, lambda _: _print_environment(os.environ))


def _print_environment(environ: Mapping[str, str]) -> None:
    show(f"python       {platform.python_version()} ({sys.executable})")
    show(f"system       {platform.platform()}, {os.cpu_count()} cores")
    for package in _PACKAGES:
        try:
            show(f"{package:12} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    show(f"NVIDIA GPUs  {count_gpus(environ)}")
    show(f"devices      {_devices()}")
    show(f"cluster      {_cluster(environ)}")
    shown, others = relevant(environ)
    for name, value in shown.items():
        show(f"  {name}={value}")
    show(f"  and {others} other variables, not shown")


def _cluster(environ: Mapping[str, str]) -> str:
    try:
        placement = detect(with_machine(environ, count_gpus(environ)))
    except UserError as error:
        return "\n             ".join(map(redact, str(error).splitlines()))
    return "none: this machine" if placement is None else redact(describe_placement(placement))


def _devices(timeout: float = 60) -> str:
    """The devices, from another process: a driver that hangs cannot be interrupted."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _DEVICES],
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"jax did not answer within {timeout:.0f} s"
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["jax failed without a message"])[-1]
    return ", ".join(done.stdout.split("\n")).strip(", ")
