"""Paths of a run, local or remote (`gs://...`), and what can be done with each."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from etils import epath


def is_local(path: epath.PathLike) -> bool:
    """Whether it is of a file system, where files can be renamed, appended to and locked."""
    return "://" not in os.fspath(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """A path that no longer depends on the current folder; a remote one as it is."""
    text = os.fspath(path)
    if is_local(text):
        return epath.Path(os.path.abspath(os.path.expanduser(text)))
    keep_no_listings()
    return epath.Path(text)


def keep_no_listings() -> None:
    """Makes what other processes write to an object store visible to this one.

    By default fsspec keeps every listing for ever: files that others add afterwards are not there,
    and of one they make longer only the old length is read. To be called before the first use.
    """
    import fsspec.config  # here, since it takes 0.1 s

    for protocol in ("gcs", "s3"):
        fsspec.config.conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)


@contextlib.contextmanager
def opened_whole(path: epath.Path) -> Iterator[IO[bytes]]:
    """A file to write, which is there when all of it is: a reader sees the old one or the new."""
    if is_local(path):
        part = path.parent / f".{path.name}.part"
        try:
            with open(part, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())  # a rename may outlive a power failure that bytes do not
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink()
            raise
        part.replace(path)
    else:  # an object appears when all of it is there
        with tempfile.TemporaryFile() as file:
            yield file
            file.seek(0)
            with path.open("wb") as target:
                shutil.copyfileobj(file, target)


def write_whole(path: epath.Path, text: str) -> None:
    """Writes a file so that a reader sees the old text or the new, never a part."""
    if is_local(path):
        with opened_whole(path) as file:
            file.write(text.encode())
    else:
        path.write_text(text)


def digest_of(workdir: epath.PathLike) -> str:
    """A short name of a run's folder, for what lies elsewhere."""
    return hashlib.sha256(os.fspath(absolute(workdir)).encode()).hexdigest()[:16]


def local_folder(workdir: str, local_dir: str | None = None) -> Path:
    """Where a run's local files go: its workdir, or a folder of this machine if that is remote.

    Args:
        workdir: the run's folder.
        local_dir: where folders of remote runs go; the system's temporary folder where None.
    """
    if is_local(workdir):
        return Path(absolute(workdir))
    return local_base(local_dir) / digest_of(workdir)


def local_base(local_dir: str | None = None) -> Path:
    """The folder of this machine, and this user, where folders of remote runs go."""
    base = Path(local_dir or tempfile.gettempdir())
    return base.expanduser().absolute() / f"podlift-{os.getuid()}"
