"""The order of examples depends on the seed and the step, and on nothing else."""

from __future__ import annotations

import gzip
import threading
import time
import tracemalloc

import numpy as np
import pytest

from trainer.data import idx, text
from trainer.data.augment import flip_and_shift
from trainer.data.prefetch import prefetch
from trainer.data.stream import ArraySource, ExampleRandom, TrainStream, as_source, eval_batches
from trainer.errors import UserError

N, B = 103, 8
SOURCE = ArraySource({"x": np.arange(N), "y": 2 * np.arange(N)})


def test_an_epoch_visits_every_example_once_except_its_remainder():
    stream = TrainStream(SOURCE, B, seed=0)
    epochs = [
        np.concatenate([stream.batch_at(12 * e + s)["x"] for s in range(12)]) for e in range(2)
    ]
    assert stream.steps_per_epoch == 12
    for seen in epochs:
        assert len(set(seen.tolist())) == 96
    assert (epochs[0] != epochs[1]).any()
    assert (stream.batch_at(5)["y"] == 2 * stream.batch_at(5)["x"]).all()


def test_a_step_gives_the_same_batch_in_any_order_and_any_grouping():
    augment = lambda batch, random: {**batch, "r": random.uniform(2)}  # noqa: E731
    stream = TrainStream(SOURCE, B, seed=3, augment=augment)
    straight = [stream.batch_at(step) for step in range(30)]
    fresh = TrainStream(SOURCE, B, seed=3, augment=augment)
    grouped = fresh.batches_at(7, 20)  # crosses two epochs, and starts in the middle
    for name in ("x", "y", "r"):
        np.testing.assert_array_equal(grouped[name], [b[name] for b in straight[7:27]])
    assert (TrainStream(SOURCE, B, seed=4).batch_at(0)["x"] != straight[0]["x"]).any()


def test_each_process_takes_its_rows_of_the_same_global_batch():
    augment = lambda batch, random: {**batch, "r": random.uniform(1)}  # noqa: E731
    whole = TrainStream(SOURCE, B, seed=0, augment=augment).batch_at(17)
    for rows in (slice(0, 4), slice(4, 8), np.array([0, 1, 4, 5])):
        part = TrainStream(SOURCE, B, seed=0, augment=augment).batch_at(17, rows)
        for name in whole:
            np.testing.assert_array_equal(part[name], whole[name][rows])


def test_all_examples_in_one_batch_keep_their_order():
    assert (TrainStream(SOURCE, N, seed=0).batch_at(4)["x"] == np.arange(N)).all()


@pytest.mark.parametrize("layout", ["C", "F"])
def test_only_the_rows_of_a_batch_are_copied(layout):
    source = ArraySource({"x": np.zeros((1000, 1000), order=layout)})
    indices = np.arange(3)
    tracemalloc.start()
    source[indices]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(UserError, match="global_batch_size=104 is more than the 103"):
        TrainStream(SOURCE, 104, seed=0)


