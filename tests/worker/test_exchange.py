"""Sums by all-to-all have the bits of jax's own sums, and are the same on both devices."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import ROOT

PROGRAM = """
import os
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
import jax, jax.numpy as jnp, numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec as P
from launcher.worker import exchange

MESH = Mesh(np.array(jax.devices()), ("batch",))
ALONE = {  # bit for bit
    "psum": lambda x: lax.psum(x, "batch"),
    "pmean": lambda x: lax.pmean(x, "batch"),
    "tree": lambda x: lax.psum((x, x[0], jnp.max(x.real)), ("batch",)),
    "groups of one": lambda x: lax.psum(x, "batch", axis_index_groups=[[0], [1]]),
    "group of two": lambda x: lax.psum(x, "batch", axis_index_groups=[[1, 0]]),
    "size": lambda x: x * lax.psum(1, "batch"),
    "inner axis": jax.vmap(lambda x: lax.psum(x, ("batch", "inner")), axis_name="inner"),
}
FUSED = {  # up to how the compiler rounds what is around them
    "product": lambda x: lax.psum(x[0] * x[1], "batch"),
    "scan": lambda x: lax.scan(lambda c, r: (lax.pmean(c * r, "batch"), c.sum()), x[0], x)[0],
    "grad": jax.grad(lambda x: (lax.pmean(x * x[::-1], "batch") ** 2).sum().astype("float32")),
}
LIFTS = {
    "pmap": lambda f: jax.pmap(f, axis_name="batch"),
    "shard_map": lambda f: jax.jit(jax.shard_map(
        lambda x: jax.tree.map(lambda y: y[None], f(x[0])), mesh=MESH, in_specs=P("batch"),
        out_specs=P("batch"), check_vma=False)),
}
DTYPES = ["float32", "bfloat16", "float16", "int8", "int32", "uint32", "complex64"]


def run(functions, dtypes, size=0):
    random, results = np.random.default_rng(0), {}
    for dtype in dtypes:
        x = jnp.asarray(random.normal(0, 2, (2, 3, 5 + size))).astype(dtype)
        for name, lift in LIFTS.items():
            for what, function in functions.items():
                # A new function each time, because jax caches what it has compiled.
                call = lift(lambda x, function=function: function(x))
                found = jax.tree.leaves(call(x))
                results[dtype, name, what] = [np.asarray(a) for a in found]
    return results


def text():
    x = jnp.ones((2, 3))
    call = LIFTS["shard_map"](lambda x: lax.psum(x, "batch"))
    return call.lower(x).compile().as_text()


alone, fused = run(ALONE, DTYPES), run(FUSED, DTYPES[:3], size=999)
assert "all-reduce" in text()
exchange.use()
assert "all-reduce" not in text() and "all-to-all" in text()
for name, found in run(ALONE, DTYPES).items():
    for a, b in zip(alone[name], found, strict=True):
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes(), (name, a, b)
for name, found in run(FUSED, DTYPES[:3], size=999).items():
    for a, b in zip(fused[name], found, strict=True):
        np.testing.assert_allclose(a.astype(float), b.astype(float), rtol=0.1, atol=0.2)
        if "grad" not in name:
            assert b[0].tobytes() == b[1].tobytes(), (name, "differs between devices")
print("equal")
"""


@pytest.mark.wide
def test_the_bits_of_sums_by_all_to_all():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "equal\n"
