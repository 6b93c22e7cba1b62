"""A smoke test of a run: each of its parts once, in a separate folder."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from trainer.checkpoints.init_from import initialise_from
from trainer.checkpoints.saver import Saver
from trainer.config.settings import Settings, check
from trainer.console import open_terminal, say
from trainer.data.prefetch import depth_for
from trainer.data.stream import HostBatch, Source
from trainer.errors import CheckpointsUnreadable, Preempted, SmokeFailed
from trainer.inference.evaluate import Evaluator
from trainer.lift.call import Call
from trainer.lift.lift import Lift, make_lift
from trainer.lift.replicas import check_replicas
from trainer.lift.same_data import agree_on_data
from trainer.lift.update import lift_update_step
from trainer.metrics_writer.messages import describe_devices, warn_of_unsynced_state
from trainer.run.ownership import Ownership
from trainer.run.training_labels import TrainingLabels
from trainer.state.leaves import count_params
from trainer.state.train_state import TrainState
from trainer.step.job import Job, build_job, make_init
from trainer.step.update import metric_names
from trainer.workdir.paths import absolute
from trainer.workdir.workdir import Workdir

# Why two equal steps may differ on a healthy machine.
_ON_GPU = (
    "some GPU kernels sum in any order; XLA_FLAGS=--xla_gpu_deterministic_ops=true fixes the order"
)

StopRequested = Callable[[int, str], bool]


def smoke(
    config: ConfigDict,
    folder: epath.PathLike,
    mesh: Mesh | None = None,
    *,
    stop_requested: StopRequested = lambda step, phase: False,
    local_dir: str | None = None,
) -> None:
    """Takes two calls of the run's step, evaluates, saves, restores, and repeats the second call.

    All processes of a job call it, as they call `trainer.train`. Process 0 prints a line a check.
    The files are removed on success, and kept for inspection on failure.

    Args:
        config: of the run.
        folder: a folder that all processes see; the test makes its own inside.
        mesh: the devices, with the one axis "batch"; all devices where None.
        stop_requested: as for `trainer.train`.
        local_dir: where what needs a local folder goes if `folder` is remote.

    Raises:
        SmokeFailed: a check failed.
        Preempted: asked to stop. Nothing was saved.
        Exception: whatever the run itself would raise.
    """
    open_terminal()
    settings = check(config)
    lift = make_lift(settings.lift, mesh, settings.state_sharding)
    lift.check_divides(settings.global_batch_size, settings.grad_accum_steps)
    place = absolute(folder) / lift.broadcast_text(f"smoke-{uuid.uuid4().hex[:8]}")
    workdir = Workdir.check(place, settings.config)
    stop_requested(0, "load")
    job = build_job(settings)
    stop_requested(0, "start")  # from here on, processes wait for each other
    test = _Smoke(settings, workdir, lift, job, stop_requested, local_dir)
    try:
        test.run()
    except Preempted:
        test.remove()
        raise
    finally:
        test.ownership.close()
    lift.gather(0)  # all processes are done with the folder
    test.remove()


class _Smoke:
    """One smoke test. All processes run the same checks."""

    def __init__(
        self,
        settings: Settings,
        workdir: Workdir,
        lift: Lift,
        job: Job,
        stop_requested: StopRequested,
        local_dir: str | None,
    ) -> None:
        self.settings = settings
        self.workdir = workdir
        self.lift = lift
        self.job = job
        self.stop_requested = stop_requested
        self.ownership = Ownership(workdir, lift, local_dir)
        self.scan = settings.steps_per_call > 1

    def run(self) -> None:
        """All checks, in the order of a run."""
        lift, settings = self.lift, self.settings
        with self._check("devices") as report:
            self._ask(0, "start")
            self.ownership.agree()
            per_shard = settings.global_batch_size // lift.num_shards
            report(f"{describe_devices(lift)}, global batch {settings.global_batch_size}, ")
            report(f"{per_shard} a shard")
        with self._check("processes") as report:
            run, _ = self.ownership.claim()
            self.ownership.record(run)
            sources = {"train": self.job.stream.source, "eval": self.job.held_out}
            agree_on_data(lift, sources)
            seen = "; all see the workdir and the same data" if lift.num_processes > 1 else ""
            report(f"{lift.num_processes}{seen}")
        init = make_init(self.job, settings.seed)
        with self._check("first step") as report:
            state = lift.make_state(init)
            if settings.init_from:
                state = initialise_from(settings, lift, state)
            params = count_params(state.params)
            warn_of_unsynced_state(lift, self.job, state)
            update = lift_update_step(settings, self.job, lift, state)
            state, first, seconds = self._call(update, state, 0)
            step = int(lift.read(state.step))
            report(f"{params:,} parameters, compiled in {seconds:.2f} s")
        saved = self._checksums(f"after step {step}", state)
        with self._check("save") as report:
            started = time.monotonic()
            self._save(state, step, run)
            report(f"{len(saved)} leaves in {time.monotonic() - started:.2f} s")
        with self._check("second step") as report:
            state, second, seconds = self._call(update, state, step)
            each = seconds / settings.steps_per_call
            report(f"{1000 * each:.3g} ms, {settings.global_batch_size / each:,.0f} examples/s")
            if self.scan:
                report(f", {settings.steps_per_call} steps a call")
        with self._check("loss") as report:
            report(f"{first[0]:.6g}, then {second[-1]:.6g}")
        unstopped = self._checksums(f"after step {2 * step}", state)
        self._evaluate(state, 2 * step)
        with self._check("restore") as report:
            restored = self._restore(jax.eval_shape(init), init, run)
            _compare(saved, check_replicas(lift, restored).checksums, "is not what was saved")
            report(f"step {step}, bit for bit what was saved")
        with self._check("resume") as report:
            again, _, _ = self._call(update, restored, step)
            what = f"at step {2 * step} is not what it was without a stop\n  HINT: {_ON_GPU}"
            _compare(unstopped, check_replicas(lift, again).checksums, what)
            report(f"step {2 * step} again, bit for bit as without a stop")

    def remove(self) -> None:
        """Removes the files of the test."""
        if self.lift.writes and self.workdir.path.exists():
            self.workdir.path.rmtree()

    @contextlib.contextmanager
    def _check(self, name: str) -> Iterator[Callable[[str], None]]:
        """Prints one line: what the block reports, or FAILED."""
        said: list[str] = []
        try:
            yield said.append
        except Preempted:
            raise
        except BaseException as error:
            if self.lift.writes:
                say(f"{name:12} FAILED")
            if isinstance(error, SmokeFailed):
                raise SmokeFailed(f"{name}: {error}") from error.__cause__
            raise
        if self.lift.writes:
            say(f"{name:12} {''.join(said)}")

    def _ask(self, step: int, phase: str) -> None:
        if self.stop_requested(step, phase):
            raise Preempted(step, saved=False)

    def _call(self, update: Any, state: TrainState, step: int) -> tuple[TrainState, Any, float]:
        """One call of the step: the state after it, the loss of each step, seconds."""
        self._ask(step, "train" if step else "compile")
        job, lift, size = self.job, self.lift, self.settings.global_batch_size
        rows = lift.rows(size)
        if self.scan:
            batch = job.stream.batches_at(step, self.settings.steps_per_call, rows)
        else:
            batch = job.stream.batch_at(step, rows)
        on_devices = lift.put_batch(batch, scan=self.scan)
        jax.block_until_ready(on_devices)
        began = time.monotonic()
        state, values = update(state, on_devices)
        jax.block_until_ready((state, values))
        seconds = time.monotonic() - began
        call = Call(step, step + self.settings.steps_per_call, is_first=True)
        TrainingLabels(job, lift).check_after(call, batch)()
        names = metric_names(job.task, job.recipe)
        losses = np.atleast_2d(lift.read(values))[:, names.index("loss")]
        for bad in np.flatnonzero(~np.isfinite(losses)):
            raise SmokeFailed(f"the loss is {losses[bad]} at step {step + bad + 1}")
        return state, losses, seconds

    def _save(self, state: TrainState, step: int, run: str) -> None:
        """Saves a state, and waits until it is on disk."""
        self._ask(step, "save")
        with contextlib.closing(Saver(self.workdir, self.settings, self.lift)) as saver:
            saver.run = run
            saver.save(step, state, {"num_steps": self.job.num_steps})
            saver.finish()

    def _checksums(self, when: str, state: TrainState) -> dict[str, int]:
        """The checksums of a state, which is the same on all devices."""
        with self._check("replicas") as report:
            sums = check_replicas(self.lift, state).checksums
            copies = self.lift.mesh.size
            report(
                f"{copies} {'copies agree' if copies > 1 else 'copy'}, {len(sums)} leaves, {when}"
            )
            if self.lift.sharded:
                report(f"; {' and '.join(self.lift.sharded)} sharded over the devices")
        return sums

    def _evaluate(self, state: TrainState, step: int) -> None:
        with self._check("evaluation") as report:
            if self.job.held_out is None:
                report("none: there are no held-out examples")
                return
            size = self.settings.eval_batch_size or self.settings.global_batch_size
            # One full batch and one padded batch, if there are enough examples.
            few = _First(self.job.held_out, min(size + 1, len(self.job.held_out)))
            depth = depth_for(self.settings.prefetch, self.lift.platform)
            evaluator = Evaluator(self.job.task, few, self.lift, size, depth)
            metrics = evaluator(state, lambda: self.stop_requested(step, "evaluate"))
            if metrics is None:
                raise Preempted(step, saved=False)
            bad = [name for name, value in metrics.items() if not np.isfinite(value)]
            if bad:
                raise SmokeFailed(f"{bad[0]} is {metrics[bad[0]]}")
            shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            report(f"{shown} on {len(few)} of {len(self.job.held_out):,} examples")

    def _restore(self, abstract: TrainState, init: Callable[[], Any], run: str) -> TrainState:
        """The saved state, restored as a restart does."""
        with contextlib.closing(Saver(self.workdir, self.settings, self.lift)) as saver:
            saver.run = run
            try:
                restored = saver.restore(abstract, init, has_changed=False)
            except CheckpointsUnreadable as error:
                raise SmokeFailed(error.message) from error
        if restored is None:
            raise SmokeFailed(f"{self.workdir.checkpoints} holds no checkpoint")
        return restored.state


class _First:
    """The first examples of a source."""

    def __init__(self, source: Source, count: int) -> None:
        self._source = source
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, indices: np.ndarray, /) -> HostBatch:
        return self._source[indices]


def _compare(expected: dict[str, int], found: dict[str, int], what: str) -> None:
    bad = [name for name, checksum in expected.items() if found.get(name) != checksum]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise SmokeFailed(f"{bad[0]}{more} {what}")
