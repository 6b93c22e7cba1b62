"""Finds and restores the newest intact state, on disk or in memory.

Process 0 reads the disk, and a process of its host reads an in-memory checkpoint; the reader
broadcasts the state. All processes must take the same path through this file, because it is full of
collectives.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.checkpoints import arrays as arrays_of
from trainer.checkpoints import differences
from trainer.checkpoints.folder import QUARANTINE, CheckpointFolder
from trainer.checkpoints.in_memory import SLOTS, InMemoryCheckpoints
from trainer.checkpoints.manifest import Damaged, Manifest
from trainer.console import say, warn
from trainer.errors import (
    CheckpointsUnreadable,
    StateUnreadable,
    StorageFailed,
    UserError,
    first_line,
)
from trainer.lift.lift import Lift
from trainer.lift.replicas import check_replicas
from trainer.state.leaves import name_leaves, with_leaves
from trainer.state.train_state import TrainState
from trainer.workdir.patience import patiently


@dataclass(frozen=True)
class Restored:
    """A restored state.

    Attributes:
        state: on the devices.
        step: the step of the state.
        meta: the JSON that was saved with it.
        in_memory: whether it comes from an in-memory checkpoint.
        other_data: how the data differ from those it was trained on, as `allow` permits.
    """

    state: TrainState
    step: int
    meta: Mapping[str, Any]
    in_memory: bool
    other_data: str = ""


@dataclass(frozen=True)
class _Candidate:
    """A state that a run may resume from.

    Attributes:
        step: the step of the state.
        source: the process that can read it.
        in_memory: whether it is in the memory of that process's host, not on disk.
    """

    step: int
    source: int
    in_memory: bool


class _BestIsLost(Exception):
    """An in-memory checkpoint refers to a best state that was not saved."""


class Restorer:
    """Finds a state to resume from.

    Args:
        latest: the checkpoints on disk.
        best: the best state on disk.
        in_memory: the in-memory checkpoints of this host, if enabled.
        lift: for collectives among the processes.
        run: the id of the steps the run is on; in-memory checkpoints with another are ignored.
        run_id: the id of the run, in the process that reads the disk; checkpoints of another run
            are not restored.
        allow: the kinds of difference to the saved state that are permitted.
        data: the fingerprints of the data of this start.
    """

    def __init__(
        self,
        latest: CheckpointFolder,
        best: CheckpointFolder,
        in_memory: InMemoryCheckpoints | None,
        lift: Lift,
        run: str,
        run_id: str,
        allow: Sequence[str],
        data: Mapping[str, Any],
    ) -> None:
        self._latest = latest
        self._best = best
        self._in_memory = in_memory
        self._lift = lift
        self._run = run
        self._run_id = run_id
        self._allow = allow
        self._data = data

    def restore(self, abstract: TrainState, fresh: Callable[[], Any]) -> Restored | None:
        """Restores the newest intact state; None if the run has never saved one.

        Once a state is found, damaged checkpoints on disk are reported and quarantined.

        Args:
            abstract: the shapes and dtypes of a state.
            fresh: makes a new state, for leaves that were not saved.

        Raises:
            CheckpointsUnreadable: the run saved checkpoints and none is intact.
            StateUnreadable: a checkpoint is intact but Orbax cannot read it.
            StorageFailed: the disk or the object store has not answered for minutes.
            UserError: the checkpoint has other leaves or was trained on other data, and `allow`
                does not permit that.
        """
        waiting = self._candidates()
        last_resort: list[_Candidate] = []
        damaged: list[tuple[int, str]] = []  # on disk
        restored = None
        while restored is None and (waiting or last_resort):
            at_last = not waiting
            candidate = (waiting or last_resort).pop(0)
            try:
                restored = self._try(candidate, abstract, fresh, at_last)
            except (Damaged, _BestIsLost) as why:
                where = "its in-memory checkpoint" if candidate.in_memory else "its checkpoint"
                if self._lift.writes:
                    warn(f"step {candidate.step} cannot be restored from {where}: {why}")
                if isinstance(why, _BestIsLost):
                    last_resort.append(candidate)
                elif not candidate.in_memory:
                    damaged.append((candidate.step, str(why)))
        if restored is None:
            self._refuse_to_start_from_scratch(damaged)
        elif self._lift.writes:
            self._warn_of_missing(restored.step)
            for step, reason in damaged:
                quarantine(self._latest, step, reason)
        return restored

    def _candidates(self) -> list[_Candidate]:
        """All states that may be restored: the newest first, and of one step the disk first."""
        here_on_disk = self._steps_of(self._latest) if self._lift.process == 0 else []
        steps = json.loads(self._lift.broadcast_text(json.dumps(here_on_disk)))
        found = [_Candidate(step, 0, False) for step in steps]
        here = [-1] * len(SLOTS)
        if self._in_memory is not None:
            for step, slot in self._in_memory.steps(self._run).items():
                here[slot] = step
        for source, steps in enumerate(self._lift.gather(np.array(here, np.int32))):
            found += [_Candidate(step, source, True) for step in steps if step >= 0]
        return sorted(found, key=lambda c: (-c.step, c.in_memory, c.source))

    def _try(
        self,
        candidate: _Candidate,
        abstract: TrainState,
        fresh: Callable[[], Any],
        at_last: bool,
    ) -> Restored:
        """Restores a candidate; raises the same in all processes if that fails."""
        leaves, listed = self._read_for_all(candidate, at_last)
        wanted = name_leaves(abstract)
        changed = differences.compare(listed.leaves, wanted)
        where = "memory" if candidate.in_memory else f"{self._latest.path / str(candidate.step)}"
        differences.check_allowed(changed, self._allow, where)
        other_data = differences.check_data(listed.meta.get("data"), self._data, self._allow, where)
        arrays = self._lift.broadcast_arrays(leaves, listed.leaves, candidate.source)
        adapted = differences.adapt(arrays, wanted, changed, lambda: name_leaves(fresh()))
        state = self._lift.put_state(with_leaves(abstract, adapted))
        as_saved = set(wanted) - {d.name for d in changed}
        report = check_replicas(self._lift, state)
        if report.unusable:
            what = f"{report.unusable[0]} holds a NaN or an infinity"
            if report.unusable[0] not in as_saved:
                raise UserError(f"{what} after the changes that config.checkpoint.allow permits")
            raise Damaged(what)  # no run saves such a state
        for name, checksum in report.checksums.items():
            if name in as_saved and checksum != listed.leaves[name].checksum:
                raise Damaged(f"{name} is not what was saved: its checksum differs")
        if self._lift.writes:
            source = "" if self._lift.num_processes == 1 else f" of rank {candidate.source}'s host"
            place = f"memory{source}" if candidate.in_memory else str(self._latest.path)
            say(f"restored step {candidate.step} from {place}")
            if other_data:
                warn(f"resumes with other data, as allowed: {other_data}")
        return Restored(state, candidate.step, listed.meta, candidate.in_memory, other_data)

    def _read_for_all(
        self, candidate: _Candidate, at_last: bool
    ) -> tuple[dict[str, np.ndarray] | None, Manifest]:
        """The arrays, in the process that can read them, and the manifest, in all."""
        leaves, kind, text = None, "", ""
        place = self._latest.path / str(candidate.step)
        if self._lift.process == candidate.source:
            try:
                if candidate.in_memory:
                    leaves, listed = self._read(candidate, at_last)
                else:
                    leaves, listed = patiently(place, lambda: self._read(candidate, at_last))
                kind, text = "intact", listed.to_text()
            except _BestIsLost as error:
                kind, text = "best is lost", str(error)
            except (StorageFailed, UserError) as error:
                kind, text = type(error).__name__, str(error)
            except Exception as error:  # Orbax raises many types
                is_damaged = candidate.in_memory or isinstance(error, Damaged)
                kind, text = "damaged" if is_damaged else "unreadable", first_line(error)
        kind, text = json.loads(
            self._lift.broadcast_text(json.dumps([kind, text]), candidate.source)
        )
        if kind == "best is lost":
            raise _BestIsLost(text)
        if kind == "damaged":
            raise Damaged(text)
        if kind == "StorageFailed":
            raise StorageFailed(text)
        if kind == "UserError":
            raise UserError(text)
        if kind == "unreadable":
            raise StateUnreadable(
                f"step {candidate.step} in {self._latest.path} cannot be read, although its files "
                f"are intact: {text}"
            )
        return leaves, Manifest.from_text(text)

    def _read(self, candidate: _Candidate, at_last: bool) -> tuple[dict[str, np.ndarray], Manifest]:
        if not candidate.in_memory:
            with self._latest.opened(candidate.step) as (place, listed):
                listed.check_run_id(self._run_id)
                return arrays_of.read(place, listed.leaves), listed
        assert self._in_memory is not None
        arrays, listed = self._in_memory.read(self._in_memory.steps(self._run)[candidate.step])
        best = listed.meta["best"]
        newest_best = max(self._steps_of(self._best), default=-1)
        if best is not None and newest_best < best["step"] and not at_last:
            # A crash interrupted that save. From an earlier state the run reaches it again.
            raise _BestIsLost(f"its best state, step {best['step']}, is not in best/")
        return arrays, listed

    @staticmethod
    def _steps_of(folder: CheckpointFolder) -> list[int]:
        return patiently(folder.path, folder.steps)

    def _refuse_to_start_from_scratch(self, damaged: Sequence[tuple[int, str]]) -> None:
        has_history = self._lift.process == 0 and patiently(
            self._latest.path, self._latest.has_history
        )
        if not self._lift.gather(int(has_history))[0]:
            return
        folder = self._latest.path
        reasons = "".join(f"\n  {step}: {why}" for step, why in damaged[:5])
        what = (
            f"none of the {len(damaged)} checkpoints in {folder} is intact:{reasons}"
            if damaged
            else f"the checkpoints in {folder} are gone"
        )
        raise CheckpointsUnreadable(
            what,
            f"restore the files, look into {folder / QUARANTINE}, or try "
            f"trainer.load({str(folder.parent)!r}, best=True) for the best state. To start from "
            "scratch, name another --workdir; nothing was deleted",
        )

    def _warn_of_missing(self, restored_step: int) -> None:
        newest = patiently(self._latest.path, self._latest.newest_known)
        steps = self._steps_of(self._latest)
        if newest is not None and newest > restored_step and newest not in steps:
            warn(f"checkpoint {newest} was saved and is gone; resuming from step {restored_step}")


def quarantine(folder: CheckpointFolder, step: int, why: str) -> None:
    """Moves a step into quarantine and prints its new place."""
    try:
        say(f"moved {folder.path / str(step)} to {folder.quarantine(step, why)}: {why}")
    except Exception as error:  # a disk, or the client of an object store
        warn(f"{folder.path / str(step)} could not be quarantined: {first_line(error)}")
