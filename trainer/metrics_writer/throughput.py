"""The speed of a run and the memory of its devices, by tag."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import jax

from trainer.config.settings import Settings
from trainer.lift.lift import Lift
from trainer.lift.update import make_job_step
from trainer.metrics_writer.chip_peaks import PEAKS, utilization
from trainer.step.analysis import flops_of_step
from trainer.step.job import Job


class Throughput:
    """Turns seconds a step into examples/s a device, MFU and memory.

    Args:
        settings: of the run.
        job: what is trained.
        lift: over which devices.
        state: a state, or its shapes.

    Attributes:
        counting: the thread that counts the FLOPs of a step, where the chips' peak is known.
    """

    def __init__(self, settings: Settings, job: Job, lift: Lift, state: Any) -> None:
        self._batch_size = settings.global_batch_size
        self._devices = list(lift.mesh.devices.flat)
        self._local = [device for device in self._devices if device.process_index == lift.process]
        self._flops: Mapping[str, float] = {}
        if not {device.device_kind for device in self._devices} <= PEAKS.keys():
            return
        # In a thread, beside the first steps: tracing takes 2 s for ResNet-50.
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
        batch = job.stream.shapes(settings.global_batch_size // lift.num_shards)

        def count() -> None:
            with suppress(Exception):  # training does not depend on it
                step = make_job_step(settings, job, lift.platform)
                flops = flops_of_step(step, shapes, batch)
                self._flops = {dtype: lift.num_shards * n for dtype, n in flops.items()}

        self.counting = threading.Thread(target=count, name="podlift-flops", daemon=True)
        self.counting.start()

    def tags(self, step_seconds: float) -> dict[str, float]:
        """Values by tag. They differ between equal runs; unknown ones are absent."""
        rate = self._batch_size / step_seconds / len(self._devices)
        tags = {"train/examples_per_second_per_device": rate}
        share = utilization(self._flops, step_seconds, self._devices) if self._flops else None
        if share is not None:
            tags["train/mfu"] = share
        return tags | memory_tags(self._local)


def memory_tags(devices: Iterable[Any]) -> dict[str, float]:
    """Bytes in use and their peak on the fullest device, by tag; empty on CPU, which has none."""
    found: dict[str, float] = {}
    for device in devices:
        for name, count in (device.memory_stats() or {}).items():
            if name in ("bytes_in_use", "peak_bytes_in_use", "bytes_limit"):
                found[f"memory/{name}"] = max(found.get(f"memory/{name}", 0), count)
    return found
