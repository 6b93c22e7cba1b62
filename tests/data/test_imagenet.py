"""ResNet-50 is the published one, its recipe is the one written down, images are cut as told."""

from __future__ import annotations

import io
from math import cos, log, pi

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import mesh_of
from PIL import Image
from runs import config_of

import trainer
from trainer import optimizers
from trainer.config.settings import check
from trainer.config.targets import build
from trainer.data import images, synthetic
from trainer.data.grain_source import GrainSource, array_records
from trainer.data.stream import ExampleRandom, TrainStream
from trainer.errors import UserError
from trainer.losses import softmax_cross_entropy
from trainer.models.resnet50 import MEAN_RGB, STDDEV_RGB, Bottleneck, ResNet50


def kernel_and_norm(size, inputs, outputs):
    return size * size * inputs * outputs + 2 * outputs


def test_resnet50_is_the_published_one():
    """25,557,032 parameters, and the sizes of table 1 of arXiv:1512.03385."""
    expected = kernel_and_norm(7, 3, 64)
    before = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            expected += kernel_and_norm(1, before, width) + kernel_and_norm(3, width, width)
            expected += kernel_and_norm(1, width, 4 * width)
            if block == 0:
                expected += kernel_and_norm(1, before, 4 * width)
            before = 4 * width
    expected += before * 1000 + 1000
    assert expected == 25_557_032

    def init():
        x = jnp.zeros((2, 224, 224, 3), jnp.uint8)
        return ResNet50().init(jax.random.key(0), x, mutable=True, capture_intermediates=True)

    variables = jax.eval_shape(init)
    params, state = variables["params"], variables["batch_stats"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected
    assert {leaf.dtype.name for leaf in jax.tree.leaves((params, state))} == {"float32"}
    outputs = variables["intermediates"]

    def output_of(*names):
        found = outputs
        for name in names:
            found = found[name]
        return found["__call__"][0]

    assert output_of("Conv_0").shape == (2, 112, 112, 64)
    blocks = [output_of(f"Bottleneck_{i}") for i in range(16)]
    sizes = [(56, 256)] * 3 + [(28, 512)] * 4 + [(14, 1024)] * 6 + [(7, 2048)] * 3
    assert [block.shape for block in blocks] == [(2, s, s, c) for s, c in sizes]
    assert {block.dtype.name for block in blocks} == {"bfloat16"}
    # Version 1.5: the 1x1 convolution in front of the stride still sees the larger image.
    assert output_of("Bottleneck_3", "Conv_0").shape == (2, 56, 56, 128)
    assert output_of("Bottleneck_3", "Conv_1").shape == (2, 28, 28, 128)
    assert outputs["__call__"][0].shape == (2, 1000)
    assert outputs["__call__"][0].dtype == jnp.float32
    assert sorted(params["Bottleneck_1"]) == [
        f"{n}_{i}" for n in ("BatchNorm", "Conv") for i in range(3)
    ]


def test_bytes_are_normalised_on_the_device():
    model = ResNet50(num_classes=3, features=2, stage_blocks=(), dtype="float32")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    floats = ((pixels - np.array(MEAN_RGB)) / np.array(STDDEV_RGB)).astype(np.float32)
    variables = jax.jit(model.init)(jax.random.key(0), floats)
    apply = jax.jit(model.apply)
    np.testing.assert_allclose(apply(variables, pixels), apply(variables, floats), atol=1e-5)
    with pytest.raises(UserError, match="dtype='half'"):
        ResNet50(dtype="half").init(jax.random.key(0), floats)


def test_a_block_starts_as_its_shortcut():
    block = Bottleneck(features=1, strides=1, dtype=jnp.dtype("float32"), axis_name=None)
    x = np.random.default_rng(0).normal(size=(2, 4, 4, 4)).astype(np.float32)
    y, _ = jax.jit(lambda: block.init_with_output(jax.random.key(0), x, train=False))()
    np.testing.assert_array_equal(y, np.maximum(x, 0))


def reduced(**changes):
    config = config_of("imagenet_resnet50", num_steps=12, log_every_steps=4, **changes)
    config.global_batch_size = 32
    config.model.stage_blocks, config.model.features, config.model.num_classes = (1,), 4, 10
    config.data.image_size, config.data.num_train, config.data.num_eval = 16, 3200, 40
    return config


@pytest.mark.wide
def test_the_config_trains_on_several_devices(tmp_path, capsys):
    state, metrics = trainer.train(reduced(), tmp_path, mesh_of(8))
    printed = capsys.readouterr()
    assert "from its own examples" not in printed.err  # batch normalisation is over all devices
    rows = [
        float(line.split("loss ")[1].split()[0])
        for line in printed.out.splitlines()
        if "examples/s" in line
    ]
    assert len(rows) == 3
    assert rows[-1] < rows[0]
    assert np.isfinite(metrics["eval/loss"])
    stats = jax.device_get(state.model_state["batch_stats"])
    assert stats["Bottleneck_0"]["BatchNorm_1"]["mean"].dtype == np.float32
    assert all((leaf != 0).any() and (leaf != 1).any() for leaf in jax.tree.leaves(stats))
    assert (jax.device_get(state.params["Bottleneck_0"]["BatchNorm_2"]["scale"]) != 0).any()


# The recipe


def test_the_learning_rate_is_that_of_flax_example():
    """100 epochs of 1,251 steps: up over 5, and then down as a cosine over the other 95."""
    settings = check(config_of("imagenet_resnet50"))
    rate = build(settings.optimizer["learning_rate"], "here", num_steps=125_100)
    warm = 5 * 1251
    expected = {0: 0.0, 1: 0.4 / warm, 1251: 0.08, warm: 0.4, 125_100: 0.0}
    for step in (warm + 1, 40_000, 125_099):
        expected[step] = 0.4 * 0.5 * (1 + cos(pi * (step - warm) / (125_100 - warm)))
    for step, value in expected.items():
        assert float(rate(step)) == pytest.approx(value, rel=1e-5, abs=1e-7), step


def test_the_learning_rate_follows_the_batch():
    config = config_of("imagenet_resnet50")
    config.global_batch_size = 256
    assert check(config).optimizer["learning_rate"]["peak_value"] == pytest.approx(0.1)
    config.optimizer.learning_rate.peak_value = 3.0  # and is one's own where one says so
    assert check(config).optimizer["learning_rate"]["peak_value"] == 3.0
    assert check(config).global_batch_size == 256


def test_weight_decay_is_of_kernels_only_and_passes_through_the_momentum():
    params = {
        "kernel": jnp.array([[2.0, -3.0]]),
        "bias": jnp.array([2.0]),
        "scale": jnp.array([5.0]),
    }
    rate, momentum, decay = 0.5, 0.9, 0.1
    optimizer = optimizers.sgd(rate, momentum, nesterov=True, weight_decay=decay)
    state = optimizer.init(params)
    w = {name: np.array(leaf) for name, leaf in params.items()}
    trace = {name: np.zeros_like(leaf) for name, leaf in w.items()}
    for step in range(3):
        grads = jax.tree.map(lambda leaf: jnp.full_like(leaf, step + 1.0), params)  # noqa: B023
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for name in w:
            gradient = step + 1.0 + (decay * w[name] if name == "kernel" else 0.0)
            trace[name] = gradient + momentum * trace[name]
            w[name] = w[name] - rate * (gradient + momentum * trace[name])
            np.testing.assert_allclose(params[name], w[name], rtol=1e-6)


def test_label_smoothing():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    batch = {"y": jnp.array([0, 1])}
    plain = softmax_cross_entropy(logits, batch)
    np.testing.assert_allclose(plain, [log(2), log(10)], rtol=1e-6)
    assert (softmax_cross_entropy(logits, batch, label_smoothing=0.0) == plain).all()
    # Of 0.3, each of three classes gets a tenth: the label is (0.8, 0.1, 0.1), or (0.1, 0.8, 0.1).
    smooth = softmax_cross_entropy(logits, batch, label_smoothing=0.3)
    expected = [0.8 * log(2) + 0.2 * log(4), 0.9 * log(10) - 0.1 * log(0.8)]
    np.testing.assert_allclose(smooth, expected, rtol=1e-6)
    per_token = softmax_cross_entropy(logits[None], {"y": batch["y"][None]}, label_smoothing=0.3)
    np.testing.assert_allclose(per_token, [np.mean(expected)], rtol=1e-6)
    with pytest.raises(UserError, match="label_smoothing=1"):
        softmax_cross_entropy(logits, batch, label_smoothing=1)


# Data


def test_synthetic_images_are_as_many_as_in_imagenet_and_take_little_memory():
    data = synthetic.images(seed=0, image_size=8, num_classes=10)
    assert (len(data["train"]), len(data["eval"])) == (1_281_167, 50_000)
    stream = TrainStream(data["train"], 1024, seed=0)
    assert stream.steps_per_epoch == 1251
    batch = stream.batches_at(1250, 2)
    assert batch["x"].shape == (2, 1024, 8, 8, 3)
    assert (batch["x"].dtype, batch["y"].dtype) == (np.uint8, np.int32)
    again = synthetic.images(seed=0, image_size=8, num_classes=10)["train"]
    last = np.array([1_281_166])
    np.testing.assert_array_equal(again[last]["x"], data["train"][last]["x"])
    assert data["train"][last]["y"] == 1_281_166 % 64 % 10


def jpeg(seed, width, height, mode="RGB"):
    """Stripes and a ramp, so that parts of an image differ from each other."""
    rows, columns = np.mgrid[:height, :width]
    x = np.stack([(rows * 5 + seed * 40) % 256, columns * 255 // width, rows * columns % 256], -1)
    file = io.BytesIO()
    Image.fromarray(x.astype(np.uint8)).convert(mode).save(file, "JPEG", quality=95)
    return file.getvalue()


SIZES = [(80, 60), (60, 80), (64, 64), (120, 60), (50, 90), (128, 96)]


@pytest.fixture
def folder(tmp_path):
    """12 training images of three classes, and 3 held out."""
    for i in range(15):
        part = "train" if i < 12 else "val"
        where = tmp_path / part / f"n0{i % 3}"
        where.mkdir(parents=True, exist_ok=True)
        mode = {4: "L", 5: "CMYK"}.get(i, "RGB")
        (where / f"{i:02d}.JPEG").write_bytes(jpeg(i, *SIZES[i % len(SIZES)], mode))
    (tmp_path / "train" / "n00" / "notes.txt").write_text("no image")
    return tmp_path


def write_array_records(folder):
    from array_record.python.array_record_module import ArrayRecordWriter

    for part in ("train", "val"):
        records = images.Folder(str(folder / part), ["n00", "n01", "n02"])
        writer = ArrayRecordWriter(str(folder / f"{part}.array_record"), "group_size:1")
        for index in range(len(records)):
            writer.write(records[index])
        writer.close()


def test_the_same_images_from_a_folder_and_from_array_records(folder):
    """The same pixels, for the same seed and position, whoever reads which rows in which order."""
    write_array_records(folder)
    from_folder = images.folder(str(folder), image_size=24, num_classes=3)
    from_records = array_records(
        str(folder / "train.array_record"),
        images.Decode(image_size=24),
        str(folder / "val.array_record"),
        num_threads=2,
    )
    stream = TrainStream(from_folder["train"], 4, seed=3)
    whole = stream.batches_at(0, 9)
    assert whole["x"].shape == (9, 4, 24, 24, 3)
    assert (whole["x"].dtype, whole["y"].dtype) == (np.uint8, np.int32)
    assert sorted(whole["y"][:3].ravel()) == [0] * 4 + [1] * 4 + [2] * 4
    other = TrainStream(from_records["train"], 4, seed=3)
    for step in (7, 2):
        for rows in (slice(0, 2), np.array([1, 3])):
            part = other.batch_at(step, rows)
            for name in ("x", "y"):
                np.testing.assert_array_equal(part[name], whole[name][step, rows])
    # Of one image, three epochs show three different parts; another seed shows a fourth.
    seen = {image.tobytes() for image in whole["x"].reshape(36, -1)}
    assert len(seen) == 36
    assert TrainStream(from_folder["train"], 4, seed=4).batch_at(0)["x"][0].tobytes() not in seen
    held_out = [source["eval"][np.array([[2, 0]])] for source in (from_folder, from_records)]
    np.testing.assert_array_equal(held_out[0]["x"], held_out[1]["x"])
    assert held_out[0]["y"].tolist() == [[2, 0]]


def test_evaluation_takes_the_central_square():
    x = np.zeros((256, 400, 3), np.uint8)
    x[16:240, 88:312] = 200  # the 224 x 224 pixels in the middle
    file = io.BytesIO()
    Image.fromarray(x).save(file, "PNG")
    example = images.Decode(224)(images.to_record(7, file.getvalue()))
    assert (example["x"] == 200).all()
    assert example["y"] == 7


def test_random_boxes_are_within_the_image_and_of_the_requested_sizes():
    areas = []
    for one in ExampleRandom(0, np.arange(2000)).split():
        box = images.random_box(200, 150, one, 0.08, 4 / 3)
        left, upper, right, lower = box
        assert 0 <= left < right <= 200
        assert 0 <= upper < lower <= 150
        assert 0.72 < (right - left) / (lower - upper) < 1.39
        areas.append((right - left) * (lower - upper) / 200 / 150)
    assert 0.07 < min(areas) < 0.1
    assert max(areas) > 0.9
    narrow = ExampleRandom(0, np.arange(50)).split()
    assert None in [images.random_box(1000, 10, one, 0.5, 4 / 3) for one in narrow]


def test_a_source_and_an_augmentation_draw_different_numbers():
    source = GrainSource(
        np.arange(8), lambda record, random=None: {"x": random.uniform(2) if random else record}
    )
    augment = lambda batch, random: {**batch, "r": random.uniform(2)}  # noqa: E731
    batch = TrainStream(source, 8, seed=0, augment=augment).batches_at(0, 3)
    assert batch["x"].shape == batch["r"].shape == (3, 8, 2)
    assert len(np.unique([batch["x"], batch["r"]])) == 2 * 3 * 8 * 2
    assert source[np.arange(8)]["x"].tolist() == list(range(8))


@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_a_file_that_is_not_an_image_is_named(folder, damage):
    path = folder / "train" / "n01" / "07.JPEG"
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[: len(whole) // 2], "text": b"<html>", "empty": b""}[damage])
    stream = TrainStream(images.folder(str(folder), 24)["train"], 12, seed=0)
    with pytest.raises(UserError, match=r"train/n01/07\.JPEG is not a complete image: "):
        stream.batch_at(0)


def test_a_damaged_record_is_named(folder):
    write_array_records(folder)
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(folder / "z.array_record"), "group_size:1")
    writer.write(b"abc")
    writer.close()
    source = array_records(str(folder / "[vz]*.array_record"), images.Decode(24))["train"]
    assert len(source) == 4
    with pytest.raises(UserError, match=r"record 3 of config\.data\.train='.* is 3 bytes long"):
        source[np.arange(4)]


def test_what_is_missing_in_a_folder_is_named(folder):
    with pytest.raises(UserError, match="has no train/ with a folder of images") as error:
        images.folder(str(folder / "train"))
    assert "image-net.org" in error.value.hint
    with pytest.raises(UserError, match=r"contains 3 folders.*num_classes is 1000"):
        images.folder(str(folder), num_classes=1000)
    (folder / "val" / "n09").mkdir()
    with pytest.raises(UserError, match="val/n09 is not one of the classes"):
        images.folder(str(folder))
    (folder / "val" / "n09").rmdir()
    for path in (folder / "val").glob("*/*"):
        path.rename(path.with_suffix(".txt"))
    with pytest.raises(UserError, match="contain no image"):
        images.folder(str(folder))
