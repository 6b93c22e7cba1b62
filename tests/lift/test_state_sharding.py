"""A state that is cut over the devices: the same numbers, a part of the memory, any checkpoint."""

from __future__ import annotations

import dataclasses
import json
import re
import tracemalloc

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from conftest import mesh_of, wide
from jax.sharding import NamedSharding, PartitionSpec
from runs import flip_a_bit, save_another_state, truncate

import trainer
from trainer.inference.evaluate import Evaluator
from trainer.lift.lift import make_lift
from trainer.lift.replicas import check_replicas
from trainer.lift.update import make_sharded_step
from trainer.losses import softmax_cross_entropy, squared_error
from trainer.models.mlp import MLP
from trainer.models.transformer import Transformer
from trainer.state.checksums import checksum_of, checksums
from trainer.state.leaves import name_leaves
from trainer.state.partition import shard_dimension
from trainer.step.freezing import freeze
from trainer.step.init import init_state
from trainer.step.task import PLAIN, Recipe, Task
from trainer.step.update import make_update_step

CUT = ["zero1", "fsdp"]
RANDOM = np.random.default_rng(5)
# 60: so that of the two kernels that are cut over 8 devices one is cut along its second dimension.
BATCH = {
    "x": RANDOM.normal(size=(16, 60)).astype(np.float32),
    "y": RANDOM.normal(size=(16, 1)).astype(np.float32),
}
TEXT = {name: RANDOM.integers(32, size=(16, 8)).astype(np.int32) for name in "xy"}

# A norm over all leaves inside the optimizer, which a device's own parts would get wrong.
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
@pytest.mark.parametrize("sharding", CUT)
def test_the_numbers_are_those_of_a_whole_state(sharding, flat, recipe):
    compare(NORMALISED, sharding, dataclasses.replace(recipe, flat=flat))


@pytest.mark.slow
@pytest.mark.parametrize(("sharding", "flat"), [("zero1", True), ("zero1", False), ("fsdp", False)])
def test_so_are_those_of_a_transformer(sharding, flat):
    # In 64 bits: some of its gradients are rounding errors, and this optimizer makes steps of them.
    with jax.enable_x64(True):
        compare(CHARACTERS, sharding, Recipe(flat=flat), np.float64)


def compare(task, sharding, recipe, dtype=np.float32):
    lift, state, metrics = run(task, recipe, dtype=dtype)
    cut_lift, cut_state, cut_metrics = run(task, recipe, sharding, dtype=dtype)
    assert_close(cut_lift.host_copy(cut_state), lift.host_copy(state))
    assert_close(cut_lift.read(cut_metrics), lift.read(metrics))


@pytest.mark.parametrize("flat", [True, wide(False)], ids=["flat", "leaves"])
@pytest.mark.parametrize("sharding", CUT)
def test_a_part_that_is_frozen_is_cut_and_stays(sharding, flat):
    frozen = ("Dense_0",)
    optimizer = freeze(NORMALISED.optimizer, frozen)
    task = dataclasses.replace(NORMALISED, optimizer=optimizer, frozen=frozen)
    compare(task, sharding, Recipe(flat=flat, ema_decay=0.9))


@pytest.mark.parametrize("devices", [1, wide(3), wide(5), 7])
@pytest.mark.parametrize("sharding", CUT)
def test_several_steps_in_one_call_and_other_device_counts(sharding, devices):
    # Of its kernels, (60, 70) and (70, 70), 1 device cuts none, 3 the first only, 7 not along 60.
    task = dataclasses.replace(NORMALISED, model=MLP(hidden_size=70, out_size=1))
    batch = {name: np.repeat(array, 105, axis=0)[5:215] for name, array in BATCH.items()}
    lift, state, metrics = run(task, devices=devices, batch=batch)
    cut_lift, cut_state, cut_metrics = run(
        task, sharding=sharding, devices=devices, batch=batch, scan=True
    )
    cut = [leaf for leaf in jax.tree.leaves(cut_state.opt_state) if not leaf.is_fully_replicated]
    assert len(cut) == {1: 0, 3: 1, 5: 2, 7: 2}[devices]
    assert_close(cut_lift.host_copy(cut_state), lift.host_copy(state))
    assert float(cut_metrics["loss"][-1]) == pytest.approx(float(metrics["loss"]), abs=1e-5)


@pytest.mark.parametrize(("sharding", "fields"), [("zero1", 1), ("fsdp", 2)])
def test_a_device_holds_its_part_and_not_more(sharding, fields):
    _, state, _ = run(NORMALISED, Recipe(flat=True), sharding)
    kernels = (60 * 64 + 64 * 64, 64)  # cut, and the last one, which is too small
    here = [
        sum(leaf.addressable_data(0).size for leaf in jax.tree.leaves(field) if leaf.ndim == 2)
        for field in (state.opt_state, state.params)
    ]
    cut, whole = kernels[0] // 8 + kernels[1], sum(kernels)
    assert here == [cut, whole if fields == 1 else cut]


