"""A sharded state gives the same numbers and takes a fraction of the memory."""

from __future__ import annotations

import dataclasses
import re
import tracemalloc

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from conftest import mesh_of, wide
from jax.sharding import NamedSharding, PartitionSpec

from trainer.inference.evaluate import Evaluator
from trainer.lift.lift import make_lift
from trainer.lift.replicas import check_replicas
from trainer.lift.update import make_sharded_step
from trainer.losses import softmax_cross_entropy, squared_error
from trainer.models.mlp import MLP
from trainer.models.transformer import Transformer
from trainer.state.checksums import checksum_of, checksums
from trainer.state.freezing import freeze
from trainer.state.leaves import name_leaves
from trainer.state.partition import shard_dimension
from trainer.step.init import init_state
from trainer.step.task import PLAIN, Recipe, Task
from trainer.step.update import make_update_step

SHARDED = ["zero1", "fsdp"]
RANDOM = np.random.default_rng(5)
# 60, so that one of the two kernels is sharded over 8 devices along its second dimension.
BATCH = {
    "x": RANDOM.normal(size=(16, 60)).astype(np.float32),
    "y": RANDOM.normal(size=(16, 1)).astype(np.float32),
}
TEXT = {name: RANDOM.integers(32, size=(16, 8)).astype(np.int32) for name in "xy"}

# The optimizer takes a norm over all leaves, which would be wrong over one device's shards.
NORMALISED = Task(
    MLP(hidden_size=64, out_size=1),
    squared_error,
    optax.chain(optax.clip_by_global_norm(0.3), optax.sgd(0.1, momentum=0.9)),
    0.1,
)
CHARACTERS = Task(
    Transformer(vocab_size=32, max_length=8, width=64, num_layers=1, num_heads=4),
    softmax_cross_entropy,
    optax.chain(optax.adamw(3e-3, weight_decay=0.1), optax.scale_by_trust_ratio()),
    3e-3,
)


def init(task, recipe, dtype=np.float32):
    example = (TEXT if task is CHARACTERS else BATCH)["x"][0]

    def widen(leaf):
        return leaf.astype(dtype) if leaf.dtype == np.float32 else leaf

    return jax.jit(lambda: jax.tree.map(widen, init_state(task, 0, example, recipe)))


def run(
    task,
    recipe=PLAIN,
    sharding="replicated",
    devices=8,
    steps=4,
    scan=False,
    dtype=np.float32,
    batch=None,
):
    """The lift, and the state and metrics on the devices after some steps."""
    lift = make_lift("shard_map", mesh_of(devices), sharding)
    batch = batch or (TEXT if task is CHARACTERS else BATCH)
    start = init(task, recipe, dtype)
    shapes = jax.eval_shape(start)
    if lift.sharded:
        step = lift.compile(make_sharded_step(task, recipe, lift, shapes), shapes, scan=scan)
    else:
        step = lift(make_update_step(task, recipe), scan=scan)
    state = lift.make_state(start)
    if scan:
        stacked = {name: np.stack([array] * steps) for name, array in batch.items()}
        return lift, *step(state, lift.put_batch(stacked, scan=True))
    for _ in range(steps):
        state, metrics = step(state, lift.put_batch(batch))
    return lift, state, metrics


def assert_close(found, expected, atol=1e-5):
    assert found.keys() == expected.keys()
    for name in found:
        np.testing.assert_allclose(
            np.float64(found[name]), np.float64(expected[name]), rtol=0, atol=atol, err_msg=name
        )


