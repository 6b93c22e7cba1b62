"""WorkerSpec processes: started, listened to, and ended with all that they have started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

from launcher.processes.assignment import Assignment, Outcome
from launcher.processes.event_loop import EventLoop
from launcher.processes.progress_page import ProgressPage
from launcher.processes.signals import STACKS_SIGNAL, STOP_SIGNALS

OnLine = Callable[[str, bool], None]


class Child:
    """One worker process, in a session of its own.

    Args:
        assignment: its part.
        environ: its whole environment.
        command: the arguments before those that name its open files.
        label: a last argument, for people who read `ps`.
    """

    def __init__(
        self,
        assignment: Assignment,
        environ: Mapping[str, str],
        command: Iterable[str] = (sys.executable, "-m", "launcher.worker"),
        label: str = "",
    ) -> None:
        self.rank = assignment.rank
        self.outcome: Outcome | None = None
        with contextlib.ExitStack() as stack:
            assigned = stack.enter_context(tempfile.TemporaryFile())
            assignment.write(assigned)
            page = stack.enter_context(tempfile.TemporaryFile())
            page.write(bytes(os.sysconf("SC_PAGE_SIZE")))  # not a hole: that could fail later
            page.flush()
            self.page = ProgressPage(page.fileno())
            report, report_end = os.pipe()
            stack.callback(os.close, report_end)
            self.report: IO[bytes] = os.fdopen(report, "rb", buffering=0)
            passed = (assigned.fileno(), page.fileno(), report_end)
            self.process = subprocess.Popen(
                [*command, ",".join(map(str, passed)), *([label] if label else [])],
                env={**environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=passed,
                # Ctrl-C reaches the launcher only, and one signal reaches all that a worker starts.
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Its process id, also that of its session and group."""
        return self.process.pid

    def listen(
        self, loop: EventLoop, on_line: OnLine, on_outcome: Callable[[Outcome], None]
    ) -> None:
        """Passes on its output, as (line, whether from stderr), and its outcome."""
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        _Lines(loop, self.process.stdout, lambda line: on_line(line, False))
        _Lines(loop, self.process.stderr, lambda line: on_line(line, True))

        def take(line: str) -> None:
            with contextlib.suppress(ValueError, TypeError):  # killed in the middle of its words
                self.outcome = Outcome.from_line(line.encode())
                on_outcome(self.outcome)

        _Lines(loop, self.report, take)

    def signal(self, number: int) -> None:
        """Sends it a signal, if it is still there."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def kill(self) -> None:
        """Ends it and what it has started at once."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def close(self, loop: EventLoop) -> None:
        """Lets go of its pipes."""
        for pipe in (self.process.stdout, self.process.stderr, self.report):
            if pipe is not None and not pipe.closed:
                loop.remove_reader(pipe)
                pipe.close()


class _Lines:
    """Whole lines out of a pipe, until its end."""

    def __init__(self, loop: EventLoop, pipe: IO[bytes], on_line: Callable[[str], None]) -> None:
        self._loop = loop
        self._pipe = pipe
        self._on_line = on_line
        self._rest = b""
        os.set_blocking(pipe.fileno(), False)
        loop.add_reader(pipe, self._read)

    def _read(self) -> None:
        try:
            data = os.read(self._pipe.fileno(), 1 << 16)
        except BlockingIOError:
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        if (not data and self._rest) or len(self._rest) > 1 << 20:
            lines, self._rest = [*lines, self._rest], b""
        for line in lines:
            self._on_line(line.decode(errors="replace"))
        if not data:
            self._loop.remove_reader(self._pipe)
            self._pipe.close()


@contextlib.contextmanager
def signals_held_back() -> Iterator[None]:
    """Children started in here begin with our signals blocked, until they are ready for them."""
    held = {*STOP_SIGNALS, STACKS_SIGNAL}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def adopt_orphans() -> None:
    """Makes what a killed worker leaves behind a child of this process, to be found and ended."""
    if sys.platform == "linux":
        import ctypes

        set_child_subreaper = 36
        ctypes.CDLL(None).prctl(set_child_subreaper, 1, 0, 0, 0)


def kill_orphans(spared: Iterable[int]) -> None:
    """Ends the children of this process that are none of the given ones; Linux only."""
    known = set(spared)
    for _ in range(10):  # each round may bring to light what those it ended had started
        found = children() - known
        if not found:
            return
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.01)


def children() -> set[int]:
    """The children of this process; Linux only."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            # The command, in parentheses, may hold anything.
            if int(entry.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.add(int(entry.parent.name))
    return found


def out_of_memory_kills() -> int:
    """How often the kernel has killed a process for memory since it started; 0 if it won't say."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def is_suspended(pid: int) -> bool:
    """Whether a process was stopped by SIGSTOP or a debugger; Linux only."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    return False
