"""Time from the failure of one rank of two to the next step: podlift, torchrun and raw JAX.

    python benchmarks/recovery.py [--rounds=3] [--torch_python=PATH] [--raw] [--out=FILE.json]

One job, written three times (`benchmarks/recovery_jobs/`): an MLP of 64-128-128-10 with SGD and
momentum on a batch of 64, a checkpoint every 50 steps, and 20 ms per step for its data, which gives
a save time to finish. After step 137 rank 1 sends itself SIGKILL, raises, stalls or sends itself
SIGTERM. Just before, it writes the time to a file.

    podlift    `python -m launcher --processes=2 --max_restarts=3`, with `--hang_timeout_secs=10`
               for the stall. On SIGTERM it saves and exits with 42, and the benchmark plays the
               scheduler: it starts the same command at once
    torchrun   PyTorch DDP over gloo on the CPU, `--standalone --max-restarts=3`. It does not detect
               stalls, so the timeout of the process group is 10 s there. `--torch_python` names
               the environment of `benchmarks/install_torch.sh`; without it these rows are absent.
               With its defaults, torch 2.13 never completes a restart on gloo: the new processes
               read the addresses of the old ones from a store that outlives them, and hang
               (pytorch issue 135712). TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 avoids it
    raw JAX    pmap and Orbax, and a parent that starts two processes, waits until both end, and
               starts them again. It mostly waits for minutes, so it runs only with `--raw`, once,
               all cases concurrently, up to `--limit`

All times count from the event to a line on the pipes of the outermost process: "noticed" is the
supervisor's message (raw JAX: the end of the last process); "restored" is rank 0's line that names
the step it resumes from; "resumed" is rank 0's line after its first step since then, once the
result is ready. podlift prints that line slightly late, after checksums of the state. Steps lost
are the steps before the event that the checkpoint does not hold. Contestants take turns; figures
are medians, and ratios are within a round.
"""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from frame import ROOT, cpu_environ, free_port, parser_of, versions, write

JOBS = Path(__file__).parent / "recovery_jobs"

KINDS = {
    "kill": "rank 1 is killed (-9)",
    "raise": "rank 1 raises",
    "stall": "rank 1 stalls",
    "term": "SIGTERM to rank 1",
}
JOB = {"examples": 1437, "steps": 300, "every": 50, "after": 137, "delay": 0.02}
TIMEOUT = 10  # seconds without progress that count as a stall
RETRY = 42  # podlift's exit code for "start it again"

Row = dict[str, Any]


class Lines:
    """The lines that processes print, each with the time it was read."""

    def __init__(self) -> None:
        self.read: list[tuple[float, str]] = []
        self._threads: list[threading.Thread] = []

    def take(self, *pipes: IO[str] | None) -> None:
        for pipe in pipes:
            thread = threading.Thread(target=self._take, args=[pipe], daemon=True)
            thread.start()
            self._threads.append(thread)

    def _take(self, pipe: IO[str]) -> None:
        for line in pipe:
            self.note(line.rstrip())

    def note(self, line: str) -> None:
        self.read.append((time.time(), line))

    def finish(self) -> None:
        for thread in self._threads:
            thread.join(10)

    def first(self, pattern: str, after: float) -> tuple[float, re.Match[str]] | None:
        """The first line that matches a pattern at or after a time."""
        for when, line in sorted(self.read):
            if when >= after and (match := re.search(pattern, line)):
                return when, match
        return None


def environ(cache: Path) -> dict[str, str]:
    """With a separate compilation cache, which the first start fills for the restart."""
    return cpu_environ(path=JOBS) | {
        "XDG_CACHE_HOME": str(cache),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }


