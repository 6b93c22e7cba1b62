"""`configs/image_folder.py` on a small folder of real PNG files."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from conftest import mesh_of
from PIL import Image
from runs import config_of

import trainer
from trainer.config.settings import check
from trainer.data.stream import TrainStream
from trainer.step.job import build_job

CLASSES = ("circle", "cross", "stripes")


def draw(kind, random):
    """A shape of one bright colour, anywhere on a dark ground, 20 x 20 pixels."""
    y, x = np.mgrid[:20, :20] - random.integers(7, 13, size=(2, 1, 1))
    inside = {
        "circle": x**2 + y**2 < 20,
        "cross": (abs(x) < 2) | (abs(y) < 2),
        "stripes": (y // 2) % 2 == 0,
    }[kind]
    pixels = random.integers(0, 60, size=(20, 20, 3))
    pixels[inside] += random.integers(120, 190, size=3)
    return pixels.astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for part, count in (("train", 32), ("test", 8)):
        for kind in CLASSES:
            where = path / part / kind
            where.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(draw(kind, random)).save(where / f"{number}.png")
    return path


def small(folder):
    config = config_of("image_folder", num_epochs=12, global_batch_size=32)
    config.model.update({"num_classes": 3, "features": 4, "stage_blocks": (1, 1)})
    config.data.update({"directory": str(folder), "image_size": 20})
    return config


def test_images_are_not_cropped_but_mirrored_and_shifted(folder):
    job = build_job(check(small(folder)))
    assert isinstance(job.stream, TrainStream)
    batch = job.stream.batch_at(0)
    assert (batch["x"].shape, batch["x"].dtype) == ((32, 20, 20, 3), np.uint8)
    files = {
        name: [np.asarray(Image.open(path)) for path in sorted((folder / "train" / name).iterdir())]
        for name in CLASSES
    }
    mirrored, moves = [], set()
    for x, y in zip(batch["x"], batch["y"], strict=True):
        padded = [np.pad(file, ((4, 4), (4, 4), (0, 0))) for file in files[CLASSES[y]]]
        (match,) = {
            (mirror, down, across)
            for file in padded
            for mirror, view in enumerate((file, file[:, ::-1]))
            for down in range(9)
            for across in range(9)
            if (view[down : down + 20, across : across + 20] == x).all()
        }
        mirrored.append(match[0])
        moves.add(match[1:])
    assert 8 <= sum(mirrored) <= 24
    assert len(moves) > 20
    assert job.held_out is not None
    first = sorted((folder / "test" / "circle").iterdir())[0]
    np.testing.assert_array_equal(
        job.held_out[np.array([0])]["x"][0], np.asarray(Image.open(first))
    )


@pytest.mark.slow
def test_it_learns_from_a_folder_of_images(folder, tmp_path):
    state, metrics = trainer.train(small(folder), tmp_path, mesh_of(2))
    assert metrics["eval/accuracy"] > 0.9
    assert int(jax.device_get(state.step)) == 36
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert sum("eval/accuracy" in row for row in rows) == 12
