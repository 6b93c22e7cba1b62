"""Plans in processes of their own, with real compilers or without."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT, skip_here

needs_tpu_compiler = skip_here(
    "" if importlib.util.find_spec("libtpu") else "scripts/setup.sh tpu was not run"
)


needs_gpu_compiler = skip_here(
    "" if Path(sys.prefix, "plan-gpu").is_dir() else "scripts/setup.sh plan-gpu was not run"
)


DIGITS = f"--config={ROOT}/configs/digits.py"


RESNET = f"{DIGITS}:resnet"


# What is reduced at the end: gradients of 77,754 parameters, mean and variance of 336 normalised
# features, the sums of loss and accuracy and their count. The offset of a shortcut's normalisation
# (32 and 64 features) has the same gradient as that of the block it is added to: reduced once.
UPDATE_BYTES = 4 * (77_754 - 32 - 64 + 2 * 336 + 3)


# Hides the compilers, as on a machine where only podlift is installed.
WITHOUT_COMPILERS = """
import importlib.util, sys
from launcher.planning import devices
devices.has_compiler = lambda topology: False
from launcher.cli.plan import main
sys.exit(main(sys.argv[1:]))
"""


def make_plan(tmp_path):
    """A function that plans in another process; it returns (exit code, stdout, stderr, JSON)."""

    def run(*arguments, compilers=True, cwd=ROOT, cache=tmp_path / "cache"):
        how = ["-m", "launcher", "plan"] if compilers else ["-c", WITHOUT_COMPILERS]
        path = tmp_path / "plan.json"
        path.unlink(missing_ok=True)
        done = subprocess.run(
            [sys.executable, *how, *arguments, f"--json={path}"],
            cwd=cwd,
            env={
                **{k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PJRT_NPROC")},
                "PYTHONPATH": str(ROOT),
                "XDG_CACHE_HOME": str(cache),
            },
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        found = json.loads(path.read_text()) if path.exists() else None
        return done.returncode, done.stdout, done.stderr, found

    return run


def bytes_of(found, module=None):
    return sum(c["bytes"] for c in found["collectives"] if module in (None, c["module"]))
