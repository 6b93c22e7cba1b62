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
from launcher.planning.hlo import Array, Collective
from launcher.planning.largest import largest_batch
from launcher.planning.predict import Cluster, Prediction, Work, predict, scaling
from launcher.planning.program import Program, State, Step
from launcher.planning.topology import Topology
from trainer.errors import UserError
from trainer.job import Job, build_job

if TYPE_CHECKING:
    from launcher.planning.command import Options, Question

# Of a device's memory, in a search with quick compilations: one in full was found to need up to
# 5.2 % more (docs/plan.md).
_ROOM = 0.94


@dataclass(frozen=True)
class Forecast:
    """What is known of a run before it is one. Sizes in bytes, of one device.

    Attributes:
        label: what tells it from others.
        config_name: of the file.
        lift: of the batch axis.
        topology: what it is for.
        num_devices: as jax counts them, that take part; one under `vmap` in one process.
        num_hosts: processes of a run there.
        batch: examples of one device.
        searched: whether that is the answer to "the most that fit".
        state: what every device holds.
        program: the compiled step; of a smaller batch where this one does not fit.
        flops: of one step on one device.
        memory_bytes: what a device has; None if that is unknown.
        needed: at its peak.
        prediction: of the time of a step; None where nothing is known of the chip, or it does not
            fit.
        sync_bn_seconds: how much of it is for the collectives of batch normalisation.
        scaling: the same for other numbers of chips.
        examples: in the training data; None if it was not loaded.
        num_steps: of the run.
        note: what the plan leaves out.
    """

    label: str
    config_name: str
    lift: str
    topology: Topology
    num_devices: int
    num_hosts: int
    batch: int
    searched: bool
    state: State
    program: Program
    flops: float
    memory_bytes: int | None
    needed: int
    prediction: Prediction | None
    sync_bn_seconds: float
    scaling: Sequence[tuple[int, Prediction]]
    examples: int | None
    num_steps: int
    note: str

    @property
    def fits(self) -> bool:
        """Whether a device has the memory."""
        return self.memory_bytes is None or self.needed <= self.memory_bytes

    @property
    def global_batch(self) -> int:
        """Examples of all devices."""
        return self.batch * self.num_devices

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
    topology, settings = question.topology, question.settings
    if options.example is not None:
        settings = in_place_of_data(settings, options.example)
    if options.batch is not None:  # instead of the config's, which may be more than there is data
        settings = dataclasses.replace(settings, global_batch_size=1)
    devices = find_devices(topology)
    job = build_job(settings)
    step = Step(settings, job, topology, devices, cache, options.quick)
    chip = topology.chip
    available = chip.memory_bytes // chip.devices_per_chip if chip else None
    compiled: dict[int, Program] = {}

    def compile_for(batch: int) -> Program:
        if batch not in compiled:
            progress(f"compiling for {topology.name}, {batch} examples a device ...")
            compiled[batch] = step.compile(batch)
        return compiled[batch]

    def needed(batch: int) -> int:
        program = compile_for(batch)
        # A compiler that has run out says how much it asked for, which may not be all of it.
        return program.needed if program.fits else max(program.needed, (available or 0) + 1)

    searched = options.batch == "auto"
    if searched:
        start = question.settings.global_batch_size // step.lift.num_shards
        room = int(available * _ROOM) if available and options.quick else available
        batch = _largest(needed, room, start, job, step)
    elif options.batch is not None:
        batch = int(options.batch)
    else:
        step.lift.check_divides(settings.global_batch_size)
        batch = settings.global_batch_size // step.lift.num_shards
    program = compile_for(batch)
    total = needed(batch)
    if not program.fits:  # what is in the way is told from a program that can be looked at
        smaller = max(1, int(batch * (available or 0) / program.needed / 2))
        program = compile_for(smaller)
    shards = step.lift.num_shards // step.lift.mesh.size
    used = step.lift.mesh.size * topology.num_devices // len(devices.devices)
    flops = step.flops(batch)
    work = Work(flops, program.bytes_accessed, program.collectives)
    fits = available is None or total <= available
    prediction, others, sync_bn = None, [], 0.0
    if chip is not None and fits:
        cluster = _cluster(topology, chip) if used > 1 else Cluster(chip, (1,))
        sync_bn = _sync_bn(work, cluster)
        if not options.sync_bn:
            kept = [c for c in work.collectives if not is_batch_norm(c)]
            work = dataclasses.replace(work, collectives=kept)
        prediction, others = predict(work, cluster), scaling(work, cluster)
    size = batch * shards * used
    note = devices.note
    if size > len(job.stream.source):
        note = f"{note}; " if note else ""
        have = len(job.stream.source)
        note += f"a run needs as many training examples as its batch, and there are {have:,}"
    steps = settings.num_steps or (settings.num_epochs or 0) * max(
        1, len(job.stream.source) // size
    )
    hosts = len({getattr(device, "process_index", 0) for device in devices.devices})
    return Forecast(
        label=question.label,
        config_name=question.config_name,
        lift=settings.lift,
        topology=topology,
        num_devices=used,
        num_hosts=hosts,
        batch=batch * shards,
        searched=searched,
        state=step.state,
        program=dataclasses.replace(program, batch=program.batch * shards),
        flops=float(flops.total()),
        memory_bytes=available,
        needed=total,
        prediction=prediction,
        sync_bn_seconds=sync_bn,
        scaling=others,
        examples=None if options.example is not None else len(job.stream.source),
        num_steps=steps,
        note=note,
    )


def is_batch_norm(collective: Collective) -> bool:
    """Whether a collective belongs to a layer of batch normalisation."""
    return "BatchNorm" in collective.module


def _largest(
    needed: Callable[[int], int], available: int | None, start: int, job: Job, step: Step
) -> int:
    """The most examples of one shard that fit into the bytes there are."""
    if available is None:
        raise UserError(
            "--batch=auto: nothing is known of the memory of cpu devices",
            "name a topology of TPUs or GPUs, or --batch=N",
        )
    shards = step.lift.num_shards
    most = len(job.stream.source) // shards
    if most < 1:
        raise UserError(
            f"there are {len(job.stream.source)} training examples for {shards} devices",
            "plan for fewer devices, or with --example",
        )
    batch = largest_batch(needed, available, max(1, start), most)
    if not batch:
        raise UserError(
            f"not even one example a device fits into {available / 2**30:.1f} GiB",
            "a device with more memory, a smaller model, or nn.remat around its blocks",
        )
    return batch


def _sync_bn(work: Work, cluster: Cluster) -> float:
    kept = [c for c in work.collectives if not is_batch_norm(c)]
    without = predict(dataclasses.replace(work, collectives=kept), cluster)
    return predict(work, cluster).step_seconds - without.step_seconds


def _cluster(topology: Topology, chip: Chip) -> Cluster:
    if topology.platform == "gpu":  # NVLink is within a host
        hosts, gpus = topology.shape
        return Cluster(chip, (gpus,), hosts * topology.num_slices)
    return Cluster(chip, topology.shape, topology.num_slices)
