"""The run's own step, compiled for a topology: memory, bytes, FLOPs and collectives of one step.

Nothing is allocated: state and batch are shapes.
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
from trainer.step.flops import flops_of_step
from trainer.step.job import Job, make_init
from trainer.step.task import AXIS

# XLA:TPU then takes no time to search for faster code; collectives and FLOPs are the same, and the
# memory is nearly so (docs/plan.md). What the option is called: until jax 0.10, and since.
_QUICK: tuple[dict[str, Any] | None, ...] = (
    {"exec_time_optimization_effort": -1.0},
    {"optimization_level": "O0"},
)

_PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin")


@dataclass(frozen=True)
class State:
    """What a run holds on a device.

    Attributes:
        parameters: how many numbers, over all devices.
        normalisations: paths of the modules that keep statistics of a batch.
        parameter_bytes: of these.
        optimizer_bytes: of the optimizer's state.
        model_bytes: of other state, such as statistics.
        saved_bytes: what is not there, because the state is cut over the devices.
    """

    parameters: int
    normalisations: frozenset[str]
    parameter_bytes: int
    optimizer_bytes: int
    model_bytes: int
    saved_bytes: int = 0


@dataclass(frozen=True)
class Program:
    """One step on one device, as a compiler sees it. Sizes in bytes.

    Attributes:
        batch: examples of one shard; a device has one, but under `vmap`.
        fits: whether the compiler could place it; a GPU's always can.
        needed: peak memory, or what it asked for where it does not fit.
        arguments: state and batch.
        aliased: of them, what the results take over (donation).
        temporaries: beside them.
        bytes_accessed: read and written in memory.
        collectives: by kind and module.
        largest: the largest arrays.
        compile_seconds: when it was compiled.
        cached: whether that was an earlier time.
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
        settings: of the run.
        job: of the run.
        topology: what it is planned for.
        devices: of that topology, or standing for them.
        cache: of earlier compilations.
        quick: let the compiler save time.
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
        # What a call with several steps adds is their batches; one step is what is compiled.
        self._settings = dataclasses.replace(settings, steps_per_call=1)
        self._extra_batches = settings.steps_per_call - 1
        self._job = job
        self._topology = topology
        self._cache = cache
        self._options = _QUICK if quick and self.lift.platform == "tpu" else (None,)
        self._shapes = jax.eval_shape(make_init(job, settings.seed))

    @functools.cached_property
    def state(self) -> State:
        """What a device holds."""
        whole = self._shapes
        here = jax.tree.map(
            lambda leaf, spec: jax.ShapeDtypeStruct(self._share(leaf.shape, spec), leaf.dtype),
            whole,
            self.lift.specs(whole),
        )
        statistics = whole.model_state.get("batch_stats", {})
        return State(
            count_params(whole.params),
            frozenset(name.rpartition("/")[0] for name in name_leaves(statistics)),
            _size(here.params),
            _size(here.opt_state),
            _size((here.model_state, here.ema, here.loss_scale)),
            _size(whole) - _size(here),
        )

    def _share(self, shape: Sequence[int], spec: Sequence[str | None]) -> tuple[int, ...]:
        """The shape of a device's part of a leaf."""
        cut = [self.lift.num_shards if axis else 1 for axis in spec]
        return tuple(n // parts for n, parts in zip(shape, [*cut, *[1] * len(shape)], strict=False))

    def flops(self, batch: int) -> Counter[str]:
        """Of one step on one device, by dtype."""
        step = make_job_step(self._settings, self._job, self._topology.platform)
        shards = self.lift.num_shards // self.lift.mesh.size
        flops = flops_of_step(step, self._shapes, dict(self._rows(batch)))
        return Counter({dtype: shards * count for dtype, count in flops.items()})

    def compile(self, batch: int) -> Program:
        """Compiles the step for so many examples a device; it does not fit, or it is described."""
        rows = dict(self._rows(batch * self.lift.num_shards))
        update = lift_update_step(
            self._settings, self._job, self.lift, self._shapes, self._topology.platform
        )
        lowerable: Any = update
        lowered = lowerable.lower(
            self.lift.state_shapes(self._shapes), self.lift.batch_shapes(rows)
        )
        asked = [
            lowered.as_text(),
            sorted(set(_NAMES.findall(lowered.as_text(debug_info=True)))),
            list(name_leaves(self._shapes)),
            self._topology.platform,
            self._topology.chip,
            self._topology.shape,
            self._options,
            [_version(package) for package in _PACKAGES],
        ]
        key = self._cache.key(asked)
        kept = self._cache.get(key)
        program = self._program(batch, kept, cached=True) if kept is not None else None
        if program is None:
            started = time.monotonic()
            found = _describe(lowered, self._options)
            found["compile_seconds"] = time.monotonic() - started
            self._cache.put(key, found)
            program = self._program(batch, found, cached=False)
            assert program is not None
        return program

    def _program(self, batch: int, found: dict[str, Any], *, cached: bool) -> Program | None:
        """What a compiler has said, in this batch's terms; None if it is not what one says."""
        more = self._extra_batches * _size(dict(self._rows(batch)))
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

    def _rows(self, rows: int) -> Any:
        return self._job.stream.shapes(rows).items()


# Of functions and modules, in a lowered program's locations.
_NAMES = re.compile(r'"(jit[^"]*)"')


class CompilerRefuses(Exception):
    """A compiler has refused a program, for another reason than its size."""


def _compile(lowered: Any, options: Sequence[dict[str, Any] | None]) -> Any:
    """Compiles with the first of some options that the compiler knows, or with none."""
    for option in options:
        try:
            return lowered.compile(compiler_options=option)
        except jax.errors.JaxRuntimeError as error:
            if "No such compile option" not in str(error):
                raise
        except TypeError:  # an option of another type than this jax has
            continue
    return lowered.compile()


def _describe(lowered: Any, options: Sequence[dict[str, Any] | None]) -> dict[str, Any]:
    """Compiles, and says what came of it in plain values."""
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
    # All that has to be there: XLA's own figure for the peak leaves out what lies unused between
    # temporaries, and on CPU the temporaries themselves.
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
    if not analysis:  # a GPU's compiler gives none; the same analysis runs on any program
        from jaxlib import _jax

        analyse = getattr(_jax, "hlo_module_cost_analysis", None)
        modules = compiled.runtime_executable().hlo_modules()
        if analyse is None or not modules:
            return 0.0
        analysis = analyse(jax.devices("cpu")[0].client, modules[0])
    return float(analysis.get("bytes accessed", 0.0))


_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def _needed(message: str) -> int | None:
    """Bytes that a program asked for, from the words of the TPU compiler; None for other errors.

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
