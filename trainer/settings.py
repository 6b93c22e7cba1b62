"""The keys of a config: their defaults, and the checks that need no import of jax."""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from trainer.errors import UserError

LIFTS = ("pmap", "shard_map", "vmap")
REDUCES = ("auto", "flat", "leaves")
NANS = ("stop", "skip")
PRECISIONS = ("model", "bf16", "fp16")
# How a leaf of the state may differ from what was saved.
LEAF_CHANGES = ("shape", "dtype", "missing", "extra")

# Keys of `data` that belong to the order of examples, not to the target that loads them.
STREAM_KEYS = ("augment", "prefetch", "shuffle")

RESERVED_METRICS = (
    "loss",
    "grad_norm",
    "learning_rate",
    "loss_scale",
    "examples_per_second",
    "step_seconds",
)

# On a resume these may differ from the first run: they set how long, how often, on what or what
# is done about failures. A prefix of a key stands for all keys that begin with it.
RESUMABLE = (
    "num_steps",
    "num_epochs",
    "stop_at_step",
    "log_every_steps",
    "devices_per_process",
    "checkpoint.",
    "eval.",
    "nan",
    "replica_check_every_steps",
    # These give the same numbers: docs/numbers.md.
    "lift",
    "reduce",
    "steps_per_call",
    "data.prefetch",
    "summaries.",
)


# Every key with a default: its default and what it means. A type stands for "None, or a value of
# that type". The four blocks that name code (model, loss, data, optimizer) have no default.
KEYS: dict[str, tuple[Any, str]] = {
    "seed": (0, "of the parameters, the order of examples, augmentation and dropout"),
    "num_epochs": (int, "length of the run in epochs; an epoch's remainder is dropped"),
    "num_steps": (int, "length of the run in steps; where set, it wins over `num_epochs`"),
    "stop_at_step": (int, "stop early; schedules still span the whole run"),
    "global_batch_size": (int, "examples a step, over all devices; must divide by them"),
    "steps_per_call": (1, "steps in one dispatch; all `every_steps` round up to a whole call"),
    "lift": ("pmap", '"pmap", "shard_map" or "vmap"; "vmap:8" simulates 8 chips on one'),
    "devices_per_process": (int, "use only so many devices of each process; None: all"),
    "reduce": (
        "auto",
        'gradients, float state and metrics in one buffer ("flat") or one by one ("leaves"); '
        '"auto" is flat on CPU',
    ),
    "precision": (
        "model",
        'compute in "bf16" or "fp16" (with a loss scale), or as the model itself does ("model")',
    ),
    "grad_accum_steps": (
        1,
        "parts that a device's examples of a step are cut into, to hold one part's activations",
    ),
    "clip_norm": (float, "the largest 2-norm of the gradient, which is scaled down to it"),
    "ema_decay": (float, "of an average of the params, which is evaluated and saved; 0.999, say"),
    "mixup": (0.0, "alpha of mixup: examples are blended in pairs, share Beta(alpha, alpha)"),
    "log_every_steps": (100, "steps from one log row to the next"),
    "nan": ("stop", 'a loss or gradient that is not finite: "stop", or "skip" its update'),
    "nan_limit": (10, "updates that may be skipped in a run"),
    "replica_check_every_steps": (
        1000,
        "steps from one check that all devices hold the same state to the next; also at each save",
    ),
    "eval.every_steps": (int, "steps from one evaluation to the next; None: once an epoch"),
    "eval.batch_size": (int, "None: `global_batch_size`; rounded up to fill the devices"),
    "checkpoint.every_steps": (
        1000,
        "steps from one checkpoint to the next; one is saved at the end",
    ),
    "checkpoint.allow": (
        "",
        "what may differ from what was saved, with commas between: config keys, and shape, dtype, "
        "missing or extra for leaves of the state",
    ),
    "checkpoint.max_failures": (5, "saves that may fail in a row before the run stops"),
    "checkpoint.fast_every_secs": (
        5.0,
        "seconds from one copy of the state in the host's memory to the next; 0: no copies",
    ),
    "checkpoint.fast_max_gb": (16.0, "no copies where two of them would take more than this"),
    "checkpoint.fast_dir": (
        "/dev/shm",  # noqa: S108 (what is in it is the user's own, and checked)
        "where the copies are; a file system in memory",
    ),
    "checkpoint.keep": (3, "how many of the newest to keep"),
    "checkpoint.best_metric": ("eval/loss", "the tag that decides which state is kept in `best/`"),
    "checkpoint.best_mode": ("min", '"min" or "max"'),
    "summaries.stragglers": (
        False,
        "at log rows, compare the ranks' own time a step, and name one that holds up the others",
    ),
    "summaries.histograms_every_steps": (
        int,
        "steps from one histogram of the params and their gradients to the next; None: none",
    ),
    "summaries.images": (0, "how many held-out examples are shown, at the first evaluation"),
    "summaries.confusion": (
        False,
        "at each evaluation, count which class was taken for which (a second pass over the data)",
    ),
    "data.shuffle": (True, "a new order of the training examples each epoch"),
    "data.prefetch": (int, "batches made ahead in a thread; None: 2, and 0 on CPU"),
}


