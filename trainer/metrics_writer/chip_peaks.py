"""The most that chips compute: what a measured or predicted step is held against."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_HALF = ("bfloat16", "float16")


@dataclass(frozen=True)
class Peak:
    """Of one chip, in FLOP/s, dense.

    Attributes:
        half: of bfloat16 and float16.
        single: of float32 at jax's default precision: one pass in bfloat16 on a TPU, TF32 on a GPU.
    """

    half: float
    single: float

    def seconds(self, flops: Mapping[str, float]) -> float | None:
        """What so many operations, by dtype, take at least; None where a dtype has no peak."""
        total = 0.0
        for dtype, count in flops.items():
            if dtype not in (*_HALF, "float32"):
                return None
            total += count / (self.half if dtype in _HALF else self.single)
        return total


def _tpu(flops: float) -> Peak:
    return Peak(flops, flops)


_H100 = Peak(989e12, 494e12)
_A100 = Peak(312e12, 156e12)

# By `jax.Device.device_kind`. TPUs: https://cloud.google.com/tpu/docs/v3 and its like for the other
# versions; GPUs: their data sheets, whose figures with sparsity are twice these.
PEAKS: dict[str, Peak] = {
    "TPU v2": _tpu(45e12),
    "TPU v3": _tpu(123e12),
    "TPU v4": _tpu(275e12),
    "TPU v5 lite": _tpu(197e12),
    "TPU v5e": _tpu(197e12),
    "TPU v5": _tpu(459e12),
    "TPU v5p": _tpu(459e12),
    "TPU v6 lite": _tpu(918e12),
    "TPU v6e": _tpu(918e12),
    "TPU7x": _tpu(2307e12),
    "NVIDIA H100 80GB HBM3": _H100,
    "NVIDIA H200": _H100,
    "NVIDIA A100-SXM4-40GB": _A100,
    "NVIDIA A100-SXM4-80GB": _A100,
    "NVIDIA A100-PCIE-40GB": _A100,
    "NVIDIA A100 80GB PCIe": _A100,
    "NVIDIA L4": Peak(121e12, 60e12),
}


def utilization(flops: Mapping[str, float], seconds: float, devices: Iterable[Any]) -> float | None:
    """The part of the chips' peak that a step reaches (MFU), from 0 to 1.

    Args:
        flops: of the step on all devices, by dtype.
        seconds: that the step takes.
        devices: of jax. Both cores of a TPU v3, two devices, are one chip: they share its place.

    Returns:
        None where the peak of a device's kind, or of a dtype on it, is not known.
    """
    devices = list(devices)
    kinds = {device.device_kind for device in devices}
    if len(kinds) != 1 or not kinds <= PEAKS.keys():
        return None
    least = PEAKS[kinds.pop()].seconds(flops)
    return least and least / len({_chip_of(device) for device in devices}) / seconds


def _chip_of(device: Any) -> Any:
    coords = getattr(device, "coords", None)
    if coords is None:
        return device.id
    return getattr(device, "slice_index", 0), tuple(coords)
