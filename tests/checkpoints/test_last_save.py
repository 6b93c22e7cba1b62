"""The end of a run: the last save is waited for, and its failure is an error."""

from __future__ import annotations

import queue
import threading

import pytest
from etils import epath
from fake_disk import Disk, finisher_of, is_alive, wait_until, writers
from messages import LONG, Warnings

from trainer.checkpoints.folder import CheckpointFolder
from trainer.checkpoints.writer import Save
from trainer.errors import SavesFailed


@pytest.fixture
def warnings():
    with Warnings() as handler:
        yield handler


@pytest.fixture
def make():
    with writers() as make_writer:
        yield make_writer


@pytest.fixture
def folders(tmp_path):
    return {
        name: CheckpointFolder(epath.Path(tmp_path / name), 1) for name in ("latest", "best", "x")
    }


@pytest.fixture
def saves(folders):
    """Makes a save of a step, to the folder "latest" if no other is named."""
    return lambda step, folder="latest": Save(folders[folder], step, {}, {}, {})


@pytest.mark.parametrize("max_failures", [1, 3, 9])
def test_a_last_save_that_fails_is_an_error(make, saves, warnings, max_failures):
    """It was given up before the end, and nothing newer replaces it."""
    writer = make(Disk({2: -1}), max_failures=max_failures)
    writer.submit(saves(1))
    writer.finish()
    writer.submit(saves(2))
    warnings.wait_for("step 2 was not saved")
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
    make, saves, warnings, order, failing, finishing
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
        warnings.wait_for("was not saved")
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


def test_a_newer_save_makes_up_for_one_that_failed(make, saves, warnings):
    disk = Disk({1: -1})
    writer = make(disk)
    writer.submit(saves(1))
    warnings.wait_for("step 1 was not saved")
    writer.submit(saves(2))
    writer.finish()
    assert disk.done == [("latest", 2)]


def test_closing_gives_what_waits_one_more_try(make, saves, warnings):
    disk = Disk({1: -1, 2: -1})
    writer = make(disk, pauses=(1000.0,))
    writer.submit(saves(1))
    warnings.wait_for("retrying in 1000 s")
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
