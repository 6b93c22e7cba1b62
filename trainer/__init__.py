"""What the chips compute: state, step, lift, loop, data, checkpoints, metrics.

Use it without a launcher, from a script or a notebook::

    import trainer
    result = trainer.train(config, "runs/mine")

Importing this package imports neither jax nor flax; the first attribute that needs them does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.checkpoints.load import load
    from trainer.errors import NonFiniteLoss, Preempted, UserError
    from trainer.run.loop import Result
    from trainer.run.train import train

__all__ = ["NonFiniteLoss", "Preempted", "Result", "UserError", "load", "train"]

_HOME = {
    "train": "trainer.run.train",
    "load": "trainer.checkpoints.load",
    "Result": "trainer.run.loop",
    "Preempted": "trainer.errors",
    "NonFiniteLoss": "trainer.errors",
    "UserError": "trainer.errors",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        import importlib

        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'trainer' has no attribute {name!r}")
