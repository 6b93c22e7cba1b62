"""Checksums of leaves: the same on devices and on the host, and sensitive to every bit."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.state import checksums

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
    compiled = jax.jit(checksums.checksums)

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
            monkeypatch.setattr(checksums, "_CHUNK", chunk)
            found = [checksums.checksum_of(array) for array in arrays]
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
    assert checksums.checksum_of(changed) != checksums.checksum_of(array)


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_elements_that_changed_places_change_the_checksum(dtype):
    array = np.zeros((4, 5), dtype)
    array[1, 2] = 1
    moved = np.zeros((4, 5), dtype)
    moved[2, 1] = 1
    assert checksums.checksum_of(array) != checksums.checksum_of(moved)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_layout_in_memory_does_not_matter(dtype):
    array = (np.arange(24) % 7).astype(dtype).reshape(4, 6)
    padded = np.zeros((8, 12), dtype)
    padded[::2, ::2] = array
    expected = checksums.checksum_of(array)
    assert checksums.checksum_of(np.asfortranarray(array)) == expected
    assert checksums.checksum_of(padded[::2, ::2]) == expected
    assert checksums.checksum_of(np.ascontiguousarray(array.T).T) == expected
