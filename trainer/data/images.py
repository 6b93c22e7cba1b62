"""Images of any size, decoded and cut to one size while a batch is made.

A record is a label and an encoded image: four bytes, the label as a little-endian int32, and behind
them the bytes of the image's file. `folder` makes such records of the files of a folder a class;
`trainer.data.grain_source:array_records`, with `Decode` as `parse`, reads files that hold them.

Images are uint8 as they leave here, for a model that normalises them: floats would be four times
the bytes to stack, to hold ready and to move to the devices.
"""

from __future__ import annotations

import io
import os
import struct
from typing import Any

import numpy as np

from trainer.data.grain_source import GrainSource
from trainer.data.stream import ExampleRandom
from trainer.errors import UserError

_SUFFIXES = (".jpeg", ".jpg", ".png")
_ATTEMPTS = 10


def to_record(label: int, encoded: bytes) -> bytes:
    """A label, and a file's bytes, as one record."""
    return struct.pack("<i", label) + encoded


def from_record(record: bytes) -> tuple[int, bytes]:
    """The inverse of `to_record`."""
    if len(record) < 4:
        raise UserError(f"is {len(record)} bytes long, too short for a label and an image")
    return struct.unpack_from("<i", record)[0], record[4:]


class Decode:
    """Turns a record into `x` uint8 (image_size, image_size, 3) and `y` int32 ().

    In training, where there are random numbers, a random part of the image and half of the time its
    mirror image (Szegedy et al., arXiv:1409.4842, section 6); otherwise the square in its middle.

    Args:
        image_size: of a side, in pixels.
        min_area: the smallest part of the image's area that is cut out in training.
        max_aspect: the largest ratio of one side of what is cut out to the other.
        central: the side of the square in the middle, as a part of the image's shorter side. 0.875
            at 224 pixels is the same as to shrink the shorter side to 256 first.
    """

    def __init__(
        self,
        image_size: int = 224,
        min_area: float = 0.08,
        max_aspect: float = 4 / 3,
        central: float = 0.875,
    ) -> None:
        try:
            from PIL import Image
        except ImportError as error:
            raise UserError("Pillow is not installed", 'pip install "podlift[data]"') from error
        self._pil = Image
        self._size = image_size
        self._min_area = min_area
        self._max_aspect = max_aspect
        self._central = central

    def __call__(self, record: bytes, random: ExampleRandom | None = None) -> dict[str, Any]:
        """Decodes one record.

        Raises:
            UserError: it does not hold a whole image.
        """
        label, encoded = from_record(record)
        try:
            with self._pil.open(io.BytesIO(encoded)) as image:
                # A few of ImageNet's are gray, CMYK, or have an alpha channel.
                rgb = image if image.mode == "RGB" else image.convert("RGB")
                box = random_box(*rgb.size, random, self._min_area, self._max_aspect)
                x = np.asarray(
                    rgb.resize(
                        (self._size, self._size),
                        self._pil.Resampling.BICUBIC,
                        box=box or central_box(*rgb.size, self._central),
                    )
                )
        # There is no I/O in this: what Pillow raises is about the bytes.
        except (OSError, ValueError, SyntaxError, self._pil.DecompressionBombError) as error:
            raise UserError(
                f"is not a whole image: {error}", "fetch it again, or take it out"
            ) from error
        if random is not None and random.uniform(1)[0] < 0.5:
            x = x[:, ::-1]
        return {"x": x, "y": np.int32(label)}


def random_box(
    width: int, height: int, random: ExampleRandom | None, min_area: float, max_aspect: float
) -> tuple[int, int, int, int] | None:
    """A part of an image, (left, upper, right, lower) in pixels; None if ten draws do not fit.

    Its area is uniform from `min_area` of the image to all of it, and the logarithm of its aspect
    ratio is uniform too. Without random numbers it is None.
    """
    if random is None:
        return None
    area, aspect, across, down = random.uniform(4 * _ATTEMPTS).reshape(4, _ATTEMPTS)
    area = width * height * (min_area + (1 - min_area) * area)
    aspect = max_aspect ** (2 * aspect - 1)
    widths = np.round(np.sqrt(area * aspect)).astype(int)
    heights = np.round(np.sqrt(area / aspect)).astype(int)
    fits = np.flatnonzero((widths > 0) & (widths <= width) & (heights > 0) & (heights <= height))
    if not fits.size:
        return None
    w, h = int(widths[fits[0]]), int(heights[fits[0]])
    left = int(across[fits[0]] * (width - w + 1))
    upper = int(down[fits[0]] * (height - h + 1))
    return left, upper, left + w, upper + h


