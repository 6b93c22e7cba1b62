"""The command line. Nothing here imports jax, so help and typos answer at once."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from launcher import exit_codes
from trainer.errors import UserError
from trainer.settings import flatten, with_defaults

HELP = """\
Trains a Flax model written for one chip on all devices of this machine or cluster.

  python -m launcher --config=configs/mlp.py [--config.KEY=VALUE ...] [flags]

  --config=FILE[:ARG]    a file with get_config(), called with ARG where one is given
  --config.KEY=VALUE     changes one key of it, for example --config.optimizer.learning_rate=0.1
  --workdir=DIR          the run's folder; the same folder again goes on from its last checkpoint
                         (default: a new runs/<config>-<time>)
  --print_config         shows every key with its value, and exits
  --dry_run              shows the processes, their environment and the mesh, and exits
  --help                 this text

Where it runs:
  --processes=N          N processes on this machine, which share its GPUs
  --fake_devices=M       M virtual CPU devices in each process
  --cluster=auto         what has started this process: auto, none (this machine only), slurm,
                         open_mpi, kubernetes, tpu_gke or tpu_gce; each task, pod or host runs the
                         same command
  --coordinator_address=HOST:PORT --num_processes=N --process_id=R
                         the same by hand: one command a process, R from 0 to N-1

What happens when something fails:
  --max_restarts=0       how often to start again from the newest checkpoint (on one machine)
  --hang_timeout_secs=600
                         a process that trains without progress for so long ends the job, with the
                         stacks of all in their logs; ten times that to compile, save or evaluate
  --grace_secs=300       after being asked to stop, until processes are killed
  --rendezvous_timeout_secs=300
                         for all processes to come together
  --heartbeat_timeout_secs=10
                         without a sign of life from another host, until it counts as lost
  --shutdown_timeout_secs=15
                         for all processes to leave at the end
  --log_ranks=0          whose output is shown: 0, all, or 1,3; all of it is in WORKDIR/logs
  --local_dir=DIR        for logs and locks if the workdir is remote

Also, each with a --help of its own:
  python -m launcher eval      a saved state on the held-out data, on any devices
  python -m launcher predict   the model's outputs for a data set, as a file
  python -m launcher export    the trained model as a file that needs jax only
  python -m launcher report    runs as one page of HTML: curves, config, faults
  python -m launcher plan      does it fit a TPU or GPU topology, how fast: without one
  python -m launcher env       versions, devices and variables, for a bug report (no --help)

