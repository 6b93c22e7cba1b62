"""What a launcher tells the person who started it.

A thread writes, so that a terminal that does not take more (Ctrl-S, `less`) holds up neither the
watch over the workers nor the other launchers.
"""

from __future__ import annotations

import contextlib
import queue
import shlex
import sys
import threading
from typing import TextIO

from etils import epath

# Of lines that the terminal has not taken yet; what comes then is only in the logs.
_LONGEST_QUEUE = 10_000

_lines: queue.Queue[tuple[bool, str]] = queue.Queue(_LONGEST_QUEUE)
_writer: threading.Thread | None = None


def show(text: str, *, is_error: bool = True) -> None:
    """Writes whole lines to the terminal, soon; what nobody reads is no reason to stop."""
    global _writer
    if _writer is None:
        _writer = threading.Thread(target=_write, name="podlift-terminal", daemon=True)
        _writer.start()
    with contextlib.suppress(queue.Full):
        _lines.put_nowait((is_error, text))


def print_out(text: str) -> None:
    """Writes a line to stdout."""
    show(text, is_error=False)


def flush(seconds: float = 2.0) -> None:
    """Waits until all is written, but no longer than that."""
    with _lines.all_tasks_done:
        _lines.all_tasks_done.wait_for(lambda: not _lines.unfinished_tasks, seconds)


def _write() -> None:
    while True:
        is_error, text = _lines.get()
        _write_to(sys.stderr if is_error else sys.stdout, f"{text}\n")
        _lines.task_done()


def _write_to(stream: TextIO | None, text: str) -> None:
    """In one piece: other launchers may write to the same place."""
    with contextlib.suppress(OSError, ValueError):  # closed, or `| head`
        if stream is not None:
            encoding = stream.encoding or "utf-8"
            stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            stream.flush()


def how_to_resume(workdir: str, *, smoke: bool = False, in_memory: bool = False) -> str:
    """One line: the newest checkpoint, and the command that goes on from it.

    Args:
        workdir: the run's folder.
        smoke: whether it only tried whether the run would work.
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
            "HINT: there is no checkpoint yet: the same command goes on from a copy in memory if "
            "one was made, or starts at step 0"
        )
    if not steps:
        return (
            "HINT: there is no checkpoint yet, so the same command starts at step 0; "
            "config.checkpoint.every_steps says how often to save"
        )
    again = shlex.quote(f"--workdir={workdir}")
    return f"HINT: the same command with {again} goes on from step {max(steps)}"
