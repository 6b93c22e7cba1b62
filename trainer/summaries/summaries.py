"""What TensorBoard shows beside numbers: histograms, images, confusion matrices, stragglers.

All of it is off by default, and none of it changes a number of the run.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Generator
from typing import Any

import jax
import numpy as np

from trainer.console import warn
from trainer.data.prefetch import depth_for
from trainer.errors import UserError
from trainer.inference.evaluate import HeldOutSums
from trainer.metrics_writer.messages import About
from trainer.metrics_writer.run_log import RunLog
from trainer.metrics_writer.train_log import TrainLog, is_due
from trainer.step.job import make_init
from trainer.summaries.confusion import make_confusion, shares
from trainer.summaries.histograms import Histograms
from trainer.summaries.images import heat, tile, to_uint8
from trainer.summaries.stragglers import Stragglers
from trainer.workdir.paths import write_whole


class Summaries:
    """The summaries of one run. All processes call it at the same points; one of them writes.

    Args:
        about: what the run is.
        account: whose curves they go to, and whose account of time they are in.
        log: of whose speed they are no part.
        stop_requested: as for `trainer.train`.

    Raises:
        UserError: the data or the model has nothing of the kind that is asked for.
    """

    def __init__(
        self,
        about: About,
        account: RunLog,
        log: TrainLog,
        stop_requested: Callable[[int, str], bool],
    ) -> None:
        settings, job, lift = about.settings, about.job, about.lift
        self._stop_requested = stop_requested
        self._about, self._account, self._log = about, account, log
        self._stragglers: Stragglers | None = None
        if settings.stragglers and lift.num_processes > 1:
            self._stragglers = Stragglers(lift, account.goodput)
        self._histograms: Histograms | None = None
        if settings.histograms_every_steps is not None:
            self._histograms = Histograms(settings, job, lift)
        for name in ("images", "confusion"):
            if getattr(settings, name) and job.held_out is None:
                raise UserError(
                    f"config.summaries.{name}={getattr(settings, name)}: nothing is held out",
                    'return {"train": source, "eval": source} from config.data.target',
                )
        self._images = settings.images
        if self._images:
            _check_images(self._examples(1), self._images)
        self._confusion: HeldOutSums | None = None
        if settings.confusion and job.held_out is not None:
            size = settings.eval_batch_size or settings.global_batch_size
            depth = depth_for(settings.prefetch, lift.platform)
            state = jax.eval_shape(make_init(job, settings.seed))
            self._confusion = make_confusion(job.task, job.held_out, lift, size, depth, state)

    def after_row(self, step: int) -> None:
        """To be told after each log row."""
        if self._stragglers is not None:
            with self._aside():
                self._stragglers.look(step, self._account.curves)

    def after_call(self, before: int, step: int, state: Any, drain: Callable[[], None]) -> None:
        """To be told after each call of the step.

        Args:
            before: steps taken before it.
            step: steps taken after it.
            state: after it.
            drain: waits for the devices.
        """
        if self._histograms is None:
            return
        if is_due(self._about.settings.histograms_every_steps, before, step):
            drain()
            self._stop_requested(step, "evaluate")  # the first one compiles, which may take long
            with self._aside():
                found = self._histograms(state, step)
                if self._account.curves is not None:
                    self._account.curves.histograms(step, found)

    def after_evaluation(self, step: int, state: Any) -> None:
        """To be told after each evaluation, as a part of it."""
        curves = self._account.curves
        with self._account.goodput.spending("summaries"):
            if self._images and curves is not None:
                images = to_uint8(self._examples(self._images))
                curves.image(step, "held_out/images", tile(images))
            self._images = 0
            if self._confusion is None:
                return
            counts = self._confusion(state, lambda: self._stop_requested(step, "evaluate"))
            if counts is not None and curves is not None:
                curves.image(step, "eval/confusion", heat(shares(counts)))
                self._write_confusion(step, counts)

    def _examples(self, count: int) -> np.ndarray:
        source = self._about.job.held_out
        assert source is not None
        return np.asarray(source[np.arange(min(count, len(source)))]["x"])

    def _write_confusion(self, step: int, counts: np.ndarray) -> None:
        found = {"step": step, "rows": "labels", "columns": "predictions"}
        text = json.dumps({**found, "counts": counts.astype(np.int64).tolist()})
        try:
            write_whole(self._about.folder.path / "confusion.json", text + "\n")
        except Exception as error:  # a disk, or the client of an object store
            warn(f"confusion.json was not written: {error}")

    @contextlib.contextmanager
    def _aside(self) -> Generator[None]:
        began = time.monotonic()
        with self._account.goodput.spending("summaries"):
            yield
        self._log.exclude(time.monotonic() - began)


def _check_images(examples: np.ndarray, count: int) -> None:
    shape = examples.shape[1:]
    if len(shape) != 3 or shape[-1] not in (1, 3):
        raise UserError(
            f"config.summaries.images={count}: x has the shape {shape}, which is no image",
            "(height, width, 1 or 3) is one",
        )
