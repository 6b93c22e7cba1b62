"""Reads a state of a run on any machine. Writes nothing and takes no lock."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from trainer.checkpoints import arrays as arrays_of
from trainer.checkpoints import manifest
from trainer.checkpoints.folder import CheckpointFolder
from trainer.checkpoints.manifest import Damaged, Leaf, OfAnotherRun
from trainer.errors import CheckpointsUnreadable, StorageFailed, UserError, first_line
from trainer.state.checksums import checksum_of
from trainer.state.finite import find_unusable
from trainer.state.leaves import from_flat
from trainer.workdir.paths import absolute, is_local
from trainer.workdir.patience import patiently
from trainer.workdir.private import not_plain
from trainer.workdir.workdir import read_environment

# How often a run that is training may remove the checkpoint that is being read.
_TRIES = 5


@dataclass(frozen=True)
class Saved:
    """A saved state.

    Attributes:
        step: the step of the state.
        place: the checkpoint.
        leaves: its leaves, by name.
        listed: shape, dtype and checksum of each leaf, by name.
        data: the fingerprints of the data it was trained on; empty if an earlier podlift saved it.
    """

    step: int
    place: epath.Path
    leaves: dict[str, np.ndarray]
    listed: dict[str, Leaf]
    data: Mapping[str, Any] = field(default_factory=dict)


def load(
    workdir: str | os.PathLike[str], *, best: bool = False, step: int | None = None
) -> dict[str, Any]:
    """Loads a state of a run, by default the newest, as nested dicts of numpy arrays.

    It needs neither the run's code nor its devices: `load("runs/mine", best=True)["params"]`. The
    run may be training meanwhile.

    Args:
        workdir: the run's folder.
        best: the state in `best/` instead of the newest in `checkpoints/`.
        step: the state of this step, from `checkpoints/` or else from `best/`.

    Returns:
        The state in the shapes and dtypes it was saved in: "params", "model_state", "opt_state",
        "step", "rng", and what the config adds: "ema" and "loss_scale".

    Raises:
        CheckpointsUnreadable: the checkpoint does not exist, is damaged or is another run's.
        StorageFailed: the disk or the object store has not answered for minutes.
    """
    return from_flat(read_saved(workdir, best=best, step=step).leaves)


def read_saved(
    workdir: str | os.PathLike[str], *, best: bool = False, step: int | None = None
) -> Saved:
    """The same as `load`, with step and manifest. Every file and every leaf is checked."""
    root = absolute(workdir)
    names = ["best"] if best else ["checkpoints"] if step is None else ["checkpoints", "best"]
    run_id = str(read_environment(root).get("run_id") or "")
    for _ in range(_TRIES):
        folder, found = _find(root, names, step)
        place = folder.path / str(found)
        try:
            return patiently(place, lambda: _read(folder, found, run_id))  # noqa: B023
        except (StorageFailed, UserError):
            raise
        except Exception as error:  # Orbax raises many types for damaged files
            if found in _steps(folder):
                what = "cannot be used" if isinstance(error, OfAnotherRun) else "is damaged"
                raise CheckpointsUnreadable(
                    f"{place} {what}: {first_line(error)}", _hint_of_others(root, place)
                ) from error
            # else the run has removed it, for a newer one
    raise CheckpointsUnreadable(f"{place} is gone: its run removes states while they are read")


def refuse_unusable(saved: Saved) -> None:
    """Refuses a state that holds what a model must not (`trainer.state.finite`).

    Raises:
        CheckpointsUnreadable: names the first such leaf.
    """
    found = find_unusable(saved.leaves)
    for name, count in found.items():
        more = f", nor are {len(found) - 1} more leaves" if len(found) > 1 else ""
        raise CheckpointsUnreadable(
            f"{name} in {saved.place} is not finite, in {count} of {saved.leaves[name].size} "
            f"elements{more}",
            "use the state of another step; trainer.load reads this one",
        )


def _find(root: epath.Path, names: list[str], step: int | None) -> tuple[CheckpointFolder, int]:
    for name in names:
        folder = CheckpointFolder(root / name, 1)
        for found in reversed(_steps(folder)):
            if step in (None, found):
                return folder, found
    what = f"{root / names[0]} holds no checkpoint"
    if step is not None:
        what = f"{root} holds no state of step {step}"
    raise CheckpointsUnreadable(what, _hint_of_others(root))


def _steps(folder: CheckpointFolder) -> list[int]:
    """The steps that can be read: in an object store, an upload in progress has no manifest yet."""

    def find() -> list[int]:
        steps = folder.steps()
        if is_local(folder.path):
            return steps
        return [step for step in steps if (folder.path / str(step) / manifest.NAME).exists()]

    return patiently(folder.path, find)


def _hint_of_others(root: epath.Path, but: epath.Path | None = None) -> str:
    """`there are checkpoints/10, checkpoints/20, best/20`, as a hint."""
    folders = [CheckpointFolder(root / name, 1) for name in ("checkpoints", "best")]
    places = [folder.path / str(step) for folder in folders for step in _steps(folder)]
    listed = ", ".join(f"{p.parent.name}/{p.name}" for p in places if p != but)
    return f"there are {listed}" if listed else ""


def _read(folder: CheckpointFolder, step: int, run_id: str) -> Saved:
    if is_local(folder.path):
        _refuse_links(Path(folder.path, str(step)))
    with folder.opened(step) as (files, listed):
        listed.check_run_id(run_id)
        arrays_of.check_sizes(files, listed.leaves, _memory_of_host())
        leaves = arrays_of.read(files, listed.leaves)
    for name, leaf in listed.leaves.items():
        if checksum_of(leaves[name]) != leaf.checksum:
            raise Damaged(f"{name} is not what was saved")
    data = listed.meta.get("data") or {}
    return Saved(step, folder.path / str(step), leaves, dict(listed.leaves), data)


def _refuse_links(place: Path) -> None:
    """Raises Damaged for links in a checkpoint: its reader may not own what they lead to."""
    for path in (place, *place.rglob("*")):
        what = not_plain(path)
        if what:
            raise Damaged(f"{path.relative_to(place.parent)} is {what}, which is not followed")


def _memory_of_host() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
