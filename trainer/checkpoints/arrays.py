"""Arrays in Orbax's format, written and read by one process on its own.

Orbax only sees a local folder and numpy arrays. Its barriers between processes, which hang if one
process fails, and its own list of steps are not used.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from trainer.checkpoints.manifest import Leaf
from trainer.state.leaves import from_flat, name_leaves

# Zstandard, in which Orbax stores arrays, makes 4 bytes of 128 KiB of zeros; twice that.
_MOST_PER_BYTE = 1 << 16
STATE = "state"  # the part of a checkpoint that is in Orbax's format


def write(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes named arrays into `folder/state`, a PyTree checkpoint of Orbax.

    Args:
        folder: exists.
        arrays: by name; "/" in a name makes a nested dict.
    """
    # Orbax rejects arrays without elements; the manifest has their shapes.
    kept = {name: array for name, array in arrays.items() if array.size}
    with _quiet_absl(), _checkpointer() as (checkpointer, args):
        checkpointer.save(os.fspath(folder / STATE), args=args.PyTreeSave(from_flat(kept)))


def read(folder: Path, leaves: Mapping[str, Leaf]) -> dict[str, np.ndarray]:
    """Reads the arrays that `write` wrote.

    Args:
        folder: the local folder of the checkpoint.
        leaves: the leaves in the manifest, by name.

    Raises:
        ValueError: an array does not have the shape and dtype in the manifest.
        Exception: of many types, if Orbax cannot read its files.
    """
    import orbax.checkpoint as ocp

    kept = {name for name, leaf in leaves.items() if 0 not in leaf.shape}
    target = from_flat({name: ocp.RestoreArgs(restore_type=np.ndarray) for name in kept})
    with _quiet_absl(), _checkpointer() as (checkpointer, args):
        tree = checkpointer.restore(
            os.fspath(folder / STATE), args=args.PyTreeRestore(restore_args=target)
        )
    flat = name_leaves(tree)
    arrays = {}
    for name, leaf in leaves.items():
        dtype = jax.numpy.dtype(leaf.dtype)
        array = np.asarray(flat[name]) if name in kept else np.empty(leaf.shape, dtype)
        if array.shape != leaf.shape or array.dtype != dtype:
            raise ValueError(
                f"{name} is {array.dtype}{list(array.shape)} and should be "
                f"{leaf.dtype}{list(leaf.shape)}"
            )
        arrays[name] = array
    return arrays


def check_sizes(folder: Path, leaves: Mapping[str, Leaf], room: int) -> None:
    """Compares the shapes in a manifest with what the files say, before memory is allocated.

    Args:
        folder: the local folder of the checkpoint.
        leaves: the leaves in the manifest, by name.
        room: bytes that the arrays may take.

    Raises:
        ValueError: they differ, or the arrays do not fit.
        Exception: of many types, if Orbax cannot read its files.
    """
    size = sum(_size_of(leaf.shape, jax.numpy.dtype(leaf.dtype)) for leaf in leaves.values())
    stored = sum(path.stat().st_size for path in folder.rglob("*"))
    if size > room:
        raise ValueError(f"its arrays take {size / 1e9:.3g} GB, and this host has {room / 1e9:.3g}")
    if size > _MOST_PER_BYTE * stored:
        raise ValueError(f"its arrays take {size / 1e9:.3g} GB, and its files {stored:,} bytes")
    with _quiet_absl(), _checkpointer() as (checkpointer, _):
        found = checkpointer.metadata(os.fspath(folder / STATE)).item_metadata
    for name, array in name_leaves(getattr(found, "tree", found)).items():
        shape = tuple(array.shape)
        if name not in leaves or leaves[name].shape != shape:
            expected = list(leaves[name].shape) if name in leaves else "not"
            raise ValueError(f"{name} is {list(shape)} in its files and {expected} in its manifest")
        chunk = getattr(array.storage, "chunk_shape", None) or ()
        if math.prod(chunk) > max(1, math.prod(shape)):
            raise ValueError(f"{name} is stored in parts that are larger than itself")


def _size_of(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    return math.prod(shape) * dtype.itemsize


@contextlib.contextmanager
def _checkpointer() -> Iterator[tuple[Any, Any]]:
    import orbax.checkpoint as ocp

    options = ocp.options.MultiprocessingOptions()
    if jax.process_count() > 1:
        here = jax.process_index()
        options = ocp.options.MultiprocessingOptions(
            primary_host=here, active_processes={here}, barrier_sync_key_prefix="podlift"
        )
    _drop_late_callbacks()
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=options)
    checkpointer = ocp.Checkpointer(handler, multiprocessing_options=options)
    try:
        yield checkpointer, ocp.args
    finally:
        checkpointer.close()


def _drop_late_callbacks() -> None:
    """Keeps one known error away from the terminal.

    When one file of a checkpoint cannot be read, Orbax raises and closes its event loop, and
    tensorstore's threads, which still read the others, call it back: for each of them Python would
    print that the loop is closed, without naming any object.
    """
    if isinstance(sys.unraisablehook, _LateCallbacks):
        return
    sys.unraisablehook = _LateCallbacks(sys.unraisablehook)


class _LateCallbacks:
    def __init__(self, previous: Callable[[Any], object]) -> None:
        self._previous = previous

    def __call__(self, unraisable: Any) -> None:
        is_known = (
            isinstance(unraisable.exc_value, RuntimeError)
            and str(unraisable.exc_value) == "Event loop is closed"
            and unraisable.object is None
        )
        if not is_known:
            self._previous(unraisable)


@contextlib.contextmanager
def _quiet_absl() -> Iterator[None]:
    """Silences Orbax, which warns of files it writes one folder up and of errors that it raises."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
