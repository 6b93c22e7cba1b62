"""Saves in a thread, one save after another, while training continues.

A failed save does not stop the run: it is reported at once and retried until a newer state replaces
it. Several failures in a row end the run.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.checkpoints import arrays as arrays_of
from trainer.checkpoints.folder import CheckpointFolder
from trainer.checkpoints.manifest import File, Leaf, Manifest
from trainer.console import warn
from trainer.errors import FolderMoved, SavesFailed
from trainer.workdir.paths import is_local, why_no_room

# Seconds before each retry; the last one repeats.
_PAUSES = (1.0, 2.0, 4.0, 8.0, 15.0)
# Tries of a save while no newer state replaces it.
_TRIES = 3
# Tries of the last save of a run, at most: a minute and a half.
_MOST_TRIES = 10
# How long the loop waits for a disk that is busy with the previous save.
_PATIENCE_SECS = 30.0


@dataclass(frozen=True)
class Save:
    """A state to save.

    Attributes:
        folder: the folder of checkpoints.
        step: the step of the state.
        arrays: its leaves, by name, in memory that nobody else changes.
        checksums: the checksums of the leaves, by name.
        meta: what a resume needs besides the state.
        is_latest: whether a run resumes from it, rather than only keeping it as the best.
    """

    folder: CheckpointFolder
    step: int
    arrays: Mapping[str, np.ndarray]
    checksums: Mapping[str, int]
    meta: Mapping[str, Any]
    is_latest: bool = True

    @property
    def size(self) -> int:
        """The size of the arrays in bytes."""
        return sum(array.nbytes for array in self.arrays.values())

    def run(self) -> None:
        """Saves the state; raises errors of many types."""

        def describe(files: dict[str, File]) -> Manifest:
            leaves = {
                name: Leaf(array.shape, str(array.dtype), self.checksums[name])
                for name, array in self.arrays.items()
            }
            return Manifest(self.step, self.meta, leaves, files)

        write = functools.partial(arrays_of.write, arrays=self.arrays)
        self.folder.save(self.step, write, describe, self.size)


class Writer:
    """A thread that saves.

    Args:
        max_failures: how many saves in a row to one folder end the run by failing.
        run: performs one save, or raises.
        pauses: seconds before each retry; the last one repeats.
        patience: seconds for which `submit` waits for an earlier save to the same folder.

    Attributes:
        last_saved: the step last saved or restored; None if there is none.
    """

    def __init__(
        self,
        max_failures: int,
        run: Callable[[Save], None] = Save.run,
        pauses: tuple[float, ...] = _PAUSES,
        patience: float = _PATIENCE_SECS,
    ) -> None:
        self._max_failures = max_failures
        self._run = run
        self._pauses = pauses
        self._patience = patience
        self._changed = threading.Condition()
        self._waiting: list[Save] = []  # at most one per folder
        self._current: Save | None = None
        self._failures_in_a_row: Counter[CheckpointFolder] = Counter()
        self._last_error = ""
        # Folders whose newest save failed for good: that save and the reason.
        self._lost: dict[CheckpointFolder, tuple[Save, str]] = {}
        self.last_saved: int | None = None
        self._is_finishing = self._is_closing = False
        self._thread: threading.Thread | None = None

    def submit(self, save: Save) -> None:
        """Queues a save; returns at once unless the disk lags behind.

        Of the queued saves to one folder, only the newest is performed.

        Raises:
            SavesFailed: too many saves in a row have failed.
        """
        with self._changed:
            if self._of_folder(save) is not None:
                self._changed.wait_for(lambda: self._of_folder(save) is None, self._patience)
            older = self._of_folder(save)
            if older is not None:
                self._waiting.remove(older)
                self._count_failure(
                    older,
                    f"the disk is still busy with step {self._current.step}"
                    if self._current
                    else "a newer state replaces it",
                )
            self._waiting.append(save)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._work, name="podlift-saves", daemon=True
                )
                self._thread.start()
            self._changed.notify_all()
        self.check()

    def _of_folder(self, save: Save) -> Save | None:
        return next((other for other in self._waiting if other.folder is save.folder), None)

    def check(self) -> None:
        """Raises SavesFailed once too many saves in a row to one folder have failed."""
        if self._is_over:
            count = max(self._failures_in_a_row.values())
            raise SavesFailed(
                f"{count} save{'s' * (count > 1)} in a row failed, the last with: "
                f"{self._last_error}; {self._last_good}"
            )

    @property
    def _last_good(self) -> str:
        if self.last_saved is None:
            return "this run has no good checkpoint"
        return f"the last good checkpoint is step {self.last_saved}"

    def finish(self) -> None:
        """Waits until everything is saved; tries the newest saves that failed once more.

        Raises:
            SavesFailed: a save failed, after several tries.
        """
        self.check()
        with self._changed:
            self._is_finishing = True
            again = [save for save, _ in self._lost.values() if self._of_folder(save) is None]
            self._waiting += again
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._is_idle)
            self._is_finishing = False
            lost = list(self._lost.values())
        if lost:
            save, reason = lost[0]
            raise SavesFailed(f"step {save.step} could not be saved: {reason}; {self._last_good}")

    @property
    def _is_idle(self) -> bool:
        return not self._waiting and self._current is None

    @property
    def _is_over(self) -> bool:
        return max(self._failures_in_a_row.values(), default=0) >= self._max_failures

    def close(self) -> None:
        """Gives started and queued saves one more try, and ends the thread."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout=60)

    def give_up(self) -> list[Save]:
        """Ends the thread; returns the newest save to each folder, if it has not succeeded."""
        with self._changed:
            waiting, self._waiting = self._waiting, []
        self.close()
        with self._changed:
            lost = [save for save, _ in self._lost.values()]
            return waiting + [s for s in lost if all(s.folder is not w.folder for w in waiting)]

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_closing)
                if not self._waiting:
                    return
                save = self._current = self._waiting.pop(0)
                self._changed.notify_all()
            self._save(save)
            del save  # it holds a whole state
            with self._changed:
                self._current = None
                self._changed.notify_all()

    def _save(self, save: Save) -> None:
        """Tries to save until that succeeds, is given up, or a newer state replaces it."""
        tries = 0
        while True:
            tries += 1
            began = time.monotonic()
            try:
                self._run(save)
            except Exception as error:  # disks, Orbax and object stores raise many types
                reason = _reason(save, error)
            else:
                with self._changed:
                    self._failures_in_a_row[save.folder] = 0
                    self._lost.pop(save.folder, None)
                    if save.is_latest:
                        self.last_saved = save.step
                if tries > 1:
                    seconds = time.monotonic() - began
                    warn(f"step {save.step} is saved after all ({seconds:.1f} s)")
                return
            with self._changed:
                if self._gives_up(save, tries):
                    if self._of_folder(save) is None:
                        self._lost[save.folder] = (save, reason)
                    self._count_failure(save, reason)
                    return
            pause = self._pauses[min(tries, len(self._pauses)) - 1]
            warn(f"step {save.step} could not be saved: {reason}; retrying in {pause:g} s")
            with self._changed:
                self._changed.wait_for(
                    lambda: self._of_folder(save) is not None or self._is_closing, pause
                )

    def _gives_up(self, save: Save, tries: int) -> bool:
        if self._of_folder(save) is not None or self._is_closing:
            return True
        # At the end of a run no later save replaces this one.
        tries_at_end = min(max(_TRIES, self._max_failures), _MOST_TRIES)
        return tries >= (tries_at_end if self._is_finishing else _TRIES)

    def _count_failure(self, save: Save, reason: str) -> None:
        self._failures_in_a_row[save.folder] += 1
        self._last_error = reason
        good = "" if self.last_saved is None else f"; {self._last_good}"
        warn(
            f"step {save.step} was not saved: {reason}{good} "
            f"({self._failures_in_a_row[save.folder]} of {self._max_failures} failures in a row)"
        )


_CAUSES = re.compile(
    "|".join(map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)))
)


_HELD = re.compile(r"/proc/self/fd/\d+")


def _reason(save: Save, error: Exception) -> str:
    """Describes an error in one line, with the bytes needed and free on a local disk."""
    # Orbax's messages start with the operation and long paths, and end with the cause.
    cause = _CAUSES.search(str(error))
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text = cause[0] if cause else lines[0].strip()[:300]
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    # The folder is reached through the file that holds it open.
    text = _HELD.sub(str(save.folder.path.parent), text)
    if isinstance(error, FolderMoved) or not is_local(save.folder.path):
        return text
    place = Path(save.folder.path)
    text = why_no_room(place, error) or text
    try:
        while not place.exists() and place != place.parent:
            place = place.parent
        free = shutil.disk_usage(place).free
    except OSError:  # the disk is gone
        return text
    return f"{text} (needs about {_megabytes(save.size)}, {_megabytes(free)} free)"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
