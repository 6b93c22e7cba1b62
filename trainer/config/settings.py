"""The checks of a config that need no jax, and their result."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from trainer.config.keys import (
    LEAF_CHANGES,
    LIFTS,
    NANS,
    PRECISIONS,
    REDUCES,
    RESERVED_METRICS,
    STATE_SHARDINGS,
    STREAM_KEYS,
    flatten,
    hint_for,
    with_defaults,
)
from trainer.errors import UserError

# The step of a state is an int32.
MOST_STEPS = 2**31 - 1


@dataclass(frozen=True)
class Settings:
    """A checked config. Blocks that name code stay plain dicts; `trainer.step.job` builds them."""

    config: ConfigDict
    seed: int
    num_epochs: int | None
    num_steps: int | None
    stop_at_step: int | None
    global_batch_size: int
    steps_per_call: int
    lift: str
    state_sharding: str
    devices_per_process: int | None
    reduce: str
    precision: str
    grad_accum_steps: int
    clip_norm: float | None
    ema_decay: float | None
    mixup: float
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
    allow: tuple[str, ...]
    max_failures: int
    fast_every_secs: float
    fast_max_gb: float
    fast_dir: str
    best_metric: str
    best_mode: str
    model_table: int
    early_stop_patience: int | None
    early_stop_min_delta: float
    init_from: str | None
    init_map: tuple[str, ...]
    freeze: tuple[str, ...]
    nan: str
    nan_limit: int
    replica_check_every_steps: int
    log_every_steps: int
    stragglers: bool
    histograms_every_steps: int | None
    images: int
    confusion: bool


def check(config: ConfigDict | Mapping[str, Any]) -> Settings:
    """Checks a config as far as possible without importing jax.

    Args:
        config: may leave out every key that has a default; it is not changed.

    Raises:
        UserError: names the key, its value and the values it can have.
    """
    config = with_defaults(copy.deepcopy(ConfigDict(config)))
    for block in ("model", "loss", "optimizer", "data"):
        if not isinstance(config.get(block), ConfigDict) or "target" not in config[block]:
            raise UserError(
                f"config.{block} has no target",
                f'set config.{block}.target="package.module:attribute"',
            )
    for name, metric in config.metrics.items():
        if not isinstance(metric, ConfigDict) or "target" not in metric:
            raise UserError(f"config.metrics.{name} has no target")
        if name in RESERVED_METRICS:
            raise UserError(
                f"config.metrics.{name}: podlift itself reports a metric of this name", "rename it"
            )
    measured = ["eval/loss", *(f"eval/{name}" for name in config.metrics)]
    if config.checkpoint.best_metric not in measured:
        raise UserError(
            f"config.checkpoint.best_metric={config.checkpoint.best_metric!r} is not measured",
            f"it can be {' or '.join(measured)}",
        )
    flat = flatten(config)
    for where, value in flat.items():
        block = where.rpartition(".")[0]
        is_ours = not block or str(flat.get(f"{block}.target", "trainer.")).startswith("trainer.")
        if is_ours and re.fullmatch(r"(.*[._])?seed", where) and isinstance(value, int):
            check_seed(value, f"config.{where}")

    def positive(where: str) -> int:
        value = flat[where]
        if not isinstance(value, int) or value < 1:
            raise UserError(f"config.{where}={value} should be a whole number of at least 1")
        if value > MOST_STEPS:  # devices count in 32 bits
            raise UserError(f"config.{where}={value} should be at most {MOST_STEPS}")
        return value

    def not_negative(where: str) -> float:
        value = flat[where]
        if not value >= 0:
            raise UserError(f"config.{where}={value} should be 0 or more")
        return float(value)

    def positive_or_none(where: str) -> int | None:
        return None if flat[where] is None else positive(where)

    def within(where: str, most: float) -> float | None:
        value = flat[where]
        if value is not None and not 0 < value < most:
            bounds = "greater than 0" if math.isinf(most) else f"between 0 and {most:g}"
            raise UserError(f"config.{where}={value} should be {bounds}")
        return None if value is None else float(value)

    def one_of(where: str, value: str, choices: tuple[str, ...]) -> str:
        if value not in choices:
            raise UserError(f"config.{where}={value!r} is not one of {', '.join(choices)}")
        return value

    if config.num_steps is None and config.num_epochs is None:
        raise UserError("neither config.num_steps nor config.num_epochs is set", "set one of them")
    lift, _, shards = config.lift.partition(":")
    simulated = lift == "vmap" and shards.isdigit() and int(shards) > 0
    if lift not in LIFTS or (":" in config.lift and not simulated):
        raise UserError(
            f"config.lift={config.lift!r} is not one of {', '.join(LIFTS)}",
            'or "vmap:8", to simulate 8 shards on one device',
        )
    state_sharding = one_of("state_sharding", config.state_sharding, STATE_SHARDINGS)
    if state_sharding != "replicated" and lift != "shard_map":
        raise UserError(
            f"config.state_sharding={state_sharding!r} needs the lift shard_map; "
            f"config.lift is {config.lift!r}",
            "add --config.lift=shard_map, or --config.state_sharding=replicated",
        )
    prefetch = config.data.prefetch
    if prefetch is not None and prefetch < 0:
        raise UserError(f"config.data.prefetch={prefetch} should be 0 or more")
    data = config.data.to_dict()
    return Settings(
        config=config,
        seed=config.seed,
        num_epochs=positive_or_none("num_epochs"),
        num_steps=positive_or_none("num_steps"),
        stop_at_step=positive_or_none("stop_at_step"),
        global_batch_size=positive("global_batch_size"),
        steps_per_call=positive("steps_per_call"),
        lift=config.lift,
        state_sharding=state_sharding,
        devices_per_process=positive_or_none("devices_per_process"),
        reduce=one_of("reduce", config.reduce, REDUCES),
        precision=one_of("precision", config.precision, PRECISIONS),
        grad_accum_steps=positive("grad_accum_steps"),
        clip_norm=within("clip_norm", math.inf),
        ema_decay=within("ema_decay", 1.0),
        mixup=not_negative("mixup"),
        model=config.model.to_dict(),
        loss=config.loss.to_dict(),
        metrics=config.metrics.to_dict(),
        optimizer=config.optimizer.to_dict(),
        data={key: value for key, value in data.items() if key not in STREAM_KEYS},
        augment=data.get("augment"),
        shuffle=config.data.shuffle,
        prefetch=prefetch,
        eval_every_steps=positive_or_none("eval.every_steps"),
        eval_batch_size=positive_or_none("eval.batch_size"),
        checkpoint_every_steps=positive_or_none("checkpoint.every_steps"),
        checkpoint_keep=positive("checkpoint.keep"),
        allow=_allowed(config),
        max_failures=positive("checkpoint.max_failures"),
        fast_every_secs=not_negative("checkpoint.fast_every_secs"),
        fast_max_gb=not_negative("checkpoint.fast_max_gb"),
        fast_dir=config.checkpoint.fast_dir,
        best_metric=config.checkpoint.best_metric,
        best_mode=one_of("checkpoint.best_mode", config.checkpoint.best_mode, ("min", "max")),
        model_table=int(not_negative("model_table")),
        early_stop_patience=positive_or_none("early_stop.patience"),
        early_stop_min_delta=not_negative("early_stop.min_delta"),
        init_from=config.init_from or None,
        init_map=_split(config.init_map),
        freeze=_split(config.freeze),
        nan=one_of("nan", config.nan, NANS),
        nan_limit=positive("nan_limit"),
        replica_check_every_steps=positive("replica_check_every_steps"),
        log_every_steps=positive("log_every_steps"),
        stragglers=config.summaries.stragglers,
        histograms_every_steps=positive_or_none("summaries.histograms_every_steps"),
        images=int(not_negative("summaries.images")),
        confusion=config.summaries.confusion,
    )


def check_seed(seed: int, name: str) -> None:
    """Raises a UserError for a seed that jax would replace by another: it takes 32 bits.

    Args:
        seed: the seed.
        name: what to call it.
    """
    if not 0 <= seed < 2**32:
        raise UserError(
            f"{name}={seed} is not in the range from 0 to {2**32 - 1}",
            f"jax.random.key would take it for {seed % 2**32}; choose a seed in the range",
        )


def _split(text: str) -> tuple[str, ...]:
    """The items of a list with commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _allowed(config: ConfigDict) -> tuple[str, ...]:
    """The items of `checkpoint.allow`, checked."""
    names = _split(config.checkpoint.allow)
    known = [*LEAF_CHANGES]
    for key in flatten(config):
        components = key.split(".")
        known += [".".join(components[:count]) for count in range(1, len(components) + 1)]
    for name in names:
        if name not in known:
            raise UserError(
                f"config.checkpoint.allow: {name!r} is not a key of the config",
                hint_for(
                    name,
                    known,
                    "",
                    f"it can be a key, a block, or one of {', '.join(LEAF_CHANGES)}",
                ),
            )
    return names
