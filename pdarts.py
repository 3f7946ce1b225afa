#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.10", "numpy"]
# ///
"""P-DARTS: Progressive Differentiable Architecture Search, in one module that reads like the paper.

Chen, Xie, Wu, Tian: "Progressive Differentiable Architecture Search: Bridging the Depth Gap between Search and
Evaluation", ICCV 2019, arXiv 1904.12760. "The paper" below; "DARTS" is Liu et al., arXiv 1806.09055.

    python pdarts.py search                              # a whole search in minutes, on generated pictures
    python pdarts.py search --preset cifar10 --data DIR  # the paper's search
    python pdarts.py evaluate PDARTS --preset cifar10 --data DIR
    python pdarts.py draw PDARTS

The method in short. A cell is a small graph whose edges apply one of 8 candidate operations; during the search every
edge applies all of its candidates, weighted by softmax(alpha), and alpha is learned by gradient descent, on the half of
the training pictures that the weights do not learn from. The search runs in stages with ever deeper networks (5, 11, 17
cells), and each stage hands on only the strongest candidates of every edge (8, 5, 3). Skip-connects, which win too
easily in deep networks, are held back by dropout while searching and limited to M in the final normal cell.

The file follows the method, from the operations to the search and the evaluation; what every such program needs (data,
files, pictures of cells, the command line) comes last.

Glossary
    N, C, H, W   pictures in a batch, channels, height, width
    K            candidates of an edge in the current stage (|O| in the paper)
    alphas       architecture parameters, [14 edges, K], one matrix for normal and one for reduction cells
    candidates   for each of the 14 edges, the names of its K operations, in the order of PRIMITIVES
    genotype     the discrete cell: two (operation, input) pairs per node; inputs 0 and 1 are the outputs of the two
                 cells before it, inputs 2, 3, ... its own nodes
    weights      all parameters that are not alphas
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import datetime
import hashlib
import html
import http.client
import io
import itertools
import json
import math
import os
import pathlib
import pickle
import platform
import reprlib
import shlex
import shutil
import signal
import sys
import tarfile
import tempfile
import threading
import time
import urllib.request
import warnings
import zipfile
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

try:  # the slow parts of a search, fused; without the folder everything runs in plain torch
    import kernels as fused

    fused.mixed_norm_sum  # noqa: B018  (there are other packages of this name)
except (ImportError, AttributeError):
    fused = None


class InputError(ValueError):
    """What was given cannot be used; the message says what was wrong and what was expected."""


def _short(value) -> str:
    """What a message shows of any value, however long or deeply nested."""
    return f"{reprlib.repr(value):.80}"


# ----------------------------------------------------------------------------------------------------------------------
# Hyper-parameters
# ----------------------------------------------------------------------------------------------------------------------


def option(default, help, low=None, high=None, choices=None):
    """A hyper-parameter: default, help text (with its source) and inclusive bounds; the command line reads them too."""
    return dataclasses.field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices})


class _Checked:
    """Checks type and bounds of every `option` of a dataclass when it is made."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, low, high = getattr(self, field.name), field.metadata["low"], field.metadata["high"]
            choices = field.metadata["choices"]
            if choices and value not in choices:
                raise InputError(f"{field.name} is {value!r}; expected {' or '.join(choices)}")
            several = isinstance(field.default, tuple) and isinstance(value, (tuple, list))
            kind = type(field.default[0] if several else field.default)
            for x in value if several else (value,):
                if type(x) is not kind and not (kind is float and type(x) is int):
                    raise InputError(f"{field.name} is {_short(value)}; expected {kind.__name__}")
                if isinstance(x, float) and not abs(x) <= 1e30:  # far more, and float32 overflows
                    raise InputError(f"{field.name} is {value}; expected a finite number, at most 1e30")
                if low is not None and x < low or high is not None and x > high:
                    bounds = [f"at least {low}"] * (low is not None) + [f"at most {high}"] * (high is not None)
                    raise InputError(f"{field.name} is {value}; expected {' and '.join(bounds)}")


DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class SearchConfig(_Checked):
    """A search. The defaults are for CIFAR-10: the paper's settings ("paper, search") or the official code's."""

    dataset: str = option("cifar10", "shapes, cifar10 or cifar100; own data: --data FILE.npz")
    pictures: int = option(0, "training pictures used at most, 0 = all", 0)
    cells: tuple[int, ...] = option((5, 11, 17), "cells of each stage's network (paper, search)", 3, 1000)
    candidates: tuple[int, ...] = option(
        (8, 5, 3), "candidates K per edge in each stage: 8 first, 3 or more last (paper, search)", 1, 8
    )
    skip_dropout: tuple[float, ...] = option(
        (0.0, 0.4, 0.7), "initial dropout after skip-connects of stride 1 in each stage (paper, search)", 0, 0.99
    )
    max_skips: int = option(2, "skip-connects M that the normal cell may keep (paper, sec. 3.3)", 0)
    channels: int = option(16, "channels C of the first cell (paper, search)", 1, 10**4)
    stem_stride: int = option(
        1, "stride of the stem; 2 for large pictures or a fast search (1 in the official code)", 1, 8
    )
    epochs: int = option(25, "epochs of each stage (paper, search)", 1, 10**6)
    warmup: int = option(10, "first epochs of each stage that train weights only (paper, search)", 0)
    batch: int = option(96, "pictures per step (paper, search)", 2, 10**6)
    lr: float = option(0.025, "learning rate of the weights, cosine to 0 (official code)", 0)
    momentum: float = option(0.9, "momentum of the weights (official code)", 0, 1)
    weight_decay: float = option(3e-4, "weight decay of the weights (official code)", 0)
    alpha_lr: float = option(6e-4, "Adam's learning rate of the alphas (paper, search)", 0)
    alpha_weight_decay: float = option(1e-3, "weight decay of the alphas (paper, search)", 0)
    clip: float = option(5.0, "largest gradient norm, of weights and of alphas (official code)", 1e-9)
    unrolled: bool = option(False, "second-order alphas (DARTS, eq. 7) instead of first-order")
    crop_padding: int = option(4, "random crop: zeros around the picture (official code)", 0, 1000)
    flip: bool = option(True, "random horizontal flip (official code)")
    dtype: str = option("float32", "float32, or bfloat16 for the maps (autocast)", choices=DTYPES)
    seed: int = option(0, "seed of everything random", 0, 2**63 - 1)
    deterministic: bool = option(False, "the same bits in every run on a GPU too, where this costs time")

    def __post_init__(self):
        super().__post_init__()
        stages = len(self.cells)
        if not stages or stages != len(self.candidates) or stages != len(self.skip_dropout):
            raise InputError(
                f"cells {self.cells}, candidates {self.candidates} and skip_dropout {self.skip_dropout} describe "
                "different numbers of stages; expected one value per stage in each"
            )
        if self.candidates[0] != len(PRIMITIVES):
            raise InputError(f"candidates starts with {self.candidates[0]}; expected {len(PRIMITIVES)}, all primitives")
        if any(b > a for a, b in itertools.pairwise(self.candidates)):
            raise InputError(
                f"candidates is {self.candidates}; expected no stage to keep more than the one before it has"
            )
        if self.candidates[-1] < 3:
            # With none and skip_connect gone, one candidate must be left for the refinement to choose.
            raise InputError(f"candidates ends with {self.candidates[-1]}; expected at least 3 in the last stage")
        if self.warmup >= self.epochs:
            raise InputError(
                f"warmup is {self.warmup} of {self.epochs} epochs; expected fewer, or no alphas are learned"
            )


@dataclasses.dataclass(frozen=True)
class EvaluateConfig(_Checked):
    """Training of a found cell from scratch. The defaults are for CIFAR: "paper, evaluation" or the official code."""

    dataset: str = option("cifar10", "shapes, cifar10 or cifar100; own data: --data FILE.npz")
    pictures: int = option(0, "training pictures used at most, 0 = all", 0)
    cells: int = option(20, "cells of the network (paper, evaluation)", 3, 1000)
    channels: int = option(36, "channels C of the first cell (paper, evaluation)", 1, 10**4)
    epochs: int = option(600, "epochs (paper, evaluation)", 1, 10**6)
    batch: int = option(128, "pictures per step (paper, evaluation)", 2, 10**6)
    lr: float = option(0.025, "learning rate, cosine to 0 (paper, evaluation)", 0)
    momentum: float = option(0.9, "momentum (official code)", 0, 1)
    weight_decay: float = option(3e-4, "weight decay (paper, evaluation)", 0)
    clip: float = option(5.0, "largest gradient norm (official code)", 1e-9)
    auxiliary: bool = option(True, "auxiliary head after the second reduction cell (paper, evaluation)")
    auxiliary_weight: float = option(0.4, "weight of the auxiliary loss (paper, evaluation)", 0)
    drop_path: float = option(0.3, "drop-path rate towards which it rises linearly from 0 (paper, evaluation)", 0, 0.99)
    cutout: int = option(16, "side of the square cut out, at most half the picture's side (paper, evaluation)", 0)
    crop_padding: int = option(4, "random crop: zeros around the picture (official code)", 0, 1000)
    flip: bool = option(True, "random horizontal flip (official code)")
    dtype: str = option("float32", "float32, or bfloat16 for the maps (autocast)", choices=DTYPES)
    seed: int = option(0, "seed of everything random", 0, 2**63 - 1)
    deterministic: bool = option(False, "the same bits in every run on a GPU too, where this costs time")


# ----------------------------------------------------------------------------------------------------------------------
# Several processes: torchrun starts one for each GPU; each has the whole network and takes its part of every batch
# ----------------------------------------------------------------------------------------------------------------------


def processes() -> tuple[int, int]:
    """(rank of this process, number of processes): (0, 1) unless torch.distributed is initialised."""
    several = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if several else (0, 1)


def mean_over_processes(tensors):
    """Each tensor's mean over all processes, the same bits in every one of them."""
    _, count = processes()
    if count == 1:
        return tensors
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    parts = (flat / count).split([t.numel() for t in tensors])
    return [part.view_as(t) for part, t in zip(parts, tensors)]


def gather(value) -> list:
    """`value` of every process, by rank."""
    values = [value]
    if processes()[1] > 1:
        values = [None] * processes()[1]
        dist.all_gather_object(values, value)
    return values


def parallel(network, find_unused=False):
    """`network`, for several processes wrapped: all start from the first's weights and average the weights' gradients.

    Batch norms take the statistics of a process's own part of the batch, as the official code's do on several GPUs.
    """
    if processes()[1] == 1:
        return network
    return nn.parallel.DistributedDataParallel(network, find_unused_parameters=find_unused)


@contextlib.contextmanager
def _process_group(device: str):
    """Joins the other processes, if torchrun started several, and yields the device of this one."""
    if "LOCAL_RANK" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        yield device
        return
    on_gpu = device == "cuda" or device == "auto" and torch.cuda.is_available()
    if device.startswith("cuda:"):
        raise InputError(f"device is {device} for several processes; expected cuda, each gets its own, or cpu")
    if on_gpu:
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise InputError(
                f"process {local} of this machine has no GPU: there are {torch.cuda.device_count()}; expected "
                "--nproc-per-node no larger, or --device cpu"
            )
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    # gloo beside NCCL: what all processes agree on besides gradients does not wait for the GPU.
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(minutes=10))
    yield device
    dist.destroy_process_group()  # not after an error: the others may be gone


# ----------------------------------------------------------------------------------------------------------------------
# Operations
# ----------------------------------------------------------------------------------------------------------------------

PRIMITIVES = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)


class Operation(nn.Module):
    """Layers that end in a batch norm. `before_norm` stops short of it, so that a mixed operation can do the rest."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.op = nn.Sequential(*layers)

    @property
    def norm(self) -> nn.BatchNorm2d:
        return self.op[-1]

    def before_norm(self, x):
        for layer in itertools.islice(self.op, len(self.op) - 1):
            x = layer(x)
        return x

    def forward(self, x):
        return normalise(self.before_norm(x), self.norm)


class _Diagonals(torch.autograd.Function):
    """x[:, :, ::2, ::2] and x[:, :, 1::2, 1::2], whose gradients are written into one tensor, not two that are added.

    x: [N,C,H,W] -> two of [N,C,ceil(H/2),ceil(W/2)]. Deviation: at odd sizes the second gets a row or column of zeros,
    where the official code fails.
    """

    @staticmethod
    def forward(ctx, x):
        ctx.shape = x.shape
        odd = (0, x.shape[3] % 2, 0, x.shape[2] % 2)
        return x[:, :, ::2, ::2].clone(), F.pad(x[:, :, 1::2, 1::2], odd)

    @staticmethod
    def backward(ctx, first, second):
        _, _, h, w = ctx.shape
        memory_format = torch.contiguous_format if first.is_contiguous() else torch.channels_last
        gradient = torch.empty(ctx.shape, dtype=first.dtype, device=first.device, memory_format=memory_format)
        gradient.zero_()[:, :, ::2, ::2] = first
        gradient[:, :, 1::2, 1::2] = second[:, :, : h // 2, : w // 2]
        return gradient


class FactorizedReduce(nn.Module):
    """Halves height and width (rounding up): two 1x1 convolutions, the second shifted by one pixel."""

    def __init__(self, in_channels: int, out_channels: int, affine: bool):
        super().__init__()
        self.conv_1 = nn.Conv2d(in_channels, out_channels // 2, 1, bias=False)
        self.conv_2 = nn.Conv2d(in_channels, out_channels - out_channels // 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, affine=affine)

    @property
    def norm(self) -> nn.BatchNorm2d:
        return self.bn

    def before_norm(self, x):  # [N, C_in, H, W]
        # A convolution of stride 2 with a kernel of one pixel sees every second pixel.
        pairs = zip(_Diagonals.apply(x), (self.conv_1, self.conv_2))
        return torch.cat([separable(y, None, conv) for y, conv in pairs], dim=1)  # [N, C_out, ceil(H/2), ceil(W/2)]

    def forward(self, x):
        return normalise(self.before_norm(x), self.bn)


class SkipDropout(nn.Module):
    """Element-wise dropout after a skip-connect of stride 1 (paper, sec. 3.3), at a rate that can be set any time."""

    def __init__(self):
        super().__init__()
        self.rate = 0.0  # on the host, where it can be compared to 0 without waiting for a GPU
        # On the device, where a captured step (see CapturedStep) reads it anew.
        self.register_buffer("device_rate", torch.zeros(()), persistent=False)

    def set_rate(self, rate: float):
        self.rate = rate
        self.device_rate.fill_(rate)

    def forward(self, x):
        if not self.training or self.rate == 0:
            return x
        keep = torch.rand_like(x, dtype=torch.float32) >= self.device_rate
        return x * (keep / (1 - self.device_rate)).to(x.dtype)


class Zero(nn.Module):
    """`none`: the absence of an edge."""

    def __init__(self, stride: int):
        super().__init__()
        self.stride = stride

    def forward(self, x):
        return torch.zeros_like(x[:, :, :: self.stride, :: self.stride])


def is_fused(device: torch.device) -> bool:
    """Whether the kernels serve `device`; the first call builds them, see `pick_kernels`."""
    return fused is not None and fused.fused(device)


def separable(x, depthwise, pointwise, norm=None):
    """pointwise(depthwise(relu(norm(x)))), the one place for it; norm, depthwise: layers, or None where there is none.

    The fused version stores nothing of what lies between x and the result.
    """
    if norm is not None and (norm.affine or not is_fused(x.device)):
        x, norm = norm(x), None
    if not is_fused(x.device):
        x = F.relu(x)
        return pointwise(x if depthwise is None else depthwise(x))
    settings = {}
    if depthwise is not None:
        settings = {name: getattr(depthwise, name)[0] for name in ("stride", "padding", "dilation")}
    if norm is not None:
        if norm.training:
            norm.num_batches_tracked.add_(1)
        names = "running_mean", "running_var", "training", "momentum", "eps"
        settings |= {name: getattr(norm, name) for name in names}
    return fused.separable(x, None if depthwise is None else depthwise.weight, pointwise.weight, **settings)


class Separable(Operation):
    """One or two units of ReLU, depthwise convolution, pointwise convolution and batch norm."""

    def before_norm(self, x):
        layers, before = iter(self.op), None
        for _, depthwise, pointwise, norm in zip(layers, layers, layers, layers):
            x, before = separable(x, depthwise, pointwise, before), norm  # before: the norm of the unit before
        return x


class ReLUConv(Operation):
    """ReLU, pointwise convolution and batch norm."""

    def before_norm(self, x):
        return separable(x, None, self.op[1])


class MaxPool(nn.MaxPool2d):
    """Over 3x3 windows."""

    def __init__(self, stride: int):
        super().__init__(3, stride, padding=1)

    def forward(self, x):
        return fused.pool(x, "max", self.stride) if is_fused(x.device) else super().forward(x)


class AvgPool(nn.AvgPool2d):
    """Over 3x3 windows, of which only what lies in the picture counts."""

    def __init__(self, stride: int):
        super().__init__(3, stride, padding=1, count_include_pad=False)

    def forward(self, x):
        return fused.pool(x, "avg", self.stride) if is_fused(x.device) else super().forward(x)


def relu_conv_bn(in_channels, out_channels, affine):
    return ReLUConv(
        nn.ReLU(), nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels, affine=affine)
    )


def preprocess_0(in_channels, out_channels, reduction_before, affine):
    """For input 0 of a cell, whose maps are twice as high and wide as input 1's if the cell before is a reduction."""
    return (FactorizedReduce if reduction_before else relu_conv_bn)(in_channels, out_channels, affine)


