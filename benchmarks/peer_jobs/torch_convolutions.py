"""Milliseconds of the gradient of ResNet-8 in torch, and of its convolutions, as JSON.

`benchmarks/convolutions.py` runs it as `torch_convolutions.py BATCH SIDE STEPS`.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import torch
from torch.profiler import ProfilerActivity, profile
from torch_models import ResNet

batch, side, steps = map(int, sys.argv[1:])
model = ResNet()
x, y = torch.randn(batch, 1, side, side), torch.zeros(batch, dtype=torch.long)


def take() -> float:
    began = time.perf_counter()
    model.zero_grad()
    torch.nn.functional.cross_entropy(model(x), y).backward()
    return 1000 * (time.perf_counter() - began)


for _ in range(5):
    take()
milliseconds = statistics.median(take() for _ in range(steps))
with profile(activities=[ProfilerActivity.CPU]) as profiled:
    for _ in range(steps):
        take()
inside = sum(
    event.self_cpu_time_total / 1000 / steps
    for event in profiled.key_averages()
    if event.key in ("aten::mkldnn_convolution", "aten::convolution_backward")
)
print(json.dumps({"ms": milliseconds, "ms in convolutions": inside}))
