"""The output of workers: lines, progress bars, and the memory that it may take."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from launcher.processes import messages, rank_log
from launcher.processes.background import BackgroundWriter
from launcher.processes.event_loop import EventLoop
from launcher.processes.rank_log import RankFile, finish_logs
from launcher.supervisor.output import Lines


def run_for(loop, seconds):
    over = []
    loop.call_later(seconds, lambda: over.append(True))
    loop.run(lambda: bool(over))


def lines_of(*pieces, **options):
    """The lines that a worker has printed in these pieces, each read before the next is written."""
    found = []
    end, start = os.pipe()
    with os.fdopen(end, "rb", buffering=0) as pipe, EventLoop() as loop:
        Lines(loop, pipe, found.append, **options)
        for piece in pieces:
            os.write(start, piece)
            run_for(loop, 0.02)
        os.close(start)
        loop.run(lambda: pipe.closed)
    return found


@pytest.mark.parametrize(
    ("pieces", "lines"),
    [
        ([b"one\ntw", b"o\n\nlast"], ["one", "two", "", "last"]),
        ([b"of Windows\r", b"\nnext\r\n"], ["of Windows", "next"]),
        ([b"\r 0%", b"\r50%", b"\r100%\n", b"done\n"], ["100%", "done"]),
        ([b" 0%\r", b"50%\r", b"100%\r", b"\n"], ["100%"]),
        ([b"\r 0%\r50%", b"\r    \rdone\n"], ["done"]),
        ([b"\r 0%", b"\r50%"], ["50%"]),
        ([b"\xff\xfe \xc3", b"\xa9\n"], ["\udcff\udcfe \u00e9"]),
    ],
)
def test_of_a_progress_bar_the_last_state_counts(pieces, lines):
    assert lines_of(*pieces) == lines


def test_an_unfinished_progress_bar_shows_its_state_now_and_then():
    assert lines_of(b"\r 0%", b"\r50%", b"\r99%", update_secs=0.0) == [" 0%", "50%", "99%", "99%"]


def test_the_log_has_the_bytes_that_a_rank_has_printed(tmp_path):
    log = RankFile(tmp_path, 1, 0)
    for line in ("\x1b[31m red \udcff", "\ud800 of JSON", "two\nlines\x85\n"):
        log.write(line)
    finish_logs([log])
    lines = [line[20:] for line in log.path.read_bytes().splitlines()]
    assert lines == [b"\x1b[31m red \xff", b"\\ud800 of JSON", b"two", b"lines\xc2\x85"]


def test_a_log_that_the_disk_does_not_take_is_told_once(monkeypatch, tmp_path):
    told = []
    monkeypatch.setattr(rank_log, "print_err", told.append)
    (tmp_path / "logs/attempt-1").mkdir(parents=True)
    (tmp_path / "logs/attempt-1/rank-0.log").symlink_to("/dev/full")
    log = RankFile(tmp_path, 1, 0)
    log.write("one\ntwo")
    finish_logs([log])
    assert told == [f"warning: {log.path} cannot be written: No space left on device"]


# As an `Attempt` does it; prints the highest memory in MB. 200 lines of 1 MB each.
PRINT_MUCH = """
import os, pathlib, subprocess, sys
from launcher.processes.event_loop import EventLoop
from launcher.processes.messages import flush, print_line
from launcher.processes.rank_log import RankFile, finish_logs, is_log_disk_slow
from launcher.supervisor.output import Lines
code = "for i in range(200): print(str(i % 10) * 1000000)"
worker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
log = RankFile(pathlib.Path(sys.argv[1]), 1, 0)
def on_line(line):
    log.write(line)
    print_line(line, is_error=False)
def print_short_ones():
    for i in range(40000):
        print_line(f"short {i}", is_error=False)
with EventLoop() as loop:
    Lines(loop, worker.stdout, on_line, is_log_disk_slow)
    loop.run(lambda: worker.stdout.closed)
print_short_ones()
finish_logs([log])
# ru_maxrss would be that of the parent, before exec.
peak = next(x for x in open("/proc/self/status") if x.startswith("VmHWM"))
sys.stderr.write(f"{int(peak.split()[1]) // 1024:3}")
sys.stderr.flush()
flush(20)
os._exit(0)
"""


def test_what_nobody_reads_is_dropped_from_the_terminal_and_not_from_the_log(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", PRINT_MUCH, tmp_path],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        memory = process.stderr.read(3)  # only then does anybody read stdout
        out, err = process.communicate(timeout=60)
    assert int(memory) < 100, memory
    log = tmp_path / "logs/attempt-1/rank-0.log"
    assert log.stat().st_size == 200 * (1_000_000 + 21)
    shown = out.splitlines()
    assert shown[0] == "0" * 10_000 + " ... 990,000 more characters in the log"
    missing = 200 + 40_000 - len(shown)
    assert missing > 10_000
    assert f"warning: {missing:,} lines are missing here" in err


def test_a_disk_that_does_not_answer_holds_up_the_worker_and_not_the_launcher():
    wanted = []
    end, start = os.pipe()
    with os.fdopen(end, "rb", buffering=0) as pipe, EventLoop() as loop:
        found = []
        Lines(loop, pipe, found.append, is_full=lambda: not wanted)
        os.write(start, b"a line\n")
        os.close(start)
        run_for(loop, 0.1)  # other callbacks come
        assert found == []
        wanted.append(True)
        loop.run(lambda: pipe.closed)
    assert found == ["a line"]


def test_the_terminal_says_once_what_it_has_not_taken(monkeypatch):
    written = []

    class Blocked(BackgroundWriter):
        pending = 0

        def put(self, write, size):
            written.append(write)

    terminal = messages._Terminal()
    terminal._writer = Blocked("test")
    printed = []
    monkeypatch.setattr(
        messages, "_write_to", lambda text, *, is_error: printed.append((text, is_error))
    )
    terminal.print("first", is_error=False, limit=100)
    Blocked.pending = 101
    terminal.print("lost", is_error=False, limit=100)
    Blocked.pending = 60  # still behind: one gap, not two
    terminal.print("lost too", is_error=False, limit=100)
    Blocked.pending = 0
    terminal.print("last", is_error=False, limit=100)
    for write in written:
        write()
    texts = [text for text, _ in printed]
    assert texts[::2] == ["first", "last"]
    assert texts[1].startswith("warning: 2 lines are missing here")
