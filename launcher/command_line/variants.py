"""The variants of a sweep: what `get_sweep()` of a config file yields, with a folder for each."""

from __future__ import annotations

import contextlib
import inspect
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from launcher.command_line.config_file import errors_in_file, run_file
from launcher.command_line.overrides import hint_for_key
from launcher.command_line.parse import take_flag
from trainer.config.keys import with_defaults
from trainer.errors import UserError

# Characters of a folder's name, which is also the run's name in TensorBoard.
_LONGEST_NAME = 80


@dataclass(frozen=True)
class Variant:
    """One run of a sweep.

    Attributes:
        index: counted from 0.
        overrides: new values, by key of the config.
        name: the name of its folder, which depends on the index and the values only.
    """

    index: int
    overrides: Mapping[str, Any]
    name: str

    def folder(self, workdir: str) -> str:
        """The run's folder. `workdir` is the folder of the sweep, or already that of the run."""
        if not workdir.strip() or os.path.basename(workdir.rstrip("/")) == self.name:
            return workdir
        return os.path.join(workdir, self.name)

    def apply(self, config: ConfigDict, given: Sequence[str]) -> None:
        """Changes a config in place; references to a changed field follow.

        Args:
            config: the config of the file, with defaults.
            given: keys that the command line overrides as well.

        Raises:
            UserError: a key is unknown, has another type, or is in `given` too.
        """
        for key, value in self.overrides.items():
            both = [other for other in given if _is_within(key, other) or _is_within(other, key)]
            if both:
                raise UserError(
                    f"--config.{both[0]}: run {self.index} of the sweep sets {key} itself",
                    "leave it out, here or in get_sweep()",
                )
            hint = hint_for_key(config, key)
            if hint:
                raise UserError(f"run {self.index} of the sweep: there is no key {key}", hint)
            try:
                _set(config, key, value)
            except TypeError as error:
                kind = type(_get(config, key)).__name__
                raise UserError(
                    f"run {self.index} of the sweep: {key}={value!r} should be of type {kind}"
                ) from error
        with_defaults(config)  # for a block that was replaced


def read_variants(spec: str) -> list[Variant]:
    """The variants that a config file, FILE or FILE:ARG, defines.

    Raises:
        UserError: the file defines no get_sweep(), or it yields something other than dicts.
    """
    path, arguments, module = run_file(spec)
    get_sweep = getattr(module, "get_sweep", None)
    if get_sweep is None:
        raise UserError(
            f"--config={spec}: {path} defines no get_sweep()",
            'a function that yields dicts such as {"optimizer.learning_rate": 0.1, "seed": 1}',
        )
    with errors_in_file(spec, path):
        try:
            inspect.signature(get_sweep).bind(*arguments)
        except TypeError:  # it may ignore the argument that get_config() takes
            arguments = []
        found = get_sweep(*arguments)
        found = list(found) if hasattr(found, "__iter__") else [found]
    if not found:
        raise UserError(f"--config={spec}: get_sweep() yields no run")
    for index, overrides in enumerate(found):
        if not isinstance(overrides, Mapping) or not all(isinstance(key, str) for key in overrides):
            raise UserError(
                f"--config={spec}: run {index} of get_sweep() is a {type(overrides).__name__}",
                'yield dicts such as {"optimizer.learning_rate": 0.1, "seed": 1}',
            )
    plain = [{key: _plain(value) for key, value in overrides.items()} for overrides in found]
    short = short_keys([key for overrides in plain for key in overrides])
    return [Variant(i, overrides, _name(i, overrides, short)) for i, overrides in enumerate(plain)]


def chosen_run(argv: Sequence[str]) -> Variant | None:
    """The variant that `--sweep_index` names; None without that flag, or if it is not a number."""
    numbers, specs = take_flag("sweep_index", argv)[0], take_flag("config", argv)[0]
    if not numbers or not specs or not (numbers[-1].isascii() and numbers[-1].isdigit()):
        return None
    variants, index = read_variants(specs[0]), int(numbers[-1])
    if index >= len(variants):
        raise UserError(
            f"--sweep_index={index}: the sweep has {len(variants)} runs, from 0 to "
            f"{len(variants) - 1}"
        )
    return variants[index]


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """The last part of each key, with as many parts before it as make it unique."""
    short = {}
    for key in keys:
        parts = key.split(".")
        for count in range(1, len(parts) + 1):
            short[key] = ".".join(parts[-count:])
            if all(other == key or not f".{other}".endswith(f".{short[key]}") for other in keys):
                break
    return short


def show_value(value: Any) -> str:
    """A value as short text."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _name(index: int, overrides: Mapping[str, Any], short: Mapping[str, str]) -> str:
    shown = []
    for key, value in overrides.items():
        text = re.sub(r"[^\w.+-]+", "_", show_value(value), flags=re.ASCII).strip("_")
        shown.append(f"{short[key]}={text}")
    return f"{index:02d}-{','.join(shown) or 'unchanged'}"[:_LONGEST_NAME].rstrip(",=_. ")


def _plain(value: Any) -> Any:
    """A value as configs hold it: numpy's numbers become Python's, lists become tuples."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(_plain(inner) for inner in value)
    return value.item() if hasattr(value, "item") and getattr(value, "shape", None) == () else value


def _is_within(block: str, key: str) -> bool:
    """Whether a key is the block itself or inside it."""
    return key == block or key.startswith((f"{block}.", f"{block}["))


def _get(config: ConfigDict, key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config


def _set(config: ConfigDict, key: str, value: Any) -> None:
    block, _, name = key.rpartition(".")
    inner = _get(config, block) if block else config
    if isinstance(value, Mapping):
        value = ConfigDict(value)
    # A schedule may replace a number, and an optimizer another one.
    is_block = isinstance(value, ConfigDict) or isinstance(inner[name], ConfigDict)
    with inner.unlocked(), inner.ignore_type() if is_block else contextlib.nullcontext():
        inner[name] = value
