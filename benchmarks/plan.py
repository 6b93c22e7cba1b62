"""A quick plan against a full compilation: time, memory, traffic and collectives of one step.

    python benchmarks/plan.py [--config=configs/imagenet_resnet50.py] [--topology=v5e:2x2]
        [--batch=128] [--out=benchmarks/results/plan.json]

Needs the compiler of the topology (scripts/setup.sh tpu). The full compilation of ResNet-50 takes
90 seconds on two cores.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from frame import ROOT, parser_of, write_and_print

_KEPT = (
    "peak_bytes",
    "argument_bytes",
    "aliased_bytes",
    "temporary_bytes",
    "bytes_accessed",
    "flops",
    "compile_seconds",
)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--config", default="configs/imagenet_resnet50.py")
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--batch", type=int, default=128)
    options = parser.parse_args()
    result: dict[str, Any] = {
        "config": options.config,
        "topology": options.topology,
        "batch_per_device": options.batch,
        **{name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
    }
    for effort in ("quick", "full"):
        result[effort] = plan(options, effort)
    quick, full = result["quick"], result["full"]
    result["quick_over_full"] = {
        key: quick[key] / full[key] for key in ("peak_bytes", "bytes_accessed", "compile_seconds")
    }
    write_and_print(result, options.out)


def plan(options: argparse.Namespace, effort: str) -> dict[str, Any]:
    """One plan, in a separate process with an empty cache."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        began = time.monotonic()
        subprocess.run(
            [
                *(sys.executable, "-m", "launcher", "plan", f"--config={options.config}"),
                *(f"--topology={options.topology}", f"--batch={options.batch}"),
                *(f"--effort={effort}", f"--json={path}"),
            ],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": folder},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        seconds = time.monotonic() - began
        found = json.loads(path.read_text())
    collectives = found["collectives"]
    return {
        **{key: found[key] for key in _KEPT},
        "collectives": sum(item["count"] for item in collectives),
        "collective_bytes": sum(item["bytes"] for item in collectives),
        "command_seconds": seconds,
    }


if __name__ == "__main__":
    main()
