"""Paths of a run, local or remote (`gs://...`), and what can be done with each."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from etils import epath


def is_local(path: epath.PathLike) -> bool:
    """Whether it is of a file system, where files can be renamed, appended to and locked."""
    return "://" not in os.fspath(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """A path that no longer depends on the current folder; a remote one as it is."""
    text = os.fspath(path)
    return epath.Path(os.path.abspath(os.path.expanduser(text)) if is_local(text) else text)


def write_whole(path: epath.Path, text: str) -> None:
    """Writes a file so that a reader sees the old text or the new, never a part."""
    if is_local(path):
        part = path.parent / f".{path.name}.part"
        part.write_text(text)
        part.replace(path)
    else:  # an object appears when all of it is there
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
    base = Path(local_dir or tempfile.gettempdir())
    return base.expanduser().absolute() / f"podlift-{os.getuid()}" / digest_of(workdir)
