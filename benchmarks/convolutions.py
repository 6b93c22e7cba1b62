"""Where the time of ResNet-8's gradient goes on CPU, in JAX and in torch.

    python benchmarks/convolutions.py [--torch_python=PATH] [--rounds=15] [--out=FILE.json]

Bare JAX and bare torch, one process each, on batches with the same number of pixels: milliseconds
of a loss with its gradient, and the parts of it by each framework's own profiler. XLA's CPU backend
runs most convolutions inside "ynn_fusion"; those under "convolution" run on their own.
"""

from __future__ import annotations

import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from frame import fake_devices, parser_of, write_and_print

CASES = ((256, 8), (128, 16), (64, 32))  # images, pixels a side
JOBS = Path(__file__).parent / "peer_jobs"


def in_jax(batch: int, side: int, steps: int) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    import optax

    from trainer.models.resnet import ResNet

    model = ResNet(num_classes=10, axis_name=None)
    x, y = jnp.ones((batch, side, side, 1)), jnp.zeros(batch, int)
    variables = model.init(jax.random.key(0), x, train=False)

    def loss(params: Any, batch_stats: Any) -> Any:
        both = {"params": params, "batch_stats": batch_stats}
        logits, changed = model.apply(both, x, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), changed

    gradient = jax.jit(jax.grad(loss, has_aux=True))

    def take() -> float:
        began = time.perf_counter()
        jax.block_until_ready(gradient(variables["params"], variables["batch_stats"]))
        return 1000 * (time.perf_counter() - began)

    for _ in range(5):
        take()
    milliseconds = statistics.median(take() for _ in range(steps))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                take()
        (path,) = Path(folder).rglob("*.trace.json.gz")
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    spent: Counter[str] = Counter()
    for event in events:
        if event.get("ph") == "X" and "hlo_op" in event.get("args", {}):
            spent[event["args"]["hlo_op"].split(".")[0]] += event["dur"] / 1000 / steps
    return {"ms": milliseconds, "ms by kind of operation": dict(spent.most_common(6))}


def in_torch(python: str, batch: int, side: int, steps: int) -> dict[str, Any]:
    command = [python, str(JOBS / "torch_convolutions.py"), str(batch), str(side), str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = parser_of(__doc__, rounds=15)
    parser.add_argument("--torch_python", help="a Python that has torch")
    options = parser.parse_args()
    fake_devices(1)
    rows = []
    for batch, side in CASES:
        row: dict[str, Any] = {
            "images": batch,
            "side": side,
            "jax": in_jax(batch, side, options.rounds),
        }
        if options.torch_python:
            row["torch"] = in_torch(options.torch_python, batch, side, options.rounds)
            row["jax / torch"] = row["jax"]["ms"] / row["torch"]["ms"]
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    result = {"cores": os.cpu_count(), "load at the end": os.getloadavg()[0], "rows": rows}
    write_and_print(result, options.out)


if __name__ == "__main__":
    main()
