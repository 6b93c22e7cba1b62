"""The chaos rounds: a run is disturbed, started again until it is done, and checked.

The same command is started repeatedly, as a scheduler would, and the results must be those of a run
without disturbances. `python tests/chaos --help` runs rounds by hand.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import checks
import damage
import folders
import layout
from checks import Reference
from clock_step import Clock
from patience import wait_out
from running import (
    LIMIT,
    LOOK_AT_SAVES_SECS,
    Start,
    TooLongError,
    attempts,
    begin,
    end_at_once,
    left_behind,
    logs_of,
    progress,
    send,
    wait_for_end,
    wait_until,
    worker_of,
)
from script import HOPELESS, LAUNCHER, PATIENCE_KINDS, Disturbance, Moment, Script

MAX_STARTS = 11
DONE, FAILED, USAGE, AGAIN = 0, 1, 2, 42
# Seconds until all processes of a start must be gone: after a normal end, and after a kill.
GONE_AFTER_END, GONE_AFTER_KILL = 1.0, 5.0


@dataclass(frozen=True)
class Place:
    """What all rounds share.

    Attributes:
        folder: holds a folder for each round.
        cache: the compilation cache.
        in_memory: whether the runs save in-memory checkpoints.
    """

    folder: Path
    cache: Path
    in_memory: bool = True

    def flags(self, fast_secs: float) -> list[str]:
        """Further flags of a run."""
        return [f"--config.{layout.FAST_KEY}={fast_secs}"] if self.in_memory else []


@dataclass(frozen=True)
class Result:
    """How a round went.

    Attributes:
        script: the plan of the round.
        done: the disturbances, and when each happened.
        starts: number of starts of the launcher.
        seconds: duration of the round.
        problems: what is wrong; empty if the round has passed.
        folder: of the round.
    """

    script: Script
    done: tuple[str, ...]
    starts: int
    seconds: float
    problems: tuple[str, ...]
    folder: Path


def make_reference(place: Place, name: str = "reference") -> Path:
    """Runs the command undisturbed; returns the workdir.

    Raises:
        RuntimeError: the run fails.
    """
    folder = place.folder / name
    folder.mkdir(parents=True)
    start = begin(folder / "run", folder, 1, place.flags(0.0), place.cache)
    try:
        code = wait_for_end(start)
    finally:
        end_at_once(start)
    if code != DONE:
        raise RuntimeError(f"the undisturbed run ends with {code}:\n{start.stderr.read_text()}")
    return folder / "run"


def why_no_disk() -> str:
    """Why a run cannot have a file system of its own; empty if it can."""
    if os.geteuid() != 0:
        return "needs root, to mount a small disk"
    if shutil.which("mount") is None:
        return "mount is not installed"
    return ""


def run_round(script: Script, place: Place, reference: Reference) -> Result:
    """Runs one round to its end.

    Returns:
        What was done and what is wrong. The folder of the round stays.
    """
    began = time.monotonic()
    folder = place.folder / f"round-{script.number:04}-{script.kind}"
    folder.mkdir(parents=True)
    needs_disk = any(disturbance.kind == "fill" for disturbance in script.disturbances)
    with folders.small_disk(folder) if needs_disk else contextlib.nullcontext(folder) as inner:
        round_ = _Round(script, place, folder, inner / "run")
        if script.kind == "clock":
            round_.clock = Clock(folder)
        try:
            if script.kind == HOPELESS:
                _run_hopeless(round_)
            elif _run_until_done(round_):
                _check(round_, reference)
        except TooLongError:
            number = len(round_.starts)
            round_.problems.append(f"start {number} takes more than {LIMIT:.0f} s")
        finally:
            for start in round_.starts[-1:]:
                end_at_once(start)
    return Result(
        script=script,
        done=tuple(round_.done),
        starts=len(round_.starts),
        seconds=time.monotonic() - began,
        problems=tuple(round_.problems),
        folder=folder,
    )


@dataclass
class _Round:
    """A round in progress."""

    script: Script
    place: Place
    folder: Path
    workdir: Path
    starts: list[Start] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    damages: list[damage.Damage] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    clock: Clock | None = None
    # Signals and their targets since the last start.
    sent: set[tuple[str, str]] = field(default_factory=set)

    def start(self) -> Start:
        """Starts the launcher once more."""
        flags = self.place.flags(self.script.fast_secs)
        number = len(self.starts) + 1
        environ = self.clock.environ if self.clock else {}
        self.starts.append(
            begin(self.workdir, self.folder, number, flags, self.place.cache, environ)
        )
        self.sent.clear()
        return self.starts[-1]


def _run_until_done(round_: _Round) -> bool:
    """Starts the command until it is done; returns False if it never is."""
    waiting = list(round_.script.disturbances)
    while len(round_.starts) < MAX_STARTS:
        start = round_.start()
        since = start.began
        while waiting and _disturb(round_, start, waiting[0], since):
            del waiting[0]
            since = time.monotonic()
        code = wait_for_end(start)
        killed = ("kill", LAUNCHER) in round_.sent
        left = left_behind(round_.workdir, GONE_AFTER_KILL if killed else GONE_AFTER_END)
        number = len(round_.starts)
        if left:
            round_.problems.append(f"start {number} leaves processes behind: {left}")
            return False
        if not round_.sent and len(logs_of(start)) > 1:
            round_.problems.append(f"start {number} has restarted without a reason; see its logs")
        if code == DONE:
            round_.done += [f"{disturbance}: came too late" for disturbance in waiting]
            return True
        if not _is_explained(code, round_.sent):
            said = start.stderr.read_text(errors="replace")[-3000:]
            round_.problems.append(f"start {number} ends with {code}; its stderr:\n{said}")
            return False
    round_.problems.append(f"not done after {MAX_STARTS} starts")
    return False


def _is_explained(code: int, sent: set[tuple[str, str]]) -> bool:
    """Whether the signals explain how a launcher ended, so that it may be started again."""
    if code == -signal.SIGKILL:
        return ("kill", LAUNCHER) in sent
    if code == -signal.SIGTERM:  # before it had set its handlers
        return ("term", LAUNCHER) in sent
    if code == FAILED:
        return any(kind == "rename" for kind, _ in sent)
    return code == AGAIN and bool(sent)


def _check(round_: _Round, reference: Reference) -> None:
    """Checks what a round has left."""
    workdir = round_.workdir
    set_back = len(attempts(workdir)) > 1
    round_.problems += checks.results(workdir, reference)
    round_.problems += checks.files(workdir, round_.damages, set_back=set_back)
    round_.problems += checks.memory(workdir)
    in_memory = round_.place.in_memory and round_.script.fast_secs > 0
    for harm in round_.damages:
        round_.problems += checks.damage_was_found(
            workdir, harm, round_.starts, in_memory=in_memory
        )
    if (round_.folder / layout.READ_ERRORS_MARK).exists():
        round_.problems += checks.read_errors_were_told(round_.starts)


# Disturbances


def _disturb(round_: _Round, start: Start, disturbance: Disturbance, since: float) -> bool:
    """Waits for the moment and disturbs the run; returns False if the launcher ends before.

    After a disturbance that ends the launcher, the next one waits for the next start.
    """
    if start.is_over or not _wait_for(start, disturbance.moment, since):
        return False
    if disturbance.kind == "corrupt":
        happened = _corrupt(round_, start, disturbance)
    elif disturbance.kind == "fill":
        folders.fill(round_.workdir.parent, disturbance.seconds)
        happened = True
    elif disturbance.kind == "rename":
        happened = _rename(round_, start, disturbance)
    elif disturbance.kind == "read errors":
        happened = _fail_reads(round_, start, disturbance)
    elif disturbance.kind in PATIENCE_KINDS:
        happened = wait_out(start, disturbance, round_.clock)
    else:
        happened = _signal(round_, start, disturbance)
    if happened:
        seconds = time.monotonic() - start.began
        number = len(round_.starts)
        text = f"{disturbance} {disturbance.moment} ({seconds:.1f} s into start {number})"
        if disturbance.kind == "corrupt":
            text += f": {round_.damages[-1].what}"
        round_.done.append(text)
    return happened


def _wait_for(start: Start, moment: Moment, since: float) -> bool:
    if moment.kind == "time":
        due = since + moment.delay
        return wait_until(start, lambda: time.monotonic() >= due)
    if not wait_until(start, lambda: progress(start) >= moment.step):
        return False
    if moment.kind == "saving":
        # There may be no further save; then any moment will do.
        patience = time.monotonic() + 2.0

        def is_saving() -> bool:
            return layout.is_saving(start.workdir) or time.monotonic() > patience

        if not wait_until(start, is_saving, LOOK_AT_SAVES_SECS):
            return False
    time.sleep(moment.delay)
    return True


_SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "stop": signal.SIGSTOP}


def _signal(round_: _Round, start: Start, disturbance: Disturbance) -> bool:
    kind, target = disturbance.kind, disturbance.target
    pid: int | None = start.process.pid
    if target != LAUNCHER:
        rank = int(target.removeprefix("rank "))
        # The worker may not have started yet, or the launcher may be between two attempts.
        if not wait_until(start, lambda: worker_of(start.workdir, rank) is not None):
            return False
        pid = worker_of(start.workdir, rank)
    if pid is None or start.is_over or not send(pid, _SIGNALS[kind]):
        return False
    round_.sent.add((kind, target))
    if kind == "stop" and target == LAUNCHER:
        time.sleep(disturbance.seconds)  # nothing else would continue a suspended launcher
        send(pid, signal.SIGCONT)
    if kind == "kill" and target == LAUNCHER:
        start.process.wait()
    return True


def _corrupt(round_: _Round, start: Start, disturbance: Disturbance) -> bool:
    """Kills the run and damages its newest checkpoint, if an older undamaged one is left."""

    def undamaged() -> list[int]:
        folder = round_.workdir / layout.CHECKPOINTS
        harmed = {harm.inode for harm in round_.damages if harm.harms}
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            steps = layout.complete_steps(round_.workdir)
            return [step for step in steps if (folder / str(step)).stat().st_ino not in harmed]
        return []

    if not wait_until(start, lambda: len(undamaged()) > 1):
        return False
    if start.is_over or not send(start.process.pid, signal.SIGKILL):
        return False
    round_.sent.add(("kill", LAUNCHER))
    start.process.wait()
    if left_behind(round_.workdir, GONE_AFTER_KILL):
        return True  # `_run_until_done` reports it
    rng = random.Random(disturbance.seed)
    next_start = len(round_.starts)
    made = damage.do(round_.workdir, undamaged()[0], disturbance.target, rng, next_start)
    round_.damages.append(made)
    return True


def _rename(round_: _Round, start: Start, disturbance: Disturbance) -> bool:
    # From the first row on the folder is this run's.
    if not wait_until(start, lambda: progress(start) > 0) or start.is_over:
        return False
    round_.sent.add((disturbance.kind, disturbance.target))
    round_.problems += folders.rename(start, is_taken=disturbance.target == "taken")
    return True


def _fail_reads(round_: _Round, start: Start, disturbance: Disturbance) -> bool:
    """Kills the run; the next start cannot read its files for a while."""
    if not wait_until(start, lambda: bool(layout.complete_steps(round_.workdir))):
        return False
    if start.is_over or not send(start.process.pid, signal.SIGKILL):
        return False
    round_.sent.add(("kill", LAUNCHER))
    start.process.wait()
    if not left_behind(round_.workdir, GONE_AFTER_KILL):  # else `_run_until_done` reports it
        folders.fail_reads(round_.folder, round_.workdir, disturbance.seconds)
    return True


# Where no checkpoint is left to resume from


def _run_hopeless(round_: _Round) -> None:
    """All checkpoints are damaged: the run stops, says so, and deletes nothing."""
    rng = random.Random(round_.script.disturbances[0].seed)
    start = round_.start()
    workdir = round_.workdir
    if not wait_until(start, lambda: len(layout.complete_steps(workdir)) > 1):
        round_.problems.append("the run ends before its second save")
        return
    send(start.process.pid, signal.SIGKILL)
    start.process.wait()
    left_behind(workdir, GONE_AFTER_KILL)
    for path in (workdir / layout.CHECKPOINTS).iterdir():
        if layout.LEFT_OVER.search(path.name):
            shutil.rmtree(path)  # a save that lacks only the final name would count
    ways = ("flip", "truncate", "empty", "remove", "garbage", "hollow", "no state")
    for step in layout.steps_in(workdir / layout.CHECKPOINTS):
        harm = damage.do(workdir, step, rng.choice(ways), rng, len(round_.starts))
        round_.damages.append(harm)
        round_.done.append(harm.what)
    start = round_.start()
    code = wait_for_end(start)
    said = start.stderr.read_text(errors="replace")
    if code != USAGE:
        round_.problems.append(f"the run ends with {code} in place of {USAGE}; its stderr:\n{said}")
    if "Traceback" in said or "HINT" not in said:
        round_.problems.append(f"the run does not say what to do:\n{said}")
    for harm in round_.damages:
        if not layout.damage_is_reported(said, harm.step):
            round_.problems.append(f"{harm.what}: no line of stderr says so")
        round_.problems += checks.kept(workdir, harm, where_it_was=True)
    if left := left_behind(workdir, GONE_AFTER_END):
        round_.problems.append(f"processes are left behind: {left}")
