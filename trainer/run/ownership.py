"""Ownership of the run's folder: one process locks and writes it, and all agree on it."""

from __future__ import annotations

import contextlib
import uuid
import zlib

import jax
import numpy as np
from etils import epath

from trainer.checkpoints.differences import how_leaves_differ, show
from trainer.checkpoints.folder import CheckpointFolder
from trainer.checkpoints.manifest import Damaged
from trainer.config.config_json import config_to_json
from trainer.config.settings import Settings
from trainer.errors import UserError
from trainer.lift.lift import Lift
from trainer.state.leaves import name_leaves
from trainer.step.job import Job, make_init
from trainer.version import __version__
from trainer.workdir import lock
from trainer.workdir.identity import Identity
from trainer.workdir.patience import patiently
from trainer.workdir.workdir import CONFIG_FILE, Workdir

_NOT_SHARED = "--workdir must be a folder that all hosts share"


class Ownership:
    """The run's folder as seen by all processes, which call every method at the same point.

    Args:
        folder: as this process found it.
        lift: the processes.
        local_dir: where the lock of a remote folder is.

    Attributes:
        is_new: the folder is not recorded as this run's yet.
        identity: the claimed folder, in the process that writes; None before, and in the others.
    """

    def __init__(self, folder: Workdir, lift: Lift, local_dir: str | None) -> None:
        self._folder = folder
        self._lift = lift
        self._local_dir = local_dir
        self.is_new = not folder.exists
        self.identity: Identity | None = None

    def agree(self) -> None:
        """Raises a UserError if processes differ in config or code, or in what they see.

        Launchers compare more before jax starts; this check also works without one.
        """
        what = {
            "another config": config_to_json(self._folder.config),
            "another version of podlift, jax or numpy": (
                f"{__version__} {jax.__version__} {np.__version__}"
            ),
        }
        for name, text in what.items():
            sums = self._lift.gather(zlib.crc32(text.encode()) >> 1)
            odd = [str(rank) for rank, number in enumerate(sums) if number != sums[0]]
            if odd:
                raise UserError(
                    f"process{'es' * (len(odd) > 1)} {', '.join(odd)} had {name} than process 0",
                    "start the same command, from the same code, for every process",
                )
        seen = self._lift.gather(int(self._folder.exists))
        if len(set(seen)) > 1:
            raise UserError(
                f"process {seen.index(1)} finds a run in {self._folder.path} and process "
                f"{seen.index(0)} does not",
                _NOT_SHARED,
            )

    def claim(self) -> tuple[str, Identity | None]:
        """Locks the folder; returns the id of the steps of its run, or a new one, and `identity`.

        Raises:
            UserError: another job holds the lock, or began a run in the folder meanwhile.
        """
        if self._lift.writes:
            self._folder.claim(self._local_dir)
            if not self._folder.exists and self._folder.is_recorded():
                raise UserError(
                    f"another job has begun a run in {self._folder.path} meanwhile",
                    "start again to resume it, or name another --workdir",
                )
            path, run_id = self._folder.path, self._find_run_id()
            self.identity = patiently(path, lambda: Identity(path, run_id, CONFIG_FILE))
        run = self._lift.broadcast_text(self._folder.lineage() if self._lift.writes else "")
        return run, self.identity

    def _find_run_id(self) -> str:
        """That of `env.json`, else of the newest checkpoint that has one, else a new one."""
        found = self._folder.run_id()
        if not found and self._folder.exists:
            places = (self._folder.checkpoints, self._folder.best)
            found = next(filter(None, map(_run_id_in, places)), "")
        return found or uuid.uuid4().hex

    def close(self) -> None:
        """Unlocks the folder."""
        if self.identity is not None:
            self.identity.close()
        lock.release(self._folder.path)

    def new_run_id(self) -> str:
        """A new id, which invalidates the in-memory checkpoints of all hosts."""
        return self._lift.broadcast_text(uuid.uuid4().hex)

    def record(self, run: str) -> None:
        """Writes `config.json` and `env.json`, and checks that all processes see them.

        Args:
            run: the id of the run.
        """
        self.is_new = False
        if self._lift.writes:
            assert self.identity is not None
            self._folder.record(run, self.identity.run_id)
        self._lift.gather(0)
        seen = self._lift.gather(int(self._folder.is_recorded(patience=10.0)))
        if not all(seen):
            raise UserError(
                f"process {seen.index(0)} does not see what process 0 wrote to {self._folder.path}",
                _NOT_SHARED,
            )


def _run_id_in(place: epath.Path) -> str:
    """The run id of the newest checkpoint that has one: an earlier podlift saved it without."""
    folder = CheckpointFolder(place, 1)
    for step in reversed(patiently(place, folder.steps)):
        with contextlib.suppress(Damaged):
            listed = patiently(place / str(step), lambda: folder.check(step))  # noqa: B023
            if listed.run_id:
                return listed.run_id
    return ""


def refuse_changes(settings: Settings, folder: Workdir, job: Job) -> None:
    """Refuses a config other than that of the run in the folder.

    Raises:
        UserError: with the keys of the config and the leaves of the state that differ.
    """
    found = how_leaves_differ(
        CheckpointFolder(folder.checkpoints, settings.checkpoint_keep),
        lambda: name_leaves(jax.eval_shape(make_init(job, settings.seed))),
    )
    folder.refuse_changes(show(found) if found else "", sorted({d.kind for d in found}))
