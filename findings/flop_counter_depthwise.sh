#!/usr/bin/env bash
# torch 2.13.0, FlopCounterMode: forward and backward of a convolution with groups.
# Expected: 3 times the operations of the forward pass, since the gradients of input and weight take as many each.
# Seen: 3 times for a dense convolution, but 2 + C times for a depthwise one of C channels: its weight gradient is
# counted as that of a dense convolution. A training step of a network with depthwise convolutions seems to cost many
# times what it does.
# Exit status 0: still so. 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.2.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch.utils.flop_counter import FlopCounterMode


def counted(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


print("torch", torch.__version__)
ratios = {}
for channels, groups in (36, 1), (36, 36), (72, 72):
    layer = torch.nn.Conv2d(channels, channels, 3, padding=1, groups=groups, bias=False)
    x = torch.zeros(1, channels, 8, 8, requires_grad=True)
    ratios[channels, groups] = counted(lambda: layer(x).sum().backward()) / counted(lambda: layer(x))
    print(f"{channels} channels, {groups} groups: forward and backward are {ratios[channels, groups]:g} x forward; expected 3")
raise SystemExit(ratios != {(36, 1): 3, (36, 36): 38, (72, 72): 74})
PYTHON
