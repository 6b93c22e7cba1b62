"""Histograms, images and confusion matrices: what TensorBoard reads is what is there."""

from __future__ import annotations

import io
import json

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from conftest import mesh_of
from PIL import Image
from runs import assert_bitwise_equal, digits, without_speed

import trainer
from trainer.data.digits import load
from trainer.data.stream import ArraySource
from trainer.errors import UserError
from trainer.inference.evaluate import HeldOutSums
from trainer.lift.lift import make_lift
from trainer.lift.update import lift_update_step
from trainer.losses import softmax_cross_entropy
from trainer.metrics_writer.tensorboard import TensorBoardWriter
from trainer.run import loop
from trainer.state.leaves import name_leaves
from trainer.step.init import init_state
from trainer.step.task import Task
from trainer.summaries import images
from trainer.summaries.confusion import make_confusion_step
from trainer.summaries.histograms import BINS
from trainer.workdir.workdir import Workdir

ON = {"histograms_every_steps": 4, "images": 5, "confusion": True, "stragglers": True}
EXAMPLES = load()["eval"]


def histograms_and_images(path):
    """All of them: by default TensorBoard's reader keeps one of each."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path), size_guidance={"histograms": 0, "images": 0})
    events.Reload()
    return events


def picture(events, tag, number=0):
    image = events.Images(tag)[number]
    return image.step, np.array(Image.open(io.BytesIO(image.encoded_image_string)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lift", "sharding"),
    [
        ("pmap", "replicated"),
        ("shard_map", "replicated"),
        ("vmap:2", "replicated"),
        ("shard_map", "zero1"),
        ("shard_map", "fsdp"),
    ],
)
def test_the_numbers_of_the_run_are_bit_for_bit_the_same(
    tmp_path, monkeypatch, caplog, lift, sharding
):
    """Of a model with BatchNorm; and its step compiles once."""
    compiled = []  # whether each call of the step did

    def listen(*arguments):
        update = lift_update_step(*arguments)

        def listened(state, batch):
            caplog.clear()
            with jax.log_compiles():
                updated = update(state, batch)
            compiled.append("Compiling" in caplog.text)
            return updated

        return listened

    monkeypatch.setattr(loop, "lift_update_step", listen)
    config = digits(12, lift=lift, state_sharding=sharding, ema_decay=0.9)
    config.model.hidden_size = 64  # wide enough to be sharded
    config.eval.every_steps = 5
    plain = trainer.train(config, tmp_path / "plain", mesh_of(2))
    config.summaries = ON
    seen = trainer.train(config, tmp_path / "seen", mesh_of(2))
    assert_bitwise_equal(plain.state, seen.state)
    assert compiled == 2 * [True, *[False] * 11]
    rows = [without_speed(tmp_path / name / "metrics.jsonl") for name in ("plain", "seen")]
    assert rows[0] == rows[1]
    found = {path.name for path in (tmp_path / "seen").iterdir()}
    assert found - {path.name for path in (tmp_path / "plain").iterdir()} == {
        "confusion.json",
        next(name for name in found if name.startswith("events.")),
    }


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["replicated", "zero1", "fsdp"])
def test_histograms_are_of_the_params_and_of_the_very_next_gradient(tmp_path, sharding):
    """With plain SGD the gradient is the difference of two states over the learning rate."""
    config = digits(5, clip_norm=0.5, lift="shard_map", state_sharding=sharding)
    config.model.hidden_size = 64  # wide enough to be sharded
    config.log_every_steps = config.checkpoint.every_steps = 1
    config.optimizer = {"target": "optax:sgd", "learning_rate": 0.5}
    config.summaries = {"histograms_every_steps": 4}
    norm = trainer.train(config, tmp_path / "run", mesh_of(2)).metrics["train/grad_norm"]
    assert norm > 0.5  # so it was scaled down; shown is what it was before
    before, after = (name_leaves(trainer.load(tmp_path / "run", step=n)["params"]) for n in (4, 5))
    events = histograms_and_images(tmp_path / "run")
    for name in before:
        gradient = (before[name] - after[name]) / 0.5 * (norm / 0.5)
        for tag, values in ((f"params/{name}", before[name]), (f"gradients/{name}", gradient)):
            (event,) = events.Histograms(tag)
            one = event.histogram_value
            values = values.astype(np.float64)
            assert event.step == 4
            np.testing.assert_allclose(one.min, values.min(), atol=1e-6)
            np.testing.assert_allclose(one.max, values.max(), atol=1e-6)
            np.testing.assert_allclose(one.sum, values.sum(), atol=1e-4)
            np.testing.assert_allclose(one.sum_squares, (values**2).sum(), rtol=1e-4, atol=1e-8)
            assert one.num == sum(one.bucket) == values.size
            if name == "Dense_0/kernel":  # few values are so near an edge that rounding moves them
                expected, _ = np.histogram(values, BINS, (one.min, one.max))
                assert np.abs(np.array(one.bucket) - expected).sum() <= 4


@pytest.mark.slow
def test_whole_calls_and_resumes_and_frozen_params(tmp_path):
    config = digits(10, steps_per_call=5, stop_at_step=5, freeze="Dense_0/bias")
    config.summaries = {"histograms_every_steps": 3, "images": 2}
    trainer.train(config, tmp_path / "run", mesh_of(2))
    config.stop_at_step = None
    config.summaries.images = 3  # may change on a resume
    trainer.train(config, tmp_path / "run", mesh_of(2))
    events = histograms_and_images(tmp_path / "run")
    assert [e.step for e in events.Histograms("params/Dense_0/bias")] == [5, 10]
    assert [e.step for e in events.Images("held_out/images")] == [5, 10]
    tags = events.Tags()["histograms"]
    assert {tag for tag in tags if "Dense_0" in tag} == {
        "params/Dense_0/bias",
        "params/Dense_0/kernel",
        "gradients/Dense_0/kernel",
    }


def test_images_are_those_of_the_data(tmp_path):
    config = digits(4)
    config.eval.every_steps = 2
    config.summaries = {"images": 5}
    trainer.train(config, tmp_path / "run", mesh_of(2))
    events = histograms_and_images(tmp_path / "run")
    assert len(events.Images("held_out/images")) == 1  # they do not change
    step, page = picture(events, "held_out/images")
    assert step == 2
    assert page.shape == (2 * 64 + 2, 3 * 64 + 2 * 2, 3)  # tensorboardX writes grey as RGB
    shown = page[66:, 66:130, 0].reshape(8, 8, 8, 8)  # the fifth, each pixel as 8 x 8
    assert (shown == shown[:, :1, :, :1]).all()
    expected = np.asarray(EXAMPLES["x"][4, ..., 0])
    np.testing.assert_allclose(shown[:, 0, :, 0] / 255, expected / expected.max(), atol=0.01)


@pytest.mark.parametrize("lift", ["pmap", "shard_map", "vmap:4"])
def test_a_confusion_matrix_counts_every_example_once(lift):
    """Against numpy; 360 examples in batches of 100 over 4 shards, so the last one is padded."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(10)(x.reshape(x.shape[0], -1))

    task = Task(Model(), softmax_cross_entropy, optax.sgd(0.1))
    state = init_state(task, 0, EXAMPLES["x"][0])
    labels = EXAMPLES["y"].copy()
    labels[:3] = (-1, 10, 10**6)  # of no class
    mask = np.ones(360, np.float32)
    mask[3:7] = 0.0
    lift = make_lift(lift, mesh_of(4))
    source = ArraySource({"x": EXAMPLES["x"], "y": labels, "mask": mask})
    count = HeldOutSums(make_confusion_step(task), source, lift, batch_size=100)
    outputs = task.model.apply({"params": jax.device_get(state.params)}, EXAMPLES["x"])
    expected = np.zeros((10, 10))
    np.add.at(expected, (labels[7:], np.argmax(outputs, axis=-1)[7:]), 1)
    np.testing.assert_array_equal(count(lift.put_state(state)), expected)
    assert count(lift.put_state(state), lambda: True) is None


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int32])
def test_labels_of_any_integers_and_many_classes(dtype):
    """The place of a count among 100 x 100 is more than labels of 8 bits can say."""

    class Identity(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x + self.param("zero", nn.initializers.zeros, ())

    labels, found = np.arange(100).astype(dtype), np.roll(np.arange(100), 7)
    source = ArraySource({"x": np.eye(100, dtype=np.float32)[found], "y": labels})
    task = Task(Identity(), softmax_cross_entropy, optax.sgd(0.1))
    lift = make_lift("pmap", mesh_of(2))
    state = lift.put_state(init_state(task, 0, source[np.zeros(1, int)]["x"][0]))
    counts = HeldOutSums(make_confusion_step(task), source, lift, batch_size=30)(state)
    expected = np.zeros((100, 100))
    expected[np.arange(100), found] = 1
    np.testing.assert_array_equal(counts, expected)


def test_the_confusion_matrix_of_each_evaluation(tmp_path):
    config = digits(40)
    config.eval.every_steps = 20
    config.summaries = {"confusion": True}
    result = trainer.train(config, tmp_path / "run", mesh_of(2))
    found = json.loads((tmp_path / "run/confusion.json").read_text())
    counts = np.array(found["counts"])
    assert found["step"] == 40
    assert counts.sum() == 360
    np.testing.assert_array_equal(counts.sum(axis=1), np.bincount(EXAMPLES["y"]))
    assert np.trace(counts) / 360 == pytest.approx(result.metrics["eval/accuracy"], abs=1e-6)
    events = histograms_and_images(tmp_path / "run")
    assert [e.step for e in events.Images("eval/confusion")] == [20, 40]
    _, shown = picture(events, "eval/confusion", 1)
    darkness = 255 - shown[24::48, 24::48, 0].astype(float)  # the middle of each cell
    np.testing.assert_allclose(darkness / 247, counts / counts.sum(1, keepdims=True), atol=0.01)


@pytest.mark.parametrize(
    ("summaries", "change", "text"),
    [
        ({"images": -1}, None, "config.summaries.images=-1 should be 0 or more"),
        ({"histograms_every_steps": 0}, None, "should be a whole number of at least 1"),
        ({"images": 2}, "flat", r"config.summaries.images=2: x has the shape \(64,\)"),
        ({"confusion": True}, "onehot", r"one class an example; .*labels float32\[1, 10\]"),
        (
            {"confusion": True},
            "alone",
            "confusion=True: there are no held-out examples",
        ),
    ],
)
def test_what_cannot_be_shown_is_refused_before_anything_is_written(
    tmp_path, summaries, change, text
):
    config = digits(4)
    config.summaries = summaries
    config.data = {"target": "test_summaries:other", "change": change or ""}
    with pytest.raises(UserError, match=text):
        trainer.train(config, tmp_path / "run", mesh_of(2))
    assert not (tmp_path / "run").exists()


def other(change):
    """Digits in other forms, named by a config above."""
    sources = {name: dict(arrays) for name, arrays in load().items()}
    for arrays in sources.values():
        if change == "flat":
            arrays["x"] = arrays["x"].reshape(len(arrays["x"]), -1)
        if change == "onehot":
            arrays["y"] = np.eye(10, dtype=np.float32)[arrays["y"]]
    return {"train": sources["train"]} if change == "alone" else sources


@pytest.mark.parametrize("channels", [1, 3])
def test_images_reach_tensorboard_as_they_are(tmp_path, channels):
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (5, 7, channels), dtype=np.uint8)
    writer = TensorBoardWriter(Workdir.check(tmp_path, digits(1)), 0)
    writer.image(3, "eval/confusion", pixels)
    writer.close()
    step, read = picture(histograms_and_images(tmp_path), "eval/confusion")
    assert step == 3
    np.testing.assert_array_equal(read.reshape(5, 7, -1), np.broadcast_to(pixels, (5, 7, 3)))


def test_floats_become_pixels():
    np.testing.assert_array_equal(images.to_uint8(np.array([0.0, 0.2, 1.0])), [0, 51, 255])
    np.testing.assert_array_equal(images.to_uint8(np.array([-2.0, 0.0, 2.0])), [0, 128, 255])
    np.testing.assert_array_equal(images.to_uint8(np.array([3.0, 3.0])), [0, 0])
    np.testing.assert_array_equal(images.to_uint8(np.array([0, 128, 255], np.uint8)), [0, 128, 255])
