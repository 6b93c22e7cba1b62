"""The models of `benchmarks/peers.py` in torch, and podlift's initial weights in them.

Layers have flax's names, so that weights are found by name. Flax pads a 3x3 convolution of stride 2
at the end only and torch on both sides; an image and its kernels turned by 180 degrees make them
the same, and cost nothing in a step.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.Dense_0, self.BatchNorm_0 = nn.Linear(64, width), batch_norm(nn.BatchNorm1d, width)
        self.Dense_1, self.BatchNorm_1 = nn.Linear(width, width), batch_norm(nn.BatchNorm1d, width)
        self.Dense_2 = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.BatchNorm_0(self.Dense_0(x)))
        x = functional.relu(self.BatchNorm_1(self.Dense_1(x)))
        return self.Dense_2(x)


class Block(nn.Module):
    def __init__(self, inputs: int, features: int, stride: int) -> None:
        super().__init__()
        self.Conv_0 = conv(inputs, features, 3, stride)
        self.BatchNorm_0 = batch_norm(nn.BatchNorm2d, features)
        self.Conv_1 = conv(features, features, 3)
        self.BatchNorm_1 = batch_norm(nn.BatchNorm2d, features)
        self.has_shortcut = inputs != features or stride > 1
        self.stride = stride
        if self.has_shortcut:
            self.Conv_2 = conv(inputs, features, 1)
            self.BatchNorm_2 = batch_norm(nn.BatchNorm2d, features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.BatchNorm_0(self.Conv_0(x)))
        y = self.BatchNorm_1(self.Conv_1(y))
        if self.has_shortcut:
            # From the last pixel of each pair, which is the first before the turn.
            last = self.stride - 1
            x = self.BatchNorm_2(self.Conv_2(x[:, :, last :: self.stride, last :: self.stride]))
        return functional.relu(x + y)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.Conv_0, self.BatchNorm_0 = conv(1, 16, 3), batch_norm(nn.BatchNorm2d, 16)
        self.Block_0, self.Block_1 = Block(16, 16, 1), Block(16, 32, 2)
        self.Block_2 = Block(32, 64, 2)
        self.Dense_0 = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.BatchNorm_0(self.Conv_0(x)))
        x = self.Block_2(self.Block_1(self.Block_0(x)))
        return self.Dense_0(x.mean(dim=(2, 3)))


def conv(inputs: int, features: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, features, size, stride, padding=size // 2, bias=False)


def batch_norm(kind: Any, features: int) -> nn.Module:
    """With flax's momentum of 0.9 and its epsilon."""
    return kind(features, eps=1e-5, momentum=0.1)


def make_model(name: str, weights: str) -> nn.Module:
    model = {"mlp": lambda: MLP(512), "wide": lambda: MLP(2048), "resnet": ResNet}[name]()
    names = {"kernel": "weight", "scale": "weight", "bias": "bias"}
    loaded = {}
    with np.load(weights) as arrays:
        for path, array in arrays.items():
            *layers, leaf = path.split("/")
            if array.ndim == 4:  # height, width, in, out
                array = array[::-1, ::-1].transpose(3, 2, 0, 1)
            elif array.ndim == 2:
                array = array.T
            loaded[".".join([*layers, names[leaf]])] = torch.from_numpy(array.copy())
    missing, unexpected = model.load_state_dict(loaded, strict=False)
    assert not unexpected, unexpected
    assert all("running" in name or "num_batches" in name for name in missing), missing
    return model


def load_examples(path: str) -> tuple[torch.Tensor, torch.Tensor]:
    with np.load(path) as arrays:
        x, y = arrays["x"], arrays["y"].astype(np.int64)
    if x.ndim == 4:  # to channels first, turned
        x = x[:, ::-1, ::-1].transpose(0, 3, 1, 2).copy()
    return torch.from_numpy(x), torch.from_numpy(y)