def depthwise_separable(channels, size, stride, dilation, affine):
    """The unit of sep_conv and dil_conv: ReLU, depthwise convolution, pointwise convolution, batch norm."""
    padding = dilation * (size // 2)
    return (
        nn.ReLU(),
        nn.Conv2d(channels, channels, size, stride, padding, dilation, groups=channels, bias=False),
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels, affine=affine),
    )


def sep_conv(channels, size, stride, affine):
    return Separable(
        *depthwise_separable(channels, size, stride, 1, affine), *depthwise_separable(channels, size, 1, 1, affine)
    )


def dil_conv(channels, size, stride, affine):
    return Separable(*depthwise_separable(channels, size, stride, 2, affine))


def conv_7x1_1x7(channels, stride, affine):
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(channels, channels, (1, 7), stride=(1, stride), padding=(0, 3), bias=False),
        nn.Conv2d(channels, channels, (7, 1), stride=(stride, 1), padding=(3, 0), bias=False),
        nn.BatchNorm2d(channels, affine=affine),
    )


# name -> (channels C, stride, affine) -> module [N,C,H,W] -> [N,C,ceil(H/stride),ceil(W/stride)].
# The last two stand in published genotypes of other papers and are never searched.
OPERATIONS = {
    "none": lambda c, stride, affine: Zero(stride),
    "max_pool_3x3": lambda c, stride, affine: MaxPool(stride),
    "avg_pool_3x3": lambda c, stride, affine: AvgPool(stride),
    "skip_connect": lambda c, stride, affine: nn.Identity() if stride == 1 else FactorizedReduce(c, c, affine),
    "sep_conv_3x3": lambda c, stride, affine: sep_conv(c, 3, stride, affine),
    "sep_conv_5x5": lambda c, stride, affine: sep_conv(c, 5, stride, affine),
    "dil_conv_3x3": lambda c, stride, affine: dil_conv(c, 3, stride, affine),
    "dil_conv_5x5": lambda c, stride, affine: dil_conv(c, 5, stride, affine),
    "sep_conv_7x7": lambda c, stride, affine: sep_conv(c, 7, stride, affine),
    "conv_7x1_1x7": lambda c, stride, affine: conv_7x1_1x7(c, stride, affine),
}


# ----------------------------------------------------------------------------------------------------------------------
# The mixed operation, the cell and the search network (paper, sec. 3.1)
# ----------------------------------------------------------------------------------------------------------------------

NODES = 4
# (node, input) of each of the 14 edges: node i takes an edge from both inputs and from every earlier node.
EDGES = tuple((node, source) for node in range(NODES) for source in range(2 + node))


def mixed_norm_sum(outputs, norms, probabilities):
    """Eq. 1 of the paper: sum_k probabilities[k] * norms[k](outputs[k]), the one place where candidates are added up.

    The last batch norm of every candidate is part of it, so that the fused version need not store what it normalises.

    outputs: K tensors [N,C,H,W]; norms: K batch norms without affine parameters and else alike, or None for no norm;
    probabilities: [K], softmax(alpha). Returns [N,C,H,W].
    """
    if not is_fused(outputs[0].device):
        terms = zip(outputs, norms, probabilities, strict=True)
        return sum(p * (y if norm is None else norm(y)) for y, norm, p in terms)
    tracked = [norm for norm in norms if norm is not None]
    if not tracked:
        return fused.mixed_sum(outputs, probabilities)
    norm = tracked[0]
    if norm.training:
        torch._foreach_add_([norm.num_batches_tracked for norm in tracked], 1)
    means = [None if norm is None else norm.running_mean for norm in norms]
    variances = [None if norm is None else norm.running_var for norm in norms]
    return fused.mixed_norm_sum(outputs, probabilities, means, variances, norm.training, norm.momentum, norm.eps)


def normalise(x, norm):
    """norm(x), where possible as a mixed operation of one candidate: torch's own is less exact in channels-last."""
    if norm.affine or not is_fused(x.device):
        return norm(x)
    return mixed_norm_sum([x], [norm], x.new_ones(1))


class MixedOp(nn.Module):
    """An edge during the search: all its candidates at once, weighted by softmax(alpha) (paper, eq. 1)."""

    def __init__(self, candidates: tuple[str, ...], channels: int, stride: int):
        super().__init__()
        # `none`, always the first candidate, contributes exactly zero: only its place in the softmax matters.
        self.skipped = int(candidates[0] == "none" and len(candidates) > 1)
        self.ops = nn.ModuleList()
        for name in candidates[self.skipped :]:
            op = OPERATIONS[name](channels, stride, affine=False)
            if "pool" in name:
                op = Operation(op, nn.BatchNorm2d(channels, affine=False))
            elif isinstance(op, nn.Identity):
                op = SkipDropout()  # the rate is SearchNetwork.skip_dropout
            self.ops.append(op)

    def terms(self, x, probabilities):
        """What `mixed_norm_sum` adds up, of the candidates other than `none`. x: [N,C,H,W], probabilities: [K]."""
        normed = [isinstance(op, (Operation, FactorizedReduce)) for op in self.ops]
        outputs = [op.before_norm(x) if n else op(x) for op, n in zip(self.ops, normed)]
        return outputs, [op.norm if n else None for op, n in zip(self.ops, normed)], probabilities[self.skipped :]

    def forward(self, x, probabilities):
        return mixed_norm_sum(*self.terms(x, probabilities))


class SearchCell(nn.Module):
    """A cell of the search network: [N,C_0,H_0,W_0], [N,C_1,H,W] -> [N,4*C,H/stride,W/stride], stride 2 to reduce."""

    def __init__(self, candidates, channels_0, channels_1, channels, reduction, reduction_before):
        super().__init__()
        self.reduction = reduction
        self.preprocess0 = preprocess_0(channels_0, channels, reduction_before, affine=False)
        self.preprocess1 = relu_conv_bn(channels_1, channels, affine=False)
        self.edges = nn.ModuleList(
            MixedOp(names, channels, stride=2 if reduction and source < 2 else 1)
            for names, (_, source) in zip(candidates, EDGES, strict=True)
        )

    def forward(self, s0, s1, probabilities):  # softmax(alphas), [14, K]
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        for node in range(NODES):
            edges = zip(EDGES, self.edges, probabilities)
            incoming = [edge.terms(states[source], p) for (n, source), edge, p in edges if n == node]
            # A node is the sum of its edges, each of which is a sum over candidates: one sum.
            outputs, norms, ps = zip(*incoming)
            states.append(mixed_norm_sum(sum(outputs, []), sum(norms, []), torch.cat(ps)))
        return torch.cat(states[2:], dim=1)


class SearchNetwork(nn.Module):
    """The supernet of one stage: every edge holds all of its candidates.

    channels: C of the first cell; cells: L, at least 3; reduction cells at L//3 and (2L)//3 double C, halve the size.
    normal, reduce: the candidates of both kinds of cell, 14 tuples of K names in the order of PRIMITIVES.
    alphas_normal, alphas_reduce: parameters [14, K], shared by all cells of the kind, 1e-3 * N(0,1) at first.
    skip_dropout: rate of the element-wise dropout after stride-1 skip-connects (paper, sec. 3.3), can be set any time.
    stem_stride: 2 or more makes all cells work on smaller maps.
    forward: [N,in_channels,H,W] -> logits [N,num_classes].
    """

    def __init__(self, channels, num_classes, cells, normal, reduce, skip_dropout=0.0, in_channels=3, stem_stride=1):
        super().__init__()
        reductions = reduction_cells(cells)
        normal, reduce = _check_candidates(normal), _check_candidates(reduce)
        self.stem = _stem(in_channels, 3 * channels, stem_stride)
        channels_0, channels_1 = 3 * channels, 3 * channels
        reduction_before = False
        self.cells = nn.ModuleList()
        for i in range(cells):
            reduction = i in reductions
            channels *= 2 if reduction else 1
            candidates = reduce if reduction else normal
            self.cells.append(SearchCell(candidates, channels_0, channels_1, channels, reduction, reduction_before))
            channels_0, channels_1, reduction_before = channels_1, NODES * channels, reduction
        self.classifier = nn.Linear(channels_1, num_classes)
        self._weights = list(self.parameters())  # listed once: a walk through all modules takes milliseconds
        self.alphas_normal = nn.Parameter(1e-3 * torch.randn(len(EDGES), len(normal[0])))
        self.alphas_reduce = nn.Parameter(1e-3 * torch.randn(len(EDGES), len(reduce[0])))
        self.skip_dropout = skip_dropout

    @property
    def skip_dropout(self) -> float:
        return self._skip_dropout

    @skip_dropout.setter
    def skip_dropout(self, rate: float):
        self._skip_dropout = rate
        for module in self.modules():
            if isinstance(module, SkipDropout):
                module.set_rate(rate)

    def alphas(self) -> list[nn.Parameter]:
        return [self.alphas_normal, self.alphas_reduce]

    def weights(self) -> list[nn.Parameter]:
        return self._weights

    def forward(self, images):
        normal, reduce = self.alphas_normal.softmax(dim=1), self.alphas_reduce.softmax(dim=1)
        s0 = s1 = self.stem(images)
        if is_fused(images.device):
            s0 = s1 = s0.contiguous(memory_format=torch.channels_last)  # the fused convolutions' own
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1, reduce if cell.reduction else normal)
        return self.classifier(s1.mean(dim=(2, 3)))


def reduction_cells(cells: int) -> tuple[int, int]:
    """Where the two reduction cells of a network of `cells` cells stand."""
    if cells < 3:
        raise InputError(f"cells is {cells}; expected at least 3, two of them reduction cells")
    return cells // 3, 2 * cells // 3


def _stem(in_channels, channels, stride=1):
    return nn.Sequential(nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False), nn.BatchNorm2d(channels))


def _check_candidates(candidates):
    candidates = tuple(map(tuple, candidates))
    if len(candidates) != len(EDGES) or len({len(names) for names in candidates}) != 1:
        raise InputError(f"candidates have lengths {[len(c) for c in candidates]}; expected {len(EDGES)} equal ones")
    for names in candidates:
        if not names or names != tuple(p for p in PRIMITIVES if p in names):
            raise InputError(f"candidates {names}; expected one or more of {PRIMITIVES}, in this order")
    return candidates


# ----------------------------------------------------------------------------------------------------------------------
# From stage to stage: search space approximation (paper, sec. 3.2) and the skip dropout (sec. 3.3)
# ----------------------------------------------------------------------------------------------------------------------


def shrink(candidates, alphas, keep: int):
    """Search space approximation: the `keep` candidates of every edge with the largest softmax(alpha).

    candidates: 14 tuples of K names; alphas: [14, K]. Returns 14 tuples of `keep` names, order kept. Of two equal
    candidates the one that comes first is dropped. `none` competes like any other.
    """
    candidates = _check_candidates(candidates)
    if not 1 <= keep <= len(candidates[0]):
        raise InputError(f"keep is {keep}; expected 1 to {len(candidates[0])}, the candidates that there are")
    shrunk = []
    for names, probabilities in zip(candidates, _probabilities(candidates, alphas)):
        ranked = sorted(range(len(names)), key=lambda k: (probabilities[k], k))
        shrunk.append(tuple(names[k] for k in sorted(ranked[-keep:])))
    return tuple(shrunk)


def skip_dropout_rate(initial: float, epoch: int, epochs: int = 25, warmup: int = 10) -> float:
    """Dropout rate after skip-connects in `epoch` (from 0) of a stage that starts with `initial`.

    It falls linearly while only weights are trained, and starts again from `initial`, to decay exponentially, when
    alphas start to learn: skip-connects are blocked first and treated like the others later.
    """
    if epoch < warmup:
        return initial * (epochs - 1 - epoch) / epochs
    return initial * math.exp(-0.2 * (epoch - warmup))


def _probabilities(candidates, alphas) -> list[list[float]]:
    """softmax(alphas) as nested lists [14][K], checked against the candidates."""
    alphas = torch.as_tensor(alphas).detach()
    if alphas.shape != (len(candidates), len(candidates[0])):
        raise InputError(f"alphas have shape {list(alphas.shape)}; expected {[len(candidates), len(candidates[0])]}")
    probabilities = alphas.softmax(dim=1)
    if not probabilities.isfinite().all():
        raise InputError("alphas hold numbers that are not finite; expected finite ones (a lower alpha_lr may help)")
    return probabilities.tolist()


# ----------------------------------------------------------------------------------------------------------------------
# From alphas to the cell: derivation and architecture refinement (paper, sec. 3.3)
# ----------------------------------------------------------------------------------------------------------------------