def start(command: list[str], cache: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environ(cache),
        text=True,
        errors="replace",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def run(command: list[str], cache: Path, lines: Lines, limit: float) -> int | None:
    """The exit code; None if the command ran past the limit and was terminated."""
    process = start(command, cache)
    lines.take(process.stdout, process.stderr)
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait()
        return None


def podlift(kind: str, folder: Path, limit: float) -> Row:
    mark, lines = folder / "event", Lines()
    command = [
        *(sys.executable, "-m", "launcher", f"--config={JOBS}/podlift_config.py"),
        *("--processes=2", "--max_restarts=3", f"--workdir={folder}/run"),
        *(f"--config.num_steps={JOB['steps']}", f"--config.checkpoint.every_steps={JOB['every']}"),
        *(f"--config.data.examples={JOB['examples']}", f"--config.data.delay={JOB['delay']}"),
        *(f"--config.data.kind={kind}", f"--config.data.mark={mark}"),
        f"--config.data.after={JOB['after']}",
    ]
    if kind == "stall":
        command.append(f"--hang_timeout_secs={TIMEOUT}")
    codes = [run(command, folder, lines, limit)]
    if codes == [RETRY]:
        codes.append(run(command, folder, lines, limit))
    lines.finish()
    return row("podlift", kind, mark, lines, codes, r"^error: |^asked to stop")


def torchrun(kind: str, folder: Path, limit: float, python: str) -> Row:
    mark, lines = folder / "event", Lines()
    job = {**JOB, "kind": kind, "mark": str(mark), "folder": f"{folder}/run"}
    job["timeout"] = TIMEOUT if kind == "stall" else None
    command = [
        *(python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *("--max-restarts=3", str(JOBS / "torch_ddp.py"), json.dumps(job)),
    ]
    codes = [run(command, folder, lines, limit)]
    lines.finish()
    return row("torchrun", kind, mark, lines, codes, r"failed \(exitcode")


def raw_jax(kind: str, folder: Path, limit: float) -> Row:
    """Starts two processes, again and again until both succeed."""
    mark, lines = folder / "event", Lines()
    job = {**JOB, "kind": kind, "mark": str(mark), "folder": f"{folder}/run"}
    deadline = time.monotonic() + limit
    ends: list[int | None] = [None]
    codes: list[int | None] = []
    while time.monotonic() < deadline and ends != [0, 0]:
        port = free_port()
        processes = [
            start(
                [sys.executable, str(JOBS / "raw_jax.py"), str(port), str(rank), json.dumps(job)],
                folder,
            )
            for rank in range(2)
        ]
        lines.take(processes[0].stdout, processes[0].stderr)
        Lines().take(processes[1].stdout, processes[1].stderr)
        while any(process.poll() is None for process in processes):
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        ends = [process.poll() for process in processes]
        codes += ends
        if None not in ends:
            lines.note("all have ended")
        for process in processes:
            process.kill()
            process.wait()
    lines.finish()
    return row("raw JAX", kind, mark, lines, codes, r"^all have ended")


def row(who: str, kind: str, mark: Path, lines: Lines, codes: list[int | None], notice: str) -> Row:
    """The result of one case, in seconds since the event."""
    if not mark.exists():
        text = "\n".join(line for _, line in lines.read)
        raise SystemExit(f"{who}, {kind}: the event did not come\n{text}")
    event = float(mark.read_text())
    found: Row = {"who": who, "kind": kind, "codes": codes}
    for name, pattern in (
        ("noticed", notice),
        ("restored", r"restored step (\d+)"),
        ("resumed", r"first step done"),
    ):
        if (line := lines.first(pattern, event)) is not None:
            found[name] = line[0] - event
            if name == "noticed":
                found["says"] = re.sub(r" of binary: \S+", "", line[1].string)
            if name == "restored":
                # On SIGTERM, the save is later than the event.
                found["steps lost"] = max(0, JOB["after"] - int(line[1][1]))
    return found


def median(rows: list[Row], who: str, kind: str, name: str) -> float | None:
    found = [r[name] for r in rows if r["who"] == who and r["kind"] == kind and name in r]
    return statistics.median(found) if found else None


def ratio(rows: list[Row], kind: str, name: str, above: str, below: str) -> float | None:
    """The median over the rounds of one contestant's seconds divided by another's."""
    pairs = [
        (a[name], b[name])
        for a in rows
        for b in rows
        if (a["who"], b["who"], a["kind"], b["kind"]) == (above, below, kind, kind)
        and a["round"] == b["round"]
        and name in a
        and name in b
    ]
    return statistics.median(a / b for a, b in pairs) if pairs else None


def table(rows: list[Row], limit: float) -> str:
    text = [
        f"{'event':24} {'':9} {'noticed':>9} {'restored':>9} {'resumed':>9} {'steps lost':>10}"
        "   podlift / it, resumed"
    ]
    for kind, title in KINDS.items():
        for who in ("podlift", "torchrun", "raw JAX"):
            ours = [r for r in rows if r["who"] == who and r["kind"] == kind]
            if not ours:
                continue
            line = f"{title if who == 'podlift' else '':24} {who:9}"
            for name in ("noticed", "restored", "resumed"):
                value = median(rows, who, kind, name)
                line += f" {value:7.2f} s" if value is not None else f" {'-':>9}"
            lost = median(rows, who, kind, "steps lost")
            line += f" {lost:10.0f}" if lost is not None else f" {'-':>10}"
            against = ratio(rows, kind, "resumed", "podlift", who)
            if against is not None and who != "podlift":
                line += f"   {against:.2f}"
            if median(rows, who, kind, "resumed") is None:
                ended = ours[0]["codes"][-1] is not None
                line += "   ran on to its end" if ended else f"   > {limit:.0f} s"
            text.append(line)
    return "\n".join(text)


def all_versions(torch_python: str | None) -> dict[str, str]:
    found = versions("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
    if torch_python:
        code = "import torch, platform; print(torch.__version__, platform.python_version())"
        shown = subprocess.run(
            [torch_python, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
        )
        found["torch"], found["python of torch"] = shown.stdout.split()
    return found


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    parser = parser_of(__doc__, rounds=3)
    parser.add_argument("--only", default=",".join(KINDS), help="of kill, raise, stall and term")
    parser.add_argument("--torch_python", help="a Python that has torch")
    parser.add_argument("--raw", action="store_true", help="also raw JAX, which waits for --limit")
    parser.add_argument("--limit", type=float, default=360, help="seconds for one case")
    options = parser.parse_args()
    if not options.torch_python:
        print("no --torch_python: without torchrun (benchmarks/install_torch.sh)")
    kinds = options.only.split(",")
    contestants: dict[str, Callable[[str, Path], Row]] = {
        "podlift": lambda kind, folder: podlift(kind, folder, options.limit)
    }
    if options.torch_python:
        contestants["torchrun"] = lambda kind, folder: torchrun(
            kind, folder, options.limit, options.torch_python
        )
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:

        def made(*parts: object) -> Path:
            folder = Path(name, "-".join(map(str, parts)))
            folder.mkdir()
            return folder

        for number in range(options.rounds):
            for kind in kinds:
                for who, contestant in contestants.items():
                    found = contestant(kind, made(who, kind, number))
                    rows.append({**found, "round": number})
        if options.raw:
            with ThreadPoolExecutor(len(kinds)) as pool:
                ends = []
                for kind in kinds:
                    folder = made("raw", kind)
                    ends.append(pool.submit(raw_jax, kind, folder, options.limit))
                    while not (folder / "event").exists() and not ends[-1].done():
                        time.sleep(0.05)  # start one at a time
                rows += [{**end.result(), "round": 0} for end in ends]
    print(table(rows, options.limit))
    record = {
        "cores": os.cpu_count(),
        "versions": all_versions(options.torch_python),
        "settings": {**JOB, "stall timeout": TIMEOUT, "limit": options.limit},
        "rows": rows,
    }
    write(record, options.out)


if __name__ == "__main__":
    main()
