"""Steps of the wall clock, for some processes only.

libfaketime 0.9.10 does not do for this: with Python 3.11, sleeps fail (EINVAL) where it leaves the
monotonic clock alone, and waits never end where it does not.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("clock_step.c")


def why_no_clock() -> str:
    """Why no process can have a wall clock of its own; empty if it can."""
    return "" if shutil.which("cc") else "cc not installed (Debian: gcc)"


class Clock:
    """A wall clock that can be stepped.

    Args:
        folder: for its files.

    Attributes:
        environ: variables of the processes that follow it.
    """

    def __init__(self, folder: Path) -> None:
        library, self._file = folder / "clock_step.so", folder / "clock_step"
        command = ["cc", "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"]
        subprocess.run(command, check=True)
        self.step(0)
        self.environ = {"LD_PRELOAD": str(library), "CLOCK_STEP_FILE": str(self._file)}

    def step(self, seconds: int) -> None:
        """Sets it to the true time and `seconds` more, at once."""
        with self._file.open("r+b" if self._file.exists() else "wb") as file:
            file.write(struct.pack("l", seconds))
