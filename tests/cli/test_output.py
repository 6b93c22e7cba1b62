"""The standard streams: closed, full or unread, and what may pass to a terminal."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, wide

from trainer.console import escape

RUN = """
import os, sys
from trainer.console import guard_streams, open_terminal, say, show, warn
guard_streams()
open_terminal()
opened = open({file!r}, "w")  # gets the lowest free number
say("a message")
warn("a warning")
print("of user code")
os.write(1, b"of a library in C")
os.write(2, b"of a library in C")
opened.write("a row")
opened.close()
assert sys.stdin.read() == ""
"""


def in_shell(command, **options):
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


@pytest.mark.parametrize(
    "streams",
    ["<&- >&- 2>&-", wide("< /dev/null >&-"), wide("< /dev/null 2>&-")],
)
def test_a_closed_stream_loses_only_what_is_printed(tmp_path, streams):
    code = shlex.quote(RUN.format(file=str(tmp_path / "metrics.jsonl")))
    done = in_shell(f"{sys.executable} -c {code} {streams}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "metrics.jsonl").read_text() == "a row"


@pytest.mark.parametrize("streams", ["> /dev/full 2> /dev/full", "2>&1 | true"])
def test_a_stream_that_takes_nothing_ends_no_run(tmp_path, streams):
    # A real disk or pipe also fails what C libraries write, which is theirs to bear.
    code = RUN.format(file=str(tmp_path / "row")).replace("os.write(", "(lambda *_: None)(")
    done = in_shell(f"{sys.executable} -c {shlex.quote(code)} < /dev/null {streams}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "row").read_text() == "a row"


@pytest.mark.parametrize(
    ("arguments", "streams", "code"),
    [
        ("--help", "> /dev/full", 1),
        wide("report --help", "> /dev/full", 1),
        ("report --help", "| true", 0),
        wide("--help", ">&-", 0),
    ],
)
def test_a_command_whose_result_is_lost_fails_unless_nobody_wants_it(arguments, streams, code):
    done = in_shell(f"{sys.executable} -m launcher {arguments} {streams}")
    assert done.returncode == code
    lost = "error: stdout cannot be written: No space left on device\n"
    assert done.stderr == (lost if code else "")


@pytest.mark.parametrize("streams", [">&- 2>&-", wide("> /dev/full 2> /dev/full")])
def test_a_run_trains_with_no_stream_to_print_to(tmp_path, cache_dir, streams):
    workdir = tmp_path / "run"
    done = in_shell(
        f"{sys.executable} -m launcher --config=configs/digits.py --config.num_steps=3 "
        f"--config.log_every_steps=1 --workdir={shlex.quote(str(workdir))} {streams}",
        env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache_dir)},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (workdir / "checkpoints/3").is_dir()
    rows = (workdir / "metrics.jsonl").read_text().splitlines()
    assert rows
    assert all(row.startswith('{"step"') for row in rows)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain \t text\nof two lines, \u00e9\u65e5", "plain \t text\nof two lines, \u00e9\u65e5"),
        ("\x1b[2J\x1b]0;title\x07", "\\x1b[2J\\x1b]0;title\\x07"),
        ("all is well\r\x1b[1Aerror", "all is well\\x0d\\x1b[1Aerror"),
        ("two\r\nlines", "two\nlines"),
        ("C1 \x9b2J \x85 DEL \x7f NUL \0", "C1 \\x9b2J \\x85 DEL \\x7f NUL \\x00"),
        ("gnp\u202e.py", "gnp\\u202e.py"),
        ("\x1b[31mred", "\\x1b[31mred"),
    ],
)
def test_control_characters_are_shown_and_not_obeyed(text, shown):
    assert escape(text) == shown


def test_a_rank_may_use_colours_and_nothing_else():
    assert escape("\x1b[1;31mred\x1b[0m", colors=True) == "\x1b[1;31mred\x1b[0m"
    assert escape("\x1b[31mred \x1b[2J", colors=True) == "\x1b[31mred \\x1b[2J\x1b[0m"
    assert escape("\x1b[2J", colors=True) == "\\x1b[2J"


def test_a_name_with_control_characters_is_printed_escaped(launch):
    code, out, err = launch("--config=no\x1b[2J.py")
    assert code == 2
    assert "\\x1b[2J" in err
    assert "\x1b" not in out + err
