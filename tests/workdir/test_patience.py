"""A disk that does not answer is waited for; only an answer can show damage."""

from __future__ import annotations

import errno
import os

import pytest
from messages import Warnings

from trainer.errors import StorageFailed, UserError
from trainer.workdir import lock, patience
from trainer.workdir.patience import Patience, patiently


class Time:
    """A clock that only sleeping moves."""

    def __init__(self):
        self.now = 50.0

    def clock(self):
        return self.now

    def sleep(self, secs):
        assert secs >= 0
        self.now += secs


@pytest.fixture
def time(monkeypatch):
    made = Time()
    monkeypatch.setattr(patience, "PATIENCE", Patience(clock=made.clock, sleep=made.sleep))
    return made


@pytest.fixture
def warnings():
    with Warnings() as handler:
        yield handler


def os_error(number):
    return OSError(number, os.strerror(number))


def failing_until(time, until, error):
    def read():
        if time.now < until:
            raise error
        return "content"

    return read


PASSING = [
    *map(os_error, (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ENOTCONN)),
    TimeoutError("timed out"),
    OSError("the store answers 503"),
    ValueError("DATA_LOSS: reading /x: [OS error 5: Input/output error]"),
]


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_twelve_seconds_are_waited_out_and_told_once(time, warnings, error):
    assert patiently("a/file", failing_until(time, 62.0, error)) == "content"
    assert 12 <= time.now - 50 <= 30
    assert warnings.wait_for("a/file cannot be read: ").endswith("trying again for 300 s")
    assert len(warnings.lines) == 1


@pytest.mark.parametrize("error", PASSING[:1])
def test_after_minutes_it_is_a_failure_of_the_storage(time, warnings, error):
    with pytest.raises(StorageFailed, match="a/file could not be read for 300 s: Input/output"):
        patiently("a/file", failing_until(time, 1e9, error))
    assert time.now == 350
    assert len(warnings.lines) <= 6


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (os_error(errno.ENOENT), FileNotFoundError),
        (FileNotFoundError("gs://bucket/none"), FileNotFoundError),  # of gcsfs, without a number
        (os_error(errno.ENOTDIR), NotADirectoryError),
        (os_error(errno.ENOSPC), OSError),
        (os_error(errno.EROFS), OSError),
        (os_error(errno.EACCES), UserError),
        (OSError("Forbidden: https://storage"), UserError),
        (ValueError("it holds null, not an object"), ValueError),
    ],
)
def test_an_answer_is_not_waited_for(time, error, kind):
    with pytest.raises(kind):
        patiently("a/file", failing_until(time, 1e9, error))
    assert time.now == 50


def test_errors_of_a_store_pass_whatever_their_type(time):
    aiohttp = pytest.importorskip("aiohttp")
    error = aiohttp.ClientPayloadError("cut off")
    assert patiently("gs://b/x", failing_until(time, 51.0, error)) == "content"


def test_a_lock_that_cannot_be_taken_is_not_a_file_system_without_locks(tmp_path, monkeypatch):
    def flock(*arguments):
        raise os_error(errno.EIO)

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output"):
        lock.acquire(tmp_path)
    assert not lock.is_held(tmp_path)