RECIPES = {
    "plain": Recipe(),
    "everything": Recipe(accum_steps=2, clip_norm=0.2, ema_decay=0.9, skip_nonfinite=True),
    "fp16": Recipe(scale_loss=True),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("flat", [True, wide(False)], ids=["flat", "leaves"])
@pytest.mark.parametrize("sharding", SHARDED)
def test_sharding_a_state_does_not_change_the_numbers(sharding, flat, recipe):
    compare(NORMALISED, sharding, dataclasses.replace(recipe, flat=flat))


@pytest.mark.slow
@pytest.mark.parametrize(("sharding", "flat"), [("zero1", True), ("zero1", False), ("fsdp", False)])
def test_nor_those_of_a_transformer(sharding, flat):
    # In 64 bits, because some gradients are rounding errors that this optimizer turns into steps.
    with jax.enable_x64(True):
        compare(CHARACTERS, sharding, Recipe(flat=flat), np.float64)


def compare(task, sharding, recipe, dtype=np.float32):
    lift, state, metrics = run(task, recipe, dtype=dtype)
    sharded_lift, sharded_state, sharded_metrics = run(task, recipe, sharding, dtype=dtype)
    assert_close(sharded_lift.host_copy(sharded_state), lift.host_copy(state))
    assert_close(sharded_lift.read(sharded_metrics), lift.read(metrics))


@pytest.mark.parametrize("flat", [True, wide(False)], ids=["flat", "leaves"])
@pytest.mark.parametrize("sharding", SHARDED)
def test_frozen_params_are_sharded_and_stay_unchanged(sharding, flat):
    frozen = ("Dense_0",)
    optimizer = freeze(NORMALISED.optimizer, frozen)
    task = dataclasses.replace(NORMALISED, optimizer=optimizer, frozen=frozen)
    compare(task, sharding, Recipe(flat=flat, ema_decay=0.9))


@pytest.mark.parametrize("devices", [1, wide(3), wide(5), 7])
@pytest.mark.parametrize("sharding", SHARDED)
def test_several_steps_in_one_call_and_other_device_counts(sharding, devices):
    # Kernels (60, 70) and (70, 70): 1 device shards none, 3 the first only, 7 not along 60.
    task = dataclasses.replace(NORMALISED, model=MLP(hidden_size=70, out_size=1))
    batch = {name: np.repeat(array, 105, axis=0)[5:215] for name, array in BATCH.items()}
    lift, state, metrics = run(task, devices=devices, batch=batch)
    sharded_lift, sharded_state, sharded_metrics = run(
        task, sharding=sharding, devices=devices, batch=batch, scan=True
    )
    sharded = [
        leaf for leaf in jax.tree.leaves(sharded_state.opt_state) if not leaf.is_fully_replicated
    ]
    assert len(sharded) == {1: 0, 3: 1, 5: 2, 7: 2}[devices]
    assert_close(sharded_lift.host_copy(sharded_state), lift.host_copy(state))
    assert float(sharded_metrics["loss"][-1]) == pytest.approx(float(metrics["loss"]), abs=1e-5)


@pytest.mark.parametrize(("sharding", "fields"), [("zero1", 1), ("fsdp", 2)])
def test_a_device_holds_only_its_shard(sharding, fields):
    _, state, _ = run(NORMALISED, Recipe(flat=True), sharding)
    kernels = (60 * 64 + 64 * 64, 64)  # sharded ones, and the last one, which is too small
    here = [
        sum(leaf.addressable_data(0).size for leaf in jax.tree.leaves(field) if leaf.ndim == 2)
        for field in (state.opt_state, state.params)
    ]
    shard, full = kernels[0] // 8 + kernels[1], sum(kernels)
    assert here == [shard, full if fields == 1 else shard]


@pytest.mark.parametrize("sharding", SHARDED)
def test_on_cpu_there_is_no_reduce_scatter_and_one_all_gather(sharding):
    # A small reduce-scatter over gloo makes all later collectives of the processes slow.
    recipe = Recipe(flat=True)
    lift = make_lift("shard_map", mesh_of(8), sharding)
    shapes = jax.eval_shape(init(NORMALISED, recipe))
    step = lift.compile(make_sharded_step(NORMALISED, recipe, lift, shapes), shapes)
    args = lift.state_shapes(shapes), lift.batch_shapes(BATCH)
    text = step.lower(*args).compile().as_text()
    found = re.findall(r" (reduce-scatter|all-gather|all-to-all)\(", text)
    assert found == ["all-gather"]


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        for _ in range(4):
            x = x + nn.tanh(nn.Dense(x.shape[-1])(x))
        return x, None


class Layers(nn.Module):
    """Eight layers, of which only the inputs are kept for the backward pass."""

    @nn.compact
    def __call__(self, x):
        layer = nn.remat(Layer, prevent_cse=False)
        scan = nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=8)
        return nn.Dense(1)(scan()(x, None)[0])


