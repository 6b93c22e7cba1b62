"""Options in XLA_FLAGS, which are read once, when jax first compiles or lists devices.

XLA:CPU hands max followed by a sum to YNNPACK, whose max drops NaN: `jnp.maximum(x, 0).sum()` of
NaN is 0.0 from some size on, and so is a relu followed by a mean, as at the end of a ResNet (jaxlib
0.10.2 and 0.12.0.1; findings/xla-cpu-max-then-sum-drops-nan.sh). Without fusions that end in a sum,
XLA's own code computes both, and keeps it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import mmap
import os
from collections.abc import MutableMapping
from pathlib import Path

# Where the drivers of NVIDIA's and AMD's GPUs, and of those under WSL, show devices.
_GPUS = ("/proc/driver/nvidia/gpus", "/dev/nvidiactl", "/dev/kfd", "/dev/dxg")

_GOOGLE = "0x1ae0"  # PCI vendor

# A minus removes a kind from the default list.
KEEP_NAN = "--xla_cpu_experimental_ynn_fusion_type=-LIBRARY_FUSION_TYPE_REDUCE"


def keep_nan(environ: MutableMapping[str, str]) -> None:
    """Adds `KEEP_NAN` to XLA_FLAGS, as `add_option` does."""
    add_option(environ, KEEP_NAN)


def add_option(environ: MutableMapping[str, str], option: str) -> None:
    """Adds an option of XLA:CPU to XLA_FLAGS where jax runs on CPU, unless they set it already.

    Args:
        environ: changed in place.
        option: as `--name=value`.
    """
    is_cpu_only = environ.get("JAX_PLATFORMS") == "cpu"
    if not is_cpu_only and (has_tpu() or any(map(os.path.exists, _GPUS))):
        return  # the devices' own library parses XLA_FLAGS too, and may be older
    flags = environ.get("XLA_FLAGS", "").strip()
    name = option.removeprefix("--").partition("=")[0]
    is_a_file = bool(flags) and not flags.startswith("-")  # XLA reads the flags from it
    if name in flags or is_a_file or not _is_named_in("jaxlib", name):
        return
    if is_cpu_only or importlib.util.find_spec("libtpu") is None or _is_named_in("libtpu", name):
        environ["XLA_FLAGS"] = f"{flags} {option}".strip()


def has_tpu(devices: Path = Path("/sys/bus/pci/devices")) -> bool:
    """Whether a TPU chip is on the PCI bus of this machine, as jax itself decides it."""
    for path in devices.glob("*/vendor"):
        with contextlib.suppress(OSError):  # a device that was removed
            if path.read_text().strip().lower() == _GOOGLE:
                return True
    return False


@functools.cache
def _is_named_in(package: str, option: str) -> bool:
    """Whether an installed library has an option of this name.

    XLA aborts the process for an option that it does not know, and options come and go: the name in
    the library says more than a list of versions, which ends today.
    """
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations or ()) if spec is not None else ()
    for folder in folders:
        for path in Path(folder).iterdir():
            is_library = path.suffix in (".so", ".dylib", ".pyd") and path.stat().st_size > 0
            if is_library and _contains(path, option.encode()):
                return True
    return False


def _contains(path: Path, text: bytes) -> bool:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        return mapped.find(text) >= 0
