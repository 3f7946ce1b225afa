#!/usr/bin/env python3
"""P-DARTS: Progressive Differentiable Architecture Search, in one module that reads like the paper.

Chen, Xie, Wu, Tian: "Progressive Differentiable Architecture Search: Bridging the Depth Gap between Search and
Evaluation", ICCV 2019, arXiv 1904.12760. "The paper" below; "DARTS" is Liu et al., arXiv 1806.09055; "official" is the
code that the paper's authors published.

A cell is a small graph whose edges apply one of 8 candidate operations. During the search every edge applies all of its
candidates, weighted by softmax(alpha); alpha is learned by gradient descent, on the half of the training images that
the weights do not learn from. The search runs in stages with ever deeper networks (5, 11, 17 cells), and each stage
hands on only the strongest candidates of every edge (8, 5, 3). Skip-connects, which win too easily in deep networks,
are held back by dropout while searching and limited to M in the final normal cell.

    for event in Search(CIFAR10, search_data(images, labels, CIFAR10)):
        print(event)

Glossary
    N, C, H, W     images in a batch, channels, height, width
    K              candidates of an edge in the current stage (|O| in the paper)
    alphas         architecture parameters, [14 edges, K], one matrix for normal and one for reduction cells
    probabilities  softmax(alphas), over the candidates of an edge
    candidates     for each of the 14 edges, the names of its K operations, in the order of the search space
    genotype       the discrete cells: two (operation, input) pairs per node; inputs 0 and 1 are the outputs of the two
                   cells before it, inputs 2, 3, ... its own nodes
    weights        all parameters that are not alphas
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F


class InputError(ValueError):
    """What was given cannot be used; the message says what was wrong and what was expected."""

# --- Hyper-parameters -------------------------------------------------------------------------------------------------

def setting(default, help, low=None, high=None, choices=None):
    """A hyper-parameter: default, meaning with its source, inclusive bounds, which harness/settings.py enforces."""
    return dataclasses.field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices})

@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """A search. The defaults are the paper's for CIFAR-10 ("paper, search") or the official code's."""
    cells: tuple[int, ...] = setting((5, 11, 17), "cells of each stage's network (paper, search)", 3, 1000)
    keep: tuple[int, ...] = setting((8, 5, 3), "candidates K of an edge in each stage (paper, search)", 1, 64)
    skip_dropout: tuple[float, ...] = setting((0.0, 0.4, 0.7), "initial skip dropout of each stage (paper)", 0, 0.99)
    max_skips: int = setting(2, "skip-connects M that the normal cell may keep (paper, sec. 3.3)", 0)
    channels: int = setting(16, "channels C of the first cell (paper, search)", 1, 10**4)
    stem: str = setting("cifar", "cifar: a 3x3 convolution; imagenet: three of stride 2", choices=("cifar", "imagenet"))
    stem_stride: int = setting(1, "stride of the cifar stem; 2 or more for large images (official: 1)", 1, 8)
    epochs: int = setting(25, "epochs of each stage (paper, search)", 1, 10**6)
    warmup: int = setting(10, "first epochs of each stage that train weights only (paper, search)", 0)
    batch: int = setting(96, "images per step (paper, search)", 2, 10**6)
    lr: float = setting(0.025, "learning rate of the weights, cosine to 0 (official)", 0)
    momentum: float = setting(0.9, "momentum of the weights (official)", 0, 1)
    weight_decay: float = setting(3e-4, "weight decay of the weights (official)", 0)
    alpha_lr: float = setting(6e-4, "Adam's learning rate of the alphas (paper, search)", 0)
    alpha_weight_decay: float = setting(1e-3, "weight decay of the alphas (paper, search)", 0)
    clip: float = setting(5.0, "largest gradient norm, of weights and of alphas (official)", 1e-9)
    crop_padding: int = setting(4, "random crop: zeros around the image (official)", 0, 1000)
    flip: bool = setting(True, "random horizontal flip (official)")
    dtype: str = setting("float32", "type of the feature maps (autocast)", choices=("float32", "bfloat16"))
    seed: int = setting(0, "seed of everything random", 0, 2**63 - 1)

    def __post_init__(self):
        if not len(self.cells) == len(self.keep) == len(self.skip_dropout) > 0:
            raise InputError(f"cells {self.cells}, keep {self.keep} and skip_dropout {self.skip_dropout} differ in "
                             "their numbers of stages; expected one value per stage in each")
        if any(b > a for a, b in itertools.pairwise(self.keep)):
            raise InputError(f"keep is {self.keep}; expected no stage to keep more than the one before it has")
        if self.warmup >= self.epochs:
            raise InputError(f"warmup is {self.warmup} of {self.epochs} epochs; expected fewer, or alphas do not learn")

@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Training of a found cell from scratch. The defaults are for CIFAR: "paper, evaluation" or the official code's."""
    cells: int = setting(20, "cells of the network (paper, evaluation)", 3, 1000)
    channels: int = setting(36, "channels C of the first cell (paper, evaluation)", 1, 10**4)
    stem: str = setting("cifar", "cifar: a 3x3 convolution; imagenet: three of stride 2", choices=("cifar", "imagenet"))
    stem_stride: int = setting(1, "stride of the cifar stem; 2 or more for large images (official: 1)", 1, 8)
    epochs: int = setting(600, "epochs (paper, evaluation)", 1, 10**6)
    batch: int = setting(128, "images per step (paper, evaluation)", 2, 10**6)
    lr: float = setting(0.025, "learning rate (paper, evaluation)", 0)
    schedule: str = setting("cosine", "fall of learning rate (paper; ImageNet: linear)", choices=("cosine", "linear"))
    warmup: int = setting(0, "first epochs, in which the learning rate rises (paper, ImageNet: 5)", 0)
    momentum: float = setting(0.9, "momentum (official)", 0, 1)
    weight_decay: float = setting(3e-4, "weight decay (paper, evaluation)", 0)
    clip: float = setting(5.0, "largest gradient norm (official)", 1e-9)
    label_smoothing: float = setting(0.0, "label smoothing (paper, ImageNet: 0.1)", 0, 1)
    auxiliary: bool = setting(True, "auxiliary head after the second reduction cell (paper, evaluation)")
    auxiliary_weight: float = setting(0.4, "weight of the auxiliary loss (paper, evaluation)", 0)
    drop_path: float = setting(0.3, "drop-path rate, reached linearly from 0 (paper, evaluation)", 0, 0.99)
    cutout: int = setting(16, "side of the square cut out, at most half the image's side (paper, evaluation)", 0)
    crop_padding: int = setting(4, "random crop: zeros around the image (official)", 0, 1000)
    flip: bool = setting(True, "random horizontal flip (official)")
    dtype: str = setting("float32", "type of the feature maps (autocast)", choices=("float32", "bfloat16"))
    seed: int = setting(0, "seed of everything random", 0, 2**63 - 1)