@pytest.mark.slow
def test_what_a_model_rematerialises_is_not_kept():
    task = Task(Layers(), squared_error, optax.sgd(0.1), 0.1)
    batch = {name: np.repeat(array, 256, axis=0) for name, array in BATCH.items()}
    held = []
    for sharding in ("zero1", "fsdp"):
        lift = make_lift("shard_map", mesh_of(8), sharding)
        shapes = jax.eval_shape(init(task, PLAIN))
        step = lift.compile(make_sharded_step(task, PLAIN, lift, shapes), shapes)
        args = lift.state_shapes(shapes), lift.batch_shapes(batch)
        held.append(step.lower(*args).compile().memory_analysis().temp_size_in_bytes)
    layers = 8 * 4 * 60 * 60 * 4  # bytes of params, of which one more copy is allowed
    assert held[1] < held[0] + 2 * layers


@pytest.mark.parametrize("sharding", SHARDED)
def test_checksums_of_sharded_leaves_are_those_of_full_leaves(sharding):
    lift, state, _ = run(NORMALISED, sharding=sharding, steps=1)
    report = check_replicas(lift, state)
    copied = lift.host_copy(state)
    assert list(report.checksums) == list(name_leaves(state))
    assert report.checksums == {name: checksum_of(leaf) for name, leaf in copied.items()}
    assert report.not_finite == {}
    bad = dataclasses.replace(state, opt_state=jax.tree.map(lambda leaf: leaf / 0, state.opt_state))
    assert "opt_state" in next(iter(check_replicas(lift, bad).not_finite))


def test_the_checksum_of_a_sharded_leaf_needs_no_all_gather():
    lift = make_lift("shard_map", mesh_of(8), "fsdp")
    sharding = NamedSharding(lift.mesh, PartitionSpec(None, "batch"))
    leaf = jax.ShapeDtypeStruct((65, 64), np.float32, sharding=sharding)
    text = jax.jit(checksums).lower([leaf]).compile().as_text()
    assert "all-gather" not in text
    assert "all-reduce" in text


def test_a_host_copy_of_a_sharded_leaf_is_one_copy():
    lift = make_lift("shard_map", mesh_of(8), "fsdp")
    sharding = NamedSharding(lift.mesh, PartitionSpec(None, "batch"))
    leaf = jax.device_put(np.arange(1 << 20, dtype=np.float32).reshape(1024, 1024), sharding)
    tracemalloc.start()
    copied = lift.host_copy({"leaf": leaf})
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert leaf.nbytes <= held < 1.5 * leaf.nbytes
    np.testing.assert_array_equal(copied["leaf"], leaf)


@pytest.mark.parametrize("sharding", SHARDED)
def test_a_sharded_state_is_evaluated(sharding):
    source = {name: array[:13] for name, array in BATCH.items()}

    class Source:
        def __len__(self):
            return 13

        def __getitem__(self, indices):
            return {name: array[indices] for name, array in source.items()}

    found = []
    for kind in ("replicated", sharding):
        lift, state, _ = run(NORMALISED, Recipe(ema_decay=0.9), kind)
        found.append(Evaluator(NORMALISED, Source(), lift, batch_size=8)(state))
    assert_close(*found)


def test_a_leaf_is_sharded_where_its_shards_need_the_least_padding():
    assert shard_dimension((1024, 4096), 8) == 0
    assert shard_dimension((1024, 65536), 256) == 1  # 256 columns fill a TPU's tiles, 4 rows do not
    assert shard_dimension((4096, 4096), 8) == 0
    assert shard_dimension((3, 3, 64, 62), 8) == 2
    assert shard_dimension((7, 9, 1001), 8) is None
    assert shard_dimension((64, 8), 8) is None  # small
    assert shard_dimension((4096, 4096), 1) is None
