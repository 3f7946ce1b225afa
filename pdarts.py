#!/usr/bin/env python3
"""P-DARTS: Progressive Differentiable Architecture Search, in one module that reads like the paper.

    python pdarts.py search                                                  # a small search on generated images
    python pdarts.py search --preset cifar10 --data data --download          # the paper's search
    python pdarts.py evaluate PDARTS --preset cifar10 --data data --download # the paper's evaluation of its cell

Chen, Xie, Wu, Tian: "Progressive Differentiable Architecture Search: Bridging the Depth Gap between Search and
Evaluation", ICCV 2019, arXiv 1904.12760. "The paper" below; "DARTS" is Liu et al., arXiv 1806.09055; "official" is the
code that the paper's authors published.

A cell is a small graph whose edges apply one of 8 candidate operations. During the search every edge applies all of its
candidates, weighted by softmax(alpha); alpha is learned by gradient descent, on the half of the training images that
the weights do not learn from. The search runs in stages with ever deeper networks (5, 11, 17 cells), and each stage
hands on only the strongest candidates of every edge (8, 5, 3). Skip-connects, which win too easily in deep networks,
are held back by dropout during the search and limited to M in the final normal cell.

    for event in Search(CIFAR10, search_data(images, labels, CIFAR10)):
        print(event)

Glossary
    N, C, H, W     images in a batch, channels, height, width
    L, depth       number of cells of a network
    K              number of candidates of an edge in the current stage (|O| in the paper)
    M, max_skips   largest number of skip-connects in the final normal cell
    alphas         architecture parameters, [14 edges, K]: one matrix for normal and one for reduction cells
    probabilities  softmax(alphas), over the candidates of an edge
    candidates     for each of the 14 edges, the names of its K operations, in the order of the search space
    state          a feature map of a cell: 0 and 1 are its inputs, the outputs of the two cells before; 2, 3, ... are
                   its nodes. An edge leads from a state, its source or input, to a later node.
    genotype       the discrete cells: two (operation, source) pairs for each node
    weights        all parameters that are not alphas
    batch          a pair of images, float32 [N,C,H,W], and labels, int64 [N]
    step           one update of the weights, after one of the alphas where they learn; counted from 0 in each epoch
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import reprlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class InputError(ValueError):
    """A setting or an argument cannot be used; the message says which, its value and what was expected."""


# --- Hyper-parameters -------------------------------------------------------------------------------------------------


def setting(
    default: Any, help: str, bounds: tuple[float, float] = (0, 1e30), choices: tuple[str, ...] = ()
) -> dataclasses.Field:
    """Return a field of a config with its default, its meaning and source, and the values that it may have.

    Numbers lie within inclusive `bounds` (far above 1e30 float32 overflows); strings are one of `choices`, if there are
    any. A tuple holds one value for each stage.
    """
    return dataclasses.field(default=default, metadata={"help": help, "bounds": bounds, "choices": choices})


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """The settings of a search. The defaults are the paper's for CIFAR-10 ("paper, search") or the official code's.

    InputError is raised if a value is out of bounds or if two values contradict each other.
    """

    depths: tuple[int, ...] = setting((5, 11, 17), "cells of each stage's network (paper, search)", bounds=(3, 1000))
    keep: tuple[int, ...] = setting((8, 5, 3), "candidates K of an edge in each stage (paper, search)", bounds=(1, 64))
    skip_dropout: tuple[float, ...] = setting((0.0, 0.4, 0.7), "initial skip dropout (paper, search)", bounds=(0, 0.99))
    max_skips: int = setting(2, "skip-connects M that the normal cell may keep (paper, sec. 3.3)", bounds=(0, 10**6))
    channels: int = setting(16, "channels C of the first cell (paper, search)", bounds=(1, 10**4))
    stem: str = setting("cifar", "stem of the network (paper, search)", choices=("cifar", "imagenet"))
    stem_stride: int = setting(1, "stride of the cifar stem (official)", bounds=(1, 8))
    epochs: int = setting(25, "epochs of each stage (paper, search)", bounds=(1, 10**6))
    alpha_start: int = setting(10, "epoch of a stage from which alphas learn (paper, search)", bounds=(0, 10**6))
    batch_size: int = setting(96, "images per step (paper, search)", bounds=(2, 10**6))
    lr: float = setting(0.025, "learning rate of the weights, cosine to 0 (official)")
    momentum: float = setting(0.9, "momentum of the weights (official)", bounds=(0, 1))
    weight_decay: float = setting(3e-4, "weight decay of the weights (official)")
    alpha_lr: float = setting(6e-4, "Adam's learning rate of the alphas (paper, search)")
    alpha_weight_decay: float = setting(1e-3, "weight decay of the alphas (paper, search)")
    clip: float = setting(5.0, "largest gradient norm, of weights and of alphas (official)", bounds=(1e-9, 1e30))
    crop_padding: int = setting(4, "random crop: zeros around the image (official)", bounds=(0, 1000))
    flip: bool = setting(True, "random horizontal flip (official)")
    dtype: str = setting("float32", "type of the feature maps (autocast)", choices=("float32", "bfloat16"))
    seed: int = setting(0, "seed of all random numbers", bounds=(0, 2**63 - 1))

    def __post_init__(self):
        check_settings(self)
        if not len(self.depths) == len(self.keep) == len(self.skip_dropout) > 0:
            raise InputError(
                f"depths {self.depths}, keep {self.keep} and skip_dropout {self.skip_dropout} differ in their numbers "
                "of stages; expected one value for each stage"
            )
        if any(later > earlier for earlier, later in itertools.pairwise(self.keep)):
            raise InputError(f"keep is {self.keep}; expected no stage to keep more candidates than the one before it")
        if self.alpha_start >= self.epochs:
            raise InputError(
                f"alpha_start is {self.alpha_start} of {self.epochs} epochs; expected less, or alphas never learn"
            )


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """The settings of an evaluation, the training of a found cell from scratch. The defaults are those for CIFAR.

    They are the paper's ("paper, evaluation") or the official code's. InputError is raised if a value is out of bounds.
    """

    depth: int = setting(20, "cells of the network (paper, evaluation)", bounds=(3, 1000))
    channels: int = setting(36, "channels C of the first cell (paper, evaluation)", bounds=(1, 10**4))
    stem: str = setting("cifar", "stem of the network (paper, evaluation)", choices=("cifar", "imagenet"))
    stem_stride: int = setting(1, "stride of the cifar stem (official)", bounds=(1, 8))
    epochs: int = setting(600, "epochs (paper, evaluation)", bounds=(1, 10**6))
    batch_size: int = setting(128, "images per step (paper, evaluation)", bounds=(2, 10**6))
    lr: float = setting(0.025, "learning rate (paper, evaluation)")
    schedule: str = setting("cosine", "fall of the lr to 0 (paper, ImageNet: linear)", choices=("cosine", "linear"))
    warmup: int = setting(0, "first epochs, in which the learning rate rises (paper, ImageNet: 5)", bounds=(0, 10**6))
    momentum: float = setting(0.9, "momentum (official)", bounds=(0, 1))
    weight_decay: float = setting(3e-4, "weight decay (paper, evaluation)")
    clip: float = setting(5.0, "largest gradient norm (official)", bounds=(1e-9, 1e30))
    label_smoothing: float = setting(0.0, "label smoothing (paper, ImageNet: 0.1)", bounds=(0, 1))
    auxiliary: bool = setting(True, "auxiliary head after the second reduction cell (paper, evaluation)")
    auxiliary_weight: float = setting(0.4, "weight of the auxiliary loss (paper, evaluation)")
    drop_path: float = setting(0.3, "drop-path rate, reached linearly from 0 (paper, evaluation)", bounds=(0, 0.99))
    cutout: int = setting(16, "side of the square that cutout blanks (paper, evaluation)", bounds=(0, 10**6))
    crop_padding: int = setting(4, "random crop: zeros around the image (official)", bounds=(0, 1000))
    flip: bool = setting(True, "random horizontal flip (official)")
    dtype: str = setting("float32", "type of the feature maps (autocast)", choices=("float32", "bfloat16"))
    seed: int = setting(0, "seed of all random numbers", bounds=(0, 2**63 - 1))

    def __post_init__(self):
        check_settings(self)


def check_settings(config: SearchConfig | EvaluateConfig) -> None:
    """Raise InputError unless each `setting` of the config has the type of its default and a value that it may have."""
    for field in dataclasses.fields(config):
        if not field.metadata:
            continue  # a custom field of a subclass
        value = as_python(getattr(config, field.name))
        if isinstance(field.default, tuple) and isinstance(value, (tuple, list)):
            value = tuple(map(as_python, value))
            for of_stage in value:
                check_setting(field, of_stage, type(field.default[0]))
        else:
            check_setting(field, value, type(field.default))
        object.__setattr__(config, field.name, value)  # the config is frozen


def as_python(value: Any) -> Any:
    """Return Python's numbers for those of numpy and torch, and other values as they are."""
    return value.tolist() if hasattr(value, "tolist") else value


