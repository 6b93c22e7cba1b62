"""What becomes of the state when the run's folder is renamed or removed under it."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from etils import epath

from trainer.errors import FolderMoved, SavesFailed, first_line
from trainer.run.ownership import Ownership


@contextmanager
def rescuing(ownership: Ownership, step: int, save: Callable[[], epath.Path]) -> Iterator[None]:
    """If the run's folder is not in its place any more, saves the state where it can be.

    Args:
        ownership: of the folder.
        step: of the state.
        save: saves the state, and returns the folder of the run it is in.

    Raises:
        FolderMoved: says what happened to the folder, and where the state is.
    """
    try:
        yield
    except (FolderMoved, SavesFailed):
        identity = ownership.identity
        if identity is None or not identity.is_moved:
            raise
        what = identity.describe()
        try:
            place = save()
        except Exception as error:  # disks, Orbax and what a run finds wrong with its state
            told = f"{what}; its state could not be saved: {first_line(error)}"
            raise FolderMoved(told) from error
        again = shlex.quote(f"--workdir={place}")
        raise FolderMoved(
            f"{what}; step {step} is saved in {place}\n  HINT: {again} resumes from it"
        ) from None
