"""The exceptions that end a run early, with the information needed to fix the cause or resume."""

from __future__ import annotations

import math


class UserError(Exception):
    """A mistake that the user can fix; the launcher exits with 2.

    Args:
        message: what is wrong, on one line.
        hint: what to do about it, on one line.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  HINT: {self.hint}" if self.hint else self.message


class NonFiniteLoss(Exception):
    """The loss or the gradient norm is NaN or infinite; the launcher exits with 1.

    Args:
        step: the first such step, counted from 1.
        values: the metrics of that step.
        skipped: how many such steps were skipped before, with `config.nan="skip"`.

    Attributes:
        last_good: the newest checkpoint, for the message.
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
        if math.isnan(self.values.get("loss", 0.0)) and self.values.get("grad_norm") == 0:
            text += (
                "; a gradient of 0 suggests that no example of that step counts: all are masked, "
                "or have the label that the loss ignores"
            )
        return text + (f"\n  last good checkpoint: {self.last_good}" if self.last_good else "")


class NonFiniteState(Exception):
    """Params or model state are NaN or infinite; the launcher exits with 1.

    Args:
        step: the step of the state.
        names: the names of these leaves.
    """

    def __init__(self, step: int, names: list[str]) -> None:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        super().__init__(f"{names[0]}{more} not finite after step {step}; it was not saved")
        self.step = step


class ReplicasDiffer(Exception):
    """The replicas of the state differ between devices; the launcher exits with 1."""


class CheckpointsUnreadable(UserError):
    """The workdir contains checkpoints, and all are damaged; the launcher exits with 2."""


class StateUnreadable(Exception):
    """An undamaged checkpoint cannot be read; the launcher exits with 1."""


class SavesFailed(Exception):
    """Too many saves in a row failed; the launcher exits with 1."""


class StorageFailed(Exception):
    """Files could not be read for minutes; the launcher exits with 42, for another start."""


class FolderMoved(Exception):
    """The run's folder was renamed, replaced or removed under it; the launcher exits with 1."""


class PeerFailed(Exception):
    """Another process of the run failed; the message is its reason."""


class SmokeFailed(Exception):
    """A check of a smoke test failed; the launcher exits with 1."""


class Preempted(Exception):
    """The run was asked to stop and has saved its state; the launcher exits with 42.

    Args:
        step: the saved step.
        saved: whether there was a state to save.
    """

    def __init__(self, step: int, *, saved: bool = True) -> None:
        super().__init__(f"asked to stop: saved at step {step}" if saved else "asked to stop")
        self.step = step


def text_of(error: BaseException) -> str:
    """The message of an error; its type if it has none, or none that can be shown."""
    name = type(error).__name__
    try:
        return str(error).strip() or name
    except BaseException:  # a user's __str__ may raise anything
        return f"{name}, whose message cannot be shown"


def first_line(error: BaseException) -> str:
    """The first line of `text_of`, at most 200 characters."""
    return text_of(error).splitlines()[0][:200]
