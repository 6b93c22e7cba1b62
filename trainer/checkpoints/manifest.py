"""What a checkpoint consists of, so that damage is found before anything is read from it.

The manifest lies beside the files it lists, is written last, and carries a checksum of itself: a
checkpoint whose manifest says "whole" is what was written, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

NAME = "manifest.json"
_VERSION = 1


class Damaged(Exception):
    """A checkpoint is not what was written. The text says what is wrong, in a few words."""


@dataclass(frozen=True)
class Leaf:
    """An array of the state.

    Attributes:
        shape: of it.
        dtype: as numpy names it.
        checksum: of its bits, as `trainer.state.checksums.checksums` takes it.
    """

    shape: tuple[int, ...]
    dtype: str
    checksum: int


@dataclass(frozen=True)
class File:
    """A file of a checkpoint.

    Attributes:
        size: in bytes.
        sha256: of its content, in hex.
    """

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of.

    Attributes:
        step: of the state.
        meta: what else a resume needs, as JSON.
        leaves: of the state, by name, such as "params/Dense_0/kernel".
        files: by their path in the checkpoint, with "/" in it.
    """

    step: int
    meta: Mapping[str, Any]
    leaves: Mapping[str, Leaf]
    files: Mapping[str, File]

    def to_text(self) -> str:
        """As JSON, with the checksum of all the rest in front."""
        body = json.dumps({"version": _VERSION, **asdict(self)}, sort_keys=True)
        return f'{{"sha256": "{_sha256(body.encode())}", "body": {body}}}\n'

    @classmethod
    def from_text(cls, text: str) -> Manifest:
        """The inverse.

        Raises:
            Damaged: one character or more is not as it was written.
        """
        try:
            stored = json.loads(text)
            body = dict(stored["body"])
            version = body.pop("version")
            if version > _VERSION:
                raise Damaged(f"its {NAME} is of a newer podlift (version {version})")
            leaves = {
                name: Leaf(tuple(leaf["shape"]), leaf["dtype"], leaf["checksum"])
                for name, leaf in body["leaves"].items()
            }
            files = {name: File(**file) for name, file in body["files"].items()}
            manifest = cls(body["step"], body["meta"], leaves, files)
            is_whole = manifest.to_text() == text
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise Damaged(_what_is_wrong(text)) from error
        if not is_whole:
            raise Damaged(_what_is_wrong(text))
        return manifest


def _what_is_wrong(text: str) -> str:
    return f"its {NAME} is empty" if not text.strip() else f"its {NAME} is damaged"


def describe_files(folder: Path) -> dict[str, File]:
    """Every file under a folder, but for the manifest itself."""
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

    Files that it does not list are nobody's loss, and are ignored.

    Args:
        folder: of the checkpoint.
        step: that it should be of, where that is known.

    Raises:
        Damaged: naming the first file that is not as it was written.
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
        except FileNotFoundError:
            raise Damaged(f"{name} is missing") from None
        except OSError as error:
            raise Damaged(f"{name} cannot be read: {error.strerror or error}") from error
    return manifest


def read_alone(folder: Any, step: int | None = None) -> Manifest:
    """Reads the manifest of a checkpoint and looks at no other file.

    Raises:
        Damaged: it is missing, not as it was written, or of another step.
    """
    try:
        manifest = Manifest.from_text((folder / NAME).read_bytes().decode())
    except FileNotFoundError:
        raise Damaged(_of_no_manifest(folder)) from None
    except UnicodeDecodeError:
        raise Damaged(f"its {NAME} is damaged") from None
    except OSError as error:
        raise Damaged(f"its {NAME} cannot be read: {error.strerror or error}") from error
    if step is not None and manifest.step != step:
        raise Damaged(f"its {NAME} is that of step {manifest.step}")
    return manifest


def _of_no_manifest(folder: Any) -> str:
    try:
        is_empty = not any(folder.iterdir())
    except OSError:
        is_empty = False
    return "it is empty" if is_empty else f"it has no {NAME}: its save did not finish"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
