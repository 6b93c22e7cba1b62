"""A folder of checkpoints, `<folder>/<step>/`: how they come into it, leave it and are kept safe.

A checkpoint is made elsewhere and gets its name when it is complete, so a step that has a name and
no manifest was damaged. It is made beside its place on a file system, where a rename is at once or
not at all, and on this machine for an object store, which then gets the manifest last.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from etils import epath

from trainer.checkpoints import manifest
from trainer.checkpoints.manifest import Damaged, File, Manifest
from trainer.workdir.paths import is_local, write_whole

_SAVING, _REMOVED = ".saving-", ".removed-"
QUARANTINE = "quarantine"


class CheckpointFolder:
    """One folder of checkpoints. Used by one process of a job at a time.

    Args:
        path: where; made at the first save.
        keep: how many of the newest to keep.
    """

    def __init__(self, path: epath.Path, keep: int) -> None:
        self.path = path
        self._keep = keep

    def steps(self) -> list[int]:
        """The steps that are there, whole or not, oldest first."""
        try:
            return sorted(int(entry.name) for entry in self.path.iterdir() if _is_step(entry.name))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def save(
        self,
        step: int,
        write: Callable[[Path], None],
        describe: Callable[[dict[str, File]], Manifest],
        size: int = 0,
    ) -> None:
        """Adds a checkpoint, then removes those that are older than the newest `keep`.

        Nothing that was there is touched until the new one is complete.

        Args:
            step: of the checkpoint.
            write: puts its files into an empty local folder.
            describe: makes its manifest, given what was written.
            size: of what will be written, in bytes, about.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if is_local(self.path):
            made = Path(self.path, f"{_SAVING}{step}")
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir()
            try:
                _check_room(self.path, size)
                self._complete(made, write, describe)
                self._put_in_place(made, step)
            except BaseException:
                shutil.rmtree(made, ignore_errors=True)  # its space may be what is lacking
                raise
        else:
            with tempfile.TemporaryDirectory(prefix="podlift-") as name:
                self._complete(Path(name), write, describe)
                _upload(Path(name), self.path / str(step))
        # The new one is complete, whatever becomes of the others: they are tried again after the
        # next save. Clients of object stores raise many types.
        with contextlib.suppress(Exception):
            for old in expired(self.steps(), self._keep, step):
                with contextlib.suppress(Exception):
                    self._remove(old)
            self._note_newest(max([step, *self.steps()]))

    @staticmethod
    def _complete(
        made: Path,
        write: Callable[[Path], None],
        describe: Callable[[dict[str, File]], Manifest],
    ) -> None:
        write(made)
        text = describe(manifest.describe_files(made)).to_text()
        write_whole(epath.Path(made) / manifest.NAME, text)
        for path in made.rglob("*"):
            _sync(path)
        _sync(made)

    def _put_in_place(self, made: Path, step: int) -> None:
        place = Path(self.path, str(step))
        if place.exists():  # the same step was saved before, and reached again
            removed = place.with_name(f"{_REMOVED}{step}")
            shutil.rmtree(removed, ignore_errors=True)
            place.rename(removed)
            try:
                made.rename(place)
            except OSError:
                removed.rename(place)
                raise
            shutil.rmtree(removed, ignore_errors=True)
        else:
            made.rename(place)
        _sync(place.parent)

    def _remove(self, step: int) -> None:
        place = self.path / str(step)
        if is_local(self.path):
            removed = Path(self.path, f"{_REMOVED}{step}")
            shutil.rmtree(removed, ignore_errors=True)
            Path(place).rename(removed)
            shutil.rmtree(removed)
        else:
            place.rmtree()

    def check(self, step: int) -> Manifest:
        """The manifest of a step, after a look at it only.

        Raises:
            Damaged: it is not as it was written.
        """
        return manifest.read_alone(self.path / str(step), step)

    @contextlib.contextmanager
    def opened(self, step: int) -> Iterator[tuple[Path, Manifest]]:
        """A step as a local folder, every file of which is as it was written, and its manifest.

        Raises:
            Damaged: naming what is not.
        """
        if is_local(self.path):
            place = Path(self.path, str(step))
            yield place, manifest.read(place, step)
            return
        with tempfile.TemporaryDirectory(prefix="podlift-") as name:
            listed = self.check(step)
            _download(self.path / str(step), listed, Path(name))
            yield Path(name), manifest.read(Path(name), step)

    def quarantine(self, step: int, why: str) -> epath.Path:
        """Takes a step out of the way without deleting it; returns where it is now."""
        aside = self.path / QUARANTINE
        aside.mkdir(parents=True, exist_ok=True)
        stamp = time.strftime("%Y%m%dT%H%M%S")
        moved = aside / f"{step}-{stamp}"
        number = 1
        while moved.exists():
            number += 1
            moved = aside / f"{step}-{stamp}-{number}"
        (self.path / str(step)).rename(moved)
        with contextlib.suppress(OSError):  # a note, for whoever comes to look
            (moved / "why.txt").write_text(f"{why}\n")
        return moved

    def newest_known(self) -> int | None:
        """The newest step that was ever completed here, also if it is gone; None if unknown."""
        try:
            return int(json.loads(self._note.read_text())["step"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def has_history(self) -> bool:
        """Whether there ever was a checkpoint here that was completed."""
        if self._note.exists() or (is_local(self.path) and Path(self.path).is_symlink()):
            return True
        try:
            names = [entry.name for entry in self.path.iterdir()]
        except (FileNotFoundError, NotADirectoryError):
            return False
        return QUARANTINE in names or any(map(_is_step, names))

    def sweep(self) -> list[str]:
        """Clears what a killed run has left half done; returns what was cleared.

        A save that was complete but for its name gets it. To be called by the run's only owner.
        """
        if not is_local(self.path):
            return []
        with contextlib.suppress(OSError):
            (self._note.parent / f".{self._note.name}.part").unlink()
        if not self.path.exists():
            return []
        cleared = []
        for entry in sorted(Path(self.path).iterdir()):
            name = entry.name
            if name.startswith(_SAVING) and _is_step(name.removeprefix(_SAVING)):
                step = int(name.removeprefix(_SAVING))
                with contextlib.suppress(Damaged, OSError):
                    manifest.read(entry, step)
                    if not self._is_whole(step):
                        self._put_in_place(entry, step)
                        cleared.append(f"{name} (completed)")
                        continue
            elif not _is_leftover(name):
                continue
            shutil.rmtree(entry, ignore_errors=True)
            with contextlib.suppress(OSError):  # a file; or a folder that is still in use
                entry.unlink()
            if not os.path.lexists(entry):
                cleared.append(name)
        steps, known = self.steps(), self.newest_known()
        if steps and (known is None or steps[-1] > known):
            self._note_newest(steps[-1])
        return cleared

    def _is_whole(self, step: int) -> bool:
        try:
            manifest.read(Path(self.path, str(step)), step)
        except Damaged:
            return False
        return True

    def _note_newest(self, step: int) -> None:
        write_whole(self._note, json.dumps({"step": step}) + "\n")

    @property
    def _note(self) -> epath.Path:
        """Of the newest step; beside the folder, so that it is there when the folder is gone."""
        return self.path.parent / f".{self.path.name}.json"


def expired(steps: Sequence[int], keep: int, newest: int) -> list[int]:
    """Which steps are to go once `newest` has been saved.

    Args:
        steps: that are there, `newest` among them.
        keep: how many of the newest to keep, at least 1.
        newest: the one just saved, which stays whatever the others are.
    """
    others = sorted(step for step in set(steps) if step != newest)
    surplus = len(others) + 1 - keep
    return others[: max(0, surplus)]


def _check_room(path: epath.Path, size: int) -> None:
    """Says what is wrong before Orbax does, at length; arrays may be written in half their size."""
    if shutil.disk_usage(path).free < size / 2:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _is_step(name: str) -> bool:
    return name.isascii() and name.isdigit() and name == str(int(name))


def _is_leftover(name: str) -> bool:
    return name.startswith((_SAVING, _REMOVED)) or ".orbax-checkpoint-tmp" in name


def _upload(source: Path, target: epath.Path) -> None:
    """Copies a complete checkpoint to an object store, the manifest last."""
    with contextlib.suppress(FileNotFoundError):  # from now on it counts as not there
        (target / manifest.NAME).unlink()
    paths = [path for path in sorted(source.rglob("*")) if path.is_file()]
    for path in sorted(paths, key=lambda path: path == source / manifest.NAME):
        place = target / path.relative_to(source).as_posix()
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(path.read_bytes())


def _download(source: epath.Path, listed: Manifest, target: Path) -> None:
    for name in [*listed.files, manifest.NAME]:
        place = target / name
        if not place.resolve().is_relative_to(target.resolve()):
            raise Damaged(f"its {manifest.NAME} names {name}, outside of it")
        place.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # to be found missing
            place.write_bytes((source / name).read_bytes())


def _sync(path: Path) -> None:
    """Hands a file or the entries of a folder to the disk: a rename may outlive a power failure
    that what it names does not."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
