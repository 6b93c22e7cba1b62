"""A state of a run, read without a trainer."""

from __future__ import annotations

import os
from typing import Any

from trainer.checkpoints import arrays as arrays_of
from trainer.checkpoints.folder import CheckpointFolder
from trainer.checkpoints.manifest import Damaged
from trainer.errors import CheckpointsUnreadable, first_line
from trainer.paths import absolute
from trainer.state import checksum_of, from_flat


def load(workdir: str | os.PathLike[str], *, best: bool = False) -> dict[str, Any]:
    """The newest state of a run, or its best, as nested dicts of numpy arrays.

    For use without a trainer, on any machine: `load("runs/mine", best=True)["params"]`.

    Args:
        workdir: the run's folder.
        best: the state in `best/` instead of the newest in `checkpoints/`.

    Raises:
        CheckpointsUnreadable: there is no such checkpoint, or it is not what was saved.
    """
    place = absolute(workdir) / ("best" if best else "checkpoints")
    folder = CheckpointFolder(place, 1)
    steps = folder.steps()
    if not steps:
        raise CheckpointsUnreadable(f"{place} holds no checkpoint")
    try:
        with folder.opened(steps[-1]) as (files, listed):
            leaves = arrays_of.read(files, listed.leaves)
        for name, leaf in listed.leaves.items():
            if checksum_of(leaves[name]) != leaf.checksum:
                raise Damaged(f"{name} is not what was saved")
    except Exception as error:  # Orbax raises many types for damaged files
        raise CheckpointsUnreadable(
            f"{place / str(steps[-1])} is damaged: {first_line(error)}"
        ) from error
    return from_flat(leaves)
