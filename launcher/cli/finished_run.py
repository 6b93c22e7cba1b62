"""From a command line that names a run to the state, the job and the devices."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags as absl_flags
from absl import logging as absl_logging
from ml_collections import ConfigDict

from launcher import exit_codes
from launcher.command_line.parse import Flags, overridden_keys, read_command, take_flag
from launcher.launch import environment
from launcher.processes import user_errors as user_errors
from trainer.config.settings import Settings, check
from trainer.console import open_terminal, say
from trainer.errors import UserError
from trainer.workdir.paths import absolute, is_local
from trainer.workdir.workdir import read_config

if TYPE_CHECKING:
    from trainer.inference.trained_model import TrainedModel
    from trainer.lift.lift import Lift

WHICH_STATE = """\
  --workdir=RUN          the folder of the run; it may be training meanwhile, nothing is written
                         there
  --step=latest          the newest state on disk, best, or the number of a step
  --config.KEY=VALUE     changes one key of the run's config: of data, eval, loss or metrics, lift
                         or global_batch_size
  --config=FILE[:ARG]    another config, whose model has the same parameters
"""

EXIT_CODES = """\
Exit codes: 0 done, 1 the program failed, 2 usage.
"""

_FLAGS: Flags = {
    "workdir": (absl_flags.DEFINE_string, None, None),
    "step": (absl_flags.DEFINE_string, "latest", None),
}
FAKE_DEVICES: Flags = {"fake_devices": (absl_flags.DEFINE_integer, None, 1)}

# What may be changed about a run's config: not its model, which is the one that was trained.
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
    """What is to be done with which state.

    Attributes:
        workdir: the run's folder.
        settings: the checked config.
        best: whether it is the best state.
        step: of the state; None for the newest.
        flags: the values of the command's own flags.
    """

    workdir: str
    settings: Settings
    best: bool
    step: int | None
    flags: dict[str, Any]


class Failed(Exception):
    """What was asked for cannot be done; the text is told, and the exit code is 1."""


def run(argv: Sequence[str], usage: str, answer: Callable[[Sequence[str]], None]) -> int:
    """Runs a command; returns the exit code.

    Args:
        argv: its arguments.
        usage: what --help prints.
        answer: does it.
    """
    if any(argument in ("--help", "-help", "-h", "--helpfull") for argument in argv):
        print(usage, end="")
        return exit_codes.DONE
    absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax reports its every move as info
    open_terminal()
    try:
        answer(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_codes.USAGE
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 128 + signal.SIGINT
    except Failed as error:
        print(error, file=sys.stderr)
        return exit_codes.FAILED
    except Exception as error:  # whatever a user's model or data does
        print(user_errors.describe("it failed", error, os.environ), file=sys.stderr)
        return exit_codes.FAILED
    return exit_codes.DONE


def read_request(name: str, argv: Sequence[str], own: Flags) -> Request:
    """Reads a command line; nothing here imports jax.

    Args:
        name: of the command.
        argv: its arguments.
        own: its own flags.

    Raises:
        UserError: for anything a person got wrong.
    """
    command = read_command([name, *argv], {**_FLAGS, **own}, _config_of_run)
    given = command.flags
    workdir, step = given.pop("workdir"), given.pop("step")
    if not (workdir or "").strip():
        raise _missing_workdir([])
    if not take_flag("config", argv)[0]:
        for key in overridden_keys([name, *argv]):
            if key.partition(".")[0] not in _CHANGEABLE:
                raise UserError(
                    f"--config.{key}: the model is the one that was trained; of the run's config "
                    f"only {', '.join(_CHANGEABLE)} may be changed here",
                    "--config=FILE takes another config, whose model has the same parameters",
                )
    return Request(workdir, check(command.config), step == "best", _number_of(step), given)


def _number_of(step: str) -> int | None:
    if step in ("latest", "best"):
        return None
    if step.isascii() and step.isdigit():
        return int(step)
    near = difflib.get_close_matches(step, ("latest", "best"), n=1)
    raise UserError(
        f"--step={step} is no step",
        f"did you mean --step={near[0]}?" if near else "latest, best, or a number",
    )


def _config_of_run(argv: Sequence[str]) -> tuple[str, ConfigDict]:
    """The path of the config of the run that --workdir names, and that config."""
    found, rest = take_flag("workdir", argv)
    if not found or not found[-1].strip():
        raise _missing_workdir(rest[1:])
    folder = absolute(found[-1])
    path = folder / "config.json"
    if not path.exists():
        what = "has no config.json" if folder.exists() else "is not there"
        raise UserError(f"--workdir={found[-1]} is not the folder of a run: it {what}", _runs())
    return os.fspath(path), read_config(folder)


def _missing_workdir(argv: Sequence[str]) -> UserError:
    if argv and not argv[0].startswith("-"):
        return UserError("--workdir is missing", f"did you mean --workdir={argv[0]}?")
    return UserError("--workdir is missing", _runs() or "--workdir=RUN, the folder of a run")


def _runs() -> str:
    """The newest runs in the folder where runs go by default, as a hint."""
    files = sorted(Path("runs").glob("*/config.json"), key=os.path.getmtime, reverse=True)
    names = [os.fspath(file.parent) for file in files[:4]]
    return f"--workdir=RUN; here are {', '.join(names)}" if names else ""


def check_writable(flag: str, path: str | None) -> None:
    """Raises a UserError if a file cannot be written: now, not after all the work."""
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
    """Within it, a file that cannot be written is a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def open_model(request: Request, fake_devices: int | None) -> tuple[TrainedModel, Lift]:
    """The trained model, its state on all devices of this process, and how it is laid over them.

    Raises:
        UserError: the state, the config or the devices are not as they should be.
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
    """The trained model, its state in the memory of the host; says what it is."""
    from trainer.inference.trained_model import restore

    trained = restore(request.workdir, request.settings, best=request.best, step=request.step)
    say(f"restored step {trained.step} from {trained.place.parent}")
    return trained