def check_setting(field: dataclasses.Field, value: Any, kind: type) -> None:
    choices = field.metadata["choices"]
    low, high = field.metadata["bounds"]
    fits = type(value) is kind
    expected = {tuple: "one value for each stage", str: "a string", bool: "True or False"}.get(kind)
    if choices:
        fits = fits and value in choices
        expected = " or ".join(choices)
    elif kind in (int, float):
        fits = (fits or type(value) is int) and low <= value <= high  # which NaN is not
        expected = f"{'a whole number' if kind is int else 'a number'} from {low} to {high}"
    if not fits:
        raise InputError(f"{field.name} is {reprlib.repr(value)}; expected {expected}")


CIFAR10 = SearchConfig()
CIFAR100 = SearchConfig(skip_dropout=(0.1, 0.2, 0.3))

# --- Operations and the search space (paper, sec. 3.1) ----------------------------------------------------------------


class Operation(nn.Module):
    """Layers in a row; the last is a batch norm."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.op = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class FactorizedReduce(nn.Module):
    """Halves height and width (rounding up): two 1x1 convolutions of stride 2, the second shifted by one pixel."""

    def __init__(self, in_channels: int, out_channels: int, affine: bool):
        super().__init__()
        self.conv_1 = nn.Conv2d(in_channels, out_channels // 2, 1, stride=2, bias=False)
        self.conv_2 = nn.Conv2d(in_channels, out_channels - out_channels // 2, 1, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, affine=affine)

    def forward(self, x: Tensor) -> Tensor:  # [N,C_in,H,W]
        x = F.relu(x)
        # Only at odd sizes does the stride reach the padded row and column.
        # Deviation: there the second convolution sees zeros, where the official code fails.
        shifted = F.pad(x, (0, 1, 0, 1))[:, :, 1:, 1:]
        return self.bn(torch.cat([self.conv_1(x), self.conv_2(shifted)], dim=1))  # [N,C_out,ceil(H/2),ceil(W/2)]


class Zero(nn.Module):
    """`none`: the absence of an edge."""

    def __init__(self, stride: int):
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x[:, :, :: self.stride, :: self.stride])


def relu_conv_bn(in_channels: int, out_channels: int, affine: bool) -> Operation:
    conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
    return Operation(nn.ReLU(), conv, nn.BatchNorm2d(out_channels, affine=affine))


def depthwise_separable(channels: int, kernel_size: int, stride: int, dilation: int, affine: bool) -> list[nn.Module]:
    """Return the unit of sep_conv and dil_conv: ReLU, depthwise convolution, pointwise convolution, batch norm."""
    padding = dilation * (kernel_size // 2)
    depthwise = nn.Conv2d(channels, channels, kernel_size, stride, padding, dilation, groups=channels, bias=False)
    pointwise = nn.Conv2d(channels, channels, 1, bias=False)
    return [nn.ReLU(), depthwise, pointwise, nn.BatchNorm2d(channels, affine=affine)]


def sep_conv(channels: int, kernel_size: int, stride: int, affine: bool) -> Operation:
    first = depthwise_separable(channels, kernel_size, stride, 1, affine)
    second = depthwise_separable(channels, kernel_size, 1, 1, affine)
    return Operation(*first, *second)


def dil_conv(channels: int, kernel_size: int, stride: int, affine: bool) -> Operation:
    return Operation(*depthwise_separable(channels, kernel_size, stride, 2, affine))


def skip_connect(channels: int, stride: int, affine: bool) -> nn.Module:
    return nn.Identity() if stride == 1 else FactorizedReduce(channels, channels, affine)


def conv_7x1_1x7(channels: int, stride: int, affine: bool) -> nn.Sequential:
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(channels, channels, (1, 7), stride=(1, stride), padding=(0, 3), bias=False),
        nn.Conv2d(channels, channels, (7, 1), stride=(stride, 1), padding=(3, 0), bias=False),
        nn.BatchNorm2d(channels, affine=affine),
    )


class Primitive(NamedTuple):
    """An entry of OPERATIONS.

    build: (channels C, stride, affine) -> a module that maps [N,C,H,W] to [N,C,ceil(H/stride),ceil(W/stride)]; affine:
    whether its batch norms have gamma and beta. norm: whether the search network adds a batch norm after it.
    """

    build: Callable[[int, int, bool], nn.Module]
    norm: bool = False


OPERATIONS = {
    "none": Primitive(lambda c, stride, affine: Zero(stride)),
    "max_pool_3x3": Primitive(lambda c, stride, affine: nn.MaxPool2d(3, stride, padding=1), norm=True),
    "avg_pool_3x3": Primitive(
        lambda c, stride, affine: nn.AvgPool2d(3, stride, padding=1, count_include_pad=False), norm=True
    ),
    "skip_connect": Primitive(skip_connect),
    "sep_conv_3x3": Primitive(lambda c, stride, affine: sep_conv(c, 3, stride, affine)),
    "sep_conv_5x5": Primitive(lambda c, stride, affine: sep_conv(c, 5, stride, affine)),
    "dil_conv_3x3": Primitive(lambda c, stride, affine: dil_conv(c, 3, stride, affine)),
    "dil_conv_5x5": Primitive(lambda c, stride, affine: dil_conv(c, 5, stride, affine)),
    # Two that are not searched, but part of published cells of other papers:
    "sep_conv_7x7": Primitive(lambda c, stride, affine: sep_conv(c, 7, stride, affine)),
    "conv_7x1_1x7": Primitive(conv_7x1_1x7),
}
PRIMITIVES = (  # the candidates of the paper
    "none", "max_pool_3x3", "avg_pool_3x3", "skip_connect",
    "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5",
)
Candidates = tuple[tuple[str, ...], ...]  # for each edge K names, in the order of the search space


def cell_edges(nodes: int) -> tuple[tuple[int, int], ...]:
    """Return (node from 0, source) of every edge in the order of their numbers: each earlier state leads to a node."""
    return tuple((node, source) for node in range(nodes) for source in range(2 + node))


@dataclasses.dataclass(frozen=True)
class SearchSpace:
    """The candidates of an edge, names in OPERATIONS in this order, and the number of nodes in a cell.

    Two candidates have a role in the method: `none`, which is never chosen, and `skip_connect`, which is an nn.Identity
    at stride 1. InputError is raised for a name that is not in OPERATIONS or comes twice, for no name and for no node.
    """

    primitives: tuple[str, ...] = PRIMITIVES
    nodes: int = 4

    def __post_init__(self):
        if unknown := [name for name in self.primitives if name not in OPERATIONS]:
            raise InputError(f"the search space has unknown primitives {unknown}; expected some of {list(OPERATIONS)}")
        if not 0 < len(self.primitives) == len(set(self.primitives)):
            raise InputError(f"the search space has primitives {self.primitives}; expected one or more, each once")
        if type(self.nodes) is not int or self.nodes < 1:
            raise InputError(f"the search space has cells of {self.nodes!r} nodes; expected 1 or more")

    @property
    def edges(self) -> tuple[tuple[int, int], ...]:
        return cell_edges(self.nodes)  # 14 for 4 nodes


SPACE = SearchSpace()

# --- The mixed operation, the cell and the search network (paper, sec. 3.1) -------------------------------------------


def inverted_dropout(x: Tensor, rate: Tensor, like: Tensor) -> Tensor:
    """Zero parts of x with probability `rate`, a tensor with one element, and divide the rest by 1 - rate.

    like: a tensor of the shape of the dropout mask, which is broadcast to the shape of x.
    """
    # At rate 0 nothing is drawn, where this costs nothing to know: a GPU would have to be waited for, and a compiled
    # graph cannot branch on a number in a tensor.
    if rate.is_cpu and not torch.compiler.is_compiling() and rate == 0:
        return x
    kept = torch.rand_like(like, dtype=torch.float32) >= rate
    return x * (kept / (1 - rate)).to(x.dtype)


class SkipDropout(nn.Module):
    """Element-wise dropout after a skip-connect of stride 1 (paper, sec. 3.3); see SearchNetwork.set_skip_dropout."""

    def __init__(self):
        super().__init__()
        self.register_buffer("rate", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return inverted_dropout(x, self.rate, x) if self.training else x


class MixedOp(nn.Module):
    """An edge during the search: all its candidates at once, weighted by softmax(alpha).

    x [N,C,H,W], probabilities [K] -> [N,C,ceil(H/stride),ceil(W/stride)].
    """

    def __init__(self, candidates: tuple[str, ...], channels: int, stride: int):
        super().__init__()
        # `none`, if it is the first of several candidates, adds exactly zero: only its place in the softmax matters.
        self.skip_none = int(candidates[0] == "none" and len(candidates) > 1)
        self.ops = nn.ModuleList()
        for name in candidates[self.skip_none :]:
            op = OPERATIONS[name].build(channels, stride, False)
            if OPERATIONS[name].norm:
                op = Operation(op, nn.BatchNorm2d(channels, affine=False))
            if isinstance(op, nn.Identity):
                op = SkipDropout()
            self.ops.append(op)

    def forward(self, x: Tensor, probabilities: Tensor) -> Tensor:
        # Eq. 1
        return sum(probabilities[k] * op(x) for k, op in enumerate(self.ops, start=self.skip_none))


class SearchCell(nn.Module):
    """A cell of the search network: all candidates on all edges.

    s0 [N,channels_0,H_0,W_0], s1 [N,channels_1,H,W], probabilities [14,K] -> [N,4*channels,H/stride,W/stride], where
    stride is 2 in a reduction cell and 1 in a normal one. reduction_before: the cell before is a reduction cell, so
    that s0 is twice as high and wide as s1.
    """

    def __init__(
        self, candidates: Candidates, channels_0: int, channels_1: int, channels: int,
        reduction: bool, reduction_before: bool, space: SearchSpace = SPACE,
    ):
        super().__init__()
        self.reduction = reduction
        self.nodes = space.nodes
        preprocess = FactorizedReduce if reduction_before else relu_conv_bn
        self.preprocess0 = preprocess(channels_0, channels, affine=False)
        self.preprocess1 = relu_conv_bn(channels_1, channels, affine=False)
        self.edges = nn.ModuleList()
        for names, (_, source) in zip(candidates, space.edges, strict=True):
            self.edges.append(MixedOp(names, channels, stride=2 if reduction and source < 2 else 1))

    def forward(self, s0: Tensor, s1: Tensor, probabilities: Tensor) -> Tensor:
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        offset = 0  # the number of the first edge into the next node
        for _ in range(self.nodes):
            node = sum(self.edges[offset + j](x, probabilities[offset + j]) for j, x in enumerate(states))
            offset += len(states)
            states.append(node)
        return torch.cat(states[2:], dim=1)


def conv_bn(in_channels: int, out_channels: int, stride: int) -> list[nn.Module]:
    conv = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
    return [conv, nn.BatchNorm2d(out_channels)]


def check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if not hasattr(size, "__index__") or size < 1:  # numpy's whole numbers have it too
            raise InputError(f"{name} is {size!r}; expected a whole number from 1")


class Stemmed(nn.Module):
    """A network with one of the two stems, whose feature maps are the inputs of the first cell."""

    def add_stem(self, stem: str, in_channels: int, channels: int, stride: int) -> tuple[int, int, bool]:
        """Build the stem; return the channels of inputs 0 and 1, and whether input 0 is twice as high and wide as 1.

        cifar: a 3x3 convolution to 3*C channels. imagenet: three convolutions of stride 2 to C channels.
        channels: C of the first cell. stride: that of the cifar stem.
        """
        least = {"cifar": 1, "imagenet": 2}.get(str(stem))
        if least is None or channels < least:
            raise InputError(f"stem is {stem!r} of {channels} channels; expected 'cifar' of 1, 'imagenet' of 2 or more")
        if stem == "cifar":
            self.stem = nn.Sequential(*conv_bn(in_channels, 3 * channels, stride))
            return 3 * channels, 3 * channels, False
        half = channels // 2
        self.stem0 = nn.Sequential(*conv_bn(in_channels, half, 2), nn.ReLU(), *conv_bn(half, channels, 2))
        self.stem1 = nn.Sequential(nn.ReLU(), *conv_bn(channels, channels, 2))
        return channels, channels, True

    def first_states(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs 0 and 1 of the first cell."""
        if hasattr(self, "stem"):
            s0 = s1 = self.stem(images)  # [N,3*C,ceil(H/stride),ceil(W/stride)]
        else:
            s0 = self.stem0(images)  # [N,C,ceil(H/4),ceil(W/4)]
            s1 = self.stem1(s0)  # [N,C,ceil(H/8),ceil(W/8)]
        return s0, s1


