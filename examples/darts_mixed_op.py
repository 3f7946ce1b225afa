"""The mixed operation of DARTS, as everybody writes it, made fast by one line. Of this project it needs kernels/."""

import pathlib
import sys

import torch
import torch.nn as nn
from torch.utils.benchmark import Timer

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import kernels


def separable(channels, size, dilation):
    padding = dilation * (size // 2)
    depthwise = nn.Conv2d(channels, channels, size, 1, padding, dilation, groups=channels, bias=False)
    return nn.Sequential(
        nn.ReLU(), depthwise, nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels, affine=False)
    )


class MixedOp(nn.Module):
    def __init__(self, channels):
        super().__init__()
        pool = nn.Sequential(nn.MaxPool2d(3, 1, padding=1), nn.BatchNorm2d(channels, affine=False))
        convolutions = (separable(channels, size, dilation) for size in (3, 5) for dilation in (1, 2))
        self.ops = nn.ModuleList([nn.Identity(), pool, *convolutions])

    def forward(self, x, weights):
        return sum(w * op(x) for w, op in zip(weights, self.ops))


mixed, x, alphas = MixedOp(16), torch.randn(32, 16, 32, 32), torch.zeros(6, requires_grad=True)
step = Timer("mixed(x, alphas.softmax(0)).square().mean().backward()", globals=globals())
print(f"plain: {1e3 * step.timeit(5).mean:.0f} ms forward and backward")
kernels.fuse(mixed)  # the line
print(kernels.report(mixed))
print(f"fused: {1e3 * step.timeit(5).mean:.0f} ms")
