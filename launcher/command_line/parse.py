"""Reads the command line of any command. Nothing here imports jax."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags import config_path

from launcher.command_line.config_file import load_config, message_of
from launcher.command_line.overrides import check_keys, overridden_keys, refuse_lists, take_nones
from trainer.config.keys import with_defaults
from trainer.errors import UserError

# By name: absl's function that defines the flag, the default, the lowest value allowed.
Flags = Mapping[str, tuple[Any, Any, float | None]]

# How Python's messages about the value of a flag begin, and how ours put it.
_PLAINLY = {
    "invalid literal for int()": "not an integer",
    "could not convert string to float": "not a number",
    "('Non-boolean argument": "neither True nor False",
}


def expand_flagfiles(argv: Sequence[str]) -> list[str]:
    """The arguments with each `--flagfile=FILE` replaced by the lines of that file.

    The format is absl's: one argument a line, which is not split or unquoted; lines that begin with
    # or // and empty lines are skipped; a file may name another.

    Raises:
        UserError: a file cannot be read.
    """
    try:
        return list(flags.FlagValues().read_flags_from_files(argv))  # type: ignore[no-untyped-call]
    except (flags.Error, UnicodeDecodeError, RecursionError) as error:
        message = message_of(error).removeprefix("ERROR:: ")
        raise UserError(f"--flagfile: {message}", "--flagfile=FILE, one flag a line") from error


@dataclass(frozen=True)
class CommandLine:
    """A parsed command line that names a config.

    Attributes:
        path: the config file.
        spec: the value of --config, FILE or FILE:ARG.
        config: the config, with overrides and defaults applied.
        flags: the value of every other flag, by name.
    """

    path: Path
    spec: str
    config: ConfigDict
    flags: dict[str, Any]


def read_command(
    argv: Sequence[str],
    defined: Flags,
    *,
    default_config: Callable[[Sequence[str]], tuple[str, ConfigDict]] | None = None,
    change: Callable[[ConfigDict, Sequence[str]], None] | None = None,
    commands: Sequence[str] = (),
) -> CommandLine:
    """Reads `--config`, its overrides and the given flags.

    Args:
        argv: the name that messages use for the program, and its arguments.
        defined: the flags other than --config.
        default_config: returns a path and a config when --config is missing. Called with `argv`.
            None makes --config required.
        change: changes the config before the overrides apply. Called with the config and the keys
            that the command line overrides.
        commands: names that a mistyped argument may have meant.

    Raises:
        UserError: an argument, a flag, a key or the config file is wrong.
    """
    found, rest = take_flag("config", argv)
    if len(found) > 1:
        raise UserError("--config is given twice")
    if found and found[0]:
        spec = found[0]
        path, config = load_config(spec)
    else:
        _check_flags(rest, defined)
        if default_config is None:
            raise _missing_config(rest, commands)
        spec, config = default_config(rest)
        path = Path(spec)
    if change is not None:
        change(config, overridden_keys(rest))
    nones, rest = take_nones(rest)
    check_keys(config, [*nones, *overridden_keys(rest)])
    refuse_lists(config, overridden_keys(rest))
    values = flags.FlagValues()  # type: ignore[no-untyped-call]
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=rest)
        left = _read_flags(rest, defined, values)
        for key in nones:
            config_path.set_value(key, config, None)
        with_defaults(config)  # raises for a key that cannot be None
    except flags.UnrecognizedFlagError as error:
        raise _unknown_flag(error.flagname, ["config", *defined]) from error
    except (flags.Error, ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(_wrong_value(error), "see --help and --print_config") from error
    check_keys(config, overridden_keys(rest))  # again: a block may be None by now
    if left:
        near = difflib.get_close_matches(left[0], commands, n=1)
        hint = f"did you mean the command {near[0]}?" if near else "flags are written --name=value"
        raise UserError(f"unexpected argument {left[0]!r}", hint)
    return CommandLine(path, spec, config, {name: values[name].value for name in defined})


def read_arguments(argv: Sequence[str], defined: Flags) -> tuple[list[str], dict[str, Any]]:
    """Reads a command line without a config.

    Args:
        argv: the name that messages use for the program, and its arguments.
        defined: the flags.

    Returns:
        The positional arguments, and the value of every flag.

    Raises:
        UserError: a flag or its value is wrong.
    """
    values = flags.FlagValues()  # type: ignore[no-untyped-call]
    values.set_gnu_getopt()  # flags may come after arguments
    try:
        arguments = _read_flags(argv, defined, values)
    except flags.UnrecognizedFlagError as error:
        raise _unknown_flag(error.flagname, [*defined]) from error
    except (flags.Error, ValueError) as error:
        raise UserError(_wrong_value(error), "see --help") from error
    return arguments, {name: values[name].value for name in defined}


def _read_flags(argv: Sequence[str], defined: Flags, values: flags.FlagValues) -> list[str]:
    """Defines flags and parses them; returns the positional arguments."""
    for name, (define, default, lowest) in defined.items():
        bound = {} if lowest is None else {"lower_bound": lowest}
        define(name, default, "", flag_values=values, **bound)
    return list(values(argv)[1:])


def take_flag(name: str, argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """All values given to a flag, and the arguments without it."""
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


def _check_flags(argv: Sequence[str], defined: Flags) -> None:
    """Raises a UserError for the first unknown flag, without a config."""
    known = ("config.", "noconfig.", *defined, *(f"no{name}" for name in defined))
    for argument in argv[1:]:
        if argument.startswith("-") and not argument.lstrip("-").startswith(known):
            raise _unknown_flag(argument.lstrip("-").split("=")[0], ["config", *defined])


def _missing_config(argv: Sequence[str], commands: Sequence[str]) -> UserError:
    first = argv[1] if len(argv) > 1 else ""
    near = difflib.get_close_matches(first, commands, n=1)
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


def _wrong_value(error: Exception) -> str:
    """absl's message about the value of a flag; in plain words where absl passes on Python's."""
    message = message_of(error).removeprefix("flag ")
    for pythons, plain in _PLAINLY.items():
        flag, found, _ = message.partition(f": {pythons}")
        if found:
            return f"{flag}: {plain}"
    return message
