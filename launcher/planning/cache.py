"""What compilers have said, kept by what they were asked."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# What is kept means something else when this changes.
_VERSION = 1


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no size")


class PlanCache:
    """JSON files in a folder of the user's; one that cannot be read is as good as none.

    Args:
        folder: made when first written to.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @classmethod
    def of_user(cls, environ: Mapping[str, str]) -> PlanCache:
        """The one in the user's cache folder."""
        base = environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        return cls(Path(base) / "podlift" / "plan")

    @staticmethod
    def key(parts: Sequence[Any]) -> str:
        """A name for what a compiler is asked: the program, the topology, options, versions."""
        digest = hashlib.sha256(str(_VERSION).encode())
        for part in parts:
            digest.update(repr(part).encode())
            digest.update(b"\0")
        return digest.hexdigest()

    def get(self, key: str) -> dict[str, Any] | None:
        """What was put under a key."""
        try:
            text = (self._folder / f"{key}.json").read_text()
            found = json.loads(text, parse_constant=_refuse)
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def put(self, key: str, value: Mapping[str, Any]) -> None:
        """Keeps a value; on a disk that takes nothing, it is compiled again."""
        path = self._folder / f"{key}.json"
        beside = path.with_suffix(f".{os.getpid()}")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            beside.write_text(json.dumps(value))
            beside.replace(path)
        except OSError:
            return