class SearchNetwork(Stemmed):
    """The supernet of one stage: images [N,in_channels,H,W] -> logits [N,num_classes].

    channels: C of the first cell. depth: L, at least 3; the reduction cells L//3 and 2L//3 double the channels and
    halve height and width. alphas_normal, alphas_reduce: parameters [14,K], shared by all cells of the kind, drawn from
    1e-3 * N(0,1). InputError is raised unless all edges have as many candidates, which follow the order of the space.
    """

    def __init__(
        self, channels: int, num_classes: int, depth: int, candidates_normal: Candidates, candidates_reduce: Candidates,
        stem: str = "cifar", in_channels: int = 3, stem_stride: int = 1, space: SearchSpace = SPACE,
    ):
        super().__init__()
        reductions = reduction_cells(depth)
        check_sizes(channels=channels, num_classes=num_classes, in_channels=in_channels, stem_stride=stem_stride)
        for candidates in (candidates_normal, candidates_reduce):
            for names in check_candidates(candidates, len(space.edges)):
                if names != tuple(name for name in space.primitives if name in names):
                    raise InputError(f"candidates {names}; expected one or more of {space.primitives}, in this order")
        channels_0, channels_1, reduction_before = self.add_stem(stem, in_channels, channels, stem_stride)
        self.cells = nn.ModuleList()
        for i in range(depth):
            reduction = i in reductions
            if reduction:
                channels *= 2
            candidates = candidates_reduce if reduction else candidates_normal
            cell = SearchCell(candidates, channels_0, channels_1, channels, reduction, reduction_before, space)
            self.cells.append(cell)
            channels_0, channels_1 = channels_1, space.nodes * channels
            reduction_before = reduction
        self.classifier = nn.Linear(channels_1, num_classes)
        self.alphas_normal = nn.Parameter(1e-3 * torch.randn(len(candidates_normal), len(candidates_normal[0])))
        self.alphas_reduce = nn.Parameter(1e-3 * torch.randn(len(candidates_reduce), len(candidates_reduce[0])))

    def set_skip_dropout(self, rate: float) -> None:
        for module in self.modules():
            if isinstance(module, SkipDropout):
                module.rate.fill_(rate)

    def alphas(self) -> list[nn.Parameter]:
        return [self.alphas_normal, self.alphas_reduce]

    def weights(self) -> list[nn.Parameter]:
        return [p for name, p in self.named_parameters() if name not in ("alphas_normal", "alphas_reduce")]

    def forward(self, images: Tensor) -> Tensor:
        probabilities_normal = self.alphas_normal.softmax(dim=1)
        probabilities_reduce = self.alphas_reduce.softmax(dim=1)
        s0, s1 = self.first_states(images)
        for cell in self.cells:
            probabilities = probabilities_reduce if cell.reduction else probabilities_normal
            s0, s1 = s1, cell(s0, s1, probabilities)
        return self.classifier(s1.mean(dim=(2, 3)))


def reduction_cells(depth: int) -> tuple[int, int]:
    """Return the positions of the two reduction cells, from 0."""
    if not hasattr(depth, "__index__") or depth < 3:
        raise InputError(f"depth is {depth!r}; expected at least 3 cells, two of them reduction cells")
    return depth // 3, 2 * depth // 3


