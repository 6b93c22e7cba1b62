"""The folder of a run: its paths, its config, and which changes to the config it accepts.

This module does not import jax. Nothing is written before `claim`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import stat
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from trainer.config.config_json import config_from_json, config_to_json, plain_data
from trainer.config.json_text import parse_object
from trainer.config.keys import RESUMABLE, flatten, with_defaults
from trainer.console import warn
from trainer.errors import StorageFailed, UserError, first_line
from trainer.workdir import lock
from trainer.workdir.environment import LAYOUT_VERSION, describe_environment
from trainer.workdir.json_object import read_bytes
from trainer.workdir.paths import absolute, exists, is_local, why_no_room, write_whole
from trainer.workdir.patience import may_pass, patiently

# Files that a scheduler or a launcher may put into the folder before the run begins.
_IGNORED_SUFFIXES = (".log", ".out", ".err")
CONFIG_FILE = "config.json"
_RESTORE = "restore the file, or name another --workdir"


def read_config(folder: epath.Path) -> ConfigDict:
    """The config of the run in a folder, completed with defaults.

    Raises:
        UserError: the folder was written by an incompatible podlift, or a file in it is not what a
            run writes.
        StorageFailed: the disk or the object store has not answered for minutes.
    """
    layout = read_environment(folder).get("layout_version", LAYOUT_VERSION)
    if not isinstance(layout, int):
        raise UserError(
            f"{folder / 'env.json'} cannot be read: its layout_version is no number", _RESTORE
        )
    if layout > LAYOUT_VERSION:
        raise UserError(
            f"{folder} was written by a newer podlift (layout {layout}; this one reads "
            f"{LAYOUT_VERSION})",
            "upgrade podlift, or name another --workdir",
        )
    if layout < LAYOUT_VERSION:
        raise UserError(
            f"{folder} was written by an older podlift (layout {layout}; this one reads "
            f"{LAYOUT_VERSION})",
            "resume with the version in its env.json, or name another --workdir",
        )
    path = folder / CONFIG_FILE
    text = _read_bytes(path)
    if text is None:
        raise UserError(f"{path} cannot be read: it is not there", _RESTORE)
    try:
        return with_defaults(config_from_json(text))
    except (ValueError, AttributeError, TypeError, KeyError, UserError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}", _RESTORE) from error


def read_environment(folder: epath.Path) -> dict[str, Any]:
    """`env.json` of the run in a folder; empty if it is not there.

    Raises:
        UserError: it is not what a run writes.
        StorageFailed: the disk or the object store has not answered for minutes.
    """
    path = folder / "env.json"
    text = _read_bytes(path)
    try:
        return {} if text is None else parse_object(text)
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {error}", _RESTORE) from error


def _read_bytes(path: epath.Path) -> bytes | None:
    """The content of a file; None if it is not there."""
    try:
        return patiently(path, lambda: read_bytes(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        why = (isinstance(error, OSError) and error.strerror) or error
        raise UserError(f"{path} cannot be read: {why}", _RESTORE) from error


@dataclass(frozen=True)
class Workdir:
    """A run's folder that is free, or holds a run to resume.

    Attributes:
        path: the folder, local or remote (`gs://...`).
        config: the resolved config of the run that is about to start.
        exists: whether the folder already holds a run.
        changes: how `config` differs from that run's, apart from keys of length and frequency, each
            as "key: before -> after".
        refused: the keys of those changes that `config.checkpoint.allow` does not name.
    """

    path: epath.Path
    config: ConfigDict
    exists: bool
    changes: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()

    @property
    def is_local(self) -> bool:
        """Whether the folder is on a file system, where files can be appended to and locked."""
        return is_local(self.path)

    @property
    def checkpoints(self) -> epath.Path:
        """The folder of the latest checkpoints."""
        return self.path / "checkpoints"

    @property
    def best(self) -> epath.Path:
        """The folder of the best checkpoint."""
        return self.path / "best"

    @property
    def metrics(self) -> epath.Path:
        """The metrics file, with one JSON object per line."""
        return self.path / "metrics.jsonl"

    @classmethod
    def check(cls, path: epath.PathLike, config: ConfigDict) -> Workdir:
        """Checks a folder without changing it.

        Args:
            path: the folder; it need not exist.
            config: the config of the run that is about to start.

        Raises:
            UserError: the folder cannot be written, or holds something other than a run.
                `refuse_changes` rejects a run with a different config.
        """
        if not os.fspath(path).strip():
            raise UserError("--workdir is empty", "name a folder, or leave the flag out")
        folder = absolute(path)
        config_file = folder / CONFIG_FILE
        workdir = cls(folder, config, patiently(config_file, lambda: exists(config_file)))
        if workdir.is_local:
            patiently(folder, lambda: _check_writable(Path(folder)), "written")
            _check_kinds(Path(folder))
        if workdir.exists:
            workdir = workdir._with_changes()
        elif patiently(folder, lambda: exists(folder)):
            others = [
                p.name
                for p in patiently(folder, lambda: list(folder.iterdir()))
                if not p.name.startswith(".")
                and p.name not in ("logs", "failure.json")
                and p.suffix not in _IGNORED_SUFFIXES
            ]
            if others:
                raise UserError(
                    f"--workdir={os.fspath(path)} is not empty and holds no podlift run "
                    f"(it has {', '.join(sorted(others)[:3])}{', ...' if others[3:] else ''})",
                    "name a new or empty folder",
                )
        return workdir

    def _with_changes(self) -> Workdir:
        before = _plain(flatten(read_config(self.path)))
        after = _plain(flatten(self.config))
        absent = object()
        changed = [
            key
            for key in [*before, *(key for key in after if key not in before)]
            if not key.startswith(RESUMABLE) and before.get(key, absent) != after.get(key, absent)
        ]
        allow = self.config.get("checkpoint", {}).get("allow", "").split(",")
        allowed = [name.strip() for name in allow if name.strip()]
        return dataclasses.replace(
            self,
            changes=tuple(f"{key}: {_show(before, key)} -> {_show(after, key)}" for key in changed),
            refused=tuple(
                key
                for key in changed
                if not any(key == name or key.startswith(f"{name}.") for name in allowed)
            ),
        )

    def refuse_changes(self, leaves: str = "", kinds: Sequence[str] = ()) -> None:
        """Raises a UserError if the config has changes that `checkpoint.allow` does not name.

        Args:
            leaves: how the state would differ, as lines; empty if unknown.
            kinds: the kinds of difference between leaves.
        """
        if not self.refused:
            return
        lines = [f"  {line}" for line in self.changes if line.partition(":")[0] in self.refused]
        now = flatten(self.config)
        names = sorted({_nearest_key(key, now) for key in self.refused})
        text = [f"{self.path} holds a run with another config (saved -> given):", *lines]
        if leaves:
            text += ["its state would differ too (saved -> expected):", leaves]
        allow = self.config.get("checkpoint", {}).get("allow", "")
        together = ",".join([*([allow] if allow else []), *names, *kinds])
        raise UserError(
            "\n".join(text),
            "name another --workdir, revert these changes to resume that run, or pass "
            f"--config.checkpoint.allow={together} to resume anyway",
        )

    def claim(self, local_dir: str | None = None) -> None:
        """Makes the folder and acquires its lock.

        Args:
            local_dir: where the lock of a remote folder is.

        Raises:
            UserError: the folder cannot be written, or another process is training in it.
        """
        with _errors_of_writing(self.path):
            patiently(self.path, lambda: self.path.mkdir(parents=True, exist_ok=True), "written")
            patiently(self.path, lambda: lock.acquire(self.path, local_dir), "written")

    def run_id(self) -> str:
        """The id of the run in this folder, which it keeps for life; empty if it has none yet."""
        found = read_environment(self.path).get("run_id", "")
        return found if isinstance(found, str) else ""

    def lineage(self) -> str:
        """The id of the steps this run is on: another one once steps are taken anew."""
        return str(read_environment(self.path).get("run") or uuid.uuid4().hex)

    def record(self, run: str, run_id: str = "") -> None:
        """Writes `config.json` and `env.json`, once it is certain that the run starts or resumes.

        A resume only warns if it cannot write them again.

        Args:
            run: the id of its steps; in-memory checkpoints carry it.
            run_id: the id of the run; checkpoints carry it.

        Raises:
            UserError: the folder of a new run cannot be written.
        """
        ids = {"run": run, **({"run_id": run_id} if run_id else {})}
        environment = json.dumps({**ids, **describe_environment()}, indent=2) + "\n"
        try:
            with _errors_of_writing(self.path):
                write_whole(self.path / CONFIG_FILE, config_to_json(self.config))
                write_whole(self.path / "env.json", environment)
        except UserError as error:
            if not self.exists:
                raise
            warn(f"config.json and env.json are not updated: {error.message}")

    def is_recorded(self, patience: float = 0.0) -> bool:
        """Whether this machine sees a recorded run, which another machine may have written.

        Args:
            patience: seconds to wait for it; network file systems may lag behind.
        """
        deadline = time.monotonic() + patience
        config_file = self.path / CONFIG_FILE
        while not patiently(config_file, lambda: exists(config_file)):
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.1)
        return True


@contextlib.contextmanager
def _errors_of_writing(path: epath.Path) -> Iterator[None]:
    try:
        yield
    except (UserError, StorageFailed):
        raise
    except Exception as error:  # clients of object stores raise many types
        no_room = why_no_room(Path(path), error) if is_local(path) else ""
        why = no_room or (isinstance(error, OSError) and error.strerror) or error
        raise UserError(
            f"--workdir={path} cannot be written: {why}",
            "name a folder you may write to",
        ) from error


def _plain(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Values as JSON represents them, so that a stored config compares equal to a new one."""
    return {key: json.loads(json.dumps(plain_data(value))) for key, value in flat.items()}


