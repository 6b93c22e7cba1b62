"""`python -m launcher plan`: from a command line to text, JSON and pictures."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from absl import flags as absl_flags

from launcher.cli.run_command import CommandFailed, run_command
from launcher.command_line.parse import CommandLine, Flags, read_command, take_flag
from launcher.planning.request import PlanOptions, PlanRequest
from launcher.planning.topology import is_topology, parse_topology
from launcher.processes import user_errors
from trainer.config.keys import LIFTS, STATE_SHARDINGS
from trainer.config.settings import check
from trainer.console import complain, show
from trainer.errors import UserError

if TYPE_CHECKING:
    from launcher.planning.forecast import Forecast

HELP = """\
Compiles the training step of a config for a topology that does not have to be here, and reports
whether it fits, what it computes and communicates, and how fast it can be. Nothing is allocated or
executed.

  python -m launcher plan --config=configs/imagenet_resnet50.py --topology=v5e:16x16

  --config=FILE[:ARG], --config.KEY=VALUE
                         as for a run
  --topology=NAME        CHIP:AxB or CHIP:AxBxC for a TPU slice (v2, v3, v4, v5e, v5p, v6e, tpu7x);
                         gpu:CHIP:HOSTSxGPUS (h100, a100, l4); cpu:N
  --num_slices=N         N slices, joined by a data centre's network
  --batch=N              examples per device, instead of the config's global_batch_size
  --batch=auto           the most that fit, found with a few compilations
  --example=SHAPES       plans without the data: "x=uint8[224,224,3] y=int32[]", for one example
  --compare=A,B,...      several plans side by side: topologies, lifts (pmap, shard_map, vmap),
                         state shardings (replicated, zero1, fsdp) or configs
  --nosync_bn            predicts without the collectives of batch normalisation
  --effort=quick         or full: the TPU compiler takes as long as for a run
  --json=FILE            writes everything, for programs
  --plot=FILE.png        draws memory, roofline and scaling as a picture
  --html=FILE.html       writes the text and the picture as one page
  --help                 prints this text

Without the compiler of a topology the plan uses fake CPU devices, and says what that leaves out;
scripts/setup.sh tpu and scripts/setup.sh plan-gpu install the compilers.

Exit codes: 0 a plan, also of a step that does not fit; 1 the model does not trace; 2 usage.
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
class _Files:
    """Files to write; None for none."""

    json: str | None
    plot: str | None
    html: str | None


def main(argv: Sequence[str]) -> int:
    """Runs `python -m launcher plan`; returns the exit code.

    Args:
        argv: the arguments after `plan`.
    """
    return run_command(argv, HELP, _plan)


def _plan(argv: Sequence[str]) -> None:
    requests, options, files = _parse(argv)
    from launcher.planning import devices

    devices.prepare(os.environ, [request.topology for request in requests])
    from launcher.planning import figure, render

    if files.plot or files.html:
        figure.check_available()
    forecasts = _make_forecasts(requests, options)
    text = render.render(forecasts)
    show(text, end="")
    writers: list[tuple[str | None, Callable[[str], Any]]] = [
        (files.json, lambda path: render.write_json(path, forecasts)),
        (files.plot, lambda path: figure.write_png(path, forecasts)),
        (files.html, lambda path: figure.write_html(path, forecasts, text)),
    ]
    for path, write in writers:
        if path is not None:
            try:
                write(path)
            except OSError as error:
                raise UserError(f"{path} cannot be written: {error.strerror}") from error
            show(f"wrote {path}")


