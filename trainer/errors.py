"""The ways a run can end early. Each carries what a person needs to go on."""

from __future__ import annotations


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
    """

    def __init__(self, step: int, values: dict[str, float]) -> None:
        shown = ", ".join(f"{name}={value:.4g}" for name, value in values.items())
        super().__init__(f"the loss is not finite at step {step} ({shown})")
        self.step = step
        self.values = values


class ReplicasDiffer(Exception):
    """Copies of the state that must be equal on all devices are not; the launcher exits with 1."""


class CheckpointsUnreadable(Exception):
    """The workdir holds checkpoints and none can be restored; the launcher exits with 1."""


class Preempted(Exception):
    """The run was asked to stop and has saved its state; the launcher exits with 42.

    Args:
        step: the step that was saved.
    """

    def __init__(self, step: int) -> None:
        super().__init__(f"asked to stop: saved at step {step}")
        self.step = step