def defaults() -> ConfigDict:
    """A config with every key that has a default; blocks that name code have none."""
    config = ConfigDict({"metrics": {}})
    for key, (default, _) in KEYS.items():
        *blocks, name = key.split(".")
        block = config
        for inner in blocks:
            if inner not in block:
                block[inner] = ConfigDict()
            block = block[inner]
        block[name] = placeholder(default) if isinstance(default, type) else default
    return config


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
            otherwise = "your own settings belong inside config.model, .loss, .data or .optimizer"
            raise UserError(f"config.{key}: no such key", _hint(key, known, "config.", otherwise))
    _add_missing(config, defaults(), "config")
    return config.lock()


def _add_missing(config: ConfigDict, template: ConfigDict, where: str) -> None:
    with config.unlocked():
        for key in template:
            expected = template.get_type(key)
            untyped_none = key in config and config.get_type(key) is type(None)
            if key not in config or (untyped_none and template[key] is None):
                config[key] = placeholder(expected) if template[key] is None else template[key]
            elif isinstance(template[key], ConfigDict) and isinstance(config[key], ConfigDict):
                _add_missing(config[key], template[key], f"{where}.{key}")
            elif expected is float and type(config[key]) is int:
                config[key] = float(config[key])
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
    nan: str
    nan_limit: int
    replica_check_every_steps: int
    log_every_steps: int
    stragglers: bool
    histograms_every_steps: int | None
    images: int
    confusion: bool


def check(config: ConfigDict | Mapping[str, Any]) -> Settings:
    """Checks everything about a config that can be checked without importing jax.

    Raises:
        UserError: naming the key, its value and what it may be.
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
            raise UserError(f"config.metrics.{name}: podlift reports {name} itself", "rename it")
    measured = ["eval/loss", *(f"eval/{name}" for name in config.metrics)]
    if config.checkpoint.best_metric not in measured:
        raise UserError(
            f"config.checkpoint.best_metric={config.checkpoint.best_metric!r} is not measured",
            f"it can be {' or '.join(measured)}",
        )
    if config.seed < 0:
        raise UserError(f"config.seed={config.seed} should be 0 or more")
    flat = flatten(config)

    def positive(where: str) -> int:
        value = flat[where]
        if not isinstance(value, int) or value < 1:
            raise UserError(f"config.{where}={value} should be a whole number of at least 1")
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
            to = "over 0" if math.isinf(most) else f"between 0 and {most:g}"
            raise UserError(f"config.{where}={value} should be {to}")
        return value

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
            'or "vmap:8", to simulate 8 chips on one',
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
        nan=one_of("nan", config.nan, NANS),
        nan_limit=positive("nan_limit"),
        replica_check_every_steps=positive("replica_check_every_steps"),
        log_every_steps=positive("log_every_steps"),
        stragglers=config.summaries.stragglers,
        histograms_every_steps=positive_or_none("summaries.histograms_every_steps"),
        images=int(not_negative("summaries.images")),
        confusion=config.summaries.confusion,
    )


def _hint(name: str, known: Sequence[str], prefix: str, otherwise: str) -> str:
    """What a mistyped name may have been meant to be."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {prefix}{near[0]}?" if near else otherwise


def _allowed(config: ConfigDict) -> tuple[str, ...]:
    """The parts of `checkpoint.allow`."""
    names = tuple(name.strip() for name in config.checkpoint.allow.split(",") if name.strip())
    known = [*LEAF_CHANGES]
    for key in flatten(config):
        parts = key.split(".")
        known += [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    for name in names:
        if name not in known:
            raise UserError(
                f"config.checkpoint.allow names {name!r}, which is no key of the config",
                _hint(name, known, "", f"keys, or parts of them, and {', '.join(LEAF_CHANGES)}"),
            )
    return names


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