CIFAR10, CIFAR100 = SearchConfig(), SearchConfig(skip_dropout=(0.1, 0.2, 0.3))

# --- Operations and the search space (paper, sec. 3.1) ----------------------------------------------------------------

class Operation(nn.Module):
    """Layers in a row; the last is a batch norm."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.op = nn.Sequential(*layers)

    def forward(self, x):
        return self.op(x)

class FactorizedReduce(nn.Module):
    """Halves height and width (rounding up): two 1x1 convolutions of stride 2, the second shifted by one pixel."""

    def __init__(self, in_channels: int, out_channels: int, affine: bool):
        super().__init__()
        self.conv_1 = nn.Conv2d(in_channels, out_channels // 2, 1, stride=2, bias=False)
        self.conv_2 = nn.Conv2d(in_channels, out_channels - out_channels // 2, 1, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, affine=affine)

    def forward(self, x):  # [N, C_in, H, W]
        x = F.relu(x)
        # Deviation: at odd sizes the second sees a row and a column of zeros, where the official code fails.
        shifted = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))[:, :, 1:, 1:]
        return self.bn(torch.cat([self.conv_1(x), self.conv_2(shifted)], dim=1))  # [N, C_out, ceil(H/2), ceil(W/2)]

class Zero(nn.Module):
    """`none`: the absence of an edge."""

    def __init__(self, stride: int):
        super().__init__()
        self.stride = stride

    def forward(self, x):
        return torch.zeros_like(x[:, :, :: self.stride, :: self.stride])

def relu_conv_bn(in_channels, out_channels, affine):
    conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
    return Operation(nn.ReLU(), conv, nn.BatchNorm2d(out_channels, affine=affine))

def depthwise_separable(channels, size, stride, dilation, affine):
    """The unit of sep_conv and dil_conv: ReLU, depthwise convolution, pointwise convolution, batch norm."""
    padding = dilation * (size // 2)
    depthwise = nn.Conv2d(channels, channels, size, stride, padding, dilation, groups=channels, bias=False)
    pointwise = nn.Conv2d(channels, channels, 1, bias=False)
    return nn.ReLU(), depthwise, pointwise, nn.BatchNorm2d(channels, affine=affine)

def sep_conv(channels, size, stride, affine):
    first = depthwise_separable(channels, size, stride, 1, affine)
    return Operation(*first, *depthwise_separable(channels, size, 1, 1, affine))

def dil_conv(channels, size, stride, affine):
    return Operation(*depthwise_separable(channels, size, stride, 2, affine))

def skip_connect(channels, stride, affine):
    return nn.Identity() if stride == 1 else FactorizedReduce(channels, channels, affine)

class Primitive(NamedTuple):
    """build: (channels C, stride, affine) -> a module [N,C,H,W] -> [N,C,ceil(H/stride),ceil(W/stride)]; affine: whether
    its batch norms have gamma and beta. norm: the search network adds a batch norm after it. colour: in drawings."""
    build: Callable[[int, int, bool], nn.Module]
    colour: str
    norm: bool = False

OPERATIONS = {
    "none": Primitive(lambda c, stride, affine: Zero(stride), "#888888"),
    "max_pool_3x3": Primitive(lambda c, stride, affine: nn.MaxPool2d(3, stride, 1), "#3274c4", norm=True),
    "avg_pool_3x3": Primitive(
        lambda c, stride, affine: nn.AvgPool2d(3, stride, 1, count_include_pad=False), "#3274c4", norm=True),
    "skip_connect": Primitive(skip_connect, "#2a9d5c"),
    "sep_conv_3x3": Primitive(lambda c, stride, affine: sep_conv(c, 3, stride, affine), "#d9722e"),
    "sep_conv_5x5": Primitive(lambda c, stride, affine: sep_conv(c, 5, stride, affine), "#d9722e"),
    "dil_conv_3x3": Primitive(lambda c, stride, affine: dil_conv(c, 3, stride, affine), "#8a56b5"),
    "dil_conv_5x5": Primitive(lambda c, stride, affine: dil_conv(c, 5, stride, affine), "#8a56b5"),
}
PRIMITIVES = tuple(OPERATIONS)

def cell_edges(nodes: int) -> tuple[tuple[int, int], ...]:
    """(node, input) of every edge: node i takes one from both inputs of the cell and from every earlier node."""
    return tuple((node, source) for node in range(nodes) for source in range(2 + node))

@dataclasses.dataclass(frozen=True)
class SearchSpace:
    """What is searched: the candidates of an edge, names in OPERATIONS in this order, and the nodes of a cell.
    `none`, which is never chosen, and `skip_connect`, an nn.Identity at stride 1, have a role in the method."""
    primitives: tuple[str, ...] = PRIMITIVES
    nodes: int = 4

    def __post_init__(self):
        if unknown := [name for name in self.primitives if name not in OPERATIONS]:
            raise InputError(f"the search space has unknown primitives {unknown}; expected some of {list(OPERATIONS)}")

    @property
    def edges(self):
        return cell_edges(self.nodes)  # 14 for 4 nodes

SPACE = SearchSpace()

# --- The mixed operation, the cell and the search network (paper, sec. 3.1) -------------------------------------------

def inverted_dropout(x, rate, shape):
    """Zeroes parts of x with probability `rate` (a tensor) and rescales the rest."""
    if rate.is_cpu and rate == 0:  # a GPU would have to be waited for
        return x
    keep = torch.rand(shape, device=x.device) >= rate
    return x * (keep / (1 - rate)).to(x.dtype)

class SkipDropout(nn.Module):
    """Element-wise dropout after a skip-connect of stride 1 (paper, sec. 3.3); see SearchNetwork.set_skip_dropout."""

    def __init__(self):
        super().__init__()
        self.register_buffer("rate", torch.zeros(()), persistent=False)

    def forward(self, x):
        return inverted_dropout(x, self.rate, x.shape) if self.training else x

class MixedOp(nn.Module):
    """An edge during the search: all its candidates at once, weighted by softmax(alpha).
    x [N,C,H,W], probabilities [K] -> [N,C,ceil(H/stride),ceil(W/stride)]."""

    def __init__(self, candidates: tuple[str, ...], channels: int, stride: int):
        super().__init__()
        # `none`, if it is the first candidate, adds exactly zero: only its place in the softmax matters.
        self.skip_none = int(candidates[0] == "none" and len(candidates) > 1)
        self.ops = nn.ModuleList()
        for name in candidates[self.skip_none :]:
            op = OPERATIONS[name].build(channels, stride, False)
            if OPERATIONS[name].norm:
                op = Operation(op, nn.BatchNorm2d(channels, affine=False))
            self.ops.append(SkipDropout() if isinstance(op, nn.Identity) else op)

    def forward(self, x, probabilities):
        # Eq. 1
        return sum(p * op(x) for p, op in zip(probabilities[self.skip_none :], self.ops))

class SearchCell(nn.Module):
    """A cell of the search network: [N,C_0,H_0,W_0], [N,C_1,H,W] -> [N,4*C,H/stride,W/stride], stride 2 to reduce."""

    def __init__(self, candidates, channels_0, channels_1, channels, reduction, reduction_before, space=SPACE):
        super().__init__()
        self.reduction, self.nodes = reduction, space.nodes
        preprocess = FactorizedReduce if reduction_before else relu_conv_bn  # input 0 is twice as large as input 1 then
        self.preprocess0 = preprocess(channels_0, channels, affine=False)
        self.preprocess1 = relu_conv_bn(channels_1, channels, affine=False)
        self.edges = nn.ModuleList(
            MixedOp(names, channels, 2 if reduction and source < 2 else 1)
            for names, (_, source) in zip(candidates, space.edges, strict=True))

    def forward(self, s0, s1, probabilities):  # [14, K]
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        edges = iter(zip(self.edges, probabilities))
        for _ in range(self.nodes):
            states.append(self.node(list(zip(states, edges))))  # states first: zip takes no edge too many
        return torch.cat(states[2:], dim=1)

    def node(self, incoming):
        """The sum of the edges into a node; incoming: (state, (edge, probabilities [K])) of each."""
        return sum(edge(x, p) for x, (edge, p) in incoming)

class Stemmed(nn.Module):
    """What all networks begin with. stem: "cifar", a 3x3 convolution, or "imagenet", three of stride 2."""

    def add_stem(self, stem, in_channels, c, stride):
        """c: of the first cell. Returns the channels of its inputs 0 and 1, and whether input 0 is twice as large."""
        if stem == "cifar":
            self.stem = nn.Sequential(*conv_bn(in_channels, 3 * c, stride))
            return 3 * c, 3 * c, False
        if stem != "imagenet" or c < 2:
            raise InputError(f"stem is {stem!r} of {c} channels; expected 'cifar', or 'imagenet' of 2 or more")
        self.stem0 = nn.Sequential(*conv_bn(in_channels, c // 2, 2), nn.ReLU(), *conv_bn(c // 2, c, 2))
        self.stem1 = nn.Sequential(nn.ReLU(), *conv_bn(c, c, 2))
        return c, c, True

    def states(self, images):
        """Inputs 0 and 1 of the first cell."""
        s0 = self.stem(images) if hasattr(self, "stem") else self.stem0(images)
        return s0, (s0 if hasattr(self, "stem") else self.stem1(s0))

class SearchNetwork(Stemmed):
    """The supernet of one stage: every edge holds all of its candidates.
    channels: C of the first cell; cells: L, at least 3; reduction cells at L//3 and (2L)//3 double C, halve H and W.
    normal, reduce: the candidates of both kinds of cell, for each edge K names in the order of the search space.
    alphas_normal, alphas_reduce: parameters [edges, K], shared by all cells of the kind, 1e-3 * N(0,1) at first.
    forward: [N,in_channels,H,W] -> logits [N,num_classes]."""

    def __init__(self, channels, num_classes, cells, normal, reduce, stem="cifar", in_channels=3,
                 stem_stride=1, space=SPACE):
        super().__init__()
        reductions = reduction_cells(cells)
        for names in (*check_candidates(normal, len(space.edges)), *check_candidates(reduce, len(space.edges))):
            if names != tuple(name for name in space.primitives if name in names):
                raise InputError(f"candidates {names}; expected one or more of {space.primitives}, in this order")
        channels_0, channels_1, reduction_before = self.add_stem(stem, in_channels, channels, stem_stride)
        self.cells = nn.ModuleList()
        for i in range(cells):
            reduction = i in reductions
            channels *= 2 if reduction else 1
            names = reduce if reduction else normal
            self.cells.append(SearchCell(names, channels_0, channels_1, channels, reduction, reduction_before, space))
            channels_0, channels_1, reduction_before = channels_1, space.nodes * channels, reduction
        self.classifier = nn.Linear(channels_1, num_classes)
        self.alphas_normal = nn.Parameter(1e-3 * torch.randn(len(normal), len(normal[0])))
        self.alphas_reduce = nn.Parameter(1e-3 * torch.randn(len(reduce), len(reduce[0])))

    def set_skip_dropout(self, rate: float):
        for module in self.modules():
            if isinstance(module, SkipDropout):
                module.rate.fill_(rate)

    def alphas(self) -> list[nn.Parameter]:
        return [self.alphas_normal, self.alphas_reduce]

    def weights(self) -> list[nn.Parameter]:
        return [p for name, p in self.named_parameters() if name not in ("alphas_normal", "alphas_reduce")]

    def forward(self, images):
        normal, reduce = self.alphas_normal.softmax(dim=1), self.alphas_reduce.softmax(dim=1)
        s0, s1 = self.states(images)
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1, reduce if cell.reduction else normal)
        return self.classifier(s1.mean(dim=(2, 3)))

def reduction_cells(cells: int) -> tuple[int, int]:
    """Where the two reduction cells of a network of `cells` cells stand."""
    if cells < 3:
        raise InputError(f"cells is {cells}; expected at least 3, two of them reduction cells")
    return cells // 3, 2 * cells // 3

def conv_bn(in_channels, out_channels, stride):
    conv = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
    return conv, nn.BatchNorm2d(out_channels)

def check_candidates(candidates, edges: int | None = None):
    """The candidates of every edge of a cell, as tuples."""
    candidates = tuple(map(tuple, candidates))
    lengths, cells = [len(names) for names in candidates], [len(cell_edges(n)) for n in range(1, len(candidates))]
    if len(set(lengths)) != 1 or 0 in lengths or len(candidates) not in ([edges] if edges else cells):
        raise InputError(f"candidates have lengths {lengths}; expected equal ones, {edges or '2, 5, 9, ...'} of them")
    return candidates

# --- From stage to stage: search space approximation (paper, sec. 3.2) and the skip dropout (sec. 3.3) ----------------

def shrink(candidates, alphas, keep: int):
    """Search space approximation: the `keep` candidates of every edge with the largest softmax(alpha).
    candidates: 14 tuples of K names; alphas: [14, K]. Returns 14 tuples of `keep` names, order kept. Of two equal
    candidates the one that comes first is dropped. `none` competes like any other."""
    candidates = check_candidates(candidates)
    if not 1 <= keep <= len(candidates[0]):
        raise InputError(f"keep is {keep}; expected 1 to {len(candidates[0])}, the candidates that there are")
    shrunk = []
    for names, p in zip(candidates, edge_probabilities(candidates, alphas)):
        ranked = sorted(range(len(names)), key=lambda k: (p[k], k))
        shrunk.append(tuple(names[k] for k in sorted(ranked[-keep:])))
    return tuple(shrunk)

def skip_dropout_rate(initial: float, epoch: int, epochs: int = 25, warmup: int = 10) -> float:
    """Dropout rate after skip-connects in `epoch` (from 0) of a stage: from `initial` it falls linearly in the warm-up,
    then, from `initial` again, exponentially (official; the paper only says that it decays)."""
    if epoch < warmup:
        return initial * (epochs - 1 - epoch) / epochs
    return initial * math.exp(-0.2 * (epoch - warmup))

def edge_probabilities(candidates, alphas) -> list[list[float]]:
    """softmax(alphas) as nested lists [14][K], checked against the candidates."""
    alphas, expected = torch.as_tensor(alphas).detach(), [len(candidates), len(candidates[0])]
    if list(alphas.shape) != expected:
        raise InputError(f"alphas have shape {list(alphas.shape)}; expected {expected}")
    probabilities = alphas.softmax(dim=1)
    if not probabilities.isfinite().all():
        raise InputError("alphas hold numbers that are not finite; expected finite ones (a lower alpha_lr may help)")
    return probabilities.tolist()

# --- From alphas to the cell: derivation and architecture refinement (paper, sec. 3.3) --------------------------------

class Genotype(NamedTuple):
    """The discrete cells. normal, reduce: (operation, input) pairs, two for each node; *_concat: states in the output.
    States 0 and 1 are the outputs of the two cells before it, 2 and up are the cell's own nodes."""
    normal: list[tuple[str, int]]
    normal_concat: list[int]
    reduce: list[tuple[str, int]]
    reduce_concat: list[int]

