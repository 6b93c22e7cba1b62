"""Start-up time: from the command to the end of the first step, with a cold and a warm cache.

    python benchmarks/startup.py [--runs=5] [--only=mlp,resnet] [--out=FILE.json]

Each run is a separate process on 8 fake CPU devices. "bare" is a script that imports jax, flax and
optax, initialises the same model under jit and runs one pmapped step. Cold runs start with an empty
compilation cache, warm runs with that of a previous run. Figures are medians; ratios are within a
round.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time

from frame import ROOT, cache_environ, cpu_environ, parser_of, write

BARE = """
import functools, importlib, sys
import jax, jax.numpy as jnp, numpy as np, optax
module, name, shape, loss, kwargs = eval(sys.argv[1])
model = getattr(importlib.import_module(module), name)(**kwargs)
x = np.zeros((8, 16, *shape), np.float32)
y = np.zeros((8, 16, 1), np.float32) if loss == "mse" else np.zeros((8, 16), np.int32)
tx = optax.sgd(0.1)
def init(x):
    variables = model.init(jax.random.key(0), x)
    params = variables.pop("params")
    return params, variables, tx.init(params)
def step(state, x, y):
    params, rest, opt = state
    def f(params):
        out, new = model.apply({"params": params, **rest}, x, train=True, mutable=list(rest))
        if loss == "mse":
            return jnp.mean((out - y) ** 2), new
        return optax.softmax_cross_entropy_with_integer_labels(out, y).mean(), new
    grads, new = jax.grad(f, has_aux=True)(params)
    grads = jax.lax.pmean(grads, "batch")
    updates, opt = tx.update(grads, opt, params)
    return optax.apply_updates(params, updates), new, opt
state = jax.jit(init)(x[0])
state = jax.pmap(step, axis_name="batch", in_axes=(None, 0, 0), out_axes=None)(state, x, y)
jax.block_until_ready(state)
print("first step done", flush=True)
"""

CASES = {
    "mlp": (
        ["--config=configs/mlp.py"],
        ("trainer.models.mlp", "MLP", (5,), "mse", {"hidden_size": 10, "out_size": 1}),
    ),
    "resnet": (
        ["--config=configs/digits.py:resnet", "--config.stop_at_step=1"],
        ("trainer.models.resnet", "ResNet", (8, 8, 1), "ce", {"num_classes": 10}),
    ),
}


def run(command: list[str], cache: str) -> dict[str, float]:
    """Seconds to the first step, and the parts that the trainer reports."""
    environ = cpu_environ(8) | cache_environ(cache)
    parts: dict[str, float] = {}
    began = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=ROOT, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    for line in process.stdout:
        if match := re.search(r"state ready in ([\d.]+) s", line):
            parts["init"] = float(match[1])
            parts["imports"] = time.perf_counter() - began - parts["init"]
        if line.startswith(("first step done", "first call done")):
            parts["total"] = time.perf_counter() - began
            if match := re.search(r"compiled in ([\d.]+) s", line):
                parts["first step"] = float(match[1])
    error = process.communicate()[1]
    if process.returncode or "total" not in parts:
        raise SystemExit(f"{' '.join(command)} failed:\n{error}")
    return parts


def plan_seconds(runs: int) -> float:
    """Seconds from the command until a launcher would start its workers."""
    command = [sys.executable, "-m", "launcher", "--config=configs/mlp.py", "--dry_run"]
    seconds = []
    for _ in range(runs):
        began = time.perf_counter()
        subprocess.run([*command, "--processes=2"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", default="mlp,resnet")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only.split(","):
            arguments, bare = CASES[name]
            samples: dict[str, list[dict[str, float]]] = {}
            for number in range(options.runs):
                for temperature in ("cold", "warm"):
                    launcher = [sys.executable, "-m", "launcher", *arguments]
                    launcher.append(f"--workdir={folder}/{name}-{number}-{temperature}")
                    for who, command in (
                        ("podlift", launcher),
                        ("bare", [sys.executable, "-c", BARE, repr(bare)]),
                    ):
                        parts = run(command, f"{folder}/cache-{name}-{who}-{number}")
                        samples.setdefault(f"{who} {temperature}", []).append(parts)
            for key, found in samples.items():
                medians = {
                    part: statistics.median(sample[part] for sample in found) for part in found[0]
                }
                rows.append({"case": name, "run": key, **medians})
            for temperature in ("cold", "warm"):
                pairs = zip(
                    samples[f"podlift {temperature}"], samples[f"bare {temperature}"], strict=True
                )
                ratio = statistics.median(a["total"] / b["total"] for a, b in pairs)
                rows.append({"case": name, "run": f"podlift / bare, {temperature}", "total": ratio})
    seconds = plan_seconds(options.runs)
    rows.append({"case": "launcher", "run": "plan of 2 processes", "total": seconds})
    for row in rows:
        print("  ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{v}" for k, v in row.items()))
    write({"cores": os.cpu_count(), "rows": rows}, options.out)


if __name__ == "__main__":
    main()
