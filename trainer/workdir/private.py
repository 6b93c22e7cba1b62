"""What other users may have planted: in `/tmp` and `/dev/shm`, and in a folder that one has sent.

Whoever is first can make `podlift-UID` there: as a folder of his own, or as a link to somebody
else's files. Inside a folder that only this user can write to, no other can plant anything. Whether
others could replace that folder is not checked: `/tmp` is sticky where users share it, and the
volumes of containers, which are open to all and not sticky, belong to one user.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path
from typing import IO

from etils import epath

from trainer.errors import UserError

_OPEN = "other users can write to it"


def folder_in(place: Path) -> Path:
    """The folder of this user in a place for all users. Call `check` or `make` before using it."""
    return place / f"podlift-{os.getuid()}"


def why_not_private(folder: Path) -> str:
    """Why other users could have a say in a folder that exists; "" if they cannot.

    Raises:
        OSError: the folder does not exist or cannot be looked at.
    """
    status = folder.lstat()
    if stat.S_ISLNK(status.st_mode):
        return "it is a link"
    if not stat.S_ISDIR(status.st_mode):
        return "it is not a folder"
    if status.st_uid != os.getuid():
        return f"it belongs to user {status.st_uid}"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return _OPEN
    return ""


def is_private(folder: Path) -> bool:
    """Whether a folder exists and only this user can write to it."""
    with contextlib.suppress(OSError):
        return not why_not_private(folder)
    return False


def check(folder: Path) -> None:
    """Refuses a folder that exists and is not this user's alone.

    Raises:
        UserError: other users could read, replace or plant files there.
    """
    try:
        why = why_not_private(folder)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(
            f"{folder} cannot be used: {error.strerror or error}", "name another --local_dir"
        ) from error
    if why:
        hint = "remove it, or name a folder of your own with --local_dir"
        if why == _OPEN:  # as an older podlift made it where the umask is 002
            hint = f"`chmod go-w {folder}` if all in it is yours, or name another --local_dir"
        raise UserError(f"{folder} is not this user's alone: {why}", hint)


def make(folder: Path) -> None:
    """Makes a folder for this user alone, or checks one that exists and closes it to readers.

    Raises:
        UserError: it exists and is not this user's alone.
        OSError: it cannot be made.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    check(folder)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.fstat(descriptor).st_mode & 0o077:  # as an older podlift made it
            os.fchmod(descriptor, 0o700)
    finally:
        os.close(descriptor)


def refuse_links(folder: epath.Path) -> None:
    """Refuses a run's folder whose description is elsewhere; the folder itself may be a link.

    Raises:
        UserError: `config.json` or `env.json` is a link, or not a regular file.
    """
    for path in (folder / "config.json", folder / "env.json"):
        what = "" if "://" in os.fspath(path) else not_plain(Path(path))
        if what:
            raise UserError(f"{path} is {what}, which is not followed", "put the file there")


def not_plain(path: Path) -> str:
    """What a path is if it is neither a file nor a folder: `a link` or `not a regular file`."""
    try:
        mode = path.lstat().st_mode
    except OSError:
        return ""
    if stat.S_ISLNK(mode):
        return "a link"
    return "" if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else "not a regular file"


def open_regular(path: Path, *, append: bool = False) -> IO[str]:
    """Opens a text file, but neither through a link nor one that could block, such as a FIFO.

    Args:
        path: the file.
        append: to write at its end and read, and to make it if it is missing; else to read.

    Raises:
        OSError: it cannot be opened, or is not a regular file.
    """
    mode = "a+" if append else "r"
    return open(path, mode, encoding="utf-8", errors="replace", opener=_open)


def _open(path: str, flags: int) -> int:
    """`os.open` of a regular file."""
    refusal = OSError(errno.EINVAL, f"{path} is a link or not a regular file")
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):  # a link, a socket
            raise
        raise refusal from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise refusal
    return descriptor
