"""The folder of a user in a place for all users: others may have been there first."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import ROOT
from disk_faults import tree
from etils import epath

from trainer.errors import UserError
from trainer.workdir import lock, paths, private

RUN = "gs://bucket/run"
NOBODY = 65534


def a_link(folder):
    folder.with_name("his").mkdir()
    (folder.with_name("his") / "file").write_text("text")
    folder.symlink_to(folder.with_name("his"))


def a_dangling_link(folder):
    folder.symlink_to(folder.with_name("nowhere"))


def a_fifo(folder):
    os.mkfifo(folder)


def open_to_the_group(folder):
    folder.mkdir()
    folder.chmod(0o770)


def open_to_all(folder):
    folder.mkdir()
    folder.chmod(0o777)


def of_another_user(folder):
    """As he leaves it: with a FIFO as the lock of the run, which would block whoever opens it."""
    place = folder / paths.digest_of(RUN)
    place.mkdir(parents=True)
    os.mkfifo(place / lock.NAME)
    if os.getuid() == 0:
        os.chown(folder, NOBODY, NOBODY)
    else:  # what others own cannot be made here
        folder.chmod(0o777)


CASES = {
    a_link: "it is a link",
    a_dangling_link: "it is a link",
    a_fifo: "it is not a folder",
    open_to_the_group: "other users can write to it",
    open_to_all: "other users can write to it",
    of_another_user: "it belongs to user 65534" if os.getuid() == 0 else "can write to it",
}


@pytest.mark.parametrize("plant", CASES, ids=lambda plant: plant.__name__)
def test_what_another_user_planted_is_refused_and_not_touched(tmp_path, plant):
    place = tmp_path / "tmp"
    place.mkdir()
    folder = private.folder_in(place)
    plant(folder)
    before = tree(tmp_path)
    for use in (
        lambda: lock.acquire(epath.Path(RUN), str(place)),
        lambda: lock.check_free(epath.Path(RUN), str(place)),
        lambda: paths.local_folder(RUN, str(place)),
        lambda: paths.make_local_base(RUN, str(place)),
    ):
        with pytest.raises(UserError) as refused:
            use()
        expected = f"{folder} is not this user's alone: {CASES[plant]}"
        assert refused.value.message.startswith(expected)
        assert "--local_dir" in refused.value.hint
    assert tree(tmp_path) == before
    # A run in a local folder does not need it.
    lock.check_free(epath.Path(tmp_path / "run"), str(place))


@pytest.mark.parametrize("is_old", [False, True])
def test_the_folder_is_for_this_user_alone(tmp_path, is_old):
    """An older podlift let others read it."""
    folder = private.folder_in(tmp_path)
    if is_old:
        folder.mkdir(mode=0o755)
    before = os.umask(0o002)
    try:
        lock.acquire(epath.Path(RUN), str(tmp_path))
    finally:
        os.umask(before)
        lock.release(epath.Path(RUN))
    assert folder.stat().st_mode & 0o777 == 0o700
    assert private.is_private(folder)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("elsewhere"), os.mkdir])
def test_a_lock_is_a_regular_file(tmp_path, make):
    """In a folder that several users share, too: nothing blocks, and no link is followed."""
    make(tmp_path / lock.NAME)
    (tmp_path / "elsewhere").write_text("precious")
    with pytest.raises(OSError, match=r"regular file|directory"):
        lock.acquire(epath.Path(tmp_path))
    lock.check_free(epath.Path(tmp_path))
    assert (tmp_path / "elsewhere").read_text() == "precious"


def test_a_command_says_so_and_exits_with_2(tmp_path):
    a_link(private.folder_in(tmp_path))
    before = tree(tmp_path)
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "launcher", f"--config={ROOT}/configs/mlp.py"),
            f"--workdir={RUN}",
        ],
        env={**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 2, ended.stderr
    assert "is not this user's alone: it is a link" in ended.stderr
    assert "HINT: remove it, or name a folder of your own with --local_dir" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert tree(tmp_path) == before
