"""Manifests: any change to a checkpoint is found."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trainer.checkpoints import manifest
from trainer.checkpoints.manifest import Damaged, File, Leaf, Manifest

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


def test_every_file_is_listed_and_an_intact_checkpoint_passes(folder):
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
def test_arbitrary_bytes_are_reported_as_damage(content):
    expect_damaged(content)


@settings(max_examples=200)
@given(NEARLY)
def test_near_manifests_are_reported_as_damage(stored):
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
