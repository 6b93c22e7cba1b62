"""Labels that are no class of the model, found on the host, which can name the example.

As an index into logits, -1 would be the last class, and a label above the last class gives NaN.
`trainer.losses.softmax_cross_entropy` makes the loss of either NaN, on the devices and in every
step. Here the host reads the labels of some batches: `trainer.run.training_labels` and
`trainer.inference.evaluate` choose which.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from trainer.console import warn
from trainer.errors import UserError
from trainer.losses import softmax_cross_entropy
from trainer.metrics import accuracy, bits
from trainer.step.task import Task

_TAKE_CLASSES = (softmax_cross_entropy, accuracy, bits)


class LabelCheck:
    """Checks labels against the number of classes, which is the last axis of the model's outputs.

    Args:
        task: whose model has been traced when `check` is called.
        examples: what to call the examples: "training" or "held-out".
        rank: of this process; None if it is the only one.

    Attributes:
        guards_loss: whether the loss is one of podlift's, for which a label must be a class.
    """

    def __init__(self, task: Task, examples: str, rank: int | None = None) -> None:
        self._task = task
        self._examples = examples
        self._by = "" if rank is None else f" (read by rank {rank})"
        self._has_warned = False
        functions = {"config.loss": task.loss} | {
            f"config.metrics.{name}": metric for name, metric in task.metrics.items()
        }
        # What each of podlift's own functions ignores, by its config key.
        self._ignored = {
            where: keywords.get("ignore_index")
            for where, given in functions.items()
            for function, keywords in [_unwrap(given)]
            if function in _TAKE_CLASSES
        }
        self.guards_loss = "config.loss" in self._ignored

    def check(self, batch: Mapping[str, Any], numbers: np.ndarray) -> None:
        """Raises for a label that is no class; warns, once, if only a loss of the user's takes it.

        Args:
            batch: a host batch; its `y` and `mask` are read.
            numbers: the number of each example in the data, in the order of the batch.

        Raises:
            UserError: names the example, its label and the config key.
        """
        for where, ignored in self._ignored.items():
            message = self._find(batch, numbers, ignored, where)
            if message:
                raise UserError(message, self.hint(where))
        is_integer = np.asarray(batch.get("y", 0.0)).dtype.kind in "iu"
        if is_integer and not self.guards_loss and not self._has_warned:
            message = self.explain(batch, numbers)
            if message:
                self._has_warned = True
                warn(f"{message}; it has to expect that")

    def explain(self, batch: Mapping[str, Any], numbers: np.ndarray) -> str:
        """What is wrong with the labels of a batch for its loss; empty if nothing is."""
        ignored = _unwrap(self._task.loss)[1].get("ignore_index")
        return self._find(batch, numbers, ignored, "config.loss")

    def hint(self, where: str = "config.loss") -> str:
        """What to do about a label that is no class."""
        return (
            "correct the data, give the model more outputs, or name a label that should not count: "
            f"{where}.ignore_index"
        )

    def _find(
        self, batch: Mapping[str, Any], numbers: np.ndarray, ignore_index: int | None, where: str
    ) -> str:
        """Describes the first label that is neither a class nor `ignore_index`; or is empty."""
        labels = np.asarray(batch.get("y", ()))
        # Of several shapes that fit, the one with the most classes raises no false alarm.
        fitting = [shape for shape in self._task.traced if _fits(labels, numbers.size, shape)]
        *positions, classes = max(fitting, key=lambda shape: shape[-1], default=(0,))
        inner = tuple(positions)
        if not (labels.size and classes > 1 and labels.dtype.kind in "iuf"):
            return ""  # not labels of classes
        labels = labels.reshape(numbers.size, -1)
        if labels.dtype.kind in "iu" and labels.min() >= 0 and labels.max() < classes:
            return ""
        wrong = ~((labels >= 0) & (labels < classes) & (labels == np.floor(labels)))
        if ignore_index is not None:
            wrong &= labels != ignore_index
        if batch.get("mask") is not None:
            wrong &= np.asarray(batch["mask"]).reshape(-1, 1) > 0
        if not wrong.any():
            return ""
        row, position = (int(found[0]) for found in np.nonzero(wrong))
        place = ", ".join(str(int(i)) for i in np.unravel_index(position, inner)) if inner else ""
        return (
            f"{where}: the label {labels[row, position]} of {self._examples} example "
            f"{numbers.reshape(-1)[row]}{f' at position {place}' if place else ''} is none of the "
            f"model's {classes} classes, 0 to {classes - 1}{self._by}"
        )


def _fits(labels: np.ndarray, examples: int, outputs: tuple[int, ...]) -> bool:
    """Whether there is a label for each position of outputs `(*positions, classes)`."""
    if not outputs:
        return False
    inner = outputs[:-1]
    has_positions = labels.shape[labels.ndim - len(inner) :] == inner
    return has_positions and labels.size == examples * math.prod(inner)


def _unwrap(function: Any) -> tuple[Any, Mapping[str, Any]]:
    """The function of a partial and its keywords."""
    if isinstance(function, functools.partial):
        return function.func, function.keywords
    return function, {}
