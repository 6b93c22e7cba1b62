"""`env.json`: the software and devices of a run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from typing import Any

# Increment when podlift can no longer read older workdirs. 2: checkpoints have manifests.
LAYOUT_VERSION = 2

_PACKAGES = ("podlift", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def describe_environment() -> dict[str, Any]:
    """Versions, devices and the git commit, without host names, paths or variables but XLA's."""
    import jax

    devices = jax.devices()
    return {
        "layout_version": LAYOUT_VERSION,
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "devices": {
            "count": len(devices),
            "kind": devices[0].device_kind,
            "platform": devices[0].platform,
            "processes": jax.process_count(),
        },
        "xla_flags": redact(os.environ.get("XLA_FLAGS", "")),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": _git("rev-parse", "HEAD")
        and bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def redact(value: str) -> str:
    """The value of a variable as it may be shown: printable, and without passwords.

    What precedes an `@` in an address, and the query of a URL, may be credentials. Too much is
    left out rather than too little.
    """
    value = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in value)
    value = re.sub(r"(?<=://)\S*@|(?<!\S)(?!\S*://)\S*:\S*@", "***@", value)
    return re.sub(r"(://[^\s?]*\?)\S+", r"\1***", value)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return getattr(sys.modules.get(package), "__version__", None)


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
