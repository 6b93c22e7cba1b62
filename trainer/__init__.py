"""Train Flax models on any number of devices and processes.

Use it without the launcher, from a script or a notebook::

    import trainer

    result = trainer.train(config, "runs/mine")
    trainer.evaluate("runs/mine", best=True)["eval/loss"]
    trainer.predict("runs/mine")["outputs"]
    trainer.load("runs/mine")["params"]

This module is the public interface: `train`, `evaluate`, `predict`, `load`, and the errors they
raise. Importing it imports neither jax nor flax; the first attribute that needs them does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.checkpoints.load import load
    from trainer.errors import (
        CheckpointsUnreadable,
        NonFiniteLoss,
        NonFiniteState,
        Preempted,
        ReplicasDiffer,
        SavesFailed,
        StateUnreadable,
        UserError,
    )
    from trainer.inference.evaluate import evaluate
    from trainer.inference.predict import predict
    from trainer.run.result import Result
    from trainer.run.train import train

__all__ = [
    "CheckpointsUnreadable",
    "NonFiniteLoss",
    "NonFiniteState",
    "Preempted",
    "ReplicasDiffer",
    "Result",
    "SavesFailed",
    "StateUnreadable",
    "UserError",
    "evaluate",
    "load",
    "predict",
    "train",
]

_MODULES = {
    "Result": "trainer.run.loop",
    "evaluate": "trainer.inference.evaluate",
    "load": "trainer.checkpoints.load",
    "predict": "trainer.inference.predict",
    "train": "trainer.run.train",
}


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module(_MODULES.get(name, "trainer.errors")), name)
    raise AttributeError(f"module 'trainer' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
