"""The shapes of one example, in place of the data."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np

from trainer.config.settings import Settings
from trainer.errors import UserError

_ITEM = re.compile(r"(\w+)=(\w+)\[((?:\d+(?:,\d+)*)?)\]")

# Enough examples for any batch.
_LENGTH = 1 << 31


class ShapesOnly:
    """A source of zeros.

    Args:
        shapes: the dtype and shape of one example, by name.
    """

    def __init__(self, shapes: dict[str, tuple[np.dtype[Any], tuple[int, ...]]]) -> None:
        self._shapes = shapes

    def __len__(self) -> int:
        return _LENGTH

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return {
            name: np.broadcast_to(np.zeros((), dtype), (*np.shape(indices), *shape))
            for name, (dtype, shape) in self._shapes.items()
        }


def source(example: str) -> dict[str, ShapesOnly]:
    """A data target that only knows shapes.

    Args:
        example: for example `x=uint8[224,224,3] y=int32[]`.

    Raises:
        UserError: `example` has another form, or no `x`.
    """
    shapes = {}
    for item in example.replace(";", " ").split():
        match = _ITEM.fullmatch(item)
        try:
            if match is None:
                raise TypeError
            dims = tuple(int(d) for d in match[3].split(",") if d)
            dtype = np.dtype(match[2])
            if dtype.kind not in "biuf" and match[2] != "bfloat16":
                raise TypeError
            if 0 in dims:
                raise TypeError
            shapes[match[1]] = (dtype, dims)
        except TypeError as error:
            raise UserError(
                f"--example: {item!r} is not a shape", 'for example "x=uint8[224,224,3] y=int32[]"'
            ) from error
    if "x" not in shapes:
        raise UserError("--example has no x", 'for example "x=uint8[224,224,3] y=int32[]"')
    return {"train": ShapesOnly(shapes)}


def in_place_of_data(settings: Settings, example: str) -> Settings:
    """The settings with `source` as their data."""
    data = {"target": f"{__name__}:source", "example": example}
    return dataclasses.replace(settings, data=data, augment=None, shuffle=False)
