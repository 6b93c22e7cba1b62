"""When a run saves and what it goes on from: the latest states, the best one, copies in memory.

One process writes and reads what is on disk. All processes agree on which state they go on from:
whoever can read it gives it to the others.
"""

from __future__ import annotations

import contextlib
import json
import math
import platform
import time
import uuid
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trainer.checkpoints.folder import CheckpointFolder
from trainer.checkpoints.in_memory import InMemoryCheckpoints
from trainer.checkpoints.manifest import Damaged
from trainer.checkpoints.restorer import Restored, Restorer, quarantine
from trainer.checkpoints.writer import Save, Writer
from trainer.config.settings import Settings
from trainer.console import say, warn
from trainer.errors import (
    NonFiniteState,
    PeerFailed,
    SavesFailed,
    UserError,
)
from trainer.lift.lift import Lift
from trainer.lift.replicas import check_replicas
from trainer.state.train_state import TrainState
from trainer.workdir.workdir import Workdir

Meta = Mapping[str, Any]


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
        self._fast = self._make_in_memory()
        self._copies_here = self._is_first_of_host()
        self._saved_step: int | None = None
        self.run = ""
        self.best_value: float | None = None
        self.best_step: int | None = None

    def _make_in_memory(self) -> InMemoryCheckpoints | None:
        settings = self._settings
        root = Path(settings.fast_dir)
        if not settings.fast_every_secs or not root.is_dir():
            return None
        if not self._lift.holds_full_state:  # every host copies when it likes, and none has it all
            return None
        return InMemoryCheckpoints(
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
        restorer = Restorer(
            self._latest, self._best, self._fast, self._lift, self.run, self._settings.allow
        )
        restored = restorer.restore(abstract, fresh)
        if restored is not None and not restored.in_memory:
            self._saved_step = self._writer.last_saved = restored.step
            if self._fast is not None:
                self._fast.remove()  # what is there is of no use any more
        self._restore_best(restored, has_changed)
        return restored

    def _restore_best(self, restored: Restored | None, has_changed: bool) -> None:
        """Takes up the best so far."""
        value, step = None, None
        if self._lift.writes:
            value, step = self._best_of_before(restored, has_changed)
        self.best_value, self.best_step = json.loads(
            self._lift.broadcast_text(json.dumps([value, step]))
        )

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
                quarantine(self._best, step, str(damage))
                continue
            is_abandoned = step > restored_step and has_changed
            if found["metric"] != metric or is_abandoned:
                why = "of a run with another config" if is_abandoned else f"by {found['metric']}"
                quarantine(self._best, step, why)
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
        examined = check_replicas(self._lift, state)
        if examined.unusable:
            raise NonFiniteState(step, examined.unusable)
        arrays: dict[str, Any] = {}
        if self._lift.writes or not self._lift.holds_full_state:
            arrays = self._lift.host_copy(state)
        if self._lift.writes:
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

    def discard_in_memory(self) -> None:
        """Gives up all copies: devices differ, and nobody has looked since they last agreed.

        Hides nothing of why, and touches no folder that is not this run's yet.
        """
        if self.run and self._lift.writes:
            with contextlib.suppress(UserError):  # those on other hosts are of another run now
                self._workdir.record(uuid.uuid4().hex)
        if self._fast is not None:
            self._fast.remove()

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
