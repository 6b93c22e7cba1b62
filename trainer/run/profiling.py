"""Traces of some steps with jax's profiler, for XProf, TensorBoard and Perfetto."""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.console import say, warn
from trainer.errors import UserError, first_line
from trainer.workdir.paths import opened_whole

if TYPE_CHECKING:  # a launcher parses the flag, without numpy
    from trainer.lift.call import Call
    from trainer.metrics_writer.step_metrics import StepMetrics
    from trainer.workdir.workdir import Workdir

# The files that jax writes in each process, named by its host.
_ENDINGS = (".xplane.pb", ".trace.json.gz")


@dataclass(frozen=True)
class Profile:
    """The steps to trace.

    Attributes:
        start: steps before them.
        steps: how many; rounded up to whole calls.

    Raises:
        UserError: `start` is negative, or `steps` is not positive.
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
        """Steps taken after the last of them."""
        return self.start + self.steps


def _unclear(given: str) -> UserError:
    return UserError(
        f"{given} should be START:STEPS, with STEPS of at least 1",
        "--profile=100:5 traces the 5 steps after the first 100",
    )


class Profiler:
    """Traces the steps of a profile. Every process writes its own file, named by its rank.

    The time it takes is not part of the reported speed. A trace that cannot be made is a warning,
    and training continues. As an action of the loop it ends the trace; `before` starts it.

    Args:
        profile: which steps; None: none.
        workdir: the run's folder.
        rank: of this process.
        per_call: steps in one call.
        stop: the step at which the run stops.
        metrics: of the steps; drained before and after, with its clock stopped meanwhile.

    Raises:
        UserError: the run ends before these steps.
    """

    def __init__(
        self,
        profile: Profile | str | None,
        workdir: Workdir,
        rank: int,
        *,
        per_call: int,
        stop: int,
        metrics: StepMetrics,
    ) -> None:
        profile = Profile.parse(profile) if isinstance(profile, str) else profile
        if profile is not None and profile.start >= stop:
            raise UserError(
                f"{profile} begins past the end of the run, which stops at step {stop}",
                f"START can be from 0 to {stop - 1}",
            )
        self._profile = profile
        self._folder = workdir.path
        self._rank = rank
        self._per_call, self._stop = per_call, stop
        self._metrics = metrics
        self._local: tempfile.TemporaryDirectory[str] | None = None
        self._first = 0
        self._written = ""

    def before(self, step: int) -> None:
        """Starts the trace if the call after `step` steps takes the first step of the profile."""
        profile = self._profile
        if profile is None or self._local is not None or step >= self._stop:
            return
        if step >= profile.end:
            say(f"nothing is traced: {profile} lies before step {step}, from which the run resumes")
            self._profile = None
            return
        if min(step + self._per_call, self._stop) <= profile.start:
            return
        self._metrics.drain()
        self._metrics.log.pause()
        with self._metrics.goodput.spending("profile"), self._errors_as_warnings():
            import jax

            self._local, self._first = tempfile.TemporaryDirectory(prefix="podlift-trace-"), step
            jax.profiler.start_trace(self._local.name)
        if self._profile is None:
            self._metrics.log.resume()

    def due(self, call: Call) -> bool:
        """After the last step of the profile."""
        if self._local is None or self._profile is None:
            return False
        return call.step >= min(self._profile.end, self._stop)

    def run(self, call: Call, state: Any) -> None:
        """Ends the trace, and writes it."""
        self._metrics.drain()
        self._finish(call.step)
        self._metrics.log.resume()

    def close(self, step: int) -> None:
        """Ends a trace in progress, where the run stops or fails after this step."""
        if self._local is not None:
            self._finish(step)

    def say_end(self) -> None:
        """Prints how to open the trace."""
        if self._written:
            say(
                f"trace: xprof --logdir {shlex.quote(str(self._folder))} (pip install "
                f'"podlift[profile]"), or open {self._written} in ui.perfetto.dev'
            )

    def _finish(self, step: int) -> None:
        assert self._local is not None
        spending = self._metrics.goodput.spending("profile")
        with spending, self._errors_as_warnings(), self._local as local:
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
    def _errors_as_warnings(self) -> Any:
        try:
            yield
        except Exception as error:  # another trace in progress, a full disk, ...
            warn(f"no trace of the steps: {first_line(error)}")
            self._profile = None
            if self._local is not None:
                self._local.cleanup()
            self._local = None


def annotated(step: int) -> Any:
    """Marks a call after `step` steps in any trace."""
    import jax

    return jax.profiler.StepTraceAnnotation("train", step_num=step + 1)
