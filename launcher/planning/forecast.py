"""One plan: a config on a topology, from its settings to what is told."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.planning.cache import PlanCache
from launcher.planning.chips import Chip
from launcher.planning.devices import find_devices
from launcher.planning.example import in_place_of_data
from launcher.planning.hlo import GATHERED, Array, Collective
from launcher.planning.largest import largest_batch
from launcher.planning.program import Program, State, Step
from launcher.planning.step_time import Cluster, Prediction, Work, predict, scaling
from launcher.planning.topology import Topology
from trainer.config.settings import Settings
from trainer.errors import UserError
from trainer.step.job import build_job

if TYPE_CHECKING:
    from launcher.cli.plan import Options, Question

# Of a device's memory, in a search with quick compilations: one in full was found to need up to
# 5.2 % more (docs/plan.md).
_ROOM = 0.94

# The length of a run whose length hangs on what is not known.
_SOME_STEPS = 1000


@dataclass(frozen=True)
class Forecast:
    """What is known of a run before it is one. Sizes in bytes, of one device.

    Attributes:
        label: what tells it from others.
        config_name: of the file.
        lift: of the batch axis.
        state_sharding: of the state over it.
        topology: what it is for.
        num_devices: as jax counts them, that take part; one under `vmap` in one process.
        num_hosts: processes of a run there.
        batch: examples of one device.
        searched: what is special about that, if it was searched for.
        state: what every device holds.
        program: the compiled step; of a smaller batch where this one does not fit.
        flops: of one step on one device.
        memory_bytes: what a device has; None if that is unknown.
        needed: at its peak.
        prediction: of the time of a step; None where nothing is known of the chip, or it does not
            fit.
        sync_bn: whether the collectives of batch normalisation are in it.
        sync_bn_seconds: what they take.
        scaling: the same for other numbers of chips.
        examples: in the training data; None if it was not loaded.
        num_steps: of the run.
        notes: what the plan leaves out, and what would keep a run from starting.
        quick: whether the compiler was asked to save time.
    """

    label: str
    config_name: str
    lift: str
    state_sharding: str
    topology: Topology
    num_devices: int
    num_hosts: int
    batch: int
    searched: str
    state: State
    program: Program
    flops: float
    memory_bytes: int | None
    needed: int
    prediction: Prediction | None
    sync_bn: bool
    sync_bn_seconds: float
    scaling: Sequence[tuple[int, Prediction]]
    examples: int | None
    num_steps: int
    notes: tuple[str, ...]
    quick: bool

    @property
    def is_close(self) -> bool:
        """Whether a compilation in full might say otherwise than that it fits."""
        return (
            self.quick
            and self.memory_bytes is not None
            and self.fits
            and (self.needed > _ROOM * self.memory_bytes)
        )

    @property
    def fits(self) -> bool:
        """Whether a device has the memory."""
        return self.memory_bytes is None or self.needed <= self.memory_bytes

    @property
    def global_batch(self) -> int:
        """Examples of all devices."""
        return self.batch * self.num_devices

    @property
    def note(self) -> str:
        """All notes in one."""
        return "; ".join(self.notes)

    @property
    def gathered_bytes(self) -> int:
        """Of params that are put together in a step, where they are cut over the devices."""
        return sum(item.bytes for item in self.program.collectives if item.module == GATHERED)

    def is_batch_norm(self, collective: Collective) -> bool:
        """Whether a collective belongs to a layer that keeps statistics of a batch."""
        return collective.module in self.state.normalisations

    @property
    def largest_arrays(self) -> Sequence[Array]:
        """The largest arrays of the step, at the planned batch."""
        scale = self.batch / self.program.batch
        return [dataclasses.replace(a, bytes=int(a.bytes * scale)) for a in self.program.largest]


def make_forecast(
    question: Question, options: Options, cache: PlanCache, progress: Callable[[str], None]
) -> Forecast:
    """Compiles a config's step for a topology and works out what that means.

    Raises:
        UserError: a person has to change something; else whatever the user's code raises.
    """
    topology = question.topology
    settings, notes = _for_planning(question.settings, options)
    devices = find_devices(topology)
    if devices.are_fake and settings.lift.startswith("vmap") and topology.num_hosts > 1:
        raise UserError(
            f"config.lift={settings.lift!r} on several hosts needs the compiler to be planned",
            "scripts/setup.sh tpu, or plan-gpu for GPUs; or another lift",
        )
    job = build_job(settings)
    step = Step(settings, job, topology, devices, cache, options.quick)
    # As many as there are, and not as many as it is compiled for.
    used = devices.stands_for if step.lift.mesh.size > 1 else 1
    shards = step.lift.num_shards // step.lift.mesh.size
    chip = topology.chip
    available = chip.memory_bytes // chip.devices_per_chip if chip else None
    examples = None if options.example is not None else len(job.stream.source)
    compiled: dict[int, Program] = {}

    def compile_for(batch: int) -> Program:
        if batch not in compiled:
            progress(f"compiling for {topology.label}, {batch * shards} examples a device ...")
            compiled[batch] = step.compile(batch)
        return compiled[batch]

    def needed(batch: int) -> int:
        program = compile_for(batch)
        # A compiler that has run out says how much it asked for, which may not be all of it.
        return program.needed if program.fits else max(program.needed, (available or 0) + 1)

    searched = ""
    if options.batch == "auto":
        room = int(available * _ROOM) if available and options.quick else available
        start = question.settings.global_batch_size // (used * shards)
        most = None if examples is None else examples // (used * shards)
        batch = _largest(needed, room, start, most)
        searched = "all the examples there are" if batch == most else "the most that fit"
    elif options.batch is not None:
        batch = int(options.batch)
    else:
        whole = dataclasses.replace(step.lift, num_shards=used * shards)
        whole.check_divides(settings.global_batch_size, settings.grad_accum_steps)
        batch = settings.global_batch_size // (used * shards)
    program = compile_for(batch)
    total = needed(batch)
    if not program.fits:  # what is in the way is told from a program that can be looked at
        smaller = max(1, int(batch * (available or 0) / program.needed / 2))
        program = compile_for(smaller)
    flops = step.flops(batch)
    fits = available is None or total <= available
    prediction, others, sync_bn = None, [], 0.0
    if chip is not None and fits:
        work = Work(flops, program.bytes_accessed, program.collectives)
        cluster = _cluster(topology, chip) if used > 1 else Cluster(chip, (1,))
        without = dataclasses.replace(work, collectives=_without(work.collectives, step.state))
        sync_bn = (
            predict(work, cluster).collective_seconds - predict(without, cluster).collective_seconds
        )
        work = work if options.sync_bn else without
        prediction = predict(work, cluster)
        # The program of a single device has no collectives, and tells nothing of several.
        others = scaling(work, cluster) if used > 1 else []
    size = batch * shards * used
    if examples is not None and size > examples:
        notes.append(f"a run needs as many examples as its batch, and there are {examples:,}")
    steps_per_epoch = max(1, (examples or 0) // size)
    steps = question.settings.num_steps or (question.settings.num_epochs or 0) * steps_per_epoch
    return Forecast(
        label=question.label,
        config_name=question.config_name,
        lift=settings.lift,
        state_sharding=settings.state_sharding,
        topology=topology,
        num_devices=used,
        num_hosts=topology.num_hosts if used > 1 else 1,
        batch=batch * shards,
        searched=searched,
        state=step.state,
        program=dataclasses.replace(program, batch=program.batch * shards),
        flops=float(flops.total()),
        memory_bytes=available,
        needed=total,
        prediction=prediction,
        sync_bn=options.sync_bn,
        sync_bn_seconds=sync_bn,
        scaling=others,
        examples=examples,
        num_steps=min(steps, question.settings.stop_at_step or steps),
        notes=(*devices.notes, *notes),
        quick=options.quick,
    )


def _for_planning(settings: Settings, options: Options) -> tuple[Settings, list[str]]:
    """The settings of a run as a plan needs them, and what a person should know of the changes."""
    notes = []
    if options.example is not None:
        settings = in_place_of_data(settings, options.example)
    if options.batch is not None:  # instead of the config's, which may be more than there is data
        settings = dataclasses.replace(settings, global_batch_size=settings.grad_accum_steps)
    if options.example is not None or options.batch is not None:
        # Schedules are constants in the program; which ones does not matter.
        settings = dataclasses.replace(settings, num_steps=settings.num_steps or _SOME_STEPS)
    if settings.devices_per_process is not None:
        settings = dataclasses.replace(settings, devices_per_process=None)
        notes.append("config.devices_per_process is left out: the plan is for all devices")
    return settings, notes


def _without(collectives: Sequence[Collective], state: State) -> list[Collective]:
    return [item for item in collectives if item.module not in state.normalisations]


def _largest(
    needed: Callable[[int], int], available: int | None, start: int, most: int | None
) -> int:
    """The most examples of one shard that fit into the bytes there are."""
    if available is None:
        raise UserError(
            "--batch=auto: nothing is known of the memory of cpu devices",
            "name a topology of TPUs or GPUs, or --batch=N",
        )
    if most == 0:
        raise UserError(
            "--batch=auto: there are more devices than training examples",
            "plan for fewer devices, or with --example",
        )
    batch = largest_batch(needed, available, max(1, start), most)
    if not batch:
        raise UserError(
            f"not even one example a device fits into {available / 2**30:.1f} GiB",
            "a device with more memory, a smaller model, or nn.remat around its blocks",
        )
    return batch


def _cluster(topology: Topology, chip: Chip) -> Cluster:
    if topology.platform == "gpu":  # NVLink is within a host
        hosts, gpus = topology.shape
        return Cluster(chip, (gpus,), hosts * topology.num_slices)
    return Cluster(chip, topology.shape, topology.num_slices)
