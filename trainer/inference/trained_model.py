"""A saved state and the job it is of, for whatever is done with a trained model."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass

import jax
from etils import epath

from trainer.checkpoints import differences
from trainer.checkpoints.load import read_saved
from trainer.config.settings import Settings
from trainer.state.leaves import name_leaves, with_leaves
from trainer.state.train_state import TrainState
from trainer.step.job import Job, build_job, make_init

# Of no use once nothing is trained, and twice as large as the parameters.
_LEFT_OUT = "opt_state/"


@dataclass(frozen=True)
class TrainedModel:
    """A trained model.

    Attributes:
        settings: the config it is used with.
        job: of that config.
        state: in the memory of the host, without the optimizer's.
        step: of the state.
        place: where it was saved.
    """

    settings: Settings
    job: Job
    state: TrainState
    step: int
    place: epath.Path


def restore(
    workdir: str | os.PathLike[str],
    settings: Settings,
    *,
    best: bool = False,
    step: int | None = None,
) -> TrainedModel:
    """Reads a state of a run and builds what a config makes of it; writes nothing.

    Args:
        workdir: the run's folder.
        settings: the checked config, of the run or of another one with the same model.
        best: as for `trainer.load`.
        step: as for `trainer.load`.

    Raises:
        CheckpointsUnreadable: there is no such checkpoint, or it is not what was saved.
        UserError: a target of the config does not resolve, or its model has other leaves.
    """
    saved = read_saved(workdir, best=best, step=step)
    job = build_job(settings)
    shapes = jax.eval_shape(make_init(job, settings.seed))
    abstract = dataclasses.replace(shapes, opt_state=())
    listed = {n: leaf for n, leaf in saved.listed.items() if not n.startswith(_LEFT_OUT)}
    differences.refuse(
        differences.compare(listed, name_leaves(abstract)),
        str(saved.place),
        "use the code and config it was saved with",
    )
    return TrainedModel(settings, job, with_leaves(abstract, saved.leaves), saved.step, saved.place)
