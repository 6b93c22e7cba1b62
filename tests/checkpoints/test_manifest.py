"""A checkpoint that is not what was written is found, whatever was changed in it."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trainer.checkpoints import manifest
from trainer.checkpoints.manifest import Damaged, File, Leaf, Manifest
from trainer.state import train_state as state

NAMES = st.text(min_size=1)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)
LEAVES = st.builds(
    Leaf,
    st.lists(st.integers(0, 2**40), max_size=4).map(tuple),
    st.sampled_from(["float32", "bfloat16", "int8", "bool", "float8_e4m3fn"]),
    st.integers(0, 2**32 - 1),
)
FILES = st.builds(File, st.integers(0, 2**60), st.binary(min_size=32, max_size=32).map(bytes.hex))
MANIFESTS = st.builds(
    Manifest,
    st.integers(0, 2**62),
    st.dictionaries(st.text(), JSON, max_size=4),
    st.dictionaries(NAMES, LEAVES, max_size=4),
    st.dictionaries(NAMES, FILES, max_size=4),
)


def is_same(a, b):
    """Equality of JSON in which NaN equals itself, and 1, 1.0 and True are three things."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(is_same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(is_same, a, b))
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (
            a == b and math.copysign(1, a) == math.copysign(1, b)
        )
    return a == b


@given(MANIFESTS)
@example(Manifest(0, {"nan": [math.nan, -math.inf, -0.0], "ü\u2028\U0001f600": {"": []}}, {}, {}))
def test_what_is_written_is_read(written):
    read = Manifest.from_text(written.to_text())
    assert is_same(read.meta, written.meta)
    assert (read.step, read.leaves, read.files) == (written.step, written.leaves, written.files)
    assert read.to_text() == written.to_text()


@given(MANIFESTS, st.data())
def test_any_other_character_is_found(written, data):
    text = written.to_text()
    start = data.draw(st.integers(0, len(text) - 1), "start")
    end = data.draw(st.sampled_from([start, start + 1]) | st.integers(start, len(text)), "end")
    put = data.draw(st.text(max_size=2) | st.sampled_from(list('0123456789"{}[],: \n')), "put")
    changed = text[:start] + put + text[end:]
    if changed == text:
        return
    with pytest.raises(Damaged):
        Manifest.from_text(changed)


@given(MANIFESTS, MANIFESTS)
def test_the_checksum_of_another_is_found(one, other):
    mixed = json.loads(one.to_text())
    mixed["sha256"] = json.loads(other.to_text())["sha256"]
    if one.to_text() == other.to_text():
        return
    with pytest.raises(Damaged):
        Manifest.from_text(json.dumps(mixed) + "\n")


# One checkpoint that is damaged in every way there is

CONTENTS = {
    "state/_METADATA": b'{"a": 1}',
    "state/d/0f": bytes(range(60)),
    "state/d/1e": bytes(reversed(range(60))),
    "state/empty": b"",
    "top ü": b"\n",
}


def write_checkpoint(folder, step=7):
    for name, content in CONTENTS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    meta = {"best": None, "loss": math.nan, "ü": "\u00fc"}
    leaves = {"params/w": Leaf((3, 5), "float32", 12345), "step": Leaf((), "int32", 7)}
    written = Manifest(step, meta, leaves, manifest.describe_files(folder))
    (folder / manifest.NAME).write_text(written.to_text())
    return written


@pytest.fixture
def folder(tmp_path):
    write_checkpoint(tmp_path)
    return tmp_path


def test_every_file_is_listed_and_a_whole_checkpoint_is_whole(folder):
    listed = manifest.read(folder, 7)
    assert {name: file.size for name, file in listed.files.items()} == {
        name: len(content) for name, content in CONTENTS.items()
    }
    (folder / "state/of nobody").write_text("ignored")
    assert manifest.read(folder) == manifest.read_alone(folder) == listed
    with pytest.raises(Damaged, match=r"belongs to step 7$"):
        manifest.read_alone(folder, 8)


def changes_of(data):
    """Ways to change any one byte, to lose it or all from it on, or to gain one."""
    for place in range(len(data)):
        for bit in (0, 5, 7):
            yield data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]
        yield data[:place] + data[place + 1 :]
        yield data[:place]
    for place in range(len(data) + 1):
        for byte in b'\n\r 0"\xff':
            yield data[:place] + bytes([byte]) + data[place:]


def test_every_changed_byte_of_the_manifest_is_found(folder):
    path = folder / manifest.NAME
    whole = path.read_bytes()
    missed = []
    for changed in {*changes_of(whole)} - {whole}:
        path.write_bytes(changed)
        try:
            manifest.read_alone(folder)
        except Damaged:
            continue
        missed.append(changed)
    assert missed == []


@pytest.mark.parametrize("end", [b"\r", b"\r\n", b""])
def test_another_end_of_the_manifest_is_found(folder, end):
    """As of a copy that went through a machine with other line ends."""
    path = folder / manifest.NAME
    path.write_bytes(path.read_bytes().removesuffix(b"\n") + end)
    with pytest.raises(Damaged):
        manifest.read_alone(folder)


@pytest.mark.parametrize("name", CONTENTS)
def test_every_changed_byte_of_a_file_is_found(folder, name):
    path = folder / name
    for changed in {*changes_of(CONTENTS[name])} - {CONTENTS[name]}:
        path.write_bytes(changed)
        with pytest.raises(Damaged) as found:
            manifest.read(folder)
        assert str(found.value).startswith(f"{name} ")
    path.unlink()
    with pytest.raises(Damaged, match=f"^{name} is missing$"):
        manifest.read(folder)
    path.mkdir()
    with pytest.raises(Damaged, match=f"^{name} "):
        manifest.read(folder)


