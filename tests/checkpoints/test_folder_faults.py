"""Whatever happens to a folder of checkpoints, the newest completed one is there and intact."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from disk_faults import Killed, faults, full_disk, tree
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from small_checkpoints import (
    NAMES,
    check_save,
    contents,
    leftovers,
    prepared,
    save,
    steps_after,
    versions_of,
)

from trainer.checkpoints import folder as folder_module
from trainer.checkpoints import manifest
from trainer.checkpoints.folder import CheckpointFolder
from trainer.checkpoints.manifest import Damaged


@pytest.fixture(scope="module", autouse=True)
def no_waiting_for_the_disk():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder_module.os, "fsync", lambda descriptor: None)
        yield


# Any history

STEPS = st.integers(1, 9)
OPERATIONS = st.one_of(
    st.tuples(st.just("save"), STEPS),
    st.tuples(st.just("save again"), st.just(0)),
    st.tuples(st.just("write fails"), STEPS, st.integers(0, len(NAMES) - 1)),
    st.tuples(st.just("disk fails"), STEPS, st.integers(1, 40)),
    st.tuples(st.just("killed"), STEPS, st.integers(1, 40)),
    st.tuples(st.just("killed in sweep"), STEPS, st.integers(1, 40), st.integers(1, 8)),
    st.tuples(st.just("sweep")),
    st.tuples(st.just("quarantine"), st.integers(0, 8)),
)


class History:
    """A folder, what must be in it, and operations on it."""

    def __init__(self, path, keep):
        self.path, self.keep = epath.Path(path), keep
        self.folder = CheckpointFolder(self.path, keep)
        self.version = 0
        self.aside = 0
        self.ever = False
        self.there = {}

    def apply(self, name, *arguments):
        getattr(self, name.replace(" ", "_"))(*arguments)
        assert versions_of(self.folder) == self.there
        self.ever = self.ever or bool(self.there)
        assert self.folder.has_history() >= self.ever
        in_quarantine = self.path / "quarantine"
        assert len(list(in_quarantine.iterdir()) if self.aside else []) == self.aside

    def save(self, step):
        self.version += 1
        save(self.folder, step, self.version)
        _, self.there = steps_after(self.there, step, self.version, self.keep)
        assert len(self.there) <= self.keep
        assert not [name for name in leftovers(self.folder) if name.startswith(".saving")]

    def save_again(self, _):
        self.save(max(self.there, default=1))

    def write_fails(self, step, number):
        self.version += 1
        with pytest.raises(OSError, match="No space left"):
            save(self.folder, step, self.version, fails_at=number)
        assert not [name for name in leftovers(self.folder) if name.startswith(".saving")]

    def disk_fails(self, step, at):
        """Once; what failed is tried again."""
        self.version += 1
        before = self.there
        try:
            with faults(at, full_disk()):
                save(self.folder, step, self.version)
        except OSError:
            self.there = versions_of(self.folder)
            check_save(before, self.there, step, self.version, self.keep)
            self.save(step)
        else:
            _, self.there = steps_after(before, step, self.version, self.keep)

    def killed(self, step, at, at_sweep=0):
        self.version += 1
        before = self.there
        try:
            with faults(at):
                save(self.folder, step, self.version)
        except Killed:
            pass
        else:
            assert steps_after(before, step, self.version, self.keep)[1] == versions_of(self.folder)
        self.folder = CheckpointFolder(self.path, self.keep)
        if at_sweep:
            try:
                with faults(at_sweep):
                    self.folder.sweep()
            except Killed:
                self.folder = CheckpointFolder(self.path, self.keep)
        self.sweep()
        self.there = versions_of(self.folder)
        check_save(before, self.there, step, self.version, self.keep)

    def killed_in_sweep(self, step, at, at_sweep):
        self.killed(step, at, at_sweep)

    def sweep(self):
        self.folder.sweep()
        if self.path.exists():
            assert leftovers(self.folder) == []
        assert self.folder.sweep() == []

    def quarantine(self, number):
        if not self.there:
            return
        step = sorted(self.there)[number % len(self.there)]
        version = self.there.pop(step)
        moved = self.folder.quarantine(step, "what is wrong with it")
        self.aside += 1
        assert moved.parent == self.path / "quarantine"
        assert (moved / "why.txt").read_text() == "what is wrong with it\n"
        for name, data in contents(step, version).items():
            assert (moved / name).read_bytes() == data


@settings(max_examples=100)
@given(
    st.integers(1, 3),
    st.lists(st.tuples(st.sampled_from(["latest", "best"]), OPERATIONS), max_size=10),
)
def test_any_history(keep, operations):
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        histories = {
            "latest": History(root / "checkpoints", keep),
            "best": History(root / "best", 1),
        }
        for which, operation in operations:
            (other,) = (h for key, h in histories.items() if key != which)
            others = tree(other.path)
            histories[which].apply(*operation)
            assert tree(other.path) == others


# Every moment at which a kill or an error can come

BEFORE = {
    "the first": ((), 5, 2),
    "one more": ((5,), 10, 3),
    "one too many": ((5, 10), 15, 2),
    "the only one kept": ((5,), 10, 1),
    "an older one": ((5, 10), 7, 2),
    "the newest again": ((5, 10), 10, 2),
    "the only one again": ((5,), 5, 1),
    "several too many": ((5, 10, 15), 20, 1),
}


def each_point(tmp_path, case, error=None):
    """(folder, what was raised) for each point at which a save can be interrupted."""
    steps, step, keep = BEFORE[case]
    prepared(tmp_path / "before", steps)
    (tmp_path / "before").mkdir(exist_ok=True)
    at = 0
    while True:
        at += 1
        path = shutil.copytree(tmp_path / "before", tmp_path / f"{at}")
        folder = CheckpointFolder(epath.Path(path), keep)
        raised = None
        with faults(at, error and error()) as state:
            try:
                save(folder, step, 2)
            except (Killed, OSError) as caught:
                raised = caught
        if not state.came:
            break
        yield folder, raised
    assert at > 10
    # The last save was not interrupted.
    before = dict.fromkeys(steps, 1)
    assert raised is None
    assert versions_of(folder) == steps_after(before, step, 2, keep)[1]
    assert leftovers(folder) == []


def is_complete(folder, step):
    try:
        manifest.read(Path(folder.path, f".saving-{step}"), step)
    except Damaged:
        return False
    return True


@pytest.mark.parametrize("case", BEFORE)
def test_a_kill_at_any_moment_of_a_save(tmp_path, case):
    steps, step, keep = BEFORE[case]
    before = dict.fromkeys(steps, 1)
    completed = 0
    for folder, raised in each_point(tmp_path, case):
        assert isinstance(raised, Killed)
        named = step in folder.steps()
        complete = is_complete(folder, step)
        fresh = CheckpointFolder(folder.path, keep)
        cleared = fresh.sweep()
        after = versions_of(fresh)
        check_save(before, after, step, 2, keep)
        assert leftovers(fresh) == []
        assert (f".saving-{step} (completed)" in cleared) == (complete and not named)
        if complete and not named:
            assert after[step] == 2
            completed += 1
        save(fresh, step, 3)  # the run reaches it again
        assert versions_of(fresh) == steps_after(after, step, 3, keep)[1]
    assert completed > 0


@pytest.mark.parametrize("case", BEFORE)
def test_an_error_at_any_moment_of_a_save(tmp_path, case):
    """Before a sweep as well: a run continues after an error without one."""
    steps, step, keep = BEFORE[case]
    before = dict.fromkeys(steps, 1)
    for folder, raised in each_point(tmp_path, case, full_disk):
        after = versions_of(folder)
        if raised is None:  # what could not be removed stays for now
            assert after.items() >= steps_after(before, step, 2, keep)[1].items()
        check_save(before, after, step, 2, keep)
        assert not Path(folder.path, f".saving-{step}").exists()
        save(folder, step, 3)
        assert versions_of(folder) == steps_after(after, step, 3, keep)[1]
        CheckpointFolder(folder.path, keep).sweep()
        assert versions_of(folder) == steps_after(after, step, 3, keep)[1]
        assert leftovers(folder) == []


@pytest.mark.parametrize("case", ["the first", "one too many", "the newest again"])
def test_the_newest_is_known_after_a_kill(tmp_path, case):
    for folder, _ in each_point(tmp_path, case):
        fresh = CheckpointFolder(folder.path, 2)
        fresh.sweep()
        if fresh.steps():
            assert fresh.newest_known() is not None
            assert fresh.newest_known() >= max(fresh.steps())


def test_a_kill_at_any_moment_of_a_sweep(tmp_path):
    folder = prepared(tmp_path / "before", (5, 10))
    path = Path(folder.path)
    shutil.copytree(path / "10", path / ".saving-10")  # its place is taken
    (path / ".saving-12").mkdir()
    (path / ".saving-12/part").write_text("half")
    shutil.copytree(path / "5", path / ".removed-3")
    save(CheckpointFolder(epath.Path(tmp_path / "other"), 9), 15, 1)
    shutil.copytree(tmp_path / "other/15", path / ".saving-15")
    at = 0
    while True:
        at += 1
        copy = CheckpointFolder(epath.Path(shutil.copytree(path, tmp_path / f"{at}")), 9)
        try:
            with faults(at) as state:
                copy.sweep()
        except Killed:
            assert {5: 1, 10: 1}.items() <= versions_of(copy).items()
        copy.sweep()
        assert versions_of(copy) == {5: 1, 10: 1, 15: 1}
        assert leftovers(copy) == []
        if not state.came:
            break
    assert at > 5
