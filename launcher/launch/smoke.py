"""Where a smoke test is done, that nothing is left of it, and its verdict.

See `trainer.run.smoke`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil

from launcher import exit_codes
from launcher.launch.spec import LaunchSpec
from trainer.console import say
from trainer.workdir.paths import local_folder

_NAME = ".smoke"


def smoke_plan(plan: LaunchSpec) -> LaunchSpec:
    """The plan of a run as one that only tries it, once, in a folder inside that of the run."""
    workdir = os.path.join(plan.workdir, _NAME)
    return dataclasses.replace(
        plan,
        workdir=workdir,
        local_dir=local_folder(workdir, plan.local_base),
        limits=dataclasses.replace(plan.limits, max_restarts=0),
        smoke=True,
    )


class Traces:
    """What is there before a smoke test, so that nothing more is there after it.

    Args:
        plan: of the smoke test.
    """

    def __init__(self, plan: LaunchSpec) -> None:
        self._plan = plan
        self._before = next(place for place in plan.local_dir.parents if place.exists())

    def tell(self, code: int) -> int:
        """Gives the verdict, if this is the launcher of rank 0; returns the exit code."""
        place = self._plan.local_dir
        if code in (exit_codes.DONE, exit_codes.USAGE):
            shutil.rmtree(place, ignore_errors=True)
            for made in place.parents:
                if made == self._before:
                    break
                with contextlib.suppress(OSError):  # there is something in it by now
                    made.rmdir()
        if any(worker.rank == 0 for worker in self._plan.workers):
            left = f"; what is left of it: {place}" if place.exists() else ""
            ok = code == exit_codes.DONE
            say("smoke: ok" if ok else f"smoke: FAILED, exit code {code}{left}")
        return code