def _make_forecasts(requests: Sequence[PlanRequest], options: PlanOptions) -> list[Forecast]:
    from launcher.planning.cache import PlanCache
    from launcher.planning.forecast import make_forecast
    from launcher.planning.program import CompilerRefuses

    cache = PlanCache.of_user(os.environ)
    forecasts = []
    for request in requests:
        try:
            forecasts.append(make_forecast(request, options, cache, _print_progress))
        except (UserError, KeyboardInterrupt):
            raise
        except CompilerRefuses as error:
            name = request.topology.label
            raise CommandFailed(
                f"error: the compiler of {name} refuses the step: {error}"
            ) from error
        except BaseException as error:  # whatever a user's model raises when traced
            what = f"{request.config_name} does not trace"
            raise CommandFailed(user_errors.describe(what, error, os.environ)) from error
    return forecasts


def _print_progress(text: str) -> None:
    complain(text)


def _parse(argv: Sequence[str]) -> tuple[list[PlanRequest], PlanOptions, _Files]:
    argv = _with_config(list(argv))
    command = read_command(["plan", *argv], _FLAGS)
    given = command.flags
    batch: int | str | None = given["batch"]
    if isinstance(batch, str) and batch != "auto":
        if not re.fullmatch("[1-9][0-9]{0,9}", batch):
            raise UserError(f"--batch={batch}", "a number of examples per device, or auto")
        batch = int(batch)
    if given["effort"] not in ("quick", "full"):
        raise UserError(f"--effort={given['effort']}", "quick or full")
    if given["plot"] is not None and not given["plot"].lower().endswith(".png"):
        raise UserError(f"--plot={given['plot']}", "the picture is a PNG: name it FILE.png")
    for name in ("json", "plot", "html"):
        if given[name] == "" or os.path.isdir(given[name] or ""):
            raise UserError(f"--{name}={given[name]} is not a file")
        folder = os.path.dirname(given[name] or "") or "."
        if not os.path.isdir(folder):  # checked before a minute of compilation, not after it
            raise UserError(f"--{name}={given[name]}: there is no folder {folder}")
    options = PlanOptions(batch, given["example"], given["sync_bn"], given["effort"] == "quick")
    files = _Files(given["json"], given["plot"], given["html"])
    return _requests(command, argv), options, files


def _requests(command: CommandLine, argv: list[str]) -> list[PlanRequest]:
    """One request, or one for each item of --compare."""
    given = command.flags
    slices = given["num_slices"]

    def request(
        label: str, topology: str | None, changes: Mapping[str, str], command: CommandLine
    ) -> PlanRequest:
        if topology is None:
            raise UserError("--topology is missing", "for example --topology=v5e:4x4, or cpu:8")
        config = copy.deepcopy(command.config)
        config.update(changes)
        parsed = parse_topology(topology, slices)
        label = parsed.label if label == topology else label
        return PlanRequest(label, command.spec, check(config), parsed)

    if given["compare"] is None:
        topology = given["topology"]
        return [request(str(topology), topology, {}, command)]
    requests = []
    for item in given["compare"].split(","):
        item = item.strip()
        if item.partition(":")[0] in LIFTS:
            requests.append(request(item, given["topology"], {"lift": item}, command))
        elif item in STATE_SHARDINGS:
            changes = {"lift": "shard_map", "state_sharding": item}
            requests.append(request(item, given["topology"], changes, command))
        elif is_topology(item):
            requests.append(request(item, item, {}, command))
        elif ".py" in item:
            rest = take_flag("config", argv)[1]
            other = read_command(["plan", f"--config={item}", *rest], _FLAGS)
            requests.append(request(item, given["topology"], {}, other))
        else:
            raise UserError(
                f"--compare: {item!r} is not a topology, lift, state sharding or config",
                "for example v5e:4x4,v6e:4x4 or pmap,shard_map or configs/a.py,configs/b.py",
            )
    return requests


def _with_config(argv: list[str]) -> list[str]:
    """The first config in `--compare=a.py,b.py` also serves as --config, if that is missing."""
    if take_flag("config", argv)[0]:
        return argv
    compared = [re.match(r"--?compare=([^,]*\.py[^,]*)", argument) for argument in argv]
    first = next((match[1] for match in compared if match), None)
    return [f"--config={first}", *argv] if first else argv
