"""Peak FLOP/s of chips, for MFU and for the roofline of `launcher plan`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_HALF = ("bfloat16", "float16")


@dataclass(frozen=True)
class Peak:
    """Dense peak FLOP/s of one chip.

    Attributes:
        half: of bfloat16 and float16.
        single: of float32 at jax's default precision: one pass in bfloat16 on a TPU, TF32 on a GPU.
    """

    half: float
    single: float

    def seconds(self, flops: Mapping[str, float]) -> float | None:
        """The least seconds for operations by dtype; None if a dtype has no peak."""
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
# versions; GPUs: their data sheets, where figures with sparsity are twice these.
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
    """Model FLOPs utilisation (MFU) of a step, from 0 to 1.

    Args:
        flops: of the step on all devices, by dtype.
        seconds: of the step.
        devices: of jax. The two devices of a TPU v3 chip share its coordinates.

    Returns:
        None if the peak of the device kind, or of a dtype on it, is unknown.
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