def derive(normal, reduce, alphas_normal, alphas_reduce, max_skips: int | None = 2) -> Genotype:
    """The cells that candidates (14 tuples of K names) and alphas ([14, K]) stand for.
    Every edge takes its strongest candidate other than `none`; every node keeps its two strongest edges. The normal
    cell keeps at most `max_skips` (M) skip-connects; None: no limit. InputError if an edge has nothing else."""
    normal, reduce = check_candidates(normal), check_candidates(reduce)
    probabilities = edge_probabilities(normal, alphas_normal)
    normal_cell = strongest(normal, probabilities)
    while max_skips is not None and sum(name == "skip_connect" for name, *_ in normal_cell) > max_skips:
        # Architecture refinement: without the weakest kept skip-connect, candidates *and* edges are chosen again.
        # Another edge may come in and bring its own skip-connect, hence the loop.
        skips = [(p, edge) for name, _, edge, p in normal_cell if name == "skip_connect" and p >= 0]
        if not skips:
            raise InputError(f"edges have no candidate but skip_connect; no normal cell has max_skips={max_skips}")
        _, edge = min(skips)
        probabilities[edge][normal[edge].index("skip_connect")] = -1.0  # below one that has rounded to 0
        normal_cell = strongest(normal, probabilities)
    reduce_cell = strongest(reduce, edge_probabilities(reduce, alphas_reduce))
    pairs = [[(name, source) for name, source, *_ in cell] for cell in (normal_cell, reduce_cell)]
    concat = [list(range(2, 2 + len(cell) // 2)) for cell in pairs]
    return Genotype(pairs[0], concat[0], pairs[1], concat[1])

def strongest(candidates, probabilities):
    """(operation, input, edge, probability) of the two strongest edges into each node, in the order of the edges."""
    into: dict[int, list] = {}
    nodes = next(nodes for nodes in itertools.count(1) if len(cell_edges(nodes)) == len(candidates))
    for edge, (node, source) in enumerate(cell_edges(nodes)):
        names, p = candidates[edge], probabilities[edge]
        allowed = [k for k, name in enumerate(names) if name != "none"]
        if not allowed:
            raise InputError(f"edge {edge} has no candidate but none; expected an operation to choose")
        best = max(allowed, key=lambda k: (p[k], k))  # ties: the later candidate, as in shrink
        into.setdefault(node, []).append((names[best], source, edge, p[best]))
    kept = []
    for incoming in into.values():
        two = sorted(incoming, key=lambda c: (c[3], c[2]))[-2:]  # ties: the later predecessor is kept
        kept += sorted(two, key=lambda c: c[2])
    return kept

# --- The architect: one architecture step (DARTS, sec. 2.3) -----------------------------------------------------------

def identity(x):
    return x

def require_gradients(of, not_of=()):
    """What the next backward pass computes: an architecture step needs no gradients of weights, nor the other way."""
    for parameters, required in (of, True), (not_of, False):
        for p in parameters:
            p.requires_grad_(required)

def clipped_step(optimizer, parameters, gradients, clip: float):
    """One step of the optimizer along the gradients, clipped to the norm `clip`."""
    for p, g in zip(parameters, gradients, strict=True):
        # Fused optimizers go through p and its gradient in the order of their memory, which may be channels-last.
        p.grad = g if g is None or g.stride() == p.stride() else torch.empty_like(p).copy_(g)
    nn.utils.clip_grad_norm_(parameters, clip)
    optimizer.step()

def loss_and_logits(network, images, labels, dtype: str = "float32", auxiliary_weight=0.0, label_smoothing=0.0):
    """(mean cross-entropy, logits) of a batch; feature maps have `dtype`, weights, statistics and losses float32."""
    with torch.autocast(images.device.type, getattr(torch, dtype), enabled=dtype != "float32"):
        logits = network(images)
        logits, auxiliary_logits = logits if isinstance(logits, tuple) else (logits, None)
        loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        if auxiliary_logits is not None:
            loss = loss + auxiliary_weight * F.cross_entropy(auxiliary_logits, labels, label_smoothing=label_smoothing)
    return loss, logits

class Architect:
    """Updates the alphas of a SearchNetwork to lower the loss on images that the weights do not learn from, by Adam.
    The betas are DARTS's. First order: the gradient at the present weights. average: gradients -> their means over
    several processes. weight_optimizer: for architects that look a step ahead, such as DARTS's second order."""

    def __init__(self, network, lr=6e-4, betas=(0.5, 0.999), weight_decay=1e-3, clip=5.0, dtype="float32",
                 average=identity, weight_optimizer=None):
        self.network, self.clip, self.dtype, self.average = network, clip, dtype, average
        self.weights, self.alphas, self.weight_optimizer = network.weights(), network.alphas(), weight_optimizer
        capturable = self.alphas[0].is_cuda  # as a CUDA graph needs it
        self.optimizer = torch.optim.Adam(self.alphas, lr, betas, weight_decay=weight_decay, capturable=capturable)

    def step(self, images, labels, train_images=None, train_labels=None):
        """One update from a batch of the validation split; returns its loss and logits before the update.
        train_*: the batch of the train split whose step comes next, which the first order ignores."""
        loss, logits, gradients = self.gradients(images, labels, train_images, train_labels)
        clipped_step(self.optimizer, self.alphas, gradients, self.clip)
        return loss.detach(), logits.detach()

    def gradients(self, images, labels, train_images, train_labels):
        require_gradients(self.alphas, not_of=self.weights)
        loss, logits = self.loss(images, labels)
        return loss, logits, self.average(torch.autograd.grad(loss, self.alphas))

    def loss(self, images, labels):
        """(loss, logits) that the alphas descend; the place to add a regulariser."""
        return loss_and_logits(self.network, images, labels, self.dtype)

# --- The search (paper, sec. 3.2) -------------------------------------------------------------------------------------

class Step(NamedTuple):
    """A step of the weights: mean loss and correct predictions (tensors) of `size` images; alpha_*: of the architecture
    step before it, if there was one."""
    loss: torch.Tensor
    correct: torch.Tensor
    alpha_loss: torch.Tensor | None = None
    alpha_correct: torch.Tensor | None = None
    size: int = 0
    alpha_size: int = 0

class Epoch(NamedTuple):
    """The end of an epoch (from 0) of a stage (from 0). rate: of the skip dropout, in an Evaluation of drop-path."""
    stage: int
    epoch: int
    lr: float
    rate: float

class Stage(NamedTuple):
    """The end of a stage: candidates (14 tuples) and alphas [14, K] of both kinds of cell."""
    normal: tuple
    reduce: tuple
    alphas_normal: torch.Tensor
    alphas_reduce: torch.Tensor

    def genotype(self, max_skips: int | None = 2) -> Genotype:
        return derive(*self, max_skips)

def cosine(lr: float, epoch: int, epochs: int) -> float:
    """The learning rate of `epoch` (from 0), falling from `lr` towards 0."""
    # Deviation: the official code, on a current torch, is an epoch ahead of this.
    return lr * (1 + math.cos(math.pi * epoch / epochs)) / 2

def linear(lr: float, epoch: int, epochs: int) -> float:
    """As `cosine`, but evenly; the last 5 epochs share the last step (official, ImageNet)."""
    last, left = min(5, epochs - 1), epochs - epoch
    return lr / (epochs - last) * (left - last if left > last else left / last)

def sgd(weights, config) -> torch.optim.SGD:
    """The weights' optimizer; its learning rate is a tensor."""
    lr, fused = torch.tensor(config.lr, device=weights[0].device), weights[0].device.type in ("cpu", "cuda")
    return torch.optim.SGD(weights, lr, config.momentum, weight_decay=config.weight_decay, fused=fused)

def load_optimizer(optimizer, state):
    """What an optimizer has gathered; its settings stay, and so does the tensor that holds the learning rate."""
    lr = optimizer.param_groups[0]["lr"]
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    optimizer.param_groups[0]["lr"] = lr  # torch has put a copy there

def seed_of(*counters: int) -> int:
    """The seed, 63 bits, of what is random in this stage, epoch, step, ...: a run goes on from these counters alone."""
    return int.from_bytes(hashlib.sha256(repr(counters).encode()).digest()[:8], "little") >> 1

class Search:
    """The progressive search as an iterable: stage after stage a deeper network with fewer candidates.

    Yields a Step after each step, an Epoch after the last step of an epoch, a Stage after the last epoch of a stage.
    Between any two, `state_dict()`, tensors in use, is all that is needed to go on: it is loaded into a Search of the
    same arguments, before the loop. Seeds torch anew for every step, once its batch is there.

    prepare: network -> network, such as kernels.fuse. average: gradients, or None, -> their means over all processes;
    rank: the number of this one. wrap_step: step -> a faster function of the same tensors (2 in the warm-up, then 4),
    such as a captured CUDA graph: all else that changes between steps is a tensor that changes in place."""

    def __init__(self, config: SearchConfig, data: Data, device="cpu", space: SearchSpace = SPACE, prepare=identity,
                 average=identity, wrap_step=identity, rank: int = 0, architect=Architect):
        if config.keep[0] != len(space.primitives):
            raise InputError(f"keep starts with {config.keep[0]}; expected {len(space.primitives)}, all primitives")
        least = 1 + len({"none", "skip_connect"} & set(space.primitives))
        if config.keep[-1] < least:  # with these two gone, one candidate must be left for the refinement
            raise InputError(f"keep ends with {config.keep[-1]}; expected at least {least} in the last stage")
        if data.val is None:
            raise InputError("data.val is None; expected the validation split, from which the alphas learn")
        self.config, self.data, self.device, self.space, self.rank = config, data, torch.device(device), space, rank
        self.prepare, self.average, self.wrap_step, self.make_architect = prepare, average, wrap_step, architect
        self.stages: list[Stage] = []
        self.network, self.epoch, self.batch = None, 0, 0

    def __iter__(self) -> Iterator[Step | Epoch | Stage]:
        config = self.config
        while len(self.stages) < len(config.cells):
            stage = len(self.stages)
            if self.network is None:
                self.begin_stage()
            while self.epoch < config.epochs:
                lr = cosine(config.lr, self.epoch, config.epochs)
                rate = skip_dropout_rate(config.skip_dropout[stage], self.epoch, config.epochs, config.warmup)
                self.optimizer.param_groups[0]["lr"].fill_(lr)
                self.network.train().set_skip_dropout(rate)
                for batch, alpha_batch in self.batches(seed_of(config.seed, stage, self.epoch)):
                    torch.manual_seed(seed_of(config.seed, stage, self.epoch, self.batch, self.rank))  # of dropout
                    results = self.step(*batch, *alpha_batch)
                    self.batch += 1  # before the yield: whoever saves the state now goes on after this step
                    yield Step(*results, size=len(batch[1]), alpha_size=len(alpha_batch[1]) if alpha_batch else 0)
                self.epoch, self.batch = self.epoch + 1, 0
                yield Epoch(stage, self.epoch - 1, lr, rate)
            alphas = [alpha.detach().cpu() for alpha in self.network.alphas()]
            self.stages.append(Stage(*self.candidates, *alphas))
            self.network, self.epoch = None, 0
            yield self.stages[-1]

    def begin_stage(self):
        """A deeper network, fewer candidates; weights, alphas and optimizers are new (paper, sec. 3.2)."""
        config, data, stage = self.config, self.data, len(self.stages)
        self.candidates = ((self.space.primitives,) * len(self.space.edges),) * 2
        if self.stages:
            normal, reduce, alphas_normal, alphas_reduce = self.stages[-1]
            keep = config.keep[stage]
            self.candidates = shrink(normal, alphas_normal, keep), shrink(reduce, alphas_reduce, keep)
        torch.manual_seed(seed_of(config.seed, stage))
        network = SearchNetwork(config.channels, data.num_classes, config.cells[stage], *self.candidates,
                                config.stem, data.in_channels, config.stem_stride, self.space)
        self.network = self.prepare(network.to(self.device))
        self.weights = self.network.weights()
        self.optimizer = sgd(self.weights, config)
        self.architect = self.make_architect(
            self.network, config.alpha_lr, weight_decay=config.alpha_weight_decay, clip=config.clip, dtype=config.dtype,
            average=self.average, weight_optimizer=self.optimizer)
        self.step = self.wrap_step(self.alternate)

    def batches(self, seed: int):
        """(train batch, validation batch) of the steps that are left of the epoch; the latter is () in the warm-up."""
        val = itertools.repeat(()) if self.epoch < self.config.warmup else endless(self.data.val, seed, self.batch)
        return zip(self.data.train.epoch(seed, self.batch), val)

    def alternate(self, images, labels, *alpha_batch):
        """An architecture step, if there is a batch for it, and then one of the weights.
        Returns loss and number of correct predictions of the latter, then those of the former."""
        results = []
        if alpha_batch:
            loss, logits = self.architect.step(*alpha_batch, images, labels)
            results = [loss, (logits.argmax(1) == alpha_batch[1]).sum()]
        require_gradients(self.weights, not_of=self.network.alphas())
        loss, logits = loss_and_logits(self.network, images, labels, self.config.dtype)
        gradients = self.average(torch.autograd.grad(loss, self.weights))
        clipped_step(self.optimizer, self.weights, gradients, self.config.clip)
        return [loss.detach(), (logits.argmax(1) == labels).sum(), *results]

    def genotype(self) -> Genotype:
        return self.stages[-1].genotype(self.config.max_skips)

    def state_dict(self) -> dict:
        state = {"stages": [tuple(stage) for stage in self.stages], "epoch": self.epoch, "batch": self.batch}
        if self.network is not None:
            state |= {"network": self.network.state_dict(), "weights": self.optimizer.state_dict()["state"],
                      "alphas": self.architect.optimizer.state_dict()["state"]}
        return state

    def load_state_dict(self, state: dict):
        self.stages, self.network = [Stage(*stage) for stage in state["stages"]], None
        if "network" in state:
            self.begin_stage()
            self.network.load_state_dict(state["network"])
            load_optimizer(self.optimizer, state["weights"])
            load_optimizer(self.architect.optimizer, state["alphas"])
        self.epoch, self.batch = state["epoch"], state["batch"]

def endless(loader, seed: int, start: int):
    """The batches of one epoch of `loader` after the other, from batch `start` on."""
    first, start = divmod(start, len(loader))
    for number in itertools.count(first):
        yield from loader.epoch(seed_of(seed, number), start if number == first else 0)

# --- The evaluation network (paper, sec. 4) ---------------------------------------------------------------------------

class Cell(nn.Module):
    """A cell of the evaluation network, made of the operations of a genotype."""

    def __init__(self, pairs, concat, channels_0, channels_1, channels, reduction, reduction_before):
        super().__init__()
        preprocess = FactorizedReduce if reduction_before else relu_conv_bn
        self.preprocess0 = preprocess(channels_0, channels, affine=True)
        self.preprocess1 = relu_conv_bn(channels_1, channels, affine=True)
        self.concat, self.sources = concat, [source for _, source in pairs]
        for i, (name, source) in enumerate(pairs):
            if name not in OPERATIONS or not 0 <= source < 2 + i // 2:
                raise InputError(f"pair {i} of a cell is {name!r}, {source!r}; expected one of {', '.join(OPERATIONS)} "
                                 f"and an input from 0 to {1 + i // 2}")
        self._ops = nn.ModuleList(
            OPERATIONS[name].build(channels, 2 if reduction and source < 2 else 1, True) for name, source in pairs)

    def forward(self, s0, s1, drop_path):  # the rate
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        edges = iter(zip(self._ops, self.sources))
        for pair in zip(edges, edges):  # two into each node
            states.append(self.node([(op, states[source]) for op, source in pair], drop_path))
        return torch.cat([states[i] for i in self.concat], dim=1)

    def node(self, incoming, drop_path):  # incoming: (operation, state) of each edge
        return sum(self.edge(op, x, drop_path) for op, x in incoming)

    def edge(self, op, x, drop_path):
        if isinstance(op, nn.Identity) or not self.training:
            return op(x)
        return inverted_dropout(op(x), drop_path, (len(x), 1, 1, 1))  # whole samples

class PoolTo2x2(nn.Module):
    """Average pooling to 2x2 with overlap: at 8x8 and 7x7 exactly the official heads' 5x5 windows, stride 3 and 2."""
    # Deviation: at other sizes the windows adapt, where the official heads fail or see a part of the map.

    def forward(self, x):
        windows = [min(math.ceil(5 * size / 8), size - 1) for size in x.shape[2:]]
        return F.avg_pool2d(x, windows, stride=[size - window for size, window in zip(x.shape[2:], windows)])

class AuxiliaryHead(nn.Module):
    """A classifier after two thirds of the cells, in training only: [N,C,H,W], H, W >= 2 -> logits [N,num_classes]."""

    def __init__(self, channels, num_classes):
        super().__init__()
        self.features = nn.Sequential(
            nn.ReLU(), PoolTo2x2(), nn.Conv2d(channels, 128, 1, bias=False), nn.BatchNorm2d(128), nn.ReLU(),
            nn.Conv2d(128, 768, 2, bias=False), nn.BatchNorm2d(768), nn.ReLU())
        self.classifier = nn.Linear(768, num_classes)

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))

class Network(Stemmed):
    """The network of a genotype, with the official networks' state_dict keys and shapes. forward: [N,in_channels,H,W]
    -> logits [N,num_classes]; in training a pair of logits and auxiliary logits (None unless `auxiliary`).
    drop_path: the rate, a tensor, at which operations other than identities lose a sample."""

    def __init__(self, genotype, channels, num_classes, cells, auxiliary=False, stem="cifar",
                 in_channels=3, stem_stride=1):
        super().__init__()
        reductions = reduction_cells(cells)
        if not isinstance(genotype, Genotype):
            raise InputError(f"genotype is a {type(genotype).__name__}; expected a Genotype, as GENOTYPES['PDARTS'] is")
        self.register_buffer("drop_path", torch.zeros(()), persistent=False)
        channels_0, channels_1, reduction_before = self.add_stem(stem, in_channels, channels, stem_stride)
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
        (s0, s1), auxiliary_logits = self.states(images), None
        for i, cell in enumerate(self.cells):
            s0, s1 = s1, cell(s0, s1, self.drop_path)
            if i == self.auxiliary_cell and self.training and self.auxiliary_head is not None:
                auxiliary_logits = self.auxiliary_head(s1)
        logits = self.classifier(s1.mean(dim=(2, 3)))
        return (logits, auxiliary_logits) if self.training else logits

GENOTYPES = {
    "PDARTS": Genotype(  # the published one; harness/cells.py adds those of other papers
        [("skip_connect", 0), ("dil_conv_3x3", 1), ("skip_connect", 0), ("sep_conv_3x3", 1),
         ("sep_conv_3x3", 1), ("sep_conv_3x3", 3), ("sep_conv_3x3", 0), ("dil_conv_5x5", 4)], [2, 3, 4, 5],
        [("avg_pool_3x3", 0), ("sep_conv_5x5", 1), ("sep_conv_3x3", 0), ("dil_conv_5x5", 2),
         ("max_pool_3x3", 0), ("dil_conv_3x3", 1), ("dil_conv_3x3", 1), ("dil_conv_5x5", 3)], [2, 3, 4, 5]),
}

# --- The evaluation (paper, sec. 4): the network of a genotype, trained from scratch ----------------------------------

class Evaluation:
    """The training as an iterable of Steps and Epochs; arguments, state_dict() and random state as in `Search`."""

    def __init__(self, genotype: Genotype, config: EvaluateConfig, data: Data, device="cpu", prepare=identity,
                 average=identity, wrap_step=identity, rank: int = 0):
        self.config, self.data, self.average, self.rank = config, data, average, rank
        torch.manual_seed(seed_of(config.seed))
        network = Network(genotype, config.channels, data.num_classes, config.cells, config.auxiliary, config.stem,
                          data.in_channels, config.stem_stride)
        self.network = prepare(network.to(device))
        self.weights = list(self.network.parameters())
        self.optimizer = sgd(self.weights, config)
        self.step = wrap_step(self.train)
        self.epoch, self.batch = 0, 0

    def __iter__(self) -> Iterator[Step | Epoch]:
        config = self.config
        while self.epoch < config.epochs:
            lr = {"cosine": cosine, "linear": linear}[config.schedule](config.lr, self.epoch, config.epochs)
            lr *= min(1, (self.epoch + 1) / max(config.warmup, 1))
            rate = config.drop_path * self.epoch / config.epochs
            self.optimizer.param_groups[0]["lr"].fill_(lr)
            self.network.train().drop_path.fill_(rate)
            for images, labels in self.data.train.epoch(seed_of(config.seed, self.epoch), self.batch):
                torch.manual_seed(seed_of(config.seed, self.epoch, self.batch, self.rank))  # of drop-path
                results = self.step(images, labels)
                self.batch += 1
                yield Step(*results, size=len(labels))
            self.epoch, self.batch = self.epoch + 1, 0
            yield Epoch(0, self.epoch - 1, lr, rate)

    def train(self, images, labels):
        """A step of the weights; returns loss and number of correct predictions."""
        config = self.config
        loss, logits = loss_and_logits(self.network, images, labels, config.dtype, config.auxiliary_weight,
                                       config.label_smoothing)
        # Nodes that a genotype leaves out of its output have no gradients.
        gradients = self.average(torch.autograd.grad(loss, self.weights, allow_unused=True))
        clipped_step(self.optimizer, self.weights, gradients, config.clip)
        return [loss.detach(), (logits.argmax(1) == labels).sum()]

    def state_dict(self) -> dict:
        return {"network": self.network.state_dict(), "weights": self.optimizer.state_dict()["state"],
                "epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: dict):
        self.network.load_state_dict(state["network"])
        load_optimizer(self.optimizer, state["weights"])
        self.epoch, self.batch = state["epoch"], state["batch"]

def run(method, *arguments, **options) -> Search | Evaluation:
    """A whole `Search` or `Evaluation` of these arguments. Torch's random state is left as it was."""
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        training = method(*arguments, **options)
        for _ in training:
            pass
    return training

@torch.no_grad()
def correct_predictions(network, batches, dtype: str = "float32", top=(1,)) -> tuple[int, ...]:
    """For each k of `top` how many images of the batches have their class among the k largest logits of the `network`
    in evaluation mode, and last how many images there are."""
    counts, was_training = [0] * (len(top) + 1), network.training
    network.eval()
    for images, labels in batches:
        logits = loss_and_logits(network, images, labels, dtype)[1]
        right = [logits.topk(min(k, logits.shape[1])).indices.eq(labels[:, None]).sum() for k in top]
        counts = [a + b for a, b in zip(counts, [*right, len(labels)])]
    network.train(was_training)
    return tuple(map(int, counts))

# --- Data: one uint8 tensor of images, of which batches are augmented on the device -----------------------------------

class Data(NamedTuple):
    """What a Search or an Evaluation learns from: `train` for the weights and, in a Search, `val` for the alphas.
    Both are loaders: they have a length and `epoch(seed, start)`, which yields the batches of an epoch from batch
    `start` on: images [N,in_channels,H,W] float32, labels [N] int64, on the device; N >= 2. They depend on the seed and
    not on torch's global random state."""
    train: Any
    num_classes: int
    in_channels: int = 3
    val: Any = None

def statistics(x):
    """Mean and deviation of the channels of x/255; of a constant channel at least one level."""
    std, mean = torch.std_mean(x.float() / 255, dim=(0, 2, 3))
    return mean, std.clamp_min(1 / 255)

def search_data(x, y, config: SearchConfig, num_classes: int | None = None, mean=None, std=None, device=None) -> Data:
    """The first half of x trains the weights, the second the alphas: they must come shuffled. Arguments: see Loader."""
    half, num_classes = len(y) // 2, num_classes or int(y.max()) + 1
    mean, std = statistics(x) if mean is None else (mean, std)
    train, val = (Loader(x[i], y[i], config, mean, std, device) for i in (slice(half), slice(half, None)))
    return Data(train, num_classes, x.shape[1], val)

class Loader:
    """Batches in a new random order every epoch, each image cropped, flipped and, in an evaluation, partly cut out.
    x: images, uint8 [N,C,H,W]; y: classes, int64 [N]; mean, std: of x/255, [C], by default those of x. device: of the
    batches, by default that of x, which may stay in main memory or in a mapped file.
    Deviation: a last batch of a single image is left out, since batch norm cannot be trained on it."""

    def __init__(self, x, y, config: SearchConfig | EvaluateConfig, mean=None, std=None, device=None):
        if x.dtype != torch.uint8 or x.ndim != 4 or y.dtype != torch.int64 or y.shape != x.shape[:1] or len(y) < 2:
            raise InputError(f"x is {x.dtype} {list(x.shape)} and y {y.dtype} {list(y.shape)}; expected uint8 "
                             "[N,C,H,W] and int64 [N], 2 images or more")
        mean, std = statistics(x) if mean is None else (mean, std)
        self.x, self.y, self.config, self.device = x, y, config, torch.device(device or x.device)
        self.mean, self.std = (torch.as_tensor(t, device=self.device).view(-1, 1, 1) for t in (mean, std))

    def __len__(self):
        batches, rest = divmod(len(self.y), self.config.batch)
        return batches + (rest > 1)

    def epoch(self, seed: int, start: int = 0):
        generator = torch.Generator(self.device).manual_seed(seed)
        order = torch.randperm(len(self.y), device=self.device, generator=generator).to(self.x.device)
        for i, batch in itertools.islice(enumerate(order.split(self.config.batch)), start, len(self)):
            generator.manual_seed(seed_of(seed, i))
            yield self.augment(self.x[batch].to(self.device), generator), self.y[batch].to(self.device)

    def normalise(self, x):
        return (x.float() / 255 - self.mean) / self.std

    def augment(self, x, generator):
        h, w = x.shape[2:]
        padding, cutout = self.config.crop_padding, min(getattr(self.config, "cutout", 0), min(h, w) // 2)

        def random(high):  # one integer below `high` for each image
            return torch.randint(high, (len(x), 1), device=x.device, generator=generator)

        rows, cols = (random(2 * padding + 1) + torch.arange(n, device=x.device) for n in (h, w))  # [N, H], [N, W]
        if self.config.flip:
            cols = torch.where(random(2) == 1, cols.flip(1), cols)
        padded = F.pad(x, [padding] * 4).permute(0, 2, 3, 1)  # [N, H+2p, W+2p, C]
        image = torch.arange(len(x), device=x.device)[:, None, None]
        x = padded[image, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)  # [N, C, H, W]
        # Contiguous: with 1 or 2 channels, torch's channels-last convolutions are not reproducible on the CPU.
        x = self.normalise(x.contiguous())
        if cutout:
            # A square around a random pixel, clipped at the borders (DeVries and Taylor, arXiv 1708.04552).
            # Deviation: it covers at most half of the side, as it does at 32 x 32.
            dy, dx = (torch.arange(n, device=x.device) - random(n) + cutout // 2 for n in (h, w))  # [N, H], [N, W]
            inside = ((dy >= 0) & (dy < cutout))[:, :, None] & ((dx >= 0) & (dx < cutout))[:, None, :]
            x = x.masked_fill(inside[:, None], 0.0)
        return x

if __name__ == "__main__":
    from harness.cli import main  # which imports this file again, as `pdarts`
    raise SystemExit(main())
