"""The lock of a run's folder: one job trains there at a time.

It is a kernel lock (`flock`), so it ends with the process that holds it, however that ends; the
content of the file only names the holder. For a folder that cannot be locked, such as one in an
object store, the lock is a file on this machine, which keeps apart jobs on the same machine only.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import time
from pathlib import Path
from typing import IO

from etils import epath

from trainer.config.json_text import parse_object
from trainer.console import warn
from trainer.errors import UserError
from trainer.workdir import private
from trainer.workdir.paths import (
    absolute,
    digest_of,
    is_local,
    local_base,
    local_folder,
    make_local_base,
)

NAME = ".lock"

# What a file system without locks answers. Other errors are of a disk that does not answer.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.EACCES)

# The folders this process trains in, each with its open lock file.
_held: dict[str, IO[str] | None] = {}


def acquire(folder: epath.Path, local_dir: str | None = None) -> None:
    """Locks a folder for this process until `release`; does nothing if it is held already.

    Args:
        folder: must exist if it is local.
        local_dir: where the lock of a remote folder is; see `trainer.workdir.paths.local_folder`.

    Raises:
        UserError: another process holds the lock; names it. Or another user has a say in the
            folder of the lock.
        OSError: the lock file cannot be made.
    """
    name = os.fspath(absolute(folder))
    if name in _held:
        return
    make_local_base(os.fspath(folder), local_dir)
    handle = _lock(_place(folder, local_dir), folder)
    if handle is None and is_local(folder):
        private.make(local_base(local_dir))
        warn(
            f"{folder} is on a file system without locks: nothing stops a second job on another "
            "machine"
        )
        handle = _lock(_place_elsewhere(folder, local_dir), folder)
    _held[name] = handle


def release(folder: epath.Path) -> None:
    """Unlocks a folder; does nothing if it is not held."""
    handle = _held.pop(os.fspath(absolute(folder)), None)
    if handle is not None:
        with contextlib.suppress(OSError):
            handle.truncate(0)  # while it is still ours
        handle.close()


def is_held(folder: epath.PathLike) -> bool:
    """Whether this process holds the lock of a folder."""
    return os.fspath(absolute(folder)) in _held


def check_free(folder: epath.Path, local_dir: str | None = None) -> None:
    """Checks that no other process holds the lock of a folder, without taking it.

    Raises:
        UserError: another process holds it; names it.
    """
    if is_held(folder):
        return
    places = [_place(folder, local_dir)]
    if private.is_private(local_base(local_dir)):  # else no lock of this user is there
        places.append(_place_elsewhere(folder, local_dir))
    for place in places:
        try:
            with private.open_regular(place) as handle:
                try:
                    fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise _refusal(folder, handle.read()) from None
        except OSError:  # never locked, or no locks on this file system
            continue


def _place(folder: epath.Path, local_dir: str | None) -> Path:
    return local_folder(os.fspath(folder), local_dir) / NAME


def _place_elsewhere(folder: epath.Path, local_dir: str | None) -> Path:
    """The place of the lock if the folder's file system has no locks."""
    return local_base(local_dir) / digest_of(folder) / NAME


def _lock(place: Path, folder: epath.Path) -> IO[str] | None:
    """The locked file, or None where the file system has no locks."""
    place.parent.mkdir(parents=True, exist_ok=True)
    handle = private.open_regular(place, append=True)
    try:
        _flock_soon(handle)
    except BlockingIOError:
        handle.seek(0)
        holder = handle.read()
        handle.close()
        raise _refusal(folder, holder) from None
    except OSError as error:
        handle.close()
        if error.errno not in _NO_LOCKS:
            raise
        return None
    with contextlib.suppress(OSError):  # on a full disk the lock holds without naming its holder
        handle.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        record = {"host": platform.node(), "pid": os.getpid(), "since": since}
        handle.write(json.dumps(record) + "\n")
        handle.flush()
    return handle


def _flock_soon(handle: IO[str]) -> None:
    """Locks a file; retries, as `check_free` in another process may hold it for a moment."""
    for _ in range(5):
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)
    return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _leave_to_parent() -> None:
    """Closes inherited lock files in a forked child, so that the lock ends with its holder."""
    for handle in _held.values():
        if handle is not None:
            os.close(handle.fileno())
    _held.clear()


os.register_at_fork(after_in_child=_leave_to_parent)


def _refusal(folder: epath.Path, record: str) -> UserError:
    try:
        holder = parse_object(record)
        pid, host = int(holder["pid"]), str(holder["host"])
        who, since = f"process {pid} on {host}", f" since {holder['since']}"
    except (ValueError, KeyError, TypeError, OverflowError):
        return UserError(
            f"another process is already training in {folder}",
            "wait for it, or name another --workdir",
        )
    return UserError(
        f"{who} is already training in {folder}{since}",
        f"wait for it, stop it (kill {pid}: it saves first), or name another --workdir",
    )
