"""Reading a command line, of any of the commands. Nothing here imports jax."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import inspect
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags import config_path

from trainer.config.keys import flatten, with_defaults
from trainer.errors import UserError

# What `python -m launcher` takes in place of flags.
COMMANDS = ("env", "eval", "export", "plan", "predict", "report")

# Flags by name: how each is defined, its default and its lowest value.
Flags = Mapping[str, tuple[Any, Any, float | None]]


# How Python's messages about the value of a flag begin, and what is meant.
_MEANT = {
    "invalid literal for int()": "not an integer",
    "could not convert string to float": "not a number",
    "('Non-boolean argument": "neither True nor False",
}


@dataclass(frozen=True)
class Command:
    """A command line that names a config, split up.

    Attributes:
        path: of the config file.
        spec: the value of --config, FILE or FILE:ARG.
        config: the config, with all overrides and defaults in it.
        flags: the value of every other flag.
    """

    path: Path
    spec: str
    config: ConfigDict
    flags: dict[str, Any]


def read_command(
    argv: Sequence[str],
    defined: Flags,
    otherwise: Callable[[Sequence[str]], tuple[str, ConfigDict]] | None = None,
    change: Callable[[ConfigDict, Sequence[str]], None] | None = None,
) -> Command:
    """Reads `--config`, its overrides and the given flags; anything else is a UserError.

    Args:
        argv: what to call the program in messages, and its arguments.
        defined: the flags beside --config, by name.
        otherwise: gives a config, and what to call it, where there is no --config; called with the
            other arguments. Where None, --config has to be there.
        change: changes the config before the overrides do; called with it and with their keys.
    """
    found, rest = take_flag("config", argv)
    if len(found) > 1:
        raise UserError("--config is given twice")
    if found and found[0]:
        spec = found[0]
        path, config = load_config(spec)
    else:
        _check_flags(rest, defined)
        if otherwise is None:
            raise _missing_config(rest)
        spec, config = otherwise(rest)
        path = Path(spec)
    if change is not None:
        change(config, overridden_keys(rest))
    nones, rest = _take_nones(rest)
    _check_keys(config, [*nones, *overridden_keys(rest)])
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=rest)
        left = _read_flags(rest, defined, values)
        for key in nones:
            config_path.set_value(key, config, None)
        with_defaults(config)  # says which of them cannot be None
    except flags.UnrecognizedFlagError as error:
        raise _unknown_flag(error.flagname, ["config", *defined]) from error
    except (flags.Error, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(_wrong_value(error), "see --help and --print_config") from error
    _check_keys(config, overridden_keys(rest))  # not within what is None now
    if left:
        near = difflib.get_close_matches(left[0], COMMANDS, n=1)
        hint = f"did you mean the command {near[0]}?" if near else "flags are written --name=value"
        raise UserError(f"unexpected argument {left[0]!r}", hint)
    return Command(path, spec, config, {name: values[name].value for name in defined})


def read_arguments(argv: Sequence[str], defined: Flags) -> tuple[list[str], dict[str, Any]]:
    """Reads a command line without a config: its arguments, and the value of every flag.

    Args:
        argv: what to call the program in messages, and its arguments.
        defined: the flags, by name.

    Raises:
        UserError: for anything a person got wrong.
    """
    values = flags.FlagValues()
    values.set_gnu_getopt()  # flags may come after arguments
    try:
        arguments = _read_flags(argv, defined, values)
    except flags.UnrecognizedFlagError as error:
        raise _unknown_flag(error.flagname, [*defined]) from error
    except (flags.Error, ValueError) as error:
        raise UserError(_wrong_value(error), "see --help") from error
    return arguments, {name: values[name].value for name in defined}


def _read_flags(argv: Sequence[str], defined: Flags, values: flags.FlagValues) -> list[str]:
    """Defines and reads flags; returns the other arguments."""
    for name, (define, default, lowest) in defined.items():
        bound = {} if lowest is None else {"lower_bound": lowest}
        define(name, default, "", flag_values=values, **bound)
    return list(values(argv)[1:])


def take_flag(name: str, argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The values that a flag is given, and the arguments without it."""
    found: list[str] = []
    rest: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        match = re.fullmatch(rf"--?{name}(?:=(.*))?", argument, re.DOTALL)
        if match is None:
            rest.append(argument)
        else:
            found.append(match[1] if match[1] is not None else next(arguments, ""))
    return found, rest


