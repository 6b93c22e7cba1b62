"""Worker processes: their start, their output, and their end with all that they have started."""

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
from launcher.supervisor.output import Lines

OnLine = Callable[[str, bool], None]


class Child:
    """One worker process, in a session of its own.

    Args:
        assignment: passed to the worker.
        environ: the whole environment of the worker.
        command: the first arguments; the descriptors of the open files follow.
        label: the last argument, for the output of `ps`.

    Attributes:
        rank: of the worker.
        outcome: what the worker has reported; None before that.
        page: its progress.
        process: its process.
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
            page.write(bytes(os.sysconf("SC_PAGE_SIZE")))  # a hole could fail later, on a full disk
            page.flush()
            self.page = ProgressPage(page.fileno())
            outcome, outcome_end = os.pipe()
            stack.callback(os.close, outcome_end)
            self._outcome_pipe: IO[bytes] = os.fdopen(outcome, "rb", buffering=0)
            inherited = (assigned.fileno(), page.fileno(), outcome_end)
            self.process = subprocess.Popen(
                [*command, ",".join(map(str, inherited)), *([label] if label else [])],
                env={**environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=inherited,
                # Ctrl-C reaches the launcher only, and a signal to the group reaches all that the
                # worker has started.
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Its process id, also the id of its session and process group."""
        return self.process.pid

    def listen(
        self,
        loop: EventLoop,
        on_line: OnLine,
        on_outcome: Callable[[Outcome], None],
        is_full: Callable[[], bool],
    ) -> None:
        """Calls back with each line and whether it is from stderr, and with the outcome.

        While `is_full`, the output of the worker stays in its pipes.
        """
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        Lines(loop, self.process.stdout, lambda line: on_line(line, False), is_full)
        Lines(loop, self.process.stderr, lambda line: on_line(line, True), is_full)

        def read_outcome(line: str) -> None:
            with contextlib.suppress(ValueError, TypeError):  # killed while it wrote the line
                self.outcome = Outcome.from_line(line.encode())
                on_outcome(self.outcome)

        Lines(loop, self._outcome_pipe, read_outcome)

    def signal(self, number: int) -> None:
        """Sends a signal, if the worker is still alive."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def kill(self) -> None:
        """Kills the worker and its process group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def close(self, loop: EventLoop) -> None:
        """Closes the pipes."""
        for pipe in (self.process.stdout, self.process.stderr, self._outcome_pipe):
            if pipe is not None and not pipe.closed:
                loop.remove_reader(pipe)
                pipe.close()


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Children that start in this context begin with these signals blocked, and unblock them."""
    blocked = {*STOP_SIGNALS, STACKS_SIGNAL}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def adopt_orphans() -> None:
    """Makes the orphans of a killed worker children of this process; Linux only."""
    if sys.platform == "linux":
        import ctypes

        set_child_subreaper = 36
        ctypes.CDLL(None).prctl(set_child_subreaper, 1, 0, 0, 0)


def kill_orphans(spared: Iterable[int]) -> None:
    """Kills all children of this process except the given ones; Linux only."""
    known = set(spared)
    for _ in range(10):  # each round may adopt the children of those it has killed
        found = child_pids() - known
        if not found:
            return
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.01)


def child_pids() -> set[int]:
    """The process ids of this process's children; Linux only."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            # The command, in parentheses, may contain spaces and parentheses.
            if int(entry.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.add(int(entry.parent.name))
    return found


def out_of_memory_kills() -> int:
    """The number of processes that the kernel has killed for memory since boot; 0 if unknown."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def is_suspended(pid: int) -> bool:
    """Whether SIGSTOP or a debugger has stopped a process; Linux only."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    return False
