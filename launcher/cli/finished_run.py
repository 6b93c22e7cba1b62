"""What `eval`, `predict` and `export` share: from a command line to the model of a finished run."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags as absl_flags
from absl import logging as absl_logging
from ml_collections import ConfigDict

from launcher.cli.run_command import CommandFailed, run_command
from launcher.command_line.overrides import overridden_keys
from launcher.command_line.parse import Flags, read_command, take_flag
from launcher.launch import environment
from launcher.processes import user_errors
from trainer.config import trust
from trainer.config.settings import Settings, check
from trainer.console import open_terminal, say
from trainer.errors import StorageFailed, UserError
from trainer.workdir.paths import absolute, exists, is_local
from trainer.workdir.patience import patiently
from trainer.workdir.private import refuse_links
from trainer.workdir.workdir import read_config

if TYPE_CHECKING:
    from trainer.inference.trained_model import TrainedModel
    from trainer.lift.lift import Lift

WHICH_STATE = """\
  --workdir=RUN          the folder of the run, which is only read: the run may be training
  --step=latest          the newest checkpoint, best, or the number of a step
  --config.KEY=VALUE     overrides one key of the run's config: of data, eval, loss or metrics, lift
                         or global_batch_size
  --config=FILE[:ARG]    another config, whose model has the same parameters
  --trust                runs whatever code the config in RUN names, not only that of podlift, optax
                         and packages in the current folder
