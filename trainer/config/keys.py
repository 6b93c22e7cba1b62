"""The keys of a config, their defaults and their meanings."""

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
# How a leaf of the state can differ from the checkpoint.
LEAF_CHANGES = ("shape", "dtype", "missing", "extra")

# Keys of `data` that configure the stream of batches; the target does not receive them.
STREAM_KEYS = ("augment", "prefetch", "shuffle")

# Keys that may be None although their default is not.
OR_NONE = ("checkpoint.every_steps",)

RESERVED_METRICS = (
    "loss",
    "grad_norm",
    "learning_rate",
    "loss_scale",
    "examples_per_second",
    "step_seconds",
)

# Keys that may change on a resume: they set how long the run is, how often something happens, on
# which devices, or how failures are handled. A trailing dot stands for all keys with that prefix.
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
    # Only a fresh run reads these.
    "init_from",
    "init_map",
    # These do not change the numbers: docs/numbers.md.
    "lift",
    "state_sharding",
    "reduce",
    "steps_per_call",
    "data.prefetch",
)


# Every key that has a default: its default and its meaning. A type instead of a default stands for
# None, or a value of that type. The blocks that name code (model, loss, data, optimizer) have none.
KEYS: dict[str, tuple[Any, str]] = {
    "seed": (
        0,
        "seeds the parameters, the order of examples, augmentation and dropout; from 0 to 2³² - 1",
    ),
    "num_epochs": (int, "length of the run in epochs; the remainder of an epoch is dropped"),
    "num_steps": (int, "length of the run in steps; overrides `num_epochs`"),
    "stop_at_step": (int, "stop after this step; schedules still extend over the full run"),
    "global_batch_size": (
        int,
        "examples per step over all devices; must be divisible by the number of devices",
    ),
    "steps_per_call": (
        1,
        "steps per dispatch (one `lax.scan`); each `every_steps` is rounded up to a multiple",
    ),
    "lift": ("pmap", '"pmap", "shard_map" or "vmap"; "vmap:8" simulates 8 shards on one device'),
    "state_sharding": (
        "replicated",
        'replicate the state on all devices, or shard the optimizer state ("zero1"), or the params '
        'too ("fsdp"); sharding needs `lift="shard_map"`',
    ),
    "devices_per_process": (int, "use only this many devices of each process; None: all"),
    "reduce": (
        "auto",
        'all-reduce gradients, float state and metrics in one buffer ("flat") or leaf by leaf '
        '("leaves"); "auto": flat on CPU, leaves elsewhere',
    ),
    "precision": (
        "model",
        'compute in "bf16", in "fp16" (with a dynamic loss scale), or as the model does ("model")',
    ),
    "grad_accum_steps": (
        1,
        "split each device's examples of a step into this many microbatches, to save the memory of "
        "activations",
    ),
    "clip_norm": (float, "clip the gradient to this 2-norm; None: no clipping"),
    "ema_decay": (
        float,
        "decay per step of a moving average of the params (0.999, for example), which is evaluated "
        "and saved; None: no average",
    ),
    "mixup": (0.0, "alpha of mixup, which blends pairs of examples by Beta(alpha, alpha); 0: off"),
    "init_from": (
        str,
        "initialise the params and model state of a fresh run from this run (its folder) or from "
        "one of its checkpoints (`RUN/best`, `RUN/checkpoints/120`)",
    ),
    "init_map": (
        "",
        "renamings for `init_from`, separated by commas: `old->new` renames a part of the model, "
        "`!part` keeps the fresh initialisation of a part",
    ),
    "freeze": ("", "parts of the params not to train, separated by commas, for example `Dense_0`"),
    "log_every_steps": (100, "steps between log rows"),
    "model_table": (0, "print a table of the model's modules, this many levels deep; 0: none"),
    "nan": ("stop", 'if the loss or gradient is not finite: "stop" the run, or "skip" the update'),
    "nan_limit": (10, 'how many updates a run may skip under `nan="skip"`'),
    "replica_check_every_steps": (
        1000,
        "steps between checks that all devices hold the same state; each save checks it too",
    ),
    "eval.every_steps": (int, "steps between evaluations; None: one epoch"),
    "eval.batch_size": (
        int,
        "examples per evaluation step, rounded up to fill all devices; None: `global_batch_size`",
    ),
    "checkpoint.every_steps": (1000, "steps between checkpoints; None: one at the end only"),
    "checkpoint.allow": (
        "",
        "differences from the checkpoint to accept on a resume, separated by commas: config keys, "
        "shape, dtype, missing or extra for leaves of the state, and data for other examples",
    ),
    "checkpoint.max_failures": (5, "stop the run after this many failed saves in a row"),
    "checkpoint.fast_every_secs": (5.0, "seconds between in-memory checkpoints; 0: none"),
    "checkpoint.fast_max_gb": (
        16.0,
        "make no in-memory checkpoints if two of them are larger than this, in GB",
    ),
    "checkpoint.fast_dir": (
        "/dev/shm",  # noqa: S108 (what is in it is the user's own, and checked)
        "folder of the in-memory checkpoints, on a file system in memory",
    ),
    "checkpoint.keep": (3, "how many of the newest checkpoints to keep"),
    "checkpoint.best_metric": ("eval/loss", "the metric that decides which state `best/` keeps"),
    "checkpoint.best_mode": ("min", 'whether lower ("min") or higher ("max") is better'),
    "early_stop.patience": (
        int,
        "stop after this many evaluations in a row that do not improve `checkpoint.best_metric`; "
        "None: never",
    ),
    "early_stop.min_delta": (0.0, "the smallest change that counts as an improvement"),
    "summaries.stragglers": (
        False,
        "at each log row, compare the time per step of all ranks and name a rank that slows down "
        "the others",
    ),
    "summaries.histograms_every_steps": (
        int,
        "steps between histograms of the params and their gradients; None: none",
    ),
    "summaries.images": (0, "show this many held-out examples at the first evaluation"),
    "summaries.confusion": (
        False,
        "compute a confusion matrix at each evaluation, in a second pass over the data",
    ),
    "data.shuffle": (True, "visit the training examples in a new order each epoch"),
    "data.prefetch": (
        int,
        "batches that a thread prepares ahead; None: 2 on accelerators, 0 on CPU",
    ),
}


