"""Checkpoints with Orbax: asynchronous, checked on the way back, never silently skipped.

Two folders: `checkpoints/` keeps the latest K, `best/` the best by a metric. They are apart because
one manager that ranks by a metric may evict the newest checkpoint, which a resume needs.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from trainer.console import say, warn
from trainer.errors import CheckpointsUnreadable
from trainer.lift import Lift
from trainer.state import TrainState, checksums, from_dict, name_leaves, to_dict

Meta = dict[str, Any]


@dataclass(frozen=True)
class Restored:
    """A state read back, and the JSON that was saved with it."""

    state: TrainState
    meta: Meta


class _Manager(ocp.CheckpointManager):
    """Orbax's manager, without its own idea of when a run is to stop."""

    def reached_preemption(self, step: int) -> bool:
        """Says no.

        Orbax asks jax for the sync point under the number of the step. jax knows one such counter
        in a process, and whoever stops the run may be counting something else with it: then the
        processes agree on a number that none of them comes to, or not all.
        """
        return False


class Checkpoints:
    """One folder of checkpoints, `<directory>/<step>/`.

    Args:
        directory: where; made at the first save.
        keep: how many of the newest to keep.
        lift: where states live, and how their checksums are taken.
    """

    def __init__(self, directory: epath.Path, keep: int, lift: Lift) -> None:
        self.directory = directory
        self._lift = lift
        self._manager = _Manager(
            directory,
            item_names=("state", "meta"),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
        )

    def save(self, step: int, state: TrainState, meta: Mapping[str, Any]) -> None:
        """Starts to save; returns when the state has been copied and may be donated.

        The checksum of every leaf goes with it: Orbax itself restores a flipped byte without a
        word. Taking them also checks that all devices agree.

        Raises:
            ReplicasDiffer: before anything is written.
        """
        meta = {**meta, "step": step, "checksums": self._lift.checksums(state)}
        state = self._lift.to_global(state)
        saved = self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(to_dict(state)),
                meta=ocp.args.JsonSave(meta),
            ),
        )
        if not saved:
            raise RuntimeError(f"Orbax did not save step {step} in {self.directory}")

    def restore_latest(self, abstract: TrainState) -> Restored | None:
        """The newest checkpoint that reads back whole, or None where there is none at all.

        A damaged one is moved aside, as `<directory>-aside/<step>-<time>`, and reported; then the
        one before it is tried.

        Args:
            abstract: the shapes and dtypes of a state.

        Raises:
            CheckpointsUnreadable: there are checkpoints and none reads back.
        """
        self._manager.reload()
        steps = sorted(self._manager.all_steps(), reverse=True)
        failures: list[tuple[int, str]] = []
        for step in steps:
            restored, reason = self._restore_if_whole(step, abstract)
            if restored is None:
                warn(f"checkpoint {step} cannot be restored: {reason}")
                failures.append((step, reason))
                continue
            for failed, _ in failures:
                self.move_aside(failed)
            return restored
        if failures:
            raise CheckpointsUnreadable(
                f"none of the {len(failures)} checkpoints in {self.directory} can be restored "
                f"(the newest: {failures[0][1]})\n  HINT: if the code changed since, go back "
                "to the commit in env.json; if files are damaged, bring them back, or see whether "
                f"trainer.load({str(self.directory.parent)!r}, best=True) reads the best state. "
                "Nothing was deleted"
            )
        return None

    def _restore_if_whole(self, step: int, abstract: TrainState) -> tuple[Restored | None, str]:
        """A checkpoint, or why not; the same answer in all processes.

        They agree before each thing that they do together: one that could not read its part would
        be missing at the next collective.
        """
        restored, reason = None, "another process cannot read it"
        try:
            restored = self._restore(step, abstract)
        except Exception as error:  # Orbax raises many types for damaged files
            reason = _first_line(error)
        if not all(self._lift.gather(int(restored is not None))) or restored is None:
            return None, reason
        for name, checksum in self._lift.checksums(restored.state).items():
            if restored.meta["checksums"].get(name) != checksum:
                return None, f"{name} is not what was saved: its checksum differs"
        return restored, ""

    def _restore(self, step: int, abstract: TrainState) -> Restored:
        def with_sharding(leaf: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self._lift.state_sharding)

        target = jax.tree.map(with_sharding, to_dict(abstract))
        read = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(target), meta=ocp.args.JsonRestore()
            ),
        )
        return Restored(self._lift.from_global(from_dict(abstract, read["state"])), read["meta"])

    def move_aside(self, step: int) -> None:
        """Takes a checkpoint out of the folder without deleting it."""
        if self._lift.writes:
            aside = self.directory.parent / f"{self.directory.name}-aside"
            aside.mkdir(parents=True, exist_ok=True)
            moved = (self.directory / str(step)).rename(aside / f"{step}-{int(time.time())}")
            say(f"moved checkpoint {step} to {moved}")
        self._lift.gather(0)
        self._manager.reload()

    def newest_meta(self) -> Meta | None:
        """The JSON of the newest checkpoint (only its step if damaged), or None without any."""
        step = self._manager.latest_step()
        if step is None:
            return None
        try:
            return self._manager.restore(
                step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
            )["meta"]
        except Exception:
            warn(f"the best checkpoint, {self.directory / str(step)}, cannot be read")
            return {"step": step}

    def wait(self) -> None:
        """Waits for a save under way; raises what made it fail."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for saves under way; raises what made one fail."""
        self._manager.wait_until_finished()
        self._manager.close()


def load(workdir: epath.PathLike, *, best: bool = False) -> dict[str, Any]:
    """The newest state of a run, or its best, as nested dicts of numpy arrays.

    For use without a trainer, on any machine: `load("runs/mine", best=True)["params"]`.

    Args:
        workdir: the run's folder.
        best: the state in `best/` instead of the newest in `checkpoints/`.

    Raises:
        CheckpointsUnreadable: there is no such checkpoint, or its arrays are not what was saved.
    """
    folder = epath.Path(os.path.abspath(workdir) if "://" not in os.fspath(workdir) else workdir)
    folder = folder / ("best" if best else "checkpoints")
    steps = [int(p.name) for p in folder.iterdir() if p.name.isdigit()] if folder.exists() else []
    if not steps:
        raise CheckpointsUnreadable(f"{folder} holds no checkpoint")
    step = folder / str(max(steps))
    try:
        with _quiet_absl():
            state = _read_numpy(step / "state")
        saved = json.loads((step / "meta" / "metadata").read_text())["checksums"]
    except Exception as error:  # Orbax raises many types for damaged files
        raise CheckpointsUnreadable(f"{step} cannot be read: {_first_line(error)}") from error
    sums = np.asarray(jax.jit(checksums)(state)).tolist()
    for name, value in zip(name_leaves(state), sums, strict=True):
        if saved.get(name) != value:
            raise CheckpointsUnreadable(f"{step}: {name} is not what was saved")
    return state


def _read_numpy(path: epath.Path) -> dict[str, Any]:
    checkpointer = ocp.PyTreeCheckpointer()
    tree = checkpointer.metadata(path).item_metadata.tree
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    return dict(checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy)))


@contextlib.contextmanager
def _quiet_absl() -> Iterator[None]:
    """Orbax warns of files that it only writes one folder up."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
