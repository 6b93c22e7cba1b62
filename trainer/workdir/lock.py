"""Who trains in a folder: one job at a time.

The lock is the kernel's (`flock`), so it ends with the process that holds it, however that ends;
what is written in the file only says who that was. A folder without locks, such as one in an object
store, is locked by a file of this machine: two jobs on one machine are kept apart.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import time
from pathlib import Path
from typing import IO

from etils import epath

from trainer.console import warn
from trainer.errors import UserError
from trainer.workdir.paths import absolute, digest_of, is_local, local_base, local_folder

NAME = ".lock"

# The folders this process trains in, each with its lock; which ends with the process if not before.
_held: dict[str, IO[str] | None] = {}


def acquire(folder: epath.Path, local_dir: str | None = None) -> None:
    """Makes a folder this process's own until `release`; it may be its own already.

    Args:
        folder: exists, if it is local.
        local_dir: where the lock of a remote folder is; see `trainer.workdir.paths.local_folder`.

    Raises:
        UserError: another process has it, naming that.
        OSError: there can be no lock file.
    """
    name = os.fspath(absolute(folder))
    if name in _held:
        return
    handle = _lock(_place(folder, local_dir), folder)
    if handle is None and is_local(folder):
        warn(
            f"{folder} is on a file system without locks: two jobs on different machines are not "
            "kept apart"
        )
        handle = _lock(_place_elsewhere(folder, local_dir), folder)
    _held[name] = handle


def release(folder: epath.Path) -> None:
    """Lets go of a folder, so that it can be taken again."""
    handle = _held.pop(os.fspath(absolute(folder)), None)
    if handle is not None:
        with contextlib.suppress(OSError):
            handle.truncate(0)  # while it is still ours
        handle.close()


def is_held(folder: epath.PathLike) -> bool:
    """Whether this process trains in a folder now."""
    return os.fspath(absolute(folder)) in _held


def check_free(folder: epath.Path, local_dir: str | None = None) -> None:
    """Looks whether a folder can be taken, and changes nothing.

    Raises:
        UserError: another process has it, naming that.
    """
    if is_held(folder):
        return
    for place in (_place(folder, local_dir), _place_elsewhere(folder, local_dir)):
        try:
            with place.open(encoding="utf-8", errors="replace") as handle:
                try:
                    fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise _refusal(folder, handle.read()) from None
        except OSError:  # nobody has ever taken it, or there are no locks there
            continue


def _place(folder: epath.Path, local_dir: str | None) -> Path:
    return local_folder(os.fspath(folder), local_dir) / NAME


def _place_elsewhere(folder: epath.Path, local_dir: str | None) -> Path:
    """Where the lock is of a folder on a file system without locks."""
    return local_base(local_dir) / digest_of(folder) / NAME


def _lock(place: Path, folder: epath.Path) -> IO[str] | None:
    """The locked file, or None where the file system has no locks."""
    place.parent.mkdir(parents=True, exist_ok=True)
    handle = place.open("a+", encoding="utf-8", errors="replace")
    try:
        _flock_soon(handle)
    except BlockingIOError:
        handle.seek(0)
        holder = handle.read()
        handle.close()
        raise _refusal(folder, holder) from None
    except OSError:
        handle.close()
        return None
    with contextlib.suppress(OSError):  # a full disk: the lock holds, if namelessly
        handle.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        record = {"host": platform.node(), "pid": os.getpid(), "since": since}
        handle.write(json.dumps(record) + "\n")
        handle.flush()
    return handle


def _flock_soon(handle: IO[str]) -> None:
    """Locks a file; `check_free` of another process may hold it for a moment."""
    for _ in range(5):
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)
    return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _leave_to_parent() -> None:
    """In a forked child, which has got all open files: the lock is not to outlive its holder."""
    for handle in _held.values():
        if handle is not None:
            os.close(handle.fileno())
    _held.clear()


os.register_at_fork(after_in_child=_leave_to_parent)


def _refusal(folder: epath.Path, record: str) -> UserError:
    try:
        holder = json.loads(record)
        pid, host = int(holder["pid"]), str(holder["host"])
        who, since = f"process {pid} on {host}", f" since {holder['since']}"
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return UserError(
            f"another process is already training in {folder}",
            "wait for it, or name another --workdir",
        )
    return UserError(
        f"{who} is already training in {folder}{since}",
        f"wait for it, stop it (kill {pid}: it saves first), or name another --workdir",
    )
