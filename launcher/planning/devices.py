"""Devices of a topology that may not be here: abstract ones of its compiler, or fake CPU devices.

Call `prepare` before jax is imported, since jax reads its settings once, and `find_devices` after.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.launch import environment
from launcher.planning.topology import Topology, unknown_topology
from trainer.errors import UserError
from trainer.xla_flags import KEEP_NAN

# The most devices to compile for: the program of a device hardly depends on their number.
_MOST_DEVICES = 512

# Where scripts/setup.sh installs the GPU compiler. Only a plan can import it: at every other start
# jax would look for CUDA's libraries and warn.
GPU_COMPILER = Path(sys.prefix) / "plan-gpu"

_TARGETS = Path(__file__).parent / "gpu_targets"


@dataclass(frozen=True)
class Devices:
    """The devices that a step is compiled for.

    Attributes:
        devices: jax devices. Those of a compiler cannot execute anything. There may be fewer than
            in the topology, since the program of a device does not depend on their number.
        stands_for: number of devices in the topology.
        are_fake: whether CPU devices stand in for accelerators.
        notes: what the plan leaves out because of these devices.
    """

    devices: Sequence[Any]
    stands_for: int
    are_fake: bool = False
    notes: tuple[str, ...] = ()


def prepare(environ: MutableMapping[str, str], topologies: Sequence[Topology]) -> None:
    """Sets up jax for planning: nothing is executed, and jax only opens CPU devices."""
    if GPU_COMPILER.is_dir() and str(GPU_COMPILER) not in sys.path:
        sys.path.append(str(GPU_COMPILER))
    fakes = [min(t.num_devices, _MOST_DEVICES) for t in topologies if not has_compiler(t)]
    if fakes:
        for name in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES"):
            environ.pop(name, None)
        environment.prepare(environ, max(fakes))
        # libtpu parses these flags too, and may be older than jax. Nothing is executed here.
        environ["XLA_FLAGS"] = environ["XLA_FLAGS"].replace(KEEP_NAN, "")
    environ["JAX_PLATFORMS"] = "cpu"
    # jax would write programs compiled for a topology to its cache, but could not read them back.
    environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # else a lock file makes a second plan fail
    environment.quieten_libtpu(environ)
    environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def has_compiler(topology: Topology) -> bool:
    """Whether the compiler for a topology is installed. CPU devices are always fake."""
    if topology.platform == "tpu":
        return importlib.util.find_spec("libtpu") is not None
    if topology.platform == "gpu":
        return _gpu_plugin() is not None
    return False


def find_devices(topology: Topology) -> Devices:
    """The devices of a topology, from its compiler or from the CPU backend.

    Raises:
        UserError: the compiler does not know the topology.
    """
    import jax

    if topology.platform == "cpu" or not has_compiler(topology):
        count = min(topology.num_devices, _MOST_DEVICES)
        devices: Sequence[Any] = jax.devices("cpu")[:count]
        is_stand_in = topology.platform != "cpu"
        notes = (_note(topology, count),) if is_stand_in else ()
        return Devices(devices, topology.num_devices, is_stand_in, notes)
    if topology.platform == "tpu":
        devices = _tpu_devices(topology)
        notes = ()
        if topology.num_slices > 1:
            notes = (
                f"compiled for one of {topology.num_slices} slices; memory for communication "
                "between slices is left out",
            )
        return Devices(devices, topology.num_devices, notes=notes)
    return Devices(_gpu_devices(topology), topology.num_devices)


def _tpu_devices(topology: Topology) -> Sequence[Any]:
    """The devices of one slice.

    For several slices XLA expands each collective into parts that have lost their names; the time
    model accounts for the network between slices itself.
    """
    options: dict[str, Any] = {"topology_name": topology.slice_name}
    if topology.chips_per_slice < 4:  # a host of one or two chips
        options["chips_per_host_bounds"] = (*topology.shape, *([1] * (3 - len(topology.shape))))
    found = _describe(topology.name, "tpu", options)
    expected = topology.num_devices // topology.num_slices
    if len(found) != expected:
        raise UserError(
            f"--topology={topology.name}: the compiler sees {len(found)} devices, not {expected}",
            "please report this with the output of: python -m launcher env",
        )
    return found


def _gpu_devices(topology: Topology) -> Sequence[Any]:
    assert topology.chip is not None
    _, gpus = topology.shape
    hosts = max(1, min(topology.num_hosts, _MOST_DEVICES // gpus))
    options = {
        "topology_name": topology.name,
        "target_config": (_TARGETS / f"{topology.chip.name}.pbtxt").read_text(),
        "topology": f"1x{hosts}x{gpus}",
    }
    return _describe(topology.name, "cuda", options)


def _describe(name: str, platform: str, options: Mapping[str, Any]) -> Sequence[Any]:
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform=platform, **options).devices
    except Exception as error:  # jaxlib raises its own types
        raise unknown_topology(name, str(error).splitlines()[0]) from error


def _gpu_plugin() -> str | None:
    names = ("jax_cuda13_plugin", "jax_cuda12_plugin")
    if GPU_COMPILER.is_dir():
        found = next((n for n in names if (GPU_COMPILER / n).is_dir()), None)
        if found:
            return found
    return next((name for name in names if importlib.util.find_spec(name)), None)


def _note(topology: Topology, count: int) -> str:
    what, extra = ("TPU", "tpu") if topology.platform == "tpu" else ("GPU", "plan-gpu")
    fewer = f"{count} of the " if count < topology.num_devices else ""
    return (
        f"the {what} compiler is not installed (scripts/setup.sh {extra}): compiled for {fewer}"
        f"{topology.num_devices} fake CPU devices. FLOPs and collectives are those of the "
        f"{what}; memory and bytes are from the CPU compiler, which fuses less and does not pad"
    )
