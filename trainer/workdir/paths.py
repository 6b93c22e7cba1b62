"""Paths of a run, local or remote (`gs://...`)."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from etils import epath

from trainer.workdir import private


def is_local(path: epath.PathLike) -> bool:
    """Whether a path is on a file system, where files can be renamed, appended to and locked."""
    return "://" not in os.fspath(path)


def exists(path: epath.Path) -> bool:
    """Whether there is a file or folder.

    `os.path.exists` takes a disk that does not answer for a file that is not there.

    Raises:
        OSError: that cannot be found out.
    """
    if not is_local(path):
        return bool(path.exists())
    try:
        os.stat(path)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
            return False
        raise
    return True


def absolute(path: epath.PathLike) -> epath.Path:
    """The absolute form of a local path; a remote path unchanged."""
    text = os.fspath(path)
    if is_local(text):
        return epath.Path(os.path.abspath(os.path.expanduser(text)))
    keep_no_listings()
    return epath.Path(text)


def keep_no_listings() -> None:
    """Makes files that other processes write to an object store visible to this one.

    By default fsspec caches listings forever: it misses files that others add later, and reads only
    the old length of files that grow. Call this before the first access.
    """
    import fsspec.config  # takes 0.1 s

    for protocol in ("gcs", "s3"):
        fsspec.config.conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)


@contextlib.contextmanager
def opened_whole(path: epath.Path) -> Iterator[IO[bytes]]:
    """Opens a file to replace atomically: a reader sees the old content or the new."""
    if is_local(path):
        part = path.parent / f".{path.name}.part"
        try:
            with open(part, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())  # a rename may survive a power failure that bytes do not
            part.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink()
            raise
    else:  # an object appears once its upload is complete
        with tempfile.TemporaryFile() as file:
            yield file
            file.seek(0)
            with path.open("wb") as target:
                shutil.copyfileobj(file, target)


def write_whole(path: epath.Path, text: str) -> None:
    """Replaces a file atomically: a reader sees the old text or the new."""
    if is_local(path):
        with opened_whole(path) as file:
            file.write(text.encode())
    else:
        path.write_text(text)


def why_no_room(path: Path, error: BaseException) -> str:
    """Why a file system that has bytes left takes no file; empty if that is not known.

    Args:
        path: of the file, which need not exist.
        error: what was raised.
    """
    try:
        while not path.exists() and path != path.parent:
            path = path.parent
        status = os.statvfs(path)
    except OSError:
        return ""
    is_full = getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(
        error
    )
    if is_full and status.f_files and not status.f_favail:
        return f"no inodes are left: the file system holds {status.f_files:,} files, its limit"
    return ""


def digest_of(workdir: epath.PathLike) -> str:
    """A short name of a run's folder (16 hex digits), for files that are stored elsewhere."""
    return hashlib.sha256(os.fspath(absolute(workdir)).encode()).hexdigest()[:16]


def local_folder(workdir: str, local_dir: str | None = None) -> Path:
    """The folder for a run's local files: its workdir, or a local folder if that is remote.

    Args:
        workdir: the run's folder.
        local_dir: the parent of local folders of remote runs; by default the system's temporary
            folder.

    Raises:
        UserError: the workdir is remote, and another user has a say in the local folder.
    """
    if is_local(workdir):
        return Path(absolute(workdir))
    base = local_base(local_dir)
    private.check(base)
    return base / digest_of(workdir)


def make_local_base(workdir: str, local_dir: str | None = None) -> None:
    """Makes the parent of `local_folder` for this user alone; does nothing for a local workdir.

    Raises:
        UserError: another user has a say in that folder.
        OSError: it cannot be made.
    """
    if not is_local(workdir):
        private.make(local_base(local_dir))


def local_base(local_dir: str | None = None) -> Path:
    """The folder of this user on this machine that holds local folders of remote runs.

    It may be another user's: see `trainer.workdir.private`.
    """
    return private.folder_in(Path(local_dir or tempfile.gettempdir()).expanduser().absolute())
