"""A model of the time of a step: a roofline for the chip, alpha-beta for communication.

    step = max(compute, memory) * (1 + stragglers) + collectives

The model assumes that no collective overlaps with other work and that the input pipeline keeps up.
A collective of b bytes costs `alpha + beta b` (Hockney, Parallel Computing 20, 1994). Alpha depends
on the number of hops, beta on the bandwidth between the chips: the torus of a TPU slice, or NVLink
within a host, and a data centre's network between them, where each host sends its share of the
bytes (hierarchical all-reduce: reduce-scatter, all-reduce, all-gather). `chips` holds the constants
and their sources; docs/plan.md compares the model with published measurements.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launcher.planning.chips import STRAGGLERS, Chip
from launcher.planning.hlo import Collective

# Passes over the data, in units of (n - 1) / n of its bytes.
_PASSES = {"all-reduce": 2.0, "all-gather": 1.0, "reduce-scatter": 1.0, "all-to-all": 1.0}


@dataclass(frozen=True)
class Cluster:
    """Domains of chips with fast links, joined by a network.

    Attributes:
        chip: the kind of chip.
        domain: chips of a domain along each axis of its torus; one number for NVLink.
        num_domains: number of domains.
    """

    chip: Chip
    domain: tuple[int, ...]
    num_domains: int = 1

    @property
    def chips_per_domain(self) -> int:
        """Chips of one domain."""
        return math.prod(self.domain)

    @property
    def num_chips(self) -> int:
        """Chips of all domains."""
        return self.chips_per_domain * self.num_domains

    @property
    def num_devices(self) -> int:
        """Devices, as jax counts them."""
        return self.num_chips * self.chip.devices_per_chip


@dataclass(frozen=True)
class Work:
    """The work of one device in one step.

    Attributes:
        flops: FLOPs by dtype.
        bytes_accessed: bytes read from and written to memory.
        collectives: collectives with all other devices.
    """

    flops: Mapping[str, float]
    bytes_accessed: float
    collectives: Sequence[Collective]


@dataclass(frozen=True)
class Prediction:
    """The predicted time of one step, in seconds.

    Attributes:
        compute_seconds: matmuls and convolutions.
        memory_seconds: reads and writes of memory.
        collective_seconds: communication between chips.
        straggler_seconds: waiting for the slowest of many.
        peak_seconds: the same operations at the chip's peak, which MFU refers to.
    """

    compute_seconds: float
    memory_seconds: float
    collective_seconds: float
    straggler_seconds: float
    peak_seconds: float

    @property
    def step_seconds(self) -> float:
        """The whole step."""
        work = max(self.compute_seconds, self.memory_seconds)
        return work + self.straggler_seconds + self.collective_seconds

    @property
    def bound(self) -> str:
        """The longest part: "compute", "memory" or "collectives"."""
        parts = {
            "compute": self.compute_seconds,
            "memory": self.memory_seconds,
            "collectives": self.collective_seconds,
        }
        return max(parts, key=parts.__getitem__)

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation, from 0 to 1."""
        return self.peak_seconds / self.step_seconds if self.step_seconds else 0.0


def predict(work: Work, cluster: Cluster) -> Prediction:
    """Predicts the time of a step that does `work` on each device of `cluster`."""
    chip = cluster.chip
    peak = sum(
        count / (_peak(chip, dtype) / chip.devices_per_chip) for dtype, count in work.flops.items()
    )
    compute = peak / chip.compute_share
    bandwidth = chip.memory_share * chip.memory_bandwidth / chip.devices_per_chip
    memory = work.bytes_accessed / bandwidth
    return Prediction(
        compute_seconds=compute,
        memory_seconds=memory,
        collective_seconds=sum(collective_seconds(c, cluster) for c in work.collectives),
        straggler_seconds=STRAGGLERS * math.log2(cluster.num_domains) * max(compute, memory),
        peak_seconds=peak,
    )


def collective_seconds(collective: Collective, cluster: Cluster) -> float:
    """Seconds of all collectives in a `Collective`: `count` times alpha, beta times its bytes."""
    if cluster.num_devices == 1:
        return 0.0
    alpha, beta = alpha_beta(collective.kind, cluster)
    return collective.count * alpha + beta * collective.bytes


def alpha_beta(kind: str, cluster: Cluster) -> tuple[float, float]:
    """Seconds per collective, and seconds per byte of its result."""
    chip, passes = cluster.chip, _PASSES.get(kind, 1.0)
    near, domains = cluster.chips_per_domain, cluster.num_domains
    alpha = chip.collective_overhead
    beta = 0.0
    if near > 1:
        alpha += passes * _hops(cluster.domain, chip) * chip.link_latency
        beta += passes * (near - 1) / near / chip.slice_bandwidth(cluster.domain)
    if domains > 1:
        alpha += passes * math.ceil(math.log2(domains)) * chip.network_latency
        hosts = max(1, near // chip.chips_per_host)
        beta += passes * (domains - 1) / domains / (hosts * chip.network_bandwidth)
    return alpha, beta


def _hops(domain: Sequence[int], chip: Chip) -> float:
    """Hops to reach all chips: half of a ring, all of a line, the depth of a switch's tree."""
    if chip.torus_axes == 0:
        return math.ceil(math.log2(math.prod(domain)))
    return sum(side / 2 if side % chip.ring_side == 0 else side - 1 for side in domain)


def scaling(
    work: Work, cluster: Cluster, beyond: Sequence[int] = (4096, 50_000)
) -> list[tuple[int, Prediction]]:
    """`(chips, prediction)` from one chip to beyond the cluster, with the same batch per chip."""
    counts = {1, cluster.num_chips, *beyond}
    count = 2
    while count < max(beyond):
        counts.add(count)
        count *= 4
    return [(count, predict(work, of_size(cluster, count))) for count in sorted(counts)]


def of_size(cluster: Cluster, num_chips: int) -> Cluster:
    """A cluster of about `num_chips` of the same chips: first larger slices, then more of them."""
    chip = cluster.chip
    if num_chips == cluster.num_chips:
        return cluster
    if chip.torus_axes == 0:
        near = min(num_chips, max(chip.chips_per_host, cluster.chips_per_domain))
        return Cluster(chip, (near,), math.ceil(num_chips / near))
    near = min(num_chips, max(chip.max_chips, cluster.chips_per_domain))
    return Cluster(chip, _box(near, chip.torus_axes), math.ceil(num_chips / near))


def _box(chips: int, axes: int) -> tuple[int, ...]:
    """The sides of a torus of about `chips` chips, as even as powers of two allow."""
    sides = [1] * axes
    while 2 * math.prod(sides) <= chips:
        sides[sides.index(min(sides))] *= 2
    return tuple(sorted(sides))


def _peak(chip: Chip, dtype: str) -> float:
    return chip.flops_bf16 if dtype in ("bfloat16", "float16") else chip.flops_f32
