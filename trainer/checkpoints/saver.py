"""What a run saves and restores: its latest checkpoints, the best one and in-memory checkpoints.

One process writes and reads the disk. All processes agree on the state to resume from; the process
that reads it broadcasts it.
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
from trainer.errors import NonFiniteState, PeerFailed, SavesFailed, UserError
from trainer.lift.lift import Lift
from trainer.lift.replicas import check_replicas
from trainer.state.train_state import TrainState
from trainer.workdir.workdir import Workdir

Meta = Mapping[str, Any]


class Saver:
    """Saves and restores the states of a run. Every process of the run has one.

    Attributes:
        run: the id of the run; in-memory checkpoints carry it.
        best_value: the best value of the ranking metric so far, or None.
        best_step: the step of that value, or None.
    """

    def __init__(self, workdir: Workdir, settings: Settings, lift: Lift) -> None:
        self._workdir = workdir
        self._settings = settings
        self._lift = lift
        self._latest = CheckpointFolder(workdir.checkpoints, settings.checkpoint_keep)
        self._best = CheckpointFolder(workdir.best, 1)
        self._writer = Writer(settings.max_failures)
        self._in_memory = self._make_in_memory()
        self._saves_in_memory = self._is_first_of_host()
        self._saved_step: int | None = None
        self.run = ""
        self.best_value: float | None = None
        self.best_step: int | None = None

    def _make_in_memory(self) -> InMemoryCheckpoints | None:
        settings = self._settings
        root = Path(settings.fast_dir)
        if not settings.fast_every_secs or not root.is_dir():
            return None
        # Hosts save at times of their own, and gathering a sharded state takes all of them.
        if not self._lift.holds_full_state:
            return None
        return InMemoryCheckpoints(
            self._workdir.path, root, settings.fast_every_secs, settings.fast_max_gb * 1e9
        )

    def _is_first_of_host(self) -> bool:
        """Whether this process has the lowest rank of those that share its memory file system."""
        if self._in_memory is None:
            name = ""
        else:
            boot = Path("/proc/sys/kernel/random/boot_id")
            started = boot.read_text() if boot.exists() else ""
            device = Path(self._settings.fast_dir).stat().st_dev
            name = f"{platform.node()} {started} {device}"
        hosts = self._lift.gather(zlib.crc32(name.encode()) >> 1)
        return bool(hosts.index(hosts[self._lift.process]) == self._lift.process)

    # Restore

    def restore(
        self, abstract: TrainState, fresh: Callable[[], Any], *, has_changed: bool
    ) -> Restored | None:
        """Restores the newest intact state, on disk or in memory; None if the run never saved one.

        Once a state is found, damaged checkpoints on disk are reported and moved into
        `quarantine/`; nothing is deleted. All processes call this at the same point.

        Args:
            abstract: the shapes and dtypes of a state.
            fresh: makes a new state, for leaves that were not saved.
            has_changed: whether the config differs from the run's, as `checkpoint.allow` permits.

        Raises:
            CheckpointsUnreadable: the run saved checkpoints and none is intact.
            StateUnreadable: a checkpoint is intact but Orbax cannot read it.
            UserError: the checkpoint has other leaves, and `checkpoint.allow` does not permit that.
        """
        if self._lift.writes:
            for folder in (self._latest, self._best):
                cleared = folder.sweep()
                if cleared:
                    say(f"cleared in {folder.path}: {', '.join(cleared)}")
        restorer = Restorer(
            self._latest, self._best, self._in_memory, self._lift, self.run, self._settings.allow
        )
        restored = restorer.restore(abstract, fresh)
        if restored is not None and not restored.in_memory:
            self._saved_step = self._writer.last_saved = restored.step
            if self._in_memory is not None:
                self._in_memory.remove()  # older, or of a run that has been abandoned
        self._restore_best(restored, has_changed)
        return restored

    def _restore_best(self, restored: Restored | None, has_changed: bool) -> None:
        """Sets the best value and step, the same in all processes."""
        value, step = None, None
        if self._lift.writes:
            value, step = self._find_best(restored, has_changed)
        self.best_value, self.best_step = json.loads(
            self._lift.broadcast_text(json.dumps([value, step]))
        )

    def _find_best(
        self, restored: Restored | None, has_changed: bool
    ) -> tuple[float | None, int | None]:
        """The best value and step up to the restored step; quarantines what does not belong."""
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
                why = "from another config" if is_abandoned else f"ranked by {found['metric']}"
                quarantine(self._best, step, why)
            elif step <= restored_step:
                known = found
            # A later step stays: the run reaches it again.
        if known is not None and not self._best.steps():
            warn(f"the best state, step {known['step']}, is gone from {self._best.path}")
            known = None
        return (None, None) if known is None else (known["value"], known["step"])

    # Save

    def is_unsaved(self, step: int) -> bool:
        """Whether no save of a step was started, and the step was not restored from disk."""
        return step != self._saved_step

    def save(self, step: int, state: TrainState, meta: Meta) -> None:
        """Starts to save a state to resume from, unless that step is saved already.

        All processes call this at the same point. The state is copied to the host and may be
        donated afterwards.

        Args:
            step: the step of the state.
            state: on the devices.
            meta: what a resume needs besides the state, as JSON.

        Raises:
            ReplicasDiffer: devices hold different states; nothing is written.
            NonFiniteState: a run could not resume from the state; nothing is written.
            SavesFailed: too many saves in a row have failed.
        """
        if step != self._saved_step:
            self._submit(self._latest, step, state, {**meta, **self._own_meta()})
            self._saved_step = step

    def save_if_best(self, step: int, state: TrainState, metrics: Mapping[str, float]) -> None:
        """Starts to save a state if `checkpoint.best_metric` is better than ever before."""
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
        report = check_replicas(self._lift, state)
        if report.unusable:
            raise NonFiniteState(step, report.unusable)
        arrays: dict[str, Any] = {}
        if self._lift.writes or not self._lift.holds_full_state:
            arrays = self._lift.host_copy(state)
        if self._lift.writes:
            is_latest = folder is self._latest
            self._writer.submit(Save(folder, step, arrays, report.checksums, meta, is_latest))

    def check(self) -> None:
        """Raises SavesFailed if too many saves in a row have failed; does not wait."""
        self._writer.check()

    @property
    def last_saved(self) -> int | None:
        """The step of the newest save to disk that succeeded, or of the state restored from it."""
        return self._writer.last_saved

    @property
    def last_good(self) -> str:
        """The newest checkpoint on disk, for a message."""
        steps = self._latest.steps()
        return f"step {steps[-1]}, in {self._latest.path}" if steps else "none yet"

    @property
    def in_memory_is_due(self) -> bool:
        """Whether this host should save an in-memory checkpoint; every host decides for itself."""
        return self._in_memory is not None and self._saves_in_memory and self._in_memory.is_due

    def save_in_memory(self, step: int, state: TrainState, meta: Meta, began: float) -> None:
        """Saves an in-memory checkpoint on this host. Call it only if `in_memory_is_due`.

        Args:
            step: the step of the state.
            state: on the devices.
            meta: what a resume needs besides the state, as JSON.
            began: the `time.monotonic()` at which the devices became idle for it.
        """
        assert self._in_memory is not None
        arrays = self._lift.host_copy(state)
        blocked = time.monotonic() - began
        self._in_memory.save(step, {**meta, **self._own_meta()}, arrays, blocked)

    def discard_in_memory(self) -> None:
        """Discards all in-memory checkpoints: they may have been taken after replicas diverged.

        Raises nothing, so that it cannot hide the error it follows, and leaves a folder that the
        run has not claimed untouched.
        """
        if self.run and self._lift.writes:
            with contextlib.suppress(UserError):  # a new id, so that other hosts' are not offered
                self._workdir.record(uuid.uuid4().hex)
        if self._in_memory is not None:
            self._in_memory.remove()

    def finish(self) -> None:
        """Waits in all processes until everything is on disk, and frees in-memory checkpoints.

        Raises:
            SavesFailed: a save failed, after several tries.
            PeerFailed: the same, in the processes that do not write.
        """
        failure: SavesFailed | None = None
        try:
            self._writer.finish()
        except SavesFailed as error:
            failure = error
        if not all(self._lift.gather(int(failure is None))):
            raise failure or PeerFailed("process 0 could not save")
        self.close()
        if self._in_memory is not None and self._saves_in_memory:
            self._in_memory.remove()

    def close(self) -> None:
        """Waits for saves in progress, and gives pending ones one more try."""
        self._writer.close()
        if self._in_memory is not None:
            self._in_memory.wait()