"""

EXIT_CODES = """\
Exit codes: 0 done, 1 the program failed, 2 usage.
"""

_FLAGS: Flags = {
    "workdir": (absl_flags.DEFINE_string, None, None),
    "step": (absl_flags.DEFINE_string, "latest", None),
    "trust": (absl_flags.DEFINE_bool, False, None),
}
FAKE_DEVICES: Flags = {"fake_devices": (absl_flags.DEFINE_integer, None, 1)}

# The keys of a run's config that may be overridden. The model is fixed: it is the trained one.
_CHANGEABLE = (
    "data",
    "eval",
    "global_batch_size",
    "lift",
    "loss",
    "metrics",
    "state_sharding",
)


@dataclass(frozen=True)
class Request:
    """The state that a command works on.

    Attributes:
        workdir: the run's folder.
        settings: the checked config.
        best: whether to load the best state.
        step: the step of the state; None for the newest.
        flags: the values of the command's own flags.
    """

    workdir: str
    settings: Settings
    best: bool
    step: int | None
    flags: dict[str, Any]


def run(argv: Sequence[str], usage: str, work: Callable[[Sequence[str]], None]) -> int:
    """Runs a command on a finished run; returns the exit code.

    Args:
        argv: the arguments after the command's name.
        usage: what --help prints.
        work: does what the arguments ask for.
    """

    def work_or_describe(argv: Sequence[str]) -> None:
        absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax logs its every action as info
        open_terminal()
        try:
            with trust.limited(None):  # read_request sets a limit
                work(argv)
        except (UserError, StorageFailed, CommandFailed, KeyboardInterrupt):
            raise
        except BaseException as error:  # whatever a user's model or data raises, SystemExit too
            text = user_errors.describe("it failed", error, os.environ)
            raise CommandFailed(text) from error

    return run_command(argv, usage, work_or_describe)


def read_request(name: str, argv: Sequence[str], own: Flags) -> Request:
    """Reads a command line, without jax, and limits what the run's config may name.

    Args:
        name: the command's name.
        argv: its arguments.
        own: the flags that only this command has.

    Raises:
        UserError: a flag, its value or the config is wrong, or there is no such run.
    """
    command = read_command([name, *argv], {**_FLAGS, **own}, default_config=_config_of_run)
    given = command.flags
    workdir, step, is_trusted = (given.pop(name) for name in ("workdir", "step", "trust"))
    if not (workdir or "").strip():
        raise _missing_workdir([])
    if not take_flag("config", argv)[0]:
        for key in overridden_keys([name, *argv]):
            if key.partition(".")[0] not in _CHANGEABLE:
                raise UserError(
                    f"--config.{key}: the model is already trained; only "
                    f"{', '.join(_CHANGEABLE)} may be overridden here",
                    "--config=FILE takes another config, whose model has the same parameters",
                )
        if not is_trusted:
            typed = {text for argument in argv for text in (argument, argument.partition("=")[2])}
            trust.set_limit(trust.Limit(os.fspath(absolute(workdir)), frozenset(typed)))
    return Request(workdir, check(command.config), step == "best", _number_of(step), given)


def _number_of(step: str) -> int | None:
    if step in ("latest", "best"):
        return None
    if step.isascii() and step.isdigit():
        return int(step)
    near = difflib.get_close_matches(step, ("latest", "best"), n=1)
    raise UserError(
        f"--step={step} is not a step",
        f"did you mean --step={near[0]}?" if near else "latest, best, or a number",
    )


def _config_of_run(argv: Sequence[str]) -> tuple[str, ConfigDict]:
    """The path of the config of the run in --workdir, and that config."""
    found, rest = take_flag("workdir", argv)
    if not found or not found[-1].strip():
        raise _missing_workdir(rest[1:])
    folder = absolute(found[-1])
    path = folder / "config.json"
    if not patiently(path, lambda: exists(path)):
        what = "has no config.json" if exists(folder) else "is not there"
        raise UserError(f"--workdir={found[-1]} is not the folder of a run: it {what}", _runs())
    refuse_links(folder)
    return os.fspath(path), read_config(folder)


def _missing_workdir(argv: Sequence[str]) -> UserError:
    if argv and not argv[0].startswith("-"):
        return UserError("--workdir is missing", f"did you mean --workdir={argv[0]}?")
    return UserError("--workdir is missing", _runs() or "--workdir=RUN, the folder of a run")


def _runs() -> str:
    """A hint that lists the newest runs in the default folder."""
    files = sorted(Path("runs").glob("*/config.json"), key=os.path.getmtime, reverse=True)
    names = [os.fspath(file.parent) for file in files[:4]]
    return f"--workdir=RUN; here are {', '.join(names)}" if names else ""


def check_writable(flag: str, path: str | None) -> None:
    """Raises a UserError if a file cannot be written. Called before the work, not after it."""
    if path is None or not is_local(path):
        return
    place = Path(absolute(path))
    if not path.strip() or place.is_dir():
        raise UserError(f"--{flag}={path} is a folder", "name a file")
    if not place.parent.is_dir():
        raise UserError(f"--{flag}={path}: there is no folder {place.parent}")
    if not os.access(place.parent, os.W_OK):
        raise UserError(f"--{flag}={path}: {place.parent} cannot be written to")


@contextlib.contextmanager
def writing(path: str) -> Iterator[None]:
    """Turns an OSError into the UserError that a file cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def open_model(request: Request, fake_devices: int | None) -> tuple[TrainedModel, Lift]:
    """Restores the model onto all devices of this process.

    Returns:
        The trained model, and the lift that placed its state.

    Raises:
        UserError: the state cannot be read, or does not match the config or the devices.
    """
    environment.prepare(os.environ, fake_devices)
    from launcher.worker.mesh import build_mesh
    from trainer.lift.lift import make_lift
    from trainer.metrics_writer.messages import describe_devices

    settings = request.settings
    lift = make_lift(settings.lift, build_mesh(settings.lift), settings.state_sharding)
    say(describe_devices(lift))
    trained = read_model(request)
    return dataclasses.replace(trained, state=lift.put_state(trained.state)), lift


def read_model(request: Request) -> TrainedModel:
    """Restores the model into host memory, and prints which step it is."""
    from trainer.inference.trained_model import restore

    trained = restore(request.workdir, request.settings, best=request.best, step=request.step)
    say(f"restored step {trained.step} from {trained.place.parent}")
    return trained
