"""The training step of a run, compiled for a topology: memory, bytes, FLOPs, collectives.

State and batch are shapes, so nothing is allocated.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from launcher.planning.cache import PlanCache
from launcher.planning.devices import Devices
from launcher.planning.hlo import Array, Collective, find_collectives, largest_arrays, loop_factor
from launcher.planning.topology import Topology
from launcher.worker.mesh import order_devices
from trainer.config.settings import Settings
from trainer.lift.lift import Lift, make_lift
from trainer.lift.update import lift_update_step, make_job_step
from trainer.state.leaves import count_params, name_leaves
from trainer.step.analysis import flops_of_step
from trainer.step.job import Job, make_init
from trainer.step.task import AXIS

# With this option XLA:TPU does not search for faster code. Collectives and FLOPs are the same, and
# memory is nearly the same (docs/plan.md). The first form is for jax before 0.10.
_QUICK: tuple[dict[str, Any] | None, ...] = (
    {"exec_time_optimization_effort": -1.0},
    {"optimization_level": "O0"},
)

_PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin")


@dataclass(frozen=True)
class State:
    """The training state on one device.

    Attributes:
        parameters: number of parameters, over all devices.
        normalisations: paths of the modules that keep batch statistics.
        parameter_bytes: bytes of the parameters.
        optimizer_bytes: bytes of the optimizer state.
        model_bytes: bytes of other state, such as batch statistics.
        saved_bytes: bytes that sharding the state saves.
    """

    parameters: int
    normalisations: frozenset[str]
    parameter_bytes: int
    optimizer_bytes: int
    model_bytes: int
    saved_bytes: int = 0


@dataclass(frozen=True)
class Program:
    """One compiled step on one device. Sizes are bytes.

    Attributes:
        batch: examples per shard; under `vmap` a device has several shards.
        fits: whether the compiler found room; the GPU compiler always does.
        needed: peak memory, or the memory that the compiler asked for if the step does not fit.
        arguments: state and batch.
        aliased: the part of the arguments that is donated.
        temporaries: temporary buffers.
        bytes_accessed: bytes read from and written to memory.
        collectives: collectives by kind and module.
        largest: the largest arrays.
        compile_seconds: duration of the compilation.
        cached: whether an earlier plan compiled it.
    """

    batch: int
    fits: bool
    needed: int
    arguments: int = 0
    aliased: int = 0
    temporaries: int = 0
    bytes_accessed: float = 0.0
    collectives: tuple[Collective, ...] = ()
    largest: tuple[Array, ...] = ()
    compile_seconds: float = 0.0
    cached: bool = False


class Step:
    """A run's lifted step over the devices of a topology, for any batch.

    Args:
        settings: settings of the run.
        job: job of the run.
        topology: the topology to plan for.
        devices: devices of that topology, or those that stand in for them.
        cache: results of earlier compilations.
        quick: whether the compiler saves time.
    """

    def __init__(
        self,
        settings: Settings,
        job: Job,
        topology: Topology,
        devices: Devices,
        cache: PlanCache,
        quick: bool = True,
    ) -> None:
        ordered = order_devices(devices.devices, settings.lift)
        mesh = Mesh(np.array(ordered), (AXIS,))
        self.lift: Lift = make_lift(settings.lift, mesh, settings.state_sharding)
        # One step is compiled; a call with several steps only adds the memory of their batches.
        self._settings = dataclasses.replace(settings, steps_per_call=1)
        self._extra_batches = settings.steps_per_call - 1
        self._job = job
        self._topology = topology
        self._cache = cache
        self._options = _QUICK if quick and self.lift.platform == "tpu" else (None,)
        self._shapes = jax.eval_shape(make_init(job, settings.seed))

    @functools.cached_property
    def state(self) -> State:
        """The state on one device."""
        full = self._shapes
        shard = jax.tree.map(
            lambda leaf, spec: jax.ShapeDtypeStruct(
                self._shard_shape(leaf.shape, spec), leaf.dtype
            ),
            full,
            self.lift.specs(full),
        )
        statistics = full.model_state.get("batch_stats", {})
        return State(
            count_params(full.params),
            frozenset(name.rpartition("/")[0] for name in name_leaves(statistics)),
            _size(shard.params),
            _size(shard.opt_state),
            _size((shard.model_state, shard.ema, shard.loss_scale)),
            _size(full) - _size(shard),
        )

    def _shard_shape(self, shape: Sequence[int], spec: Sequence[str | None]) -> tuple[int, ...]:
        shards = [self.lift.num_shards if axis else 1 for axis in spec]
        return tuple(n // of for n, of in zip(shape, [*shards, *[1] * len(shape)], strict=False))

    def flops(self, batch: int) -> Counter[str]:
        """FLOPs of one step on one device, by dtype.

        Args:
            batch: examples per shard.
        """
        step = make_job_step(self._settings, self._job, self._topology.platform)
        shards = self.lift.num_shards // self.lift.mesh.size
        flops = flops_of_step(step, self._shapes, self._batch_shapes(batch))
        return Counter({dtype: shards * count for dtype, count in flops.items()})

    def compile(self, batch: int) -> Program:
        """Compiles the step, or reads the result of an earlier compilation.

        Args:
            batch: examples per shard.

        Raises:
            CompilerRefuses: the compiler fails for another reason than the size.
        """
        shapes = self._batch_shapes(batch * self.lift.num_shards)
        update = lift_update_step(
            self._settings, self._job, self.lift, self._shapes, self._topology.platform
        )
        lowerable: Any = update
        lowered = lowerable.lower(
            self.lift.state_shapes(self._shapes), self.lift.batch_shapes(shapes)
        )
        parts = [
            lowered.as_text(),
            sorted(set(_NAMES.findall(lowered.as_text(debug_info=True)))),
            list(name_leaves(self._shapes)),
            self._topology.platform,
            self._topology.chip,
            self._topology.shape,
            self._options,
            [_version(package) for package in _PACKAGES],
        ]
        key = self._cache.key(parts)
        entry = self._cache.get(key)
        program = self._program(batch, entry, cached=True) if entry is not None else None
        if program is None:
            started = time.monotonic()
            found = _describe(lowered, self._options)
            found["compile_seconds"] = time.monotonic() - started
            self._cache.put(key, found)
            program = self._program(batch, found, cached=False)
            assert program is not None
        return program

    def _program(self, batch: int, found: dict[str, Any], *, cached: bool) -> Program | None:
        """A program from the entry of a cache; None if the entry is malformed."""
        more = self._extra_batches * _size(self._batch_shapes(batch))
        try:
            program = Program(
                **{
                    **found,
                    "collectives": tuple(Collective(**item) for item in found["collectives"]),
                    "largest": tuple(Array(**item) for item in found["largest"]),
                    "needed": int(found["needed"]) + more,
                    "arguments": int(found["arguments"]) + more,
                },
                batch=batch,
                cached=cached,
            )
        except (TypeError, KeyError, ValueError):
            return None
        return program

    def _batch_shapes(self, examples: int) -> dict[str, Any]:
        return dict(self._job.stream.shapes(examples))


# Names of functions and modules in the locations of a lowered program.
_NAMES = re.compile(r'"(jit[^"]*)"')


class CompilerRefuses(Exception):
    """A compiler refuses a program for another reason than its size."""


def _compile(lowered: Any, options: Sequence[dict[str, Any] | None]) -> Any:
    """Compiles with the first of the options that the compiler knows, or with none."""
    for option in options:
        try:
            return lowered.compile(compiler_options=option)
        except jax.errors.JaxRuntimeError as error:
            if "No such compile option" not in str(error):
                raise
        except TypeError:  # this jax expects another type for the option
            continue
    return lowered.compile()


def _describe(lowered: Any, options: Sequence[dict[str, Any] | None]) -> dict[str, Any]:
    """Compiles; returns the fields of a Program as plain values."""
    try:
        compiled = _compile(lowered, options)
    except jax.errors.JaxRuntimeError as error:
        needed = _needed(str(error))
        if needed is None:
            raise CompilerRefuses(str(error).strip().splitlines()[0]) from error
        return {
            "fits": False,
            "needed": needed,
            "arguments": 0,
            "aliased": 0,
            "temporaries": 0,
            "bytes_accessed": 0.0,
            "collectives": [],
            "largest": [],
        }
    memory = compiled.memory_analysis()
    text = compiled.as_text()
    parts = {
        "arguments": memory.argument_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
    }
    # XLA's own figure for the peak leaves out fragmentation between temporaries, and on CPU the
    # temporaries themselves.
    needed = (
        parts["arguments"] + parts["temporaries"] + memory.output_size_in_bytes - parts["aliased"]
    )
    return {
        **parts,
        "fits": True,
        "needed": needed,
        "bytes_accessed": _bytes_accessed(compiled) * loop_factor(text),
        "collectives": [dataclasses.asdict(item) for item in find_collectives(text)],
        "largest": [dataclasses.asdict(item) for item in largest_arrays(text)],
    }


def _bytes_accessed(compiled: Any) -> float:
    analysis = compiled.cost_analysis()
    if not analysis:  # the GPU compiler returns none; the same analysis runs on any program
        from jaxlib import _jax

        analyse = getattr(_jax, "hlo_module_cost_analysis", None)
        modules = compiled.runtime_executable().hlo_modules()
        if analyse is None or not modules:
            return 0.0
        analysis = analyse(jax.devices("cpu")[0].client, modules[0])
    return float(analysis.get("bytes accessed", 0.0))


_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def _needed(message: str) -> int | None:
    """Bytes that a program asked for, from an error of the TPU compiler; None for other errors.

    "Ran out of memory on HBM, the total memory required for HLO temporaries (43.49G) exceeds
    available HBM (15.75G)"
    """
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    sizes = [
        float(number) * _UNITS[unit]
        for number, unit in re.findall(r"([\d.]+)\s?([KMGT])(?:i?B)?\b", message)
    ]
    return int(max(sizes, default=0.0))


def _size(tree: Any) -> int:
    return sum(
        int(np.prod(leaf.shape)) * jax.dtypes.canonicalize_dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
