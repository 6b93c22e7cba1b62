"""Images of any size, decoded, cropped and resized while a batch is prepared.

A record consists of a label, four bytes (a little-endian int32), and the bytes of an image file.
`folder` reads such records from one folder per class; `trainer.data.grain_source:array_records`
reads them from ArrayRecord files, with `Decode` as `parse`.

The images of a batch are uint8, and the model normalises them: float32 would take four times the
memory, and four times the bandwidth to the devices.
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
    """Joins a label and the bytes of an image file into one record."""
    return struct.pack("<i", label) + encoded


def from_record(record: bytes) -> tuple[int, bytes]:
    """The inverse of `to_record`."""
    if len(record) < 4:
        raise UserError(f"is {len(record)} bytes long, too short for a label and an image")
    return struct.unpack_from("<i", record)[0], record[4:]


class Decode:
    """Turns a record into `x` uint8 (image_size, image_size, 3) and `y` int32 ().

    In training it takes a random crop and mirrors half of the images (Szegedy et al.,
    arXiv:1409.4842, section 6); in evaluation it takes the central square.

    Args:
        image_size: the side of `x` in pixels.
        min_area: the smallest random crop, as a fraction of the image's area.
        max_aspect: the largest aspect ratio of a random crop.
        central: the side of the central square, as a fraction of the image's shorter side. 0.875
            at 224 pixels corresponds to resizing the shorter side to 256 first.

    Raises:
        UserError: Pillow is not installed.
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
            UserError: it does not contain a complete image.
        """
        label, encoded = from_record(record)
        try:
            with self._pil.open(io.BytesIO(encoded)) as image:
                # A few images of ImageNet are gray, CMYK, or have an alpha channel.
                rgb = image if image.mode == "RGB" else image.convert("RGB")
                box = random_box(*rgb.size, random, self._min_area, self._max_aspect)
                x = np.asarray(
                    rgb.resize(
                        (self._size, self._size),
                        self._pil.Resampling.BICUBIC,
                        box=box or central_box(*rgb.size, self._central),
                    )
                )
        # No I/O happens above, so every error of Pillow is about the bytes.
        except (OSError, ValueError, SyntaxError, self._pil.DecompressionBombError) as error:
            raise UserError(
                f"is not a complete image: {error}", "download it again, or remove it"
            ) from error
        if random is not None and random.uniform(1)[0] < 0.5:
            x = x[:, ::-1]
        return {"x": x, "y": np.int32(label)}


def random_box(
    width: int, height: int, random: ExampleRandom | None, min_area: float, max_aspect: float
) -> tuple[int, int, int, int] | None:
    """A random crop (left, upper, right, lower) of an image, in pixels; None if ten draws fail.

    Its area is uniform between `min_area` of the image and the full image, and the logarithm of its
    aspect ratio is uniform. Without random numbers it is None.
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


def central_box(width: int, height: int, fraction: float) -> tuple[float, float, float, float]:
    """The central square, whose side is a fraction of the shorter side, as in `random_box`."""
    side = fraction * min(width, height)
    left, upper = (width - side) / 2, (height - side) / 2
    return left, upper, left + side, upper + side


class Folder:
    """Records from a folder with one subfolder of images per class.

    A label is the index of the class in `classes`. The names of all files are kept in one array of
    bytes, 30 MB for ImageNet.

    Args:
        path: the folder.
        classes: the names of its subfolders.

    Raises:
        UserError: it contains no image, or a subfolder that is not in `classes`.
    """

    def __init__(self, path: str, classes: list[str]) -> None:
        self._path = path
        self._classes = classes
        for name in folders_in(path):
            if name not in classes:
                raise UserError(
                    f"{os.path.join(path, name)} is not one of the classes of the training images"
                )
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
            raise UserError(f"the folders in {path} contain no image ({', '.join(_SUFFIXES)})")

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int, /) -> bytes:
        with open(self.path(index), "rb") as file:
            return to_record(self._labels[index], file.read())

    def path(self, index: int) -> str:
        """The path of an example's file."""
        folder = self._classes[self._labels[index]]
        return os.path.join(self._path, folder, os.fsdecode(bytes(self._names[index])))


def folders_in(path: str) -> list[str]:
    """The names of the subfolders of a folder, sorted."""
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
    """Images in one folder per class: `DIRECTORY/train/CLASS/*.JPEG`, `DIRECTORY/val/CLASS/*.JPEG`.

    Args:
        directory: contains the two folders.
        image_size: the side of an image in a batch, in pixels.
        num_classes: the expected number of classes; None: any.
        train: the name of the folder of the training images.
        eval: the name of the folder of the held-out images.
        num_threads: see `GrainSource`.
        min_area: see `Decode`. With 1.0 for this and the next two, square images are not cropped.
        max_aspect: see `Decode`.
        central: see `Decode`.

    Raises:
        UserError: a folder is missing or has unexpected contents.
    """
    directory = os.path.expanduser(directory)
    decode = Decode(image_size, min_area, max_aspect, central)
    paths = [os.path.join(directory, name) for name in (train, eval)]
    for path in paths:
        if not os.path.isdir(path) or not folders_in(path):
            raise UserError(
                f"config.data.directory={directory!r} has no {os.path.basename(path)}/ with a "
                "folder of images for each class",
                "--config.data.directory=DIR; docs/imagenet.md describes the folders and how to "
                "get ImageNet from image-net.org",
            )
    classes = folders_in(paths[0])
    if num_classes not in (None, len(classes)):
        raise UserError(
            f"{paths[0]} contains {len(classes)} folders, one per class, but "
            f"config.data.num_classes is {num_classes}",
            f"--config.model.num_classes={len(classes)}, which config.data.num_classes follows",
        )

    def source(path: str) -> GrainSource:
        files = Folder(path, classes)
        return GrainSource(files, decode, num_threads, files.path)

    return {"train": source(paths[0]), "eval": source(paths[1])}
