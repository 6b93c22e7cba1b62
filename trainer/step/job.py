"""Builds a job from checked settings: data, task, recipe and length of the run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax

from trainer.config.settings import MOST_STEPS, Settings
from trainer.config.targets import bind, build, takes
from trainer.data.stream import Source, TrainStream, as_source
from trainer.errors import UserError
from trainer.state.freezing import freeze
from trainer.state.train_state import TrainState
from trainer.step.init import init_state
from trainer.step.precision import DTYPES
from trainer.step.task import Recipe, Task


@dataclass(frozen=True)
class Job:
    """What to train, on which data, for how long.

    Attributes:
        task: model, loss, metrics and optimizer.
        stream: the training batches.
        held_out: the examples to evaluate on, if any.
        recipe: how to take a step.
        num_steps: the length of the run, over which schedules extend.
        stop: the step to stop at, `num_steps` or earlier.
    """

    task: Task
    stream: TrainStream
    held_out: Source | None
    recipe: Recipe
    num_steps: int
    stop: int


def make_init(job: Job, seed: int) -> Callable[[], TrainState]:
    """The compiled function that initialises a job's state; eager initialisation is slow."""
    first = job.stream.source[np.zeros(1, np.int64)]["x"][0]
    init = functools.partial(init_state, job.task, seed, recipe=job.recipe)
    return functools.partial(jax.jit(init), first)


def build_job(settings: Settings) -> Job:
    """Imports and calls the code that a config names.

    Raises:
        UserError: a target does not resolve or does not take its arguments.
    """
    # Before data is loaded, so that a typo in a target does not wait for a download.
    loss = bind(settings.loss, "config.loss")
    # What the loss ignores, metrics ignore too.
    ignored = {k: v for k, v in settings.loss.items() if k == "ignore_index" and v is not None}
    metrics = {
        name: bind(block, f"config.metrics.{name}", **ignored)
        for name, block in settings.metrics.items()
    }
    model = _build_model(settings.model)
    sources = build(settings.data, "config.data", seed=settings.seed)
    if not isinstance(sources, Mapping) or "train" not in sources:
        raise UserError(
            f"config.data.target={settings.data['target']!r} returned no training data",
            'return {"train": source, "eval": source}; "eval" is optional',
        )
    augment: Callable[..., Any] | None = None
    if settings.augment is not None:
        augment = bind(settings.augment, "config.data.augment")
    stream = TrainStream(
        as_source(sources["train"], 'config.data: its "train" source'),
        settings.global_batch_size,
        settings.seed,
        shuffle=settings.shuffle,
        augment=augment,
    )
    held_out = None
    if sources.get("eval") is not None:
        held_out = as_source(sources["eval"], 'config.data: its "eval" source')
        if not len(held_out):
            raise UserError('config.data: its "eval" source has no examples', 'leave "eval" out')
    if held_out is None and settings.early_stop_patience is not None:
        raise UserError(
            "config.early_stop.patience is set, but there are no examples to evaluate on",
            'return an "eval" source from config.data.target, or leave config.early_stop out',
        )
    num_steps = settings.num_steps or (settings.num_epochs or 0) * stream.steps_per_epoch
    if num_steps > MOST_STEPS:
        raise UserError(
            f"config.num_epochs={settings.num_epochs} are {num_steps} steps, more than the "
            f"{MOST_STEPS} that a run can count"
        )
    optimizer, learning_rate = _build_optimizer(settings.optimizer, num_steps)
    optimizer = freeze(optimizer, settings.freeze)
    return Job(
        task=Task(
            model,
            loss,
            optimizer,
            learning_rate,
            metrics,
            DTYPES.get(settings.precision),
            settings.freeze,
        ),
        stream=stream,
        held_out=held_out,
        recipe=Recipe(
            skip_nonfinite=settings.nan == "skip",
            accum_steps=settings.grad_accum_steps,
            clip_norm=settings.clip_norm,
            ema_decay=settings.ema_decay,
            mixup=settings.mixup,
            scale_loss=settings.precision == "fp16",
        ),
        num_steps=num_steps,
        stop=min(num_steps, settings.stop_at_step or num_steps),
    )


def _build_model(block: Mapping[str, Any]) -> nn.Module:
    if takes(block, "config.model", "rngs"):
        from trainer.models.from_nnx import from_nnx

        return from_nnx(lambda rngs: build(block, "config.model", rngs=rngs), "config.model")
    model = build(block, "config.model")
    if not isinstance(model, nn.Module):
        raise UserError(
            f"config.model.target={block['target']!r} built a {type(model).__name__}, not a Linen "
            "module",
            "name a class of Linen modules, or one of NNX modules, whose __init__ takes rngs",
        )
    return model


def _build_optimizer(
    block: Mapping[str, Any], num_steps: int
) -> tuple[optax.GradientTransformation, Any]:
    """The optimizer, and its learning rate (a number or a schedule); NaN if it names none."""
    rate = block.get("learning_rate")
    if isinstance(rate, Mapping):
        rate = build(rate, "config.optimizer.learning_rate", num_steps=num_steps)
    filled = {**block, "learning_rate": rate} if rate is not None else block
    optimizer = build(filled, "config.optimizer", num_steps=num_steps)
    if not hasattr(optimizer, "init") or not hasattr(optimizer, "update"):
        raise UserError(
            f"config.optimizer.target={block['target']!r} built a {type(optimizer).__name__}, "
            "not an optax optimizer"
        )
    return optimizer, rate if rate is not None else float("nan")
