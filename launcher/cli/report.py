"""`python -m launcher report`: runs as one page of HTML. Nothing here imports jax."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from absl import flags as absl_flags

from launcher.cli.run_command import run_command
from launcher.command_line.parse import Flags, read_arguments
from trainer.console import show
from trainer.errors import UserError, first_line
from trainer.version import __version__
from trainer.workdir.paths import absolute, write_whole

HELP = """\
Makes one page of HTML from one or several runs, which opens offline: the state of each run, curves,
config, failures and restarts, environment.

  python -m launcher report WORKDIR [WORKDIR ...] [--out=report.html]

  WORKDIR                the folder of a run, local or remote; the run may be training
  --out=FILE.html        the page (default: report.html)
  --log                  losses on a logarithmic axis
  --local_dir=DIR        where the logs are if a workdir is remote, as for the run itself
  --help                 prints this text

Exit codes: 0 done, 2 usage.
"""

_FLAGS: Flags = {
    "out": (absl_flags.DEFINE_string, "report.html", None),
    "log": (absl_flags.DEFINE_bool, False, None),
    "local_dir": (absl_flags.DEFINE_string, None, None),
}


@dataclass(frozen=True)
class _Options:
    """A parsed command line.

    Attributes:
        workdirs: the folders of the runs, at least one.
        out: the file to write.
        log: whether the axis of losses is logarithmic.
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
    return run_command(argv, HELP, lambda argv: _write_page(_parse(argv)))


def _parse(argv: Sequence[str]) -> _Options:
    workdirs, given = read_arguments(["report", *argv], _FLAGS)
    if not workdirs or not all(place.strip() for place in workdirs):
        raise UserError(
            "a workdir is missing", "python -m launcher report WORKDIR [WORKDIR ...], see --help"
        )
    out = absolute(given["out"])
    if not given["out"].strip() or out.is_dir():
        raise UserError(f"--out={given['out']} is not a file", "for example --out=report.html")
    if not out.parent.is_dir() and "://" not in given["out"]:
        raise UserError(f"--out={given['out']}: there is no folder {out.parent}")
    return _Options(workdirs, **given)


def _write_page(options: _Options) -> None:
    from launcher.report.page import render
    from launcher.report.read import read_runs

    runs = read_runs(options.workdirs, options.local_dir)
    made = f"Made {time.strftime('%Y-%m-%d %H:%M:%S')} by podlift {__version__}"
    page = render(runs, log=options.log, made=made)
    # Names of files and strings of JSON may hold surrogates, which UTF-8 cannot encode.
    page = page.encode("utf-8", "backslashreplace").decode("utf-8")
    try:
        write_whole(absolute(options.out), page)
    except Exception as error:  # clients of object stores raise many types
        why = (isinstance(error, OSError) and error.strerror) or first_line(error)
        raise UserError(f"--out={options.out} cannot be written: {why}") from error
    for run in runs:
        best = run.best
        ranked = f", best {best.tag} {best.value:.4g} at step {best.step}" if best else ""
        status = f"{run.status}, {run.steps} steps" if run.state == "finished" else run.status
        show(f"{run.name}: {status}{ranked}")
    show(f"wrote {options.out}")
