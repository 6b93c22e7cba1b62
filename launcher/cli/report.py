"""`python -m launcher report`: the command line. Nothing here imports jax."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from absl import flags as absl_flags

from launcher import exit_codes
from launcher.command_line.parse import Flags, read_arguments
from trainer.errors import UserError, first_line
from trainer.version import __version__
from trainer.workdir.paths import absolute, write_whole

HELP = """\
Makes one page of HTML of one or several runs, to be opened offline: what became of each, curves,
config, faults and restarts, environment.

  python -m launcher report WORKDIR [WORKDIR ...] [--out=report.html]

  WORKDIR                the folder of a run, local or remote; it may be going on
  --out=FILE.html        the page (default: report.html)
  --log                  losses on a logarithmic axis
  --local_dir=DIR        where logs are if a workdir is remote, as for the run itself
  --help                 this text

Exit codes: 0 done, 2 usage.
"""

_FLAGS: Flags = {
    "out": (absl_flags.DEFINE_string, "report.html", None),
    "log": (absl_flags.DEFINE_bool, False, None),
    "local_dir": (absl_flags.DEFINE_string, None, None),
}


@dataclass(frozen=True)
class Options:
    """A parsed command line.

    Attributes:
        workdirs: of the runs, at least one.
        out: file of the page.
        log: whether losses are drawn on a logarithmic axis.
        local_dir: where the logs of remote runs are; None for the system's temporary folder.
    """

    workdirs: list[str]
    out: str
    log: bool
    local_dir: str | None


def main(argv: Sequence[str]) -> int:
    """Runs `python -m launcher report`; returns the exit code.

    Args:
        argv: the arguments after `report`.
    """
    if any(argument in ("--help", "-help", "-h", "--helpfull") for argument in argv):
        print(HELP, end="")
        return exit_codes.DONE
    try:
        return make(parse(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_codes.USAGE


def parse(argv: Sequence[str]) -> Options:
    """Reads a command line.

    Raises:
        UserError: for anything a person got wrong.
    """
    workdirs, given = read_arguments(["report", *argv], _FLAGS)
    if not workdirs or not all(place.strip() for place in workdirs):
        raise UserError(
            "no workdir is named", "python -m launcher report WORKDIR [WORKDIR ...], see --help"
        )
    out = absolute(given["out"])
    if not given["out"].strip() or out.is_dir():
        raise UserError(f"--out={given['out']} is no file", "for example --out=report.html")
    if not out.parent.is_dir() and "://" not in given["out"]:
        raise UserError(f"--out={given['out']}: there is no folder {out.parent}")
    return Options(workdirs, **given)


def make(options: Options) -> int:
    """Reads the runs and writes the page; returns the exit code."""
    from launcher.report.page import render
    from launcher.report.read import read_runs

    runs = read_runs(options.workdirs, options.local_dir)
    made = f"Made {time.strftime('%Y-%m-%d %H:%M:%S')} by podlift {__version__}"
    page = render(runs, log=options.log, made=made)
    # Names of files and strings of JSON may hold what UTF-8 cannot.
    page = page.encode("utf-8", "backslashreplace").decode("utf-8")
    try:
        write_whole(absolute(options.out), page)
    except Exception as error:  # clients of object stores raise many types
        why = (isinstance(error, OSError) and error.strerror) or first_line(error)
        raise UserError(f"--out={options.out} cannot be written: {why}") from error
    for run in runs:
        best = run.best
        ranked = f", best {best.tag} {best.value:.4g} at step {best.step}" if best else ""
        told = f"{run.told}, {run.steps} steps" if run.state == "finished" else run.told
        print(f"{run.name}: {told}{ranked}")
    print(f"wrote {options.out}")
    return exit_codes.DONE
