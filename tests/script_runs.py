"""Runs the scripts that start podlift elsewhere, with stand-ins for the programs they call."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "scripts"
FAKE_DEVICES, SLURM, MPI = "fake_devices.sh", "slurm.sbatch", "mpi.sh"
TPU_POD, RENDER = "tpu_pod.sh", "k8s/render.sh"
MLP = "--config=configs/mlp.py"
HOSTILE = (
    """--config.note=it's "q" $HOME $(PODLIFT_JOB_NAME) `id` \\ & @NAME@ # é: [x] {y} %s\n\t*"""
)
RENDERED = [RENDER, "--name=mlp", "--image=i", "--kind=tpu", "--workdir=gs://b/r", MLP]
# What a machine may have set, and a script reads or passes on.
SETTINGS = ("PODLIFT_", "SLURM_", "OMPI_", "PRTE_", "XLA_", "JAX_", "NCCL_", "PJRT_")


class ScriptRuns:
    """Runs a script to its end, with none of this machine's settings.

    Args:
        folder: for the stand-ins, which come first on PATH, and for what they record.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stand_ins = folder / "bin"
        self._stand_ins.mkdir()
        self.environ = {k: v for k, v in os.environ.items() if not k.startswith(SETTINGS)}
        self.environ["PATH"] = f"{self._stand_ins}:{os.environ['PATH']}"

    def __call__(self, script, *arguments, stdin="", cwd=ROOT, **environ):
        return subprocess.run(
            ["bash", str(SCRIPTS / script), *map(str, arguments)],
            env=self.environ | {name: str(value) for name, value in environ.items()},
            cwd=cwd,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def stand_in(self, name, text):
        """An executable in place of `name`; `record` in it appends its arguments to NAME.log."""
        path = self._stand_ins / name
        log = shlex.quote(str(self._folder / name))
        dump = "import json,sys; print(json.dumps(sys.argv[1:]))"
        record = f"record() {{ python3 -c '{dump}' \"$@\" >>{log}.log; }}\n"
        path.write_text(f"#!/usr/bin/env bash\n{record}{text}\n")
        path.chmod(0o755)
        return path

    def calls(self, name):
        """The arguments of each call of a stand-in."""
        log = self._folder / f"{name}.log"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def only(calls):
    """The one call."""
    assert len(calls) == 1, calls
    return calls[0]


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def shlex_of_bash(line):
    """The words of a line as bash reads it; shlex does not know its quotes of control codes."""
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True
    )
    return done.stdout.split("\0")[:-1]
