"""Time from the failure of one rank of two to the end of the last process: podlift and raw JAX.

    python benchmarks/faults.py [--limit=330] [--out=FILE.json]

Raw JAX is a loop with one collective per step, started by hand in each process, with the defaults
of `jax.distributed.initialize`. Its cases mostly wait, so they run concurrently, each until all of
its processes end or the limit passes. podlift's cases run one after another.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from frame import ROOT, cpu_environ, free_port, parser_of, write

FAULTS = ROOT / "tests" / "jobs"  # a data source that fails, and its config

RAW = """
import sys, time
import jax, jax.numpy as jnp
from fault import strike
port, rank, kind, mark = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
step = jax.pmap(lambda x: jax.lax.psum(x, "batch"), axis_name="batch")
for number in range(1_000_000):
    if rank == 1 and number == 50:
        strike(kind, mark)
    jax.block_until_ready(step(jnp.ones((2, 8))))
    time.sleep(0.01)
"""

KINDS = {
    "kill": "rank 1 is killed (-9)",
    "raise": "rank 1 raises",
    "stall": "rank 1 stalls",
    "term": "SIGTERM to rank 1",
    "missing": "rank 1 is not started",
}


def environ() -> dict[str, str]:
    return cpu_environ(2, path=f"{FAULTS}:{ROOT / 'benchmarks' / 'recovery_jobs'}")


def wait_for(path: Path, limit: float) -> float:
    """Waits for a file; returns the time it was made, in seconds since the epoch."""
    deadline = time.time() + limit
    while not path.exists():
        if time.time() > deadline:
            raise SystemExit(f"no event within {limit} s")
        time.sleep(0.005)
    return path.stat().st_mtime


class Raw:
    """One running case of raw JAX."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.mark = kind, folder / f"raw-{kind}"
        self.errors = folder / f"raw-{kind}.err"
        port = free_port()
        with self.errors.open("w") as errors:
            self.processes = [
                subprocess.Popen(
                    [sys.executable, "-c", RAW, str(port), str(rank), kind, str(self.mark)],
                    env=environ(),
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                )
                for rank in (range(1) if kind == "missing" else range(2))
            ]
        if kind == "missing":
            self.mark.touch()

    def row(self, limit: float) -> dict[str, object]:
        """Waits for the end of the case, for at most `limit` seconds."""
        event = wait_for(self.mark, 60)
        while any(process.poll() is None for process in self.processes):
            if time.time() - event > limit:
                break
            time.sleep(0.02)
        seconds = time.time() - event
        codes = [process.poll() for process in self.processes]
        for process in self.processes:
            process.kill()
            process.wait()
        shown = ["runs on" if code is None else code for code in codes]
        over = None in codes
        return {
            "who": "raw JAX",
            "kind": self.kind,
            "seconds": seconds,
            "over": over,
            "codes": shown,
        }


def podlift(kind: str, folder: Path) -> dict[str, object]:
    workdir, mark = folder / f"podlift-{kind}", folder / f"mark-{kind}"
    command = [
        *(sys.executable, "-m", "launcher", f"--config={FAULTS}/digits_config.py"),
        *(f"--workdir={workdir}", "--config.num_steps=2000", "--config.data.delay=0.01"),
        *("--config.data.at_step=50", f"--config.data.once={mark}"),
    ]
    if kind == "missing":
        command += [f"--coordinator_address=127.0.0.1:{free_port()}", "--num_processes=2"]
        command += ["--process_id=0", "--rendezvous_timeout_secs=10"]
    else:
        command += ["--processes=2", f"--config.data.kind={'' if kind == 'term' else kind}"]
        command += ["--hang_timeout_secs=10"]
    process = subprocess.Popen(
        command,
        env=environ(),
        cwd=ROOT,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    if kind == "missing":
        event = time.time()
    elif kind == "term":
        log = workdir / "logs/attempt-1/rank-1.log"
        while not (log.exists() and "step 40/" in log.read_text()):
            time.sleep(0.01)
        found = subprocess.run(
            ["pgrep", "-f", f"rank 1 of 2, {workdir}"], capture_output=True, text=True, check=True
        )
        event = time.time()
        os.kill(int(found.stdout.split()[0]), signal.SIGTERM)
    else:
        event = wait_for(mark, 60)
    error = process.communicate()[1]
    seconds = time.time() - event
    messages = [line for line in error.splitlines() if line.startswith(("error:", "asked"))]
    return {
        "who": "podlift",
        "kind": kind,
        "seconds": seconds,
        "over": False,
        "codes": [process.returncode],
        "says": messages[0].replace("error: ", "") if messages else "",
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--limit", type=float, default=330)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows += [podlift(kind, folder) for kind in KINDS]
        with ThreadPoolExecutor(len(KINDS)) as pool:
            ends = []
            for kind in KINDS:
                raw = Raw(kind, folder)
                ends.append(pool.submit(raw.row, options.limit))
                wait_for(raw.mark, 60)  # start one at a time
            rows += [end.result() for end in ends]
    print(f"{'event':24} {'podlift':>9} {'exit':>5}   {'raw JAX':>9}  exit codes")
    for kind, text in KINDS.items():
        ours, raw = (
            next(r for r in rows if r["who"] == w and r["kind"] == kind)
            for w in ("podlift", "raw JAX")
        )
        bound = ">" if raw["over"] else ""
        codes = ", ".join(map(str, raw["codes"]))
        print(
            f"{text:24} {ours['seconds']:7.2f} s {ours['codes'][0]:5}   "
            f"{bound + format(raw['seconds'], '.1f'):>7} s  {codes}"
        )
    for row in rows:
        if row["who"] == "podlift":
            print(f"{KINDS[row['kind']]}: {row['says']}")
    write({"cores": os.cpu_count(), "rows": rows}, options.out)


if __name__ == "__main__":
    main()
