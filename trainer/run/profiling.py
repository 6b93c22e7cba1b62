"""Tracing some steps with jax's profiler, for XProf, TensorBoard and Perfetto."""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.console import say, warn
from trainer.errors import UserError, first_line
from trainer.workdir.paths import opened_whole

if TYPE_CHECKING:  # a launcher reads what is asked for, without numpy
    from trainer.metrics_writer.goodput import Goodput
    from trainer.metrics_writer.train_log import TrainLog
    from trainer.workdir.workdir import Workdir

# What jax writes for each process, under the name of its host.
_ENDINGS = (".xplane.pb", ".trace.json.gz")


@dataclass(frozen=True)
class Profile:
    """Which steps are to be traced.

    Attributes:
        start: how many steps come before them.
        steps: how many they are; rounded up to whole calls.

    Raises:
        UserError: there are no such steps.
    """

    start: int
    steps: int

    def __post_init__(self) -> None:
        if self.start < 0 or self.steps < 1:
            raise _unclear(str(self))

    def __str__(self) -> str:
        return f"--profile={self.start}:{self.steps}"

    @classmethod
    def parse(cls, text: str) -> Profile:
        """Reads `START:STEPS`."""
        match = re.fullmatch(r"(\d+):(\d+)", text.strip(), re.ASCII)
        if match is None:
            raise _unclear(f"--profile={text}")
        return cls(int(match[1]), int(match[2]))

    @property
    def end(self) -> int:
        """Steps taken when the last of them is."""
        return self.start + self.steps


def _unclear(given: str) -> UserError:
    return UserError(
        f"{given} should be START:STEPS, with STEPS of at least 1",
        "--profile=100:5 traces the 5 steps after the first 100",
    )


class Profiler:
    """Traces the steps of a profile. Every process writes a file of its own, by its rank.

    What it costs is in no row of speed. Where a trace cannot be made, a line says so and training
    goes on.

    Args:
        profile: which steps; None: none, and nothing is ever done.
        workdir: the run's folder.
        rank: of this process.
        per_call: steps in one call.
        stop: at which step the run stops.
        log: whose clock stands still meanwhile.
        goodput: what is told how long starting and writing take.
        drain: reads all metrics, and so waits for the devices.

    Raises:
        UserError: the run is over before these steps.
    """

    def __init__(
        self,
        profile: Profile | str | None,
        workdir: Workdir,
        rank: int,
        *,
        per_call: int,
        stop: int,
        log: TrainLog,
        goodput: Goodput,
        drain: Callable[[], None],
    ) -> None:
        profile = Profile.parse(profile) if isinstance(profile, str) else profile
        if profile is not None and profile.start >= stop:
            raise UserError(
                f"{profile} begins where the run is over: it stops at step {stop}",
                f"START can be from 0 to {stop - 1}",
            )
        self._profile = profile
        self._folder = workdir.path
        self._rank = rank
        self._per_call, self._stop = per_call, stop
        self._log, self._goodput, self._drain = log, goodput, drain
        self._local: tempfile.TemporaryDirectory[str] | None = None
        self._first = 0
        self._written = ""

    def before(self, step: int) -> None:
        """To be told before each call, and before its batch is waited for: it may be the first."""
        profile = self._profile
        if profile is None or self._local is not None or step >= self._stop:
            return
        if step >= profile.end:
            say(f"nothing is traced: {profile} lies before step {step}, from which the run goes on")
            self._profile = None
            return
        if min(step + self._per_call, self._stop) <= profile.start:
            return
        self._drain()
        self._log.pause()
        with self._goodput.spending("profile"), self._errors_told():
            import jax

            self._local, self._first = tempfile.TemporaryDirectory(prefix="podlift-trace-"), step
            jax.profiler.start_trace(self._local.name)
        if self._profile is None:
            self._log.resume()

    def after(self, step: int) -> None:
        """To be told after each call: it may have been the last."""
        if self._local is None or self._profile is None:
            return
        if step >= min(self._profile.end, self._stop):
            self._drain()
            self._finish(step)
            self._log.resume()

    def close(self, step: int) -> None:
        """Ends a trace in progress, where the run was stopped or has failed after this step."""
        if self._local is not None:
            self._finish(step)

    def say_end(self) -> None:
        """How to open what was written."""
        if self._written:
            say(
                f"trace: xprof --logdir {shlex.quote(str(self._folder))} (pip install "
                f'"podlift[profile]"), or open {self._written} in ui.perfetto.dev'
            )

    def _finish(self, step: int) -> None:
        assert self._local is not None
        with self._goodput.spending("profile"), self._errors_told(), self._local as local:
            import jax

            jax.profiler.stop_trace()
            if step > self._first:
                folder = self._write(Path(local), f"steps-{self._first + 1}-{step}")
                say(f"traced steps {self._first + 1} to {step}, in {folder}")
        self._local = self._profile = None

    def _write(self, local: Path, name: str) -> Any:
        """Moves the files of this process to where viewers look for them.

        jax would name the folder by the second and the file by the host: processes of one host
        would overwrite each other's, and those of several would be in different folders.
        """
        folder = self._folder / "plugins" / "profile" / name
        folder.mkdir(parents=True, exist_ok=True)
        for ending in _ENDINGS:
            for source in local.rglob(f"*{ending}"):
                target = folder / f"rank-{self._rank}{ending}"
                with source.open("rb") as file, opened_whole(target) as copy:
                    shutil.copyfileobj(file, copy)
                self._written = str(target)
        return folder

    @contextlib.contextmanager
    def _errors_told(self) -> Any:
        try:
            yield
        except Exception as error:  # another trace is in progress, the disk is full, ...
            warn(f"no trace of the steps: {first_line(error)}")
            self._profile = None
            if self._local is not None:
                self._local.cleanup()
            self._local = None


def annotated(step: int) -> Any:
    """Marks the call that takes the step after `step` in a trace, whoever makes one."""
    import jax

    return jax.profiler.StepTraceAnnotation("train", step_num=step + 1)
