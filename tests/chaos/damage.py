"""Ways to damage a checkpoint."""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import layout


@dataclass(frozen=True)
class Damage:
    """Damage to a checkpoint.

    Attributes:
        step: of the checkpoint.
        what: what was done, in words.
        start: the number of the first start after the damage.
        harms: whether the step can no longer be restored.
        files: digests of the files that were left, by path within the step.
        inode: of its folder, which identifies it under another name.
    """

    step: int
    what: str
    start: int
    harms: bool
    files: dict[str, str]
    inode: int


def do(workdir: Path, step: int, way: str, rng: random.Random, start: int) -> Damage:
    """Damages one checkpoint.

    Args:
        workdir: of a run that is not running.
        step: of the checkpoint.
        way: of `WAYS`.
        rng: chooses the file and the place in it.
        start: the number of the start that will find it.
    """
    folder = workdir / layout.CHECKPOINTS / str(step)
    if way == "in memory" and not _fast_files(workdir):
        way = "flip"  # the run saves none
    what = WAYS[way](folder, rng)
    harms = way not in ("left-over", "in memory")
    return Damage(step, what, start, harms, digests(folder), folder.stat().st_ino)


def digests(folder: Path) -> dict[str, str]:
    """A digest of every file in a folder, by its path within it."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _files(folder: Path) -> list[Path]:
    """The files of a folder that are not empty."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def _fast_files(workdir: Path) -> list[Path]:
    found = [path for folder in layout.fast_folders(workdir) for path in _files(folder)]
    return [path for path in found if path.name != layout.FAST_OWNER]


def _flip(path: Path, rng: random.Random) -> str:
    data = bytearray(path.read_bytes())
    bit = rng.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    return f"flipped bit {bit} of"


def _truncate(path: Path, rng: random.Random) -> str:
    size = rng.randrange(path.stat().st_size)
    with path.open("r+b") as file:
        file.truncate(size)
    return f"truncated to {size} bytes:"


def _empty(path: Path, rng: random.Random) -> str:
    path.write_bytes(b"")
    return "emptied"


def _remove(path: Path, rng: random.Random) -> str:
    path.unlink()
    return "removed"


def _garbage(path: Path, rng: random.Random) -> str:
    path.write_bytes(rng.randbytes(rng.randint(1, 400)))
    return "put garbage into"


def _to_any_file(change: Callable[[Path, random.Random], str]) -> Way:
    def damage(folder: Path, rng: random.Random) -> str:
        path = rng.choice(_files(folder))
        return f"{change(path, rng)} {path.relative_to(folder.parent)}"

    return damage


def _to_a_description(folder: Path, rng: random.Random) -> str:
    path = rng.choice([p for p in _files(folder) if p.name in layout.DESCRIPTIONS])
    return f"{_garbage(path, rng)} {path.relative_to(folder.parent)}"


def _without_manifest(folder: Path, rng: random.Random) -> str:
    (folder / layout.MANIFEST).unlink()
    return f"removed {folder.name}/{layout.MANIFEST}"


def _hollow(folder: Path, rng: random.Random) -> str:
    shutil.rmtree(folder)
    folder.mkdir()
    return f"emptied the folder {folder.name}"


def _without_state(folder: Path, rng: random.Random) -> str:
    shutil.rmtree(folder / layout.STATE)
    return f"removed {folder.name}/{layout.STATE}"


def _left_over(folder: Path, rng: random.Random) -> str:
    """As after a save that was killed half-way, of this step or of the next."""
    step = int(folder.name) + rng.choice((0, 50))
    names = rng.choice(
        ([layout.SAVING], [layout.ORBAX_SAVING], [layout.SAVING, layout.ORBAX_SAVING])
    )
    made = [name.format(step=step) for name in names]
    for name in made:
        copy = folder.with_name(name)
        shutil.rmtree(copy, ignore_errors=True)  # the kill may have left one itself
        shutil.copytree(folder, copy)
        for path in rng.sample(_files(copy), k=rng.randint(0, 3)):
            path.unlink()
    return f"left {' and '.join(made)}"


def _in_memory(folder: Path, rng: random.Random) -> str:
    path = rng.choice(_fast_files(folder.parent.parent))
    change = rng.choice((_flip, _truncate, _empty, _remove, _garbage))
    return f"{change(path, rng)} {path}"


Way = Callable[[Path, random.Random], str]
WAYS: dict[str, Way] = {
    "flip": _to_any_file(_flip),
    "truncate": _to_any_file(_truncate),
    "empty": _to_any_file(_empty),
    "remove": _to_any_file(_remove),
    "garbage": _to_a_description,
    "no manifest": _without_manifest,
    "hollow": _hollow,
    "no state": _without_state,
    "left-over": _left_over,
    "in memory": _in_memory,
}
