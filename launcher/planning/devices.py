"""The devices of a topology that may not be here: those of its compiler, or fake CPU ones.

`prepare` sets what jax reads once, so it comes before jax is imported; `find_devices` after.
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

# Enough to cut a batch up.
_MOST_DEVICES = 512

# Where scripts/setup.sh puts the GPU compiler: importable by a plan only, as jax would look for
# CUDA's libraries at each start, and complain.
GPU_COMPILER = Path(sys.prefix) / "plan-gpu"

_TARGETS = Path(__file__).parent / "gpu_targets"


@dataclass(frozen=True)
class Devices:
    """What a step is compiled for.

    Attributes:
        devices: jax devices; of a compiler they can run nothing. Perhaps fewer than the topology
            has: the program of a device does not depend on how many others there are.
        stands_for: the number of devices of the topology.
        are_fake: whether CPU devices stand for others.
        notes: what the plan leaves out on their account.
    """

    devices: Sequence[Any]
    stands_for: int
    are_fake: bool = False
    notes: tuple[str, ...] = ()


def prepare(environ: MutableMapping[str, str], topologies: Sequence[Topology]) -> None:
    """Sets up jax for planning: nothing here is run, and only CPU devices are opened."""
    if GPU_COMPILER.is_dir() and str(GPU_COMPILER) not in sys.path:
        sys.path.append(str(GPU_COMPILER))
    fakes = [min(t.num_devices, _MOST_DEVICES) for t in topologies if not has_compiler(t)]
    if fakes:
        environ.pop("XLA_FLAGS", None)
        environment.prepare(environ, max(fakes))
    environ["JAX_PLATFORMS"] = "cpu"
    # jax would write what it compiles for a topology to its cache, and could not read it.
    environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # or a second plan would fail on a lock file
    environment.quieten_libtpu(environ)
    environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def has_compiler(topology: Topology) -> bool:
    """Whether the compiler for a topology is installed. CPU devices are always fake ones."""
    if topology.platform == "tpu":
        return importlib.util.find_spec("libtpu") is not None
    if topology.platform == "gpu":
        return _gpu_plugin() is not None
    return False


def find_devices(topology: Topology) -> Devices:
    """The devices of a topology, from its compiler or from the CPU backend.

    Raises:
        UserError: the compiler knows no such topology.
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
                f"compiled for one of {topology.num_slices} slices; what the network between them "
                "needs of the memory is left out",
            )
        return Devices(devices, topology.num_devices, notes=notes)
    return Devices(_gpu_devices(topology), topology.num_devices)


def _tpu_devices(topology: Topology) -> Sequence[Any]:
    """Those of one slice. For several, XLA writes out how they are joined, in parts that have lost
    their names; the model of time does that itself.
    """
    options: dict[str, Any] = {"topology_name": topology.slice_name}
    if topology.chips_per_slice < 4:  # a host of one or two chips
        options["chips_per_host_bounds"] = (*topology.shape, *([1] * (3 - len(topology.shape))))
    found = _ask(topology.name, "tpu", options)
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
    return _ask(topology.name, "cuda", options)


def _ask(name: str, platform: str, options: Mapping[str, Any]) -> Sequence[Any]:
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform=platform, **options).devices
    except Exception as error:  # jaxlib's own types of error
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
        f"{what}; memory and bytes are the CPU compiler's, which fuses less and pads nothing"
    )
