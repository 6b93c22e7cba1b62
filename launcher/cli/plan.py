"""The way through a plan: from a command line to text, JSON and pictures."""

from __future__ import annotations

import copy
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from absl import flags as absl_flags

from launcher import exit_codes
from launcher.command_line.parse import Command, Flags, read_command
from launcher.planning.topology import Topology, is_topology, parse_topology
from launcher.processes import user_errors as user_errors
from trainer.config.keys import LIFTS, STATE_SHARDINGS
from trainer.config.settings import Settings, check
from trainer.errors import UserError

HELP = """\
Compiles the step of a config for a topology that need not be here, and says whether it fits, what
it does and how fast it can be. Nothing is allocated and nothing is run.

  python -m launcher plan --config=configs/imagenet_resnet50.py --topology=v5e:16x16

  --config=FILE[:ARG], --config.KEY=VALUE
                         as for a run
  --topology=NAME        CHIP:AxB or CHIP:AxBxC for a slice of TPUs (v2, v3, v4, v5e, v5p, v6e,
                         tpu7x); gpu:CHIP:HOSTSxGPUS (h100, a100, l4); cpu:N
  --num_slices=N         so many slices, joined by a data centre's network
  --batch=N              examples a device, instead of the config's global_batch_size
  --batch=auto           the most that fit, from a few compilations
  --example=SHAPES       plan without the data: "x=uint8[224,224,3] y=int32[]", of one example
  --compare=A,B,...      several plans side by side: topologies, lifts (pmap, shard_map, vmap),
                         state shardings (replicated, zero1, fsdp) or configs
  --nosync_bn            predict without the collectives of batch normalisation
  --effort=quick         or full: let the TPU compiler take the time that a run would
  --json=FILE            everything, for programs
  --plot=FILE.png        memory, roofline and scaling as a picture
  --html=FILE.html       the same as a page of its own
  --help                 this text

Without the compiler of a topology the plan is made on fake CPU devices, and says what that leaves
out; scripts/setup.sh tpu and scripts/setup.sh plan-gpu install them.

Exit codes: 0 an answer, also if it is that it does not fit; 1 the model does not trace; 2 usage.
"""

_FLAGS: Flags = {
    "topology": (absl_flags.DEFINE_string, None, None),
    "num_slices": (absl_flags.DEFINE_integer, 1, 1),
    "batch": (absl_flags.DEFINE_string, None, None),
    "example": (absl_flags.DEFINE_string, None, None),
    "compare": (absl_flags.DEFINE_string, None, None),
    "sync_bn": (absl_flags.DEFINE_bool, True, None),
    "effort": (absl_flags.DEFINE_string, "quick", None),
    "json": (absl_flags.DEFINE_string, None, None),
    "plot": (absl_flags.DEFINE_string, None, None),
    "html": (absl_flags.DEFINE_string, None, None),
}


@dataclass(frozen=True)
class Question:
    """One plan that was asked for.

    Attributes:
        label: what tells it from the others.
        config_name: of the file.
        settings: the checked config.
        topology: what it is planned for.
    """

    label: str
    config_name: str
    settings: Settings
    topology: Topology


@dataclass(frozen=True)
class Options:
    """What is asked of every plan.

    Attributes:
        batch: examples a device; "auto" for the most that fit; None for the config's.
        example: the shapes of one example, where the data is not to be loaded.
        sync_bn: whether the prediction counts the collectives of batch normalisation.
        quick: whether the compiler is to save time.
        json: file to write; None for none, as below.
        plot: file of a picture.
        html: file of a page.
    """

    batch: int | str | None
    example: str | None
    sync_bn: bool
    quick: bool
    json: str | None
    plot: str | None
    html: str | None


def main(argv: Sequence[str]) -> int:
    """Runs `python -m launcher plan`; returns the exit code.

    Args:
        argv: the arguments after `plan`.
    """
    if any(argument in ("--help", "-help", "-h", "--helpfull") for argument in argv):
        print(HELP, end="")
        return exit_codes.DONE
    try:
        questions, options = parse(argv)
        return answer(questions, options, os.environ)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_codes.USAGE
    except BrokenPipeError:  # `| head`: nobody reads any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exit_codes.DONE
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 128 + signal.SIGINT


