"""Reads that wait for a disk or an object store that does not answer.

A file that cannot be read is not a damaged file: only what was read can be compared with its
checksum.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from trainer.console import say, warn
from trainer.errors import StorageFailed, UserError, first_line

T = TypeVar("T")

# Seconds before each retry; the last one repeats.
_PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0)
_REPEAT_SECS = 60.0  # between two lines about the same file

# Answers, not failures to answer: the path leads elsewhere, or the file system takes no files.
_ANSWERS = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG),
    *(errno.EINVAL, errno.ENOTSUP, errno.ENOSPC, errno.EDQUOT, errno.EROFS),
)
# Clients of object stores raise these without a number.
_ANSWER_TYPES = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
_DENIED = (errno.EACCES, errno.EPERM)
_DENIED_WORDS = re.compile(r"\b(401|403|Forbidden|Unauthorized|Anonymous caller)\b")
# Of errors that other libraries raise for local files.
_PASSING_WORDS = re.compile(
    "|".join(
        re.escape(os.strerror(number))
        for number in (
            errno.EIO,
            errno.ESTALE,
            errno.ETIMEDOUT,
            errno.EAGAIN,
            errno.ENOTCONN,
            errno.EHOSTDOWN,
            errno.EHOSTUNREACH,
        )
    )
)


@dataclass
class Patience:
    """How long to wait for files, and how.

    Attributes:
        secs: seconds from the first failure of a read to giving up.
        clock: monotonic seconds.
        sleep: waits.
    """

    secs: float = 300.0
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


# What a run uses.
PATIENCE = Patience()


def patiently(what: object, read: Callable[[], T], done: str = "read") -> T:
    """Calls `read`, again and again while the disk or the object store does not answer.

    The first failure is told at once, the others once a minute.

    Args:
        what: the file or folder, for messages.
        read: may be called several times.
        done: what it does to the file, for messages.

    Raises:
        StorageFailed: it has failed for `PATIENCE.secs`.
        UserError: that is not permitted.
        Exception: any other that `read` raises.
    """
    pauses = _pauses()
    began = told = None
    while True:
        try:
            result = read()
        except Exception as error:
            if is_denied(error):
                raise UserError(
                    f"{what} cannot be {done}: {_why(error)}", f"name a folder that can be {done}"
                ) from error
            if not may_pass(error):
                raise
            now = PATIENCE.clock()
            began = now if began is None else began
            left = PATIENCE.secs - (now - began)
            if left <= 0:
                raise StorageFailed(
                    f"{what} could not be {done} for {now - began:.0f} s: {_why(error)}\n"
                    "  HINT: nothing was changed; when the disk or the store is back, the same "
                    "command resumes"
                ) from error
            if told is None or now - told >= _REPEAT_SECS:
                warn(f"{what} cannot be {done}: {_why(error)}; trying again for {left:.0f} s")
                told = now
            PATIENCE.sleep(min(next(pauses), left))
        else:
            if began is not None:
                say(f"{what} can be {done} again, after {PATIENCE.clock() - began:.0f} s")
            return result


def may_pass(error: BaseException) -> bool:
    """Whether an error is one of the disk, the network or the store, not of what is stored."""
    if isinstance(error, _ANSWER_TYPES):
        return False
    if isinstance(error, OSError):
        return error.errno not in _ANSWERS and not is_denied(error)
    kinds = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    if "trainer" in kinds:
        return False
    if kinds & {"aiohttp", "gcsfs", "botocore", "google", "requests"}:
        return not is_denied(error)
    return bool(_PASSING_WORDS.search(str(error)))


def is_denied(error: BaseException) -> bool:
    """Whether reading is not permitted, which waiting does not change."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _DENIED
    is_of_store = type(error).__module__.partition(".")[0] not in ("builtins", "trainer")
    return (is_of_store or isinstance(error, OSError)) and bool(_DENIED_WORDS.search(str(error)))


def _why(error: BaseException) -> str:
    return (isinstance(error, OSError) and error.strerror) or first_line(error)


def _pauses() -> Iterator[float]:
    yield from _PAUSES
    while True:
        yield _PAUSES[-1]
