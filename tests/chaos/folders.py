"""Folders that are small or full, that are renamed under a run, or that cannot be read."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import layout
from running import Start, wait_for_end

FAILED = 1
DISK_BYTES = 32 << 20


def rename(start: Start, *, is_taken: bool) -> list[str]:
    """Renames the folder of a run, and back once the run has ended because of it.

    Args:
        start: of the run.
        is_taken: whether another folder gets the name.

    Returns:
        What is wrong, one line each.
    """
    workdir = start.workdir
    moved = workdir.with_name("renamed")
    workdir.rename(moved)
    if is_taken:
        workdir.mkdir()
        (workdir / "mine").write_text("of another run")
    code = wait_for_end(start)
    problems = []
    said = start.stderr.read_text(errors="replace")
    if code == FAILED and f"is now {moved}" not in said:
        problems.append(f"the run does not say where its folder is:\n{said}")
    left = sorted(path.name for path in workdir.iterdir()) if workdir.exists() else []
    if left != ["mine"] * is_taken:
        problems.append(f"the run writes to the folder that has its name now: {left}")
    shutil.rmtree(workdir, ignore_errors=True)
    moved.rename(workdir)
    return problems


def fill(disk: Path, seconds: float) -> None:
    """Fills a disk to the last byte for a while, and again what is freed meanwhile."""
    filler = disk / "filler"
    until = time.monotonic() + seconds
    with filler.open("ab", buffering=0) as file:
        while time.monotonic() < until:
            for size in (1 << 20, 1 << 12, 1):
                with contextlib.suppress(OSError):
                    while file.write(bytes(size)) == size:
                        pass
            time.sleep(0.01)
    filler.unlink()


def fail_reads(folder: Path, workdir: Path, seconds: float) -> None:
    """Makes reads of a run's files fail for a while; see `read_errors/sitecustomize.py`.

    Args:
        folder: of the round.
        workdir: of the run.
        seconds: from now.
    """
    mark = folder / layout.READ_ERRORS_MARK
    mark.write_text(f"{time.time() + seconds} {workdir}")


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A small tmpfs, whose run is copied to `folder` at the end."""
    mounted = folder / "disk"
    mounted.mkdir()
    size = f"size={DISK_BYTES}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", mounted], check=True)
    try:
        yield mounted
        if (mounted / "run").exists():
            shutil.copytree(mounted / "run", folder / "run", symlinks=True)
    finally:
        subprocess.run(["umount", "--lazy", mounted], check=True)
        mounted.rmdir()
