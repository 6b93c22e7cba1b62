"""A file system that fails, or a process that is killed, at a chosen operation."""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import os
from pathlib import Path

_CALLS = ("rename", "replace", "mkdir", "unlink", "remove", "rmdir")


class Killed(BaseException):
    """The process is dead: from now on it changes nothing on disk."""


class Faults:
    """Counts the operations that change the file system, and fails at one of them.

    Args:
        at: the operation that fails, counted from 1; 0 for none.
        error: raised there, once; None kills the process.
    """

    def __init__(self, at=0, error=None):
        self.at = at
        self.error = error
        self.count = 0
        self.is_dead = False

    def point(self):
        if self.is_dead:
            raise Killed
        self.count += 1
        if self.count == self.at:
            if self.error is not None:
                raise self.error
            self.is_dead = True
            raise Killed

    @property
    def came(self):
        return 0 < self.at <= self.count


@contextlib.contextmanager
def faults(at=0, error=None):
    """Makes the `at`-th operation that changes the file system fail; yields the `Faults`."""
    state = Faults(at, error)
    real = {name: getattr(os, name) for name in _CALLS}
    real_open = builtins.open

    def wrapped(call):
        def run(*args, **kwargs):
            state.point()
            return call(*args, **kwargs)

        return run

    def opened(file, mode="r", *args, **kwargs):
        if not set(mode) & set("wax+"):
            return real_open(file, mode, *args, **kwargs)
        state.point()
        handle = real_open(file, mode, *args, **kwargs)
        try:
            state.point()  # between creating a file and writing to it
        except BaseException:
            handle.close()
            raise
        return handle

    try:
        for name, call in real.items():
            setattr(os, name, wrapped(call))
        builtins.open = io.open = opened
        yield state
    finally:
        for name, call in real.items():
            setattr(os, name, call)
        builtins.open = io.open = real_open


def full_disk():
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def tree(folder):
    """Every file below a folder, with its content."""
    folder = Path(folder)
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }
