"""Early stopping: a run ends once its evaluations stop improving."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.config.settings import Settings


@dataclass
class EarlyStop:
    """Counts evaluations without improvement, alike in all processes, which see the same metrics.

    It also counts without `patience`, so that a resume can set it.

    Attributes:
        metric: the tag that decides, `checkpoint.best_metric`.
        mode: "min" or "max".
        patience: evaluations in a row without improvement that end the run; None: no early stop.
        min_delta: an improvement is larger than this.
        best: the best value so far, or None.
        best_step: its step, or None.
        waited: evaluations since then.
    """

    metric: str
    mode: str
    patience: int | None
    min_delta: float
    best: float | None = None
    best_step: int | None = None
    waited: int = 0

    @classmethod
    def of(cls, settings: Settings) -> EarlyStop:
        """The count of a config, before the first evaluation."""
        return cls(
            settings.best_metric,
            settings.best_mode,
            settings.early_stop_patience,
            settings.early_stop_min_delta,
        )

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds an evaluation; a value that is not finite is no improvement.

        Args:
            step: the evaluated step.
            metrics: by tag, without those that are not finite.
        """
        value = metrics.get(self.metric, math.nan)
        sign = 1 if self.mode == "max" else -1
        if math.isfinite(value) and (
            self.best is None or sign * (value - self.best) > self.min_delta
        ):
            self.best, self.best_step, self.waited = value, step, 0
        else:
            self.waited += 1

    @property
    def reason(self) -> str:
        """Why the run ends early, for its log; empty if it does not."""
        if self.patience is None or self.waited < self.patience:
            return ""
        times = f"{self.waited} evaluation{'s' * (self.waited != 1)}"
        if self.best is None:
            return f"{self.metric} was not finite in {times}"
        more = f" by more than {self.min_delta:g}" if self.min_delta else ""
        return (
            f"{self.metric} has not improved on {self.best:.4g} (step {self.best_step}){more} "
            f"in {times}"
        )

    def to_json(self) -> dict[str, Any]:
        """The count, for a checkpoint."""
        return {
            "metric": self.metric,
            "mode": self.mode,
            "best": self.best,
            "step": self.best_step,
            "waited": self.waited,
        }

    def from_json(self, saved: Mapping[str, Any] | None) -> None:
        """Restores what `to_json` gave, unless another metric decides now.

        Args:
            saved: the count; None in checkpoints of a podlift that did not count.
        """
        if saved is not None and (saved["metric"], saved["mode"]) == (self.metric, self.mode):
            self.best, self.best_step = saved["best"], saved["step"]
            self.waited = saved["waited"]
