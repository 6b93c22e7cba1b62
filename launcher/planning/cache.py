"""Results of compilations, cached on disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from trainer.config.json_text import parse_object
from trainer.workdir.json_object import read_bytes

# Increases when the meaning of an entry changes.
_VERSION = 2


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a size")


class PlanCache:
    """JSON files in a folder; an entry that cannot be read counts as missing.

    Args:
        folder: created by the first `put`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @classmethod
    def of_user(cls, environ: Mapping[str, str]) -> PlanCache:
        """The cache in the user's cache folder."""
        base = environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        return cls(Path(base) / "podlift" / "plan")

    @staticmethod
    def key(parts: Sequence[Any]) -> str:
        """Hashes what determines a result: the program, the topology, options, versions."""
        digest = hashlib.sha256(str(_VERSION).encode())
        for part in parts:
            digest.update(repr(part).encode())
            digest.update(b"\0")
        return digest.hexdigest()

    def get(self, key: str) -> dict[str, Any] | None:
        """The entry of a key; None if there is none."""
        try:
            text = read_bytes(epath.Path(self._folder) / f"{key}.json")
            return parse_object(text, parse_constant=_refuse)
        except (OSError, ValueError):
            return None

    def put(self, key: str, value: Mapping[str, Any]) -> None:
        """Writes an entry; if that fails, the next plan compiles again."""
        path = self._folder / f"{key}.json"
        beside = path.with_suffix(f".{os.getpid()}")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            beside.write_text(json.dumps(value))
            beside.replace(path)
        except OSError:
            return
