"""When a run saves and what it goes on from: the latest states, the best one, copies in memory.

One process writes and reads what is on disk. All processes agree on which state they go on from:
whoever can read it gives it to the others.
"""

from __future__ import annotations

import json
import math
import platform
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.checkpoints import arrays as arrays_of
from trainer.checkpoints import differences
from trainer.checkpoints.fast import SLOTS, FastTier
from trainer.checkpoints.folder import CheckpointFolder
from trainer.checkpoints.manifest import Damaged, Manifest
from trainer.checkpoints.writer import Save, Writer
from trainer.console import say, warn
from trainer.errors import (
    CheckpointsUnreadable,
    NonFiniteState,
    PeerFailed,
    SavesFailed,
    StateUnreadable,
    first_line,
)
from trainer.lift import Lift
from trainer.settings import Settings
from trainer.state import TrainState, name_leaves, with_leaves
from trainer.workdir import Workdir

Meta = Mapping[str, Any]


@dataclass(frozen=True)
class Restored:
    """A state read back, on the devices, and the JSON that was saved with it."""

    state: TrainState
    step: int
    meta: Meta
    in_memory: bool = False


@dataclass(frozen=True)
class _Candidate:
    """A state that a run may go on from.

    Attributes:
        step: of the state.
        source: the process that can read it.
        in_memory: whether it is a copy in that process's host's memory, not on disk.
    """

    step: int
    source: int
    in_memory: bool