def _nearest_key(key: str, config: Mapping[str, Any]) -> str:
    """The key, or the innermost block of the config that would contain it."""
    parts = key.split(".")
    while len(parts) > 1 and not any(
        f"{name}.".startswith(".".join(parts) + ".") for name in config
    ):
        parts.pop()
    return ".".join(parts)


def _show(flat: dict[str, Any], key: str) -> str:
    return json.dumps(flat[key]) if key in flat else "(absent)"


def _check_writable(folder: Path) -> None:
    for place in (folder, *folder.parents):
        if exists(epath.Path(place)):
            if not place.is_dir():
                raise UserError(f"--workdir={folder}: {place} is a file", "name a folder")
            # Permissions are not enough: some file systems accept no files.
            try:
                with tempfile.TemporaryFile(dir=place):
                    return
            except OSError as error:
                if may_pass(error):
                    raise
                with _errors_of_writing(epath.Path(folder)):
                    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                        raise
                return  # a full disk is reported when a write fails


# What a run has, and whether it is a folder.
_KINDS = {
    CONFIG_FILE: False,
    "env.json": False,
    "metrics.jsonl": False,
    "failure.json": False,
    "checkpoints": True,
    "best": True,
    "logs": True,
}


def _check_kinds(folder: Path) -> None:
    """Refuses a file where a run has a folder, and the other way round."""
    for name, is_folder in _KINDS.items():
        path = folder / name
        try:
            mode = patiently(path, path.stat).st_mode
        except OSError:  # it is not there
            continue
        if stat.S_ISDIR(mode) != is_folder:
            wrong, right = ("a folder", "a file") if not is_folder else ("a file", "a folder")
            raise UserError(
                f"{path} is {wrong}, and a run has {right} of that name",
                "move it away, or name another --workdir",
            )