class Genotype(NamedTuple):
    """The discrete cells. normal, reduce: (operation, input) pairs, two for each node; *_concat: states in the output.

    State 0 is the output of the cell before the last, 1 of the last, 2 and up are the cell's own nodes.
    """

    normal: list[tuple[str, int]]
    normal_concat: list[int]
    reduce: list[tuple[str, int]]
    reduce_concat: list[int]


def derive(normal, reduce, alphas_normal, alphas_reduce, max_skips: int | None = 2) -> Genotype:
    """The cell that candidates (14 tuples of K names) and alphas ([14, K]) stand for.

    Every edge takes its strongest candidate other than `none`; every node keeps its two strongest edges. The normal
    cell keeps at most `max_skips` (M) skip-connects; None: no limit. InputError if an edge allows nothing else.
    """
    normal, reduce = _check_candidates(normal), _check_candidates(reduce)
    probabilities = _probabilities(normal, alphas_normal)
    cell = _strongest(normal, probabilities)
    while max_skips is not None and sum(name == "skip_connect" for name, *_ in cell) > max_skips:
        # Architecture refinement: without the weakest kept skip-connect, candidates *and* edges are chosen again.
        # Another edge may come in and bring its own skip-connect, hence the loop.
        probability, edge = min((p, edge) for name, edge, p in cell if name == "skip_connect")
        if probability < 0:
            raise InputError(f"edge {edge} has no candidate but skip_connect; no normal cell has max_skips={max_skips}")
        probabilities[edge][normal[edge].index("skip_connect")] = -1.0  # less than any other
        cell = _strongest(normal, probabilities)
    reduce_cell = _strongest(reduce, _probabilities(reduce, alphas_reduce))
    concat = list(range(2, 2 + NODES))
    pairs = [[(name, EDGES[edge][1]) for name, edge, _ in c] for c in (cell, reduce_cell)]
    return Genotype(pairs[0], concat, pairs[1], list(concat))


def _strongest(candidates, probabilities):
    """(operation, edge, probability) of the two strongest edges into each node, in the order of the edges."""
    chosen = []
    for edge, (names, p) in enumerate(zip(candidates, probabilities)):
        allowed = [k for k, name in enumerate(names) if name != "none"]
        if not allowed:
            raise InputError(f"edge {edge} has no candidate but none; expected an operation to choose")
        best = max(allowed, key=lambda k: (p[k], k))  # ties: the lowest index counts as the minimum
        chosen.append((names[best], edge, p[best]))
    kept = []
    for node in range(NODES):
        incoming = [c for c in chosen if EDGES[c[1]][0] == node]
        two = sorted(incoming, key=lambda c: (c[2], c[1]))[-2:]  # ties: the later predecessor is kept
        kept += sorted(two, key=lambda c: c[1])
    return kept


# ----------------------------------------------------------------------------------------------------------------------
# The architect: one step of the alphas (DARTS, sec. 2.3)
# ----------------------------------------------------------------------------------------------------------------------


def require_gradients(network: SearchNetwork, weights: bool, alphas: bool):
    """What the next backward pass computes: an alpha step needs no weight gradients, nor the other way round."""
    for p in network.weights():
        p.requires_grad_(weights)
    for p in network.alphas():
        p.requires_grad_(alphas)


def _fork_rng():
    """A block after which torch's random state is what it was."""
    return torch.random.fork_rng(devices=range(torch.cuda.device_count()))


def autocast(device, dtype: str):
    """A block in which maps have `dtype`; weights, statistics and losses stay float32."""
    return torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32")


def classify(network, images, labels, dtype: str = "float32"):
    """(loss, logits) of a batch, see `autocast`."""
    with autocast(images.device, dtype):
        logits = network(images)
        return F.cross_entropy(logits, labels), logits


class Architect:
    """Updates the alphas of a SearchNetwork to lower the loss on pictures that the weights do not learn from, by Adam.

    The betas of Adam are DARTS's. First order by default: the gradient at the present weights. `unrolled`: DARTS's
    second order, the gradient at the weights after one more step of `weight_optimizer` (SGD with momentum and weight
    decay). Weights and optimizer are left unchanged; running statistics of batch norms see the additional forward
    passes.
    """

    difference = 0.01  # length of the finite difference in the second order (DARTS, sec. 2.3)

    def __init__(
        self,
        network,
        lr=6e-4,
        betas=(0.5, 0.999),
        weight_decay=1e-3,
        clip=5.0,
        unrolled=False,
        weight_optimizer=None,
        dtype="float32",
        captured=False,
    ):
        if unrolled and weight_optimizer is None:
            raise InputError("unrolled is True without a weight_optimizer; expected the SGD optimizer of the weights")
        self.network, self.clip, self.unrolled, self.weight_optimizer = network, clip, unrolled, weight_optimizer
        self.dtype = dtype
        # To be captured, its count of steps must lie on the device, which Adam refuses on a CPU.
        self.optimizer = torch.optim.Adam(
            network.alphas(),
            lr,
            betas,
            weight_decay=weight_decay,
            capturable=captured and network.alphas_normal.is_cuda,
        )

    def step(self, images, labels, train_images=None, train_labels=None):
        """One update from a batch of the alphas' half of the data; returns its loss and logits before the update.

        train_images, train_labels: a batch of the weights' half, needed by the second order only.
        """
        if self.unrolled:
            loss, logits, gradients = self._second_order(images, labels, train_images, train_labels)
        else:
            require_gradients(self.network, weights=False, alphas=True)
            loss, logits = classify(self.network, images, labels, self.dtype)
            gradients = mean_over_processes(torch.autograd.grad(loss, self.network.alphas()))
        for alpha, gradient in zip(self.network.alphas(), gradients):
            alpha.grad = gradient
        nn.utils.clip_grad_norm_(self.network.alphas(), self.clip)
        self.optimizer.step()
        return loss.detach(), logits.detach()

    def _second_order(self, images, labels, train_images, train_labels):
        """DARTS, eq. 7 and 8, with grad the gradient for alpha:

            grad L_val(w', alpha) - lr * (grad L_train(w+, alpha) - grad L_train(w-, alpha)) / (2 eps)

        where w' = w - lr * (momentum + grad_w L_train + decay * w) and w+- = w +- eps * grad_w' L_val(w', alpha).
        """
        weights, alphas = self.network.weights(), self.network.alphas()
        group = self.weight_optimizer.param_groups[0]
        lr = group["lr"]
        require_gradients(self.network, weights=True, alphas=True)
        start = [w.detach().clone() for w in weights]

        def move_to(points):
            with torch.no_grad():
                for w, point in zip(weights, points):
                    w.copy_(point)

        try:
            loss, _ = classify(self.network, train_images, train_labels, self.dtype)
            gradients = mean_over_processes(torch.autograd.grad(loss, weights))
            unrolled = []
            for w, w_start, gradient in zip(weights, start, gradients):
                momentum = self.weight_optimizer.state.get(w, {}).get("momentum_buffer")
                step = gradient + group["weight_decay"] * w_start
                unrolled.append(w_start - lr * (step if momentum is None else step + group["momentum"] * momentum))
            move_to(unrolled)
            loss, logits = classify(self.network, images, labels, self.dtype)
            gradients = mean_over_processes(torch.autograd.grad(loss, [*weights, *alphas]))
            *gradients, direct_normal, direct_reduce = gradients

            eps = self.difference / torch.stack([g.norm() for g in gradients]).norm().clamp_min(1e-30)
            require_gradients(self.network, weights=False, alphas=True)
            sides = []
            for sign in (1, -1):
                move_to([w + sign * eps * g for w, g in zip(start, gradients)])
                with _fork_rng():  # the same dropout on both sides, or its noise would drown the difference
                    train_loss, _ = classify(self.network, train_images, train_labels, self.dtype)
                sides.append(mean_over_processes(torch.autograd.grad(train_loss, alphas)))
        finally:
            move_to(start)
        implicit = [(plus - minus) / (2 * eps) for plus, minus in zip(*sides)]
        return loss, logits, [d - lr * i for d, i in zip((direct_normal, direct_reduce), implicit)]


# ----------------------------------------------------------------------------------------------------------------------
# The search (paper, sec. 3.2)
# ----------------------------------------------------------------------------------------------------------------------


class Stage(NamedTuple):
    """What a stage searched: candidates (14 tuples) and alphas [14, K] of both kinds of cell, and the test accuracy."""

    normal: tuple
    reduce: tuple
    alphas_normal: torch.Tensor
    alphas_reduce: torch.Tensor
    test_accuracy: float

    def genotype(self, max_skips: int | None) -> Genotype:
        return derive(self.normal, self.reduce, self.alphas_normal, self.alphas_reduce, max_skips)


class SearchResult(NamedTuple):
    genotype: Genotype
    stages: list[Stage]


def cosine(lr: float, epoch: int, epochs: int) -> float:
    """The learning rate of `epoch` (from 0), falling from `lr` towards 0."""
    return lr * (1 + math.cos(math.pi * epoch / epochs)) / 2


def sgd(parameters, config, captured=False) -> torch.optim.SGD:
    """The weights' optimizer; if `captured`, its learning rate lies on the device, where the step reads it anew."""
    device = parameters[0].device
    lr = torch.tensor(config.lr, device=device) if captured else config.lr
    has_fused = device.type in ("cpu", "cuda")
    return torch.optim.SGD(parameters, lr, config.momentum, weight_decay=config.weight_decay, fused=has_fused)


def set_lr(optimizer, lr: float):
    """In the tensor that holds the rate, if there is one: see `sgd`."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def train_step(parameters, optimizer, loss, clip):
    """One step of the weights down the clipped gradient of `loss`."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, clip)
    optimizer.step()


@torch.no_grad()
def accuracy(network, pictures: Pictures, limit: int | None = None, batch: int = 256) -> float:
    """Of the first `limit` test pictures (None: all), the part that `network` classifies right in evaluation mode."""
    rank, count = processes()
    x_test, y_test = pictures.x_test[:limit], pictures.y_test[:limit]
    was_training = network.training
    network.eval()
    correct = 0
    for x, y in zip(x_test[rank::count].split(batch), y_test[rank::count].split(batch)):
        correct += int((network(pictures.normalise(x)).argmax(1) == y).sum())
    network.train(was_training)
    return sum(gather(correct)) / len(y_test)


def search(
    config: SearchConfig,
    pictures: Pictures | None = None,
    out=None,
    device: str = "auto",
    kernels: str | None = None,
    graphs: bool = True,
    resume=None,
    show: bool = False,
) -> SearchResult:
    """The progressive search: stage after stage a deeper network with fewer candidates, then the cell.

    pictures: by default those that `config.dataset` names. out: a new or empty folder for the results, or None.
    kernels: "auto", "on" or "off", or None, see `pick_kernels`. graphs: capture steps on a GPU, see `CapturedStep`.
    resume: instead of `out`, the folder of a run to go on with, see `Run`. show: print progress.
    SIGINT and SIGTERM raise `Stopped`, once the state is saved. The random state of the caller is left as it was.
    """
    Folder(Run.path(out, resume), resume is not None)  # is refused before anything that takes time
    device = pick_device(device)
    uses_kernels = pick_kernels(kernels, device)
    pictures = pictures or load(config.dataset)
    pictures = pictures.first(config.pictures)
    half = len(pictures.y_train) // 2
    check_batch(config.batch, half)
    if not torch.isin(*pictures.y_train.tensor_split([half])).any():
        raise InputError(f"{pictures.name}: the halves of y_train share no class; expected them shuffled, not sorted")
    run = Run("search", config, pictures, device, out, resume, kernels="fused" if uses_kernels else "plain")
    pictures = pictures.to(device)
    progress = Progress([_work(config, number, config.epochs) * half for number in range(len(config.cells))], show)
    stages = []
    if run.state:
        stages = [Stage(*stage) for stage in run.state["stages"]]
        done = [_work(config, number, config.epochs) for number in range(len(stages))]
        progress.resume((sum(done) + _work(config, len(stages), run.state["epoch"])) * half)
    with _fork_rng(), _deterministic(config.deterministic), run.stoppable():
        # The first process's random state is that of a run on its own; each has its own dropout.
        torch.manual_seed((config.seed + processes()[0]) % 2**63)
        generator = torch.Generator(device).manual_seed(config.seed)  # of batches and augmentation, the same for all
        for number in range(len(stages), len(config.cells)):
            normal = reduce = (PRIMITIVES,) * len(EDGES)
            if stages:
                normal = shrink(stages[-1].normal, stages[-1].alphas_normal, config.candidates[number])
                reduce = shrink(stages[-1].reduce, stages[-1].alphas_reduce, config.candidates[number])
            stages.append(_search_stage(config, stages, normal, reduce, pictures, generator, run, progress, graphs))
            cell = stages[-1].genotype(config.max_skips)
            run.folder.write(f"stages/{number + 1}/genotype.json", cell._asdict())
            run.folder.draw(cell, f"stages/{number + 1}/")

    genotype = stages[-1].genotype(config.max_skips)
    others = {str(m): stages[-1].genotype(m)._asdict() for m in range(2 * NODES + 1)}
    unrestricted = stages[-1].genotype(None)._asdict()
    run.folder.draw(genotype)
    run.folder.write(
        "genotype.json",
        {**genotype._asdict(), "max_skips": config.max_skips, "unrestricted": unrestricted, "by_max_skips": others},
    )
    return SearchResult(genotype, stages)


def _work(config, number, epochs) -> float:
    """What the first `epochs` epochs of a stage take, for each picture of a half; one with alphas counts twice."""
    return config.cells[number] * config.candidates[number] * (epochs + max(0, epochs - config.warmup))


