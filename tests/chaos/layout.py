"""Every name in podlift that the chaos rounds rely on: files, folders, words in logs."""

from __future__ import annotations

import os
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
FAST_KEY = "checkpoint.fast_every_secs"

# Inside a workdir.
CHECKPOINTS = "checkpoints"
BEST = "best"
QUARANTINE = "checkpoints/quarantine"
KEEP = 3  # of `config.checkpoint.keep`

# Inside a step of either folder.
STATE = "state"
MANIFEST = "manifest.json"
COMPLETE = MANIFEST  # written last: a step without it was never saved
DESCRIPTIONS = (MANIFEST, "metadata", "_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt")

# Beside the steps, while one is saved or removed.
SAVING = ".saving-{step}"
ORBAX_SAVING = "{step}.orbax-checkpoint-tmp"
LEFT_OVER = re.compile(r"\.saving-|\.removed-|\.orbax-checkpoint-tmp|\.part$")

# The only files that a finished run may leave.
ALLOWED = (
    r"config\.json",
    r"env\.json",
    r"metrics\.jsonl",
    r"\.lock",
    r"events\.out\.tfevents\.[^/]+",
    r"logs/attempt-\d+/rank-[01]\.log",
    r"checkpoints/\d+/.+",
    r"\.(checkpoints|best)\.json",
    r"best/\d+/.+",
)
# Only where a step was damaged, and where a run resumed from before its best step.
ALLOWED_IF_DAMAGED = r"checkpoints/quarantine/\d+-[^/]+/.+"
ALLOWED_IF_SET_BACK = r"best/quarantine/\d+-[^/]+/.+"

# In-memory checkpoints: one folder a run, with a file that names the run.
FAST_ROOT = Path(f"/dev/shm/podlift-{os.getuid()}")
FAST_OWNER = "workdir"

# The variable that names the file `tests/chaos/read_errors` looks at.
READ_ERRORS, READ_ERRORS_MARK = "CHAOS_READ_ERRORS", "unreadable-until"

# Words.
WORKER = "rank {rank} of {processes}, {workdir}"
STEP_LINE = re.compile(r" step (\d+)/\d+  ")
RESTORED_LINE = re.compile(r" restored step (\d+)\b")
SPEED_TAGS = ("train/examples_per_second", "train/step_seconds")


def steps_in(folder: Path) -> list[int]:
    """The steps in a folder of checkpoints, newest first, complete or not."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def complete_steps(workdir: Path) -> list[int]:
    """The steps of `checkpoints/` whose save is complete, newest first."""
    folder = workdir / CHECKPOINTS
    return [step for step in steps_in(folder) if (folder / str(step) / COMPLETE).exists()]


def is_saving(workdir: Path) -> bool:
    """Whether a save is in progress, or was interrupted."""
    for folder in (workdir / CHECKPOINTS, workdir / BEST):
        try:
            if any(LEFT_OVER.search(name) for name in os.listdir(folder)):
                return True
        except OSError:
            continue
    return False


def fast_folders(workdir: Path) -> list[Path]:
    """The folders with in-memory checkpoints of a run."""
    found = []
    for owner in FAST_ROOT.glob(f"*/{FAST_OWNER}"):
        try:
            if str(workdir) in owner.read_text():
                found.append(owner.parent)
        except OSError:
            continue
    return found


def damage_is_reported(text: str, step: int) -> bool:
    """Whether a line of stderr says that a checkpoint is damaged."""
    return any(
        re.search(rf"\b{step}\b", line) and re.search("checkpoint|quarantine", line)
        for line in text.splitlines()
    )


def is_allowed(path: str, *, damaged: bool, set_back: bool) -> bool:
    """Whether a finished run may leave a file, given as a path within its workdir."""
    patterns = [*ALLOWED]
    if damaged:
        patterns.append(ALLOWED_IF_DAMAGED)
        if re.fullmatch(ALLOWED_IF_DAMAGED, path):
            return True  # with any name: a damaged step is kept unchanged
    if set_back:
        patterns.append(ALLOWED_IF_SET_BACK)
    return not LEFT_OVER.search(path) and any(re.fullmatch(p, path) for p in patterns)
