"""The keys of a config, their defaults and what they mean."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from trainer.errors import UserError

LIFTS = ("pmap", "shard_map", "vmap")
STATE_SHARDINGS = ("replicated", "zero1", "fsdp")
REDUCES = ("auto", "flat", "leaves")
NANS = ("stop", "skip")
PRECISIONS = ("model", "bf16", "fp16")
# How a leaf of the state may differ from what was saved.
LEAF_CHANGES = ("shape", "dtype", "missing", "extra")

# Keys of `data` that belong to the order of examples, not to the target that loads them.
STREAM_KEYS = ("augment", "prefetch", "shuffle")

# Keys that may be None though they are not by default.
OR_NONE = ("checkpoint.every_steps",)

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
    "model_table",
    "devices_per_process",
    "checkpoint.",
    "eval.",
    "nan",
    "nan_limit",
    "replica_check_every_steps",
    "early_stop.",
    "summaries.",
    # Of a fresh run only.
    "init_from",
    "init_map",
    # These give the same numbers: docs/numbers.md.
    "lift",
    "state_sharding",
    "reduce",
    "steps_per_call",
    "data.prefetch",
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
    "state_sharding": (
        "replicated",
        'a whole state on each device, or cut over them: the optimizer\'s ("zero1"), or the params '
        'too ("fsdp"); `lift="shard_map"` only',
    ),
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
    "init_from": (
        str,
        "a fresh run begins with the params and model state of this run (its folder) or of one of "
        "its checkpoints (`RUN/best`, `RUN/checkpoints/120`)",
    ),
    "init_map": (
        "",
        "how names there become names here, with commas between: `old->new` renames a part of the "
        "model, `!part` leaves a part as it is initialised",
    ),
    "freeze": ("", "parts of the params that are not trained, with commas between: `Dense_0`, say"),
    "log_every_steps": (100, "steps from one log row to the next"),
    "model_table": (0, "show the model's modules, so many levels of them, before the first step"),
    "nan": ("stop", 'a loss or gradient that is not finite: "stop", or "skip" its update'),
    "nan_limit": (10, "updates that may be skipped in a run"),
    "replica_check_every_steps": (
        1000,
        "steps from one check that all devices hold the same state to the next; also at each save",
    ),
    "eval.every_steps": (int, "steps from one evaluation to the next; None: once an epoch"),
    "eval.batch_size": (
        int,
        "examples a step of it; None: `global_batch_size`; rounded up to fill the devices",
    ),
    "checkpoint.every_steps": (
        1000,
        "steps from one checkpoint to the next; None: only one at the end",
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
    "early_stop.patience": (
        int,
        "evaluations in a row without a better `checkpoint.best_metric` that end the run; None: it "
        "goes on",
    ),
    "early_stop.min_delta": (0.0, "better means better by more than this"),
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
            raise UserError(
                f"config.{key}: no such key", hint_for(key, known, "config.", otherwise)
            )
    _add_missing(config, defaults(), "config")
    return config.lock()


def _add_missing(config: ConfigDict, template: ConfigDict, where: str) -> None:
    with config.unlocked():
        for key in template:
            expected = template.get_type(key)
            name = f"{where}.{key}"
            may_be_none = template[key] is None or name.removeprefix("config.") in OR_NONE
            if key not in config:
                config[key] = placeholder(expected) if template[key] is None else template[key]
            elif config.get_type(key) is type(None) and may_be_none:
                config[key] = placeholder(expected)  # so that an override knows its type
            elif isinstance(template[key], ConfigDict) and isinstance(config[key], ConfigDict):
                _add_missing(config[key], template[key], name)
            elif expected is float and type(config[key]) is int:
                config[key] = float(config[key])
            elif not isinstance(config[key], expected) and not (
                config[key] is None and may_be_none
            ):
                raise UserError(f"{name}={config[key]!r} should be of type {expected.__name__}")


def hint_for(name: str, known: Sequence[str], prefix: str, otherwise: str) -> str:
    """What a mistyped name may have been meant to be."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {prefix}{near[0]}?" if near else otherwise


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
