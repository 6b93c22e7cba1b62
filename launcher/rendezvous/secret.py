"""The secret that the launchers of a job share: from PODLIFT_SECRET, or a file in the workdir.

All ranks of a job must see its workdir, so a file that only its user can read tells them apart from
everyone else who can reach the port. Rank 0's launcher makes it; it stays with the run. Object
stores and network file systems may take minutes: launchers call the methods in threads.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import threading
from collections.abc import Mapping
from pathlib import Path

from etils import epath

from trainer.errors import UserError, first_line
from trainer.workdir import private
from trainer.workdir.paths import absolute, is_local

VARIABLE = "PODLIFT_SECRET"
NAME = ".rendezvous"
_LEAST_BYTES = 16
_CONTENT = re.compile(r"[0-9a-f]{64}\n")


class NoSecret(Exception):
    """The file of the secret is not there or cannot be read; the message says why."""


class JobSecret:
    """The secret of a job.

    Args:
        workdir: the run's folder, which all launchers share.
        environ: this launcher's environment.

    Attributes:
        source: the variable or the file, for messages.

    Raises:
        UserError: PODLIFT_SECRET is too short.
    """

    def __init__(self, workdir: str, environ: Mapping[str, str]) -> None:
        self._given = environ.get(VARIABLE, "").encode(errors="surrogateescape")
        if 0 < len(self._given) < _LEAST_BYTES:
            raise UserError(
                f"{VARIABLE} is shorter than {_LEAST_BYTES} characters",
                f"export {VARIABLE}=$(openssl rand -hex 32), the same for all ranks",
            )
        self._folder = absolute(workdir)
        self._file = self._folder / NAME
        self._lock = threading.Lock()  # what is still being published is withdrawn afterwards
        self._is_new = False
        self._new_folders: list[Path] = []  # the innermost first
        self.source = VARIABLE if self._given else str(self._file)

    def publish(self) -> bytes:
        """The secret, for rank 0; makes the file if there is none.

        Raises:
            UserError: the file cannot be made.
        """
        if self._given:
            return self._given
        try:
            with self._lock:
                return self._publish_local() if is_local(self._folder) else self._publish_remote()
        except Exception as error:  # clients of object stores raise many types
            why = (isinstance(error, OSError) and error.strerror) or first_line(error)
            raise UserError(
                f"{self._file}, which holds the secret of the ranks, cannot be written: {why}",
                f"name a --workdir you may write to, or give all ranks the same {VARIABLE}",
            ) from error

    def read(self) -> bytes:
        """The secret, for the other ranks.

        Raises:
            NoSecret: the file is not there, or not what `publish` wrote.
        """
        if self._given:
            return self._given
        try:
            if is_local(self._folder):
                for folder in (self._folder.parent, self._folder):
                    os.listdir(folder)  # makes network file systems look again
                return _content(self._file)
            text = self._file.read_text()
        except FileNotFoundError:
            raise NoSecret(f"this host sees no {self._file}") from None
        except Exception as error:
            why = (isinstance(error, OSError) and error.strerror) or first_line(error)
            raise NoSecret(f"{self._file} cannot be read: {why}") from error
        return _checked(text)

    def withdraw(self) -> None:
        """Removes what `publish` made, unless a run has begun there: a refusal leaves nothing."""
        with self._lock, contextlib.suppress(Exception):
            if not self._is_new or (self._folder / "config.json").exists():
                return
            self._file.unlink()
            for folder in self._new_folders:
                folder.rmdir()

    def _publish_local(self) -> bytes:
        folder, file = Path(self._folder), Path(self._file)
        self._new_folders = [place for place in (folder, *folder.parents) if not place.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(NoSecret, OSError):
            return _content(file, of_this_user=True)
        file.unlink(missing_ok=True)  # somebody else's, or damaged
        made = _make_content()
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "w") as opened:
            self._is_new = True
            opened.write(made)
        return _checked(made)

    def _publish_remote(self) -> bytes:
        with contextlib.suppress(FileNotFoundError, NoSecret):
            return _checked(self._file.read_text())
        made = _make_content()
        self._file.write_text(made)
        self._is_new = True
        return _checked(made)


def _content(file: epath.PathLike, *, of_this_user: bool = False) -> bytes:
    with private.open_regular(Path(file)) as opened:
        status = os.fstat(opened.fileno())
        if of_this_user and (status.st_uid != os.getuid() or status.st_mode & 0o077):
            raise NoSecret(f"{file} is not this user's alone")
        return _checked(opened.read(100))


def _make_content() -> str:
    return f"{secrets.token_hex(32)}\n"


def _checked(text: str) -> bytes:
    if not _CONTENT.fullmatch(text):
        raise NoSecret("the file of the secret is damaged")
    return text.strip().encode()
