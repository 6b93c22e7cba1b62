"""A saved state and the job it belongs to, for commands on a finished run."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from trainer.checkpoints import differences
from trainer.checkpoints.load import read_saved, refuse_unusable
from trainer.config import trust
from trainer.config.settings import Settings, check
from trainer.data.stream import Source
from trainer.errors import UserError
from trainer.lift.lift import Lift, make_lift
from trainer.state.leaves import name_leaves, with_leaves
from trainer.state.train_state import TrainState
from trainer.step.job import Job, build_job, make_init
from trainer.workdir.paths import absolute
from trainer.workdir.private import refuse_links
from trainer.workdir.workdir import read_config

# Only training needs it, and it may be twice as large as the parameters.
_LEFT_OUT = "opt_state/"


@dataclass(frozen=True)
class TrainedModel:
    """A trained model.

    Attributes:
        settings: the checked config.
        job: what that config builds.
        state: without the optimizer's; in host memory or on the devices.
        step: the step of the state.
        place: the checkpoint.
        data: the fingerprints of the data of the run; empty if an earlier podlift saved it.
    """

    settings: Settings
    job: Job
    state: TrainState
    step: int
    place: epath.Path
    data: Mapping[str, Any] = field(default_factory=dict)

    @property
    def batch_size(self) -> int:
        """Examples per batch in evaluation, over all devices."""
        return self.settings.eval_batch_size or self.settings.global_batch_size

    def examples(self, split: str) -> Source:
        """The examples of a split, without augmentation and in the order of the data.

        Args:
            split: "train", or "eval" for the held-out examples.

        Raises:
            UserError: the split has another name, or the data has no held-out examples.
        """
        if split not in ("eval", "train"):
            raise UserError(f"split={split!r} is neither 'eval' nor 'train'")
        if split == "train":
            return self.job.stream.source
        if self.job.held_out is None:
            raise UserError(
                "the data has no held-out examples",
                'return {"train": source, "eval": source} from config.data.target, or use the '
                "split train",
            )
        return self.job.held_out


def restore(
    workdir: str | os.PathLike[str],
    settings: Settings,
    *,
    best: bool = False,
    step: int | None = None,
) -> TrainedModel:
    """Reads a state of a run into host memory and builds the job of a config. Writes nothing.

    Args:
        workdir: the run's folder.
        settings: the checked config: the run's own, or another one with the same model.
        best: as for `trainer.load`.
        step: as for `trainer.load`.

    Raises:
        CheckpointsUnreadable: the checkpoint does not exist, is damaged, or holds what a model must
            not (`trainer.state.finite`).
        UserError: a target of the config does not resolve, or its model has other leaves.
    """
    saved = read_saved(workdir, best=best, step=step)
    job = build_job(settings)
    shapes = jax.eval_shape(make_init(job, settings.seed))
    abstract = dataclasses.replace(shapes, opt_state=())
    listed = {n: leaf for n, leaf in saved.listed.items() if not n.startswith(_LEFT_OUT)}
    found = differences.compare(listed, name_leaves(abstract))
    differences.refuse(found, str(saved.place), "use the code and config it was saved with")
    # What is left is an average in 16 bits, which `TrainState.eval_params` casts in any case.
    refuse_unusable(saved)
    state = with_leaves(abstract, saved.leaves)
    return TrainedModel(settings, job, state, saved.step, saved.place, saved.data)


@contextlib.contextmanager
def restored_onto_devices(
    workdir: str | os.PathLike[str],
    *,
    best: bool = False,
    step: int | None = None,
    config: ConfigDict | None = None,
    mesh: Mesh | None = None,
    is_trusted: bool = False,
) -> Iterator[tuple[TrainedModel, Lift]]:
    """Reads a state of a run and puts it onto the devices, as the config's lift has it.

    A context, within which the run's own config names only the code that it may name.

    Args:
        workdir: the run's folder.
        best: as for `trainer.load`.
        step: as for `trainer.load`.
        config: the run's own where None.
        mesh: the devices, on the one axis "batch"; all devices where None.
        is_trusted: whether the run's own config may name any code.

    Raises:
        CheckpointsUnreadable: the checkpoint does not exist, is damaged or is not finite.
        UserError: `workdir` is not the folder of a run, or the config, its targets or the mesh
            are invalid.
    """
    settings = check(_config_of(absolute(workdir)) if config is None else config)
    lift = make_lift(settings.lift, mesh, settings.state_sharding)
    is_limited = config is None and not is_trusted
    with trust.limited(trust.Limit(os.fspath(absolute(workdir))) if is_limited else None):
        trained = restore(workdir, settings, best=best, step=step)
        yield dataclasses.replace(trained, state=lift.put_state(trained.state)), lift


def _config_of(folder: epath.Path) -> ConfigDict:
    if not (folder / "config.json").exists():
        why = "has no config.json" if folder.exists() else "does not exist"
        raise UserError(f"{folder} is not the folder of a run: it {why}")
    refuse_links(folder)
    return read_config(folder)
