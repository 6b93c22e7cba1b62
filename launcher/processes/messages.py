"""The launcher's terminal: lines that a thread writes, and the hint on how to resume.

With a thread, a terminal that blocks (Ctrl-S, `less`) holds up neither the supervision of the
workers nor the other launchers.
"""

from __future__ import annotations

import contextlib
import queue
import shlex
import sys
import threading
from typing import TextIO

from etils import epath

# Lines that the terminal has not accepted yet. Further ones are dropped; the logs have them.
_MAX_PENDING = 10_000

_lines: queue.Queue[tuple[bool, str]] = queue.Queue(_MAX_PENDING)
_writer: threading.Thread | None = None


def print_out(text: str) -> None:
    """Writes whole lines to stdout, soon."""
    _enqueue(text, is_error=False)


def print_err(text: str) -> None:
    """Writes whole lines to stderr, soon."""
    _enqueue(text, is_error=True)


def flush(seconds: float = 2.0) -> None:
    """Waits until every line is written, or until the time is over."""
    with _lines.all_tasks_done:
        _lines.all_tasks_done.wait_for(lambda: not _lines.unfinished_tasks, seconds)


def _enqueue(text: str, *, is_error: bool) -> None:
    global _writer
    if _writer is None:
        _writer = threading.Thread(target=_write_lines, name="podlift-terminal", daemon=True)
        _writer.start()
    with contextlib.suppress(queue.Full):
        _lines.put_nowait((is_error, text))


def _write_lines() -> None:
    while True:
        is_error, text = _lines.get()
        _write_to(sys.stderr if is_error else sys.stdout, f"{text}\n")
        _lines.task_done()


def _write_to(stream: TextIO | None, text: str) -> None:
    """Writes in one piece, since other launchers may write to the same terminal."""
    with contextlib.suppress(OSError, ValueError):  # closed, or `| head`
        if stream is not None:
            encoding = stream.encoding or "utf-8"
            stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            stream.flush()


def how_to_resume(workdir: str, *, smoke: bool = False, in_memory: bool = False) -> str:
    """One line: the newest checkpoint, and the command that resumes from it.

    Args:
        workdir: the run's folder.
        smoke: whether this is a smoke test.
        in_memory: whether the run may have left an in-memory checkpoint.
    """
    if smoke:
        return "HINT: this was a smoke test; nothing of the run itself was touched"
    steps = []
    with contextlib.suppress(Exception):  # clients of object stores raise many types
        folder = epath.Path(workdir) / "checkpoints"
        steps = [int(path.name) for path in folder.iterdir() if path.name.isdigit()]
    if not steps and in_memory:
        return (
            "HINT: there is no checkpoint yet: the same command resumes from an in-memory "
            "checkpoint if one was saved, or starts at step 0"
        )
    if not steps:
        return (
            "HINT: there is no checkpoint yet, so the same command starts at step 0; "
            "config.checkpoint.every_steps says how often to save"
        )
    again = shlex.quote(f"--workdir={workdir}")
    return f"HINT: the same command with {again} resumes from step {max(steps)}"