def defaults() -> ConfigDict:
    """A config with every key that has a default."""
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
    """Adds the missing keys of `defaults()` to a config and locks it.

    It changes the config in place, so that references between fields (`config.get_ref`) stay alive
    and follow later overrides.

    Returns:
        The same config.

    Raises:
        UserError: a key is unknown, or a value has another type than its default.
    """
    known = [*defaults(), "model", "loss", "optimizer"]
    for key in config:
        if key not in known:
            otherwise = "put settings of your own in config.model, .loss, .data or .optimizer"
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
                config[key] = placeholder(expected)  # which gives overrides a type
            elif isinstance(template[key], ConfigDict) and isinstance(config[key], ConfigDict):
                _add_missing(config[key], template[key], name)
            elif expected is float and type(config[key]) is int:
                config[key] = float(config[key])
            elif not isinstance(config[key], expected) and not (
                config[key] is None and may_be_none
            ):
                raise UserError(f"{name}={config[key]!r} should be of type {expected.__name__}")


def hint_for(name: str, known: Sequence[str], prefix: str, otherwise: str) -> str:
    """A hint for an unknown name: the closest known one, or `otherwise`."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {prefix}{near[0]}?" if near else otherwise


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"model.hidden_size": 10, ...}`: one entry per leaf, in the order of the config."""
    flat: dict[str, Any] = {}
    for key in config:
        value = config[key]
        if isinstance(value, (ConfigDict, dict)) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