def test_files_that_changed_places_are_found(folder):
    one, other = folder / "state/d/0f", folder / "state/d/1e"
    one.write_bytes(CONTENTS["state/d/1e"])
    other.write_bytes(CONTENTS["state/d/0f"])
    with pytest.raises(Damaged, match="checksum differs"):
        manifest.read(folder)


def test_a_folder_that_is_gone_is_found(folder):
    shutil.rmtree(folder / "state")
    with pytest.raises(Damaged, match=r"^state/_METADATA is missing$"):
        manifest.read(folder)
    (folder / "state").write_text("a file")
    with pytest.raises(Damaged, match=r"^state/_METADATA cannot be read"):
        manifest.read(folder)


# Rubbish

NEARLY = st.fixed_dictionaries(
    {"sha256": JSON, "body": JSON}
    | {
        "body": JSON
        | st.fixed_dictionaries(
            {},
            optional={
                "version": JSON | st.just(1),
                "step": JSON,
                "meta": JSON,
                "leaves": JSON
                | st.dictionaries(
                    NAMES,
                    JSON | st.fixed_dictionaries({"shape": JSON, "dtype": JSON, "checksum": JSON}),
                ),
                "files": JSON
                | st.dictionaries(
                    NAMES, JSON | st.fixed_dictionaries({"size": JSON, "sha256": JSON})
                ),
            },
        )
    }
)


def expect_damaged(content):
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / manifest.NAME).write_bytes(content)
        for read in (manifest.read_alone, manifest.read):
            with pytest.raises(Damaged):
                read(Path(name))


@given(st.binary() | st.text().map(str.encode))
@example(b"")
@example(b"\n")
@example(b"\xff\xfe")
@example(b"[" * 100_000)
@example(b'{"body":' * 50_000)
@example(b'{"sha256": "", "body": {"version": ' + b"9" * 5000 + b"}}")
@example(b'{"sha256": "", "body": {"version": 1e999}}')
@example(b'{"sha256": "", "body": {"version": NaN}}')
@example(b"\x00" * 4096)  # what a power failure leaves
def test_rubbish_is_damaged_and_nothing_worse(content):
    expect_damaged(content)


@settings(max_examples=200)
@given(NEARLY)
def test_what_looks_like_a_manifest_is_damaged_and_nothing_worse(stored):
    expect_damaged(json.dumps(stored).encode())


def test_a_manifest_that_is_no_file_is_damaged(tmp_path):
    with pytest.raises(Damaged, match=r"^it is empty$"):
        manifest.read_alone(tmp_path)
    with pytest.raises(Damaged, match="did not finish"):
        manifest.read_alone(tmp_path / "nowhere")
    (tmp_path / manifest.NAME).mkdir()
    with pytest.raises(Damaged, match="cannot be read"):
        manifest.read_alone(tmp_path)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(Damaged, match="cannot be read"):
        manifest.read_alone(tmp_path / "file")


# Checksums of leaves: on the devices and in the memory of the host

DTYPES = [
    *["float32", "float16", "bfloat16", "float64", "float8_e4m3fn", "float8_e5m2"],
    *["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool"],
]
SHAPES = [(), (0,), (3, 0, 2), (1,), (5, 3), (2, 3, 4)]


def array_of(dtype, shape, data):
    """Any bits: NaN of every kind, infinities, -0.0, subnormal numbers."""
    dtype = jax.numpy.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.frombuffer(data.draw(st.binary(min_size=size, max_size=size), str(dtype)), np.uint8)
    return (raw & 1 if dtype == np.bool_ else raw.copy()).view(dtype).reshape(shape)


@pytest.fixture(scope="module")
def on_devices():
    """Checksums as devices take them, of 64-bit leaves as well."""
    compiled = jax.jit(state.checksums)

    def run(tree):
        with jax.enable_x64(True):
            return np.asarray(compiled(tree)).tolist()

    return run


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_host_and_device_take_the_same_checksum(on_devices, shape, monkeypatch):
    @settings(max_examples=25)
    @given(st.data())
    def check(data):
        arrays = [array_of(dtype, shape, data) for dtype in DTYPES]
        expected = on_devices(arrays)
        for chunk in (1 << 20, 1, 7):
            monkeypatch.setattr(state, "_CHUNK", chunk)
            found = [state.checksum_of(array) for array in arrays]
            assert dict(zip(DTYPES, found, strict=True)) == dict(zip(DTYPES, expected, strict=True))

    check()


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
@settings(max_examples=60)
def test_one_changed_bit_changes_the_checksum(dtype, data):
    array = array_of(dtype, data.draw(st.sampled_from([(), (1,), (5, 3)])), data)
    changed = array.copy()
    raw = changed.reshape(-1).view(np.uint8)
    place = data.draw(st.integers(0, raw.size - 1), "byte")
    raw[place] ^= 1 if dtype == "bool" else 1 << data.draw(st.integers(0, 7), "bit")
    assert state.checksum_of(changed) != state.checksum_of(array)


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_elements_that_changed_places_change_the_checksum(dtype):
    array = np.zeros((4, 5), dtype)
    array[1, 2] = 1
    moved = np.zeros((4, 5), dtype)
    moved[2, 1] = 1
    assert state.checksum_of(array) != state.checksum_of(moved)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_layout_in_memory_does_not_matter(dtype):
    array = (np.arange(24) % 7).astype(dtype).reshape(4, 6)
    padded = np.zeros((8, 12), dtype)
    padded[::2, ::2] = array
    expected = state.checksum_of(array)
    assert state.checksum_of(np.asfortranarray(array)) == expected
    assert state.checksum_of(padded[::2, ::2]) == expected
    assert state.checksum_of(np.ascontiguousarray(array.T).T) == expected