@pytest.mark.parametrize("sharding", CUT)
def test_on_cpu_nothing_is_scattered_and_one_buffer_is_gathered(sharding):
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
def test_what_a_model_computes_anew_is_not_kept():
    task = Task(Layers(), squared_error, optax.sgd(0.1), 0.1)
    batch = {name: np.repeat(array, 256, axis=0) for name, array in BATCH.items()}
    held = []
    for sharding in ("zero1", "fsdp"):
        lift = make_lift("shard_map", mesh_of(8), sharding)
        shapes = jax.eval_shape(init(task, PLAIN))
        step = lift.compile(make_sharded_step(task, PLAIN, lift, shapes), shapes)
        args = lift.state_shapes(shapes), lift.batch_shapes(batch)
        held.append(step.lower(*args).compile().memory_analysis().temp_size_in_bytes)
    layers = 8 * 4 * 60 * 60 * 4  # bytes of params, which may be held once more
    assert held[1] < held[0] + 2 * layers


@pytest.mark.parametrize("sharding", CUT)
def test_checksums_are_those_of_the_whole_leaves(sharding):
    lift, state, _ = run(NORMALISED, sharding=sharding, steps=1)
    examined = check_replicas(lift, state)
    copied = lift.host_copy(state)
    assert list(examined.checksums) == list(name_leaves(state))
    assert examined.checksums == {name: checksum_of(leaf) for name, leaf in copied.items()}
    assert examined.not_finite == []
    bad = dataclasses.replace(state, opt_state=jax.tree.map(lambda leaf: leaf / 0, state.opt_state))
    assert "opt_state" in check_replicas(lift, bad).not_finite[0]


def test_no_leaf_is_put_together_to_be_examined():
    lift = make_lift("shard_map", mesh_of(8), "fsdp")
    sharding = NamedSharding(lift.mesh, PartitionSpec(None, "batch"))
    leaf = jax.ShapeDtypeStruct((65, 64), np.float32, sharding=sharding)
    text = jax.jit(checksums).lower([leaf]).compile().as_text()
    assert "all-gather" not in text
    assert "all-reduce" in text


def test_a_host_copy_of_a_cut_leaf_is_one_copy():
    lift = make_lift("shard_map", mesh_of(8), "fsdp")
    sharding = NamedSharding(lift.mesh, PartitionSpec(None, "batch"))
    leaf = jax.device_put(np.arange(1 << 20, dtype=np.float32).reshape(1024, 1024), sharding)
    tracemalloc.start()
    copied = lift.host_copy({"leaf": leaf})
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert leaf.nbytes <= held < 1.5 * leaf.nbytes
    np.testing.assert_array_equal(copied["leaf"], leaf)


@pytest.mark.parametrize("sharding", CUT)
def test_a_cut_state_is_evaluated(sharding):
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


def test_a_leaf_is_cut_where_its_parts_are_padded_least():
    assert shard_dimension((1024, 4096), 8) == 0
    assert shard_dimension((1024, 65536), 256) == 1  # 256 columns fill a TPU's tiles, 4 rows do not
    assert shard_dimension((4096, 4096), 8) == 0
    assert shard_dimension((3, 3, 64, 62), 8) == 2
    assert shard_dimension((7, 9, 1001), 8) is None
    assert shard_dimension((64, 8), 8) is None  # small
    assert shard_dimension((4096, 4096), 1) is None


CONFIG = {
    "num_steps": 6,
    "global_batch_size": 16,
    "log_every_steps": 2,
    "lift": "shard_map",
    "model": {"target": "trainer.models.mlp:MLP", "hidden_size": 64, "out_size": 10},
    "loss": {"target": "trainer.losses:softmax_cross_entropy"},
    "optimizer": {"target": "optax:sgd", "learning_rate": 0.1, "momentum": 0.9},
    "data": {"target": "trainer.data.digits:load"},
    "eval": {"every_steps": 3},
}


@pytest.mark.wide
def test_a_run_may_change_how_its_state_lies(tmp_path):
    straight = trainer.train(CONFIG, tmp_path / "straight")
    kinds = ["fsdp", "replicated", "zero1", "fsdp", "zero1", "replicated"]
    for step, kind in enumerate(kinds, 1):
        config = CONFIG | {"state_sharding": kind, "stop_at_step": step}
        if kind == "replicated":
            config["lift"] = "pmap"
        changed = trainer.train(config, tmp_path / "changed")
    names = name_leaves(straight.state)
    assert_close(leaves_of(changed.state), leaves_of(straight.state))
    assert names.keys() == name_leaves(changed.state).keys()
    assert changed.metrics["eval/loss"] == pytest.approx(straight.metrics["eval/loss"], abs=1e-5)