def test_example_random_is_uniform_and_uncorrelated():
    random = ExampleRandom(0, np.arange(20_000))
    first, second = random.uniform(2).T
    again = random.uniform(1)[:, 0]
    counts = np.histogram(first, bins=10, range=(0, 1))[0]
    assert abs(counts / 2000 - 1).max() < 0.1
    for a, b in ((first, second), (first, again), (first[1:], first[:-1])):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.03
    # SplitMix64's first outputs for seed 1234567, as published with its reference code.
    from trainer.data.stream import _GAMMA, _mix

    state = np.uint64(1234567)
    with np.errstate(over="ignore"):
        outputs = [int(_mix(state + np.uint64(i) * _GAMMA)) for i in range(3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_flip_and_shift_move_all_channels_alike():
    x = np.zeros((400, 5, 5, 1), np.float32)
    x[:, 2, 1] = 1.0
    batch = flip_and_shift({"x": x}, ExampleRandom(0, np.arange(400)), shift=1)
    places = {tuple(np.argwhere(image[..., 0])[0]) for image in batch["x"]}
    assert (batch["x"].sum(axis=(1, 2, 3)) == 1).all()
    assert places == {(r, c) for r in (1, 2, 3) for c in (0, 1, 2, 3, 4)}


@pytest.mark.parametrize("batch_size", [1, 8, 103, 200])
def test_evaluation_visits_every_example_once(batch_size):
    seen: list[int] = []
    for batch in eval_batches(SOURCE, batch_size):
        assert len(batch["x"]) == batch_size
        seen += batch["x"][batch["mask"] > 0].tolist()
    assert seen == list(range(N))


def test_sources_are_checked():
    with pytest.raises(UserError, match="lengths"):
        as_source({"x": np.zeros(3), "y": np.zeros(4)}, "here")
    with pytest.raises(UserError, match="here is a int"):
        as_source(3, "here")


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_prefetch_keeps_order_and_raises_errors_of_its_thread(depth):
    assert list(prefetch(lambda k: k * k, range(20), depth)) == [k * k for k in range(20)]

    def make(key):
        if key == 2:
            raise ValueError("two")
        return key

    batches = prefetch(make, range(5), depth)
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(ValueError, match="two"):
        next(batches)


def test_closing_a_prefetch_stops_its_thread():
    batches = prefetch(lambda k: k, iter(int, 1), 2)  # endless
    next(batches)
    batches.close()
    deadline = time.monotonic() + 5
    while any(t.name == "podlift-prefetch" for t in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def write_idx(path, array, code=8):
    header = bytes([0, 0, code, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes()))


def test_idx_files(tmp_path):
    images = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    for name in ("train", "t10k"):
        write_idx(tmp_path / f"{name}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte.gz", np.array([3, 1], np.uint8))
    data = idx.load(str(tmp_path), num_train=1)
    np.testing.assert_allclose(data["eval"]["x"][..., 0] * 255, images, rtol=1e-6)
    assert len(data["train"]["x"]) == 1
    assert data["eval"]["y"].tolist() == [3, 1]
    whole = (tmp_path / "t10k-images-idx3-ubyte.gz").read_bytes()
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(whole[:-9])
    with pytest.raises(UserError, match="not a complete idx file"):
        idx.load(str(tmp_path))
    (tmp_path / "t10k-images-idx3-ubyte.gz").unlink()
    with pytest.raises(UserError, match=r"holds no t10k-images-idx3-ubyte\.gz"):
        idx.load(str(tmp_path))


def test_text_windows_predict_the_next_character():
    data = text.characters(length=16, vocab_size=96, stride=4)
    x, y = data["train"]["x"][10], data["train"]["y"][10]
    assert (x[1:] == y[:-1]).all()
    assert (data["train"]["x"][11][:12] == x[4:]).all()
    assert max(data["train"]["x"].max(), data["eval"]["y"].max()) < 96
    with pytest.raises(UserError, match="too short"):
        text.characters(length=10**6, vocab_size=96)


def parse_record(record: bytes):
    values = np.frombuffer(record, np.int64)
    return {"x": values[:1].astype(np.float32), "y": values[1]}


def test_grain_reads_array_records(tmp_path):
    from array_record.python.array_record_module import ArrayRecordWriter

    from trainer.data.grain_source import array_records

    for part in range(2):
        writer = ArrayRecordWriter(str(tmp_path / f"part-{part}.array_record"), "group_size:1")
        for i in range(50 * part, 50 * part + 50):
            writer.write(np.array([i, i * i], np.int64).tobytes())
        writer.close()
    parse = f"{parse_record.__module__}:parse_record"
    data = array_records(str(tmp_path / "*.array_record"), parse)
    stream = TrainStream(data["train"], 10, seed=0)
    batch = stream.batches_at(3, 2)
    assert batch["x"].shape == (2, 10, 1)
    assert batch["y"].shape == (2, 10)
    np.testing.assert_array_equal(batch["x"][..., 0] ** 2, batch["y"])
    in_memory = TrainStream(ArraySource({"x": np.arange(100)}), 10, seed=0)
    np.testing.assert_array_equal(batch["x"][..., 0], in_memory.batches_at(3, 2)["x"])
    with pytest.raises(UserError, match="matches no file"):
        array_records(str(tmp_path / "nothing-*"), parse)


def test_grain_map_datasets_are_sources():
    import grain

    from trainer.data.grain_source import GrainSource

    dataset = grain.MapDataset.range(40).map(lambda i: {"x": np.float32(i)})
    batch = TrainStream(GrainSource(dataset), 8, seed=0).batch_at(1)
    assert batch["x"].shape == (8,)
