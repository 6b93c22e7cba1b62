"""The contestants of `benchmarks/peers.py`: how each starts, and how it takes turns."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from frame import ROOT, cache_environ, cpu_environ, free_port

JOBS = Path(__file__).parent / "peer_jobs"
NEVER = 10**9
BATCHES = {"mlp": 1024, "wide": 256, "resnet": 256}


@dataclass(frozen=True)
class Contestant:
    """A framework and its layout.

    Attributes:
        name: the name in the results.
        who: "podlift", "flax", "ddp", "fabric" or "one" (torch in one process).
        ranks: number of processes.
        devices: devices of each process.
        local: BatchNorm normalises over the examples of one device, not of all.
    """

    name: str
    who: str
    ranks: int = 1
    devices: int = 1
    local: bool = False


CONTESTANTS = [
    Contestant("podlift 2 processes local", "podlift", ranks=2, local=True),
    Contestant("podlift 2 processes", "podlift", ranks=2),
    Contestant("podlift 1 x 2 devices local", "podlift", devices=2, local=True),
    Contestant("podlift 1 x 2 devices", "podlift", devices=2),
    Contestant("podlift 1 process", "podlift"),
    Contestant("flax 2 processes local", "flax", ranks=2, local=True),
    Contestant("flax 2 processes", "flax", ranks=2),
    Contestant("torchrun DDP 2 processes local", "ddp", ranks=2, local=True),
    Contestant("Fabric 2 processes local", "fabric", ranks=2, local=True),
    Contestant("torch 1 process", "one"),
]
# Each peer is compared with podlift on the same number of processes.
RIVALS = {
    "flax 2 processes local": "podlift 2 processes local",
    "flax 2 processes": "podlift 2 processes",
    "torchrun DDP 2 processes local": "podlift 2 processes local",
    "Fabric 2 processes local": "podlift 2 processes local",
    "torch 1 process": "podlift 1 process",
}


@dataclass(frozen=True)
class Bench:
    """The files and programs of one benchmark run.

    Attributes:
        folder: a folder for all files.
        torch_python: a Python that has torch, or None.
    """

    folder: Path
    torch_python: str | None

    def contestants(
        self, *, keep: Callable[[Contestant], bool] = lambda contestant: True
    ) -> list[Contestant]:
        of_torch = ("ddp", "fabric", "one")
        return [c for c in CONTESTANTS if keep(c) and (self.torch_python or c.who not in of_torch)]

    def examples(self, model: str) -> tuple[str, str]:
        """The files of examples and initial weights; created once."""
        paths = self.folder / f"{model}.npz", self.folder / f"{model}-weights.npz"
        if not paths[1].exists():
            command = [sys.executable, str(JOBS / "examples.py"), model, str(self.folder)]
            subprocess.run(command, env=self.environ(1), check=True)
        return str(paths[0]), str(paths[1])

    def state_bytes(self, model: str) -> int:
        """Bytes of the parameters and their momentum."""
        with np.load(self.examples(model)[1]) as arrays:
            return 2 * sum(array.nbytes for array in arrays.values())

    def environ(self, devices: int, cache: str = "cache") -> dict[str, str]:
        return {
            **cpu_environ(devices if devices > 1 else None, path=JOBS),
            **cache_environ(self.folder / cache / "xla"),
            "XDG_CACHE_HOME": str(self.folder / cache),
            "PYTHONWARNINGS": "ignore",
        }

    def commands(self, contestant: Contestant, model: str, job: dict[str, Any]) -> list[list[str]]:
        """The commands to start: one, or one per process where there is no launcher."""
        examples, weights = self.examples(model)
        local = "-local" if contestant.local else ""
        if contestant.who == "podlift":
            return [
                [
                    *(sys.executable, "-m", "launcher"),
                    f"--config={JOBS}/podlift_config.py:{model}{local}",
                    f"--workdir={job['folder']}",
                    *([f"--processes={contestant.ranks}"] if contestant.ranks > 1 else []),
                    f"--config.num_steps={job['steps']}",
                    f"--config.log_every_steps={job['log_every']}",
                    f"--config.checkpoint.every_steps={job['save_every']}",
                    f"--config.data.path={examples}",
                    f"--config.data.shuffle={job['shuffle']}",
                    f"--config.data.address={job['address']}",
                    f"--config.data.segment={job['segment']}",
                ]
            ]
        settings = json.dumps(
            {
                **job,
                "config": f"{model}{local}",
                "model": model,
                "batch": BATCHES[model],
                "ranks": contestant.ranks,
                "examples": examples,
                "weights": weights,
                "port": free_port(),
            }
        )
        if contestant.who == "flax":
            script = str(JOBS / "flax_loop.py")
            return [
                [sys.executable, script, str(rank), settings] for rank in range(contestant.ranks)
            ]
        assert self.torch_python
        start = [self.torch_python]
        if contestant.who == "ddp":
            start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        return [[*start, str(JOBS / "torch_loop.py"), contestant.who, settings]]


@contextlib.contextmanager
def started(
    bench: Bench, contestant: Contestant, commands: list[list[str]], cache: str = "cache"
) -> Iterator[tuple[list[subprocess.Popen[str]], Path]]:
    """Starts a contestant; yields its processes and their log file, and ends them on exit."""
    log = bench.folder / f"{contestant.name.replace(' ', '-')}-{time.monotonic_ns()}.log"
    processes = []
    try:
        with log.open("w") as output:
            for command in commands:
                process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=bench.environ(contestant.devices, cache),
                    text=True,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
                processes.append(process)
        yield processes, log
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
        for process in processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def settings_of(bench: Bench, contestant: Contestant, **changes: Any) -> dict[str, Any]:
    folder = tempfile.mkdtemp(dir=bench.folder)
    return {
        "folder": f"{folder}/run",
        "steps": 1,
        "log_every": NEVER,
        "save_every": NEVER,
        "segment": NEVER,
        "address": "",
        "shuffle": True,
        **changes,
    }


class Taking:
    """A contestant for `turns.Turns`, which runs in processes."""

    def __init__(
        self, bench: Bench, contestant: Contestant, model: str, save_every: int, segment: int
    ) -> None:
        self._bench, self._contestant = bench, contestant
        self._model, self._segment, self._save_every = model, segment, save_every
        self.peak_bytes: list[int] = [0] * contestant.ranks

    def __call__(self, turn: Any) -> None:
        address = f"{tempfile.mkdtemp(dir=self._bench.folder)}/s"
        server = socket.socket(socket.AF_UNIX)
        server.bind(address)
        server.listen()
        job = settings_of(
            self._bench,
            self._contestant,
            steps=NEVER,
            log_every=self._segment // 2,
            save_every=self._save_every,
            segment=self._segment,
            address=address,
        )
        commands = self._bench.commands(self._contestant, self._model, job)
        with started(self._bench, self._contestant, commands) as (processes, log):
            server.settimeout(120)
            connections = [server.accept()[0] for _ in range(self._contestant.ranks)]
            files = [connection.makefile("rw") for connection in connections]
            while True:
                for file in files:
                    line = file.readline()
                    if not line:
                        raise RuntimeError(f"{self._contestant.name}:\n{log.read_text()}")
                    report = json.loads(line)
                    self.peak_bytes[report["rank"]] = report["peak_bytes"]
                if turn():
                    break
                for file in files:
                    file.write("go\n")
                    file.flush()
            for file in files:
                file.close()
            for connection in connections:
                connection.close()  # the processes exit
            server.close()
            for process in processes:
                process.wait(60)
