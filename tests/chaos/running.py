"""One start of the launcher, observed and disturbed from outside."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import layout
from script import PROCESSES

# Seconds that one start may take.
LIMIT = 120.0
# Reading the logs costs time on a busy machine.
LOOK_SECS = 0.02
# A save takes a tenth of a second.
LOOK_AT_SAVES_SECS = 0.003


class TooLongError(Exception):
    """A start that takes too long."""


@dataclass(frozen=True)
class Start:
    """One process of the launcher, and the files with its output."""

    process: subprocess.Popen[bytes]
    workdir: Path
    began: float
    earlier_attempts: frozenset[int]
    stdout: Path
    stderr: Path

    @property
    def is_over(self) -> bool:
        """Whether the launcher has ended."""
        return self.process.poll() is not None


def begin(
    workdir: Path,
    folder: Path,
    number: int,
    flags: list[str],
    cache: Path,
    environ: Mapping[str, str] = {},
) -> Start:
    """Starts the launcher.

    Args:
        workdir: of the run.
        folder: for its output, `start-<number>.out` and `.err`.
        number: of the start.
        flags: further flags.
        cache: the compilation cache.
        environ: further variables.
    """
    stdout, stderr = folder / f"start-{number}.out", folder / f"start-{number}.err"
    command = [
        *(sys.executable, "-m", "launcher", "--config=configs/digits.py"),
        *(f"--processes={PROCESSES}", "--fake_devices=2", f"--workdir={workdir}"),
        *("--config.checkpoint.every_steps=50", "--hang_timeout_secs=5"),
        *("--grace_secs=30", "--max_restarts=5", *flags),
    ]
    before = frozenset(attempts(workdir))
    with stdout.open("wb") as out, stderr.open("wb") as err:
        process = subprocess.Popen(
            command,
            cwd=layout.ROOT,
            env={**_environ(os.environ, cache, folder), **environ},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,  # Ctrl-C is for this program
        )
    return Start(process, workdir, time.monotonic(), before, stdout, stderr)


def _environ(inherited: Mapping[str, str], cache: Path, folder: Path) -> dict[str, str]:
    return {
        **{k: v for k, v in inherited.items() if k not in ("XLA_FLAGS", "PJRT_NPROC")},
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "PYTHONPATH": f"{Path(__file__).parent / 'read_errors'}{os.pathsep}{layout.ROOT}",
        layout.READ_ERRORS: str(folder / layout.READ_ERRORS_MARK),
    }


def wait_until(start: Start, is_so: Callable[[], bool], look_secs: float = LOOK_SECS) -> bool:
    """Waits for a condition; returns False if the launcher ends before.

    Raises:
        TooLongError: the start has taken longer than `LIMIT`.
    """
    while not is_so():
        if start.is_over:
            return False
        if time.monotonic() - start.began > LIMIT:
            raise TooLongError
        time.sleep(look_secs)
    return True


def wait_for_end(start: Start) -> int:
    """Waits for the launcher; returns its exit code.

    Raises:
        TooLongError: the start has taken longer than `LIMIT`.
    """
    while start.process.poll() is None:
        if time.monotonic() - start.began > LIMIT:
            raise TooLongError
        time.sleep(LOOK_SECS)
    return int(start.process.returncode)


# Observations


def attempts(workdir: Path) -> list[int]:
    """The numbers of the attempts that have logs."""
    found = (workdir / "logs").glob("attempt-*")
    return sorted(int(path.name.removeprefix("attempt-")) for path in found)


def logs_of(start: Start) -> list[Path]:
    """The logs of rank 0, of the attempts of a start and of later ones, oldest first."""
    own = [n for n in attempts(start.workdir) if n not in start.earlier_attempts]
    return [start.workdir / f"logs/attempt-{number}/rank-0.log" for number in own]


def progress(start: Start) -> int:
    """The last step in the log of a start's newest attempt; 0 if none."""
    found = re.findall(layout.STEP_LINE, _text_of(logs_of(start)[-1:]))
    return int(found[-1]) if found else 0


def restored(start: Start) -> int | None:
    """The first step that was restored in a start or in later ones."""
    found = re.search(layout.RESTORED_LINE, _text_of(logs_of(start)))
    return int(found[1]) if found else None


def _text_of(paths: list[Path]) -> str:
    texts = []
    for path in paths:
        with contextlib.suppress(OSError):
            texts.append(path.read_text(errors="replace"))
    return "".join(texts)


def processes_of(workdir: Path) -> list[int]:
    """Processes whose command line names a folder: launchers and workers of that run."""
    return [pid for pid, line in _command_lines() if str(workdir) in line and pid != os.getpid()]


def worker_of(workdir: Path, rank: int) -> int | None:
    """The process id of a worker; None if it does not run."""
    label = layout.WORKER.format(rank=rank, processes=PROCESSES, workdir=workdir)
    # A process that was just forked still has the command line of the launcher.
    found = [pid for pid, line in _command_lines() if line.endswith(label + "\0")]
    return found[0] if found else None


def _command_lines() -> list[tuple[int, str]]:
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                line = Path("/proc", name, "cmdline").read_bytes()
                found.append((int(name), line.decode(errors="replace")))
    return found


# Disturbances


def send(pid: int, number: signal.Signals) -> bool:
    """Sends a signal; False if the process is gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def left_behind(workdir: Path, patience: float) -> list[int]:
    """Processes of a run that have not ended after `patience` seconds."""
    deadline = time.monotonic() + patience
    while (left := processes_of(workdir)) and time.monotonic() < deadline:
        time.sleep(LOOK_SECS)
    return left


def end_at_once(start: Start) -> None:
    """Kills what is left of a start; the workers of one that hangs write their stacks before."""
    if not start.is_over:
        send(start.process.pid, signal.SIGCONT)
        send(start.process.pid, signal.SIGQUIT)
        time.sleep(1)
    for pid in processes_of(start.workdir):
        send(pid, signal.SIGKILL)
    start.process.wait()
