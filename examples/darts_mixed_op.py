"""The mixed operation of DARTS, as everybody writes it, made fast by one line: python examples/darts_mixed_op.py

The folder kernels/ is all of this project that it needs.
"""

import pathlib
import sys
import time

import torch
import torch.nn as nn

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import kernels


def separable(channels, size, dilation):
    padding = dilation * (size // 2)
    depthwise = nn.Conv2d(channels, channels, size, 1, padding, dilation, groups=channels, bias=False)
    pointwise = nn.Conv2d(channels, channels, 1, bias=False)
    return nn.Sequential(nn.ReLU(), depthwise, pointwise, nn.BatchNorm2d(channels, affine=False))


class MixedOp(nn.Module):
    def __init__(self, channels):
        super().__init__()
        pool = nn.Sequential(nn.MaxPool2d(3, 1, padding=1), nn.BatchNorm2d(channels, affine=False))
        convolutions = (separable(channels, size, dilation) for size in (3, 5) for dilation in (1, 2))
        self.ops = nn.ModuleList([nn.Identity(), pool, *convolutions])

    def forward(self, x, weights):
        return sum(w * op(x) for w, op in zip(weights, self.ops))


mixed, x, alphas = MixedOp(16), torch.randn(32, 16, 32, 32), torch.zeros(6, requires_grad=True)
for name in ("plain", "fused"):
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        mixed(x, alphas.softmax(0)).square().mean().backward()
        seconds.append(time.perf_counter() - start)
    print(f"{name}: {1e3 * min(seconds):.0f} ms forward and backward")
    if name == "plain":
        kernels.fuse(mixed)  # the line
        print(kernels.report(mixed))
