"""Accelerators: rates, sizes and latencies. Nothing here imports jax.

Peaks and sizes are the vendors'. The shares of them that a step reaches, and the latencies of
collectives, are fitted to published measurements; each constant names its source.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.metrics_writer.chip_peaks import PEAKS

# Shares of a TPU's peaks that entire training steps reach.
#   Compute: 0.75 to 0.89 in dense language models on v5e, 0.76 on v4, 0.67 to 0.71 on v5p, of all
#   FLOPs including rematerialised ones (MaxText, configs/v5e, v4 and v5p/README.md, one slice).
#   Memory: 0.61 and 0.66 in ResNet-50 on v3, of "bytes accessed" as XLA counts them (Flax,
#   examples/imagenet/README.md, v3-8; MLPerf 0.6 on 256 chips).
COMPUTE_SHARE = 0.75
MEMORY_SHARE = 0.65

# Shares of a GPU's. Compute: 0.50 in Llama 2 7B on 8 H100 (MaxText, configs/a3/llama_2_7b/
# README.md). Memory: 0.31 (PyTorch), 0.39 (TensorFlow with XLA) and 0.43 (MXNet) in ResNet-50 in
# mixed precision on one A100 (NVIDIA DeepLearningExamples).
_GPU_COMPUTE_SHARE = 0.50
_GPU_MEMORY_SHARE = 0.40

# What each doubling of slices (or of hosts with GPUs) adds to a step, as a share of it, on top of
# communication: the slowest of more is slower. Fitted to MaxText's 16B to 128B models on 2 to 32
# slices of v5e, where it reduces the error of their MFU from 7.5 % to 2.8 % (root mean square). The
# rows for v4, which are not part of the fit, are then within 0.3 %.
STRAGGLERS = 0.02

# The share of a TPU link's nominal bandwidth: an all-gather of 34 MB over 4 chips of v5e in a line
# takes 680 us ("How to Scale Your Model", part 3), where 50 GB/s would take 503 us.
_LINK_SHARE = 0.75

# The share of a GPU's memory that jax uses, unless XLA_CLIENT_MEM_FRACTION is set.
_GPU_MEMORY_TAKEN = 0.75

# Seconds. TPU: of the 8 us for a small all-gather over 4 chips in a line, 3 us are hops (the same
# part). GPU: NCCL's own model (src/graph/tuning.cc) has 6.6 to 6.8 us at its base; 2.5 us for each
# of 2 log2(8) = 6 steps give 22 us, between its 15 us and the 34 us measured on a DGX A100
# (nccl-tests issue 123), and 12 us each way between two hosts the 46 us of nccl issue 1244.
_TPU_OVERHEAD, _TPU_HOP = 5e-6, 1e-6
_GPU_OVERHEAD, _GPU_HOP, _GPU_NETWORK_HOP = 7e-6, 2.5e-6, 12e-6
# Assumed: host to host, through both hosts' PCIe. No published measurement was found.
_TPU_NETWORK_HOP = 50e-6

_GIB = 1 << 30


@dataclass(frozen=True)
class Chip:
    """One chip of an accelerator. Rates are per chip, in SI units.

    Attributes:
        name: as in the name of a topology.
        device_kind: as `jax.Device.device_kind`.
        devices_per_chip: devices that jax sees, which share the chip equally.
        flops_bf16: peak FLOP/s, dense.
        flops_f32: peak FLOP/s of float32 at jax's default precision: one pass in bfloat16 on a TPU,
            TF32 on a GPU.
        memory_bytes: memory that a program can use; on a GPU with jax's default settings.
        memory_bandwidth: bytes/s.
        link_bandwidth: bytes/s out of a chip, for an all-reduce in a ring over all chips that fast
            links join. TPU: of one link each way along each axis, for sides that do not close into
            rings; `slice_bandwidth` handles those that do. GPU: NCCL's bus bandwidth.
        link_latency: seconds per hop, or per step of a tree.
        network_bandwidth: bytes/s out of a host of `chips_per_host` over a data centre's network.
        network_latency: seconds per step of a tree over that network.
        collective_overhead: seconds of a collective without any bytes or hops.
        chips_per_host: chips of one process.
        max_chips: the most chips that fast links join.
        torus_axes: axes of the torus; 0 if a switch joins all chips.
        ring_side: an axis whose side is a multiple of this is a ring; 0 without a torus.
        source: source of the peaks, sizes and bandwidths.
        compute_share: share of the peak FLOP/s that training steps reach.
        memory_share: share of the memory bandwidth that training steps reach.
    """

    name: str
    device_kind: str
    devices_per_chip: int
    flops_bf16: float
    flops_f32: float
    memory_bytes: int
    memory_bandwidth: float
    link_bandwidth: float
    link_latency: float
    network_bandwidth: float
    network_latency: float
    collective_overhead: float
    chips_per_host: int
    max_chips: int
    torus_axes: int
    ring_side: int
    source: str
    compute_share: float = COMPUTE_SHARE
    memory_share: float = MEMORY_SHARE

    def slice_bandwidth(self, sides: Sequence[int]) -> float:
        """Bytes/s out of a chip for an all-reduce in a slice with these sides.

        An axis of one chip has no links; a ring sends both ways at once.
        """
        if not self.torus_axes:
            return self.link_bandwidth
        ways = sum(2 if side % self.ring_side == 0 else 1 for side in sides if side > 1)
        return self.link_bandwidth / self.torus_axes * max(ways, 1)


def _tpu(
    name: str,
    device_kind: str,
    source: str,
    *,
    memory_gib: float,
    memory_bandwidth: float,
    axes: int,
    one_way: float,
    ring_side: int,
    network_bandwidth: float,
    max_chips: int,
    devices: int = 1,
) -> Chip:
    """A TPU: `one_way` bytes/s per link, `memory_gib` per device, four chips per host."""
    return Chip(
        name=name,
        device_kind=device_kind,
        devices_per_chip=devices,
        flops_bf16=PEAKS[device_kind].half,
        flops_f32=PEAKS[device_kind].single,
        memory_bytes=int(devices * memory_gib * _GIB),
        memory_bandwidth=memory_bandwidth,
        link_bandwidth=axes * one_way * _LINK_SHARE,
        link_latency=_TPU_HOP,
        network_bandwidth=network_bandwidth,
        network_latency=_TPU_NETWORK_HOP,
        collective_overhead=_TPU_OVERHEAD,
        chips_per_host=4,
        max_chips=max_chips,
        torus_axes=axes,
        ring_side=ring_side,
        source=source,
    )


def _gpu(
    name: str,
    device_kind: str,
    source: str,
    *,
    memory_bytes: int,
    memory_bandwidth: float,
    bus_bandwidth: float,
    network_bandwidth: float,
) -> Chip:
    """A GPU, eight per host."""
    return Chip(
        name=name,
        device_kind=device_kind,
        devices_per_chip=1,
        flops_bf16=PEAKS[device_kind].half,
        flops_f32=PEAKS[device_kind].single,
        memory_bytes=int(_GPU_MEMORY_TAKEN * memory_bytes),
        memory_bandwidth=memory_bandwidth,
        link_bandwidth=bus_bandwidth,
        link_latency=_GPU_HOP,
        network_bandwidth=network_bandwidth,
        network_latency=_GPU_NETWORK_HOP,
        collective_overhead=_GPU_OVERHEAD,
        chips_per_host=8,
        max_chips=8,
        torus_axes=0,
        ring_side=0,
        source=source,
        compute_share=_GPU_COMPUTE_SHARE,
        memory_share=_GPU_MEMORY_SHARE,
    )


# `memory_gib` is the "available HBM" in errors of XLA:TPU (libtpu 0.0.42). `one_way` is the
# all-reduce bandwidth of a pod over its chips and links (v3: 340 TB/s, 1024 chips, 4 links; v4:
# 1.1 PB/s, 4096, 6; v5e: 51.2 TB/s, 256, 4) or the bidirectional bandwidth of a chip over twice its
# links (v5p: 1200 GB/s; v6e: 800 GB/s; tpu7x: 1200 GB/s). `network_bandwidth` is four times that of
# a chip: 50 Gbit/s (v4, v5p), 25 (v5e: two NICs of 100 for eight chips), 100 (v6e, tpu7x).
_TPUS = (
    _tpu(
        "v2",
        "TPU v2",
        # No longer in Cloud's documentation: 496 Gbit/s per link. No network joins its slices, so
        # 100 Gbit/s per host are assumed; v3 likewise.
        'Jouppi et al., "A Domain-Specific Supercomputer for Training Deep Neural Networks" (2020)',
        memory_gib=7.48,
        memory_bandwidth=700e9,
        axes=2,
        one_way=62e9,  # from the vendor's data sheet
        ring_side=16,
        network_bandwidth=12.5e9,
        max_chips=256,
        devices=2,
    ),
    _tpu(
        "v3",
        "TPU v3",
        "https://cloud.google.com/tpu/docs/v3",
        memory_gib=15.48,
        memory_bandwidth=900e9,
        axes=2,
        one_way=82e9,
        ring_side=32,
        network_bandwidth=12.5e9,
        max_chips=1024,
        devices=2,
    ),
    _tpu(
        "v4",
        "TPU v4",
        "https://cloud.google.com/tpu/docs/v4",
        memory_gib=15.25,
        memory_bandwidth=1200e9,
        axes=3,
        one_way=45e9,
        ring_side=4,
        network_bandwidth=25e9,
        max_chips=4096,
        devices=2,
    ),
    _tpu(
        "v5e",
        "TPU v5 lite",
        "https://cloud.google.com/tpu/docs/v5e",
        memory_gib=15.75,
        memory_bandwidth=819e9,
        axes=2,
        one_way=50e9,
        ring_side=16,
        network_bandwidth=12.5e9,
        max_chips=256,
    ),
    _tpu(
        "v5p",
        "TPU v5",
        "https://cloud.google.com/tpu/docs/v5p",
        memory_gib=95.74,
        memory_bandwidth=2765e9,
        axes=3,
        one_way=100e9,
        ring_side=4,
        network_bandwidth=25e9,
        max_chips=8960,
    ),
    _tpu(
        "v6e",
        "TPU v6 lite",
        "https://cloud.google.com/tpu/docs/v6e",
        memory_gib=31.25,
        memory_bandwidth=1638e9,
        axes=2,
        one_way=100e9,
        ring_side=16,
        network_bandwidth=50e9,
        max_chips=256,
    ),
    _tpu(
        "tpu7x",
        "TPU7x",
        "https://cloud.google.com/tpu/docs/tpu7x",
        memory_gib=94.75,
        memory_bandwidth=7380e9,
        axes=3,
        one_way=100e9,
        ring_side=4,
        network_bandwidth=50e9,
        max_chips=9216,
        devices=2,
    ),
)

# Dense peaks: data sheets with sparsity list twice as much. `memory_bytes` is that of gpu_targets/.
_GPUS = (
    _gpu(
        "h100",
        "NVIDIA H100 80GB HBM3",
        "NVIDIA H100 data sheet, SXM5",
        memory_bytes=84_929_347_584,
        memory_bandwidth=3352e9,
        bus_bandwidth=370e9,  # nccl-tests issue 212, in a ring; 480 with NVLink SHARP from 1 GB up
        network_bandwidth=400e9,  # 8 x 400 Gbit/s: DGX H100, p5.48xlarge; a3-highgpu-8g: 100e9
    ),
    _gpu(
        "a100",
        "NVIDIA A100-SXM4-80GB",
        "NVIDIA A100 data sheet, SXM4 80GB",
        memory_bytes=85_100_068_864,
        memory_bandwidth=2039e9,
        bus_bandwidth=235e9,  # the maximum in NCCL's src/graph/tuning.cc
        network_bandwidth=50e9,  # 400 Gbit/s: p4d.24xlarge; DGX A100: 200e9, a2-highgpu-8g: 12.5e9
    ),
    _gpu(
        "l4",
        "NVIDIA L4",
        "NVIDIA L4 data sheet",
        memory_bytes=23_654_531_072,
        memory_bandwidth=300e9,
        bus_bandwidth=12e9,  # assumed: PCIe 4.0 x16 has 32e9, and eight share the host's memory
        network_bandwidth=12.5e9,  # 100 Gbit/s: g2-standard-96
    ),
)

CHIPS: dict[str, Chip] = {chip.name: chip for chip in (*_TPUS, *_GPUS)}