def leaves_of(state):
    return {name: np.asarray(leaf) for name, leaf in name_leaves(state).items()}


@pytest.mark.slow
@pytest.mark.parametrize("damage", [flip_a_bit, truncate, save_another_state])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, capsys, damage):
    config = CONFIG | {"state_sharding": "fsdp", "checkpoint": {"every_steps": 2}}
    straight = trainer.train(config, tmp_path / "straight")
    trainer.train(config | {"stop_at_step": 4}, tmp_path / "run")
    damage(tmp_path / "run/checkpoints/4")
    capsys.readouterr()
    rest = trainer.train(config, tmp_path / "run")
    out, err = capsys.readouterr()
    assert "warning: step 4 cannot be restored from its checkpoint" in err
    assert "restored step 2 from " in out
    assert list((tmp_path / "run/checkpoints/quarantine").glob("4-*"))
    assert_close(leaves_of(rest.state), leaves_of(straight.state), atol=0)


@pytest.mark.parametrize(("there", "here"), [wide("fsdp", "replicated"), ("replicated", "fsdp")])
def test_a_run_begins_with_the_params_of_one_that_lies_in_another_way(tmp_path, there, here):
    first = trainer.train(CONFIG | {"state_sharding": there}, tmp_path / "first")
    begun = {"init_from": str(tmp_path / "first"), "num_steps": 2}
    fresh = [
        trainer.train(CONFIG | begun | {"state_sharding": kind}, tmp_path / kind)
        for kind in (here, there)
    ]
    found, expected = (leaves_of(result.state) for result in fresh)
    assert_close(found, expected)
    started = leaves_of(first.state)["params/Dense_0/kernel"]
    assert np.abs(found["params/Dense_0/kernel"] - started).max() < 0.1  # of two steps


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 3])
def test_what_was_trained_cut_is_evaluated_on_any_devices(launch, tmp_path, devices):
    config = CONFIG | {"state_sharding": "fsdp", "ema_decay": 0.9}
    trained = trainer.train(config, tmp_path / "run")
    where = f"--workdir={tmp_path}/run", f"--fake_devices={devices}"
    code, out, err = launch("eval", *where, f"--json={tmp_path}/found.json")
    assert code == 0, out + err
    found = json.loads((tmp_path / "found.json").read_text())["metrics"]
    assert found["eval/loss"] == pytest.approx(trained.metrics["eval/loss"], abs=1e-6)
    code, out, err = launch("predict", *where, f"--out={tmp_path}/outputs.npz")
    assert code == 0, out + err
    with np.load(tmp_path / "outputs.npz") as outputs:
        losses = optax.softmax_cross_entropy_with_integer_labels(outputs["outputs"], outputs["y"])
    assert float(losses.mean()) == pytest.approx(trained.metrics["eval/loss"], abs=1e-5)


@pytest.mark.slow
def test_where_nothing_can_be_cut_it_is_said(tmp_path, capsys):
    config = CONFIG | {"state_sharding": "fsdp", "global_batch_size": 14, "num_steps": 1}
    for devices, told in ((7, 1), (2, 0)):
        trainer.train(config, tmp_path / str(devices), mesh_of(devices))
        assert capsys.readouterr().err.count("cuts nothing") == told


def test_a_lift_that_cannot_says_which_can():
    with pytest.raises(trainer.UserError, match="needs the lift shard_map") as error:
        trainer.train(CONFIG | {"lift": "pmap", "state_sharding": "zero1"}, "unused")
    assert "--config.lift=shard_map" in str(error.value.hint)


def averaging(learning_rate):
    """SGD that takes the mean of the gradients once more."""

    def update(updates, state, params=None):
        return jax.lax.pmean(updates, "batch"), state

    again = optax.GradientTransformation(lambda _: optax.EmptyState(), update)
    return optax.chain(again, optax.sgd(learning_rate))


def mistaken(learning_rate):
    return optax.GradientTransformation(lambda _: optax.EmptyState(), lambda *_: learningrate)  # noqa: F821


def test_an_optimizer_that_uses_the_axis_needs_a_whole_state(tmp_path):
    def config(target, kind):
        optimizer = {"target": f"{__name__}:{target}", "learning_rate": 0.1}
        return CONFIG | {"optimizer": optimizer, "state_sharding": kind, "num_steps": 1}

    for kind in CUT:
        with pytest.raises(trainer.UserError, match="uses the axis 'batch' itself") as error:
            trainer.train(config("averaging", kind), tmp_path / "run")
        assert "--config.state_sharding=replicated" in error.value.hint
        assert not (tmp_path / "run").exists()
        with pytest.raises(NameError, match="learningrate"):
            trainer.train(config("mistaken", kind), tmp_path / "run")
    trainer.train(config("averaging", "replicated"), tmp_path / "run")
