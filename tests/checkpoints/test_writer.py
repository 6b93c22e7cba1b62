"""A save that fails is told, tried again, and replaced by a newer one; never forgotten."""

from __future__ import annotations

import logging
import queue
import threading
import types

import numpy as np
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.checkpoints import writer as writer_module
from trainer.checkpoints.folder import CheckpointFolder
from trainer.checkpoints.writer import Save, Writer
from trainer.errors import SavesFailed

LONG = 30.0  # seconds; only a test that fails waits for so long


class Told(logging.Handler):
    """What a person is told, line by line."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []
        self._new = queue.Queue()

    def emit(self, record):
        self.lines.append(record.getMessage())
        self._new.put(record.getMessage())

    def wait_for(self, part):
        while part not in (line := self._new.get(timeout=LONG)):
            pass
        return line

    def count(self, part):
        return sum(part in line for line in self.lines)


@pytest.fixture
def told():
    handler = Told()
    logging.getLogger("podlift").addHandler(handler)
    yield handler
    logging.getLogger("podlift").removeHandler(handler)


class Disk:
    """Does saves, or fails to, as a test wants it.

    Attributes:
        fails: steps that fail, with how often (-1: always).
        done: (folder, step) of those that were done.
        tried: the same of all tries.
        is_open: while not set, a save hangs before it is done or fails.
    """

    def __init__(self, fails=None):
        self.fails = dict(fails or {})
        self.done, self.tried = [], []
        self.is_open = threading.Event()
        self.is_open.set()
        self.begun = queue.Queue()

    def __call__(self, save):
        what = (save.folder.path.name, save.step)
        self.tried.append(what)
        self.begun.put(what)
        assert self.is_open.wait(LONG)
        left = self.fails.get(save.step, 0)
        if left:
            self.fails[save.step] = left - 1
            raise RuntimeError(f"try {len(self.tried)} of step {save.step} failed")
        self.done.append(what)

    def hang(self):
        self.is_open.clear()

    def wait_for(self, step):
        while self.begun.get(timeout=LONG)[1] != step:
            pass


@pytest.fixture
def make():
    """Makes writers, and ends their threads."""
    made = []

    def make_writer(disk, max_failures=3, pauses=(0.0,), patience=0.0):
        made.append((Writer(max_failures, disk, pauses, patience), disk))
        return made[-1][0]

    yield make_writer
    for writer, disk in made:
        disk.is_open.set()
        writer.close()
        assert not is_alive(writer)


def is_alive(writer):
    return writer._thread is not None and writer._thread.is_alive()


@pytest.fixture
def folders(tmp_path):
    return {
        name: CheckpointFolder(epath.Path(tmp_path / name), 1) for name in ("latest", "best", "x")
    }


@pytest.fixture
def saves(folders):
    """Makes a save of a step, to the folder "latest" if no other is named."""
    return lambda step, folder="latest": Save(folders[folder], step, {}, {}, {})


def test_saves_are_done_in_order_and_finish_waits_for_them(make, saves):
    disk = Disk()
    writer = make(disk, patience=LONG)
    assert writer.last_saved is None
    for step in range(1, 6):
        writer.submit(saves(step))
        writer.submit(saves(step, "best"))
    writer.finish()
    assert disk.done == [(name, step) for step in range(1, 6) for name in ("latest", "best")]
    assert writer.last_saved == 5
    writer.finish()
    writer.submit(saves(6))
    writer.finish()
    assert writer.last_saved == 6


def test_finish_waits_for_a_disk_that_hangs(make, saves):
    disk = Disk()
    disk.hang()
    writer = make(disk)
    writer.submit(saves(1))
    finisher = threading.Thread(target=writer.finish)
    finisher.start()
    wait_until(writer, lambda: writer._is_finishing)
    assert finisher.is_alive()
    assert disk.done == []
    disk.is_open.set()
    finisher.join(LONG)
    assert disk.done == [("latest", 1)]


def finisher_of(writer):
    """A thread that will wait for the end of all saves, and what was raised there."""
    errors = []

    def finish():
        try:
            writer.finish()
        except SavesFailed as error:
            errors.append(error)

    return threading.Thread(target=finish), errors


def wait_until(writer, is_so):
    with writer._changed:
        assert writer._changed.wait_for(is_so, LONG)


def test_a_save_that_fails_is_told_at_once_and_tried_again(make, saves, told):
    disk = Disk({1: 2})
    writer = make(disk, pauses=(0.001, 0.002))
    writer.submit(saves(1))
    writer.finish()
    assert disk.done == [("latest", 1)]
    assert told.lines[0].startswith("warning: step 1 could not be saved: try 1 of step 1 failed (")
    assert told.lines[0].endswith("; retrying in 0.001 s")
    assert told.lines[1].endswith("; retrying in 0.002 s")
    assert "step 1 is saved after all" in told.lines[2]
    assert len(told.lines) == 3
    assert writer.last_saved == 1


def test_too_many_in_a_row_end_the_run(make, saves, told):
    disk = Disk(dict.fromkeys(range(2, 9), -1))
    writer = make(disk, max_failures=2)
    writer.submit(saves(1))
    writer.finish()
    writer.submit(saves(2))
    assert told.wait_for("step 2 was not saved").endswith(
        "; the last good checkpoint is step 1 (1 of 2 failures in a row)"
    )
    writer.check()
    writer.submit(saves(3))
    told.wait_for("(2 of 2 failures in a row)")
    expected = r"^2 saves in a row failed, the last with: try 7 .*; the last good .* is step 1$"
    for call in (writer.check, writer.finish, lambda: writer.submit(saves(4))):
        with pytest.raises(SavesFailed, match=expected):
            call()


def test_one_failure_may_be_too_many(make, saves, told):
    writer = make(Disk({1: -1}), max_failures=1)
    writer.submit(saves(1))
    told.wait_for("was not saved")
    expected = "^1 save in a row failed, .*; this run has no good checkpoint$"
    with pytest.raises(SavesFailed, match=expected):
        writer.check()


def test_the_step_that_was_restored_is_the_last_good_one(make, saves, told):
    writer = make(Disk({30: -1}), max_failures=1)
    writer.last_saved = 20
    writer.submit(saves(30))
    assert "checkpoint is step 20 (1 of 1" in told.wait_for("was not saved")
    with pytest.raises(SavesFailed, match=r"the last good checkpoint is step 20$"):
        writer.check()


def test_a_success_forgives_what_was_before(make, saves, told):
    disk = Disk(dict.fromkeys(range(1, 10, 2), -1))
    writer = make(disk, max_failures=2, patience=LONG)
    for step in range(1, 10):
        writer.submit(saves(step))
        if step % 2:
            told.wait_for(f"step {step} was not saved")
        else:
            disk.wait_for(step)
    writer.submit(saves(10))
    writer.finish()
    assert [step for _, step in disk.done] == [2, 4, 6, 8, 10]
    assert told.count("(1 of 2 failures in a row)") == 5


# The end of a run


@pytest.mark.parametrize("max_failures", [1, 3, 9])
def test_a_last_save_that_fails_is_not_passed_over(make, saves, told, max_failures):
    """Given up before the end came: nothing newer has made up for it."""
    writer = make(Disk({2: -1}), max_failures=max_failures)
    writer.submit(saves(1))
    writer.finish()
    writer.submit(saves(2))
    told.wait_for("step 2 was not saved")
    with pytest.raises(SavesFailed, match=r"of step 2 failed .* last good checkpoint is step 1"):
        writer.finish()


@pytest.mark.parametrize("max_failures", [1, 3, 9])
def test_a_save_that_fails_while_the_run_waits_for_it_ends_it(make, saves, max_failures):
    disk = Disk({1: -1})
    disk.hang()
    writer = make(disk, max_failures=max_failures)
    writer.submit(saves(1))
    finisher, errors = finisher_of(writer)
    finisher.start()
    wait_until(writer, lambda: writer._is_finishing)
    disk.is_open.set()
    finisher.join(LONG)
    assert len(errors) == 1
    assert len(disk.tried) == max(3, max_failures)


@pytest.mark.parametrize("order", [("latest", "best"), ("best", "latest")])
@pytest.mark.parametrize("failing", ["latest", "best"])
@pytest.mark.parametrize("finishing", ["before", "after"])
def test_a_save_to_one_folder_does_not_make_up_for_another(
    make, saves, told, order, failing, finishing
):
    disk = Disk({1 + order.index(failing): -1})
    disk.hang()
    writer = make(disk)
    for number, name in enumerate(order):
        writer.submit(saves(1 + number, name))
    finisher, errors = finisher_of(writer)
    if finishing == "before":
        finisher.start()
        wait_until(writer, lambda: writer._is_finishing)
        disk.is_open.set()
    else:
        disk.is_open.set()
        told.wait_for("was not saved")
        finisher.start()
    finisher.join(LONG)
    assert not finisher.is_alive()
    assert len(errors) == 1
    assert "failed" in str(errors[0])


def test_the_end_of_a_run_waits_for_the_newer_one_where_an_older_one_fails(make, saves):
    gates = {1: threading.Event(), 2: threading.Event()}
    begun, done = queue.Queue(), []

    def run(save):
        begun.put(save.step)
        assert gates[save.step].wait(LONG)
        if save.step == 1:
            raise RuntimeError("step 1 failed")
        done.append(save.step)

    disk = Disk()
    writer = make(disk)
    writer._run = run
    writer.submit(saves(1))
    assert begun.get(timeout=LONG) == 1
    writer.submit(saves(2))
    finisher, errors = finisher_of(writer)
    finisher.start()
    wait_until(writer, lambda: writer._is_finishing)
    gates[1].set()
    assert begun.get(timeout=LONG) == 2
    finisher.join(0.1)  # it must not end here
    gates[2].set()
    finisher.join(LONG)
    assert errors == []
    assert done == [2]


def test_a_newer_save_makes_up_for_one_that_failed(make, saves, told):
    disk = Disk({1: -1})
    writer = make(disk)
    writer.submit(saves(1))
    told.wait_for("step 1 was not saved")
    writer.submit(saves(2))
    writer.finish()
    assert disk.done == [("latest", 2)]


# Newer states


def test_a_newer_one_takes_the_place_of_one_that_fails(make, saves, told):
    disk = Disk({1: -1})
    disk.hang()
    writer = make(disk)
    writer.submit(saves(1))
    disk.wait_for(1)
    writer.submit(saves(2))
    disk.is_open.set()
    writer.finish()
    assert disk.tried == [("latest", 1), ("latest", 2)]
    assert told.lines[0].endswith("(1 of 3 failures in a row)")
    assert len(told.lines) == 1


def test_a_newer_one_need_not_wait_for_a_pause(make, saves, told):
    disk = Disk({1: -1})
    writer = make(disk, pauses=(1000.0,))
    writer.submit(saves(1))
    told.wait_for("retrying in 1000 s")
    writer.submit(saves(2))
    writer.finish()
    assert disk.done == [("latest", 2)]


def test_a_disk_that_hangs_counts_as_one_that_fails(make, saves, told):
    disk = Disk()
    disk.hang()
    writer = make(disk, max_failures=3)
    writer.submit(saves(1))
    disk.wait_for(1)
    writer.submit(saves(2))
    for step in (3, 4):
        writer.submit(saves(step))
        assert told.lines[-1] == (
            f"warning: step {step - 1} was not saved: the disk is still busy with step 1 "
            f"({step - 2} of 3 failures in a row)"
        )
    with pytest.raises(
        SavesFailed, match=r"still busy with step 1; this run has no good checkpoint"
    ):
        writer.submit(saves(5))
    disk.is_open.set()
    writer.close()
    assert disk.done == [("latest", 1), ("latest", 5)]


def test_with_patience_nothing_is_left_out(make, saves, told):
    disk = Disk()
    disk.hang()
    writer = make(disk, patience=LONG)
    writer.submit(saves(1))
    disk.wait_for(1)
    writer.submit(saves(2))
    opener = threading.Thread(target=disk.is_open.set)
    opener.start()
    writer.submit(saves(3))
    opener.join()
    writer.finish()
    assert disk.done == [("latest", 1), ("latest", 2), ("latest", 3)]
    assert told.lines == []


@settings(max_examples=50)
@given(st.lists(st.sampled_from(["latest", "best", "x"]), max_size=12))
def test_of_each_folder_the_newest_waits_in_its_turn(names):
    folders = {name: CheckpointFolder(epath.Path(f"/none/{name}"), 1) for name in {*names, "x"}}
    disk = Disk()
    disk.hang()
    writer = Writer(1000, disk, (0.0,), 0.0)
    writer.submit(Save(folders["x"], 0, {}, {}, {}))
    disk.wait_for(0)
    expected = []
    for step, name in enumerate(names, 1):
        writer.submit(Save(folders[name], step, {}, {}, {}))
        expected = [other for other in expected if other[0] != name] + [(name, step)]
    disk.is_open.set()
    writer.finish()
    writer.close()
    assert disk.done == [("x", 0), *expected]
    assert not is_alive(writer)


# Closing


def test_closing_gives_what_waits_one_more_try(make, saves, told):
    disk = Disk({1: -1, 2: -1})
    writer = make(disk, pauses=(1000.0,))
    writer.submit(saves(1))
    told.wait_for("retrying in 1000 s")
    writer.submit(saves(2, "best"))
    writer.submit(saves(3, "x"))
    writer.close()
    assert not is_alive(writer)
    assert disk.tried == [("latest", 1), ("latest", 1), ("best", 2), ("x", 3)]
    assert disk.done == [("x", 3)]
    writer.close()


def test_closing_what_was_never_used(make):
    writer = make(Disk())
    writer.close()
    writer.finish()
    writer.check()


# Reasons


@pytest.fixture
def free(monkeypatch):
    """A disk with 1.5 MB free."""
    usage = types.SimpleNamespace(free=1_500_000)
    monkeypatch.setattr(writer_module.shutil, "disk_usage", lambda path: usage)


def full_device():
    with open("/dev/full", "w") as file:
        file.write("x")


def reason_of(folder, error):
    arrays = {"a": np.zeros(500_000, np.float32), "b": np.zeros((), np.int32)}
    return writer_module._reason(Save(folder, 1, arrays, {}, {}), error)


def test_a_full_disk_is_told_with_what_is_needed_and_free(folders, free):
    with pytest.raises(OSError, match="No space") as full:
        full_device()
    expected = "No space left on device (needs about 2.0 MB, 1.5 MB free)"
    assert reason_of(folders["latest"], full.value) == expected
    full.value.filename = "/a/file"
    assert reason_of(folders["latest"], full.value).startswith("No space left on device: /a/file (")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("first line\nsecond", "first line"),
        (f"RESOURCE {'x' * 400}\n [28: No space left on device]\n", "No space left on device"),
        ("", "ValueError"),
        (" \n ", "ValueError"),
        ("x" * 5000, "x" * 300),
    ],
)
def test_other_errors_are_told_in_one_line(folders, free, text, told):
    reason = reason_of(folders["latest"], ValueError(text))
    assert reason == f"{told} (needs about 2.0 MB, 1.5 MB free)"


def test_of_an_object_store_nobody_knows_what_is_free():
    folder = CheckpointFolder(epath.Path("gs://bucket/run"), 1)
    assert reason_of(folder, ValueError("no")) == "no"


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), PermissionError(13, "denied")])
def test_a_disk_that_tells_nothing_any_more_does_not_end_the_thread(
    make, saves, told, monkeypatch, error
):
    def fail(path):
        raise error

    monkeypatch.setattr(writer_module.shutil, "disk_usage", fail)
    disk = Disk({1: 1})
    writer = make(disk)
    writer.submit(saves(1))
    assert "try 1 of step 1 failed" in told.wait_for("step 1 could not be saved")
    writer.finish()
    assert disk.done == [("latest", 1)]