def _search_stage(config, stages, normal, reduce, pictures, generator, run, progress, graphs) -> Stage:
    """One stage: new weights, new alphas, new optimizers; only the candidates come from the stages before.

    It goes on from what `run` holds, if that is of this stage, and saves there after every epoch.
    """
    number, device, in_channels = len(stages), pictures.x_train.device, pictures.x_train.shape[1]
    rank, count = processes()
    network = SearchNetwork(
        config.channels,
        pictures.num_classes,
        config.cells[number],
        normal,
        reduce,
        in_channels=in_channels,
        stem_stride=config.stem_stride,
    ).to(device)
    weights = network.weights()
    captured = graphs and CapturedStep.serves(device, config)
    optimizer = sgd(weights, config, captured)
    architect = Architect(
        network,
        config.alpha_lr,
        weight_decay=config.alpha_weight_decay,
        clip=config.clip,
        unrolled=config.unrolled,
        weight_optimizer=optimizer,
        dtype=config.dtype,
        captured=captured,
    )
    require_gradients(network, weights=True, alphas=False)  # the architect averages the alphas' gradients itself
    trained = parallel(network)
    # The first half of the training pictures trains the weights, the second the alphas.
    halves = torch.arange(len(pictures.x_train), device=device).tensor_split([len(pictures.x_train) // 2])

    def augmented(indices):
        """This process's part of a batch. Its augmentation does not depend on the number of processes."""
        x = pictures.augment(pictures.x_train[indices], config.crop_padding, config.flip, 0, generator)
        return x[rank::count], pictures.y_train[indices][rank::count]

    def step(weight_batch, alpha_batch=None):
        """A step of the alphas, if there is a batch for it, and one of the weights.

        Returns loss and number of right answers of the step of the weights, then of that of the alphas.
        """
        images, labels = augmented(weight_batch)
        results = []
        if alpha_batch is not None:
            alpha_images, alpha_labels = augmented(alpha_batch)
            loss, logits = architect.step(alpha_images, alpha_labels, images, labels)
            results += [loss, (logits.argmax(1) == alpha_labels).sum()]
        require_gradients(network, weights=True, alphas=False)
        loss, logits = classify(trained, images, labels, config.dtype)
        train_step(weights, optimizer, loss, config.clip)
        return [loss.detach(), (logits.argmax(1) == labels).sum(), *results]

    if captured:
        step = CapturedStep(step, generator)

    parts = {"network": network, "weights": optimizer, "alphas": architect.optimizer}
    first_epoch, interrupted = run.restore(parts, generator)
    for epoch in range(first_epoch, config.epochs):
        started, seen = time.monotonic(), 0
        learn_alphas = epoch >= config.warmup
        lr = cosine(config.lr, epoch, config.epochs)
        set_lr(optimizer, lr)
        network.skip_dropout = skip_dropout_rate(config.skip_dropout[number], epoch, config.epochs, config.warmup)
        label = f"stage {number + 1}/{len(config.cells)}  epoch {epoch:2d}/{config.epochs - 1}"
        where = f"stage {number + 1}, epoch {epoch}"
        meter, alpha_meter = Meter("training loss", where), Meter("alpha loss", where)
        if interrupted:
            weight_batches, alpha_batches = interrupted["batches"]
            of_weights, of_alphas = interrupted["meters"][rank]
            meter.restore(of_weights), alpha_meter.restore(of_alphas)
            interrupted = None
        else:
            weight_batches, alpha_batches = (batches(half, config.batch, generator) for half in halves)
        for i in range(len(meter.sizes), len(weight_batches)):
            weight_batch, alpha_batch = (b[i % len(b)].to(device) for b in (weight_batches, alpha_batches))
            if learn_alphas:
                loss, correct, alpha_loss, alpha_correct = step(weight_batch, alpha_batch)
                alpha_meter.update(alpha_loss, alpha_correct, len(alpha_batch) // count)
            else:
                loss, correct = step(weight_batch)
            meter.update(loss, correct, len(weight_batch) // count)
            seen += len(weight_batch)
            work = config.cells[number] * config.candidates[number] * len(weight_batch) * (1 + learn_alphas)
            text = f"{label}  step {i + 1}/{len(weight_batches)}"
            progress.step(number, text, work, meter, seen / (time.monotonic() - started))
            if signal_number := run.asked_to_stop():
                meters = gather((meter.state(), alpha_meter.state()))
                interrupted = {"batches": (weight_batches, alpha_batches), "meters": meters}
                run.share_buffers(network)
                run.save(parts, generator, epoch, interrupted, stages=[tuple(stage) for stage in stages])
                raise Stopped(signal_number)

        loss, train_accuracy = meter.result()
        alpha_loss, alpha_accuracy = alpha_meter.result()
        last = epoch == config.epochs - 1
        run.share_buffers(network)
        record = {
            "stage": number + 1,
            "epoch": epoch,
            "train_loss": loss,
            "train_accuracy": train_accuracy,
            "alpha_loss": alpha_loss,
            "alpha_accuracy": alpha_accuracy,
            "test_accuracy": accuracy(network, pictures, len(pictures.x_train)) if last else None,  # only reported
            "lr": lr,
            "skip_dropout": network.skip_dropout,
            "softmax_alphas_normal": network.alphas_normal.detach().softmax(1).tolist(),
            "softmax_alphas_reduce": network.alphas_reduce.detach().softmax(1).tolist(),
        }
        seconds = time.monotonic() - started
        run.add(record, seconds)
        run.check_agreement(network.alphas(), normal, reduce)
        run.save(parts, generator, epoch + 1, stages=[tuple(stage) for stage in stages])
        text = f"{label}  loss {loss:.3f}  acc {train_accuracy:6.1%}"
        text += f"  alphas: loss {alpha_loss:.3f}  acc {alpha_accuracy:6.1%}" if learn_alphas else "  weights only"
        text += f"  test acc {record['test_accuracy']:6.1%}" if last else ""
        progress.line(f"{text}  {seconds:.1f} s")
    alphas = [alpha.detach().cpu() for alpha in network.alphas()]
    return Stage(normal, reduce, *alphas, json.loads(run.log[-1])["test_accuracy"])


# ----------------------------------------------------------------------------------------------------------------------
# The evaluation network (paper, sec. 4) and published cells
# ----------------------------------------------------------------------------------------------------------------------


class Cell(nn.Module):
    """A cell of the evaluation network, made of the operations of a genotype."""

    def __init__(self, pairs, concat, channels_0, channels_1, channels, reduction, reduction_before):
        super().__init__()
        self.preprocess0 = preprocess_0(channels_0, channels, reduction_before, affine=True)
        self.preprocess1 = relu_conv_bn(channels_1, channels, affine=True)
        self.concat, self.sources = concat, [source for _, source in pairs]
        self._ops = nn.ModuleList(
            OPERATIONS[name](channels, 2 if reduction and source < 2 else 1, affine=True) for name, source in pairs
        )

    def forward(self, s0, s1, rate):  # of drop-path
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        for first in range(0, len(self._ops), 2):  # two operations per node
            inputs = []
            for op, source in zip(self._ops[first : first + 2], self.sources[first : first + 2]):
                x = op(states[source])
                if self.training and rate > 0 and not isinstance(op, nn.Identity):
                    x = drop_path(x, rate)
                inputs.append(x)
            states.append(sum(inputs))
        return torch.cat([states[i] for i in self.concat], dim=1)


def drop_path(x, rate: float):
    """Drop-path: zeroes whole samples of x [N,C,H,W] with probability `rate` and rescales the others."""
    keep = torch.rand(len(x), 1, 1, 1, device=x.device) >= rate
    return x * keep / (1 - rate)


class PoolTo2x2(nn.Module):
    """Average pooling to 2x2 with overlap. At 8x8 and 7x7 exactly the official heads' 5x5 windows, stride 3 and 2."""

    def forward(self, x):
        windows = [min(math.ceil(5 * size / 8), size - 1) for size in x.shape[2:]]
        return F.avg_pool2d(x, windows, stride=[size - window for size, window in zip(x.shape[2:], windows)])


class AuxiliaryHead(nn.Module):
    """A classifier after two thirds of the cells, for the training only.

    [N,C,H,W], H and W at least 2 -> logits [N,num_classes].
    """

    def __init__(self, channels, num_classes):
        super().__init__()
        self.features = nn.Sequential(
            nn.ReLU(),
            PoolTo2x2(),
            nn.Conv2d(channels, 128, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.Conv2d(128, 768, 2, bias=False),
            nn.BatchNorm2d(768),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(768, num_classes)

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


class Network(nn.Module):
    """The network of a genotype, with the official networks' state_dict keys and shapes.

    stem: "cifar" (one 3x3 convolution) or "imagenet" (three of stride 2). forward: [N,in_channels,H,W] -> logits
    [N,num_classes]; in training a pair of logits and auxiliary logits (None unless `auxiliary`).
    drop_path: the rate at which operations other than identities lose a sample, can be set any time.
    """

    def __init__(self, genotype, channels, num_classes, cells, auxiliary=False, stem="cifar", in_channels=3):
        super().__init__()
        reductions = reduction_cells(cells)
        genotype = check_genotype(genotype)
        self.drop_path = 0.0
        if stem == "cifar":
            self.stem = _stem(in_channels, 3 * channels)
            channels_0, channels_1, reduction_before = 3 * channels, 3 * channels, False
        elif stem == "imagenet":
            half = channels // 2
            self.stem0 = nn.Sequential(
                nn.Conv2d(in_channels, half, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(half),
                nn.ReLU(),
                nn.Conv2d(half, channels, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(channels),
            )
            self.stem1 = nn.Sequential(
                nn.ReLU(),
                nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(channels),
            )
            channels_0, channels_1, reduction_before = channels, channels, True
        else:
            raise InputError(f"stem is {stem!r}; expected 'cifar' or 'imagenet'")
        self.cells = nn.ModuleList()
        self.auxiliary_head, self.auxiliary_cell = None, reductions[1]
        for i in range(cells):
            reduction = i in reductions
            channels *= 2 if reduction else 1
            pairs, concat = genotype[2:] if reduction else genotype[:2]
            self.cells.append(Cell(pairs, concat, channels_0, channels_1, channels, reduction, reduction_before))
            channels_0, channels_1, reduction_before = channels_1, len(concat) * channels, reduction
            if auxiliary and i == self.auxiliary_cell:
                self.auxiliary_head = AuxiliaryHead(channels_1, num_classes)
        self.classifier = nn.Linear(channels_1, num_classes)

    def forward(self, images):
        if hasattr(self, "stem"):
            s0 = s1 = self.stem(images)
        else:
            s0 = self.stem0(images)
            s1 = self.stem1(s0)
        auxiliary_logits = None
        for i, cell in enumerate(self.cells):
            s0, s1 = s1, cell(s0, s1, self.drop_path)
            if i == self.auxiliary_cell and self.training and self.auxiliary_head is not None:
                auxiliary_logits = self.auxiliary_head(s1)
        logits = self.classifier(s1.mean(dim=(2, 3)))
        return (logits, auxiliary_logits) if self.training else logits


class Count(NamedTuple):
    """What a network costs, the auxiliary head aside."""

    parameters: int
    multiply_adds: int


def count(network: Network, size: int | tuple[int, int] = 32, in_channels: int = 3) -> Count:
    """Parameters, and multiply-adds of the convolutions and the classifier for one picture of `size` (H, or (H, W))."""
    height, width = (size, size) if isinstance(size, int) else size
    multiply_adds = 0

    def add(module, _, output):
        nonlocal multiply_adds
        # One output value takes as many multiply-adds as one output channel has weights.
        multiply_adds += output.numel() * module.weight[0].numel()

    layers = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    hooks = [layer.register_forward_hook(add) for layer in layers]
    was_training = network.training
    mode = fused and fused.use("off")  # fused, the layers would not be called
    try:
        with torch.no_grad():
            network.eval()(next(network.parameters()).new_zeros(1, in_channels, height, width))
    finally:
        network.train(was_training)
        if fused:
            fused.use(mode)
        for hook in hooks:
            hook.remove()
    named = network.named_parameters()
    return Count(sum(p.numel() for name, p in named if not name.startswith("auxiliary_head.")), multiply_adds)


def _pairs(text: str) -> list[tuple[str, int]]:
    """'skip_connect 0, sep_conv_3x3 1 | ...' -> [('skip_connect', 0), ('sep_conv_3x3', 1), ...]"""
    pairs = (pair.split() for pair in text.replace("|", ",").split(","))
    return [(name, int(source)) for name, source in pairs]


GENOTYPES = {
    "PDARTS": Genotype(
        _pairs(
            "skip_connect 0, dil_conv_3x3 1 | skip_connect 0, sep_conv_3x3 1 | "
            "sep_conv_3x3 1, sep_conv_3x3 3 | sep_conv_3x3 0, dil_conv_5x5 4"
        ),
        [2, 3, 4, 5],
        _pairs(
            "avg_pool_3x3 0, sep_conv_5x5 1 | sep_conv_3x3 0, dil_conv_5x5 2 | "
            "max_pool_3x3 0, dil_conv_3x3 1 | dil_conv_3x3 1, dil_conv_5x5 3"
        ),
        [2, 3, 4, 5],
    ),
    "DARTS_V1": Genotype(
        _pairs(
            "sep_conv_3x3 1, sep_conv_3x3 0 | skip_connect 0, sep_conv_3x3 1 | "
            "skip_connect 0, sep_conv_3x3 1 | sep_conv_3x3 0, skip_connect 2"
        ),
        [2, 3, 4, 5],
        _pairs(
            "max_pool_3x3 0, max_pool_3x3 1 | skip_connect 2, max_pool_3x3 0 | "
            "max_pool_3x3 0, skip_connect 2 | skip_connect 2, avg_pool_3x3 0"
        ),
        [2, 3, 4, 5],
    ),
    "DARTS_V2": Genotype(
        _pairs(
            "sep_conv_3x3 0, sep_conv_3x3 1 | sep_conv_3x3 0, sep_conv_3x3 1 | "
            "sep_conv_3x3 1, skip_connect 0 | skip_connect 0, dil_conv_3x3 2"
        ),
        [2, 3, 4, 5],
        _pairs(
            "max_pool_3x3 0, max_pool_3x3 1 | skip_connect 2, max_pool_3x3 1 | "
            "max_pool_3x3 0, skip_connect 2 | skip_connect 2, max_pool_3x3 1"
        ),
        [2, 3, 4, 5],
    ),
    "NASNet": Genotype(
        _pairs(
            "sep_conv_5x5 1, sep_conv_3x3 0 | sep_conv_5x5 0, sep_conv_3x3 0 | avg_pool_3x3 1, skip_connect 0 | "
            "avg_pool_3x3 0, avg_pool_3x3 0 | sep_conv_3x3 1, skip_connect 1"
        ),
        [2, 3, 4, 5, 6],
        _pairs(
            "sep_conv_5x5 1, sep_conv_7x7 0 | max_pool_3x3 1, sep_conv_7x7 0 | avg_pool_3x3 1, sep_conv_5x5 0 | "
            "skip_connect 3, avg_pool_3x3 2 | sep_conv_3x3 2, max_pool_3x3 1"
        ),
        [4, 5, 6],
    ),
    "AmoebaNet": Genotype(
        _pairs(
            "avg_pool_3x3 0, max_pool_3x3 1 | sep_conv_3x3 0, sep_conv_5x5 2 | sep_conv_3x3 0, avg_pool_3x3 3 | "
            "sep_conv_3x3 1, skip_connect 1 | skip_connect 0, avg_pool_3x3 1"
        ),
        [4, 5, 6],
        _pairs(
            "avg_pool_3x3 0, sep_conv_3x3 1 | max_pool_3x3 0, sep_conv_7x7 2 | sep_conv_7x7 0, avg_pool_3x3 1 | "
            "max_pool_3x3 0, max_pool_3x3 1 | conv_7x1_1x7 0, sep_conv_3x3 5"
        ),
        [3, 4, 6],
    ),
}


MAX_NODES = 100  # of a cell; published ones have 4 or 5


def check_genotype(genotype, name="genotype") -> Genotype:
    """`genotype` in its canonical types, or an InputError that says which entry is wrong."""
    if not isinstance(genotype, Genotype):
        raise InputError(f"{name} is a {type(genotype).__name__}; expected a Genotype, such as GENOTYPES['PDARTS']")
    cells = []
    for kind in ("normal", "reduce"):
        pairs, concat = getattr(genotype, kind), getattr(genotype, f"{kind}_concat")
        if not isinstance(pairs, (list, tuple)) or not pairs or len(pairs) % 2:
            raise InputError(
                f"{name}: {kind} must be a list of (operation, input) pairs, two for each node; got {_short(pairs)}"
            )
        if len(pairs) > 2 * MAX_NODES:
            raise InputError(f"{name}: {kind} has {len(pairs) // 2} nodes; expected at most {MAX_NODES}")
        for i, pair in enumerate(pairs):
            where = f"{name}: {kind}[{i}]"
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise InputError(f"{where} is {_short(pair)}; expected an (operation, input) pair")
            operation, source = pair
            if not isinstance(operation, str) or operation not in OPERATIONS:
                raise InputError(
                    f"{where} has unknown operation {_short(operation)}; expected one of {', '.join(OPERATIONS)}"
                )
            if type(source) is not int or not 0 <= source < 2 + i // 2:
                raise InputError(f"{where} has input {_short(source)}; node {i // 2} can take 0 to {1 + i // 2}")
        states = range(2, 2 + len(pairs) // 2)
        if (
            not isinstance(concat, (list, tuple, range))
            or not concat
            or any(type(s) is not int or s not in states for s in concat)
            or len(set(concat)) < len(concat)
        ):
            raise InputError(
                f"{name}: {kind}_concat is {_short(concat)}; expected states from {states[0]} to {states[-1]} once"
            )
        cells += [[(operation, source) for operation, source in pairs], list(concat)]
    return Genotype(*cells)


def read_genotype(source: str) -> Genotype:
    """A name from GENOTYPES, or a JSON file with the fields of Genotype, such as the genotype.json of a search."""
    if source in GENOTYPES:
        return GENOTYPES[source]
    path = pathlib.Path(source)
    if not path.is_file():
        raise InputError(f"no genotype {source!r}; expected a file or one of {', '.join(GENOTYPES)}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source} is not valid JSON ({error}); expected a genotype.json") from None
    if not isinstance(content, dict) or not set(Genotype._fields) <= content.keys():
        raise InputError(f"{source} is not a genotype; expected an object with {', '.join(Genotype._fields)}")
    return check_genotype(Genotype(*(content[field] for field in Genotype._fields)), source)


# ----------------------------------------------------------------------------------------------------------------------
# The evaluation (paper, sec. 4)
# ----------------------------------------------------------------------------------------------------------------------


class EvaluateResult(NamedTuple):
    network: Network
    cost: Count
    test_error: float


def evaluate(
    genotype: Genotype,
    config: EvaluateConfig,
    pictures: Pictures | None = None,
    out=None,
    device: str = "auto",
    weights=None,
    resume=None,
    show: bool = False,
    kernels: str | None = None,
) -> EvaluateResult:
    """Trains the network of a cell from scratch and tests it; with `weights`, a file of its state_dict, only tests.

    pictures, out, device, resume, show, kernels: as for `search`.
    """
    if weights is None:
        Folder(Run.path(out, resume), resume is not None)  # is refused before anything that takes time
    device = pick_device(device)
    uses_kernels = pick_kernels(kernels, device)
    genotype = check_genotype(genotype)
    pictures = pictures or load(config.dataset)
    pictures = pictures.first(config.pictures)
    _, in_channels, *size = pictures.x_train.shape
    run = None
    if weights is None:
        check_batch(config.batch, len(pictures.x_train))
        used = "fused" if uses_kernels else "plain"
        run = Run("evaluate", config, pictures, device, out, resume, genotype=genotype._asdict(), kernels=used)
        run.folder.write("genotype.json", genotype._asdict())
    pictures = pictures.to(device)
    with _fork_rng(), _deterministic(config.deterministic):
        torch.manual_seed((config.seed + processes()[0]) % 2**63)
        network = Network(
            genotype, config.channels, pictures.num_classes, config.cells, config.auxiliary, in_channels=in_channels
        ).to(device)
        cost = count(network, tuple(size), in_channels)
        if weights is not None:
            load_weights(network, weights, device)
        else:
            with run.stoppable():
                _train(network, config, pictures, run, show)
        network.eval()
        return EvaluateResult(network, cost, 1 - accuracy(network, pictures))


def load_weights(network: Network, path, device):
    """Loads a state_dict, the auxiliary head's part of which is optional; an InputError says what does not fit."""
    try:
        if zipfile.is_zipfile(path):  # torch's format since 1.6
            _check_zip(path, sums=True)  # torch does not compare them
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd files, which are used or refused
            state = torch.load(path, map_location=device, weights_only=True)
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}")
        if not any(key.startswith("auxiliary_head.") for key in state):
            network.auxiliary_head = None
        without_head = network.auxiliary_head is None
        state = {key: value for key, value in state.items() if not (without_head and key.startswith("auxiliary_head."))}
        wrong = [key for key, value in state.items() if isinstance(value, torch.Tensor) and value.is_complex()]
        if wrong:
            raise ValueError(f"{wrong[0]} is complex")
        network.load_state_dict(state)
    except Exception as error:  # whatever a damaged file leads to
        raise InputError(
            f"cannot use the weights {path} ({_reason(error)}); expected a state_dict of this network"
        ) from None


def _train(network, config, pictures, run, show):
    """The training of `evaluate`; goes on from what `run` holds, and saves there after every epoch."""
    device, (rank, count) = pictures.x_train.device, processes()
    generator = torch.Generator(device).manual_seed(config.seed)
    weights = list(network.parameters())
    optimizer = sgd(weights, config)
    trained = parallel(network, find_unused=True)  # a genotype may leave nodes out of its output
    network.train()
    parts = {"network": network, "weights": optimizer}
    first_epoch, interrupted = run.restore(parts, generator)
    progress = Progress([config.epochs * len(pictures.x_train)], show)
    progress.resume(first_epoch * len(pictures.x_train))
    indices = torch.arange(len(pictures.x_train), device=device)
    for epoch in range(first_epoch, config.epochs):
        started, seen = time.monotonic(), 0
        lr = cosine(config.lr, epoch, config.epochs)
        set_lr(optimizer, lr)
        network.drop_path = config.drop_path * epoch / config.epochs
        label = f"epoch {epoch:3d}/{config.epochs - 1}"
        meter = Meter("training loss", f"epoch {epoch}")
        if interrupted:
            epoch_batches = interrupted["batches"]
            meter.restore(interrupted["meters"][rank])
            interrupted = None
        else:
            epoch_batches = batches(indices, config.batch, generator)
        for i in range(len(meter.sizes), len(epoch_batches)):
            batch = epoch_batches[i].to(device)
            x = pictures.x_train[batch]
            x = pictures.augment(x, config.crop_padding, config.flip, config.cutout, generator)
            images, labels = x[rank::count], pictures.y_train[batch][rank::count]
            with autocast(device, config.dtype):
                logits, auxiliary_logits = trained(images)
                loss = F.cross_entropy(logits, labels)
                if auxiliary_logits is not None:
                    loss = loss + config.auxiliary_weight * F.cross_entropy(auxiliary_logits, labels)
            train_step(weights, optimizer, loss, config.clip)
            meter.update(loss.detach(), (logits.argmax(1) == labels).sum(), len(labels))
            seen += len(batch)
            text = f"{label}  step {i + 1}/{len(epoch_batches)}"
            progress.step(0, text, len(batch), meter, seen / (time.monotonic() - started))
            if signal_number := run.asked_to_stop():
                run.share_buffers(network)
                run.save(parts, generator, epoch, {"batches": epoch_batches, "meters": gather(meter.state())})
                raise Stopped(signal_number)
        loss, train_accuracy = meter.result()
        run.share_buffers(network)
        test_accuracy = accuracy(network, pictures)
        record = {"epoch": epoch, "train_loss": loss, "train_accuracy": train_accuracy, "test_accuracy": test_accuracy}
        seconds = time.monotonic() - started
        run.add(record | {"lr": lr, "drop_path": network.drop_path}, seconds)
        run.folder.save("weights.pt", network.state_dict())
        run.save(parts, generator, epoch + 1)
        text = f"{label}  loss {loss:.3f}  acc {train_accuracy:6.1%}  test acc {test_accuracy:6.1%}"
        progress.line(f"{text}  {seconds:.1f} s")


# ----------------------------------------------------------------------------------------------------------------------
# Data: pictures live on the device as one uint8 tensor and are augmented there, a batch at a time
# ----------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Pictures:
    """A data set: x_* uint8 [N,C,H,W], y_* int64 [N] class indices; mean, std float32 [C] of x/255."""

    name: str
    x_train: torch.Tensor
    y_train: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor
    num_classes: int
    mean: torch.Tensor
    std: torch.Tensor
    path: str | None = None  # where they come from

    @staticmethod
    def from_arrays(x_train, y_train, x_test, y_test, name="own data", num_classes=None, mean=None, std=None):
        """Checks arrays or tensors, x [N,H,W] or [N,H,W,channels] uint8 and y [N] integers from 0.

        num_classes is one more than the largest label of y_train, mean and std are those of x_train, unless given. The
        search takes the first half of x_train for the weights and the second for the alphas: pictures sorted by class
        must be shuffled first.
        """
        parts = {}
        for split, x, y in ("train", x_train, y_train), ("test", x_test, y_test):
            x, y = (np.asarray(v.cpu() if isinstance(v, torch.Tensor) else v) for v in (x, y))
            if x.dtype != np.uint8 or x.ndim not in (3, 4):
                raise InputError(
                    f"{name}: x_{split} is {x.dtype} {list(x.shape)}; expected uint8 [N,H,W] or [N,H,W,channels]"
                )
            x = x[..., None] if x.ndim == 3 else x
            if x.shape[0] < (4 if split == "train" else 1) or min(x.shape[1:3]) < 8 or x.shape[3] < 1:
                raise InputError(
                    f"{name}: x_{split} has shape {list(x.shape)}; expected 4 training pictures or more and 1 test "
                    "picture or more, of 8 x 8 or larger"
                )
            if y.dtype.kind not in "iu" or y.shape != x.shape[:1]:
                raise InputError(
                    f"{name}: y_{split} is {y.dtype} {list(y.shape)}; expected integers [{len(x)}], one per picture"
                )
            if y.min() < 0:
                raise InputError(f"{name}: y_{split} holds {y.min()}; expected class indices from 0")
            parts[split] = x, y
        (x_train, y_train), (x_test, y_test) = parts["train"], parts["test"]
        if x_train.shape[1:] != x_test.shape[1:]:
            raise InputError(
                f"{name}: x_train holds pictures of {list(x_train.shape[1:])} and x_test of {list(x_test.shape[1:])}; "
                "expected the same"
            )
        num_classes = num_classes or min(int(y_train.max()) + 1, len(x_train))  # a class needs a picture
        if max(y_train.max(), y_test.max()) >= num_classes or num_classes < 2:
            raise InputError(
                f"{name}: y_train goes up to {y_train.max()} and y_test to {y_test.max()}; expected 2 or more classes, "
                "counted from 0, none of them in y_test only"
            )
        if mean is None or std is None:
            # From the histogram of each channel: exact and without a float copy of the pictures.
            levels = np.arange(256) / 255
            p = np.stack([np.bincount(x_train[..., c].ravel(), minlength=256) for c in range(x_train.shape[3])])
            p = p / p.sum(axis=1, keepdims=True)
            mean = p @ levels
            std = np.maximum(np.sqrt(np.maximum(p @ levels**2 - mean**2, 0)), 1 / 255)
        tensors = []
        for x, y in parts.values():
            tensors.append(torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2))))
            tensors.append(torch.from_numpy(y.astype(np.int64)))
        mean, std = (torch.tensor(v, dtype=torch.float32) for v in (mean, std))
        return Pictures(name, *tensors, num_classes, mean, std)

    def to(self, device) -> Pictures:
        moved = {f: t.to(device) for f, t in vars(self).items() if isinstance(t, torch.Tensor)}
        return dataclasses.replace(self, **moved)

    def fingerprint(self) -> str:
        """Equal for equal pictures and labels."""
        digest = hashlib.blake2b(digest_size=16)
        for t in (self.x_train, self.y_train, self.x_test, self.y_test):
            digest.update(repr(t.shape).encode())
            digest.update(t.cpu().contiguous().numpy())
        return digest.hexdigest()

    def first(self, pictures: int) -> Pictures:
        """Only the first training pictures, `pictures` at most; 0: all of them."""
        if 0 < pictures < 4:
            raise InputError(f"pictures is {pictures}; expected at least 4, or 0 for all")
        n = pictures or len(self.x_train)
        return dataclasses.replace(self, x_train=self.x_train[:n], y_train=self.y_train[:n])

    def normalise(self, x) -> torch.Tensor:
        """uint8 -> float32, zero mean and unit deviation per channel."""
        return (x.float() / 255 - self.mean.view(-1, 1, 1)) / self.std.view(-1, 1, 1)

    def augment(self, x, crop_padding: int, flip: bool, cutout: int, generator: torch.Generator) -> torch.Tensor:
        """Random crop, flip, normalisation and cutout of x, uint8 [N,C,H,W] -> float32, each picture its own."""
        n, _, h, w = x.shape

        def random(high):  # one integer below `high` for each picture
            return torch.randint(high, (n, 1), device=x.device, generator=generator)

        rows = random(2 * crop_padding + 1) + torch.arange(h, device=x.device)  # [N, H]
        cols = random(2 * crop_padding + 1) + torch.arange(w, device=x.device)  # [N, W]
        if flip:
            cols = torch.where(random(2) == 1, cols.flip(1), cols)
        padded = F.pad(x, [crop_padding] * 4).permute(0, 2, 3, 1)  # [N, H+2p, W+2p, C]
        picture = torch.arange(n, device=x.device)[:, None, None]
        x = padded[picture, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)  # [N, C, H, W]
        # Contiguous: with 1 or 2 channels, torch's channels-last convolutions are not reproducible on the CPU.
        x = self.normalise(x.contiguous())
        cutout = min(cutout, min(h, w) // 2)
        if cutout:
            # A square around a random pixel, clipped at the borders (DeVries and Taylor, arXiv 1708.04552).
            dy = torch.arange(h, device=x.device) - random(h) + cutout // 2  # [N, H]
            dx = torch.arange(w, device=x.device) - random(w) + cutout // 2  # [N, W]
            inside = ((dy >= 0) & (dy < cutout))[:, :, None] & ((dx >= 0) & (dx < cutout))[:, None, :]
            x = x.masked_fill(inside[:, None], 0.0)
        return x


def batches(indices, batch: int, generator: torch.Generator):
    """`indices` in a new random order, `batch` at a time.

    The last batch is cut to a multiple of the processes, and left out if they get one picture each (batch norm needs
    two).
    """
    _, count = processes()
    order = indices[torch.randperm(len(indices), device=indices.device, generator=generator)]
    parts = [part[: len(part) // count * count] for part in order.split(batch)]
    return [part for part in parts if len(part) > count]


def check_batch(batch: int, pictures: int):
    """InputError unless the processes can share batches of `batch` out of `pictures` pictures."""
    _, count = processes()
    if batch % count or min(batch, pictures) < 2 * count:
        raise InputError(
            f"batch is {batch}, of {pictures} pictures, for {count} process{'es' * (count > 1)}; expected 2 pictures "
            "or more for each, and as many for all"
        )


def shapes(train: int = 4000, test: int = 500, seed: int = 0) -> Pictures:
    """Generated pictures, 32 x 32 in colour, of 10 shapes of varied position, size, colour, rotation and background."""
    rng = np.random.default_rng(seed)
    n = train + test
    label = rng.permutation(np.arange(n) % 10)

    def column(low, high):
        return rng.uniform(low, high, (n, 1, 1))

    # Coordinates in which the shape is upright, centred and of radius 1.
    y, x = np.mgrid[0:32, 0:32]
    x, y, angle, radius = x - column(10.5, 20.5), y - column(10.5, 20.5), column(-0.3, 0.3), column(7, 11)
    u, v = (np.cos(angle) * x + np.sin(angle) * y) / radius, (np.cos(angle) * y - np.sin(angle) * x) / radius
    r, square, diamond = np.hypot(u, v), np.maximum(abs(u), abs(v)), abs(u) + abs(v)
    masks = (
        r < 0.9,  # disc
        (r < 1) & (r > 0.6),  # ring
        square < 0.8,
        (square < 0.9) & (square > 0.55),  # frame
        diamond < 1.1,
        (diamond < 1.2) & (diamond > 0.7),  # diamond frame
        (np.minimum(abs(u), abs(v)) < 0.2) & (square < 1),  # cross
        (abs(abs(u) - abs(v)) < 0.28) & (square < 0.9),  # saltire
        (abs(v) < 0.25) & (abs(u) < 1),  # lying bar
        (abs(u) < 0.25) & (abs(v) < 1),  # standing bar
    )
    mask = np.choose(label[:, None, None], masks)[..., None]
    # Bright shapes on a dark background, which is shaded from one side to the other, and noise over both.
    colour, background = rng.uniform(140, 255, (n, 1, 1, 3)), rng.uniform(0, 100, (n, 1, 1, 3))
    tilt = column(0, 2 * np.pi)
    shade = (x * np.cos(tilt) + y * np.sin(tilt)) * column(0, 2)
    noise = rng.normal(0, 1, (n, 32, 32, 3)) * column(5, 25)[..., None]
    picture = (np.where(mask, colour, background + shade[..., None]) + noise).clip(0, 255).astype(np.uint8)
    return Pictures.from_arrays(picture[:train], label[:train], picture[train:], label[train:], "shapes")


class CifarFormat(NamedTuple):
    """Where a CIFAR data set is found and what its files look like."""

    url: str
    md5: str
    binary: str  # folder of the binary version
    python: str  # folder of the python version
    train: tuple[str, ...]  # files, without the binary version's ending
    test: tuple[str, ...]
    label_bytes: int  # before each picture of the binary version; the last of them is the class
    label_key: bytes  # of the python version
    classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


CIFAR = {
    "cifar10": CifarFormat(
        url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        md5="c32a1d4ab5d03f1284b67883e8d87530",
        binary="cifar-10-batches-bin",
        python="cifar-10-batches-py",
        train=tuple(f"data_batch_{i}" for i in range(1, 6)),
        test=("test_batch",),
        label_bytes=1,
        label_key=b"labels",
        classes=10,
        mean=(0.49139968, 0.48215827, 0.44653124),
        std=(0.24703233, 0.24348505, 0.26158768),
    ),
    "cifar100": CifarFormat(
        url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        md5="03b5dce01913d631647c71ecec9e9cb8",
        binary="cifar-100-binary",
        python="cifar-100-python",
        train=("train",),
        test=("test",),
        label_bytes=2,  # coarse, fine
        label_key=b"fine_labels",
        classes=100,
        mean=(0.5071, 0.4867, 0.4408),
        std=(0.2675, 0.2565, 0.2761),
    ),
}


def _reason(error: Exception) -> str:
    """What a message says of an error that a damaged file led to."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text:.200}" if text else type(error).__name__


class _PickledArray:
    """Stands in for numpy.ndarray while unpickling: takes the state, runs nothing."""

    def __setstate__(self, state):
        _, self.shape, self.dtype, self.fortran_order, self.data = state

    def read(self) -> np.ndarray:
        if self.dtype.name != "u1" or self.fortran_order or not isinstance(self.data, bytes):
            raise ValueError("an array that is not uint8 in C order")
        return np.frombuffer(self.data, np.uint8).reshape(self.shape)


class _PickledDtype:
    """Stands in for numpy.dtype."""

    def __init__(self, name, *_):
        self.name = name.decode() if isinstance(name, bytes) else name

    def __setstate__(self, state):
        pass


# Python's own unpickler: the one in C allocates whatever sizes a damaged file claims.
class _CifarUnpickler(pickle._Unpickler):
    """Allows the names of an array in a CIFAR file, with stand-ins for them, and refuses everything else."""

    ALLOWED = {"_reconstruct": lambda *_: _PickledArray(), "ndarray": _PickledArray, "dtype": _PickledDtype}

    def refuse(self):
        raise ValueError("a part that no such file has")

    # The hash of a small tuple of tuples of tuples ... can take for ever: only text may be a key.

    def check_keys(self, keys):
        if not all(isinstance(key, (bytes, str)) for key in keys):
            raise ValueError("a key that is not text")

    def load_setitem(self):
        self.check_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self):
        self.check_keys(self.stack[::2])
        super().load_setitems()

    dispatch = pickle._Unpickler.dispatch | {pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems}
    dispatch |= dict.fromkeys(pickle.BYTEARRAY8 + pickle.DICT + pickle.FROZENSET + pickle.ADDITEMS, refuse)

    def find_class(self, module, name):
        if module not in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray") or name not in self.ALLOWED:
            raise ValueError(f"it holds {module}.{name}")
        return self.ALLOWED[name]


def _read_cifar_file(path: pathlib.Path, form: CifarFormat, binary: bool):
    """-> pictures [N,3,32,32] uint8 and labels [N]."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror}; expected the files {', '.join(form.train + form.test)}"
        ) from None
    if binary:
        row = form.label_bytes + 3072
        if not content or len(content) % row:
            raise InputError(f"{path} has {len(content)} bytes; expected a multiple of {row}, one row per picture")
        rows = np.frombuffer(content, np.uint8).reshape(-1, row)
        x, y = rows[:, form.label_bytes :], rows[:, form.label_bytes - 1]
    else:
        try:
            entries = _CifarUnpickler(io.BytesIO(content), encoding="bytes").load()
            x, labels = entries[b"data"].read(), entries[form.label_key]
            if not isinstance(labels, list) or any(type(label) is not int for label in labels):
                raise ValueError("labels that are not whole numbers")
            y = np.array(labels, np.int64)
            if x.shape != (len(y), 3072) or not len(y):
                raise ValueError(f"data {list(x.shape)} for {len(y)} labels")
        except Exception as error:  # whatever a damaged or hostile pickle leads to
            raise InputError(
                f"{path} is not a CIFAR pickle ({_reason(error)}); expected uint8 data [N,3072] and "
                f"{form.label_key.decode()}"
            ) from None
    if y.min() < 0 or y.max() >= form.classes:
        raise InputError(f"{path} holds labels from {y.min()} to {y.max()}; expected 0 to {form.classes - 1}")
    return x.reshape(-1, 3, 32, 32), y


def load_cifar(name: str, folder: pathlib.Path) -> Pictures:
    """CIFAR-10 or CIFAR-100 ("cifar10", "cifar100"), the binary or the python version, found by name in `folder`."""
    form = CIFAR[name]
    versions = [(form.binary, ".bin"), (form.python, "")]
    found = next((version for version in versions if (folder / version[0]).is_dir()), None)
    if found is None:
        raise InputError(
            f"no {name} in {folder}; expected a folder {form.binary} or {form.python} there (--download fetches it)"
        )
    subfolder, ending = found
    arrays = []
    for files in form.train, form.test:
        parts = [_read_cifar_file(folder / subfolder / (file + ending), form, ending == ".bin") for file in files]
        arrays += [np.concatenate([x for x, _ in parts]).transpose(0, 2, 3, 1), np.concatenate([y for _, y in parts])]
    return Pictures.from_arrays(*arrays, name, form.classes, form.mean, form.std)


def download_cifar(name: str, folder: pathlib.Path, form: CifarFormat | None = None):
    """Fetches the binary version into `folder`, unless it is there. Either all of it arrives there or nothing."""
    form = form or CIFAR[name]
    if (folder / form.binary).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
        archive, unpacked = pathlib.Path(temporary, "archive"), pathlib.Path(temporary, form.binary)
        try:
            with urllib.request.urlopen(form.url, timeout=60) as response, open(archive, "wb") as file:
                shutil.copyfileobj(response, file)
        except (OSError, http.client.HTTPException) as error:
            raise InputError(
                f"cannot fetch {form.url}: {error}; the archive can be unpacked into {folder} by hand"
            ) from None
        md5 = hashlib.md5(archive.read_bytes()).hexdigest()
        if md5 != form.md5:
            raise InputError(f"{form.url} has MD5 {md5}; expected {form.md5}")
        unpacked.mkdir()
        try:
            with tarfile.open(archive) as tar:
                # Only the files asked for, read by name and written by us: no links, no paths that lead elsewhere.
                for file in form.train + form.test:
                    member = tar.getmember(f"{form.binary}/{file}.bin")
                    if not member.isreg() or member.issparse():
                        raise ValueError(f"{member.name} is not a file")
                    with tar.extractfile(member) as source, open(unpacked / f"{file}.bin", "wb") as target:
                        shutil.copyfileobj(source, target)
        except Exception as error:  # whatever a damaged archive leads to
            raise InputError(f"cannot unpack {form.url} ({_reason(error)}); expected the published archive") from None
        try:
            unpacked.rename(folder / form.binary)
        except OSError:
            if not (folder / form.binary).exists():  # else another process was faster
                raise


def _check_zip(path, sums=False):
    """Refuses a zip that unpacks to far more than it is, as no pictures or weights do; `sums`: and a damaged one."""
    with zipfile.ZipFile(path) as archive:
        size, unpacked = os.path.getsize(path), sum(part.file_size for part in archive.infolist())
        if unpacked > 10**7 + 100 * size:
            raise ValueError(f"{size} bytes that unpack to {unpacked}")
        if sums and (damaged := archive.testzip()):
            raise ValueError(f"{damaged} is damaged")


def load_npz(path: pathlib.Path) -> Pictures:
    """Anybody's own data: x_train, y_train, x_test, y_test as in Pictures.from_arrays.

    The training pictures are shuffled (by a fixed seed): the search halves them, and own files are often sorted.
    """
    keys = ("x_train", "y_train", "x_test", "y_test")
    try:
        _check_zip(path)
        with np.load(path, allow_pickle=False) as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old or odd array headers
            missing = [key for key in keys if key not in archive]
            if missing:
                raise InputError(f"{path} lacks {', '.join(missing)}; expected {', '.join(keys)}")
            x_train, y_train, x_test, y_test = (archive[key] for key in keys)
    except InputError:
        raise
    except Exception as error:  # whatever a damaged zip or array header leads to
        raise InputError(f"cannot read {path} ({_reason(error)}); expected an .npz with {', '.join(keys)}") from None
    pictures = Pictures.from_arrays(x_train, y_train, x_test, y_test, str(path))
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(pictures.x_train)))
    return dataclasses.replace(pictures, x_train=pictures.x_train[order], y_train=pictures.y_train[order])


def load(dataset: str, path: str | None = None, download: bool = False) -> Pictures:
    """The pictures that --preset and --data name: an .npz file, CIFAR in a folder, or the generated shapes."""
    folder = pathlib.Path(path or "data")
    if dataset not in ("shapes", *CIFAR):
        raise InputError(f"dataset is {dataset!r}; expected shapes, {' or '.join(CIFAR)}")
    if download and (dataset == "shapes" or folder.is_file()):
        raise InputError(f"nothing to download for {path or dataset}; expected --preset {' or '.join(CIFAR)}")
    if path and folder.is_file():
        return dataclasses.replace(load_npz(folder), path=path)
    if dataset == "shapes":
        if not path:
            return shapes()
        if not folder.is_dir():
            raise InputError(f"no file or folder {path}; expected an .npz file or a folder with CIFAR")
        found = [
            name for name, form in CIFAR.items() if (folder / form.binary).is_dir() or (folder / form.python).is_dir()
        ]
        if not found:
            folders = ", ".join(name for form in CIFAR.values() for name in (form.binary, form.python))
            raise InputError(f"no data in {path}; expected one of the folders {folders}")
        dataset = found[0]
    if download:
        download_cifar(dataset, folder)
    return dataclasses.replace(load_cifar(dataset, folder), path=str(folder))


# ----------------------------------------------------------------------------------------------------------------------
# Progress, files and devices
# ----------------------------------------------------------------------------------------------------------------------


class Meter:
    """Loss and accuracy over an epoch; messages name `what` loss it is and `where` in the search.

    Numbers stay on the device for some steps, so that a GPU need not wait for each.
    """

    def __init__(self, what: str, where: str):
        self.what, self.where = what, where
        self.losses, self.sizes, self.correct = [], [], 0
        self._unread = []  # losses that are still tensors

    def update(self, loss, correct, size: int):
        """loss: mean over the `size` pictures of a step; correct: how many of them were classified right."""
        self._unread.append(loss)
        self.sizes.append(size)
        self.correct = self.correct + correct
        if len(self._unread) == 20:
            self.read()

    def read(self):
        """Takes the numbers from the device; ends the run if a loss is not finite."""
        for loss in torch.stack(self._unread).tolist() if self._unread else []:
            if not math.isfinite(loss):
                raise InputError(
                    f"the {self.what} became {loss} in {self.where}, step {len(self.losses)}; expected a finite number "
                    "(a lower lr may help)"
                )
            self.losses.append(loss)
        self._unread, self.correct = [], int(self.correct)

    def state(self) -> dict:
        self.read()
        return {"losses": self.losses, "sizes": self.sizes, "correct": self.correct}

    def restore(self, state: dict):
        self.losses, self.sizes, self.correct = state["losses"], state["sizes"], state["correct"]

    def result(self, own=False):
        """(mean loss, accuracy) over all processes or this one's `own`; (None, None) where nothing was measured."""
        self.read()
        if not self.losses:
            return None, None
        total = sum(self.sizes)
        mine = sum(loss * n for loss, n in zip(self.losses, self.sizes)) / total, self.correct / total
        parts = [mine] if own else gather(mine)  # `batches` gives equally many pictures to each
        return tuple(sum(values) / len(parts) for values in zip(*parts))


class Progress:
    """One live line on a terminal, one line per epoch elsewhere, with the time that is left.

    work: what each stage takes, in any unit; the time left follows from what a unit took so far. Of several processes
    only the first shows anything.
    """

    def __init__(self, work: list[float], show: bool):
        self.work, self.show = work, show and processes()[0] == 0
        self.live = self.show and sys.stdout.isatty()
        self.start, self.done, self.before, self.last, self.length = time.monotonic(), 0.0, 0.0, 0.0, 0

    def resume(self, work):
        """`work` was done before this process started."""
        self.done = self.before = work

    def step(self, stage, text, work, meter, pictures_per_second):
        """After a step that took `work`: at most five times a second the live line."""
        self.done += work
        now = time.monotonic()
        if not self.live or now - self.last < 0.2:
            return
        self.last = now
        pace = (now - self.start) / (self.done - self.before)
        stage_left = pace * (sum(self.work[: stage + 1]) - self.done)
        whole_left = pace * (sum(self.work) - self.done)
        left = f"left: {_duration(whole_left)}"
        if len(self.work) > 1:
            left = f"left: stage {_duration(stage_left)}, all {_duration(whole_left)}"
        loss, accuracy = meter.result(own=True)
        self._write(
            f"{text}  loss {loss:.3f}  acc {accuracy:6.1%}  {pictures_per_second:.0f} pictures/s  {left}", end=""
        )

    def line(self, text):
        if self.show:
            self._write(text, end="\n")

    def _write(self, text, end):
        erase = "\r" if self.live else ""
        if self.live:  # never longer than the terminal, or \r would not erase it
            text = text[: shutil.get_terminal_size().columns - 1]
        print(f"{erase}{text:<{self.length}}", end=end, flush=True)
        self.length = len(text) if self.live and not end else 0


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def write_whole(path: pathlib.Path, content: bytes):
    """The file appears, or takes the place of an older one, with all of its content or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Folder:
    """The folder that a run writes to, made by the first `write`. None: writes nothing.

    resume: it may hold a run already; otherwise it must be new or empty.
    """

    def __init__(self, path: str | os.PathLike | None, resume=False):
        self.path = None if path is None else pathlib.Path(path)
        if self.path and self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            if not resume:
                raise InputError(f"{self.path} already holds something; expected a new or empty folder")
            if not (self.path / "config.json").is_file():
                raise InputError(f"{self.path} holds no run; expected the folder of one, or a new or empty folder")

    def write(self, name: str, content):
        """Bytes, text, or anything else as JSON (state dictionaries by `save`)."""
        if self.path is None:
            return
        if not isinstance(content, (bytes, str)):
            content = json.dumps(content, indent=1) + "\n"
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, content.encode() if isinstance(content, str) else content)

    def save(self, name: str, state, before: str | None = None):
        """By torch.save; the file that has the name now becomes the file `before`."""
        if self.path is not None:
            if before and (self.path / name).exists():
                self.write(before, (self.path / name).read_bytes())
            buffer = io.BytesIO()  # torch.save itself hides why a disk cannot be written
            torch.save(state, buffer)
            self.write(name, buffer.getvalue())

    def draw(self, genotype: Genotype, under: str = ""):
        for kind, svg in draw(genotype).items():
            self.write(f"{under}{kind}.svg", svg)


class Stopped(KeyboardInterrupt):
    """A run was asked to stop (SIGINT, SIGTERM); it has finished its step and saved its state."""

    def __init__(self, signal_number: int):
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal_number = signal_number


class Run:
    """A search or an evaluation as files: settings, log, and checkpoints from which it goes on as if never stopped.

    kind: "search" or "evaluate"; out: a new or empty folder, or None; resume: the folder of a run, or one of its
    checkpoints, to go on with; a new or empty folder begins a run. identity: what else decides the result, besides
    settings, data and the type of device. `state` is what was saved, until `restore`. Of several processes the first
    reads and writes.
    """

    FORMAT = 1
    CHECKPOINT, BEFORE = "checkpoint.pt", "checkpoint-before.pt"

    def __init__(self, kind: str, config, pictures: Pictures, device, out=None, resume=None, **identity):
        self.device, self.signal, self.log, self.times, self.state = device, 0, [], [], None
        self.identity = {"kind": kind, "data": pictures.fingerprint(), "device": device.type}
        self.identity |= dataclasses.asdict(config) | identity
        if len({repr(i) for i in gather(self.identity)}) > 1:
            raise InputError("the processes have different settings or data; expected the same on every machine")
        path = self.path(out, resume)
        self.folder = Folder(path if processes()[0] == 0 else None, resume is not None)
        if resume is not None:
            self._load(pathlib.Path(resume) if pathlib.Path(resume).is_file() else path / self.CHECKPOINT)
        if not self.state:
            self.folder.write("config.json", _describe(config, pictures, device) | identity)

    @staticmethod
    def path(out, resume) -> pathlib.Path | None:
        """The folder that `out` or `resume` means, or None."""
        if out is not None and resume is not None:
            raise InputError(f"out is {str(out)!r} and resume is {str(resume)!r}; expected one of them")
        if resume is None:
            return out if out is None else pathlib.Path(out)
        path = pathlib.Path(resume)
        return path.parent if path.is_file() else path

    def _load(self, checkpoint: pathlib.Path):
        """Sets `state` to what the first process finds in `checkpoint`, if there is one."""
        rank, count = processes()
        if rank == 0 and checkpoint.exists():
            self.state = self._read(checkpoint)
        if count > 1:
            states = [self.state]
            dist.broadcast_object_list(states, 0)
            (self.state,) = states
        if not self.state:
            return
        before = len(self.state["random"])
        if self.state["interrupted"] and before != count:
            raise InputError(
                f"{checkpoint} was written by {before} processes in the middle of an epoch, here are {count}; expected "
                "as many"
            )
        self.log, self.times = self.state["log"], self.state["times"]
        if rank == 0 and checkpoint.name != self.CHECKPOINT:  # else the next `save` would keep a damaged one
            self.folder.write(self.CHECKPOINT, checkpoint.read_bytes())

    def add(self, record: dict, seconds: float):
        """A line for log.jsonl, equal in equal runs, and one for times.jsonl; the next `save` writes them."""
        self.log.append(json.dumps(record) + "\n")
        self.times.append(json.dumps({"epoch": len(self.log) - 1, "seconds": round(seconds, 3)}) + "\n")

    def save(self, parts: dict, generator, epoch: int, interrupted: dict | None = None, **state):
        """All that is needed to go on in `epoch`; what was saved the time before stays beside it.

        parts: network and optimizers; interrupted: where in the epoch it stopped.
        """
        state |= {"format": self.FORMAT, "identity": self.identity, "log": self.log, "times": self.times}
        state |= {"epoch": epoch, "interrupted": interrupted, "generator": generator.get_state()}
        state["parts"] = {name: part.state_dict() for name, part in parts.items()}
        state["random"] = gather(_random_state(self.device))
        # The checkpoint last: whoever is killed before it does this epoch again.
        self.folder.write("log.jsonl", "".join(self.log))
        self.folder.write("times.jsonl", "".join(self.times))
        self.folder.save(self.CHECKPOINT, state, self.BEFORE)

    def restore(self, parts: dict, generator):
        """Puts back what was saved, once: (epoch, interrupted); (0, None) where there is nothing."""
        state, self.state = self.state, None
        if not state:
            return 0, None
        for name, part in parts.items():
            saved = state["parts"][name]
            if isinstance(part, torch.optim.Optimizer):
                # Its settings are those of `identity`; a rate that lies on the device must stay the tensor that it is.
                saved = saved | {"param_groups": part.state_dict()["param_groups"]}
            part.load_state_dict(saved)
        generator.set_state(state["generator"])
        rank = processes()[0]
        if rank < len(state["random"]):  # other processes than before go on with what they have
            random = state["random"][rank]
            torch.set_rng_state(random["cpu"])
            if self.device.type == "cuda" and "cuda" in random:
                torch.cuda.set_rng_state(random["cuda"], self.device)
        return state["epoch"], state["interrupted"]

    def share_buffers(self, network):
        """Takes the first process's running statistics, as the official code does on several GPUs."""
        if processes()[1] > 1:
            buffers = [b for b in network.buffers() if b.is_floating_point()]
            flat = torch.cat([b.flatten() for b in buffers])
            dist.broadcast(flat, 0)
            for buffer, part in zip(buffers, flat.split([b.numel() for b in buffers])):
                buffer.copy_(part.view_as(buffer))

    def check_agreement(self, alphas, *others):
        """RuntimeError unless all processes hold the same alphas, bit for bit, and the same `others` (candidates)."""
        text = repr((others, [alpha.tolist() for alpha in alphas]))
        if len(set(gather(hashlib.sha256(text.encode()).hexdigest()))) > 1:
            raise RuntimeError("the processes hold different alphas or candidates; expected the same in all of them")

    def asked_to_stop(self) -> int:
        """The signal that any process got, or 0; the same answer in all of them."""
        if processes()[1] == 1:
            return self.signal
        asked = torch.tensor(self.signal)
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        return int(asked)

    @contextlib.contextmanager
    def stoppable(self):
        """A block in which SIGINT and SIGTERM only lead to `asked_to_stop`."""
        if threading.current_thread() is not threading.main_thread():
            yield  # the other threads get no signals
            return

        def note(number, _):
            self.signal = number

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)

    def _read(self, path: pathlib.Path) -> dict:
        try:
            _check_zip(path, sums=True)
            state = torch.load(path, map_location="cpu", weights_only=True)
            version, identity = state["format"], state["identity"]
        except Exception as error:  # whatever a damaged file leads to
            before = path.with_name(self.BEFORE)
            offer = f"; the one before it goes on: --resume {before}" if before.exists() and before != path else ""
            raise InputError(
                f"cannot read {path} ({_reason(error)}); expected an undamaged checkpoint{offer}"
            ) from None
        if version != self.FORMAT:
            raise InputError(
                f"{path} has format {version}; expected {self.FORMAT}: another version of pdarts.py wrote it"
            )
        for name, value in self.identity.items():
            if identity.get(name) != value:
                raise InputError(
                    f"{path} is of another run: {name} is {identity.get(name)!r} there and {value!r} here; expected "
                    "the same settings and data"
                )
        return state


def _random_state(device) -> dict:
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _describe(config, pictures: Pictures, device: torch.device) -> dict:
    """What config.json holds."""
    return {
        "settings": dataclasses.asdict(config),
        "data": pictures.name,
        "path": pictures.path,
        "device": str(device) if device.type != "cuda" else f"{device}: {torch.cuda.get_device_name(device)}",
        "processes": processes()[1],
        "threads": torch.get_num_threads(),  # torch adds up in another order with another number
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "pdarts.py": hashlib.sha256(pathlib.Path(__file__).read_bytes()).hexdigest(),
        "command": sys.argv,
    }


def pick_device(name: str) -> torch.device:
    """The device that `name` stands for; "auto" is the GPU if there is one. InputError if torch cannot use it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old names, which are refused
            device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.Generator(device)
        torch.zeros(1, device=device)
    except Exception as error:  # whatever one of torch's backends leads to
        raise InputError(
            f"device {name!r} cannot be used ({_reason(error)}); expected auto, cpu, cuda, cuda:1, ..."
        ) from None
    return device


@contextlib.contextmanager
def _deterministic(on: bool):
    """A block in which, if `on`, torch only uses operations that give the same bits every time."""
    before = torch.are_deterministic_algorithms_enabled()
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def pick_kernels(mode: str | None, device: torch.device) -> bool:
    """How this process runs what kernels/ fuses: by it ("on"), in plain torch ("off"), or by it if it can ("auto").

    None: as before, at first PDARTS_KERNELS or "auto". Returns whether the kernels are used; builds them if they are.
    """
    if fused is None:
        if mode == "on":
            raise InputError(
                "kernels is 'on', but no folder kernels lies beside pdarts.py; expected it, or auto or off"
            )
        return False
    try:
        if mode is not None:
            fused.use(mode)
        return fused.fused(device)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        raise InputError(f"the kernels cannot be used: {error}") from None


class CapturedStep:
    """A step of a search, as a GPU runs it fastest: hundreds of launches captured as one CUDA graph and replayed.

    step: a function of tensors that returns tensors; inputs of other shapes get a graph of their own. The first
    `WARM_UP` calls of each are plain ones, in which optimizers make their state. generator: the one that the step draws
    from beside torch's own.
    """

    WARM_UP = 3

    def __init__(self, step, generator: torch.Generator):
        self.step, self.generator = step, generator
        self.stream, self.pool = torch.cuda.Stream(generator.device), torch.cuda.graph_pool_handle()
        self.calls, self.captured = collections.Counter(), {}

    @staticmethod
    def serves(device: torch.device, config: SearchConfig) -> bool:
        """Not several processes, which wait for each other, nor the second order, which restores random states."""
        return device.type == "cuda" and processes()[1] == 1 and not config.unrolled

    def __call__(self, *inputs):
        key = tuple(t.shape for t in inputs)
        self.calls[key] += 1
        if self.calls[key] <= self.WARM_UP:
            return self._plain(inputs)
        if key not in self.captured:
            self.captured[key] = self._capture([t.clone() for t in inputs])
        replay, buffers, results = self.captured[key]
        for buffer, t in zip(buffers, inputs):
            buffer.copy_(t)
        replay()
        return [t.clone() for t in results]

    def _plain(self, inputs):
        """On the stream of the capture, where the memory that optimizers and autograd keep must come from."""
        present = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(present)
        with torch.cuda.stream(self.stream), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Adam's, that it could be faster where nothing is captured
            results = self.step(*inputs)
        present.wait_stream(self.stream)
        return results

    def _capture(self, buffers):
        """-> a function that runs the step on what lies in `buffers`, these, and where it leaves its results."""
        torch.cuda.synchronize(self.stream.device)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        try:
            with torch.cuda.graph(graph, self.pool, self.stream):
                results = self.step(*buffers)
        except RuntimeError as error:
            raise InputError(
                f"the step cannot be captured as a CUDA graph ({_reason(error)}); expected --graphs off, then"
            ) from error
        return graph.replay, buffers, results


# ----------------------------------------------------------------------------------------------------------------------
# Showing a cell: as a picture and as a table
# ----------------------------------------------------------------------------------------------------------------------

# An arc diagram: the states stand in a row, and every operation has a bracket above them, at a height (lane) of its
# own wherever two would overlap. Lines go up and down only above a state; the label stands between two states. So no
# label meets another label, a state or another bracket, whatever the genotype.
GAP, LANE, PORT, BOX, LABEL = 132, 34, 14, 36, (108, 22)  # pixels: between states, lanes, ports; heights; label w, h
COLOURS = {"skip": "#2a9d5c", "max": "#3274c4", "avg": "#3274c4", "sep": "#d9722e", "dil": "#8a56b5", "conv": "#b5485a"}


def draw(genotype: Genotype) -> dict[str, str]:
    """{"normal": SVG, "reduce": SVG} of the two cells."""
    genotype = check_genotype(genotype)
    return {
        "normal": cell_svg(genotype.normal, genotype.normal_concat, "normal cell"),
        "reduce": cell_svg(genotype.reduce, genotype.reduce_concat, "reduction cell"),
    }


def cell_svg(pairs, concat, title: str) -> str:
    """One cell: inputs left, nodes, output right, every edge labelled with its operation."""
    nodes = len(pairs) // 2
    names = ["c_{k-2}", "c_{k-1}", *map(str, range(nodes)), "c_{k}"]
    edges = sorted((2 + i // 2 - source, source, 2 + i // 2, name) for i, (name, source) in enumerate(pairs))

    # Short edges get the low lanes. Edges share a lane where they meet in one state at most.
    lanes: list[list[tuple[int, int]]] = []
    placed = []  # (source, target, operation, lane)
    for _, source, target, name in edges:
        free = (i for i, lane in enumerate(lanes) if all(target <= a or b <= source for a, b in lane))
        lane = next(free, len(lanes))
        lanes[lane:] = [[]] if lane == len(lanes) else lanes[lane:]
        lanes[lane].append((source, target))
        placed.append((source, target, name, lane))

    # Ports along the top of a state: arriving edges left, leaving ones right, nested so that none of them cross.
    ports = {}
    for state in range(len(names)):
        arriving = sorted((lane, i) for i, (_, target, _, lane) in enumerate(placed) if target == state)
        leaving = sorted(((lane, i) for i, (source, _, _, lane) in enumerate(placed) if source == state), reverse=True)
        ports[state] = [("in", i) for _, i in arriving] + [("out", i) for _, i in leaving]
    widths = [max(72, PORT * (len(ports[state]) + 1)) for state in range(len(names))]
    left = [20 + sum(widths[:state]) + GAP * state for state in range(len(names))]
    top = 44 + LANE * len(lanes)  # of the row of states
    port_x = {}
    for state, order in ports.items():
        for position, port in enumerate(order):
            port_x[port] = left[state] + widths[state] / 2 + PORT * (position - (len(order) - 1) / 2)

    width, bus = left[-1] + widths[-1] + 20, top + BOX + 26
    lines, labels = [], []
    for i, (source, target, name, lane) in enumerate(placed):
        x0, x1, y = port_x["out", i], port_x["in", i], top - 26 - LANE * lane
        colour = COLOURS[name.split("_")[0]] if name != "none" else "#888888"
        lines.append(_svg_line([(x0, top), (x0, y), (x1, y), (x1, top)], colour))
        gap = (source + target - 1) // 2  # the gap in the middle, to the right of this state
        x = left[gap] + widths[gap] + GAP / 2
        labels.append(_svg_box(x - LABEL[0] / 2, y - LABEL[1] / 2, *LABEL, name, "label", colour))
    end = left[-1] + widths[-1] / 2
    for state in concat:
        x = left[state] + widths[state] / 2
        lines.append(_svg_line([(x, top + BOX), (x, bus), (end, bus), (end, top + BOX)], "#666666"))
    x = left[-1] - GAP / 2
    labels.append(_svg_box(x - 32, bus - LABEL[1] / 2, 64, LABEL[1], "concat", "label", "#666666"))
    for state, name in enumerate(names):
        labels.append(_svg_box(left[state], top, widths[state], BOX, name, "state", "#333333"))
    text = html.escape(title)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {bus + 24:g}" width="{width:g}" '
            f'height="{bus + 24:g}" font-family="Helvetica, Arial, sans-serif" font-size="13">',
            f"<title>{text}</title>",
            f'<rect width="{width:g}" height="{bus + 24:g}" fill="#ffffff"/>',
            f'<text x="20" y="24" font-size="15" font-weight="bold" fill="#333333">{text}</text>',
            *lines,
            *labels,
            "</svg>\n",
        ]
    )


def _svg_line(points, colour):
    """Two right angles, rounded, and an arrow head at the end."""
    (x0, y0), (_, y), (x1, y1) = points[0], points[1], points[3]
    up = 1 if y < y0 else -1  # the bracket is above or below the states
    path = (
        f"M{x0:g} {y0:g} V{y + up * 8:g} Q{x0:g} {y:g} {x0 + 8:g} {y:g} "
        f"H{x1 - 8:g} Q{x1:g} {y:g} {x1:g} {y + up * 8:g} V{y1 - up * 4:g}"
    )
    head = f"M{x1:g} {y1:g} l-4 {-up * 8} h8 z"
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/><path d="{head}" fill="{colour}"/>'


def _svg_box(x, y, width, height, text, kind, colour):
    fill, ink, round_ = ("#ffffff", colour, height / 2) if kind == "label" else ("#eef1f5", "#222222", 6)
    return (
        f'<g class="{kind}"><rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{round_:g}" '
        f'fill="{fill}" stroke="{colour}"/><text x="{x + width / 2:g}" y="{y + height / 2 + 4.5:g}" '
        f'text-anchor="middle" fill="{ink}">{html.escape(text)}</text></g>'
    )


def cell_table(genotype: Genotype) -> str:
    """Both cells as lines of text."""
    inputs = {0: "c_{k-2}", 1: "c_{k-1}"}
    columns = [["normal cell"], ["reduction cell"]]
    for column, pairs in zip(columns, (genotype.normal, genotype.reduce)):
        for i, (name, source) in enumerate(pairs):
            node = f"node {i // 2} =" if i % 2 == 0 else "      +"
            column.append(f"{node:8} {name:12} of {inputs.get(source, f'node {source - 2}')}")
    return "\n".join(f"  {a:34}  {b}".rstrip() for a, b in itertools.zip_longest(*columns, fillvalue=""))


# ----------------------------------------------------------------------------------------------------------------------
# Presets and the command line
# ----------------------------------------------------------------------------------------------------------------------

SEARCH_PRESETS = {
    "demo": SearchConfig(
        dataset="shapes",
        pictures=768,
        cells=(3, 4, 5),
        skip_dropout=(0.0, 0.1, 0.2),
        channels=8,
        stem_stride=2,
        epochs=4,
        warmup=1,
        batch=32,
        lr=0.05,
        alpha_lr=6e-3,  # ten times the paper's, for so few steps
        crop_padding=0,
    ),
    "cifar10": SearchConfig(),
    "cifar100": SearchConfig(dataset="cifar100", skip_dropout=(0.1, 0.2, 0.3)),
}
EVALUATE_PRESETS = {
    "demo": EvaluateConfig(
        dataset="shapes", pictures=2000, cells=5, channels=8, epochs=6, batch=50, cutout=8, drop_path=0.1
    ),
    "cifar10": EvaluateConfig(),
    "cifar100": EvaluateConfig(dataset="cifar100"),
}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message):
        raise InputError(f"{message} (see {self.prog} --help)")


def _add_options(parser, presets):
    """The options of a run, and one for every field of the presets' dataclass."""
    parser.add_argument("--preset", choices=presets, help="where the settings come from (default: demo)")
    parser.add_argument(
        "--data", type=_path, metavar="PATH", help="an .npz file, or the folder that holds CIFAR's folder"
    )
    parser.add_argument(
        "--download", action="store_true", help="fetch CIFAR into PATH (default: data) if it is not there"
    )
    parser.add_argument(
        "--out", type=_path, metavar="DIR", help="new folder for the results (default: runs/ and the time)"
    )
    parser.add_argument(
        "--resume",
        type=_path,
        metavar="DIR",
        help="instead of --out: the folder of a run that ended early, to go on with; a new folder begins a run",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    parser.add_argument(
        "--kernels",
        choices=("auto", "on", "off"),
        help="the fused kernels: on, off, or on if they can be built (default: PDARTS_KERNELS, else auto)",
    )
    settings = parser.add_argument_group("settings", "the value in brackets is the demo's, then CIFAR-10's")
    for field in dataclasses.fields(presets["demo"]):
        if field.name == "dataset":
            continue  # the preset's, or that of --data
        demo, paper = (getattr(presets[name], field.name) for name in ("demo", "cifar10"))
        flag = f"--{field.name.replace('_', '-')}"
        keywords = {
            "default": argparse.SUPPRESS,
            "help": f"{field.metadata['help']} [{_text(demo)}; {_text(paper)}]".replace("%", "%%"),
        }
        if isinstance(demo, bool):
            settings.add_argument(flag, action=argparse.BooleanOptionalAction, **keywords)
        elif field.metadata["choices"]:
            settings.add_argument(flag, choices=field.metadata["choices"], **keywords)
        elif isinstance(demo, tuple):
            settings.add_argument(flag, type=type(paper[0]), nargs="+", metavar="X", **keywords)
        else:
            settings.add_argument(flag, type=type(demo), metavar="X", **keywords)


def _path(text):
    if not text:  # such as "$DIR" of a variable that is not set
        raise argparse.ArgumentTypeError("expected a path, got nothing")
    return text


def _text(value) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _configure(args, presets, out):
    """(settings, pictures) that the options stand for; what they leave open is as in the run to resume."""
    settings = presets[args.preset or "demo"]
    file = out / "config.json"
    if args.resume and not args.preset and file.is_file():
        try:
            saved = json.loads(file.read_text(encoding="utf-8"))
            values = {name: tuple(v) if isinstance(v, list) else v for name, v in saved["settings"].items()}
            settings, args.data = type(settings)(**values), args.data or saved["path"]
            if not isinstance(args.data, str | None):
                raise ValueError(f"path is {_short(args.data)}")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise InputError(f"cannot read {file} ({error}); expected the settings of a {args.command}") from None
        args.preset = settings.dataset if settings.dataset in presets else None
    args.preset = args.preset or "demo"
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(settings) if hasattr(args, f.name)}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    settings = dataclasses.replace(settings, **given)
    return settings, load(settings.dataset, args.data, args.download).first(settings.pictures)


def _to_go_on(arguments, out) -> str:
    """The same command again, with --resume in the place of --out."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--out")
    parser.add_argument("--resume")
    _, others = parser.parse_known_args(arguments)
    _, count = processes()
    start = ["python"] if count == 1 else ["torchrun", f"--nproc-per-node={count}"]
    if count > 1 and os.environ.get("LOCAL_WORLD_SIZE") != str(count):
        start = []  # several machines: their torchrun as before
    return "to go on: " + shlex.join([*start, sys.argv[0], *others, "--resume", str(out)])


def _say(*text):
    """Of several processes the first speaks."""
    if processes()[0] == 0:
        print(*text, flush=True)


def _search_command(args, out):
    config, pictures = _configure(args, SEARCH_PRESETS, out)
    started = time.monotonic()
    _say(
        f"preset {args.preset}: searching on {len(pictures.x_train)} pictures of {pictures.name}, "
        f"{len(config.cells)} stages of {_text(config.cells)} cells and {config.epochs} epochs; results in {out}"
    )
    new, graphs = None if args.resume else out, args.graphs == "auto"
    result = search(config, pictures, new, args.device, args.kernels, graphs, args.resume, show=True)
    _say(f"\nThe cell, after {_duration(time.monotonic() - started)}:\n\n{cell_table(result.genotype)}\n")
    _say(f"written: {out / 'genotype.json'}, normal.svg, reduce.svg, log.jsonl, stages/")
    following = ["python", sys.argv[0], "evaluate", str(out / "genotype.json"), "--preset", args.preset]
    _say("next:   ", shlex.join(following + (["--data", args.data] if args.data else [])))


def _evaluate_command(args, out):
    if args.genotype is None and not args.resume:
        raise InputError("the following arguments are required: genotype (see pdarts.py evaluate --help)")
    genotype = read_genotype(args.genotype or str(out / "genotype.json"))
    if args.weights and (args.resume or args.out):
        raise InputError("--weights only tests; expected no --out or --resume beside it")
    if args.weights and not pathlib.Path(args.weights).is_file():
        raise InputError(f"no weights {args.weights}; expected a file that an evaluation wrote")
    config, pictures = _configure(args, EVALUATE_PRESETS, out)
    if not args.weights:
        _say(
            f"preset {args.preset}: training on {len(pictures.x_train)} pictures of {pictures.name}, "
            f"{config.cells} cells, {config.channels} channels, {config.epochs} epochs; results in {out}"
        )
    new = None if args.resume else out
    result = evaluate(
        genotype, config, pictures, new, args.device, args.weights, args.resume, show=True, kernels=args.kernels
    )
    _say(f"parameters:    {result.cost.parameters / 1e6:.3f} M")
    _say(f"multiply-adds: {result.cost.multiply_adds / 1e6:.1f} M")
    _say(f"test error:    {result.test_error:.2%}")
    if not args.weights:
        _say(f"written:       {out / 'weights.pt'}")


def _draw_command(args, _):
    prefix = args.output if args.output is not None else pathlib.Path(args.genotype).stem + "-"
    genotype = read_genotype(args.genotype)
    folder = pathlib.Path(f"{prefix}x").parent
    if not folder.is_dir():
        raise InputError(f"no folder {folder}; expected one that exists")
    for kind, svg in draw(genotype).items():
        path = pathlib.Path(f"{prefix}{kind}.svg")
        write_whole(path, svg.encode())
        print(path)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be Unicode
    parser = _Parser(prog="pdarts.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    command = commands.add_parser("search", help="search a cell", allow_abbrev=False)
    _add_options(command, SEARCH_PRESETS)
    command.add_argument(
        "--graphs",
        choices=("auto", "off"),
        default="auto",
        help="auto: a GPU replays whole steps as CUDA graphs, but for --unrolled and several GPUs (default: auto)",
    )
    command.set_defaults(run=_search_command)
    command = commands.add_parser("evaluate", help="train and test the network of a cell", allow_abbrev=False)
    command.add_argument("genotype", nargs="?", help=f"{', '.join(GENOTYPES)}, or a genotype.json")
    _add_options(command, EVALUATE_PRESETS)
    command.add_argument("--weights", type=_path, metavar="FILE", help="only test the network with these weights")
    command.set_defaults(run=_evaluate_command)
    command = commands.add_parser("draw", help="draw a cell as SVG", allow_abbrev=False)
    command.add_argument("genotype", help=f"{', '.join(GENOTYPES)}, or a genotype.json")
    command.add_argument(
        "-o", "--output", metavar="PREFIX", help="PREFIXnormal.svg and PREFIXreduce.svg (default: NAME-)"
    )
    command.set_defaults(run=_draw_command)
    arguments = sys.argv[1:] if arguments is None else arguments
    out = None
    try:
        args = parser.parse_args(arguments)
        if [] in vars(args).values():  # "--seed=--", which Python before 3.13 takes for no value
            parser.error("expected a value, got --")
        if args.command == "draw":
            args.run(args, out)
        else:
            with _process_group(args.device) as args.device:
                default = pathlib.Path("runs", f"{args.command}-{time.strftime('%Y%m%d-%H%M%S')}")
                out = gather(Run.path(args.out, args.resume) or default)[0]  # named after one clock
                args.run(args, out)
    except (InputError, OSError) as error:
        print("pdarts.py: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except Stopped as stopped:
        if processes()[0] == 0:
            print(f"pdarts.py: {stopped}; {_to_go_on(arguments, out)}", file=sys.stderr)
        return 128 + stopped.signal_number
    except KeyboardInterrupt:
        print("pdarts.py: interrupted", file=sys.stderr)
        return 130
    except (MemoryError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "you tried to allocate" in reason:
            print("pdarts.py: error: out of memory;", reason, file=sys.stderr)
            return 2
        if processes()[1] == 1:
            raise
        print(
            f"pdarts.py: error: process {processes()[0]} cannot go on ({reason}); {_to_go_on(arguments, out)}",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    status = main()
    if "LOCAL_RANK" in os.environ:  # torch's threads of a process group outlive it, and abort or block Python's own end
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
