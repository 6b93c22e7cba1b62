"""Fingerprints of sources: whether two processes, or two starts of a run, have the same examples.

A fingerprint holds the length, the shapes and dtypes of an example, and a sketch of some rows at
fixed positions. Arrays of up to 16 MB in memory are covered completely, in blocks of rows; of other
sources 16 rows are read, one at a time, without augmentation.

The sketch of floats is a random projection, compared with a tolerance: data that are computed, not
read, differ in their last bits between processors. Anything else is compared bit for bit.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from trainer.data.stream import ArraySource, ExampleRandom, Source

# JSON: {"length": int, "arrays": {name: "float32[8,8,1]"}, "rows": {"0-22": {name: sketch}}}
Fingerprint = dict[str, Any]

_MOST_BYTES, _BLOCKS = 16 << 20, 64
_ROWS = 16
_ULPS = 8  # how far values may be apart, in units of the last place of float32 or a shorter dtype
_WEIGHTS = 2 * ExampleRandom(0, np.arange(4093)).uniform(2).T - 1


def fingerprint_of(source: Source) -> Fingerprint:
    """The fingerprint of a source, as JSON.

    Reads single rows, half of them twice: if a source then returns something else, "rows" is empty,
    since a source that draws random numbers itself has no rows to compare.
    """
    length = len(source)
    if type(source) is ArraySource and _is_small(source.arrays):
        arrays = source.arrays
        edges = np.linspace(0, length, min(length, _BLOCKS) + 1).astype(int)
        rows = {
            f"{start}-{end - 1}": {
                name: _sketch(array[start:end]) for name, array in arrays.items()
            }
            for start, end in itertools.pairwise(edges)
        }
        return {"length": length, "arrays": _describe(arrays), "rows": rows}
    positions = _positions(length)
    rows = {f"{i}-{i}": _sketch_row(_row(source, i)) for i in positions}
    again = {f"{i}-{i}": _sketch_row(_row(source, i)) for i in positions[::2]}
    is_reproducible = not any(_differs(rows[place], row) for place, row in again.items())
    return {
        "length": length,
        "arrays": _describe(_row(source, 0)),
        "rows": rows if is_reproducible else {},
    }


def describe_changes(before: Mapping[str, Fingerprint], after: Mapping[str, Fingerprint]) -> str:
    """How sources differ, on one line; empty if they do not.

    Args:
        before: fingerprints by the name of the source.
        after: the same, for the sources that should not differ.
    """
    found = {
        name: describe_change(before.get(name), after.get(name)) for name in {**before, **after}
    }
    return "; ".join(f"{name}: {what}" for name, what in found.items() if what)


def describe_change(before: Fingerprint | None, after: Fingerprint | None) -> str:
    """How one source differs; None stands for no source."""
    if before is None or after is None:
        return "" if before is after else _change_of_length(before, after)
    changes = []
    if before["length"] != after["length"]:
        changes.append(_change_of_length(before, after))
    for name in before["arrays"] | after["arrays"]:
        old, new = (side["arrays"].get(name, "nothing") for side in (before, after))
        if old != new:
            changes.append(f"{name} is {new} instead of {old}")
    if changes:
        return ", ".join(changes)
    both = [place for place in after["rows"] if place in before["rows"]]
    found = {place: _differs(before["rows"][place], after["rows"][place]) for place in both}
    differ = [place for place, names in found.items() if names]
    if not differ:
        return ""
    more = f", as do {len(differ) - 1} of the others" if len(differ) > 1 else ""
    return f"{_rows(differ[0])} ({', '.join(found[differ[0]])}){more}"


def _is_small(arrays: Mapping[str, Any]) -> bool:
    if not all(isinstance(array, np.ndarray) for array in arrays.values()):
        return False
    return sum(int(array.nbytes) for array in arrays.values()) <= _MOST_BYTES


def _positions(length: int) -> list[int]:
    """The first and the last row, and others at the multiples of the golden ratio, modulo 1."""
    golden = (math.sqrt(5) - 1) / 2
    spread = [int(length * (k * golden % 1)) for k in range(1, _ROWS - 1)]
    return sorted({0, length - 1, *spread})


def _row(source: Source, index: int) -> dict[str, np.ndarray]:
    return {name: np.asarray(array) for name, array in source[np.array([index])].items()}


def _describe(arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    return {name: f"{a.dtype}[{','.join(map(str, a.shape[1:]))}]" for name, a in arrays.items()}


def _sketch_row(row: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {name: _sketch(array) for name, array in row.items()}


def _sketch(array: np.ndarray) -> Any:
    """Of floats [projection, tolerance]; of anything else, and of NaN, the CRC-32."""
    if array.dtype.hasobject:
        return 0  # pointers
    if jnp.issubdtype(array.dtype, jnp.floating):
        flat = np.ravel(array).astype(np.float64)
        eps = max(
            float(jnp.finfo(dtype).eps)  # type: ignore[no-untyped-call]
            for dtype in (array.dtype, np.float32)
        )
        with np.errstate(all="ignore"):
            found = [_project(flat), _ULPS * eps * float(np.abs(flat).sum())]
        if all(map(math.isfinite, found)):
            return [float(f"{number:.9g}") for number in found]
    return zlib.crc32(np.ascontiguousarray(array).tobytes())


def _project(flat: np.ndarray) -> float:
    """The sum of the values, each with its own weight in [-1, 1)."""
    columns, rows = _WEIGHTS
    count, rest = divmod(len(flat), len(columns))
    inner = flat[: len(flat) - rest].reshape(count, -1) @ columns if count else np.zeros(0)
    last = flat[len(flat) - rest :] @ columns[:rest]
    return float(np.append(inner, last) @ np.resize(rows, count + 1))


def _differs(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The names of the arrays whose sketches differ."""
    return [name for name in after if not _is_same(before.get(name), after[name])]


def _is_same(before: Any, after: Any) -> bool:
    if not isinstance(before, Sequence) or not isinstance(after, Sequence):
        return bool(before == after)
    return bool(abs(before[0] - after[0]) <= max(before[1], after[1]))


def _change_of_length(before: Fingerprint | None, after: Fingerprint | None) -> str:
    old, new = (f"{side['length']:,}" if side else "none" for side in (before, after))
    return f"{new if after else 'no'} examples instead of {old}"


def _rows(place: str) -> str:
    start, end = place.split("-")
    return f"row {start} differs" if start == end else f"a row of {start} to {end} differs"
