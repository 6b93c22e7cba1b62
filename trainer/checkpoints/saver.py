"""What a run saves and restores: its latest checkpoints, the best one and in-memory checkpoints.

One process writes and reads the disk. All processes agree on the state to resume from; the process
that reads it broadcasts it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import platform
import time
import uuid
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from etils import epath

from trainer.checkpoints.folder import CheckpointFolder
from trainer.checkpoints.in_memory import InMemoryCheckpoints
from trainer.checkpoints.manifest import Damaged
from trainer.checkpoints.restorer import Restored, Restorer, quarantine
from trainer.checkpoints.writer import Save, Writer
from trainer.config.settings import Settings
from trainer.console import say, warn
from trainer.data.fingerprint import describe_change
from trainer.errors import FolderMoved, NonFiniteState, PeerFailed, SavesFailed, UserError
from trainer.lift.lift import Lift
from trainer.lift.replicas import check_replicas
from trainer.state.checksums import checksum_of
from trainer.state.finite import find_unusable
from trainer.state.train_state import TrainState
from trainer.workdir.identity import Identity
from trainer.workdir.paths import exists
from trainer.workdir.patience import patiently
from trainer.workdir.workdir import CONFIG_FILE, Workdir

Meta = Mapping[str, Any]

_SETTLE_SECS = 0.5


class Saver:
    """Saves and restores the states of a run. Every process of the run has one.

    Attributes:
        run: the id of the steps the run is on; in-memory checkpoints carry it.
        identity: the claimed folder, in the process that writes to it; None in the others.
        data: the fingerprints of the data, which every checkpoint carries; empty: unknown.
        best_value: the best value of the ranking metric so far, or None.
        best_step: the step of that value, or None.
    """

    def __init__(self, workdir: Workdir, settings: Settings, lift: Lift) -> None:
        self._workdir = workdir
        self._settings = settings
        self._lift = lift
        self.identity: Identity | None = None
        self._latest = CheckpointFolder(
            workdir.checkpoints, settings.checkpoint_keep, self._check_folder, self._reach
        )
        self._best = CheckpointFolder(workdir.best, 1, self._check_folder, self._reach)
        self._writer = Writer(settings.max_failures)
        self._in_memory = self._make_in_memory()
        self._saves_in_memory = self._is_first_of_host()
        self._saved_step: int | None = None
        self.run = ""
        self.data: Mapping[str, Any] = {}
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

    def _check_folder(self) -> None:
        if self.identity is not None:
            self.identity.check()

    def _reach(self, path: epath.Path) -> epath.Path:
        return path if self.identity is None else self.identity.reach(path)

    @property
    def _run_id(self) -> str:
        return self.identity.run_id if self.identity is not None else ""

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
            StorageFailed: the disk or the object store has not answered for minutes.
            UserError: the checkpoint has other leaves or was trained on other data, and
                `checkpoint.allow` does not permit that.
        """
        if self._lift.writes:
            for folder in (self._latest, self._best):
                cleared = patiently(folder.path, folder.sweep)
                if cleared:
                    say(f"cleared in {folder.path}: {', '.join(cleared)}")
        restorer = Restorer(
            self._latest,
            self._best,
            self._in_memory,
            self._lift,
            self.run,
            self._run_id,
            self._settings.allow,
            self.data,
        )
        restored = restorer.restore(abstract, fresh)
        if restored is not None and not restored.in_memory:
            self._saved_step = self._writer.last_saved = restored.step
            if self._in_memory is not None:
                self._in_memory.remove()  # older, or of a run that has been abandoned
        has_changed |= restored is not None and bool(restored.other_data)
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
        saved_meta = restored.meta if restored else {"best": None}
        known = saved_meta["best"]
        if known is not None and (known["metric"] != metric or self.has_other_examples(saved_meta)):
            known = None
        for step in patiently(self._best.path, self._best.steps):
            place = self._best.path / str(step)
            try:
                listed = patiently(place, lambda: self._best.check(step))  # noqa: B023
                listed.check_run_id(self._run_id)
            except Damaged as damage:
                warn(f"the best state, step {step}, cannot be used: {damage}")
                quarantine(self._best, step, str(damage))
                continue
            meta = listed.meta
            found = meta["best"]
            if self.has_other_examples(meta):
                quarantine(self._best, step, "ranked on other held-out examples")
            elif step > restored_step and has_changed:
                quarantine(self._best, step, "from another config or other data")
            elif found["metric"] != metric:
                quarantine(self._best, step, f"ranked by {found['metric']}")
            elif step <= restored_step:
                known = found
            # A later step stays: the run reaches it again.
        if known is not None and not self._best.steps():
            warn(f"the best state, step {known['step']}, is gone from {self._best.path}")
            known = None
        return (None, None) if known is None else (known["value"], known["step"])

    def has_other_examples(self, meta: Meta) -> bool:
        """Whether a saved state was evaluated on other held-out examples than this start has."""
        before = meta.get("data")
        if not before or not self.data:
            return False
        return bool(describe_change(before.get("eval"), self.data.get("eval")))

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
        return {"run": self.run, "run_id": self._run_id, "best": best, "data": self.data}

    def _submit(self, folder: CheckpointFolder, step: int, state: TrainState, meta: Meta) -> None:
        self._check_folder()
        report = check_replicas(self._lift, state)
        if report.unusable:
            raise NonFiniteState(step, report.unusable)
        arrays: dict[str, Any] = {}
        if self._lift.writes or not self._lift.holds_full_state:
            arrays = self._lift.host_copy(state)
        if self._lift.writes:
            is_latest = folder is self._latest
            self._writer.submit(Save(folder, step, arrays, report.checksums, meta, is_latest))

    def rescue(self, step: int, state: TrainState, meta: Meta) -> epath.Path:
        """Saves a state after the run's folder was renamed, removed or emptied; returns where.

        That is the folder itself, under its new name, or a new one beside the place of one that is
        gone. Only the process that writes calls this.

        Args:
            step: the step of the state.
            state: on the devices.
            meta: what a resume needs besides the state, as JSON.

        Raises:
            Exception: of many types, if it cannot be saved.
        """
        assert self.identity is not None
        if not self._lift.holds_full_state:
            raise FolderMoved("the state is sharded over processes")
        arrays = self._lift.host_copy(state)
        bad = list(find_unusable(arrays))
        if bad:
            raise NonFiniteState(step, bad)
        time.sleep(_SETTLE_SECS)  # somebody may be removing it at this moment
        found = self.identity.place()
        if found is None:
            place = _free_name_beside(self._workdir.path)
            place.mkdir()
        else:
            place = epath.Path(found)
        if not exists(place / CONFIG_FILE):
            moved = dataclasses.replace(self._workdir, path=place, exists=False)
            moved.record(self.run, self._run_id)
        checksums = {name: checksum_of(array) for name, array in arrays.items()}
        latest = CheckpointFolder(place / "checkpoints", self._settings.checkpoint_keep)
        best = CheckpointFolder(place / "best", 1)
        for lost in self._writer.give_up():
            if lost.folder is self._best:
                dataclasses.replace(lost, folder=best).run()
        if self.best_step == step:
            Save(best, step, arrays, checksums, self._own_meta()).run()
        Save(latest, step, arrays, checksums, {**meta, **self._own_meta()}).run()
        if self._in_memory is not None and not exists(self._workdir.path):
            self._in_memory.remove()
        return place

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
            # A new id, so that other hosts' are not offered.
            with contextlib.suppress(UserError, FolderMoved):
                if self.identity is not None:
                    self.identity.check()
                    self._workdir.record(uuid.uuid4().hex, self.identity.run_id)
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


def _free_name_beside(path: epath.Path) -> epath.Path:
    place, number = path.parent / f"{path.name}-saved", 1
    while exists(place):
        number += 1
        place = path.parent / f"{path.name}-saved{number}"
    return place