class Saver:
    """All that a run keeps of its states. Every process of the run has one.

    Attributes:
        run: the id of the run, which copies in memory are marked with.
        best_value: the best value of the metric so far, or None.
        best_step: the step it was seen at, or None.
    """

    def __init__(self, workdir: Workdir, settings: Settings, lift: Lift) -> None:
        self._workdir = workdir
        self._settings = settings
        self._lift = lift
        self._latest = CheckpointFolder(workdir.checkpoints, settings.checkpoint_keep)
        self._best = CheckpointFolder(workdir.best, 1)
        self._writer = Writer(settings.max_failures)
        self._fast = self._make_fast_tier()
        self._copies_here = self._is_first_of_host()
        self._saved_step: int | None = None
        self.run = ""
        self.best_value: float | None = None
        self.best_step: int | None = None

    def _make_fast_tier(self) -> FastTier | None:
        settings = self._settings
        root = Path(settings.fast_dir)
        if not settings.fast_every_secs or not root.is_dir():
            return None
        return FastTier(
            self._workdir.path, root, settings.fast_every_secs, settings.fast_max_gb * 1e9
        )

    def _is_first_of_host(self) -> bool:
        """Whether no process of a lower rank shares this one's memory file system."""
        if self._fast is None:
            name = ""
        else:
            boot = Path("/proc/sys/kernel/random/boot_id")
            started = boot.read_text() if boot.exists() else ""
            device = Path(self._settings.fast_dir).stat().st_dev
            name = f"{platform.node()} {started} {device}"
        hosts = self._lift.gather(zlib.crc32(name.encode()) >> 1)
        return bool(hosts.index(hosts[self._lift.process]) == self._lift.process)

    # What to go on from

    def restore(
        self, abstract: TrainState, fresh: Callable[[], Any], *, has_changed: bool
    ) -> Restored | None:
        """The newest state that is whole, on disk or in memory; None if the run never saved one.

        What is damaged on disk is told and moved into `quarantine/`, once something else was
        found; nothing is deleted.

        Args:
            abstract: the shapes and dtypes of a state.
            fresh: makes a new state, for leaves that were not saved.
            has_changed: whether the config is another one than before, as allowed.

        Raises:
            CheckpointsUnreadable: there were checkpoints, and none is whole.
            UserError: what was saved has other leaves, and that was not allowed.
        """
        if self._lift.writes:
            for folder in (self._latest, self._best):
                cleared = folder.sweep()
                if cleared:
                    say(f"cleared in {folder.path}: {', '.join(cleared)}")
        failures: list[tuple[_Candidate, str]] = []
        restored = None
        candidates = self._candidates()
        # Copies come first as they are; at last also those that know of a best state that is lost.
        tries = [(candidate, False) for candidate in candidates]
        tries += [(candidate, True) for candidate in candidates if candidate.in_memory]
        for candidate, at_last in tries:
            restored, why = self._try(candidate, abstract, fresh, at_last)
            if restored is not None:
                break
            where = "its copy in memory" if candidate.in_memory else "the checkpoint"
            if self._lift.writes and not at_last:
                warn(f"step {candidate.step} cannot be restored from {where}: {why}")
            failures.append((candidate, why))
        on_disk = [(c.step, why) for c, why in failures if not c.in_memory]
        if restored is None:
            self._refuse_to_start_afresh(on_disk)
            self._restore_best(None, has_changed)
            return None
        if self._lift.writes:
            self._tell_what_is_gone(restored.step)
            for step, why in on_disk:
                _put_aside(self._latest, step, why)
        self._restore_best(restored, has_changed)
        return restored

    def _candidates(self) -> list[_Candidate]:
        """All states that may be restored, the newest first, those on disk before copies."""
        steps = json.loads(self._lift.tell(json.dumps(self._latest.steps())))
        found = [_Candidate(step, 0, False) for step in steps]
        here = [-1] * len(SLOTS)
        if self._fast is not None:
            for step, slot in self._fast.steps(self.run).items():
                here[slot] = step
        for source, copies in enumerate(self._lift.gather(np.array(here, np.int32))):
            found += [_Candidate(step, source, True) for step in copies if step >= 0]
        return sorted(found, key=lambda c: (-c.step, c.in_memory, c.source))

    def _try(
        self,
        candidate: _Candidate,
        abstract: TrainState,
        fresh: Callable[[], Any],
        at_last: bool,
    ) -> tuple[Restored | None, str]:
        """A state, or why not; the same answer in all processes."""
        leaves, answer = None, {"why": "another process reads it"}
        if self._lift.process == candidate.source:
            try:
                leaves, listed = _patiently(lambda: self._read(candidate, at_last))
                answer = {"manifest": listed.to_text()}
            except Damaged as damage:
                answer = {"why": str(damage)}
            except Exception as error:  # Orbax raises many types
                answer = {"why": first_line(error)}
                if not candidate.in_memory:
                    answer["unreadable"] = "its files are as they were written"
        answer = json.loads(self._lift.tell(json.dumps(answer), candidate.source))
        if "unreadable" in answer:
            raise StateUnreadable(
                f"step {candidate.step} in {self._latest.path} cannot be read, though "
                f"{answer['unreadable']}: {answer['why']}"
            )
        if "why" in answer:
            return None, answer["why"]
        listed = Manifest.from_text(answer["manifest"])
        wanted = name_leaves(abstract)
        changed = differences.compare(listed.leaves, wanted)
        where = "memory" if candidate.in_memory else f"{self._latest.path / str(candidate.step)}"
        differences.check_allowed(changed, self._settings.allow, where)
        leaves = self._lift.spread(leaves, listed.leaves, candidate.source)
        adapted = differences.adapt(leaves, wanted, changed, lambda: self._fresh_leaves(fresh))
        state = self._lift.put_state(with_leaves(abstract, adapted))
        as_saved = set(wanted) - {d.name for d in changed}
        for name, checksum in self._lift.examine(state).checksums.items():
            if name in as_saved and checksum != listed.leaves[name].checksum:
                return None, f"{name} is not what was saved: its checksum differs"
        if self._lift.writes:
            source = "" if self._lift.num_processes == 1 else f" of rank {candidate.source}'s host"
            place = f"memory{source}" if candidate.in_memory else str(self._latest.path)
            say(f"restored step {candidate.step} from {place}")
        if self._fast is not None and not candidate.in_memory:
            self._fast.remove()  # what is there is of no use any more
        if not candidate.in_memory:
            self._saved_step = self._writer.last_saved = candidate.step
        return Restored(state, candidate.step, listed.meta, candidate.in_memory), ""

    def _read(self, candidate: _Candidate, at_last: bool) -> tuple[dict[str, np.ndarray], Manifest]:
        if not candidate.in_memory:
            with self._latest.opened(candidate.step) as (place, listed):
                return arrays_of.read(place, listed.leaves), listed
        assert self._fast is not None
        arrays, listed = self._fast.read(self._fast.steps(self.run)[candidate.step])
        best = listed.meta["best"]
        is_lost = best is not None and max(self._best.steps(), default=-1) < best["step"]
        if is_lost and not at_last:
            # It was being saved. From an earlier state the run comes to it again.
            raise Damaged(f"the best state it knows of, step {best['step']}, is not in best/")
        return arrays, listed

    def _fresh_leaves(self, fresh: Callable[[], Any]) -> dict[str, np.ndarray]:
        return {name: np.asarray(leaf) for name, leaf in name_leaves(fresh()).items()}

    def _refuse_to_start_afresh(self, failures: Sequence[tuple[int, str]]) -> None:
        if not self._lift.gather(int(self._latest.has_history()))[0]:
            return
        folder = self._latest.path
        reasons = "".join(f"\n  {step}: {why}" for step, why in failures[:5])
        what = (
            f"none of the {len(failures)} checkpoints in {folder} is whole:{reasons}"
            if failures
            else f"{folder} has held checkpoints, and they are gone"
        )
        raise CheckpointsUnreadable(
            what,
            f"bring files back, see what lies in {folder / 'quarantine'}, or see whether "
            f"trainer.load({str(self._workdir.path)!r}, best=True) reads the best state. To start "
            "afresh, name another --workdir; nothing was deleted",
        )

    def _tell_what_is_gone(self, restored_step: int) -> None:
        newest = self._latest.newest_known()
        if newest is not None and newest > restored_step and newest not in self._latest.steps():
            warn(f"checkpoint {newest} was saved and is gone; going on from step {restored_step}")

    def _restore_best(self, restored: Restored | None, has_changed: bool) -> None:
        """Takes up the best so far."""
        value, step = None, None
        if self._lift.writes:
            value, step = self._best_of_before(restored, has_changed)
        self.best_value, self.best_step = json.loads(self._lift.tell(json.dumps([value, step])))

    def _best_of_before(
        self, restored: Restored | None, has_changed: bool
    ) -> tuple[float | None, int | None]:
        """The best value and step, as far as the run goes on from there."""
        metric, restored_step = self._settings.best_metric, restored.step if restored else 0
        known = restored.meta["best"] if restored else None
        if known is not None and known["metric"] != metric:
            known = None
        for step in self._best.steps():
            try:
                found = self._best.check(step).meta["best"]
            except Damaged as damage:
                warn(f"the best state, step {step}, is damaged: {damage}")
                _put_aside(self._best, step, str(damage))
                continue
            is_abandoned = step > restored_step and has_changed
            if found["metric"] != metric or is_abandoned:
                why = "of a run with another config" if is_abandoned else f"by {found['metric']}"
                _put_aside(self._best, step, why)
            elif step <= restored_step:
                known = found
            # else it lies ahead: the run will come to it again, and it stays until then
        if known is not None and not self._best.steps():
            warn(f"the best state, step {known['step']}, is gone from {self._best.path}")
            known = None
        return (None, None) if known is None else (known["value"], known["step"])

    # Saving

    def is_unsaved(self, step: int) -> bool:
        """Whether no checkpoint of a step was begun or restored."""
        return step != self._saved_step

    def save(self, step: int, state: TrainState, meta: Meta) -> None:
        """Starts to save a state to go on from, unless that step is saved already.

        All processes call it; the state has been copied and may be donated when it returns.

        Args:
            step: of the state.
            state: on the devices.
            meta: what else a resume needs, as JSON.

        Raises:
            ReplicasDiffer: before anything is written.
            NonFiniteState: so that what is saved is always a state to go on from.
            SavesFailed: too many saves in a row have failed.
        """
        if step != self._saved_step:
            self._submit(self._latest, step, state, {**meta, **self._own_meta()})
            self._saved_step = step

    def save_if_best(self, step: int, state: TrainState, metrics: Mapping[str, float]) -> None:
        """Starts to save a state if the metric that ranks is the best so far."""
        value = metrics[self._settings.best_metric]
        sign = 1 if self._settings.best_mode == "max" else -1
        if not math.isfinite(value):
            return
        if self.best_value is None or sign * value > sign * self.best_value:
            self.best_value, self.best_step = value, step
            self._submit(self._best, step, state, self._own_meta())

    def _own_meta(self) -> dict[str, Any]:
        best = None
        if self.best_value is not None:
            metric = self._settings.best_metric
            best = {"metric": metric, "value": self.best_value, "step": self.best_step}
        return {"run": self.run, "best": best}

    def _submit(self, folder: CheckpointFolder, step: int, state: TrainState, meta: Meta) -> None:
        examined = self._lift.examine(state)
        bad = [n for n in examined.not_finite if n.startswith(("params/", "model_state/"))]
        if bad:
            raise NonFiniteState(step, bad)
        if self._lift.writes:
            arrays = self._lift.host_copy(state)
            is_latest = folder is self._latest
            self._writer.submit(Save(folder, step, arrays, examined.checksums, meta, is_latest))

    def check(self) -> None:
        """Raises SavesFailed if too many saves in a row have failed meanwhile; costs nothing."""
        self._writer.check()

    @property
    def last_good(self) -> str:
        """The newest checkpoint on disk, for a person."""
        steps = self._latest.steps()
        return f"step {steps[-1]}, in {self._latest.path}" if steps else "none yet"

    @property
    def copy_is_due(self) -> bool:
        """Whether it is time for a copy in memory; every host decides for itself."""
        return self._fast is not None and self._copies_here and self._fast.is_due

    def copy(self, step: int, state: TrainState, meta: Meta, began: float) -> None:
        """Takes a copy into the memory of this host.

        Args:
            step: of the state.
            state: on the devices.
            meta: what else a resume needs, as JSON.
            began: when the devices ran out of work for it, by `time.monotonic`.
        """
        assert self._fast is not None
        arrays = self._lift.host_copy(state)
        blocked = time.monotonic() - began
        self._fast.copy(step, {**meta, **self._own_meta()}, arrays, blocked)

    def finish(self) -> None:
        """Waits until everything is on disk, in all processes, and gives the memory back.

        Raises:
            SavesFailed: something could not be saved, after several tries.
            PeerFailed: the same, in the processes that do not save.
        """
        failure: SavesFailed | None = None
        try:
            self._writer.finish()
        except SavesFailed as error:
            failure = error
        if not all(self._lift.gather(int(failure is None))):
            raise failure or PeerFailed("process 0 could not save")
        self.close()
        if self._fast is not None and self._copies_here:
            self._fast.remove()

    def close(self) -> None:
        """Lets saves that are under way come to an end."""
        self._writer.close()
        if self._fast is not None:
            self._fast.wait()


def _patiently(read: Callable[[], Any]) -> Any:
    """What `read` returns; what may pass, such as a disk that does not answer, is tried again."""
    for pause in (0.5, 2.0):
        try:
            return read()
        except Damaged as damage:
            if not isinstance(damage.__cause__, OSError):
                raise
        except Exception:  # noqa: S110 (told where it does not pass)
            pass
        time.sleep(pause)
    return read()


def _put_aside(folder: CheckpointFolder, step: int, why: str) -> None:
    """Moves a step into quarantine, and says where it is."""
    try:
        say(f"moved {folder.path / str(step)} to {folder.quarantine(step, why)}: {why}")
    except Exception as error:  # a disk, or the client of an object store
        warn(f"{folder.path / str(step)} could not be moved aside: {first_line(error)}")
