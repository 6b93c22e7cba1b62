"""Image sets in the idx format of MNIST (yann.lecun.com/exdb/mnist, "FILE FORMATS")."""

from __future__ import annotations

import gzip
from typing import Any

import numpy as np
from etils import epath

from trainer.errors import UserError

# The third byte of a file is the code of its dtype.
_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read(path: epath.PathLike) -> np.ndarray:
    """Reads one idx file, gzipped or not.

    Raises:
        UserError: the file is not in the idx format, or is truncated.
    """
    raw = epath.Path(path).read_bytes()
    try:
        data = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
        dtype, ndim = np.dtype(_DTYPES[data[2]]), data[3]
        shape = np.frombuffer(data, ">u4", ndim, offset=4)
        values = np.frombuffer(data, dtype, int(np.prod(shape)), offset=4 + 4 * ndim)
        return values.reshape(shape)
    except (EOFError, IndexError, KeyError, ValueError, gzip.BadGzipFile) as error:
        raise UserError(
            f"{path} is not a complete idx file: {error}", "download it again"
        ) from error


def load(directory: str, num_train: int | None = None, hint: str = "") -> dict[str, Any]:
    """Images `x` float32 (examples, h, w, 1) in [0, 1] and labels `y` int32 (examples,).

    Args:
        directory: contains `train-images-idx3-ubyte[.gz]`, `train-labels-idx1-ubyte[.gz]`, and the
            same with `t10k` for the held-out examples.
        num_train: use only this many examples of the training set, from its start; None: all.
        hint: how to get the files, shown if they are missing.

    Raises:
        UserError: a file is missing or damaged.
    """

    def split(name: str, limit: int | None = None) -> dict[str, np.ndarray]:
        images = read(_find(directory, f"{name}-images-idx3-ubyte", hint))[:limit]
        labels = read(_find(directory, f"{name}-labels-idx1-ubyte", hint))[:limit]
        return {
            "x": (images[..., None] / np.float32(255)).astype(np.float32),
            "y": labels.astype(np.int32),
        }

    return {"train": split("train", num_train), "eval": split("t10k")}


def _find(directory: str, name: str, hint: str) -> epath.Path:
    for candidate in (f"{name}.gz", name):
        path = epath.Path(directory).expanduser() / candidate
        if path.exists():
            return path
    raise UserError(f"config.data.directory={directory!r} holds no {name}.gz", hint)