def parse(argv: Sequence[str]) -> tuple[list[Question], Options]:
    """Reads a command line.

    Raises:
        UserError: for anything a person got wrong.
    """
    argv = _with_config(list(argv))
    command = read_command(["plan", *argv], _FLAGS)
    given = command.flags
    batch: int | str | None = given["batch"]
    if isinstance(batch, str) and batch != "auto":
        if not re.fullmatch("[1-9][0-9]{0,9}", batch):
            raise UserError(f"--batch={batch}", "a number of examples a device, or auto")
        batch = int(batch)
    if given["effort"] not in ("quick", "full"):
        raise UserError(f"--effort={given['effort']}", "quick or full")
    if given["plot"] is not None and not given["plot"].lower().endswith(".png"):
        raise UserError(f"--plot={given['plot']}", "the picture is a PNG: name it so")
    for name in ("json", "plot", "html"):
        if given[name] == "" or os.path.isdir(given[name] or ""):
            raise UserError(f"--{name}={given[name]} is no file")
        folder = os.path.dirname(given[name] or "") or "."
        if not os.path.isdir(folder):  # told now, not after a minute's compilation
            raise UserError(f"--{name}={given[name]}: there is no folder {folder}")
    options = Options(
        batch,
        given["example"],
        given["sync_bn"],
        given["effort"] == "quick",
        given["json"],
        given["plot"],
        given["html"],
    )
    return _questions(command, argv), options


def _questions(command: Command, argv: list[str]) -> list[Question]:
    given = command.flags
    slices = given["num_slices"]

    def question(
        label: str, topology: str | None, changes: Mapping[str, str], command: Command
    ) -> Question:
        if topology is None:
            raise UserError("--topology is missing", "for example --topology=v5e:4x4, or cpu:8")
        config = copy.deepcopy(command.config)
        config.update(changes)
        parsed = parse_topology(topology, slices)
        label = parsed.label if label == topology else label
        return Question(label, command.spec, check(config), parsed)

    if given["compare"] is None:
        topology = given["topology"]
        return [question(str(topology), topology, {}, command)]
    asked = []
    for item in given["compare"].split(","):
        item = item.strip()
        if item.partition(":")[0] in LIFTS:
            asked.append(question(item, given["topology"], {"lift": item}, command))
        elif item in STATE_SHARDINGS:
            changes = {"lift": "shard_map", "state_sharding": item}
            asked.append(question(item, given["topology"], changes, command))
        elif is_topology(item):
            asked.append(question(item, item, {}, command))
        elif ".py" in item:
            rest = [argument for argument in argv if not argument.lstrip("-").startswith("config=")]
            other = read_command(["plan", f"--config={item}", *_without_config(rest)], _FLAGS)
            asked.append(question(item, given["topology"], {}, other))
        else:
            raise UserError(
                f"--compare: {item!r} is no topology, lift, state sharding or config",
                "for example v5e:4x4,v6e:4x4 or pmap,shard_map or configs/a.py,configs/b.py",
            )
    return asked


def _with_config(argv: list[str]) -> list[str]:
    """`--compare=a.py,b.py` names a config for the rest of the command line too."""
    if any(re.match(r"--?config(=|$)", argument) for argument in argv):
        return argv
    compared = [re.match(r"--?compare=([^,]*\.py[^,]*)", argument) for argument in argv]
    first = next((match[1] for match in compared if match), None)
    return [f"--config={first}", *argv] if first else argv


def _without_config(argv: Sequence[str]) -> list[str]:
    """Arguments without `--config FILE`, written as two."""
    found: list[str] = []
    skip = False
    for argument in argv:
        if not skip and argument not in ("--config", "-config"):
            found.append(argument)
        skip = argument in ("--config", "-config")
    return found


def answer(
    questions: Sequence[Question], options: Options, environ: MutableMapping[str, str]
) -> int:
    """Makes all plans and writes them out; returns the exit code."""
    from launcher.planning import devices

    devices.prepare(environ, [question.topology for question in questions])
    from launcher.planning import figure
    from launcher.planning import text as tell
    from launcher.planning.cache import PlanCache
    from launcher.planning.forecast import make_forecast
    from launcher.planning.program import CompilerRefuses

    if options.plot or options.html:
        figure.check_available()
    cache = PlanCache.of_user(environ)
    forecasts = []
    for question in questions:
        try:
            forecasts.append(make_forecast(question, options, cache, _progress))
        except UserError:
            raise
        except CompilerRefuses as error:
            name = question.topology.label
            print(f"error: the compiler of {name} refuses the step: {error}", file=sys.stderr)
            return exit_codes.FAILED
        except Exception as error:  # whatever a user's model does when it is traced
            what = f"{question.config_name} does not trace"
            print(user_errors.describe(what, error, environ), file=sys.stderr)
            return exit_codes.FAILED
    text = tell.one(forecasts[0]) if len(forecasts) == 1 else tell.several(forecasts)
    print(text, end="", flush=True)
    writers: list[tuple[str | None, Callable[[str], Any]]] = [
        (options.json, lambda path: tell.write_json(path, forecasts)),
        (options.plot, lambda path: figure.write_png(path, forecasts)),
        (options.html, lambda path: figure.write_html(path, forecasts, text)),
    ]
    for path, write in writers:
        if path is not None:
            try:
                write(path)
            except OSError as error:
                raise UserError(f"{path} cannot be written: {error.strerror}") from error
            print(f"wrote {path}")
    return exit_codes.DONE


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
