"""How fast a run is, and how much memory its devices have taken."""

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
from trainer.step.flops import flops_of_step
from trainer.step.job import Job


class Speed:
    """Turns the seconds of a step into what a person asks for.

    Args:
        settings: of the run.
        job: what is trained.
        lift: on what.
        state: a state, or its shapes.

    Attributes:
        counting: the thread that counts the operations of a step, where the chips' peak is known.
    """

    def __init__(self, settings: Settings, job: Job, lift: Lift, state: Any) -> None:
        self._batch_size = settings.global_batch_size
        self._devices = list(lift.mesh.devices.flat)
        self._here = [device for device in self._devices if device.process_index == lift.process]
        self._flops: Mapping[str, float] = {}
        if not {device.device_kind for device in self._devices} <= PEAKS.keys():
            return
        # Tracing takes 2 s for ResNet-50, so it is done beside the first steps.
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
        batch = job.stream.shapes(settings.global_batch_size // lift.num_shards)

        def count() -> None:
            with suppress(Exception):  # a courtesy: training goes on without it
                step = make_job_step(settings, job, lift.platform)
                flops = flops_of_step(step, shapes, batch)
                self._flops = {dtype: lift.num_shards * n for dtype, n in flops.items()}

        self.counting = threading.Thread(target=count, name="podlift-flops", daemon=True)
        self.counting.start()

    def tags(self, step_seconds: float) -> dict[str, float]:
        """By tag; no two runs agree about any of them. What is not known (yet) is left out."""
        rate = self._batch_size / step_seconds / len(self._devices)
        tags = {"train/examples_per_second_per_device": rate}
        share = utilization(self._flops, step_seconds, self._devices) if self._flops else None
        if share is not None:
            tags["train/mfu"] = share
        return tags | memory_tags(self._here)


def memory_tags(devices: Iterable[Any]) -> dict[str, float]:
    """The fullest device's bytes now and at most so far, by tag; a CPU does not tell."""
    found: dict[str, float] = {}
    for device in devices:
        for name, count in (device.memory_stats() or {}).items():
            if name in ("bytes_in_use", "peak_bytes_in_use", "bytes_limit"):
                found[f"memory/{name}"] = max(found.get(f"memory/{name}", 0), count)
    return found
