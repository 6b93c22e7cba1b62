"""Fingerprints: equal for equal data, however they are stored, and different for other data."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest

from trainer.data import digits, fingerprint, synthetic, text, tutorial
from trainer.data.fingerprint import describe_changes, fingerprint_of
from trainer.data.grain_source import GrainSource
from trainer.data.stream import ArraySource, as_source
from trainer.errors import UserError
from trainer.lift.same_data import agree_on_data

N = 64


class Rows:
    """A source that is not in memory, as far as podlift knows."""

    def __init__(self, arrays):
        self._source, self.reads = ArraySource(arrays), []

    def __len__(self):
        return len(self._source)

    def __getitem__(self, indices):
        self.reads.append(indices.tolist())
        return self._source[indices]


def arrays(n=N, dtype=np.float32):
    random = np.random.default_rng(0)
    x = (255 * random.uniform(-0.5, 1, size=(n, 5, 3))).astype(dtype)
    return {"x": x, "y": np.arange(n) % 10}


def kinds(tmp_path):
    def parse(record, random=None):
        """Augments in training; a fingerprint has nothing to do with that."""
        return {"x": record * (1 if random is None else random.uniform(1)[0])}

    path = tmp_path / "text"
    path.write_text("to be or not to be " * 200)
    return {
        "arrays": arrays(),
        "long": arrays(5000),
        "one": {"x": np.ones((1, 2))},
        "views": text.characters(8, 20, str(path), stride=3)["train"],
        "rows": Rows(arrays()),
        "few": Rows(arrays(3)),
        "noise": synthetic.images(0, 1000, 10, image_size=4)["train"],
        "tutorial": tutorial.linear(0)["train"],
        "digits": digits.load()["eval"],
        "grain": GrainSource(arrays()["x"], parse),
        "bfloat16": arrays(dtype=ml_dtypes.bfloat16),
    }


def change(before, after):
    """As between two processes, or a checkpoint and this start."""
    saved, now = (
        {"train": json.loads(json.dumps(fingerprint_of(as_source(value, ""))))}
        for value in (before, after)
    )
    return describe_changes(saved, now)


def test_the_same_data_have_the_same_fingerprint(tmp_path):
    first, second = kinds(tmp_path), kinds(tmp_path)
    for name, data in first.items():
        assert not change(data, second[name]), name
        assert fingerprint_of(as_source(data, ""))["rows"], name


def with_value(row, value, name="x", n=N, dtype=np.float32):
    changed = arrays(n, dtype)
    if changed[name].ndim > 1:
        changed[name][row, 2, 1] = value
    else:
        changed[name][row] = value
    return changed


def permuted(made, seed=1):
    order = np.random.default_rng(seed).permutation(N)
    return {name: array[order] for name, array in made.items()}


OTHERS = {
    "longer": (arrays(80), "train: 80 examples instead of 64"),
    "float64": (
        {**arrays(), "x": arrays()["x"].astype(np.float64)},
        "train: x is float64[5,3] instead of float32[5,3]",
    ),
    "shape": (
        {**arrays(), "x": arrays()["x"].reshape(N, 15)},
        "train: x is float32[15] instead of float32[5,3]",
    ),
    "missing": ({"x": arrays()["x"]}, "train: y is nothing instead of int64[]"),
    "row": (with_value(17, 3.0), "train: row 17 differs (x)"),
    "label": (with_value(17, 9, "y"), "train: row 17 differs (y)"),
    "nan": (with_value(17, np.nan), "train: row 17 differs (x)"),
    "infinity": (with_value(17, np.inf), "train: row 17 differs (x)"),
    "order": (permuted(arrays()), "train: row 0 differs (x, y), as do "),
    "scale": ({**arrays(), "x": arrays()["x"] * 1.01}, "train: row 0 differs (x), as do 63 of"),
    "sign": ({**arrays(), "x": -arrays()["x"]}, "train: row 0 differs (x), as do 63 of"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_data_are_told_apart(name):
    other, expected = OTHERS[name]
    assert change(arrays(), other).startswith(expected)
    assert change(arrays(), arrays()) == ""


@pytest.mark.parametrize("name", ["longer", "float64", "shape", "missing", "order", "scale"])
def test_other_data_that_are_not_in_memory_are_told_apart(name):
    found = change(Rows(arrays()), Rows(OTHERS[name][0]))
    assert found.startswith(OTHERS[name][1].partition(" as do")[0])


def test_a_source_that_only_one_side_has():
    made = fingerprint_of(ArraySource(arrays()))
    both, alone = {"train": made, "eval": made}, {"train": made}
    assert describe_changes(both, alone) == "eval: no examples instead of 64"
    assert describe_changes(alone, both) == "eval: 64 examples instead of none"


def test_the_last_and_single_pixels_of_a_large_set_are_told_apart():
    last = with_value(4999, 3.0, n=5000)
    assert change(arrays(5000), last) == "train: a row of 4921 to 4999 differs (x)"
    assert "differs (x)" in change(Rows(arrays(5000)), Rows(last))
    pixel = {"x": np.zeros((N, 300, 300, 3), np.uint8)}
    other = {"x": pixel["x"].copy()}
    other["x"][63, 299, 299, 2] = 1
    assert change(pixel, other) == "train: row 63 differs (x)"


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_the_last_bits_of_floats_may_differ(dtype):
    """A matrix product does not have the same bits on all processors."""
    made = arrays(dtype=np.float64)
    noise = np.random.default_rng(2).uniform(-1, 1, made["x"].shape)
    eps = float(ml_dtypes.finfo(dtype).eps)
    x, near, far = (
        (made["x"] * (1 + factor * eps * noise)).astype(dtype) for factor in (0, 1, 1000)
    )
    assert change({"x": x}, {"x": near}) == ""
    assert np.any(x != near)
    if eps > 1e-8:
        assert change({"x": x}, {"x": far})


def test_few_rows_are_read_one_at_a_time_and_bytes_in_memory_are_bounded(monkeypatch):
    source = Rows(arrays(5000))
    assert len(fingerprint_of(source)["rows"]) == 16
    assert len(source.reads) == 16 + 8 + 1
    assert all(len(read) == 1 for read in source.reads)
    assert {0, 4999} <= {index for (index,) in source.reads}
    assert len(fingerprint_of(ArraySource(arrays(5000)))["rows"]) == 64
    monkeypatch.setattr(fingerprint, "_MOST_BYTES", 1000)
    assert len(fingerprint_of(ArraySource(arrays(5000)))["rows"]) == 16


class Drawn(Rows):
    """Mirrors half of the examples, and draws the random numbers itself."""

    random = np.random.default_rng(3)

    def __getitem__(self, indices):
        batch = super().__getitem__(indices)
        mirrored = self.random.uniform(size=(len(indices), 1, 1)) < 0.5
        return {**batch, "x": np.where(mirrored, batch["x"][:, ::-1], batch["x"])}


def test_a_source_that_draws_random_numbers_is_not_refused(capsys):
    assert change(Drawn(arrays()), Drawn(arrays())) == ""
    assert change(Drawn(arrays()), Drawn(arrays(80))) == "train: 80 examples instead of 64"
    from trainer.console import open_terminal

    open_terminal()
    drawn = Drawn(arrays())
    agree_on_data(Ranks([drawn], 0), {"train": drawn, "eval": None})
    assert 'warning: the "train" source returns other rows each time' in capsys.readouterr().err


class Ranks:
    """The processes of a job, as one of them sees them."""

    def __init__(self, data, rank):
        self._found = [{"train": fingerprint_of(as_source(made, ""))} for made in data]
        self._changes = [describe_changes(self._found[0], found) for found in self._found]
        self._texts = iter([json.dumps(self._found[0]), next(filter(None, self._changes), "")])
        self.writes = rank == 0

    def broadcast_text(self, text, source=0):
        return next(self._texts)

    def gather(self, number):
        return [int(bool(changes)) for changes in self._changes]


@pytest.mark.parametrize("rank", range(4))
def test_every_rank_names_the_ranks_whose_data_differ(rank):
    data = [arrays(), arrays(), with_value(17, 3.0), with_value(17, 3.0)]
    expected = (
        r"^rank 2 has other data than rank 0: train: row 17 differs \(x\) \(so have ranks 3\)"
    )
    with pytest.raises(UserError, match=expected):
        agree_on_data(Ranks(data, rank), {"train": as_source(data[rank], "")})
