"""Draws docs/terminal.svg: `python docs/make_terminal.py`.

Runs `COMMAND` on a terminal of its own, kills rank 1 with `KILL` once the terminal shows `MOMENT`,
and draws what came, line by line, at the times at which it came. Only the two commands are typed.
What is changed: the temporary folder is shown as `HOME`, as in the README; lines are cut where the
terminal would cut them; there are colours, and the last screen stays for `HOLD` seconds.

The picture is one long column of text that moves up behind a window: no scripts, no fonts from
elsewhere. Who asked for less motion sees the last screen.
"""

from __future__ import annotations

import fcntl
import os
import pty
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import time
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).parent.parent
HOME = "/home/me/podlift"
COMMAND = (
    "python -m launcher --config=configs/digits.py --processes=2 --fake_devices=2"
    " --max_restarts=1 --workdir=runs/digits"
)
MOMENT = "step 330/440"
KILL = 'pkill -9 -P {} -f "rank 1"'
ROWS, COLUMNS = 33, 118
HOLD = 8.0

WIDTH, HEIGHT, MARGIN = 7.8, 17, 16  # of a character, in pixels, and around the text
COLOURS = {
    "$ ": "typed",
    "error: ": "bad",
    "restart ": "good",
    "restored ": "good",
    "finished: ": "good",
}
STYLE = """
text { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace;
       white-space: pre; fill: #d1d7e0 }
.typed { fill: #ffffff; font-weight: bold } .bad { fill: #ff7b72 } .good { fill: #7ee787 }
.note { fill: #9198a1 }
"""


@dataclass(frozen=True)
class Recording:
    """What was on the terminal.

    Attributes:
        lines: (seconds since the start, text) of each.
        kill: (seconds since the start, the command that killed the rank).
    """

    lines: list[tuple[float, str]]
    kill: tuple[float, str]


def record(folder: Path) -> Recording:
    """Runs the command in a folder that has configs/, and kills the rank."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    ours = ("XLA_", "JAX_", "PJRT_", "PODLIFT_", "SLURM_", "OMPI_")
    environ = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    environ |= {"PYTHONPATH": str(ROOT), "TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, *shlex.split(COMMAND)[1:]],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        cwd=folder,
        env=environ,
    )
    os.close(slave)
    began = time.monotonic()
    lines, kill, part = [], None, ""
    while data := read(master):
        now = time.monotonic() - began
        *whole, part = (part + data).replace("\r\n", "\n").split("\n")
        lines += [(now, line.replace(str(folder), HOME)) for line in whole]
        if kill is None and any(MOMENT in line for line in whole):
            kill = now, KILL.format(process.pid)
            subprocess.run(shlex.split(kill[1]), check=True)
    os.close(master)
    if process.wait() or kill is None or any("\x1b" in line for _, line in lines):
        raise SystemExit("\n".join(line for _, line in lines))
    return Recording(lines, kill)


def read(master: int) -> str:
    """What comes next; nothing when the terminal has closed."""
    try:
        return os.read(master, 65536).decode()
    except OSError:
        return ""


def rows_of(lines: list[tuple[float, str]]) -> list[tuple[float, str, str]]:
    """(seconds, text, class) of each row of the terminal."""
    found = []
    for when, line in [(0.0, f"$ {COMMAND}"), *lines]:
        colour = next((name for start, name in COLOURS.items() if line.startswith(start)), "")
        cuts = range(0, max(len(line), 1), COLUMNS)
        found += [(when, line[at : at + COLUMNS], colour) for at in cuts]
    return found


def text_at(row: int, text: str, colour: str) -> str:
    y = MARGIN + HEIGHT * row + HEIGHT * 3 // 4
    kind = f' class="{colour}"' if colour else ""
    return f'<text x="{MARGIN}" y="{y}"{kind}>{escape(text)}</text>'


def draw(recording: Recording) -> str:
    """The picture."""
    rows = rows_of(recording.lines)
    total = rows[-1][0] + HOLD
    # What a row's arrival does: it is the lowest one in the window.
    shift = {when: (ROWS - 1 - number) * HEIGHT for number, (when, _, _) in enumerate(rows)}
    moves = " ".join(
        f"{100 * when / total:.2f}% {{ transform: translateY({y}px) }}" for when, y in shift.items()
    )
    killed = f"{100 * recording.kill[0] / total:.2f}%"
    last = list(shift.values())[-1]
    width, bottom = round(2 * MARGIN + COLUMNS * WIDTH), 2 * MARGIN + ROWS * HEIGHT
    height = bottom + HEIGHT + MARGIN // 2
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
            "<title>Two processes train; one is killed; the run restarts and ends</title>",
            f"<style>{STYLE}#rows {{ transform: translateY({last}px) }}",
            f"@keyframes rows {{ {moves} 100% {{ transform: translateY({last}px) }} }}",
            f"@keyframes kill {{ 0% {{ opacity: 0 }} {killed}, 100% {{ opacity: 1 }} }}",
            "@media (prefers-reduced-motion: no-preference) {",
            f"#rows {{ animation: rows {total:.2f}s step-end infinite }}",
            f"#kill {{ animation: kill {total:.2f}s step-end infinite }} }}</style>",
            f'<clipPath id="seen"><path d="M0 {MARGIN}H{width}V{bottom - MARGIN}H0z"/></clipPath>',
            f'<rect width="{width}" height="{height}" rx="8" fill="#151b23"/>',
            '<g clip-path="url(#seen)"><g id="rows">',
            *(text_at(number, text, colour) for number, (_, text, colour) in enumerate(rows)),
            "</g></g>",
            f'<path d="M0 {bottom}H{width}" stroke="#3d444d"/>',
            text_at(ROWS + 1, "another terminal", "note"),
            f'<g id="kill" transform="translate({20 * WIDTH:g})">',
            text_at(ROWS + 1, f"$ {recording.kill[1]}", "bad"),
            "</g></svg>\n",
        ]
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        shutil.copytree(ROOT / "configs", folder / "configs")
        recording = record(folder)
    (ROOT / "docs" / "terminal.svg").write_text(draw(recording))
    for start in ("error: ", "restored ", "first step done"):  # for what README says of it
        when, line = [found for found in recording.lines if found[1].startswith(start)][-1]
        print(f"{when - recording.kill[0]:.1f} s after the kill: {line}")


if __name__ == "__main__":
    main()
