"""In-memory checkpoints: the newest state of a run in the memory of a host, for a restart there.

Files in `/dev/shm` outlive the process that wrote them and need no disk. Two slots are written in
turn, so that a kill during a write leaves the other slot intact; each has a manifest like a
checkpoint on disk. A state is the same on all devices, so one host's checkpoint serves all ranks.

Why this is not Orbax's emergency checkpointing: docs/reliability.md.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
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
from trainer.workdir import private
from trainer.workdir.paths import absolute, digest_of, write_whole

SLOTS = (0, 1)
_ARRAYS = "state.bin"
# The largest fractions of the time for which a save may block the loop and write on the host.
_BLOCKED_FRACTION, _WRITING_FRACTION = 0.01, 0.05


@dataclass(frozen=True)
class _State:
    step: int
    meta: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]


class InMemoryCheckpoints:
    """The in-memory checkpoints of one run on this host.

    Args:
        workdir: the run's folder; the folder of the checkpoints is named after it.
        root: the mount point of a file system in memory.
        every_secs: the least number of seconds from one save to the next.
        max_bytes: the most bytes that both slots may take together.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        workdir: os.PathLike[str],
        root: Path,
        every_secs: float,
        max_bytes: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder = private.folder_in(root) / digest_of(workdir)
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

    # Read, before a run resumes

    def steps(self, run: str) -> dict[int, int]:
        """The steps of a run whose manifest is intact, each with its slot.

        Args:
            run: the id of the run; checkpoints of other runs in the same folder are not offered.
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
        """The slot to write first: not the one with the newest checkpoint."""
        newest: dict[int, int] = {}
        for slot in SLOTS if self._is_ours() else ():
            with contextlib.suppress(Damaged, OSError):
                newest[manifest.read_alone(self.folder / str(slot)).step] = slot
        return 1 - newest[max(newest)] if newest else 0

    def _is_ours(self) -> bool:
        """Whether only this user can write to the folder: in `/dev/shm` anyone can create it."""
        return private.is_private(self.folder.parent)

    def read(self, slot: int) -> tuple[dict[str, np.ndarray], Manifest]:
        """The arrays of a slot, by name, and its manifest. The next save spares this slot.

        Raises:
            Damaged: the slot does not hold what was written.
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
        self._slot = 1 - slot
        return arrays, listed

    # Save, while a run trains

    @property
    def is_due(self) -> bool:
        """Whether it is time for another save, and the last one is complete."""
        busy = self._thread is not None and self._thread.is_alive()
        return not self._is_off and not busy and self._clock() >= self._due

    def save(
        self, step: int, meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray], blocked: float
    ) -> None:
        """Starts a thread that writes a state into the next slot.

        Args:
            step: the step of the state.
            meta: what a resume needs besides the state; `meta["run"]` is the id of the run.
            arrays: the leaves, by name, in memory that nobody else changes.
            blocked: the seconds for which the loop was blocked.
        """
        size = sum(array.nbytes for array in arrays.values())
        if not self._fits(size):
            return
        pause = max(
            self._every_secs, blocked / _BLOCKED_FRACTION, self._writing_secs / _WRITING_FRACTION
        )
        self._due = self._clock() + pause
        self._thread = threading.Thread(
            target=self._write,
            args=(_State(step, meta, arrays),),
            name="podlift-in-memory",
            daemon=True,
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
            return self._turn_off(f"{self._root} is not usable: {error.strerror or error}")
        if 2 * size <= room:
            return True
        return self._turn_off(
            f"two states of {size / 1e9:.3g} GB do not fit into {room / 1e9:.3g} GB, the "
            f"smaller of config.checkpoint.fast_max_gb and half of the free space in {self._root}"
        )

    def _turn_off(self, why: str) -> bool:
        self._is_off = True
        warn(f"no more in-memory checkpoints: {why}")
        return False

    def _write(self, state: _State) -> None:
        began = self._clock()
        place = self.folder / str(self._slot)
        try:
            self.folder.parent.mkdir(exist_ok=True, mode=0o700)
            if not self._is_ours():
                raise PermissionError(f"{self.folder.parent} is not this user's alone")
            place.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not (self.folder / "workdir").exists():
                (self.folder / "workdir").write_text(f"{absolute(self._workdir)}\n")
            (place / manifest.NAME).unlink(missing_ok=True)
            file, leaves = _write_arrays(place / _ARRAYS, state.arrays)
            listed = Manifest(state.step, state.meta, leaves, {_ARRAYS: file})
            write_whole(place / manifest.NAME, listed.to_text())
        except OSError as error:
            self._turn_off(f"{place} cannot be written: {error.strerror or error}")
            self._remove_files()
            return
        self._slot = 1 - self._slot
        self._writing_secs = self._clock() - began
        self._due = max(self._due, began + self._writing_secs / _WRITING_FRACTION)

    def wait(self) -> None:
        """Waits for a save in progress."""
        if self._thread is not None:
            self._thread.join()

    def remove(self) -> None:
        """Removes the checkpoints, which frees their memory."""
        self.wait()
        self._remove_files()

    def _remove_files(self) -> None:
        if not self._is_ours():
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty: other runs of the user
            self.folder.parent.rmdir()


def _write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> tuple[File, dict[str, Leaf]]:
    """Writes all arrays into one file, over the old content, which reuses its memory."""
    digest = hashlib.sha256()
    leaves = {}
    with path.open("r+b" if path.exists() else "w+b") as file:
        for name, array in sorted(arrays.items()):  # the order of a manifest that was read
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            file.write(data)
            digest.update(data)
            leaves[name] = Leaf(array.shape, str(array.dtype), checksum_of(array))
        file.truncate()
        size = file.tell()
    return File(size, digest.hexdigest()), leaves
