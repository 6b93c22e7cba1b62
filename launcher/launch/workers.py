"""The workers of a job on one machine, and how they share its GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from launcher.clusters.read import visible_devices
from launcher.launch import environment
from launcher.launch.spec import WorkerSpec
from trainer.errors import UserError


def local_workers(
    count: int, fake_devices: int | None, environ: Mapping[str, str]
) -> tuple[WorkerSpec, ...]:
    """The workers of a job on this machine, each with an equal share of the GPUs, if any.

    Args:
        count: number of workers.
        fake_devices: number of CPU devices that each worker fakes, or None.
        environ: the launcher's environment.

    Raises:
        UserError: the GPUs cannot be shared equally.
    """
    prepared = changed_environ(environ, fake_devices)
    gpus = 0 if environ.get("JAX_PLATFORMS") == "cpu" or fake_devices else count_gpus(environ)
    if count == 1 or not gpus:
        return tuple(WorkerSpec(rank, prepared, None) for rank in range(count))
    if gpus % count:
        raise UserError(
            f"--processes={count} cannot share {gpus} GPUs equally",
            f"{' or '.join(str(n) for n in range(1, gpus + 1) if gpus % n == 0)} processes can, or "
            "narrow CUDA_VISIBLE_DEVICES",
        )
    share = gpus // count
    listed = environ.get("CUDA_VISIBLE_DEVICES", "")
    names = listed.split(",")[:gpus] if listed else [str(i) for i in range(gpus)]
    shares = [",".join(names[rank * share : (rank + 1) * share]) for rank in range(count)]
    return tuple(
        WorkerSpec(rank, {**prepared, "CUDA_VISIBLE_DEVICES": visible}, None)
        for rank, visible in enumerate(shares)
    )


def changed_environ(environ: Mapping[str, str], fake_devices: int | None) -> dict[str, str]:
    """The variables that `environment.prepare` adds or changes."""
    changed = dict(environ)
    environment.prepare(changed, fake_devices)
    return {name: value for name, value in changed.items() if environ.get(name) != value}


def count_gpus(environ: Mapping[str, str], driver: Path = Path("/proc/driver/nvidia/gpus")) -> int:
    """The number of NVIDIA GPUs visible to this process, found without CUDA."""
    visible = visible_devices(environ)
    if visible is not None:
        return visible
    return len(list(driver.iterdir())) if driver.is_dir() else 0
