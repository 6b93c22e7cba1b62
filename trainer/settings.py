"""The keys of a config: their defaults, and the checks that need no import of jax.

This is the whole list of keys; `python -m launcher --config=FILE --print_config` shows them
resolved. `placeholder(type)` marks a key that may stay None.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from trainer.errors import UserError

LIFTS = ("pmap", "shard_map", "vmap")
REDUCES = ("auto", "flat", "leaves")

# Keys of `data` that belong to the order of examples, not to the target that loads them.
STREAM_KEYS = ("augment", "prefetch", "shuffle")

# On a resume these may differ from the first run: they set only how long or how often.
RESUMABLE = (
    "num_steps",
    "num_epochs",
    "stop_at_step",
    "log_every_steps",
    "checkpoint.",
)


def defaults() -> ConfigDict:
    """A config with every key that has a default; blocks that name code have none."""
    return ConfigDict(
        {
            "seed": 0,
            "num_epochs": placeholder(int),
            "num_steps": placeholder(int),
            "stop_at_step": placeholder(int),
            "global_batch_size": placeholder(int),
            "steps_per_call": 1,
            "lift": "pmap",
            "reduce": "auto",
            "metrics": ConfigDict(),
            "eval": {"every_steps": placeholder(int), "batch_size": placeholder(int)},
            "checkpoint": {
                "every_steps": 1000,
                "keep": 3,
                "best_metric": "eval/loss",
                "best_mode": "min",
            },
            "log_every_steps": 100,
            "data": {
                "shuffle": True,
                "prefetch": placeholder(int),
            },
        }
    )


def with_defaults(config: ConfigDict) -> ConfigDict:
    """Adds the keys of `defaults()` that `config` lacks, in place, and returns it locked.

    In place, so that references between fields (`config.get_ref`) stay alive and later overrides
    follow them.

    Raises:
        UserError: a key is unknown, or its value has another type than its default.
    """
    known = [*defaults(), "model", "loss", "optimizer"]
    for key in config:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise UserError(
                f"config.{key}: no such key",
                f"did you mean config.{near[0]}?"
                if near
                else "your own settings belong inside config.model, .loss, .data or .optimizer",
            )
    _add_missing(config, defaults(), "config")
    return config.lock()


def _add_missing(config: ConfigDict, template: ConfigDict, where: str) -> None:
    with config.unlocked():
        for key in template:
            expected = template.get_type(key)
            if key not in config or (config[key] is None and config.get_type(key) is type(None)):
                is_none = template[key] is None
                config[key] = placeholder(expected) if is_none else template[key]
            elif isinstance(template[key], ConfigDict) and isinstance(config[key], ConfigDict):
                _add_missing(config[key], template[key], f"{where}.{key}")
            elif config[key] is not None and not isinstance(config[key], expected):
                raise UserError(
                    f"{where}.{key}={config[key]!r} should be of type {expected.__name__}"
                )


@dataclass(frozen=True)
class Settings:
    """A checked config. Blocks that name code stay plain dicts, to be built later."""

    config: ConfigDict
    seed: int
    num_epochs: int | None
    num_steps: int | None
    stop_at_step: int | None
    global_batch_size: int
    steps_per_call: int
    lift: str
    reduce: str
    model: Mapping[str, Any]
    loss: Mapping[str, Any]
    metrics: Mapping[str, Mapping[str, Any]]
    optimizer: Mapping[str, Any]
    data: Mapping[str, Any]
    augment: Mapping[str, Any] | None
    shuffle: bool
    prefetch: int | None
    eval_every_steps: int | None
    eval_batch_size: int | None
    checkpoint_every_steps: int | None
    checkpoint_keep: int
    best_metric: str
    best_mode: str
    log_every_steps: int


def check(config: ConfigDict | Mapping[str, Any]) -> Settings:
    """Checks everything about a config that can be checked without importing jax.

    Raises:
        UserError: naming the key, its value and what it may be.
    """
    config = with_defaults(ConfigDict(config))
    for block in ("model", "loss", "optimizer", "data"):
        if not isinstance(config.get(block), ConfigDict) or "target" not in config[block]:
            raise UserError(
                f"config.{block} has no target",
                f'set config.{block}.target="package.module:attribute"',
            )
    for name, metric in config.metrics.items():
        if not isinstance(metric, ConfigDict) or "target" not in metric:
            raise UserError(f"config.metrics.{name} has no target")

    def positive(where: str, *, optional: bool = False) -> int | None:
        value: Any = config
        for part in where.split("."):
            value = value[part]
        if value is None and optional:
            return None
        if not isinstance(value, int) or value < 1:
            raise UserError(f"config.{where}={value} should be a whole number of at least 1")
        return value

    def one_of(where: str, value: str, choices: tuple[str, ...]) -> str:
        if value not in choices:
            raise UserError(f"config.{where}={value!r} is not one of {', '.join(choices)}")
        return value

    if config.num_steps is None and config.num_epochs is None:
        raise UserError("neither config.num_steps nor config.num_epochs is set", "set one of them")
    lift, _, shards = config.lift.partition(":")
    one_of("lift", lift, LIFTS)
    if shards and (lift != "vmap" or not shards.isdigit() or int(shards) < 1):
        raise UserError(
            f"config.lift={config.lift!r}: only vmap takes a number of shards",
            'write "vmap:8" to simulate 8 chips on one',
        )
    prefetch = config.data.prefetch
    if prefetch is not None and prefetch < 0:
        raise UserError(f"config.data.prefetch={prefetch} should be 0 or more")
    data = config.data.to_dict()
    global_batch_size = positive("global_batch_size")
    steps_per_call = positive("steps_per_call")
    checkpoint_keep = positive("checkpoint.keep")
    log_every_steps = positive("log_every_steps")
    assert global_batch_size and steps_per_call and checkpoint_keep and log_every_steps
    return Settings(
        config=config,
        seed=config.seed,
        num_epochs=positive("num_epochs", optional=True),
        num_steps=positive("num_steps", optional=True),
        stop_at_step=positive("stop_at_step", optional=True),
        global_batch_size=global_batch_size,
        steps_per_call=steps_per_call,
        lift=config.lift,
        reduce=one_of("reduce", config.reduce, REDUCES),
        model=config.model.to_dict(),
        loss=config.loss.to_dict(),
        metrics=config.metrics.to_dict(),
        optimizer=config.optimizer.to_dict(),
        data={key: value for key, value in data.items() if key not in STREAM_KEYS},
        augment=data.get("augment"),
        shuffle=config.data.shuffle,
        prefetch=prefetch,
        eval_every_steps=positive("eval.every_steps", optional=True),
        eval_batch_size=positive("eval.batch_size", optional=True),
        checkpoint_every_steps=positive("checkpoint.every_steps", optional=True),
        checkpoint_keep=checkpoint_keep,
        best_metric=config.checkpoint.best_metric,
        best_mode=one_of("checkpoint.best_mode", config.checkpoint.best_mode, ("min", "max")),
        log_every_steps=log_every_steps,
    )


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"model.hidden_size": 10, ...}`: one entry a leaf, in the order of the config."""
    flat: dict[str, Any] = {}
    for key in config:
        value = config[key]
        if isinstance(value, (ConfigDict, dict)) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
