"""When a run saves: the latest states to go on from, and the best one to keep."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trainer.console import say
from trainer.lift import Lift
from trainer.settings import Settings
from trainer.state import TrainState
from trainer.workdir import Workdir

if TYPE_CHECKING:
    from trainer.checkpoint import Checkpoints, Restored


class Saver:
    """The two checkpoint folders of a run. Orbax is imported at the first use of either.

    Attributes:
        best_value: the best value of the metric so far, or None.
        best_step: the step it was seen at, or None.
    """

    def __init__(self, workdir: Workdir, settings: Settings, lift: Lift) -> None:
        self._workdir = workdir
        self._settings = settings
        self._lift = lift
        self._latest: Checkpoints | None = None
        self._best: Checkpoints | None = None
        self._saved_step: int | None = None
        self.best_value: float | None = None
        self.best_step: int | None = None

    def restore(self, abstract: TrainState) -> Restored | None:
        """The newest checkpoint that reads back whole, or None in a workdir that has none."""
        restored = None
        if _has_any(self._workdir.checkpoints):
            restored = self._open_latest().restore_latest(abstract)
        if restored is not None:
            self._saved_step = restored.meta["step"]
        self._restore_best(restored.meta["step"] if restored else 0)
        return restored

    def _restore_best(self, restored_step: int) -> None:
        """Takes up the best so far; one past the restored step, or by another metric, is over."""
        meta = self._open_best().newest_meta() if _has_any(self._workdir.best) else None
        if not any(self._lift.gather(int(meta is not None))):
            return
        is_read = meta is not None and "best_value" in meta
        if not all(self._lift.gather(int(is_read))):  # by one process: then by none
            meta = {"step": meta["step"] if meta else 0}
        assert meta is not None
        if meta["step"] > restored_step or meta.get("best_metric") != self._settings.best_metric:
            self._open_best().move_aside(meta["step"])
        else:
            self.best_value, self.best_step = meta["best_value"], meta["step"]

    def save(self, step: int, state: TrainState, meta: Mapping[str, Any]) -> None:
        """Starts to save a state to go on from, unless that step is saved already.

        Args:
            step: of the state.
            state: on the devices.
            meta: what else a resume needs, as JSON.
        """
        if step != self._saved_step:
            self._let_finish(self._best)
            self._open_latest().save(step, state, meta)
            self._saved_step = step

    def save_if_best(self, step: int, state: TrainState, metrics: dict[str, float]) -> None:
        """Starts to save a state if the metric that ranks is the best so far."""
        name = self._settings.best_metric
        value = metrics[name]
        if not math.isfinite(value):
            return
        sign = 1 if self._settings.best_mode == "max" else -1
        if self.best_value is None or sign * value > sign * self.best_value:
            meta: dict[str, Any] = {"best_metric": name, "best_value": value}
            self._let_finish(self._latest)
            self._open_best().save(step, state, meta)
            self.best_value, self.best_step = value, step

    def close(self) -> None:
        """Waits until everything is on disk.

        Both folders are waited for even where one fails; the first failure is raised.
        """
        failures = []
        for checkpoints in (self._latest, self._best):
            try:
                if checkpoints is not None:
                    checkpoints.close()
            except Exception as error:
                failures.append(error)
        self._latest = self._best = None
        if failures:
            say("a checkpoint could not be saved")
            raise failures[0]

    def _let_finish(self, other: Checkpoints | None) -> None:
        """Keeps saves to the two folders from overlapping where several processes take part.

        Orbax names the barrier at the end of a save after the newest save that its process has
        begun, in either folder: overlapping saves meet at barriers of different names, and hang.
        """
        if other is not None and self._lift.num_processes > 1:
            other.wait()

    def _open_latest(self) -> Checkpoints:
        if self._latest is None:
            self._latest = self._open(self._workdir.checkpoints, self._settings.checkpoint_keep)
        return self._latest

    def _open_best(self) -> Checkpoints:
        if self._best is None:
            self._best = self._open(self._workdir.best, 1)
        return self._best

    def _open(self, directory: Any, keep: int) -> Checkpoints:
        from trainer.checkpoint import Checkpoints

        return Checkpoints(directory, keep, self._lift)


def _has_any(directory: Any) -> bool:
    return directory.exists() and any(path.name.isdigit() for path in directory.iterdir())