def central_box(width: int, height: int, part: float) -> tuple[float, float, float, float]:
    """The square in the middle whose side is a part of the shorter side, as `random_box`."""
    side = part * min(width, height)
    left, upper = (width - side) / 2, (height - side) / 2
    return left, upper, left + side, upper + side


class Folder:
    """Records from a folder that has a folder of images for each class.

    A label is the place of the class in the order of the names of `classes`. Names of files are
    kept as an array of bytes, 30 MB for ImageNet.

    Args:
        path: the folder.
        classes: the names of the folders in it.

    Raises:
        UserError: there is no image in it, or another folder.
    """

    def __init__(self, path: str, classes: list[str]) -> None:
        self._path = path
        self._classes = classes
        for name in folders_in(path):
            if name not in classes:
                raise UserError(f"{os.path.join(path, name)} is of no class that is trained")
        names, labels = [np.empty(0, "S1")], [np.empty(0, np.int32)]
        for label, folder in enumerate(classes):
            where = os.path.join(path, folder)
            here = os.scandir(where) if os.path.isdir(where) else ()
            files = sorted(
                os.fsencode(entry.name)
                for entry in here
                if entry.name.lower().endswith(_SUFFIXES) and not entry.name.startswith(".")
            )
            names.append(np.array(files, "S"))
            labels.append(np.full(len(files), label, np.int32))
        self._names, self._labels = np.concatenate(names), np.concatenate(labels)
        if not len(self):
            raise UserError(f"the folders in {path} hold no image ({', '.join(_SUFFIXES)})")

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int, /) -> bytes:
        with open(self.path(index), "rb") as file:
            return to_record(self._labels[index], file.read())

    def path(self, index: int) -> str:
        """The file of an example."""
        folder = self._classes[self._labels[index]]
        return os.path.join(self._path, folder, os.fsdecode(bytes(self._names[index])))


def folders_in(path: str) -> list[str]:
    """The names of the folders in a folder, sorted."""
    with os.scandir(path) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def folder(
    directory: str,
    image_size: int = 224,
    num_classes: int | None = None,
    train: str = "train",
    eval: str = "val",
    num_threads: int | None = None,
    min_area: float = 0.08,
    max_aspect: float = 4 / 3,
    central: float = 0.875,
) -> dict[str, Any]:
    """Images in one folder a class: `DIRECTORY/train/CLASS/*.JPEG`, `DIRECTORY/val/CLASS/*.JPEG`.

    Args:
        directory: holds the two folders.
        image_size: of a side, in pixels.
        num_classes: how many classes there should be; None for any number.
        train: the folder of the training images.
        eval: the folder of the held-out images.
        num_threads: see `GrainSource`.
        min_area: see `Decode`, as for the next two; all three 1.0 take square images whole.
        max_aspect: see `Decode`.
        central: see `Decode`.

    Raises:
        UserError: a folder is absent, or does not hold what it should.
    """
    directory = os.path.expanduser(directory)
    decode = Decode(image_size, min_area, max_aspect, central)
    paths = [os.path.join(directory, part) for part in (train, eval)]
    for path in paths:
        if not os.path.isdir(path) or not folders_in(path):
            raise UserError(
                f"config.data.directory={directory!r} has no {os.path.basename(path)}/ with a "
                "folder of images for each class",
                "--config.data.directory=DIR; docs/imagenet.md says how the files have to lie, and "
                "ImageNet's are to be had from image-net.org",
            )
    classes = folders_in(paths[0])
    if num_classes not in (None, len(classes)):
        raise UserError(
            f"{paths[0]} holds {len(classes)} folders, one a class, and config.data.num_classes is "
            f"{num_classes}",
            f"--config.model.num_classes={len(classes)}, which it follows",
        )

    def source(path: str) -> GrainSource:
        files = Folder(path, classes)
        return GrainSource(files, decode, num_threads, files.path)

    return {"train": source(paths[0]), "eval": source(paths[1])}
