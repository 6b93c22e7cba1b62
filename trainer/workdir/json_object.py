"""JSON objects in files that anybody may have written.

Every file of a folder is read through here, so that no content of a file, however odd, is more than
a ValueError with a few words.
"""

from __future__ import annotations

import os
import stat
from typing import Any

from etils import epath

from trainer.config.json_text import parse_object
from trainer.workdir.paths import is_local

# Far above a manifest of 100,000 leaves.
_MAX_BYTES = 256 << 20


def read_object(path: epath.Path) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
        path: local or remote.

    Raises:
        ValueError: it holds something else; the message says what, in a few words.
        OSError: it is not there or cannot be read. Clients of object stores raise other types.
    """
    return parse_object(read_bytes(path))


def read_bytes(path: epath.Path) -> bytes:
    """The content of a file that should be JSON, of bounded size.

    Raises:
        ValueError: it is too large.
        OSError: it is not there or cannot be read. Clients of object stores raise other types.
    """
    if is_local(path) and not stat.S_ISREG(os.stat(path).st_mode):
        # Opening a pipe would wait for its writer.
        raise ValueError("it is a folder" if os.path.isdir(path) else "it is not a regular file")
    with path.open("rb") as file:
        data: bytes = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ValueError(f"it is larger than {_MAX_BYTES >> 20} MiB")
    return data
