"""Summaries of the held-out examples, made with an evaluation: images and a confusion matrix."""

from __future__ import annotations

import json
from collections.abc import Callable

import jax
import numpy as np

from trainer.config.settings import Settings
from trainer.console import warn
from trainer.data.prefetch import depth_for
from trainer.data.stream import Source
from trainer.errors import UserError
from trainer.lift.lift import Lift
from trainer.metrics_writer.goodput import Goodput
from trainer.metrics_writer.run_log import RunLog
from trainer.state.train_state import TrainState
from trainer.step.job import Job, make_init
from trainer.summaries.confusion import make_confusion, shares
from trainer.summaries.images import heat, tile, to_uint8
from trainer.workdir.paths import write_whole
from trainer.workdir.workdir import Workdir

Summary = Callable[[int, TrainState], None]


def make_held_out_summaries(
    settings: Settings,
    job: Job,
    lift: Lift,
    workdir: Workdir,
    run_log: RunLog,
    goodput: Goodput,
    stop_requested: Callable[[int, str], bool],
) -> list[Summary]:
    """The summaries a config asks for, each a function of (step, state).

    All processes call them after the same evaluations; the one with TensorBoard writes.

    Args:
        settings: the checked config, `config.summaries.images` and `.confusion`.
        job: what is trained.
        lift: over which devices.
        workdir: of `confusion.json`.
        run_log: whose TensorBoard the images go to.
        goodput: counts their time.
        stop_requested: as for `trainer.train`.

    Raises:
        UserError: the data or the model does not have what is asked for.
    """
    made: list[Summary] = []
    if settings.images:
        source = _held_out(job, "images", settings.images)
        made.append(_images(source, settings.images, run_log))
    if settings.confusion:
        source = _held_out(job, "confusion", settings.confusion)
        size = settings.eval_batch_size or settings.global_batch_size
        depth = depth_for(settings.prefetch, lift.platform)
        shapes = jax.eval_shape(make_init(job, settings.seed))
        count = make_confusion(job.task, source, lift, size, depth, shapes)

        def confusion(step: int, state: TrainState) -> None:
            counts = count(state, lambda: stop_requested(step, "evaluate"))
            if counts is not None and run_log.tensorboard is not None:
                run_log.tensorboard.image(step, "eval/confusion", heat(shares(counts)))
                _write_confusion(workdir, step, counts)

        made.append(confusion)
    return [_timed(summary, goodput) for summary in made]


def _timed(summary: Summary, goodput: Goodput) -> Summary:
    def timed(step: int, state: TrainState) -> None:
        with goodput.spending("summaries"):
            summary(step, state)

    return timed


def _held_out(job: Job, name: str, value: int | bool) -> Source:
    if job.held_out is None:
        raise UserError(
            f"config.summaries.{name}={value}: there are no held-out examples",
            'return {"train": source, "eval": source} from config.data.target',
        )
    return job.held_out


def _images(source: Source, count: int, run_log: RunLog) -> Summary:
    """Held-out images, once a start: they do not change."""

    def examples(count: int) -> np.ndarray:
        return np.asarray(source[np.arange(min(count, len(source)))]["x"])

    shape = examples(1).shape[1:]
    if len(shape) != 3 or shape[-1] not in (1, 3):
        raise UserError(
            f"config.summaries.images={count}: x has the shape {shape}, which is no image",
            "(height, width, 1 or 3) is one",
        )
    left = [count]

    def images(step: int, state: TrainState) -> None:
        if left and run_log.tensorboard is not None:
            page = tile(to_uint8(examples(left.pop())))
            run_log.tensorboard.image(step, "held_out/images", page)

    return images


def _write_confusion(workdir: Workdir, step: int, counts: np.ndarray) -> None:
    found = {"step": step, "rows": "labels", "columns": "predictions"}
    text = json.dumps({**found, "counts": counts.astype(np.int64).tolist()})
    try:
        write_whole(workdir.path / "confusion.json", text + "\n")
    except Exception as error:  # of a disk, or of the client of an object store
        warn(f"confusion.json was not written: {error}")
