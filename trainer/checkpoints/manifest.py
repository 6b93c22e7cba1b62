"""The manifest of a checkpoint, which finds damage before anything is restored.

It is stored beside the files it lists, is written last and contains a checksum of itself: a
checkpoint that matches its manifest is what was written, byte for byte.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.config.json_text import parse_object

NAME = "manifest.json"
_VERSION = 1


class Damaged(Exception):
    """A checkpoint is not what was written. The message says what is wrong, in a few words."""


class OfAnotherRun(Damaged):
    """A checkpoint is intact, and another run has saved it."""


@dataclass(frozen=True)
class Leaf:
    """An array of the state.

    Attributes:
        shape: its shape.
        dtype: its dtype, as numpy names it.
        checksum: of its bits, as `trainer.state.checksums.checksums` computes it.
    """

    shape: tuple[int, ...]
    dtype: str
    checksum: int


@dataclass(frozen=True)
class File:
    """A file of a checkpoint.

    Attributes:
        size: its size in bytes.
        sha256: the digest of its content, in hex.
    """

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The contents of a checkpoint.

    Attributes:
        step: the step of the state.
        meta: what a resume needs besides the state, as JSON.
        leaves: the leaves of the state, by name, such as "params/Dense_0/kernel".
        files: the files, by their path in the checkpoint, separated by "/".
    """

    step: int
    meta: Mapping[str, Any]
    leaves: Mapping[str, Leaf]
    files: Mapping[str, File]

    @property
    def run_id(self) -> str:
        """The id of the run that saved it; empty in one of an earlier version."""
        return str(self.meta.get("run_id") or "")

    def check_run_id(self, run_id: str) -> None:
        """Raises OfAnotherRun if another run has saved it; nothing where either has no id."""
        if run_id and self.run_id not in ("", run_id):
            raise OfAnotherRun(f"another run has saved it (run id {self.run_id}, not {run_id})")

    def to_text(self) -> str:
        """The manifest as JSON, led by the checksum of the rest."""
        body = json.dumps({"version": _VERSION, **asdict(self)}, sort_keys=True)
        return f'{{"sha256": "{_sha256(body.encode())}", "body": {body}}}\n'

    @classmethod
    def from_text(cls, text: str) -> Manifest:
        """The inverse of `to_text`.

        Raises:
            Damaged: a character has changed, or a newer podlift wrote it.
        """
        try:
            body = dict(parse_object(text)["body"])
            version = body.pop("version")
            if version > _VERSION:
                raise Damaged(f"its {NAME} was written by a newer podlift (version {version})")
            leaves = {
                name: Leaf(tuple(leaf["shape"]), leaf["dtype"], leaf["checksum"])
                for name, leaf in body["leaves"].items()
            }
            files = {name: File(**file) for name, file in body["files"].items()}
            manifest = cls(body["step"], body["meta"], leaves, files)
            is_intact = manifest.to_text() == text
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise Damaged(_what_is_wrong(text)) from error
        if not is_intact:
            raise Damaged(_what_is_wrong(text))
        return manifest


def _what_is_wrong(text: str) -> str:
    return f"its {NAME} is empty" if not text.strip() else f"its {NAME} is damaged"


def describe_files(folder: Path) -> dict[str, File]:
    """Size and digest of every file under a folder, except the manifest itself."""
    described = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != NAME:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            described[name] = File(path.stat().st_size, digest)
    return described


def read(folder: Path, step: int | None = None) -> Manifest:
    """Reads the manifest of a checkpoint and compares every file with it.

    Files that it does not list are ignored.

    Args:
        folder: the local folder of the checkpoint.
        step: the expected step, if known.

    Raises:
        Damaged: a file is not what was written; names the first one.
        OSError: a file cannot be read, so that it is unknown what it holds.
    """
    manifest = read_alone(folder, step)
    for name, file in manifest.files.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != file.size:
                raise Damaged(f"{name} has {size} bytes and was written with {file.size}")
            with path.open("rb") as content:
                if hashlib.file_digest(content, "sha256").hexdigest() != file.sha256:
                    raise Damaged(f"{name} is not what was written: its checksum differs")
        except OSError as error:
            raise _damage(error, name) from error
    return manifest


def read_alone(folder: Any, step: int | None = None) -> Manifest:
    """Reads the manifest of a checkpoint, and no other file.

    Args:
        folder: the folder of the checkpoint, local or remote.
        step: the expected step, if known.

    Raises:
        Damaged: the manifest is missing, damaged, or belongs to another step.
        OSError: it cannot be read. Clients of object stores raise other types.
    """
    try:
        manifest = Manifest.from_text((folder / NAME).read_bytes().decode())
    except FileNotFoundError:
        raise Damaged(_why_no_manifest(folder)) from None
    except UnicodeDecodeError:
        raise Damaged(f"its {NAME} is damaged") from None
    except OSError as error:
        raise _damage(error, f"its {NAME}") from error
    if step is not None and manifest.step != step:
        raise Damaged(f"its {NAME} belongs to step {manifest.step}")
    return manifest


def _damage(error: OSError, what: str) -> Exception:
    """The error itself, unless it says that there is no such file."""
    if isinstance(error, FileNotFoundError):
        return Damaged(f"{what} is missing")
    if error.errno in (errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG):
        return Damaged(f"{what} cannot be read: {error.strerror or error}")
    return error


def _why_no_manifest(folder: Any) -> str:
    try:
        is_empty = not any(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        is_empty = False
    return "it is empty" if is_empty else f"it has no {NAME}: its save did not finish"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
