"""A folder of checkpoints, `<folder>/<step>/`, that stays intact through kills and full disks.

A checkpoint gets its name once it is complete, so a named step without a manifest is damaged. On a
file system it is written beside its final place and renamed, which is atomic. For an object store
it is written on this machine and uploaded, the manifest last.
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
from trainer.workdir.json_object import read_object
from trainer.workdir.paths import exists, is_local, write_whole

_SAVING, _REMOVED = ".saving-", ".removed-"
QUARANTINE = "quarantine"


class CheckpointFolder:
    """One folder of checkpoints. Only one process of a job uses it.

    Args:
        path: the folder; made at the first save.
        keep: how many of the newest checkpoints to keep.
        check: called before a save and again before its checkpoint gets its name; raises if the
            path leads elsewhere by now.
        reach: from a path in the run's folder to the same place, whatever the folder's name is by
            now.
    """

    def __init__(
        self,
        path: epath.Path,
        keep: int,
        check: Callable[[], None] = lambda: None,
        reach: Callable[[epath.Path], epath.Path] = lambda path: path,
    ) -> None:
        self.path = path
        self._keep = keep
        self._check = check
        self._reach = reach

    @property
    def _here(self) -> epath.Path:
        return self._reach(self.path)

    def steps(self) -> list[int]:
        """The steps in the folder, intact or not, oldest first.

        Raises:
            OSError: the folder cannot be read. Clients of object stores raise other types.
        """
        try:
            return sorted(int(entry.name) for entry in self._here.iterdir() if _is_step(entry.name))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def save(
        self,
        step: int,
        write: Callable[[Path], None],
        describe: Callable[[dict[str, File]], Manifest],
        size: int = 0,
    ) -> None:
        """Adds a checkpoint, then removes all but the newest `keep`.

        The existing checkpoints stay untouched until the new one is complete.

        Args:
            step: the step of the checkpoint.
            write: writes its files into an empty local folder.
            describe: makes its manifest from a description of the written files.
            size: roughly how many bytes it needs.
        """
        self._check()
        self._here.mkdir(parents=True, exist_ok=True)
        if is_local(self._here):
            for left in Path(self._here).glob(f"{_SAVING}*"):  # a disk that failed kept them
                _clear(left)
            made = Path(self._here, f"{_SAVING}{step}")
            made.mkdir()
            try:
                _check_room(self._here, size)
                self._complete(made, write, describe)
                self._check()
                self._put_in_place(made, step)
            except BaseException:
                _clear(made)  # it may be what fills the disk
                raise
        else:
            with tempfile.TemporaryDirectory(prefix="podlift-") as name:
                self._complete(Path(name), write, describe)
                self._check()
                _upload(Path(name), self._here / str(step))
        # The new one is complete, so errors from here on do not matter: the next save removes the
        # others again. Clients of object stores raise many types.
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
        place = Path(self._here, str(step))
        if place.exists():  # after a resume the run reaches a step again
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
        place = self._here / str(step)
        if is_local(self._here):
            removed = Path(self._here, f"{_REMOVED}{step}")
            shutil.rmtree(removed, ignore_errors=True)
            Path(place).rename(removed)
            shutil.rmtree(removed)
        else:
            place.rmtree()

    def check(self, step: int) -> Manifest:
        """Reads the manifest of a step, and no other file.

        Raises:
            Damaged: the manifest is missing, damaged or belongs to another step.
            OSError: it cannot be read.
        """
        return manifest.read_alone(self._here / str(step), step)

    @contextlib.contextmanager
    def opened(self, step: int) -> Iterator[tuple[Path, Manifest]]:
        """A step as a local folder in which every file is intact, and its manifest.

        Raises:
            Damaged: a file is not what was written; names it.
            OSError: a file cannot be read.
        """
        if is_local(self._here):
            place = Path(self._here, str(step))
            yield place, manifest.read(place, step)
            return
        with tempfile.TemporaryDirectory(prefix="podlift-") as name:
            listed = self.check(step)
            _download(self._here / str(step), listed, Path(name))
            yield Path(name), manifest.read(Path(name), step)

    def quarantine(self, step: int, why: str) -> epath.Path:
        """Moves a step into `quarantine/` and returns its new place."""
        aside = self._here / QUARANTINE
        aside.mkdir(parents=True, exist_ok=True)
        stamp = time.strftime("%Y%m%dT%H%M%S")
        moved = aside / f"{step}-{stamp}"
        number = 1
        while moved.exists():
            number += 1
            moved = aside / f"{step}-{stamp}-{number}"
        (self._here / str(step)).rename(moved)
        with contextlib.suppress(OSError):  # the note is optional
            (moved / "why.txt").write_text(f"{why}\n")
        return self.path / QUARANTINE / moved.name

    def newest_known(self) -> int | None:
        """The newest step ever completed here, even if it is gone; None if unknown.

        Raises:
            OSError: that cannot be read.
        """
        try:
            return int(read_object(self._note)["step"])
        except (
            FileNotFoundError,
            NotADirectoryError,
            ValueError,
            KeyError,
            TypeError,
            OverflowError,
        ):
            return None

    def has_history(self) -> bool:
        """Whether a checkpoint was ever completed here.

        Raises:
            OSError: the folder cannot be read.
        """
        if exists(self._note) or (is_local(self._here) and Path(self._here).is_symlink()):
            return True
        try:
            names = [entry.name for entry in self._here.iterdir()]
        except (FileNotFoundError, NotADirectoryError):
            return False
        return QUARANTINE in names or any(map(_is_step, names))

    def sweep(self) -> list[str]:
        """Cleans up after a killed run; returns the names of what it cleaned up.

        A save that only lacks its final name gets it. Call this only while holding the run's lock.

        Raises:
            OSError: a save cannot be read, so that it is unknown whether it is complete.
        """
        if not is_local(self._here):
            return []
        with contextlib.suppress(OSError):
            (self._note.parent / f".{self._note.name}.part").unlink()
        if not exists(self._here):
            return []
        cleared = []
        for entry in sorted(Path(self._here).iterdir()):
            name = entry.name
            if name.startswith(_SAVING) and _is_step(name.removeprefix(_SAVING)):
                step = int(name.removeprefix(_SAVING))
                if _is_intact(entry, step) and not _is_intact(Path(self._here, str(step)), step):
                    with contextlib.suppress(OSError):
                        self._put_in_place(entry, step)
                        cleared.append(f"{name} (completed)")
                        continue
            elif not _is_leftover(name):
                continue
            if _clear(entry):
                cleared.append(name)
        steps, known = self.steps(), self.newest_known()
        if steps and (known is None or steps[-1] > known):
            self._note_newest(steps[-1])
        return cleared

    def _note_newest(self, step: int) -> None:
        write_whole(self._note, json.dumps({"step": step}) + "\n")

    @property
    def _note(self) -> epath.Path:
        """The file with the newest step; beside the folder, so that it survives its removal."""
        return self._here.parent / f".{self._here.name}.json"


def expired(steps: Sequence[int], keep: int, newest: int) -> list[int]:
    """The steps to remove once `newest` has been saved.

    Args:
        steps: the steps in the folder, including `newest`.
        keep: how many of the newest to keep, at least 1.
        newest: the step just saved; it stays even if others are higher.
    """
    others = sorted(step for step in set(steps) if step != newest)
    surplus = len(others) + 1 - keep
    return others[: max(0, surplus)]


def _is_intact(place: Path, step: int) -> bool:
    try:
        manifest.read(place, step)
    except Damaged:
        return False
    return True


def _clear(place: Path) -> bool:
    """Removes a folder or file; returns whether it is gone. Orbax may still write into it."""
    for pause in (0.0, 0.05, 0.2):
        time.sleep(pause)
        shutil.rmtree(place, ignore_errors=True)
        with contextlib.suppress(OSError):  # a file or a link
            place.unlink()
        if not os.path.lexists(place):
            return True
    return False


def _check_room(path: epath.Path, size: int) -> None:
    """Fails early, where Orbax would fail with a long message; compression may halve the size."""
    if shutil.disk_usage(path).free < size / 2:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _is_step(name: str) -> bool:
    return name.isascii() and name.isdigit() and name == str(int(name))


def _is_leftover(name: str) -> bool:
    return name.startswith((_SAVING, _REMOVED)) or ".orbax-checkpoint-tmp" in name


def _upload(source: Path, target: epath.Path) -> None:
    """Copies a complete checkpoint to an object store, the manifest last."""
    with contextlib.suppress(FileNotFoundError):  # without it the old one no longer counts
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
        with contextlib.suppress(FileNotFoundError):  # the check of the manifest reports it
            place.write_bytes((source / name).read_bytes())


def _sync(path: Path) -> None:
    """Flushes a file or a folder's entries to disk.

    A rename may survive a power failure that the renamed data does not.

    Raises:
        OSError: the disk has not taken the data.
    """
    descriptor = os.open(path, os.O_RDONLY)
    ignored = (*_NO_SYNC, *_NO_SYNC_OF_FOLDER) if path.is_dir() else _NO_SYNC
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in ignored:
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
    finally:
        os.close(descriptor)


# What file systems answer that cannot sync a folder, or anything.
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
# A folder can only be opened for reading, which some network file systems do not flush.
_NO_SYNC_OF_FOLDER = (errno.EACCES, errno.EPERM, errno.EBADF)
