"""One plan: from the settings of a run and a topology to a forecast."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from launcher.planning.cache import PlanCache
from launcher.planning.chips import Chip
from launcher.planning.devices import find_devices
from launcher.planning.example import in_place_of_data
from launcher.planning.hlo import GATHERED, Array, Collective
from launcher.planning.program import Program, State, Step
from launcher.planning.request import PlanOptions, PlanRequest
from launcher.planning.step_time import Cluster, Prediction, Work, predict, scaling
from launcher.planning.topology import Topology
from trainer.config.settings import Settings
from trainer.errors import UserError
from trainer.step.job import build_job

# The share of a device's memory that a search with quick compilations fills: full compilations
# needed up to 5.2 % more (docs/plan.md).
_ROOM = 0.94

# The length of a run if it depends on data that is not loaded.
_SOME_STEPS = 1000

# The search for the largest batch stops within 1/32 of the answer.
_PARTS = 32


@dataclass(frozen=True)
class Forecast:
    """What a run on a topology needs and how fast it is. Sizes are bytes on one device.

    Attributes:
        label: distinguishes this plan from others.
        config_name: the value of --config.
        lift: how the batch axis is lifted.
        state_sharding: how the state is sharded over the batch axis.
        topology: the devices planned for.
        num_devices: devices that take part, as jax counts them; one under `vmap` in one process.
        num_hosts: number of processes of the run.
        batch: examples per device.
        batch_note: how the batch was found, if it was searched for.
        state: the state on each device.
        program: the compiled step; compiled for a smaller batch if this one does not fit.
        flops: FLOPs of one step on one device.
        memory_bytes: memory of a device; None if unknown.
        needed: peak memory.
        prediction: the time of a step; None if the chip is unknown or the step does not fit.
        sync_bn: whether the prediction includes the collectives of batch normalisation.
        sync_bn_seconds: the time they take.
        scaling: predictions for other numbers of chips.
        examples: size of the training data; None if it was not loaded.
        num_steps: length of the run.
        notes: what the plan leaves out, and what would keep the run from starting.
        quick: whether the compiler saved time.
    """

    label: str
    config_name: str
    lift: str
    state_sharding: str
    topology: Topology
    num_devices: int
    num_hosts: int
    batch: int
    batch_note: str
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
        """Whether the step fits by so little that a full compilation may not."""
        return (
            self.quick
            and self.memory_bytes is not None
            and self.fits
            and (self.needed > _ROOM * self.memory_bytes)
        )

    @property
    def fits(self) -> bool:
        """Whether the step fits into the memory of a device."""
        return self.memory_bytes is None or self.needed <= self.memory_bytes

    @property
    def global_batch(self) -> int:
        """Examples on all devices."""
        return self.batch * self.num_devices

    @property
    def note(self) -> str:
        """All notes as one text."""
        return "; ".join(self.notes)

    @property
    def gathered_bytes(self) -> int:
        """Bytes of sharded params that a step all-gathers."""
        return sum(item.bytes for item in self.program.collectives if item.module == GATHERED)

    def is_batch_norm(self, collective: Collective) -> bool:
        """Whether a collective belongs to a layer that keeps batch statistics."""
        return collective.module in self.state.normalisations

    @property
    def largest_arrays(self) -> Sequence[Array]:
        """The largest arrays of the step, at the planned batch."""
        scale = self.batch / self.program.batch
        return [dataclasses.replace(a, bytes=int(a.bytes * scale)) for a in self.program.largest]


def make_forecast(
    request: PlanRequest,
    options: PlanOptions,
    cache: PlanCache,
    print_progress: Callable[[str], None],
) -> Forecast:
    """Compiles the step of a config for a topology and predicts its time.

    Raises:
        UserError: the config, the topology or the batch is wrong. Exceptions of the user's code
            pass through.
    """
    topology = request.topology
    settings, notes = _for_planning(request.settings, options)
    devices = find_devices(topology)
    if devices.are_fake and settings.lift.startswith("vmap") and topology.num_hosts > 1:
        raise UserError(
            f"config.lift={settings.lift!r} on several hosts needs the compiler of the topology",
            "scripts/setup.sh tpu, or plan-gpu for GPUs; or another lift",
        )
    job = build_job(settings)
    step = Step(settings, job, topology, devices, cache, options.quick)
    # The devices of the topology, of which the step may be compiled for fewer.
    used = devices.stands_for if step.lift.mesh.size > 1 else 1
    shards = step.lift.num_shards // step.lift.mesh.size
    chip = topology.chip
    available = chip.memory_bytes // chip.devices_per_chip if chip else None
    examples = None if options.example is not None else len(job.stream.source)
    compiled: dict[int, Program] = {}

    def compile_for(batch: int) -> Program:
        if batch not in compiled:
            print_progress(
                f"compiling for {topology.label}, {batch * shards} examples per device ..."
            )
            compiled[batch] = step.compile(batch)
        return compiled[batch]

    def needed(batch: int) -> int:
        program = compile_for(batch)
        # A compiler that runs out of memory reports what it asked for, which may not be all.
        return program.needed if program.fits else max(program.needed, (available or 0) + 1)

    batch_note = ""
    if options.batch == "auto":
        room = int(available * _ROOM) if available and options.quick else available
        start = request.settings.global_batch_size // (used * shards)
        most = None if examples is None else examples // (used * shards)
        batch = _search_batch(needed, room, start, most)
        batch_note = "all training examples" if batch == most else "the most that fit"
    elif options.batch is not None:
        batch = int(options.batch)
    else:
        lift = dataclasses.replace(step.lift, num_shards=used * shards)
        lift.check_divides(settings.global_batch_size, settings.grad_accum_steps)
        batch = settings.global_batch_size // (used * shards)
    program = compile_for(batch)
    total = needed(batch)
    if not program.fits:  # a smaller program shows which arrays are the largest
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
        # The program of a single device has no collectives, so it says nothing about several.
        others = scaling(work, cluster) if used > 1 else []
    size = batch * shards * used
    if examples is not None and size > examples:
        notes.append(f"a run needs at least as many examples as its batch; there are {examples:,}")
    steps_per_epoch = max(1, (examples or 0) // size)
    steps = request.settings.num_steps or (request.settings.num_epochs or 0) * steps_per_epoch
    return Forecast(
        label=request.label,
        config_name=request.config_name,
        lift=settings.lift,
        state_sharding=settings.state_sharding,
        topology=topology,
        num_devices=used,
        num_hosts=topology.num_hosts if used > 1 else 1,
        batch=batch * shards,
        batch_note=batch_note,
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
        num_steps=min(steps, request.settings.stop_at_step or steps),
        notes=(*devices.notes, *notes),
        quick=options.quick,
    )


def _for_planning(settings: Settings, options: PlanOptions) -> tuple[Settings, list[str]]:
    """The settings changed for planning, and notes on the changes."""
    notes = []
    if options.example is not None:
        settings = in_place_of_data(settings, options.example)
    if options.batch is not None:  # the config's batch may be larger than the data
        settings = dataclasses.replace(settings, global_batch_size=settings.grad_accum_steps)
    if options.example is not None or options.batch is not None:
        # A schedule only adds constants to the program; its length does not matter.
        settings = dataclasses.replace(settings, num_steps=settings.num_steps or _SOME_STEPS)
    if settings.devices_per_process is not None:
        settings = dataclasses.replace(settings, devices_per_process=None)
        notes.append("config.devices_per_process is ignored: the plan uses all devices")
    return settings, notes


def _without(collectives: Sequence[Collective], state: State) -> list[Collective]:
    return [item for item in collectives if item.module not in state.normalisations]


def _search_batch(
    needed: Callable[[int], int], available: int | None, start: int, most: int | None
) -> int:
    """The largest batch of one shard that fits into the available bytes."""
    if available is None:
        raise UserError(
            "--batch=auto: the memory of cpu devices is unknown",
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
            f"not even one example per device fits into {available / 2**30:.1f} GiB",
            "a device with more memory, a smaller model, or nn.remat around its blocks",
        )
    return batch


def largest_batch(
    needed: Callable[[int], int], available: int, start: int, most: int | None = None
) -> int:
    """The largest batch of a device whose program fits; 0 if not even one example does.

    Memory is nearly linear in the batch. So the next batch to try is where the line through the two
    largest that fit meets the available memory, or the midpoint of the interval. The answer was
    compiled, and so was a batch at most 1/32 larger that does not fit.

    Args:
        needed: bytes for a batch, from a compilation.
        available: bytes of a device.
        start: the first batch to try.
        most: the largest batch of interest; None for no bound.
    """
    fits: list[tuple[int, int]] = []  # batches and their bytes, ascending
    beyond = None if most is None else most + 1
    high = beyond
    batch, on_line = max(1, min(start, most or start)), 0
    while True:
        size = needed(batch)
        if size <= available:
            fits.append((batch, size))
        else:
            high = batch
        low = fits[-1][0] if fits else 0
        step = max(1, low // _PARTS)
        margin = 1 if high == beyond else step  # `most` itself may be the answer
        if high is not None and high - low <= margin:
            return low
        guess = _extrapolate(fits[-2:], available)
        if guess is not None and on_line < 2:
            on_line += 1
        else:  # bisect: two steps along the line did not reach the answer
            unknown = high is None or (high == beyond and low)
            guess, on_line = (16 * low if unknown or high is None else (low + high) // 2), 0
        batch = max(low + step, guess)
        if high is not None:
            batch = min(batch, high - margin)


def _extrapolate(two: list[tuple[int, int]], available: int) -> int | None:
    """The batch at which the line through two (batch, bytes) reaches the available bytes."""
    if len(two) < 2 or two[1][1] <= two[0][1]:
        return None
    slope = (two[1][1] - two[0][1]) / (two[1][0] - two[0][0])
    return two[1][0] + int((available - two[1][1]) / slope)


def _cluster(topology: Topology, chip: Chip) -> Cluster:
    if topology.platform == "gpu":  # NVLink joins the GPUs of one host
        hosts, gpus = topology.shape
        return Cluster(chip, (gpus,), hosts * topology.num_slices)
    return Cluster(chip, topology.shape, topology.num_slices)