def _take_nones(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The keys of the config whose last override is None, and the arguments without these.

    `config_flags` reads it as a number, or as the text "None".
    """
    is_none: dict[str, bool] = {}
    rest: list[str] = []
    left = [*argv]
    while left:
        argument = left.pop(0)
        match = re.fullmatch(r"--?(?:no)?config\.([^=]+)(?:=(.*))?", argument, re.DOTALL)
        if match:
            key, value = match.groups()
            if value is None and left[:1] == ["None"]:
                value = left.pop(0)
            is_none[key] = value == "None"
            if is_none[key]:
                continue
        rest.append(argument)
    return [key for key, none in is_none.items() if none], rest


def _check_flags(argv: Sequence[str], defined: Flags) -> None:
    """Raises a UserError for the first flag that there is not, which needs no config."""
    known = ("config.", "noconfig.", *defined, *(f"no{name}" for name in defined))
    for argument in argv[1:]:
        if argument.startswith("-") and not argument.lstrip("-").startswith(known):
            raise _unknown_flag(argument.lstrip("-").split("=")[0], ["config", *defined])


def _missing_config(argv: Sequence[str]) -> UserError:
    first = argv[1] if len(argv) > 1 else ""
    near = difflib.get_close_matches(first, COMMANDS, n=1)
    if near:
        return UserError(f"there is no command {first!r}", f"did you mean {near[0]}?")
    if first and not first.startswith("-"):
        return UserError("--config is missing", f"did you mean --config={first}?")
    files = ", ".join(str(path) for path in sorted(Path("configs").glob("*.py"))[:8])
    return UserError(
        "--config is missing",
        f"--config=FILE; here are {files}" if files else "--config=FILE, see --help",
    )


def _unknown_flag(name: str, known: Sequence[str]) -> UserError:
    near = difflib.get_close_matches(name, [*known, "help"], n=1)
    return UserError(
        f"there is no flag --{name}", f"did you mean --{near[0]}?" if near else "see --help"
    )


def load_config(spec: str) -> tuple[Path, ConfigDict]:
    """Runs a config file; returns its path and the config with all defaults filled in."""
    path, arguments, module = run_file(spec)
    name, colon, _ = spec.partition(":")
    with errors_in_file(spec, path):
        get_config = getattr(module, "get_config", None)
        if get_config is None:
            raise UserError(f"--config={spec}: {name} defines no get_config()")
        try:
            inspect.signature(get_config).bind(*arguments)
        except TypeError as error:
            wants = "takes no argument after the file" if colon else "needs an argument"
            raise UserError(
                f"--config={spec}: get_config() {wants}",
                f"--config={name}{'' if colon else ':ARG'}",
            ) from error
        config = get_config(*arguments)
    if not isinstance(config, ConfigDict):
        if not isinstance(config, dict):
            raise UserError(
                f"--config={spec}: get_config() returned a {type(config).__name__}",
                "return an ml_collections.ConfigDict",
            )
        config = ConfigDict(config)
    return path, with_defaults(config)


def run_file(spec: str) -> tuple[Path, list[str], ModuleType]:
    """Runs a config file, FILE or FILE:ARG; returns its path, [] or [ARG], and what it defines."""
    name, colon, argument = spec.partition(":")
    path = Path(name)
    if path.is_dir():
        raise UserError(f"--config={spec}: {name} is a folder", "name a file with get_config()")
    if not path.is_file():
        others = [str(other) for other in path.parent.glob("*.py")]
        near = difflib.get_close_matches(str(path), others, n=1, cutoff=0.75)
        raise UserError(
            f"--config={spec}: there is no file {name}",
            f"did you mean {near[0]}?" if near else f"the current folder is {Path.cwd()}",
        )
    module_spec = importlib.util.spec_from_file_location("podlift_config", path)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"--config={spec}: {name} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    with errors_in_file(spec, path):
        module_spec.loader.exec_module(module)
    return path, [argument] if colon else [], module


@contextlib.contextmanager
def errors_in_file(spec: str, path: Path) -> Iterator[None]:
    """Whatever a user's file does becomes a UserError that names the line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"--config={spec}: {type(error).__name__}: {_first_line(error)}{_line_in(error, path)}"
        ) from error


def _line_in(error: BaseException, path: Path) -> str:
    """` (line N)`, the last line of the file that took part in an error."""
    if isinstance(error, SyntaxError) and error.lineno:
        return f" (line {error.lineno})"
    lines = []
    trace = error.__traceback__
    while trace is not None:
        if os.path.abspath(trace.tb_frame.f_code.co_filename) == os.path.abspath(path):
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return f" (line {lines[-1]})" if lines else ""


def overridden_keys(argv: Sequence[str]) -> list[str]:
    """The keys of the config that arguments change."""
    matches = (re.match(r"--?(?:no)?config\.([^=]+)", argument) for argument in argv[1:])
    return [match[1] for match in matches if match]


def _check_keys(config: ConfigDict, keys: Sequence[str]) -> None:
    """Raises a UserError for the first override of a key that the config lacks."""
    for key in keys:
        hint = unknown_key(config, key, "--config.")
        if hint:
            raise UserError(f"--config.{key}: the config has no such key", hint)


def unknown_key(config: ConfigDict, key: str, prefix: str = "") -> str:
    """Empty for a key of the config, or a block of keys; else what it may have been meant to be."""
    leaves = list(flatten(config))
    blocks = {leaf[:i] for leaf in leaves for i in range(len(leaf)) if leaf[i] == "."}
    if key in blocks or key in leaves:
        return ""
    block, _, name = key.rpartition(".")
    siblings = [leaf for leaf in leaves if leaf.rpartition(".")[0] == block]
    names = [leaf.rpartition(".")[2] for leaf in siblings]
    if "target" in names and not difflib.get_close_matches(name, names, n=1, cutoff=0.6):
        # It may well be what the target takes: overrides change what a file names.
        return (
            f"config.{block} has {', '.join(names)}; another keyword of its target goes in the file"
        )
    near = difflib.get_close_matches(key, leaves, n=1, cutoff=0.6) or [
        leaf for leaf in leaves if leaf.split(".")[-1] == name
    ]
    if near:
        return f"did you mean {prefix}{near[0]}?"
    return f"its keys there are {', '.join(siblings or leaves)}"


def _wrong_value(error: Exception) -> str:
    """What absl says about the value of a flag, in other words where it has only Python's."""
    message = _first_line(error).removeprefix("flag ")
    for pythons, ours in _MEANT.items():
        flag, found, _ = message.partition(f": {pythons}")
        if found:
            return f"{flag}: {ours}"
    return message


def _first_line(error: Any) -> str:
    if isinstance(error, SyntaxError):
        return error.msg
    message = error.args[0] if isinstance(error, KeyError) and error.args else str(error)
    return (str(message).strip().splitlines() or [type(error).__name__])[0]
