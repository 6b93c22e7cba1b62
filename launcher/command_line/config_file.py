"""Runs config files. Any mistake in one is reported in one line, with the number of its line."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import inspect
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from ml_collections import ConfigDict

from launcher.processes import user_errors
from trainer.config.keys import with_defaults
from trainer.errors import UserError, text_of


def load_config(spec: str) -> tuple[Path, ConfigDict]:
    """Runs a config file, FILE or FILE:ARG.

    Returns:
        The path of the file, and the config with all defaults filled in.

    Raises:
        UserError: there is no such file, or get_config() is missing, fails or returns no config.
    """
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
    """Runs a config file, FILE or FILE:ARG.

    Returns:
        The path of the file, [] or [ARG], and the module.

    Raises:
        UserError: there is no such file, or it fails.
    """
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
    """Turns any exception of a config file into a UserError that names the line.

    Also SystemExit: `sys.exit(0)` in a config would look like a run that is done.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as raised:
        error = user_errors.cause_of(raised)
        raise UserError(
            f"--config={spec}: {type(error).__name__}: {message_of(error)}{_line_in(error, path)}"
        ) from error


def _line_in(error: BaseException, path: Path) -> str:
    """` (line N)`, the last line of the file in the traceback of an error."""
    if isinstance(error, SyntaxError) and error.lineno:
        return f" (line {error.lineno})"
    lines = []
    trace = error.__traceback__
    while trace is not None:
        if os.path.abspath(trace.tb_frame.f_code.co_filename) == os.path.abspath(path):
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return f" (line {lines[-1]})" if lines else ""


def message_of(error: BaseException) -> str:
    """The first line of the message of an error."""
    text = text_of(error)
    if isinstance(error, SyntaxError) and error.msg:
        text = error.msg
    elif isinstance(error, KeyError) and error.args and isinstance(error.args[0], str):
        text = error.args[0].strip() or text  # without quotes
    return text.splitlines()[0]
