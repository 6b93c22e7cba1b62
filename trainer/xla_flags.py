"""XLA_FLAGS that keep NaN on CPU. They are read once, when jax first compiles or lists devices.

XLA:CPU hands max followed by a sum to YNNPACK, whose max drops NaN: `jnp.maximum(x, 0).sum()` of
NaN is 0.0 from some size on, and so is a relu followed by a mean, as at the end of a ResNet (jaxlib
0.10.2 and 0.12.0.1; findings/xla-cpu-max-then-sum-drops-nan.sh). Without fusions that end in a sum,
XLA's own code computes both, and keeps it.
"""

from __future__ import annotations

import functools
import importlib.util
import mmap
import os
from collections.abc import MutableMapping
from pathlib import Path

# Where the drivers of NVIDIA's and AMD's GPUs, and of those under WSL, show devices.
_GPUS = ("/proc/driver/nvidia/gpus", "/dev/nvidiactl", "/dev/kfd", "/dev/dxg")

_OPTION = "xla_cpu_experimental_ynn_fusion_type"

# A minus removes a kind from the default list.
KEEP_NAN = f"--{_OPTION}=-LIBRARY_FUSION_TYPE_REDUCE"


def keep_nan(environ: MutableMapping[str, str]) -> None:
    """Adds `KEEP_NAN` to XLA_FLAGS where jax runs on CPU, unless they set that option already.

    Args:
        environ: changed in place.
    """
    is_cpu_only = environ.get("JAX_PLATFORMS") == "cpu"
    if not is_cpu_only and (has_tpu() or any(map(os.path.exists, _GPUS))):
        return  # the devices' own library parses XLA_FLAGS too, and may be older
    flags = environ.get("XLA_FLAGS", "").strip()
    is_a_file = bool(flags) and not flags.startswith("-")  # XLA reads the flags from it
    if _OPTION in flags or is_a_file or not _is_named_in("jaxlib"):
        return
    if is_cpu_only or importlib.util.find_spec("libtpu") is None or _is_named_in("libtpu"):
        environ["XLA_FLAGS"] = f"{flags} {KEEP_NAN}".strip()


def has_tpu(devices: str = "/sys/bus/pci/devices") -> bool:
    """Whether a device of Google's is on the PCI bus, as jax itself decides it."""
    return any(
        "0x1ae0" in path.read_text(errors="replace") for path in Path(devices).glob("*/vendor")
    )


@functools.cache
def _is_named_in(package: str) -> bool:
    """Whether an installed library has the option.

    XLA aborts the process for an option that it does not know, and this one is experimental: its
    name in the library says more than a list of versions, which ends today.
    """
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations or ()) if spec is not None else ()
    for folder in folders:
        for path in Path(folder).iterdir():
            is_library = path.suffix in (".so", ".dylib", ".pyd") and path.stat().st_size > 0
            if is_library and _contains(path, _OPTION.encode()):
                return True
    return False


def _contains(path: Path, text: bytes) -> bool:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        return mapped.find(text) >= 0
