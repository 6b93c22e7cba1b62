"""Whatever happens to a folder of checkpoints, the newest completed one is there and whole."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from disk_faults import Killed, faults, full_disk, tree
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.checkpoints import folder as folder_module
from trainer.checkpoints import manifest
from trainer.checkpoints.folder import CheckpointFolder, expired
from trainer.checkpoints.manifest import Damaged, Leaf, Manifest


@pytest.fixture(scope="module", autouse=True)
def no_waiting_for_the_disk():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder_module.os, "fsync", lambda descriptor: None)
        yield


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


def prepared(path, steps, keep=9):
    folder = CheckpointFolder(epath.Path(path), keep)
    for step in steps:
        save(folder, step, 1)
    return folder


def each_point(tmp_path, case, error=None):
    """(folder, what was raised) for each point at which a save can be cut short."""
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
    # The last time it was not cut short.
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
        save(fresh, step, 3)  # the run comes to it once more
        assert versions_of(fresh) == steps_after(after, step, 3, keep)[1]
    assert completed > 0


@pytest.mark.parametrize("case", BEFORE)
def test_an_error_at_any_moment_of_a_save(tmp_path, case):
    """Before a sweep as well: a run that is told of an error goes on without one."""
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


# Single cases


def test_a_complete_save_takes_the_place_of_a_damaged_one(tmp_path):
    """The run came to the step again, and was killed before it could exchange the two."""
    folder = prepared(tmp_path / "run", (5, 10))
    save(CheckpointFolder(epath.Path(tmp_path / "other"), 9), 10, 2)
    shutil.copytree(tmp_path / "other/10", tmp_path / "run/.saving-10")
    (tmp_path / "run/10/c").write_text("damaged")
    folder.sweep()
    assert versions_of(folder) == {5: 1, 10: 2}
    assert leftovers(folder) == []


def test_a_save_of_another_step_is_not_completed(tmp_path):
    folder = prepared(tmp_path / "run", (5,))
    shutil.copytree(tmp_path / "run/5", tmp_path / "run/.saving-6")
    assert folder.sweep() == [".saving-6"]
    assert versions_of(folder) == {5: 1}


def test_what_cannot_be_removed_does_not_stop_a_run(tmp_path, monkeypatch):
    """On NFS a folder stays while another machine has a file of it open."""
    folder = prepared(tmp_path / "run", (5,))
    shutil.copytree(tmp_path / "run/5", tmp_path / "run/.removed-3")
    (tmp_path / "run/.saving-6").mkdir()
    monkeypatch.setattr(folder_module.shutil, "rmtree", lambda *args, **kwargs: None)
    assert folder.sweep() == []
    assert versions_of(folder) == {5: 1}


def test_files_of_others_are_left_alone(tmp_path):
    """Also where their names are nearly those of steps; none counts as a step."""
    names = {"notes.txt", "5.bak", "-5", "5.0", "\N{ARABIC-INDIC DIGIT FIVE}", "007"}
    folder = prepared(tmp_path / "run", (5,), keep=1)
    for name in (*names, ".saving-", ".saving-x"):
        (tmp_path / "run" / name).mkdir()
    assert folder.steps() == [5]
    folder.sweep()
    save(folder, 6, 1)
    assert versions_of(folder) == {6: 1}
    assert names <= set(tree(tmp_path / "run"))


def test_two_steps_of_one_number_are_put_aside_in_one_second(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_module.time, "strftime", lambda form: "20250101T000000")
    folder = prepared(tmp_path / "run", ())
    moved = []
    for version in (1, 2, 3):
        save(folder, 5, version)
        moved.append(folder.quarantine(5, "").name)
    assert moved == ["5-20250101T000000", "5-20250101T000000-2", "5-20250101T000000-3"]
    assert folder.has_history()
    assert folder.steps() == []
    assert folder.newest_known() == 5


def test_a_folder_that_is_not_there_is_empty(tmp_path):
    folder = CheckpointFolder(epath.Path(tmp_path / "none"), 1)
    assert (folder.steps(), folder.sweep(), folder.newest_known()) == ([], [], None)
    assert not folder.has_history()
    assert not (tmp_path / "none").exists()
    with pytest.raises(Damaged):
        folder.check(5)


@pytest.mark.parametrize("text", ["", "{", "[]", "5", '{"step": null}', '{"step": []}', "\xff"])
def test_a_damaged_note_of_the_newest_is_no_note(tmp_path, text):
    folder = prepared(tmp_path / "run", (5,))
    (tmp_path / ".run.json").write_text(text, encoding="latin-1")
    assert folder.newest_known() is None
    assert folder.has_history()
    save(folder, 6, 1)
    assert folder.newest_known() == 6


@given(st.sets(st.integers(0, 20), max_size=8), st.integers(0, 20), st.integers(1, 5))
def test_what_expires(others, newest, keep):
    steps = sorted(others | {newest})
    gone = expired(steps, keep, newest)
    kept = [step for step in steps if step not in gone]
    assert set(gone) <= set(steps)
    assert newest in kept
    assert len(kept) == min(keep, len(steps))
    assert all(old < step for old in gone for step in kept if step != newest)
    assert expired(kept, keep, newest) == []
