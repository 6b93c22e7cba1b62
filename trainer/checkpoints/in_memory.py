"""The newest state of a run in the memory of a host, for a restart on the same host.

Files in `/dev/shm` outlive the process that wrote them, and take no disk. Two slots are written in
turn, so that a kill in the middle of one leaves the other; each has a manifest like a checkpoint on
disk. A state is the same on all devices, so the copy of one host is enough for all ranks.

Orbax's emergency checkpointing was tried first: docs/reliability.md says what kept it out.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from trainer.checkpoints import manifest
from trainer.checkpoints.manifest import Damaged, File, Leaf, Manifest
from trainer.console import warn
from trainer.state.checksums import checksum_of
from trainer.workdir.paths import absolute, digest_of, write_whole

SLOTS = (0, 1)
_ARRAYS = "state.bin"
# A copy holds up the loop, and its writing the host: neither more than this part of the time.
_BLOCKED_PART, _WRITING_PART = 0.01, 0.05


@dataclass(frozen=True)
class _Copy:
    step: int
    meta: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]


class InMemoryCheckpoints:
    """The copies of one run in the memory of this host.

    Args:
        workdir: of the run, which names the copies' folder.
        root: of a file system in memory.
        every_secs: from one copy to the next, at least.
        max_bytes: that both slots may take.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        workdir: os.PathLike[str],
        root: Path,
        every_secs: float,
        max_bytes: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder = root / f"podlift-{os.getuid()}" / digest_of(workdir)
        self._workdir = workdir
        self._root = root
        self._every_secs = every_secs
        self._max_bytes = max_bytes
        self._clock = clock
        self._due = clock() + every_secs
        self._slot = self._older_slot()
        self._thread: threading.Thread | None = None
        self._writing_secs = 0.0
        self._is_off = False

    # Reading, before a run goes on

    def steps(self, run: str) -> dict[int, int]:
        """The steps of a run that seem to be here, each with its slot.

        Args:
            run: its id; a copy of another run in the same folder is not offered.
        """
        found: dict[int, int] = {}
        if not self._is_ours():
            return found
        for slot in SLOTS:
            with contextlib.suppress(Damaged, OSError):
                listed = manifest.read_alone(self.folder / str(slot))
                if listed.meta["run"] == run:
                    found[listed.step] = slot
        return found

    def _older_slot(self) -> int:
        """The slot to write first: not the one with the newest copy."""
        newest = {}
        for slot in SLOTS:
            with contextlib.suppress(Damaged, OSError):
                newest[manifest.read_alone(self.folder / str(slot)).step] = slot
        return 1 - newest[max(newest)] if newest else 0

    def _is_ours(self) -> bool:
        """Whether the folder is this user's and nobody else may write there: all may make one."""
        try:
            status = self.folder.parent.lstat()
        except OSError:
            return False
        return (
            stat.S_ISDIR(status.st_mode)
            and status.st_uid == os.getuid()
            and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        )

    def read(self, slot: int) -> tuple[dict[str, np.ndarray], Manifest]:
        """What is in a slot.

        Raises:
            Damaged: it is not what was written.
        """
        place = self.folder / str(slot)
        listed = manifest.read(place)
        arrays, start = {}, 0
        data = np.fromfile(place / _ARRAYS, np.uint8)
        for name, leaf in listed.leaves.items():
            dtype = jax.numpy.dtype(leaf.dtype)
            end = start + int(np.prod(leaf.shape)) * dtype.itemsize
            arrays[name] = data[start:end].view(dtype).reshape(leaf.shape)
            start = end
        self._slot = 1 - slot  # the next copy leaves this one alone
        return arrays, listed

    # Writing, while a run goes on

    @property
    def is_due(self) -> bool:
        """Whether it is time for another copy, and the last one is written."""
        busy = self._thread is not None and self._thread.is_alive()
        return not self._is_off and not busy and self._clock() >= self._due

    def save(
        self, step: int, meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray], blocked: float
    ) -> None:
        """Takes a copy of the state; a thread writes it.

        Args:
            step: of the state.
            meta: what else a resume needs; `meta["run"]` says of which run it is.
            arrays: the leaves, by name, in memory that nobody else changes.
            blocked: seconds that the loop was held up for it.
        """
        size = sum(array.nbytes for array in arrays.values())
        if not self._fits(size):
            return
        pause = max(self._every_secs, blocked / _BLOCKED_PART, self._writing_secs / _WRITING_PART)
        self._due = self._clock() + pause
        self._thread = threading.Thread(
            target=self._write, args=(_Copy(step, meta, arrays),), name="podlift-fast", daemon=True
        )
        self._thread.start()

    def _fits(self, size: int) -> bool:
        taken = 0
        for slot in SLOTS:
            with contextlib.suppress(OSError):
                taken += (self.folder / str(slot) / _ARRAYS).stat().st_size
        if taken == 2 * size:
            return True
        try:
            room = min(self._max_bytes, (shutil.disk_usage(self._root).free + taken) / 2)
        except OSError as error:
            return self._turn_off(f"{self._root} cannot be used: {error.strerror or error}")
        if 2 * size <= room:
            return True
        return self._turn_off(
            f"two states of {size / 1e9:.3g} GB do not fit into the {room / 1e9:.3g} GB that "
            f"config.checkpoint.fast_max_gb and half of what is free in {self._root} leave"
        )

    def _turn_off(self, why: str) -> bool:
        self._is_off = True
        warn(f"no copies of the state in memory from here on: {why}")
        return False

    def _write(self, copy: _Copy) -> None:
        began = self._clock()
        place = self.folder / str(self._slot)
        try:
            self.folder.parent.mkdir(exist_ok=True, mode=0o700)
            if not self._is_ours():
                raise PermissionError(f"{self.folder.parent} is somebody else's")
            place.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not (self.folder / "workdir").exists():
                (self.folder / "workdir").write_text(f"{absolute(self._workdir)}\n")
            (place / manifest.NAME).unlink(missing_ok=True)
            file, leaves = _write_arrays(place / _ARRAYS, copy.arrays)
            listed = Manifest(copy.step, copy.meta, leaves, {_ARRAYS: file})
            write_whole(place / manifest.NAME, listed.to_text())
        except OSError as error:
            self._turn_off(f"{place} cannot be written: {error.strerror or error}")
            self._remove_files()
            return
        self._slot = 1 - self._slot
        self._writing_secs = self._clock() - began
        self._due = max(self._due, began + self._writing_secs / _WRITING_PART)

    def wait(self) -> None:
        """Waits for a copy that is being written."""
        if self._thread is not None:
            self._thread.join()

    def remove(self) -> None:
        """Gives the memory back."""
        self.wait()
        self._remove_files()

    def _remove_files(self) -> None:
        if not self._is_ours():
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # the user's other runs may have theirs
            self.folder.parent.rmdir()


def _write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> tuple[File, dict[str, Leaf]]:
    """All bytes in one file, in place of what was in it: its memory is used again."""
    digest = hashlib.sha256()
    leaves = {}
    with path.open("r+b" if path.exists() else "w+b") as file:
        for name, array in sorted(arrays.items()):  # as a manifest lists them when it is read
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            file.write(data)
            digest.update(data)
            leaves[name] = Leaf(array.shape, str(array.dtype), checksum_of(array))
        file.truncate()
        size = file.tell()
    return File(size, digest.hexdigest()), leaves
