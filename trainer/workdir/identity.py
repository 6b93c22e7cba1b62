"""Which folder a run trains in, and which run that is, whatever its path leads to by now."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path

from etils import epath

from trainer.errors import FolderMoved
from trainer.workdir.json_object import read_object
from trainer.workdir.paths import is_local

# Between two checks. A remote one reads a file.
_CHECK_SECS = 1.0
_CHECK_REMOTE_SECS = 60.0
_MEANWHILE = "that happened while this run trained in it"


class Identity:
    """The folder that a run has claimed, held open.

    A path is a name that can be given to another folder meanwhile. A local folder is compared with
    the one that was opened (device and inode), a remote one by the run id in its `env.json`.

    Args:
        folder: exists.
        run_id: of the run in it; constant over the life of the run.
        holds: the name of a file that a folder of a run has; not checked where empty.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        folder: epath.Path,
        run_id: str = "",
        holds: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.run_id = run_id
        self._folder = folder
        self._holds = holds
        self._clock = clock
        self._due = clock()
        self._file: int | None = None
        if is_local(folder):
            # O_PATH needs no permission to list the folder; macOS lacks it.
            flags = getattr(os, "O_PATH", os.O_RDONLY)
            self._file = os.open(folder, flags | os.O_DIRECTORY | os.O_CLOEXEC)

    def check(self) -> None:
        """Raises FolderMoved if the path leads elsewhere; nothing if that cannot be found out."""
        self._due = self._clock() + (_CHECK_SECS if is_local(self._folder) else _CHECK_REMOTE_SECS)
        if not is_local(self._folder):
            self._check_remote()
            return
        if self._file is None:
            raise FolderMoved(f"{self._folder} is closed")
        try:
            is_same = os.path.samestat(os.fstat(self._file), os.stat(self._folder))
            os.stat(self._folder / self._holds)
        except (FileNotFoundError, NotADirectoryError):
            is_same = False
        except OSError:  # the disk does not answer: the save will say so
            return
        if not is_same:
            raise FolderMoved(self.describe())

    @property
    def is_moved(self) -> bool:
        """Whether the path leads elsewhere."""
        try:
            self.check()
        except FolderMoved:
            return True
        return False

    def check_soon(self) -> None:
        """The same, at most once a second, or once a minute for a remote folder."""
        if self._clock() >= self._due:
            self.check()

    def _check_remote(self) -> None:
        try:
            found = read_object(self._folder / "env.json").get("run_id")
        except FileNotFoundError:
            raise FolderMoved(self.describe()) from None
        except Exception:  # of the store or its client: the save will say so
            return
        if found not in (None, self.run_id):
            raise FolderMoved(self.describe())

    def describe(self) -> str:
        """What has happened to the folder, on one line."""
        if not is_local(self._folder):
            return f"{self._folder} is gone, or another run's: {_MEANWHILE}"
        now = self.place()
        if now == Path(os.path.realpath(self._folder)):
            return f"the files in {self._folder} are gone: {_MEANWHILE}"
        what = f"{self._folder} is gone" if now is None else f"{self._folder} is now {now}"
        other = ", and another folder has its name" if os.path.lexists(self._folder) else ""
        return f"{what}{other}: {_MEANWHILE}"

    def place(self) -> Path | None:
        """Where the folder is now; None if it is removed, or that is unknown."""
        if self._file is None:
            return None
        try:
            place = _path_of(self._file)
            return place if os.path.samestat(os.fstat(self._file), place.stat()) else None
        except OSError:
            return None

    def reach(self, path: epath.Path) -> epath.Path:
        """A path below the folder, through the open folder where the system has such paths.

        What is written there goes to this folder and to no other, and a folder that is removed
        does not come back.

        Args:
            path: absolute, below the folder's path.
        """
        held = epath.Path(f"/proc/self/fd/{self._file}")
        if self._file is None or not os.path.isdir(held):
            return path
        return held / os.path.relpath(path, self._folder)

    def close(self) -> None:
        """Closes the folder; from then on nothing is saved there."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _path_of(descriptor: int) -> Path:
    if hasattr(fcntl, "F_GETPATH"):  # macOS
        path = fcntl.fcntl(descriptor, fcntl.F_GETPATH, bytes(1024))
        return Path(os.fsdecode(path.rstrip(b"\0")))
    return Path(os.readlink(f"/proc/self/fd/{descriptor}"))
