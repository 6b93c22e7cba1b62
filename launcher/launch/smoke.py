"""The launch of a smoke test, in its own folder, which is removed afterwards.

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


def smoke_spec(spec: LaunchSpec) -> LaunchSpec:
    """The launch of a run's smoke test: no restarts, in a folder inside that of the run."""
    workdir = os.path.join(spec.workdir, _NAME)
    return dataclasses.replace(
        spec,
        workdir=workdir,
        local_dir=local_folder(workdir, spec.local_base),
        limits=dataclasses.replace(spec.limits, max_restarts=0),
        smoke=True,
    )


class SmokeFolder:
    """The local folder of a smoke test. Make one before it starts, to know what was there.

    Args:
        spec: of the smoke test.
    """

    def __init__(self, spec: LaunchSpec) -> None:
        self._spec = spec
        self._parent = next(place for place in spec.local_dir.parents if place.exists())

    def report(self, code: int) -> int:
        """Removes the folder and its new parents, unless the smoke test failed.

        The launcher of rank 0 prints the result.

        Args:
            code: exit code of the smoke test.

        Returns:
            The same code.
        """
        folder = self._spec.local_dir
        if code in (exit_codes.DONE, exit_codes.USAGE):
            shutil.rmtree(folder, ignore_errors=True)
            for made in folder.parents:
                if made == self._parent:
                    break
                with contextlib.suppress(OSError):  # another process uses it by now
                    made.rmdir()
        if self._spec.has_rank_0:
            left = f"; what is left of it: {folder}" if folder.exists() else ""
            ok = code == exit_codes.DONE
            say("smoke: ok" if ok else f"smoke: FAILED, exit code {code}{left}")
        return code
