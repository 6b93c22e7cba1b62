"""The ways a run can end early. Each carries what a person needs to go on."""

from __future__ import annotations

import math


class UserError(Exception):
    """Something the person who started the run can mend; the launcher exits with 2.

    Args:
        message: what is wrong, in one line.
        hint: what to do about it, in one line.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  HINT: {self.hint}" if self.hint else self.message


class NonFiniteLoss(Exception):
    """The loss or the gradient norm became NaN or infinite; the launcher exits with 1.

    Args:
        step: the step, counted from 1, that first produced it.
        values: the metrics of that step.
        skipped: how many such steps were skipped before, where they were to be skipped.

    Attributes:
        last_good: the newest checkpoint, for a person.
    """

    def __init__(self, step: int, values: dict[str, float], skipped: int = 0) -> None:
        super().__init__(step, values)
        self.step = step
        self.values = values
        self.skipped = skipped
        self.last_good = ""

    def __str__(self) -> str:
        shown = ", ".join(f"{name}={value:.4g}" for name, value in self.values.items())
        bad = [n for n in ("loss", "grad_norm") if not math.isfinite(self.values.get(n, 0.0))]
        what = " and ".join(bad) + (" are" if len(bad) > 1 else " is")
        text = f"{what} not finite at step {self.step} ({shown})"
        if self.skipped:
            text += f", after {self.skipped} skipped before it (config.nan_limit)"
        return text + (f"\n  last good checkpoint: {self.last_good}" if self.last_good else "")


class NonFiniteState(Exception):
    """Parameters or model state are NaN or infinite; found before a save, so it is not made.

    Args:
        step: of the state.
        names: of the leaves.
    """

    def __init__(self, step: int, names: list[str]) -> None:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        super().__init__(f"{names[0]}{more} not finite after step {step}; it was not saved")
        self.step = step


class ReplicasDiffer(Exception):
    """Copies of the state that must be equal on all devices are not; the launcher exits with 1."""


class CheckpointsUnreadable(UserError):
    """The workdir has held checkpoints and none is whole; the launcher exits with 2."""


class StateUnreadable(Exception):
    """A checkpoint is whole and cannot be read all the same; the launcher exits with 1."""


class SavesFailed(Exception):
    """Too many saves in a row have failed; the launcher exits with 1."""


class PeerFailed(Exception):
    """Another process of the run has failed, and says why."""


class SmokeFailed(Exception):
    """A check of a smoke test did not come out as it should; the launcher exits with 1."""


class Preempted(Exception):
    """The run was asked to stop and has saved its state; the launcher exits with 42.

    Args:
        step: the step that was saved.
        saved: whether there was anything to save.
    """

    def __init__(self, step: int, *, saved: bool = True) -> None:
        super().__init__(f"asked to stop: saved at step {step}" if saved else "asked to stop")
        self.step = step


def first_line(error: BaseException) -> str:
    """What an error of somebody else's code says, in one line of bounded length."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
