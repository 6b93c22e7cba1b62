"""A state of a run, read without a trainer. Nothing is written and no lock is taken."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath

from trainer.checkpoints import arrays as arrays_of
from trainer.checkpoints import manifest
from trainer.checkpoints.folder import CheckpointFolder
from trainer.checkpoints.manifest import Damaged, Leaf
from trainer.errors import CheckpointsUnreadable, first_line
from trainer.state.checksums import checksum_of
from trainer.state.leaves import from_flat
from trainer.workdir.paths import absolute, is_local

# How often a run that trains there may remove what is being read.
_TRIES = 5


@dataclass(frozen=True)
class Saved:
    """A state as it was saved.

    Attributes:
        step: of the state.
        place: the checkpoint.
        leaves: of it, by name.
        listed: what they are.
    """

    step: int
    place: epath.Path
    leaves: dict[str, np.ndarray]
    listed: dict[str, Leaf]


def load(
    workdir: str | os.PathLike[str], *, best: bool = False, step: int | None = None
) -> dict[str, Any]:
    """A state of a run, by default the newest, as nested dicts of numpy arrays.

    For use without a trainer, on any machine: `load("runs/mine", best=True)["params"]`. A run may
    be training there meanwhile.

    Args:
        workdir: the run's folder.
        best: the state in `best/` instead of the newest in `checkpoints/`.
        step: the state of this step, from `checkpoints/` or else from `best/`.

    Raises:
        CheckpointsUnreadable: there is no such checkpoint, or it is not what was saved.
    """
    return from_flat(read_saved(workdir, best=best, step=step).leaves)


def read_saved(
    workdir: str | os.PathLike[str], *, best: bool = False, step: int | None = None
) -> Saved:
    """The same, with what is known of it; every file and every leaf has been checked."""
    root = absolute(workdir)
    names = ["best"] if best else ["checkpoints"] if step is None else ["checkpoints", "best"]
    for _ in range(_TRIES):
        folder, found = _find(root, names, step)
        place = folder.path / str(found)
        try:
            return _read(folder, found)
        except Exception as error:  # Orbax raises many types for damaged files
            if found in _steps(folder):
                raise CheckpointsUnreadable(
                    f"{place} is damaged: {first_line(error)}", _there_are(root, place)
                ) from error
            # else it was removed meanwhile, for a newer one
    raise CheckpointsUnreadable(f"{place} is gone: its run removes states while they are read")


def _find(root: epath.Path, names: list[str], step: int | None) -> tuple[CheckpointFolder, int]:
    for name in names:
        folder = CheckpointFolder(root / name, 1)
        for found in reversed(_steps(folder)):
            if step in (None, found):
                return folder, found
    what = f"{root / names[0]} holds no checkpoint"
    if step is not None:
        what = f"{root} holds no state of step {step}"
    raise CheckpointsUnreadable(what, _there_are(root))


def _steps(folder: CheckpointFolder) -> list[int]:
    """The steps that can be read. In an object store one that is on its way has no manifest yet."""
    steps = folder.steps()
    if is_local(folder.path):
        return steps
    return [step for step in steps if (folder.path / str(step) / manifest.NAME).exists()]


def _there_are(root: epath.Path, but: epath.Path | None = None) -> str:
    """`there are checkpoints/10, checkpoints/20, best/20`, as a hint."""
    folders = [CheckpointFolder(root / name, 1) for name in ("checkpoints", "best")]
    places = [folder.path / str(step) for folder in folders for step in _steps(folder)]
    listed = ", ".join(f"{p.parent.name}/{p.name}" for p in places if p != but)
    return f"there are {listed}" if listed else ""


def _read(folder: CheckpointFolder, step: int) -> Saved:
    with folder.opened(step) as (files, listed):
        leaves = arrays_of.read(files, listed.leaves)
    for name, leaf in listed.leaves.items():
        if checksum_of(leaves[name]) != leaf.checksum:
            raise Damaged(f"{name} is not what was saved")
    return Saved(step, folder.path / str(step), leaves, dict(listed.leaves))
