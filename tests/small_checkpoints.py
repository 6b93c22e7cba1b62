"""Small checkpoints, and what must be in their folder after a save."""

from __future__ import annotations

from pathlib import Path

from disk_faults import full_disk
from etils import epath

from trainer.checkpoints.folder import CheckpointFolder, expired
from trainer.checkpoints.manifest import Leaf, Manifest

NAMES = ("state/a", "state/deep/b", "c")


def contents(step, version):
    return {name: f"{name} of {step}, version {version}".encode() * 3 for name in NAMES}


def save(folder, step, version, fails_at=None):
    """Saves a small checkpoint; each of its files is written in two parts.

    Args:
        fails_at: the file in the middle of which the disk is full.
    """

    def write(place):
        for number, (name, data) in enumerate(contents(step, version).items()):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(data[:5])
            if number == fails_at:
                raise full_disk()
            with (place / name).open("ab") as file:
                file.write(data[5:])

    def describe(files):
        assert sorted(files) == sorted(NAMES)
        return Manifest(step, {"version": version}, {"w": Leaf((), "int32", step)}, files)

    folder.save(step, write, describe)


def versions_of(folder):
    """The version of each step that is there; all are whole."""
    found = {}
    for step in folder.steps():
        with folder.opened(step) as (place, listed):
            assert listed == folder.check(step)
            version = found[step] = listed.meta["version"]
            for name, data in contents(step, version).items():
                assert (place / name).read_bytes() == data
    return found


def leftovers(folder):
    allowed = {*map(str, folder.steps()), "quarantine"}
    return sorted({entry.name for entry in Path(folder.path).iterdir()} - allowed)


def steps_after(before, step, version, keep):
    """What is there after a save: at most, and at least."""
    everything = {**before, step: version}
    gone = expired(sorted(everything), keep, step)
    return everything, {s: v for s, v in everything.items() if s not in gone}


def check_save(before, after, step, version, keep):
    """A save has happened, or not; nothing between."""
    if after.get(step) != version:
        assert after == before
        return
    most, least = steps_after(before, step, version, keep)
    assert least.items() <= after.items() <= most.items()


def prepared(path, steps, keep=9):
    folder = CheckpointFolder(epath.Path(path), keep)
    for step in steps:
        save(folder, step, 1)
    return folder