def check_candidates(candidates: Sequence[Sequence[str]], edges: int | None = None) -> Candidates:
    """Return the candidates as tuples; raise InputError unless all edges of a cell, of any size, have as many."""
    candidates = tuple(map(tuple, candidates))
    lengths = [len(names) for names in candidates]
    numbers = [edges] if edges else [len(cell_edges(nodes)) for nodes in range(1, len(candidates))]
    if len(set(lengths)) != 1 or 0 in lengths or len(candidates) not in numbers:
        raise InputError(f"candidates have lengths {lengths}; expected equal ones, {edges or '2, 5, 9, ...'} of them")
    return candidates


# --- From stage to stage: search space approximation (paper, sec. 3.2) and the skip dropout (sec. 3.3) ----------------


def shrink(candidates: Candidates, alphas: Tensor, keep: int) -> Candidates:
    """Search space approximation: return the `keep` candidates of every edge with the largest softmax(alpha).

    candidates: 14 tuples of K names; alphas: [14,K]. The result is 14 tuples of `keep` names in their old order. `none`
    competes like any other candidate. InputError is raised if `keep` or the shape of the alphas does not fit.
    """
    candidates = check_candidates(candidates)
    if not 1 <= keep <= len(candidates[0]):
        raise InputError(f"keep is {keep}; expected 1 to {len(candidates[0])}, the candidates that there are")
    shrunk = []
    for names, p in zip(candidates, edge_probabilities(candidates, alphas)):
        # Of equally strong candidates the first is dropped first.
        weakest_first = sorted(range(len(names)), key=lambda k: (p[k], k))
        kept = sorted(weakest_first[-keep:])
        shrunk.append(tuple(names[k] for k in kept))
    return tuple(shrunk)


def edge_probabilities(candidates: Candidates, alphas: Tensor) -> list[list[float]]:
    """Return softmax(alphas) as K numbers for each edge; raise InputError if alphas do not fit the candidates."""
    alphas = torch.as_tensor(alphas).detach()
    expected = [len(candidates), len(candidates[0])]
    if list(alphas.shape) != expected:
        raise InputError(f"alphas have shape {list(alphas.shape)}; expected {expected}")
    probabilities = alphas.softmax(dim=1)
    if not probabilities.isfinite().all():
        raise InputError("alphas hold numbers that are not finite; expected finite ones (a lower alpha_lr may help)")
    return probabilities.tolist()


def skip_dropout_rate(initial: float, epoch: int, epochs: int = 25, alpha_start: int = 10) -> float:
    """Return the dropout rate after skip-connects in `epoch` (from 0) of a stage.

    From `initial` the rate falls linearly while weights learn alone. When alphas start to learn, it starts from
    `initial` again and falls exponentially (official; the paper only says that it decays).
    """
    if epoch < alpha_start:
        return initial * (epochs - 1 - epoch) / epochs
    return initial * math.exp(-0.2 * (epoch - alpha_start))


# --- From alphas to the cell: derivation and architecture refinement (paper, sec. 3.3) --------------------------------


class Genotype(NamedTuple):
    """The discrete cells. normal, reduce: (operation, source) pairs, two for each node, node by node.

    normal_concat, reduce_concat: the states whose concatenation is the output of the cell.
    """

    normal: list[tuple[str, int]]
    normal_concat: list[int]
    reduce: list[tuple[str, int]]
    reduce_concat: list[int]


class ChosenEdge(NamedTuple):
    """An edge of a derived cell with its strongest candidate and the probability of this candidate."""

    number: int  # among all edges, see cell_edges
    source: int
    operation: str
    probability: float


