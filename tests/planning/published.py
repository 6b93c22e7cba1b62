"""The model of time beside published measurements: `python tests/planning/published.py`.

Prints the tables of docs/plan.md. Sources are there; a row is what was measured, what the model
says, and the difference.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from launcher.planning.chips import CHIPS
from launcher.planning.hlo import Collective
from launcher.planning.step_time import Cluster, Work, predict

# ResNet-50 in bfloat16: FLOPs an image, and bytes accessed a step by images a device, from this
# repository's plans (local batch normalisation, on v3; on A100 for GPUs).
_FLOPS = 23.5e9
_TPU_BYTES = {128: 34.48e9, 64: 20.44e9, 32: 10.81e9, 16: 6.00e9}
_GPU_BYTES = {256: 66.03e9}
_GRADIENTS = [Collective("all-reduce", "gradients, statistics, metrics", 2, 102_440_624)]
_SYNC_BN = [Collective("all-reduce", "BatchNorm", 98, 424_960)]

_V100 = dataclasses.replace(
    CHIPS["a100"],
    name="v100",
    flops_bf16=125e12,  # of float16; NVIDIA's V100 data sheet, as are the next two
    flops_f32=15.7e12,
    memory_bandwidth=900e9,
    link_bandwidth=130e9,
)

_A100_40GB = dataclasses.replace(CHIPS["a100"], memory_bandwidth=1555e9)


@dataclass(frozen=True)
class Row:
    """One comparison; `measured` and `predicted` are in the unit that `what` says."""

    what: str
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        """Of the prediction, relative."""
        return self.predicted / self.measured - 1


def _resnet(chip, domain, images, *, bytes_accessed, sync_bn=False):
    collectives = _GRADIENTS + (_SYNC_BN if sync_bn else [])
    work = Work({"bfloat16": _FLOPS * images}, bytes_accessed[images], collectives)
    return 1e3 * predict(work, Cluster(chip, domain)).step_seconds


def resnet() -> list[Row]:
    """Milliseconds a step of ResNet-50. The first two and NVIDIA's gave the model its shares."""
    v2, v3, a100, small = CHIPS["v2"], CHIPS["v3"], CHIPS["a100"], _A100_40GB
    tpu, gpu = {"bytes_accessed": _TPU_BYTES}, {"bytes_accessed": _GPU_BYTES}
    hours = 3600e3
    return [
        Row("Flax, v3-8, 128 a core", 4.4 * hours / 125100, _resnet(v3, (2, 2), 128, **tpu)),
        Row(
            "MLPerf 0.6, v3-512, 64 a core",
            32768 / 480,
            _resnet(v3, (16, 16), 64, **tpu, sync_bn=True),
        ),
        Row(
            "Ying et al., v3-2048, 16 a core",
            32768 / 1050,
            _resnet(v3, (32, 32), 16, **tpu, sync_bn=True),
        ),
        Row("Flax, v3-32, 32 a core", 2.1 * hours / 125100, _resnet(v3, (4, 4), 32, **tpu)),
        Row("Flax, v2-32, 32 a core", 2.5 * hours / 125100, _resnet(v2, (4, 4), 32, **tpu)),
        Row("Flax, 8 x V100, 256 a GPU", 4.3 * hours / 62500, _resnet(_V100, (8,), 256, **gpu)),
        Row("NVIDIA, TensorFlow, A100 40GB, 256", 256e3 / 2375, _resnet(small, (1,), 256, **gpu)),
        Row("the same, 8 GPUs", 8 * 256e3 / 17400, _resnet(small, (8,), 256, **gpu)),
        Row("NVIDIA, PyTorch, A100 80GB, 256", 256e3 / 2470, _resnet(a100, (1,), 256, **gpu)),
        Row("the same, 8 GPUs", 8 * 256e3 / 16621, _resnet(a100, (8,), 256, **gpu)),
    ]


# MaxText on slices of 256 v5e: MFU in per cent on 1, 2, 4, ... slices; parameters, sequences of
# 2048 tokens a chip, and TFLOP/s a chip on one slice.
_SLICES = (1, 2, 4, 8, 16, 32)
_MAXTEXT = {
    "16B": (16.3e9, 6, (61.10, 59.37, 59.14, 58.27, 56.56, 54.65)),
    "32B": (32.5e9, 4, (66.86, 64.81, 64.10, 63.67, 62.26, 60.40)),
    "64B": (64.8e9, 2, (59.90, 56.66, 55.85, 54.96, 53.29, 50.18)),
    "128B": (129.2e9, 1, (56.06, 55.82, 54.93, 52.93, 50.86, 46.25)),
}


def maxtext() -> list[Row]:
    """MFU on several slices, in per cent, from that on one: what the network and waiting cost."""
    v5e, rows = CHIPS["v5e"], []
    for name, (parameters, sequences, measured) in _MAXTEXT.items():
        # A chip's FLOPs for its tokens, six for each parameter; MFU counts no others.
        flops = 6 * parameters * sequences * 2048
        alone = flops / (measured[0] / 100 * v5e.flops_bf16)
        gradients = [Collective("all-reduce", "gradients", 1, int(2 * parameters))]
        for slices, there in zip(_SLICES[1:], measured[1:], strict=True):
            work = Work({"bfloat16": alone * v5e.flops_bf16 * v5e.compute_share}, 0.0, gradients)
            # Within a slice the measured time has all of it already.
            near = predict(work, Cluster(v5e, (16, 16)))
            far = predict(work, Cluster(v5e, (16, 16), slices))
            seconds = alone + far.step_seconds - near.step_seconds
            rows.append(Row(f"{name}, {slices} slices", there, measured[0] * alone / seconds))
    return rows


def table(rows: list[Row]) -> str:
    """As in docs/plan.md."""
    return "".join(
        f"| {row.what} | {row.measured:.1f} | {row.predicted:.1f} | {row.error:+.0%} |\n"
        for row in rows
    )


if __name__ == "__main__":
    print(table(resnet()))
    print(table(maxtext()))
