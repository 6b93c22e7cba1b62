"""What benchmarks on fake CPU devices have in common. To be called before jax is imported."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def fake_devices(count: int) -> None:
    """Asks for so many CPU devices, and makes the packages of this checkout importable."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={count}"
    os.environ["PJRT_NPROC"] = str(2 * count)
    sys.path.insert(0, str(Path(__file__).parent.parent))


def write(result: dict[str, Any], path: str | None) -> None:
    """Prints a result as JSON, and writes it to a file if there is to be one."""
    text = json.dumps(result, indent=2)
    print(text)
    if path:
        Path(path).write_text(f"{text}\n")