def derive(
    candidates_normal: Candidates, candidates_reduce: Candidates, alphas_normal: Tensor, alphas_reduce: Tensor,
    max_skips: int | None = 2,
) -> Genotype:
    """Return the cells that candidates (14 tuples of K names) and alphas ([14,K]) stand for.

    The normal cell keeps at most `max_skips` (M) skip-connects; None sets no limit. InputError is raised if an edge has
    no candidate but `none`, or if no normal cell has so few skip-connects.
    """
    candidates_normal = check_candidates(candidates_normal)
    candidates_reduce = check_candidates(candidates_reduce)
    probabilities_normal = edge_probabilities(candidates_normal, alphas_normal)
    probabilities_reduce = edge_probabilities(candidates_reduce, alphas_reduce)
    if max_skips is None:
        edges_normal = strongest_edges(candidates_normal, probabilities_normal)
    else:
        edges_normal = refine(candidates_normal, probabilities_normal, max_skips)
    edges_reduce = strongest_edges(candidates_reduce, probabilities_reduce)
    return Genotype(
        normal=[(edge.operation, edge.source) for edge in edges_normal],
        normal_concat=list(range(2, 2 + len(edges_normal) // 2)),
        reduce=[(edge.operation, edge.source) for edge in edges_reduce],
        reduce_concat=list(range(2, 2 + len(edges_reduce) // 2)),
    )


def strongest_edges(candidates: Candidates, probabilities: list[list[float]]) -> list[ChosenEdge]:
    """Return the two strongest edges into each node, in the order of their numbers.

    The operation of an edge is its strongest candidate other than `none`, whose probability is the edge's strength.
    """
    nodes = next(nodes for nodes in itertools.count(1) if len(cell_edges(nodes)) == len(candidates))
    into_node: list[list[ChosenEdge]] = [[] for _ in range(nodes)]
    for number, (node, source) in enumerate(cell_edges(nodes)):
        names, p = candidates[number], probabilities[number]
        allowed = [k for k, name in enumerate(names) if name != "none"]
        if not allowed:
            raise InputError(f"edge {number} has no candidate but none; expected an operation to choose")
        # Of equally strong candidates the last is chosen, as in shrink.
        strongest = max(allowed, key=lambda k: (p[k], k))
        into_node[node].append(ChosenEdge(number, source, names[strongest], p[strongest]))
    chosen = []
    for edges in into_node:
        # Of equally strong edges those from later states are chosen.
        weakest_first = sorted(edges, key=lambda edge: (edge.probability, edge.number))
        chosen += sorted(weakest_first[-2:], key=lambda edge: edge.number)
    return chosen


# The probability of a skip-connect that refinement has removed: it is below all others, even one that rounds to 0.
REMOVED = -1.0


def refine(candidates: Candidates, probabilities: list[list[float]], max_skips: int) -> list[ChosenEdge]:
    """Architecture refinement: return the strongest edges of a cell with at most `max_skips` (M) skip-connects.

    While a cell has more, the weakest of them is removed, and candidates *and* edges are chosen again: another edge may
    come in and bring its own skip-connect.
    """
    probabilities = [list(p) for p in probabilities]  # a copy
    while True:
        edges = strongest_edges(candidates, probabilities)
        skips = [edge for edge in edges if edge.operation == "skip_connect"]
        if len(skips) <= max_skips:
            return edges
        # An edge with no other candidate still has the skip-connect that was removed.
        skips = [edge for edge in skips if edge.probability != REMOVED]
        if not skips:
            raise InputError(f"edges have no candidate but skip_connect; no normal cell has max_skips={max_skips}")
        # Of equally weak skip-connects that of the first edge is removed.
        weakest = min(skips, key=lambda edge: (edge.probability, edge.number))
        k = candidates[weakest.number].index("skip_connect")
        probabilities[weakest.number][k] = REMOVED


# --- The architect: the update of the alphas (DARTS, sec. 2.3) --------------------------------------------------------


def identity(x: Any) -> Any:
    return x


def require_gradients(parameters: Iterable[nn.Parameter], not_of: Iterable[nn.Parameter] = ()) -> None:
    """Let the next backward pass compute gradients of `parameters` and, to save time, none of the others."""
    for p in not_of:
        p.requires_grad_(False)
    for p in parameters:
        p.requires_grad_(True)


def in_layout_of(p: Tensor, x: Tensor) -> Tensor:
    """Return x in the memory format of p: a fused optimizer goes through both in the order of their memory."""
    return x if x.stride() == p.stride() else torch.empty_like(p).copy_(x)


def apply_gradients(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], gradients: Gradients, clip: float
) -> None:
    """Update the parameters along the gradients, whose norm is clipped to `clip` first."""
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = None if gradient is None else in_layout_of(p, gradient)
    nn.utils.clip_grad_norm_(parameters, clip)
    optimizer.step()


def loss_and_logits(
    network: nn.Module, images: Tensor, labels: Tensor, dtype: str = "float32",
    auxiliary_weight: float = 0.0, label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy, a scalar, and the logits [N,num_classes] of a batch.

    The feature maps have `dtype`; weights, statistics and losses stay float32.
    """
    with torch.autocast(images.device.type, getattr(torch, dtype), enabled=dtype != "float32"):
        logits = network(images)
        auxiliary_logits = None
        if isinstance(logits, tuple):  # a Network in training
            logits, auxiliary_logits = logits
        loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        if auxiliary_logits is not None:
            loss = loss + auxiliary_weight * F.cross_entropy(auxiliary_logits, labels, label_smoothing=label_smoothing)
    return loss, logits


class Architect:
    """Updates the alphas of a SearchNetwork by Adam, to lower the loss on images that the weights do not learn from.

    First order: the gradient is that at the present weights. betas: Adam's (DARTS). weight_optimizer: that of the
    weights, for architects that look one update of the weights ahead, such as DARTS's second order. average: see the
    end of this file.
    """

    def __init__(
        self, network: SearchNetwork, lr: float = 6e-4, betas: tuple[float, float] = (0.5, 0.999),
        weight_decay: float = 1e-3, clip: float = 5.0, dtype: str = "float32", average: Average = identity,
        weight_optimizer: torch.optim.Optimizer | None = None,
    ):
        self.network = network
        self.weights = network.weights()
        self.alphas = network.alphas()
        self.clip = clip
        self.dtype = dtype
        self.average = average
        self.weight_optimizer = weight_optimizer
        capturable = self.alphas[0].is_cuda  # as a CUDA graph needs it
        self.optimizer = torch.optim.Adam(self.alphas, lr, betas, weight_decay=weight_decay, capturable=capturable)

    def update(
        self, images: Tensor, labels: Tensor, train_images: Tensor | None = None, train_labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Update the alphas by a batch of the validation split; return its loss and logits before the update.

        train_images, train_labels: the batch by which the weights are updated next; the first order ignores it.
        """
        loss, logits, gradients = self.gradients(images, labels, train_images, train_labels)
        apply_gradients(self.optimizer, self.alphas, gradients, self.clip)
        return loss.detach(), logits.detach()

    def gradients(
        self, images: Tensor, labels: Tensor, train_images: Tensor | None, train_labels: Tensor | None
    ) -> tuple[Tensor, Tensor, Gradients]:
        """Return the loss and the logits of the validation batch, and the gradients of the alphas."""
        require_gradients(self.alphas, not_of=self.weights)
        loss, logits = self.loss(images, labels)
        return loss, logits, self.average(torch.autograd.grad(loss, self.alphas))

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss that the alphas descend, and the logits. A subclass may add a regulariser here."""
        return loss_and_logits(self.network, images, labels, self.dtype)


# --- The search (paper, sec. 3.2) -------------------------------------------------------------------------------------


class Step(NamedTuple):
    """The end of a step: the mean loss and the number of correct predictions, tensors, of `size` images.

    alpha_*: the same of the batch by which the alphas were updated before the weights, if they were.
    """

    loss: Tensor
    correct: Tensor
    alpha_loss: Tensor | None = None
    alpha_correct: Tensor | None = None
    size: int = 0
    alpha_size: int = 0


class Epoch(NamedTuple):
    """The end of an epoch (from 0) of a stage (from 0, which is that of an Evaluation).

    lr: its learning rate. rate: that of the skip dropout, or in an Evaluation that of drop-path.
    """

    stage: int
    epoch: int
    lr: float
    rate: float


class Stage(NamedTuple):
    """The end of a stage: the candidates (14 tuples of K names) and the alphas ([14,K], on the CPU) of both cells."""

    candidates_normal: Candidates
    candidates_reduce: Candidates
    alphas_normal: Tensor
    alphas_reduce: Tensor

    def genotype(self, max_skips: int | None = 2) -> Genotype:
        return derive(*self, max_skips)


def cosine(lr: float, epoch: int, epochs: int) -> float:
    """Return the learning rate of `epoch` (from 0), which falls from `lr` towards 0."""
    # Deviation: the official code, on a current torch, is an epoch ahead of this.
    return lr * (1 + math.cos(math.pi * epoch / epochs)) / 2


def sgd(weights: list[nn.Parameter], config: SearchConfig | EvaluateConfig) -> torch.optim.SGD:
    """Return the optimizer of the weights. Its learning rate is a tensor, so that a captured step sees new values."""
    device = weights[0].device
    lr = torch.tensor(config.lr, device=device)
    fused = device.type in ("cpu", "cuda")
    return torch.optim.SGD(weights, lr, config.momentum, weight_decay=config.weight_decay, fused=fused)


class Search:
    """The progressive search as an iterable: stage after stage a deeper network with fewer candidates.

    The iteration yields a `Step` after each step, an `Epoch` after the last step of an epoch and a `Stage` after the
    last epoch of a stage. architect: the class that updates the alphas. prepare, average, wrap_step, rank: see the
    end of this file. InputError is raised if the config does not fit the space or if there is no validation split.
    Torch's random state is one for all threads of a process: only one search or evaluation may run in it at a time.
    """

    def __init__(
        self, config: SearchConfig, data: Data, device: torch.device | str = "cpu", space: SearchSpace = SPACE,
        prepare: Prepare = identity, average: Average = identity, wrap_step: WrapStep = identity, rank: int = 0,
        architect: type[Architect] = Architect,
    ):
        if config.keep[0] != len(space.primitives):
            raise InputError(f"keep starts with {config.keep[0]}; expected {len(space.primitives)}, all primitives")
        least = 1 + len({"none", "skip_connect"} & set(space.primitives))
        if config.keep[-1] < least:  # with these two gone, one candidate must be left for the refinement
            raise InputError(f"keep ends with {config.keep[-1]}; expected at least {least} in the last stage")
        if data.val is None:
            raise InputError("data.val is None; expected the validation split, from which the alphas learn")
        self.config = config
        self.data = data
        self.device = torch.device(device)
        self.space = space
        self.prepare = prepare
        self.average = average
        self.wrap_step = wrap_step
        self.rank = rank
        self.architect_class = architect
        self.stages: list[Stage] = []  # that have ended
        self.network: SearchNetwork | None = None  # of the stage that has begun
        self.epoch = 0  # of this stage
        self.step = 0  # of this epoch

    def __iter__(self) -> Iterator[Step | Epoch | Stage]:
        config = self.config
        while len(self.stages) < len(config.depths):
            stage = len(self.stages)
            if self.network is None:
                self.begin_stage()
            while self.epoch < config.epochs:
                lr = cosine(config.lr, self.epoch, config.epochs)
                rate = skip_dropout_rate(config.skip_dropout[stage], self.epoch, config.epochs, config.alpha_start)
                self.weight_optimizer.param_groups[0]["lr"].fill_(lr)
                self.network.train()
                self.network.set_skip_dropout(rate)
                for train_batch, val_batch in self.batches(seed_of(config.seed, stage, self.epoch)):
                    torch.manual_seed(seed_of(config.seed, stage, self.epoch, self.step, self.rank))  # of dropout
                    results = self.run_step(*train_batch, *val_batch)
                    self.step += 1  # before the yield: a state that is saved there resumes after this step
                    alpha_size = len(val_batch[1]) if val_batch else 0
                    yield Step(*results, size=len(train_batch[1]), alpha_size=alpha_size)
                self.epoch += 1
                self.step = 0
                yield Epoch(stage, self.epoch - 1, lr, rate)
            alphas_normal, alphas_reduce = (alpha.detach().cpu() for alpha in self.network.alphas())
            self.stages.append(Stage(self.candidates_normal, self.candidates_reduce, alphas_normal, alphas_reduce))
            self.network = None
            self.epoch = 0
            yield self.stages[-1]

    def begin_stage(self) -> None:
        """Build a deeper network with fewer candidates; weights, alphas and optimizers are new (paper, sec. 3.2)."""
        config = self.config
        stage = len(self.stages)
        if stage == 0:
            self.candidates_normal = (self.space.primitives,) * len(self.space.edges)
            self.candidates_reduce = self.candidates_normal
        else:
            before = self.stages[-1]
            self.candidates_normal = shrink(before.candidates_normal, before.alphas_normal, config.keep[stage])
            self.candidates_reduce = shrink(before.candidates_reduce, before.alphas_reduce, config.keep[stage])
        torch.manual_seed(seed_of(config.seed, stage))
        network = SearchNetwork(
            config.channels, self.data.num_classes, config.depths[stage], self.candidates_normal,
            self.candidates_reduce, config.stem, self.data.in_channels, config.stem_stride, self.space,
        )
        self.network = self.prepare(network.to(self.device))
        self.weights = self.network.weights()
        self.weight_optimizer = sgd(self.weights, config)
        self.architect = self.architect_class(
            self.network, config.alpha_lr, weight_decay=config.alpha_weight_decay, clip=config.clip, dtype=config.dtype,
            average=self.average, weight_optimizer=self.weight_optimizer,
        )
        self.run_step = self.wrap_step(self.alternate)

    def batches(self, seed: int) -> Iterator[tuple[Batch, Batch | tuple[()]]]:
        """Return the train and the validation batch, () while weights learn alone, of each step left in the epoch."""
        if self.epoch < self.config.alpha_start:
            val_batches = itertools.repeat(())
        else:
            val_batches = endless(self.data.val, seed, self.step)
        return zip(self.data.train.epoch(seed, self.step), val_batches)

    def alternate(
        self, images: Tensor, labels: Tensor, val_images: Tensor | None = None, val_labels: Tensor | None = None
    ) -> list[Tensor]:
        """Update the alphas by the validation batch, if there is one, and then the weights by the train batch.

        The result is the loss and the number of correct predictions of the train batch, then of the validation batch.
        """
        val_results = []
        if val_images is not None:
            val_loss, val_logits = self.architect.update(val_images, val_labels, images, labels)
            val_results = [val_loss, (val_logits.argmax(1) == val_labels).sum()]
        require_gradients(self.weights, not_of=self.network.alphas())
        loss, logits = loss_and_logits(self.network, images, labels, self.config.dtype)
        gradients = self.average(torch.autograd.grad(loss, self.weights))
        apply_gradients(self.weight_optimizer, self.weights, gradients, self.config.clip)
        return [loss.detach(), (logits.argmax(1) == labels).sum(), *val_results]

    def genotype(self) -> Genotype:
        """Return the cells of the last stage that has ended."""
        return self.stages[-1].genotype(self.config.max_skips)


def endless(loader: EpochLoader, seed: int, start: int) -> Iterator[Batch]:
    """Yield the batches of one epoch of the loader after the other, from batch `start` on."""
    first, start = divmod(start, len(loader))
    for number in itertools.count(first):
        yield from loader.epoch(seed_of(seed, number), start if number == first else 0)


# --- The evaluation network (paper, sec. 4) ---------------------------------------------------------------------------


class DropPath(nn.Module):
    """Drop-path: drops whole samples of x [N,C,H,W] in training (paper, evaluation); see Network.set_drop_path."""

    def __init__(self):
        super().__init__()
        self.register_buffer("rate", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return inverted_dropout(x, self.rate, x[:, :1, :1, :1]) if self.training else x


class Cell(nn.Module):
    """A cell of the evaluation network, made of the (operation, source) pairs of a genotype.

    s0 [N,channels_0,H_0,W_0], s1 [N,channels_1,H,W] -> [N,len(concat)*channels,H/stride,W/stride], where stride is 2 in
    a reduction cell and 1 in a normal one. reduction_before: as in SearchCell. InputError is raised for a wrong pair or
    concat.
    """

    def __init__(
        self, pairs: Sequence[tuple[str, int]], concat: Sequence[int], channels_0: int, channels_1: int, channels: int,
        reduction: bool, reduction_before: bool,
    ):
        super().__init__()
        check_cell(pairs, concat)
        preprocess = FactorizedReduce if reduction_before else relu_conv_bn
        self.preprocess0 = preprocess(channels_0, channels, affine=True)
        self.preprocess1 = relu_conv_bn(channels_1, channels, affine=True)
        self.concat = concat
        self.sources = [source for _, source in pairs]
        self._ops = nn.ModuleList()  # as in the official state_dict
        self.drop_paths = nn.ModuleList()
        for name, source in pairs:
            op = OPERATIONS[name].build(channels, 2 if reduction and source < 2 else 1, True)
            self._ops.append(op)
            # Identities are not dropped (official).
            self.drop_paths.append(nn.Identity() if isinstance(op, nn.Identity) else DropPath())

    def forward(self, s0: Tensor, s1: Tensor) -> Tensor:
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        for i in range(0, len(self.sources), 2):  # two edges into each node
            a = self.drop_paths[i](self._ops[i](states[self.sources[i]]))
            b = self.drop_paths[i + 1](self._ops[i + 1](states[self.sources[i + 1]]))
            states.append(a + b)
        return torch.cat([states[i] for i in self.concat], dim=1)


def check_cell(pairs: Sequence[tuple[str, int]], concat: Sequence[int]) -> None:
    """Raise InputError unless these are the pairs and the concatenated states of a cell of a genotype."""
    if not isinstance(pairs, (list, tuple)) or not pairs or len(pairs) % 2:
        found = f"{len(pairs)} pairs" if isinstance(pairs, (list, tuple)) else f"the pairs {pairs!r}"
        raise InputError(f"a cell has {found}; expected two for each node")
    for i, pair in enumerate(pairs):
        is_pair = isinstance(pair, (list, tuple)) and len(pair) == 2
        if not is_pair or pair[0] not in list(OPERATIONS) or pair[1] not in range(2 + i // 2):
            raise InputError(
                f"pair {i} of a cell is {pair!r}; expected one of {', '.join(OPERATIONS)} and an input from 0 to "
                f"{1 + i // 2}"
            )
    last = 1 + len(pairs) // 2
    is_list = isinstance(concat, (list, tuple, range))
    if not is_list or not concat or any(state not in range(2, last + 1) for state in concat):
        raise InputError(f"the concat of a cell is {concat}; expected states from 2 to {last}")


class PoolTo2x2(nn.Module):
    """Average pooling to 2x2 with overlap: at 8x8 and 7x7 exactly the official heads' 5x5 windows, stride 3 and 2."""

    # Deviation: at other sizes the windows adapt, where the official heads fail or see a part of the map.

    def forward(self, x: Tensor) -> Tensor:
        windows = [min(math.ceil(5 * size / 8), size - 1) for size in x.shape[2:]]
        strides = [size - window for size, window in zip(x.shape[2:], windows)]
        if not torch.compiler.is_compiling():
            return F.avg_pool2d(x, windows, strides)
        for dim, window, stride in zip((2, 3), windows, strides):  # the same means, in one graph for all sizes
            x = torch.stack([x.narrow(dim, start, window).mean(dim) for start in (0, stride)], dim)
        return x


class AuxiliaryHead(nn.Module):
    """A classifier after two thirds of the cells, in training only: [N,C,H,W], H, W >= 2 -> logits [N,num_classes]."""

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.features = nn.Sequential(
            nn.ReLU(), PoolTo2x2(),
            nn.Conv2d(channels, 128, 1, bias=False), nn.BatchNorm2d(128), nn.ReLU(),
            nn.Conv2d(128, 768, 2, bias=False), nn.BatchNorm2d(768), nn.ReLU(),
        )
        self.classifier = nn.Linear(768, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


class Network(Stemmed):
    """The network of a genotype, with the keys and shapes of the official networks' state_dict.

    Images [N,in_channels,H,W] -> logits [N,num_classes]; in training a pair of logits and auxiliary logits, which are
    None without the auxiliary head. channels: C of the first cell. depth: L, at least 3; the reduction cells L//3 and
    2L//3 double the channels and halve height and width.
    """

    def __init__(
        self, genotype: Genotype, channels: int, num_classes: int, depth: int, auxiliary: bool = False,
        stem: str = "cifar", in_channels: int = 3, stem_stride: int = 1,
    ):
        super().__init__()
        reductions = reduction_cells(depth)
        check_sizes(channels=channels, num_classes=num_classes, in_channels=in_channels, stem_stride=stem_stride)
        if not all(hasattr(genotype, field) for field in Genotype._fields):
            raise InputError(f"genotype is a {type(genotype).__name__}; expected a Genotype, as GENOTYPES['PDARTS'] is")
        channels_0, channels_1, reduction_before = self.add_stem(stem, in_channels, channels, stem_stride)
        self.cells = nn.ModuleList()
        self.auxiliary_head = None
        self.auxiliary_cell = reductions[1]
        for i in range(depth):
            reduction = i in reductions
            if reduction:
                channels *= 2
                pairs, concat = genotype.reduce, genotype.reduce_concat
            else:
                pairs, concat = genotype.normal, genotype.normal_concat
            self.cells.append(Cell(pairs, concat, channels_0, channels_1, channels, reduction, reduction_before))
            channels_0, channels_1 = channels_1, len(concat) * channels
            reduction_before = reduction
            if auxiliary and i == self.auxiliary_cell:
                self.auxiliary_head = AuxiliaryHead(channels_1, num_classes)
        self.classifier = nn.Linear(channels_1, num_classes)

    def set_drop_path(self, rate: float) -> None:
        for module in self.modules():
            if isinstance(module, DropPath):
                module.rate.fill_(rate)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        s0, s1 = self.first_states(images)
        auxiliary_logits = None
        for i, cell in enumerate(self.cells):
            s0, s1 = s1, cell(s0, s1)
            if i == self.auxiliary_cell and self.training and self.auxiliary_head is not None:
                auxiliary_logits = self.auxiliary_head(s1)
        logits = self.classifier(s1.mean(dim=(2, 3)))
        return (logits, auxiliary_logits) if self.training else logits


def parse_genotype(normal: str, reduce: str) -> Genotype:
    """Read both cells from "operation source, operation source | ...": | parts nodes, all of which are concatenated."""
    pairs = []
    for text in (normal, reduce):
        words = [pair.split() for pair in text.replace("|", ",").split(",")]
        pairs.append([(name, int(source)) for name, source in words])
    concats = [list(range(2, 2 + len(cell) // 2)) for cell in pairs]
    return Genotype(pairs[0], concats[0], pairs[1], concats[1])


GENOTYPES = {
    "PDARTS": parse_genotype(
        "skip_connect 0, dil_conv_3x3 1 | skip_connect 0, sep_conv_3x3 1 | "
        "sep_conv_3x3 1, sep_conv_3x3 3 | sep_conv_3x3 0, dil_conv_5x5 4",
        "avg_pool_3x3 0, sep_conv_5x5 1 | sep_conv_3x3 0, dil_conv_5x5 2 | "
        "max_pool_3x3 0, dil_conv_3x3 1 | dil_conv_3x3 1, dil_conv_5x5 3",
    ),
    "DARTS_V1": parse_genotype(  # found by DARTS's first order
        "sep_conv_3x3 1, sep_conv_3x3 0 | skip_connect 0, sep_conv_3x3 1 | "
        "skip_connect 0, sep_conv_3x3 1 | sep_conv_3x3 0, skip_connect 2",
        "max_pool_3x3 0, max_pool_3x3 1 | skip_connect 2, max_pool_3x3 0 | "
        "max_pool_3x3 0, skip_connect 2 | skip_connect 2, avg_pool_3x3 0",
    ),
    "DARTS_V2": parse_genotype(  # and by its second order
        "sep_conv_3x3 0, sep_conv_3x3 1 | sep_conv_3x3 0, sep_conv_3x3 1 | "
        "sep_conv_3x3 1, skip_connect 0 | skip_connect 0, dil_conv_3x3 2",
        "max_pool_3x3 0, max_pool_3x3 1 | skip_connect 2, max_pool_3x3 1 | "
        "max_pool_3x3 0, skip_connect 2 | skip_connect 2, max_pool_3x3 1",
    ),
}

# --- The evaluation (paper, sec. 4): the network of a genotype, trained from scratch ----------------------------------


def linear(lr: float, epoch: int, epochs: int) -> float:
    """Return the learning rate of `epoch` (from 0), which falls evenly; the last 5 epochs share one fall (official)."""
    last = min(5, epochs - 1)
    left = epochs - epoch
    fall = lr / (epochs - last)
    return fall * (left - last if left > last else left / last)


class Evaluation:
    """The training as an iterable of a `Step` after each step and an `Epoch` after each epoch.

    prepare, average, wrap_step, rank: see the end of this file.
    """

    def __init__(
        self, genotype: Genotype, config: EvaluateConfig, data: Data, device: torch.device | str = "cpu",
        prepare: Prepare = identity, average: Average = identity, wrap_step: WrapStep = identity, rank: int = 0,
    ):
        self.config = config
        self.data = data
        self.average = average
        self.rank = rank
        torch.manual_seed(seed_of(config.seed))
        network = Network(
            genotype, config.channels, data.num_classes, config.depth, config.auxiliary,
            config.stem, data.in_channels, config.stem_stride,
        )
        self.network = prepare(network.to(device))
        self.weights = list(self.network.parameters())
        self.weight_optimizer = sgd(self.weights, config)
        self.run_step = wrap_step(self.train)
        self.epoch = 0
        self.step = 0  # of this epoch

    def __iter__(self) -> Iterator[Step | Epoch]:
        config = self.config
        schedule = {"cosine": cosine, "linear": linear}[config.schedule]
        while self.epoch < config.epochs:
            lr = schedule(config.lr, self.epoch, config.epochs) * min(1, (self.epoch + 1) / max(config.warmup, 1))
            rate = config.drop_path * self.epoch / config.epochs
            self.weight_optimizer.param_groups[0]["lr"].fill_(lr)
            self.network.train()
            self.network.set_drop_path(rate)
            for images, labels in self.data.train.epoch(seed_of(config.seed, self.epoch), self.step):
                torch.manual_seed(seed_of(config.seed, self.epoch, self.step, self.rank))  # of drop-path
                results = self.run_step(images, labels)
                self.step += 1  # before the yield, as in Search
                yield Step(*results, size=len(labels))
            self.epoch += 1
            self.step = 0
            yield Epoch(0, self.epoch - 1, lr, rate)

    def train(self, images: Tensor, labels: Tensor) -> list[Tensor]:
        """Update the weights by a batch; return its loss and its number of correct predictions."""
        config = self.config
        loss, logits = loss_and_logits(
            self.network, images, labels, config.dtype, config.auxiliary_weight, config.label_smoothing
        )
        # Nodes that a genotype leaves out of its output have no gradients.
        gradients = self.average(torch.autograd.grad(loss, self.weights, allow_unused=True))
        apply_gradients(self.weight_optimizer, self.weights, gradients, config.clip)
        return [loss.detach(), (logits.argmax(1) == labels).sum()]


@torch.no_grad()
def correct_predictions(
    network: nn.Module, batches: Iterable[Batch], dtype: str = "float32", top: Sequence[int] = (1,)
) -> tuple[int, ...]:
    """Return numbers of images: for each k of `top` of those whose class is among the k largest logits, then of all.

    The network computes in evaluation mode and is in its former mode afterwards.
    """
    counts = [0] * (len(top) + 1)
    was_training = network.training
    network.eval()
    for images, labels in batches:
        _, logits = loss_and_logits(network, images, labels, dtype)
        for i, k in enumerate(top):
            among_largest = logits.topk(min(k, logits.shape[1])).indices == labels[:, None]  # [N,k]
            counts[i] += among_largest.sum()
        counts[-1] += len(labels)
    network.train(was_training)
    return tuple(map(int, counts))


# --- Data: one uint8 tensor of images, of which batches are augmented on the device -----------------------------------

Batch = tuple[Tensor, Tensor]  # images, float32 [N,C,H,W], and labels, int64 [N], on the device; N >= 2


class EpochLoader(Protocol):
    """A source of batches, such as `Loader`. An epoch depends on its seed and not on torch's global random state."""

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""

    def epoch(self, seed: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from batch `start` on."""


class Data(NamedTuple):
    """The splits: from `train` the weights learn and from `val`, which an Evaluation does without, the alphas."""

    train: EpochLoader
    num_classes: int
    in_channels: int = 3
    val: EpochLoader | None = None


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation [C] of x/255, for x uint8 [N,C,H,W]; the deviation is at least one level."""
    std, mean = torch.std_mean(x.float() / 255, dim=(0, 2, 3))
    return mean, std.clamp_min(1 / 255)


def search_data(
    x: Tensor, y: Tensor, config: SearchConfig, num_classes: int | None = None,
    mean: Tensor | Sequence[float] | None = None, std: Tensor | Sequence[float] | None = None,
    device: torch.device | str | None = None,
) -> Data:
    """Split images into halves, of which the first trains the weights and the second the alphas.

    The images must come shuffled. num_classes: by default one more than the largest label. The other arguments are
    those of `Loader`. InputError is raised as by `Loader`, and if a label is not below num_classes.
    """
    check_images(x, y, least=4)
    if num_classes is None:
        num_classes = int(y.max()) + 1
    if y.max() >= num_classes:
        raise InputError(f"y holds {int(y.max())} of {num_classes} classes; expected class indices from 0")
    if mean is None and std is None:
        mean, std = statistics(x)
    half = len(y) // 2
    train = Loader(x[:half], y[:half], config, mean, std, device)
    val = Loader(x[half:], y[half:], config, mean, std, device)
    return Data(train, num_classes, x.shape[1], val)


def check_images(x: Tensor, y: Tensor, least: int = 2) -> None:
    """Raise InputError unless x holds `least` images or more, uint8 [N,C,H,W], and y their class indices, int64 [N]."""
    tensors = isinstance(x, Tensor) and isinstance(y, Tensor)
    found = f"x is a {type(x).__name__} and y a {type(y).__name__}"
    if tensors:
        found = f"x is {x.dtype} {list(x.shape)} and y {y.dtype} {list(y.shape)}"
    right = tensors and x.dtype == torch.uint8 and x.ndim == 4 and y.dtype == torch.int64 and y.shape == x.shape[:1]
    if not right or len(y) < least:
        raise InputError(f"{found}; expected tensors, uint8 [N,C,H,W] and int64 [N], {least} images or more")
    if y.min() < 0:
        raise InputError(f"y holds {int(y.min())}; expected class indices from 0")


class Loader:
    """Batches in a new random order every epoch, each image cropped, flipped and, in an evaluation, partly cut out.

    x: images, uint8 [N,C,H,W]. y: labels, int64 [N]. mean, std: those of x/255, [C]; by default they are computed.
    device: that of the batches; by default it is that of x, which may also stay in main memory or in a mapped file.
    InputError is raised if x and y have another type or shape, or mean and std another number of channels.
    """

    # Deviation: a last batch of a single image is left out, since batch norm cannot be trained on it.

    def __init__(
        self, x: Tensor, y: Tensor, config: SearchConfig | EvaluateConfig,
        mean: Tensor | Sequence[float] | None = None, std: Tensor | Sequence[float] | None = None,
        device: torch.device | str | None = None,
    ):
        check_images(x, y)
        if mean is None and std is None:
            mean, std = statistics(x)
        if mean is None or std is None or not len(mean) == len(std) == x.shape[1] or not all(s > 0 for s in std):
            raise InputError(f"mean is {mean} and std {std}; expected {x.shape[1]} numbers, those of std above 0")
        self.x = x
        self.y = y
        self.config = config
        self.device = torch.device(device or x.device)
        self.mean = torch.as_tensor(mean, device=self.device).view(-1, 1, 1)
        self.std = torch.as_tensor(std, device=self.device).view(-1, 1, 1)

    def __len__(self) -> int:
        whole, rest = divmod(len(self.y), self.config.batch_size)
        return whole + (rest > 1)

    def epoch(self, seed: int, start: int = 0) -> Iterator[Batch]:
        generator = torch.Generator(self.device).manual_seed(seed)
        order = torch.randperm(len(self.y), device=self.device, generator=generator).to(self.x.device)
        for i, indices in itertools.islice(enumerate(order.split(self.config.batch_size)), start, len(self)):
            generator.manual_seed(seed_of(seed, i))
            images = self.augment(self.x[indices].to(self.device), generator)
            yield images, self.y[indices].to(self.device)

    def normalise(self, x: Tensor) -> Tensor:
        return (x.float() / 255 - self.mean) / self.std

    def augment(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return images, uint8 [N,C,H,W], as float32 [N,C,H,W]: cropped, flipped, normalised and cut out."""
        n, _, h, w = x.shape
        padding = self.config.crop_padding

        def random(high):  # one integer below `high` for each image, [N,1]
            return torch.randint(high, (n, 1), device=x.device, generator=generator)

        rows = random(2 * padding + 1) + torch.arange(h, device=x.device)  # [N,H]
        cols = random(2 * padding + 1) + torch.arange(w, device=x.device)  # [N,W]
        if self.config.flip:
            cols = torch.where(random(2) == 1, cols.flip(1), cols)
        padded = F.pad(x, [padding] * 4).permute(0, 2, 3, 1)  # [N,H+2p,W+2p,C]
        image = torch.arange(n, device=x.device)[:, None, None]
        x = padded[image, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)  # [N,C,H,W]
        # Contiguous: with 1 or 2 channels, torch's channels-last convolutions are not reproducible on the CPU.
        x = self.normalise(x.contiguous())

        # A square around a random pixel, clipped at the borders (DeVries and Taylor, arXiv 1708.04552).
        # Deviation: it covers at most half of the side, as it does at 32 x 32.
        cutout = min(getattr(self.config, "cutout", 0), min(h, w) // 2)  # a SearchConfig has none
        if cutout:
            dy = torch.arange(h, device=x.device) - random(h) + cutout // 2  # [N,H]
            dx = torch.arange(w, device=x.device) - random(w) + cutout // 2  # [N,W]
            in_rows = (dy >= 0) & (dy < cutout)
            in_cols = (dx >= 0) & (dx < cutout)
            square = in_rows[:, :, None] & in_cols[:, None, :]  # [N,H,W]
            x = x.masked_fill(square[:, None], 0.0)
        return x


# --- Not in the paper: several processes, captured steps, resuming, seeds ---------------------------------------------

# Four arguments of a Search and an Evaluation do not change the method:
# prepare     converts the network before optimizers are given its parameters, as kernels.fuse does.
# average     returns the mean of each gradient over all processes, and None for None. The processes have equal
#             configs, and so equal weights at first; batch norms take the statistics of their own process.
# rank        is the number of this process, which draws dropout of its own.
# wrap_step   returns a faster function of the same tensors (2 while weights learn alone, then 4), such as a captured
#             CUDA graph. All else that changes between steps is a tensor, which is changed in place.
Gradients = Sequence[Tensor | None]
Prepare = Callable[[nn.Module], nn.Module]
Average = Callable[[Gradients], Gradients]
WrapStep = Callable[[Callable[..., list[Tensor]]], Callable[..., list[Tensor]]]


def seed_of(*counters: int) -> int:
    """Return the seed, 63 bits, of a stage, epoch, step, ...: these counters are all the random state of a run."""
    return int.from_bytes(hashlib.sha256(repr(counters).encode()).digest()[:8], "little") >> 1


def state_dict(training: Search | Evaluation) -> dict[str, Any]:
    """Return all that `load_state_dict` needs to resume between any two events with the same bits.

    The tensors are those in use: they must be saved or cloned before the training continues.
    """
    state = {"epoch": training.epoch, "step": training.step}
    if isinstance(training, Search):
        state["stages"] = [tuple(stage) for stage in training.stages]
    if training.network is not None:  # as it is between two stages
        state["network"] = training.network.state_dict()
        state["weight_optimizer"] = training.weight_optimizer.state_dict()["state"]
        if isinstance(training, Search):
            state["alpha_optimizer"] = training.architect.optimizer.state_dict()["state"]
    return state


def load_state_dict(training: Search | Evaluation, state: dict[str, Any]) -> None:
    """Resume: `training` has the same arguments as that of the state, and its iteration has not begun."""
    if isinstance(training, Search):
        training.stages = [Stage(*stage) for stage in state["stages"]]
        training.network = None
        if "network" in state:
            training.begin_stage()
            load_optimizer(training.architect.optimizer, state["alpha_optimizer"])
    if training.network is not None:
        training.network.load_state_dict(state["network"])
        load_optimizer(training.weight_optimizer, state["weight_optimizer"])
    training.epoch = state["epoch"]
    training.step = state["step"]


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[int, Any]) -> None:
    """Load momenta and the like; the optimizer keeps its settings and the tensor of its learning rate."""
    lr = optimizer.param_groups[0]["lr"]
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    optimizer.param_groups[0]["lr"] = lr  # load_state_dict has put a copy there
    for p, of_p in optimizer.state.items():
        for name, x in of_p.items():
            if x is not None and x.shape == p.shape:
                of_p[name] = in_layout_of(p, x)


def run(method: type[Search] | type[Evaluation], *arguments, **options) -> Search | Evaluation:
    """Return a `Search` or an `Evaluation` after its whole iteration; torch's random state is as it was before."""
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        training = method(*arguments, **options)
        for _ in training:
            pass
    return training


if __name__ == "__main__":
    try:
        from harness.cli import main  # which imports this file again, as `pdarts`
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"pdarts.py: error: the command line needs {error.name}, which is missing; expected the folder harness "
            "beside this file, and numpy"
        ) from None
    raise SystemExit(main())