Exit codes: 0 done, 1 the program failed, 2 usage, 42 start it again (asked to stop and saved,
killed from outside, a host lost, no progress).
"""


@dataclass(frozen=True)
class Options:
    """A parsed command line.

    Attributes:
        config: the resolved config, locked.
        workdir: the run's folder.
        has_workdir: whether it was given, or is the default.
        fake_devices: how many CPU devices to fake in each process; None for real devices.
        processes: how many on this machine; None if nothing was said.
        cluster: "auto", "none", or the name of one.
        coordinator_address: `HOST:PORT` of rank 0, given by hand with the next two.
        num_processes: in the job.
        process_id: of this one.
        max_restarts: how often to start again.
        hang_timeout_secs: without progress; None for the default.
        grace_secs: from a request to stop to a kill.
        rendezvous_timeout_secs: for all processes to come together.
        heartbeat_timeout_secs: of silence, until a host is lost.
        shutdown_timeout_secs: for all processes to leave together.
        log_ranks: whose output is shown.
        local_dir: for what needs a local folder; None for the system's temporary one.
        dry_run: only show the plan.
        print_config: only show the config.
    """

    config: ConfigDict
    workdir: str
    has_workdir: bool
    fake_devices: int | None
    processes: int | None
    cluster: str
    coordinator_address: str | None
    num_processes: int | None
    process_id: int | None
    max_restarts: int
    hang_timeout_secs: float | None
    grace_secs: float
    rendezvous_timeout_secs: float
    heartbeat_timeout_secs: int
    shutdown_timeout_secs: int
    log_ranks: str
    local_dir: str | None
    dry_run: bool
    print_config: bool


# What `python -m launcher` takes in place of flags.
COMMANDS = ("env", "eval", "export", "plan", "predict", "report")

# Flags by name: how each is defined, its default and its lowest value.
Flags = Mapping[str, tuple[Any, Any, float | None]]

# Those beside --config and --help.
_FLAGS: Flags = {
    "workdir": (flags.DEFINE_string, None, None),
    "print_config": (flags.DEFINE_bool, False, None),
    "dry_run": (flags.DEFINE_bool, False, None),
    "processes": (flags.DEFINE_integer, None, 1),
    "fake_devices": (flags.DEFINE_integer, None, 1),
    "cluster": (flags.DEFINE_string, "auto", None),
    "coordinator_address": (flags.DEFINE_string, None, None),
    "num_processes": (flags.DEFINE_integer, None, 1),
    "process_id": (flags.DEFINE_integer, None, 0),
    "max_restarts": (flags.DEFINE_integer, 0, 0),
    "hang_timeout_secs": (flags.DEFINE_float, None, 0.1),
    "grace_secs": (flags.DEFINE_float, 300.0, 0.0),
    "rendezvous_timeout_secs": (flags.DEFINE_float, 300.0, 0.1),
    "heartbeat_timeout_secs": (flags.DEFINE_integer, 10, 2),
    "shutdown_timeout_secs": (flags.DEFINE_integer, 15, 1),
    "log_ranks": (flags.DEFINE_string, "0", None),
    "local_dir": (flags.DEFINE_string, None, None),
}


def parse_or_exit(argv: Sequence[str]) -> Options:
    """`parse`, for `absl.app.run(flags_parser=...)`: handles help and reports errors itself."""
    flags.FLAGS(argv[:1])  # absl's own flags, which app.run reads
    absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax reports its every move as info
    try:
        if any(re.fullmatch(r"--?(help|helpshort|helpfull|h)", arg) for arg in argv[1:]):
            print(HELP, end="")
            sys.exit(exit_codes.DONE)
        options = parse(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(exit_codes.USAGE)
    if options.print_config:
        print(format_config(options.config), end="")
        sys.exit(exit_codes.DONE)
    return options


def parse(argv: Sequence[str], now: float | None = None) -> Options:
    """Parses a command line.

    Args:
        argv: the program's name and its arguments.
        now: seconds since the epoch, for the default workdir.

    Raises:
        UserError: for anything a person got wrong.
    """
    command = read_command(argv, _FLAGS)
    given = command.flags
    has_workdir = given["workdir"] is not None
    if not has_workdir:
        now = time.time() if now is None else now
        given["workdir"] = _default_workdir(command.path, command.spec, now)
    return Options(config=command.config.lock(), has_workdir=has_workdir, **given)


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
) -> Command:
    """Reads `--config`, its overrides and the given flags; anything else is a UserError.

    Args:
        argv: what to call the program in messages, and its arguments.
        defined: the flags beside --config, by name.
        otherwise: gives a config, and what to call it, where there is no --config; called with the
            other arguments. Where None, --config has to be there.
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
    _check_keys(config, rest)
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=rest)
        left = _read_flags(rest, defined, values)
    except flags.UnrecognizedFlagError as error:
        raise _unknown_flag(error.flagname, ["config", *defined]) from error
    except (flags.Error, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(_first_line(error), "see --help and --print_config") from error
    if left:
        raise UserError(f"unexpected argument {left[0]!r}", "flags are written --name=value")
    return Command(path, spec, values.config, {name: values[name].value for name in defined})


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
        raise UserError(_first_line(error), "see --help") from error
    return arguments, {name: values[name].value for name in defined}


def _read_flags(argv: Sequence[str], defined: Flags, values: flags.FlagValues) -> list[str]:
    """Defines and reads flags; returns the other arguments."""
    for name, (define, default, lowest) in defined.items():
        bound = {} if lowest is None else {"lower_bound": lowest}
        define(name, default, "", flag_values=values, **bound)
    return list(values(argv)[1:])


def format_config(config: ConfigDict) -> str:
    """Every key as `key = value`, sorted, one a line."""
    flat = {key: value for key, value in flatten(config).items() if value != ConfigDict()}
    width = max(map(len, flat))
    return "".join(f"{key:{width}} = {flat[key]!r}\n" for key in sorted(flat))


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
    try:
        module_spec.loader.exec_module(module)
        get_config = getattr(module, "get_config", None)
        if get_config is None:
            raise UserError(f"--config={spec}: {name} defines no get_config()")
        arguments = [argument] if colon else []
        try:
            inspect.signature(get_config).bind(*arguments)
        except TypeError as error:
            wants = "takes no argument after the file" if colon else "needs an argument"
            raise UserError(
                f"--config={spec}: get_config() {wants}",
                f"--config={name}{'' if colon else ':ARG'}",
            ) from error
        config = get_config(*arguments)
    except UserError:
        raise
    except Exception as error:  # whatever a user's file does
        raise UserError(
            f"--config={spec}: {type(error).__name__}: {_first_line(error)}{_line_in(error, path)}"
        ) from error
    if not isinstance(config, ConfigDict):
        if not isinstance(config, dict):
            raise UserError(
                f"--config={spec}: get_config() returned a {type(config).__name__}",
                "return an ml_collections.ConfigDict",
            )
        config = ConfigDict(config)
    return path, with_defaults(config)


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


def _check_keys(config: ConfigDict, argv: Sequence[str]) -> None:
    """Raises a UserError for the first override of a key that the config lacks."""
    leaves = list(flatten(config))
    blocks = {leaf[:i] for leaf in leaves for i in range(len(leaf)) if leaf[i] == "."}
    for key in overridden_keys(argv):
        if key in blocks or key in leaves:
            continue
        near = difflib.get_close_matches(key, leaves, n=1, cutoff=0.6) or [
            leaf for leaf in leaves if leaf.split(".")[-1] == key.split(".")[-1]
        ]
        block = key.rpartition(".")[0]
        siblings = [leaf for leaf in leaves if leaf.rpartition(".")[0] == block] or leaves
        raise UserError(
            f"--config.{key}: the config has no such key",
            f"did you mean --config.{near[0]}?"
            if near
            else f"its keys there are {', '.join(siblings)}",
        )


def _default_workdir(path: Path, spec: str, now: float) -> str:
    argument = spec.partition(":")[2]
    parts = [path.stem]
    if re.fullmatch(r"\w+", argument):
        parts.append(argument)
    parts.append(time.strftime("%Y%m%d-%H%M%S", time.localtime(now)))
    workdir = unused = os.path.join("runs", "-".join(parts))
    count = 1
    while os.path.exists(unused):
        count += 1
        unused = f"{workdir}-{count}"
    return unused


def _first_line(error: Any) -> str:
    if isinstance(error, SyntaxError):
        return error.msg
    message = error.args[0] if isinstance(error, KeyError) and error.args else str(error)
    return (str(message).strip().splitlines() or [type(error).__name__])[0]
